"""Each function against a slow reading of its definition, its identities, and worked numbers."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.closed_form import (
    best_of_n_logps,
    chi_squared,
    expected_reward,
    f_optimal_logps,
    frontier,
    implied_rewards,
    kl,
    log_partition,
    log_partition_markov,
    objective,
    optimal_logps,
    tilt,
    total_variation,
)
from dpo_mini.train import fit_table


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


BETAS = (0.05, 0.5, 2.0)
NAN, INF = float("nan"), float("inf")
# The instance of the course: beta = 0.5.
REF = double([[0.4, 0.3, 0.2, 0.1]]).log()
REWARDS = double([[1.0, 0.2, -0.4, 0.8]])


@pytest.fixture
def rewards(generator):
    return torch.randn(3, 6, dtype=torch.float64, generator=generator)


def exact(got, want):
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def by_row(function, *tables):
    """`function(row, ...)` of lists of plain floats, one result a row."""
    rows = zip(*[table.tolist() for table in tables], strict=True)
    return double([function(*row) for row in rows])


# --- definitions, by loops over plain floats -------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_log_partition_sums_over_completions(random_logps, rewards, beta):
    ref_logps = random_logps(3, 6)

    def slow(logps, row):
        return math.log(
            math.fsum(math.exp(p) * math.exp(r / beta) for p, r in zip(logps, row, strict=True))
        )

    exact(log_partition(ref_logps, rewards, beta), by_row(slow, ref_logps, rewards))


@pytest.mark.parametrize("beta", BETAS)
def test_optimal_logps_tilt_the_reference(random_logps, rewards, beta):
    ref_logps = random_logps(3, 6)
    weights = ref_logps.exp() * (rewards / beta).exp()
    exact(optimal_logps(ref_logps, rewards, beta).exp(), weights / weights.sum(-1, keepdim=True))


def test_tilt_is_bayes_rule_in_exact_fractions():
    """Three coins, 7 heads of 10: prior times likelihood over evidence, no float on the way."""
    prior = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    heads = [Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)]
    likelihood = [h**7 * (1 - h) ** 3 for h in heads]
    evidence = sum(p * like for p, like in zip(prior, likelihood, strict=True))
    posterior = [p * like / evidence for p, like in zip(prior, likelihood, strict=True)]
    logps, log_z = tilt(
        double([[float(p) for p in prior]]).log(), double([[float(x) for x in likelihood]]).log()
    )
    exact(logps.exp(), double([[float(p) for p in posterior]]))
    exact(log_z, double([math.log(evidence)]))


def test_kl_and_chi_squared_and_total_variation_sum_over_completions(random_logps):
    logps, others = random_logps(3, 6), random_logps(3, 6)

    def slow_kl(row, other):
        return math.fsum(math.exp(p) * (p - q) for p, q in zip(row, other, strict=True))

    def slow_variance(row, other):
        """Of the weight pi/rho under rho, whose mean is 1."""
        return math.fsum(
            math.exp(q) * (math.exp(p - q) - 1) ** 2 for p, q in zip(row, other, strict=True)
        )

    def slow_tv(row, other):
        """The most that the two probabilities of one event differ by."""
        differences = [math.exp(p) - math.exp(q) for p, q in zip(row, other, strict=True)]
        return math.fsum(difference for difference in differences if difference > 0)

    exact(kl(logps, others), by_row(slow_kl, logps, others))
    exact(chi_squared(logps, others), by_row(slow_variance, logps, others))
    exact(total_variation(logps, others), by_row(slow_tv, logps, others))


@pytest.mark.parametrize("beta", BETAS)
def test_objective_sums_over_completions(random_logps, rewards, beta):
    logps, ref_logps = random_logps(3, 6), random_logps(3, 6)

    def slow(row, ref_row, reward_row):
        terms = zip(row, ref_row, reward_row, strict=True)
        return math.fsum(math.exp(p) * (r - beta * (p - q)) for p, q, r in terms)

    exact(objective(logps, ref_logps, rewards, beta), by_row(slow, logps, ref_logps, rewards))


@pytest.mark.parametrize("n_tokens", [1, 2, 4])
def test_log_partition_markov_sums_over_every_sequence(random_logps, generator, n_tokens):
    initial, transition = random_logps(3), random_logps(3, 3)
    transition[1] = double([0.25, 0.75, 0.0]).log()
    token_rewards, beta = torch.randn(3, dtype=torch.float64, generator=generator), 0.7
    total = 0.0
    for tokens in itertools.product(range(3), repeat=n_tokens):
        logp = initial[tokens[0]] + sum(transition[v, w] for v, w in itertools.pairwise(tokens))
        total += math.exp(logp) * math.exp(sum(token_rewards[v].item() for v in tokens) / beta)
    got = log_partition_markov(initial, transition, token_rewards, beta, n_tokens)
    assert got.shape == ()
    assert got.item() == pytest.approx(math.log(total), abs=1e-12)


# --- optima under other divergences ----------------------------------------------------------

# name, options, f, f'; written from the papers, not from the module
PENALTIES = {
    "reverse_kl": ("reverse_kl", {}, lambda z: z * z.log(), lambda z: z.log() + 1),
    "forward_kl": ("forward_kl", {}, lambda z: -z.log(), lambda z: -1 / z),
    "js": (
        "js",
        {},
        lambda z: z * z.log() - (z + 1) * ((z + 1) / 2).log(),
        lambda z: (2 * z / (1 + z)).log(),
    ),
    "alpha 0.5": ("alpha", {}, lambda z: -4 * z.sqrt(), lambda z: -2 / z.sqrt()),
    "alpha -1": ("alpha", {"alpha": -1.0}, lambda z: 0.5 / z, lambda z: -0.5 / z**2),
    "alpha 3": ("alpha", {"alpha": 3.0}, lambda z: z**3 / 6, lambda z: z**2 / 2),
    "chi_squared": ("chi_squared", {}, lambda z: (z - 1) ** 2, lambda z: 2 * (z - 1)),
    "chi_squared_kl": (
        "chi_squared_kl",
        {},
        lambda z: (z - 1) ** 2 / 2 + z * z.log(),
        lambda z: z + z.log(),
    ),
}


def best_under(name, ref_logps, rewards, beta):
    divergence, options = PENALTIES[name][:2]
    return f_optimal_logps(ref_logps, rewards, beta, divergence=divergence, **options)


@pytest.mark.parametrize("beta", [0.05, 0.35, 2.0, 1e3])
@pytest.mark.parametrize("name", PENALTIES)
def test_f_optima_are_stationary_and_give_up_only_what_is_not_worth_it(
    random_logps, rewards, name, beta
):
    """r - beta f'(z) is one number for all answers that are kept, and no more for the others."""
    ref_logps, slope = random_logps(3, 6), PENALTIES[name][3]
    logps = best_under(name, ref_logps, rewards, beta)
    exact(logps.exp().sum(-1), torch.ones(3).double())
    left = rewards - beta * slope((logps - ref_logps).exp())
    kept = logps > -700  # e^-700 is no number to divide by
    highest = left.masked_fill(~kept, -INF).amax(-1, keepdim=True)
    assert ((highest - left) / (beta + 1)).masked_fill(~kept, 0.0).max() < 1e-9
    gone = torch.isneginf(logps)
    assert (left <= highest + 1e-12)[gone].all()
    if name in ("alpha 3", "chi_squared"):
        assert gone.any() == (beta < 1)
    else:
        assert not gone.any()


@pytest.mark.parametrize("beta", [0.35, 1.0])
@pytest.mark.parametrize("name", PENALTIES)
def test_f_optima_are_where_ascent_of_reward_less_penalty_ends(random_logps, rewards, name, beta):
    ref_logps, penalty = random_logps(3, 6), PENALTIES[name][2]

    def lost(logps):
        divergence = (ref_logps.exp() * penalty((logps - ref_logps).exp())).sum(-1)
        return (beta * divergence - (logps.exp() * rewards).sum(-1)).sum()

    best = best_under(name, ref_logps, rewards, beta)
    climbed = fit_table(lost, ref_logps)
    assert lost(best.clamp(min=-300)) <= lost(climbed) + 1e-12
    assert total_variation(best, climbed).max() < 2e-5
    generator = torch.Generator().manual_seed(0)  # and no policy beside it is better
    for size in (1e-3, 0.1, 1.0):
        noise = size * torch.randn(200, 3, 6, dtype=torch.float64, generator=generator)
        others = (best.clamp(min=-300) + noise).log_softmax(-1)
        assert min(lost(other) for other in others) > lost(best.clamp(min=-300))


def test_the_chi_squared_optimum_in_fractions():
    """With c given up: 0.8 + (0.54 - 0.8 lambda) / 0.7 = 1, so lambda = 1/2."""
    got = best_under("chi_squared", REF, REWARDS, 0.35)
    exact(got.exp(), double([[24 / 35, 6 / 35, 0.0, 1 / 7]]))
    got = best_under("chi_squared", REF, REWARDS, 0.5)  # all kept: lambda = 0.46 is E_ref[r]
    exact(got.exp(), double([[0.616, 0.222, 0.028, 0.134]]))
    got = best_under("chi_squared", REF, REWARDS, 0.43).exp()  # c is just given up: 0.86 = 2 beta
    assert got[0, 2] < 1e-15
    exact(got, REF.exp() * (1 + (REWARDS - 0.46) / 0.86))


def test_the_chi_squared_optimum_by_sorting(random_logps, rewards):
    """As sparsemax: the best answers are kept, as many as have a probability above 0."""

    def by_sorting(ref_row, reward_row, beta=0.3):
        order = sorted(range(6), key=lambda y: -reward_row[y])
        for count in range(6, 0, -1):
            kept = order[:count]
            mass = sum(math.exp(ref_row[y]) for y in kept)
            mean = sum(math.exp(ref_row[y]) * reward_row[y] for y in kept)
            level = (mean - 2 * beta * (1 - mass)) / mass
            ratios = {y: 1 + (reward_row[y] - level) / (2 * beta) for y in kept}
            if min(ratios.values()) > 0:
                return [math.exp(ref_row[y]) * ratios.get(y, 0.0) for y in range(6)]

    ref_logps = random_logps(3, 6)
    want = by_row(by_sorting, ref_logps, rewards)
    assert (want == 0).any()
    exact(best_under("chi_squared", ref_logps, rewards, 0.3).exp(), want)


def test_f_optima_that_are_one_another(random_logps, rewards):
    ref_logps = random_logps(3, 6)

    def best(divergence, beta=0.4, **options):
        return f_optimal_logps(ref_logps, rewards, beta, divergence=divergence, **options)

    for got in (best("reverse_kl"), best("alpha", alpha=1.0)):
        assert torch.equal(got, optimal_logps(ref_logps, rewards, 0.4))
    assert_close(best("alpha", alpha=1 + 1e-9), best("reverse_kl"), atol=1e-7, rtol=0)
    exact(best("alpha", alpha=0.0), best("forward_kl"))
    exact(best("alpha", alpha=2.0, beta=0.8), best("chi_squared"))
    assert not torch.equal(best("alpha"), best("alpha", alpha=0.6))


@pytest.mark.parametrize("name", PENALTIES)
def test_f_optima_depend_on_differences_of_rewards_and_on_each_row_alone(
    random_logps, rewards, name
):
    ref_logps = random_logps(3, 6)
    best = best_under(name, ref_logps, rewards, 0.4)
    moved = rewards + double([[3.0], [-40.0], [0.5]])
    exact(best_under(name, ref_logps, moved, 0.4).exp(), best.exp())
    exact(best_under(name, ref_logps[1:2], rewards[1:2], 0.4), best[1:2])
    order = [3, 0, 5, 1, 4, 2]
    exact(best_under(name, ref_logps[:, order], rewards[:, order], 0.4), best[:, order])
    flat = best_under(name, ref_logps, torch.full_like(rewards, -2.0), 0.4)
    exact(flat, ref_logps)


@pytest.mark.parametrize("name", PENALTIES)
def test_f_optima_keep_out_what_the_reference_keeps_out(name):
    ref_logps = double([[0.4, 0.3, 0.0, 0.2, 0.1]]).log()
    rewards = double([[1.0, 0.2, 50.0, -0.4, 0.8]])
    got = best_under(name, ref_logps, rewards, 0.5)
    assert got[0, 2] == -INF
    exact(got[:, [0, 1, 3, 4]], best_under(name, REF, REWARDS, 0.5))


@pytest.mark.parametrize("name", PENALTIES)
def test_f_optima_where_the_best_answer_is_rare_or_beta_tiny(name):
    """A best answer of probability e^-300, which forward KL and others still lift up."""
    ref_logps = double([[0.0, -300.0]]).log_softmax(-1)
    got = best_under(name, ref_logps, double([[0.0, 1.0]]), 1e-3)
    exact(got.exp().sum(), double(1.0))
    want = {  # of the rare answer: its own f' is close to f'(infinity), the other's 1000 below
        "reverse_kl": 1.0,  # e^(1000 - 300) times as likely
        "forward_kl": 1 - 1 / 1000,  # -1 / z of the common answer is -1000
        "js": 1.0,  # log(2z / (1 + z)) is log 2 - 1000
        "alpha 0.5": 1 - 1 / 500**2,  # -2 / sqrt(z) is -1000
        "alpha -1": 1 - 2000**-0.5,  # -1 / (2 z^2) is -1000
        "alpha 3": 0.0,
        "chi_squared": 0.0,
        "chi_squared_kl": 0.0,
    }[name]
    assert got.exp()[0, 1].item() == pytest.approx(want, abs=1e-12)
    best = best_under(name, REF, REWARDS, 1e-12)
    # alpha = -1 leaves the others the root of beta / 2 over their distance, below 1e-6.
    assert_close(best.exp(), double([[1.0, 0.0, 0.0, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "chi_squared", "chi_squared_kl"])
def test_the_f_optimum_of_a_prompt_and_its_gradient_do_not_depend_on_the_other_prompts(divergence):
    ref_logps = torch.tensor([[0.4, 0.3, 0.3], [0.01, 0.09, 0.9]], dtype=torch.float64).log()
    rewards = torch.tensor([[1.0, 0.2, 0.8], [3.0, 2.5, 0.0]], dtype=torch.float64)

    def best_and_gradient(rows):
        leaf = rewards[rows].clone().requires_grad_()
        best = f_optimal_logps(ref_logps[rows], leaf, 2.0, divergence=divergence).exp()
        return best.detach(), torch.autograd.grad(best[:, 0].sum(), leaf)[0]

    together = best_and_gradient([0, 1])
    alone = zip(best_and_gradient([0]), best_and_gradient([1]), strict=True)
    for both, each in zip(together, alone, strict=True):
        assert_close(both, torch.cat(each), atol=1e-12, rtol=0)


def test_f_optima_have_the_dtype_of_the_tables_and_their_gradients_are_finite():
    for name in PENALTIES:
        exact_one = best_under(name, REF.float().double(), REWARDS.float().double(), 0.35)
        got = best_under(name, REF.float(), REWARDS.float(), 0.35)
        assert got.dtype == torch.float32
        assert_close(got.double(), exact_one, rtol=1e-6, atol=1e-6)
        logits, scores = REF.clone().requires_grad_(), REWARDS.clone().requires_grad_()
        beta = double(0.35).requires_grad_()  # chi-squared gives an answer up here

        def probs(logits, scores, beta, name=name):
            return best_under(name, logits.log_softmax(-1), scores, beta).exp()

        assert gradcheck(probs, (logits, scores, beta))


def test_f_optima_refuse():
    for options, want in (
        (
            {"divergence": "kl"},
            "`divergence` must be 'reverse_kl', 'forward_kl', 'js', 'alpha', 'chi_squared' or "
            "'chi_squared_kl', got 'kl'",
        ),
        ({"divergence": "alpha", "alpha": NAN}, "`alpha` must be a finite number, got nan"),
        ({"divergence": "js", "beta": 0.0}, "`beta` must be a finite number > 0, got 0.0"),
        ({"divergence": "js", "rewards": REWARDS + INF}, "`rewards` must be finite, got inf"),
        (
            {"divergence": "js", "ref_logps": REF + 1},
            "`ref_logps` must have rows whose probabilities sum to 1, got a sum of 2.718: if these "
            "are logits, apply log_softmax first",
        ),
        (
            {"divergence": "js", "ref_logps": double([[-800.0, 0.0, -INF, -INF]])},
            "`ref_logps` must be >= -700 for the best answer, got -800",
        ),
        (
            {"divergence": "alpha", "alpha": -1, "ref_logps": double([[-400.0, 0, -INF, -INF]])},
            "`ref_logps` must be >= -350 for the best answer, got -400",
        ),
    ):
        given = {"ref_logps": REF, "rewards": REWARDS, "beta": 0.5, **options}
        with pytest.raises(ValueError) as caught:
            f_optimal_logps(**given)
        assert str(caught.value) == want


# --- identities ------------------------------------------------------------------------------


def test_a_tilt_may_exclude_one_answer_everywhere(random_logps):
    """What is left is the prior given the others; a whole row may not be excluded."""
    prior, weights = random_logps(2, 3), double([[-math.inf, 0.0, 0.0]] * 2)
    logps, log_z = tilt(prior, weights)
    exact(log_z.exp(), 1 - prior[:, 0].exp())
    exact(logps[:, 1:], prior[:, 1:].log_softmax(-1))
    weights[1] = -math.inf
    with pytest.raises(ValueError, match="`log_weights` must have a finite value where"):
        tilt(prior, weights)


def test_tilt_maximises_mean_weight_less_kl(random_logps, generator):
    prior, weights = random_logps(3, 6), torch.randn(3, 6, dtype=torch.float64, generator=generator)
    tilted, log_z = tilt(prior, weights)
    for _ in range(100):
        logps = random_logps(3, 6)
        bound = (logps.exp() * weights).sum(-1) - kl(logps, prior)
        exact(log_z - bound, kl(logps, tilted))
    exact((tilted.exp() * weights).sum(-1) - kl(tilted, prior), log_z)


def test_tilts_add_up(random_logps, generator):
    prior = random_logps(3, 6)
    first, second = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    halfway, log_z = tilt(prior, first)
    logps, more_log_z = tilt(halfway, second)
    at_once, all_log_z = tilt(prior, first + second)
    exact(logps, at_once)
    exact(log_z + more_log_z, all_log_z)
    back, negative = tilt(logps, -first - second)
    exact(back, prior)
    exact(negative, -all_log_z)


@pytest.mark.parametrize("beta", BETAS)
def test_log_partition_and_optimal_logps_are_tilts(random_logps, rewards, beta):
    ref_logps = random_logps(3, 6)
    logps, log_z = tilt(ref_logps, rewards / beta)
    assert logps.shape == (3, 6)
    assert log_z.shape == (3,)
    exact(logps, optimal_logps(ref_logps, rewards, beta))
    exact(log_z, log_partition(ref_logps, rewards, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_the_objective_is_log_z_less_the_kl_from_the_optimum(random_logps, rewards, beta):
    ref_logps = random_logps(3, 6)
    best = optimal_logps(ref_logps, rewards, beta)
    log_z = log_partition(ref_logps, rewards, beta)
    exact(objective(best, ref_logps, rewards, beta), beta * log_z)
    for _ in range(100):
        logps = random_logps(3, 6)
        gap = beta * log_z - objective(logps, ref_logps, rewards, beta)
        exact(gap, beta * kl(logps, best))


@pytest.mark.parametrize("beta", BETAS)
def test_the_reward_is_read_off_the_optimal_policy(random_logps, rewards, beta):
    ref_logps = random_logps(3, 6)
    best = optimal_logps(ref_logps, rewards, beta)
    log_z = log_partition(ref_logps, rewards, beta)
    exact(implied_rewards(best, ref_logps, beta) + beta * log_z[:, None], rewards)
    # and back: any policy is optimal for the reward that it implies, whose log Z is 0
    logps = random_logps(3, 6)
    implied = implied_rewards(logps, ref_logps, beta)
    exact(optimal_logps(ref_logps, implied, beta), logps)
    exact(log_partition(ref_logps, implied, beta), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
def test_a_shift_of_the_reward_moves_log_z_and_nothing_else(random_logps, rewards, beta):
    ref_logps, shift = random_logps(3, 6), double([[3.0], [-2.0], [0.5]])
    exact(optimal_logps(ref_logps, rewards + shift, beta), optimal_logps(ref_logps, rewards, beta))
    exact(
        log_partition(ref_logps, rewards + shift, beta),
        log_partition(ref_logps, rewards, beta) + shift[:, 0] / beta,
    )


def test_the_limits_of_beta(random_logps, rewards):
    ref_logps = random_logps(3, 6)
    greedy = torch.nn.functional.one_hot(rewards.argmax(-1), 6).double()
    assert_close(optimal_logps(ref_logps, rewards, 1e-4).exp(), greedy, rtol=0, atol=1e-12)
    assert_close(optimal_logps(ref_logps, rewards, 1e13), ref_logps, rtol=0, atol=1e-12)


def test_divergences_are_zero_at_equality_and_positive_elsewhere(random_logps):
    logps, others = random_logps(3, 6), random_logps(3, 6)
    for divergence in (kl, chi_squared, total_variation):
        exact(divergence(logps, logps), torch.zeros(3, dtype=torch.float64))
        assert (divergence(logps, others) > 0).all()
    assert (kl(logps, others) <= chi_squared(logps, others).log1p()).all()  # Jensen
    assert (total_variation(logps, others) <= (kl(logps, others) / 2).sqrt()).all()  # Pinsker


def test_the_frontier_rises_and_no_policy_lies_above_it(random_logps, rewards):
    ref_logps = random_logps(3, 6)
    betas = torch.logspace(3, -2, 60).tolist()
    kls, means = frontier(ref_logps, rewards, betas)
    assert kls.shape == means.shape == (60,)
    assert (kls.diff() > 0).all()
    assert (means.diff() > 0).all()
    best = optimal_logps(ref_logps, rewards, betas[30])
    exact(kls[30], kl(best, ref_logps).mean())
    exact(means[30], expected_reward(best, rewards).mean())
    for _ in range(10):
        logps = (ref_logps + 0.3 * random_logps(3, 6)).log_softmax(-1)
        spent, reward = kl(logps, ref_logps).mean(), expected_reward(logps, rewards).mean()
        low, high = 1e-3, 1e3  # the beta whose optimum spends as much KL
        for _ in range(50):
            middle = math.sqrt(low * high)
            if frontier(ref_logps, rewards, [middle])[0] > spent:
                low = middle
            else:
                high = middle
        (kl_there,), (reward_there,) = frontier(ref_logps, rewards, [low])
        assert kl_there == pytest.approx(spent.item(), rel=1e-9)
        assert reward <= reward_there


# --- worked numbers --------------------------------------------------------------------------


def test_the_course_instance():
    best = optimal_logps(REF, REWARDS, 0.5).exp()
    want = double([[0.7411, 0.1122, 0.0225, 0.1242]])
    assert_close(best, want, rtol=0, atol=5e-5)


def test_numbers_by_hand():
    half = double([[0.5, 0.5]]).log()
    tilted = double([[0.75, 0.25]]).log()
    rewards = double([[2 * math.log(3), 0.0]])  # beta 2: weights 3 : 1
    exact(log_partition(half, rewards, 2.0), double([math.log(2)]))
    exact(optimal_logps(half, rewards, 2.0), tilted)
    exact(kl(tilted, half), double([0.75 * math.log(1.5) + 0.25 * math.log(0.5)]))
    exact(chi_squared(tilted, half), double([0.25]))  # 9/8 + 1/8 - 1
    exact(total_variation(tilted, half), double([0.25]))
    exact(expected_reward(tilted, rewards), double([1.5 * math.log(3)]))
    exact(
        implied_rewards(tilted, half, 2.0),
        double([[2 * math.log(1.5), 2 * math.log(0.5)]]),
    )


# --- probabilities of zero -------------------------------------------------------------------


def test_zero_times_log_zero_is_zero():
    logps = double([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    others = double([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]).log()
    exact(kl(logps, others), double([math.log(2), 0.0]))
    exact(chi_squared(logps, others), double([1.0, 0.0]))
    exact(total_variation(logps, others), double([0.5, 0.0]))
    exact(expected_reward(logps, torch.ones(2, 3).double()), torch.ones(2).double())


@pytest.mark.parametrize("divergence", [kl, chi_squared])
def test_mass_that_the_other_lacks_costs_infinity(divergence):
    others = double([[1.0, 0.0], [0.5, 0.5]]).log()
    logps = double([[0.5, 0.5], [0.5, 0.5]]).log()
    exact(divergence(logps, others), double([INF, 0.0]))
    # also where the mass is too small for a float: e^-800
    logps = double([[0.0, -800.0], [0.0, -800.0]])
    assert divergence(logps, others)[0] == INF


def test_kl_has_finite_gradients_where_probabilities_are_zero():
    logps = double([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    others = double([[0.25, 0.25, 0.5], [0.25, 0.75, 0.0]]).log()
    logps.requires_grad_()
    others.requires_grad_()
    kl(logps, others).sum().backward()
    p, ratios = logps.detach().exp(), (logps - others).detach()
    want = (p * (ratios + 1)).nan_to_num(0.0)  # by hand, and 0 where pi is 0
    exact(logps.grad, want)
    exact(others.grad, -p)


def test_an_infinite_kl_has_no_nan_in_its_gradient():
    logps = double([[0.5, 0.5]]).log().requires_grad_()
    others = double([[1.0, 0.0]]).log().requires_grad_()
    kl(logps, others).sum().backward()
    assert torch.isfinite(logps.grad).all()
    assert torch.isfinite(others.grad).all()


def test_the_reference_may_exclude_a_completion(rewards):
    ref_logps = double([[0.2, 0.0, 0.3, 0.1, 0.4, 0.0]]).log()
    best = optimal_logps(ref_logps, rewards[:1], 0.5)
    assert best.exp()[0, [1, 5]].tolist() == [0.0, 0.0]
    kept = [0, 2, 3, 4]
    exact(
        log_partition(ref_logps, rewards[:1], 0.5),
        log_partition(ref_logps[:, kept], rewards[:1, kept], 0.5),
    )
    exact(
        objective(best, ref_logps, rewards[:1], 0.5),
        0.5 * log_partition(ref_logps, rewards[:1], 0.5),
    )


def test_a_weight_of_zero_is_conditioning(random_logps):
    prior = random_logps(2, 4)
    weights = double([[0.0, -INF, 0.0, -INF], [0.0, 0.0, 0.0, 0.0]]).requires_grad_()
    logps, log_z = tilt(prior, weights)
    kept = prior[0, [0, 2]]
    exact(log_z, torch.stack([kept.logsumexp(0), prior[1].logsumexp(0)]))
    exact(logps[0, [0, 2]], kept - kept.logsumexp(0))
    assert logps[0, [1, 3]].tolist() == [-INF, -INF]
    exact(logps[1], prior[1])
    (slope,) = torch.autograd.grad(log_z.sum(), weights)
    exact(slope, logps.exp())  # d log Z / d w(y) is the tilted probability


def test_a_policy_may_give_up_a_completion():
    logps = double([[1.0, 0.0]]).log()
    half = double([[0.5, 0.5]]).log()
    exact(implied_rewards(logps, half, 2.0), double([[2 * math.log(2), -INF]]))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_by_every_tuple_of_draws(n):
    """Whoever drew the highest reward first wins, over all Y^n tuples; two rewards are equal."""
    # In the last row an answer that others beat has most of the mass up to its own reward.
    ref_probs = double([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.05, 0.4, 0.05, 0.5]])
    rewards = double([[1.0, 0.2, 1.0, 0.8], [0.0, 0.0, -3.0, -3.0], [0.0, 1.0, 0.0, 2.0]])
    won = torch.zeros_like(ref_probs)
    for x in range(3):
        for draws in itertools.product(range(4), repeat=n):
            best = max(draws, key=lambda y: rewards[x, y])  # the first of equals
            won[x, best] += ref_probs[x, list(draws)].prod()
    exact(best_of_n_logps(ref_probs.log(), rewards, n).exp(), won)


def test_best_of_n_keeps_its_digits_where_an_answer_hardly_ever_wins():
    """In exact fractions: the worst answer wins if it is drawn every time, the rare one seldom."""
    parts = [Fraction(1, 10**20), Fraction(1, 2), Fraction(1, 2) - Fraction(1, 10**20)]
    ref_logps = double([[float(part) for part in parts]]).log()
    (logps,) = best_of_n_logps(ref_logps, double([[1.0, 2.0, 0.0]]), 1000).tolist()
    below = parts[2]
    rare = (below + parts[0]) ** 1000 - below**1000
    want = [rare, 1 - (1 - parts[1]) ** 1000, below**1000]
    for got, share in zip(logps, want, strict=True):
        log_share = math.log(share.numerator) - math.log(share.denominator)
        assert math.isclose(got, log_share, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("meetings", [3e-6, 3e-5, 9.9e-5, 1.01e-4, 1e-3])
def test_best_of_n_keeps_its_digits_where_draws_seldom_meet(n, meetings):
    """In exact fractions: the best answer wins if it is drawn at all, here n m times on average."""
    m = Fraction(meetings / n)
    want = math.log(1 - (1 - m) ** n)
    ref_logps = double([[float(m), float(1 - m)]]).log()
    got = best_of_n_logps(ref_logps, double([[1.0, 0.0]]), n)[0, 0].item()
    assert math.isclose(got, want, rel_tol=0, abs_tol=1e-12)


def test_best_of_n_never_says_what_the_reference_does_not():
    ref_logps = double([[0.5, 0.5, 0.0]]).log()
    logps = best_of_n_logps(ref_logps, double([[0.0, 1.0, 9.0]]), 2)
    exact(logps.exp(), double([[0.25, 0.75, 0.0]]))
    assert logps[0, 2] == -INF
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    masked = torch.cat([logits, torch.full_like(logits[:, :1], -INF)], 1).log_softmax(-1)
    (slope,) = torch.autograd.grad(
        best_of_n_logps(masked, double([[0.0, 1.0, 9.0]]), 2)[0, 0], logits
    )
    exact(slope, double([[1.0, -1.0]]))  # log p^2 with p = sigmoid(z_0 - z_1) = 1/2


@pytest.mark.parametrize("n", [0, -1])
def test_best_of_n_needs_a_draw(n):
    assert refusal(ValueError, best_of_n_logps, GOOD, LOGITS, n) == (
        f"`n` must be a whole number >= 1, got {n}"
    )
    assert refusal(TypeError, best_of_n_logps, GOOD, LOGITS, 2.0) == (
        "`n` must be a whole number >= 1, got float"
    )


# --- gradients and dtypes --------------------------------------------------------------------


TABLE_FUNCTIONS = {
    "tilt": lambda p, q, r: tilt(q, r)[0] + tilt(q, r)[1][:, None],
    "tilted_logps": lambda p, q, r: tilt(q, r)[0],
    "log_partition": lambda p, q, r: log_partition(q, r, 0.7),
    "optimal_logps": lambda p, q, r: optimal_logps(q, r, 0.7),
    "implied_rewards": lambda p, q, r: implied_rewards(p, q, 0.7),
    "kl": lambda p, q, r: kl(p, q),
    "expected_reward": lambda p, q, r: expected_reward(p, r),
    "objective": lambda p, q, r: objective(p, q, r, 0.7),
    "frontier": lambda p, q, r: frontier(q, r, [2.0, 0.7]),
    "best_of_n_logps": lambda p, q, r: best_of_n_logps(q, r, 3),
    "total_variation": lambda p, q, r: total_variation(p, q),
    "chi_squared": lambda p, q, r: chi_squared(p, q),
}


def markov(p, q, r):
    return log_partition_markov(p[0], q, r[0], 0.7, 4)


@pytest.mark.parametrize("name", [*TABLE_FUNCTIONS, "log_partition_markov"])
def test_gradients(name, generator):
    function = {**TABLE_FUNCTIONS, "log_partition_markov": markov}[name]
    p, q, r = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator).requires_grad_()
    assert gradcheck(
        lambda p, q, r: function(p.log_softmax(-1), q.log_softmax(-1), r),
        (p.detach().requires_grad_(), q.detach().requires_grad_(), r.detach().requires_grad_()),
    )


def test_a_prompt_does_not_see_the_rewards_of_another():
    """Two equally likely answers, one 2 beta better: sigma(2), whatever another prompt pays."""
    ref_logps = double([[0.5, 0.5]] * 3).log()
    rewards = double([[0.3, 0.1], [2.0**70, 2.0**70], [-(2.0**70), 0.0]])
    better = 1 / (1 + math.exp(-2))
    want = double([[better, 1 - better], [0.5, 0.5], [0.0, 1.0]])
    exact(optimal_logps(ref_logps, rewards, 0.1).exp(), want)
    exact(tilt(ref_logps, rewards / 0.1)[0].exp(), want)


def test_the_gradient_of_the_frontier_is_a_mean_over_prompts(random_logps, generator):
    ref_logps = random_logps(3, 4).requires_grad_()
    rewards = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    for part in range(2):
        (slope,) = torch.autograd.grad(frontier(ref_logps, rewards, [0.7])[part].sum(), ref_logps)
        for x in range(3):
            alone = ref_logps[x : x + 1].detach().requires_grad_()
            of_one = frontier(alone, rewards[x : x + 1], [0.7])[part].sum()
            (want,) = torch.autograd.grad(of_one, alone)
            exact(slope[x], want[0] / 3)


def test_log_z_may_be_as_large_as_the_widest_table_allows():
    """Equal rewards r: log Z = r / beta, here above the largest float16, 65,504."""
    half = torch.full((2, 2), 0.5, dtype=torch.float16).log()
    rewards = torch.full((2, 2), 60_000.0, dtype=torch.float16)
    for tables in ((half.float(), rewards), (half, rewards.float())):
        log_z = log_partition(*tables, 0.5)
        assert log_z.dtype == torch.float32
        assert_close(log_z, torch.full((2,), 120_000.0), rtol=1e-6, atol=0)
    chain = half[0], half, rewards[0]
    for wide in range(3):
        tables = [table.float() if n == wide else table for n, table in enumerate(chain)]
        log_z = log_partition_markov(*tables, 0.5, 2)
        assert log_z.dtype == torch.float32
        assert_close(log_z, torch.tensor(240_000.0), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"^`beta` must be large enough .* in torch\.float16"):
        log_partition(half, rewards, 0.5)
    with pytest.raises(ValueError, match=r"^`beta` must be large enough .* in torch\.float16"):
        log_partition_markov(*chain, 0.5, 2)


@pytest.mark.parametrize("name", [*TABLE_FUNCTIONS, "log_partition_markov"])
def test_dtype_is_kept(name, random_logps, generator):
    function = {**TABLE_FUNCTIONS, "log_partition_markov": markov}[name]
    tables = random_logps(4, 4), random_logps(4, 4), torch.randn(4, 4, generator=generator).double()
    in_double, in_single = function(*tables), function(*[table.float() for table in tables])
    if name == "frontier":
        in_double, in_single = torch.stack(in_double), torch.stack(in_single)
    assert in_double.dtype == torch.float64
    assert in_single.dtype == torch.float32
    assert_close(in_single.double(), in_double, rtol=1e-4, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------

GOOD = torch.full((2, 3), 1 / 3, dtype=torch.float64).log()
LOGITS = torch.zeros(2, 3, dtype=torch.float64)
SUMS = (
    "must have rows whose probabilities sum to 1, got a sum of 3: "
    "if these are logits, apply log_softmax first"
)
# the function, the names of its tables in order, what follows them
TABLES = {
    tilt: (("prior_logps", "log_weights"), ()),
    log_partition: (("ref_logps", "rewards"), (1.0,)),
    optimal_logps: (("ref_logps", "rewards"), (1.0,)),
    implied_rewards: (("logps", "ref_logps"), (1.0,)),
    kl: (("logps", "other_logps"), ()),
    expected_reward: (("logps", "rewards"), ()),
    objective: (("logps", "ref_logps", "rewards"), (1.0,)),
    frontier: (("ref_logps", "rewards"), ([1.0],)),
    best_of_n_logps: (("ref_logps", "rewards"), (2,)),
    total_variation: (("logps", "other_logps"), ()),
    chi_squared: (("logps", "other_logps"), ()),
}
EACH_TABLE = [
    pytest.param(function, at, id=f"{function.__name__}-{name}")
    for function, (names, _) in TABLES.items()
    for at, name in enumerate(names)
]


def refusal(kind, call, *arguments):
    with pytest.raises(kind) as caught:
        call(*arguments)
    return str(caught.value)


def with_table(function, at, table):
    """The complaint of `function` about a bad table at one place among good ones."""
    names, rest = TABLES[function]
    tables = [GOOD if "logps" in name else LOGITS for name in names]
    tables[at] = table
    kind = TypeError if table is None else ValueError
    return names, refusal(kind, function, *tables, *rest)


@pytest.mark.parametrize(("function", "at"), EACH_TABLE)
def test_a_table_of_another_kind_is_refused(function, at):
    names, message = with_table(function, at, None)
    kinds = "a floating torch.Tensor [X, Y], an array or a list of numbers"
    assert message == f"`{names[at]}` must be {kinds}, got NoneType"
    names, message = with_table(function, at, torch.zeros(2, 3, dtype=torch.int64))
    assert (
        message
        == f"`{names[at]}` must have a floating dtype (.double() makes one), got torch.int64"
    )
    names, message = with_table(function, at, GOOD[0])
    assert (
        message == f"`{names[at]}` must be [X, Y], one row per prompt, "
        f"got shape [3]: for one prompt write {names[at]}[None]"
    )
    names, message = with_table(function, at, GOOD[:0])
    assert message == f"`{names[at]}` must be a non-empty [X, Y], got shape [0, 3]"


@pytest.mark.parametrize(("function", "at"), EACH_TABLE)
def test_a_table_unlike_the_others_is_refused(function, at):
    names, message = with_table(function, at, GOOD[:, :2])
    if at == 0:
        assert message == f"`{names[1]}` must have shape [2, 2] like `{names[0]}`, got [2, 3]"
    else:
        assert message == f"`{names[at]}` must have shape [2, 3] like `{names[0]}`, got [2, 2]"


@pytest.mark.parametrize(("function", "at"), EACH_TABLE)
def test_the_smaller_of_two_dtypes_is_cast_up(function, at):
    names, rest = TABLES[function]
    tables = [GOOD if "logps" in name else LOGITS for name in names]
    tables[at] = tables[at].float()
    mixed = function(*tables, *rest)
    tables[at] = tables[at].double()
    for got, want in zip(as_tuple(mixed), as_tuple(function(*tables, *rest)), strict=True):
        assert got.dtype == torch.float64
        assert torch.equal(got, want)


@pytest.mark.parametrize("function", TABLES)
def test_lists_and_arrays_are_tables(function):
    names, rest = TABLES[function]
    tables = [GOOD if "logps" in name else LOGITS for name in names]
    want = as_tuple(function(*tables, *rest))
    for made in ([t.tolist() for t in tables], [t.numpy() for t in tables]):
        for got, known in zip(as_tuple(function(*made, *rest)), want, strict=True):
            assert torch.equal(got, known)
    beside = [tables[0].float(), *(t.tolist() for t in tables[1:])]
    assert as_tuple(function(*beside, *rest))[0].dtype == torch.float32


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("function", "at"), EACH_TABLE)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_table_with_a_bad_value_is_refused(function, at, value):
    bad = LOGITS.clone()
    bad[1, 2] = value
    name = TABLES[function][0][at]
    only_finite = name == "rewards" or (function is implied_rewards and name == "ref_logps")
    if only_finite:
        assert with_table(function, at, bad)[1] == f"`{name}` must be finite, got {value}"
    elif name == "log_weights" and value != -INF:
        want = f"`log_weights` must have finite values or -inf, got {value}"
        assert with_table(function, at, bad)[1] == want
    elif value != -INF:
        shown = "NaN" if math.isnan(value) else "+inf"
        want = f"`{name}` must be log-probabilities < inf, got {shown}"
        assert with_table(function, at, bad)[1] == want


@pytest.mark.parametrize(("function", "at"), EACH_TABLE)
def test_logits_are_refused_where_probabilities_must_sum_to_one(function, at):
    name = TABLES[function][0][at]
    if name not in ("rewards", "log_weights") and function is not implied_rewards:
        assert with_table(function, at, LOGITS)[1] == f"`{name}` {SUMS}"


def test_weights_that_leave_no_mass_are_refused():
    want = (
        "`log_weights` must have a finite value where the prior has mass, got a row of -inf there"
    )
    for row in ([-INF, -INF, -INF], [-INF, -INF, 1.0]):
        prior = double([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]).log()
        weights = double([[0.0, -INF, 0.0], row])
        assert refusal(ValueError, tilt, prior, weights) == want


@pytest.mark.parametrize("beta", [0, -1.0, NAN, INF])
def test_beta_is_finite_and_positive(beta):
    want = f"`beta` must be a finite number > 0, got {beta}"
    for function in (log_partition, optimal_logps, implied_rewards):
        assert refusal(ValueError, function, GOOD, GOOD, beta) == want
        assert refusal(TypeError, function, GOOD, GOOD, "1") == "`beta` must be a number, got str"
    assert refusal(ValueError, objective, GOOD, GOOD, GOOD, beta) == want
    assert (
        refusal(TypeError, objective, GOOD, GOOD, GOOD, "1") == "`beta` must be a number, got str"
    )
    want = f"`betas` must be a finite number > 0, got {beta}"
    assert refusal(ValueError, frontier, GOOD, GOOD, [1.0, beta]) == want


def test_betas_are_several_numbers():
    want = "`betas` must have at least one number > 0, got none"
    assert refusal(ValueError, frontier, GOOD, GOOD, []) == want
    assert refusal(ValueError, frontier, GOOD, GOOD, torch.empty(0)) == want
    want = "`betas` must be a sequence of numbers > 0, got float"
    assert refusal(TypeError, frontier, GOOD, GOOD, 1.0) == want
    want = "`betas` must be a sequence of numbers > 0, got list"
    assert refusal(TypeError, frontier, GOOD, GOOD, [None]) == want
    from_tensor = frontier(GOOD, LOGITS, double([1.0, 2.0]))
    assert torch.equal(torch.stack(from_tensor), torch.stack(frontier(GOOD, LOGITS, (1, 2))))


V = torch.full((3,), 1 / 3, dtype=torch.float64).log()
VV = V.expand(3, 3)
MARKOV_REFUSED = [
    ((V, VV, V, 0.0, 2), "`beta` must be a finite number > 0, got 0.0"),
    ((V, VV, V, 1.0, 0), "`n_tokens` must be a whole number >= 1, got 0"),
    ((VV, VV, V, 1.0, 2), "`initial_logps` must be a non-empty [V], got shape [3, 3]"),
    ((V, V, V, 1.0, 2), "`transition_logps` must be a non-empty [V, V], got shape [3]"),
    ((V, VV, V[:2], 1.0, 2), "`token_rewards` must have shape [3] like `initial_logps`, got [2]"),
    ((V, VV[:2], V, 1.0, 2), "`transition_logps` must have shape [3, 3], got [2, 3]"),
    ((V, VV[:, :2], V, 1.0, 2), "`transition_logps` must have shape [3, 3], got [3, 2]"),
    ((V * 0, VV, V, 1.0, 2), f"`initial_logps` {SUMS}"),
    ((V, VV * 0, V, 1.0, 2), f"`transition_logps` {SUMS}"),
    ((V * NAN, VV, V, 1.0, 2), "`initial_logps` must be log-probabilities < inf, got NaN"),
    ((V, VV * -INF, V, 1.0, 2), "`transition_logps` must be log-probabilities < inf, got +inf"),
    ((V, VV, V * INF, 1.0, 2), "`token_rewards` must be finite, got -inf"),
]


@pytest.mark.parametrize(("arguments", "want"), MARKOV_REFUSED)
def test_a_bad_markov_chain_is_refused(arguments, want):
    assert refusal(ValueError, log_partition_markov, *arguments) == want
    with pytest.raises(TypeError, match="`n_tokens` must be a whole number >= 1, got float"):
        log_partition_markov(V, VV, V, 1.0, 2.0)


def test_tables_of_more_columns_than_a_block_are_the_sums_of_their_definitions(generator):
    """Blocks of 8,192 columns and a rest, one without support, beside the plain formulas."""
    n = 3 * 2**13 + 5
    logps, other = (
        torch.randn(2, n, dtype=torch.float64, generator=generator).log_softmax(-1)
        for _ in range(2)
    )
    logps[:, 2**13 : 2**14] = -INF
    logps = logps.log_softmax(-1)
    rewards = torch.randn(2, n, dtype=torch.float64, generator=generator)
    p, q = logps.exp(), other.exp()
    assert_close(kl(logps, other), torch.xlogy(p, p / q).sum(-1), atol=1e-12, rtol=0)
    assert_close(total_variation(logps, other), (p - q).abs().sum(-1) / 2, atol=1e-12, rtol=0)
    log_z = (p * (rewards / 0.5).exp()).sum(-1).log()
    assert_close(log_partition(logps, rewards, 0.5), log_z, atol=1e-12, rtol=0)
    best = p * (rewards / 0.5).exp() / log_z.exp()[:, None]
    kls, values = frontier(logps, rewards, [0.5])
    assert_close(
        kls[0], torch.xlogy(best, best / p.clamp(min=1e-300)).sum(-1).mean(), atol=1e-12, rtol=0
    )
    assert_close(values[0], (best * rewards).sum(-1).mean(), atol=1e-12, rtol=0)

"""Estimators against the exact gradient of an enumerated bandit, definitions, worked numbers."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.closed_form import expected_reward, kl
from dpo_mini.policy_gradient import (
    AdaptiveKLController,
    clipped_surrogate_loss,
    clipped_value_loss,
    entropy,
    gae,
    group_normalised_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    leave_one_out_advantages,
    mean_advantages,
    optimal_baseline,
    reinforce_loss,
    unclipped_surrogate_loss,
    value_loss,
    whiten,
)

NAN, INF = float("nan"), float("inf")
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, 0.5, -1.0], dtype=torch.float64)
OLD_LOGITS = torch.tensor([0.0, 0.4, 0.1, -0.6], dtype=torch.float64)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def exact(got, want):
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def refusal(kind, call, *arguments, **options):
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return str(caught.value)


def gradient(scalar_of_logits, logits=LOGITS):
    logits = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(scalar_of_logits(logits), logits)
    return found


def exact_gradient(rewards=REWARDS, logits=LOGITS):
    """The gradient of E[r] by differentiating the sum over all actions."""
    return gradient(lambda at: (at.softmax(-1) * rewards).sum(), logits)


def groups(n_actions, size):
    """Every K-tuple of actions, `[n, K]`."""
    return torch.tensor(list(itertools.product(range(n_actions), repeat=size)))


def mean_gradient(advantages_of, size, rewards=REWARDS, logits=LOGITS):
    """The mean of an estimator of K samples, over every K-tuple by its probability."""
    actions = groups(len(rewards), size)
    probs = logits.softmax(-1)[actions].prod(-1)

    def loss(at):
        logps = at.log_softmax(-1)[actions]
        advantages = advantages_of(rewards[actions])
        return (probs * reinforce_loss(logps, advantages).mean(-1)).sum()

    return -gradient(loss, logits)


# --- surrogates ------------------------------------------------------------------------------


def test_the_score_function_is_unbiased_over_every_action():
    for baseline in (0.0, 0.7, -30.0):
        exact(mean_gradient(lambda r, b=baseline: r - b, 1), exact_gradient())


def test_no_gradient_flows_into_an_advantage():
    logps, advantages = double([-1.0, -2.0]), double([3.0, -0.5]).requires_grad_()
    logps.requires_grad_()
    loss = reinforce_loss(logps, advantages)
    exact(loss.detach(), double([3.0, -1.0]))
    loss.sum().backward()
    exact(logps.grad, double([-3.0, 0.5]))
    assert advantages.grad is None
    assert reinforce_loss(torch.zeros(2, 3), torch.ones(2, 3)).shape == (2, 3)


def off_policy_gradient(loss):
    """The mean over every action of pi_old of the gradient of a surrogate at pi_theta."""
    old_logps = OLD_LOGITS.log_softmax(-1)
    return -gradient(lambda at: (old_logps.exp() * loss(at.log_softmax(-1), old_logps)).sum())


def test_the_ratio_makes_another_policys_samples_unbiased():
    def loss(logps, old_logps):
        return unclipped_surrogate_loss(logps, old_logps, REWARDS)

    exact(off_policy_gradient(loss), exact_gradient())


def test_the_value_of_the_unclipped_surrogate_is_the_ratio_times_the_advantage():
    loss = unclipped_surrogate_loss(
        double([2.0, 0.5]).log(), double([1.0, 1.0]).log(), double([3.0, -4.0])
    )
    exact(loss, double([-6.0, 2.0]))


RATIOS = double([0.5, 0.9, 1.0, 1.1, 2.0])
# ratio:              0.5   0.9   1.0   1.1   2.0
CLIPPED = {1.0: ([-0.5, -0.9, -1.0, -1.1, -1.2], [-0.5, -0.9, -1.0, -1.1, 0.0]),
           -1.0: ([0.8, 0.9, 1.0, 1.1, 2.0], [0.0, 0.9, 1.0, 1.1, 2.0])}  # fmt: skip


@pytest.mark.parametrize("advantage", CLIPPED)
def test_clipping_by_hand(advantage):
    """Values, and gradients with respect to log pi: the ratio times -A, or 0 where clipped."""
    losses, slopes = CLIPPED[advantage]
    logps = RATIOS.log().requires_grad_()
    old = torch.zeros_like(RATIOS, requires_grad=True)
    advantages = torch.full_like(RATIOS, advantage).requires_grad_()
    found = clipped_surrogate_loss(logps, old, advantages, clip_eps=0.2)
    exact(found.detach(), double(losses))
    found.sum().backward()
    exact(logps.grad, double(slopes))
    assert old.grad is None
    assert advantages.grad is None
    unclipped = unclipped_surrogate_loss(logps, old, advantages)
    assert (found >= unclipped).all()
    unclipped.sum().backward()
    assert old.grad is None
    assert advantages.grad is None


def test_a_wide_clip_clips_nothing(generator):
    logps, old, advantages = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    wide = clipped_surrogate_loss(logps, old, advantages, clip_eps=1e6)
    exact(wide, unclipped_surrogate_loss(logps, old, advantages))


def test_at_the_first_step_ppo_is_reinforce():
    def clipped(at):
        logps = at.log_softmax(-1)
        return clipped_surrogate_loss(logps, logps, REWARDS, clip_eps=0.2).sum()

    def plain(at):
        return reinforce_loss(at.log_softmax(-1), REWARDS).sum()

    exact(gradient(clipped), gradient(plain))


def test_value_losses_by_hand():
    values = double([1.0, 1.0, 3.0]).requires_grad_()
    returns = double([2.0, 0.0, 2.5]).requires_grad_()
    old = double([1.0, 1.5, 1.0]).requires_grad_()
    exact(value_loss(values, returns).detach(), double([0.5, 0.5, 0.125]))
    # Clipped to old +- 0.2: 1.0, 1.3, 1.2, whose errors are 1.0, 1.3, 1.3.
    clipped = clipped_value_loss(values, old, returns, clip_eps=0.2)
    exact(clipped.detach(), double([0.5, 0.845, 0.845]))
    (slope,) = torch.autograd.grad(value_loss(values, returns).sum(), values)
    exact(slope, double([-1.0, 1.0, 0.5]))
    (slope,) = torch.autograd.grad(clipped.sum(), values)
    exact(slope, double([-1.0, 0.0, 0.0]))
    wide = clipped_value_loss(values, old, returns, clip_eps=9.0)
    for loss in (value_loss(values, returns), wide):
        found = torch.autograd.grad(loss.sum(), [values, returns, old], allow_unused=True)
        exact(found[0], double([-1.0, 1.0, 0.5]))
        assert found[1:] == (None, None)


# --- baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_leave_one_out_is_unbiased_over_every_group(size):
    exact(mean_gradient(leave_one_out_advantages, size), exact_gradient())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_mean_of_all_as_baseline_is_short_by_one_part_in_k(size):
    exact(mean_gradient(mean_advantages, size), (size - 1) / size * exact_gradient())


def test_advantages_by_hand():
    rewards = double([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    exact(mean_advantages(rewards), double([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]))
    exact(leave_one_out_advantages(rewards), double([[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]))
    root = math.sqrt(14 / 3)  # the mean square of -2, -1, 3
    want = double([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]])
    exact(group_normalised_advantages(rewards, eps=0.5), want / (root + 0.5))
    exact(group_normalised_advantages(rewards), want / (root + 1e-4))


def grpo_ratio(p, size):
    """Mean of GRPO's gradient over the true one for a reward of 0 or 1: E[std] / (p (1 - p))."""
    return sum(
        math.comb(size, n) * p**n * (1 - p) ** (size - n) * math.sqrt(n * (size - n)) / size
        for n in range(size + 1)
    ) / (p * (1 - p))


@pytest.mark.parametrize(("size", "p"), [(2, 0.3), (2, 0.01), (5, 0.3)])
def test_group_normalisation_stretches_the_gradient_of_a_binary_reward(size, p):
    logits, rewards = double([math.log(p), math.log(1 - p)]), double([1.0, 0.0])

    def advantages(rewards):
        return group_normalised_advantages(rewards, eps=1e-14)

    found = mean_gradient(advantages, size, rewards, logits)
    exact(found, grpo_ratio(p, size) * exact_gradient(rewards, logits))
    if size == 2:
        exact(found, exact_gradient(rewards, logits))


def test_group_normalisation_with_many_samples_of_a_rare_success():
    """All 2^64 groups of 64 by their number of successes: the mean gradient is 6.74 times."""
    p, size = 0.01, 64
    logits = double([math.log(p), math.log(1 - p)])
    n = torch.arange(size + 1, dtype=torch.float64)
    rewards = (torch.arange(size)[None] < n[:, None]).double()  # [65, 64]: n successes first
    counts = double([math.comb(size, k) for k in range(size + 1)])
    probs = counts * p**n * (1 - p) ** (size - n)

    def loss(at):
        logps = at.log_softmax(-1)[1 - rewards.long()]
        advantages = group_normalised_advantages(rewards, eps=1e-14)
        return (probs * reinforce_loss(logps, advantages).mean(-1)).sum()

    found = -gradient(loss, logits)
    ratio = found / exact_gradient(double([1.0, 0.0]), logits)
    exact(ratio, torch.full((2,), grpo_ratio(p, size), dtype=torch.float64))
    assert round(ratio[0].item(), 2) == 6.74


def test_the_slope_of_an_entropy_is_that_of_its_own_row():
    """dH/dz_v = p_v (mean logit - z_v), however far away the logits of another row are."""
    row = double([0.3, -0.2, 0.5])
    logits = torch.stack([row, row + 2.0**70, row - 2.0**70]).requires_grad_()
    entropy(logits)[0].backward()
    probs = row.softmax(0)
    exact(logits.grad[0], probs * ((probs * row).sum() - row))


def test_the_optimal_baseline_has_the_least_variance(random_logps, generator):
    logps = random_logps(3, 5)
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    scores = torch.eye(5, dtype=torch.float64) - logps.exp().unsqueeze(1)  # [X, Y, Y]

    def total_variance(baseline):
        estimates = (rewards - baseline[:, None]).unsqueeze(-1) * scores
        mean = (logps.exp().unsqueeze(-1) * estimates).sum(1, keepdim=True)
        return (logps.exp().unsqueeze(-1) * (estimates - mean) ** 2).sum((1, 2))

    best = optimal_baseline(logps, rewards, scores.square().sum(-1))
    assert best.shape == (3,)
    slope = torch.autograd.functional.jacobian(lambda b: total_variance(b).sum(), best)
    exact(slope, torch.zeros_like(best))
    for other in (best + 0.1, best - 0.1, expected_reward(logps, rewards)):
        assert (total_variance(other) > total_variance(best)).all()


def test_the_optimal_baseline_by_hand():
    logps = double([[0.5, 0.25, 0.25]]).log()
    best = optimal_baseline(logps, double([[1.0, 2.0, 4.0]]), double([[1.0, 4.0, 0.0]]))
    exact(best, double([(0.5 * 1 + 1.0 * 2) / 1.5]))
    impossible = double([[0.0, -INF, -INF]])
    exact(
        optimal_baseline(impossible, double([[3.0, 9.0, 9.0]]), double([[1.0, 1.0, 1.0]])),
        double([3.0]),
    )


def test_the_optimal_baseline_where_a_sure_answer_has_no_score():
    """Only the two others count, e times as likely one as the other, however rare both are."""
    rewards, squares = double([[5.0, 1.0, 3.0]]), double([[0.0, 1.0, 1.0]])
    want = double([(1 + 3 / math.e) / (1 + 1 / math.e)])
    for rare in (30.0, 700.0, 709.5, 800.0, 1e5):  # e^709.8 is the largest float
        best = optimal_baseline(double([[0.0, -rare, -rare - 1]]), rewards, squares)
        exact(best, want)


# --- gae and whitening -----------------------------------------------------------------------

LENGTHS = torch.tensor([5, 1, 3, 2])
MASK = torch.arange(5) < LENGTHS[:, None]


@pytest.fixture
def episode(generator):
    return torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)


def definition(rewards, values, discount, lam):
    """GAE of one completion as the paper's Eq. 16, a sum of TD errors to the end."""
    rewards, values = rewards.tolist(), [*values.tolist(), 0.0]
    n = len(rewards)
    errors = [rewards[t] + discount * values[t + 1] - values[t] for t in range(n)]
    return [sum((discount * lam) ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.3, 0.0])
def test_gae_by_recursion_is_gae_by_definition(episode, discount, lam):
    rewards, values = episode
    advantages, returns = gae(rewards, values, MASK, discount=discount, lam=lam)
    for row, n in enumerate(LENGTHS.tolist()):
        want = definition(rewards[row, :n], values[row, :n], discount, lam)
        exact(advantages[row], double(want + [0.0] * (5 - n)))
        exact(returns[row, :n], double(want) + values[row, :n])
        assert (returns[row, n:] == 0).all()


def test_lambda_one_is_return_less_value(episode):
    rewards, values = episode
    advantages, returns = gae(rewards, values, MASK, discount=1.0, lam=1)
    to_go = (rewards * MASK).flip(1).cumsum(1).flip(1)
    exact(returns, to_go * MASK)
    exact(advantages, (to_go - values) * MASK)


def test_lambda_zero_is_the_td_error(episode):
    rewards, values = episode
    advantages, _ = gae(rewards, values, MASK.long(), discount=0.9, lam=0)
    after = torch.cat([values[:, 1:] * MASK[:, 1:], torch.zeros(4, 1)], dim=1)
    exact(advantages, (rewards + 0.9 * after - values) * MASK)


def test_what_comes_after_the_end_changes_nothing(episode):
    rewards, values = episode
    want = gae(rewards, values, MASK, discount=0.9, lam=0.8)
    rubbish = gae(
        rewards.masked_fill(~MASK, NAN), values.masked_fill(~MASK, INF), MASK, discount=0.9, lam=0.8
    )
    for got, expected in zip(rubbish, want, strict=True):
        assert torch.equal(got, expected)
        assert (got[~MASK] == 0).all()


def test_completions_of_one_token(episode):
    rewards, values = episode[:, :, :1]
    advantages, returns = gae(rewards, values, MASK[:, :1], discount=0.9, lam=0.8)
    exact(advantages, rewards - values)
    exact(returns, rewards)


def test_gae_passes_no_gradient_and_leaves_its_arguments(episode):
    rewards, values = (part.clone().requires_grad_() for part in episode)
    advantages, returns = gae(rewards, values, MASK, discount=1.0, lam=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert torch.equal(values.detach(), episode[1])


def test_whitening_over_the_tokens_of_a_batch(episode):
    white = whiten(episode[0].masked_fill(~MASK, NAN), MASK)
    assert (white[~MASK] == 0).all()
    counted = white[MASK]
    assert abs(counted.mean().item()) < 1e-12
    assert abs(counted.square().mean().item() - 1) < 1e-7
    two = whiten(double([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    edge = 1 / math.sqrt(1 + 1e-8)
    exact(two, double([[-edge, edge, 0.0]]))
    for value in (1.0, 0.1, 1e6 / 7):  # equal values, also where their mean would be rounded
        assert not whiten(torch.full((7, 13), value), torch.ones(7, 13)).any()


# --- entropy and KL --------------------------------------------------------------------------


def test_entropy_of_known_distributions():
    rows = double([[0.0, 0.0, 0.0, 0.0], [0.0, -INF, -INF, -INF], [7.0, 7.0, -INF, -INF]])
    exact(entropy(rows), double([math.log(4), 0.0, math.log(2)]))
    exact(entropy(double([0.2, 0.8]).log()), double(-0.2 * math.log(0.2) - 0.8 * math.log(0.8)))
    assert entropy(torch.zeros(2, 3, 7)).shape == (2, 3)


def test_the_gradient_of_entropy(generator):
    logits = torch.randn(2, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert gradcheck(entropy, logits)
    slope = gradient(lambda at: entropy(at), double([0.0, 1.0, -INF]))
    assert torch.isfinite(slope).all()


def test_a_uniform_policys_entropy_is_log_v_less_its_kl(random_logps):
    logps = random_logps(3, 6)
    uniform = torch.full_like(logps, 1 / 6).log()
    exact(entropy(logps), math.log(6) - kl(logps, uniform))


LOGPS, REF_LOGPS = LOGITS.log_softmax(-1), OLD_LOGITS.log_softmax(-1)


def test_the_mean_of_k1_and_k3_is_the_kl_with_its_sign():
    probs, true = LOGPS.exp(), kl(LOGPS[None], REF_LOGPS[None])[0]
    exact((probs * kl_k1(LOGPS, REF_LOGPS)).sum(), true)
    exact((probs * kl_k3(LOGPS, REF_LOGPS)).sum(), true)
    assert abs((probs * kl_k2(LOGPS, REF_LOGPS)).sum() - true) > 1e-3
    assert (kl_k2(LOGPS, REF_LOGPS) >= 0).all()
    assert (kl_k3(LOGPS, REF_LOGPS) >= 0).all()


def loss_gradient(estimator):
    """The mean gradient of an estimator as a loss: samples fixed, pi_theta's logps moving."""
    return gradient(lambda at: (LOGPS.exp() * estimator(at.log_softmax(-1), REF_LOGPS)).sum())


def test_the_gradients_of_the_estimators_as_losses():
    """k1 has none, k2 has the KL's, k3 has the forward KL's."""
    exact(loss_gradient(kl_k1), torch.zeros(4, dtype=torch.float64))
    reverse = gradient(lambda at: kl(at.log_softmax(-1)[None], REF_LOGPS[None]).sum())
    forward = gradient(lambda at: kl(REF_LOGPS[None], at.log_softmax(-1)[None]).sum())
    exact(loss_gradient(kl_k2), reverse)
    exact(loss_gradient(kl_k3), forward)


def test_the_estimators_by_hand():
    logps, ref = double([0.0, 0.0]), double([-math.log(2), math.log(2)])
    exact(kl_k1(logps, ref), double([math.log(2), -math.log(2)]))
    exact(kl_k2(logps, ref), double([math.log(2) ** 2 / 2] * 2))
    exact(kl_k3(logps, ref), double([0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]))


def test_k3_keeps_its_digits_near_zero():
    near = torch.tensor([1e-3, -1e-3, 1e-4])
    got = kl_k3(near, torch.zeros(3))
    assert_close(got, near**2 / 2, rtol=2e-3, atol=0.0)


def test_the_controller_by_hand():
    controller = AdaptiveKLController(beta=0.1, target=6.0, horizon=1000)
    controller.update(6.0, 100)
    assert controller.beta == 0.1
    controller.update(6.6, 100)  # an error of 10 %
    assert math.isclose(controller.beta, 0.1 * 1.01)
    controller.update(torch.tensor(60.0), 100)  # clipped to 20 %
    assert math.isclose(controller.beta, 0.1 * 1.01 * 1.02)
    controller.update(-1.0, 1000)
    assert math.isclose(controller.beta, 0.1 * 1.01 * 1.02 * 0.8)


def test_the_controller_settles_where_the_kl_is_the_target():
    """A toy world whose KL is 1 / beta: beta must come to rest at 1 / target."""
    controller = AdaptiveKLController(beta=5.0, target=4.0, horizon=1000)
    for _ in range(400):
        controller.update(1 / controller.beta, 200)
    assert math.isclose(controller.beta, 0.25, rel_tol=1e-6)


# --- what is refused -------------------------------------------------------------------------

TWO = double([0.5, 0.25])
BAD = double([0.5, NAN])


def test_a_bad_tensor_is_named_by_every_elementwise_function():
    eps = {"clip_eps": 0.2}
    calls = [
        (reinforce_loss, ("logps", "advantages"), {}),
        (unclipped_surrogate_loss, ("logps", "old_logps", "advantages"), {}),
        (clipped_surrogate_loss, ("logps", "old_logps", "advantages"), eps),
        (value_loss, ("values", "returns"), {}),
        (clipped_value_loss, ("values", "old_values", "returns"), eps),
        (kl_k1, ("logps", "ref_logps"), {}),
        (kl_k2, ("logps", "ref_logps"), {}),
        (kl_k3, ("logps", "ref_logps"), {}),
    ]
    for function, names, options in calls:
        good = dict.fromkeys(names, TWO)
        for name in names:
            got = refusal(ValueError, function, **{**good, name: BAD}, **options)
            assert got == f"`{name}` must be finite, got nan"
            got = refusal(ValueError, function, **{**good, name: TWO.long()}, **options)
            assert (
                got == f"`{name}` must have a floating dtype (.double() makes one), got torch.int64"
            )
        for name in names[1:]:
            got = refusal(ValueError, function, **{**good, name: double([0.5])}, **options)
            assert got == f"`{name}` must have shape [2] like `{names[0]}`, got [1]"
            got = refusal(TypeError, function, **{**good, name: 1.0}, **options)
            assert got == f"`{name}` must be a floating torch.Tensor [...], got float"
        tokens = dict.fromkeys(names, torch.ones(2, 3))
        assert function(**tokens, **options).shape == (2, 3)


@pytest.mark.parametrize("clip_eps", [0.0, -0.2, NAN, INF])
def test_a_clip_that_is_not_positive_is_refused(clip_eps):
    want = f"`clip_eps` must be a finite number > 0, got {clip_eps}"
    for function in (clipped_surrogate_loss, clipped_value_loss):
        assert refusal(ValueError, function, TWO, TWO, TWO, clip_eps=clip_eps) == want


@pytest.mark.parametrize(
    "function", [mean_advantages, leave_one_out_advantages, group_normalised_advantages]
)
def test_a_bad_group_is_refused(function):
    assert refusal(ValueError, function, BAD[None]) == "`rewards` must be finite, got nan"
    got = refusal(ValueError, function, TWO)
    assert got == "`rewards` must be a non-empty [B, K], got shape [2]"
    got = refusal(ValueError, function, TWO[:, None])
    assert got == "`rewards` must have at least 2 samples per row, got 1"


def test_a_bad_eps_is_refused():
    got = refusal(ValueError, group_normalised_advantages, TWO[None], eps=0.0)
    assert got == "`eps` must be a finite number > 0, got 0.0"


def test_a_bad_table_is_refused_by_the_optimal_baseline():
    logps, one = double([[0.5, 0.5]]).log(), double([[1.0, 1.0]])
    refused = [
        (
            (logps, one, one[0]),
            "`squared_scores` must be [X, Y], one row per prompt, "
            "got shape [2]: for one prompt write squared_scores[None]",
        ),
        (
            (logps, one[0], one),
            "`rewards` must be [X, Y], one row per prompt, "
            "got shape [2]: for one prompt write rewards[None]",
        ),
        (
            (logps[0], one, one),
            "`logps` must be [X, Y], one row per prompt, "
            "got shape [2]: for one prompt write logps[None]",
        ),
        ((BAD[None], one, one), "`logps` must be log-probabilities < inf, got NaN"),
        (
            (one, one, one),
            "`logps` must have rows whose probabilities sum to 1, got a sum of 5.437: "
            "if these are logits, apply log_softmax first",
        ),
        ((logps, BAD[None], one), "`rewards` must be finite, got nan"),
        ((logps, one, BAD[None]), "`squared_scores` must be finite, got nan"),
        ((logps, one, double([[1.0, -0.5]])), "`squared_scores` must be >= 0, got -0.5"),
        (
            (logps, one, 0 * one),
            "`squared_scores` must have at least one value > 0 in each row, got only 0 in row 0",
        ),
    ]
    for arguments, want in refused:
        assert refusal(ValueError, optimal_baseline, *arguments) == want


def test_a_row_without_scores_is_named():
    logps, one = double([[0.5, 0.5], [0.5, 0.5]]).log(), torch.ones(2, 2).double()
    got = refusal(ValueError, optimal_baseline, logps, one, double([[1.0, 0.0], [0.0, 0.0]]))
    want = "`squared_scores` must have at least one value > 0 in each row, got only 0 in row 1"
    assert got == want


@pytest.mark.parametrize("name", ["discount", "lam"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_a_discount_or_lambda_outside_0_to_1_is_refused(name, value):
    options = {"discount": 1.0, "lam": 1.0, name: value}
    got = refusal(ValueError, gae, torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), **options)
    assert got == f"`{name}` must be a number in [0, 1], got {value}"


def test_a_bad_episode_is_refused():
    one = torch.ones(2, 3)
    bad = one.clone()
    bad[1, 0] = INF
    gap = torch.tensor([[1, 1, 1], [1, 0, 1]])
    refused = [
        ((one, one, one[:1]), "`completion_mask` must have shape [2, 3], got [1, 3]"),
        (
            (one, one, gap),
            "`completion_mask` must have padding at the end only, got a token after it in row 1",
        ),
        (
            (one, one, 1 - gap),
            "`completion_mask` must have padding at the end only, got a token after it in row 1",
        ),
        ((one, one, 2 * gap), "`completion_mask` must be 0 or 1, got 2"),
        ((one, one[:1], one), "`values` must have shape [2, 3] like `rewards`, got [1, 3]"),
        ((one[0], one, one), "`rewards` must be a non-empty [B, T], got shape [3]"),
        ((bad, one, one), "`rewards` must be finite, got inf"),
        ((one, bad, one), "`values` must be finite, got inf"),
    ]
    for arguments, want in refused:
        assert refusal(ValueError, gae, *arguments, discount=1.0, lam=0.95) == want


def test_bad_values_to_whiten_are_refused():
    one = torch.ones(1, 3)
    refused = [
        ((one, torch.tensor([[1, 0, 0]])), "`completion_mask` must have at least 2 tokens, got 1"),
        ((one, torch.ones(1, 2)), "`completion_mask` must have shape [1, 3], got [1, 2]"),
        ((one[0], one), "`values` must be a non-empty [B, T], got shape [3]"),
        ((one * NAN, one), "`values` must be finite, got nan"),
    ]
    for arguments, want in refused:
        assert refusal(ValueError, whiten, *arguments) == want
    assert whiten(one, torch.tensor([[1, 1, 0]])).shape == (1, 3)


def test_bad_logits_of_an_entropy_are_refused():
    for bad in (NAN, INF):
        got = refusal(ValueError, entropy, double([0.0, bad]))
        assert got == "`logits` must be < inf, got NaN or +inf"
    got = refusal(ValueError, entropy, double([[0.0, 0.0], [-INF, -INF]]))
    want = "`logits` must have at least one finite logit per position, got a position of -inf only"
    assert got == want
    got = refusal(ValueError, entropy, torch.tensor([1, 2]))
    assert got == "`logits` must have a floating dtype (.double() makes one), got torch.int64"


def test_a_bad_controller_is_refused():
    good = {"beta": 0.1, "target": 6.0, "horizon": 100}
    for name in ("beta", "target"):
        got = refusal(ValueError, AdaptiveKLController, **{**good, name: -1.0})
        assert got == f"`{name}` must be a finite number > 0, got -1.0"
    got = refusal(ValueError, AdaptiveKLController, **{**good, "horizon": 0})
    assert got == "`horizon` must be a whole number >= 1, got 0"
    controller = AdaptiveKLController(**good)
    assert (
        refusal(ValueError, controller.update, NAN, 10) == "`kl` must be a finite number, got nan"
    )
    want = "`n_samples` must be a whole number >= 1, got 0"
    assert refusal(ValueError, controller.update, 1.0, 0) == want
    want = "`n_samples` must be at most `horizon` = 100, got 101"
    assert refusal(ValueError, controller.update, 1.0, 101) == want

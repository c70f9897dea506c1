"""Estimators against the exact gradient of an enumerated bandit, definitions, worked numbers."""

import itertools
import math
from statistics import fmean, pstdev

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.closed_form import expected_reward, kl
from dpo_mini.policy_gradient import (
    AdaptiveKLController,
    cispo_loss,
    cispo_surrogate_loss,
    clipped_surrogate_loss,
    clipped_value_loss,
    dapo_loss,
    dr_grpo_loss,
    entropy,
    gae,
    group_normalised_advantages,
    groups_with_difference,
    grpo_loss,
    gspo_loss,
    kl_k1,
    kl_k2,
    kl_k3,
    leave_one_out_advantages,
    maxrl_advantages,
    maxrl_loss,
    mean_advantages,
    optimal_baseline,
    reinforce_loss,
    rloo_loss,
    sequence_ratio_surrogate_loss,
    truncated_importance_weights,
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


@pytest.mark.parametrize("advantage", CLIPPED)
def test_an_upper_clip_of_its_own(advantage):
    """With 1.05 above and 0.8 below, 1.1 is clipped where the advantage is positive."""
    losses, slopes = ([-0.5, -0.9, -1.0, -1.05, -1.05], [-0.5, -0.9, -1.0, 0.0, 0.0])
    if advantage < 0:
        losses, slopes = CLIPPED[advantage]
    logps = RATIOS.log().requires_grad_()
    advantages = torch.full_like(RATIOS, advantage)
    clips = {"clip_eps": 0.2, "clip_eps_high": 0.05}
    found = clipped_surrogate_loss(logps, torch.zeros_like(RATIOS), advantages, **clips)
    exact(found.detach(), double(losses))
    found.sum().backward()
    exact(logps.grad, double(slopes))


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


def test_one_ratio_per_completion_by_hand():
    """Token ratios 4 and 1, whose geometric mean is 2; a single one of 1/2; 3, 3 and 3."""
    old = double([[-1.0, -2.0, INF], [-3.0, NAN, NAN], [-0.5, -0.5, -0.5]]).requires_grad_()
    logps = double([[math.log(4) - 1, -2.0, NAN], [-3 - math.log(2), INF, 0.0],
                    [math.log(3) - 0.5] * 3]).requires_grad_()  # fmt: skip
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    advantages = double([2.0, -3.0, 5.0]).requires_grad_()

    def loss(**clips):
        return sequence_ratio_surrogate_loss(logps, old, advantages, mask, **clips)

    def slope(found):
        found.sum().backward()
        got, logps.grad = logps.grad, None
        return got

    wide = loss(clip_eps=9.0)
    exact(wide.detach(), double([-4.0, 1.5, -15.0]))
    want = double([[-2.0, -2.0, 0.0], [1.5, 0.0, 0.0], [-5.0, -5.0, -5.0]])  # A s over the length
    exact(slope(wide), want)
    # Clipped to 0.6 below and 2.5 above: the first completion is within, the others are not.
    narrow = loss(clip_eps=0.4, clip_eps_high=1.5)
    exact(narrow.detach(), double([-4.0, 1.8, -12.5]))
    exact(slope(narrow), double([[-2.0, -2.0, 0.0], [0.0] * 3, [0.0] * 3]))
    assert old.grad is None
    assert advantages.grad is None


def test_cispo_caps_a_weight_and_keeps_the_gradient():
    """Ratios 0.5, 0.9, 1, 1.1 and 2, the last capped at 1.3: minus weight, advantage and log pi."""
    old = torch.full_like(RATIOS, -3.0).requires_grad_()
    logps = (RATIOS.log() - 3).requires_grad_()
    weights, advantages = double([0.5, 0.9, 1.0, 1.1, 1.3]), double([2.0, -1.0, 1.0, 0.0, 3.0])
    advantages.requires_grad_()
    found = cispo_surrogate_loss(logps, old, advantages, clip_eps_high=0.3)
    exact(found, -weights * advantages * (RATIOS.log() - 3))
    found.sum().backward()
    exact(logps.grad, (-weights * advantages).detach())
    assert old.grad is None
    assert advantages.grad is None


def test_cispo_far_from_its_cap_has_the_gradient_of_the_unclipped_surrogate(generator):
    logps, old, advantages = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    slopes = [
        gradient(
            lambda at: cispo_surrogate_loss(at, old, advantages, clip_eps_high=1e6).sum(), logps
        ),
        gradient(lambda at: unclipped_surrogate_loss(at, old, advantages).sum(), logps),
    ]
    exact(*slopes)


def test_importance_weights_by_hand():
    logps, sampler = double([1.0, 4.0, 3.0]).log(), double([2.0, 2.0, 1.0]).log()
    logps.requires_grad_()
    sampler.requires_grad_()
    weights = truncated_importance_weights(logps, sampler, cap=2.5)
    exact(weights, double([0.5, 2.0, 2.5]))
    assert not weights.requires_grad


@pytest.mark.parametrize("cap", [0.5, 1.0, 1.4, 9.0])
def test_a_cap_costs_the_probability_that_the_sampler_lacks(cap):
    """The weights of a sampler mu have the mean sum of min(pi, C mu): 1 only if nothing is cut."""
    logps, sampler = LOGITS.log_softmax(-1), OLD_LOGITS.log_softmax(-1)
    weights = truncated_importance_weights(logps, sampler, cap=cap)
    pairs = zip(logps.exp().tolist(), sampler.exp().tolist(), strict=True)
    kept = [min(p, cap * q) for p, q in pairs]
    exact(sampler.exp() * weights, double(kept))
    assert math.isclose(sum(kept), 1.0) == (cap == 9.0)


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


def test_maxrl_advantages_by_hand():
    rewards = double([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0], [0.0] * 4, [2.0, 1.0, 6.0, 3.0]])
    want = [[3.0, -1.0, -1.0, -1.0], [1 / 3, 1 / 3, -1.0, 1 / 3], [0.0] * 4]
    want.append([-1 / 3, -2 / 3, 1.0, 0.0])
    found = maxrl_advantages(rewards.requires_grad_())
    exact(found, double(want))
    assert not found.requires_grad


def test_groups_with_a_difference():
    rewards = double([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.1, 0.1, 0.1], [1.0, 0.0, 0.0]])
    want = torch.tensor([False, True, False, True])
    assert torch.equal(groups_with_difference(rewards), want)
    assert torch.equal(groups_with_difference(1e-170 * rewards), want)
    assert torch.equal(groups_with_difference(rewards.half()), want)


def weight(advantages_of, p, size, kept=None):
    """What multiplies grad p in the mean update of a reward of 0 or 1, exactly.

    A group is its number of successes n; the score of a success is grad p / p, that of a failure
    -grad p / (1 - p). `kept` says which groups count; the others are drawn again.
    """
    rewards = (torch.arange(size)[None] < torch.arange(size + 1)[:, None]).double()  # [n, k]
    probs = double([math.comb(size, n) * p**n * (1 - p) ** (size - n) for n in range(size + 1)])
    scores = rewards / p - (1 - rewards) / (1 - p)
    updates = (advantages_of(rewards) * scores).mean(-1)
    counted = torch.ones(size + 1, dtype=torch.bool) if kept is None else kept(rewards)
    return ((probs * updates)[counted].sum() / probs[counted].sum()).item()


def normalised(rewards):
    return group_normalised_advantages(rewards, eps=1e-14)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_the_weight_that_each_advantage_gives_to_the_success_probability(size, p):
    close = {"rel_tol": 1e-12}
    assert math.isclose(weight(leave_one_out_advantages, p, size), 1.0, **close)
    assert math.isclose(weight(mean_advantages, p, size), (size - 1) / size, **close)
    found = weight(maxrl_advantages, p, size)
    assert math.isclose(found, (1 - (1 - p) ** (size - 1)) / p, **close)
    assert math.isclose(weight(normalised, p, size), grpo_ratio(p, size), **close)


def test_known_weights():
    assert round(weight(maxrl_advantages, 0.01, 64), 2) == 46.91
    assert round(weight(normalised, 0.01, 64), 4) == 6.7362
    assert round(weight(lambda r: math.sqrt(63 / 64) * normalised(r), 0.01, 64), 4) == 6.6834
    assert [round(weight(normalised, p, 8), 2) for p in (0.5, 0.01)] == [1.86, 2.61]
    for size in (2, 8, 64):  # one success at most: its advantage is the root of size - 1
        assert math.isclose(weight(normalised, 1e-9, size), math.sqrt(size - 1), rel_tol=1e-6)
    # The eps of 1e-4 that keeps a group of equal rewards at 0 takes less than a thousandth.
    assert 6.7295 < weight(group_normalised_advantages, 0.01, 64) < 6.7362


@pytest.mark.parametrize("p", [0.01, 0.5])
def test_groups_drawn_again_until_there_is_a_difference_weigh_more(p):
    """A group without a difference adds nothing: to drop it changes no sum over prompts."""
    plain = weight(normalised, p, 8)
    again = weight(normalised, p, 8, groups_with_difference)
    assert math.isclose(again, plain / (1 - p**8 - (1 - p) ** 8), rel_tol=1e-12)
    if p == 0.01:
        assert (round(plain, 2), round(again, 1)) == (2.61, 33.8)


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


# --- whole methods ---------------------------------------------------------------------------

CLIPPING = [grpo_loss, dr_grpo_loss, dapo_loss, rloo_loss, maxrl_loss, gspo_loss]
METHODS = [*CLIPPING, cispo_loss]


def clips_of(method, low=0.2, high=0.4):
    if method is cispo_loss:
        return {"clip_eps_high": high}
    return {"clip_eps": low, "clip_eps_high": high}


def two_prompts():
    """Token ratios 2 and 0.75 of a success, 1.1 of a failure; then a group of equal rewards."""
    logps = double([[[-1.0, -2.0], [-3.0, NAN]], [[-1.0, INF], [-2.0, -1.0]]])
    ratios = double([[[2.0, 0.75], [1.1, 1.0]], [[1.0, 1.0], [1.0, 3.0]]])
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 1]]])
    old = logps - ratios.log()
    return logps, old, double([[1.0, 0.0], [0.3, 0.3]]), mask


ADVANTAGE = 0.5 / (0.5 + 1e-4)  # of a success, its standard deviation being 0.5
# Clipped, the success has 1.4 + 0.75 = 2.15; its ratio is 1.5 as a whole, clipped to 1.4, and
# the root of 1.5 is 1.22. The mean length is 6 / 4.
BY_HAND = {
    grpo_loss: (-2.15 * ADVANTAGE / 2, 1.1 * ADVANTAGE),
    dr_grpo_loss: (-2.15 * 0.5 / 2, 1.1 * 0.5 / 2),
    dapo_loss: (-2.15 * ADVANTAGE / 1.5, 1.1 * ADVANTAGE / 1.5),
    rloo_loss: (-1.4, 1.1),
    maxrl_loss: (-2.15, 1.1),
    gspo_loss: (-math.sqrt(1.5) * ADVANTAGE, 1.1 * ADVANTAGE),
    cispo_loss: ((1.4 * 1 + 0.75 * 2) * ADVANTAGE / 1.5, -1.1 * 3 * ADVANTAGE / 1.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_whole_methods_by_hand(method):
    found = method(*two_prompts(), **clips_of(method))
    exact(found, double([BY_HAND[method], (0.0, 0.0)]))


@pytest.mark.parametrize("method", CLIPPING)
def test_without_an_upper_clip_the_lower_one_counts_above_too(method):
    given = two_prompts()
    alone = method(*given, clip_eps=0.2)
    exact(alone, method(*given, **clips_of(method, high=0.2)))
    assert alone[0, 0] > method(*given, **clips_of(method, high=0.21))[0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_only_the_policys_tokens_have_a_gradient(method):
    logps, old, rewards, mask = two_prompts()
    for tensor in (logps, old, rewards):
        tensor.requires_grad_()
    method(logps, old, rewards, mask.bool(), **clips_of(method, 9.0, 9.0)).sum().backward()
    assert ((logps.grad != 0) == (mask.bool() & (torch.arange(2) == 0)[:, None, None])).all()
    assert old.grad is None
    assert rewards.grad is None


class Chain:
    """A policy that stops or goes on, with other chances after each token: s, gs, ggs and ggg."""

    rewards = double([0.3, 1.0, -0.5, 0.7])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    tokens = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    logits = double([[0.4, -0.3], [0.1, 0.8], [-0.6, 0.2]])
    old_logits = double([[0.0, 0.3], [0.5, 0.4], [-0.1, -0.2]])

    def logps(self, logits):
        """Of the tokens of the four completions, `[4, 3]`, 0 after the end."""
        steps = logits.log_softmax(-1).expand(4, 3, 2)
        return steps.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1).masked_fill(~self.mask, 0.0)

    def exact_gradient(self, rewards=None):
        rewards = self.rewards if rewards is None else rewards
        return gradient(lambda at: (self.logps(at).sum(-1).exp() * rewards).sum(), self.logits)

    def mean_gradient(self, method, size, *, rewards=None, drawn_by=None, **clips):
        """Of the loss, over all groups by their probability, each group a batch of its own."""
        rewards = self.rewards if rewards is None else rewards
        old = self.logps(self.logits if drawn_by is None else drawn_by)
        slopes = []
        for group in groups(4, size):
            chance = old.sum(-1).exp()[group].prod()

            def loss(at, group=group):
                tensors = (self.logps(at)[group], old[group], rewards[group], self.mask[group])
                return method(*(tensor.unsqueeze(0) for tensor in tensors), **clips).mean()

            slopes.append(chance * gradient(loss, self.logits))
        return sum(slopes)


CHAIN = Chain()
SUCCESS = double([0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_unbiased_over_every_group(size):
    exact(CHAIN.mean_gradient(rloo_loss, size, clip_eps=0.2), -CHAIN.exact_gradient())


def test_rloo_is_unbiased_where_another_policy_drew_and_nothing_is_clipped():
    found = CHAIN.mean_gradient(rloo_loss, 3, drawn_by=CHAIN.old_logits, clip_eps=1e6)
    exact(found, -CHAIN.exact_gradient())


@pytest.mark.parametrize("size", [2, 3])
def test_dr_grpo_is_short_by_a_constant(size):
    found = CHAIN.mean_gradient(dr_grpo_loss, size, clip_eps=0.2)
    exact(found, -(size - 1) / size / 3 * CHAIN.exact_gradient())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_maxrl_climbs_towards_the_log_of_the_success_probability(size):
    p = (CHAIN.logps(CHAIN.logits).sum(-1).exp() * SUCCESS).sum()
    found = CHAIN.mean_gradient(maxrl_loss, size, rewards=SUCCESS, clip_eps=0.2)
    exact(found, -(1 - (1 - p) ** (size - 1)) / p * CHAIN.exact_gradient(SUCCESS))


def per_completion(share):
    """The gradient of one group on policy from its completions' scores, each times A / share."""
    scores = [gradient(lambda at, y=y: CHAIN.logps(at)[y].sum(), CHAIN.logits) for y in range(4)]

    def update(group):
        rewards = CHAIN.rewards[group].tolist()
        advantages = [(r - fmean(rewards)) / (pstdev(rewards) + 1e-4) for r in rewards]
        lengths = CHAIN.mask[group].sum(-1).tolist()
        terms = zip(advantages, lengths, group.tolist(), strict=True)
        return -sum(a / share(n, lengths) * scores[y] for a, n, y in terms) / len(group)

    return update


def on_policy(method, group, **clips):
    tensors = (CHAIN.logps(CHAIN.logits)[group], CHAIN.rewards[group], CHAIN.mask[group])
    old, rewards, mask = (tensor.unsqueeze(0) for tensor in tensors)
    return gradient(
        lambda at: method(CHAIN.logps(at)[group][None], old, rewards, mask, **clips).mean(),
        CHAIN.logits,
    )


@pytest.mark.parametrize(
    ("method", "share"),
    [
        (grpo_loss, lambda length, lengths: length),
        (gspo_loss, lambda length, lengths: length),
        (dapo_loss, lambda length, lengths: fmean(lengths)),
        (cispo_loss, lambda length, lengths: fmean(lengths)),
    ],
)
def test_on_policy_each_is_reinforce_but_for_its_division_by_lengths(method, share):
    update = per_completion(share)
    for group in [*groups(4, 2), *groups(4, 3)]:
        exact(on_policy(method, group, **clips_of(method)), update(group))


def test_the_length_of_a_group_is_felt_by_grpo_and_not_by_rloo():
    """Where all are one length, GRPO's update of a group points where RLOO's points."""
    same, other = torch.tensor([2, 3, 2]), torch.tensor([0, 3, 2])

    def cosine(group):
        both = [on_policy(method, group, clip_eps=0.2) for method in (grpo_loss, rloo_loss)]
        return torch.cosine_similarity(*(slope.flatten() for slope in both), dim=0).item()

    assert math.isclose(cosine(same), 1.0, rel_tol=1e-12)
    assert cosine(other) < 0.995


def test_dapo_and_cispo_count_the_tokens_of_the_whole_batch():
    """Their mean is one sum over the tokens of both prompts, by how many they are."""
    batch = torch.tensor([[0, 1, 1], [3, 2, 3]])
    old, rewards, mask = (
        CHAIN.logps(CHAIN.old_logits)[batch],
        CHAIN.rewards[batch],
        CHAIN.mask[batch],
    )
    for method in (dapo_loss, cispo_loss):
        clips = clips_of(method)
        both = method(CHAIN.logps(CHAIN.logits)[batch], old, rewards, mask, **clips).mean()
        parts = [
            method(CHAIN.logps(CHAIN.logits)[batch][i : i + 1], old[i : i + 1],
                   rewards[i : i + 1], mask[i : i + 1], **clips).mean()
            for i in range(2)
        ]  # fmt: skip
        exact(both, (5 * parts[0] + 9 * parts[1]) / 14)


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
        (cispo_surrogate_loss, ("logps", "old_logps", "advantages"), {"clip_eps_high": 0.2}),
        (truncated_importance_weights, ("logps", "sampler_logps"), {"cap": 2.0}),
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
    for method in CLIPPING:
        assert refusal(ValueError, method, *two_prompts(), clip_eps=clip_eps) == want
    rows = (TWO[None], TWO[None], TWO[:1], torch.ones(1, 2))
    got = refusal(ValueError, sequence_ratio_surrogate_loss, *rows, clip_eps=clip_eps)
    assert got == want
    want = want.replace("clip_eps", "clip_eps_high")
    both = {"clip_eps": 0.2, "clip_eps_high": clip_eps}
    assert refusal(ValueError, clipped_surrogate_loss, TWO, TWO, TWO, **both) == want
    assert refusal(ValueError, sequence_ratio_surrogate_loss, *rows, **both) == want
    alone = {"clip_eps_high": clip_eps}
    assert refusal(ValueError, cispo_surrogate_loss, TWO, TWO, TWO, **alone) == want
    assert refusal(ValueError, cispo_loss, *two_prompts(), **alone) == want
    for method in CLIPPING:
        assert refusal(ValueError, method, *two_prompts(), **both) == want
    want = want.replace("clip_eps_high", "cap")
    assert refusal(ValueError, truncated_importance_weights, TWO, TWO, cap=clip_eps) == want


@pytest.mark.parametrize("method", METHODS)
def test_bad_groups_of_completions_are_refused(method):
    logps, old, rewards, mask = two_prompts()
    nowhere = mask.clone()
    nowhere[1, 0, 0] = 0
    spoilt, scored = logps.clone(), rewards.clone()
    spoilt[1, 1, 1], scored[0, 1] = NAN, INF
    refused = [
        ((spoilt, old, rewards, mask), "`logps` must be finite, got nan"),
        ((logps, spoilt, rewards, mask), "`old_logps` must be finite, got nan"),
        ((logps, old, scored, mask), "`rewards` must be finite, got inf"),
        ((logps[0], old, rewards, mask), "`logps` must be a non-empty [B, K, T], got shape [2, 2]"),
        (
            (logps, old[:1], rewards, mask),
            "`old_logps` must have shape [2, 2, 2] like `logps`, got [1, 2, 2]",
        ),
        ((logps, old, rewards[0], mask), "`rewards` must be a non-empty [B, K], got shape [2]"),
        (
            (logps, old, rewards[:, :1], mask),
            "`rewards` must have shape [2, 2], one per completion, got [2, 1]",
        ),
        (
            (logps, old, rewards.float(), mask),
            "`rewards` must have dtype torch.float64 like `logps`, got torch.float32: write "
            "rewards.to(torch.float64)",
        ),
        (
            (logps, old, rewards, mask[:, :, :1]),
            "`completion_mask` must have shape [2, 2, 2], got [2, 2, 1]",
        ),
        ((logps, old, rewards, 2 * mask), "`completion_mask` must be 0 or 1, got 2"),
        (
            (logps, old, rewards, nowhere),
            "`completion_mask` must have at least one token in each completion, got none at [1, 0]",
        ),
        (
            (logps[:, :1], old[:, :1], rewards[:, :1], mask[:, :1]),
            "`rewards` must have at least 2 samples per row, got 1",
        ),
    ]
    for arguments, want in refused:
        assert refusal(ValueError, method, *arguments, **clips_of(method)) == want


def test_bad_completions_are_refused_by_the_sequence_ratio():
    logps, old, _, mask = (tensor[0] for tensor in two_prompts())
    spoilt, twice = logps.clone(), logps.clone()
    spoilt[0, 1] = -INF
    twice[0] = double([INF, -INF])
    half = (part.nan_to_num().half() for part in (logps, old))
    refused = [
        ((spoilt, old, TWO, mask), "`logps` must be finite, got -inf"),
        ((twice, old, TWO, mask), "`logps` must be finite, got inf"),
        (
            (*half, TWO.float(), mask),
            "`advantages` must have dtype torch.float16 like `logps`, got torch.float32: write "
            "advantages.to(torch.float16)",
        ),
        ((logps, spoilt, TWO, mask), "`old_logps` must be finite, got -inf"),
        ((logps, old, BAD, mask), "`advantages` must be finite, got nan"),
        ((logps[0], old, TWO, mask), "`logps` must be a non-empty [B, T], got shape [2]"),
        (
            (logps, old[:1], TWO, mask),
            "`old_logps` must have shape [2, 2] like `logps`, got [1, 2]",
        ),
        (
            (logps, old, TWO[:, None], mask),
            "`advantages` must be a non-empty [B], got shape [2, 1]",
        ),
        ((logps, old, TWO[:1], mask), "`advantages` must have 2 rows like `logps`, got 1"),
        (
            (logps, old, TWO.float(), mask),
            "`advantages` must have dtype torch.float64 like `logps`, got torch.float32: write "
            "advantages.to(torch.float64)",
        ),
        (
            (logps, old, TWO, 0 * mask),
            "`completion_mask` must have at least one token in each completion, got none at [0]",
        ),
    ]
    for arguments, want in refused:
        got = refusal(ValueError, sequence_ratio_surrogate_loss, *arguments, clip_eps=0.2)
        assert got == want


def test_a_reward_below_0_is_refused_by_maxrl():
    logps, old, rewards, mask = two_prompts()
    rewards[1, 0] = -0.25
    want = "`rewards` must be >= 0, got -0.25"
    assert refusal(ValueError, maxrl_advantages, rewards) == want
    assert refusal(ValueError, maxrl_loss, logps, old, rewards, mask, clip_eps=0.2) == want


@pytest.mark.parametrize(
    "function",
    [
        mean_advantages,
        leave_one_out_advantages,
        group_normalised_advantages,
        maxrl_advantages,
        groups_with_difference,
    ],
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

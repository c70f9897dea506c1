"""Chapter 07: estimate a gradient that cannot be backpropagated."""

import math

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree
from dpo_mini.checks.theorems import every_draw


def judge_leave_one_out(leave_one_out):
    """7.1: what one reward does to each advantage, and the mean of the estimate over all draws."""
    for rewards in (*REWARDS, torch.tensor([0.3, -2.0, 0.7, 0.7, 1.5], dtype=torch.float64)):
        n_rewards = len(rewards)
        agree(leave_one_out(0 * rewards + 1.7), 0.0, "equal rewards leave an advantage over")
        before = leave_one_out(rewards)
        for k in range(n_rewards):
            raised = rewards.clone()
            raised[k] += 0.6
            gain = leave_one_out(raised) - before
            agree(gain[k], 0.6, "the baseline of a sample moves with the sample's own reward")
            others = torch.cat([gain[:k], gain[k + 1 :]])
            agree(others, -0.6 / (n_rewards - 1), "the baseline of a sample is no mean of the rest")
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    scores, estimate = torch.eye(3, dtype=torch.float64) - probs, 0.0  # of a softmax's logits
    for drawn, chance in zip(*every_draw(probs, 3), strict=True):
        advantages = leave_one_out(REWARDS[1][drawn])
        estimate = estimate + chance * (advantages @ scores[drawn]) / 3
    truth = probs * (REWARDS[1] - probs @ REWARDS[1])
    agree(estimate, truth, "over all draws of three samples the estimate is biased")


def _itself_included(rewards):
    """The baseline holds the sample's own reward: the estimate is short by one part in K."""
    return rewards - rewards.sum() / len(rewards)


def _divided_by_all(rewards):
    """The sum of the others is divided by K, and there are K - 1 of them."""
    return rewards - (rewards.sum() - rewards) / len(rewards)


def _reward_forgotten(rewards):
    """This is the baseline itself: an advantage is the reward minus its baseline."""
    return (rewards.sum() - rewards) / (len(rewards) - 1)


def _advantage_turned_round(rewards):
    """The sign is reversed: a reward above the others' mean has a positive advantage."""
    return (rewards.sum() - rewards) / (len(rewards) - 1) - rewards


def _normalised(rewards):
    """This divides by the standard deviation, which is GRPO: leave-one-out keeps reward units."""
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def _normalised_by_k_minus_1(rewards):
    """This is GRPO with the deviation of a sample: leave-one-out keeps reward units."""
    return (rewards - rewards.mean()) / rewards.std()


def _sum_of_others(rewards):
    """The baseline is the sum of the others' rewards: it is their mean."""
    return rewards - (rewards.sum() - rewards)


def _all_over_k_minus_1(rewards):
    """The baseline divides the sum of all K rewards by K - 1: its own reward is not taken off."""
    return rewards - rewards.sum() / (len(rewards) - 1)


def _no_baseline(rewards):
    """These are the rewards: the baseline is missing."""
    return rewards


def judge_straight_through_slope(straight_through_slope):
    """7.2: both outcomes, each with the gradient that autograd takes through b + p - p."""
    for theta, c in ((0.4, 0.45), (-1.2, 0.1), (2.0, 0.8), (0.0, 1.5), (-0.3, -0.7)):
        mean_slope = 0.0
        for b in (0.0, 1.0):
            logit = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
            p = logit.sigmoid()
            (slope,) = torch.autograd.grad((b + p - p.detach() - c) ** 2, logit)
            mean_slope = mean_slope + (p if b else 1 - p).detach() * slope
        agree(
            straight_through_slope(theta, c),
            mean_slope,
            "autograd through both outcomes, each by its probability, finds another mean slope",
        )


def _true_slope(theta, c):
    """This is the true gradient: straight-through uses the derivative of the cost at the sample,
    not the difference between its two values.
    """
    p = 1 / (1 + math.exp(-theta))
    return p * (1 - p) * ((1 - c) ** 2 - c**2)


def _slope_in_p(theta, c):
    """This is the slope in p: the chain rule to theta is missing."""
    p = 1 / (1 + math.exp(-theta))
    return 2 * (p - c)


def _one_outcome(theta, c):
    """Only heads is counted: tails has a derivative too, and its own probability."""
    p = 1 / (1 + math.exp(-theta))
    return p * 2 * (1 - c) * p * (1 - p)


def _descent(theta, c):
    """The sign is reversed: the slope of the cost is wanted, not the step down."""
    p = 1 / (1 + math.exp(-theta))
    return 2 * (c - p) * p * (1 - p)


def _outcomes_not_weighted(theta, c):
    """The two outcomes are added up: weigh each by its probability."""
    p = 1 / (1 + math.exp(-theta))
    return (2 * (1 - c) + 2 * (0 - c)) * p * (1 - p)


def _theta_as_probability(theta, c):
    """Theta is used as the probability: p is its sigmoid."""
    return 2 * (theta - c) * theta * (1 - theta)


def _expected_cost(theta, c):
    """This is the expected cost: its slope is asked for."""
    p = 1 / (1 + math.exp(-theta))
    return p * (1 - c) ** 2 + (1 - p) * c**2


def judge_stretch(stretch):
    """7.3: every table of rewards that a group can draw, with GRPO's gradient of each."""
    for p, size in ((0.3, 5), (0.6, 2), (0.85, 3), (0.05, 7)):
        mean_gradient = 0.0
        outcomes, chances = every_draw(torch.tensor([1 - p, p], dtype=torch.float64), size)
        for rewards, chance in zip(outcomes.double(), chances, strict=True):
            deviation = rewards.std(correction=0)
            if deviation > 0:
                advantages = (rewards - rewards.mean()) / deviation
                # A success is the action of probability p: its score by the logit is 1 - p.
                mean_gradient += chance * (advantages * (rewards - p)).mean()
        agree(
            stretch(p, size),
            mean_gradient / (p * (1 - p)),
            "the mean over every group of this size, by enumeration, is another",
        )


def _mean_deviation(p, size):
    return _expected(lambda m: math.sqrt(m * (1 - m)), p, size)


def _expected(function, p, size):
    return sum(
        math.comb(size, n) * p**n * (1 - p) ** (size - n) * function(n / size)
        for n in range(size + 1)
    )


def _sample_deviation(p, size):
    """The deviation divides by K - 1: the population's is asked for, which divides by K."""
    return _mean_deviation(p, size) * math.sqrt((size - 1) / size) / (p * (1 - p))


def _endless_group(p, size):
    """This is the limit of endless groups: in a finite one the deviation is random, and its mean is
    smaller.
    """
    return 1 / math.sqrt(p * (1 - p))


def _not_divided(p, size):
    """This is the mean deviation: the true gradient is p (1 - p) times the difference of the two
    scores, and its length is still to be divided out.
    """
    return _mean_deviation(p, size)


def _mean_variance(p, size):
    """The square root is missing: GRPO divides by the deviation, not by the variance."""
    return _expected(lambda m: m * (1 - m), p, size) / (p * (1 - p))


def _inverse_deviation(p, size):
    """A mean of 1/std was taken: rewards and deviation of one group go together, and the deviation
    ends up in the numerator.
    """
    return _expected(lambda m: 1 / math.sqrt(m * (1 - m)) if 0 < m < 1 else 0.0, p, size)


def _without_silent_groups(p, size):
    """Groups that all succeed or all fail are left out: their gradient is 0, but they are drawn."""
    silent = p**size + (1 - p) ** size
    return _mean_deviation(p, size) / (p * (1 - p)) / (1 - silent)


def _over_the_deviation(p, size):
    """This divides by the deviation of a reward: the true gradient has its square, p (1 - p)."""
    return _mean_deviation(p, size) / math.sqrt(p * (1 - p))


REWARDS = [
    torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64),
    torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64),
    torch.tensor([2.0, 5.0], dtype=torch.float64),
]

EXERCISES = [
    Exercise(
        "7.1",
        [(rewards,) for rewards in REWARDS],
        judge_leave_one_out,
        [
            _itself_included,
            _divided_by_all,
            _reward_forgotten,
            _advantage_turned_round,
            _normalised,
            _normalised_by_k_minus_1,
            _sum_of_others,
            _all_over_k_minus_1,
            _no_baseline,
        ],
        shape=lambda rewards: rewards.shape,
    ),
    Exercise(
        "7.2",
        [(0.4, 0.45), (-1.2, 0.1), (2.0, 0.8)],
        judge_straight_through_slope,
        [
            _true_slope,
            _slope_in_p,
            _one_outcome,
            _descent,
            _outcomes_not_weighted,
            _theta_as_probability,
            _expected_cost,
        ],
    ),
    Exercise(
        "7.3",
        [(0.3, 5), (0.01, 64), (0.6, 2)],
        judge_stretch,
        [
            _sample_deviation,
            _endless_group,
            _not_divided,
            _mean_variance,
            _inverse_deviation,
            _without_silent_groups,
            _over_the_deviation,
        ],
    ),
]

"""Chapter 07: estimate a gradient that cannot be backpropagated."""

import math

import torch

from dpo_mini.checks import Exercise


def leave_one_out(rewards):
    """7.1: each reward less the mean of the other K - 1."""
    n_rewards = len(rewards)
    others = [torch.cat([rewards[:k], rewards[k + 1 :]]).mean() for k in range(n_rewards)]
    return rewards - torch.stack(others)


def _itself_included(rewards):
    """The baseline holds the sample's own reward: the estimate is short by one part in K."""
    return rewards - rewards.sum() / len(rewards)


def _divided_by_all(rewards):
    """The sum of the others is divided by K, and there are K - 1 of them."""
    return rewards - (rewards.sum() - rewards) / len(rewards)


def _reward_forgotten(rewards):
    """This is the baseline itself: an advantage is the reward less its baseline."""
    return (rewards.sum() - rewards) / (len(rewards) - 1)


def _advantage_turned_round(rewards):
    """The sign is turned round: a reward above the others' mean has a positive advantage."""
    return -leave_one_out(rewards)


def _normalised(rewards):
    """This divides by the standard deviation, which is GRPO: leave-one-out keeps reward units."""
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def straight_through_slope(theta, c):
    """7.2: E[f'(b)] dp/dtheta, summed over tails and heads."""
    p = 1 / (1 + math.exp(-theta))
    tails, heads = 2 * (0 - c), 2 * (1 - c)
    return ((1 - p) * tails + p * heads) * p * (1 - p)


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
    """The sign is turned round: the slope of the cost is wanted, not the step down."""
    return -straight_through_slope(theta, c)


def stretch(p, size):
    """7.3: E[population standard deviation] / (p (1 - p))."""
    return _expected(lambda m: math.sqrt(m * (1 - m)), p, size) / (p * (1 - p))


def _expected(function, p, size):
    return sum(
        math.comb(size, n) * p**n * (1 - p) ** (size - n) * function(n / size)
        for n in range(size + 1)
    )


def _sample_deviation(p, size):
    """The deviation divides by K - 1: the population's is asked for, which divides by K."""
    return stretch(p, size) * math.sqrt((size - 1) / size)


def _endless_group(p, size):
    """This is the limit of endless groups: in a finite one the deviation is random, and its mean is
    smaller.
    """
    return 1 / math.sqrt(p * (1 - p))


def _not_divided(p, size):
    """This is the mean deviation: the true gradient is p (1 - p) times the difference of the two
    scores, and its length is still to be divided out.
    """
    return stretch(p, size) * p * (1 - p)


def _mean_variance(p, size):
    """The square root is missing: GRPO divides by the deviation, not by the variance."""
    return _expected(lambda m: m * (1 - m), p, size) / (p * (1 - p))


def _inverse_deviation(p, size):
    """A mean of 1/std was taken: rewards and deviation of one group go together, and the deviation
    ends up in the numerator.
    """
    return _expected(lambda m: 1 / math.sqrt(m * (1 - m)) if 0 < m < 1 else 0.0, p, size)


REWARDS = [
    torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64),
    torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64),
    torch.tensor([2.0, 5.0], dtype=torch.float64),
]

EXERCISES = [
    Exercise(
        "7.1",
        [(rewards,) for rewards in REWARDS],
        leave_one_out,
        [
            _itself_included,
            _divided_by_all,
            _reward_forgotten,
            _advantage_turned_round,
            _normalised,
        ],
    ),
    Exercise(
        "7.2",
        [(0.4, 0.45), (-1.2, 0.1), (2.0, 0.8)],
        straight_through_slope,
        [_true_slope, _slope_in_p, _one_outcome, _descent],
    ),
    Exercise(
        "7.3",
        [(0.3, 5), (0.01, 64), (0.6, 2)],
        stretch,
        [_sample_deviation, _endless_group, _not_divided, _mean_variance, _inverse_deviation],
    ),
]

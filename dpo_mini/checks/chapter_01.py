"""Chapter 01: the objective."""

import math

import torch

from dpo_mini.checks import Exercise

POLICY = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
POINTS = torch.linspace(-6.0, 10.0, 81, dtype=torch.float64)
# Two humps of unequal weight and width: mean, median, modes and midpoint all differ.
HUMPS = 0.3 * torch.exp(-0.5 * (POINTS + 2) ** 2) + 0.1 * torch.exp(-0.125 * (POINTS - 4) ** 2)
TARGET = HUMPS / HUMPS.sum()


def _nats(probs, other_probs):
    return torch.xlogy(probs, probs / other_probs).sum()


def objective(probs, ref_probs, rewards, beta):
    """1.1: J of a policy `[Y]`."""
    return (probs * rewards).sum() - beta * _nats(probs, ref_probs)


def _kl_turned_round(probs, ref_probs, rewards, beta):
    """The KL is turned round: it must average over what the policy says, not the reference."""
    return (probs * rewards).sum() - beta * _nats(ref_probs, probs)


def _penalty_added(probs, ref_probs, rewards, beta):
    """The penalty has the wrong sign: leaving the reference must cost."""
    return (probs * rewards).sum() + beta * _nats(probs, ref_probs)


def _zero_times_infinity(probs, ref_probs, rewards, beta):
    """Your number is not one where an answer has probability 0: 0 log 0 counts as 0."""
    return (probs * rewards).sum() - beta * (probs * (probs / ref_probs).log()).sum()


def _beta_on_the_reward(probs, ref_probs, rewards, beta):
    """Beta multiplies the reward: it is the price of a nat and belongs to the KL."""
    return beta * (probs * rewards).sum() - _nats(probs, ref_probs)


def _entropy_only(probs, ref_probs, rewards, beta):
    """The reference is missing: this charges for low entropy, wherever the policy is."""
    return (probs * rewards).sum() - beta * torch.xlogy(probs, probs).sum()


def safe_beta(rewards, floor):
    """1.2: the least beta with pi*/pi_ref >= floor guaranteed."""
    return (rewards.max() - rewards.min()) / -math.log(floor)


def _largest_reward(rewards, floor):
    """You took the largest reward where the range is needed: adding 10 to every reward must not
    change the answer.
    """
    return rewards.max() / -math.log(floor)


def _logarithm_missing(rewards, floor):
    """The logarithm is missing: the bound is exponential in range / beta."""
    return (rewards.max() - rewards.min()) / (1 / floor)


def _upside_down(rewards, floor):
    """Your beta is upside down: a lower floor is easier to keep and allows a smaller beta."""
    return (rewards.max() - rewards.min()) * -math.log(floor)


def _decimal_logarithm(rewards, floor):
    """The logarithm has base 10: nats take the natural one."""
    return (rewards.max() - rewards.min()) / -math.log10(floor)


def _negative_beta(rewards, floor):
    """Your beta is negative: mind the sign of the logarithm of a number below 1."""
    return (rewards.max() - rewards.min()) / math.log(floor)


def forward_gaussian(points, probs):
    """1.3: mean and standard deviation of the target."""
    mean = (probs * points).sum()
    return torch.stack([mean, (probs * (points - mean) ** 2).sum().sqrt()])


def _variance(points, probs):
    """The second number is a variance: take its square root."""
    mean, std = forward_gaussian(points, probs)
    return torch.stack([mean, std**2])


def _at_the_mode(points, probs):
    """The mean sits on the highest point: that is what reverse KL would do."""
    mode = points[probs.argmax()]
    return torch.stack([mode, (probs * (points - mode) ** 2).sum().sqrt()])


def _without_weights(points, probs):
    """The points are not weighted by the target's probabilities."""
    return torch.stack([points.mean(), points.std(correction=0)])


def _second_moment(points, probs):
    """The spread is measured from 0: measure it from the mean."""
    mean = (probs * points).sum()
    return torch.stack([mean, (probs * points**2).sum().sqrt()])


EXERCISES = (
    Exercise(
        "1.1",
        cases=((POLICY, REF, REWARDS, 0.5), (REF.flip(0), REF, REWARDS, 2.0)),
        answer=objective,
        mistakes=(
            _kl_turned_round,
            _penalty_added,
            _zero_times_infinity,
            _beta_on_the_reward,
            _entropy_only,
        ),
    ),
    Exercise(
        "1.2",
        cases=((REWARDS, 0.1), (REWARDS + 10.0, 0.5)),
        answer=safe_beta,
        mistakes=(
            _largest_reward,
            _logarithm_missing,
            _upside_down,
            _decimal_logarithm,
            _negative_beta,
        ),
    ),
    Exercise(
        "1.3",
        cases=((POINTS, TARGET), (POINTS + 1.0, TARGET.flip(0))),
        answer=forward_gaussian,
        mistakes=(_variance, _at_the_mode, _without_weights, _second_moment),
    ),
)

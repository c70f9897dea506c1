"""Chapter 02: the optimal policy."""

import torch

from dpo_mini.checks import Exercise

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
POLICY = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
REF_4 = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS_4 = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)


def _tilt(ref_probs, rewards, beta):
    weights = ref_probs * torch.exp(rewards / beta)
    return weights / weights.sum()


def _nats(probs, other_probs):
    return torch.xlogy(probs, probs / other_probs).sum()


def shortfall(probs, ref_probs, rewards, beta):
    """2.1: J* - J(pi)."""
    return beta * _nats(probs, _tilt(ref_probs, rewards, beta))


def _shortfall_turned_round(probs, ref_probs, rewards, beta):
    """The KL is turned round: here it averages over the optimum and not over the policy."""
    return beta * _nats(_tilt(ref_probs, rewards, beta), probs)


def _shortfall_in_nats(probs, ref_probs, rewards, beta):
    """Beta is missing: a shortfall of J is in units of reward, this is in nats."""
    return _nats(probs, _tilt(ref_probs, rewards, beta))


def _shortfall_from_reference(probs, ref_probs, rewards, beta):
    """This is the distance from the reference: a policy falls short of the optimum."""
    return beta * _nats(probs, ref_probs)


def _shortfall_of_reward(probs, ref_probs, rewards, beta):
    """This compares rewards alone: the KL term belongs to J on both sides."""
    return ((_tilt(ref_probs, rewards, beta) - probs) * rewards).sum()


def _log_z_alone(probs, ref_probs, rewards, beta):
    """J* is beta log Z: the beta before the logarithm is missing."""
    log_z = torch.logsumexp(ref_probs.log() + rewards / beta, -1)
    return log_z - ((probs * rewards).sum() - beta * _nats(probs, ref_probs))


def _multiplier(total, low, high):
    """The level at which `total` is 1, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > 1 else (low, middle)
    return (low + high) / 2


def forward_kl_policy(ref_probs, rewards, beta):
    """2.2: pi_ref beta / (lambda - r), lambda above every reward."""
    best = float(rewards.max())
    level = _multiplier(lambda x: (ref_probs * beta / (x - rewards)).sum(), best, best + beta)
    return ref_probs * beta / (level - rewards)


def _exponential_tilt(ref_probs, rewards, beta):
    """This is the exponential tilt, the optimum for reverse KL."""
    return _tilt(ref_probs, rewards, beta)


def _hyperbola_normalised(ref_probs, rewards, beta):
    """You chose lambda by hand and divided by the sum: lambda itself must make the sum 1."""
    weights = ref_probs * beta / (rewards.max() + beta - rewards)
    return weights / weights.sum()


def _hyperbola_not_normalised(ref_probs, rewards, beta):
    """The probabilities do not sum to 1: lambda has to be solved for."""
    return ref_probs * beta / (rewards.max() + beta - rewards)


def _forward_beta_upside_down(ref_probs, rewards, beta):
    """Beta is upside down: a small beta must let the reward speak louder."""
    return forward_kl_policy(ref_probs, rewards, 1 / beta)


def _forward_reward_flipped(ref_probs, rewards, beta):
    """The worst answer gains: mind the sign of the reward in the stationarity condition."""
    return forward_kl_policy(ref_probs, -rewards, beta)


def chi_squared_policy(ref_probs, rewards, beta):
    """2.3: pi_ref max(0, 1 + (r - lambda) / (2 beta))."""

    def policy(level):
        return ref_probs * (1 + (rewards - level) / (2 * beta)).clamp(min=0)

    low, high = float(rewards.min()), float(rewards.max())
    return policy(_multiplier(lambda level: policy(level).sum(), low, high))


def _negative_probabilities(ref_probs, rewards, beta):
    """Some of your probabilities are negative: the condition pi >= 0 binds there."""
    return ref_probs * (1 + (rewards - (ref_probs * rewards).sum()) / (2 * beta))


def _cut_and_normalised(ref_probs, rewards, beta):
    """You cut the negative ones and divided by the sum: lambda must be solved again instead."""
    weights = _negative_probabilities(ref_probs, rewards, beta).clamp(min=0)
    return weights / weights.sum()


def _factor_two(ref_probs, rewards, beta):
    """A factor 2 is missing: the derivative of (u - 1)^2 is 2 (u - 1)."""
    return chi_squared_policy(ref_probs, rewards, beta / 2)


def _chi_exponential(ref_probs, rewards, beta):
    """This is the exponential tilt, the optimum for reverse KL: it never drops an answer."""
    return _tilt(ref_probs, rewards, beta)


EXERCISES = (
    Exercise(
        "2.1",
        cases=((POLICY, REF, REWARDS, 0.5), (REF_4.flip(0), REF_4, REWARDS_4, 2.0)),
        answer=shortfall,
        mistakes=(
            _shortfall_turned_round,
            _shortfall_in_nats,
            _shortfall_from_reference,
            _shortfall_of_reward,
            _log_z_alone,
        ),
    ),
    Exercise(
        "2.2",
        cases=((REF, REWARDS, 0.5), (REF_4, REWARDS_4, 2.0)),
        answer=forward_kl_policy,
        mistakes=(
            _exponential_tilt,
            _hyperbola_normalised,
            _hyperbola_not_normalised,
            _forward_beta_upside_down,
            _forward_reward_flipped,
        ),
    ),
    Exercise(
        "2.3",
        cases=((REF, REWARDS, 0.35), (REF_4, REWARDS_4, 1.0), (REF_4, REWARDS_4, 0.1)),
        answer=chi_squared_policy,
        mistakes=(_negative_probabilities, _cut_and_normalised, _factor_two, _chi_exponential),
    ),
)

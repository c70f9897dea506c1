"""Chapter 02: the optimal policy."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, other_instances, random_policies, require

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


def _objective(probs, ref_probs, rewards, beta):
    return (probs * rewards).sum() - beta * _nats(probs, ref_probs)


def judge_shortfall(shortfall):
    """2.1: it is 0 at an optimum that is known beforehand, and it grows as J falls."""
    for seed, ((ref_probs, _), _, beta) in enumerate(other_instances(seed=1)):
        best, probs = (random_policies(ref_probs, 2 * seed + n) for n in (0, 1))
        rewards = beta * (best / ref_probs).log() + 0.3  # so best is their optimum
        agree(shortfall(best, ref_probs, rewards, beta), 0.0, "the optimum falls short of itself")
        agree(
            shortfall(probs, ref_probs, rewards, beta),
            _objective(best, ref_probs, rewards, beta)
            - _objective(probs, ref_probs, rewards, beta),
            "between two policies the shortfalls do not differ as their J does",
        )


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


def judge_forward_kl_policy(forward_kl_policy):
    """2.2: a policy where the objective, which is concave, is stationary, by autograd."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=2):
        probs = forward_kl_policy(ref_probs, rewards, beta)
        agree(probs.sum(), 1.0, "the probabilities do not sum to 1: lambda must see to it")
        require(probs.min() > 0, "a probability is not above 0: forward KL would be infinite")
        logits = probs.log().requires_grad_()
        policy = logits.softmax(0)
        objective = policy @ rewards - beta * (ref_probs * (ref_probs / policy).log()).sum()
        (slopes,) = torch.autograd.grad(objective, logits)
        agree(slopes, 0.0, "another policy is better: the gradient of the objective is not 0")


def _solved_for_lambda(ref_probs, rewards, beta):
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
    return _solved_for_lambda(ref_probs, rewards, 1 / beta)


def _forward_reward_flipped(ref_probs, rewards, beta):
    """The worst answer gains: mind the sign of the reward in the stationarity condition."""
    return _solved_for_lambda(ref_probs, -rewards, beta)


def judge_chi_squared_policy(chi_squared_policy):
    """2.3: the conditions of Karush, Kuhn and Tucker, which have one solution."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=3, n=6):
        for weight in (beta, beta / 8):  # with the smaller one answers are dropped
            probs = chi_squared_policy(ref_probs, rewards, weight)
            require(probs.min() >= 0, "some of your probabilities are negative")
            agree(probs.sum(), 1.0, "your probabilities do not sum to 1")
            policy = probs.clone().requires_grad_()
            penalty = (ref_probs * (policy / ref_probs - 1) ** 2).sum()
            (slopes,) = torch.autograd.grad(policy @ rewards - weight * penalty, policy)
            kept = probs > 0
            level = slopes[kept].max()
            agree(slopes[kept], level, "moving mass between two answers that you keep still helps")
            worthless = (slopes <= level + 1e-8).all()
            require(worthless, "an answer that you dropped is worth some mass")


def _dropped_where_negative(ref_probs, rewards, beta):
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
    return _dropped_where_negative(ref_probs, rewards, beta / 2)


def _chi_exponential(ref_probs, rewards, beta):
    """This is the exponential tilt, the optimum for reverse KL: it never drops an answer."""
    return _tilt(ref_probs, rewards, beta)


EXERCISES = (
    Exercise(
        "2.1",
        cases=((POLICY, REF, REWARDS, 0.5), (REF_4.flip(0), REF_4, REWARDS_4, 2.0)),
        judge=judge_shortfall,
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
        judge=judge_forward_kl_policy,
        mistakes=(
            _exponential_tilt,
            _hyperbola_normalised,
            _hyperbola_not_normalised,
            _forward_beta_upside_down,
            _forward_reward_flipped,
        ),
        shape=lambda ref_probs, rewards, beta: ref_probs.shape,
    ),
    Exercise(
        "2.3",
        cases=((REF, REWARDS, 0.35), (REF_4, REWARDS_4, 1.0), (REF_4, REWARDS_4, 0.1)),
        judge=judge_chi_squared_policy,
        mistakes=(_negative_probabilities, _cut_and_normalised, _factor_two, _chi_exponential),
        shape=lambda ref_probs, rewards, beta: ref_probs.shape,
    ),
)

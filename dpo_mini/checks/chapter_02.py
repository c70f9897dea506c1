"""Chapter 02: the optimal policy."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, other_instances, random_policies, require
from dpo_mini.checks.theorems import implied_rewards, kl, no_slope, objective, sum_to_one

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
POLICY = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
REF_4 = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS_4 = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)


def _tilt(ref_probs, rewards, beta):
    weights = ref_probs * torch.exp(rewards / beta)
    return weights / weights.sum()


def judge_shortfall(shortfall):
    """2.1: it is 0 at an optimum that is known beforehand, and it grows as J falls."""
    for seed, ((ref_probs, _), _, beta) in enumerate(other_instances(seed=1)):
        best, probs = (random_policies(ref_probs, 2 * seed + n) for n in (0, 1))
        rewards = implied_rewards(best, ref_probs, beta) + 0.3  # so best is their optimum
        agree(shortfall(best, ref_probs, rewards, beta), 0.0, "the optimum falls short of itself")
        agree(
            shortfall(probs, ref_probs, rewards, beta),
            objective(best, ref_probs, rewards, beta) - objective(probs, ref_probs, rewards, beta),
            "between two policies the shortfalls do not differ as their J does",
        )


def _shortfall_turned_round(probs, ref_probs, rewards, beta):
    """The KL is reversed: here it averages over the optimum and not over the policy."""
    return beta * kl(_tilt(ref_probs, rewards, beta), probs)


def _shortfall_in_nats(probs, ref_probs, rewards, beta):
    """Beta is missing: a shortfall of J is in units of reward, this is in nats."""
    return kl(probs, _tilt(ref_probs, rewards, beta))


def _shortfall_from_reference(probs, ref_probs, rewards, beta):
    """This is the distance from the reference: a policy falls short of the optimum."""
    return beta * kl(probs, ref_probs)


def _shortfall_of_reward(probs, ref_probs, rewards, beta):
    """This compares rewards alone: the KL term belongs to J on both sides."""
    return ((_tilt(ref_probs, rewards, beta) - probs) * rewards).sum()


def _log_z_alone(probs, ref_probs, rewards, beta):
    """J* is beta log Z: the beta before the logarithm is missing."""
    log_z = torch.logsumexp(ref_probs.log() + rewards / beta, -1)
    return log_z - ((probs * rewards).sum() - beta * kl(probs, ref_probs))


def _best_value(ref_probs, rewards, beta):
    return beta * torch.logsumexp(ref_probs.log() + rewards / beta, -1)


def _shortfall_negative(probs, ref_probs, rewards, beta):
    """The sign is reversed: no policy is above the optimum, so a shortfall is never negative."""
    return objective(probs, ref_probs, rewards, beta) - _best_value(ref_probs, rewards, beta)


def _objective_without_kl(probs, ref_probs, rewards, beta):
    """The policy's J has lost its KL term: what you subtract from J* is its mean reward only."""
    return _best_value(ref_probs, rewards, beta) - (probs * rewards).sum()


def _best_without_kl(probs, ref_probs, rewards, beta):
    """J* has lost its KL term: the optimum, too, pays for leaving the reference."""
    reward = (_tilt(ref_probs, rewards, beta) * rewards).sum()
    return reward - objective(probs, ref_probs, rewards, beta)


def _best_is_the_largest_reward(probs, ref_probs, rewards, beta):
    """The largest reward stands for J*: with a KL to pay, the optimum stays below it."""
    return rewards.max() - objective(probs, ref_probs, rewards, beta)


def _objective_alone(probs, ref_probs, rewards, beta):
    """This is J of the policy: how far is it below J*?"""
    return objective(probs, ref_probs, rewards, beta)


def _objective_with_the_penalty_added(probs, ref_probs, rewards, beta):
    """In the policy's J the penalty has the wrong sign: leaving the reference must cost."""
    value = (probs * rewards).sum() + beta * kl(probs, ref_probs)
    return _best_value(ref_probs, rewards, beta) - value


def _objective_in_nats(probs, ref_probs, rewards, beta):
    """In the policy's J the KL has lost its beta: nats are subtracted from units of reward."""
    value = (probs * rewards).sum() - kl(probs, ref_probs)
    return _best_value(ref_probs, rewards, beta) - value


def _objective_with_reverse_kl(probs, ref_probs, rewards, beta):
    """In the policy's J the KL is reversed: it averages over the policy, not over the reference."""
    value = (probs * rewards).sum() - beta * kl(ref_probs, probs)
    return _best_value(ref_probs, rewards, beta) - value


def _best_without_reference(probs, ref_probs, rewards, beta):
    """J* has lost the reference: Z weighs each answer by its probability there."""
    best = beta * torch.logsumexp(rewards / beta, -1)
    return best - objective(probs, ref_probs, rewards, beta)


def _best_at_beta_one(probs, ref_probs, rewards, beta):
    """Inside Z the rewards are not divided by beta."""
    best = beta * torch.logsumexp(ref_probs.log() + rewards, -1)
    return best - objective(probs, ref_probs, rewards, beta)


def _best_without_logarithm(probs, ref_probs, rewards, beta):
    """The logarithm is missing: this takes beta Z for J*."""
    best = beta * (ref_probs * torch.exp(rewards / beta)).sum()
    return best - objective(probs, ref_probs, rewards, beta)


def _shortfall_over_beta(probs, ref_probs, rewards, beta):
    """The KL is divided by beta: beta is the price of a nat and multiplies it."""
    return kl(probs, _tilt(ref_probs, rewards, beta)) / beta


def _shortfall_of_tilt_upside_down(probs, ref_probs, rewards, beta):
    """The optimum is tilted by beta r: it is r / beta that counts."""
    return beta * kl(probs, _tilt(ref_probs, rewards, 1 / beta))


def _shortfall_reversed_in_nats(probs, ref_probs, rewards, beta):
    """Two things: the KL is reversed (it averages over the optimum), and its beta is missing."""
    return kl(_tilt(ref_probs, rewards, beta), probs)


def _below_the_reference(probs, ref_probs, rewards, beta):
    """This compares with the reference's J: a policy falls short of the optimum's."""
    value = objective(probs, ref_probs, rewards, beta)
    return objective(ref_probs, ref_probs, rewards, beta) - value


def _multiplier(total, low, high):
    """The level at which `total` is 1, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > 1 else (low, middle)
    return (low + high) / 2


def judge_forward_kl_policy(forward_kl_policy):
    """2.3: a policy where the objective, which is concave, is stationary, by autograd."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=2):
        probs = forward_kl_policy(ref_probs, rewards, beta)
        sum_to_one(probs, "the probabilities do not sum to 1: lambda must see to it")
        require(probs.min() > 0, "a probability is not above 0: forward KL would be infinite")
        logits = probs.log().requires_grad_()
        policy = logits.softmax(0)
        no_slope(
            policy @ rewards - beta * kl(ref_probs, policy),
            logits,
            "another policy is better: the gradient of the objective is not 0",
        )


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


def _lambda_at_the_mean(ref_probs, rewards, beta):
    """Lambda is the mean reward plus beta here: it must be above every reward, and solved for."""
    return ref_probs * beta / ((ref_probs * rewards).sum() + beta - rewards)


def _lambda_at_the_mean_normalised(ref_probs, rewards, beta):
    """Lambda is the mean reward plus beta here, and the sum is divided out: lambda itself must
    make the sum 1.
    """
    weights = _lambda_at_the_mean(ref_probs, rewards, beta)
    return weights / weights.sum()


def judge_chi_squared_policy(chi_squared_policy):
    """2.4: the conditions of Karush, Kuhn and Tucker, which have one solution."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=3, n=6):
        for weight in (beta, beta / 8):  # with the smaller one answers are dropped
            probs = chi_squared_policy(ref_probs, rewards, weight)
            require(probs.min() >= 0, "some of your probabilities are negative")
            sum_to_one(probs)
            policy = probs.clone().requires_grad_()
            penalty = (ref_probs * (policy / ref_probs - 1) ** 2).sum()
            (slopes,) = torch.autograd.grad(policy @ rewards - weight * penalty, policy)
            kept = probs > 0
            level = slopes[kept].max()
            agree(slopes[kept], level, "moving mass between two answers that you keep still helps")
            agree(slopes, slopes.clamp(max=level), "an answer that you dropped is worth some mass")


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


def _linear(ref_probs, rewards, weight):
    return ref_probs * (1 + (rewards - (ref_probs * rewards).sum()) / weight)


def _factor_two_twice(ref_probs, rewards, beta):
    """There is a factor 2 too many: the derivative of (u - 1)^2 is 2 (u - 1), once."""
    return _dropped_where_negative(ref_probs, rewards, 2 * beta)


def _negative_and_half(ref_probs, rewards, beta):
    """Two things: some of your probabilities are negative, and the 2 of a square's derivative is
    missing.
    """
    return _linear(ref_probs, rewards, beta)


def _negative_and_double(ref_probs, rewards, beta):
    """Two things: some of your probabilities are negative, and the 2 of a square's derivative
    counts twice.
    """
    return _linear(ref_probs, rewards, 4 * beta)


def _cut_only(ref_probs, rewards, beta):
    """You cut the negative ones and left the rest: now the sum is above 1."""
    return _linear(ref_probs, rewards, 2 * beta).clamp(min=0)


def _cut_and_half(ref_probs, rewards, beta):
    """Two things: lambda must be solved again when answers are dropped, and the 2 of a square's
    derivative is missing.
    """
    weights = _linear(ref_probs, rewards, beta).clamp(min=0)
    return weights / weights.sum()


def _kept_at_the_mean(ref_probs, rewards, beta):
    """Among the answers that stay, lambda is their mean reward here: their reference mass is below
    1, and lambda must make up for it.
    """
    kept = (_linear(ref_probs, rewards, 2 * beta) > 0) * ref_probs
    weights = kept / kept.sum()
    return weights * (1 + (rewards - (weights * rewards).sum()) / (2 * beta))


def _dropped_once(ref_probs, rewards, beta):
    """You dropped answers once: after lambda is solved again, others may turn negative."""
    kept = _linear(ref_probs, rewards, 2 * beta) > 0
    mass, mean = (kept * ref_probs).sum(), (kept * ref_probs * rewards).sum()
    level = (mean - 2 * beta * (1 - mass)) / mass
    return kept * ref_probs * (1 + (rewards - level) / (2 * beta))


def _plain_mean(ref_probs, rewards, beta):
    """Lambda is the plain mean reward here: the sum is weighted by the reference."""
    return ref_probs * (1 + (rewards - rewards.mean()) / (2 * beta))


def _without_lambda(ref_probs, rewards, beta):
    """Lambda is missing: nothing makes your probabilities sum to 1."""
    return ref_probs * (1 + rewards / (2 * beta)).clamp(min=0)


def _penalty_not_weighted(ref_probs, rewards, beta):
    """The penalty has lost its weights: the square of u - 1 is averaged over the reference."""

    def policy(level):
        return (ref_probs + (rewards - level) / (2 * beta)).clamp(min=0)

    low, high = float(rewards.min() - 2 * beta), float(rewards.max() + 2 * beta)
    return policy(_multiplier(lambda level: policy(level).sum(), low, high))


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
            _shortfall_negative,
            _objective_without_kl,
            _best_without_kl,
            _best_is_the_largest_reward,
            _objective_alone,
            _objective_with_the_penalty_added,
            _objective_in_nats,
            _objective_with_reverse_kl,
            _best_without_reference,
            _best_at_beta_one,
            _best_without_logarithm,
            _shortfall_over_beta,
            _shortfall_of_tilt_upside_down,
            _shortfall_reversed_in_nats,
            _below_the_reference,
        ),
    ),
    Exercise(
        "2.3",
        cases=((REF, REWARDS, 0.5), (REF_4, REWARDS_4, 2.0)),
        judge=judge_forward_kl_policy,
        mistakes=(
            _exponential_tilt,
            _hyperbola_normalised,
            _hyperbola_not_normalised,
            _forward_beta_upside_down,
            _forward_reward_flipped,
            _lambda_at_the_mean,
            _lambda_at_the_mean_normalised,
        ),
        shape=lambda ref_probs, rewards, beta: ref_probs.shape,
    ),
    Exercise(
        "2.4",
        cases=((REF, REWARDS, 0.35), (REF_4, REWARDS_4, 1.0), (REF_4.flip(0), REWARDS_4, 0.1)),
        judge=judge_chi_squared_policy,
        mistakes=(
            _negative_probabilities,
            _cut_and_normalised,
            _factor_two,
            _chi_exponential,
            _factor_two_twice,
            _negative_and_half,
            _negative_and_double,
            _cut_only,
            _cut_and_half,
            _kept_at_the_mean,
            _dropped_once,
            _plain_mean,
            _without_lambda,
            _penalty_not_weighted,
        ),
        shape=lambda ref_probs, rewards, beta: ref_probs.shape,
    ),
)

"""Chapter 01: the objective."""

import math

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, other_instances, random_policies, require
from dpo_mini.checks.theorems import implied_rewards, kl, no_slope, optimum

POLICY = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
POINTS = torch.linspace(-6.0, 10.0, 81, dtype=torch.float64)
# Two humps of unequal weight and width: mean, median, modes and midpoint all differ.
HUMPS = 0.3 * torch.exp(-0.5 * (POINTS + 2) ** 2) + 0.1 * torch.exp(-0.125 * (POINTS - 4) ** 2)
TARGET = HUMPS / HUMPS.sum()


def judge_objective(objective):
    """1.1: J is known where the rewards make the policy optimal, and linear in the rewards."""
    for seed, ((ref, _), (rewards, _), beta) in enumerate(other_instances(seed=1)):
        probs = random_policies(ref, seed)
        own_rewards = implied_rewards(probs, ref, beta)  # probs is their optimum, with Z = 1
        agree(
            objective(probs, ref, own_rewards + 0.7, beta),
            0.7,
            "rewards of beta log(pi / pi_ref) + c make pi the optimum, and its J is c",
        )
        agree(
            objective(probs, ref, rewards, beta) - objective(probs, ref, own_rewards, beta),
            probs @ (rewards - own_rewards),
            "when the rewards change, J changes by the mean change under the policy",
        )
        _judge_answers_never_given(objective, probs, ref, rewards, beta)


def _judge_answers_never_given(objective, probs, ref, rewards, beta):
    for y, only in enumerate(torch.eye(len(ref), dtype=torch.float64)):
        agree(
            objective(only, ref, rewards, beta),
            rewards[y] + beta * math.log(ref[y]),
            "a policy that gives one answer only pays beta times the surprise of the reference",
        )
    rest, ref_rest = probs[1:] / probs[1:].sum(), ref[1:] / ref[1:].sum()
    agree(
        objective(torch.cat([torch.zeros_like(ref[:1]), rest]), ref, rewards, beta),
        objective(rest, ref_rest, rewards[1:], beta) + beta * math.log(ref[1:].sum()),
        "an answer of probability 0 costs what the reference gave to it, and no more",
    )


def _kl_turned_round(probs, ref_probs, rewards, beta):
    """The KL is reversed: it must average over what the policy says, not the reference."""
    return (probs * rewards).sum() - beta * kl(ref_probs, probs)


def _penalty_added(probs, ref_probs, rewards, beta):
    """The penalty has the wrong sign: leaving the reference must cost."""
    return (probs * rewards).sum() + beta * kl(probs, ref_probs)


def _zero_times_infinity(probs, ref_probs, rewards, beta):
    """Your number is not one where an answer has probability 0: 0 log 0 counts as 0."""
    return (probs * rewards).sum() - beta * (probs * (probs / ref_probs).log()).sum()


def _beta_on_the_reward(probs, ref_probs, rewards, beta):
    """Beta multiplies the reward: it is the price of a nat and belongs to the KL."""
    return beta * (probs * rewards).sum() - kl(probs, ref_probs)


def _entropy_only(probs, ref_probs, rewards, beta):
    """The reference is missing: this charges for low entropy, wherever the policy is."""
    return (probs * rewards).sum() - beta * torch.xlogy(probs, probs).sum()


def _kl_missing(probs, ref_probs, rewards, beta):
    """The KL term is missing: this is the mean reward alone."""
    return (probs * rewards).sum()


def _rewards_summed(probs, ref_probs, rewards, beta):
    """The rewards are added up: their mean under the policy weighs each by its probability."""
    return rewards.sum() - beta * kl(probs, ref_probs)


def _reward_of_the_reference(probs, ref_probs, rewards, beta):
    """This is the reference's mean reward: J asks for the policy's."""
    return (ref_probs * rewards).sum() - beta * kl(probs, ref_probs)


def _cross_entropy(probs, ref_probs, rewards, beta):
    """This charges a cross-entropy: in a KL the policy's own log-probability counts too."""
    return (probs * rewards).sum() + beta * (probs * ref_probs.log()).sum()


def _kl_not_weighted(probs, ref_probs, rewards, beta):
    """The log-ratios are added up: a KL weighs each by the policy's probability."""
    return (probs * rewards).sum() - beta * torch.log(probs / ref_probs).sum()


def judge_safe_beta(safe_beta):
    """1.2: no reference takes an answer below the floor, and the worst one takes it just there."""
    for seed, (_, (rewards, _), _) in enumerate(other_instances(seed=2)):
        for floor in (0.05, 0.3, 0.8):
            beta = safe_beta(rewards, floor)
            require(beta > 0, "your beta is not above 0")
            for draw in range(5):
                ref = random_policies(rewards, 10 * seed + draw)
                shares = optimum(ref, rewards, beta) / ref
                require(shares.min() >= floor, "with your beta an answer falls below the floor")
            worst_ref = torch.full_like(rewards, 1e-13)
            worst_ref[rewards.argmax()] = 1.0
            shares = optimum(worst_ref, rewards, beta) / worst_ref
            agree(
                shares.min(),
                floor,
                "a reference that all but always gives the best answer does not meet the floor",
            )


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


def judge_forward_gaussian(forward_gaussian):
    """1.4: forward KL, by autograd, is stationary; it has one stationary point."""
    for seed, (_, (points, _), _) in enumerate(other_instances(seed=3)):
        probs = random_policies(points, seed)
        gaussian = forward_gaussian(points, probs).requires_grad_()
        require(gaussian[1] > 0, "the standard deviation is not above 0")
        log_density = torch.distributions.Normal(*gaussian).log_prob(points)
        no_slope(
            (probs * (probs.log() - log_density)).sum(),
            gaussian,
            "another Gaussian has a smaller forward KL: its gradient is not 0",
        )


def _variance(points, probs):
    """The second number is a variance: take its square root."""
    mean = (probs * points).sum()
    return torch.stack([mean, (probs * (points - mean) ** 2).sum()])


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


def _spread_without_weights(points, probs):
    """The mean is weighted and the spread is not: both are expectations under the target."""
    mean = (probs * points).sum()
    return torch.stack([mean, ((points - mean) ** 2).mean().sqrt()])


def _corrected_for_a_sample(points, probs):
    """The spread has the factor K / (K - 1) of a sample: these probabilities are known exactly."""
    mean = (probs * points).sum()
    variance = (probs * (points - mean) ** 2).sum() * len(points) / (len(points) - 1)
    return torch.stack([mean, variance.sqrt()])


EXERCISES = (
    Exercise(
        "1.1",
        cases=((POLICY, REF, REWARDS, 0.5), (REF.flip(0), REF, REWARDS, 2.0)),
        judge=judge_objective,
        mistakes=(
            _kl_turned_round,
            _penalty_added,
            _zero_times_infinity,
            _beta_on_the_reward,
            _entropy_only,
            _kl_missing,
            _rewards_summed,
            _reward_of_the_reference,
            _cross_entropy,
            _kl_not_weighted,
        ),
    ),
    Exercise(
        "1.2",
        cases=((REWARDS, 0.1), (REWARDS + 10.0, 0.5)),
        judge=judge_safe_beta,
        mistakes=(
            _largest_reward,
            _logarithm_missing,
            _upside_down,
            _decimal_logarithm,
            _negative_beta,
        ),
    ),
    Exercise(
        "1.4",
        cases=((POINTS, TARGET), (POINTS + 1.0, TARGET.flip(0))),
        judge=judge_forward_gaussian,
        mistakes=(
            _variance,
            _at_the_mode,
            _without_weights,
            _second_moment,
            _spread_without_weights,
            _corrected_for_a_sample,
        ),
        shape=lambda points, probs: (2,),
    ),
)

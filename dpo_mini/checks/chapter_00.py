"""Chapter 00: the tour."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, other_instances
from dpo_mini.checks.theorems import differ_alike, implied_rewards, optimum, sum_to_one

REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)


def judge_tilt(tilt):
    """0.1: a policy whose log-ratios to the reference differ as the rewards do, over beta."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=0):
        probs = tilt(ref_probs, rewards, beta)
        sum_to_one(probs)
        differ_alike(
            implied_rewards(probs, ref_probs, beta),
            rewards,
            "beta log(pi / pi_ref) of two answers does not differ as their rewards do",
        )


def _beta_multiplies(ref_probs, rewards, beta):
    """The reward is multiplied by beta where it should be divided: a small beta must let the
    reward speak louder.
    """
    return torch.softmax(ref_probs.log() + rewards * beta, -1)


def _no_reference(ref_probs, rewards, beta):
    """The reference is missing: softmax(r / beta) forgets where the policy started."""
    return torch.softmax(rewards / beta, -1)


def _not_normalised(ref_probs, rewards, beta):
    """The weights are right but do not sum to 1: divide by Z."""
    return ref_probs * torch.exp(rewards / beta)


def _probability_in_softmax(ref_probs, rewards, beta):
    """The reference stands in the softmax as a probability: a softmax takes its logarithm."""
    return torch.softmax(ref_probs + rewards / beta, -1)


def _reference_divides(ref_probs, rewards, beta):
    """The reference divides: what it made likely must stay likelier, not less."""
    return torch.softmax(rewards / beta - ref_probs.log(), -1)


def judge_reward_margin(reward_margin):
    """0.2: read off a policy that was made with known rewards, the margin is theirs."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=0):
        probs = optimum(ref_probs, rewards, beta)
        agree(
            reward_margin(probs, ref_probs, beta),
            rewards[0] - rewards[1],
            "the policy was made with rewards that differ by another margin",
        )


def _margin_without_reference(probs, ref_probs, beta):
    """The reference is missing: an answer that it already liked now looks rewarded."""
    return beta * torch.log(probs[0] / probs[1])


def _margin_without_beta(probs, ref_probs, beta):
    """Beta is missing: this margin is in nats, not in units of reward."""
    return torch.log(probs[0] * ref_probs[1] / (probs[1] * ref_probs[0]))


def _margin_turned_round(probs, ref_probs, beta):
    """The sign is reversed: this is the reward of answer 1 above answer 0."""
    return beta * torch.log(probs[1] * ref_probs[0] / (probs[0] * ref_probs[1]))


def _margin_of_ratios(probs, ref_probs, beta):
    """The logarithm is missing: a difference of ratios is not a reward."""
    return beta * (probs[0] / ref_probs[0] - probs[1] / ref_probs[1])


def _margin_with_reference_added(probs, ref_probs, beta):
    """The reference multiplies where it should divide: a reward is read off pi over pi_ref."""
    return beta * torch.log(probs[0] * ref_probs[0] / (probs[1] * ref_probs[1]))


def _margin_of_one_answer(probs, ref_probs, beta):
    """This reads off answer 0 alone, so Z is still in it: a margin compares two answers."""
    return beta * torch.log(probs[0] / ref_probs[0])


EXERCISES = (
    Exercise(
        "0.1",
        cases=((REF, REWARDS, 0.5), (REF.flip(0), REWARDS, 2.0)),
        judge=judge_tilt,
        mistakes=(
            _beta_multiplies,
            _no_reference,
            _not_normalised,
            _probability_in_softmax,
            _reference_divides,
        ),
        shape=lambda ref_probs, rewards, beta: ref_probs.shape,
    ),
    Exercise(
        "0.2",
        cases=((REF.roll(1), REF, 0.5), (REF.flip(0), REF, 2.0)),
        judge=judge_reward_margin,
        mistakes=(
            _margin_without_reference,
            _margin_without_beta,
            _margin_turned_round,
            _margin_of_ratios,
            _margin_with_reference_added,
            _margin_of_one_answer,
        ),
    ),
)

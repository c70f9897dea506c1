"""Chapter 00: the tour."""

import torch

from dpo_mini.checks import Exercise

REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)


def tilt(ref_probs, rewards, beta):
    """0.1: pi* from probabilities `[Y]`, rewards `[Y]` and beta."""
    weights = ref_probs * torch.exp(rewards / beta)
    return weights / weights.sum()


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


def reward_margin(probs, ref_probs, beta):
    """0.2: the reward of answer 0 above answer 1, read off a policy `[Y]`."""
    return beta * torch.log(probs[0] * ref_probs[1] / (probs[1] * ref_probs[0]))


def _margin_without_reference(probs, ref_probs, beta):
    """The reference is missing: an answer that it already liked now looks rewarded."""
    return beta * torch.log(probs[0] / probs[1])


def _margin_without_beta(probs, ref_probs, beta):
    """Beta is missing: this margin is in nats, not in units of reward."""
    return reward_margin(probs, ref_probs, 1.0)


def _margin_turned_round(probs, ref_probs, beta):
    """The sign is turned round: this is the reward of answer 1 above answer 0."""
    return -reward_margin(probs, ref_probs, beta)


def _margin_of_ratios(probs, ref_probs, beta):
    """The logarithm is missing: a difference of ratios is not a reward."""
    return beta * (probs[0] / ref_probs[0] - probs[1] / ref_probs[1])


EXERCISES = (
    Exercise(
        "0.1",
        cases=((REF, REWARDS, 0.5), (REF.flip(0), REWARDS, 2.0)),
        answer=tilt,
        mistakes=(_beta_multiplies, _no_reference, _not_normalised, _probability_in_softmax),
    ),
    Exercise(
        "0.2",
        cases=((tilt(REF, REWARDS, 0.5), REF, 0.5), (REF.flip(0), REF, 2.0)),
        answer=reward_margin,
        mistakes=(
            _margin_without_reference,
            _margin_without_beta,
            _margin_turned_round,
            _margin_of_ratios,
        ),
    ),
)

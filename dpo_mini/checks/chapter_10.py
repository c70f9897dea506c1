"""Chapter 10: change one line."""

import torch

from dpo_mini.checks import Exercise

SHOWN = torch.tensor([0.69, 0.31, 0.5, 0.74], dtype=torch.float64)
REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WINS = torch.tensor(
    [[0.5, 0.9, 0.3, 0.6], [0.1, 0.5, 0.8, 0.7], [0.7, 0.2, 0.5, 0.45], [0.4, 0.3, 0.55, 0.5]],
    dtype=torch.float64,
)
CYCLE = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]], dtype=torch.float64)
ANOTHER = torch.tensor([[0.5, 0.6, 0.05], [0.4, 0.5, 0.75], [0.95, 0.25, 0.5]], dtype=torch.float64)


def fitted_margin(shown, flip_rate):
    """10.1: logit of the win probability before the flips."""
    return torch.log((shown - flip_rate) / (1 - flip_rate - shown))


def _margin_of_the_labels(shown, flip_rate):
    """This is the margin of the labels as shown, which is what DPO fits: the flips are still in."""
    return torch.log(shown / (1 - shown))


def _margin_flipped_again(shown, flip_rate):
    """This flips the labels once more, as cDPO does: the rater has done that already."""
    mixed = (1 - flip_rate) * shown + flip_rate * (1 - shown)
    return torch.log(mixed / (1 - mixed))


def _margin_not_rescaled(shown, flip_rate):
    """Taking the flips away is not enough: what is left must again be a probability, 0 to 1."""
    left = shown - flip_rate
    return torch.log(left / (1 - left))


def _margin_as_probability(shown, flip_rate):
    """This is the probability before the flips: a margin is its log-odds."""
    return (shown - flip_rate) / (1 - 2 * flip_rate)


def ipo_policy(ref_probs, wins, beta):
    """10.2: the reference tilted by the mean win rate, itself included."""
    weights = ref_probs * torch.exp(wins.mean(1) / beta)
    return weights / weights.sum()


def _policy_without_reference(ref_probs, wins, beta):
    """The reference is missing: win rates tilt it, they do not replace it."""
    weights = torch.exp(wins.mean(1) / beta)
    return weights / weights.sum()


def _policy_of_defeats(ref_probs, wins, beta):
    """This averages columns: how often an answer is beaten. Row i holds the wins of answer i."""
    return ipo_policy(ref_probs, wins.T, beta)


def _policy_of_sums(ref_probs, wins, beta):
    """This sums wins where the solution has a mean over the answers: beta is Y times too small."""
    return ipo_policy(ref_probs, wins, beta / len(wins))


def _policy_without_itself(ref_probs, wins, beta):
    """The mean is over all Y answers, itself included with 1/2: minimise the squares of all pairs
    and divide by Y, not by the number of opponents.
    """
    others = (wins.sum(1) - 0.5) / (len(wins) - 1)
    weights = ref_probs * torch.exp(others / beta)
    return weights / weights.sum()


def _policy_of_log_odds(ref_probs, wins, beta):
    """These are log-odds of win rates: IPO's target is linear in the probability."""
    rates = wins.mean(1)
    weights = ref_probs * torch.exp(torch.log(rates / (1 - rates)) / beta)
    return weights / weights.sum()


def _policy_at_half(ref_probs, wins, beta):
    """A factor 2 is off: the target of a pair is (2p - 1) / (2 beta), which is p / beta and a
    constant.
    """
    return ipo_policy(ref_probs, wins, 2 * beta)


def nash_policy(wins):
    """10.3: each action by the margin between the two others."""
    margins = torch.stack([wins[1, 2], wins[2, 0], wins[0, 1]]) - 0.5
    return margins / margins.sum()


def _nash_by_own_margin(wins):
    """This plays an action by the margin with which it wins. Check: against this mixture some
    action wins more than half.
    """
    margins = torch.stack([wins[0, 1], wins[1, 2], wins[2, 0]]) - 0.5
    return margins / margins.sum()


def _nash_by_own_defeat(wins):
    """This plays an action by the margin with which it is beaten: it is the fight that the action
    takes no part in which counts.
    """
    margins = torch.stack([wins[2, 0], wins[0, 1], wins[1, 2]]) - 0.5
    return margins / margins.sum()


def _nash_by_totals(wins):
    """These are shares of all wins: totals are what a Bradley-Terry reward knows, and it cannot
    see a cycle.
    """
    return wins.sum(1) / wins.sum()


def _nash_as_one_action(wins):
    """This is one action for certain, the one with most wins: something beats it."""
    return torch.nn.functional.one_hot(wins.sum(1).argmax(), 3)


def _nash_of_probabilities(wins):
    """These are win probabilities where margins over one half are needed."""
    chances = torch.stack([wins[1, 2], wins[2, 0], wins[0, 1]])
    return chances / chances.sum()


EXERCISES = (
    Exercise(
        "10.1",
        cases=((SHOWN, 0.2), (SHOWN, 0.05)),
        answer=fitted_margin,
        mistakes=(
            _margin_of_the_labels,
            _margin_flipped_again,
            _margin_not_rescaled,
            _margin_as_probability,
        ),
    ),
    Exercise(
        "10.2",
        cases=((REF, WINS, 0.5), (REF[:3] / 0.9, WINS[:3, :3], 0.1)),
        answer=ipo_policy,
        mistakes=(
            _policy_without_reference,
            _policy_of_defeats,
            _policy_of_sums,
            _policy_without_itself,
            _policy_of_log_odds,
            _policy_at_half,
        ),
    ),
    Exercise(
        "10.3",
        cases=((CYCLE,), (ANOTHER,), (ANOTHER.T.contiguous(),)),
        answer=nash_policy,
        mistakes=(
            _nash_by_own_margin,
            _nash_by_own_defeat,
            _nash_by_totals,
            _nash_as_one_action,
            _nash_of_probabilities,
        ),
    ),
)

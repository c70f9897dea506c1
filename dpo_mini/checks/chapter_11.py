"""Chapter 11: change one line."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, other_instances
from dpo_mini.checks.theorems import no_slope, sum_to_one

SHOWN = torch.tensor([0.69, 0.31, 0.5, 0.74], dtype=torch.float64)
REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WINS = torch.tensor(
    [[0.5, 0.9, 0.3, 0.6], [0.1, 0.5, 0.8, 0.7], [0.7, 0.2, 0.5, 0.45], [0.4, 0.3, 0.55, 0.5]],
    dtype=torch.float64,
)
CYCLE = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]], dtype=torch.float64)
ANOTHER = torch.tensor([[0.5, 0.6, 0.05], [0.4, 0.5, 0.75], [0.95, 0.25, 0.5]], dtype=torch.float64)


def judge_fitted_margin(fitted_margin):
    """11.1: labels made with known margins, then flipped, give these margins back."""
    for n, flip_rate in ((1, 0.0), (3, 0.1), (5, 0.25), (6, 0.4)):
        margins = 2 * draws(n, seed=n)
        wins = margins.sigmoid()
        kept, flipped = (1 - flip_rate) * wins, flip_rate * (1 - wins)
        agree(
            fitted_margin(kept + flipped, flip_rate),
            margins,
            "labels of raters with known margins, then flipped, do not give these margins back",
        )


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


def _margin_rescaled_once(shown, flip_rate):
    """This undoes flips in one direction: losses are flipped into wins as well."""
    left = (shown - flip_rate) / (1 - flip_rate)
    return torch.log(left / (1 - left))


def _margin_divided(shown, flip_rate):
    """The margin of the labels is divided: it is the probability that the flips mixed."""
    return torch.log(shown / (1 - shown)) / (1 - 2 * flip_rate)


def _margin_of_log_p(shown, flip_rate):
    """This is the log-probability before the flips: a margin is the log-odds."""
    return torch.log((shown - flip_rate) / (1 - 2 * flip_rate))


def _margin_as_difference(shown, flip_rate):
    """This is how much more often the first answer wins: Bradley-Terry takes log-odds."""
    return 2 * (shown - flip_rate) / (1 - 2 * flip_rate) - 1


def judge_ipo_policy(ipo_policy):
    """11.2: a distribution at which the exact IPO loss over all pairs, convex, has no slope."""
    for seed, ((ref_probs, _), _, beta) in enumerate(other_instances(seed=0)):
        scores = draws(len(ref_probs), len(ref_probs), seed=seed)
        wins = (scores - scores.T).sigmoid()
        probs = ipo_policy(ref_probs, wins, beta)
        sum_to_one(probs)
        log_ratios = (probs / ref_probs).log().requires_grad_()
        margins = log_ratios[:, None] - log_ratios[None, :]
        loss = (wins * (margins - 1 / (2 * beta)) ** 2).mean()  # every ordered pair as often
        no_slope(loss, log_ratios, "the IPO loss over all pairs still has a slope at your policy")


def _policy_without_reference(ref_probs, wins, beta):
    """The reference is missing: win rates tilt it, they do not replace it."""
    weights = torch.exp(wins.mean(1) / beta)
    return weights / weights.sum()


def _policy_of_defeats(ref_probs, wins, beta):
    """This averages columns: how often an answer is beaten. Row i holds the wins of answer i."""
    return torch.softmax(ref_probs.log() + wins.mean(0) / beta, 0)


def _policy_of_sums(ref_probs, wins, beta):
    """This sums wins where the solution has a mean over the answers: beta is Y times too small."""
    return torch.softmax(ref_probs.log() + wins.sum(1) / beta, 0)


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
    return torch.softmax(ref_probs.log() + wins.mean(1) / (2 * beta), 0)


def _policy_against_reference(ref_probs, wins, beta):
    """The opponents are weighted by the reference: here all pairs are compared equally often."""
    return torch.softmax(ref_probs.log() + wins @ ref_probs / beta, 0)


def _policy_of_mean_log_odds(ref_probs, wins, beta):
    """These are means of log-odds, a Bradley-Terry reward: IPO's target is linear in the
    probability of a win.
    """
    return torch.softmax(ref_probs.log() + wins.logit().mean(1) / beta, 0)


def judge_nash_policy(nash_policy):
    """11.4: a mixture that no action beats more than half the time; on a cycle it is the only."""
    for seed in range(6):
        margins = 0.49 * draws(3, seed=seed).sigmoid()
        wins = torch.full((3, 3), 0.5, dtype=torch.float64)
        for action, margin in enumerate(margins.tolist()):
            beaten = (action + 1 + seed % 2) % 3  # both directions of the cycle
            wins[action, beaten] += margin
            wins[beaten, action] -= margin
        probs = nash_policy(wins)
        sum_to_one(probs)
        agree(probs, probs.clamp(min=0), "a probability is below 0")
        against = wins @ probs
        agree(
            against,
            against.clamp(max=0.5),
            "against your mixture an action wins more than half the time",
        )


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


def _nash_by_softmax(wins):
    """A softmax is taken of the margins: divide them by their sum."""
    return torch.softmax(torch.stack([wins[1, 2], wins[2, 0], wins[0, 1]]) - 0.5, 0)


def _nash_as_uniform(wins):
    """This plays all three alike, which is right only where the three margins are equal."""
    return torch.full((3,), 1 / 3)


EXERCISES = (
    Exercise(
        "11.1",
        cases=((SHOWN, 0.2), (SHOWN, 0.05)),
        judge=judge_fitted_margin,
        mistakes=(
            _margin_of_the_labels,
            _margin_flipped_again,
            _margin_not_rescaled,
            _margin_as_probability,
            _margin_rescaled_once,
            _margin_divided,
            _margin_of_log_p,
            _margin_as_difference,
        ),
        shape=lambda shown, flip_rate: shown.shape,
    ),
    Exercise(
        "11.2",
        cases=((REF, WINS, 0.5), (REF[:3] / 0.9, WINS[:3, :3], 0.1)),
        judge=judge_ipo_policy,
        mistakes=(
            _policy_without_reference,
            _policy_of_defeats,
            _policy_of_sums,
            _policy_without_itself,
            _policy_of_log_odds,
            _policy_at_half,
            _policy_against_reference,
            _policy_of_mean_log_odds,
        ),
        shape=lambda ref_probs, wins, beta: ref_probs.shape,
    ),
    Exercise(
        "11.4",
        cases=((CYCLE,), (ANOTHER,), (ANOTHER.T.contiguous(),)),
        judge=judge_nash_policy,
        mistakes=(
            _nash_by_own_margin,
            _nash_by_own_defeat,
            _nash_by_totals,
            _nash_as_one_action,
            _nash_of_probabilities,
            _nash_by_softmax,
            _nash_as_uniform,
        ),
        shape=lambda wins: [3],
    ),
)

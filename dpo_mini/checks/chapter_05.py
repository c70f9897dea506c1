"""Chapter 05: watch Z cancel."""

import torch

from dpo_mini.checks import Exercise

REF = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, -0.4, 0.8], [2.2, 0.9, 1.6, 0.4]], dtype=torch.float64)
LOGRATIOS = torch.tensor([0.9, -0.3, 0.4, -1.1], dtype=torch.float64)
SCORES = torch.tensor([1.5, 0.2, -0.6, 0.7], dtype=torch.float64)


def missing_margin(ref_probs, rewards, beta):
    """5.1: beta [log Z(x0) - log Z(x1)] from tables `[2, Y]`."""
    z = (ref_probs * torch.exp(rewards / beta)).sum(1)
    return beta * torch.log(z[0] / z[1])


def _margin_without_beta(ref_probs, rewards, beta):
    """Beta is missing before log Z: this is in nats, not in units of reward."""
    return missing_margin(ref_probs, rewards, beta) / beta


def _margin_turned_round(ref_probs, rewards, beta):
    """The sign is turned round: a prompt with a large Z has implied rewards that are too low."""
    return -missing_margin(ref_probs, rewards, beta)


def _margin_of_z(ref_probs, rewards, beta):
    """The logarithm is missing: what stays behind is a difference of log Z, not of Z."""
    z = (ref_probs * torch.exp(rewards / beta)).sum(1)
    return beta * (z[0] - z[1])


def _margin_of_means(ref_probs, rewards, beta):
    """This is the difference of mean rewards under the reference: beta log Z is larger than the
    mean (Jensen), and by how much depends on the prompt.
    """
    means = (ref_probs * rewards).sum(1)
    return means[0] - means[1]


def _margin_at_beta_one(ref_probs, rewards, beta):
    """The reward inside Z is not divided by beta."""
    z = (ref_probs * torch.exp(rewards)).sum(1)
    return beta * torch.log(z[0] / z[1])


def ranking_logp(logratios, beta):
    """5.2: Plackett-Luce on beta log-ratios `[K]`, best first."""
    weights = torch.exp(beta * logratios)
    left = weights.flip(0).cumsum(0).flip(0)  # the weight of an answer and of all below it
    return torch.log(weights / left).sum()


def _ranking_of_neighbours(logratios, beta):
    """This multiplies the pairs of neighbours: a factor compares with all that are left, not with
    the next one only.
    """
    return torch.sigmoid(beta * (logratios[:-1] - logratios[1:])).log().sum()


def _ranking_of_all_pairs(logratios, beta):
    """This multiplies all pairs: the products over all rankings do not sum to 1."""
    gaps = beta * (logratios[:, None] - logratios[None, :])
    return torch.sigmoid(gaps).log().triu(1).sum()


def _ranking_with_replacement(logratios, beta):
    """Answers that are already placed still stand in the denominators: each factor chooses among
    those that are left.
    """
    return torch.log_softmax(beta * logratios, 0).sum()


def _ranking_without_beta(logratios, beta):
    """Beta is missing: the implied reward is beta times the log-ratio."""
    return ranking_logp(logratios, 1.0)


def _ranking_upside_down(logratios, beta):
    """The ranking is read from worst to best: unlike a pair's, its probability is not that of the
    mirror image.
    """
    return ranking_logp(logratios.flip(0), beta)


def best_value(logratios, scores, beta):
    """5.3: the mean over answers of score minus implied reward."""
    return scores.mean() - beta * logratios.mean()


def _value_of_scores(logratios, scores, beta):
    """This is the mean score: V takes up what the scores have and the implied rewards lack."""
    return scores.mean()


def _value_turned_round(logratios, scores, beta):
    """The sign is turned round: V is added to the implied reward to give the score."""
    return -best_value(logratios, scores, beta)


def _value_without_beta(logratios, scores, beta):
    """Beta is missing: the implied reward is beta times the log-ratio."""
    return best_value(logratios, scores, 1.0)


def _value_not_averaged(logratios, scores, beta):
    """This is a sum over answers: the minimum of a squared error is a mean."""
    return best_value(logratios, scores, beta) * len(scores)


EXERCISES = (
    Exercise(
        "5.1",
        cases=((REF, REWARDS, 0.5), (REF, REWARDS.flip(0), 2.0)),
        answer=missing_margin,
        mistakes=(
            _margin_without_beta,
            _margin_turned_round,
            _margin_of_z,
            _margin_of_means,
            _margin_at_beta_one,
        ),
    ),
    Exercise(
        "5.2",
        cases=((LOGRATIOS, 0.5), (LOGRATIOS[:3], 2.0)),
        answer=ranking_logp,
        mistakes=(
            _ranking_of_neighbours,
            _ranking_of_all_pairs,
            _ranking_with_replacement,
            _ranking_without_beta,
            _ranking_upside_down,
        ),
    ),
    Exercise(
        "5.3",
        cases=((LOGRATIOS, SCORES, 0.5), (LOGRATIOS[1:], SCORES[1:], 2.0)),
        answer=best_value,
        mistakes=(
            _value_of_scores,
            _value_turned_round,
            _value_without_beta,
            _value_not_averaged,
        ),
    ),
)

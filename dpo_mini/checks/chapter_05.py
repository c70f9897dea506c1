"""Chapter 05: watch Z cancel."""

from itertools import permutations

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, other_instances
from dpo_mini.checks.theorems import implied_rewards, no_slope, optimum, sum_to_one

REF = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
REWARDS = torch.tensor([[1.0, 0.2, -0.4, 0.8], [2.2, 0.9, 1.6, 0.4]], dtype=torch.float64)
LOGRATIOS = torch.tensor([0.9, -0.3, 0.4, -1.1], dtype=torch.float64)
SCORES = torch.tensor([1.5, 0.2, -0.6, 0.7], dtype=torch.float64)


def judge_missing_margin(missing_margin):
    """5.1: with it every implied margin across the prompts is that of the known rewards."""
    for ref_probs, rewards, beta in other_instances(seed=1):
        implied = implied_rewards(optimum(ref_probs, rewards, beta), ref_probs, beta)
        missing = missing_margin(ref_probs, rewards, beta)
        agree(
            implied[0][:, None] - implied[1] + missing,
            rewards[0][:, None] - rewards[1],
            "added to the implied margins across prompts, it does not give those of the rewards",
        )


def _partition_functions(ref_probs, rewards, beta):
    return (ref_probs * torch.exp(rewards / beta)).sum(1)


def _margin_without_beta(ref_probs, rewards, beta):
    """Beta is missing before log Z: this is in nats, not in units of reward."""
    z = _partition_functions(ref_probs, rewards, beta)
    return torch.log(z[0] / z[1])


def _margin_turned_round(ref_probs, rewards, beta):
    """The sign is reversed: a prompt with a large Z has implied rewards that are too low."""
    z = _partition_functions(ref_probs, rewards, beta)
    return beta * torch.log(z[1] / z[0])


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


def _margin_without_reference(ref_probs, rewards, beta):
    """The reference is missing: Z weighs each answer by its probability there."""
    log_z = torch.logsumexp(rewards / beta, 1)
    return beta * (log_z[0] - log_z[1])


def _margin_added(ref_probs, rewards, beta):
    """The two constants are added: a margin is a difference, and so is what it lacks."""
    return beta * torch.log(_partition_functions(ref_probs, rewards, beta)).sum()


def _margin_of_the_first(ref_probs, rewards, beta):
    """This is what prompt 0 lacks: the answer to prompt 1 lacks something too."""
    return beta * torch.log(_partition_functions(ref_probs, rewards, beta)[0])


def _margin_as_ratio(ref_probs, rewards, beta):
    """One log Z is divided by the other: rewards, and what they lack, differ."""
    log_z = torch.log(_partition_functions(ref_probs, rewards, beta))
    return beta * log_z[0] / log_z[1]


def _margin_over_beta(ref_probs, rewards, beta):
    """log Z is divided by beta: to have a unit of reward, nats are multiplied."""
    z = _partition_functions(ref_probs, rewards, beta)
    return torch.log(z[0] / z[1]) / beta


def _margin_over_prompts(ref_probs, rewards, beta):
    """The sum runs over prompts: each prompt has a Z, a sum over its answers."""
    z = (ref_probs * torch.exp(rewards / beta)).sum(0)
    return beta * torch.log(z[0] / z[1])


def _margin_reversed_in_nats(ref_probs, rewards, beta):
    """Two things: the sign is reversed, and beta is missing before log Z."""
    z = _partition_functions(ref_probs, rewards, beta)
    return torch.log(z[1] / z[0])


def _margin_of_optimal_means(ref_probs, rewards, beta):
    """This is the difference of the optima's mean rewards: beta log Z is their J, after the KL."""
    weights = ref_probs * torch.exp(rewards / beta)
    means = (weights * rewards).sum(1) / weights.sum(1)
    return means[0] - means[1]


def _margin_implied(ref_probs, rewards, beta):
    """This is an implied margin itself: what does it lack to the true one?"""
    z = _partition_functions(ref_probs, rewards, beta)
    return rewards[0, 0] - rewards[1, 0] - beta * torch.log(z[0] / z[1])


def _margin_of_the_best(ref_probs, rewards, beta):
    """This is the difference of the best rewards: beta log Z is a soft maximum, below the best."""
    best = rewards.max(1).values
    return best[0] - best[1]


def judge_ranking_logp(ranking_logp):
    """5.2: all rankings, the first place, and what a place leaves to the ones after it."""
    for _, (logratios, _), beta in other_instances(seed=2):
        wins = torch.softmax(beta * logratios, 0)
        firsts, n_answers = torch.zeros_like(wins), len(wins)
        for order in map(list, permutations(range(n_answers))):
            logp = ranking_logp(logratios[order], beta)
            firsts[order[0]] += logp.exp()
            if order[1:] == sorted(order[1:]):  # one order of the rest is enough
                head, turned = order[0], [order[0], *order[:0:-1]]
                agree(
                    logp - ranking_logp(logratios[turned], beta),
                    ranking_logp(logratios[order[1:]], beta)
                    - ranking_logp(logratios[turned[1:]], beta),
                    f"who comes after the first, here {head}, depends on who is first",
                )
        sum_to_one(firsts, "the probabilities of all rankings do not sum to 1")
        agree(firsts, wins, "over all rankings the first place is no softmax of implied rewards")


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


def _placed(weights):
    left = weights.flip(0).cumsum(0).flip(0)  # the weight of an answer and of all below it
    return torch.log(weights / left).sum()


def _ranking_without_beta(logratios, beta):
    """Beta is missing: the implied reward is beta times the log-ratio."""
    return _placed(torch.exp(logratios))


def _ranking_upside_down(logratios, beta):
    """The ranking is read from worst to best: unlike a pair's, its probability is not that of the
    mirror image.
    """
    return _placed(torch.exp(beta * logratios.flip(0)))


def _ranking_as_probability(logratios, beta):
    """This is the probability of the ranking: its logarithm is asked for."""
    return torch.exp(_placed(torch.exp(beta * logratios)))


def _ranking_sorted(logratios, beta):
    """You sorted the log-ratios: their order is the ranking, and need not be the policy's."""
    return _placed(torch.exp(beta * logratios.sort(descending=True).values))


def _ranking_sorted_upwards(logratios, beta):
    """You sorted the log-ratios, smallest first: their order is the ranking, best first."""
    return _placed(torch.exp(beta * logratios.sort().values))


def _ranking_of_the_first(logratios, beta):
    """This is the first place alone: the places after it have probabilities too."""
    return torch.log_softmax(beta * logratios, 0)[0]


def _ranking_without_the_first(logratios, beta):
    """The first place is missing: it is won among all."""
    return _placed(torch.exp(beta * logratios[1:]))


def _ranking_cut_short(logratios, beta):
    """You stop a place too early: the last two answers still compete."""
    weights = torch.exp(beta * logratios)
    left = weights.flip(0).cumsum(0).flip(0)
    return torch.log(weights / left)[:-2].sum()


def _ranking_against_the_rest(logratios, beta):
    """The denominators leave out the answer itself: that gives odds, not a probability."""
    implied = beta * logratios
    return sum(implied[k] - implied[k + 1 :].logsumexp(0) for k in range(len(implied) - 1))


def _ranking_of_the_winner(logratios, beta):
    """This compares the first with each of the others: who is second is left open."""
    return torch.sigmoid(beta * (logratios[0] - logratios[1:])).log().sum()


def _ranking_of_the_ends(logratios, beta):
    """This compares the best with the worst: the places between them count too."""
    return torch.sigmoid(beta * (logratios[0] - logratios[-1])).log()


def _ranking_without_exponential(logratios, beta):
    """The exponential is missing: shares are of e to the power of the implied reward."""
    return _placed(beta * logratios)


def _ranking_beta_outside(logratios, beta):
    """Beta multiplies the whole: it multiplies each log-ratio, inside the softmax."""
    return beta * _placed(torch.exp(logratios))


def judge_best_value(best_value):
    """5.3: the squared error, a parabola in V, has slope 0 there."""
    for _, (logratios, scores), beta in other_instances(seed=3):
        value = best_value(logratios, scores, beta).requires_grad_()
        error = (scores - beta * logratios - value).pow(2).sum()
        no_slope(error, value, "another V has a smaller squared error: its slope is not 0")


def _value_of_scores(logratios, scores, beta):
    """This is the mean score: V takes up what the scores have and the implied rewards lack."""
    return scores.mean()


def _value_turned_round(logratios, scores, beta):
    """The sign is reversed: V is added to the implied reward to give the score."""
    return (beta * logratios - scores).mean()


def _value_without_beta(logratios, scores, beta):
    """Beta is missing: the implied reward is beta times the log-ratio."""
    return (scores - logratios).mean()


def _value_not_averaged(logratios, scores, beta):
    """This is a sum over answers: the minimum of a squared error is a mean."""
    return (scores - beta * logratios).sum()


def _value_of_the_middle(logratios, scores, beta):
    """This is the median: it minimises distances, not their squares."""
    return (scores - beta * logratios).median()


def _value_beta_on_scores(logratios, scores, beta):
    """Beta multiplies the scores as well: they are in units of reward already."""
    return beta * (scores - logratios).mean()


def _value_as_the_loss(logratios, scores, beta):
    """This is the squared error that is left at the minimum: where is the minimum?"""
    return (scores - beta * logratios).var(correction=0)


def _value_weighted(logratios, scores, beta):
    """The answers are weighted by their ratios: here all count alike."""
    return torch.softmax(logratios, 0) @ (scores - beta * logratios)


EXERCISES = (
    Exercise(
        "5.1",
        cases=((REF, REWARDS, 0.5), (REF, REWARDS.flip(0), 2.0)),
        judge=judge_missing_margin,
        mistakes=(
            _margin_without_beta,
            _margin_turned_round,
            _margin_of_z,
            _margin_of_means,
            _margin_at_beta_one,
            _margin_without_reference,
            _margin_added,
            _margin_of_the_first,
            _margin_as_ratio,
            _margin_over_beta,
            _margin_over_prompts,
            _margin_reversed_in_nats,
            _margin_of_optimal_means,
            _margin_implied,
            _margin_of_the_best,
        ),
    ),
    Exercise(
        "5.2",
        cases=((LOGRATIOS, 0.5), (LOGRATIOS[:3], 2.0)),
        judge=judge_ranking_logp,
        mistakes=(
            _ranking_of_neighbours,
            _ranking_of_all_pairs,
            _ranking_with_replacement,
            _ranking_without_beta,
            _ranking_upside_down,
            _ranking_as_probability,
            _ranking_sorted,
            _ranking_sorted_upwards,
            _ranking_of_the_first,
            _ranking_without_the_first,
            _ranking_cut_short,
            _ranking_against_the_rest,
            _ranking_of_the_winner,
            _ranking_of_the_ends,
            _ranking_without_exponential,
            _ranking_beta_outside,
        ),
    ),
    Exercise(
        "5.3",
        cases=((LOGRATIOS, SCORES, 0.5), (LOGRATIOS[1:], SCORES[1:], 2.0)),
        judge=judge_best_value,
        mistakes=(
            _value_of_scores,
            _value_turned_round,
            _value_without_beta,
            _value_not_averaged,
            _value_of_the_middle,
            _value_beta_on_scores,
            _value_as_the_loss,
            _value_weighted,
        ),
    ),
)

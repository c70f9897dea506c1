"""Plausible wrong answers to the exercises of chapter 05, and a word of each one's sentence."""

import torch
from torch.nn.functional import logsigmoid


def log_partitions(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).logsumexp(1)


def margin_in_nats(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, beta)
    return log_z[0] - log_z[1]


def margin_of_the_second_prompt(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, beta)
    return beta * (log_z[1] - log_z[0])


def margin_without_a_logarithm(ref_probs, rewards, beta):
    z = log_partitions(ref_probs, rewards, beta).exp()
    return beta * z[0] - beta * z[1]


def margin_of_expected_rewards(ref_probs, rewards, beta):
    return ref_probs[0] @ rewards[0] - ref_probs[1] @ rewards[1]


def margin_whose_z_forgets_beta(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, 1.0)
    return beta * (log_z[0] - log_z[1])


def ranking_by_neighbours(logratios, beta):
    return sum(
        logsigmoid(beta * logratios[k] - beta * logratios[k + 1]) for k in range(len(logratios) - 1)
    )


def ranking_by_pairs(logratios, beta):
    pairs = torch.combinations(beta * logratios)
    return logsigmoid(pairs[:, 0] - pairs[:, 1]).sum()


def ranking_that_keeps_the_placed(logratios, beta):
    implied = beta * logratios
    return (implied - implied.logsumexp(0)).sum()


def ranking_in_nats(logratios, beta):
    return sum(logratios[k] - logratios[k:].logsumexp(0) for k in range(len(logratios)))


def ranking_from_the_worst(logratios, beta):
    implied = beta * logratios
    return sum(implied[k] - implied[: k + 1].logsumexp(0) for k in range(len(implied)))


def value_that_forgets_the_policy(logratios, scores, beta):
    return scores.sum() / len(scores)


def value_with_the_wrong_sign(logratios, scores, beta):
    return (beta * logratios - scores).mean()


def value_in_nats(logratios, scores, beta):
    return (scores - logratios).mean()


def value_that_is_a_sum(logratios, scores, beta):
    return (scores - beta * logratios).sum()


def plackett_luce(x):
    return sum(x[k] - x[k:].logsumexp(0) for k in range(len(x)))


def margin_without_reference(ref_probs, rewards, beta):
    log_z = (rewards / beta).logsumexp(1)
    return beta * (log_z[0] - log_z[1])


def margin_added(ref_probs, rewards, beta):
    return beta * log_partitions(ref_probs, rewards, beta).sum()


def margin_of_the_first(ref_probs, rewards, beta):
    return beta * log_partitions(ref_probs, rewards, beta)[0]


def margin_as_ratio(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, beta)
    return beta * log_z[0] / log_z[1]


def margin_over_beta(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, beta)
    return (log_z[0] - log_z[1]) / beta


def margin_over_prompts(ref_probs, rewards, beta):
    log_z = (ref_probs.log() + rewards / beta).logsumexp(0)
    return beta * (log_z[0] - log_z[1])


def margin_reversed_in_nats(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, beta)
    return log_z[1] - log_z[0]


def margin_of_optimal_means(ref_probs, rewards, beta):
    means = ((ref_probs.log() + rewards / beta).softmax(1) * rewards).sum(1)
    return means[0] - means[1]


def margin_implied(ref_probs, rewards, beta):
    log_z = log_partitions(ref_probs, rewards, beta)
    return (rewards[0, 0] - beta * log_z[0]) - (rewards[1, 0] - beta * log_z[1])


def margin_of_the_best(ref_probs, rewards, beta):
    return rewards[0].max() - rewards[1].max()


def ranking_as_probability(logratios, beta):
    return plackett_luce(beta * logratios).exp()


def ranking_sorted(logratios, beta):
    return plackett_luce((beta * logratios).sort(descending=True).values)


def ranking_sorted_upwards(logratios, beta):
    return plackett_luce((beta * logratios).sort().values)


def ranking_of_the_first(logratios, beta):
    return (beta * logratios).log_softmax(0)[0]


def ranking_without_the_first(logratios, beta):
    return plackett_luce(beta * logratios[1:])


def ranking_cut_short(logratios, beta):
    implied = beta * logratios
    return sum(implied[k] - implied[k:].logsumexp(0) for k in range(len(implied) - 2))


def ranking_against_the_rest(logratios, beta):
    implied = beta * logratios
    return sum(implied[k] - implied[k + 1 :].logsumexp(0) for k in range(len(implied) - 1))


def ranking_of_the_winner(logratios, beta):
    return logsigmoid(beta * (logratios[0] - logratios[1:])).sum()


def ranking_of_the_ends(logratios, beta):
    return logsigmoid(beta * (logratios[0] - logratios[-1]))


def ranking_without_exponential(logratios, beta):
    implied = beta * logratios
    return sum((implied[k] / implied[k:].sum()).log() for k in range(len(implied)))


def ranking_beta_outside(logratios, beta):
    return beta * plackett_luce(logratios)


def value_of_the_middle(logratios, scores, beta):
    return (scores - beta * logratios).median()


def value_beta_on_scores(logratios, scores, beta):
    return beta * (scores - logratios).mean()


def value_as_the_loss(logratios, scores, beta):
    return (scores - beta * logratios).var(correction=0)


def value_weighted(logratios, scores, beta):
    return logratios.softmax(0) @ (scores - beta * logratios)


MISTAKES = {
    "5.1": {
        "in nats": margin_in_nats,
        "reversed": margin_of_the_second_prompt,
        "logarithm is missing": margin_without_a_logarithm,
        "Jensen": margin_of_expected_rewards,
        "not divided by beta": margin_whose_z_forgets_beta,
        "The reference is missing": margin_without_reference,
        "The two constants are added": margin_added,
        "This is what prompt 0 lacks": margin_of_the_first,
        "One log Z is divided by the other": margin_as_ratio,
        "log Z is divided by beta": margin_over_beta,
        "The sum runs over prompts": margin_over_prompts,
        "the sign is reversed, and beta is missing": margin_reversed_in_nats,
        "This is the difference of the optima's mean rewards": margin_of_optimal_means,
        "This is an implied margin itself": margin_implied,
        "This is the difference of the best rewards": margin_of_the_best,
    },
    "5.2": {
        "neighbours": ranking_by_neighbours,
        "multiplies all pairs": ranking_by_pairs,
        "already placed": ranking_that_keeps_the_placed,
        "Beta is missing": ranking_in_nats,
        "worst to best": ranking_from_the_worst,
        "This is the probability of the ranking": ranking_as_probability,
        "need not be the policy's": ranking_sorted,
        "You sorted the log-ratios, smallest first": ranking_sorted_upwards,
        "This is the first place alone": ranking_of_the_first,
        "The first place is missing": ranking_without_the_first,
        "You stop a place too early": ranking_cut_short,
        "The denominators leave out the answer itself": ranking_against_the_rest,
        "This compares the first with each of the others": ranking_of_the_winner,
        "This compares the best with the worst": ranking_of_the_ends,
        "The exponential is missing": ranking_without_exponential,
        "Beta multiplies the whole": ranking_beta_outside,
    },
    "5.3": {
        "mean score": value_that_forgets_the_policy,
        "reversed": value_with_the_wrong_sign,
        "Beta is missing": value_in_nats,
        "is a sum over answers": value_that_is_a_sum,
        "This is the median": value_of_the_middle,
        "Beta multiplies the scores as well": value_beta_on_scores,
        "This is the squared error that is left at the minimum": value_as_the_loss,
        "The answers are weighted by their ratios": value_weighted,
    },
}

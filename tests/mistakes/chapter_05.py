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


MISTAKES = {
    "5.1": {
        "in nats": margin_in_nats,
        "reversed": margin_of_the_second_prompt,
        "logarithm is missing": margin_without_a_logarithm,
        "Jensen": margin_of_expected_rewards,
        "not divided by beta": margin_whose_z_forgets_beta,
    },
    "5.2": {
        "neighbours": ranking_by_neighbours,
        "multiplies all pairs": ranking_by_pairs,
        "already placed": ranking_that_keeps_the_placed,
        "Beta is missing": ranking_in_nats,
        "worst to best": ranking_from_the_worst,
    },
    "5.3": {
        "mean score": value_that_forgets_the_policy,
        "reversed": value_with_the_wrong_sign,
        "Beta is missing": value_in_nats,
        "is a sum over answers": value_that_is_a_sum,
    },
}

"""Plausible wrong answers to the exercises of chapter 06, and words of the sentence each gets."""

import math

import torch
from torch.nn.functional import logsigmoid, softplus


def dpo_on_probabilities_alone(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -logsigmoid(beta * (chosen - rejected))


def dpo_in_nats(chosen, rejected, ref_chosen, ref_rejected, beta):
    return softplus((ref_chosen - chosen) - (ref_rejected - rejected))


def dpo_that_prefers_the_loser(chosen, rejected, ref_chosen, ref_rejected, beta):
    return softplus(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def dpo_without_a_logarithm(chosen, rejected, ref_chosen, ref_rejected, beta):
    return torch.sigmoid(beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected))


def dpo_by_the_formula(chosen, rejected, ref_chosen, ref_rejected, beta):
    logit = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return (1 / (1 + (-logit).exp())).log().neg()


def dpo_with_the_reference_added(chosen, rejected, ref_chosen, ref_rejected, beta):
    return softplus(-beta * (chosen + ref_chosen - rejected - ref_rejected))


def pushed(weights, logps, winners, losers):
    """The mean over pairs of `weights`: minus at the winner, plus at the loser."""
    gradient = torch.zeros_like(logps)
    for weight, w, l in zip(weights, winners.tolist(), losers.tolist(), strict=True):  # noqa: E741
        gradient[w] -= weight / len(winners)
        gradient[l] += weight / len(winners)
    return gradient


def log_odds(logps, ref_logps, winners, losers):
    return (logps - ref_logps)[winners] - (logps - ref_logps)[losers]


def gradient_of_equal_pushes(logps, ref_logps, winners, losers, beta):
    return pushed([beta] * len(winners), logps, winners, losers)


def gradient_that_rewards_success(logps, ref_logps, winners, losers, beta):
    d = log_odds(logps, ref_logps, winners, losers)
    return pushed(beta / (1 + torch.exp(-beta * d)), logps, winners, losers)


def gradient_on_probabilities_alone(logps, ref_logps, winners, losers, beta):
    d = logps[winners] - logps[losers]
    return pushed(beta / (1 + torch.exp(beta * d)), logps, winners, losers)


def gradient_with_a_weight_in_nats(logps, ref_logps, winners, losers, beta):
    d = log_odds(logps, ref_logps, winners, losers)
    return pushed(beta / (1 + torch.exp(d)), logps, winners, losers)


def gradient_in_the_margin(logps, ref_logps, winners, losers, beta):
    d = log_odds(logps, ref_logps, winners, losers)
    return pushed(1 / (1 + torch.exp(beta * d)), logps, winners, losers)


def gradient_of_the_sum(logps, ref_logps, winners, losers, beta):
    d = log_odds(logps, ref_logps, winners, losers)
    return len(winners) * pushed(beta / (1 + torch.exp(beta * d)), logps, winners, losers)


def gradient_by_indexed_assignment(logps, ref_logps, winners, losers, beta):
    d = log_odds(logps, ref_logps, winners, losers)
    weights = beta / (1 + torch.exp(beta * d)) / len(winners)
    gradient = torch.zeros_like(logps)
    gradient[winners] -= weights
    gradient[losers] += weights
    return gradient


def gradient_of_the_chosen_alone(logps, ref_logps, winners, losers, beta):
    weights = beta / (1 + torch.exp(beta * log_odds(logps, ref_logps, winners, losers)))
    eye = torch.eye(len(logps), dtype=logps.dtype)
    return (weights[:, None] * (logps.exp() - eye[winners])).mean(0)


def sum_up_to_the_end(token_logps, tokens, end_token):
    return torch.where(tokens == end_token, 0.0, token_logps).sum(-1)


def sum_of_everything(token_logps, tokens, end_token):
    return torch.stack([row.sum() for row in token_logps])


def mean_of_what_counts(token_logps, tokens, end_token):
    means = []
    for logps, row in zip(token_logps, tokens.tolist(), strict=True):
        length = row.index(end_token) + 1 if end_token in row else len(row)
        means.append(logps[:length].mean())
    return torch.stack(means)


def sum_of_one_too_many(token_logps, tokens, end_token):
    sums = []
    for logps, row in zip(token_logps, tokens.tolist(), strict=True):
        length = row.index(end_token) + 2 if end_token in row else len(row)
        sums.append(logps[:length].sum())
    return torch.stack(sums)


def error_of_a_proportion(share, n, beta):
    return math.sqrt(share * (1 - share)) / math.sqrt(n)


def error_without_beta(share, n, beta):
    return 1 / math.sqrt(n * share * (1 - share))


def variance_of_the_margin(share, n, beta):
    return 1 / (n * beta * beta * share * (1 - share))


def error_of_a_single_label(share, n, beta):
    return 1 / (beta * math.sqrt(share - share**2))


def error_times_beta(share, n, beta):
    return beta / math.sqrt(n * share * (1 - share))


def dpo_margin(chosen, rejected, ref_chosen, ref_rejected, beta):
    return beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)


def dpo_beta_outside(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -beta * logsigmoid(chosen - ref_chosen - rejected + ref_rejected)


def dpo_each_alone(chosen, rejected, ref_chosen, ref_rejected, beta):
    return -logsigmoid(beta * (chosen - ref_chosen)) - logsigmoid(-beta * (rejected - ref_rejected))


def counted(tokens, end_token):
    is_end = (tokens == end_token).long()
    return is_end.cumsum(1) - is_end == 0


def logp_without_first(token_logps, tokens, end_token):
    return (token_logps * counted(tokens, end_token))[:, 1:].sum(1)


def logp_of_padding(token_logps, tokens, end_token):
    return (token_logps * ~counted(tokens, end_token)).sum(1)


def error_over_n(share, n, beta):
    return 1 / (n * beta * math.sqrt(share * (1 - share)))


def error_slope_forgotten(share, n, beta):
    return math.sqrt(share * (1 - share) / n) / beta


def error_slope_upside_down(share, n, beta):
    return share * (1 - share) * math.sqrt(share * (1 - share) / n) / beta


def error_without_root(share, n, beta):
    return 1 / (beta * n * share * (1 - share))


MISTAKES = {
    "6.1": {
        "reference is missing": dpo_on_probabilities_alone,
        "Beta is missing": dpo_in_nats,
        "have changed places": dpo_that_prefers_the_loser,
        "negative logarithm": dpo_without_a_logarithm,
        "logsigmoid or softplus": dpo_by_the_formula,
        "wrong sign": dpo_with_the_reference_added,
        "This is the margin": dpo_margin,
        "Beta multiplies the loss": dpo_beta_outside,
        "Each answer has a sigmoid of its own": dpo_each_alone,
    },
    "6.2": {
        "The weight is missing": gradient_of_equal_pushes,
        "The weight is upside down": gradient_that_rewards_success,
        "missing from the margin": gradient_on_probabilities_alone,
        "missing inside the weight": gradient_with_a_weight_in_nats,
        "missing outside the weight": gradient_in_the_margin,
        "a sum over pairs": gradient_of_the_sum,
        "index_add": gradient_by_indexed_assignment,
        "The loser is missing": gradient_of_the_chosen_alone,
    },
    "6.3": {
        "share of wins": error_of_a_proportion,
        "reward margin": error_without_beta,
        "variance": variance_of_the_margin,
        "number of labels": error_of_a_single_label,
        "wrong side": error_times_beta,
        "The number of labels has no root": error_over_n,
        "This is the share's standard error over beta": error_slope_forgotten,
        "The slope is upside down": error_slope_upside_down,
        "The root is missing": error_without_root,
    },
    "6.4": {
        "never learns to stop": sum_up_to_the_end,
        "padding is counted": sum_of_everything,
        "mean over tokens": mean_of_what_counts,
        "one place too far": sum_of_one_too_many,
        "The first token is left out": logp_without_first,
        "The mask is inverted": logp_of_padding,
    },
}

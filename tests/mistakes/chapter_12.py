"""Plausible wrong answers to the exercises of chapter 12, and a word of each one's sentence."""

import math

import torch


def ranks(n, first):
    return torch.arange(first, n + 1, dtype=torch.float64) / n


def ranks_by_the_integral(n, beta):
    return math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta))


def ranks_that_start_at_zero(n, beta):
    return (ranks(n - 1, 0) * (n - 1) / (n * beta)).exp().mean().log()


def ranks_among_others(n, beta):
    return (ranks(n, 0) / beta).logsumexp(0) - math.log(n + 1)


def ranks_summed(n, beta):
    return (ranks(n, 1) / beta).logsumexp(0)


def ranks_as_z(n, beta):
    return (ranks(n, 1) / beta).exp().mean()


def passes(p, n):
    counts = torch.arange(n + 1, dtype=torch.float64)
    rate = torch.tensor(p, dtype=torch.float64)
    return counts, torch.distributions.Binomial(n, rate).log_prob(counts).exp()


def value_of_the_expected_z(p, beta, n):
    counts, chances = passes(p, n)
    z = chances @ (1 - counts / n + counts / n * math.exp(1 / beta))
    return beta * z.log()


def value_less_the_first_correction(p, beta, n):
    z = 1 - p + p * math.exp(1 / beta)
    second_moment = 1 - p + p * math.exp(2 / beta)
    return beta * (math.log(z) - (second_moment / z**2 - 1) / (2 * n))


def value_in_nats(p, beta, n):
    counts, chances = passes(p, n)
    return chances @ (1 - counts / n + counts / n * math.exp(1 / beta)).log()


def value_as_mean_reward(p, beta, n):
    counts, chances = passes(p, n)
    return chances @ counts / n


def tilted(best, writer, errors, beta):
    weight = best / writer
    share = weight / (best @ weight)
    return best * (errors - (best @ errors) * share) / beta


def tilt_in_nats(best, writer, errors, beta):
    return beta * tilted(best, writer, errors, beta)


def tilt_the_other_way(best, writer, errors, beta):
    return tilted(best, writer, -errors, beta)


def tilt_by_bare_weights(best, writer, errors, beta):
    return best * errors / beta - best**2 / writer * (best @ errors) / beta


def tilt_of_the_optimum(best, writer, errors, beta):
    return best * errors / beta - best * (best * errors / beta).sum()


def tilt_of_every_reply_alone(best, writer, errors, beta):
    return (best / beta) * errors


def tilt_by_the_writers_mean(best, writer, errors, beta):
    weight = best / writer
    return best * (errors - (writer @ errors) * weight / (best @ weight)) / beta


def tilt_as_a_share(best, writer, errors, beta):
    return tilted(best, writer, errors, beta) / best


def ranks_averaged_first(n, beta):
    return ranks(n, 1).mean() / beta


def ranks_not_divided(n, beta):
    return (n * ranks(n, 1) / beta).exp().mean().log()


def ranks_of_n_plus_one(n, beta):
    return (ranks(n, 1) * n / (n + 1) / beta).exp().mean().log()


def value_orders_not_counted(p, beta, n):
    counts = torch.arange(n + 1, dtype=torch.float64)
    chances = p**counts * (1 - p) ** (n - counts)
    return beta * (chances @ torch.log1p(counts / n * math.expm1(1 / beta)))


def value_at_beta_one_inside(p, beta, n):
    return beta * value_in_nats(p, 1.0, n)


def value_of_sums(p, beta, n):
    counts, chances = passes(p, n)
    return beta * (chances @ (n - counts + counts * math.exp(1 / beta)).log())


def tilt_as_policy(best, writer, errors, beta):
    return best + tilted(best, writer, errors, beta)


MISTAKES = {
    "12.1": {
        "integral": ranks_by_the_integral,
        "begin at 0": ranks_that_start_at_zero,
        "fresh answer": ranks_among_others,
        "not averaged": ranks_summed,
        "logarithm is missing": ranks_as_z,
        "This is the mean rank over beta": ranks_averaged_first,
        "The ranks run from 1 to n here": ranks_not_divided,
        "The ranks are divided by n + 1": ranks_of_n_plus_one,
    },
    "12.2": {
        "V itself": value_of_the_expected_z,
        "delta method": value_less_the_first_correction,
        "in nats": value_in_nats,
        "mean reward": value_as_mean_reward,
        "The number of orders is missing": value_orders_not_counted,
        "Inside the exponential the reward is not divided by beta": value_at_beta_one_inside,
        "The draws are added up": value_of_sums,
    },
    "12.3": {
        "Beta is missing": tilt_in_nats,
        "reversed": tilt_the_other_way,
        "do not sum to zero": tilt_by_bare_weights,
        "if the scores were right": tilt_of_the_optimum,
        "no longer sum to 1": tilt_of_every_reply_alone,
        "under the writer": tilt_by_the_writers_mean,
        "relative change": tilt_as_a_share,
        "This is the policy after the change": tilt_as_policy,
    },
}

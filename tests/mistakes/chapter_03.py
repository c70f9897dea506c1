"""Plausible wrong answers to the exercises of chapter 03, and what each must be told."""

import math

import torch


def log_z_of_one_token_repeated(token_probs, token_rewards, beta, n_tokens):
    return (token_probs.log() + token_rewards * n_tokens / beta).logsumexp(0)


def log_z_without_the_length(token_probs, token_rewards, beta, n_tokens):
    return (token_probs.log() + token_rewards / beta).logsumexp(0)


def log_z_by_the_mean_reward(token_probs, token_rewards, beta, n_tokens):
    return token_probs @ token_rewards * n_tokens / beta


def log_z_of_a_uniform_count(token_probs, token_rewards, beta, n_tokens):
    return n_tokens * (token_rewards / beta).exp().sum().log()


def chi_squared(ref_probs, rewards, beta):
    optimum = (ref_probs.log() + rewards / beta).softmax(0)
    return (optimum.square() / ref_probs).sum() - 1


def draws_by_the_plain_error(ref_probs, rewards, beta, error):
    return chi_squared(ref_probs, rewards, beta) / error


def draws_for_an_absolute_error(ref_probs, rewards, beta, error):
    tilts = (rewards / beta).exp()
    mean = ref_probs @ tilts
    return (ref_probs @ tilts**2 - mean**2) / error**2


def draws_by_the_second_moment(ref_probs, rewards, beta, error):
    return (1 + chi_squared(ref_probs, rewards, beta)) / error**2


def draws_by_the_kl(ref_probs, rewards, beta, error):
    optimum = (ref_probs.log() + rewards / beta).softmax(0)
    return torch.sum(optimum * (optimum.log() - ref_probs.log())) / error**2


def count_that_gives_failures_nothing(log_z, beta, n_bits):
    return 2**n_bits * math.exp(log_z - 1 / beta)


def count_as_a_share(log_z, beta, n_bits):
    return (math.exp(log_z) - 1) / (math.exp(1 / beta) - 1)


def count_from_the_logarithm(log_z, beta, n_bits):
    return 2**n_bits * log_z / math.expm1(1 / beta)


def count_with_beta_upside_down(log_z, beta, n_bits):
    return 2**n_bits * math.expm1(log_z) / math.expm1(beta)


def count_that_weighs_a_solution_in_full(log_z, beta, n_bits):
    return 2**n_bits * math.expm1(log_z) * math.exp(-1 / beta)


def log_z(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).logsumexp(-1)


def sum_for_power(token_probs, token_rewards, beta, n_tokens):
    return (n_tokens * log_z(token_probs, token_rewards, beta).exp()).log()


def beta_outside(token_probs, token_rewards, beta, n_tokens):
    return n_tokens * log_z(token_probs, token_rewards, 1.0) / beta


def divided_by_z(ref_probs, rewards, beta, error):
    tilts = (rewards / beta).exp()
    z = ref_probs @ tilts
    return ref_probs @ (tilts - z) ** 2 / z / error**2


def reverse_chi(ref_probs, rewards, beta, error):
    optimum = (ref_probs.log() + rewards / beta).softmax(0)
    return ((ref_probs**2 / optimum).sum() - 1) / error**2


def rounded_up(ref_probs, rewards, beta, error):
    return (chi_squared(ref_probs, rewards, beta) / error**2).ceil()


def z_as_a_count(log_z, beta, n_bits):
    return (math.exp(log_z) - 2**n_bits) / math.expm1(1 / beta)


def one_taken_below_only(log_z, beta, n_bits):
    return math.exp(log_z) / math.expm1(1 / beta) * 2**n_bits


def powers_of_two(log_z, beta, n_bits):
    return (2**log_z - 1) / (2 ** (1 / beta) - 1) * 2**n_bits


def halves(drawn_rewards, beta):
    """The logarithm of the estimate, and the relative weights of the draws: their mean is 1."""
    scaled = drawn_rewards / beta
    log_z = scaled.logsumexp(0) - math.log(len(scaled))
    return log_z, (scaled - log_z).exp()


def mean_of_logs(drawn_rewards, beta):
    _, w = halves(drawn_rewards, beta)
    return torch.stack([drawn_rewards.mean() / beta, w.std() / len(w) ** 0.5])


def sum_of_draws(drawn_rewards, beta):
    log_z, w = halves(drawn_rewards, beta)
    return torch.stack([log_z + math.log(len(w)), w.std() / len(w) ** 0.5])


def error_of_one_draw(drawn_rewards, beta):
    log_z, w = halves(drawn_rewards, beta)
    return torch.stack([log_z, w.std()])


def error_over_n(drawn_rewards, beta):
    log_z, w = halves(drawn_rewards, beta)
    return torch.stack([log_z, w.std() / len(w)])


def error_of_the_exponent(drawn_rewards, beta):
    log_z, w = halves(drawn_rewards, beta)
    return torch.stack([log_z, drawn_rewards.std() / beta / len(w) ** 0.5])


def error_with_n(drawn_rewards, beta):
    log_z, w = halves(drawn_rewards, beta)
    return torch.stack([log_z, ((w - 1) ** 2).mean().sqrt() / len(w) ** 0.5])


def error_of_z(drawn_rewards, beta):
    tilts = (drawn_rewards / beta).exp()
    return torch.stack([tilts.mean().log(), (tilts.var() / len(tilts)).sqrt()])


def overflowing(drawn_rewards, beta):
    tilts = (drawn_rewards / beta).exp()
    return torch.stack([tilts.mean().log(), (tilts.var() / len(tilts)).sqrt() / tilts.mean()])


MISTAKES = {
    "3.1": {
        "one token said n times over": log_z_of_one_token_repeated,
        "a single token": log_z_without_the_length,
        "Jensen": log_z_by_the_mean_reward,
        "token probabilities are missing": log_z_of_a_uniform_count,
        "The factors of the places are added up": sum_for_power,
        "Beta divides the logarithm": beta_outside,
    },
    "3.2": {
        "four times the draws": draws_by_the_plain_error,
        "divide it by Z squared": draws_for_an_absolute_error,
        "mean is not taken off": draws_by_the_second_moment,
        "KL stands where": draws_by_the_kl,
        "The variance is divided by Z": divided_by_z,
        "The chi-squared is reversed": reverse_chi,
        "This is rounded": rounded_up,
    },
    "3.3": {
        "the logarithm inside the average": mean_of_logs,
        "Z is a mean": sum_of_draws,
        "that of a single draw": error_of_one_draw,
        "this is no variance": error_over_n,
        "the spread of r/beta": error_of_the_exponent,
        "use N - 1": error_with_n,
        "divide it by the estimate": error_of_z,
        "overflow": overflowing,
    },
    "3.5": {
        "reward 0 are forgotten": count_that_gives_failures_nothing,
        "share of solutions": count_as_a_share,
        "used where Z belongs": count_from_the_logarithm,
        "upside down": count_with_beta_upside_down,
        "their difference only": count_that_weighs_a_solution_in_full,
        "Z is taken for a sum over completions": z_as_a_count,
        "Z holds the failures too": one_taken_below_only,
        "These are powers of 2": powers_of_two,
    },
}

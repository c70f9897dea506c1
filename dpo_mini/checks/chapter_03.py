"""Chapter 03: the partition function."""

import math

import torch

from dpo_mini.checks import Exercise

PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
WIDER = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
WIDER_REWARDS = torch.tensor([2.0, 1.0, 0.0, 0.3], dtype=torch.float64)


def log_z_of_tokens(token_probs, token_rewards, beta, n_tokens):
    """3.1: log Z of `n_tokens` independent tokens, each with its own reward."""
    return n_tokens * torch.log((token_probs * torch.exp(token_rewards / beta)).sum())


def _reward_times_length(token_probs, token_rewards, beta, n_tokens):
    """The length multiplies the reward inside the sum: that is one token said n times over, where
    each place draws a token of its own.
    """
    return torch.log((token_probs * torch.exp(n_tokens * token_rewards / beta)).sum())


def _one_token(token_probs, token_rewards, beta, n_tokens):
    """This is log Z of a single token: every one of the n places has such a factor."""
    return log_z_of_tokens(token_probs, token_rewards, beta, 1)


def _mean_reward(token_probs, token_rewards, beta, n_tokens):
    """The logarithm of an average is not the average of the logarithm: this is E[r]/beta, which
    Jensen's inequality puts below log Z.
    """
    return n_tokens * (token_probs * token_rewards).sum() / beta


def _no_base(token_probs, token_rewards, beta, n_tokens):
    """The token probabilities are missing: the sum is over the reference, not a plain count."""
    return n_tokens * torch.logsumexp(token_rewards / beta, 0)


def draws_needed(ref_probs, rewards, beta, error):
    """3.2: draws from the reference for a relative standard deviation `error` of Z."""
    weights = torch.exp(rewards / beta)
    weights = weights / (ref_probs * weights).sum()
    return (ref_probs * (weights - 1) ** 2).sum() / error**2


def _error_not_squared(ref_probs, rewards, beta, error):
    """The error enters once where it should be squared: half the error costs four times the
    draws.
    """
    return draws_needed(ref_probs, rewards, beta, error) * error


def _absolute(ref_probs, rewards, beta, error):
    """This is the variance of exp(r/beta) itself: for a relative error divide it by Z squared."""
    weights = torch.exp(rewards / beta)
    z = (ref_probs * weights).sum()
    return (ref_probs * (weights - z) ** 2).sum() / error**2


def _second_moment(ref_probs, rewards, beta, error):
    """The mean is not taken off: chi-squared is the second moment of the weight minus 1."""
    return draws_needed(ref_probs, rewards, beta, error) + 1 / error**2


def _kl_for_chi(ref_probs, rewards, beta, error):
    """KL stands where chi-squared belongs: the variance is of the weight, not of its logarithm."""
    optimum = torch.softmax(ref_probs.log() + rewards / beta, 0)
    return (optimum * (optimum / ref_probs).log()).sum() / error**2


def count_solutions(log_z, beta, n_bits):
    """3.3: how many of 2^n_bits completions have reward 1, the rest having 0."""
    return (math.exp(log_z) - 1) / (math.exp(1 / beta) - 1) * 2**n_bits


def _failures_forgotten(log_z, beta, n_bits):
    """Completions with reward 0 are forgotten: each still adds exp(0) = 1 times its probability."""
    return math.exp(log_z) / math.exp(1 / beta) * 2**n_bits


def _a_share(log_z, beta, n_bits):
    """This is the share of solutions: the reference gives each completion 2^-n_bits."""
    return count_solutions(log_z, beta, 0)


def _log_for_z(log_z, beta, n_bits):
    """log Z is used where Z belongs."""
    return log_z / (math.exp(1 / beta) - 1) * 2**n_bits


def _beta_turned(log_z, beta, n_bits):
    """Beta is upside down: a solution weighs exp(1/beta)."""
    return count_solutions(log_z, 1 / beta, n_bits)


def _one_not_taken(log_z, beta, n_bits):
    """A solution adds exp(1/beta) where a failure adds 1: it raises Z by their difference only."""
    return (math.exp(log_z) - 1) / math.exp(1 / beta) * 2**n_bits


def _log_z_of(solutions: int, beta: float, n_bits: int) -> float:
    share = solutions / 2**n_bits
    return math.log(share * math.exp(1 / beta) + 1 - share)


EXERCISES = (
    Exercise(
        "3.1",
        cases=((PROBS, REWARDS, 0.5, 7), (WIDER, WIDER_REWARDS, 2.0, 3)),
        answer=log_z_of_tokens,
        mistakes=(_reward_times_length, _one_token, _mean_reward, _no_base),
    ),
    Exercise(
        "3.2",
        cases=((PROBS, REWARDS, 0.5, 0.1), (WIDER, WIDER_REWARDS, 2.0, 0.25)),
        answer=draws_needed,
        mistakes=(_error_not_squared, _absolute, _second_moment, _kl_for_chi),
    ),
    Exercise(
        "3.3",
        cases=((_log_z_of(37, 0.5, 8), 0.5, 8), (_log_z_of(5, 2.0, 10), 2.0, 10)),
        answer=count_solutions,
        mistakes=(_failures_forgotten, _a_share, _log_for_z, _beta_turned, _one_not_taken),
    ),
)

"""Solutions of chapter 03."""

import math

import torch


def log_z_of_tokens(token_probs, token_rewards, beta, n_tokens):
    """3.1: independent places make Z a product of equal factors."""
    return n_tokens * torch.logsumexp(
        token_probs.log() + token_rewards / beta, dim=0
    )


def draws_needed(ref_probs, rewards, beta, error):
    """3.2: chi-squared over N is the squared relative error."""
    optimum = torch.softmax(ref_probs.log() + rewards / beta, dim=0)
    chi_squared = (optimum**2 / ref_probs).sum() - 1
    return chi_squared / error**2


def estimate_log_z(drawn_rewards, beta):
    """3.3: the largest r/beta is taken out, so that nothing overflows."""
    scaled = drawn_rewards / beta
    largest = scaled.max()
    weights = torch.exp(scaled - largest)
    error = weights.std() / math.sqrt(len(weights)) / weights.mean()
    return torch.stack([largest + weights.mean().log(), error])


def count_solutions(log_z, beta, n_bits):
    """3.5: Z = 1 + (e^(1/beta) - 1) * share, solved for the share."""
    return math.expm1(log_z) / math.expm1(1 / beta) * 2**n_bits


SOLUTIONS = {
    "3.1": log_z_of_tokens,
    "3.2": draws_needed,
    "3.3": estimate_log_z,
    "3.5": count_solutions,
}

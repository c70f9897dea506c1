"""Solutions of chapter 12."""

import math

import torch


def log_z_of_ranks(n, beta):
    """12.1: the continuum's Z times x / (1 - e^-x), x = 1 / (n beta)."""
    x = 1 / (n * beta)
    continuum = math.log(beta * math.expm1(1 / beta))
    return continuum + math.log(x / -math.expm1(-x))


def expected_value(p, beta, n):
    """12.2: the number of passes is binomial; take each case's V-hat."""
    passes = torch.arange(n + 1, dtype=torch.float64)
    rate = torch.tensor(p, dtype=torch.float64)
    chances = torch.distributions.Binomial(n, rate).log_prob(passes).exp()
    share = passes / n
    return beta * chances @ torch.log(1 - share + share * math.exp(1 / beta))


def tilt(best, writer, errors, beta):
    """12.3: by the multiplier, the mean error under pi* over 1 + chi2."""
    one_plus_chi2 = (best**2 / writer).sum()
    multiplier = (best * errors).sum() / one_plus_chi2
    return best * (errors - multiplier * best / writer) / beta


SOLUTIONS = {
    "12.1": log_z_of_ranks,
    "12.2": expected_value,
    "12.3": tilt,
}

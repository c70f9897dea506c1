"""Chapter 11: keep Z when it does not cancel."""

import math

import torch

from dpo_mini.checks import Exercise

BEST = torch.tensor([0.7, 0.1, 0.15, 0.05], dtype=torch.float64)
WRITER = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def log_z_of_ranks(n, beta):
    """11.1: the logarithm of the geometric series of n equally likely ranks k/n, k = 1..n."""
    step = 1 / (n * beta)
    return step + math.log(math.expm1(1 / beta)) - math.log(n * math.expm1(step))


def _ranks_of_a_continuum(n, beta):
    """This is the integral, which knows no n: it is right for a continuum of scores only."""
    return math.log(beta * math.expm1(1 / beta))


def _ranks_from_zero(n, beta):
    """The ranks begin at 0: an answer that is one of the n is never below all of them."""
    return log_z_of_ranks(n, beta) - 1 / (n * beta)


def _ranks_of_a_fresh_answer(n, beta):
    """This averages the n + 1 ranks 0..n of a fresh answer; these answers are ranked among
    themselves.
    """
    both = 1 + n * math.exp(log_z_of_ranks(n, beta))
    return math.log(both / (n + 1))


def _ranks_not_averaged(n, beta):
    """The series is summed and not averaged: each rank has the probability 1/n."""
    return log_z_of_ranks(n, beta) + math.log(n)


def _ranks_without_a_logarithm(n, beta):
    """This is Z; the logarithm is missing."""
    return math.exp(log_z_of_ranks(n, beta))


def expected_value(p, beta, n):
    """11.2: the mean over a binomial number of passes of beta log(1 + k/n (e^(1/beta) - 1))."""
    total = 0.0
    for k in range(n + 1):
        chance = math.comb(n, k) * p**k * (1 - p) ** (n - k)
        total += chance * beta * math.log1p(k / n * math.expm1(1 / beta))
    return total


def _value_exact(p, beta, n):
    """This is V itself: the logarithm of a mean is not the mean of the logarithm."""
    return beta * math.log1p(p * math.expm1(1 / beta))


def _value_by_the_delta_method(p, beta, n):
    """This is the delta method, an approximation for large n: the numbers of passes can be
    enumerated.
    """
    boost = math.expm1(1 / beta)
    chi2 = p * (1 - p) * boost**2 / (1 + p * boost) ** 2
    return _value_exact(p, beta, n) - beta * chi2 / (2 * n)


def _value_in_nats(p, beta, n):
    """Beta is missing before the logarithm: this is in nats, not in units of reward."""
    return expected_value(p, beta, n) / beta


def _value_of_single_draws(p, beta, n):
    """This is the mean reward: the logarithm of each draw, or the exponential of their mean, undoes
    itself.
    """
    return p


def tilt(best, writer, error, beta):
    """11.3: best error / beta (w / (1 + chi2) - 1) with the weights w = best / writer."""
    weights = best / writer
    return best * error / beta * (weights / (best * weights).sum() - 1)


def _tilt_without_beta(best, writer, error, beta):
    """Beta is missing: an error of V, in reward, becomes an error of log-ratios, in nats."""
    return tilt(best, writer, error, 1.0)


def _tilt_turned_round(best, writer, error, beta):
    """The sign is turned round: with V too high, mass moves to where best is large against
    writer.
    """
    return -tilt(best, writer, error, beta)


def _tilt_not_normalised(best, writer, error, beta):
    """The weights are not divided by 1 + chi2: these changes do not sum to zero."""
    return best * error / beta * (best / writer - 1)


def _tilt_as_a_constant(best, writer, error, beta):
    """This lowers every log-ratio alike, and then the probabilities no longer sum to 1."""
    return -best * error / beta


def _tilt_relative(best, writer, error, beta):
    """This is the relative change, a factor best is missing: the change of the probability is
    wanted.
    """
    return tilt(best, writer, error, beta) / best


EXERCISES = (
    Exercise(
        "11.1",
        cases=((4, 0.5), (7, 2.0)),
        answer=log_z_of_ranks,
        mistakes=(
            _ranks_of_a_continuum,
            _ranks_from_zero,
            _ranks_of_a_fresh_answer,
            _ranks_not_averaged,
            _ranks_without_a_logarithm,
        ),
    ),
    Exercise(
        "11.2",
        cases=((0.3, 0.5, 4), (0.1, 2.0, 7)),
        answer=expected_value,
        mistakes=(
            _value_exact,
            _value_by_the_delta_method,
            _value_in_nats,
            _value_of_single_draws,
        ),
    ),
    Exercise(
        "11.3",
        cases=((BEST, WRITER, 0.01, 0.5), (BEST.flip(0), WRITER, -0.02, 2.0)),
        answer=tilt,
        mistakes=(
            _tilt_without_beta,
            _tilt_turned_round,
            _tilt_not_normalised,
            _tilt_as_a_constant,
            _tilt_relative,
        ),
    ),
)

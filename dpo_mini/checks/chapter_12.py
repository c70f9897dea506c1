"""Chapter 12: keep Z when it does not cancel."""

import math
from itertools import product

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, random_policies
from dpo_mini.checks.theorems import every_draw

BEST = torch.tensor([0.7, 0.1, 0.15, 0.05], dtype=torch.float64)
WRITER = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
ERRORS = torch.tensor([0.01, -0.02, 0.03, -0.005], dtype=torch.float64)


def judge_log_z_of_ranks(log_z_of_ranks):
    """12.1: with Z the optimum's probabilities of all the ranks sum to 1."""
    for n, beta in product((1, 2, 5, 12, 100), (0.1, 0.5, 3.0)):
        ranks = torch.arange(1, n + 1, dtype=torch.float64) / n
        log_probs = ranks / beta - math.log(n) - log_z_of_ranks(n, beta)
        agree(
            log_probs.logsumexp(0),
            0.0,
            "with your log Z the probabilities of the n answers at the optimum do not sum to 1: "
            "the logarithm of their sum is not 0",
        )


def _ranks_of_a_continuum(n, beta):
    """This is the integral, which knows no n: it is right for a continuum of scores only."""
    return math.log(beta * math.expm1(1 / beta))


def _ranks_from_zero(n, beta):
    """The ranks begin at 0: an answer that is one of the n is never below all of them."""
    return math.log(math.expm1(1 / beta) / math.expm1(1 / (n * beta)) / n)


def _ranks_of_a_fresh_answer(n, beta):
    """This averages the n + 1 ranks 0..n of a fresh answer; these answers are ranked among
    themselves.
    """
    return math.log(sum(math.exp(k / (n * beta)) for k in range(n + 1)) / (n + 1))


def _ranks_not_averaged(n, beta):
    """The series is summed and not averaged: each rank has the probability 1/n."""
    return math.log(sum(math.exp(k / (n * beta)) for k in range(1, n + 1)))


def _ranks_without_a_logarithm(n, beta):
    """This is Z; the logarithm is missing."""
    return sum(math.exp(k / (n * beta)) for k in range(1, n + 1)) / n


def _ranks_averaged_first(n, beta):
    """This is the mean rank over beta: the logarithm of a mean is above the mean of the logarithm
    (Jensen).
    """
    return (n + 1) / (2 * n * beta)


def _ranks_not_divided(n, beta):
    """The ranks run from 1 to n here: as scores they are divided by n."""
    return math.log(sum(math.exp(k / beta) for k in range(1, n + 1)) / n)


def _ranks_of_n_plus_one(n, beta):
    """The ranks are divided by n + 1: the best of n has rank n / n."""
    return math.log(sum(math.exp(k / ((n + 1) * beta)) for k in range(1, n + 1)) / n)


def judge_expected_value(expected_value):
    """12.2: the mean over every outcome of n draws."""
    for p, beta, n in ((0.3, 0.5, 1), (0.6, 2.0, 3), (0.05, 0.25, 5), (0.9, 1.25, 8)):
        rewards, chances = every_draw(torch.tensor([1 - p, p], dtype=torch.float64), n)
        values = beta * (torch.logsumexp(rewards.double() / beta, 1) - math.log(n))
        agree(
            expected_value(p, beta, n),
            chances @ values,
            "averaged over every outcome of the n draws, V-hat is another number",
        )


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
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    boost = math.expm1(1 / beta)
    return sum(chance * math.log1p(k / n * boost) for k, chance in enumerate(chances))


def _value_of_single_draws(p, beta, n):
    """This is the mean reward: the logarithm of each draw, or the exponential of their mean, undoes
    itself.
    """
    return p


def _value_orders_not_counted(p, beta, n):
    """The number of orders is missing: k passes in n draws come in many."""
    chances = [p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    boost = math.expm1(1 / beta)
    return beta * sum(chance * math.log1p(k / n * boost) for k, chance in enumerate(chances))


def _value_at_beta_one_inside(p, beta, n):
    """Inside the exponential the reward is not divided by beta."""
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    terms = (math.log1p(k / n * math.expm1(1)) for k in range(n + 1))
    return beta * sum(c * term for c, term in zip(chances, terms, strict=True))


def _value_of_sums(p, beta, n):
    """The draws are added up: V-hat is the logarithm of their mean."""
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    terms = (math.log(n + k * math.expm1(1 / beta)) for k in range(n + 1))
    return beta * sum(c * term for c, term in zip(chances, terms, strict=True))


def judge_tilt(tilt):
    """12.3: the changes sum to 0, and along them the regression stays stationary."""
    for n, beta in ((3, 0.5), (4, 2.0), (6, 1.25)):
        best, errors = draws(n, seed=n).softmax(0), 0.01 * draws(n, seed=n + 20)
        writer = random_policies(best, seed=n)
        moved = tilt(best, writer, errors, beta)
        agree(moved.sum(), 0.0, "your changes do not sum to 0, so the probabilities not to 1")
        agree(
            _drift_of_the_slope(100 * moved, best, writer, 100 * errors, beta),
            0.0,
            "moved along your changes, the policy does not stay at the lowest point of the "
            "regression: to first order its loss gets a slope",
        )


def _drift_of_the_slope(direction, best, writer, errors, beta):
    """How fast the regression's slope leaves 0 when scores err and the policy is moved, `[Y]`.

    The reward is V + beta log(best / ref) exactly, so the residual does not know the reference.
    """

    def slope(size):
        logits = (best + size * direction).log()
        residuals = beta * (best.log() - logits.log_softmax(0)) + size * errors
        loss = (writer * residuals**2).sum()
        return torch.autograd.grad(loss, logits, create_graph=True)[0]

    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.functional.jacobian(slope, at)


def _change(best, writer, errors, beta):
    """The change by the multiplier E[e] / (1 + chi2) of the constraint, `[Y]`."""
    multiplier = best @ errors / (best**2 / writer).sum()
    return best / beta * (errors - multiplier * best / writer)


def _tilt_without_beta(best, writer, errors, beta):
    """Beta is missing: an error of a score, in reward, becomes an error of log-ratios, in nats."""
    return _change(best, writer, errors, 1.0)


def _tilt_turned_round(best, writer, errors, beta):
    """The sign is reversed: a reply whose score is too high becomes likelier."""
    return -_change(best, writer, errors, beta)


def _tilt_not_normalised(best, writer, errors, beta):
    """The multiplier is not divided by 1 + chi2: these changes do not sum to zero."""
    return best / beta * (errors - (best @ errors) * best / writer)


def _tilt_of_the_optimum(best, writer, errors, beta):
    """This is how pi* itself would move if the scores were right: with V fixed the writer
    matters.
    """
    return best / beta * (errors - best @ errors)


def _tilt_without_the_sum(best, writer, errors, beta):
    """This follows each error, and then the probabilities no longer sum to 1."""
    return best * errors / beta


def _tilt_mean_under_the_writer(best, writer, errors, beta):
    """The mean error is taken under the writer: the constraint weighs it with pi*."""
    multiplier = writer @ errors / (best**2 / writer).sum()
    return best / beta * (errors - multiplier * best / writer)


def _tilt_relative(best, writer, errors, beta):
    """This is the relative change, a factor best is missing: the change of the probability is
    wanted.
    """
    return _change(best, writer, errors, beta) / best


def _tilt_as_policy(best, writer, errors, beta):
    """This is the policy after the change: the change alone is asked for."""
    return best + _change(best, writer, errors, beta)


EXERCISES = (
    Exercise(
        "12.1",
        cases=((4, 0.5), (7, 2.0)),
        judge=judge_log_z_of_ranks,
        mistakes=(
            _ranks_of_a_continuum,
            _ranks_from_zero,
            _ranks_of_a_fresh_answer,
            _ranks_not_averaged,
            _ranks_without_a_logarithm,
            _ranks_averaged_first,
            _ranks_not_divided,
            _ranks_of_n_plus_one,
        ),
    ),
    Exercise(
        "12.2",
        cases=((0.3, 0.5, 4), (0.1, 2.0, 7)),
        judge=judge_expected_value,
        mistakes=(
            _value_exact,
            _value_by_the_delta_method,
            _value_in_nats,
            _value_of_single_draws,
            _value_orders_not_counted,
            _value_at_beta_one_inside,
            _value_of_sums,
        ),
    ),
    Exercise(
        "12.3",
        cases=((BEST, WRITER, ERRORS, 0.5), (BEST.flip(0), WRITER, 2 * ERRORS, 2.0)),
        judge=judge_tilt,
        mistakes=(
            _tilt_without_beta,
            _tilt_turned_round,
            _tilt_not_normalised,
            _tilt_of_the_optimum,
            _tilt_without_the_sum,
            _tilt_mean_under_the_writer,
            _tilt_relative,
            _tilt_as_policy,
        ),
        shape=lambda best, writer, errors, beta: best.shape,
    ),
)

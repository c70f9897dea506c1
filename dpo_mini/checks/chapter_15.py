"""Chapter 15: see the same algebra elsewhere."""

from functools import cache

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, other_instances, random_policies
from dpo_mini.checks.theorems import objective, sum_to_one

GUESS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LIKELIHOOD = torch.tensor([0.02, 0.1, 0.3], dtype=torch.float64)
REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)


def judge_elbo_gap(elbo_gap):
    """15.1: none at the posterior, elsewhere what a convex function lies above its tangent."""
    for seed, n in enumerate((2, 3, 5)):
        prior, q = draws(2, n, seed=n).softmax(1)
        likelihood = draws(n, seed=seed).exp()
        joint = prior * likelihood
        agree(
            elbo_gap(joint / joint.sum(), prior, likelihood),
            0.0,
            "the guess is the posterior by Bayes' rule, and the gap is not 0",
        )
        agree(
            elbo_gap(q, prior, likelihood),
            _above_the_tangent(q, joint),
            "log sum_h q^(1-t) joint^t runs from 0 to the log evidence and its tangent at t = 0 "
            "to the ELBO; what is between them at t = 1 is not your gap",
        )


def _above_the_tangent(q, joint):
    def log_sum(t):
        return torch.logsumexp((1 - t) * q.log() + t * joint.log(), 0)

    start, end = torch.tensor([0.0, 1.0], dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(log_sum, start)
    return log_sum(end) - log_sum(start) - slope


def _gap_is_the_elbo(q, prior, likelihood):
    """This is the ELBO itself: the gap is what it lacks to the log evidence."""
    return (q * torch.log(prior * likelihood / q)).sum()


def _gap_turned_round(q, prior, likelihood):
    """The sign is reversed: the ELBO is a lower bound, so the gap is not negative."""
    joint = prior * likelihood
    return (q * torch.log(joint / joint.sum() / q)).sum()


def _gap_to_the_prior(q, prior, likelihood):
    """This is KL(q || prior): one part of the ELBO, not what is missing from it."""
    return (q * torch.log(q / prior)).sum()


def _gap_the_other_way(q, prior, likelihood):
    """This is KL(posterior || q), the forward KL: the gap is a mean under q."""
    posterior = prior * likelihood / (prior * likelihood).sum()
    return (posterior * torch.log(posterior / q)).sum()


def _gap_without_kl(q, prior, likelihood):
    """The ELBO here is the mean log-likelihood alone: its KL to the prior is missing."""
    return torch.log((prior * likelihood).sum()) - (q * torch.log(likelihood)).sum()


def _gap_without_prior(q, prior, likelihood):
    """The prior is missing from the evidence and from the ELBO: this is right for a flat one."""
    return (q * torch.log(q * likelihood.sum() / likelihood)).sum()


def _gap_of_minus_elbo(q, prior, likelihood):
    """This is minus the ELBO: the log evidence is missing."""
    return (q * torch.log(q / (prior * likelihood))).sum()


def _gap_evidence_not_log(q, prior, likelihood):
    """The evidence stands where its logarithm is due."""
    return (prior * likelihood).sum() - (q * torch.log(prior * likelihood / q)).sum()


def _gap_likelihood_summed(q, prior, likelihood):
    """The evidence has lost the prior: it weighs each likelihood."""
    return torch.log(likelihood.sum()) - (q * torch.log(prior * likelihood / q)).sum()


def _gap_without_entropy(q, prior, likelihood):
    """The ELBO has lost the entropy of the guess: its KL to the prior holds log q too."""
    joint = prior * likelihood
    return torch.log(joint.sum()) - (q * torch.log(joint)).sum()


def judge_token_credit(token_credit):
    """15.2: Q* minus one number, which is the most that any policy gets of Q* after its KL."""
    for (ref_probs, _), (q_values, _), beta in other_instances(seed=0):
        credit = token_credit(ref_probs, q_values, beta)
        values = q_values - credit
        agree(
            values,
            values[0],
            "the credits of two tokens do not differ as their Q* do",
        )
        best = ref_probs * torch.exp(credit / beta)
        sum_to_one(
            best,
            "credit over beta is the log-ratio of a policy to the reference, and with yours its "
            "probabilities do not sum to 1",
        )
        for probs in (ref_probs, *(random_policies(ref_probs, seed) for seed in range(4))):
            gets = objective(probs, ref_probs, q_values, beta)
            agree(
                gets,
                gets.clamp(max=values[0].item()),
                "some policy gets more of Q* less beta times its KL than Q* minus your credit",
            )


def _credit_over_the_mean(ref_probs, q_values, beta):
    """V* here is the reference's mean of Q*: the optimum's value is a soft maximum, above it."""
    return q_values - (ref_probs * q_values).sum()


def _credit_under_the_best(ref_probs, q_values, beta):
    """V* here is the largest Q*: with a KL to pay, the value stays below the maximum."""
    return q_values - q_values.max()


def _credit_in_nats(ref_probs, q_values, beta):
    """Beta is missing before the log-ratio: this is in nats, not in units of reward."""
    return q_values / beta - torch.logsumexp(ref_probs.log() + q_values / beta, 0)


def _credit_at_beta_one(ref_probs, q_values, beta):
    """Q* is not divided by beta inside the exponential."""
    return q_values - beta * torch.log((ref_probs * torch.exp(q_values)).sum())


def _credit_without_kl(ref_probs, q_values, beta):
    """V* here is the optimal policy's mean of Q*: the KL that it pays is missing."""
    weights = ref_probs * torch.exp(q_values / beta)
    return q_values - (weights / weights.sum() * q_values).sum()


def _credit_without_reference(ref_probs, q_values, beta):
    """The reference is missing from V*: its sum takes all tokens for equally likely."""
    return q_values - beta * torch.logsumexp(q_values / beta, 0)


def _credit_of_the_whole_policy(ref_probs, q_values, beta):
    """This is beta log pi*: the reference's own log-probability is still in it."""
    return beta * torch.log_softmax(ref_probs.log() + q_values / beta, 0)


def _credit_as_ratio(ref_probs, q_values, beta):
    """The logarithm is missing: this is beta times the ratio."""
    return beta * torch.softmax(ref_probs.log() + q_values / beta, 0) / ref_probs


def _credit_of_log_z(ref_probs, q_values, beta):
    """V* has lost its beta: log Z is in nats."""
    return q_values - torch.logsumexp(ref_probs.log() + q_values / beta, 0)


def judge_tilted_gaussian(tilted_gaussian):
    """15.3: the moments of the density, times exp(reward / beta), on a fine grid."""
    for mean, variance, slope, curvature, beta in (
        (0.3, 1.0, 0.0, 0.0, 0.5),
        (0.7, 0.5, -1.2, 0.0, 2.0),
        (-1.5, 2.0, 0.4, 0.3, 0.8),
        (2.0, 1.3, 1.0, 1.5, 0.25),
    ):
        got = tilted_gaussian(mean, variance, slope, curvature, beta)
        centre, spread = _moments(mean, variance, slope, curvature, beta)
        agree(got[0], centre, "the tilted density has another mean")
        agree(got[1], spread, "the tilted density has another variance")


@cache
def _moments(mean, variance, slope, curvature, beta):
    """Mean and variance of the tilted density, on a grid."""
    y = torch.linspace(-40.0, 40.0, 40_001, dtype=torch.float64)
    log_weights = -((y - mean) ** 2) / (2 * variance)
    log_weights = log_weights + (slope * y - curvature * y**2 / 2) / beta
    weights = log_weights.softmax(0)
    centre = weights @ y
    return centre, weights @ (y - centre) ** 2


def _tilted_precision(variance, curvature, beta):
    return 1 / variance + curvature / beta


def _pair(mean, variance):
    return torch.tensor([mean, variance], dtype=torch.float64)


def _gaussian_without_beta(mean, variance, slope, curvature, beta):
    """Beta is missing: the log-weight is the reward over beta."""
    precision = _tilted_precision(variance, curvature, 1.0)
    return _pair((mean / variance + slope) / precision, 1 / precision)


def _gaussian_with_its_old_variance(mean, variance, slope, curvature, beta):
    """The mean is that of the linear reward alone, computed with the old variance."""
    return _pair(mean + variance * slope / beta, 1 / _tilted_precision(variance, curvature, beta))


def _gaussian_as_precision(mean, variance, slope, curvature, beta):
    """The second number is the precision: a variance is wanted."""
    precision = _tilted_precision(variance, curvature, beta)
    return _pair((mean / variance + slope / beta) / precision, precision)


def _gaussian_that_spreads(mean, variance, slope, curvature, beta):
    """The curvature has the wrong sign: a reward that bends down makes the Gaussian narrower."""
    precision = _tilted_precision(variance, -curvature, beta)
    return _pair((mean / variance + slope / beta) / precision, 1 / precision)


def _gaussian_with_a_deviation(mean, variance, slope, curvature, beta):
    """The second number is the standard deviation: a variance is wanted."""
    precision = _tilted_precision(variance, curvature, beta)
    return _pair((mean / variance + slope / beta) / precision, precision**-0.5)


def _gaussian_twice_as_sharp(mean, variance, slope, curvature, beta):
    """The curvature counts twice: log N has the factor one half too, and it cancels."""
    precision = _tilted_precision(variance, 2 * curvature, beta)
    return _pair((mean / variance + slope / beta) / precision, 1 / precision)


def _gaussian_mean_not_divided(mean, variance, slope, curvature, beta):
    """The mean is not divided by the new precision."""
    precision = _tilted_precision(variance, curvature, beta)
    return _pair(mean / variance + slope / beta, 1 / precision)


def _gaussian_shifted_by_the_slope(mean, variance, slope, curvature, beta):
    """The slope moves the mean by itself here: how far it moves depends on the variance."""
    return _pair(mean + slope / beta, 1 / _tilted_precision(variance, curvature, beta))


def _gaussian_half_as_sharp(mean, variance, slope, curvature, beta):
    """The curvature counts half: log N has the factor one half too, and it cancels."""
    precision = _tilted_precision(variance, curvature / 2, beta)
    return _pair((mean / variance + slope / beta) / precision, 1 / precision)


def _gaussian_mean_and_variance_swapped(mean, variance, slope, curvature, beta):
    """The mean comes first, then the variance."""
    precision = _tilted_precision(variance, curvature, beta)
    return _pair(1 / precision, (mean / variance + slope / beta) / precision)


EXERCISES = (
    Exercise(
        "15.1",
        cases=((GUESS, PRIOR, LIKELIHOOD), (PRIOR, GUESS, LIKELIHOOD.flip(0))),
        judge=judge_elbo_gap,
        mistakes=(
            _gap_is_the_elbo,
            _gap_turned_round,
            _gap_to_the_prior,
            _gap_the_other_way,
            _gap_without_kl,
            _gap_without_prior,
            _gap_of_minus_elbo,
            _gap_evidence_not_log,
            _gap_likelihood_summed,
            _gap_without_entropy,
        ),
    ),
    Exercise(
        "15.2",
        cases=((REF, Q, 0.5), (REF[:3].flip(0) / REF[:3].sum(), Q[1:], 2.0)),
        judge=judge_token_credit,
        mistakes=(
            _credit_over_the_mean,
            _credit_under_the_best,
            _credit_in_nats,
            _credit_at_beta_one,
            _credit_without_kl,
            _credit_without_reference,
            _credit_of_the_whole_policy,
            _credit_as_ratio,
            _credit_of_log_z,
        ),
        shape=lambda ref_probs, q_values, beta: q_values.shape,
    ),
    Exercise(
        "15.3",
        cases=((0.5, 1.7, 0.8, 0.1, 0.5), (-1.0, 0.4, -0.3, 0.6, 2.0)),
        judge=judge_tilted_gaussian,
        mistakes=(
            _gaussian_without_beta,
            _gaussian_with_its_old_variance,
            _gaussian_as_precision,
            _gaussian_that_spreads,
            _gaussian_with_a_deviation,
            _gaussian_twice_as_sharp,
            _gaussian_mean_not_divided,
            _gaussian_shifted_by_the_slope,
            _gaussian_half_as_sharp,
            _gaussian_mean_and_variance_swapped,
        ),
        shape=lambda mean, variance, slope, curvature, beta: [2],
    ),
)

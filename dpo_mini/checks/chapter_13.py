"""Chapter 13: see the same algebra elsewhere."""

import torch

from dpo_mini.checks import Exercise

GUESS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LIKELIHOOD = torch.tensor([0.02, 0.1, 0.3], dtype=torch.float64)
REF = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
Q = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)


def elbo_gap(q, prior, likelihood):
    """13.1: log evidence less ELBO, from probabilities `[H]`."""
    evidence = (prior * likelihood).sum()
    return torch.log(evidence) - (q * torch.log(prior * likelihood / q)).sum()


def _gap_is_the_elbo(q, prior, likelihood):
    """This is the ELBO itself: the gap is what it lacks to the log evidence."""
    return (q * torch.log(prior * likelihood / q)).sum()


def _gap_turned_round(q, prior, likelihood):
    """The sign is turned round: the ELBO is a lower bound, so the gap is not negative."""
    return -elbo_gap(q, prior, likelihood)


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
    return elbo_gap(q, torch.ones_like(prior), likelihood)


def token_credit(ref_probs, q_values, beta):
    """13.2: Q* - V* of every next token `[V]`."""
    value = beta * torch.log((ref_probs * torch.exp(q_values / beta)).sum())
    return q_values - value


def _credit_over_the_mean(ref_probs, q_values, beta):
    """V* here is the reference's mean of Q*: the optimum's value is a soft maximum, above it."""
    return q_values - (ref_probs * q_values).sum()


def _credit_under_the_best(ref_probs, q_values, beta):
    """V* here is the largest Q*: with a KL to pay, the value stays below the maximum."""
    return q_values - q_values.max()


def _credit_in_nats(ref_probs, q_values, beta):
    """Beta is missing before the log-ratio: this is in nats, not in units of reward."""
    return token_credit(ref_probs, q_values, beta) / beta


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
    return token_credit(ref_probs, q_values, beta) + beta * torch.log(ref_probs)


def tilted_gaussian(mean, variance, slope, curvature, beta):
    """13.3: mean and variance `[2]` after the reward slope y - curvature y^2 / 2."""
    new_variance = 1 / (1 / variance + curvature / beta)
    new_mean = new_variance * (mean / variance + slope / beta)
    return torch.tensor([new_mean, new_variance], dtype=torch.float64)


def _gaussian_without_beta(mean, variance, slope, curvature, beta):
    """Beta is missing: the log-weight is the reward over beta."""
    return tilted_gaussian(mean, variance, slope, curvature, 1.0)


def _gaussian_with_its_old_variance(mean, variance, slope, curvature, beta):
    """The mean is that of the linear reward alone, computed with the old variance."""
    new = tilted_gaussian(mean, variance, slope, curvature, beta)
    return torch.tensor([mean + variance * slope / beta, new[1]], dtype=torch.float64)


def _gaussian_as_precision(mean, variance, slope, curvature, beta):
    """The second number is the precision: a variance is wanted."""
    new = tilted_gaussian(mean, variance, slope, curvature, beta)
    return torch.tensor([new[0], 1 / new[1]], dtype=torch.float64)


def _gaussian_that_spreads(mean, variance, slope, curvature, beta):
    """The curvature has the wrong sign: a reward that bends down makes the Gaussian narrower."""
    return tilted_gaussian(mean, variance, slope, -curvature, beta)


def _gaussian_with_a_deviation(mean, variance, slope, curvature, beta):
    """The second number is the standard deviation: a variance is wanted."""
    new = tilted_gaussian(mean, variance, slope, curvature, beta)
    return torch.tensor([new[0], new[1] ** 0.5], dtype=torch.float64)


def _gaussian_twice_as_sharp(mean, variance, slope, curvature, beta):
    """The curvature counts twice: log N has the factor one half too, and it cancels."""
    return tilted_gaussian(mean, variance, slope, 2 * curvature, beta)


EXERCISES = (
    Exercise(
        "13.1",
        cases=((GUESS, PRIOR, LIKELIHOOD), (PRIOR, GUESS, LIKELIHOOD.flip(0))),
        answer=elbo_gap,
        mistakes=(
            _gap_is_the_elbo,
            _gap_turned_round,
            _gap_to_the_prior,
            _gap_the_other_way,
            _gap_without_kl,
            _gap_without_prior,
        ),
    ),
    Exercise(
        "13.2",
        cases=((REF, Q, 0.5), (REF[:3].flip(0) / REF[:3].sum(), Q[1:], 2.0)),
        answer=token_credit,
        mistakes=(
            _credit_over_the_mean,
            _credit_under_the_best,
            _credit_in_nats,
            _credit_at_beta_one,
            _credit_without_kl,
            _credit_without_reference,
            _credit_of_the_whole_policy,
        ),
    ),
    Exercise(
        "13.3",
        cases=((0.5, 1.7, 0.8, 0.1, 0.5), (-1.0, 0.4, -0.3, 0.6, 2.0)),
        answer=tilted_gaussian,
        mistakes=(
            _gaussian_without_beta,
            _gaussian_with_its_old_variance,
            _gaussian_as_precision,
            _gaussian_that_spreads,
            _gaussian_with_a_deviation,
            _gaussian_twice_as_sharp,
        ),
    ),
)

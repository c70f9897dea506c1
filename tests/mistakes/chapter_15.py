"""Plausible wrong answers to the exercises of chapter 15, and a word of each one's sentence."""

import math

from torch.nn.functional import kl_div


def posterior_of(prior, likelihood):
    return (prior.log() + likelihood.log()).softmax(0)


def elbo_instead_of_its_gap(q, prior, likelihood):
    return q @ likelihood.log() - kl_div(prior.log(), q, reduction="sum")


def elbo_less_evidence(q, prior, likelihood):
    return -kl_div(posterior_of(prior, likelihood).log(), q, reduction="sum")


def distance_from_the_prior(q, prior, likelihood):
    return kl_div(prior.log(), q, reduction="sum")


def forward_kl(q, prior, likelihood):
    return kl_div(q.log(), posterior_of(prior, likelihood), reduction="sum")


def fit_without_penalty(q, prior, likelihood):
    return (prior @ likelihood).log() - q @ likelihood.log()


def flat_prior(q, prior, likelihood):
    return kl_div((likelihood / likelihood.sum()).log(), q, reduction="sum")


def advantage_over_the_reference(ref_probs, q_values, beta):
    return q_values - ref_probs @ q_values


def regret_of_the_greedy(ref_probs, q_values, beta):
    return q_values - max(q_values.tolist())


def log_ratio(ref_probs, q_values, beta):
    tilted = (ref_probs.log() + q_values / beta).log_softmax(0)
    return tilted - ref_probs.log()


def value_that_forgets_beta(ref_probs, q_values, beta):
    return q_values - beta * (ref_probs.log() + q_values).logsumexp(0)


def advantage_over_the_optimum(ref_probs, q_values, beta):
    return q_values - (ref_probs.log() + q_values / beta).softmax(0) @ q_values


def entropy_regularised(ref_probs, q_values, beta):
    return beta * (q_values / beta).log_softmax(0)


def log_policy(ref_probs, q_values, beta):
    return beta * (ref_probs.log() + q_values / beta).log_softmax(0)


def shrunk(mean, variance, slope, curvature, beta):
    shrink = 1 + curvature * variance / beta
    return (mean + slope * variance / beta) / shrink, variance / shrink


def at_beta_one(mean, variance, slope, curvature, beta):
    return shrunk(mean, variance, slope, curvature, 1)


def shift_then_shrink(mean, variance, slope, curvature, beta):
    shifted = mean + slope * variance / beta
    return shifted, shrunk(shifted, variance, 0, curvature, beta)[1]


def mean_and_precision(mean, variance, slope, curvature, beta):
    new_mean, _ = shrunk(mean, variance, slope, curvature, beta)
    return new_mean, 1 / variance + curvature / beta


def bent_the_other_way(mean, variance, slope, curvature, beta):
    return shrunk(mean, variance, slope, -curvature, beta)


def mean_and_deviation(mean, variance, slope, curvature, beta):
    new_mean, new_variance = shrunk(mean, variance, slope, curvature, beta)
    return new_mean, math.sqrt(new_variance)


def without_the_half(mean, variance, slope, curvature, beta):
    return shrunk(mean, variance, slope, curvature + curvature, beta)


def gap_of_minus_elbo(q, prior, likelihood):
    return -elbo_instead_of_its_gap(q, prior, likelihood)


def gap_evidence_not_log(q, prior, likelihood):
    return prior @ likelihood - elbo_instead_of_its_gap(q, prior, likelihood)


def gap_likelihood_summed(q, prior, likelihood):
    return likelihood.sum().log() - elbo_instead_of_its_gap(q, prior, likelihood)


def gap_without_entropy(q, prior, likelihood):
    return (prior @ likelihood).log() - q @ (prior * likelihood).log()


def credit_as_ratio(ref_probs, q_values, beta):
    return beta * (ref_probs.log() + q_values / beta).softmax(0) / ref_probs


def credit_of_log_z(ref_probs, q_values, beta):
    return q_values - (ref_probs.log() + q_values / beta).logsumexp(0)


def gaussian_mean_not_divided(mean, variance, slope, curvature, beta):
    _, new_variance = shrunk(mean, variance, slope, curvature, beta)
    return mean / variance + slope / beta, new_variance


def gaussian_shifted_by_the_slope(mean, variance, slope, curvature, beta):
    _, new_variance = shrunk(mean, variance, slope, curvature, beta)
    return mean + slope / beta, new_variance


def gaussian_half_as_sharp(mean, variance, slope, curvature, beta):
    return shrunk(mean, variance, slope, curvature / 2, beta)


def gaussian_mean_and_variance_swapped(mean, variance, slope, curvature, beta):
    return shrunk(mean, variance, slope, curvature, beta)[::-1]


MISTAKES = {
    "15.1": {
        "This is the ELBO itself": elbo_instead_of_its_gap,
        "reversed": elbo_less_evidence,
        "KL(q || prior)": distance_from_the_prior,
        "forward KL": forward_kl,
        "KL to the prior is missing": fit_without_penalty,
        "flat one": flat_prior,
        "This is minus the ELBO": gap_of_minus_elbo,
        "The evidence stands where its logarithm is due": gap_evidence_not_log,
        "The evidence has lost the prior": gap_likelihood_summed,
        "The ELBO has lost the entropy of the guess": gap_without_entropy,
    },
    "15.2": {
        "soft maximum": advantage_over_the_reference,
        "below the maximum": regret_of_the_greedy,
        "in nats": log_ratio,
        "not divided by beta": value_that_forgets_beta,
        "KL that it pays": advantage_over_the_optimum,
        "reference is missing": entropy_regularised,
        "beta log pi*": log_policy,
        "The logarithm is missing": credit_as_ratio,
        "V* has lost its beta": credit_of_log_z,
    },
    "15.3": {
        "Beta is missing": at_beta_one,
        "old variance": shift_then_shrink,
        "the precision": mean_and_precision,
        "wrong sign": bent_the_other_way,
        "standard deviation": mean_and_deviation,
        "counts twice": without_the_half,
        "The mean is not divided by the new precision": gaussian_mean_not_divided,
        "The slope moves the mean by itself here": gaussian_shifted_by_the_slope,
        "The curvature counts half": gaussian_half_as_sharp,
        "The mean comes first, then the variance": gaussian_mean_and_variance_swapped,
    },
}

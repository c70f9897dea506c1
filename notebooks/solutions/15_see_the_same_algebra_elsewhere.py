"""Solutions of chapter 15."""

import torch
from torch.distributions import Categorical, kl_divergence


def elbo_gap(q, prior, likelihood):
    """15.1: the gap is the KL from the guess to the posterior."""
    posterior = torch.softmax(prior.log() + likelihood.log(), 0)
    return kl_divergence(Categorical(q), Categorical(posterior))


def token_credit(ref_probs, q_values, beta):
    """15.2: tilt, then take the log-ratio; Q* - V* comes out."""
    tilted = torch.log_softmax(ref_probs.log() + q_values / beta, 0)
    return beta * (tilted - ref_probs.log())


def tilted_gaussian(mean, variance, slope, curvature, beta):
    """15.3: an observation slope / curvature with noise beta / curvature.

    As a Kalman filter writes it, multiplied out so that no curvature is
    allowed too.
    """
    shrink = 1 + curvature * variance / beta
    new_mean = (mean + slope * variance / beta) / shrink
    return new_mean, variance / shrink


SOLUTIONS = {
    "15.1": elbo_gap,
    "15.2": token_credit,
    "15.3": tilted_gaussian,
}

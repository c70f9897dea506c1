"""Solutions of chapter 02."""

import torch


def shortfall(probs, ref_probs, rewards, beta):
    """2.1: J* is beta log Z; subtract what this policy gets."""
    log_z = torch.logsumexp(ref_probs.log() + rewards / beta, dim=-1)
    nats = (probs * (probs / ref_probs).log()).sum()
    return beta * log_z - (probs @ rewards - beta * nats)


def forward_kl_policy(ref_probs, rewards, beta):
    """2.3: bisection for the multiplier, between max r and max r + beta."""
    low, high = rewards.max(), rewards.max() + beta
    for _ in range(100):
        middle = (low + high) / 2
        probs = ref_probs * beta / (middle - rewards)
        if probs.sum() > 1:
            low = middle
        else:
            high = middle
    return probs


def chi_squared_policy(ref_probs, rewards, beta):
    """2.4: drop the worst answers, one by one, until none is negative."""
    order = rewards.argsort(descending=True)
    for n_kept in range(len(rewards), 0, -1):
        kept = order[:n_kept]
        mass, mean = ref_probs[kept].sum(), ref_probs[kept] @ rewards[kept]
        level = (mean - 2 * beta * (1 - mass)) / mass
        ratios = 1 + (rewards[kept] - level) / (2 * beta)
        if (ratios >= 0).all():
            break
    probs = torch.zeros_like(ref_probs)
    probs[kept] = ref_probs[kept] * ratios
    return probs


SOLUTIONS = {
    "2.1": shortfall,
    "2.3": forward_kl_policy,
    "2.4": chi_squared_policy,
}

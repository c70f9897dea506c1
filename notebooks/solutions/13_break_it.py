"""Solutions of chapter 13."""

import torch


def nats_gained(ref_probs, rewards, beta):
    """13.1: what lies above beta log Z rises, what lies below falls."""
    log_z = torch.logsumexp(ref_probs.log() + rewards / beta, dim=0)
    return rewards / beta - log_z


def chosen_rate(ref_probs, features, chosen, rejected, beta):
    """13.2: how log pi(chosen) moves with theta, times DPO's step on it."""
    gap = features[chosen] - features[rejected]
    slope = features[chosen] - ref_probs @ features
    return beta / 2 * (slope @ gap)  # sigmoid(0) = 1/2


def mean_policy(ref_probs, rewards, lengths, beta):
    """13.3: Newton for the c at which the probabilities sum to 1."""
    c = -rewards.min()  # all exponents >= 0: the sum is at least 1
    for _ in range(200):  # from above a convex function's root
        probs = ref_probs * torch.exp(lengths * (rewards + c) / beta)
        c = c - (probs.sum() - 1) / (probs * lengths / beta).sum()
    return probs


def shared_optimum(group_wins, shares, ref_probs, beta):
    """13.4: rewards against answer 0 in each group, their mean, one tilt."""
    group_rewards = torch.logit(group_wins[:, :, 0])  # 0 for answer 0 itself
    return torch.softmax(
        ref_probs.log() + shares @ group_rewards / beta, dim=0
    )


SOLUTIONS = {
    "13.1": nats_gained,
    "13.2": chosen_rate,
    "13.3": mean_policy,
    "13.4": shared_optimum,
}

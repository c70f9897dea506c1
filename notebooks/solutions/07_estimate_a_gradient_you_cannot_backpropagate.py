"""Solutions of chapter 07."""

import torch


def leave_one_out(rewards):
    """7.1: the mean of the others, from the sum of all."""
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others


def straight_through_slope(theta, c):
    """7.2: the cost is a square, so the mean of f' is f' at the mean."""
    p = torch.tensor(theta, dtype=torch.float64).sigmoid()
    return 2 * (p - c) * p * (1 - p)


def stretch(p, size):
    """7.3: given n successes the mean gradient is the group's deviation."""
    n = torch.arange(size + 1, dtype=torch.float64)
    success = torch.tensor(p, dtype=torch.float64)
    chances = torch.distributions.Binomial(size, success).log_prob(n).exp()
    deviation = (n / size * (1 - n / size)).sqrt()
    return (chances @ deviation) / (p * (1 - p))


SOLUTIONS = {
    "7.1": leave_one_out,
    "7.2": straight_through_slope,
    "7.3": stretch,
}

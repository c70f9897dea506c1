"""Plausible wrong answers to the exercises of chapter 07, and a word of each one's sentence."""

import torch


def coin(theta):
    return torch.tensor(theta, dtype=torch.float64).sigmoid()


def advantages_from_the_mean_of_all(rewards):
    return rewards - rewards.mean()


def advantages_with_the_wrong_count(rewards):
    return rewards - torch.stack([(rewards.sum() - r) / len(rewards) for r in rewards])


def advantages_that_are_baselines(rewards):
    return torch.stack([(rewards.sum() - r) / (len(rewards) - 1) for r in rewards])


def advantages_of_the_others(rewards):
    return (rewards.sum() - rewards) / (len(rewards) - 1) - rewards


def advantages_of_grpo(rewards):
    centred = rewards - rewards.mean()
    return centred / centred.square().mean().sqrt()


def slope_of_the_expected_cost(theta, c):
    p = coin(theta).requires_grad_()
    (slope,) = torch.autograd.grad(p * (1 - c) ** 2 + (1 - p) * c**2, p)
    return slope * p.detach() * (1 - p.detach())


def slope_without_the_chain_rule(theta, c):
    return 2 * (coin(theta) - c)


def slope_of_heads_alone(theta, c):
    p = coin(theta)
    return 2 * p**2 * (1 - p) * (1 - c)


def slope_downhill(theta, c):
    p = coin(theta)
    return 2 * (c - p) * p * (1 - p)


def binomial(p, size):
    n = torch.arange(size + 1, dtype=torch.float64)
    chances = torch.distributions.Binomial(size, torch.tensor(p, dtype=torch.float64))
    return n, chances.log_prob(n).exp()


def ratio_with_bessel(p, size):
    n, chances = binomial(p, size)
    deviation = (n * (size - n) / size / (size - 1)).sqrt()
    # Advantages shrink as this deviation grows: mean times (variance / deviation).
    weight = torch.where(deviation > 0, n * (size - n) / size**2 / deviation, 0.0)
    return chances @ weight / (p * (1 - p))


def ratio_of_endless_groups(p, size):
    return (p * (1 - p)) ** -0.5


def ratio_that_is_a_deviation(p, size):
    n, chances = binomial(p, size)
    return chances @ (n * (size - n)).sqrt() / size


def ratio_of_variances(p, size):
    return (size - 1) / size


def ratio_of_inverse_deviations(p, size):
    n, chances = binomial(p, size)
    inside = (n > 0) & (n < size)
    return (chances[inside] * size / (n * (size - n)).sqrt()[inside]).sum()


def normalised_by_k_minus_1(rewards):
    return (rewards - rewards.mean()) / rewards.std()


def sum_of_others(rewards):
    return rewards - (rewards.sum() - rewards)


def all_over_k_minus_1(rewards):
    return rewards - rewards.sum() / (len(rewards) - 1)


def no_baseline(rewards):
    return rewards


def outcomes_not_weighted(theta, c):
    p = coin(theta)
    return (2 * (1 - c) + 2 * (0 - c)) * p * (1 - p)


def theta_as_probability(theta, c):
    return 2 * (theta - c) * theta * (1 - theta)


def expected_cost(theta, c):
    p = coin(theta)
    return p * (1 - c) ** 2 + (1 - p) * c**2


def without_silent_groups(p, size):
    drawn = 1 - p**size - (1 - p) ** size
    return ratio_that_is_a_deviation(p, size) / (p * (1 - p)) / drawn


def over_the_deviation(p, size):
    return ratio_that_is_a_deviation(p, size) / (p * (1 - p)) ** 0.5


MISTAKES = {
    "7.1": {
        "own reward": advantages_from_the_mean_of_all,
        "there are K - 1 of them": advantages_with_the_wrong_count,
        "the baseline itself": advantages_that_are_baselines,
        "reversed": advantages_of_the_others,
        "which is GRPO": advantages_of_grpo,
        "This is GRPO with the deviation of a sample": normalised_by_k_minus_1,
        "The baseline is the sum of the others' rewards": sum_of_others,
        "The baseline divides the sum of all K rewards by K - 1": all_over_k_minus_1,
        "These are the rewards": no_baseline,
    },
    "7.2": {
        "the true gradient": slope_of_the_expected_cost,
        "chain rule": slope_without_the_chain_rule,
        "Only heads": slope_of_heads_alone,
        "reversed": slope_downhill,
        "The two outcomes are added up": outcomes_not_weighted,
        "Theta is used as the probability": theta_as_probability,
        "This is the expected cost": expected_cost,
    },
    "7.3": {
        "divides by K - 1": ratio_with_bessel,
        "limit of endless groups": ratio_of_endless_groups,
        "the mean deviation": ratio_that_is_a_deviation,
        "square root is missing": ratio_of_variances,
        "A mean of 1/std": ratio_of_inverse_deviations,
        "Groups that all succeed or all fail are left out": without_silent_groups,
        "This divides by the deviation of a reward": over_the_deviation,
    },
}

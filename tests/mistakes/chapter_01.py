"""Plausible wrong answers to the exercises of chapter 01, and words of each one's sentence."""

import math

import torch


def objective_with_forward_kl(probs, ref_probs, rewards, beta):
    return probs @ rewards - beta * (ref_probs @ (ref_probs.log() - probs.log()))


def objective_that_pays_for_leaving(probs, ref_probs, rewards, beta):
    given = probs > 0
    logratios = (probs[given] / ref_probs[given]).log()
    return probs @ rewards + beta * (probs[given] @ logratios)


def objective_that_is_not_a_number(probs, ref_probs, rewards, beta):
    return (probs * (rewards - beta * (probs.log() - ref_probs.log()))).sum()


def objective_with_a_priced_reward(probs, ref_probs, rewards, beta):
    given = probs > 0
    logratios = (probs[given] / ref_probs[given]).log()
    return beta * (probs @ rewards) - probs[given] @ logratios


def objective_with_an_entropy_bonus(probs, ref_probs, rewards, beta):
    return probs @ rewards + beta * torch.special.entr(probs).sum()


def beta_from_the_best_reward(rewards, floor):
    return rewards.max().item() / math.log(1 / floor)


def beta_without_a_logarithm(rewards, floor):
    return (rewards.max() - rewards.min()) * floor


def beta_multiplied(rewards, floor):
    return (rewards.max() - rewards.min()) * math.log(1 / floor)


def beta_in_decades(rewards, floor):
    return (rewards.max() - rewards.min()) / math.log10(1 / floor)


def beta_below_zero(rewards, floor):
    return (rewards.min() - rewards.max()) / math.log(1 / floor)


def gaussian_with_its_variance(points, probs):
    mean = probs @ points
    return torch.stack([mean, probs @ (points - mean).square()])


def gaussian_on_the_mode(points, probs):
    top = points[probs == probs.max()][0]
    return torch.stack([top, (probs @ (points - top).square()).sqrt()])


def gaussian_of_the_points(points, probs):
    mean = points.mean()
    return torch.stack([mean, (points - mean).square().mean().sqrt()])


def gaussian_with_its_second_moment(points, probs):
    return torch.stack([probs @ points, (probs @ points.square()).sqrt()])


def nats(probs, ref_probs):
    return torch.xlogy(probs, probs / ref_probs).sum()


def kl_missing(probs, ref_probs, rewards, beta):
    return probs @ rewards


def rewards_summed(probs, ref_probs, rewards, beta):
    return rewards.sum() - beta * nats(probs, ref_probs)


def reward_of_the_reference(probs, ref_probs, rewards, beta):
    return ref_probs @ rewards - beta * nats(probs, ref_probs)


def cross_entropy(probs, ref_probs, rewards, beta):
    return probs @ (rewards + beta * ref_probs.log())


def kl_not_weighted(probs, ref_probs, rewards, beta):
    return probs @ rewards - beta * (probs / ref_probs).log().sum()


def spread_without_weights(points, probs):
    return torch.stack([probs @ points, ((points - probs @ points) ** 2).mean().sqrt()])


def corrected_for_a_sample(points, probs):
    mean, n = probs @ points, len(points)
    return torch.stack([mean, (probs @ (points - mean).square() * n / (n - 1)).sqrt()])


MISTAKES = {
    "1.1": {
        "reversed": objective_with_forward_kl,
        "wrong sign": objective_that_pays_for_leaving,
        "0 log 0 counts as 0": objective_that_is_not_a_number,
        "price of a nat": objective_with_a_priced_reward,
        "reference is missing": objective_with_an_entropy_bonus,
        "The KL term is missing": kl_missing,
        "The rewards are added up": rewards_summed,
        "This is the reference's mean reward": reward_of_the_reference,
        "This charges a cross-entropy": cross_entropy,
        "The log-ratios are added up": kl_not_weighted,
    },
    "1.2": {
        "range is needed": beta_from_the_best_reward,
        "logarithm is missing": beta_without_a_logarithm,
        "upside down": beta_multiplied,
        "base 10": beta_in_decades,
        "negative": beta_below_zero,
    },
    "1.4": {
        "variance": gaussian_with_its_variance,
        "highest point": gaussian_on_the_mode,
        "not weighted": gaussian_of_the_points,
        "measured from 0": gaussian_with_its_second_moment,
        "The mean is weighted and the spread is not": spread_without_weights,
        "The spread has the factor K / (K - 1) of a sample": corrected_for_a_sample,
    },
}

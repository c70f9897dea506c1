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


MISTAKES = {
    "1.1": {
        "reversed": objective_with_forward_kl,
        "wrong sign": objective_that_pays_for_leaving,
        "0 log 0 counts as 0": objective_that_is_not_a_number,
        "price of a nat": objective_with_a_priced_reward,
        "reference is missing": objective_with_an_entropy_bonus,
    },
    "1.2": {
        "range is needed": beta_from_the_best_reward,
        "logarithm is missing": beta_without_a_logarithm,
        "upside down": beta_multiplied,
        "base 10": beta_in_decades,
        "negative": beta_below_zero,
    },
    "1.3": {
        "variance": gaussian_with_its_variance,
        "highest point": gaussian_on_the_mode,
        "not weighted": gaussian_of_the_points,
        "measured from 0": gaussian_with_its_second_moment,
    },
}

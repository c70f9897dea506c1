"""Plausible wrong answers to the exercises of chapter 02, and words of each one's sentence."""

import torch


def optimum(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).softmax(-1)


def shortfall_the_other_way(probs, ref_probs, rewards, beta):
    best = optimum(ref_probs, rewards, beta)
    return beta * (best @ (best.log() - probs.log()))


def shortfall_without_beta(probs, ref_probs, rewards, beta):
    return probs @ (probs.log() - optimum(ref_probs, rewards, beta).log())


def shortfall_as_distance_travelled(probs, ref_probs, rewards, beta):
    return beta * (probs @ (probs.log() - ref_probs.log()))


def shortfall_that_forgets_kl(probs, ref_probs, rewards, beta):
    return optimum(ref_probs, rewards, beta) @ rewards - probs @ rewards


def shortfall_from_log_z(probs, ref_probs, rewards, beta):
    log_z = (ref_probs * (rewards / beta).exp()).sum().log()
    return log_z - probs @ rewards + beta * (probs @ (probs / ref_probs).log())


def solved(total, low, high):
    for _ in range(100):
        middle = (low + high) / 2
        if total(middle) > 1:
            low = middle
        else:
            high = middle
    return middle


def hyperbola_with_inverse_beta(ref_probs, rewards, beta):
    def policy(level):
        return ref_probs / (beta * (level - rewards))

    top = rewards.max().item()
    return policy(solved(lambda level: policy(level).sum(), top, top + 1 / beta))


def hyperbola_by_hand(ref_probs, rewards, beta):
    weights = ref_probs / (rewards.max() + beta - rewards)
    return weights / weights.sum()


def hyperbola_short_of_one(ref_probs, rewards, beta):
    return ref_probs / (1 + (rewards.max() - rewards) / beta)


def hyperbola_of_costs(ref_probs, rewards, beta):
    def policy(level):
        return ref_probs * beta / (level + rewards)

    top = -rewards.min().item()
    return policy(solved(lambda level: policy(level).sum(), top, top + beta))


def line_below_zero(ref_probs, rewards, beta):
    centred = rewards - ref_probs @ rewards
    return ref_probs + ref_probs * centred / (2 * beta)


def line_cut_and_rescaled(ref_probs, rewards, beta):
    weights = line_below_zero(ref_probs, rewards, beta).clamp(min=0)
    return weights / weights.sum()


def line_twice_as_steep(ref_probs, rewards, beta):
    def policy(level):
        return ref_probs * torch.relu(1 + (rewards - level) / beta)

    ends = rewards.min().item(), rewards.max().item()
    return policy(solved(lambda level: policy(level).sum(), *ends))


MISTAKES = {
    "2.1": {
        "reversed": shortfall_the_other_way,
        "Beta is missing": shortfall_without_beta,
        "distance from the reference": shortfall_as_distance_travelled,
        "rewards alone": shortfall_that_forgets_kl,
        "before the logarithm": shortfall_from_log_z,
    },
    "2.2": {
        "exponential tilt": optimum,
        "by hand": hyperbola_by_hand,
        "do not sum to 1": hyperbola_short_of_one,
        "upside down": hyperbola_with_inverse_beta,
        "worst answer gains": hyperbola_of_costs,
    },
    "2.3": {
        "negative": line_below_zero,
        "solved again": line_cut_and_rescaled,
        "factor 2": line_twice_as_steep,
        "never drops": optimum,
    },
}

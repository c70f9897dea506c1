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


def normalised(w):
    return w / w.sum()


def tilted(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).softmax(0)


def nats(probs, ref_probs):
    return torch.xlogy(probs, probs / ref_probs).sum()


def log_z(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).logsumexp(-1)


def objective_of(probs, ref_probs, rewards, beta):
    return probs @ rewards - beta * nats(probs, ref_probs)


def hyperbola_searched_too_briefly(ref_probs, rewards, beta):
    low, high = rewards.max(), rewards.max() + beta
    for _ in range(20):
        middle = (low + high) / 2
        if (beta * ref_probs / (middle - rewards)).sum() > 1:
            low = middle
        else:
            high = middle
    return beta * ref_probs / (middle - rewards)


def hyperbola_in_float32(ref_probs, rewards, beta):
    def policy(level):
        return ref_probs.float() * beta / (level - rewards.float())

    top = rewards.max().item()
    return policy(solved(lambda level: policy(level).sum(), top, top + beta))


def line_searched_too_briefly(ref_probs, rewards, beta):
    low, high = rewards.min() - 2 * beta, rewards.max()
    for _ in range(20):
        middle = (low + high) / 2
        probs = ref_probs * torch.relu(1 + (rewards - middle) / (2 * beta))
        low, high = (middle, high) if probs.sum() > 1 else (low, middle)
    return probs


def shortfall_negative(probs, ref_probs, rewards, beta):
    return objective_of(probs, ref_probs, rewards, beta) - beta * log_z(ref_probs, rewards, beta)


def objective_without_kl(probs, ref_probs, rewards, beta):
    return beta * log_z(ref_probs, rewards, beta) - probs @ rewards


def best_without_kl(probs, ref_probs, rewards, beta):
    return tilted(ref_probs, rewards, beta) @ rewards - objective_of(
        probs, ref_probs, rewards, beta
    )


def best_is_the_largest_reward(probs, ref_probs, rewards, beta):
    return rewards.max() - objective_of(probs, ref_probs, rewards, beta)


def objective_alone(probs, ref_probs, rewards, beta):
    return objective_of(probs, ref_probs, rewards, beta)


def objective_with_the_penalty_added(probs, ref_probs, rewards, beta):
    return beta * log_z(ref_probs, rewards, beta) - (
        probs @ rewards + beta * nats(probs, ref_probs)
    )


def objective_in_nats(probs, ref_probs, rewards, beta):
    return beta * log_z(ref_probs, rewards, beta) - (probs @ rewards - nats(probs, ref_probs))


def objective_with_reverse_kl(probs, ref_probs, rewards, beta):
    return beta * log_z(ref_probs, rewards, beta) - (
        probs @ rewards - beta * nats(ref_probs, probs)
    )


def best_without_reference(probs, ref_probs, rewards, beta):
    return beta * (rewards / beta).logsumexp(0) - objective_of(probs, ref_probs, rewards, beta)


def best_at_beta_one(probs, ref_probs, rewards, beta):
    return beta * log_z(ref_probs, rewards, 1.0) - objective_of(probs, ref_probs, rewards, beta)


def best_without_logarithm(probs, ref_probs, rewards, beta):
    return beta * log_z(ref_probs, rewards, beta).exp() - objective_of(
        probs, ref_probs, rewards, beta
    )


def shortfall_over_beta(probs, ref_probs, rewards, beta):
    return nats(probs, tilted(ref_probs, rewards, beta)) / beta


def shortfall_of_tilt_upside_down(probs, ref_probs, rewards, beta):
    return beta * nats(probs, tilted(ref_probs, rewards, 1 / beta))


def shortfall_reversed_in_nats(probs, ref_probs, rewards, beta):
    return nats(tilted(ref_probs, rewards, beta), probs)


def below_the_reference(probs, ref_probs, rewards, beta):
    return objective_of(ref_probs, ref_probs, rewards, beta) - objective_of(
        probs, ref_probs, rewards, beta
    )


def lambda_at_the_mean(ref_probs, rewards, beta):
    return beta * ref_probs / (ref_probs @ rewards + beta - rewards)


def lambda_at_the_mean_normalised(ref_probs, rewards, beta):
    return normalised(beta * ref_probs / (ref_probs @ rewards + beta - rewards))


def factor_two_twice(ref_probs, rewards, beta):
    return line_twice_as_steep(ref_probs, rewards, 4 * beta)


def negative_and_half(ref_probs, rewards, beta):
    return ref_probs * (1 + (rewards - ref_probs @ rewards) / beta)


def negative_and_double(ref_probs, rewards, beta):
    return ref_probs * (1 + (rewards - ref_probs @ rewards) / (4 * beta))


def cut_only(ref_probs, rewards, beta):
    return (ref_probs * (1 + (rewards - ref_probs @ rewards) / (2 * beta))).clamp(min=0)


def cut_and_half(ref_probs, rewards, beta):
    return normalised((ref_probs * (1 + (rewards - ref_probs @ rewards) / beta)).clamp(min=0))


def kept_at_the_mean(ref_probs, rewards, beta):
    kept = line_below_zero(ref_probs, rewards, beta) > 0
    shares = normalised(ref_probs * kept)
    return shares * (1 + (rewards - shares @ rewards) / (2 * beta)) * kept


def dropped_once(ref_probs, rewards, beta):
    kept = line_below_zero(ref_probs, rewards, beta) > 0
    mass, mean = ref_probs[kept].sum(), ref_probs[kept] @ rewards[kept]
    level = (mean - 2 * beta * (1 - mass)) / mass
    probs = torch.zeros_like(ref_probs)
    probs[kept] = ref_probs[kept] * (1 + (rewards[kept] - level) / (2 * beta))
    return probs


def plain_mean(ref_probs, rewards, beta):
    return ref_probs * (1 + (rewards - rewards.mean()) / (2 * beta))


def without_lambda(ref_probs, rewards, beta):
    return ref_probs * torch.relu(1 + rewards / (2 * beta))


def penalty_not_weighted(ref_probs, rewards, beta):
    def policy(level):
        return torch.relu(ref_probs + (rewards - level) / (2 * beta))

    ends = rewards.min().item() - 9 * beta, rewards.max().item() + 9 * beta
    return policy(solved(lambda level: policy(level).sum(), *ends))


MISTAKES = {
    "2.1": {
        "reversed": shortfall_the_other_way,
        "Beta is missing": shortfall_without_beta,
        "distance from the reference": shortfall_as_distance_travelled,
        "rewards alone": shortfall_that_forgets_kl,
        "before the logarithm": shortfall_from_log_z,
        "The sign is reversed": shortfall_negative,
        "The policy's J has lost its KL term": objective_without_kl,
        "J* has lost its KL term": best_without_kl,
        "The largest reward stands for J*": best_is_the_largest_reward,
        "This is J of the policy": objective_alone,
        "In the policy's J the penalty has the wrong sign": objective_with_the_penalty_added,
        "In the policy's J the KL has lost its beta": objective_in_nats,
        "In the policy's J the KL is reversed": objective_with_reverse_kl,
        "J* has lost the reference": best_without_reference,
        "Inside Z the rewards are not divided by beta": best_at_beta_one,
        "The logarithm is missing": best_without_logarithm,
        "The KL is divided by beta": shortfall_over_beta,
        "The optimum is tilted by beta r": shortfall_of_tilt_upside_down,
        "the KL is reversed (it averages": shortfall_reversed_in_nats,
        "This compares with the reference's J": below_the_reference,
    },
    "2.3": {
        "does a search stop too early": hyperbola_searched_too_briefly,
        "is a number in float32": hyperbola_in_float32,
        "exponential tilt": optimum,
        "by hand": hyperbola_by_hand,
        "do not sum to 1": hyperbola_short_of_one,
        "upside down": hyperbola_with_inverse_beta,
        "worst answer gains": hyperbola_of_costs,
        "must be above every reward": lambda_at_the_mean,
        "and the sum is divided out": lambda_at_the_mean_normalised,
    },
    "2.4": {
        "nearly right": line_searched_too_briefly,
        "negative": line_below_zero,
        "solved again": line_cut_and_rescaled,
        "factor 2": line_twice_as_steep,
        "never drops": optimum,
        "There is a factor 2 too many": factor_two_twice,
        "negative, and the 2 of a square's derivative is missing": negative_and_half,
        "negative, and the 2 of a square's derivative counts twice": negative_and_double,
        "You cut the negative ones and left the rest": cut_only,
        "lambda must be solved again when answers are": cut_and_half,
        "Among the answers that stay, lambda is their mean reward here": kept_at_the_mean,
        "You dropped answers once": dropped_once,
        "Lambda is the plain mean reward here": plain_mean,
        "Lambda is missing": without_lambda,
        "The penalty has lost its weights": penalty_not_weighted,
    },
}

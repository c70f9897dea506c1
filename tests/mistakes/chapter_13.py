"""Plausible wrong answers to the exercises of chapter 13, and a word of each one's sentence."""

import torch


def log_partition(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).logsumexp(0)


def gained_by_reward_alone(ref_probs, rewards, beta):
    return rewards * (1 / beta)


def gained_in_units_of_reward(ref_probs, rewards, beta):
    return rewards - beta * log_partition(ref_probs, rewards, beta)


def gained_over_the_average(ref_probs, rewards, beta):
    return (rewards - (ref_probs * rewards).sum()) / beta


def gained_less_z(ref_probs, rewards, beta):
    return rewards / beta - log_partition(ref_probs, rewards, beta).exp()


def gained_with_beta_twice(ref_probs, rewards, beta):
    return rewards / beta - beta * log_partition(ref_probs, rewards, beta)


def log_of_the_optimum(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).log_softmax(0)


def rate_that_forgets_the_normaliser(ref_probs, features, chosen, rejected, beta):
    return beta / 2 * torch.dot(features[chosen], features[chosen] - features[rejected])


def rate_of_the_margin(ref_probs, features, chosen, rejected, beta):
    return beta / 2 * (features[chosen] - features[rejected]).square().sum()


def rate_at_full_weight(ref_probs, features, chosen, rejected, beta):
    slope = features[chosen] - ref_probs @ features
    return beta * (slope @ (features[chosen] - features[rejected]))


def rate_without_strength(ref_probs, features, chosen, rejected, beta):
    slope = features[chosen] - ref_probs @ features
    return 0.5 * (slope @ (features[chosen] - features[rejected]))


def rate_of_the_loser(ref_probs, features, chosen, rejected, beta):
    slope = features[rejected] - ref_probs @ features
    return beta / 2 * (slope @ (features[chosen] - features[rejected]))


def rate_about_the_unweighted_mean(ref_probs, features, chosen, rejected, beta):
    slope = features[chosen] - features.mean(0)
    return beta / 2 * (slope @ (features[chosen] - features[rejected]))


def rate_of_ascent(ref_probs, features, chosen, rejected, beta):
    slope = features[chosen] - ref_probs @ features
    return beta / 2 * (slope @ (features[rejected] - features[chosen]))


def policy_divided_by_its_sum(ref_probs, rewards, lengths, beta):
    weights = ref_probs * (lengths * rewards / beta).exp()
    return weights / weights.sum()


def policy_of_sums(ref_probs, rewards, lengths, beta):
    weights = ref_probs * (rewards / beta).exp()
    return weights / weights.sum()


def policy_of_rewards_a_token(ref_probs, rewards, lengths, beta):
    weights = ref_probs * (rewards / (lengths * beta)).exp()
    return weights / weights.sum()


def policy_left_alone(ref_probs, rewards, lengths, beta):
    return (ref_probs.log() + lengths * rewards / beta).exp()


def searched(ref_probs, rewards, lengths, beta, halvings):
    low, high = -100.0, 100.0
    for _ in range(halvings):
        c = (low + high) / 2
        probs = ref_probs * (lengths * (rewards + c) / beta).exp()
        low, high = (low, c) if probs.sum() > 1 else (c, high)
    return probs


def gained_in_probability(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).softmax(0) - ref_probs


def gained_at_beta_one(ref_probs, rewards, beta):
    return rewards / beta - log_partition(ref_probs, rewards, 1.0)


def gained_with_z_added(ref_probs, rewards, beta):
    return rewards / beta + log_partition(ref_probs, rewards, beta)


def rate_of_probability(ref_probs, features, chosen, rejected, beta):
    slope = ref_probs[chosen] * (features[chosen] - ref_probs @ features)
    return beta / 2 * (slope @ (features[chosen] - features[rejected]))


def mean_without_reference(ref_probs, rewards, lengths, beta):
    uniform = torch.full_like(ref_probs, 1 / len(ref_probs))
    return searched(uniform, rewards, lengths, beta, 100)


def mean_searched_too_briefly(ref_probs, rewards, lengths, beta):
    return searched(ref_probs, rewards, lengths, beta, 25)


def rewards_against_the_first(group_wins):
    return group_wins[:, :, 0].log() - group_wins[:, 0].log()


def tilted(ref_probs, rewards, beta):
    weights = ref_probs * (rewards / beta).exp()
    return weights / weights.sum()


def labels_pooled(group_wins, shares, ref_probs, beta):
    pooled = (shares[:, None, None] * group_wins).sum(0)
    return tilted(ref_probs, pooled[:, 0].log() - pooled[0].log(), beta)


def counted_by_borda(group_wins, shares, ref_probs, beta):
    pooled = (shares[:, None, None] * group_wins).sum(0)
    return tilted(ref_probs, pooled.sum(1) / len(pooled), beta)


def policies_averaged(group_wins, shares, ref_probs, beta):
    rewards = rewards_against_the_first(group_wins)
    each = [share * tilted(ref_probs, r, beta) for share, r in zip(shares, rewards, strict=True)]
    return sum(each)


def groups_counted_alike(group_wins, shares, ref_probs, beta):
    return tilted(ref_probs, rewards_against_the_first(group_wins).mean(0), beta)


def reference_forgotten(group_wins, shares, ref_probs, beta):
    rewards = shares @ rewards_against_the_first(group_wins)
    return tilted(torch.ones_like(ref_probs), rewards, beta)


def losers_rewarded(group_wins, shares, ref_probs, beta):
    return tilted(ref_probs, -(shares @ rewards_against_the_first(group_wins)), beta)


MISTAKES = {
    "13.1": {
        "Log Z is missing": gained_by_reward_alone,
        "units of reward": gained_in_units_of_reward,
        "Jensen": gained_over_the_average,
        "logarithm of Z": gained_less_z,
        "One beta too many": gained_with_beta_twice,
        "log pi* itself": log_of_the_optimum,
        "This is the gain in probability": gained_in_probability,
        "Inside Z the rewards are not divided by beta": gained_at_beta_one,
        "log Z is added": gained_with_z_added,
    },
    "13.2": {
        "mean feature is missing": rate_that_forgets_the_normaliser,
        "rate of the margin": rate_of_the_margin,
        "a half": rate_at_full_weight,
        "Beta is missing": rate_without_strength,
        "rejected answer's rate": rate_of_the_loser,
        "weigh each answer": rate_about_the_unweighted_mean,
        "reversed": rate_of_ascent,
        "This is the rate of the probability": rate_of_probability,
    },
    "13.3": {
        "divides by a sum": policy_divided_by_its_sum,
        "DPO on sums": policy_of_sums,
        "wrong side": policy_of_rewards_a_token,
        "do not sum to 1": policy_left_alone,
        "The reference is missing": mean_without_reference,
        "nearly right": mean_searched_too_briefly,
    },
    "13.4": {
        "pools the labels": labels_pooled,
        "Borda": counted_by_borda,
        "mean of the groups' policies": policies_averaged,
        "shares are missing": groups_counted_alike,
        "reference is missing": reference_forgotten,
        "exchanged": losers_rewarded,
    },
}

"""Plausible wrong answers to the exercises of chapter 09, and words of the sentence each gets."""

import torch


def advantage_of_the_reward_alone(rewards, logps, ref_logps, log_z, beta):
    return rewards - log_z * beta


def advantage_without_v(rewards, logps, ref_logps, log_z, beta):
    return rewards + beta * (ref_logps - logps)


def advantage_that_likes_kl(rewards, logps, ref_logps, log_z, beta):
    return rewards - beta * (log_z + ref_logps - logps)


def advantage_with_log_z_as_value(rewards, logps, ref_logps, log_z, beta):
    return rewards - log_z + beta * (ref_logps - logps)


def advantage_with_entropy(rewards, logps, ref_logps, log_z, beta):
    return rewards - beta * (logps + log_z)


def gap_by_max(reward, kl, betas, best_values):
    return max((best_values - reward + kl * betas).tolist())


def gap_minus_kl(reward, kl, betas, best_values):
    return min((best_values - reward - kl * betas).tolist())


def gap_of_objectives(reward, kl, betas, best_values):
    return (best_values - reward).min()


def gap_above(reward, kl, betas, best_values):
    return reward - (betas * kl + best_values).min()


def gap_of_one_line(reward, kl, betas, best_values):
    return betas[0] * kl + best_values[0] - reward


def best_with_ties_twice(ref_probs, rewards, n):
    at_most = (ref_probs * (rewards[None] <= rewards[:, None])).sum(1)
    under = (ref_probs * (rewards[None] < rewards[:, None])).sum(1)
    return at_most.pow(n) - under.pow(n)


def best_with_even_ties(ref_probs, rewards, n):
    twice = best_with_ties_twice(ref_probs, rewards, n)
    return twice / (rewards[None] == rewards[:, None]).sum(1)


def worst(ref_probs, rewards, n):
    _, group = rewards.unique(return_inverse=True)
    mass = torch.stack([ref_probs[group == k].sum() for k in range(int(group.max()) + 1)])
    at_least = mass.flip(0).cumsum(0).flip(0)
    wins = at_least**n - (at_least - mass) ** n
    return ref_probs / mass[group] * wins[group]


def power_of_the_cdf(ref_probs, rewards, n):
    return (ref_probs * (rewards[None] <= rewards[:, None])).sum(1) ** n


def boltzmann(ref_probs, rewards, n):
    weights = ref_probs * (n * rewards).exp()
    return weights / weights.sum()


def at_most(ref_probs, rewards):
    return torch.stack([ref_probs[rewards <= x].sum() for x in rewards])


def below(ref_probs, rewards):
    return torch.stack([ref_probs[rewards < x].sum() for x in rewards])


def kl_without_beta(rewards, logps, ref_logps, log_z, beta):
    return rewards - (logps - ref_logps) - beta * log_z


def times_logp(rewards, logps, ref_logps, log_z, beta):
    return (rewards - beta * (logps - ref_logps) - beta * log_z) * logps


def gap_to_the_mean_line(reward, kl, betas, best_values):
    return (best_values + betas * kl).mean() - reward


def gap_at_the_root(reward, kl, betas, best_values):
    return (best_values + betas * kl**0.5).min() - reward


def density(ref_probs, rewards, n):
    return n * ref_probs * at_most(ref_probs, rewards) ** (n - 1)


def ties_by_position(ref_probs, rewards, n):
    order = rewards.argsort(stable=True)
    up_to = ref_probs[order].cumsum(0)
    found = torch.zeros_like(ref_probs)
    found[order] = up_to**n - (up_to - ref_probs[order]) ** n
    return found


def in_order_of_reward(ref_probs, rewards, n):
    high, low = at_most(ref_probs, rewards), below(ref_probs, rewards)
    found = (high**n - low**n) / (high - low) * ref_probs
    return found[rewards.argsort(stable=True)]


MISTAKES = {
    "9.1": {
        "KL term is missing": advantage_of_the_reward_alone,
        "baseline is missing": advantage_without_v,
        "wrong sign": advantage_that_likes_kl,
        "in nats": advantage_with_log_z_as_value,
        "reference is missing": advantage_with_entropy,
        "Beta is missing before the log-ratio": kl_without_beta,
        "This is the surrogate loss": times_logp,
    },
    "9.2": {
        "highest line": gap_by_max,
        "wrong sign": gap_minus_kl,
        "KL is missing": gap_of_objectives,
        "reversed": gap_above,
        "first beta only": gap_of_one_line,
        "The lines are averaged": gap_to_the_mean_line,
        "The root of the KL is taken": gap_at_the_root,
    },
    "9.3": {
        "above 1": best_with_ties_twice,
        "shared evenly": best_with_even_ties,
        "worst of n": worst,
        "all n draws": power_of_the_cdf,
        "ranks alone": boltzmann,
        "This is the formula for a continuum, n p F^(n-1)": density,
        "Of equal rewards the later answer wins here": ties_by_position,
        "The probabilities are right and sorted by reward": in_order_of_reward,
    },
}

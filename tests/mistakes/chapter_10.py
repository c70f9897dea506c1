"""Plausible wrong answers to the exercises of chapter 10, and a word of each one's sentence."""

import math

import torch


def per_group(formula):
    """An answer that does one group at a time, and 0 for a group without a right answer."""

    def answer(rewards):
        rows = [formula(row) if row.sum() > 0 else torch.zeros_like(row) for row in rewards]
        return torch.stack(rows)

    return answer


def maxrl_without_a_guard(rewards):
    return rewards / rewards.mean(1, keepdim=True) - 1


def maxrl_over_the_batch(rewards):
    return rewards / rewards.mean() - 1


def maxrl_like_grpo(row):
    spread = (row - row.mean()).square().mean().sqrt()
    return (row - row.mean()) / spread if spread > 0 else 0 * row


def maxrl_with_leave_one_out(row):
    others = (row.sum() - row) / (len(row) - 1)
    return (row - others) / row.mean()


def pass_plugged_in(n, c, k):
    wrong = (n - c) / n
    return 1 - wrong**k


def pass_at_one(n, c, k):
    return 1 - math.comb(n - c, 1) / n


def pass_all_fail(n, c, k):
    chance = 1.0
    for i in range(k):
        chance *= max(n - c - i, 0) / (n - i)
    return chance


def pass_all_right(n, c, k):
    chance = 1.0
    for i in range(k):
        chance *= max(c - i, 0) / (n - i)
    return chance


def pass_exactly_one(n, c, k):
    return k * c * math.perm(n - c, k - 1) / math.perm(n, k)


def pass_added_up(n, c, k):
    return sum(c / n for _ in range(k))


def pass_of_all(n, c, k):
    return 1.0 if c else 0.0


def ratio_of_completions(logps, old_logps, mask):
    return torch.where(mask > 0, (logps - old_logps).exp(), 1.0).prod(1)


def ratio_over_all_positions(logps, old_logps, mask):
    whole = ratio_of_completions(logps, old_logps, mask)
    return whole ** (1 / mask.shape[1])


def ratio_as_mean_of_ratios(logps, old_logps, mask):
    rows = zip((logps - old_logps).exp(), mask > 0, strict=True)
    return torch.stack([ratios[inside].mean() for ratios, inside in rows])


def ratio_in_nats(logps, old_logps, mask):
    return ratio_of_completions(logps, old_logps, mask).log() / mask.sum(1)


def ratio_upside_down(logps, old_logps, mask):
    return ratio_of_completions(old_logps, logps, mask) ** (1 / mask.sum(1))


def ratio_with_mean_length(logps, old_logps, mask):
    return ratio_of_completions(logps, old_logps, mask) ** (len(mask) / mask.sum())


MISTAKES = {
    "10.1": {
        "The mean is not subtracted": per_group(lambda row: row / row.mean()),
        "0 divided by 0": maxrl_without_a_guard,
        "divides by the standard deviation": per_group(maxrl_like_grpo),
        "the division is missing": per_group(lambda row: row - row.mean()),
        "number of right answers": per_group(lambda row: (row - row.mean()) / row.sum()),
        "The mean is over all groups": maxrl_over_the_batch,
        "The mean of the others is subtracted": per_group(maxrl_with_leave_one_out),
    },
    "10.2": {
        "puts c/n in the place of p": pass_plugged_in,
        "the share of right answers": pass_at_one,
        "the probability that all k fail": pass_all_fail,
        "the probability that all k are right": pass_all_right,
        "exactly one right answer": pass_exactly_one,
        "adds up the chances": pass_added_up,
        "any right answer among all n": pass_of_all,
    },
    "10.3": {
        "the root of their length is missing": ratio_of_completions,
        "over all positions": ratio_over_all_positions,
        "the arithmetic mean": ratio_as_mean_of_ratios,
        "the exponential is missing": ratio_in_nats,
        "upside down": ratio_upside_down,
        "mean length of the batch": ratio_with_mean_length,
    },
}

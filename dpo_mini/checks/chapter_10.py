"""Chapter 10: follow the policy gradient to today."""

import math

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, require
from dpo_mini.checks.theorems import every_draw

GROUPS = [
    torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64),
    torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64),
    torch.tensor([[0.0, 0, 0], [0, 1, 0]], dtype=torch.float64),
]
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
LOGPS = torch.tensor(
    [[-0.4, -1.1, -0.7, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0, 0.0], [-0.3, -0.9, -1.5, -0.2, -0.8]],
    dtype=torch.float64,
)
OLD = torch.tensor(
    [[-0.9, -1.0, -0.2, 0.0, 0.0], [-1.2, 0.0, 0.0, 0.0, 0.0], [-0.6, -0.4, -1.1, -0.7, -0.1]],
    dtype=torch.float64,
)


def judge_maxrl_advantages(maxrl_advantages):
    """10.1: the mean update over every group is a sum of gradients of pass@k, up to k = G - 1."""
    silent = torch.zeros(2, 5, dtype=torch.float64)
    agree(maxrl_advantages(silent), 0.0, "a group without a right answer has an advantage")
    agree(maxrl_advantages(silent + 1), 0.0, "a group without a wrong answer has an advantage")
    for p, size in ((0.3, 4), (0.1, 6), (0.7, 3), (0.5, 2)):
        probs = torch.tensor([1 - p, p], dtype=torch.float64)
        outcomes, chances = every_draw(probs, size)
        rewards = outcomes.double()
        advantages = maxrl_advantages(rewards)
        agree(advantages.sum(1), 0.0, "the advantages of a group do not sum to 0")
        # The score of a right answer, by its log-odds, is 1 - p, and p has the slope p (1 - p).
        slope = chances @ (advantages * (rewards - p)).mean(1) / (p * (1 - p))
        series = sum((1 - p) ** (k - 1) for k in range(1, size))
        agree(slope, series, "over all groups the mean update has not MaxRL's weight")


def _guarded(values, means):
    return torch.where(means > 0, values / means.clamp(min=1e-300), torch.zeros_like(values))


def _maxrl_not_centred(rewards):
    """The mean is not subtracted: wrong answers must be pushed down, and all must sum to 0."""
    means = rewards.mean(1, keepdim=True)
    return _guarded(rewards, means)


def _maxrl_unguarded(rewards):
    """A group without a right answer gives 0 divided by 0: there the advantages are 0."""
    means = rewards.mean(1, keepdim=True)
    return (rewards - means) / means


def _maxrl_by_deviation(rewards):
    """This divides by the standard deviation, which is GRPO: MaxRL divides by the mean."""
    spread = rewards.std(1, correction=0, keepdim=True)
    return _guarded(rewards - rewards.mean(1, keepdim=True), spread)


def _maxrl_not_divided(rewards):
    """This is the reward minus the mean, which is Dr. GRPO: the division is missing."""
    return rewards - rewards.mean(1, keepdim=True)


def _maxrl_by_count(rewards):
    """This divides by the number of right answers: it is their share, the mean of the rewards."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return _guarded(centred, rewards.sum(1, keepdim=True))


def _maxrl_of_all_groups(rewards):
    """The mean is over all groups: each group has a prompt and a success rate of its own."""
    means = rewards.mean().expand(len(rewards), 1)
    return _guarded(rewards - means, means)


def _maxrl_others_subtracted(rewards):
    """The mean of the others is subtracted, as in RLOO: here it is the mean of all."""
    size = rewards.shape[1]
    means = rewards.mean(1, keepdim=True)
    return _guarded((rewards - means) * size / (size - 1), means)


def judge_pass_at_k(pass_at_k):
    """10.2: averaged over how many of n are right, the estimate is 1 - (1 - p)^k."""
    for n, k in ((5, 2), (8, 4), (6, 6), (7, 1), (10, 3)):
        estimates = torch.stack([pass_at_k(n, c, k) for c in range(n + 1)])
        agree(estimates[0], 0.0, "without a right answer the estimate is 0")
        require(estimates.max() <= 1 + 1e-9, "an estimate of a probability is above 1")
        for p in (0.05, 0.3, 0.8):
            chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
            mean = torch.tensor(chances, dtype=torch.float64) @ estimates
            agree(mean, 1 - (1 - p) ** k, "over all draws the estimate does not average pass@k")


def _plugged_in(n, c, k):
    """This puts c/n in the place of p: the mean of a power is not the power of the mean."""
    return 1 - (1 - c / n) ** k


def _share_right(n, c, k):
    """This is the share of right answers, pass@1: k of them are drawn."""
    return c / n


def _all_fail(n, c, k):
    """This is the probability that all k fail: pass@k is that at least one does not."""
    return math.comb(n - c, k) / math.comb(n, k)


def _all_right(n, c, k):
    """This is the probability that all k are right: one of them is enough."""
    return math.comb(c, k) / math.comb(n, k)


def _exactly_one(n, c, k):
    """This counts draws with exactly one right answer: two or more count as well."""
    return c * math.comb(n - c, k - 1) / math.comb(n, k)


def _k_times_share(n, c, k):
    """This adds up the chances of k tries: several of them may succeed at once."""
    return k * c / n


def _first_k(n, c, k):
    """This asks whether there is any right answer among all n: only k are drawn."""
    return float(c > 0)


def judge_sequence_ratio(sequence_ratio):
    """10.3: to the power of the length it is the ratio of the completions' probabilities."""
    for seed, lengths in enumerate(([3, 1, 5], [2, 4], [6, 1, 1, 3])):
        width = max(lengths) + 1
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).double()
        logps, old = -draws(2, len(lengths), width, seed=seed).abs()
        ratio = sequence_ratio(logps * mask, old * mask, mask)
        exact = ((logps - old) * mask).sum(1).exp()
        agree(
            ratio ** torch.tensor(lengths),
            exact,
            "its power |y| is not the ratio of the two completion probabilities",
        )
        padded = sequence_ratio(logps, old, mask)
        agree(padded, ratio, "what stands on padding changes the ratio")
        agree(sequence_ratio(logps, logps, mask), 1.0, "equal policies do not have the ratio 1")


def _whole_ratio(logps, old_logps, mask):
    """This is the ratio of whole completions: the root of their length is missing."""
    return ((logps - old_logps) * mask).sum(1).exp()


def _over_padding(logps, old_logps, mask):
    """The mean is taken over all positions: padding is no token and does not count."""
    return ((logps - old_logps) * mask).mean(1).exp()


def _arithmetic_mean(logps, old_logps, mask):
    """This is the arithmetic mean of the token ratios: take the mean of their logarithms."""
    return ((logps - old_logps).exp() * mask).sum(1) / mask.sum(1)


def _log_of_ratio(logps, old_logps, mask):
    """This is the logarithm of the ratio: the exponential is missing."""
    return ((logps - old_logps) * mask).sum(1) / mask.sum(1)


def _old_over_new(logps, old_logps, mask):
    """The ratio is upside down: the new probability is divided by the old one."""
    return (((old_logps - logps) * mask).sum(1) / mask.sum(1)).exp()


def _mean_over_batch(logps, old_logps, mask):
    """The sum is divided by the mean length of the batch: each completion has its own length."""
    return (((logps - old_logps) * mask).sum(1) / mask.sum(1).mean()).exp()


EXERCISES = [
    Exercise(
        "10.1",
        [(rewards,) for rewards in GROUPS],
        judge_maxrl_advantages,
        [
            _maxrl_not_centred,
            _maxrl_unguarded,
            _maxrl_by_deviation,
            _maxrl_not_divided,
            _maxrl_by_count,
            _maxrl_of_all_groups,
            _maxrl_others_subtracted,
        ],
        shape=lambda rewards: rewards.shape,
    ),
    Exercise(
        "10.2",
        [(5, 2, 2), (8, 1, 4), (6, 3, 3), (10, 4, 3)],
        judge_pass_at_k,
        [
            _plugged_in,
            _share_right,
            _all_fail,
            _all_right,
            _exactly_one,
            _k_times_share,
            _first_k,
        ],
    ),
    Exercise(
        "10.3",
        [(LOGPS, OLD, MASK), (OLD, LOGPS / 2, MASK)],
        judge_sequence_ratio,
        [
            _whole_ratio,
            _over_padding,
            _arithmetic_mean,
            _log_of_ratio,
            _old_over_new,
            _mean_over_batch,
        ],
        shape=lambda logps, *_: logps.shape[:1],
    ),
]

"""Chapter 09: compare PPO with DPO."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, other_instances, random_policies
from dpo_mini.checks.theorems import every_draw, kl, objective, optimum

REF_PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)
LOG_Z = torch.tensor([1.1, 1.1, 0.6, 0.6], dtype=torch.float64)  # of two prompts
LOGPS = torch.tensor([0.7, 0.1, 0.05, 0.15], dtype=torch.float64).log()
TIED = torch.tensor([0.5, -1.0, 0.5, 0.5, 2.0], dtype=torch.float64)
TIED_PROBS = torch.tensor([0.1, 0.35, 0.3, 0.05, 0.2], dtype=torch.float64)
BETAS = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float64)
BEST_VALUES = torch.tensor([0.82, 0.71, 0.60, 0.53], dtype=torch.float64)


def judge_advantages(advantages):
    """9.1: with them the policy gradient is that of J, and their mean is what J lacks to J*."""
    for ref_probs, rewards, beta in other_instances(seed=0):
        ref_logps = ref_probs.log()
        log_z = (ref_logps + rewards / beta).logsumexp(1, keepdim=True)
        best = optimum(ref_probs, rewards, beta)
        for start in (best, ref_probs, random_policies(ref_probs, seed=1)):
            logits = start.log().requires_grad_()
            logps = logits.log_softmax(1)
            objectives = objective(logps.exp(), ref_probs, rewards, beta)
            (slopes,) = torch.autograd.grad(objectives.sum(), logits)
            tables = rewards, logps.detach(), ref_logps, log_z.expand_as(logps)
            weights = advantages(*(table.flatten() for table in tables), beta).reshape(logps.shape)
            probs = logps.detach().exp()
            means = (probs * weights).sum(1, keepdim=True)
            if start is best:
                agree(
                    weights,
                    0.0,
                    "at the optimal policy a weight is not 0: its variance does not vanish",
                )
            agree(
                probs * (weights - means),
                slopes,
                "the policy gradient with these weights, averaged over every answer, is not the "
                "gradient of the expected reward less beta times the KL",
            )
            agree(
                means[:, 0],
                objectives - objective(best, ref_probs, rewards, beta),
                "the mean of your weights under the policy is not J - J*, what the objective lacks "
                "to its optimum",
            )


def _without_kl(rewards, logps, ref_logps, log_z, beta):
    """The KL term is missing: the reward alone is not the same for every answer at the optimum."""
    return rewards - beta * log_z


def _without_baseline(rewards, logps, ref_logps, log_z, beta):
    """The baseline is missing: at the optimum this is a constant, but not 0."""
    return rewards - beta * (logps - ref_logps)


def _kl_rewarded(rewards, logps, ref_logps, log_z, beta):
    """The KL term has the wrong sign: this pays the policy for leaving the reference."""
    return rewards + beta * (logps - ref_logps) - beta * log_z


def _baseline_in_nats(rewards, logps, ref_logps, log_z, beta):
    """The baseline is in nats: log Z becomes a reward when multiplied by beta."""
    return rewards - beta * (logps - ref_logps) - log_z


def _absolute_entropy(rewards, logps, ref_logps, log_z, beta):
    """The reference is missing: the KL is measured from it, not from nothing."""
    return rewards - beta * logps - beta * log_z


def _kl_without_beta(rewards, logps, ref_logps, log_z, beta):
    """Beta is missing before the log-ratio: nats are subtracted from units of reward."""
    return rewards - (logps - ref_logps) - beta * log_z


def _times_logp(rewards, logps, ref_logps, log_z, beta):
    """This is the surrogate loss: the weight alone, before the log-probability, is asked for."""
    return (rewards - beta * (logps - ref_logps) - beta * log_z) * logps


def judge_frontier_gap(frontier_gap):
    """9.2: lifted by the gap, a policy beats no known J*, and reaches one of them."""
    for n, ((ref_probs, _), (rewards, _), _) in enumerate(other_instances(seed=1), 1):
        betas = draws(n, seed=n).exp()
        optima = optimum(ref_probs, rewards, betas[:, None])
        best_values = objective(optima, ref_probs, rewards, betas)
        others = [random_policies(ref_probs, seed) for seed in range(4)]
        for probs in [ref_probs, *optima, *others]:
            reward, nats = (probs @ rewards).item(), kl(probs, ref_probs).item()
            gap = frontier_gap(reward, nats, betas, best_values)
            surplus = (reward + gap - betas * nats - best_values).max()
            agree(
                surplus.clamp(min=0),
                0.0,
                "lifted by your gap, the policy is better at some beta than the best there is",
            )
            agree(
                surplus,
                0.0,
                "lifted by your gap, the policy is still below J* at every beta: the lines leave "
                "room for more",
            )


def _gap_to_the_highest(reward, kl, betas, best_values):
    """This is the distance to the highest line: the policy is below all of them, and the lowest
    tells the most.
    """
    return float((best_values + betas * kl).max()) - reward


def _gap_kl_subtracted(reward, kl, betas, best_values):
    """The KL has the wrong sign: on the plane a line rises with the KL that a policy spends."""
    return float((best_values - betas * kl).min()) - reward


def _gap_without_kl(reward, kl, betas, best_values):
    """The policy's KL is missing: J* is an objective, the reward less beta times the KL."""
    return float(best_values.min()) - reward


def _gap_turned_round(reward, kl, betas, best_values):
    """The sign is reversed: a policy below the frontier has a positive gap."""
    return reward - float((best_values + betas * kl).min())


def _gap_of_the_first(reward, kl, betas, best_values):
    """This uses the first beta only: every beta is a line, and another may be lower."""
    return float(best_values[0] + betas[0] * kl) - reward


def _gap_to_the_mean_line(reward, kl, betas, best_values):
    """The lines are averaged: each of them is a ceiling, and the lowest tells the most."""
    return float((best_values + betas * kl).mean()) - reward


def _gap_at_the_root(reward, kl, betas, best_values):
    """The root of the KL is taken: plots show it, and a line is straight in the KL itself."""
    return float((best_values + betas * kl**0.5).min()) - reward


def judge_best_of_n(best_of_n):
    """9.3: the table that the enumeration of all draws gives; the first of equals is kept."""
    tied = torch.tensor([0.3, 0.3, -0.7, 0.3, -0.7, 1.2], dtype=torch.float64)
    for (ref_probs, _), (rewards, _), _ in other_instances(seed=2):
        for kept_for in (rewards, tied[: len(rewards)].roll(1)):
            for n in (1, 2, 3):
                agree(
                    best_of_n(ref_probs, kept_for, n),
                    _best_of_all_draws(ref_probs, kept_for, n),
                    "over all possible draws an answer is the one kept with another probability",
                )


def _best_of_all_draws(ref_probs, rewards, n):
    kept = torch.zeros_like(ref_probs)
    for drawn, chance in zip(*every_draw(ref_probs, n), strict=True):
        best = max(drawn.tolist(), key=lambda y: float(rewards[y]))
        kept[best] += chance
    return kept


def _ties_counted_again(ref_probs, rewards, n):
    """Where rewards are equal the sum is above 1: the answers of a tie share one probability."""
    at_most = torch.stack([ref_probs[rewards <= r].sum() for r in rewards])
    below = torch.stack([ref_probs[rewards < r].sum() for r in rewards])
    return at_most**n - below**n


def _ties_shared_evenly(ref_probs, rewards, n):
    """A tie is shared evenly here: the draws are the reference's, so share it as the reference
    does.
    """
    same = torch.stack([(rewards == r).sum() for r in rewards])
    return _ties_counted_again(ref_probs, rewards, n) / same


def _worst_of_n(ref_probs, rewards, n):
    """This is the worst of n: the draw that is kept has the largest reward."""
    at_least = torch.stack([ref_probs[rewards >= r].sum() for r in rewards])
    above = torch.stack([ref_probs[rewards > r].sum() for r in rewards])
    return (at_least**n - above**n) * ref_probs / (at_least - above)


def _at_most(ref_probs, rewards, n):
    """This is the probability that all n draws have at most this reward: subtract that all n are
    below it.
    """
    return torch.stack([ref_probs[rewards <= r].sum() ** n for r in rewards])


def _tilted(ref_probs, rewards, n):
    """This tilts the reference by exp(n r): the best of n looks at ranks alone, not at how large a
    reward is.
    """
    return (ref_probs.log() + n * rewards).softmax(0)


def _density(ref_probs, rewards, n):
    """This is the formula for a continuum, n p F^(n-1): here two draws may be the same answer."""
    at_most = torch.stack([ref_probs[rewards <= r].sum() for r in rewards])
    return n * ref_probs * at_most ** (n - 1)


def _ties_by_position(ref_probs, rewards, n):
    """Of equal rewards the later answer wins here: what was drawn first is kept."""
    order = rewards.argsort(stable=True)
    total = ref_probs[order].cumsum(0)
    return (total**n - (total - ref_probs[order]) ** n)[order.argsort()]


def _in_order_of_reward(ref_probs, rewards, n):
    """The probabilities are right and sorted by reward: the order is that of the answers."""
    at_most = torch.stack([ref_probs[rewards <= r].sum() for r in rewards])
    below = torch.stack([ref_probs[rewards < r].sum() for r in rewards])
    return ((at_most**n - below**n) * ref_probs / (at_most - below))[rewards.argsort(stable=True)]


EXERCISES = (
    Exercise(
        "9.1",
        cases=(
            (REWARDS, LOGPS, REF_PROBS.log(), LOG_Z, 0.5),
            (REWARDS.flip(0), REF_PROBS.log(), LOGPS, -LOG_Z, 2.0),
        ),
        judge=judge_advantages,
        mistakes=(
            _without_kl,
            _without_baseline,
            _kl_rewarded,
            _baseline_in_nats,
            _absolute_entropy,
            _kl_without_beta,
            _times_logp,
        ),
        shape=lambda rewards, logps, ref_logps, log_z, beta: rewards.shape,
    ),
    Exercise(
        "9.2",
        cases=(
            (0.55, 0.2, BETAS, BEST_VALUES),
            (0.4, 0.9, BETAS, BEST_VALUES),
            (0.3, 0.05, BETAS, BEST_VALUES),
        ),
        judge=judge_frontier_gap,
        mistakes=(
            _gap_to_the_highest,
            _gap_kl_subtracted,
            _gap_without_kl,
            _gap_turned_round,
            _gap_of_the_first,
            _gap_to_the_mean_line,
            _gap_at_the_root,
        ),
    ),
    Exercise(
        "9.3",
        cases=((REF_PROBS, REWARDS, 3), (TIED_PROBS, TIED, 4)),
        judge=judge_best_of_n,
        mistakes=(
            _ties_counted_again,
            _ties_shared_evenly,
            _worst_of_n,
            _at_most,
            _tilted,
            _density,
            _ties_by_position,
            _in_order_of_reward,
        ),
        shape=lambda ref_probs, rewards, n: ref_probs.shape,
    ),
)

"""Chapter 09: compare PPO with DPO."""

import torch

from dpo_mini.checks import Exercise

REF_PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)
LOG_Z = torch.tensor([1.1, 1.1, 0.6, 0.6], dtype=torch.float64)  # of two prompts
LOGPS = torch.tensor([0.7, 0.1, 0.05, 0.15], dtype=torch.float64).log()
TIED = torch.tensor([0.5, -1.0, 0.5, 0.5, 2.0], dtype=torch.float64)
TIED_PROBS = torch.tensor([0.1, 0.35, 0.3, 0.05, 0.2], dtype=torch.float64)
BETAS = torch.tensor([0.25, 0.5, 1.0, 2.0], dtype=torch.float64)
BEST_VALUES = torch.tensor([0.82, 0.71, 0.60, 0.53], dtype=torch.float64)


def advantages(rewards, logps, ref_logps, log_z, beta):
    """9.1: the return less V*, `[B]`, reward units."""
    returns = rewards + beta * ref_logps - beta * logps
    return returns - beta * log_z


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


def frontier_gap(reward, kl, betas, best_values):
    """9.2: the distance to the lowest of the lines, reward units."""
    return min(j + b * kl for j, b in zip(best_values.tolist(), betas.tolist(), strict=True)) - (
        reward
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
    """The sign is turned round: a policy below the frontier has a positive gap."""
    return -frontier_gap(reward, kl, betas, best_values)


def _gap_of_the_first(reward, kl, betas, best_values):
    """This uses the first beta only: every beta is a line, and another may be lower."""
    return float(best_values[0] + betas[0] * kl) - reward


def best_of_n(ref_probs, rewards, n):
    """9.3: the distribution of the best of n draws, `[Y]`."""
    probs = torch.zeros_like(ref_probs)
    for y in range(len(rewards)):
        tied = ref_probs[rewards == rewards[y]].sum()
        lower = ref_probs[rewards < rewards[y]].sum()
        probs[y] = ((lower + tied) ** n - lower**n) * ref_probs[y] / tied
    return probs


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
    return best_of_n(ref_probs, -rewards, n)


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


EXERCISES = (
    Exercise(
        "9.1",
        cases=(
            (REWARDS, LOGPS, REF_PROBS.log(), LOG_Z, 0.5),
            (REWARDS.flip(0), REF_PROBS.log(), LOGPS, -LOG_Z, 2.0),
        ),
        answer=advantages,
        mistakes=(
            _without_kl,
            _without_baseline,
            _kl_rewarded,
            _baseline_in_nats,
            _absolute_entropy,
        ),
    ),
    Exercise(
        "9.2",
        cases=((0.55, 0.2, BETAS, BEST_VALUES), (0.4, 0.9, BETAS, BEST_VALUES)),
        answer=frontier_gap,
        mistakes=(
            _gap_to_the_highest,
            _gap_kl_subtracted,
            _gap_without_kl,
            _gap_turned_round,
            _gap_of_the_first,
        ),
    ),
    Exercise(
        "9.3",
        cases=((REF_PROBS, REWARDS, 3), (TIED_PROBS, TIED, 4)),
        answer=best_of_n,
        mistakes=(
            _ties_counted_again,
            _ties_shared_evenly,
            _worst_of_n,
            _at_most,
            _tilted,
        ),
    ),
)

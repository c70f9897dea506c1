"""Models of a comparison: the probability of an outcome given rewards, and seeded draws from it."""

import math

import torch
from torch import Tensor

from dpo_mini.arguments import (
    check_finite,
    check_floats,
    check_generator,
    check_integers,
    check_positive,
)

__all__ = [
    "bradley_terry_prob",
    "thurstone_prob",
    "davidson_probs",
    "plackett_luce_logp",
    "sample_bradley_terry",
    "sample_thurstone",
    "sample_plackett_luce",
]


def bradley_terry_prob(rewards_a: Tensor, rewards_b: Tensor) -> Tensor:
    r"""$P(a \succ b) = \sigma(r_a - r_b)$.

    Args:
      rewards_a, rewards_b: the same shape, finite.
    Returns:
      the same shape, in 0..1.
    Raises:
      ValueError: shapes or dtypes differ, or a reward is not finite.
    Source: Bradley & Terry 1952; Rafailov et al. 2023, Eq. 1, arXiv:2305.18290.
    """
    return _margins(rewards_a, rewards_b).sigmoid()


def thurstone_prob(rewards_a: Tensor, rewards_b: Tensor) -> Tensor:
    r"""$P(a \succ b) = \Phi((r_a - r_b)/\sqrt2)$: unit Gaussian noise on each reward (Case V).

    Args and errors are those of `bradley_terry_prob`.

    Source: Thurstone 1927.
    """
    return torch.special.ndtr(_margins(rewards_a, rewards_b) / math.sqrt(2))


def davidson_probs(rewards_a: Tensor, rewards_b: Tensor, *, tie_weight: float) -> Tensor:
    r"""Bradley-Terry with ties, in the proportion $e^{r_a} : \nu e^{(r_a+r_b)/2} : e^{r_b}$.

    Args:
      rewards_a, rewards_b: the same shape, finite.
      tie_weight: nu > 0; between equal rewards a tie has probability nu / (2 + nu).
    Returns:
      that shape with a last axis of 3: P(a wins), P(tie), P(b wins).
    Raises:
      ValueError: shapes or dtypes differ, a reward is not finite, or `tie_weight <= 0`.
    Source: Davidson 1970.
    """
    check_positive("tie_weight", tie_weight)
    half = _margins(rewards_a, rewards_b) / 2
    tie = torch.full_like(half, math.log(tie_weight))
    return torch.stack([half, tie, -half], dim=-1).softmax(-1)


def plackett_luce_logp(rewards: Tensor, ranking: Tensor) -> Tensor:
    r"""$\log P(\tau) = \sum_k [r_{\tau(k)} - \log\sum_{j\ge k} e^{r_{\tau(j)}}]$.

    Args:
      rewards: `[B, K]`, K >= 2, finite.
      ranking: `[B, K]` int64, the items from best to worst: a permutation of 0..K-1 in each row.
    Returns:
      `[B]`, nats.
    Raises:
      ValueError: shapes differ, K < 2, a row is not a permutation, or a reward is not finite.
    Source: Plackett 1975; Rafailov et al. 2023, Eq. 18, arXiv:2305.18290.
    """
    _check_listed(rewards)
    check_integers("ranking", ranking, "[B, K]")
    if ranking.shape != rewards.shape:
        raise ValueError(
            f"ranking: got shape {list(ranking.shape)}, takes {list(rewards.shape)} like rewards"
        )
    n_items = rewards.shape[1]
    in_order = torch.arange(n_items, device=ranking.device)
    if (ranking.sort(-1).values != in_order).any():
        raise ValueError(f"ranking: got a row that is not a permutation of 0..{n_items - 1}")
    ranked = rewards.gather(1, ranking)
    log_p = torch.zeros_like(ranked[:, 0])
    for k in range(n_items - 1):  # the last item is chosen with probability 1
        log_p = log_p + ranked[:, k] - ranked[:, k:].logsumexp(-1)
    return log_p


def sample_bradley_terry(
    rewards_a: Tensor, rewards_b: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Draw who wins each comparison.

    Args:
      rewards_a, rewards_b: as in `bradley_terry_prob`.
      generator: draws the winners.
    Returns:
      the same shape, bool, True where a wins.
    Raises:
      ValueError: as in `bradley_terry_prob`.
    """
    return _bernoulli(bradley_terry_prob(rewards_a, rewards_b), generator)


def sample_thurstone(rewards_a: Tensor, rewards_b: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw who wins each comparison, by `thurstone_prob`; the rest as in `sample_bradley_terry`."""
    return _bernoulli(thurstone_prob(rewards_a, rewards_b), generator)


def sample_plackett_luce(rewards: Tensor, *, generator: torch.Generator) -> Tensor:
    """Draw a ranking of each row of `rewards` `[B, K]`: int64 `[B, K]`, best to worst.

    Sorting rewards plus standard Gumbel noise is a draw from Plackett-Luce (Yellott 1977).

    Args:
      rewards: `[B, K]`, K >= 2, finite.
      generator: draws the noise.
    Returns:
      `[B, K]` int64, as `plackett_luce_logp` takes it.
    Raises:
      ValueError: K < 2, or a reward is not finite.
    """
    _check_listed(rewards)
    check_generator(generator)
    exponential = torch.empty_like(rewards).exponential_(generator=generator)
    return (rewards - exponential.log()).argsort(-1, descending=True)


def _margins(rewards_a: Tensor, rewards_b: Tensor) -> Tensor:
    check_floats("[...]", rewards_a=rewards_a, rewards_b=rewards_b)
    check_finite(rewards_a=rewards_a, rewards_b=rewards_b)
    return rewards_a - rewards_b


def _check_listed(rewards: Tensor) -> None:
    check_floats("[B, K]", rewards=rewards)
    check_finite(rewards=rewards)
    if rewards.shape[1] < 2:
        raise ValueError(f"rewards: got {rewards.shape[1]} item a row, takes >= 2")


def _bernoulli(probs: Tensor, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    uniform = torch.rand(probs.shape, dtype=probs.dtype, device=probs.device, generator=generator)
    return uniform < probs


def __dir__() -> list[str]:
    return __all__

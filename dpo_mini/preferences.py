"""Models of a comparison: the probability of an outcome given rewards, and seeded draws from it.

Rewards are tensors, numpy arrays or lists of numbers. Probabilities underflow where one side is far
better: 1 in e^104 is 0 in float32. A likelihood needs `..._logp`, which stays right there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_mini._arguments import (
    Table,
    as_floats,
    check_device,
    check_finite,
    check_generator,
    check_integers,
    positive_scalar,
    values_visible,
)
from dpo_mini._numerics import dtype_of_input, normalise, ranking_terms, sigmoid, widen

__all__ = [
    "bradley_terry_prob",
    "bradley_terry_logp",
    "thurstone_prob",
    "thurstone_logp",
    "davidson_probs",
    "davidson_logps",
    "plackett_luce_logp",
    "sample_bradley_terry",
    "sample_thurstone",
    "sample_plackett_luce",
]


def bradley_terry_prob(rewards_a: Table, rewards_b: Table) -> Tensor:
    r"""$P(a \succ b) = \sigma(r_a - r_b)$.

    Args:
      rewards_a, rewards_b: the same shape, finite.
    Returns:
      the same shape, in 0..1.
    Raises:
      ValueError: shapes or dtypes differ, or a reward is not finite.
    Source: Bradley & Terry 1952; Rafailov et al. 2023, Eq. 1, arXiv:2305.18290.
    """
    return sigmoid(_margins(rewards_a, rewards_b))


def bradley_terry_logp(rewards_a: Table, rewards_b: Table) -> Tensor:
    r"""$\log P(a \succ b) = \log\sigma(r_a - r_b)$.

    Args and errors are those of `bradley_terry_prob`.

    Returns:
      the same shape, nats.
    Source: as `bradley_terry_prob`.
    """
    return logsigmoid(_margins(rewards_a, rewards_b))


def thurstone_prob(rewards_a: Table, rewards_b: Table) -> Tensor:
    r"""$P(a \succ b) = \Phi((r_a - r_b)/\sqrt2)$: unit Gaussian noise on each reward (Case V).

    Args and errors are those of `bradley_terry_prob`.

    Source: Thurstone 1927.
    """
    return _thurstone_prob(rewards_a, rewards_b)


def thurstone_logp(rewards_a: Table, rewards_b: Table) -> Tensor:
    r"""$\log P(a \succ b) = \log\Phi((r_a - r_b)/\sqrt2)$, right however unlikely the outcome.

    Args and errors are those of `bradley_terry_prob`.

    Returns:
      the same shape, nats: about minus a quarter of the squared margin where b is far better.
    Source: Thurstone 1927.
    """
    x = _margins(rewards_a, rewards_b) / 2
    # Phi(sqrt(2) x) = erfc(-x) / 2. Below 0 the factor e^(-x^2) is taken out of erfc, which leaves
    # erfcx; above 0 the small part is taken from 1. Each clamp keeps the other branch finite.
    behind, ahead = x.clamp(max=0), x.clamp(min=0)
    if_behind = (0.5 * torch.special.erfcx(-behind)).log() - behind**2
    if_ahead = torch.log1p(-0.5 * torch.special.erfc(ahead))
    return torch.where(x < 0, if_behind, if_ahead)


def davidson_probs(rewards_a: Table, rewards_b: Table, *, tie_weight: float | Tensor) -> Tensor:
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
    return normalise(_davidson_scores(rewards_a, rewards_b, tie_weight))[0].exp()


def davidson_logps(rewards_a: Table, rewards_b: Table, *, tie_weight: float | Tensor) -> Tensor:
    r"""The logarithms of `davidson_probs`, right however unlikely an outcome.

    Args and errors are those of `davidson_probs`.

    Returns:
      the shape of the rewards with a last axis of 3, nats: log P of a wins, of a tie, of b wins.
    Source: Davidson 1970.
    """
    return normalise(_davidson_scores(rewards_a, rewards_b, tie_weight))[0]


def plackett_luce_logp(rewards: Table, ranking: Table) -> Tensor:
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
    scores = _listed(rewards)
    if isinstance(ranking, np.ndarray | Sequence):
        ranking = torch.as_tensor(np.asarray(ranking), device=scores.device)
    check_integers("ranking", ranking, "[B, K]")
    check_device("`rewards`", scores.device, ranking=ranking)
    if ranking.shape != scores.shape:
        raise ValueError(
            f"`ranking` must have shape {list(scores.shape)} like `rewards`, "
            f"got {list(ranking.shape)}"
        )
    n_items = scores.shape[1]
    in_order = torch.arange(n_items, device=ranking.device)
    if values_visible(ranking) and (ranking.sort(-1).values != in_order).any():
        row = int((ranking.sort(-1).values != in_order).any(-1).nonzero()[0])
        what = f"a permutation of 0..{n_items - 1} in each row"
        raise ValueError(f"`ranking` must have {what}, got none in row {row}")
    return ranking_terms(scores.gather(1, ranking)).sum(-1)


def sample_bradley_terry(
    rewards_a: Table, rewards_b: Table, *, generator: torch.Generator
) -> Tensor:
    """Draw who wins each comparison.

    Args:
      rewards_a, rewards_b: as in `bradley_terry_prob`.
      generator: draws the winners.
    Returns:
      the same shape, bool, True where a wins.
    Raises:
      ValueError: as in `bradley_terry_prob`, or the generator lies on another device.
    """
    return _bernoulli(_margins(rewards_a, rewards_b).sigmoid(), generator)


def sample_thurstone(rewards_a: Table, rewards_b: Table, *, generator: torch.Generator) -> Tensor:
    """Draw who wins each comparison, by `thurstone_prob`; the rest as in `sample_bradley_terry`."""
    return _bernoulli(_thurstone_prob(rewards_a, rewards_b), generator)


def sample_plackett_luce(rewards: Table, *, generator: torch.Generator) -> Tensor:
    """Draw a ranking of each row of `rewards` `[B, K]`: int64 `[B, K]`, best to worst.

    Sorting rewards plus standard Gumbel noise is a draw from Plackett-Luce (Yellott 1977).

    Args:
      rewards: `[B, K]`, K >= 2, finite.
      generator: draws the noise.
    Returns:
      `[B, K]` int64, as `plackett_luce_logp` takes it.
    Raises:
      ValueError: K < 2, a reward is not finite, or the generator lies on another device.
    """
    scores = _listed(rewards)
    check_generator(generator)
    check_device("the rewards", scores.device, generator=generator)
    exponential = torch.empty_like(scores).exponential_(generator=generator)
    return (scores - exponential.log()).argsort(-1, descending=True)


def _margins(rewards_a: Table, rewards_b: Table) -> Tensor:
    first, second = as_floats("[...]", {"rewards_a": rewards_a, "rewards_b": rewards_b})
    check_finite(rewards_a=first, rewards_b=second)
    return widen(first) - widen(second)


def _thurstone_prob(rewards_a: Table, rewards_b: Table) -> Tensor:
    # Phi(m / sqrt 2) = erfc(-m / 2) / 2: m / 2 is exact, which counts in the tail.
    return 0.5 * torch.special.erfc(-_margins(rewards_a, rewards_b) / 2)


def _davidson_scores(rewards_a: Table, rewards_b: Table, tie_weight: float | Tensor) -> Tensor:
    """`[..., 3]`, whose softmax is that of a wins, of a tie, of b wins."""
    half = _margins(rewards_a, rewards_b) / 2
    tie = positive_scalar("tie_weight", tie_weight, half.dtype).to(half.device)
    return torch.stack([half, tie.log().expand_as(half), -half], dim=-1)


def _listed(rewards: Table) -> Tensor:
    """Rewards `[B, K]` of at least two items per row, to compute with."""
    (scores,) = as_floats("[B, K]", {"rewards": rewards})
    check_finite(rewards=scores)
    if scores.shape[1] < 2:
        raise ValueError(f"`rewards` must have at least 2 items per row, got {scores.shape[1]}")
    return widen(scores)


def _bernoulli(probs: Tensor, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    check_device("the rewards", probs.device, generator=generator)
    uniform = torch.rand(probs.shape, dtype=probs.dtype, device=probs.device, generator=generator)
    return uniform < probs


for _name in __all__:
    globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

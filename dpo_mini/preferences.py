"""Models of a comparison: the probability of an outcome given rewards, and seeded draws from it.

And what comparisons say without a model: the Nash policy of a matrix of preferences, which need not
come from rewards, and whether a matrix of counts determines the rewards at all.

Rewards are tensors, numpy arrays or lists of numbers. Probabilities underflow where one side is far
better: 1 in e^104 is 0 in float32. A likelihood needs `..._logp`, which stays right there.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

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
    check_logps,
    check_normalised,
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
    "nash_logps",
    "regularised_nash_logps",
    "ComparisonGraph",
    "comparison_graph",
]

_MOST_PLAYED = 20
_NEWTON_STEPS = 500
_HALVINGS = 40


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


def nash_logps(win_probs: Table) -> Tensor:
    r"""The policy that no answer beats more than half of the time: the maximin of $P(\pi \succ y)$.

    Two players choose an answer each, and the first wins with probability `win_probs`. The game is
    symmetric, so its value is 1/2: $\min_y \sum_{y'} \pi(y')\,P(y' \succ y) = 1/2$. An answer that
    beats every other one is played always.

    There is one such policy for almost every matrix, but not for each. Where there are several, as
    between answers that are all alike, every mixture of them is another one. This returns a corner
    of that set; which corner depends on the order of the answers. `regularised_nash_logps` is
    unique.

    It is solved by the simplex method in exact fractions, each margin P - 1/2 being the nearest one
    with a denominator of at most 10^9, which is within rounding in float64.

    Args:
      win_probs: `[..., Y, Y]`, entry `[a, b]` is the probability that a beats b, so that the two
        entries of a pair sum to 1. At most 20 answers. The diagonal is not used.
    Returns:
      `[..., Y]`, nats, without gradient; -inf for an answer that is never played.
    Raises:
      ValueError: another shape, entries of a pair that do not sum to 1 or are no probabilities, or
        more than 20 answers.
    Source: Kreweras 1965; Fishburn 1984, who calls it a maximal lottery.
    """
    wins = _win_probs(win_probs)
    if wins.shape[-1] > _MOST_PLAYED:
        got = wins.shape[-1]
        raise ValueError(f"`win_probs` must have at most {_MOST_PLAYED} answers, got {got}")
    games = _edges(wins).view(-1, *wins.shape[-2:])
    played = [_maximin(game) for game in games.tolist()]
    return wins.new_tensor(played).log().view(wins.shape[:-1])


def regularised_nash_logps(win_probs: Table, ref_logps: Table, beta: float | Tensor) -> Tensor:
    r"""The Nash policy where each player pays beta times its KL to the reference.

    $\pi^*$ is its own best reply: $\pi^*(y) \propto \pi_{ref}(y)\,e^{P(y \succ \pi^*)/\beta}$, as
    if the reward of an answer were its chance to beat $\pi^*$. There is exactly one such policy for
    each beta. As beta falls it goes to a Nash policy of the game without the KL; where there are
    several, to the one whose KL to the reference is least.

    Newton's method finds it, with steps that shrink the residual of this equation, and it is
    returned only if the residual is one of rounding.

    Args:
      win_probs: `[..., Y, Y]`, as in `nash_logps`, of any number of answers.
      ref_logps: `[..., Y]`, nats; each row's probabilities sum to 1.
      beta: > 0, weight of the KL term, in units of a probability per nat.
    Returns:
      `[..., Y]`, nats, without gradient.
    Raises:
      ValueError: as in `nash_logps`; `beta <= 0`; NaN, +inf or unnormalised log-probabilities; a
        beta so small that the residual does not become one of rounding.
    Source: Munos et al. 2023, section 4, arXiv:2312.00886; its tau is beta.
    """
    wins = _win_probs(win_probs)
    (reference,) = as_floats("[...]", {"ref_logps": ref_logps})
    check_logps(ref_logps=reference)
    if reference.shape != wins.shape[:-1]:
        want = list(wins.shape[:-1])
        got = list(reference.shape)
        raise ValueError(f"`ref_logps` must have shape {want} like `win_probs`, got {got}")
    check_device("`win_probs`", wins.device, ref_logps=reference)
    check_normalised(ref_logps=reference)
    prior = reference.detach().double()
    scale = positive_scalar("beta", beta, torch.float64).detach().to(prior.device)
    margins = _edges(wins) / scale
    # In the log-ratios u = log(pi / pi_ref), up to a constant, the equation is u = margins pi.
    u, done = torch.zeros_like(prior), False
    for _ in range(_NEWTON_STEPS):
        residual, probs = _residual(u, prior, margins)
        size = residual.norm(dim=-1)
        summed = 1 + u.abs() + (margins.abs() @ probs.unsqueeze(-1)).squeeze(-1)
        done = bool((residual.abs() <= 16 * torch.finfo(u.dtype).eps * summed).all())
        if done or not residual.isfinite().all():
            break
        spread = probs.diag_embed() - probs.unsqueeze(-1) * probs.unsqueeze(-2)
        # margins is antisymmetric, so margins @ spread has no real eigenvalue but 0.
        jacobian = torch.eye(margins.shape[-1], dtype=prior.dtype, device=prior.device)
        step = torch.linalg.solve_ex(jacobian - margins @ spread, residual)[0]
        length = torch.ones_like(size)
        for _ in range(_HALVINGS):
            moved = _residual(u - length.unsqueeze(-1) * step, prior, margins)[0].norm(dim=-1)
            length = torch.where(moved < (1 - length / 4) * size, length, length / 2)
        u = u - length.unsqueeze(-1) * step
    if not done:
        what = f"{scale.item():g}, whose Nash policy was not found to rounding"
        raise ValueError(f"`beta` must be larger for these `win_probs`, got {what}")
    found = normalise(prior + u)[0]
    return found.to(torch.promote_types(wins.dtype, reference.dtype))


class ComparisonGraph(NamedTuple):
    """What `comparison_graph` returns. A group is named by the smallest index among its answers."""

    connected: Tensor
    """`[...]` bool: one group, so that all differences of rewards are determined."""
    strongly_connected: Tensor
    """`[...]` bool: one strong group, so that counts have finite rewards of maximum likelihood."""
    groups: Tensor
    """`[..., Y]` int64, the group of each answer: those that comparisons link to it."""
    strong_groups: Tensor
    """`[..., Y]` int64, its strong group: those that chains of wins link to it both ways."""


def comparison_graph(wins: Table) -> ComparisonGraph:
    """Do comparisons determine all rewards? By the graph of who was compared and of who won.

    Bradley-Terry depends on differences of rewards. With endless labels the difference of two
    answers is determined if and only if a chain of compared pairs links them: all are, where the
    graph is connected. With counts, rewards of maximum likelihood exist and are finite if and only
    if the graph of wins is strongly connected: however the answers are split in two parts, each
    part has won against the other at least once. Then they are unique up to a constant. If a part
    never lost to the rest, its rewards go to infinity.

    Args:
      wins: `[..., Y, Y]`, >= 0, entry `[a, b]` says how often a beat b: counts, or probabilities
        of winning times how often the pair is compared. The diagonal is not used.
    Returns:
      `ComparisonGraph(connected, strongly_connected, groups, strong_groups)`.
    Raises:
      ValueError: another shape, or a count that is negative or not finite.
    Source: Zermelo 1929; Ford 1957.
    """
    if isinstance(wins, Tensor) and not wins.is_floating_point() and not wins.is_complex():
        wins = wins.double()
    counts = _square("wins", wins)
    if values_visible(counts) and (counts < 0).any():
        raise ValueError(f"`wins` must be >= 0, got {counts.min().item():g}")
    beats = counts > 0
    forward = _reachable(beats)
    groups, strong_groups = (
        # Two answers are in one group if they reach each other; `argmax` finds the first.
        both.byte().argmax(-1)
        for both in (_reachable(beats | beats.mT), forward & forward.mT)
    )
    one, one_strong = ((names == 0).all(-1) for names in (groups, strong_groups))
    return ComparisonGraph(one, one_strong, groups, strong_groups)


def _square(name: str, table: Table) -> Tensor:
    """A finite matrix `[..., Y, Y]`."""
    (matrix,) = as_floats("[...]", {name: table})
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"`{name}` must be [..., Y, Y], got shape {list(matrix.shape)}")
    check_finite(**{name: matrix})
    return matrix


def _win_probs(win_probs: Table) -> Tensor:
    """A matrix of probabilities whose two entries of a pair sum to 1."""
    wins = _square("win_probs", win_probs)
    rounding = max(1e-6, 2 * torch.finfo(wins.dtype).eps)
    wrong = ((wins + wins.mT - 1).abs() > rounding) | (wins < 0)
    wrong = wrong & ~torch.eye(wins.shape[-1], dtype=torch.bool, device=wins.device)
    if wrong.any():
        got = f"{wins[wrong][0].item():.6g} and {wins.mT[wrong][0].item():.6g}"
        raise ValueError(f"`win_probs` must be >= 0 and sum to 1 per pair, got {got}")
    return wins


def _edges(wins: Tensor) -> Tensor:
    """By how much each answer beats each other one: P - 1/2, antisymmetric, float64."""
    wide = wins.detach().double()
    return (wide - wide.mT) / 2


def _residual(u: Tensor, prior: Tensor, margins: Tensor) -> tuple[Tensor, Tensor]:
    """How far log-ratios are from those of the best reply, and their policy."""
    probs = (prior + u).softmax(-1)
    return u - (margins @ probs.unsqueeze(-1)).squeeze(-1), probs


def _maximin(game: list[list[float]]) -> list[float]:
    """The simplex method on: maximise the sum of x >= 0 where (1 + game) x <= 1.

    At the optimum the sum is 1 over the value of 1 + game, which is 1, so x is the policy.
    """
    n = len(game)
    exact = [[Fraction(x).limit_denominator(10**9) for x in row] for row in game]
    rows = [[1 + x for x in row] + [Fraction(1)] for row in exact]
    rows.append([Fraction(-1)] * n + [Fraction(0)])  # the aim: a column below 0 can improve it
    outside, inside = list(range(n)), list(range(n, 2 * n))  # x, and the slack of each row
    stuck = False
    while min(rows[n][:n]) < 0:
        # The steepest column, or after a step that gained nothing the first one that may be chosen:
        # Bland's rule, which never goes in a circle.
        better = [j for j in range(n) if rows[n][j] < 0]
        column = min(better, key=lambda j: outside[j] if stuck else rows[n][j])
        row = min(
            (i for i in range(n) if rows[i][column] > 0),
            key=lambda i: (rows[i][n] / rows[i][column], inside[i]),
        )
        stuck = rows[row][n] == 0
        _pivot(rows, row, column)
        outside[column], inside[row] = inside[row], outside[column]
    played = {index: float(rows[i][n]) for i, index in enumerate(inside)}
    return [played.get(y, 0.0) for y in range(n)]


def _pivot(rows: list[list[Fraction]], row: int, column: int) -> None:
    """Exchange what is in `row` for what is in `column`, in place."""
    by = rows[row][column]
    rows[row] = [x / by for x in rows[row]]
    rows[row][column] = 1 / by
    for i, other in enumerate(rows):
        factor = other[column]
        if i == row or factor == 0:
            continue
        rows[i] = [x - factor * y for x, y in zip(other, rows[row], strict=True)]
        rows[i][column] = -factor / by


def _reachable(edges: Tensor) -> Tensor:
    """Which answer a chain of edges leads to from each, itself among them: `[..., Y, Y]` bool."""
    size = edges.shape[-1]
    reached = edges | torch.eye(size, dtype=torch.bool, device=edges.device)
    for _ in range(math.ceil(math.log2(size))):  # chains of up to 1, 2, 4, ... edges
        reached = (reached.double() @ reached.double()) > 0
    return reached


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
    if not isinstance(globals()[_name], type):
        globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

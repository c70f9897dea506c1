"""Losses of whole tables of log-probabilities: what a bandit needs, without sampling."""

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from dpo_mini._arguments import (
    check_alike,
    check_at_most_0,
    check_count,
    check_finite,
    check_floats,
)
from dpo_mini.preferences import bradley_terry_prob
from dpo_mini.train.pair_losses import Loss
from dpo_mini.train.steps import check_gradient


def population_loss(
    loss: Loss,
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor | None = None,
    *,
    win_probs: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> Tensor:
    """What the mean loss tends to with ever more data: every pair, each outcome by its probability.

    By default all pairs of different answers are compared equally often, and labels are
    Bradley-Terry on the rewards.

    Args:
      loss: such as `partial(dpo_loss, beta=0.1)`.
      logps, ref_logps: `[X, Y]`, Y >= 2.
      rewards: `[X, Y]`; or None where `win_probs` says who wins.
      win_probs: `[X, Y, Y]`, in 0..1: entry `[x, a, b]` is the probability that a beats b, so that
        the two entries of a pair sum to 1. Any labels can be written so, also of annotators who
        disagree, or who prefer in a circle. The diagonal is not used.
      pair_weights: `[X, Y, Y]`, symmetric, >= 0: how often each pair is compared, up to a common
        factor. The weights of all pairs of all prompts are divided by their sum. The diagonal is
        not used.
    Returns:
      `[]`, the mean over prompts and pairs; differentiable.
    Raises:
      ValueError: shapes or dtypes differ, Y < 2, or a value is not finite; `rewards` and
        `win_probs` both given, or neither; entries of a pair that do not sum to 1 or are no
        probabilities; weights that are negative, not symmetric or all 0.
    """
    check_floats("[X, Y]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    n_completions = logps.shape[1]
    if n_completions < 2:
        raise ValueError("`logps` must have >= 2 completions per prompt, got 1")
    a, b = torch.triu_indices(n_completions, n_completions, 1, device=logps.device)
    if rewards is not None and win_probs is None:
        check_floats("[X, Y]", logps=logps, rewards=rewards)
        check_finite(rewards=rewards)
        first_wins = bradley_terry_prob(rewards[:, a].flatten(), rewards[:, b].flatten())
    elif win_probs is not None and rewards is None:
        first_wins = _first_wins(win_probs, logps, a, b)
    else:
        got = "neither" if rewards is None else "both"
        raise ValueError(f"one of `rewards` and `win_probs` must be given, got {got}")
    (logps_a, ref_a), (logps_b, ref_b) = (
        [table[:, columns].flatten() for table in (logps, ref_logps)] for columns in (a, b)
    )
    if_first = loss(logps_a, logps_b, ref_a, ref_b)
    if_second = loss(logps_b, logps_a, ref_b, ref_a)
    per_pair = first_wins * if_first + (1 - first_wins) * if_second
    if pair_weights is None:
        return per_pair.mean()
    return _shares(pair_weights, logps, a, b) @ per_pair


def _first_wins(win_probs: Tensor, logps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The checked probability that the first answer of each pair wins."""
    first_wins, second_wins = _of_pairs("win_probs", win_probs, logps, a, b)
    off = (first_wins + second_wins - 1).abs() > 1e-6
    wrong = off | (first_wins < 0) | (second_wins < 0)
    if wrong.any():
        got = f"{first_wins[wrong][0].item():.6g} and {second_wins[wrong][0].item():.6g}"
        raise ValueError(f"`win_probs` must be >= 0 and sum to 1 per pair, got {got}")
    return first_wins


def _shares(pair_weights: Tensor, logps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The checked weight of each pair, divided by their sum."""
    weights, mirrored = _of_pairs("pair_weights", pair_weights, logps, a, b)
    if not torch.allclose(weights, mirrored, rtol=1e-6, atol=0.0):
        worst = (weights - mirrored).abs().argmax()
        got = f"{weights[worst].item():.6g} and {mirrored[worst].item():.6g}"
        raise ValueError(
            f"`pair_weights` must be symmetric, got {got} for the two orders of a pair"
        )
    if weights.min() < 0 or weights.max() == 0:
        got = f"{weights.min().item():.6g} to {weights.max().item():.6g}"
        raise ValueError(f"`pair_weights` must be >= 0 and not all 0, got {got}")
    return weights / weights.sum()


def _of_pairs(
    name: str, table: Tensor, logps: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Entries `[x, a, b]` and `[x, b, a]` of a finite `[X, Y, Y]`, all pairs in one row each."""
    check_floats("[X, Y, Y]", **{name: table})
    check_alike("logps", logps, **{name: table})
    want = [*logps.shape, logps.shape[1]]
    if list(table.shape) != want:
        raise ValueError(f"`{name}` must have shape [X, Y, Y] = {want}, got {list(table.shape)}")
    entries, mirrored = table[:, a, b].flatten(), table[:, b, a].flatten()
    check_finite(**{name: torch.cat([entries, mirrored])})
    return entries, mirrored


@overload
def fit_table(
    loss: Callable[[Tensor], Tensor], start_logps: Tensor, *, steps: int = 500
) -> Tensor: ...
@overload
def fit_table(
    loss: Callable[..., Tensor],
    start_logps: Tensor,
    extra: Tensor,
    /,
    *more: Tensor,
    steps: int = 500,
) -> tuple[Tensor, ...]: ...
def fit_table(
    loss: Callable[..., Tensor], start_logps: Tensor, *extra: Tensor, steps: int = 500
) -> Tensor | tuple[Tensor, ...]:
    """Minimise a smooth loss of a whole table of log-probabilities, to six digits of the table.

    What a bandit needs where the loss is a population's, not a sample's: L-BFGS over free logits,
    until no step lowers the loss. On random bandits the result is within 1e-6 of the minimum in
    total variation, and the loss within 1e-10: a population's DPO loss where the rewards of a
    prompt differ by at most 6, minus `closed_form.objective` where they differ by at most 4 beta.
    Rewards further apart make a loss flat far from its minimum, around tables that have all but
    forgotten an answer, and the descent may stop there.

    Args:
      loss: from log-probabilities `[X, Y]`, and the `extra` tensors, to a scalar.
      start_logps: `[X, Y]`, where to start, finite, nats.
      *extra: where other parameters of the loss start, such as one offset per prompt; of any
        shape, finite, of the dtype of `start_logps`. They are fitted too.
      steps: the most iterations.
    Returns:
      `[X, Y]`, log-probabilities at the minimum, nats, without gradient. With `extra` a tuple: the
      log-probabilities, then each of `extra` at the minimum.
    Raises:
      ValueError: the loss is not a finite scalar or its gradient not finite; `start_logps` or one
        of `extra` is not finite; or `start_logps` has a value above 0.
    """
    check_count("steps", steps)
    check_floats("[X, Y]", start_logps=start_logps)
    check_finite(start_logps=start_logps)
    check_at_most_0("start_logps", start_logps)
    for n, start in enumerate(extra):
        check_floats("[...]", **{f"extra[{n}]": start})
        check_alike("start_logps", start_logps, **{f"extra[{n}]": start})
        check_finite(**{f"extra[{n}]": start})
    free = [start.detach().clone().requires_grad_() for start in (start_logps, *extra)]
    logits, *others = free
    optimizer = torch.optim.LBFGS(
        free,
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1), *others)
        if value.dim() > 0:
            raise ValueError(f"`loss` must return a scalar, got shape {list(value.shape)}")
        if not torch.isfinite(value):
            raise ValueError(f"`loss` must return a finite value, got {value.item()}")
        value.backward()
        check_gradient(free, value)
        return value

    optimizer.step(closure)
    logps = logits.detach().log_softmax(-1)
    return (logps, *(other.detach() for other in others)) if others else logps

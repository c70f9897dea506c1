"""One short loop a method, alike but for the idea.

Each loop takes a policy, changes its weights and returns the history of what it measured, one
number a step. `progress` is anything that wraps an iterable and shows how far it is: `tqdm`, the
notebooks' `notebook_progress`, or nothing.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dpo_mini.arguments import (
    check_count,
    check_finite,
    check_floats,
    check_generator,
    check_integers,
    check_positive,
    check_rows,
)
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.policies import Policy
from dpo_mini.preferences import bradley_terry_prob
from dpo_mini.rollout import shared_prefix_token_logps

History = dict[str, list[float]]
Pairs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Four `[B]` in the order of `dpo_loss`, one loss a row out; bind beta with `functools.partial`."""


def fit_sft(
    policy: nn.Module,
    prompts: Tensor,
    completions: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Maximum likelihood on demonstrations: raise log pi(y|x), in place.

    Args:
      policy: has `token_logps(prompts [B], completions [B, T]) -> [B, T]`.
      prompts: `[n]`; completions: `[n, T]` int64, padded with `PAD`.
      steps, batch_size, learning_rate: of Adam; 20 steps of warm-up, then a cosine down to 0.
      generator: shuffles; every row is seen once before any is seen again.
    Returns:
      `{"loss": [steps]}`, nats a completion.
    Raises:
      ValueError: no data, rows that differ in number, or a setting out of range.
    """
    check_rows("prompts", prompts, completions=completions)
    check_integers("completions", completions, "[n, T]")
    _check_settings(steps, batch_size, learning_rate, generator)

    def loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scored = _token_logps(policy, prompts[rows], completions[rows])
        return -sum_over_tokens(scored, completions[rows] != PAD).mean(), {}

    return _descend(
        policy, loss, len(prompts), steps, batch_size, learning_rate, generator, progress
    )


def fit_preferences(
    policy: nn.Module,
    reference: nn.Module,
    pairs: Pairs,
    loss: Loss,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    reduce: Callable[[Tensor, Tensor], Tensor] = sum_over_tokens,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Minimise any loss of LOSSES over preference pairs, in place: DPO, IPO and kin.

    Args:
      policy: has `token_logps(prompts [B], completions [B, T]) -> [B, T]`.
      reference: likewise; frozen. It scores every pair once, before the first step.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])`.
      loss: such as `partial(dpo_loss, beta=0.1)`.
      steps, batch_size, learning_rate, generator: as in `fit_sft`.
      reduce: from `token_logps` to what the loss takes: `sum_over_tokens`, or `mean_over_tokens`
        for the losses whose arguments are `mean_logps`.
    Returns:
      `{"loss", "margin", "accuracy"}`, each `[steps]`: the mean loss, the mean log-ratio margin in
      nats (chosen minus rejected), and the share of the batch's pairs where it is positive.
    Raises:
      ValueError: no pairs, rows that differ in number, a setting out of range, or a reference that
        shares weights with the policy and so would move with it.
    """
    if len(pairs) != 3:
        raise ValueError(f"pairs: got {len(pairs)} tensors, takes (prompts, chosen, rejected)")
    prompts, chosen, rejected = pairs
    check_rows("prompts", prompts, chosen=chosen, rejected=rejected)
    check_integers("chosen", chosen, "[n, T]")
    check_integers("rejected", rejected, "[n, T]")
    if rejected.shape != chosen.shape:
        got, want = list(rejected.shape), list(chosen.shape)
        raise ValueError(f"rejected: got shape {got}, takes {want} like chosen")
    _check_settings(steps, batch_size, learning_rate, generator)
    _check_frozen(policy, reference)

    def score(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected, `[B]` each, in one pass: the two answers share their prompt."""
        answers = torch.cat([chosen[rows], rejected[rows]])
        scored = _token_logps(model, torch.cat([prompts[rows], prompts[rows]]), answers)
        chosen_scores, rejected_scores = reduce(scored, answers != PAD).chunk(2)
        return chosen_scores, rejected_scores

    every = torch.arange(len(prompts), device=prompts.device)
    with torch.no_grad():
        blocks = [score(reference, rows) for rows in every.split(batch_size)]
    ref_chosen, ref_rejected = (torch.cat(parts) for parts in zip(*blocks, strict=True))

    def batch_loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen_logps, rejected_logps = score(policy, rows)
        per_pair = loss(chosen_logps, rejected_logps, ref_chosen[rows], ref_rejected[rows])
        margins = (chosen_logps - ref_chosen[rows]) - (rejected_logps - ref_rejected[rows])
        margins = margins.detach()
        measured = {"margin": margins.mean(), "accuracy": (margins > 0).double().mean()}
        return per_pair.mean(), measured

    return _descend(
        policy, batch_loss, len(prompts), steps, batch_size, learning_rate, generator, progress
    )


def population_loss(loss: Loss, logps: Tensor, ref_logps: Tensor, rewards: Tensor) -> Tensor:
    """What the mean loss tends to with ever more data: every pair, each outcome by its probability.

    Pairs of different answers are compared equally often; labels are Bradley-Terry on the rewards.

    Args:
      loss: such as `partial(dpo_loss, beta=0.1)`.
      logps, ref_logps, rewards: `[X, Y]`, Y >= 2.
    Returns:
      `[]`, the mean over prompts and pairs; differentiable.
    Raises:
      ValueError: shapes or dtypes differ, Y < 2, or a value is not finite.
    """
    check_floats("[X, Y]", logps=logps, ref_logps=ref_logps, rewards=rewards)
    check_finite(logps=logps, ref_logps=ref_logps, rewards=rewards)
    n_completions = rewards.shape[1]
    if n_completions < 2:
        raise ValueError("rewards: got 1 completion a prompt, takes >= 2")
    a, b = torch.triu_indices(n_completions, n_completions, 1, device=rewards.device)
    first, second = (
        [table[:, columns].flatten() for table in (logps, ref_logps, rewards)] for columns in (a, b)
    )
    first_wins = bradley_terry_prob(first[2], second[2])
    if_first = loss(first[0], second[0], first[1], second[1])
    if_second = loss(second[0], first[0], second[1], first[1])
    return (first_wins * if_first + (1 - first_wins) * if_second).mean()


def fit_table(loss: Callable[[Tensor], Tensor], start_logps: Tensor, *, steps: int = 500) -> Tensor:
    """Minimise a smooth loss of a whole table of log-probabilities, to machine precision.

    What a bandit needs where the loss is a population's, not a sample's: L-BFGS over free logits.

    Args:
      loss: from log-probabilities `[X, Y]` to a scalar.
      start_logps: `[X, Y]`, where to start, finite, nats.
      steps: the most iterations.
    Returns:
      `[X, Y]`, log-probabilities at the minimum, nats, without gradient.
    Raises:
      ValueError: the loss is not a finite scalar, or `start_logps` is not finite.
    """
    check_count("steps", steps)
    check_floats("[X, Y]", start_logps=start_logps)
    check_finite(start_logps=start_logps)
    logits = start_logps.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1))
        if value.dim() > 0:
            raise ValueError(f"loss: got shape {list(value.shape)}, takes a scalar")
        if not torch.isfinite(value):
            raise ValueError(f"loss: got {value.item()}, takes a finite value")
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(-1)


def _descend(
    policy: nn.Module,
    batch_loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    n_rows: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]],
) -> History:
    """Adam, 20 steps of warm-up, a cosine down to 0, reshuffled rows: what all loops share."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    history: History = {}
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in progress(range(steps)):
        if len(waiting) == 0:
            waiting = torch.randperm(n_rows, generator=generator, device=generator.device)
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        loss, measured = batch_loss(rows)
        if not torch.isfinite(loss):
            raise ValueError(f"loss: got {loss.item()} at step {len(history.get('loss', []))}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for name, value in {"loss": loss.detach(), **measured}.items():
            history.setdefault(name, []).append(float(value))
    return history


def _check_settings(
    steps: int, batch_size: int, learning_rate: float, generator: torch.Generator
) -> None:
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    check_generator(generator)


def _token_logps(model: nn.Module, prompts: Tensor, completions: Tensor) -> Tensor:
    """`[B, T]`: policies that can be walked as a tree read each distinct prefix once."""
    if isinstance(model, Policy):
        return shared_prefix_token_logps(model, prompts, completions)
    return model.token_logps(prompts, completions)


def _check_frozen(policy: nn.Module, reference: nn.Module) -> None:
    mine = {parameter.data_ptr() for parameter in policy.parameters()}
    if any(parameter.data_ptr() in mine for parameter in reference.parameters()):
        raise ValueError(
            "reference: got weights that it shares with the policy, takes a copy (copy.deepcopy)"
        )

"""What all loops share: the optimiser, one step, batches of rows, and what they write down."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from dpo_mini._arguments import (
    check_count,
    check_device,
    check_finite,
    check_floats,
    check_generator,
    check_integers,
    check_positive,
)
from dpo_mini.policies import Scorer
from dpo_mini.policies.base import device_of, shares_storage

History = dict[str, list[float]]
"""What a loop measured: under each name one number per step."""
Progress = Callable[[range], Iterable[int]]
"""Wraps the range of a loop's steps, such as `tqdm`; `iter` shows nothing."""
WEIGHTS = "the policy's weights"
"""What data and generators lie beside, in errors."""
Score = Callable[[Tensor, Tensor], Tensor]
"""`(prompts [B], completions [B, T]) -> scores [B]`: the reward of whole completions."""


def adam(
    model: nn.Module | Scorer, steps: int, learning_rate: float
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam, and its schedule: 20 steps of warm-up, times a cosine down to 0 after `steps` steps."""
    # Fused, all weights take their step in one call: a third of the time where they are small.
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    return optimizer, schedule


def descend(optimizer: torch.optim.Adam, loss: Tensor, step: int) -> None:
    """One step down the gradient of `loss`, or a ValueError where loss or gradient is not finite.

    The error names `step`, the number of the loop's step.
    """
    if not torch.isfinite(loss):
        raise ValueError(f"the loss must be finite, got {loss.item()} at step {step}")
    optimizer.zero_grad()
    loss.backward()
    (group,) = optimizer.param_groups
    check_gradient(group["params"], loss, f" at step {step}")
    optimizer.step()


def check_gradient(weights: Iterable[Tensor], loss: Tensor, where: str = "") -> None:
    """Refuse a gradient that is not finite: it would make all weights NaN."""
    norm = float(nn.utils.clip_grad_norm_(weights, math.inf))  # measures the norm, changes nothing
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient must be finite, got a norm of {norm}{where} where the loss is "
            f"{loss.item():.4g}: a part of it has no derivative there, such as sqrt(x) at x = 0"
        )


def record(history: History, **measured: Tensor | float) -> None:
    """Append one number under each name."""
    for name, value in measured.items():
        history.setdefault(name, []).append(float(value))


def shuffled_batches(
    data: Tensor, batch_size: int, steps: int, generator: torch.Generator, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """The number of each step and its rows `[B]` of `data`: every row once before any row again.

    The last batch of each pass has what is left. The rows lie beside `data`, wherever the generator
    lies: one on the CPU shuffles in the same order for every device.
    """
    waiting = torch.empty(0, dtype=torch.int64)
    for step in progress(range(steps)):
        if len(waiting) == 0:
            order = torch.randperm(len(data), generator=generator, device=generator.device)
            waiting = order.to(data.device)
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        yield step, rows


def draw_prompts(prompts: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """`[B]`: every prompt equally often, up to the remainder, in random order."""
    rounds = math.ceil(batch_size / len(prompts))
    shape = (rounds, len(prompts))
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    order = draws.argsort(1)
    return prompts[order.flatten()[:batch_size]]


def scores_of(score: Score, prompts: Tensor, completions: Tensor) -> Tensor:
    """What `score` gives each completion, `[B]`, without gradient; checked."""
    with torch.no_grad():
        scores = score(prompts, completions)
    check_floats("[B]", score=scores)
    if len(scores) != len(completions):
        want, got = len(completions), len(scores)
        raise ValueError(f"`score` must return {want} rewards, one per row, got {got}")
    check_device("its completions", completions.device, score=scores)
    check_finite(score=scores)
    return scores


def check_settings(
    steps: int, batch_size: int, learning_rate: float, generator: torch.Generator
) -> None:
    """Refuse settings that no loop could use."""
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    check_generator(generator)


def check_frozen(policy: nn.Module | Scorer, reference: nn.Module | Scorer) -> None:
    """Refuse a reference that would move with the policy, or that lies on another device."""
    if shares_storage(policy, reference):
        what = "have weights of its own (copy.deepcopy), got weights that it shares with the policy"
        raise ValueError(f"`reference` must {what}")
    check_device(WEIGHTS, device_of(policy), reference=device_of(reference))


def check_prompts_and_reference(
    policy: nn.Module, reference: nn.Module, prompts: Tensor, generator: torch.Generator
) -> None:
    """Refuse prompts that are no numbers, a reference that would move, and a second device."""
    check_integers("prompts", prompts, "[n]")
    check_frozen(policy, reference)
    check_device(WEIGHTS, device_of(policy), prompts=prompts, generator=generator)

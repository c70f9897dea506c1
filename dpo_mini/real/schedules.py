"""Learning rates over a run: from a step to what the optimizer's learning rate is multiplied by."""

import math
from collections.abc import Callable

from dpo_mini._arguments import check_count

Schedule = Callable[[int], float]
"""From a step, 0 the first, to what the learning rate is multiplied by there."""


def constant(step: int) -> float:
    """The learning rate as it is, at every `step`."""
    return 1.0


def warmup_then_constant(steps: int, *, warmup: int) -> Schedule:
    """Up in equal parts over `warmup` steps to 1, and then 1.

    Args, result and errors are those of `warmup_then_cosine`.
    """
    _check_warmup(steps, warmup)

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 1.0) if warmup else 1.0

    return schedule


def warmup_then_cosine(steps: int, *, warmup: int) -> Schedule:
    """Up in equal parts over `warmup` steps to 1, then a cosine down to 0 after the last.

    Args:
      steps: of the whole run.
      warmup: of them, in 0..steps-1.
    Returns:
      From a step, 0 the first, to what the learning rate is multiplied by.
    Raises:
      ValueError: `steps < 1`, or a warm-up that leaves nothing.
    """
    _check_warmup(steps, warmup)

    def schedule(step: int) -> float:
        after = (step - warmup) / (steps - warmup)
        return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * after)) / 2

    return schedule


def warmup_then_linear(steps: int, *, warmup: int) -> Schedule:
    """Up in equal parts over `warmup` steps to 1, then in equal parts down to 0 after the last.

    Args, result and errors are those of `warmup_then_cosine`.
    """
    _check_warmup(steps, warmup)

    def schedule(step: int) -> float:
        return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)

    return schedule


# --- private functions -----------------------------------------------------------------------


def _check_warmup(steps: int, warmup: int) -> None:
    check_count("steps", steps)
    check_count("warmup", warmup, least=0)
    if warmup >= steps:
        raise ValueError(f"`warmup` must be less than steps = {steps}, got {warmup}")

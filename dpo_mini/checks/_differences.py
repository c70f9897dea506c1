"""Where two tables, or lists of tables, differ most: what `largest_error` is made of."""

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Numbers: TypeAlias = Tensor | np.ndarray | float | Sequence[Any]
"""A tensor, an array, a number, or a list of them."""


def check_bound(below: float) -> None:
    """Refuse anything but a finite number > 0."""
    if isinstance(below, bool) or not isinstance(below, Real):
        raise TypeError(f"`below` must be a number, got {type(below).__name__}")
    if not 0 < below < math.inf:
        raise ValueError(f"`below` must be a finite number > 0, got {below}")


def short(bound: float) -> str:
    """A bound as one writes it: 1e-12, 1e-5 and not 1e-05, 0.001."""
    return f"{float(bound):g}".replace("e-0", "e-")


def furthest_apart(a: Numbers, b: Numbers) -> tuple[float, str, float, float]:
    """The largest absolute difference, its place such as `[0, 2]`, and the two values there.

    The place is empty for two numbers. In lists of tables it begins with the table's own place.

    Raises:
      ValueError: shapes differ, there are no numbers, or one of them is NaN.
      TypeError: there is something that is no number.
    """
    worst = None
    for place, one, other in _pairs(_read("a", a), _read("b", b), ""):
        for name, table in (("a", one), ("b", other)):
            if table.isnan().any():
                where = place + _index(table.isnan().flatten().int().argmax(), table)
                raise ValueError(f"`{name}` must hold no NaN, got one" + (where and f" at {where}"))
        if one.numel() == 0:
            continue
        errors = torch.where(one == other, 0.0, (one - other).abs())  # inf - inf is NaN
        at = errors.argmax()
        error = errors.flatten()[at].item()
        if worst is None or error > worst[0]:
            values = one.flatten()[at].item(), other.flatten()[at].item()
            worst = error, place + _index(at, errors), *values
    if worst is None:
        raise ValueError("`a` must hold a number at least, got none")
    return worst


def _read(name: str, given: Any) -> Tensor | list[Any]:
    """A float64 tensor where the numbers have one shape; else the list of its parts."""
    if isinstance(given, list | tuple):
        parts = [_read(name, part) for part in given]
        tables = [part for part in parts if isinstance(part, Tensor)]
        if len(tables) == len(parts) > 0 and len({table.shape for table in tables}) == 1:
            return torch.stack(tables)
        return parts
    kind = getattr(given, "dtype", None)
    what = type(given).__name__ if kind is None else f"{type(given).__name__} of {kind}"
    try:
        if isinstance(given, Tensor):
            if given.is_complex() or given.dtype == torch.bool:
                raise TypeError("no real numbers")
            return given.detach().to("cpu", torch.float64)
        if isinstance(given, np.ndarray):
            if given.dtype.kind not in "fiu":
                raise TypeError("no real numbers")
            return torch.from_numpy(np.array(given, dtype=np.float64, order="C"))
        if isinstance(given, bool | np.bool_ | str | bytes):
            raise TypeError("no real number")
        return torch.tensor(float(given), dtype=torch.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"`{name}` must hold real numbers, got {what}") from error


def _pairs(
    a: Tensor | list[Any], b: Tensor | list[Any], place: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tables of `a` and `b` side by side, each with its place in the lists."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        yield place, a, b
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _pairs(one, other, f"{place}[{n}]")
    else:
        at = place and f" at {place}"
        raise ValueError(f"`b` must have {_shape(a)} like `a`, got {_shape(b)}{at}")


def _shape(numbers: Tensor | list[Any]) -> str:
    if isinstance(numbers, Tensor):
        return f"shape {list(numbers.shape)}"
    return f"{len(numbers)} part{'s' * (len(numbers) != 1)} of several shapes"


def _index(at: Tensor, table: Tensor) -> str:
    """The place of the `at`th number of a table: `[0, 2]`, or nothing where there is one only."""
    if table.dim() == 0:
        return ""
    return str([int(n) for n in torch.unravel_index(at, table.shape)])

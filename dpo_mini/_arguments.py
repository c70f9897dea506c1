"""Argument checks, with one message format: the argument, what it must be, what it was.

Shapes use the letters of the library: `B` rows, `X` prompts, `Y` completions, `T` tokens, `V`
vocabulary, `K` ranked items.

Inside `torch.compile` and the transforms of `torch.func` the values of a tensor cannot be looked
at. There a check of values passes, and checks of types, shapes and dtypes are made as always.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Table: TypeAlias = Tensor | np.ndarray | Sequence[Any]
"""A tensor, a numpy array, or numbers in nested lists."""

_LARGEST_COUNT = 2**63 - 1  # what an int64 holds


def check_positive(name: str, value: float) -> None:
    """Refuse anything but a finite real number above zero."""
    if not 0 < _as_float(name, value) < math.inf:
        raise ValueError(f"`{name}` must be a finite number > 0, got {_shown(value)}")


def positive_scalar(name: str, value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A number > 0, or a tensor of no dimension, as a tensor of no dimension.

    Args:
      name: the argument's name.
      value: the number; a tensor keeps its gradient.
      dtype: of the result. A number that it rounds to 0 is refused.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            got = f"{value.dtype} of shape {list(value.shape)}"
            raise ValueError(f"`{name}` must be one real number, got a tensor of {got}")
        scalar = value.to(dtype)
    else:
        check_positive(name, value)
        scalar = torch.tensor(float(value), dtype=dtype)
    if values_visible(scalar) and not 0 < scalar.item() < math.inf:
        raise ValueError(f"`{name}` must be a finite number > 0 in {dtype}, got {float(value):g}")
    return scalar


def check_number(name: str, value: float) -> None:
    """Refuse anything but a finite real number."""
    if not math.isfinite(_as_float(name, value)):
        raise ValueError(f"`{name}` must be a finite number, got {_shown(value)}")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse anything but a real number with `low <= value < high`."""
    if not low <= _as_float(name, value) < high:
        raise ValueError(f"`{name}` must be a number in [{low}, {high}), got {_shown(value)}")


def check_fraction(name: str, value: float) -> None:
    """Refuse anything but a real number with `0 <= value <= 1`."""
    if not 0 <= _as_float(name, value) <= 1:
        raise ValueError(f"`{name}` must be a number in [0, 1], got {_shown(value)}")


def check_count(name: str, value: int, *, least: int = 1, most: int = _LARGEST_COUNT) -> None:
    """Refuse anything but a whole number from `least` to `most`, by default what an int64 holds."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        got = type(value).__name__
        raise TypeError(f"`{name}` must be a whole number >= {least}, got {got}")
    if value < least:
        raise ValueError(f"`{name}` must be a whole number >= {least}, got {_shown(value)}")
    if value > most:
        raise ValueError(f"`{name}` must be a whole number <= {most:,}, got {_shown(value)}")


def check_generator(generator: torch.Generator) -> None:
    """Refuse a missing generator: nothing here may draw from global random state."""
    if not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        raise TypeError(f"`generator` must be a torch.Generator, got {got}")


def check_device(
    like: str, device: torch.device | None, **given: Tensor | torch.Generator | torch.device | None
) -> None:
    """Refuse what lies on another device than that with which it is used.

    Args:
      like: with what, such as `"the policy's weights"`.
      device: where that lies. None, of a model without weights, goes with every device.
      **given: tensors, generators, or the device of something else, under the names that the
        caller's caller used. A generator made by `torch.Generator("cuda")` may lie on "cuda",
        which has no number and goes with all of them.
    """
    for name, one in given.items():
        own = one.device if isinstance(one, Tensor | torch.Generator) else one
        if device is None or own is None or own == device:
            continue
        if own.type != device.type or None not in (own.index, device.index):
            got = f"{'a tensor' if isinstance(one, Tensor) else 'one'} on {own}"
            raise ValueError(f"`{name}` must be on {device} like {like}, got {got}")


def check_floats(shape: str, **tensors: Tensor) -> None:
    """Refuse tensors that are not floating, of one dtype and device, of one non-empty shape.

    Args:
      shape: the shape in letters, such as `"[B]"` or `"[X, Y]"`, whose letters are counted; or
        `"[...]"`, any shape.
      **tensors: the tensors under the names that the caller's caller used.
    """
    n_dims = None if shape == "[...]" else shape.count(",") + 1
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            got = type(tensor).__name__
            raise TypeError(f"`{name}` must be a floating torch.Tensor {shape}, got {got}")
        if tensor.layout != torch.strided:
            what = "a dense tensor (.to_dense() makes one)"
            raise ValueError(f"`{name}` must be {what}, got layout {tensor.layout}")
        if not tensor.is_floating_point():
            what = "a floating dtype (.double() makes one)"
            raise ValueError(f"`{name}` must have {what}, got {tensor.dtype}")
        if shape == "[X, Y]" and tensor.dim() == 1:
            what = f"[X, Y], one row per prompt, got shape {list(tensor.shape)}"
            raise ValueError(f"`{name}` must be {what}: for one prompt write {name}[None]")
        if n_dims not in (None, tensor.dim()) or tensor.numel() == 0:
            got = list(tensor.shape)
            raise ValueError(f"`{name}` must be a non-empty {shape}, got shape {got}")
        if tensor.shape != first.shape:
            got, want = list(tensor.shape), list(first.shape)
            raise ValueError(f"`{name}` must have shape {want} like `{first_name}`, got {got}")
    if len(tensors) > 1:
        check_alike(first_name, first, **tensors)


def as_floats(shape: str, tables: Mapping[str, Table], *, cast_up: bool = False) -> list[Tensor]:
    """Floating tensors of one dtype and one shape from tensors, numpy arrays and lists.

    A list of numbers, or an array of whole ones, takes the dtype of the tables beside it, and
    float64 where there are none. It goes to the device of the tensors beside it.

    Args:
      shape: as in `check_floats`.
      tables: under the names that the caller's caller used.
      cast_up: whether the smaller of two floating dtypes is cast up to the larger, or refused.
    """
    tensors, of_no_dtype = {}, []
    for name, table in tables.items():
        if not isinstance(table, Tensor | np.ndarray) or (
            isinstance(table, np.ndarray) and not np.issubdtype(table.dtype, np.floating)
        ):
            of_no_dtype.append(name)
        tensors[name] = table if isinstance(table, Tensor) else _read_numbers(name, table, shape)
    floating = [
        tensor.dtype
        for name, tensor in tensors.items()
        if name not in of_no_dtype and tensor.is_floating_point()
    ]
    dtype = reduce(torch.promote_types, floating) if floating else torch.float64
    devices = [table.device for table in tables.values() if isinstance(table, Tensor)]
    for name, tensor in tensors.items():
        if not isinstance(tables[name], Tensor) and devices:
            tensors[name] = tensor = tensor.to(devices[0])
        if name in of_no_dtype or (cast_up and tensor.is_floating_point()):
            tensors[name] = tensor.to(dtype)
    check_floats(shape, **tensors)
    return list(tensors.values())


def _read_numbers(name: str, numbers: np.ndarray | Sequence[Any], shape: str) -> Tensor:
    """An array as a tensor of its dtype, a list as one of float64."""
    kind = type(numbers).__name__
    try:
        if not isinstance(numbers, np.ndarray):
            if isinstance(numbers, str) or not isinstance(numbers, Sequence):
                raise TypeError("not numbers in an order")
            numbers = np.asarray(numbers)
            if numbers.dtype.kind in "fiu":
                numbers = numbers.astype(np.float64)
        if numbers.dtype.kind not in "fiu":
            raise TypeError(f"an array of {numbers.dtype}")
        return torch.as_tensor(np.array(numbers, numbers.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = f"a floating torch.Tensor {shape}, an array or a list of numbers"
        raise TypeError(f"`{name}` must be {what}, got {kind}") from error


def check_alike(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Refuse tensors whose dtype or device differs from that of `first`."""
    for name, other in others.items():
        for what in ("dtype", "device"):
            got, want = getattr(other, what), getattr(first, what)
            if got != want:
                cure = f"{name}.to({want if what == 'dtype' else repr(str(want))})"
                raise ValueError(
                    f"`{name}` must have {what} {want} like `{first_name}`, got {got}: write {cure}"
                )


def check_logps(**tensors: Tensor) -> None:
    """Refuse NaN and +inf; -inf is the log-probability of the impossible and passes."""
    for name, tensor in tensors.items():
        if values_visible(tensor) and not (tensor < math.inf).all():  # NaN compares as false
            got = "NaN" if torch.isnan(tensor).any() else "+inf"
            raise ValueError(f"`{name}` must be log-probabilities < inf, got {got}")


def check_at_most_0(name: str, logps: Tensor, *, n_tokens: int = 1) -> None:
    """Refuse log-probabilities above 0, most often negative log-likelihoods; allow for rounding.

    A logit minus the `logsumexp` of all may come out above 0 by the rounding of a logit, which is
    below 100 times the dtype's epsilon while logits stay below 100. What is float64 now may have
    been float32 before.

    Args:
      name: what the message calls them.
      logps: of tokens, or sums over at most `n_tokens` tokens, nats.
      n_tokens: how many such roundings may add up.
    """
    check_floats("[...]", **{name: logps})
    epsilon = max(torch.finfo(dtype).eps for dtype in (logps.dtype, torch.float32))
    if (logps > 100 * epsilon * n_tokens).any():
        raise ValueError(
            f"`{name}` must be log-probabilities <= 0, got {logps.max().item():.4g}: is it a "
            "negative log-likelihood?"
        )


def check_finite(**tensors: Tensor) -> None:
    """Refuse NaN and both infinities."""
    if not values_visible(*tensors.values()):
        return
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = tensor[~torch.isfinite(tensor)][0].item()
            raise ValueError(f"`{name}` must be finite, got {bad}")


def check_normalised(**tables: Tensor) -> None:
    """Refuse rows whose probabilities do not sum to 1: logits passed for log-probabilities.

    A log-probability l is rounded by up to eps |l| / 2. That moves the sum of a row by up to eps
    times its entropy, which in half precision is more than the thousandth that is always allowed.
    """
    for name, table in tables.items():
        if not values_visible(table):
            continue
        half = table.element_size() < 4
        logps = table.detach().float() if half else table.detach()
        sums = logps.logsumexp(-1).exp().flatten()
        wrong = (sums - 1).abs()
        if half:
            entropies = torch.special.entr(logps.exp()).sum(-1).flatten()
            wrong = wrong - torch.finfo(table.dtype).eps * entropies
        if not wrong.max() < 1e-3:
            worst = sums[wrong.argmax()].item()
            raise ValueError(
                f"`{name}` must have rows whose probabilities sum to 1, got a sum of {worst:.4g}: "
                "if these are logits, apply log_softmax first"
            )


def check_indices(name: str, indices: Tensor, shape: str, size: int) -> None:
    """Refuse anything but an int64 tensor of `shape` with values in `0..size-1`."""
    check_integers(name, indices, shape)
    if not values_visible(indices):
        return
    least, most = indices.aminmax()
    if least < 0 or most >= size:
        got = indices[(indices < 0) | (indices >= size)][0].item()
        raise ValueError(f"`{name}` must be in 0..{size - 1}, got {got}")


def check_integers(name: str, indices: Tensor, shape: str) -> None:
    """Refuse anything but a non-empty int64 tensor of `shape`."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"`{name}` must be an int64 tensor {shape}, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise ValueError(f"`{name}` must have dtype torch.int64 (.long()), got {indices.dtype}")
    if indices.dim() != shape.count(",") + 1 or indices.numel() == 0:
        got = list(indices.shape)
        raise ValueError(f"`{name}` must be a non-empty {shape}, got shape {got}")


def check_rows(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Refuse tensors whose number of rows is 0 or differs from that of `first`."""
    for name, tensor in {first_name: first, **others}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"`{name}` must have at least one row, got shape {list(tensor.shape)}")
    for name, other in others.items():
        if len(other) != len(first):
            rows = "1 row" if len(first) == 1 else f"{len(first)} rows"
            raise ValueError(f"`{name}` must have {rows} like `{first_name}`, got {len(other)}")


def as_bool_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask as bool, or a ValueError where its shape is another or a value is not 0/1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"`{name}` must be a bool or 0/1 tensor, got {type(mask).__name__}")
    if mask.shape != shape:
        raise ValueError(f"`{name}` must have shape {list(shape)}, got {list(mask.shape)}")
    if mask.dtype != torch.bool and values_visible(mask):
        wrong = (mask != 0) & (mask != 1)
        if wrong.any():
            raise ValueError(f"`{name}` must be 0 or 1, got {mask[wrong][0].item()}")
    return mask.bool()


def values_visible(*tensors: Tensor) -> bool:
    """Whether the values of all `tensors` may be looked at: not inside a transform."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if hasattr(torch.func, "debug_unwrap"):  # torch 2.7 and newer
            if torch.func.debug_unwrap(tensor, recurse=False) is not tensor:
                return False
        elif torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
    return True


def _as_float(name: str, value: float) -> float:
    """A real number as a float; one that no float holds, such as 10**400, as infinity."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _shown(value: Any) -> str:
    """A number for a message, also where it has more digits than Python writes out."""
    try:
        return f"{value:,}" if isinstance(value, Integral) else str(value)
    except ValueError:
        return f"one of {value.bit_length():,} bits"

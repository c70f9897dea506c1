"""What every public function refuses, said in one voice.

Each message names the argument, what it got and what it takes. Shapes use the letters of the
library: `B` rows, `X` prompts, `Y` completions, `T` tokens, `V` vocabulary, `K` ranked items.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def check_positive(name: str, value: float) -> None:
    """Refuse anything but a finite real number above zero."""
    _check_real(name, value)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, takes a finite number > 0")


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Refuse anything but a real number with `low <= value < high`."""
    _check_real(name, value)
    if not low <= value < high:
        raise ValueError(f"{name}: got {value}, takes a number in [{low}, {high})")


def check_fraction(name: str, value: float) -> None:
    """Refuse anything but a real number with `0 <= value <= 1`."""
    _check_real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, takes a number in [0, 1]")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Refuse anything but a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a whole number >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, takes a whole number >= {least}")


def check_generator(generator: torch.Generator) -> None:
    """Refuse a missing generator: nothing here may draw from global random state."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, takes a torch.Generator")


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
            kind = type(tensor).__name__
            raise TypeError(f"{name}: got {kind}, takes a floating torch.Tensor {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: got dtype {tensor.dtype}, takes a floating dtype")
        if n_dims not in (None, tensor.dim()) or tensor.numel() == 0:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, takes a non-empty {shape}")
        if tensor.shape != first.shape:
            got, want = list(tensor.shape), list(first.shape)
            raise ValueError(f"{name}: got shape {got}, takes {want} like {first_name}")
        check_alike(first_name, first, **{name: tensor})


def check_alike(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Refuse tensors whose dtype or device differs from that of `first`."""
    for name, other in others.items():
        for what in ("dtype", "device"):
            got, want = getattr(other, what), getattr(first, what)
            if got != want:
                raise ValueError(f"{name}: got {what} {got}, takes {want} like {first_name}")


def check_logps(**tensors: Tensor) -> None:
    """Refuse NaN and +inf; -inf is the log-probability of the impossible and passes."""
    for name, tensor in tensors.items():
        if not (tensor < math.inf).all():  # NaN is not less than anything
            got = "NaN" if torch.isnan(tensor).any() else "+inf"
            raise ValueError(f"{name}: got {got}, takes log-probabilities < inf")


def check_finite(**tensors: Tensor) -> None:
    """Refuse NaN and both infinities."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            bad = tensor[~torch.isfinite(tensor)][0].item()
            raise ValueError(f"{name}: got {bad}, takes finite values")


def check_normalised(**tables: Tensor) -> None:
    """Refuse rows whose probabilities do not sum to 1: logits passed for log-probabilities."""
    for name, table in tables.items():
        totals = table.detach().logsumexp(-1).exp().flatten()
        worst = totals[(totals - 1).abs().argmax()].item()
        if not abs(worst - 1) < 1e-3:
            raise ValueError(
                f"{name}: got a row whose probabilities sum to {worst:.4g}, takes rows that sum "
                "to 1 (logits? apply log_softmax first)"
            )


def check_indices(name: str, indices: Tensor, shape: str, size: int) -> None:
    """Refuse anything but an int64 tensor of `shape` with values in `0..size-1`."""
    check_integers(name, indices, shape)
    least, most = indices.aminmax()
    if least < 0 or most >= size:
        got = indices[(indices < 0) | (indices >= size)][0].item()
        raise ValueError(f"{name}: got {got}, takes values in 0..{size - 1}")


def check_integers(name: str, indices: Tensor, shape: str) -> None:
    """Refuse anything but a non-empty int64 tensor of `shape`."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: got {type(indices).__name__}, takes an int64 tensor {shape}")
    if indices.dtype != torch.int64:
        raise ValueError(f"{name}: got dtype {indices.dtype}, takes torch.int64")
    if indices.dim() != shape.count(",") + 1 or indices.numel() == 0:
        raise ValueError(f"{name}: got shape {list(indices.shape)}, takes a non-empty {shape}")


def check_rows(first_name: str, first: Tensor, **others: Tensor) -> None:
    """Refuse tensors whose number of rows is 0 or differs from that of `first`."""
    for name, tensor in {first_name: first, **others}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, takes a torch.Tensor")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, takes at least one row")
    for name, other in others.items():
        if len(other) != len(first):
            raise ValueError(f"{name}: got {len(other)} rows, takes {len(first)} like {first_name}")


def as_bool_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask as bool, or a ValueError where its shape is another or a value is not 0/1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, takes a bool or 0/1 tensor")
    if mask.shape != shape:
        raise ValueError(f"{name}: got shape {list(mask.shape)}, takes {list(shape)}")
    if mask.dtype != torch.bool:
        wrong = (mask != 0) & (mask != 1)
        if wrong.any():
            raise ValueError(f"{name}: got {mask[wrong][0].item()}, takes 0 or 1")
    return mask.bool()


def _check_real(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a number")

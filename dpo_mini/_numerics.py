"""Formulas that keep their digits in float32, and the library's one rule for half precision.

Each function here computes what its first line says. The textbook formula loses digits where two
nearly equal numbers are subtracted, or overflows where an exponential is large; these do not.

Half precision (bfloat16, float16): compute in float32, return the dtype of the input.
`dtype_of_input` does that for every public function of a module.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

HALVES = (torch.bfloat16, torch.float16)
_BLOCK = 2**13
_SMALL = 0.5  # below it, e^u - 1 - u is summed as a series
_SERIES = [1 / math.factorial(k + 2) for k in range(15)]  # of (e^u - 1 - u) / u^2

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")


# --- half precision --------------------------------------------------------------------------


class _Widen(torch.autograd.Function):
    """To float32; a gradient beyond the largest number of the half dtype becomes that number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return narrow(gradients[0], ctx.dtype)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].float()


def widen(value: _T) -> _T:
    """A tensor in half precision in float32; anything else as it is."""
    if not isinstance(value, Tensor) or value.dtype not in HALVES:
        return value
    if torch.compiler.is_compiling():  # the compiler takes no function with a forward-mode rule
        return value.float()  # type: ignore[return-value]
    return _Widen.apply(value)


def dtype_of_input(function: _F) -> _F:
    """`function`, whose result has the dtype of its floating inputs where that is a half one.

    The function widens its inputs itself, after it has checked them. What is beyond the largest
    float16, 65,504, becomes that number, so that no finite loss or gradient turns into infinity.
    """

    @wraps(function)
    def narrowing(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        dtype = common_dtype(*arguments, *named.values())
        if dtype not in HALVES:
            return result
        if not isinstance(result, tuple):
            return narrow(result, dtype)
        parts = [narrow(part, dtype) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)

    return narrowing  # type: ignore[return-value]


def common_dtype(*values: Any) -> torch.dtype | None:
    """That of all floating tensors and arrays; numbers, also those of no dimension, have no say."""
    of_tables = of_numbers = None
    for value in values:
        if not isinstance(value, Tensor | np.ndarray):
            continue
        array = torch.as_tensor(value)
        if not array.is_floating_point():
            continue
        if array.dim() > 0:
            of_tables = torch.promote_types(array.dtype, of_tables or array.dtype)
        else:
            of_numbers = torch.promote_types(array.dtype, of_numbers or array.dtype)
    return of_tables or of_numbers


def narrow(result: Tensor, dtype: torch.dtype) -> Tensor:
    """`result` in a half dtype; what is beyond its largest number becomes that number."""
    if not result.is_floating_point():
        return result
    largest = torch.finfo(dtype).max
    beyond = result.isfinite() & (result.abs() > largest)
    # `result - result.detach()` is 0 and passes the gradient on, which a clamp would stop.
    held = result - result.detach() + result.detach().clamp(-largest, largest)
    return torch.where(beyond, held, result).to(dtype)


# --- formulas --------------------------------------------------------------------------------


def value_zero(tensor: Tensor) -> Tensor:
    """0, with the gradient of `tensor`."""
    return tensor - tensor.detach()


def sigmoid(x: Tensor) -> Tensor:
    """`torch.sigmoid`, whose slope y (1 - y) loses its digits where y is close to 1."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x.clamp(min=0)), torch.sigmoid(x.clamp(max=0)))


def expm1(x: Tensor) -> Tensor:
    """`torch.expm1`, whose slope y + 1 loses its digits where y is close to -1."""
    below = x.clamp(max=-_SMALL).exp() - 1
    return torch.where(x < -_SMALL, below, torch.expm1(x.clamp(min=-_SMALL)))


def hold(exponents: Tensor) -> Tensor:
    """x, but at most 0.9 log(largest number), 639 in float64 and 79 in float32; of slope 1.

    So e^x has no infinity: above that exponent it has the value and the slope from there.
    """
    largest = 0.9 * math.log(torch.finfo(exponents.dtype).max)
    return torch.where(exponents > largest, largest + value_zero(exponents), exponents)


def exp_remainder(u: Tensor) -> Tensor:
    """e^u - 1 - u, never negative: a series near 0, and e^u held where it would overflow."""
    far = expm1(hold(u)) - u
    return torch.where(u.abs() < _SMALL, _exp_remainder_near_0(u.clamp(-_SMALL, _SMALL)), far)


def _exp_remainder_near_0(u: Tensor) -> Tensor:
    """e^u - 1 - u for |u| <= 1/2."""
    series = torch.zeros_like(u)
    for coefficient in torch.tensor(_SERIES[::-1], dtype=u.dtype, device=u.device):
        series = torch.addcmul(coefficient, series, u)
    return series * u * u


# Each formula takes log p, log q and u = log(p / q), all finite: somebody may know u better than by
# subtracting the other two.


def sum_in_blocks(formula: Callable[..., Tensor], *tables: Tensor) -> Tensor:
    """`formula(*tables)`, a sum over the last axis, of `_BLOCK` columns at a time.

    A formula of many steps is three times as fast where what it writes in between fits in a cache.
    """
    blocks = zip(*(table.split(_BLOCK, -1) for table in tables), strict=True)
    return torch.stack([formula(*block) for block in blocks]).sum(0)


def probability_gaps(logps: Tensor, other_logps: Tensor, u: Tensor) -> Tensor:
    """|p - q|; its gradient at p = q is 0."""
    return torch.maximum(logps, other_logps).exp() * -expm1(-u.abs())


def kl_terms(logps: Tensor, other_logps: Tensor, u: Tensor) -> Tensor:
    """q - p + p u: never negative, and 0 where p = q.

    Summed over two distributions it is KL(p || q), for the sums of p and of q are both 1.
    """
    probs = logps.exp()
    near = probs * _exp_remainder_near_0(-u.clamp(-_SMALL, _SMALL))
    gaps = torch.maximum(logps, other_logps).exp() * (1 - (-u.abs()).exp())  # far: not near 0
    far = probs * u - u.sign() * gaps
    return torch.where(u.abs() < _SMALL, near, far)


def chi_squared_terms(logps: Tensor, other_logps: Tensor, u: Tensor) -> Tensor:
    """(p - q)^2 / q."""
    below = other_logps.exp() * expm1(u.clamp(max=_SMALL)) ** 2
    above = (logps + u).exp() * expm1(-u.clamp(min=_SMALL)) ** 2  # q e^u would overflow first
    return torch.where(u < _SMALL, below, above)


def normalise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores.log_softmax(-1)` and `scores.logsumexp(-1)`.

    The largest score is left out of the sum and comes back through log1p, so that the logarithm of
    a probability close to 1 keeps its digits.
    """
    top, at = scores.max(-1, keepdim=True)
    gaps = (scores - top).scatter(-1, at, 0.0)
    others = gaps.exp().scatter(-1, at, 0.0).sum(-1, keepdim=True)
    excess = others.log1p()
    return gaps - excess, (top + excess).squeeze(-1)


def log_mean_exp(logps: Tensor, weights: Tensor) -> Tensor:
    """log E_p[e^w] over the last axis, with all digits where it is close to 0.

    Args:
      logps: log p, of rows that sum to 1; -inf where p is 0, and there `weights` does not matter.
      weights: w of the same shape, less than inf where p is not 0.
    """

    def surplus_of(logps: Tensor, weights: Tensor) -> Tensor:
        probs = logps.exp()
        # Rows sum to 1 but for rounding, so their sum minus 1 counts as 0. Its gradient counts.
        return (probs * expm1(hold(weights)) + value_zero(probs)).sum(-1)

    impossible = torch.isneginf(logps)
    weights = weights.masked_fill(impossible, 0.0)
    surplus = sum_in_blocks(surplus_of, logps, weights)
    near = surplus.abs() < _SMALL
    largest = weights.detach().masked_fill(impossible, -torch.inf).amax(-1, keepdim=True)
    far = normalise(logps + (weights - largest))[1] + largest.squeeze(-1)
    return torch.where(near, torch.where(near, surplus, 0.0).log1p(), far)


def with_slope(value: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """`value` `[...]`, whose gradient in `x` `[..., V]` is `slope` `[..., V]`.

    For a slope that autograd would find by subtracting nearly equal numbers. The second derivative
    is that of `slope` too: half of each factor is a constant.
    """
    half = 0.5 * (slope + slope.detach())
    return value.detach() + (value_zero(x.masked_fill(torch.isneginf(x), 0.0)) * half).sum(-1)


def ranking_terms(scores: Tensor) -> Tensor:
    """log P of each choice that makes a ranking: of item k among k, k + 1, ..., K.

    Args:
      scores: `[..., K]`, best first.
    Returns:
      `[..., K - 1]`; the last item is chosen with probability 1.
    """
    # log sigmoid of how far the item is ahead of all that follow: its digits stay where it is far.
    n_items = scores.shape[-1]
    placed = torch.ones(n_items - 1, n_items, dtype=torch.bool, device=scores.device).tril()
    rest = scores.unsqueeze(-2).expand(*scores.shape[:-1], n_items - 1, n_items)
    return logsigmoid(scores[..., :-1] - rest.masked_fill(placed, -torch.inf).logsumexp(-1))

"""Formulas that keep their digits, each against mpmath on the same rounded numbers."""

import inspect
import math
from typing import NamedTuple

import mpmath
import pytest
import torch

from dpo_mini import _numerics

mpmath.mp.dps = 50
DTYPES = [torch.float32, torch.float64]
GAPS = [0.0, 1e-6, 1e-3, 0.1, 0.4999, 0.5001, 1.0, 5.0, 30.0]


def relative_error(got: torch.Tensor, want: list) -> float:
    pairs = zip(got.flatten().tolist(), want, strict=True)
    return max(float(abs((g - w) / w)) if w else abs(g) for g, w in pairs)


def bound(dtype: torch.dtype, exponent: float = 0.0) -> float:
    """Sixteen roundings, and that of an exponent, which counts as often as it is large."""
    return (16 + exponent) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_remainder(dtype):
    u = torch.tensor([s * g for g in GAPS for s in (1, -1)], dtype=dtype, requires_grad=True)
    got = _numerics.exp_remainder(u)
    exact = [mpmath.expm1(x) - mpmath.mpf(x) for x in map(mpmath.mpf, u.tolist())]
    assert relative_error(got, exact) < bound(dtype)
    (slope,) = torch.autograd.grad(got.sum(), u)
    assert relative_error(slope, [mpmath.expm1(x) for x in u.tolist()]) < bound(dtype)


def test_exp_remainder_is_held_above_the_largest_exponent():
    u = torch.tensor([100.0], requires_grad=True)
    got = _numerics.exp_remainder(u)
    (slope,) = torch.autograd.grad(got.sum(), u)
    held = 0.9 * math.log(torch.finfo(torch.float32).max)
    assert got.item() == pytest.approx(math.exp(held), rel=1e-5)
    assert slope.item() == pytest.approx(math.exp(held), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["kl_terms", "chi_squared_terms", "probability_gaps"])
def test_terms_of_divergences(name, dtype):
    exact = {
        "kl_terms": lambda p, q: q - p + p * mpmath.log(p / q),
        "chi_squared_terms": lambda p, q: (p - q) ** 2 / q,
        "probability_gaps": lambda p, q: abs(p - q),
    }[name]
    first = torch.tensor([-0.7 - s * g for g in GAPS for s in (1, -1)], dtype=dtype)
    second = torch.full_like(first, -0.7)
    got = getattr(_numerics, name)(first, second, first - second)
    probs = [[mpmath.exp(x) for x in side.tolist()] for side in (first, second)]
    want = [exact(p, q) for p, q in zip(*probs, strict=True)]
    assert relative_error(got, want) < bound(dtype, 2 * max(GAPS))
    assert (got >= 0).all()
    assert got[0] == got[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalise_keeps_the_digits_of_a_probability_near_one(dtype):
    for gap in (1e-6, 1.0, 10.0, 30.0, 80.0):
        scores = torch.tensor([0.0, -gap, -gap - 1], dtype=dtype, requires_grad=True)
        logps, log_sum = _numerics.normalise(scores)
        powers = [mpmath.exp(x) for x in scores.tolist()]
        want = [x - mpmath.log1p(powers[1] + powers[2]) for x in map(mpmath.mpf, scores.tolist())]
        assert relative_error(logps, want) < bound(dtype)
        assert relative_error(log_sum, [mpmath.log1p(powers[1] + powers[2])]) < bound(dtype)
        (slope,) = torch.autograd.grad(logps[0], scores)
        total = powers[1] + powers[2]
        shares = [p / (1 + total) for p in powers[1:]]
        assert relative_error(slope, [total / (1 + total), *(-s for s in shares)]) < bound(dtype)


def test_normalise_takes_impossible_entries():
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf], dtype=torch.float64)
    logps, log_sum = _numerics.normalise(scores)
    assert logps.tolist() == [-torch.inf, 0.0, -torch.inf]
    assert log_sum == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-7, 1e-3, 0.3, 1.0, 50.0])
def test_log_mean_exp(dtype, size):
    logps = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=dtype).log()
    weights = torch.tensor([size, -size / 3, size / 7, 1e30], dtype=dtype, requires_grad=True)
    got = _numerics.log_mean_exp(logps, weights)
    probs = [mpmath.mpf(p) for p in (0.5, 0.25, 0.25)]
    powers = [p * mpmath.exp(w) for p, w in zip(probs, weights.tolist()[:3], strict=True)]
    mean = sum(p * mpmath.expm1(w) for p, w in zip(probs, weights.tolist()[:3], strict=True))
    # log 0.5 and log 0.25 are rounded, so a probability is off by eps times its logarithm.
    assert relative_error(got[None], [mpmath.log1p(mean)]) < bound(dtype)
    (slope,) = torch.autograd.grad(got, weights)
    want = [*(p / sum(powers) for p in powers), 0]
    assert relative_error(slope, want) < bound(dtype, 2 * size)


def test_the_gradient_of_log_mean_exp_in_log_p_is_the_tilted_distribution():
    logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    weights = torch.tensor([0.2, -0.1, 0.05], dtype=torch.float64)
    (slope,) = torch.autograd.grad(_numerics.log_mean_exp(logps, weights), logps)
    torch.testing.assert_close(slope, (logps.detach() + weights).softmax(-1))


def test_half_precision_is_rounded_once_and_never_becomes_infinite():
    double = _numerics.dtype_of_input(lambda x, *, scale: (x.float() * scale, x.long()))
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, -300.0, torch.inf], dtype=dtype, requires_grad=True)
        got, indices = double(x[:2].detach(), scale=1 / 3)
        assert torch.equal(got, (x[:2].detach().float() / 3).to(dtype))
        assert indices.dtype == torch.int64
        large, _ = double(x, scale=1e4)
        assert large.dtype == dtype
        assert large[1] == max(-3e6, torch.finfo(dtype).min) or dtype == torch.bfloat16
        assert large[2] == torch.inf  # what is infinite stays so
        (slope,) = torch.autograd.grad(large[:2].sum(), x)
        assert slope[:2].tolist() == torch.tensor([1e4, 1e4]).to(dtype).tolist()
    assert double(torch.ones(2), scale=1e39)[0].tolist() == [torch.inf] * 2


def test_numbers_have_no_say_in_the_dtype_of_tables():
    half, wide = torch.ones(2).half(), torch.ones(2)
    for values, want in (
        ((half, torch.tensor(0.5)), torch.float16),
        ((torch.tensor(0.5, dtype=torch.float64), half, 3, None), torch.float16),
        ((torch.tensor(0.5).half(), torch.tensor(0.5)), torch.float32),  # nothing but numbers
        ((half, wide), torch.float32),
        ((half, half.bfloat16()), torch.float32),
        ((half, wide.double().numpy()), torch.float64),
        ((half, torch.arange(2)), torch.float16),
        ((torch.arange(2), 0.5), None),
    ):
        assert _numerics.common_dtype(*values) is want


class Pair(NamedTuple):
    """What a function may return, with a name for each part."""

    double: torch.Tensor
    count: torch.Tensor


def test_a_function_that_narrows_returns_what_it_returned_before():
    def pair(x, *, scale=2.0):
        """Says what it does."""
        return Pair(_numerics.widen(x) * scale, torch.tensor(len(x)))

    narrowing = _numerics.dtype_of_input(pair)
    assert (narrowing.__name__, narrowing.__doc__) == ("pair", "Says what it does.")
    assert inspect.signature(narrowing) == inspect.signature(pair)
    got = narrowing(torch.tensor([1.0, 2.5]).bfloat16())
    assert type(got) is Pair
    assert (got.double.dtype, got.double.tolist()) == (torch.bfloat16, [2.0, 5.0])
    assert (got.count.dtype, got.count.item()) == (torch.int64, 2)
    plain = _numerics.dtype_of_input(lambda x: (x.float(), x))(torch.ones(2).half())
    assert type(plain) is tuple
    assert [part.dtype for part in plain] == [torch.float16] * 2
    for dtype in (torch.float32, torch.float64):  # wide enough: as it is
        got = narrowing(torch.tensor([1.0, 2.5], dtype=dtype), scale=3.0)
        assert type(got) is Pair
        assert (got.double.dtype, got.double.tolist()) == (dtype, [3.0, 7.5])


def test_a_gradient_in_half_precision_never_becomes_infinite():
    x = torch.tensor([2.0], dtype=torch.float16, requires_grad=True)
    (slope,) = torch.autograd.grad((1e6 * _numerics.widen(x)).sum(), x)
    assert slope.item() == torch.finfo(torch.float16).max
    (slope,) = torch.autograd.grad((3 * _numerics.widen(x)).sum(), x)
    assert slope.item() == 3
    slopes = torch.func.vmap(torch.func.grad(lambda t: _numerics.widen(t) ** 2))(x)
    assert slopes.tolist() == [4.0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jacfwd
def test_with_slope_has_the_second_derivative_of_its_slope():
    """x^3 from its value and its slope alone."""

    def cube(x):
        return _numerics.with_slope((x**3).sum(-1), x, 3 * x**2)

    x = torch.tensor([0.3, -1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: (t**3).sum(), x)
    (slope,) = torch.autograd.grad(cube(x), x, create_graph=True)
    torch.testing.assert_close(slope, 3 * x**2)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curvature, 6 * x.detach())
    torch.testing.assert_close(torch.func.hessian(cube)(x.detach()), torch.diag(6 * x.detach()))


@pytest.mark.parametrize("function", ["sigmoid", "expm1"])
def test_slopes_of_elementary_functions_keep_their_digits(function):
    x = torch.tensor([s * g for g in GAPS for s in (1, -1)], requires_grad=True)
    got = getattr(_numerics, function)(x)
    (slope,) = torch.autograd.grad(got.sum(), x)
    exact = {"sigmoid": lambda t: 1 / (1 + mpmath.exp(-t)), "expm1": mpmath.expm1}[function]
    slopes = {
        "sigmoid": lambda t: 1 / (1 + mpmath.exp(-t)) / (1 + mpmath.exp(t)),
        "expm1": mpmath.exp,
    }[function]
    points = [mpmath.mpf(t) for t in x.tolist()]
    assert relative_error(got, [exact(t) for t in points]) < bound(torch.float32, max(GAPS))
    assert relative_error(slope, [slopes(t) for t in points]) < bound(torch.float32, max(GAPS))

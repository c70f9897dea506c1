"""What judges and homework tests are written with: instances from a seed, and plain assertions.

    numbers(result, [4])                  # the result as a tensor, or a sentence on what it is
    agree(got, wanted, "the sentence")    # silent, or an AssertionError with the sentence
    require(got.min() > 0, "the sentence")

Like the other checks it imports nothing of the library. It holds no answer to any exercise.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "instance",
    "other_instances",
    "random_policies",
    "draws",
    "require",
    "numbers",
    "agree",
    "alike",
]

_BETAS = (0.25, 0.4, 0.5, 0.8, 1.25, 1.6, 2.0)  # not 1, which would hide a forgotten beta
_slack = 0.0
_SHARES = ((8, 6, 4, 2), (9, 5, 4, 2), (7, 6, 4, 3), (9, 6, 3, 2), (10, 5, 3, 2))  # twentieths


def instance(seed: int) -> tuple[Tensor, Tensor, float]:
    """The instance of `seed`: two prompts with four answers each, in numbers of two decimals.

    Returns:
      `(ref_probs [2, 4], rewards [2, 4], beta)`, float64; the four rewards of a prompt differ by
      0.2 at least, and no answer has the probability of another.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    ref_probs, rewards = [], []
    for _ in range(2):
        shares = torch.tensor(_SHARES[draw(len(_SHARES))], dtype=torch.float64)
        ref_probs.append(shares[torch.randperm(4, generator=generator)] / 20)
        steps = torch.randperm(15, generator=generator)[:4].double()
        rewards.append((2 * steps - 12) / 10)  # -1.2, -1.0, ... 1.6
    return torch.stack(ref_probs), torch.stack(rewards), _BETAS[draw(len(_BETAS))]


def other_instances(seed: int, n: int = 4) -> Iterator[tuple[Tensor, Tensor, float]]:
    """`n` more instances that go with `seed`, of 3 to 6 answers: what hidden tests are run on.

    Returns:
      `(ref_probs [2, Y], rewards [2, Y], beta)` each, float64.
    """
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    for k in range(n):
        draws = torch.randn(2, 2, 3 + k % 4, dtype=torch.float64, generator=generator)
        beta = _BETAS[(k + seed) % len(_BETAS)]
        yield draws[0].softmax(-1), draws[1], beta


def random_policies(ref_probs: Tensor, seed: int) -> Tensor:
    """Policies of the shape of `ref_probs`, `[..., Y]`, from `seed`: positive, rows sum to 1."""
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    return torch.randn(ref_probs.shape, dtype=torch.float64, generator=generator).softmax(-1)


def draws(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of `shape`, float64, from `seed`: other values for a judge to try."""
    generator = torch.Generator().manual_seed(3_000_003 + seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def require(condition: Any, sentence: str) -> None:
    """Silent where `condition` holds. Unlike `assert`, it also judges under `python -O`.

    Raises:
      AssertionError: with `sentence`.
    """
    if not condition:
        raise AssertionError(sentence)


def numbers(result: Any, shape: Sequence[int]) -> Tensor:
    """`result` as a float64 tensor of `shape`.

    Raises:
      AssertionError: it is None, not numbers, of another shape, or holds NaN or an infinity.
    """
    require(result is not None, "you returned None: write the body and return the result")
    blank = isinstance(result, list | tuple) and any(value is None for value in result)
    require(not blank, "a place is still None: write your number there")
    try:
        got = torch.as_tensor(result, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"you returned a {type(result).__name__}, not numbers") from None
    require(list(got.shape) == list(shape), f"you returned {_shape_sentence(got, shape)}")
    require(torch.isfinite(got).all(), "you returned NaN or an infinity: where does it come from?")
    return got


def _shape_sentence(got: Tensor, wanted: Sequence[int]) -> str:
    """What is said of a result `got` that has not the shape `wanted`."""
    said = f"the shape {list(got.shape)} where {list(wanted)} is wanted"
    if math.prod(wanted) == got.numel():
        return f"{said}: the same numbers, but the dimensions differ"
    if not wanted:
        return f"{said}, which is one number: a sum or a mean may be missing"
    if got.numel() == 1:
        return f"{said}: one number, which may have been summed too soon"
    return said


def agree(got: Any, wanted: Any, sentence: str, *, tolerance: float = 1e-8) -> None:
    """Silent where all of `got` is within `tolerance` of `wanted`.

    Raises:
      AssertionError: with `sentence`, and the two values that are furthest apart. Where they print
        alike, with their difference and the tolerance.
    """
    got, wanted = torch.broadcast_tensors(_detached(got), _detached(wanted))
    if not torch.allclose(got, wanted, rtol=0.0, atol=max(tolerance, _slack)):
        at = int((got - wanted).abs().nan_to_num(torch.inf).argmax())
        found, ought = got.flatten()[at].item(), wanted.flatten()[at].item()
        numbers = f"here {found:.4f}, and {ought:.4f} is wanted"
        if abs(found - ought) < 1e-4:
            numbers = f"nearly: off by {abs(found - ought):.1e}, and {tolerance:.0e} is allowed"
        raise AssertionError(f"{sentence} ({numbers})")


@contextmanager
def _loosened(slack: float) -> Iterator[None]:
    """Within it, `agree` allows `slack` where that is more than its tolerance."""
    global _slack
    before, _slack = _slack, slack
    try:
        yield
    finally:
        _slack = before


def alike(got: Any, wanted: Any, *, tolerance: float = 1e-6) -> bool:
    """Whether all of `got` is within `tolerance` of `wanted`."""
    got, wanted = torch.broadcast_tensors(_detached(got), _detached(wanted))
    return torch.allclose(got, wanted, rtol=0.0, atol=tolerance)


def _detached(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach()


def __dir__() -> list[str]:
    return __all__

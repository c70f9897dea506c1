"""Slips that any exercise may meet: a sign, a factor, a logarithm, two arguments exchanged.

No list of wrong answers holds them all. So the judge is asked again, about the learner's function
with one thing changed: where every theorem then holds, that one thing was the mistake. And where
an argument can be changed and the result stays, the function does not use it.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from dpo_mini.checks.homework import _loosened

Answer = Callable[..., Tensor]
Change = Callable[[Any], Any]
NEARLY = (
    "This is nearly right, and not to the last digits: does a search stop too early, or is a "
    "number in float32?"
)
BASE, NATURAL = "A logarithm or a power has base", "nats need base e."
# A change that may repair a result, and what is said where it does.
OF_RESULTS: tuple[tuple[Change, str], ...] = (
    (lambda x: -x, "Only the sign is wrong: it is reversed."),
    (lambda x: x.log(), "The logarithm is missing: you return the number that it is taken of."),
    (lambda x: x.exp(), "This is a logarithm: the number that you took it of is asked for."),
    (lambda x: x * math.log(2), f"{BASE} 2: {NATURAL}"),
    (lambda x: x / math.log(2), f"{BASE} 2: {NATURAL}"),
    (lambda x: x * math.log(10), f"{BASE} 10: {NATURAL}"),
    (lambda x: x / math.log(10), f"{BASE} 10: {NATURAL}"),
    (lambda x: x.logit(), "This is a probability: its log-odds are asked for."),
    (lambda x: x.sigmoid(), "These are log-odds: the probability is asked for."),
    (lambda x: x / x.sum(), "The probabilities do not sum to 1: divide them by their sum."),
    (lambda x: x.flip(-1), "The values are right, and stand in reversed order."),
    (lambda x: 1 - x, "You return 1 minus what is asked for."),
    (lambda x: 1 / x, "It is upside down: you return 1 over what is asked for."),
    (lambda x: 2 * x, "A factor 2 is missing: you return half of what is asked for."),
    (lambda x: x / 2, "There is a factor 2 too many: you return twice what is asked for."),
    (lambda x: x.sqrt(), "The square root is missing: you return the square."),
    (lambda x: x.square(), "There is a square root too many."),
)


def named_slip(
    judge: Callable[[Answer], object], answer: Answer, names: Sequence[str], cases: Sequence[tuple]
) -> str:
    """The sentence of the one slip that explains all that is wrong; "" if none does.

    Args:
      judge: raises where a theorem fails.
      answer: the learner's function, for which one does.
      names: those of its arguments.
      cases: argument tuples, which show of what kind each argument is.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what the function prints was printed before
        if _holds(judge, answer, 1e-5):
            return NEARLY
        for repaired, sentence in _repairs(answer, names, cases[0]):
            if _holds(judge, repaired, 1e-5):  # and may be in float32 besides
                return sentence
        if _holds(judge, answer, 5e-3):
            return NEARLY
        unused = [f"`{name}`" for at, name in enumerate(names) if _ignores(answer, at, cases)]
    if len(unused) > 1:
        listed = f"{', '.join(unused[:-1])} and {unused[-1]}"
        return f"{listed} are missing: your answer is the same whatever they are."
    return f"{unused[0]} is missing: your answer is the same whatever it is." if unused else ""


def _holds(judge: Callable[[Answer], object], answer: Answer, slack: float) -> bool:
    try:
        with _loosened(slack):
            judge(answer)
    except Exception:  # a function may fail on arguments that it was not written for
        return False
    return True


def _repairs(answer: Answer, names: Sequence[str], case: tuple) -> Iterator[tuple[Answer, str]]:
    """The function with one thing changed, and what is said where that repairs it."""
    arguments = list(enumerate(zip(names, case, strict=True)))
    for change, sentence in OF_RESULTS:
        yield lambda *a, change=change: change(answer(*a)), sentence
    for at, (name, value) in arguments:
        if name in ("beta", "betas"):
            yield lambda *a, at=at: answer(*a) * a[at], "A factor beta is missing."
            yield lambda *a, at=at: answer(*a) / a[at], "There is a factor beta too many."
        for change, sentence in _changes_of(name, value):
            yield (
                lambda *a, at=at, change=change: answer(*a[:at], change(a[at]), *a[at + 1 :]),
                sentence,
            )
    for at, (_, value) in arguments[:1]:
        if isinstance(value, Tensor):
            mean, total = "This is a mean where a sum is", "This is a sum where a mean is"
            yield lambda *a, at=at: answer(*a) * a[at].shape[-1], f"{mean} asked for."
            yield lambda *a, at=at: answer(*a) / a[at].shape[-1], f"{total} asked for."
    for (i, (first, one)), (j, (second, other)) in combinations(arguments, 2):
        if getattr(one, "shape", None) == getattr(other, "shape", None):
            yield (
                lambda *a, i=i, j=j: answer(*a[:i], a[j], *a[i + 1 : j], a[i], *a[j + 1 :]),
                f"`{first}` and `{second}` have changed places.",
            )


def _changes_of(name: str, value: Any) -> list[tuple[Change, str]]:
    """What may have happened to an argument of this kind."""
    if type(value) is int:
        off = f"You are off by one: you count one {{}} of `{name}`."
        return [(lambda n: n - 1, off.format("too many")), (lambda n: n + 1, off.format("too few"))]
    if not _is_real(value):
        return []
    changes = [(lambda x: -x, f"A sign is reversed: with minus `{name}` it would be right.")]
    if name in ("beta", "betas"):
        changes += [
            (
                lambda beta: 1 / beta,
                "Beta is upside down: it multiplies where it should divide, or the reverse.",
            ),
            (lambda beta: 2 * beta, "A factor 2 is wrong: it would be right with twice the beta."),
            (lambda beta: beta / 2, "A factor 2 is wrong: it would be right with half the beta."),
            (lambda beta: beta * math.log(2), f"{BASE} 2: {NATURAL}"),
        ]
    elif isinstance(value, Tensor):
        changes += [
            (lambda x: x.log(), f"`{name}` stands where its logarithm is due."),
            (lambda x: x.exp(), f"`{name}` is a logarithm already, or a power of e is due there."),
            (lambda x: x.flip(-1), f"The order of `{name}` is reversed."),
            (lambda x: x.mT, f"Rows and columns of `{name}` have changed places."),
        ]
    elif 0 < value < 1:
        changes.append((lambda x: 1 - x, f"1 - `{name}` and `{name}` have changed places."))
    return changes


def _is_real(value: Any) -> bool:
    """Whether it is a number, or a tensor of numbers, that need not be whole."""
    return isinstance(value, float) or (torch.is_tensor(value) and value.is_floating_point())


def _ignores(answer: Answer, at: int, cases: Sequence[tuple]) -> bool:
    """Whether on every case the result stays, whatever stands in that place."""
    told = 0
    for case in cases:
        others = [
            x
            for x in _others(case[at])
            if not torch.equal(torch.as_tensor(x), torch.as_tensor(case[at]))
        ]
        try:
            before = answer(*case)
            after = [answer(*case[:at], other, *case[at + 1 :]) for other in others]
        except Exception:  # a function may fail on arguments that it was not written for
            return False
        # A count or a choice may stay where its argument moves a little, and NaN tells nothing.
        if torch.isfinite(before).all() and (before != before.round()).any():
            told += len(others)
            if any(not torch.equal(before, x) for x in after):
                return False
    return told > 0


def _others(value: Any) -> list:
    """Other values of the same kind: probabilities stay probabilities."""
    if not _is_real(value):
        return [value + 1, value + 2] if type(value) is int else []
    if not isinstance(value, Tensor) or not value.ndim:
        return [0.9 * value + 0.01, 0.8 * value + 0.02]
    weighted = value * torch.linspace(0.7, 1.2, value.shape[-1], dtype=value.dtype)
    total = value.sum(-1, keepdim=True)
    if torch.allclose(total, torch.ones_like(total)):
        return [weighted / weighted.sum(-1, keepdim=True), value.flip(-1)]
    return [weighted, value.flip(-1), -value]

"""Checks for the exercises: they name the likely mistake.

A check runs the learner's function on cases of its own and compares with an answer worked out
here, without the library: it is an independent judge. Where the result equals that of a known
mistake, its sentence is what the learner reads.

    check("2.1", my_function)               # in a notebook: prints one line
    passed, sentence = diagnose("2.1", f)   # in a homework's own tests
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

Answer = Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise and what its check knows.

    Args:
      number: chapter and place, such as "2.1".
      cases: argument tuples that the function is called with.
      answer: the right function, written with torch alone.
      mistakes: functions that a learner with one mistake each writes. Its docstring is the sentence
        that the learner then reads: it names the mistake and does not give the answer.
      tolerance: the largest absolute difference from the answer that passes.
    """

    number: str
    cases: Sequence[tuple]
    answer: Answer
    mistakes: Sequence[Answer]
    tolerance: float = 1e-8


def check(number: str, candidate: Answer) -> None:
    """Print whether `candidate` solves exercise `number`, and the likely mistake where it does not.

    Raises:
      ValueError: there is no exercise of that number.
    """
    passed, sentence = diagnose(number, candidate)
    print(f"Exercise {number} {'passed' if passed else 'not yet'}: {sentence}")


def diagnose(number: str, candidate: Answer) -> tuple[bool, str]:
    """Whether `candidate` solves exercise `number`, and one sentence on why or why not.

    Raises:
      ValueError: there is no exercise of that number.
    """
    exercise = _exercise(number)
    if not callable(candidate):
        return False, f"this takes a function and got {type(candidate).__name__}."
    results = []
    for case in exercise.cases:
        try:
            result = candidate(*_copies(case))
        except Exception as error:
            return False, f"your function raised {type(error).__name__}: {error}"
        if result is None:
            return False, "your function returned None: write its body and return the result."
        wanted = _tensor(exercise.answer(*_copies(case)))
        try:
            got = _tensor(result)
        except (TypeError, ValueError, RuntimeError):
            return False, f"your function returned a {type(result).__name__}, not numbers."
        if got.shape != wanted.shape:
            shapes = f"{list(got.shape)} where {list(wanted.shape)} is wanted"
            return False, f"your function returned the shape {shapes}."
        results.append((case, got, wanted))
    if all(_close(got, wanted, exercise.tolerance) for _, got, wanted in results):
        return True, "your answer agrees with ours on every case."
    for mistake in exercise.mistakes:
        wrong = [_tensor(mistake(*_copies(case))) for case in exercise.cases]
        pairs = zip(wrong, results, strict=True)
        if all(_close(got, w, exercise.tolerance) for w, (_, got, _) in pairs):
            return False, " ".join((mistake.__doc__ or "").split())
    _, got, wanted = next(r for r in results if not _close(r[1], r[2], exercise.tolerance))
    at = tuple((~_equal(got, wanted, exercise.tolerance)).nonzero()[0].tolist())
    where = f" at {list(at)}" if at else ""
    return (
        False,
        f"your answer{where} is {got[at].item():.4f} where {wanted[at].item():.4f} is wanted.",
    )


def exercises() -> dict[str, Exercise]:
    """Every exercise of the course by its number."""
    found = {}
    chapters = (m.name for m in iter_modules(__path__) if m.name.startswith("chapter_"))
    for chapter in chapters:
        module = import_module(f"{__name__}.{chapter}")
        found.update({exercise.number: exercise for exercise in module.EXERCISES})
    return found


def _exercise(number: str) -> Exercise:
    known = exercises()
    if number not in known:
        raise ValueError(f"number: got {number!r}, takes one of {', '.join(known)}")
    return known[number]


def _copies(case: tuple) -> tuple:
    """The case's arguments, copied, so that a candidate that changes them harms nobody."""
    return tuple(value.clone() if isinstance(value, torch.Tensor) else value for value in case)


def _tensor(result: Any) -> torch.Tensor:
    return torch.as_tensor(result, dtype=torch.float64).detach()


def _equal(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> torch.Tensor:
    return torch.isclose(got, wanted, rtol=0.0, atol=tolerance, equal_nan=True)


def _close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    return got.shape == wanted.shape and bool(_equal(got, wanted, tolerance).all())

"""Checks for the exercises: they judge by theorem, and name the likely mistake.

A check runs the learner's function on cases of its own. Whether it is right, a judge decides by
what must hold of a right answer: it sums to one, a constant changes nothing, the mean over all
outcomes is the gradient, the table is that of the enumeration. It holds no copy of the answer, so
any function passes for which the theorems hold. Where a wrong result equals that of a known
mistake, the mistake's sentence is what the learner reads, else the theorem's.

    check("2.1", my_function)               # in a notebook: prints one line
    passed, sentence = diagnose("2.1", f)   # in a homework's own tests
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

__all__ = ["Answer", "NOT_ATTEMPTED", "Exercise", "check", "diagnose", "exercises"]

Answer = Callable[..., Any]
NOT_ATTEMPTED = "not attempted"


def _one_number(*_: Any) -> Sequence[int]:
    """The shape of one number, whatever the arguments `_` are."""
    return ()


@dataclass(frozen=True)
class Exercise:
    """One exercise and what its check knows.

    Args:
      number: chapter and place, such as "2.1".
      cases: argument tuples on which a wrong answer is held against the known mistakes.
      judge: takes the candidate, which then takes copies of its arguments and returns float64
        tensors of the right shape, on any arguments; raises AssertionError with one sentence for
        the theorem that fails. `homework.agree` is its usual line.
      mistakes: functions that a learner with one mistake each writes. Its docstring is the sentence
        that the learner then reads: it names the mistake and does not give the answer.
      shape: from a case's arguments to the shape of the result; one number, if left out.
      tolerance: the largest absolute difference at which a result is a mistake's.
    """

    number: str
    cases: Sequence[tuple]
    judge: Callable[[Callable[..., Tensor]], None]
    mistakes: Sequence[Answer]
    shape: Callable[..., Sequence[int]] = _one_number
    tolerance: float = 1e-8


class _UnfitError(Exception):
    """What a candidate returned cannot be judged; the message is the sentence to read."""


class _EmptyError(_UnfitError):
    """The candidate is the stub."""


def check(number: str, candidate: Answer) -> None:
    """Print whether `candidate` solves exercise `number`, and the likely mistake where it does not.

    Raises:
      ValueError: there is no exercise of that number.
    """
    passed, sentence = diagnose(number, candidate)
    if sentence.startswith(NOT_ATTEMPTED):
        print(f"Exercise {number} {sentence}")
    else:
        print(f"Exercise {number} {'passed' if passed else 'not yet'}: {sentence}")


def diagnose(number: str, candidate: Answer) -> tuple[bool, str]:
    """Whether `candidate` solves exercise `number`, and one sentence on why or why not.

    Returns:
      `(passed, sentence)`; of a stub the sentence begins with `NOT_ATTEMPTED`.
    Raises:
      ValueError: there is no exercise of that number.
    """
    exercise = _exercise(number)
    if not callable(candidate):
        return False, f"this takes a function and got {type(candidate).__name__}."
    answer = _judged(exercise, candidate)
    try:
        results = [answer(*case) for case in exercise.cases]
        exercise.judge(answer)
    except _EmptyError:
        return False, f"{NOT_ATTEMPTED}: write the body of your function and return the result."
    except _UnfitError as unfit:
        return False, str(unfit)
    except AssertionError as broken:
        return False, _known_mistake(exercise, results) or str(broken)
    return True, "every theorem that its judge asks for holds."


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


def _judged(exercise: Exercise, candidate: Answer) -> Callable[..., Tensor]:
    """The candidate as a judge may call it: it harms no argument, and returns numbers."""

    def answer(*arguments: Any) -> Tensor:
        try:
            result = candidate(*_copies(arguments))
        except NotImplementedError as error:
            raise _EmptyError from error
        except Exception as error:
            sentence = f"your function raised {type(error).__name__}: {error}"
            raise _UnfitError(sentence) from error
        if result is None:
            raise _EmptyError
        try:
            got = _tensor(result)
        except (TypeError, ValueError, RuntimeError) as error:
            sentence = f"your function returned a {type(result).__name__}, not numbers."
            raise _UnfitError(sentence) from error
        if list(got.shape) != (wanted := list(exercise.shape(*arguments))):
            sentence = (
                f"your function returned the shape {list(got.shape)} where {wanted} is wanted."
            )
            raise _UnfitError(sentence)
        return got

    return answer


def _known_mistake(exercise: Exercise, results: Sequence[Tensor]) -> str:
    """The sentence of the mistake that gives these results on every case; "" if none does."""
    for mistake in exercise.mistakes:
        wrong = (_tensor(mistake(*_copies(case))) for case in exercise.cases)
        pairs = zip(wrong, results, strict=True)
        if all(_close(got, w, exercise.tolerance) for w, got in pairs):
            return " ".join((mistake.__doc__ or "").split())
    return ""


def _copies(case: tuple) -> tuple:
    """The case's arguments, copied, so that a candidate that changes them harms nobody."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def _tensor(result: Any) -> Tensor:
    return torch.as_tensor(result, dtype=torch.float64).detach()


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return got.shape == wanted.shape and torch.allclose(
        got, wanted, rtol=0.0, atol=tolerance, equal_nan=True
    )


def __dir__() -> list[str]:
    return __all__

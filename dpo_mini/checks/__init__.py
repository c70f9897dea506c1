"""Checks for the exercises: they judge by theorem, and name the likely mistake.

A check runs the learner's function on cases of its own. Whether it is right, a judge decides by
what must hold of a right answer: it sums to one, a constant changes nothing, the mean over all
outcomes is the gradient, the table is that of the enumeration. It holds no copy of the answer, so
any function passes for which the theorems hold. Where a theorem fails, the learner reads what went
wrong: the sentence of the known mistake that gives the same results, or of the one slip (a sign, a
factor, a logarithm) without which the theorems would hold. Where neither is found, the learner
reads the theorem.

    check("2.1", my_function)               # in a notebook: prints one line
    passed, sentence = diagnose("2.1", f)   # in a homework's own tests
    check(Exercise(...), f)                 # an exercise of your own: INSTRUCTORS.md has one

Where a chapter computes one thing in two ways, `largest_error` says how closely they agree:

    largest_error(by_hand, by_autograd)     # prints `largest error: below 1e-12`, or raises
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from dpo_mini.checks._differences import Numbers, check_bound, furthest_apart, short
from dpo_mini.checks.homework import _shape_sentence
from dpo_mini.checks.slips import NEARLY, named_slip

__all__ = [
    "Answer",
    "NOT_ATTEMPTED",
    "Exercise",
    "check",
    "diagnose",
    "exercises",
    "largest_error",
]

Answer = Callable[..., Any]
NOT_ATTEMPTED = "not attempted"


def _one_number(*_: Any) -> Sequence[int]:
    """The shape of one number, whatever the arguments `_` are."""
    return ()


@dataclass(frozen=True)
class Exercise:
    """One exercise and what its check knows.

    Args:
      number: chapter and place, such as "2.1", or a name of yours.
      cases: one tuple of arguments per case; on them a wrong answer is compared with the known
        mistakes. No mistake may be right on all of them.
      judge: takes the candidate, which then takes copies of its arguments and returns float64
        tensors of the right shape, on any arguments; raises AssertionError with one sentence for
        the theorem that fails. `homework.agree` is its usual line. (An `assert` statement would
        vanish under `python -O`.)
      mistakes: functions that a learner with one mistake each writes. Its docstring is the sentence
        that the learner then reads: it names the mistake and does not give the answer.
      shape: from a case's arguments to the shape of the result; one number, if left out.
      tolerance: how far a result may be from a mistake's, absolute and relative, to be told so.
    Raises:
      TypeError, ValueError: an argument is not what is said here; the message names it.
    """

    number: str
    cases: Sequence[tuple]
    judge: Callable[[Callable[..., Tensor]], object]
    mistakes: Sequence[Answer]
    shape: Callable[..., Sequence[int]] = _one_number
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse what no check could use."""
        if not isinstance(self.number, str):
            raise TypeError(f"`number` must be a text, got {self.number!r}")
        if not self.cases or not all(isinstance(case, tuple) for case in self.cases):
            raise TypeError(
                f"`cases` must hold a tuple of arguments per case, one at least, got {self.cases!r}"
            )
        for name in ("judge", "shape"):
            if not callable(getattr(self, name)):
                raise TypeError(f"`{name}` must be a function, got {getattr(self, name)!r}")
        for mistake in self.mistakes:
            said = mistake.__doc__ or sys.flags.optimize > 1  # python -OO drops every docstring
            if not callable(mistake) or not said:
                raise TypeError(
                    f"`mistakes` must be functions, each with a sentence for its docstring, "
                    f"got {mistake!r}"
                )
        if not 0 < self.tolerance < 1:
            raise ValueError(f"`tolerance` must be a number in (0, 1), got {self.tolerance}")


class _UnfitError(Exception):
    """What a candidate returned cannot be judged; the message is the sentence to read."""


class _EmptyError(_UnfitError):
    """The candidate is the stub."""


def check(number: str | Exercise, candidate: Answer) -> None:
    """Print whether `candidate` solves an exercise, and the likely mistake where it does not.

    Args:
      number: of an exercise of the course, such as "2.1"; or an `Exercise` of your own.
      candidate: the learner's function.
    Raises:
      ValueError: `number` is neither.
    """
    exercise = _exercise(number)
    passed, sentence = diagnose(exercise, candidate)
    if sentence.startswith(NOT_ATTEMPTED):
        print(f"Exercise {exercise.number} {sentence}")
    else:
        print(f"Exercise {exercise.number} {'passed' if passed else 'not yet'}: {sentence}")


def diagnose(number: str | Exercise, candidate: Answer) -> tuple[bool, str]:
    """Whether `candidate` solves an exercise, and one sentence on why or why not.

    Args:
      number: of an exercise of the course, such as "2.1"; or an `Exercise` of your own.
      candidate: the learner's function.
    Returns:
      `(passed, sentence)`; of a stub the sentence begins with `NOT_ATTEMPTED`.
    Raises:
      ValueError: `number` is neither.
      TypeError: the exercise's judge returns something: it must raise where a theorem fails.
    """
    exercise = _exercise(number)
    if not callable(candidate):
        return False, f"this takes a function and got {type(candidate).__name__}."
    answer = _judged(exercise, candidate)
    try:
        results = [answer(*case) for case in exercise.cases]
        verdict = exercise.judge(answer)
    except _EmptyError:
        return False, f"{NOT_ATTEMPTED}: write the body of your function and return the result."
    except _UnfitError as unfit:
        return False, str(unfit)
    except AssertionError as broken:
        return False, _named(exercise, answer, results, str(broken)) or str(broken)
    if verdict is not None:
        raise TypeError(
            f"`judge` must raise AssertionError where a theorem fails and return None, got "
            f"{verdict!r}"
        )
    return True, "every theorem that its judge asks for holds."


def exercises() -> dict[str, Exercise]:
    """Every exercise of the course by its number."""
    return {number: exercise for name in _chapters() for number, exercise in _of(name).items()}


def largest_error(a: Numbers, b: Numbers, *, below: float = 1e-12, what: str = "") -> None:
    """Print that `a` and `b` differ by less than a bound, or raise with the true difference.

    The size itself is in the last digits and differs from machine to machine. The bound does not,
    so a chapter can print it: `largest error: below 1e-12`. Equal infinities differ by 0.

    Args:
      a: a tensor, a numpy array, a number, or a list of them, such as the gradients of several
        parameters.
      b: the same numbers, computed in another way, in the same shape: nothing is broadcast.
      below: the bound on the largest absolute difference, > 0.
      what: a name of what is compared, such as "the gradient", printed too:
        `largest error of the gradient: below 1e-12`.
    Raises:
      ValueError: the largest difference is not below the bound. The message gives the difference,
        its place, the two values and the bound. Also where shapes differ, where there are no
        numbers or a NaN, and where `below` is not a finite number > 0.
      TypeError: an argument is of another type.
    """
    check_bound(below)
    if not isinstance(what, str):
        raise TypeError(f"`what` must be a text, got {what!r}")
    name = f"largest error of {what}" if what else "largest error"
    error, place, one, other = furthest_apart(a, b)
    if not error < below:
        at = f" at {place}" if place else ""
        raise ValueError(
            f"{name}: must be below {short(below)}, got {error:.3g}{at}, "
            f"where `a` is {one!r} and `b` is {other!r}"
        )
    print(f"{name}: below {short(below)}")


def _chapters() -> list[str]:
    """The modules of the chapters, in their order."""
    return [m.name for m in iter_modules(__path__) if m.name.startswith("chapter_")]


def _of(chapter: str) -> dict[str, Exercise]:
    """The exercises of one chapter, whose module is imported when it is asked for."""
    module = import_module(f"{__name__}.{chapter}")
    return {exercise.number: exercise for exercise in module.EXERCISES}


def _exercise(number: str | Exercise) -> Exercise:
    if isinstance(number, Exercise):
        return number
    name = f"chapter_{str(number).partition('.')[0]:0>2}"
    known = _of(name) if name in _chapters() else {}
    if number not in known:
        every = ", ".join(exercises())
        raise ValueError(f"`number` must be an Exercise or one of {every}, got {number!r}")
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
            raise _UnfitError(f"your function returned {_shape_sentence(got, wanted)}.")
        return got

    return answer


def _named(
    exercise: Exercise, answer: Callable[..., Tensor], results: Sequence[Tensor], broken: str
) -> str:
    """The sentence of what went wrong, where it is known; "" where it is not."""
    known = _known_mistake(exercise, results)
    found = known or named_slip(exercise.judge, answer, _names(exercise), exercise.cases)
    return f"{found} What fails: {broken}" if found == NEARLY else found


def _names(exercise: Exercise) -> list[str]:
    """The names of the arguments: those of a known mistake that names them all."""
    for mistake in exercise.mistakes:
        names = list(signature(mistake).parameters)
        if len(names) == len(exercise.cases[0]):
            return names
    return [f"argument {n}" for n, _ in enumerate(exercise.cases[0], 1)]


def _known_mistake(exercise: Exercise, results: Sequence[Tensor]) -> str:
    """The sentence of the mistake that gives these results on every case; "" if none does."""
    wrong = {m: [_tensor(m(*_copies(case))) for case in exercise.cases] for m in exercise.mistakes}
    # A result that is no number hides another mistake: then the other cases tell which.
    told = [torch.isfinite(got).all() for got in results]
    for every in (True, False):
        for mistake, found in wrong.items():
            pairs = zip(results, found, told, strict=True)
            same = [_close(got, w, exercise.tolerance) for got, w, tell in pairs if every or tell]
            if same and all(same):
                return " ".join((mistake.__doc__ or "").split())
    return ""


def _copies(case: tuple) -> tuple:
    """The case's arguments, copied, so that a candidate that changes them harms nobody."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in case)


def _tensor(result: Any) -> Tensor:
    return torch.as_tensor(result, dtype=torch.float64).detach()


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return got.shape == wanted.shape and torch.allclose(
        got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def __dir__() -> list[str]:
    return __all__

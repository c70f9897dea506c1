"""Every exercise: its solution passes, and plausible mistakes each get a sentence of their own."""

import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dpo_mini.checks import Exercise, check, diagnose, exercises

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = exercises()


def gather(folder: Path, pattern: str, name: str) -> dict:
    found = {}
    for path in sorted(folder.glob(pattern)):
        found.update(runpy.run_path(str(path))[name])
    return found


SOLUTIONS = gather(ROOT / "notebooks" / "solutions", "[0-9][0-9]_*.py", "SOLUTIONS")
MISTAKES = gather(ROOT / "tests" / "mistakes", "chapter_*.py", "MISTAKES")


def test_every_exercise_has_a_solution_and_three_mistakes():
    assert set(SOLUTIONS) == set(EXERCISES) == set(MISTAKES)
    assert all(len(mistakes) >= 3 for mistakes in MISTAKES.values())


@pytest.mark.parametrize("number", EXERCISES)
def test_the_solution_passes(number):
    passed, sentence = diagnose(number, SOLUTIONS[number])
    assert passed, sentence


@pytest.mark.parametrize(
    ("number", "words"), [(n, words) for n, found in MISTAKES.items() for words in found]
)
def test_a_mistake_gets_its_own_sentence(number, words):
    passed, sentence = diagnose(number, MISTAKES[number][words])
    assert not passed
    assert words in sentence


@pytest.mark.parametrize("number", EXERCISES)
def test_the_sentences_of_an_exercise_differ(number):
    sentences = [diagnose(number, mistake)[1] for mistake in MISTAKES[number].values()]
    assert len(set(sentences)) == len(sentences)


def blank(number: str, value: float):
    """An answer of one value, in the shape of the right one."""

    def answer(*arguments):
        return torch.full_like(
            torch.as_tensor(SOLUTIONS[number](*arguments), dtype=torch.float64), value
        ).detach()

    return answer


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 0.25, -1.0])
@pytest.mark.parametrize("number", EXERCISES)
def test_zeros_and_constants_fail(number, value):
    assert not diagnose(number, blank(number, value))[0]


def nearly(number: str, change: str, size: float):
    """The solution, off by `size` in one way."""
    generator = torch.Generator().manual_seed(0)

    def answer(*arguments):
        right = torch.as_tensor(SOLUTIONS[number](*arguments), dtype=torch.float64).detach()
        where = torch.zeros(right.numel(), dtype=torch.float64)
        where[torch.randint(right.numel(), (), generator=generator)] = 1.0
        return {
            "shifted": right + size,
            "scaled": right * (1 + size),
            "turned round": -right,
            "one entry": right + size * where.reshape(right.shape),
        }[change]

    return answer


@pytest.mark.parametrize("change", ["shifted", "scaled", "turned round", "one entry"])
@pytest.mark.parametrize("number", EXERCISES)
def test_near_misses_fail(number, change):
    """Theorems that let these pass would not pin the answer down."""
    assert not diagnose(number, nearly(number, change, 1e-4))[0]


def unfinished(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("stub", [lambda *arguments: None, unfinished])
@pytest.mark.parametrize("number", EXERCISES)
def test_a_stub_is_not_attempted(number, stub, capsys):
    passed, sentence = diagnose(number, stub)
    assert not passed
    assert sentence.startswith("not attempted: ")
    check(number, stub)
    assert capsys.readouterr().out.startswith(f"Exercise {number} not attempted: ")


def test_what_is_not_a_number_is_told_so():
    assert "takes a function" in diagnose("0.1", 3)[1]
    assert "not numbers" in diagnose("0.1", lambda *arguments: "a")[1]
    assert "raised ZeroDivisionError" in diagnose("0.1", lambda *arguments: 1 / 0)[1]
    assert "shape [2] where [4]" in diagnose("0.1", lambda *arguments: torch.ones(2))[1]


def test_an_unknown_mistake_is_told_which_theorem_fails():
    passed, sentence = diagnose("0.1", lambda ref_probs, rewards, beta: ref_probs)
    assert not passed
    assert "does not differ as their rewards do" in sentence


def test_no_judge_has_an_answer_beside_it():
    """What an exercise holds is its judge and its mistakes; the solution is a learner's."""
    assert {field.name for field in fields(Exercise)} == {
        "number",
        "cases",
        "judge",
        "mistakes",
        "shape",
        "tolerance",
    }


def test_a_candidate_cannot_harm_the_cases():
    def greedy(ref_probs, rewards, beta):
        rewards.fill_(0.0)
        return ref_probs

    diagnose("0.1", greedy)
    assert diagnose("0.1", SOLUTIONS["0.1"])[0]


def test_check_prints_one_line(capsys):
    check("0.1", SOLUTIONS["0.1"])
    assert capsys.readouterr().out == (
        "Exercise 0.1 passed: every theorem that its judge asks for holds.\n"
    )


def test_an_unknown_number_is_refused():
    with pytest.raises(ValueError, match="number: got '99.9'"):
        diagnose("99.9", print)

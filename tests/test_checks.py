"""Every exercise: its solution passes, and plausible mistakes each get a sentence of their own."""

import inspect
import math
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_mini import closed_form
from dpo_mini.checks import (
    Exercise,
    check,
    diagnose,
    exercises,
    homework,
    largest_error,
    slips,
    theorems,
)

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = exercises()


def gather(folder: Path, pattern: str, name: str) -> dict:
    found = {}
    for path in sorted(folder.glob(pattern)):
        found.update(runpy.run_path(str(path))[name])
    return found


SOLUTIONS = gather(ROOT / "notebooks" / "solutions", "[0-9][0-9]_*.py", "SOLUTIONS")
MISTAKES = gather(ROOT / "tests" / "mistakes", "chapter_*.py", "MISTAKES")


def known_sentences(number: str) -> set[str]:
    return {" ".join(mistake.__doc__.split()) for mistake in EXERCISES[number].mistakes}


def argument_names(number: str) -> list[str]:
    return list(inspect.signature(SOLUTIONS[number]).parameters)


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
def test_the_sentences_of_an_exercise_differ_and_none_is_without_its_mistake(number):
    sentences = [diagnose(number, mistake)[1] for mistake in MISTAKES[number].values()]
    assert len(set(sentences)) == len(sentences)
    assert known_sentences(number) <= set(sentences)


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


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        ("0.1", lambda x: x[None], "shape [1, 4] where [4] is wanted: the same numbers, but"),
        ("0.2", lambda x: x.expand(4), "shape [4] where [] is wanted, which is one number: a"),
        ("0.1", lambda x: x.sum(), "shape [] where [4] is wanted: one number, which may have"),
    ],
)
def test_what_has_another_shape_is_told_what_may_have_happened(number, change, words):
    assert words in diagnose(number, lambda *arguments: change(SOLUTIONS[number](*arguments)))[1]


@pytest.mark.parametrize("kind", [torch.Tensor.tolist, torch.Tensor.numpy])
@pytest.mark.parametrize("number", ["0.1", "0.2"])
def test_the_right_numbers_pass_as_a_list_and_as_an_array(number, kind):
    assert diagnose(number, lambda *arguments: kind(SOLUTIONS[number](*arguments)))[0]


def test_an_unknown_mistake_is_told_which_theorem_fails():
    def cubed(ref_probs, rewards, beta):
        return torch.softmax(ref_probs.log() + (rewards / beta) ** 3, 0)

    passed, sentence = diagnose("0.1", cubed)
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
    for given in ("99.9", 2.1, None):
        for function in (check, diagnose):
            with pytest.raises(ValueError, match=rf"^`number` must be .* 0.1, .*, got {given!r}$"):
                function(given, print)


# --- known mistakes: told from the right answer, and from each other --------------------------


def furthest(results, others) -> float:
    """The largest difference on any case, relative where values are above 1."""
    worst = 0.0
    for got, other in zip(results, others, strict=True):
        far = (got - other).abs() / (1 + other.abs())
        same = (got == other) | (got.isnan() & other.isnan())
        worst = max(worst, float(far.nan_to_num(1.0).masked_fill(same, 0.0).max()))
    return worst


@pytest.mark.parametrize("number", EXERCISES)
def test_on_the_cases_no_mistake_is_right_and_no_two_are_alike(number):
    """Else a sentence would be told to somebody who made another mistake."""
    exercise = EXERCISES[number]
    answers = {"the solution": SOLUTIONS[number]}
    answers.update({mistake.__name__: mistake for mistake in exercise.mistakes})
    results = {
        name: [torch.as_tensor(answer(*case), dtype=torch.float64) for case in exercise.cases]
        for name, answer in answers.items()
    }
    for one, other in combinations(results, 2):
        assert furthest(results[one], results[other]) > 20 * exercise.tolerance, (one, other)


@pytest.mark.parametrize("number", EXERCISES)
def test_every_known_mistake_is_named_by_its_own_sentence(number):
    for mistake in EXERCISES[number].mistakes:
        passed, sentence = diagnose(number, mistake)
        assert not passed
        assert sentence == " ".join(mistake.__doc__.split())


def test_a_mistake_in_float32_is_named_too():
    def wrong(*arguments):
        return MISTAKES["2.1"]["distance from the reference"](*arguments).float()

    assert "distance from the reference" in diagnose("2.1", wrong)[1]


def test_a_mistake_beside_a_result_that_is_no_number_is_named_too():
    """A reversed penalty, with 0 log 0 as NaN in the one case that has a probability of 0."""

    def wrong(probs, ref_probs, rewards, beta):
        return (probs * rewards).sum() + beta * (probs * (probs / ref_probs).log()).sum()

    assert "penalty has the wrong sign" in diagnose("1.1", wrong)[1]


# --- slips: what may happen in any exercise ------------------------------------------------------

# What happened to the right result, and words of what is said.
SLIPS = {
    "the sign": (lambda x: -x, "sign"),
    "half": (lambda x: x / 2, "factor 2 is missing"),
    "double": (lambda x: 2 * x, "factor 2 too many"),
    "base 2": (lambda x: x / math.log(2), "base 2"),
    "base 10": (lambda x: x / math.log(10), "base 10"),
    "no logarithm": (lambda x: x.exp(), "logarithm is missing"),
    "upside down": (lambda x: 1 / x, "upside down"),
    "less than 1": (lambda x: 1 - x, "1 minus"),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("number", EXERCISES)
def test_a_slip_is_named_in_every_exercise(number, slip):
    """By itself, by a known mistake that is the same, or by another slip that repairs it."""
    change, words = SLIPS[slip]

    def slipped(*arguments):
        return change(torch.as_tensor(SOLUTIONS[number](*arguments), dtype=torch.float64))

    passed, sentence = diagnose(number, slipped)
    assert not passed
    if number == "6.1" and slip == "no logarithm":  # e to the power of thousands is infinite
        return
    others = {said for _, said in slips.OF_RESULTS} | known_sentences(number)
    assert words in sentence or sentence in others or "would be right" in sentence, sentence


@pytest.mark.parametrize("number", [n for n in EXERCISES if "beta" in argument_names(n)])
def test_a_beta_that_is_left_out_or_upside_down_is_named_in_every_exercise(number):
    at = argument_names(number).index("beta")

    def answer_at(beta):
        return lambda *a: SOLUTIONS[number](*a[:at], beta(a[at]), *a[at + 1 :])

    for beta, words in ((lambda beta: 0.7, "`beta` is missing"), (lambda beta: 1 / beta, "upside")):
        passed, sentence = diagnose(number, answer_at(beta))
        assert not passed
        assert words in sentence or sentence in known_sentences(number), sentence


@pytest.mark.parametrize(
    ("number", "wrong", "words"),
    [
        ("4.4", lambda p, old, new: SOLUTIONS["4.4"](p, new, old), "changed places"),
        ("5.3", lambda logratios, s, b: SOLUTIONS["5.3"](s, logratios, b), "have changed places"),
        ("3.1", lambda p, r, b, n: SOLUTIONS["3.1"](p, r, b, n + 1), "one too many of `n_tokens`"),
        ("9.3", lambda q, r, n: SOLUTIONS["9.3"](q, r, n - 1), "one too few of `n`"),
        ("7.2", lambda theta, c: SOLUTIONS["7.2"](theta, -c), "with minus `c`"),
        ("11.2", lambda q, wins, b: (q + wins.mean(1) / b).softmax(0), "its logarithm is due"),
        ("11.2", lambda q, wins, b: SOLUTIONS["11.2"](q, wins.T, b), "averages columns"),
        ("5.2", lambda x, b: SOLUTIONS["5.2"](x, b) / len(x), "a mean where a sum"),
        ("16.2", lambda *a: SOLUTIONS["16.2"](*a) * len(a[0]), "a sum where a mean"),
        ("5.3", lambda x, s, b: SOLUTIONS["5.3"](x, s, b) * b, "factor beta too many"),
        ("1.1", lambda p, q, r, b: SOLUTIONS["1.1"](p, q, r, b).sigmoid(), "log-odds"),
        ("0.1", lambda q, r, b: q * 2 ** (r / b) / (q * 2 ** (r / b)).sum(), "base 2"),
        ("9.3", lambda q, r, n: SOLUTIONS["9.3"](q, 0 * r, n), "`rewards` is missing"),
    ],
)
def test_other_slips_are_named(number, wrong, words):
    passed, sentence = diagnose(number, wrong)
    assert not passed
    assert words in sentence


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-4])
@pytest.mark.parametrize("number", ["2.1", "2.3", "5.2", "6.3"])
def test_who_is_nearly_right_reads_so_with_the_difference(number, size):
    passed, sentence = diagnose(number, lambda *a: SOLUTIONS[number](*a) + size)
    assert not passed
    assert sentence.startswith("This is nearly right")
    if size < 1e-4:  # else the two numbers print differently
        assert re.search(r"\(nearly: off by \d\.\de-\d\d, and 1e-08 is allowed\)", sentence)


def test_slips_print_nothing(capsys):
    """A learner's own print would come once more for every slip that is tried."""

    def loud(*arguments):
        print("!")
        return 0.3 + SOLUTIONS["0.1"](*arguments)

    diagnose("0.1", SOLUTIONS["0.1"])
    before = capsys.readouterr().out
    diagnose("0.1", loud)
    assert before == ""
    assert capsys.readouterr().out.count("!") < 2 + len(EXERCISES["0.1"].cases)


# --- an exercise of an instructor's own ----------------------------------------------------------


def judge_double(double):
    for x in (0.5, -3.0):
        homework.agree(double(torch.tensor(x)), 2 * x, "this is not twice the number")


def squared(x):
    """This is the square."""
    return x * x


DOUBLE = {
    "number": "A.1",
    "cases": [(torch.tensor(3.0),)],
    "judge": judge_double,
    "mistakes": [squared],
}


def test_check_and_diagnose_take_an_exercise_of_ones_own(capsys):
    own = Exercise(**DOUBLE)
    assert diagnose(own, lambda x: x + x) == (True, "every theorem that its judge asks for holds.")
    assert diagnose(own, squared) == (False, "This is the square.")
    assert diagnose(own, lambda x: x) == (
        False,
        "A factor 2 is missing: you return half of what is asked for.",
    )
    assert "not twice the number (here 4.5000" in diagnose(own, lambda x: x + 4)[1]
    check(own, lambda x: 2 * x)
    check(own, lambda x: None)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Exercise A.1 passed: every theorem that its judge asks for holds."
    assert said[1].startswith("Exercise A.1 not attempted: ")


def test_an_exercise_without_known_mistakes_is_judged_too():
    own = Exercise(**DOUBLE | {"mistakes": ()})
    assert diagnose(own, lambda x: 2 * x)[0]
    assert "`argument 1` is missing" in diagnose(own, lambda x: torch.tensor(0.4))[1]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("number", 1.1),
        ("cases", []),
        ("cases", (torch.tensor(3.0),)),
        ("judge", "agree"),
        ("mistakes", [lambda x: x]),
        ("mistakes", ["twice"]),
        ("shape", [2]),
        ("tolerance", 0.0),
    ],
)
def test_a_part_of_an_exercise_that_no_check_could_use_is_named(name, given):
    with pytest.raises((TypeError, ValueError), match=rf"^`{name}` must .*, got "):
        Exercise(**DOUBLE | {name: given})


def test_a_judge_that_answers_and_does_not_raise_is_refused():
    """`return got == wanted` would let every answer pass."""
    own = Exercise(**DOUBLE | {"judge": lambda double: bool(double(1.0) == 2)})
    with pytest.raises(TypeError, match="`judge` must raise AssertionError .*, got False"):
        diagnose(own, lambda x: x)


def test_a_check_imports_its_own_chapter_alone():
    script = (
        "import sys; from dpo_mini.checks import diagnose; diagnose('2.1', print); "
        "print(sorted(m for m in sys.modules if m.startswith('dpo_mini.checks.chapter_')))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "['dpo_mini.checks.chapter_02']"


# --- how closely two ways agree ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1.0, 1.0 + 1e-13),
        (2, 2),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float16)),
        (torch.ones(3, requires_grad=True), np.ones(3)),
        (np.arange(6.0).reshape(2, 3)[:, ::-1], [[2, 1, 0], [5.0, 4.0, 3.0]]),
        (np.float64(0.5), torch.tensor(0.5)),
        ([torch.tensor(1.0), 2, np.int64(3)], torch.tensor([1.0, 2, 3])),
        ([torch.ones(2), torch.ones(3, 1)], (np.ones(2), [[1.0]] * 3)),
        ([[1.0, 2.0], [3.0]], [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]),
        (torch.tensor([-math.inf, 0.0]), [-math.inf, 0.0]),
        ([torch.ones(0), torch.ones(1)], [torch.ones(0), torch.ones(1)]),
        (Fraction(1, 4), 0.25),
    ],
)
def test_the_largest_error_is_printed_as_a_bound(a, b, capsys):
    for one, other in ((a, b), (b, a)):
        assert largest_error(one, other) is None
        assert capsys.readouterr().out == "largest error: below 1e-12\n"


@pytest.mark.parametrize(
    ("below", "shown"),
    [(1e-12, "1e-12"), (1e-5, "1e-5"), (0.001, "0.001"), (1, "1"), (2.5e-8, "2.5e-8")],
)
def test_a_bound_is_printed_as_one_writes_it_and_with_the_name(below, shown, capsys):
    largest_error([1.0, 2.0], [1.0, 2.0], below=below, what="the gradient")
    assert capsys.readouterr().out == f"largest error of the gradient: below {shown}\n"


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (1.0, 1.5, "got 0.5, where `a` is 1.0 and `b` is 1.5"),
        (
            [[0.0, 0.0, -2.0]],
            [[0.0, 1.0, 1.0]],
            "got 3 at [0, 2], where `a` is -2.0 and `b` is 1.0",
        ),
        (
            [torch.zeros(2), torch.zeros(1, 3)],
            [torch.ones(2), torch.tensor([[0.0, 0.0, 2.0]])],
            "got 2 at [1][0, 2], where `a` is 0.0 and `b` is 2.0",
        ),
        ([0.0, math.inf], [0.0, 1.0], "got inf at [1], where `a` is inf and `b` is 1.0"),
        ([math.inf], [-math.inf], "got inf at [0], where `a` is inf and `b` is -inf"),
    ],
)
def test_a_larger_error_is_told_with_its_place(a, b, said, capsys):
    for what, name in (("", "largest error"), ("J", "largest error of J")):
        with pytest.raises(ValueError) as told:
            largest_error(a, b, below=1e-3, what=what)
        assert str(told.value) == f"{name}: must be below 0.001, {said}"
    assert capsys.readouterr().out == ""


def test_an_error_of_just_the_bound_is_not_below_it(capsys):
    with pytest.raises(ValueError, match="must be below 0.5, got 0.5"):
        largest_error(1.0, 1.5, below=0.5)
    largest_error(1.0, 1.5, below=math.nextafter(0.5, 1.0))
    assert capsys.readouterr().out == "largest error: below 0.5\n"


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (
            torch.ones(2, 3),
            torch.ones(3, 2),
            "`b` must have shape [2, 3] like `a`, got shape [3, 2]",
        ),
        (torch.ones(3), 1.0, "`b` must have shape [3] like `a`, got shape []"),
        (torch.ones(1), 1.0, "`b` must have shape [1] like `a`, got shape []"),
        (
            [torch.ones(2), torch.ones(3)],
            [torch.ones(2), torch.ones(4)],
            "`b` must have shape [3] like `a`, got shape [4] at [1]",
        ),
        (
            [torch.ones(2), torch.ones(3)],
            torch.ones(5),
            "`b` must have 2 parts of several shapes like `a`, got shape [5]",
        ),
        ([], [], "`a` must hold a number at least, got none"),
        (torch.ones(0, 2), torch.ones(0, 2), "`a` must hold a number at least, got none"),
        (math.nan, math.nan, "`a` must hold no NaN, got one"),
        ([0.0, 1.0], [0.0, math.nan], "`b` must hold no NaN, got one at [1]"),
        (
            [torch.ones(2), torch.ones(1, 2)],
            [torch.ones(2), torch.tensor([[1.0, math.nan]])],
            "`b` must hold no NaN, got one at [1][0, 1]",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, said):
    with pytest.raises(ValueError) as told:
        largest_error(a, b)
    assert str(told.value) == said


@pytest.mark.parametrize("below", [0, 0.0, -1e-3, math.nan, math.inf])
def test_a_bound_that_is_none_is_refused(below):
    with pytest.raises(ValueError, match=r"^`below` must be a finite number > 0, got "):
        largest_error(1.0, 1.0, below=below)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"a": "1.0"}, "`a` must hold real numbers, got str"),
        ({"b": [1.0, None]}, "`b` must hold real numbers, got NoneType"),
        ({"b": torch.tensor(1j)}, "`b` must hold real numbers, got Tensor of torch.complex64"),
        ({"b": torch.tensor(True)}, "`b` must hold real numbers, got Tensor of torch.bool"),
        ({"b": np.array(["1"])}, "`b` must hold real numbers, got ndarray of <U1"),
        ({"b": True}, "`b` must hold real numbers, got bool"),
        ({"b": 1j}, "`b` must hold real numbers, got complex"),
        ({"below": "1e-12"}, "`below` must be a number, got str"),
        ({"below": True}, "`below` must be a number, got bool"),
        ({"what": 3}, "`what` must be a text, got 3"),
    ],
)
def test_what_is_of_another_type_is_refused(options, said):
    with pytest.raises(TypeError) as told:
        largest_error(**{"a": 1.0, "b": 1.0, **options})
    assert str(told.value) == said


# --- what the judges have in common --------------------------------------------------------------


def test_what_judges_state_theorems_with_is_what_the_library_computes():
    """A second writing, since no judge may import what it judges."""
    for seed, (refs, rewards, beta) in enumerate(homework.other_instances(seed=8)):
        probs, ref_logps = homework.random_policies(refs, seed), refs.log()
        for got, wanted in (
            (theorems.optimum(refs, rewards, beta).log(),
             closed_form.optimal_logps(ref_logps, rewards, beta)),
            (theorems.implied_rewards(probs, refs, beta),
             closed_form.implied_rewards(probs.log(), ref_logps, beta)),
            (theorems.kl(probs, refs), closed_form.kl(probs.log(), ref_logps)),
            (theorems.objective(probs, refs, rewards, beta),
             closed_form.objective(probs.log(), ref_logps, rewards, beta)),
        ):  # fmt: skip
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    certain = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert theorems.kl(certain, torch.full_like(certain, 0.5)).item() == math.log(2)


def test_every_draw_is_every_row_of_answers_with_its_probability():
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    drawn, chances = theorems.every_draw(probs, 2)
    assert drawn.tolist() == [[y, z] for y in range(3) for z in range(3)]
    torch.testing.assert_close(chances.view(3, 3), probs.outer(probs))


def test_a_theorem_raises_its_sentence_where_it_does_not_hold():
    x = torch.tensor([0.2, 0.8], dtype=torch.float64, requires_grad=True)
    theorems.sum_to_one(x)
    theorems.differ_alike(x + 3, x, "why")
    theorems.no_slope((x - 0.5).square().sum() - 0.6 * (x[1] - x[0]), x, "why")
    for theorem, arguments in (
        (theorems.sum_to_one, (x / 2, "why")),
        (theorems.differ_alike, (2 * x, x, "why")),
        (theorems.no_slope, (x.square().sum(), x, "why")),
    ):
        with pytest.raises(AssertionError, match="^why "):
            theorem(*arguments)

"""The homework: each exercise judged, the sheets stamped by seed, and nbgrader grading students."""

import ast
import html
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import torch

from dpo_mini import checks
from dpo_mini.checks import exercises, homework, slips

ROOT = Path(__file__).resolve().parent.parent
SHEETS = sorted((ROOT / "notebooks" / "homework").glob("*.ipynb"))
TOOL = ROOT / "tools" / "make_homework.py"
MISTAKES = runpy.run_path(str(ROOT / "tests" / "mistakes" / "homework.py"))["MISTAKES"]
NAME = re.compile(r"^(?:def )?(\w+)(?:\(| = )", re.M)

stamped, guarded = map(runpy.run_path(str(TOOL)).get, ("stamped", "guarded"))


@pytest.fixture(autouse=True)
def _default_dtype():
    """A sheet's set-up makes float64 the default: not for the tests after it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def cells_of(sheet: Path, seed: int = 0) -> list:
    return nbformat.reads(stamped(sheet, seed), as_version=4).cells


def about(cell) -> dict:
    return cell.metadata.get("nbgrader", {})


def graded_tests() -> dict[str, Path]:
    """The sheet of each visible test, by grade id."""
    found = {}
    for sheet in SHEETS:
        for cell in cells_of(sheet):
            if about(cell).get("grade_id", "").endswith("-test"):
                found[about(cell)["grade_id"]] = sheet
    return found


def hidden(test: str) -> str:
    """The grade id of the hidden tests of the same exercise: h1-slope-more of h1-slope-test."""
    return re.sub("-test$", "-more", test)


TESTS = graded_tests()


class Attempt:
    """A sheet run up to one of its tests, with the exercise that the test is about."""

    def __init__(self, test: str, seed: int = 0) -> None:
        self.values: dict = {"__name__": "__main__"}
        exercise = ""
        for cell in cells_of(TESTS[test], seed):
            if about(cell).get("grade_id") == test:
                self.visible = cell.source
            elif about(cell).get("grade_id") == hidden(test):
                self.hidden = cell.source
                break
            elif cell.cell_type == "code" and not about(cell).get("grade"):
                exec(cell.source, self.values)
                if about(cell).get("solution"):
                    exercise = cell.source
        # The name that the solution defines: a function, or MINE.
        self.name = NAME.search(exercise).group(1)
        self.solution = self.values[self.name]

    def judge(self, answer, *, hidden_only: bool = False) -> str:
        """What the test says of `answer`: nothing where it passes."""
        self.values[self.name] = answer
        try:
            if not hidden_only:
                exec(self.visible, self.values)
            exec(self.hidden, self.values)
        except Exception as error:
            return str(error) or type(error).__name__
        finally:
            self.values[self.name] = self.solution
        return ""


def filled(result, value: float):
    """`value` in the shape of a right result."""
    if isinstance(result, bool):
        return bool(value)
    return torch.full_like(torch.as_tensor(result, dtype=torch.float64), value).detach()


def blank_answers(solution) -> dict:
    """Zeros, two constants and the stub, in the shapes of the solution's results."""
    if isinstance(solution, list):
        constants = {f"{value}": [value] * len(solution) for value in (0.0, 0.5, 1.0)}
        return {**constants, "stub": [None] * len(solution)}

    def constant(value):
        return lambda *a, **k: filled(solution(*a, **k), value)

    # A quarter each is a policy of the instance.
    constants = {f"{value}": constant(value) for value in (0.0, 0.25, 0.5, 1.0)}
    return {
        **constants,
        "stub": lambda *a, **k: None,
    }


# --- each exercise ---------------------------------------------------------------------------


def test_every_test_has_three_mistakes_and_every_sheet_a_written_question():
    assert set(MISTAKES) == set(TESTS)
    assert all(len(mistakes) >= 3 for mistakes in MISTAKES.values())
    for sheet in SHEETS:
        cells = [about(cell) for cell in cells_of(sheet)]
        graded = [cell["grade_id"] for cell in cells if cell.get("grade")]
        tests = [name for name in graded if name in TESTS]
        pairs = [name for test in tests for name in (test, hidden(test))]
        assert graded == [*pairs, f"h{sheet.name[0]}-words"]
        assert 5 <= len(tests) <= 6
        ids = [cell["grade_id"] for cell in cells if cell]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("seed", [0, 7, 8])
@pytest.mark.parametrize("test", TESTS)
def test_the_solution_passes(test, seed):
    attempt = Attempt(test, seed)
    assert attempt.judge(attempt.solution) == ""


@pytest.mark.parametrize(
    ("test", "words"), [(t, words) for t, found in MISTAKES.items() for words in found]
)
def test_a_mistake_gets_its_own_sentence(test, words):
    assert words in Attempt(test).judge(MISTAKES[test][words])


@pytest.mark.parametrize("test", TESTS)
def test_the_sentences_of_a_test_differ(test):
    attempt = Attempt(test)
    sentences = [attempt.judge(mistake) for mistake in MISTAKES[test].values()]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("test", TESTS)
def test_zeros_constants_and_the_stub_fail(test, seed):
    attempt = Attempt(test, seed)
    for name, answer in blank_answers(attempt.solution).items():
        assert attempt.judge(answer) != "", name
        assert attempt.judge(answer, hidden_only=True) != "", f"{name} passes the hidden tests"


@pytest.mark.parametrize("test", TESTS)
def test_the_hidden_tests_accept_the_solution_and_refuse_a_mistake(test):
    attempt = Attempt(test)
    assert attempt.judge(attempt.solution, hidden_only=True) == ""
    refused = [attempt.judge(m, hidden_only=True) for m in MISTAKES[test].values()]
    assert sum(sentence != "" for sentence in refused) >= 2, refused


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_a_cell_holds_one_idea(sheet):
    for cell in cells_of(sheet):
        if cell.cell_type == "code":
            assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= 20, cell.source
            assert max(map(len, cell.source.splitlines())) <= 79


def refuse(answer):
    raise AssertionError


def constant(*arguments):
    return torch.tensor(0.3)


def visible_sentences(source: str) -> list[str]:
    """All that a visible test can say: its own texts, and those of an exercise of a chapter."""
    body = ast.parse(source)
    pieces = {id(v) for n in ast.walk(body) if isinstance(n, ast.JoinedStr) for v in n.values[1:]}
    found = [n for n in ast.walk(body) if isinstance(n, ast.Constant) and id(n) not in pieces]
    texts = [n.value for n in found]
    texts = [text for text in texts if isinstance(text, str)]
    sentences = [text for text in texts if text.count(" ") >= 2]
    for number in [text for text in texts if text in exercises()]:
        exercise = exercises()[number]
        sentences += [" ".join(mistake.__doc__.split()) for mistake in exercise.mistakes]
        names = list(inspect.signature(exercise.mistakes[0]).parameters)
        sentences += [said for _, said in slips._repairs(print, names, exercise.cases[0])]
        sentences += [slips.NEARLY, slips.named_slip(refuse, constant, names, exercise.cases)]
    return sentences


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_the_grading_page_explains_every_sentence(sheet):
    page = (ROOT / "INSTRUCTORS.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (all|\d\.\d) \| (.*?) \|", page, re.M)
    exercise = "0"
    for cell in cells_of(sheet):
        heading = re.match(r"## (\d)\.", cell.source)
        exercise = f"{sheet.name[0]}.{heading.group(1)}" if heading else exercise
        if about(cell).get("grade_id") in TESTS:
            explained = [words for place, words in rows if place in ("all", exercise)]
            assert set(MISTAKES[about(cell)["grade_id"]]) <= set(explained)
            for sentence in visible_sentences(cell.source):
                assert any(words in sentence for words in explained), (exercise, sentence)


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_the_points_are_those_of_the_headings_and_of_the_grading_page(sheet):
    page = (ROOT / "INSTRUCTORS.md").read_text(encoding="utf-8")
    points, headings = [], []
    for cell in cells_of(sheet):
        for heading in re.findall(r"^## .*\((\d+) points\)$", cell.source, re.M):
            headings.append(int(heading))
            points.append(0)
        if about(cell).get("grade"):
            assert about(cell)["points"] > 0
            points[-1] += about(cell)["points"]
    assert points == headings
    assert f"There are {sum(points)} points." in cells_of(sheet)[0].source
    assert re.search(rf"\[{sheet.stem}\].*\| {sum(points)} \|", page)


# --- what a student's cell may overwrite -------------------------------------------------------

TAMPERING = """
from dpo_mini import checks
from dpo_mini.checks import homework

for _module in (checks, homework):
    for _name in [n for n, value in vars(_module).items() if callable(value) and n[0] != "_"]:
        if _name not in ("instance", "draws", "random_policies"):  # what a cheat needs as it is
            setattr(_module, _name, lambda *arguments, **options: None)
checks.diagnose = lambda *arguments: (True, "")
homework.numbers = lambda result, shape: torch.zeros(tuple(shape))
homework.alike = lambda *arguments, **options: False
homework.other_instances = lambda *arguments, **options: ()
"""


@pytest.mark.parametrize("test", TESTS)
def test_a_cell_that_overwrites_the_judges_changes_no_hidden_verdict(test, monkeypatch):
    attempt = Attempt(test)
    answers = {**blank_answers(attempt.solution), **MISTAKES[test]}

    def verdicts() -> dict[str, str]:
        return {name: attempt.judge(answer, hidden_only=True) for name, answer in answers.items()}

    before = verdicts()
    assert all(before[name] for name in blank_answers(attempt.solution))
    for module in (checks, homework):
        for name, value in list(vars(module).items()):
            monkeypatch.setattr(module, name, value)  # put back after the test
    exec(TAMPERING, {"torch": torch})
    assert verdicts() == before


# --- instances -------------------------------------------------------------------------------


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_the_committed_sheet_is_that_of_seed_0(sheet):
    assert sheet.read_text(encoding="utf-8") == stamped(sheet, 0)
    assert all(cell.get("outputs", []) == [] for cell in cells_of(sheet))
    # nbval runs a cell without a count and compares nothing: these are held to their silence.
    counts = [cell.execution_count for cell in cells_of(sheet) if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_a_seed_is_stamped_the_same_way_each_time_and_another_differs(sheet):
    assert stamped(sheet, 7) == stamped(sheet, 7)
    assert stamped(sheet, 7) != stamped(sheet, 8)
    assert "seed=0" not in stamped(sheet, 7)


def test_numbers_of_one_instance_fail_on_another():
    for test in TESTS:
        if test.endswith("numbers-test"):
            assert Attempt(test, seed=7).judge(Attempt(test, seed=0).solution) != ""


def test_what_is_not_an_answer_gets_a_sentence():
    nan = float("nan")
    for result, words in (
        (None, "you returned None"),
        ([0.5, None], "a place is still None"),
        ("two", "you returned a str, not numbers"),
        ([1.0], r"the shape \[1\] where \[2\]"),
        ([1.0, nan], "NaN or an infinity"),
    ):
        with pytest.raises(AssertionError, match=words):
            homework.numbers(result, [2])
    with pytest.raises(AssertionError, match=r"why \(here 2.0000, and 1.0000 is wanted\)"):
        homework.agree([1.0, 2.0], 1.0, "why")
    # Where both would print alike it says how far off.
    with pytest.raises(AssertionError, match=r"nearly: off by 3.0e-06, and 1e-08 is allowed"):
        homework.agree([1.0, 1.000003], 1.0, "why")
    with pytest.raises(AssertionError, match="why"):
        homework.agree([1.0, nan], 1.0, "why")
    homework.agree([1.0, 1.0 + 1e-9], 1.0, "why")


def test_instances_are_proper_ones():
    for seed in range(100):
        ref_probs, rewards, beta = homework.instance(seed)
        assert torch.allclose(ref_probs.sum(1), torch.ones(2))
        assert beta != 1
        for row in (*ref_probs, *rewards):
            assert row.sort().values.diff().min() > 0.049


# --- nbgrader --------------------------------------------------------------------------------

WRITTEN = "The slopes are equal at the optimum, and lambda has no closed form then."
PARTLY = {  # what the partly right student gets wrong, and the words to read in the feedback
    "1_derive_the_optimum": {"h1-slope-test": "product rule", "h1-policy-test": "use logarithms"},
    "2_watch_z_cancel_and_stay": {"h2-link-test": "change its sign only"},
    "3_score_a_sample_and_clip_it": {"h3-variance-test": "Is the mean taken off"},
    "4_design_a_loss": {"h4-ipo-test": "IPO stays finite", "h4-flips-test": "flips once more"},
}


def hand_in(sheet: Path, release: Path, student: str) -> str:
    """The student's copy with the cells of the student filled in."""
    notebook = nbformat.read(release, as_version=4)
    solutions = {about(cell).get("grade_id"): cell.source for cell in cells_of(sheet, seed=7)}
    exercise = name = None
    for cell in notebook.cells:
        marks = about(cell)
        if cell.cell_type == "markdown" and marks.get("solution"):
            cell.source = WRITTEN
        elif marks.get("solution"):
            exercise, source = cell, solutions[marks["grade_id"]]
            name = NAME.search(source).group(1)
            if student in ("ada", "ben"):
                cell.source = re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", source, flags=re.M)
            elif name == "MINE":
                cell.source = "MINE = [0.5, 0.5, 0.5, 0.5]"
            else:
                cell.source = f"def {name}(*arguments, **options):\n    return torch.tensor(0.5)"
            if student == "dan":
                cell.source += TAMPERING
        elif student == "ben" and marks.get("grade_id") in PARTLY[sheet.stem]:
            test = marks["grade_id"]
            wrong = MISTAKES[test][PARTLY[sheet.stem][test]]
            exercise.source = f"{inspect.getsource(wrong)}\n\n{name} = {wrong.__name__}"
    return nbformat.writes(notebook)


READ_GRADES = """
import json
from nbgrader.api import Gradebook

with Gradebook("sqlite:///gradebook.db") as book:
    (assignment,) = book.assignments
    right = book.find_submission(assignment.name, "ada")
    for grade in right.notebooks[0].grades:  # a person reads the written answer and likes it
        if grade.auto_score is None:
            grade.manual_score = grade.max_score
    book.db.commit()
    assert right.score == right.max_score, (right.score, right.max_score)
    print(json.dumps([
        [s.student.id, g.name, g.auto_score, g.max_score]
        for a in book.assignments for s in a.submissions for n in s.notebooks for g in n.grades
    ]))
"""


def run(*command, cwd: Path) -> str:
    """A program's output: with nbgrader's own programs on its PATH, and nobody to ask for pages."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(cwd),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def what_failed(path: Path) -> dict[str, str]:
    """What each test of a graded sheet printed as it failed, by grade id: nothing if it passed."""
    said = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if about(cell).get("grade") and cell.cell_type == "code":
            errors = [o.evalue for o in cell.outputs if o.output_type == "error"]
            said[about(cell)["grade_id"]] = " ".join(errors)
    return said


def check_the_student_copy(text: str, sheet: Path) -> None:
    """No solution, no hidden test, no model answer, and the instance of seed 7."""
    source = guarded(stamped(sheet, 7))
    assert "BEGIN SOLUTION" in source
    assert source.count("BEGIN HIDDEN TESTS") == 3 * source.count("# More tests of this")
    assert "sys.modules" not in text
    for sign in ("### BEGIN", "### END", "on other numbers", "other_instances", "seed=0"):
        assert sign not in text, sign
    assert "SEED = 7" in text
    left = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells)
    for cell in cells_of(sheet, seed=7):
        if about(cell).get("solution"):
            assert cell.source not in left


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_nbgrader_hands_out_collects_and_grades_four_students(sheet, tmp_path):
    if find_spec("nbgrader") is None:
        pytest.skip("nbgrader is not installed: each exercise was judged, nbgrader graded nobody")
    run(TOOL, "--seed", 7, "--sheet", sheet.name[0], "--out", tmp_path, cwd=tmp_path)
    course = tmp_path / "seed_7"
    release = course / "release" / sheet.stem / sheet.name
    check_the_student_copy(release.read_text(encoding="utf-8"), sheet)

    inbox = course / "downloaded" / sheet.stem / "archive"
    inbox.mkdir(parents=True)
    for student in ("ada", "ben", "cleo", "dan"):
        text = hand_in(sheet, release, student)
        (inbox / f"{student}__{sheet.name}").write_text(text, encoding="utf-8")
    run("-m", "nbgrader", "zip_collect", sheet.stem, cwd=course)
    run("-m", "nbgrader", "autograde", sheet.stem, "--create", cwd=course)

    run("-m", "nbgrader", "generate_feedback", sheet.stem, "--student=ben", cwd=course)
    page = course / "feedback" / "ben" / sheet.stem / f"{sheet.stem}.html"
    feedback = page.read_text(encoding="utf-8")

    marks: dict = {"ada": {}, "ben": {}, "cleo": {}, "dan": {}}
    for student, test, points, most in json.loads(run("-c", READ_GRADES, cwd=course)):
        marks[student][test] = points, most
    said = {
        student: what_failed(course / "autograded" / student / sheet.stem / sheet.name)
        for student in marks
    }
    tests = list(said["ada"])
    for found in marks.values():  # the written answer waits for a person
        assert [test for test, (points, _) in found.items() if points is None] == [
            test for test in found if test.endswith("-words")
        ]
        assert set(found) - set(tests) == {f"h{sheet.name[0]}-words"}

    for test in tests:  # one who is right
        points, most = marks["ada"][test]
        assert (points, said["ada"][test]) == (most, ""), test
    refused = {test for test in map(hidden, PARTLY[sheet.stem]) if said["ben"][test]}
    assert refused, "no hidden test notices what is wrong"
    for test in tests:  # one who is partly right, and is told why
        points, most = marks["ben"][test]
        if test in refused:
            assert points == 0
        elif test in PARTLY[sheet.stem]:
            assert points == 0
            assert PARTLY[sheet.stem][test] in said["ben"][test]
            assert html.escape(PARTLY[sheet.stem][test], quote=False) in feedback
        else:
            assert (points, said["ben"][test]) == (most, ""), test
    for test in tests:  # one who returns a constant, and one who overwrites the judges besides
        assert marks["cleo"][test][0] == marks["dan"][test][0] == 0, test
        assert said["cleo"][test], test
        assert said["dan"][test] == said["cleo"][test], test

"""What tests/test_course.py asks of a chapter, tried on copies of one with a cell more."""

import copy
import json

import course
import minutes
import nbformat
import pytest
import stamp_chapters
import test_course as rules
from course import chapters, text_of

CHAPTER = chapters()[2]


@pytest.fixture
def altered(tmp_path):
    """A maker of copies of chapter 02 without its optional sections: `cells` are put before its
    exercises, `last` at its end.
    """

    def make(*cells, last=()):
        main = minutes.main_line(json.loads(CHAPTER.read_text(encoding="utf-8")))
        main["cells"] = [cell for cell in main["cells"] if cell["source"]]
        notebook = nbformat.from_dict(main)
        at = next(i for i, c in enumerate(notebook.cells) if c.source.startswith("## Exercises"))
        notebook.cells[at:at] = map(copy.deepcopy, cells)
        notebook.cells += map(copy.deepcopy, last)
        counts = iter(range(1, 1000))
        for number, cell in enumerate(notebook.cells):
            cell.id = cell.id if cell.id == stamp_chapters.ID else f"cell-{number}"
            if cell.cell_type == "code":
                cell.execution_count = next(counts)
        path = tmp_path / CHAPTER.name
        stamp_chapters.stamp_chapter(notebook, path.name)
        path.write_text(text_of(json.loads(nbformat.writes(notebook))), encoding="utf-8")
        return path

    return make


def code(source, *tags):
    metadata = {"tags": list(tags)} if tags else {}
    return nbformat.v4.new_code_cell(source, metadata=metadata)


def words(source):
    return nbformat.v4.new_markdown_cell(source)


def refused(rule, path):
    with pytest.raises(AssertionError):
        rule(path)


# --- how long a cell is ----------------------------------------------------------------------


LOOP = "for k in range(3):\n    x = k"
WHILE = "while x < 3:\n    x += 1"


@pytest.mark.parametrize(
    ("source", "most"),
    [
        ("x = 1", 20),
        (LOOP, 25),
        (WHILE, 25),
        (f"{LOOP}\n{WHILE}", 20),
        ("for k in range(3):\n    for j in range(3):\n        x = k + j", 20),
        ("xs = [k for k in range(3)]", 20),
        ("def f():\n    for k in range(3):\n        yield k", 25),
    ],
)
def test_a_cell_with_one_loop_may_be_longer(altered, source, most):
    lines = source.count("\n") + 1
    for total in (20, most):
        full = "\n".join([source, *(f"x_{n} = {n}" for n in range(total - lines))])
        rules.test_a_cell_holds_one_idea(altered(code(full + "\n\n")))
    refused(rules.test_a_cell_holds_one_idea, altered(code(f"{full}\ny = 1")))


def test_a_derivation_may_be_longer(altered):
    lines = "\n".join(f"x_{n} = {n}" for n in range(25))
    path = altered(code(lines, "derivation"))
    rules.test_a_cell_holds_one_idea(path)
    rules.test_a_tag_is_one_that_means_something(path)
    rules.test_the_run_tool_wrote_the_file(path)
    for longer in (code(lines), code(lines + "\ny = 1", "derivation")):
        refused(rules.test_a_cell_holds_one_idea, altered(longer))


def test_a_tag_that_means_nothing_is_refused(altered):
    refused(rules.test_a_tag_is_one_that_means_something, altered(code("x = 1", "derive")))
    path = altered(words("A word."))
    rules.test_a_tag_is_one_that_means_something(path)
    text = words("A word.")
    text.metadata["tags"] = ["derivation"]
    refused(rules.test_a_tag_is_one_that_means_something, altered(text))


# --- checks ----------------------------------------------------------------------------------

CLAIMS = rules.test_a_check_begins_with_its_claim_and_nothing_else_asserts


@pytest.mark.parametrize(
    "claim", ["the gradients agree | 1e-12", "|a| is |b| | 0.001", "two counts agree | exact"]
)
def test_a_check_says_what_it_claims_and_how_closely(altered, claim):
    path = altered(code(f"# {claim}\nassert abs(1 - 1) < 1e-12", "check"))
    CLAIMS(path)
    rules.test_a_tag_is_one_that_means_something(path)
    assert course.claim_of(f"# {claim}\nassert 1 < 2") == tuple(claim.rsplit(" | ", 1))


@pytest.mark.parametrize(
    "source",
    [
        "assert 1 < 2",
        "x = 1\n# it is | 1e-12",
        "# it is",
        "# it is | about 1e-12",
        "# it is | 0",
        "# it is | -1",
        "# it is | tiny",
        "#  | 1e-12",
        "# it is|1e-12",
        '"# it is | 1e-12"',
    ],
)
def test_a_check_that_does_not_say_so_is_refused(altered, source):
    refused(CLAIMS, altered(code(source, "check")))
    assert course.claim_of(source) is None


def test_an_assert_stands_in_a_check_and_nowhere_else(altered):
    for source in ("assert 1 < 2", "# it is | exact\nfor k in range(3):\n    assert k < 3"):
        refused(CLAIMS, altered(code(source)))
    CLAIMS(altered(code("# no assert here\nassertion = 1")))


# --- exercises -------------------------------------------------------------------------------

PAPER = """**2.{n}** (10 minutes, medium, on paper) Show that $Z > 0$.

<details><summary>Hint</summary>

Every term is positive.

</details>"""
ANSWER = """

<details><summary>Answer</summary>

A sum of positive terms is positive.

</details>"""
HAS = len(rules.exercises_of(CHAPTER))
FORM = rules.test_exercises_have_minutes_difficulty_and_a_hint
PARTS = rules.test_an_exercise_on_paper_has_an_answer_and_every_other_one_a_check


def with_exercises(altered, *sources):
    """Chapter 02 with exercises more, after its own and before its summary."""
    path = altered()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1:-1] = [words(source) for source in sources]
    path.write_text(text_of(json.loads(nbformat.writes(notebook))), encoding="utf-8")
    return path


def test_exercises_on_paper_are_numbered_and_counted_like_the_others(altered):
    *added, sixth = ((PAPER + ANSWER).format(n=n) for n in range(HAS + 1, 7))
    path = with_exercises(altered, *added)
    for rule in (FORM, PARTS, rules.test_the_rhythm_of_a_chapter):
        rule(path)
    before, after = (json.loads(p.read_text(encoding="utf-8")) for p in (CHAPTER, path))
    assert minutes.exercise_minutes(after) == minutes.exercise_minutes(before) + 10 * len(added)
    refused(FORM, with_exercises(altered, *added, sixth))
    refused(FORM, with_exercises(altered, sixth))
    refused(FORM, with_exercises(altered, added[0] + "\n\n" + sixth))


@pytest.mark.parametrize(
    "source",
    [
        PAPER,
        (PAPER + ANSWER).replace(", on paper", ""),
        PAPER.replace(", on paper", ""),
        (PAPER + ANSWER).replace("Hint", "Help"),
        (PAPER + ANSWER).replace("Answer", "Solution"),
        PAPER + ANSWER + ANSWER,
        PAPER + ANSWER + "\n\nA word more.",
    ],
)
def test_an_exercise_of_another_form_is_refused(altered, source):
    refused(PARTS, with_exercises(altered, source.format(n=HAS + 1)))


def test_an_exercise_on_paper_is_no_reading_time():
    for source in (PAPER, PAPER + ANSWER):
        text = source.format(n=1)
        assert minutes.reading_minutes({"cells": [{"cell_type": "markdown", "source": text}]}) == 0
    assert minutes.reading_minutes({"cells": [{"cell_type": "markdown", "source": "Read me."}]}) > 0


# --- the order of the parts ------------------------------------------------------------------

RHYTHM = rules.test_the_rhythm_of_a_chapter


def test_what_is_optional_stands_under_its_heading_after_the_summary(altered):
    deeper = words("## Going deeper (optional)\n\nThree more questions.")
    section = words("## Why not forward KL?\n\nAnother answer.")
    path = altered(last=[deeper, section, code("x = 1"), words("Read it.")])
    RHYTHM(path)
    rules.test_text_and_code_take_turns(path)
    rules.test_the_run_tool_wrote_the_file(path)
    for last in ([section], [deeper], [section, deeper], [deeper, section, deeper]):
        refused(RHYTHM, altered(last=last))
    refused(RHYTHM, altered(deeper, section))
    refused(RHYTHM, altered(deeper, last=[deeper, section]))
    refused(rules.test_text_and_code_take_turns, altered(last=[deeper, section, code("x = 1")]))


def test_references_belong_to_the_summary_and_exercises_stand_before_it(altered):
    for old, new in (("**References.**", "Read"), ("## Summary", "## Between\n\n## Summary")):
        path = altered()
        text = path.read_text(encoding="utf-8").replace(old, new.replace("\n", "\\n"))
        path.write_text(text, encoding="utf-8")
        refused(RHYTHM, path)

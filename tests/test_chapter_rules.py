"""What tests/test_course.py asks of a chapter, tried on copies of one with a cell more."""

import json

import nbformat
import pytest
import stamp_chapters
import test_course as rules
from course import chapters, text_of

CHAPTER = chapters()[2]


@pytest.fixture
def altered(tmp_path):
    """A maker of copies of chapter 02: `cells` are put before its exercises, `last` at its end."""

    def make(*cells, last=()):
        notebook = nbformat.read(CHAPTER, as_version=4)
        at = next(i for i, c in enumerate(notebook.cells) if c.source.startswith("## Exercises"))
        notebook.cells[at:at] = cells
        notebook.cells += last
        counts = iter(range(1, 1000))
        for cell in notebook.cells:
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

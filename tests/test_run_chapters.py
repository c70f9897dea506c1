"""The tool that runs chapters: as they are, or as a copy with another SEED."""

import nbformat
import pytest
import run_chapters

CELLS = (
    "SEED = 0  # another number draws everything anew",
    'print(f"SEED is small: {SEED < 5}")\nprint(f"it is a number: {SEED > -1}")',
    "assert SEED < 9",
)


@pytest.fixture
def chapter(tmp_path):
    title = "# 99 Make it up\n\n- **You'll need**: nothing.\n\nNext: nothing"
    cells = [nbformat.v4.new_markdown_cell(title), *map(nbformat.v4.new_code_cell, CELLS)]
    path = tmp_path / "99_made_up.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    run_chapters.run_chapter(path)
    return path


def test_another_seed_prints_the_verdicts_that_change_and_writes_nothing(chapter, capsys):
    committed = chapter.read_text(encoding="utf-8")
    assert "SEED is small: True" in committed
    for seed, said in (
        (1, []),
        (7, ["  cell 3: SEED is small: False"]),
        (9, ["  stopped: AssertionError:", "  cell 3: SEED is small: False"]),
    ):
        run_chapters.try_seed(chapter, seed)
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == said
    assert chapter.read_text(encoding="utf-8") == committed
    assert [path.name for path in chapter.parent.iterdir()] == [chapter.name]


def test_a_second_run_writes_nothing_new(chapter):
    """As on another machine: nothing that was measured is in the file."""
    first = chapter.read_bytes()
    run_chapters.run_chapter(chapter)
    assert chapter.read_bytes() == first
    assert set(nbformat.read(chapter, as_version=4).metadata) == {"kernelspec", "language_info"}

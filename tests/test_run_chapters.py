"""The tool that runs chapters: as they are, or as a copy with another SEED."""

import base64

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


def test_another_seed_prints_the_errors_whose_bound_or_name_changes(tmp_path, capsys):
    calls = (
        "from dpo_mini.checks import largest_error",
        "largest_error(SEED, 0, below=8, what='the seed')",
        "largest_error(0, 0, below=10.0 ** -(3 + SEED))",
        "largest_error(0, 0, what='zero')",
    )
    cells = [nbformat.v4.new_markdown_cell("# 99 Err\n\n- **You'll need**: nothing.\n\nNext: no")]
    cells += map(nbformat.v4.new_code_cell, (CELLS[0], "\n".join(calls)))
    path = tmp_path / "99_err.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    run_chapters.run_chapter(path)
    for seed, said in (
        (1, ["  cell 3: largest error: below 0.0001"]),
        (8, ["  stopped: ValueError: largest error of the seed: must be below 8, got 8, where"]),
    ):
        run_chapters.try_seed(path, seed)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(said)
        assert all(line.startswith(start) for line, start in zip(lines, said, strict=True)), lines


DRAWING = """import os
from dpo_mini.plotting import axes, leave_out_values, save
for varies in (True, False):
    fig, ax = axes({title!r} + str(varies), "x", "y")  # two pictures that are never alike
    lines = ax.plot([0, int.from_bytes(os.urandom(2), "big")], [0, 1])
    ax.set_xlim(0, 65_536)
    if varies:
        leave_out_values(*lines)
    save(fig, f"drawn_{{varies}}", alt="a line")
"""


def test_a_picture_stays_where_only_what_varies_has_changed(tmp_path, monkeypatch):
    """And the picture in the notebook is the one in the folder of figures."""
    monkeypatch.setattr(run_chapters, "FIGURES", tmp_path)
    head = nbformat.v4.new_markdown_cell(
        "# 99 Draw\n\n- **You'll need**: nothing.\n\nNext: nothing"
    )
    path = tmp_path / "99_drawn.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_code_cell("")]), path)
    pictures = {True: [], False: []}
    for title in ("A line", "A line", "Another line"):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[-1].source = DRAWING.format(title=title)
        nbformat.write(notebook, path)
        run_chapters.run_chapter(path)
        outputs = nbformat.read(path, as_version=4).cells[-1].outputs
        for (varies, seen), output in zip(pictures.items(), outputs, strict=True):
            seen.append((tmp_path / f"drawn_{varies}.png").read_bytes())
            assert base64.b64decode(output.data["image/png"]) == seen[-1]
    for varies, (first, again, other) in pictures.items():
        assert (first == again) == varies
        assert again != other

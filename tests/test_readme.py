"""README: its example prints what it says, its tables agree with the course, its links work."""

import contextlib
import io
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import torch

from dpo_mini import checks, closed_form
from dpo_mini.checks import museum

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```python\n(.*?)```", README, re.S).group(1)


def tables_with(heading: str, text: str) -> list[str]:
    lines, found = text.splitlines(), []
    for at, line in enumerate(lines):
        if line.startswith(heading):
            end = next((i for i in range(at, len(lines)) if not lines[i].startswith("|")), None)
            found.append("\n".join(lines[at:end]))
    return found


def test_the_example_prints_the_numbers_in_its_comments():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(EXAMPLE, "README example", "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*)", EXAMPLE)
    assert printed.getvalue().splitlines() == promised
    assert len(promised) == 3


def test_the_example_has_at_most_15_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 15


def test_the_notation_is_that_of_chapter_00():
    notebook = nbformat.read(ROOT / "notebooks" / "00_take_the_tour.ipynb", as_version=4)
    chapter = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    (mine,), (theirs,) = tables_with("| symbol |", README), tables_with("| symbol |", chapter)
    assert mine == theirs
    assert len(mine.splitlines()) > 10


def test_the_chapter_table_names_every_chapter_in_order():
    (table,) = tables_with("| chapter |", README)
    listed = re.findall(
        r"\[(\d\d [^\]]+)\]\(notebooks/(\S+?)\) \|.*\| (\d+)(?: \((\d+)\))? \+ (\d+) \|", table
    )
    chapters = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [name for _, name, *_ in listed] == [path.name for path in chapters]
    for (title, _, reading, with_optional, doing), path in zip(listed, chapters, strict=True):
        first = nbformat.read(path, as_version=4).cells[0].source
        assert first.startswith(f"# {title}\n")
        spent = f"about {reading} minutes to read and {doing} for the exercises"
        if with_optional:
            spent = (
                f"about {reading} minutes to read the main line, {with_optional} to read "
                f"everything, and {doing} for the exercises"
            )
        assert spent in first, f"{path.name}: {spent}"
    two_numbers = any(with_optional for *_, with_optional, _ in listed)
    assert ("(with optional sections)" in table.splitlines()[0]) == two_numbers


def test_links_and_pictures_are_there():
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        assert link.startswith("http") or (ROOT / link.partition("#")[0]).exists(), link


def printed_in_section(path: Path, anchor: str) -> str | None:
    """What the cells of a section printed when they ran; None where there is no such heading."""
    printed, inside, found = [], False, False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if line.startswith("## "):
                    inside = line[3:].replace(" ", "-") == anchor
                    found |= inside
        elif inside and cell.execution_count:
            printed += [output.get("text", "") for output in cell.outputs]
    return "\n".join(printed) if found else None


def test_what_the_usual_account_gets_wrong_is_proved_by_cells_that_ran():
    (table,) = tables_with("| often said |", README)
    rows = table.splitlines()[2:]
    assert len(rows) >= 12
    for row in rows:
        proofs = re.findall(r"\]\((notebooks/[^#)]+)#([^)]+)\) `([\d.]+)`", row)
        assert proofs, row
        for path, anchor, number in proofs:
            printed = printed_in_section(ROOT / path, unquote(anchor))
            assert printed is not None, f"{path} has no section {unquote(anchor)}"
            assert number in printed, f"{number} is not printed in {path}, {unquote(anchor)}"


def test_the_numbers_of_the_three_beliefs_at_the_top_are_printed_by_chapter_03():
    top = README.partition("## Three things")[2].partition("\n## ")[0]
    assert "66 samples give it to 10 % at β = 2" in top
    assert "54 billion are needed at β = 0.3" in top
    (path,) = (ROOT / "notebooks").glob("03_*.ipynb")
    printed = printed_in_section(path, "What-explodes-is-χ²")
    assert re.search(r"^ 2\.0 .* 66$", printed, re.M)
    assert re.search(r"^ 0\.3 .* 54,000,000,000$", printed, re.M)


def test_the_gallery_shows_every_figure_beside_the_chapter_that_draws_it():
    gallery = README.partition("## Figures\n")[2].partition("\n## ")[0]
    shown = re.findall(r"\[!\[([^\]]+)\]\(figures/(\w+)\.png\)<br>([^\]]+)\]\((\S+?)\)", gallery)
    assert sorted(name for _, name, _, _ in shown) == sorted(
        path.stem for path in (ROOT / "figures").iterdir()
    )
    chapters = [f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert [chapter for _, _, _, chapter in shown] == chapters
    for alt, name, title, chapter in shown:
        assert f'\\"{name}\\"' in (ROOT / chapter).read_text(encoding="utf-8"), name
        assert Path(chapter).name.startswith(title[:2])
        assert 40 < len(alt) < 125, f"{name}: a sentence for who cannot see it"


def test_every_figure_file_is_written_by_a_chapter():
    code = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb")
    )
    for figure in (ROOT / "figures").iterdir():
        assert f'\\"{figure.stem}\\"' in code, figure.name


# --- the page for instructors ----------------------------------------------------------------

INSTRUCTORS = (ROOT / "INSTRUCTORS.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"```python\n(.*?)```", INSTRUCTORS, re.S)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_example_for_homework_passes_the_best_policy_and_names_the_gap_of_another(dtype):
    names = {}
    exec(compile(EXAMPLES[0], "INSTRUCTORS example", "exec"), names)
    names["grade"](names["best"].exp().to(dtype))
    reference = names["task"].ref_logps
    gap = closed_form.kl(reference, names["best"]).item()
    with pytest.raises(AssertionError, match=f"{gap:.4f} nats"):
        names["grade"](reference.exp().to(dtype))
    assert museum.exhibit("padding counted").name == "padding counted"
    assert "2.1" in checks.exercises()


def test_the_exercise_of_ones_own_says_what_its_comments_promise(capsys):
    assert len(EXAMPLES) == 2
    names = {}
    exec(compile(EXAMPLES[1], "INSTRUCTORS example", "exec"), names)
    promised = re.findall(r"^check\(.*\)  # (.*)$", EXAMPLES[1], re.M)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(promised) == 2
    for line, promise in zip(said, promised, strict=True):
        assert line.startswith(promise.removesuffix(" ..."))
    passed, _ = checks.diagnose(
        names["value_of_a_prompt"], lambda q, r, beta: beta * names["log_z"](q, r, beta)
    )
    assert passed


def test_the_examples_for_instructors_judge_under_python_o():
    assert not re.findall(r"^ *assert ", "\n".join(EXAMPLES), re.M)

"""The chapters as files: run in order, stable, described, linked, and true to their own outputs."""

import ast
import base64
import json
import re
from pathlib import Path

import nbformat
import pytest
from course import claim_of

from dpo_mini.checks import exercises

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
CHAPTERS = sorted(NOTEBOOKS.glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.,:/-])-?(?:\d+)?\.\d+(?:e-?\d+)?(?![\w./]\d)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
TAGS = {"remove-cell", "check", "derivation"}  # left out on the site; folded there; 25 lines

pytestmark = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def has_tag(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def prose(path: Path) -> str:
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def shown(path: Path) -> str:
    """All that the chapter's code says and prints: where a number in its prose must come from."""
    texts = []
    for cell in code_cells(path):
        texts.append(cell.source)
        for output in cell.outputs:
            texts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(texts)


def test_every_code_cell_was_run_in_order(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


def test_the_picture_in_figures_is_the_one_that_the_chapter_shows(path):
    for cell in code_cells(path):
        for name in re.findall(r'\bsave\(\s*fig,\s*"(\w+)"', cell.source):
            (picture,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.data]
            assert (ROOT / "figures" / f"{name}.png").read_bytes() == base64.b64decode(picture)


def test_the_file_is_valid_and_its_ids_are_unique(path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata


def test_nothing_went_wrong_on_the_way(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert output.output_type != "execute_result", "print it: a bare value is a repr"


def test_every_figure_has_alt_text_and_a_receipt(path):
    figures = 0
    for cell in code_cells(path):
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                figures += 1
                alt = output.metadata["image/png"]["alt"]
                assert len(alt) > 40, alt
                assert data["text/plain"].startswith(alt)
                assert " x: " in data["text/plain"]
    assert figures >= 1


def test_the_file_is_small(path):
    assert path.stat().st_size < 400_000


def test_outputs_hold_nothing_that_varies(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            for sign in ("tensor(", "np.float64(", " at 0x", "Warning", "-0.0000", "/home/", "nan"):
                assert sign not in text, text


def most_lines(cell: nbformat.NotebookNode) -> int:
    """20; or 25 where the cell is one loop or one derivation, which are read as a whole."""
    loops = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.For | ast.While)]
    return 25 if len(loops) == 1 or has_tag(cell, "derivation") else 20


def test_a_cell_holds_one_idea(path):
    lengths = []
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        lengths.append(len(lines))
        assert len(lines) <= most_lines(cell), cell.source
        assert max(len(line) for line in lines) <= 79, cell.source
        assert not cell.source.rstrip().endswith(";")
        assert "NBVAL_IGNORE" not in cell.source
        assert "NBVAL_SKIP" not in cell.source
    lengths = lengths[1:]  # after the bootstrap
    assert lengths[0] <= 8 + ("SEED = " in code_cells(path)[1].source), "the set-up"
    assert sorted(lengths)[len(lengths) // 2] <= 10
    assert "set_num_threads(1)" in code_cells(path)[1].source
    assert "set_default_dtype(torch.float64)" in code_cells(path)[1].source


def test_a_check_begins_with_its_claim_and_nothing_else_asserts(path):
    silent = []
    for cell in code_cells(path):
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source)))
        if has_tag(cell, "check"):
            assert claim_of(cell.source), f"begin it with `# claim | tolerance`: {cell.source}"
        elif asserts:
            silent.append(cell.source)
    assert not silent, f"move the assert into a cell tagged `check`: {silent[0]}"


def test_every_draw_comes_from_the_one_seed_of_the_set_up(path):
    cells = code_cells(path)
    source = "\n".join(cell.source for cell in cells)
    seeding = r"manual_seed|\bseeded" if "on_device(" in source else "manual_seed"
    seeds = re.findall(rf"(?:{seeding})\(((?:[^()]|\([^()]*\))*)\)", source)
    seeds = [seed for seed in seeds if seed != "seed"]  # a function's own: its caller says SEED + 1
    assert all(re.match(r"SEED( \+ \w+)?$", seed) for seed in seeds), seeds
    assert re.findall(r"^SEED\b.*", source, re.M) == [
        "SEED = 0  # another number draws everything anew"
    ] * bool(seeds)
    (set_up,) = (cell.source for cell in cells if "set_num_threads(1)" in cell.source)
    assert "SEED = " in set_up or not seeds
    for call in ("initial_seed", "np.random", "random.seed", "default_rng"):
        assert call not in source
    draws = len(re.findall(r"\btorch\.(?:randn?|randint|randperm|multinomial|bernoulli)\(", source))
    assert draws <= len(re.findall(r"generator=", source)), "a draw from global state"


def test_a_loop_of_training_shows_how_far_it_is(path):
    for cell in code_cells(path):
        for call in ast.walk(ast.parse(cell.source)):
            if isinstance(call, ast.Call) and re.search(
                r"^(train\.fit_(?!table)\w+|real\.train_preferences)$", ast.unparse(call.func)
            ):
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                few_steps = isinstance(given.get("batches"), ast.Subscript)  # a part of the run
                # None: **options, in which a caller says it.
                assert few_steps or set(given) & {"progress", None}, ast.unparse(call)


def test_text_and_code_take_turns(path):
    kinds = "".join(cell.cell_type[0] for cell in read(path).cells)
    assert kinds.startswith("mccm"), "the claim, the bootstrap, the set-up, the first words"
    assert kinds.endswith("m")
    assert "ccc" not in kinds


def test_the_rhythm_of_a_chapter(path):
    text = prose(path)
    for part in (
        "**Claim.**",
        "**You'll do**",
        "**You'll learn**",
        "**You'll need**",
        "**You'll spend**",
    ):
        assert part in text.split("\n## ")[0], part
    for part in ("## Two routes meet", "## Where it breaks"):
        assert part in text, part
    titles = re.findall(r"^## (.+)$", text, re.M)
    summary = titles.index("Summary")
    assert titles[summary - 1] == "Exercises", "the exercises stand before the summary"
    optional = titles[summary + 1 :]
    if optional:  # sections that keep titles of their own
        assert optional[0] == "Going deeper (optional)", "after the summary comes what is optional"
        assert len(optional) > 1
    assert titles.count("Going deeper (optional)") == bool(optional)
    last = text.partition("\n## Summary\n")[2].partition("\n## Going deeper (optional)\n")[0]
    assert "**References.**" in last


def test_a_chapter_opened_alone_lacks_no_picture(path):
    """Its figures are outputs; the badge has words where it cannot be fetched."""
    for alt, link in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)", prose(path)):
        assert link.startswith("https://"), link
        assert alt
    assert "<img" not in prose(path)


def test_links_lead_somewhere(path):
    for link in LINK.findall(prose(path)):
        if not link.startswith("http"):
            assert (NOTEBOOKS / link).exists(), link


def test_chapters_lead_to_one_another(path):
    at = CHAPTERS.index(path)
    links = set(LINK.findall(prose(path)))
    if at > 0:
        assert CHAPTERS[at - 1].name in links
    if at + 1 < len(CHAPTERS):
        assert CHAPTERS[at + 1].name in links


def test_decimal_numbers_in_prose_occur_in_the_chapter(path):
    """`.74` in the text must be a number of the chapter's code or output, perhaps rounded."""
    sources = [float(number) for number in NUMBER.findall(shown(path))]
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$|`[^`\n]*`|\]\([^)]*\)", " ", prose(path), flags=re.S)
    text = re.sub(r"arXiv:\d+\.\d+|^\*\*\d+\.\d\*\*", " ", text, flags=re.M)
    for number in NUMBER.findall(text):
        decimals = len(number.split("e")[0].split(".")[1])
        value = float(number)
        slack = 0.5 * 10.0**-decimals + 1e-9 if "e" not in number else abs(value) * 1e-6
        close = any(abs(abs(source) - abs(value)) <= slack for source in sources)
        assert close, f"{number} is in the text and in no output"


EXERCISE = re.compile(
    r"^\*\*(\d+)\.(\d)\*\* \(\d+ minutes, (?:easy|medium|hard)(?P<on_paper>, on paper)?\) .+?"
    r"\n\n<details><summary>Hint</summary>\n\n.+?\n\n</details>"
    r"(?P<answer>\n\n<details><summary>Answer</summary>\n\n.+?\n\n</details>)?\s*\Z",
    re.M | re.S,
)


def exercises_of(path: Path) -> list[re.Match]:
    """The exercises of a chapter, each a cell of its own that ends with what is folded."""
    cells = [cell.source for cell in read(path).cells if "<details>" in cell.source]
    found = [EXERCISE.search(source) for source in cells]
    assert all(found), "not an exercise, or not of its form"
    return found


def test_exercises_have_minutes_difficulty_and_a_hint(path):
    found, chapter = exercises_of(path), int(path.name[:2])
    numbers = [(int(match[1]), int(match[2])) for match in found]
    assert numbers == [(chapter, n + 1) for n in range(len(found))]
    assert 2 <= len(numbers) <= 5
    assert len(re.findall(r"\(\d+ minutes, ", prose(path))) == len(numbers)


def test_an_exercise_on_paper_has_an_answer_and_every_other_one_a_check(path):
    coded = []
    for match in exercises_of(path):
        assert bool(match["on_paper"]) == bool(match["answer"]), match[0]
        assert match[0].count("<details>") == 1 + bool(match["answer"]), match[0]
        if not match["on_paper"]:
            coded.append(f"{match[1]}.{match[2]}")
    cells = "\n".join(cell.source for cell in code_cells(path))
    assert re.findall(r"^check\((?:\"([\d.]+)\")?", cells, re.M) == coded
    assert [
        number for number in exercises() if int(number.split(".")[0]) == int(path.name[:2])
    ] == coded
    assert len(coded) >= 2


def test_the_chapter_has_solutions(path):
    solutions = NOTEBOOKS / "solutions" / f"{path.stem}.py"
    assert solutions.exists()


def test_the_code_of_a_chapter_uses_what_it_imports_from_the_package(path):
    """A chapter imports the library and never pastes it."""
    source = "\n".join(cell.source for cell in code_cells(path))
    assert "from dpo_mini" in source
    for name in ("def log_softmax(", "class TinyTransformer", "def enumerate_logps("):
        assert name not in source


def test_a_tag_is_one_that_means_something(path):
    for cell in read(path).cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS, cell.source
        assert cell.cell_type == "code" or "tags" not in cell.metadata, cell.source


def test_the_run_tool_wrote_the_file(path):
    """Keys sorted, one space of indent, no odd metadata: a change shows as a small difference."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in notebook["cells"])

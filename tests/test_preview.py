"""What GitHub shows of the pages and notebooks, and what a screen reader says of them."""

import math
import re
from pathlib import Path
from urllib.parse import unquote

import course
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "docs" / "glossary.md",
]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
CODE = re.compile(r"```.*?```|``[^`]+``|`[^`\n]+`", re.S)
MATH = re.compile(r"\$\$.*?\$\$|(?<!\\)\$[^$]*?(?<!\\)\$", re.S)
LINK = re.compile(r"(?<!!)\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\(<?([^)\s>]+)>?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
HTML = {"details", "summary", "br", "sub", "sup", "kbd"}  # what is used of what GitHub lets pass

each = pytest.mark.parametrize(
    "path", [*PAGES, *NOTEBOOKS], ids=lambda path: str(path.relative_to(ROOT))
)


def cells(path: Path) -> list[str]:
    """The texts that are rendered by themselves: a page, or each Markdown cell."""
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def blank(text: str, pattern: re.Pattern) -> str:
    """The text with what matches blotted out, at the same places and in the same lines."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", "·", found[0]), text)


def headings(path: Path) -> list[tuple[int, str]]:
    found = []
    for text in cells(path):
        for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
            if heading := re.match(r"(#{1,6}) (.+)", line):
                found.append((len(heading[1]), heading[2].strip()))
    return found


def anchors(path: Path) -> set[str]:
    """Of a page as GitHub makes them, of a notebook as Jupyter does."""
    titles = [title for _, title in headings(path)]
    if path.suffix == ".ipynb":
        return {title.replace(" ", "-") for title in titles}
    plain = (re.sub(r"[^\w\- ]", "", title.replace("`", "").lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


@each
def test_nothing_is_written_for_another_renderer(path):
    for text in cells(path):
        shown = blank(text, re.compile(r"(?<!`)`[^`\n]+`(?!`)"))
        assert not re.search(r"^(```|:::)\{|^:::|^\.\. \w+::|\{[\w:]+\}·|^%%|\[\[", shown, re.M), (
            text
        )
        tags = re.findall(r"</?([a-zA-Z][\w-]*)", blank(blank(text, CODE), MATH))
        assert set(tags) <= HTML, tags


@each
def test_mathematics_is_such_that_every_renderer_takes_it(path):
    for text in cells(path):
        prose = blank(text, CODE)
        for found in MATH.finditer(prose):
            math, before = found[0], prose[: found.start()][-1:]
            after, line = prose[found.end() :][:1], line_at(prose, found.start(), found.end())
            assert not re.search(r"<[A-Za-z/!?]", math), f"read as a tag: {math}"
            assert not (line.startswith("|") and "|" in math), f"ends the cell: {math}"
            if not math.startswith("$$"):
                assert not re.match(r"\w", before), f"no mathematics after a letter: {line}"
                assert not re.match(r"\w", after), f"no mathematics before a letter: {line}"
                assert math[1:-1] == math[1:-1].strip(), f"spaces at the dollars: {math}"
            if path.suffix == ".md":  # there Markdown comes first, and takes the backslash away
                assert not re.search(r"\\[^A-Za-z]", math), f"loses its backslash: {math}"
        assert not re.search(r"(?<!\\)\$", MATH.sub("", prose)), "a dollar without another"


def line_at(text: str, start: int, end: int) -> str:
    return text[text.rfind("\n", 0, start) + 1 :].partition("\n")[0] if end else ""


@each
def test_rows_of_a_table_have_as_many_cells_as_its_head(path):
    for text in cells(path):
        rows = None
        for line in blank(blank(text, CODE), MATH).splitlines():
            if not line.startswith("|"):
                rows = None
                continue
            width = len(re.findall(r"(?<!\\)\|", line))
            assert rows in (None, width), line
            rows = width


@each
def test_headings_begin_with_one_title_and_leave_out_no_level(path):
    levels = [level for level, _ in headings(path)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    for (level, _), (below, title) in zip(headings(path), headings(path)[1:], strict=False):
        assert below <= level + 1, f"{title}: level {below} after {level}"
    titles = [title for _, title in headings(path)]
    assert len(set(titles)) == len(titles), "two headings with one anchor"


@each
def test_links_lead_to_what_is_there_and_say_where(path):
    for text in cells(path):
        for label, target in LINK.findall(blank(text, re.compile(r"```.*?```", re.S))):
            words = re.sub(r"!\[([^\]]*)\]\([^)]*\)|<br>", r"\1 ", label).strip(" *`")
            assert len(words) > 1, f"a link without words: {target}"
            assert words.lower() not in ("here", "this", "link", "click here", "this link", "more")
            assert not words.startswith("http"), f"a bare address: {words}"
            if target.startswith(("http", "mailto:")):
                continue
            file, _, anchor = unquote(target).partition("#")
            there = path if not file else (path.parent / file).resolve()
            assert there.exists(), target
            if anchor:
                assert anchor in anchors(there), f"{target}: no such heading"


@each
def test_pictures_are_there_and_are_described(path):
    for text in cells(path):
        assert "<img" not in text
        for alt, target in IMAGE.findall(text):
            assert len(alt) > 10, f"{target}: no description"
            if path.suffix == ".ipynb":
                assert target.startswith("http"), f"{target}: a notebook alone has no such file"
            elif not target.startswith("http"):
                assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_no_state_of_widgets_or_of_an_editor(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            kinds = set(output.get("data", {}))
            assert kinds <= {"text/plain", "text/html", "image/png"}, kinds
            page, _, script = output.get("data", {}).get("text/html", "").partition("<script>")
            if script:  # the explorer; GitHub cuts it out, and what is left must say it all
                assert cell.source.startswith("from dpo_mini.explorer import Explorer")
                numbers = re.findall(r"-?\d+\.\d{4}", output["data"]["text/plain"])
                assert len(numbers) > 10
                assert all(number in page for number in numbers)


# --- the glossary ----------------------------------------------------------------------------

GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^## ([^\n]+)\n\n(.+?)(?=\n\n## |\n\Z)", GLOSSARY, re.M | re.S))


def test_the_glossary_is_in_the_order_of_the_alphabet_and_each_entry_is_a_sentence():
    keys = [re.sub(r"[^a-z0-9]", "", term.lower()) for term in ENTRIES]
    assert keys == sorted(keys)
    assert len(keys) == GLOSSARY.count("\n## ") > 50
    for term, text in ENTRIES.items():
        assert text.rstrip().endswith("."), term
        parts = re.split(r"\s\*Example\*:\s", text)
        assert len(parts) == 2, f"{term}: a plain sentence and an example"


def test_the_numbers_of_the_glossarys_examples_are_right():
    """Each from its definition, with `math` alone."""

    def sigma(z):
        return 1 / (1 + math.exp(-z))

    ref, rewards, beta = (0.4, 0.3, 0.2, 0.1), (1.0, 0.2, -0.4, 0.8), 0.5
    weights = [q * math.exp(r / beta) for q, r in zip(ref, rewards, strict=True)]
    z = sum(weights)
    best = [w / z for w in weights]
    mean = sum(q * r for q, r in zip(ref, rewards, strict=True))
    earned = sum(p * r for p, r in zip(best, rewards, strict=True))
    kl = sum(p * math.log(p / q) for p, q in zip(best, ref, strict=True))
    chi2 = 0.9**2 / 0.5 + 0.1**2 / 0.5 - 1
    numbers = {
        "advantage": [mean, 1 - mean],
        "Bradley-Terry model": [sigma(0.2)],
        "chi-squared": [chi2, math.sqrt(chi2 / 100)],
        "entropy": [math.log(4)],
        "Fisher information": [0.5 * 0.5, 0.9 * 0.1],
        "frontier": [earned, kl],
        "gap identity": [beta * 0.1],
        "implied reward": [best[0], beta * math.log(best[0] / ref[0])],
        "importance weight": [best[0] / ref[0]],
        "KL divergence": [0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)],
        "log-odds": [math.log(0.75 / 0.25)],
        "log-ratio": [math.log(2)],
        "margin": [0.3 + 0.5, -math.log(sigma(0.8))],
        "objective": [earned, kl, earned - beta * kl],
        "partition function": [math.log(z), beta * math.log(z)],
        "REBEL": [1.0 - 0.2],
        "return": [-0.1 + 0.9, -0.1 - 0.1 + 0.9],
        "reward per token": [3 - 0.25],
        "RLOO": [(0.2 + 0.8) / 2],
        "standard error": [math.sqrt(0.55 * 0.45 / 200)],
        "TD error": [-0.2 + 1.0 - 0.5],
        "total variation": [(abs(0.9 - 0.5) + abs(0.1 - 0.5)) / 2],
        "value function": [mean],
    }
    for term, values in numbers.items():
        written = re.findall(r"(?<![\d.])\d+\.\d+", ENTRIES[term])
        for value in values:
            near = [
                w for w in written if abs(float(w) - value) < 0.5001 * 10 ** -len(w.split(".")[1])
            ]
            assert near, f"{term}: {value:.4f} is not in {written}"


def test_a_term_has_one_anchor_which_the_site_makes_too():
    """Sphinx makes its own of letters, digits and hyphens, and a letter comes first."""
    assert list(course.glossary_terms().values()) == list(ENTRIES)
    for anchor in course.glossary_terms():
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", anchor), anchor
    page = anchors(ROOT / "docs" / "glossary.md")
    assert page == {"glossary", *course.glossary_terms()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_to_the_glossary_lead_to_a_term(path):
    for text in cells(path):
        for _, target in LINK.findall(text):
            if "glossary" in target:
                page, _, anchor = target.partition("#")
                assert page == course.glossary_address(), "run tools/stamp_chapters.py"
                assert anchor in course.glossary_terms(), f"{target}: no such term"


def test_every_abbreviation_that_three_chapters_write_is_in_the_glossary():
    known = " ".join([*ENTRIES, *ENTRIES.values()])
    chapters = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        prose = blank(blank(re.sub(r"\]\([^)]*\)", "]", "\n".join(cells(path))), CODE), MATH)
        for word in set(re.findall(r"\b[A-Z][A-Za-z]*[A-Z]\w*\b", prose)):
            chapters.setdefault(word, []).append(path.stem[:2])
    taken_for_known = {"GPT", "LLM", "LLMs", "SymPy"}  # programs and models, not ideas
    lacking = {
        word: found
        for word, found in chapters.items()
        if len(found) >= 3 and word not in taken_for_known and not re.search(rf"\b{word}\b", known)
    }
    assert not lacking

"""What tools/stamp_chapters.py writes: the address, the bootstrap cell and the minutes."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import minutes
import pytest
import stamp_chapters
from course import ROOT, address, chapters, sheets
from stamp_chapters import SPENT, bootstrap, stated_minutes

BOTH = [*chapters(), *sheets()]
# How long a chapter runs, as coarsely as machines differ.
RUN = re.compile(
    r"; it runs in (?:under a minute|about (?:a minute|(?:two|three|four|five) minutes))\.$", re.M
)
FORK = "https://github.com/someone.else/a-course"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def slug(repository):
    return repository.removeprefix("https://github.com/")


@pytest.fixture
def copy(tmp_path):
    """What the script reads and writes, in another place."""
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    without = shutil.ignore_patterns("__pycache__", ".*", "solutions")
    for name in ("tools", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without)
    return tmp_path


def stamp(folder):
    """Run the script that lies in `folder`; what it printed."""
    command = [sys.executable, str(folder / "tools" / "stamp_chapters.py")]
    there = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr
    return done.stdout


def texts(folder):
    return {
        path.relative_to(folder): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def in_one_line(folder, old, new):
    path = folder / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


# --- the address -----------------------------------------------------------------------------


def test_every_stamped_place_is_as_the_script_would_write_it():
    for path, text in stamp_chapters.stamped().items():
        assert path.read_text(encoding="utf-8") == text, "run tools/stamp_chapters.py"


def test_a_fork_changes_one_line_and_so_all_places_and_nothing_else(copy):
    before = texts(copy)
    in_one_line(copy, f'Repository = "{address()}"', f'Repository = "{FORK}"')
    said = stamp(copy)
    after = texts(copy)
    assert after == {p: t.replace(slug(address()), slug(FORK)) for p, t in before.items()}
    changed = {str(path) for path in before if after[path] != before[path]}
    expected = {"README.md", "CITATION.cff", *(str(p.relative_to(ROOT)) for p in BOTH)}
    assert changed == expected | {"pyproject.toml"}
    assert set(re.findall(r"^stamped (.+)$", said, re.M)) == expected
    assert stamp(copy) == "", "run again it writes nothing"


def test_no_other_file_knows_the_address():
    """A place that the script does not write would keep the old address in a fork."""
    known = {path.relative_to(ROOT) for path in stamp_chapters.stamped()}
    folders = ("dpo_mini", "docs", "tools", "tests", "examples", "benchmarks", "configs", ".ci")
    files = [p for name in folders for p in (ROOT / name).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    for path in files:
        if "__pycache__" in path.parts or path.name in ("pyproject.toml", "constraints.txt"):
            continue
        with contextlib.suppress(UnicodeDecodeError):
            if slug(address()) in path.read_text(encoding="utf-8"):
                assert path.relative_to(ROOT) in known, path


@pytest.mark.parametrize("given", ["https://example.org/dpo", f"{FORK}/", f"{FORK}.git/x"])
def test_an_address_that_colab_cannot_open_is_refused(copy, given):
    in_one_line(copy, f'"{address()}"', f'"{given}"')
    with pytest.raises(AssertionError, match=re.escape(f"OWNER/NAME, got {given}")):
        stamp(copy)


def test_a_chapter_that_lost_its_head_gets_it_back_but_for_its_run(copy):
    """As when somebody writes the first cell anew: how long it runs is for the author to say."""
    before = texts(copy)
    path = copy / "notebooks" / "02_derive_the_optimal_policy.ipynb"
    notebook = read(path)
    title = notebook["cells"][0]["source"]
    kept = [line for line in title.split("\n") if "spend**" not in line]
    kept = "\n".join(kept).split("\n\n")
    notebook["cells"][0]["source"] = "\n\n".join([kept[0], *kept[2:]])
    assert "Colab" not in notebook["cells"][0]["source"]
    assert notebook["cells"].pop(1)["id"] == "bootstrap"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"] -= 1
    path.write_text(json.dumps(notebook), encoding="utf-8")
    stamp(copy)
    (run,) = RUN.findall(title)
    name = path.relative_to(copy)
    assert texts(copy) == {**before, name: before[name].replace(run, ".", 1)}


def test_a_link_to_the_glossary_is_written_out_and_moves_with_the_repository(copy):
    words = "A [KL divergence](glossary:kl-divergence) and a [nat](glossary:nat)."
    there = ("notebooks/00_take_the_tour.ipynb", f"notebooks/homework/{sheets()[0].name}")
    for name in there:
        notebook = read(copy / name)
        notebook["cells"][-1] |= {"cell_type": "markdown", "source": words}
        for key in ("outputs", "execution_count"):
            notebook["cells"][-1].pop(key, None)
        (copy / name).write_text(json.dumps(notebook), encoding="utf-8")
    for repository in (address(), FORK):
        in_one_line(copy, f'Repository = "{address()}"', f'Repository = "{repository}"')
        stamp(copy)
        assert stamp(copy) == "", "run again it writes nothing"
        page = f"{repository}/blob/main/docs/glossary.md"
        for name in there:
            source = read(copy / name)["cells"][-1]["source"]
            assert source == f"A [KL divergence]({page}#kl-divergence) and a [nat]({page}#nat)."


# --- the bootstrap ---------------------------------------------------------------------------


def test_the_bootstrap_is_the_same_everywhere_and_comes_first():
    firsts = set()
    for path in BOTH:
        cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
        firsts.add(cells[0]["source"])
        assert cells[0]["outputs"] == []
        assert cells[0]["execution_count"] == 1
    assert firsts == {bootstrap()}


PACKAGE = SimpleNamespace(origin="/somewhere/dpo_mini/__init__.py")
FOLDER = SimpleNamespace(origin=None)  # a clone beside the notebook, say


def bootstrapped(monkeypatch, *, there, source=None, code=0, said=""):
    """Run the cell as if an import found `there`; what it gave to pip."""
    calls = []

    def run(command, **settings):
        calls.append(command)
        return SimpleNamespace(returncode=code, stderr=said)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    monkeypatch.delenv("DPO_MINI_SOURCE", raising=False)
    if source:
        monkeypatch.setenv("DPO_MINI_SOURCE", source)
    exec(compile(bootstrap(), "bootstrap", "exec"), {})
    return calls


def test_what_the_bootstrap_takes_for_a_package_and_what_not(monkeypatch, tmp_path):
    assert importlib.util.find_spec("dpo_mini").origin is not None
    (tmp_path / "a_clone").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("a_clone").origin is None


def test_the_bootstrap_does_nothing_where_the_package_is(monkeypatch, capfd):
    assert bootstrapped(monkeypatch, there=PACKAGE, source="anything") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("there", [None, FOLDER])
@pytest.mark.parametrize("source", [None, "/a b/c.whl"])
def test_the_bootstrap_installs_into_this_python_and_no_other_package(
    monkeypatch, capfd, source, there
):
    (command,) = bootstrapped(monkeypatch, there=there, source=source)
    wanted = source or f"git+{address()}"
    assert command == [sys.executable, "-m", "pip", "install", "--no-deps", wanted]
    assert capfd.readouterr() == ("", "")


def test_the_bootstrap_says_what_could_not_be_installed(monkeypatch):
    with pytest.raises(RuntimeError, match=r"could not install git\+https://\S+: no network"):
        bootstrapped(monkeypatch, there=None, code=1, said="no network")


def without_optional_sections() -> dict:
    """Chapter 02 as it would be if its main line were all."""
    notebook = minutes.main_line(read(chapters()[2]))
    stamp_chapters.stamp_title(notebook, chapters()[2].name)
    return notebook


# --- minutes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_stated_minutes_are_within_a_factor_of_two_of_the_formula_and_exercises_add_up(path):
    notebook = read(path)
    title = notebook["cells"][0]["source"]
    short, long = stated_minutes(title)
    assert minutes.within(2, short, minutes.reading_minutes(minutes.main_line(notebook)))
    assert minutes.within(2, long, minutes.reading_minutes(notebook))
    assert int(SPENT.search(title)["doing"]) == minutes.exercise_minutes(notebook) >= 8
    if minutes.has_optional_sections(notebook):
        assert short < long
        assert short <= 30, "more than half an hour: what of it is optional?"
    else:
        assert short == long


def test_the_main_lines_of_part_one_are_read_in_two_and_a_half_hours():
    part_one = [read(path) for path in chapters() if path.name < "07"]
    assert len(part_one) == 7
    assert sum(stated_minutes(n["cells"][0]["source"])[0] for n in part_one) <= 150
    assert sum(minutes.reading_minutes(minutes.main_line(n)) for n in part_one) <= 150


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("x = 1\n\nshow(fig, alt=x)", 2),
        ('show(\n    fig,\n    alt="One. "\n    "Two.",\n)', 3),
        ('alt = """One.\nTwo."""\nsave(fig, "name", alt=alt)', 1),
        ('alt = "One. "\nalt += "Two."\nshow(fig, alt=alt)', 1),
        ("alto = 1\nf(alt_text=2)", 2),
    ],
)
def test_the_alt_text_of_a_figure_is_not_counted(source, lines):
    assert minutes.lines_of({"source": source}) == lines


def test_reading_minutes_by_hand():
    cells = [
        {"cell_type": "markdown", "source": "# Two words\n\n$$x = 1$$\n\nand $a b c$ four more."},
        {"cell_type": "code", "source": "a = 1\n\nb = 2\nc = 3", "outputs": []},
        {"cell_type": "code", "source": "", "outputs": [{"data": {"image/png": "..."}}]},
        {"cell_type": "markdown", "source": "**1.1** (3 minutes, easy) x\n\n**1.2** (10 minutes"},
        {"cell_type": "code", "source": 'def f(): ...\n\n\ncheck("1.1", f)', "outputs": []},
        {"cell_type": "code", "source": "x = 1", "metadata": {"tags": ["remove-cell"]}},
        {"cell_type": "code", "source": "import torch\n\nSEED = 0", "metadata": {}},
        {"cell_type": "code", "source": "# it is | 1\nx\ny", "metadata": {"tags": ["check"]}},
    ]
    # Words: 2, then and symbol four more: 6. Three lines of code, one equation, one figure, and the
    # claim of the check. The exercises, their stub, and the cells that install and set up are not.
    assert minutes.reading_minutes({"cells": cells}) == pytest.approx(6 / 200 + 4 / 15 + 2 / 2)
    assert minutes.exercise_minutes({"cells": cells}) == 13


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_a_head_says_in_words_how_long_the_chapter_runs(path):
    title = read(path)["cells"][0]["source"]
    start = SPENT.search(title)
    assert RUN.match(title, start.end()), "after the minutes: `; it runs in under a minute.`"


def test_numbers_stay_while_they_are_about_right_and_the_authors_words_always():
    """Else a reworded sentence would rewrite the chapter's head and README's table."""
    notebook = without_optional_sections()
    title = notebook["cells"][0]["source"]
    assert stamp_chapters.spent(notebook, title) in title
    slower = title.replace("under a minute", "about two minutes")
    twice = {**notebook, "cells": [{**notebook["cells"][0], "source": slower}]}
    twice["cells"] += 2 * notebook["cells"][1:]
    stamp_chapters.stamp_title(twice, chapters()[2].name)
    longer = twice["cells"][0]["source"]
    for stated in stated_minutes(longer):
        assert minutes.within(1.1, stated, 2 * minutes.reading_minutes(notebook))
    assert RUN.findall(longer) == ["; it runs in about two minutes."]


OPTIONAL = [
    {"cell_type": "markdown", "source": "See you.\n\n## Going deeper (optional)\n\nMore of it."},
    {"cell_type": "markdown", "source": "## A title of its own\n\n" + "word " * 2000},
    {"cell_type": "code", "source": "x = 1", "outputs": []},
]


def test_the_main_line_ends_at_the_heading_of_the_optional_sections():
    notebook = without_optional_sections()
    assert minutes.main_line(notebook) is notebook
    assert not minutes.has_optional_sections(notebook)
    both = {**notebook, "cells": [*notebook["cells"], *OPTIONAL]}
    last = minutes.main_line(both)["cells"][-1]
    assert last == {"cell_type": "markdown", "source": "See you.\n\n"}
    assert minutes.has_optional_sections(both)
    for source in ("## Going deeper", "### Going deeper (optional)", "Going deeper (optional)"):
        other = {"cells": [{"cell_type": "markdown", "source": source}]}
        assert not minutes.has_optional_sections(other)


def test_a_head_and_readme_give_both_times_where_a_chapter_has_optional_sections(copy):
    path = copy / "notebooks" / chapters()[2].name
    path.write_text(json.dumps(without_optional_sections()), "utf-8")
    stamp(copy)
    committed = texts(copy)
    notebook = read(path)
    short, _ = stated_minutes(notebook["cells"][0]["source"])
    metadata = [{"metadata": {}, "id": f"more-{n}", **cell} for n, cell in enumerate(OPTIONAL)]
    metadata[-1]["execution_count"] = 99
    path.write_text(json.dumps({**notebook, "cells": [*notebook["cells"], *metadata]}), "utf-8")
    assert stamp(copy).splitlines() == [f"stamped notebooks/{path.name}", "stamped README.md"]
    title = read(path)["cells"][0]["source"]
    found = SPENT.search(title)
    assert stated_minutes(title) == (short, short + 10)  # 2,000 words
    assert found[0] == (
        f"- **You'll spend**: about {short} minutes to read the main line, {short + 10} to read "
        f"everything, and {minutes.exercise_minutes(notebook)} for the exercises"
    )
    assert RUN.match(title, found.end())
    table = (copy / "README.md").read_text(encoding="utf-8")
    assert "| minutes to read (with optional sections) + to do |" in table
    (row,) = re.findall(rf"^\| \[[^\]]*\]\(notebooks/{path.name}\) \|.*$", table, re.M)
    assert row.endswith(f"| {short} ({short + 10}) + {found['doing']} |")
    assert stamp(copy) == "", "run again it writes nothing"
    notebook = read(path)
    path.write_text(json.dumps({**notebook, "cells": notebook["cells"][:-3]}), "utf-8")
    stamp(copy)
    assert texts(copy) == committed, "without them it is as it was"


# --- the teaching plans ----------------------------------------------------------------------


def plans():
    """Of each plan of INSTRUCTORS.md its hours, and its parts: what is done, and the minutes."""
    page = (ROOT / "INSTRUCTORS.md").read_text(encoding="utf-8").partition("## Teach from")[2]
    page = page.partition("\n## ")[0]
    for hours, text in re.findall(r"^\*\*(\w+) hours.*?\*\*(.*?)(?=^\*\*|\Z)", page, re.M | re.S):
        parts = re.findall(r"(.*?)\((\d+)(?: minutes)?\)", text, re.S)
        yield hours, [(what, int(number)) for what, number in parts]


@pytest.mark.parametrize(("hours", "total"), [("Two", 120), ("Four", 240), ("Eight", 480)])
def test_the_minutes_of_a_teaching_plan_add_up(hours, total):
    assert sum(number for _, number in dict(plans())[hours]) == total


def test_a_teaching_plan_agrees_with_the_chapters():
    """A whole chapter takes what its main line does, a part less; exercises what they say."""
    titles = {path.name[:2]: read(path)["cells"][0]["source"] for path in chapters()}
    everything = "\n".join(minutes.sources(read(path), "markdown") for path in chapters())
    wholes = 0
    for _, parts in plans():
        for what, given in parts:
            named = re.findall(r"(?<![\d.])(?:0\d|1[0-7])(?![\d.]\d)", what)
            reading = sum(stated_minutes(titles[number])[0] for number in named)
            doing = 0
            for number in re.findall(r"\b\d+\.\d\b", what):
                told = re.search(rf"^\*\*{re.escape(number)}\*\* \((\d+) minutes", everything, re.M)
                doing += int(told[1])
            if "two hours" in what:
                assert given == 120 + doing
            elif re.fullmatch(r"[,.\s]*(Day one: |and )?\d\d ", what):
                wholes += 1
                assert minutes.within(2, given, reading), what
            elif doing and not named:
                assert doing <= given <= doing + 5, what
            elif named:
                assert given <= reading + doing, what
    assert wholes == 9

"""Write what the head of every chapter says about where the course stands and how long it is.

The address in pyproject.toml goes into each chapter's badge, into the cell that installs the
package where it is missing, into links to the glossary, into README.md and CITATION.cff. Minutes of
reading and of exercises go into each chapter's first cell and into README's table; a number that is
still right stays. A chapter with optional sections has two numbers of reading, without them and
with. How long it runs, which follows in the same line, is its author's.

python tools/stamp_chapters.py writes what has changed and names it. Run again, it writes nothing.
"""

import json
import re

from course import ROOT, address, chapters, glossary_address, sheets, text_of, write
from minutes import (
    exercise_minutes,
    has_optional_sections,
    main_line,
    reading_minutes,
    within,
)

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
COLAB = "https://colab.research.google.com/github/"
BOOTSTRAP = """# Installs dpo_mini where it is missing; torch and numpy stay as they are.
import importlib.util
import os
import subprocess
import sys

SOURCE = "git+{address}"
spec = importlib.util.find_spec("dpo_mini")
if spec is None or spec.origin is None:  # a mere folder has no origin
    source = os.getenv("DPO_MINI_SOURCE", SOURCE)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", source]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"could not install {{source}}: {{done.stderr}}")
"""
ID = "bootstrap"
# As an author writes it, and as it stands after stamping, here or in the repository it came from.
GLOSSARY_LINK = re.compile(
    r"\]\((?:glossary:|https://github\.com/[\w.-]+/[\w.-]+/blob/main/docs/glossary\.md#)([^)\s]+)\)"
)
SPENT = re.compile(
    r"^- \*\*You'll spend\*\*: about (?:(?P<main>\d+) minutes to read the main line, "
    r"(?P<all>\d+) to read everything,|(?P<reading>\d+) minutes to read) "
    r"and (?P<doing>\d+) for the exercises",
    re.M,
)
TABLE = re.compile(r"^\| chapter \| what it shows \|[^|]*\|$", re.M)


def bootstrap() -> str:
    return BOOTSTRAP.format(address=address()).rstrip()


def open_line(name: str) -> str:
    """The badge of a chapter, and the way to the others for a reader who has this file alone."""
    colab = address().replace("https://github.com/", COLAB)
    badge = f"[![Open in Colab]({BADGE})]({colab}/blob/main/notebooks/{name})"
    return f"{badge} · [All chapters]({address()}#the-chapters)"


def stated_minutes(title: str) -> tuple[int, int] | None:
    """What a chapter's first cell says of reading its main line, and of reading everything.

    The two are alike where it gives one number; None where it says nothing.
    """
    found = SPENT.search(title)
    if not found:
        return None
    if found["reading"]:
        return int(found["reading"]), int(found["reading"])
    return int(found["main"]), int(found["all"])


def in_fives(by_formula: float) -> int:
    return max(5, 5 * round(by_formula / 5))


def spent(notebook: dict, title: str) -> str:
    """What the chapter takes: what is stated while it is about right, and else the number anew."""
    main, everything = reading_minutes(main_line(notebook)), reading_minutes(notebook)
    short, long = stated_minutes(title) or (0, 0)
    optional = has_optional_sections(notebook)
    if optional != (short < long):  # it gained its optional sections, or lost them
        short = long = 0
    if not within(1.25, short, main):
        short = in_fives(main)
    if not within(1.25, long, everything):
        long = in_fives(everything)
    reading = f"{short} minutes to read"
    if optional:
        long = max(long, short + 5)
        reading = f"{short} minutes to read the main line, {long} to read everything,"
    doing = exercise_minutes(notebook)
    return f"- **You'll spend**: about {reading} and {doing} for the exercises"


def stamp_title(notebook: dict, name: str) -> None:
    cell = notebook["cells"][0]
    heading, _, rest = "".join(cell["source"]).partition("\n\n")
    if rest.startswith("[![Open in Colab]"):
        rest = rest.partition("\n\n")[2]
    start = spent(notebook, rest)
    if SPENT.search(rest):
        rest = SPENT.sub(lambda _: start, rest)
    else:  # at the end of the list of what the reader will do, learn and need
        rest = re.sub(r"(\*\*You'll need\*\*.*?)\n\n", lambda f: f"{f[1]}\n{start}.\n\n", rest,
                      count=1, flags=re.S)  # fmt: skip
    cell["source"] = f"{heading}\n\n{open_line(name)}\n\n{rest}"


def stamp_bootstrap(notebook: dict, metadata: dict) -> None:
    """Put the cell that installs the package before the first cell of code."""
    cells = notebook["cells"]
    mine = next((cell for cell in cells if cell["id"] == ID), None)
    if mine is None:
        at = next(i for i, cell in enumerate(cells) if cell["cell_type"] == "code")
        mine = {"cell_type": "code", "execution_count": 1, "id": ID, "outputs": []}
        for cell in cells[at:]:
            if cell["cell_type"] == "code" and cell["execution_count"]:
                cell["execution_count"] += 1
        cells.insert(at, mine)
    mine["source"] = bootstrap()
    mine["metadata"] = metadata


def stamp_glossary_links(notebook: dict) -> None:
    """Write `[KL divergence](glossary:kl-divergence)` out, in place: GitHub and Colab follow it."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = "".join(cell["source"])
            cell["source"] = GLOSSARY_LINK.sub(rf"]({glossary_address()}#\1)", source)


def stamp_chapter(notebook: dict, name: str) -> None:
    """Stamp a chapter's title and bootstrap cells and its links to the glossary, in place."""
    stamp_glossary_links(notebook)
    stamp_title(notebook, name)
    stamp_bootstrap(notebook, {"tags": ["remove-cell"]})  # the site runs nothing


def stamp_sheet(notebook: dict, name: str) -> None:
    """Stamp a homework sheet's links and bootstrap cell, in place: students cannot edit it."""
    stamp_glossary_links(notebook)
    about = {"grade": False, "grade_id": f"h{name[0]}-bootstrap", "locked": True}
    about |= {"schema_version": 3, "solution": False, "task": False}
    stamp_bootstrap(notebook, {"nbgrader": about})


def stamped_readme(text: str, titles: dict[str, str]) -> str:
    """README with the address, and with the minutes of every chapter in its table."""
    slug = address().removeprefix("https://github.com/")
    text = re.sub(rf"{re.escape(COLAB)}[\w.-]+/[\w.-]+/blob", f"{COLAB}{slug}/blob", text)
    text = re.sub(r"(git\+|git clone )https://\S+", rf"\1{address()}", text)
    heading = "minutes to read + to do"
    for name, title in titles.items():
        short, long = stated_minutes(title)
        reading = short if short == long else f"{short} ({long})"
        if short < long:
            heading = "minutes to read (with optional sections) + to do"
        minutes = f"{reading} + {SPENT.search(title)['doing']}"
        row = re.compile(rf"^(\| \[[^\]]*\]\(notebooks/{re.escape(name)}\) \|.*\|)[^|]*\|$", re.M)
        text = row.sub(lambda found, m=minutes: f"{found[1]} {m} |", text)
    return TABLE.sub(f"| chapter | what it shows | {heading} |", text)


def stamped_citation(text: str) -> str:
    return re.sub(r"^repository-code: .*$", f'repository-code: "{address()}"', text, flags=re.M)


def stamped() -> dict:
    """Every stamped file and the text that belongs in it."""
    texts, titles = {}, {}
    for path in [*chapters(), *sheets()]:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        stamp = stamp_chapter if path.parent.name == "notebooks" else stamp_sheet
        stamp(notebook, path.name)
        if stamp is stamp_chapter:
            titles[path.name] = notebook["cells"][0]["source"]
        texts[path] = text_of(notebook)
    readme, citation = ROOT / "README.md", ROOT / "CITATION.cff"
    texts[readme] = stamped_readme(readme.read_text(encoding="utf-8"), titles)
    texts[citation] = stamped_citation(citation.read_text(encoding="utf-8"))
    return texts


def main() -> None:
    for path, text in stamped().items():
        if write(path, text):
            print(f"stamped {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

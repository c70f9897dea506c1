"""Write what the head of every chapter says about where the course stands and how long it is.

The address in pyproject.toml goes into each chapter's badge, into the cell that installs the
package where it is missing, into README.md and CITATION.cff. Minutes of reading and of exercises go
into each chapter's first cell and into README's table; a number that is still right stays. What
follows them in their line, how long the chapter runs, is its author's.

python tools/stamp_chapters.py writes what has changed and names it. Run again, it writes nothing.
"""

import json
import re

from course import ROOT, address, chapters, sheets, text_of, write
from minutes import exercise_minutes, reading_minutes, within

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
SPENT = re.compile(
    r"^- \*\*You'll spend\*\*: about (\d+) minutes to read and (\d+) for the exercises", re.M
)


def bootstrap() -> str:
    return BOOTSTRAP.format(address=address()).rstrip()


def open_line(name: str) -> str:
    """The badge of a chapter, and the way to the others for a reader who has this file alone."""
    colab = address().replace("https://github.com/", COLAB)
    badge = f"[![Open in Colab]({BADGE})]({colab}/blob/main/notebooks/{name})"
    return f"{badge} · [All chapters]({address()}#the-chapters)"


def stated_minutes(title: str) -> int | None:
    """What a chapter's first cell says of its reading; None where it says nothing."""
    found = SPENT.search(title)
    return int(found[1]) if found else None


def spent(notebook: dict, title: str) -> str:
    """What the chapter takes: what is stated while it is about right, and else the number anew."""
    by_formula, minutes = reading_minutes(notebook), stated_minutes(title)
    if minutes is None or not within(1.25, minutes, by_formula):
        minutes = max(5, 5 * round(by_formula / 5))
    doing = exercise_minutes(notebook)
    return f"- **You'll spend**: about {minutes} minutes to read and {doing} for the exercises"


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


def stamp_chapter(notebook: dict, name: str) -> None:
    """Stamp a chapter's title and bootstrap cells, in place."""
    stamp_title(notebook, name)
    stamp_bootstrap(notebook, {"tags": ["remove-cell"]})  # the site runs nothing


def stamp_sheet(notebook: dict, name: str) -> None:
    """Stamp a homework sheet's bootstrap cell, in place: students cannot edit it."""
    about = {"grade": False, "grade_id": f"h{name[0]}-bootstrap", "locked": True}
    about |= {"schema_version": 3, "solution": False, "task": False}
    stamp_bootstrap(notebook, {"nbgrader": about})


def stamped_readme(text: str, titles: dict[str, str]) -> str:
    """README with the address, and with the minutes of every chapter in its table."""
    slug = address().removeprefix("https://github.com/")
    text = re.sub(rf"{re.escape(COLAB)}[\w.-]+/[\w.-]+/blob", f"{COLAB}{slug}/blob", text)
    text = re.sub(r"(git\+|git clone )https://\S+", rf"\1{address()}", text)
    for name, title in titles.items():
        reading, doing = SPENT.search(title).groups()
        row = re.compile(rf"^(\| \[[^\]]*\]\(notebooks/{re.escape(name)}\) \|.*\|)[^|]*\|$", re.M)
        text = row.sub(lambda found, m=f"{reading} + {doing}": f"{found[1]} {m} |", text)
    return text


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

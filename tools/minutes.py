"""How long a chapter takes to read, by a formula.

200 words per minute, the rate at which people read to learn (Carver 1990, *Reading Rate*); by our
own guess 4 seconds for a line of code and half a minute for a figure or a displayed equation.
Exercises say their minutes themselves, and the two cells that install the package and set it up are
the same in every chapter: they do not count. Of a cell tagged `check`, which the site folds, the
claim in its first line counts. An alt text is read in place of its figure, so its lines do not
count either. The main line of a chapter is what stands before its heading `## Going deeper
(optional)`. How long a chapter runs is not computed: its author says it.
"""

import ast
import re

WORDS_A_MINUTE = 200
MINUTES_A_LINE = 4 / 60
MINUTES_A_PICTURE = 0.5
OPTIONAL = re.compile(r"^## Going deeper \(optional\)$", re.M)
EXERCISE = re.compile(r"^\*\*\d+\.\d+\*\* \((\d+) minutes", re.M)
SET_UP = re.compile(r"^SEED = \d+", re.M)
STUB = re.compile(r"^check\(\"\d+\.\d+\"", re.M)


def sources(notebook: dict, kind: str) -> str:
    return "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind)


def main_line(notebook: dict) -> dict:
    """A chapter without its optional sections: without what follows the heading of them."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        found = OPTIONAL.search(source) if cell["cell_type"] == "markdown" else None
        if found:
            return {**notebook, "cells": [*cells, {**cell, "source": source[: found.start()]}]}
        cells.append(cell)
    return notebook


def has_optional_sections(notebook: dict) -> bool:
    return main_line(notebook) is not notebook


def is_read(cell: dict) -> bool:
    """Whether a cell counts: no exercise, no stub, and neither of the cells that prepare."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return not EXERCISE.search(source)
    return not (STUB.search(source) or SET_UP.search(source) or has_tag(cell, "remove-cell"))


def has_tag(cell: dict, tag: str) -> bool:
    return tag in cell.get("metadata", {}).get("tags", ())


def lines_of(cell: dict) -> int:
    """Lines of code that are not empty, without those of a figure's alt text."""
    source = "".join(cell["source"])
    alt = set()
    for node in ast.walk(ast.parse(source)):
        names = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(name, ast.Name) and name.id == "alt" for name in names):
            alt |= set(range(node.lineno, node.end_lineno + 1))
        given = isinstance(node, ast.keyword) and node.arg == "alt"
        if given and not isinstance(node.value, ast.Name):
            alt |= set(range(node.value.lineno, node.value.end_lineno + 1))
    lines = enumerate(source.splitlines(), 1)
    return sum(bool(line.strip()) for number, line in lines if number not in alt)


def reading_minutes(notebook: dict) -> float:
    """Minutes to read a chapter, by the formula above."""
    notebook = {"cells": [cell for cell in notebook["cells"] if is_read(cell)]}
    prose = sources(notebook, "markdown")
    equations = len(re.findall(r"\$\$.+?\$\$", prose, re.S))
    prose = re.sub(r"\$\$.+?\$\$", " ", prose, flags=re.S)
    prose = re.sub(r"\$[^$\n]+\$", " symbol ", prose)  # an inline formula reads as one word
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    words = len(re.findall(r"\w[\w'’-]*", prose))
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    lines = sum(1 if has_tag(cell, "check") else lines_of(cell) for cell in code)
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", ())]
    figures = sum("image/png" in out.get("data", {}) for out in outputs)
    pictures = figures + equations
    return words / WORDS_A_MINUTE + lines * MINUTES_A_LINE + pictures * MINUTES_A_PICTURE


def exercise_minutes(notebook: dict) -> int:
    """The sum of what the exercises say of themselves."""
    return sum(map(int, EXERCISE.findall(sources(notebook, "markdown"))))


def within(factor: float, one: float, other: float) -> bool:
    return 1 / factor <= one / other <= factor

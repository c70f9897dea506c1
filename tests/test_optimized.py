"""Under `python -O` no `assert` runs: the judges judge all the same."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from verdicts import verdicts

ROOT = Path(__file__).resolve().parent.parent
SHEETS = sorted((ROOT / "notebooks" / "homework").glob("*.ipynb"))


def asserts(source: str) -> list[int]:
    """The lines of all `assert` statements."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def test_the_package_has_no_assert_statement():
    files = sorted((ROOT / "dpo_mini").rglob("*.py"))
    assert len(files) > 40
    found = {str(path): asserts(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.stem)
def test_the_tests_of_a_sheet_have_no_assert_statement(sheet):
    cells = [c for c in nbformat.read(sheet, as_version=4).cells if c.cell_type == "code"]
    tests = [c for c in cells if c.metadata.get("nbgrader", {}).get("grade")]
    assert len(tests) >= 10
    assert [cell.source for cell in tests if asserts(cell.source)] == []


def test_every_answer_gets_the_same_verdict_and_sentence_as_without_o(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tools")]))
    command = [sys.executable, "-O", ROOT / "tests" / "verdicts.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        plain = verdicts()
    finally:
        torch.set_default_dtype(before)
    optimized = json.loads(done.stdout)
    assert {k: (v, optimized[k]) for k, v in plain.items() if v != optimized[k]} == {}
    assert set(optimized) == set(plain)
    rights = [passed for place, (passed, _) in plain.items() if place.startswith("right ")]
    assert len(rights) > 80
    assert all(rights)
    wrongs = {place: said for place, said in plain.items() if place.startswith("wrong ")}
    assert len(wrongs) > 300
    # A hidden test alone may let a mistake pass that the visible test beside it catches.
    assert [p for p, (passed, _) in wrongs.items() if passed and not p.endswith(" True")] == []


def test_without_docstrings_a_wrong_answer_reads_the_theorem_that_fails():
    """`python -OO` drops docstrings too, which are the sentences of the known mistakes."""
    script = (
        "from dpo_mini.checks import diagnose; "
        "print(diagnose('2.4', lambda q, r, beta: q * (1 + (r - q @ r) / (2 * beta))))"
    )
    command = [sys.executable, "-OO", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout == "(False, 'some of your probabilities are negative')\n", done.stderr

"""The house keeps its floors: a module imports from lower levels, and nothing that it need not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "dpo_mini"
LEVELS = {
    "_numerics": -1,
    "_arguments": -1,
    "_files": -1,
    "progress": -1,
    "logps": 0,
    "closed_form": 0,
    "devices": 0,
    "preferences": 0,
    "losses": 0,
    "policy_gradient": 0,
    "relaxations": 0,
    "plotting": 0,
    "checks": 0,
    "policies": 1,
    "tasks": 1,
    "explorer": 2,
    "rollout": 2,
    "train": 3,
    "real": 4,
    "runs": 4,
}
HEAVY = {
    "transformers": {"real"},
    "tokenizers": {"real"},
    "datasets": {"real"},
    "pyarrow": {"real"},
    "accelerate": {"real"},
    "peft": {"real"},
    "matplotlib": {"plotting"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """The full name of every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            if node.module == "dpo_mini":
                yield from (f"dpo_mini.{alias.name}" for alias in node.names)
            else:
                yield node.module


def module_of(path):
    """`losses`, or `checks` for every file of that folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_level():
    assert {module_of(path) for path in FILES} - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_lower_levels_only(path):
    module = module_of(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert module in HEAVY.get(top, {module}), f"{module} imports {top}"
        below = rest.partition(".")[0]
        if top == "dpo_mini" and module != "__init__":
            if module == "checks":
                assert below == "checks", "an exercise's judge is independent of the library"
            elif below != module:  # a folder's files may import one another
                assert LEVELS[below] < LEVELS[module], f"{module} imports {below}"


def test_importing_the_library_loads_torch_and_nothing_slower():
    slow = ("transformers", "tokenizers", "datasets", "matplotlib", "IPython", "sympy", "pandas")
    script = f"import sys, dpo_mini; print([m for m in {slow} if m in sys.modules])"
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_without_transformers_real_says_what_to_install():
    script = "import sys; sys.modules['transformers'] = None; import dpo_mini.real"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: dpo_mini.real needs the package transformers: "
        'pip install transformers datasets accelerate peft, or pip install "dpo_mini[real]"'
    )

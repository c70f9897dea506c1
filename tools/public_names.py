"""The public names of the library with their arguments, one a line, in tests/public_names.txt.

python tools/public_names.py writes the list anew; a test compares the library with it, so that no
name goes, and no argument, without a thought for those who use it (CONTRIBUTING.md, Versions).
"""

import ast
import inspect
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "public_names.txt"


def written_names(path: Path) -> list[str]:
    """The names without an underscore that a file itself defines, in its order."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    names = dict.fromkeys(names)  # a name once: typing.overload writes it several times
    return [name for name in names if not name.startswith("_")]


def _public_files() -> dict[str, Path]:
    """Every module that says in `__all__` what it has, and whose path has no underscore."""
    found = {}
    for path in (ROOT / "dpo_mini").rglob("*.py"):
        inside = path.parent if path.name == "__init__.py" else path.with_suffix("")
        parts = inside.relative_to(ROOT).parts
        says = "\n__all__ = " in path.read_text(encoding="utf-8")
        if says and not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return dict(sorted(found.items()))


_FILES = _public_files()
MODULES = tuple(_FILES)  # "dpo_mini" is the first
# Folders whose `__init__` defines nothing: all their names are written in files beside it.
GATHERING = tuple(
    name for name, path in _FILES.items() if path.name == "__init__.py" and not written_names(path)
)[1:]


def public_names() -> list[str]:
    """`dpo_mini.losses.dpo_loss(chosen_logps, …, *, beta)` and so on, sorted."""
    lines = []
    for module_name in MODULES:
        module = import_module(module_name)
        for name in module.__all__:
            lines += _lines(f"{module_name}.{name}", getattr(module, name))
    return sorted(lines)


def _lines(name: str, value: object) -> list[str]:
    if inspect.isfunction(value):
        return [name + _arguments(value)]
    if not inspect.isclass(value):
        return [name]
    is_made = {"__init__", "__new__"} & set(vars(value)) and not getattr(value, "_is_protocol", 0)
    lines = [name + _arguments(value) if is_made else name]
    for attribute in vars(value):
        if not attribute.startswith("_"):
            member = getattr(value, attribute)
            arguments = _arguments(member) if inspect.isroutine(member) else ""
            lines.append(f"{name}.{attribute}{arguments}")
    return lines


def _arguments(called: object) -> str:
    """`(a, b, *, c=)`: names, order and which may be left out, no types and no defaults."""
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _LeftOut())
        for p in inspect.signature(called).parameters.values()
    ]
    return str(inspect.Signature(parameters))


class _LeftOut:
    def __repr__(self) -> str:
        return "…"


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
    print(f"{LIST.relative_to(ROOT)}: {len(public_names())} names")

"""The public names of the library with their arguments, one a line, in tests/public_names.txt.

python tools/public_names.py writes the list anew; a test compares the library with it, so that no
name goes, and no argument, without a thought for those who use it (CONTRIBUTING.md, Versions).
"""

import inspect
from importlib import import_module
from pathlib import Path

MODULES = (
    "dpo_mini",
    *(
        f"dpo_mini.{name}"
        for name in (
            "checks",
            "checks.homework",
            "checks.museum",
            "closed_form",
            "explorer",
            "logps",
            "losses",
            "plotting",
            "policies",
            "policy_gradient",
            "preferences",
            "progress",
            "real",
            "relaxations",
            "rollout",
            "tasks",
            "train",
        )
    ),
)
LIST = Path(__file__).resolve().parent.parent / "tests" / "public_names.txt"


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
    print(f"{LIST.relative_to(LIST.parent.parent)}: {len(public_names())} names")

"""DPO derived, measured and broken on tasks small enough to enumerate.

`import dpo_mini` brings in torch and nothing slower. `dpo_mini.plotting` (matplotlib),
`dpo_mini.explorer`, `dpo_mini.progress`, `dpo_mini.checks`, `dpo_mini.runs` and `dpo_mini.real`
(transformers, which the extra `real` installs) are there all the same: each is imported when it is
first asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from dpo_mini import (
    closed_form,
    devices,
    logps,
    losses,
    policies,
    policy_gradient,
    preferences,
    relaxations,
    rollout,
    tasks,
    train,
)

if TYPE_CHECKING:
    from dpo_mini import checks as checks
    from dpo_mini import explorer as explorer
    from dpo_mini import plotting as plotting
    from dpo_mini import progress as progress
    from dpo_mini import real as real
    from dpo_mini import runs as runs

__version__ = "0.1.0"

__all__ = [
    "closed_form",
    "devices",
    "logps",
    "losses",
    "policies",
    "policy_gradient",
    "preferences",
    "relaxations",
    "rollout",
    "tasks",
    "train",
]
_LATER = ("checks", "explorer", "plotting", "progress", "real", "runs")


if not TYPE_CHECKING:  # a type checker that sees this lets every name pass

    def __getattr__(name: str) -> ModuleType:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    # Without transformers `real` is left out: help(dpo_mini) asks for all that is named here.
    absent = {"real"} if find_spec("transformers") is None else set()
    return sorted({"__version__", *__all__, *_LATER} - absent)

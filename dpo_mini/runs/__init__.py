"""Trainings whose results are stored: too many for a chapter, or other on another processor.

`load("ablations")` reads what chapter 08 shows, `load("comparison")` what chapter 09 shows, and
`load("verifiable")` what chapter 10 shows. Each file was made by the module of its name; in the
repository `python tools/store_runs.py comparison` makes it anew and takes minutes.
"""

import json
from importlib.resources import files
from typing import Any

__all__ = ["NAMES", "load"]

NAMES = ("ablations", "comparison", "verifiable")
"""The files that there are."""


def load(name: str) -> dict[str, Any]:
    """The stored results of one set of trainings.

    Args:
      name: one of `NAMES`.
    Returns:
      what the function `make` of the module `dpo_mini.runs.<name>` returned.
    Raises:
      ValueError: another name.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}")
    return json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))


def __dir__() -> list[str]:
    return __all__

"""Old names that still work, with a warning that says what to write, since when and until when.

A module that renames one of its names keeps the old one for at least a minor version, by a line at
its end; CONTRIBUTING.md has the rule.

    __getattr__ = OldNames(__name__, {"dpo": Renamed("dpo_loss", since="0.2.0", until="0.3.0")})
"""

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Renamed",
    "OldNames",
]


@dataclass(frozen=True)
class Renamed:
    """Where an old name went.

    Args:
      to: the name in the same module that takes its place.
      since: the version from which on the old name warns, such as `"0.2.0"`.
      until: the version that no longer has it, a later minor or major one.
    """

    to: str
    since: str
    until: str


@dataclass(frozen=True)
class OldNames:
    """The `__getattr__` of a module: it is called with a name that the module has not.

    An old name gives what the new one is, with a DeprecationWarning at the line that asked for it;
    any other name is an AttributeError, as ever.

    Args:
      module: its `__name__`.
      names: each old name, and where it went.
    """

    module: str
    names: Mapping[str, Renamed]

    def __call__(self, name: str) -> Any:
        """What the new name is, or an AttributeError."""
        if name not in self.names:
            raise AttributeError(f"module {self.module!r} has no attribute {name!r}")
        went = self.names[name]
        warnings.warn(
            f"{self.module}.{name} is called {went.to} since version {went.since}; the old name "
            f"goes in version {went.until}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[self.module], went.to)


def __dir__() -> list[str]:
    return __all__

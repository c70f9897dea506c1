"""A progress bar for notebooks that is live everywhere and leaves nothing in the file."""

import html
import sys
from collections.abc import Collection, Iterator, Sized
from typing import Protocol, TypeVar

__all__ = [
    "Progress",
    "notebook_progress",
]
_T = TypeVar("_T")


class Progress(Protocol):
    """What shows how far a loop is: `tqdm`, `notebook_progress("SFT")`; `iter` shows nothing."""

    def __call__(self, steps: Collection[_T], /) -> Iterator[_T]:
        """The same items, in their order."""


def notebook_progress(label: str) -> Progress:
    """A wrapper for what a loop runs over: `fit_sft(..., progress=notebook_progress("SFT"))`.

    It shows one HTML `<progress>` under a display id while the loop runs and replaces it by nothing
    at the end, so that a saved notebook holds an empty output whatever the machine's speed. Outside
    a notebook it shows nothing; `tqdm` is for scripts.

    Args:
      label: what the loop does, shown beside the bar.
    Returns:
      From a range, or anything with a length, to the same items, shown as they go by.
    Raises:
      TypeError: `label` is not text.
    """

    if not isinstance(label, str):
        raise TypeError(f"`label` must be a str, got {type(label).__name__}")

    def wrap(steps: Collection[_T], /) -> Iterator[_T]:
        if not in_notebook():
            yield from steps
            return
        from IPython.display import display  # heavy, and only notebooks have it

        nothing = {"text/html": "", "text/plain": ""}
        handle = display(nothing, raw=True, display_id=True)
        try:
            for done, step in enumerate(steps):
                if handle is not None and done % _every(steps) == 0:
                    handle.update({**nothing, "text/html": _bar(label, done, steps)}, raw=True)
                yield step
        finally:
            if handle is not None:
                handle.update(nothing, raw=True)

    return wrap


def in_notebook() -> bool:
    """Whether a notebook shows what is displayed: a script has no shell, a terminal no kernel."""
    module = sys.modules.get("IPython.core.interactiveshell")  # a kernel has loaded it
    if module is None or not module.InteractiveShell.initialized():
        return False
    return getattr(module.InteractiveShell.instance(), "kernel", None) is not None


def _every(steps: Sized) -> int:
    return max(1, len(steps) // 100)


def _bar(label: str, done: int, steps: Sized) -> str:
    name = html.escape(label)
    return (
        f'<label>{name} <progress value="{done}" max="{len(steps)}"></progress> '
        f"{done}/{len(steps)}</label>"
    )


def __dir__() -> list[str]:
    return __all__

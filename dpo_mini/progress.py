"""A progress bar for notebooks that is live everywhere and leaves nothing in the file."""

import html
from collections.abc import Callable, Iterator, Sized

__all__ = [
    "notebook_progress",
]


def notebook_progress(label: str) -> Callable[[range], Iterator[int]]:
    """A wrapper for the range of a loop: `fit_sft(..., progress=notebook_progress("SFT"))`.

    It shows one HTML `<progress>` under a display id while the loop runs and replaces it by nothing
    at the end, so that a saved notebook holds an empty output whatever the machine's speed.

    Args:
      label: what the loop does, shown beside the bar.
    Returns:
      From a range to the same numbers, shown as they go by.
    """

    def wrap(steps: range) -> Iterator[int]:
        try:
            from IPython.display import display  # heavy, and only notebooks have it
        except ModuleNotFoundError:  # no notebook, so nothing to show it in
            yield from steps
            return
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

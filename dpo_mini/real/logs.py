"""Where the numbers of a training run go, step by step: a CSV file, TensorBoard."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpo_mini._files import write_whole
from dpo_mini.real.preferences import AnyPath

Log = Callable[[int, Mapping[str, float]], None]
"""Called with a step, 0 the first, and its numbers by name, always the same names."""


def csv_log(path: AnyPath) -> Log:
    """A log that adds one line per step to a CSV file: `step`, then the numbers to the last digit.

    A run that goes on from step s keeps the lines before s and drops the others, whole or broken:
    a run that was killed after its last checkpoint wrote lines that are now written again.

    Args:
      path: the file, whose folder is there.
    Returns:
      What `train_preferences` takes among its `logs`.
    Raises, when it is called:
      ValueError: the file has other columns.
      OSError: the file cannot be written.
    """
    path = Path(path)
    begun = False

    def log(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal begun
        names = ["step", *metrics]
        if not begun:
            earlier = _rows_before(path, step, names)
            write_whole(path, _lines([names, *earlier]).encode())
            begun = True
        line = _lines([[step, *(repr(float(value)) for value in metrics.values())]])
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(line)

    return log


@contextmanager
def tensorboard_log(folder: AnyPath) -> Iterator[Log]:
    """A log for TensorBoard: `with tensorboard_log(folder) as log`, then `tensorboard --logdir`.

    A run that goes on from step s hides what was written of s and later.

    Raises:
      ImportError: tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = None

    def log(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(folder), purge_step=step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


# --- private functions -----------------------------------------------------------------------


def _lines(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _rows_before(path: Path, step: int, names: list[str]) -> list[list[str]]:
    if not path.exists() or not path.read_text(encoding="utf-8"):
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a killed run's last line is not
    first, *rows = csv.reader(whole.split("\n"))
    if first != names:
        raise ValueError(f"`path` must have the columns {names} or be new, got {first} in {path}")
    return [row for row in rows if int(row[0]) < step]

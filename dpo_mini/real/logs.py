"""Where the numbers of a training run go, step by step: a CSV file, TensorBoard."""

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dpo_mini._arguments import check_count
from dpo_mini._files import write_whole
from dpo_mini.real.preferences import AnyPath

Log = Callable[[int, Mapping[str, float]], None]
"""Called with a step, 0 the first, and its numbers by name: those of training, and with `eval_` in
front those of an evaluation where there was one; after the last step the latter alone."""

MAIN_METRICS = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "grad_norm": "grad norm",
    "lr": "lr",
}
"""What a line on the console has, and how it calls it."""


def csv_log(path: AnyPath) -> Log:
    """A log that adds one line per step to a CSV file: `step`, then the numbers to the last digit.

    The columns are the names of the first step. A name that a later one lacks leaves a blank cell,
    as NaN does, and a new one adds a column. A run that goes on from step s keeps the lines before
    s and cuts off the others, whole or broken: a run that was killed after its last checkpoint
    wrote lines that are now written again. A line that cannot be written whole, as on a full disk,
    is taken back.

    Args:
      path: the file, whose folder is there.
    Returns:
      What `train_preferences` takes among its `logs`.
    Raises, when it is called:
      ValueError: the file has other columns, or a line that no log wrote.
      OSError: the file cannot be written, or the disk is full.
    """
    path = Path(path)
    columns: list[str] = []

    def log(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal columns
        columns = columns or _cut_to_lines_before(step, path, ["step", *metrics])
        new = [name for name in metrics if name not in columns]
        if new:
            _add_columns(path, columns, new)
            columns = columns + new
        there = {name: float(v) for name, v in metrics.items() if not math.isnan(v)}
        cells = {"step": str(step)} | {name: repr(value) for name, value in there.items()}
        _append(path, _line(cells.get(name, "") for name in columns))

    return log


def console_log(every: int, *, steps: int, write: Callable[[str], object] = print) -> Log:
    """A log that writes a line of the main numbers now and then, and one at each evaluation.

    Args:
      every: steps from one line to the next; the first step and the last have one too.
      steps: of the whole run.
      write: writes a line, such as `tqdm.write` beside a progress bar.
    Returns:
      What `train_preferences` takes among its `logs`.
    Raises:
      ValueError: a number below 1.
    """
    check_count("every", every)
    check_count("steps", steps)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        trained, held_out = (_in_words(metrics, prefix) for prefix in ("", "eval_"))
        if trained and (step % every == 0 or step == steps - 1):
            write(f"step {step}/{steps}: {trained}")
        if held_out:
            write(f"step {step}/{steps}, held out: {held_out}")

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


def _in_words(metrics: Mapping[str, float], prefix: str) -> str:
    """`loss 0.6931, margin 0.0012`, of those that are there."""
    found = {words: metrics.get(prefix + name) for name, words in MAIN_METRICS.items()}
    return ", ".join(f"{words} {value:.4g}" for words, value in found.items() if value is not None)


def _line(fields: Iterable[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode()


def _append(path: Path, line: bytes) -> None:
    """Adds a whole line, or leaves the file as it was."""
    with open(path, "ab", buffering=0) as file:
        length = file.seek(0, os.SEEK_END)
        try:
            rest = line
            while rest:  # a disk that becomes full takes a part, and nothing the next time
                rest = rest[file.write(rest) :]
        except BaseException as error:
            file.truncate(length)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


def _add_columns(path: Path, columns: list[str], new: list[str]) -> None:
    """Of a file that begins with a step that lacked them, since a run went on in a new file."""
    _, *lines = path.read_bytes().splitlines()
    blank = b"," * len(new) + b"\n"
    write_whole(path, _line(columns + new) + b"".join(line + blank for line in lines))


def _of_every_step(names: list[str], step: int) -> list[str]:
    """The first step has all names; a later one need not have those of an evaluation."""
    return [name for name in names if step == 0 or not name.startswith("eval_")]


def _cut_to_lines_before(step: int, path: Path, names: list[str]) -> list[str]:
    """Leaves the columns, which it returns, and lines of earlier steps: cuts off in its place."""
    content, header = path.read_bytes() if path.exists() else b"", _line(names)
    if len(content) < len(header) and header.startswith(content):  # new, or killed in its header
        if content:
            os.truncate(path, 0)
        _append(path, header)
        return names
    first, *lines = content.splitlines(keepends=True)
    got = next(csv.reader([first.decode(errors="replace")]))
    if not first.endswith(b"\n") or _of_every_step(got, step) != _of_every_step(names, step):
        raise ValueError(f"`path` must have the columns {names} or be new, got {got} in {path}")
    kept = len(first)
    for number, line in enumerate(lines, start=2):
        try:
            if not line.endswith(b"\n") or int(line.partition(b",")[0]) >= step:
                break
        except ValueError:
            raise ValueError(
                f"`path` must have lines that begin with a step, got {line!r} in line {number} of "
                f"{path} (give the log a file of its own)"
            ) from None
        kept += len(line)
    os.truncate(path, kept)
    return got

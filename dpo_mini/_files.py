"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "write_whole",
    "whole_folder",
]


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that after a failure, at any moment, what is at `path` is as it was before.

    The content goes to a new file in the same folder, which then takes the place of the old one.

    Raises:
      OSError: the folder is absent or not writable, or the disk is full.
    """
    path = Path(path).resolve()
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write in, which is at `path` with all that is in it when the block ends, or not.

    It is made beside `path` as `.NAME.XXXXXXXX.part`, with eight letters of `tempfile`. A process
    that is killed leaves it there: only the caller knows which of those are its own to remove.

    Raises:
      OSError: `path` is there, its folder is absent or not writable, or the disk is full.
    """
    path = Path(path).resolve()
    if path.exists():
        raise FileExistsError(f"`path` must be a new folder, got {path}, which is there")
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield partial
        for file in [*(p for p in partial.rglob("*") if p.is_file())]:
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
        os.chmod(partial, 0o755)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def __dir__() -> list[str]:
    return __all__

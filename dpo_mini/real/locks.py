"""A folder belongs to one run at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_mini.real.preferences import AnyPath


@contextmanager
def lock_folder(folder: AnyPath) -> Iterator[None]:
    """Keep other runs out of a folder: `with lock_folder(folder)`. One of several processes does.

    The folder is made where it is absent. The lock is one of the operating system's on the file
    `.lock` in it: it ends with the block, or with the process, however that ends. The file stays.

    Raises:
      ValueError: another run holds the lock, or `folder` is a file.
      OSError: the folder cannot be written.
    """
    with locked("folder", folder):
        yield


@contextmanager
def locked(name: str, folder: AnyPath) -> Iterator[None]:
    """`lock_folder` of the argument called `name`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`{name}` must be a folder or new, got {folder}, a file")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"`{name}` must be of one run at a time, got {folder}, where another "
            f"run{_process_of(path)} is at work (wait for its end, or give another folder)"
        ) from None
    try:
        with suppress(OSError):  # a full disk, or a system that lets nobody write to a locked file
            path.write_text(f"{os.getpid()}", encoding="utf-8")
        yield
    finally:
        lock.release()


# --- private functions -----------------------------------------------------------------------


def _process_of(path: Path) -> str:
    """What the holder of a lock wrote of itself, where the system lets others read it."""
    with suppress(OSError, ValueError):
        return f", process {int(path.read_text(encoding='utf-8'))},"
    return ""

"""Execute chapters in order, refresh their outputs and figures, and print a line for each.

python tools/run_chapters.py runs all, python tools/run_chapters.py 02 05 some. It stamps what the
chapters' heads say, their minutes included (tools/stamp_chapters.py).
"""

import json
import sys
import time
from pathlib import Path

import nbformat
import psutil
from course import NOTEBOOKS, chapters, text_of
from minutes import REFERENCE_SECONDS, calibrate, within
from nbclient import NotebookClient
from stamp_chapters import main as stamp
from stamp_chapters import stamp_chapter

from dpo_mini.files import write_whole

LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}


def execute(
    notebook: nbformat.NotebookNode,
    folder: Path,
    *,
    env: dict[str, str] | None = None,
    **settings: object,
) -> float:
    """Run a notebook's cells and return the kernel's processor seconds.

    They are those of the machine that `minutes` refers to: its work, timed before and after, says
    how fast this one is just now.

    Args:
      notebook: gets its outputs, in place.
      folder: where the kernel starts.
      env: the kernel's environment variables; those of this process when left out.
      settings: of `NotebookClient`, such as which kernel.
    """
    used = 0.0

    def look(**_: object) -> None:
        nonlocal used
        times = psutil.Process(client.km.provisioner.pid).cpu_times()
        used = times.user + times.system

    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=look,
        **settings,
    )
    before = calibrate()
    # Without the first of these a kernel of somebody else's manager would live on.
    client.execute(cleanup_kc=True, **({} if env is None else {"env": env}))
    return used * 2 * REFERENCE_SECONDS / (before + calibrate())


def run_chapter(path: Path) -> None:
    """Execute one notebook and write it back, whole or not at all."""
    given = json.loads(path.read_text(encoding="utf-8"))
    stamp_chapter(given, path.name)
    notebook = nbformat.reads(text_of(given), as_version=4)
    arguments = ["--IPKernelApp.log_level=40"]
    seconds = execute(notebook, path.parent, kernel_name="python3", extra_arguments=arguments)
    known = notebook.metadata.get("dpo_mini", {}).get("seconds")
    if known is None or not within(1.5, known, seconds):
        known = float(f"{seconds:.2g}")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    notebook.metadata["dpo_mini"] = {"seconds": known}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    stamp_chapter(notebook, path.name)
    nbformat.validate(notebook)
    write_whole(path, text_of(notebook).encode())


def main(wanted: list[str]) -> None:
    found = [path for path in chapters() if not wanted or path.name[:2] in wanted]
    if not found:
        sys.exit(f"no chapter is numbered {' or '.join(wanted)} in {NOTEBOOKS.name}/")
    for number, path in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {path.name} ...", end=" ", flush=True)
        start = time.perf_counter()
        run_chapter(path)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    stamp()  # README's table too


if __name__ == "__main__":
    main(sys.argv[1:])

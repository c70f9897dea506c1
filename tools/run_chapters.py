"""Execute chapters in order, refresh their outputs and figures, and print a line for each.

python tools/run_chapters.py runs all, python tools/run_chapters.py 02 05 some.
"""

import json
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from dpo_mini.files import write_whole

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}


def run_chapter(path: Path) -> None:
    """Execute one notebook and write it back, whole or not at all."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    nbformat.validate(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_whole(path, text.encode())


def main(wanted: list[str]) -> None:
    chapters = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chapters = [path for path in chapters if not wanted or path.name[:2] in wanted]
    if not chapters:
        sys.exit(f"no chapter is numbered {' or '.join(wanted)} in {NOTEBOOKS.name}/")
    for number, path in enumerate(chapters, 1):
        print(f"[{number}/{len(chapters)}] {path.name} ...", end=" ", flush=True)
        start = time.perf_counter()
        run_chapter(path)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

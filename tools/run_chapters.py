"""Execute chapters in order, refresh their outputs and figures, and print a line for each.

python tools/run_chapters.py runs all, python tools/run_chapters.py 02 05 some. With --seed 7 they
run as copies with another SEED, nothing is written, and the verdicts that do not hold are printed.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

from dpo_mini.files import write_whole

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
VERDICT = re.compile(r"\b(?:True|False|passed|not yet)\b")
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}


def execute(notebook: nbformat.NotebookNode, path: Path, folder: Path) -> None:
    """Execute the cells of a notebook in a folder, in place, a bar counting them."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # disable=None: no bar where the output goes to a file
    bar = tqdm(total=len(code), desc=path.name[:2], unit="cell", leave=False, disable=None)
    client = NotebookClient(
        notebook,
        on_cell_executed=lambda **_: bar.update(),
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(folder)}},
    )
    with bar:
        client.execute()


def run_chapter(path: Path) -> None:
    """Execute one notebook and write it back, whole or not at all."""
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path, path.parent)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    nbformat.validate(notebook)
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_whole(path, text.encode())


def try_seed(path: Path, seed: int) -> None:
    """Execute a copy with another SEED; print each verdict that changed, or the error."""
    committed, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in notebook.cells:
        cell.source = re.sub(r"^SEED = 0\b", f"SEED = {seed}", cell.source, flags=re.M)
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / path.stem  # beside which there is no folder figures/
        folder.mkdir()
        try:
            execute(notebook, path, folder)
        except CellExecutionError as error:
            print(f"  stopped: {error.ename}: {error.evalue}")
    for number, (before, after) in enumerate(zip(committed.cells, notebook.cells, strict=True)):
        if before.cell_type == "code":
            for line, other in zip(printed(before), printed(after), strict=False):
                if VERDICT.findall(line) != VERDICT.findall(other):
                    print(f"  cell {number}: {other}", flush=True)


def printed(cell: nbformat.NotebookNode) -> list[str]:
    """The lines that a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs).splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chapters", nargs="*", help="numbers, such as 02 05; all when left out")
    parser.add_argument("--seed", type=int, help="try another SEED, and write nothing")
    given = parser.parse_args()
    chapters = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    wanted = given.chapters
    chapters = [path for path in chapters if not wanted or path.name[:2] in wanted]
    if not chapters:
        parser.error(f"no chapter is numbered {' or '.join(wanted)} in {NOTEBOOKS.name}/")
    for number, path in enumerate(chapters, 1):
        print(f"[{number}/{len(chapters)}] {path.name} ...", flush=True)
        start = time.perf_counter()
        run_chapter(path) if given.seed is None else try_seed(path, given.seed)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

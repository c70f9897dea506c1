"""Execute chapters in order, refresh their outputs and figures, and print a line for each.

python tools/run_chapters.py runs all, python tools/run_chapters.py 02 05 some. It stamps what the
chapters' heads say of the address and of reading (tools/stamp_chapters.py), and writes nothing that
it measures: the seconds of each run are printed and no more. With --seed 7 chapters run as copies
with another SEED, nothing is written, and the verdicts that do not hold are printed.
"""

import argparse
import base64
import json
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from course import NOTEBOOKS, chapters, text_of
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from stamp_chapters import main as stamp
from stamp_chapters import stamp_chapter
from tqdm import tqdm

from dpo_mini._files import write_whole

QUIET_KERNEL = {"kernel_name": "python3", "extra_arguments": ["--IPKernelApp.log_level=40"]}
FIGURES = NOTEBOOKS.parent / "figures"
VERDICT = re.compile(r"\b(?:True|False|passed|not yet)\b|\blargest error[^:]*: below \S+")
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}


def execute(
    notebook: nbformat.NotebookNode,
    folder: Path,
    *,
    env: dict[str, str] | None = None,
    **settings: object,
) -> None:
    """Run a notebook's cells.

    Args:
      notebook: gets its outputs, in place.
      folder: where the kernel starts.
      env: the kernel's environment variables; those of this process when left out.
      settings: of `NotebookClient`, such as which kernel.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # disable=None: no bar where the output goes to a file
    bar = tqdm(total=len(code), unit="cell", leave=False, disable=None)
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
        on_cell_executed=lambda **_: bar.update(),
        **settings,
    )
    # Without the first of these a kernel of somebody else's manager would live on.
    with bar:
        client.execute(cleanup_kc=True, **({} if env is None else {"env": env}))


def run_chapter(path: Path) -> None:
    """Execute one notebook and write it back, whole or not at all."""
    given = json.loads(path.read_text(encoding="utf-8"))
    stamp_chapter(given, path.name)
    notebook = nbformat.reads(text_of(given), as_version=4)
    with tempfile.TemporaryDirectory() as drawn:
        # `plotting.save` writes where this says.
        env = {**os.environ, "DPO_MINI_FIGURES": drawn}
        execute(notebook, path.parent, env=env, **QUIET_KERNEL)
        kept = keep_pictures(nbformat.reads(text_of(given), as_version=4), notebook)
        for figure in Path(drawn).iterdir():
            png = base64.b64encode(figure.read_bytes()).decode()
            content = base64.b64decode(kept.get(png, png))
            write_whole(FIGURES / figure.name, content)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": LANGUAGE}
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags"}
    stamp_chapter(notebook, path.name)
    nbformat.validate(notebook)
    write_whole(path, text_of(notebook).encode())


def keep_pictures(
    committed: nbformat.NotebookNode, notebook: nbformat.NotebookNode
) -> dict[str, str]:
    """Put committed pictures back where only what differs between machines has changed.

    That is where the text of the output is the same, and says that some values vary. Returned are
    these pictures by those that they replace.
    """
    before = {cell.id: cell.get("outputs", []) for cell in committed.cells}
    kept = {}
    for cell in notebook.cells:
        for old, new in zip(before[cell.id], cell.get("outputs", []), strict=False):
            old, new = old.get("data", {}), new.get("data", {})
            text = new.get("text/plain", "")
            if ", which vary" in text and text == old.get("text/plain") and "image/png" in new:
                kept[new["image/png"].strip()] = old["image/png"]
                new["image/png"] = old["image/png"]
    return kept


def try_seed(path: Path, seed: int) -> None:
    """Execute a copy with another SEED; print each verdict that changed, or the error."""
    committed, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in notebook.cells:
        cell.source = re.sub(r"^SEED = 0\b", f"SEED = {seed}", cell.source, flags=re.M)
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / path.stem
        folder.mkdir()
        try:
            execute(notebook, folder, **QUIET_KERNEL)
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
    wanted = given.chapters
    found = [path for path in chapters() if not wanted or path.name[:2] in wanted]
    if not found:
        parser.error(f"no chapter is numbered {' or '.join(wanted)} in {NOTEBOOKS.name}/")
    for number, path in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {path.name} ...", flush=True)
        start = time.perf_counter()
        run_chapter(path) if given.seed is None else try_seed(path, given.seed)
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    if given.seed is None:
        stamp()  # README's table too


if __name__ == "__main__":
    main()

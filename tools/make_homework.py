"""Write a course directory for nbgrader: the homework sheets of one seed, and the student copies.

python tools/make_homework.py --seed 7 writes homework/seed_7/, with the sheets as instructors have
them in source/ and as students get them in release/. Run again, it renews both and leaves what was
submitted and graded alone.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from course import ROOT, sheets, text_of

from dpo_mini._files import write_whole
from dpo_mini.checks.homework import instance

CONFIG = r"""c = get_config()
c.CourseDirectory.course_id = "dpo_mini"
c.ClearSolutions.code_stub = {"python": "...  # your lines here"}
c.ClearSolutions.text_stub = "*Your answer here.*"
c.ExecutePreprocessor.timeout = 120
# nbgrader zip_collect: ada__1_derive_the_optimum.ipynb is the first sheet of student ada.
c.FileNameCollectorPlugin.named_regexp = r".*?(?P<student_id>[^/\\]+?)__(?P<file_id>.+\.ipynb)$"
"""

# The hidden beginning of each test: a student's cell may have overwritten what the test stands on.
GUARD = """### BEGIN HIDDEN TESTS
# Import dpo_mini anew from its files, and run the set-up again.
import sys

for _module in [name for name in sys.modules if name.split(".")[0] == "dpo_mini"]:
    del sys.modules[_module]
{setup}
### END HIDDEN TESTS
"""


def instance_lines(seed: int) -> str:
    """The set-up cell that holds the instance of `seed`, as a student reads it."""
    ref_probs, rewards, beta = instance(seed)

    def table(rows: list[list[float]]) -> str:
        return "torch.tensor([" + ", ".join(str(row) for row in rows) + "])"

    return (
        "# Your instance: two prompts, four answers each.\n"
        f"SEED = {seed}\n"
        f"REF = {table(ref_probs.tolist())}\n"
        f"REWARDS = {table(rewards.tolist())}\n"
        f"BETA = {beta}"
    )


def stamped(path: Path, seed: int) -> str:
    """The text of a sheet, with the instance of `seed` in its set-up and in its tests."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["metadata"].get("nbgrader", {}).get("grade_id", "").endswith("-instance"):
            cell["source"] = instance_lines(seed)
        else:
            cell["source"] = re.sub(r"\bseed=\d+", f"seed={seed}", source)
    return text_of(notebook)


def guarded(text: str) -> str:
    """A sheet as nbgrader runs it: each test begins with the guard, which students do not get."""
    notebook = json.loads(text)
    marks = [cell["metadata"].get("nbgrader", {}) for cell in notebook["cells"]]
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (setup,) = [
        source
        for source, mark in zip(sources, marks, strict=True)
        if mark.get("grade_id", "").endswith("-setup")
    ]
    for cell, source, mark in zip(notebook["cells"], sources, marks, strict=True):
        if mark.get("grade") and cell["cell_type"] == "code":
            cell["source"] = GUARD.format(setup=setup) + source
    return text_of(notebook)


def make_course(folder: Path, seed: int, wanted: list[Path]) -> None:
    """Write the course directory `folder`, its sources and its student copies."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config

    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "nbgrader_config.py", CONFIG.encode())
    # nbgrader starts a program that is installed beside this Python, whether or not PATH has it.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    config = Config()
    config.Application.log_level = "WARNING"
    exec(CONFIG, {"get_config": lambda: config})
    config.CourseDirectory.root = str(folder)
    config.Exchange.root = str(folder / "exchange")
    api = NbGraderAPI(config=config)
    for number, path in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {path.stem} ...", end=" ", flush=True)
        start = time.perf_counter()
        source = folder / "source" / path.stem / path.name
        source.parent.mkdir(parents=True, exist_ok=True)
        write_whole(source, guarded(stamped(path, seed)).encode())
        done = api.generate_assignment(path.stem, force=True, create=True)
        if not done["success"]:
            raise SystemExit(done.get("log") or done.get("error"))
        student = nbformat.read(folder / "release" / path.stem / path.name, as_version=4)
        text = "\n".join(cell.source for cell in student.cells)
        if "BEGIN SOLUTION" in text or "HIDDEN TESTS" in text:
            raise SystemExit(f"{path.name}: the student copy still holds a marked region")
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the homework sheets of one seed.")
    parser.add_argument("--seed", type=int, default=0, help="the instance: any integer >= 0")
    parser.add_argument("--out", type=Path, default=ROOT / "homework", help="where to write it")
    parser.add_argument("--sheet", type=int, help="only this one, 1 to 4")
    given = parser.parse_args()
    if given.seed < 0:
        parser.error(f"--seed must be a whole number >= 0, got {given.seed}")
    wanted = [path for path in sheets() if given.sheet in (None, int(path.name[0]))]
    if not wanted:
        parser.error(f"--sheet must be one of 1 to {len(sheets())}, got {given.sheet}")
    folder = (given.out / f"seed_{given.seed}").resolve()
    make_course(folder, given.seed, wanted)
    print(f"student copies: {folder / 'release'}")


if __name__ == "__main__":
    main()

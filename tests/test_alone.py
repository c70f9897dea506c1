"""One chapter alone in an empty folder, where torch, numpy, matplotlib and ipykernel are: Colab."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
from course import chapters
from jupyter_kernels import bare_environment, kernel_of
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from run_chapters import execute
from wheel import build_wheel

GIVEN = ("torch", "numpy", "matplotlib", "ipykernel", "pip")
ABSENT = (
    "dpo_mini", "transformers", "tokenizers", "safetensors", "datasets", "pyarrow", "accelerate",
    "peft", "tqdm", "pandas", "scipy", "nbval", "nbclient", "nbformat", "nbgrader", "pytest",
    "jupyterlab", "ipywidgets", "trl", "tensorboard",
)  # fmt: skip
# Starts a kernel and writes down every path that Python then opens to write, makes or moves.
KERNEL = """
import os, sys
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def note(event, args):
    if event == "open":
        path, _, flags = args
        if not isinstance(path, int) and flags & writing:
            os.write(log, os.fsencode(os.path.abspath(path)) + b"\\n")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link"):
        for path in args[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
            os.write(log, os.fsencode(os.path.abspath(path)) + b"\\n")

sys.addaudithook(note)
from ipykernel.kernelapp import launch_new_instance
launch_new_instance()
"""


def pytest_generate_tests(metafunc):
    if "chapter" in metafunc.fixturenames:
        named = [path for path in chapters() if path.name[:2] <= "15"]
        if not metafunc.config.getoption("--all-chapters"):
            named = [path for path in named if path.name[:2] in ("00", "02", "15")]
        metafunc.parametrize("chapter", named, ids=lambda path: path.stem)


def with_needs(names) -> set[str]:
    """Distributions and all that they need here, by name."""
    found, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, distribution(name).requires or ())
            left += [n.name for n in needs if not n.marker or n.marker.evaluate({"extra": ""})]
    return found


class Environment:
    """A virtual environment with a few packages of this one, linked and not copied.

    torch alone weighs hundreds of megabytes, and to link takes a tenth of a second: so each test
    has a fresh one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv = [sys.executable, "-m", "venv", "--without-pip", str(folder / "env")]
        subprocess.run(venv, check=True)
        self.python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        here = Path(sysconfig.get_path("purelib"))
        for name in with_needs(GIVEN):
            for top in {file.parts[0] for file in distribution(name).files}:
                if top not in ("..", "__pycache__") and not (self.site / top).exists():
                    (self.site / top).symlink_to(here / top)

    def variables(self, source: Path | str) -> dict[str, str]:
        for name in ("home", "tmp"):
            (self.folder / name).mkdir(exist_ok=True)
        given = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.folder / "tmp")}
        # The packages are linked: what Python compiles would land in the real ones.
        given |= {"PYTHONDONTWRITEBYTECODE": "1", "DPO_MINI_SOURCE": str(source)}
        return bare_environment(**given)

    def ask(self, program: str) -> str:
        """What a program prints there, started where no package lies beside it."""
        command = [str(self.python), "-c", program]
        where = {"cwd": self.folder, "env": bare_environment()}
        done = subprocess.run(command, capture_output=True, text=True, check=True, **where)
        return done.stdout.strip()

    def packages(self) -> dict[str, str]:
        return json.loads(
            self.ask(
                "import json; from importlib.metadata import distributions; "
                "print(json.dumps({d.name: d.version for d in distributions()}))"
            )
        )

    def run(self, path: Path, source: Path | str) -> tuple[nbformat.NotebookNode, list]:
        """Run a copy of a notebook in an empty folder: it, and the paths that it wrote."""
        alone = self.folder / "alone"
        alone.mkdir()
        shutil.copy(path, alone)
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        log, kernel = self.folder / "written.txt", self.folder / "kernel.py"
        kernel.write_text(KERNEL, encoding="utf-8")
        km = kernel_of([str(self.python), str(kernel), str(log)], self.folder / "kernels")
        execute(notebook, alone, km=km, env=self.variables(source))
        return notebook, [Path(line) for line in log.read_text().splitlines()]


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def printed(notebook) -> list[list[str]]:
    """Of every cell of code what it printed and its figures' receipts."""
    return [
        [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_environment_has_what_it_should_and_no_more(environment):
    lookup = "import json; from importlib.util import find_spec; print(json.dumps([n for n in "
    there = json.loads(environment.ask(f"{lookup}{(*GIVEN, *ABSENT)} if find_spec(n)]))"))
    assert set(there) == set(GIVEN)
    # Not vacuous: names are right, since this environment knows most of them.
    assert sum(bool(shutil.which(n) or _here(n)) for n in ABSENT) > len(ABSENT) // 2


def _here(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_a_chapter_alone_in_an_empty_folder_runs_as_committed(chapter, environment, wheel):
    (environment.folder / "figures").mkdir()  # somebody else's: no chapter writes there
    before = environment.packages()
    notebook, written = environment.run(chapter, wheel)
    committed = nbformat.read(chapter, as_version=4)
    assert printed(notebook) == printed(committed)

    version = re.search(r"-(\d[^-]*)-", wheel.name)[1]
    assert environment.packages() == {**before, "dpo_mini": version}
    where = environment.ask("import dpo_mini; print(dpo_mini.__file__)")
    assert Path(where).is_relative_to(environment.site)

    assert [path.name for path in (environment.folder / "alone").iterdir()] == [chapter.name]
    assert not list((environment.folder / "figures").iterdir())
    # What libraries keep in the home folder and among temporary files is not the chapter's.
    own = [environment.folder / "home", environment.folder / "tmp", Path(os.devnull)]
    assert own[0] / ".ipython" in written, "the kernel writes nothing down"
    outside = {p for p in written if not any(p.is_relative_to(mine) for mine in own)}
    assert not outside


def test_what_cannot_be_installed_is_said_in_a_sentence(environment):
    chapter = chapters()[0]
    with pytest.raises(CellExecutionError) as caught:
        environment.run(chapter, "/no/such/dpo_mini.whl")
    assert caught.value.ename == "RuntimeError"
    assert caught.value.evalue.startswith("could not install /no/such/dpo_mini.whl: ")
    assert "dpo_mini" not in environment.packages()

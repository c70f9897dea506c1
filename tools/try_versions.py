"""Run every chapter on the oldest or the newest versions that pyproject.toml allows.

python tools/try_versions.py oldest makes an environment in _build/oldest, with the lowest version
of each range of the library, of the notebooks and of `real`, and executes all chapters in it.
Outputs are not compared: a random stream or a last digit may differ between versions. A warning is
no failure. python tools/try_versions.py newest does the same with the highest; numbers of chapters
after it run these alone.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from course import ROOT, chapters, project
from jupyter_kernels import bare_environment, kernel_of
from nbclient.exceptions import CellExecutionError
from run_chapters import execute
from wheel import build_wheel

NAMED = ("torch", "numpy", "matplotlib", "transformers")


def ranges() -> list[str]:
    """The requirements of the library and of its extras `notebooks` and `real`, as written."""
    extras = project()["optional-dependencies"]
    found = [*project()["dependencies"], *extras["notebooks"], *extras["real"]]
    return [need for need in found if not need.startswith("jupyterlab")]  # a kernel is enough


def oldest(requirement: str) -> str:
    """`torch>=2.6,<2.14` becomes `torch==2.6`."""
    found = re.fullmatch(r"([\w-]+)>=([\d.]+),<[\d.]+", requirement)
    if not found:
        raise ValueError(f"a requirement must be NAME>=LOWEST,<NEXT, got {requirement}")
    return f"{found[1]}=={found[2]}"


def make_environment(which: str, folder: Path) -> Path:
    """A new virtual environment with one end of every range and this package; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    needs = [oldest(need) if which == "oldest" else need for need in ranges()]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *needs], check=True, env=bare_environment())
    with tempfile.TemporaryDirectory() as made:
        wheel = [str(build_wheel(Path(made)))]
        subprocess.run([*pip, "--no-deps", *wheel], check=True, env=bare_environment())
    return python


def versions(python: Path) -> str:
    program = (
        "import sys; from importlib.metadata import version; "
        f"print(f'Python {{sys.version.split()[0]}}', *(f'{{n}} {{version(n)}}' for n in {NAMED}))"
    )
    done = subprocess.run(
        [str(python), "-c", program], check=True, capture_output=True, text=True,
        env=bare_environment(),
    )  # fmt: skip
    return done.stdout.strip()


def try_chapter(path: Path, python: Path) -> str:
    """Run a chapter in an empty folder; the last line of its error, or nothing."""
    quiet = bare_environment(PYDEVD_DISABLE_FILE_VALIDATION="1")  # a warning of old debuggers
    with tempfile.TemporaryDirectory() as folder:
        notebook = nbformat.read(path, as_version=4)
        km = kernel_of([str(python), "-m", "ipykernel_launcher"], Path(folder) / "kernels")
        alone = Path(folder) / "alone"
        alone.mkdir()
        try:
            execute(notebook, alone, km=km, env=quiet)
        except CellExecutionError as error:
            return f"{error.ename}: {error.evalue}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all chapters on one end of the ranges.")
    parser.add_argument("which", choices=("oldest", "newest"))
    parser.add_argument("chapters", nargs="*", help="only these, such as 02 16")
    parser.add_argument("--python", type=Path, help="of an environment that is there already")
    given = parser.parse_intermixed_args()
    python = given.python or make_environment(given.which, ROOT / "_build" / given.which)
    print(versions(python), flush=True)
    found = [p for p in chapters() if not given.chapters or p.name[:2] in given.chapters]
    failed = 0
    for number, path in enumerate(found, 1):
        print(f"[{number}/{len(found)}] {path.stem} ...", end=" ", flush=True)
        fault = try_chapter(path, python)
        print(fault or "ran", flush=True)
        failed += bool(fault)
    print(f"{len(found) - failed} chapters ran, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

"""What `pip install dpo_mini` brings: three dependencies, the library with its types, no more."""

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from course import address
from wheel import build_wheel

import dpo_mini

ROOT = Path(__file__).resolve().parent.parent
# Installed with torch, numpy and matplotlib, or part of Python; the rest is out of reach.
ALONE = """
import sys
import re
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def closure(names):
    seen = set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue
        for need in needs:
            if "extra ==" not in need:
                names.append(re.match(r"[A-Za-z0-9._-]+", need)[0].lower().replace("_", "-"))
    return seen

allowed = closure(["torch", "numpy", "matplotlib"])
blocked = {
    top
    for top, owners in packages_distributions().items()
    if not {owner.lower().replace("_", "-") for owner in owners} & allowed
} - {"dpo_mini"}

class Blind:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            return None
        return self.finder.find_spec(name, path, target)

assert {"transformers", "IPython", "pytest", "datasets", "tqdm"} <= blocked, blocked
sys.meta_path[:] = [Blind(finder) for finder in sys.meta_path]
sys.path.insert(0, sys.argv[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("built"))) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


def run_alone(folder, script):
    """A script that sees the wheel, torch, numpy, matplotlib and what those three need."""
    command = [sys.executable, "-W", "error", "-c", ALONE + script, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_library_alone_needs_three_packages(metadata):
    needs = metadata.get_all("Requires-Dist")
    alone = [re.match(r"[\w-]+", need)[0] for need in needs if "extra ==" not in need]
    assert sorted(alone) == ["matplotlib", "numpy", "torch"]
    assert metadata["Version"] == dpo_mini.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_all("Project-URL") == [f"Repository, {address()}"]


def test_the_wheel_holds_every_module_and_the_mark_of_types_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (p for p in (ROOT / "dpo_mini").rglob("*") if p.is_file() and p.suffix != ".pyc")
    assert held == {str(p.relative_to(ROOT)) for p in files}
    assert "dpo_mini/py.typed" in held


def test_every_module_but_real_works_with_three_packages(installed):
    script = """
import importlib, pkgutil, dpo_mini
assert dpo_mini.__file__.startswith(sys.argv[1]), dpo_mini.__file__
found = pkgutil.walk_packages(dpo_mini.__path__, "dpo_mini.", onerror=lambda name: None)
names = [module.name for module in found if not module.name.startswith("dpo_mini.real")]
for name in names:
    importlib.import_module(name)
assert "real" not in dir(dpo_mini)
fig, ax = dpo_mini.plotting.axes("a", "b", "c")
print(dpo_mini.plotting.receipt(fig))
print(list(dpo_mini.progress.notebook_progress("SFT")(range(3))))
print(len(names) > 30)
help(dpo_mini)
"""
    done = run_alone(installed, script)
    assert done.stderr == ""
    assert done.stdout.splitlines()[:3] == ["[a] x: b | y: c", "[0, 1, 2]", "True"]
    assert "dpo_mini - DPO derived" in done.stdout


@pytest.mark.parametrize("asked", ["import dpo_mini.real", "import dpo_mini; dpo_mini.real"])
def test_without_its_extra_real_says_what_to_install(installed, asked):
    done = run_alone(installed, asked)
    last = done.stderr.strip().splitlines()[-1]
    assert re.match("(ImportError|ModuleNotFoundError): dpo_mini.real needs ", last)
    assert 'pip install "dpo_mini[real]"' in last


def test_without_a_notebook_a_figure_and_the_explorer_are_text(installed):
    script = """
import matplotlib
matplotlib.use("Agg")
from dpo_mini import plotting
from dpo_mini.explorer import Explorer
plotting.show(plotting.axes("a", "b", "c")[0], alt="axes")
Explorer().show()
"""
    done = run_alone(installed, script)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] == "axes"
    assert done.stdout.splitlines()[2].split() == [
        "answer",
        "π_ref",
        "reward",
        "π*",
        "implied",
        "reward",
    ]


def test_the_extras_are_named_in_the_package(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert {"notebooks", "real", "test"} <= extras


def test_one_version_everywhere():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)[1]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1]
    assert cited == newest == dpo_mini.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", cited), "semantic versioning has three numbers"

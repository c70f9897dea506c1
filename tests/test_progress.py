"""The notebooks' progress bar: live while it runs, nothing in the file afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_mini import progress
from dpo_mini.progress import notebook_progress

ROOT = Path(__file__).resolve().parent.parent

NOTHING = {"text/html": "", "text/plain": ""}


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, data, *, raw):
        assert raw
        self.shown.append(data)


@pytest.fixture
def handle(monkeypatch):
    handle = Handle()

    def display(data, *, raw, display_id):
        assert raw
        assert display_id
        handle.shown.append(data)
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    return handle


def test_it_passes_every_step_through(handle):
    assert list(notebook_progress("SFT")(range(250))) == list(range(250))


def test_it_takes_whatever_has_a_length(handle):
    named = {"DPO": 1, "PPO": 2}
    assert list(notebook_progress("each")(named.items())) == [("DPO", 1), ("PPO", 2)]
    assert 'max="2"' in handle.shown[1]["text/html"]


def test_it_starts_and_ends_empty_and_moves_between(handle):
    list(notebook_progress("a < b")(range(250)))
    assert handle.shown[0] == handle.shown[-1] == NOTHING
    bars = [data["text/html"] for data in handle.shown[1:-1]]
    assert 100 <= len(bars) <= 130
    assert 'value="2" max="250"' in bars[1]
    assert "a &lt; b" in bars[1]
    assert all(data["text/plain"] == "" for data in handle.shown)


def test_it_ends_empty_when_the_loop_breaks(handle):
    steps = notebook_progress("SFT")(range(10))
    next(steps)
    steps.close()
    assert handle.shown[-1] == NOTHING


def test_it_works_where_nothing_can_be_shown(monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda data, **kw: None)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    assert list(notebook_progress("SFT")(range(3))) == [0, 1, 2]


def test_its_label_is_text():
    for label in (None, 3, b"SFT", ["SFT"]):
        with pytest.raises(TypeError, match="`label` must be a str, got"):
            notebook_progress(label)


SHOWS = """
from dpo_mini import plotting
from dpo_mini.explorer import Explorer
from dpo_mini.progress import in_notebook, notebook_progress

print(in_notebook())
plotting.show(plotting.axes("a finding", "x", "y")[0], alt="nothing yet")
Explorer().show()
print(list(notebook_progress("SFT")(range(3))))
"""
TABLE = """\
x1 at β = 0.5, reverse KL: log Z = 1.3834 nats, J(π*) = 0.6917
answer   π_ref   reward      π*  implied reward
     a  0.4000   1.0000  0.7411          0.3083
     b  0.3000   0.2000  0.1122         -0.4917
     c  0.2000  -0.4000  0.0225         -1.0917
     d  0.1000   0.8000  0.1242          0.1083
"""
TERMINAL = """
from IPython.terminal.interactiveshell import TerminalInteractiveShell
TerminalInteractiveShell.instance()
"""


@pytest.mark.parametrize("before", ["", "import IPython.display", TERMINAL])
def test_a_script_and_a_terminal_print_text_alone(before, tmp_path):
    if before:
        pytest.importorskip("IPython")
    env = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "MPLBACKEND": "Agg"}
    env |= {"IPYTHONDIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + SHOWS],
        capture_output=True, encoding="utf-8", env=env, check=True,
    )  # fmt: skip
    assert done.stdout == f"False\nnothing yet\n{TABLE}[0, 1, 2]\n"
    assert done.stderr == ""


def test_a_notebook_shows_all_three(tmp_path):
    nbformat = pytest.importorskip("nbformat.v4")
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.new_notebook(cells=[nbformat.new_code_cell(f"%cd -q {ROOT}\n{SHOWS}")])
    nbclient.NotebookClient(book, timeout=120, kernel_name="python3").execute()
    said, figure, table, bar, rest = book.cells[0].outputs
    assert (said.text, rest.text) == ("True\n", "[0, 1, 2]\n")
    assert figure.data["image/png"].startswith("iVBOR")
    assert figure.data["text/plain"] == "nothing yet\n[a finding] x: x | y: y"
    assert figure.metadata["image/png"]["alt"] == "nothing yet"
    assert "<script>" in table.data["text/html"]
    assert table.data["text/plain"] + "\n" == TABLE
    assert bar.data == NOTHING

"""The notebooks' progress bar: live while it runs, nothing in the file afterwards."""

import pytest

from dpo_mini.progress import notebook_progress

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
    assert list(notebook_progress("SFT")(range(3))) == [0, 1, 2]

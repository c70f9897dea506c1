"""The chapters that choose their device in one line run on another one than the CPU.

There is none where the tests run, so it is pretended (`tests/pretended_device.py`). The code comes
from the notebooks as they are, with another name in that line. To be quick, trainings take two
steps, and a chapter may have shorter reviews and stand-ins for a few pieces of code.
"""

import json
import linecache
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from pretended_device import DEVICE, PretendedTensor, pretended_device

from dpo_mini import plotting, tasks, train

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LINE = 'device, seeded = on_device("cpu")  # "cuda" runs it on a GPU'
WITH_THE_LINE = {"06", "07", "08", "09", "10"}
WORDS = {"06": 4, "07": 4}
"""In a chapter that asks for every review again and again, the most words that one has."""
SHORTER = {  # in a chapter, code that takes long or needs five words, and what stands in for it
    "06": {
        "seen = (10, 100, 1_000, 10_000), []": "seen = (1, 2, 3, 4), []",
        "[[0, good, 0, 0, 0, 0]]": "[[0, good, 0, 0, 0]]",
    },
    "07": {"for seed in range(5)]": "for seed in range(2)]"},
    "08": {"for step in range(81):": "for step in range(3):"},
    "09": {
        "n_steps=20_000": "n_steps=200",
        "grid = torch.logspace(-2, 2, 2001)": "grid = torch.logspace(-2, 2, 99)",
    },
    "10": {  # `vmap` sees through what is pretended: scores of 0 in place of its own
        "parts = [of_all(named, x, written, mask) for x in reviews.prompts]": (
            "parts = [{k: w.new_zeros(len(mask), *w.shape) for k, w in named.items()}] * 4"
        ),
        "for k in range(11, 16)]": "for k in range(11, 13)]",
        "for rate in (1e-3, 3e-3):": "for rate in (3e-3,):",
        "climb(sorter, sort, maxrl, 50, g)": "climb(sorter, sort, maxrl, 2, g)",
        'largest_error(u, direction(weight_of_each(grpo, "per token")))': "",
    },
}


def chapters():
    """The chapters that have the line."""
    return [path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb")) if on_a_device(path)]


def on_a_device(path):
    return any(LINE in code for code in cells_of(path).values())


def cells_of(path):
    """Number and code of each cell that is run: not the bootstrap, and no exercise."""
    code = {
        n: "".join(cell["source"])
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"])
        if cell["cell_type"] == "code" and "remove-cell" not in cell["metadata"].get("tags", ())
    }
    return {n: source for n, source in code.items() if not re.search(r'^check\("', source, re.M)}


def reviews_of(n_words):
    """`tasks.micro_reviews`, of at most so many words."""
    completions = tasks.enumerate_completions(len(tasks.REVIEW_WORDS), n_words, 0)
    rewards = [tasks._sentiment(completions, extra) for extra in tasks._PROMPT_VALENCES]
    return tasks.Task(tasks.REVIEW_PROMPTS, tasks.REVIEW_WORDS, n_words, 0, torch.stack(rewards))


def demonstrations_of(n_words):
    """`tasks.micro_review_demonstrations`, cut to so many words."""
    whole = tasks.micro_review_demonstrations

    def cut(*arguments, **named):
        prompts, completions = whole(*arguments, **named)
        return prompts, completions[:, :n_words]

    return cut


def two_steps(fit):
    """A training loop that takes its first and its last step and repeats what it measured then.

    Pairs that it is given as data are cut. What takes 20 steps at most stays as it is.
    """

    def short_fit(*arguments, steps, progress=iter, **named):
        if steps <= 20:
            return fit(*arguments, steps=steps, progress=progress, **named)
        arguments = [
            tuple(rows[:2048] for rows in one) if isinstance(one, (tuple, list)) else one
            for one in arguments
        ]

        def first_and_last(numbers):
            for step in progress(numbers):
                if step in (numbers[0], numbers[-1]):
                    yield step

        history = fit(*arguments, steps=steps, progress=first_and_last, **named)
        return {name: seen[:1] + seen[-1:] * (steps - 1) for name, seen in history.items()}

    return short_fit


def shorten(monkeypatch, n_words):
    """Short trainings, reviews of so many words, and figures that are painted and not shown."""
    monkeypatch.setattr(tasks, "micro_reviews", partial(reviews_of, n_words))
    monkeypatch.setattr(tasks, "micro_review_demonstrations", demonstrations_of(n_words))
    for name in train.__all__:
        if name.startswith("fit_") and name != "fit_table":
            monkeypatch.setattr(train, name, two_steps(getattr(train, name)))
    for name in ("show", "save"):
        monkeypatch.setattr(plotting, name, lambda fig, *_, alt: plotting._png(fig))


@pytest.fixture
def default_dtype():
    """What a chapter sets is set back."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def test_these_chapters_choose_their_device_in_one_line():
    assert {path.name[:2] for path in chapters()} == WITH_THE_LINE


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # shorter reviews, odd curves
@pytest.mark.parametrize(
    "path",
    chapters(),
    ids=lambda path: path.name[:2],
)
def test_a_chapter_runs_on_another_device(path, monkeypatch, default_dtype):
    shorten(monkeypatch, WORDS.get(path.name[:2], 5))
    code, chapter = cells_of(path), {"__name__": "__main__"}
    for old, new in {
        LINE: LINE.replace('"cpu"', '"cuda"'),
        **SHORTER.get(path.name[:2], {}),
    }.items():
        places = [n for n, source in code.items() if old in source]
        assert len(places) == 1, f"change SHORTER: this stands in the cells {places}: {old}"
        code[places[0]] = code[places[0]].replace(old, new)
    with pretended_device():
        for n, source in code.items():
            name = f"{path.name}, cell [{n}]"
            linecache.cache[name] = len(source), None, source.splitlines(True), name
            exec(compile(source, name, "exec"), chapter)
    assert chapter["device"] == DEVICE
    assert any(isinstance(value, PretendedTensor) for value in chapter.values())

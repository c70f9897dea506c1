"""The explorer: one prompt whose β, rewards and reference can be moved, without a kernel.

What a notebook or a page holds is a table and a script that draws the explorer in its place; it
asks no host for anything. Where scripts do not run, the table stays.
"""

import html
import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Real

import torch
from torch import Tensor

from dpo_mini import closed_form
from dpo_mini._arguments import check_positive
from dpo_mini.progress import in_notebook
from dpo_mini.tasks import Task, bandit, four_answers, random_bandit, three_answers

__all__ = ["DIVERGENCES", "LOSSES", "Explorer", "course_instances"]

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
"""The penalties that the explorer knows, as in `losses.f_dpo_loss`."""

LOSSES = (
    "dpo_loss", "cdpo_loss", "rdpo_loss", "ipo_loss", "hinge_loss", "exo_loss", "discopop_loss",
    "f_dpo_loss", "nca_loss", "bco_loss", "sppo_loss", "apo_zero_loss", "apo_down_loss",
    "simpo_loss", "cpo_loss", "orpo_loss",
)  # fmt: skip
"""The losses of a pair that the explorer knows, by their names in `losses`."""

_Instance = dict[str, str | list[str] | list[float]]

_MOST_ANSWERS = 6
_HEADS = ("answer", "π_ref", "reward", "π*", "implied reward")


@dataclass(frozen=True)
class Explorer:
    """One prompt in a notebook: `Explorer(task).show()`, or a cell's last value.

    Everything below is where the explorer starts; the reader moves it from there.

    Args:
      task: with a reference as a table and 2 to 6 completions; its prompts head the list of
        instances. The course's four answers when left out.
      prompt: which of the task's prompts.
      beta: > 0, weight of the penalty, reward units per nat.
      divergence: of the penalty, one of `DIVERGENCES`.
      loss: of the pair, one of `LOSSES`.
      chosen, rejected: two columns of the task.
      towards_optimum: in [0, 2], the policy's place on the way from the reference, 0, to the
        optimum, 1: the exponent of their ratio.
    Raises:
      ValueError: one of these is not as above.
    """

    task: Task = field(default_factory=four_answers)
    prompt: int = 0
    beta: float = 0.5
    divergence: str = "reverse_kl"
    loss: str = "dpo_loss"
    chosen: int = 0
    rejected: int = 1
    towards_optimum: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise ValueError(f"`task` must be a Task, got {type(self.task).__name__}")
        _reference(self.task)
        size = self.task.rewards.shape[1]
        if not 2 <= size <= _MOST_ANSWERS:
            raise ValueError(f"`task` must have 2 to {_MOST_ANSWERS} completions, got {size}")
        check_positive("beta", self.beta)
        way = self.towards_optimum
        if isinstance(way, bool) or not isinstance(way, Real) or not 0 <= way <= 2:
            raise ValueError(f"`towards_optimum` must be a number from 0 to 2, got {way}")
        for name, names in {"divergence": DIVERGENCES, "loss": LOSSES}.items():
            if getattr(self, name) not in names:
                known = ", ".join(names)
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}")
        limits = {"prompt": len(self.task.prompt_texts), "chosen": size, "rejected": size}
        for name, limit in limits.items():
            got = getattr(self, name)
            if isinstance(got, bool) or not isinstance(got, int) or not 0 <= got < limit:
                raise ValueError(f"`{name}` must be a whole number in 0..{limit - 1}, got {got!r}")
        if self.chosen == self.rejected:
            raise ValueError(
                f"`rejected` must be another answer than `chosen`, got {self.rejected} twice"
            )

    def show(self) -> None:
        """Show it in a notebook, as a table where scripts do not run; elsewhere print `text()`."""
        if not in_notebook():
            print(self.text())
            return
        from IPython.display import display  # heavy, and only notebooks have it

        display(self._repr_mimebundle_(), raw=True)

    def html(self) -> str:
        """The explorer for a page: its table and its script, which asks no host for anything."""
        instances, place = self._instances()
        start = {
            "instance": place, "beta": self.beta, "shift": 0.0, "divergence": self.divergence,
            "alpha": 0.5, "way": self.towards_optimum, "chosen": self.chosen,
            "rejected": self.rejected, "loss": self.loss, "smoothing": 0.1, "gamma": 0.5,
        }  # fmt: skip
        given = html.escape(json.dumps({"instances": instances, "start": start}))
        script = _lines("explorer.js").replace('"explorer.css"', json.dumps(_lines("explorer.css")))
        return (
            f'<div data-dpo-explorer data-given="{given}">\n{self._table()}\n'
            f"<script>\n{script}</script>\n</div>"
        )

    def text(self) -> str:
        """Where the explorer starts, as text: the rows of its table."""
        table = [_HEADS, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in table]
        return "\n".join([self._caption(), *lines])

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": self.text()}

    def _tables(self) -> tuple[Tensor, Tensor]:
        """`(ref_logps, rewards)` of the prompt, `[1, Y]` each, float64."""
        here = slice(self.prompt, self.prompt + 1)
        ref_logps, rewards = _reference(self.task)[here], self.task.rewards[here]
        return ref_logps.detach().cpu().double(), rewards.detach().cpu().double()

    def _rows(self) -> list[tuple[str, ...]]:
        ref_logps, rewards = self._tables()
        best = closed_form.optimal_logps(ref_logps, rewards, float(self.beta))
        implied = closed_form.implied_rewards(best, ref_logps, float(self.beta))
        columns = torch.cat([ref_logps.exp(), rewards, best.exp(), implied])  # [4, Y]
        numbers = [[_decimals(value) for value in row] for row in columns.T.tolist()]
        return [(name, *row) for name, row in zip(_answers(self.task), numbers, strict=True)]

    def _caption(self) -> str:
        log_z = closed_form.log_partition(*self._tables(), float(self.beta)).item()
        worth = f"log Z = {_decimals(log_z)} nats, J(π*) = {_decimals(self.beta * log_z)}"
        return f"{self.task.prompt_texts[self.prompt]} at β = {self.beta:g}, reverse KL: {worth}"

    def _table(self) -> str:
        head = "".join(f"<th scope='col'>{name}</th>" for name in _HEADS)
        rows = [
            f"<tr><th scope='row'>{html.escape(name)}</th>"
            + "".join(f"<td>{number}</td>" for number in numbers)
            + "</tr>"
            for name, *numbers in self._rows()
        ]
        caption = f"<caption>{html.escape(self._caption())}</caption>"
        return f"<table>{caption}<tr>{head}</tr>\n" + "\n".join(rows) + "</table>"

    def _instances(self) -> tuple[list[_Instance], int]:
        """What can be loaded, the task's own prompts first, and which of it is `prompt`."""
        course = course_instances()
        titles = [f"prompt {text}" for text in self.task.prompt_texts]
        own = [_instance(title, self.task, x) for x, title in enumerate(titles)]
        for place, known in enumerate(course):
            if len(own) == 1 and {**own[0], "title": known["title"]} == known:
                return course, place
        return own + course, self.prompt


def course_instances() -> list[_Instance]:
    """The bandits of `tasks` with at most 6 answers, as the explorer reads them."""
    generator = torch.Generator().manual_seed(0)
    even = torch.full((1, 4), 0.25, dtype=torch.float64)
    tasks = {
        "the four answers of the course": four_answers(),
        "the three answers of the course": three_answers(),
        "a random bandit of five answers": random_bandit(1, 5, generator=generator),
        "four answers, all alike": bandit(torch.zeros_like(even), even),
    }
    return [_instance(title, task, 0) for title, task in tasks.items()]


def _lines(name: str) -> str:
    """A file of this folder without indents and lines of comment: every notebook holds a copy."""
    text = (files(__name__) / name).read_text(encoding="utf-8")
    return re.sub(r"^\s*(//.*\n\s*)*", "", text, flags=re.M)


def _instance(title: str, task: Task, prompt: int) -> _Instance:
    tables = {"reference": _reference(task)[prompt].exp(), "rewards": task.rewards[prompt]}
    # 12 digits: the last ones of a double differ between machines, and nbval compares this text.
    rounded = {
        name: [float(f"{value:.12g}") for value in table.detach().double().tolist()]
        for name, table in tables.items()
    }
    return {"title": title, "answers": _answers(task), **rounded}


def _reference(task: Task) -> Tensor:
    if task.ref_logps is None:
        raise ValueError("`task` must have a table ref_logps, got one without")
    return task.ref_logps


def _answers(task: Task) -> list[str]:
    return [task.text(completion) for completion in task.completions]


def _decimals(value: float) -> str:
    """Four decimals, never -0.0000."""
    return f"{round(value, 4) + 0.0:.4f}"


def __dir__() -> list[str]:
    return __all__

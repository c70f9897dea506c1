"""Ratings as tensors, and in the batches of training: beside each answer that of another row."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from dpo_mini._arguments import as_bool_mask, check_integers, check_rows
from dpo_mini.logps import PAD
from dpo_mini.policies import Scorer
from dpo_mini.train import Pairs
from dpo_mini.train.pair_losses import check_pairs

Ratings = tuple[Tensor, Tensor, Tensor]
"""`(prompts [n, P], completions [n, T], labels [n])`, a label true where the answer was liked."""


def is_rated(data: object) -> bool:
    """Whether these are tensors of ratings, and not of pairs: labels have one dimension."""
    return isinstance(data, tuple) and len(data) == 3 and data[2].dim() == 1


def check_data(data: Pairs | Ratings) -> None:
    """Refuse tensors of pairs, or of ratings, that do not belong together."""
    if not is_rated(data):
        check_pairs(data)
        return
    prompts, completions, labels = data
    check_rows("prompts", prompts, completions=completions, labels=labels)
    check_integers("completions", completions, "[n, T]")
    as_bool_mask("labels", labels, labels.shape)


@dataclass(frozen=True, eq=False)
class RatedBatches:
    """The rows of all batches one after another: a prompt, its own answer, and another row's.

    Args:
      ratings: `(prompts [n, P], completions [n, T], labels [n])`.
      batches: `[steps, B]`; row `step * B + place` of this is the row at that place.
      name: of the argument that they are, for messages of errors.
    Raises:
      ValueError: rows that differ in number, or a batch with one prompt alone: without another
        answer its z_0 would be the log-ratio of the answer itself.
    """

    ratings: Ratings
    batches: Tensor
    name: str = "batches"

    def __post_init__(self) -> None:  # noqa: D105
        check_data(self.ratings)
        prompts = torch.unique(self.ratings[0], dim=0, return_inverse=True)[1][self.batches]
        alone = (prompts == prompts[:, :1]).all(1)
        if alone.any():
            step, size = int(alone.nonzero()[0]), self.batches.shape[1]
            got = "one row" if size == 1 else f"{size} rows of one prompt"
            raise ValueError(
                f"`{self.name}` must have two prompts in each batch, since KTO takes its z_0 from "
                f"answers to other prompts, got {got} in batch {step}"
            )

    def __len__(self) -> int:  # noqa: D105
        return self.batches.numel()

    @property
    def steps(self) -> Tensor:
        """`[steps, B]`, the rows of this in each batch."""
        return torch.arange(len(self)).view(self.batches.shape)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows of the ratings: those of the batches, and the one before each in its batch."""
        return self.batches.flatten().cpu(), self.batches.roll(1, dims=1).flatten().cpu()

    def labels(self, rows: Tensor) -> Tensor:
        """Whether the answers were liked, `[B]`."""
        return self.ratings[2][self.rows[0][rows]]

    def own(self, model: Scorer, rows: Tensor, reduce: "Reduce", precision: "Precision") -> Tensor:
        """Of each prompt's own answer, `[B]`, in one pass."""
        return self._logps(model, rows, self.rows[0], reduce, precision)

    def other(
        self, model: Scorer, rows: Tensor, reduce: "Reduce", precision: "Precision"
    ) -> Tensor:
        """Of the answer of the row before in the batch, for the first the last; `[B]`, one pass.

        It is cut off where prompt and answer would be longer than the longest of the ratings.
        """
        return self._logps(model, rows, self.rows[1], reduce, precision)

    @cached_property
    def _longest(self) -> int:
        """The most tokens of a prompt and its own answer."""
        prompts, completions, _ = self.ratings
        return int(((prompts != PAD).sum(1) + (completions != PAD).sum(1)).max())

    def _logps(
        self,
        model: Scorer,
        rows: Tensor,
        answered: Tensor,
        reduce: "Reduce",
        precision: "Precision",
    ) -> Tensor:
        prompts, answers = self.ratings[0][self.rows[0][rows]], self.ratings[1][answered[rows]]
        room = self._longest - (prompts != PAD).sum(1, keepdim=True)
        answers = answers.masked_fill(torch.arange(answers.shape[1]) >= room, PAD)
        device = next(iter(model.parameters())).device
        with precision(device.type):
            scored = model.token_logps(prompts.to(device), answers.to(device))
        return reduce(scored, (answers != PAD).to(device))


Reduce: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Precision: TypeAlias = Callable[[str], AbstractContextManager[object]]

"""Held-out rows that a run looks at while it trains: the best weights, and when to stop."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpo_mini._arguments import check_at_most_0, check_count, check_rows
from dpo_mini.policies import Scorer
from dpo_mini.real.checkpoints import save_tensors
from dpo_mini.real.digests import reference_digest, tensor_digest
from dpo_mini.real.models import CausalLMPolicy
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.processes import OneProcess
from dpo_mini.real.ratings import RatedBatches, Ratings, check_data, is_rated
from dpo_mini.real.scoring import Data, Scores, count_rows, longest_answer, passes_of, reshard
from dpo_mini.train import History, Pairs

if TYPE_CHECKING:
    from accelerate import Accelerator

BEST = "best.safetensors"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out pairs, or ratings, that a run looks at while it trains, without a gradient.

    They are read before the first step, before every `every`-th one, and after the last. Training
    ends with the same bits as without them, unless they stop it.

    Args:
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])` as `encode` gives them; for
        `train_ratings` ratings, as it gives them, which are one batch: all have the same z_0.
      reference: of these pairs: what `reference_logps` gave for them, without `batches`; or a model
        that is read beside the policy; or scores of your own, chosen and rejected `[n]`.
      every: steps from one evaluation to the next.
      patience: the run stops after so many evaluations in a row whose loss is not below the lowest
        before them. By default it never does.
      best: a folder for the trained weights of the lowest loss, which `load_best` reads. They are
        an adapter's alone where only that is trained. Weights of an earlier run are written over.
      report: called with the step and the numbers after each evaluation, in the main process, such
        as to print them with `sample_answer` of three prompts. There the policy may be read, but
        where its weights lie in shards (FSDP). A run that goes on from a checkpoint reports what
        came after it.
    Raises:
      ValueError: rows that differ in number, a log-probability above 0, or a number below 1.
    """

    pairs: Pairs | Ratings = field(repr=False)
    reference: Scores | Scorer = field(repr=False)
    every: int = 100
    patience: int | None = None
    best: AnyPath | None = None
    report: Callable[[int, Mapping[str, float]], None] | None = None

    def __post_init__(self) -> None:  # noqa: D105
        check_data(self.pairs)
        check_reference(self.reference, self.data())
        check_count("every", self.every)
        if self.patience is not None:
            check_count("patience", self.patience)

    def data(self) -> Data:
        """What the loop reads: of ratings one batch."""
        if is_rated(self.pairs):
            return RatedBatches(self.pairs, torch.arange(len(self.pairs[0]))[None], "pairs")
        return self.pairs

    def settings(self) -> dict[str, object]:
        """What a run that goes on must have in common with the one that stopped."""
        names = ("prompts", "chosen", "rejected")
        data = tensor_digest(zip(names, self.pairs, strict=True))
        return {"data": data, "reference": reference_digest(self.reference), "every": self.every}


def load_best(policy: CausalLMPolicy, folder: AnyPath) -> dict[str, float]:
    """Put the weights of the lowest held-out loss into a policy, in place, in every process.

    Args:
      policy: the one that was trained, or one that is made as it was: with the same adapter.
      folder: the `best` of `Evaluation`.
    Returns:
      `{"step", "eval_loss"}` of these weights.
    Raises:
      ValueError: the folder has none, they are not as they were written, or they are those of
        another model.
    """
    path = Path(folder) / BEST
    model: nn.Module = policy.model
    if isinstance(model, DistributedDataParallel):
        model = model.module
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        result = {"step": int(found["step"]), "eval_loss": float(found["eval_loss"])}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            "`folder` must have the weights that Evaluation(best=folder) keeps, got "
            f"{path}, which is missing, cut off or another file ({error})"
        ) from None
    weights = dict(model.named_parameters())
    for name, tensor in saved.items():
        if name not in weights or weights[name].shape != tensor.shape:
            have = list(weights[name].shape) if name in weights else "none"
            raise ValueError(
                f"`policy` must be made as the one that was trained, got {name} of shape {have} "
                f"where {path} has {list(tensor.shape)}"
            )
    if _digest_of_others(model, saved) != found.get("others"):
        raise ValueError(
            "`policy` must be made as the one that was trained, got other weights beside the "
            f"{len(saved)} that {path} has"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            weights[name].copy_(tensor)
    return result


# --- for the loop ----------------------------------------------------------------------------


class ReadRows(Protocol):
    """From rows of a batch to the loss of each, with its gradient, and some numbers of each."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics of a batch."""

    def begin(
        self, batch: Tensor, passes: Iterable[Tensor], accelerator: "Accelerator | OneProcess"
    ) -> None:
        """Before the first pass over a batch, whose rows of this process are in `passes`."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The losses, `[B]`, and numbers without gradient, `[B]` each."""

    def metrics(self, means: Sequence[float]) -> dict[str, float]:
        """From the mean of each number over a batch to the metrics."""


@dataclass(frozen=True, eq=False)
class Evaluator:
    """The evaluations of one run; none where `evaluation` is None. All it knows is the history.

    Args:
      read: of held-out rows; each process reads its share, in equal numbers of passes.
      micro_batch_size: rows per pass.
      trained: the weights to keep.
    """

    evaluation: Evaluation | None
    read: ReadRows | None
    micro_batch_size: int
    accelerator: "Accelerator | OneProcess"
    policy: CausalLMPolicy
    trained: Mapping[str, nn.Parameter]
    steps: int

    def at(self, step: int, history: History) -> dict[str, float]:
        """What there is to say at a step, which the history has then too."""
        if self.evaluation is None or self.read is None:
            return {}
        names = [f"eval_{name}" for name in self.read.names]
        if history.get("eval_step", [])[-1:] == [step]:  # of the run that this one goes on
            return {name: history[name][-1] for name in names}
        if step % self.evaluation.every and step != self.steps:
            return {}
        means = self.read.metrics(self._means(self.evaluation, self.read))
        metrics = {f"eval_{name}": value for name, value in means.items()}
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise ValueError(f"`evaluation` must have a finite loss, got {loss} at step {step}")
        lowest = min(history.get("eval_loss", ()), default=math.inf)
        for name, value in {"eval_step": step, **metrics}.items():
            history.setdefault(name, []).append(value)
        if self.accelerator.is_main_process:
            if loss < lowest and self.evaluation.best is not None:
                self._save_best(Path(self.evaluation.best), step, loss)
            self._report(self.evaluation, step, metrics)
        self.accelerator.wait_for_everyone()
        return metrics

    def is_over(self, history: History) -> bool:
        """Whether the loss has not become lower for too long."""
        losses = history.get("eval_loss", [])
        if self.evaluation is None or self.evaluation.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.evaluation.patience

    def _means(self, evaluation: Evaluation, read: ReadRows) -> list[float]:
        """Of every number over all rows, to the last bit the same in all processes."""
        n_rows = len(evaluation.pairs[0])
        all_passes = evaluation_passes(n_rows, self.micro_batch_size, self.accelerator)
        passes = [rows[rows >= 0] for rows in all_passes[:, self.accelerator.process_index]]
        read.begin(torch.arange(n_rows), passes, self.accelerator)
        values = torch.empty(0)
        with torch.no_grad():
            for number, rows in enumerate(passes):
                # A model in shards is read by all processes at once: one without rows reads along.
                _, seen = read(rows if len(rows) else torch.tensor([0]))
                if number == 0:
                    values = seen[0].new_zeros(len(seen), n_rows)
                values[:, rows.to(values.device)] = torch.stack([*seen])[:, : len(rows)]
        reshard(self.policy)
        values = self.accelerator.reduce(values, "sum").cpu()  # x + 0 is x
        return values.double().mean(1).tolist()

    @cached_property
    def _digest_of_others(self) -> str:
        """Once: they are not trained."""
        model = self.accelerator.unwrap_model(self.policy.model)
        return _digest_of_others(model, self.trained)

    def _report(self, evaluation: Evaluation, step: int, metrics: Mapping[str, float]) -> None:
        """Lets it read the model that is inside: what is around it waits for other processes."""
        if evaluation.report is None:
            return
        wrapped = self.policy.model
        self.policy.model = self.accelerator.unwrap_model(wrapped)
        try:
            evaluation.report(step, metrics)
        finally:
            self.policy.model = wrapped

    def _save_best(self, folder: Path, step: int, loss: float) -> None:
        """In the place of what is there. What a killed run left half written is written over."""
        found = {"step": str(step), "eval_loss": repr(loss), "others": self._digest_of_others}
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{BEST}.part"
        try:
            save_tensors(self.trained, partial, found)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, folder / BEST)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(f"{folder / BEST} could not be written: {error}") from error


def evaluation_passes(
    n_rows: int, micro_batch_size: int, accelerator: "Accelerator | OneProcess"
) -> Tensor:
    """Those of `reference_logps` without `batches`, `[passes, processes, M]`, -1 where none."""
    rows = torch.arange(n_rows)[None]
    return passes_of(rows, micro_batch_size, accelerator.num_processes)


def check_reference(reference: Scores | Scorer, data: Data) -> None:
    """Refuse scores that are not two log-probabilities per row."""
    if not isinstance(reference, tuple):
        return
    if len(reference) != 2:
        raise ValueError(f"`reference` must be (chosen, rejected), got {len(reference)} tensors")
    like = "batches" if isinstance(data, RatedBatches) else "pairs"
    for scores in reference:
        check_rows(like, torch.empty(count_rows(data)), reference=scores)
        check_at_most_0("reference", scores, n_tokens=longest_answer(data))


def _digest_of_others(model: nn.Module, kept: Mapping[str, object]) -> str:
    """Of the weights that are not kept: those that an adapter belongs to."""
    return tensor_digest((n, weight) for n, weight in model.named_parameters() if n not in kept)

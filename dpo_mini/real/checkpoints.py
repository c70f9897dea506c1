"""Checkpoints of a training run: whole folders that a run which was killed goes on from."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_mini._files import whole_folder
from dpo_mini.real.preferences import AnyPath
from dpo_mini.train import History


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that decides how a run goes on.

    Args:
      step: steps that are done.
      weights: those that are trained, by name.
      optimizer: its state, as in `state_dict()["state"]`: tensors and numbers of each parameter.
      settings: of optimizer and loss, compared by `check_same_run`; JSON can hold them.
      batches: `[steps, B]`, the order of the data.
      generator_state: of `torch.Generator.get_state`, or None.
      history: what was measured so far.
    """

    step: int
    weights: Mapping[str, Tensor] = field(repr=False)
    optimizer: Mapping[int, Mapping[str, Tensor | float]] = field(repr=False)
    settings: Mapping[str, object]
    batches: Tensor = field(repr=False)
    generator_state: Tensor | None = field(repr=False)
    history: History = field(repr=False)

    def check_same_run(
        self,
        weights: Mapping[str, Tensor],
        settings: Mapping[str, object],
        batches: Tensor,
        generator: torch.Generator | None,
    ) -> None:
        """Refuse to go on as another run: other `weights`, `settings`, `batches` or `generator`."""
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != {name: weight.shape for name, weight in self.weights.items()}:
            raise ValueError("`checkpoints` must be this run's or none, got another model's")
        given, saved = (json.loads(json.dumps(s)) for s in (settings, self.settings))
        if given != saved:
            raise ValueError(
                f"`checkpoints` must be this run's, {given}, or none, got those of a run with "
                f"{saved}"
            )
        if not torch.equal(batches, self.batches):
            raise ValueError("`checkpoints` must be this run's or none, got those of other batches")
        if (generator is None) != (self.generator_state is None):
            got, want = ("none", "given") if generator is None else ("one", "None")
            raise ValueError(
                f"`generator` must be {want} as in the run that wrote the checkpoints, got {got}"
            )


def save_checkpoint(folder: AnyPath, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a folder, whole or not at all, in the place of older ones.

    Weights, optimizer and data are safetensors and JSON: nothing that is read back can run.

    Raises:
      TypeError: an optimizer whose state is neither tensors nor numbers.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for index, state in checkpoint.optimizer.items():
        for name, value in state.items():
            if not isinstance(value, Tensor | int | float):
                got = f"{type(value).__name__} as {name!r}"
                raise TypeError(f"`optimizer` must have tensors and numbers as state, got {got}")
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers[f"{index}.{name}"] = value
    data = {"batches": checkpoint.batches}
    if checkpoint.generator_state is not None:
        data["generator_state"] = checkpoint.generator_state
    rest = {
        "step": checkpoint.step,
        "settings": checkpoint.settings,
        "optimizer": numbers,
        "history": checkpoint.history,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    older = _finished(folder)
    with whole_folder(folder / f"step-{checkpoint.step:08d}") as new:
        _save(checkpoint.weights, new / "weights.safetensors")
        _save(tensors, new / "optimizer.safetensors")
        _save(data, new / "data.safetensors")
        (new / "run.json").write_text(json.dumps(rest), encoding="utf-8")
    for path in older:  # only now: there was one at every moment
        shutil.rmtree(path)


def load_checkpoint(folder: AnyPath) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, on the CPU, or None where there is none yet."""
    folder = Path(folder)
    finished = _finished(folder)
    if not finished:
        return None
    newest = finished[-1]
    rest = json.loads((newest / "run.json").read_text(encoding="utf-8"))
    data = load_file(newest / "data.safetensors")
    optimizer: dict[int, dict[str, Tensor | float]] = {}
    for key, value in (load_file(newest / "optimizer.safetensors") | rest["optimizer"]).items():
        index, _, name = key.partition(".")
        optimizer.setdefault(int(index), {})[name] = value
    return Checkpoint(
        step=rest["step"],
        weights=load_file(newest / "weights.safetensors"),
        optimizer=optimizer,
        settings=rest["settings"],
        batches=data["batches"],
        generator_state=data.get("generator_state"),
        history=rest["history"],
    )


# --- private functions -----------------------------------------------------------------------


def _finished(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last; one that was being written has another name."""
    return sorted(folder.glob("step-*"))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # A copy each: safetensors holds no two tensors in one memory.
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, path)

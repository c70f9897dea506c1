"""Checkpoints of a training run: whole folders that a run which was killed goes on from."""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dpo_mini._files import whole_folder
from dpo_mini.policies import Scorer
from dpo_mini.real.digests import model_digest, reference_digest, tensor_digest
from dpo_mini.real.locks import locked
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.schedules import Schedule
from dpo_mini.real.scoring import Precision, Reduce, Scores, function_name
from dpo_mini.train import History, Pairs

TENSORS = ("weights", "optimizer", "data")
FILES = {"run.json", *(f"{name}.safetensors" for name in TENSORS)}
FORMAT = b'{"format": "dpo_mini checkpoint 1", '
"""What a run.json of ours begins with."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that decides how a run goes on.

    Args:
      step: steps that are done.
      weights: those that are trained, by name.
      optimizer: its state, as in `state_dict()["state"]`: tensors and numbers of each parameter.
      settings: of model, data, reference, loss and optimizer, compared by `check_same_run`; JSON
        can hold them.
      batches: `[steps, B]`, the order of the data.
      generator_state: of `torch.Generator.get_state`, or None.
      history: what was measured so far.
    """

    step: int
    weights: Mapping[str, Tensor] = field(repr=False)
    optimizer: Mapping[int, Mapping[str, Tensor | float]] = field(repr=False)
    settings: Mapping[str, object] = field(repr=False)
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
        """Refuse to go on as another run: other `weights`, `settings`, `batches` or `generator`.

        A run that is finished may go on with more steps, whose first batches are those that it had.
        Its schedule may then be another.

        Raises:
          ValueError: something differs; all that does is named.
        """
        extended = self.step == len(self.batches) < len(batches)
        found = _differences(self.settings, settings)
        shapes, own = ({n: w.shape for n, w in held.items()} for held in (weights, self.weights))
        if shapes != own and ANOTHER["model"] not in found:
            found.insert(0, ANOTHER["model"])
        found += _differences_of_batches(self.batches, batches, extended)
        kinds = ["none" if given is None else "one" for given in (self.generator_state, generator)]
        if kinds[0] != kinds[1]:
            found.append(f"generator {kinds[0]} (now {kinds[1]})")
        if found:
            *most, last = found
            got = f"{', '.join(most)} and {last}" if most else last
            raise ValueError(
                f"`checkpoints` must be this run's or none, got those of a run with {got} "
                "(start it as that run was started, its model as it was before training, or give "
                "another folder)"
            )


def save_checkpoint(folder: AnyPath, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into a folder, whole or not at all, in the place of older ones.

    Weights, optimizer and data are safetensors and JSON: nothing that is read back can run. What
    `save_checkpoint` did not write stays where it is.

    Raises:
      TypeError: an optimizer whose state is neither tensors nor numbers.
      OSError: the folder cannot be written, the disk is full, or the checkpoint is there already.
        Older checkpoints are as they were then.
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
    content = FORMAT + json.dumps(rest).encode()[1:]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(folder)
    older = _ours(folder)
    path = folder / f"step-{checkpoint.step:08d}"
    try:
        with whole_folder(path) as new:
            for name, held in zip(TENSORS, (checkpoint.weights, tensors, data), strict=True):
                seal = {"seal": _seal(name, content)}
                save_tensors(held, new / f"{name}.safetensors", seal)
            (new / "run.json").write_bytes(content)
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written, older checkpoints stay: {error}") from error
    _remove(older)  # only now: there was one at every moment


def load_checkpoint(folder: AnyPath) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, on the CPU, or None where there is none yet.

    Raises:
      ValueError: the newest is not as it was written: a file is missing, cut off, changed or of
        another checkpoint; or an earlier version wrote it.
    """
    return load_newest("folder", folder)


def load_newest(name: str, folder: AnyPath) -> Checkpoint | None:
    """`load_checkpoint` of the argument called `name`."""
    finished = _step_folders(Path(folder))
    if not finished:
        return None
    *earlier, newest = finished
    try:
        content = _read(newest / "run.json")
        tensors, optimizer_tensors, data = (
            _load(newest / f"{file}.safetensors", _seal(file, content)) for file in TENSORS
        )
    except _BrokenError as error:
        ours = [path.name for path in _ours(Path(folder)) if path in earlier]
        to = f"go on from {ours[-1]}" if ours else "start anew"
        raise ValueError(
            f"`{name}` must have a whole checkpoint as its newest, got {error} (move "
            f"{newest.name} to another place to {to})"
        ) from None
    rest = json.loads(content)
    optimizer: dict[int, dict[str, Tensor | float]] = {}
    for key, value in (optimizer_tensors | rest["optimizer"]).items():
        index, _, of = key.partition(".")
        optimizer.setdefault(int(index), {})[of] = value
    return Checkpoint(
        step=rest["step"],
        weights=tensors,
        optimizer=optimizer,
        settings=rest["settings"],
        batches=data["batches"],
        generator_state=data.get("generator_state"),
        history=rest["history"],
    )


# --- for the loop ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunCheckpoints:
    """The checkpoints of one run; none where `folder` is None."""

    folder: AnyPath | None
    every: int
    trained: Mapping[str, nn.Parameter]
    settings: Mapping[str, object]
    batches: Tensor
    generator: torch.Generator | None

    @contextmanager
    def locked(self, is_main_process: bool) -> Iterator[None]:
        """Keeps other runs out. One of several processes does."""
        if self.folder is None or not is_main_process:
            yield
        else:
            with locked("checkpoints", self.folder):
                yield

    def go_on(self, optimizer: Optimizer) -> tuple[int, History]:
        """Puts the newest into model, optimizer and generator: steps done, and their history."""
        saved = None if self.folder is None else load_newest("checkpoints", self.folder)
        if saved is None:
            return 0, {}
        saved.check_same_run(self.trained, self.settings, self.batches, self.generator)
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(saved.weights[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
        if self.generator is not None and saved.generator_state is not None:  # both or none
            self.generator.set_state(saved.generator_state)
        return saved.step, saved.history

    def remove_older(self, done: int) -> None:
        """Removes what a run that was killed while it wrote the newest did not come to remove."""
        if self.folder is not None and done:
            folder = Path(self.folder)
            _remove_unfinished(folder)
            _remove([path for path in _ours(folder) if path.name != f"step-{done:08d}"])

    def save(self, done: int, optimizer: Optimizer, history: History, *, last: bool) -> None:
        """Writes one where it is time for it: after every so many steps, and after the last."""
        if self.folder is None or (done % self.every and not last):
            return
        state = None if self.generator is None else self.generator.get_state()
        moments = optimizer.state_dict()["state"]
        save_checkpoint(
            self.folder,
            Checkpoint(done, self.trained, moments, self.settings, self.batches, state, history),
        )


def run_settings(
    model: nn.Module,
    reference: Scores | Scorer,
    pairs: Pairs,
    loss: Callable[..., Tensor],
    optimizer: Optimizer,
    schedule: Schedule,
    steps: int,
    reduce: Reduce,
    precision: Precision,
    evaluation: Mapping[str, object] | None,
    **numbers: float,
) -> dict[str, object]:
    """What a run that goes on must have in common with the one that stopped, as JSON has it.

    Model, data and reference are digests, about a second per GB; the rest is as it is.
    """
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    settings = {
        "model": model_digest(model),
        "data": tensor_digest(zip(("prompts", "chosen", "rejected"), pairs, strict=True)),
        "reference": reference_digest(reference),
        "loss": _name_of_loss(loss),
        "reduce": function_name(reduce),
        "precision": function_name(precision),
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "schedule": [float(schedule(step)) for step in range(steps)],
        **numbers,
    }
    if evaluation is not None:
        settings["evaluation"] = evaluation
    plain: dict[str, object] = json.loads(json.dumps(settings, default=_plain))
    return plain


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes them from a copy each: safetensors holds no two tensors in one memory."""
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    save_file(copies, path, metadata=metadata)


# --- private functions -----------------------------------------------------------------------


class _BrokenError(Exception):
    """A file of a checkpoint is not what was written: which, and what is wrong with it."""


ANOTHER = {"model": "another model", "data": "other data", "reference": "another reference"}


def _differences(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs, in words: "beta 0.1 (now 0.2)"."""
    saved, now = (json.loads(json.dumps(settings)) for settings in (saved, now))
    found = []
    for name in dict.fromkeys([*ANOTHER, *saved, *now]):
        old, new = saved.get(name), now.get(name)
        if old == new:
            continue
        if name in ANOTHER:
            found.append(ANOTHER[name])
        elif name == "schedule" and isinstance(old, list) and isinstance(new, list):
            found += _differences_of_schedules(old, new)
        elif name == "evaluation":
            found += _differences_of_evaluations(old, new)
        elif name == "groups" and isinstance(old, list) and isinstance(new, list):
            found += _differences_of_groups(old, new)
        else:
            found.append(f"{name} {old} (now {new})")
    return found


def _differences_of_schedules(old: list[float], new: list[float]) -> list[str]:
    if len(old) != len(new):  # a schedule of other steps, which are named if they are refused
        return []
    for step, (before, after) in enumerate(zip(old, new, strict=True)):
        # Not to the last bit: the cosine of another machine may have another.
        if not math.isclose(before, after, rel_tol=1e-9, abs_tol=1e-12):
            return [f"a schedule that gives {before:.6g} at step {step} (now {after:.6g})"]
    return []


def _differences_of_groups(old: list[dict[str, object]], new: list[dict[str, object]]) -> list[str]:
    if len(old) != len(new):
        return [f"{len(old)} groups of the optimizer (now {len(new)})"]
    found = []
    for n, (before, after) in enumerate(zip(old, new, strict=True)):
        of = f" of group {n}" if len(old) > 1 else ""
        both = [name for name in before if name in after]  # a newer torch may know more
        found += [
            f"{name} {before[name]}{of} (now {after[name]})"
            for name in both
            if before[name] != after[name]
        ]
    return found


def _differences_of_evaluations(old: object, new: object) -> list[str]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [f"{'no' if old is None else 'an'} evaluation (now {'one' if new else 'none'})"]
    names = {"data": "other held-out pairs", "reference": "another reference of held-out pairs"}
    found = [says for name, says in names.items() if old[name] != new[name]]
    if old["every"] != new["every"]:
        found.append(f"an evaluation every {old['every']} steps (now {new['every']})")
    return found


def _differences_of_batches(old: Tensor, new: Tensor, extended: bool) -> list[str]:
    found = []
    if len(old) != len(new) and not extended:
        found.append(f"{len(old)} steps (now {len(new)})")
    if old.shape[1:] != new.shape[1:]:
        found.append(f"batches of {old.shape[1]} pairs (now {new.shape[1]})")
    elif not torch.equal(*(batches[: min(len(old), len(new))] for batches in (old, new))):
        found.append("other batches")
    return found


def _name_of_loss(loss: Callable[..., Tensor]) -> str:
    """`cdpo_loss(label_smoothing=0.1)`: all of a loss that can be compared."""
    if hasattr(loss, "without_reference"):
        return f"without_reference({_name_of_loss(loss.without_reference)})"
    if isinstance(loss, partial):
        given = [*map(repr, loss.args), *(f"{k}={v!r}" for k, v in sorted(loss.keywords.items()))]
        return re.sub(" at 0x[0-9a-f]+", "", f"{_name_of_loss(loss.func)}({', '.join(given)})")
    return str(getattr(loss, "__name__", type(loss).__name__))


def _plain(value: object) -> object:
    """What JSON has no word for: a learning rate in a tensor, or an object by its type's name."""
    return value.tolist() if isinstance(value, Tensor) else type(value).__name__


def _step_folders(folder: Path) -> list[Path]:
    """Those that have a checkpoint's name, the newest last."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(named, key=lambda path: (int(path.name[5:]), path.name))


def _ours(folder: Path) -> list[Path]:
    """Those that `save_checkpoint` wrote, and nobody put something into, the newest last."""
    return [path for path in _step_folders(folder) if _is_ours(path)]


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir() or set(os.listdir(path)) != FILES:
        return False
    if not all((path / name).is_file() for name in FILES):
        return False
    with open(path / "run.json", "rb") as file:
        return file.read(len(FORMAT)) == FORMAT


def _remove(checkpoints: list[Path]) -> None:
    for path in checkpoints:
        gone = path.with_name(f".{path.name}.removing.part")  # at once: no half of one stays
        os.rename(path, gone)
        shutil.rmtree(gone)


def _remove_unfinished(folder: Path) -> None:
    """Removes what `save_checkpoint` was writing, or removing, when its process was killed."""
    for path in folder.iterdir():
        named = re.fullmatch(r"\.step-\d{8,}\.[a-z0-9_]{8}\.part", path.name)
        if named and path.is_dir() and not path.is_symlink() and FILES.issuperset(os.listdir(path)):
            shutil.rmtree(path)


def _seal(name: str, content: bytes) -> str:
    """What binds a file of tensors to the run.json beside it."""
    return f"{name} of {hashlib.sha256(content).hexdigest()}"


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _BrokenError(f"{path}, which is missing") from None
    if content.startswith(b'{"step": '):
        raise _BrokenError(f"{path.parent}, which an earlier version of dpo_mini wrote")
    if not content.startswith(FORMAT):
        raise _BrokenError(f"{path}, which is cut off or no checkpoint's")
    return content


def _load(path: Path, seal: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise _BrokenError(f"{path}, which is missing")
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("seal") != seal:
                raise _BrokenError(f"{path}, which is not of the run.json that is beside it now")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _BrokenError(f"{path}, which is cut off or changed ({error})") from None

"""Runs and their folders: checkpoints of other runs, broken files, two runs at once, full disks."""

import copy
import csv
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_real_training import (
    END,
    PAIRS,
    REAL_FILE,
    ROOT,
    Stopped,
    adamw,
    environment,
    example,
    gpt2,
    in_order,
    needs_accelerate,
    needs_peft,
    on_the_cpu,
    seeded,
    stop_at,
    written_in,
)
from torch.testing import assert_close

from dpo_mini import real
from dpo_mini.logps import mean_over_tokens
from dpo_mini.losses import cdpo_loss, dpo_loss, ipo_loss
from dpo_mini.real import CausalLMPolicy, logs, train_preferences
from dpo_mini.real.digests import tensor_digest

__all__ = ["on_the_cpu"]  # a fixture

NAMES = ("weights.safetensors", "optimizer.safetensors", "data.safetensors", "run.json")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return real.encode(PAIRS, tokenizer, max_tokens=64)


@pytest.fixture
def policy(tokenizer):
    return CausalLMPolicy(gpt2(tokenizer), end_token=END)


@pytest.fixture
def scored(policy, pairs):
    return real.reference_logps(policy, pairs)


def train(policy, reference, pairs, **changes):
    """Pair by pair: then the reference is the same to the last bit in whatever order it is read."""
    settings = dict(beta=0.1, batches=in_order(12, 4), micro_batch_size=1)
    settings |= {"optimizer": adamw(policy)} | changes
    return train_preferences(policy, reference, pairs, dpo_loss, **settings)


def small(step=1, **changes):
    """A checkpoint of next to nothing."""
    given = real.Checkpoint(
        step=step,
        weights={"w": torch.full((2,), float(step))},
        optimizer={0: {"step": torch.tensor(float(step)), "rate": 0.5}},
        settings={"beta": 0.1},
        batches=torch.zeros(4, 1, dtype=torch.int64),
        generator_state=None,
        history={"loss": [0.5] * step},
    )
    return replace(given, **changes)


def foreign(folder, inside="model.pth"):
    folder.mkdir(parents=True)
    (folder / inside).write_text("somebody's")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what is removed -----------------------------------------------------------------------------


def test_a_checkpoint_removes_only_those_that_were_written_before_it(tmp_path):
    foreign(tmp_path / "step-by-step-notes", "chapter.txt")
    foreign(tmp_path / "step-00001000")
    foreign(tmp_path / ".draft.part", "mine.txt")
    foreign(tmp_path / ".step-00000001.backup_1.part", "mine.txt")
    foreign(tmp_path / ".step-1.abcdefgh.part", "run.json")
    for name in NAMES:  # of an earlier version, or of another program
        (tmp_path / "step-00000000").mkdir(exist_ok=True)
        (tmp_path / "step-00000000" / name).write_text('{"step": 0}')
    theirs = contents(tmp_path)
    real.save_checkpoint(tmp_path, small(1))
    real.save_checkpoint(tmp_path, small(2))
    (tmp_path / "step-00000002" / "notes.txt").write_text("the best so far")
    theirs |= contents(tmp_path)  # a folder that somebody wrote into is somebody's
    real.save_checkpoint(tmp_path, small(3))
    for path in contents(tmp_path / "step-00000003"):
        path.unlink()
    assert contents(tmp_path) == theirs


def test_what_a_killed_process_was_writing_or_removing_is_removed(tmp_path, monkeypatch):
    left = tmp_path / ".step-00000007.a1b2c3d_.part"
    foreign(left, "weights.safetensors")
    (tmp_path / ".step-00000008.abcdefgh.part").mkdir()
    real.save_checkpoint(tmp_path, small(1))
    assert written_in(tmp_path) == ["step-00000001"]

    def die(path):
        (path / "run.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dpo_mini.real.checkpoints.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            real.save_checkpoint(tmp_path, small(2))
    # Half of the older is no checkpoint any more, and the newer is the one.
    assert [name for name in written_in(tmp_path) if not name.startswith(".")] == ["step-00000002"]
    assert len(written_in(tmp_path)) == 2
    assert real.load_checkpoint(tmp_path).step == 2
    real.save_checkpoint(tmp_path, small(3))
    assert written_in(tmp_path) == ["step-00000003"]


def test_what_a_killed_run_left_is_removed_by_one_that_has_no_step_to_take(
    policy, scored, pairs, tmp_path
):
    folder, earlier = tmp_path / "run", tmp_path / "earlier"
    begin(policy, scored, pairs, earlier)
    train(copy.deepcopy(policy), scored, pairs, checkpoints=folder)
    (earlier / "step-00000002").rename(folder / "step-00000002")
    foreign(folder / ".step-00000001.removing.part", "run.json")
    foreign(folder / "step-00000001")
    train(policy, scored, pairs, checkpoints=folder)
    assert written_in(folder) == ["step-00000001", "step-00000003"]


def test_a_newest_folder_of_somebody_else_is_named(policy, scored, pairs, tmp_path):
    real.save_checkpoint(tmp_path, small(3))
    foreign(tmp_path / "step-00001000")
    foreign(tmp_path / "step-00000002")
    refused = (
        "`{}` must have a whole checkpoint as its newest, got .*step-00001000.run.json, which is "
        "missing \\(move step-00001000 to another place to go on from step-00000003\\)$"
    )
    with pytest.raises(ValueError, match=refused.format("folder")):
        real.load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=refused.format("checkpoints")):
        train(policy, scored, pairs, checkpoints=tmp_path)
    (tmp_path / "step-00001000").rename(tmp_path / "somewhere else")
    assert real.load_checkpoint(tmp_path).step == 3
    with pytest.raises(ValueError, match="`checkpoints` must be a folder or new, got .*, a file"):
        train(policy, scored, pairs, checkpoints=tmp_path / "step-00000002" / "model.pth")


# --- what is broken ------------------------------------------------------------------------------


def refused_as_broken(folder, path, other):
    with pytest.raises(ValueError) as caught:
        real.load_checkpoint(folder)
    said = str(caught.value)
    assert said.startswith("`folder` must have a whole checkpoint as its newest, got ")
    assert said.count("\n") == 0
    assert str(path if path.parent != folder else f"{path}, which an earlier version") in said
    assert said.endswith(f"(move step-00000002 to another place to {other})")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_or_not_its_own_is_named(tmp_path, name):
    real.save_checkpoint(tmp_path / "1", small(1))
    real.save_checkpoint(tmp_path / "other", small(2, weights={"w": torch.zeros(2)}, settings={}))
    folder = tmp_path / "2"
    real.save_checkpoint(folder, small(2))
    path, true = folder / "step-00000002" / name, None
    true = path.read_bytes()
    # Tensors do not know when their run.json changed: the first of them is named then.
    blamed = path if name != "run.json" else path.with_name("weights.safetensors")
    neighbour = path.with_name(NAMES[(NAMES.index(name) + 1) % 3]).read_bytes()
    for content in (
        true[: len(true) // 3],
        true[: len(true) // 2],
        true[:-1],
        true + b" ",
        (tmp_path / "1" / "step-00000001" / name).read_bytes(),
        (tmp_path / "other" / "step-00000002" / name).read_bytes(),
    ):
        path.write_bytes(content)
        refused_as_broken(folder, blamed, "start anew")
    for content in (b"", true[:7], neighbour):
        path.write_bytes(content)
        refused_as_broken(folder, path, "start anew")
    path.unlink()
    refused_as_broken(folder, path, "start anew")
    path.mkdir()
    refused_as_broken(folder, path, "start anew")
    path.rmdir()
    path.write_bytes(true)
    assert real.load_checkpoint(folder).step == 2
    # Where there is one before it, that is named.
    (tmp_path / "1" / "step-00000001").rename(folder / "step-00000001")
    path.write_bytes(true[:7])
    refused_as_broken(folder, path, "go on from step-00000001")


def test_a_run_json_of_anything_is_refused(tmp_path):
    real.save_checkpoint(tmp_path, small(2))
    path = tmp_path / "step-00000002" / "run.json"
    true = path.read_text()
    begin = true[: true.index(", ") + 2]
    assert json.loads(begin + '"step": 1}')["format"] == "dpo_mini checkpoint 1"
    deep = "[" * 100_000 + "]" * 100_000
    others = ("[]", "3", "null", '"text"', "{}", "{", deep, '{"format": 3}', "\ufeff" + true)
    for text in (*others, begin[:-2] + "}"):
        path.write_text(text, encoding="utf-8")
        refused_as_broken(tmp_path, path, "start anew")
    weights = path.with_name("weights.safetensors")
    changed = [true.replace('"step": 2', f'"step": {step}') for step in ("-1", "1e400", "3", '"2"')]
    changed += [true.replace('"0.rate": 0.5', '"0.rate": []'), true.replace('"beta"', '"alpha"')]
    for text in (begin, f'{begin}"step": 2}}', f'{begin}"step": {deep}}}', *changed):
        assert text != true
        path.write_text(text, encoding="utf-8")
        refused_as_broken(tmp_path, weights, "start anew")
    earlier = {"step": 2, "settings": {}, "optimizer": {}, "history": {}}
    path.write_text(json.dumps(earlier), encoding="utf-8")
    refused_as_broken(tmp_path, path.parent, "start anew")


# --- what is compared ----------------------------------------------------------------------------


def test_a_digest_is_that_of_the_bytes():
    numbers = torch.arange(12, dtype=torch.float32).view(3, 4)
    by_hand = hashlib.sha256(b"w torch.float32 [4, 3];" + numbers.T.numpy().tobytes("C"))
    assert tensor_digest([("w", numbers.T)]) == by_hand.hexdigest()
    half = numbers.bfloat16()
    nudged = half.clone()
    nudged.view(torch.int16)[2, 3] += 1
    kinds = [numbers, half, nudged, half.view(4, 3), half.view(torch.int16), half[:2]]
    kinds += [torch.tensor(1.0), torch.zeros(0), torch.tensor([True])]
    assert len({tensor_digest([("w", kind)]) for kind in kinds}) == len(kinds)
    assert tensor_digest([("w", half), ("v", half)]) != tensor_digest([("v", half), ("w", half)])


def begin(policy, reference, pairs, folder, **changes):
    """Two of three steps, and a checkpoint after each."""
    with pytest.raises(Stopped):
        train(
            copy.deepcopy(policy), reference, pairs, checkpoints=folder, checkpoint_every=1,
            progress=stop_at(2), **changes,
        )  # fmt: skip


def refuses(folder, got, policy, reference, pairs, **changes):
    with pytest.raises(ValueError) as caught:
        train(policy, reference, pairs, checkpoints=folder, checkpoint_every=1, **changes)
    assert str(caught.value) == (
        f"`checkpoints` must be this run's or none, got those of a run with {got} (start it as "
        "that run was started, its model as it was before training, or give another folder)"
    )


def test_all_that_differs_is_named_in_one_line(policy, scored, pairs, tokenizer, tmp_path):
    begin(policy, scored, pairs, tmp_path)
    refused = partial(refuses, tmp_path)
    other = copy.deepcopy(policy)
    with torch.no_grad():  # one bit of one weight
        next(other.parameters()).view(torch.int32)[3, 5] ^= 1
    rescored = real.reference_logps(other, pairs)
    refused("another model", copy.deepcopy(other), scored, pairs)
    refused("another reference", policy, rescored, pairs)
    refused(
        "another model, another reference, lr 0.001 (now 1e-06), 3 steps (now 4) and batches of 4 "
        "pairs (now 3)",
        other, rescored, pairs, optimizer=adamw(other, 1e-6), batches=in_order(12, 3),
    )  # fmt: skip
    swapped = (pairs[0], pairs[2], pairs[1])
    refused("other data", policy, scored, swapped)
    refused("other batches", policy, scored, pairs, batches=in_order(12, 4).flip(0))
    refused(
        "a schedule that gives 1 at step 0 (now 0.5)",
        policy, scored, pairs, schedule=real.warmup_then_linear(3, warmup=2),
    )  # fmt: skip
    refused("generator none (now one)", policy, scored, pairs, generator=seeded())
    refused(
        "precision full_precision (now bf16_autocast)",
        policy, tuple_like(scored, precision=real.bf16_autocast), pairs,
    )  # fmt: skip
    refused(
        "reduce sum_over_tokens (now mean_over_tokens) and beta 0.1 (now 2.0)",
        policy, tuple_like(scored, reduce=mean_over_tokens), pairs, beta=2.0,
    )  # fmt: skip
    sgd = torch.optim.SGD(policy.parameters(), lr=1e-3, weight_decay=0.01)
    refused("optimizer AdamW (now SGD)", policy, scored, pairs, optimizer=sgd)
    halves = [list(policy.parameters())[:3], list(policy.parameters())[3:]]
    two = torch.optim.AdamW([{"params": half} for half in halves])
    refused("1 groups of the optimizer (now 2)", policy, scored, pairs, optimizer=two)
    settings = dict(beta=0.1, batches=in_order(12, 4), micro_batch_size=1)
    for loss, name in (
        (ipo_loss, "ipo_loss"),
        (partial(cdpo_loss, label_smoothing=0.1), "cdpo_loss(label_smoothing=0.1)"),
    ):
        message = re.escape(f"got those of a run with loss dpo_loss (now {name}) (start")
        with pytest.raises(ValueError, match=message):
            train_preferences(
                policy, scored, pairs, loss, **settings, optimizer=adamw(policy),
                checkpoints=tmp_path,
            )  # fmt: skip
    # The control: the same run goes on, in passes of another size too.
    whole = copy.deepcopy(policy)
    history = train(whole, scored, pairs)
    by_four = real.reference_logps(policy, pairs, micro_batch_size=4)
    again = train(policy, by_four, pairs, checkpoints=tmp_path, micro_batch_size=4)
    assert_close(again["loss"], history["loss"], atol=1e-5, rtol=0)
    assert again["loss"][:2] == history["loss"][:2]
    # What training changed is another model, by the same name.
    refused("another model", policy, scored, pairs)


def tuple_like(scored, **changes):
    other = copy.copy(scored)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_groups_and_lists_are_compared_one_by_one(policy, scored, pairs, tmp_path):
    def groups(rate, betas=(0.9, 0.999)):
        halves = [list(policy.parameters())[:3], list(policy.parameters())[3:]]
        given = [{"params": halves[0]}, {"params": halves[1], "lr": rate}]
        return torch.optim.AdamW(given, lr=torch.tensor(1e-3), betas=betas)

    start = copy.deepcopy(policy)
    with pytest.raises(Stopped):
        train(
            policy, scored, pairs, optimizer=groups(0.5), checkpoints=tmp_path, checkpoint_every=1,
            progress=stop_at(1),
        )  # fmt: skip
    policy.load_state_dict(start.state_dict())
    refuses(
        tmp_path,
        "betas [0.9, 0.999] of group 0 (now [0.8, 0.999]), lr 0.5 of group 1 (now 0.25) and betas "
        "[0.9, 0.999] of group 1 (now [0.8, 0.999])",
        policy, scored, pairs, optimizer=groups(0.25, (0.8, 0.999)),
    )  # fmt: skip


@needs_peft
def test_frozen_weights_and_a_reference_beside_the_policy_are_compared(
    policy, tokenizer, pairs, tmp_path
):
    def adapted(model):
        adapter = real.add_lora(copy.deepcopy(model), rank=2, generator=seeded())
        return CausalLMPolicy(adapter, end_token=END)

    other = copy.deepcopy(policy)
    with torch.no_grad():
        next(other.parameters())[3, 5] += 1e-3
    first = adapted(policy.model)
    folder = tmp_path / "adapter"
    with pytest.raises(Stopped):
        train(
            first, real.adapter_off(first), pairs, checkpoints=folder, checkpoint_every=1,
            progress=stop_at(1),
        )  # fmt: skip
    second = adapted(other.model)
    refuses(folder, "another model and another reference", second, real.adapter_off(second), pairs)
    again = adapted(policy.model)
    train(again, real.adapter_off(again), pairs, checkpoints=folder)

    folder = tmp_path / "beside"
    begin(policy, copy.deepcopy(policy), pairs, folder)
    refuses(folder, "another reference", policy, other, pairs)
    bare = tuple(real.reference_logps(policy, pairs))
    begin(policy, bare, pairs, tmp_path / "bare")
    moved = (bare[0] - 1e-4, bare[1])
    refuses(tmp_path / "bare", "another reference", policy, moved, pairs)
    train(policy, bare, pairs, checkpoints=tmp_path / "bare")


# --- more steps ----------------------------------------------------------------------------------


def test_a_longer_run_extends_a_finished_one(policy, scored, pairs, tmp_path):
    batches = real.shuffled_batches(12, steps=7, batch_size=4, generator=seeded())
    start, whole = copy.deepcopy(policy), copy.deepcopy(policy)
    settings = dict(checkpoint_every=2)
    history = train(whole, scored, pairs, batches=batches, checkpoints=tmp_path / "whole")
    folder, log = tmp_path / "run", tmp_path / "run.csv"
    settings |= dict(checkpoints=folder, logs=[real.csv_log(log)])
    train(copy.deepcopy(start), scored, pairs, batches=batches[:3], **settings)
    with pytest.raises(Stopped):
        train(copy.deepcopy(start), scored, pairs, batches=batches, progress=stop_at(5), **settings)
    assert real.load_checkpoint(folder).step == 4
    # In the middle of the longer run the number of steps is fixed.
    refused = partial(refuses, folder, reference=scored, pairs=pairs)
    refused("7 steps (now 6)", policy=copy.deepcopy(start), batches=batches[:6])
    longer = torch.cat([batches, batches])
    refused("7 steps (now 14)", policy=copy.deepcopy(start), batches=longer)
    ended = copy.deepcopy(start)
    settings["logs"] = [real.csv_log(log)]
    assert train(ended, scored, pairs, batches=batches, **settings) == history
    assert all(map(torch.equal, ended.parameters(), whole.parameters()))
    with open(log, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == history["loss"]
    # A finished run has neither fewer steps nor other first batches.
    refused("7 steps (now 3)", policy=copy.deepcopy(start), batches=batches[:3])
    refused("other batches", policy=copy.deepcopy(start), batches=longer.flip(0))


def test_an_extension_has_the_new_schedule_from_its_first_step_on(policy, scored, pairs, tmp_path):
    def rates(steps):
        schedule = real.warmup_then_linear(steps, warmup=0)
        batches = in_order(12, 4).repeat(2, 1)[:steps]
        given = copy.deepcopy(policy)
        more = dict(checkpoints=tmp_path, checkpoint_every=1, schedule=schedule, batches=batches)
        return partial(train, given, scored, pairs, optimizer=adamw(given, 1.0), **more)

    assert_close(rates(2)()["lr"], [1.0, 0.5])
    with pytest.raises(Stopped):
        rates(5)(progress=stop_at(4))
    assert_close(rates(5)()["lr"], [1.0, 0.5, 0.6, 0.4, 0.2])


def test_a_finished_run_that_starts_again_changes_nothing(policy, scored, pairs, tmp_path):
    start, folder, log = copy.deepcopy(policy), tmp_path / "run", tmp_path / "run.csv"
    history = train(policy, scored, pairs, checkpoints=folder, logs=[real.csv_log(log)])
    before = contents(tmp_path)
    steps = []
    again = train(
        start, scored, pairs, checkpoints=folder, logs=[real.csv_log(log)],
        progress=lambda given: steps.extend(given) or given,
    )  # fmt: skip
    assert steps == []
    assert again == history
    assert contents(tmp_path) == before
    assert all(map(torch.equal, start.parameters(), policy.parameters()))


# --- two runs ------------------------------------------------------------------------------------

HOLD = """
import sys
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_in(folder):
    """It holds the lock of a folder until it is killed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline().strip() == b"held"
            yield
        finally:
            process.kill()


BUSY = (
    "`{}` must be of one run at a time, got {}, where another run.* is at work \\(wait for its "
    "end, or give another folder\\)$"
)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    policy, scored, pairs, tmp_path
):
    folder = tmp_path / "run"
    busy = BUSY.format("checkpoints", re.escape(str(folder)))
    with another_process_in(folder):
        with pytest.raises(ValueError, match=busy):
            train(copy.deepcopy(policy), scored, pairs, checkpoints=folder)
        with (
            pytest.raises(ValueError, match=busy.replace("checkpoints", "folder")),
            real.lock_folder(folder),
        ):
            pass
    assert written_in(folder) == []
    refusals = []

    def second(step, metrics):
        with pytest.raises(ValueError, match=busy) as caught:
            train(copy.deepcopy(policy), scored, pairs, checkpoints=folder)
        refusals.append(str(caught.value))
        if len(refusals) == 2:
            raise Stopped

    begun = dict(checkpoints=folder, checkpoint_every=1, logs=[second])
    with pytest.raises(Stopped) as kept:  # as a notebook keeps the last error, and all its frames
        train(copy.deepcopy(policy), scored, pairs, **begun)
    assert f"another run, process {os.getpid()}, is at work" in refusals[0]
    train(policy, scored, pairs, checkpoints=folder)
    assert real.load_checkpoint(folder).step == 3
    assert kept.value is not None


@needs_accelerate
def test_the_script_refuses_a_folder_in_use_before_it_reads_anything(tmp_path, on_the_cpu):
    arguments = ["--model", "absent", "--pairs", "absent", "--output", str(tmp_path / "out")]
    with (
        another_process_in(tmp_path / "out"),
        pytest.raises(ValueError, match=BUSY.format("folder", re.escape(str(tmp_path / "out")))),
    ):
        example().main(arguments)


# --- a full disk ---------------------------------------------------------------------------------


@contextmanager
def room_for(size):
    """No file may become longer: a write then takes what fits and fails the next time."""
    resource = pytest.importorskip("resource", reason="only POSIX limits the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    path = tmp_path / "metrics.csv"
    log = real.csv_log(path)
    log(0, {"loss": 1 / 3})
    log(1, {"loss": 2 / 3})
    whole = path.read_bytes()
    assert whole == b"step,loss\n0,0.3333333333333333\n1,0.6666666666666666\n"
    for room in (len(whole), len(whole) + 5):
        with room_for(room), pytest.raises(OSError, match=re.escape(str(path))):
            log(2, {"loss": 1.0})
        assert path.read_bytes() == whole
    log(2, {"loss": 1.0})
    assert path.read_bytes() == whole + b"2,1.0\n"
    # The first line of a new file, and a start that cuts off lines: that takes no room at all.
    with room_for(4), pytest.raises(OSError, match="new.csv"):
        real.csv_log(tmp_path / "new.csv")(0, {"loss": 1.0})
    assert (tmp_path / "new.csv").read_bytes() == b""
    real.csv_log(tmp_path / "new.csv")(0, {"loss": 1.0})
    with room_for(0), pytest.raises(OSError, match=re.escape(str(path))):
        real.csv_log(path)(2, {"loss": 7.0})
    assert path.read_bytes() == whole
    assert written_in(tmp_path) == ["metrics.csv", "new.csv"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_half_a_line_is_taken_back_whatever_stopped_it(tmp_path, monkeypatch, error):
    path = tmp_path / "metrics.csv"
    log = real.csv_log(path)
    log(0, {"loss": 1.0})
    whole = path.read_bytes()

    class Half:
        """A file that takes three bytes and then fails."""

        def __init__(self, *arguments, **named):
            self.file, self.taken = open(*arguments, **named), 0  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, line):
            if self.taken:
                raise error
            self.taken += self.file.write(bytes(line)[:3])
            return self.taken

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patched:
        patched.setattr(logs, "open", Half, raising=False)
        with pytest.raises(type(error)):
            log(1, {"loss": 2.0})
    assert path.read_bytes() == whole


def test_a_log_cuts_a_file_where_a_run_goes_on_and_refuses_other_lines(tmp_path):
    path = tmp_path / "metrics.csv"
    for content, kept in (
        (b"", b"step,loss\n"),
        (b"step,lo", b"step,loss\n"),
        (b"step,loss", b"step,loss\n"),
        (b"step,loss\n", b"step,loss\n"),
        (b"step,loss\n1,2.0\n2,3.0\n3,4.0\n4,", b"step,loss\n1,2.0\n"),
        (b"step,loss\r\n1,2.0\r\n2,3.0\r\n", b"step,loss\r\n1,2.0\r\n"),
        (b"step,loss\n1,2.0\n1", b"step,loss\n1,2.0\n"),
    ):
        path.write_bytes(content)
        real.csv_log(path)(2, {"loss": 5.0})
        assert path.read_bytes() == kept + b"2,5.0\n"
    for content, message in (
        (b"step,loss\nmine\n", "`path` must have lines that begin .*, got b'mine.*' in line 2 of"),
        (b"\xff\xfe\n", "`path` must have the columns .* or be new, got "),
        (b"step,lr\n0,1.0\n", r"`path` must have the columns .*, got \['step', 'lr'\] in"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            real.csv_log(path)(2, {"loss": 5.0})
        assert path.read_bytes() == content


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_it(policy, scored, pairs, tmp_path):
    real.save_checkpoint(tmp_path, small(1))
    before = contents(tmp_path)
    sizes = [len(content) for path, content in before.items() if path.suffix == ".safetensors"]
    for room in (20, min(sizes) - 1, max(sizes) - 1):
        with (
            room_for(room),
            pytest.raises(OSError, match="step-00000002 could not be written, older .* stay: "),
        ):
            real.save_checkpoint(tmp_path, small(2))
        assert contents(tmp_path) == before
        assert written_in(tmp_path) == ["step-00000001"]
    large = small(2, history={"loss": [1 / 3] * 1000})
    with room_for(5000), pytest.raises(OSError, match="step-00000002 could not be written"):
        real.save_checkpoint(tmp_path, large)
    assert written_in(tmp_path) == ["step-00000001"]
    real.save_checkpoint(tmp_path, large)
    assert written_in(tmp_path) == ["step-00000002"]
    with pytest.raises(FileExistsError, match="step-00000002, which is there"):
        real.save_checkpoint(tmp_path, large)


# --- killed anywhere -----------------------------------------------------------------------------

NURSERY = '''
"""Runs of the script, each in a process of its own that kills itself at its n-th call."""
import os
import random
import signal
import sys

import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import train_dpo

FILES = {"posix", "_io", "io", "fcntl"}


def start(arguments, fatal=0, files=False):
    """Its exit status; `fatal` counts calls of builtins, or of those alone that touch files."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    calls = 0

    def count(frame, event, called):
        nonlocal calls
        if event == "c_call":
            module = getattr(called, "__module__", None) or type(called.__self__).__module__
            if not files or module in FILES or "serialize" in called.__name__:
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    status = 1
    try:
        train_dpo.main(arguments)
        status = 0
    finally:
        sys.setprofile(None)
        with open(os.environ["COUNTED"], "w") as file:
            file.write(str(calls))
        os._exit(status)


def counted():
    with open(os.environ["COUNTED"]) as file:
        return int(file.read())


root, arguments, moments = sys.argv[2], sys.argv[4:], int(sys.argv[3])
draw = random.Random(20260101)
whole = [*arguments, "--output", f"{root}/whole"]
totals = {}
assert start(whole) == 0
totals[False] = counted()
assert start([*arguments, "--output", f"{root}/counted"], files=True) == 0
totals[True] = counted()
for n in range(moments):
    files = n % 3 > 0
    fatal = draw.randrange(1, totals[files])
    given = [*arguments, "--output", f"{root}/{n}"]
    status = start(given, fatal, files)
    # Once more on the way, where that is not yet the end.
    again = start(given, draw.randrange(1, totals[True]), True)
    assert {status, again} <= {0, signal.SIGKILL}, (status, again)
    last = start(given)
    print(n, "of files" if files else "of all", fatal, status, again, last, flush=True)
assert start(whole) == 0
print("again", counted() < totals[False])
'''


@needs_accelerate
@pytest.mark.skipif(not REAL_FILE.exists(), reason="the real preference file is not here")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed run is a fork here")
def test_the_script_killed_anywhere_and_continued_is_the_uninterrupted_run(tmp_path):
    columns = {"prompt": ("instruction", "input")}
    chosen = sorted(real.load_preferences(REAL_FILE, columns=columns), key=lambda p: len(str(p)))
    preferences = chosen[:16]
    texts = [text for pair in preferences for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=300)
    model = real.tiny_gpt2(tokenizer, n_positions=128, generator=seeded(), n_heads=2, width=16)
    real.save_model(model, tokenizer, tmp_path / "start")
    real.save_preferences(tmp_path / "pairs.jsonl", preferences)
    script = tmp_path / "nursery.py"
    script.write_text(NURSERY, encoding="utf-8")
    moments = 12
    command = [sys.executable, str(script), str(ROOT / "examples"), str(tmp_path), str(moments)]
    command += ["--model", str(tmp_path / "start"), "--pairs", str(tmp_path / "pairs.jsonl")]
    command += ["--steps", "6", "--checkpoint-every", "2", "--batch-size", "4"]
    command += ["--learning-rate", "1e-3"]
    calm = {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    calm["TQDM_MININTERVAL"] = "1000"  # a bar that is drawn now and then changes what is counted
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env=environment(**calm, COUNTED=str(tmp_path / "counted.txt")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.split("\n")
    starts = [line.split()[-3:] for line in lines if " of " in line]
    assert len(starts) == moments
    assert sum(first == "9" for first, _, _ in starts) == moments
    assert sum(second == "9" for _, second, _ in starts) > 2
    assert all(last == "0" for _, _, last in starts)
    assert "again True" in lines  # and the run that was finished took no step

    def left(folder):
        files = contents(folder)
        kept = {str(path.relative_to(folder)): content for path, content in files.items()}
        kept.pop(".lock"), kept.pop("checkpoints/.lock")
        # Half a model beside the whole one may stay.
        return {n: c for n, c in kept.items() if ".part" not in n or n.startswith("checkpoints")}

    true = left(tmp_path / "whole")
    assert {"metrics.csv", "model/model.safetensors"} < set(true)
    assert {f"checkpoints/step-00000006/{name}" for name in NAMES} < set(true)
    for n in range(moments):
        assert left(tmp_path / f"{n}") == true
    with open(tmp_path / "whole" / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert float(rows[0]["loss"]) != float(rows[-1]["loss"])

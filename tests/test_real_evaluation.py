"""Held-out pairs while a run trains: their numbers, when it stops, and the best weights."""

import copy
import csv
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import test_real_doctor
import torch
from test_real_scoring import llama, sharding
from test_real_training import (
    END,
    PAIRS,
    ROOT,
    Stopped,
    adamw,
    gpt2,
    in_order,
    needs_accelerate,
    needs_peft,
    needs_tensorboard,
    stop_at,
    trl,
    weights,
)
from torch.testing import assert_close

from dpo_mini import real
from dpo_mini.logps import PAD, mean_over_tokens
from dpo_mini.losses import dpo_loss
from dpo_mini.real import CausalLMPolicy, Evaluation, Preference, train_preferences

__all__ = ["trl"]  # a fixture

HELD_OUT = [
    Preference(f"a {n} was", "bad film " * (n % 3 + 1), "very " * (n % 4 + 1)) for n in range(5)
]
OF_PAIRS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
NAMES = [f"eval_{name}" for name in OF_PAIRS]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


@pytest.fixture(scope="module")
def tokenizer_of_coins():
    pairs = test_real_doctor.coin_pairs(0)
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return real.encode(PAIRS, tokenizer, max_tokens=64)


@pytest.fixture(scope="module")
def held(tokenizer):
    return real.encode(HELD_OUT, tokenizer, max_tokens=64)


@pytest.fixture
def policy(tokenizer):
    return CausalLMPolicy(gpt2(tokenizer), end_token=END)


def train(policy, reference, pairs, steps=6, rate=1e-2, **changes):
    batches = in_order(12, 4).repeat(-(-steps // 3), 1)[:steps]
    settings = dict(beta=0.1, batches=batches, micro_batch_size=1, optimizer=adamw(policy, rate))
    return train_preferences(policy, reference, pairs, dpo_loss, **settings | changes)


def logps_by_hand(policy, pairs):
    """Chosen and rejected, each row in a pass of its own."""
    prompts = pairs[0][:, None]
    with torch.no_grad():
        return [
            torch.cat([policy.token_logps(*row).sum(1) for row in zip(prompts, side, strict=True)])
            for side in (side[:, None] for side in pairs[1:])
        ]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- the numbers ---------------------------------------------------------------------------------


def test_the_numbers_of_held_out_pairs_are_those_of_four_log_probabilities(policy, pairs, held):
    start = copy.deepcopy(policy)
    evaluation = Evaluation(held, real.reference_logps(policy, held, micro_batch_size=2), every=4)
    history = train(policy, real.reference_logps(policy, pairs), pairs, evaluation=evaluation)
    assert history["eval_step"] == [0, 4, 6]
    assert {len(history[name]) for name in NAMES} == {3}
    assert history["eval_loss"][0] == torch.tensor(2.0).log().item()
    assert [history[f"eval_rewards/{name}"][0] for name in ("chosen", "rejected")] == [0.0, 0.0]

    (ours, others), (ref_ours, ref_others) = (logps_by_hand(p, held) for p in (policy, start))
    chosen, rejected = 0.1 * (ours - ref_ours), 0.1 * (others - ref_others)
    margins = chosen - rejected
    losses = [math.log(1 + math.exp(-margin)) for margin in margins.tolist()]
    accuracy = sum(margin > 0 for margin in margins.tolist()) / 5
    by_hand = [sum(losses) / 5, chosen.mean(), rejected.mean(), margins.mean(), accuracy]
    by_hand += [ours.mean(), others.mean()]
    found = torch.tensor([history[name][-1] for name in NAMES])
    assert_close(found, torch.tensor(by_hand), atol=1e-5, rtol=1e-5)
    assert abs(margins.mean()) > 0.01  # it has moved


def test_a_step_tells_the_log_probabilities_of_its_batch(policy, pairs):
    ours, others = logps_by_hand(policy, pairs)
    history = train(policy, real.reference_logps(policy, pairs), pairs, steps=3, rate=0.0)
    for name, values in (("logps/chosen", ours), ("logps/rejected", others)):
        assert_close(torch.tensor(history[name]), values.view(3, 4).mean(1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["scored", "copy", "own scores"])
def test_any_reference_of_held_out_pairs_gives_the_same(policy, pairs, held, kind):
    start, scored = copy.deepcopy(policy), real.reference_logps(policy, held)
    reference = {"scored": scored, "copy": start, "own scores": tuple(map(torch.clone, scored))}
    histories = [
        train(
            copy.deepcopy(start), start, pairs, steps=3, evaluation=Evaluation(held, given, every=2)
        )
        for given in (scored, reference[kind])
    ]
    assert histories[0] == histories[1]


def test_training_ends_with_the_same_bits_with_and_without_evaluation(policy, pairs, held):
    without = copy.deepcopy(policy)
    plain = train(without, real.reference_logps(without, pairs), pairs)
    evaluation = Evaluation(held, real.reference_logps(policy, held), every=1)
    history = train(policy, real.reference_logps(policy, pairs), pairs, evaluation=evaluation)
    assert {name: history[name] for name in plain} == plain
    assert set(history) - set(plain) == {"eval_step", *NAMES}
    assert all(map(torch.equal, policy.parameters(), without.parameters()))


def test_an_evaluation_keeps_nothing_for_a_backward_pass(policy, pairs, held):
    with_gradient, read = [], policy.token_logps

    def token_logps(prompts, completions):
        scored = read(prompts, completions)
        with_gradient.append(scored.requires_grad)
        return scored

    policy.token_logps = token_logps
    reference, scored = (real.reference_logps(policy, rows) for rows in (pairs, held))
    del with_gradient[:]
    train(policy, reference, pairs, steps=1, evaluation=Evaluation(held, scored))
    assert with_gradient == [False] * 5 + [True] * 4 + [False] * 5


# --- where they go -------------------------------------------------------------------------------


def test_the_csv_file_has_them_in_the_row_of_their_step(policy, pairs, held, tmp_path):
    path, reported = tmp_path / "metrics.csv", []
    history = train(
        policy, real.reference_logps(policy, pairs), pairs, steps=5, logs=[real.csv_log(path)],
        evaluation=Evaluation(
            held, real.reference_logps(policy, held), every=2,
            report=lambda step, metrics: reported.append((step, dict(metrics))),
        ),
    )  # fmt: skip
    rows = rows_of(path)
    of_training = [*OF_PAIRS, "grad_norm", "lr"]
    assert list(rows[0]) == ["step", *of_training, *NAMES]
    assert [row["step"] for row in rows] == list("012345")
    for step, row in enumerate(rows):
        for name in of_training:
            assert row[name] == ("" if step == 5 else repr(history[name][step]))
        for name in NAMES:
            at = {0: 0, 2: 1, 4: 2, 5: 3}.get(step)
            assert row[name] == ("" if at is None else repr(history[name][at]))
    assert [step for step, _ in reported] == history["eval_step"] == [0, 2, 4, 5]
    assert [metrics for _, metrics in reported] == [
        {name: history[name][n] for name in NAMES} for n in range(4)
    ]


@needs_tensorboard
def test_tensorboard_has_them_at_their_steps(policy, pairs, held, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scored = real.reference_logps(policy, held)
    with real.tensorboard_log(tmp_path) as log:
        history = train(
            policy, real.reference_logps(policy, pairs), pairs, steps=3, logs=[log],
            evaluation=Evaluation(held, scored, every=2),
        )  # fmt: skip
    events = EventAccumulator(str(tmp_path)).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("eval_loss")]
    assert [step for step, _ in seen] == [0, 2, 3]
    assert_close([value for _, value in seen], history["eval_loss"], atol=1e-6, rtol=0)
    assert len(events.Scalars("loss")) == 3


def test_a_log_that_begins_in_the_middle_takes_new_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    log = real.csv_log(path)
    log(3, {"loss": 1.0})
    log(4, {"loss": 2.0, "eval_loss": 3.0})
    log(5, {"eval_loss": 4.0})
    assert path.read_text() == "step,loss,eval_loss\n3,1.0,\n4,2.0,3.0\n5,,4.0\n"
    real.csv_log(path)(5, {"loss": 5.0})  # goes on where the header has more
    assert path.read_text() == "step,loss,eval_loss\n3,1.0,\n4,2.0,3.0\n5,5.0,\n"
    for content in (path.read_text(), "step,loss,eval_loss"):  # another run, or half a header
        path.write_text(content)
        with pytest.raises(ValueError, match="`path` must have the columns .*, got .*'eval_loss'"):
            real.csv_log(path)(0 if "\n" in content else 5, {"loss": 5.0})
        assert path.read_text() == content


# --- stopping and going on -----------------------------------------------------------------------


# --- stopping and going on -----------------------------------------------------------------------


def back_and_forth(step):
    """The rate of a run that unlearns from step 3 on: its held-out loss is lowest there."""
    return 1.0 if step < 3 else -1.0


class Run:
    """A run and its files, which may be killed and started again; it stops at step 5 of 8."""

    def __init__(self, tokenizer, pairs, folder, rank=0):
        self.tokenizer, self.pairs, self.folder, self.rank = tokenizer, pairs, folder, rank
        self.seen = {}

    def policy(self):
        model = gpt2(self.tokenizer)
        if self.rank:
            model = real.add_lora(model, rank=self.rank, generator=torch.Generator().manual_seed(1))
        return CausalLMPolicy(model, end_token=END)

    def __call__(self, kill=None, patience=2, every=1, steps=8, **changes):
        """`kill`: what raises, and at which step."""
        policy, draws = self.policy(), torch.Generator().manual_seed(0)
        part = tuple(side[:5] for side in self.pairs)

        def report(step, metrics):
            drawn = torch.rand(1, generator=draws).item()
            self.seen[step] = drawn, weights(policy)
            if kill == ("report", step):
                raise Stopped

        def log(step, metrics):
            if kill == ("log", step):
                raise Stopped

        stop = kill[1] if kill and kill[0] == "progress" else None
        settings = dict(
            evaluation=Evaluation(
                part, real.reference_logps(policy, part, micro_batch_size=5),
                every=every, patience=patience,
                best=self.folder / "best", report=report,
            ),
            schedule=back_and_forth, checkpoints=self.folder / "checkpoints", checkpoint_every=2,
            generator=draws, progress=stop_at(stop),
            logs=[real.csv_log(self.folder / "metrics.csv"), log],
        )  # fmt: skip
        self.folder.mkdir(exist_ok=True)
        reference = real.reference_logps(
            policy, self.pairs, batches=in_order(12, 4), micro_batch_size=4
        )
        settings |= {"rate": 1e-2 if self.rank else 1e-3, "micro_batch_size": 4, "steps": steps}
        settings |= changes
        history = train(policy, reference, self.pairs, **settings)
        return policy, history

    def best(self):
        policy = self.policy()
        return real.load_best(policy, self.folder / "best"), weights(policy)


@pytest.fixture(params=[0, pytest.param(2, marks=needs_peft)], ids=["all weights", "adapter"])
def run(request, tokenizer, pairs, tmp_path):
    return Run(tokenizer, pairs, tmp_path / "run", request.param)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_run_stops_when_its_held_out_loss_no_longer_falls_and_keeps_the_best(run):
    policy, history = run()
    losses = history["eval_loss"]
    assert history["eval_step"] == [0, 1, 2, 3, 4, 5]
    assert losses.index(min(losses)) == 3
    assert len(history["loss"]) == 5
    assert [row["step"] for row in rows_of(run.folder / "metrics.csv")] == list("012345")
    assert rows_of(run.folder / "metrics.csv")[-1]["loss"] == ""
    found, best = run.best()
    assert found == {"step": 3, "eval_loss": losses[3]}
    assert same(best, run.seen[3][1])
    assert not same(best, weights(policy))
    assert os.listdir(run.folder / "best") == ["best.safetensors"]
    # Into the policy that was trained, as a script does
    assert real.load_best(policy, run.folder / "best") == found
    assert same(weights(policy), best)


def test_a_run_that_stopped_ends_at_once_and_goes_on_with_more_patience(run, monkeypatch):
    policy, history = run()
    files = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    run.seen.clear()
    with monkeypatch.context() as patched:
        patched.setattr(real.training, "pair_logps", None)  # nothing is read
        again, same_history = run()
    assert same_history == history
    assert same(weights(again), weights(policy))
    assert run.seen == {}
    assert files == {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    longer, history = run(patience=None)
    assert history["eval_step"] == [*range(9)]
    whole = Run(run.tokenizer, run.pairs, run.folder.with_name("whole"), run.rank)
    uninterrupted, true = whole(patience=None)
    assert history == true
    assert same(weights(longer), weights(uninterrupted))
    paths = [folder / "metrics.csv" for folder in (run.folder, whole.folder)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


KILLS = [("progress", 1), ("progress", 3), ("log", 0), ("log", 3), ("log", 4), ("log", 5)]
KILLS += [("report", step) for step in (0, 2, 3, 4, 5)]


@pytest.mark.parametrize("every", [1, 2])
def test_killed_anywhere_and_continued_it_is_the_uninterrupted_run(
    tokenizer, pairs, tmp_path, every
):
    whole = Run(tokenizer, pairs, tmp_path / "whole")
    policy, history = whole(every=every, patience=2 // every)
    stopped = history["eval_step"][-1]
    assert stopped == {1: 5, 2: 4}[every]
    drawn = {step: draw for step, (draw, _) in whole.seen.items()}
    for what, step in KILLS:
        if step > stopped - (what == "progress") or (what == "report" and step % every):
            continue
        run = Run(tokenizer, pairs, tmp_path / f"{what}-{step}")
        with pytest.raises(Stopped):
            run((what, step), every=every, patience=2 // every)
        continued, again = run(every=every, patience=2 // every)
        assert again == history, (what, step)
        assert same(weights(continued), weights(policy))
        assert run.best()[0] == whole.best()[0]
        assert same(run.best()[1], whole.best()[1])
        assert {step: draw for step, (draw, _) in run.seen.items()} == drawn
        csvs = [(r.folder / "metrics.csv").read_bytes() for r in (run, whole)]
        assert csvs[0] == csvs[1], (what, step)


def test_a_finished_run_goes_on_with_more_steps_and_evaluations(tokenizer, pairs, tmp_path):
    run = Run(tokenizer, pairs, tmp_path / "run")
    _, short = run(patience=None, every=2, steps=3)
    assert short["eval_step"] == [0, 2, 3]
    _, long = run(patience=None, every=2, steps=6)
    assert long["eval_step"] == [0, 2, 3, 4, 6]
    rows = rows_of(run.folder / "metrics.csv")
    assert [row["step"] for row in rows] == list("0123456")
    assert [n for n, row in enumerate(rows) if row["eval_loss"]] == [0, 2, 3, 4, 6]
    assert [n for n, row in enumerate(rows) if not row["loss"]] == [6]


def test_what_a_run_must_have_in_common_with_the_one_that_stopped(tokenizer, pairs, tmp_path):
    run = Run(tokenizer, pairs, tmp_path / "run")
    with pytest.raises(Stopped):
        run(("progress", 3))

    def evaluation(n=5, **changes):
        policy, part = run.policy(), tuple(side[:n] for side in pairs)
        return Evaluation(part, real.reference_logps(policy, part), **{"every": 1} | changes)

    part = tuple(side[:5] for side in pairs)
    scores = tuple(side - 1 for side in real.reference_logps(run.policy(), part))
    for got, given in (
        ("an evaluation \\(now none\\)", None),
        ("other held-out pairs", evaluation(4)),
        ("an evaluation every 1 steps \\(now 3\\)", evaluation(every=3)),
        ("another reference of held-out pairs", Evaluation(part, scores, every=1)),
    ):
        with pytest.raises(ValueError, match=f"`checkpoints` must be .* a run with {got} \\(start"):
            run(evaluation=given)
    plain = Run(tokenizer, pairs, tmp_path / "plain")
    with pytest.raises(Stopped):
        plain(("progress", 3), evaluation=None)
    with pytest.raises(ValueError, match=r"a run with no evaluation \(now one\) \(start"):
        plain()


# --- the best weights ----------------------------------------------------------------------------


def test_weights_of_another_model_are_refused(tokenizer, pairs, tmp_path):
    run = Run(tokenizer, pairs, tmp_path / "run")
    run(steps=1)
    folder = run.folder / "best"
    small = real.tiny_gpt2(
        tokenizer, n_positions=64, generator=torch.Generator(), n_heads=2, width=8
    )
    with pytest.raises(ValueError, match=r"`policy` must be .*, got .* of shape \[24\] where .*48"):
        real.load_best(CausalLMPolicy(small, end_token=END), folder)
    with pytest.raises(ValueError, match="`folder` must have the weights .* missing"):
        real.load_best(run.policy(), tmp_path / "none")
    content = (folder / "best.safetensors").read_bytes()
    for wrong in (content[:-1], content[:50], b""):
        (folder / "best.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError, match="`folder` must have the weights .* cut off"):
            real.load_best(run.policy(), folder)
    (folder / "best.safetensors").unlink()
    real.save_model(run.policy().model, tokenizer, folder)
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    with pytest.raises(ValueError, match="`folder` must have the weights .* another file"):
        real.load_best(run.policy(), folder)


@needs_peft
def test_an_adapter_of_another_model_is_refused(tokenizer, pairs, tmp_path):
    run = Run(tokenizer, pairs, tmp_path / "run", rank=2)
    run(steps=1)
    policy = run.policy()
    assert run.best()[0]["step"] in (0, 1)
    before = weights(policy)
    with torch.no_grad():
        next(w for w in policy.parameters() if not w.requires_grad).add_(1)
    moved = weights(policy)
    with pytest.raises(ValueError, match="`policy` must be .*, got other weights beside the"):
        real.load_best(policy, run.folder / "best")
    assert same(weights(policy), moved)
    assert not same(before, moved)
    whole = Run(tokenizer, pairs, tmp_path / "run")
    with pytest.raises(ValueError, match="`policy` must be .*, got base_model.* of shape none"):
        whole.best()


def test_on_a_full_disk_the_best_before_stays(tokenizer, pairs, tmp_path, monkeypatch):
    run = Run(tokenizer, pairs, tmp_path / "run")

    def full(weights, path, metadata):
        path.write_bytes(b"half")
        if metadata["step"] == "2":
            raise OSError(28, "No space left on device")
        real.checkpoints.save_tensors(weights, path, metadata)

    monkeypatch.setattr(real.evaluation, "save_tensors", full)
    with pytest.raises(OSError, match=r"best.safetensors could not be written: .* No space left"):
        run()
    assert os.listdir(run.folder / "best") == ["best.safetensors"]
    assert run.best()[0]["step"] == 1


# --- what is refused -----------------------------------------------------------------------------


def test_bad_evaluations_are_refused(policy, pairs, held):
    scored = real.reference_logps(policy, held)
    for message, arguments in (
        ("`every` must be a whole number >= 1, got 0", dict(every=0)),
        ("`patience` must be a whole number >= 1, got 0", dict(patience=0)),
        ("`reference` must be \\(chosen, rejected\\), got 3", dict(reference=(*scored, scored[0]))),
        ("`reference` must have 5 rows like `pairs`, got 4", dict(reference=(scored[0][:4],) * 2)),
        ("`reference` must be log-probabilities <= 0", dict(reference=tuple(-s for s in scored))),
        ("`pairs` must be \\(prompts", dict(pairs=held[:2])),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation(**{"pairs": held, "reference": scored} | arguments)


def infinite(chosen, rejected, ref_chosen, ref_rejected, beta):
    return chosen - rejected + math.inf


def test_a_reference_that_is_read_otherwise_is_refused(policy, pairs, held):
    reference = real.reference_logps(policy, pairs)
    before = weights(policy)
    means = real.reference_logps(policy, held, reduce=mean_over_tokens)
    half = real.reference_logps(policy, held, precision=real.bf16_autocast)
    batches = torch.tensor([[4, 2, 1]])
    other = real.reference_logps(policy, held, batches=batches, micro_batch_size=3)
    for message, given in (
        ("`evaluation.reference` must be read with reduce sum_over_tokens .*, got mean_", means),
        ("`evaluation.reference` must be read with precision full_precision .*, got bf16", half),
        (r"`evaluation.reference` must be read in its order .*, got row 0 with none", other),
        ("`evaluation.reference` must be .* copy .*, got a model that shares", policy),
    ):
        with pytest.raises(ValueError, match=message):
            train(policy, reference, pairs, evaluation=Evaluation(held, given))
    with pytest.raises(ValueError, match="`evaluation` must have a finite loss, got inf at step 0"):
        train_preferences(
            policy, reference, pairs, infinite, beta=0.1, batches=in_order(12, 4),
            optimizer=adamw(policy),
            evaluation=Evaluation(held, real.reference_logps(policy, held)),
        )  # fmt: skip
    with pytest.raises(TypeError, match="`evaluation` must be an Evaluation, got a tuple"):
        train(policy, reference, pairs, evaluation=(held, means))
    assert same(weights(policy), before)


def test_in_shards_best_weights_and_a_model_beside_the_policy_are_refused(policy, pairs, held):
    class Shards(real.processes.OneProcess):
        distributed_type = "FSDP"

    reference, scored = (real.reference_logps(policy, rows) for rows in (pairs, held))
    for message, evaluation in (
        ("`evaluation.best` must be None under FSDP", Evaluation(held, scored, best="best")),
        ("`evaluation.reference` must be what reference_logps gave under FSDP",
         Evaluation(held, copy.deepcopy(policy))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            train(policy, reference, pairs, evaluation=evaluation, accelerator=Shards())


# --- beside trl ----------------------------------------------------------------------------------


def test_trl_finds_the_same_under_the_same_names(trl, policy, tokenizer, pairs, held, tmp_path):
    from datasets import Dataset

    class AsGiven(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: tokens[tokens != PAD].tolist() for name, tokens in zip(columns, row, strict=True)}
        for row in zip(*held, strict=True)
    ]
    start = copy.deepcopy(policy)
    history = train(
        policy, real.reference_logps(policy, pairs), pairs, steps=3, rate=1e-3,
        evaluation=Evaluation(held, real.reference_logps(start, held)),
    )  # fmt: skip
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        max_length=None, pad_to_multiple_of=None, per_device_eval_batch_size=5,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = AsGiven(
        model=copy.deepcopy(policy.model), ref_model=copy.deepcopy(start.model), args=arguments,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip
    found = trainer.evaluate()
    assert_close({name: history[name][-1] for name in NAMES}, {name: found[name] for name in NAMES},
                 atol=1e-5, rtol=1e-6)  # fmt: skip
    assert abs(history["eval_rewards/margins"][-1]) > 1e-3


# --- the doctor ----------------------------------------------------------------------------------


def with_held_out(tokenizer, folder, preferences, seed, **changes):
    """A run of test_real_doctor.py that looks at 64 other pairs of the same coin."""
    held = real.encode(test_real_doctor.coin_pairs(seed + 50, n=64), tokenizer, max_tokens=32)
    start = test_real_doctor.tiny(tokenizer, seed)
    scored = real.reference_logps(start, held, micro_batch_size=64)
    evaluation = Evaluation(held, scored, every=10)
    return test_real_doctor.run(
        tokenizer, folder, preferences, seed=seed, evaluation=evaluation, **changes
    )


def test_the_doctor_sees_held_out_pairs_become_worse(tokenizer_of_coins, tmp_path):
    few = test_real_doctor.coin_pairs(3, n=8)
    path = with_held_out(tokenizer_of_coins, tmp_path, few, 0, lr=0.02, steps=80, beta=0.5)
    found = [finding for finding in real.diagnose(path) if finding.question == 10]
    assert [finding.symptom.startswith("The loss of held-out pairs was") for finding in found] == [
        True
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_doctor_is_silent_on_healthy_runs_with_held_out_pairs(
    tokenizer_of_coins, tmp_path, seed
):
    path = with_held_out(tokenizer_of_coins, tmp_path, None, seed)
    assert rows_of(path)[-1]["eval_loss"] < rows_of(path)[0]["eval_loss"]
    assert real.diagnose(path) == []


# --- two processes -------------------------------------------------------------------------------

TOGETHER = '''
"""One of two processes: a run with whole weights, and one in shards."""
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from dpo_mini import real

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_real_evaluation import one_of_the_processes

folder = Path(sys.argv[2])
found = {"whole": one_of_the_processes(folder, Accelerator(), "whole")}
os.environ.update(json.loads(sys.argv[3]))
AcceleratorState._reset_state(True)
PartialState(cpu=True)
# accelerate deals out weights on GPUs alone; gloo's processes do for one
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
found["shards"] = one_of_the_processes(folder, Accelerator(), "shards")
torch.save(found, folder / f"found-{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
'''


def one_of_the_processes(folder, accelerator, name):
    """What it saw of a run that stops at step 5, in the folder of all."""
    model, tokenizer = real.load_model(folder / "start")
    policy = CausalLMPolicy(model, end_token=END)
    pairs, held = (
        real.encode(rows, tokenizer, max_tokens=64) for rows in (PAIRS, [*PAIRS[:3], *HELD_OUT[:2]])
    )
    in_shards = accelerator.distributed_type == "FSDP"
    optimizer, batches = adamw(policy, 1e-2), in_order(12, 4).repeat(3, 1)
    if in_shards:
        policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
    settings = dict(micro_batch_size=2, accelerator=accelerator)
    reported, answers, n_passes, read = [], [], [], policy.token_logps

    def count(*rows):
        n_passes.append(len(rows[0]) // 2)
        return read(*rows)

    def report(step, metrics):  # the main process alone reads the policy
        if not in_shards:
            answers.append(real.greedy_answer(policy, tokenizer, "film 1 was", max_tokens=9))
        reported.append(step)

    policy.token_logps = count
    scored = real.reference_logps(policy, held, **settings)
    evaluation = Evaluation(
        held, scored, every=1, patience=2, report=report,
        best=None if in_shards else folder / f"best of {accelerator.num_processes}",
    )  # fmt: skip
    reference = real.reference_logps(policy, pairs, batches=batches, **settings)
    del n_passes[:]
    history = train_preferences(
        policy, reference, pairs, dpo_loss, beta=0.1, batches=batches, optimizer=optimizer,
        schedule=back_and_forth, evaluation=evaluation, accelerator=accelerator,
    )  # fmt: skip
    seen = {"history": history, "reported": reported, "answers": answers, "passes": n_passes}
    if not in_shards:
        seen["best"] = real.load_best(policy, folder / f"best of {accelerator.num_processes}")
        unwrapped = accelerator.unwrap_model(policy.model)
        seen["weights"] = {n: w.detach().clone() for n, w in unwrapped.named_parameters()}
    return seen


@needs_accelerate
def test_two_processes_share_the_held_out_pairs_and_stop_together(tokenizer, tmp_path):
    real.save_model(llama(len(tokenizer)), tokenizer, tmp_path / "start")
    (tmp_path / "together.py").write_text(TOGETHER, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "together.py"), str(ROOT / "tests"), str(tmp_path)]
    command += [json.dumps(sharding())]
    for _ in range(3):  # another program may have taken the port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        shared |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": "2"}
        both = [
            subprocess.Popen(
                command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for rank in "01"
        ]  # fmt: skip
        said = "".join(process.communicate(timeout=300)[1] for process in both)
        if "EADDRINUSE" not in said:
            break
    assert [process.returncode for process in both] == [0, 0], said[-3000:]
    first, second = (torch.load(tmp_path / f"found-{rank}.pt") for rank in "01")
    alone = one_of_the_processes(tmp_path, real.processes.OneProcess(), "alone")
    assert alone["history"]["eval_step"] == [0, 1, 2, 3, 4, 5]
    assert alone["best"]["step"] == 3
    for kind in ("whole", "shards"):
        main, other = first[kind], second[kind]
        assert main["history"] == other["history"]
        assert main["history"]["eval_loss"][0] == torch.tensor(2.0).log().item()
        assert main["history"]["eval_rewards/margins"][0] == 0.0
        for name, values in alone["history"].items():
            assert_close(main["history"][name], values, atol=1e-4, rtol=1e-4)
        assert main["reported"] == alone["history"]["eval_step"]
        assert other["reported"] == []
    assert [len(process["whole"]["passes"]) for process in (first, second)] == [17, 17]
    assert first["whole"]["passes"][:2] + second["whole"]["passes"][:2] == [2, 1, 2, 1]
    assert first["whole"]["best"] == second["whole"]["best"]
    assert same(first["whole"]["weights"], second["whole"]["weights"])
    assert first["whole"]["best"]["step"] == 3
    assert first["whole"]["answers"] == alone["answers"]

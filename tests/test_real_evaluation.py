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
import torch
from test_real_training import (
    END,
    PAIRS,
    ROOT,
    Stopped,
    adamw,
    gpt2,
    in_order,
    needs_peft,
    needs_tensorboard,
    stop_at,
    weights,
)
from torch.testing import assert_close

from dpo_mini import real
from dpo_mini.logps import mean_over_tokens
from dpo_mini.losses import dpo_loss
from dpo_mini.real import CausalLMPolicy, Evaluation, Preference, train_preferences

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
    with torch.no_grad():
        return [
            torch.cat([policy.token_logps(p[None], a[None]).sum(1) for p, a in zip(pairs[0], side)])
            for side in pairs[1:]
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



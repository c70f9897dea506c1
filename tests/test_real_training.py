"""Training of real models: beside pip `trl`, beside itself in other passes, killed and gone on."""

import copy
import csv
import importlib.util
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from dpo_mini.logps import PAD, mean_over_tokens, sum_over_tokens
from dpo_mini.losses import cpo_loss, dpo_loss, dpo_mean_loss, kto_loss
from dpo_mini.train import fit_preferences, without_reference

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_mini import real
from dpo_mini.real import CausalLMPolicy, Preference, train_preferences

ROOT = Path(__file__).resolve().parent.parent
REAL_FILE = ROOT.parent / "shared" / "data" / "instruction-preferences.json"
TRL = "1.16.0"
PAIRS = [
    Preference(f"film {n} was", "very good " * (n % 4 + 1), "bad " * (n % 3 + 1)) for n in range(12)
]
END = 0


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


needs_accelerate = pytest.mark.skipif(not installed("accelerate"), reason="no accelerate here")
needs_tensorboard = pytest.mark.skipif(not installed("tensorboard"), reason="no tensorboard here")
needs_peft = pytest.mark.skipif(not installed("peft"), reason="no peft here")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return real.encode(PAIRS, tokenizer, max_tokens=64)


def gpt2(tokenizer, dtype=torch.float32):
    model = real.tiny_gpt2(tokenizer, n_positions=64, generator=seeded(), n_heads=2, width=16)
    with torch.no_grad():  # as far from uniform as a trained model is
        for weight in model.parameters():
            weight.mul_(8.0) if weight.dim() > 1 else None
    return model.to(dtype)


@pytest.fixture
def policy(tokenizer):
    return CausalLMPolicy(gpt2(tokenizer, torch.float64), end_token=END)


@pytest.fixture
def single(tokenizer):
    """The same policy in float32."""
    return CausalLMPolicy(gpt2(tokenizer), end_token=END)


def in_order(n_rows, batch_size):
    return torch.arange(n_rows).view(-1, batch_size)


def adamw(policy, learning_rate=1e-3):
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=learning_rate)


def train(policy, reference, pairs, **changes):
    settings = dict(beta=0.1, batches=in_order(12, 4))
    settings |= {"optimizer": adamw(policy)} | changes
    return train_preferences(policy, reference, pairs, dpo_loss, **settings)


def weights(policy):
    return {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}


def gradients(policy):
    return {name: weight.grad.clone() for name, weight in policy.model.named_parameters()}


def farthest(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


# --- beside other implementations ----------------------------------------------------------------


@pytest.fixture
def trl():
    if installed("trl") != TRL:
        pytest.skip(f"trl {installed('trl')} is not the pinned {TRL} (it needs Python 3.11)")
    import random

    import numpy

    states = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        import trl

        yield trl
    random.setstate(states[0])
    numpy.random.set_state(states[1])  # noqa: NPY002


def trl_history(trl, model, reference, tokenizer, pairs, folder, **settings):
    """`DPOTrainer` as it is, but for the order of the rows and tokens that are given."""
    from datasets import Dataset

    class InOrder(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

        def _get_train_sampler(self, *arguments):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: tokens[tokens != PAD].tolist() for name, tokens in zip(columns, row, strict=True)}
        for row in zip(*pairs, strict=True)
    ]
    arguments = trl.DPOConfig(
        output_dir=str(folder), report_to="none", use_cpu=True, save_strategy="no", bf16=False,
        gradient_checkpointing=False, disable_tqdm=True, max_length=None, logging_steps=1,
        pad_to_multiple_of=None, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    trainer = InOrder(
        model=model, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        optimizers=(torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01), None),
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@needs_accelerate
@pytest.mark.skipif(not REAL_FILE.exists(), reason="the real preference file is not here")
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.3])
def test_trl_computes_the_same_at_every_step(trl, tmp_path, max_grad_norm, capfd):
    n, batch_size, beta = 160, 8, 0.1
    columns = {"prompt": ("instruction", "input")}
    preferences = real.load_preferences(REAL_FILE, columns=columns)[:n]
    texts = [text for pair in preferences for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=1000)
    pairs = real.encode(preferences, tokenizer, max_tokens=256)
    model = real.tiny_gpt2(tokenizer, n_positions=256, generator=seeded(), width=64)
    theirs, reference = copy.deepcopy(model), copy.deepcopy(model)
    history = trl_history(
        trl, theirs, reference, tokenizer, pairs, tmp_path, beta=beta, max_grad_norm=max_grad_norm,
        per_device_train_batch_size=batch_size, max_steps=n // batch_size,
    )  # fmt: skip
    policy, start = CausalLMPolicy(model, end_token=END), weights(SimpleNamespace(model=model))
    ours = train_preferences(
        policy,
        real.reference_logps(policy, pairs, batches=in_order(n, batch_size), micro_batch_size=3),
        pairs, dpo_loss, beta=beta, batches=in_order(n, batch_size), max_grad_norm=max_grad_norm,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01),
    )  # fmt: skip
    assert len(history) == n // batch_size
    assert ours.pop("lr") == [entry["learning_rate"] for entry in history]
    # A margin of 0 to the last bit at the first step is no win; one of 1e-8 is.
    assert ours.pop("rewards/accuracies")[1:] == [e["rewards/accuracies"] for e in history[1:]]
    for name, values in ours.items():
        found = torch.tensor([entry[name] for entry in history])
        rounding = 1e-6 if name.startswith("logps/") else 0  # of sums of some 150 nats
        assert_close(torch.tensor(values), found, atol=1e-5, rtol=rounding)
    trained = weights(SimpleNamespace(model=theirs))
    assert farthest(weights(policy), trained) < 1e-4
    assert farthest(start, trained) > 1e-2  # the control
    capfd.readouterr()


def test_it_is_the_loop_of_the_toys(policy, pairs):
    """Two loops, one training: Adam, warm-up and cosine of `fit_preferences`."""
    other, reference, steps = copy.deepcopy(policy), copy.deepcopy(policy), 9
    toys = fit_preferences(
        other, reference, pairs, partial(dpo_loss, beta=0.1), steps=steps, batch_size=4,
        learning_rate=1e-2, generator=seeded(5),
    )  # fmt: skip
    ours = train(
        policy,
        real.reference_logps(reference, pairs),
        pairs,
        batches=real.shuffled_batches(12, steps=steps, batch_size=4, generator=seeded(5)),
        optimizer=torch.optim.Adam(policy.parameters(), lr=1e-2, betas=(0.9, 0.99)),
        schedule=lambda n: min(1, (n + 1) / 20) * (1 + math.cos(math.pi * n / steps)) / 2,
    )
    assert_close(ours["loss"], toys["loss"], atol=1e-12, rtol=0)
    margins = [margin * 0.1 for margin in toys["margin"]]
    assert_close(ours["rewards/margins"], margins, atol=1e-12, rtol=0)
    assert ours["rewards/accuracies"][1:] == toys["accuracy"][1:]
    assert farthest(weights(policy), weights(other)) < 1e-10


def test_losses_of_means_take_means(policy, pairs):
    other, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    batches = real.shuffled_batches(12, steps=4, batch_size=4, generator=seeded())
    toys = fit_preferences(
        other, reference, pairs, partial(dpo_mean_loss, beta=2.0), steps=4, batch_size=4,
        learning_rate=1e-2, generator=seeded(), reduce=mean_over_tokens,
    )  # fmt: skip
    ours = train_preferences(
        policy,
        real.reference_logps(reference, pairs, reduce=mean_over_tokens),
        pairs,
        dpo_mean_loss,
        beta=2.0,
        batches=batches,
        optimizer=torch.optim.Adam(policy.parameters(), lr=1e-2, betas=(0.9, 0.99)),
        schedule=lambda n: (n + 1) / 20 * (1 + math.cos(math.pi * n / 4)) / 2,
    )
    assert_close(ours["loss"], toys["loss"], atol=1e-12, rtol=0)


# --- passes, clipping, rates ---------------------------------------------------------------------


def test_passes_of_any_size_have_the_gradient_of_the_whole_batch(policy, pairs):
    reference, rows = copy.deepcopy(policy), torch.arange(8)
    with torch.no_grad():  # away from the start, where all pairs weigh the same
        for weight in policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, dtype=weight.dtype, generator=seeded()))
    prompts, chosen, rejected = (tokens[rows] for tokens in pairs)
    losses = dpo_loss(
        policy.logps(prompts, chosen),
        policy.logps(prompts, rejected),
        reference.logps(prompts, chosen).detach(),
        reference.logps(prompts, rejected).detach(),
        beta=0.1,
    )
    losses.mean().backward()
    true = gradients(policy)
    for size in (1, 3, 5, 8, 99):
        trained = copy.deepcopy(policy)
        history = train(trained, reference, pairs, batches=rows[None], micro_batch_size=size)
        assert farthest(gradients(trained), true) < 1e-12
        assert_close(history["loss"], [losses.mean().item()], atol=1e-12, rtol=0)
        norm = torch.cat([gradient.flatten() for gradient in true.values()]).norm().item()
        assert_close(history["grad_norm"], [norm], atol=1e-10, rtol=0)
    means = torch.stack([part.mean() for part in losses.split(3)])  # of 3, 3 and 2: what it is not
    assert (means.mean() - losses.mean()).abs() > 1e-3


def test_a_long_gradient_is_shortened_and_its_length_reported(policy, pairs):
    free, held = copy.deepcopy(policy), copy.deepcopy(policy)
    one = {"batches": in_order(12, 12)}
    reference = real.reference_logps(policy, pairs)
    norm = train(free, reference, pairs, **one)["grad_norm"][0]
    assert train(held, reference, pairs, max_grad_norm=norm / 4, **one)["grad_norm"] == [norm]
    shortened = {name: gradient / 4 for name, gradient in gradients(free).items()}
    assert farthest(gradients(held), shortened) < 1e-6 * norm  # torch divides by norm + 1e-6


def test_learning_rates_follow_the_schedule(policy, pairs):
    groups = [{"params": list(policy.parameters())[:3], "lr": 0.5}]
    groups.append({"params": list(policy.parameters())[3:], "lr": 0.1})
    optimizer, seen = torch.optim.SGD(groups), []
    history = train(
        policy, real.reference_logps(policy, pairs), pairs, optimizer=optimizer,
        schedule=real.warmup_then_linear(3, warmup=1),
        logs=[lambda step, metrics: seen.append([g["lr"] for g in optimizer.param_groups])],
    )  # fmt: skip
    assert_close(history["lr"], [0.5, 0.5, 0.25])
    assert_close(seen, [[0.5, 0.1], [0.5, 0.1], [0.25, 0.05]])


def test_schedules_by_hand():
    linear, cosine = (
        [make(6, warmup=2)(step) for step in range(6)]
        for make in (real.warmup_then_linear, real.warmup_then_cosine)
    )
    assert_close(linear, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5)
    assert_close(cosine, [0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert real.warmup_then_linear(2, warmup=0)(0) == real.constant(7) == 1.0
    for make in (real.warmup_then_linear, real.warmup_then_cosine):
        with pytest.raises(ValueError, match="`warmup` must be less than steps = 6, got 6"):
            make(6, warmup=6)


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [real.full_precision, real.bf16_autocast])
def test_scored_before_or_beside_the_bits_are_the_same(single, pairs, precision):
    batches = real.shuffled_batches(12, steps=6, batch_size=4, generator=seeded())
    settings = dict(precision=precision, batches=batches, micro_batch_size=1)
    beside, before, reference = (copy.deepcopy(single) for _ in range(3))
    histories = (
        train(beside, reference, pairs, **settings),
        train(before, real.reference_logps(single, pairs, precision=precision), pairs, **settings),
    )
    assert histories[0] == histories[1]
    assert farthest(weights(beside), weights(before)) == 0
    assert farthest(weights(beside), weights(single)) > 1e-4


def test_scored_in_the_passes_of_training_the_bits_are_the_same(single, pairs):
    scored = real.reference_logps(single, pairs, micro_batch_size=4)
    beside, before, reference = (copy.deepcopy(single) for _ in range(3))
    assert train(beside, reference, pairs, micro_batch_size=4) == train(before, scored, pairs)
    assert farthest(weights(beside), weights(before)) == 0


def test_scores_are_the_references(policy, pairs):
    for size in (1, 5):
        found = real.reference_logps(policy, pairs, micro_batch_size=size)
        for scores, answers in zip(found, pairs[1:], strict=True):
            assert not scores.requires_grad
            assert_close(scores, policy.logps(pairs[0], answers).detach(), atol=1e-12, rtol=0)


def test_margins_start_at_0_only_in_the_references_precision(single, pairs):
    first = dict(batches=in_order(12, 12), micro_batch_size=1)
    for precision in (real.full_precision, real.bf16_autocast):
        scored = real.reference_logps(single, pairs, precision=precision)
        history = train(copy.deepcopy(single), scored, pairs, **first)
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins")
        assert [history[name] for name in names] == [[0.0]] * 3
        assert history["rewards/accuracies"] == [0.0]  # a tie is no win
        assert_close(history["loss"], [math.log(2)], atol=1e-7, rtol=0)
    # What goes wrong: a reference in float32 beside a policy in bfloat16. Bare tensors allow it.
    scored = tuple(real.reference_logps(single, pairs))
    history = train(copy.deepcopy(single), scored, pairs, precision=real.bf16_autocast, **first)
    half = real.reference_logps(single, pairs, precision=real.bf16_autocast)
    assert max((a - b).abs().max().item() for a, b in zip(half, scored, strict=True)) > 1e-2  # nats
    assert 0.0 not in [history[name][0] for name in names]
    assert history["rewards/accuracies"][0] > 0  # pairs that are won before anything is learned


def test_how_the_reference_was_read_is_said_once(single, pairs):
    how = dict(reduce=mean_over_tokens, precision=real.bf16_autocast)
    scored = real.reference_logps(single, pairs, micro_batch_size=4, **how)
    bare = tuple(scored)
    assert [len(bare), type(bare)] == [2, tuple]
    start = weights(single)
    told = train(copy.deepcopy(single), bare, pairs, micro_batch_size=4, **how)
    for scores in (scored, copy.deepcopy(scored), pickle.loads(pickle.dumps(scored))):
        assert {"reduce": scores.reduce, "precision": scores.precision} == how
        assert all(map(torch.equal, scores, bare))
        assert train(copy.deepcopy(single), scores, pairs) == told
    twice = {"micro_batch_size": 4, **how}
    assert train(copy.deepcopy(single), scored, pairs, **twice) == told  # the same, said twice
    # The control: bare tensors do not know, and the defaults are others.
    assert train(copy.deepcopy(single), bare, pairs)["loss"] != told["loss"]
    for other, message in (
        ({"reduce": sum_over_tokens}, "`reduce` must be mean_over_tokens .*, got sum_over_tokens"),
        ({"precision": real.full_precision}, "`precision` must be bf16_autocast .*, got full_prec"),
        ({"micro_batch_size": 2}, "`micro_batch_size` must be 4 like .*, or be left out, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train(single, scored, pairs, **other)
    assert farthest(weights(single), start) == 0


def test_in_half_precision_weights_and_gradients_stay_single(single, pairs):
    scored = real.reference_logps(single, pairs, precision=real.bf16_autocast)
    assert scored[0].dtype == torch.float32
    exact = copy.deepcopy(single)
    train(exact, real.reference_logps(single, pairs), pairs, batches=in_order(12, 12))
    train(single, scored, pairs, batches=in_order(12, 12))
    for weight in single.parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32
    found, true = (torch.cat([g.flatten() for g in gradients(p).values()]) for p in (single, exact))
    assert 1e-5 < (found - true).norm() / true.norm() < 0.05


# --- adapters ------------------------------------------------------------------------------------


def llama():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        heads = dict(num_attention_heads=2, num_key_value_heads=1)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=290, max_position_embeddings=64, **sizes, **heads)
        ).eval()


@needs_peft
@pytest.mark.parametrize("make", [gpt2, lambda tokenizer: llama()], ids=["gpt2", "llama"])
def test_without_its_adapter_a_policy_is_its_reference_for_ever(make, tokenizer, pairs):
    base = CausalLMPolicy(make(tokenizer), end_token=END)
    true, start = real.reference_logps(base, pairs), weights(base)
    model = real.add_lora(make(tokenizer), rank=4, generator=seeded(), dropout=0.5)
    policy = CausalLMPolicy(model, end_token=END)
    reference = real.adapter_off(policy)
    assert all(map(torch.equal, real.reference_logps(policy, pairs), true))  # B is 0
    assert all(map(torch.equal, real.reference_logps(reference, pairs), true))
    other = copy.deepcopy(policy)
    settings = {"batches": in_order(12, 4).repeat(3, 1), "micro_batch_size": 1}
    history = train(policy, reference, pairs, optimizer=adamw(policy, 1e-2), **settings)
    assert train(other, true, pairs, optimizer=adamw(other, 1e-2), **settings) == history
    assert history["rewards/margins"][0] == 0.0
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    # After training the reference has the bits that it had, and the policy others.
    assert all(map(torch.equal, real.reference_logps(reference, pairs), true))
    assert not torch.equal(real.reference_logps(policy, pairs)[0], true[0])
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in weights(policy).items()
        if "lora" not in name
    }
    assert farthest(frozen, start) == 0
    trained = [name for name, w in policy.model.named_parameters() if w.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)


@needs_peft
def test_an_adapter_is_drawn_from_its_generator_and_merged_when_saved(tokenizer, pairs, tmp_path):
    before = torch.random.get_rng_state()
    first, again, other = (
        CausalLMPolicy(
            real.add_lora(gpt2(tokenizer), rank=2, generator=seeded(seed)), end_token=END
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert farthest(weights(first), weights(again)) == 0
    assert farthest(weights(first), weights(other)) > 1e-3
    train(first, real.adapter_off(first), pairs, optimizer=adamw(first, 1e-2))
    true = first.logps(*pairs[:2]).detach()
    real.save_trained(first, tokenizer, tmp_path / "model")
    loaded = CausalLMPolicy(real.load_model(tmp_path / "model")[0], end_token=END)
    assert_close(loaded.logps(*pairs[:2]), true, atol=1e-4, rtol=0)
    assert not any("lora" in name for name, _ in loaded.named_parameters())


@needs_peft
def test_bad_adapters_are_refused(tokenizer, single):
    with pytest.raises(TypeError, match="`policy` must have .* an adapter .*, got a GPT2LMHead"):
        real.adapter_off(single)
    with pytest.raises(ValueError, match="`rank` must be .*, got 0"):
        real.add_lora(gpt2(tokenizer), rank=0, generator=seeded())
    with pytest.raises(ValueError, match="`alpha` must be .*, got -1"):
        real.add_lora(gpt2(tokenizer), rank=1, alpha=-1, generator=seeded())
    with pytest.raises(ValueError, match="`dropout` must be .*, got 2"):
        real.add_lora(gpt2(tokenizer), rank=1, dropout=2, generator=seeded())


# --- rows ----------------------------------------------------------------------------------------


def test_every_row_is_seen_once_before_any_is_seen_again():
    batches = real.shuffled_batches(7, steps=6, batch_size=4, generator=seeded())
    assert batches.shape == (6, 4)
    for order in batches.flatten().split(7)[:-1]:
        assert sorted(order.tolist()) == list(range(7))
    again = real.shuffled_batches(7, steps=6, batch_size=4, generator=seeded())
    other = real.shuffled_batches(7, steps=6, batch_size=4, generator=seeded(1))
    assert torch.equal(batches, again)
    assert not torch.equal(batches, other)
    with pytest.raises(TypeError, match="`generator` must be .*, got NoneType"):
        real.shuffled_batches(7, steps=6, batch_size=4, generator=None)
    with pytest.raises(ValueError, match="`batch_size` must be .*, got 0"):
        real.shuffled_batches(7, steps=6, batch_size=0, generator=seeded())


def test_sorted_by_length_a_batch_has_the_same_rows():
    lengths = torch.randint(1, 90, (37,), generator=seeded(2))
    plain, alike = (
        real.shuffled_batches(37, steps=9, batch_size=8, generator=seeded(), lengths=given)
        for given in (None, lengths)
    )
    assert torch.equal(plain.sort(1).values, alike.sort(1).values)
    assert (lengths[alike].diff(dim=1) >= 0).all()
    assert not (lengths[plain].diff(dim=1) >= 0).all()


def test_a_window_makes_batches_of_like_length_in_an_order_by_chance():
    lengths = torch.arange(64) % 16
    batches = real.shuffled_batches(
        64, steps=8, batch_size=8, generator=seeded(), lengths=lengths, window=4
    )
    for window in batches.split(4):
        least, most = lengths[window].amin(1), lengths[window].amax(1)
        order = least.argsort()
        assert (most[order][:-1] <= least[order][1:]).all()  # nested in no way
    assert sorted(batches.flatten().tolist()) == list(range(64))
    assert not (lengths[batches].amin(1).diff() >= 0).all()
    spread = (lengths[batches].amax(1) - lengths[batches].amin(1)).double().mean()
    assert spread < 5  # of 15 by chance

    with pytest.raises(ValueError, match=r"`lengths` must have shape \[64\], got \[3\]"):
        real.shuffled_batches(64, steps=1, batch_size=2, generator=seeded(), lengths=torch.ones(3))


def test_the_length_of_a_pair_is_that_of_its_three_parts():
    assert real.pair_lengths(LONG).tolist() == [1 + 3 + 2, 3 + 2 + 3, 2 + 4 + 2]


def lists(pairs):
    return [[row[row != PAD].tolist() for row in tokens] for tokens in pairs]


LONG = (
    torch.tensor([[1, PAD, PAD], [1, 2, 3], [1, 2, PAD]]),
    torch.tensor([[5, 6, 0, PAD], [5, 0, PAD, PAD], [5, 6, 7, 0]]),
    torch.tensor([[5, 0, PAD, PAD], [5, 6, 0, PAD], [6, 0, PAD, PAD]]),
)  # of 4, 6 and 6 tokens


def test_long_pairs_are_dropped_and_counted():
    kept, n_dropped = real.drop_long(LONG, max_tokens=5)
    assert n_dropped == 2
    assert lists(kept) == [[[1]], [[5, 6, 0]], [[5, 0]]]
    assert [tokens.shape for tokens in kept] == [(1, 1), (1, 3), (1, 3)]
    whole, none = real.drop_long(LONG, max_tokens=6)
    assert none == 0
    assert all(map(torch.equal, whole, LONG))
    with pytest.raises(ValueError, match="`max_tokens` must be >= 4, .* shortest pair, got 3"):
        real.drop_long(LONG, max_tokens=3)


def test_long_answers_are_cut_and_counted():
    cut, n_cut, n_dropped = real.cut_long(LONG, max_tokens=4)
    assert (n_cut, n_dropped) == (1, 1)  # of row 1 both answers have become [5]
    assert lists(cut) == [[[1], [1, 2]], [[5, 6, 0], [5, 6]], [[5, 0], [6, 0]]]
    assert [tokens.shape for tokens in cut] == [(2, 2), (2, 3), (2, 3)]
    whole, *none = real.cut_long(LONG, max_tokens=6)
    assert none == [0, 0]
    assert all(map(torch.equal, whole, LONG))
    with pytest.raises(ValueError, match="`max_tokens` must be > 3, .* prompt in row 1, got 3"):
        real.cut_long(LONG, max_tokens=3)


# --- what is refused -----------------------------------------------------------------------------


LIKELIHOODS = "^`{}` must be log-probabilities <= 0, got .*: is it a negative log-likelihood"


def test_negative_log_likelihoods_are_refused(policy, pairs):
    class Likelihoods:
        """A user's reference that answers with cross-entropies."""

        copied = copy.deepcopy(policy)
        parameters = copied.parameters

        def token_logps(self, prompts, completions):
            return -self.copied.token_logps(prompts, completions)

    wrong, start = Likelihoods(), weights(policy)
    for name, call in (
        ("reference", lambda: train(policy, wrong, pairs)),
        ("reference", lambda: real.reference_logps(wrong, pairs)),
        ("reference", lambda: real.preference_margins(policy, wrong, pairs)),
        ("policy", lambda: real.preference_margins(wrong, policy, pairs)),
    ):
        with pytest.raises(ValueError, match=LIKELIHOODS.format(f"{name}.token_logps")):
            call()
    assert farthest(weights(policy), start) == 0


def test_bad_settings_are_refused(policy, pairs):
    reference, shared = copy.deepcopy(policy), CausalLMPolicy(policy.model, end_token=END)
    scored = real.reference_logps(reference, pairs)
    cases = [
        (scored, {"beta": 0.0}, "`beta` must be a finite number > 0, got 0.0"),
        (scored, {"micro_batch_size": 0}, "`micro_batch_size` must be .*, got 0"),
        (scored, {"checkpoint_every": 0}, "`checkpoint_every` must be .*, got 0"),
        (scored, {"max_grad_norm": 0.0}, "`max_grad_norm` must be a number > 0, got 0.0"),
        (scored, {"batches": in_order(12, 4) + 1}, r"`batches` must be in 0\.\.11, got 12"),
        (
            scored,
            {"batches": torch.arange(12)},
            r"`batches` must be a non-empty \[steps, B\], got shape \[12\]",
        ),
        (shared, {}, "`reference` must be .*, got a model that shares weights"),
        ((scored[0][:5], scored[1]), {}, "`reference` must have 12 rows like `pairs`, got 5"),
        (scored[:1], {}, r"`reference` must be \(chosen, rejected\), got 1 tensors"),
        ((-scored[0], scored[1]), {}, LIKELIHOODS.format("reference")),
        ((scored[0], -scored[1]), {}, LIKELIHOODS.format("reference")),
        (
            scored,
            {"optimizer": adamw(reference)},
            "`optimizer` must have the policy's 28 .*, got 0 of them and 28 others",
        ),
    ]
    for given, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            train(policy, given, pairs, **changes)
    with pytest.raises(ValueError, match="`pairs` must be .*, got 2 tensors"):
        train(policy, scored, pairs[:2])
    with pytest.raises(ValueError, match="`rejected` must have shape"):
        train(policy, scored, (*pairs[:2], pairs[2][:, :1]))


@pytest.mark.parametrize(
    ("loss", "norm"),
    [
        (lambda *logps, beta: logps[0] * math.nan, "nan"),
        (lambda *logps, beta: logps[0] + math.nan, r"[\d.]+"),
    ],
)
def test_a_run_that_leaves_the_finite_numbers_stops_and_says_where(policy, pairs, loss, norm):
    scored, start = real.reference_logps(policy, pairs), weights(policy)
    with pytest.raises(
        ValueError, match=rf"`loss` must be finite.*, got nan and a gradient of norm {norm} at"
    ):
        train_preferences(
            policy, scored, pairs, loss, beta=0.1, batches=in_order(12, 4), optimizer=adamw(policy)
        )
    assert farthest(weights(policy), start) == 0


@pytest.mark.parametrize("max_grad_norm", [1.0, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_before_the_step(
    policy, pairs, tmp_path, max_grad_norm
):
    """The square root of 0 is 0 and its slope infinite: a loss may look well and be useless."""
    scored, met = real.reference_logps(policy, pairs, micro_batch_size=4), []

    def loss(chosen, rejected, *reference, beta):
        met.append(weights(policy))
        return (chosen - (chosen.detach() if len(met) == 3 else 1.0)).abs().sqrt()

    with pytest.raises(
        ValueError, match="`loss` must .*, got 0.0 and a gradient of norm nan at step 2"
    ):
        train_preferences(
            policy, scored, pairs, loss, beta=0.1, batches=in_order(12, 4),
            optimizer=adamw(policy), max_grad_norm=max_grad_norm, checkpoints=tmp_path / "run",
            checkpoint_every=1,
        )  # fmt: skip
    assert farthest(weights(policy), met[2]) == 0
    assert farthest(met[2], met[1]) > 0
    saved = real.load_checkpoint(tmp_path / "run")
    assert saved.step == 2
    assert farthest(saved.weights, met[2]) == 0


@needs_accelerate
def test_an_accelerator_that_would_compute_something_else_is_refused(policy, pairs):
    scored = real.reference_logps(policy, pairs)
    alike = dict(
        num_processes=1, process_index=0, is_main_process=True, distributed_type="NO",
        mixed_precision="no", gradient_accumulation_steps=1,
    )  # fmt: skip
    cases = [
        ({"mixed_precision": "bf16"}, "`precision` must be bf16_autocast .*, got full_precision"),
        ({"mixed_precision": "fp16"}, "`accelerator` must have mixed_precision .*, got 'fp16'"),
        (
            {"gradient_accumulation_steps": 2},
            "`accelerator` must have gradient_accumulation_steps 1, .* got 2",
        ),
        ({"num_processes": 3}, "`batches` must have a multiple of 3 rows per step .*, got 4"),
        ({"distributed_type": "FSDP"}, "`checkpoints` must be None under FSDP .*, got a folder"),
    ]
    policy.model.merge_and_unload = None  # as a model with an adapter has it
    cases.append(
        (
            {"distributed_type": "FSDP", "checkpoints": None},
            "`policy` must be a model without adapter",
        )
    )
    for changes, message in cases:
        folder = changes.pop("checkpoints", "unused")
        with pytest.raises(ValueError, match=message):
            train(
                policy, scored, pairs, accelerator=SimpleNamespace(**{**alike, **changes}),
                checkpoints=folder,
            )  # fmt: skip
    # The precision of reference_logps is enough, so the next check is the one that refuses.
    halved = real.reference_logps(policy, pairs, precision=real.bf16_autocast)
    refused = {**alike, "mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    with pytest.raises(ValueError, match="gradient_accumulation_steps 1"):
        train(policy, halved, pairs, accelerator=SimpleNamespace(**refused))


# --- logs ----------------------------------------------------------------------------------------


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_file_has_the_history_to_the_last_digit(policy, pairs, tmp_path):
    path = tmp_path / "metrics.csv"
    history = train(policy, real.reference_logps(policy, pairs), pairs, logs=[real.csv_log(path)])
    rows = read_csv(path)
    assert [row.pop("step") for row in rows] == ["0", "1", "2"]
    assert {name: [float(row[name]) for row in rows] for name in rows[0]} == history


def test_a_log_that_goes_on_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.csv"
    first = real.csv_log(path)
    for step in range(4):
        first(step, {"loss": step / 3, "a, b": 1.0})
    with open(path, "a", encoding="utf-8") as file:
        file.write("4,0.2")  # killed here
    log = real.csv_log(path)
    log(2, {"loss": 7.0, "a, b": 2.0})
    log(3, {"loss": 8.0, "a, b": 2.0})
    rows = read_csv(path)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["loss"]) for row in rows] == [0.0, 1 / 3, 7.0, 8.0]
    with pytest.raises(ValueError, match=r"`path` must have .*, got \['step', 'loss', 'a, b'\]"):
        real.csv_log(path)(4, {"loss": 1.0})


@needs_tensorboard
def test_tensorboard_reads_what_was_logged(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protobuf and numpy, in theirs
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        for begin in (0, 2):
            with real.tensorboard_log(tmp_path) as log:
                for step in range(begin, 4):
                    log(step, {"loss": step + begin / 8, "grad_norm": 1.0})
        events = EventAccumulator(str(tmp_path)).Reload()
        assert sorted(events.Tags()["scalars"]) == ["grad_norm", "loss"]
        found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.25), (3, 3.25)]


# --- memory --------------------------------------------------------------------------------------


def test_memory_by_hand():
    assert real.full_memory() == {
        "weights": 4, "gradients": 4, "moments": 8, "master": 0, "reference": 4, "total": 20,
    }  # fmt: skip
    assert real.full_memory(reference=0)["total"] == 16
    assert real.bf16_memory(reference=0)["total"] == 16  # the 2 + 2 + 12 of ZeRO
    assert real.bf16_memory()["total"] == 18
    # One parameter in a hundred: 2 + .04, .04 and .08, where all of them take 20.
    assert_close(real.lora_memory(0.01)["total"], 2.16)
    assert_close(real.lora_memory(0.01, weights=0.5)["total"], 0.66)
    assert real.sharded_memory(real.full_memory(), 8)["total"] == 2.5
    # 7e9 parameters: 140 GB on one device, 17.5 GB on each of eight, 15.1 GB with adapters.
    assert 7 * real.full_memory()["total"] == 140
    assert_close(7 * real.lora_memory(0.01)["total"], 15.12)
    with pytest.raises(ValueError, match="`trained` must be .*, got 1.5"):
        real.lora_memory(1.5)
    with pytest.raises(ValueError, match="`weights` must be .*, got -1"):
        real.lora_memory(0.5, weights=-1)
    with pytest.raises(ValueError, match="`reference` must be .*, got -1"):
        real.full_memory(reference=-1)
    with pytest.raises(ValueError, match="`n` must be .*, got 0"):
        real.sharded_memory(real.full_memory(), 0)


def bytes_of(policy, optimizer):
    """What is there after a step, counted tensor by tensor."""
    moments = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    held = {
        "weights": list(policy.parameters()),
        "gradients": [w.grad for w in policy.parameters() if w.grad is not None],
        "moments": moments,
    }
    return {name: sum(t.numel() * t.element_size() for t in ts) for name, ts in held.items()}


@needs_peft
def test_memory_is_what_a_run_holds(single, tokenizer, pairs):
    n = sum(weight.numel() for weight in single.parameters())
    optimizer = adamw(single)
    train(single, real.reference_logps(single, pairs), pairs, optimizer=optimizer)
    worked_out = real.full_memory(reference=0)
    for name, held in bytes_of(single, optimizer).items():
        assert held == worked_out[name] * n
    model = real.add_lora(gpt2(tokenizer), rank=2, generator=seeded())
    policy = CausalLMPolicy(model, end_token=END)
    optimizer = adamw(policy)
    train(policy, real.adapter_off(policy), pairs, optimizer=optimizer)
    added = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    worked_out = real.lora_memory(added / n, weights=4)
    for name, held in bytes_of(policy, optimizer).items():
        assert_close(float(held), worked_out[name] * n, rtol=1e-9, atol=0)


# --- stop and go on ------------------------------------------------------------------------------

STEPS, EVERY = 10, 3


def whole_run(policy, reference, pairs, folder, **changes):
    """One with every kind of state: moments, a rate that moves, a log that draws."""
    generator = seeded(3)
    settings = dict(
        batches=real.shuffled_batches(12, steps=STEPS, batch_size=4, generator=generator),
        schedule=real.warmup_then_cosine(STEPS, warmup=2),
        max_grad_norm=0.5,
        generator=generator,
        checkpoints=folder,
        checkpoint_every=EVERY,
        logs=[
            lambda step, metrics: torch.rand(1, generator=generator),
            real.csv_log(folder.with_suffix(".csv")),
        ],
    )
    return train(policy, reference, pairs, **{**settings, **changes})


def end_state(folder, policy, history):
    """All that a run leaves: files, weights, history."""
    files = {path.name: path.read_bytes() for path in (folder / f"step-{STEPS:08d}").iterdir()}
    return files, folder.with_suffix(".csv").read_bytes(), history, weights(policy)


def assert_same_end(first, second):
    assert first[0].keys() == second[0].keys()
    assert first[:3] == second[:3]
    assert farthest(first[3], second[3]) == 0


class Stopped(Exception):
    pass


def stop_at(stop):
    def progress(steps):
        for step in steps:
            if step == stop:
                raise Stopped
            yield step

    return progress


def test_a_run_that_is_stopped_at_any_step_ends_as_if_it_had_not_been(single, pairs, tmp_path):
    reference = real.reference_logps(single, pairs)
    uninterrupted = copy.deepcopy(single)
    history = whole_run(uninterrupted, reference, pairs, tmp_path / "whole")
    true = end_state(tmp_path / "whole", uninterrupted, history)
    for stop in range(STEPS):
        folder, first, second = tmp_path / f"{stop}", *(copy.deepcopy(single) for _ in range(2))
        with pytest.raises(Stopped):
            whole_run(first, reference, pairs, folder, progress=stop_at(stop))
        at = real.load_checkpoint(folder)
        assert (0 if at is None else at.step) == stop // EVERY * EVERY
        history = whole_run(second, reference, pairs, folder)
        assert_same_end(end_state(folder, second, history), true)
    # Once more from the end: nothing is left to do.
    again = whole_run(single, reference, pairs, tmp_path / "whole")
    assert again == true[2]
    assert farthest(weights(single), true[3]) == 0


@needs_peft
def test_an_adapter_goes_on_too_and_its_model_is_not_written(tokenizer, pairs, tmp_path):
    def adapted():
        model = real.add_lora(gpt2(tokenizer), rank=2, generator=seeded())
        return CausalLMPolicy(model, end_token=END)

    whole, first, second = adapted(), adapted(), adapted()
    whole_run(whole, real.adapter_off(whole), pairs, tmp_path / "whole")
    with pytest.raises(Stopped):
        whole_run(
            first, real.adapter_off(first), pairs, tmp_path / "cut", progress=stop_at(EVERY + 1)
        )
    whole_run(second, real.adapter_off(second), pairs, tmp_path / "cut")
    assert farthest(weights(second), weights(whole)) == 0
    written = real.load_checkpoint(tmp_path / "cut").weights
    assert written
    assert all("lora" in name for name in written)


KILLED = '''
"""A run that stands still at a given moment, so that it can be killed there."""
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])

from safetensors.torch import save

from dpo_mini import real
from dpo_mini.real import CausalLMPolicy, checkpoints
from test_real_training import PAIRS, END, gpt2, whole_run

folder, moment = Path(sys.argv[2]), sys.argv[3]


def stand_still(here):
    if here == moment:
        print("here", flush=True)
        sys.stdin.read()  # for ever


def progress(steps):
    for step in steps:
        stand_still(f"step {step}")
        yield step


def half(tensors, path, metadata):
    content = save(tensors, metadata)
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        stand_still(f"half of {Path(path).parent.name[1:14]}/{Path(path).stem}")
        file.write(content[len(content) // 2 :])


checkpoints.save_file = half
texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
tokenizer = real.train_tokenizer(texts, vocab_size=290)
pairs = real.encode(PAIRS, tokenizer, max_tokens=64)
policy = CausalLMPolicy(gpt2(tokenizer), end_token=END)
whole_run(policy, real.reference_logps(policy, pairs), pairs, folder, progress=progress)
'''


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run_until(script, folder, moment):
    """Runs the script, killed without warning at a moment; without one, to its end."""
    command = [sys.executable, str(script), str(ROOT / "tests"), str(folder), moment]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment()
    ) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        said = process.stdout.readline().strip()
        if said:
            process.kill()
        error = process.communicate()[1]
        watchdog.cancel()
    assert said == ("here" if moment else ""), error
    assert (process.returncode == 0) == (not moment), error


def written_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_run_that_is_killed_goes_on_to_the_last_bit(single, pairs, tmp_path):
    script, folder = tmp_path / "killed.py", tmp_path / "killed"
    script.write_text(KILLED, encoding="utf-8")
    run_until(script, folder, "step 2")  # before there is a checkpoint
    assert written_in(folder) == []
    run_until(script, folder, "half of step-00000006/optimizer")  # in the middle of writing one
    left = written_in(folder)
    assert left[-1] == "step-00000003"
    assert [name[:14] for name in left[:-1]] == [".step-00000006"]
    run_until(script, folder, "step 8")  # between two
    assert written_in(folder) == ["step-00000006"]
    run_until(script, folder, "")
    assert written_in(folder) == [f"step-{STEPS:08d}"]
    uninterrupted = tmp_path / "whole"
    whole_run(single, real.reference_logps(single, pairs), pairs, uninterrupted)
    for path in (uninterrupted / f"step-{STEPS:08d}").iterdir():
        assert (folder / path.parent.name / path.name).read_bytes() == path.read_bytes()
    trained = load_file(folder / f"step-{STEPS:08d}" / "weights.safetensors")
    assert farthest(trained, weights(single)) == 0
    csvs = [path.with_suffix(".csv").read_bytes() for path in (folder, uninterrupted)]
    assert csvs[0] == csvs[1]


def test_a_run_goes_on_only_from_its_own_checkpoints(single, pairs, tmp_path, tokenizer):
    reference, folder = real.reference_logps(single, pairs), tmp_path / "run"
    start = copy.deepcopy(single)
    whole_run(single, reference, pairs, folder)

    def again(message, policy=None, **changes):
        policy = copy.deepcopy(start) if policy is None else policy
        with pytest.raises(ValueError, match=message):
            whole_run(policy, reference, pairs, folder, **changes)

    refused = "`checkpoints` must be this run's or none, got those of a run with {} \\(start it"
    again(refused.format(r"10 steps \(now 3\) and other batches"), batches=in_order(12, 4))
    again(refused.format(r"beta 0.1 \(now 0.2\)"), beta=0.2)
    again(refused.format(r"max_grad_norm 0.5 \(now inf\)"), max_grad_norm=math.inf)
    with pytest.raises(ValueError, match=refused.format("other data")):
        whole_run(copy.deepcopy(start), reference, (pairs[0], *reversed(pairs[1:])), folder)
    other = copy.deepcopy(start)
    again(refused.format(r"lr 0.001 \(now 0.01\)"), other, optimizer=adamw(other, 1e-2))
    other = copy.deepcopy(start)
    adam = torch.optim.Adam(other.parameters(), lr=1e-3, weight_decay=0.01)
    again(refused.format(r"optimizer AdamW \(now Adam\).*"), other, optimizer=adam)
    again(refused.format(r"generator one \(now none\)"), generator=None)
    wider = real.tiny_gpt2(tokenizer, n_positions=64, generator=seeded(), n_heads=2, width=32)
    again(refused.format("another model"), CausalLMPolicy(wider, end_token=END))


def test_checkpoints_come_back_as_they_were_and_replace_the_older(tmp_path):
    given = real.Checkpoint(
        step=3,
        weights={"a": torch.rand(2, 3, generator=seeded()).T, "b": torch.ones(1)},
        optimizer={0: {"step": torch.tensor(3.0), "of.2": torch.rand(2)}, 1: {"count": 2}},
        settings={"lr": 0.1},
        batches=in_order(4, 2),
        generator_state=seeded().get_state(),
        history={"loss": [1 / 3, 1e-300]},
    )
    assert real.load_checkpoint(tmp_path / "none") is None
    real.save_checkpoint(tmp_path, given)
    real.save_checkpoint(tmp_path, replace(given, step=4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    found = real.load_checkpoint(tmp_path)
    assert (found.step, found.settings, found.history) == (4, given.settings, given.history)
    assert_close(dict(found.weights), dict(given.weights), atol=0, rtol=0)
    assert_close(dict(found.optimizer), dict(given.optimizer), atol=0, rtol=0)
    assert torch.equal(found.batches, given.batches)
    assert torch.equal(found.generator_state, given.generator_state)
    # A run that is killed before it removes the older one leaves both.
    for step in (9, 10, 11):
        real.save_checkpoint(tmp_path / f"{step}", replace(given, step=step))
    for step in (10, 11, 9):
        (tmp_path / f"{step}" / f"step-{step:08d}").rename(tmp_path / f"step-{step:08d}")
        (tmp_path / f"{step}").rmdir()
    assert real.load_checkpoint(tmp_path).step == 11
    real.save_checkpoint(tmp_path, replace(given, step=12))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]
    bad = replace(given, step=13, optimizer={0: {"old": [torch.ones(1)]}})
    with pytest.raises(TypeError, match="`optimizer` must have .*, got list as 'old'"):
        real.save_checkpoint(tmp_path, bad)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


# --- several processes ---------------------------------------------------------------------------

TOGETHER = """
import sys
import torch

torch.set_num_threads(1)
sys.path[:0] = sys.argv[1:3]
import train_dpo
from dpo_mini import real
from safetensors.torch import save_file
from test_real_training import trained_gradients


def save_gradients(policy, *arguments, accelerator):
    assert accelerator.num_processes == torch.distributed.get_world_size() == 2
    if accelerator.is_main_process:
        save_file(trained_gradients(accelerator.unwrap_model(policy.model)), sys.argv[3])
    save_trained(policy, *arguments, accelerator=accelerator)


save_trained, real.save_trained = real.save_trained, save_gradients
train_dpo.main(sys.argv[4:])
"""


def trained_gradients(model):
    return {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad}


def example():
    specification = importlib.util.spec_from_file_location(
        "train_dpo", ROOT / "examples" / "train_dpo.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def launch(folder, arguments):
    """`accelerate launch` on two processes, on a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = folder / "together.py"
    script.write_text(TOGETHER, encoding="utf-8")
    # --cpu would start one process; --multi_gpu starts two, and the environment makes them gloo's.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command += ["--main_process_port", str(port), str(script)]
    command += [str(ROOT / "examples"), str(ROOT / "tests")]
    return subprocess.run(
        [*command, str(folder / "gradients.safetensors"), *arguments],
        capture_output=True, text=True, env=environment(), timeout=600, check=False,
    )  # fmt: skip


@pytest.fixture
def on_the_cpu(monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@needs_accelerate
@needs_tensorboard
def test_under_accelerates_half_precision_rewards_start_at_0(
    single, tokenizer, tmp_path, monkeypatch, on_the_cpu, capfd
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    real.save_model(single.model, tokenizer, tmp_path / "start")
    real.save_preferences(tmp_path / "pairs.jsonl", PAIRS)
    arguments = ["--model", tmp_path / "start", "--pairs", tmp_path / "pairs.jsonl", "--steps", 2]
    arguments += ["--output", tmp_path / "run", "--batch-size", 4, "--tensorboard"]
    _, history = example().main([str(argument) for argument in arguments])
    assert history["rewards/margins"][0] == history["rewards/chosen"][0] == 0.0
    assert history["rewards/margins"][1] != 0.0
    assert set(written_in(tmp_path / "run")) == {
        "checkpoints", "metrics.csv", "model", "reference.safetensors", "run.yaml",
        "tensorboard",
    }  # fmt: skip
    capfd.readouterr()


@needs_accelerate
@needs_peft
@pytest.mark.parametrize("adapter", [[], ["--lora-rank", "2"]], ids=["all weights", "adapter"])
def test_two_processes_compute_what_one_computes(
    single, tokenizer, tmp_path, monkeypatch, adapter, on_the_cpu, capfd
):
    real.save_model(single.model, tokenizer, tmp_path / "start")
    real.save_preferences(tmp_path / "pairs.jsonl", PAIRS)
    common = ["--model", str(tmp_path / "start"), "--pairs", str(tmp_path / "pairs.jsonl")]
    common += ["--steps", "3", "--batch-size", "8", "--learning-rate", "1e-3"]
    common += ["--max-grad-norm", "1e9", *adapter]
    two = [*common, "--output", str(tmp_path / "two"), "--micro-batch-size", "2"]
    if adapter:  # and they go on from a checkpoint of one process
        stopped = example()
        monkeypatch.setattr(
            stopped, "tqdm", lambda steps, disable: stop_at(2)(steps) if len(steps) == 3 else steps
        )
        with pytest.raises(Stopped):
            stopped.main([*two, "--checkpoint-every", "2"])
        assert real.load_checkpoint(tmp_path / "two" / "checkpoints").step == 2
    for _ in range(3):  # another program may have taken the port
        done = launch(tmp_path, two)
        if "EADDRINUSE" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    alone = {}

    def keep_gradients(policy, *arguments, accelerator):
        alone.update(trained_gradients(policy.model))
        save_trained(policy, *arguments, accelerator=accelerator)

    save_trained = real.save_trained
    monkeypatch.setattr(real, "save_trained", keep_gradients)
    _, history = example().main(
        [*common, "--output", str(tmp_path / "one"), "--micro-batch-size", "8"]
    )
    capfd.readouterr()
    together = load_file(tmp_path / "gradients.safetensors")
    assert max(gradient.abs().max().item() for gradient in alone.values()) > 1e-2
    assert farthest(together, alone) < 1e-6
    one, two = (read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    # At first a margin is 0, or 1e-8 in a larger pass: a tie or a win.
    del one[0]["rewards/accuracies"], two[0]["rewards/accuracies"]
    for row, other in zip(one, two, strict=True):
        assert row.keys() | {"rewards/accuracies"} == {"step", *history}
        for name, value in row.items():
            assert_close(float(other[name]), float(value), atol=1e-6, rtol=1e-6)
    # Not weight by weight: one whose gradient is 0 but for rounding is moved all the same by Adam.
    one, two = (
        CausalLMPolicy(real.load_model(tmp_path / name / "model")[0], end_token=END)
        for name in ("one", "two")
    )
    pairs = real.encode(PAIRS, tokenizer, max_tokens=64)
    for first, second in zip(*(real.reference_logps(p, pairs) for p in (one, two)), strict=True):
        assert_close(first, second, atol=1e-4, rtol=0)


CONFIGS = {"gpu_1": (1, 1), "ddp_8": (8, 1), "fsdp_8": (8, 1), "ddp_2x8": (16, 2)}


def test_every_configuration_is_tested():
    assert {path.stem for path in (ROOT / "configs").iterdir()} == set(CONFIGS)


@needs_accelerate
@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_the_configurations(name):
    from accelerate.commands import launch as command
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
    from torch.distributed.fsdp import OffloadPolicy

    path = str(ROOT / "configs" / f"{name}.yaml")
    config = load_config_from_file(path)  # refuses keys that it does not know
    assert (config.num_processes, config.num_machines) == CONFIGS[name]
    given = command.launch_command_parser().parse_args(["--config_file", path, "script.py"])
    arguments = command._validate_launch_command(given)[0]
    assert (arguments.num_processes, arguments.num_machines) == CONFIGS[name]
    assert arguments.multi_gpu == name.startswith("ddp")
    assert arguments.use_fsdp == name.startswith("fsdp")
    assert arguments.mixed_precision == ("no" if arguments.use_fsdp else "bf16")
    if arguments.use_fsdp:
        made = command.prepare_multi_gpu_env(arguments)
        with patch_environment(**{k: v for k, v in made.items() if k.startswith("FSDP")}):
            plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.mixed_precision_policy is None
        assert plugin.cpu_offload == OffloadPolicy()  # none


# --- losses without a reference ------------------------------------------------------------------


def test_a_loss_without_a_reference_is_trained_through_the_adapter(policy, pairs):
    """Its first recorded loss is that of the policy's own log-probabilities, summed by hand."""
    prompts, chosen, rejected = (part[:4] for part in pairs)
    sums = [policy.token_logps(prompts, each).detach().sum(1) for each in (chosen, rejected)]
    settings = {
        "beta": 0.1,
        "batches": in_order(4, 4),
        "micro_batch_size": 4,
        "optimizer": adamw(policy),
    }
    reference = copy.deepcopy(policy)
    four = (policy, reference, (prompts, chosen, rejected))
    with pytest.raises(ValueError, match=r"write train.without_reference\(cpo_loss\)"):
        train_preferences(*four, cpo_loss, **settings)
    with pytest.raises(ValueError, match="single answers and a thumb"):
        train_preferences(*four, kto_loss, **settings)
    history = train_preferences(*four, without_reference(cpo_loss), **settings)
    assert history["loss"][0] == pytest.approx(cpo_loss(*sums, beta=0.1).mean().item(), rel=1e-5)

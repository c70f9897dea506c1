"""The options of `examples/train_dpo.py`: losses, adapters, evaluation, a file, and the help."""

import ast
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
import yaml

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")
pytest.importorskip("accelerate", reason="the extra 'real' is not installed")
pytest.importorskip("peft", reason="the extra 'real' is not installed")

from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.testing import assert_close

from dpo_mini import losses, real
from dpo_mini.logps import mean_over_tokens, sum_over_tokens
from dpo_mini.real import CausalLMPolicy, Preference, options
from dpo_mini.real.checkpoints import _name_of_loss
from dpo_mini.real.loss_names import TRL_NAMES

ROOT = Path(__file__).resolve().parent.parent
REAL_FILE = ROOT.parent / "shared" / "data" / "instruction-preferences.json"
PAIRS = [
    Preference(f"film {n // 2} was", "very good " * (n % 4 + 1), "bad " * (n % 3 + 1))
    for n in range(20)
]
NEEDED = {
    "cdpo": {"label_smoothing": 0.1},
    "rdpo": {"label_smoothing": 0.1},
    "exo": {"label_smoothing": 0.1},
    "f_dpo": {"divergence": "js"},
    "simpo": {"gamma": 0.5},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def load_script(name="train_dpo"):
    path = ROOT / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a model whose weights are as large as trained ones, and pairs."""
    folder = tmp_path_factory.mktemp("start")
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=290)
    model = real.tiny_gpt2(tokenizer, n_positions=64, generator=seeded(), n_heads=2, width=16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0) if weight.dim() > 1 else None
    real.save_model(model, tokenizer, folder / "model")
    real.save_preferences(folder / "pairs.jsonl", PAIRS)
    return folder


def words(folder, output, **more):
    given = {"model": folder / "model", "pairs": folder / "pairs.jsonl", "output": output}
    given |= {"steps": 3, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, **more}
    line = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            line.append(option)
        elif value is not None:
            line += [option, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


@pytest.fixture(scope="module")
def disputed(tmp_path_factory):
    """Held-out pairs of which one in three is the wrong way round: no policy is right to be sure.

    Their loss is lowest at a margin of log 2, and grows beyond it.
    """
    pairs = [Preference(p.prompt, p.rejected, p.chosen) if n % 3 == 0 else p
             for n, p in enumerate(PAIRS[:6])]  # fmt: skip
    path = tmp_path_factory.mktemp("disputed") / "pairs.jsonl"
    real.save_preferences(path, pairs)
    return path


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parse(*line):
    return options.parse_options(options.training_parser("a run"), line)


NEED = ("--model", "m", "--pairs", "p", "--output", "o")


# --- losses by name ------------------------------------------------------------------------------


def test_every_loss_of_a_pair_has_a_name_and_no_other():
    by_hand = {
        "dpo", "ipo", "hinge", "cdpo", "rdpo", "exo", "discopop", "f_dpo", "chi_po", "nca", "bco",
        "sppo", "apo_zero", "apo_down", "dpo_mean", "ipo_mean", "simpo", "cpo", "orpo",
    }  # fmt: skip
    assert set(real.loss_names()) == by_hand
    found = {name: real.loss_by_name(name, NEEDED.get(name, {})) for name in by_hand}
    means = {name for name, (_, reduce) in found.items() if reduce is mean_over_tokens}
    assert means == {"dpo_mean", "ipo_mean", "simpo", "orpo"}
    alone = {name for name, (loss, _) in found.items() if hasattr(loss, "without_reference")}
    assert alone == {"simpo", "cpo", "orpo"}


def test_a_loss_by_name_is_the_function_with_its_arguments():
    four = [-3 * torch.rand(5, generator=seeded(n), dtype=torch.float64) for n in range(4)]
    loss, reduce = real.loss_by_name("cdpo", {"label_smoothing": 0.2})
    assert reduce is sum_over_tokens
    assert_close(
        loss(*four, beta=0.3),
        losses.cdpo_loss(*four, beta=0.3, label_smoothing=0.2),
        atol=0,
        rtol=0,
    )
    loss, _ = real.loss_by_name("simpo", {"gamma": 0.4})
    assert_close(
        loss(*four, beta=2.0), losses.simpo_loss(*four[:2], beta=2.0, gamma=0.4), atol=0, rtol=0
    )


def test_the_names_of_trl_are_those_of_equal_formulas():
    """test_trl.py compares each of these formulas with trl's own."""
    path = Path(__file__).with_name("test_trl.py")
    source = path.read_text(encoding="utf-8")
    for theirs, ours in TRL_NAMES.items():
        assert f'"{theirs}": (losses.{ours}_loss' in source or (
            f'"{theirs}": losses.{ours}_loss' in source
        )
    assert "ipo" not in TRL_NAMES  # trl's is ours of means
    assert real.loss_by_name("ipo", {})[0] is losses.ipo_loss
    assert real.loss_by_name("sigmoid", {})[0] is losses.dpo_loss


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cdpo", {}, "must be those of cdpo (label_smoothing), got no label_smoothing"),
        ("dpo", {"gamma": 1.0}, "must be those of dpo (none), got an unknown gamma"),
        (
            "f_dpo",
            {"alfa": 1.0},
            "must be those of f_dpo (divergence, alpha = 0.5), got no divergence and an unknown",
        ),
        ("cpo", {"gamma": 1.0}, "must be those of cpo (nll_weight = 1.0), got an unknown gamma"),
        ("cdpo", {"label_smoothing": 0.7}, "`label_smoothing` must be a number in [0.0, 0.5)"),
        ("f_dpo", {"divergence": "kl"}, "`divergence` must be 'reverse_kl', "),
        ("kto", {}, "`loss` must be one of dpo, cdpo, "),
    ],
)
def test_what_a_loss_asks_for_is_named(name, arguments, message):
    with pytest.raises(ValueError) as refusal:
        real.loss_by_name(name, arguments)
    assert message in str(refusal.value)


def test_a_checkpoint_tells_losses_without_a_reference_apart():
    names = [_name_of_loss(real.loss_by_name(name, NEEDED.get(name, {}))[0])
             for name in ("simpo", "cpo", "orpo")]  # fmt: skip
    assert names == [
        "without_reference(simpo_loss(gamma=0.5))",
        "without_reference(cpo_loss)",
        "without_reference(orpo_loss)",
    ]


@pytest.mark.parametrize("name", real.loss_names())
def test_the_script_takes_a_step_with_every_loss(start, tmp_path, name):
    more = {"loss": name, "steps": 1, "checkpoints": None}
    if name in NEEDED:
        more["loss_arguments"] = json.dumps(NEEDED[name])
    history = script.main(words(start, tmp_path / "run", **more))[1]
    # The value of the function on log-probabilities that are summed here.
    model, tokenizer = real.load_model(start / "model")
    before = CausalLMPolicy(model, end_token=tokenizer.eos_token_id)
    pairs = real.encode(PAIRS, tokenizer, max_tokens=64)
    rows = real.shuffled_batches(20, steps=1, batch_size=4, generator=seeded())[0]
    function = getattr(losses, f"{name}_loss")
    of_means = "mean" in next(iter(inspect.signature(function).parameters))
    two = []
    for answers in pairs[1:]:
        with torch.no_grad():
            scored = before.token_logps(pairs[0][rows], answers[rows])
        lengths = (answers[rows] != -1).sum(1)
        two.append(scored.sum(1) / (lengths if of_means else 1))
    n = len([p for p in inspect.signature(function).parameters if p.endswith("logps")])
    expected = function(*(two * 2)[:n], beta=0.1, **NEEDED.get(name, {})).mean().item()
    assert history["loss"][0] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert history["grad_norm"][0] > 0
    after = CausalLMPolicy(real.load_model(tmp_path / "run" / "model")[0], end_token=None)
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(after.parameters(), before.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 2e-3


# --- the length of a run, and its rates -----------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "n_pairs", "steps"),
    [
        ([], 100, 10),
        ([], 101, 11),
        (["--epochs", "3"], 30, 9),
        (["--epochs", "0.1"], 300, 3),
        (["--epochs", "0.001"], 100, 1),
        (["--steps", "7"], 100, 7),
    ],
)
def test_epochs_become_as_many_steps_as_see_every_pair(line, n_pairs, steps):
    assert options.count_steps(parse(*NEED, "--batch-size", "10", *line), n_pairs) == steps


def test_a_warm_up_is_a_share_or_a_number_of_steps():
    for given, steps, warmup in (("0.1", 30, 3), ("0.1", 39, 3), ("0", 9, 0), ("5", 30, 5),
                                 ("1", 30, 1), ("0.29", 100, 29)):  # fmt: skip
        assert options.count_warmup(parse(*NEED, "--warmup", given), steps) == warmup
    given = parse(*NEED)
    assert all(options.count_warmup(given, n) == n // 10 for n in range(1, 2000))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_is_that_of_transformers_one_step_ahead(start, tmp_path, schedule):
    """Theirs has a rate of 0 in the first step; ours begins where theirs is in the second."""
    from transformers import get_scheduler

    more = {"schedule": schedule, "warmup": 4, "steps": 9, "checkpoints": None, "batch_size": 2}
    history = script.main(words(start, tmp_path / "run", **more))[1]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=9)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert history["lr"][:4] == pytest.approx(rates[1:5])
    assert history["lr"][4:] == pytest.approx(rates[4:])


def test_weight_decay_shrinks_what_no_gradient_moves(start, tmp_path):
    run = partial(words, start, steps=1, checkpoints=None, schedule="constant", warmup=0)
    script.main(run(output=tmp_path / "none"))
    script.main(run(output=tmp_path / "some", weight_decay=0.5))
    (none, _), (some, _), (first, _) = (
        real.load_model(folder)
        for folder in (tmp_path / "none" / "model", tmp_path / "some" / "model", start / "model")
    )
    apart = none.transformer.wpe.weight - some.transformer.wpe.weight
    assert_close(apart, 1e-3 * 0.5 * first.transformer.wpe.weight, atol=1e-6, rtol=0)


def test_an_adapter_has_a_rate_of_its_own_and_a_small_one_is_warned_of(start, tmp_path, capfd):
    assert parse(*NEED).learning_rate == 1e-6
    assert parse(*NEED, "--lora-rank", "16").learning_rate == 1e-5
    assert parse(*NEED, "--lora-rank", "16", "--learning-rate", "3e-6").learning_rate == 3e-6
    for rate, warns in ((1e-6, True), (5e-6, False), (1e-4, False)):
        given = parse(*NEED, "--lora-rank", "16", "--learning-rate", str(rate))
        assert (options.rate_warning(given) is not None) == warns
    assert options.rate_warning(parse(*NEED, "--learning-rate", "1e-7")) is None
    script.main(
        words(start, tmp_path / "run", lora_rank=2, learning_rate=1e-6, steps=1, checkpoints=None)
    )
    said = "warning: `learning_rate` should be 1e-5 to 1e-4 for an adapter, whose B begins at 0"
    assert said in capfd.readouterr().out


# --- evaluation ----------------------------------------------------------------------------------


def test_a_run_is_evaluated_and_its_best_model_is_kept(start, disputed, tmp_path, capfd):
    evaluated = words(
        start, tmp_path / "run", steps=8, eval_pairs=disputed, eval_every=2, keep_best=True,
        learning_rate=1e-2, log_every=4, sample_answers=2, answer_tokens=5,
    )  # fmt: skip
    _, history = script.main(evaluated)
    out = capfd.readouterr().out
    assert "20 pairs; 0 too long" in out
    assert "6 pairs held out; 0 too long" in out
    assert history["eval_step"] == [0, 2, 4, 6, 8]
    best = min(range(5), key=lambda n: history["eval_loss"][n])
    assert 0 < best < 4  # neither the first nor the last
    # What is saved has the lowest loss, read here on pairs that are encoded here.
    model, tokenizer = real.load_model(tmp_path / "run" / "model")
    held_out = real.load_preferences(disputed)
    pairs = real.encode(held_out, tokenizer, max_tokens=64)
    policy, reference = (
        CausalLMPolicy(each, end_token=tokenizer.eos_token_id)
        for each in (model, real.load_model(start / "model")[0])
    )
    margins = real.preference_margins(policy, reference, pairs)
    loss = (1 + (-0.1 * margins.double()).exp()).log().mean().item()
    assert loss == pytest.approx(min(history["eval_loss"]), rel=1e-4)
    # The console and the file.
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    trained = [line for line in lines if "held out" not in line and "asked" not in line]
    assert [line.split(":")[0] for line in trained] == ["step 0/8", "step 4/8", "step 7/8"]
    assert trained[0].startswith("step 0/8: loss 0.6931, margin 0, accuracy 0, grad norm ")
    assert sum(", held out: loss " in line for line in lines) == 5
    answers = json_lines(tmp_path / "run" / "answers.jsonl")
    assert [answer["step"] for answer in answers] == [n for n in (0, 2, 4, 6, 8) for _ in range(2)]
    prompts = [*dict.fromkeys(pair.prompt for pair in held_out)][:2]
    assert [answer["prompt"] for answer in answers] == prompts * 5
    draws = seeded()
    by_hand = [
        real.sample_answer(
            reference,
            tokenizer,
            prompt,
            max_tokens=5 + len(tokenizer(f"{prompt}\n")["input_ids"]),
            generator=draws,
        )
        for prompt in prompts
    ]
    assert [answer["answer"] for answer in answers[:2]] == by_hand


def test_evaluation_and_its_answers_change_no_bit_of_training(start, tmp_path):
    real.save_preferences(tmp_path / "held_out.jsonl", PAIRS[:4])
    silent = script.main(words(start, tmp_path / "silent"))[1]
    more = {"eval_pairs": tmp_path / "held_out.jsonl", "eval_every": 1}
    spoken = script.main(words(start, tmp_path / "spoken", **more))[1]
    assert all(spoken[name] == values for name, values in silent.items())
    one, other = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("silent", "spoken")
    )
    assert one == other


def test_pairs_of_one_prompt_are_held_out_together(start, tmp_path, capfd):
    more = {"eval_share": 0.3, "steps": 1, "sample_answers": 9, "answer_tokens": 1}
    script.main(words(start, tmp_path / "run", **more))
    out = capfd.readouterr().out
    assert "14 pairs; 0 too long" in out
    assert "6 pairs held out; 0 too long" in out
    asked = {answer["prompt"] for answer in json_lines(tmp_path / "run" / "answers.jsonl")}
    assert len(asked) == 3  # of which each has two pairs


def test_patience_ends_a_run_that_gets_worse(start, disputed, tmp_path):
    more = {"steps": 40, "eval_pairs": disputed, "eval_every": 1, "patience": 2}
    more |= {"sample_answers": 0, "learning_rate": 5e-2}
    _, history = script.main(words(start, tmp_path / "run", **more))
    losses_seen = history["eval_loss"]
    assert len(history["loss"]) < 40
    assert len(losses_seen) - 1 - losses_seen.index(min(losses_seen)) == 2
    assert not (tmp_path / "run" / "answers.jsonl").exists()


# --- adapters ------------------------------------------------------------------------------------


def test_an_adapter_is_saved_as_peft_reads_it_and_merged_as_it_adds_up(start, tmp_path):
    from peft import PeftModel

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # of peft
    more = {"lora_rank": 2, "lora_alpha": 6, "lora_targets": ["c_attn", "c_proj"]}
    script.main(words(start, tmp_path / "run", learning_rate=3e-2, **more))
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (
        2, 6, ["c_attn", "c_proj"],
    )  # fmt: skip
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 3  # A and B of c_attn and two c_proj in two layers
    first, tokenizer = real.load_model(start / "model")
    merged, _ = real.load_model(tmp_path / "run" / "model")
    pairs = real.encode(PAIRS, tokenizer, max_tokens=64)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    a, b = (weights[name.format(letter)] for letter in "AB")
    assert b.abs().max() > 1e-2
    by_hand = first.transformer.h[0].attn.c_attn.weight + 6 / 2 * (b @ a).T
    assert_close(merged.transformer.h[0].attn.c_attn.weight, by_hand)
    assert torch.equal(
        merged.transformer.h[0].mlp.c_fc.weight, first.transformer.h[0].mlp.c_fc.weight
    )
    loaded = PeftModel.from_pretrained(first, adapter)
    scores = [
        real.reference_logps(CausalLMPolicy(model, end_token=None), pairs)
        for model in (loaded, merged)
    ]
    for one, other in zip(*scores, strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_adapter_alone_is_written_or_the_model_alone(start, tmp_path):
    for save, there in (("only", {"adapter"}), ("no", {"model"}), ("beside", {"adapter", "model"})):
        output = tmp_path / save
        script.main(words(start, output, lora_rank=2, steps=1, save_adapter=save))
        assert {path.name for path in output.iterdir()} & {"adapter", "model"} == there


def test_an_adapter_takes_the_place_of_an_older_one_whole_or_not_at_all(start, tmp_path):
    model, _ = real.load_model(start / "model")
    policy = CausalLMPolicy(real.add_lora(model, rank=2, generator=seeded()), end_token=None)
    folder = tmp_path / "adapter"
    real.save_adapter(policy, folder)
    before = (folder / "adapter_model.safetensors").read_bytes()

    def fail(*arguments, **named):
        raise OSError("disk is full")

    save, policy.model.save_pretrained = policy.model.save_pretrained, fail
    with pytest.raises(OSError, match="disk is full"):
        real.save_adapter(policy, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    policy.model.save_pretrained = save
    with torch.no_grad():
        next(w for n, w in policy.named_parameters() if "lora_B" in n).add_(1.0)
    real.save_adapter(policy, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="hold a saved adapter alone, got .*, which holds notes"):
        real.save_adapter(policy, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    with pytest.raises(TypeError, match="`policy` must have a model with an adapter"):
        real.save_adapter(
            CausalLMPolicy(real.load_model(start / "model")[0], end_token=None), folder
        )


def test_a_target_that_is_no_linear_layer_is_named(start):
    model, _ = real.load_model(start / "model")
    for targets in (["c_attn", "qproj"], "qproj"):
        with pytest.raises(ValueError) as refusal:
            real.add_lora(model, rank=2, generator=seeded(), targets=targets)
        assert str(refusal.value) == (
            "`targets` must be 'all-linear' or names of linear layers (c_attn, c_proj, c_fc), got "
            "'qproj'"
        )
    with pytest.raises(ValueError, match="got 'lm_head'"):
        real.add_lora(model, rank=2, generator=seeded(), targets=["lm_head"])


# --- precision and memory ------------------------------------------------------------------------


def test_under_weights_of_bfloat16_training_holds_what_the_memory_table_says(
    start, tmp_path, monkeypatch
):
    held = {}

    def look(policy, *arguments, accelerator):
        (optimizer,) = accelerator._optimizers
        weights = [*policy.parameters()]
        trained = [weight for weight in weights if weight.requires_grad]
        moments = [
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim()
        ]
        held["share"] = sum(w.numel() for w in trained), sum(w.numel() for w in weights)
        for name, tensors in (
            ("weights", weights), ("gradients", [w.grad for w in trained]), ("moments", moments)
        ):  # fmt: skip
            held[name] = sum(t.numel() * t.element_size() for t in tensors)
        held["dtypes"] = {w.dtype for w in trained}, {w.dtype for w in weights}
        save_adapter(policy, *arguments, accelerator=accelerator)

    save_adapter = real.save_adapter
    monkeypatch.setattr(real, "save_adapter", look)
    more = {"lora_rank": 2, "weights": "bfloat16", "learning_rate": 3e-2}
    history = script.main(words(start, tmp_path / "run", **more))[1]
    trained, total = held["share"]
    frozen = total - trained
    table = real.lora_memory(trained / frozen)
    for name in ("weights", "gradients", "moments"):
        assert held[name] == pytest.approx(table[name] * frozen, rel=1e-12)
    assert table["weights"] < 2.6
    assert held["dtypes"] == ({torch.float32}, {torch.float32, torch.bfloat16})
    assert history["rewards/margins"][0] == 0.0
    assert history["rewards/margins"][-1] != 0.0
    # Merged in float32: in bfloat16 a part of the adapter would round away.
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    merged, _ = real.load_model(tmp_path / "run" / "model")
    first, _ = real.load_model(start / "model")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_{}.weight"
    a, b = (weights[name.format(letter)] for letter in "AB")
    base = first.transformer.h[0].attn.c_attn.weight.bfloat16().float()
    ours = merged.transformer.h[0].attn.c_attn.weight
    assert_close(ours, base + 2 * (b @ a).T)
    assert not torch.equal(ours.bfloat16().float(), ours)


def test_a_model_is_loaded_in_another_dtype_with_its_buffers_as_they_are(tmp_path, start):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = real.load_model(start / "model")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    real.save_model(model, tokenizer, tmp_path / "llama")
    half, _ = real.load_model(tmp_path / "llama", dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    pairs = zip(half.buffers(), model.buffers(), strict=True)
    assert [torch.equal(ours, theirs) for ours, theirs in pairs] == [True] * len([*model.buffers()])
    assert_close(half.lm_head.weight.float(), model.lm_head.weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 2}], ids=["all weights", "adapter"])
def test_recomputed_activations_change_no_number(start, tmp_path, monkeypatch, adapter):
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    passes, forward = [], GPT2MLP.forward

    def count(self, *arguments):
        passes.append(torch.is_grad_enabled())
        return forward(self, *arguments)

    monkeypatch.setattr(GPT2MLP, "forward", count)
    histories, counts = [], []
    for recompute in (None, True):
        del passes[:]
        more = {"recompute_activations": recompute, "learning_rate": 1e-2, **adapter}
        histories.append(script.main(words(start, tmp_path / str(recompute), **more))[1])
        counts.append(sum(passes))
    assert histories[0]["loss"] == pytest.approx(histories[1]["loss"], rel=1e-6)
    assert histories[0]["grad_norm"] == pytest.approx(histories[1]["grad_norm"], rel=1e-5)
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--precision", "fp16"], "must be no or bf16, got fp16 (in float16 small gradients are 0"),
        (["--weights", "float16"], "must be float32 or bfloat16, got float16 (in float16 small"),
        (["--weights", "bfloat16"], "`weights` must be float32 where all weights are trained"),
        (["--lora-dropout", "0.05"], "`lora_dropout` must be 0, since policy and reference are"),
        (["--steps", "3", "--epochs", "1"], "`steps` must be left out where there is `epochs`"),
        (["--epochs", "0"], "`epochs` must be a number > 0, got 0.0"),
        (["--warmup", "1.5"], "`warmup` must be a share below 1 or a number of steps, got 1.5"),
        (["--patience", "2"], "`patience` must have pairs to evaluate (--eval-pairs, --eval-share"),
        (["--eval-pairs", "f", "--eval-share", "0.1"], "`eval_pairs` must be left out where"),
        (["--loss-arguments", "[1]"], "must be a JSON object, {\"name\": value}, got '[1]'"),
        (
            ["--loss", "cdpo"],
            "`loss_arguments` must be those of cdpo (label_smoothing), got no lab",
        ),
        (["--log-every", "0"], "argument --log-every: must be a whole number >= 1, got '0'"),
        (["--lora-rank", "-1"], "argument --lora-rank: must be a whole number >= 0, got '-1'"),
        (["--loss", "dop"], "argument --loss: invalid choice: 'dop'"),
        (["--num-train-epochs", "3"], "(did you mean epochs?), got '--num-train-epochs'"),
        (["--lora-rnak=3"], "(did you mean lora_rank?), got '--lora-rnak'"),
    ],
)
def test_what_does_not_fit_is_refused_by_a_sentence(line, message, capfd):
    with pytest.raises(SystemExit) as refusal:
        parse(*NEED, *line)
    assert refusal.value.code == 2
    assert message in capfd.readouterr().err


def test_accelerates_half_precision_with_a_scaler_is_refused(start, tmp_path, monkeypatch):
    class Half:
        mixed_precision = "fp16"

    given = parse(*NEED)
    with pytest.raises(ValueError, match="`precision` must be no or bf16, got fp16 .*since 2020"):
        script.choose_precision(given, Half())


# --- the file ------------------------------------------------------------------------------------


def test_a_file_holds_options_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        """
        model: m
        pairs: p
        output: o
        epochs: 2
        learning-rate: 1e-5   # text to YAML, which wants 1.0e-5
        lora_rank: 8
        lora_targets: [q_proj, v_proj]
        loss: cdpo
        loss_arguments: {label_smoothing: 0.1}
        columns: {prompt: [instruction, input]}
        precision: no
        save_adapter: no
        chat: false
        checkpoints: false
        tensorboard: true
        eval_share: null
        """
    )
    given = parse("--config", str(path))
    assert (given.model, given.epochs, given.steps) == ("m", 2.0, None)
    assert given.learning_rate == 1e-5
    assert given.lora_targets == ["q_proj", "v_proj"]
    assert given.loss_arguments == {"label_smoothing": 0.1}
    assert given.columns == {"prompt": ["instruction", "input"]}
    assert (given.precision, given.save_adapter, given.chat) == ("no", "no", False)
    assert (given.checkpoints, given.tensorboard, given.eval_share) == (False, True, None)
    given = parse(
        "--steps", "5", "--config", str(path), "--lora-rank=4", "--no-tensorboard", "--chat"
    )
    assert (given.epochs, given.steps, given.lora_rank) == (None, 5, 4)  # it takes their place
    assert (given.tensorboard, given.chat) == (False, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 3", "(did you mean steps?), got 'stepz' in "),
        ("per_device_train_batch_size: 3", "(did you mean micro_batch_size?), got 'per_device"),
        ("qqq: 3", "(--help has all), got 'qqq' in "),
        ("config: other.yaml", "got 'config' in "),
        ("steps: three", "argument --steps: must be a whole number >= 1, got 'three'"),
        ("steps: 3.5", "argument --steps: must be a whole number >= 1, got '3.5'"),
        ("tensorboard: 1", "`tensorboard` must be true or false, got 1"),
        ("steps: [1]", "`steps` must be one number or text, got [1]"),
        ("boundary: end", "argument --boundary: invalid choice: 'end'"),
        ("- steps", "`config` must have options and their values, got a list in "),
        ("a: [", "`config` must be a YAML file, got "),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (None, "`config` must be a YAML file, got "),
    ],
)
def test_a_file_with_something_else_is_refused(tmp_path, content, message, capfd):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        parse(*NEED, "--config", str(path))
    assert message in capfd.readouterr().err


def test_the_options_of_a_run_are_kept_and_make_the_same_run_again(start, tmp_path):
    more = {"lora_rank": 2, "loss": "cdpo", "loss_arguments": '{"label_smoothing": 0.1}'}
    line = words(start, tmp_path / "one", steps=None, epochs=0.5, seed=3, **more)
    first = script.main(line)[1]
    path = tmp_path / "one" / "run.yaml"
    kept = yaml.safe_load(path.read_text())
    parser = options.training_parser("a run")
    names = {action.dest for action in parser._actions} - {"help", "config", "output"}
    assert set(kept) == names
    assert (kept["epochs"], kept["steps"], kept["learning_rate"]) == (0.5, None, 1e-3)
    again = script.main(["--config", str(path), "--output", str(tmp_path / "two")])[1]
    assert again == first
    assert (tmp_path / "two" / "run.yaml").read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match=r"beta 0.1 \(now 0.2\)"):
        script.main([*line, "--beta", "0.2"])
    assert yaml.safe_load(path.read_text())["beta"] == 0.1  # a run that is refused leaves it alone


# --- the help ------------------------------------------------------------------------------------


def test_the_help_has_a_text_and_a_default_for_every_option():
    parser = options.training_parser("a run")
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.dest == "help":
            continue
        text = formatter._expand_help(action)
        assert len(text) > 10, action.dest
        assert action.required or "default" in text, action.dest
        assert "None" not in text, action.dest
    titles = [group.title for group in parser._action_groups[2:]]
    assert titles == [
        "data", "training", "evaluation", "adapter", "precision and memory", "output",
    ]  # fmt: skip


def test_names_elsewhere_lead_to_options_that_are_there():
    names = {action.dest for action in options.training_parser("a run")._actions}
    assert set(options.NAMES_ELSEWHERE.values()) <= names
    assert not set(options.NAMES_ELSEWHERE) & names


# --- on pairs that somebody wrote ----------------------------------------------------------------


@pytest.mark.skipif(not REAL_FILE.exists(), reason="the real preference file is not here")
def test_a_run_on_real_pairs_with_a_file_an_adapter_and_evaluation(tmp_path):
    columns = {"prompt": ["instruction", "input"]}
    every = real.load_preferences(REAL_FILE, columns={"prompt": ("instruction", "input")})
    short = sorted(every, key=lambda pair: len(pair.prompt + pair.chosen + pair.rejected))[:24]
    texts = [text for pair in short for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=300)
    model = real.tiny_gpt2(tokenizer, n_positions=256, generator=seeded(), n_heads=2, width=16)
    real.save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": str(tmp_path / "model"), "pairs": str(REAL_FILE), "columns": columns,
                "max_tokens": 60, "epochs": 0.5, "batch_size": 4, "micro_batch_size": 2,
                "lora_rank": 4, "learning_rate": 1e-2, "eval_share": 0.2, "keep_best": True,
                "answer_tokens": 4, "length_window": 4,
            }
        )
    )  # fmt: skip
    output = tmp_path / "run"
    _, history = script.main(["--config", str(tmp_path / "run.yaml"), "--output", str(output)])
    assert all(map(math.isfinite, history["loss"]))
    assert history["eval_loss"][-1] < history["eval_loss"][0]
    made = {path.name for path in output.iterdir()}
    assert {"model", "adapter", "best", "run.yaml", "metrics.csv", "answers.jsonl"} < made


# --- README --------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## A model and pairs of yours\n")[2].partition("\n## ")[0]


def test_the_file_in_readme_is_one_that_the_script_takes(tmp_path):
    block = re.search(r"```yaml\n(.*?)```", SECTION, re.S).group(1)
    path = tmp_path / "run.yaml"
    path.write_text(block, encoding="utf-8")
    given = parse("--config", str(path), "--epochs", "3")
    assert (given.epochs, given.loss, given.lora_rank) == (3.0, "cdpo", 16)
    real.loss_by_name(given.loss, given.loss_arguments)
    assert f"# {len(real.loss_names())} losses of pairs" in block
    for option in re.findall(r"`--([a-z-]+)", SECTION):
        assert option in ("help", *(name.replace("_", "-") for name in vars(given))), option


def test_the_lines_of_trl_in_readme_name_what_trl_has():
    try:
        version("trl")
    except PackageNotFoundError:
        pytest.skip("trl is not installed (it needs Python 3.11)")
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    block = re.search(r"```python\n(.*?)```", SECTION, re.S).group(1)
    assert len([line for line in block.splitlines() if line]) <= 11
    calls = {
        node.func.id: [each.arg for each in node.keywords]
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    for known in (DPOConfig, LoraConfig, DPOTrainer):
        taken = inspect.signature(known).parameters
        assert set(calls.pop(known.__name__)) <= set(taken)
    assert set(calls) == {"load_dataset", "BitsAndBytesConfig"}
    named = ["padding_free", "push_to_hub", "hub_model_id", "report_to", "loss_type"]
    named += ["use_weighting", "ld_alpha", "sync_ref_model", "model_init_kwargs"]
    for name in named:
        assert name in SECTION
        assert name in inspect.signature(DPOConfig).parameters


def run_script(*words):
    command = [sys.executable, str(ROOT / "examples" / "train_dpo.py"), *map(str, words)]
    environment = dict(os.environ, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_what_a_user_gave_wrongly_is_one_sentence_without_a_traceback(tmp_path):
    words = ("--pairs", tmp_path / "pairs.jsonl", "--output", tmp_path / "out")
    done = run_script("--model", tmp_path / "nothing", *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"`--model` must be on this machine, or on the hub, got {tmp_path / 'nothing'}"


def test_a_loss_that_nobody_knows_is_told_its_neighbour():
    with pytest.raises(ValueError, match=r"got 'dop' \(did you mean dpo\?\)"):
        real.loss_by_name("dop", {})
    with pytest.raises(ValueError, match=r"got 'kto' \(it takes single answers with a thumb"):
        real.loss_by_name("kto", {})

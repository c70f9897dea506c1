"""The reference of a real model: its passes, what moves it, its file, and shares of processes."""

import copy
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from dpo_mini.logps import mean_over_tokens
from dpo_mini.losses import dpo_loss

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")

from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_mini import real
from dpo_mini.real import CausalLMPolicy, Preference, train_preferences

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [
    Preference(f"film {n} was", "very good " * (n % 7 + 1), "bad " * (n % 5 + 1)) for n in range(24)
]
END = 0


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


needs_accelerate = pytest.mark.skipif(not installed("accelerate"), reason="no accelerate here")
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
    return CausalLMPolicy(gpt2(tokenizer), end_token=END)


class Mixes(CausalLMPolicy):
    """Each score depends on all rows of its pass and their order: rounding, made large."""

    def token_logps(self, prompts, completions):
        order = torch.arange(1, len(prompts) + 1)
        noise = ((prompts.sum(1) + completions.sum(1)) * order).sum() % 997 / 997
        return super().token_logps(prompts, completions) * (1 + noise)


class Records:
    """A scorer that knows which rows it read; each score is minus the row's number."""

    def __init__(self, pairs):
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rows = {tuple(prompt.tolist()): n for n, prompt in enumerate(pairs[0])}
        self.passes = []

    def parameters(self):
        return iter([self.weight])

    def token_logps(self, prompts, completions):
        rows = [self.rows[tuple(prompt.tolist())] for prompt in prompts]
        half = len(rows) // 2
        assert rows[:half] == rows[half:]
        self.passes.append(rows[:half])
        scores = torch.zeros(completions.shape)
        scores[:, 0] = -torch.tensor(rows).float()
        return scores


def weights_of(policy):
    return [weight for weight in policy.parameters() if weight.requires_grad]


def train(policy, reference, pairs, learning_rate=1e-2, **changes):
    settings = dict(beta=0.1, batches=torch.arange(24).view(3, 8), micro_batch_size=8)
    settings |= {"optimizer": torch.optim.SGD(weights_of(policy), lr=learning_rate)} | changes
    return train_preferences(policy, reference, pairs, dpo_loss, **settings)


# --- the passes of training ----------------------------------------------------------------------


def in_half(policy):
    return type(policy)(copy.deepcopy(policy.model).bfloat16(), end_token=END)


def as_it_is(policy):
    return policy


def mixed(policy):
    return Mixes(policy.model, end_token=END)


KINDS = {
    "float32": (as_it_is, real.full_precision),
    "autocast": (as_it_is, real.bf16_autocast),
    "bfloat16": (in_half, real.full_precision),
    "mixed": (mixed, real.full_precision),
}


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_at_log_2_and_at_rewards_of_0(policy, pairs, kind, size):
    change, precision = KINDS[kind]
    policy = change(policy)
    how = dict(batches=real.shuffled_batches(24, steps=3, batch_size=8, generator=seeded(1)))
    how |= {"micro_batch_size": size, "precision": precision}
    reference = real.reference_logps(policy, pairs, **how)
    # A rate of 0: all three steps are the first of a run.
    history = train(policy, reference, pairs, learning_rate=0.0, **how)
    assert history["rewards/chosen"] == history["rewards/rejected"] == [0.0] * 3
    assert history["rewards/margins"] == history["rewards/accuracies"] == [0.0] * 3
    assert_close(history["loss"], [math.log(2)] * 3, atol=1e-7, rtol=0)
    if kind == "mixed" and size > 1:  # the control: each pair alone
        alone = real.reference_logps(policy, pairs, precision=precision)
        history = train(policy, tuple(alone), pairs, learning_rate=0.0, **how)
        assert min(abs(margin) for margin in history["rewards/margins"]) > 1e-3


def test_a_pair_is_read_in_the_pass_in_which_training_first_meets_it(pairs):
    batches = torch.tensor([[5, 2, 9, 1, 7], [9, 2, 0, 5, 1], [7, 5, 1, 9, 2], [3, 3, 7, 2, 9]])
    scorer = Records(pairs)
    scores = real.reference_logps(scorer, pairs, batches=batches, micro_batch_size=2)
    assert scorer.passes == [[5, 2], [9, 1], [7], [0, 5], [3, 3]]
    met = [0, 1, 2, 3, 5, 7, 9]
    for column in scores:
        assert column[met].tolist() == [-float(row) for row in met]
        assert column.isnan().sum() == 24 - len(met)
    # Without batches: all of them, in their order.
    scorer = Records(pairs)
    scores = real.reference_logps(scorer, pairs, micro_batch_size=10)
    assert scorer.passes == [[*range(10)], [*range(10, 20)], [*range(20, 24)]]
    assert scores[0].tolist() == [-float(row) for row in range(24)]


def test_other_passes_than_those_of_the_reference_are_refused(policy, pairs):
    batches = torch.arange(24).view(3, 8)
    scored = real.reference_logps(policy, pairs, batches=batches, micro_batch_size=4)
    assert scored.micro_batch_size == 4
    one = {"micro_batch_size": None, "batches": batches}
    assert len(train(policy, scored, pairs, **one)["loss"]) == 3
    part = real.reference_logps(policy, pairs, batches=batches[:2], micro_batch_size=4)
    alone, passes = real.reference_logps(policy, pairs), "`reference` must be read in the passes of"
    cases = [
        (scored, {"micro_batch_size": 8}, "`micro_batch_size` must be 4 like .*, got 8"),
        (scored, {"batches": batches.flip(1)}, f"{passes} .*, got row 0 with other pairs beside"),
        (scored, {"batches": batches[:, :6]}, f"{passes} .*, got row 4 with other pairs beside"),
        (part, {}, f"{passes} .*same batches.*, got row 16 with none, since it was not read"),
    ]
    for reference, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            train(policy, reference, pairs, **{**one, **changes})
    two = SimpleNamespace(
        num_processes=2, process_index=0, mixed_precision="no", distributed_type="MULTI_GPU",
        gradient_accumulation_steps=1,
    )  # fmt: skip
    threes = real.reference_logps(policy, pairs, batches=batches, micro_batch_size=3)
    with pytest.raises(ValueError, match=f"{passes} .*and accelerator.*, got row 3 with other"):
        train(policy, threes, pairs, **{**one, "accelerator": two})
    # Passes of one pair are the same in every order; a part of the batches has passes of all.
    train(policy, alone, pairs, **{**one, "batches": batches.flip(1)})
    train(policy, scored, pairs, **{**one, "batches": batches[1:]})


def test_bad_batches_are_refused_before_a_pass(policy, pairs):
    for batches, message in (
        (torch.tensor([[24]]), r"`batches` must be in 0\.\.23, got 24"),
        (torch.arange(24), r"`batches` must be a non-empty \[steps, B\], got shape \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            real.reference_logps(policy, pairs, batches=batches)
    three = SimpleNamespace(num_processes=3)
    with pytest.raises(ValueError, match="`batches` must have a multiple of 3 rows .*, got 8"):
        real.reference_logps(policy, pairs, batches=torch.arange(24).view(3, 8), accelerator=three)


# --- a reference that moves ----------------------------------------------------------------------


def adapted(tokenizer, **settings):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers to peft
        return CausalLMPolicy(get_peft_model(gpt2(tokenizer), config), end_token=END)


READS = r"`reference` must read no weight that is trained .*, got one that reads \S*"


@needs_peft
@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:UserWarning")
def test_what_is_trained_beside_an_adapter_is_named(tokenizer, pairs, tmp_path):
    biased = adapted(tokenizer, bias="all")
    unfrozen = adapted(tokenizer)
    unfrozen.model.base_model.model.transformer.ln_f.weight.requires_grad_(True)
    for policy, name in ((biased, "h.0.ln_1.bias"), (unfrozen, "ln_f.weight")):
        start = {name: weight.clone() for name, weight in policy.named_parameters()}
        with pytest.raises(ValueError, match=READS + name):
            train(policy, real.adapter_off(policy), pairs, checkpoints=tmp_path / "none")
        assert all(torch.equal(start[n], weight) for n, weight in policy.named_parameters())
        assert real.load_checkpoint(tmp_path / "none") is None
        # The cure: scored before anything is trained.
        scored = real.reference_logps(real.adapter_off(policy), pairs, micro_batch_size=8)
        assert train(policy, scored, pairs)["rewards/margins"][0] == 0.0


@needs_peft
def test_without_its_adapter_a_policy_may_be_read_beside_itself(tokenizer, pairs):
    """Also with a layer's copy in the adapter, which `adapter_off` exchanges for the original."""
    for policy in (adapted(tokenizer), adapted(tokenizer, modules_to_save=["ln_f"])):
        true = real.reference_logps(policy, pairs, micro_batch_size=8)
        other = copy.deepcopy(policy)
        history = train(policy, real.adapter_off(policy), pairs)
        assert history == train(other, true, pairs)
        assert history["rewards/margins"][2] != 0.0
        assert [len(weights_of(p)) for p in (policy, other)] == [len(weights_of(policy))] * 2


class Wraps:
    """A user's scorer around a model, which need not say what its weights are."""

    def __init__(self, policy, parameters, gradient=True):
        self.policy, self.parameters, self.gradient = policy, parameters, gradient
        self.graphs = []  # whether a pass kept what a backward pass needs

    def token_logps(self, prompts, completions):
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            scores = self.policy.token_logps(prompts, completions)
        self.graphs.append(scores.requires_grad)
        return scores


def test_a_reference_with_weights_of_the_policy_is_refused(policy, pairs, tmp_path):
    shares = "`reference` must be .*, got a model that shares weights with .*, which trains model."
    moved = "`reference` must stay as it is .*, got one whose log-probabilities moved by .* in a st"
    anything = torch.nn.Linear(1, 1).parameters
    for reference, message in (
        (CausalLMPolicy(policy.model, end_token=END), shares),
        (Wraps(policy, policy.parameters), shares),
        (Wraps(policy, lambda: [torch.nn.Parameter(torch.ones(1))]), READS + "transformer.wte"),
        (Wraps(policy, lambda: [*anything()], gradient=False), moved),
    ):
        with pytest.raises(ValueError, match=message):
            train(policy, reference, pairs, checkpoints=tmp_path / "none", checkpoint_every=1)
        assert real.load_checkpoint(tmp_path / "none") is None


def test_a_reference_that_a_step_of_rate_0_cannot_move_is_asked_after_the_next(policy, pairs):
    reference = Wraps(policy, lambda: [torch.nn.Parameter(torch.ones(1))], gradient=False)
    steps = []
    with pytest.raises(ValueError, match="`reference` must stay as it is"):
        train(policy, reference, pairs, schedule=float, logs=[lambda step, _: steps.append(step)])
    assert steps == [0]


def test_a_reference_that_draws_is_refused(policy, pairs):
    shaky = Wraps(copy.deepcopy(policy), copy.deepcopy(policy).parameters)
    draws, read = seeded(), shaky.token_logps
    shaky.token_logps = lambda *texts: read(*texts) - torch.rand((), generator=draws)
    with pytest.raises(ValueError, match="`reference` must stay .* copy in evaluation mode"):
        train(policy, shaky, pairs)


def test_in_shards_a_model_beside_the_policy_is_refused(policy, pairs):
    sharded = SimpleNamespace(
        num_processes=1, process_index=0, mixed_precision="no", distributed_type="FSDP",
        gradient_accumulation_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`reference` must be what reference_logps gave under FS"):
        train(policy, copy.deepcopy(policy), pairs, accelerator=sharded)


def test_a_copy_passes_also_one_that_shares_what_is_frozen(policy, pairs):
    policy.model.transformer.wte.weight.requires_grad_(False)
    scored = real.reference_logps(policy, pairs, micro_batch_size=8)
    whole, sparing, other = (copy.deepcopy(policy) for _ in range(3))
    sparing.model.set_input_embeddings(policy.model.transformer.wte)
    true = train(other, scored, pairs)
    wrapped = Wraps(whole, whole.parameters)
    for reference in (whole, sparing, wrapped):
        kept = [weight.requires_grad for weight in reference.parameters()]
        history = train(copy_around(policy), reference, pairs)
        if reference is not wrapped:
            assert history == true
        for name, values in history.items():  # what has only `token_logps` is read in rows
            assert values == pytest.approx(true[name], rel=1e-5, abs=1e-7)
        assert history["rewards/margins"][0] == 0
        assert [weight.requires_grad for weight in reference.parameters()] == kept
    assert wrapped.graphs == [False] * (3 + 1)  # three steps, and once more after the first


def copy_around(policy):
    """A copy that shares the frozen embedding."""
    other = copy.deepcopy(policy)
    other.model.set_input_embeddings(policy.model.transformer.wte)
    return other


# --- the file of the reference -------------------------------------------------------------------


def counted(policy):
    """The scorer itself, and a list that grows with every pass of it."""
    passes, read = [], policy.token_logps

    def token_logps(prompts, completions):
        passes.append(len(prompts) // 2)
        return read(prompts, completions)

    policy.token_logps = token_logps
    return policy, passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_reference_is_read_and_not_scored(tokenizer, pairs, tmp_path, dtype):
    policy, passes = counted(CausalLMPolicy(gpt2(tokenizer, dtype), end_token=END))
    batches = torch.arange(24).view(3, 8)[:2]
    how = dict(batches=batches, micro_batch_size=3, reduce=mean_over_tokens)
    path = tmp_path / "new" / "reference.safetensors"
    first = real.reference_logps(policy, pairs, cache=path, **how)
    assert passes == [3, 3, 2] * 2
    content = path.read_bytes()
    again = real.reference_logps(policy, pairs, cache=path, **how)
    assert len(passes) == 6
    assert path.read_bytes() == content
    for one, other in zip(first, again, strict=True):
        assert_close(one, other, atol=0, rtol=0, equal_nan=True)
    names = ("reduce", "precision", "micro_batch_size")
    assert [getattr(again, name) for name in names] == [getattr(first, name) for name in names]
    assert torch.equal(again.companions, first.companions)


def test_whatever_decides_a_score_is_compared(policy, pairs, tmp_path):
    policy, passes = counted(policy)
    path = tmp_path / "reference.safetensors"

    def scored(pairs=pairs, **how):
        del passes[:]
        found = real.reference_logps(policy, pairs, cache=path, **{"micro_batch_size": 8, **how})
        expected = real.reference_logps(policy, pairs, **{"micro_batch_size": 8, **how})
        anew = len(passes)
        assert all(map(torch.equal, found, expected))
        assert real.reference_logps(policy, pairs, cache=path, **{"micro_batch_size": 8, **how})
        assert len(passes) == anew
        return anew

    assert scored() == 2 * 3
    assert scored() == 3  # those of the second alone
    others = tuple(tokens[torch.arange(23, -1, -1)] for tokens in pairs)
    assert scored(pairs=others) == 6
    assert scored(precision=real.bf16_autocast) == 6
    assert scored(reduce=mean_over_tokens) == 6
    assert scored(micro_batch_size=12) == 4
    assert scored(batches=torch.arange(24).flip(0).view(3, 8)) == 6
    assert scored() == 6
    with torch.no_grad():  # the last bit of one weight
        weight = policy.model.transformer.h[1].mlp.c_proj.bias
        weight[3] = torch.nextafter(weight[3], torch.tensor(1.0))
    assert scored() == 6
    policy.model.config.layer_norm_epsilon = 1e-3  # no weight, and read by every layer
    assert scored() == 6


@needs_peft
def test_with_and_without_its_adapter_a_model_has_two_references(tokenizer, pairs, tmp_path):
    policy, path = adapted(tokenizer), tmp_path / "reference.safetensors"
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.add_(1.0 if "lora_B" in name else 0.0)
    for reference in (policy, real.adapter_off(policy), policy):
        true = real.reference_logps(reference, pairs)
        assert all(map(torch.equal, real.reference_logps(reference, pairs, cache=path), true))
    with policy.model.disable_adapter():
        true = real.reference_logps(policy, pairs)
        assert all(map(torch.equal, real.reference_logps(policy, pairs, cache=path), true))
    other = copy.deepcopy(policy)
    for part in other.modules():
        if hasattr(part, "scaling") and isinstance(part.scaling, dict):
            part.scaling = {"default": 5.0}
    true = real.reference_logps(other, pairs)
    assert not torch.equal(true[0], real.reference_logps(policy, pairs, cache=path)[0])
    assert all(map(torch.equal, real.reference_logps(other, pairs, cache=path), true))


def test_a_file_of_something_else_is_not_written_over(policy, pairs, tmp_path):
    path = tmp_path / "reference.safetensors"
    real.reference_logps(policy, pairs, cache=path)
    whole = path.read_bytes()
    model = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(3)}, model)
    for content in (whole[:-7], whole[:5], b"", b"text", model.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"`cache` must be a new file .*, got {path}, which"):
            real.reference_logps(policy, pairs, cache=path)
        assert path.read_bytes() == content


def example():
    specification = importlib.util.spec_from_file_location(
        "train_dpo", ROOT / "examples" / "train_dpo.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def on_the_cpu(monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def command_line(folder, output, **more):
    given = {"model": folder / "start", "pairs": folder / "pairs.jsonl", "output": folder / output}
    given |= {"steps": 3, "batch-size": 8, "micro-batch-size": 2, "learning-rate": 1e-3, **more}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@needs_accelerate
@needs_peft
@pytest.mark.parametrize("rank", [0, 2], ids=["all weights", "adapter"])
def test_a_finished_run_that_is_started_again_reads_the_model_not_once(
    policy, tokenizer, tmp_path, monkeypatch, rank, on_the_cpu, capfd
):
    real.save_model(policy.model, tokenizer, tmp_path / "start")
    real.save_preferences(tmp_path / "pairs.jsonl", PAIRS)
    passes, read = [], CausalLMPolicy.pair_token_logps

    def pair_token_logps(self, *texts):
        passes.append(torch.is_grad_enabled())
        return read(self, *texts)

    monkeypatch.setattr(CausalLMPolicy, "pair_token_logps", pair_token_logps)
    arguments = command_line(tmp_path, "run", **{"lora-rank": rank})
    _, history = example().main(arguments)
    assert passes == [False] * 12 + [True] * 12
    assert history["rewards/margins"][0] == 0.0
    left = files(tmp_path / "run")
    assert "reference.safetensors" in left
    _, again = example().main(arguments)
    assert len(passes) == 24
    assert again == history
    assert files(tmp_path / "run") == left
    capfd.readouterr()


# --- several processes, and weights in shards ----------------------------------------------------

TOGETHER = '''
"""One of two processes: a run with whole weights, the same again, and one in shards."""
import gc
import json
import os
import sys
import warnings
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])

import accelerate
import train_dpo
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from dpo_mini import real
from torch.distributed.tensor import DTensor

folder, runs, found = Path(sys.argv[2]), json.loads(sys.argv[3]), {}
passes, unsharded, live = [], [], {}
read = real.CausalLMPolicy.pair_token_logps
backward, prepare = accelerate.Accelerator.backward, accelerate.Accelerator.prepare


def held():
    """How many numbers all floating tensors of this process hold."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
        gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    for tensor in tensors + gradients:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.dtype == torch.float32:
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes() // 4
    return sum(storages.values())


def pair_token_logps(self, prompts, *answers):
    passes.append((torch.is_grad_enabled(), prompts.tolist()))
    return read(self, prompts, *answers)


def after_backward(self, loss):
    backward(self, loss)
    live.setdefault("after a backward pass", held())


def after_prepare(self, model, optimizer):
    whole = {id(w): w.numel() for w in model.parameters()}
    model, optimizer = prepare(self, model, optimizer)
    if self.distributed_type == "FSDP" and "shares" not in live:
        weights = dict(model.named_parameters())
        assert all(isinstance(weight, DTensor) for weight in weights.values())
        live["shares"] = {n: [w.to_local().numel(), w.numel()] for n, w in weights.items()}
        live["after prepare"] = held()

        def look(*arguments):
            whole = [n for n, w in model.named_parameters() if not isinstance(w, DTensor)]
            unsharded.append(sorted(whole))

        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(look)
            layer.mlp.register_full_backward_pre_hook(look)
    return model, optimizer


real.CausalLMPolicy.pair_token_logps = pair_token_logps
for name in ("whole", "again", "shards"):
    if name == "shards":
        os.environ.update(json.loads(sys.argv[4]))
        AcceleratorState._reset_state(True)
        PartialState(cpu=True)
        # accelerate deals out weights on GPUs alone; gloo's processes do for one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        accelerate.Accelerator.backward = after_backward
        accelerate.Accelerator.prepare = after_prepare
    del passes[:]
    history = train_dpo.main(runs[name])[1]  # and nobody keeps the policy
    found[name] = {"passes": passes[:], "history": history}
found["shards"] |= {"unsharded": unsharded, **live}
rank = os.environ["RANK"]
(folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
torch.distributed.destroy_process_group()
'''


def llama(vocab_size):
    """Four layers without biases: no gradient is 0 but for rounding, which Adam would enlarge."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4)
        heads = dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, max_position_embeddings=64, tie_word_embeddings=True,
                bos_token_id=END, eos_token_id=END, **sizes, **heads,
            )
        ).eval()  # fmt: skip


def sharding():
    """What `accelerate launch --config_file configs/fsdp_8.yaml` puts into the environment."""
    from accelerate.commands import launch as command

    path = str(ROOT / "configs" / "fsdp_8.yaml")
    given = command.launch_command_parser().parse_args(["--config_file", path, "script.py"])
    made = command.prepare_multi_gpu_env(command._validate_launch_command(given)[0])
    return {key: made[key] for key in made if "FSDP" in key}


@pytest.fixture(scope="module")
def two_processes(tokenizer, tmp_path_factory):
    """The folder of three runs of two processes, and what each of the two saw."""
    pytest.importorskip("accelerate", reason="no accelerate here")
    folder = tmp_path_factory.mktemp("two")
    real.save_model(llama(len(tokenizer)), tokenizer, folder / "start")
    real.save_preferences(folder / "pairs.jsonl", PAIRS)
    (folder / "together.py").write_text(TOGETHER, encoding="utf-8")
    whole = command_line(folder, "whole")
    runs = {"whole": whole, "again": whole}
    runs["shards"] = [*command_line(folder, "shards"), "--no-checkpoints"]
    command = [sys.executable, str(folder / "together.py"), str(ROOT / "examples"), str(folder)]
    command += [json.dumps(runs), json.dumps(sharding())]
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
    return folder, [json.loads((folder / f"found-{n}.json").read_text()) for n in range(2)]


@pytest.fixture
def alone(two_processes, on_the_cpu, capfd):
    """The same run of one process: its folder and its history."""
    folder, _ = two_processes
    _, history = example().main(command_line(folder, "one"))
    capfd.readouterr()
    return folder / "one", history


def test_each_process_scores_its_share(two_processes, tokenizer):
    _, seen = two_processes
    every_row = sorted(
        tuple(row) for row in real.encode(PAIRS, tokenizer, max_tokens=64)[0].tolist()
    )
    assert len({*every_row}) == 24
    for run in ("whole", "shards"):
        shares = []
        for process in seen:
            scoring = [rows for with_gradient, rows in process[run]["passes"] if not with_gradient]
            training = [rows for with_gradient, rows in process[run]["passes"] if with_gradient]
            assert scoring == training  # one epoch: the very passes
            assert [len(rows) for rows in scoring] == [2] * 6
            shares += [tuple(row) for rows in scoring for row in rows]
            assert process[run]["history"]["rewards/margins"][0] == 0.0
        assert sorted(shares) == every_row
    for process in seen:
        assert process["again"]["passes"] == []
        assert process["again"]["history"] == process["whole"]["history"]


def test_in_shards_a_run_is_that_of_one_process(two_processes, alone):
    folder, seen = two_processes
    one, history = alone
    for run in ("whole", "shards"):
        for process in seen:
            for name, values in process[run]["history"].items():
                # float32, whose sums run in another order: some twenty roundings
                assert_close(values, history[name], atol=1e-6, rtol=3e-6)
        trained, true, start = (
            load_file(path / "model.safetensors")
            for path in (folder / run / "model", one / "model", folder / "start")
        )
        assert trained.keys() == true.keys() == start.keys()
        for name, weight in true.items():
            # Sums of gradients in another order: 1e-6 of a step, three steps of 1e-3.
            assert_close(trained[name], weight, atol=1e-5, rtol=0)
            assert (weight - start[name]).abs().max() > 1e-3 / 2
    assert not (folder / "shards" / "checkpoints").exists()


def test_no_process_ever_holds_more_than_its_share_and_one_layer(two_processes):
    folder, seen = two_processes
    start = load_file(folder / "start" / "model.safetensors")
    n_all = sum(weight.numel() for weight in start.values())
    ends = {"model.embed_tokens.weight", "model.norm.weight"}  # tied: read first and last
    for process in (run["shards"] for run in seen):
        assert sorted(process["shares"]) == sorted(start)
        assert all(2 * mine == whole for mine, whole in process["shares"].values())
        # Of the layers one at a time is whole, in scoring, forwards and backwards.
        assert len(process["unsharded"]) >= 3 * 6 * 4  # a few more look whether it is causal
        for whole in process["unsharded"]:
            layers = {name.split(".")[2] for name in {*whole} - ends}
            assert len(layers) == 1
            assert layers < {"0", "1", "2", "3"}
        # The originals are gone, and a gradient is in shards after every pass.
        assert process["after prepare"] < 0.6 * n_all
        assert process["after a backward pass"] < 1.1 * n_all

"""Pairs read in one row: the scores and gradients of rows of their own, on many architectures."""

import os

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")

import transformers

from dpo_mini import real
from dpo_mini.logps import PAD
from dpo_mini.real import CausalLMPolicy
from dpo_mini.real.reading import pair_token_logps, reads_in_one_row

V = 40
SMALL = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
GPT2_LIKE = dict(
    vocab_size=V, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
)
OPT = dict(
    vocab_size=V, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=24, word_embed_proj_dim=16, pad_token_id=0,
)  # fmt: skip
IN_ONE_ROW = {
    "GPT2LMHeadModel": ("GPT2Config", GPT2_LIKE),
    "GPTJForCausalLM": ("GPTJConfig", GPT2_LIKE | {"rotary_dim": 4}),
    "LlamaForCausalLM": ("LlamaConfig", SMALL),
    "MistralForCausalLM": ("MistralConfig", GROUPED),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", GROUPED),
    "GemmaForCausalLM": ("GemmaConfig", GROUPED),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED | {"final_logit_softcapping": 0.5}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GROUPED),
    "PhiForCausalLM": ("PhiConfig", SMALL),
    "Phi3ForCausalLM": ("Phi3Config", SMALL),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL),
    "OPTForCausalLM": ("OPTConfig", OPT),
    "GraniteForCausalLM": ("GraniteConfig", GROUPED | {"logits_scaling": 3.0}),
    "CohereForCausalLM": ("CohereConfig", SMALL | {"logit_scale": 0.3}),
}
IN_ROWS = {
    "BloomForCausalLM": ("BloomConfig", dict(vocab_size=V, hidden_size=16, n_layer=2, n_head=2)),
    "MptForCausalLM": ("MptConfig", dict(vocab_size=V, d_model=16, n_layers=2, n_heads=2)),
    "MambaForCausalLM": (
        "MambaConfig",
        dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, state_size=4),
    ),
}


def policy_of(name):
    config, settings = (IN_ONE_ROW | IN_ROWS)[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    with torch.no_grad():  # as far from uniform as a trained model is
        for weight in model.parameters():
            weight.mul_(8.0) if weight.dim() > 1 else None
    return CausalLMPolicy(model.double(), end_token=None)


@pytest.fixture
def pairs(generator):
    """Prompts, chosen and rejected of 1 to 8 tokens."""

    def texts():
        lengths = [*torch.randint(1, 9, (5,), generator=generator).tolist(), 1, 8]
        rows = [torch.randint(3, V, (n,), generator=generator) for n in lengths]
        return [rows[n] for n in torch.randperm(7, generator=generator)]

    padded = pad_sequence([*texts(), *texts(), *texts()], batch_first=True, padding_value=PAD)
    return padded.chunk(3)


@pytest.mark.parametrize("name", IN_ONE_ROW)
def test_one_row_gives_the_scores_and_gradients_of_rows_of_their_own(name, pairs):
    policy = policy_of(name)
    prompts, *answers = pairs
    weights = list(policy.parameters())
    apart = policy.token_logps(prompts.repeat(2, 1), torch.cat(answers))
    together = torch.cat(pair_token_logps(policy.model, *pairs))
    tolerance = 1e-6 if name.startswith("Gemma2") else 1e-11  # its softcap is float32
    assert apart.min() < -4  # from log 40 = 3.7 on: not uniform
    assert_close(together, apart, atol=tolerance, rtol=0)
    pull = torch.linspace(-1, 1, apart.numel(), dtype=torch.float64).view_as(apart)
    gradients = [
        torch.autograd.grad((pull * scored).sum(), weights, allow_unused=True)
        for scored in (apart, together)
    ]
    used = [both for both in zip(*gradients, strict=True) if both[0] is not None]
    largest = max(theirs.abs().max().item() for theirs, _ in used)
    for theirs, ours in used:  # the norms of most models are float32
        assert_close(ours, theirs, atol=1e-6 * largest, rtol=0)
    assert reads_in_one_row(policy, *pairs)


@pytest.mark.parametrize("name", IN_ROWS)
def test_the_probe_finds_models_that_cannot(name, pairs):
    assert not reads_in_one_row(policy_of(name), *pairs)


def test_the_output_layer_sees_what_is_predicted_and_no_more(pairs):
    policy, seen = policy_of("LlamaForCausalLM"), []
    policy.model.lm_head.register_forward_hook(lambda *given: seen.append(given[2].shape))
    pair_token_logps(policy.model, *pairs)
    assert seen == [(1, int(sum((answer != PAD).sum() for answer in pairs[1:])), V)]


def widths_read(policy, pairs):
    """How many rows the model reads at once, pass by pass."""
    seen = []
    embed = policy.model.get_input_embeddings()
    hook = embed.register_forward_hook(lambda *given: seen.append(len(given[1][0])))
    scored = torch.cat(policy.pair_token_logps(*pairs))
    hook.remove()
    return seen[-1], scored


def test_pairs_are_read_in_one_row_where_that_works(pairs):
    for name, rows in {"LlamaForCausalLM": 7, "BloomForCausalLM": 14}.items():
        policy = policy_of(name)
        n_rows, scored = widths_read(policy, pairs)
        assert n_rows == rows
        apart = policy.token_logps(pairs[0].repeat(2, 1), torch.cat(pairs[1:]))
        assert_close(scored, apart, atol=1e-11, rtol=0)


@pytest.mark.parametrize("fits", [True, False])
def test_a_window_shorter_than_the_row_is_read_in_rows(pairs, fits):
    longest = int((torch.cat(pairs, 1) != PAD).sum(1).max())
    _, settings = IN_ONE_ROW["MistralForCausalLM"]
    config = transformers.MistralConfig(**settings, sliding_window=longest if fits else 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(config)
    policy = CausalLMPolicy(model.double(), end_token=None)
    n_rows, scored = widths_read(policy, pairs)
    assert n_rows == (7 if fits else 14)
    apart = policy.token_logps(pairs[0].repeat(2, 1), torch.cat(pairs[1:]))
    assert_close(scored, apart, atol=1e-11, rtol=0)


def test_an_adapter_and_what_it_is_beside_are_read_in_one_row_too(pairs):
    pytest.importorskip("peft", reason="no peft here")
    model = policy_of("LlamaForCausalLM").model
    draws = torch.Generator().manual_seed(0)
    adapted = CausalLMPolicy(real.add_lora(model, rank=2, generator=draws), end_token=None)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight.add_(0.3) if "lora_B" in name else None
    for policy in (adapted, real.adapter_off(adapted)):
        embed, seen = model.get_input_embeddings(), []
        hook = embed.register_forward_hook(lambda *given: seen.append(len(given[1][0])))  # noqa: B023
        scored = torch.cat(policy.pair_token_logps(*pairs))
        hook.remove()
        assert seen[-1] == 7
        apart = policy.token_logps(pairs[0].repeat(2, 1), torch.cat(pairs[1:]))
        assert_close(scored, apart, atol=1e-11, rtol=0)


def test_positions_stay_inside_the_context(pairs):
    """A row of 8 + 8 + 8 tokens is longer than this context, and each answer is not."""
    config = transformers.GPT2Config(**GPT2_LIKE | {"n_positions": 15})
    policy = CausalLMPolicy(transformers.GPT2LMHeadModel(config).double(), end_token=None)
    assert reads_in_one_row(policy, *pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_knows_the_rounding_of_each_precision(dtype, pairs):
    for name, fits in {"LlamaForCausalLM": True, "BloomForCausalLM": False}.items():
        policy = policy_of(name)
        policy.model.to(dtype)
        assert reads_in_one_row(policy, *pairs) == fits


def test_who_changes_how_one_answer_is_read_is_not_passed_over(pairs):
    class Doubled(CausalLMPolicy):
        def token_logps(self, prompts, completions):
            return 2 * super().token_logps(prompts, completions)

    plain = policy_of("LlamaForCausalLM")
    doubled = Doubled(plain.model, end_token=None)
    once = real.reference_logps(plain, pairs, micro_batch_size=7)
    twice = real.reference_logps(doubled, pairs, micro_batch_size=7)
    for one, two in zip(once, twice, strict=True):
        assert_close(two, 2 * one)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_the_same_answer_twice_is_a_tie_to_the_last_bit(pairs, name):
    policy = policy_of(name)
    policy.model.float()
    prompts, chosen, rejected = pairs
    rejected = torch.where(torch.arange(7)[:, None] % 2 == 0, chosen, rejected)
    first, second = policy.pair_token_logps(prompts, chosen, rejected)
    assert torch.equal(first[::2], second[::2])
    weights = [w for w in policy.parameters() if w.requires_grad]
    margin = (first - second)[::2].sum()
    for slope in torch.autograd.grad(margin, weights, allow_unused=True):
        assert slope is None or not slope.any()

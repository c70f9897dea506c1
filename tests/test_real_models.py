"""What a model must be: read alike in both modes, causal, finite, and whole when it is loaded."""

import copy
import csv
import os
import socket
import warnings
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from dpo_mini.logps import PAD
from dpo_mini.losses import dpo_loss

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")

import transformers
from safetensors.torch import load_file, save_file

from dpo_mini import real
from dpo_mini.real import CausalLMPolicy

LLAMA = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, attention_dropout=0.5,
)  # fmt: skip
GPT2 = dict(n_positions=64, n_layer=2, n_head=2, n_embd=16)
BERT = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
ALL = dict(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, hidden_dropout=0.5)
# Each with dropout, in the names that its config has for it. PhiMoE and Mixtral draw in their
# routers, Persimmon's attention reads its dropout from the config, OPT drops layers.
CONFIGS = {
    "GPT2": GPT2 | dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    "GPTNeo": dict(
        hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=8, resid_dropout=0.5, embed_dropout=0.5,
        attention_dropout=0.5,
    ),
    "GPTNeoX": BERT | ALL,
    "Bloom": dict(hidden_size=16, n_layer=2, n_head=2) | ALL,
    "Mpt": dict(
        d_model=16, n_layers=2, n_heads=2, expansion_ratio=2, max_seq_len=64, resid_pdrop=0.5,
        emb_pdrop=0.5,
    ),
    "OPT": dict(
        hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=64, layerdrop=0.5,
    )
    | ALL,
    "Llama": LLAMA,
    "Mistral": LLAMA | dict(sliding_window=4),
    "Qwen3": LLAMA | dict(head_dim=8),
    "Gemma2": LLAMA | dict(head_dim=8, sliding_window=4),
    "Phi3": LLAMA | dict(resid_pdrop=0.5, embd_pdrop=0.5),
    "Phi": LLAMA | dict(resid_pdrop=0.5, embd_pdrop=0.5),
    "Starcoder2": LLAMA | dict(residual_dropout=0.5, embedding_dropout=0.5),
    "Persimmon": BERT | dict(attention_dropout=0.5, hidden_dropout=0.5),
    "Mixtral": LLAMA | dict(num_local_experts=4, router_jitter_noise=0.5),
    "Phimoe": LLAMA | dict(num_local_experts=4, router_jitter_noise=0.5, input_jitter_noise=0.5),
    "Mamba": dict(hidden_size=16, state_size=4, num_hidden_layers=2),
    "Rwkv": dict(
        hidden_size=16, attention_hidden_size=16, intermediate_size=32, num_hidden_layers=2
    ),
}  # fmt: skip
HEADS = {"GPT2": "GPT2LMHeadModel"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name, **changes):
    config = getattr(transformers, f"{name}Config")
    head = getattr(transformers, HEADS.get(name, f"{name}ForCausalLM"))
    sizes = CONFIGS[name] | dict(vocab_size=260, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = head(config(**sizes | changes))
        with torch.no_grad():  # as far from uniform as a trained model is
            for weight in model.parameters():
                weight.normal_(0, 0.2) if weight.dim() > 1 else None
    return model


@pytest.fixture(autouse=True)
def one_thread_no_network_no_global_state(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return real.train_tokenizer(["a good film"], vocab_size=260)


def rows(*lists, width=1):
    width = max(width, *map(len, lists))
    return torch.tensor([[*tokens, *[PAD] * (width - len(tokens))] for tokens in lists])


PROMPTS = rows([5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15])
CHOSEN = rows([20, 21, 22, 0], [23, 0], [24, 0], width=6)
REJECTED = rows([30, 0], [31, 32, 33, 34, 35, 0], [36, 37, 0])
PAIRS = (PROMPTS, CHOSEN, REJECTED)


def train(policy, **changes):
    settings = dict(beta=0.1, batches=torch.tensor([[0, 1, 2]]), micro_batch_size=3)
    settings |= dict(optimizer=torch.optim.SGD(policy.parameters(), lr=0.1))
    reference = real.reference_logps(policy, PAIRS, micro_batch_size=3)
    return real.train_preferences(policy, reference, PAIRS, dpo_loss, **settings | changes)


def recompute(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name
        model.gradient_checkpointing_enable()


# --- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_model_in_evaluation_mode_row_by_row(name):
    model = make(name)
    plain, config = copy.deepcopy(model).eval(), model.config.to_dict()
    policy = CausalLMPolicy(model, end_token=0)
    assert model.training
    for mode in (True, False):
        found = policy.train(mode).logps(*PAIRS[:2])
        for score, prompt, answer in zip(found, PROMPTS, CHOSEN, strict=True):
            prompt, answer = prompt[prompt != PAD], answer[answer != PAD]
            logits = plain(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits
            logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            assert_close(score, logps.gather(1, answer[:, None]).sum(), atol=1e-5, rtol=0)
    assert model.config.to_dict() == config  # what save_model writes


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_drawn_while_a_model_trains(name):
    policy = CausalLMPolicy(make(name), end_token=0)
    before = torch.random.get_rng_state()
    first, second = (policy.token_logps(*PAIRS[:2]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_models_would_draw_in_their_own_training_mode():
    """The control of the two tests above: these draw even if each dropout of a layer is 0."""
    for name in ("Persimmon", "Mixtral"):
        model = make(name).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        first, second = (model(input_ids=PROMPTS[2:]).logits for _ in range(2))
        assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_activations_are_read_twice_and_have_the_same_gradient(name):
    runs, found = [], []
    for on in (False, True):
        model = make(name)
        if on:
            recompute(model)
        policy = CausalLMPolicy(model, end_token=0)
        policy.token_logps(*PAIRS[:2])  # the first text is a test of the model
        layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
        first = next(part for part in layers[1].modules() if not list(part.children()))
        seen = []
        first.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        loss = policy.logps(*PAIRS[:2]).sum()
        loss.backward()
        runs.append(len(seen))
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        found.append((loss.detach(), torch.cat([grad.flatten() for grad in grads])))
    assert runs == [1, 2]
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-6)
    assert found[0][1].norm() > 1e-2


def test_every_part_of_a_layer_that_recomputes_is_left_twice():
    """Torch alone leaves the second pass early, before the end of the MLP: its count is 1."""
    counts = []
    for on in (False, True):
        model, ended = make("Llama"), []
        if on:
            recompute(model)
        policy = CausalLMPolicy(model, end_token=0)
        policy.token_logps(*PAIRS[:2])  # the first text is a test of the model
        hook = lambda *_, ended=ended: ended.append(1)  # noqa: E731
        model.model.layers[0].mlp.register_forward_hook(hook)
        policy.logps(*PAIRS[:2]).sum().backward()
        counts.append(len(ended))
    assert counts == [1, 2]


def test_a_step_with_recomputed_activations_is_the_same_step():
    plain, again = (CausalLMPolicy(make("OPT"), end_token=0) for _ in range(2))
    recompute(again.model)
    runs = []
    again.model.model.decoder.layers[0].self_attn.register_forward_pre_hook(
        lambda *_: runs.append(torch.is_grad_enabled())
    )
    histories = [train(policy) for policy in (plain, again)]
    assert runs[-2:] == [True, True]  # of the step; before it the reference was scored
    assert histories[0] == histories[1]
    assert_close(dict(plain.named_parameters()), dict(again.named_parameters()), rtol=0, atol=1e-7)


def test_an_adapter_added_later_has_no_dropout_either():
    pytest.importorskip("peft", reason="no peft here")
    policy = CausalLMPolicy(make("Llama"), end_token=0)
    real.add_lora(policy.model, rank=2, dropout=0.5, generator=seeded())
    policy.train()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    first, second = (policy.token_logps(*PAIRS[:2]) for _ in range(2))
    assert torch.equal(first, second)


# --- what a policy can be ------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["BertLMHeadModel", "RobertaForCausalLM", "ElectraForCausalLM"])
def test_a_model_that_is_not_causal_is_refused(head):
    config = getattr(transformers, head).config_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [
            getattr(transformers, head)(config(vocab_size=260, is_decoder=causal, **BERT))
            for causal in (False, True)
        ]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        if dtype == torch.bfloat16:  # of coarse logits: as far from uniform as a trained model is
            for weight in (weight for model in models for weight in model.parameters()):
                weight.data.mul_(10) if weight.dim() > 1 else None
        bidirectional, causal = (
            CausalLMPolicy(copy.deepcopy(model).to(dtype), end_token=0) for model in models
        )
        for _ in range(2):  # not only the first time
            with pytest.raises(ValueError, match=f"`model` must be causal, .* {head} .*is_decoder"):
                bidirectional.token_logps(*PAIRS[:2])
        causal.token_logps(*PAIRS[:2])


def test_the_loop_refuses_a_model_that_is_not_causal():
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=260, **BERT))
    policy = CausalLMPolicy(model, end_token=0)
    start = copy.deepcopy(model.state_dict())
    settings = dict(beta=0.1, batches=torch.tensor([[0]]), micro_batch_size=1)
    settings |= dict(optimizer=torch.optim.SGD(policy.parameters(), lr=0.1))
    for reference in (torch.zeros(3), torch.zeros(3)), copy.deepcopy(policy):
        with pytest.raises(ValueError, match="`model` must be causal"):
            real.train_preferences(policy, reference, PAIRS, dpo_loss, **settings)
    assert_close(model.state_dict(), start, atol=0, rtol=0)


def test_a_model_is_tested_once_and_its_gradient_stays(monkeypatch):
    """Autocast keeps half weights: those of a test without gradient would take none from it."""
    policy, runs = CausalLMPolicy(make("Llama"), end_token=0), []
    policy.model.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    for _ in range(2):
        with real.bf16_autocast("cpu"):
            policy.logps(*PAIRS[:2]).sum().backward()
    assert runs == [False, True, True]
    assert all(weight.grad.abs().max() > 0 for weight in policy.parameters())


def test_a_text_of_two_tokens_and_a_context_of_one_can_be_read():
    policy = CausalLMPolicy(make("GPT2", n_positions=1), end_token=None)
    assert policy.context == 1
    assert policy.token_logps(rows([5]), rows([6])).shape == (1, 1)


def test_a_model_that_draws_all_the_same_is_refused():
    """Falcon's layers, which recompute, read their dropout from the config."""
    sizes = BERT | dict(vocab_size=260, hidden_dropout=0.5)
    del sizes["intermediate_size"]
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes))
    policy = CausalLMPolicy(model, end_token=0)
    with pytest.raises(ValueError, match="`model` must read the same .* Falcon.*set the dropouts"):
        policy.token_logps(*PAIRS[:2])
    model.config.hidden_dropout = 0.0  # as the sentence says
    first, second = (policy.token_logps(*PAIRS[:2]) for _ in range(2))
    assert torch.equal(first, second)


def t5():
    sizes = dict(vocab_size=260, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bart():
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64)
    sizes = dict(vocab_size=260, d_model=16)
    config = transformers.BartConfig(**sizes, **layers, **heads)
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("model", [t5, bart])
def test_an_encoder_decoder_is_refused(model, tokenizer, tmp_path):
    model = model()
    with pytest.raises(ValueError, match="`model` must be a decoder alone.* got an encoder-decod"):
        CausalLMPolicy(model, end_token=0)
    real.save_model(model, tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="`folder` must have a causal .*, got .*encoder-decoder"):
        real.load_model(tmp_path / "model")


def test_a_token_without_a_logit_is_refused():
    model = make("Llama")
    model.model.set_input_embeddings(torch.nn.Embedding(262, 16))  # and the head as it was
    policy = CausalLMPolicy(model, end_token=0)
    message = "`model` must have a logit for each token .*, got 260 logits and token 261"
    with pytest.raises(ValueError, match=message):
        policy.token_logps(rows([5]), rows([261]))
    assert policy.token_logps(*PAIRS[:2]).isfinite().all()
    with pytest.raises(ValueError, match=r"`completions` must have tokens in 0\.\.261, got 262"):
        policy.token_logps(rows([5]), rows([262]))


def test_the_context_is_found_under_each_name():
    found = {name: CausalLMPolicy(make(name), end_token=0).context for name in CONFIGS}
    without = {"Bloom", "Mamba"}
    assert {name for name, context in found.items() if context is None} == without
    assert found["Rwkv"] == 1024  # the kernel's
    assert {context for name, context in found.items() if name not in {*without, "Rwkv"}} == {64}


def test_rows_beside_a_long_one_are_read_as_they_are_alone():
    """Beyond its first context LongRoPE has other angles, for all rows that are read together."""
    scaled = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    scaled |= dict(rope_theta=10000.0, original_max_position_embeddings=8)
    short, long = rows([5, 6, 7, 8]), rows([*range(5, 17)])
    model = make("Phi3", rope_scaling=scaled, original_max_position_embeddings=8).eval()
    alone = model(input_ids=short).logits
    together = model(input_ids=torch.cat([torch.nn.functional.pad(short, (0, 8)), long])).logits
    assert (together[:1, :4] - alone).abs().max() > 1e-2  # the reason
    policy = CausalLMPolicy(model, end_token=0)
    assert policy.context == 8
    with pytest.raises(ValueError, match="`completions` must have at most 9 tokens"):
        policy.token_logps(rows([5, 6]), rows([*range(5, 13)]))


# --- answers -------------------------------------------------------------------------------------


def naive_answer(model, tokenizer, prompt, max_tokens, draw):
    tokens = tokenizer(prompt).input_ids
    n_prompt = len(tokens)
    while len(tokens) < max_tokens and (len(tokens) == n_prompt or tokens[-1] != 0):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(draw(logits.double().log_softmax(-1))))
    text = tokenizer.decode(tokens[n_prompt:], skip_special_tokens=True)
    return text if tokens[-1] == 0 else text + "…"


@pytest.mark.parametrize("on", [False, True], ids=["plain", "recomputing"])
@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral", "Mpt", "Mamba", "Rwkv"])
def test_answers_are_those_of_a_model_that_reads_all_again_each_time(name, on, tokenizer):
    model = make(name)
    plain = copy.deepcopy(model).eval()
    policy = CausalLMPolicy(model, end_token=0)
    if on:
        recompute(model)
    told = dict(max_tokens=24, template="{prompt}")
    found = real.greedy_answer(policy, tokenizer, "a good", **told)
    assert found == naive_answer(plain, tokenizer, "a good", 24, torch.argmax)
    drawn = real.sample_answer(policy, tokenizer, "a good", generator=seeded(), **told)
    generator = seeded()

    def draw(logps):
        return torch.multinomial(logps.exp(), 1, generator=generator)

    assert drawn == naive_answer(plain, tokenizer, "a good", 24, draw)
    assert len(drawn) > 4


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer):
    policy = CausalLMPolicy(make("Llama", vocab_size=100), end_token=0)
    with pytest.raises(ValueError, match=r"`tokenizer` must be that of the model, .* 0\.\.99, got"):
        real.greedy_answer(policy, tokenizer, "a good", max_tokens=24)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_breaks_the_weights_is_neither_logged_nor_saved(bad, tmp_path):
    policy = CausalLMPolicy(make("Llama"), end_token=0)
    run = partial(
        train,
        batches=torch.zeros(6, 3, dtype=torch.int64) + torch.arange(3),
        checkpoints=tmp_path / "run",
        checkpoint_every=1,
        logs=[real.csv_log(tmp_path / "run.csv")],
    )
    message = r"`optimizer` must leave the weights finite, got nan or inf in model\..* \(torch."
    message += rf"float32\) after step 2: lower its learning rate, {bad} in that step"
    with pytest.raises(ValueError, match=message):
        run(policy, schedule=lambda step: bad if step == 2 else 1.0)
    saved = real.load_checkpoint(tmp_path / "run")
    assert saved.step == len(saved.history["loss"]) == 2
    assert all(weight.isfinite().all() for weight in saved.weights.values())
    with open(tmp_path / "run.csv", encoding="utf-8", newline="") as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["0", "1"]
    assert not all(weight.isfinite().all() for weight in policy.parameters())  # it was taken


def test_one_weight_that_is_not_finite_is_named():
    class Breaks(torch.optim.SGD):
        def step(self):
            with torch.no_grad():
                policy.model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan

    policy = CausalLMPolicy(make("Llama"), end_token=0)
    with pytest.raises(ValueError, match=r"in model\.layers\.1\.mlp\.up_proj\.weight .* step 0:"):
        train(policy, optimizer=Breaks(policy.parameters(), lr=0.1))


def test_float16_is_refused_before_the_first_step():
    model = make("Llama")
    model.lm_head.half()
    policy = CausalLMPolicy(model, end_token=0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    settings = dict(beta=0.1, batches=torch.tensor([[0]]), micro_batch_size=1)
    scores = (-torch.ones(3), -torch.ones(3))
    message = r"`policy` must have weights in float32 or bfloat16 \(model.float\(\)\).*lm_head.weig"
    with pytest.raises(ValueError, match=message):
        real.train_preferences(policy, scores, PAIRS, dpo_loss, optimizer=optimizer, **settings)
    train(CausalLMPolicy(make("Llama").bfloat16(), end_token=0))


# --- files ---------------------------------------------------------------------------------------


def saved(model, tokenizer, folder, change):
    """The model's folder, where `change` has changed the weights."""
    real.save_model(model, tokenizer, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda tensors: tensors.pop(KEY), f"got none for {KEY} in"),
        (lambda tensors: tensors.pop("lm_head.weight"), "got none for lm_head.weight in"),
        (
            lambda tensors: tensors.update({"v_head.weight": torch.zeros(1, 16)}),
            "got one too many for v_head.weight in",
        ),
        (
            lambda tensors: tensors.update({KEY: torch.zeros(3, 16)}),
            rf"got another shape for {KEY} \(\[3, 16\], not \[32, 16\]\) in",
        ),
        (
            lambda tensors: tensors.update(
                {name + "_": tensors.pop(name) for name in list(tensors) if "layers.1" in name}
            ),
            "got none for .*, .*, .* and 6 others; one too many for .*_, .*_, .*_ and 6 others in",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_refused(change, got, tokenizer, tmp_path):
    folder = saved(make("Llama"), tokenizer, tmp_path / "model", change)
    with pytest.raises(ValueError, match=f"`folder` must have one tensor for each .*, {got}"):
        real.load_model(folder)


def test_a_weight_that_is_tied_need_not_be_there(tokenizer, tmp_path):
    model, names = make("Llama", tie_word_embeddings=True), []
    folder = saved(model, tokenizer, tmp_path / "model", names.extend)
    assert "lm_head.weight" not in names
    loaded = real.load_model(folder)[0]
    assert_close(loaded.lm_head.weight, model.model.embed_tokens.weight, atol=0, rtol=0)


def test_buffers_of_older_versions_may_be_there(tokenizer, tmp_path):
    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)

    folder = saved(make("GPT2"), tokenizer, tmp_path / "model", add)
    assert real.load_model(folder)[0].config.n_positions == 64


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_was_saved_is_loaded(name, tokenizer, tmp_path):
    policy = CausalLMPolicy(make(name), end_token=0)
    scores = policy.token_logps(*PAIRS[:2])
    real.save_model(policy.model, tokenizer, tmp_path / "model")
    loaded = CausalLMPolicy(real.load_model(tmp_path / "model")[0], end_token=0)
    assert torch.equal(loaded.token_logps(*PAIRS[:2]), scores)

import copy
import itertools
import json
import os
import pickle
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dpo_mini.logps import PAD
from dpo_mini.losses import dpo_loss
from dpo_mini.train import fit_preferences, fit_sft

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")

from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo_mini import real
from dpo_mini.real import CausalLMPolicy, Preference

REAL_FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "instruction-preferences.json"
PAIRS = [
    Preference("the film was", "very good", "bad"),
    Preference("the long and winding comedy was", "funny and not slow", "awful but fine"),
    Preference("it was", "ok {really}", "grün 🙂"),
]


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return real.encode(PAIRS, tokenizer, max_tokens=64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt2(vocab_size=290, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = dict(n_positions=64, n_layer=2, n_head=2, n_embd=16, initializer_range=0.4)
        ends = dict(bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **{**sizes, **ends, **changes}))


def llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=290,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.4,
            bos_token_id=0,
            eos_token_id=0,
        )
        return LlamaForCausalLM(config)


def naive_token_logps(model, prompt, completion):
    """One row, no padding, one token at a time: what the model says is next, read off."""
    tokens, scores = prompt, []
    for token in completion:
        scores.append(model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[token])
        tokens = [*tokens, token]
    return torch.stack(scores)


def unpadded(row):
    return [token for token in row.tolist() if token != PAD]


# --- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [gpt2, llama])
def test_scores_are_those_of_one_unpadded_row_and_token_at_a_time(model, pairs):
    model = model().double().eval()
    policy = CausalLMPolicy(model, end_token=0)
    prompts, chosen, _ = pairs
    assert (prompts == PAD).any()
    assert (chosen == PAD).any()
    scored = policy.token_logps(prompts, chosen)
    assert scored.shape == chosen.shape
    for row, prompt, completion in zip(scored, prompts, chosen, strict=True):
        naive = naive_token_logps(model, unpadded(prompt), unpadded(completion))
        assert_close(row[: len(naive)], naive, atol=1e-10, rtol=0)
        assert (row[len(naive) :] == 0).all()
    assert_close(policy.logps(prompts, chosen), scored.sum(1), atol=1e-12, rtol=0)


def test_gradients_are_those_of_one_unpadded_row_at_a_time(pairs):
    model = gpt2().double().eval()
    prompts, chosen, _ = pairs
    CausalLMPolicy(model, end_token=0).logps(prompts, chosen).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for prompt, completion in zip(prompts, chosen, strict=True):
        naive_token_logps(model, unpadded(prompt), unpadded(completion)).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(together[name], parameter.grad, atol=1e-9, rtol=1e-9)


def test_more_padding_changes_nothing(pairs):
    policy = CausalLMPolicy(gpt2().double(), end_token=0)
    prompts, chosen, _ = pairs
    wider = [torch.nn.functional.pad(tokens, (0, 5), value=PAD) for tokens in (prompts, chosen)]
    assert_close(policy.token_logps(*wider)[:, :-5], policy.token_logps(prompts, chosen))


def test_rows_do_not_disturb_each_other(pairs):
    policy = CausalLMPolicy(gpt2().double(), end_token=0)
    prompts, chosen, _ = pairs
    alone = torch.cat([policy.token_logps(prompts[r : r + 1], chosen[r : r + 1]) for r in range(3)])
    assert_close(policy.token_logps(prompts, chosen), alone, atol=1e-12, rtol=0)


def test_the_model_reads_no_further_than_the_longest_row(pairs):
    lengths = []
    policy = CausalLMPolicy(gpt2(), end_token=0)
    policy.token_logps(pairs[0], pairs[1])  # the first text is a test of the model, too
    policy.model.register_forward_pre_hook(
        lambda model, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompts, chosen, _ = pairs
    policy.token_logps(prompts[:1], chosen[:1])
    assert lengths == [len(unpadded(prompts[0])) + len(unpadded(chosen[0])) - 1]


def test_dropout_is_off_even_in_training_mode(pairs):
    policy = CausalLMPolicy(gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), end_token=0)
    prompts, chosen, _ = pairs
    scored = policy.train().token_logps(prompts, chosen)
    assert policy.training
    assert_close(policy.token_logps(prompts, chosen), scored, atol=0, rtol=0)
    assert_close(copy.deepcopy(policy).eval().token_logps(prompts, chosen), scored, atol=0, rtol=0)
    policy.model.train()  # the control: this model would drop, were it not held back
    assert not torch.equal(policy.token_logps(prompts, chosen), scored)


def test_half_precision_is_scored_in_float32(pairs):
    policy = CausalLMPolicy(gpt2().to(torch.bfloat16), end_token=0)
    assert policy.token_logps(pairs[0], pairs[1]).dtype == torch.float32


def row(*tokens):
    return torch.tensor([tokens])


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (row(PAD, PAD), row(1, 0), "`prompts` must .*, got an empty prompt in row 0"),
        (row(PAD, 3), row(1, 0), "`prompts` must .*, got an empty prompt in row 0"),
        (
            row(3, PAD, 3),
            row(1, 0),
            "`prompts` must be padded at the end, got a token after it in row 0",
        ),
        (row(290), row(1, 0), r"`prompts` must have tokens in 0\.\.289, got 290"),
        (row(-2), row(1, 0), "`prompts` must have tokens in .*, got -2"),
        (row(3), row(1, 290), r"`completions` must have tokens in 0\.\.289, got 290"),
        (row(3), row(1, -2), "`completions` must have tokens in .*, got -2"),
        (row(3), row(PAD, PAD), "`completions` must have at least one token .* row 0"),
        (
            row(3),
            row(1, PAD, 1),
            "`completions` must have padding .*, got a token after it in row 0",
        ),
        (row(3), row(1, 0, 1), "`completions` must .* after the end token 0, got .* row 0"),
        (
            row(3).float(),
            row(1, 0),
            r"`prompts` must have dtype torch.int64 \(.long\(\)\), got torch.float32",
        ),
        (
            row(3).int(),
            row(1, 0),
            r"`prompts` must have dtype torch.int64 \(.long\(\)\), got torch.int32",
        ),
        (torch.tensor([3]), row(1, 0), r"`prompts` must be a non-empty \[B, P\], got shape \[1\]"),
        (row(3).repeat(2, 1), row(1, 0), "`completions` must have 2 rows like `prompts`, got 1"),
        (row(*[3] * 33), row(*[1] * 33), "`completions` must have at most 65 tokens .*, got 66"),
    ],
)
def test_bad_tokens_are_refused(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        CausalLMPolicy(gpt2(), end_token=0).token_logps(prompts, completions)


def test_the_whole_context_can_be_used():
    policy = CausalLMPolicy(gpt2(), end_token=None)
    assert policy.token_logps(row(*[3] * 33), row(*[1] * 32)).shape == (1, 32)


def test_an_end_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"`end_token` must be None or in 0\.\.289, got 290"):
        CausalLMPolicy(gpt2(), end_token=290)


# --- tokens --------------------------------------------------------------------------------------


def test_encoding_keeps_the_boundary_and_ends_each_answer_once(tokenizer, pairs):
    end = tokenizer.eos_token_id
    for pair, prompt, chosen, rejected in zip(PAIRS, *pairs, strict=True):
        assert tokenizer.decode(unpadded(prompt)) == pair.prompt + "\n"
        for text, answer in ((pair.chosen, chosen), (pair.rejected, rejected)):
            tokens = unpadded(answer)
            assert tokens[-1] == end
            assert end not in tokens[:-1]
            assert tokenizer.decode(tokens[:-1]) == text
    assert pairs[1].shape == pairs[2].shape
    assert all(tokens.dtype == torch.int64 for tokens in pairs)


def test_prompt_and_answer_are_not_merged_across_the_boundary():
    tokenizer = real.train_tokenizer(["aab"] * 9, vocab_size=260)
    pair = Preference("a", "ab", "b")
    jointly = tokenizer("aab").input_ids
    assert len(jointly) == 1  # in one piece the boundary is inside a token
    prompts, chosen, _ = real.encode([pair], tokenizer, max_tokens=9, template="{prompt}")
    assert tokenizer.decode(unpadded(prompts[0])) == "a"
    assert tokenizer.decode(unpadded(chosen[0])[:-1]) == "ab"


def test_an_end_token_that_is_already_there_is_not_doubled(tokenizer):
    pair = PAIRS[0]
    ended = Preference(
        pair.prompt, pair.chosen + tokenizer.eos_token, pair.rejected + 2 * tokenizer.eos_token
    )
    for plain, given in zip(
        real.encode([pair], tokenizer, max_tokens=64),
        real.encode([ended], tokenizer, max_tokens=64),
        strict=True,
    ):
        assert_close(given, plain)


def test_a_tokenizer_that_adds_tokens_itself_begins_and_ends_once(tokenizer):
    import tokenizers

    adding = copy.deepcopy(tokenizer)
    adding.add_special_tokens({"bos_token": "<begin>"})
    adding._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"<begin> $A {real.END}",
        special_tokens=[("<begin>", adding.bos_token_id), (real.END, adding.eos_token_id)],
    )
    both = [adding.bos_token_id, adding.eos_token_id]
    assert [adding("x").input_ids[0], adding("x").input_ids[-1]] == both
    plain = real.encode(PAIRS[:1], tokenizer, max_tokens=64)
    for template in ("{prompt}\n", "<begin>{prompt}\n"):
        found = real.encode(PAIRS[:1], adding, max_tokens=64, template=template)
        assert_close(found[0], torch.cat([row(adding.bos_token_id), plain[0]], dim=1))
        assert_close(found[1:], plain[1:])


def test_the_template_surrounds_the_prompt(tokenizer):
    found = real.encode(PAIRS, tokenizer, max_tokens=64, template="Q{0}: {prompt}? ")
    assert tokenizer.decode(unpadded(found[0][2])) == "Q{0}: it was? "


def test_too_long_an_answer_is_refused_and_never_cut(tokenizer, pairs):
    counts = real.count_tokens(PAIRS, tokenizer)
    prompts, chosen, rejected = pairs
    for count, prompt, *answers in zip(counts, prompts, chosen, rejected, strict=True):
        assert count == len(unpadded(prompt)) + max(len(unpadded(answer)) for answer in answers)
    longest = max(counts)
    real.encode(PAIRS, tokenizer, max_tokens=longest)
    at = counts.index(longest)
    message = (
        rf"`preferences` must .* max_tokens = {longest - 1} .* in row {at}, the first of 1 of 3"
    )
    with pytest.raises(ValueError, match=message):
        real.encode(PAIRS, tokenizer, max_tokens=longest - 1)


def test_bad_encoding_is_refused(tokenizer):
    encode = partial(real.encode, max_tokens=64)
    inside = [Preference("a", f"b{real.END}c", "d")]
    with pytest.raises(ValueError, match="an end token inside the chosen answer of row 0"):
        encode(inside, tokenizer)
    with pytest.raises(ValueError, match="nothing but end tokens in the rejected answer of row 0"):
        encode([Preference("a", "b", real.END)], tokenizer)
    with pytest.raises(ValueError, match="`preferences` must have at least one pair, got none"):
        encode([], tokenizer)
    with pytest.raises(TypeError, match="`preferences` must be .* Preference, got tuple in row 0"):
        encode([("a", "b", "c")], tokenizer)
    for template in ("no prompt", "{prompt}{prompt}", 3):
        with pytest.raises(
            ValueError, match="`template` must be text with {prompt} once in it, or CHAT, got"
        ):
            encode(PAIRS, tokenizer, template=template)
    with pytest.raises(
        ValueError, match="`template` must .*, got '{prompt}', which leaves an empty"
    ):
        encode([Preference("", "b", "c")], tokenizer, template="{prompt}")
    with pytest.raises(ValueError, match="`max_tokens` must be .*, got 0"):
        encode(PAIRS, tokenizer, max_tokens=0)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have an end token"):
        encode(PAIRS, endless)


def test_any_text_survives_the_tokenizer(tokenizer):
    letters = torch.randint(1, 0xD7FF, (50, 20), generator=seeded()).tolist()
    for text in ["".join(map(chr, line)) for line in letters]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_does_not_depend_on_the_run():
    texts = [f"the {n} {'abcdefg'[n % 7] * 3} was {n % 5}" for n in range(200)]
    vocabularies = [real.train_tokenizer(texts, vocab_size=330).get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert len(vocabularies[0]) == 330


def test_bad_tokenizer_input_is_refused():
    with pytest.raises(ValueError, match="`vocab_size` must be .*, got 256"):
        real.train_tokenizer(["a"], vocab_size=256)
    with pytest.raises(TypeError, match="`texts` must be several texts, got one"):
        real.train_tokenizer("a text", vocab_size=300)
    with pytest.raises(TypeError, match="`texts` must be text, got int in row 1"):
        real.train_tokenizer(["a", 1], vocab_size=300)
    with pytest.raises(ValueError, match="`texts` must have at least one letter, got no text"):
        real.train_tokenizer([""], vocab_size=300)


# --- preference files ----------------------------------------------------------------------------

ENTRY = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "hi"), ("assistant", "hello"), ("assistant", "what"))
)


def write(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return path


def test_json_and_jsonl_are_read_alike_and_round_trip(tmp_path):
    tricky = Preference("a\u2028b\x85c\n", '"quoted" {x}', "🙂\ttab\\")
    written = [*PAIRS, tricky]
    real.save_preferences(tmp_path / "pairs.jsonl", written)
    assert real.load_preferences(tmp_path / "pairs.jsonl") == written
    lines = (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").split("\n")
    entries = [json.loads(line) for line in lines[:-1]]
    for indent in (None, 2):
        text = json.dumps(entries, indent=indent)
        (tmp_path / "pairs.json").write_text("\ufeff\n " + text, encoding="utf-8")
        assert real.load_preferences(str(tmp_path / "pairs.json")) == written


def test_blank_lines_and_other_columns_are_passed_over(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps({**ENTRY, "score": [1, {"a": None}]}) + "\r\n\n")
    assert real.load_preferences(path) == [Preference("p", "c", "r")]


def test_columns_are_mapped_and_joined(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        {"instruction": "do", "input": "this", "good": "c", "rejected": "r"},
        {"instruction": "do", "input": "", "good": "c", "rejected": "r"},
    )
    columns = {"prompt": ("instruction", "input"), "chosen": "good"}
    assert real.load_preferences(path, columns=columns) == [
        Preference("do\nthis", "c", "r"),
        Preference("do", "c", "r"),
    ]


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "hi"),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "hi"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "hi"),
        (
            {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
            "user: hi\nassistant: what\nuser: hi",
        ),
    ],
)
def test_messages_are_read(tmp_path, entry, prompt):
    path = write(tmp_path / "pairs.jsonl", entry)
    (pair,) = real.load_preferences(path)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "hello", "what")


def test_the_prompt_can_be_taken_from_the_messages(tmp_path):
    entry = {"prompt": "an id", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    path = write(tmp_path / "pairs.jsonl", entry)
    assert real.load_preferences(path, columns={"prompt": ()})[0].prompt == "hi"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 3}, "`prompt` must be text or a list of messages, got a number"),
        ({"chosen": None}, "`chosen` must be text or a list of messages, got null"),
        ({"chosen": True}, "`chosen` must be .*, got true or false"),
        ({"chosen": ""}, "`chosen` must have some text, got an empty answer"),
        ({"rejected": " \n"}, "`rejected` must have some text, got an empty answer"),
        ({"rejected": []}, "`rejected` must be .*, got an empty list"),
        ({"rejected": {"a": 1}}, "`rejected` must be .*, got an object with the keys 'a'"),
        ({"chosen": ["hi"]}, "`chosen` must have messages with .*, got str as message 1"),
        (
            {"chosen": [{"role": "assistant"}]},
            "`chosen` must .*, got .* the keys 'role' as message 1",
        ),
        ({"chosen": [USER]}, "`chosen` must end with a message of 'assistant', got one of 'user'"),
        ({"chosen": [USER, GOOD]}, "`rejected` must be messages like chosen, got text"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "ho"}, BAD]},
            "`rejected` must answer the prompt of chosen, 'hi', got 'ho'",
        ),
        (
            {"prompt": "ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "`prompt` must be the answers' earlier messages, 'hi', got 'ho'",
        ),
        ({"chosen": "\ud83d"}, "`chosen` must be text, got half of a surrogate pair"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(tmp_path, changes, message):
    path = write(tmp_path / "pairs.jsonl", ENTRY, {**ENTRY, **changes})
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 2: {message}"):
        real.load_preferences(path)
    path.write_text(json.dumps([ENTRY, {**ENTRY, **changes}]))
    with pytest.raises(ValueError, match=rf"pairs\.jsonl, line 1, entry 2: {message}"):
        real.load_preferences(path)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, name):
    path = write(tmp_path / "pairs.jsonl", {k: v for k, v in ENTRY.items() if k != name})
    there = ", ".join(repr(column) for column in ENTRY if column != name)
    message = rf"line 1: `{name}` must be .*one of the columns, got {there}: say with columns="
    with pytest.raises(ValueError, match=message):
        real.load_preferences(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            json.dumps(ENTRY) + '\n{"prompt": ',
            r"line 2 must be valid JSON \(.*\), got Expecting value at column",
        ),
        ('[\n{"prompt": "p"},\n{]', "line 3 must be valid JSON"),
        ("[" * 100_000, "line 1 must be valid JSON .*, got one nested too deeply"),
        ("not json", "line 1 must be valid JSON .*, got Expecting value at column 1"),
        (
            '{"a": 1, "b": 2, "a": 1}',
            "line 1 must be an object with each key once, got .* the key 'a' twice",
        ),
        ('[{"a": 1}, {"b": 2, "b": 3}]', "entry 1: `chosen` must be one of the columns, got 'a'"),
        (
            json.dumps([ENTRY])[:-1] + ', {"chosen": "c", "chosen": "d"}]',
            "entry 2 must .*, got an object with the key 'chosen' twice",
        ),
        (
            '{"prompt": "p", "rejected": "r", "chosen": [{"role": "assistant", "role": "x"}]}',
            "line 1: `chosen` must have .*, got an object with the key 'role' twice as message 1",
        ),
        ("[3]", "entry 1 must be an object .*, got a number"),
        ("[[]]", "entry 1 must be an object .*, got an empty list"),
        ("[]", "pairs must have at least one pair, got no entries"),
        ("", "pairs must have at least one pair, got no entries"),
        ("\n\n", "pairs must have at least one pair, got no entries"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, text, message):
    path = tmp_path / "pairs"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        real.load_preferences(path)
    assert str(path) in str(refusal.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(
        ValueError,
        match=r"pairs\.json, line 1 must be UTF-8, got invalid start byte at byte 13 of the line",
    ):
        real.load_preferences(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        real.load_preferences(tmp_path / "missing.json")


def test_a_bad_mapping_is_refused(tmp_path):
    path = write(tmp_path / "pairs.jsonl", ENTRY)
    load = partial(real.load_preferences, path)
    with pytest.raises(
        ValueError, match="`columns` must name prompt, chosen, .* or ignored, got 'prompts'"
    ):
        load(columns={"prompts": "prompt"})
    with pytest.raises(
        ValueError, match="`columns` must have at least one column for chosen, got none"
    ):
        load(columns={"chosen": ()})
    with pytest.raises(
        TypeError, match=r"`columns` must have names of columns for chosen, got \(3,\)"
    ):
        load(columns={"chosen": [3]})
    with pytest.raises(ValueError, match="`prompt` must be how both answers begin or one of"):
        load(columns={"prompt": ()})
    write(path, {**ENTRY, "input": None})
    with pytest.raises(
        ValueError, match=r"line 1: `prompt` \(column 'input'\) must be text, got null"
    ):
        load(columns={"prompt": ("prompt", "input")})


def test_only_preferences_are_saved(tmp_path):
    with pytest.raises(ValueError, match="`preferences` must have at least one pair, got none"):
        real.save_preferences(tmp_path / "pairs.jsonl", [])
    with pytest.raises(
        TypeError, match="`preferences` must be of type Preference, got dict in row 0"
    ):
        real.save_preferences(tmp_path / "pairs.jsonl", [ENTRY])
    with pytest.raises(ValueError, match="`chosen` must be text, got a number"):
        Preference("p", 3, "r")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch, broken, failure):
    path = tmp_path / "pairs.jsonl"
    real.save_preferences(path, PAIRS)
    before = path.read_bytes()

    def fail(*arguments):
        raise failure

    monkeypatch.setattr(broken, fail)
    with pytest.raises(failure):
        real.save_preferences(path, PAIRS[:1])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_saved_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for written in (PAIRS, PAIRS[:1]):
        real.save_preferences(path, written)
        assert real.load_preferences(path) == written
    assert list(tmp_path.iterdir()) == [path]


def test_a_local_data_set_is_read_as_from_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra 'real' is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    folder.mkdir()
    real.save_preferences(folder / "train.jsonl", PAIRS)
    assert real.load_hub_preferences(str(folder), split="train") == PAIRS
    assert real.load_hub_preferences(str(folder), split="train[1:]") == PAIRS[1:]
    with pytest.raises(
        ValueError, match=r"train\[:1\], row 1: `prompt` \(column 'question'\) must be"
    ):
        real.load_hub_preferences(str(folder), split="train[:1]", columns={"prompt": "question"})


# --- models --------------------------------------------------------------------------------------


def test_a_tiny_model_is_drawn_from_its_generator_and_nothing_else(tokenizer):
    state = torch.random.get_rng_state()
    first, again, other = (
        real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded(seed))
        for seed in (0, 0, 1)
    )
    assert_close(torch.random.get_rng_state(), state, atol=0, rtol=0)
    assert_close(dict(first.named_parameters()), dict(again.named_parameters()), atol=0, rtol=0)
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)
    assert first.config.vocab_size == len(tokenizer)
    with pytest.raises(TypeError, match="`generator` must be .*, got NoneType"):
        real.tiny_gpt2(tokenizer, n_positions=64, generator=None)
    with pytest.raises(ValueError, match="`width` must be a multiple of n_heads = 4, got 30"):
        real.tiny_gpt2(tokenizer, n_positions=64, width=30, generator=seeded())
    with pytest.raises(ValueError, match="`n_layers` must be .*, got 0"):
        real.tiny_gpt2(tokenizer, n_positions=64, n_layers=0, generator=seeded())


def test_a_model_survives_saving_and_loading(tmp_path, tokenizer, pairs, capfd):
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    for _ in range(2):  # the second time over the first
        real.save_model(model, tokenizer, tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    loaded, loaded_tokenizer = real.load_model(tmp_path / "model")
    before = CausalLMPolicy(model, end_token=tokenizer.eos_token_id)
    after = CausalLMPolicy(loaded, end_token=loaded_tokenizer.eos_token_id)
    assert_close(after.token_logps(*pairs[:2]), before.token_logps(*pairs[:2]), atol=0, rtol=0)
    assert_close(real.encode(PAIRS, loaded_tokenizer, max_tokens=64), pairs)
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
    assert capfd.readouterr() == ("", "")


def test_weights_come_in_the_default_dtype(tmp_path, tokenizer):
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    real.save_model(model.to(torch.bfloat16), tokenizer, tmp_path / "model")
    assert {p.dtype for p in real.load_model(tmp_path / "model")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("nth_rename", [1, 2])
def test_an_interrupted_save_leaves_the_old_model_whole(
    tmp_path, tokenizer, monkeypatch, nth_rename
):
    folder = tmp_path / "model"
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    real.save_model(model, tokenizer, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    renames = []
    rename = os.rename

    def fail_once(source, target):
        renames.append(source)
        if len(renames) == nth_rename:
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    other = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded(1))
    with pytest.raises(OSError, match="disk full"):
        real.save_model(other, tokenizer, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_other_files_is_left_alone(tmp_path, tokenizer):
    (tmp_path / "notes.txt").write_text("mine")
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    with pytest.raises(ValueError, match=r"`folder` must be new or .*, which holds notes\.txt$"):
        real.save_model(model, tokenizer, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


class Trap:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["DPO_MINI_MARK"],))


def test_weights_in_pickles_are_refused_unread(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("DPO_MINI_MARK", str(tmp_path / "mark"))
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    real.save_model(model, tokenizer, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(OSError, match="safetensors"):
        real.load_model(tmp_path / "model")
    assert not (tmp_path / "mark").exists()


def test_code_that_a_model_brings_along_is_not_run(tmp_path, tokenizer):
    folder = tmp_path / "model"
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    real.save_model(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        real.load_model(folder)
    assert not (tmp_path / "mark").exists()


def test_load_model_takes_folders_only_and_nothing_downloads(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="`folder` must be a folder on this machine, got 'gpt2'"
    ):
        real.load_model("gpt2")
    with pytest.raises(OSError):  # offline, so refused; and refused before a socket opens
        real.download_model("nobody/no-such-model")


# --- training and what it did --------------------------------------------------------------------


def test_the_same_loop_and_loss_teach_a_transformers_model(tokenizer, pairs):
    model = real.tiny_gpt2(tokenizer, n_positions=64, width=16, generator=seeded())
    policy = CausalLMPolicy(model, end_token=tokenizer.eos_token_id)
    settings = dict(steps=60, batch_size=3, learning_rate=1e-2, generator=seeded())
    sft = fit_sft(policy, *pairs[:2], **settings)
    assert sft["loss"][-1] < 0.8 * sft["loss"][0]
    reference = copy.deepcopy(policy)
    assert real.preference_accuracy(policy, reference, pairs) == 0  # equal: every pair is a tie
    dpo = fit_preferences(policy, reference, pairs, partial(dpo_loss, beta=0.1), **settings)
    assert dpo["loss"][0] == pytest.approx(0.6931, abs=1e-4)
    assert dpo["loss"][-1] < 0.5
    assert real.preference_accuracy(policy, reference, pairs) == 1


def test_margins_are_differences_of_four_scores(pairs):
    policy, reference = (CausalLMPolicy(gpt2().double(), end_token=0) for _ in range(2))
    with torch.no_grad():
        policy.model.transformer.wte.weight.mul_(1.1)
    prompts, chosen, rejected = pairs
    twins = (prompts, chosen, torch.where(torch.tensor([[0], [0], [1]]).bool(), chosen, rejected))
    wins = policy.logps(prompts, chosen) - reference.logps(prompts, chosen)
    losses = policy.logps(prompts, twins[2]) - reference.logps(prompts, twins[2])
    for batch_size in (1, 2, 64):
        margins = real.preference_margins(policy, reference, twins, batch_size=batch_size)
        assert_close(margins, wins - losses, atol=1e-10, rtol=0)
    assert (margins[2] == 0) & (margins[:2] != 0).all()
    expected = (margins > 0).sum().item() / 3
    assert real.preference_accuracy(policy, reference, twins) == pytest.approx(expected)


def test_progress_sees_every_pair_and_changes_nothing(tokenizer, pairs):
    seen = []

    def progress(steps):
        for step in steps:
            yield step
            seen.append(step)

    counts = real.count_tokens(PAIRS, tokenizer, progress=progress)
    assert counts == real.count_tokens(PAIRS, tokenizer)
    encoded = real.encode(PAIRS, tokenizer, max_tokens=64, progress=progress)
    assert all(torch.equal(got, want) for got, want in zip(encoded, pairs, strict=True))
    assert seen == [*range(len(PAIRS))] * 2
    seen.clear()
    policy, reference = (CausalLMPolicy(gpt2(), end_token=0) for _ in range(2))
    real.preference_accuracy(policy, reference, pairs, batch_size=2, progress=progress)
    assert seen == [0, 1]  # passes of 2 and of 1


def always(tokens, vocab_size=290):
    """A GPT-2 whose next token depends on the last one alone: `tokens[i]` then `tokens[i + 1]`."""
    model = gpt2(
        vocab_size=vocab_size, n_embd=vocab_size, n_head=1, n_layer=1, tie_word_embeddings=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wte.weight.copy_(torch.eye(vocab_size))
        for here, following in itertools.pairwise(tokens):
            model.lm_head.weight[following, here] = 10.0
    return model


def test_answers_are_decoded_up_to_the_end_token(tokenizer):
    letters = [tokenizer(letter).input_ids[0] for letter in "\nabc"]
    policy = CausalLMPolicy(always([*letters, tokenizer.eos_token_id]), end_token=0)
    n_prompt = len(tokenizer("it was\n").input_ids)
    assert real.greedy_answer(policy, tokenizer, "it was", max_tokens=60) == "abc"
    assert real.greedy_answer(policy, tokenizer, "it was", max_tokens=n_prompt + 2) == "ab…"
    drawn = real.sample_answer(policy, tokenizer, "it was", max_tokens=60, generator=seeded())
    assert drawn == "abc"
    with pytest.raises(ValueError, match="`max_tokens` must be at most 64, .* context, got 65"):
        real.greedy_answer(policy, tokenizer, "it was", max_tokens=65)
    with pytest.raises(ValueError, match=f"`prompt` must have less than 2 tokens, got {n_prompt}"):
        real.greedy_answer(policy, tokenizer, "it was", max_tokens=2)
    with pytest.raises(TypeError, match="`generator` must be .*, got NoneType"):
        real.sample_answer(policy, tokenizer, "it was", max_tokens=60, generator=None)


def test_sampled_first_tokens_have_the_policys_frequencies(tokenizer):
    policy = CausalLMPolicy(gpt2(initializer_range=1.5).eval(), end_token=None)
    prompt = torch.tensor([tokenizer("it was\n").input_ids])
    with torch.no_grad():
        probs = policy.model(prompt).logits[0, -1].double().softmax(-1)
    likely = int(probs.argmax())
    n, generator = 400, seeded()
    word, tokens = tokenizer.decode([likely]), prompt.shape[1] + 1
    drawn = [
        real.sample_answer(policy, tokenizer, "it was", max_tokens=tokens, generator=generator)
        for _ in range(n)
    ]
    share = sum(text.removesuffix("…") == word for text in drawn) / n
    p = probs[likely].item()
    assert 0.05 < p < 0.95
    assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.skipif(not REAL_FILE.exists(), reason="the real preference file is not here")
def test_dpo_learns_preferences_that_this_project_did_not_write():
    generator = seeded()
    columns = {"prompt": ("instruction", "input")}
    preferences = real.load_preferences(REAL_FILE, columns=columns)
    assert len(preferences) == 1100
    order = torch.randperm(1100, generator=generator).tolist()
    held_out, training = ([preferences[n] for n in part] for part in (order[:110], order[110:]))
    texts = [text for pair in training for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=1500)
    pairs, held_out = (real.encode(p, tokenizer, max_tokens=256) for p in (training, held_out))
    model = real.tiny_gpt2(tokenizer, n_positions=256, generator=generator)
    policy = CausalLMPolicy(model, end_token=tokenizer.eos_token_id)
    settings = dict(batch_size=8, generator=generator, learning_rate=1e-3)
    fit_sft(policy, *pairs[:2], steps=124, **settings)  # one epoch
    reference = copy.deepcopy(policy)
    loss = partial(dpo_loss, beta=0.1)
    fit_preferences(policy, reference, pairs, loss, steps=2 * 124, **settings)
    assert real.preference_accuracy(policy, reference, held_out) >= 0.85

"""Chats and tokens: tokenizers and chat templates of every kind, beside `trl` and by hand.

No tokenizer can be downloaded here. Each is built with what its namesake does: what it puts before
a text, what it does with spaces and with letters that it does not know, which tokens are special.
"""

import copy
import importlib.util
import json
import os
import re
import socket
from functools import cache, partial
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")
pytest.importorskip("datasets", reason="the extra 'real' is not installed")

import datasets
from test_real import always
from test_real_preferences import said, trl_tokens, unpadded
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from dpo_mini import real
from dpo_mini.real import CHAT, TEMPLATE, CausalLMPolicy, Preference

TEXTS = [
    {"prompt": "ask me:", "chosen": " yes, 12", "rejected": " no"},
    {"prompt": "ask me:\n", "chosen": "yes", "rejected": "12 no"},
    {"prompt": "how was the film?\n\n", "chosen": "good 🙂", "rejected": "\nbad"},
    {"prompt": "the fi", "chosen": "lm was good", "rejected": " was bad"},  # merges
    {"prompt": "1 + 2 = ", "chosen": "3", "rejected": " 4 "},
    {"prompt": "cafe", "chosen": "\u0301 yes", "rejected": "é no"},  # é, once normalised
    {"prompt": "12", "chosen": "34", "rejected": "5"},
]
CHATS = [
    {
        "prompt": said("user: how was the film? "),
        "chosen": said("assistant: good, 12"),
        "rejected": said("assistant:  bad"),
    },
    {
        "prompt": said("user: 1 + 2", "assistant: 3", "user: \ncafe\u0301 🙂"),
        "chosen": said("assistant: yes\n"),
        "rejected": said("assistant: no"),
    },
]
CORPUS = ["how was the film? the film was good, bad, ask me: yes no user system assistant\n\n"] * 9
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the tokenizers ------------------------------------------------------------------------------


def begins_with(token, tokenizer):
    number = tokenizer.token_to_id(token)
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, number)]
    )


def sentencepiece(special, *, normalizer=None, pre_tokenizer=None, begin="<s>"):
    """A BPE of letters and merges whose unknown letters are written byte by byte."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()  # no merges across words
    learned.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=120, initial_alphabet=["▁"], show_progress=False)
    )
    bpe = json.loads(learned.to_str())["model"]
    words = ["<unk>", *special, *(f"<0x{n:02X}>" for n in range(256)), *bpe["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {word: n for n, word in enumerate(words)},
            [tuple(merge) for merge in bpe["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", *special])
    if begin:
        tokenizer.post_processor = begins_with(begin, tokenizer)
    return tokenizer


def byte_level(special, *, words=None, normalizer=None, space=False, begin=None):
    """A BPE of bytes, over the words of a regular expression or those of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=words is None)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), of_bytes])
        if words
        else of_bytes
    )
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300 + len(special),
            special_tokens=special,
            initial_alphabet=of_bytes.alphabet(),
            show_progress=False,
        ),
    )
    if begin:
        tokenizer.post_processor = begins_with(begin, tokenizer)
    return tokenizer


def fast(tokenizer, chat_template=None, **special):
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )
    made.chat_template = chat_template
    return made


SPACES = normalizers.Replace(" ", "▁")
SPACE_FIRST = normalizers.Sequence([normalizers.Prepend("▁"), SPACES])


def llama_2(normalizer=SPACE_FIRST, pre_tokenizer=None):
    inner = sentencepiece(["<s>", "</s>"], normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip()"
        " }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    return fast(inner, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_3():
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    inner = byte_level(special, words=LLAMA_3_WORDS, begin=special[0])
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    return fast(inner, template, bos_token=special[0], eos_token="<|eot_id|>")


QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen(chat_template=QWEN_TEMPLATE):
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = LLAMA_3_WORDS.replace("{1,3}", "")
    inner = byte_level(special, words=words, normalizer=normalizers.NFC())
    inner.add_tokens(["<think>", "</think>"])
    return fast(inner, chat_template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gemma():
    special = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
    inner = sentencepiece(
        special,
        normalizer=SPACES,
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        begin="<bos>",
    )
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    names = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    return fast(inner, template, **names)


def mistral():
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner = sentencepiece(["<s>", "</s>", "[INST]", "[/INST]"], pre_tokenizer=metaspace)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return fast(inner, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt_2(space=False):
    names = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")}
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return fast(byte_level(["<|endoftext|>"], space=space), template, **names)


def phi():
    inner = sentencepiece(["<s>", "</s>", "<|endoftext|>"], normalizer=SPACE_FIRST, begin=None)
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    inner.add_special_tokens([AddedToken(mark, rstrip=True, normalized=False) for mark in marks])
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    names = dict(bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>")
    return fast(inner, template, **names)


DIGITS = ["<unk>", "<begin>", "<end>", "<ask>", "<answer>", *"0123456789+= "]


def digits():
    tokenizer = Tokenizer(models.WordLevel({t: n for n, t in enumerate(DIGITS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(DIGITS[:5])
    tokenizer.post_processor = begins_with("<begin>", tokenizer)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '<ask>' if m.role == 'user' else '<answer>' }}"
        "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    names = dict(bos_token="<begin>", eos_token="<end>", unk_token="<unk>")
    return fast(tokenizer, template, **names)


def unigram():
    """Which pieces are likely depends on all of a word, so that a longer one is cut otherwise."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<unk>", "<user>", "<assistant>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=70,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list("0123456789"),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.decoder = decoders.Replace("▁", " ")
    inner.post_processor = begins_with("<s>", inner)
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast(inner, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def always_a_space():
    return llama_2(None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False))


KINDS = {
    "Llama 2": llama_2,
    "Llama 3": llama_3,
    "Qwen": qwen,
    "Gemma": gemma,
    "Mistral": mistral,
    "GPT-2": gpt_2,
    "Phi": phi,
    "digits": digits,
    "unigram": unigram,
    "a space everywhere": always_a_space,
    "bytes after a space": partial(gpt_2, space=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def tokenizer_of(kind):
    """One for all tests: whoever changes it takes a copy."""
    return KINDS[kind]()


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def spelled(tokenizer, tokens):
    return tokenizer.convert_ids_to_tokens(tokens)


def encoded(pairs, tokenizer, **settings):
    """Prompt, chosen and rejected of each pair, without padding."""
    tensors = real.encode(pairs, tokenizer, max_tokens=4096, **settings)
    return [tuple(map(unpadded, row)) for row in zip(*tensors, strict=True)]


def of_chats(rows):
    """The rows of a file of messages as pairs."""
    return [
        Preference(
            real.conversations.as_text(messages),
            row["chosen"][0]["content"],
            row["rejected"][0]["content"],
            messages,
        )
        for row in rows
        for messages in [tuple((m["role"], m["content"]) for m in row["prompt"])]
    ]


# --- beside trl ----------------------------------------------------------------------------------

MERGED = {
    "Qwen": [3, 5],
    "GPT-2": [2, 3],
    "bytes after a space": [2, 3],
    "digits": [],
}
"""The rows of `TEXTS` whose prompt merges with an answer; the others have row 3 alone."""


@kinds
def test_plain_pairs_have_the_tokens_of_trl_but_where_prompt_and_answer_merge(kind):
    tokenizer = tokenizer_of(kind)
    ours = encoded([Preference(**row) for row in TEXTS], tokenizer, template="{prompt}")
    theirs = trl_tokens(datasets.Dataset.from_list(TEXTS), tokenizer)
    merged = MERGED.get(kind, [3])
    assert [n for n in range(len(TEXTS)) if ours[n] != theirs[n]] == merged
    for n in merged:
        (prompt, *answers), (cut, *_), row = ours[n], theirs[n], TEXTS[n]
        assert prompt == tokenizer(row["prompt"]).input_ids
        assert cut == prompt[: len(cut)] != prompt  # trl leaves the end of the prompt out
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            assert answer[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(answer[:-1]) == row[name]  # here it stays; no space comes in


@kinds
def test_plain_pairs_cut_at_the_common_prefix_have_the_tokens_of_trl(kind):
    pairs = [Preference(**row) for row in TEXTS]
    ours = encoded(pairs, tokenizer_of(kind), template="{prompt}", boundary="common_prefix")
    assert ours == trl_tokens(datasets.Dataset.from_list(TEXTS), tokenizer_of(kind))


@kinds
def test_chats_have_the_tokens_of_trl(kind):
    tokenizer = tokenizer_of(kind)
    theirs = trl_tokens(datasets.Dataset.from_list(CHATS), tokenizer)
    for settings in ({}, {"template": CHAT}, {"boundary": "common_prefix"}):
        assert encoded(of_chats(CHATS), tokenizer, **settings) == theirs
    assert "film" in tokenizer.decode(theirs[0][0]) or kind == "digits"


def test_unknown_letters_on_both_sides_of_the_boundary_stay_apart():
    tokenizer = tokenizer_of("unigram")  # which writes letters that it does not know as one token
    unknown, end = tokenizer.unk_token_id, tokenizer.eos_token_id
    assert spelled(tokenizer, tokens_of(tokenizer, "was ééé"))[-2:] == ["▁", "<unk>"]
    pair = Preference("was é", "éé", "é was")
    ((prompt, *answers),) = encoded([pair], tokenizer, template="{prompt}")
    assert prompt[-1] == unknown
    assert answers == [[unknown, end], [unknown, *tokens_of(tokenizer, "was"), end]]
    with pytest.raises(ValueError, match="nothing but end tokens in the chosen answer of row 0"):
        encoded([pair], tokenizer, template="{prompt}", boundary="common_prefix")


# --- which template ------------------------------------------------------------------------------


def test_messages_are_read_with_the_chat_template_of_a_tokenizer_that_has_one():
    told, plain = of_chats(CHATS), [Preference(**row) for row in TEXTS]
    tokenizer = tokenizer_of("Llama 3")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for pairs, reader, template in (
        (told, tokenizer, CHAT),
        (told, bare, TEMPLATE),
        (plain, tokenizer, TEMPLATE),
        (plain, bare, TEMPLATE),
    ):
        assert real.default_template(pairs, reader) == template
        assert encoded(pairs, reader) == encoded(pairs, reader, template=template)
        counts = real.count_tokens(pairs, reader)
        assert counts == [len(row[0]) + max(map(len, row[1:])) for row in encoded(pairs, reader)]
    assert encoded(told, tokenizer) != encoded(told, bare)


def test_messages_among_texts_need_a_template():
    mixed = [Preference("hi", "yes", "no"), *of_chats(CHATS)]
    tokenizer = tokenizer_of("Llama 3")
    for pairs, message in (
        (mixed, "all have text like row 0 where no template is given, got messages in row 1"),
        (mixed[::-1], "all have messages like row 0 where no .*, got text in row 2"),
    ):
        for read in (real.default_template, real.count_tokens, encoded):
            with pytest.raises(ValueError, match=f"^`preferences` must {message} \\(template=CHAT"):
                read(pairs, tokenizer)
    prompt, *_ = encoded(mixed, tokenizer, template=CHAT)[0]
    assert tokenizer.decode(prompt).startswith("<|begin_of_text|><|start_header_id|>user<|end_head")


def answers_of(policy, tokenizer, prompt, **settings):
    """The greedy answer and one that is drawn, which are the same for a model that is sure."""
    greedy = real.greedy_answer(policy, tokenizer, prompt, max_tokens=60, **settings)
    generator = torch.Generator().manual_seed(0)
    sampled = real.sample_answer(
        policy, tokenizer, prompt, max_tokens=60, generator=generator, **settings
    )
    assert greedy == sampled
    return greedy


def test_answers_are_asked_for_as_the_pairs_were_read():
    tokenizer = tokenizer_of("Gemma")
    # after a line break the model says no, after the last word of the chat template yes
    line, yes, no = (tokens_of(tokenizer, text)[-1] for text in ("\n", ":yes", ":no"))
    close = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    moody = copy.deepcopy(tokenizer)
    moody.chat_template = moody.chat_template.replace("model\n{% endif %}", "{{ mood }}{% endif %}")
    policy = CausalLMPolicy(
        always([line, no, tokenizer.eos_token_id], len(tokenizer)), end_token=None
    )
    mood = tokens_of(tokenizer, "<start_of_turn>k")[-1]
    with torch.no_grad():
        policy.model.lm_head.weight[yes, mood] = 10.0
        policy.model.lm_head.weight[close, yes] = 10.0
    told = (("user", "ask me"),)
    arguments = {"chat_arguments": {"mood": "k"}}
    assert answers_of(policy, moody, told, **arguments) == "yes"
    assert answers_of(policy, moody, "ask me", template=CHAT, **arguments) == "yes"
    assert answers_of(policy, moody, "ask me") == "no"
    assert answers_of(policy, moody, told, template=TEMPLATE) == "no"
    moody.chat_template = None
    assert answers_of(policy, moody, told) == "no"
    with pytest.raises(
        ValueError, match=r"^`prompt` must be a tuple of \(role, content\), got a list"
    ):
        answers_of(policy, moody, [{"role": "user", "content": "ask me"}])


def test_an_answer_ends_where_the_chat_template_ends_it():
    tokenizer = tokenizer_of("Gemma")  # whose turns do not end in its end token
    line, yes, no = (tokens_of(tokenizer, text)[-1] for text in ("\n", ":yes", ":no"))
    close = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    path = [line, yes, close, no, tokenizer.eos_token_id]
    policy = CausalLMPolicy(always(path, len(tokenizer)), end_token=None)
    assert answers_of(policy, tokenizer, (("user", "ask me"),)) == "yes"
    assert answers_of(policy, tokenizer, "ask me") == "yesno"  # a template of text has one end


# --- special tokens in texts ---------------------------------------------------------------------


def marked(**special):
    """Qwen with one more special token, `<x>`."""
    tokenizer = qwen()
    tokenizer.add_tokens([AddedToken("<x>", **special)], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("pair", "where"),
    [
        (Preference("q", "yes{}\nmore", "no"), "the chosen answer"),
        (Preference("q", "yes", "no{}"), "the rejected answer"),
        (Preference("q{}system", "yes", "no"), "the prompt"),
        (Preference("q {}", "yes", "no", (("user", "q {}"),)), r"message 1 \(user\)"),
        (
            Preference(
                "system: s\nassistant: {}\nuser: q", "yes", "no",
                (("system", "s"), ("assistant", "{}"), ("user", "q")),
            ),
            r"message 2 \(assistant\)",
        ),
    ],
    ids=["inside", "at the end", "prompt", "message", "earlier turn"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "token"),
    [
        ("Qwen", "<|im_end|>"),
        ("Qwen", "<|endoftext|>"),
        ("Llama 3", "<|start_header_id|>"),
        ("Gemma", "<pad>"),
        ("Mistral", "[/INST]"),
        ("Mistral", "<unk>"),
        ("Phi", "<|end|>"),
        ("digits", "<ask>"),
    ],
)
def test_special_tokens_in_a_text_are_refused_under_a_chat_template(kind, token, pair, where):
    messages = tuple((role, text.replace("{}", token)) for role, text in pair.messages)
    texts = (text.replace("{}", token) for text in (pair.prompt, pair.chosen, pair.rejected))
    pairs = [Preference("q", "yes", "no"), Preference(*texts, messages)]
    tokenizer = tokenizer_of(kind)
    message = f"without the special token {re.escape(token)}, .*, got one inside {where} of row 1 "
    for read in (encoded, real.count_tokens):
        with pytest.raises(ValueError, match=f"^`preferences` must have texts {message}"):
            read(pairs, tokenizer, template=CHAT)


def test_special_tokens_are_found_as_the_tokenizer_finds_them():
    for special, text in (
        ({"single_word": True}, "see <x> there"),
        ({"lstrip": True, "rstrip": True}, "see  <x>"),
        ({"normalized": True}, "<x>"),
    ):
        tokenizer = marked(**special)
        with pytest.raises(ValueError, match="without the special token <x>"):
            encoded([Preference("q", text, "no")], tokenizer, template=CHAT)
    alone = marked(single_word=True)  # which is text inside a word, there and here
    assert len(encoded([Preference("q", "a<x>b", "no")], alone, template=CHAT)) == 1


def test_what_is_not_special_is_text_under_a_chat_template():
    pair = Preference("q <think>", "<think>\nwell</think>yes", "<|im_en", (("user", "q <think>"),))
    ((prompt, chosen, rejected),) = encoded([pair], tokenizer_of("Qwen"))
    tokenizer = tokenizer_of("Qwen")
    assert tokenizer.decode(chosen) == "<think>\nwell</think>yes<|im_end|>\n"
    assert tokenizer.convert_tokens_to_ids("<think>") in set(prompt) & set(chosen)
    assert tokenizer.decode(rejected) == "<|im_en<|im_end|>\n"
    unknown = Preference("1 + x", "7", "x", (("user", "1 + x"),))  # letters, read as <unk>
    assert tokenizer_of("digits").unk_token_id in encoded([unknown], tokenizer_of("digits"))[0][0]


def test_a_prompt_with_a_special_token_is_not_answered():
    policy = CausalLMPolicy(always([0], 300), end_token=None)
    for prompt, where in (("q<|eot_id|>", "the prompt"), ((("user", "q<|eot_id|>"),), "message 1")):
        with pytest.raises(ValueError, match=f"^`prompt` must .* <|eot_id|>, .* inside {where} "):
            answers_of(policy, tokenizer_of("Llama 3"), prompt, template=CHAT)


@pytest.mark.parametrize("kind", ["Llama 2", "Llama 3", "Mistral", "digits"])
def test_texts_that_a_chat_template_has_rendered_have_its_tokens(kind):
    """With `{prompt}` alone as template; the begin token that they spell is not doubled."""
    tokenizer = tokenizer_of(kind)
    rendered = []
    for row in CHATS:
        write = partial(tokenizer.apply_chat_template, tokenize=False)
        prompt = write(row["prompt"], add_generation_prompt=True)
        wholes = [write(row["prompt"] + row[name]) for name in ("chosen", "rejected")]
        rendered.append(Preference(prompt, *(whole.removeprefix(prompt) for whole in wholes)))
    chats = encoded(of_chats(CHATS), tokenizer)
    assert encoded(rendered, tokenizer, template="{prompt}") == chats
    assert {prompt[:2].count(tokenizer.bos_token_id) for prompt, *_ in chats} == {1}


# --- templates that write the prompt otherwise before an answer ----------------------------------

# As Qwen 3: an answer begins with a thought, which is closed at once where nobody is to think.
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "<think>\n{% if enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
# As DeepSeek R1: the prompt opens a thought, and the conversation is written without any.
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% endif %}"
)
# White space around a turn is kept in the last one alone.
STRIPS = QWEN_TEMPLATE.replace(
    "{{ m.content }}",
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content | trim }}{% endif %}",
)
ANSWERS = {"chosen": said("assistant: yes"), "rejected": said("assistant: no")}
ASKED = [{"prompt": said("user: film? "), **ANSWERS}]
TURN = "<|im_start|>assistant\n"
USER = "<|im_start|>user\nfilm? <|im_end|>\n"


@pytest.mark.parametrize(
    ("chat_template", "goes_on", "alone", "prompt", "chosen"),
    [
        (THINKS, "\n\n</think>\n\nyes<|im_end|>", "\n", f"{USER}{TURN}<think>",
         "\n\n</think>\n\nyes<|im_end|>\n"),
        (FORGETS, "yes<|im_end|>\n", "<think>\n", f"{USER}{TURN}", "yes<|im_end|>\n"),
        (STRIPS, "<|im_end|>\n<|im_start|>", " <|im_end|>\n", USER.partition(" <")[0],
         f"<|im_end|>\n{TURN}yes<|im_end|>\n"),
    ],
    ids=["thinks", "forgets", "strips"],
)  # fmt: skip
def test_a_prompt_that_is_written_otherwise_before_an_answer_is_cut_where_that_is_asked(
    chat_template, goes_on, alone, prompt, chosen
):
    tokenizer = qwen(chat_template)
    with pytest.raises(ValueError, match="^`tokenizer` must have a chat template whose") as refusal:
        encoded(of_chats(ASKED), tokenizer)
    for words in (
        f"goes on with {goes_on!r}"[:-1],
        "before the chosen answer of row 0 and with ",
        f"with {alone!r}"[:-1],
        "in the prompt alone",
        "`chat_arguments`",
        "boundary='common_prefix'",
    ):
        assert words in str(refusal.value)
    settings = {"boundary": "common_prefix"}
    (ours,) = encoded(of_chats(ASKED), tokenizer, **settings)
    assert [ours] == trl_tokens(datasets.Dataset.from_list(ASKED), tokenizer)
    assert [tokenizer.decode(tokens) for tokens in ours[:2]] == [prompt, chosen]
    counts = real.count_tokens(of_chats(ASKED), tokenizer, **settings)
    assert counts == [len(ours[0]) + max(map(len, ours[1:]))]


def test_arguments_reach_the_chat_template():
    tokenizer, arguments = qwen(THINKS), {"enable_thinking": False}
    ours = encoded(of_chats(ASKED), tokenizer, chat_arguments=arguments)
    rows = [{**row, "chat_template_kwargs": arguments} for row in ASKED]
    assert ours == trl_tokens(datasets.Dataset.from_list(rows), tokenizer)
    assert tokenizer.decode(ours[0][0]) == f"{USER}{TURN}<think>\n\n</think>\n\n"
    assert tokenizer.decode(ours[0][1]) == "yes<|im_end|>\n"
    policy = CausalLMPolicy(always([ours[0][0][-1], *ours[0][1]], len(tokenizer)), end_token=None)
    assert answers_of(policy, tokenizer, (("user", "film? "),), chat_arguments=arguments) == "yes"


def test_arguments_that_no_template_reads_are_refused():
    tokenizer, pairs = qwen(THINKS), of_chats(ASKED)
    variables = "variables that the tokenizer's chat template reads, beside messages and add_gen"
    for arguments, template, error, message in (
        ({"enable_thinkin": False}, CHAT, ValueError, f"{variables}.*, got 'enable_thinkin'$"),
        ({"thinking": False}, None, ValueError, f"{variables}.*, got 'thinking'$"),
        ({"add_generation_prompt": True}, None, ValueError, f"{variables}.*, got 'add_generation"),
        ({"enable_thinking": 1}, TEMPLATE, ValueError, "None unless template=CHAT, got 'enable_th"),
        (["enable_thinking"], None, TypeError, "a mapping from names to values, got list"),
    ):
        for read in (encoded, real.count_tokens):
            with pytest.raises(error, match=f"^`chat_arguments` must be {message}"):
                read(pairs, tokenizer, chat_arguments=arguments, template=template)
    with pytest.raises(
        ValueError, match="^`boundary` must be 'prompt' or 'common_prefix', got 'p'"
    ):
        encoded(pairs, tokenizer, boundary="p")


def test_a_template_that_leaves_out_a_part_of_an_answer_is_refused():
    forgetful = qwen(FORGETS)
    thoughts = [*of_chats(ASKED), Preference("film?", "yes", "<think>hm</think> no")]
    message = "^`tokenizer` must .*, got one that leaves out the rejected answer of row 1 or a part"
    with pytest.raises(ValueError, match=message):
        encoded(thoughts, forgetful, template=CHAT, boundary="common_prefix")
    # white space may go, as at the ends of what Llama 3 is given
    stripped = Preference("film?", " yes\n\n and ", "no")
    _, chosen, _ = encoded([stripped], tokenizer_of("Llama 3"), template=CHAT)[0]
    assert tokenizer_of("Llama 3").decode(chosen) == "yes\n\n and<|eot_id|>"


def test_a_conversation_without_its_prompt_is_refused():
    other = "{{ 'a' if add_generation_prompt else 'b' }}{% for m in messages %}{{ m.content }}"
    with pytest.raises(ValueError, match="^`tokenizer` must .* the first token of its prompt, got"):
        encoded(of_chats(ASKED), qwen(other + "{% endfor %}"), boundary="common_prefix")


# --- spaces and begin tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama 2", "Mistral", "Phi", "a space everywhere", "unigram"])
def test_a_space_that_texts_begin_with_is_not_put_before_an_answer(kind):
    tokenizer = tokenizer_of(kind)
    assert spelled(tokenizer, tokens_of(tokenizer, "yes")) != ["yes"]  # as a text of its own
    pairs = [Preference("ask me", "yes", "no yes"), Preference("the fi", "lm", "lm was")]
    apart, merging = encoded(pairs, tokenizer)[0], encoded(pairs, tokenizer, template="{prompt}")[1]
    for answers, row in ((apart[1:], pairs[0]), (merging[1:], pairs[1])):
        for tokens, text in zip(answers, (row.chosen, row.rejected), strict=True):
            assert "".join(spelled(tokenizer, tokens)[:-1]) == text.replace(" ", "▁")
    whole = tokenizer("ask me\nyes").input_ids
    assert [*apart[0], *apart[1]] == [*whole, tokenizer.eos_token_id]


def test_letters_that_merge_with_every_other_leave_the_answer_to_be_tokenised_alone():
    tokenizer = qwen()
    tokenizer.add_tokens([letter + "yes" for letter in "e\n.:;,!?-|\t0a"])
    _, chosen, _ = encoded([Preference("are", "yes", "no")], tokenizer, template="{prompt}")[0]
    assert chosen == [*tokens_of(tokenizer, "yes"), tokenizer.eos_token_id]


class OfDigits(PreTrainedTokenizer):
    """A tokenizer in Python, of digits alone; it begins every text with two tokens."""

    def __init__(self, **special):
        self.words = {word: n for n, word in enumerate(DIGITS)}
        super().__init__(unk_token="<unk>", eos_token="<end>", **special)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.words.get(token, self.words["<unk>"])

    def _convert_id_to_token(self, index):
        return DIGITS[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.words["<begin>"], self.words["<ask>"], *token_ids_0, self.words["<end>"]]


def drops_letters():
    """Of digits: other letters are left out, and nothing puts its begin token anywhere."""
    inner = Tokenizer(models.BPE({word: n for n, word in enumerate(DIGITS[1:])}, []))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(DIGITS[1:5])
    return fast(inner, bos_token="<begin>", eos_token="<end>")


def ends_with_its_begin_token():
    """GPT-2 that adds `<|endoftext|>` at the end, which is also the name of its begin token."""
    tokenizer = gpt_2()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    return tokenizer


def begins_with_its_end_token():
    """As OPT does."""
    tokenizer = gpt_2()
    tokenizer._tokenizer.post_processor = begins_with("<|endoftext|>", tokenizer._tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "begin"),
    [
        (digits, ["<begin>"]),
        (OfDigits, ["<begin>", "<ask>"]),
        (partial(OfDigits, additional_special_tokens=["<begin>", "<ask>"]), ["<begin>", "<ask>"]),
        (drops_letters, []),
        (ends_with_its_begin_token, []),
        (begins_with_its_end_token, ["<|endoftext|>"]),
        (phi, []),
        (llama_3, ["<|begin_of_text|>"]),
    ],
)
def test_a_prompt_begins_with_what_the_tokenizer_puts_there_once(make, begin):
    tokenizer = make()
    pairs = [Preference("1 +", "2", "3")]
    (plain,) = encoded(pairs, tokenizer, template="{prompt}")
    text = tokens_of(tokenizer, "1 +")
    answer = tokens_of(tokenizer, "1 +2")[len(text) :]
    assert plain[:2] == (
        tokenizer.convert_tokens_to_ids(begin) + text,
        [*answer, tokenizer.eos_token_id],
    )
    if spelled(tokenizer, tokens_of(tokenizer, "".join(begin))) == begin:  # not doubled
        written = encoded(pairs, tokenizer, template="".join(begin) + "{prompt}")
        assert written == [plain]
    empty = [Preference("", "2", "3")]
    if begin:
        assert spelled(tokenizer, encoded(empty, tokenizer, template="{prompt}")[0][0]) == begin
    else:
        with pytest.raises(ValueError, match="leaves an empty prompt without a token"):
            encoded(empty, tokenizer, template="{prompt}")


# --- many rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"template": CHAT}, {}], ids=["chat", "text"])
def test_rows_that_go_to_the_tokenizer_together_are_told_apart(settings):
    tokenizer, seen = tokenizer_of("Llama 3"), []

    def progress(rows):
        for row in rows:
            seen.append(row)
            yield row

    pairs = [
        Preference(f"{n} film" * (n % 3 + 1), f"yes {n}", "no" * (n % 4 + 1)) for n in range(600)
    ]
    one_by_one = [encoded([pair], tokenizer, **settings)[0] for pair in pairs]
    assert encoded(pairs, tokenizer, progress=progress, **settings) == one_by_one
    assert seen == list(range(600))
    for name, row in (("chosen", 599), ("rejected", 256)):
        texts = {"prompt": "q", "chosen": "yes", "rejected": "no", name: "a<|eot_id|>b"}
        bad = [*pairs[:row], Preference(**texts), *pairs[row + 1 :]]
        with pytest.raises(ValueError, match=f"inside the {name} answer of row {row}"):
            encoded(bad, tokenizer, **settings)


# --- the script ----------------------------------------------------------------------------------


def test_the_script_reads_messages_with_the_chat_template(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="the extra 'real' is not installed")
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    path = Path(__file__).resolve().parents[1] / "examples" / "train_dpo.py"
    specification = importlib.util.spec_from_file_location("train_dpo", path)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    tokenizer, pairs = qwen(THINKS), of_chats(ASKED * 2)
    real.save_model(always([0], len(tokenizer)), tokenizer, tmp_path / "start")
    real.save_preferences(tmp_path / "pairs.jsonl", pairs)
    trained_on = []
    score = real.reference_logps

    def spy(policy, tensors, **settings):
        trained_on.append((policy.end_token, tensors))
        return score(policy, tensors, **settings)

    monkeypatch.setattr(real, "reference_logps", spy)
    common = ["--model", str(tmp_path / "start"), "--pairs", str(tmp_path / "pairs.jsonl")]
    common += ["--steps", "1", "--batch-size", "2", "--no-checkpoints", "--output"]
    end = tokenizer.eos_token_id
    for n, (options, settings, end_token) in enumerate(
        [
            (["--boundary", "common_prefix"], {"boundary": "common_prefix"}, None),
            (["--chat", "--chat-arguments", '{"enable_thinking": false}'],
             {"chat_arguments": {"enable_thinking": False}}, None),
            (["--no-chat"], {"template": TEMPLATE}, end),
        ]
    ):  # fmt: skip
        script.main([*common, str(tmp_path / f"{n}"), *options])
        expected = real.encode(pairs, tokenizer, max_tokens=64, **settings)
        assert trained_on[-1][0] == end_token
        assert all(map(torch.equal, trained_on[-1][1], expected))
        template = settings.get("template", CHAT)
        assert f"template: {template!r}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="boundary='common_prefix'"):
        script.main([*common, str(tmp_path / "refused")])
    AcceleratorState._reset_state(True)

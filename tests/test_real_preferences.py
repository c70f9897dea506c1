"""Preference files in every form, good and bad, and their tokens beside those of `trl`."""

import contextlib
import copy
import csv
import io
import json
import os
import pickle
import re
import socket
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_mini.logps import PAD

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")
pytest.importorskip("datasets", reason="the extra 'real' is not installed")

import datasets
import pyarrow
import pyarrow.parquet

from dpo_mini import real
from dpo_mini.real import CHAT, CausalLMPolicy, Preference
from dpo_mini.real.formats import LONGEST_LINE

REAL_FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "instruction-preferences.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def said(*turns):
    """`said("user: hi", "assistant: hello")` as the messages of a file."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


TEXTS = [
    {"prompt": 'the "film"\nwas,', "chosen": " very good", "rejected": " bad, and\nlong"},
    {"prompt": "Q: 2 + 2?\n\nA:", "chosen": " four", "rejected": " 22"},
    {"prompt": "grün 🙂\u2028it was:", "chosen": " ok {really}", "rejected": " so-so"},
]
CONVERSATIONS = [
    {
        "prompt": said("system: be kind", "user: how was the film?"),
        "chosen": said("assistant: very good"),
        "rejected": said("assistant: bad: and long"),
    },
    {
        "prompt": said("user: hi", "assistant: hello", "user: 2 + 2?"),
        "chosen": said("assistant: four"),
        "rejected": said("assistant: 22"),
    },
]
FORMS = {
    "text beside a prompt": TEXTS,
    "text that begins with the prompt": [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in TEXTS
    ],
    "messages beside a prompt": CONVERSATIONS,
    "messages that begin with the prompt": [
        {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        for row in CONVERSATIONS
    ],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A list of the connections that were tried, each of which failed."""
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert not tried


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for row in TEXTS for text in row.values()]
    tokenizer = real.train_tokenizer(texts, vocab_size=300)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    table = rows if isinstance(rows, pyarrow.Table) else pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "jsonl": as_jsonl,
    "csv": as_csv,
    "parquet": as_parquet,
}


def unpadded(row):
    return [token for token in row.tolist() if token != PAD]


def our_tokens(preferences, tokenizer, template):
    encoded = real.encode(preferences, tokenizer, max_tokens=4096, template=template)
    return [tuple(map(unpadded, row)) for row in zip(*encoded, strict=True)]


def import_trl():
    trl = pytest.importorskip("trl", reason="trl is not installed (it needs Python 3.11)")
    if trl.__version__ != "1.16.0":
        pytest.skip(f"trl {trl.__version__} is not the pinned 1.16.0")
    return trl


def trl_tokens(dataset, tokenizer):
    """What `DPOTrainer` makes of a data set before it trains: prompt, chosen and rejected."""
    trl = import_trl()
    datasets.disable_progress_bars()
    rows = trl.DPOTrainer._prepare_dataset(  # private, so the version is pinned
        SimpleNamespace(_tokenizer=tokenizer),
        dataset,
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


# --- beside trl ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (kind, form)
        for kind in WRITERS
        for form in FORMS
        if kind != "csv" or form.startswith("text")  # CSV holds text alone, here and there
    ],
)
def test_the_same_file_gives_the_same_tokens_here_and_in_trl(tmp_path, tokenizer, kind, form):
    path = tmp_path / f"pairs.{kind}"
    path.write_bytes(WRITERS[kind](FORMS[form]))
    datasets.disable_progress_bars()
    theirs = datasets.load_dataset(
        kind.removesuffix("l"), data_files=str(path), split="train", cache_dir=str(tmp_path / "c")
    )
    ours = real.load_preferences(path)
    template = CHAT if form.startswith("messages") else "{prompt}"
    assert our_tokens(ours, tokenizer, template) == trl_tokens(theirs, tokenizer)
    # and not by chance: the text is all there
    tokens = our_tokens(ours, tokenizer, template)
    for pair, row, (_, answer, _) in zip(ours, FORMS[form], tokens, strict=True):
        assert pair.chosen in tokenizer.decode(answer)
        whole = row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"]
        assert whole.endswith(pair.chosen)


@pytest.mark.skipif(not REAL_FILE.exists(), reason="the real preference file is not here")
def test_real_pairs_have_the_tokens_of_trl_but_where_prompt_and_answer_merge():
    columns = {"prompt": ("instruction", "input")}
    pairs = real.load_preferences(REAL_FILE, columns=columns)
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=1500)
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    theirs = trl_tokens(datasets.Dataset.from_list(rows), tokenizer)
    ours = our_tokens(pairs, tokenizer, "{prompt}")
    differ = [n for n in range(len(pairs)) if ours[n] != theirs[n]]
    assert len(differ) < 0.01 * len(pairs)
    merged = [
        n
        for n, pair in enumerate(pairs)
        if any(
            tokenizer(pair.prompt + answer).input_ids[: len(prompt)] != prompt
            for prompt in [tokenizer(pair.prompt).input_ids]
            for answer in (pair.chosen, pair.rejected)
        )
    ]
    assert differ == merged


def test_a_prompt_keeps_its_last_letter_here_and_loses_it_in_trl():
    tokenizer = real.train_tokenizer(["a ab"] * 9, vocab_size=258)  # 'ab' is one token
    row = {"prompt": "a a", "chosen": "b", "rejected": "c"}
    assert tokenizer("ab").input_ids == [257]
    a, b, c, space = (tokenizer(letter).input_ids[0] for letter in "abc ")
    end = tokenizer.eos_token_id
    ours = our_tokens([Preference(**row)], tokenizer, "{prompt}")
    assert ours == [([a, space, a], [b, end], [c, end])]
    theirs = trl_tokens(datasets.Dataset.from_list([row]), tokenizer)
    assert theirs == [([a, space], [257, end], [a, c, end])]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "goes_on"),
    [
        ("Q: who? A: me", "Q: who? A: you", "Q: who? A:", ""),  # the space is the answer's
        ("Q: who?\nme", "Q: who?\nyou", "Q: who?\n", ""),
        ("one two", "one two three", "one", " tw"),  # one is the beginning of the other
        ("It is blue", "It is black", "It is", " bl"),  # letters that the answers share
        ("He said: don't", "He said: don't I", "He said:", " don'"),
        ("It is 3.14", "It is 3.15", "It is", " 3.1"),
        ("grün: größer", "grün: größte", "grün:", " größ"),
        ("<b>yes</b>", "<b>yet</b>", "<b>", "ye"),
    ],
)
def test_the_shared_beginning_is_that_of_trl_without_the_rest_of_a_word(
    tmp_path, chosen, rejected, prompt, goes_on
):
    trl = import_trl()
    row = {"chosen": chosen, "rejected": rejected}
    (tmp_path / "pairs.jsonl").write_bytes(as_jsonl([row]))
    (pair,) = real.load_preferences(tmp_path / "pairs.jsonl")
    assert trl.extract_prompt(row)["prompt"] == prompt + goes_on
    assert pair == Preference(prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_a_prompt_that_repeats_the_messages_is_read_as_trl_advises(tmp_path, tokenizer):
    trl = import_trl()
    answers = {
        "chosen": said("user: hi", "assistant: hello"),
        "rejected": said("user: hi", "assistant: what"),
    }
    (tmp_path / "pairs.jsonl").write_bytes(as_jsonl([{"prompt": "hi", **answers}]))
    pairs = real.load_preferences(tmp_path / "pairs.jsonl")
    theirs = datasets.Dataset.from_list([trl.data_utils.maybe_extract_prompt({**answers})])
    assert our_tokens(pairs, tokenizer, CHAT) == trl_tokens(theirs, tokenizer)


def test_a_plain_prompt_is_one_message_of_the_user(tokenizer):
    plain = [Preference("hi", "hello", "what")]
    told = [Preference("hi", "hello", "what", (("user", "hi"),))]
    assert our_tokens(plain, tokenizer, CHAT) == our_tokens(told, tokenizer, CHAT)
    prompt, chosen, rejected = our_tokens(told, tokenizer, CHAT)[0]
    assert tokenizer.decode(prompt) == "<|user|>\nhi<|endoftext|>\n<|assistant|>\n"
    assert tokenizer.decode(chosen) == "hello<|endoftext|>\n"
    longest = len(prompt) + max(len(chosen), len(rejected))
    assert real.count_tokens(told, tokenizer, template=CHAT) == [longest]
    with pytest.raises(
        ValueError, match="`preferences` must .*, the first of 1 of 1 that are too long"
    ):
        real.encode(told, tokenizer, max_tokens=longest - 1, template=CHAT)


def test_what_a_template_writes_after_the_end_token_is_scored_without_one(tokenizer):
    pairs = [Preference("hi", "hello", "what")]
    prompts, chosen, _ = real.encode(pairs, tokenizer, max_tokens=64, template=CHAT)
    model = real.tiny_gpt2(
        tokenizer, n_positions=64, width=16, generator=torch.Generator().manual_seed(0)
    )
    assert CausalLMPolicy(model, end_token=None).logps(prompts, chosen) < 0
    with pytest.raises(ValueError, match="`completions` must have .* after the end token"):
        CausalLMPolicy(model, end_token=tokenizer.eos_token_id).logps(prompts, chosen)


def test_answers_under_the_chat_template_and_under_the_same_template_as_text(tokenizer):
    alike = copy.deepcopy(tokenizer)
    alike.chat_template = "{{ messages[0]['content'] + '\n' }}"
    model = real.tiny_gpt2(
        tokenizer, n_positions=64, width=16, generator=torch.Generator().manual_seed(0)
    )
    policy = CausalLMPolicy(model, end_token=None)
    found = {
        real.greedy_answer(policy, alike, "it was", max_tokens=32, template=template)
        for template in (CHAT, "{prompt}\n")
    }
    assert len(found) == 1


# --- the forms -----------------------------------------------------------------------------------


def test_any_text_survives_every_kind_of_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(1, 0x2100, (20, 3, 30), generator=generator).tolist()
    marks = "\",\n\r\\\t;'\u2028\x85 "
    rows = [
        {
            name: "x" + "".join(marks[n % 11] if n % 3 == 0 else chr(n) for n in text) + "x"
            for name, text in zip(("prompt", "chosen", "rejected"), row, strict=True)
        }
        for row in letters
    ]
    for kind, write in WRITERS.items():
        path = tmp_path / f"pairs.{kind}"
        path.write_bytes(write(rows))
        assert real.load_preferences(path) == [Preference(**row) for row in rows], kind


def test_content_decides_where_the_name_does_not(tmp_path):
    expected = [Preference(**row) for row in TEXTS]
    for kind in ("json", "jsonl", "parquet"):
        path = tmp_path / f"{kind}.data"
        path.write_bytes(WRITERS[kind](TEXTS))
        assert real.load_preferences(path) == expected
    (tmp_path / "PAIRS.CSV").write_bytes(b"\xef\xbb\xbf" + as_csv(TEXTS))
    assert real.load_preferences(tmp_path / "PAIRS.CSV") == expected


def test_columns_are_mapped_in_every_kind_of_file(tmp_path):
    rows = [{"q": "say", "more": "hi", "good": "c", "bad": "d", "id": n} for n in range(3)]
    columns = {"prompt": ("q", "more"), "chosen": "good", "rejected": "bad"}
    for kind, write in WRITERS.items():
        path = tmp_path / f"pairs.{kind}"
        path.write_bytes(write(rows))
        pairs = real.load_preferences(path, columns=columns)
        assert pairs == [Preference("say\nhi", "c", "d")] * 3


def test_conversations_keep_their_roles_and_are_saved_with_them(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps(CONVERSATIONS))
    pairs = real.load_preferences(tmp_path / "pairs.json")
    assert pairs[0].messages == (("system", "be kind"), ("user", "how was the film?"))
    assert pairs[0].prompt == "system: be kind\nuser: how was the film?"
    assert len({*pairs, *pairs}) == 2  # they can be told apart, and counted
    real.save_preferences(tmp_path / "saved.jsonl", pairs)
    assert real.load_preferences(tmp_path / "saved.jsonl") == pairs
    lines = (tmp_path / "saved.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == CONVERSATIONS


def test_two_forms_are_not_saved_in_one_file(tmp_path):
    text = Preference("hi", "c", "r")
    told = Preference("hi", "c", "r", (("user", "hi"),))
    assert text != told
    for pairs, message in (
        ([text, told], "`preferences` must all have text like row 0, got messages in row 1"),
        ([told, told, text], "`preferences` must all have messages like row 0, got text in row 2"),
    ):
        with pytest.raises(ValueError, match=message):
            real.save_preferences(tmp_path / "pairs.jsonl", pairs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompt", "messages", "message"),
    [
        ("hi", [("user", "hi")], "`messages` must be a tuple of .*, got a list"),
        ("hi", ("user", "hi"), "`messages` must be pairs of .* and text, got 'user' as message 1"),
        (
            "hi",
            (("user", "hi"), ("tool", "x")),
            r"`messages` must .*, got \('tool', 'x'\) as message 2",
        ),
        ("hi", (("user", None),), r"`messages` must .*, got \('user', None\) as message 1"),
        ("ho", (("user", "hi"),), "`prompt` must be the text of the messages, 'hi', got 'ho'"),
    ],
)
def test_bad_messages_are_refused(prompt, messages, message):
    with pytest.raises(ValueError, match=message):
        Preference(prompt, "c", "r", messages)


def test_an_id_may_repeat_where_nobody_looks(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(as_jsonl([{"id": None, "n": 1, **TEXTS[0]}, {"id": None, "n": 1, **TEXTS[1]}]))
    assert len(real.load_preferences(path)) == 2
    with pytest.raises(
        ValueError, match=r"line 2: `id` \(column 'n'\) must be .*, got 1 as in line 1 \("
    ):
        real.load_preferences(path, columns={"id": "n"})
    path.write_bytes(as_jsonl([{"id": "a", **TEXTS[0]}, {"id": "a", **TEXTS[1]}]))
    assert len(real.load_preferences(path, columns={"id": ()})) == 2
    assert len(real.load_preferences(path, columns={"id": ("id", "prompt")})) == 2


# --- bad files -----------------------------------------------------------------------------------

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
TALK = {
    "prompt": said("user: p"),
    "chosen": said("assistant: c"),
    "rejected": said("assistant: r"),
}


def second(changes, first=GOOD):
    """A good line, and one with changes; a change to `...` leaves the column out."""
    changed = {**first, **changes}
    return as_jsonl([first, {k: v for k, v in changed.items() if v is not ...}])


def arrow(*rows, **types):
    """A Parquet file of text columns, some of another type."""
    names = list(rows[0])
    columns = [
        pyarrow.array([row[name] for row in rows], types.get(name, pyarrow.string()))
        for name in names
    ]
    return as_parquet(pyarrow.table(columns, names=names))


def not_utf8():
    length, text = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    array = pyarrow.StringArray.from_buffers(1, length, text)
    return as_parquet(
        pyarrow.table([pyarrow.array(["p"]), array, pyarrow.array(["r"])], list(GOOD))
    )


def repeated_column():
    return as_parquet(pyarrow.table([pyarrow.array(["x"])] * 4, [*GOOD, "chosen"]))


def damaged():
    content = bytearray(as_parquet([{name: f"{name} {n}" for name in GOOD} for n in range(999)]))
    content[4:200] = b"\xff" * 196
    return bytes(content)


CSV = "prompt,chosen,rejected\np,c,r\n"
BAD_FILES = [
    # what it is, its name, its content, where, the column or None, words of the reason
    (
        "missing column",
        "a.jsonl",
        second({"rejected": ...}),
        "line 2",
        "rejected",
        "one of the columns, got",
    ),
    (
        "missing prompt",
        "a.jsonl",
        second({"prompt": ...}),
        "line 2",
        "prompt",
        "one of the columns, got",
    ),
    ("number", "a.jsonl", second({"prompt": 3}), "line 2", "prompt", "got a number"),
    ("NaN", "a.jsonl", second({"chosen": float("nan")}), "line 2", "chosen", "got a number"),
    ("null", "a.jsonl", second({"chosen": None}), "line 2", "chosen", "got null"),
    ("object", "a.jsonl", second({"chosen": {"a": 1}}), "line 2", "chosen", "an object"),
    ("empty answer", "a.jsonl", second({"rejected": ""}), "line 2", "rejected", "an empty answer"),
    ("blank answer", "a.jsonl", second({"chosen": " \n\t"}), "line 2", "chosen", "an empty answer"),
    ("surrogate", "a.jsonl", second({"chosen": "\ud83d"}), "line 2", "chosen", "surrogate"),
    (
        "id twice",
        "a.jsonl",
        as_jsonl([{**GOOD, "id": n} for n in (7, 8, 7)]),
        "line 3",
        "id",
        "must be different in every entry, got 7 as in line 1 (",
    ),
    (
        "mixed prompts",
        "a.json",
        json.dumps(
            [
                {
                    "chosen": said("user: a", "assistant: c"),
                    "rejected": said("user: b", "assistant: r"),
                }
            ]
        ),
        "line 1, entry 1",
        "rejected",
        "must answer the prompt of chosen, 'a', got 'b'",
    ),
    (
        "long mixed prompts",
        "a.jsonl",
        as_jsonl(
            [
                {
                    name: said(f"user: {'word ' * 10**5}{name}", "assistant: c")
                    for name in ("chosen", "rejected")
                }
            ]
        ),
        "line 1",
        "rejected",
        "must answer the prompt of chosen, 'word word",
    ),
    (
        "nothing shared",
        "a.jsonl",
        as_jsonl([{"chosen": "yes", "rejected": "no"}]),
        "line 1",
        "prompt",
        "must be how both answers begin or one of the columns, got 'chosen', 'rejected': say with "
        "columns= where it is",
    ),
    (
        "forms change",
        "a.jsonl",
        as_jsonl([GOOD, GOOD, TALK]),
        "line 3",
        None,
        "must have text beside a prompt like line 1, got messages beside a prompt",
    ),
    (
        "prompt column ends",
        "a.json",
        json.dumps([GOOD, {"chosen": "Q: a", "rejected": "Q: b"}]),
        "line 1, entry 2",
        None,
        "must have text beside a prompt like line 1, entry 1, got text that begins with the prompt",
    ),
    (
        "list of entries",
        "a.json",
        json.dumps([{"chosen": "\n[{]", **GOOD}, {**GOOD, "chosen": 7}], indent=2),
        "line 7, entry 2",
        "chosen",
        "got a number",
    ),
    (
        "images",
        "a.jsonl",
        second({"images": ["a.png"]}),
        "line 2",
        "images",
        "must be empty, since",
    ),
    ("half messages", "a.jsonl", second({"rejected": "r"}, TALK), "line 2", "rejected", "got text"),
    ("text prompt", "a.jsonl", second({"prompt": "p"}, TALK), "line 2", "prompt", "got text"),
    (
        "messages as prompt",
        "a.jsonl",
        second({"prompt": said("user: p")}),
        "line 2",
        None,
        "must have text beside a prompt like line 1, got messages beside a prompt",
    ),
    (
        "prompt twice",
        "a.jsonl",
        second(
            {"chosen": said("user: p", "assistant: c")}
            | {"rejected": said("user: p", "assistant: r")},
            TALK,
        ),
        "line 2",
        "chosen",
        "must be one message, the answer, beside a prompt of messages, got 2",
    ),
    ("no messages", "a.jsonl", second({"chosen": []}, TALK), "line 2", "chosen", "an empty list"),
    (
        "user answers",
        "a.jsonl",
        second({"chosen": said("user: c")}, TALK),
        "line 2",
        "chosen",
        "must end with a message of 'assistant', got one of 'user'",
    ),
    (
        "unknown role",
        "a.jsonl",
        second({"prompt": said("user: p", "tool: 3")}, TALK),
        "line 2",
        "prompt",
        "must have 'system', 'user' or 'assistant' as the role of message 2, got 'tool'",
    ),
    (
        "no content",
        "a.jsonl",
        second({"chosen": [{"role": "assistant"}]}, TALK),
        "line 2",
        "chosen",
        "got an object with the keys 'role' as message 1",
    ),
    (
        "tool calls",
        "a.jsonl",
        second({"chosen": [{**said("assistant: c")[0], "tool_calls": [{"name": "f"}]}]}, TALK),
        "line 2",
        "chosen",
        "must have only role and content in message 1, got 'tool_calls' too",
    ),
    (
        "parts",
        "a.jsonl",
        second({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, TALK),
        "line 2",
        "prompt",
        "as the content of message 1 (no images or tools), got a part of type 'image'",
    ),
    ("tools", "a.jsonl", second({"tools": [{"name": "f"}]}, TALK), "line 2", "tools", "got a list"),
    (
        "truncated line",
        "a.jsonl",
        second({})[:-9],
        "line 2",
        None,
        "got Unterminated string starting at column 32",
    ),
    (
        "truncated list",
        "a.json",
        json.dumps([GOOD, GOOD], indent=0)[:-30],
        "line 9",
        None,
        "got Unterminated string starting at column",
    ),
    ("list without end", "a.json", json.dumps([GOOD])[:-1], "line 1", None, "must be valid JSON ("),
    ("key twice", "a.jsonl", b'{"prompt": "p", "prompt": "q"}', "line 1", "prompt", "twice"),
    (
        "endless number",
        "a.jsonl",
        b'{"a": ' + b"9" * 5000 + b"}",
        "line 1",
        None,
        "too many digits",
    ),
    (
        "invalid UTF-8",
        "a.jsonl",
        second({}) + b'{"a": "\xff"}',
        "line 3",
        None,
        "byte 8 of the line",
    ),
    ("invalid UTF-8 list", "a.json", b'[\n{"a": "\xc3"}]', "line 2", None, "byte 8 of the line"),
    ("UTF-16", "a.json", json.dumps([GOOD]).encode("utf-16"), "line 1", None, "must be UTF-8, got"),
    (
        "gzip",
        "a.json",
        b"\x1f\x8b\x08\0\0\0\0\0",
        None,
        None,
        "must be unpacked first, got a gzip file",
    ),
    ("zero byte", "a.jsonl", second({}) + b'{"a": "\0"}', "line 3", None, "zero byte as letter 8"),
    ("huge line", "a.jsonl", second({}) + b"{" * 1001, "line 3", None, "at most 1000 bytes"),
    ("huge CSV line", "a.csv", CSV + "x" * 1001, "line 3", None, "at most 1000 bytes"),
    ("empty", "a.jsonl", b"", None, None, "got no entries"),
    ("empty list", "a.json", b"[]", None, None, "got no entries"),
    ("empty CSV", "a.csv", b"", None, None, "got no entries"),
    ("header alone", "a.csv", "prompt,chosen,rejected\n", None, None, "got no entries"),
    (
        "column twice",
        "a.csv",
        "prompt,chosen,chosen\n",
        "line 1",
        "chosen",
        "each column once, got",
    ),
    (
        "other columns",
        "a.csv",
        CSV.replace("chosen", "good"),
        "line 2",
        "chosen",
        "one of the columns",
    ),
    (
        "field short",
        "a.csv",
        CSV + "p,c\n",
        "line 3",
        "rejected",
        "must have 3 fields like the header, got 2, none for",
    ),
    (
        "field more",
        "a.csv",
        CSV + "p,c,r,s\n",
        "line 3",
        None,
        "must have 3 fields like the header, got 4",
    ),
    ("empty field", "a.csv", CSV + '"a\nb",c,\n', "line 3", "rejected", "an empty answer"),
    (
        "after line breaks",
        "a.csv",
        CSV + '"a\nb",c,r\n\n\np,,r\n',
        "line 7",
        "chosen",
        "empty answer",
    ),
    ("open quote", "a.csv", CSV + 'p,c,"r\nand so on\n', "line 3", None, "unexpected end of data"),
    ("stray quote", "a.csv", CSV + 'p,"c"c,r\n', "line 3", None, "valid CSV, got ',' expected"),
    ("invalid UTF-8 CSV", "a.csv", CSV.encode() + b"p,\xff,r\n", "line 3", None, "byte 3 of the"),
    ("zero byte CSV", "a.csv", CSV + "p,\0,r\n", "line 3", None, "zero byte as letter 3"),
    (
        "id twice CSV",
        "a.csv",
        "id," + CSV.replace("\np", "\n1,p") + "1,p,c,r\n",
        "line 3",
        "id",
        "line 2",
    ),
    (
        "not Parquet",
        "a.parquet",
        as_jsonl([GOOD]),
        None,
        None,
        "must be valid Parquet, got Parquet magic",
    ),
    ("empty Parquet", "a.parquet", b"", None, None, "valid Parquet, got Parquet file size is 0"),
    (
        "cut Parquet",
        "a.parquet",
        lambda: arrow(GOOD)[:-20],
        None,
        None,
        "must be valid Parquet, got",
    ),
    ("damaged Parquet", "a.parquet", damaged, "row", None, "must be valid Parquet, got"),
    (
        "Parquet without rows",
        "a.parquet",
        lambda: as_parquet(pyarrow.table({"a": []})),
        None,
        None,
        "no en",
    ),
    (
        "Parquet of numbers",
        "a.parquet",
        lambda: arrow({**GOOD, "chosen": 3}, chosen=pyarrow.int64()),
        "row 1",
        "chosen",
        "must be text or a list of messages, got a number",
    ),
    (
        "null in Parquet",
        "a.parquet",
        lambda: arrow(GOOD, {**GOOD, "chosen": None}),
        "row 2",
        "chosen",
        "null",
    ),
    (
        "Parquet column",
        "a",
        lambda: arrow({"prompt": "p", "chosen": "c"}),
        "row 1",
        "rejected",
        "one of the columns",
    ),
    ("Parquet not UTF-8", "a.parquet", not_utf8, "row 1", "chosen", "invalid start byte at byte 2"),
    ("Parquet column twice", "a.parquet", repeated_column, None, "chosen", "each column once, got"),
    (
        "Parquet messages",
        "a.parquet",
        lambda: as_parquet([TALK, {**TALK, "chosen": said("user: c")}]),
        "row 2",
        "chosen",
        "must end with a message of 'assistant', got one of 'user'",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "place", "column", "words"),
    [pytest.param(*case, id=what) for what, *case in BAD_FILES],
)
def test_a_bad_file_gets_one_sentence_with_its_place(
    tmp_path, monkeypatch, name, content, place, column, words
):
    if "at most 1000 bytes" in words:
        monkeypatch.setattr("dpo_mini.real.formats.LONGEST_LINE", 1000)
    content = content() if callable(content) else content
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"^.*$") as refusal:
        real.load_preferences(path)
    where = str(path) + (f", {place}" if place else "")
    assert str(refusal.value).startswith(where)
    rest = str(refusal.value).removeprefix(where)
    assert words in rest
    assert column is None or column in rest
    assert re.search(r" must (be|have|end|answer) .*, got ", rest)
    assert "\n" not in rest
    assert len(rest) < 300
    assert list(tmp_path.iterdir()) == [path]


def test_there_are_bad_files_enough():
    assert len({what for what, *_ in BAD_FILES}) == len(BAD_FILES) >= 35


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_cut_anywhere_is_refused_or_holds_its_first_pairs(tmp_path, kind):
    path = tmp_path / f"pairs.{kind}"
    whole = WRITERS[kind](TEXTS)
    pairs = [Preference(**row) for row in TEXTS]
    read = set()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with contextlib.suppress(ValueError):
            found = real.load_preferences(path)
            assert found == pairs[: len(found)]
            read.add(len(found))
    assert read == ({1, 2, 3} if kind in ("jsonl", "csv") else set())


def test_what_is_not_a_file_is_refused_by_name(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        real.load_preferences(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        real.load_preferences(tmp_path / "no.csv")


def test_a_mapped_column_is_named_as_the_file_names_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("q,more,good,rejected\np,m,,r\n")
    columns = {"prompt": ("q", "more"), "chosen": "good"}
    with pytest.raises(ValueError, match=r"line 2: `chosen` \(column 'good'\) must have some"):
        real.load_preferences(path, columns=columns)
    with pytest.raises(ValueError, match=r"line 2: `chosen` \(column 'best'\) .*, got 'q', 'more'"):
        real.load_preferences(path, columns={**columns, "chosen": "best"})
    with pytest.raises(ValueError, match=r"`id` \(column 'number'\) must be one of the columns"):
        real.load_preferences(
            path, columns={**columns, "chosen": "more", "prompt": "q", "id": "number"}
        )
    for twice in ({"chosen": "rejected"}, {"prompt": "chosen"}, {"chosen": ("q", "q")}):
        with pytest.raises(ValueError, match=r"`columns` must .* once, got '\w+' for \w+ and for"):
            real.load_preferences(path, columns=twice)


def test_an_error_knows_its_column_whatever_the_value_says(tmp_path):
    """The column is not looked for in the message, where a value may look like one."""
    path = tmp_path / "a.jsonl"
    for role, columns in (("tool", {"prompt": "tool"}), ("chosen: 'q'", {"prompt": "q"})):
        row = {**TALK, columns["prompt"]: [{"role": role, "content": "3"}]}
        path.write_bytes(as_jsonl([row]))
        message = f"^.*a.jsonl, line 1: `prompt` \\(column '{columns['prompt']}'\\) must .*, got "
        with pytest.raises(ValueError, match=message + re.escape(repr(role)) + r" \(roles="):
            real.load_preferences(path, columns=columns)
    both = {"prompt": ("prompt", "more")}
    for changes, columns, message in (
        ({"more": None}, both, r"1: `prompt` \(column 'more'\) must be text, got null"),
        ({"more": "", "prompt": 3}, both, "1: `prompt` must be text, got a number"),
        (
            {"a": "", "b": "", "chosen": None},
            {"chosen": ("a", "b")},
            r"`chosen` \(column 'a', 'b'\) must have",
        ),
    ):
        path.write_bytes(as_jsonl([{**GOOD, **changes}]))
        with pytest.raises(ValueError, match=message):
            real.load_preferences(path, columns=columns)


def test_a_pair_that_is_refused_names_its_column():
    with pytest.raises(
        ValueError, match="^`rejected` must have some text, got an empty answer$"
    ) as e:
        Preference("p", "c", " ")
    assert (e.value.name, str(pickle.loads(pickle.dumps(e.value)))) == ("rejected", str(e.value))


def test_a_huge_line_is_refused_without_reading_it_all(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(as_jsonl([GOOD]))
        file.truncate(40 * LONGEST_LINE)  # zeros, that take no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2 must have at most 67108864 by"):
            real.load_preferences(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * LONGEST_LINE
    finally:
        tracemalloc.stop()


def test_a_bad_data_set_is_refused_by_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(as_jsonl([{**GOOD, "id": 1}, {**GOOD, "id": 1}]))
    with pytest.raises(
        ValueError, match=r"train, row 2: `id` must be different .*, got 1 as in row 1"
    ):
        real.load_hub_preferences(str(folder), split="train")


# --- bad chat templates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "a chat_template for template=CHAT, got one without"),
        (
            "{{ raise_exception('no system here') }}",
            r"of user, got one that fails on row 0 with TemplateError \(no system here\)$",
        ),
        ("{% for message in messages %}", r"fails on row 0 with TemplateSyntaxError \("),
        ("{{ nothing.at.all }}", r"fails on row 0 with UndefinedError \('nothing' is undefined\)"),
        ("{{ messages[0]['content'] + 1 }}", "fails on row 0 with TypeError"),
        (
            "{% if not add_generation_prompt %}{{ messages[1]['content'] / 2 }}{% endif %}x",
            "of user, assistant, got one that fails on the chosen answer of row 0 with TypeError",
        ),
        (
            CHAT_TEMPLATE.replace("{% endif %}", "<think>{% endif %}"),
            "goes on with 'hello.*' before the chosen answer of row 0 and with '<think>' in the ",
        ),
        (
            "{{ messages[0]['content'] }}",
            "after the prompt, got one that leaves out the chosen answer of row 0",
        ),
        ("{{ '' }}", "writes something, got nothing for row 0"),
        (
            "{{ messages[0]['content'] }}{% if add_generation_prompt %}:{% endif %}",
            "goes on with '' before the chosen answer of row 0 and with ':' in the prompt alone",
        ),
    ],
)
def test_a_chat_template_that_fails_is_refused_with_its_row(tokenizer, chat_template, message):
    failing = copy.deepcopy(tokenizer)
    failing.chat_template = chat_template
    for encode in (partial(real.encode, max_tokens=64), real.count_tokens):
        with pytest.raises(ValueError, match=f"^`tokenizer` must have .*{message}"):
            encode([Preference("hi", "hello", "what")], failing, template=CHAT)


def test_a_prompt_that_the_conversation_does_not_go_on_with_is_cut_by_trl(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = CHAT_TEMPLATE.replace("{% endif %}", "<think>{% endif %}")
    row = {
        "prompt": said("user: hi"),
        "chosen": said("assistant: hello"),
        "rejected": said("assistant: what"),
    }
    (theirs,) = trl_tokens(datasets.Dataset.from_list([row]), thinking)
    assert thinking.decode(theirs[0]) == "<|user|>\nhi<|endoftext|>\n<|assistant|>\n"
    assert [theirs] == our_tokens([Preference("hi", "hello", "what")], tokenizer, CHAT)
    with pytest.raises(ValueError, match="got one that .* and with '<think>' in the prompt alone"):
        real.encode([Preference("hi", "hello", "what")], thinking, max_tokens=64, template=CHAT)


def test_an_end_token_inside_an_answer_is_refused_under_the_chat_template_too(tokenizer):
    pairs = [Preference("a", "b", "c"), Preference("a", "b", f"c{real.END}")]
    with pytest.raises(
        ValueError,
        match="`preferences` must have .*, got one inside the rejected answer of row 1",
    ):
        real.encode(pairs, tokenizer, max_tokens=64, template=CHAT)


# --- no network ----------------------------------------------------------------------------------


def test_a_local_folder_is_loaded_without_the_network(tmp_path, tokenizer, monkeypatch, no_network):
    import huggingface_hub

    model = real.tiny_gpt2(
        tokenizer, n_positions=64, width=16, generator=torch.Generator().manual_seed(0)
    )
    real.save_model(model, tokenizer, tmp_path / "model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for load in (real.load_model, real.download_model):
        _, loaded = load(str(tmp_path / "model"))
        assert loaded.chat_template == CHAT_TEMPLATE
        assert not no_network
    with pytest.raises(FileNotFoundError, match="must be a folder on this machine"):
        real.load_model("nobody/no-such-model")
    assert not no_network
    (tmp_path / "pairs.jsonl").write_bytes(as_jsonl(TEXTS))
    real.load_preferences(tmp_path / "pairs.jsonl")
    with pytest.raises(FileNotFoundError):
        real.load_preferences("nobody/no-such-data")
    assert not no_network
    with pytest.raises(OSError):  # the control: a name that is no folder does reach for it
        real.download_model("nobody/no-such-model")
    assert no_network
    no_network.clear()

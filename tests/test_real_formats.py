"""Preference files as people publish them: columns, transcripts, labels, bad rows, splits."""

import ast
import csv
import importlib.util
import io
import json
import os
import re
from pathlib import Path

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
from dpo_mini.real import Preference

ROOT = Path(__file__).resolve().parent.parent
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def said(*turns):
    """`said("user: hi", "assistant: hello")` as the messages of a file."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "json": lambda rows: json.dumps(rows).encode(),
    "jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.fixture
def load(tmp_path):
    """`load([row, ...], **arguments)`: the pairs of a file with these rows."""

    def write_and_load(rows, kind="jsonl", **arguments):
        path = tmp_path / f"pairs.{kind}"
        path.write_bytes(rows if isinstance(rows, bytes) else WRITERS[kind](rows))
        return real.load_preferences(path, **arguments)

    return write_and_load


def told(*turns):
    return tuple((turn["role"], turn["content"]) for turn in said(*turns))


# --- columns that nobody reads -------------------------------------------------------------------

THOUGHT = {"chosen": "<think>\nfour", "rejected": "<think>\n22"}
ANSWERS = {"chosen": "four", "rejected": "22"}
CHAT = {
    "chosen": said("user: 2 + 2?", "assistant: four"),
    "rejected": said("user: 2 + 2?", "assistant: 22"),
}
UNREAD = [
    # what the file has, what the user says, the column that nobody reads
    ({"question": "2 + 2?", **THOUGHT}, {}, "question"),
    ({"question": "2 + 2?", **ANSWERS}, {}, "question"),
    ({"question": "2 + 2?", "chosen": "four", "rejected": "four"}, {}, "question"),
    ({"instruction": "Add.", "input": "2 + 2", **THOUGHT}, {}, "instruction"),
    ({"instruction": "Add.", "input": "2 + 2", **ANSWERS}, {"prompt": "instruction"}, "input"),
    ({"prompt": "2 + 2?", "context": "a sum", **ANSWERS}, {}, "context"),
    ({"system": "Be kind.", "question": "2 + 2?", **ANSWERS}, {"prompt": "question"}, "system"),
    ({"System_Prompt": "Be kind.", "prompt": "2 + 2?", **ANSWERS}, {}, "System_Prompt"),
    ({"system": "Be kind.", **CHAT}, {}, "system"),
    ({"system": "Be kind.", "prompt": said("user: 2 + 2?"), **ANSWERS}, {}, "system"),
    ({"history": [["hi", "hello"]], "prompt": "2 + 2?", **ANSWERS}, {}, "history"),
    ({"history": "2 + 2?", **ANSWERS}, {}, "history"),
    ({"aufgabe": "Was ist 2 + 2?", **THOUGHT}, {}, "aufgabe"),
    ({"问题": "二加二是多少?", **THOUGHT}, {}, "问题"),
    ({"conversations": said("user: 2 + 2?"), **THOUGHT}, {}, "conversations"),
    (
        {"talk": said("user: 2 + 2?")} | {k: said(f"assistant: {v}") for k, v in ANSWERS.items()},
        {},
        "talk",
    ),
]


@pytest.mark.parametrize(("row", "columns", "unread"), UNREAD)
def test_a_column_of_words_that_nobody_reads_is_refused_and_two_mappings_are_named(
    load, row, columns, unread
):
    with pytest.raises(ValueError, match=rf"line 1: `{unread}` must be read or left out by") as e:
        load([row], columns=columns)
    reads = re.search(r"columns=(\{.*?\}) reads it, columns=(\{.*?\}) leaves it out", str(e.value))
    read, leave = map(ast.literal_eval, reads.groups())
    (pair,) = load([row], columns={**columns, **read})
    words = row[unread]
    for text in [words] if isinstance(words, str) else [words[0]]:
        content = [text] if isinstance(text, str) else text
        content = [content["content"]] if isinstance(content, dict) else content
        assert all(part in pair.prompt for part in content)
    if "prompt" in leave and row["chosen"] != THOUGHT["chosen"]:
        with pytest.raises(
            ValueError, match="`(prompt` must be how|prompt` must be the|rejected` must di)"
        ):
            load([row], columns={**columns, **leave})  # since nothing is left to be the prompt
    else:
        assert len(load([row], columns={**columns, **leave})) == 1


@pytest.mark.parametrize("kind", WRITERS)
def test_a_question_is_refused_in_every_kind_of_file_unless_its_words_are_in_the_prompt(load, kind):
    rows = [{"question": "2 + 2?", **THOUGHT}]
    with pytest.raises(ValueError, match=r'`question` must .*columns=\{"prompt": "question"\}'):
        load(rows, kind)
    again = [{"question": "2 + 2?", **{k: f"2 + 2? {v}" for k, v in ANSWERS.items()}}]
    assert load(again, kind) == [Preference("2 + 2?", " four", " 22")]
    empty = [{"prompt": "2 + 2?", "input": "", **ANSWERS}]
    assert load(empty, kind) == [Preference("2 + 2?", "four", "22")]


def test_a_row_further_down_is_refused_too_and_never_left_out(load):
    rows = [{"prompt": "2 + 2?", "input": words, **ANSWERS} for words in ("", "", "of course")]
    for left_out in (None, []):
        with pytest.raises(ValueError, match=r'line 3: `input` .*\{"prompt": \("prompt", "input"'):
            load(rows, left_out=left_out)
    assert len(load(rows, columns={"ignored": "input"})) == 3


def test_files_of_the_hub_are_read_as_they_are(load):
    about = {
        "id": 1,
        "source": "hh rlhf",
        "model": "gpt-4",
        "score_chosen": 9.5,
        "tags": ["a", "b"],
    }
    assert load([{"prompt": "2 + 2?", **ANSWERS, **about}])  # names and numbers block nothing
    binarized = {"prompt": "2 + 2?", "prompt_id": "f0e3", "messages": CHAT["chosen"], **CHAT}
    assert load([binarized])[0].prompt == "2 + 2?"
    hh = {name: f"{HUMAN} 2 + 2?{ASSISTANT} {text}" for name, text in ANSWERS.items()}
    assert load([{**hh, "source": "helpful base"}])[0].chosen == " four"
    shp = {"post_id": "x1", "domain": "askmath", "history": "2 + 2?", "labels": 0, "score_A": 3}
    shp |= {"human_ref_A": "22", "human_ref_B": "four"}
    columns = {"prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B"}
    expected = [Preference("2 + 2?", "four", "22")]
    assert load([shp], columns={**columns, "label": "labels"}, labels=(1, 0)) == expected
    safe = {"prompt": "2 + 2?", "response_0": "22", "response_1": "four", "better_response_id": 1}
    columns = {"chosen": "response_0", "rejected": "response_1"}
    safe = {**safe, "safer_response_id": 0}
    columns["label"] = "better_response_id"
    assert load([safe], columns=columns, labels=(0, 1)) == expected
    summaries = {"info": {"post": "2 + 2?"}, "summaries": [{"text": "22"}, {"text": "four"}]}
    columns = {"chosen": "summaries.0.text", "rejected": "summaries.1.text", "label": "choice"}
    columns["prompt"] = "info.post"
    assert load([{**summaries, "choice": 1}], columns=columns, labels=(0, 1)) == expected
    steer = {"context": said("user: 2 + 2?"), "response1": "four", "response2": "22"}
    columns = {"prompt": "context", "chosen": "response1", "rejected": "response2"}
    (pair,) = load([steer], columns=columns)
    assert pair == Preference("2 + 2?", "four", "22", (("user", "2 + 2?"),))


# --- transcripts ---------------------------------------------------------------------------------


def transcripts(n, generator, human=HUMAN, assistant=ASSISTANT):
    """Rows of two transcripts, each with the pair that it is, or None where it is none."""
    words = ["I", "can", "do", "that:", "don't", "ask", "\n\nHumans:", "Human", "yes.", "3.14", "é"]

    def text(least, most):
        n_words = torch.randint(least, most + 1, (), generator=generator)
        picked = torch.randint(len(words), (int(n_words),), generator=generator).tolist()
        return "".join(" " + words[word] for word in picked)

    rows = []
    for row in range(n):
        before = ""
        for _ in range(row % 3):
            before += human + text(1, 4) + assistant + text(0, 4)
        prompt = before + human + text(1, 6) + assistant
        shared = text(0, 5)
        good, bad = shared + text(1, 4), shared + text(1, 4)
        kind = row % 10
        if kind == 1:  # one answer is the beginning of the other
            bad = good + " more"
        if kind == 2:
            bad = good
        if kind == 3:  # answers that differ inside the first word
            good, bad = " unhappy", " unhappily"
        pair = Preference(prompt, good, bad)
        chosen, rejected = prompt + good, prompt + bad
        if kind == 4:
            pair, rejected = None, prompt
        if kind == 5:
            pair, chosen = None, prompt + " \n"
        if kind == 6:  # people say other things
            pair, rejected = None, before + human + " so" + assistant + bad
        if kind == 7:
            pair, chosen = None, chosen + human + " thanks"
        if kind == 8:
            pair, rejected = None, rejected + human + " what?" + assistant + " no"
        rows.append(({"chosen": chosen, "rejected": rejected}, pair))
    return rows


def test_every_prompt_of_a_transcript_is_what_stands_before_the_last_answer(load):
    rows = transcripts(400, torch.Generator().manual_seed(0))
    left_out = []
    pairs = load([row for row, _ in rows], left_out=left_out)
    assert pairs == [pair for _, pair in rows if pair]
    bad = [f"line {n}:" for n, (_, pair) in enumerate(rows, 1) if not pair]
    assert [re.match(r"line \d+:", reason)[0] for reason in left_out] == bad
    assert sum("empty answer" in reason for reason in left_out) == 80
    assert sum("must answer the prompt of chosen" in reason for reason in left_out) == 80
    assert sum("must end with a turn marked" in reason for reason in left_out) == 40
    with pytest.raises(ValueError, match="line 5: `rejected` must have some text, got an empty"):
        load([row for row, _ in rows])


def test_other_markers_are_given(load):
    markers = ("### Instruction:", "### Response:")
    rows = transcripts(100, torch.Generator().manual_seed(1), *markers)
    pairs = load([row for row, _ in rows], turn_markers=markers, left_out=[])
    assert pairs == [pair for _, pair in rows if pair]
    with pytest.raises(ValueError, match="`chosen` must end with a turn marked .*, got none"):
        load([row for row, _ in rows], turn_markers=("user:", "bot:"))
    nested = {"chosen": "Q: who? Q&A: me", "rejected": "Q: who? Q&A: you"}
    (pair,) = load([nested], turn_markers=("Q:", "Q&A:"))
    assert pair == Preference("Q: who? Q&A:", " me", " you")
    for bad in ("Q:", ("Q:",), ("Q:", "Q:"), ("Q:", " "), ("Q:", 3)):
        with pytest.raises(ValueError, match="`turn_markers` must be two texts, .*, got "):
            load([nested], turn_markers=bad)


def test_a_person_inside_an_answer_is_refused_beside_a_prompt_too(load):
    row = {"prompt": f"{HUMAN} hi{ASSISTANT}", "chosen": " yo", "rejected": f" no{HUMAN} what?"}
    with pytest.raises(ValueError, match="`rejected` must be one turn, the assistant's, got a pe"):
        load([row])
    with pytest.raises(ValueError, match="`chosen` must be one turn, .* marked 'Q:'"):
        load(
            [{"prompt": "Q: hi A:", "chosen": " x Q: y", "rejected": "z"}],
            turn_markers=("Q:", "A:"),
        )
    assert load([{**row, "prompt": "Quote one turn."}])  # not a transcript


def test_without_markers_no_prompt_ends_inside_a_word_and_no_answer_is_empty(load):
    generator = torch.Generator().manual_seed(0)
    n_read, refused = 0, []
    for _ in range(300):
        letters = torch.randint(4, (2, 12), generator=generator).tolist()
        shared = "start of it " + "".join("ab .'"[n] for n in letters[0][:6])
        good, bad = (shared + "".join("ab .'"[n] for n in row[6:]) for row in letters)
        try:
            (pair,) = load([{"chosen": good, "rejected": bad}])
        except ValueError as error:
            refused.append(str(error))
            continue
        n_read += 1
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (good, bad)
        assert pair.chosen.strip()
        assert pair.rejected.strip()
        for answer in (pair.chosen, pair.rejected):
            assert not (pair.prompt[-1].isalnum() and answer[0].isalnum())
    assert n_read > 250
    assert all(re.search("must (differ|have some text after)", reason) for reason in refused)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("Q: hi A: yes", "Q: hi A: yes", "`rejected` must differ from chosen where .* same text"),
        ("Q: hi A: yes", "Q: hi A: yes\n", "`rejected` must differ from chosen where .* same text"),
        ("Q: hi A:", "Q: hi A: yes", "`chosen` must have some text after 'Q: hi A:', got none"),
        ("<|user|>hi<|bot|>yes", "<|user|>hi<|bot|> ", "`rejected` must have some text after"),
        ("yes", "yes sir", "`prompt` must be how both answers begin or one of the columns"),
    ],
)
def test_texts_that_do_not_say_where_the_prompt_ends_are_refused(load, chosen, rejected, message):
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        load([{"chosen": chosen, "rejected": rejected}])


def test_marks_and_no_marks_are_two_forms(load):
    marked = {name: f"{HUMAN} 2 + 2?{ASSISTANT} {text}" for name, text in ANSWERS.items()}
    plain = {name: f"2 + 2? {text}" for name, text in ANSWERS.items()}
    with pytest.raises(ValueError, match="line 2 must have text with marked turns like line 1"):
        load([marked, plain])


# --- answers of several turns --------------------------------------------------------------------


def test_of_answers_of_several_turns_the_first_that_differ_are_taken_where_that_is_asked_for(load):
    start = ["system: be kind", "user: hi", "assistant: hello", "user: 2 + 2?"]
    good = ["assistant: four", "user: sure?", "assistant: yes"]
    bad = ["assistant: 22", "user: really?", "assistant: yes"]
    whole = [{"chosen": said(*start, *good), "rejected": said(*start, *bad)}]
    beside = [{"prompt": said(*start), "chosen": said(*good), "rejected": said(*bad)}]
    later = [{"prompt": said(*start[:2]), "chosen": said(*start[2:], *good)}]
    later[0]["rejected"] = said(*start[2:], *bad)
    expected = Preference(real_text(start), "four", "22", told(*start))
    for rows in (whole, beside, later):
        with pytest.raises(ValueError, match=r"\(first_answers=True takes the first answers that"):
            load(rows)
        assert load(rows, first_answers=True) == [expected]
    people = [
        {"chosen": said("user: a", "assistant: c"), "rejected": said("user: b", "assistant: c")}
    ]
    with pytest.raises(ValueError, match=r"must answer the prompt of chosen, 'a', got 'b'; left"):
        load(people, first_answers=True)
    one = [{"prompt": said("user: hi"), "chosen": said("assistant: a", "user: b", "assistant: c")}]
    one[0]["rejected"] = said("assistant: a", "user: b", "assistant: d")
    with pytest.raises(ValueError, match=r"must be one message.*got 3 \(first_answers=True takes"):
        load(one)
    (pair,) = load(one, first_answers=True)
    assert (pair.messages, pair.chosen, pair.rejected) == (
        told("user: hi", "assistant: a", "user: b"), "c", "d",
    )  # fmt: skip


def real_text(turns):
    return "\n".join(turns)


def test_the_first_answers_of_transcripts_never_hold_what_a_person_said(load):
    start = f"{HUMAN} hi{ASSISTANT} hello{HUMAN} 2 + 2?{ASSISTANT}"
    row = {
        "chosen": f"{start} four{HUMAN} sure?{ASSISTANT} yes",
        "rejected": f"{start} 22{HUMAN} really?{ASSISTANT} yes",
    }
    with pytest.raises(ValueError, match=r"got .* \(first_answers=True takes the first answers"):
        load([row])
    assert load([row], first_answers=True) == [Preference(start, " four", " 22")]


# --- rows that are left out ----------------------------------------------------------------------

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_bad_rows_are_left_out_and_listed_where_that_is_asked_for(load):
    lines = [json.dumps(GOOD).encode() for _ in range(9)]
    lines[1] = b'{"prompt": "p", "chosen": '
    lines[2] = b'{"prompt": "\xff"}'
    lines[4] = json.dumps({**GOOD, "rejected": " "}).encode()
    lines[5] = json.dumps({**GOOD, "chosen": 3}).encode()
    lines[6] = b"[]"
    lines[7] = json.dumps({**GOOD, "prompt": said("user: p")}).encode()
    left_out = []
    assert load(b"\n".join(lines), left_out=left_out) == [Preference("p", "c", "r")] * 3
    reasons = [
        "line 2 must be valid JSON (an object per line, or a list of objects), got Expecting value "
        "at column 27",
        "line 3 must be UTF-8, got invalid start byte at byte 13 of the line",
        "line 5: `rejected` must have some text, got an empty answer",
        "line 6: `chosen` must be text or a list of messages, got a number",
        "line 7 must be an object with each key once, got an empty list",
        "line 8 must have text beside a prompt like line 1, got messages beside a prompt",
    ]
    assert left_out == reasons
    for reason in reasons:
        content = b"\n".join([lines[0], *[b""] * (int(reason[5]) - 2), lines[int(reason[5]) - 1]])
        with pytest.raises(ValueError, match=r"; left_out=\[\] leaves such rows out$") as e:
            load(content)
        assert reason in str(e.value)


@pytest.mark.parametrize("kind", WRITERS)
def test_bad_rows_are_left_out_of_every_kind_of_file(load, kind):
    rows = [{**GOOD, "id": n, "chosen": "" if n == 2 else "c"} for n in (1, 2, 3, 1)]
    rows = [{name: str(value) for name, value in row.items()} for row in rows]
    left_out = []
    assert len(load(rows, kind, left_out=left_out)) == 2
    assert ["`chosen` must have some text" in left_out[0], "`id` must be" in left_out[1]] == [1, 1]
    with pytest.raises(
        ValueError, match=r"pairs, got|at least one pair, got none that can be read"
    ):
        load(rows[1:2] * 3, kind, left_out=[])


def test_a_row_of_csv_with_other_fields_is_left_out_and_an_open_quote_is_refused(load):
    text = b"prompt,chosen,rejected\np,c,r\np,c\np,c,r\n"
    left_out = []
    assert len(load(text, "csv", left_out=left_out)) == 2
    assert left_out == ["line 3 must have 3 fields like the header, got 2, none for 'rejected'"]
    for bad in (b'p,"c,r\np,c,r\n', b"p,c,\xff\n"):
        with pytest.raises(ValueError, match=r"line 5 must be (valid CSV|UTF-8), got .*(?<!out)$"):
            load(text + bad, "csv", left_out=[])
    with pytest.raises(ValueError, match=r"line 1 must be valid JSON .*(?<!out)$"):
        load(b"[{]", "json", left_out=[])


def test_a_file_without_a_row_that_can_be_read_is_refused(load):
    left_out = []
    message = "at least one pair, got none that can be read, the first since line 1: `chosen` must"
    with pytest.raises(ValueError, match=message):
        load([{**GOOD, "chosen": ""}] * 3, left_out=left_out)
    assert len(left_out) == 3
    with pytest.raises(ValueError, match="at least one pair, got no entries"):
        load(b"", left_out=[])
    with pytest.raises(TypeError, match="`left_out` must be a list, got tuple"):
        load([GOOD], left_out=())


def test_bad_rows_of_a_data_set_are_left_out_too(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"q": "p", "a": "c", "b": "r", "w": w} for w in ("a", "tie", "b")]
    (folder / "train.jsonl").write_bytes(WRITERS["jsonl"](rows))
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "label": "w"}
    arguments = {"split": "train", "columns": columns, "labels": ("a", "b")}
    with pytest.raises(
        ValueError, match=r"train, row 2: `label` \(column 'w'\) must be a or b, go"
    ):
        real.load_hub_preferences(str(folder), **arguments)
    left_out = []
    pairs = real.load_hub_preferences(str(folder), **arguments, left_out=left_out)
    assert pairs == [Preference("p", "c", "r"), Preference("p", "r", "c")]
    assert left_out == ["row 2: `label` (column 'w') must be a or b, got 'tie'"]


# --- labels --------------------------------------------------------------------------------------

AB = {"prompt": "question", "chosen": "answer_a", "rejected": "answer_b"}


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        (1, 0, (1, 0)),
        (0, 1, [0, 1]),
        (True, False, (1, 0)),
        (1.0, 0.0, (1, 0)),
        ("1", "0", (1, 0)),
        (1, 0, ("1", "0")),  # as a command line gives them
        ("model_a", "model_b", ("model_a", "model_b")),
    ],
)
def test_a_label_decides_which_answer_won(load, first, second, labels):
    rows = [
        {"question": "q", "answer_a": "good", "answer_b": "bad", "winner": first},
        {"question": "q", "answer_a": "bad", "answer_b": "good", "winner": second},
    ]
    expected = [Preference("q", "good", "bad")] * 2
    for kind in WRITERS:
        assert load(rows, kind, columns={**AB, "label": "winner"}, labels=labels) == expected


@pytest.mark.parametrize("name", ["labels", "winner", "Choice", "better_response_id", "chosen"])
def test_a_label_that_nobody_reads_is_refused(load, name):
    rows = [{"question": "q", "answer_a": "good", "answer_b": "bad", name: 0}]
    message = rf'`{name}` must be read .*, got 0, .*columns=\{{"label": "{name}"\}} reads it'
    for left_out in (None, []):
        with pytest.raises(ValueError, match=message):
            load(rows, columns=AB, left_out=left_out)
    with pytest.raises(ValueError, match=f"`{name}` must be read"):
        load(rows, "parquet", columns=AB)
    for columns in ({"label": ()}, {"ignored": name}):
        assert load(rows, columns={**AB, **columns}) == [Preference("q", "good", "bad")]
    if name != "chosen":  # answers under the names of their rank need no label
        assert load([{**GOOD, name: 0}]) == [Preference("p", "c", "r")]


@pytest.mark.parametrize("label", ["tie", 2, None, "", [1], 0.5])
def test_a_label_of_another_value_is_a_bad_row(load, label):
    rows = [{"question": "q", "answer_a": "a", "answer_b": "b", "labels": 1}]
    rows.append({**rows[0], "labels": label})
    with pytest.raises(
        ValueError, match=r"line 2: `label` \(column 'labels'\) must be 1 or 0, got"
    ):
        load(rows, columns={**AB, "label": "labels"}, labels=(1, 0))


def test_an_error_names_the_column_from_which_the_winner_came(load):
    row = {"question": "q", "answer_a": "a", "answer_b": "", "labels": 0}
    with pytest.raises(ValueError, match=r"`chosen` \(column 'answer_b'\) must have some text"):
        load([row], columns={**AB, "label": "labels"}, labels=(1, 0))


def test_bad_labels_are_refused(load):
    row = {"question": "q", "answer_a": "a", "answer_b": "b", "labels": 1}
    for labels in (None, (1,), (1, True), (1, None), "10", (1, 0, 2)):
        with pytest.raises(ValueError, match="`labels` must be two values, those of the label col"):
            load([row], columns={**AB, "label": "labels"}, labels=labels)
    with pytest.raises(ValueError, match=r'`labels` must stand beside columns=\{"label": COLUMN\}'):
        load([row], columns=AB, labels=(1, 0))
    with pytest.raises(ValueError, match="`columns` must have one column for label, got 2"):
        load([row], columns={"label": ("labels", "more")}, labels=(1, 0))


# --- other names ---------------------------------------------------------------------------------

SUM = Preference("2 + 2?", "four", "22", told("user: 2 + 2?"))
KIND = Preference(
    "system: Be kind.\nuser: 2 + 2?", "four", "22", told("system: Be kind.", "user: 2 + 2?")
)


def test_a_column_of_system_messages_is_the_first_message(load):
    row = {"system": "Be kind.", "question": "2 + 2?", **ANSWERS}
    columns = {"system": "system", "prompt": "question"}
    assert load([row, {**row, "system": ""}], columns=columns) == [KIND, SUM]
    assert load([{**row, "system": None}], columns=columns) == [SUM]
    assert load([{"system": "Be kind.", **CHAT}], columns={"system": "system"}) == [KIND]
    beside = {"system": "Be kind.", "prompt": said("user: 2 + 2?"), **ANSWERS}
    assert load([beside], columns={"system": "system"}) == [KIND]
    with pytest.raises(ValueError, match="`system` must be text, got a number"):
        load([{**row, "system": 3}], columns=columns)
    twice = {"system": "x", **{k: said("system: y") + v for k, v in CHAT.items()}}
    with pytest.raises(ValueError, match="`system` must be empty beside a system message, got 'x'"):
        load([twice], columns={"system": "system"})
    with pytest.raises(ValueError, match="`system` must stand beside a prompt column or messages"):
        load([{"system": "x", **THOUGHT}], columns={"system": "system"})


def test_the_messages_of_sharegpt_and_other_roles_are_read(load):
    row = {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "2 + 2?"},
        ],
        "chosen": {"from": "gpt", "value": "four"},
        "rejected": {"from": "gpt", "value": "22"},
    }
    assert load([row], columns={"prompt": "conversations"}) == [KIND]
    text = json.dumps(row).replace('"human"', '"client"').replace('"gpt"', '"Agent"').encode()
    with pytest.raises(ValueError, match=r"""got 'Agent' \(roles=\{"Agent": "user"\} says who"""):
        load(text, columns={"prompt": "conversations"})
    roles = {"client": "user", "Agent": "assistant"}
    assert load(text, columns={"prompt": "conversations"}, roles=roles) == [KIND]
    with pytest.raises(ValueError, match="`roles` must give 'system', .*, got 'bot' for 'gpt'"):
        load([row], roles={"gpt": "bot"})


def test_query_response_and_history_are_read(load):
    row = {"query": "2 + 2?", "response": "four", "rejected_response": "22"}
    row["history"] = [["hi", "hello"]]
    columns = {"prompt": "query", "chosen": "response", "rejected": "rejected_response"}
    with pytest.raises(ValueError, match=r'`history` .*columns=\{"history": "history"\} reads it'):
        load([row], columns=columns)
    messages = told("user: hi", "assistant: hello", "user: 2 + 2?")
    for kind in ("jsonl", "parquet"):
        (pair, without) = load(
            [row, {**row, "history": []}], kind, columns={**columns, "history": "history"}
        )
        assert pair == Preference(
            real_text([": ".join(m) for m in messages]), "four", "22", messages
        )
        assert without == SUM
    for history, message in (
        ("hi", "`history` must be a list of questions and answers, got str"),
        ([["hi"]], "`history` must have a question and its answer each time, got a list"),
    ):
        with pytest.raises(ValueError, match=message):
            load([{**row, "history": history}], columns={**columns, "history": "history"})
    with pytest.raises(
        ValueError, match="`history` must stand beside a prompt of text, got messag"
    ):
        load([{**CHAT, "h": []}], columns={"history": "h"})
    swift = {"messages": CHAT["chosen"], "rejected_response": "22"}
    columns = {"chosen": "messages", "rejected": "rejected_response"}
    assert load([swift], columns=columns) == [SUM]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_dotted_name_leads_into_a_column(load, kind):
    row = {"q": {"text": "2 + 2?"}, "answers": [{"text": "four", "score": 2}, {"text": "22"}]}
    columns = {"prompt": "q.text", "chosen": "answers.0.text", "rejected": "answers.1.text"}
    assert load([row], kind, columns=columns) == [Preference("2 + 2?", "four", "22")]
    for bad in ("answers.2.text", "answers.0.words", "answers.x.text", "q.text.more"):
        with pytest.raises(
            ValueError, match=rf"`chosen` \(column '{bad}'\) must be one of the col"
        ):
            load([row], kind, columns={**columns, "chosen": bad})


def test_a_column_with_a_dot_in_its_name_is_itself(load):
    row = {"a.b": "2 + 2?", "a": {"b": "no"}, **ANSWERS}
    assert load([row], columns={"prompt": "a.b"}) == [Preference("2 + 2?", "four", "22")]


def test_parts_of_text_are_joined_and_others_refused(load):
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    row = {
        "prompt": [{"role": "user", "content": parts}],
        "chosen": said("assistant: four"),
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "22"}]}],
    }
    assert load([row]) == [SUM]
    for content, got in (
        ([*parts, {"type": "image"}], "a part of type 'image'"),
        ([{"type": "image_url", "text": "x"}], "a part of type 'image_url'"),
        ([], "an empty list"),
        (["2 + 2?"], "str"),
        (None, "null"),
    ):
        bad = {**row, "prompt": [{"role": "user", "content": content}]}
        with pytest.raises(ValueError, match=rf"of message 1 \(no images or tools\), got {got}; "):
            load([bad])


# --- long fields of CSV --------------------------------------------------------------------------


def test_a_field_of_csv_may_be_as_long_as_a_line_of_jsonl(load, monkeypatch):
    row = {"prompt": "q", "chosen": "word " * 30_000, "rejected": 'a "quoted"\nline ' * 20_000}
    assert load([row], "csv") == load([row], "jsonl") == [Preference(**row)]
    monkeypatch.setattr("dpo_mini.real.formats.LONGEST_LINE", 1000)
    with pytest.raises(
        ValueError, match=r"line 2 must be valid CSV, got field larger than field l"
    ):
        load([{**row, "chosen": "c\n" * 501}], "csv")


def test_the_limit_of_the_csv_module_is_left_as_it_was_found(load, tmp_path):
    from dpo_mini.real.columns import how_to_read
    from dpo_mini.real.formats import read_file

    found = csv.field_size_limit(1234)
    try:
        load([GOOD] * 3, "csv")
        assert csv.field_size_limit() == 1234
        half_read = read_file(tmp_path / "pairs.csv", how_to_read(), None)
        next(half_read)
        assert csv.field_size_limit() == 1234
        half_read.close()
        with pytest.raises(ValueError, match="must be valid CSV"):
            load(b'prompt,chosen,rejected\n"p', "csv")
        assert csv.field_size_limit() == 1234
    finally:
        csv.field_size_limit(found)


# --- training pairs and held-out pairs -----------------------------------------------------------


def split(pairs, held_out, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return real.split_preferences(pairs, held_out=held_out, generator=generator)


def of_sizes(*sizes):
    """Pairs of prompts with so many pairs each, in an order that mixes the prompts."""
    pairs = [
        Preference(f"p{prompt}", f"c{n}", "r")
        for prompt, size in enumerate(sizes)
        for n in range(size)
    ]
    return sorted(pairs, key=lambda pair: pair.chosen)


@pytest.mark.parametrize("held_out", [1, 7, 20, 0.3, 0.999, 0.001])
def test_a_split_keeps_all_pairs_of_a_prompt_on_one_side(held_out):
    pairs = of_sizes(*(1 + n % 4 for n in range(20)))
    training, held = split(pairs, held_out)
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held}
    assert training == [pair for pair in pairs if pair in training]
    assert held == [pair for pair in pairs if pair in held]
    assert len(training) + len(held) == len(pairs)
    wanted = min(max(round(held_out * len(pairs)), 1), len(pairs) - 1) if held_out < 1 else held_out
    assert len(held) == wanted  # a prompt with one pair was left each time
    assert split(pairs, held_out) == (training, held)
    assert wanted in (1, 49) or split(pairs, held_out, seed=1) != (training, held)


@pytest.mark.parametrize(
    ("sizes", "held_out", "nearest"),
    [((4, 4, 4), 4, 4), ((4, 4, 4), 5, 4), ((4, 4, 4), 7, 8), ((4, 4, 4), 1, 4), ((9, 1), 9, 9)],
)
def test_a_split_comes_as_near_as_whole_prompts_do(sizes, held_out, nearest):
    for seed in range(5):
        training, held = split(of_sizes(*sizes), held_out, seed)
        assert len(held) in ((nearest, 1) if sizes == (9, 1) else (nearest,))
        assert training


def test_every_prompt_is_held_out_as_often_as_another():
    pairs = of_sizes(*[2] * 5)
    counts = dict.fromkeys({pair.prompt for pair in pairs}, 0)
    for seed in range(300):
        for prompt in {pair.prompt for pair in split(pairs, 4, seed)[1]}:
            counts[prompt] += 1
    assert all(abs(count - 120) < 35 for count in counts.values())  # four standard deviations


def test_a_conversation_is_told_from_its_text_and_a_plain_prompt_is_a_message():
    text = "user: a\nassistant: b\nuser: c"
    messages = told("user: a", "assistant: b", "user: c")
    plain = [Preference("q", "c", "r"), Preference("q", "d", "r", told("user: q"))]
    both = [Preference(text, "c", "r"), Preference(text, "d", "r", messages)]
    for seed in range(8):
        sides = [set(side) for side in split([*plain, *both], 2, seed)]
        assert {plain[0], plain[1]} in sides or {*both} in [side & {*both} for side in sides]
        assert any({*plain} <= side for side in sides)
    assert any(len({*both} & {*split([*plain, *both], 1, seed)[1]}) == 1 for seed in range(8))


def test_a_bad_split_is_refused():
    pairs = of_sizes(1, 1, 1)
    for held_out, message in (
        (0, "`held_out` must be a whole number >= 1, got 0"),
        (3, "`held_out` must be less than 3, the number of pairs, got 3"),
        (1.0, r"`held_out` must be a share in \(0, 1\) or .*, got 1.0"),
        (0.0, r"`held_out` must be a share in \(0, 1\) or .*, got 0.0"),
        (float("nan"), r"`held_out` must be a share in \(0, 1\) or .*, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            split(pairs, held_out)
    for held_out in (True, "1"):
        with pytest.raises(TypeError, match="`held_out` must be a whole number"):
            split(pairs, held_out)
    with pytest.raises(ValueError, match="`preferences` must have at least two different prompts"):
        split(of_sizes(5), 2)
    with pytest.raises(TypeError, match=r"`generator` must be a torch\.Generator"):
        real.split_preferences(pairs, held_out=1, generator=None)


# --- answers that become alike -------------------------------------------------------------------


def test_pairs_that_became_alike_by_cutting_are_dropped_and_counted():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(200):
        lengths = torch.randint(1, 6, (3,), generator=generator).tolist()
        rows.append([torch.randint(2, (n,), generator=generator) for n in lengths])
    rows += [[row[0], row[1], row[1]] for row in rows[:5]]  # the same before the cut
    pairs = tuple(
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=PAD)
        for column in zip(*rows, strict=True)
    )
    cut, n_cut, n_dropped = real.cut_long(pairs, max_tokens=6)
    expected, expected_cut, expected_dropped = [], 0, 0
    for prompt, chosen, rejected in (map(torch.Tensor.tolist, row) for row in rows):
        room = 6 - len(prompt)
        short = [prompt, chosen[:room], rejected[:room]]
        if chosen != rejected and short[1] == short[2]:
            expected_dropped += 1
            continue
        expected.append(short)
        expected_cut += short[1:] != [chosen, rejected]
    found = [
        [[t for t in text.tolist() if t != PAD] for text in row] for row in zip(*cut, strict=True)
    ]
    assert found == expected
    assert (n_cut, n_dropped) == (expected_cut, expected_dropped)
    assert n_dropped > 10
    assert cut[1].shape == cut[2].shape
    assert all((tokens != PAD).any(0).any() for tokens in cut)
    alike = tuple(torch.tensor([row]) for row in ([1], [5, 6], [5, 7]))
    with pytest.raises(
        ValueError, match="`max_tokens` must be large enough for two answers to dif"
    ):
        real.cut_long(alike, max_tokens=2)


# --- the script ----------------------------------------------------------------------------------


def test_the_script_lists_the_rows_that_it_leaves_out(tmp_path, monkeypatch, capfd):
    pytest.importorskip("accelerate", reason="the extra 'real' is not installed")
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    specification = importlib.util.spec_from_file_location(
        "train_dpo", ROOT / "examples" / "train_dpo.py"
    )
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    rows = [
        {"q": "2 + 2?", "a": "four", "b": "22", "winner": winner} for winner in ("a", "tie", "b")
    ]
    (tmp_path / "pairs.jsonl").write_bytes(WRITERS["jsonl"](rows))
    tokenizer = real.train_tokenizer(["2 + 2? four 22"], vocab_size=258)
    model = real.tiny_gpt2(
        tokenizer, n_positions=32, width=16, generator=torch.Generator().manual_seed(0)
    )
    real.save_model(model, tokenizer, tmp_path / "start")
    columns = {"prompt": "q", "chosen": "a", "rejected": "b", "label": "winner"}
    arguments = ["--model", tmp_path / "start", "--pairs", tmp_path / "pairs.jsonl", "--steps", 1]
    arguments += ["--output", tmp_path / "run", "--batch-size", 2, "--no-checkpoints"]
    arguments += ["--columns", json.dumps(columns), "--reading", '{"labels": ["a", "b"]}']
    arguments = [str(argument) for argument in arguments]
    with pytest.raises(ValueError, match=r"line 2: `label` .*; left_out=\[\] leaves such rows out"):
        script.main(arguments)
    script.main([*arguments, "--skip-bad-rows"])
    out = capfd.readouterr().out
    assert "1 bad rows left out" in out
    assert "2 pairs; 0 too long" in out
    listed = (tmp_path / "run" / "left_out.txt").read_text()
    assert listed == "line 2: `label` (column 'winner') must be a or b, got 'tie'\n"
    AcceleratorState._reset_state(True)

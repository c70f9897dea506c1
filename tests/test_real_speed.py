"""What makes `real` fast: lists read in blocks, plain rows read the short way, rows padded once."""

import json
import tracemalloc

import pytest

from dpo_mini import real
from dpo_mini.logps import PAD
from dpo_mini.real import formats

ROWS = [
    {"prompt": "p", "chosen": 'a "quoted" }, [', "rejected": "b\n"},
    {"prompt": "¿qué?", "chosen": "naïve 🙂", "rejected": "\u2028,"},
    {"prompt": "", "chosen": "x" * 50, "rejected": "y", "more": {"n": [1.5, None, True, "]"]}},
]
NEVER = {"ignored": "a column that is not there"}
"""Says nothing about the rows, and sends them the long way."""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads text or bytes, from blocks of so many bytes."""

    def load_text(text, block=None, suffix=".json", **how):
        if block is not None:
            monkeypatch.setattr(formats, "_BLOCK", block)
        path = tmp_path / f"pairs{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return real.load_preferences(path, **how)

    return load_text


def refusal(load, *args, **how):
    with pytest.raises(ValueError) as refused:
        load(*args, **how)
    return str(refused.value)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 2**18])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_alike_from_blocks_of_every_size(load, block, indent):
    text = "\ufeff \r\n" + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n "
    want = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    pairs = load(text.replace("\n", "\r\n"), block)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == want


@pytest.mark.parametrize("block", [1, 5, 2**18])
def test_every_entry_of_a_list_has_its_line_and_number_whatever_the_blocks(load, block):
    entries = ["12.5e1", "-30", "true", '"text"', "[]", '{\n"a": 1}', json.dumps(ROWS[0]), "null"]
    left_out = []
    assert len(load("[\n" + ",\n\n".join(entries) + "]", block, left_out=left_out)) == 1
    lines = [2, 4, 6, 8, 10, 12, 17]  # the sixth entry has two lines, the pair stands on line 15
    assert [said.partition("entry")[0] for said in left_out] == [f"line {n}, " for n in lines]
    got = ["a number", "a number", "true or false", "str", "an empty list", "'a'", "null"]
    for said, kind in zip(left_out, got, strict=True):
        assert kind in said


@pytest.mark.parametrize("block", [1, 6, 2**18])
def test_a_broken_list_is_refused_where_json_says_whatever_the_blocks(load, block):
    whole = json.dumps(ROWS[:2], indent=1)
    broken = [whole[:at] for at in range(1, len(whole), 5)]
    broken += [whole + "x", whole[:-1] + ",]", whole.replace("},", "}"), "[,]", "[1 2]", "[] []"]
    for text in broken:
        with pytest.raises(json.JSONDecodeError) as error:
            json.loads(text)
        got = refusal(load, text, block)
        assert error.value.msg.removesuffix(" at") in got
        line = text.count("\n", 0, min(error.value.pos, len(text.rstrip("\r\n")))) + 1
        assert f"line {line} must be valid JSON" in got


def test_broken_json_is_named_before_a_bad_entry_and_is_never_left_out(load):
    text = '[\n{"prompt": "p"},\n{"prompt": "q"},\n{'
    assert "line 4 must be valid JSON" in refusal(load, text)
    assert "line 4 must be valid JSON" in refusal(load, text, left_out=[])
    assert "line 2, entry 1: `chosen`" in refusal(load, text[:-3] + "]")


def test_letters_that_are_no_utf8_and_zero_bytes_in_a_list_have_their_line(load):
    good = json.dumps(ROWS[0]).encode()
    assert "line 3 must be UTF-8" in refusal(load, b"[\n" + good + b',\n{"a": "\xc3"}]', 4)
    assert "line 2 must be UTF-8" in refusal(load, b"[\n" + good + b"]\xc3", 4)
    assert "line 3 must be text, got a zero byte" in refusal(
        load, b"[\n" + good + b',\n{"a": "\0"}]', 4
    )


def test_of_repeated_keys_the_first_is_named_at_every_depth(load):
    once = '{"prompt": "p", "chosen": "c", "rejected": "r", "x": %s}'
    assert "'b' twice" in refusal(load, '[{"a": 1, "b": 2, "b": 3, "a": 4}]')
    assert "'b' twice" in refusal(load, '{"a": 1, "b": 2, "b": 3, "a": 4}', suffix=".jsonl")
    assert len(load(f"[{once % '{}'}]")) == 1
    deep = json.dumps(TALK).replace('"content": "d"', '"content": "d", "content": "e"')
    assert "`rejected` must have" in refusal(load, deep, suffix=".jsonl")
    assert "'content' twice" in refusal(load, deep, suffix=".jsonl")


SAID = [{"role": "user", "content": "p"}]
ANSWER, OTHER = ([{"role": "assistant", "content": text}] for text in "cd")
TALK = {"prompt": SAID, "chosen": ANSWER, "rejected": OTHER}


@pytest.mark.parametrize(
    "row",
    [
        ROWS[0],
        ROWS[1],
        TALK,
        {**TALK, "prompt": [{"role": "system", "content": "s"}, *SAID]},
        {**TALK, "prompt": [{"role": "human", "content": "p"}]},
        {**TALK, "chosen": ANSWER[0]},
        {**TALK, "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "c"}]}]},
    ],
)
def test_the_short_way_and_the_long_way_read_the_same_pair(load, row):
    line = json.dumps(row)
    assert load(line, suffix=".jsonl") == load(line, suffix=".jsonl", columns=NEVER)


@pytest.mark.parametrize(
    "row",
    [
        {**ROWS[0], "chosen": " \n"},
        {**ROWS[0], "rejected": "\ud800"},
        {**ROWS[0], "prompt": 7},
        {**ROWS[0], "prompt": "\n\nHuman: x\n\nAssistant:", "chosen": "a\n\nHuman: b"},
        {"prompt": "p", "chosen": "c", "winner": "b"},
        {**TALK, "chosen": SAID},
        {**TALK, "chosen": [*SAID, *ANSWER]},
        {**TALK, "chosen": []},
        {**TALK, "chosen": "c"},
        {**TALK, "rejected": [{"role": "assistant", "content": ""}]},
        {**TALK, "prompt": []},
        {**TALK, "prompt": [{"role": "tool", "content": "p"}]},
        {**TALK, "prompt": [{"role": ["user"], "content": "p"}]},
        {**TALK, "prompt": [{**SAID[0], "tool_calls": [1]}]},
    ],
)
def test_the_short_way_and_the_long_way_refuse_with_the_same_sentence(load, row):
    line = json.dumps(row)
    said = refusal(load, line, suffix=".jsonl")
    assert said == refusal(load, line, suffix=".jsonl", columns=NEVER)


def test_a_list_takes_no_more_than_three_times_its_file(load, tmp_path):
    text = json.dumps([{**ROWS[0], "chosen": "x" * 1000, "rejected": "🙂"}] * 3000)
    load(json.dumps(ROWS))  # imports and caches
    (tmp_path / "large.json").write_text(text)
    tracemalloc.start()
    try:
        pairs = real.load_preferences(tmp_path / "large.json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(pairs) == 3000
    assert peak < 3 * len(text)


def test_pairs_encoded_together_have_the_rows_of_pairs_encoded_alone():
    pairs = [real.Preference(**{k: row[k] for k in TALK}) for row in ROWS]
    tokenizer = real.train_tokenizer([pair.chosen for pair in pairs], vocab_size=260)
    together = real.encode(pairs, tokenizer, max_tokens=500)
    assert together[1].shape == together[2].shape  # both answers as wide as the longest
    for n, pair in enumerate(pairs):
        alone = real.encode([pair], tokenizer, max_tokens=500)
        for whole, part in zip(together, alone, strict=True):
            row = part[0][part[0] != PAD]
            assert whole[n, : len(row)].tolist() == row.tolist()
            assert (whole[n, len(row) :] == PAD).all()

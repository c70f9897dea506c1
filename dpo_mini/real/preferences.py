"""Preference pairs as text: read from files and hub data sets, checked, written whole."""

import csv
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from dpo_mini._files import write_whole

AnyPath = str | os.PathLike[str]
Columns = Mapping[str, str | Sequence[str]]
Messages = tuple[tuple[str, str], ...]
"""A conversation: `(role, content)` pairs, oldest first."""
_Mapped = Mapping[str, tuple[str, ...] | None]

ROLES = ("system", "user", "assistant")
"""Who can have said a message."""

LONGEST_LINE = 2**26
"""Bytes in a line of JSONL or CSV. 64 MiB are some ten thousand pages: a longer line is no pair but
a file without line breaks, and is refused before it fills the memory."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which somebody preferred one.

    Args:
      prompt, chosen, rejected: text; an answer is not empty. The two answers may be the same: such
        a pair has margin 0 under every policy and teaches nothing.
      messages: the conversation before the answer, as `(role, content)` pairs, where the prompt is
        more than plain text: a role is `"system"`, `"user"` or `"assistant"`. `prompt` is then its
        text: one message as it stands, several as lines of `role: content`.
    """

    prompt: str
    chosen: str
    rejected: str
    messages: Messages = ()

    def __post_init__(self) -> None:  # noqa: D105
        for name in ("prompt", "chosen", "rejected"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise ValueError(f"{name}: got {_kind(text)}, takes text")
            if name != "prompt" and not text.strip():
                raise ValueError(f"{name}: got an empty answer, takes some text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: got half of a surrogate pair, takes text") from error
        check_messages(self.messages)
        if self.messages and self.prompt != _as_text(self.messages):
            raise ValueError(
                f"prompt: got {_short(self.prompt)} where the messages are "
                f"{_short(_as_text(self.messages))}, takes the text of the messages"
            )


def load_preferences(path: AnyPath, *, columns: Columns | None = None) -> list[Preference]:
    """Read pairs from a file: JSON (a list of objects), JSONL (one a line), CSV or Parquet.

    A file has one of the forms that `trl` takes, the same in every row:

    - text beside a prompt: `prompt`, `chosen` and `rejected` are text;
    - text that begins with the prompt: there is no prompt column, and the prompt is the beginning
      that `chosen` and `rejected` share, letter by letter. It also takes the first words that two
      answers have in common, so a prompt column is better;
    - messages beside a prompt: all three are lists of `{"role", "content"}` messages, and an answer
      is one message, the assistant's;
    - messages that begin with the prompt: in `chosen` and `rejected` the last message is the
      assistant's answer, and those before it are the same. A prompt column of text that repeats
      them is taken too; `trl` wants it removed (`maybe_extract_prompt`).

    Stricter than `trl`: an answer of several messages, of which some are the user's, is refused, as
    are images, tools, reasoning apart from the content, and roles other than system, user and
    assistant.

    Args:
      path: the file. A name that ends in `.csv` or `.parquet` says which form it has; any other
        file is Parquet where it begins with the bytes `PAR1`, a JSON list where its first letter is
        `[`, and JSONL otherwise. Text is UTF-8. CSV has commas, double quotes and a header, and
        holds text alone: `7` and `NA` are text, where `datasets` reads a number and a null.
      columns: which of the file's columns hold `prompt`, `chosen` and `rejected`, where they have
        other names: `{"prompt": ("instruction", "input")}`. Several columns are joined by line
        breaks, empty ones dropped. `{"prompt": ()}` takes the prompt from the answers even where
        there is a prompt column. `id`, where there is such a column, may not repeat a value;
        `{"id": "number"}` says that another column may not, `{"id": ()}` that every one may.
    Returns:
      The pairs, in the file's order; columns that are not asked for are ignored.
    Raises:
      OSError: the file cannot be read.
      ValueError: invalid UTF-8, JSON, CSV or Parquet, a line of more than `LONGEST_LINE` bytes, a
        key or column twice, a missing column, a value that is not text, an empty answer, answers to
        different prompts, two forms in one file, an id twice, no pairs, an unknown name or a column
        twice in `columns`. The message has the file, the line (of Parquet the row), counted from 1,
        and the column.
    """
    path = Path(path)
    mapped = _check_columns(columns)
    with closing(_file_entries(path, _wanted(mapped))) as entries:
        return _preferences(str(path), entries, mapped)


def load_hub_preferences(
    name: str, *, split: str, columns: Columns | None = None
) -> list[Preference]:
    """Read pairs from a data set of the Hugging Face hub: downloads it, or takes it from the cache.

    Args:
      name: the data set, or a folder on this machine in a form that `datasets` knows.
      split: such as `"train"` or `"train[:1000]"`.
      columns: as in `load_preferences`; rows are checked and refused alike.
    Returns:
      The pairs, in the data set's order.
    Raises:
      ValueError: as `load_preferences`, with the row in the place of the line.
    """
    import datasets

    rows = datasets.load_dataset(name, split=split)
    entries = ((f"{name}, {split}, row {n}", row) for n, row in enumerate(rows, 1))
    return _preferences(name, entries, _check_columns(columns))


def save_preferences(path: AnyPath, preferences: Iterable[Preference]) -> None:
    """Write pairs as JSONL, whole or not at all: a write that fails leaves an old file as it was.

    Pairs with messages are written as messages beside a prompt of messages, others as text.

    Args:
      path: the file, whose folder is there.
      preferences: pairs, with messages all of them or none.
    Raises:
      OSError: the file cannot be written.
      ValueError: no pairs, something that is not a `Preference`, or pairs with messages among pairs
        without.
    """
    preferences = list(preferences)
    check_preferences(preferences)
    for row, pair in enumerate(preferences):
        if bool(pair.messages) != bool(preferences[0].messages):
            got, first = ("messages", "text") if pair.messages else ("text", "messages")
            raise ValueError(
                f"preferences: got {got} in row {row} where row 0 has {first}, takes one form "
                "throughout a file"
            )
    lines = [json.dumps(_as_entry(pair), ensure_ascii=False) + "\n" for pair in preferences]
    write_whole(path, "".join(lines).encode())


def check_preferences(preferences: Sequence[Preference]) -> None:
    """Refuse none, and anything that is not a `Preference`."""
    if not len(preferences):
        raise ValueError("preferences: got none, takes at least one pair")
    for row, pair in enumerate(preferences):
        if not isinstance(pair, Preference):
            kind = type(pair).__name__
            raise TypeError(f"preferences: got {kind} in row {row}, takes a Preference")


def check_messages(messages: Messages) -> None:
    """Refuse anything but a tuple of `(role, content)` pairs of text."""
    if not isinstance(messages, tuple):
        raise ValueError(f"messages: got {_kind(messages)}, takes a tuple of (role, content)")
    for n, message in enumerate(messages, 1):
        if not (
            isinstance(message, tuple)
            and len(message) == 2
            and message[0] in ROLES
            and isinstance(message[1], str)
        ):
            raise ValueError(
                f"messages: got {message!r} as message {n}, takes (role, content), the role one of "
                f"{_listed(ROLES)} and the content text"
            )


# --- below the surface -----------------------------------------------------------------------


@dataclass(frozen=True)
class _RepeatedKey:
    """Stands where a JSON object had one key twice, of which `dict` would keep the last."""

    key: str


def _object(pairs: list[tuple[str, object]]) -> dict[str, object] | _RepeatedKey:
    entry: dict[str, object] = {}
    for key, value in pairs:
        if key in entry:
            return _RepeatedKey(key)
        entry[key] = value
    return entry


def _file_entries(path: Path, wanted: set[str]) -> Generator[tuple[str, object], None, None]:
    """Where each entry of a file is, and the entry; `wanted` are the columns that will be read."""
    with open(path, "rb") as file:
        start = file.read(4)
        file.seek(0)
        if path.suffix.lower() == ".csv":
            yield from _csv_entries(path, file)
        elif path.suffix.lower() == ".parquet" or start == b"PAR1":
            yield from _parquet_entries(path, file, wanted)
        elif start.startswith(b"\x1f\x8b"):
            raise ValueError(f"{path}: got a gzip file, takes it unpacked")
        elif _begins_a_list(file):
            yield from _list_entries(path, file)
        else:
            yield from _line_entries(path, file)


_BETWEEN_ENTRIES = " \t\r\n,"


def _begins_a_list(file: BinaryIO) -> bool:
    chunk = file.read(2**12).removeprefix(b"\xef\xbb\xbf")
    while chunk and not chunk.strip():
        chunk = file.read(2**12)
    file.seek(0)
    return chunk.lstrip().startswith(b"[")


def _list_entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    lines = enumerate(file.read().split(b"\n"), 1)
    text = "\n".join(_decode(path, line, n) for n, line in lines)
    entries = cast(list[object], _json(path, text, 1))  # the text begins with a bracket
    decode = json.JSONDecoder().raw_decode
    line, counted, at = 1, 0, text.index("[") + 1
    for n, entry in enumerate(entries, 1):
        while text[at] in _BETWEEN_ENTRIES:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        yield f"{path}, line {line}, entry {n}", entry
        _, at = decode(text, at)  # once more, to know where the next one begins


def _line_entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    for n, line in _lines(path, file):
        if line.strip():
            yield f"{path}, line {n}", _json(path, line, n)


def _csv_entries(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    reader = csv.reader((line for _, line in _lines(path, file)), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{where}: got invalid CSV ({error}), takes commas between fields and double "
                "quotes, closed, around those with commas, quotes or line breaks"
            ) from None
        if fields is None:
            return
        if not fields:
            continue  # an empty line
        if header is None:
            header = fields
            _check_header(where, header)
        elif len(fields) != len(header):
            missing = f" and none for {header[len(fields)]!r}" if len(fields) < len(header) else ""
            raise ValueError(
                f"{where}: got {len(fields)} fields{missing}, takes {len(header)} as in the header"
            )
        else:
            yield where, dict(zip(header, fields, strict=True))


def _parquet_entries(path: Path, file: BinaryIO, wanted: set[str]) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    broken = (pyarrow.ArrowException, OSError)
    n, where = 0, str(path)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        _check_header(where, names)
        read = [name for name in names if name in wanted]
        batches = table.iter_batches(batch_size=2**10, columns=read)
        where = f"{path}, row 1"
        for batch in batches:
            for row in range(len(batch)):
                n += 1
                entry = dict.fromkeys(names)
                for name in read:
                    where = f"{path}, row {n}: {name}"
                    entry[name] = batch.column(name)[row].as_py()
                yield f"{path}, row {n}", entry
            where = f"{path}, row {n + 1}"
    except broken as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{where}: got invalid Parquet ({reason}), takes a whole file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: got {error.reason} at byte {error.start + 1}, takes UTF-8"
        ) from None


def _check_header(where: str, names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"{where}: got the column {name!r} twice, takes each column once")


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Each line with its number, without holding more than one of them."""
    # Not the lines of str: JSON text may hold line separators such as U+2028 inside a string.
    n = 0
    while line := file.readline(LONGEST_LINE + 1):
        n += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{path}, line {n}: got more than {LONGEST_LINE} bytes without a line break, takes "
                "at most that many in a line"
            )
        yield n, _decode(path, line, n)


def _decode(path: Path, line: bytes, n: int) -> str:
    try:
        text = line.decode("utf-8-sig" if n == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {n}: got {error.reason} at byte {error.start + 1} of the line, takes "
            "UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path}, line {n}: got a zero byte as letter {text.index(chr(0)) + 1}, takes text"
        )
    return text


def _json(path: Path, text: str, first_line: int) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except RecursionError:
        line, reason = first_line, "nested too deeply"
    except ValueError:  # Python's limit on the digits of a number
        line, reason = first_line, "a number of too many digits"
    raise ValueError(
        f"{path}, line {line}: got invalid JSON ({reason}), takes a list of objects, or one "
        "object a line"
    )


def _preferences(
    source: str, entries: Iterable[tuple[str, object]], columns: _Mapped
) -> list[Preference]:
    preferences: list[Preference] = []
    ids: dict[str, str] = {}
    first_where = first_form = ""
    for where, entry in entries:
        fields = _check_object(where, entry)
        pair, form = _preference(where, fields, columns)
        if not preferences:
            first_where, first_form = where, form
        if form != first_form:
            raise ValueError(
                f"{where}: got {form} where {_place(source, first_where)} has {first_form}, takes "
                "one form throughout"
            )
        key = _read_id(where, fields, columns["id"])
        if key in ids:
            raise ValueError(
                f"{where}: id: got {_cut(key)}, as in {_place(source, ids[key])}, takes each id "
                'once (columns={"id": ()} does not look)'
            )
        if key is not None:
            ids[key] = where
        preferences.append(pair)
    if not preferences:
        raise ValueError(f"{source}: got no entries, takes at least one pair")
    return preferences


def _place(source: str, where: str) -> str:
    """`line 3` of `pairs.jsonl, line 3`."""
    return where.removeprefix(f"{source}, ")


def _check_columns(columns: Columns | None) -> _Mapped:
    """Each of our names with the file's; None for what nobody said where to find."""
    names: dict[str, tuple[str, ...] | None] = {
        "prompt": None,
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "id": None,
    }
    for name, theirs in (columns or {}).items():
        if name not in names:
            raise ValueError(
                f"columns: got the name {name!r}, takes prompt, chosen, rejected and id"
            )
        theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        if name in ("chosen", "rejected") and not theirs:
            raise ValueError(f"columns: got no column for {name}, takes at least one")
        if not all(isinstance(column, str) for column in theirs):
            raise TypeError(f"columns: got {theirs!r} for {name}, takes names of columns")
        names[name] = theirs
    taken: dict[str, str] = {}
    for name in ("prompt", "chosen", "rejected"):
        given = names[name]
        for column in (name,) if given is None else given:
            if column in taken:
                raise ValueError(
                    f"columns: got {column!r} for {taken[column]} and for {name}, takes each "
                    "column once"
                )
            taken[column] = name
    if names["id"] is None and "id" in taken:
        names["id"] = ()
    return names


# What changes the tokens that `trl` makes, and nothing here would read: columns, keys of a message.
_IMAGES = ("images", "image")
_TOOLS = ("tools", "chat_template_kwargs")
_MORE_THAN_TEXT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def _wanted(columns: _Mapped) -> set[str]:
    ours = ((name,) if theirs is None else theirs for name, theirs in columns.items())
    return {*_IMAGES, *_TOOLS, *(column for theirs in ours for column in theirs)}


def _check_object(where: str, entry: object) -> Mapping[str, object]:
    if isinstance(entry, _RepeatedKey):
        raise ValueError(f"{where}: got the key {entry.key!r} twice, takes each key once")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: got {_kind(entry)}, takes an object")
    return entry


def _preference(
    where: str, entry: Mapping[str, object], columns: _Mapped
) -> tuple[Preference, str]:
    """A pair, and in words the form that it had."""
    try:
        chosen = _read_answer("chosen", entry, columns["chosen"] or ())
        rejected = _read_answer("rejected", entry, columns["rejected"] or ())
        if isinstance(chosen, str) and isinstance(rejected, str):
            _check_absent(entry, _IMAGES)
            return _read_texts(entry, columns["prompt"], chosen, rejected)
        if isinstance(chosen, str) or isinstance(rejected, str):
            got, first = ("text", "messages") if isinstance(rejected, str) else ("messages", "text")
            raise ValueError(f"rejected: got {got} where chosen is {first}, takes both alike")
        _check_absent(entry, (*_IMAGES, *_TOOLS))
        return _read_conversations(entry, columns["prompt"], chosen, rejected)
    except ValueError as error:
        theirs = columns.get(str(error).partition(":")[0]) or ()
        mapped = [repr(column) for column in theirs if not str(error).startswith(f"{column}:")]
        told = not mapped or any(column in str(error) for column in mapped)
        raise ValueError(
            f"{where}: {error}" + ("" if told else f" (column {', '.join(mapped)})")
        ) from None


def _check_absent(entry: Mapping[str, object], columns: Iterable[str]) -> None:
    for column in columns:
        if entry.get(column):
            kind = _kind(entry[column])
            raise ValueError(f"{column}: got {kind}, takes text alone: no such column")


def _read_texts(
    entry: Mapping[str, object], columns: tuple[str, ...] | None, chosen: str, rejected: str
) -> tuple[Preference, str]:
    if columns or (columns is None and "prompt" in entry):
        columns = columns or ("prompt",)
        prompt = _read_columns("prompt", entry, columns)
        if not isinstance(prompt, str):
            _read_messages("prompt", prompt)
            raise ValueError("prompt: got messages where the answers are text, takes all alike")
        return Preference(prompt, chosen, rejected), "text beside a prompt"
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise ValueError(f"{name}: got an empty answer, takes some text")
    # As trl.extract_prompt, to the letter: the space before an answer is the answer's, and where
    # one text is the beginning of the other its last letter is left to be an answer.
    letters = enumerate(zip(chosen, rejected, strict=False))
    shared = next((n for n, (ours, theirs) in letters if ours != theirs), None)
    if shared is None:
        shared = min(len(chosen), len(rejected)) - 1
    elif chosen[:shared].endswith(" "):
        shared -= 1
    prompt = chosen[:shared]
    if not prompt.strip():
        if columns is None:
            raise ValueError(
                _missing("prompt", "prompt", entry) + ", or answers that begin with it"
            )
        raise ValueError(
            "prompt: got answers without earlier messages or a beginning that they share, takes a "
            "prompt column"
        )
    pair = Preference(prompt, chosen[shared:], rejected[shared:])
    return pair, "text that begins with the prompt"


def _read_conversations(
    entry: Mapping[str, object],
    columns: tuple[str, ...] | None,
    chosen: Messages,
    rejected: Messages,
) -> tuple[Preference, str]:
    *before, (_, answer) = chosen
    *before_rejected, (_, other) = rejected
    if before != before_rejected:
        raise ValueError(
            f"rejected: got the prompt {_short(_as_text(before_rejected))} where chosen has "
            f"{_short(_as_text(before))}, takes two answers to the same prompt"
        )
    form = "messages that begin with the prompt"
    if columns is None:
        columns = () if before and "prompt" not in entry else ("prompt",)
    if columns:
        prompt = _read_columns("prompt", entry, columns)
        if not isinstance(prompt, str):
            turns, form = [*_read_messages("prompt", prompt)], "messages beside a prompt"
            if before:
                raise ValueError(
                    f"chosen: got {len(chosen)} messages beside a prompt of messages, takes one, "
                    'the answer (columns={"prompt": ()} takes the prompt from the answers)'
                )
            before = turns
        elif not before:
            raise ValueError("prompt: got text where the answers are messages, takes all alike")
        elif prompt != _as_text(before):
            raise ValueError(
                f"prompt: got {_short(prompt)} where the answers' earlier messages are "
                f'{_short(_as_text(before))}, takes one prompt (columns={{"prompt": ()}} takes the '
                "messages)"
            )
        else:
            form = "messages that repeat the prompt"
    elif not before:
        raise ValueError("prompt: got answers without earlier messages, takes a prompt column")
    return Preference(_as_text(before), answer, other, tuple(before)), form


def _read_answer(
    name: str, entry: Mapping[str, object], columns: tuple[str, ...]
) -> str | Messages:
    """Text, or messages of which the last is the assistant's."""
    value = _read_columns(name, entry, columns)
    if isinstance(value, str):
        return value
    messages = _read_messages(name, value)
    if messages[-1][0] != "assistant":
        raise ValueError(
            f"{name}: got a last message of {messages[-1][0]!r}, takes one of 'assistant'"
        )
    return messages


def _read_id(
    where: str, entry: Mapping[str, object], columns: tuple[str, ...] | None
) -> str | None:
    """What tells an entry from the others, or None where nothing has to."""
    if columns is None:
        columns = ("id",) if "id" in entry else ()
    if not columns:
        return None
    missing = [column for column in columns if column not in entry]
    if missing:
        raise ValueError(f"{where}: {_missing('id', missing[0], entry)}")
    values = [entry[column] for column in columns]
    return None if None in values else ", ".join(map(repr, values))


def _missing(name: str, column: str, entry: Mapping[str, object]) -> str:
    return (
        f"{name}: got no column {column!r} among {', '.join(map(repr, entry))}; takes columns= to "
        f"say where {name} is"
    )


def _read_columns(name: str, entry: Mapping[str, object], columns: tuple[str, ...]) -> object:
    missing = [column for column in columns if column not in entry]
    if missing:
        raise ValueError(_missing(name, missing[0], entry))
    values = [entry[column] for column in columns]
    if len(values) == 1:
        return values[0]
    texts = []
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{name}: got {_kind(value)} in column {column!r}, takes text")
        texts += [value] if value else []
    return "\n".join(texts)


def _read_messages(name: str, value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: got {_kind(value)}, takes text or a list of messages")
    for n, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"{name}: got {_kind(message)} in its list of messages (message {n}), takes "
                'objects with "role" and "content"'
            )
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            got = repr(role) if isinstance(role, str) else _kind(role)
            raise ValueError(
                f"{name}: got {got} as the role of message {n}, takes one of {_listed(ROLES)}"
            )
        for key in _MORE_THAN_TEXT:
            if message.get(key):
                raise ValueError(f"{name}: got {key!r} in message {n}, takes role and content")
        if not isinstance(content, str):
            raise ValueError(
                f"{name}: got {_kind(content)} as the content of message {n}, takes text: no "
                "parts, images or tools"
            )
    return tuple((message["role"], message["content"]) for message in value)


def _as_text(messages: Sequence[tuple[str, str]]) -> str:
    if len(messages) == 1:
        return messages[0][1]
    return "\n".join(f"{role}: {content}" for role, content in messages)


def _as_entry(pair: Preference) -> dict[str, object]:
    """A pair as an object of a file, in one of the forms that are read."""
    if not pair.messages:
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "prompt": as_messages(pair.messages),
        "chosen": as_messages([("assistant", pair.chosen)]),
        "rejected": as_messages([("assistant", pair.rejected)]),
    }


def as_messages(messages: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Pairs of role and content as the objects that files and chat templates have."""
    return [{"role": role, "content": content} for role, content in messages]


def _short(text: str) -> str:
    """Text in quotes, without its middle where it is long."""
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}"


def _listed(names: Sequence[str]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}"


def _kind(value: object) -> str:
    """What something from a file is, in JSON's words."""
    if isinstance(value, _RepeatedKey):
        return f"an object with the key {value.key!r} twice"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(repr, value)) or 'none'}"
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), type(value).__name__)

"""How pairs are read from files: the formats of files, the columns of entries, the forms of pairs.

CSV, JSON, JSON lines, Parquet and rows of the hub are read as entries, which are objects with
columns. `_read_row` finds prompt, answers and messages in an entry, which has one of four forms.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

Columns = Mapping[str, str | Sequence[str]]
"""From our names to the file's, as a user writes them."""
Mapped = Mapping[str, tuple[str, ...] | None]
"""From each of our names to the file's columns; None where nobody said which."""
Entry = Mapping[str, object]
Entries = Iterator[tuple[str, object]]
"""The place of each entry, such as `line 3`, and what is there."""
Messages = tuple[tuple[str, str], ...]
"""A conversation: `(role, content)` pairs, oldest first."""
Fields = tuple[str, str, str, Messages]
"""Prompt, chosen, rejected and messages: what a `Preference` is made of."""

ROLES = ("system", "user", "assistant")
"""Who can have said a message."""
A_ROLE = "'system', 'user' or 'assistant'"

LONGEST_LINE = 2**26
"""The most bytes in a line of JSONL or CSV: 64 MiB are some ten thousand pages of text. A longer
line is a file without line breaks, and is refused before it fills the memory."""


class BadColumn(ValueError):
    """A value that is refused, and the column that holds it; whoever knows the place adds it.

    Args:
      name: `prompt`, `chosen`, `rejected` or `id`, or another column of the file.
      reason: what it must be and what it was.
      columns: those of the file that are at fault, by default all that are read as `name`.
    """

    def __init__(self, name: str, reason: str, columns: tuple[str, ...] = ()) -> None:  # noqa: D107
        super().__init__(name, reason, columns)
        self.name, self.reason, self.columns = name, reason, columns

    def __str__(self) -> str:  # noqa: D105
        return f"`{self.name}` {self.reason}"

    def at(self, where: str, mapped: Mapped) -> ValueError:
        """The error with its place, and with the file's own name of the column."""
        theirs = self.columns or mapped.get(self.name) or ()
        others = ", ".join(repr(column) for column in theirs if column != self.name)
        column = f" (column {others})" if others else ""
        return ValueError(f"{where}: `{self.name}`{column} {self.reason}")


def read_file(path: Path, columns: Columns | None) -> Iterator[Fields]:
    """The pairs of a file, in its order."""
    mapped = _check_columns(columns)
    with open(path, "rb") as file:
        yield from _read_entries(str(path), _file_entries(path, file, mapped), mapped)


def read_hub(name: str, split: str, columns: Columns | None) -> Iterator[Fields]:
    """The pairs of a data set of the hub, in its order."""
    import datasets

    mapped = _check_columns(columns)
    rows = enumerate(datasets.load_dataset(name, split=split), 1)
    yield from _read_entries(f"{name}, {split}", ((f"row {n}", row) for n, row in rows), mapped)


def _read_entries(source: str, entries: Entries, columns: Mapped) -> Iterator[Fields]:
    ids: dict[str, str] = {}
    first_place = first_form = ""
    for place, entry in entries:
        where = f"{source}, {place}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must be an object with each key once, got {kind_of(entry)}")
        try:
            fields, form = _read_row(entry, columns)
            key = _read_id(entry, columns)
            if key in ids:
                reason = f"must be different in every entry, got {cut(key)} as in {ids[key]}"
                raise BadColumn("id", f'{reason} (columns={{"id": ()}} lets it repeat)')
        except BadColumn as error:
            raise error.at(where, columns) from None
        if not first_form:
            first_place, first_form = place, form
        if form != first_form:
            raise ValueError(f"{where} must have {first_form} like {first_place}, got {form}")
        if key is not None:
            ids[key] = place
        yield fields
    if not first_form:
        raise ValueError(f"{source} must have at least one pair, got no entries")


# --- the formats of a file -------------------------------------------------------------------


def _file_entries(path: Path, file: BinaryIO, columns: Mapped) -> Entries:
    start = file.read(4)
    file.seek(0)
    if path.suffix.lower() == ".csv":
        return _csv_entries(path, file)
    if path.suffix.lower() == ".parquet" or start == b"PAR1":
        return _parquet_entries(path, file, columns)
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} must be unpacked first, got a gzip file")
    return _list_entries(path, file) if _begins_a_list(file) else _line_entries(path, file)


def _begins_a_list(file: BinaryIO) -> bool:
    chunk = file.read(2**12).removeprefix(b"\xef\xbb\xbf")
    while chunk and not chunk.strip():
        chunk = file.read(2**12)
    file.seek(0)
    return chunk.lstrip().startswith(b"[")


def _list_entries(path: Path, file: BinaryIO) -> Entries:
    lines = enumerate(file.read().split(b"\n"), 1)
    text = "\n".join(_decode(path, line, n) for n, line in lines)
    entries = cast(list[object], _json(path, text, 1))  # the text begins with a bracket
    decode = json.JSONDecoder().raw_decode
    line, counted, at = 1, 0, text.index("[") + 1
    for n, entry in enumerate(entries, 1):
        while text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        yield f"line {line}, entry {n}", entry
        _, at = decode(text, at)  # once more, to know where the next one begins


def _line_entries(path: Path, file: BinaryIO) -> Entries:
    for n, line in _lines(path, file):
        if line.strip():
            yield f"line {n}", _json(path, line, n)


def _csv_entries(path: Path, file: BinaryIO) -> Entries:
    reader = csv.reader((line for _, line in _lines(path, file)), strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, {place} must be valid CSV, got {error} (a field with commas, double "
                "quotes or line breaks needs double quotes around it)"
            ) from None
        if fields is None:
            return
        if not fields:
            continue  # an empty line
        if header is None:
            header = fields
            _check_header(f"{path}, {place}", header)
        elif len(fields) != len(header):
            missing = f", none for {header[len(fields)]!r}" if len(fields) < len(header) else ""
            raise ValueError(
                f"{path}, {place} must have {len(header)} fields like the header, got "
                f"{len(fields)}{missing}"
            )
        else:
            yield place, dict(zip(header, fields, strict=True))


def _parquet_entries(path: Path, file: BinaryIO, columns: Mapped) -> Entries:
    import pyarrow
    import pyarrow.parquet

    n, where = 0, str(path)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        _check_header(where, names)
        ours = ((name,) if theirs is None else theirs for name, theirs in columns.items())
        wanted = {*_IMAGES, *_TOOLS, *(column for theirs in ours for column in theirs)}
        read = [name for name in names if name in wanted]
        batches = table.iter_batches(batch_size=2**10, columns=read)
        where = f"{path}, row 1"
        for batch in batches:
            for row in range(len(batch)):
                n += 1
                entry = dict.fromkeys(names)
                for name in read:
                    where = f"{path}, row {n}: `{name}`"
                    entry[name] = batch.column(name)[row].as_py()
                yield f"row {n}", entry
            where = f"{path}, row {n + 1}"
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"{where} must be valid Parquet, got {reason}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} must be UTF-8, got {error.reason} at byte {error.start + 1}"
        ) from None


def _check_header(where: str, names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"{where} must have each column once, got {name!r} twice")


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Each line with its number, without holding more than one of them."""
    # Not the lines of str: JSON text may hold line separators such as U+2028 inside a string.
    n = 0
    while line := file.readline(LONGEST_LINE + 1):
        n += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(
                f"{path}, line {n} must have at most {LONGEST_LINE} bytes, got more without a "
                "line break"
            )
        yield n, _decode(path, line, n)


def _decode(path: Path, line: bytes, n: int) -> str:
    try:
        text = line.decode("utf-8-sig" if n == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {n} must be UTF-8, got {error.reason} at byte {error.start + 1} of the "
            "line"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path}, line {n} must be text, got a zero byte as letter {text.index(chr(0)) + 1}"
        )
    return text


def _json(path: Path, text: str, first_line: int) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
    except RecursionError:
        line, reason = first_line, "one nested too deeply"
    except ValueError:  # Python's limit on the digits of a number
        line, reason = first_line, "a number of too many digits"
    raise ValueError(
        f"{path}, line {line} must be valid JSON (an object per line, or a list of objects), got "
        f"{reason}"
    )


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


# --- the columns of an entry -----------------------------------------------------------------

# What changes the tokens that `trl` makes, and nothing here would read: columns, keys of a message.
_IMAGES = ("images", "image")
_TOOLS = ("tools", "chat_template_kwargs")
_MORE_THAN_TEXT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def _check_columns(columns: Columns | None) -> Mapped:
    """A user's `columns`, with None for the names that are not in it."""
    names: dict[str, tuple[str, ...] | None]
    names = dict.fromkeys(("prompt", "chosen", "rejected", "id"))
    for name, theirs in (columns or {}).items():
        if name not in names:
            raise ValueError(f"`columns` must name prompt, chosen, rejected or id, got {name!r}")
        theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        if name in ("chosen", "rejected") and not theirs:
            raise ValueError(f"`columns` must have at least one column for {name}, got none")
        if not all(isinstance(column, str) for column in theirs):
            raise TypeError(f"`columns` must have names of columns for {name}, got {theirs!r}")
        names[name] = theirs
    taken: dict[str, str] = {}
    for name in ("prompt", "chosen", "rejected"):
        given = names[name]
        for column in (name,) if given is None else given:
            if column in taken:
                raise ValueError(
                    f"`columns` must have each column once, got {column!r} for {taken[column]} and "
                    f"for {name}"
                )
            taken[column] = name
    if names["id"] is None and "id" in taken:
        names["id"] = ()
    return names


def _read_id(entry: Entry, columns: Mapped) -> str | None:
    """What tells an entry from the others, or None where nothing has to."""
    theirs = columns["id"]
    if theirs is None:
        theirs = ("id",) if "id" in entry else ()
    values = _values("id", entry, theirs)
    return None if not values or None in values else ", ".join(map(repr, values))


def _values(name: str, entry: Entry, columns: tuple[str, ...]) -> list[object]:
    for column in columns:
        if column not in entry:
            raise BadColumn(name, f"must be one of the columns, {_got_columns(entry)}", (column,))
    return [entry[column] for column in columns]


def _got_columns(entry: Entry) -> str:
    return f"got {', '.join(map(repr, entry))}: say with columns= where it is"


def _read_columns(name: str, entry: Entry, columns: tuple[str, ...]) -> object:
    """The value of a column, or the texts of several, joined."""
    values = _values(name, entry, columns)
    if len(values) == 1:
        return values[0]
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise BadColumn(name, f"must be text, got {kind_of(value)}", (column,))
    return "\n".join(text for text in cast(list[str], values) if text)


def _check_absent(entry: Entry, columns: Iterable[str]) -> None:
    for column in columns:
        if entry.get(column):
            got = kind_of(entry[column])
            raise BadColumn(column, f"must be empty, since only text is read, got {got}")


# --- the forms of a pair ---------------------------------------------------------------------


def _read_row(entry: Entry, columns: Mapped) -> tuple[Fields, str]:
    """The fields of a pair, and in words the form that it had."""
    chosen = _read_answer("chosen", entry, columns["chosen"] or ("chosen",))
    rejected = _read_answer("rejected", entry, columns["rejected"] or ("rejected",))
    _check_absent(entry, _IMAGES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        fields, form = _read_texts(entry, columns["prompt"], chosen, rejected)
    elif not isinstance(chosen, str) and not isinstance(rejected, str):
        _check_absent(entry, _TOOLS)
        fields, form = _read_conversations(entry, columns["prompt"], chosen, rejected)
    else:
        got, first = ("text", "messages") if isinstance(rejected, str) else ("messages", "text")
        raise BadColumn("rejected", f"must be {first} like chosen, got {got}")
    for name, text in zip(("prompt", "chosen", "rejected"), fields, strict=False):
        check_text(name, text)
    return fields, form


def _read_texts(
    entry: Entry, columns: tuple[str, ...] | None, chosen: str, rejected: str
) -> tuple[Fields, str]:
    if columns or (columns is None and "prompt" in entry):
        prompt = _read_columns("prompt", entry, columns or ("prompt",))
        if not isinstance(prompt, str):
            _read_messages("prompt", prompt)
            raise BadColumn("prompt", "must be text like the answers, got messages")
        return (prompt, chosen, rejected, ()), "text beside a prompt"
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
        reason = "must be how both answers begin or one of the columns"
        raise BadColumn("prompt", f"{reason}, {_got_columns(entry)}")
    fields = (prompt, chosen[shared:], rejected[shared:], ())
    return fields, "text that begins with the prompt"


def _read_conversations(
    entry: Entry, columns: tuple[str, ...] | None, chosen: Messages, rejected: Messages
) -> tuple[Fields, str]:
    *before, (_, answer) = chosen
    *before_rejected, (_, other) = rejected
    if before != before_rejected:
        want, got = (cut(as_text(messages)) for messages in (before, before_rejected))
        raise BadColumn("rejected", f"must answer the prompt of chosen, {want!r}, got {got!r}")
    form = "messages that begin with the prompt"
    if columns is None:
        columns = () if before and "prompt" not in entry else ("prompt",)
    if columns:
        prompt = _read_columns("prompt", entry, columns)
        if not isinstance(prompt, str):
            turns, form = [*_read_messages("prompt", prompt)], "messages beside a prompt"
            if before:
                raise BadColumn(
                    "chosen",
                    "must be one message, the answer, beside a prompt of messages, got "
                    f'{len(chosen)} (columns={{"prompt": ()}} takes the prompt from the answers)',
                )
            before = turns
        elif not before:
            raise BadColumn("prompt", "must be messages like the answers, got text")
        elif prompt != as_text(before):
            raise BadColumn(
                "prompt",
                f"must be the answers' earlier messages, {cut(as_text(before))!r}, got "
                f'{cut(prompt)!r} (columns={{"prompt": ()}} takes the messages)',
            )
        else:
            form = "messages that repeat the prompt"
    elif not before:
        raise BadColumn("prompt", "must be the answers' earlier messages, got answers without any")
    return (as_text(before), answer, other, tuple(before)), form


def _read_answer(name: str, entry: Entry, columns: tuple[str, ...]) -> str | Messages:
    """Text, or messages of which the last is the assistant's."""
    value = _read_columns(name, entry, columns)
    if isinstance(value, str):
        check_text(name, value)
        return value
    messages = _read_messages(name, value)
    if messages[-1][0] != "assistant":
        got = repr(messages[-1][0])
        raise BadColumn(name, f"must end with a message of 'assistant', got one of {got}")
    return messages


def _read_messages(name: str, value: object) -> Messages:
    if not isinstance(value, list) or not value:
        raise BadColumn(name, f"must be text or a list of messages, got {kind_of(value)}")
    for n, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            got = f"{kind_of(message)} as message {n}"
            raise BadColumn(name, f'must have messages with "role" and "content", got {got}')
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            got = repr(role) if isinstance(role, str) else kind_of(role)
            raise BadColumn(name, f"must have {A_ROLE} as the role of message {n}, got {got}")
        for key in _MORE_THAN_TEXT:
            if message.get(key):
                raise BadColumn(
                    name, f"must have only role and content in message {n}, got {key!r} too"
                )
        if not isinstance(content, str):
            raise BadColumn(
                name,
                f"must have text as the content of message {n} (no parts, images or tools), got "
                f"{kind_of(content)}",
            )
    return tuple((message["role"], message["content"]) for message in value)


def check_text(name: str, text: object) -> None:
    """Refuse what is not text, and an answer without any."""
    if not isinstance(text, str):
        raise BadColumn(name, f"must be text, got {kind_of(text)}")
    if name != "prompt" and not text.strip():
        raise BadColumn(name, "must have some text, got an empty answer")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadColumn(name, "must be text, got half of a surrogate pair") from error


def as_text(messages: Sequence[tuple[str, str]]) -> str:
    """One message as it stands, several as lines of `role: content`."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n".join(f"{role}: {content}" for role, content in messages)


def as_messages(messages: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Pairs of role and content as the objects that files and chat templates have."""
    return [{"role": role, "content": content} for role, content in messages]


# --- words for error messages ----------------------------------------------------------------


def cut(text: str) -> str:
    """Text without its middle where it is long."""
    return text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}"


def kind_of(value: object) -> str:
    """What something from a file is, in JSON's words."""
    if isinstance(value, _RepeatedKey):
        return f"an object with the key {value.key!r} twice"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(repr, value)) or 'none'}"
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), type(value).__name__)

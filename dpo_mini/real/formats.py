"""How pairs are read from files: CSV, JSON, JSON lines, Parquet, and rows of the hub.

All are read as entries, which are objects with columns; `forms` finds a pair in each.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from dpo_mini.real.columns import (
    BadColumn,
    Reading,
    RepeatedKey,
    UnreadColumn,
    cut,
    kind_of,
    may_matter,
    read_id,
    read_label,
)
from dpo_mini.real.forms import Fields, read_pair

if TYPE_CHECKING:
    from pyarrow import DataType

Entries = Iterator[tuple[str, object]]
"""The place of each entry, such as `line 3`, and what is there: an object, or a `BadRow`."""

LONGEST_LINE = 2**26
"""The most bytes in a line of JSONL or CSV, and the most letters in a field of CSV: 64 MiB are some
ten thousand pages of text. A longer line is a file without line breaks, and is refused before it
fills the memory."""


class BadFile(ValueError):
    """A sentence that begins with a place in a file; whoever knows the file's name adds it."""


class BadRow(BadFile):
    """One on an entry that can be left out: the others are read as if it were not there."""


def read_file(path: Path, reading: Reading, left_out: list[str] | None) -> Iterator[Fields]:
    """The pairs of a file, in its order; `left_out` gets a sentence on each bad entry."""
    with open(path, "rb") as file:
        yield from _read_entries(str(path), _file_entries(path, file, reading), reading, left_out)


def read_hub(
    name: str, split: str, reading: Reading, left_out: list[str] | None
) -> Iterator[Fields]:
    """The pairs of a data set of the hub, in its order."""
    import datasets

    rows = enumerate(datasets.load_dataset(name, split=split), 1)
    entries = ((f"row {n}", row) for n, row in rows)
    yield from _read_entries(f"{name}, {split}", entries, reading, left_out)


def _read_entries(
    source: str, entries: Entries, reading: Reading, left_out: list[str] | None
) -> Iterator[Fields]:
    if left_out is not None and not isinstance(left_out, list):
        raise TypeError(f"`left_out` must be a list, got {type(left_out).__name__}")
    ids: dict[str, str] = {}
    first_place = first_form = first_reason = ""
    try:
        for place, entry in entries:
            try:
                fields, form, key = _read_entry(place, entry, reading, ids)
                if form != (first_form or form):
                    raise BadRow(f"{place} must have {first_form} like {first_place}, got {form}")
            except BadRow as error:
                if left_out is None:
                    raise BadFile(f"{error}; left_out=[] leaves such rows out") from None
                first_reason = first_reason or f"none that can be read, the first since {error}"
                left_out.append(str(error))
                continue
            if not first_form:
                first_place, first_form = place, form
            if key is not None:
                ids[key] = place
            yield fields
    except BadFile as error:
        raise ValueError(f"{source}, {error}") from None
    if not first_form:
        got = first_reason or "no entries"
        raise ValueError(f"{source} must have at least one pair, got {got}")


def _read_entry(
    place: str, entry: object, reading: Reading, ids: Mapping[str, str]
) -> tuple[Fields, str, str | None]:
    """The fields of a pair, the form that it had, and what tells it from others."""
    if isinstance(entry, BadRow):
        raise entry
    if not isinstance(entry, Mapping):
        raise BadRow(f"{place} must be an object with each key once, got {kind_of(entry)}")
    columns = reading.columns
    try:
        columns = read_label(entry, reading)
        fields, form = read_pair(entry, columns, reading)
        key = read_id(entry, columns)
        if key is not None and key in ids:
            reason = f"must be different in every entry, got {cut(key)} as in {ids[key]}"
            raise BadColumn("id", f'{reason} (columns={{"id": ()}} lets it repeat)')
    except BadColumn as error:
        bad = BadFile if isinstance(error, UnreadColumn) else BadRow
        raise bad(error.at(place, columns)) from None
    return fields, form, key


# --- the formats of a file -------------------------------------------------------------------


def _file_entries(path: Path, file: BinaryIO, reading: Reading) -> Entries:
    start = file.read(4)
    file.seek(0)
    if path.suffix.lower() == ".csv":
        return _csv_entries(file)
    if path.suffix.lower() == ".parquet" or start == b"PAR1":
        return _parquet_entries(path, file, reading)
    if start.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path} must be unpacked first, got a gzip file")
    return _list_entries(file) if _begins_a_list(file) else _line_entries(file)


def _begins_a_list(file: BinaryIO) -> bool:
    chunk = file.read(2**12).removeprefix(b"\xef\xbb\xbf")
    while chunk and not chunk.strip():
        chunk = file.read(2**12)
    file.seek(0)
    return chunk.lstrip().startswith(b"[")


def _list_entries(file: BinaryIO) -> Entries:
    lines = enumerate(file.read().split(b"\n"), 1)
    text = "\n".join(_decode(line, n) for n, line in lines)
    entries = cast(list[object], _json(text, 1))  # the text begins with a bracket
    decode = json.JSONDecoder().raw_decode
    line, counted, at = 1, 0, text.index("[") + 1
    for n, entry in enumerate(entries, 1):
        while text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        yield f"line {line}, entry {n}", entry
        _, at = decode(text, at)  # once more, to know where the next one begins


def _line_entries(file: BinaryIO) -> Entries:
    for n, line in _lines(file):
        if not line.strip():
            continue
        entry: object
        try:
            entry = _json(_decode(line, n), n)
        except BadRow as error:
            entry = error
        yield f"line {n}", entry


def _csv_entries(file: BinaryIO) -> Entries:
    reader = csv.reader((_decode(line, n) for n, line in _lines(file)), strict=True)
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        fields = _next_fields(reader, place)
        if fields is None:
            return
        if not fields:
            continue  # an empty line
        if header is None:
            header = fields
            _check_header(place, header)
        elif len(fields) != len(header):
            missing = f", none for {header[len(fields)]!r}" if len(fields) < len(header) else ""
            got = f"{len(fields)}{missing}"
            reason = f"must have {len(header)} fields like the header, got {got}"
            yield place, BadRow(f"{place} {reason}")
        else:
            yield place, dict(zip(header, fields, strict=True))


def _next_fields(reader: Iterator[list[str]], place: str) -> list[str] | None:
    """The fields of the next row; the module's limit on their length is another for that long."""
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise BadFile(
            f"{place} must be valid CSV, got {error} (a field with commas, double quotes or line "
            "breaks needs double quotes around it)"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _parquet_entries(path: Path, file: BinaryIO, reading: Reading) -> Entries:
    import pyarrow
    import pyarrow.parquet

    n, where = 0, str(path)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        _check_header("the schema", names)
        without_prompt = reading.columns["prompt"] is None and "prompt" not in names
        read = [
            field.name
            for field in table.schema_arrow
            if may_matter(field.name, reading) or (without_prompt and _holds_text(field.type))
        ]
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


def _holds_text(kind: "DataType") -> bool:
    """Whether a column of Parquet may hold text or messages."""
    from pyarrow import types

    lists = types.is_list(kind) or types.is_large_list(kind)
    return types.is_struct(kind.value_type) if lists else not types.is_primitive(kind)


def _check_header(place: str, names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise BadFile(f"{place} must have each column once, got {name!r} twice")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Each line with its number, without holding more than one of them."""
    # Not the lines of str: JSON text may hold line separators such as U+2028 inside a string.
    n = 0
    while line := file.readline(LONGEST_LINE + 1):
        n += 1
        if len(line) > LONGEST_LINE:
            raise BadFile(
                f"line {n} must have at most {LONGEST_LINE} bytes, got more without a line break"
            )
        yield n, line


def _decode(line: bytes, n: int) -> str:
    try:
        text = line.decode("utf-8-sig" if n == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"line {n} must be UTF-8, got {error.reason} at byte {error.start + 1} of the line"
        ) from None
    if "\0" in text:
        raise BadRow(f"line {n} must be text, got a zero byte as letter {text.index(chr(0)) + 1}")
    return text


def _json(text: str, first_line: int) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        at = min(error.pos, len(text.rstrip("\r\n")))  # not behind the line break of a broken line
        line, column = first_line + text.count("\n", 0, at), at - text.rfind("\n", 0, at)
        reason = f"{error.msg.removesuffix(' at')} at column {column}"
    except RecursionError:
        line, reason = first_line, "one nested too deeply"
    except ValueError:  # Python's limit on the digits of a number
        line, reason = first_line, "a number of too many digits"
    raise BadRow(
        f"line {line} must be valid JSON (an object per line, or a list of objects), got {reason}"
    )


def _object(pairs: list[tuple[str, object]]) -> dict[str, object] | RepeatedKey:
    entry: dict[str, object] = {}
    for key, value in pairs:
        if key in entry:
            return RepeatedKey(key)
        entry[key] = value
    return entry

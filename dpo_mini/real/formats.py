"""How pairs and ratings are read: from CSV, JSON, JSON lines, Parquet, and rows of the hub.

All are read as entries, which are objects with columns; `forms` finds a pair or rating in each.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from dpo_mini.real.columns import (
    PAIR,
    BadColumn,
    Reading,
    RepeatedKey,
    UnreadColumn,
    check_kind,
    cut,
    kind_of,
    may_matter,
    read_id,
    read_label,
)
from dpo_mini.real.forms import Fields, read_pair, read_rating

if TYPE_CHECKING:
    from pyarrow import DataType

Entries = Iterator[tuple[str, object]]
"""The place of each entry, such as `line 3`, and what is there: an object, or a `BadRow`."""

LONGEST_LINE = 2**26
"""The most bytes in a line of JSONL or CSV, and the most letters in a field of CSV: 64 MiB are some
ten thousand pages of text. A longer line is a file without line breaks, and is refused before it
fills the memory."""

_BLOCK = 2**18
"""The bytes of a JSON list that are read at a time, more where an entry is longer."""


class BadFile(ValueError):
    """A sentence that begins with a place in a file; whoever knows the file's name adds it."""


class BadRow(BadFile):
    """One on an entry that can be left out: the others are read as if it were not there."""


def read_file(path: Path, reading: Reading, left_out: list[str] | None) -> Iterator[Fields]:
    """What a file has, in its order; `left_out` gets a sentence on each bad entry."""
    with open(path, "rb") as file:
        entries = _file_entries(path, file, reading)
        try:
            yield from _read_entries(str(path), entries, reading, left_out)
        except ValueError:
            if _is_list(path, file):
                _check_list(path, file)  # broken JSON is named before a bad entry
            raise


def read_hub(
    name: str, split: str, reading: Reading, left_out: list[str] | None
) -> Iterator[Fields]:
    """What a data set of the hub has, in its order."""
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
        what = "pair" if reading.needed == PAIR else "rating"
        raise ValueError(f"{source} must have at least one {what}, got {got}")


def _read_entry(
    place: str, entry: object, reading: Reading, ids: Mapping[str, str]
) -> tuple[Fields, str, str | None]:
    """The fields of a row, the form that it had, and what tells it from others."""
    if isinstance(entry, BadRow):
        raise entry
    if not isinstance(entry, (dict, Mapping)):
        raise BadRow(f"{place} must be an object with each key once, got {kind_of(entry)}")
    columns = reading.columns
    try:
        check_kind(entry, reading)
        if reading.needed == PAIR:
            columns = read_label(entry, reading)
            fields, form = read_pair(entry, columns, reading)
        else:
            fields, form = read_rating(entry, reading)
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
    return _list_entries(file) if _is_list(path, file) else _line_entries(file)


def _is_list(path: Path, file: BinaryIO) -> bool:
    """Whether a file is a JSON list; it is left at its beginning."""
    if path.suffix.lower() in (".csv", ".parquet"):
        return False
    file.seek(0)
    chunk = file.read(2**12).removeprefix(b"\xef\xbb\xbf")
    while chunk and not chunk.strip():
        chunk = file.read(2**12)
    file.seek(0)
    return chunk.lstrip().startswith(b"[")


def _list_entries(file: BinaryIO) -> Entries:
    """Each entry of a JSON list, without holding more of the file than a block or an entry."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    n, line, at, text, ended = 0, 1, 0, "", False
    while not ended:
        block = file.read(max(_BLOCK, len(text) - at))
        ended = not block
        try:
            text = text[at:] + utf8.decode(block, ended)
        except UnicodeDecodeError:
            _refuse_list(file)
        at = counted = 0
        while (mark := _BEFORE.match(text, at)) and mark[1] == ("," if n else "["):
            start = mark.end()
            try:
                entry, end = _DECODER.raw_decode(text, start)
            except (ValueError, RecursionError):
                break  # the rest of it may be in the next block, like that of a number
            if text[end - 1] != "}" and not _AFTER.match(text, end):
                break
            n, at = n + 1, end
            line, counted = line + text.count("\n", counted, start), start
            yield f"line {line}, entry {n}", entry
        line += text.count("\n", counted, at)
    if not (_END if n else _EMPTY).fullmatch(text, at):
        _refuse_list(file)


def _check_list(path: Path, file: BinaryIO) -> None:
    try:
        for _ in _list_entries(file):
            pass
    except BadFile as error:
        raise ValueError(f"{path}, {error}") from None


def _refuse_list(file: BinaryIO) -> NoReturn:
    """Say where a JSON list is at fault, which takes the whole of it."""
    file.seek(0)
    lines = enumerate(file.read().split(b"\n"), 1)
    _json("\n".join(_decode(line, n) for n, line in lines), 1)
    raise AssertionError("a list that can be read was refused")


def _line_entries(file: BinaryIO) -> Entries:
    for n, line in _lines(file):
        if line.isspace():
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
        entry, end = _DECODER.raw_decode(text)
        if not text[end:].strip(_BLANKS):
            return entry
    except (ValueError, RecursionError):
        pass  # said below; so are blanks before an entry
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
    entry = dict(pairs)
    if len(entry) == len(pairs):
        return entry
    keys = [key for key, _ in pairs]
    return RepeatedKey(next(key for n, key in enumerate(keys) if key in keys[:n]))


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_BLANKS = " \t\r\n"
# What stands before an entry of a list and after it, and around a list.
_BEFORE, _AFTER, _END, _EMPTY = (
    re.compile(pattern.replace(" ", rf"[{_BLANKS}]*"))
    for pattern in (r" ([\[,]) ", r" [,\]]", r" \] ", r" \[ \] ")
)

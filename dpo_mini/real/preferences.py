"""Preference pairs as text: read from files and hub data sets, checked, written whole."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_mini.files import write_whole

AnyPath = str | os.PathLike[str]
Columns = Mapping[str, str | Sequence[str]]
_Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which somebody preferred one.

    Args:
      prompt, chosen, rejected: text; an answer is not empty. The two answers may be the same: such
        a pair has margin 0 under every policy and teaches nothing.
    """

    prompt: str
    chosen: str
    rejected: str

    def __post_init__(self) -> None:  # noqa: D105
        for name, text in asdict(self).items():
            if not isinstance(text, str):
                raise ValueError(f"{name}: got {_kind(text)}, takes text")
            if name != "prompt" and not text.strip():
                raise ValueError(f"{name}: got an empty answer, takes some text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name}: got half of a surrogate pair, takes text") from error


def load_preferences(path: AnyPath, *, columns: Columns | None = None) -> list[Preference]:
    """Read pairs from a JSON file (a list of objects) or a JSONL file (one object a line).

    An answer is text, or a list of `{"role", "content"}` messages as on the hub: the last message
    is the assistant's answer, those before it must be the same in `chosen` and `rejected`, and they
    are the prompt where there is no prompt column. One earlier message is a prompt as it stands;
    several become lines of `role: content`.

    Args:
      path: the file, UTF-8. Its content, not its name, says which of the two forms it has.
      columns: which of the file's columns hold `prompt`, `chosen` and `rejected`, where they have
        other names: `{"prompt": ("instruction", "input")}`. Several columns are joined by line
        breaks, empty ones dropped. `{"prompt": ()}` takes the prompt from the messages even where
        there is a prompt column.
    Returns:
      The pairs, in the file's order; columns that are not asked for are ignored.
    Raises:
      OSError: the file cannot be read.
      ValueError: invalid JSON, a key twice in one object, a missing column, a value that is not
        text, an empty answer, answers to different prompts, no pairs, an unknown name in
        `columns`. The message has the file and the line or entry, counted from 1.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error.reason} at byte {error.start}, takes UTF-8") from None
    entries = _list_entries if text.lstrip().startswith("[") else _line_entries
    return _preferences(str(path), entries(path, text), columns)


def load_hub_preferences(
    name: str, *, split: str, columns: Columns | None = None
) -> list[Preference]:
    """Read pairs from a data set of the Hugging Face hub: downloads it, or takes it from the cache.

    Args:
      name: the data set, or a folder on this machine in a form that `datasets` knows.
      split: such as `"train"` or `"train[:1000]"`.
      columns: as in `load_preferences`; rows are checked and refused alike.
    """
    import datasets

    rows = datasets.load_dataset(name, split=split)
    entries = ((f"{name}, {split}, row {n}", row) for n, row in enumerate(rows, 1))
    return _preferences(name, entries, columns)


def save_preferences(path: AnyPath, preferences: Iterable[Preference]) -> None:
    """Write pairs as JSONL, whole or not at all: a write that fails leaves an old file as it was.

    Raises:
      OSError: the file cannot be written.
      ValueError: no pairs, or something that is not a `Preference`.
    """
    preferences = list(preferences)
    check_preferences(preferences)
    lines = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in preferences]
    write_whole(path, "".join(lines).encode())


def check_preferences(preferences: Sequence[Preference]) -> None:
    """Refuse none, and anything that is not a `Preference`."""
    if not len(preferences):
        raise ValueError("preferences: got none, takes at least one pair")
    for row, pair in enumerate(preferences):
        if not isinstance(pair, Preference):
            kind = type(pair).__name__
            raise TypeError(f"preferences: got {kind} in row {row}, takes a Preference")


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


def _json(path: Path, text: str, first_line: int) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except RecursionError:
        line, reason = first_line, "nested too deeply"
    raise ValueError(
        f"{path}, line {line}: got invalid JSON ({reason}), takes a list of objects, or one "
        "object a line"
    )


def _list_entries(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for n, entry in enumerate(_json(path, text, 1), 1):
        yield f"{path}, entry {n}", entry


def _line_entries(path: Path, text: str) -> Iterator[tuple[str, object]]:
    # Not splitlines: JSON text may hold line separators such as U+2028 inside a string.
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {n}", _json(path, line, n)


def _preferences(
    source: str, entries: Iterable[tuple[str, object]], columns: Columns | None
) -> list[Preference]:
    columns = _check_columns(columns)
    preferences = [_preference(where, entry, columns) for where, entry in entries]
    if not preferences:
        raise ValueError(f"{source}: got no entries, takes at least one pair")
    return preferences


def _check_columns(columns: Columns | None) -> dict[str, tuple[str, ...] | None]:
    """Each of our names with the file's; None for a prompt that nobody said where to find."""
    names = {"prompt": None, "chosen": ("chosen",), "rejected": ("rejected",)}
    for name, theirs in (columns or {}).items():
        if name not in names:
            raise ValueError(f"columns: got the name {name!r}, takes prompt, chosen and rejected")
        theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        if name != "prompt" and not theirs:
            raise ValueError(f"columns: got no column for {name}, takes at least one")
        if not all(isinstance(column, str) for column in theirs):
            raise TypeError(f"columns: got {theirs!r} for {name}, takes names of columns")
        names[name] = theirs
    return names


def _preference(
    where: str, entry: object, columns: Mapping[str, tuple[str, ...] | None]
) -> Preference:
    if isinstance(entry, _RepeatedKey):
        raise ValueError(f"{where}: got the key {entry.key!r} twice, takes each key once")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: got {_kind(entry)}, takes an object")
    try:
        before_chosen, chosen = _read_answer("chosen", entry, columns["chosen"])
        before_rejected, rejected = _read_answer("rejected", entry, columns["rejected"])
        if before_chosen != before_rejected:
            raise ValueError(
                f"rejected: got the prompt {_as_text(before_rejected)!r} where chosen has "
                f"{_as_text(before_chosen)!r}, takes two answers to the same prompt"
            )
        prompt = _read_prompt(entry, columns["prompt"], before_chosen)
        return Preference(prompt, chosen, rejected)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_prompt(
    entry: Mapping[str, object], columns: tuple[str, ...] | None, before: _Turns
) -> str:
    if columns is None:
        columns = () if before and "prompt" not in entry else ("prompt",)
    if not columns:
        if not before:
            raise ValueError("prompt: got answers without earlier messages, takes a prompt column")
        return _as_text(before)
    value = _read_columns("prompt", entry, columns)
    prompt = value if isinstance(value, str) else _as_text(_read_messages("prompt", value))
    if before and prompt != _as_text(before):
        raise ValueError(
            f"prompt: got {prompt!r} where the answers' earlier messages are "
            f'{_as_text(before)!r}, takes one prompt (columns={{"prompt": ()}} takes the messages)'
        )
    return prompt


def _read_answer(
    name: str, entry: Mapping[str, object], columns: tuple[str, ...]
) -> tuple[_Turns, str]:
    """The messages before an answer, none where it is plain text, and the answer."""
    value = _read_columns(name, entry, columns)
    if isinstance(value, str):
        return (), value
    *before, (role, answer) = _read_messages(name, value)
    if role != "assistant":
        raise ValueError(f"{name}: got a last message of {role!r}, takes one of 'assistant'")
    return tuple(before), answer


def _read_columns(name: str, entry: Mapping[str, object], columns: tuple[str, ...]) -> object:
    missing = [column for column in columns if column not in entry]
    if missing:
        raise ValueError(
            f"{name}: got no column {missing[0]!r} among {', '.join(map(repr, entry))}; takes "
            f"columns= to say where {name} is"
        )
    values = [entry[column] for column in columns]
    if len(values) == 1:
        return values[0]
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"{name}: got {_kind(value)} in column {column!r}, takes text")
    return "\n".join(value for value in values if value)


def _read_messages(name: str, value: object) -> _Turns:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}: got {_kind(value)}, takes text or a list of messages")
    for message in value:
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"{name}: got {_kind(message)} in its list of messages, takes objects with "
                '"role" and "content" as text'
            )
    return tuple((message["role"], message["content"]) for message in value)


def _as_text(turns: _Turns) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role}: {content}" for role, content in turns)


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

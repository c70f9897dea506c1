"""Which of a file's columns are read, and as what.

`how_to_read` checks what a user says about it. A column that nobody reads is refused where it holds
words of the prompt, or says which answer won.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import cast

Columns = Mapping[str, str | Sequence[str]]
"""From our names to the file's, as a user writes them."""
Mapped = Mapping[str, tuple[str, ...] | None]
"""From each of our names to the file's columns; None where nobody said which."""
Entry = Mapping[str, object]

ROLES = ("system", "user", "assistant")
"""Who can have said a message."""
A_ROLE = "'system', 'user' or 'assistant'"
IMAGES = ("images", "image")
TOOLS = ("tools", "chat_template_kwargs")
"""Columns that change the tokens that `trl` makes, and that nothing here would read."""

_LONGEST_LABEL = 40
"""How many letters a text may have that says which answer won: it may be `Assistant A`."""

PAIR = ("chosen", "rejected")
"""The columns of a pair, beside its prompt."""
RATING = ("completion", "label")
"""Those of a rating."""

_OTHERS = ("id", "system", "history", "label", "ignored")
_SINGLE = ("history", "label")  # of these one column alone
_OTHER_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# Names under which files keep words of the prompt, or which of two answers won.
_SUBJECTS = {
    **dict.fromkeys(("system", "system_prompt", "system_message"), "system"),
    **dict.fromkeys(("question", "instruction", "instructions", "query", "input"), "prompt"),
    **{"context": "prompt", "history": "history"},
    **dict.fromkeys(("label", "labels", "winner", "winner_id", "winner_model_a"), "label"),
    **dict.fromkeys(("better", "better_id", "better_response_id", "safer_response_id"), "label"),
    **dict.fromkeys(("preferred", "preferred_id", "preferred_response", "chosen_id"), "label"),
    **dict.fromkeys(("preference", "overall_preference", "human_preference"), "label"),
    **dict.fromkeys(("chosen", "choice", "verdict", "vote", "judgment", "judgement"), "label"),
}
# Where a prompt was found, and what else could be read there.
_READABLE = {
    "column": ("prompt", "history", "system"),
    "beginning": ("prompt",),
    "turns": (),
    "messages": ("system",),
}


class BadColumn(ValueError):
    """A value that is refused, and the column that holds it; whoever knows the place adds it.

    Args:
      name: one of our names, or another column of the file.
      reason: what it must be and what it was.
      columns: those of the file that are at fault, by default all that are read as `name`.
    """

    def __init__(self, name: str, reason: str, columns: tuple[str, ...] = ()) -> None:  # noqa: D107
        super().__init__(name, reason, columns)
        self.name, self.reason, self.columns = name, reason, columns

    def __str__(self) -> str:  # noqa: D105
        return f"`{self.name}` {self.reason}"

    def at(self, place: str, mapped: Mapped) -> str:
        """The sentence with its place, and with the file's own name of the column."""
        theirs = self.columns or mapped.get(self.name) or ()
        others = ", ".join(repr(column) for column in theirs if column != self.name)
        column = f" (column {others})" if others else ""
        return f"{place}: `{self.name}`{column} {self.reason}"


class UnreadColumn(BadColumn):
    """A column that nobody reads: the fault of `columns`, not of one row."""

    def __init__(self, name: str, reason: str) -> None:  # noqa: D107
        super().__init__(name, reason, (name,))


# --- what a user says ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How entries are read.

    Args:
      needed: the columns of what is read, `PAIR` or `RATING`.
      columns: from our names to the file's.
      known: the file's columns that are read or ignored.
      labels: what the label says where the first answer won, and where the second did; of a rating,
        where the answer was liked, and where it was not.
      turn_markers: what stands in a text before a person's turn, and before the assistant's.
      roles: from the file's names for who speaks to ours.
      first_answers: whether answers of several turns are cut to the first that differ.
    """

    needed: tuple[str, str]
    columns: Mapped
    known: frozenset[str]
    labels: tuple[str, str] | None
    turn_markers: tuple[str, str] | None
    roles: Mapping[str, str]
    first_answers: bool

    @cached_property
    def plain(self) -> bool:
        """Whether nobody said anything about columns and turns."""
        return self.turn_markers is None and not any(
            theirs is not None for theirs in self.columns.values()
        )


def how_to_read(
    columns: Columns | None = None,
    labels: Sequence[object] | None = None,
    turn_markers: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    first_answers: bool = False,
    needed: tuple[str, str] = PAIR,
) -> Reading:
    """The arguments of `load_preferences`, or with `needed=RATING` of `load_ratings`, checked."""
    mapped = _check_columns(columns, needed)
    known = {column for theirs in mapped.values() for column in theirs or ()} | {"prompt"}
    known |= {name for name in (*needed, "id") if mapped[name] is None}
    known |= {column.partition(".")[0] for column in known}
    if needed == RATING:
        labels, mapped = labels or (1, 0), {**mapped, "label": mapped["label"] or ("label",)}
    return Reading(
        needed,
        mapped,
        frozenset(known),
        _check_labels(labels, mapped["label"], needed),
        _check_turn_markers(turn_markers),
        _check_roles(roles),
        first_answers,
    )


def _check_columns(columns: Columns | None, needed: tuple[str, str]) -> Mapped:
    """A user's `columns`, with None for the names that are not in it."""
    names: dict[str, tuple[str, ...] | None]
    names = dict.fromkeys(("prompt", *needed, *_OTHERS))
    for name, theirs in (columns or {}).items():
        if name not in names:
            *most, last = names
            ours = f"{', '.join(most)} or {last}"
            raise ValueError(f"`columns` must name {ours}, got {name!r}")
        theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        if name in needed and not theirs:
            raise ValueError(f"`columns` must have at least one column for {name}, got none")
        if name in _SINGLE and len(theirs) > 1:
            raise ValueError(f"`columns` must have one column for {name}, got {len(theirs)}")
        if not all(isinstance(column, str) for column in theirs):
            raise TypeError(f"`columns` must have names of columns for {name}, got {theirs!r}")
        names[name] = theirs
    taken: dict[str, str] = {}
    for name, given in names.items():
        if name == "id":
            continue
        own = (name,) if name in ("prompt", *needed) else ()
        for column in own if given is None else given:
            if column in taken:
                raise ValueError(
                    f"`columns` must have each column once, got {column!r} for {taken[column]} and "
                    f"for {name}"
                )
            taken[column] = name
    if names["id"] is None and "id" in taken:
        names["id"] = ()
    return names


def _check_labels(
    labels: Sequence[object] | None, columns: tuple[str, ...] | None, needed: tuple[str, str]
) -> tuple[str, str] | None:
    if labels is None and not columns:
        return None
    if not columns:
        raise ValueError(
            f'`labels` must stand beside columns={{"label": COLUMN}}, got {labels!r} alone'
        )
    texts = [_label_text(label) for label in labels or ()]
    if isinstance(labels, str) or len(texts) != 2 or None in texts or texts[0] == texts[1]:
        where = 'the first and where the second answer won, such as (1, 0) or ("model_a", "model_b"'
        if needed == RATING:
            where = 'an answer was liked and where it was not, such as (1, 0) or ("up", "down"'
        raise ValueError(
            f"`labels` must be two values, those of the label column where {where}), got {labels!r}"
        )
    return cast(str, texts[0]), cast(str, texts[1])


def _check_turn_markers(markers: Sequence[str] | None) -> tuple[str, str] | None:
    if markers is None:
        return None
    if (
        isinstance(markers, str)
        or not all(isinstance(marker, str) and marker.strip() for marker in markers)
        or len(set(markers)) != 2
        or len(markers) != 2
    ):
        raise ValueError(
            "`turn_markers` must be two texts, what stands before a person's turn and before the "
            f"assistant's, got {markers!r}"
        )
    return markers[0], markers[1]


def _check_roles(roles: Mapping[str, str] | None) -> Mapping[str, str]:
    for theirs, ours in (roles or {}).items():
        if ours not in ROLES:
            raise ValueError(
                f"`roles` must give {A_ROLE} to each name, got {ours!r} for {theirs!r}"
            )
    return {**_OTHER_ROLES, **{role: role for role in ROLES}, **(roles or {})}


# --- the values of a row ---------------------------------------------------------------------


def read_column(name: str, entry: Entry, columns: tuple[str, ...]) -> object:
    """The value of a column, or the texts of several, joined."""
    if len(columns) == 1:
        column = columns[0]
        return entry[column] if column in entry else _value(name, entry, column)
    values = [_value(name, entry, column) for column in columns]
    for column, value in zip(columns, values, strict=True):
        if not isinstance(value, str):
            raise BadColumn(name, f"must be text, got {kind_of(value)}", (column,))
    return "\n".join(text for text in cast(list[str], values) if text)


def read_id(entry: Entry, columns: Mapped) -> str | None:
    """What tells an entry from the others, or None where nothing has to."""
    theirs = columns["id"]
    if theirs is None:
        theirs = ("id",) if "id" in entry else ()
    values = [_value("id", entry, column) for column in theirs]
    return None if not values or None in values else ", ".join(map(repr, values))


def read_label(entry: Entry, reading: Reading) -> Mapped:
    """The columns, with those of the two answers exchanged where the label says so."""
    columns = reading.columns
    if reading.labels is None:
        if columns["label"] is None and (columns["chosen"] or columns["rejected"]):
            _check_no_label(entry, reading)
        return columns
    if has_first_label(entry, reading):
        return columns
    chosen, rejected = (columns[name] or (name,) for name in ("rejected", "chosen"))
    return {**columns, "chosen": chosen, "rejected": rejected}


def has_first_label(entry: Entry, reading: Reading) -> bool:
    """Whether the label is the first of `reading.labels`, which are the only ones."""
    label = read_column("label", entry, reading.columns["label"] or ())
    text, (first, second) = _label_text(label), cast(tuple[str, str], reading.labels)
    if text not in (first, second):
        got = kind_of(label) if text is None else repr(label)
        raise BadColumn("label", f"must be {first} or {second}, got {got}")
    return text == first


def check_kind(entry: Entry, reading: Reading) -> None:
    """Refuse a rating where pairs are read, and a pair where ratings are."""
    other, name = (RATING, "load_ratings") if reading.needed == PAIR else (PAIR, "load_preferences")
    if reading.needed[0] not in reading.known or reading.needed[0] in entry:
        return
    if all(column in entry and column not in reading.known for column in other):
        raise UnreadColumn(
            reading.needed[0],
            f"must be one of the columns, got {other[0]!r} and {other[1]!r} ({name} reads such a "
            "file)",
        )


def check_absent(entry: Entry, columns: Iterable[str]) -> None:
    """Refuse columns that hold something."""
    for column in columns:
        if entry.get(column):
            got = kind_of(entry[column])
            raise BadColumn(column, f"must be empty, since only text is read, got {got}")


def columns_there(entry: Entry) -> str:
    """The names of the columns, for a message."""
    return f"got {', '.join(map(repr, entry))}: say with columns= where it is"


def _value(name: str, entry: Entry, column: str) -> object:
    """Of a column, or at the end of a dotted path that leads into one: `answers.0.text`."""
    if column in entry:
        return entry[column]
    value: object = entry
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise BadColumn(name, f"must be one of the columns, {columns_there(entry)}", (column,))
    return value


def _label_text(label: object) -> str | None:
    """A label in one spelling, None for what is no label: 1, 1.0, true and "1" are the same."""
    if not isinstance(label, str | int | float):
        return None
    text = str(label).strip()
    if text.lower() in ("true", "false"):
        return str(int(text.lower() == "true"))
    with suppress(ValueError):
        number = float(text)
        return str(int(number)) if number.is_integer() else text
    return text


# --- columns that nobody reads ---------------------------------------------------------------


def check_words_read(entry: Entry, reading: Reading, prompt: str, found_in: str) -> None:
    """Refuse columns with words that belong to the prompt and are not in it.

    Args:
      entry, reading: the row.
      prompt: the text that was found.
      found_in: where, one of `_READABLE`. Beside the beginning of two answers every column of words
        is refused, elsewhere those whose names are known.
    """
    any_name = found_in == "beginning"
    unread = {}
    for column in entry:
        if column not in reading.known:
            subject = _SUBJECTS.get(column.lower(), "")
            if (subject or any_name) and _is_lost(entry[column], prompt):
                unread[column] = subject
    if not unread:
        return
    if any_name and "prompt" not in unread.values():
        unread |= {column: "prompt" for column in unread if _is_wording(entry[column])}
    for subject in ("prompt", "history", "system"):
        lost = [column for column in unread if unread[column] == subject]
        if lost and reading.columns[subject] != ():
            _refuse_unread(entry, reading, lost, subject, found_in)


def may_matter(column: str, reading: Reading) -> bool:
    """Whether a column is read, or has a name that is refused where nobody reads it."""
    return column in reading.known or column in (*IMAGES, *TOOLS) or column.lower() in _SUBJECTS


def _refuse_unread(
    entry: Entry, reading: Reading, lost: list[str], subject: str, found_in: str
) -> None:
    ours, theirs = subject, lost
    if subject == "history" and isinstance(entry[lost[0]], str):
        ours = "prompt"
    if ours == "prompt" and found_in == "column":
        theirs = [*(reading.columns["prompt"] or ("prompt",)), *lost]
    reads = f"{_as_columns(ours, theirs)} reads it, " if ours in _READABLE[found_in] else ""
    given = ("prompt", []) if subject == "prompt" and found_in == "beginning" else ("ignored", lost)
    raise UnreadColumn(
        lost[0],
        "must be read or left out by name, got words that are not in the prompt "
        f"({reads}{_as_columns(*given)} leaves it out)",
    )


def _check_no_label(entry: Entry, reading: Reading) -> None:
    for column, value in entry.items():
        if column in reading.known or _SUBJECTS.get(column.lower()) != "label":
            continue
        if 0 < len(_label_text(value) or "") <= _LONGEST_LABEL:
            raise UnreadColumn(
                column,
                f"must be read or left out by name, got {value!r}, which may say that the other "
                f"answer won ({_as_columns('label', [column])} reads it, with labels= its values "
                "where the first and where the second answer won, "
                f"{_as_columns('label', [])} leaves it out)",
            )


def _is_lost(value: object, prompt: str) -> bool:
    """Whether something holds words that are not in the prompt."""
    if isinstance(value, str):
        return value.strip() not in prompt
    return isinstance(value, list | Mapping) and bool(value)


def _is_wording(value: object) -> bool:
    """Text of several words, or messages; one word is most often a name, a date or an address."""
    if isinstance(value, str):
        return len(value.split()) > 1 or not value.isascii()
    first = value[0] if isinstance(value, list) else None
    return isinstance(first, Mapping) and bool({"content", "value"} & first.keys())


def _as_columns(ours: str, theirs: Sequence[str]) -> str:
    """A mapping as a user writes it."""
    names = ", ".join(map(json.dumps, theirs))
    return f'columns={{"{ours}": {names if len(theirs) == 1 else f"({names})"}}}'


# --- words for error messages ----------------------------------------------------------------


@dataclass(frozen=True)
class RepeatedKey:
    """Stands where a JSON object had one key twice, of which `dict` would keep the last."""

    key: str


def cut(text: str) -> str:
    """Text without its middle where it is long."""
    return text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}"


def kind_of(value: object) -> str:
    """What something from a file is, in JSON's words."""
    if isinstance(value, RepeatedKey):
        return f"an object with the key {value.key!r} twice"
    if isinstance(value, Mapping):
        return f"an object with the keys {', '.join(map(repr, value)) or 'none'}"
    if value is None or value == []:
        return "null" if value is None else "an empty list"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), type(value).__name__)

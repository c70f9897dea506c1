"""Preference pairs as text: read from files and hub data sets, checked, written whole."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_mini._files import write_whole
from dpo_mini.real.formats import (
    A_ROLE,
    ROLES,
    Columns,
    Messages,
    as_messages,
    as_text,
    check_text,
    cut,
    kind_of,
    read_file,
    read_hub,
)

AnyPath = str | os.PathLike[str]


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
            check_text(name, getattr(self, name))
        check_messages("messages", self.messages)
        if self.messages and self.prompt != as_text(self.messages):
            want, got = cut(as_text(self.messages)), cut(self.prompt)
            raise ValueError(f"`prompt` must be the text of the messages, {want!r}, got {got!r}")


def load_preferences(path: AnyPath, *, columns: Columns | None = None) -> list[Preference]:
    """Read pairs from a file: JSON (a list of objects), JSONL (one per line), CSV or Parquet.

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
    return [Preference(*fields) for fields in read_file(Path(path), columns)]


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
    return [Preference(*fields) for fields in read_hub(name, split, columns)]


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
                f"`preferences` must all have {first} like row 0, got {got} in row {row}"
            )
    lines = [json.dumps(_as_entry(pair), ensure_ascii=False) + "\n" for pair in preferences]
    write_whole(path, "".join(lines).encode())


def check_preferences(preferences: Sequence[Preference]) -> None:
    """Refuse none, and anything that is not a `Preference`."""
    if not len(preferences):
        raise ValueError("`preferences` must have at least one pair, got none")
    for row, pair in enumerate(preferences):
        if not isinstance(pair, Preference):
            kind = type(pair).__name__
            raise TypeError(f"`preferences` must be of type Preference, got {kind} in row {row}")


def check_messages(name: str, messages: Messages) -> None:
    """Refuse what is not a conversation, by the name of its argument."""
    if not isinstance(messages, tuple):
        raise ValueError(f"`{name}` must be a tuple of (role, content), got {kind_of(messages)}")
    for n, message in enumerate(messages, 1):
        if not (
            isinstance(message, tuple)
            and len(message) == 2
            and message[0] in ROLES
            and isinstance(message[1], str)
        ):
            raise ValueError(
                f"`{name}` must be pairs of {A_ROLE} and text, got {message!r} as message {n}"
            )


# --- private functions -----------------------------------------------------------------------


def _as_entry(pair: Preference) -> dict[str, object]:
    """A pair as an object of a file, in one of the forms that are read."""
    if not pair.messages:
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "prompt": as_messages(pair.messages),
        "chosen": as_messages([("assistant", pair.chosen)]),
        "rejected": as_messages([("assistant", pair.rejected)]),
    }

"""Pairs and ratings as text: read from files and hub data sets, checked, written whole."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dpo_mini._arguments import check_count, check_generator
from dpo_mini._files import write_whole
from dpo_mini.real.columns import A_ROLE, RATING, ROLES, Columns, cut, how_to_read, kind_of
from dpo_mini.real.conversations import Messages, as_messages, as_text
from dpo_mini.real.formats import read_file, read_hub
from dpo_mini.real.forms import LIKED, Fields, check_text, check_texts

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
        check_texts(self.prompt, self.chosen, self.rejected)
        _check_said(self.prompt, self.messages)


@dataclass(frozen=True)
class Rating:
    """One answer to a prompt, and whether somebody liked it: a thumb up or down.

    Args:
      prompt, completion: text; the completion, which is the answer, is not empty.
      label: True where the answer was liked.
      messages: as in `Preference`.
    """

    prompt: str
    completion: str
    label: bool
    messages: Messages = ()

    def __post_init__(self) -> None:  # noqa: D105
        check_text("prompt", self.prompt)
        check_text("completion", self.completion)
        if not isinstance(self.label, bool):
            raise TypeError(f"`label` must be True or False, got {self.label!r}")
        _check_said(self.prompt, self.messages)


PairOrRating = TypeVar("PairOrRating", bound=Preference | Rating)


def load_preferences(
    path: AnyPath,
    *,
    columns: Columns | None = None,
    labels: Sequence[object] | None = None,
    turn_markers: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    first_answers: bool = False,
    left_out: list[str] | None = None,
) -> list[Preference]:
    r"""Read pairs from a file: JSON (a list of objects), JSONL (one per line), CSV or Parquet.

    A file has one of these forms, the same in every row. The first four are those of `trl`.

    - text beside a prompt: `prompt`, `chosen` and `rejected` are text;
    - text that begins with the prompt: there is no prompt column, and the prompt is the beginning
      that `chosen` and `rejected` share. Unlike `trl.extract_prompt` it ends before a word that the
      answers begin alike, and leaves each answer at least a word. It also takes the first words
      that two answers have in common, so a prompt column is better;
    - messages beside a prompt: `prompt` is a list of `{"role", "content"}` messages, or of
      ShareGPT's `{"from", "value"}`, and an answer is one message, the assistant's, or text;
    - messages that begin with the prompt: in `chosen` and `rejected` the last message is the
      assistant's answer, and those before it are the same. A prompt column of text that repeats
      them is taken too; `trl` wants it removed (`maybe_extract_prompt`);
    - text with marked turns, as in Anthropic's HH: there is no prompt column, and the prompt ends
      with the assistant's last marker. It is the same in both texts.

    Stricter than `trl`: answers to different prompts, or with a person's turn inside, are refused,
    as are images, tools, reasoning apart from the content, other roles, and columns that nobody
    reads but that hold words of the prompt (`question`, `input`, `system`) or may say which answer
    won (`label`, `winner`). Where the prompt is the beginning that two texts share, every other
    column of words is refused.

    Args:
      path: the file. A name that ends in `.csv` or `.parquet` says which form it has; any other
        file is Parquet where it begins with the bytes `PAR1`, a JSON list where its first letter is
        `[`, and JSONL otherwise. Text is UTF-8. CSV has commas, double quotes and a header, and
        holds text alone: `7` and `NA` are text, where `datasets` reads a number and a null.
      columns: which of the file's columns hold `prompt`, `chosen` and `rejected`, where they have
        other names: `{"prompt": ("instruction", "input")}`. Several columns are joined by line
        breaks, empty ones dropped. A dotted name leads into a column: `"answers.0.text"`.
        `{"prompt": ()}` takes the prompt from the answers even where there is a prompt column.
        `id`, where there is such a column, may not repeat a value; `{"id": "number"}` says that
        another column may not, `{"id": ()}` that every one may. `system` is the system's message,
        `history` a list of earlier `[question, answer]` pairs, and `label` says which answer won.
        `ignored` are columns that may be left unread.
      labels: two values of the label column, where `chosen` won and where `rejected` did, such as
        `(1, 0)` or `("model_a", "model_b")`; the second exchanges the answers. 1, true and the text
        `1` are the same. A row with another value, such as a tie, is bad.
      turn_markers: what stands in a text before a person's turn and before the assistant's.
        `("\n\nHuman:", "\n\nAssistant:")` is recognised.
      roles: from the file's names for who speaks to `"system"`, `"user"` or `"assistant"`.
        `human`, `prompter`, `gpt`, `bot` and `model` are known.
      first_answers: of answers that go on for several turns, take the first in which they differ.
        By default they are refused.
      left_out: a list. It gets a sentence, with line and reason, on each row that cannot be used,
        and the other rows are read; None refuses the file. A column that nobody reads, and damage
        after which the next row is not found, such as an open quote in CSV, are always refused.
    Returns:
      The pairs, in the file's order.
    Raises:
      OSError: the file cannot be read.
      ValueError: invalid UTF-8, JSON, CSV or Parquet, a line of more than `LONGEST_LINE` bytes, a
        key or column twice, a missing column, a value that is not text, an empty answer, answers to
        different prompts, two forms in one file, an id twice, no pairs, an unknown name or a column
        twice in `columns`, a column that should be read, or an argument of another form. The
        message has the file, the line (of Parquet the row), counted from 1, and the column.
    """
    reading = how_to_read(columns, labels, turn_markers, roles, first_answers)
    return [Preference(*fields) for fields in read_file(Path(path), reading, left_out)]


def load_hub_preferences(
    name: str,
    *,
    split: str,
    columns: Columns | None = None,
    labels: Sequence[object] | None = None,
    turn_markers: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    first_answers: bool = False,
    left_out: list[str] | None = None,
) -> list[Preference]:
    """Read pairs from a data set of the Hugging Face hub: downloads it, or takes it from the cache.

    Args:
      name: the data set, or a folder on this machine in a form that `datasets` knows.
      split: such as `"train"` or `"train[:1000]"`.
      columns, labels, turn_markers, roles, first_answers, left_out: as in `load_preferences`; rows
        are checked and refused alike.
    Returns:
      The pairs, in the data set's order.
    Raises:
      ValueError: as `load_preferences`, with the row in the place of the line.
    """
    reading = how_to_read(columns, labels, turn_markers, roles, first_answers)
    return [Preference(*fields) for fields in read_hub(name, split, reading, left_out)]


def load_ratings(
    path: AnyPath,
    *,
    columns: Columns | None = None,
    labels: Sequence[object] | None = None,
    turn_markers: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    left_out: list[str] | None = None,
) -> list[Rating]:
    r"""Read answers with a thumb from a file: JSON (a list of objects), JSONL, CSV or Parquet.

    This is `trl`'s unpaired preference format: columns `prompt`, `completion` and `label`, in one
    of these forms, the same in every row.

    - text beside a prompt: `prompt` and `completion` are text;
    - messages beside a prompt: `prompt` is a list of messages, and `completion` one message, the
      assistant's, or text;
    - messages that begin with the prompt: there is no prompt column, and the last message of
      `completion` is the answer;
    - text with marked turns: there is no prompt column, and the completion ends with an answer
      after the assistant's marker.

    `label` is true or false, 1 or 0, or such text, as CSV has it. All else is as strict as
    `load_preferences`. A file of pairs is refused.

    Args:
      path, turn_markers, roles, left_out: as in `load_preferences`.
      columns: as in `load_preferences`, for `prompt`, `completion`, `label`, `id`, `system`,
        `history` and `ignored`.
      labels: two values of the label column, where an answer was liked and where it was not, such
        as `("up", "down")`. By default `(1, 0)`; 1, true and the text `1` are the same. A row with
        another value is bad.
    Returns:
      The ratings, in the file's order.
    Raises:
      OSError, ValueError: as `load_preferences`.
    """
    reading = how_to_read(columns, labels, turn_markers, roles, needed=RATING)
    return [_as_rating(fields) for fields in read_file(Path(path), reading, left_out)]


def load_hub_ratings(
    name: str,
    *,
    split: str,
    columns: Columns | None = None,
    labels: Sequence[object] | None = None,
    turn_markers: Sequence[str] | None = None,
    roles: Mapping[str, str] | None = None,
    left_out: list[str] | None = None,
) -> list[Rating]:
    """Read ratings from a data set of the hub: downloads it, or takes it from the cache.

    Args:
      name, split: as in `load_hub_preferences`.
      columns, labels, turn_markers, roles, left_out: as in `load_ratings`; rows are checked and
        refused alike.
    Returns:
      The ratings, in the data set's order.
    Raises:
      ValueError: as `load_ratings`, with the row in the place of the line.
    """
    reading = how_to_read(columns, labels, turn_markers, roles, needed=RATING)
    return [_as_rating(fields) for fields in read_hub(name, split, reading, left_out)]


def split_preferences(
    preferences: Iterable[PairOrRating], *, held_out: float, generator: torch.Generator
) -> tuple[list[PairOrRating], list[PairOrRating]]:
    """Pairs to train on and pairs held out, with all pairs of one prompt on the same side.

    Prompts are taken in a random order, each if its pairs still fit. So the number held out is that
    asked for if a prompt with one pair is left, and else as near as one more prompt can make it.

    Args:
      preferences: the pairs, or the ratings. A prompt is the same where its messages are; plain
        text is one message of the user.
      held_out: how many pairs, a whole number >= 1, or which share of them, between 0 and 1.
      generator: draws the order.
    Returns:
      The pairs to train on; those held out. Both have at least one, in the order that they had.
    Raises:
      ValueError: less than two different prompts, or a number that leaves no pair to train on.
    """
    preferences = list(preferences)
    check_preferences(preferences)
    check_generator(generator)
    wanted = _count_held_out(held_out, len(preferences))
    rows: dict[Messages, list[int]] = {}
    for row, pair in enumerate(preferences):
        rows.setdefault(pair.messages or (("user", pair.prompt),), []).append(row)
    if len(rows) < 2:
        raise ValueError("`preferences` must have at least two different prompts, got one")
    groups = list(rows.values())
    order = torch.randperm(len(groups), generator=generator, device=generator.device).tolist()
    taken: set[int] = set()
    left: list[list[int]] = []
    for n in order:
        if len(taken) + len(groups[n]) <= wanted:
            taken.update(groups[n])
        else:
            left.append(groups[n])
    smallest = min(left, key=len)
    missing = wanted - len(taken)
    if len(left) > 1 and (not taken or len(smallest) - missing < missing):
        taken.update(smallest)
    sides: tuple[list[PairOrRating], list[PairOrRating]] = ([], [])
    for row, pair in enumerate(preferences):
        sides[row in taken].append(pair)
    return sides


def save_preferences(path: AnyPath, preferences: Iterable[Preference] | Iterable[Rating]) -> None:
    """Write pairs or ratings as JSONL, whole or not at all: one that fails leaves an old file.

    Those with messages are written as messages beside a prompt of messages, others as text.

    Args:
      path: the file, whose folder is there.
      preferences: pairs, or ratings, with messages all of them or none.
    Raises:
      OSError: the file cannot be written.
      ValueError: no pairs, something that is not a `Preference`, or pairs with messages among pairs
        without.
    """
    preferences = [*preferences]
    check_preferences(preferences)
    for row, pair in enumerate(preferences):
        if bool(pair.messages) != bool(preferences[0].messages):
            got, first = ("messages", "text") if pair.messages else ("text", "messages")
            raise ValueError(
                f"`preferences` must all have {first} like row 0, got {got} in row {row}"
            )
    lines = [json.dumps(_as_entry(pair), ensure_ascii=False) + "\n" for pair in preferences]
    write_whole(path, "".join(lines).encode())


def check_preferences(preferences: Sequence[Preference | Rating]) -> None:
    """Refuse none, anything that is not a `Preference` or a `Rating`, and both together."""
    if not len(preferences):
        raise ValueError("`preferences` must have at least one pair, got none")
    wanted = Rating if isinstance(preferences[0], Rating) else Preference
    for row, pair in enumerate(preferences):
        if not isinstance(pair, wanted):
            kind = type(pair).__name__
            want = f"{wanted.__name__}{' like row 0' if wanted is Rating else ''}"
            raise TypeError(f"`preferences` must be of type {want}, got {kind} in row {row}")


def answers_of(pair: Preference | Rating) -> list[tuple[str, str]]:
    """The one or two answers, each after its name."""
    if isinstance(pair, Rating):
        return [("completion", pair.completion)]
    return [("chosen", pair.chosen), ("rejected", pair.rejected)]


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


def _check_said(prompt: str, messages: Messages) -> None:
    check_messages("messages", messages)
    if messages and prompt != as_text(messages):
        want, got = cut(as_text(messages)), cut(prompt)
        raise ValueError(f"`prompt` must be the text of the messages, {want!r}, got {got!r}")


def _as_rating(fields: Fields) -> Rating:
    prompt, completion, label, messages = fields
    return Rating(prompt, completion, label == LIKED, messages)


def _count_held_out(held_out: float, n_pairs: int) -> int:
    if isinstance(held_out, float):
        if not 0 < held_out < 1:
            what = "a share in (0, 1) or a whole number of pairs"
            raise ValueError(f"`held_out` must be {what}, got {held_out}")
        return min(max(round(held_out * n_pairs), 1), n_pairs - 1)
    check_count("held_out", held_out)
    if held_out >= n_pairs:
        raise ValueError(
            f"`held_out` must be less than {n_pairs}, the number of pairs, got {held_out}"
        )
    return held_out


def _as_entry(pair: Preference | Rating) -> dict[str, object]:
    """A pair or rating as an object of a file, in one of the forms that are read."""
    answers = dict(answers_of(pair))
    label = {"label": pair.label} if isinstance(pair, Rating) else {}
    if not pair.messages:
        return {"prompt": pair.prompt, **answers, **label}
    told = {name: as_messages([("assistant", text)]) for name, text in answers.items()}
    return {"prompt": as_messages(pair.messages), **told, **label}

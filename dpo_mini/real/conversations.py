"""What was said before an answer: messages, texts with marked turns, texts that begin alike."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from dpo_mini.real.columns import A_ROLE, BadColumn, cut, kind_of

Messages = tuple[tuple[str, str], ...]
"""A conversation: `(role, content)` pairs, oldest first."""

HH_MARKERS = ("\n\nHuman:", "\n\nAssistant:")
"""What stands before a turn in Anthropic's HH, the data set of the DPO paper."""

# Keys of a message that change the tokens that `trl` makes, and that nothing here would read.
_MORE_THAN_TEXT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
# A word as a reader sees it: no blank and no ASCII punctuation but inside, as in don't and 3.14.
_WORD = re.compile(r"[^\s!-/:-@\[-^`{-~]+(?:['.,-][^\s!-/:-@\[-^`{-~]+)*")
_ENDS_OF_A_MARKER = (":", "：", ">", "]")


# --- messages --------------------------------------------------------------------------------


def read_messages(name: str, value: object, roles: Mapping[str, str]) -> Messages:
    """The messages of a column, whose texts are as the file has them.

    Args:
      name: of the column, for messages of errors.
      value: a list of messages, or one of them; each has `role` and `content`, or ShareGPT's `from`
        and `value`.
      roles: from the file's names for who speaks to ours.
    """
    if not isinstance(value, list) and isinstance(value, Mapping) and _keys_of(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadColumn(name, f"must be text or a list of messages, got {kind_of(value)}")
    return tuple([_read_message(name, message, n, roles) for n, message in enumerate(value, 1)])


def plain_messages(value: object, roles: Mapping[str, str]) -> Messages:
    """Messages of role and content alone, or none where `read_messages` has to look."""
    messages = []
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or len(message) != 2:
            return ()
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in roles or not isinstance(content, str):
            return ()
        messages.append((roles[role], content))
    return tuple(messages)


def _read_message(name: str, message: object, n: int, roles: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(message, (dict, Mapping)) or not (keys := _keys_of(message)):
        got = f"{kind_of(message)} as message {n}"
        raise BadColumn(name, f'must have messages with "role" and "content", got {got}')
    role, content = message[keys[0]], message[keys[1]]
    ours = roles.get(role) if isinstance(role, str) else None
    if ours is None:
        got = kind_of(role)
        if isinstance(role, str):
            got = f'{role!r} (roles={{{json.dumps(role)}: "user"}} says who that is)'
        raise BadColumn(name, f"must have {A_ROLE} as the role of message {n}, got {got}")
    for key in _MORE_THAN_TEXT if len(message) > 2 else ():
        if message.get(key):
            raise BadColumn(
                name, f"must have only role and content in message {n}, got {key!r} too"
            )
    return ours, content if isinstance(content, str) else _join_parts(name, content, n)


def _keys_of(message: Mapping[str, object]) -> tuple[str, str] | None:
    if "role" in message and "content" in message:
        return "role", "content"
    return ("from", "value") if "from" in message and "value" in message else None


def _join_parts(name: str, content: object, n: int) -> str:
    """The text of content in parts, `[{"type": "text", "text": ...}]`."""
    texts, got = [], kind_of(content)
    for part in content if isinstance(content, list) else ():
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else None
            got = f"a part of type {kind!r}" if isinstance(kind, str) else kind_of(part)
            break
        texts.append(text)
    else:
        if texts:
            return "".join(texts)
    raise BadColumn(
        name, f"must have text as the content of message {n} (no images or tools), got {got}"
    )


def as_text(messages: Sequence[tuple[str, str]]) -> str:
    """One message as it stands, several as lines of `role: content`."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n".join(f"{role}: {content}" for role, content in messages)


def as_messages(messages: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Pairs of role and content as the objects that files and chat templates have."""
    return [{"role": role, "content": content} for role, content in messages]


# --- two answers to one conversation ---------------------------------------------------------


def split_answers(
    chosen: Messages,
    rejected: Messages,
    first_answers: bool,
    *,
    assistant: str = "assistant",
    shown: Callable[[Messages], str] = as_text,
) -> tuple[Messages, str, str]:
    """What two conversations share, and the two answers.

    Args:
      chosen, rejected: pairs of who speaks and what.
      first_answers: whether to take the first turns that differ, or the last turns.
      assistant: who answers.
      shown: a conversation as a message of an error shows it.
    """
    if chosen[:-1] == rejected[:-1]:
        return chosen[:-1], chosen[-1][1], rejected[-1][1]
    turns = enumerate(zip(chosen, rejected, strict=False))
    n = next((n for n, (ours, theirs) in turns if ours != theirs), 0)
    several = chosen[n] != rejected[n] and chosen[n][0] == rejected[n][0] == assistant
    if first_answers and several:
        return chosen[:n], chosen[n][1], rejected[n][1]
    want, got = (cut(shown(turns[:-1])) for turns in (chosen, rejected))
    how = " (first_answers=True takes the first answers that differ)" if several else ""
    raise BadColumn("rejected", f"must answer the prompt of chosen, {want!r}, got {got!r}{how}")


def split_marked(
    chosen: str, rejected: str, markers: tuple[str, str], first_answers: bool
) -> tuple[str, str, str]:
    """The prompt of two texts with marked turns, with the assistant's last marker, and the answers.

    Args:
      chosen, rejected: texts that begin with the prompt.
      markers: what stands before a person's turn, and before the assistant's.
      first_answers: as in `split_answers`.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
    before, answer, other = split_answers(
        _split_turns("chosen", chosen, pattern, markers),
        _split_turns("rejected", rejected, pattern, markers),
        first_answers,
        assistant=markers[1],
        shown=_joined,
    )
    return _joined(before) + markers[1], answer, other


def _split_turns(
    name: str, text: str, pattern: re.Pattern[str], markers: tuple[str, str]
) -> Messages:
    """Markers and what stands after each, until the next; the first marker is empty."""
    who = ["", *pattern.findall(text)]
    if who[-1] != markers[1]:
        got = f"one of the person, marked {markers[0]!r}" if who[-1] else "none that is marked"
        raise BadColumn(name, f"must end with a turn marked {markers[1]!r}, got {got}")
    return tuple(zip(who, pattern.split(text), strict=True))


def _joined(turns: Messages) -> str:
    return "".join(who + words for who, words in turns)


def shared_letters(ours: str, theirs: str) -> int:
    """How many letters two texts begin with alike."""
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def end_of_prompt(chosen: str, rejected: str, at: int) -> int:
    """How many letters of two texts that share so many are their prompt.

    A word that goes on after them is not in it. The space before an answer is the answer's. A text
    that is the beginning of the other keeps its last word.
    """
    ends = [len(text.rstrip()) for text in (chosen, rejected)]
    if chosen.rstrip() == rejected.rstrip():
        raise BadColumn(
            "rejected",
            "must differ from chosen where no prompt column says where the answers begin, got the "
            "same text",
        )
    if at >= min(ends):
        at = min(ends)
        if chosen[:at].endswith(_ENDS_OF_A_MARKER):
            shorter = "chosen" if ends[0] < ends[1] else "rejected"
            raise BadColumn(shorter, f"must have some text after {chosen[:at][-20:]!r}, got none")
        at = _start_of_run(chosen, at)
    for text in (chosen, rejected):
        for word in _WORD.finditer(text, _start_of_run(text, at)):
            if word.end() > at:
                at = min(at, word.start())
                break
    return at - chosen[:at].endswith(" ")


def _start_of_run(text: str, at: int) -> int:
    """Where the letters without a blank begin that end at a place."""
    before = text[:at].rsplit(maxsplit=1)
    return at - len(before[-1]) if before and not text[at - 1].isspace() else at

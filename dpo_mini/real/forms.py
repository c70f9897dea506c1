"""The forms of a pair, or of a rating: prompt, answers and messages in the columns of a row."""

from dpo_mini.real.columns import (
    IMAGES,
    PAIR,
    RATING,
    TOOLS,
    BadColumn,
    Entry,
    Mapped,
    Reading,
    UnreadColumn,
    check_absent,
    check_words_read,
    columns_there,
    cut,
    has_first_label,
    kind_of,
    read_column,
)
from dpo_mini.real.conversations import (
    HH_MARKERS,
    Messages,
    as_text,
    end_of_prompt,
    plain_messages,
    read_messages,
    shared_letters,
    split_answers,
    split_marked,
)

Fields = tuple[str, str, str, Messages]
"""Prompt, chosen, rejected and messages: what a `Preference` is made of.

Of a `Rating` the third is its label, `LIKED` or another text.
"""
LIKED = "liked"


def read_pair(entry: Entry, columns: Mapped, reading: Reading) -> tuple[Fields, str]:
    """The fields of a pair, and in words the form that it had."""
    if len(entry) == 3 and reading.plain and columns is reading.columns:
        plain = _read_plain(entry, reading)
        if plain is not None:
            return plain
    chosen = _read_answer("chosen", entry, columns, reading)
    rejected = _read_answer("rejected", entry, columns, reading)
    check_absent(entry, IMAGES)
    prompt = None
    if columns["prompt"] or (columns["prompt"] is None and "prompt" in entry):
        theirs = columns["prompt"] or ("prompt",)
        prompt = _read_text_or_messages("prompt", entry, theirs, reading)
    if isinstance(prompt, tuple) or not (isinstance(chosen, str) and isinstance(rejected, str)):
        conversations = _as_conversations(chosen, rejected, reading)
        fields, form = _read_conversations(entry, reading, prompt, *conversations)
    elif prompt is None:
        fields, form = _read_transcripts(entry, reading, chosen, rejected)
    else:
        fields, form = _read_texts(entry, reading, prompt, chosen, rejected)
    check_texts(*fields[:3])
    return fields, form


def check_texts(prompt: object, chosen: object, rejected: object) -> None:
    """Refuse what is not text, and an answer without any."""
    check_text("prompt", prompt)
    check_text("chosen", chosen)
    check_text("rejected", rejected)


def read_rating(entry: Entry, reading: Reading) -> tuple[Fields, str]:
    """The fields of a rating, read as a pair of twice its answer, and in words its form."""
    answer = reading.columns["completion"] or ("completion",)
    label = LIKED if has_first_label(entry, reading) else "not liked"
    try:
        pair = {**reading.columns, "chosen": answer, "rejected": answer}
        (text, completion, _, messages), form = read_pair(entry, pair, reading)
    except BadColumn as error:
        if error.name in PAIR:
            raise BadColumn("completion", error.reason, error.columns) from None
        raise
    return (text, completion, label, messages), form


def check_text(name: str, text: object) -> None:
    """Refuse what is not text, and an answer without any."""
    if not isinstance(text, str):
        raise BadColumn(name, f"must be text, got {kind_of(text)}")
    if name != "prompt" and not text.strip():
        raise BadColumn(name, "must have some text, got an empty answer")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadColumn(name, "must be text, got half of a surrogate pair") from error


# --- the forms -------------------------------------------------------------------------------


def _read_plain(entry: Entry, reading: Reading) -> tuple[Fields, str] | None:
    """A pair of three columns, all text or all messages, which is how most files are.

    None where it is another or may be at fault: what is not here is found below.
    """
    prompt, chosen, rejected = entry.get("prompt"), entry.get("chosen"), entry.get("rejected")
    messages: Messages = ()
    form = "text beside a prompt"
    if isinstance(prompt, list):
        messages = plain_messages(prompt, reading.roles)
        ours = plain_messages(chosen, reading.roles)
        theirs = plain_messages(rejected, reading.roles)
        if not messages or len(ours) != 1 or len(theirs) != 1:
            return None
        (speaker, chosen), (other, rejected) = ours[0], theirs[0]
        if speaker != "assistant" or other != "assistant":
            return None
        prompt, form = as_text(messages), "messages beside a prompt"
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return None
    if not messages and HH_MARKERS[1] in prompt:
        return None
    check_texts(prompt, chosen, rejected)
    return (prompt, chosen, rejected, messages), form


def _read_texts(
    entry: Entry, reading: Reading, prompt: str, chosen: str, rejected: str
) -> tuple[Fields, str]:
    markers = reading.turn_markers or (HH_MARKERS if HH_MARKERS[1] in prompt else None)
    for name, answer in (("chosen", chosen), ("rejected", rejected)) if markers else ():
        if markers and markers[0] in answer:
            got = f"a person's, marked {markers[0]!r}"
            raise BadColumn(name, f"must be one turn, the assistant's, got {got}")
    messages: Messages = ()
    if reading.columns["system"] or reading.columns["history"]:
        messages = (*_read_said_before(entry, reading), ("user", prompt))
        prompt = as_text(messages)
    check_words_read(entry, reading, prompt, "column")
    return (prompt, chosen, rejected, messages), "text beside a prompt"


def _read_transcripts(
    entry: Entry, reading: Reading, chosen: str, rejected: str
) -> tuple[Fields, str]:
    """Texts that begin with the prompt."""
    check_text("chosen", chosen)
    check_text("rejected", rejected)
    _check_no_place_for(("system", "history"), reading, "texts that begin with their prompt")
    markers = reading.turn_markers
    if not markers and any(marker in text for marker in HH_MARKERS for text in (chosen, rejected)):
        markers = HH_MARKERS
    if markers:
        fields = split_marked(chosen, rejected, markers, reading.first_answers)
        check_words_read(entry, reading, fields[0], "turns")
        return (*fields, ()), "text with marked turns"
    if reading.needed == RATING:
        raise BadColumn("prompt", f"must be one of the columns, {columns_there(entry)}")
    n_shared = shared_letters(chosen, rejected)
    check_words_read(entry, reading, chosen[:n_shared], "beginning")
    at = end_of_prompt(chosen, rejected, n_shared)
    prompt = chosen[:at]
    if not prompt.strip():
        reason = "must be how both answers begin or one of the columns"
        raise BadColumn("prompt", f"{reason}, {columns_there(entry)}")
    return (prompt, chosen[at:], rejected[at:], ()), "text that begins with the prompt"


def _read_conversations(
    entry: Entry,
    reading: Reading,
    prompt: str | Messages | None,
    chosen: Messages,
    rejected: Messages,
) -> tuple[Fields, str]:
    check_absent(entry, TOOLS)
    _check_no_place_for(("history",), reading, "messages")
    before, answer, other = split_answers(chosen, rejected, reading.first_answers)
    form, found_in = "messages that begin with the prompt", "messages"
    if prompt is None and not before:
        check_words_read(entry, reading, "", "beginning")
        reason = "must be the answers' earlier messages or one of the columns"
        raise BadColumn("prompt", f"{reason}, {columns_there(entry)}")
    if isinstance(prompt, tuple):
        _check_before_answers(before, prompt, reading)
        before, form, found_in = (*prompt, *before), "messages beside a prompt", "column"
    elif prompt is not None:
        if not before:
            raise BadColumn("prompt", "must be messages like the answers, got text")
        if prompt != as_text(before):
            raise BadColumn(
                "prompt",
                f"must be the answers' earlier messages, {cut(as_text(before))!r}, got "
                f'{cut(prompt)!r} (columns={{"prompt": ()}} takes the messages)',
            )
        form = "messages that repeat the prompt"
    if said := _read_said_before(entry, reading):
        if before[0][0] == "system":
            got = repr(cut(said[0][1]))
            raise BadColumn("system", f"must be empty beside a system message, got {got}")
        before = (*said, *before)
    text = as_text(before)
    check_words_read(entry, reading, text, found_in)
    return (text, answer, other, before), form


def _check_before_answers(before: Messages, prompt: Messages, reading: Reading) -> None:
    """Refuse answers of several messages beside a prompt, or those that begin with it again."""
    again = before[: len(prompt)] == prompt
    if before and (again or not reading.first_answers):
        how = ""
        if again:
            how = ' (columns={"prompt": ()} takes the prompt from the answers)'
        elif reading.needed == PAIR:
            how = " (first_answers=True takes those that differ)"
        raise BadColumn(
            "chosen",
            "must be one message, the answer, beside a prompt of messages, got "
            f"{len(before) + 1}{how}",
        )


# --- the values ------------------------------------------------------------------------------


def _read_text_or_messages(
    name: str, entry: Entry, columns: tuple[str, ...], reading: Reading
) -> str | Messages:
    value = read_column(name, entry, columns)
    return value if isinstance(value, str) else read_messages(name, value, reading.roles)


def _read_answer(name: str, entry: Entry, columns: Mapped, reading: Reading) -> str | Messages:
    """Text, or messages of which the last is the assistant's."""
    value = _read_text_or_messages(name, entry, columns[name] or (name,), reading)
    if not isinstance(value, str) and value[-1][0] != "assistant":
        got = repr(value[-1][0])
        raise BadColumn(name, f"must end with a message of 'assistant', got one of {got}")
    return value


def _as_conversations(
    chosen: str | Messages, rejected: str | Messages, reading: Reading
) -> tuple[Messages, Messages]:
    """Answers as messages; text is the last message of a conversation like the other one."""
    if isinstance(chosen, str) != isinstance(rejected, str) and not reading.columns["rejected"]:
        got, first = ("text", "messages") if isinstance(rejected, str) else ("messages", "text")
        raise BadColumn("rejected", f"must be {first} like chosen, got {got}")
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        return chosen, rejected
    told = [answer for answer in (chosen, rejected) if not isinstance(answer, str)]
    before = told[0][:-1] if told else ()
    ours, theirs = (
        (*before, ("assistant", answer)) if isinstance(answer, str) else answer
        for answer in (chosen, rejected)
    )
    return ours, theirs


def _read_said_before(entry: Entry, reading: Reading) -> Messages:
    """The system's message and earlier turns, of the columns `system` and `history`."""
    messages: list[tuple[str, str]] = []
    if reading.columns["system"]:
        text = read_column("system", entry, reading.columns["system"])
        if not isinstance(text, str | None):
            raise BadColumn("system", f"must be text, got {kind_of(text)}")
        if text and text.strip():
            messages.append(("system", text))
    if reading.columns["history"]:
        turns = read_column("history", entry, reading.columns["history"])
        if not isinstance(turns, list | None):
            raise BadColumn(
                "history", f"must be a list of questions and answers, got {kind_of(turns)}"
            )
        for turn in turns or ():
            if not (
                isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
            ):
                raise BadColumn(
                    "history", f"must have a question and its answer each time, got {kind_of(turn)}"
                )
            messages += zip(("user", "assistant"), turn, strict=True)
    return tuple(messages)


def _check_no_place_for(names: tuple[str, ...], reading: Reading, got: str) -> None:
    for name in names:
        if reading.columns[name]:
            beside = "a prompt of text" if name == "history" else "a prompt column or messages"
            raise UnreadColumn(name, f"must stand beside {beside}, got {got}")

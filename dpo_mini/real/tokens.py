"""Pairs and ratings as tokens: tokenizers, the prompt's boundary, the end token."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import numpy
import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_mini._arguments import check_count
from dpo_mini.logps import PAD
from dpo_mini.real.conversations import Messages, as_messages, as_text
from dpo_mini.real.preferences import (
    Preference,
    Rating,
    answers_of,
    check_messages,
    check_preferences,
)
from dpo_mini.train import Pairs

END = "<|endoftext|>"
"""The end token of a tokenizer that `train_tokenizer` made."""

TEMPLATE = "{prompt}\n"
"""What the model reads before it answers: here the prompt and a line break."""

CHAT = "chat_template"
"""In place of a template: the chat template of the tokenizer."""


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts: every text can be written with it.

    Args:
      texts: what to learn merges from.
      vocab_size: the most tokens: 256 bytes, the end token, and merges.
    Returns:
      A tokenizer whose `eos_token` is `END`.
    Raises:
      ValueError: no texts, or `vocab_size < 257`.
    """
    check_count("vocab_size", vocab_size, least=257)
    texts = _check_texts(texts)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False
    )


def encode(
    preferences: Sequence[Preference] | Sequence[Rating],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    template: str | None = None,
    boundary: str = "prompt",
    chat_arguments: Mapping[str, object] | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Pairs:
    """Pairs as tensors of tokens, which is what `fit_sft` and `fit_preferences` take; or ratings.

    With a template of text, prompt and answer are tokenised in one piece, as `trl` does it for the
    template `"{prompt}"`, and the answer is what follows the prompt's tokens. Where the last
    letters of the prompt and the first of the answer would become one token, another one for each
    answer, they are tokenised apart; `trl` leaves these letters out of the prompt. Neither way is a
    space put before the answer by a tokenizer that puts one before every text. Every answer ends in
    exactly one end token, `tokenizer.eos_token`, whether its text had one or not. What the
    tokenizer itself puts before a text, such as a begin token, comes first, and once. Special
    tokens that a text spells are read as such, so that it may have been rendered before; the end
    token alone is refused inside an answer.

    With `CHAT`, the tokenizer's chat template writes the conversation, which is tokenised in one
    piece; the prompt is what it writes before an answer, the answer all that follows. A prompt
    without messages is one message of the user. The tokens are those of `trl` for the same
    messages. No end token is added: the template ends the answer, and where it goes on after the
    tokenizer's end token, as with a line break, the policy takes `end_token=None`. Special tokens
    are the template's to write: one that a text spells is refused. Added tokens that are not
    special, such as `<think>` often is, are text like any other.

    Args:
      preferences: n pairs, or n ratings: an answer has the same tokens in both.
      tokenizer: any with an end token.
      max_tokens: the most tokens that prompt, answer and end token may have together. Nothing is
        ever cut: leave out what is too long by `count_tokens`, or raise this up to the model's
        context.
      template: what the model reads before it answers, with `{prompt}` once in it, or `CHAT`.
        Several messages are lines of `role: content` in the place of `{prompt}`. By default what
        `default_template` says.
      boundary: where an answer begins. `"prompt"`: where the prompt ends; a chat template that
        writes the prompt otherwise before an answer is refused. `"common_prefix"`, as in `trl`:
        where the tokens of the prompt first differ from those of prompt and answer, for one of the
        two answers. The rest of the prompt is left out, as a thought that the template opens in the
        prompt alone: the model then answers after another prompt than it was trained on. What the
        template writes there before both answers is scored in both, and cancels in a margin.
      chat_arguments: variables of the chat template, such as `{"enable_thinking": False}`.
      progress: wraps the range of pairs, as in `train.fit_sft`.
    Returns:
      `(prompts [n, P], chosen [n, T], rejected [n, T])` int64, padded on the right with `PAD`; of
      ratings `(prompts [n, P], completions [n, T], labels [n])`, the labels bool.
    Raises:
      ValueError: no pairs, an answer that does not fit, an end token inside an answer, a template
        without a prompt, a tokenizer without an end token, a prompt without a token, pairs with
        messages among pairs without where no template is given; with `CHAT`, a special token in a
        text, a tokenizer without a chat template, one that fails, one that leaves out letters of
        an answer, one that writes the prompt otherwise before an answer, `chat_arguments` that it
        does not read. The message has the row, counted from 0.
    """
    check_count("max_tokens", max_tokens)
    rows = _encode_rows(preferences, tokenizer, template, boundary, chat_arguments, progress)
    long = [n for n, row in enumerate(rows) if _row_length(row) > max_tokens]
    if long:
        n_prompt, *n_answers = (len(part) for part in rows[long[0]])
        answers_are = f"answers of {n_answers[0]} and {n_answers[-1]}"
        if len(n_answers) == 1:
            answers_are = f"an answer of {n_answers[0]}"
        raise ValueError(
            f"`preferences` must have at most max_tokens = {max_tokens} tokens for prompt and "
            f"answer, got a prompt of {n_prompt} with {answers_are} in "
            f"row {long[0]}, the first of {len(long)} of {len(rows)} that are too long"
        )
    prompts, *answers = zip(*rows, strict=True)
    padded_prompts = _padded(prompts, max(map(len, prompts)))
    width = max(len(tokens) for tokens in chain(*answers))
    padded = [_padded(tokens, width) for tokens in answers]
    if len(answers) == 1:
        labels = [rating.label for rating in preferences if isinstance(rating, Rating)]
        return padded_prompts, padded[0], torch.tensor(labels)
    return padded_prompts, padded[0], padded[1]


def count_tokens(
    preferences: Sequence[Preference] | Sequence[Rating],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    boundary: str = "prompt",
    chat_arguments: Mapping[str, object] | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[int]:
    """How many tokens each pair needs: its prompt, the longer of its answers, the end token.

    Of ratings, the prompt, the answer and the end token.

    Args and errors are those of `encode`.
    """
    rows = _encode_rows(preferences, tokenizer, template, boundary, chat_arguments, progress)
    return [_row_length(row) for row in rows]


def default_template(
    preferences: Sequence[Preference | Rating], tokenizer: PreTrainedTokenizerBase
) -> str:
    """`CHAT` where the pairs have messages and the tokenizer has a chat template, else `TEMPLATE`.

    Args:
      preferences, tokenizer: as in `encode`.
    Returns:
      The template that `encode` and `count_tokens` take where none is given.
    Raises:
      ValueError: no pairs, or pairs with messages among pairs without.
    """
    check_preferences(preferences)
    kinds = ["messages" if pair.messages else "text" for pair in preferences]
    other = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"`preferences` must all have {kinds[0]} like row 0 where no template is given, got "
            f"{kinds[other]} in row {other} (template=CHAT reads a text as a message of the user)"
        )
    return CHAT if preferences[0].messages and tokenizer.chat_template else TEMPLATE


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    template: str | None,
    chat_arguments: Mapping[str, object] | None = None,
) -> tuple[list[int], set[int]]:
    """The tokens that `encode` gives the model before an answer, and those that end an answer."""
    if isinstance(prompt, str):
        pair = Preference(prompt, _ANSWER, _ANSWER)
    else:
        check_messages("prompt", prompt)
        pair = Preference(as_text(prompt), _ANSWER, _ANSWER, prompt)
    template = _check_template([pair], tokenizer, template, chat_arguments)
    ends = {end_token(tokenizer)}
    if template != CHAT:
        (tokens,) = _tokenise(tokenizer, [_fill(template, pair)])
        return _with_begin(tokens, _begin_tokens(tokenizer), template), ends
    _check_no_special("prompt", _prompt_parts(pair), tokenizer)
    render = partial(_render, tokenizer=tokenizer, chat_arguments=chat_arguments or {})
    asked = render(_messages(pair), "the prompt", prompt=True)
    answered = render((*_messages(pair), ("assistant", _ANSWER)), "an answer")
    tokens, after = _tokenise(tokenizer, [asked, answered.rpartition(_ANSWER)[2]])
    special = _special_tokens(tokenizer)
    return tokens, ends | set([token for token in after if token in special][:1])


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end token, or a ValueError where it has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` must have an end token (eos_token), got one without")
    return tokenizer.eos_token_id


# --- private functions -----------------------------------------------------------------------


_Row = tuple["array[int]", ...]
"""The tokens of prompt, chosen and rejected, or of prompt and completion.

Arrays take an eighth of the memory of lists.
"""

_ANSWER = "an answer"

_ROWS_AT_ONCE = 256
"""Rows whose texts the tokenizer gets in one call: a call for each text is slow."""

_BEFORE = "\n.:;,!?-|\t0a"
"""What an answer is tokenised after: the first of these that does not merge with it."""


def _as_row(*parts: list[int]) -> _Row:
    return tuple(array("i", tokens) for tokens in parts)


def _padded(rows: Sequence["array[int]"], width: int) -> Tensor:
    padded = numpy.full((len(rows), width), PAD, dtype=numpy.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(padded)


def _row_length(row: _Row) -> int:
    prompt, *answers = row
    return len(prompt) + max(map(len, answers))


def _encode_rows(
    preferences: Sequence[Preference | Rating],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    boundary: str,
    chat_arguments: Mapping[str, object] | None,
    progress: Callable[[range], Iterable[int]],
) -> list[_Row]:
    check_preferences(preferences)
    template = _check_template(preferences, tokenizer, template, chat_arguments)
    if boundary not in ("prompt", "common_prefix"):
        raise ValueError(f"`boundary` must be 'prompt' or 'common_prefix', got {boundary!r}")
    end_token(tokenizer)
    rows: list[_Row] = []
    for n in progress(range(len(preferences))):
        if n % _ROWS_AT_ONCE == 0:
            some = preferences[n : n + _ROWS_AT_ONCE]
            if template == CHAT:
                rows += _encode_chats(some, n, tokenizer, boundary, chat_arguments or {})
            else:
                rows += _encode_texts(some, n, tokenizer, boundary, template)
    return rows


def _check_template(
    preferences: Sequence[Preference | Rating],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    chat_arguments: Mapping[str, object] | None,
) -> str:
    """The template, by default that of these pairs, where it reads the arguments."""
    if template is None:
        template = default_template(preferences, tokenizer)
    if not isinstance(template, str) or (template != CHAT and template.count("{prompt}") != 1):
        raise ValueError(
            f"`template` must be text with {{prompt}} once in it, or CHAT, got {template!r}"
        )
    if template == CHAT and tokenizer.chat_template is None:
        raise ValueError("`tokenizer` must have a chat_template for template=CHAT, got one without")
    if chat_arguments is not None and not isinstance(chat_arguments, Mapping):
        kind = type(chat_arguments).__name__
        raise TypeError(f"`chat_arguments` must be a mapping from names to values, got {kind}")
    for name in chat_arguments or ():
        if template != CHAT:
            raise ValueError(
                f"`chat_arguments` must be None unless template=CHAT, got {name!r} for the "
                f"template {template!r}"
            )
        read = re.search(rf"\b{re.escape(name)}\b", tokenizer.get_chat_template())
        if not read or name in ("messages", "add_generation_prompt"):
            raise ValueError(
                "`chat_arguments` must be variables that the tokenizer's chat template reads, "
                f"beside messages and add_generation_prompt, got {name!r}"
            )
    return template


def _shared_length(tokens: list[int], others: list[int]) -> int:
    """How many tokens two lists have in common before they differ."""
    if others[: len(tokens)] == tokens:  # as it mostly is, and looked at fast
        return len(tokens)
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(tokens), len(others)))


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    read = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [tokens if isinstance(tokens, list) else list(tokens) for tokens in read.input_ids]


def _tokenise_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]
) -> Iterator[list[list[int]]]:
    """The tokens of the texts of each row."""
    tokens = iter(_tokenise(tokenizer, [text for row in rows for text in row]))
    return ([next(tokens) for _ in row] for row in rows)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that are not text, such as those around a message, by their numbers."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return dict(named) | {n: token.content for n, token in added if token.special}


# --- templates of text -----------------------------------------------------------------------


def _encode_texts(
    pairs: Sequence[Preference | Rating],
    first_row: int,
    tokenizer: PreTrainedTokenizerBase,
    boundary: str,
    template: str,
) -> list[_Row]:
    prompts = [_fill(template, pair) for pair in pairs]
    texts = [
        (p, *(p + answer for _, answer in answers_of(pair)))
        for p, pair in zip(prompts, pairs, strict=True)
    ]
    begin = _begin_tokens(tokenizer)
    end, unknown = end_token(tokenizer), tokenizer.unk_token_id  # found anew at each question
    rows = []
    for row, (prompt, *wholes) in enumerate(_tokenise_rows(tokenizer, texts), first_row):
        cut = len(prompt)
        if boundary == "common_prefix":
            cut = min(_shared_length(prompt, whole) for whole in wholes)
        answers = []
        for (name, answer), whole in zip(answers_of(pairs[row - first_row]), wholes, strict=True):
            # Unknown letters on both sides of the boundary may become one token.
            merges = whole[:cut] != prompt[:cut] or prompt[-1:] == [unknown]
            apart = merges and boundary == "prompt"
            tokens = _tokenise_apart(tokenizer, answer) if apart else whole[cut:]
            where = f"the {name} answer of row {row}"
            answers.append(_with_one_end(tokens, end, tokenizer, where))
        rows.append(_as_row(_with_begin(prompt[:cut], begin, template), *answers))
    return rows


def _fill(template: str, pair: Preference | Rating) -> str:
    return template.replace("{prompt}", pair.prompt)  # not format: there may be other braces


def _tokenise_apart(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """An answer that merges with its prompt, without a space that texts begin with."""
    for letter in _BEFORE:
        before, whole = _tokenise(tokenizer, [letter, letter + answer])
        n_shared = _shared_length(before, whole)
        known = before and tokenizer.unk_token_id not in before
        if known and n_shared == len(before) < len(whole):
            return whole[n_shared:]
    return _tokenise(tokenizer, [answer])[0]


def _with_one_end(
    tokens: list[int], end: int, tokenizer: PreTrainedTokenizerBase, where: str
) -> list[int]:
    while tokens and tokens[-1] == end:
        tokens = tokens[:-1]
    if not tokens or end in tokens:
        got = "an end token inside" if tokens else "nothing but end tokens in"
        raise ValueError(
            f"`preferences` must have {tokenizer.eos_token} at the end of an answer only, got "
            f"{got} {where}"
        )
    return [*tokens, end]


def _begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text."""
    special = _special_tokens(tokenizer)
    # Of its own tokens one is surely text that it reads; a letter may be unknown.
    for text in (tokenizer.decode([n]) for n in range(len(tokenizer)) if n not in special):
        (plain,) = _tokenise(tokenizer, [text])
        if plain and plain[0] not in special:
            read = tokenizer(text, truncation=False, verbose=False).input_ids
            return list(read[: read.index(plain[0])])
    return []


def _with_begin(tokens: list[int], begin: list[int], template: str) -> list[int]:
    if tokens[: len(begin)] != begin:
        tokens = [*begin, *tokens]
    if not tokens:
        raise ValueError(
            "`template` must have some text around {prompt}, got "
            f"{template!r}, which leaves an empty prompt without a token"
        )
    return tokens


# --- chat templates --------------------------------------------------------------------------


def _encode_chats(
    pairs: Sequence[Preference | Rating],
    first_row: int,
    tokenizer: PreTrainedTokenizerBase,
    boundary: str,
    chat_arguments: Mapping[str, object],
) -> list[_Row]:
    parts: list[tuple[str, str]] = []
    texts = []
    for row, pair in enumerate(pairs, first_row):
        parts += _prompt_parts(pair, f" of row {row}")
        rendered = [_render(_messages(pair), f"row {row}", tokenizer, chat_arguments, prompt=True)]
        for name, answer in answers_of(pair):
            where = f"the {name} answer of row {row}"
            parts.append((where, answer))
            talk = (*_messages(pair), ("assistant", answer))
            rendered.append(_render(talk, where, tokenizer, chat_arguments))
        texts.append(rendered)
    _check_no_special("preferences", parts, tokenizer)
    rows = []
    for at, (prompt, *wholes) in enumerate(_tokenise_rows(tokenizer, texts)):
        row = first_row + at
        cut = min(_shared_length(prompt, whole) for whole in wholes)
        for (name, answer), text, whole in zip(
            answers_of(pairs[at]), texts[at][1:], wholes, strict=True
        ):
            where = f"the {name} answer of row {row}"
            if boundary == "prompt":
                _check_same_prompt(prompt, whole, where, tokenizer)
            if len(whole) == cut or _letters(answer) not in _letters(text):
                raise ValueError(
                    "`tokenizer` must have a chat template that writes the answer after the "
                    f"prompt, got one that leaves out {where} or a part of it (change the "
                    "template or the answer)"
                )
        if not cut:
            raise ValueError(
                "`tokenizer` must have a chat template whose conversation has the first token of "
                f"its prompt, got another in row {row} (try other `chat_arguments`)"
            )
        rows.append(_as_row(prompt[:cut], *(whole[cut:] for whole in wholes)))
    return rows


def _check_same_prompt(
    prompt: list[int], whole: list[int], where: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a conversation, up to an answer, that does not begin with its prompt."""
    n_shared = _shared_length(prompt, whole)
    if n_shared < len(prompt):
        got, alone = (tokenizer.decode(tokens[n_shared:][:9]) for tokens in (whole, prompt))
        raise ValueError(
            "`tokenizer` must have a chat template whose prompt is the beginning of the "
            f"conversation, token by token, got one that goes on with {got!r} before {where} and "
            f"with {alone!r} in the prompt alone (try other `chat_arguments`, or "
            "boundary='common_prefix', which cuts the prompt there)"
        )


def _messages(pair: Preference | Rating) -> Messages:
    return pair.messages or (("user", pair.prompt),)


def _prompt_parts(pair: Preference | Rating, of_row: str = "") -> list[tuple[str, str]]:
    """The texts of a prompt, each after its place."""
    if not pair.messages:
        return [(f"the prompt{of_row}", pair.prompt)]
    numbered = enumerate(pair.messages, 1)
    return [(f"message {n} ({role}){of_row}", text) for n, (role, text) in numbered]


def _check_no_special(
    name: str, parts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a text, given after its place, that a special token is read in."""
    special = _special_tokens(tokenizer)
    # Some tokens are found between spaces alone, or eat them.
    read = _tokenise(tokenizer, [f" {text} " for _, text in parts])
    for (where, text), tokens in zip(parts, read, strict=True):
        for token in tokens:
            # An unknown letter has a special token too, and is text.
            if token in special and (token != tokenizer.unk_token_id or special[token] in text):
                raise ValueError(
                    f"`{name}` must have texts without the special token {special[token]}, which "
                    f"the chat template alone writes, got one inside {where} (write it otherwise, "
                    "or leave the pair out)"
                )


def _render(
    messages: Messages,
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_arguments: Mapping[str, object],
    *,
    prompt: bool = False,
) -> str:
    """A conversation as text, as a prompt with what the template writes before an answer."""
    try:
        text = tokenizer.apply_chat_template(
            as_messages(messages), add_generation_prompt=prompt, tokenize=False, **chat_arguments
        )
    except Exception as error:  # a template is a program of somebody else: it may raise anything
        raise ValueError(
            "`tokenizer` must have a chat template for conversations of "
            f"{', '.join(role for role, _ in messages)}, got one that fails on {where} with "
            f"{type(error).__name__} ({error})"
        ) from error
    if not text:
        raise ValueError(
            f"`tokenizer` must have a chat template that writes something, got nothing for {where}"
        )
    return str(text)


def _letters(text: str) -> str:
    return "".join(text.split())  # templates strip and add white space


def _check_texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("`texts` must be several texts, got one")
    texts = list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"`texts` must be text, got {type(text).__name__} in row {row}")
    if not any(texts):
        raise ValueError("`texts` must have at least one letter, got no text")
    return texts

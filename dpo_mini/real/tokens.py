"""Preference pairs as tokens: tokenizers, the prompt's boundary, the end token."""

from collections.abc import Callable, Iterable, Sequence

import tokenizers
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_mini._arguments import check_count
from dpo_mini.logps import PAD
from dpo_mini.real.conversations import Messages, as_messages
from dpo_mini.real.preferences import Preference, check_preferences
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
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    template: str = TEMPLATE,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Pairs:
    """Pairs as tensors of tokens, which is what `fit_sft` and `fit_preferences` take.

    With a template of text, prompt and answer are tokenised apart. Tokenised in one piece, as `trl`
    does it, the last letters of the prompt and the first of the answer may become one token,
    another one for each answer; `trl` then leaves these letters out of the prompt. Where nothing
    merges, the tokens are those of `trl` for the template `"{prompt}"`. Every answer ends in
    exactly one end token, `tokenizer.eos_token`, whether its text had one or not. A begin token
    comes first where the tokenizer itself puts one there.

    With `CHAT`, the tokenizer's chat template writes the conversation, which is tokenised in one
    piece; the prompt is what it writes before an answer, the answer all that follows. A prompt
    without messages is one message of the user. The tokens are those of `trl` for the same
    messages, but that a template whose prompt is not the beginning of the conversation is refused
    here, and cut there. No end token is added: the template ends the answer, and where it goes on
    after the tokenizer's end token, as with a line break, the policy takes `end_token=None`.

    Args:
      preferences: n pairs.
      tokenizer: any with an end token.
      max_tokens: the most tokens that prompt, answer and end token may have together. Nothing is
        ever cut: leave out what is too long by `count_tokens`, or raise this up to the model's
        context.
      template: what the model reads before it answers, with `{prompt}` once in it, or `CHAT`.
        Several messages are lines of `role: content` in the place of `{prompt}`.
      progress: wraps the range of pairs, as in `train.fit_sft`.
    Returns:
      `(prompts [n, P], chosen [n, T], rejected [n, T])` int64, padded on the right with `PAD`.
    Raises:
      ValueError: no pairs, an answer that does not fit, an end token inside an answer, a template
        without a prompt, a tokenizer without an end token; with `CHAT`, a tokenizer without a chat
        template, one that fails, and one that writes the prompt otherwise before an answer. The
        message has the row, counted from 0.
    """
    check_count("max_tokens", max_tokens)
    rows = _encode_rows(preferences, tokenizer, template, progress)
    long = [n for n, row in enumerate(rows) if _row_length(row) > max_tokens]
    if long:
        n_prompt, n_chosen, n_rejected = (len(part) for part in rows[long[0]])
        raise ValueError(
            f"`preferences` must have at most max_tokens = {max_tokens} tokens for prompt and "
            f"answer, got a prompt of {n_prompt} with answers of {n_chosen} and {n_rejected} in "
            f"row {long[0]}, the first of {len(long)} of {len(rows)} that are too long"
        )
    prompts, chosen, rejected = (
        [torch.tensor(part) for part in parts] for parts in zip(*rows, strict=True)
    )
    answers = pad_sequence([*chosen, *rejected], batch_first=True, padding_value=PAD)
    padded_prompts = pad_sequence(prompts, batch_first=True, padding_value=PAD)
    return padded_prompts, answers[: len(rows)], answers[len(rows) :]


def count_tokens(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = TEMPLATE,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[int]:
    """How many tokens each pair needs: its prompt, the longer of its answers, the end token.

    Args and errors are those of `encode`.
    """
    return [_row_length(row) for row in _encode_rows(preferences, tokenizer, template, progress)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str) -> list[int]:
    """The tokens of `template` around `prompt`, with the begin token that the tokenizer wants."""
    if template == CHAT:
        return _apply_chat_template(
            tokenizer, (("user", prompt),), "prompt", add_generation_prompt=True
        )
    # Not format: a template may hold other braces.
    tokens = _tokenise(tokenizer, template.replace("{prompt}", prompt))
    begin = tokenizer.bos_token_id
    if begin is not None and begin not in tokens[:1] and tokenizer("a").input_ids[0] == begin:
        tokens = [begin, *tokens]
    if not tokens:
        raise ValueError(
            "`template` must have some text around {prompt}, got "
            f"{template!r}, which leaves an empty prompt without a token"
        )
    return tokens


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end token, or a ValueError where it has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` must have an end token (eos_token), got one without")
    return tokenizer.eos_token_id


def check_template(template: str) -> None:
    """Refuse a template that is not `CHAT` and has not exactly one `{prompt}`."""
    if not isinstance(template, str) or (template != CHAT and template.count("{prompt}") != 1):
        raise ValueError(
            f"`template` must be text with {{prompt}} once in it, or CHAT, got {template!r}"
        )


# --- private functions -----------------------------------------------------------------------


_Row = tuple[list[int], list[int], list[int]]


def _row_length(row: _Row) -> int:
    prompt, chosen, rejected = row
    return len(prompt) + max(len(chosen), len(rejected))


def _encode_rows(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    progress: Callable[[range], Iterable[int]],
) -> list[_Row]:
    """Prompt, chosen and rejected of each pair as tokens."""
    check_preferences(preferences)
    check_template(template)
    end = end_token(tokenizer)

    def answer(row: int, name: str, text: str) -> list[int]:
        tokens = _tokenise(tokenizer, text)
        while tokens and tokens[-1] == end:
            tokens.pop()
        if not tokens or end in tokens:
            got = "an end token inside" if tokens else "nothing but end tokens in"
            raise ValueError(
                f"`preferences` must have {tokenizer.eos_token} at the end of an answer only, got "
                f"{got} the {name} answer of row {row}"
            )
        return [*tokens, end]

    numbers = range(len(preferences))
    if template == CHAT:
        return [_encode_chat(tokenizer, n, preferences[n]) for n in progress(numbers)]
    rows = []
    for n in progress(numbers):
        pair = preferences[n]
        prompt = encode_prompt(tokenizer, pair.prompt, template)
        chosen, rejected = answer(n, "chosen", pair.chosen), answer(n, "rejected", pair.rejected)
        rows.append((prompt, chosen, rejected))
    return rows


def _encode_chat(tokenizer: PreTrainedTokenizerBase, n: int, pair: Preference) -> _Row:
    messages = pair.messages or (("user", pair.prompt),)
    where = f"row {n}"
    prompt = _apply_chat_template(tokenizer, messages, where, add_generation_prompt=True)

    def answer(name: str, text: str) -> list[int]:
        if tokenizer.eos_token in text:
            raise ValueError(
                f"`preferences` must have answers without {tokenizer.eos_token}, which the chat "
                f"template writes, got one inside the {name} answer of {where}"
            )
        whole = _apply_chat_template(
            tokenizer, (*messages, ("assistant", text)), f"the {name} answer of {where}"
        )
        if whole[: len(prompt)] != prompt:
            same = next(i for i, token in enumerate(prompt) if [token] != whole[i : i + 1])
            got, alone = (tokenizer.decode(tokens[same:][:9]) for tokens in (whole, prompt))
            raise ValueError(
                "`tokenizer` must have a chat template whose prompt is the beginning of the "
                f"conversation, token by token, got one that goes on with {got!r} before the "
                f"{name} answer of {where} and with {alone!r} in the prompt alone"
            )
        if len(whole) == len(prompt):
            raise ValueError(
                "`tokenizer` must have a chat template that writes the answer after the prompt, "
                f"got one that leaves out the {name} answer of {where}"
            )
        return whole[len(prompt) :]

    return prompt, answer("chosen", pair.chosen), answer("rejected", pair.rejected)


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """The tokens of a conversation, as a prompt with what the template writes before an answer."""
    if tokenizer.chat_template is None:
        raise ValueError("`tokenizer` must have a chat_template for template=CHAT, got one without")
    try:
        tokens = tokenizer.apply_chat_template(
            as_messages(messages),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
        )["input_ids"]
    except Exception as error:  # a template is a program of somebody else: it may raise anything
        raise ValueError(
            "`tokenizer` must have a chat template for conversations of "
            f"{', '.join(role for role, _ in messages)}, got one that fails on {where} with "
            f"{type(error).__name__} ({error})"
        ) from error
    if not tokens:
        raise ValueError(
            f"`tokenizer` must have a chat template that writes something, got nothing for {where}"
        )
    return tokens


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


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

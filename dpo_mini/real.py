"""The same losses on a `transformers` language model and on preferences that somebody wrote.

Nothing of the method is here. A pair is read from a file, turned into tokens and scored by any
causal language model; then `train.fit_sft` and `train.fit_preferences` do what they do on the toys.

Files are read and never run: weights are safetensors, code that a model or data set brings along is
refused, and nothing is downloaded unless a function with that in its name is called
(`download_model`, `load_hub_preferences`).
"""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dpo_mini.arguments import check_count, check_generator, check_integers, check_rows
from dpo_mini.files import write_whole
from dpo_mini.logps import PAD, completion_mask, sum_over_tokens, token_logps
from dpo_mini.train import Pairs

with warnings.catch_warnings():
    # Of tqdm, in a Jupyter without ipywidgets; the bars that it would draw are switched off here.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging as transformers_logging

END = "<|endoftext|>"
"""The end token of a tokenizer that `train_tokenizer` made."""

TEMPLATE = "{prompt}\n"
"""What the model reads before it answers: here the prompt and a line break."""

AnyPath = str | os.PathLike[str]
Columns = Mapping[str, str | Sequence[str]]
_Turns = tuple[tuple[str, str], ...]


# --- preferences -----------------------------------------------------------------------------


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
    _check_preferences(preferences)
    lines = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in preferences]
    write_whole(path, "".join(lines).encode())


# --- tokens ----------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts: every text can be written with it.

    Args:
      texts: what to learn merges from.
      vocab_size: the most tokens: 256 bytes, the end token, and merges.
    Raises:
      ValueError: no texts, or `vocab_size < 257`.
    """
    check_count("vocab_size", vocab_size, least=257)
    texts = _check_texts("texts", texts)
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
) -> Pairs:
    """Pairs as tensors of tokens, which is what `fit_sft` and `fit_preferences` take.

    Prompt and answer are tokenised apart. Tokenised in one piece, the last letters of the prompt
    and the first of the answer may become one token, another one for each answer, and then the two
    answers no longer have the same prompt.

    Every answer ends in exactly one end token, `tokenizer.eos_token`, whether its text had one or
    not. A begin token comes first where the tokenizer itself puts one there.

    Args:
      preferences: n pairs.
      tokenizer: any with an end token.
      max_tokens: the most tokens that prompt, answer and end token may have together. Nothing is
        ever cut: leave out what is too long by `count_tokens`, or raise this up to the model's
        context.
      template: what the model reads before it answers, with `{prompt}` once in it.
    Returns:
      `(prompts [n, P], chosen [n, T], rejected [n, T])` int64, padded on the right with `PAD`.
    Raises:
      ValueError: no pairs, an answer that does not fit, an end token inside an answer, a template
        without a prompt, a tokenizer without an end token.
    """
    check_count("max_tokens", max_tokens)
    rows = _encode_rows(preferences, tokenizer, template)
    long = [n for n, row in enumerate(rows) if _row_length(row) > max_tokens]
    if long:
        prompt, chosen, rejected = (len(part) for part in rows[long[0]])
        raise ValueError(
            f"preferences: got row {long[0]}, first of {len(long)} of {len(rows)} that are too "
            f"long, with {prompt} tokens of prompt and answers of {chosen} and {rejected}; takes "
            f"at most max_tokens = {max_tokens} for prompt and answer"
        )
    prompts, chosen, rejected = (
        [torch.tensor(part) for part in parts] for parts in zip(*rows, strict=True)
    )
    answers = pad_sequence([*chosen, *rejected], batch_first=True, padding_value=PAD)
    prompts = pad_sequence(prompts, batch_first=True, padding_value=PAD)
    return prompts, answers[: len(rows)], answers[len(rows) :]


def count_tokens(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = TEMPLATE,
) -> list[int]:
    """How many tokens each pair needs: its prompt, the longer of its answers, the end token."""
    return [_row_length(row) for row in _encode_rows(preferences, tokenizer, template)]


# --- models ----------------------------------------------------------------------------------


class CausalLMPolicy(nn.Module):
    """Any causal language model of `transformers` as a policy.

    The model is held in evaluation mode, also by `train()`: dropout is off. A preference loss takes
    the difference of a policy's log-probability and a reference's. With dropout each would carry
    its own noise, summed over the tokens, and at the first step, where the two models are the same,
    the margins would be noise instead of 0.

    Args:
      model: causal, so that no token reads what comes after it; kept, not copied.
      end_token: the token that ends a completion, or None.
    """

    def __init__(self, model: PreTrainedModel, *, end_token: int | None) -> None:  # noqa: D107
        super().__init__()
        self.model = model
        self.end_token = end_token
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.context = getattr(model.config, "max_position_embeddings", None)
        if end_token is not None and not 0 <= end_token < self.vocab_size:
            raise ValueError(f"end_token: got {end_token}, takes None or 0..{self.vocab_size - 1}")
        self.train()

    def train(self, mode: bool = True) -> "CausalLMPolicy":
        """As in `nn.Module`, but for the model: it stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probability of each completion token.

        Args:
          prompts: `[B, P]` int64, padded on the right with `PAD`.
          completions: `[B, T]` int64, padded on the right with `PAD`.
        Returns:
          `[B, T]`, nats, at least float32; 0 on padding.
        Raises:
          ValueError: a prompt or completion is empty, goes on after padding, has a token outside
            the vocabulary, or together they are longer than the model's context; a completion goes
            on after its end token.
        """
        check_integers("prompts", prompts, "[B, P]")
        _check_prompts(prompts)
        completion_mask(completions, self.end_token)
        check_rows("prompts", prompts, completions=completions)
        for name, given in (("prompts", prompts), ("completions", completions)):
            if (given < PAD).any() or (given >= self.vocab_size).any():
                got = given[(given < PAD) | (given >= self.vocab_size)][0].item()
                raise ValueError(f"{name}: got token {got}, takes 0..{self.vocab_size - 1}")
        n_prompt = prompts.shape[1]
        padded = torch.cat([prompts, completions], dim=1)  # [B, P + T]
        real = padded != PAD
        length = int(real.sum(1).max())  # L, of the longest row
        if self.context is not None and length - 1 > self.context:
            raise ValueError(
                f"completions: got {length} tokens with their prompt, takes at most "
                f"{self.context + 1}: the model reads all but the last, {self.context} at most"
            )
        # Prompt and completion next to each other: the padding between them goes to the end.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]  # [B, L]
        tokens, real = padded.gather(1, order), real.gather(1, order)
        # No attention mask: in a causal model no token reads the padding that comes after it.
        read = self.model(input_ids=tokens[:, :-1].clamp(min=0), use_cache=False)
        logits = read.logits  # [B, L - 1, V]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        scored = token_logps(logits, tokens, real & (order >= n_prompt))  # [B, L - 1]
        placed = scored.new_zeros(padded.shape).scatter(1, order[:, 1:], scored)
        return placed[:, n_prompt:]

    def logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log pi(y|x), `[B]` nats, summed over tokens; arguments as in `token_logps`."""
        return sum_over_tokens(self.token_logps(prompts, completions), completions != PAD)


def tiny_gpt2(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_positions: int,
    generator: torch.Generator,
    n_layers: int = 2,
    n_heads: int = 4,
    width: int = 128,
) -> GPT2LMHeadModel:
    """An untrained GPT-2 with this tokenizer's vocabulary, without dropout, of the default dtype.

    Args:
      n_positions: the model's context in tokens.
      n_layers, n_heads, width: its shape; `width` is a multiple of `n_heads`.
      generator: draws the weights.
    """
    sizes = {"n_positions": n_positions, "n_layers": n_layers, "n_heads": n_heads, "width": width}
    for name, size in sizes.items():
        check_count(name, size)
    check_generator(generator)
    if width % n_heads:
        raise ValueError(f"width: got {width}, takes a multiple of n_heads = {n_heads}")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=n_positions,
        n_layer=n_layers,
        n_head=n_heads,
        n_embd=width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):  # transformers draws from global state: put it back
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def load_model(folder: AnyPath) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder on this machine; nothing is downloaded.

    The weights come as safetensors and in the default dtype: half precision is for running a model,
    and too coarse for the small steps of training one.

    Raises:
      OSError: no such folder, or no safetensors in it.
      ValueError: the model needs code of its own.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"folder: got {str(folder)!r}, takes a folder on this machine; download_model fetches "
            "a model of the hub by its name"
        )
    return _from_pretrained(str(folder), local_files_only=True)


def download_model(
    name: str, *, revision: str = "main"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, of the Hugging Face hub: `download_model("HuggingFaceTB/SmolLM2-135M")`.

    Args:
      name: the model's name on the hub.
      revision: its branch, tag or commit; a commit is the only one that cannot change.
    """
    return _from_pretrained(name, revision=revision)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: AnyPath) -> None:
    """Write a model (safetensors) and its tokenizer, whole or not at all.

    Both are written beside `folder`, which then takes their place. A write that fails leaves an old
    folder as it was; a power cut in the instant between two renames can leave it beside, in a
    folder whose name ends in `.part`.

    Raises:
      ValueError: `folder` holds files that are no part of what is written: they would be lost.
    """
    folder = Path(folder).resolve()
    with _staging(folder) as staging, _without_bars():
        new, old = staging / "new", staging / "old"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        try:
            if folder.exists():
                foreign = {file.name for file in folder.iterdir()} - set(os.listdir(new))
                if foreign:
                    raise ValueError(
                        f"folder: got {folder}, which holds {', '.join(sorted(foreign))}; takes a "
                        "new or empty folder, or one with a saved model alone"
                    )
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            if old.exists() and not folder.exists():
                os.rename(old, folder)


# --- what training did -----------------------------------------------------------------------


def preference_margins(
    policy: nn.Module, reference: nn.Module, pairs: Pairs, *, batch_size: int = 64
) -> Tensor:
    r"""How much further than the reference the policy prefers chosen to rejected, a number a pair.

    $\log(\pi_\theta/\pi_{ref})(y_w) - \log(\pi_\theta/\pi_{ref})(y_l)$; times beta it is the
    margin of the implied rewards.

    Returns:
      `[n]`, nats, without gradient; 0 where the two answers are the same.
    """
    prompts, chosen, rejected = pairs
    check_rows("prompts", prompts, chosen=chosen, rejected=rejected)
    check_count("batch_size", batch_size)

    def score(model: nn.Module, rows: Tensor, completions: Tensor) -> Tensor:
        scored = model.token_logps(prompts[rows], completions[rows])
        return sum_over_tokens(scored, completions[rows] != PAD)

    with torch.no_grad():
        return torch.cat(
            [
                (score(policy, rows, chosen) - score(reference, rows, chosen))
                - (score(policy, rows, rejected) - score(reference, rows, rejected))
                for rows in torch.arange(len(prompts), device=prompts.device).split(batch_size)
            ]
        )


def preference_accuracy(
    policy: nn.Module, reference: nn.Module, pairs: Pairs, *, batch_size: int = 64
) -> float:
    """The share of pairs whose implied reward is higher for the chosen answer.

    A tie counts as wrong, so a pair of twice the same answer is wrong under every policy, and a
    policy that equals its reference has accuracy 0. Beta does not matter.
    """
    margins = preference_margins(policy, reference, pairs, batch_size=batch_size)
    return (margins > 0).double().mean().item()


def greedy_answer(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_tokens: int,
    template: str = TEMPLATE,
) -> str:
    """The answer made of the most probable token each time; one that did not end closes in ….

    Args:
      max_tokens: the most tokens of prompt and answer together, at most the model's context.
      template: the one that the model was trained with, as in `encode`.
    """

    def most_probable(logps: Tensor) -> Tensor:
        return logps.argmax()

    return _answer(policy, tokenizer, prompt, max_tokens, template, most_probable)


def sample_answer(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_tokens: int,
    generator: torch.Generator,
    template: str = TEMPLATE,
) -> str:
    """An answer drawn from the policy as it is, temperature 1; the rest as in `greedy_answer`."""
    check_generator(generator)

    def draw(logps: Tensor) -> Tensor:
        return torch.multinomial(logps.exp(), 1, generator=generator).squeeze(0)

    return _answer(policy, tokenizer, prompt, max_tokens, template, draw)


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


def _check_preferences(preferences: Sequence[Preference]) -> None:
    if not len(preferences):
        raise ValueError("preferences: got none, takes at least one pair")
    for row, pair in enumerate(preferences):
        if not isinstance(pair, Preference):
            kind = type(pair).__name__
            raise TypeError(f"preferences: got {kind} in row {row}, takes a Preference")


def _check_texts(name: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name}: got one text, takes several")
    texts = list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}: got {type(text).__name__} in row {row}, takes text")
    if not any(texts):
        raise ValueError(f"{name}: got no text, takes at least one letter")
    return texts


def _check_prompts(prompts: Tensor) -> None:
    real = prompts != PAD
    if not real[:, 0].all():
        row = int((~real[:, 0]).nonzero()[0])
        raise ValueError(
            f"prompts: got an empty prompt in row {row}, takes >= 1 token: nothing else predicts "
            "the first token of the answer"
        )
    if (real[:, 1:] & ~real[:, :-1]).any():
        row = int((real[:, 1:] & ~real[:, :-1]).any(1).nonzero()[0])
        raise ValueError(f"prompts: got a token after padding in row {row}, pads at the end")


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A folder beside `path`, gone afterwards: what is finished there is moved, never copied."""
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield staging
    finally:
        if path.exists() or not (staging / "old").exists():
            shutil.rmtree(staging)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of `transformers`, which a notebook would keep in its outputs."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _from_pretrained(
    name: str, **options: str | bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _without_bars():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        model = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, **options
        )
    return model.to(torch.get_default_dtype()).eval(), tokenizer


_Row = tuple[list[int], list[int], list[int]]


def _row_length(row: _Row) -> int:
    prompt, chosen, rejected = row
    return len(prompt) + max(len(chosen), len(rejected))


def _encode_rows(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[_Row]:
    """Prompt, chosen and rejected of each pair as tokens."""
    _check_preferences(preferences)
    _check_template(template)
    end = _end_token(tokenizer)

    def answer(row: int, name: str, text: str) -> list[int]:
        tokens = _tokenise(tokenizer, text)
        while tokens and tokens[-1] == end:
            tokens.pop()
        if not tokens or end in tokens:
            got = "an end token inside" if tokens else "nothing but end tokens in"
            raise ValueError(
                f"preferences: got {got} the {name} answer of row {row}, takes text with no "
                f"{tokenizer.eos_token} but at its end"
            )
        return [*tokens, end]

    rows = []
    for n, pair in enumerate(preferences):
        prompt = _encode_prompt(tokenizer, pair.prompt, template)
        chosen, rejected = answer(n, "chosen", pair.chosen), answer(n, "rejected", pair.rejected)
        rows.append((prompt, chosen, rejected))
    return rows


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str) -> list[int]:
    # Not format: a template may hold other braces.
    tokens = _tokenise(tokenizer, template.replace("{prompt}", prompt))
    begin = tokenizer.bos_token_id
    if begin is not None and begin not in tokens[:1] and tokenizer("a").input_ids[0] == begin:
        tokens = [begin, *tokens]
    if not tokens:
        raise ValueError(
            f"template: got {template!r}, which leaves an empty prompt without a token, takes one "
            "with some text around {prompt}"
        )
    return tokens


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _check_template(template: str) -> None:
    if not isinstance(template, str) or template.count("{prompt}") != 1:
        raise ValueError(f"template: got {template!r}, takes text with {{prompt}} once in it")


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: got one without an end token, takes one with an eos_token")
    return tokenizer.eos_token_id


def _answer(policy, tokenizer, prompt, max_tokens, template, draw) -> str:
    """Tokens chosen by `draw` from log-probabilities `[V]`, one after another, as text."""
    check_count("max_tokens", max_tokens)
    _check_template(template)
    if policy.context is not None and max_tokens > policy.context:
        raise ValueError(
            f"max_tokens: got {max_tokens}, takes at most {policy.context}, the context"
        )
    end, tokens = _end_token(tokenizer), _encode_prompt(tokenizer, prompt, template)
    if len(tokens) >= max_tokens:
        raise ValueError(f"prompt: got {len(tokens)} tokens, takes less than {max_tokens}")
    device = next(policy.parameters()).device
    unread, path, n_prompt = tokens, None, len(tokens)
    with torch.no_grad():
        while len(tokens) < max_tokens and (len(tokens) == n_prompt or tokens[-1] != end):
            read = policy.model(
                input_ids=torch.tensor([unread], device=device),
                past_key_values=path,
                use_cache=True,
            )
            path = read.past_key_values
            unread = [int(draw(read.logits[0, -1].double().log_softmax(-1)))]
            tokens = tokens + unread
    text = tokenizer.decode(tokens[n_prompt:], skip_special_tokens=True)
    return text if tokens[-1] == end else text + "…"

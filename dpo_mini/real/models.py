"""Causal language models of `transformers` as policies: loaded, saved, made small."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from dpo_mini._arguments import check_count, check_generator, check_integers, check_rows
from dpo_mini.logps import PAD, completion_mask, sum_over_tokens
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.reading import (
    logps_of,
    may_read_in_one_row,
    pair_token_logps,
    reads_in_one_row,
)


class CausalLMPolicy(nn.Module):
    """Any causal language model of `transformers` as a policy, without dropout.

    A preference loss takes the difference of a policy's log-probability and a reference's. With
    dropout each would carry its own noise, summed over the tokens, and at the first step, where the
    two models are the same, the margins would be noise instead of 0. So only the parts that can
    recompute their activations are held in training mode, which `gradient_checkpointing_enable`
    needs, with their own dropout at 0. All others are held in evaluation mode: dropout layers, and
    routers that draw. `train()` and `eval()` change nothing of that; `model.config` is left alone.

    The first text that is scored is a test: a model that is not causal, or that draws, is refused.

    Args:
      model: causal, so that no token reads what comes after it; kept, not copied.
      end_token: the token that ends a completion, or None.
    Raises:
      ValueError: an encoder-decoder, or an end token outside the vocabulary.
    """

    def __init__(self, model: PreTrainedModel, *, end_token: int | None) -> None:  # noqa: D107
        super().__init__()
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(
                "`model` must be a decoder alone, which reads a prompt and its answer as one text "
                f"(AutoModelForCausalLM), got an encoder-decoder, {type(model).__name__}"
            )
        self.model = model
        self.end_token = end_token
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.context = _context(model)
        self._is_checked = False
        self._in_one_row: bool | None = None
        if end_token is not None and not 0 <= end_token < self.vocab_size:
            last = self.vocab_size - 1
            raise ValueError(f"`end_token` must be None or in 0..{last}, got {end_token}")
        self.train()

    def extra_repr(self) -> str:
        """What `print(policy)` says of it, beside the model's layers."""
        names = ("end_token", "vocab_size", "context")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def train(self, mode: bool = True) -> "CausalLMPolicy":
        """As in `nn.Module`, but for the model, which reads the same in either mode."""
        super().train(mode)
        _train_without_dropout(self.model)
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
            on after its end token; the model is not causal, draws, or has no logit for a token.
        """
        return self._read_rows(prompts, completions, only_answers=False)

    def pair_token_logps(
        self, prompts: Tensor, chosen: Tensor, rejected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of two answers to one prompt, in one row where that works.

        The first pairs that are scored are a test: a model that does not score them in one row as
        it does apart reads every answer in a row of its own.

        Args:
          prompts: `[B, P]` int64, padded on the right with `PAD`.
          chosen, rejected: `[B, T]` int64, padded on the right with `PAD`.
        Returns:
          `[B, T]` each, nats, at least float32; 0 on padding.
        Raises:
          ValueError: as `token_logps`.
        """
        if self._in_one_row is None:
            few = [tokens[:4] for tokens in (prompts, chosen, rejected)]
            self._in_one_row = reads_in_one_row(self, *few)
        lengths = (torch.cat([prompts, chosen, rejected], 1) != PAD).sum(1)
        if self._in_one_row and may_read_in_one_row(self.model, int(lengths.max())):
            self._check_tokens(prompts, chosen)
            self._check_tokens(prompts, rejected)
            first, second = pair_token_logps(self.model, prompts, chosen, rejected)
        else:
            answers = torch.cat([chosen, rejected])
            apart = self._read_rows(prompts.repeat(2, 1), answers, only_answers=True)
            first, second = apart.chunk(2)
        # Read at two places, the same answer would differ by rounding, and one of a tie win.
        same = (chosen == rejected).all(1, keepdim=True)
        return first, torch.where(same, first, second)

    def logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log pi(y|x), `[B]` nats, summed over tokens; arguments as in `token_logps`."""
        return sum_over_tokens(self.token_logps(prompts, completions), completions != PAD)

    def _read_rows(self, prompts: Tensor, completions: Tensor, *, only_answers: bool) -> Tensor:
        """`token_logps`, with logits for all positions, or for those that predict an answer.

        Only where all rows have logits at the same places do rows with the same tokens get the same
        bits.
        """
        self._check_tokens(prompts, completions)
        n_prompt = prompts.shape[1]
        padded = torch.cat([prompts, completions], dim=1)  # [B, P + T]
        real = padded != PAD
        length = int(real.sum(1).max())  # L, of the longest row
        # Prompt and completion next to each other: the padding between them goes to the end.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]  # [B, L]
        tokens, real = padded.gather(1, order), real.gather(1, order)
        if not self._is_checked:
            self._check_reading(tokens[0][real[0]])
            self._is_checked = True
        # No attention mask: in a causal model no token reads the padding that comes after it.
        counted = (real & (order >= n_prompt))[:, 1:]  # [B, L - 1]
        inputs = tokens[:, :-1].clamp(min=0)
        rows, columns = counted.nonzero(as_tuple=True)
        scored = logps_of(
            self.model, rows, columns, tokens[:, 1:][counted], everywhere=not only_answers,
            input_ids=inputs,
        )  # fmt: skip
        in_order = scored.new_zeros(counted.shape).masked_scatter(counted, scored)
        placed = scored.new_zeros(padded.shape).scatter(1, order[:, 1:], in_order)
        return placed[:, n_prompt:]

    def _check_tokens(self, prompts: Tensor, completions: Tensor) -> None:
        check_integers("prompts", prompts, "[B, P]")
        _check_prompts(prompts)
        completion_mask(completions, self.end_token)
        check_rows("prompts", prompts, completions=completions)
        for name, given in (("prompts", prompts), ("completions", completions)):
            if (given < PAD).any() or (given >= self.vocab_size).any():
                got = given[(given < PAD) | (given >= self.vocab_size)][0].item()
                raise ValueError(
                    f"`{name}` must have tokens in 0..{self.vocab_size - 1}, got {got}"
                )
        length = int(((prompts != PAD).sum(1) + (completions != PAD).sum(1)).max())
        if self.context is not None and length - 1 > self.context:
            raise ValueError(
                f"`completions` must have at most {self.context + 1} tokens with their prompt (the "
                f"model reads all but the last, {self.context} at most), got {length}"
            )

    def _check_reading(self, tokens: Tensor) -> None:
        """Reads a few tokens twice, with another second half: the first must not notice."""
        text = tokens[: min(8, self.context or 8)]
        half = len(text) // 2
        if half == 0:
            return
        other = torch.cat([text[:half], (text[half:] + 1) % self.vocab_size])
        if self._read_alike(text, other, half):
            return
        name = type(self.model).__name__
        if not self._read_alike(text, text, half):
            raise ValueError(
                "`model` must read the same text alike each time, got one that draws while it "
                f"trains, {name} (set the dropouts of `model.config` to 0, if it has any)"
            )
        raise ValueError(
            "`model` must be causal, so that no token reads what comes after it, got one whose "
            f"tokens do, {name} (models like BERT need `is_decoder=True` in their config, and "
            "weights that were trained with it)"
        )

    @torch.no_grad()
    def _read_alike(self, first: Tensor, second: Tensor, n_tokens: int) -> bool:
        """Whether the logits at the first tokens of two texts are the same, but for rounding.

        In a dense causal model no bit differs. Where tokens are dealt out to experts, sums may run
        in another order: 1e-6 of the largest logit in float32, a hundredth in bfloat16. BERT is a
        thousandth off when untrained, a twentieth with weights as large as trained ones.
        """
        logits = self.model(input_ids=torch.stack([first, second]), use_cache=False).logits
        torch.clear_autocast_cache()  # of weights that would take no gradient
        dtypes = {weight.dtype for weight in self.model.parameters() if weight.is_floating_point()}
        if torch.is_autocast_enabled(logits.device.type):
            dtypes.add(torch.get_autocast_dtype(logits.device.type))
        # 6e-6 in float32, 0.026 in bfloat16
        rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.75
        one, two = logits[:, :n_tokens]
        return not bool((one - two).abs().max() > rounding * one.abs().max())


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
    Returns:
      The model, in evaluation mode.
    Raises:
      ValueError: a size below 1, or a `width` that the heads do not divide.
    """
    sizes = {"n_positions": n_positions, "n_layers": n_layers, "n_heads": n_heads, "width": width}
    for name, size in sizes.items():
        check_count(name, size)
    check_generator(generator)
    if width % n_heads:
        raise ValueError(f"`width` must be a multiple of n_heads = {n_heads}, got {width}")
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


def load_model(
    folder: AnyPath, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer from a folder on this machine; nothing is downloaded.

    The weights come as safetensors and in the default dtype: half precision is for running a model,
    and too coarse for the small steps of training one.

    Args:
      folder: holds weights, configuration and tokenizer.
      dtype: of the weights, where another is wanted: `torch.bfloat16` for weights that `add_lora`
        freezes. Buffers, such as the frequencies of positions, stay as they are.
    Returns:
      `(model, tokenizer)`, the model in evaluation mode.
    Raises:
      OSError: no such folder, or no safetensors in it.
      ValueError: the model needs code of its own, or is an encoder-decoder; the weights lack a
        tensor of the model, have one too many, or one of another shape.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"`folder` must be a folder on this machine, got {str(folder)!r}: download_model "
            "fetches a model of the hub by its name"
        )
    return _from_pretrained("folder", str(folder), dtype, local_files_only=True)


def download_model(
    name: str, *, revision: str = "main", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_model`, of the Hugging Face hub: `download_model("HuggingFaceTB/SmolLM2-135M")`.

    Args:
      name: the model's name on the hub; a folder of this name on this machine is read instead.
      revision: its branch, tag or commit; a commit is the only one that cannot change.
      dtype: as in `load_model`.
    Returns:
      `(model, tokenizer)`, as `load_model`.
    """
    return _from_pretrained("name", name, dtype, revision=revision)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: AnyPath,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model (safetensors) and its tokenizer, whole or not at all.

    Both are written beside `folder`, which then takes their place. A write that fails leaves an old
    folder as it was; a power cut in the instant between two renames can leave it beside, in a
    folder whose name ends in `.part`.

    Args:
      model, tokenizer, folder: what to write, and where.
      weights: the model's state dict, where its own is dealt out over several processes.
    Raises:
      ValueError: `folder` holds files that are no part of what is written: they would be lost.
    """
    with replaced_folder(folder, "a saved model") as new:
        model.save_pretrained(new, state_dict=weights)
        tokenizer.save_pretrained(new)


@contextmanager
def replaced_folder(folder: AnyPath, what: str) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` when the block ends, or does not.

    Args:
      folder: new, empty, or one that holds no other files than the new one.
      what: a folder of this kind holds, for the refusal of another.
    """
    folder = Path(folder).resolve()
    with _staging(folder) as staging, _without_bars():
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        try:
            if folder.exists():
                foreign = {file.name for file in folder.iterdir()} - set(os.listdir(new))
                if foreign:
                    raise ValueError(
                        f"`folder` must be new or empty, or hold {what} alone, got "
                        f"{folder}, which holds {', '.join(sorted(foreign))}"
                    )
                os.rename(folder, old)
            os.rename(new, folder)
        finally:
            if old.exists() and not folder.exists():
                os.rename(old, folder)


# --- private functions -----------------------------------------------------------------------


def _context(model: PreTrainedModel) -> int | None:
    """The most tokens that a model reads, under the name that its config has for it, or None."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    names = ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"]
    if rope.get("rope_type", rope.get("type")) == "longrope":
        # Beyond this a row would change how the shorter rows beside it are read.
        names.insert(0, "original_max_position_embeddings")
    found = [rope.get(name) or getattr(config, name, None) for name in names]
    return next((context for context in found if isinstance(context, int) and context > 0), None)


def _train_without_dropout(model: nn.Module) -> None:
    """Training mode for what can recompute its activations, evaluation mode for all the rest.

    Every dropout at 0 would not be enough in training mode: some attention reads its dropout from
    the config, which is saved with the model, and some routers draw without any.
    """
    model.eval()
    for part in model.modules():
        if part is model or hasattr(part, "gradient_checkpointing"):
            part.training = True
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):  # such as activation_dropout
                    setattr(part, name, 0.0)


def _check_prompts(prompts: Tensor) -> None:
    real = prompts != PAD
    if not real[:, 0].all():
        row = int((~real[:, 0]).nonzero()[0])
        raise ValueError(
            "`prompts` must have at least one token per row, since nothing else predicts the first "
            f"token of the answer, got an empty prompt in row {row}"
        )
    if (real[:, 1:] & ~real[:, :-1]).any():
        row = int((real[:, 1:] & ~real[:, :-1]).any(1).nonzero()[0])
        raise ValueError(f"`prompts` must be padded at the end, got a token after it in row {row}")


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


def _some(names: Sequence[str]) -> str:
    """At most three of them, and how many there are."""
    more = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _from_pretrained(
    argument: str, name: str, dtype: torch.dtype | None, **options: str | bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with _without_bars():
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"`{argument}` must have a causal language model (a decoder alone), got "
                f"{config.model_type}, an encoder-decoder, in {name}"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **options,
        )
    shapes = {key: (list(got), list(want)) for key, got, want in found["mismatched_keys"]}
    faults = {
        "none for": sorted(found["missing_keys"]),
        "one too many for": sorted(found["unexpected_keys"]),
        "another shape for": [
            f"{key} ({got}, not {want})" for key, (got, want) in sorted(shapes.items())
        ],
    }
    if any(faults.values()):
        got = "; ".join(f"{fault} {_some(keys)}" for fault, keys in faults.items() if keys)
        raise ValueError(
            f"`{argument}` must have one tensor for each weight of its {type(model).__name__} "
            f"(save or download it again), got {got} in {name}"
        )
    if dtype is None:
        return model.to(torch.get_default_dtype()).eval(), tokenizer
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model.eval(), tokenizer

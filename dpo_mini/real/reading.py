"""One pass of a model over pairs: a prompt is read once, and only answers are predicted.

The two answers of a pair share their prompt. In one row (prompt, chosen, rejected) it is read once:
an attention mask hides the first answer from the second, whose positions go on after the prompt.
And of all logits only those are computed that predict a token of an answer: the output layer gets
these positions alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo_mini.logps import PAD
from dpo_mini.real.models import CausalLMPolicy

MASKED_BY_US = ("eager", "sdpa")
"""Attentions of `transformers` that take a mask of their caller's, `[B, 1, L, L]`."""


def pair_token_logps(
    model: nn.Module, prompts: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of both answers, read in one row.

    Args:
      model: causal, of `transformers`; `reads_in_one_row` says whether it can.
      prompts: `[B, P]` int64, padded on the right with `PAD`, as `chosen` and `rejected` `[B, T]`.
    Returns:
      Chosen and rejected, `[B, T]` each, nats, at least float32; 0 on padding.
    """
    answers = torch.stack([chosen, rejected], 1)  # [B, 2, T]
    n_prompt, n_chosen = (prompts != PAD).sum(1), (chosen != PAD).sum(1)  # [B] each
    # Nothing follows the last token of an answer, so no model has to read it.
    parts = [prompts, _without_last(chosen), _without_last(rejected)]
    padded = torch.cat(parts, 1)
    length = int((padded != PAD).sum(1).max())  # L
    order = (padded == PAD).to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
    tokens = padded.gather(1, order)  # [B, L], the padding at the end
    padding = tokens == PAD
    at = torch.arange(length, device=tokens.device)
    fork, second = n_prompt[:, None], (n_prompt + n_chosen - 1)[:, None]  # where the answers begin
    positions = torch.where(at >= second, at - second + fork, at).masked_fill(padding, 0)
    hidden = (at >= second)[:, :, None] & ((at >= fork) & (at < second))[:, None, :]
    seen = (at[:, None] >= at[None, :]) & ~hidden  # [B, L, L]
    # The token before the first of an answer is the last of the prompt, in both.
    n = torch.arange(chosen.shape[1], device=tokens.device)
    before_chosen = fork - 1 + n
    before_rejected = torch.where(n == 0, fork - 1, second - 1 + n)
    scored = answers != PAD
    columns = torch.stack([before_chosen, before_rejected], 1)[scored]
    rows = torch.arange(len(tokens), device=tokens.device)[:, None, None].expand_as(scored)[scored]
    inputs = {"input_ids": tokens.masked_fill(padding, 0), "position_ids": positions}
    logits = logits_at(model, rows, columns, attention_mask=_added(seen, model), **inputs)
    logps = logits.log_softmax(-1).gather(1, answers[scored].unsqueeze(1)).squeeze(1)
    placed = logps.new_zeros(answers.shape).masked_scatter(scored, logps)
    return placed[:, 0], placed[:, 1]


def logits_at(model: nn.Module, rows: Tensor, columns: Tensor, **inputs: Tensor) -> Tensor:
    """The logits of some positions alone.

    Args:
      model: of `transformers`.
      rows, columns: `[N]` each, the positions.
      inputs: what the model reads, `input_ids` `[B, L]` among them.
    Returns:
      `[N, V]`, at least float32.
    """
    with _only_positions(model, rows, columns) as shown:
        logits = model(**inputs, use_cache=False).logits
    found = logits[0] if shown else logits[rows, columns]
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def reads_in_one_row(
    policy: CausalLMPolicy, prompts: Tensor, chosen: Tensor, rejected: Tensor
) -> bool:
    """Whether a model scores an answer in one row as it does in a row of its own.

    It does not where attention takes no mask of its caller's, where positions are no argument, or
    where what comes before is read in order (state-space models).

    Args:
      policy: has `model` and `token_logps`.
      prompts, chosen, rejected: a few pairs, `[B, P]` and `[B, T]` int64, as in `pair_token_logps`.
    """
    model: nn.Module = policy.model
    config = _unwrapped(model).config
    length = (prompts != PAD).sum(1) + (chosen != PAD).sum(1) + (rejected != PAD).sum(1)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if getattr(config, "_attn_implementation", None) not in MASKED_BY_US:
        return False
    if any(window is not None and window < length.max() for window in windows):
        return False
    with torch.no_grad():
        in_rows = policy.token_logps(prompts.repeat(2, 1), torch.cat([chosen, rejected]))
        try:
            in_one_row = torch.cat(pair_token_logps(model, prompts, chosen, rejected))
        except (RuntimeError, TypeError, ValueError, IndexError):  # of a model that cannot
            return False
    tokens = (chosen != PAD).sum() + (rejected != PAD).sum()
    error = (in_rows - in_one_row).abs().sum() / tokens  # nats a token
    return bool(error < _ROUNDING.get(next(model.parameters()).dtype, 0.1))


_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Nats a token that two ways of reading may differ by, and 0.1 in half precision."""


# --- private functions -----------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> Any:
    """The model of `transformers` inside `DistributedDataParallel`."""
    return getattr(model, "module", model)


@contextmanager
def _only_positions(model: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[list[int]]:
    """The output layer gets `[1, N, D]` in the place of `[B, L, D]`; the list tells if it did."""
    shown: list[int] = []
    layer = _unwrapped(model).get_output_embeddings()

    def choose(layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shown.append(1)
        return (given[0][rows, columns][None], *given[1:])

    handle = None if layer is None else layer.register_forward_pre_hook(choose)
    try:
        yield shown
    finally:
        if handle is not None:
            handle.remove()


def _without_last(answers: Tensor) -> Tensor:
    """`[B, T]` with the last token of each row, and its padding, as `PAD`."""
    follows = torch.nn.functional.pad(answers[:, 1:] != PAD, (0, 1))
    return answers.masked_fill(~follows, PAD)


def _added(seen: Tensor, model: nn.Module) -> Tensor:
    """`[B, 1, L, L]`: 0 where a key is seen, and else what the softmax makes 0."""
    dtype = next(model.parameters()).dtype
    least = torch.finfo(dtype).min
    added = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, least)
    return added.unsqueeze(1)

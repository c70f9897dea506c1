"""One pass of a model over texts: a prompt is read once, and only answers are predicted.

The two answers of a pair share their prompt. In one row (prompt, chosen, rejected) it is read once:
an attention mask hides the first answer from the second, whose positions go on after the prompt.
And of all logits only those are computed that predict a token of an answer: the output layer gets
these positions alone.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from dpo_mini.logps import PAD, token_logps


def logps_of(
    model: nn.Module,
    rows: Tensor,
    columns: Tensor,
    targets: Tensor,
    *,
    everywhere: bool = False,
    **inputs: Tensor,
) -> Tensor:
    """Log-probability of tokens, each predicted at a position of its own.

    Args:
      model: of `transformers`.
      rows, columns: `[N]`, the positions that predict.
      targets: `[N]` int64, the tokens.
      everywhere: makes the logits of all positions; by default those of these positions alone.
      inputs: what the model reads, `input_ids` `[B, L]` among them.
    Returns:
      `[N]`, nats, at least float32.
    Raises:
      ValueError: a token without a logit, or a logit that is NaN or +inf.
    """
    # A layer that recomputes is read to its end again, so that hooks see every part of it twice.
    whole_layers = set_checkpoint_early_stop(False)
    with _only_positions(model, rows, columns, everywhere) as shown, whole_layers:
        logits = model(**inputs, use_cache=False).logits
    found = logits[0] if shown else logits[rows, columns]  # [N, V]
    if found.dtype in (torch.float16, torch.bfloat16):
        found = found.float()
    if len(targets) and targets.max() >= found.shape[-1]:
        raise ValueError(
            f"`model` must have a logit for each token that it is asked for, got {found.shape[-1]} "
            f"logits and token {int(targets.max())} (model.resize_token_embeddings makes them "
            "alike)"
        )
    before = inputs["input_ids"][rows, columns]
    tokens = torch.stack([before, targets], 1)
    counted = torch.tensor([[False, True]], device=tokens.device).expand(tokens.shape)
    return token_logps(found.unsqueeze(1), tokens, counted).squeeze(1)


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
    padded = torch.cat([prompts, _without_last(chosen), _without_last(rejected)], 1)
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
    before_rejected = torch.where(n == 0, fork - 1, second - 1 + n)
    scored = answers != PAD
    columns = torch.stack([fork - 1 + n, before_rejected], 1)[scored]
    rows = torch.arange(len(tokens), device=tokens.device)[:, None, None].expand_as(scored)[scored]
    logps = logps_of(
        model, rows, columns, answers[scored], input_ids=tokens.masked_fill(padding, 0),
        position_ids=positions, attention_mask=_added(seen, model),
    )  # fmt: skip
    placed = logps.new_zeros(answers.shape).masked_scatter(scored, logps)
    return placed[:, 0], placed[:, 1]


def may_read_in_one_row(model: nn.Module, length: int) -> bool:
    """Whether a row of this length is within a window of attention, as far as the config says."""
    config = unwrapped(model).config
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return all(window is None or window >= length for window in windows)


@torch.no_grad()
def reads_in_one_row(policy: Any, prompts: Tensor, chosen: Tensor, rejected: Tensor) -> bool:
    """Whether a model scores an answer in one row as it does in a row of its own: it is tried.

    It does not where attention takes no mask of its caller's, where positions are no argument, or
    where what comes before is read in order (state-space models).

    Args:
      policy: has `model` and `token_logps`.
      prompts, chosen, rejected: a few pairs, `[B, P]` and `[B, T]` int64, as in `pair_token_logps`.
    """
    model = unwrapped(policy.model)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if getattr(model.config, "alibi", False):  # distances are counted along the row
        return False
    if getattr(model.config, "_attn_implementation", None) not in ("eager", "sdpa"):
        return False  # flash attention takes no mask
    device, n_tokens = prompts.device.type, int((chosen != PAD).sum() + (rejected != PAD).sum())
    for here in {torch.is_autocast_enabled(device), False}:
        with torch.autocast(device, enabled=here, cache_enabled=False):
            apart = policy.token_logps(prompts.repeat(2, 1), torch.cat([chosen, rejected]))
            try:
                together = pair_token_logps(policy.model, prompts, chosen, rejected)
            except (RuntimeError, TypeError, ValueError, IndexError):  # of a model that cannot
                return False
        error = (apart - torch.cat(together)).abs().sum() / n_tokens
        dtype = torch.bfloat16 if here else next(model.parameters()).dtype
        if not error < _ROUNDING.get(dtype, 0.1):
            return False
    return True


def unwrapped(model: nn.Module) -> Any:
    """The model of `transformers` inside `DistributedDataParallel` and an adapter's wrapper."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


# --- private functions -----------------------------------------------------------------------

_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Nats a token that two ways of reading may differ by, and 0.1 in half precision."""


@contextmanager
def _only_positions(
    model: nn.Module, rows: Tensor, columns: Tensor, everywhere: bool
) -> Iterator[list[int]]:
    """The output layer gets `[1, N, D]` in the place of `[B, L, D]`; the list tells if it did."""
    shown: list[int] = []
    layer = None if everywhere else unwrapped(model).get_output_embeddings()

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

"""Logits to log-probabilities of completions: the library's only shift by one and only mask.

A language model reads tokens `0..S-1` and predicts tokens `1..S`. Which of those predictions count
is decided here and nowhere else: the tokens of the completion count, its end token included; the
prompt and the padding do not. Half precision is computed in float32 and rounded once, at the end.
"""

import torch
from torch import Tensor

from dpo_mini._arguments import (
    as_bool_mask,
    check_count,
    check_floats,
    check_integers,
    check_logps,
    values_visible,
)
from dpo_mini._numerics import dtype_of_input, widen

__all__ = [
    "PAD",
    "completion_mask",
    "token_logps",
    "sum_over_tokens",
    "mean_over_tokens",
]

PAD = -1
"""The token id of padding: outside every vocabulary, so it cannot be mistaken for a token."""


def completion_mask(completions: Tensor, end_token: int | None) -> Tensor:
    """Which positions of padded completions hold a token.

    Args:
      completions: `[B, T]` int64, tokens followed by `PAD`.
      end_token: the token that ends a completion, or None where completions have one length.
    Returns:
      `[B, T]` bool, True on every token up to and including the end token.
    Raises:
      ValueError: a completion is empty, has a token after padding, or goes on after its end token.
    """
    check_integers("completions", completions, "[B, T]")
    mask = completions != PAD
    if not values_visible(mask):
        return mask
    if not mask[:, 0].all():
        row = int((~mask[:, 0]).nonzero()[0])
        what = "at least one token in each row"
        raise ValueError(f"`completions` must have {what}, got none in row {row}")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        row = int((mask[:, 1:] & ~mask[:, :-1]).any(1).nonzero()[0])
        what = f"padding ({PAD}) at the end only"
        raise ValueError(f"`completions` must have {what}, got a token after it in row {row}")
    if end_token is not None:
        check_count("end_token", end_token, least=0)
        ended = completions[:, :-1] == end_token
        if (ended & mask[:, 1:]).any():
            row = int((ended & mask[:, 1:]).any(1).nonzero()[0])
            raise ValueError(
                f"`completions` must have only padding ({PAD}) after the end token {end_token}, "
                f"got a token there in row {row}"
            )
    return mask


def token_logps(logits: Tensor, tokens: Tensor, completion_mask: Tensor) -> Tensor:
    """Log-probability of each completion token given all that comes before it.

    Args:
      logits: `[B, S, V]`, the model's output after reading `tokens[:, :-1]`.
      tokens: `[B, S + 1]` int64, prompt, completion, padding.
      completion_mask: `[B, S + 1]` bool or 0/1, true on the completion's tokens. The first token
        has nothing before it that could predict it, so its mask is false.
    Returns:
      `[B, S]`, nats; exactly 0 where `completion_mask[:, 1:]` is false.
    Raises:
      ValueError: shapes differ, a mask is not 0/1, counts the first token or is empty in a row,
        a counted token lies outside the vocabulary, a logit is NaN or +inf, or all V logits of a
        position are -inf.
    """
    check_floats("[B, S, V]", logits=logits)
    check_integers("tokens", tokens, "[B, S + 1]")
    n_rows, n_inputs = logits.shape[:2]
    if tokens.shape != (n_rows, n_inputs + 1):
        raise ValueError(
            f"`tokens` must have shape {[n_rows, n_inputs + 1]}, got {list(tokens.shape)}: one "
            f"token more than `logits` {list(logits.shape)}, which come from tokens[:, :-1]"
        )
    mask = as_bool_mask("completion_mask", completion_mask, tokens.shape)
    if values_visible(logits, tokens, mask):
        _check_values(logits, tokens, mask)
    mask, targets = mask[:, 1:], tokens[:, 1:]  # the shift: position s predicts token s + 1
    targets = targets.masked_fill(~mask, 0)
    chosen = widen(logits).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [B, S]
    return chosen.masked_fill(~mask, 0.0)


def sum_over_tokens(token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """log pi(y|x), `[B]` nats: the sum of `token_logps` `[B, T]` over the masked-in tokens.

    Args:
      token_logps: `[B, T]`, nats.
      completion_mask: `[B, T]` bool or 0/1, true on the completion's tokens.
    Returns:
      `[B]`, nats.
    Raises:
      ValueError: shapes differ, the mask is not 0/1, or a masked-in value is NaN or +inf.
    """
    return _totals_and_counts(token_logps, completion_mask)[0]


def mean_over_tokens(token_logps: Tensor, completion_mask: Tensor) -> Tensor:
    """Mean log-probability per token, `[B]` nats: no longer the log of a probability.

    Args are those of `sum_over_tokens`.

    Raises:
      ValueError: as in `sum_over_tokens`, or a row has no token.
    """
    totals, counts = _totals_and_counts(token_logps, completion_mask)
    if values_visible(counts) and not counts.all():
        row = int((counts == 0).nonzero()[0])
        what = "at least one token in each row"
        raise ValueError(f"`completion_mask` must have {what}, got none in row {row}")
    return totals / counts


def _totals_and_counts(token_logps: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` each: the sum of the masked-in log-probabilities, and how many they are."""
    check_floats("[B, T]", token_logps=token_logps)
    mask = as_bool_mask("completion_mask", completion_mask, token_logps.shape)
    counted = token_logps.masked_fill(~mask, 0.0)
    check_logps(token_logps=counted)
    return widen(counted).sum(-1), mask.sum(-1)


def _check_values(logits: Tensor, tokens: Tensor, mask: Tensor) -> None:
    """Refuse what logits `[B, S, V]` cannot predict of `tokens` `[B, S + 1]`."""
    if mask[:, 0].any():
        raise ValueError(
            "`completion_mask` must be false on the first token, got true: nothing predicts it"
        )
    vocab_size, mask, targets = logits.shape[-1], mask[:, 1:], tokens[:, 1:]
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        what = "at least one token in each row"
        raise ValueError(f"`completion_mask` must have {what}, got none in row {row}")
    outside = mask & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        got = targets[outside][0].item()
        what = f"0..{vocab_size - 1} where `completion_mask` is true"
        raise ValueError(f"`tokens` must be in {what}, got {got}")
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise ValueError("`logits` must be < inf, got NaN or +inf")
    if torch.isneginf(logits.amax(-1)).any():
        what = "at least one finite logit per position"
        raise ValueError(f"`logits` must have {what}, got a position of -inf only")


for _name in ("token_logps", "sum_over_tokens", "mean_over_tokens"):
    globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

"""How pairs are scored: in which precision, summed how, by the policy and by its reference."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dpo_mini._arguments import check_at_most_0, check_count
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.policies import Scorer
from dpo_mini.real.digests import reference_digest
from dpo_mini.train import Pairs
from dpo_mini.train.pair_losses import check_pairs

Scores = tuple[Tensor, Tensor]
"""Chosen and rejected, one number per pair each, nats."""
Precision = Callable[[str], AbstractContextManager[object]]
"""From a device's type, such as `"cuda"`, to the context that a model is read in."""
Reduce = Callable[[Tensor, Tensor], Tensor]
"""From `token_logps` `[B, T]` and their mask to `[B]`: `sum_over_tokens` or `mean_over_tokens`."""


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Every product in the dtype of the weights, whatever the `device_type`."""
    return nullcontext()


def bf16_autocast(device_type: str) -> AbstractContextManager[object]:
    """Matrix products in bfloat16; weights, gradients and log-probabilities stay float32.

    A log-probability is off by the rounding of all its tokens then, and by the same for two models
    with the same weights. So the reference is read in it too: else rewards start at that noise, and
    not at 0.

    Args:
      device_type: such as `"cuda"` or `"cpu"`.
    Returns:
      The context that a model is read in.
    """
    return torch.autocast(device_type, dtype=torch.bfloat16)


# --- the reference ---------------------------------------------------------------------------


class ReferenceLogps(tuple[Tensor, Tensor]):
    """What `reference_logps` gives: chosen and rejected, and how they were read."""

    reduce: Reduce
    precision: Precision
    digest: str


def reference_logps(
    reference: Scorer,
    pairs: Pairs,
    *,
    micro_batch_size: int = 1,
    reduce: Reduce = sum_over_tokens,
    precision: Precision = full_precision,
    progress: Callable[[range], Iterable[int]] = iter,
) -> ReferenceLogps:
    """Score every pair once, before training: then the reference need not be in memory.

    The numbers are, to the last bit, those that a reference beside the policy would give in a pass
    over the same pairs. With one pair per pass the order of the pairs does not matter. In a pass
    with others a pair is padded to the longest, sums run in another order, and the last digit may
    differ: 1e-5 in float32, and far more in bfloat16.

    Args:
      reference: a model before it is trained, a copy, or `adapter_off(policy)`.
      pairs, reduce, precision: as in `train_preferences`, which then takes `reduce` and `precision`
        from the result.
      micro_batch_size: pairs per pass.
      progress: wraps the range of passes, as in `train.fit_sft`.
    Returns:
      Chosen and rejected, `[n]` each, nats, on the CPU and without gradient: a tuple with the
      attributes `reduce` and `precision`.
    Raises:
      ValueError: no pairs, rows that differ in number, `micro_batch_size < 1`, or log-probabilities
        above 0.
    """
    check_pairs(pairs)
    check_count("micro_batch_size", micro_batch_size)
    read = score_reader(reference, pairs, reduce, precision)
    passes = torch.arange(len(pairs[0])).split(micro_batch_size)
    blocks = [read(passes[n]) for n in progress(range(len(passes)))]
    logps = ReferenceLogps(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True))
    logps.reduce, logps.precision = reduce, precision
    logps.digest = reference_digest(reference)  # for checkpoints: the model may be gone by then
    return logps


def how_to_read(
    reference: Scores | Scorer, reduce: Reduce | None, precision: Precision | None
) -> tuple[Reduce, Precision]:
    """What the caller said, or else what `reference_logps` was told, which must not differ."""
    if not isinstance(reference, ReferenceLogps):
        return reduce or sum_over_tokens, precision or full_precision
    for name, got in {"reduce": reduce, "precision": precision}.items():
        want = getattr(reference, name)
        if got not in (None, want):
            raise ValueError(
                f"`{name}` must be {function_name(want)} like that of reference_logps, or be left "
                f"out, got {function_name(got)}"
            )
    return reference.reduce, reference.precision


def function_name(function: object) -> str:
    """What an error calls a function."""
    return getattr(function, "__name__", repr(function))


def pair_logps(
    model: Scorer, pairs: Pairs, rows: Tensor, reduce: Reduce, precision: Precision
) -> Scores:
    """Chosen and rejected, `[B]` each, in one pass: the two answers share their prompt."""
    prompts, chosen, rejected = pairs
    device = next(iter(model.parameters())).device
    answers = torch.cat([chosen[rows], rejected[rows]]).to(device)
    # One context per pass: autocast keeps its half-precision weights until the context ends, and
    # those that it made for a pass without gradient would take none from the policy's.
    with precision(device.type):
        scored = model.token_logps(prompts[rows].repeat(2, 1).to(device), answers)
    chosen_scores, rejected_scores = reduce(scored, answers != PAD).chunk(2)
    return chosen_scores, rejected_scores


def score_reader(
    reference: Scores | Scorer, pairs: Pairs, reduce: Reduce, precision: Precision
) -> Callable[[Tensor], Scores]:
    """From rows to the reference's chosen and rejected: looked up, or read without gradient."""

    def read(rows: Tensor) -> Scores:
        if isinstance(reference, tuple):
            return reference[0][rows], reference[1][rows]
        with torch.no_grad():
            scores = pair_logps(reference, pairs, rows, reduce, precision)
        n_tokens = pairs[1].shape[1]
        check_at_most_0("reference.token_logps", torch.cat(scores), n_tokens=n_tokens)
        return scores

    return read

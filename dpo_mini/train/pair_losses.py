"""Which losses the loops on pairs take, and an adapter for those without a reference."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dpo_mini._arguments import check_integers, check_rows

Pairs = tuple[Tensor, Tensor, Tensor]
"""`(prompts [n], chosen [n, T], rejected [n, T])`."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Four `[B]` in the order of `dpo_loss`, one loss per pair out; `functools.partial` binds beta."""

_OTHER_LOSSES = {  # by an argument that only they have
    "desirable": "single answers and a thumb for each: `real.train_ratings`, or `fit_table`",
    "mismatched_logps": "answers to other prompts: it estimates the z_0 of `kto_loss`",
    "first_rewards": "a score of each answer: `fit_reinforce` learns from scores, or `fit_table`",
    "values": "a score and a value of each answer: write a loop of your own, or `fit_table`",
    "rewards": "scores of K answers per prompt: `fit_reinforce` learns from scores, or `fit_table`",
    "chosen_rewards": "rewards and not log-probabilities: `fit_reward_model` takes it as it is",
    "logps": "a list of K answers per prompt: `fit_table`, or `dpo_loss` on the list's pairs",
}


def without_reference(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss of the policy alone in the form of one with a reference, for every loop on pairs.

    Args:
      loss: from chosen and rejected log-probabilities, `[B]` each, to one loss per pair, such as
        `partial(cpo_loss, beta=0.1)`, or `partial(simpo_loss, beta=2.0, gamma=1.0)` with
        `reduce=mean_over_tokens` in the loop.
    Returns:
      A loss of four, which does not use the reference's two. Keyword arguments are passed on.
    """

    return _WithoutReference(loss)


def check_pair_loss(loss: Callable[..., Tensor], **given: object) -> None:
    """Refuse a loss that does not take the log-probabilities of a pair and its reference.

    Args:
      loss: what a loop was given.
      **given: keyword arguments that the loop passes on.
    """
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    problem = _fails_to_bind(signature, 4, given)
    if not problem and "values" not in signature.parameters:
        return
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty]
    name = getattr(getattr(loss, "func", loss), "__name__", "this loss")
    for argument, what in _OTHER_LOSSES.items():
        if argument in needed:
            raise ValueError(f"`loss` must take pairs with a reference, got {name}, of {what}")
    if _fails_to_bind(signature, 2, given):
        takes = "must take four tensors, with all else bound by functools.partial"
        raise ValueError(f"`loss` {takes}, got {name}: {problem}")
    means = ", reduce=mean_over_tokens" if any("mean" in each for each in needed) else ""
    cure = f"write train.without_reference({name}){means}"
    what = f"got {name}, which takes no reference: {cure}"
    raise ValueError(f"`loss` must take pairs with a reference, {what}")


class _WithoutReference:
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.without_reference = loss  # a checkpoint has its name

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        **named: Any,
    ) -> Tensor:
        return self.without_reference(chosen, rejected, **named)


def _fails_to_bind(signature: inspect.Signature, n: int, given: dict[str, object]) -> str:
    """Why `n` tensors and these keyword arguments are no call of it; "" where they are."""
    try:
        signature.bind(*[None] * n, **given)
    except TypeError as error:
        return str(error)
    return ""


def check_pairs(pairs: Pairs) -> Pairs:
    """The three tensors of `pairs`, or a ValueError where they do not belong together."""
    if len(pairs) != 3:
        raise ValueError(f"`pairs` must be (prompts, chosen, rejected), got {len(pairs)} tensors")
    prompts, chosen, rejected = pairs
    check_rows("prompts", prompts, chosen=chosen, rejected=rejected)
    check_integers("chosen", chosen, "[n, T]")
    check_integers("rejected", rejected, "[n, T]")
    if rejected.shape != chosen.shape:
        want, got = list(chosen.shape), list(rejected.shape)
        raise ValueError(f"`rejected` must have shape {want} like `chosen`, got {got}")
    return prompts, chosen, rejected


def pair_measures(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor
) -> dict[str, Tensor]:
    """The mean log-ratio margin of pairs in nats, and the share of pairs where it is positive."""
    margins = ((chosen - ref_chosen) - (rejected - ref_rejected)).detach()
    return {"margin": margins.mean(), "accuracy": (margins > 0).double().mean()}

"""The losses of pairs by their names, with what each of them asks for."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor

from dpo_mini import losses
from dpo_mini.logps import mean_over_tokens, sum_over_tokens
from dpo_mini.real.scoring import Reduce
from dpo_mini.train import without_reference

TRL_NAMES = {
    "sigmoid": "dpo",
    "robust": "rdpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "sppo_hard": "sppo",
    "sigmoid_norm": "dpo_mean",
}
"""From the `loss_type` of `trl` to our name, where the formula is the same and the name is not."""


def loss_names() -> list[str]:
    """The names that `loss_by_name` knows, without those of `trl`."""
    return list(_of_pairs())


def loss_by_name(
    name: str, arguments: Mapping[str, object]
) -> tuple[Callable[..., Tensor], Reduce]:
    """A loss for `train_preferences`, and how it reads a completion.

    Args:
      name: of a function of `dpo_mini.losses` that takes a pair, without `_loss`: `"dpo"`,
        `"simpo"`. Or trl's name where the formula is the same: `"sigmoid"`. `"ipo"` is the paper's,
        on sums; trl's is `"ipo_mean"`.
      arguments: its own, such as `{"label_smoothing": 0.1}`; beta is not one of them.
    Returns:
      The loss, called with `beta`, with a reference or in `without_reference`; `sum_over_tokens` or
      `mean_over_tokens`.
    Raises:
      ValueError: an unknown name; an argument that is missing, unknown or out of range.
    """
    known = _of_pairs()
    name = TRL_NAMES.get(name, name)
    if name not in known:
        names = [*known, *TRL_NAMES]
        near = get_close_matches(name, names, n=1)
        also = f" (did you mean {near[0]}?)" if near else ""
        if name == "kto":
            also = " (it takes single answers with a thumb: real.train_ratings)"
        raise ValueError(f"`loss` must be one of {', '.join(names)}, got {name!r}{also}")
    loss = known[name]
    _check_arguments(name, loss, arguments)
    bound = partial(loss, **arguments) if arguments else loss
    positional = _positional(loss)
    bound(*[torch.tensor([-1.0])] * len(positional), beta=1.0)  # refuses a value out of range
    reduce = mean_over_tokens if "mean" in positional[0] else sum_over_tokens
    return (bound if len(positional) == 4 else without_reference(bound)), reduce


# --- private functions -----------------------------------------------------------------------


def _of_pairs() -> dict[str, Callable[..., Tensor]]:
    """The losses of the log-probabilities of a pair and of beta, by their names."""
    found = {}
    for name in losses.__all__:
        loss = getattr(losses, name)
        taken = [each.replace("_mean_logps", "_logps") for each in _positional(loss)]
        pair = ["chosen_logps", "rejected_logps"]
        if taken in (pair, [*pair, *(f"ref_{each}" for each in pair)]):
            found[name.removesuffix("_loss")] = loss
    return found


def _positional(loss: Callable[..., Tensor]) -> list[str]:
    parameters = inspect.signature(loss).parameters.values()
    return [each.name for each in parameters if each.kind is not each.KEYWORD_ONLY]


def _check_arguments(
    name: str, loss: Callable[..., Tensor], arguments: Mapping[str, object]
) -> None:
    parameters = inspect.signature(loss).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "beta"}
    needed = [each for each, default in own.items() if default is inspect.Parameter.empty]
    faults = [f"no {each}" for each in needed if each not in arguments]
    faults += [f"an unknown {each}" for each in arguments if each not in own]
    if faults:
        optional = [f"{each} = {own[each]}" for each in own if each not in needed]
        takes = ", ".join([*needed, *optional]) or "none"
        got = " and ".join(faults)
        raise ValueError(f"`loss_arguments` must be those of {name} ({takes}), got {got}")

"""Digests: whether two runs have the same weights, data and scores, to the last bit."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dpo_mini.policies import Scorer

BLOCK = 1 << 26
"""Numbers that are copied to the CPU at a time."""


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, in their order; about a second per GB.

    Args:
      named: pairs of a name and a tensor of any dtype, on any device. Of one that is dealt out over
        several processes this process reads its own part.
    Returns:
      64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        for block in own.detach().flatten().split(BLOCK):
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """The digest of all that a model's `state_dict` holds, and of which of it is trained."""
    held = model.state_dict(keep_vars=True).items()
    once = {id(weight): (name, weight) for name, weight in held if isinstance(weight, Tensor)}
    return tensor_digest(
        (f"{name} {'trained' if weight.requires_grad else 'frozen'}", weight)
        for name, weight in once.values()
    )


def reference_digest(reference: tuple[Tensor, Tensor] | Scorer) -> str:
    """The digest of a reference's weights, or of scores where nothing else is known of it.

    Scores that `reference_logps` gave are those of its weights: the passes that it read them in
    change their last digits, and not which reference it is.
    """
    known = getattr(reference, "digest", None)
    if isinstance(known, str):
        return known
    if isinstance(reference, tuple):
        return tensor_digest(zip(("chosen", "rejected"), reference, strict=True))
    return tensor_digest(("", weight) for weight in reference.parameters())

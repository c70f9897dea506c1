"""How many bytes of memory training takes for each parameter of the model, worked out.

What depends on the data comes on top: activations, and logits of `2 B L V` numbers per pass.
"""

from dpo_mini._arguments import check_between, check_count, check_fraction

Memory = dict[str, float]
"""Bytes for each parameter of the model, by what they hold; `"total"` is their sum."""


def full_memory(*, reference: float = 4) -> Memory:
    """Float32 throughout, and autocast too: weights, gradients and Adam's two moments, 4 each.

    `bf16_autocast` makes half-precision weights (2) on top while a pass lasts.

    Args:
      reference: of the frozen copy: 4, or 2 in bfloat16, or 0 where `reference_logps` scored first.
    Returns:
      Bytes for each parameter of the model, and their total.
    """
    return _memory(weights=4, gradients=4, moments=8, master=0, reference=reference)


def bf16_memory(*, reference: float = 2) -> Memory:
    """Weights and gradients in bfloat16, with a float32 master copy that Adam changes.

    As much as float32 in total, in other places: it is passes that get faster, and activations that
    halve.

    Args:
      reference: of the frozen copy, as in `full_memory`.
    Returns:
      Bytes for each parameter of the model, and their total.
    Source: Rajbhandari et al. 2019 (ZeRO), section 3.1, arXiv:1910.02054: 2 + 2 + 12.
    """
    return _memory(weights=2, gradients=2, moments=8, master=4, reference=reference)


def lora_memory(trained: float, *, weights: float = 2) -> Memory:
    """Frozen weights, and adapters of float32; the reference is the model without them, so 0.

    Args:
      trained: parameters of the adapters for each of the model's, such as 0.01.
      weights: bytes of a frozen one: 4, 2 in bfloat16, or about 0.5 in four bits.
    Returns:
      Bytes for each parameter of the model, and their total.
    Raises:
      ValueError: `trained` outside [0, 1], or `weights` below 0.
    """
    check_fraction("trained", trained)
    check_between("weights", weights, 0.0, float("inf"))
    return _memory(
        weights=weights + 4 * trained,
        gradients=4 * trained,
        moments=8 * trained,
        master=0,
        reference=0,
    )


def sharded_memory(memory: Memory, n: int) -> Memory:
    """What one of `n` devices holds under FSDP, which deals out weights, gradients and moments.

    While a layer is computed its weights are there whole, on every device.

    Args:
      memory: of one device that holds everything; under DDP every device does.
      n: how many devices.
    Returns:
      The same parts, each divided by n.
    Raises:
      ValueError: `n < 1`.
    """
    check_count("n", n)
    return {name: value / n for name, value in memory.items()}


# --- private functions -----------------------------------------------------------------------


def _memory(**parts: float) -> Memory:
    check_between("reference", parts["reference"], 0.0, float("inf"))
    return {**parts, "total": sum(parts.values())}

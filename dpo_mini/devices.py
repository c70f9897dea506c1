"""Where tensors lie: the device of a chapter, and the generators that draw there."""

from collections.abc import Callable

import torch

from dpo_mini._arguments import check_count

__all__ = ["on_device"]


def on_device(name: str | torch.device) -> tuple[torch.device, Callable[[int], torch.Generator]]:
    """A device, and a function that makes generators which draw on it.

    What a generator draws lies on the generator's device: the weights of a new policy, sampled
    completions, shuffled rows. So in `device, seeded = on_device("cuda")` nothing but the name says
    where a program runs; tables of a task are sent there by `task.to(device)`. A function of this
    library that draws for tensors or weights refuses a generator that lies elsewhere than they do.

    Args:
      name: such as `"cpu"` or `"cuda"`.
    Returns:
      `(device, seeded)`; `seeded(7)` is a new generator with the seed 7. The same seed gives other
      numbers on another kind of device.
    Raises:
      ValueError: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.empty(0, device=torch.device(name)).device  # "cuda" becomes "cuda:0"
        torch.Generator(device)
    except (RuntimeError, AssertionError) as error:  # which of them depends on the build of torch
        what = 'a device that torch finds here, such as "cpu"'
        raise ValueError(f"`name` must be {what}, got {str(name)!r}") from error

    def seeded(seed: int) -> torch.Generator:
        """A new generator on the device of `on_device`, with this seed >= 0."""
        check_count("seed", seed, least=0)
        return torch.Generator(device).manual_seed(seed)

    return device, seeded


def __dir__() -> list[str]:
    return __all__

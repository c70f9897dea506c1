"""How several processes share the rows, and one process in the form that `accelerate` has."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


class OneProcess:
    """What is asked of an `accelerate.Accelerator`, answered for one process."""

    num_processes, process_index, is_main_process = 1, 0, True
    distributed_type, mixed_precision, gradient_accumulation_steps = "NO", "no", 1

    def prepare(self, *parts: Any) -> tuple[Any, ...]:  # noqa: D102
        return parts

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: D102
        return nullcontext()

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:  # noqa: D102
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:  # noqa: D102
        return tensor

    def wait_for_everyone(self) -> None:  # noqa: D102
        pass

    def get_state_dict(self, model: nn.Module) -> dict[str, Tensor]:  # noqa: D102
        return model.state_dict()

    def unwrap_model(self, model: nn.Module) -> nn.Module:  # noqa: D102
        return model


def check_divides(accelerator: "Accelerator | OneProcess", batches: Tensor) -> None:
    """Refuse batches that the processes cannot share evenly."""
    n, size = accelerator.num_processes, batches.shape[1]
    if size % n:
        raise ValueError(
            f"`batches` must have a multiple of {n} rows per step for {n} processes, got {size}"
        )

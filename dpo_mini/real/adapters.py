"""Adapters: a few trained weights beside frozen ones, which are the reference."""

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_mini._arguments import check_count, check_fraction, check_generator, check_positive
from dpo_mini.real.models import CausalLMPolicy, replaced_folder
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.processes import OneProcess

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


ALL = "all-linear"
"""As peft says it."""


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    generator: torch.Generator,
    alpha: float | None = None,
    targets: str | Sequence[str] = ALL,
    dropout: float = 0.0,
) -> "PeftModel":
    """The model with a trained adapter, W + (alpha / rank) B A, on every linear layer but the last.

    The adapter is float32 where the model's own weights are bfloat16.

    B starts at 0: the model says what it said before. Its own weights are frozen, so with the
    adapter switched off it is its own reference forever; see `adapter_off`.

    Args:
      model: changed in place.
      rank: rows of A.
      generator: draws A.
      alpha: the scale, by default 2 rank.
      targets: names of linear layers, as in `["q_proj", "v_proj"]`, or all of them but the last.
      dropout: of the adapter's inputs; a `CausalLMPolicy` holds it off.
    Returns:
      A `peft.PeftModel`; `merge_and_unload()` gives a model without adapters to save.
    Raises:
      ValueError: `rank < 1`, `alpha <= 0`, `dropout` outside [0, 1], or a target that is no linear
        layer.
    Source: Hu et al. 2021, arXiv:2106.09685; all linear layers: Dettmers et al. 2023,
      arXiv:2305.14314.
    """
    from peft import LoraConfig, get_peft_model

    check_count("rank", rank)
    check_generator(generator)
    check_fraction("dropout", dropout)
    alpha = 2 * rank if alpha is None else alpha
    check_positive("alpha", alpha)
    names = [targets] if isinstance(targets, str) else [*targets]
    if names != [ALL]:
        _check_targets(model, names)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # peft says int and divides it by the rank
        lora_dropout=dropout,
        target_modules=ALL if names == [ALL] else names,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),  # GPT-2
    )
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of transformers to peft, which reads an attribute by a name that goes away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(seed)  # peft draws from global state: fork_rng puts it back
        return get_peft_model(model, config)


def save_adapter(
    policy: CausalLMPolicy,
    folder: AnyPath,
    *,
    accelerator: "Accelerator | OneProcess | None" = None,
) -> None:
    """Write the adapter alone, as `peft` reads it, whole or not at all; before `save_trained`.

    `peft.PeftModel.from_pretrained(model, folder)` puts it on the model that `add_lora` was given.

    Args:
      policy, accelerator: those of `train_preferences`; called in every process, written in one.
      folder: as in `save_model`.
    Raises:
      TypeError: a policy without an adapter, or whose adapter `save_trained` merged.
      ValueError: `folder` holds files that are no part of what is written: they would be lost.
    """
    accelerator = accelerator or OneProcess()
    model: Any = accelerator.unwrap_model(policy.model)
    _check_adapter(model)
    if accelerator.is_main_process:
        with replaced_folder(folder, "a saved adapter") as new:
            # Its embeddings are not trained, and peft would ask the hub whether they are.
            model.save_pretrained(new, save_embedding_layers=False)
    accelerator.wait_for_everyone()


class adapter_off:
    """The reference of a policy with an adapter: the same weights read without it, no second copy.

    It stays as it is while the adapter alone is trained. Where more is (peft's `bias="all"`), score
    it before, by `reference_logps`; `train_preferences` refuses it and names the weight.

    Args:
      policy: its model is what `add_lora` gave, or any `peft.PeftModel`.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:  # noqa: D107
        _check_adapter(policy.model)
        self.policy = policy
        self.model = policy.model  # held here: an accelerator wraps the policy's
        self.unwrapped = CausalLMPolicy(policy.model, end_token=policy.end_token)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the policy's model."""
        return self.model.parameters()

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """As in `CausalLMPolicy.token_logps`, without the adapter."""
        with self.model.disable_adapter():
            return self.unwrapped.token_logps(prompts, completions)

    def pair_token_logps(
        self, prompts: Tensor, chosen: Tensor, rejected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As in `CausalLMPolicy.pair_token_logps`, without the adapter."""
        with self.model.disable_adapter():
            return self.unwrapped.pair_token_logps(prompts, chosen, rejected)


# --- private functions -----------------------------------------------------------------------


def _check_adapter(model: object) -> None:
    if not hasattr(model, "disable_adapter"):
        got = type(model).__name__
        raise TypeError(f"`policy` must have a model with an adapter (add_lora), got a {got}")


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    last = model.get_output_embeddings()
    linear = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and part is not last
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise ValueError(
                f"`targets` must be 'all-linear' or names of linear layers ({names}), got "
                f"{target!r}"
            )

"""Adapters: a few trained weights beside frozen ones, which are the reference."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo_mini._arguments import check_count, check_fraction, check_generator, check_positive
from dpo_mini.real.models import CausalLMPolicy

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    generator: torch.Generator,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> "PeftModel":
    """The model with a trained adapter, W + (alpha / rank) B A, on every linear layer but the last.

    B starts at 0: the model says what it said before. Its own weights are frozen, so with the
    adapter switched off it is its own reference forever; see `adapter_off`.

    Args:
      model: changed in place.
      rank: rows of A.
      generator: draws A.
      alpha: the scale, by default 2 rank.
      dropout: of the adapter's inputs; a `CausalLMPolicy` holds it off.
    Returns:
      A `peft.PeftModel`; `merge_and_unload()` gives a model without adapters to save.
    Raises:
      ValueError: `rank < 1`, `alpha <= 0`, or `dropout` outside [0, 1].
    Source: Hu et al. 2021, arXiv:2106.09685; all linear layers: Dettmers et al. 2023,
      arXiv:2305.14314.
    """
    from peft import LoraConfig, get_peft_model

    check_count("rank", rank)
    check_generator(generator)
    check_fraction("dropout", dropout)
    alpha = 2 * rank if alpha is None else alpha
    check_positive("alpha", alpha)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # peft says int and divides it by the rank
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),  # GPT-2
    )
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of transformers to peft, which reads an attribute by a name that goes away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(seed)  # peft draws from global state: fork_rng puts it back
        return get_peft_model(model, config)


class adapter_off:
    """The reference of a policy with an adapter: the same weights read without it, no second copy.

    It stays as it is while the adapter alone is trained. Where more is (peft's `bias="all"`), score
    it before, by `reference_logps`; `train_preferences` refuses it and names the weight.

    Args:
      policy: its model is what `add_lora` gave, or any `peft.PeftModel`.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:  # noqa: D107
        if not hasattr(policy.model, "disable_adapter"):
            got = type(policy.model).__name__
            raise TypeError(f"`policy` must have a model with an adapter (add_lora), got a {got}")
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

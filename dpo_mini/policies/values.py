"""Models that put a number on a text beside the policy: a value function and a reward model."""

import torch
from torch import Tensor, nn

from dpo_mini._arguments import check_finite, check_floats
from dpo_mini.policies.base import Policy, Sizes, TabularPolicy, shares_storage
from dpo_mini.policies.transformer import TinyTransformer


class ScalarTransformer(nn.Module):
    """A transformer's body with one number per token: a value function, or a reward model's inside.

    Args:
      body: its output weights are not used; it is kept, not copied.
    """

    def __init__(self, body: TinyTransformer) -> None:
        super().__init__()
        self.body, self.head = body, _zero_head(body)
        self.vocab_size = body.vocab_size

    def outputs(self, hidden: Tensor) -> Tensor:
        """The number `[..., 1]` that the head reads off `hidden` states `[..., D]`."""
        return self.head(hidden)


class RewardModel(ScalarTransformer):
    """A scalar reward of a whole completion: the head's number on its last token.

    Bradley-Terry leaves a constant free, which `centre` fixes; `rollout.shared_prefix_rewards`
    scores a batch and `rollout.enumerate_rewards` every completion.

    Args:
      body: reads the prompt and T tokens, so its own `max_tokens` is one more than the task's.
    """

    offset: Tensor

    def __init__(self, body: TinyTransformer) -> None:
        super().__init__(body)
        self.n_prompts, self.end_token = body.n_prompts, body.end_token
        self.max_tokens = body.max_tokens - 1
        self.register_buffer("offset", self.head.weight.new_zeros(()))

    @classmethod
    def for_task(cls, task: Sizes, *, generator: torch.Generator, **shape: int) -> "RewardModel":
        """An untrained reward model of the sizes of `task`; it says 0 of everything.

        Args are those of `TinyTransformer.for_task`.
        """
        sizes = (len(task.prompts), task.vocab_size, task.max_tokens + 1)
        read, end = getattr(task, "prompt_tokens", None), task.end_token
        body = TinyTransformer(
            *sizes, end_token=end, prompt_tokens=read, generator=generator, **shape
        )
        return cls(body)

    def outputs(self, hidden: Tensor) -> Tensor:
        """The reward `[..., 1]` of what ends with the token of each of `hidden` `[..., D]`."""
        return self.head(hidden) - self.offset

    def centre(self, rewards: Tensor) -> None:
        """Subtract the mean of `rewards` `[n]`, this model's own of some completions, in place.

        Raises:
          ValueError: a reward is not finite, or there are none.
        """
        check_floats("[n]", rewards=rewards)
        check_finite(rewards=rewards)
        self.offset += rewards.detach().mean()


class SharedTrunk(nn.Module):
    """A policy and a value function in one body: both heads read the same hidden states.

    Training the value moves the policy.

    Args:
      policy: kept, not copied. The value head starts at 0 everywhere.
    """

    def __init__(self, policy: TinyTransformer) -> None:
        super().__init__()
        self.policy, self.value_head = policy, _zero_head(policy)
        self.vocab_size = policy.vocab_size

    def outputs(self, hidden: Tensor) -> Tensor:
        """V logits and then the value, `[..., V + 1]`, from `hidden` states `[..., D]`."""
        return torch.cat([self.policy.unembed(hidden), self.value_head(hidden)], -1)


class SeparateNetworks(nn.Module):
    """A policy and a value function that share nothing; they are read side by side.

    Args:
      policy: kept, not copied.
      critic: a `ScalarTransformer`, or for a bandit a `TabularPolicy` of one column, which is read
        as a table of values.
    Raises:
      ValueError: the two share weights.
    """

    def __init__(self, policy: Policy, critic: ScalarTransformer | TabularPolicy) -> None:
        super().__init__()
        if shares_storage(policy, critic):
            raise ValueError("`critic` must have weights of its own, got some of `policy`")
        self.policy, self.critic = policy, critic
        self.vocab_size = policy.vocab_size


def _zero_head(body: TinyTransformer) -> nn.Linear:
    """A linear head of one number, 0 at the start; beside `body` in dtype and device."""
    like = body.wte.weight
    with torch.random.fork_rng(devices=[]):  # torch fills new layers from global random state
        head = nn.Linear(like.shape[1], 1, dtype=like.dtype, device="cpu").to(like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head

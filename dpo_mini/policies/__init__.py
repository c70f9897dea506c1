"""Policies: a table of logits for bandits, and a tiny GPT-2 for tasks made of text.

- `base`: what every policy answers, and `TabularPolicy`.
- `transformer`: `TinyTransformer`, the file to read.
- `values`: a reward model, and a policy with the value function that PPO learns.

How they are read fast, each distinct prefix once, is in `dpo_mini.rollout`.
"""

from dpo_mini.policies.base import (
    KVCache,
    Policy,
    PrefixTree,
    Scorer,
    Sizes,
    TabularPolicy,
)
from dpo_mini.policies.transformer import Block, SelfAttention, TinyTransformer
from dpo_mini.policies.values import (
    RewardModel,
    ScalarTransformer,
    SeparateNetworks,
    SharedTrunk,
)

__all__ = [
    "KVCache",
    "PrefixTree",
    "Sizes",
    "Scorer",
    "Policy",
    "TabularPolicy",
    "SelfAttention",
    "Block",
    "TinyTransformer",
    "ScalarTransformer",
    "RewardModel",
    "SharedTrunk",
    "SeparateNetworks",
]


def __dir__() -> list[str]:
    return __all__

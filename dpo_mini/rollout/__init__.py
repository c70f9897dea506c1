"""Completions of a policy: all of them, some by sampling, and the log-probabilities of given ones.

- `scoring`: `token_logps`, the one way to ask for log-probabilities of completions.
- `sample`: draws from a policy.
- `enumerate`: tables of every completion, exact gradients of sums over them, and the value of every
  prefix.
- `trees`, `kv_cache`: how a transformer reads each distinct prefix once.
"""

from dpo_mini.rollout.enumerate import (
    SoftValues,
    enumerate_logps,
    enumerate_rewards,
    exact_gradient,
    soft_values,
)
from dpo_mini.rollout.kv_cache import lengthen
from dpo_mini.rollout.sample import sample
from dpo_mini.rollout.scoring import (
    read_actor_critic,
    shared_prefix_rewards,
    shared_prefix_token_logps,
    token_logps,
)
from dpo_mini.rollout.trees import prefix_tree

__all__ = [
    "enumerate_logps",
    "enumerate_rewards",
    "exact_gradient",
    "SoftValues",
    "soft_values",
    "sample",
    "token_logps",
    "shared_prefix_token_logps",
    "read_actor_critic",
    "shared_prefix_rewards",
    "prefix_tree",
    "lengthen",
]


def __dir__() -> list[str]:
    return __all__

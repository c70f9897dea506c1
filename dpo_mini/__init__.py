"""DPO derived, measured and broken on tasks small enough to enumerate.

`import dpo_mini` brings in torch and nothing slower; `plotting` (matplotlib), `progress` (IPython)
and `real` (transformers) are imported by whoever asks for them.
"""

from dpo_mini import (
    closed_form,
    logps,
    losses,
    policies,
    policy_gradient,
    preferences,
    relaxations,
    rollout,
    tasks,
    train,
)

__version__ = "0.1.0"

__all__ = [
    "closed_form",
    "logps",
    "losses",
    "policies",
    "policy_gradient",
    "preferences",
    "relaxations",
    "rollout",
    "tasks",
    "train",
]

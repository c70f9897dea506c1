"""Training loops: each takes a policy, changes its weights, and returns what it measured.

- `supervised`: learn from data that is there: demonstrations, pairs, or pairs for a reward model.
- `on_policy`: learn from completions that the policy itself draws, with a score for each.
- `ppo`: the same, one token at a time, with a value function.
- `tables`: losses of whole tables, without sampling.
- `pair_losses`: which losses the loops on pairs take, and one adapter.
- `steps`: what all loops share, such as the optimiser.

A loop's `progress` is anything that wraps an iterable and shows how far it is: `tqdm`, the
notebooks' `notebook_progress`, or nothing.
"""

from dpo_mini.train.on_policy import fit_online_preferences, fit_reinforce
from dpo_mini.train.pair_losses import Loss, Pairs, without_reference
from dpo_mini.train.ppo import (
    CLIPPED,
    Penalty,
    PPOParts,
    as_they_are,
    fit_ppo,
    no_penalty,
    squared_value_error,
    token_rewards,
)
from dpo_mini.train.steps import History, Score
from dpo_mini.train.supervised import (
    fit_preferences,
    fit_reward_model,
    fit_sft,
)
from dpo_mini.train.tables import fit_table, population_loss

__all__ = [
    "History",
    "Pairs",
    "Loss",
    "Score",
    "Penalty",
    "CLIPPED",
    "fit_sft",
    "fit_preferences",
    "fit_reward_model",
    "fit_reinforce",
    "fit_online_preferences",
    "token_rewards",
    "no_penalty",
    "as_they_are",
    "squared_value_error",
    "PPOParts",
    "fit_ppo",
    "population_loss",
    "fit_table",
    "without_reference",
]


def __dir__() -> list[str]:
    return __all__

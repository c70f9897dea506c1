"""What a type checker says of a user's script: test_types.py reads it, and nothing runs it.

Where a call is wrong the comment beside it must be needed: mypy, strict, reports one that is not.
"""

from functools import partial

import torch

import dpo_mini
from dpo_mini import closed_form, losses, plotting, policies, progress, rollout, tasks, train

generator = torch.Generator().manual_seed(0)
task = tasks.four_answers()
assert task.ref_logps is not None  # a task need not have a table for its reference
log_z: torch.Tensor = closed_form.log_partition(task.ref_logps, task.rewards, 0.5)
dpo = partial(losses.dpo_loss, beta=0.5)
table = train.fit_table(
    lambda logps: train.population_loss(dpo, logps, task.rewards, task.rewards), task.rewards
)
table, offsets = train.fit_table(lambda logps, v: (logps + v).sum(), table, task.rewards)
reviews = tasks.micro_reviews()
policy = policies.TinyTransformer.for_task(reviews, generator=generator, width=64)
reference = policies.TinyTransformer.for_task(reviews, generator=generator)
pairs = reviews.sample_pairs(table, 100, generator=generator)
settings = {"steps": 10, "batch_size": 8, "learning_rate": 1}
history = train.fit_preferences(
    policy,
    reference,
    pairs,
    dpo,
    steps=10,
    batch_size=8,
    learning_rate=1e-3,
    generator=generator,
    progress=progress.notebook_progress("DPO"),
)
last: float = history["loss"][-1]
scores: torch.Tensor = rollout.enumerate_logps(policy, reviews)[0]
n_heads: int = policy.blocks[0].attn.n_heads
fig, ax = plotting.axes("a finding", "KL (nats)", "reward")
ax.plot([0, 1], [0.0, last], **plotting.style("dpo"))
plotting.show(fig, alt="a line")
version: str = dpo_mini.__version__
fig, panels = dpo_mini.plotting.panels(["a"], ["x"], ["y"])  # imported when it is asked for


class MyPolicy:
    """A user's own model is scored and trained if it has these two."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.parameters = model.parameters

    def token_logps(self, prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        return torch.zeros(completions.shape)


train.fit_sft(
    MyPolicy(policy),
    pairs[0],
    pairs[1],
    steps=10,
    batch_size=8,
    learning_rate=1e-3,
    generator=generator,
)

# What is wrong, and is said to be.
losses.dpo_loss(table, table, table, table)  # type: ignore[call-arg]
losses.dpo_loss(table, table, table, table, beta="0.5")  # type: ignore[arg-type]
both: torch.Tensor = train.fit_table(sum, table, table)  # type: ignore[assignment]
closed_form.log_partition(task.ref_logps, 1.0, 0.5)  # type: ignore[arg-type]
closed_form.log_partition(reviews.ref_logps, task.rewards, 0.5)  # type: ignore[arg-type]
dpo_mini.losess  # type: ignore[attr-defined]  # noqa: B018
closed_form.optimal_logprobs  # type: ignore[attr-defined]  # noqa: B018
reviews.sample_pairs(table, 100)  # type: ignore[call-arg]
rollout.sample(reviews, pairs[0], generator=generator)  # type: ignore[arg-type]
train.fit_preferences(policy, reference, pairs[:2], dpo, **settings)  # type: ignore[arg-type]
count: int = history["loss"]  # type: ignore[assignment]
losses._log_odds("logps", table, table)  # type: ignore[call-arg]

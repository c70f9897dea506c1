"""The runs of chapter 10: rewards that can be verified, on tiny sort and tiny sums.

RLOO, GRPO's advantages and MaxRL's climb from the same supervised starts, ten of each task. Only
the advantages differ between them. `success_probs` is exact, so nothing but the training is random.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_mini import policy_gradient as pg
from dpo_mini import rollout, tasks, train
from dpo_mini.policies import TinyTransformer

Run = tuple[str, int]
Progress = Callable[[list[Run]], Iterable[Run]]

ADVANTAGES = {
    "RLOO": pg.leave_one_out_advantages,
    "GRPO": pg.group_normalised_advantages,
    "MaxRL": pg.maxrl_advantages,
}
TASKS = {
    "sort": (tasks.tiny_sort, tasks.tiny_sort_demonstrations),
    "sums": (tasks.tiny_sums, tasks.tiny_sum_demonstrations),
}
STEPS = {"sort": 100, "sums": 200}
EVERY = 20  # steps from one measurement to the next
N_TRIES = 8  # the k of pass@k, and the completions of a group


def make(
    progress: Progress = iter,
    *,
    seeds: Iterable[int] = range(10),
    steps: dict[str, int] = STEPS,
    sft_steps: int = 600,
) -> dict[str, Any]:
    """Train every method from every start.

    Args:
      progress: wraps the list of runs.
      seeds: one supervised start of each task per seed.
      steps: of the policy gradient, for each task in it, a multiple of `EVERY`.
      sft_steps: of the supervised start.
    Returns:
      For each task: `"at"`, the steps at which was measured; `"start"`, for each seed the success
      probabilities of the 20 held-out prompts before the policy gradient; and for each method
      `"end"`, the same after it, and `"pass@1"` and `"pass@8"`, each for the prompts `"training"`
      and `"held-out"`: for each seed the means at each of these steps. Four decimals.
    """
    seeds = list(seeds)
    made: dict[str, Any] = {
        name: {
            "at": list(range(0, steps[name] + 1, EVERY)),
            "start": [],
            **{method: _nothing() for method in ADVANTAGES},
        }
        for name in steps
    }
    for name, seed in progress([(name, seed) for name in steps for seed in seeds]):
        draws = torch.Generator().manual_seed(seed)
        task, start = TASKS[name][0](), supervised_start(name, generator=draws, steps=sft_steps)
        made[name]["start"].append(_rounded(success_probs(start, task)[tasks.held_out_prompts()]))
        for method, advantages in ADVANTAGES.items():
            policy = copy.deepcopy(start)
            measured: list[Tensor] = []
            climb(
                policy,
                task,
                advantages,
                steps=steps[name],
                generator=torch.Generator().manual_seed(1000 + seed),
                progress=partial(_measuring, policy, task, measured),
            )
            _keep(made[name][method], torch.stack(measured))
    return made


def supervised_start(
    name: str,
    *,
    generator: torch.Generator,
    steps: int = 600,
    progress: Callable[[range], Iterable[int]] = iter,
) -> TinyTransformer:
    """A policy for the task "sort" or "sums", fitted to 4,000 of its demonstrations."""
    make_task, demonstrations = TASKS[name]
    shown = demonstrations(4000, generator=generator)
    policy = TinyTransformer.for_task(make_task(), generator=generator)
    train.fit_sft(
        policy,
        *shown,
        steps=steps,
        batch_size=128,
        learning_rate=3e-3,
        generator=generator,
        progress=progress,
    )
    return policy


def climb(
    policy: TinyTransformer,
    task: tasks.Task,
    advantages: Callable[[Tensor], Tensor],
    *,
    steps: int,
    generator: torch.Generator,
    learning_rate: float = 1e-3,
    progress: Callable[[range], Iterable[int]] = iter,
) -> None:
    """Policy gradient on the training prompts, in place: 16 prompts with 8 completions per step.

    There is no KL term, and each completion is used once.
    """
    prompts = tasks.training_prompts().to(generator.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    for _ in progress(range(steps)):
        order = torch.randperm(len(prompts), generator=generator, device=generator.device)
        asked = prompts[order[:16]].repeat_interleave(N_TRIES)
        answers = rollout.sample(policy, asked, generator=generator)
        rewards = task.rewards[asked, task.index(answers)].view(16, N_TRIES)
        logps = policy.logps(asked, answers)
        loss = pg.reinforce_loss(logps, advantages(rewards).flatten()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def success_probs(policy: TinyTransformer, task: tasks.Task) -> Tensor:
    """Of every prompt the probability of the one completion that is right, `[X]`: exact."""
    right = task.completions[task.rewards.argmax(1)]
    with torch.no_grad():
        return policy.logps(task.prompts, right).exp()


def pass_at(probs: Tensor, n_tries: int) -> Tensor:
    """The probability that one of `n_tries` completions is right, of the shape of `probs`."""
    return 1 - (1 - probs) ** n_tries


def _measuring(
    policy: TinyTransformer, task: tasks.Task, measured: list[Tensor], steps: range
) -> Iterator[int]:
    """The `steps`, and between them, every 20, what the policy has learnt so far."""
    for step in steps:
        if step % EVERY == 0:
            measured.append(success_probs(policy, task))
        yield step
    measured.append(success_probs(policy, task))


def _nothing() -> dict[str, Any]:
    measures: dict[str, Any] = {f"pass@{k}": {"training": [], "held-out": []} for k in (1, N_TRIES)}
    return {"end": [], **measures}


def _keep(method: dict[str, Any], probs: Tensor) -> None:
    """Add a run's success probabilities `[M, X]`, of M measurements."""
    held_out = tasks.held_out_prompts()
    method["end"].append(_rounded(probs[-1, held_out]))
    for which, prompts in (("training", tasks.training_prompts()), ("held-out", held_out)):
        for k in (1, N_TRIES):
            means = pass_at(probs[:, prompts], k).mean(1)
            method[f"pass@{k}"][which].append(_rounded(means))


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def __dir__() -> list[str]:
    return ["make"]

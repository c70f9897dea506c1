"""PPO with one detail changed at a time, at three betas, when ill, and on a learned reward.

Chapter 08 shows what `make` returns. All distances are KL(pi_theta || pi*) in nats, by enumeration,
and each is a mean over the four prompts. Micro-reviews of at most three words serve for the
details, of at most five for the rest.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_mini import closed_form, policies, rollout, tasks, train
from dpo_mini import policy_gradient as pg

Progress = Callable[[list[Any]], Iterable[Any]]

SEEDS = tuple(range(1, 6))
SHORT_STEPS, LONG_STEPS = 40, 120
BETAS = {2.0: 200, 1.0: 200, 0.5: 300}
"""Each beta, and the steps that PPO takes there."""


def seeded(seed: int) -> torch.Generator:
    """A new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


class Setting(NamedTuple):
    """Micro-reviews, the reference, the demonstrations that it is fitted to, and the generator."""

    task: tasks.Task
    reference: policies.TinyTransformer
    demos: tuple[Tensor, Tensor]
    generator: torch.Generator


def long_task() -> Setting:
    """The setting of chapter 08; its generator goes on to draw the pairs of the reward model."""
    task, g = tasks.micro_reviews(), seeded(0)
    demos = tasks.micro_review_demonstrations(8000, generator=g)
    reference = policies.TinyTransformer.for_task(task, n_layers=1, generator=g)
    options: dict[str, Any] = {"steps": 300, "batch_size": 256, "learning_rate": 1e-2}
    train.fit_sft(reference, *demos, generator=g, **options)
    return Setting(task, reference, demos, g)


def three_words(task: tasks.Task) -> tasks.Task:
    """The task with at most three words; an unended review has the reward of its words."""
    three = tasks.enumerate_completions(task.vocab_size, 3, task.end_token)
    padded = torch.full((len(three), 5), -1)
    padded[:, :3] = three
    padded[(three > 0).all(1), 3] = tasks.REVIEW_WORDS.index("<end>")
    rewards = task.rewards[:, task.index(padded)]
    return tasks.Task(task.prompt_texts, task.vocabulary, 3, task.end_token, rewards)


def short_reference(short: tasks.Task, demos: tuple[Tensor, Tensor]) -> policies.TinyTransformer:
    """A smaller transformer, fitted to the first three words of the demonstrations."""
    g = seeded(7)
    small = policies.TinyTransformer.for_task(short, n_layers=1, n_heads=2, width=16, generator=g)
    options: dict[str, Any] = {"steps": 150, "batch_size": 256, "learning_rate": 1e-2}
    train.fit_sft(small, demos[0], demos[1][:, :3], generator=g, **options)
    return small


def tables(
    task: tasks.Task, reference: policies.TinyTransformer, beta: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[X, Y]` of the reference and of pi*."""
    with torch.no_grad():
        ref_logps = rollout.enumerate_logps(reference, task)
    return ref_logps, closed_form.optimal_logps(ref_logps, task.rewards, beta)


def true_score(task: tasks.Task) -> train.Score:
    """The true reward of completions, as `fit_ppo` asks for it."""
    return lambda prompts, completions: task.rewards[prompts, task.index(completions)]


def separate(policy: policies.TinyTransformer, short: tasks.Task) -> policies.SeparateNetworks:
    """The value function as a transformer of its own."""
    body = policies.TinyTransformer.for_task(
        short, n_layers=1, n_heads=2, width=16, generator=seeded(9)
    )
    return policies.SeparateNetworks(policy, policies.ScalarTransformer(body))


def on_first(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """The score on the first token instead of the last."""
    rewards = train.token_rewards(0 * scores, penalties, mask)
    rewards[:, 0] += scores
    return rewards


def details(short: tasks.Task, target: float) -> dict[str, dict[str, Any]]:
    """What each row of the table changes in `fit_ppo`; `target` is the KL of pi* from pi_ref."""

    def parts(**changed: Any) -> dict[str, Any]:
        return {"parts": train.PPOParts(**changed)}

    in_loss = {"reward_penalty": train.no_penalty, "normalise": train.as_they_are}
    clipped_values = partial(pg.clipped_value_loss, clip_eps=0.2)
    return {
        "everything on": {},
        "lambda = 1": {"lam": 1.0},
        "lambda = 0": {"lam": 0.0},
        "no value function": {"value_weight": 0.0},
        "separate networks": {"make": partial(separate, short=short)},
        "values clipped at 0.2": parts(value_error=clipped_values),
        "not whitened": parts(normalise=train.as_they_are),
        "no clip": parts(surrogate=pg.unclipped_surrogate_loss),
        "one epoch": {"n_epochs": 1},
        "entropy bonus 0.05": {"entropy_weight": 0.05},
        "score on the first token": parts(assign=on_first),
        "adaptive beta from 0.5": {"beta": partial(pg.AdaptiveKLController, 0.5, target, 2000)},
        "k3 in the reward": parts(reward_penalty=pg.kl_k3),
        "k2 in the loss": parts(**in_loss, loss_penalty=pg.kl_k2),
        "k3 in the loss": parts(**in_loss, loss_penalty=pg.kl_k3),
        "k1 in the loss": parts(**in_loss, loss_penalty=pg.kl_k1),
        "no KL at all": parts(**in_loss),
    }


def run_detail(
    short: tasks.Task,
    small: policies.TinyTransformer,
    best: Tensor,
    *,
    seed: int,
    steps: int,
    make: Callable[[policies.TinyTransformer], Any] = policies.SharedTrunk,
    beta: Callable[[], Any] = lambda: 0.5,
    **options: Any,
) -> float:
    """KL(pi_theta || pi*) after PPO on reviews of three words."""
    policy = copy.deepcopy(small)
    options = {"batch_size": 128, "learning_rate": 7e-3, **options}
    train.fit_ppo(
        make(policy), small, short.prompts, true_score(short), beta=beta(), steps=steps,
        generator=seeded(seed), **options,
    )  # fmt: skip
    with torch.no_grad():
        return closed_form.kl(rollout.enumerate_logps(policy, short), best).mean().item()


CURVES = ("reward", "kl", "entropy", "clipped", "value_loss", "explained_variance")
"""What of a run is kept as a curve, of every third batch."""


def health(history: dict[str, list[float]]) -> dict[str, Any]:
    """What tells an ill run from a healthy one: means of the last ten batches, largest, curves."""
    ends = {name: sum(values[-10:]) / 10 for name, values in history.items() if name != "beta"}
    curves = {name: [round(value, 4) for value in history[name][::3]] for name in CURVES}
    return {**ends, "largest": {name: max(history[name]) for name in CURVES}, "curves": curves}


def reward_model(task: tasks.Task, ref_logps: Tensor, g: torch.Generator) -> policies.RewardModel:
    """A reward model fitted to 2,000 pairs from the reference."""
    pairs = task.sample_pairs(ref_logps, 2_000, generator=g)
    model = policies.RewardModel.for_task(task, n_layers=1, generator=g)
    options: dict[str, Any] = {"steps": 200, "batch_size": 500, "learning_rate": 8e-3}
    train.fit_reward_model(model, pairs, generator=g, **options)
    return model


def place(logps: Tensor, ref_logps: Tensor, rewards: tuple[Tensor, ...]) -> list[float]:
    """Root of the KL from the reference, and by how much the mean of each reward is above its."""
    nats, change = closed_form.kl(logps, ref_logps).mean(), logps.exp() - ref_logps.exp()
    return [nats.sqrt().item(), *((change * r).sum(1).mean().item() for r in rewards)]


def sweep(
    task: tasks.Task, ref_logps: Tensor, model: policies.RewardModel
) -> dict[str, list[float]]:
    """Where the true reward of a learned reward's exact optimum is highest, and at beta 1/128."""
    rewards = rollout.enumerate_rewards(model, task), task.rewards
    betas = [2.0**k for k in (1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -4, -5, -6, -7)]
    optima = (closed_form.optimal_logps(ref_logps, rewards[0], beta) for beta in betas)
    places = [place(logps, ref_logps, rewards) for logps in optima]
    return {"peak": max(places, key=lambda each: each[2]), "end": places[-1]}


def chase(
    task: tasks.Task,
    reference: policies.TinyTransformer,
    ref_logps: Tensor,
    model: policies.RewardModel,
    *,
    seed: int,
    steps: int = 100,
) -> list[list[float]]:
    """PPO on the learned reward: every ten steps [root of KL, learned reward, true reward].

    Both rewards are means of the policy minus means of the reference.
    """
    learned, policy, path = rollout.enumerate_rewards(model, task), copy.deepcopy(reference), []

    def every_ten(numbers: range) -> Iterator[int]:
        for number in numbers:
            yield number
            if number % 10 == 9:
                with torch.no_grad():
                    logps = rollout.enumerate_logps(policy, task)
                path.append(place(logps, ref_logps, (learned, task.rewards)))

    def score(prompts: Tensor, completions: Tensor) -> Tensor:
        return rollout.shared_prefix_rewards(model, prompts, completions)

    train.fit_ppo(
        policies.SharedTrunk(policy), reference, task.prompts, score, beta=0.05, steps=steps,
        batch_size=256, learning_rate=8e-3, generator=seeded(seed), progress=every_ten,
    )  # fmt: skip
    return path


def make(progress: Progress = iter) -> dict[str, Any]:
    """All runs anew, as chapter 08 shows them."""
    task, reference, demos, g = long_task()
    short = three_words(task)
    small = short_reference(short, demos)
    short_ref, best = tables(short, small, 0.5)
    target = closed_form.kl(best, short_ref).mean().item()
    rows = details(short, target)
    result: dict[str, Any] = {
        "untrained": closed_form.kl(short_ref, best).mean().item(),
        "details": {name: {"short": [], "long": []} for name in rows},
        "betas": {f"{beta:g}": [] for beta in BETAS},
        "health": {"healthy": [], "learning rate 0.2": [], "no clip": []},
        "chase": [],
        "models": [],
    }
    jobs: list[tuple[Callable[[], Any], list[Any]]] = []
    for name, options in rows.items():
        for length, steps in (("short", SHORT_STEPS), ("long", LONG_STEPS)):
            for seed in SEEDS:
                one = partial(run_detail, short, small, best, seed=seed, steps=steps, **options)
                jobs.append((one, result["details"][name][length]))

    ref_logps, _ = tables(task, reference, 1.0)
    score = true_score(task)

    def on_long(beta: float, seed: int, **options: Any) -> tuple[float, dict[str, list[float]]]:
        policy = copy.deepcopy(reference)
        options = {"batch_size": 512, "learning_rate": 5e-3, **options}
        history = train.fit_ppo(
            policies.SharedTrunk(policy), reference, task.prompts, score, beta=beta,
            generator=seeded(seed), **options,
        )  # fmt: skip
        optimum = closed_form.optimal_logps(ref_logps, task.rewards, beta)
        with torch.no_grad():
            logps = rollout.enumerate_logps(policy, task)
        return closed_form.kl(logps, optimum).mean().item(), history

    def of_health(seed: int, **options: Any) -> dict[str, Any]:
        left, history = on_long(1.0, seed, steps=150, batch_size=256, **options)
        return {"distance": left, **health(history)}

    def of_beta(beta: float, seed: int) -> float:
        return on_long(beta, seed, steps=BETAS[beta])[0]

    def of_model(seed: int) -> dict[str, list[float]]:
        return sweep(task, ref_logps, reward_model(task, ref_logps, seeded(100 + seed)))

    for beta in BETAS:
        jobs += [(partial(of_beta, beta, seed), result["betas"][f"{beta:g}"]) for seed in SEEDS]
    unclipped = {"parts": train.PPOParts(surrogate=pg.unclipped_surrogate_loss)}
    ills: tuple[dict[str, Any], ...] = ({}, {"learning_rate": 0.2}, unclipped)
    for (_, found), options in zip(result["health"].items(), ills, strict=True):
        for seed in SEEDS:
            jobs.append((partial(of_health, seed, **options), found))
    model = reward_model(task, ref_logps, g)
    for seed in SEEDS:
        run = partial(chase, task, reference, ref_logps, model, seed=seed)
        jobs.append((run, result["chase"]))
    jobs += [(partial(of_model, seed), result["models"]) for seed in SEEDS]
    for run, found in progress(jobs):
        found.append(run())
    return result

"""How fast the course draws completions and takes steps of PPO and DPO, beside the usual libraries.

Run `python benchmarks/training.py` where the package is installed. It takes about five minutes on
one thread, needs `transformers` and `tqdm`, and prints the tables of RESULTS.md; the names of parts
(`sampling`, `ppo`, `dpo`, `reading`, `race`) print these alone. DPO is compared with `trl` 1.16.0,
which `requirements.txt` installs. PPO is compared with `trl` 1.10.0, which still has it
(as `trl.experimental.ppo`); that package alone is put before the other. Without `trl` its row is
left out.

    python benchmarks/training.py dpo race
    python -m pip install --no-deps --target _build/trl-1.10.0 trl==1.10.0
    PYTHONPATH=_build/trl-1.10.0 python benchmarks/training.py sampling ppo

`--trl` names the Python of another environment that has it, and torch, transformers and tqdm.

The third comparison, one exact gradient, is in `enumeration.py`.

All contenders compute in float32, in one shape and from the same weights, and take turns. A time is
a median, in seconds of processor time, to which other work on the machine adds little. What a step
frees, it keeps for the next one: see `keep_freed_memory`. With
`--device cuda` it is a median in seconds on the wall, each call waiting for the device.
"""

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from enumeration import (
    HEADS,
    cpu_model,
    keep_freed_memory,
    make_gpt2,
    make_policy,
    name_in_gpt2,
)
from torch import Tensor, nn
from tqdm import tqdm

from dpo_mini import closed_form, rollout, train
from dpo_mini.logps import PAD
from dpo_mini.losses import dpo_loss
from dpo_mini.policies import ScalarTransformer, SeparateNetworks, SharedTrunk, TinyTransformer
from dpo_mini.policy_gradient import clipped_value_loss
from dpo_mini.rollout import scoring
from dpo_mini.tasks import Task, micro_review_demonstrations, micro_reviews

ROWS, ROUNDS = 1024, 31  # completions a call, and calls of each contender
PAIRS, PAIR_ROUNDS = 100_000, 7
BATCH, EPOCHS = 256, 4  # of an iteration of PPO: completions, and steps of Adam on all of them
ITERATIONS, WARM_UP, BLOCKS = 23, 3, 3  # a block is one training; its first iterations warm up
BETA, LEARNING_RATE, CLIP = 0.5, 1e-3, 0.2
PAIR_BATCH, WORDS, PROMPT_LENGTH, LENGTH = 64, 32, 4, 8  # of a step of DPO; lengths in tokens
DPO_SHAPES = [(2, 64), (4, 128)]  # layers and width; four heads
DPO_STEPS, DPO_BLOCKS, DPO_BETA = 23, 6, 0.1  # a block is one training, and warms up too
READ, READ_LENGTHS, READ_DISTINCT, READ_ROUNDS = 256, [5, 8, 16, 32], [256, 128, 64, 32], 5
RACE = {"steps": 300, "batch_size": 1024, "learning_rate": 8e-3}  # as chapter 06 trains
RACE_PAIRS, RACE_BETA, RACE_KL, RACE_EVERY, RACE_SEEDS = 100_000, 2.0, 0.05, 10, 2
FASTEST = {"attention": "sdpa", "activation": "gelu_pytorch_tanh"}  # enumeration.py says so
AS_IT_COMES = {"attention": "sdpa", "activation": "gelu_new"}  # what `GPT2Config` sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["sampling", "ppo", "dpo", "reading", "race"]
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(names)}; all if none")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    parser.add_argument("--trl", default=sys.executable, help="a Python that has trl")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)  # folder and seed: be trl
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    task = micro_reviews()
    task = replace(task, rewards=task.rewards.float().to(options.device))
    if options.peer:
        folder, seed = options.peer
        print(json.dumps(run_trl(task, Path(folder), int(seed))))
        return
    print(f"{device_name(options.device)}; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; float32\n")
    parts = options.parts or names
    if {"sampling", "ppo"} & set(parts):
        policy = fit_reference(task)
    if "sampling" in parts:
        report_sampling(policy)
        report_pairs(task, policy)
    if "ppo" in parts:
        report_ppo(task, policy, options.trl)
    if "dpo" in parts:
        for n_layers, width in DPO_SHAPES:
            report_dpo(n_layers, width, torch.device(options.device))
    if "reading" in parts:
        for dtype in (torch.float32, torch.float64):
            report_reading(dtype, torch.device(options.device))
    if "race" in parts:
        report_race(replace(task, rewards=task.rewards.cpu()))


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, one thread" if device == "cpu" else f"{platform.machine()}, {device}"


def fit_reference(task: Task) -> TinyTransformer:
    """The policy that micro-reviews start from: a transformer fitted to demonstrations."""
    policy = make_policy(task)
    generator = torch.Generator().manual_seed(0)
    rows = micro_review_demonstrations(20_000, generator=generator)
    settings = {"steps": 300, "batch_size": 256, "learning_rate": 5e-3, "generator": generator}
    train.fit_sft(policy, *rows, **settings, progress=partial(tqdm, desc="reference", leave=False))
    return policy.to(task.rewards.device)


# --- sampling --------------------------------------------------------------------------------


def report_sampling(fitted: TinyTransformer) -> None:
    device = fitted.wte.weight.device
    policies = {"micro-reviews, fitted": fitted}
    for vocab_size, max_tokens in [(12, 5), (32, 8)]:
        sizes = {"vocab_size": vocab_size, "max_tokens": max_tokens, "end_token": None}
        sizes = SimpleNamespace(prompts=torch.arange(1), **sizes)
        policies[f"untrained, V = {vocab_size}, T = {max_tokens}"] = make_policy(sizes).to(device)
    print(f"{ROWS:,} completions from a live policy: milliseconds\n")
    print("| policy | distinct prefixes, of tokens | `rollout.sample` | `generate` | ratio |")
    print("|---|---|---|---|---|")
    for name, policy in policies.items():
        prompts = torch.arange(ROWS, device=device) % policy.n_prompts
        generator = torch.Generator(device).manual_seed(1)
        draws = {
            "ours": partial(rollout.sample, policy, prompts, generator=generator),
            "theirs": generate(policy, prompts),
        }
        check_draws(policy, prompts, draws)
        prefixes = [prompts[:, None], draws["ours"]()[:, :-1]]
        prefixes = torch.cat(prefixes, 1)
        ours, theirs = median_times(draws, ROUNDS, name, device).values()
        print(f"| {name} | {count_distinct(prefixes):,} of {(prefixes != PAD).sum():,} ", end="")
        print(f"| {1e3 * ours:.1f} | {1e3 * theirs:.1f} | {theirs / ours:.2f} |")
    print()


def generate(policy: TinyTransformer, prompts: Tensor) -> Callable[[], Tensor]:
    """`transformers` draws with its cache on; its output, made to look like `rollout.sample`'s."""
    model = answer_in_words(make_gpt2(policy, **FASTEST), policy).to(prompts.device)
    model.generation_config.eos_token_id = policy.end_token  # it fills in what the next one lacks
    config = transformers.GenerationConfig(
        max_new_tokens=policy.max_tokens,
        do_sample=True,
        top_k=0,
        use_cache=True,
        eos_token_id=policy.end_token,
        pad_token_id=policy.vocab_size,  # some token that no policy says
    )
    queries = prompts[:, None] + policy.vocab_size
    seen = {"attention_mask": torch.ones_like(queries), "generation_config": config}

    def draw() -> Tensor:
        completions = model.generate(queries, **seen)[:, 1:]
        return completions.masked_fill(completions == policy.vocab_size, PAD)

    return draw


def answer_in_words(
    model: transformers.GPT2LMHeadModel, policy: TinyTransformer
) -> transformers.GPT2LMHeadModel:
    """Outputs for the words alone, as the policy's: GPT-2 would also say prompts."""
    model.lm_head = nn.Linear(policy.wte.embedding_dim, policy.vocab_size, bias=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(policy.wte.weight[: policy.vocab_size])
    return model


def check_draws(policy: TinyTransformer, prompts: Tensor, draws: dict[str, Callable]) -> None:
    """Both draw from one distribution: their mean log-probabilities agree within 5 errors."""
    with torch.no_grad():
        logps = [policy.logps(prompts, draw()) for draw in draws.values()]
    error = sum(each.var() / len(each) for each in logps).sqrt()
    if (difference := (logps[0].mean() - logps[1].mean()).abs()) > 5 * error:
        raise SystemExit(f"the two samplers differ by {difference / error:.1f} standard errors")


def count_distinct(prefixes: Tensor) -> int:
    """Of `prefixes` `[B, S]` padded with `PAD`, and all that they begin with."""
    counts = []
    for length in range(1, prefixes.shape[1] + 1):
        going_on = prefixes[prefixes[:, length - 1] != PAD, :length]
        counts.append(len(going_on.unique(dim=0)))
    return sum(counts)


@torch.no_grad()
def report_pairs(task: Task, policy: TinyTransformer) -> None:
    """From a frozen policy all pairs come out of one table."""
    table = rollout.enumerate_logps(policy, task)
    generator = torch.Generator(table.device).manual_seed(1)
    runs = {
        "table": lambda: rollout.enumerate_logps(policy, task),
        "pairs": lambda: task.sample_pairs(table, PAIRS, generator=generator),
    }
    seconds = median_times(runs, PAIR_ROUNDS, "pairs", table.device)
    print(f"From a frozen policy's table of {table.numel():,} completions: {PAIRS:,} pairs in")
    print(f"{seconds['pairs']:.3f} s, after {seconds['table']:.2f} s for the table.\n")


# --- PPO -------------------------------------------------------------------------------------


def report_ppo(task: Task, policy: TinyTransformer, python: str) -> None:
    contenders = {
        "`fit_ppo`, `SharedTrunk`": partial(run_ours, task, policy, SharedTrunk),
        "`fit_ppo`, `SeparateNetworks`": partial(run_ours, task, policy, with_critic),
    }
    command = [python, "-c", "import trl.experimental.ppo; print(trl.__version__)"]
    version = subprocess.run(command, capture_output=True, text=True)
    if version.returncode:
        print(f"trl is left out: {version.stderr.strip().splitlines()[-1]}\n")
    else:
        peer = f"trl {version.stdout.strip()}, `PPOTrainer`"
        contenders[peer] = partial(ask_trl, policy, python)
    seconds = {name: [] for name in contenders}
    rewards = {name: [] for name in contenders}
    for seed in tqdm(range(BLOCKS), desc="blocks of PPO", leave=False):
        for name, run in contenders.items():
            times, scores = run(seed=seed)
            seconds[name] += times[WARM_UP:]
            rewards[name].append(scores)
    medians = {name: median(times) for name, times in seconds.items()}
    slowest = max(medians.values())
    print(f"An iteration of PPO: {BATCH} completions, {EPOCHS} epochs of one step\n")
    print("| trained by | ms | completions a second | ratio | reward, first to last |")
    print("|---|---|---|---|---|")
    for name, each in medians.items():
        first, last = (fmean(scores[end] for scores in rewards[name]) for end in (0, -1))
        print(f"| {name} | {1e3 * each:.1f} | {BATCH / each:,.0f} | {slowest / each:.2f} ", end="")
        print(f"| {first:.2f} to {last:.2f} |")
    print()


def with_critic(policy: TinyTransformer) -> SeparateNetworks:
    return SeparateNetworks(policy, ScalarTransformer(deepcopy(policy)))


def run_ours(
    task: Task, policy: TinyTransformer, make_actor_critic: Callable, seed: int
) -> tuple[list[float], list[float]]:
    """Seconds of each iteration, and the mean reward of its completions."""
    device = task.rewards.device
    times = []
    history = train.fit_ppo(
        make_actor_critic(deepcopy(policy)),
        policy,
        task.prompts,
        partial(score, task),
        beta=BETA,
        steps=ITERATIONS,
        batch_size=BATCH,
        n_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        generator=torch.Generator(device).manual_seed(seed),
        parts=train.PPOParts(value_error=partial(clipped_value_loss, clip_eps=CLIP)),
        progress=partial(clocked, times=times, device=device),
    )
    return times, history["reward"]


def score(task: Task, prompts: Tensor, completions: Tensor) -> Tensor:
    return task.rewards[prompts, task.index(completions)]


def clocked(steps: range, times: list[float], device: torch.device) -> Iterator[int]:
    for step in steps:
        start = clock(device)
        yield step
        times.append(clock(device) - start)


def ask_trl(policy: TinyTransformer, python: str, seed: int) -> tuple[list[float], list[float]]:
    """`run_trl` in a process of the other environment, from the same weights."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(policy.state_dict(), Path(folder, "policy.pt"))
        device = policy.wte.weight.device.type
        command = [python, str(here), "--peer", folder, str(seed), "--device", device]
        paths = os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
    if run.returncode:
        raise SystemExit(f"trl failed:\n{run.stderr}")
    return tuple(json.loads(run.stdout.splitlines()[-1]))


class TrueReward(nn.Module):
    """A function where trl takes a reward model: no network, the score in each position."""

    base_model_prefix = "read"

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.score = task, nn.Identity()

    def read(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        prompts = input_ids[:, 0] - self.task.vocab_size
        completions = input_ids[:, 1:].masked_fill(~attention_mask[:, 1:], PAD)
        scores = score(self.task, prompts, completions)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])


def run_trl(task: Task, folder: Path, seed: int) -> tuple[list[float], list[float]]:
    """The same training by trl, without checkpoints, reports, samples or progress bars.

    Nothing is made slower than its interface asks for: the same function scores completions where
    it takes a reward model; one forward pass covers all of them, in sampling as in training;
    activations are kept for the backward pass; what was there before the training is hidden from
    the garbage collector, which trl calls twice an iteration.
    """
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    device = task.rewards.device
    policy = make_policy(task)
    policy.load_state_dict(torch.load(folder / "policy.pt", map_location="cpu"))
    model = answer_in_words(make_gpt2_for_trl(policy), policy)
    critic = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(**{**model.config.to_dict(), "num_labels": 1})
    )
    critic.transformer = deepcopy(model.transformer)
    nn.init.zeros_(critic.score.weight)
    pad = task.vocab_size + len(task.prompts)
    options = PPOConfig(
        output_dir=str(folder),
        total_episodes=ITERATIONS * BATCH,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=BATCH,
        response_length=task.max_tokens,
        stop_token_id=task.end_token,
        temperature=1.0,
        seed=seed,
        kl_coef=BETA,
        cliprange=CLIP,
        cliprange_value=CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        num_sample_generations=0,
        dataloader_pin_memory=False,
    )
    weights = [*model.parameters(), *critic.parameters()]
    times = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            gc.collect()
            gc.freeze()
            self.start = clock(device)

        def on_step_end(self, *_: object, **__: object) -> None:
            now = clock(device)
            times.append(now - self.start)
            self.start = now

    queries = [{"input_ids": [task.vocab_size + x]} for x in task.prompts.tolist()]
    trainer = PPOTrainer(
        args=options,
        processing_class=SimpleNamespace(pad_token_id=pad, eos_token_id=task.end_token),
        model=model,
        ref_model=deepcopy(model),
        reward_model=TrueReward(task),
        value_model=critic,
        train_dataset=queries * (BATCH // len(queries)),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        optimizers=adam(weights, ITERATIONS, LEARNING_RATE),
        callbacks=[Clock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    scores = [line["objective/scores"] for line in trainer.state.log_history]
    return times, scores


def make_gpt2_for_trl(
    policy: TinyTransformer, attention: str = "sdpa", activation: str = "gelu_pytorch_tanh"
) -> transformers.GPT2LMHeadModel:
    """The policy with a padding token after all others, and a position for the last word."""
    padding = torch.full_like(policy.prompt_tokens[:1], policy.wte.num_embeddings)
    larger = TinyTransformer(
        *(1, policy.vocab_size, policy.max_tokens + 1),
        end_token=policy.end_token,
        prompt_tokens=padding.cpu(),
        n_layers=len(policy.blocks),
        n_heads=HEADS,
        width=policy.wte.embedding_dim,
        generator=torch.Generator().manual_seed(0),
    )
    weights = larger.state_dict()
    for name, weight in policy.state_dict().items():
        weights[name][tuple(map(slice, weight.shape))] = weight
    larger.load_state_dict(weights)
    return make_gpt2(larger, attention, activation)


def adam(
    weights: list[nn.Parameter], steps: int, learning_rate: float
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """The Adam, warm-up and cosine of `train`, so that all should learn as fast."""
    optimizer = torch.optim.Adam(weights, lr=learning_rate, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    return optimizer, schedule


# --- DPO -------------------------------------------------------------------------------------

Pairs = tuple[Tensor, Tensor, Tensor]
Run = tuple[list[float], list[float]]  # seconds and loss of each step


def report_dpo(n_layers: int, width: int, device: torch.device) -> None:
    """Steps of DPO on as many prompts of 4 tokens as there are pairs."""
    generator = torch.Generator().manual_seed(0)
    n_pairs = PAIR_BATCH * DPO_STEPS
    read = torch.randint(WORDS, (n_pairs, PROMPT_LENGTH), generator=generator)
    policy, reference = (
        TinyTransformer(
            *(n_pairs, WORDS, LENGTH),
            end_token=None,
            prompt_tokens=read,
            n_layers=n_layers,
            n_heads=HEADS,
            width=width,
            generator=generator,
        ).to(device)
        for _ in range(2)
    )
    answers = torch.randint(WORDS, (2, n_pairs, LENGTH), generator=generator)
    pairs = (torch.arange(n_pairs, device=device), *answers.to(device))
    contenders = {
        "`fit_preferences`, `TinyTransformer`": partial(step_ours, policy, reference),
        "a bare loop, transformers' GPT-2": partial(step_gpt2, policy, reference),
    }
    if (trl := import_trl()) is not None:
        name = f"trl {trl}, `DPOTrainer`"
        contenders[f"{name}, made fast"] = partial(step_trl, policy, reference, FASTEST, list)
        contenders[name] = partial(step_trl, policy, reference, AS_IT_COMES, make_dataset)
    check_losses(contenders, pairs)
    contenders["the matrix products alone"] = partial(multiply, n_layers, width, device)
    seconds = {name: [] for name in contenders}
    for _ in tqdm(range(DPO_BLOCKS), desc="blocks of DPO", leave=False):
        for name, run in contenders.items():
            seconds[name] += run(pairs, DPO_STEPS)[0][WARM_UP:]
    medians = {name: median(times) for name, times in seconds.items()}
    slowest, ceiling = max(medians.values()), medians["the matrix products alone"]
    print(f"A step of DPO: {n_layers} layers, width {width}, {PAIR_BATCH} pairs\n")
    print("| steps taken by | ms | steps a second | ratio | share of the ceiling |")
    print("|---|---|---|---|---|")
    for name, each in medians.items():
        print(f"| {name} | {1e3 * each:.1f} | {1 / each:.1f} | {slowest / each:.2f} ", end="")
        print(f"| {ceiling / each:.2f} |")
    print()


@torch.no_grad()
def reference_logps(reference: TinyTransformer, pairs: Pairs) -> list[Tensor]:
    """Chosen and rejected, `[n]` each."""
    prompts, *both = pairs
    return [reference.logps(prompts, each) for each in both]


def check_losses(contenders: dict[str, Callable[[Pairs, int], Run]], pairs: Pairs) -> None:
    """From the same weights, three steps on one batch: the same losses, so the same gradients."""
    batch = tuple(column[:PAIR_BATCH] for column in pairs)
    losses = {name: run(batch, 3)[1] for name, run in contenders.items()}
    first = next(iter(losses.values()))
    for name, each in losses.items():
        if max(abs(a - b) for a, b in zip(first, each, strict=True)) > 1e-5:
            raise SystemExit(f"{name}: losses {each}, where ours are {first}")


def step_ours(policy: TinyTransformer, reference: TinyTransformer, pairs: Pairs, steps: int) -> Run:
    times = []
    history = train.fit_preferences(
        deepcopy(policy),
        reference,
        pairs,
        partial(dpo_loss, beta=DPO_BETA),
        steps=steps,
        batch_size=PAIR_BATCH,
        learning_rate=LEARNING_RATE,
        generator=torch.Generator().manual_seed(0),
        progress=partial(clocked, times=times, device=policy.wte.weight.device),
    )
    return times, history["loss"]


def step_gpt2(policy: TinyTransformer, reference: TinyTransformer, pairs: Pairs, steps: int) -> Run:
    """As short as such a loop can be; it checks and records nothing but the loss."""
    device = policy.wte.weight.device
    model = answer_with_embedding(make_gpt2(policy, **FASTEST), policy).to(device).train()
    optimizer, schedule = adam(list(model.parameters()), steps, LEARNING_RATE)
    prompts, chosen, rejected = pairs
    ref_chosen, ref_rejected = reference_logps(reference, pairs)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).to(device)
    times, losses = [], []
    for step in clocked(range(steps), times, device):
        rows = order.split(PAIR_BATCH)[step % (len(order) // PAIR_BATCH)]
        answers = torch.cat([chosen[rows], rejected[rows]])
        read = torch.cat([policy.prompt_tokens[prompts[rows]].repeat(2, 1), answers[:, :-1]], 1)
        logits = model(read, logits_to_keep=LENGTH).logits
        logps = logits.log_softmax(-1).gather(-1, answers.unsqueeze(-1)).sum((1, 2))
        chosen_logps, rejected_logps = logps.chunk(2)
        margins = chosen_logps - rejected_logps - (ref_chosen - ref_rejected)[rows]
        loss = -nn.functional.logsigmoid(DPO_BETA * margins).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return times, losses


def multiply(
    n_layers: int,
    width: int,
    device: torch.device,
    _: Pairs,
    steps: int,
) -> Run:
    """The products of such a step, forward and backward, and nothing between them: the ceiling.

    What a pair shares is read once: 4 tokens of the prompt and twice 7 of the answers, whose last
    token is not read. With N = 64 x 18 rows, heads of size d and 4 heads x 64 rows, a layer is

        [N, D] x [D, 3 D]     queries, keys and values      [18, d] x [d, 18]    scores, 256 times
        [N, D] x [D, D]       after the attention           [18, 18] x [18, d]   values, 256 times
        [N, D] x [D, 4 D]     and [N, 4 D] x [4 D, D]       the network

    and the words are one more, [64 x 15, D] x [D, 32]. Each has two of its size on the way back,
    for its left and its right factor. What is no product is left out: where a softmax, a sum or a
    copy would stand between two of them, any matrix of the right shape goes on.
    """
    n_tokens = PROMPT_LENGTH + 2 * (LENGTH - 1)
    n_rows, n_said = PAIR_BATCH * n_tokens, PAIR_BATCH * (1 + 2 * (LENGTH - 1))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:  # so scaled that what goes on stays of one size
        return (torch.randn(shape, generator=generator) / shape[-2] ** 0.5).to(device)

    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    layers = [[draw(*size) for size in sizes] for _ in range(n_layers)]
    words, start = draw(width, WORDS), draw(n_rows, width)
    heads = (PAIR_BATCH * HEADS, n_tokens, width // HEADS)
    weights = draw(PAIR_BATCH * HEADS, n_tokens, n_tokens)  # for the softmax of the scores
    times = []
    for _step in clocked(range(steps), times, device):
        x, kept = start, []
        for attend, project, up, down in layers:
            qkv = x @ attend
            q, k, v = qkv.view(3, *heads)
            scores = q @ k.mT
            mixed = (weights @ v).view(n_rows, width)
            attended = mixed @ project
            inner = attended @ up
            kept.append((x, qkv, scores, mixed, attended, inner))
            x = inner @ down
        logits = x[:n_said] @ words
        _ = x[:n_said].T @ logits, logits @ words.T
        grad = x
        for (x, qkv, scores, mixed, attended, inner), (attend, project, up, down) in zip(
            reversed(kept), reversed(layers), strict=True
        ):
            q, k, v = qkv.view(3, *heads)
            of_inner, _ = grad @ down.T, inner.T @ grad
            of_attended, _ = of_inner @ up.T, attended.T @ of_inner
            of_mixed, _ = of_attended @ project.T, mixed.T @ of_attended
            of_heads = of_mixed.view(heads)
            _ = of_heads @ v.mT, weights.mT @ of_heads, scores @ k, scores.mT @ q
            grad, _ = qkv @ attend.T, x.T @ qkv
    return times, []


def report_reading(dtype: torch.dtype, device: torch.device) -> None:
    """Rows against a tree of prefixes: what `rollout.token_logps` chooses by."""
    generator = torch.Generator().manual_seed(0)
    print(f"A gradient of {READ} log-probabilities, {dtype}, 2 layers, width 32, V = 12\n")
    print("| tokens | different rows | prefixes, of tokens in rows | rows, ms | tree, ms ", end="")
    print("| a prefix costs, in tokens | the rule says |\n|---|---|---|---|---|---|---|")
    for length in READ_LENGTHS:
        policy = TinyTransformer(4, 12, length, end_token=None, generator=generator)
        policy = policy.to(device, dtype)
        for n_distinct in READ_DISTINCT:
            rows = torch.arange(READ) % n_distinct
            prompts = torch.randint(4, (READ,), generator=generator)[rows].to(device)
            answers = torch.randint(12, (READ, length), generator=generator)[rows].to(device)
            tree = scoring.batch_tree(policy, prompts, answers)
            rule = scoring._rows_are_faster(policy, tree, (answers,))
            runs = {way: partial(read_as, way, policy, prompts, answers) for way in (True, False)}
            by_rows, by_tree = median_times(runs, READ_ROUNDS, "reading", device).values()
            share = len(tree.tokens) / (READ * length)
            print(f"| {length} | {n_distinct} | {share:.2f} | {1e3 * by_rows:.1f} ", end="")
            print(f"| {1e3 * by_tree:.1f} | {by_tree / by_rows / share:.1f} ", end="")
            print(f"| {'rows' if rule else 'tree'} |")
    print()


def read_as(rows: bool, policy: TinyTransformer, prompts: Tensor, answers: Tensor) -> None:
    """A gradient by rows, or by the tree; both make the tree, from which the rule is read."""
    policy.zero_grad()
    with mock.patch.object(scoring, "_rows_are_faster", return_value=rows):
        rollout.token_logps(policy, prompts, answers).sum().backward()


def answer_with_embedding(
    model: transformers.GPT2LMHeadModel, policy: TinyTransformer
) -> transformers.GPT2LMHeadModel:
    """Outputs for the words alone, out of the words' rows of the embedding, as the policy's."""
    embedding, n_words = model.transformer.wte, policy.vocab_size

    class Head(nn.Module):
        bias = None

        @property
        def weight(self) -> Tensor:
            return embedding.weight[:n_words]

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.weight.T

    model.lm_head = Head()
    return model


def import_trl() -> str | None:
    try:
        import trl
    except ImportError as error:
        print(f"trl is left out: {error}\n")
        return None
    return trl.__version__


def step_trl(
    policy: TinyTransformer,
    reference: TinyTransformer,
    model: dict[str, str],
    wrap: Callable[[list[dict]], Sequence[dict]],
    pairs: Pairs,
    steps: int,
) -> Run:
    """Steps of trl on a GPT-2 of some attention and activation, and on rows kept somehow."""
    rows = [
        {"prompt_ids": policy.prompt_tokens[prompt].tolist(), "chosen_ids": one}
        | {"rejected_ids": other, "ref_chosen_logps": a, "ref_rejected_logps": b}
        for prompt, one, other, a, b in zip(
            *(column.tolist() for column in (*pairs, *reference_logps(reference, pairs))),
            strict=True,
        )
    ]
    gpt2 = answer_with_embedding(make_gpt2_for_trl(policy, **model), policy)
    gpt2 = gpt2.to(policy.wte.weight.device)
    return train_by_trl(gpt2, wrap(rows), DPO_BETA, steps, PAIR_BATCH, LEARNING_RATE, seed=0)


def make_dataset(rows: list[dict]) -> Sequence[dict]:
    """The table in a file that trl asks for, out of which each batch is read."""
    from datasets import Dataset

    return Dataset.from_list(rows)


def train_by_trl(
    model: transformers.GPT2LMHeadModel,
    rows: Sequence[dict],
    beta: float,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    stop: Callable[[int], bool] = lambda step: False,
) -> Run:
    """`DPOTrainer` on tokens, with log-probabilities of the reference that are already there.

    All that it does beside training is turned off: checkpoints, reports, evaluation, progress bars,
    dropout, clipping, recomputed activations, half precision. `stop` is asked after each step,
    outside the clock.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer

    class Ready(DPOTrainer):
        """Takes the rows as they are, a list or a `Dataset`."""

        def _prepare_dataset(self, *_: object) -> list:
            return rows

        def _precompute_ref_logps(self, dataset: list, *_: object) -> list:
            return dataset

        def compute_loss(self, *arguments: object, **options: object) -> Tensor:
            loss = super().compute_loss(*arguments, **options)
            losses.append(loss.detach())
            return loss

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            gc.collect()
            gc.freeze()
            self.start = clock(device)

        def on_step_end(
            self,
            _: object,
            state: transformers.TrainerState,
            control: transformers.TrainerControl,
            **__: object,
        ) -> None:
            times.append(clock(device) - self.start)
            control.should_training_stop |= stop(state.global_step)
            self.start = clock(device)

    device = model.transformer.wte.weight.device
    times, losses = [], []
    unused = Tokenizer(models.WordLevel({"-": 0}, unk_token="-"))
    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder,
            beta=beta,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            seed=seed,
            max_length=None,
            max_grad_norm=0.0,
            precompute_ref_log_probs=True,
            remove_unused_columns=False,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Ready(
            model=model,
            args=options,
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=unused, pad_token="-", eos_token="-"
            ),
            train_dataset=Dataset.from_list([rows[0]]),
            optimizers=adam(list(model.parameters()), steps, learning_rate),
            callbacks=[Clock()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    gc.unfreeze()
    return times, [loss.item() for loss in losses]


def report_race(task: Task) -> None:
    """Seconds until the exact KL(pi_theta || pi*) is small, on the reviews of chapter 06."""
    generator = torch.Generator().manual_seed(0)
    reference = TinyTransformer.for_task(task, generator=generator, n_layers=1, n_heads=HEADS)
    rows = micro_review_demonstrations(8000, generator=generator)
    settings = {"steps": 300, "batch_size": 256, "learning_rate": 1e-2, "generator": generator}
    train.fit_sft(reference, *rows, **settings)
    with torch.no_grad():
        table = rollout.enumerate_logps(reference, task)
    pairs = task.sample_pairs(table, RACE_PAIRS, generator=generator)
    best = closed_form.optimal_logps(table.double(), task.rewards.double(), RACE_BETA)

    def distance(policy: TinyTransformer) -> float:
        with torch.no_grad():
            logps = rollout.enumerate_logps(policy, task)
        return closed_form.kl(logps.double().log_softmax(-1), best).mean().item()

    contenders = {"`fit_preferences`, `TinyTransformer`": race_ours}
    if (trl := import_trl()) is not None:
        contenders[f"trl {trl}, `DPOTrainer`, made fast"] = race_trl
    seconds = {name: [] for name in contenders}
    steps = {name: [] for name in contenders}
    for seed in range(RACE_SEEDS):
        for name, run in contenders.items():
            times, reached = run(reference, pairs, distance, seed)
            seconds[name].append(sum(times) if reached else math.inf)
            steps[name].append(len(times))
    slowest = max(map(median, seconds.values()))
    print(f"Micro-reviews, until KL(pi_theta || pi*) <= {RACE_KL}: it starts at ", end="")
    print(f"{distance(reference):.2f}, beta = {RACE_BETA:g}\n")
    print("| trained by | steps | seconds | ms a step | ratio |\n|---|---|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {' and '.join(map(str, steps[name]))} | {median(each):.2f} ", end="")
        print(f"| {1e3 * sum(each) / sum(steps[name]):.1f} | {slowest / median(each):.2f} |")
    print()


Distance = Callable[[TinyTransformer], float]


def race_ours(
    reference: TinyTransformer, pairs: Pairs, distance: Distance, seed: int
) -> tuple[list[float], bool]:
    """Seconds of each step until the distance is small enough, and whether it came to be."""
    policy, times = deepcopy(reference), []
    reached = False

    def until_close(steps: range) -> Iterator[int]:
        nonlocal reached
        for step in steps:
            start = clock(torch.device("cpu"))
            yield step
            times.append(clock(torch.device("cpu")) - start)  # and measure outside it
            if (step + 1) % RACE_EVERY == 0 and distance(policy) <= RACE_KL:
                reached = True
                return

    train.fit_preferences(
        policy,
        reference,
        pairs,
        partial(dpo_loss, beta=RACE_BETA),
        **RACE,
        generator=torch.Generator().manual_seed(seed),
        progress=until_close,
    )
    return times, reached


def race_trl(
    reference: TinyTransformer, pairs: Pairs, distance: Distance, seed: int
) -> tuple[list[float], bool]:
    prompts, *both = pairs
    with torch.no_grad():
        ref_logps = [reference.logps(prompts, each).tolist() for each in both]
    texts = [[[token for token in row if token != PAD] for row in each.tolist()] for each in both]
    rows = [
        {"prompt_ids": [reference.vocab_size + prompt], "chosen_ids": one, "rejected_ids": other}
        | {"ref_chosen_logps": a, "ref_rejected_logps": b}
        for prompt, one, other, a, b in zip(prompts.tolist(), *texts, *ref_logps, strict=True)
    ]
    model = answer_with_embedding(make_gpt2_for_trl(reference), reference)
    policy, reached = deepcopy(reference), False

    def close(step: int) -> bool:
        nonlocal reached
        if step % RACE_EVERY == 0:
            copy_back(model, policy)
            reached = distance(policy) <= RACE_KL
        return reached

    return train_by_trl(model, rows, RACE_BETA, **RACE, seed=seed, stop=close)[0], reached


@torch.no_grad()
def copy_back(model: transformers.GPT2LMHeadModel, policy: TinyTransformer) -> None:
    """The weights of `make_gpt2_for_trl`, after training, into a policy."""
    trained = dict(model.named_parameters())
    for name, weight in policy.named_parameters():
        found = trained[name_in_gpt2(name)]
        found = found.T if ".c_" in name and found.dim() == 2 else found
        weight.copy_(found[tuple(map(slice, weight.shape))])


# --- the clock -------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def median_times(
    runs: dict[str, Callable], n_rounds: int, label: str, device: torch.device
) -> dict[str, float]:
    """Median seconds of each; a round before the first warms up."""
    seconds = {name: [] for name in runs}
    for number in tqdm(range(n_rounds + 1), desc=label, leave=False):
        for name, run in runs.items():
            start = clock(device)
            run()
            if number > 0:
                seconds[name].append(clock(device) - start)
    return {name: median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()

"""How fast the course draws completions and takes steps of PPO, beside the usual libraries.

Run `python benchmarks/training.py` where the package is installed. It takes about two minutes on
one thread, needs `transformers` and `tqdm`, and prints the tables of RESULTS.md. PPO is compared
with `trl` 1.10.0, in this environment or in one of its own, where torch, transformers and tqdm are
too; without it, trl's row is left out:

    python benchmarks/training.py --trl path/to/another/bin/python

The third comparison, one exact gradient, is in `enumeration.py`.

All contenders compute in float32, in one shape and from the same weights, and take turns. A time is
a median, in seconds of processor time, to which other work on the machine adds little. With
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
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

import torch
import transformers
from enumeration import HEADS, LAYERS, WIDTH, cpu_model, make_gpt2, make_policy
from torch import Tensor, nn
from tqdm import tqdm

from dpo_mini import rollout, train
from dpo_mini.logps import PAD
from dpo_mini.policies import ScalarTransformer, SeparateNetworks, SharedTrunk, TinyTransformer
from dpo_mini.policy_gradient import clipped_value_loss
from dpo_mini.tasks import Task, micro_review_demonstrations, micro_reviews

ROWS, ROUNDS = 1024, 31  # completions a call, and calls of each contender
PAIRS, PAIR_ROUNDS = 100_000, 7
BATCH, EPOCHS = 256, 4  # of an iteration of PPO: completions, and steps of Adam on all of them
ITERATIONS, WARM_UP, BLOCKS = 23, 3, 3  # a block is one training; its first iterations warm up
BETA, LEARNING_RATE, CLIP = 0.5, 1e-3, 0.2
FASTEST = {"attention": "sdpa", "activation": "gelu_pytorch_tanh"}  # enumeration.py says so


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    parser.add_argument("--trl", default=sys.executable, help="a Python that has trl")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)  # folder and seed: be trl
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    task = micro_reviews()
    task = replace(task, rewards=task.rewards.float().to(options.device))
    if options.peer:
        folder, seed = options.peer
        print(json.dumps(run_trl(task, Path(folder), int(seed))))
        return
    print(f"{device_name(options.device)}; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; float32\n")
    policy = fit_reference(task)
    report_sampling(policy)
    report_pairs(task, policy)
    report_ppo(task, policy, options.trl)


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
    model.lm_head = nn.Linear(WIDTH, policy.vocab_size, bias=False)
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
    command = [python, "-c", "import trl; print(trl.__version__)"]
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
        value_error=partial(clipped_value_loss, clip_eps=CLIP),
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
    model = make_gpt2_for_trl(policy)
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
    # fit_ppo's Adam, warm-up and cosine, so that both should learn as fast.
    weights = [*model.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / ITERATIONS)) / 2,
    )
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
        optimizers=(optimizer, schedule),
        callbacks=[Clock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    scores = [line["objective/scores"] for line in trainer.state.log_history]
    return times, scores


def make_gpt2_for_trl(policy: TinyTransformer) -> transformers.GPT2LMHeadModel:
    """The policy with a padding token after its prompts, and a position for the last word."""
    sizes = (policy.n_prompts + 1, policy.vocab_size, policy.max_tokens + 1)
    shape = {"n_layers": LAYERS, "n_heads": HEADS, "width": WIDTH}
    generator = torch.Generator().manual_seed(0)
    larger = TinyTransformer(*sizes, end_token=policy.end_token, generator=generator, **shape)
    weights = larger.state_dict()
    for name, weight in policy.state_dict().items():
        weights[name][tuple(map(slice, weight.shape))] = weight
    larger.load_state_dict(weights)
    return answer_in_words(make_gpt2(larger, **FASTEST), larger)


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

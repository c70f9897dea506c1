"""How fast `real.train_preferences` takes steps of DPO on a GPT-2, beside trl's `DPOTrainer`.

    python benchmarks/real_models.py --pairs instruction-preferences.json

It needs `trl` 1.16.0, takes some minutes on one thread, and prints the table of RESULTS.md. Both
have the same model from a config (four layers, width 256, GPT-2's vocabulary of 50,257), the same
pairs in the same order, the reference's log-probabilities already there, float32, one AdamW and no
clipping. Contenders take turns, each in a process of its own. A time is the median of the steps in
seconds of processor time; memory is the most that the process held, above what it held before the
first step. With `--device cuda` it is seconds on the wall, bfloat16 autocast, a GPT-2 of 124
million parameters, and the most that torch held on the device.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from dpo_mini import real
from dpo_mini.logps import PAD
from dpo_mini.losses import dpo_loss
from dpo_mini.train import Pairs

CONTENDERS = {
    "trl": "trl 1.16.0, `DPOTrainer`",
    "pairs": "`train_preferences`",
    "alike": "`train_preferences`, lengths sorted in windows of 8 batches",
}
VOCABULARY, BETA = 50_257, 0.1
Run = dict[str, Any]


def main() -> None:
    """Ask each contender in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", required=True, help="a file with instruction, input and answers")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contender:
        print(json.dumps(run(given)))
        return
    runs: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    for name in tqdm([*CONTENDERS] * given.repeats):
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    check_losses(runs)
    report(runs)


def check_losses(runs: dict[str, list[Run]]) -> None:
    """Refuse to compare what computes different things: the same batches have the same losses."""
    for ours, theirs in zip(runs["pairs"][0]["losses"], runs["trl"][0]["losses"], strict=True):
        if abs(ours - theirs) > 1e-3 * max(1.0, abs(theirs)):
            raise RuntimeError(f"train_preferences has a loss of {ours}, and trl of {theirs}")


def report(runs: dict[str, list[Run]]) -> None:
    """One line for each contender: time, tokens, ratio to trl with its range, memory."""
    print("| steps taken by | ms a step | tokens a second | ratio | peak memory, MB |")
    print("|---|---|---|---|---|")
    for name, words in CONTENDERS.items():
        seconds = median(run["seconds"] for run in runs[name])
        tokens = runs[name][0]["tokens"] / seconds
        pairs = zip(runs["trl"], runs[name], strict=True)
        ratios = sorted(theirs["rate"] / ours["rate"] for theirs, ours in pairs)
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        memory = median(run["bytes"] for run in runs[name]) / 1e6
        print(f"| {words} | {1e3 * seconds:.0f} | {tokens:,.0f} | {spread} | {memory:,.0f} |")


def run(given: argparse.Namespace) -> Run:
    """One contender: median seconds a step, tokens a step, seconds a token, bytes, losses."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pairs, tokenizer = read(given.pairs)
    generator = torch.Generator().manual_seed(0)
    sorted_by = {"lengths": real.pair_lengths(pairs), "window": 8}
    batches = real.shuffled_batches(
        len(pairs[0]), steps=given.steps, batch_size=given.batch_size, generator=generator,
        **(sorted_by if given.contender == "alike" else {}),
    )  # fmt: skip
    model = gpt2(given.device)
    reference = [-200 - torch.rand(len(pairs[0]), generator=generator) for _ in range(2)]
    clock = Clock(given.device)
    step = step_trl if given.contender == "trl" else step_ours
    losses = step(given, model, tokenizer, pairs, reference, batches, clock)
    tokens = real.pair_lengths(pairs)[batches].sum(1)  # the prompt once, whoever reads it twice
    seconds = clock.seconds[1:]  # the first step makes what the others find
    return {
        "seconds": median(seconds),
        "tokens": int(tokens[1:].double().mean()),
        "rate": sum(seconds) / int(tokens[1:].sum()),
        "bytes": clock.most(),
        "losses": losses,
    }


def read(path: str) -> tuple[Pairs, transformers.PreTrainedTokenizerBase]:
    """The pairs as tokens of a tokenizer that is trained on them."""
    columns = {"prompt": ("instruction", "input")}
    preferences = real.load_preferences(path, columns=columns)
    texts = [text for p in preferences for text in (p.prompt, p.chosen, p.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=VOCABULARY)
    return real.encode(preferences, tokenizer, max_tokens=512), tokenizer


def gpt2(device: str) -> transformers.GPT2LMHeadModel:
    """Random weights, the same for all."""
    small = dict(n_layer=4, n_head=4, n_embd=256)
    size = dict(n_layer=12, n_head=12, n_embd=768) if device == "cuda" else small
    off = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=512, **size, **off)
    return transformers.GPT2LMHeadModel(config).to(device)


class Clock:
    """Seconds of each step, and the memory that steps take above what is there before."""

    def __init__(self, device: str) -> None:
        self.cuda, self.seconds = device == "cuda", list[float]()
        self.before = self._held()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> float:
        """Processor time, or time on the wall when the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def most(self) -> int:
        """The most bytes since the beginning, above what was held then."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before

    def _held(self) -> int:
        if self.cuda:
            return torch.cuda.memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)


def step_ours(
    given: argparse.Namespace, model: Any, tokenizer: Any, pairs: Pairs, reference: list[Tensor],
    batches: Tensor, clock: Clock,
) -> list[float]:  # fmt: skip
    """Steps of `train_preferences`; their losses."""
    policy = real.CausalLMPolicy(model, end_token=None)

    def timed(steps: range) -> Iterator[int]:
        for step in steps:
            start = clock.now()
            yield step
            clock.seconds.append(clock.now() - start)

    precision = real.bf16_autocast if given.device == "cuda" else real.full_precision
    history = real.train_preferences(
        policy, (reference[0], reference[1]), pairs, dpo_loss, beta=BETA, batches=batches,
        micro_batch_size=given.batch_size, optimizer=adamw(model), precision=precision,
        progress=timed,
    )  # fmt: skip
    return history["loss"]


def step_trl(
    given: argparse.Namespace, model: Any, tokenizer: Any, pairs: Pairs, reference: list[Tensor],
    batches: Tensor, clock: Clock,
) -> list[float]:  # fmt: skip
    """Steps of `DPOTrainer` as it is, but for tokens and order, which are given; their losses."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined, unused-ignore]

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *arguments: Any, **named: Any) -> None:
            self.start = clock.now()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            clock.seconds.append(clock.now() - self.start)

    class AsGiven(DPOTrainer):  # type: ignore[misc, unused-ignore]
        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = []
    for n in batches.flatten().tolist():
        tokens = {name: t[n][t[n] != PAD].tolist() for name, t in zip(names, pairs, strict=True)}
        scores = {"ref_chosen_logps": float(reference[0][n])}
        rows.append({**tokens, **scores, "ref_rejected_logps": float(reference[1][n])})
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, beta=BETA, max_steps=given.steps,
            per_device_train_batch_size=given.batch_size, train_sampling_strategy="sequential",
            max_length=None, max_grad_norm=0.0, precompute_ref_log_probs=True,
            bf16=given.device == "cuda", gradient_checkpointing=False, logging_steps=1,
            lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=given.device == "cpu",
        )  # fmt: skip
        random.seed(0)
        trainer = AsGiven(
            model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            optimizers=(adamw(model), None), callbacks=[Callback()],
        )  # fmt: skip
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main()

"""DPO on a model and a preference file of yours, on one device or many.

    python examples/train_dpo.py --model MODEL_FOLDER --pairs PAIRS.json --output OUT
    accelerate launch --config_file configs/ddp_8.yaml examples/train_dpo.py ...

Stopped at any moment, the same command goes on from the last checkpoint, under `OUT/checkpoints`.
It ends with the trained model under `OUT/model` and its numbers in `OUT/metrics.csv`. The
reference's log-probabilities stay in `OUT/reference.safetensors`: they are computed once. With more
`--steps` a run that is finished goes on. Two runs at a time cannot have one `OUT`.
"""

import argparse
import json
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_mini import real
from dpo_mini.losses import dpo_loss


def main(arguments: list[str] | None = None) -> tuple[real.CausalLMPolicy, dict[str, list[float]]]:
    """Train; returns the policy, as the accelerator prepared it, and the history."""
    given = parse(arguments)
    accelerator = Accelerator()
    one = accelerator.is_main_process  # of several processes one keeps other runs out
    with real.lock_folder(given.output) if one else nullcontext():
        return train(given, accelerator)


def train(
    given: argparse.Namespace, accelerator: Accelerator
) -> tuple[real.CausalLMPolicy, dict[str, list[float]]]:
    """All of a run, in a folder that is its own."""
    named = given.precision or accelerator.mixed_precision
    precision = {"no": real.full_precision, "bf16": real.bf16_autocast}[named]
    bar = partial(tqdm, disable=not accelerator.is_main_process)
    generator = torch.Generator().manual_seed(given.seed)

    model, tokenizer = load_model(given.model)
    output = Path(given.output)
    left_out: list[str] | None = [] if given.skip_bad_rows else None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    preferences = load_preferences(
        given.pairs, given.split, columns=given.columns, left_out=left_out, **given.reading
    )
    if left_out is not None:
        accelerator.print(f"{len(left_out)} bad rows left out, see {output / 'left_out.txt'}")
        if accelerator.is_main_process:
            (output / "left_out.txt").write_text("".join(f"{row}\n" for row in left_out), "utf-8")
    template = real.CHAT if given.chat else real.TEMPLATE
    if given.chat is None:
        template = real.default_template(preferences, tokenizer)
    accelerator.print(f"template: {template!r}")
    tokenised = dict(
        template=template, boundary=given.boundary, chat_arguments=given.chat_arguments
    )
    counts = real.count_tokens(preferences, tokenizer, **tokenised, progress=bar)
    pairs = real.encode(preferences, tokenizer, max_tokens=max(counts), **tokenised, progress=bar)
    pairs, n_dropped = real.drop_long(pairs, max_tokens=given.max_tokens)
    accelerator.print(f"{len(pairs[0])} pairs; {n_dropped} too long and left out")

    if given.lora_rank:
        model = real.add_lora(model, rank=given.lora_rank, generator=generator)
    # A chat template may go on after its end token, with a line break.
    end_token = None if template == real.CHAT else tokenizer.eos_token_id
    sharded = accelerator.distributed_type == "FSDP"
    policy = real.CausalLMPolicy(
        model if sharded else model.to(accelerator.device), end_token=end_token
    )
    optimizer = torch.optim.AdamW(
        [weight for weight in policy.parameters() if weight.requires_grad],
        lr=given.learning_rate,
        weight_decay=0.0,
    )
    if sharded:  # dealt out from the CPU before anything is read: no device ever holds all weights
        policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
    batches = real.shuffled_batches(
        len(pairs[0]), steps=given.steps, batch_size=given.batch_size, generator=generator
    )
    # Before anything is trained the policy is its own reference, in the same passes and precision.
    ref_logps = real.reference_logps(
        policy,
        pairs,
        batches=batches,
        micro_batch_size=given.micro_batch_size,
        precision=precision,
        accelerator=accelerator,
        cache=output / "reference.safetensors",
        progress=bar,
    )
    with ExitStack() as stack:
        logs = [real.csv_log(output / "metrics.csv")]
        if given.tensorboard:
            logs.append(stack.enter_context(real.tensorboard_log(output / "tensorboard")))
        history = real.train_preferences(
            policy,
            ref_logps,
            pairs,
            dpo_loss,
            beta=given.beta,
            batches=batches,
            optimizer=optimizer,
            schedule=real.warmup_then_linear(given.steps, warmup=given.steps // 10),
            max_grad_norm=given.max_grad_norm,
            accelerator=accelerator,
            checkpoints=None if given.no_checkpoints else output / "checkpoints",
            checkpoint_every=given.checkpoint_every,
            logs=logs,
            progress=bar,
        )
    real.save_trained(policy, tokenizer, output / "model", accelerator=accelerator)
    return policy, history


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From a folder; what is no folder is a name of the hub, and is downloaded."""
    return real.load_model(name) if Path(name).is_dir() else real.download_model(name)


def load_preferences(name: str, split: str, **reading: Any) -> list[real.Preference]:
    """From a file; what is no file is a name of the hub, and is downloaded."""
    if Path(name).is_file():
        return real.load_preferences(name, **reading)
    return real.load_hub_preferences(name, split=split, **reading)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder, or a name of the hub")
    parser.add_argument("--pairs", required=True, help="a file, or a data set of the hub")
    parser.add_argument("--split", default="train", help="of a data set of the hub")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="the tokenizer's chat template; by default where the pairs have messages",
    )
    parser.add_argument("--chat-arguments", type=json.loads, help="JSON, as in real.encode")
    parser.add_argument("--boundary", default="prompt", choices=["prompt", "common_prefix"])
    parser.add_argument("--columns", type=json.loads, help="JSON, as in real.load_preferences")
    parser.add_argument(
        "--reading", type=json.loads, default={}, help='its other arguments: {"labels": [1, 0]}'
    )
    parser.add_argument("--skip-bad-rows", action="store_true", help="list them in left_out.txt")
    parser.add_argument("--output", required=True, help="a folder of this run alone")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a step, of all processes")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="pairs a pass")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lora-rank", type=int, default=0, help="0: train all weights")
    parser.add_argument("--precision", choices=["no", "bf16"], help="by default accelerate's")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--no-checkpoints", action="store_true", help="as FSDP needs it")
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

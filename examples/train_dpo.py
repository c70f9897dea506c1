"""DPO on a model and a preference file of yours, on one device or many.

    python examples/train_dpo.py --model MODEL_FOLDER --pairs PAIRS.json --output OUT
    python examples/train_dpo.py --config run.yaml --beta 0.05
    accelerate launch --config_file configs/ddp_8.yaml examples/train_dpo.py ...

Stopped at any moment, the same command goes on from the last checkpoint, under `OUT/checkpoints`.
It ends with the trained model under `OUT/model`, an adapter by itself under `OUT/adapter`, its
numbers in `OUT/metrics.csv` and its options in `OUT/run.yaml`. The reference's log-probabilities
stay in `OUT/reference.safetensors`: they are computed once. With more `--steps` a run that is
finished goes on. Two runs at a time cannot have one `OUT`. `--help` has all options.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_mini import real
from dpo_mini.real import options
from dpo_mini.train import Pairs

SCHEDULES = {
    "constant": real.warmup_then_constant,
    "linear": real.warmup_then_linear,
    "cosine": real.warmup_then_cosine,
}
say = tqdm.write  # beside a progress bar


def main(arguments: list[str] | None = None) -> tuple[real.CausalLMPolicy, dict[str, list[float]]]:
    """Train; returns the policy, as the accelerator prepared it, and the history."""
    given = options.parse_options(options.training_parser(__doc__.partition("\n")[0]), arguments)
    accelerator = Accelerator()
    one = accelerator.is_main_process  # of several processes one keeps other runs out
    with real.lock_folder(given.output) if one else nullcontext():
        return train(given, accelerator)


def train(
    given: argparse.Namespace, accelerator: Accelerator
) -> tuple[real.CausalLMPolicy, dict[str, list[float]]]:
    """All of a run, in a folder that is its own."""
    loss, reduce = real.loss_by_name(given.loss, given.loss_arguments)
    bar = partial(tqdm, disable=not accelerator.is_main_process)
    generator = torch.Generator().manual_seed(given.seed)
    output = Path(given.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = load_model(given)
    data = read_data(given, tokenizer, accelerator, bar)
    steps = options.count_steps(given, len(data.pairs[0]))
    schedule = SCHEDULES[given.schedule](steps, warmup=options.count_warmup(given, steps))
    accelerator.print(f"{steps} steps of {given.batch_size} pairs")

    policy = make_policy(given, model, tokenizer, data, accelerator, generator)
    if warning := options.rate_warning(given):
        accelerator.print(f"warning: {warning}")
    optimizer = torch.optim.AdamW(
        [weight for weight in policy.parameters() if weight.requires_grad],
        lr=given.learning_rate,
        weight_decay=given.weight_decay,
    )
    if accelerator.distributed_type == "FSDP":
        # Dealt out from the CPU before anything is read: no device ever holds all weights.
        policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
    batches = real.shuffled_batches(
        len(data.pairs[0]),
        steps=steps,
        batch_size=given.batch_size,
        generator=generator,
        lengths=real.pair_lengths(data.pairs),
        window=given.length_window,
    )
    # Before anything is trained the policy is its own reference, in the same passes and precision.
    score = partial(
        real.reference_logps,
        policy,
        micro_batch_size=given.micro_batch_size,
        reduce=reduce,
        precision=choose_precision(given, accelerator),
        accelerator=accelerator,
        progress=bar,
    )
    ref_logps = score(data.pairs, batches=batches, cache=output / "reference.safetensors")
    evaluation = None
    if data.eval_pairs is not None:
        evaluation = real.Evaluation(
            data.eval_pairs,
            score(data.eval_pairs, cache=output / "eval_reference.safetensors"),
            every=given.eval_every,
            patience=given.patience,
            best=output / "best" if given.keep_best else None,
            report=real.report_answers(
                policy,
                tokenizer,
                data.asked,
                output / "answers.jsonl",
                seed=given.seed,
                answer_tokens=given.answer_tokens,
                template=data.template,
                chat_arguments=given.chat_arguments,
                write=say,
            )
            if data.asked
            else None,
        )
    with ExitStack() as stack:
        logs = [
            real.csv_log(output / "metrics.csv"),
            options.options_log(output / "run.yaml", given),
            real.console_log(given.log_every, steps=steps, write=say),
        ]
        if given.tensorboard:
            logs.append(stack.enter_context(real.tensorboard_log(output / "tensorboard")))
        history = real.train_preferences(
            policy,
            ref_logps,
            data.pairs,
            loss,
            beta=given.beta,
            batches=batches,
            optimizer=optimizer,
            schedule=schedule,
            max_grad_norm=given.max_grad_norm,
            accelerator=accelerator,
            checkpoints=output / "checkpoints" if given.checkpoints else None,
            checkpoint_every=given.checkpoint_every,
            evaluation=evaluation,
            logs=logs,
            progress=partial(steps_left, bar, accelerator),
        )
    if given.keep_best:
        best = real.load_best(policy, output / "best")
        accelerator.print(f"kept: step {best['step']}, held-out loss {best['eval_loss']:.4g}")
        if best["step"] == 0:
            accelerator.print("warning: this is the untrained model: no step made it better")
    save(given, policy, tokenizer, output, accelerator)
    log = output / "metrics.csv"
    accelerator.print(f"what the curves say: python -m dpo_mini.real.doctor {log}")
    return policy, history


def steps_left(bar: Callable[..., Any], accelerator: Accelerator, steps: range) -> Any:
    """A progress bar over the steps that are still to be taken."""
    if steps.start:
        accelerator.print(f"goes on from step {steps.start}, the last checkpoint")
    return bar(steps)


# --- model and data --------------------------------------------------------------------------


def load_model(given: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """From a folder; what is no folder is a name of the hub, and is downloaded."""
    dtype = torch.bfloat16 if given.weights == "bfloat16" else None
    if is_here(given.model, "--model"):
        return real.load_model(given.model, dtype=dtype)
    return real.download_model(given.model, dtype=dtype)


def load_preferences(name: str, split: str, **reading: Any) -> list[real.Preference]:
    """From a file; what is no file is a name of the hub, and is downloaded."""
    if is_here(name, "--pairs"):
        return real.load_preferences(name, **reading)
    return real.load_hub_preferences(name, split=split, **reading)


def is_here(name: str, option: str) -> bool:
    """Whether a file or folder has this name; what cannot be a name of the hub must have one."""
    if Path(name).exists():
        return True
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"`{option}` must be on this machine, or on the hub, got {name}")
    return False


@dataclass(frozen=True)
class Data:
    """What is trained on and what is held out, and how text became tokens."""

    pairs: Pairs
    eval_pairs: Pairs | None
    asked: list[Any]  # prompts to sample answers to
    template: str


def read_data(
    given: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    bar: Callable[..., Any],
) -> Data:
    """Pairs as tokens; those that are held out have a file or a share of the prompts."""
    left_out: list[str] | None = [] if given.skip_bad_rows else None
    reading = dict(columns=given.columns, left_out=left_out, **given.reading)
    preferences = load_preferences(given.pairs, given.split, **reading)
    held_out: list[real.Preference] = []
    if given.eval_pairs is not None:
        held_out = load_preferences(given.eval_pairs, "test", **reading)
    elif given.eval_share is not None:
        own = torch.Generator().manual_seed(given.seed)
        preferences, held_out = real.split_preferences(
            preferences, held_out=given.eval_share, generator=own
        )
    if left_out is not None:
        path = Path(given.output) / "left_out.txt"
        accelerator.print(f"{len(left_out)} bad rows left out, see {path}")
        if accelerator.is_main_process:
            path.write_text("".join(f"{row}\n" for row in left_out), "utf-8")
    template = real.CHAT if given.chat else real.TEMPLATE
    if given.chat is None:
        template = real.default_template(preferences, tokenizer)
    accelerator.print(f"template: {template!r}")
    tokenised = dict(
        template=template, boundary=given.boundary, chat_arguments=given.chat_arguments
    )

    def encode(those: list[real.Preference], what: str) -> tuple[Pairs, list[Any]]:
        counts = real.count_tokens(those, tokenizer, **tokenised, progress=bar)
        pairs = real.encode(those, tokenizer, max_tokens=max(counts), **tokenised, progress=bar)
        pairs, n_dropped = real.drop_long(pairs, max_tokens=given.max_tokens)
        accelerator.print(f"{len(pairs[0])} {what}; {n_dropped} too long and left out")
        fits = [pair for pair, n in zip(those, counts, strict=True) if n <= given.max_tokens]
        return pairs, [*dict.fromkeys(pair.messages or pair.prompt for pair in fits)]

    pairs, _ = encode(preferences, "pairs")
    eval_pairs, prompts = encode(held_out, "pairs held out") if held_out else (None, [])
    asked = prompts[: given.sample_answers]
    if asked and accelerator.distributed_type == "FSDP":
        accelerator.print("no sampled answers: one process cannot read weights in shards")
        asked = []
    return Data(pairs, eval_pairs, asked, template)


def make_policy(
    given: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    accelerator: Accelerator,
    generator: torch.Generator,
) -> real.CausalLMPolicy:
    """The model on its device, with an adapter where one is asked for."""
    if given.recompute_activations:
        older = "gradient_checkpointing_enable"  # its name in transformers 4
        enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, older)
        enable({"use_reentrant": False})  # which takes frozen embeddings, as under an adapter
    if given.lora_rank:
        model = real.add_lora(
            model,
            rank=given.lora_rank,
            alpha=given.lora_alpha,
            targets=given.lora_targets,
            generator=generator,
        )
    sharded = accelerator.distributed_type == "FSDP"
    # A chat template may go on after its end token, with a line break.
    end_token = None if data.template == real.CHAT else tokenizer.eos_token_id
    return real.CausalLMPolicy(
        model if sharded else model.to(accelerator.device), end_token=end_token
    )


def choose_precision(given: argparse.Namespace, accelerator: Accelerator) -> Any:
    """What is asked for, and else what `accelerate` has."""
    named = given.precision or accelerator.mixed_precision
    known = {"no": real.full_precision, "bf16": real.bf16_autocast}
    if named not in known:
        raise ValueError(f"`precision` must be no or bf16, got {named}{options.FP16}")
    return known[named]


# --- after it --------------------------------------------------------------------------------


def save(
    given: argparse.Namespace,
    policy: real.CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    accelerator: Accelerator,
) -> None:
    """The adapter by itself, and the model that it is merged into."""
    if given.lora_rank and given.save_adapter != "no":
        real.save_adapter(policy, output / "adapter", accelerator=accelerator)
    if given.lora_rank and given.save_adapter == "only":
        return
    if given.weights == "bfloat16" and accelerator.is_main_process:
        # Merged in bfloat16 what an adapter learned would round away.
        accelerator.unwrap_model(policy.model).to("cpu", torch.float32)
    real.save_trained(policy, tokenizer, output / "model", accelerator=accelerator)


AS_OPTIONS = "(columns= is --columns, left_out=[] --skip-bad-rows, other arguments --reading)"

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from the last checkpoint, if there is one")
    except (OSError, ValueError) as error:  # the sentence is for the user, and stands alone
        hint = AS_OPTIONS if "columns=" in str(error) or "left_out=" in str(error) else ""
        sys.exit(f"{error} {hint}".strip())

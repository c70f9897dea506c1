"""The run of train_dpo.py in `trl`: one model, one order of the pairs, and the same numbers.

    python examples/dpo_in_trl.py --model MODEL_FOLDER --pairs PAIRS.json --output OUT

It takes the options of train_dpo.py that are named below. What is the same by itself in both, and
what has to be said, stands beside each line. `OUT/trainer_state.json` has the numbers of each step.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined, unused-ignore]

from dpo_mini import real
from dpo_mini.real import options


def main(arguments: list[str] | None = None) -> DPOTrainer:
    """Train; returns the trainer, whose `state.log_history` has the numbers of each step."""
    given = parse(arguments)
    model, tokenizer = real.load_model(given.model)
    preferences = real.load_preferences(given.pairs, columns=given.columns)
    lengths = real.count_tokens(preferences, tokenizer)
    # Pairs that are too long are left out here as there; trl would cut them.
    rows = [
        as_row(pair) for pair, n in zip(preferences, lengths, strict=True) if n <= given.max_tokens
    ]
    # trl shuffles by other draws: it gets the rows in the order of train_dpo.py, and keeps it.
    generator = torch.Generator().manual_seed(given.seed)
    steps = options.count_steps(given, len(rows))
    batches = real.shuffled_batches(
        len(rows), steps=steps, batch_size=given.batch_size, generator=generator
    )
    ordered = Dataset.from_list([rows[n] for n in batches.flatten().tolist()])
    config = DPOConfig(
        output_dir=given.output,
        beta=given.beta,
        max_steps=steps,
        # A batch is what one step takes: passes of micro_batch_size pairs, whose gradients add up.
        per_device_train_batch_size=given.micro_batch_size,
        gradient_accumulation_steps=given.batch_size // given.micro_batch_size,
        train_sampling_strategy="sequential",
        max_length=None,
        max_grad_norm=given.max_grad_norm,
        precompute_ref_log_probs=True,  # the reference is scored before the first step
        bf16=given.precision == "bf16",  # trl takes bf16 wherever it can, unless it is told not to
        gradient_checkpointing=False,  # on by default
        logging_steps=1,  # else every line is a mean of ten steps
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.learning_rate, weight_decay=0.0)
    # trl's own warm-up begins at a rate of 0, so that its first step moves nothing.
    schedule = real.warmup_then_linear(steps, warmup=steps // 10)
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=ordered,
        processing_class=tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, schedule)),
    )
    trainer.train()
    trainer.save_model(str(Path(given.output) / "model"))
    trainer.save_state()
    return trainer


def as_row(pair: real.Preference) -> dict[str, object]:
    """A pair as trl takes it: text with the line break of `real.TEMPLATE`, or messages."""
    if not pair.messages:
        prompt = real.TEMPLATE.replace("{prompt}", pair.prompt)
        return {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    asked = [{"role": role, "content": content} for role, content in pair.messages]
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    said = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": asked, **said}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--pairs", required=True, help="a file")
    parser.add_argument("--columns", type=json.loads, help="JSON, as in real.load_preferences")
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

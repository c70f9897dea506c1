"""KTO on a model and a file of ratings of yours: answers that somebody liked, or did not.

    python examples/train_kto.py --model MODEL_FOLDER --ratings RATINGS.jsonl --output OUT

A rating has `prompt`, `completion` and `label`, as text or as messages. Stopped at any moment, the
same command goes on from the last checkpoint, under `OUT/checkpoints`. It ends with the trained
model under `OUT/model` and its numbers in `OUT/metrics.csv`. Pairs are for `train_dpo.py`.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from dpo_mini import real


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train, on one device or, by `accelerate launch`, on many; returns the history."""
    given = parse(arguments)
    accelerator = Accelerator()
    precision = real.bf16_autocast if accelerator.mixed_precision == "bf16" else real.full_precision
    generator = torch.Generator().manual_seed(given.seed)
    output = Path(given.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)

    model, tokenizer = real.load_model(given.model)
    ratings = real.load_ratings(given.ratings, columns=given.columns, labels=given.labels)
    template = real.default_template(ratings, tokenizer)
    held_out: list[real.Rating] = []
    if given.held_out:
        ratings, held_out = real.split_preferences(
            ratings, held_out=given.held_out, generator=generator
        )
    longest = max(real.count_tokens([*ratings, *held_out], tokenizer, template=template))
    encoded = real.encode(ratings, tokenizer, template=template, max_tokens=longest)
    data, n_dropped = real.drop_long(encoded, max_tokens=given.max_tokens)
    n_liked = int(data[2].sum())
    accelerator.print(f"{n_liked} liked, {len(data[2]) - n_liked} not; {n_dropped} were too long")

    if given.lora_rank:
        model = real.add_lora(model, rank=given.lora_rank, generator=generator)
    # A chat template may go on after its end token, with a line break.
    end_token = None if template == real.CHAT else tokenizer.eos_token_id
    policy = real.CausalLMPolicy(model.to(accelerator.device), end_token=end_token)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    batches = real.shuffled_batches(
        len(data[0]), steps=given.steps, batch_size=given.batch_size, generator=generator
    )
    # Before anything is trained the policy is its own reference, in the same passes and precision.
    reference = real.reference_logps(
        policy,
        data,
        batches=batches,
        micro_batch_size=given.micro_batch_size,
        precision=precision,
        accelerator=accelerator,
        cache=output / "reference.safetensors",
    )
    evaluation = None
    if held_out:
        held = real.encode(held_out, tokenizer, template=template, max_tokens=longest)
        held, _ = real.drop_long(held, max_tokens=given.max_tokens)
        scored = real.reference_logps(
            policy,
            held,
            micro_batch_size=given.micro_batch_size,
            precision=precision,
            accelerator=accelerator,
        )
        evaluation = real.Evaluation(held, scored, every=given.eval_every)
    history = real.train_ratings(
        policy,
        reference,
        data,
        beta=given.beta,
        batches=batches,
        desirable_weight=given.desirable_weight,
        undesirable_weight=given.undesirable_weight,
        optimizer=torch.optim.AdamW(trained, lr=given.learning_rate, weight_decay=0.0),
        schedule=real.warmup_then_linear(given.steps, warmup=given.steps // 10),
        max_grad_norm=1.0,
        accelerator=accelerator,
        checkpoints=output / "checkpoints",
        evaluation=evaluation,
        logs=[real.csv_log(output / "metrics.csv")],
        progress=lambda steps: tqdm(steps, disable=not accelerator.is_main_process),
    )
    real.save_trained(policy, tokenizer, output / "model", accelerator=accelerator)
    return history


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder")
    add("--ratings", required=True, help="a file of prompt, completion and label")
    add("--output", required=True, help="a folder of this run alone")
    add("--columns", type=json.loads, help="JSON, as in real.load_ratings")
    add("--labels", type=json.loads, help='liked and not, as JSON: ["up", "down"]')
    add("--held-out", type=float, default=0.0, help="share of the ratings to evaluate on")
    add("--eval-every", type=int, default=100, help="steps from one evaluation to the next")
    add("--steps", type=int, default=1000, help="of the optimizer")
    add("--batch-size", type=int, default=64, help="ratings a step, of all processes, 2 or more")
    add("--micro-batch-size", type=int, default=1, help="ratings a pass")
    add("--max-tokens", type=int, default=1024, help="ratings that are longer are left out")
    add("--learning-rate", type=float, default=1e-6, help="of AdamW")
    add("--beta", type=float, default=0.1, help="of the loss and the rewards")
    add("--desirable-weight", type=float, default=1.0, help="of the losses of liked answers")
    add("--undesirable-weight", type=float, default=1.0, help="of those of other answers")
    add("--lora-rank", type=int, default=0, help="of an adapter; 0 trains all weights")
    add("--seed", type=int, default=0, help="of the order, the split and the adapter")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

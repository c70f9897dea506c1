"""The options of a training run: on the command line, in a YAML file, and as they were kept.

`examples/train_dpo.py` is what they are for. `--config run.yaml` reads them from a file, whose keys
are their names with `_` or `-`; what stands on the command line wins.
"""

import argparse
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from dpo_mini._files import write_whole
from dpo_mini.real.logs import Log
from dpo_mini.real.loss_names import TRL_NAMES, loss_by_name, loss_names
from dpo_mini.real.preferences import AnyPath

FULL_RATE, ADAPTER_RATE = 1e-6, 1e-5
"""Learning rates of all weights and of an adapter: ten times apart, as in `trl`'s own example."""
EITHER_OR = (("steps", "epochs"), ("eval_pairs", "eval_share"))
"""Options of which a run has one: on the command line it takes the place of the other in a file."""
NAMES_ELSEWHERE = {
    "model_name_or_path": "model",
    "dataset_name": "pairs",
    "dataset_train_split": "split",
    "output_dir": "output",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "max_length": "max_tokens",
    "cutoff_len": "max_tokens",
    "sequence_len": "max_tokens",
    "loss_type": "loss",
    "pref_loss": "loss",
    "pref_beta": "beta",
    "label_smoothing": "loss_arguments",
    "simpo_gamma": "loss_arguments",
    "eval_steps": "eval_every",
    "eval_dataset": "eval_pairs",
    "val_size": "eval_share",
    "val_set_size": "eval_share",
    "early_stopping_patience": "patience",
    "load_best_model_at_end": "keep_best",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_targets",
    "lora_target": "lora_targets",
    "bf16": "precision",
    "fp16": "precision",
    "dtype": "weights",
    "torch_dtype": "weights",
    "gradient_checkpointing": "recompute_activations",
    "save_steps": "checkpoint_every",
    "logging_steps": "log_every",
    "report_to": "tensorboard",
}
"""What `trl`, axolotl and LLaMA-Factory call an option: it is refused, and ours is named."""


# --- the options -----------------------------------------------------------------------------


def training_parser(description: str) -> argparse.ArgumentParser:
    """The parser of a run's options, in groups, each with a text and its default."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model MODEL --pairs PAIRS --output OUT [options, see --help]",
        description=description,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="a YAML file of options; by default none")
    _add_data(parser.add_argument_group("data"))
    _add_training(parser.add_argument_group("training"))
    _add_evaluation(parser.add_argument_group("evaluation", "on pairs that are not trained on"))
    _add_adapter(parser.add_argument_group("adapter"))
    _add_memory(parser.add_argument_group("precision and memory"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", required=True, help="a folder, or a name of the hub")
    add("--pairs", required=True, help="a file, or a data set of the hub")
    add("--split", default="train", help="of a data set of the hub")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="the tokenizer's chat template; by default where the pairs have messages",
    )
    add(
        "--chat-arguments",
        type=_json_object,
        metavar="JSON",
        help="of the chat template, as in real.encode; by default none",
    )
    add(
        "--boundary",
        default="prompt",
        choices=["prompt", "common_prefix"],
        help="where an answer begins, as in real.encode",
    )
    add(
        "--columns",
        type=_json_object,
        metavar="JSON",
        help='which are read, such as {"prompt": ["instruction", "input"]}; by default by name',
    )
    add(
        "--reading",
        type=_json_object,
        default={},
        metavar="JSON",
        help='other arguments of real.load_preferences, such as {"labels": [1, 0]}',
    )
    _add_flag(group, "--skip-bad-rows", False, "leave bad rows out, and list them in left_out.txt")
    add("--max-tokens", type=_count, default=1024, help="pairs that are longer are left out")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--loss",
        default="dpo",
        choices=[*loss_names(), *TRL_NAMES],
        metavar="NAME",
        help=f"{', '.join(loss_names())}; or trl's {', '.join(TRL_NAMES)} (its ipo is ipo_mean)",
    )
    add(
        "--loss-arguments",
        type=_json_object,
        default={},
        metavar="JSON",
        help='of the loss, without beta, such as {"label_smoothing": 0.1}',
    )
    add("--beta", type=float, default=0.1, help="of the loss and of the rewards that are shown")
    add("--steps", type=_count, help="of the run; by default what --epochs makes")
    add("--epochs", type=float, help="passes over the pairs, or a part of one; by default 1")
    add("--batch-size", type=_count, default=64, help="pairs a step, of all processes together")
    add("--micro-batch-size", type=_count, default=1, help="pairs a pass, in each process")
    add(
        "--learning-rate",
        type=float,
        help=f"of AdamW; by default {FULL_RATE:g}, and {ADAPTER_RATE:g} of an adapter",
    )
    add(
        "--schedule",
        default="linear",
        choices=["constant", "linear", "cosine"],
        help="of the learning rate after the warm-up",
    )
    add("--warmup", type=float, default=0.1, help="steps, or below 1 a share of all steps")
    add("--weight-decay", type=float, default=0.0, help="of AdamW, towards 0")
    add("--max-grad-norm", type=float, default=1.0, help="a longer gradient is shortened to it")
    add(
        "--length-window",
        type=_count,
        default=1,
        metavar="BATCHES",
        help="sort pairs by length within so many batches; 1 changes no gradient",
    )
    add("--seed", type=int, default=0, help="of the pairs' order and of an adapter's first weights")


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval-pairs", help="a file, or a data set of the hub (its split test); by default none")
    add("--eval-share", type=float, help="of the pairs, to hold out by prompts; by default none")
    add("--eval-every", type=_count, default=100, help="steps from one evaluation to the next")
    add("--patience", type=_count, help="stop after so many without a lower loss; by default never")
    _add_flag(group, "--keep-best", False, "save the model of the lowest loss, not the last one")
    add(
        "--sample-answers",
        type=_count_or_0,
        default=3,
        help="at each evaluation, into answers.jsonl",
    )
    add("--answer-tokens", type=_count, default=128, help="the most tokens of a sampled answer")


def _add_adapter(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lora-rank", type=_count_or_0, default=0, help="0 trains all weights")
    add("--lora-alpha", type=float, help="its scale is alpha / rank; by default alpha is 2 rank")
    add(
        "--lora-targets",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="linear layers, such as q_proj v_proj; all-linear is all but the last",
    )
    add(
        "--lora-dropout",
        type=float,
        default=0.0,
        help="0 alone: without dropout policy and reference read alike",
    )
    add(
        "--save-adapter",
        default="beside",
        choices=["beside", "only", "no"],
        help="in OUT/adapter as peft has it, beside the merged model or without one",
    )


def _add_memory(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--precision",
        type=_precision,
        metavar="{no,bf16}",
        help="of matrix products; by default accelerate's, and else no",
    )
    add(
        "--weights",
        type=_weights,
        default="float32",
        metavar="{float32,bfloat16}",
        help="of the model; bfloat16 under an adapter alone, which stays float32",
    )
    _add_flag(
        group, "--recompute-activations", False, "in the backward pass: slower, in less memory"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", required=True, metavar="OUT", help="a folder of this run alone")
    _add_flag(
        group,
        "--checkpoints",
        True,
        "the same command goes on from them; not under FSDP",
    )
    add("--checkpoint-every", type=_count, default=100, help="steps from one to the next")
    add(
        "--log-every",
        type=_count,
        default=10,
        help="steps from one line on the console to the next",
    )
    _add_flag(group, "--tensorboard", False, "curves in OUT/tensorboard")


def _add_flag(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)


# --- reading and keeping ---------------------------------------------------------------------


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line, and the file that `--config` names.

    What does not fit is refused as argparse does it: a sentence on the console, exit status 2.

    Args:
      parser: `training_parser(...)`.
      arguments: the command line, by default that of the process.
    Returns:
      Every option by its name, with `_`; `learning_rate` is a number.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    file, words = first.parse_known_args(arguments)
    from_file = [] if file.config is None else _words_of_file(parser, Path(file.config), words)
    given, unknown = parser.parse_known_args([*from_file, *words])
    if unknown:
        parser.error(_unknown(parser, unknown[0].partition("=")[0]))
    given.config = file.config
    _check(parser, given)
    if given.learning_rate is None:
        given.learning_rate = ADAPTER_RATE if given.lora_rank else FULL_RATE
    return given


def save_options(path: AnyPath, given: argparse.Namespace) -> None:
    """Write all options of a run as a file for `--config`, whole or not at all.

    The folder of the run is left out: the file lies in it, and another run needs another.
    """
    kept = {k: v for k, v in vars(given).items() if k not in ("config", "output")}
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    write_whole(path, text.encode())


def options_log(path: AnyPath, given: argparse.Namespace) -> Log:
    """A log that calls `save_options` at the first step: a run that is refused leaves it alone."""
    kept = False

    def log(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal kept
        if not kept:
            save_options(path, given)
            kept = True

    return log


def rate_warning(given: argparse.Namespace) -> str | None:
    """What to say of a learning rate that is far too small for an adapter, or None."""
    if not given.lora_rank or given.learning_rate > ADAPTER_RATE / 4:
        return None
    return (
        f"`learning_rate` should be 1e-5 to 1e-4 for an adapter, whose B begins at 0, "
        f"got {given.learning_rate:g}: it may learn next to nothing"
    )


def count_steps(given: argparse.Namespace, n_pairs: int) -> int:
    """The steps of a run on so many pairs: those given, or as many as see every pair in time."""
    if given.steps is not None:
        return int(given.steps)
    epochs = 1.0 if given.epochs is None else given.epochs
    # A step that only rounding asks for is none: 0.1 * 30 is a little above 3.
    return max(1, math.ceil(epochs * n_pairs / given.batch_size - 1e-9))


def count_warmup(given: argparse.Namespace, steps: int) -> int:
    """The steps of the warm-up: a share of all, rounded down, or as many as are given."""
    share = given.warmup < 1
    return int(given.warmup * steps + 1e-9) if share else int(given.warmup)


# --- private functions -----------------------------------------------------------------------


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a text that does not say it; a required option has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.required:
            return action.help
        return super()._get_help_string(action)


def _words_of_file(parser: argparse.ArgumentParser, path: Path, words: Sequence[str]) -> list[str]:
    """The options of a file as a command line, without those that the command line replaces."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"`config` must be a YAML file, got {path}: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        got = type(content).__name__
        parser.error(f"`config` must have options and their values, got a {got} in {path}")
    actions = {action.dest: action for action in parser._actions}
    given = {word.partition("=")[0] for word in words}
    replaced = {
        other
        for pair in EITHER_OR
        for name, other in (pair, pair[::-1])
        if f"--{name.replace('_', '-')}" in given
    }
    found = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions or name in ("help", "config"):
            parser.error(f"{_unknown(parser, str(key))} in {path}")
        if value is not None and name not in replaced:
            found += _words(parser, actions[name], value)
    return found


def _words(parser: argparse.ArgumentParser, action: argparse.Action, value: object) -> list[str]:
    """One option of a file as words of a command line."""
    name = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            parser.error(f"`{action.dest}` must be true or false, got {value!r}")
        return [name if value else f"--no-{name[2:]}"]
    if action.type is _json_object:
        return [f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    if action.nargs == "+":
        return [name, *(map(str, value) if isinstance(value, list) else [str(value)])]
    if value is False and (action.type is _precision or "no" in (action.choices or ())):
        value = "no"  # which YAML reads as false
    if isinstance(value, bool | list | dict):
        parser.error(f"`{action.dest}` must be one number or text, got {value!r}")
    return [f"{name}={value}"]


def _unknown(parser: argparse.ArgumentParser, got: str) -> str:
    names = [action.dest for action in parser._actions]
    name = got.lstrip("-").replace("-", "_")
    near = NAMES_ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, names)), None)
    hint = "--help has all" if near is None else f"did you mean {near}?"
    return f"an option must be one of this script ({hint}), got {got!r}"


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    try:
        loss_by_name(given.loss, given.loss_arguments)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    for one, other in EITHER_OR:
        if None not in (getattr(given, one), getattr(given, other)):
            parser.error(f"`{one}` must be left out where there is `{other}`, got both")
    if given.epochs is not None and not 0 < given.epochs < math.inf:
        parser.error(f"`epochs` must be a number > 0, got {given.epochs}")
    if not 0 <= given.warmup < math.inf or (given.warmup > 1 and given.warmup % 1):
        parser.error(f"`warmup` must be a share below 1 or a number of steps, got {given.warmup}")
    held_out = given.eval_pairs is not None or given.eval_share is not None
    for name in ("patience", "keep_best"):
        if getattr(given, name) and not held_out:
            parser.error(f"`{name}` must have pairs to evaluate (--eval-pairs, --eval-share)")
    if given.lora_dropout:
        parser.error(
            "`lora_dropout` must be 0, since policy and reference are read without dropout (their "
            f"difference would be noise), got {given.lora_dropout}"
        )
    if given.weights == "bfloat16" and not given.lora_rank:
        parser.error(
            "`weights` must be float32 where all weights are trained, since a step of 1e-6 rounds "
            "away in bfloat16, got bfloat16 (--precision bf16 has the products alone in it, and "
            "--lora-rank trains an adapter of float32)"
        )


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return int(text)


def _count_or_0(text: str) -> int:
    return _count(text, least=0)


def _json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object, {{"name": value}}, got {text!r}')
    return value


def _precision(text: str) -> str:
    return _one_of(text, ("no", "bf16"))


def _weights(text: str) -> str:
    return _one_of(text, ("float32", "bfloat16"))


def _one_of(text: str, names: tuple[str, str]) -> str:
    if text in names:
        return text
    why = FP16 if text in ("fp16", "float16", "half") else ""
    raise argparse.ArgumentTypeError(f"must be {names[0]} or {names[1]}, got {text}{why}")


FP16 = (
    " (in float16 small gradients are 0: it would need a scaled loss; bf16 runs on the same GPUs "
    "since 2020, and full precision on all)"
)
"""Why half precision is bfloat16 here."""

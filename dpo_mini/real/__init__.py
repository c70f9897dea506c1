"""The same losses on a `transformers` language model and on preferences that somebody wrote.

Nothing of the method is here. A pair is read from a file, turned into tokens and scored by any
causal language model; then `train.fit_sft` and `train.fit_preferences` do what they do on the toys.
`train_preferences` is the same loop for models that do not fit in one pass, one device or one day.
Single answers with a thumb, up or down, are `Rating`s, and `train_ratings` is KTO on them.

Files are read and never run: weights are safetensors, code that a model or data set brings along is
refused, and nothing is downloaded unless a function with that in its name is called
(`download_model`, `load_hub_preferences`, `load_hub_ratings`).
"""

import warnings

with warnings.catch_warnings():
    # Of tqdm, in a Jupyter without ipywidgets; the bars that it would draw are switched off.
    # Here, before any file of this folder imports transformers.
    warnings.filterwarnings("ignore", message="IProgress not found")
    try:
        import safetensors  # noqa: F401
        import tokenizers  # noqa: F401
        from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: F401
    except ModuleNotFoundError as error:
        needs = f"dpo_mini.real needs the package {error.name}"
        how = 'pip install transformers datasets accelerate peft, or pip install "dpo_mini[real]"'
        raise ModuleNotFoundError(f"{needs}: {how}", name=error.name) from None

from dpo_mini.real.adapters import adapter_off, add_lora, save_adapter
from dpo_mini.real.answers import report_answers
from dpo_mini.real.batches import cut_long, drop_long, pair_lengths, shuffled_batches
from dpo_mini.real.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from dpo_mini.real.evaluation import Evaluation, load_best
from dpo_mini.real.locks import lock_folder
from dpo_mini.real.logs import console_log, csv_log, tensorboard_log
from dpo_mini.real.loss_names import loss_by_name, loss_names
from dpo_mini.real.measures import (
    greedy_answer,
    preference_accuracy,
    preference_margins,
    sample_answer,
)
from dpo_mini.real.memory import bf16_memory, full_memory, lora_memory, sharded_memory
from dpo_mini.real.models import (
    CausalLMPolicy,
    download_model,
    load_model,
    save_model,
    tiny_gpt2,
)
from dpo_mini.real.preferences import (
    Preference,
    Rating,
    load_hub_preferences,
    load_hub_ratings,
    load_preferences,
    load_ratings,
    save_preferences,
    split_preferences,
)
from dpo_mini.real.schedules import (
    constant,
    warmup_then_constant,
    warmup_then_cosine,
    warmup_then_linear,
)
from dpo_mini.real.scoring import bf16_autocast, full_precision, reference_logps
from dpo_mini.real.symptoms import Finding, diagnose
from dpo_mini.real.tokens import (
    CHAT,
    END,
    TEMPLATE,
    count_tokens,
    default_template,
    encode,
    train_tokenizer,
)
from dpo_mini.real.training import save_trained, train_preferences, train_ratings

__all__ = [
    "CHAT",
    "END",
    "TEMPLATE",
    "CausalLMPolicy",
    "Checkpoint",
    "Evaluation",
    "Finding",
    "Preference",
    "Rating",
    "adapter_off",
    "add_lora",
    "bf16_autocast",
    "bf16_memory",
    "console_log",
    "constant",
    "count_tokens",
    "csv_log",
    "cut_long",
    "default_template",
    "diagnose",
    "download_model",
    "drop_long",
    "encode",
    "full_memory",
    "full_precision",
    "greedy_answer",
    "load_best",
    "load_checkpoint",
    "load_hub_preferences",
    "load_hub_ratings",
    "load_model",
    "load_preferences",
    "load_ratings",
    "lock_folder",
    "lora_memory",
    "loss_by_name",
    "loss_names",
    "pair_lengths",
    "preference_accuracy",
    "preference_margins",
    "reference_logps",
    "report_answers",
    "sample_answer",
    "save_adapter",
    "save_checkpoint",
    "save_model",
    "save_preferences",
    "save_trained",
    "sharded_memory",
    "shuffled_batches",
    "split_preferences",
    "tensorboard_log",
    "tiny_gpt2",
    "train_preferences",
    "train_ratings",
    "train_tokenizer",
    "warmup_then_constant",
    "warmup_then_cosine",
    "warmup_then_linear",
]


def __dir__() -> list[str]:
    return __all__

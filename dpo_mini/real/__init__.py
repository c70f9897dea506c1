"""The same losses on a `transformers` language model and on preferences that somebody wrote.

Nothing of the method is here. A pair is read from a file, turned into tokens and scored by any
causal language model; then `train.fit_sft` and `train.fit_preferences` do what they do on the toys.

Files are read and never run: weights are safetensors, code that a model or data set brings along is
refused, and nothing is downloaded unless a function with that in its name is called
(`download_model`, `load_hub_preferences`).
"""

import warnings

with warnings.catch_warnings():
    # Of tqdm, in a Jupyter without ipywidgets; the bars that it would draw are switched off.
    # Here, before any file of this folder imports transformers.
    warnings.filterwarnings("ignore", message="IProgress not found")
    from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: F401

from dpo_mini.real.measures import (
    greedy_answer,
    preference_accuracy,
    preference_margins,
    sample_answer,
)
from dpo_mini.real.models import (
    CausalLMPolicy,
    download_model,
    load_model,
    save_model,
    tiny_gpt2,
)
from dpo_mini.real.preferences import (
    Preference,
    load_hub_preferences,
    load_preferences,
    save_preferences,
)
from dpo_mini.real.tokens import CHAT, END, TEMPLATE, count_tokens, encode, train_tokenizer

__all__ = [
    "CHAT",
    "END",
    "TEMPLATE",
    "CausalLMPolicy",
    "Preference",
    "count_tokens",
    "download_model",
    "encode",
    "greedy_answer",
    "load_hub_preferences",
    "load_model",
    "load_preferences",
    "preference_accuracy",
    "preference_margins",
    "sample_answer",
    "save_model",
    "save_preferences",
    "tiny_gpt2",
    "train_tokenizer",
]

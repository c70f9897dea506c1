"""`examples/dpo_in_trl.py` beside `examples/train_dpo.py`: one run in two libraries."""

import importlib.util
import os
import random
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")
try:
    installed = version("trl")
except PackageNotFoundError:
    pytest.skip("trl is not installed (it needs Python 3.11)", allow_module_level=True)

from safetensors.torch import load_file

from dpo_mini import real
from dpo_mini.real import Preference

ROOT = Path(__file__).resolve().parent.parent
SAME = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "grad_norm")
PAIRS = [
    Preference(f"film {n} was", "very good " * (n % 4 + 1), "bad " * (n % 3 + 1)) for n in range(23)
]


@pytest.fixture
def quiet():
    """What trl warns of, and the global states that it draws from, put back."""
    import numpy

    states = random.getstate(), numpy.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])  # noqa: NPY002


def script(name):
    path = ROOT / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", ["text", "messages"])
def test_the_same_run_has_the_same_numbers_in_trl(tmp_path, form, quiet, monkeypatch, capfd):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    tokenizer = real.train_tokenizer(texts, vocab_size=290)
    pairs = PAIRS
    if form == "messages":
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}"
            "{{ eos_token if m.role == 'assistant' else '\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
        )
        pairs = [Preference(p.prompt, p.chosen, p.rejected, (("user", p.prompt),)) for p in PAIRS]
    generator = torch.Generator().manual_seed(0)
    model = real.tiny_gpt2(tokenizer, n_positions=64, generator=generator, n_heads=2, width=16)
    with torch.no_grad():  # as far from uniform as a trained model is
        for weight in model.parameters():
            weight.mul_(8.0) if weight.dim() > 1 else None
    real.save_model(model, tokenizer, tmp_path / "model")
    real.save_preferences(tmp_path / "pairs.jsonl", pairs)
    options = ["--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl"]
    options += ["--steps", 12, "--batch-size", 6, "--micro-batch-size", 3, "--max-tokens", 40]
    options += ["--learning-rate", 1e-3, "--beta", 0.2, "--max-grad-norm", 0.5, "--seed", 3]
    here, there = (
        script(name).main([*map(str, options), "--output", str(tmp_path / name)])
        for name in ("train_dpo", "dpo_in_trl")
    )
    history = here[1]
    log = [line for line in there.state.log_history if "loss" in line]
    assert len(log) == len(history["loss"]) == 12
    assert max(history["grad_norm"]) > 0.5  # clipped
    assert history["loss"][0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(history["loss"][-1] - history["loss"][0]) > 0.05  # it learns
    for name in SAME:
        theirs = [line[name] for line in log]
        assert history[name] == pytest.approx(theirs, abs=2e-4, rel=1e-3), name
    ours, theirs = (
        load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("train_dpo", "dpo_in_trl")
    )
    assert ours.keys() == theirs.keys()
    moved = max(
        (ours[n] - w).abs().max().item() for n, w in model.state_dict().items() if n in ours
    )
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    assert apart < 1e-4 < 1e-3 < moved

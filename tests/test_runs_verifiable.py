"""The stored runs of chapter 10: a small part made anew, and what the file must hold."""

import pytest
import torch

from dpo_mini import rollout, runs, tasks
from dpo_mini.runs import verifiable

STORED = runs.load("verifiable")
METHODS = ("RLOO", "GRPO", "MaxRL")


@pytest.fixture(autouse=True)
def float64():
    """As tools/store_runs.py and the chapter have it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["sort", "sums"])
def test_the_file_has_ten_seeds_of_every_method(name):
    at = STORED[name]["at"]
    assert at == list(range(0, verifiable.STEPS[name] + 1, verifiable.EVERY))
    assert torch.tensor(STORED[name]["start"]).shape == (10, 20)
    for method in METHODS:
        run = STORED[name][method]
        assert torch.tensor(run["end"]).shape == (10, 20)
        for k in (1, 8):
            for which in ("training", "held-out"):
                assert torch.tensor(run[f"pass@{k}"][which]).shape == (10, len(at))


@pytest.mark.parametrize("name", ["sort", "sums"])
def test_the_measures_of_the_held_out_prompts_are_those_of_their_probabilities(name):
    for method in METHODS:
        run = STORED[name][method]
        for k in (1, 8):
            stored = torch.tensor(run[f"pass@{k}"]["held-out"])
            for at, probs in ((0, STORED[name]["start"]), (-1, run["end"])):
                again = verifiable.pass_at(torch.tensor(probs), k).mean(1)
                torch.testing.assert_close(stored[:, at], again, atol=5e-4, rtol=0)


def test_a_success_probability_is_that_of_the_enumeration():
    task = tasks.tiny_sort()
    generator = torch.Generator().manual_seed(3)
    policy = verifiable.supervised_start("sort", generator=generator, steps=20)
    with torch.no_grad():
        exact = (rollout.enumerate_logps(policy, task).exp() * task.rewards).sum(1)
    torch.testing.assert_close(verifiable.success_probs(policy, task), exact)


def test_a_short_run_made_anew_learns():
    made = verifiable.make(seeds=[0], steps={"sort": 40}, sft_steps=150)["sort"]
    assert made["at"] == [0, 20, 40]
    for method in METHODS:
        training = made[method]["pass@1"]["training"][0]
        assert len(training) == 3
        assert training[2] > training[0] + 0.1, method
        assert 0 <= min(made[method]["end"][0]) <= max(made[method]["end"][0]) <= 1

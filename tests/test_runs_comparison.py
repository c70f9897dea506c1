"""The stored runs of chapter 09: their form, what is exact in them, and a part of them anew."""

import ast
import math
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
import torch

from dpo_mini import closed_form, rollout, runs
from dpo_mini.devices import on_device
from dpo_mini.runs import comparison

ROOT = Path(__file__).resolve().parent.parent
STORED = runs.load("comparison")
EXACT = ("pi*", "RM optimum", "best of 4", "best of 16", "best of 64", "best of 256")
WRITERS = ("DPO, pi* wrote", "DPO, both wrote")
_, seeded = on_device("cpu")


@pytest.fixture(scope="module")
def world():
    """That of seed 0, in float64 as everywhere in the runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield comparison.draw_world(0)
    torch.set_default_dtype(before)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(comparison, "STEPS", comparison.STEPS | {"steps": 30})
    monkeypatch.setattr(comparison, "_MARKS", (10,))


def rows(method, beta=0.5):
    return [row for row in STORED["runs"] if (row["method"], row["beta"]) == (method, beta)]


# --- the file -----------------------------------------------------------------------------------


def test_every_method_is_there_with_every_seed():
    assert set(STORED) == {"runs", "gradients"}
    assert len(comparison.SEEDS) >= 5
    wanted = {
        (name, seed, beta)
        for seed in comparison.SEEDS
        for beta in comparison.BETAS
        for name in (*comparison.METHODS, *EXACT, *WRITERS)
        if beta == comparison.BETAS[0] or name in (*comparison.EVERYWHERE, *EXACT)
    }
    found = [(row["method"], row["seed"], row["beta"]) for row in STORED["runs"]]
    assert len(found) == len(wanted)
    assert set(found) == wanted


def test_a_run_says_what_it_cost_and_where_it_ended():
    for row in STORED["runs"]:
        numbers = [row[key] for key in ("kl_star", "kl_ref", "reward", "gap", "untold")]
        assert all(math.isfinite(number) for number in numbers)
        assert row["kl_star"] >= 0
        assert 0 <= row["untold"] <= 1
        assert ("learned_minus_true" in row) == (row["method"] in ("pi*", "RM optimum"))
        if row["method"] in EXACT:
            continue
        steps, prefixes, kls = zip(*row["trail"], strict=True)
        assert list(steps) == sorted(steps)
        assert list(prefixes) == sorted(prefixes)
        assert (steps[-1], prefixes[-1], kls[-1]) == (200, row["prefixes"], row["kl_star"])


def test_the_clip_binds_with_four_epochs_and_not_with_one():
    assert all(row["clipped"] == 0 for row in rows("PPO, 1 epoch"))
    assert all(0.05 < row["clipped"] < 0.4 for row in rows("PPO"))


def test_the_gap_identity_holds_in_every_row():
    """J* - J = beta KL(pi || pi*), with J* from the row of pi* of the same seed and beta."""
    best = {
        (row["seed"], row["beta"]): row["reward"] - row["beta"] * row["kl_ref"]
        for row in STORED["runs"]
        if row["method"] == "pi*"
    }
    for row in STORED["runs"]:
        lacks = best[row["seed"], row["beta"]] - (row["reward"] - row["beta"] * row["kl_ref"])
        assert lacks == pytest.approx(row["beta"] * row["kl_star"], abs=5e-6)


def test_nobody_is_above_the_frontier():
    assert min(row["gap"] for row in STORED["runs"]) > -2e-6
    assert all(abs(row["gap"]) < 2e-6 for row in STORED["runs"] if row["method"] == "pi*")


def test_gradients_are_there_with_every_seed_at_every_moment():
    found = [(row["seed"], row["step"]) for row in STORED["gradients"]]
    assert found == [(seed, step) for seed in comparison.SEEDS for step in (0, 20, 80, 200)]
    for row in STORED["gradients"]:
        for name, each in row["estimators"].items():
            assert -1 <= each["cosine"] <= 1
            assert each["signal_to_noise"] >= 0
            if name != "DPO":  # their mean is the gradient of J itself
                assert each["cosine_of_mean"] == pytest.approx(1)


# --- a part of it anew ----------------------------------------------------------------------------


def test_what_needs_no_training_but_the_references_comes_out_again(world):
    """Two hundred steps of SFT in float64 are the same everywhere, up to a few digits."""
    learned = torch.zeros_like(world.task.rewards)  # then its optimum is the reference
    again = {row["method"]: row for row in comparison._exact(world, learned, 0, 0.5)}
    for name in set(EXACT) - {"RM optimum"}:
        (stored,) = (row for row in rows(name) if row["seed"] == 0)
        for key in ("kl_star", "kl_ref", "reward"):
            assert again[name][key] == pytest.approx(stored[key], abs=0.01)
    assert again["RM optimum"]["kl_ref"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", comparison.METHODS)
def test_every_method_trains_and_says_what_it_read(name, world, monkeypatch):
    monkeypatch.setattr(comparison, "STEPS", comparison.STEPS | {"steps": 2, "batch_size": 64})
    monkeypatch.setattr(comparison, "_MARKS", (1,))
    row = comparison.run(world, name, 0.5, world.task.rewards, seed=0)
    assert 0 < row["kl_ref"] < 1  # two small steps
    assert [step for step, *_ in row["trail"]] == [1, 2]
    assert 0 < row["trail"][0][1] < row["prefixes"]


def test_thirty_steps_on_its_own_pairs_go_most_of_the_way(world, few_steps):
    row = comparison.run(world, "on-policy DPO", 0.5, world.task.rewards, seed=0)
    best = closed_form.optimal_logps(world.ref_logps, world.task.rewards, 0.5)
    start = closed_form.kl(world.ref_logps, best).mean().item()
    assert start > 4
    assert 0.3 < row["kl_star"] < 2.5
    assert row["trail"][0][0] == 10
    assert row["untold"] < 0.3


def test_thirty_steps_of_squared_loss_on_its_own_pairs_ask_for_two_scores_per_pair(
    world, few_steps
):
    asked, table = [], world.task.rewards
    score = comparison.score_by(world.task, table, torch.zeros_like(table).bool())

    def counted(prompts, completions):
        asked.append(len(prompts))
        return score(prompts, completions)

    policy = deepcopy(world.reference)
    comparison.on_policy_squared_loss(world, policy, 0.5, counted, generator=seeded(2))
    best = closed_form.optimal_logps(world.ref_logps, table, 0.5)
    with torch.no_grad():
        logps = rollout.enumerate_logps(policy, world.task)
    assert asked == [1024] * 30
    assert 0.3 < closed_form.kl(logps, best).mean() < 2.5


def test_the_mean_error_of_a_reward_counts_from_the_reference(world):
    """A constant per prompt changes nothing; r / 2 is too low by half of what pi* gains."""
    rewards, best = world.task.rewards, comparison._best(world, 0.5)
    shifted = rewards + torch.arange(4.0)[:, None]
    assert comparison._mean_error(world, shifted, best) == pytest.approx(0, abs=1e-9)
    gains = [closed_form.expected_reward(each, rewards) for each in (best, world.ref_logps)]
    half = -(gains[0] - gains[1]).mean().item() / 2
    assert comparison._mean_error(world, rewards / 2, best) == pytest.approx(half)


def test_thirty_steps_of_ppo_clip_and_ask_for_as_many_scores(world, few_steps):
    asked = []
    score = comparison.score_by(world.task, world.task.rewards, torch.zeros(4, 177_156).bool())

    def counted(prompts, completions):
        asked.append(len(prompts))
        return score(prompts, completions)

    policy = deepcopy(world.reference)
    history = comparison.ppo(world, policy, 0.5, counted, generator=seeded(0))
    assert asked == [512] * 30
    assert max(history["clipped"]) > 0.02


def test_a_reward_model_learns_from_the_pairs_and_is_centred(world, few_steps):
    learned = comparison.fit_rewards(world, generator=seeded(1))
    means = (world.ref_logps.exp() * learned).sum(1)
    assert torch.allclose(means, torch.zeros(4), atol=1e-9)
    prompts, chosen, rejected = world.pairs
    right = (
        learned[prompts, world.task.index(chosen)] > learned[prompts, world.task.index(rejected)]
    )
    assert right.double().mean() > 0.6


def test_make_asks_for_every_seed(monkeypatch):
    part = {"runs": [{"seed": 1}], "gradients": [{"step": 0}]}
    monkeypatch.setattr(comparison, "_of_seed", lambda seed: part)
    made = comparison.make(progress=iter)
    assert len(made["runs"]) == len(made["gradients"]) == len(comparison.SEEDS)


# --- the chapter shows the functions that made the runs -------------------------------------------


def bare(function):
    """A function's code without its types and its docstring."""
    function = deepcopy(function)
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    function.returns = None
    arguments = function.args
    for each in (*arguments.args, *arguments.kwonlyargs, arguments.kwarg):
        if each is not None:
            each.annotation = None
    return ast.unparse(function)


def functions(source):
    nodes = ast.parse(source).body
    return {node.name: bare(node) for node in nodes if isinstance(node, ast.FunctionDef)}


def test_the_chapter_shows_the_functions_that_made_the_runs():
    (path,) = (ROOT / "notebooks").glob("09_*.ipynb")
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    shown = functions("\n".join(cells))
    ours = functions(Path(comparison.__file__).read_text(encoding="utf-8"))
    for name in ("dpo", "on_policy_dpo", "rloo", "ppo"):
        assert shown[name] == ours[name], name
    for source in cells:
        if source.startswith("STEPS = "):
            assert ast.literal_eval(ast.parse(source).body[0].value) == comparison.STEPS
            return
    raise AssertionError("the chapter says not what STEPS are")

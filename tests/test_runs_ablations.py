"""The stored runs of chapter 08: their form, and a part of them made anew."""

import math

import pytest
import torch

from dpo_mini import rollout, runs, tasks
from dpo_mini.runs import ablations

STORED = runs.load("ablations")
HEALTH = {
    "distance", "reward", "kl", "objective", "entropy", "explained_variance", "clipped",
    "value_loss", "largest", "curves",
}  # fmt: skip


def numbers(found):
    """All numbers in what was stored."""
    if isinstance(found, dict):
        found = list(found.values())
    return [found] if isinstance(found, float) else [n for part in found for n in numbers(part)]


def test_the_file_has_five_seeds_of_each_run_and_finite_numbers():
    assert set(STORED) == {"untrained", "details", "betas", "health", "chase", "models"}
    assert all(math.isfinite(number) for number in numbers(STORED))
    for rows in STORED["details"].values():
        assert {name: len(ends) for name, ends in rows.items()} == {"short": 5, "long": 5}
    assert {name: len(ends) for name, ends in STORED["betas"].items()} == {"2": 5, "1": 5, "0.5": 5}
    assert set(STORED["health"]) == {"healthy", "learning rate 0.2", "no clip"}
    for found in STORED["health"].values():
        assert [set(run) for run in found] == [HEALTH] * 5
        for run in found:
            curves = run["curves"]
            assert {name: len(curve) for name, curve in curves.items()} == dict.fromkeys(
                ablations.CURVES, 50
            )
            assert all(max(curve) <= run["largest"][name] + 1e-4 for name, curve in curves.items())
    for path in STORED["chase"]:
        assert [len(point) for point in path] == [3] * 10
    assert len(STORED["chase"]) == len(STORED["models"]) == 5
    for model in STORED["models"]:
        assert model["peak"][2] >= model["end"][2]


@pytest.fixture(scope="module")
def setting():
    """The reviews of three words, their reference and the best policy."""
    g = ablations.seeded(0)
    demos = tasks.micro_review_demonstrations(8000, generator=g)
    short = ablations.three_words(tasks.micro_reviews())
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as the runs were made
    try:
        small = ablations.short_reference(short, demos)
    finally:
        torch.set_default_dtype(default)
    return short, small, *ablations.tables(short, small, 0.5)


def test_the_details_are_those_of_the_file(setting):
    short, *_, best = setting
    assert set(ablations.details(short, 1.0)) == set(STORED["details"])
    assert best.exp().sum(1).tolist() == pytest.approx([1.0] * 4)


def test_two_rows_run_anew_end_as_they_are_stored(setting):
    short, small, ref_logps, best = setting
    untrained = (ref_logps.exp() * (ref_logps - best)).sum(1).mean().item()
    assert untrained == pytest.approx(STORED["untrained"], abs=1e-6)
    rows = ablations.details(short, 1.0)
    for name in ("everything on", "score on the first token"):
        end = ablations.run_detail(
            short, small, best, seed=1, steps=ablations.SHORT_STEPS, **rows[name]
        )
        stored = STORED["details"][name]["short"]
        slack = 0.3 + max(stored) - min(stored)
        assert min(stored) - slack < end < max(stored) + slack, name


def test_where_the_learned_reward_is_the_true_one_its_optimum_gains_equally(setting):
    short, _, ref_logps, best = setting
    nats, *gains = ablations.place(best, ref_logps, (short.rewards, short.rewards))
    assert nats**2 == pytest.approx((best.exp() * (best - ref_logps)).sum(1).mean().item())
    assert gains[0] == gains[1] > 0
    start = ablations.place(ref_logps, ref_logps, (short.rewards,))
    assert start == pytest.approx([0.0, 0.0], abs=1e-6)


def test_a_score_on_the_first_token_moves_nothing_else():
    scores, penalties = torch.tensor([2.0, -1.0]), torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    want = torch.tensor([[1.5, -0.25], [-2.0, 0.0]])
    assert torch.equal(ablations.on_first(scores, penalties, mask), want)


def test_the_reference_of_three_words_is_a_policy_over_all_of_them(setting):
    short, small, ref_logps, _ = setting
    assert ref_logps.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    drawn = rollout.sample(small, short.prompts, generator=ablations.seeded(2))
    assert drawn.shape == (4, 3)

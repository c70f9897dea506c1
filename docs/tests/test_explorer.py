"""The explorer, driven through its own inputs: its numbers are the library's to 1e-6."""

import itertools
import random
import re
from pathlib import Path

import pytest
import torch

from dpo_mini import closed_form, losses, tasks

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
LOSSES = (
    "dpo_loss", "cdpo_loss", "rdpo_loss", "ipo_loss", "hinge_loss", "exo_loss", "discopop_loss",
    "f_dpo_loss", "nca_loss", "bco_loss", "sppo_loss", "apo_zero_loss", "apo_down_loss",
)  # fmt: skip
# Put values into inputs as a hand does, and read all numbers of the tables.
DRIVE = """given => {
  const form = document.querySelector(".explorer form");
  for (const [name, value] of Object.entries(given)) {
    form.elements[name].value = value;
    if (form.elements[name].value !== String(value)) throw Error(`${name} does not take ${value}`);
    form.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
  }
  return Object.fromEntries([...document.querySelectorAll(".explorer [data-key]")]
    .map(cell => [cell.dataset.key, Number(cell.dataset.value)]));
}"""


def settings(loss: str, divergence: str) -> dict:
    """Values that the inputs can take, drawn with a seed of their own for every pair of names."""
    draw = random.Random(f"{loss} {divergence}")
    instance = draw.choice(["four", "three"])
    size = {"four": 4, "three": 3}[instance]
    given = {"instance": instance, "loss": loss, "divergence": divergence}
    given["beta"] = round(draw.uniform(0.1, 3), 2)
    given["way"] = draw.choice([0, 1, round(draw.uniform(0, 2), 2)])
    given["alpha"] = round(draw.randint(1, 19) * 0.05, 2)
    given["smoothing"] = round(draw.uniform(0.01, 0.45), 2)
    for i in range(size):
        given[f"reward{i}"] = round(draw.randint(-40, 40) * 0.05, 2)
        given[f"weight{i}"] = round(draw.uniform(0.05, 1), 2)
    given["chosen"], given["rejected"] = draw.sample(range(size), 2)
    return given


def tables(given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    size = {"four": 4, "three": 3}[given["instance"]]
    weights = torch.tensor([[given[f"weight{i}"] for i in range(size)]], dtype=torch.float64)
    rewards = torch.tensor([[given[f"reward{i}"] for i in range(size)]], dtype=torch.float64)
    return (weights / weights.sum()).log(), rewards


def f_dpo(logps, ref_logps, i: int, j: int, given: dict) -> torch.Tensor:
    four = logps[:, i], logps[:, j], ref_logps[:, i], ref_logps[:, j]
    more = {"divergence": given["divergence"], "alpha": given["alpha"]}
    return losses.f_dpo_loss(*four, beta=given["beta"], **more)


def on_the_frontier(nats: float, ref_logps, rewards) -> float:
    """The reward of the frontier at a KL, by bisection of `closed_form.frontier` in beta."""
    low, high = 1e-6, 1e8
    for _ in range(100):
        middle = (low * high) ** 0.5
        (found,), (reward,) = closed_form.frontier(ref_logps, rewards, [middle])
        low, high = (middle, high) if found > nats else (low, middle)
    return reward.item()


@pytest.fixture
def explorer(tab, site):
    page = tab()
    page.goto(f"{site}explorer.html")
    return page


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_number_is_the_librarys(divergence, explorer):
    for loss in LOSSES:
        given = settings(loss, divergence)
        got = explorer.evaluate(DRIVE, given)
        ref_logps, rewards = tables(given)
        beta, size = given["beta"], rewards.shape[1]

        def row(key, got=got, size=size):
            return torch.tensor([[got[f"{key}{i}"] for i in range(size)]], dtype=torch.float64)

        def near(key, value, got=got, given=given):
            value = value.item() if isinstance(value, torch.Tensor) else value
            assert got[key] == pytest.approx(value, abs=1e-6, rel=0), (key, given)

        def all_near(key, values, row=row):
            torch.testing.assert_close(row(key), values, atol=1e-6, rtol=0)

        # The optimum: known for reverse KL; for the others, the policy whose f-DPO margins are
        # the differences of the rewards.
        best = row("best").log()
        assert best.logsumexp(1).item() == pytest.approx(0, abs=1e-9)
        if divergence == "reverse_kl":
            all_near("best", closed_form.optimal_logps(ref_logps, rewards, beta).exp())
            near("multiplier", beta * closed_form.log_partition(ref_logps, rewards, beta))
        for i, j in itertools.permutations(range(size), 2):
            truth = losses.reward_model_loss(rewards[:, i], rewards[:, j])
            torch.testing.assert_close(
                f_dpo(best, ref_logps, i, j, given), truth, atol=1e-6, rtol=0
            )
        all_near("reference", ref_logps.exp())
        near("logZ", closed_form.log_partition(ref_logps, rewards, beta))

        # The policy on its way, and where each of the three lies.
        logits = (ref_logps + given["way"] * (best - ref_logps)).requires_grad_()
        logps = logits.log_softmax(1)
        held = logps.detach()
        all_near("policy", held.exp())
        all_near("implied", closed_form.implied_rewards(held, ref_logps, beta))
        for key, policy in (("start", ref_logps), ("top", best), ("at", held)):
            nats = closed_form.kl(policy, ref_logps)
            mean = closed_form.expected_reward(policy, rewards)
            near(f"{key}Nats", nats)
            near(f"{key}Mean", mean)
            near(f"{key}Objective", closed_form.objective(policy, ref_logps, rewards, beta))
            ceiling = on_the_frontier(nats.item(), ref_logps, rewards)
            near(f"{key}Below", ceiling - mean)
            assert got[f"{key}Below"] > -1e-7

        # The pair: the loss, its slopes and its gradient, by autograd.
        i, j = given["chosen"], given["rejected"]
        more = {"beta": beta}
        if loss in ("cdpo_loss", "rdpo_loss", "exo_loss"):
            more["label_smoothing"] = given["smoothing"]
        if loss == "f_dpo_loss":
            more |= {"divergence": divergence, "alpha": given["alpha"]}
        pair = logps[:, i], logps[:, j]
        value = getattr(losses, loss)(*pair, ref_logps[:, i], ref_logps[:, j], **more).sum()
        slopes = torch.autograd.grad(value, [*pair, logits])
        near("loss", value)
        near("slopeA", slopes[0])
        near("slopeB", slopes[1])
        all_near("step", -slopes[2])


def test_the_instances_are_those_of_the_course(explorer):
    for name, task in (("four", tasks.four_answers()), ("three", tasks.three_answers())):
        got = explorer.evaluate(DRIVE, {"instance": name})
        size = task.rewards.shape[1]
        assert [got[f"reward{i}"] for i in range(size)] == task.rewards[0].tolist()
        read = [got[f"reference{i}"] for i in range(size)]
        assert read == pytest.approx(task.ref_logps[0].exp().tolist(), abs=1e-12)
        assert f"reward{size}" not in got


def test_it_works_by_keyboard_and_says_what_happened(explorer):
    slider = explorer.get_by_label("β, reward per nat")
    slider.focus()
    for _ in range(10):
        explorer.keyboard.press("ArrowRight")
    assert slider.input_value() == "0.6"
    status = explorer.get_by_role("status")
    explorer.wait_for_function("document.querySelector('.says').textContent.includes('β 0.6')")
    assert re.search(r"optimum has J \d\.\d{4}", status.inner_text())
    unnamed = explorer.eval_on_selector_all(
        ".explorer :is(input, select)", "all => all.filter(one => !one.labels.length).length"
    )
    assert unnamed == 0
    assert explorer.locator(".explorer svg[role=img][aria-label]").count() == 2


def test_a_table_is_there_without_scripts(tab, site):
    page = tab(java_script_enabled=False)
    page.goto(f"{site}explorer.html")
    assert "log Z = 1.3834" in page.locator(".explorer noscript").inner_text()
    assert page.locator(".explorer form").is_hidden()


@pytest.mark.parametrize("chapter", ["02", "05", "10"])
def test_the_same_widget_stands_in_chapters(chapter, tab, site):
    (name,) = (Path(__file__).resolve().parents[2] / "notebooks").glob(f"{chapter}_*.ipynb")
    page = tab()
    page.goto(f"{site}notebooks/{name.stem}.html")
    got = page.evaluate(DRIVE, {"beta": 1})
    task = tasks.four_answers()
    log_z = closed_form.log_partition(task.ref_logps, task.rewards, 1.0).item()
    assert got["logZ"] == pytest.approx(log_z, abs=1e-9)

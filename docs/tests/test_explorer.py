"""The explorer, driven through its own inputs: its numbers are the library's to 1e-6."""

import html
import itertools
import json
import random
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import torch

from dpo_mini import closed_form, losses, tasks
from dpo_mini.explorer import DIVERGENCES, LOSSES, Explorer, course_instances

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
PYTHON = ROOT / ".venv" / "bin" / "python"  # nbconvert finds its templates beside its own Python
CHAPTERS = {path.name[:2]: path for path in NOTEBOOKS.glob("*.ipynb")}
SMOOTHED = ("cdpo_loss", "rdpo_loss", "exo_loss")
WITHOUT_REFERENCE = ("simpo_loss", "cpo_loss", "orpo_loss")
COURSE = course_instances()
# Put values into inputs as a hand does, and read all numbers of the tables.
DRIVE = """given => {
  const root = document.querySelector("[data-dpo-explorer]").shadowRoot;
  const form = root.querySelector("form");
  for (const [name, value] of Object.entries(given)) {
    form.elements[name].value = value;
    if (form.elements[name].value !== String(value)) throw Error(`${name} does not take ${value}`);
    form.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
  }
  return Object.fromEntries([...root.querySelectorAll("[data-key]")]
    .map(cell => [cell.dataset.key, Number(cell.dataset.value)]));
}"""


def settings(loss: str, divergence: str, instances: list[dict] = COURSE) -> dict:
    """Values that the inputs can take, drawn with a seed of their own for every pair of names."""
    draw = random.Random(f"{loss} {divergence}")
    instance = draw.randrange(len(instances))
    size = len(instances[instance]["rewards"])
    given = {"instance": instance, "loss": loss, "divergence": divergence}
    given["beta"] = round(draw.uniform(0.1, 3), 2)
    given["shift"] = round(draw.randint(-40, 40) * 0.05, 2)
    given["way"] = draw.choice([0, 1, round(draw.uniform(0, 2), 2)])
    given["alpha"] = round(draw.randint(1, 19) * 0.05, 2)
    given["smoothing"] = round(draw.uniform(0.01, 0.45), 2)
    given["gamma"] = round(draw.randint(0, 40) * 0.05, 2)
    for i in range(size):
        given[f"reward{i}"] = round(draw.randint(-40, 40) * 0.05, 2)
        given[f"weight{i}"] = round(draw.uniform(0.05, 1), 2)
    given["chosen"], given["rejected"] = draw.sample(range(size), 2)
    return given


def tables(given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    size = sum(name.startswith("weight") for name in given)
    weights = torch.tensor([[given[f"weight{i}"] for i in range(size)]], dtype=torch.float64)
    rewards = torch.tensor([[given[f"reward{i}"] for i in range(size)]], dtype=torch.float64)
    return (weights / weights.sum()).log(), rewards + given["shift"]


def f_dpo(logps, ref_logps, i: int, j: int, given: dict) -> torch.Tensor:
    four = logps[:, i], logps[:, j], ref_logps[:, i], ref_logps[:, j]
    more = {"divergence": given["divergence"], "alpha": given["alpha"]}
    return losses.f_dpo_loss(*four, beta=given["beta"], **more)


def loss_of_pair(logps, ref_logps, given: dict) -> torch.Tensor:
    """The library's loss of the pair, `[]`, and what it is a function of."""
    name, i, j = given["loss"], given["chosen"], given["rejected"]
    if name == "f_dpo_loss":
        return f_dpo(logps, ref_logps, i, j, given).sum()
    more = {"beta": given["beta"]}
    if name in SMOOTHED:
        more["label_smoothing"] = given["smoothing"]
    if name == "simpo_loss":
        more["gamma"] = given["gamma"]
    tensors = [logps[:, i], logps[:, j]]
    if name not in WITHOUT_REFERENCE:
        tensors += [ref_logps[:, i], ref_logps[:, j]]
    return getattr(losses, name)(*tensors, **more).sum()


def on_the_frontier(nats: float, ref_logps, rewards) -> float:
    """The reward of the frontier at a KL, by bisection of `closed_form.frontier` in beta."""
    low, high = 1e-6, 1e8
    for _ in range(100):
        middle = (low * high) ** 0.5
        (found,), (reward,) = closed_form.frontier(ref_logps, rewards, [middle])
        low, high = (middle, high) if found > nats else (low, middle)
    return reward.item()


def compare(page, given: dict) -> None:
    """Put `given` into the explorer of a page and compare all that it shows with the library."""
    got = page.evaluate(DRIVE, given)
    ref_logps, rewards = tables(given)
    beta, size = given["beta"], rewards.shape[1]

    def row(key):
        return torch.tensor([[got[f"{key}{i}"] for i in range(size)]], dtype=torch.float64)

    def near(key, value):
        value = value.item() if isinstance(value, torch.Tensor) else value
        assert got[key] == pytest.approx(value, abs=1e-6, rel=0), (key, given)

    def all_near(key, values):
        torch.testing.assert_close(row(key), values, atol=1e-6, rtol=0)

    assert f"reward{size}" not in got
    # The optimum: known for reverse KL; for the others, the policy whose f-DPO margins are the
    # differences of the rewards.
    best = row("best").log()
    assert best.logsumexp(1).item() == pytest.approx(0, abs=1e-9)
    log_z = closed_form.log_partition(ref_logps, rewards, beta)
    if given["divergence"] == "reverse_kl":
        all_near("best", closed_form.optimal_logps(ref_logps, rewards, beta).exp())
        near("multiplier", beta * log_z)
    for i, j in itertools.permutations(range(size), 2):
        truth = losses.reward_model_loss(rewards[:, i], rewards[:, j])
        torch.testing.assert_close(f_dpo(best, ref_logps, i, j, given), truth, atol=1e-6, rtol=0)
    all_near("reference", ref_logps.exp())
    all_near("reward", rewards)
    near("logZ", log_z)

    # The policy on its way, and where each of the three lies.
    logits = ref_logps + given["way"] * (best - ref_logps)
    logps = logits.log_softmax(1)
    implied = closed_form.implied_rewards(logps, ref_logps, beta)
    all_near("policy", logps.exp())
    all_near("implied", implied)
    all_near("withZ", implied + beta * log_z)
    for key, policy in (("start", ref_logps), ("top", best), ("at", logps)):
        nats = closed_form.kl(policy, ref_logps)
        mean = closed_form.expected_reward(policy, rewards)
        near(f"{key}Nats", nats)
        near(f"{key}Mean", mean)
        near(f"{key}Objective", closed_form.objective(policy, ref_logps, rewards, beta))
        near(f"{key}Below", on_the_frontier(nats.item(), ref_logps, rewards) - mean)
        assert got[f"{key}Below"] > -1e-7

    # The pair: the loss, its slopes in the log-probabilities and its gradient, by autograd.
    i, j = given["chosen"], given["rejected"]
    near("trueMargin", rewards[0, i] - rewards[0, j])
    near("margin", implied[0, i] - implied[0, j])
    free = logps.clone().requires_grad_()
    value = loss_of_pair(free, ref_logps, given)
    (slopes,) = torch.autograd.grad(value, free)
    near("loss", value)
    near("slopeA", slopes[0, i])
    near("slopeB", slopes[0, j])
    logits.requires_grad_()
    value = loss_of_pair(logits.log_softmax(1), ref_logps, given)
    all_near("push", -torch.autograd.grad(value, logits)[0])


@pytest.fixture
def explorer(tab, site):
    page = tab()
    page.goto(f"{site}explorer.html")
    return page


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_number_is_the_librarys(divergence, explorer):
    for loss in LOSSES:
        compare(explorer, settings(loss, divergence))


def test_it_offers_the_losses_and_divergences_that_python_names(explorer):
    for name, wanted in {"loss": LOSSES, "divergence": DIVERGENCES}.items():
        offered = explorer.locator(f"select[name={name}] option")
        assert tuple(one.get_attribute("value") for one in offered.all()) == wanted


def test_the_instances_are_those_of_the_course(explorer):
    course = tasks.four_answers(), tasks.three_answers()
    for place, task in enumerate(course):
        got = explorer.evaluate(DRIVE, {"instance": place})
        size = task.rewards.shape[1]
        assert [got[f"reward{i}"] for i in range(size)] == task.rewards[0].tolist()
        read = [got[f"reference{i}"] for i in range(size)]
        assert read == pytest.approx(task.ref_logps[0].exp().tolist(), abs=1e-12)
        assert f"reward{size}" not in got


@pytest.mark.parametrize("loss", ["dpo_loss", "ipo_loss", "apo_down_loss", "cpo_loss"])
def test_steps_descend_the_loss_of_the_pair(loss, explorer):
    got = explorer.evaluate(DRIVE, {"loss": loss, "chosen": 3, "rejected": 1, "beta": 0.5})
    task = tasks.four_answers()
    given = {"loss": loss, "chosen": 3, "rejected": 1, "beta": 0.5}
    logits = task.ref_logps.clone()
    explorer.get_by_role("button", name="Ten steps").click()
    explorer.get_by_role("button", name="One step on this pair").click()
    got = explorer.evaluate(DRIVE, {})
    for _ in range(11):
        logits.requires_grad_()
        value = loss_of_pair(logits.log_softmax(1), task.ref_logps, given)
        (slope,) = torch.autograd.grad(value, logits)
        logits = logits.detach() - slope / max(1.0, slope.abs().max().item())
    policy = torch.tensor([[got[f"policy{i}"] for i in range(4)]], dtype=torch.float64)
    torch.testing.assert_close(policy, logits.softmax(1), atol=1e-6, rtol=0)
    explorer.get_by_role("button", name="Undo 11").click()
    got = explorer.evaluate(DRIVE, {})
    back = [got[f"policy{i}"] for i in range(4)]
    assert back == pytest.approx(task.ref_logps[0].exp().tolist(), abs=1e-12)


def test_every_control_is_reached_and_moved_by_keyboard(explorer):
    explorer.locator("select[name=instance]").focus()
    names = explorer.evaluate(
        """() => [...document.querySelector("[data-dpo-explorer]").shadowRoot.querySelectorAll(
        "form :is(input, select, button)")].filter(one => one.checkVisibility() && !one.disabled)
        .map(one => one.name || one.textContent)"""
    )
    assert len(names) > 15
    focused = """() => {
      const one = document.activeElement.shadowRoot?.activeElement;
      const style = one && getComputedStyle(one);
      return one && [one.name || one.textContent, style.outlineStyle, style.outlineWidth];
    }"""
    for name in names:
        explorer.wait_for_function(f"({focused})()?.[0] === {name!r}")
        assert explorer.evaluate(focused)[1:] == ["solid", "3px"], name
        explorer.keyboard.press("Tab")
    slider = explorer.get_by_label("β, reward per nat")
    slider.focus()
    for _ in range(10):
        explorer.keyboard.press("ArrowRight")
    assert slider.input_value() == "0.6"
    assert slider.get_attribute("aria-valuetext") == "0.6 reward per nat"


def test_the_status_says_once_what_changed_and_what_did_not(explorer):
    status = explorer.get_by_role("status")
    assert status.get_attribute("aria-live") in (None, "polite")
    explorer.evaluate(DRIVE, {"way": 1})
    explorer.wait_for_function(
        "document.querySelector('[data-dpo-explorer]').shadowRoot.querySelector('.says')"
        ".textContent.includes('Changed')"
    )
    explorer.evaluate(
        """() => {
        const {shadowRoot} = document.querySelector("[data-dpo-explorer]");
        const says = shadowRoot.querySelector(".says");
        window.said = [];
        new MutationObserver(() => said.push(says.textContent)).observe(says, {childList: true});
        }"""
    )
    slider = explorer.get_by_label("added to every reward")
    slider.focus()
    for _ in range(20):
        explorer.keyboard.press("ArrowRight")
    explorer.wait_for_function("said.length > 0")
    explorer.wait_for_timeout(700)
    (said,) = explorer.evaluate("said")
    changed, unchanged = said.split(" Unchanged: ")
    assert "log Z 1.3834 → 3.3834 nats" in changed
    assert "J of the optimum 0.6917 → 1.6917" in changed
    for name in ("optimum", "margin of π", "loss", "KL of π"):
        assert name in unchanged


def test_pictures_and_controls_have_names_that_follow(explorer):
    def named():
        labels = explorer.locator("[data-dpo-explorer] svg[role=img]").all()
        return [label.get_attribute("aria-label") for label in labels]

    before = named()
    assert len(before) == 3
    explorer.evaluate(DRIVE, {"beta": 1})
    after = named()
    assert "optimum 0.7411" in before[0]
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_a_table_is_there_without_scripts(tab, site):
    for name in ("explorer", f"notebooks/{CHAPTERS['05'].stem}"):
        page = tab(java_script_enabled=False)
        page.goto(f"{site}{name}.html")
        table = page.locator("[data-dpo-explorer] table")
        assert table.is_visible()
        assert "log Z = 1.3834" in table.inner_text()
        assert page.locator("[data-dpo-explorer] :is(input, select)").count() == 0


def in_chapter(number: str) -> dict:
    """What the chapter's explorer starts with, as its committed output says."""
    for cell in nbformat.read(CHAPTERS[number], as_version=4).cells:
        for output in cell.get("outputs", []):
            page = output.get("data", {}).get("text/html", "")
            if found := re.search(r'data-dpo-explorer data-given="([^"]*)"', page):
                return json.loads(html.unescape(found[1]))
    raise AssertionError(f"chapter {number} has no explorer")


@pytest.mark.parametrize("chapter", ["02", "05", "11"])
def test_the_same_widget_stands_in_chapters(chapter, tab, site):
    instances = in_chapter(chapter)["instances"]
    page = tab()
    page.goto(f"{site}notebooks/{CHAPTERS[chapter].stem}.html")
    for k, loss in enumerate(LOSSES):
        for divergence in (DIVERGENCES[k % 4], DIVERGENCES[(k + 1) % 4]):
            compare(page, settings(loss, divergence, instances))


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """Chapter 05 and a notebook of its title alone as plain nbconvert writes them."""
    folder = tmp_path_factory.mktemp("converted")
    title = nbformat.read(CHAPTERS["05"], as_version=4).cells[:1]
    nbformat.write(nbformat.v4.new_notebook(cells=title), folder / "title.ipynb")
    for path in (CHAPTERS["05"], folder / "title.ipynb"):
        command = [PYTHON, "-m", "nbconvert", "--to", "html", "--output-dir", str(folder)]
        subprocess.run([*command, str(path)], check=True, capture_output=True)
    return folder


def refusing(asked: set[str]):
    """A route that lets local files through and notes what else a page asks for."""

    def handle(route) -> None:
        if route.request.url.startswith(("file:", "data:")):
            route.continue_()
        else:
            asked.add(route.request.url)
            route.abort()

    return handle


def test_it_works_in_a_notebook_that_nbconvert_rendered(browser, converted):
    """nbconvert asks elsewhere for MathJax and the badge; with the explorer it asks for no more."""
    asked = {"title": set(), CHAPTERS["05"].stem: set()}
    for name, urls in asked.items():
        page = browser.new_page()
        page.route("**/*", refusing(urls))
        page.goto((converted / f"{name}.html").as_uri())
    assert asked["title"] == asked[CHAPTERS["05"].stem]
    instances = in_chapter("05")["instances"]
    for k, loss in enumerate(LOSSES):
        for divergence in (DIVERGENCES[k % 4], DIVERGENCES[(k + 1) % 4]):
            compare(page, settings(loss, divergence, instances))
    page.close()


def test_two_of_them_on_a_page_keep_apart(browser):
    page = browser.new_page()
    other = Explorer(tasks.three_answers(), beta=1.0)
    page.set_content(Explorer().html() + other.html())
    assert page.locator("[data-dpo-explorer]").count() == 2
    page.evaluate(DRIVE, {"beta": 2})
    sliders = page.get_by_label("β, reward per nat").all()
    assert [slider.input_value() for slider in sliders] == ["2", "1"]
    page.close()

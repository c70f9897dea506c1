"""The explorer as Python makes it; docs/tests drives its script in a browser."""

import html
import json
import re

import pytest
import torch

from dpo_mini import closed_form, explorer, losses, tasks
from dpo_mini.explorer import LOSSES, Explorer, course_instances


def given(shown: Explorer) -> dict:
    (found,) = re.findall(r'data-given="([^"]*)"', shown.html())
    return json.loads(html.unescape(found))


def test_the_table_holds_what_closed_form_computes():
    task = tasks.three_answers()
    text = Explorer(task, beta=0.7).text()
    best = closed_form.optimal_logps(task.ref_logps, task.rewards, 0.7)
    implied = closed_form.implied_rewards(best, task.ref_logps, 0.7)
    log_z = closed_form.log_partition(task.ref_logps, task.rewards, 0.7).item()
    assert f"log Z = {log_z:.4f} nats, J(π*) = {0.7 * log_z:.4f}" in text
    for i, line in enumerate(text.splitlines()[2:]):
        numbers = [task.ref_logps[0, i].exp(), task.rewards[0, i], best[0, i].exp(), implied[0, i]]
        assert line.split() == ["abc"[i], *(f"{number.item():.4f}" for number in numbers)]
    page = Explorer(task, beta=0.7).html()
    for number in re.findall(r"-?\d+\.\d{4}", text):
        assert number in page


def test_a_notebook_gets_both_forms_and_the_same_ones_each_time(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append((data, raw)))
    monkeypatch.setattr(explorer, "in_notebook", lambda: True)
    Explorer().show()
    Explorer(tasks.four_answers()).show()
    (first, raw), (second, _) = shown
    assert raw
    assert first == second == Explorer()._repr_mimebundle_()
    assert set(first) == {"text/html", "text/plain"}


def test_it_asks_no_host_for_anything_and_ends_no_script_early():
    page = Explorer().html()
    assert not re.search(r"https?:|//\w|url\(|@import|import\(|fetch\(|\ssrc=", page)
    assert page.count("</script>") == 1
    assert "</script" not in page.split("<script>")[1].split("</script>")[0]


def test_the_tasks_own_prompts_come_first():
    rewards = torch.tensor([[1.0, 0.0], [3.0, -4.0]], dtype=torch.float64)
    task = tasks.bandit(rewards, torch.full_like(rewards, 0.5), actions=["<yes>", "no"])
    found = given(Explorer(task, prompt=1))
    assert [one["title"] for one in found["instances"]] == [
        "prompt x1", "prompt x2", *(one["title"] for one in course_instances())
    ]  # fmt: skip
    assert found["start"]["instance"] == 1
    assert found["instances"][1]["rewards"] == [3.0, -4.0]
    assert found["instances"][0]["answers"] == ["<yes>", "no"]
    assert "<yes>" not in Explorer(task).html()


def test_an_instance_of_the_course_is_found_among_them():
    found = given(Explorer(tasks.three_answers()))
    assert found["instances"] == course_instances()
    assert found["instances"][found["start"]["instance"]]["rewards"] == [1.0, 0.0, -0.5]


def test_the_losses_are_functions_of_the_library():
    for name in LOSSES:
        assert callable(getattr(losses, name))


def test_longer_completions_are_named_by_their_words():
    rewards = torch.zeros(1, 3, dtype=torch.float64)
    ref_logps = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    task = tasks.Task(("it was",), ("<end>", "good"), 2, 0, rewards, ref_logps)
    names = given(Explorer(task))["instances"][0]["answers"]
    assert names == ["(nothing)", "good", "good good …"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "four"}, "`task` must be a Task, got str"),
        ({"task": tasks.micro_reviews()}, "`task` must have a table ref_logps, got one without"),
        ({"prompt": 1}, r"`prompt` must be a whole number in 0\.\.0, got 1"),
        ({"chosen": 4}, r"`chosen` must be a whole number in 0\.\.3, got 4"),
        ({"chosen": 1.0}, r"`chosen` must .*, got 1\.0"),
        ({"chosen": True, "rejected": 0}, "`chosen` must .*, got True"),
        ({"prompt": 10**30}, "`prompt` must .*, got 10+"),
        ({"rejected": 0}, "`rejected` must be another answer than `chosen`, got 0 twice"),
        ({"beta": 0.0}, "`beta` must be a finite number > 0, got 0.0"),
        ({"divergence": "kl"}, "`divergence` must be one of reverse_kl, .*, got 'kl'"),
        ({"loss": "dpo"}, "`loss` must be one of dpo_loss, .*, got 'dpo'"),
        (
            {"towards_optimum": torch.zeros(2)},
            r"`towards_optimum` must be a number from 0 to 2, got tensor",
        ),
        ({"towards_optimum": True}, "`towards_optimum` must be a number from 0 to 2, got True"),
        ({"towards_optimum": None}, "`towards_optimum` must be a number from 0 to 2, got None"),
        (
            {"towards_optimum": float("nan")},
            "`towards_optimum` must be a number from 0 to 2, got nan",
        ),
        ({"towards_optimum": 2.5}, "`towards_optimum` must be a number from 0 to 2, got 2.5"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Explorer(**change)


def test_too_many_answers_are_refused():
    task = tasks.random_bandit(1, 7, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="`task` must have 2 to 6 completions, got 7"):
        Explorer(task)


def test_a_weight_beyond_int64_is_a_number_like_any_other():
    assert Explorer(beta=10**30).text() == Explorer(beta=1e30).text()
    assert "at β = 1e+30" in Explorer(beta=10**30).html()


def test_explorers_of_one_task_are_equal_and_can_be_keys():
    task = tasks.four_answers()
    assert Explorer(task) == Explorer(task)
    assert Explorer(task) != Explorer(tasks.four_answers())
    assert len({Explorer(task), Explorer(task), Explorer(task, beta=1.0)}) == 2

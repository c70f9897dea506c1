"""The doctor: runs made ill on purpose, one for each symptom, and healthy ones."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")

from dpo_mini import real
from dpo_mini.losses import dpo_loss, ipo_loss
from dpo_mini.real import CausalLMPolicy, Preference, doctor, symptoms

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("very good", "good", "fine", "slow", "bad", "very bad")
END, STEPS, BETA = 0, 40, 0.1


def coin_pairs(seed, n=120):
    """Better words win three times of four, so no policy can have all pairs right."""
    draws = torch.Generator().manual_seed(seed)
    pairs = []
    for row in range(n):
        a, b = sorted(torch.randperm(len(WORDS), generator=draws)[:2].tolist())
        if torch.rand((), generator=draws, dtype=torch.float64) > 0.75:
            a, b = b, a
        pairs.append(Preference(f"film {row % 9} was", WORDS[a], WORDS[b]))
    return pairs


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in coin_pairs(0) for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


def tiny(tokenizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = real.tiny_gpt2(tokenizer, n_positions=32, generator=generator, n_heads=2, width=16)
    with torch.no_grad():  # as far from uniform as a trained model is
        for weight in model.parameters():
            weight.mul_(4.0) if weight.dim() > 1 else None
    return CausalLMPolicy(model.float(), end_token=END)


def run(tokenizer, folder, preferences=None, *, seed=0, loss=dpo_loss, lr=3e-3, steps=STEPS, **how):
    """A run of `train_preferences`: the path of its log. `how`: reference, optimizer, beta."""
    pairs = real.encode(preferences or coin_pairs(seed), tokenizer, max_tokens=32)
    policy = tiny(tokenizer, seed)
    batches = real.shuffled_batches(
        len(pairs[0]), steps=steps, batch_size=8, generator=torch.Generator().manual_seed(seed)
    )

    def scored(policy, pairs):
        return real.reference_logps(policy, pairs, batches=batches, micro_batch_size=8)

    reference = how.pop("reference", scored)(policy, pairs)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    path = folder / "metrics.csv"
    real.train_preferences(
        policy, reference, pairs, loss, beta=how.pop("beta", BETA), batches=batches,
        micro_batch_size=8, optimizer=torch.optim.AdamW(weights, lr=lr), max_grad_norm=1.0,
        logs=[real.csv_log(path)], **how,
    )  # fmt: skip
    return path


def trl_log(path, *rows):
    """A `trainer_state.json` as `trl` writes it."""
    history = [{"epoch": 0.1 * n, "step": n, **row} for n, row in enumerate(rows, 1)]
    path.write_text(json.dumps({"global_step": len(rows), "log_history": history}))
    return path


def questions(path):
    return [finding.question for finding in real.diagnose(path)]


# --- healthy runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_has_no_symptom(tokenizer, tmp_path, seed, capsys):
    path = run(tokenizer, tmp_path, seed=seed)
    assert real.diagnose(path) == []
    assert doctor.main([str(path)]) == 0
    assert "No symptom" in capsys.readouterr().out


def test_a_loss_that_does_not_begin_at_log_2_is_no_symptom(tokenizer, tmp_path):
    assert questions(run(tokenizer, tmp_path, loss=ipo_loss)) == []


def test_a_run_that_has_just_begun_is_not_stuck(tokenizer, tmp_path):
    assert questions(run(tokenizer, tmp_path, lr=1e-9, steps=symptoms.FEWEST - 1)) == []


# --- ill runs ------------------------------------------------------------------------------------


def six_times(*scores, beta):
    return 6 * dpo_loss(*scores, beta=beta)


def test_a_sum_in_the_place_of_a_mean(tokenizer, tmp_path):
    path = run(tokenizer, tmp_path, loss=six_times)
    (finding,) = real.diagnose(path)
    assert finding.question == 5
    assert "4.1589 = 6 times log 2" in finding.symptom


def test_a_reference_in_half_precision(tokenizer, tmp_path):
    def half(policy, pairs):
        copied = tiny(tokenizer)
        copied.model.bfloat16()
        return tuple(real.reference_logps(copied, pairs))

    assert questions(run(tokenizer, tmp_path, reference=half, beta=1.0)) == [6]


def test_a_reference_from_before_the_fine_tuning(tokenizer, tmp_path):
    def before(policy, pairs):
        scored = tuple(real.reference_logps(policy, pairs))  # what it says before, and then SFT
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            (-policy.logps(pairs[0], pairs[1]).mean()).backward()
            optimizer.step()
        return scored

    always = [Preference(f"film {n} was", "good", "very bad") for n in range(8)]
    assert questions(run(tokenizer, tmp_path, always, reference=before, beta=0.5)) == [7]


def test_no_reference_is_subtracted(tokenizer, tmp_path):
    def nothing(policy, pairs):
        return torch.zeros(len(pairs[0])), torch.zeros(len(pairs[0]))

    assert questions(run(tokenizer, tmp_path, reference=nothing, beta=1.0)) == [25]


def same_answers(n=24):
    return [Preference(f"film {row} was", "good", "good") for row in range(n)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 1e-9}, r"the largest learning rate is 1\.0e-09"),
        ({"beta": 1e-6}, "after"),
        (
            {"preferences": same_answers()},
            r"no gradient arrives \(the largest norm is 0\.0e\+00\)",
        ),
    ],
    ids=["learning rate", "beta", "one answer twice"],
)
def test_a_loss_that_is_stuck(tokenizer, tmp_path, changes, says):
    (finding,) = real.diagnose(run(tokenizer, tmp_path, **changes))
    assert finding.question == 2
    assert re.search(says, finding.symptom, re.IGNORECASE)


def test_pairs_that_are_learnt_by_heart(tokenizer, tmp_path):
    few = coin_pairs(3, n=8)
    path = run(tokenizer, tmp_path, few, lr=0.02, steps=80, beta=0.5)
    assert 10 in questions(path)


def test_held_out_pairs_that_become_worse(tmp_path):
    rows = [{"loss": 0.69 - 0.01 * n, "rewards/accuracies": 0.7} for n in range(9)]
    for n in (2, 5, 8):
        rows[n]["eval_loss"] = {2: 0.68, 5: 0.61, 8: 0.75}[n]
    (finding,) = real.diagnose(trl_log(tmp_path / "trainer_state.json", *rows))
    assert finding.question == 10
    assert "lowest at step 6 (0.6100)" in finding.symptom
    assert "0.7500 at step 9" in finding.symptom


def test_both_answers_become_less_likely(tokenizer, tmp_path):
    def unlikely(*scores, beta):
        return dpo_loss(*scores, beta=beta) + 0.1 * (scores[0] + scores[1])

    assert 1 in questions(run(tokenizer, tmp_path, loss=unlikely, lr=0.01, beta=0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_the_only_finding(tmp_path, value):
    rows = [{"loss": 0.69, "rewards/margins": 0.0}] * 30 + [{"loss": value, "rewards/margins": 0}]
    (finding,) = real.diagnose(trl_log(tmp_path / "trainer_state.json", *rows))
    assert finding.question == 22
    assert f"loss is {value} at step 31" in finding.symptom


def test_kto_with_one_prompt_in_a_batch(tmp_path):
    rows = [{"loss": 0.5, "kl": 0.0, "rewards/chosen": 0.01 * n} for n in range(6)]
    assert questions(trl_log(tmp_path / "trainer_state.json", *rows)) == [16]


@pytest.mark.parametrize(
    ("curves", "question"),
    [
        ({"frac_reward_zero_std": [0.3, 0.9, 1.0, 1.0]}, 28),
        ({"reward_std": [0.4, 0.1, 0.0, 0.0, 0.0]}, 28),
        ({"objective/kl": [0.1, -0.4, -0.5, -0.6]}, 9),
        ({"kl": [0.01, 0.02, 0.02, 4000.0, 0.03]}, 30),
        ({"frac_reward_zero_std": [0.3, 0.2, 0.1, 0.2], "reward_std": [0.4, 0.3, 0.4, 0.3]}, None),
        ({"objective/kl": [0.0, -0.01, 0.3, 0.7], "kl": [0.0, 0.1, 0.4, 1.2]}, None),
    ],
)
def test_runs_of_ppo_and_grpo(tmp_path, curves, question):
    (length,) = {len(values) for values in curves.values()}
    rows = [{name: values[n] for name, values in curves.items()} for n in range(length)]
    found = questions(trl_log(tmp_path / "trainer_state.json", *rows))
    assert found == ([] if question is None else [question])


def test_means_of_several_steps_say_nothing_of_the_first(tmp_path):
    path = tmp_path / "trainer_state.json"
    row = {"loss": 0.66, "rewards/chosen": 0.04, "rewards/rejected": -0.05, "rewards/margins": 0.09}
    path.write_text(json.dumps({"log_history": [{"step": 10, **row}, {"step": 20, **row}]}))
    assert questions(path) == []


# --- what it reads -------------------------------------------------------------------------------


def test_every_question_is_one_of_chapter_17_under_its_title():
    path = next((ROOT / "notebooks").glob("17_*.ipynb"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    titles = {int(n): title for n, title in re.findall(r"^### (\d+)\. (.+)$", text, re.MULTILINE)}
    assert symptoms.QUESTIONS.items() <= titles.items()
    assert f"notebooks/{path.name}" == symptoms.CHAPTER


def test_findings_are_printed_with_their_question(tokenizer, tmp_path, capsys):
    assert doctor.main([str(run(tokenizer, tmp_path, loss=six_times))]) == 1
    said = capsys.readouterr().out
    assert "question 5 of chapter 17: The first loss is six times log 2" in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.csv", "a,b\n1,2\n", r"a column `step` .* got columns 'a', 'b' in .*metrics\.csv"),
        ("metrics.csv", "", "got columns none"),
        ("metrics.csv", "step,loss\n", "at least one step, got none"),
        ("metrics.csv", "step,loss\n0,x\n", "one number in each column, got another line 2"),
        ("metrics.csv", "step,loss\n,0.5\n", "one number in each column, got another line 2"),
        ("metrics.csv", "step,loss\n0,0.5,0.5\n", "got another line 2"),
        ("trainer_state.json", "{}", "a list `log_history`, got another"),
        ("trainer_state.json", '{"log_history": 3}', "a list `log_history`, got another"),
        ("trainer_state.json", '{"log_history": [3]}', "a list `log_history`, got another"),
        ("trainer_state.json", '{"log_history"', "a list `log_history`, got another"),
        ("trainer_state.json", '{"log_history": []}', "at least one step, got none"),
    ],
)
def test_another_file_is_refused(tmp_path, name, text, message, capsys):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        real.diagnose(path)
    assert doctor.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_line_that_is_being_written_is_passed_over(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,rewards/margins\n0,0.6931,0.0\n1,0.69")
    assert symptoms.read_curves(path) == {"loss": [(0, 0.6931)], "rewards/margins": [(0, 0.0)]}


def test_a_log_of_few_steps_is_not_called_well(tokenizer, tmp_path, capsys):
    path = run(tokenizer, tmp_path, lr=1e-9, steps=symptoms.FEWEST - 1)
    assert doctor.main([str(path.parent)]) == 0  # the folder will do
    assert "fewer than 20 steps: too short" in capsys.readouterr().out


def test_a_run_that_never_got_better(tmp_path):
    losses = {0: 0.6931, 10: 0.72, 20: 0.7, 30: 0.7101}
    rows = [{"step": n, "loss": 0.66, "learning_rate": 0.3} for n in range(31)]
    for n, loss in losses.items():
        rows[n]["eval_loss"] = loss
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": rows}))
    (finding,) = real.diagnose(path)
    assert finding.question == 2
    assert "0.6931 before training, never lower since, and is 0.7101 at step 30" in finding.symptom
    rows[20]["eval_loss"] = 0.69
    path.write_text(json.dumps({"log_history": rows}))
    assert real.diagnose(path) == []


def test_another_model_as_reference_is_told_from_rounding(tmp_path):
    row = {"loss": 0.66, "rewards/chosen": 12.77, "rewards/rejected": 12.88}
    assert questions(trl_log(tmp_path / "trainer_state.json", row)) == [7]


def test_the_command_runs(tmp_path):
    import subprocess
    import sys

    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,nan\n")
    command = [sys.executable, "-m", "dpo_mini.real.doctor", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "")
    assert "loss is nan at step 0" in done.stdout

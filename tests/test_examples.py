"""The two methods in one file each: they run alone, and compute what the library computes."""

import ast
import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dpo_mini import closed_form, logps, losses
from dpo_mini.logps import PAD
from dpo_mini.policies import SharedTrunk, TinyTransformer
from dpo_mini.tasks import Task, enumerate_completions
from dpo_mini.train import fit_ppo, fit_preferences

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = [EXAMPLES / "dpo_in_one_file.py", EXAMPLES / "ppo_in_one_file.py"]


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def dpo():
    return load(FILES[0])


@pytest.fixture
def ppo():
    return load(FILES[1])


def close(a, b, atol=1e-12):
    assert_close(a, b, rtol=0, atol=atol)


def every_pair(file):
    """Every prompt with every answer, the answers as the library lists them."""
    answers = enumerate_completions(file.V, file.T, file.END)
    return file.PROMPTS.repeat_interleave(len(answers), 0), answers.repeat(len(file.PROMPTS), 1)


def states(model, tokens):
    """What the network of a file knows after each token."""
    return model.gru(model.embed(tokens))[0]


def token_logps(logits, prompts, answers):
    """By `logps.token_logps`, which masks the prompt; `logits` is a function of whole texts."""
    tokens = torch.cat([prompts, answers], 1)
    mask = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), answers != PAD], 1)
    scored = logps.token_logps(logits(tokens[:, :-1].clamp(min=0)), tokens, mask)
    assert not scored[:, : prompts.shape[1] - 1].any()
    return scored[:, prompts.shape[1] - 1 :]


def table_by_the_library(file, model):
    """log pi of every answer, `[X, Y]`."""
    scored = token_logps(lambda tokens: model.head(states(model, tokens)), *every_pair(file))
    totals = logps.sum_over_tokens(scored, every_pair(file)[1] != PAD)
    return totals.view(len(file.PROMPTS), -1).detach()


def rewards_by_hand(file):
    prompts, answers = every_pair(file)
    rows = [
        sum(file.TASTE[[6, 7].index(prompt[1]), word] for word in set(answer) - {PAD})
        for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True)
    ]
    return torch.stack(rows).view(len(file.PROMPTS), -1)


class LikeTheLibrarys(torch.optim.Adam):
    """Adam with the betas and the schedule of the library's loops, written out once more."""

    def __init__(self, weights, lr, steps, steps_per_rate=1):
        super().__init__(weights, lr=lr, betas=(0.9, 0.99))
        self.peak, self.steps, self.per_rate, self.taken = lr, steps, steps_per_rate, 0

    def step(self):
        at = self.taken // self.per_rate
        warm = min(1, (at + 1) / 20)
        self.param_groups[0]["lr"] = (
            self.peak * warm * (1 + math.cos(math.pi * at / self.steps)) / 2
        )
        self.taken += 1
        super().step()


def flat(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# --- the files -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_has_at_most_100_lines_and_imports_torch_alone(path):
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert text.count("\n") <= 100, "as wc -l counts them"
    assert max(map(len, text.splitlines())) <= 100
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize(
    ("path", "most"), [(FILES[0], 0.2), (FILES[1], 0.1)], ids=[path.stem for path in FILES]
)
def test_a_file_runs_alone_and_comes_close_to_the_best_policy(path, most, tmp_path):
    """Seeds 0 to 4 end at .05 to .06 (DPO) and at .02 to .03 (PPO), from .8 to 1.0."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    kls = [float(kl) for kl in re.findall(r"KL\(pi \|\| pi\*\) = (\d\.\d{4})", ran.stdout)]
    js = [float(j) for j in re.findall(r"J\(pi\) = (\d\.\d{4})", ran.stdout)]
    best = [float(j) for j in re.findall(r"J\(pi\*\) = (\d\.\d{4})", ran.stdout)]
    before, after = kls
    assert after < most < 0.5 < before
    assert js[0] < js[1] < best[0] == best[1]


def test_the_files_start_from_one_reference_and_leave_global_randomness_out(dpo, ppo):
    torch.manual_seed(1)
    policy = dpo.Policy(torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    again = dpo.Policy(torch.Generator().manual_seed(5))
    both = ppo.ActorCritic(torch.Generator().manual_seed(5))
    assert torch.equal(flat(policy), flat(again))
    prompts, answers = every_pair(dpo)
    close(policy(prompts, answers), both(prompts, answers)[0].sum(1))
    for name in ("WORDS", "V", "T", "END", "PAD", "BETA"):
        assert getattr(dpo, name) == getattr(ppo, name)
    assert torch.equal(dpo.PROMPTS, ppo.PROMPTS)
    assert torch.equal(dpo.TASTE, ppo.TASTE)
    assert dpo.PAD == PAD


# --- what both compute -----------------------------------------------------------------------


def test_log_probabilities_are_the_librarys(dpo, ppo, generator):
    policy, both = dpo.Policy(generator), ppo.ActorCritic(generator)
    prompts, answers = every_pair(dpo)
    close(policy(prompts, answers), table_by_the_library(dpo, policy).flatten())
    got, values = both(prompts, answers)
    close(got, token_logps(lambda tokens: both.head(states(both, tokens)), prompts, answers))
    for t in range(ppo.T):  # V before token t has read the prompt and t tokens
        read = torch.cat([prompts, answers[:, :t].clamp(min=0)], 1)
        want = both.value_head(states(both, read)[:, -1])[:, 0]
        close(values[:, t], want * (answers[:, t] != PAD))


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_rewards_are_as_told(name, request):
    file = request.getfixturevalue(name)
    close(file.reward(*every_pair(file)), rewards_by_hand(file).flatten())
    answers = torch.tensor([[1, 2, 1], [4, 0, PAD], [0, PAD, PAD]])
    child, chef = (file.PROMPTS[x].expand(3, -1) for x in (0, 1))
    assert file.reward(child, answers).tolist() == [2.5, -2.0, 0.0]
    assert file.reward(chef, answers).tolist() == [0.0, 1.5, 0.0]


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_the_referee_is_the_closed_form(name, request, generator, capsys):
    file = request.getfixturevalue(name)
    make = file.Policy if name == "dpo" else file.ActorCritic
    models = [make(generator), make(generator)]
    tables = [table_by_the_library(file, each) for each in models]
    rewards = rewards_by_hand(file)
    best = closed_form.optimal_logps(tables[1], rewards, file.BETA)
    kl = closed_form.kl(tables[0], best).mean()
    j, most = (
        closed_form.objective(each, tables[1], rewards, file.BETA).mean()
        for each in (tables[0], best)
    )
    file.referee("now", *models)
    want = f"now: KL(pi || pi*) = {kl:.4f}, J(pi) = {j:.4f}, J(pi*) = {most:.4f}\n"
    assert capsys.readouterr().out == want


# --- DPO -------------------------------------------------------------------------------------


def test_every_answer_is_listed_once(dpo):
    assert torch.equal(dpo.ANSWERS, enumerate_completions(dpo.V, dpo.T, dpo.END))
    for mine, theirs in zip(dpo.EVERY, every_pair(dpo), strict=True):
        assert torch.equal(mine, theirs)


def test_guests_choose_by_bradley_terry_between_answers_of_the_reference(dpo, generator):
    policy = dpo.Policy(generator)
    prompts, chosen, rejected = dpo.draw_pairs(policy, generator)
    assert (chosen != rejected).any(1).all()
    margins = dpo.reward(prompts, chosen) - dpo.reward(prompts, rejected)
    better = (margins[margins != 0] > 0).double().mean()
    expected = margins[margins != 0].abs().sigmoid().mean()
    assert abs(better - expected) < 4 * 0.5 / len(margins) ** 0.5
    # Answer y is the first with p_y, and the second with sum over z != y of p_z p_y / (1 - p_z).
    x = (prompts[:, 1] == 7).long()
    for guest, probs in enumerate(table_by_the_library(dpo, policy).exp()):
        second = (probs / (1 - probs)).sum() - probs / (1 - probs)
        want = probs * (1 + second) / 2
        mine = torch.cat([chosen[x == guest], rejected[x == guest]])
        counts = (mine[:, None] == dpo.ANSWERS).all(2).double().mean(0)
        assert (counts - want).abs().sum() / 2 < 0.05


class ForTheLibrary(nn.Module):
    """The file's network as a policy that the library's loops on pairs take."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def token_logps(self, prompts, answers):
        return token_logps(
            lambda tokens: self.policy.head(states(self.policy, tokens)), prompts, answers
        )


def test_the_loop_takes_the_steps_of_fit_preferences(dpo, generator, monkeypatch):
    for name, value in {"N_PAIRS": 100, "BATCH_SIZE": 40, "EPOCHS": 4}.items():
        monkeypatch.setattr(dpo, name, value)  # 12 steps: 40, 40 and 20 pairs, four times
    reference = dpo.Policy(generator)
    pairs = dpo.draw_pairs(reference, generator)
    mine, theirs = copy.deepcopy(reference), copy.deepcopy(reference)
    adam = LikeTheLibrarys(mine.parameters(), lr=0.05, steps=12)
    dpo.train(mine, reference, pairs, adam, torch.Generator().manual_seed(3))
    fit_preferences(
        ForTheLibrary(theirs), ForTheLibrary(reference), tuple(pairs),
        partial(losses.dpo_loss, beta=dpo.BETA), steps=12, batch_size=40, learning_rate=0.05,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert adam.taken == 12
    assert (flat(mine) - flat(reference)).abs().max() > 0.05
    close(flat(mine), flat(theirs), atol=1e-10)


# --- PPO -------------------------------------------------------------------------------------


def test_samples_follow_the_policy(ppo, generator):
    both = ppo.ActorCritic(generator)
    prompts, every = ppo.PROMPTS.repeat(10_000, 1), enumerate_completions(ppo.V, ppo.T, ppo.END)
    seen = []
    both.head.register_forward_hook(lambda head, read, logits: seen.append(logits))
    answers = both.sample(prompts, generator)
    assert seen
    assert not any(each.requires_grad for each in seen), "under no_grad"
    exact = table_by_the_library(ppo, both).exp()
    for x, probs in enumerate(exact):
        counts = (answers[x::2, None] == every).all(2).double().mean(0)
        assert counts.sum() == pytest.approx(1), "each is an answer, padded after its end"
        assert (counts - probs).abs().sum() / 2 < 0.05


class ForTheFile(nn.Module):
    """The library's transformer and value head, read as the file reads its own network."""

    def __init__(self, both):
        super().__init__()
        self.both = both

    def hidden(self, tokens):
        positions = torch.arange(tokens.shape[1])
        return self.both.policy.hidden(tokens, positions, positions <= positions[:, None])

    def forward(self, prompts, answers):
        tokens = torch.cat([prompts, answers[:, :-1].clamp(min=0)], 1)
        values = self.both.value_head(self.hidden(tokens))[:, prompts.shape[1] - 1 :, 0]
        return token_logps(
            lambda tokens: self.both.policy.unembed(self.hidden(tokens)), prompts, answers
        ), values * (answers != PAD)


def test_a_batch_is_learned_from_by_the_steps_of_fit_ppo(ppo, generator):
    task = Task(
        ("a child wants", "a chef wants"), tuple(ppo.WORDS[: ppo.V]), ppo.T, ppo.END,
        rewards_by_hand(ppo), prompt_tokens=ppo.PROMPTS,
    )  # fmt: skip
    shape = {"n_layers": 1, "n_heads": 2, "width": 8, "generator": generator}
    start = SharedTrunk(TinyTransformer.for_task(task, **shape)).double()
    with torch.no_grad():
        for weight in start.parameters():
            weight += 0.3 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
    mine, theirs, drawn = copy.deepcopy(start), copy.deepcopy(start), []

    def score(prompts, answers):
        drawn.append((task.prompt_tokens[prompts], answers))
        return task.rewards[prompts, task.index(answers)]

    fit_ppo(
        theirs, start.policy, task.prompts, score, beta=ppo.BETA, steps=3, batch_size=30,
        learning_rate=0.2, generator=generator, n_epochs=ppo.EPOCHS, lam=ppo.LAMBDA,
        value_weight=2 * ppo.VALUE_WEIGHT,  # of half a square
    )  # fmt: skip
    adam = LikeTheLibrarys(mine.parameters(), lr=0.2, steps=3, steps_per_rate=ppo.EPOCHS)
    assert len(drawn) == 3
    for prompts, answers in drawn:
        ppo.improve(ForTheFile(mine), ForTheFile(start), prompts, answers, adam)
    assert adam.taken == 3 * ppo.EPOCHS
    assert (flat(mine) - flat(start)).abs().max() > 0.05
    close(flat(mine), flat(theirs), atol=1e-10)

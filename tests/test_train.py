"""Each loop against the exact minimum of what it minimises."""

import copy
import itertools
import math
import re
from collections import defaultdict
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dpo_mini import losses, tasks
from dpo_mini.closed_form import (
    expected_reward,
    kl,
    log_partition,
    objective,
    optimal_logps,
    total_variation,
)
from dpo_mini.logps import PAD, mean_over_tokens, sum_over_tokens
from dpo_mini.losses import (
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    ipo_mean_loss,
    rdpo_loss,
)
from dpo_mini.policies import (
    RewardModel,
    ScalarTransformer,
    SeparateNetworks,
    SharedTrunk,
    TabularPolicy,
    TinyTransformer,
)
from dpo_mini.policy_gradient import (
    AdaptiveKLController,
    clipped_surrogate_loss,
    clipped_value_loss,
    gae,
    group_normalised_advantages,
    kl_k1,
    kl_k2,
    kl_k3,
    mean_advantages,
    unclipped_surrogate_loss,
    whiten,
)
from dpo_mini.rollout import enumerate_logps, enumerate_rewards, scoring
from dpo_mini.tasks import Task, four_answers, random_bandit, three_answers
from dpo_mini.train import (
    PPOParts,
    as_they_are,
    fit_online_preferences,
    fit_ppo,
    fit_preferences,
    fit_reinforce,
    fit_reward_model,
    fit_sft,
    fit_table,
    no_penalty,
    population_loss,
    token_rewards,
    without_reference,
)
from dpo_mini.train.pair_losses import check_pair_loss

PAIRED = {
    "dpo": partial(dpo_loss, beta=0.5),
    "cdpo": partial(cdpo_loss, beta=0.5, label_smoothing=0.1),
    "rdpo": partial(rdpo_loss, beta=0.5, label_smoothing=0.1),
    "ipo": partial(ipo_loss, beta=0.5),
    "hinge": partial(hinge_loss, beta=0.5),
}
DPO = PAIRED["dpo"]


class Spy(nn.Module):
    """A bandit's policy of a kind that the library does not know, which counts what it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(logits.clone())
        self.asked = []

    def token_logps(self, prompts, completions):
        self.asked.append(prompts.tolist())
        return self.table.log_softmax(-1)[prompts].gather(1, completions)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def settings(**changes):
    return {"steps": 5, "batch_size": 4, "learning_rate": 0.1, "generator": seeded(), **changes}


@pytest.fixture
def pairs(generator):
    task = four_answers()
    return task.sample_pairs(task.ref_logps, 1000, generator=generator)


# --- tables ----------------------------------------------------------------------------------


BANDITS = {
    "four answers": four_answers(),
    "three answers": three_answers(),
    "random": random_bandit(3, 5, generator=seeded(7)),
}


@pytest.mark.parametrize("task", BANDITS.values(), ids=BANDITS)
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_a_table_reaches_the_optimum_by_dpo_and_by_the_objective(beta, task):
    ref_logps, rewards = task.ref_logps, task.rewards
    best = optimal_logps(ref_logps, rewards, beta)
    bound = partial(dpo_loss, beta=beta)
    for loss in (
        lambda logps: population_loss(bound, logps, ref_logps, rewards),
        lambda logps: -objective(logps, ref_logps, rewards, beta).sum(),
    ):
        fitted = fit_table(loss, ref_logps, steps=200)
        assert total_variation(fitted, best).max() < 1e-6
        assert not fitted.requires_grad


def test_the_start_of_a_table_does_not_matter_and_is_left_alone():
    task = four_answers()
    start = torch.tensor([[5.0, -3.0, 0.0, 2.0]]).double().log_softmax(-1)
    kept = start.clone()
    fitted = fit_table(
        lambda logps: -objective(logps, task.ref_logps, task.rewards, 0.5).sum(), start
    )
    assert total_variation(fitted, optimal_logps(task.ref_logps, task.rewards, 0.5)) < 1e-6
    assert torch.equal(start, kept)


def test_the_population_loss_is_the_mean_over_pairs_and_outcomes(generator):
    task = random_bandit(2, 4, generator=generator)
    logps = torch.randn(2, 4, dtype=torch.float64, generator=generator).log_softmax(-1)
    terms = []
    for x, (a, b) in itertools.product(range(2), itertools.permutations(range(4), 2)):
        four = [logps[x, [a]], logps[x, [b]], task.ref_logps[x, [a]], task.ref_logps[x, [b]]]
        wins = 1 / (1 + math.exp(task.rewards[x, b] - task.rewards[x, a]))
        terms.append(wins * ipo_loss(*four, beta=0.5).item())
    got = population_loss(PAIRED["ipo"], logps, task.ref_logps, task.rewards)
    assert got.item() == pytest.approx(math.fsum(terms) / 12, rel=1e-12)  # 2 prompts, 6 pairs each


def test_the_population_loss_takes_the_probability_of_each_outcome(generator):
    task = random_bandit(3, 4, generator=generator)
    logps = torch.randn(3, 4, dtype=torch.float64, generator=generator).log_softmax(-1)
    wins = (task.rewards[:, :, None] - task.rewards[:, None]).sigmoid()
    wins[:, range(4), range(4)] = math.nan  # an answer is not compared with itself
    for loss in (PAIRED["ipo"], PAIRED["cdpo"]):
        want = population_loss(loss, logps, task.ref_logps, task.rewards)
        got = population_loss(loss, logps, task.ref_logps, win_probs=wins)
        assert_close(got, want, rtol=1e-13, atol=0)


CIRCLE = torch.tensor([[[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]]], dtype=torch.float64)
"""a beats b, b beats c and c beats a, each nine times in ten: no rewards say that."""


def test_the_population_loss_of_a_circle_by_hand():
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    logps = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    loss = partial(dpo_loss, beta=1.0)
    # sigma(log 2) = 2/3: .9 log(3/2) + .1 log 3 of a and b, log 2 of b and c, and of a and c
    # .1 log(3/2) + .9 log 3, which is log 9 together.
    got = population_loss(loss, logps, uniform, win_probs=CIRCLE)
    assert got.item() == pytest.approx(math.log(9) / 3, rel=1e-14)
    # In a circle no answer is better than another.
    fitted = fit_table(lambda z: population_loss(loss, z, uniform, win_probs=CIRCLE), logps)
    assert total_variation(fitted, uniform) < 1e-6


def test_weights_of_pairs_are_counts_of_comparisons(generator):
    task = random_bandit(2, 3, generator=generator)
    logps = torch.randn(2, 3, dtype=torch.float64, generator=generator).log_softmax(-1)
    wins = torch.rand(2, 3, 3, dtype=torch.float64, generator=generator)
    wins = wins.triu(1) + (1 - wins.triu(1).mT).tril(-1)
    counts = torch.tensor(
        [[[9, 3, 0], [3, 9, 1], [0, 1, 9]], [[0, 2, 5], [2, 0, 1], [5, 1, 0]]], dtype=torch.float64
    )
    terms = []
    for x, (a, b) in itertools.product(range(2), itertools.combinations(range(3), 2)):
        four = [logps[x, [a]], logps[x, [b]], task.ref_logps[x, [a]], task.ref_logps[x, [b]]]
        swapped = [four[n] for n in (1, 0, 3, 2)]
        won = wins[x, a, b].item()
        of_pair = won * ipo_loss(*four, beta=0.5) + (1 - won) * ipo_loss(*swapped, beta=0.5)
        terms += [of_pair.item()] * int(counts[x, a, b])
    assert len(terms) == 12
    for scale in (1.0, 1e-3):
        got = population_loss(
            PAIRED["ipo"], logps, task.ref_logps, win_probs=wins, pair_weights=scale * counts
        )
        assert got.item() == pytest.approx(math.fsum(terms) / 12, rel=1e-12)
    alike = torch.ones(2, 3, 3, dtype=torch.float64)
    four = (PAIRED["ipo"], logps, task.ref_logps, task.rewards)
    assert_close(population_loss(*four, pair_weights=alike), population_loss(*four))


def test_what_is_rarely_compared_decides_between_annotators_who_disagree():
    uniform = torch.full((1, 3), 1 / 3, dtype=torch.float64).log()
    rewards = torch.tensor([[0, 1, 2], [4, 2, 0]], dtype=torch.float64)
    wins = (rewards[:, :, None] - rewards[:, None]).sigmoid()
    wins = (0.6 * wins[0] + 0.4 * wins[1])[None]
    rare = torch.ones(1, 3, 3, dtype=torch.float64)
    rare[0, 0, 2] = rare[0, 2, 0] = 0.1
    loss = partial(dpo_loss, beta=1.0)
    for weights, want in ((None, [0.324, 0.333, 0.343]), (rare, [0.345, 0.333, 0.322])):
        given = {"win_probs": wins, "pair_weights": weights}
        fitted = fit_table(partial(population_loss, loss, ref_logps=uniform, **given), uniform)
        assert_close(fitted.exp(), torch.tensor([want]).double(), atol=6e-4, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 4.0])
def test_a_table_is_fitted_to_the_digits_that_are_promised(beta, generator):
    def check(loss, rewards):
        best = optimal_logps(task.ref_logps, rewards, beta)
        fitted = fit_table(loss, task.ref_logps)
        assert total_variation(fitted, best).max() < 1e-6
        assert abs(loss(fitted) - loss(best)) < 1e-10

    for n_prompts, n_answers in itertools.product((1, 4), (2, 5, 8)):
        task = random_bandit(n_prompts, n_answers, generator=generator)
        spread = task.rewards - task.rewards.amin(1, keepdim=True)
        spread = spread / spread.amax(1, keepdim=True)  # of each prompt from 0 to 1
        pairs = (partial(dpo_loss, beta=beta), task.ref_logps, 6 * spread)
        check(lambda z, t=pairs: population_loss(t[0], z, *t[1:]), 6 * spread)
        table = (task.ref_logps, 4 * beta * spread, beta)
        check(lambda z, t=table: -objective(z, *t).sum(), 4 * beta * spread)


def test_offsets_are_fitted_beside_a_table(generator):
    """Comparisons across prompts: the difference of V stays, so each prompt has an offset."""
    task, beta = random_bandit(3, 4, generator=generator), 0.7
    best = optimal_logps(task.ref_logps, task.rewards, beta)
    wins = (task.rewards.view(-1, 1) - task.rewards.view(1, -1)).sigmoid()

    def across(logps, offsets):
        implied = (offsets[:, None] + beta * (logps - task.ref_logps)).flatten()
        return -(wins * torch.nn.functional.logsigmoid(implied[:, None] - implied)).mean()

    start = torch.zeros(3, dtype=torch.float64)
    fitted, offsets = fit_table(across, task.ref_logps, start)
    assert total_variation(fitted, best).max() < 1e-6
    assert not fitted.requires_grad
    assert not offsets.requires_grad
    assert torch.equal(start, torch.zeros(3, dtype=torch.float64))
    values = beta * log_partition(task.ref_logps, task.rewards, beta)
    assert_close(offsets - offsets.mean(), values - values.mean(), atol=1e-5, rtol=0)
    naive = fit_table(lambda logps: across(logps, start), task.ref_logps)
    assert total_variation(naive, best).max() > 0.05
    both = fit_table(
        lambda z, v, scale: across(z, scale * v), task.ref_logps, start + 1, start[0] + 2
    )
    assert [tensor.shape for tensor in both] == [(3, 4), (3,), ()]
    assert total_variation(both[0], best).max() < 1e-6


# --- bandits ---------------------------------------------------------------------------------


def test_sft_reaches_the_frequencies_of_the_demonstrations(generator):
    prompts = torch.randint(2, (600,), generator=generator)
    completions = torch.randint(3, (600, 1), generator=generator)
    policy = TabularPolicy(torch.zeros(2, 3, dtype=torch.float64))
    history = fit_sft(
        policy, prompts, completions, **settings(steps=400, batch_size=600, learning_rate=0.05)
    )
    counts = torch.zeros(2, 3, dtype=torch.float64)
    counts.index_put_((prompts, completions[:, 0]), torch.ones(600).double(), accumulate=True)
    shares = counts / counts.sum(-1, keepdim=True)
    fitted = policy.logits.detach().log_softmax(-1)
    assert kl(shares.log(), fitted).max() < 1e-6
    assert history.keys() == {"loss"}
    assert len(history["loss"]) == 400
    assert history["loss"][0] == pytest.approx(math.log(3))
    entropy = -(counts / 600 * shares.log()).sum().item()
    assert history["loss"][-1] == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("name", PAIRED)
def test_preferences_reach_the_minimum_of_any_loss(name, pairs):
    loss, task = PAIRED[name], four_answers()
    _, chosen, rejected = pairs

    def mean_loss(logps):
        (policy,), (ref,) = logps, task.ref_logps
        c, r = chosen[:, 0], rejected[:, 0]
        return loss(policy[c], policy[r], ref[c], ref[r]).mean()

    policy, reference = TabularPolicy(task.ref_logps), TabularPolicy(task.ref_logps)
    history = fit_preferences(
        policy,
        reference,
        pairs,
        loss,
        **settings(steps=400, batch_size=1000, learning_rate=0.1),
    )
    start, end = history["loss"][0], mean_loss(policy.logits.detach().log_softmax(-1)).item()
    assert start == pytest.approx(mean_loss(task.ref_logps).item())
    assert end < start
    if name != "hinge":  # whose minimum is a corner, where L-BFGS does not arrive
        best = mean_loss(fit_table(mean_loss, task.ref_logps)).item()
        assert end - best < 1e-6 * (start - best)


def test_the_history_of_preferences(pairs):
    task = four_answers()
    policy, reference = TabularPolicy(task.ref_logps), TabularPolicy(task.ref_logps)
    history = fit_preferences(policy, reference, pairs, DPO, **settings(steps=30, batch_size=1000))
    assert history.keys() == {"loss", "margin", "accuracy"}
    assert all(len(values) == 30 for values in history.values())
    assert history["loss"][0] == pytest.approx(math.log(2))
    assert (history["margin"][0], history["accuracy"][0]) == (0.0, 0.0)  # no pair is preferred yet
    before = copy.deepcopy(policy)
    again = fit_preferences(policy, reference, pairs, DPO, **settings(steps=1, batch_size=1000))
    log_ratios = (before.logits.log_softmax(-1) - task.ref_logps)[0].detach()
    margins = log_ratios[pairs[1][:, 0]] - log_ratios[pairs[2][:, 0]]
    assert again["margin"][0] == pytest.approx(margins.mean().item())
    assert again["accuracy"][0] == pytest.approx((margins > 0).double().mean().item())


def test_the_reference_is_asked_once_and_left_alone(pairs):
    task = four_answers()
    policy, reference = Spy(task.ref_logps), Spy(task.ref_logps)
    fit_preferences(policy, reference, pairs, DPO, **settings(steps=7, batch_size=300))
    assert sum(len(rows) for rows in reference.asked) == 2 * 1000
    assert torch.equal(reference.table, task.ref_logps)
    assert reference.table.grad is None
    assert not torch.equal(policy.table, task.ref_logps)


def test_every_row_is_seen_once_before_any_is_seen_again():
    policy = Spy(torch.zeros(10, 2))
    prompts, completions = torch.arange(10), torch.zeros(10, 1, dtype=torch.int64)
    fit_sft(policy, prompts, completions, **settings(steps=6, batch_size=4))
    assert [len(rows) for rows in policy.asked] == [4, 4, 2, 4, 4, 2]
    first, second = policy.asked[:3], policy.asked[3:]
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(10))
    assert first != second


def test_training_depends_on_its_generator_only(pairs):
    task = four_answers()
    before = torch.get_rng_state()

    def fitted(seed):
        policy = TabularPolicy(task.ref_logps)
        reference = TabularPolicy(task.ref_logps)
        options = settings(steps=10, batch_size=50, generator=seeded(seed))
        fit_sft(policy, pairs[0], pairs[1], **options)
        fit_preferences(policy, reference, pairs, DPO, **options)
        return policy.logits.detach()

    first, same, other = fitted(1), fitted(1), fitted(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_progress_wraps_the_steps(pairs):
    seen = []

    def progress(steps):
        for step in steps:
            seen.append((step, len(steps)))
            yield step

    task = four_answers()
    policy, reference = TabularPolicy(task.ref_logps), TabularPolicy(task.ref_logps)
    fit_sft(policy, pairs[0], pairs[1], **settings(), progress=progress)
    fit_preferences(policy, reference, pairs, DPO, **settings(), progress=progress)
    assert seen == [(step, 5) for step in range(5)] * 2


# --- text ------------------------------------------------------------------------------------


@pytest.fixture
def sentences(generator):
    """A task of text, a transformer for it in float64, and pairs that prefer the shorter answer."""
    task = Task(("x", "y"), ("<end>", "a", "b"), 3, 0, torch.zeros(2, 15))
    policy = TinyTransformer.for_task(task, generator=generator, n_layers=1, n_heads=1, width=8)
    prompts = torch.tensor([0, 1, 0, 1])
    short = torch.tensor([[0, -1, -1], [0, -1, -1], [1, 0, -1], [2, 0, -1]])
    long = torch.tensor([[1, 1, 1], [2, 1, 0], [1, 2, 0], [2, 1, 2]])
    return policy.double(), (prompts, short, long)


def test_sft_on_text_counts_tokens_and_no_padding(sentences):
    policy, (prompts, short, _) = sentences
    want = -policy.logps(prompts, short).mean().item()
    history = fit_sft(policy, prompts, short, **settings(steps=40, learning_rate=0.03))
    assert history["loss"][0] == pytest.approx(want, rel=1e-12)
    assert history["loss"][-1] < want / 2


@pytest.mark.parametrize(
    ("loss", "options"),
    [(PAIRED["ipo"], {}), (partial(ipo_mean_loss, beta=0.5), {"reduce": mean_over_tokens})],
    ids=["sums", "means"],
)
def test_the_loss_sees_sums_or_means_over_tokens(sentences, loss, options):
    policy, pairs = sentences
    reference = copy.deepcopy(policy)
    history = fit_preferences(
        policy, reference, pairs, loss, **settings(steps=80, learning_rate=0.03), **options
    )
    assert history["loss"][0] == pytest.approx(1.0)  # (0 - 1 / (2 beta))^2
    assert history["loss"][-1] < 0.05
    lengths = [torch.tensor([1, 1, 2, 2]), torch.tensor([3, 3, 3, 3])]
    changes = [
        (policy.logps(pairs[0], answers) - reference.logps(pairs[0], answers)).detach()
        for answers in pairs[1:]
    ]
    if options:
        changes = [change / length for change, length in zip(changes, lengths, strict=True)]
    # 1 / (2 beta) = 1: what was fitted is the margin of sums, or that of means
    torch.testing.assert_close(changes[0] - changes[1], torch.ones(4).double(), atol=0.3, rtol=0)


@pytest.mark.parametrize("rows_are_faster", [True, False])
def test_pairs_are_fitted_alike_however_they_are_read(rows_are_faster, generator, monkeypatch):
    """As a tree, in rows of both answers, or by a model that scores each answer on its own."""
    monkeypatch.setattr(scoring, "_rows_are_faster", lambda *_: rows_are_faster)

    class Alone(nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def token_logps(self, prompts, completions):
            return self.policy.token_logps(prompts, completions)

    shape = {"n_layers": 2, "n_heads": 2, "width": 8, "generator": generator}
    policy = TinyTransformer(3, 7, 5, end_token=None, **shape).double()
    prompts = torch.randint(3, (24,), generator=generator)
    answers = torch.randint(7, (2, 24, 5), generator=generator)
    answers[1, :, 0] = answers[0, :, 0]
    options = settings(steps=12, batch_size=12, learning_rate=0.01)
    losses, weights = [], []
    for wrap in (lambda model: model, Alone):
        live, frozen = copy.deepcopy(policy), copy.deepcopy(policy)
        options["generator"] = seeded()
        pairs = (prompts, *answers)
        losses.append(fit_preferences(wrap(live), wrap(frozen), pairs, DPO, **options)["loss"])
        weights.append(torch.cat([parameter.detach().flatten() for parameter in live.parameters()]))
    assert losses[0][-1] < losses[0][0] - 0.02
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-10)


def test_a_model_of_another_kind_may_take_prompts_of_many_tokens():
    class Words(Spy):
        def token_logps(self, prompts, completions):
            return super().token_logps(prompts[:, -1], completions)

    prompts = torch.tensor([[7, 0], [8, 1], [9, 0], [7, 1]])
    answers = [torch.tensor([[0], [1], [0], [1]]), torch.tensor([[1], [0], [1], [0]])]
    policy, reference = Words(torch.zeros(2, 2)), Words(torch.zeros(2, 2))
    fit_preferences(policy, reference, (prompts, *answers), DPO, **settings(steps=3))
    assert reference.asked == [[0, 1, 0, 1] * 2]
    assert (policy.table.diag() > 0).all()


# --- reward model ----------------------------------------------------------------------------


def test_a_reward_model_reaches_the_maximum_of_the_likelihood(generator):
    task = three_answers()
    pairs = task.sample_pairs(task.ref_logps, 400, generator=generator)
    shape = {"n_layers": 1, "n_heads": 1, "width": 8}
    model = RewardModel.for_task(task, generator=generator, **shape).double()
    history = fit_reward_model(
        model, pairs, **settings(steps=250, batch_size=400, learning_rate=0.03)
    )
    wins = torch.zeros(3, 3, dtype=torch.float64)
    ones = torch.ones(400, dtype=torch.float64)
    wins.index_put_((pairs[1][:, 0], pairs[2][:, 0]), ones, accumulate=True)
    fitted = enumerate_rewards(model, task)[0]
    gaps = fitted[:, None] - fitted
    # Where the likelihood is greatest, each answer wins as often as the model expects.
    expected = ((wins + wins.T) * gaps.sigmoid()).sum(1)
    assert (wins.sum(1) - expected).abs().max() < 0.05
    assert history.keys() == {"loss", "accuracy"}
    assert history["loss"][0] == pytest.approx(math.log(2))
    nats = -(wins * torch.nn.functional.logsigmoid(gaps)).sum() / 400
    assert history["loss"][-1] == pytest.approx(nats.item(), abs=1e-4)
    assert history["accuracy"][0] == 0.0  # all rewards are 0: nothing is preferred yet
    assert history["accuracy"][-1] == pytest.approx((wins * (gaps > 0)).sum().item() / 400)


# --- on-policy loops -------------------------------------------------------------------------


def true_score(task):
    return lambda prompts, completions: task.rewards[prompts, task.index(completions)]


def actor_critic(task):
    """A bandit's: the reference's logits, and a table of values that starts at 0."""
    values = torch.zeros(len(task.prompts), 1, dtype=torch.float64)
    return SeparateNetworks(TabularPolicy(task.ref_logps), TabularPolicy(values))


def with_parts(**options):
    """Options of `fit_ppo`, those of `PPOParts` in their object."""
    named = {field.name for field in fields(PPOParts)} & options.keys()
    parts = PPOParts(**{name: options.pop(name) for name in named})
    return {**options, "parts": parts}


def ppo(task, both=None, score=None, **changes):
    both = both or actor_critic(task)
    options = settings(steps=120, batch_size=256, learning_rate=0.05, beta=0.5, value_weight=1.0)
    history = fit_ppo(
        both,
        TabularPolicy(task.ref_logps),
        task.prompts,
        score or true_score(task),
        **with_parts(**{**options, **changes}),
    )
    return both.policy.logits.detach().log_softmax(-1), history


@pytest.mark.parametrize("task", BANDITS.values(), ids=BANDITS)
def test_ppo_reaches_the_optimum_and_its_value_the_objective(task):
    both = actor_critic(task)
    logps, history = ppo(task, both)
    best = optimal_logps(task.ref_logps, task.rewards, 0.5)
    assert kl(task.ref_logps, best).mean() > 0.15
    assert kl(logps, best).max() < 0.01
    values = both.critic.logits.detach().squeeze(1)
    assert_close(values, objective(best, task.ref_logps, task.rewards, 0.5), atol=0.1, rtol=0)
    assert set(map(len, history.values())) == {120}
    tail = {name: sum(values[-40:]) / 40 for name, values in history.items()}
    want = {
        "reward": expected_reward(best, task.rewards),
        "kl": kl(best, task.ref_logps),
        "entropy": -(best.exp() * best).sum(1),
    }
    for name, exact in want.items():
        assert tail[name] == pytest.approx(exact.mean().item(), abs=0.05), name
    assert tail["objective"] == pytest.approx(tail["reward"] - 0.5 * tail["kl"])
    assert set(history["beta"]) == {0.5}


@pytest.mark.parametrize(
    ("options", "reaches"),
    [
        ({"reward_penalty": no_penalty, "loss_penalty": kl_k2}, True),
        ({"reward_penalty": no_penalty, "loss_penalty": kl_k1}, False),  # no gradient in the mean
        ({"reward_penalty": no_penalty, "loss_penalty": kl_k3}, False),  # the forward KL's gradient
        ({"reward_penalty": kl_k2}, False),
        ({"reward_penalty": kl_k3}, False),
        ({"reward_penalty": no_penalty}, False),
        ({"surrogate": unclipped_surrogate_loss, "n_epochs": 1}, True),
        ({"value_error": partial(clipped_value_loss, clip_eps=0.5)}, True),
        ({"n_minibatches": 4}, True),
        ({"lam": 0.0, "discount": 0.5}, True),  # with one token they do not matter
        ({"entropy_weight": 0.5}, False),
    ],
    ids=[
        "k2 loss",
        "k1 loss",
        "k3 loss",
        "k2 reward",
        "k3 reward",
        "no KL",
        "unclipped",
        "clipped value",
        "minibatches",
        "lam and discount",
        "entropy",
    ],
)
def test_which_variants_of_ppo_share_its_optimum(options, reaches):
    task = four_answers()
    logps, _ = ppo(task, normalise=as_they_are, **options)
    best = optimal_logps(task.ref_logps, task.rewards, 0.5)
    assert (kl(logps, best) < 0.01) == reaches
    assert reaches or kl(logps, best) > 0.02


def test_an_entropy_bonus_moves_the_optimum_by_its_weight():
    task = four_answers()
    logps, _ = ppo(task, normalise=as_they_are, entropy_weight=0.5, steps=200)
    # E[r] - .5 KL + .5 H is greatest at the softmax of (r + .5 log pi_ref) / (.5 + .5).
    want = (task.rewards + 0.5 * task.ref_logps).log_softmax(-1)
    assert kl(logps, want) < 0.01


def test_what_tokens_earn_is_a_function_of_scores_penalties_and_mask():
    task = four_answers()
    logps, _ = ppo(
        task,
        normalise=as_they_are,
        assign=lambda scores, penalties, mask: token_rewards(scores / 2, penalties, mask),
    )
    want = optimal_logps(task.ref_logps, task.rewards / 2, 0.5)
    assert kl(task.ref_logps, want) > 0.03
    assert kl(logps, want) < 0.01


def text_task(generator):
    """Two prompts, at most 3 of 3 words, 15 completions each, random rewards."""
    rewards = torch.randn(2, 15, dtype=torch.float64, generator=generator)
    task = Task(("x", "y"), ("<end>", "a", "b"), 3, 0, rewards)
    shape = {"n_layers": 1, "n_heads": 2, "width": 8}
    return task, TinyTransformer.for_task(task, generator=generator, **shape).double()


def test_ppo_on_text_reaches_the_optimum(generator):
    task, reference = text_task(generator)
    policy = copy.deepcopy(reference)
    fit_ppo(
        SharedTrunk(policy),
        reference,
        task.prompts,
        true_score(task),
        beta=0.7,
        **settings(steps=120, batch_size=256, learning_rate=0.02),
    )
    with torch.no_grad():
        ref_logps, logps = (enumerate_logps(model, task) for model in (reference, policy))
    best = optimal_logps(ref_logps, task.rewards, 0.7)
    assert kl(ref_logps, best).mean() > 0.4
    assert kl(logps, best).mean() < 0.05


@pytest.mark.parametrize("advantages", [None, mean_advantages])
def test_reinforce_reaches_the_optimum(advantages):
    task = four_answers()
    fitted = TabularPolicy(task.ref_logps)
    history = fit_reinforce(
        fitted,
        TabularPolicy(task.ref_logps),
        task.prompts,
        true_score(task),
        beta=0.5,
        n_samples=4,
        **settings(steps=250, batch_size=64, learning_rate=0.05),
        **({"advantages": advantages} if advantages else {}),
    )
    best = optimal_logps(task.ref_logps, task.rewards, 0.5)
    assert kl(fitted.logits.detach().log_softmax(-1), best).max() < 0.01
    assert {name: len(values) for name, values in history.items()} == {
        "reward": 250,
        "kl": 250,
        "objective": 250,
    }
    tail = sum(history["objective"][-50:]) / 50
    best_value = objective(best, task.ref_logps, task.rewards, 0.5).item()
    assert tail == pytest.approx(best_value, abs=0.05)


def test_on_policy_preferences_reach_the_optimum():
    task = four_answers()
    fitted = TabularPolicy(task.ref_logps)
    history = fit_online_preferences(
        fitted,
        TabularPolicy(task.ref_logps),
        task.prompts,
        true_score(task),
        DPO,
        **settings(steps=400, batch_size=256, learning_rate=0.05),
    )
    best = optimal_logps(task.ref_logps, task.rewards, 0.5)
    assert kl(fitted.logits.detach().log_softmax(-1), best).max() < 0.02
    assert history.keys() == {"loss", "margin", "accuracy", "reward", "kl"}
    assert history["loss"][0] == pytest.approx(math.log(2))
    assert (history["kl"][0], history["margin"][0], history["accuracy"][0]) == (0.0, 0.0, 0.0)
    assert sum(history["margin"][-50:]) > 0


def test_the_mean_of_k1_is_plus_the_kl_from_the_policy():
    task = four_answers()
    uniform = torch.zeros(1, 4, dtype=torch.float64)
    n = 20_000
    exact = kl(uniform.log_softmax(-1), task.ref_logps).item()
    logratios = uniform.log_softmax(-1) - task.ref_logps
    error = logratios.std(correction=0).item() / n**0.5
    both = SeparateNetworks(TabularPolicy(uniform), TabularPolicy(uniform[:, :1]))
    _, history = ppo(task, both, steps=1, batch_size=n)
    assert exact > 20 * error
    assert history["kl"] == [pytest.approx(exact, abs=5 * error)]
    again = fit_reinforce(
        TabularPolicy(uniform),
        TabularPolicy(task.ref_logps),
        task.prompts,
        true_score(task),
        beta=0.5,
        n_samples=n,
        **settings(steps=1, batch_size=1),
    )
    assert again["kl"] == [pytest.approx(exact, abs=5 * error)]


def test_beta_follows_its_controller():
    task = four_answers()
    best = optimal_logps(task.ref_logps, task.rewards, 0.5)
    target = kl(best, task.ref_logps).item()
    controller = AdaptiveKLController(beta=2.0, target=target, horizon=2560)
    logps, history = ppo(task, beta=controller, steps=250)
    assert history["beta"][0] == 2.0
    assert history["beta"][1] == pytest.approx(2.0 * (1 - 0.2 / 10))  # far below the target
    # E[r] - beta KL at a given KL: beta = .5 again
    assert kl(logps, task.ref_logps).item() == pytest.approx(target, abs=0.05)
    assert controller.beta == pytest.approx(0.5, abs=0.1)


def test_prompts_take_turns_and_scores_see_what_was_drawn():
    task = random_bandit(3, 5, generator=seeded(7))
    asked = []

    def score(prompts, completions):
        asked.append(prompts.tolist())
        assert not torch.is_grad_enabled()
        return true_score(task)(prompts, completions)

    ppo(task, score=score, steps=3, batch_size=7)
    assert [sorted(rows.count(x) for x in range(3)) for rows in asked] == [[2, 2, 3]] * 3
    asked.clear()
    fit_reinforce(
        TabularPolicy(task.ref_logps), TabularPolicy(task.ref_logps), task.prompts, score,
        beta=1.0, n_samples=2, **settings(steps=1, batch_size=3),
    )  # fmt: skip
    assert asked[0][0::2] == asked[0][1::2]
    assert sorted(asked[0]) == [0, 0, 1, 1, 2, 2]
    asked.clear()
    ppo(task, score=score, steps=1, batch_size=30)
    turns = [tuple(asked[0][n : n + 3]) for n in range(0, 30, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert len(set(turns)) > 1


def test_on_policy_loops_depend_on_their_generator_only():
    task = four_answers()
    runs = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        logps, history = ppo(task, steps=5, generator=seeded(seed))
        runs.append((logps, history))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])
    seen = []
    ppo(task, steps=4, progress=lambda steps: (seen.append(step) or step for step in steps))
    assert seen == [0, 1, 2, 3]


def test_token_rewards_by_hand():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    penalties = torch.tensor([[0.5, 0.25, 9.0], [1.0, 2.0, 4.0], [0.0, math.nan, 7.0]])
    got = token_rewards(torch.tensor([1.0, 10.0, -2.0]), penalties, mask)
    # ended after two tokens; never ended; ended at once
    want = torch.tensor([[-0.5, 0.75, 0.0], [-1.0, -2.0, 6.0], [-2.0, 0.0, 0.0]])
    assert_close(got, want, atol=0, rtol=0)
    # With no value function, lambda = 1 gives each token all that is still to come.
    to_come, _ = gae(got, torch.zeros(3, 3), mask, discount=1.0, lam=1.0)
    assert_close(to_come[:, 0], torch.tensor([0.25, 3.0, -2.0]), atol=0, rtol=0)


# --- the same run, worked out another way ----------------------------------------------------


class Adam:
    """Algorithm 1 of Kingma & Ba 2015, with the rates of the loops."""

    def __init__(self, weights, steps, learning_rate):
        self.weights, self.steps, self.learning_rate = weights, steps, learning_rate
        self.means = [torch.zeros_like(weight) for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in weights]
        self.n = 0

    def step(self, loss, at):
        """One step down at step `at` of the loop."""
        self.n += 1
        height = (1 + math.cos(math.pi * at / self.steps)) / 2
        rate = self.learning_rate * min(1, (at + 1) / 20) * height
        gradients = torch.autograd.grad(loss, self.weights)
        parts = zip(self.weights, gradients, self.means, self.squares, strict=True)
        for weight, gradient, mean, square in parts:
            mean.copy_(0.9 * mean + 0.1 * gradient)
            square.copy_(0.99 * square + 0.01 * gradient**2)
            root = (square / (1 - 0.99**self.n)).sqrt() + 1e-8
            weight.data -= rate * mean / (1 - 0.9**self.n) / root


def assert_same_run(weights, want_weights, history, want_history):
    assert history.keys() == want_history.keys()
    for name, values in want_history.items():
        assert history[name] == pytest.approx([float(value) for value in values], abs=1e-9), name
    for weight, want in zip(weights, want_weights, strict=True):
        assert_close(weight.detach(), want.detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-8])  # at 1e-8 the epsilon of Adam shows
def test_sft_takes_the_steps_of_adam(scale):
    class Parabola(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(1, dtype=torch.float64))
            self.asked = []

        def token_logps(self, prompts, completions):
            self.asked.append(prompts.tolist())
            return -scale * (self.place - prompts[:, None]) ** 2

    policy, prompts = Parabola(), torch.arange(5)
    options = settings(steps=45, batch_size=2, learning_rate=0.3)
    history = fit_sft(policy, prompts, torch.zeros(5, 1, dtype=torch.int64), **options)
    place = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    adam, want = Adam([place], 45, 0.3), {"loss": []}
    for step, rows in enumerate(policy.asked):
        loss = sum(scale * (place - x) ** 2 for x in rows).sum() / len(rows)
        want["loss"].append(loss.item())
        adam.step(loss, step)
    assert abs(place.item()) > 0.5
    assert_same_run([policy.place], [place], history, want)


def test_preferences_are_fitted_by_the_steps_of_adam(generator):
    ref_logps, start = torch.randn(2, 10, 4, dtype=torch.float64, generator=generator).log_softmax(
        -1
    )
    chosen, rejected = torch.rand(10, 4, generator=generator).argsort(1)[:, :2].T
    policy = Spy(start)
    pairs = (torch.arange(10), chosen[:, None], rejected[:, None])
    options = settings(steps=8, learning_rate=0.3)
    history = fit_preferences(policy, Spy(ref_logps), pairs, PAIRED["ipo"], **options)
    logits, want = start.clone().requires_grad_(), defaultdict(list)
    adam = Adam([logits], 8, 0.3)
    for step, both in enumerate(policy.asked):
        x = both[: len(both) // 2]
        log_ratios = logits.log_softmax(-1) - ref_logps
        margins = log_ratios[x, chosen[x]] - log_ratios[x, rejected[x]]
        loss = ((margins - 1) ** 2).mean()  # IPO at beta = .5
        for name, value in {
            "loss": loss,
            "margin": margins.mean(),
            "accuracy": (margins > 0).double().mean(),
        }.items():
            want[name].append(value.item())
        adam.step(loss, step)
    assert len(set(want["accuracy"])) > 1
    assert_same_run([policy.table], [logits], history, want)


class Judge:
    """A score of a bandit's answers that writes down what it was asked.

    The prompt adds far more than an answer, so that no two prompts can be mixed without notice.
    """

    def __init__(self, task, scale=1.0, per_prompt=100.0):
        self.table = scale * task.rewards + per_prompt * task.prompts[:, None]
        self.asked = []

    def __call__(self, prompts, completions):
        self.asked.append((prompts, completions[:, 0]))
        return self.table[prompts, completions[:, 0]]


def test_reinforce_takes_the_steps_of_its_formula(generator):
    task, beta = random_bandit(3, 5, generator=generator), 0.7
    start = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    judge, policy = Judge(task), TabularPolicy(start)
    history = fit_reinforce(
        policy, TabularPolicy(task.ref_logps), task.prompts, judge, beta=beta, n_samples=4,
        **settings(steps=6, batch_size=3),
    )  # fmt: skip
    logits, want = start.clone().requires_grad_(), defaultdict(list)
    adam = Adam([logits], 6, 0.1)
    for step, (x, y) in enumerate(judge.asked):
        logps = logits.log_softmax(-1)[x, y]
        kls = logps.detach() - task.ref_logps[x, y]
        gained = judge.table[x, y] - beta * kls
        loss = 0.0
        for i in range(12):
            others = [gained[j] for j in range(12) if j != i and x[j] == x[i]]
            assert len(others) == 3
            loss -= (gained[i] - sum(others) / 3) * logps[i] / 12
        adam.step(loss, step)
        want["reward"].append(judge.table[x, y].mean())
        want["kl"].append(kls.mean())
        want["objective"].append(gained.mean())
    assert_same_run([policy.logits], [logits], history, want)


def test_on_policy_preferences_take_the_steps_of_their_formula(generator):
    task = random_bandit(3, 5, generator=generator)
    start = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    # So far apart are the scores that the judge tosses no coin but between equal answers.
    judge, policy = Judge(task, scale=1e5), TabularPolicy(start)
    history = fit_online_preferences(
        policy, TabularPolicy(task.ref_logps), task.prompts, judge, DPO,
        **settings(steps=6, batch_size=3),
    )  # fmt: skip
    logits, want = start.clone().requires_grad_(), defaultdict(list)
    adam = Adam([logits], 6, 0.1)
    for step, (x, y) in enumerate(judge.asked):
        log_ratios = logits.log_softmax(-1) - task.ref_logps
        margins = []
        for prompt in range(3):  # each once in a batch
            first, second = y[x == prompt]
            if judge.table[prompt, first] < judge.table[prompt, second]:
                first, second = second, first
            margins.append(log_ratios[prompt, first] - log_ratios[prompt, second])
        margins = torch.stack(margins)
        loss = torch.log1p((-0.5 * margins).exp()).mean()
        adam.step(loss, step)
        want["loss"].append(loss.detach())
        want["margin"].append(margins.detach().mean())
        want["accuracy"].append((margins > 0).double().mean())
        want["reward"].append(judge.table[x, y].mean())
        want["kl"].append(log_ratios[x, y].detach().mean())
    assert_same_run([policy.logits], [logits], history, want)


def test_a_reward_model_takes_the_steps_of_its_formula(generator):
    task, shape = (
        random_bandit(3, 4, generator=generator),
        {"n_layers": 1, "n_heads": 1, "width": 8},
    )
    model = RewardModel.for_task(task, generator=generator, **shape).double()
    with torch.no_grad():
        model.head.weight += torch.randn(1, 8, dtype=torch.float64, generator=generator)
    by_hand = copy.deepcopy(model)
    pairs = task.sample_pairs(task.ref_logps, 30, generator=generator)
    history = fit_reward_model(model, pairs, **settings(steps=6, batch_size=30))
    adam, want = Adam(list(by_hand.parameters()), 6, 0.1), defaultdict(list)
    for step in range(6):
        heard = []
        with by_hand.body.ln_f.register_forward_hook(lambda _, x, y, to=heard: to.append(y[:, 1])):
            by_hand.body(torch.cartesian_prod(torch.arange(3), torch.arange(4)))
        rewards = by_hand.head(heard[0]).view(3, 4)
        prompts, *answers = pairs
        margins = [rewards[prompts, answer[:, 0]] for answer in answers]
        margins = margins[0] - margins[1]
        loss = torch.log1p((-margins).exp()).mean()
        want["loss"].append(loss.detach())
        want["accuracy"].append((margins > 0).double().mean())
        adam.step(loss, step)
    assert len(set(want["accuracy"])) > 1
    assert_same_run(model.parameters(), by_hand.parameters(), history, want)


@pytest.mark.parametrize("loop", [fit_reinforce, fit_online_preferences])
def test_what_a_prompt_adds_to_the_scores_of_its_answers_does_not_matter(loop, generator):
    task = random_bandit(3, 5, generator=generator)
    rest, options = (
        ((DPO,), {}) if loop is fit_online_preferences else ((), {"beta": 0.5, "n_samples": 3})
    )
    fitted = []
    for per_prompt in (0.0, 64.0):
        policy = TabularPolicy(task.ref_logps)
        loop(
            policy, TabularPolicy(task.ref_logps), task.prompts, Judge(task, 1.0, per_prompt),
            *rest, **settings(steps=10, batch_size=8), **options,
        )  # fmt: skip
        fitted.append(policy.logits.detach())
    assert_close(*fitted, atol=1e-9, rtol=0)
    assert (fitted[0] - task.ref_logps).abs().max() > 0.05


def test_the_same_seed_asks_the_same_prompts_under_any_default_dtype():
    task, asked = random_bandit(5, 3, generator=seeded()), []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            judge = Judge(task)
            ppo(task, score=judge, steps=2, batch_size=7)
            for loop, rest, options in (
                (fit_reinforce, (), {"beta": 0.5, "n_samples": 2}),
                (fit_online_preferences, (DPO,), {}),
            ):
                policies = [TabularPolicy(task.ref_logps) for _ in range(2)]
                loop(*policies, task.prompts, judge, *rest, **settings(steps=2), **options)
            asked.append(judge.asked)
        finally:
            torch.set_default_dtype(torch.float32)
    assert len(asked[0]) == 6
    for first, second in zip(*asked, strict=True):
        assert all(map(torch.equal, first, second))


class Overheard:
    """Interchangeable parts of `fit_ppo` that write down what they are given.

    The scores are random: each row of a batch has advantages of its own, and is known by them.
    """

    def __init__(self, clip_eps):
        self.clip_eps, self.generator, self.batches = clip_eps, seeded(3), []

    def score(self, prompts, completions):
        scores = torch.randn(len(prompts), dtype=torch.float64, generator=self.generator)
        self.batches.append(SimpleNamespace(x=prompts, y=completions, scores=scores, orders=[]))
        return scores

    def normalise(self, advantages, mask):
        self.batches[-1].advantages = whiten(advantages, mask)
        return self.batches[-1].advantages

    def surrogate(self, logps, old_logps, advantages):
        (*_, batch) = self.batches
        alike = (advantages[:, None] == batch.advantages).all(-1)
        assert torch.equal(alike.sum(1), torch.ones(len(advantages)))
        batch.orders.append(alike.long().argmax(1).tolist())
        return clipped_surrogate_loss(logps, old_logps, advantages, clip_eps=self.clip_eps)


def read_plainly(both, x, y):
    """Log-probabilities, values and entropies `[B, T]` of one forward pass, without a tree."""
    tokens = torch.cat([x[:, None], y[:, :-1].clamp(min=0)], 1)
    body, head = both.policy, getattr(both, "value_head", None)
    if head is None:
        body, head = both.critic.body, both.critic.head
    heard = []
    with body.ln_f.register_forward_hook(lambda _, inputs, hidden: heard.append(hidden)):
        body(tokens)
    logps = both.policy(tokens).log_softmax(-1)
    of_tokens = logps.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    return of_tokens, head(heard[0]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def ppo_by_its_formulas(
    both, reference, batches, *, steps, learning_rate, beta, horizon=None, target=None, n_epochs=4,
    discount=1.0, lam=0.95, value_weight=0.1, entropy_weight=0.0, k2_in_loss=False, clip_eps=0.2,
    value_eps=math.inf,
):  # fmt: skip
    """Trains `both` on the batches that were drawn; the defaults are those of `fit_ppo`."""
    adam, history = Adam(list(both.parameters()), steps, learning_rate), defaultdict(list)
    for step, batch in enumerate(batches):
        x, y, mask, n_rows = batch.x, batch.y, batch.y != PAD, len(batch.x)
        with torch.no_grad():
            old_logps, old_values, entropies = read_plainly(both, x, y)
            ref_logps = reference.token_logps(x, y)
        advantages = torch.zeros_like(old_logps)
        for i, n in enumerate(mask.sum(1).tolist()):
            rewards = [-beta * (old_logps[i, t] - ref_logps[i, t]) for t in range(n)]
            rewards[-1] += batch.scores[i]
            values = [*old_values[i, :n], 0.0]
            errors = [rewards[t] + discount * values[t + 1] - values[t] for t in range(n)]
            for t in range(n):
                advantages[i, t] = sum((discount * lam) ** (k - t) * errors[k] for k in range(t, n))
        returns, of_tokens = advantages + old_values, advantages[mask]
        advantages = (advantages - of_tokens.mean()) / (of_tokens.var(correction=0) + 1e-8) ** 0.5
        for rows in batch.orders or [list(range(n_rows))] * n_epochs:
            kept = mask[rows]
            logps, values, entropy = (t[kept] for t in read_plainly(both, x[rows], y[rows]))
            before, value_before, ref, gain, aim = (
                t[rows][kept] for t in (old_logps, old_values, ref_logps, advantages, returns)
            )
            ratios = (logps - before).exp()
            clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
            near = value_before + (values - value_before).clamp(-value_eps, value_eps)
            errors = torch.maximum((values - aim) ** 2, (near - aim) ** 2) / 2
            losses = -torch.minimum(ratios * gain, clipped * gain) + value_weight * errors
            losses = losses - entropy_weight * entropy
            if k2_in_loss:
                losses = losses + beta * (logps - ref) ** 2 / 2
            adam.step(losses.mean(), step)
        kl = ((old_logps - ref_logps) * mask).sum() / n_rows
        measured = {
            "reward": batch.scores.mean(),
            "kl": kl,
            "objective": batch.scores.mean() - beta * kl,
            "entropy": entropies[mask].mean(),
            "clipped": ((ratios - 1).abs() > 0.2).double().mean(),
            "value_loss": errors.detach().mean(),
            "beta": beta,
        }
        for name, value in measured.items():
            history[name].append(float(value))
        if horizon is not None:
            error = min(max(kl.item() / target - 1, -0.2), 0.2)
            beta = beta * (1 + error * n_rows / horizon)
    return history


def random_heads(task, kind, generator):
    """A tiny transformer with a value function of large random weights, in its trunk or beside."""
    shape = {"n_layers": 1, "n_heads": 2, "width": 8, "generator": generator}
    policy = TinyTransformer.for_task(task, **shape)
    if kind is SharedTrunk:
        both = SharedTrunk(policy).double()
    else:
        both = SeparateNetworks(policy, ScalarTransformer(TinyTransformer.for_task(task, **shape)))
        both = both.double()
    with torch.no_grad():
        for weight in both.parameters():
            weight += 0.2 * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
    return both


@pytest.mark.parametrize("kind", [SharedTrunk, SeparateNetworks])
def test_ppo_takes_the_steps_of_its_formulas_by_default(kind, generator):
    task, reference = text_task(generator)
    both = random_heads(task, kind, generator)
    by_hand, overheard = copy.deepcopy(both), Overheard(None)
    options = {"steps": 3, "learning_rate": 0.05}
    history = fit_ppo(
        both, reference, task.prompts, overheard.score, beta=0.5, batch_size=9, generator=seeded(),
        **options,
    )  # fmt: skip
    want = ppo_by_its_formulas(by_hand, reference, overheard.batches, beta=0.5, **options)
    assert_same_run(both.parameters(), by_hand.parameters(), history, want)


@pytest.mark.parametrize("kind", [SharedTrunk, SeparateNetworks])
def test_ppo_takes_the_steps_of_its_formulas_with_every_setting(kind, generator):
    task, reference = text_task(generator)
    both = random_heads(task, kind, generator)
    by_hand, overheard = copy.deepcopy(both), Overheard(clip_eps=0.1)
    options = {"steps": 3, "learning_rate": 0.2, "discount": 0.8, "lam": 0.6, "value_weight": 0.7}
    options["entropy_weight"] = 0.05
    history = fit_ppo(
        both, reference, task.prompts, overheard.score, batch_size=11, n_epochs=3, n_minibatches=2,
        beta=AdaptiveKLController(beta=0.5, target=0.4, horizon=30), generator=seeded(),
        parts=PPOParts(
            loss_penalty=kl_k2, value_error=partial(clipped_value_loss, clip_eps=0.05),
            normalise=overheard.normalise, surrogate=overheard.surrogate,
        ),
        **options,
    )  # fmt: skip
    want = ppo_by_its_formulas(
        by_hand, reference, overheard.batches, beta=0.5, target=0.4, horizon=30, k2_in_loss=True,
        clip_eps=0.1, value_eps=0.05, **options,
    )  # fmt: skip
    assert_same_run(both.parameters(), by_hand.parameters(), history, want)
    assert any(0 < share < 1 for share in history["clipped"])
    orders = []
    for batch in overheard.batches:
        assert [len(rows) for rows in batch.orders] == [6, 5] * 3
        orders += [batch.orders[n] + batch.orders[n + 1] for n in (0, 2, 4)]
    assert all(sorted(order) == list(range(11)) for order in orders)  # each row once in a pass
    assert len({tuple(order) for order in [*orders, range(11)]}) == 10  # shuffled in every pass


@pytest.mark.parametrize(("n_epochs", "n_minibatches"), [(1, 1), (3, 1), (2, 20)])
def test_an_iteration_of_ppo_makes_one_tree_and_reads_each_prefix_once_per_pass(
    n_epochs, n_minibatches, generator, monkeypatch
):
    task, reference = text_task(generator)
    both, overheard = random_heads(task, SharedTrunk, generator), Overheard(None)
    made, reads = [], []
    prefix_tree = scoring.prefix_tree
    monkeypatch.setattr(scoring, "prefix_tree", lambda *of: made.append(of) or prefix_tree(*of))
    sampled = []  # sampling reads, too, before the score is asked for
    both.policy.blocks[-1].c_fc.register_forward_hook(lambda _, of, out: reads.append(len(out)))
    fit_ppo(
        both, reference, task.prompts,
        lambda x, y: sampled.append(len(reads)) or overheard.score(x, y),
        beta=0.5, steps=1, batch_size=40, learning_rate=0.1, generator=seeded(),
        n_epochs=n_epochs, n_minibatches=n_minibatches,
    )  # fmt: skip
    (batch,) = overheard.batches
    n_nodes = len({(x, *y[:t]) for x, row in zip(batch.x.tolist(), batch.y.tolist(), strict=True)
                   for y in [[v for v in row if v != PAD]] for t in range(len(y))})  # fmt: skip
    assert len(made) == 1
    passes = reads[sampled[0] :]
    if n_minibatches == 1:
        assert passes == [n_nodes] * n_epochs
    else:
        assert len(passes) == 1 + n_epochs * n_minibatches
        assert passes[0] == n_nodes
        assert max(passes[1:]) < n_nodes


# --- what is refused -------------------------------------------------------------------------

TASK = three_answers()
ROWS = torch.zeros(4, dtype=torch.int64)
ANSWERS = torch.tensor([[0], [1], [2], [0]])
PAIRS = (ROWS, ANSWERS, ANSWERS.flip(0))


def policy():
    return TabularPolicy(TASK.ref_logps)


def sft(prompts=ROWS, completions=ANSWERS, **changes):
    return fit_sft(policy(), prompts, completions, **settings(**changes))


def preferences(pairs=PAIRS, loss=DPO, **changes):
    return fit_preferences(policy(), policy(), pairs, loss, **settings(**changes))


def rewards(pairs=PAIRS, **changes):
    model = RewardModel.for_task(TASK, generator=seeded(), n_layers=1, n_heads=1, width=4)
    return fit_reward_model(model, pairs, **settings(**changes))


def on_policy(fit, *rest):
    """A call of one of the loops that sample, each on a policy of its own unless told."""

    def call(both=None, reference=None, prompts=TASK.prompts, score=None, **changes):
        both = both or (actor_critic(TASK) if fit is fit_ppo else policy())
        weights = {} if fit is fit_online_preferences else {"beta": 0.5}
        if fit is fit_reinforce:
            weights["n_samples"] = 2
        options = {**settings(**weights), **changes}
        if fit is fit_ppo:
            options = with_parts(**options)
        return fit(
            both, reference or policy(), prompts, score or true_score(TASK), *rest, **options
        )

    return call


run_ppo, run_reinforce = on_policy(fit_ppo), on_policy(fit_reinforce)
run_online = on_policy(fit_online_preferences, DPO)
ON_POLICY = [run_ppo, run_reinforce, run_online]


SETTINGS_REFUSED = [
    ({"steps": 0}, "`steps` must be a whole number >= 1, got 0"),
    ({"steps": 2.0}, "`steps` must be a whole number >= 1, got float"),
    ({"batch_size": 0}, "`batch_size` must be a whole number >= 1, got 0"),
    ({"batch_size": "4"}, "`batch_size` must be a whole number >= 1, got str"),
    ({"learning_rate": 0.0}, "`learning_rate` must be a finite number > 0, got 0.0"),
    ({"learning_rate": math.nan}, "`learning_rate` must be a finite number > 0, got nan"),
    ({"generator": None}, "`generator` must be a torch.Generator, got NoneType"),
    ({"generator": 0}, "`generator` must be a torch.Generator, got int"),
]


@pytest.mark.parametrize(("changes", "want"), SETTINGS_REFUSED)
@pytest.mark.parametrize("fit", [sft, preferences, rewards, *ON_POLICY])
def test_bad_settings_are_refused_before_anything_runs(fit, changes, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        fit(**changes)
    assert str(caught.value) == want


NONE = ANSWERS[:0]
REFUSED = [
    (lambda: sft(ROWS[:0], NONE), "`prompts` must have at least one row, got shape [0]"),
    (lambda: sft(ROWS[:3]), "`completions` must have 3 rows like `prompts`, got 4"),
    (lambda: sft(completions=[[0]]), "`completions` must be a torch.Tensor, got list"),
    (
        lambda: sft(completions=ANSWERS.float()),
        "`completions` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: sft(completions=ANSWERS[:, 0]),
        "`completions` must be a non-empty [n, T], got shape [4]",
    ),
    (lambda: sft(ROWS + 1), "`prompts` must be in 0..0, got 1"),
    (lambda: sft(completions=ANSWERS + 1), "`completions` must have tokens in 0..2, got 3"),
    (
        lambda: preferences((ROWS[:0], NONE, NONE)),
        "`prompts` must have at least one row, got shape [0]",
    ),
    (
        lambda: preferences((ROWS, ANSWERS)),
        "`pairs` must be (prompts, chosen, rejected), got 2 tensors",
    ),
    (
        lambda: preferences((ROWS, ANSWERS[:2], ANSWERS)),
        "`chosen` must have 4 rows like `prompts`, got 2",
    ),
    (
        lambda: preferences((ROWS, ANSWERS, ANSWERS[:2])),
        "`rejected` must have 4 rows like `prompts`, got 2",
    ),
    (lambda: preferences((ROWS, ANSWERS, None)), "`rejected` must be a torch.Tensor, got NoneType"),
    (
        lambda: preferences((ROWS, ANSWERS[:, 0], ANSWERS)),
        "`chosen` must be a non-empty [n, T], got shape [4]",
    ),
    (
        lambda: preferences((ROWS, ANSWERS, ANSWERS.double())),
        "`rejected` must have dtype torch.int64 (.long()), got torch.float64",
    ),
    (
        lambda: preferences(loss=lambda *four: four[0] * math.nan),
        "the loss must be finite, got nan at step 0",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(-1), TASK.ref_logps),
        "`loss` must return a scalar, got shape [1]",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum() * math.nan, TASK.ref_logps),
        "`loss` must return a finite value, got nan",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), TASK.ref_logps - math.inf),
        "`start_logps` must be finite, got -inf",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), TASK.ref_logps[0]),
        "`start_logps` must be [X, Y], one row per prompt, "
        "got shape [3]: for one prompt write start_logps[None]",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), TASK.ref_logps, steps=0),
        "`steps` must be a whole number >= 1, got 0",
    ),
    (
        lambda: population_loss(DPO, *[torch.zeros(2, 1)] * 3),
        "`logps` must have >= 2 completions per prompt, got 1",
    ),
    (
        lambda: population_loss(DPO, torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 3)),
        "`rewards` must have shape [2, 2] like `logps`, got [2, 3]",
    ),
    (
        lambda: population_loss(DPO, torch.zeros(2, 2) / 0, torch.zeros(2, 2), torch.zeros(2, 2)),
        "`logps` must be finite, got nan",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), 1 - TASK.ref_logps),
        "`start_logps` must be log-probabilities <= 0, got 2.609: is it a negative log-likelihood?",
    ),
    (
        lambda: fit_table(
            lambda logps: (logps - TASK.ref_logps).abs().sqrt().sum(), TASK.ref_logps
        ),
        "the gradient must be finite, got a norm of nan where the loss is 0: a part of it has no "
        "derivative there, such as sqrt(x) at x = 0",
    ),
    (
        lambda: fit_table(lambda z, v: z.sum() + v, TASK.ref_logps, torch.zeros(())),
        "`extra[0]` must have dtype torch.float64 like `start_logps`, got torch.float32: "
        "write extra[0].to(torch.float64)",
    ),
    (
        lambda: fit_table(lambda z, v, w: z.sum(), *[TASK.ref_logps] * 2, TASK.ref_logps / 0),
        "`extra[1]` must be finite, got -inf",
    ),
]


WINS = torch.tensor([[[0.5, 0.7, 0.2], [0.3, 0.5, 0.9], [0.8, 0.1, 0.5]]], dtype=torch.float64)
ALIKE = torch.ones(1, 3, 3, dtype=torch.float64)


def changed(table, entry, value):
    table = table.clone()
    table[entry] = value
    return table


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, "one of `rewards` and `win_probs` must be given, got neither"),
        (
            {"rewards": TASK.rewards, "win_probs": WINS},
            "one of `rewards` and `win_probs` must be given, got both",
        ),
        ({"rewards": TASK.rewards / 0}, "`rewards` must be finite, got inf"),
        (
            {"win_probs": WINS.float()},
            "`win_probs` must have dtype torch.float64 like `logps`, got torch.float32",
        ),
        ({"win_probs": WINS[0]}, "`win_probs` must be a non-empty [X, Y, Y], got shape [3, 3]"),
        (
            {"win_probs": WINS[:, :, :2]},
            "`win_probs` must have shape [X, Y, Y] = [1, 3, 3], got [1, 3, 2]",
        ),
        (
            {"win_probs": changed(WINS, (0, 2, 1), 0.2)},
            "`win_probs` must be >= 0 and sum to 1 per pair, got 0.9 and 0.2",
        ),
        (
            {"win_probs": changed(changed(WINS, (0, 0, 2), -0.5), (0, 2, 0), 1.5)},
            "`win_probs` must be >= 0 and sum to 1 per pair, got -0.5 and 1.5",
        ),
        (
            {"win_probs": changed(changed(WINS, (0, 2, 0), -0.5), (0, 0, 2), 1.5)},
            "`win_probs` must be >= 0 and sum to 1 per pair, got 1.5 and -0.5",
        ),
        ({"win_probs": changed(WINS, (0, 1, 0), math.nan)}, "`win_probs` must be finite, got nan"),
        (
            {"win_probs": WINS, "pair_weights": changed(ALIKE, (0, 1, 0), 3.0)},
            "`pair_weights` must be symmetric, got 1 and 3 for the two orders of a pair",
        ),
        (
            {"rewards": TASK.rewards, "pair_weights": -ALIKE},
            "`pair_weights` must be >= 0 and not all 0, got -1 to -1",
        ),
        (
            {"win_probs": WINS, "pair_weights": torch.eye(3, dtype=torch.float64)[None]},
            "`pair_weights` must be >= 0 and not all 0, got 0 to 0",
        ),
        ({"win_probs": WINS, "pair_weights": ALIKE / 0}, "`pair_weights` must be finite, got inf"),
        ({"win_probs": WINS, "pair_weights": ALIKE[0]}, "`pair_weights` must be a non-empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pairs_of_a_population_are_refused(given, want):
    with pytest.raises(ValueError) as caught:
        population_loss(DPO, TASK.ref_logps, TASK.ref_logps, **given)
    assert str(caught.value).startswith(want)


@pytest.mark.parametrize(("call", "want"), REFUSED, ids=[want for _, want in REFUSED])
def test_bad_input_is_refused(call, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == want


@pytest.mark.parametrize(
    ("score", "want"),
    [
        (lambda x, y: torch.full((len(y),), math.nan), "`score` must be finite, got nan"),
        (lambda x, y: torch.full((len(y),), math.inf), "`score` must be finite, got inf"),
        (
            lambda x, y: torch.zeros(len(y) - 1),
            "`score` must return {n} rewards, one per row, got {less}",
        ),
        (lambda x, y: torch.zeros(y.shape), "`score` must be a non-empty [B], got shape [{n}, 1]"),
        (
            lambda x, y: x,
            "`score` must have a floating dtype (.double() makes one), got torch.int64",
        ),
        (lambda x, y: [0.0] * len(y), "`score` must be a floating torch.Tensor [B], got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("call", ON_POLICY, ids=["ppo", "reinforce", "online"])
def test_a_score_that_is_no_score_is_refused(call, score, want):
    n = 4 if call is run_ppo else 8  # of 4 prompts
    with pytest.raises((TypeError, ValueError)) as caught:
        call(score=score)
    assert str(caught.value) == want.format(n=n, less=n - 1)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"beta": 0.0}, "`beta` must be a finite number > 0, got 0.0"),
        ({"beta": "adaptive"}, "`beta` must be a number, got str"),
        ({"lam": 1.1}, "`lam` must be a number in [0, 1], got 1.1"),
        ({"lam": -0.1}, "`lam` must be a number in [0, 1], got -0.1"),
        ({"discount": 2.0}, "`discount` must be a number in [0, 1], got 2.0"),
        ({"n_epochs": 0}, "`n_epochs` must be a whole number >= 1, got 0"),
        ({"n_minibatches": 0}, "`n_minibatches` must be a whole number >= 1, got 0"),
        ({"n_minibatches": 5}, "`n_minibatches` must be at most batch_size = 4, got 5"),
        ({"value_weight": -1.0}, "`value_weight` must be a number in [0.0, inf), got -1.0"),
        ({"entropy_weight": math.inf}, "`entropy_weight` must be a number in [0.0, inf), got inf"),
        (
            {"surrogate": partial(clipped_surrogate_loss, clip_eps=-0.2)},
            "`clip_eps` must be a finite number > 0, got -0.2",
        ),
        (
            {"value_error": partial(clipped_value_loss, clip_eps=0.0)},
            "`clip_eps` must be a finite number > 0, got 0.0",
        ),
        ({"normalise": lambda a, mask: a * math.nan}, "`advantages` must be finite, got nan"),
        ({"prompts": TASK.prompts[:0]}, "`prompts` must be a non-empty [n], got shape [0]"),
        ({"prompts": TASK.prompts + 1}, "`prompts` must be in 0..0, got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_of_ppo_are_refused(changes, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        run_ppo(**changes)
    assert str(caught.value) == want


def test_bad_settings_of_reinforce_are_refused():
    for changes, want in (
        ({"beta": -1.0}, "`beta` must be a finite number > 0, got -1.0"),
        ({"n_samples": 0}, "`n_samples` must be a whole number >= 1, got 0"),
        *(
            (
                {"n_samples": 1, **advantages},
                "`n_samples` must be >= 2, got 1: completions of a prompt are compared",
            )
            for advantages in (
                {},
                {"advantages": mean_advantages},
                {"advantages": group_normalised_advantages},
            )
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            run_reinforce(**changes)
        assert str(caught.value) == want


@pytest.mark.parametrize("call", ON_POLICY, ids=["ppo", "reinforce", "online"])
def test_on_policy_loops_refuse_a_reference_that_would_move(call):
    for view in (False, True):
        both = actor_critic(TASK) if call is run_ppo else policy()
        live = both.policy if call is run_ppo else both
        reference = live
        if view:
            reference = policy()
            reference.logits = nn.Parameter(live.logits.data.view(1, 3))
        with pytest.raises(ValueError, match="^`reference` must have weights of its own"):
            call(both, reference)


class Likelihoods(Spy):
    """One that answers with negative log-likelihoods, as a cross-entropy is."""

    def token_logps(self, prompts, completions):
        return -super().token_logps(prompts, completions)


def test_negative_log_likelihoods_are_refused():
    right, wrong = Spy(TASK.ref_logps), Likelihoods(TASK.ref_logps)
    calls = {
        "policy": [
            lambda: fit_sft(wrong, ROWS, ANSWERS, **settings()),
            lambda: fit_preferences(wrong, right, PAIRS, DPO, **settings()),
        ],
        "reference": [
            lambda: fit_preferences(right, wrong, PAIRS, DPO, **settings()),
            lambda: run_ppo(reference=wrong),
            lambda: run_reinforce(reference=wrong),
            lambda: run_online(reference=wrong),
        ],
    }
    for name, call in ((name, call) for name, of_name in calls.items() for call in of_name):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(
            f"`{name}.token_logps` must be log-probabilities <= 0, got"
        )
        assert str(caught.value).endswith(": is it a negative log-likelihood?")
    for spied in (right, wrong):
        assert torch.equal(spied.table, TASK.ref_logps)


@pytest.mark.parametrize(
    ("dtype", "later"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_log_probabilities_above_0_by_rounding_pass(dtype, later, generator):
    """A logit and its normaliser from two passes may differ by a unit in the last place."""

    class Rounded(Spy):
        def token_logps(self, prompts, completions):
            logits = self.table[prompts]
            again = logits + torch.finfo(dtype).eps * logits
            scored = again[:, :1] - logits.logsumexp(-1, keepdim=True)
            self.largest = scored.max().item()
            scored = torch.cat([scored, torch.full_like(scored, 7.0)], 1)  # 7 on padding: unread
            return scored.to(later)

    high = 80 * torch.rand(50, 1, dtype=torch.float64, generator=generator)
    policy = Rounded(torch.cat([high, -high - 20], 1).to(dtype))
    rows = (torch.arange(50), torch.tensor([[0, PAD]] * 50))
    history = fit_sft(policy, *rows, **settings(steps=1, batch_size=50))
    assert policy.largest > 0
    assert -1 < history["loss"][0] < 0


def test_scores_of_another_shape_are_refused():
    class Sums(Spy):
        def token_logps(self, prompts, completions):
            return super().token_logps(prompts, completions).sum(1)

    with pytest.raises(ValueError) as caught:
        fit_sft(Sums(TASK.ref_logps), ROWS, ANSWERS, **settings())
    want = "`policy.token_logps` must have shape [B, T] = [4, 1], got [4]"
    assert str(caught.value) == want


def test_a_gradient_that_is_not_finite_is_refused_before_the_step():
    """The square root of 0 is 0 and its slope infinite: a loss may look well and be useless."""

    class Part:
        """Of a loss, from the `bad_step`-th call on; it keeps the weights that it met."""

        def __init__(self, model, bad_step):
            self.weights, self.bad_step, self.n = list(model.parameters()), bad_step, -1

        def __call__(self, logps, other, *rest):
            self.n += 1
            self.met = [weight.detach().clone() for weight in self.weights]
            x = logps - (logps.detach() if self.n >= self.bad_step else 1)
            return x.abs().sqrt()

    live, both = [policy() for _ in range(2)], actor_critic(TASK)
    runs = [
        (live[0], lambda part: fit_preferences(live[0], policy(), PAIRS, part, **settings())),
        (live[1], lambda part: on_policy(fit_online_preferences, part)(both=live[1])),
        (both, lambda part: run_ppo(both, loss_penalty=part, n_epochs=1)),
    ]
    for model, run in runs:
        part = Part(model, bad_step=2)
        with pytest.raises(
            ValueError, match="^the gradient must be finite, got a norm of nan at step 2 "
        ):
            run(part)
        for weight, met in zip(model.parameters(), part.met, strict=True):
            assert torch.equal(weight, met)


def test_one_token_cannot_be_whitened_and_the_batch_size_is_to_blame():
    asked = []

    def score(prompts, completions):
        asked.append(completions)
        return torch.zeros(len(prompts))

    want = (
        "`batch_size` must be >= 2 where a completion can be one token, got 1: `whiten` needs two "
        "tokens (or pass PPOParts(normalise=as_they_are))"
    )
    with pytest.raises(ValueError) as caught:
        run_ppo(batch_size=1, score=score)
    assert str(caught.value) == want
    assert asked == []
    run_ppo(batch_size=1, score=score, normalise=as_they_are)
    # A completion of several tokens will do, unless it happens to end at once.
    shape = {"n_layers": 1, "n_heads": 1, "width": 4, "generator": seeded()}
    arguments = (TASK.prompts, score)
    endless = TinyTransformer(1, 3, 2, end_token=None, **shape)
    reference = TinyTransformer(1, 3, 2, end_token=None, **shape)
    options = settings(steps=40, batch_size=1, beta=1.0)
    fit_ppo(SharedTrunk(endless), reference, *arguments, **options)
    short = TinyTransformer(1, 3, 2, end_token=0, **shape)
    reference = TinyTransformer(1, 3, 2, end_token=0, **shape)
    with pytest.raises(ValueError) as caught:
        fit_ppo(SharedTrunk(short), reference, *arguments, **options)
    assert str(caught.value) == want


def test_a_horizon_that_a_batch_exceeds_is_refused_at_once():
    both, controller = actor_critic(TASK), AdaptiveKLController(beta=1.0, target=1.0, horizon=3)
    with pytest.raises(ValueError) as caught:
        run_ppo(both, beta=controller)
    assert str(caught.value) == "`batch_size` must be at most beta.horizon = 3, got 4"
    assert torch.equal(both.policy.logits, TASK.ref_logps)


def test_token_rewards_refuse():
    two, mask = torch.zeros(2), torch.ones(2, 3).bool()
    for arguments, want in (
        (
            (torch.zeros(3), torch.zeros(2, 3), mask),
            "`penalties` must have 3 rows like `scores`, got 2",
        ),
        ((two, torch.zeros(2, 2), mask), "`completion_mask` must have shape [2, 2], got [2, 3]"),
        ((two / 0, torch.zeros(2, 3), mask), "`scores` must be finite, got nan"),
        ((two, torch.zeros(2), mask), "`penalties` must be a non-empty [B, T], got shape [2]"),
        ((two[None], two[None], mask), "`scores` must be a non-empty [B], got shape [1, 2]"),
    ):
        with pytest.raises(ValueError) as caught:
            token_rewards(*arguments)
        assert str(caught.value) == want


def test_a_reference_that_would_move_with_the_policy_is_refused():
    shared, other = policy(), policy()
    other.logits = shared.logits
    for reference in (shared, other):
        with pytest.raises(ValueError) as caught:
            fit_preferences(shared, reference, (ROWS, ANSWERS, ANSWERS), DPO, **settings())
        assert str(caught.value) == (
            "`reference` must have weights of its own (copy.deepcopy), got weights that it shares "
            "with the policy"
        )


def test_answers_of_different_widths_are_refused():
    policy, reference = Spy(torch.zeros(1, 4)), Spy(torch.zeros(1, 4))
    wide = torch.tensor([[1, -1]])
    pairs = (torch.tensor([0]), torch.tensor([[0]]), wide)
    with pytest.raises(
        ValueError, match=r"`rejected` must have shape \[1, 1\] like `chosen`, got \[1, 2\]"
    ):
        fit_preferences(policy, reference, pairs, DPO, **settings())


# --- losses without a reference ------------------------------------------------------------------


REFERENCE_FREE = {
    "simpo": (partial(losses.simpo_loss, beta=2.0, gamma=0.5), mean_over_tokens),
    "cpo": (partial(losses.cpo_loss, beta=0.5), sum_over_tokens),
    "orpo": (partial(losses.orpo_loss, beta=0.5), mean_over_tokens),
}


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_a_loss_without_a_reference_is_trained_through_the_adapter(name, generator):
    """The recorded loss of the first step is that of the policy's own scores, by hand."""
    loss, reduce = REFERENCE_FREE[name]
    task = tasks.micro_reviews()
    policy = TinyTransformer.for_task(task, n_layers=1, generator=generator).double()
    reference = copy.deepcopy(policy)
    _, answers = tasks.micro_review_demonstrations(8, generator=generator)
    prompts, chosen, rejected = torch.arange(4), answers[:4], answers[4:]
    scores = [
        reduce(policy.token_logps(prompts, each), each != PAD).detach()
        for each in (chosen, rejected)
    ]
    history = fit_preferences(
        policy, reference, (prompts, chosen, rejected), without_reference(loss), reduce=reduce,
        steps=2, batch_size=4, learning_rate=0.01, generator=generator,
    )  # fmt: skip
    assert history["loss"][0] == pytest.approx(loss(*scores).mean().item(), abs=1e-12)
    assert history["loss"][1] < history["loss"][0]


def test_pairs_of_the_live_policy_take_a_loss_of_means(generator):
    """With gamma 0 and one token per answer SimPO is DPO against a uniform reference."""
    seen = []

    def watched(chosen, rejected):
        seen.append(losses.simpo_loss(chosen, rejected, beta=0.5, gamma=0.0).detach())
        return losses.simpo_loss(chosen, rejected, beta=0.5, gamma=0.0)

    policy = TabularPolicy(TASK.ref_logps)
    history = fit_online_preferences(
        policy, TabularPolicy(torch.zeros_like(TASK.ref_logps)), TASK.prompts,
        lambda prompts, answers: answers[:, 0].double(), without_reference(watched),
        reduce=mean_over_tokens, steps=2, batch_size=6, learning_rate=0.1, generator=generator,
    )  # fmt: skip
    assert history["loss"] == pytest.approx([each.mean().item() for each in seen], abs=1e-12)


class Margin:
    """A loss without a name and without a reference."""

    def __call__(self, chosen, rejected):
        return rejected - chosen


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            partial(losses.simpo_loss, beta=1.0, gamma=0.5),
            "write train.without_reference(simpo_loss), reduce=mean_over_tokens",
        ),
        (partial(losses.cpo_loss, beta=1.0), "write train.without_reference(cpo_loss)"),
        (losses.dpo_loss, "all else bound by functools.partial, got dpo_loss: missing"),
        (partial(losses.kto_loss, beta=1.0, reference_point=0.0), "single answers and a thumb"),
        (partial(losses.rebel_loss, beta=1.0), "a score of each answer: `fit_reinforce`"),
        (partial(losses.dro_loss, beta=1.0), "a score and a value of each answer"),
        (partial(losses.log_variance_loss, beta=1.0), "scores of K answers per prompt"),
        (partial(losses.plackett_luce_loss, beta=1.0), "a list of K answers per prompt"),
        (partial(losses.best_of_k_loss, beta=1.0), "a list of K answers per prompt"),
        (losses.reward_model_loss, "`fit_reward_model` takes it as it is"),
        (Margin(), "got this loss, which takes no reference: write train.without_reference("),
    ],
)
def test_a_loss_of_something_else_is_told_what_it_needs(loss, words, generator):
    policy, reference = TabularPolicy(TASK.ref_logps), TabularPolicy(TASK.ref_logps)
    settings = {"steps": 1, "batch_size": 2, "learning_rate": 0.1, "generator": generator}
    pairs = TASK.sample_pairs(TASK.ref_logps, 4, generator=generator)
    with pytest.raises(ValueError, match=re.escape(words)):
        fit_preferences(policy, reference, pairs, loss, **settings)
    with pytest.raises(ValueError, match=re.escape(words)):
        fit_online_preferences(
            policy, reference, TASK.prompts, lambda p, y: y[:, 0].double(), loss, **settings
        )


def test_what_a_loop_passes_on_to_a_loss_counts_as_bound():
    check_pair_loss(dpo_loss, beta=0.1)  # as `real.fit_preferences` does
    check_pair_loss(without_reference(losses.simpo_loss), beta=0.1, gamma=1.0)
    with pytest.raises(ValueError) as caught:
        check_pair_loss(cdpo_loss, beta=0.1)
    assert str(caught.value) == (
        "`loss` must take four tensors, with all else bound by functools.partial, got cdpo_loss: "
        "missing a required argument: 'label_smoothing'"
    )
    with pytest.raises(ValueError, match="'label_smoothing'$"):
        check_pair_loss(dpo_loss, beta=0.1, label_smoothing=0.1)
    with pytest.raises(ValueError) as caught:
        check_pair_loss(losses.cpo_loss, beta=0.1)
    assert str(caught.value) == (
        "`loss` must take pairs with a reference, got cpo_loss, which takes no reference: write "
        "train.without_reference(cpo_loss)"
    )

"""Each loop against the exact minimum of what it minimises."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dpo_mini.closed_form import expected_reward, kl, objective, optimal_logps, total_variation
from dpo_mini.logps import mean_over_tokens
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
    kl_k1,
    kl_k2,
    kl_k3,
    mean_advantages,
    unclipped_surrogate_loss,
)
from dpo_mini.rollout import enumerate_logps, enumerate_rewards
from dpo_mini.tasks import Task, four_answers, random_bandit, three_answers
from dpo_mini.train import (
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
)

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
    start = torch.tensor([[5.0, -3.0, 0.0, 2.0]]).double()
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


def test_the_learning_rate_warms_up_and_falls_to_zero():
    """Adam's step is the learning rate itself while the gradient keeps its sign and size."""

    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.height = nn.Parameter(torch.zeros((), dtype=torch.float64))
            self.seen = []

        def token_logps(self, prompts, completions):
            self.seen.append(self.height.item())
            return self.height.expand(len(prompts), 1)

    policy = Slope()
    one = torch.zeros(1, dtype=torch.int64)
    fit_sft(policy, one, one[:, None], **settings(steps=100, batch_size=1, learning_rate=0.1))
    rates = torch.tensor([*policy.seen, policy.height.item()]).diff() / 0.1
    cosine = [(1 + math.cos(math.pi * step / 100)) / 2 for step in range(100)]
    want = torch.tensor([min(1, (n + 1) / 20) * height for n, height in enumerate(cosine)])
    torch.testing.assert_close(rates, want, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("n_distinct", [2, 24])
def test_pairs_are_fitted_alike_however_they_are_read(n_distinct, generator):
    """As a tree, in forked rows, or as a model that scores each answer on its own."""

    class Alone(nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def token_logps(self, prompts, completions):
            return self.policy.token_logps(prompts, completions)

    shape = {"n_layers": 2, "n_heads": 2, "width": 8, "generator": generator}
    policy = TinyTransformer(3, 7, 5, end_token=None, **shape).double()
    rows = torch.arange(24) % n_distinct
    prompts = torch.randint(3, (24,), generator=generator)[rows]
    answers = torch.randint(7, (2, 24, 5), generator=generator)[:, rows]
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
    assert history["accuracy"][-1] == pytest.approx((wins * (gaps > 0)).sum().item() / 400)


# --- on-policy loops -------------------------------------------------------------------------


def true_score(task):
    return lambda prompts, completions: task.rewards[prompts, task.index(completions)]


def actor_critic(task):
    """A bandit's: the reference's logits, and a table of values that starts at 0."""
    values = torch.zeros(len(task.prompts), 1, dtype=torch.float64)
    return SeparateNetworks(TabularPolicy(task.ref_logps), TabularPolicy(values))


def ppo(task, both=None, score=None, **changes):
    both = both or actor_critic(task)
    options = settings(steps=120, batch_size=256, learning_rate=0.05, beta=0.5, value_weight=1.0)
    history = fit_ppo(
        both,
        TabularPolicy(task.ref_logps),
        task.prompts,
        score or true_score(task),
        **{**options, **changes},
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
    assert history["kl"][0] == 0
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
        return fit(
            both, reference or policy(), prompts, score or true_score(TASK), *rest, **options
        )

    return call


run_ppo, run_reinforce = on_policy(fit_ppo), on_policy(fit_reinforce)
run_online = on_policy(fit_online_preferences, DPO)
ON_POLICY = [run_ppo, run_reinforce, run_online]


SETTINGS_REFUSED = [
    ({"steps": 0}, "steps: got 0, takes a whole number >= 1"),
    ({"steps": 2.0}, "steps: got float, takes a whole number >= 1"),
    ({"batch_size": 0}, "batch_size: got 0, takes a whole number >= 1"),
    ({"batch_size": "4"}, "batch_size: got str, takes a whole number >= 1"),
    ({"learning_rate": 0.0}, "learning_rate: got 0.0, takes a finite number > 0"),
    ({"learning_rate": math.nan}, "learning_rate: got nan, takes a finite number > 0"),
    ({"generator": None}, "generator: got NoneType, takes a torch.Generator"),
    ({"generator": 0}, "generator: got int, takes a torch.Generator"),
]


@pytest.mark.parametrize(("changes", "want"), SETTINGS_REFUSED)
@pytest.mark.parametrize("fit", [sft, preferences, rewards, *ON_POLICY])
def test_bad_settings_are_refused_before_anything_runs(fit, changes, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        fit(**changes)
    assert str(caught.value) == want


NONE = ANSWERS[:0]
REFUSED = [
    (lambda: sft(ROWS[:0], NONE), "prompts: got shape [0], takes at least one row"),
    (lambda: sft(ROWS[:3]), "completions: got 4 rows, takes 3 like prompts"),
    (lambda: sft(completions=[[0]]), "completions: got list, takes a torch.Tensor"),
    (
        lambda: sft(completions=ANSWERS.float()),
        "`completions` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: sft(completions=ANSWERS[:, 0]),
        "completions: got shape [4], takes a non-empty [n, T]",
    ),
    (lambda: sft(ROWS + 1), "prompts: got 1, takes values in 0..0"),
    (lambda: sft(completions=ANSWERS + 1), "completions: got token 3, takes 0..2"),
    (lambda: preferences((ROWS[:0], NONE, NONE)), "prompts: got shape [0], takes at least one row"),
    (
        lambda: preferences((ROWS, ANSWERS)),
        "pairs: got 2 tensors, takes (prompts, chosen, rejected)",
    ),
    (lambda: preferences((ROWS, ANSWERS[:2], ANSWERS)), "chosen: got 2 rows, takes 4 like prompts"),
    (
        lambda: preferences((ROWS, ANSWERS, ANSWERS[:2])),
        "rejected: got 2 rows, takes 4 like prompts",
    ),
    (lambda: preferences((ROWS, ANSWERS, None)), "rejected: got NoneType, takes a torch.Tensor"),
    (
        lambda: preferences((ROWS, ANSWERS[:, 0], ANSWERS)),
        "chosen: got shape [4], takes a non-empty [n, T]",
    ),
    (
        lambda: preferences((ROWS, ANSWERS, ANSWERS.double())),
        "`rejected` must have dtype torch.int64 (.long()), got torch.float64",
    ),
    (lambda: preferences(loss=lambda *four: four[0] * math.nan), "loss: got nan at step 0"),
    (
        lambda: fit_table(lambda logps: logps.sum(-1), TASK.ref_logps),
        "loss: got shape [1], takes a scalar",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum() * math.nan, TASK.ref_logps),
        "loss: got nan, takes a finite value",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), TASK.ref_logps - math.inf),
        "start_logps: got -inf, takes finite values",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), TASK.ref_logps[0]),
        "`start_logps` must be [X, Y], one row per prompt, "
        "got shape [3]: for one prompt write start_logps[None]",
    ),
    (
        lambda: fit_table(lambda logps: logps.sum(), TASK.ref_logps, steps=0),
        "steps: got 0, takes a whole number >= 1",
    ),
    (
        lambda: population_loss(DPO, *[torch.zeros(2, 1)] * 3),
        "rewards: got 1 completion a prompt, takes >= 2",
    ),
    (
        lambda: population_loss(DPO, torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2, 3)),
        "rewards: got shape [2, 3], takes [2, 2] like logps",
    ),
    (
        lambda: population_loss(DPO, torch.zeros(2, 2) / 0, torch.zeros(2, 2), torch.zeros(2, 2)),
        "logps: got nan, takes finite values",
    ),
]


@pytest.mark.parametrize(("call", "want"), REFUSED, ids=[want for _, want in REFUSED])
def test_bad_input_is_refused(call, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == want


@pytest.mark.parametrize(
    ("score", "want"),
    [
        (lambda x, y: torch.full((len(y),), math.nan), "score: got nan, takes finite values"),
        (lambda x, y: torch.full((len(y),), math.inf), "score: got inf, takes finite values"),
        (lambda x, y: torch.zeros(len(y) - 1), "score: got {less} rewards, takes {n}, one a row"),
        (lambda x, y: torch.zeros(y.shape), "score: got shape [{n}, 1], takes a non-empty [B]"),
        (
            lambda x, y: x,
            "`score` must have a floating dtype (.double() makes one), got torch.int64",
        ),
        (lambda x, y: [0.0] * len(y), "score: got list, takes a floating torch.Tensor [B]"),
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
        ({"beta": 0.0}, "beta: got 0.0, takes a finite number > 0"),
        ({"beta": "adaptive"}, "beta: got str, takes a number"),
        ({"lam": 1.1}, "lam: got 1.1, takes a number in [0, 1]"),
        ({"lam": -0.1}, "lam: got -0.1, takes a number in [0, 1]"),
        ({"discount": 2.0}, "discount: got 2.0, takes a number in [0, 1]"),
        ({"n_epochs": 0}, "n_epochs: got 0, takes a whole number >= 1"),
        ({"n_minibatches": 0}, "n_minibatches: got 0, takes a whole number >= 1"),
        ({"n_minibatches": 5}, "n_minibatches: got 5, takes at most batch_size = 4"),
        ({"value_weight": -1.0}, "value_weight: got -1.0, takes a number in [0.0, inf)"),
        ({"entropy_weight": math.inf}, "entropy_weight: got inf, takes a number in [0.0, inf)"),
        (
            {"surrogate": partial(clipped_surrogate_loss, clip_eps=-0.2)},
            "clip_eps: got -0.2, takes a finite number > 0",
        ),
        (
            {"value_error": partial(clipped_value_loss, clip_eps=0.0)},
            "clip_eps: got 0.0, takes a finite number > 0",
        ),
        ({"normalise": lambda a, mask: a / 0}, "advantages: got nan, takes finite values"),
        ({"prompts": TASK.prompts[:0]}, "prompts: got shape [0], takes a non-empty [n]"),
        ({"prompts": TASK.prompts + 1}, "prompts: got 1, takes values in 0..0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_settings_of_ppo_are_refused(changes, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        run_ppo(**changes)
    assert str(caught.value) == want


def test_bad_settings_of_reinforce_are_refused():
    for changes, want in (
        ({"beta": -1.0}, "beta: got -1.0, takes a finite number > 0"),
        ({"n_samples": 0}, "n_samples: got 0, takes a whole number >= 1"),
        ({"n_samples": 1}, "rewards: got 1 sample a row, takes >= 2"),
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
        with pytest.raises(ValueError, match="reference: got weights that it shares with the pol"):
            call(both, reference)


def test_token_rewards_refuse():
    two, mask = torch.zeros(2), torch.ones(2, 3).bool()
    for arguments, want in (
        ((torch.zeros(3), torch.zeros(2, 3), mask), "penalties: got 2 rows, takes 3 like scores"),
        ((two, torch.zeros(2, 2), mask), "completion_mask: got shape [2, 3], takes [2, 2]"),
        ((two / 0, torch.zeros(2, 3), mask), "scores: got nan, takes finite values"),
        ((two, torch.zeros(2), mask), "penalties: got shape [2], takes a non-empty [B, T]"),
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
            "reference: got weights that it shares with the policy, takes a copy (copy.deepcopy)"
        )


def test_answers_of_different_widths_are_refused():
    policy, reference = Spy(torch.zeros(1, 4)), Spy(torch.zeros(1, 4))
    wide = torch.tensor([[1, -1]])
    pairs = (torch.tensor([0]), torch.tensor([[0]]), wide)
    with pytest.raises(ValueError, match=r"rejected: got shape \[1, 2\], takes \[1, 1\] like"):
        fit_preferences(policy, reference, pairs, DPO, **settings())

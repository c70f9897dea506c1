"""Each loop against the exact minimum of what it minimises."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

from dpo_mini.closed_form import kl, objective, optimal_logps, total_variation
from dpo_mini.logps import mean_over_tokens
from dpo_mini.losses import (
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    ipo_mean_loss,
    rdpo_loss,
)
from dpo_mini.policies import TabularPolicy, TinyTransformer
from dpo_mini.tasks import Task, four_answers, random_bandit, three_answers
from dpo_mini.train import fit_preferences, fit_sft, fit_table, population_loss

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
@pytest.mark.parametrize("fit", [sft, preferences])
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
        "completions: got dtype torch.float32, takes torch.int64",
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
        "rejected: got dtype torch.float64, takes torch.int64",
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
        "start_logps: got shape [3], takes a non-empty [X, Y]",
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

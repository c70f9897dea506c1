"""The prefix tree against scoring every completion on its own, and samples against the tree."""

import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dpo_mini.closed_form import implied_rewards, log_partition, optimal_logps
from dpo_mini.logps import PAD
from dpo_mini.policies import (
    Policy,
    RewardModel,
    ScalarTransformer,
    SeparateNetworks,
    SharedTrunk,
    TabularPolicy,
    TinyTransformer,
)
from dpo_mini.policy_gradient import entropy
from dpo_mini.rollout import (
    enumerate_logps,
    enumerate_rewards,
    exact_gradient,
    prefix_tree,
    read_actor_critic,
    sample,
    scoring,
    shared_prefix_rewards,
    shared_prefix_token_logps,
    soft_values,
    token_logps,
)
from dpo_mini.rollout.kv_cache import begin, extend, lengthen
from dpo_mini.rollout.trees import of_rows
from dpo_mini.tasks import Task, enumerate_completions, four_answers

TREES = [
    # X, V, T, end token
    (1, 4, 4, 0),
    (3, 5, 4, 2),
    (2, 6, 3, 5),
    (2, 3, 5, None),
    (2, 7, 2, 3),
    (4, 9, 1, 0),
    (2, 5, 1, None),
    (1, 1, 3, None),
    (2, 2, 6, 1),
]


def toy(n_prompts, vocab_size, max_tokens, end_token):
    """A task without a reward worth having: only its tree matters here."""
    n_completions = len(enumerate_completions(vocab_size, max_tokens, end_token))
    rewards = torch.zeros(n_prompts, n_completions, dtype=torch.float64)
    prompts = tuple(f"prompt {x}" for x in range(n_prompts))
    words = tuple(f"word {v}" for v in range(vocab_size))
    return Task(prompts, words, max_tokens, end_token, rewards)


def transformer(task, generator, dtype=torch.float64, width=16, read=None, longer=0):
    """A policy with large random weights: its completions differ widely in probability.

    `read` are the tokens of each prompt, `longer` is how many tokens more than the task's it reads.
    """
    policy = TinyTransformer(
        *(len(task.prompts), task.vocab_size, task.max_tokens + longer),
        end_token=task.end_token,
        prompt_tokens=read,
        generator=generator,
        **{"n_layers": 2, "n_heads": 4, "width": width},
    ).to(dtype)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=dtype, generator=generator)
    return policy


def every_row(task):
    """Prompts and completions `[X * Y]`: all that a table lists, one row each."""
    n_prompts, n_completions = task.rewards.shape
    prompts = task.prompts.repeat_interleave(n_completions)
    return prompts, task.completions.repeat(n_prompts, 1)


def gradient(policy, scalar):
    weights = list(policy.parameters())
    # With one token to read, positions after the first have no part in the result.
    grads = torch.autograd.grad(scalar, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def distinct_prefixes(prompts, completions):
    """What has to be read to score these rows: each prompt with each prefix that goes on."""
    return {
        (prompt, *tokens[:t])
        for prompt, row in zip(prompts.tolist(), completions.tolist(), strict=True)
        for tokens in [[token for token in row if token != PAD]]
        for t in range(len(tokens))
    }


def count_reads(policy):
    """A list to which each call of the last layer adds how many tokens went through it."""
    reads = []
    policy.blocks[-1].c_fc.register_forward_hook(lambda _, inputs, out: reads.append(out[..., 0]))
    return reads


# --- enumerate_logps -------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
def test_tree_agrees_with_scoring_each_completion(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    prompts, completions = every_row(task)
    with torch.no_grad():
        want = policy.logps(prompts, completions).view_as(task.rewards)
        for n_parents in (1, 3, 64):
            got = enumerate_logps(policy, task, n_parents=n_parents)
            assert (got - want).abs().max() < 1e-10
        assert (enumerate_logps(policy, task) - want).abs().max() < 1e-10


def test_progress_sees_every_prompt_and_changes_nothing(generator):
    task, seen = toy(3, 5, 4, 2), []

    def progress(steps):
        for step in steps:
            yield step
            seen.append(step)

    policy = transformer(task, generator)
    model = RewardModel.for_task(task, n_layers=1, generator=generator)
    for enumerate_all, read in ((enumerate_logps, policy), (enumerate_rewards, model)):
        assert torch.equal(enumerate_all(read, task, progress=progress), enumerate_all(read, task))
    assert seen == [0, 1, 2] * 2


@pytest.mark.parametrize("tree", TREES)
def test_probabilities_sum_to_one(tree, generator):
    task = toy(*tree)
    table = enumerate_logps(transformer(task, generator), task)
    assert table.shape == task.rewards.shape
    assert (table.exp().sum(-1) - 1).abs().max() < 1e-12


def test_probabilities_sum_to_one_over_177156_completions(generator):
    task = toy(1, 12, 5, 0)
    with torch.no_grad():
        table = enumerate_logps(transformer(task, generator), task)
    assert table.shape == (1, 177_156)
    assert abs(table.exp().sum() - 1) < 1e-12


@pytest.mark.parametrize("tree", [(3, 5, 4, 2), (3, 4, 5, None)])
def test_float32(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator, torch.float32)
    with torch.no_grad():
        table = enumerate_logps(policy, task)
        exact = enumerate_logps(policy.double(), task)
    assert table.dtype == torch.float32
    assert (table - exact).abs().max() < 1e-4
    assert (table.exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("n_parents", [1, 3, 64])
@pytest.mark.parametrize("tree", TREES)
def test_gradient_is_that_of_separate_scoring(tree, n_parents, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    weights = torch.randn(task.rewards.shape, dtype=torch.float64, generator=generator)
    weights /= weights.numel() ** 0.5
    prompts, completions = every_row(task)
    separate = policy.logps(prompts, completions).view_as(weights)
    want = gradient(policy, (weights * separate).sum())
    got = gradient(policy, (weights * enumerate_logps(policy, task, n_parents=n_parents)).sum())
    assert want.abs().max() > 1e-3 or task.vocab_size == 1
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("tree", TREES)
def test_enumerating_reads_each_distinct_prefix_once(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    reads = count_reads(policy)
    table = enumerate_logps(policy, task, n_parents=3)
    n_distinct = len(distinct_prefixes(*every_row(task)))
    assert sum(outputs.numel() for outputs in reads) == n_distinct
    if task.vocab_size > 1:  # different prefixes, different activations: none is read twice
        assert len(torch.cat([outputs.flatten() for outputs in reads]).unique()) == n_distinct
    table.sum().backward()  # which reads what it did not keep a second time, and no more
    assert sum(outputs.numel() for outputs in reads) <= 2 * n_distinct


def test_two_threads_give_the_table_of_one(generator):
    task = toy(1, 12, 4, 0)
    policy = transformer(task, generator, width=32)
    weights = torch.randn(task.rewards.shape, dtype=torch.float64, generator=generator)

    def compute(n_threads):
        torch.set_num_threads(n_threads)
        table = enumerate_logps(policy, task)
        return table.detach(), gradient(policy, (table.exp() * weights).sum())

    before = torch.get_num_threads()
    try:
        one, two = compute(1), compute(2)
    finally:
        torch.set_num_threads(before)
    assert_close(two, one, rtol=0, atol=1e-12)


def test_bandit_is_enumerated_like_a_text(generator):
    task = toy(3, 4, 1, None)
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    policy = TabularPolicy(logits)
    table = enumerate_logps(policy, task)
    assert_close(table, logits - logits.logsumexp(1, keepdim=True), rtol=1e-14, atol=1e-14)
    assert table.requires_grad


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 6, 3, 0), "`policy` must have vocab_size = 6 like the task, got 5"),
        ((2, 5, 4, 0), "`policy` must have max_tokens = 4 like the task, got 3"),
        ((2, 5, 3, 1), "`policy` must have end_token = 1 like the task, got 0"),
        ((2, 5, 3, None), "`policy` must have end_token = None like the task, got 0"),
        ((3, 5, 3, 0), "`policy` must have n_prompts = 3 like the task, got 2"),
    ],
)
def test_enumerating_refuses_another_task(sizes, message, generator):
    policy = transformer(toy(2, 5, 3, 0), generator)
    with pytest.raises(ValueError, match=f"^{message}"):
        enumerate_logps(policy, toy(*sizes))


@pytest.mark.parametrize(
    ("n_parents", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)]
)
def test_enumerating_refuses_chunks_of_nothing(n_parents, error, generator):
    task = toy(2, 5, 3, 0)
    with pytest.raises(error, match="^`n_parents` must be a whole number >= 1, got"):
        enumerate_logps(transformer(task, generator), task, n_parents=n_parents)
    with pytest.raises(error, match="^`n_parents` must be a whole number >= 1, got"):
        enumerate_rewards(reward_model(task, generator), task, n_parents=n_parents)


# --- soft values -----------------------------------------------------------------------------


def by_recursion(task, reference, rewards, beta):
    """V of every prefix, from the last token backwards: a dict of lists of tokens and PADs."""
    values, chances = {}, {}  # E[e^(r / beta) | prefix] in logs, and the reference's own chance
    for row, logp, reward in zip(task.completions.tolist(), reference, rewards, strict=True):
        values[tuple(row)] = reward
        for depth in range(task.max_tokens + 1):
            chances[tuple(row[:depth])] = chances.get(tuple(row[:depth]), 0.0) + math.exp(logp)
    for depth in range(task.max_tokens, 0, -1):
        raised = {}
        for prefix in [one for one in values if len(one) == depth]:
            share = chances[prefix] / chances[prefix[:-1]]
            raised[prefix[:-1]] = raised.get(prefix[:-1], 0.0) + share * math.exp(
                values[prefix] / beta
            )
        values.update({prefix: beta * math.log(total) for prefix, total in raised.items()})
    return values, chances


@pytest.mark.parametrize("end_token", [None, 0, 1, 2])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_soft_values_are_those_of_backward_recursion(end_token, beta, generator):
    n_columns = len(enumerate_completions(3, 3, end_token))
    rewards = torch.randn(2, n_columns, dtype=torch.float64, generator=generator)
    logits = torch.randn(2, n_columns, dtype=torch.float64, generator=generator)
    task, ref_logps = (
        Task(("x", "y"), ("a", "b", "c"), 3, end_token, rewards),
        logits.log_softmax(-1),
    )
    values, steps = soft_values(task, ref_logps, rewards, beta)
    assert values.shape == (2, n_columns, 4)
    assert steps.shape == (2, n_columns, 3)
    for x in range(2):
        want, chances = by_recursion(task, ref_logps[x].tolist(), rewards[x].tolist(), beta)
        for y, row in enumerate(task.completions.tolist()):
            along = [want[tuple(row[:depth])] for depth in range(4)]
            assert values[x, y].tolist() == pytest.approx(along, abs=1e-12)
            for depth, token in enumerate(row):
                share = chances[tuple(row[: depth + 1])] / chances[tuple(row[:depth])]
                want_step = math.log(share) + (along[depth + 1] - along[depth]) / beta
                assert steps[x, y, depth].item() == pytest.approx(want_step, abs=1e-12)
                assert token != PAD or steps[x, y, depth] == 0
    # The product of the token policies is the optimum, and the credits sum to implied rewards.
    best = optimal_logps(ref_logps, rewards, beta)
    assert_close(steps.sum(-1), best, atol=1e-12, rtol=0)
    implied = implied_rewards(best, ref_logps, beta)
    assert_close(values.diff().sum(-1), implied, atol=1e-12, rtol=0)
    log_z = log_partition(ref_logps, rewards, beta)
    assert_close(values[..., 0], beta * log_z[:, None].expand_as(implied), atol=1e-12, rtol=0)


def test_soft_values_of_a_bandit_and_of_a_tiny_beta():
    task = four_answers()
    values, steps = soft_values(task, task.ref_logps, task.rewards, 0.5)
    assert_close(steps[..., 0], optimal_logps(task.ref_logps, task.rewards, 0.5))
    assert_close(values[..., 1], task.rewards)
    values, steps = soft_values(task, task.ref_logps, task.rewards, 1e-4)
    assert values[0, 0, 0].item() == pytest.approx(1.0, abs=1e-3)  # the best reward
    assert torch.isfinite(steps).all()
    lowered, same_steps = soft_values(task, task.ref_logps, task.rewards - 10, 1e-4)
    assert_close(lowered, values - 10)  # the exponents are all far below 0
    assert_close(same_steps, steps)
    rewards = task.rewards.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: soft_values(task, task.ref_logps, r, 0.5), rewards)


def test_soft_values_refuse():
    task = four_answers()
    given = {"task": task, "ref_logps": task.ref_logps, "rewards": task.rewards, "beta": 0.5}
    impossible = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=task.rewards.dtype).log()
    for bad, want in (
        ({"beta": 0.0}, "`beta` must be a finite number > 0, got 0.0"),
        ({"ref_logps": impossible}, "`ref_logps` must be finite, got -inf"),
        ({"rewards": task.rewards[:, :2]}, "`rewards` must have shape [1, 4] like `ref_logps`"),
        ({"rewards": task.rewards / 0}, "`rewards` must be finite, got"),
        ({"ref_logps": task.ref_logps[0]}, "`ref_logps` must be [X, Y], one row per prompt"),
        (
            {"ref_logps": task.ref_logps[:, :2], "rewards": task.rewards[:, :2]},
            "`ref_logps` must have shape [1, 4] like the task, got [1, 2]",
        ),
        ({"ref_logps": 2 * task.ref_logps}, "`ref_logps` must have rows whose probabilities sum"),
    ):
        with pytest.raises(ValueError) as caught:
            soft_values(**{**given, **bad})
        assert str(caught.value).startswith(want)


# --- exact_gradient --------------------------------------------------------------------------


def random_sum(task, generator):
    """A sum over completions that is not linear in their log-probabilities: in parts, and whole."""
    weights = torch.randn(task.rewards.shape, dtype=torch.float64, generator=generator)

    def loss(x, logps, columns):
        return (logps.exp() * (weights[x, columns] - logps)).sum()

    return loss, lambda table: (table.exp() * (weights - table)).sum()


def collected(policy):
    """The gradients that the weights hold, in one row; where they hold none, zeros."""
    weights = policy.parameters()
    return torch.cat([(0 * w if w.grad is None else w.grad).detach().flatten() for w in weights])


@pytest.mark.parametrize("n_parents", [1, 3, 64])
@pytest.mark.parametrize("tree", [*TREES, (3, 4, 2, None)])
def test_an_exact_gradient_is_that_of_the_whole_table(tree, n_parents, generator):
    task = toy(*tree)
    logits = torch.randn(task.rewards.shape, dtype=torch.float64, generator=generator)
    bandits = [TabularPolicy(logits)] if tree[2:] == (1, None) else []
    for policy in (transformer(task, generator), *bandits):
        loss, of_table = random_sum(task, generator)
        whole = of_table(enumerate_logps(policy, task))
        total = exact_gradient(policy, task, loss, n_parents=n_parents)
        assert abs(total - whole) < 1e-12
        assert (collected(policy) - gradient(policy, whole)).abs().max() < 1e-12
        assert collected(policy).abs().max() > 1e-3 or task.vocab_size == 1
        assert not total.requires_grad


def test_an_exact_gradient_is_added_to_what_is_there(generator):
    task = toy(2, 4, 3, 1)
    policy = transformer(task, generator)
    loss, _ = random_sum(task, generator)
    exact_gradient(policy, task, loss)
    once = collected(policy)
    policy.ln_f.bias.grad += 5
    exact_gradient(policy, task, loss)
    policy.ln_f.bias.grad -= 5
    assert_close(collected(policy), 2 * once, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tree", TREES)
def test_each_completion_has_one_part_in_the_sum(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    table = enumerate_logps(policy, task).detach()
    seen = torch.zeros(task.rewards.shape, dtype=torch.int64)

    def loss(x, logps, columns):
        seen[x] += columns.bincount(minlength=seen.shape[1])
        assert_close(logps.detach(), table[x, columns], rtol=0, atol=1e-12)
        return logps.sum()

    exact_gradient(policy, task, loss, n_parents=3)
    assert (seen == 1).all()


@pytest.mark.parametrize("kept", ["wte.weight", "blocks.0.attn.c_attn.weight", "ln_f.bias"])
def test_an_exact_gradient_passes_over_frozen_weights(kept, generator):
    task = toy(2, 4, 4, 1)
    policy = transformer(task, generator)
    for name, weight in policy.named_parameters():
        weight.requires_grad_(name == kept)
    loss, of_table = random_sum(task, generator)
    exact_gradient(policy, task, loss, n_parents=3)
    weight = policy.get_parameter(kept)
    (want,) = torch.autograd.grad(of_table(enumerate_logps(policy, task)), weight)
    assert_close(weight.grad, want, rtol=0, atol=1e-12)
    assert [name for name, weight in policy.named_parameters() if weight.grad is not None] == [kept]


class Kept:
    """Counts the numbers that graphs keep for their backward passes, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept[0])
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        kept = Holder([tensor])
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self.forget, tensor.numel())
        return kept

    def forget(self, n_numbers):
        self.now -= n_numbers


class Holder(list):
    """A list that can be seen to go."""


def test_an_exact_gradient_keeps_far_less_than_the_whole_table(generator):
    task = toy(1, 8, 5, None)
    policy = transformer(task, generator)
    loss, of_table = random_sum(task, generator)
    with Kept() as whole:
        of_table(enumerate_logps(policy, task)).backward()
    with Kept() as parts:
        exact_gradient(policy, task, loss, n_parents=8)
    assert whole.now == parts.now == 0
    assert whole.most > 5 * parts.most


def test_an_exact_gradient_reads_each_distinct_prefix_once(generator):
    task = toy(3, 5, 4, 2)
    policy = transformer(task, generator)
    reads = count_reads(policy)
    exact_gradient(policy, task, random_sum(task, generator)[0], n_parents=3)
    n_distinct = len(distinct_prefixes(*every_row(task)))
    assert sum(outputs.numel() for outputs in reads) == n_distinct


def test_an_exact_gradient_shows_its_progress(generator):
    task, seen = toy(3, 4, 2, None), []
    loss, _ = random_sum(task, generator)
    policy = transformer(task, generator)
    exact_gradient(policy, task, loss, progress=lambda steps: seen.append(steps) or steps)
    assert seen == [range(3)]


@pytest.mark.parametrize("tree", [(2, 5, 3, 0), (2, 5, 3, None), (2, 5, 1, None)])
def test_an_exact_gradient_is_refused_before_anything_is_added(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    for loss, shape in (
        (lambda x, logps, columns: logps, r"\[\d+\]"),
        (lambda x, logps, columns: logps.sum()[None], r"\[1\]"),
    ):
        with pytest.raises(ValueError, match=f"^`loss` must return a scalar, got shape {shape}$"):
            exact_gradient(policy, task, loss)
    with pytest.raises(ValueError, match="^`policy` must have vocab_size = 6 like the task, got 5"):
        exact_gradient(policy, toy(2, 6, *tree[2:]), lambda x, logps, columns: logps.sum())
    with pytest.raises(ValueError, match="^`n_parents` must be .*, got 0"):
        exact_gradient(policy, task, lambda x, logps, columns: logps.sum(), n_parents=0)
    assert all(weight.grad is None for weight in policy.parameters())
    with pytest.raises(ValueError, match="^`policy` must have a weight that requires a gradient"):
        exact_gradient(policy.requires_grad_(False), task, lambda x, logps, columns: logps.sum())


# --- sample ----------------------------------------------------------------------------------


def chi_squared_p_value(counts, probs):
    """P(a statistic at least this large | the counts are draws from `probs`).

    Completions with fewer than 5 expected draws are counted together.
    """
    expected = probs * counts.sum()
    rare = expected < 5
    pooled = rare.any()
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]] if pooled else [counts])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]] if pooled else [expected])
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(observed) - 1, dtype=torch.float64)
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


@pytest.mark.parametrize("tree", [(2, 4, 3, 0), (2, 5, 3, 2), (2, 4, 3, None), (2, 9, 1, None)])
def test_frequencies_match_enumeration(tree, generator):
    # Two prompts and four trees: at 0.1 % each, a right sampler and an unlucky seed meet in 0.8 %.
    task = toy(*tree)
    policy = transformer(task, generator)
    n_draws = 40_000
    draws = sample(policy, task.prompts.repeat(n_draws), generator=generator)
    columns = task.index(draws).view(n_draws, -1)
    with torch.no_grad():
        probs = enumerate_logps(policy, task).exp()
    for x in range(len(task.prompts)):
        counts = columns[:, x].bincount(minlength=probs.shape[1]).double()
        assert chi_squared_p_value(counts, probs[x]) > 1e-3
        # The test has the power to see a small bias: a tenth of the mass spread evenly.
        biased = 0.9 * probs[x] + 0.1 / len(probs[x])
        assert chi_squared_p_value(counts, biased) < 1e-3


def test_bandit_frequencies_match_its_table(generator):
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64).log()
    draws = sample(TabularPolicy(logits), torch.tensor([0, 1]).repeat(20_000), generator=generator)
    assert draws.shape == (40_000, 1)
    for x in range(2):
        counts = draws[x::2, 0].bincount(minlength=3).double()
        assert chi_squared_p_value(counts, logits[x].exp()) > 1e-3


@pytest.mark.parametrize("tree", TREES)
def test_samples_are_completions_of_the_task(tree, generator):
    task = toy(*tree)
    prompts = torch.randint(len(task.prompts), (300,), generator=generator)
    draws = sample(transformer(task, generator), prompts, generator=generator)
    assert draws.shape == (300, task.max_tokens)
    assert draws.dtype == torch.int64
    assert torch.equal(task.completions[task.index(draws)], draws)


def test_samples_belong_to_their_prompts(generator):
    logits = torch.full((3, 3), -1e3).fill_diagonal_(0.0)  # prompt x answers x
    prompts = torch.tensor([2, 0, 1, 1, 0, 2])
    draws = sample(TabularPolicy(logits), prompts, generator=generator)
    assert torch.equal(draws[:, 0], prompts)


def test_sampling_reads_each_distinct_prefix_once(generator):
    task = toy(3, 5, 4, 2)
    policy = transformer(task, generator)
    reads = count_reads(policy)
    prompts = torch.randint(3, (50,), generator=generator)
    draws = sample(policy, prompts, generator=generator)
    n_distinct = len(distinct_prefixes(prompts, draws))
    assert sum(outputs.numel() for outputs in reads) == n_distinct < (draws != PAD).sum()


@pytest.mark.parametrize(("n_prompts", "n_rows"), [(2, 300), (40, 40), (40, 20)])
@pytest.mark.parametrize("end_token", [None, 3])
def test_samples_are_those_drawn_token_by_token(n_prompts, n_rows, end_token, generator):
    """Rows that begin alike, that all differ, and that come to differ: each as if read alone."""
    policy = transformer(toy(n_prompts, 7, 4, end_token), generator)
    prompts = torch.randperm(n_prompts, generator=generator).repeat(n_rows)[:n_rows]
    got = sample(policy, prompts, generator=torch.Generator().manual_seed(9))
    assert torch.equal(got, drawn_by_forward(policy, prompts, torch.Generator().manual_seed(9)))


def drawn_by_forward(policy, prompts, generator):
    """What `sample` should draw: one row at a time, which reads all of its tokens before each."""
    drawn = torch.full((len(prompts), policy.max_tokens), PAD)
    shape = (policy.max_tokens, len(prompts))
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
    for row, prompt in enumerate(prompts):
        for step in range(policy.max_tokens):
            text = torch.cat([prompt[None], drawn[row, :step]])[None]
            probs = policy(text)[0, -1].softmax(-1).detach().numpy()
            token = int(np.searchsorted(np.cumsum(probs), uniform[step, row], side="right"))
            drawn[row, step] = token
            if token == policy.end_token:
                break
    return drawn


def test_a_completion_depends_on_its_own_numbers_and_not_on_the_other_rows(generator):
    policy = transformer(toy(5, 7, 4, 3), generator)
    one = torch.arange(5).repeat(20)
    other = torch.where(torch.arange(100) < 50, one, (one + 2) % 5)
    draws = [
        sample(policy, rows, generator=torch.Generator().manual_seed(3)) for rows in (one, other)
    ]
    assert torch.equal(draws[0][:50], draws[1][:50])
    assert not torch.equal(draws[0][50:], draws[1][50:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1.0, 2)])
def test_no_number_draws_a_token_of_probability_0(dtype, uniform, token, monkeypatch, generator):
    """At both ends of [0, 1): also where rounding makes 1 of the largest number below it."""
    logits = torch.tensor([[-1e4, 0.1, 0.7, -1e4]], dtype=dtype)

    def rand(*shape, dtype, **where):
        return torch.full(shape, uniform, dtype=dtype)

    monkeypatch.setattr(torch, "rand", rand)
    draws = sample(TabularPolicy(logits), torch.zeros(3, dtype=torch.int64), generator=generator)
    assert draws.flatten().tolist() == [token] * 3


def test_the_same_seed_gives_the_same_samples_and_global_state_stays(generator):
    task = toy(2, 5, 4, 2)
    policy = transformer(task, generator)
    prompts = task.prompts.repeat(50)

    def draw(seed):
        return sample(policy, prompts, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(5)
    enumerate_logps(policy, task).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(draw(5), first)
    assert not torch.equal(draw(6), first)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": torch.tensor([0, 2])}, ValueError, r"`prompts` must be in 0\.\.1, got 2"),
        ({"prompts": torch.tensor([-1])}, ValueError, r"`prompts` must be in 0\.\.1, got -1"),
        ({"prompts": torch.tensor([0.0])}, ValueError, "`prompts` must have dtype torch.int64"),
        (
            {"prompts": torch.zeros(0, dtype=torch.int64)},
            ValueError,
            r"`prompts` must be a non-empty \[B\], got shape \[0\]$",
        ),
        ({"prompts": [0]}, TypeError, "`prompts` must be .*, got list"),
        ({"generator": None}, TypeError, "`generator` must be .*, got NoneType"),
        ({"generator": 7}, TypeError, "`generator` must be .*, got int"),
    ],
)
def test_sampling_refuses(change, error, message, generator):
    policy = transformer(toy(2, 5, 3, 0), generator)
    with pytest.raises(error, match=f"^{message}"):
        sample(policy, **{"prompts": torch.tensor([0]), "generator": generator, **change})


# --- shared_prefix_token_logps ---------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
def test_shared_prefixes_agree_with_separate_scoring(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    prompts, completions = every_row(task)
    rows = torch.randint(len(prompts), (60,), generator=generator)  # in no order, with repeats
    prompts, completions = prompts[rows], completions[rows]
    weights = torch.randn(completions.shape, dtype=torch.float64, generator=generator)
    reads = count_reads(policy)
    got = shared_prefix_token_logps(policy, prompts, completions)
    n_distinct = len(distinct_prefixes(prompts, completions))
    assert sum(outputs.numel() for outputs in reads) == n_distinct
    want = policy.token_logps(prompts, completions)
    assert got.shape == want.shape
    assert (got - want).abs().max() < 1e-10
    assert (got[completions == PAD] == 0).all()
    difference = partial(gradient, policy)
    error = difference((weights * got).sum()) - difference((weights * want).sum())
    assert error.abs().max() < 1e-10


def test_shared_prefixes_of_a_bandit(generator):
    policy = TabularPolicy(torch.randn(3, 4, dtype=torch.float64, generator=generator))
    prompts, completions = torch.tensor([2, 0, 2]), torch.tensor([[1], [3], [0]])
    got = shared_prefix_token_logps(policy, prompts, completions)
    assert_close(got, policy.token_logps(prompts, completions), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([2], [[1, 0, PAD]], r"`prompts` must be in 0\.\.1, got 2"),
        ([0], [[5, 0, PAD]], r"`completions` must have tokens in 0\.\.4, got 5"),
        ([0], [[1, 0, 2]], "`completions` must .* after the end token 0, got a token"),
        ([0], [[PAD, PAD, PAD]], "`completions` must have at least one token"),
        ([0, 1], [[1, 0, PAD]], "`completions` must have 2 rows like `prompts`, got 1"),
        ([0], [[1, 2, 3, 4]], "`completions` must have at most 3 tokens, got 4"),
    ],
)
def test_shared_prefixes_refuse_what_scoring_refuses(prompts, completions, message, generator):
    policy = transformer(toy(2, 5, 3, 0), generator)
    with pytest.raises(ValueError, match=f"^{message}"):
        shared_prefix_token_logps(policy, torch.tensor(prompts), torch.tensor(completions))


# --- token_logps: rows or a tree ----------------------------------------------------------------


def random_answers(task, n, n_shared, n_answers, generator):
    """Prompts and some answers to each, whose first `n_shared` tokens are the same in all rows."""
    prompts = torch.randint(len(task.prompts), (n,), generator=generator)
    rows = torch.randint(len(task.completions), (n_answers, n), generator=generator)
    answers = task.completions[rows].clone()
    answers[:, :, :n_shared] = answers[0, 0, :n_shared]
    if task.end_token is not None:
        ended = (answers == task.end_token) | (answers == PAD)
        after = (ended.long().cumsum(2) - ended.long()) > 0
        answers = answers.masked_fill(after, PAD)
    return prompts, list(answers)


@pytest.mark.parametrize("n_answers", [1, 2, 3])
@pytest.mark.parametrize("n_shared", [0, 2, 9])
@pytest.mark.parametrize("tree", TREES)
def test_rows_and_trees_agree_with_separate_scoring(
    tree, n_shared, n_answers, generator, monkeypatch
):
    task = toy(*tree)
    policy = transformer(task, generator)
    prompts, answers = random_answers(task, 30, n_shared, n_answers, generator)
    together = torch.cat(answers)
    want = policy.token_logps(prompts.repeat(n_answers), together)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    slope = gradient(policy, (weights * want).mean())
    for rows in (True, False):
        monkeypatch.setattr(scoring, "_rows_are_faster", lambda *_, rows=rows: rows)
        reads = count_reads(policy)
        got = token_logps(policy, prompts, *answers)
        n_read = sum(outputs.numel() for outputs in reads)
        in_rows = 30 * (1 + n_answers * (task.max_tokens - 1))
        distinct = len(distinct_prefixes(prompts.repeat(n_answers), together))
        assert n_read == (in_rows if rows else distinct)
        assert (got[together == PAD] == 0).all()
        assert (got - want).abs().max() < 1e-12
        assert (gradient(policy, (weights * got).mean()) - slope).abs().max() < 1e-12


def test_an_answer_does_not_see_the_other(generator, monkeypatch):
    monkeypatch.setattr(scoring, "_rows_are_faster", lambda *_: True)
    task = toy(3, 5, 4, None)
    policy = transformer(task, generator)
    prompts, (chosen, rejected) = random_answers(task, 8, 1, 2, generator)
    before = token_logps(policy, prompts, chosen, rejected)
    changed = chosen.clone()
    changed[:, 1:] = (changed[:, 1:] + 1) % 5
    after = token_logps(policy, prompts, changed, rejected)
    assert_close(after[8:], before[8:], rtol=0, atol=1e-13)
    assert (after[:8, 1:] != before[:8, 1:]).all()


def test_a_bandit_is_scored_from_its_table(generator):
    policy = TabularPolicy(torch.randn(3, 4, dtype=torch.float64, generator=generator))
    prompts, chosen, rejected = torch.tensor([2, 0]), torch.tensor([[1], [3]]), torch.ones(2, 1)
    got = token_logps(policy, prompts, chosen, rejected.long())
    logps = policy.logits.log_softmax(-1)
    want = torch.stack([logps[2, 1], logps[0, 3], logps[2, 1], logps[0, 1]])[:, None]
    assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n_read", [1, 12])
def test_pairs_that_begin_alike_are_read_as_a_tree_and_others_in_rows(n_read, generator):
    read = torch.randint(9, (3, n_read), generator=generator)
    policy = TinyTransformer(3, 9, 16, end_token=None, prompt_tokens=read, generator=generator)
    prompts = torch.randint(3, (40,), generator=generator)
    reads = count_reads(policy)
    for n_shared, rows in ((0, True), (12, False)):
        answers = torch.randint(9, (2, 40, 16), generator=generator)
        answers[:, :, :n_shared] = answers[0, 0, :n_shared]
        reads.clear()
        token_logps(policy, prompts, *answers)
        n_in_rows = 40 * (n_read + 2 * 15)
        n_distinct = len(distinct_prefixes(prompts.repeat(2), answers.flatten(0, 1)))
        want = n_in_rows if rows else n_distinct + 3 * (n_read - 1)
        assert sum(outputs.numel() for outputs in reads) == want


@pytest.mark.parametrize(
    # Each of `n` rows for each prompt reads P + 1 tokens. A tree reads the P tokens of each prompt
    # and the one token that follows, in P + 1 steps, so each node costs 0.8 + 0.1 (P + 1) tokens.
    ("n", "n_read", "rows"),
    [
        (1, 3, True),  # 4 tokens; 4 nodes, which cost 1.2 each
        (2, 10, False),  # 22 tokens; 11 nodes cost 11 * 1.9 = 20.9
        (2, 12, True),  # 26 tokens; 13 nodes cost 13 * 2.1 = 27.3
        (3, 12, False),  # 39 tokens
        (3, 20, False),  # 63 tokens; 21 nodes cost 21 * 2.9 = 60.9
        (3, 22, True),  # 69 tokens; 23 nodes cost 23 * 3.1 = 71.3
    ],
)
@pytest.mark.parametrize("n_prompts", [1, 2, 5])
def test_long_prompts_cost_tokens_nodes_and_steps(n_prompts, n, n_read, rows, generator):
    shape = {"n_layers": 1, "n_heads": 1, "width": 4}
    read = torch.randint(3, (n_prompts, n_read), generator=generator)
    policy = TinyTransformer(
        n_prompts, 3, 2, end_token=None, prompt_tokens=read, generator=generator, **shape
    )
    reads = count_reads(policy)
    prompts = torch.arange(n_prompts).repeat(n)
    token_logps(policy, prompts, torch.tensor([[1, 2]]).expand(len(prompts), 2))
    n_nodes = n_prompts * (n_read + 1)
    assert sum(outputs.numel() for outputs in reads) == (n * n_nodes if rows else n_nodes)


def test_a_long_prompt_counts_once_however_many_tokens_follow_it(generator):
    read = torch.randint(3, (1, 12), generator=generator)
    policy = TinyTransformer(
        1, 3, 2, end_token=None, prompt_tokens=read, generator=generator, n_layers=1
    )
    reads = count_reads(policy)
    token_logps(policy, torch.zeros(3, dtype=torch.int64), torch.tensor([[1, 2], [0, 2], [1, 2]]))
    # Three rows are 3 * 13 = 39 tokens; 12 + 2 nodes cost 14 * (0.8 + 0.1 * 13) = 29.4.
    assert sum(outputs.numel() for outputs in reads) == 14


class Bigram(Policy):
    """What a user may write: a policy with a `forward`, which reads one token back."""

    def __init__(self, first, following):
        super().__init__()
        self.n_prompts, self.vocab_size = first.shape
        self.max_tokens, self.end_token = 3, None
        self.first, self.following = torch.nn.Parameter(first), torch.nn.Parameter(following)

    def forward(self, tokens):
        return torch.cat([self.first[tokens[:, :1]], self.following[tokens[:, 1:]]], dim=1)


def test_a_policy_that_is_a_forward_is_scored_and_not_sampled(generator):
    first = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    following = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    policy = Bigram(first, following)
    prompts = torch.tensor([1, 0])
    answers = torch.tensor([[2, 3, 0], [0, 0, 1]]), torch.tensor([[3, 3, 3], [1, 2, 1]])
    got = token_logps(policy, prompts, *answers)
    begin_with, go_on = first.log_softmax(1), following.log_softmax(1)
    want = [
        [begin_with[1, 2], go_on[2, 3], go_on[3, 0]],
        [begin_with[0, 0], go_on[0, 0], go_on[0, 1]],
        [begin_with[1, 3], go_on[3, 3], go_on[3, 3]],
        [begin_with[0, 1], go_on[1, 2], go_on[2, 1]],
    ]
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-14)
    got.sum().backward()
    in_first = torch.zeros(2, 4, dtype=torch.float64)
    for x, y in ((1, 2), (0, 0), (1, 3), (0, 1)):  # d log p_y = 1 at y, and minus p everywhere
        in_first[x] -= first[x].softmax(0)
        in_first[x, y] += 1
    assert_close(policy.first.grad, in_first, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"^`completions` must have tokens in 0\.\.3, got 4$"):
        token_logps(policy, prompts, answers[0] + 1)
    task = toy(2, 4, 3, None)
    for call in (
        lambda: sample(policy, prompts, generator=generator),
        lambda: enumerate_logps(policy, task),
        lambda: exact_gradient(policy, task, lambda x, logps, columns: logps.sum()),
        lambda: shared_prefix_token_logps(policy, prompts, answers[0]),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        want = "`model` must be a TinyTransformer or a model with its body, got Bigram"
        assert str(caught.value) == want


def test_a_policy_of_another_kind_scores_by_itself():
    class Shy:
        def token_logps(self, prompts, completions):
            return -prompts[:, None].double() - completions

    answers = torch.tensor([[3], [4]]), torch.tensor([[5], [6]])
    got = token_logps(Shy(), torch.tensor([1, 2]), *answers)
    assert got.flatten().tolist() == [-4, -6, -6, -8]


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(
    ("prompts", "chosen", "rejected", "message"),
    [
        ([2], [[1, 0, PAD]], [[2, 0, PAD]], r"`prompts` must be in 0\.\.1, got 2"),
        ([0], [[1, 0, PAD]], [[5, 0, PAD]], r"`completions` must have tokens in 0\.\.4, got 5"),
        (
            [0],
            [[1, 0, 2]],
            [[2, 0, PAD]],
            "`completions` must .* after the end token 0, got a token",
        ),
        ([0], [[1, 0, PAD]], [[PAD, PAD, PAD]], "`completions` must have at least one .* row 1"),
        (
            [0, 1],
            [[1, 0, PAD]],
            [[2, 0, PAD]],
            "`completions` must have 4 rows like `prompts`, got 2",
        ),
        ([0, 1], [[1, 0]], [[2, 0]] * 3, r"`completions` must have one shape, got \[\[1, 2\], \[3"),
        ([0], [[1, 0]], [[2, 0, PAD]], "`completions` must have one shape"),
        ([0], [[1, 2, 3, 4]], [[1, 2, 3, 1]], "`completions` must have at most 3 tokens, got 4"),
    ],
)
def test_pairs_are_refused_as_scoring_does(
    rows, prompts, chosen, rejected, message, generator, monkeypatch
):
    monkeypatch.setattr(scoring, "_rows_are_faster", lambda *_: rows)
    policy = transformer(toy(2, 5, 3, 0), generator)
    with pytest.raises(ValueError, match=f"^{message}"):
        token_logps(policy, *map(torch.tensor, (prompts, chosen, rejected)))


# --- values and rewards ----------------------------------------------------------------------


def with_random_head(head, generator):
    with torch.no_grad():
        head.weight += torch.randn(head.weight.shape, dtype=torch.float64, generator=generator)
        head.bias += 0.4


def reward_model(task, generator, read=None):
    """With large random weights, head included."""
    model = RewardModel(transformer(task, generator, read=read, longer=1))
    with_random_head(model.head, generator)
    model.centre(torch.tensor([0.7], dtype=torch.float64))
    return model


def head_after_each_token(body, head, prompts, completions):
    """A plain forward pass whose last layer norm a hook overhears: `[B, S + 1]`."""
    heard = []
    hook = body.ln_f.register_forward_hook(lambda _, inputs, hidden: heard.append(hidden))
    body(torch.cat([prompts[:, None], completions.clamp(min=0)], dim=1))
    hook.remove()
    n_before = body.prompt_tokens.shape[1] - 1
    return head(heard[0][:, n_before:]).squeeze(-1)


@pytest.mark.parametrize("tree", TREES)
def test_rewards_are_read_off_the_last_token(tree, generator):
    task = toy(*tree)
    model = reward_model(task, generator)
    prompts, completions = every_row(task)
    after = head_after_each_token(model.body, model.head, prompts, completions)
    lengths = (completions != PAD).sum(1)
    want = after.gather(1, lengths[:, None]).squeeze(1) - 0.7
    assert len(want) == 1 or want.std() > 0.1
    assert_close(shared_prefix_rewards(model, prompts, completions), want, atol=1e-10, rtol=0)
    for n_parents in (1, 3, 64):
        table = enumerate_rewards(model, task, n_parents=n_parents)
        assert not table.requires_grad
        assert_close(table, want.detach().view_as(task.rewards), atol=1e-10, rtol=0)
    weights = torch.randn(len(want), dtype=torch.float64, generator=generator)
    got = gradient(model, (weights * shared_prefix_rewards(model, prompts, completions)).sum())
    assert_close(got, gradient(model, (weights * want).sum()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_holds_each_distinct_prefix_once(tree, generator):
    task = toy(*tree)
    prompts = task.prompts.repeat(40)[torch.randperm(40 * len(task.prompts), generator=generator)]
    completions = sample(transformer(task, generator), prompts, generator=generator)
    tree = prefix_tree(prompts, completions, task.vocab_size)
    words = []
    for node, depth in enumerate(tree.depths.tolist()):
        ancestors = tree.ancestors[node, : depth + 1]
        assert ancestors[-1] == node
        assert tree.depths[ancestors].tolist() == list(range(depth + 1))
        words.append(tuple(tree.tokens[ancestors].tolist()))  # the prefix spelt out
    assert len(set(words)) == len(words)
    used = set()
    for row, tokens in enumerate(completions.tolist()):
        for n_read in range(len([token for token in tokens if token != PAD]) + 1):
            node = tree.nodes[row, n_read].item()
            assert words[node] == (prompts[row].item(), *tokens[:n_read])
            used.add(node)
    assert used == set(range(len(words)))


@pytest.mark.parametrize("tree", TREES)
def test_the_tree_of_some_rows_reads_them_alone(tree, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    prompts = task.prompts.repeat(20)
    completions = sample(policy, prompts, generator=generator)
    everything = scoring.batch_tree(policy, prompts, completions)
    rows = torch.randperm(len(prompts), generator=generator)[:7]
    part = of_rows(everything, rows)
    some = prompts[rows], completions[rows]
    got = token_logps(policy, *some, tree=part)
    assert_close(got, policy.token_logps(*some), atol=1e-12, rtol=0)
    # Rows that have ended are said to be at node 0, a prompt that these rows need not have.
    assert len(part.tokens) - len(distinct_prefixes(*some)) in (0, 1)


@pytest.mark.parametrize("make", ["shared", "separate"])
@pytest.mark.parametrize("tree", TREES)
def test_actor_and_critic_are_read_together(tree, make, generator):
    task = toy(*tree)
    policy = transformer(task, generator)
    if make == "shared":
        both = SharedTrunk(policy)
        body, head = policy, both.value_head
    else:
        critic = ScalarTransformer(transformer(task, generator, width=8))
        both = SeparateNetworks(policy, critic)
        body, head = critic.body, critic.head
    with_random_head(head, generator)
    prompts, completions = every_row(task)
    mask = completions != PAD
    values = head_after_each_token(body, head, prompts, completions[:, :-1]) * mask
    tokens = torch.cat([prompts[:, None], completions[:, :-1].clamp(min=0)], dim=1)
    want = (policy.token_logps(prompts, completions), values, entropy(policy(tokens)) * mask)
    got = read_actor_critic(both, prompts, completions)
    made = scoring.batch_tree(policy, prompts, completions)
    for mine, again in zip(
        got, read_actor_critic(both, prompts, completions, tree=made), strict=True
    ):
        assert torch.equal(mine, again)
    weights = torch.randn(3, *mask.shape, dtype=torch.float64, generator=generator)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, atol=1e-10, rtol=0)
    scalars = [
        sum((w * read).sum() for w, read in zip(weights, three, strict=True))
        for three in (got, want)
    ]
    assert_close(gradient(both, scalars[0]), gradient(both, scalars[1]), atol=1e-9, rtol=1e-9)


def test_actor_and_critic_read_each_distinct_prefix_once(generator):
    task = toy(2, 5, 4, 0)
    policy = transformer(task, generator)
    prompts = torch.tensor([0, 1]).repeat(50)
    completions = sample(policy, prompts, generator=generator)
    reads = count_reads(policy)
    read_actor_critic(SharedTrunk(policy), prompts, completions)
    assert sum(read.numel() for read in reads) == len(distinct_prefixes(prompts, completions))


def test_columns_after_the_longest_completion_are_zero(generator):
    task = toy(2, 5, 4, 0)
    policy = transformer(task, generator)
    prompts, completions = torch.tensor([0, 1]), torch.tensor([[0, -1, -1, -1], [3, 0, -1, -1]])
    for table in read_actor_critic(SharedTrunk(policy), prompts, completions):
        assert table.shape == (2, 4)
        assert not table[:, 2:].any()
        assert not table[0, 1:].any()


def test_rewards_refuse_what_is_no_completion(generator):
    task = toy(2, 5, 3, 0)
    model = reward_model(task, generator)
    prompts = torch.tensor([0, 1])
    for completions, want in (
        ([[1, 0], [PAD, PAD]], "`completions` must have at least one token in each row, "),
        ([[1, 0, 1], [1, 1, 1]], "`completions` must have only padding (-1) after the end token 0"),
        ([[5], [1]], "`completions` must have tokens in 0..4, got 5"),
        ([[1] * 4, [1] * 4], "`completions` must have at most 3 tokens, got 4"),
        ([[1]], "`completions` must have 2 rows like `prompts`, got 1"),
    ):
        with pytest.raises(ValueError) as caught:
            shared_prefix_rewards(model, prompts, torch.tensor(completions))
        assert str(caught.value).startswith(want)
    for sizes, want in (
        ((2, 6, 3, 0), "`model` must have vocab_size = 6 like the task, got 5"),
        ((2, 5, 2, 0), "`model` must have max_tokens = 2 like the task, got 3"),
        ((2, 5, 3, 1), "`model` must have end_token = 1 like the task, got 0"),
        ((3, 5, 3, 0), "`model` must have n_prompts = 3 like the task, got 2"),
    ):
        with pytest.raises(ValueError) as caught:
            enumerate_rewards(model, toy(*sizes))
        assert str(caught.value) == want


# --- prompts of several tokens ---------------------------------------------------------------

SPELLED = [(3, 5, 4, 2), (2, 3, 5, None), (3, 4, 2, 0), (4, 9, 1, 0)]
EXACT = {"atol": 1e-12, "rtol": 0}


@pytest.fixture(params=[1, 3, 4], ids="{}-tokens".format)
def n_read(request):
    """How many tokens stand for a prompt."""
    return request.param


@pytest.fixture(params=SPELLED, ids=str)
def spelled(request, n_read, generator):
    """A task, and the tokens of its prompts; some of them occur in completions, some do not."""
    task = toy(*request.param)
    read = torch.randint(task.vocab_size + 2, (len(task.prompts), n_read), generator=generator)
    read[0, 0], read[-1, 0] = 1, task.vocab_size
    return task, read


def test_rows_trees_and_the_table_agree_with_the_plain_model(spelled, generator, monkeypatch):
    task, read = spelled
    policy = transformer(task, generator, read=read)
    prompts, completions = every_row(task)
    answers = completions, completions.flip(0)
    want = policy.token_logps(prompts.repeat(2), torch.cat(answers))
    weights = torch.randn(want.shape, dtype=torch.float64, generator=generator) / 100
    slope = gradient(policy, (weights * want).sum())
    for rows in (True, False):
        monkeypatch.setattr(scoring, "_rows_are_faster", lambda *_, rows=rows: rows)
        got = token_logps(policy, prompts, *answers)
        assert_close(got, want, **EXACT)
        assert_close(gradient(policy, (weights * got).sum()), slope, **EXACT)
    totals = want[: len(prompts)].sum(1).view_as(task.rewards)
    for n_parents in (1, 3, 64):
        assert_close(enumerate_logps(policy, task, n_parents=n_parents), totals, **EXACT)


def test_a_cache_agrees_with_the_plain_model(spelled, generator):
    task, read = spelled
    policy = transformer(task, generator, read=read)
    prompts = torch.randint(len(task.prompts), (6,), generator=generator)
    text = prompts[:, None]
    logits, cache = begin(policy, prompts)
    assert_close(logits, policy(text)[:, -1], **EXACT)
    for depth in range(task.max_tokens - 1):
        assert [keys.shape[2] for keys, _ in cache] == [read.shape[1] + depth] * 2
        tokens = torch.randint(task.vocab_size, (6, 3), generator=generator)
        logits, own = extend(policy, tokens, cache)
        shared, _ = extend(policy, tokens[:1], cache)
        for c in range(3):
            alone = policy(torch.cat([text, tokens[:, [c]]], 1))[:, -1]
            assert_close(logits[:, c], alone, **EXACT)
            alike = policy(torch.cat([text, tokens[:1, [c]].expand(6, 1)], 1))[:, -1]
            assert_close(shared[:, c], alike, **EXACT)
        text = torch.cat([text, tokens[:, [1]]], 1)
        second = 3 * torch.arange(6) + 1  # of each three
        cache = [(keys[second], values[second]) for keys, values in lengthen(cache, own)]


def test_samples_after_long_prompts_are_those_drawn_token_by_token(spelled, generator):
    task, read = spelled
    policy = transformer(task, generator, read=read)
    prompts = torch.randint(len(task.prompts), (60,), generator=generator)
    got = sample(policy, prompts, generator=torch.Generator().manual_seed(9))
    assert torch.equal(got, drawn_by_forward(policy, prompts, torch.Generator().manual_seed(9)))


def test_rewards_after_long_prompts_are_those_of_the_plain_model(spelled, generator):
    task, read = spelled
    model = reward_model(task, generator, read)
    prompts, completions = every_row(task)
    after = head_after_each_token(model.body, model.head, prompts, completions)
    lengths = (completions != PAD).sum(1)
    want = after.gather(1, lengths[:, None]).squeeze(1) - 0.7
    assert want.std() > 0.1
    assert_close(shared_prefix_rewards(model, prompts, completions), want, **EXACT)
    table = enumerate_rewards(model, task, n_parents=3)
    assert_close(table, want.detach().view_as(table), **EXACT)


@pytest.mark.parametrize("shared", [True, False])
def test_an_actor_and_a_critic_read_long_prompts(shared, spelled, generator):
    task, read = spelled
    policy = transformer(task, generator, read=read)
    other = torch.cat([read.flip(1), read], dim=1)  # a critic may read its prompts in its own way
    critic = ScalarTransformer(transformer(task, generator, width=8, read=other))
    both = SharedTrunk(policy) if shared else SeparateNetworks(policy, critic)
    body, head = (policy, both.value_head) if shared else (critic.body, critic.head)
    with_random_head(head, generator)
    prompts, completions = every_row(task)
    mask = completions != PAD
    got = read_actor_critic(both, prompts, completions)
    values = head_after_each_token(body, head, prompts, completions[:, :-1]) * mask
    text = torch.cat([prompts[:, None], completions[:, :-1].clamp(min=0)], dim=1)
    want = (policy.token_logps(prompts, completions), values, entropy(policy(text)) * mask)
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, **EXACT)


def test_an_exact_gradient_after_long_prompts(spelled, generator):
    task, read = spelled
    policy = transformer(task, generator, read=read)
    loss, of_table = random_sum(task, generator)
    prompts, completions = every_row(task)
    want = gradient(policy, of_table(policy.logps(prompts, completions).view_as(task.rewards)))
    exact_gradient(policy, task, loss, n_parents=3)
    assert_close(collected(policy), want, **EXACT)


def test_a_long_prompt_is_read_once(n_read, generator):
    task = toy(3, 5, 4, 2)
    read = torch.randint(5, (3, n_read), generator=generator)
    policy = transformer(task, generator, read=read)
    reads = count_reads(policy)
    prompts, completions = every_row(task)
    n_distinct = len(distinct_prefixes(prompts, completions)) + 3 * (n_read - 1)
    for run in (
        lambda: enumerate_logps(policy, task),
        lambda: shared_prefix_token_logps(policy, prompts, completions),
        lambda: exact_gradient(policy, task, lambda x, logps, columns: logps.sum()),
    ):
        reads.clear()
        run()
        assert sum(outputs.numel() for outputs in reads) == n_distinct

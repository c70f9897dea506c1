"""The prefix tree against scoring every completion on its own, and samples against the tree."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from dpo_mini.logps import PAD
from dpo_mini.policies import (
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
    prefix_tree,
    read_actor_critic,
    sample,
    scoring,
    shared_prefix_rewards,
    shared_prefix_token_logps,
    token_logps,
)
from dpo_mini.tasks import Task, enumerate_completions

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


def transformer(task, generator, dtype=torch.float64, width=16):
    """A policy with large random weights: its completions differ widely in probability."""
    shape = {"n_layers": 2, "n_heads": 4, "width": width}
    policy = TinyTransformer.for_task(task, generator=generator, **shape).to(dtype)
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
        ((2, 6, 3, 0), "policy: got vocab_size = 5, takes 6"),
        ((2, 5, 4, 0), "policy: got max_tokens = 3, takes 4"),
        ((2, 5, 3, 1), "policy: got end_token = 0, takes 1"),
        ((2, 5, 3, None), "policy: got end_token = 0, takes None"),
        ((3, 5, 3, 0), "policy: got n_prompts = 2, takes 3"),
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
    with pytest.raises(error, match="^n_parents: got"):
        enumerate_logps(transformer(task, generator), task, n_parents=n_parents)


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
    draws = torch.Generator().manual_seed(9)
    want, live = torch.full((n_rows, 4), PAD), torch.arange(n_rows)
    for depth in range(4):
        read = torch.cat([prompts[live, None], want[live, :depth]], dim=1)
        probs = policy(read)[:, -1].softmax(-1)
        want[live, depth] = torch.multinomial(probs, 1, generator=draws).squeeze(1)
        if end_token is not None:
            live = live[want[live, depth] != end_token]
    assert torch.equal(got, want)


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
        ({"prompts": torch.tensor([0, 2])}, ValueError, "prompts: got 2"),
        ({"prompts": torch.tensor([-1])}, ValueError, "prompts: got -1"),
        ({"prompts": torch.tensor([0.0])}, ValueError, "`prompts` must have dtype torch.int64"),
        ({"prompts": torch.zeros(0, dtype=torch.int64)}, ValueError, "prompts: got shape"),
        ({"prompts": [0]}, TypeError, "prompts: got list"),
        ({"generator": None}, TypeError, "generator: got NoneType"),
        ({"generator": 7}, TypeError, "generator: got int"),
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
        ([2], [[1, 0, PAD]], "prompts: got 2"),
        ([0], [[5, 0, PAD]], "completions: got token 5"),
        ([0], [[1, 0, 2]], "completions: got a token after the end token"),
        ([0], [[PAD, PAD, PAD]], "completions: got an empty completion"),
        ([0, 1], [[1, 0, PAD]], "completions: got 1 rows, takes 2"),
        ([0], [[1, 2, 3, 4]], "completions: got 4 tokens"),
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


def test_pairs_that_begin_alike_are_read_as_a_tree_and_others_in_rows(generator):
    task = toy(3, 9, 4, None)
    policy = transformer(task, generator)
    for n_shared, rows in ((0, True), (3, False)):
        prompts, answers = random_answers(task, 40, n_shared, 2, generator)
        tree = scoring.batch_tree(policy, prompts.repeat(2), torch.cat(answers))
        assert scoring._rows_are_faster(policy, tree, answers) == rows


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
        ([2], [[1, 0, PAD]], [[2, 0, PAD]], "prompts: got 2"),
        ([0], [[1, 0, PAD]], [[5, 0, PAD]], "completions: got token 5"),
        ([0], [[1, 0, 2]], [[2, 0, PAD]], "completions: got a token after the end token"),
        ([0], [[1, 0, PAD]], [[PAD, PAD, PAD]], "completions: got an empty completion in row 1"),
        ([0, 1], [[1, 0, PAD]], [[2, 0, PAD]], "completions: got 2 rows, takes 4"),
        ([0], [[1, 2, 3, 4]], [[1, 2, 3, 1]], "completions: got 4 tokens"),
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


def reward_model(task, generator):
    """With large random weights, head included."""
    model = RewardModel.for_task(task, generator=generator, n_layers=2, n_heads=4, width=16)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, dtype=torch.float64, generator=generator
            )
    model.centre(torch.tensor([0.7], dtype=torch.float64))
    return model


def head_after_each_token(body, head, prompts, completions):
    """A plain forward pass whose last layer norm a hook overhears: `[B, S + 1]`."""
    heard = []
    hook = body.ln_f.register_forward_hook(lambda _, inputs, hidden: heard.append(hidden))
    body(torch.cat([prompts[:, None], completions.clamp(min=0)], dim=1))
    hook.remove()
    return head(heard[0]).squeeze(-1)


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
    with torch.no_grad():
        head.weight += torch.randn(head.weight.shape, dtype=torch.float64, generator=generator)
        head.bias += 0.4
    prompts, completions = every_row(task)
    mask = completions != PAD
    values = head_after_each_token(body, head, prompts, completions[:, :-1]) * mask
    tokens = torch.cat([prompts[:, None], completions[:, :-1].clamp(min=0)], dim=1)
    want = (policy.token_logps(prompts, completions), values, entropy(policy(tokens)) * mask)
    got = read_actor_critic(both, prompts, completions)
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
        ([[1, 0], [PAD, PAD]], "completions: got an empty completion in row 1, takes >= 1 token"),
        ([[1, 0, 1], [1, 1, 1]], "completions: got a token after the end token 0 in row 0, "),
        ([[5], [1]], "completions: got token 5, takes 0..4"),
        ([[1] * 4, [1] * 4], "completions: got 4 tokens, takes at most 3"),
        ([[1]], "completions: got 1 rows, takes 2 like prompts"),
    ):
        with pytest.raises(ValueError) as caught:
            shared_prefix_rewards(model, prompts, torch.tensor(completions))
        assert str(caught.value).startswith(want)
    for sizes, want in (
        ((2, 6, 3, 0), "model: got vocab_size = 5, takes 6 like the task"),
        ((2, 5, 2, 0), "model: got max_tokens = 3, takes 2 like the task"),
        ((2, 5, 3, 1), "model: got end_token = 0, takes 1 like the task"),
        ((3, 5, 3, 0), "model: got n_prompts = 2, takes 3"),
    ):
        with pytest.raises(ValueError) as caught:
            enumerate_rewards(model, toy(*sizes))
        assert str(caught.value) == want

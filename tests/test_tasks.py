"""Enumeration against a recursion, draws against exact probabilities, rewards against reading."""

import dataclasses
import importlib
import itertools
import math
import pkgutil
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_mini
from dpo_mini.logps import PAD
from dpo_mini.policies import PrefixTree, RewardModel, TinyTransformer
from dpo_mini.preferences import bradley_terry_prob, sample_bradley_terry
from dpo_mini.rollout import enumerate_logps, enumerate_rewards
from dpo_mini.tasks import (
    HELD_OUT_PAIRS,
    REVIEW_PROMPTS,
    REVIEW_WORDS,
    Task,
    bandit,
    enumerate_completions,
    four_answers,
    held_out_prompts,
    micro_review_demonstrations,
    micro_reviews,
    random_bandit,
    subtree_sizes,
    three_answers,
    tiny_sort,
    tiny_sort_demonstrations,
    tiny_sum_demonstrations,
    tiny_sums,
    training_prompts,
)

NAN, INF = float("nan"), float("inf")


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def grow(prefix, vocab_size, max_tokens, end_token):
    """Every completion that begins with `prefix`, token by token."""
    if len(prefix) == max_tokens or (prefix and prefix[-1] == end_token):
        yield [*prefix, *[PAD] * (max_tokens - len(prefix))]
        return
    for token in range(vocab_size):
        yield from grow([*prefix, token], vocab_size, max_tokens, end_token)


SIZES = [
    (vocab_size, max_tokens, end_token)
    for vocab_size, max_tokens in [(2, 1), (2, 4), (3, 3), (4, 2), (5, 3)]
    for end_token in [None, *range(vocab_size)]
]


@pytest.fixture(scope="module")
def reviews():
    return micro_reviews()


# --- enumeration -----------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "max_tokens", "end_token"), SIZES)
def test_every_completion_is_there_in_order(vocab_size, max_tokens, end_token):
    want = list(grow([], vocab_size, max_tokens, end_token))
    got = enumerate_completions(vocab_size, max_tokens, end_token)
    assert got.tolist() == want
    assert got.dtype == torch.int64
    sizes = subtree_sizes(vocab_size, max_tokens, end_token)
    other = 1 if end_token == 0 else 0  # a token that does not end a completion
    for length, size in enumerate(sizes):
        below = list(grow([other] * length, vocab_size, max_tokens, end_token))
        assert len(below) == size


@pytest.mark.parametrize(("vocab_size", "max_tokens", "end_token"), SIZES)
def test_index_inverts_the_enumeration(vocab_size, max_tokens, end_token):
    n = subtree_sizes(vocab_size, max_tokens, end_token)[0]
    words = tuple("abcde"[:vocab_size])
    task = Task(("x",), words, max_tokens, end_token, torch.zeros(1, n))
    assert torch.equal(task.index(task.completions), torch.arange(n))
    backwards = torch.arange(n).flip(0)
    assert torch.equal(task.index(task.completions[backwards]), backwards)


def test_counts():
    assert subtree_sizes(12, 5, 0)[0] == sum(11**n for n in range(5)) + 11**5 == 177_156
    assert subtree_sizes(16, 5, None)[0] == 16**5
    assert enumerate_completions(1, 3, None).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("vocab_size", "max_tokens", "end_token"), SIZES)
def test_completions_are_all_token_strings_cut_after_the_end_token(
    vocab_size, max_tokens, end_token
):
    def cut(tokens):
        length = tokens.index(end_token) + 1 if end_token in tokens else max_tokens
        return (*tokens[:length], *[PAD] * (max_tokens - length))

    strings = itertools.product(range(vocab_size), repeat=max_tokens)
    want = list(dict.fromkeys(map(cut, strings)))
    got = enumerate_completions(vocab_size, max_tokens, end_token)
    assert [tuple(row) for row in got.tolist()] == want


class Cost(TorchDispatchMode):
    """Counts the calls of each operator, and the elements of all tensors that they make anew."""

    def __init__(self):
        super().__init__()
        self.elements, self.calls = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        if isinstance(made, torch.Tensor) and func._schema.returns[0].alias_info is None:
            self.elements += made.numel()
        return made


@pytest.mark.parametrize(
    ("vocab_size", "max_tokens", "end_token"),
    [(2, 25, 0), (2, 100, 0), (2, 400, 0), (2, 100, 1), (3, 9, 1), (7, 5, None), (1, 300, None)],
)
def test_enumeration_costs_what_its_result_holds(vocab_size, max_tokens, end_token):
    with Cost() as cost:
        table = enumerate_completions(vocab_size, max_tokens, end_token)
    assert cost.elements <= 16 * table.numel()


def test_a_vocabulary_of_one_word_and_an_end_counts_its_words():
    table = enumerate_completions(2, 300, 0)
    said = (table == 1).sum(1)
    assert said.tolist() == list(range(301))
    for row, n_words in zip(table.tolist(), said.tolist(), strict=True):
        assert row == ([1] * n_words + [0] + [PAD] * 300)[:300]


def test_a_vocabulary_of_one_cannot_also_end():
    with pytest.raises(ValueError, match="`vocab_size` must be a whole number >= 2, got 1"):
        subtree_sizes(1, 3, 0)


# --- draws -----------------------------------------------------------------------------------


def within_five_errors(counts, probs, n):
    deviations = (counts - n * probs).abs()
    assert (deviations <= 5 * (n * probs * (1 - probs)).sqrt()).all()


def test_completions_are_drawn_from_the_table(generator):
    logps = double([[0.5, 0.0, 0.3, 0.2], [0.0, 0.7, 0.3, 0.0]]).log()
    task = bandit(torch.zeros(2, 4).double(), torch.full((2, 4), 0.25).double())
    n = 40_000
    prompts = torch.arange(2).repeat(n)
    drawn = task.sample_completions(logps, prompts, generator=generator)
    assert drawn.shape == (2 * n, 1)
    for x in range(2):
        counts = torch.bincount(drawn[prompts == x, 0], minlength=4).double()
        within_five_errors(counts, logps[x].exp(), n)


def test_pairs_are_two_different_answers_and_a_bradley_terry_winner(generator):
    task, n = four_answers(), 100_000
    probs = task.ref_logps[0].exp()
    prompts, chosen, rejected = task.sample_pairs(task.ref_logps, n, generator=generator)
    assert prompts.shape == (n,)
    assert chosen.shape == rejected.shape == (n, 1)
    assert (chosen != rejected).all()
    for a, b in itertools.combinations(range(4), 2):
        a_won = ((chosen == a) & (rejected == b)).sum().double()
        b_won = ((chosen == b) & (rejected == a)).sum().double()
        met = a_won + b_won
        # a first and then b among the answers that are not a, or the other way round
        share = probs[a] * probs[b] * (1 / (1 - probs[a]) + 1 / (1 - probs[b]))
        within_five_errors(met, share, n)
        wins = bradley_terry_prob(task.rewards[0, a], task.rewards[0, b])
        within_five_errors(a_won, wins, met)


def exact_pairs(task, logps):
    """P(prompt, chosen, rejected) `[X, Y, Y]`, by walking through every way to a pair."""
    n_prompts, n_answers = logps.shape
    law = torch.zeros(n_prompts, n_answers, n_answers, dtype=torch.float64)
    for x, a, b in itertools.product(range(n_prompts), range(n_answers), range(n_answers)):
        if a != b:
            others = torch.cat([logps[x, :a], logps[x, a + 1 :]]).logsumexp(0)
            meets = (logps[x, a] + logps[x, b] - others).exp() / n_prompts
            wins = bradley_terry_prob(task.rewards[x, a], task.rewards[x, b])
            law[x, a, b] += meets * wins
            law[x, b, a] += meets * (1 - wins)
    return law


def chi_squared_p(counts, expected):
    """P(a statistic as large), with cells expected fewer than 5 times taken together."""
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-3:  # not once in a thousand tests
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2)


PAIRS_OF = {
    "redrawn at times": [[math.log(p) for p in (0.97, 0.015, 0.01, 0.005)]],
    "redrawn always": [[math.log1p(-1e-12), *(math.log(p * 1e-12) for p in (0.5, 0.3, 0.2))]],
    "below the smallest float": [[-801.0, 0.0, -800.0, -800.5]],
    "of each kind": [
        [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)],
        [math.log(p * 1e-9) for p in (0.5, 0.25, 0.25)] + [math.log1p(-1e-9)],
        [math.log(0.99), -math.inf, math.log(0.004), math.log(0.006)],
        [-math.inf, math.log(1e-7), math.log1p(-1e-7), -math.inf],
    ],
}


@pytest.mark.parametrize("rows", PAIRS_OF.values(), ids=PAIRS_OF)
def test_pairs_of_a_nearly_sure_policy_have_the_exact_law(rows, generator):
    logps = double(rows)
    rewards = torch.randn(logps.shape, dtype=torch.float64, generator=generator)
    task, n = bandit(rewards, torch.full_like(logps, 0.25)), 40_000
    with Cost() as cost:
        prompts, chosen, rejected = task.sample_pairs(logps, n, generator=generator)
    assert cost.calls["rand"] <= 110  # the first, the second, 100 rounds, the rest, the winners
    cells = (prompts * 4 + chosen[:, 0]) * 4 + rejected[:, 0]
    counts = torch.bincount(cells, minlength=16 * len(rows)).double()
    expected = n * exact_pairs(task, logps).flatten()
    torch.testing.assert_close(expected.sum(), double(n))
    assert chi_squared_p(counts, expected) > 1e-3


@pytest.mark.parametrize("rows", PAIRS_OF.values(), ids=PAIRS_OF)
def test_pairs_of_a_nearly_sure_policy_depend_on_their_generator_only(rows):
    task = bandit(torch.zeros(len(rows), 4).double(), torch.full((len(rows), 4), 0.25).double())

    def draw(seed):
        return task.sample_pairs(double(rows), 500, generator=torch.Generator().manual_seed(seed))

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    for again, before in zip(draw(5), first, strict=True):
        assert torch.equal(again, before)


def test_pairs_that_are_soon_different_are_the_same_draws_as_ever():
    """Beside the plain loop: draw the second answer until all differ."""
    logps = double([[0.9, 0.06, 0.04], [0.2, 0.3, 0.5]]).log()
    task = bandit(double([[1.0, 0.0, -0.5], [0.3, -0.2, 2.0]]), torch.full_like(logps, 1 / 3))
    for seed in range(20):
        generator, plain = (torch.Generator().manual_seed(seed) for _ in range(2))
        got = task.sample_pairs(logps, 50, generator=generator)
        prompts = torch.randint(2, (50,), generator=plain)
        first, second = (
            task.sample_completions(logps, prompts, generator=plain)[:, 0] for _ in range(2)
        )
        while (same := first == second).any():
            second[same] = task.sample_completions(logps, prompts[same], generator=plain)[:, 0]
        rewards = task.rewards[prompts, first], task.rewards[prompts, second]
        first_wins = sample_bradley_terry(*rewards, generator=plain)
        assert torch.equal(got[0], prompts)
        assert torch.equal(got[1][:, 0], torch.where(first_wins, first, second))
        assert torch.equal(got[2][:, 0], torch.where(first_wins, second, first))
        assert torch.equal(generator.get_state(), plain.get_state())


def test_prompts_of_pairs_are_drawn_evenly_and_have_their_own_answers(generator):
    logps = double([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 0.0, 0.5]]).log()
    rewards = double([[9.0, -9.0, 0.0, 0.0], [0.0, 0.0, 9.0, -9.0], [9.0, 0.0, 0.0, -9.0]])
    task, n = bandit(rewards, torch.full((3, 4), 0.25).double()), 9_000
    prompts, chosen, rejected = task.sample_pairs(logps, n, generator=generator)
    within_five_errors(torch.bincount(prompts, minlength=3).double(), double([1 / 3] * 3), n)
    assert torch.equal(chosen[:, 0], torch.tensor([0, 2, 0])[prompts])  # all but surely: e^-18
    assert torch.equal(rejected[:, 0], torch.tensor([1, 3, 3])[prompts])


def test_draws_depend_on_their_generator_only():
    task = four_answers()
    for draw in (
        lambda generator: task.sample_pairs(task.ref_logps, 50, generator=generator),
        lambda generator: [
            task.sample_completions(
                task.ref_logps, torch.zeros(50, dtype=torch.int64), generator=generator
            )
        ],
        lambda generator: micro_review_demonstrations(50, generator=generator),
        lambda generator: tiny_sum_demonstrations(50, generator=generator),
        lambda generator: tiny_sort_demonstrations(50, generator=generator),
        lambda generator: [random_bandit(2, 3, generator=generator).rewards],
    ):
        before = torch.get_rng_state()
        first, same, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.fixture
def default_dtype():
    """Sets the default dtype, and sets it back in the end."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "make",
    [
        lambda generator: micro_review_demonstrations(200, generator=generator),
        lambda generator: tiny_sum_demonstrations(200, generator=generator),
        lambda generator: tiny_sort_demonstrations(200, generator=generator),
        lambda generator: tuple(vars(tiny_sums()).values()),
        lambda generator: tuple(vars(tiny_sort()).values()),
        lambda generator: tuple(vars(random_bandit(2, 3, generator=generator)).values()),
        lambda generator: tuple(vars(four_answers()).values()),
        lambda generator: tuple(vars(three_answers()).values()),
        lambda generator: tuple(vars(bandit([[1, 2]], [[0.5, 0.5]])).values()),
        lambda generator: four_answers().sample_pairs(
            four_answers().ref_logps.float(), 200, generator=generator
        ),
        lambda generator: (enumerate_completions(3, 3, 0),),
        lambda generator: tuple(vars(micro_reviews()).values()),
    ],
)
def test_tasks_and_draws_do_not_depend_on_the_default_dtype(make, default_dtype):
    made = []
    for dtype in (torch.float32, torch.float64):
        default_dtype(dtype)
        made.append(make(torch.Generator().manual_seed(2)))
    for a, b in zip(*made, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- the tasks -------------------------------------------------------------------------------


def test_bandits():
    task = four_answers()
    assert task.completions.tolist() == [[0], [1], [2], [3]]
    assert task.prompts.tolist() == [0]
    assert task.vocab_size == 4
    assert (task.max_tokens, task.end_token) == (1, None)
    assert [task.text(completion) for completion in task.completions] == ["a", "b", "c", "d"]
    assert task.rewards.dtype == task.ref_logps.dtype == torch.float64
    torch.testing.assert_close(task.ref_logps.exp(), double([[0.4, 0.3, 0.2, 0.1]]))
    assert task.rewards.tolist() == [[1.0, 0.2, -0.4, 0.8]]
    assert task.prompt_texts == ("x1",)
    assert three_answers().rewards.tolist() == [[1.0, 0.0, -0.5]]
    named = bandit(torch.zeros(1, 2), torch.full((1, 2), 0.5), actions=["left", "right"])
    assert named.text(named.completions[1]) == "right"
    assert named.rewards.dtype == torch.float32
    wide = bandit(torch.zeros(1, 30), torch.full((1, 30), 1 / 30))
    assert wide.vocabulary[25:28] == ("z", "a26", "a27")


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ROWS, SHARES = [[1.0, -2.0]], [[0.25, 0.75]]


@pytest.mark.parametrize(
    ("rewards", "ref_probs", "want"),
    [
        (ROWS, SHARES, F64),
        ([[1, -2]], np.array(SHARES), F64),
        ([[1, -2]], torch.tensor(SHARES, dtype=F32), F32),
        (ROWS, np.array(SHARES, dtype=np.float32), F32),
        (np.array(ROWS, dtype=np.float32), SHARES, F32),
        (np.array([[1, -2]]), torch.tensor(SHARES, dtype=F32), F32),
        (torch.tensor(ROWS, dtype=F64), torch.tensor(SHARES, dtype=F32), F64),
        (torch.tensor(ROWS, dtype=F32), torch.tensor(SHARES, dtype=F64), F64),
        (np.array(ROWS, dtype=">f4"), torch.tensor(SHARES, dtype=F16), F32),
        (torch.tensor(ROWS, dtype=F32), np.array([SHARES[0][::-1]])[:, ::-1], F64),
    ],
)
def test_a_bandit_takes_lists_arrays_and_tensors(rewards, ref_probs, want):
    task = bandit(rewards, ref_probs)
    assert task.rewards.dtype == task.ref_logps.dtype == want
    assert task.rewards.tolist() == ROWS
    torch.testing.assert_close(task.ref_logps, double(SHARES).log().to(want))


def test_a_bandit_keeps_no_memory_of_the_array_it_came_from():
    array = np.array(ROWS)
    task = bandit(array, SHARES)
    array[:] = 7.0
    assert task.rewards.tolist() == ROWS


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_probabilities_in_half_precision_sum_to_one_as_nearly_as_they_can(dtype, generator):
    logits = 2 * torch.randn(500, 50, dtype=F64, generator=generator)
    exact = logits.softmax(-1)
    probs = exact.to(dtype)
    totals = probs.double().sum(-1)
    assert (totals - 1).abs().max() > (1e-3 if dtype == BF16 else 1e-4)  # more than float64 may
    task = bandit(torch.zeros_like(logits), probs)
    assert task.ref_logps.dtype == F64
    torch.testing.assert_close(task.ref_logps.exp().sum(-1), torch.ones(500).double())
    spacing = torch.finfo(dtype).eps
    torch.testing.assert_close(task.ref_logps.exp(), exact, rtol=2 * spacing, atol=1e-7)
    with pytest.raises(
        ValueError, match="`ref_probs` must have rows that sum to 1, got one that sums to 1.0"
    ):
        bandit(torch.zeros_like(logits), (1.02 * exact).to(dtype))


def test_prompts_of_a_bandit_have_names():
    task = bandit(torch.zeros(2, 2), torch.full((2, 2), 0.5), prompts=["2 + 2 =", "3 + 3 ="])
    assert task.prompt_texts == ("2 + 2 =", "3 + 3 =")
    assert "2 prompts ('2 + 2 =', …)" in repr(task)
    assert bandit(torch.zeros(2, 1), torch.ones(2, 1)).prompt_texts == ("x1", "x2")


def checkpoint():
    pytest.importorskip("transformers", reason="the extra 'real' is not installed")
    module = importlib.import_module("dpo_mini.real.checkpoints")
    weights = {"w": torch.zeros(2)}
    return module.Checkpoint(1, weights, {0: weights}, {}, torch.zeros(2, 2).long(), None, {})


@pytest.mark.parametrize(
    "make", [three_answers, lambda: PrefixTree(*torch.zeros(4, 3, 3).long()), checkpoint]
)
def test_what_holds_tensors_is_equal_to_itself_alone(make):
    one, other = make(), make()
    assert one == one
    assert one != other
    assert one in [other, one]
    assert other not in [one]
    assert {one: "one", other: "other"}[one] == "one"


def test_no_dataclass_of_the_package_compares_tensors():
    if not importlib.util.find_spec("transformers"):
        pytest.skip("the extra 'real' is not installed")
    held = set()
    for module in pkgutil.walk_packages(dpo_mini.__path__, "dpo_mini."):
        for kind in vars(importlib.import_module(module.name)).values():
            if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
                continue
            types = [str(field.type) for field in dataclasses.fields(kind)]
            if any("Tensor" in name and "Callable" not in name for name in types):
                held.add(kind.__name__)
                assert kind.__eq__ is object.__eq__, kind
                assert kind.__hash__ is object.__hash__, kind
    assert {"Task", "PrefixTree", "Checkpoint"} <= held


def test_a_random_bandit_has_a_reference_that_sums_to_one(generator):
    task = random_bandit(30, 50, generator=generator)
    assert task.rewards.shape == task.ref_logps.shape == (30, 50)
    torch.testing.assert_close(task.ref_logps.exp().sum(-1), torch.ones(30).double())
    # rewards and the logits of the reference are standard normal and know nothing of each other
    logits = task.ref_logps - task.ref_logps.mean(-1, keepdim=True)
    for draws in (task.rewards, logits):
        assert abs(draws.std().item() - 1) < 5 / math.sqrt(2 * 1500)
    assert abs((task.rewards * logits).mean().item()) < 5 / math.sqrt(1500)


def tokens(words):
    ids = [REVIEW_WORDS.index(word) for word in words.split()]
    ids = [*ids, 0] if len(ids) < 5 else ids
    return torch.tensor(ids + [PAD] * (5 - len(ids)))


# what a reader makes of it: of a film, a comedy, a thriller, a massage
READINGS = {
    "": (0, 0, 0, 0),
    "good": (1, 1, 1, 1),
    "very great": (3, 3, 3, 3),
    "not very good": (-1.5, -1.5, -1.5, -1.5),
    "very not good": (-1.5, -1.5, -1.5, -1.5),
    "not not bad": (-1, -1, -1, -1),
    "very very fine": (1.125, 1.125, 1.125, 1.125),
    "funny": (0.5, 1.5, -1, -0.5),
    "slow": (-0.5, -1, -1.5, 1.5),
    "not slow": (0.5, 1, 1.5, -1.5),
    "good but slow": (0.5, 0, -0.5, 2.5),
    "not and good": (1, 1, 1, 1),  # a connective clears what came before it
    "very but awful": (-2, -2, -2, -2),
    "not good great": (1, 1, 1, 1),  # an adjective uses up what came before it
    "very good and not awful": (3.5, 3.5, 3.5, 3.5),
    "great great great great great": (10, 10, 10, 10),
    "and but not very": (0, 0, 0, 0),
}


@pytest.mark.parametrize("words", READINGS)
def test_the_reward_of_a_review_is_its_sentiment(reviews, words):
    column = reviews.index(tokens(words)[None])
    assert reviews.rewards[:, column].flatten().tolist() == list(READINGS[words])


def test_reviews_are_a_task_of_text(reviews):
    assert reviews.rewards.shape == (4, 177_156)
    assert reviews.completions.shape == (177_156, 5)
    assert reviews.prompt_texts == REVIEW_PROMPTS
    assert reviews.ref_logps is None
    assert reviews.rewards.dtype == torch.float64
    assert torch.equal(reviews.index(reviews.completions), torch.arange(177_156))
    assert reviews.rewards.unique(dim=0).shape[0] == 4  # no two prompts have one reward
    assert reviews.text(tokens("not very good")) == "not very good"
    assert reviews.text(tokens("")) == "(nothing)"
    assert reviews.text(tokens("bad bad bad bad bad")) == "bad bad bad bad bad …"


def test_demonstrations_without_slips_are_sentences_of_the_grammar(reviews, generator):
    prompts, completions = micro_review_demonstrations(2000, generator=generator, slip_prob=0.0)
    adjectives = ("good", "great", "bad", "awful", "fine", "slow", "funny")
    shapes = set()
    for completion in completions:
        words = reviews.text(completion).split()
        shapes.add(" ".join("A" if word in adjectives else word for word in words))
    assert shapes == {
        "A", "very A", "not A", "not very A", "A and A", "A but A", "very A and A",
        "A and very A", "A but not A",
    }  # fmt: skip
    assert prompts.dtype == completions.dtype == torch.int64
    within_five_errors(torch.bincount(prompts, minlength=4).double(), double([0.25] * 4), 2000)
    once = [reviews.text(completion).split() for completion in completions]
    singles = torch.tensor([[w == [a] for a in adjectives] for w in once]).sum(0).double()
    shares = double([4, 2, 3, 2, 4, 3, 3]) / 21 * 8 / 24  # its adjective, and "A" 8 times in 24
    within_five_errors(singles, shares, 2000)


def test_slips_put_any_word_anywhere(reviews, generator):
    _, completions = micro_review_demonstrations(4000, generator=generator, slip_prob=0.999)
    reviews.index(completions)  # every one is a completion still
    words = completions[:, 0]
    counts = torch.bincount(words, minlength=12)[1:].double()
    assert (words > 0).all()  # a slip never ends a sentence
    assert ((counts - 4000 / 11).abs() < 6 * math.sqrt(4000 / 11)).all()


# --- tiny sums and tiny sort -----------------------------------------------------------------


def read(prompt):
    """What a person answers to the text of a prompt."""
    digits = re.findall("[0-9]", prompt)
    return "".join(sorted(digits)) if "sort" in prompt else str(sum(map(int, digits)))


DIGIT_TASKS = [
    (tiny_sums, "{} + {} =", ["+", "="], tiny_sum_demonstrations),
    (tiny_sort, "sort {} {} =", ["sort", "="], tiny_sort_demonstrations),
]


@pytest.mark.parametrize(("make_task", "text", "symbols", "_"), DIGIT_TASKS)
def test_prompts_of_two_digits(make_task, text, symbols, _):
    task = make_task()
    assert task.prompt_texts == tuple(text.format(a, b) for a in range(10) for b in range(10))
    assert task.prompt_tokens.shape == (100, 4)
    words = [*map(str, range(10)), "<end>", *symbols]  # digits are the same token everywhere
    spelled = [" ".join(words[token] for token in row) for row in task.prompt_tokens.tolist()]
    assert spelled == list(task.prompt_texts)
    assert task.vocabulary == tuple(words[:11])
    assert task.end_token == words.index("<end>")
    assert task.ref_logps is None


@pytest.mark.parametrize("make_task", [tiny_sums, tiny_sort])
def test_only_the_right_digits_and_the_end_token_are_rewarded(make_task):
    task = make_task()
    assert task.completions.shape == (1 + 10 + 100 + 1000, 3) == (1111, 3)
    assert task.rewards.dtype == torch.float64
    assert torch.equal(task.index(task.completions), torch.arange(1111))
    texts = [task.text(completion) for completion in task.completions]
    assert len(set(texts)) == 1111
    want = [[float(said == read(prompt)) for said in texts] for prompt in task.prompt_texts]
    assert torch.equal(task.rewards, double(want))
    assert task.rewards.sum(1).tolist() == [1.0] * 100


def test_a_sum_with_a_zero_in_front_or_without_an_end_is_wrong():
    task, end = tiny_sums(), 10
    x = task.prompt_texts.index("5 + 2 =")
    answers = [[7, end, PAD], [0, 7, end], [7, 7, end], [7, 7, 7], [0, 0, 7], [end, PAD, PAD]]
    columns = task.index(torch.tensor(answers))
    assert task.rewards[x, columns].tolist() == [1, 0, 0, 0, 0, 0]
    texts = [task.text(task.completions[column]) for column in columns]
    assert texts == ["7", "07", "77", "777 …", "007 …", "(nothing)"]


def test_digits_are_a_number_only_among_themselves():
    task = Task(("x",), ("1", "2", "12", "to"), 2, None, torch.zeros(1, 16))
    texts = [task.text(torch.tensor(pair)) for pair in ([0, 1], [0, 3], [2, 1], [3, 3])]
    assert texts == ["12", "1 to", "12 2", "to to"]


def test_twenty_prompts_are_held_out_in_both_orders():
    held_out, training = held_out_prompts(), training_prompts()
    assert len(held_out) == len(HELD_OUT_PAIRS) == 20
    assert sorted([*held_out.tolist(), *training.tolist()]) == list(range(100))
    assert {(b, a) for a, b in HELD_OUT_PAIRS} == set(HELD_OUT_PAIRS)
    for make_task, text, _, _ in DIGIT_TASKS:
        texts = make_task().prompt_texts
        assert {texts[x] for x in held_out} == {text.format(*pair) for pair in HELD_OUT_PAIRS}
        seen = [re.findall("[0-9]", texts[x]) for x in training]
        for place in range(2):  # every digit is shown 8 times in each place
            assert sorted(digits[place] for digits in seen) == sorted("0123456789" * 8)
    answers = [read(text) for text in tiny_sums().prompt_texts]
    assert {answers[x] for x in held_out} <= {answers[x] for x in training}
    assert sum(len(answers[x]) == 2 for x in held_out) == 9  # a fifth of all 45, as of all prompts
    assert sum(len(answer) == 2 for answer in answers) == 45


# by hand, prompt by prompt
MISTAKES = {
    "9 + 3 =": "2 21 1 11 13",
    "9 + 9 =": "8 81 1 17 19",
    "4 + 6 =": "0 01 1 9 11",
    "5 + 6 =": "1 10 12",
    "3 + 4 =": "17 6 8",
    "9 + 0 =": "19 8 10",
    "0 + 0 =": "10 1",
    "sort 8 3 =": "83 3 8 33 88",
    "sort 5 6 =": "65 5 6 55 66",
    "sort 1 0 =": "10 0 1 00 11",
    "sort 0 0 =": "0",
}


@pytest.mark.parametrize("right_prob", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize(("make_task", "text", "_", "draw"), DIGIT_TASKS)
def test_demonstrations_are_right_with_a_stated_probability(
    make_task, text, _, draw, right_prob, generator
):
    task, n = make_task(), 40_000
    prompts, completions = draw(n, generator=generator, right_prob=right_prob)
    assert prompts.dtype == completions.dtype == torch.int64
    assert (completions == task.end_token).any(1).all()
    columns = task.index(completions)
    right = task.rewards[prompts, columns]
    within_five_errors(right.sum(), double(right_prob), n)
    even = torch.zeros(100).double().index_fill(0, training_prompts(), 1 / 80)
    within_five_errors(torch.bincount(prompts, minlength=100).double(), even, n)
    for prompt in [prompt for prompt in MISTAKES if ("sort" in prompt) == ("sort" in text)]:
        mistakes = MISTAKES[prompt].split()
        said = [task.text(row) for row in completions[prompts == task.prompt_texts.index(prompt)]]
        counts = double([said.count(answer) for answer in [read(prompt), *mistakes]])
        assert counts.sum() == len(said)  # nothing else was said
        shares = [right_prob, *[(1 - right_prob) / len(mistakes)] * len(mistakes)]
        within_five_errors(counts, double(shares), len(said))


KINDS_OF_MISTAKES = {
    "+": {
        "a carry forgotten or not there": lambda said, want: abs(int(said) - int(want)) == 10,
        "swapped": lambda said, want: said == want[::-1],
        "one left out": lambda said, want: len(said) == 1 and said in want,
        "off by one": lambda said, want: abs(int(said) - int(want)) == 1,
    },
    "sort": {
        "not sorted": lambda said, want: said == want[::-1],
        "one left out": lambda said, want: len(said) == 1 and said in want,
        "one doubled": lambda said, want: said in (want[0] * 2, want[1] * 2),
    },
}


@pytest.mark.parametrize(("make_task", "_", "symbols", "draw"), DIGIT_TASKS)
def test_wrong_demonstrations_are_mistakes_of_each_kind(make_task, _, symbols, draw, generator):
    task, kinds = make_task(), KINDS_OF_MISTAKES[symbols[0]]
    seen = set()
    prompts, completions = draw(5_000, generator=generator, right_prob=0.0)
    for x, completion in zip(prompts.tolist(), completions, strict=True):
        said, want = task.text(completion), read(task.prompt_texts[x])
        found = {name for name, is_one in kinds.items() if is_one(said, want)}
        assert said != want
        assert found, (said, want)
        seen |= found
    assert seen == set(kinds)


def test_a_prompt_of_other_tasks_is_one_token_after_the_vocabulary(reviews, generator):
    assert reviews.prompt_tokens.tolist() == [[12], [13], [14], [15]]
    assert four_answers().prompt_tokens.tolist() == [[4]]
    assert random_bandit(3, 5, generator=generator).prompt_tokens.tolist() == [[5], [6], [7]]
    moved = dataclasses.replace(four_answers(), rewards=torch.ones(1, 4).double())
    assert moved.prompt_tokens.tolist() == [[4]]


def test_a_model_for_a_task_reads_its_prompt_tokens(generator):
    same = torch.tensor([[0, 1], [5, 1], [0, 1]])  # the first prompt is the third
    task = Task(("x", "y", "z"), ("a", "b"), 2, None, torch.zeros(3, 4), prompt_tokens=same)
    policy = TinyTransformer.for_task(task, generator=generator)
    first, second, third = enumerate_logps(policy, task)
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)
    reward_model = RewardModel.for_task(task, generator=generator)
    torch.nn.init.ones_(reward_model.head.weight)
    first, second, third = enumerate_rewards(reward_model, task)
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)


def test_a_task_says_in_a_line_what_it_is(reviews):
    assert repr(four_answers()) == (
        "<Task: 1 prompt ('x1'); 4 completions of 1 token from 4 words ('a', …); with a table for "
        "its reference>"
    )
    assert repr(reviews) == (
        "<Task: 4 prompts ('the film was', …); 177,156 completions of at most 5 tokens from 12 "
        "words ('<end>', …); without a table for its reference>"
    )
    assert repr(Task(("x", "y"), ("a", "b"), 3, None, torch.zeros(2, 8))) == (
        "<Task: 2 prompts ('x', …); 8 completions of 3 tokens from 2 words ('a', …); without a "
        "table for its reference>"
    )


# --- what is refused -------------------------------------------------------------------------

HALF = double([[0.5, 0.5]]).log()
TASK = bandit(torch.zeros(1, 2).double(), HALF.exp())
SENTENCES = Task(("x",), ("<end>", "a", "b"), 2, 0, torch.zeros(1, 7))
GENERATOR = torch.Generator()
FULL = torch.full((1, 2), 0.5)


def make(**changes):
    values = {"prompt_texts": ("x",), "vocabulary": ("a", "b"), "max_tokens": 1, "end_token": None}
    return Task(**{**values, "rewards": torch.zeros(1, 2).double(), **changes})


KINDS = "`rewards` must be a floating torch.Tensor [X, Y], an array or a list of numbers, got "
REFUSED = [
    (lambda: make(rewards=[[0.0]]), "`rewards` must be a floating torch.Tensor [X, Y], got list"),
    (lambda: make(rewards=torch.zeros(1, 3)), "`rewards` must have shape [1, 2], got [1, 3]"),
    (lambda: make(rewards=torch.tensor([[0, NAN]])), "`rewards` must be finite, got nan"),
    (
        lambda: make(ref_logps=HALF[0]),
        "`ref_logps` must be [X, Y], one row per prompt, got shape [2]: for one prompt write "
        "ref_logps[None]",
    ),
    (
        lambda: make(rewards=torch.zeros(2)),
        "`rewards` must be [X, Y], one row per prompt, got shape [2]: for one prompt write "
        "rewards[None]",
    ),
    (
        lambda: make(rewards=torch.zeros(1, 2).to_sparse()),
        "`rewards` must be a dense tensor (.to_dense() makes one), got layout torch.sparse_coo",
    ),
    (
        lambda: make(rewards=torch.zeros(1, 2, dtype=torch.complex64)),
        "`rewards` must have a floating dtype (.double() makes one), got torch.complex64",
    ),
    (lambda: make(prompt_texts="x"), "`prompt_texts` must be a sequence of str, got str"),
    (lambda: make(prompt_texts=None), "`prompt_texts` must be a sequence of str, got NoneType"),
    (lambda: make(vocabulary=("a", 1)), "`vocabulary` must be a sequence of str, got int in it"),
    (
        lambda: make(prompt_tokens=[[2]]),
        "`prompt_tokens` must be an int64 tensor [X, P], got list",
    ),
    (
        lambda: make(prompt_tokens=torch.tensor([2])),
        "`prompt_tokens` must be a non-empty [X, P], got shape [1]",
    ),
    (
        lambda: make(prompt_tokens=torch.zeros(1, 0, dtype=torch.int64)),
        "`prompt_tokens` must be a non-empty [X, P], got shape [1, 0]",
    ),
    (
        lambda: make(prompt_tokens=torch.tensor([[2.0]])),
        "`prompt_tokens` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: make(prompt_tokens=torch.tensor([[2, 3], [2, 4]])),
        "`prompt_tokens` must be [1, P], got [2, 2]",
    ),
    (
        lambda: make(prompt_tokens=torch.tensor([[2, -1]])),
        "`prompt_tokens` must be tokens >= 0, got -1",
    ),
    (
        lambda: make(ref_logps=HALF.float()),
        "`ref_logps` must have dtype torch.float64 like `rewards`, "
        "got torch.float32: write ref_logps.to(torch.float64)",
    ),
    (lambda: make(ref_logps=HALF * NAN), "`ref_logps` must be log-probabilities < inf, got NaN"),
    (
        lambda: make(ref_logps=HALF * 0),
        "`ref_logps` must have rows whose probabilities sum to 1, got a sum of 2: "
        "if these are logits, apply log_softmax first",
    ),
    (lambda: make(end_token=2), "`end_token` must be None or in 0..1, got 2"),
    (lambda: make(end_token=-1), "`end_token` must be a whole number >= 0, got -1"),
    (lambda: make(end_token=0.0), "`end_token` must be a whole number >= 0, got float"),
    (lambda: make(max_tokens=0), "`max_tokens` must be a whole number >= 1, got 0"),
    (lambda: make(max_tokens=1.0), "`max_tokens` must be a whole number >= 1, got float"),
    (lambda: make(vocabulary=()), "`vocab_size` must be a whole number >= 1, got 0"),
    (
        lambda: enumerate_completions(10, 8, None),
        "`max_tokens` must leave at most 20,000,000 completions, got 8 with 10 tokens, which gives "
        "about 10^8.0",
    ),
    (
        lambda: enumerate_completions(10, 5000, None),  # a number that Python does not print
        "`max_tokens` must leave at most 20,000,000 completions, got 5000 with 10 tokens, which "
        "gives about 10^5000.0",
    ),
    (
        lambda: enumerate_completions(2, 10**30, 0),
        "`max_tokens` must be a whole number <= 10,000, got "
        "1,000,000,000,000,000,000,000,000,000,000",
    ),
    (
        lambda: subtree_sizes(1, 10_001, None),
        "`max_tokens` must be a whole number <= 10,000, got 10,001",
    ),
    (lambda: SENTENCES.text([1, 0]), "`completion` must be an int64 tensor [T], got list"),
    (lambda: SENTENCES.text(torch.tensor([1])), "`completions` must have T = 2 columns, got 1"),
    (lambda: SENTENCES.text(torch.tensor([1, 3])), "`completions` must have tokens in 0..2, got 3"),
    (
        lambda: SENTENCES.index(torch.tensor([[-2, 0]])),
        "`completions` must have tokens in 0..2, got -2",
    ),
    (
        lambda: SENTENCES.index(torch.tensor([[1, 0], [1, PAD]])),
        "`completions` must have an end token or T tokens, got row 1 cut short",
    ),
    (
        lambda: SENTENCES.index(torch.tensor([[0, 1]])),
        "`completions` must have only padding (-1) after the end token 0, "
        "got a token there in row 0",
    ),
    (
        lambda: SENTENCES.index(torch.tensor([[PAD, PAD]])),
        "`completions` must have at least one token in each row, got none in row 0",
    ),
    (
        lambda: TASK.index(torch.tensor([[0.0]])),
        "`completions` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: TASK.sample_pairs(HALF, 0, generator=GENERATOR),
        "`n` must be a whole number >= 1, got 0",
    ),
    (
        lambda: TASK.sample_pairs(HALF, 1, generator=None),
        "`generator` must be a torch.Generator, got NoneType",
    ),
    (
        lambda: TASK.sample_pairs(HALF[:, :1], 1, generator=GENERATOR),
        "`logps` must have shape [1, 2], got [1, 1]",
    ),
    (
        lambda: TASK.sample_pairs(HALF * 0, 1, generator=GENERATOR),
        "`logps` must have rows whose probabilities sum to 1, got a sum of 2: "
        "if these are logits, apply log_softmax first",
    ),
    (
        lambda: TASK.sample_pairs(double([[1.0, 0.0]]).log(), 1, generator=GENERATOR),
        "`logps` must give mass to 2 completions of every prompt, got a row with all on one",
    ),
    (
        lambda: TASK.sample_pairs(double([[-INF, -INF, 0.0]])[:, 1:], 1, generator=GENERATOR),
        "`logps` must give mass to 2 completions of every prompt, got a row with all on one",
    ),
    (
        lambda: TASK.sample_pairs(HALF.to_sparse(), 1, generator=GENERATOR),
        "`logps` must be a dense tensor (.to_dense() makes one), got layout torch.sparse_coo",
    ),
    (
        lambda: TASK.sample_completions(HALF[0], torch.tensor([0]), generator=GENERATOR),
        "`logps` must be [X, Y], one row per prompt, got shape [2]: for one prompt write "
        "logps[None]",
    ),
    (
        lambda: TASK.sample_completions(HALF, torch.tensor([[0]]), generator=GENERATOR),
        "`prompts` must be a non-empty [B], got shape [1, 1]",
    ),
    (
        lambda: TASK.sample_completions(HALF, torch.tensor([1]), generator=GENERATOR),
        "`prompts` must be in 0..0, got 1",
    ),
    (
        lambda: TASK.sample_completions(HALF * NAN, torch.tensor([0]), generator=GENERATOR),
        "`logps` must be log-probabilities < inf, got NaN",
    ),
    (
        lambda: TASK.sample_completions(HALF, torch.tensor([0]), generator=None),
        "`generator` must be a torch.Generator, got NoneType",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])),
        "`ref_probs` must be positive, got a probability <= 0 or NaN",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), FULL * 1.5),
        "`ref_probs` must have rows that sum to 1, got one that sums to 1.5",
    ),
    (
        lambda: bandit(torch.zeros(3, 2), torch.tensor([[0.5, 0.5], [1.0, 1.5], [0.5, 0.4]])),
        "`ref_probs` must have rows that sum to 1, got one that sums to 2.5",
    ),
    (
        lambda: bandit(torch.zeros(4), torch.full((4,), 0.25)),
        "`rewards` must be [X, Y], one row per prompt, got shape [4]: for one prompt write "
        "rewards[None]",
    ),
    (
        lambda: bandit([[1.0, 0.0]], [0.5, 0.5]),
        "`ref_probs` must be [X, Y], one row per prompt, got shape [2]: for one prompt write "
        "ref_probs[None]",
    ),
    (
        lambda: bandit([[1.0, 0.0], [1.0]], FULL),
        KINDS + "list",
    ),
    (lambda: bandit(None, FULL), KINDS + "NoneType"),
    (lambda: bandit("ab", FULL), KINDS + "str"),
    (
        lambda: bandit([[True, False]], FULL),
        KINDS + "list",
    ),
    (
        lambda: bandit([[10**30, 1]], FULL),
        KINDS + "list",
    ),
    (
        lambda: bandit(torch.zeros(1, 2).long(), FULL),
        "`rewards` must have a floating dtype (.double() makes one), got torch.int64",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), FULL.to_sparse()),
        "`ref_probs` must be a dense tensor (.to_dense() makes one), got layout torch.sparse_coo",
    ),
    (
        lambda: bandit(torch.zeros(1, 3), FULL),
        "`ref_probs` must have shape [1, 3] like `rewards`, got [1, 2]",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), FULL, actions=["only"]),
        "`actions` must be 2 names, got 1",
    ),
    (lambda: bandit(FULL, FULL, actions=[]), "`actions` must be 2 names, got 0"),
    (lambda: bandit(FULL, FULL, prompts=["a", "b"]), "`prompts` must be 1 names, got 2"),
    (
        lambda: bandit(FULL, FULL, prompts="a"),
        "`prompts` must be a sequence of str, got str",
    ),
    (
        lambda: bandit(FULL, FULL, prompts=[7]),
        "`prompts` must be a sequence of str, got int in it",
    ),
    (
        lambda: random_bandit(0, 2, generator=GENERATOR),
        "`n_prompts` must be a whole number >= 1, got 0",
    ),
    (
        lambda: random_bandit(2, 0, generator=GENERATOR),
        "`n_actions` must be a whole number >= 1, got 0",
    ),
    (lambda: random_bandit(2, 2, generator=7), "`generator` must be a torch.Generator, got int"),
    (
        lambda: micro_review_demonstrations(0, generator=GENERATOR),
        "`n` must be a whole number >= 1, got 0",
    ),
    (
        lambda: micro_review_demonstrations(1, generator=GENERATOR, slip_prob=1.0),
        "`slip_prob` must be a number in [0.0, 1.0), got 1.0",
    ),
    (
        lambda: micro_review_demonstrations(1, generator=None),
        "`generator` must be a torch.Generator, got NoneType",
    ),
    (
        lambda: tiny_sum_demonstrations(0, generator=GENERATOR),
        "`n` must be a whole number >= 1, got 0",
    ),
    (
        lambda: tiny_sum_demonstrations(1, generator=GENERATOR, right_prob=1.1),
        "`right_prob` must be a number in [0, 1], got 1.1",
    ),
    (
        lambda: tiny_sort_demonstrations(1, generator=GENERATOR, right_prob=NAN),
        "`right_prob` must be a number in [0, 1], got nan",
    ),
    (
        lambda: tiny_sort_demonstrations(1, generator=None),
        "`generator` must be a torch.Generator, got NoneType",
    ),
]


@pytest.mark.parametrize(("call", "want"), REFUSED)
def test_bad_input_is_refused(call, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == want

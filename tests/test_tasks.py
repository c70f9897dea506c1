"""Enumeration against a recursion, draws against exact probabilities, rewards against reading."""

import itertools
import math

import pytest
import torch

from dpo_mini.logps import PAD
from dpo_mini.preferences import bradley_terry_prob
from dpo_mini.tasks import (
    REVIEW_PROMPTS,
    REVIEW_WORDS,
    Task,
    bandit,
    enumerate_completions,
    four_answers,
    micro_review_demonstrations,
    micro_reviews,
    random_bandit,
    subtree_sizes,
    three_answers,
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


def test_a_vocabulary_of_one_cannot_also_end():
    with pytest.raises(ValueError, match="vocab_size: got 1, takes a whole number >= 2"):
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
        lambda generator: [random_bandit(2, 3, generator=generator).rewards],
    ):
        before = torch.get_rng_state()
        first, same, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


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


# --- what is refused -------------------------------------------------------------------------

HALF = double([[0.5, 0.5]]).log()
TASK = bandit(torch.zeros(1, 2).double(), HALF.exp())
SENTENCES = Task(("x",), ("<end>", "a", "b"), 2, 0, torch.zeros(1, 7))
GENERATOR = torch.Generator()
FULL = torch.full((1, 2), 0.5)


def make(**changes):
    values = {"prompt_texts": ("x",), "vocabulary": ("a", "b"), "max_tokens": 1, "end_token": None}
    return Task(**{**values, "rewards": torch.zeros(1, 2).double(), **changes})


REFUSED = [
    (lambda: make(rewards=[[0.0]]), "rewards: got list, takes a floating torch.Tensor [X, Y]"),
    (lambda: make(rewards=torch.zeros(1, 3)), "rewards: got shape [1, 3], takes [1, 2]"),
    (lambda: make(rewards=torch.tensor([[0, NAN]])), "rewards: got nan, takes finite values"),
    (
        lambda: make(ref_logps=HALF[0]),
        "`ref_logps` must be [X, Y], got shape [2]: for one prompt write ref_logps[None]",
    ),
    (
        lambda: make(ref_logps=HALF.float()),
        "`ref_logps` must have dtype torch.float64 like `rewards`, "
        "got torch.float32: write ref_logps.to(torch.float64)",
    ),
    (lambda: make(ref_logps=HALF * NAN), "ref_logps: got NaN, takes log-probabilities < inf"),
    (
        lambda: make(ref_logps=HALF * 0),
        "ref_logps: got a row whose probabilities sum to 2, takes rows that sum to 1 "
        "(logits? apply log_softmax first)",
    ),
    (lambda: make(end_token=2), "end_token: got 2, takes None or 0..1"),
    (lambda: make(end_token=-1), "end_token: got -1, takes a whole number >= 0"),
    (lambda: make(end_token=0.0), "end_token: got float, takes a whole number >= 0"),
    (lambda: make(max_tokens=0), "max_tokens: got 0, takes a whole number >= 1"),
    (lambda: make(max_tokens=1.0), "max_tokens: got float, takes a whole number >= 1"),
    (lambda: make(vocabulary=()), "vocab_size: got 0, takes a whole number >= 1"),
    (
        lambda: enumerate_completions(10, 8, None),
        "max_tokens: got 8 with 10 tokens, which gives 100000000 completions; takes a task of at "
        "most 20,000,000",
    ),
    (lambda: SENTENCES.text([1, 0]), "completion: got list, takes an int64 tensor [T]"),
    (lambda: SENTENCES.text(torch.tensor([1])), "completions: got 1 columns, takes T = 2"),
    (lambda: SENTENCES.text(torch.tensor([1, 3])), "completions: got token 3, takes 0..2"),
    (lambda: SENTENCES.index(torch.tensor([[-2, 0]])), "completions: got token -2, takes 0..2"),
    (
        lambda: SENTENCES.index(torch.tensor([[1, 0], [1, PAD]])),
        "completions: got row 1 cut short, takes an end token or T tokens",
    ),
    (
        lambda: SENTENCES.index(torch.tensor([[0, 1]])),
        "completions: got a token after the end token 0 in row 0, takes only padding (-1) there",
    ),
    (
        lambda: SENTENCES.index(torch.tensor([[PAD, PAD]])),
        "completions: got an empty completion in row 0, takes >= 1 token",
    ),
    (
        lambda: TASK.index(torch.tensor([[0.0]])),
        "`completions` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: TASK.sample_pairs(HALF, 0, generator=GENERATOR),
        "n: got 0, takes a whole number >= 1",
    ),
    (
        lambda: TASK.sample_pairs(HALF, 1, generator=None),
        "generator: got NoneType, takes a torch.Generator",
    ),
    (
        lambda: TASK.sample_pairs(HALF[:, :1], 1, generator=GENERATOR),
        "logps: got shape [1, 1], takes [1, 2]",
    ),
    (
        lambda: TASK.sample_pairs(HALF * 0, 1, generator=GENERATOR),
        "logps: got a row whose probabilities sum to 2, takes rows that sum to 1 "
        "(logits? apply log_softmax first)",
    ),
    (
        lambda: TASK.sample_pairs(double([[1.0, 0.0]]).log(), 1, generator=GENERATOR),
        "logps: got a row with all its mass on one completion, takes >= 2",
    ),
    (
        lambda: TASK.sample_completions(HALF[0], torch.tensor([0]), generator=GENERATOR),
        "`logps` must be [X, Y], got shape [2]: for one prompt write logps[None]",
    ),
    (
        lambda: TASK.sample_completions(HALF, torch.tensor([[0]]), generator=GENERATOR),
        "prompts: got shape [1, 1], takes a non-empty [B]",
    ),
    (
        lambda: TASK.sample_completions(HALF, torch.tensor([1]), generator=GENERATOR),
        "prompts: got 1, takes values in 0..0",
    ),
    (
        lambda: TASK.sample_completions(HALF * NAN, torch.tensor([0]), generator=GENERATOR),
        "logps: got NaN, takes log-probabilities < inf",
    ),
    (
        lambda: TASK.sample_completions(HALF, torch.tensor([0]), generator=None),
        "generator: got NoneType, takes a torch.Generator",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])),
        "ref_probs: got a probability <= 0 or NaN, takes positive ones",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), FULL * 1.5),
        "ref_probs: got a row that sums to 1.5, takes rows that sum to 1",
    ),
    (
        lambda: bandit(torch.zeros(3, 2), torch.tensor([[0.5, 0.5], [1.0, 1.5], [0.5, 0.4]])),
        "ref_probs: got a row that sums to 2.5, takes rows that sum to 1",
    ),
    (
        lambda: bandit(torch.zeros(1), torch.ones(1)),
        "`rewards` must be [X, Y], got shape [1]: for one prompt write rewards[None]",
    ),
    (
        lambda: bandit(torch.zeros(1, 3), FULL),
        "ref_probs: got shape [1, 2], takes [1, 3] like rewards",
    ),
    (
        lambda: bandit(torch.zeros(1, 2), FULL, actions=["only"]),
        "actions: got 1 names, takes 2, one a column",
    ),
    (
        lambda: random_bandit(0, 2, generator=GENERATOR),
        "n_prompts: got 0, takes a whole number >= 1",
    ),
    (
        lambda: random_bandit(2, 0, generator=GENERATOR),
        "n_actions: got 0, takes a whole number >= 1",
    ),
    (lambda: random_bandit(2, 2, generator=7), "generator: got int, takes a torch.Generator"),
    (
        lambda: micro_review_demonstrations(0, generator=GENERATOR),
        "n: got 0, takes a whole number >= 1",
    ),
    (
        lambda: micro_review_demonstrations(1, generator=GENERATOR, slip_prob=1.0),
        "slip_prob: got 1.0, takes a number in [0.0, 1.0)",
    ),
    (
        lambda: micro_review_demonstrations(1, generator=None),
        "generator: got NoneType, takes a torch.Generator",
    ),
]


@pytest.mark.parametrize(("call", "want"), REFUSED)
def test_bad_input_is_refused(call, want):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == want

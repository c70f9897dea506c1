"""Outcome probabilities against their definitions, and draws against the probabilities."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.preferences import (
    bradley_terry_prob,
    davidson_probs,
    plackett_luce_logp,
    sample_bradley_terry,
    sample_plackett_luce,
    sample_thurstone,
    thurstone_prob,
)

NAN, INF = float("nan"), float("inf")


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def exact(got, want):
    assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.fixture
def rewards(generator):
    return 2 * torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)


# --- probabilities ---------------------------------------------------------------------------


def test_bradley_terry_compares_worths(rewards):
    a, b = rewards
    exact(bradley_terry_prob(a, b), a.exp() / (a.exp() + b.exp()))
    exact(bradley_terry_prob(a, b) + bradley_terry_prob(b, a), torch.ones(3, 4).double())
    exact(bradley_terry_prob(double([math.log(3)]), double([0.0])), double([0.75]))


def test_thurstone_is_the_gaussian_distribution_function(rewards):
    a, b = rewards
    want = [[0.5 * (1 + math.erf(d / 2)) for d in row] for row in (a - b).tolist()]
    exact(thurstone_prob(a, b), double(want))
    exact(thurstone_prob(a, b) + thurstone_prob(b, a), torch.ones(3, 4).double())


def test_thurstone_counts_noise_on_both_rewards(generator):
    noise = torch.randn(2, 200_000, dtype=torch.float64, generator=generator)
    wins = (0.8 + noise[0] > noise[1]).double().mean().item()
    want = thurstone_prob(double([0.8]), double([0.0])).item()
    assert abs(wins - want) < 5 * math.sqrt(want * (1 - want) / 200_000)


@pytest.mark.parametrize("tie_weight", [0.1, 1.0, 5.0])
def test_davidson_splits_in_proportion(rewards, tie_weight):
    a, b = rewards
    probs = davidson_probs(a, b, tie_weight=tie_weight)
    exact(probs.sum(-1), torch.ones(3, 4).double())
    exact(probs[..., 0] / probs[..., 2], (a - b).exp())
    exact(probs[..., 1] ** 2, tie_weight**2 * probs[..., 0] * probs[..., 2])
    exact(
        probs[..., 0] / (probs[..., 0] + probs[..., 2]), bradley_terry_prob(a, b)
    )  # ties set aside
    equal = davidson_probs(a, a, tie_weight=tie_weight)[..., 1]
    exact(equal, torch.full((3, 4), tie_weight / (2 + tie_weight), dtype=torch.float64))


def test_plackett_luce_sums_to_one_over_all_rankings(rewards):
    total = 0
    for order in itertools.permutations(range(4)):
        total = total + plackett_luce_logp(rewards[0], torch.tensor([order] * 3)).exp()
    exact(total, torch.ones(3).double())


def test_plackett_luce_draws_without_replacement(rewards):
    order = [2, 0, 3, 1]
    got = plackett_luce_logp(rewards[0], torch.tensor([order] * 3))
    for row, logp in zip(rewards[0].exp().tolist(), got.tolist(), strict=True):
        left, prob = sum(row), 1.0
        for item in order:
            prob *= row[item] / left
            left -= row[item]
        assert math.exp(logp) == pytest.approx(prob, rel=1e-9)


def test_plackett_luce_of_two_is_bradley_terry(rewards):
    two = rewards[0][:, :2]
    got = plackett_luce_logp(two, torch.tensor([[1, 0]] * 3))
    exact(got.exp(), bradley_terry_prob(two[:, 1], two[:, 0]))


def test_probabilities_are_finite_far_away():
    far, near = torch.tensor([1e4, -1e4]), torch.tensor([0.0, 0.0])
    assert bradley_terry_prob(far, near).tolist() == [1.0, 0.0]
    assert thurstone_prob(far, near).tolist() == [1.0, 0.0]
    assert davidson_probs(far, near, tie_weight=1.0)[:, 0].tolist() == [1.0, 0.0]
    items = torch.tensor([[1e4, -1e4, 0.0]])
    assert plackett_luce_logp(items, torch.tensor([[0, 2, 1]])).tolist() == [0.0]
    assert plackett_luce_logp(items, torch.tensor([[1, 2, 0]])).tolist() == [-3e4]


def test_gradients(rewards):
    a, b = rewards[0].clone().requires_grad_(), rewards[1].clone().requires_grad_()
    assert gradcheck(bradley_terry_prob, (a, b))
    assert gradcheck(thurstone_prob, (a, b))
    assert gradcheck(partial(davidson_probs, tie_weight=0.5), (a, b))
    assert gradcheck(lambda a: plackett_luce_logp(a, torch.tensor([[3, 1, 0, 2]] * 3)), a)


def test_shape_and_dtype_are_kept():
    for shape in ((), (2,), (2, 3, 4)):
        a, b = torch.ones(shape), torch.zeros(shape)
        for prob in (bradley_terry_prob(a, b), thurstone_prob(a, b)):
            assert prob.shape == shape
            assert prob.dtype == torch.float32
        assert davidson_probs(a, b, tie_weight=1.0).shape == (*shape, 3)


# --- draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "prob"),
    [(sample_bradley_terry, bradley_terry_prob), (sample_thurstone, thurstone_prob)],
)
def test_winners_are_drawn_as_often_as_they_should(sample, prob, generator):
    a, b = double([0.5, -1.0, 0.0, 3.0]), double([0.0, 0.0, 0.0, 0.0])
    n = 50_000
    wins = sample(a.expand(n, 4), b.expand(n, 4), generator=generator)
    assert wins.dtype == torch.bool
    want = prob(a, b)
    errors = (wins.double().mean(0) - want) / (want * (1 - want) / n).sqrt()
    assert (errors.abs() < 5).all()


def test_rankings_are_drawn_as_often_as_they_should(generator):
    rewards, n = double([[1.0, 0.0, -0.5, 0.3]]), 60_000
    drawn = sample_plackett_luce(rewards.expand(n, 4), generator=generator)
    rankings = torch.tensor(list(itertools.permutations(range(4))))
    counts = (drawn[:, None] == rankings).all(-1).sum(0).double()
    assert counts.sum() == n
    expected = n * plackett_luce_logp(rewards.expand(24, 4), rankings).exp()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 49.7  # of 23 degrees of freedom, exceeded once in a thousand seeds


def test_a_draw_depends_on_its_generator_only():
    a, b = torch.zeros(500), torch.zeros(500)
    lists = torch.zeros(100, 5)
    for draw in (
        lambda generator: sample_bradley_terry(a, b, generator=generator),
        lambda generator: sample_thurstone(a, b, generator=generator),
        lambda generator: sample_plackett_luce(lists, generator=generator),
    ):
        before = torch.get_rng_state()
        first, same, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


# --- what is refused -------------------------------------------------------------------------

A, LIST = torch.zeros(3), torch.zeros(2, 3)
ORDER = torch.tensor([[0, 1, 2], [2, 1, 0]])
GENERATOR = torch.Generator()
KINDS = "a floating torch.Tensor [...], an array or a list of numbers"
OF_TWO = {
    "bradley_terry_prob": bradley_terry_prob,
    "thurstone_prob": thurstone_prob,
    "davidson_probs": partial(davidson_probs, tie_weight=1.0),
    "sample_bradley_terry": partial(sample_bradley_terry, generator=GENERATOR),
    "sample_thurstone": partial(sample_thurstone, generator=GENERATOR),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_bad_rewards_are_refused(name):
    for arguments, kind, want in (
        (("0", A), TypeError, f"`rewards_a` must be {KINDS}, got str"),
        ((A, None), TypeError, f"`rewards_b` must be {KINDS}, got NoneType"),
        (([0.0], A), ValueError, "`rewards_b` must have shape [1] like `rewards_a`, got [3]"),
        (
            (A.long(), A),
            ValueError,
            "`rewards_a` must have a floating dtype (.double() makes one), got torch.int64",
        ),
        (
            (A, A.double()),
            ValueError,
            "`rewards_b` must have dtype torch.float32 like `rewards_a`, "
            "got torch.float64: write rewards_b.to(torch.float32)",
        ),
        ((A, A[:2]), ValueError, "`rewards_b` must have shape [3] like `rewards_a`, got [2]"),
        (
            (A, A[:, None]),
            ValueError,
            "`rewards_b` must have shape [3] like `rewards_a`, got [3, 1]",
        ),
        ((A[:0], A[:0]), ValueError, "`rewards_a` must be a non-empty [...], got shape [0]"),
        ((A + NAN, A), ValueError, "`rewards_a` must be finite, got nan"),
        ((A, A - INF), ValueError, "`rewards_b` must be finite, got -inf"),
    ):
        with pytest.raises(kind) as caught:
            OF_TWO[name](*arguments)
        assert str(caught.value) == want


REFUSED = [
    (
        lambda: davidson_probs(A, A, tie_weight=0.0),
        "`tie_weight` must be a finite number > 0, got 0.0",
    ),
    (
        lambda: davidson_probs(A, A, tie_weight=NAN),
        "`tie_weight` must be a finite number > 0, got nan",
    ),
    (lambda: plackett_luce_logp(A, ORDER), "`rewards` must be a non-empty [B, K], got shape [3]"),
    (lambda: plackett_luce_logp(LIST + INF, ORDER), "`rewards` must be finite, got inf"),
    (
        lambda: plackett_luce_logp(LIST, A),
        "`ranking` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: plackett_luce_logp(LIST, ORDER[0]),
        "`ranking` must be a non-empty [B, K], got shape [3]",
    ),
    (
        lambda: plackett_luce_logp(LIST, ORDER[:1]),
        "`ranking` must have shape [2, 3] like `rewards`, got [1, 3]",
    ),
    (
        lambda: plackett_luce_logp(LIST[:, :1], ORDER * 0),
        "`rewards` must have at least 2 items per row, got 1",
    ),
    (
        lambda: plackett_luce_logp(LIST, torch.tensor([[0, 1, 2], [0, 1, 1]])),
        "`ranking` must have a permutation of 0..2 in each row, got none in row 1",
    ),
    (
        lambda: plackett_luce_logp(LIST, ORDER + 1),
        "`ranking` must have a permutation of 0..2 in each row, got none in row 0",
    ),
    (
        lambda: sample_plackett_luce(A, generator=GENERATOR),
        "`rewards` must be a non-empty [B, K], got shape [3]",
    ),
    (
        lambda: sample_plackett_luce(LIST[:, :1], generator=GENERATOR),
        "`rewards` must have at least 2 items per row, got 1",
    ),
    (
        lambda: sample_plackett_luce(LIST + NAN, generator=GENERATOR),
        "`rewards` must be finite, got nan",
    ),
]


@pytest.mark.parametrize(("call", "want"), REFUSED)
def test_bad_input_is_refused(call, want):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == want


def test_a_generator_is_required():
    for call in (
        lambda: sample_bradley_terry(A, A, generator=None),
        lambda: sample_thurstone(A, A, generator=None),
        lambda: sample_plackett_luce(LIST, generator=None),
    ):
        with pytest.raises(TypeError, match="`generator` must be a torch.Generator, got NoneType"):
            call()

"""Outcome probabilities against their definitions, and draws against the probabilities."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.closed_form import optimal_logps
from dpo_mini.preferences import (
    bradley_terry_prob,
    comparison_graph,
    davidson_probs,
    nash_logps,
    plackett_luce_logp,
    regularised_nash_logps,
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


# --- Nash policies ---------------------------------------------------------------------------

CYCLE = double([[0.5, 0.9, 0.3], [0.1, 0.5, 0.8], [0.7, 0.2, 0.5]])


def random_games(generator, n_games, size):
    """Matrices of preferences, which come from no rewards."""
    draws = torch.rand(n_games, size, size, dtype=torch.float64, generator=generator)
    return draws / (draws + draws.mT)


def by_supports(wins):
    """On some answers all play alike against the policy: linear equations for each support."""
    size = len(wins)
    found = []
    for count in range(1, size + 1, 2):  # the support of the only Nash policy is odd
        for support in itertools.combinations(range(size), count):
            rows = torch.cat([(wins - 0.5)[support, :][:, support], torch.ones(1, count)])
            ends = torch.zeros(count + 1, 1).index_fill(0, torch.tensor(count), 1.0)
            solved = torch.linalg.lstsq(rows, ends.double()).solution[:, 0]
            policy = torch.zeros(size).double()
            policy[list(support)] = solved
            if policy.min() >= 0 and (policy @ wins).min() > 0.5 - 1e-9:
                found.append(policy)
    assert len(found) == 1
    return found[0]


def test_the_nash_policy_of_a_cycle_by_hand():
    """Each answer as often as the margin between the two others: 0.3, 0.2 and 0.4."""
    exact(nash_logps(CYCLE).exp(), double([3 / 9, 2 / 9, 4 / 9]))
    exact(nash_logps(CYCLE).exp() @ CYCLE, double([0.5, 0.5, 0.5]))
    order = [2, 0, 1]
    exact(nash_logps(CYCLE[order][:, order]).exp(), double([4 / 9, 3 / 9, 2 / 9]))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_nash_policies_are_those_that_linear_algebra_finds(generator, size):
    games = random_games(generator, 6, size)
    got = nash_logps(games)
    assert got.shape == (6, size)
    for game, logps in zip(games, got, strict=True):
        assert_close(logps.exp(), by_supports(game), atol=1e-8, rtol=0)


def test_no_answer_beats_a_nash_policy(generator):
    games = random_games(generator, 4, 12)
    against = (nash_logps(games).exp().unsqueeze(-2) @ games).squeeze(-2)
    exact(against.amin(-1), torch.full((4,), 0.5).double())


def test_an_answer_that_beats_every_other_one_is_played_always(rewards):
    """Also where it is far from winning most in total; and so under Bradley-Terry the best."""
    wins = double([[0.5, 0.51, 0.51], [0.49, 0.5, 0.99], [0.49, 0.01, 0.5]])
    exact(nash_logps(wins).exp(), double([1.0, 0.0, 0.0]))
    table = rewards[0]
    games = bradley_terry_prob(*torch.broadcast_tensors(table.unsqueeze(-1), table.unsqueeze(-2)))
    assert torch.equal(nash_logps(games).argmax(-1), table.argmax(-1))
    exact(nash_logps(games).amax(-1), torch.zeros(3).double())


def test_among_answers_that_are_alike_nash_policies_are_not_unique():
    alike = torch.full((3, 3), 0.5).double()
    exact(nash_logps(alike).exp().sum(), double(1.0))
    ref_logps = double([0.5, 0.3, 0.2]).log()  # with a KL there is one: the reference
    for beta in (1.0, 1e-3):
        exact(regularised_nash_logps(alike, ref_logps, beta), ref_logps)
    # Two answers tie and both beat the third: of all their mixtures, the one nearest to pi_ref.
    two = double([[0.5, 0.5, 0.9], [0.5, 0.5, 0.8], [0.1, 0.2, 0.5]])
    assert nash_logps(two)[2] == -INF
    got = regularised_nash_logps(two, ref_logps, 1e-4)
    assert_close(got.exp(), double([0.625, 0.375, 0.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 30.0])
def test_a_regularised_nash_policy_is_its_own_best_reply(generator, beta):
    games = random_games(generator, 6, 5)
    ref_logps = torch.randn(6, 5, dtype=torch.float64, generator=generator).log_softmax(-1)
    got = regularised_nash_logps(games, ref_logps, beta)
    chances = (games @ got.exp().unsqueeze(-1)).squeeze(-1)
    assert_close(got, optimal_logps(ref_logps, chances, beta), atol=1e-11, rtol=0)
    one = regularised_nash_logps(games[2], ref_logps[2], double(beta))
    exact(one, got[2])


def test_a_regularised_nash_policy_is_where_small_steps_end():
    """The second route: replicator steps of both players, a little at a time."""
    ref_logps, beta = double([0.2, 0.5, 0.3]).log(), 0.3
    logps = ref_logps
    for _ in range(4000):
        step = CYCLE @ logps.exp() - beta * (logps - ref_logps)
        logps = (logps + 0.05 * step).log_softmax(-1)
    exact(regularised_nash_logps(CYCLE, ref_logps, beta), logps)


def test_regularised_nash_policies_lead_from_the_reference_to_nash(generator):
    ref_logps = double([0.2, 0.5, 0.3]).log()
    away = [
        (regularised_nash_logps(CYCLE, ref_logps, beta).exp() - end.exp()).abs().sum().item()
        for beta, end in ((1e4, ref_logps), (1e-5, nash_logps(CYCLE)))
    ]
    assert max(away) < 1e-4
    none = double([0.5, 0.0, 0.5]).log()
    got = regularised_nash_logps(CYCLE, none, 0.1)
    assert got[1] == -INF
    chance = (CYCLE @ got.exp())[[0, 2]] / 0.1
    exact(got[[0, 2]], chance.log_softmax(-1))


def test_nash_policies_do_not_read_the_diagonal_and_keep_the_dtype():
    moved, uniform = CYCLE + torch.eye(3), torch.full((3,), 1 / 3).log()
    exact(nash_logps(moved), nash_logps(CYCLE))
    regularised = regularised_nash_logps(CYCLE, uniform.double(), 0.1)
    exact(regularised_nash_logps(moved, uniform.double(), 0.1), regularised)
    assert nash_logps(CYCLE.float()).dtype == torch.float32
    assert regularised_nash_logps(CYCLE.float(), uniform, 0.1).dtype == torch.float32
    assert regularised_nash_logps(CYCLE.bfloat16(), uniform.bfloat16(), 0.1).dtype == torch.bfloat16


# --- comparison graphs -----------------------------------------------------------------------


def by_walks(edges):
    """Which answers a walk of at most as many steps as there are answers leads to, by sets."""
    size = len(edges)
    reached = []
    for start in range(size):
        seen = {start}
        for _ in range(size):
            seen |= {b for a in seen for b in range(size) if edges[a][b]}
        reached.append(seen)
    return reached


def test_a_comparison_graph_by_walks(generator):
    for size in (1, 2, 3, 5, 9):
        wins = torch.rand(40, size, size, generator=generator) * 2 * size
        wins = torch.where(wins < 1.6, wins, torch.zeros(()))
        got = comparison_graph(wins)
        for x, game in enumerate((wins > 0).tolist()):
            both = [[game[a][b] or game[b][a] for b in range(size)] for a in range(size)]
            linked, beaten = by_walks(both), by_walks(game)
            groups = [min(b for b in range(size) if b in linked[a]) for a in range(size)]
            strong = [
                min(b for b in range(size) if b in beaten[a] and a in beaten[b])
                for a in range(size)
            ]
            assert got.groups[x].tolist() == groups
            assert got.strong_groups[x].tolist() == strong
            assert got.connected[x].item() == (set(groups) == {0})
            assert got.strongly_connected[x].item() == (set(strong) == {0})


def test_counts_have_finite_rewards_where_the_wins_are_strongly_connected():
    """Zermelo's iteration settles there; where one part never lost, its worth grows on and on."""
    for losses_of_the_first, finite in ((1, True), (0, False)):
        wins = double([[0, 3, 0], [losses_of_the_first, 0, 2], [0, 4, 0]])
        graph = comparison_graph(wins)
        assert graph.connected
        assert graph.strongly_connected.item() == finite
        assert graph.strong_groups.tolist() == ([0, 0, 0] if finite else [0, 1, 1])
        worth = torch.ones(3).double()
        gaps = []
        for step in range(4001):
            if step % 2000 == 0:
                gaps.append((worth[0] / worth[1]).item())
            games = (wins + wins.T) / (worth[:, None] + worth)
            worth = wins.sum(1) / games.sum(1)
            worth = worth / worth[1:].prod().sqrt()
        if finite:
            assert gaps[1] == pytest.approx(3.0, rel=1e-9)  # on a chain each pair fits its counts
            assert gaps[2] == pytest.approx(3.0, rel=1e-12)
        else:
            assert gaps[2] > 1.5 * gaps[1] > 100


def test_a_comparison_graph_takes_whole_numbers_and_not_the_diagonal():
    counts = torch.tensor([[9, 1, 0], [0, 9, 0], [0, 0, 9]])
    for wins in (counts, counts.tolist(), counts.numpy(), counts.bool(), counts.float()):
        graph = comparison_graph(wins)
        assert not graph.connected
        assert graph.groups.tolist() == [0, 0, 2]
        assert graph.strong_groups.tolist() == [0, 1, 2]
    for size in (7, 9, 18):  # 0 beats 1 beats 2 ...: one long chain of comparisons
        path = torch.diag(torch.ones(size - 1), 1)
        graph = comparison_graph(torch.stack([path, path.T, path + path.T]))
        assert graph.connected.tolist() == [True] * 3
        assert graph.strongly_connected.tolist() == [False, False, True]


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


THIRDS = torch.full((3,), 1 / 3, dtype=torch.float64).log()
REFUSED = [
    (lambda: nash_logps(CYCLE[:2]), "`win_probs` must be [..., Y, Y], got shape [2, 3]"),
    (lambda: nash_logps(CYCLE + NAN), "`win_probs` must be finite, got nan"),
    (
        lambda: nash_logps(CYCLE + 0.1),
        "`win_probs` must be >= 0 and sum to 1 per pair, got 1 and 0.2",
    ),
    (
        lambda: nash_logps([[0.5, 1.1], [-0.1, 0.5]]),
        "`win_probs` must be >= 0 and sum to 1 per pair, got -0.1 and 1.1",
    ),
    (
        lambda: nash_logps(torch.full((21, 21), 0.5)),
        "`win_probs` must have at most 20 answers, got 21",
    ),
    (
        lambda: regularised_nash_logps(CYCLE, THIRDS[:2], 0.5),
        "`ref_logps` must have shape [3] like `win_probs`, got [2]",
    ),
    (
        lambda: regularised_nash_logps(CYCLE, THIRDS + 1, 0.5),
        "`ref_logps` must have rows whose probabilities sum to 1, got a sum of 2.718: "
        "if these are logits, apply log_softmax first",
    ),
    (
        lambda: regularised_nash_logps(CYCLE, THIRDS, 0.0),
        "`beta` must be a finite number > 0, got 0.0",
    ),
    (
        lambda: regularised_nash_logps([[0.5, 1.0], [0.0, 0.5]], THIRDS[:2] + math.log(1.5), 1e-9),
        "`beta` must be larger for these `win_probs`, got 1e-09, whose Nash policy was not found "
        "to rounding",
    ),
    (lambda: comparison_graph(A), "`wins` must be [..., Y, Y], got shape [3]"),
    (lambda: comparison_graph(-CYCLE), "`wins` must be >= 0, got -0.9"),
    (lambda: comparison_graph(CYCLE + INF), "`wins` must be finite, got inf"),
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

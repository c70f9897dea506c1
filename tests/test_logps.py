"""The shift by one and the mask against a loop over plain floats, and what is refused."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.logps import (
    PAD,
    completion_mask,
    mean_over_tokens,
    sum_over_tokens,
    token_logps,
)

NAN, INF = float("nan"), float("inf")
# Two rows: a prompt of two tokens with three to follow, a prompt of one with two and padding.
TOKENS = torch.tensor([[4, 1, 0, 3, 2], [2, 3, 1, PAD, PAD]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()


@pytest.fixture
def logits(generator):
    return torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)


def exact(got, want):
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def changed(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


# --- completion_mask -------------------------------------------------------------------------


def test_the_mask_keeps_the_end_token_and_drops_the_padding():
    completions = torch.tensor([[3, 1, 0], [0, PAD, PAD], [2, 0, PAD], [1, 1, 1]])
    want = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert torch.equal(completion_mask(completions, 0), want)
    assert torch.equal(completion_mask(completions, None), want)
    assert torch.equal(completion_mask(torch.tensor([[0], [1]]), 0), torch.ones(2, 1).bool())


BAD_COMPLETIONS = [
    ([[1, 2], [PAD, PAD]], 0, "must have at least one token in each row, got none in row 1"),
    ([[1, 2], [PAD, 2]], 0, "must have at least one token in each row, got none in row 1"),
    (
        [[1, 2, 3], [1, PAD, 3]],
        0,
        f"must have padding ({PAD}) at the end only, got a token after it in row 1",
    ),
    (
        [[1, 2, 3, 1], [1, 2, PAD, 3]],
        0,
        f"must have padding ({PAD}) at the end only, got a token after it in row 1",
    ),
    (
        [[1, 2, 3], [1, 2, 0], [2, 0, 1]],
        0,
        f"must have only padding ({PAD}) after the end token 0, got a token there in row 2",
    ),
    (
        [[1, 2, 3], [3, 3, PAD]],
        3,
        f"must have only padding ({PAD}) after the end token 3, got a token there in row 1",
    ),
]


@pytest.mark.parametrize(("completions", "end_token", "want"), BAD_COMPLETIONS)
def test_a_malformed_completion_is_refused(completions, end_token, want):
    with pytest.raises(ValueError) as caught:
        completion_mask(torch.tensor(completions), end_token)
    assert str(caught.value) == f"`completions` {want}"


def test_completions_of_another_kind_are_refused():
    for bad, kind, want in (
        ([[1]], TypeError, "`completions` must be an int64 tensor [B, T], got list"),
        (
            torch.ones(1, 1),
            ValueError,
            "`completions` must have dtype torch.int64 (.long()), got torch.float32",
        ),
        (TOKENS[0], ValueError, "`completions` must be a non-empty [B, T], got shape [5]"),
        (TOKENS[:0], ValueError, "`completions` must be a non-empty [B, T], got shape [0, 5]"),
    ):
        with pytest.raises(kind) as caught:
            completion_mask(bad, 0)
        assert str(caught.value) == want
    for end_token, kind, want in (
        (-1, ValueError, "`end_token` must be a whole number >= 0, got -1"),
        (0.0, TypeError, "`end_token` must be a whole number >= 0, got float"),
    ):
        with pytest.raises(kind) as caught:
            completion_mask(TOKENS.abs(), end_token)
        assert str(caught.value) == want


# --- token_logps -----------------------------------------------------------------------------


def test_token_logps_is_the_loop_that_it_says(logits):
    want = torch.zeros(2, 4, dtype=torch.float64)
    for row in range(2):
        for position in range(1, 5):
            if MASK[row, position]:
                scores = logits[row, position - 1].tolist()  # read up to here, then predict
                total = math.fsum(math.exp(score) for score in scores)
                want[row, position - 1] = scores[TOKENS[row, position]] - math.log(total)
    got = token_logps(logits, TOKENS, MASK)
    exact(got, want)
    assert (got[~MASK[:, 1:]] == 0).all()


def test_probabilities_of_all_completions_sum_to_one(generator):
    """A table of bigrams is a language model: the sum runs over every sequence of two tokens."""
    table = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    tokens = torch.tensor([[2, a, b] for a in range(3) for b in range(3)])
    mask = torch.tensor([[False, True, True]]).expand(9, 3)
    scored = token_logps(table[tokens[:, :-1]], tokens, mask)
    exact(sum_over_tokens(scored, mask[:, 1:]).exp().sum(), torch.ones((), dtype=torch.float64))


def test_padding_changes_nothing(logits, generator):
    junk = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    longer = torch.cat([logits, junk], 1)
    tokens = torch.cat([TOKENS, torch.full((2, 3), PAD)], 1)
    mask = torch.cat([MASK, torch.zeros(2, 3).bool()], 1)
    short, long = token_logps(logits, TOKENS, MASK), token_logps(longer, tokens, mask)
    assert torch.equal(long[:, :4], short)
    assert (long[:, 4:] == 0).all()
    short_mask, long_mask = MASK[:, 1:], mask[:, 1:]
    assert torch.equal(sum_over_tokens(long, long_mask), sum_over_tokens(short, short_mask))
    assert torch.equal(mean_over_tokens(long, long_mask), mean_over_tokens(short, short_mask))


def test_tokens_outside_the_mask_may_be_anything(logits):
    tokens = changed(changed(TOKENS, (0, 0), 99), (1, 4), -7)
    assert torch.equal(token_logps(logits, tokens, MASK), token_logps(logits, TOKENS, MASK))


def test_the_prompt_takes_no_gradient_from_its_own_prediction(logits):
    logits.requires_grad_()
    token_logps(logits, TOKENS, MASK).sum().backward()
    reached = (logits.grad != 0).any(-1)
    assert torch.equal(reached, MASK[:, 1:])


def test_a_vocabulary_of_one_has_no_doubt():
    tokens, mask = torch.tensor([[0, 0, PAD]]), torch.tensor([[0, 1, 0]])
    assert token_logps(torch.ones(1, 2, 1), tokens, mask).tolist() == [[0.0, 0.0]]


def test_a_token_that_cannot_be_has_probability_zero(logits):
    logits = changed(logits, (0, 1, 0), -INF).requires_grad_()
    got = token_logps(logits, TOKENS, MASK)
    assert got[0, 1] == -INF
    assert sum_over_tokens(got, MASK[:, 1:])[0] == -INF
    token_logps(logits, changed(TOKENS, (0, 2), 1), MASK).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_masks_of_zeros_and_ones_are_masks(logits):
    want = token_logps(logits, TOKENS, MASK)
    for dtype in (torch.int64, torch.float32, torch.uint8):
        mask = MASK.to(dtype)
        assert torch.equal(token_logps(logits, TOKENS, mask), want)
        assert torch.equal(sum_over_tokens(want, mask[:, 1:]), sum_over_tokens(want, MASK[:, 1:]))
        assert torch.equal(mean_over_tokens(want, mask[:, 1:]), mean_over_tokens(want, MASK[:, 1:]))


def test_gradients(logits):
    assert gradcheck(lambda logits: token_logps(logits, TOKENS, MASK), logits.requires_grad_())


def test_dtype_is_kept(logits):
    single = token_logps(logits.float(), TOKENS, MASK)
    assert single.dtype == torch.float32
    for reduce in (sum_over_tokens, mean_over_tokens):
        assert reduce(single, MASK[:, 1:]).dtype == torch.float32
        assert reduce(single.double(), MASK[:, 1:]).dtype == torch.float64


LOGITS = torch.zeros(2, 4, 5)
REFUSED = [
    (([0.0], TOKENS, MASK), "`logits` must be a floating torch.Tensor [B, S, V], got list"),
    ((LOGITS[0], TOKENS, MASK), "`logits` must be a non-empty [B, S, V], got shape [4, 5]"),
    (
        (LOGITS.long(), TOKENS, MASK),
        "`logits` must have a floating dtype (.double() makes one), got torch.int64",
    ),
    ((LOGITS[:0], TOKENS, MASK), "`logits` must be a non-empty [B, S, V], got shape [0, 4, 5]"),
    ((LOGITS, [0], MASK), "`tokens` must be an int64 tensor [B, S + 1], got list"),
    (
        (LOGITS, TOKENS.float(), MASK),
        "`tokens` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    ((LOGITS, TOKENS[0], MASK), "`tokens` must be a non-empty [B, S + 1], got shape [5]"),
    (
        (LOGITS, TOKENS[:, 1:], MASK),
        "`tokens` must have shape [2, 5], got [2, 4]: one token more than `logits` [2, 4, 5], "
        "which come from tokens[:, :-1]",
    ),
    (
        (LOGITS, TOKENS[:1], MASK),
        "`tokens` must have shape [2, 5], got [1, 5]: one token more than `logits` [2, 4, 5], "
        "which come from tokens[:, :-1]",
    ),
    ((LOGITS, TOKENS, [0]), "`completion_mask` must be a bool or 0/1 tensor, got list"),
    ((LOGITS, TOKENS, MASK[:, 1:]), "`completion_mask` must have shape [2, 5], got [2, 4]"),
    ((LOGITS, TOKENS, MASK * 2), "`completion_mask` must be 0 or 1, got 2"),
    ((LOGITS, TOKENS, changed(MASK.long(), (1, 2), 3)), "`completion_mask` must be 0 or 1, got 3"),
    ((LOGITS, TOKENS, MASK * NAN), "`completion_mask` must be 0 or 1, got nan"),
    ((LOGITS, TOKENS, MASK * -0.5), "`completion_mask` must be 0 or 1, got -0.5"),
    (
        (LOGITS, TOKENS, changed(MASK, (1, 0), True)),
        "`completion_mask` must be false on the first token, got true: nothing predicts it",
    ),
    (
        (LOGITS, TOKENS, changed(MASK, 1, False)),
        "`completion_mask` must have at least one token in each row, got none in row 1",
    ),
    (
        (LOGITS, changed(TOKENS, (0, 2), 5), MASK),
        "`tokens` must be in 0..4 where `completion_mask` is true, got 5",
    ),
    (
        (LOGITS, changed(TOKENS, (0, 2), PAD), MASK),
        "`tokens` must be in 0..4 where `completion_mask` is true, got -1",
    ),
    (
        (changed(LOGITS, (0, 0, 0), NAN), TOKENS, MASK),
        "`logits` must be < inf, got NaN or +inf",
    ),
    (
        (changed(LOGITS, (0, 0, 0), INF), TOKENS, MASK),
        "`logits` must be < inf, got NaN or +inf",
    ),
    (
        (changed(LOGITS, (0, 0), -INF), TOKENS, MASK),
        "`logits` must have at least one finite logit per position, got a position of -inf only",
    ),
]


@pytest.mark.parametrize(("arguments", "want"), REFUSED)
def test_bad_input_is_refused(arguments, want):
    wrong_kind = "got list" in want
    with pytest.raises(TypeError if wrong_kind else ValueError) as caught:
        token_logps(*arguments)
    assert str(caught.value) == want


# --- sums and means --------------------------------------------------------------------------


def test_sums_and_means_by_hand():
    scored = torch.tensor([[-1.0, -2.0, -4.0, NAN], [-3.0, INF, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0]])  # what is masked out may be anything
    exact(sum_over_tokens(scored, mask), torch.tensor([-7.0, -4.0], dtype=torch.float64))
    exact(mean_over_tokens(scored, mask), torch.tensor([-7 / 3, -2.0], dtype=torch.float64))
    nothing = torch.zeros(2, 4)
    exact(sum_over_tokens(scored, nothing), torch.zeros(2, dtype=torch.float64))


def test_what_is_masked_out_takes_no_gradient():
    scored = torch.tensor([[-1.0, NAN]], requires_grad=True)
    sum_over_tokens(scored, torch.tensor([[1, 0]])).backward()
    assert scored.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("reduce", [sum_over_tokens, mean_over_tokens])
def test_bad_sums_are_refused(reduce):
    scored, mask = torch.zeros(2, 4), torch.ones(2, 4)
    for arguments, kind, want in (
        (
            ([0.0], mask),
            TypeError,
            "`token_logps` must be a floating torch.Tensor [B, T], got list",
        ),
        ((scored[0], mask), ValueError, "`token_logps` must be a non-empty [B, T], got shape [4]"),
        (
            (scored.long(), mask),
            ValueError,
            "`token_logps` must have a floating dtype (.double() makes one), got torch.int64",
        ),
        ((scored, [1]), TypeError, "`completion_mask` must be a bool or 0/1 tensor, got list"),
        ((scored, mask[:, 1:]), ValueError, "`completion_mask` must have shape [2, 4], got [2, 3]"),
        ((scored, 3 * mask), ValueError, "`completion_mask` must be 0 or 1, got 3.0"),
        (
            (scored * NAN, mask),
            ValueError,
            "`token_logps` must be log-probabilities < inf, got NaN",
        ),
        (
            (scored + INF, mask),
            ValueError,
            "`token_logps` must be log-probabilities < inf, got +inf",
        ),
    ):
        with pytest.raises(kind) as caught:
            reduce(*arguments)
        assert str(caught.value) == want


def test_a_mean_over_nothing_is_refused():
    with pytest.raises(ValueError) as caught:
        mean_over_tokens(torch.zeros(3, 2), torch.tensor([[1, 0], [1, 1], [0, 0]]))
    want = "`completion_mask` must have at least one token in each row, got none in row 2"
    assert str(caught.value) == want

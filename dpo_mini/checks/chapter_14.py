"""Chapter 14: repair the museum of bugs."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, require
from dpo_mini.checks.theorems import sum_to_one

LENGTHS = torch.tensor([1, 2, 1, 3, 6, 6, 5, 4])
LOGITS = torch.tensor([2.0, -0.5, 1.0, 0.3, -1.5, 0.8], dtype=torch.float64)


def judge_token_weights(token_weights):
    """14.1: the weighted losses add up to the mean of the means, whatever the losses are."""
    for seed, n_steps in enumerate((1, 2, 3, 6)):
        lengths = 1 + draws(6, seed=seed).abs().mul(3).floor().long()
        weights = token_weights(lengths, n_steps)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        for row in range(6):  # a loss of 1 in one row at a time
            losses = mask * (torch.arange(6) == row)[:, None].double()
            parts = zip(losses.chunk(n_steps), mask.chunk(n_steps), strict=True)
            means = torch.stack([loss.sum() / counted.sum() for loss, counted in parts])
            agree(
                weights[row] * lengths[row],
                means.mean(),
                "where the tokens of one row have a loss of 1 and all others a loss of 0, your "
                "weights do not add up to the mean of the means",
            )


def _weights_all_alike(lengths, n_steps):
    """All tokens alike is the repair: here each micro-batch first takes a mean of its own."""
    return torch.ones(len(lengths), dtype=torch.float64) / lengths.sum()


def _weights_of_row_means(lengths, n_steps):
    """This takes a mean for each row: the means here are those of the micro-batches."""
    return 1 / (lengths * len(lengths)).double()


def _weights_without_steps(lengths, n_steps):
    """The mean over the micro-batches is missing: this is a token's weight in its own one."""
    return _in_its_part(lengths, n_steps)


def _weights_of_padded_rows(lengths, n_steps):
    """This counts padding: a micro-batch's mean is over its real tokens alone."""
    rows, width = len(lengths) // n_steps, lengths.max()
    return torch.ones(len(lengths), dtype=torch.float64) / (rows * width * n_steps)


def _weights_of_a_row(lengths, n_steps):
    """This is the weight of a whole row: divide it among the row's tokens."""
    return lengths * _in_its_part(lengths, n_steps) / n_steps


def _in_its_part(lengths, n_steps):
    totals = lengths.double().reshape(n_steps, -1).sum(1)
    return (1 / totals).repeat_interleave(len(lengths) // n_steps)


def judge_top_p_probs(top_p_probs):
    """14.2: a distribution on the fewest likeliest tokens of mass p, with their odds kept."""
    for seed, top_p in enumerate((0.3, 0.6, 0.8, 0.95, 1.0)):
        logits = draws(7, seed=seed)
        probs, full = top_p_probs(logits, top_p), torch.softmax(logits, 0)
        sum_to_one(probs)
        kept = probs > 0
        require(kept.any(), "your sampler keeps no token")
        agree(
            probs[kept] / probs[kept][0],
            full[kept] / full[kept][0],
            "the odds between two tokens that are kept are not the model's",
        )
        least = full[kept].min()
        dropped = full[~kept].max() if not kept.all() else 0 * least
        require(dropped < least, "a token is dropped that is likelier than one that is kept")
        mass = full[kept].sum()
        require(mass > top_p - 1e-12, "the tokens that are kept have less than `top_p` together")
        require(mass - least < top_p, "fewer tokens would have `top_p` together already")


def _sorted(logits, top_p):
    probs, order = torch.softmax(logits, 0).sort(descending=True)
    return probs, order, probs.cumsum(0)


def _placed(probs, order):
    return torch.zeros_like(probs).index_put((order,), probs)


def _top_p_not_divided(logits, top_p):
    """The probabilities do not sum to 1: a sampler divides by the mass of what it keeps."""
    probs, order, total = _sorted(logits, top_p)
    return _placed(probs * (total - probs < top_p), order)


def _top_p_too_few(logits, top_p):
    """The token that crosses `top_p` is missing: without it the kept mass is below `top_p`."""
    probs, order, total = _sorted(logits, top_p)
    kept = probs * ((total <= top_p) | (total == probs))
    return _placed(kept / kept.sum(), order)


def _top_p_not_placed(logits, top_p):
    """The probabilities stand in sorted order: put each back to the place of its token."""
    probs, _, total = _sorted(logits, top_p)
    kept = probs * (total - probs < top_p)
    return kept / kept.sum()


def _top_p_as_min_p(logits, top_p):
    """This keeps tokens by their own probability: `top_p` is about sums from the likeliest on."""
    probs = torch.softmax(logits, 0)
    kept = probs * (probs >= (1 - top_p) * probs.max())
    return kept / kept.sum()


def _top_p_from_the_rarest(logits, top_p):
    """This begins with the rarest tokens: begin with the likeliest."""
    probs, order, total = _sorted(logits, top_p)
    kept = probs * (total > 1 - top_p)
    return _placed(kept / kept.sum(), order)


EXERCISES = (
    Exercise(
        "14.1",
        cases=((LENGTHS, 2), (LENGTHS, 4)),
        judge=judge_token_weights,
        mistakes=(
            _weights_all_alike,
            _weights_of_row_means,
            _weights_without_steps,
            _weights_of_padded_rows,
            _weights_of_a_row,
        ),
        shape=lambda lengths, n_steps: lengths.shape,
    ),
    Exercise(
        "14.2",
        cases=((LOGITS, 0.7), (LOGITS.flip(0) / 2, 0.9)),
        judge=judge_top_p_probs,
        mistakes=(
            _top_p_not_divided,
            _top_p_too_few,
            _top_p_not_placed,
            _top_p_as_min_p,
            _top_p_from_the_rarest,
        ),
        shape=lambda logits, top_p: logits.shape,
    ),
)

"""Plausible wrong answers to the exercises of chapter 14, and a word of each one's sentence."""

import torch


def part_totals(lengths, n_steps):
    rows = len(lengths) // n_steps
    totals = [sum(lengths[i : i + rows].tolist()) for i in range(0, len(lengths), rows)]
    return [totals[i // rows] for i in range(len(lengths))]


def weights_one_over_all(lengths, n_steps):
    return [1 / sum(lengths.tolist())] * len(lengths)


def weights_one_over_own_length(lengths, n_steps):
    return [1 / len(lengths) / n for n in lengths.tolist()]


def weights_in_own_part(lengths, n_steps):
    return [1 / total for total in part_totals(lengths, n_steps)]


def weights_with_padding(lengths, n_steps):
    return [1 / (len(lengths) * max(lengths.tolist()))] * len(lengths)


def weights_of_rows(lengths, n_steps):
    totals = part_totals(lengths, n_steps)
    return [n / total / n_steps for n, total in zip(lengths.tolist(), totals, strict=True)]


def nucleus(logits, top_p):
    """Which tokens are kept, the likeliest first."""
    probs, kept, mass = logits.softmax(0), [], 0.0
    for token in logits.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token].item()
    return kept


def on(logits, kept):
    probs = torch.zeros_like(logits)
    probs[kept] = logits[kept].softmax(0)
    return probs


def top_p_left_as_it_was(logits, top_p):
    kept = nucleus(logits, top_p)
    probs = torch.zeros_like(logits)
    probs[kept] = logits.softmax(0)[kept]
    return probs


def top_p_without_the_last(logits, top_p):
    kept = nucleus(logits, top_p)
    return on(logits, kept[:-1] or kept)


def top_p_in_sorted_order(logits, top_p):
    return on(logits, nucleus(logits, top_p)).sort(descending=True).values


def top_p_by_ratio_to_the_best(logits, top_p):
    probs = logits.softmax(0)
    return on(logits, (probs / probs.max() >= 1 - top_p).nonzero().squeeze(1))


def top_p_upside_down(logits, top_p):
    order = logits.argsort()
    mass = logits.softmax(0)[order].flip(0).cumsum(0)
    return on(logits, order.flip(0)[mass > 1 - top_p])


MISTAKES = {
    "14.1": {
        "All tokens alike is the repair": weights_one_over_all,
        "a mean for each row": weights_one_over_own_length,
        "mean over the micro-batches is missing": weights_in_own_part,
        "counts padding": weights_with_padding,
        "weight of a whole row": weights_of_rows,
    },
    "14.2": {
        "divides by the mass": top_p_left_as_it_was,
        "crosses": top_p_without_the_last,
        "sorted order": top_p_in_sorted_order,
        "by their own probability": top_p_by_ratio_to_the_best,
        "begins with the rarest": top_p_upside_down,
    },
}

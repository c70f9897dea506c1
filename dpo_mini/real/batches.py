"""Which rows are trained on, in which order: those of every step, and those that are long."""

import torch
from torch import Tensor

from dpo_mini._arguments import check_count, check_generator
from dpo_mini.logps import PAD
from dpo_mini.real.ratings import check_data, is_rated
from dpo_mini.train import Pairs


def shuffled_batches(
    n_rows: int,
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    lengths: Tensor | None = None,
    window: int = 1,
) -> Tensor:
    """The rows of every step, drawn before the first: a run that is stopped knows how it goes on.

    Every row is seen once before any is seen again. All batches are full: one that reaches the end
    of the rows goes on at the beginning of their next order.

    A pass is as wide as its longest pair, so pairs of like length should meet. With `lengths` the
    rows of a batch are sorted, which changes no gradient but the width of its micro-batches. With a
    `window` above 1 the rows of so many batches are sorted together, dealt out in that order, and
    the batches shuffled: then a batch holds pairs of like length, and a row may come again a window
    early.

    Args:
      n_rows: how many there are to draw from.
      steps, batch_size: the shape of the result.
      generator: shuffles.
      lengths: `[n_rows]`, such as `pair_lengths(pairs)`, or None for an order by chance alone.
      window: batches that are sorted together; used with `lengths` only.
    Returns:
      `[steps, batch_size]` int64.
    Raises:
      ValueError: a number below 1, or lengths of another number of rows.
    """
    counts = {"n_rows": n_rows, "steps": steps, "batch_size": batch_size, "window": window}
    for name, count in counts.items():
        check_count(name, count)
    check_generator(generator)
    if lengths is not None and lengths.shape != (n_rows,):
        raise ValueError(f"`lengths` must have shape [{n_rows}], got {list(lengths.shape)}")
    rounds = -(-steps * batch_size // n_rows)
    device = generator.device
    orders = [torch.randperm(n_rows, generator=generator, device=device) for _ in range(rounds)]
    batches = torch.cat(orders)[: steps * batch_size].view(steps, batch_size).cpu()
    return batches if lengths is None else _alike(batches, lengths.cpu(), window, generator)


def pair_lengths(pairs: Pairs) -> Tensor:
    """How many tokens each pair has: its prompt and both answers.

    Args:
      pairs: as `encode` gives pairs, or ratings, which have one answer.
    Returns:
      `[n]` int64.
    Raises:
      ValueError: no pairs, or rows that differ in number.
    """
    check_data(pairs)
    return torch.stack([(tokens != PAD).sum(1) for tokens in pairs if tokens.dim() > 1]).sum(0)


def drop_long(pairs: Pairs, *, max_tokens: int) -> tuple[Pairs, int]:
    """The pairs that fit, and how many did not.

    Args:
      pairs: as `encode` gives pairs or ratings, with a `max_tokens` there that lets all pass.
      max_tokens: the most tokens of a prompt and the longer of its answers.
    Returns:
      The pairs in their order, without columns of padding alone; the number left out.
    Raises:
      ValueError: no pair fits.
    """
    prompt, answer = _lengths(pairs, max_tokens)
    kept = prompt + answer <= max_tokens
    if not kept.any():
        shortest = int((prompt + answer).min())
        raise ValueError(
            f"`max_tokens` must be >= {shortest}, the length of the shortest pair, got {max_tokens}"
        )
    fitting = _narrowed(pairs, kept, int(prompt[kept].max()), int(answer[kept].max()))
    return fitting, int((~kept).sum())


def cut_long(pairs: Pairs, *, max_tokens: int) -> tuple[Pairs, int, int]:
    """The pairs with the ends of long answers cut off, without those that became alike by it.

    A cut answer has lost its end token too, so it does not teach the policy to stop there. Prompts
    are never cut: without its beginning, or its end, one is another question. Two answers that
    begin with the same tokens may be the same after the cut. Nothing is left to prefer then, so
    the pair is dropped; answers that were the same before are the file's, and stay.

    Args:
      pairs, max_tokens: as in `drop_long`.
    Returns:
      The pairs that are left in their order, without columns of padding alone; how many of them
      were cut; how many were dropped.
    Raises:
      ValueError: a prompt leaves no room for an answer, or no pair is left.
    """
    prompt, answer = _lengths(pairs, max_tokens)
    room = max_tokens - prompt
    if (room < 1).any():
        row = int((room < 1).nonzero()[0])
        raise ValueError(
            f"`max_tokens` must be > {int(prompt[row])}, the length of the prompt in row {row}, "
            f"got {max_tokens}"
        )
    places = torch.arange(pairs[1].shape[1], device=room.device)
    first, second = (
        tokens.masked_fill(places >= room[:, None], PAD) if tokens.dim() > 1 else tokens
        for tokens in pairs[1:]
    )
    if is_rated(pairs):
        became_alike = torch.zeros_like(pairs[2])
    else:
        became_alike = (first == second).all(1) & (pairs[1] != pairs[2]).any(1)
    kept = ~became_alike
    if not kept.any():
        raise ValueError(
            f"`max_tokens` must be large enough for two answers to differ, got {max_tokens}, which "
            "makes the answers of every pair the same"
        )
    n_cut = int((answer > room)[kept].sum())
    lengths = torch.minimum(answer, room)[kept]
    cut = (pairs[0], first, second)
    left = _narrowed(cut, kept, int(prompt[kept].max()), int(lengths.max()))
    return left, n_cut, int(became_alike.sum())


# --- private functions -----------------------------------------------------------------------


def _alike(batches: Tensor, lengths: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """Batches `[steps, B]` whose rows are sorted by length, within windows of so many of them."""
    sorted_windows: list[Tensor] = []
    for part in batches.split(window):
        rows = part.flatten()
        dealt = rows[lengths[rows].argsort(stable=True)].view_as(part)
        order = torch.randperm(len(part), generator=generator, device=generator.device).cpu()
        sorted_windows.append(dealt[order])
    return torch.cat(sorted_windows)


def _lengths(pairs: Pairs, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens of each prompt, and of the longer of its answers, `[n]` each."""
    check_data(pairs)
    check_count("max_tokens", max_tokens)
    prompt, *answers = ((tokens != PAD).sum(1) for tokens in pairs if tokens.dim() > 1)
    return prompt, torch.maximum(answers[0], answers[-1])


def _narrowed(pairs: Pairs, kept: Tensor, height: int, width: int) -> Pairs:
    """The rows that are kept, without columns of padding alone."""
    prompts, first, second = (tokens[kept] for tokens in pairs)
    narrow = second if is_rated(pairs) else second[:, :width]
    return prompts[:, :height], first[:, :width], narrow

"""Chapter 14: real models."""

import torch

from dpo_mini.checks import Exercise


def answer_mask(tokens, n_prompt, end):
    """14.1: 1.0 on the answer's tokens `[S]`, its end token included, the padding not."""
    mask = torch.zeros(len(tokens), dtype=torch.float64)
    for at in range(n_prompt, len(tokens)):
        mask[at] = 1.0
        if tokens[at] == end:
            break
    return mask


def _end_token_left_out(tokens, n_prompt, end):
    """The answer's own end token does not count: this policy would never learn to stop. Look for
    the first end token after the prompt, not for every token that differs from it.
    """
    after = torch.arange(len(tokens)) >= n_prompt
    return (after & (tokens != end)).double()


def _padding_counts(tokens, n_prompt, end):
    """The padding counts: only the first end token of the answer is one, the rest fill the row."""
    return (torch.arange(len(tokens)) >= n_prompt).double()


def _prompt_counts(tokens, n_prompt, end):
    """The prompt counts: its tokens are given, not answered, and both answers share them."""
    mask = answer_mask(tokens, n_prompt, end)
    mask[:n_prompt] = 1.0
    return mask


def _one_too_late(tokens, n_prompt, end):
    """The mask begins one token late: position n_prompt holds the answer's first token, as
    positions count from 0.
    """
    mask = answer_mask(tokens, n_prompt, end)
    mask[n_prompt] = 0.0
    return mask


def _one_too_early(tokens, n_prompt, end):
    """The mask begins one token early: the prompt's last token counts."""
    mask = answer_mask(tokens, n_prompt, end)
    mask[n_prompt - 1] = 1.0
    return mask


def accuracy_of(chosen, rejected, ref_chosen, ref_rejected):
    """14.2: share of rows where chosen gained more on the reference than rejected did."""
    gains = torch.stack([chosen - ref_chosen, rejected - ref_rejected])
    return (gains[0] > gains[1]).double().mean()


def _without_reference(chosen, rejected, ref_chosen, ref_rejected):
    """The reference is missing: this asks which answer is more probable, and short ones are."""
    return (chosen > rejected).double().mean()


def _ties_are_right(chosen, rejected, ref_chosen, ref_rejected):
    """A tie counts as right here: an untrained policy would then score 1 without having learned
    anything.
    """
    return (chosen - ref_chosen >= rejected - ref_rejected).double().mean()


def _other_way_round(chosen, rejected, ref_chosen, ref_rejected):
    """The sign is turned round: this is the share of pairs that the policy gets wrong."""
    return (chosen - ref_chosen < rejected - ref_rejected).double().mean()


def _each_alone(chosen, rejected, ref_chosen, ref_rejected):
    """This asks whether chosen became more probable than before. DPO may push both answers down
    and still be right: compare the two gains with each other.
    """
    return (chosen > ref_chosen).double().mean()


def join(prompts, answers):
    """14.3: prompt, answer, padding in each row of `[B, P + T]`."""
    joined = torch.full((len(prompts), prompts.shape[1] + answers.shape[1]), -1)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = [t for t in [*prompt.tolist(), *answer.tolist()] if t != -1]
        joined[row, : len(tokens)] = torch.tensor(tokens)
    return joined


def _gap(prompts, answers):
    """There is padding between a short prompt and its answer: the model would read it as text, and
    every position after it is wrong.
    """
    return torch.cat([prompts, answers], dim=1)


def _on_the_left(prompts, answers):
    """The padding is on the left: here it goes to the end of the row."""
    joined = join(prompts, answers)
    for row, tokens in enumerate(joined):
        joined[row] = tokens.roll(int((tokens == -1).sum()))
    return joined


def _answer_first(prompts, answers):
    """The answer stands before the prompt: a causal model would then answer what it has
    not read.
    """
    return join(answers, prompts)


def _unstable(prompts, answers):
    """The tokens of a row are sorted by value: bring the padding to the end and keep the order of
    the rest (a sort by "is it padding" with stable=True does).
    """
    joined = join(prompts, answers)
    large = joined.masked_fill(joined == -1, joined.max() + 1).sort(1).values
    return large.masked_fill(large == joined.max() + 1, -1)


TOKENS = torch.tensor([5, 7, 3, 4, 9, 0, 0, 0])
FULL = torch.tensor([5, 3, 4, 0])
BEFORE = (torch.tensor([-3.0, *[-9.0] * 6]), torch.tensor([-9.0, *[-3.0] * 6]))
GAINS = (
    torch.tensor([-0.5, -0.25, 0.5, 1.0, -1.0, -1.0, 0.25]),
    torch.tensor([-1.0, -2.0, -1.0, 0.5, -1.0, 0.5, 0.75]),
)
AFTER = (BEFORE[0] + GAINS[0], BEFORE[1] + GAINS[1])
PROMPTS = torch.tensor([[5, 3, -1, -1], [6, 2, 8, 4], [7, -1, -1, -1]])
ANSWERS = torch.tensor([[9, 1, 0], [3, 0, -1], [0, -1, -1]])

EXERCISES = (
    Exercise(
        "14.1",
        ((TOKENS, 2, 0), (FULL, 1, 0), (TOKENS, 3, 0)),
        answer_mask,
        (_end_token_left_out, _padding_counts, _prompt_counts, _one_too_late, _one_too_early),
    ),
    Exercise(
        "14.2",
        ((*AFTER, *BEFORE), (*BEFORE, *BEFORE)),
        accuracy_of,
        (_without_reference, _ties_are_right, _other_way_round, _each_alone),
    ),
    Exercise("14.3", ((PROMPTS, ANSWERS),), join, (_gap, _on_the_left, _answer_first, _unstable)),
)

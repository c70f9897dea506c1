"""Chapter 16: real models."""

from itertools import product

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws


def judge_answer_mask(answer_mask):
    """14.1: rows put together of a prompt, an answer and padding come apart again."""
    for end, others in ((0, (1, 2)), (3, (0, 5))):
        prompts = [row for n in (1, 2) for row in product((end, others[0]), repeat=n)]
        prompts.sort(key=lambda prompt: end in prompt)
        answers = [row for n in (0, 1, 2) for row in product(others, repeat=n)]
        for prompt, answer, n_padding in product(prompts, answers, (0, 1, 3)):
            n, until = len(prompt), len(prompt) + len(answer) + 1  # its end token is one more
            tokens = torch.tensor([*prompt, *answer, end, *[end] * n_padding])
            mask = answer_mask(tokens, n, end)
            row = "a prompt that holds an end token too" if end in prompt else "a prompt"
            agree(mask[n:until], 1.0, f"after {row}, a token of the answer or its end is left out")
            agree(mask[:n], 0.0, f"in {row} a token counts")
            agree(mask[until:], 0.0, f"after {row} and its answer, padding counts")


def _up_to_the_first_end(tokens, n_prompt, end):
    """Every position up to the answer's end token, the prompt's too, `[S]`."""
    first_end = n_prompt + int((tokens[n_prompt:] == end).nonzero()[0])
    return torch.arange(len(tokens)) <= first_end


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
    return _up_to_the_first_end(tokens, n_prompt, end).double()


def _one_too_late(tokens, n_prompt, end):
    """The mask begins one token late: position n_prompt holds the answer's first token, as
    positions count from 0.
    """
    after = torch.arange(len(tokens)) > n_prompt
    return (after & _up_to_the_first_end(tokens, n_prompt, end)).double()


def _one_too_early(tokens, n_prompt, end):
    """The mask begins one token early: the prompt's last token counts."""
    after = torch.arange(len(tokens)) >= n_prompt - 1
    return (after & _up_to_the_first_end(tokens, n_prompt, end)).double()


def _end_of_the_prompt(tokens, n_prompt, end):
    """You stop at the first end token of the row: a prompt may hold one too."""
    at = torch.arange(len(tokens))
    return ((at >= n_prompt) & (at <= int((tokens == end).nonzero()[0]))).double()


def _one_padding_counts(tokens, n_prompt, end):
    """One place too many counts: the token after the end token is padding."""
    after = torch.arange(len(tokens)) >= n_prompt
    shifted = torch.cat([torch.tensor([True]), _up_to_the_first_end(tokens, n_prompt, end)[:-1]])
    return (after & shifted).double()


def _all_but_ends(tokens, n_prompt, end):
    """Two things: the prompt counts, and the answer's end token does not."""
    return (tokens != end).double()


def _everything(tokens, n_prompt, end):
    """Everything counts here: the prompt was given, and the padding was not written."""
    return torch.ones(len(tokens))


def judge_accuracy_of(accuracy_of):
    """14.2: of pairs made with margins of every combination of signs, the share above 0."""
    for n in (1, 2, 3, 4):
        for row, signs in enumerate(product((-1.0, 0.0, 1.0), repeat=n)):
            # quarters, so that ties are exact
            refs, gains, sizes = (draws(3, 2, n, seed=row) * 4).round() / 4
            ref_chosen, ref_rejected = refs
            rejected = ref_rejected + gains[0]
            margins = torch.tensor(signs, dtype=torch.float64) * (0.25 + sizes[0].abs())
            chosen = ref_chosen + gains[0] + margins
            agree(
                accuracy_of(chosen, rejected, ref_chosen, ref_rejected),
                (margins > 0).double().mean(),
                "of pairs made with known implied rewards, another share has the larger one on "
                "the chosen answer",
            )


def _without_reference(chosen, rejected, ref_chosen, ref_rejected):
    """The reference is missing: this asks which answer is more probable, and short ones are."""
    return (chosen > rejected).double().mean()


def _ties_are_right(chosen, rejected, ref_chosen, ref_rejected):
    """A tie counts as right here: an untrained policy would then score 1 without having learned
    anything.
    """
    return (chosen - ref_chosen >= rejected - ref_rejected).double().mean()


def _other_way_round(chosen, rejected, ref_chosen, ref_rejected):
    """The sign is reversed: this is the share of pairs that the policy gets wrong."""
    return (chosen - ref_chosen < rejected - ref_rejected).double().mean()


def _each_alone(chosen, rejected, ref_chosen, ref_rejected):
    """This asks whether chosen became more probable than before. DPO may push both answers down
    and still be right: compare the two gains with each other.
    """
    return (chosen > ref_chosen).double().mean()


def _reference_added(chosen, rejected, ref_chosen, ref_rejected):
    """The reference has the wrong sign: it is subtracted from each log-probability."""
    return (chosen + ref_chosen > rejected + ref_rejected).double().mean()


def _ties_count_half(chosen, rejected, ref_chosen, ref_rejected):
    """A tie counts one half here: it counts as wrong."""
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margins.sign() + 1).mean() / 2


def _rejected_alone(chosen, rejected, ref_chosen, ref_rejected):
    """This asks whether rejected became less probable: compare the two gains with each other."""
    return (rejected < ref_rejected).double().mean()


def _mean_margin(chosen, rejected, ref_chosen, ref_rejected):
    """This is the mean margin: accuracy counts the pairs where it is above 0."""
    return ((chosen - ref_chosen) - (rejected - ref_rejected)).mean()


def _percent(chosen, rejected, ref_chosen, ref_rejected):
    """This is in percent: a share is asked for."""
    return 100 * ((chosen - ref_chosen) > (rejected - ref_rejected)).double().mean()


def judge_join(join):
    """14.3: every combination of lengths: the prompt, the answer, and nothing but padding."""
    for n_prompt, n_answer in ((2, 2), (4, 3), (3, 1)):
        lengths = list(product(range(1, n_prompt + 1), range(1, n_answer + 1)))
        tokens = (9 * draws(len(lengths), n_prompt + n_answer, seed=n_prompt).abs()).long()
        prompts, answers = tokens[:, :n_prompt].clone(), tokens[:, n_prompt:].clone()
        for row, (p, a) in enumerate(lengths):
            prompts[row, p:] = answers[row, a:] = -1
        joined = join(prompts, answers)
        for row, (p, a) in enumerate(lengths):
            agree(
                joined[row, : p + a],
                torch.cat([prompts[row, :p], answers[row, :a]]),
                "a row does not begin with the prompt's tokens and then the answer's, each in "
                "order",
            )
            agree(joined[row, p + a :], -1, "after an answer's last token there is no padding")


def _sorted_stably(tokens, keys):
    return tokens.gather(1, keys.int().argsort(dim=1, stable=True))


def _gap(prompts, answers):
    """There is padding between a short prompt and its answer: the model would read it as text, and
    every position after it is wrong.
    """
    return torch.cat([prompts, answers], dim=1)


def _on_the_left(prompts, answers):
    """The padding is on the left: here it goes to the end of the row."""
    tokens = torch.cat([prompts, answers], dim=1)
    return _sorted_stably(tokens, tokens != -1)


def _answer_first(prompts, answers):
    """The answer stands before the prompt: a causal model would then answer what it has
    not read.
    """
    tokens = torch.cat([answers, prompts], dim=1)
    return _sorted_stably(tokens, tokens == -1)


def _unstable(prompts, answers):
    """The tokens of a row are sorted by value: bring the padding to the end and keep the order of
    the rest (a sort by "is it padding" with stable=True does).
    """
    tokens = torch.cat([prompts, answers], dim=1)
    return _sorted_stably(tokens, torch.where(tokens == -1, tokens.max() + 1, tokens))


def _padded_with_zeros(prompts, answers):
    """The padding is 0, which is a token: it is -1 here."""
    tokens = torch.cat([prompts, answers], dim=1)
    return _sorted_stably(tokens, tokens == -1).clamp(min=0)


TOKENS = torch.tensor([5, 7, 3, 4, 9, 0, 0, 0])
PROMPT_WITH_END = torch.tensor([5, 0, 3, 4, 0, 0])
FULL = torch.tensor([5, 3, 4, 0])
BEFORE = (torch.tensor([-3.0, *[-9.0] * 6]), torch.tensor([-9.0, *[-3.0] * 6]))
GAINS = (
    torch.tensor([-0.5, -0.25, 0.5, 1.0, -1.0, -1.0, 0.25]),
    torch.tensor([-1.0, -2.0, -1.0, 0.5, -1.0, 0.5, 0.75]),
)
AFTER = (BEFORE[0] + GAINS[0], BEFORE[1] + GAINS[1])
MIXED = tuple(-draws(4, 40, seed=14).abs())  # chosen, rejected, and both under the reference
PROMPTS = torch.tensor([[5, 3, -1, -1], [6, 2, 8, 4], [7, -1, -1, -1]])
ANSWERS = torch.tensor([[9, 1, 0], [3, 0, -1], [0, -1, -1]])

EXERCISES = (
    Exercise(
        "16.1",
        cases=((TOKENS, 2, 0), (FULL, 1, 0), (TOKENS, 3, 0), (PROMPT_WITH_END, 3, 0)),
        judge=judge_answer_mask,
        mistakes=(
            _end_token_left_out,
            _padding_counts,
            _prompt_counts,
            _one_too_late,
            _one_too_early,
            _end_of_the_prompt,
            _one_padding_counts,
            _all_but_ends,
            _everything,
        ),
        shape=lambda tokens, n_prompt, end: tokens.shape,
    ),
    Exercise(
        "16.2",
        cases=((*AFTER, *BEFORE), (*BEFORE, *BEFORE), MIXED),
        judge=judge_accuracy_of,
        mistakes=(
            _without_reference,
            _ties_are_right,
            _other_way_round,
            _each_alone,
            _reference_added,
            _ties_count_half,
            _rejected_alone,
            _mean_margin,
            _percent,
        ),
    ),
    Exercise(
        "16.3",
        cases=((PROMPTS, ANSWERS),),
        judge=judge_join,
        mistakes=(
            _gap,
            _on_the_left,
            _answer_first,
            _unstable,
            _padded_with_zeros,
        ),
        shape=lambda prompts, answers: (len(prompts), prompts.shape[1] + answers.shape[1]),
    ),
)

"""Chapter 16: what learners write, each with the words of the sentence they should read."""

import torch


def mask_that_drops_every_end(tokens, n_prompt, end):
    mask = (tokens != end).double()
    mask[:n_prompt] = 0
    return mask


def mask_to_the_end_of_the_row(tokens, n_prompt, end):
    mask = torch.ones(len(tokens))
    mask[:n_prompt] = 0
    return mask


def first_end(tokens, n_prompt, end):
    return n_prompt + tokens[n_prompt:].tolist().index(end)


def mask_with_the_prompt(tokens, n_prompt, end):
    return torch.arange(len(tokens)).le(first_end(tokens, n_prompt, end)).double()


def mask_after_n_prompt(tokens, n_prompt, end):
    at = torch.arange(len(tokens))
    return ((at > n_prompt) & (at <= first_end(tokens, n_prompt, end))).double()


def mask_from_the_prompts_last_token(tokens, n_prompt, end):
    at = torch.arange(len(tokens))
    return ((at >= n_prompt - 1) & (at <= first_end(tokens, n_prompt, end))).double()


def accuracy_of_probabilities(chosen, rejected, ref_chosen, ref_rejected):
    return sum(c > r for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)) / len(chosen)


def accuracy_with_ties(chosen, rejected, ref_chosen, ref_rejected):
    margins = chosen - rejected - ref_chosen + ref_rejected
    return 1 - (margins < 0).double().mean()


def accuracy_of_the_rejected(chosen, rejected, ref_chosen, ref_rejected):
    margins = rejected - ref_rejected - chosen + ref_chosen
    return (margins > 0).double().mean()


def accuracy_of_the_chosen_alone(chosen, rejected, ref_chosen, ref_rejected):
    return ((chosen - ref_chosen) > 0).sum() / len(chosen)


def join_side_by_side(prompts, answers):
    return torch.hstack([prompts, answers])


def join_on_the_left(prompts, answers):
    both = torch.hstack([prompts, answers])
    return both.gather(1, (both != -1).int().argsort(dim=1, stable=True))


def join_answer_first(prompts, answers):
    both = torch.hstack([answers, prompts])
    return both.gather(1, (both == -1).int().argsort(dim=1, stable=True))


def join_by_value(prompts, answers):
    both = torch.hstack([prompts, answers])
    both[both == -1] = 10**6
    both = both.sort(dim=1).values
    both[both == 10**6] = -1
    return both


def end_of_the_prompt(tokens, n_prompt, end):
    at = torch.arange(len(tokens))
    return ((at >= n_prompt) & (at <= tokens.tolist().index(end))).double()


def one_padding_counts(tokens, n_prompt, end):
    at = torch.arange(len(tokens))
    return ((at >= n_prompt) & (at <= first_end(tokens, n_prompt, end) + 1)).double()


def all_but_ends(tokens, n_prompt, end):
    return (tokens != end).double()


def everything(tokens, n_prompt, end):
    return torch.ones(len(tokens))


def reference_added(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen + ref_chosen > rejected + ref_rejected).double().mean()


def ties_count_half(chosen, rejected, ref_chosen, ref_rejected):
    margins = chosen - rejected - ref_chosen + ref_rejected
    return ((margins > 0).double() + (margins >= 0).double()).mean() / 2


def rejected_alone(chosen, rejected, ref_chosen, ref_rejected):
    return (rejected < ref_rejected).double().mean()


def mean_margin(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - rejected - ref_chosen + ref_rejected).mean()


def percent(chosen, rejected, ref_chosen, ref_rejected):
    return 100 * (chosen - rejected - ref_chosen + ref_rejected > 0).double().mean()


def padded_with_zeros(prompts, answers):
    both = torch.hstack([prompts, answers])
    return both.gather(1, (both == -1).int().argsort(dim=1, stable=True)).clamp(min=0)


MISTAKES = {
    "16.1": {
        "never learn to stop": mask_that_drops_every_end,
        "The padding counts": mask_to_the_end_of_the_row,
        "The prompt counts": mask_with_the_prompt,
        "begins one token late": mask_after_n_prompt,
        "begins one token early": mask_from_the_prompts_last_token,
        "You stop at the first end token of the row": end_of_the_prompt,
        "One place too many counts": one_padding_counts,
        "the prompt counts, and the answer's end token": all_but_ends,
        "Everything counts here": everything,
    },
    "16.2": {
        "reference is missing": accuracy_of_probabilities,
        "tie counts as right": accuracy_with_ties,
        "reversed": accuracy_of_the_rejected,
        "may push both answers down": accuracy_of_the_chosen_alone,
        "The reference has the wrong sign": reference_added,
        "A tie counts one half here": ties_count_half,
        "This asks whether rejected became less probable": rejected_alone,
        "This is the mean margin": mean_margin,
        "This is in percent": percent,
    },
    "16.3": {
        "padding between": join_side_by_side,
        "on the left": join_on_the_left,
        "before the prompt": join_answer_first,
        "sorted by value": join_by_value,
        "The padding is 0, which is a token": padded_with_zeros,
    },
}

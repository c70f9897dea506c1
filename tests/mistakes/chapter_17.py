"""Plausible wrong answers to the exercises of chapter 17, and a word of each one's sentence."""

import torch


def triage(chosen_logp, rejected_logp, grad, moved, margin, shared, *, order="123456", numbers=()):
    """The right answer, asked in `order`, with some numbers replaced."""
    signs = {
        "1": chosen_logp == 0 and rejected_logp == 0,
        "2": chosen_logp == rejected_logp,
        "3": grad == 0,
        "4": moved == 0,
        "5": margin != 0,
        "6": bool(shared),
    }
    found = next((int(key) for key in order if signs[key]), 7)
    return dict(numbers).get(found, found)


def same_before_masked(*seen):
    return triage(*seen, order="213456")


def all_that_stands_still_is_frozen(*seen):
    return triage(*seen, numbers={4: 3})


def no_gradient_is_a_rate_of_zero(*seen):
    return triage(*seen, order="124356")


def never_asks_who_shares(*seen):
    return triage(*seen, order="12345")


def never_asks_for_the_margin(*seen):
    return triage(*seen, order="12346")


def plain_mean(mean_losses, n_tokens):
    return sum(mean_losses) / len(mean_losses)


def plain_sum(mean_losses, n_tokens):
    return sum(mean_losses)


def total(mean_losses, n_tokens):
    return mean_losses @ n_tokens


def total_per_step(mean_losses, n_tokens):
    return mean_losses @ n_tokens / len(n_tokens)


def short_ones_first(mean_losses, n_tokens):
    weights = n_tokens.reciprocal()
    return mean_losses @ weights / weights.sum()


def ratios(logps, ref_logps, prompts, answers):
    return torch.stack([(logps - ref_logps)[x, y] for x, y in zip(prompts, answers, strict=True)])


def own_answers(logps, ref_logps, prompts, answers):
    return ratios(logps, ref_logps, prompts, answers).mean().clamp(min=0)


def no_clamp(logps, ref_logps, prompts, answers):
    return ratios(logps, ref_logps, prompts, answers.roll(-1)).mean()


def clamp_every_one(logps, ref_logps, prompts, answers):
    return ratios(logps, ref_logps, prompts, answers.roll(-1)).clamp(min=0).mean()


def other_direction(logps, ref_logps, prompts, answers):
    return ratios(logps, ref_logps, prompts, answers.roll(1)).mean().clamp(min=0)


def turned_round(logps, ref_logps, prompts, answers):
    rows = list(range(len(answers)))[::-1]
    return ratios(logps, ref_logps, prompts, answers[rows]).mean().clamp(min=0)


def exact_kl(logps, ref_logps, prompts, answers):
    kls = torch.nn.functional.kl_div(ref_logps, logps, reduction="none", log_target=True).sum(1)
    return kls[prompts].mean()


def fault_counted_from_zero(*seen):
    return triage(*seen) - 1


def fault_shared_for_anew(*seen):
    return triage(*seen, numbers={6: 7, 7: 6})


def fault_movement_first(*seen):
    return triage(*seen, order="412356")


def loss_means_over_tokens(mean_losses, n_tokens):
    return mean_losses.sum() / n_tokens.sum()


def loss_mean_batch(mean_losses, n_tokens):
    return mean_losses.mean() * n_tokens.mean()


def z0_distance(logps, ref_logps, prompts, answers):
    return ratios(logps, ref_logps, prompts, answers.roll(-1)).mean().abs()


def z0_summed(logps, ref_logps, prompts, answers):
    return ratios(logps, ref_logps, prompts, answers.roll(-1)).sum().clamp(min=0)


def z0_of_all_pairs(logps, ref_logps, prompts, answers):
    return (logps - ref_logps)[prompts][:, answers].mean().relu()


def z0_without_the_last(logps, ref_logps, prompts, answers):
    return (logps - ref_logps)[prompts[:-1], answers[1:]].mean().relu()


MISTAKES = {
    "17.1": {
        "are equal too": same_before_masked,
        "called frozen": all_that_stands_still_is_frozen,
        "no gradient arrived": no_gradient_is_a_rate_of_zero,
        "who shares weights": never_asks_who_shares,
        "look at beta": never_asks_for_the_margin,
        "These are the right faults, counted from 0": fault_counted_from_zero,
        "have changed places": fault_shared_for_anew,
        "You ask for the movement first": fault_movement_first,
    },
    "17.2": {
        "mean of the means": plain_mean,
        "added up": plain_sum,
        "not divided by their number": total,
        "number of micro-batches": total_per_step,
        "upside down": short_ones_first,
        "The means are divided by the number of tokens": loss_means_over_tokens,
        "This is a mean loss times a mean number of tokens": loss_mean_batch,
    },
    "17.4": {
        "own answer here": own_answers,
        "clamp is missing": no_clamp,
        "clamp comes after": clamp_every_one,
        "the other way": other_direction,
        "reversed here": turned_round,
        "exact KL": exact_kl,
        "The sign is dropped": z0_distance,
        "The log-ratios are added up": z0_summed,
        "Every prompt meets every answer of the batch": z0_of_all_pairs,
        "The last row is left out": z0_without_the_last,
    },
}

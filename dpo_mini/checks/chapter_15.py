"""Chapter 15: answer the questions people ask."""

import torch

from dpo_mini.checks import Exercise

PROBS = [[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25, 0.05, 0.3, 0.4]]
REF_PROBS = [[0.3, 0.3, 0.2, 0.2], [0.3, 0.2, 0.2, 0.3], [0.4, 0.2, 0.3, 0.1]]
LOGPS = torch.tensor(PROBS, dtype=torch.float64).log()
REF_LOGPS = torch.tensor(REF_PROBS, dtype=torch.float64).log()


def which_fault(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """15.1: the number of the fault, 1..7."""
    faults = (
        chosen_logp == rejected_logp == 0,  # 2, before the equal pair
        chosen_logp == rejected_logp,
        margin != 0,
        grad == 0,
        moved == 0,
        shared,
    )
    numbers = (2, 1, 7, 3, 4, 5, 6)
    return torch.tensor(float(numbers[(*faults, True).index(True)]), dtype=torch.float64)


def _fault_equal_before_masked(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """Two log-probs of 0 are equal too, and no answer has probability 1: look at that first."""
    if chosen_logp == rejected_logp:
        return torch.tensor(1.0, dtype=torch.float64)
    return which_fault(chosen_logp, rejected_logp, grad, moved, margin, shared)


def _fault_frozen_for_rate(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """Whatever stands still is called frozen here: a learning rate of 0 leaves a gradient."""
    found = which_fault(chosen_logp, rejected_logp, grad, moved, margin, shared)
    return torch.where(found == 4, 3.0, found)


def _fault_rate_for_frozen(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """A learning rate of 0 is blamed here where no gradient arrived at all."""
    found = which_fault(chosen_logp, rejected_logp, grad, moved, margin, shared)
    return torch.where(found == 3, 4.0, found)


def _fault_without_sharing(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """Shared weights and a reference that is read anew look alike: ask who shares weights."""
    found = which_fault(chosen_logp, rejected_logp, grad, moved, margin, False)
    return found


def _fault_without_margin(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """The policy has a margin in nats, so its reference is another one: look at beta."""
    return which_fault(chosen_logp, rejected_logp, grad, moved, 0.0, shared)


def whole_batch_loss(mean_losses, n_tokens):
    """15.2: mean loss of a token over all micro-batches."""
    return (mean_losses * n_tokens).sum() / n_tokens.sum()


def _loss_mean_of_means(mean_losses, n_tokens):
    """This is the mean of the means: a token in a short micro-batch weighs more."""
    return mean_losses.mean()


def _loss_sum_of_means(mean_losses, n_tokens):
    """The means are added up: twice the micro-batches would double this loss."""
    return mean_losses.sum()


def _loss_not_divided(mean_losses, n_tokens):
    """This is the sum over all tokens: it is not divided by their number."""
    return (mean_losses * n_tokens).sum()


def _loss_over_steps(mean_losses, n_tokens):
    """The sum over tokens is divided by the number of micro-batches, not of tokens."""
    return (mean_losses * n_tokens).mean()


def _loss_weighted_inversely(mean_losses, n_tokens):
    """The weights are upside down: a mean of many tokens has to count more."""
    return (mean_losses / n_tokens).sum() / (1 / n_tokens).sum()


def z0_of_batch(logps, ref_logps, prompts, answers):
    """15.3: KTO's reference point as estimated from one batch, nats."""
    other = torch.cat([answers[1:], answers[:1]])
    return torch.relu((logps - ref_logps)[prompts, other].mean())


def _z0_matched(logps, ref_logps, prompts, answers):
    """Every prompt has its own answer here: z0 takes that of the next row."""
    return torch.relu((logps - ref_logps)[prompts, answers].mean())


def _z0_negative(logps, ref_logps, prompts, answers):
    """The clamp is missing: z0 is never below 0."""
    other = torch.cat([answers[1:], answers[:1]])
    return (logps - ref_logps)[prompts, other].mean()


def _z0_clamped_first(logps, ref_logps, prompts, answers):
    """Each log-ratio is clamped by itself: the clamp comes after the mean."""
    other = torch.cat([answers[1:], answers[:1]])
    return torch.relu((logps - ref_logps)[prompts, other]).mean()


def _z0_backwards(logps, ref_logps, prompts, answers):
    """The shift goes the other way: prompt i takes the answer of row i + 1."""
    other = torch.cat([answers[-1:], answers[:-1]])
    return torch.relu((logps - ref_logps)[prompts, other].mean())


def _z0_reversed(logps, ref_logps, prompts, answers):
    """The batch is reversed here: in an odd one the middle prompt keeps its own answer."""
    return torch.relu((logps - ref_logps)[prompts, answers.flip(0)].mean())


def _z0_exact(logps, ref_logps, prompts, answers):
    """This is the exact KL of the batch's prompts, which z0 only means to estimate."""
    return (logps.exp() * (logps - ref_logps)).sum(1)[prompts].mean()


EXERCISES = (
    Exercise(
        "15.1",
        cases=(
            (-1.2, -1.2, 0.0, 0.0, 0.0, False),
            (0.0, 0.0, 0.0, 0.0, 0.0, False),
            (-1.2, -1.6, 0.0, 0.0, 0.0, False),
            (-1.2, -1.6, 0.7, 0.0, 0.0, False),
            (-0.3, -4.3, 0.7, 2.1, 0.0, True),
            (-0.3, -4.3, 0.7, 2.1, 0.0, False),
            (-0.4, -4.1, 0.7, 2.1, 3.3, False),
        ),
        answer=which_fault,
        mistakes=(
            _fault_equal_before_masked,
            _fault_frozen_for_rate,
            _fault_rate_for_frozen,
            _fault_without_sharing,
            _fault_without_margin,
        ),
    ),
    Exercise(
        "15.2",
        cases=(
            (
                torch.tensor([3.0, 1.0], dtype=torch.float64),
                torch.tensor([2.0, 8.0], dtype=torch.float64),
            ),
            (
                torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64),
                torch.tensor([7.0, 1.0, 4.0], dtype=torch.float64),
            ),
        ),
        answer=whole_batch_loss,
        mistakes=(
            _loss_mean_of_means,
            _loss_sum_of_means,
            _loss_not_divided,
            _loss_over_steps,
            _loss_weighted_inversely,
        ),
    ),
    Exercise(
        "15.3",
        cases=(
            (LOGPS, REF_LOGPS, torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])),
            (LOGPS, REF_LOGPS, torch.tensor([2, 1, 1, 0]), torch.tensor([0, 2, 2, 3])),
            (LOGPS, REF_LOGPS, torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2])),
        ),
        answer=z0_of_batch,
        mistakes=(
            _z0_matched,
            _z0_negative,
            _z0_clamped_first,
            _z0_backwards,
            _z0_reversed,
            _z0_exact,
        ),
    ),
)

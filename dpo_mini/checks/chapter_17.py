"""Chapter 17: answer the questions people ask."""

from functools import cache

import torch
from torch.nn.functional import logsigmoid

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, random_policies

PROBS = [[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.25, 0.05, 0.3, 0.4]]
REF_PROBS = [[0.3, 0.3, 0.2, 0.2], [0.3, 0.2, 0.2, 0.3], [0.4, 0.2, 0.3, 0.1]]
LOGPS = torch.tensor(PROBS, dtype=torch.float64).log()
REF_LOGPS = torch.tensor(REF_PROBS, dtype=torch.float64).log()


FAULTS = (1, 2, 3, 4, 5, 6, 7)


def judge_which_fault(which_fault):
    """17.1: policies trained with each of the faults are told apart."""
    for fault, seen in _stuck_runs():
        agree(
            which_fault(*seen),
            fault,
            "a policy was trained with one of the seven faults, and from its measurements you name "
            "another",
        )


@cache
def _stuck_runs():
    """Pairs (fault, its six measurements): every fault on tables of 3 to 6 answers."""
    return [(fault, _stuck_run(fault, n)) for fault in FAULTS for n in (3, 4, 5, 6)]


def _stuck_run(fault, n):
    start = draws(n, seed=n)
    logits = start.clone().requires_grad_(fault != 3)
    reference = logits if fault == 6 else start
    pair = [1, 1] if fault == 2 else [n - 1, n - 2]
    counted = 0.0 if fault == 1 else 1.0  # tokens under the mask
    beta = 1e-6 if fault == 5 else 0.5
    for _ in range(5):
        if fault == 7:
            reference = logits.detach().clone()
        logps = counted * logits.log_softmax(0)[pair]
        ref_logps = counted * reference.detach().log_softmax(0)[pair]
        chosen_gain, rejected_gain = logps - ref_logps
        margin = chosen_gain - rejected_gain
        slope = torch.zeros_like(start)
        if fault != 3:
            (slope,) = torch.autograd.grad(-logsigmoid(beta * margin), logits)
        with torch.no_grad():
            logits -= (0.0 if fault == 4 else 0.3) * slope / beta
    grad, moved = (slope / beta).norm(), (logits - start).norm()
    seen = (*logps, grad, moved, margin)
    return (*(value.item() for value in seen), reference is logits)


def _first_sign(order, chosen_logp, rejected_logp, grad, moved, margin, shared):
    """The first fault of `order` whose sign is there, else 7."""
    signs = {
        1: chosen_logp == rejected_logp == 0,
        2: chosen_logp == rejected_logp,
        3: grad == 0,
        4: moved == 0,
        5: margin != 0,
        6: shared,
    }
    return next((fault for fault in order if signs[fault]), 7)


def _fault_equal_before_masked(*seen):
    """Two log-probs of 0 are equal too, and no answer has probability 1: look at that first."""
    return _first_sign((2, 1, 3, 4, 6, 5), *seen)


def _fault_frozen_for_rate(*seen):
    """Whatever stands still is called frozen here: a learning rate of 0 leaves a gradient."""
    found = _first_sign((1, 2, 4, 5, 6), *seen)
    return 3 if found == 4 else found


def _fault_rate_for_frozen(*seen):
    """A learning rate of 0 is blamed here where no gradient arrived at all."""
    return _first_sign((1, 2, 4, 5, 6), *seen)


def _fault_without_sharing(*seen):
    """Shared weights and a reference that is read anew look alike: ask who shares weights."""
    return _first_sign((1, 2, 3, 4, 5), *seen)


def _fault_without_margin(*seen):
    """The policy has a margin in nats, so its reference is another one: look at beta."""
    return _first_sign((1, 2, 3, 4, 6), *seen)


_RIGHT_ORDER = (1, 2, 3, 4, 5, 6)


def _fault_counted_from_zero(*seen):
    """These are the right faults, counted from 0: question 2 counts from 1."""
    return _first_sign(_RIGHT_ORDER, *seen) - 1


def _fault_shared_for_anew(*seen):
    """Shared weights and a reference that is read anew have changed places."""
    found = _first_sign(_RIGHT_ORDER, *seen)
    return {6: 7, 7: 6}.get(found, found)


def _fault_movement_first(*seen):
    """You ask for the movement first: where nothing moves, the forward pass tells more."""
    return _first_sign((4, 1, 2, 3, 5, 6), *seen)


def judge_whole_batch_loss(whole_batch_loss):
    """17.2: however the tokens of a batch are split, the loss is the mean over all of them."""
    for seed, sizes in enumerate(((4,), (3, 9), (1, 7, 2), (5, 5, 1, 12))):
        token_losses = draws(sum(sizes), seed=seed).exp()
        parts = token_losses.split(sizes)
        agree(
            whole_batch_loss(
                torch.stack([part.mean() for part in parts]),
                torch.tensor(sizes, dtype=torch.float64),
            ),
            token_losses.mean(),
            "a batch of known token losses was split into micro-batches, and the mean over all "
            "its tokens is another number",
        )


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


def _loss_means_over_tokens(mean_losses, n_tokens):
    """The means are divided by the number of tokens: they are divided already, each by its own."""
    return mean_losses.sum() / n_tokens.sum()


def _loss_mean_batch(mean_losses, n_tokens):
    """This is a mean loss times a mean number of tokens: sum over tokens, and divide once."""
    return mean_losses.mean() * n_tokens.mean()


def judge_z0_of_batch(z0_of_batch):
    """17.4: prompts and the answers that they are to be paired with, dealt to the next rows."""
    for n_rows in (1, 2, 3, 5, 8):
        ref_probs = draws(4, 3, seed=n_rows).softmax(1)
        logps, ref_logps = random_policies(ref_probs, seed=n_rows).log(), ref_probs.log()
        prompts = torch.arange(n_rows) % 4
        partners = (draws(n_rows, seed=n_rows).abs() * 9).long() % 3
        answers = torch.cat([partners[-1:], partners[:-1]])
        mean = _mean_of_pairs(logps - ref_logps, prompts, partners)
        for policy, reference, wanted in ((logps, ref_logps, mean), (ref_logps, logps, -mean)):
            got = z0_of_batch(policy, reference, prompts, answers)
            if wanted < 0:
                agree(got, 0.0, "the mismatched answers have lost on average, and z0 is not 0")
            else:
                agree(
                    got,
                    wanted,
                    "each prompt's partner was dealt to the row after it, and the partners' mean "
                    "log-ratio is another number",
                )


def _mean_of_pairs(log_ratios, prompts, partners):
    pairs = zip(prompts.tolist(), partners.tolist(), strict=True)
    return sum(log_ratios[x, y].item() for x, y in pairs) / len(prompts)


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


def _mismatched(logps, ref_logps, prompts, answers):
    return (logps - ref_logps)[prompts, torch.cat([answers[1:], answers[:1]])]


def _z0_distance(logps, ref_logps, prompts, answers):
    """The sign is dropped: a mean below 0 gives 0."""
    return _mismatched(logps, ref_logps, prompts, answers).mean().abs()


def _z0_summed(logps, ref_logps, prompts, answers):
    """The log-ratios are added up: z0 is their mean."""
    return torch.relu(_mismatched(logps, ref_logps, prompts, answers).sum())


def _z0_of_all_pairs(logps, ref_logps, prompts, answers):
    """Every prompt meets every answer of the batch: it meets that of the next row alone."""
    return torch.relu((logps - ref_logps)[prompts][:, answers].mean())


def _z0_without_the_last(logps, ref_logps, prompts, answers):
    """The last row is left out: it takes the answer of the first."""
    return torch.relu((logps - ref_logps)[prompts[:-1], answers[1:]].mean())


EXERCISES = (
    Exercise(
        "17.1",
        cases=(
            (0.0, 0.0, 0.0, 0.0, 0.0, False),
            (-1.2, -1.2, 0.0, 0.0, 0.0, False),
            (-1.2, -1.6, 0.0, 0.0, 0.0, False),
            (-1.2, -1.6, 0.7, 0.0, 0.0, False),
            (-0.3, -4.3, 0.7, 2.1, 0.0, True),
            (-0.3, -4.3, 0.7, 2.1, 0.0, False),
            (-0.4, -4.1, 0.7, 2.1, 3.3, False),
        ),
        judge=judge_which_fault,
        mistakes=(
            _fault_equal_before_masked,
            _fault_frozen_for_rate,
            _fault_rate_for_frozen,
            _fault_without_sharing,
            _fault_without_margin,
            _fault_counted_from_zero,
            _fault_shared_for_anew,
            _fault_movement_first,
        ),
    ),
    Exercise(
        "17.2",
        cases=(
            (
                torch.tensor([3.0, 1.0], dtype=torch.float64),
                torch.tensor([2.0, 8.0], dtype=torch.float64),
            ),
            (
                torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64),
                torch.tensor([7.0, 4.0, 1.0], dtype=torch.float64),
            ),
        ),
        judge=judge_whole_batch_loss,
        mistakes=(
            _loss_mean_of_means,
            _loss_sum_of_means,
            _loss_not_divided,
            _loss_over_steps,
            _loss_weighted_inversely,
            _loss_means_over_tokens,
            _loss_mean_batch,
        ),
    ),
    Exercise(
        "17.4",
        cases=(
            (LOGPS, REF_LOGPS, torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])),
            (LOGPS, REF_LOGPS, torch.tensor([2, 1, 1, 0]), torch.tensor([0, 2, 2, 3])),
            (LOGPS, REF_LOGPS, torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2])),
            (LOGPS, REF_LOGPS, torch.tensor([2, 2, 2, 1, 1]), torch.tensor([2, 3, 3, 3, 0])),
        ),
        judge=judge_z0_of_batch,
        mistakes=(
            _z0_matched,
            _z0_negative,
            _z0_clamped_first,
            _z0_backwards,
            _z0_reversed,
            _z0_exact,
            _z0_distance,
            _z0_summed,
            _z0_of_all_pairs,
            _z0_without_the_last,
        ),
    ),
)

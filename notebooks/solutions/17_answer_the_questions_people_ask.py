"""Solutions of chapter 17."""


def which_fault(chosen_logp, rejected_logp, grad, moved, margin, shared):
    """17.1: from the forward pass to the backward pass to the step."""
    if chosen_logp == 0 and rejected_logp == 0:
        return 1  # all tokens masked
    if chosen_logp == rejected_logp:
        return 2  # one answer twice
    if grad == 0:
        return 3  # frozen
    if moved == 0:
        return 4  # learning rate 0
    if margin != 0:
        return 5  # beta of nearly 0
    return 6 if shared else 7


def whole_batch_loss(mean_losses, n_tokens):
    """17.2: a mean with the token counts as weights."""
    return mean_losses @ (n_tokens / n_tokens.sum())


def z0_of_batch(logps, ref_logps, prompts, answers):
    """17.4: shift by one, average, and only then clamp."""
    mismatched = answers.roll(-1)
    u = logps[prompts, mismatched] - ref_logps[prompts, mismatched]
    return u.mean().clamp(min=0)


SOLUTIONS = {
    "17.1": which_fault,
    "17.2": whole_batch_loss,
    "17.4": z0_of_batch,
}

"""Solutions of chapter 04."""

import torch


def implied_rewards(token_logps, ref_token_logps, beta):
    """4.1: sum over the tokens, subtract, and multiply by beta."""
    return beta * (token_logps.sum(1) - ref_token_logps.sum(1))


def representative(rewards, ref_probs, beta):
    """4.2: take off beta log Z."""
    return rewards - beta * torch.logsumexp(
        ref_probs.log() + rewards / beta, 0
    )


def anchored_rewards(probs, ref_probs, beta, reward_of_first):
    """4.3: one known reward fixes the number that the policy leaves open."""
    implied = beta * (probs.log() - ref_probs.log())
    return implied - implied[0] + reward_of_first


def move_to_reference(probs, old_ref_probs, new_ref_probs):
    """4.4: the ratio to the old reference is e^(r/beta) / Z."""
    tilt = probs.log() - old_ref_probs.log()
    return torch.softmax(new_ref_probs.log() + tilt, dim=0)


SOLUTIONS = {
    "4.1": implied_rewards,
    "4.2": representative,
    "4.3": anchored_rewards,
    "4.4": move_to_reference,
}

"""Solutions of chapter 04."""

import torch


def representative(rewards, ref_probs, beta):
    """4.1: take off beta log Z."""
    return rewards - beta * torch.logsumexp(
        ref_probs.log() + rewards / beta, 0
    )


def anchored_rewards(probs, ref_probs, beta, reward_of_first):
    """4.2: one known reward fixes the number that the policy leaves open."""
    implied = beta * (probs.log() - ref_probs.log())
    return implied - implied[0] + reward_of_first


def move_to_reference(probs, old_ref_probs, new_ref_probs):
    """4.3: the ratio to the old reference is e^(r/beta) / Z."""
    tilt = probs.log() - old_ref_probs.log()
    return torch.softmax(new_ref_probs.log() + tilt, dim=0)


SOLUTIONS = {
    "4.1": representative,
    "4.2": anchored_rewards,
    "4.3": move_to_reference,
}

"""Solutions of chapter 06."""

import torch
from torch.nn.functional import logsigmoid


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """6.1: minus log P(label); logsigmoid does not overflow."""
    r_chosen = beta * (chosen - ref_chosen)
    r_rejected = beta * (rejected - ref_rejected)
    return -logsigmoid(r_chosen - r_rejected)


def dpo_gradient(logps, ref_logps, winners, losers, beta):
    """6.2: minus each pair's push, which lifts the winner over the loser."""
    logratios = logps - ref_logps
    margins = beta * (logratios[winners] - logratios[losers])
    push = beta * torch.sigmoid(-margins) / len(winners)
    gradient = torch.zeros_like(logps)
    return gradient.index_add(0, winners, -push).index_add(0, losers, push)


def standard_error(share, n, beta):
    """6.3: the margin is logit(share) / beta; multiply by its slope."""
    error_of_share = (share * (1 - share) / n) ** 0.5
    return error_of_share / (beta * share * (1 - share))


def completion_logp(token_logps, tokens, end_token):
    """6.4: keep what has no end token before it."""
    is_end = (tokens == end_token).long()
    ends_before = is_end.cumsum(1) - is_end
    return token_logps.masked_fill(ends_before > 0, 0.0).sum(1)


SOLUTIONS = {
    "6.1": dpo,
    "6.2": dpo_gradient,
    "6.3": standard_error,
    "6.4": completion_logp,
}

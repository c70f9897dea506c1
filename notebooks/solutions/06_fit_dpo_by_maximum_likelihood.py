"""Solutions of chapter 06."""

from torch.nn.functional import logsigmoid


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """6.1: minus log P(label); logsigmoid does not overflow."""
    r_chosen = beta * (chosen - ref_chosen)
    r_rejected = beta * (rejected - ref_rejected)
    return -logsigmoid(r_chosen - r_rejected)


def completion_logp(token_logps, tokens, end_token):
    """6.2: keep what has no end token before it."""
    is_end = (tokens == end_token).long()
    ends_before = is_end.cumsum(1) - is_end
    return token_logps.masked_fill(ends_before > 0, 0.0).sum(1)


def standard_error(share, n, beta):
    """6.3: the margin is logit(share) / beta; multiply by its slope."""
    error_of_share = (share * (1 - share) / n) ** 0.5
    return error_of_share / (beta * share * (1 - share))


SOLUTIONS = {"6.1": dpo, "6.2": completion_logp, "6.3": standard_error}

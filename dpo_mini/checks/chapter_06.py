"""Chapter 06: fit DPO by maximum likelihood."""

import torch

from dpo_mini.checks import Exercise

CHOSEN = torch.tensor([-2.0, -1.2, -0.7], dtype=torch.float64)
REJECTED = torch.tensor([-1.5, -3.1, -2.2], dtype=torch.float64)
REF_CHOSEN = torch.tensor([-1.8, -2.0, -0.9], dtype=torch.float64)
REF_REJECTED = torch.tensor([-1.1, -2.6, -1.3], dtype=torch.float64)
FAR = torch.tensor([-3000.0, -1.0, -900.0], dtype=torch.float64)  # a chosen answer given up

TOKEN_LOGPS = torch.log(
    torch.tensor(
        [[0.5, 0.2, 0.4, 0.9], [0.3, 0.6, 0.7, 0.8], [0.1, 0.25, 0.35, 0.45], [0.2, 0.9, 0.5, 0.6]],
        dtype=torch.float64,
    )
)
TOKENS = torch.tensor([[5, 2, 2, 2], [2, 2, 2, 2], [4, 3, 5, 1], [3, 1, 5, 2]])  # 2 ends and pads


def dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """6.1: the DPO loss of each pair, `[B]`, in nats."""
    d = (chosen - ref_chosen) - (rejected - ref_rejected)
    return torch.logaddexp(torch.zeros_like(d), -beta * d)


def _dpo_without_reference(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The reference is missing: this fits softmax(r / beta), as in chapter 00."""
    return torch.logaddexp(torch.zeros_like(chosen), beta * (rejected - chosen))


def _dpo_without_beta(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Beta is missing: a margin in nats is read as a margin of reward."""
    return dpo(chosen, rejected, ref_chosen, ref_rejected, 1.0)


def _dpo_turned_round(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Chosen and rejected are turned round: this loss makes the loser likely."""
    return dpo(rejected, chosen, ref_rejected, ref_chosen, beta)


def _dpo_likelihood(chosen, rejected, ref_chosen, ref_rejected, beta):
    """This is the probability of the label: the loss is its negative logarithm."""
    return torch.exp(-dpo(chosen, rejected, ref_chosen, ref_rejected, beta))


def _dpo_that_overflows(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Right on paper: but far below a margin of 0 the sigmoid underflows and its logarithm is
    infinite. Use logsigmoid or softplus.
    """
    d = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -torch.log(torch.sigmoid(beta * d))


def _dpo_reference_added(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The reference has the wrong sign: it is subtracted from each log-probability."""
    return dpo(chosen, rejected, -ref_chosen, -ref_rejected, beta)


def completion_logp(token_logps, tokens, end_token):
    """6.2: log pi(y|x), `[B]`, where the end token also pads."""
    total = torch.zeros(len(tokens), dtype=token_logps.dtype)
    for row in range(len(tokens)):
        for token, logp in zip(tokens[row].tolist(), token_logps[row], strict=True):
            total[row] += logp
            if token == end_token:
                break
    return total


def _logp_without_end(token_logps, tokens, end_token):
    """The end token is left out with the padding: a model scored so never learns to stop."""
    return (token_logps * (tokens != end_token)).sum(1)


def _logp_with_padding(token_logps, tokens, end_token):
    """The padding is counted: the score of an answer now depends on the length of its batch."""
    return token_logps.sum(1)


def _logp_mean(token_logps, tokens, end_token):
    """This is a mean over tokens: it is no longer the logarithm of a probability."""
    ends_before = (tokens == end_token).cumsum(1) - (tokens == end_token).long()
    return completion_logp(token_logps, tokens, end_token) / (ends_before == 0).sum(1)


def _logp_shifted_mask(token_logps, tokens, end_token):
    """The mask is one place too far: the first padding token is counted too."""
    ends = (tokens == end_token).long()
    keep = torch.zeros_like(ends)
    keep[:, 1:] = (ends.cumsum(1) - ends)[:, :-1]
    return (token_logps * (keep == 0)).sum(1)


def standard_error(share, n, beta):
    """6.3: standard error of the fitted log-ratio margin of one pair, nats."""
    information = n * beta**2 * share * (1 - share)
    return information**-0.5


def _error_of_the_share(share, n, beta):
    """This is the standard error of the share of wins: the margin is a function of it, so multiply
    by that function's slope.
    """
    return (share * (1 - share) / n) ** 0.5


def _error_in_reward(share, n, beta):
    """This is the standard error of the reward margin: a log-ratio is the reward over beta."""
    return beta * standard_error(share, n, beta)


def _error_squared(share, n, beta):
    """This is the variance: a standard error is its square root."""
    return standard_error(share, n, beta) ** 2


def _error_of_one_label(share, n, beta):
    """The number of labels is missing: this is the error of a single one."""
    return standard_error(share, 1, beta)


def _error_beta_upside_down(share, n, beta):
    """Beta is on the wrong side: a small beta makes the policy's margin less certain, not more."""
    return beta**2 * standard_error(share, n, beta)


EXERCISES = (
    Exercise(
        "6.1",
        cases=(
            (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5),
            (FAR, REJECTED, REF_CHOSEN, REF_REJECTED, 2.0),
        ),
        answer=dpo,
        mistakes=(
            _dpo_without_reference,
            _dpo_without_beta,
            _dpo_turned_round,
            _dpo_likelihood,
            _dpo_that_overflows,
            _dpo_reference_added,
        ),
    ),
    Exercise(
        "6.2",
        cases=((TOKEN_LOGPS, TOKENS, 2), (TOKEN_LOGPS.flip(0), TOKENS, 5)),
        answer=completion_logp,
        mistakes=(_logp_without_end, _logp_with_padding, _logp_mean, _logp_shifted_mask),
    ),
    Exercise(
        "6.3",
        cases=((0.7311, 400, 0.5), (0.55, 90, 2.0)),
        answer=standard_error,
        mistakes=(
            _error_of_the_share,
            _error_in_reward,
            _error_squared,
            _error_of_one_label,
            _error_beta_upside_down,
        ),
    ),
)

"""Chapter 06: fit DPO by maximum likelihood."""

import math
from itertools import product

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, require

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
GRADIENT_CASES = (  # with answers that stand in several pairs, and one that stands in none
    (
        torch.tensor([0.4, -0.9, 1.2, 0.1, -0.3], dtype=torch.float64).log_softmax(0),
        torch.tensor([-0.2, 0.5, 0.3, 0.9, -1.0], dtype=torch.float64).log_softmax(0),
        torch.tensor([0, 0, 1, 2, 0]),
        torch.tensor([1, 3, 3, 0, 1]),
        0.5,
    ),
    (
        torch.tensor([1.5, -0.4, 0.2, 0.7], dtype=torch.float64).log_softmax(0),
        torch.tensor([-0.3, 0.8, 0.1, 0.6], dtype=torch.float64).log_softmax(0),
        torch.tensor([2, 1, 2]),
        torch.tensor([0, 0, 1]),
        2.0,
    ),
)
TOKENS = torch.tensor([[5, 2, 2, 2], [2, 2, 2, 2], [4, 3, 5, 1], [3, 1, 5, 2]])  # 2 ends and pads


def judge_dpo(dpo):
    """6.1: the probabilities of both labels sum to 1, and their log-odds are the margin."""
    columns = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    for beta in (0.5, 2.0, 0.1):
        for chosen, rejected, ref_chosen, ref_rejected in (columns, (FAR, *columns[1:])):
            loss = dpo(chosen, rejected, ref_chosen, ref_rejected, beta)
            other = dpo(rejected, chosen, ref_rejected, ref_chosen, beta)
            finite = torch.isfinite(loss).all()
            require(finite, "a margin far below 0 has an infinite loss or NaN")
            agree(
                torch.exp(-loss) + torch.exp(-other),
                1.0,
                "the probabilities of a label and of its opposite do not sum to 1",
            )
            agree(
                other - loss,
                beta * ((chosen - ref_chosen) - (rejected - ref_rejected)),
                "the log-odds of the label are not beta times the margin of the log-ratios",
            )


def _minus_log_sigmoid(margins):
    return torch.logaddexp(torch.zeros_like(margins), -margins)


def _dpo_without_reference(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The reference is missing: this fits softmax(r / beta), as in chapter 00."""
    return torch.logaddexp(torch.zeros_like(chosen), beta * (rejected - chosen))


def _dpo_without_beta(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Beta is missing: a margin in nats is read as a margin of reward."""
    return _minus_log_sigmoid((chosen - ref_chosen) - (rejected - ref_rejected))


def _dpo_turned_round(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Chosen and rejected have changed places: this loss makes the loser likely."""
    return _minus_log_sigmoid(beta * ((rejected - ref_rejected) - (chosen - ref_chosen)))


def _dpo_likelihood(chosen, rejected, ref_chosen, ref_rejected, beta):
    """This is the probability of the label: the loss is its negative logarithm."""
    d = (chosen - ref_chosen) - (rejected - ref_rejected)
    return torch.exp(-_minus_log_sigmoid(beta * d))


def _dpo_that_overflows(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Right on paper: but far below a margin of 0 the sigmoid underflows and its logarithm is
    infinite. Use logsigmoid or softplus.
    """
    d = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -torch.log(torch.sigmoid(beta * d))


def _dpo_reference_added(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The reference has the wrong sign: it is subtracted from each log-probability."""
    return _minus_log_sigmoid(beta * ((chosen + ref_chosen) - (rejected + ref_rejected)))


def _dpo_margin(chosen, rejected, ref_chosen, ref_rejected, beta):
    """This is the margin: the loss is a function of it that falls as it grows."""
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


def _dpo_beta_outside(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Beta multiplies the loss: it multiplies the margin, inside the sigmoid."""
    return beta * _minus_log_sigmoid((chosen - ref_chosen) - (rejected - ref_rejected))


def _dpo_each_alone(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Each answer has a sigmoid of its own: a pair has one, of the difference."""
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return _minus_log_sigmoid(good) + _minus_log_sigmoid(-bad)


def judge_dpo_gradient(dpo_gradient):
    """6.2: no constant moves, nor an answer in no pair; along each direction, the loss's slope."""
    for logps, ref_logps, winners, losers, beta in GRADIENT_CASES:
        gradient = dpo_gradient(logps, ref_logps, winners, losers, beta)
        agree(
            gradient.sum(),
            0.0,
            "a constant added to all logits changes no loss, and the gradient does not sum to 0",
        )
        compared = torch.zeros(len(logps), dtype=torch.bool)
        compared[torch.cat([winners, losers])] = True
        agree(gradient[~compared], 0.0, "the logit of an answer in no pair has a gradient")
        logits = (logps + 0.3).requires_grad_()
        logratios = logits.log_softmax(0) - ref_logps
        margins = beta * (logratios[winners] - logratios[losers])
        (slopes,) = torch.autograd.grad(_minus_log_sigmoid(margins).mean(), logits)
        agree(
            gradient,
            slopes,
            "the mean loss of the pairs does not change by the gradient times a small step",
        )


def _gradient_of_pushes(push, logps, winners, losers):
    """Each pair's push added to its winner's logit and subtracted from its loser's."""
    signs = torch.zeros(len(winners), len(logps), dtype=logps.dtype)
    rows = torch.arange(len(winners))
    signs[rows, winners] += 1.0
    signs[rows, losers] -= 1.0
    return -(push[:, None] * signs)


def _margins_of(logps, ref_logps, winners, losers, beta):
    logratios = logps - ref_logps
    return beta * (logratios[winners] - logratios[losers])


def _gradient_without_weight(logps, ref_logps, winners, losers, beta):
    """The weight is missing: a pair that is ranked right is pushed as hard as one ranked wrong."""
    push = torch.full(winners.shape, beta, dtype=logps.dtype)
    return _gradient_of_pushes(push, logps, winners, losers).mean(0)


def _gradient_weighed_by_right(logps, ref_logps, winners, losers, beta):
    """The weight is upside down: it is that of the label's own probability, and so pushes hardest
    the pairs that are ranked right already.
    """
    push = beta * torch.sigmoid(_margins_of(logps, ref_logps, winners, losers, beta))
    return _gradient_of_pushes(push, logps, winners, losers).mean(0)


def _gradient_without_reference(logps, ref_logps, winners, losers, beta):
    """The reference is missing from the margin in the weight."""
    push = beta * torch.sigmoid(-beta * (logps[winners] - logps[losers]))
    return _gradient_of_pushes(push, logps, winners, losers).mean(0)


def _gradient_weight_in_nats(logps, ref_logps, winners, losers, beta):
    """Beta is missing inside the weight: the margin is beta times the difference in nats."""
    push = beta * torch.sigmoid(-_margins_of(logps, ref_logps, winners, losers, 1.0))
    return _gradient_of_pushes(push, logps, winners, losers).mean(0)


def _gradient_without_outer_beta(logps, ref_logps, winners, losers, beta):
    """Beta is missing outside the weight: a nat moves the margin by beta."""
    push = torch.sigmoid(-_margins_of(logps, ref_logps, winners, losers, beta))
    return _gradient_of_pushes(push, logps, winners, losers).mean(0)


def _gradient_summed(logps, ref_logps, winners, losers, beta):
    """This is a sum over pairs: the loss is their mean."""
    push = beta * torch.sigmoid(-_margins_of(logps, ref_logps, winners, losers, beta))
    return _gradient_of_pushes(push, logps, winners, losers).sum(0)


def _gradient_of_last_pairs(logps, ref_logps, winners, losers, beta):
    """Of several pairs with the same answer only the last one counts: indexed assignment does not
    add up. Use index_add.
    """
    push = beta * torch.sigmoid(-_margins_of(logps, ref_logps, winners, losers, beta))
    gradient = [0.0] * len(logps)
    for value, winner in zip(push, winners.tolist(), strict=True):
        gradient[winner] = -value
    before = list(gradient)
    for value, loser in zip(push, losers.tolist(), strict=True):
        gradient[loser] = before[loser] + value
    return torch.stack([torch.as_tensor(v, dtype=logps.dtype) for v in gradient]) / len(winners)


def _gradient_of_the_winner(logps, ref_logps, winners, losers, beta):
    """The loser is missing: this makes the winner likelier at the cost of every other answer."""
    push = beta * torch.sigmoid(-_margins_of(logps, ref_logps, winners, losers, beta))
    chosen = torch.nn.functional.one_hot(winners, len(logps)).to(logps.dtype)
    return -(push[:, None] * (chosen - logps.exp())).mean(0)


def judge_completion_logp(completion_logp):
    """6.4: which token counts, in every row; and every completion of a policy, to sum to 1."""
    rows, end_token = torch.tensor(list(product(range(3), repeat=4))), 1
    nothing = torch.zeros(rows.shape, dtype=torch.float64)
    agree(completion_logp(nothing, rows, end_token), 0.0, "tokens of probability 1 do not give 0")
    for place in range(4):
        less = nothing.clone()
        less[:, place] = -0.7
        goes_on = [end_token not in row[:place] for row in rows.tolist()]
        agree(
            completion_logp(less, rows, end_token),
            -0.7 * torch.tensor(goes_on, dtype=torch.float64),
            "a token counts once where no end token stands before it, and else not at all",
        )
    unended = [row for row in rows.tolist() if end_token not in row[:-1]]
    ended = [[*row[:n], *[end_token] * (4 - n)] for row in unended for n in range(3)]
    completions = torch.tensor([list(row) for row in {*map(tuple, unended), *map(tuple, ended)}])
    before = torch.cat([torch.zeros_like(completions[:, :1]), completions[:, :-1]], 1)
    policy = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]], dtype=torch.float64)
    scored = policy[before, completions].log()
    agree(
        completion_logp(scored, completions, end_token).exp().sum(),
        1.0,
        "the probabilities of all completions of a policy do not sum to 1",
    )


def _logp_without_end(token_logps, tokens, end_token):
    """The end token is left out with the padding: a model scored so never learns to stop."""
    return (token_logps * (tokens != end_token)).sum(1)


def _logp_with_padding(token_logps, tokens, end_token):
    """The padding is counted: the score of an answer now depends on the length of its batch."""
    return token_logps.sum(1)


def _logp_mean(token_logps, tokens, end_token):
    """This is a mean over tokens: it is no longer the logarithm of a probability."""
    ends_before = (tokens == end_token).cumsum(1) - (tokens == end_token).long()
    counted = ends_before == 0
    return (token_logps * counted).sum(1) / counted.sum(1)


def _logp_shifted_mask(token_logps, tokens, end_token):
    """The mask is one place too far: the first padding token is counted too."""
    ends = (tokens == end_token).long()
    keep = torch.zeros_like(ends)
    keep[:, 1:] = (ends.cumsum(1) - ends)[:, :-1]
    return (token_logps * (keep == 0)).sum(1)


def _counted_tokens(tokens, end_token):
    ends = (tokens == end_token).long()
    return ends.cumsum(1) - ends == 0


def _logp_without_first(token_logps, tokens, end_token):
    """The first token is left out: it was chosen as well."""
    return (token_logps * _counted_tokens(tokens, end_token))[:, 1:].sum(1)


def _logp_of_padding(token_logps, tokens, end_token):
    """The mask is inverted: this counts the padding alone."""
    return (token_logps * ~_counted_tokens(tokens, end_token)).sum(1)


def judge_standard_error(standard_error):
    """6.3: one over the root of the log-likelihood's curvature at its maximum, by autograd."""
    for share, n, beta in ((0.7311, 400, 0.5), (0.55, 90, 2.0), (0.1, 25, 0.25), (0.9, 1000, 1.6)):
        fitted = math.log(share / (1 - share)) / beta  # there a label is right with this share
        margin = torch.tensor(fitted, dtype=torch.float64, requires_grad=True)
        odds = torch.stack([beta * margin, -beta * margin])
        shares = torch.tensor([share, 1 - share], dtype=torch.float64)
        loss = -n * (shares * torch.nn.functional.logsigmoid(odds)).sum()
        (slope,) = torch.autograd.grad(loss, margin, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, margin)
        error = standard_error(share, n, beta)
        require(error > 0, "a standard error is above 0")
        agree(
            error**2 * curvature,
            1.0,
            "squared, and times the curvature of the n labels' loss in the margin, it is not 1",
        )


def _error_of_the_share(share, n, beta):
    """This is the standard error of the share of wins: the margin is a function of it, so multiply
    by that function's slope.
    """
    return (share * (1 - share) / n) ** 0.5


def _error_in_reward(share, n, beta):
    """This is the standard error of the reward margin: a log-ratio is the reward over beta."""
    return (n * share * (1 - share)) ** -0.5


def _error_squared(share, n, beta):
    """This is the variance: a standard error is its square root."""
    return 1 / (n * beta**2 * share * (1 - share))


def _error_of_one_label(share, n, beta):
    """The number of labels is missing: this is the error of a single one."""
    return (beta**2 * share * (1 - share)) ** -0.5


def _error_beta_upside_down(share, n, beta):
    """Beta is on the wrong side: a small beta makes the policy's margin less certain, not more."""
    return beta * (n * share * (1 - share)) ** -0.5


def _error_over_n(share, n, beta):
    """The number of labels has no root: four times the labels halve a standard error."""
    return (share * (1 - share)) ** -0.5 / (n * beta)


def _error_slope_forgotten(share, n, beta):
    """This is the share's standard error over beta: the slope of the log-odds is missing."""
    return (share * (1 - share) / n) ** 0.5 / beta


def _error_slope_upside_down(share, n, beta):
    """The slope is upside down: it is that of the log-odds in the share, and above 1."""
    return share * (1 - share) * (share * (1 - share) / n) ** 0.5 / beta


def _error_without_root(share, n, beta):
    """The root is missing: a standard error falls with the root of n, and this with n."""
    return 1 / (n * beta * share * (1 - share))


EXERCISES = (
    Exercise(
        "6.1",
        cases=(
            (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5),
            (FAR, REJECTED, REF_CHOSEN, REF_REJECTED, 2.0),
        ),
        judge=judge_dpo,
        mistakes=(
            _dpo_without_reference,
            _dpo_without_beta,
            _dpo_turned_round,
            _dpo_likelihood,
            _dpo_that_overflows,
            _dpo_reference_added,
            _dpo_margin,
            _dpo_beta_outside,
            _dpo_each_alone,
        ),
        shape=lambda chosen, *_: chosen.shape,
    ),
    Exercise(
        "6.2",
        cases=GRADIENT_CASES,
        judge=judge_dpo_gradient,
        mistakes=(
            _gradient_without_weight,
            _gradient_weighed_by_right,
            _gradient_without_reference,
            _gradient_weight_in_nats,
            _gradient_without_outer_beta,
            _gradient_summed,
            _gradient_of_last_pairs,
            _gradient_of_the_winner,
        ),
        shape=lambda logps, *_: logps.shape,
    ),
    Exercise(
        "6.3",
        cases=((0.7311, 400, 0.5), (0.55, 90, 2.0)),
        judge=judge_standard_error,
        mistakes=(
            _error_of_the_share,
            _error_in_reward,
            _error_squared,
            _error_of_one_label,
            _error_beta_upside_down,
            _error_over_n,
            _error_slope_forgotten,
            _error_slope_upside_down,
            _error_without_root,
        ),
    ),
    Exercise(
        "6.4",
        cases=((TOKEN_LOGPS, TOKENS, 2), (TOKEN_LOGPS.flip(0), TOKENS, 5)),
        judge=judge_completion_logp,
        mistakes=(
            _logp_without_end,
            _logp_with_padding,
            _logp_mean,
            _logp_shifted_mask,
            _logp_without_first,
            _logp_of_padding,
        ),
        shape=lambda token_logps, tokens, end_token: tokens.shape[:1],
    ),
)

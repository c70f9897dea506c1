"""Chapter 08: build PPO, then train with it."""

from itertools import product

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws

REWARDS = torch.tensor([-0.1, 0.3, -0.2, 1.5, 0.4], dtype=torch.float64)
VALUES = torch.tensor([0.6, 0.9, 0.2, 1.1, -0.7], dtype=torch.float64)

LOGPS = torch.tensor([-1.0, -1.0, -2.0, -2.5, -0.4, -3.0, -3.0], dtype=torch.float64)
OLD_LOGPS = torch.tensor([-1.5, -1.5, -1.2, -1.2, -0.4, -3.1, -2.9], dtype=torch.float64)
ADVANTAGES = torch.tensor([2.0, -2.0, 1.5, -1.5, 0.7, 1.0, -1.0], dtype=torch.float64)

SCORES = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
TOKEN_LOGPS = torch.tensor(
    [[-0.5, -1.0, -0.2, -0.9], [-0.3, -2.0, -1.1, -0.4], [-1.4, -0.6, -0.8, -0.7]],
    dtype=torch.float64,
)
REF_LOGPS = torch.tensor(
    [[-0.9, -0.4, -0.6, -1.9], [-1.3, -1.0, -0.1, -2.4], [-0.4, -1.6, -0.5, -0.2]],
    dtype=torch.float64,
)
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])

NEW_VALUES = torch.tensor(
    [[0.7, 1.2, 0.3, -0.4], [-0.5, 0.1, 0.9, 1.6], [0.2, -1.1, 0.8, 0.5]], dtype=torch.float64
)
OLD_VALUES = torch.tensor(
    [[0.4, 0.8, -0.6, 0.9], [-0.2, -0.3, 0.5, 1.1], [0.6, 0.7, -0.9, 0.3]], dtype=torch.float64
)
GAE_ADVANTAGES = torch.tensor(
    [[1.1, -0.7, 0.4, -0.2], [0.3, -1.6, 0.8, 0.2], [-0.9, 1.3, 0.5, -0.6]], dtype=torch.float64
)


def judge_advantages(advantages):
    """8.1: nothing where the values are exact, else the mean over every place to stop looking."""
    for n, (discount, lam) in product((1, 3, 6), ((0.9, 0.7), (0.5, 1.0), (1.0, 0.4), (0.8, 0.0))):
        rewards, values = draws(2, n, seed=n)
        exact = values - discount * _value_after(values)
        agree(
            advantages(exact, values, discount, lam),
            0.0,
            "where each value is the reward plus the discounted value after it, an advantage is "
            "not 0",
        )
        agree(
            advantages(rewards, values, discount, lam),
            torch.stack(
                [_mean_over_stops(rewards[t:], values[t:], discount, lam) for t in range(n)]
            ),
            "an advantage is not the mean of all looks ahead, each a discounted sum up to some "
            "stop and the value there, where lambda is the chance to go on",
        )


def _mean_over_stops(rewards, values, discount, lam):
    """The mean of (k-step return - value) of the first token: one goes on with chance lam."""
    mean, reached = -values[0], 1.0
    for k in range(1, len(rewards) + 1):
        ends = k == len(rewards)
        gathered = sum(discount**s * rewards[s] for s in range(k))
        gathered = gathered + (0.0 if ends else discount**k * values[k])
        mean = mean + reached * (1.0 if ends else 1 - lam) * gathered
        reached *= lam
    return mean


def _value_after(values):
    return torch.cat([values[1:], torch.zeros_like(values[:1])])


def _decayed(td_errors, decay):
    """Each number and what comes after it, shrunk by `decay` a step."""
    steps = torch.arange(len(td_errors))
    distance = steps[None, :] - steps[:, None]
    weights = torch.where(distance < 0, 0.0, float(decay) ** distance.clamp(min=0).double())
    return weights @ td_errors


def _advantages_td(rewards, values, discount, lam):
    """This is the TD error alone, lambda = 0: the later TD errors count too."""
    return rewards + discount * _value_after(values) - values


def _advantages_without_bootstrap(rewards, values, discount, lam):
    """The value of the next prefix is missing: the TD error has the gain in value in it."""
    return _decayed(rewards - values, discount * lam)


def _advantages_lam_alone(rewards, values, discount, lam):
    """The decay is lambda alone: the discount shrinks it too."""
    return _decayed(_advantages_td(rewards, values, discount, lam), lam)


def _advantages_forwards(rewards, values, discount, lam):
    """The sum runs over the past: a token is judged by what comes after it."""
    td_errors = _advantages_td(rewards, values, discount, lam)
    return _decayed(td_errors.flip(0), discount * lam).flip(0)


def _advantages_as_returns(rewards, values, discount, lam):
    """These are the targets of the value function: an advantage has the value taken off."""
    return values + _decayed(_advantages_td(rewards, values, discount, lam), discount * lam)


def _advantages_value_after_the_end(rewards, values, discount, lam):
    """A value is carried on past the last token: after the end there is nothing to come."""
    after = torch.cat([values[1:], values[-1:]])
    return _decayed(rewards + discount * after - values, discount * lam)


def _advantages_td_not_discounted(rewards, values, discount, lam):
    """In the TD error the next value is not discounted."""
    return _decayed(_advantages_td(rewards, values, 1.0, lam), discount * lam)


def _advantages_of_the_same_value(rewards, values, discount, lam):
    """The TD error holds the same value twice: the value that is discounted is the next one's."""
    return _decayed(rewards + discount * values - values, discount * lam)


def _advantages_wrapped(rewards, values, discount, lam):
    """After the last token the first value comes back: after the end there is nothing to come."""
    return _decayed(rewards + discount * values.roll(-1) - values, discount * lam)


def _advantages_whitened(rewards, values, discount, lam):
    """These are whitened, which comes after GAE and in a batch: here reward units are kept."""
    found = _decayed(_advantages_td(rewards, values, discount, lam), discount * lam)
    centred = found - found.mean()
    return centred / (centred.square().sum() / (len(found) - 1)).sqrt()


def judge_clipped_loss(clipped_loss):
    """8.2: the plain loss, but no gain from going on beyond the edge of the clip."""
    for clip_eps in (0.1, 0.2, 0.35):
        old_logps = -1.5 + 0.5 * draws(60, seed=round(100 * clip_eps))
        advantages = draws(60, seed=1)
        better = advantages.sign()  # the side of the ratio on which the objective grows
        for shift in torch.linspace(-1.2, 1.2, 13):
            logps = old_logps + shift
            edge = old_logps + (1 + better * clip_eps).log()
            beyond = better * (logps - edge) > 0
            loss = clipped_loss(logps, old_logps, advantages, clip_eps)
            plain = -advantages * logps.exp() / old_logps.exp()
            agree(
                loss[~beyond],
                plain[~beyond],
                "where the ratio is within the clip, or moved the wrong way, the loss is not the "
                "importance-weighted one",
            )
            agree(
                loss[beyond],
                clipped_loss(edge, old_logps, advantages, clip_eps)[beyond],
                "where the ratio is beyond the clip on the side that its advantage asks for, the "
                "loss is not what it was at the edge",
            )


def _clipped_always(logps, old_logps, advantages, clip_eps):
    """The minimum is missing: a ratio that moved the wrong way gets no push back."""
    ratios = torch.exp(logps - old_logps).clamp(1 - clip_eps, 1 + clip_eps)
    return -ratios * advantages


def _clipped_upside_down(logps, old_logps, advantages, clip_eps):
    """This takes the larger of the two objectives: PPO is pessimistic and takes the smaller."""
    ratios = torch.exp(logps - old_logps)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.maximum(ratios * advantages, clipped * advantages)


def _clipped_objective(logps, old_logps, advantages, clip_eps):
    """This is the objective, to be made large: a loss has the other sign."""
    ratios = torch.exp(logps - old_logps)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.minimum(ratios * advantages, clipped * advantages)


def _clipped_ratio_inverted(logps, old_logps, advantages, clip_eps):
    """The ratio is upside down: the new policy is over the old one."""
    ratios = torch.exp(old_logps - logps)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-ratios * advantages, -clipped * advantages)


def _clipped_not(logps, old_logps, advantages, clip_eps):
    """Nothing is clipped: this is the plain importance-weighted loss."""
    return -torch.exp(logps - old_logps) * advantages


def _clipped_in_logs(logps, old_logps, advantages, clip_eps):
    """The clip is on the logarithm of the ratio: its bounds are 1 - eps and 1 + eps."""
    log_ratios = logps - old_logps
    clipped = torch.exp(log_ratios.clamp(-clip_eps, clip_eps))
    return -torch.minimum(torch.exp(log_ratios) * advantages, clipped * advantages)


def _ratios(logps, old_logps):
    return torch.exp(logps - old_logps)


def _clipped_around_zero(logps, old_logps, advantages, clip_eps):
    """The ratio is clipped around 0: a policy that has not moved has ratio 1."""
    ratios = _ratios(logps, old_logps)
    return -torch.minimum(ratios * advantages, ratios.clamp(-clip_eps, clip_eps) * advantages)


def _clipped_above_only(logps, old_logps, advantages, clip_eps):
    """The clip has no lower edge: where the advantage is negative a ratio may fall too far."""
    ratios = _ratios(logps, old_logps)
    return -torch.minimum(ratios * advantages, ratios.clamp(max=1 + clip_eps) * advantages)


def _clipped_log_ratio(logps, old_logps, advantages, clip_eps):
    """The exponential is missing: this takes the difference of log-probabilities for a ratio."""
    ratios = logps - old_logps
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def _clipped_before_the_advantage(logps, old_logps, advantages, clip_eps):
    """The smaller ratio is taken: the smaller objective is, with the advantage in it."""
    ratios = _ratios(logps, old_logps)
    return -torch.minimum(ratios, ratios.clamp(1 - clip_eps, 1 + clip_eps)) * advantages


def _clipped_objective_always(logps, old_logps, advantages, clip_eps):
    """Two things: the minimum is missing, and a loss has the other sign."""
    return _ratios(logps, old_logps).clamp(1 - clip_eps, 1 + clip_eps) * advantages


def judge_token_rewards(token_rewards):
    """8.3: together the score less beta times the log-ratio; where it ends moves no other token."""
    # beta times a mask of whole numbers has the default type: these are exact in float32 too
    for n_rows, n_tokens, beta in ((1, 4, 0.5), (2, 3, 2.0), (3, 2, 0.125)):
        logps, ref_logps = -draws(2, n_rows, n_tokens, seed=n_tokens).exp()
        scores = draws(n_rows, seed=n_rows)
        at = torch.arange(n_tokens)
        whole = token_rewards(scores, logps, ref_logps, torch.ones(n_rows, n_tokens).long(), beta)
        for lengths in product(range(1, n_tokens + 1), repeat=n_rows):
            length = torch.tensor(lengths)[:, None]
            kept, last, cut = at < length, at == length - 1, length < n_tokens
            rewards = token_rewards(scores, logps, ref_logps, kept.long(), beta)
            agree(rewards[~kept], 0.0, "a padding token has a reward")
            agree(
                rewards.sum(1),
                scores - beta * ((logps - ref_logps) * kept).sum(1),
                "a row's rewards do not add up to its score less beta (log pi - log pi_ref) of "
                "the completion",
            )
            agree(
                rewards[kept & ~last],
                whole[kept & ~last],
                "a token before the last has another reward where the completion ends earlier",
            )
            agree(
                (rewards - whole)[last & cut],
                scores[cut[:, 0]],
                "a token that ends the completion is not worth the score more than where the "
                "completion goes on",
            )


def _last_tokens(mask):
    return torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])


def _rewards_in_the_last_column(scores, logps, ref_logps, mask, beta):
    """The score is in the last column: for a short completion that is padding, and is lost."""
    rewards = -beta * (logps - ref_logps) * mask
    return torch.cat([rewards[:, :-1], rewards[:, -1:] + scores[:, None]], dim=1)


def _rewards_on_every_token(scores, logps, ref_logps, mask, beta):
    """The score is on every token: long completions are paid for their length."""
    return (scores[:, None] - beta * (logps - ref_logps)) * mask


def _rewards_with_the_sign_wrong(scores, logps, ref_logps, mask, beta):
    """The KL term has the wrong sign: this pays the policy for leaving the reference."""
    return scores[:, None] * _last_tokens(mask) + beta * (logps - ref_logps) * mask


def _rewards_on_padding(scores, logps, ref_logps, mask, beta):
    """The penalty is on padding too: nobody chose those tokens."""
    return scores[:, None] * _last_tokens(mask) - beta * (logps - ref_logps)


def _rewards_without_beta(scores, logps, ref_logps, mask, beta):
    """Beta is missing: nats are subtracted from reward units."""
    return scores[:, None] * _last_tokens(mask) - (logps - ref_logps) * mask


def _rewards_without_kl(scores, logps, ref_logps, mask, beta):
    """The KL term is missing: nothing keeps the policy near the reference."""
    return scores[:, None] * _last_tokens(mask)


def _rewards_kl_at_the_end(scores, logps, ref_logps, mask, beta):
    """The whole penalty is on the last token: each token pays for its own log-ratio."""
    total = scores - beta * ((logps - ref_logps) * mask).sum(1)
    return total[:, None] * _last_tokens(mask)


def _rewards_one_late(scores, logps, ref_logps, mask, beta):
    """The score is one place too late: positions count from 0."""
    after = torch.nn.functional.pad(_last_tokens(mask), (1, 0))[:, :-1]
    return scores[:, None] * after - beta * (logps - ref_logps) * mask


def _rewards_beta_on_all(scores, logps, ref_logps, mask, beta):
    """Beta multiplies the score as well: that is in units of reward already."""
    return beta * (scores[:, None] * _last_tokens(mask) - (logps - ref_logps) * mask)


def _rewards_spread(scores, logps, ref_logps, mask, beta):
    """The score is spread over the tokens: it is paid once, where the completion ends."""
    return (scores / mask.sum(1))[:, None] * mask - beta * (logps - ref_logps) * mask


def _rewards_k3(scores, logps, ref_logps, mask, beta):
    """The penalty is k3: with k1 it is beta times the log-ratio itself."""
    gaps = ref_logps - logps
    return scores[:, None] * _last_tokens(mask) - beta * (gaps.exp() - 1 - gaps) * mask


def _rewards_in_the_last_column_unmasked(scores, logps, ref_logps, mask, beta):
    """Two things: the score is in the last column, which is padding in a short row, and padding
    pays a penalty.
    """
    rewards = -beta * (logps - ref_logps)
    return torch.cat([rewards[:, :-1], rewards[:, -1:] + scores[:, None]], dim=1)


def judge_critic_loss(critic_loss):
    """8.4: 0 at A + V_old, a parabola around it, the sum of what each token adds, no padding."""
    for n_rows, n_tokens in ((1, 3), (2, 3), (3, 2)):
        old, advantages, off, noise = draws(4, n_rows, n_tokens, seed=10 * n_rows + n_tokens)
        aim, at = old + advantages, torch.arange(n_tokens)
        for lengths in product(range(1, n_tokens + 1), repeat=n_rows):
            kept = at < torch.tensor(lengths)[:, None]
            rest = old, advantages, kept.long()
            agree(
                critic_loss(aim, *rest),
                0.0,
                "where every value is what it was plus the advantage, the loss is not 0",
            )
            for shift in (0.6, -1.5):
                agree(
                    critic_loss(aim + shift, *rest),
                    shift**2 / 2,
                    "where every value is off by c, the loss is not half of c squared",
                )
            alone = [
                critic_loss(aim + off * place.view_as(off), *rest)
                for place in torch.eye(off.numel(), dtype=off.dtype)
            ]
            whole = critic_loss(aim + off, *rest)
            agree(
                whole,
                sum(alone),
                "the loss is not the sum of what it is where a single token is off",
            )
            moved = [torch.where(kept, t, t + noise) for t in (aim + off, *rest[:2])]
            agree(critic_loss(*moved, rest[2]), whole, "what padding holds changes the loss")
            for length, row, own in zip(lengths, range(n_rows), off, strict=True):
                only = torch.zeros_like(off)
                only[row, length - 1] = own[length - 1]
                agree(
                    critic_loss(aim + only, *rest),
                    own[length - 1] ** 2 / 2 / kept.sum(),
                    "a token that is off by c does not add half of c squared over the number of "
                    "tokens",
                )


def _critic_errors(values, targets, mask):
    """Half the mean square over tokens."""
    return 0.5 * ((values - targets) ** 2 * mask).sum() / mask.sum()


def _critic_advantage_as_target(values, old_values, advantages, mask):
    """The target is the advantage alone: a value guesses a return, so the old value is in it."""
    return _critic_errors(values, advantages, mask)


def _critic_moving_target(values, old_values, advantages, mask):
    """The target moves with the guess: it was fixed with the values of the time of drawing."""
    return _critic_errors(values, values + advantages, mask)


def _critic_advantage_taken_off(values, old_values, advantages, mask):
    """The advantage has the wrong sign: the target is the old value plus it."""
    return _critic_errors(values, old_values - advantages, mask)


def _critic_padding_counted(values, old_values, advantages, mask):
    """The mean runs over padding too: divide by the number of tokens."""
    return 0.5 * ((values - old_values - advantages) ** 2 * mask).mean()


def _critic_padding_in_the_error(values, old_values, advantages, mask):
    """The mask is missing: nobody asks for a value of padding."""
    return 0.5 * ((values - old_values - advantages) ** 2).mean()


def _critic_mean_of_rows(values, old_values, advantages, mask):
    """This is the mean over rows of means over their tokens: short reviews count for more."""
    squares = (values - old_values - advantages) ** 2 * mask
    return 0.5 * (squares.sum(1) / mask.sum(1)).mean()


def _critic_square_of_the_mean(values, old_values, advantages, mask):
    """This is the square of the mean error: errors of both signs cancel. Square first."""
    return 0.5 * (((values - old_values - advantages) * mask).sum() / mask.sum()) ** 2


def _critic_absolute(values, old_values, advantages, mask):
    """This is the absolute error, whose best guess is the median: the mean needs squares."""
    return ((values - old_values - advantages).abs() * mask).sum() / mask.sum()


def _critic_old_values(values, old_values, advantages, mask):
    """The target is the old value: with that the critic learns nothing new."""
    return _critic_errors(values, old_values, mask)


EXERCISES = (
    Exercise(
        "8.1",
        cases=((REWARDS, VALUES, 0.9, 0.7), (REWARDS.flip(0), VALUES, 0.8, 0.95)),
        judge=judge_advantages,
        mistakes=(
            _advantages_td,
            _advantages_without_bootstrap,
            _advantages_lam_alone,
            _advantages_forwards,
            _advantages_as_returns,
            _advantages_value_after_the_end,
            _advantages_td_not_discounted,
            _advantages_of_the_same_value,
            _advantages_wrapped,
            _advantages_whitened,
        ),
        shape=lambda rewards, values, discount, lam: rewards.shape,
    ),
    Exercise(
        "8.2",
        cases=((LOGPS, OLD_LOGPS, ADVANTAGES, 0.2), (OLD_LOGPS, LOGPS, ADVANTAGES, 0.1)),
        judge=judge_clipped_loss,
        mistakes=(
            _clipped_always,
            _clipped_upside_down,
            _clipped_objective,
            _clipped_ratio_inverted,
            _clipped_not,
            _clipped_in_logs,
            _clipped_around_zero,
            _clipped_above_only,
            _clipped_log_ratio,
            _clipped_before_the_advantage,
            _clipped_objective_always,
        ),
        shape=lambda logps, old_logps, advantages, clip_eps: logps.shape,
    ),
    Exercise(
        "8.3",
        cases=((SCORES, TOKEN_LOGPS, REF_LOGPS, MASK, 0.5),),
        judge=judge_token_rewards,
        mistakes=(
            _rewards_in_the_last_column,
            _rewards_on_every_token,
            _rewards_with_the_sign_wrong,
            _rewards_on_padding,
            _rewards_without_beta,
            _rewards_without_kl,
            _rewards_kl_at_the_end,
            _rewards_one_late,
            _rewards_beta_on_all,
            _rewards_spread,
            _rewards_k3,
            _rewards_in_the_last_column_unmasked,
        ),
        shape=lambda scores, logps, ref_logps, mask, beta: logps.shape,
    ),
    Exercise(
        "8.4",
        cases=((NEW_VALUES, OLD_VALUES, GAE_ADVANTAGES, MASK),),
        judge=judge_critic_loss,
        mistakes=(
            _critic_advantage_as_target,
            _critic_moving_target,
            _critic_advantage_taken_off,
            _critic_padding_counted,
            _critic_padding_in_the_error,
            _critic_mean_of_rows,
            _critic_square_of_the_mean,
            _critic_absolute,
            _critic_old_values,
        ),
    ),
)

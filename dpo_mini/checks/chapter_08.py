"""Chapter 08: train a policy with PPO."""

import torch

from dpo_mini.checks import Exercise

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


def advantages(rewards, values, discount, lam):
    """8.1: generalised advantage estimation of one completion, `[T]`."""
    n = len(rewards)
    after = torch.cat([values[1:], torch.zeros_like(values[:1])])
    td = rewards + discount * after - values
    total = torch.zeros_like(td)
    for t in range(n):
        for s in range(t, n):
            total[t] += (discount * lam) ** (s - t) * td[s]
    return total


def _advantages_td(rewards, values, discount, lam):
    """This is the TD error alone, lambda = 0: the later TD errors count too."""
    return advantages(rewards, values, discount, 0.0)


def _advantages_without_bootstrap(rewards, values, discount, lam):
    """The value of the next prefix is missing: the TD error has the gain in value in it."""
    n = len(rewards)
    td = rewards - values
    return torch.stack(
        [sum((discount * lam) ** (s - t) * td[s] for s in range(t, n)) for t in range(n)]
    )


def _advantages_lam_alone(rewards, values, discount, lam):
    """The decay is lambda alone: the discount shrinks it too."""
    after = torch.cat([values[1:], torch.zeros_like(values[:1])])
    td = rewards + discount * after - values
    n = len(td)
    return torch.stack([sum(lam ** (s - t) * td[s] for s in range(t, n)) for t in range(n)])


def _advantages_forwards(rewards, values, discount, lam):
    """The sum runs over the past: a token is judged by what comes after it."""
    after = torch.cat([values[1:], torch.zeros_like(values[:1])])
    td = rewards + discount * after - values
    n = len(td)
    return torch.stack(
        [sum((discount * lam) ** (t - s) * td[s] for s in range(t + 1)) for t in range(n)]
    )


def _advantages_as_returns(rewards, values, discount, lam):
    """These are the targets of the value function: an advantage has the value taken off."""
    return advantages(rewards, values, discount, lam) + values


def _advantages_value_after_the_end(rewards, values, discount, lam):
    """A value is carried on past the last token: after the end there is nothing to come."""
    after = torch.cat([values[1:], values[-1:]])
    td = rewards + discount * after - values
    n = len(td)
    return torch.stack(
        [sum((discount * lam) ** (s - t) * td[s] for s in range(t, n)) for t in range(n)]
    )


def clipped_loss(logps, old_logps, advantages, clip_eps):
    """8.2: PPO's clipped surrogate as a loss, `[B]`."""
    ratios = torch.exp(logps - old_logps)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def _clipped_always(logps, old_logps, advantages, clip_eps):
    """The minimum is missing: a ratio that moved the wrong way could never come back."""
    ratios = torch.exp(logps - old_logps).clamp(1 - clip_eps, 1 + clip_eps)
    return -ratios * advantages


def _clipped_upside_down(logps, old_logps, advantages, clip_eps):
    """This takes the larger of the two objectives: PPO is pessimistic and takes the smaller."""
    ratios = torch.exp(logps - old_logps)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.maximum(ratios * advantages, clipped * advantages)


def _clipped_objective(logps, old_logps, advantages, clip_eps):
    """This is the objective, to be made large: a loss has the other sign."""
    return -clipped_loss(logps, old_logps, advantages, clip_eps)


def _clipped_ratio_inverted(logps, old_logps, advantages, clip_eps):
    """The ratio is upside down: the new policy is over the old one."""
    return clipped_loss(old_logps, logps, advantages, clip_eps)


def _clipped_not(logps, old_logps, advantages, clip_eps):
    """Nothing is clipped: this is the plain importance-weighted loss."""
    return -torch.exp(logps - old_logps) * advantages


def _clipped_in_logs(logps, old_logps, advantages, clip_eps):
    """The clip is on the logarithm of the ratio: its bounds are 1 - eps and 1 + eps."""
    log_ratios = logps - old_logps
    clipped = torch.exp(log_ratios.clamp(-clip_eps, clip_eps))
    return -torch.minimum(torch.exp(log_ratios) * advantages, clipped * advantages)


def token_rewards(scores, logps, ref_logps, mask, beta):
    """8.3: the score on the last token, minus beta k1 on every token, `[B, T]`."""
    rewards = torch.zeros_like(logps)
    for row in range(len(scores)):
        n = int(mask[row].sum())
        rewards[row, :n] = -beta * (logps[row, :n] - ref_logps[row, :n])
        rewards[row, n - 1] += scores[row]
    return rewards


def _rewards_in_the_last_column(scores, logps, ref_logps, mask, beta):
    """The score is in the last column: for a short completion that is padding, and is lost."""
    rewards = -beta * (logps - ref_logps) * mask
    return torch.cat([rewards[:, :-1], rewards[:, -1:] + scores[:, None]], dim=1)


def _rewards_on_every_token(scores, logps, ref_logps, mask, beta):
    """The score is on every token: long completions are paid for their length."""
    return (scores[:, None] - beta * (logps - ref_logps)) * mask


def _rewards_with_the_sign_wrong(scores, logps, ref_logps, mask, beta):
    """The KL term has the wrong sign: this pays the policy for leaving the reference."""
    return token_rewards(scores, ref_logps, logps, mask, beta)


def _rewards_on_padding(scores, logps, ref_logps, mask, beta):
    """The penalty is on padding too: nobody chose those tokens."""
    rewards = -beta * (logps - ref_logps)
    return (
        rewards
        - token_rewards(0 * scores, logps, ref_logps, mask, beta)
        + token_rewards(scores, logps, ref_logps, mask, beta)
    )


def _rewards_without_beta(scores, logps, ref_logps, mask, beta):
    """Beta is missing: nats are subtracted from reward units."""
    return token_rewards(scores, logps, ref_logps, mask, 1.0)


def _rewards_without_kl(scores, logps, ref_logps, mask, beta):
    """The KL term is missing: nothing keeps the policy near the reference."""
    return token_rewards(scores, logps, logps, mask, beta)


EXERCISES = (
    Exercise(
        "8.1",
        cases=((REWARDS, VALUES, 0.9, 0.7), (REWARDS.flip(0), VALUES, 0.8, 0.95)),
        answer=advantages,
        mistakes=(
            _advantages_td,
            _advantages_without_bootstrap,
            _advantages_lam_alone,
            _advantages_forwards,
            _advantages_as_returns,
            _advantages_value_after_the_end,
        ),
    ),
    Exercise(
        "8.2",
        cases=((LOGPS, OLD_LOGPS, ADVANTAGES, 0.2), (OLD_LOGPS, LOGPS, ADVANTAGES, 0.1)),
        answer=clipped_loss,
        mistakes=(
            _clipped_always,
            _clipped_upside_down,
            _clipped_objective,
            _clipped_ratio_inverted,
            _clipped_not,
            _clipped_in_logs,
        ),
    ),
    Exercise(
        "8.3",
        cases=((SCORES, TOKEN_LOGPS, REF_LOGPS, MASK, 0.5),),
        answer=token_rewards,
        mistakes=(
            _rewards_in_the_last_column,
            _rewards_on_every_token,
            _rewards_with_the_sign_wrong,
            _rewards_on_padding,
            _rewards_without_beta,
            _rewards_without_kl,
        ),
    ),
)

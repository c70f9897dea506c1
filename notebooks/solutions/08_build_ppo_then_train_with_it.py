"""Solutions of chapter 08."""

import torch


def advantages(rewards, values, discount, lam):
    """8.1: backwards, A_t = delta_t + discount lam A_{t+1}."""
    result = torch.zeros_like(rewards)
    next_value = next_advantage = 0.0
    for t in reversed(range(len(rewards))):
        td_error = rewards[t] + discount * next_value - values[t]
        next_advantage = td_error + discount * lam * next_advantage
        next_value = values[t]
        result[t] = next_advantage
    return result


def clipped_loss(logps, old_logps, advantages, clip_eps):
    """8.2: the larger of two losses is the smaller of two objectives."""
    ratios = (logps - old_logps).exp()
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-ratios * advantages, -clipped * advantages)


def token_rewards(scores, logps, ref_logps, mask, beta):
    """8.3: the last token is the one with nothing after it."""
    after = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    last = mask * (1 - after)
    return last * scores[:, None] - beta * mask * (logps - ref_logps)


def critic_loss(values, old_values, advantages, mask):
    """8.4: the target A + V_old is a constant; each token counts the same."""
    targets = (old_values + advantages).detach()
    return (0.5 * (values - targets) ** 2 * mask).sum() / mask.sum()


SOLUTIONS = {
    "8.1": advantages,
    "8.2": clipped_loss,
    "8.3": token_rewards,
    "8.4": critic_loss,
}

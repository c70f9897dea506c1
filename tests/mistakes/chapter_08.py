"""Plausible wrong answers to the exercises of chapter 08, and words of the sentence each gets."""

import torch


def backwards(td_errors, decay):
    result, later = torch.zeros_like(td_errors), 0.0
    for t in range(len(td_errors) - 1, -1, -1):
        later = td_errors[t] + decay * later
        result[t] = later
    return result


def next_values(values, last=0.0):
    return torch.cat([values[1:], torch.as_tensor([float(last)], dtype=values.dtype)])


def td_errors_only(rewards, values, discount, lam):
    return rewards + discount * next_values(values) - values


def no_bootstrap(rewards, values, discount, lam):
    return backwards(rewards - values, discount * lam)


def decay_of_lambda(rewards, values, discount, lam):
    return backwards(rewards + discount * next_values(values) - values, lam)


def looking_back(rewards, values, discount, lam):
    td_errors = rewards + discount * next_values(values) - values
    return backwards(td_errors.flip(0), discount * lam).flip(0)


def targets_of_the_value(rewards, values, discount, lam):
    td_errors = rewards + discount * next_values(values) - values
    return values + backwards(td_errors, discount * lam)


def a_value_after_the_end(rewards, values, discount, lam):
    td_errors = rewards + discount * next_values(values, values[-1]) - values
    return backwards(td_errors, discount * lam)


def clip_without_minimum(logps, old_logps, advantages, clip_eps):
    ratios = (logps.exp() / old_logps.exp()).clip(1 - clip_eps, 1 + clip_eps)
    return -(advantages * ratios)


def minimum_of_losses(logps, old_logps, advantages, clip_eps):
    ratios = logps.exp() / old_logps.exp()
    losses = [-r * advantages for r in (ratios, ratios.clip(1 - clip_eps, 1 + clip_eps))]
    return torch.stack(losses).amin(0)


def objective_for_loss(logps, old_logps, advantages, clip_eps):
    ratios = logps.exp() / old_logps.exp()
    clipped = ratios.clip(1 - clip_eps, 1 + clip_eps)
    return torch.stack([ratios * advantages, clipped * advantages]).amin(0)


def old_over_new(logps, old_logps, advantages, clip_eps):
    ratios = (old_logps - logps).exp()
    clipped = ratios.clip(1 - clip_eps, 1 + clip_eps)
    return torch.stack([-ratios * advantages, -clipped * advantages]).amax(0)


def no_clip(logps, old_logps, advantages, clip_eps):
    return -advantages * logps.exp() / old_logps.exp()


def clip_of_logs(logps, old_logps, advantages, clip_eps):
    change = logps - old_logps
    clipped = change.clip(-clip_eps, clip_eps).exp()
    return torch.stack([-change.exp() * advantages, -clipped * advantages]).amax(0)


def score_at_the_end_of_the_row(scores, logps, ref_logps, mask, beta):
    rewards = beta * mask * (ref_logps - logps)
    rewards[:, -1] += scores
    return rewards


def score_everywhere(scores, logps, ref_logps, mask, beta):
    return mask * scores.unsqueeze(1) + beta * mask * (ref_logps - logps)


def at_the_last_token(scores, mask):
    placed = torch.zeros(mask.shape, dtype=scores.dtype)
    placed[torch.arange(len(scores)), mask.sum(1) - 1] = scores
    return placed


def paid_for_leaving(scores, logps, ref_logps, mask, beta):
    return at_the_last_token(scores, mask) + beta * mask * (logps - ref_logps)


def padding_pays(scores, logps, ref_logps, mask, beta):
    return at_the_last_token(scores, mask) - beta * (logps - ref_logps)


def nats_for_reward(scores, logps, ref_logps, mask, beta):
    return at_the_last_token(scores, mask) - mask * (logps - ref_logps)


def score_alone(scores, logps, ref_logps, mask, beta):
    return at_the_last_token(scores, mask)


def advantages_td_not_discounted(rewards, values, discount, lam):
    return backwards(rewards + next_values(values) - values, discount * lam)


def advantages_of_the_same_value(rewards, values, discount, lam):
    return backwards(rewards + discount * values - values, discount * lam)


def advantages_wrapped(rewards, values, discount, lam):
    return backwards(rewards + discount * values.roll(-1) - values, discount * lam)


def advantages_whitened(rewards, values, discount, lam):
    td_errors = rewards + discount * next_values(values) - values
    found = backwards(td_errors, discount * lam)
    # One token has no deviation, and torch would warn.
    return (found - found.mean()) / (found.std() + 1e-8) if len(found) > 1 else 0 * found


def clipped_around_zero(logps, old_logps, advantages, clip_eps):
    ratios = logps.exp() / old_logps.exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(-clip_eps, clip_eps) * advantages)


def clipped_above_only(logps, old_logps, advantages, clip_eps):
    ratios = logps.exp() / old_logps.exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(max=1 + clip_eps) * advantages)


def clipped_log_ratio(logps, old_logps, advantages, clip_eps):
    change = logps - old_logps
    clipped = change.clip(1 - clip_eps, 1 + clip_eps)
    return torch.stack([-change * advantages, -clipped * advantages]).amax(0)


def clipped_before_the_advantage(logps, old_logps, advantages, clip_eps):
    ratios = logps.exp() / old_logps.exp()
    return -advantages * torch.minimum(ratios, ratios.clip(1 - clip_eps, 1 + clip_eps))


def clipped_objective_always(logps, old_logps, advantages, clip_eps):
    return advantages * (logps.exp() / old_logps.exp()).clip(1 - clip_eps, 1 + clip_eps)


def rewards_kl_at_the_end(scores, logps, ref_logps, mask, beta):
    return at_the_last_token(scores - beta * ((logps - ref_logps) * mask).sum(1), mask)


def rewards_one_late(scores, logps, ref_logps, mask, beta):
    late = torch.zeros_like(logps)
    late[:, 1:] = at_the_last_token(scores, mask)[:, :-1]
    return late - beta * (logps - ref_logps) * mask


def rewards_beta_on_all(scores, logps, ref_logps, mask, beta):
    return beta * (at_the_last_token(scores, mask) - (logps - ref_logps) * mask)


def rewards_spread(scores, logps, ref_logps, mask, beta):
    return (scores / mask.sum(1))[:, None] * mask - beta * (logps - ref_logps) * mask


def rewards_k3(scores, logps, ref_logps, mask, beta):
    k3 = torch.expm1(ref_logps - logps) - (ref_logps - logps)
    return at_the_last_token(scores, mask) - beta * k3 * mask


def rewards_in_the_last_column_unmasked(scores, logps, ref_logps, mask, beta):
    rewards = beta * (ref_logps - logps)
    rewards[:, -1] += scores
    return rewards


def of_tokens(squares, mask):
    return squares[mask.bool()].mean() / 2


def advantage_for_target(values, old_values, advantages, mask):
    return of_tokens((values - advantages).square(), mask)


def target_of_new_values(values, old_values, advantages, mask):
    return of_tokens(advantages.square(), mask)


def advantage_subtracted(values, old_values, advantages, mask):
    return of_tokens((values - (old_values - advantages)).square(), mask)


def divided_by_all_places(values, old_values, advantages, mask):
    errors = mask * (values - (old_values + advantages))
    return errors.square().sum() / (2 * mask.numel())


def padding_has_errors(values, old_values, advantages, mask):
    return torch.nn.functional.mse_loss(values, old_values + advantages) / 2


def rows_count_the_same(values, old_values, advantages, mask):
    errors = (values - (old_values + advantages)).square()
    rows = [row[kept].mean() for row, kept in zip(errors, mask.bool(), strict=True)]
    return sum(rows) / len(rows) / 2


def mean_before_square(values, old_values, advantages, mask):
    return (values - (old_values + advantages))[mask.bool()].mean().square() / 2


def absolute_error(values, old_values, advantages, mask):
    return (values - (old_values + advantages))[mask.bool()].abs().mean()


def nothing_new(values, old_values, advantages, mask):
    return of_tokens((values - old_values).square(), mask)


MISTAKES = {
    "8.1": {
        "TD error alone": td_errors_only,
        "value of the next prefix": no_bootstrap,
        "lambda alone": decay_of_lambda,
        "over the past": looking_back,
        "targets of the value function": targets_of_the_value,
        "past the last token": a_value_after_the_end,
        "In the TD error the next value is not discounted": advantages_td_not_discounted,
        "The TD error holds the same value twice": advantages_of_the_same_value,
        "After the last token the first value comes back": advantages_wrapped,
        "These are whitened, which comes after GAE and in a batch": advantages_whitened,
    },
    "8.2": {
        "minimum is missing": clip_without_minimum,
        "pessimistic": minimum_of_losses,
        "other sign": objective_for_loss,
        "upside down": old_over_new,
        "Nothing is clipped": no_clip,
        "logarithm of the ratio": clip_of_logs,
        "The ratio is clipped around 0": clipped_around_zero,
        "The clip has no lower edge": clipped_above_only,
        "The exponential is missing": clipped_log_ratio,
        "The smaller ratio is taken": clipped_before_the_advantage,
        "the minimum is missing, and a loss has the": clipped_objective_always,
    },
    "8.3": {
        "last column": score_at_the_end_of_the_row,
        "on every token": score_everywhere,
        "wrong sign": paid_for_leaving,
        "on padding too": padding_pays,
        "Beta is missing": nats_for_reward,
        "KL term is missing": score_alone,
        "The whole penalty is on the last token": rewards_kl_at_the_end,
        "The score is one place too late": rewards_one_late,
        "Beta multiplies the score as well": rewards_beta_on_all,
        "The score is spread over the tokens": rewards_spread,
        "The penalty is k3": rewards_k3,
        "the score is in the last column, which is": rewards_in_the_last_column_unmasked,
    },
    "8.4": {
        "The target is the advantage alone": advantage_for_target,
        "The target moves with the guess": target_of_new_values,
        "The advantage has the wrong sign": advantage_subtracted,
        "The mean runs over padding too": divided_by_all_places,
        "The mask is missing": padding_has_errors,
        "the mean over rows of means": rows_count_the_same,
        "the square of the mean error": mean_before_square,
        "This is the absolute error": absolute_error,
        "The target is the old value": nothing_new,
    },
}

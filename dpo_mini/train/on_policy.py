"""Loops that draw their own completions at every step, and have them scored."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_mini._arguments import check_count, check_positive
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.policies import Policy
from dpo_mini.policy_gradient import (
    group_normalised_advantages,
    kl_k1,
    leave_one_out_advantages,
    mean_advantages,
    reinforce_loss,
)
from dpo_mini.preferences import sample_bradley_terry
from dpo_mini.rollout import sample, token_logps
from dpo_mini.train.pair_losses import Loss, check_pair_loss, pair_measures
from dpo_mini.train.steps import (
    History,
    Progress,
    Score,
    adam,
    check_prompts_and_reference,
    check_settings,
    descend,
    draw_prompts,
    record,
    scores_of,
)


def fit_reinforce(
    policy: Policy,
    reference: Policy,
    prompts: Tensor,
    score: Score,
    *,
    beta: float,
    steps: int,
    batch_size: int,
    n_samples: int,
    learning_rate: float,
    generator: torch.Generator,
    advantages: Callable[[Tensor], Tensor] = leave_one_out_advantages,
    progress: Progress = iter,
) -> History:
    """Policy gradient on E[r] - beta KL, whole completions as actions, in place.

    Every step draws fresh completions, takes one step of Adam and throws them away. With the
    default `advantages` this is RLOO.

    Args:
      policy: changed in place.
      reference: frozen, of the same sizes.
      prompts: `[n]`; each batch has all of them equally often, up to the remainder.
      score: `(prompts [B], completions [B, T]) -> rewards [B]`.
      beta: > 0, weight of the KL term, reward units per nat.
      steps, learning_rate: of Adam, as in `fit_sft`.
      batch_size: prompts per step.
      n_samples: completions of each prompt, K; at least 2 with the three `advantages` below.
      generator: draws prompts and completions.
      advantages: from returns `[B, K]`, which include the KL term, to `[B, K]`:
        `leave_one_out_advantages`, `mean_advantages`, `group_normalised_advantages`.
      progress: as in `fit_sft`.
    Returns:
      `{"reward", "kl", "objective"}`, each `[steps]`: sample means of the score, of k1 in nats, and
      of score - beta k1.
    Raises:
      ValueError: a setting out of range, a score that is not finite or not one per completion, a
        reference that shares weights with the policy, a loss or gradient that is not finite, or
        something that lies on another device than the policy's weights.
    """
    check_positive("beta", beta)
    check_count("n_samples", n_samples)
    compared = (leave_one_out_advantages, mean_advantages, group_normalised_advantages)
    if n_samples == 1 and advantages in compared:
        raise ValueError("`n_samples` must be >= 2, got 1: completions of a prompt are compared")
    check_settings(steps, batch_size, learning_rate, generator)
    check_prompts_and_reference(policy, reference, prompts, generator)
    optimizer, schedule = adam(policy, steps, learning_rate)
    history: History = {}
    for step in progress(range(steps)):
        asked = draw_prompts(prompts, batch_size, generator).repeat_interleave(n_samples)
        answers = sample(policy, asked, generator=generator)
        rewards, mask = scores_of(score, asked, answers), answers != PAD
        logps = sum_over_tokens(token_logps(policy, asked, answers), mask)
        with torch.no_grad():
            ref_scored = token_logps(reference, asked, answers, name="reference")
            kls = kl_k1(logps, sum_over_tokens(ref_scored, mask))
            grouped = advantages((rewards - beta * kls).view(batch_size, n_samples))
        loss = reinforce_loss(logps, grouped.flatten().to(logps)).mean()
        descend(optimizer, loss, step)
        schedule.step()
        reward, kl = rewards.mean(), kls.mean()
        record(history, reward=reward, kl=kl, objective=reward - beta * kl)
    return history


def fit_online_preferences(
    policy: Policy,
    reference: Policy,
    prompts: Tensor,
    score: Score,
    loss: Loss,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    reduce: Callable[[Tensor, Tensor], Tensor] = sum_over_tokens,
    progress: Progress = iter,
) -> History:
    """`fit_preferences` on fresh pairs at every step, which the policy writes itself, in place.

    Each prompt gets two independent answers, and a Bradley-Terry judge of `score` picks the winner.
    Two equal answers are left in the batch: a loss of their difference has no gradient there.

    Args:
      policy, reference, prompts, score, generator: as in `fit_reinforce`.
      loss, reduce: as in `fit_preferences`, such as `partial(dpo_loss, beta=0.1)`.
      steps, learning_rate: of Adam, as in `fit_sft`.
      batch_size: pairs per step, each used once.
      progress: as in `fit_sft`.
    Returns:
      `{"loss", "margin", "accuracy", "reward", "kl"}`, each `[steps]`: the first three as in
      `fit_preferences`, the others as in `fit_reinforce`.
    Raises:
      ValueError: as `fit_reinforce`.
    """
    check_pair_loss(loss)
    check_settings(steps, batch_size, learning_rate, generator)
    check_prompts_and_reference(policy, reference, prompts, generator)
    optimizer, schedule = adam(policy, steps, learning_rate)
    history: History = {}
    for step in progress(range(steps)):
        asked = draw_prompts(prompts, batch_size, generator).repeat(2)
        answers = sample(policy, asked, generator=generator)
        rewards, mask = scores_of(score, asked, answers), answers != PAD
        scored = token_logps(policy, asked, answers)
        with torch.no_grad():
            ref_scored = token_logps(reference, asked, answers, name="reference")
        first_wins = sample_bradley_terry(*rewards.chunk(2), generator=generator)
        pair = torch.arange(batch_size, device=asked.device)
        chosen, rejected = pair + batch_size * ~first_wins, pair + batch_size * first_wins
        logps, ref_logps = reduce(scored, mask), reduce(ref_scored, mask)
        of_pairs = logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected]
        mean_loss = loss(*of_pairs).mean()
        descend(optimizer, mean_loss, step)
        schedule.step()
        kl = kl_k1(scored.detach(), ref_scored).sum(1).mean()
        measured = {**pair_measures(*of_pairs), "reward": rewards.mean(), "kl": kl}
        record(history, loss=mean_loss.detach(), **measured)
    return history

"""Loops that learn from data that is there: demonstrations, and pairs of answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from dpo_mini._arguments import check_device, check_integers, check_rows
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.losses import reward_model_loss
from dpo_mini.policies import RewardModel, Scorer
from dpo_mini.policies.base import device_of
from dpo_mini.rollout import shared_prefix_rewards, token_logps
from dpo_mini.train.pair_losses import Loss, Pairs, check_pair_loss, check_pairs, pair_measures
from dpo_mini.train.steps import (
    WEIGHTS,
    History,
    Progress,
    adam,
    check_frozen,
    check_settings,
    descend,
    record,
    shuffled_batches,
)


def fit_sft(
    policy: Scorer,
    prompts: Tensor,
    completions: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Progress = iter,
) -> History:
    """Supervised fine-tuning: raise log pi(y|x) of demonstrations, in place.

    This is maximum likelihood: the loss is minus the mean log-probability of a demonstration.

    Args:
      policy: has `token_logps(prompts [B], completions [B, T]) -> [B, T]`.
      prompts: `[n]`; completions: `[n, T]` int64, padded with `PAD`.
      steps, batch_size, learning_rate: of Adam; 20 steps of warm-up, then a cosine down to 0.
      generator: shuffles, on any device; every row is seen once before any is seen again.
      progress: wraps the range of steps, such as `notebook_progress("SFT")` or `tqdm`.
    Returns:
      `{"loss": [steps]}`, nats per completion.
    Raises:
      ValueError: no data, rows that differ in number, data on another device than the weights, a
        setting out of range, log-probabilities above 0, or a loss or gradient that is not finite:
        then the step is not taken.
    """
    check_rows("prompts", prompts, completions=completions)
    check_integers("completions", completions, "[n, T]")
    check_device(WEIGHTS, device_of(policy), prompts=prompts, completions=completions)
    check_settings(steps, batch_size, learning_rate, generator)
    optimizer, schedule = adam(policy, steps, learning_rate)
    history: History = {}
    for step, rows in shuffled_batches(prompts, batch_size, steps, generator, progress):
        scored = token_logps(policy, prompts[rows], completions[rows])
        loss = -sum_over_tokens(scored, completions[rows] != PAD).mean()
        descend(optimizer, loss, step)
        schedule.step()
        record(history, loss=loss.detach())
    return history


def fit_preferences(
    policy: Scorer,
    reference: Scorer,
    pairs: Pairs,
    loss: Loss,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    reduce: Callable[[Tensor, Tensor], Tensor] = sum_over_tokens,
    progress: Progress = iter,
) -> History:
    """Minimise a loss of pairs against a reference, in place: DPO, IPO and relatives.

    Args:
      policy: has `token_logps(prompts [B], completions [B, T]) -> [B, T]`.
      reference: likewise; frozen. It scores every pair once, before the first step.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])`.
      loss: such as `partial(dpo_loss, beta=0.1)`; one without a reference (SimPO, CPO, ORPO) in
        `without_reference`.
      steps, batch_size, learning_rate, generator: as in `fit_sft`.
      reduce: from `token_logps` to what the loss takes: `sum_over_tokens`, or `mean_over_tokens`
        for the losses whose arguments are `mean_logps`.
      progress: as in `fit_sft`.
    Returns:
      `{"loss", "margin", "accuracy"}`, each `[steps]`: the mean loss, the mean log-ratio margin in
      nats (chosen minus rejected), and the share of the batch's pairs where it is positive.
    Raises:
      ValueError: as `fit_sft`, or a reference that shares weights with the policy and so would move
        with it.
    """
    prompts, chosen, rejected = check_pairs(pairs)
    check_pair_loss(loss)
    check_settings(steps, batch_size, learning_rate, generator)
    check_frozen(policy, reference)
    check_device(WEIGHTS, device_of(policy), prompts=prompts, chosen=chosen, rejected=rejected)

    def logps(model: Scorer, rows: Tensor, name: str) -> tuple[Tensor, ...]:
        """Of the chosen and of the rejected answers, `[B]` each."""
        scored = token_logps(model, prompts[rows], chosen[rows], rejected[rows], name=name)
        answers = torch.cat([chosen[rows], rejected[rows]])
        return reduce(scored, answers != PAD).chunk(2)

    with torch.no_grad():
        blocks = []
        for rows in torch.arange(len(prompts), device=prompts.device).split(batch_size):
            blocks.append(logps(reference, rows, "reference"))
        ref_chosen, ref_rejected = map(torch.cat, zip(*blocks, strict=True))
    optimizer, schedule = adam(policy, steps, learning_rate)
    history: History = {}
    for step, rows in shuffled_batches(prompts, batch_size, steps, generator, progress):
        of_pairs = *logps(policy, rows, "policy"), ref_chosen[rows], ref_rejected[rows]
        mean_loss = loss(*of_pairs).mean()
        descend(optimizer, mean_loss, step)
        schedule.step()
        record(history, loss=mean_loss.detach(), **pair_measures(*of_pairs))
    return history


def fit_reward_model(
    model: RewardModel,
    pairs: Pairs,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Progress = iter,
) -> History:
    """Bradley-Terry by maximum likelihood: a reward for whole completions from pairs, in place.

    Args:
      model: a `RewardModel`; `centre` it afterwards, for pairs leave a constant free.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])`.
      steps, batch_size, learning_rate, generator, progress: as in `fit_sft`.
    Returns:
      `{"loss", "accuracy"}`, each `[steps]`: nats per pair, and the share of the batch's pairs
      whose chosen answer has the larger reward.
    Raises:
      ValueError: no pairs, rows that differ in number, pairs on another device than the weights, a
        setting out of range, or a loss or gradient that is not finite.
    """
    prompts, chosen, rejected = check_pairs(pairs)
    weights = "the model's weights"
    check_device(weights, device_of(model), prompts=prompts, chosen=chosen, rejected=rejected)
    check_settings(steps, batch_size, learning_rate, generator)
    optimizer, schedule = adam(model, steps, learning_rate)
    history: History = {}
    for step, rows in shuffled_batches(prompts, batch_size, steps, generator, progress):
        asked, answers = prompts[rows].repeat(2), torch.cat([chosen[rows], rejected[rows]])
        chosen_rewards, rejected_rewards = shared_prefix_rewards(model, asked, answers).chunk(2)
        loss = reward_model_loss(chosen_rewards, rejected_rewards).mean()
        descend(optimizer, loss, step)
        schedule.step()
        accuracy = (chosen_rewards > rejected_rewards).double().mean()
        record(history, loss=loss.detach(), accuracy=accuracy)
    return history

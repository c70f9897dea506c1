"""Proximal policy optimisation: tokens as actions, a value function, and a clipped surrogate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini._arguments import (
    as_bool_mask,
    check_between,
    check_count,
    check_finite,
    check_floats,
    check_fraction,
    check_positive,
    check_rows,
)
from dpo_mini.logps import PAD
from dpo_mini.policies import Policy, PrefixTree, SeparateNetworks, SharedTrunk
from dpo_mini.policy_gradient import (
    AdaptiveKLController,
    clipped_surrogate_loss,
    gae,
    kl_k1,
    value_loss,
    whiten,
)
from dpo_mini.rollout import read_actor_critic, sample, token_logps
from dpo_mini.rollout.scoring import batch_tree
from dpo_mini.rollout.trees import of_rows
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

Penalty = Callable[[Tensor, Tensor], Tensor]
"""`(logps, ref_logps) -> nats`, all of one shape: `kl_k1`, `kl_k2` or `kl_k3`."""
CLIPPED = partial(clipped_surrogate_loss, clip_eps=0.2)
"""PPO's surrogate with the clip of its paper."""


def token_rewards(scores: Tensor, penalties: Tensor, completion_mask: Tensor) -> Tensor:
    """The reward of each token: minus its penalty, and the score on the last token of each row.

    The last token is the end token, or the T-th of a completion that never ended.

    Args:
      scores: `[B]`, of whole completions, reward units.
      penalties: `[B, T]`, reward units; what they hold on padding does not matter.
      completion_mask: `[B, T]` bool, true on tokens, then false.
    Returns:
      `[B, T]`, 0 on padding; rows sum to score - penalties.
    Raises:
      ValueError: rows that differ in number, a shape that differs, or a score that is not finite.
    """
    check_floats("[B]", scores=scores)
    check_floats("[B, T]", penalties=penalties)
    check_rows("scores", scores, penalties=penalties)
    check_finite(scores=scores)
    mask = as_bool_mask("completion_mask", completion_mask, penalties.shape)
    last = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return last * scores[:, None] - penalties.masked_fill(~mask, 0.0)


def no_penalty(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """No KL term: 0 of the shape of `logps`, whatever `ref_logps` is."""
    return torch.zeros_like(logps)


def as_they_are(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Advantages left as `gae` gives them, in reward units: what `whiten` is compared with."""
    return advantages


def squared_value_error(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
    """`value_loss` with the signature of `clipped_value_loss`; `old_values` is not used."""
    return value_loss(values, returns)


@dataclass(frozen=True)
class PPOParts:
    """The interchangeable parts of `fit_ppo`; the defaults are those of PPO on language models.

    Args:
      reward_penalty: the KL estimator that is subtracted from the reward of each token, where it is
        a constant. With `kl_k1` the policy gradient of the rewards is that of E[r] - beta KL.
        `no_penalty` leaves it out.
      loss_penalty: the KL estimator that is added to the loss and differentiated, the samples held
        fixed. On samples of the current policy, `kl_k2` has the gradient of the KL if completions
        have one token. In longer ones it ignores how a token changes the KL of later tokens, which
        a penalty in the reward includes. `no_penalty` leaves it out.
      surrogate: `(logps, old_logps, advantages) -> losses`: `unclipped_surrogate_loss`, or
        `partial(clipped_surrogate_loss, clip_eps=0.2)`.
      value_error: `(values, old_values, returns) -> losses`: `squared_value_error`, or
        `partial(clipped_value_loss, clip_eps=0.2)`.
      normalise: `(advantages, mask) -> advantages`: `whiten`, or `as_they_are`.
      assign: `(scores [B], penalties [B, T], mask) -> rewards [B, T]`: which token earns what;
        `token_rewards` puts the score on the last one.
    """

    reward_penalty: Penalty = kl_k1
    loss_penalty: Penalty = no_penalty
    surrogate: Callable[[Tensor, Tensor, Tensor], Tensor] = CLIPPED
    value_error: Callable[[Tensor, Tensor, Tensor], Tensor] = squared_value_error
    normalise: Callable[[Tensor, Tensor], Tensor] = whiten
    assign: Callable[[Tensor, Tensor, Tensor], Tensor] = token_rewards


def fit_ppo(
    actor_critic: SharedTrunk | SeparateNetworks,
    reference: Policy,
    prompts: Tensor,
    score: Score,
    *,
    beta: float | AdaptiveKLController,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    n_epochs: int = 4,
    n_minibatches: int = 1,
    discount: float = 1.0,
    lam: float = 0.95,
    value_weight: float = 0.1,
    entropy_weight: float = 0.0,
    parts: PPOParts = PPOParts(),
    progress: Progress = iter,
) -> History:
    r"""PPO on E[r] - beta KL, tokens as actions, in place.

    Each step draws a batch of completions from the live policy. Every token gets a reward: minus
    beta times its KL penalty, and on the last token also the score of the completion. The value
    function V and GAE turn rewards into advantages A and returns R = A + V; then A is whitened over
    the batch. Adam takes several steps on this batch. Each minimises, averaged over the tokens of a
    minibatch, with $\rho = \pi_\theta/\pi_{old}$ and H the entropy of the next token,

    $$-\min(\rho A,\ \mathrm{clip}(\rho, .8, 1.2) A) + w_V\,\tfrac12 (V_\theta - R)^2 - w_H H.$$

    Meanwhile A, R and $\pi_{old}$ stay as they were when the batch was drawn. Gradients are not
    clipped. What completions share at their beginning is computed once for all of them
    (`rollout.prefix_tree`), which saves time and changes results by rounding alone.

    Args:
      actor_critic: `SharedTrunk(policy)` or `SeparateNetworks(policy, critic)`.
      reference: frozen, of the same sizes.
      prompts: `[n]`; each batch has all of them equally often, up to the remainder.
      score: `(prompts [B], completions [B, T]) -> scores [B]`, the r of whole completions.
      beta: > 0, weight of the KL terms, reward units per nat; or an `AdaptiveKLController`, which
        is updated with the mean k1 of each batch.
      steps: batches, each drawn afresh.
      batch_size: completions per step; `whiten` needs two tokens, so two completions of a bandit.
      learning_rate: of Adam, with the warm-up and the cosine of `fit_sft` over `steps`: all steps
        of Adam on one batch have the same one.
      generator: draws prompts and completions, and shuffles.
      n_epochs, n_minibatches: how often Adam goes over a batch, and in how many steps each time.
      discount, lam: of `gae`.
      value_weight, entropy_weight: >= 0, of the value error and of the entropy bonus.
      parts: what else can be changed, such as `PPOParts(normalise=as_they_are)`.
      progress: as in `fit_sft`.
    Returns:
      `{"reward", "kl", "objective", "entropy", "clipped", "value_loss", "beta"}`, each `[steps]`:
      of each batch the mean score, the mean of k1 = log pi_old - log pi_ref of a completion in
      nats, score - beta k1, and the mean entropy per token in nats, all as it was drawn; of its
      last step of Adam the share of tokens whose ratio is outside [.8, 1.2], and the mean value
      error; and beta.
    Raises:
      ValueError: as `fit_reinforce`, or a reference's log-probability above 0.
    Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019,
      arXiv:1909.08593.
    """
    _check_ppo_settings(beta, batch_size, n_epochs, n_minibatches)
    _check_ppo_weights(discount, lam, value_weight, entropy_weight)
    check_settings(steps, batch_size, learning_rate, generator)
    check_prompts_and_reference(actor_critic, reference, prompts, generator)
    optimizer, schedule = adam(actor_critic, steps, learning_rate)
    history: History = {}
    for step in progress(range(steps)):
        kl_weight = beta.beta if isinstance(beta, AdaptiveKLController) else beta
        asked = draw_prompts(prompts, batch_size, generator)
        answers = sample(actor_critic.policy, asked, generator=generator)
        mask = answers != PAD
        _check_two_tokens(parts, mask)
        scores = scores_of(score, asked, answers)
        tree = batch_tree(actor_critic.policy, asked, answers)  # what is shared is read once
        drawn = read_actor_critic(actor_critic, asked, answers, tree=tree)
        old_logps, old_values, entropies = (each.detach() for each in drawn)  # [B, T] each
        with torch.no_grad():
            ref_logps = token_logps(reference, asked, answers, name="reference", tree=tree)
        penalties = kl_weight * parts.reward_penalty(old_logps, ref_logps)
        rewards = parts.assign(scores.to(old_logps), penalties, mask)
        advantages, returns = gae(rewards, old_values, mask, discount=discount, lam=lam)
        advantages = parts.normalise(advantages, mask)
        batch = _Batch(asked, answers, tree, drawn)
        minibatches = _minibatches(actor_critic, batch, n_epochs, n_minibatches, generator)
        for rows, (logps, values, entropy) in minibatches:
            policy_losses = parts.surrogate(logps, old_logps[rows], advantages[rows])
            value_errors = parts.value_error(values, old_values[rows], returns[rows])
            losses = policy_losses + value_weight * value_errors - entropy_weight * entropy
            losses = losses + kl_weight * parts.loss_penalty(logps, ref_logps[rows])
            descend(optimizer, losses[mask[rows]].mean(), step)
        schedule.step()
        log_ratios, value_errors = (logps - old_logps[rows])[mask[rows]], value_errors[mask[rows]]
        kls = (old_logps - ref_logps).sum(1)  # of completions: both are 0 on padding
        measured = _measured(scores, kls, entropies[mask], log_ratios, value_errors, kl_weight)
        record(history, **measured)
        if isinstance(beta, AdaptiveKLController):
            beta.update(kls.mean().item(), batch_size)
    return history


class _Batch(NamedTuple):
    """A batch of completions, and what `read_actor_critic` gave when it was drawn."""

    prompts: Tensor
    completions: Tensor
    tree: PrefixTree
    drawn: tuple[Tensor, Tensor, Tensor]


def _minibatches(
    actor_critic: SharedTrunk | SeparateNetworks,
    batch: _Batch,
    n_epochs: int,
    n_minibatches: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Rows in random order, each once per epoch, and what `read_actor_critic` gives for them now.

    A minibatch is read when it is asked for, after the step of Adam on the one before. If the first
    one is the whole batch, no weight has moved since the batch was read, and that result serves.
    """
    for epoch in range(n_epochs):
        order = torch.randperm(len(batch.prompts), generator=generator, device=generator.device)
        for rows in order.tensor_split(n_minibatches):
            if epoch == 0 and n_minibatches == 1:
                yield rows, tuple(each[rows] for each in batch.drawn)
            else:
                read = batch.prompts[rows], batch.completions[rows]
                yield rows, read_actor_critic(actor_critic, *read, tree=of_rows(batch.tree, rows))


def _measured(
    scores: Tensor,
    kls: Tensor,
    entropies: Tensor,
    log_ratios: Tensor,
    value_errors: Tensor,
    kl_weight: float,
) -> dict[str, Tensor | float]:
    """What `fit_ppo` writes down about a batch: of its completions `[B]`, and of tokens `[n]`."""
    reward, kl, ratios = scores.mean(), kls.mean(), log_ratios.detach().exp()
    return {
        "reward": reward,
        "kl": kl,
        "objective": reward - kl_weight * kl,
        "entropy": entropies.mean(),
        "clipped": ((ratios - 1).abs() > 0.2).double().mean(),
        "value_loss": value_errors.detach().mean(),
        "beta": kl_weight,
    }


def _check_two_tokens(parts: PPOParts, mask: Tensor) -> None:
    """Refuse a batch of one token before it is scored, where `whiten` would refuse it later."""
    if parts.normalise is whiten and mask.sum() < 2:
        raise ValueError(
            "`batch_size` must be >= 2 where a completion can be one token, got "
            f"{len(mask)}: `whiten` needs two tokens (or pass PPOParts(normalise=as_they_are))"
        )


def _check_ppo_settings(
    beta: float | AdaptiveKLController, batch_size: int, n_epochs: int, n_minibatches: int
) -> None:
    check_count("n_epochs", n_epochs)
    check_count("n_minibatches", n_minibatches)
    check_count("batch_size", batch_size)
    if n_minibatches > batch_size:
        most, got = batch_size, n_minibatches
        raise ValueError(f"`n_minibatches` must be at most batch_size = {most}, got {got}")
    if not isinstance(beta, AdaptiveKLController):
        check_positive("beta", beta)
    elif batch_size > beta.horizon:
        most, got = beta.horizon, batch_size
        raise ValueError(f"`batch_size` must be at most beta.horizon = {most}, got {got}")


def _check_ppo_weights(
    discount: float, lam: float, value_weight: float, entropy_weight: float
) -> None:
    check_fraction("discount", discount)
    check_fraction("lam", lam)
    check_between("value_weight", value_weight, 0.0, math.inf)
    check_between("entropy_weight", entropy_weight, 0.0, math.inf)

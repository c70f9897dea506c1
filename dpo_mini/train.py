"""One short loop a method, alike but for the idea.

Each loop takes a policy, changes its weights and returns the history of what it measured, one
number a step. `progress` is anything that wraps an iterable and shows how far it is: `tqdm`, the
notebooks' `notebook_progress`, or nothing.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from dpo_mini._arguments import (
    as_bool_mask,
    check_alike,
    check_at_most_0,
    check_between,
    check_count,
    check_finite,
    check_floats,
    check_fraction,
    check_generator,
    check_integers,
    check_positive,
    check_rows,
)
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.losses import reward_model_loss
from dpo_mini.policies import (
    Policy,
    RewardModel,
    Scorer,
    SeparateNetworks,
    SharedTrunk,
)
from dpo_mini.policies.base import shares_storage
from dpo_mini.policy_gradient import (
    AdaptiveKLController,
    clipped_surrogate_loss,
    gae,
    group_normalised_advantages,
    kl_k1,
    leave_one_out_advantages,
    mean_advantages,
    reinforce_loss,
    value_loss,
    whiten,
)
from dpo_mini.preferences import bradley_terry_prob, sample_bradley_terry
from dpo_mini.rollout import (
    read_actor_critic,
    sample,
    shared_prefix_rewards,
    token_logps,
)

__all__ = [
    "History",
    "Pairs",
    "Loss",
    "PairReader",
    "Score",
    "Penalty",
    "CLIPPED",
    "fit_sft",
    "fit_preferences",
    "fit_reward_model",
    "fit_reinforce",
    "fit_online_preferences",
    "token_rewards",
    "no_penalty",
    "as_they_are",
    "squared_value_error",
    "fit_ppo",
    "population_loss",
    "fit_table",
    "without_reference",
]

History = dict[str, list[float]]
Pairs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Four `[B]` in the order of `dpo_loss`, one loss a row out; bind beta with `functools.partial`."""
PairReader = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(prompts [B], chosen [B, T], rejected [B, T]) -> token_logps [2 B, T]`, the chosen first."""
Score = Callable[[Tensor, Tensor], Tensor]
"""`(prompts [B], completions [B, T]) -> rewards [B]`: the true reward, or a learned one."""
Penalty = Callable[[Tensor, Tensor], Tensor]
"""`(logps, ref_logps) -> nats`, all of one shape: `kl_k1`, `kl_k2` or `kl_k3`."""
CLIPPED = partial(clipped_surrogate_loss, clip_eps=0.2)
"""PPO's surrogate with the clip of its paper."""


def fit_sft(
    policy: Scorer,
    prompts: Tensor,
    completions: Tensor,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Maximum likelihood on demonstrations: raise log pi(y|x), in place.

    Args:
      policy: has `token_logps(prompts [B], completions [B, T]) -> [B, T]`.
      prompts: `[n]`; completions: `[n, T]` int64, padded with `PAD`.
      steps, batch_size, learning_rate: of Adam; 20 steps of warm-up, then a cosine down to 0.
      generator: shuffles; every row is seen once before any is seen again.
      progress: wraps the range of steps, such as `notebook_progress("SFT")` or `tqdm`.
    Returns:
      `{"loss": [steps]}`, nats a completion.
    Raises:
      ValueError: no data, rows that differ in number, a setting out of range, log-probabilities
        above 0, or a loss or gradient that is not finite: then the step is not taken.
    """
    check_rows("prompts", prompts, completions=completions)
    check_integers("completions", completions, "[n, T]")
    _check_settings(steps, batch_size, learning_rate, generator)

    def loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scored = token_logps(policy, prompts[rows], completions[rows])
        return -sum_over_tokens(scored, completions[rows] != PAD).mean(), {}

    return _descend(
        policy, loss, len(prompts), steps, batch_size, learning_rate, generator, progress
    )


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
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Minimise a loss of pairs against a reference, in place: DPO, IPO and kin.

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
    _check_settings(steps, batch_size, learning_rate, generator)
    _check_frozen(policy, reference)

    def score(name: str, model: Scorer, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen and rejected, `[B]` each, in one pass: the two answers share their prompt."""
        scored = token_logps(model, prompts[rows], chosen[rows], rejected[rows], name=name)
        mask = torch.cat([chosen[rows], rejected[rows]]) != PAD
        chosen_scores, rejected_scores = reduce(scored, mask).chunk(2)
        return chosen_scores, rejected_scores

    every = torch.arange(len(prompts), device=prompts.device)
    with torch.no_grad():
        blocks = [score("reference", reference, rows) for rows in every.split(batch_size)]
    ref_chosen, ref_rejected = (torch.cat(parts) for parts in zip(*blocks, strict=True))

    def batch_loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        chosen_logps, rejected_logps = score("policy", policy, rows)
        per_pair = loss(chosen_logps, rejected_logps, ref_chosen[rows], ref_rejected[rows])
        margins = (chosen_logps - ref_chosen[rows]) - (rejected_logps - ref_rejected[rows])
        margins = margins.detach()
        measured = {"margin": margins.mean(), "accuracy": (margins > 0).double().mean()}
        return per_pair.mean(), measured

    return _descend(
        policy, batch_loss, len(prompts), steps, batch_size, learning_rate, generator, progress
    )


def fit_reward_model(
    model: RewardModel,
    pairs: Pairs,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Bradley-Terry by maximum likelihood: a reward for whole completions from pairs, in place.

    Args:
      model: a `RewardModel`; `centre` it afterwards, for pairs leave a constant free.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])`.
      steps, batch_size, learning_rate, generator, progress: as in `fit_sft`.
    Returns:
      `{"loss", "accuracy"}`, each `[steps]`: nats a pair, and the share of the batch's pairs whose
      chosen answer has the larger reward.
    Raises:
      ValueError: no pairs, rows that differ in number, a setting out of range, or a loss or
        gradient that is not finite.
    """
    prompts, chosen, rejected = check_pairs(pairs)
    _check_settings(steps, batch_size, learning_rate, generator)

    def batch_loss(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        answers = torch.cat([chosen[rows], rejected[rows]])
        both = torch.cat([prompts[rows], prompts[rows]])
        chosen_rewards, rejected_rewards = shared_prefix_rewards(model, both, answers).chunk(2)
        right = (chosen_rewards > rejected_rewards).double().mean()
        return reward_model_loss(chosen_rewards, rejected_rewards).mean(), {"accuracy": right}

    return _descend(
        model, batch_loss, len(prompts), steps, batch_size, learning_rate, generator, progress
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
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Policy gradient on E[r] - beta KL, whole completions as actions, in place: RLOO as it stands.

    Every step draws fresh completions, takes one step of Adam and throws them away.

    Args:
      policy: changed in place.
      reference: frozen, of the same sizes.
      prompts: `[n]`; each batch has all of them equally often, up to the remainder.
      score: `(prompts [B], completions [B, T]) -> rewards [B]`.
      beta: > 0, weight of the KL term, reward units per nat.
      steps, learning_rate: of Adam, as in `fit_sft`.
      batch_size: prompts a step.
      n_samples: completions of each prompt, K; at least 2 with the three `advantages` below.
      generator: draws prompts and completions.
      advantages: from returns `[B, K]`, which include the KL term, to `[B, K]`:
        `leave_one_out_advantages`, `mean_advantages`, `group_normalised_advantages`.
      progress: as in `fit_sft`.
    Returns:
      `{"reward", "kl", "objective"}`, each `[steps]`: sample means of the score, of k1 in nats, and
      of score - beta k1.
    Raises:
      ValueError: a setting out of range, a score that is not finite or not one a completion, a
        reference that shares weights with the policy, or a loss or gradient that is not finite.
    """
    check_positive("beta", beta)
    check_count("n_samples", n_samples)
    compared = (leave_one_out_advantages, mean_advantages, group_normalised_advantages)
    if n_samples == 1 and advantages in compared:
        raise ValueError("`n_samples` must be >= 2, got 1: completions of a prompt are compared")
    _check_on_policy(policy, reference, prompts)
    _check_settings(steps, batch_size, learning_rate, generator)
    optimizer, schedule = _adam(policy, steps, learning_rate)
    history: History = {}
    for step in progress(range(steps)):
        asked = _draw_prompts(prompts, batch_size, generator).repeat_interleave(n_samples)
        answers = sample(policy, asked, generator=generator)
        rewards = _score(score, asked, answers)
        logps = _logps("policy", policy, asked, answers)
        with torch.no_grad():
            kls = kl_k1(logps, _logps("reference", reference, asked, answers))
            grouped = advantages((rewards - beta * kls).view(batch_size, n_samples))
        loss = reinforce_loss(logps, grouped.flatten().to(logps)).mean()
        _descend_once(optimizer, loss, step)
        schedule.step()
        reward, kl = rewards.mean(), kls.mean()
        _record(history, reward=reward, kl=kl, objective=reward - beta * kl)
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
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """`fit_preferences` on pairs that the live policy writes: fresh ones at every step, in place.

    Two independent answers a prompt; a Bradley-Terry judge of `score` picks the winner. Two equal
    answers are left in the batch: for a loss of their difference they have no gradient.

    Args:
      policy, reference, prompts, score, generator: as in `fit_reinforce`.
      loss, reduce: as in `fit_preferences`, such as `partial(dpo_loss, beta=0.1)`.
      steps, learning_rate: of Adam, as in `fit_sft`.
      batch_size: pairs a step, each used once.
      progress: as in `fit_sft`.
    Returns:
      `{"loss", "margin", "accuracy", "reward", "kl"}`, each `[steps]`: the first three as in
      `fit_preferences`, the others as in `fit_reinforce`.
    Raises:
      ValueError: as `fit_reinforce`.
    """
    check_pair_loss(loss)
    _check_on_policy(policy, reference, prompts)
    _check_settings(steps, batch_size, learning_rate, generator)
    optimizer, schedule = _adam(policy, steps, learning_rate)
    history: History = {}
    for step in progress(range(steps)):
        asked = _draw_prompts(prompts, batch_size, generator).repeat(2)
        answers = sample(policy, asked, generator=generator)
        rewards = _score(score, asked, answers)
        mask = answers != PAD
        scored = token_logps(policy, asked, answers)
        with torch.no_grad():
            ref_scored = token_logps(reference, asked, answers, name="reference")
        logps, ref_logps = reduce(scored, mask), reduce(ref_scored, mask)
        first_wins = sample_bradley_terry(*rewards.chunk(2), generator=generator)
        chosen, rejected = (
            torch.arange(batch_size, device=asked.device) + batch_size * wrong
            for wrong in (~first_wins, first_wins)
        )
        per_pair = loss(logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected])
        _descend_once(optimizer, per_pair.mean(), step)
        schedule.step()
        logratios = (logps - ref_logps).detach()
        margins = logratios[chosen] - logratios[rejected]
        _record(
            history,
            loss=per_pair.detach().mean(),
            margin=margins.mean(),
            accuracy=(margins > 0).double().mean(),
            reward=rewards.mean(),
            kl=kl_k1(scored.detach(), ref_scored).sum(1).mean(),
        )
    return history


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
    """The KL estimator that estimates nothing: 0 of the shape of `logps`, whatever `ref_logps`."""
    return torch.zeros_like(logps)


def as_they_are(advantages: Tensor, completion_mask: Tensor) -> Tensor:
    """Advantages left as `gae` gives them, in reward units: what `whiten` is compared with."""
    return advantages


def squared_value_error(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
    """`value_loss` with the signature of `clipped_value_loss`; `old_values` is not used."""
    return value_loss(values, returns)


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
    reward_penalty: Penalty = kl_k1,
    loss_penalty: Penalty = no_penalty,
    surrogate: Callable[[Tensor, Tensor, Tensor], Tensor] = CLIPPED,
    value_error: Callable[[Tensor, Tensor, Tensor], Tensor] = squared_value_error,
    normalise: Callable[[Tensor, Tensor], Tensor] = whiten,
    assign: Callable[[Tensor, Tensor, Tensor], Tensor] = token_rewards,
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    r"""PPO on E[r] - beta KL, tokens as actions, in place.

    Each step draws completions from the live policy, gives every token a reward (the score on the
    last one, minus beta times the penalty on each), turns them into advantages with the value head
    and GAE, and takes `n_epochs` passes of Adam over the batch.

    Args:
      actor_critic: `SharedTrunk(policy)` or `SeparateNetworks(policy, critic)`.
      reference, prompts, score, generator: as in `fit_reinforce`.
      beta: > 0, weight of the KL terms, reward units per nat; or an `AdaptiveKLController`, which
        is updated with the mean k1 of each batch.
      steps: batches, each drawn afresh.
      batch_size: completions a step; `whiten` needs two tokens, so two completions of a bandit.
      learning_rate: of Adam, with the warm-up and the cosine of `fit_sft` over `steps`.
      n_epochs, n_minibatches: passes over a batch, and steps of Adam a pass.
      discount, lam: of `gae`.
      value_weight, entropy_weight: >= 0, of the value error and of the entropy bonus.
      reward_penalty: the KL estimator in the reward, a token: `kl_k1` is the one whose mean over
        samples has the gradient of the KL; or `no_penalty`.
      loss_penalty: likewise in the loss, differentiated with the samples as constants. `kl_k2` has
        the KL's gradient for one token; over more it leaves out what a token does to the KL of
        those that follow it, which the reward does not. Or `no_penalty`.
      surrogate: `(logps, old_logps, advantages) -> losses`: `clipped_surrogate_loss` with its
        `clip_eps` bound, here .2, or `unclipped_surrogate_loss`.
      value_error: `(values, old_values, returns) -> losses`: `squared_value_error`, or
        `clipped_value_loss` with its `clip_eps` bound.
      normalise: `(advantages, mask) -> advantages`: `whiten`, or `as_they_are`.
      assign: `(scores [B], penalties [B, T], mask) -> rewards [B, T]`: which token earns what;
        `token_rewards` puts the score on the last one.
      progress: as in `fit_sft`.
    Returns:
      `{"reward", "kl", "objective", "entropy", "clipped", "value_loss", "beta"}`, each `[steps]`:
      sample means of the score, of k1 of a completion in nats, of score - beta k1, and of the
      entropy a token in nats; the share of tokens whose ratio left [.8, 1.2], and the mean value
      error, both in the batch's last step of Adam; and beta.
    Raises:
      ValueError: as `fit_reinforce`, or a reference's log-probability above 0.
    Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019,
      arXiv:1909.08593.
    """
    if not isinstance(beta, AdaptiveKLController):
        check_positive("beta", beta)
    for name, count in {"n_epochs": n_epochs, "n_minibatches": n_minibatches}.items():
        check_count(name, count)
    check_fraction("discount", discount)
    check_fraction("lam", lam)
    for name, weight in {"value_weight": value_weight, "entropy_weight": entropy_weight}.items():
        check_between(name, weight, 0.0, math.inf)
    _check_on_policy(actor_critic, reference, prompts)
    _check_settings(steps, batch_size, learning_rate, generator)
    if n_minibatches > batch_size:
        got, most = n_minibatches, batch_size
        raise ValueError(f"n_minibatches: got {got}, takes at most batch_size = {most}")
    if isinstance(beta, AdaptiveKLController) and batch_size > beta.horizon:
        raise ValueError(
            f"`batch_size` must be at most beta.horizon = {beta.horizon}, got {batch_size}"
        )
    optimizer, schedule = _adam(actor_critic, steps, learning_rate)
    history: History = {}
    for step in progress(range(steps)):
        weight = beta.beta if isinstance(beta, AdaptiveKLController) else beta
        asked = _draw_prompts(prompts, batch_size, generator)
        answers = sample(actor_critic.policy, asked, generator=generator)
        mask = answers != PAD
        if normalise is whiten and mask.sum() < 2:
            raise ValueError(
                f"`batch_size` must be >= 2 where a completion can be one token, got {batch_size}: "
                "`whiten` needs two tokens (or pass normalise=as_they_are)"
            )
        scores = _score(score, asked, answers)
        with torch.no_grad():
            old_logps, old_values, entropies = read_actor_critic(actor_critic, asked, answers)
            ref_logps = token_logps(reference, asked, answers, name="reference")
            penalties = weight * reward_penalty(old_logps, ref_logps)
        rewards = assign(scores.to(old_logps), penalties, mask)
        advantages, returns = gae(rewards, old_values, mask, discount=discount, lam=lam)
        advantages = normalise(advantages, mask)
        for _ in range(n_epochs):
            order = torch.randperm(batch_size, generator=generator, device=generator.device)
            for rows in order.to(asked.device).chunk(n_minibatches):
                kept = mask[rows]
                logps, values, entropy = read_actor_critic(actor_critic, asked[rows], answers[rows])
                policy_losses = surrogate(logps, old_logps[rows], advantages[rows])
                value_losses = value_error(values, old_values[rows], returns[rows])
                losses = policy_losses + value_weight * value_losses - entropy_weight * entropy
                losses = losses + weight * loss_penalty(logps, ref_logps[rows])
                _descend_once(optimizer, losses[kept].mean(), step)
        schedule.step()
        ratios = (logps - old_logps[rows]).detach().exp()[kept]
        reward, kl = scores.mean(), (old_logps - ref_logps).sum(1).mean()
        if isinstance(beta, AdaptiveKLController):
            beta.update(kl.item(), batch_size)
        _record(
            history,
            reward=reward,
            kl=kl,
            objective=reward - weight * kl,
            entropy=entropies[mask].mean(),
            clipped=((ratios - 1).abs() > 0.2).double().mean(),
            value_loss=value_losses.detach()[kept].mean(),
            beta=weight,
        )
    return history


def population_loss(
    loss: Loss,
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor | None = None,
    *,
    win_probs: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> Tensor:
    """What the mean loss tends to with ever more data: every pair, each outcome by its probability.

    By default all pairs of different answers are compared equally often, and labels are
    Bradley-Terry on the rewards.

    Args:
      loss: such as `partial(dpo_loss, beta=0.1)`.
      logps, ref_logps: `[X, Y]`, Y >= 2.
      rewards: `[X, Y]`; or None where `win_probs` says who wins.
      win_probs: `[X, Y, Y]`, in 0..1: entry `[x, a, b]` is the probability that a beats b, so that
        the two entries of a pair sum to 1. Any labels can be written so, also of annotators who
        disagree, or who prefer in a circle. The diagonal is not used.
      pair_weights: `[X, Y, Y]`, symmetric, >= 0: how often each pair is compared, up to a common
        factor. The weights of all pairs of all prompts are divided by their sum. The diagonal is
        not used.
    Returns:
      `[]`, the mean over prompts and pairs; differentiable.
    Raises:
      ValueError: shapes or dtypes differ, Y < 2, or a value is not finite; `rewards` and
        `win_probs` both given, or neither; entries of a pair that do not sum to 1 or are no
        probabilities; weights that are negative, not symmetric or all 0.
    """
    check_floats("[X, Y]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    n_completions = logps.shape[1]
    if n_completions < 2:
        raise ValueError("`logps` must have >= 2 completions per prompt, got 1")
    a, b = torch.triu_indices(n_completions, n_completions, 1, device=logps.device)
    if rewards is not None and win_probs is None:
        check_floats("[X, Y]", logps=logps, rewards=rewards)
        check_finite(rewards=rewards)
        first_wins = bradley_terry_prob(rewards[:, a].flatten(), rewards[:, b].flatten())
    elif win_probs is not None and rewards is None:
        first_wins, second_wins = _of_pairs("win_probs", win_probs, logps, a, b)
        off = (first_wins + second_wins - 1).abs() > 1e-6
        wrong = off | (first_wins < 0) | (second_wins < 0)
        if wrong.any():
            got = f"{first_wins[wrong][0].item():.6g} and {second_wins[wrong][0].item():.6g}"
            raise ValueError(f"`win_probs` must be >= 0 and sum to 1 per pair, got {got}")
    else:
        got = "neither" if rewards is None else "both"
        raise ValueError(f"one of `rewards` and `win_probs` must be given, got {got}")
    (logps_a, ref_a), (logps_b, ref_b) = (
        [table[:, columns].flatten() for table in (logps, ref_logps)] for columns in (a, b)
    )
    if_first = loss(logps_a, logps_b, ref_a, ref_b)
    if_second = loss(logps_b, logps_a, ref_b, ref_a)
    per_pair = first_wins * if_first + (1 - first_wins) * if_second
    if pair_weights is None:
        return per_pair.mean()
    weights, mirrored = _of_pairs("pair_weights", pair_weights, logps, a, b)
    if not torch.allclose(weights, mirrored, rtol=1e-6, atol=0.0):
        worst = (weights - mirrored).abs().argmax()
        got = f"{weights[worst].item():.6g} and {mirrored[worst].item():.6g}"
        raise ValueError(
            f"`pair_weights` must be symmetric, got {got} for the two orders of a pair"
        )
    if weights.min() < 0 or weights.max() == 0:
        got = f"{weights.min().item():.6g} to {weights.max().item():.6g}"
        raise ValueError(f"`pair_weights` must be >= 0 and not all 0, got {got}")
    return (weights / weights.sum()) @ per_pair


@overload
def fit_table(
    loss: Callable[[Tensor], Tensor], start_logps: Tensor, *, steps: int = 500
) -> Tensor: ...
@overload
def fit_table(
    loss: Callable[..., Tensor],
    start_logps: Tensor,
    extra: Tensor,
    /,
    *more: Tensor,
    steps: int = 500,
) -> tuple[Tensor, ...]: ...
def fit_table(
    loss: Callable[..., Tensor], start_logps: Tensor, *extra: Tensor, steps: int = 500
) -> Tensor | tuple[Tensor, ...]:
    """Minimise a smooth loss of a whole table of log-probabilities, to six digits of the table.

    What a bandit needs where the loss is a population's, not a sample's: L-BFGS over free logits,
    until no step lowers the loss. On random bandits the result is within 1e-6 of the minimum in
    total variation, and the loss within 1e-10: a population's DPO loss where the rewards of a
    prompt differ by at most 6, minus `closed_form.objective` where they differ by at most 4 beta.
    Rewards further apart make a loss flat far from its minimum, around tables that have all but
    forgotten an answer, and the descent may stop there.

    Args:
      loss: from log-probabilities `[X, Y]`, and the `extra` tensors, to a scalar.
      start_logps: `[X, Y]`, where to start, finite, nats.
      *extra: where other parameters of the loss start, such as one offset per prompt; of any
        shape, finite, of the dtype of `start_logps`. They are fitted too.
      steps: the most iterations.
    Returns:
      `[X, Y]`, log-probabilities at the minimum, nats, without gradient. With `extra` a tuple: the
      log-probabilities, then each of `extra` at the minimum.
    Raises:
      ValueError: the loss is not a finite scalar or its gradient not finite; `start_logps` or one
        of `extra` is not finite; or `start_logps` has a value above 0.
    """
    check_count("steps", steps)
    check_floats("[X, Y]", start_logps=start_logps)
    check_finite(start_logps=start_logps)
    check_at_most_0("start_logps", start_logps)
    for n, start in enumerate(extra):
        check_floats("[...]", **{f"extra[{n}]": start})
        check_alike("start_logps", start_logps, **{f"extra[{n}]": start})
        check_finite(**{f"extra[{n}]": start})
    free = [start.detach().clone().requires_grad_() for start in (start_logps, *extra)]
    logits, *others = free
    optimizer = torch.optim.LBFGS(
        free,
        max_iter=steps,
        tolerance_grad=1e-13,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits.log_softmax(-1), *others)
        if value.dim() > 0:
            raise ValueError(f"loss: got shape {list(value.shape)}, takes a scalar")
        if not torch.isfinite(value):
            raise ValueError(f"loss: got {value.item()}, takes a finite value")
        value.backward()
        _check_gradient(free, value)
        return value

    optimizer.step(closure)
    logps = logits.detach().log_softmax(-1)
    return (logps, *(other.detach() for other in others)) if others else logps


def _of_pairs(
    name: str, table: Tensor, logps: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Entries `[x, a, b]` and `[x, b, a]` of a finite `[X, Y, Y]`, all pairs in one row each."""
    check_floats("[X, Y, Y]", **{name: table})
    check_alike("logps", logps, **{name: table})
    want = [*logps.shape, logps.shape[1]]
    if list(table.shape) != want:
        raise ValueError(f"`{name}` must have shape [X, Y, Y] = {want}, got {list(table.shape)}")
    entries, mirrored = table[:, a, b].flatten(), table[:, b, a].flatten()
    check_finite(**{name: torch.cat([entries, mirrored])})
    return entries, mirrored


def without_reference(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss of the policy alone in the form of one with a reference, for every loop on pairs.

    Args:
      loss: from chosen and rejected log-probabilities, `[B]` each, to one loss per pair, such as
        `partial(cpo_loss, beta=0.1)`, or `partial(simpo_loss, beta=2.0, gamma=1.0)` with
        `reduce=mean_over_tokens` in the loop.
    Returns:
      A loss of four, which does not use the reference's two. Keyword arguments are passed on.
    """

    def of_four(
        chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, **named: Any
    ) -> Tensor:
        return loss(chosen, rejected, **named)

    return of_four


_OTHER_LOSSES = {  # by an argument that only they have
    "desirable": "single answers and a thumb for each: write a loop of your own, or `fit_table`",
    "mismatched_logps": "answers to other prompts: it estimates the z_0 of `kto_loss`",
    "first_rewards": "a score of each answer: `fit_reinforce` learns from scores, or `fit_table`",
    "values": "a score and a value of each answer: write a loop of your own, or `fit_table`",
    "rewards": "scores of K answers per prompt: `fit_reinforce` learns from scores, or `fit_table`",
    "chosen_rewards": "rewards and not log-probabilities: `fit_reward_model` takes it as it is",
    "logps": "a list of K answers per prompt: `fit_table`, or `dpo_loss` on the list's pairs",
}


def check_pair_loss(loss: Callable[..., Tensor], **given: object) -> None:
    """Refuse a loss that does not take the log-probabilities of a pair and its reference.

    Args:
      loss: what a loop was given.
      **given: keyword arguments that the loop passes on.
    """
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    name = getattr(getattr(loss, "func", loss), "__name__", "this loss")
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty]
    problem = _fails_to_bind(signature, 4, given)
    if not problem and "values" not in needed:
        return
    for argument, what in _OTHER_LOSSES.items():
        if argument in needed:
            raise ValueError(f"`loss` must take pairs with a reference, got {name}, of {what}")
    if _fails_to_bind(signature, 2, given):
        takes = "must take four tensors, with all else bound by functools.partial"
        raise ValueError(f"`loss` {takes}, got {name}: {problem}")
    means = ", reduce=mean_over_tokens" if any("mean" in each for each in needed) else ""
    cure = f"write train.without_reference({name}){means}"
    what = f"got {name}, which takes no reference: {cure}"
    raise ValueError(f"`loss` must take pairs with a reference, {what}")


def _fails_to_bind(signature: inspect.Signature, n: int, given: dict[str, object]) -> str:
    """Why `n` tensors and these keyword arguments are no call of it; "" where they are."""
    try:
        signature.bind(*[None] * n, **given)
    except TypeError as error:
        return str(error)
    return ""


def check_pairs(pairs: Pairs) -> Pairs:
    """The three tensors of `pairs`, or a ValueError where they do not belong together."""
    if len(pairs) != 3:
        raise ValueError(f"pairs: got {len(pairs)} tensors, takes (prompts, chosen, rejected)")
    prompts, chosen, rejected = pairs
    check_rows("prompts", prompts, chosen=chosen, rejected=rejected)
    check_integers("chosen", chosen, "[n, T]")
    check_integers("rejected", rejected, "[n, T]")
    if rejected.shape != chosen.shape:
        got, want = list(rejected.shape), list(chosen.shape)
        raise ValueError(f"rejected: got shape {got}, takes {want} like chosen")
    return prompts, chosen, rejected


def _descend(
    policy: nn.Module | Scorer,
    batch_loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    n_rows: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: Callable[[range], Iterable[int]],
) -> History:
    """Adam, 20 steps of warm-up, a cosine down to 0, reshuffled rows: what all loops share."""
    optimizer, schedule = _adam(policy, steps, learning_rate)
    history: History = {}
    waiting = torch.empty(0, dtype=torch.int64)
    for _ in progress(range(steps)):
        if len(waiting) == 0:
            waiting = torch.randperm(n_rows, generator=generator, device=generator.device)
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        loss, measured = batch_loss(rows)
        _descend_once(optimizer, loss, len(history.get("loss", [])))
        schedule.step()
        _record(history, loss=loss.detach(), **measured)
    return history


def _adam(
    model: nn.Module | Scorer, steps: int, learning_rate: float
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    # Fused, all weights take one step in one call: a third of the time where they are small.
    optimizer = torch.optim.Adam(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    return optimizer, schedule


def _descend_once(optimizer: torch.optim.Adam, loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise ValueError(f"loss: got {loss.item()} at step {step}")
    optimizer.zero_grad()
    loss.backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    _check_gradient(weights, loss, f" at step {step}")
    optimizer.step()


def _check_gradient(weights: Iterable[Tensor], loss: Tensor, where: str = "") -> None:
    """A loss may be finite and its gradient not, which would make all weights NaN."""
    norm = float(nn.utils.clip_grad_norm_(weights, math.inf))  # measures, and shortens nothing
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient must be finite, got a norm of {norm}{where} where the loss is "
            f"{loss.item():.4g}: a part of it has no derivative there, such as sqrt(x) at x = 0"
        )


def _record(history: History, **measured: Tensor | float) -> None:
    for name, value in measured.items():
        history.setdefault(name, []).append(float(value))


def _check_settings(
    steps: int, batch_size: int, learning_rate: float, generator: torch.Generator
) -> None:
    check_count("steps", steps)
    check_count("batch_size", batch_size)
    check_positive("learning_rate", learning_rate)
    check_generator(generator)


def _check_frozen(policy: nn.Module | Scorer, reference: nn.Module | Scorer) -> None:
    if shares_storage(policy, reference):
        raise ValueError(
            "reference: got weights that it shares with the policy, takes a copy (copy.deepcopy)"
        )


def _check_on_policy(policy: nn.Module, reference: nn.Module, prompts: Tensor) -> None:
    check_integers("prompts", prompts, "[n]")
    _check_frozen(policy, reference)


def _draw_prompts(prompts: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """`[B]`: every prompt equally often, up to the remainder, in random order."""
    rounds = -(-batch_size // len(prompts))
    shape = (rounds, len(prompts))
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    order = draws.argsort(1)
    return prompts[order.flatten()[:batch_size].to(prompts.device)]


def _score(score: Score, prompts: Tensor, completions: Tensor) -> Tensor:
    with torch.no_grad():
        rewards = score(prompts, completions)
    check_floats("[B]", score=rewards)
    if len(rewards) != len(completions):
        raise ValueError(f"score: got {len(rewards)} rewards, takes {len(completions)}, one a row")
    check_finite(score=rewards)
    return rewards


def _logps(name: str, model: Scorer, prompts: Tensor, completions: Tensor) -> Tensor:
    """log pi(y|x), `[B]` nats."""
    scored = token_logps(model, prompts, completions, name=name)
    return sum_over_tokens(scored, completions != PAD)


def __dir__() -> list[str]:
    return __all__

r"""Gradients of an expected reward from samples: surrogate losses, baselines, GAE, KL estimators.

Pure tensors. A surrogate is a function whose gradient is the estimator and whose value means
little; each leaves the reduction to its caller, who takes a mean over samples (and, for tokens, a
masked one). Advantages, returns and old log-probabilities are data: no gradient flows into them.

GRPO and its relatives are whole methods: an advantage, a surrogate, and a rule for how the tokens
of a completion add up. Each takes groups, K completions for each of B prompts, and gives one value
per completion. The mean of these values over the batch is the method's loss.

A ratio is an exponential. Where its exponent is above 0.9 log(largest number) of the dtype (639 in
float64, 79 in float32), its value and its slope are held at what they are there, so that no loss
and no gradient is NaN or infinite. Half precision is computed in float32 and rounded once, at the
end; there what is above the largest float16, 65,504, is that number.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_mini._arguments import (
    as_bool_mask,
    check_alike,
    check_count,
    check_finite,
    check_floats,
    check_fraction,
    check_logps,
    check_normalised,
    check_number,
    check_positive,
    check_rows,
    values_visible,
)
from dpo_mini._numerics import (
    dtype_of_input,
    exp_remainder,
    hold,
    normalise,
    widen,
    with_slope,
)

__all__ = [
    "reinforce_loss",
    "unclipped_surrogate_loss",
    "clipped_surrogate_loss",
    "sequence_ratio_surrogate_loss",
    "cispo_surrogate_loss",
    "truncated_importance_weights",
    "value_loss",
    "clipped_value_loss",
    "mean_advantages",
    "leave_one_out_advantages",
    "group_normalised_advantages",
    "maxrl_advantages",
    "groups_with_difference",
    "optimal_baseline",
    "gae",
    "whiten",
    "grpo_loss",
    "dr_grpo_loss",
    "dapo_loss",
    "rloo_loss",
    "maxrl_loss",
    "gspo_loss",
    "cispo_loss",
    "entropy",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "AdaptiveKLController",
]

# --- surrogates ------------------------------------------------------------------------------


def reinforce_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    r"""Score function: $-A\log\pi_\theta(y)$, whose gradient is $-A\,\nabla\log\pi_\theta(y)$.

    Args:
      logps: `[B]` log pi_theta of completions drawn from pi_theta, or `[B, T]` of their tokens,
        nats.
      advantages: the same shape, reward units: the reward minus a baseline.
    Returns:
      the same shape; the gradient of its mean over samples is that of -E[r].
    Raises:
      ValueError: shapes or dtypes differ, or a value is not finite.
    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    check_floats("[...]", logps=logps, advantages=advantages)
    check_finite(logps=logps, advantages=advantages)
    return -widen(advantages).detach() * widen(logps)


def unclipped_surrogate_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    r"""Importance-weighted score function: $-\rho A$ with $\rho = \pi_\theta/\pi_{old}$.

    Unbiased for samples from pi_old however far pi_theta has moved; its variance is not bounded.

    Args:
      logps: `[B]` or `[B, T]`, log pi_theta of what pi_old drew, nats.
      old_logps: the same shape, log pi_old, nats.
      advantages: the same shape, reward units.
    Returns:
      the same shape, reward units.
    Raises:
      ValueError: shapes or dtypes differ, or a value is not finite.
    Source: Schulman et al. 2017, Eq. 6, arXiv:1707.06347.
    """
    ratios, weights = _ratios(logps, old_logps, advantages)
    return -ratios * weights


def clipped_surrogate_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    r"""PPO's: $-\min(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon_{high}) A)$.

    Args:
      logps, old_logps, advantages: as in `unclipped_surrogate_loss`.
      clip_eps: > 0; a sample whose ratio went further than this in the direction that its advantage
        asks for has no gradient.
      clip_eps_high: > 0, the upper clip where it is another (DAPO's "clip-higher"); None means
        `clip_eps`, as PPO has it.
    Returns:
      the same shape, reward units; never below the unclipped loss.
    Raises:
      ValueError: `clip_eps <= 0` or `clip_eps_high <= 0`; otherwise as `unclipped_surrogate_loss`.
    Source: Schulman et al. 2017, Eq. 7, arXiv:1707.06347; the upper clip: Yu et al. 2025 (DAPO),
      section 3.1, arXiv:2503.14476.
    """
    clip_eps_high = clip_eps if clip_eps_high is None else clip_eps_high
    check_positive("clip_eps", clip_eps)
    check_positive("clip_eps_high", clip_eps_high)
    ratios, weights = _ratios(logps, old_logps, advantages)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps_high)
    return torch.maximum(-ratios * weights, -clipped * weights)


def sequence_ratio_surrogate_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    r"""GSPO's: PPO's clipped loss with one ratio $s$ per completion, clipped as a whole.

    $s = \exp\frac{1}{n}\sum_t\log\rho_t$ is the geometric mean of a completion's n token ratios.
    The importance weight of the completion is another number, s to the power n. As s stays near 1
    where that weight does not, GSPO's clips are small: the paper's are 3e-4 and 4e-4.

    Args:
      logps: `[B, T]`, log pi_theta of the tokens that pi_old drew, nats.
      old_logps: `[B, T]`, log pi_old, nats.
      advantages: `[B]`, reward units: one for each completion.
      completion_mask: `[B, T]` bool or 0/1, true on tokens, at least one in each row; what the
        log-probabilities hold where it is false does not matter.
      clip_eps, clip_eps_high: as in `clipped_surrogate_loss`.
    Returns:
      `[B]`, reward units.
    Raises:
      ValueError: a clip is not positive; shapes or dtypes differ; the mask is not 0/1 or has a row
        without a token; a token's log-probability or an advantage is not finite.
    Source: Zheng et al. 2025 (GSPO), Eqs. 5 and 7, arXiv:2507.18071.
    """
    check_floats("[B, T]", logps=logps, old_logps=old_logps)
    check_floats("[B]", advantages=advantages)
    check_rows("logps", logps, advantages=advantages)
    check_alike("logps", logps, advantages=advantages)
    policy, old, mask = _with_tokens(logps, old_logps, completion_mask)
    means = (policy - old).sum(-1) / mask.sum(-1)
    return clipped_surrogate_loss(
        means,
        torch.zeros_like(means),
        widen(advantages),
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
    )


def cispo_surrogate_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_eps_high: float
) -> Tensor:
    r"""CISPO's: $-\mathrm{sg}(\min(\rho, 1+\epsilon_{high}))\,A\log\pi_\theta$, sg: as a constant.

    The ratio is a weight of the score function, and this weight has a cap. So every token keeps a
    gradient, where PPO's clip would take it away. Where no ratio reaches the cap, the gradient is
    that of `unclipped_surrogate_loss`.

    Args:
      logps, old_logps, advantages: as in `unclipped_surrogate_loss`.
      clip_eps_high: > 0; a weight is at most 1 + clip_eps_high. `trl` gives the cap itself: its
        `epsilon_high` is our 1 + clip_eps_high, after Khatri et al. 2025, arXiv:2510.13786.
    Returns:
      the same shape, reward units times nats.
    Raises:
      ValueError: `clip_eps_high <= 0`; otherwise as `unclipped_surrogate_loss`.
    Source: MiniMax 2025 (M1), Eqs. 4 and 5, arXiv:2506.13585. Its formula has a lower clip too,
      which its experiments switch off; there is none here, and none in `trl`.
    """
    check_positive("clip_eps_high", clip_eps_high)
    ratios, weights = _ratios(logps, old_logps, advantages)
    return -ratios.detach().clamp(max=1 + clip_eps_high) * weights * widen(logps)


def truncated_importance_weights(logps: Tensor, sampler_logps: Tensor, *, cap: float) -> Tensor:
    r"""$\min(\pi/\mu,\ C)$ as constants, for a sampler mu that is not quite the policy pi.

    A fast sampler and the trainer give slightly different probabilities to the same tokens under
    the same weights. Multiply each token's loss by its weight. The cap bounds the variance and
    costs a bias: completions that the sampler draws too rarely count for too little.

    Args:
      logps: log pi of what the sampler drew, computed by the trainer before its first step, nats:
        `old_logps` of the losses. `[B, T]` of tokens; or `[B]` of whole completions.
      sampler_logps: the same shape, log mu, as the sampler gave it, nats.
      cap: C > 0, the largest weight.
    Returns:
      the same shape, without unit, without gradient.
    Raises:
      ValueError: `cap <= 0`; shapes or dtypes differ, or a value is not finite.
    Source: Ionides 2008, "Truncated importance sampling" (whose cap grows with the sample); with a
      fixed cap and for tokens: Yao et al. 2025, "Your efficient RL framework secretly brings you
      off-policy RL training", fengyao.notion.site/off-policy-rl. It is `token_truncate` of `trl`,
      whose default in 1.16 is another: it drops completions whose ratio is above the cap.
    """
    check_positive("cap", cap)
    check_floats("[...]", logps=logps, sampler_logps=sampler_logps)
    check_finite(logps=logps, sampler_logps=sampler_logps)
    log_ratios = widen(logps).detach() - widen(sampler_logps).detach()
    return log_ratios.exp().clamp(max=cap)  # an infinite ratio is the cap, too


def value_loss(values: Tensor, returns: Tensor) -> Tensor:
    r"""Half the squared error of a value head: $\frac12 (V - R)^2$.

    Args:
      values: `[B]` or `[B, T]`, reward units.
      returns: the same shape.
    Returns:
      the same shape, reward units squared.
    Raises:
      ValueError: shapes or dtypes differ, or a value is not finite.
    Source: Schulman et al. 2017, Eq. 9, arXiv:1707.06347, with a half.
    """
    check_floats("[...]", values=values, returns=returns)
    check_finite(values=values, returns=returns)
    return _half_square(widen(values) - widen(returns).detach())


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_eps: float
) -> Tensor:
    r"""The larger of $\frac12(V-R)^2$ with V and with V clipped to $V_{old}\pm\epsilon$.

    Args:
      values, returns: as in `value_loss`.
      old_values: the same shape, the value head's answers when the samples were drawn.
      clip_eps: > 0, reward units: how far a value may move with a gradient.
    Returns:
      the same shape, reward units squared; never below `value_loss`.
    Raises:
      ValueError: `clip_eps <= 0`; shapes or dtypes differ; a value is not finite.
    Source: `ppo2` of OpenAI Baselines; Ziegler et al. 2019, arXiv:1909.08593, in its code.
    """
    check_positive("clip_eps", clip_eps)
    check_floats("[...]", values=values, old_values=old_values, returns=returns)
    check_finite(values=values, old_values=old_values, returns=returns)
    old, targets = widen(old_values).detach(), widen(returns).detach()
    clipped = old + (widen(values) - old).clamp(-clip_eps, clip_eps)
    return torch.maximum(_half_square(widen(values) - targets), _half_square(clipped - targets))


# --- baselines and advantages ----------------------------------------------------------------


def mean_advantages(rewards: Tensor) -> Tensor:
    r"""$r_k - \bar r$: the mean of all K as baseline, the sample's own reward included.

    The estimated gradient is (K-1)/K of the true one: the right direction, but too short.

    Args:
      rewards: `[B, K]`, K >= 2 completions of one prompt drawn independently.
    Returns:
      `[B, K]`, reward units.
    Raises:
      ValueError: K < 2, or a reward is not finite.
    """
    return _centred(_groups(rewards))


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    r"""$r_k - \frac{1}{K-1}\sum_{j\ne k} r_j$: the mean of the *others* as baseline; unbiased.

    Args and errors are those of `mean_advantages`.

    Returns:
      `[B, K]`, reward units.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al.
      2024 (RLOO), arXiv:2402.14740.
    """
    groups = _groups(rewards)
    n_samples = groups.shape[1]
    return _centred(groups) * (n_samples / (n_samples - 1))  # the same, and 0 for equal rewards


def group_normalised_advantages(rewards: Tensor, *, eps: float = 1e-4) -> Tensor:
    r"""GRPO's: $(r_k - \bar r) / (\mathrm{std} + \epsilon)$ within a group of K.

    The standard deviation is the population's (divisor K). Libraries that divide by K - 1 instead
    have advantages smaller by the square root of (K-1)/K.

    Args:
      rewards: `[B, K]`, as in `mean_advantages`.
      eps: > 0, reward units; keeps groups of equal rewards at 0.
    Returns:
      `[B, K]`, without unit.
    Raises:
      ValueError: `eps <= 0`, K < 2, or a reward is not finite.
    Source: Shao et al. 2024 (DeepSeekMath), section 4.1.2, arXiv:2402.03300.
    """
    check_positive("eps", eps)
    advantages = _centred(_groups(rewards))
    variance = advantages.square().mean(-1, keepdim=True)
    equal = variance == 0  # a square root has no slope at 0
    return advantages / (variance.masked_fill(equal, 1.0).sqrt().masked_fill(equal, 0.0) + eps)


def maxrl_advantages(rewards: Tensor) -> Tensor:
    r"""MaxRL's: $(r_k - \bar r) / \bar r$ within a group of K, and 0 where no reward is above 0.

    For rewards of 0 and 1, where a success has probability p, the mean gradient is
    $\nabla p\,[1-(1-p)^{K-1}]/p$. With many samples that is the gradient of log p: the likelihood
    of a success is maximised.

    Args:
      rewards: `[B, K]`, as in `mean_advantages`, none below 0; made for rewards of 0 and 1.
    Returns:
      `[B, K]`, without unit, without gradient.
    Raises:
      ValueError: a reward is below 0 or not finite, or K < 2.
    Source: Tajwar et al. 2026 (MaxRL), arXiv:2602.02710. Its code divides by the mean plus 1e-6;
      here nothing is added.
    """
    groups = _groups(rewards).detach()
    if values_visible(groups) and (groups < 0).any():
        raise ValueError(f"`rewards` must be >= 0, got {groups.min().item():.4g}")
    means = groups.mean(-1, keepdim=True)
    return _centred(groups) / means.masked_fill(means == 0, 1.0)


def groups_with_difference(rewards: Tensor) -> Tensor:
    """Which groups have two different rewards: those that DAPO keeps.

    Where all rewards of a group are equal, each advantage above is 0, so the group has no gradient.
    It still counts where a batch is divided by its number of prompts or tokens.

    Args:
      rewards: `[B, K]`, as in `mean_advantages`.
    Returns:
      `[B]` bool; `tensor[groups_with_difference(rewards)]` drops the other groups.
    Raises:
      ValueError: K < 2, or a reward is not finite.
    Source: Yu et al. 2025 (DAPO), section 3.2 ("dynamic sampling"), arXiv:2503.14476. The paper
      draws new prompts until the batch is full.
    """
    groups = _groups(rewards)
    return (groups != groups[:, :1]).any(-1)


def optimal_baseline(logps: Tensor, rewards: Tensor, squared_scores: Tensor) -> Tensor:
    r"""The constant with the least variance: $E[\|s\|^2 r] / E[\|s\|^2]$, exact on a table.

    Args:
      logps: `[X, Y]`, log pi_theta, nats; each row's probabilities sum to 1.
      rewards: `[X, Y]`, finite.
      squared_scores: `[X, Y]`, squared norm of the score, grad log pi_theta(y|x); not negative, and
        positive somewhere with positive probability.
    Returns:
      `[X]`, reward units.
    Raises:
      ValueError: shapes or dtypes differ; NaN, +inf or unnormalised log-probabilities; a value that
        is not finite or a squared score below 0; a row whose scores are all 0.
    Source: Greensmith et al. 2004, "Variance reduction techniques for gradient estimates".
    """
    check_floats("[X, Y]", logps=logps, rewards=rewards, squared_scores=squared_scores)
    check_logps(logps=logps)
    check_normalised(logps=logps)
    check_finite(rewards=rewards, squared_scores=squared_scores)
    if values_visible(squared_scores) and (squared_scores < 0).any():
        got = squared_scores.min().item()
        raise ValueError(f"`squared_scores` must be >= 0, got {got:.4g}")
    squares, wide_logps = widen(squared_scores), widen(logps)
    counted = wide_logps.detach().masked_fill(squares == 0, -torch.inf)
    largest = counted.amax(-1, keepdim=True)  # comes off, so that rare answers do not underflow
    if values_visible(largest) and torch.isneginf(largest).any():
        row = int(torch.isneginf(largest).flatten().nonzero()[0])
        what = "at least one value > 0 in each row"
        raise ValueError(f"`squared_scores` must have {what}, got only 0 in row {row}")
    gaps = wide_logps - largest  # above 0 only where the score is 0: e^gap must not be infinite
    weights = gaps.clamp(max=math.log(torch.finfo(gaps.dtype).max) - 1).exp() * squares
    # Counted from the reward that weighs most: where it weighs nearly all, the others keep digits.
    heaviest = widen(rewards).gather(-1, weights.argmax(-1, keepdim=True))
    return heaviest.squeeze(-1) + (weights * (widen(rewards) - heaviest)).sum(-1) / weights.sum(-1)


def gae(
    rewards: Tensor,
    values: Tensor,
    completion_mask: Tensor,
    *,
    discount: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation, backwards: $A_t = \delta_t + \gamma\lambda A_{t+1}$.

    $\delta_t = r_t + \gamma V_{t+1} - V_t$ is the TD error; after the last token V and A are 0.

    Args:
      rewards: `[B, T]`, the reward of each token.
      values: `[B, T]`, V of the prompt and the tokens *before* token t.
      completion_mask: `[B, T]` bool or 0/1, true on tokens, then false; what `rewards` and `values`
        hold where it is false does not matter.
      discount: gamma in [0, 1].
      lam: lambda in [0, 1]: 0 gives the TD error, 1 the return minus the value.
    Returns:
      `(advantages, returns)`, `[B, T]` each, reward units, 0 after the end; without gradient.
      `returns` is advantages + values, what a value head is fitted to.
    Raises:
      ValueError: shapes or dtypes differ; the mask is not 0/1 or has a token after padding;
        `discount` or `lam` outside [0, 1]; a reward or value of a token is not finite.
    Source: Schulman et al. 2015, Eq. 16, arXiv:1506.02438.
    """
    check_fraction("discount", discount)
    check_fraction("lam", lam)
    check_floats("[B, T]", rewards=rewards, values=values)
    mask = as_bool_mask("completion_mask", completion_mask, rewards.shape)
    if values_visible(mask) and (mask[:, 1:] & ~mask[:, :-1]).any():
        row = int((mask[:, 1:] & ~mask[:, :-1]).any(1).nonzero()[0])
        raise ValueError(
            "`completion_mask` must have padding at the end only, "
            f"got a token after it in row {row}"
        )
    rewards = widen(rewards).detach().masked_fill(~mask, 0.0)
    values = widen(values).detach().masked_fill(~mask, 0.0)
    check_finite(rewards=rewards, values=values)
    next_value = next_advantage = next_return = torch.zeros_like(rewards[:, 0])  # after the end
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        td_error = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = td_error + discount * lam * next_advantage
        # A + V, but without the digits that adding V and subtracting it would cost.
        next_return = rewards[:, t] + discount * torch.lerp(next_value, next_return, lam)
        next_value = values[:, t]
        backwards.append((next_advantage, next_return))
    advantages, returns = (torch.stack(each, dim=1) for each in zip(*backwards[::-1], strict=True))
    return advantages, returns


def whiten(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all masked-in tokens of a batch; 0 elsewhere.

    Args:
      values: `[B, T]`, advantages as a rule.
      completion_mask: `[B, T]` bool or 0/1, with at least two tokens.
    Returns:
      `[B, T]`, without unit. 1e-8 is added to the variance (the population's), so equal values
      give 0.
    Raises:
      ValueError: shapes differ, the mask is not 0/1 or has fewer than two tokens, or a masked-in
        value is not finite.
    Source: `whiten` in the code of Ziegler et al. 2019, arXiv:1909.08593.
    """
    check_floats("[B, T]", values=values)
    mask = as_bool_mask("completion_mask", completion_mask, values.shape)
    n_tokens = mask.sum()
    if values_visible(mask) and n_tokens < 2:
        raise ValueError(f"`completion_mask` must have at least 2 tokens, got {int(n_tokens)}")
    check_finite(values=values.masked_fill(~mask, 0.0))
    # One of the values comes off first, so that equal values leave exactly 0.
    lowest = widen(values).detach().masked_fill(~mask, torch.inf).amin()
    shifted = (widen(values) - lowest).masked_fill(~mask, 0.0)
    centred = (shifted - shifted.sum() / n_tokens).masked_fill(~mask, 0.0)
    return centred * (centred.square().sum() / n_tokens + 1e-8).rsqrt()


# --- whole methods ---------------------------------------------------------------------------


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    r"""GRPO: normalised advantages, PPO's clip on each token, the mean over a completion's tokens.

    Args:
      logps: `[B, K, T]`, log pi_theta of the tokens of K completions for each of B prompts, drawn
        by pi_old, nats.
      old_logps: `[B, K, T]`, log pi_old, nats.
      rewards: `[B, K]`, K >= 2, one for each completion.
      completion_mask: `[B, K, T]` bool or 0/1, true on tokens, at least one in each completion;
        what the log-probabilities hold where it is false does not matter.
      clip_eps, clip_eps_high: as in `clipped_surrogate_loss`.
    Returns:
      `[B, K]`, without unit: one value per completion. Their mean is the loss.
    Raises:
      ValueError: a clip is not positive; shapes or dtypes differ; K < 2; the mask is not 0/1 or has
        a completion without a token; a token's log-probability or a reward is not finite.
    Source: Shao et al. 2024 (DeepSeekMath), Eq. 3 without its KL term (`kl_k3`),
      arXiv:2402.03300. `trl` divides by the standard deviation with K - 1:
      see `group_normalised_advantages`.
    """
    policy, old, groups, mask = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = group_normalised_advantages(groups)
    tokens = _clipped_tokens(policy, old, advantages, mask, clip_eps, clip_eps_high)
    return tokens.sum(-1) / mask.sum(-1)


def dr_grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    """Dr. GRPO: GRPO without the division by the spread and by each completion's length.

    The sum over tokens is divided by the constant T, the width of the tensors. T must be the
    longest completion that may be drawn, not the longest of this batch, or the loss depends on
    the lengths in the batch.

    Args and errors are those of `grpo_loss`.

    Returns:
      `[B, K]`, reward units. On policy, the gradient of the mean is (K - 1)/(K T) times that of
      minus the expected reward: see `mean_advantages`.
    Source: Liu et al. 2025, section 3.2, arXiv:2503.20783. Its formula has no constant; its code
      divides by the longest length that it generates, and so does `trl`.
    """
    policy, old, groups, mask = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = mean_advantages(groups)
    tokens = _clipped_tokens(policy, old, advantages, mask, clip_eps, clip_eps_high)
    return tokens.sum(-1) / tokens.shape[-1]


def dapo_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    """DAPO: GRPO's advantages, an upper clip of its own, each token of the batch counted alike.

    The sum over tokens is divided by the mean length of the batch. Groups without a difference
    count in that length: drop them first, with `groups_with_difference`. What else the paper does
    (drawing new prompts, a penalty for length) is not part of a loss.

    Args and errors are those of `grpo_loss`; the paper's clips are 0.2 and 0.28.

    Returns:
      `[B, K]`, without unit. Their mean is the sum over all tokens divided by how many they are.
    Source: Yu et al. 2025, Eq. 8, arXiv:2503.14476. The formula divides by the tokens of each
      prompt's group; its code, and `trl`, by those of the whole batch, and so do we.
    """
    policy, old, groups, mask = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = group_normalised_advantages(groups)
    tokens = _clipped_tokens(policy, old, advantages, mask, clip_eps, clip_eps_high)
    return tokens.sum(-1) / mask.sum(-1).mean(dtype=tokens.dtype)


def rloo_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    """RLOO: the mean of the others as baseline, and the completion as one action.

    The ratio is that of whole completions, the product of the token ratios.

    Args and errors are those of `grpo_loss`.

    Returns:
      `[B, K]`, reward units. On policy, the gradient of the mean is an unbiased estimate of that of
      minus the expected reward.
    Source: Ahmadian et al. 2024, arXiv:2402.14740, which is on policy and has no ratio;
      ratio and clip are those of `trl`.
    """
    policy, old, groups, _ = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = leave_one_out_advantages(groups)
    log_ratios = (policy - old).sum(-1)
    return clipped_surrogate_loss(
        log_ratios,
        torch.zeros_like(log_ratios),
        advantages,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
    )


def maxrl_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    """MaxRL: advantages divided by the mean reward, PPO's clip on each token, the sum over tokens.

    Args and errors are those of `grpo_loss`; and no reward may be below 0.

    Returns:
      `[B, K]`, without unit. On policy, for rewards of 0 and 1, the gradient of the mean is an
      unbiased estimate of that of the first K - 1 terms of the series of -log p in powers of 1 - p.
    Source: Tajwar et al. 2026, arXiv:2602.02710, whose estimator is made of scores of whole
      completions on policy: hence the sum over tokens. Its code clips each token, as here, and
      divides by the tokens of the batch instead, so that longer batches take smaller steps.
    """
    policy, old, groups, mask = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = maxrl_advantages(groups)
    return _clipped_tokens(policy, old, advantages, mask, clip_eps, clip_eps_high).sum(-1)


def gspo_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> Tensor:
    """GSPO: GRPO's advantages, and one ratio per completion, clipped as a whole.

    Args and errors are those of `grpo_loss`; the paper's clips are 3e-4 and 4e-4.

    Returns:
      `[B, K]`, without unit. On policy, its gradient is that of `grpo_loss`.
    Source: Zheng et al. 2025, Eq. 5, arXiv:2507.18071: see `sequence_ratio_surrogate_loss`.
    """
    policy, old, groups, mask = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = group_normalised_advantages(groups)
    rows = (tensor.flatten(0, 1) for tensor in (policy, old, advantages, mask))
    losses = sequence_ratio_surrogate_loss(*rows, clip_eps=clip_eps, clip_eps_high=clip_eps_high)
    return losses.view_as(groups)


def cispo_loss(
    logps: Tensor,
    old_logps: Tensor,
    rewards: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps_high: float,
) -> Tensor:
    """CISPO: GRPO's advantages, capped ratios as weights, each token of the batch counted alike.

    Args and errors are those of `grpo_loss` and `cispo_surrogate_loss`.

    Returns:
      `[B, K]`, nats. Their mean is the sum over all tokens divided by how many they are.
    Source: MiniMax 2025 (M1), Eq. 4, arXiv:2506.13585. The formula divides by the tokens of each
      prompt's group; `trl` by those of the whole batch, and so do we.
    """
    policy, old, groups, mask = _groups_of_tokens(logps, old_logps, rewards, completion_mask)
    advantages = group_normalised_advantages(groups).unsqueeze(-1).expand_as(policy)
    tokens = cispo_surrogate_loss(policy, old, advantages, clip_eps_high=clip_eps_high)
    # Where there is no token, log pi is 0, and so is the loss.
    return tokens.sum(-1) / mask.sum(-1).mean(dtype=tokens.dtype)


# --- entropy and KL --------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    r"""$-\sum_v p_v \log p_v$ of $p = \mathrm{softmax}(\mathrm{logits})$.

    Args:
      logits: `[..., V]`, finite or -inf, not all -inf.
    Returns:
      `[...]`, nats, in [0, log V].
    Raises:
      ValueError: NaN, +inf, or V logits of -inf.
    """
    check_floats("[...]", logits=logits)
    if logits.dim() == 0:
        raise ValueError("`logits` must be [..., V], got a tensor of no dimension")
    if values_visible(logits):
        if torch.isnan(logits).any() or torch.isposinf(logits).any():
            raise ValueError("`logits` must be < inf, got NaN or +inf")
        if torch.isneginf(logits.amax(-1)).any():
            what = "at least one finite logit per position"
            raise ValueError(f"`logits` must have {what}, got a position of -inf only")
    scores = widen(logits)
    logps, probs = normalise(scores)[0], scores.softmax(-1)
    value = -(logps.exp() * logps.masked_fill(torch.isneginf(logps), 0.0)).sum(-1)
    # The slope is p_v (mean logit - logit v). Autograd would find log p_v + H by a subtraction that
    # leaves no digits where p is nearly uniform.
    gaps = (scores - scores.detach().amax(-1, keepdim=True)).masked_fill(probs == 0, 0.0)
    return with_slope(value, scores, probs * ((probs * gaps).sum(-1, keepdim=True) - gaps))


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""$u = \log(\pi_\theta/\pi_{ref})$ of samples *from pi_theta*: mean +KL(pi_theta || pi_ref).

    Unbiased; may be negative.

    Args:
      logps: `[B]` or `[B, T]`, log pi_theta of what pi_theta drew, nats.
      ref_logps: the same shape, log pi_ref, nats.
    Returns:
      the same shape, nats.
    Raises:
      ValueError: shapes or dtypes differ, or a value is not finite.
    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return _log_ratios(logps, ref_logps)


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""$u^2/2$ with u as in `kl_k1`: biased in value; its gradient as a loss is the KL's.

    Args, errors and source are those of `kl_k1`.

    Returns:
      the same shape, nats, never negative.
    """
    return _half_square(_log_ratios(logps, ref_logps))


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""$e^{-u} - 1 + u$ with u as in `kl_k1`: unbiased in value where pi_theta covers pi_ref.

    Args, errors and source are those of `kl_k1`.

    Returns:
      the same shape, nats, never negative.
    """
    return exp_remainder(-_log_ratios(logps, ref_logps))


@dataclass
class AdaptiveKLController:
    """A KL weight that follows a target: raised where the policy is too far, lowered where near.

    Args:
      beta: > 0, the weight to start from; `update` changes it.
      target: > 0, the KL wanted, nats.
      horizon: samples over which a full error of 20 % moves `beta` by a factor of about e^0.2.
    Raises:
      ValueError: one of them is not positive.
    Source: Ziegler et al. 2019, section 2.2, arXiv:1909.08593.
    """

    beta: float
    target: float
    horizon: int

    def __post_init__(self) -> None:
        """Refuse what is not positive."""
        check_positive("beta", self.beta)
        check_positive("target", self.target)
        check_count("horizon", self.horizon)

    def update(self, kl: float, n_samples: int) -> None:
        """Move `beta` by the relative error of `kl`, clipped to 20 %, times n_samples / horizon.

        Args:
          kl: mean KL of these samples, nats; an estimate may be negative.
          n_samples: how many samples it comes from, in 1..horizon.
        Raises:
          ValueError: `kl` is not finite, or `n_samples` is out of range.
        """
        kl = kl.item() if isinstance(kl, Tensor) and kl.dim() == 0 else kl
        check_number("kl", kl)
        check_count("n_samples", n_samples)
        if n_samples > self.horizon:
            what = f"at most `horizon` = {self.horizon}"
            raise ValueError(f"`n_samples` must be {what}, got {n_samples}")
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n_samples / self.horizon


def _ratios(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """pi_theta / pi_old, differentiable in pi_theta alone, and the advantages as constants."""
    check_floats("[...]", logps=logps, old_logps=old_logps, advantages=advantages)
    check_finite(logps=logps, old_logps=old_logps, advantages=advantages)
    log_ratios = widen(logps) - widen(old_logps).detach()
    return hold(log_ratios).exp(), widen(advantages).detach()


def _with_tokens(
    logps: Tensor, old_logps: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both log-probabilities `[..., T]`, 0 where there is no token, and the mask as bool."""
    mask = as_bool_mask("completion_mask", completion_mask, logps.shape)
    if values_visible(mask) and not mask.any(-1).all():
        at = (~mask.any(-1)).nonzero()[0].tolist()
        what = "at least one token in each completion"
        raise ValueError(f"`completion_mask` must have {what}, got none at {at}")
    policy, old = logps.masked_fill(~mask, 0.0), old_logps.masked_fill(~mask, 0.0)
    check_finite(logps=policy, old_logps=old)
    return widen(policy), widen(old).detach(), mask


def _groups_of_tokens(
    logps: Tensor, old_logps: Tensor, rewards: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the whole methods compute with: two `[B, K, T]`, rewards `[B, K]`, the mask as bool."""
    check_floats("[B, K, T]", logps=logps, old_logps=old_logps)
    check_floats("[B, K]", rewards=rewards)
    if rewards.shape != logps.shape[:2]:
        got, want = list(rewards.shape), list(logps.shape[:2])
        raise ValueError(f"`rewards` must have shape {want}, one per completion, got {got}")
    check_alike("logps", logps, rewards=rewards)
    policy, old, mask = _with_tokens(logps, old_logps, completion_mask)
    return policy, old, widen(rewards), mask


def _clipped_tokens(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_eps: float,
    clip_eps_high: float | None,
) -> Tensor:
    """PPO's loss of each token `[B, K, T]` by its completion's advantage; 0 where is no token."""
    tokens = clipped_surrogate_loss(
        logps,
        old_logps,
        advantages.unsqueeze(-1).expand_as(logps),
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
    )
    return tokens.masked_fill(~mask, 0.0)


def _log_ratios(logps: Tensor, ref_logps: Tensor) -> Tensor:
    check_floats("[...]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    return widen(logps) - widen(ref_logps)


def _half_square(errors: Tensor) -> Tensor:
    return 0.5 * errors**2


def _groups(rewards: Tensor) -> Tensor:
    """Rewards `[B, K]` of at least two samples per row, to compute with."""
    check_floats("[B, K]", rewards=rewards)
    check_finite(rewards=rewards)
    if rewards.shape[1] < 2:
        raise ValueError(f"`rewards` must have at least 2 samples per row, got {rewards.shape[1]}")
    return widen(rewards)


def _centred(groups: Tensor) -> Tensor:
    """Each row minus its mean. One of its values comes off first: equal values leave exactly 0."""
    shifted = groups - groups[:, :1]
    return shifted - shifted.mean(-1, keepdim=True)


for _name in __all__:
    if not isinstance(globals()[_name], type):
        globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

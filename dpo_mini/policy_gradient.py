r"""Gradients of an expected reward from samples: surrogate losses, baselines, GAE, KL estimators.

Pure tensors. A surrogate is a function whose gradient is the estimator and whose value means
little; each leaves the reduction to its caller, who takes a mean over samples (and, for tokens, a
masked one). Advantages, returns and old log-probabilities are data: no gradient flows into them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_mini.arguments import (
    as_bool_mask,
    check_count,
    check_finite,
    check_floats,
    check_fraction,
    check_logps,
    check_normalised,
    check_positive,
)

__all__ = [
    "reinforce_loss",
    "unclipped_surrogate_loss",
    "clipped_surrogate_loss",
    "value_loss",
    "clipped_value_loss",
    "mean_advantages",
    "leave_one_out_advantages",
    "group_normalised_advantages",
    "optimal_baseline",
    "gae",
    "whiten",
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
      advantages: the same shape, reward units: the reward less a baseline.
    Returns:
      the same shape; the gradient of its mean over samples is that of -E[r].
    Raises:
      ValueError: shapes or dtypes differ, or a value is not finite.
    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    check_floats("[...]", logps=logps, advantages=advantages)
    check_finite(logps=logps, advantages=advantages)
    return -advantages.detach() * logps


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
    return -_ratios(logps, old_logps, advantages) * advantages.detach()


def clipped_surrogate_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_eps: float
) -> Tensor:
    r"""PPO's: $-\min(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon) A)$.

    Args:
      logps, old_logps, advantages: as in `unclipped_surrogate_loss`.
      clip_eps: > 0; a sample whose ratio went further than this in the direction that its advantage
        asks for has no gradient.
    Returns:
      the same shape, reward units; never below the unclipped loss.
    Raises:
      ValueError: `clip_eps <= 0`; otherwise as `unclipped_surrogate_loss`.
    Source: Schulman et al. 2017, Eq. 7, arXiv:1707.06347.
    """
    check_positive("clip_eps", clip_eps)
    ratios, advantages = _ratios(logps, old_logps, advantages), advantages.detach()
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-ratios * advantages, -clipped * advantages)


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
    return 0.5 * (values - returns.detach()) ** 2


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
    check_floats("[...]", values=values, old_values=old_values)
    check_finite(old_values=old_values)
    moved = (values - old_values.detach()).clamp(-clip_eps, clip_eps)
    clipped = old_values.detach() + moved
    return torch.maximum(value_loss(values, returns), value_loss(clipped, returns))


# --- baselines and advantages ----------------------------------------------------------------


def mean_advantages(rewards: Tensor) -> Tensor:
    r"""$r_k - \bar r$: the mean of all K as baseline, the sample's own reward included.

    The estimated gradient is (K-1)/K of the true one: right in direction, short.

    Args:
      rewards: `[B, K]`, K >= 2 completions of one prompt drawn independently.
    Returns:
      `[B, K]`, reward units.
    Raises:
      ValueError: K < 2, or a reward is not finite.
    """
    _check_groups(rewards)
    return rewards - rewards.mean(-1, keepdim=True)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    r"""$r_k - \frac{1}{K-1}\sum_{j\ne k} r_j$: the mean of the *others* as baseline; unbiased.

    Args and errors are those of `mean_advantages`.

    Returns:
      `[B, K]`, reward units.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al.
      2024 (RLOO), arXiv:2402.14740.
    """
    _check_groups(rewards)
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


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
    advantages = mean_advantages(rewards)
    return advantages / (rewards.std(-1, correction=0, keepdim=True) + eps)


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
    if (squared_scores < 0).any():
        got = squared_scores.min().item()
        raise ValueError(f"squared_scores: got {got:.4g}, takes squares, >= 0")
    weights = logps.exp() * squared_scores
    totals = weights.sum(-1)
    if (totals == 0).any():
        row = int((totals == 0).nonzero()[0])
        raise ValueError(f"squared_scores: got only 0 in row {row}, takes one > 0 at least")
    return (weights * rewards).sum(-1) / totals


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
      lam: lambda in [0, 1]: 0 gives the TD error, 1 the return less the value.
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
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        row = int((mask[:, 1:] & ~mask[:, :-1]).any(1).nonzero()[0])
        raise ValueError(
            f"completion_mask: got a token after padding in row {row}, takes padding at the end"
        )
    rewards = rewards.detach().masked_fill(~mask, 0.0)
    values = values.detach().masked_fill(~mask, 0.0)
    check_finite(rewards=rewards, values=values)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # [B]: nothing after the end
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        td_error = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = td_error + discount * lam * next_advantage
        next_value = values[:, t]
        backwards.append(next_advantage)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values


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
    if mask.sum() < 2:
        raise ValueError(f"completion_mask: got {int(mask.sum())} tokens, takes >= 2")
    counted = values[mask]
    check_finite(values=counted)
    scale = (counted.var(correction=0) + 1e-8).rsqrt()
    return ((values - counted.mean()) * scale).masked_fill(~mask, 0.0)


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
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise ValueError("logits: got NaN or +inf, takes values < inf")
    if torch.isneginf(logits.amax(-1)).any():
        raise ValueError("logits: got a position of -inf only, takes one finite logit at least")
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps.masked_fill(torch.isneginf(logps), 0.0)).sum(-1)


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
    return 0.5 * _log_ratios(logps, ref_logps) ** 2


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    r"""$e^{-u} - 1 + u$ with u as in `kl_k1`: unbiased in value where pi_theta covers pi_ref.

    Args, errors and source are those of `kl_k1`.

    Returns:
      the same shape, nats, never negative.
    """
    u = _log_ratios(logps, ref_logps)
    # exp(-u) - 1 + u loses every digit near 0; expm1 does not.
    return torch.expm1(-u) + u


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
        check_finite(kl=torch.as_tensor(kl))
        check_count("n_samples", n_samples)
        if n_samples > self.horizon:
            raise ValueError(f"n_samples: got {n_samples}, takes at most horizon = {self.horizon}")
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n_samples / self.horizon


def _ratios(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """pi_theta / pi_old, differentiable in pi_theta alone."""
    check_floats("[...]", logps=logps, old_logps=old_logps, advantages=advantages)
    check_finite(logps=logps, old_logps=old_logps, advantages=advantages)
    return (logps - old_logps.detach()).exp()


def _log_ratios(logps: Tensor, ref_logps: Tensor) -> Tensor:
    check_floats("[...]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    return logps - ref_logps


def _check_groups(rewards: Tensor) -> None:
    check_floats("[B, K]", rewards=rewards)
    check_finite(rewards=rewards)
    if rewards.shape[1] < 2:
        raise ValueError(f"rewards: got {rewards.shape[1]} sample a row, takes >= 2")


def __dir__() -> list[str]:
    return __all__

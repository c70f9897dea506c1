r"""Gradients of an expected reward from samples: surrogate losses, baselines, GAE, KL estimators.

Pure tensors. A surrogate is a function whose gradient is the estimator and whose value means
little; each leaves the reduction to its caller, who takes a mean over samples (and, for tokens, a
masked one). Advantages, returns and old log-probabilities are data: no gradient flows into them.

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
    check_count,
    check_finite,
    check_floats,
    check_fraction,
    check_logps,
    check_normalised,
    check_number,
    check_positive,
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
    ratios, weights = _ratios(logps, old_logps, advantages)
    clipped = ratios.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.maximum(-ratios * weights, -clipped * weights)


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

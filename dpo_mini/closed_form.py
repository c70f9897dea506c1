r"""Exact answers on enumerated tables: log Z, $\pi^*$, implied rewards, KL, J and the frontier.

A table has one row per prompt and one column per completion, `[X, Y]`: a tensor, a numpy array or
nested lists. Where two floating dtypes meet, the smaller is cast up; lists are float64 unless a
tensor or an array stands beside them. Every function keeps the device and is differentiable, in
beta too where that is a tensor of no dimension. Log-probabilities and KL are in nats, beta in
reward units per nat.

In float32 a result is as accurate as its rounded inputs allow: the KL of two near policies is never
negative and keeps its digits. Half precision is computed in float32 and rounded once, at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_mini._arguments import (
    Table,
    as_floats,
    check_count,
    check_finite,
    check_logps,
    check_normalised,
    check_number,
    positive_scalar,
    values_visible,
)
from dpo_mini._numerics import (
    chi_squared_terms,
    common_dtype,
    dtype_of_input,
    expm1,
    kl_terms,
    log_mean_exp,
    normalise,
    probability_gaps,
    sum_in_blocks,
    value_zero,
    widen,
)

__all__ = [
    "tilt",
    "log_partition",
    "optimal_logps",
    "f_optimal_logps",
    "implied_rewards",
    "kl",
    "expected_reward",
    "objective",
    "frontier",
    "best_of_n_logps",
    "total_variation",
    "chi_squared",
    "log_partition_markov",
]

_LogRatios: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_PARTS, _SECTIONS = 8, 22  # the search cuts an interval in 8, 22 times: 66 halvings
_NEWTON_STEPS = 4  # to 15 digits from where they start


def tilt(prior_logps: Table, log_weights: Table) -> tuple[Tensor, Tensor]:
    r"""A prior times weights, normalised: $\log p(y) + w(y) - \log Z$, and $\log Z$.

    It maximises $E_q[w] - KL(q\|p)$ over all q, and the maximum is $\log Z = \log\sum_y
    p(y)\,e^{w(y)}$. With $w = r/\beta$ that is $\pi^*$; with w a log-likelihood it is Bayes'
    posterior, and Z the evidence.

    Args:
      prior_logps: `[X, Y]`, nats; each row's probabilities sum to 1.
      log_weights: `[X, Y]`, w, nats; -inf is a weight of 0 and excludes its y.
    Returns:
      `(logps [X, Y], log_z [X])`, nats.
    Raises:
      ValueError: shapes differ; a dtype that is not floating; NaN, +inf or unnormalised
        log-probabilities; a weight that is NaN or +inf; a row whose weights leave the prior no
        mass.
    Source: the Gibbs variational principle: Donsker & Varadhan 1975.
    """
    prior, weights = _read({"prior_logps": prior_logps}, log_weights=log_weights)
    if values_visible(weights):
        bad = torch.isnan(weights) | torch.isposinf(weights)
        if bad.any():
            got = weights[bad][0].item()
            raise ValueError(f"`log_weights` must have finite values or -inf, got {got}")
        if torch.isneginf(prior + weights).all(-1).any():
            raise ValueError(
                "`log_weights` must have a finite value where the prior has mass, got a row of "
                "-inf there"
            )
    return _tilted(prior, weights), log_mean_exp(prior, weights)


def log_partition(ref_logps: Table, rewards: Table, beta: float | Tensor) -> Tensor:
    r"""$\log Z(x) = \log \sum_y \pi_{ref}(y|x)\, e^{r(x,y)/\beta}$.

    Args:
      ref_logps: `[X, Y]`, log pi_ref(y|x), nats; each row's probabilities sum to 1.
      rewards: `[X, Y]`, finite.
      beta: > 0, weight of the KL term, reward units per nat.
    Returns:
      `[X]`, nats.
    Raises:
      ValueError: `beta <= 0`; shapes differ; a dtype that is not floating; NaN, +inf or
        unnormalised log-probabilities; a reward that is not finite; a beta so small that log Z is
        beyond the largest number of its dtype.
    Source: Rafailov et al. 2023, below Eq. 4, arXiv:2305.18290.
    """
    reference, scores = _read({"ref_logps": ref_logps}, rewards=rewards)
    check_finite(rewards=scores)
    log_z = log_mean_exp(reference, scores / positive_scalar("beta", beta, scores.dtype))
    _check_log_z(log_z, common_dtype(ref_logps, rewards))
    return log_z


def optimal_logps(ref_logps: Table, rewards: Table, beta: float | Tensor) -> Tensor:
    r"""$\log\pi^*(y|x) = \log\pi_{ref}(y|x) + r(x,y)/\beta - \log Z(x)$.

    Args and errors are those of `log_partition`, but no beta is too small: as beta goes to 0, all
    mass goes to the best answer of the reference's support.

    Returns:
      `[X, Y]`, nats.
    Source: Rafailov et al. 2023, Eq. 4, arXiv:2305.18290.
    """
    reference, scores = _read({"ref_logps": ref_logps}, rewards=rewards)
    check_finite(rewards=scores)
    return _optimal_logps(reference, scores, positive_scalar("beta", beta, scores.dtype))


def f_optimal_logps(
    ref_logps: Table,
    rewards: Table,
    beta: float | Tensor,
    *,
    divergence: str,
    alpha: float = 0.5,
) -> Tensor:
    r"""The policy that maximises $E[r] - \beta D_f(\pi\Vert\pi_{ref})$.

    With $D_f = \sum_y \pi_{ref} f(z)$ and $z = \pi/\pi_{ref}$ every answer of the optimum has
    $r = \beta f'(z) + \lambda$, with one $\lambda$ per prompt, so that $\pi = \pi_{ref}
    (f')^{-1}((r - \lambda)/\beta)$. Where $f'(0)$ is finite an answer may be given up: its
    probability is 0, and $r \le \beta f'(0) + \lambda$. In `losses.f_dpo_loss` are

    - `"reverse_kl"`: $f' = \log z$, which is `optimal_logps`;
    - `"forward_kl"`: $f' = 1 - 1/z$;
    - `"js"`: $f' = \log[2z/(1+z)]$;
    - `"alpha"`: $f' = (z^{\alpha-1} - 1)/(\alpha-1)$, which gives answers up for alpha > 1;

    and besides these

    - `"chi_squared"`: $f = (z-1)^2$, the divergence as `chi_squared` has it; it gives answers up.
      It is alpha = 2 with twice the beta;
    - `"chi_squared_kl"`: $f = \frac12(z-1)^2 + z\log z$, half of chi-squared plus KL, the penalty
      of `losses.chi_po_loss`. It gives no answer up.

    The log-ratio of the best answer is found by sections, between 0 and where that answer alone has
    probability 1. It is computed in float64, whatever the dtype of the tables.

    Args:
      ref_logps: `[X, Y]`, nats.
      rewards: `[X, Y]`, finite.
      beta: > 0, reward units per unit of the divergence.
      divergence: one of the six names.
      alpha: finite, used by `"alpha"` alone.
    Returns:
      `[X, Y]`, nats; -inf for an answer given up.
    Raises:
      ValueError: another name; a best answer whose log-probability is below -700 nats, or below
        -700 / |alpha - 1|; otherwise as in `log_partition`, but no beta is too small.
    Source: Wang et al. 2023, arXiv:2309.16240; Huang et al. 2024, arXiv:2407.13399.
    """
    check_number("alpha", alpha)
    exponents = {"forward_kl": -1.0, "alpha": alpha - 1.0, "chi_squared": 1.0}
    if divergence not in ("reverse_kl", "js", "chi_squared_kl", *exponents):
        names = "'reverse_kl', 'forward_kl', 'js', 'alpha', 'chi_squared' or 'chi_squared_kl'"
        raise ValueError(f"`divergence` must be {names}, got {divergence!r}")
    reference, scores = _read({"ref_logps": ref_logps}, rewards=rewards)
    check_finite(rewards=scores)
    scale = positive_scalar("beta", beta, scores.dtype)
    exponent = exponents.get(divergence)
    if divergence == "reverse_kl" or exponent == 0:
        return _optimal_logps(reference, scores, scale)
    if divergence == "chi_squared":
        scale = 2 * scale
    prior = reference.double()
    gaps = (_below_the_best(prior, scores.double()) / scale.double()).clamp(min=-1e300)
    logratios: _LogRatios = _of_js if divergence == "js" else _of_chi_squared_kl
    if exponent is not None:
        logratios = partial(_of_power, exponent=exponent)
    level = _level(prior, gaps, logratios, -700 / max(1.0, abs(exponent or 1.0)))
    return normalise(prior + logratios(level, gaps)[0])[0].to(scores.dtype)


# Each of the next three takes the log-ratio `level` `[..., 1]` of the best answer and how far each
# answer's f' is below that of the best, `gaps` `[..., Y]`. They return the log-ratios u of all
# answers, `[..., Y]`, and the slopes du / d level.


def _of_power(level: Tensor, gaps: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """For f' = (z^k - 1) / k: z^k is that of the best plus k times the gap."""
    less_1 = torch.expm1(exponent * level) + exponent * gaps
    power = (exponent * level).exp() + exponent * gaps
    near = less_1 > -0.5
    given_up = ~near & (power <= 0)
    # Near 1 log1p has more digits than log, and far from it exp has more than expm1 + 1.
    far = power.masked_fill(near | given_up, 1.0).log()
    u = torch.where(near, less_1.masked_fill(~near, 0.0).log1p(), far) / exponent
    slopes = (exponent * (level - u)).exp()
    return u.masked_fill(given_up, -torch.inf), slopes.masked_fill(given_up, 0.0)


def _of_js(level: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """For f' = log[2z / (1 + z)]: z / (1 + z) is that of the best times e^gap."""
    u = level + gaps - torch.log1p(-level.exp() * torch.expm1(gaps))
    return u, (logsigmoid(-level) - logsigmoid(-u)).exp()


def _of_chi_squared_kl(level: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
    """For f' = z - 1 + log z: Newton's method for e^u - 1 + u, which is convex."""
    want = torch.expm1(level) + level + gaps
    fixed = want.detach()
    u = torch.where(fixed < 0, fixed, fixed.clamp(min=0).log1p())
    for _ in range(_NEWTON_STEPS):
        u = u - (torch.expm1(u) + u - fixed) / (u.exp() + 1)
    slope = u.exp() + 1
    for _ in range(2):  # of the root itself, which pass on its first two derivatives
        u = u - (torch.expm1(u) + u - want) / slope
    return u, (level.exp() + 1) / slope


def _level(prior: Tensor, gaps: Tensor, logratios: _LogRatios, least: float) -> Tensor:
    """The log-ratio `[X, 1]` of the best answer at which all probabilities sum to 1.

    `least` is the smallest log-probability of a best answer whose powers are numbers.
    """
    fixed_prior, fixed_gaps = prior.detach(), gaps.detach()
    best = fixed_prior.masked_fill(fixed_gaps < 0, -torch.inf).amax(-1, keepdim=True)
    if values_visible(best) and (best < least).any():
        got = f"{best.min().item():g}"
        raise ValueError(f"`ref_logps` must be >= {least:g} for the best answer, got {got}")
    low, width = torch.zeros_like(best), -best
    inner = torch.arange(1, _PARTS, dtype=best.dtype, device=best.device) / _PARTS
    for _ in range(_SECTIONS):
        levels = low + width * inner  # [X, _PARTS - 1], where the interval is cut
        u = logratios(levels.unsqueeze(-1), fixed_gaps.unsqueeze(1))[0]
        too_little = (fixed_prior.unsqueeze(1) + u).logsumexp(-1) < 0
        width = width / _PARTS
        low = low + width * too_little.sum(-1, keepdim=True)
    level = low + width / 2
    u, slopes = logratios(level, fixed_gaps)
    slope = ((fixed_prior + u).softmax(-1) * slopes).sum(-1, keepdim=True)
    for _ in range(2):  # of the root itself, which pass on its first two derivatives
        level = level - (prior + logratios(level, gaps)[0]).logsumexp(-1, True) / slope
    return level


def implied_rewards(logps: Table, ref_logps: Table, beta: float | Tensor) -> Tensor:
    r"""$\hat r(x,y) = \beta \log[\pi(y|x) / \pi_{ref}(y|x)]$: the reward up to $\beta\log Z(x)$.

    Args:
      logps: `[X, Y]`, nats; -inf (a completion given up) gives -inf.
      ref_logps: `[X, Y]`, nats, finite: outside the reference's support nothing is implied.
      beta: > 0, reward units per nat.
    Returns:
      `[X, Y]`, reward units.
    Raises:
      ValueError: `beta <= 0`; shapes differ; a dtype that is not floating; NaN or +inf; a
        `ref_logps` of -inf.
    Source: Rafailov et al. 2023, Eq. 5 without its beta log Z, arXiv:2305.18290.
    """
    tables = {"logps": logps, "ref_logps": ref_logps}
    policy, reference = as_floats("[X, Y]", tables, cast_up=True)
    check_logps(logps=policy)
    check_finite(ref_logps=reference)
    logratios = widen(policy) - widen(reference)
    return positive_scalar("beta", beta, logratios.dtype) * logratios


def kl(logps: Table, other_logps: Table) -> Tensor:
    r"""$KL(\pi\|\rho) = \sum_y \pi(y|x)\,[\log\pi(y|x) - \log\rho(y|x)]$.

    Args:
      logps: `[X, Y]`, log pi, nats; a probability of 0 contributes 0.
      other_logps: `[X, Y]`, log rho, nats.
    Returns:
      `[X]`, nats, >= 0, exactly 0 for equal tables; +inf where pi has mass that rho lacks.
    Raises:
      ValueError: shapes differ; a dtype that is not floating; NaN, +inf or unnormalised
        log-probabilities.
    """
    return _kl(*_read({"logps": logps, "other_logps": other_logps}))


def expected_reward(logps: Table, rewards: Table) -> Tensor:
    r"""$E_{y\sim\pi}[r(x,y)]$.

    Args:
      logps: `[X, Y]`, log pi, nats.
      rewards: `[X, Y]`, finite.
    Returns:
      `[X]`, reward units.
    Raises:
      ValueError: as in `log_partition`.
    """
    policy, scores = _read({"logps": logps}, rewards=rewards)
    check_finite(rewards=scores)
    return (policy.exp() * scores).sum(-1)


def objective(logps: Table, ref_logps: Table, rewards: Table, beta: float | Tensor) -> Tensor:
    r"""$J(\pi) = E_{y\sim\pi}[r(x,y)] - \beta\,KL(\pi\|\pi_{ref})$.

    Args:
      logps, ref_logps: `[X, Y]`, nats.
      rewards: `[X, Y]`, finite.
      beta: > 0, reward units per nat.
    Returns:
      `[X]`, reward units.
    Raises:
      ValueError: as in `log_partition`.
    Source: Rafailov et al. 2023, Eq. 3, arXiv:2305.18290.
    """
    tables = {"logps": logps, "ref_logps": ref_logps}
    policy, reference, scores = _read(tables, rewards=rewards)
    check_finite(rewards=scores)
    penalty = positive_scalar("beta", beta, scores.dtype) * _kl(policy, reference)
    return (policy.exp() * scores).sum(-1) - penalty


def frontier(
    ref_logps: Table, rewards: Table, betas: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    r"""The exact reward-KL frontier: where $\pi^*$ lies for each beta; no policy lies above it.

    Args:
      ref_logps, rewards: `[X, Y]`; `betas`: n numbers > 0.
    Returns:
      `(kls [n], rewards [n])`: means over prompts, in nats and in reward units.
    Raises:
      ValueError: `betas` is empty, or as in `log_partition`.
    """
    reference, scores = _read({"ref_logps": ref_logps}, rewards=rewards)
    check_finite(rewards=scores)
    try:
        each = [positive_scalar("betas", beta, scores.dtype) for beta in betas]
    except TypeError:
        kind = type(betas).__name__
        raise TypeError(f"`betas` must be a sequence of numbers > 0, got {kind}") from None
    if not each:
        raise ValueError("`betas` must have at least one number > 0, got none")
    points = [_frontier_point(reference, scores, beta) for beta in each]
    kls, values = (torch.stack(numbers) for numbers in zip(*points, strict=True))
    return kls, values


def best_of_n_logps(ref_logps: Table, rewards: Table, n: int) -> Tensor:
    r"""log-probabilities of the best of n independent draws from the reference, by its reward.

    With F(r) the chance of a reward of at most r and F(r-) of one below it, a reward wins with
    probability $F(r)^n - F(r-)^n$. Equal rewards share it as the reference does.

    Args:
      ref_logps: `[X, Y]`, nats.
      rewards: `[X, Y]`, finite; what the draws are ranked by.
      n: >= 1, draws.
    Returns:
      `[X, Y]`, nats; n = 1 gives the reference.
    Raises:
      ValueError: `n < 1`; otherwise as in `log_partition`.
    Source: Gao et al. 2022, arXiv:2210.10760; Beirami et al. 2024, arXiv:2401.01879.
    """
    check_count("n", n)
    reference, scores = _read({"ref_logps": ref_logps}, rewards=rewards)
    check_finite(rewards=scores)
    ranked, order = scores.contiguous().sort(-1)
    first = torch.searchsorted(ranked, scores.contiguous())  # [X, Y]: one number per group of ties
    last = torch.searchsorted(ranked, scores.contiguous(), right=True) - 1
    probs = reference.exp()
    mass = torch.zeros_like(probs).scatter_add(-1, first, probs).gather(-1, first)
    ordered = F.pad(probs.gather(-1, order), (1, 1))  # [X, Y + 2], with a 0 at both ends
    below = ordered.cumsum(-1).gather(-1, first)  # F(r-)
    above = ordered.flip(-1).cumsum(-1).flip(-1).gather(-1, last + 2)  # 1 - F(r)
    at_most = (below + mass).clamp(min=torch.finfo(mass.dtype).tiny)  # F(r)
    log_at_most = reference.gather(-1, order).logcumsumexp(-1).gather(-1, last)
    rare = above < 0.5  # F(r) close to 1 has lost the digits that 1 - F(r) still has
    log_at_most = torch.where(rare, torch.log1p(-above.masked_fill(~rare, 0.0)), log_at_most)
    bonus = _log_win_bonus(mass / at_most, below / at_most, n)
    return normalise(reference + (n - 1) * log_at_most + bonus)[0]


def _log_win_bonus(share: Tensor, rest: Tensor, n: int) -> Tensor:
    """log of [F(r)^n - F(r-)^n] / [n m F(r)^(n-1)] for a group of ties with mass m.

    Args:
      share: m / F(r); rest: F(r-) / F(r), which is 1 - share.
      n: draws.
    """
    # It is (1 - rest^n) / (n share), close to 1 where n draws hardly ever meet the group twice. A
    # series keeps its digits there. The fills keep the other branch from a gradient of 0 * inf.
    seldom, common, alone = n * share < 1e-4, share > 0.5, rest == 0
    x = share.masked_fill(~seldom, 0.0)
    series = torch.log1p((n - 1) * x * ((n - 2) * x / 3 - 1) / 2)
    log_rest = torch.where(
        common,
        rest.masked_fill(alone | ~common, 1.0).log(),
        torch.log1p(-share.masked_fill(common, 0.0)),
    )
    lost = (n * log_rest.masked_fill(seldom | alone, -1.0)).masked_fill(alone, -torch.inf)
    won = -expm1(lost)
    return torch.where(seldom, series, (won / (n * share.masked_fill(seldom, 1.0))).log())


def total_variation(logps: Table, other_logps: Table) -> Tensor:
    r"""$TV(\pi,\rho) = \tfrac12\sum_y|\pi(y|x) - \rho(y|x)|$, `[X]` in 0..1; errors as in `kl`."""
    tables = _read({"logps": logps, "other_logps": other_logps})
    return 0.5 * _sum_of_terms(probability_gaps, *tables)


def chi_squared(logps: Table, other_logps: Table) -> Tensor:
    r"""$\chi^2(\pi\|\rho) = \sum_y \pi(y|x)^2/\rho(y|x) - 1$.

    The variance of the importance weight pi/rho under rho: it decides how many samples from rho an
    estimate of Z needs.

    Args and errors are those of `kl`.

    Returns:
      `[X]`, >= 0, exactly 0 for equal tables; +inf where pi has mass that rho lacks.
    """
    policy, other = _read({"logps": logps, "other_logps": other_logps})
    terms = _sum_of_terms(chi_squared_terms, policy, other)
    terms = terms + value_zero((2 * policy.exp() - other.exp()).sum(-1))
    return terms.masked_fill(_lacks_support(policy, other), torch.inf)


def log_partition_markov(
    initial_logps: Table,
    transition_logps: Table,
    token_rewards: Table,
    beta: float | Tensor,
    n_tokens: int,
) -> Tensor:
    r"""log Z by backward recursion where the reference is a Markov chain and the reward a sum.

    With $r(y) = \sum_t c(y_t)$ the sum over $V^T$ completions factorises from the right:
    $B_t(v) = c(v)/\beta + \log\sum_w P(w|v)\,e^{B_{t+1}(w)}$, in $T V^2$ steps.

    Args:
      initial_logps: `[V]`, log-probability of the first token, nats.
      transition_logps: `[V, V]`, row v: log-probability of the next token after v, nats.
      token_rewards: `[V]`, c(v), reward units.
      beta: > 0, reward units per nat.
      n_tokens: T >= 1.
    Returns:
      `[]`, nats.
    Raises:
      ValueError: `beta <= 0`, `n_tokens < 1`, shapes or devices differ, a row is not normalised, a
        reward is not finite, or log Z is beyond the largest number of its dtype.
    """
    check_count("n_tokens", n_tokens)
    initial, rewards = _read({"initial_logps": initial_logps}, "[V]", token_rewards=token_rewards)
    check_finite(token_rewards=rewards)
    (transitions,) = as_floats("[V, V]", {"transition_logps": transition_logps})
    vocab_size = len(initial)
    if transitions.shape != (vocab_size, vocab_size):
        got = list(transitions.shape)
        want = [vocab_size, vocab_size]
        raise ValueError(f"`transition_logps` must have shape {want}, got {got}")
    (transitions,) = _read({"transition_logps": transition_logps}, "[V, V]")
    dtype = torch.promote_types(initial.dtype, transitions.dtype)
    initial, transitions, rewards = (t.to(dtype) for t in (initial, transitions, rewards))
    weights = rewards / positive_scalar("beta", beta, dtype)
    backward = weights
    for _ in range(n_tokens - 1):
        backward = weights + log_mean_exp(transitions, backward.expand_as(transitions))
    log_z = log_mean_exp(initial, backward)
    _check_log_z(log_z, common_dtype(initial_logps, transition_logps, token_rewards))
    return log_z


def _optimal_logps(ref_logps: Tensor, rewards: Tensor, beta: Tensor) -> Tensor:
    # The best reward comes off first: r / beta may overflow, (r - best) / beta only to -inf.
    return _tilted(ref_logps, _below_the_best(ref_logps, rewards) / beta)


def _tilted(prior_logps: Tensor, weights: Tensor) -> Tensor:
    """log of the prior times e^w, normalised."""
    return normalise(prior_logps + _below_the_best(prior_logps, weights))[0]


def _below_the_best(prior_logps: Tensor, values: Tensor) -> Tensor:
    """How far each value is below the best of the prior's support; 0 where the prior is 0.

    A constant of the prompt changes no optimum, so the best one takes no gradient.
    """
    impossible = torch.isneginf(prior_logps)
    best = values.detach().masked_fill(impossible, -torch.inf).amax(-1, keepdim=True)
    return (values - best).masked_fill(impossible, 0.0)


def _frontier_point(ref_logps: Tensor, rewards: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """KL and reward of the optimum, means over prompts."""
    optimum = _optimal_logps(ref_logps, rewards, beta)
    # log(pi*/pi_ref) from the rewards: the difference of the two tables loses it for a large beta.
    # They are counted from that of the optimum's likeliest answer, whose own ratio is close to 1.
    likeliest = rewards.gather(-1, optimum.argmax(-1, keepdim=True)).detach()
    weights = (rewards - likeliest).masked_fill(torch.isneginf(ref_logps), 0.0) / beta
    gaps = weights - log_mean_exp(ref_logps, weights).unsqueeze(-1)
    u = torch.where(gaps.abs().amax(-1, keepdim=True) < 0.5, gaps, optimum - ref_logps)

    def kl_of(optimum: Tensor, ref_logps: Tensor, u: Tensor) -> Tensor:
        outside = torch.isneginf(optimum)
        tables = (table.masked_fill(outside, 0.0) for table in (optimum, ref_logps, u))
        return torch.where(outside, ref_logps.exp(), kl_terms(*tables)).sum(-1)

    probs = optimum.exp()
    kls = sum_in_blocks(kl_of, optimum, ref_logps, u)
    kls = kls + value_zero((probs - ref_logps.exp()).sum(-1))
    return kls.mean(), (probs * rewards).sum(-1).mean()


def _kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    # Both rows sum to 1 but for rounding, so the difference of their sums counts as 0. Its gradient
    # counts, so that the gradient is that of the definition.
    terms = _sum_of_terms(kl_terms, logps, other_logps)
    terms = terms + value_zero((logps.exp() - other_logps.exp()).sum(-1))
    return terms.masked_fill(_lacks_support(logps, other_logps), torch.inf)


def _sum_of_terms(
    formula: Callable[[Tensor, Tensor, Tensor], Tensor], logps: Tensor, other_logps: Tensor
) -> Tensor:
    """The sum of a formula of p and q that is p + q where one of them is 0."""

    def sum_of(logps: Tensor, other_logps: Tensor) -> Tensor:
        outside = torch.isneginf(logps) | torch.isneginf(other_logps)
        tables = (logps, other_logps, logps - other_logps)
        inside = formula(*(table.masked_fill(outside, 0.0) for table in tables))
        return torch.where(outside, torch.maximum(logps, other_logps).exp(), inside).sum(-1)

    return sum_in_blocks(sum_of, logps, other_logps)


def _lacks_support(logps: Tensor, other_logps: Tensor) -> Tensor:
    """`[X]`, true where the first policy has mass that the other lacks."""
    return (torch.isneginf(other_logps) & ~torch.isneginf(logps)).any(-1)


def _read(logps: Mapping[str, Table], shape: str = "[X, Y]", **numbers: Table) -> list[Tensor]:
    """Tables to compute with: of one dtype, at least float32; those of `logps` are normalised."""
    tables = as_floats(shape, {**logps, **numbers}, cast_up=True)
    for name, table in logps.items():
        (alone,) = as_floats(shape, {name: table})  # its own dtype says how it was rounded
        check_logps(**{name: alone})
        check_normalised(**{name: alone})
    return [widen(table) for table in tables]


def _check_log_z(log_z: Tensor, dtype: torch.dtype | None) -> None:
    dtype = dtype or log_z.dtype
    if values_visible(log_z) and not (log_z.abs() <= torch.finfo(dtype).max).all():
        raise ValueError(
            f"`beta` must be large enough for log Z to be a finite number in {dtype}, got a beta "
            "for which rewards / beta overflows"
        )


for _name in __all__:
    globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

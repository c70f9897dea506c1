r"""Exact answers on enumerated tables: log Z, $\pi^*$, implied rewards, KL, J and the frontier.

A table has one row a prompt and one column a completion, `[X, Y]`. Every function keeps dtype and
device and is differentiable. Log-probabilities and KL are in nats, beta in reward units per nat.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_mini.arguments import (
    check_alike,
    check_count,
    check_finite,
    check_floats,
    check_logps,
    check_normalised,
    check_positive,
)

__all__ = [
    "tilt",
    "log_partition",
    "optimal_logps",
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


def tilt(prior_logps: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""A prior times weights, normalised: $\log p(y) + w(y) - \log Z$, and $\log Z$.

    What maximises $E_q[w] - KL(q\|p)$ over all q, where the maximum is $\log Z = \log\sum_y
    p(y)\,e^{w(y)}$. With $w = r/\beta$ that is $\pi^*$; with w a log-likelihood it is Bayes'
    posterior, and Z the evidence.

    Args:
      prior_logps: `[X, Y]`, nats; each row's probabilities sum to 1.
      log_weights: `[X, Y]`, w, nats; -inf is a weight of 0 and excludes its y.
    Returns:
      `(logps [X, Y], log_z [X])`, nats.
    Raises:
      ValueError: shapes or dtypes differ; NaN, +inf or unnormalised log-probabilities; a weight
        that is NaN or +inf; a row whose weights leave the prior no mass.
    Source: the Gibbs variational principle: Donsker & Varadhan 1975.
    """
    check_floats("[X, Y]", prior_logps=prior_logps, log_weights=log_weights)
    _check_tables(prior_logps=prior_logps)
    bad = torch.isnan(log_weights) | torch.isposinf(log_weights)
    if bad.any():
        got = log_weights[bad][0].item()
        raise ValueError(f"log_weights: got {got}, takes finite values or -inf")
    joint = prior_logps + log_weights
    if torch.isneginf(joint).all(-1).any():
        raise ValueError(
            "log_weights: got a row of -inf wherever the prior has mass, takes one finite weight "
            "there"
        )
    return _normalise(joint)


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    r"""$\log Z(x) = \log \sum_y \pi_{ref}(y|x)\, e^{r(x,y)/\beta}$.

    Args:
      ref_logps: `[X, Y]`, log pi_ref(y|x), nats; each row's probabilities sum to 1.
      rewards: `[X, Y]`, finite.
      beta: > 0, weight of the KL term, reward units per nat.
    Returns:
      `[X]`, nats.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; NaN, +inf or unnormalised log-probabilities;
        a reward that is not finite.
    Source: Rafailov et al. 2023, below Eq. 4, arXiv:2305.18290.
    """
    return _tilt_by_rewards(ref_logps, rewards, beta)[1]


def optimal_logps(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    r"""$\log\pi^*(y|x) = \log\pi_{ref}(y|x) + r(x,y)/\beta - \log Z(x)$.

    Args and errors are those of `log_partition`.

    Returns:
      `[X, Y]`, nats.
    Source: Rafailov et al. 2023, Eq. 4, arXiv:2305.18290.
    """
    return _tilt_by_rewards(ref_logps, rewards, beta)[0]


def implied_rewards(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    r"""$\hat r(x,y) = \beta \log[\pi(y|x) / \pi_{ref}(y|x)]$: the reward up to $\beta\log Z(x)$.

    Args:
      logps: `[X, Y]`, nats; -inf (a completion given up) gives -inf.
      ref_logps: `[X, Y]`, nats, finite: outside the reference's support nothing is implied.
      beta: > 0, reward units per nat.
    Returns:
      `[X, Y]`, reward units.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; NaN or +inf; a `ref_logps` of -inf.
    Source: Rafailov et al. 2023, Eq. 5 without its beta log Z, arXiv:2305.18290.
    """
    check_positive("beta", beta)
    check_floats("[X, Y]", logps=logps, ref_logps=ref_logps)
    check_logps(logps=logps)
    check_finite(ref_logps=ref_logps)
    return beta * (logps - ref_logps)


def kl(logps: Tensor, other_logps: Tensor) -> Tensor:
    r"""$KL(\pi\|\rho) = \sum_y \pi(y|x)\,[\log\pi(y|x) - \log\rho(y|x)]$.

    Args:
      logps: `[X, Y]`, log pi, nats; a probability of 0 contributes 0.
      other_logps: `[X, Y]`, log rho, nats.
    Returns:
      `[X]`, nats; +inf where pi has mass that rho lacks.
    Raises:
      ValueError: shapes or dtypes differ; NaN, +inf or unnormalised log-probabilities.
    """
    _check_tables(logps=logps, other_logps=other_logps)
    impossible = torch.isneginf(logps)
    lacking = torch.isneginf(other_logps) & ~impossible  # pi has mass here, rho has none
    # Infinities become 0 before they are multiplied: 0 * inf is NaN, also in gradients.
    finite_logps = logps.masked_fill(impossible, 0.0)
    finite_others = other_logps.masked_fill(impossible | lacking, 0.0)
    finite = (logps.exp() * (finite_logps - finite_others)).sum(-1)
    return finite.masked_fill(lacking.any(-1), torch.inf)


def expected_reward(logps: Tensor, rewards: Tensor) -> Tensor:
    r"""$E_{y\sim\pi}[r(x,y)]$.

    Args:
      logps: `[X, Y]`, log pi, nats.
      rewards: `[X, Y]`, finite.
    Returns:
      `[X]`, reward units.
    Raises:
      ValueError: as in `log_partition`.
    """
    check_floats("[X, Y]", logps=logps, rewards=rewards)
    _check_tables(logps=logps)
    check_finite(rewards=rewards)
    return (logps.exp() * rewards).sum(-1)


def objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
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
    check_positive("beta", beta)
    _check_tables(logps=logps, ref_logps=ref_logps)
    return expected_reward(logps, rewards) - beta * kl(logps, ref_logps)


def frontier(ref_logps: Tensor, rewards: Tensor, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    r"""The exact reward-KL frontier: where $\pi^*$ lies for each beta; no policy lies above it.

    Args:
      ref_logps, rewards: `[X, Y]`; `betas`: n numbers > 0.
    Returns:
      `(kls [n], rewards [n])`: means over prompts, in nats and in reward units.
    Raises:
      ValueError: `betas` is empty, or as in `log_partition`.
    """
    try:
        values = [float(beta) for beta in betas]
    except TypeError:
        kind = type(betas).__name__
        raise TypeError(f"betas: got {kind}, takes a sequence of numbers > 0") from None
    if not values:
        raise ValueError("betas: got none, takes at least one number > 0")
    optima = [optimal_logps(ref_logps, rewards, beta) for beta in values]
    kls = torch.stack([kl(optimum, ref_logps).mean() for optimum in optima])
    return kls, torch.stack([expected_reward(optimum, rewards).mean() for optimum in optima])


def best_of_n_logps(ref_logps: Tensor, rewards: Tensor, n: int) -> Tensor:
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
    check_floats("[X, Y]", ref_logps=ref_logps, rewards=rewards)
    _check_tables(ref_logps=ref_logps)
    check_finite(rewards=rewards)
    ranked, order = rewards.contiguous().sort(-1)
    probs = ref_logps.exp()
    tie = torch.searchsorted(ranked, rewards.contiguous())  # [X, Y]: one number a group of equals
    mass = torch.zeros_like(probs).scatter_add(-1, tie, probs).gather(-1, tie)
    cdf = probs.gather(-1, order).cumsum(-1)
    last = torch.searchsorted(ranked, rewards.contiguous(), right=True) - 1
    at_most = torch.maximum(cdf.gather(-1, last), mass)
    possible = mass > 0
    mass, at_most = mass.masked_fill(~possible, 1.0), at_most.masked_fill(~possible, 1.0)
    # F(r)^n - F(r-)^n loses every digit where the group's mass is small; expm1 does not. Where the
    # mass is all of F(r), nothing is below: the share is F(r)^n, and log1p(-1) has no gradient.
    lowest = mass == at_most
    below = n * torch.log1p(-(mass / at_most).masked_fill(lowest, 0.5))  # n log[F(r-) / F(r)]
    share = n * at_most.log() + (-torch.expm1(below)).masked_fill(lowest, 1.0).log()
    return (ref_logps + share - mass.log()).log_softmax(-1)


def total_variation(logps: Tensor, other_logps: Tensor) -> Tensor:
    r"""$TV(\pi,\rho) = \tfrac12\sum_y|\pi(y|x) - \rho(y|x)|$, `[X]` in 0..1; errors as in `kl`."""
    _check_tables(logps=logps, other_logps=other_logps)
    return 0.5 * (logps.exp() - other_logps.exp()).abs().sum(-1)


def chi_squared(logps: Tensor, other_logps: Tensor) -> Tensor:
    r"""$\chi^2(\pi\|\rho) = \sum_y \pi(y|x)^2/\rho(y|x) - 1$.

    The variance of the importance weight pi/rho under rho: it decides how many samples from rho an
    estimate of Z needs.

    Args and errors are those of `kl`.

    Returns:
      `[X]`; +inf where pi has mass that rho lacks.
    """
    _check_tables(logps=logps, other_logps=other_logps)
    possible = ~torch.isneginf(logps)
    finite_others = other_logps.masked_fill(~possible, 0.0)
    return torch.expm1((2 * logps - finite_others).logsumexp(-1))


def log_partition_markov(
    initial_logps: Tensor,
    transition_logps: Tensor,
    token_rewards: Tensor,
    beta: float,
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
      ValueError: `beta <= 0`, `n_tokens < 1`, shapes or dtypes differ, a row is not normalised, a
        reward is not finite.
    """
    check_positive("beta", beta)
    check_count("n_tokens", n_tokens)
    check_floats("[V]", initial_logps=initial_logps, token_rewards=token_rewards)
    check_floats("[V, V]", transition_logps=transition_logps)
    check_alike("initial_logps", initial_logps, transition_logps=transition_logps)
    vocab_size = len(initial_logps)
    if transition_logps.shape != (vocab_size, vocab_size):
        got = list(transition_logps.shape)
        raise ValueError(f"transition_logps: got shape {got}, takes {[vocab_size, vocab_size]}")
    _check_values(initial_logps=initial_logps, transition_logps=transition_logps)
    check_finite(token_rewards=token_rewards)
    tilt = token_rewards / beta
    backward = tilt
    for _ in range(n_tokens - 1):
        backward = tilt + (transition_logps + backward).logsumexp(-1)
    return (initial_logps + backward).logsumexp(-1)


def _tilt_by_rewards(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`tilt` by r / beta, refusing in the words of its callers; tables are checked once."""
    check_positive("beta", beta)
    check_floats("[X, Y]", ref_logps=ref_logps, rewards=rewards)
    _check_tables(ref_logps=ref_logps)
    check_finite(rewards=rewards)
    return _normalise(ref_logps + rewards / beta)


def _normalise(joint: Tensor) -> tuple[Tensor, Tensor]:
    """log[p e^w] less log Z, `[X, Y]`, and log Z, `[X]`."""
    return joint.log_softmax(-1), joint.logsumexp(-1)


def _check_tables(**tables: Tensor) -> None:
    check_floats("[X, Y]", **tables)
    _check_values(**tables)


def _check_values(**tables: Tensor) -> None:
    check_logps(**tables)
    check_normalised(**tables)


def __dir__() -> list[str]:
    return __all__

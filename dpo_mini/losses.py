r"""Preference losses: log-probabilities of a batch in, one loss a row out.

Every loss is pure and leaves the reduction to its caller. In the formulas $d = a - b$ with
$a = \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)}$ and
$b = \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}$, where y_w is the chosen and y_l the rejected
completion of one prompt x. A loss whose arguments are `..._mean_logps` takes the log-probability of
a completion divided by its number of tokens.

On log-ratios of ten thousand nats no loss and no gradient is NaN or infinite, in float64, float32
and bfloat16. Where a formula is an exponential (`discopop_loss`, `f_dpo_loss` with forward KL or
alpha) its docstring says how. Half precision is computed in float32 and rounded once, at the end;
there a loss above the largest float16, 65,504, is that number.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_mini._arguments import (
    as_bool_mask,
    check_between,
    check_finite,
    check_floats,
    check_number,
    check_positive,
    values_visible,
)
from dpo_mini._numerics import (
    dtype_of_input,
    expm1,
    hold,
    kl_terms,
    ranking_terms,
    sigmoid,
    widen,
)

__all__ = [
    "dpo_loss",
    "cdpo_loss",
    "rdpo_loss",
    "ipo_loss",
    "ipo_mean_loss",
    "hinge_loss",
    "exo_loss",
    "discopop_loss",
    "f_dpo_loss",
    "nca_loss",
    "bco_loss",
    "sppo_loss",
    "apo_zero_loss",
    "apo_down_loss",
    "dpo_mean_loss",
    "simpo_loss",
    "cpo_loss",
    "orpo_loss",
    "kto_loss",
    "kto_reference_point",
    "dro_loss",
    "rebel_loss",
    "log_variance_loss",
    "plackett_luce_loss",
    "best_of_k_loss",
    "reward_model_loss",
]

# --- functions of the difference d -----------------------------------------------------------


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""DPO loss, one value per pair: $-\log\sigma(\beta d)$.

    Args:
      chosen_logps: `[B]`, log pi_theta(y_w|x) summed over completion tokens, nats.
      rejected_logps: `[B]`, log pi_theta(y_l|x), nats.
      ref_chosen_logps: `[B]`, log pi_ref(y_w|x), nats.
      ref_rejected_logps: `[B]`, log pi_ref(y_l|x), nats.
      beta: > 0, weight of the KL term, reward units per nat.
    Returns:
      `[B]`, nats per pair; reduce with `.mean()`.
    Raises:
      ValueError: `beta <= 0`; the four shapes, dtypes or devices differ; a value is not finite.
    Source: Rafailov et al. 2023, Eq. 7, arXiv:2305.18290.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = a - b
    # -log(sigmoid(beta * d)) overflows for beta * d < -100; logsigmoid does not.
    return -logsigmoid(beta * d)


def cdpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    r"""Conservative DPO: $-(1-e)\log\sigma(\beta d) - e\log\sigma(-\beta d)$.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
      label_smoothing: e in [0, 0.5), the probability given to the other answer.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: as `dpo_loss`, or `label_smoothing` outside [0, 0.5).
    Source: Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    check_positive("beta", beta)
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = a - b
    return -(1 - label_smoothing) * logsigmoid(beta * d) - label_smoothing * logsigmoid(-beta * d)


def rdpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    r"""Robust DPO: $[-(1-e)\log\sigma(\beta d) + e\log\sigma(-\beta d)]/(1-2e)$.

    Its mean over labels flipped with probability e is the DPO loss of the labels before the flip.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
      label_smoothing: e in [0, 0.5), the known probability that a label was flipped.
    Returns:
      `[B]`, nats per pair; unbounded below for e > 0.
    Raises:
      ValueError: as `dpo_loss`, or `label_smoothing` outside [0, 0.5).
    Source: Chowdhury et al. 2024, section 3.1, arXiv:2403.00409.
    """
    check_positive("beta", beta)
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = a - b
    kept = -(1 - label_smoothing) * logsigmoid(beta * d)
    return (kept + label_smoothing * logsigmoid(-beta * d)) / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""IPO on summed log-probabilities, as in the paper: $(d - \frac{1}{2\beta})^2$.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: as in `dpo_loss`.
      beta: > 0, the paper's tau; the target margin is 1 / (2 beta) nats.
    Returns:
      `[B]`, nats squared per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: Azar et al. 2023, Eq. 17, arXiv:2310.12036.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = a - b
    return (d - 1 / (2 * beta)) ** 2


def ipo_mean_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    ref_chosen_mean_logps: Tensor,
    ref_rejected_mean_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""IPO on means over tokens: $(a/n_w - b/n_l - \frac{1}{2\beta})^2$.

    Several libraries have it in the place of `ipo_loss`; with unequal lengths n_w and n_l it fits
    another target.

    Args:
      chosen_mean_logps: `[B]`, log pi_theta(y_w|x) divided by its number of tokens, nats a token.
      rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps: `[B]`, likewise.
      beta: > 0; the target margin is 1 / (2 beta) nats a token.
    Returns:
      `[B]`, squared nats a token, per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: `DPOTrainer` of Hugging Face TRL with `loss_type="ipo"`; compare arXiv:2310.12036.
    """
    check_positive("beta", beta)
    a, b = _mean_logratios(
        chosen_mean_logps, rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps
    )
    return (a - b - 1 / (2 * beta)) ** 2


def hinge_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Hinge on the margin: $\max(0, 1 - \beta d)$.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
    Returns:
      `[B]`, without unit, per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: Liu et al. 2023 (RSO), Eq. 10, arXiv:2309.06657: the hinge of Zhao et al.
      2023 (SLiC-HF), arXiv:2305.10425, with the reference.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    d = a - b
    return (1 - beta * d).relu()


def exo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    r"""EXO: $q[\log q - \log(1-e)] + (1-q)[\log(1-q) - \log e]$ with $q = \sigma(\beta d)$.

    The KL *from* the policy's preference to the label, where cDPO has the KL to it.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
      label_smoothing: e in (0, 0.5), the probability given to the other answer.
    Returns:
      `[B]`, nats per pair; 0 where q = 1 - e.
    Raises:
      ValueError: as `dpo_loss`, or `label_smoothing` outside (0, 0.5).
    Source: Ji et al. 2024, Eq. 16, arXiv:2402.00856.
    """
    check_positive("beta", beta)
    check_positive("label_smoothing", label_smoothing)
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    wins, loses = logsigmoid(beta * (a - b)), logsigmoid(beta * (b - a))  # log q, log(1 - q)
    right = torch.full_like(wins, math.log1p(-label_smoothing))
    wrong = torch.full_like(wins, math.log(label_smoothing))
    # A KL: as sums of terms >= 0, which near q = 1 - e keep the digits that the formula loses.
    return kl_terms(wins, right, wins - right) + kl_terms(loses, wrong, loses - wrong)


def discopop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    temperature: float = 0.05,
) -> Tensor:
    r"""DiscoPOP: $-(1-m)\log\sigma(L) + m e^{-L}$ with $L = \beta d$, $m = \sigma(L/\tau)$.

    A language model found it by search. It is not convex, and as it falls from L = 0 it has a dip
    and a bump.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
      temperature: tau > 0. For tau <= 1 the exponential is outweighed by m and the loss is finite
        everywhere; for tau > 1 it is held at its largest value (and slope) once
        $-L(1 - 1/\tau)$ is above 0.9 log(largest float): 639 in float64, 79 in float32.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: as `dpo_loss`, or `temperature <= 0`.
    Source: Lu et al. 2024, Eq. 5, arXiv:2406.08414.
    """
    check_positive("beta", beta)
    check_positive("temperature", temperature)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    margins = beta * (a - b)
    # m * exp(-L) is 0 * inf for L < -710; one exponential of log m - L is not.
    exponents = logsigmoid(margins / temperature) - margins
    exponential = hold(exponents).exp()
    return exponential - sigmoid(-margins / temperature) * logsigmoid(margins)


def f_dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    divergence: str,
    alpha: float = 0.5,
) -> Tensor:
    r"""DPO for another penalty: $-\log\sigma(\beta[f'(e^a) - f'(e^b)])$.

    The optimum of $E[r] - \beta D_f(\pi\Vert\pi_{ref})$ has $r = \beta f'(\pi/\pi_{ref})$ plus
    a constant of the prompt, which cancels in a pair. With $u = \log(\pi/\pi_{ref})$, $f'$ is

    - `"reverse_kl"`: $u$, which is DPO (its constant 1 cancels);
    - `"forward_kl"`: $1 - e^{-u}$;
    - `"js"`: $\log 2 + \log\sigma(u)$, the divergence as the paper scales it;
    - `"alpha"`: $(e^{(\alpha-1)u} - 1)/(\alpha-1)$: forward KL at alpha = 0, reverse KL at 1.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: as in `dpo_loss`.
      beta: > 0, weight of the divergence, reward units per nat.
      divergence: one of the four names.
      alpha: finite; used by `"alpha"` alone.
    Returns:
      `[B]`, nats per pair. Forward KL and alpha are exponentials: where -u, or (alpha - 1) u, is
      above 0.9 log(largest float) (639 in float64, 79 in float32; lower by log beta for a beta
      above 1), both value and slope of the exponential are held at what they are there; the sign of
      the margin stays right.
    Raises:
      ValueError: as `dpo_loss`; an unknown `divergence`; an `alpha` that is not finite.
    Source: Wang et al. 2023, arXiv:2309.16240.
    """
    check_positive("beta", beta)
    check_number("alpha", alpha)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if divergence == "reverse_kl":
        margins = a - b
    elif divergence == "forward_kl":
        margins = _difference_of_powers(a, b, -1.0, beta)
    elif divergence == "js":
        margins = _difference_of_logsigmoids(a, b)
    elif divergence == "alpha":
        margins = a - b if alpha == 1 else _difference_of_powers(a, b, alpha - 1.0, beta)
    else:
        names = "'reverse_kl', 'forward_kl', 'js' or 'alpha'"
        raise ValueError(f"divergence: got {divergence!r}, takes {names}")
    return -logsigmoid(beta * margins)


# --- functions of a and b, each by itself ----------------------------------------------------


def nca_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""NCA of a pair: $-\log\sigma(\beta a) - \frac12\log\sigma(-\beta a)
    - \frac12\log\sigma(-\beta b)$.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: Chen et al. 2024, section 4.1, arXiv:2402.05369.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    noise = 0.5 * logsigmoid(-beta * a) + 0.5 * logsigmoid(-beta * b)
    return -logsigmoid(beta * a) - noise


def bco_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""BCO of a pair, without its reward shift: $-\log\sigma(\beta a) - \log\sigma(-\beta b)$.

    Two binary labels, "good" and "bad"; never below the DPO loss of the pair.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: Jung et al. 2024, section 4, arXiv:2404.04656, with a reward shift of 0.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -logsigmoid(beta * a) - logsigmoid(-beta * b)


def sppo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""SPPO with hard labels: $(a - \frac{1}{2\beta})^2 + (b + \frac{1}{2\beta})^2$.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: as in `dpo_loss`.
      beta: > 0, the inverse of the paper's eta; the targets are +-1 / (2 beta) nats.
    Returns:
      `[B]`, nats squared per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: Wu et al. 2024, Eq. 4.12 over eta squared, arXiv:2405.00675, with win rates of 1 and 0.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2


def apo_zero_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""APO-zero: $1 - \sigma(\beta a) + \sigma(\beta b)$: the chosen answer up, the other down.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
    Returns:
      `[B]`, without unit, in 0..2.
    Raises:
      ValueError: as `dpo_loss`.
    Source: D'Oosterlinck et al. 2024, Eq. 7, arXiv:2408.06266.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(-beta * a) + sigmoid(beta * b)


def apo_down_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""APO-down: $\sigma(\beta a) + 1 - \sigma(\beta d)$: both down, the rejected answer more.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta: as in `dpo_loss`.
    Returns:
      `[B]`, without unit, in 0..2.
    Raises:
      ValueError: as `dpo_loss`.
    Source: D'Oosterlinck et al. 2024, Eq. 8, arXiv:2408.06266.
    """
    check_positive("beta", beta)
    a, b = _logratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return sigmoid(beta * a) + sigmoid(beta * (b - a))


# --- means over tokens, and no reference -----------------------------------------------------


def dpo_mean_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    ref_chosen_mean_logps: Tensor,
    ref_rejected_mean_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""Length-normalised DPO: $-\log\sigma(\beta(a/n_w - b/n_l))$.

    Args:
      chosen_mean_logps, rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps: as in
        `ipo_mean_loss`.
      beta: > 0, reward units per nat a token.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: as `dpo_loss`.
    Source: Lambert et al. 2024 (Tulu 3), Eq. 6, arXiv:2411.15124; Meng et al. 2024, appendix,
      arXiv:2405.14734.
    """
    check_positive("beta", beta)
    a, b = _mean_logratios(
        chosen_mean_logps, rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps
    )
    return -logsigmoid(beta * (a - b))


def simpo_loss(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, *, beta: float, gamma: float
) -> Tensor:
    r"""SimPO: $-\log\sigma(\beta(m_w - m_l) - \gamma)$, m the mean log-probability of a token.

    Args:
      chosen_mean_logps: `[B]`, log pi_theta(y_w|x) divided by its number of tokens, nats a token.
      rejected_mean_logps: `[B]`, likewise.
      beta: > 0, reward units per nat a token.
      gamma: >= 0, the target margin, reward units. Some libraries take gamma / beta instead.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: `beta <= 0` or `gamma < 0`; shapes or dtypes differ; a value is not finite.
    Source: Meng et al. 2024, Eq. 6, arXiv:2405.14734.
    """
    check_positive("beta", beta)
    check_between("gamma", gamma, 0.0, math.inf)
    means = {"chosen_mean_logps": chosen_mean_logps, "rejected_mean_logps": rejected_mean_logps}
    check_floats("[B]", **means)
    check_finite(**means)
    margins = widen(chosen_mean_logps) - widen(rejected_mean_logps)
    return -logsigmoid(beta * margins - gamma)


def cpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, nll_weight: float = 1.0
) -> Tensor:
    r"""CPO: $-\log\sigma(\beta[\log\pi(y_w) - \log\pi(y_l)]) - w\log\pi(y_w)$.

    Args:
      chosen_logps: `[B]`, log pi_theta(y_w|x) summed over completion tokens, nats.
      rejected_logps: `[B]`, log pi_theta(y_l|x), nats.
      beta: > 0, reward units per nat.
      nll_weight: w >= 0 of the likelihood of the chosen answer; the paper has 1, on sums as here,
        where TRL averages it over tokens.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: `beta <= 0` or `nll_weight < 0`; shapes or dtypes differ; a value is not finite.
    Source: Xu et al. 2024, Eqs. 3 and 5, arXiv:2401.08417.
    """
    check_positive("beta", beta)
    check_between("nll_weight", nll_weight, 0.0, math.inf)
    check_floats("[B]", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_finite(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    chosen, rejected = widen(chosen_logps), widen(rejected_logps)
    return -logsigmoid(beta * (chosen - rejected)) - nll_weight * chosen


def orpo_loss(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    *,
    beta: float,
    nll_weight: float = 1.0,
) -> Tensor:
    r"""ORPO: $-\beta\log\sigma(\log\frac{o_w}{o_l}) - w\,m_w$ with the odds
    $o = e^m/(1-e^m)$.

    Args:
      chosen_mean_logps: `[B]`, mean log-probability m_w of a token of y_w, nats, below 0.
      rejected_mean_logps: `[B]`, likewise.
      beta: > 0, the paper's lambda.
      nll_weight: w >= 0 of the likelihood of the chosen answer; the paper has 1.
    Returns:
      `[B]`, nats a token, per pair.
    Raises:
      ValueError: `beta <= 0` or `nll_weight < 0`; shapes or dtypes differ; a value is not finite,
        or not below 0: a probability of 1 has no odds.
    Source: Hong et al. 2024, Eqs. 4 to 7, arXiv:2403.07691.
    """
    check_positive("beta", beta)
    check_between("nll_weight", nll_weight, 0.0, math.inf)
    means = {"chosen_mean_logps": chosen_mean_logps, "rejected_mean_logps": rejected_mean_logps}
    check_floats("[B]", **means)
    check_finite(**means)
    for name, logps in means.items():
        if values_visible(logps) and (logps >= 0).any():
            raise ValueError(f"{name}: got {logps.max().item()}, takes values < 0")
    chosen, rejected = widen(chosen_mean_logps), widen(rejected_mean_logps)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return -beta * logsigmoid(log_odds_ratio) - nll_weight * chosen


# --- one answer a row ------------------------------------------------------------------------


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    reference_point: float | Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    r"""KTO: $\lambda(1 - \sigma(\pm\beta(u - z_0)))$, + for desirable answers, $u$ a log-ratio.

    Args:
      logps: `[B]`, log pi_theta of one answer a row, nats.
      ref_logps: `[B]`, log pi_ref of it, nats.
      desirable: `[B]`, bool or 0/1: was the answer liked?
      beta: > 0, reward units per nat.
      reference_point: z_0, nats, a number or `[]`; without gradient. See `kto_reference_point`.
      desirable_weight, undesirable_weight: > 0, lambda of the two kinds.
    Returns:
      `[B]`, without unit; the paper takes the mean over all rows, where some libraries add the
      means of the two kinds, which is twice as much on balanced data.
    Raises:
      ValueError: `beta` or a weight <= 0; shapes or dtypes differ; a value is not finite.
    Source: Ethayarajh et al. 2024, Eq. 8 (Eq. 7 of the first version), arXiv:2402.01306.
    """
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    check_floats("[B]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    liked = as_bool_mask("desirable", desirable, logps.shape)
    logratios = widen(logps) - widen(ref_logps)
    point = torch.as_tensor(reference_point, dtype=logratios.dtype, device=logps.device).detach()
    if point.dim() > 0:
        got = list(point.shape)
        raise ValueError(f"reference_point: got shape {got}, takes one number for the batch")
    check_finite(reference_point=point)
    above = beta * (logratios - point)
    good = desirable_weight * sigmoid(-above)
    return torch.where(liked, good, undesirable_weight * sigmoid(above))


def kto_reference_point(mismatched_logps: Tensor, ref_mismatched_logps: Tensor) -> Tensor:
    r"""KTO's $z_0$: $\max(0, \text{mean of } \log\pi_\theta/\pi_{ref})$ over mismatched pairs.

    Args:
      mismatched_logps: `[B]`, log pi_theta(y'|x) of answers y' to *other* prompts of the batch,
        nats.
      ref_mismatched_logps: `[B]`, log pi_ref of the same, nats.
    Returns:
      `[]`, nats, without gradient: an estimate of KL(pi_theta || pi_ref), and a biased one, for y'
      was not drawn from pi_theta(.|x).
    Raises:
      ValueError: shapes or dtypes differ, or a value is not finite.
    Source: Ethayarajh et al. 2024, below Eq. 8, arXiv:2402.01306.
    """
    pair = {"mismatched_logps": mismatched_logps, "ref_mismatched_logps": ref_mismatched_logps}
    check_floats("[B]", **pair)
    check_finite(**pair)
    logratios = widen(mismatched_logps) - widen(ref_mismatched_logps)
    return logratios.detach().mean().clamp(min=0)


def dro_loss(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, values: Tensor, *, beta: float
) -> Tensor:
    r"""DRO: $(r - V(x) - \beta u)^2$: a regression of the reward on the log-ratio u and V.

    Zero for every answer exactly where pi = pi* and V = beta log Z.

    Args:
      logps: `[B]`, log pi_theta of one answer a row, nats.
      ref_logps: `[B]`, log pi_ref of it, nats.
      rewards: `[B]`, reward units.
      values: `[B]`, V of each row's prompt, reward units: learned together with the policy, or
        known; gradients flow into it.
      beta: > 0, reward units per nat.
    Returns:
      `[B]`, reward units squared; the paper has half of it.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; a value is not finite.
    Source: Richemond et al. 2024, Eq. 4, arXiv:2405.19107.
    """
    check_positive("beta", beta)
    four = {"logps": logps, "ref_logps": ref_logps, "rewards": rewards, "values": values}
    check_floats("[B]", **four)
    check_finite(**four)
    logratios = widen(logps) - widen(ref_logps)
    return (widen(rewards) - widen(values) - beta * logratios) ** 2


# --- two or more answers with scores ---------------------------------------------------------


def rebel_loss(
    first_logps: Tensor,
    second_logps: Tensor,
    ref_first_logps: Tensor,
    ref_second_logps: Tensor,
    first_rewards: Tensor,
    second_rewards: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""REBEL: $(\beta(u_1 - u_2) - (r_1 - r_2))^2$ of two answers to one prompt, with scores.

    Args:
      first_logps, second_logps: `[B]`, log pi_theta of the two answers, in any order, nats.
      ref_first_logps, ref_second_logps: `[B]`, log pi_ref of them, nats; in REBEL's own loop the
        policy of the iteration before.
      first_rewards, second_rewards: `[B]`, reward units.
      beta: > 0, reward units per nat; the inverse of the paper's eta.
    Returns:
      `[B]`, reward units squared per pair.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; a value is not finite.
    Source: Gao et al. 2024, arXiv:2404.16767.
    """
    check_positive("beta", beta)
    six = {
        "first_logps": first_logps,
        "second_logps": second_logps,
        "ref_first_logps": ref_first_logps,
        "ref_second_logps": ref_second_logps,
        "first_rewards": first_rewards,
        "second_rewards": second_rewards,
    }
    check_floats("[B]", **six)
    check_finite(**six)
    first, second, ref_first, ref_second, first_r, second_r = map(widen, six.values())
    margins = (first - ref_first) - (second - ref_second)
    return (beta * margins - (first_r - second_r)) ** 2


def log_variance_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    r"""Log-variance (VarGrad): the variance of $r - \beta u$ over K answers to one prompt.

    At pi* it is beta log Z for every answer, so the variance is 0. With K = 2 it is half of
    `rebel_loss`; with K answers, the mean of that half over all pairs.

    Args:
      logps: `[B, K]`, log pi_theta of K >= 2 completions of one prompt, nats.
      ref_logps: `[B, K]`, log pi_ref of them, nats.
      rewards: `[B, K]`, reward units.
      beta: > 0, reward units per nat.
    Returns:
      `[B]`, reward units squared, with divisor K - 1.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; K < 2; a value is not finite.
    Source: Richter et al. 2020, arXiv:2010.10436.
    """
    check_floats("[B, K]", logps=logps, ref_logps=ref_logps, rewards=rewards)
    check_finite(rewards=rewards)
    returns = widen(rewards) - _listwise_scores(logps, ref_logps, beta)
    return (returns - returns[:, :1]).var(-1)  # a constant comes off: equal returns leave 0


# --- rankings --------------------------------------------------------------------------------


def plackett_luce_loss(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    r"""DPO for rankings: $-\sum_k [s_k - \log\sum_{j\ge k} e^{s_j}]$.

    $s_k = \beta\log[\pi_\theta(y_k|x) / \pi_{ref}(y_k|x)]$ is the implied reward of rank k.

    Args:
      logps: `[B, K]`, log pi_theta of K >= 2 completions of one prompt, best first, nats.
      ref_logps: `[B, K]`, log pi_ref of the same completions, nats.
      beta: > 0, reward units per nat.
    Returns:
      `[B]`, nats per ranking; with K = 2 it is the DPO loss.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; K < 2; a value is not finite.
    Source: Rafailov et al. 2023, Eq. 20 (appendix A.3), arXiv:2305.18290.
    """
    scores = _listwise_scores(logps, ref_logps, beta)
    return -ranking_terms(scores).sum(-1)


def best_of_k_loss(logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    r"""The best of K against all: $-[s_1 - \log\sum_j e^{s_j}]$, with s as in `plackett_luce_loss`.

    Args:
      logps: `[B, K]`, log pi_theta of K >= 2 completions of one prompt, the best in column 0, nats.
      ref_logps: `[B, K]`, log pi_ref of the same completions, nats.
      beta: > 0, reward units per nat.
    Returns:
      `[B]`, nats per list; with K = 2 it is the DPO loss.
    Raises:
      ValueError: `beta <= 0`; shapes or dtypes differ; K < 2; a value is not finite.
    Source: Chen et al. 2024 (S-DPO), arXiv:2406.09215.
    """
    scores = _listwise_scores(logps, ref_logps, beta)
    # The same as log sum_j e^{s_j} - s_1, which loses its digits where the best is far ahead.
    return -logsigmoid(scores[:, 0] - scores[:, 1:].logsumexp(-1))


def reward_model_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    r"""Bradley-Terry negative log-likelihood of a reward model: $-\log\sigma(r_w - r_l)$.

    Args:
      chosen_rewards, rejected_rewards: `[B]`, finite.
    Returns:
      `[B]`, nats per pair.
    Raises:
      ValueError: shapes or dtypes differ, or a reward is not finite.
    Source: Rafailov et al. 2023, Eq. 2, arXiv:2305.18290.
    """
    rewards = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    check_floats("[B]", **rewards)
    check_finite(**rewards)
    return -logsigmoid(widen(chosen_rewards) - widen(rejected_rewards))


def _logratios(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor]:
    """a and b, `[B]` nats each: log(pi_theta / pi_ref) of the chosen and of the rejected answer."""
    four = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    check_floats("[B]", **four)
    check_finite(**four)
    chosen, rejected, ref_chosen, ref_rejected = map(widen, four.values())
    return chosen - ref_chosen, rejected - ref_rejected


def _mean_logratios(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    ref_chosen_mean_logps: Tensor,
    ref_rejected_mean_logps: Tensor,
) -> tuple[Tensor, Tensor]:
    """a / n_w and b / n_l, `[B]` nats a token each."""
    means = {
        "chosen_mean_logps": chosen_mean_logps,
        "rejected_mean_logps": rejected_mean_logps,
        "ref_chosen_mean_logps": ref_chosen_mean_logps,
        "ref_rejected_mean_logps": ref_rejected_mean_logps,
    }
    check_floats("[B]", **means)
    check_finite(**means)
    chosen, rejected, ref_chosen, ref_rejected = map(widen, means.values())
    return chosen - ref_chosen, rejected - ref_rejected


def _difference_of_powers(a: Tensor, b: Tensor, exponent: float, beta: float) -> Tensor:
    """(e^(k a) - e^(k b)) / k for k = `exponent`; powers are held where beta e^x would overflow."""
    p, q = exponent * a, exponent * b
    largest = torch.maximum(p, q).detach() + math.log(max(beta, 1.0))
    shift, gap = hold(largest) - largest, p - q
    p, q = p + shift, q + shift
    # Near 0 the larger power is taken out: e^p (1 - e^(q - p)), or e^q (e^(p - q) - 1).
    # Each branch keeps the gradient of its own power (a maximum would halve it at p = q), so that
    # first and second derivatives are right where the policy is the reference.
    if_p = p.exp() * -expm1(-gap.clamp(0, 1))
    if_q = q.exp() * expm1(gap.clamp(-1, 0))
    near = torch.where(gap >= 0, if_p, if_q)
    return torch.where(gap.abs() < 1, near, p.exp() - q.exp()) / exponent


def _difference_of_logsigmoids(a: Tensor, b: Tensor) -> Tensor:
    """log sigma(a) - log sigma(b), which keeps its digits where both are near or far below 0."""
    near = torch.log1p(sigmoid(-a) * expm1((a - b).clamp(-1, 1)))
    below = (a - b) + (logsigmoid(-a) - logsigmoid(-b))
    far = torch.where((a < 0) & (b < 0), below, logsigmoid(a) - logsigmoid(b))
    return torch.where((a - b).abs() < 1, near, far)


def _log_odds(logps: Tensor) -> Tensor:
    """log[p / (1 - p)] of a log-probability below 0."""
    return logps - torch.log(-expm1(logps))


def _listwise_scores(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta log(pi_theta / pi_ref), `[B, K]`, of at least two completions a row."""
    check_positive("beta", beta)
    check_floats("[B, K]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    if logps.shape[1] < 2:
        raise ValueError(f"logps: got {logps.shape[1]} completion a row, takes >= 2")
    return beta * (widen(logps) - widen(ref_logps))


for _name in __all__:
    globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

r"""Preference losses: log-probabilities of a batch in, one loss per row out.

Most losses take four log-probabilities of a pair: of the chosen completion y_w and of the rejected
one y_l of a prompt x, under the policy and under the reference. In the formulas $d = a - b$ with
$a = \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)}$ and
$b = \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}$. A loss whose arguments are `..._mean_logps`
takes the log-probability of a completion divided by its number of tokens.

A loss is its formula and nothing more: the caller takes the mean over rows. `_checked`, at the end
of this file, refuses tensors and a beta that no loss can use. In signatures `B` is a tensor `[B]`.

On log-ratios of ten thousand nats no loss and no gradient is NaN or infinite, in float64, float32
and bfloat16. Where a formula is an exponential (`discopop_loss`, `chi_po_loss`, `f_dpo_loss` with
forward KL or alpha) its docstring says how. Half precision is computed in float32 and rounded once,
at the end; there a loss above the largest float16, 65,504, is that number.
"""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

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
from dpo_mini._numerics import HALVES, expm1, hold, kl_terms, narrow, ranking_terms, sigmoid, widen

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
    "chi_po_loss",
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

B: TypeAlias = Tensor  # of shape [B]: one number per row

# --- functions of the difference d -----------------------------------------------------------


def dpo_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""DPO loss: $-\log\sigma(\beta d)$.

    Args:
      chosen_logps: `[B]`, log pi_theta(y_w|x) summed over completion tokens, nats.
      rejected_logps: `[B]`, log pi_theta(y_l|x), nats.
      ref_chosen_logps: `[B]`, log pi_ref(y_w|x), nats.
      ref_rejected_logps: `[B]`, log pi_ref(y_l|x), nats.
      beta: > 0, weight of the KL term, reward units per nat.
    Returns:
      `[B]`, nats, one value per pair; reduce with `.mean()`.
    Raises:
      ValueError: a number out of range; tensors not finite, or unlike in shape, dtype or device.
    Source: Rafailov et al. 2023, Eq. 7, arXiv:2305.18290.
    """
    d = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    # -log(sigmoid(beta * d)) overflows for beta * d < -100; logsigmoid does not.
    return -logsigmoid(beta * d)


def cdpo_loss(
    chosen_logps: B,
    rejected_logps: B,
    ref_chosen_logps: B,
    ref_rejected_logps: B,
    *,
    beta: float,
    label_smoothing: float,
) -> B:
    r"""Conservative DPO: $-(1-e)\log\sigma(\beta d) - e\log\sigma(-\beta d)$.

    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`, and `label_smoothing`: e in
    [0, 0.5), the probability given to the other answer.
    Source: Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    d = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return -(1 - label_smoothing) * logsigmoid(beta * d) - label_smoothing * logsigmoid(-beta * d)


def rdpo_loss(
    chosen_logps: B,
    rejected_logps: B,
    ref_chosen_logps: B,
    ref_rejected_logps: B,
    *,
    beta: float,
    label_smoothing: float,
) -> B:
    r"""Robust DPO: $[-(1-e)\log\sigma(\beta d) + e\log\sigma(-\beta d)]/(1-2e)$.

    Its mean over labels flipped with probability e is the DPO loss of the labels before the flip.
    Returns: `[B]`, nats, unbounded below for e > 0. Args and errors: as in `dpo_loss`, and
    `label_smoothing`: e in [0, 0.5), the known probability that a label was flipped.
    Source: Chowdhury et al. 2024, section 3.1, arXiv:2403.00409.
    """
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    d = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    kept = -(1 - label_smoothing) * logsigmoid(beta * d)
    return (kept + label_smoothing * logsigmoid(-beta * d)) / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""IPO on summed log-probabilities, as in the paper: $(d - \frac{1}{2\beta})^2$.

    Returns: `[B]`, nats squared. Args and errors: as in `dpo_loss`; beta is the paper's tau.
    Source: Azar et al. 2023, Eq. 17, arXiv:2310.12036.
    """
    d = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (d - 1 / (2 * beta)) ** 2


def ipo_mean_loss(
    chosen_mean_logps: B,
    rejected_mean_logps: B,
    ref_chosen_mean_logps: B,
    ref_rejected_mean_logps: B,
    *,
    beta: float,
) -> B:
    r"""IPO on means over tokens: $(a/n_w - b/n_l - \frac{1}{2\beta})^2$.

    Several libraries have it as "IPO". Where the lengths n_w and n_l differ, so does its target.
    Returns: `[B]`, squared nats per token. Args and errors: as in `dpo_mean_loss`.
    Source: `DPOTrainer` of Hugging Face TRL with `loss_type="ipo"`; compare arXiv:2310.12036.
    """
    a, b = chosen_mean_logps - ref_chosen_mean_logps, rejected_mean_logps - ref_rejected_mean_logps
    return (a - b - 1 / (2 * beta)) ** 2


def hinge_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""Hinge on the margin: $\max(0, 1 - \beta d)$.

    Returns: `[B]`, without unit. Args and errors: as in `dpo_loss`.
    Source: Liu et al. 2023 (RSO), Eq. 10, arXiv:2309.06657: the hinge of Zhao et al.
      2023 (SLiC-HF), arXiv:2305.10425, with the reference.
    """
    d = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (1 - beta * d).relu()


def exo_loss(
    chosen_logps: B,
    rejected_logps: B,
    ref_chosen_logps: B,
    ref_rejected_logps: B,
    *,
    beta: float,
    label_smoothing: float,
) -> B:
    r"""EXO: $q[\log q - \log(1-e)] + (1-q)[\log(1-q) - \log e]$ with $q = \sigma(\beta d)$.

    The KL *from* the policy's preference to the label, where cDPO has the KL to it.
    Returns: `[B]`, nats, 0 where q = 1 - e. Args and errors: as in `dpo_loss`, and
    `label_smoothing`: e in (0, 0.5), the probability given to the other answer.
    Source: Ji et al. 2024, Eq. 16, arXiv:2402.00856.
    """
    check_positive("label_smoothing", label_smoothing)
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    d = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    wins, loses = logsigmoid(beta * d), logsigmoid(-beta * d)  # log q, log(1 - q)
    right = torch.full_like(wins, math.log1p(-label_smoothing))
    wrong = torch.full_like(wins, math.log(label_smoothing))
    # A KL: as sums of terms >= 0, which near q = 1 - e keep the digits that the formula loses.
    return kl_terms(wins, right, wins - right) + kl_terms(loses, wrong, loses - wrong)


def discopop_loss(
    chosen_logps: B,
    rejected_logps: B,
    ref_chosen_logps: B,
    ref_rejected_logps: B,
    *,
    beta: float,
    temperature: float = 0.05,
) -> B:
    r"""DiscoPOP: $-(1-m)\log\sigma(L) + m e^{-L}$ with $L = \beta d$, $m = \sigma(L/\tau)$.

    A language model found it by search. It is not convex: as it falls from L = 0 it has a dip and a
    bump. For tau <= 1 the exponential is outweighed by m. For tau > 1 its value and slope are held
    once $-L(1 - 1/\tau)$ is above 0.9 log(largest float): 639 in float64, 79 in float32.
    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`, and `temperature`: tau > 0.
    Source: Lu et al. 2024, Eq. 5, arXiv:2406.08414.
    """
    check_positive("temperature", temperature)
    margins = beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))
    # m * exp(-L) is 0 * inf for L < -710; one exponential of log m - L is not.
    exponential = hold(logsigmoid(margins / temperature) - margins).exp()
    return exponential - sigmoid(-margins / temperature) * logsigmoid(margins)


def f_dpo_loss(
    chosen_logps: B,
    rejected_logps: B,
    ref_chosen_logps: B,
    ref_rejected_logps: B,
    *,
    beta: float,
    divergence: str,
    alpha: float = 0.5,
) -> B:
    r"""DPO for another penalty: $-\log\sigma(\beta[f'(e^a) - f'(e^b)])$.

    The optimum of $E[r] - \beta D_f(\pi\Vert\pi_{ref})$ has $r = \beta f'(\pi/\pi_{ref})$ plus
    a constant of the prompt, which cancels in a pair. With $u = \log(\pi/\pi_{ref})$, $f'$ is

    - `"reverse_kl"`: $u$, which is DPO (its constant 1 cancels);
    - `"forward_kl"`: $1 - e^{-u}$;
    - `"js"`: $\log 2 + \log\sigma(u)$, the divergence as the paper scales it;
    - `"alpha"`: $(e^{(\alpha-1)u} - 1)/(\alpha-1)$: forward KL at alpha = 0, reverse KL at 1.

    Forward KL and alpha are exponentials. Their value and slope are held where -u or (alpha - 1) u
    is above 0.9 log(largest float), 639 in float64 and 79 in float32, minus log beta for beta > 1.
    The sign of the margin stays right.
    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`, and `divergence`: one of the four
    names; `alpha`: finite, used by `"alpha"` alone.
    Source: Wang et al. 2023, arXiv:2309.16240.
    """
    check_number("alpha", alpha)
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
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
        raise ValueError(f"`divergence` must be {names}, got {divergence!r}")
    return -logsigmoid(beta * margins)


def chi_po_loss(
    chosen_logps: B,
    rejected_logps: B,
    ref_chosen_logps: B,
    ref_rejected_logps: B,
    *,
    beta: float,
    max_reward: float | None = None,
) -> B:
    r"""chi-PO: $-\log\sigma(\text{clip}(\beta[\varphi(a) - \varphi(b)]))$, $\varphi(u) = e^u + u$.

    DPO for the penalty $\frac12\chi^2 + KL$, whose $f'(\pi/\pi_{ref})$ is $\varphi(u)$.
    `closed_form.f_optimal_logps` has its optimum, under the name `"chi_squared_kl"`.

    The paper clips the *difference* as a whole, after beta and before the sigmoid: to $[-2R, 2R]$,
    where R, `max_reward`, bounds the rewards. Beyond these bounds the loss is constant and its
    gradient 0, also for a pair that is far in the wrong order.

    The value and slope of $e^u$ are held where u is above 0.9 log(largest float), 639 in float64
    and 79 in float32, minus log beta for beta > 1. The sign of the margin stays right.
    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`, and `max_reward`: R > 0, reward units,
    or None, which clips nothing.
    Source: Huang et al. 2024, Algorithm 1, arXiv:2407.13399.
    """
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    margins = beta * (_difference_of_powers(a, b, 1.0, beta) + (a - b))
    if max_reward is not None:
        check_positive("max_reward", max_reward)
        margins = margins.clamp(-2 * max_reward, 2 * max_reward)
    return -logsigmoid(margins)


# --- functions of a and b, each by itself ----------------------------------------------------


def nca_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""NCA: $-\log\sigma(\beta a) - \frac12[\log\sigma(-\beta a) + \log\sigma(-\beta b)]$.

    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`.
    Source: Chen et al. 2024, section 4.1, arXiv:2402.05369.
    """
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    noise = 0.5 * logsigmoid(-beta * a) + 0.5 * logsigmoid(-beta * b)
    return -logsigmoid(beta * a) - noise


def bco_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""BCO of a pair, without its reward shift: $-\log\sigma(\beta a) - \log\sigma(-\beta b)$.

    Two binary labels, "good" and "bad"; never below the DPO loss of the pair.
    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`.
    Source: Jung et al. 2024, section 4, arXiv:2404.04656, with a reward shift of 0.
    """
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return -logsigmoid(beta * a) - logsigmoid(-beta * b)


def sppo_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""SPPO with hard labels: $(a - \frac{1}{2\beta})^2 + (b + \frac{1}{2\beta})^2$.

    Returns: `[B]`, nats squared. Args and errors: as in `dpo_loss`; beta is 1 / the paper's eta.
    Source: Wu et al. 2024, Eq. 4.12 over eta squared, arXiv:2405.00675, with win rates of 1 and 0.
    """
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2


def apo_zero_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""APO-zero: $1 - \sigma(\beta a) + \sigma(\beta b)$: the chosen answer up, the other down.

    Returns: `[B]`, without unit, in 0..2. Args and errors: as in `dpo_loss`.
    Source: D'Oosterlinck et al. 2024, Eq. 7, arXiv:2408.06266.
    """
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return sigmoid(-beta * a) + sigmoid(beta * b)


def apo_down_loss(
    chosen_logps: B, rejected_logps: B, ref_chosen_logps: B, ref_rejected_logps: B, *, beta: float
) -> B:
    r"""APO-down: $\sigma(\beta a) + 1 - \sigma(\beta d)$: both down, the rejected answer more.

    Returns: `[B]`, without unit, in 0..2. Args and errors: as in `dpo_loss`.
    Source: D'Oosterlinck et al. 2024, Eq. 8, arXiv:2408.06266.
    """
    a, b = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return sigmoid(beta * a) + sigmoid(beta * (b - a))


# --- means over tokens, and no reference -----------------------------------------------------


def dpo_mean_loss(
    chosen_mean_logps: B,
    rejected_mean_logps: B,
    ref_chosen_mean_logps: B,
    ref_rejected_mean_logps: B,
    *,
    beta: float,
) -> B:
    r"""Length-normalised DPO: $-\log\sigma(\beta(a/n_w - b/n_l))$.

    Args:
      chosen_mean_logps: `[B]`, log pi_theta(y_w|x) divided by its number of tokens, nats per token.
      rejected_mean_logps, ref_chosen_mean_logps, ref_rejected_mean_logps: `[B]`, likewise.
      beta: > 0, reward units per nat per token.
    Returns: `[B]`, nats. Errors as in `dpo_loss`.
    Source: Lambert et al. 2024 (Tulu 3), Eq. 6, arXiv:2411.15124; Meng et al. 2024, appendix,
      arXiv:2405.14734.
    """
    a, b = chosen_mean_logps - ref_chosen_mean_logps, rejected_mean_logps - ref_rejected_mean_logps
    return -logsigmoid(beta * (a - b))


def simpo_loss(chosen_mean_logps: B, rejected_mean_logps: B, *, beta: float, gamma: float) -> B:
    r"""SimPO: $-\log\sigma(\beta(m_w - m_l) - \gamma)$, m the mean log-probability of a token.

    Returns: `[B]`, nats. Args and errors: as in `dpo_mean_loss`, and `gamma`: >= 0, the target
    margin, reward units. Some libraries take gamma / beta instead.
    Source: Meng et al. 2024, Eq. 6, arXiv:2405.14734.
    """
    check_between("gamma", gamma, 0.0, math.inf)
    margins = chosen_mean_logps - rejected_mean_logps
    return -logsigmoid(beta * margins - gamma)


def cpo_loss(chosen_logps: B, rejected_logps: B, *, beta: float, nll_weight: float = 1.0) -> B:
    r"""CPO: $-\log\sigma(\beta[\log\pi(y_w) - \log\pi(y_l)]) - w\log\pi(y_w)$.

    Returns: `[B]`, nats. Args and errors: as in `dpo_loss`, and `nll_weight`: w >= 0 of the
    likelihood of the chosen answer. The paper has 1, on sums as here; TRL averages over tokens.
    Source: Xu et al. 2024, Eqs. 3 and 5, arXiv:2401.08417.
    """
    check_between("nll_weight", nll_weight, 0.0, math.inf)
    return -logsigmoid(beta * (chosen_logps - rejected_logps)) - nll_weight * chosen_logps


def orpo_loss(
    chosen_mean_logps: B, rejected_mean_logps: B, *, beta: float, nll_weight: float = 1.0
) -> B:
    r"""ORPO: $-\beta\log\sigma(\log\frac{o_w}{o_l}) - w\,m_w$ with the odds $o = e^m/(1-e^m)$.

    Args:
      chosen_mean_logps, rejected_mean_logps: as in `dpo_mean_loss`, m_w and m_l; below 0, for a
        probability of 1 has no odds.
      beta: > 0, the paper's lambda.
      nll_weight: w >= 0 of the likelihood of the chosen answer; the paper has 1.
    Returns: `[B]`, nats per token. Errors as in `dpo_loss`.
    Source: Hong et al. 2024, Eqs. 4 to 7, arXiv:2403.07691.
    """
    check_between("nll_weight", nll_weight, 0.0, math.inf)
    chosen_odds = _log_odds("chosen_mean_logps", chosen_mean_logps)
    log_odds_ratio = chosen_odds - _log_odds("rejected_mean_logps", rejected_mean_logps)
    return -beta * logsigmoid(log_odds_ratio) - nll_weight * chosen_mean_logps


# --- one answer per row ----------------------------------------------------------------------


def kto_loss(
    logps: B,
    ref_logps: B,
    desirable: B,
    *,
    beta: float,
    reference_point: float | Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> B:
    r"""KTO: $\lambda(1 - \sigma(\pm\beta(u - z_0)))$, + for desirable answers, $u$ a log-ratio.

    Args:
      logps, ref_logps: `[B]`, log pi_theta and log pi_ref of one answer per row, nats.
      desirable: `[B]`, bool or 0/1: was the answer liked?
      beta: > 0, reward units per nat.
      reference_point: z_0, nats, a number or `[]`; without gradient. See `kto_reference_point`.
      desirable_weight, undesirable_weight: > 0, lambda of the two kinds.
    Returns: `[B]`, without unit; the paper takes the mean over all rows. Some libraries add the
    means of the two kinds, which is twice as much on balanced data. Errors as in `dpo_loss`.
    Source: Ethayarajh et al. 2024, Eq. 8 (Eq. 7 of the first version), arXiv:2402.01306.
    """
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    liked = as_bool_mask("desirable", desirable, logps.shape)
    point = torch.as_tensor(reference_point, dtype=logps.dtype, device=logps.device).detach()
    if point.dim() > 0:
        raise ValueError(f"`reference_point` must be one number, got shape {list(point.shape)}")
    check_finite(reference_point=point)
    above = beta * (logps - ref_logps - point)
    good = desirable_weight * sigmoid(-above)
    return torch.where(liked, good, undesirable_weight * sigmoid(above))


def kto_reference_point(mismatched_logps: B, ref_mismatched_logps: B) -> Tensor:
    r"""KTO's $z_0$: $\max(0, \text{mean of } \log\pi_\theta/\pi_{ref})$ over mismatched pairs.

    Args:
      mismatched_logps, ref_mismatched_logps: `[B]`, log pi_theta(y'|x) and log pi_ref(y'|x) of
        answers y' to *other* prompts of the batch, nats.
    Returns: `[]`, nats, without gradient: an estimate of KL(pi_theta || pi_ref). It is biased, for
    y' was not drawn from pi_theta(.|x). Errors as in `dpo_loss`.
    Source: Ethayarajh et al. 2024, below Eq. 8, arXiv:2402.01306.
    """
    logratios = mismatched_logps - ref_mismatched_logps
    return logratios.detach().mean().clamp(min=0)


def dro_loss(logps: B, ref_logps: B, rewards: B, values: B, *, beta: float) -> B:
    r"""DRO: $(r - V(x) - \beta u)^2$: a regression of the reward on the log-ratio u and V.

    Zero for every answer exactly where pi = pi* and V = beta log Z.

    Args:
      logps, ref_logps: `[B]`, log pi_theta and log pi_ref of one answer per row, nats.
      rewards: `[B]`, reward units.
      values: `[B]`, V of each row's prompt, reward units: known, or learned through this loss.
      beta: > 0, reward units per nat.
    Returns: `[B]`, reward units squared; the paper has half of it. Errors as in `dpo_loss`.
    Source: Richemond et al. 2024, Eq. 4, arXiv:2405.19107.
    """
    return (rewards - values - beta * (logps - ref_logps)) ** 2


# --- two or more answers with scores ---------------------------------------------------------


def rebel_loss(
    first_logps: B,
    second_logps: B,
    ref_first_logps: B,
    ref_second_logps: B,
    first_rewards: B,
    second_rewards: B,
    *,
    beta: float,
) -> B:
    r"""REBEL: $(\beta(u_1 - u_2) - (r_1 - r_2))^2$ of two answers to one prompt, with scores.

    Args:
      first_logps, second_logps: `[B]`, log pi_theta of the two answers, in any order, nats.
      ref_first_logps, ref_second_logps: `[B]`, log pi_ref, nats; in the paper, the last policy.
      first_rewards, second_rewards: `[B]`, reward units.
      beta: > 0, reward units per nat; the inverse of the paper's eta.
    Returns: `[B]`, reward units squared. Errors as in `dpo_loss`.
    Source: Gao et al. 2024, arXiv:2404.16767.
    """
    margins = (first_logps - ref_first_logps) - (second_logps - ref_second_logps)
    return (beta * margins - (first_rewards - second_rewards)) ** 2


def log_variance_loss(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float) -> B:
    r"""Log-variance (VarGrad): the variance of $r - \beta u$ over K answers to one prompt.

    At pi* it is beta log Z for every answer, so the variance is 0. With K = 2 it is half of
    `rebel_loss`; with K answers, the mean of that half over all pairs.

    Args:
      logps, ref_logps: `[B, K]`, log pi_theta and log pi_ref of K >= 2 answers to one prompt, nats.
      rewards: `[B, K]`, reward units.
      beta: > 0, reward units per nat.
    Returns: `[B]`, reward units squared, with divisor K - 1. Errors as in `dpo_loss`, or K < 2.
    Source: Richter et al. 2020, arXiv:2010.10436.
    """
    returns = rewards - beta * (logps - ref_logps)
    return (returns - returns[:, :1]).var(-1)  # a constant comes off: equal returns leave 0


# --- rankings --------------------------------------------------------------------------------


def plackett_luce_loss(logps: Tensor, ref_logps: Tensor, *, beta: float) -> B:
    r"""DPO for rankings: $-\sum_k [s_k - \log\sum_{j\ge k} e^{s_j}]$.

    $s_k = \beta\log[\pi_\theta(y_k|x) / \pi_{ref}(y_k|x)]$ is the implied reward of rank k.

    Args:
      logps, ref_logps: `[B, K]`, log pi_theta and log pi_ref of K >= 2 answers, best first, nats.
      beta: > 0, reward units per nat.
    Returns: `[B]`, nats; with K = 2 it is the DPO loss. Errors as in `dpo_loss`, or K < 2.
    Source: Rafailov et al. 2023, Eq. 20 (appendix A.3), arXiv:2305.18290.
    """
    scores = beta * (logps - ref_logps)
    return -ranking_terms(scores).sum(-1)


def best_of_k_loss(logps: Tensor, ref_logps: Tensor, *, beta: float) -> B:
    r"""The best of K against all: $-[s_1 - \log\sum_j e^{s_j}]$, with s as in `plackett_luce_loss`.

    Returns: `[B]`, nats; with K = 2, the DPO loss. Args and errors: as in `plackett_luce_loss`.
    Source: Chen et al. 2024 (S-DPO), arXiv:2406.09215.
    """
    scores = beta * (logps - ref_logps)
    # The same as log sum_j e^{s_j} - s_1, which loses its digits where the best is far ahead.
    return -logsigmoid(scores[:, 0] - scores[:, 1:].logsumexp(-1))


# --- a reward model --------------------------------------------------------------------------


def reward_model_loss(chosen_rewards: B, rejected_rewards: B) -> B:
    r"""Bradley-Terry negative log-likelihood of a reward model: $-\log\sigma(r_w - r_l)$.

    Returns: `[B]`, nats, of `chosen_rewards` and `rejected_rewards` `[B]`. Errors as in `dpo_loss`.
    Source: Rafailov et al. 2023, Eq. 2, arXiv:2305.18290.
    """
    return -logsigmoid(chosen_rewards - rejected_rewards)


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


def _log_odds(name: str, logps: Tensor) -> Tensor:
    """log[p / (1 - p)] of a log-probability, which must be below 0."""
    if values_visible(logps) and (logps >= 0).any():
        raise ValueError(f"`{name}` must be < 0, got {logps.max().item()}")
    return logps - torch.log(-expm1(logps))


def _checked(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` on checked arguments: a beta > 0 and finite tensors of one shape, dtype and device.

    Half precision is widened first. What one loss alone asks for, it checks itself.
    """
    names = list(inspect.signature(loss).parameters)
    floats = [name for name in names if name.endswith(("logps", "rewards", "values"))]
    of_lists = loss.__name__ in ("log_variance_loss", "plackett_luce_loss", "best_of_k_loss")

    @wraps(loss)
    def checked(*arguments: Any, **named: Any) -> Tensor:
        given = {**dict(zip(names, arguments, strict=False)), **named}
        tensors = {name: given[name] for name in floats if name in given}
        if len(tensors) < len(floats):
            return loss(*arguments, **named)  # Python says which is missing
        check_positive("beta", given.get("beta", 1.0))
        check_floats("[B, K]" if of_lists else "[B]", **tensors)
        check_finite(**tensors)
        if of_lists and (n_items := tensors["logps"].shape[1]) < 2:
            raise ValueError(f"`logps` must have >= 2 completions per row, got {n_items}")
        if (dtype := given[floats[0]].dtype) not in HALVES:
            return loss(*arguments, **named)
        wide = {name: widen(value) for name, value in named.items()}
        return narrow(loss(*map(widen, arguments), **wide), dtype)

    return checked


for _name in __all__:
    globals()[_name] = _checked(globals()[_name])


def __dir__() -> list[str]:
    return __all__

r"""Preference losses: log-probabilities of a batch in, one loss a row out.

Every loss is pure and leaves the reduction to its caller. In the formulas $d = a - b$ with
$a = \log\frac{\pi_\theta(y_w|x)}{\pi_{ref}(y_w|x)}$ and
$b = \log\frac{\pi_\theta(y_l|x)}{\pi_{ref}(y_l|x)}$, where y_w is the chosen and y_l the rejected
completion of one prompt x.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_mini.arguments import check_between, check_finite, check_floats, check_positive


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
    d = _logratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
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
    Source: Mitchell 2023, "A note on DPO with noisy preferences"; Rafailov et al. 2023.
    """
    check_positive("beta", beta)
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    d = _logratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
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
    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    check_positive("beta", beta)
    check_between("label_smoothing", label_smoothing, 0.0, 0.5)
    d = _logratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
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
    d = _logratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
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
    means = {
        "chosen_mean_logps": chosen_mean_logps,
        "rejected_mean_logps": rejected_mean_logps,
        "ref_chosen_mean_logps": ref_chosen_mean_logps,
        "ref_rejected_mean_logps": ref_rejected_mean_logps,
    }
    check_floats("[B]", **means)
    check_finite(**means)
    chosen_logratios = chosen_mean_logps - ref_chosen_mean_logps
    rejected_logratios = rejected_mean_logps - ref_rejected_mean_logps
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2


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
    Source: Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657.
    """
    check_positive("beta", beta)
    d = _logratio_difference(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return (1 - beta * d).relu()


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
    n_items = scores.shape[1]
    earlier = scores.new_ones(n_items, n_items).tril(-1) > 0  # row k: the items before k
    remaining = scores.unsqueeze(1).expand(-1, n_items, -1).masked_fill(earlier, -torch.inf)
    return (remaining.logsumexp(-1) - scores).sum(-1)


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
    return scores.logsumexp(-1) - scores[:, 0]


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
    return -logsigmoid(chosen_rewards - rejected_rewards)


def _logratio_difference(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
) -> Tensor:
    """d, `[B]` nats: how much more than the reference the policy prefers the chosen answer."""
    four = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    check_floats("[B]", **four)
    check_finite(**four)
    return (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)


def _listwise_scores(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """beta log(pi_theta / pi_ref), `[B, K]`, of at least two completions a row."""
    check_positive("beta", beta)
    check_floats("[B, K]", logps=logps, ref_logps=ref_logps)
    check_finite(logps=logps, ref_logps=ref_logps)
    if logps.shape[1] < 2:
        raise ValueError(f"logps: got {logps.shape[1]} completion a row, takes >= 2")
    return beta * (logps - ref_logps)

"""Each loss against worked numbers, its identities, and the optimum of a whole population."""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from dpo_mini.closed_form import (
    f_optimal_logps,
    log_partition,
    optimal_logps,
    total_variation,
)
from dpo_mini.logps import mean_over_tokens, sum_over_tokens
from dpo_mini.losses import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    best_of_k_loss,
    cdpo_loss,
    chi_po_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    dpo_mean_loss,
    dro_loss,
    exo_loss,
    f_dpo_loss,
    hinge_loss,
    ipo_loss,
    ipo_mean_loss,
    kto_loss,
    kto_reference_point,
    log_variance_loss,
    nca_loss,
    orpo_loss,
    plackett_luce_loss,
    rdpo_loss,
    rebel_loss,
    reward_model_loss,
    simpo_loss,
    sppo_loss,
)
from dpo_mini.preferences import bradley_terry_prob, plackett_luce_logp
from dpo_mini.tasks import random_bandit
from dpo_mini.train import fit_table, population_loss

NAN, INF = float("nan"), float("inf")
OF_D = {  # functions of a - b
    "dpo": partial(dpo_loss, beta=0.5),
    "cdpo": partial(cdpo_loss, beta=0.5, label_smoothing=0.1),
    "rdpo": partial(rdpo_loss, beta=0.5, label_smoothing=0.1),
    "ipo": partial(ipo_loss, beta=0.5),
    "ipo_mean": partial(ipo_mean_loss, beta=0.5),
    "hinge": partial(hinge_loss, beta=0.5),
    "exo": partial(exo_loss, beta=0.5, label_smoothing=0.1),
    "discopop": partial(discopop_loss, beta=0.5),
    "hot discopop": partial(discopop_loss, beta=0.5, temperature=3.0),
    "dpo_mean": partial(dpo_mean_loss, beta=0.5),
    "f reverse_kl": partial(f_dpo_loss, beta=0.5, divergence="reverse_kl"),
}
PAIRED = {
    **OF_D,
    "f forward_kl": partial(f_dpo_loss, beta=0.5, divergence="forward_kl"),
    "f js": partial(f_dpo_loss, beta=0.5, divergence="js"),
    "f alpha 0.5": partial(f_dpo_loss, beta=0.5, divergence="alpha"),
    "f alpha 2": partial(f_dpo_loss, beta=0.5, divergence="alpha", alpha=2.0),
    "chi_po": partial(chi_po_loss, beta=0.5),
    "clipped chi_po": partial(chi_po_loss, beta=0.5, max_reward=0.7),
    "nca": partial(nca_loss, beta=0.5),
    "bco": partial(bco_loss, beta=0.5),
    "sppo": partial(sppo_loss, beta=0.5),
    "apo_zero": partial(apo_zero_loss, beta=0.5),
    "apo_down": partial(apo_down_loss, beta=0.5),
}
LISTWISE = {
    "plackett_luce": partial(plackett_luce_loss, beta=0.5),
    "best_of_k": partial(best_of_k_loss, beta=0.5),
}
OTHERS = {  # with their own arguments
    "reward_model": reward_model_loss,
    "simpo": partial(simpo_loss, beta=0.5, gamma=0.3),
    "cpo": partial(cpo_loss, beta=0.5),
    "orpo": partial(orpo_loss, beta=0.5),
    "dro": partial(dro_loss, beta=0.5),
    "rebel": partial(rebel_loss, beta=0.5),
    "log_variance": partial(log_variance_loss, beta=0.5),
}
ALL = {**PAIRED, **LISTWISE, **OTHERS}


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def exact(got, want):
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def at_margin(loss, d, **options):
    """The loss of pairs whose log-ratio difference is `d`, reached from four random numbers."""
    d = torch.as_tensor(d, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    rejected, ref_chosen, ref_rejected = -5 * torch.rand(3, *d.shape, generator=generator).double()
    chosen = d + (rejected - ref_rejected) + ref_chosen
    return loss(chosen, rejected, ref_chosen, ref_rejected, **options)


@pytest.fixture
def four(generator):
    """Log-probabilities of eight pairs under policy and reference."""
    return list(-4 * torch.rand(4, 8, dtype=torch.float64, generator=generator))


@pytest.fixture
def lists(generator):
    """Log-probabilities of eight lists of five completions under policy and reference."""
    return list(-4 * torch.rand(2, 8, 5, dtype=torch.float64, generator=generator))


# --- worked numbers --------------------------------------------------------------------------


def test_every_paired_loss_at_a_margin_by_hand():
    """At beta d = log 3 the chosen answer wins with probability 3/4."""
    d, beta = double([math.log(9)]), 0.5
    kept, lost = -math.log(3 / 4), -math.log(1 / 4)
    exact(at_margin(dpo_loss, d, beta=beta), double([kept]))
    got = at_margin(cdpo_loss, d, beta=beta, label_smoothing=0.2)
    exact(got, double([0.8 * kept + 0.2 * lost]))
    got = at_margin(rdpo_loss, d, beta=beta, label_smoothing=0.2)
    exact(got, double([(0.8 * kept - 0.2 * lost) / 0.6]))
    exact(at_margin(hinge_loss, double([0.0, 1.5, 2.5]), beta=0.5), double([1.0, 0.25, 0.0]))
    exact(at_margin(hinge_loss, double([-3.0]), beta=0.5), double([2.5]))
    exact(at_margin(ipo_loss, double([0.0, 2.0, 5.0]), beta=0.25), double([4.0, 0.0, 9.0]))
    exact(at_margin(ipo_mean_loss, double([0.0, 2.0, 5.0]), beta=0.25), double([4.0, 0.0, 9.0]))


def test_listwise_losses_by_hand():
    scores = double([[3.0, 2.0, 1.0]]).log()  # worth 3, 2 and 1: best wins 3 of 6, then 2 of 3
    ref_logps = double([[-1.0, -2.0, -3.0]])
    logps = ref_logps + scores / 0.5
    exact(plackett_luce_loss(logps, ref_logps, beta=0.5), double([math.log(6 / 3 * 3 / 2)]))
    exact(best_of_k_loss(logps, ref_logps, beta=0.5), double([math.log(6 / 3)]))


def test_losses_of_the_difference_by_hand():
    """At beta d = log 3 the chosen answer wins with probability 3/4."""
    d = double([math.log(9)])
    got = at_margin(exo_loss, d, beta=0.5, label_smoothing=0.2)
    exact(got, double([0.75 * math.log(0.75 / 0.8) + 0.25 * math.log(0.25 / 0.2)]))
    got = at_margin(discopop_loss, d, beta=0.5, temperature=1.0)
    exact(got, double([0.25 * math.log(4 / 3) + 0.75 / 3]))
    got = at_margin(discopop_loss, d, beta=0.5, temperature=0.5)  # m = 9/10
    exact(got, double([0.1 * math.log(4 / 3) + 0.9 / 3]))
    exact(at_margin(dpo_mean_loss, d, beta=0.5), double([math.log(4 / 3)]))


def at_log_ratios(loss, a, b, **options):
    """The loss where the two answers' log-ratios are `a` and `b`."""
    ref_chosen, ref_rejected = double([-1.3]), double([-0.4])
    return loss(ref_chosen + a, ref_rejected + b, ref_chosen, ref_rejected, **options)


def test_other_divergences_by_hand():
    """The chosen answer is twice as likely as under the reference, the other one as likely."""
    for divergence, options, margin in (
        ("forward_kl", {}, 1 - 1 / 2),
        ("js", {}, math.log(4 / 3)),
        ("alpha", {"alpha": 3.0}, (4 - 1) / 2),
        ("alpha", {"alpha": 0.0}, 1 / 2),
        ("alpha", {"alpha": 1.0}, math.log(2)),
        ("alpha", {"alpha": 0.5}, 2 - math.sqrt(2)),
        ("reverse_kl", {}, math.log(2)),
    ):
        options = {**options, "beta": 0.7, "divergence": divergence}
        got = at_log_ratios(f_dpo_loss, math.log(2), 0.0, **options)
        exact(got, double([math.log1p(math.exp(-0.7 * margin))]))
        got = at_log_ratios(f_dpo_loss, 0.0, math.log(2), **options)
        exact(got, double([math.log1p(math.exp(0.7 * margin))]))
        got = at_log_ratios(f_dpo_loss, 0.6, 0.6, **options)
        exact(got, double([math.log(2)]))


def test_chi_po_by_hand():
    """phi is 2 + log 2 where the policy is twice the reference, and 1 where it is the same."""
    margin = 1 + math.log(2)
    for beta in (0.7, 3.0):
        got = at_log_ratios(chi_po_loss, math.log(2), 0.0, beta=beta)
        exact(got, double([math.log1p(math.exp(-beta * margin))]))
        got = at_log_ratios(chi_po_loss, 0.0, math.log(2), beta=beta)
        exact(got, double([math.log1p(math.exp(beta * margin))]))
    exact(at_log_ratios(chi_po_loss, 0.6, 0.6, beta=0.7), double([math.log(2)]))


def test_chi_po_clips_the_difference_after_beta_to_twice_the_largest_reward():
    """A clip of the log-ratios, of each phi, or before beta, would give other numbers."""
    a = math.log(4.9)
    inside, outside = (
        at_log_ratios(chi_po_loss, a, -50.0, beta=0.5, max_reward=r) for r in (99, 3)
    )
    exact(inside, double([math.log1p(math.exp(-0.5 * (4.9 + a + 50)))]))
    exact(outside, double([math.log1p(math.exp(-6.0))]))  # 2 R = 6
    exact(at_log_ratios(chi_po_loss, -50.0, a, beta=0.5, max_reward=3.0), outside + 6.0)
    for far, slope in ((0.2, -1), (4.0, 0), (-4.0, 0)):  # beyond the bounds nothing pushes
        one, zero = double([far]).requires_grad_(), double([0.0])
        chi_po_loss(one, zero, zero, zero, beta=0.5, max_reward=1.0).sum().backward()
        assert one.grad.sign().item() == slope


def test_chi_po_is_dpo_and_a_chi_squared_part_together(four):
    """Margins add: that of DPO, and that of alpha = 2, whose f' is z - 1."""
    margins = [
        -loss(*four, beta=0.7, **options).expm1().log()
        for loss, options in (
            (dpo_loss, {}),
            (f_dpo_loss, {"divergence": "alpha", "alpha": 2.0}),
            (chi_po_loss, {}),
        )
    ]
    exact(margins[2], margins[0] + margins[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1e-3, 0.5, 1e3])
def test_chi_po_is_held_where_its_exponential_is_too_large(dtype, beta):
    limit = 0.9 * math.log(torch.finfo(dtype).max) - math.log(max(beta, 1.0))
    far = torch.tensor([limit + 30], dtype=dtype).requires_grad_()
    zero = torch.zeros_like(far)
    lost = chi_po_loss(zero.detach(), far, zero.detach(), zero.detach(), beta=beta)
    (slope,) = torch.autograd.grad(lost.sum(), far)
    want = beta * math.exp(limit)
    assert lost.item() == pytest.approx(want, rel=1e-4)
    assert slope.item() == pytest.approx(want, rel=1e-4)
    assert chi_po_loss(far, zero, zero, zero, beta=beta).item() == 0.0


def test_losses_of_two_log_ratios_by_hand():
    log_3 = math.log(3)  # its sigmoid is 3/4
    for loss, a, b, want in (
        (nca_loss, log_3, 0.0, math.log(4 / 3) + 0.5 * math.log(4) + 0.5 * math.log(2)),
        (nca_loss, 0.0, log_3, math.log(2) + 0.5 * math.log(2) + 0.5 * math.log(4)),
        (bco_loss, log_3, 0.0, math.log(4 / 3) + math.log(2)),
        (bco_loss, 0.0, log_3, math.log(2) + math.log(4)),
        (apo_zero_loss, log_3, -log_3, 1 - 0.75 + 0.25),
        (apo_down_loss, log_3, 0.0, 0.75 + 1 - 0.75),
        (apo_down_loss, 0.0, log_3, 0.5 + 1 - 0.25),
    ):
        exact(at_log_ratios(loss, a / 0.7, b / 0.7, beta=0.7), double([want]))
    exact(at_log_ratios(sppo_loss, 3.0, -2.5, beta=0.25), double([1.0 + 0.25]))


def test_losses_without_a_reference_by_hand():
    log_3 = math.log(3)
    chosen, rejected = double([-1.0]), double([-1.0 - (log_3 + 0.5) / 2])
    exact(simpo_loss(chosen, rejected, beta=2.0, gamma=0.5), double([math.log(4 / 3)]))
    rejected = double([-1.0 - log_3 / 2])
    exact(cpo_loss(chosen, rejected, beta=2.0), double([math.log(4 / 3) + 1]))
    got = cpo_loss(chosen - 1, rejected - 1, beta=2.0, nll_weight=0.2)
    exact(got, double([math.log(4 / 3) + 0.4]))
    half, quarter = double([0.5]).log(), double([0.25]).log()  # odds of 1 and 1/3
    exact(orpo_loss(half, quarter, beta=0.3), double([0.3 * math.log(4 / 3) + math.log(2)]))
    exact(orpo_loss(half, quarter, beta=0.3, nll_weight=0.0), double([0.3 * math.log(4 / 3)]))


def test_losses_of_single_answers_and_scores_by_hand():
    ref_logps = double([-2.0, -2.0])
    logps = ref_logps + 0.4 + math.log(3) / 0.5
    liked = torch.tensor([True, False])
    weights = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    got = kto_loss(logps, ref_logps, liked, beta=0.5, reference_point=0.4, **weights)
    exact(got, double([2.0 * 0.25, 3.0 * 0.75]))
    got = kto_loss(logps, ref_logps, liked.long(), beta=0.5, reference_point=double(0.4))
    exact(got, double([0.25, 0.75]))
    exact(kto_reference_point(double([-1.0, -3.0]), double([-2.0, -2.5])), double(0.25))
    exact(kto_reference_point(double([-2.0, -3.0]), double([-1.0, -2.5])), double(0.0))
    one = double([1.0])
    exact(dro_loss(3 * one, one, 4 * one, 0.5 * one, beta=0.25), 9 * one)
    exact(rebel_loss(2 * one, one, one, one, 4 * one, one, beta=0.5), double([2.5**2]))
    rewards = double([[4.0, 2.0, 9.0]])
    logps = double([[1.0, 0.0, 2.0]])  # returns of 2, 2 and 5
    exact(log_variance_loss(logps, 0 * logps, rewards, beta=2.0), double([3.0]))


def test_reward_model_loss_by_hand():
    got = reward_model_loss(double([1.0 + math.log(3), 2.0]), double([1.0, 2.0]))
    exact(got, double([math.log(4 / 3), math.log(2)]))


# --- properties ------------------------------------------------------------------------------


def test_dpo_at_the_reference_is_log_2_with_gradient_half_beta():
    ref_chosen, ref_rejected = double([-1.0, -2.0]), double([-3.0, -0.5])
    four = [ref_chosen, ref_rejected, ref_chosen, ref_rejected]
    four = [logps.clone().requires_grad_() for logps in four]
    losses = dpo_loss(*four, beta=0.3)
    exact(losses, double([math.log(2)] * 2))
    losses.sum().backward()
    for logps, want in zip(four, (-0.15, 0.15, 0.15, -0.15), strict=True):
        exact(logps.grad, double([want] * 2))


def test_the_dpo_gradient_is_weighted_by_the_error(four):
    chosen, rejected = four[0].requires_grad_(), four[1].requires_grad_()
    dpo_loss(*four, beta=0.3).sum().backward()
    implied_chosen, implied_rejected = 0.3 * (four[0] - four[2]), 0.3 * (four[1] - four[3])
    weights = 0.3 * bradley_terry_prob(implied_rejected.detach(), implied_chosen.detach())
    exact(chosen.grad, -weights)
    exact(rejected.grad, weights)


def test_swapping_the_answers_moves_dpo_by_the_margin(four):
    swapped = [four[1], four[0], four[3], four[2]]
    d = (four[0] - four[2]) - (four[1] - four[3])
    exact(dpo_loss(*four, beta=0.7) - dpo_loss(*swapped, beta=0.7), -0.7 * d)


def test_dpo_is_bradley_terry_on_implied_rewards(four):
    implied = 0.7 * (four[0] - four[2]), 0.7 * (four[1] - four[3])
    exact(dpo_loss(*four, beta=0.7), reward_model_loss(*implied))
    exact(dpo_loss(*four, beta=0.7), -bradley_terry_prob(*implied).log())


@pytest.mark.parametrize("flip_prob", [0.0, 0.1, 0.4])
def test_cdpo_mixes_labels_and_rdpo_undoes_the_mixing(four, flip_prob):
    swapped = [four[1], four[0], four[3], four[2]]
    mixture = (1 - flip_prob) * dpo_loss(*four, beta=0.7) + flip_prob * dpo_loss(*swapped, beta=0.7)
    exact(cdpo_loss(*four, beta=0.7, label_smoothing=flip_prob), mixture)
    robust = partial(rdpo_loss, beta=0.7, label_smoothing=flip_prob)
    over_flips = (1 - flip_prob) * robust(*four) + flip_prob * robust(*swapped)
    exact(over_flips, dpo_loss(*four, beta=0.7))


def test_rdpo_has_no_lower_bound_once_wins_exceed_the_smoothing():
    robust = partial(rdpo_loss, beta=0.5, label_smoothing=0.2)
    far = double([1e3, 1e4])
    for win_share, sign in ((0.85, -1), (0.75, 1)):
        low, high = win_share * at_margin(robust, far) + (1 - win_share) * at_margin(robust, -far)
        slope = (high - low).item() / 9e3
        assert slope == pytest.approx(-0.5 * (win_share - 0.8) / 0.6, abs=1e-9)
        assert math.copysign(1, slope) == sign


def test_ipo_is_symmetric_about_its_target():
    away = double([0.0, 0.3, 7.0])
    target = 1 / (2 * 0.4)
    exact(
        at_margin(ipo_loss, target + away, beta=0.4), at_margin(ipo_loss, target - away, beta=0.4)
    )
    exact(at_margin(ipo_loss, target + away, beta=0.4), away**2)


def test_ipo_on_means_is_another_loss_unless_every_answer_has_one_token(generator):
    scored = -torch.rand(4, 3, 5, dtype=torch.float64, generator=generator)
    masks = [torch.arange(5) < double(lengths)[:, None] for lengths in ([1, 1, 1], [1, 3, 5])]
    for mask, same in ((masks[0], True), (masks[1], False)):
        sums = [sum_over_tokens(part, mask) for part in scored]
        means = [mean_over_tokens(part, mask) for part in scored]
        differ = (ipo_loss(*sums, beta=0.3) - ipo_mean_loss(*means, beta=0.3)).abs().max()
        assert (differ.item() == 0) == same


def test_plackett_luce_is_the_log_probability_of_the_ranking(lists):
    logps, ref_logps = lists
    implied = 0.7 * (logps - ref_logps)
    best_first = torch.arange(5).expand(8, 5)
    got = plackett_luce_loss(logps, ref_logps, beta=0.7)
    exact(got, -plackett_luce_logp(implied, best_first))


def test_probabilities_of_rankings_and_of_winners_sum_to_one(lists):
    logps, ref_logps = lists[0][:, :4], lists[1][:, :4]
    rankings = [list(order) for order in itertools.permutations(range(4))]
    each = [LISTWISE["plackett_luce"](logps[:, o], ref_logps[:, o]) for o in rankings]
    exact(torch.stack(each).neg().exp().sum(0), torch.ones(8).double())
    firsts = [[k, *[j for j in range(4) if j != k]] for k in range(4)]
    each = [LISTWISE["best_of_k"](logps[:, o], ref_logps[:, o]) for o in firsts]
    exact(torch.stack(each).neg().exp().sum(0), torch.ones(8).double())


def test_best_of_k_is_the_first_factor_of_plackett_luce(lists):
    logps, ref_logps = lists
    whole = LISTWISE["plackett_luce"](logps, ref_logps)
    rest = LISTWISE["plackett_luce"](logps[:, 1:], ref_logps[:, 1:])
    exact(LISTWISE["best_of_k"](logps, ref_logps), whole - rest)


@pytest.mark.parametrize("loss", LISTWISE.values(), ids=LISTWISE)
def test_listwise_losses_of_two_are_dpo(loss, lists):
    logps, ref_logps = lists[0][:, :2], lists[1][:, :2]
    pair = (logps[:, 0], logps[:, 1], ref_logps[:, 0], ref_logps[:, 1])
    exact(loss(logps, ref_logps), dpo_loss(*pair, beta=0.5))


@pytest.mark.parametrize("name", [*OF_D, *LISTWISE])
def test_a_shift_shared_within_a_prompt_cancels(name, four, lists, generator):
    shift = torch.randn(8, dtype=torch.float64, generator=generator)
    if name in OF_D:
        moved = [four[0] + shift, four[1] + shift, four[2], four[3]]
        exact(PAIRED[name](*moved), PAIRED[name](*four))
    else:
        exact(
            LISTWISE[name](lists[0] + shift[:, None], lists[1]), LISTWISE[name](lists[0], lists[1])
        )


def test_exo_is_the_kl_from_the_policys_preference_to_the_label(four):
    label = torch.distributions.Bernoulli(probs=double(0.9))
    margins = 0.7 * ((four[0] - four[2]) - (four[1] - four[3]))
    policy = torch.distributions.Bernoulli(logits=margins)
    got = exo_loss(*four, beta=0.7, label_smoothing=0.1)
    exact(got, torch.distributions.kl_divergence(policy, label.expand(margins.shape)))


def test_alpha_joins_the_two_kls(four):
    at = partial(f_dpo_loss, *four, beta=0.7, divergence="alpha")
    exact(at(alpha=0.0), f_dpo_loss(*four, beta=0.7, divergence="forward_kl"))
    exact(at(alpha=1.0), dpo_loss(*four, beta=0.7))
    exact(f_dpo_loss(*four, beta=0.7, divergence="reverse_kl"), dpo_loss(*four, beta=0.7))
    assert_close(at(alpha=1 + 1e-9), at(alpha=1.0), atol=1e-7, rtol=0)


def test_powers_too_large_for_a_float_keep_their_sign_and_their_slope():
    for divergence, side in (("forward_kl", -1), ("alpha", 1)):
        loss = partial(f_dpo_loss, beta=0.5, divergence=divergence, alpha=2.0)
        a, b = (double([side * size]).requires_grad_() for size in (2e4, 1e4))
        zero = double([0.0])
        right, wrong = (b, a) if side < 0 else (a, b)  # the larger f' is the chosen answer's
        exact(loss(right, wrong, zero, zero).detach(), zero)
        lost = loss(wrong, right, zero, zero)
        slopes = torch.autograd.grad(lost, [wrong, right])
        assert lost > 1e270
        larger = a if side < 0 else right
        slope = slopes[0] if larger is wrong else slopes[1]
        assert slope.abs() > 1e270
        assert math.copysign(1, slope.item()) == (-1 if larger is wrong else 1)


def test_a_hot_discopop_is_held_and_a_cold_one_vanishes():
    d = double([-1e4]).requires_grad_()
    zero = double([0.0])
    cold = discopop_loss(d, zero, zero, zero, beta=1.0)
    exact(cold.detach(), double([1e4]))  # m = 0: only the logistic part is left
    hot = discopop_loss(d, zero, zero, zero, beta=1.0, temperature=3.0)
    assert hot > 1e270
    (slope,) = torch.autograd.grad(hot, d)
    assert slope < -1e270


def test_bco_is_never_below_dpo(four):
    assert (bco_loss(*four, beta=0.7) >= dpo_loss(*four, beta=0.7)).all()


def test_sppo_is_a_square_of_the_margin_and_one_of_the_sum(four):
    a, b = four[0] - four[2], four[1] - four[3]
    half = ((a - b - 1 / 0.7) ** 2 + (a + b) ** 2) / 2
    exact(sppo_loss(*four, beta=0.7), half)


def test_apo_zero_of_swapped_answers_is_what_is_left_of_two(four):
    swapped = [four[1], four[0], four[3], four[2]]
    exact(apo_zero_loss(*four, beta=0.7) + apo_zero_loss(*swapped, beta=0.7), double([2.0] * 8))


def test_cpo_and_simpo_are_dpo_under_a_uniform_reference(four):
    same = torch.full_like(four[0], -2.0)
    want = dpo_loss(four[0], four[1], same, same, beta=0.7)
    exact(cpo_loss(*four[:2], beta=0.7, nll_weight=0.0), want)
    exact(simpo_loss(*four[:2], beta=0.7, gamma=0.0), want)


def test_a_target_margin_moves_simpo_along(four):
    moved = simpo_loss(four[0] + 0.4, four[1], beta=0.5, gamma=0.2)
    exact(moved, simpo_loss(*four[:2], beta=0.5, gamma=0.0))


def test_kto_of_both_labels_sums_to_its_weight(four):
    liked = torch.ones(8).bool()
    at = partial(kto_loss, four[0], four[1], beta=0.5, reference_point=0.3)
    exact(at(liked) + at(~liked), double([1.0] * 8))


def test_the_reference_point_of_kto_takes_no_gradient(four):
    logps, point = four[0].requires_grad_(), double(0.3).requires_grad_()
    liked = torch.ones(8).bool()
    kto_loss(logps, four[1], liked, beta=0.5, reference_point=point).sum().backward()
    assert point.grad is None
    assert not kto_reference_point(logps, four[1]).requires_grad


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_losses_with_scores_vanish_at_the_optimum_and_only_there(n_prompts, generator):
    task = random_bandit(n_prompts, 4, generator=generator)
    tables = task.ref_logps, task.rewards
    best, log_z = optimal_logps(*tables, 0.5), log_partition(*tables, 0.5)
    values = (0.5 * log_z)[:, None].expand(-1, 4)

    def each(logps):
        yield dro_loss(*(t.flatten() for t in (logps, *tables, values)), beta=0.5)
        yield log_variance_loss(logps, *tables, beta=0.5)
        first, second = ([t[:, at].flatten() for t in (logps, *tables)] for at in (0, 3))
        pairs = [part for both in zip(first, second, strict=True) for part in both]
        yield rebel_loss(*pairs, beta=0.5)

    for at_best, at_start in zip(each(best), each(task.ref_logps), strict=True):
        assert at_best.max() < 1e-24
        assert at_start.max() > 1e-2


def test_log_variance_is_half_of_rebel_over_all_pairs(lists, generator):
    rewards = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    first, second = torch.combinations(torch.arange(5)).T
    columns = [t[:, at].flatten() for t in (*lists, rewards) for at in (first, second)]
    pairs = rebel_loss(*columns, beta=0.7).view(8, 10)
    exact(log_variance_loss(*lists, rewards, beta=0.7), pairs.mean(1) / 2)


# --- gradients, dtypes, extremes -------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradients(name, generator):
    shape = [8, 5] if SHAPES[name] == "[B, K]" else [8]
    draws = -4 * torch.rand(len(NAMES[name]), *shape, dtype=torch.float64, generator=generator)
    inputs = [part.requires_grad_() for part in draws]
    if name == "hinge":
        assert (ALL[name](*inputs) > 0.05).any()
        margins = 0.5 * ((inputs[0] - inputs[2]) - (inputs[1] - inputs[3]))
        assert ((1 - margins).abs() > 1e-3).all()  # away from the kink
    assert gradcheck(ALL[name], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_are_finite_at_equality_and_far_away(name, dtype):
    """Each input at -1 or 1e4 nats away from it, in every combination."""
    if name == "orpo":
        places = [-1.0, -1e-7, -1e4]
    else:
        places = [-1.0, 1e4, -1e4]
    count = len(NAMES[name])
    rows = list(itertools.product(places, repeat=min(count, 4)))
    inputs = [torch.tensor(column) for column in zip(*rows, strict=True)]
    inputs += [torch.full_like(inputs[0], -1.0)] * (count - len(inputs))
    if SHAPES[name] == "[B, K]":
        inputs = [torch.stack([part, part.roll(1), part.flip(0)], 1) for part in inputs]
    inputs = [part.to(dtype).clone().requires_grad_() for part in inputs]
    values = ALL[name](*inputs)
    assert values.dtype == dtype
    assert values.shape == (len(rows),)
    assert torch.isfinite(values).all()
    slopes = torch.autograd.grad(values.sum(), inputs)
    assert all(torch.isfinite(slope).all() for slope in slopes)
    # A batch's mean may overflow only where single slopes are near the largest float.
    assert all(slope.abs().max() > 0 for slope in slopes)


def test_dpo_far_away_is_a_straight_line():
    exact(at_margin(dpo_loss, double([-1e4, 1e4]), beta=0.5), double([5e3, 0.0]))


# --- optima of a whole population ------------------------------------------------------------

REF = double([[0.4, 0.3, 0.2, 0.1]]).log()
REWARDS = double([[1.0, 0.2, -0.4, 0.8]])
BEST = optimal_logps(REF, REWARDS, 0.5)


def distance(logps):
    return total_variation(logps, BEST).item()


@pytest.mark.parametrize(
    ("loss", "want", "tolerance"), [(dpo_loss, 0.0, 1e-6), (ipo_loss, 0.2556, 5e-5)]
)
def test_where_a_population_of_pairs_leads(loss, want, tolerance):
    bound = partial(loss, beta=0.5)
    fitted = fit_table(lambda logps: population_loss(bound, logps, REF, REWARDS), REF)
    assert distance(fitted) == pytest.approx(want, abs=tolerance)


@pytest.mark.parametrize(
    ("divergence", "options", "slope"),
    [
        ("forward_kl", {}, lambda t: 1 - 1 / t),
        ("js", {}, lambda t: torch.log(2 * t / (1 + t))),
        ("alpha", {"alpha": 0.5}, lambda t: (t**-0.5 - 1) / -0.5),
        ("alpha", {"alpha": 2.0}, lambda t: t - 1),
    ],
    ids=["forward KL", "JS", "alpha 0.5", "chi squared"],
)
def test_f_dpo_ends_where_reward_less_divergence_is_stationary(divergence, options, slope):
    """r - beta f'(pi / pi_ref) is one number for all answers: the multiplier of sum pi = 1."""
    beta = 2.0  # small enough a tilt that chi squared keeps every answer
    bound = partial(f_dpo_loss, beta=beta, divergence=divergence, **options)
    fitted = fit_table(lambda logps: population_loss(bound, logps, REF, REWARDS), REF)
    left = REWARDS - beta * slope((fitted - REF).exp())
    assert (left - left.mean()).abs().max() < 1e-6
    assert total_variation(fitted, REF) > 0.05


@pytest.mark.parametrize("beta", [0.35, 2.0])
def test_chi_po_ends_at_the_optimum_of_half_chi_squared_and_kl(beta):
    """At beta = 0.35 chi-squared alone would give an answer up, and its pairs could not fit."""
    bound = partial(chi_po_loss, beta=beta)
    fitted = fit_table(lambda logps: population_loss(bound, logps, REF, REWARDS), REF)
    best = f_optimal_logps(REF, REWARDS, beta, divergence="chi_squared_kl")
    assert total_variation(fitted, best).item() < 1e-6
    ratios = (fitted - REF).exp()
    left = REWARDS - beta * (ratios + ratios.log())
    assert (left - left.mean()).abs().max() < 1e-5
    # No margin is above 2 max_reward = 1.4, the spread of the rewards, so the clip changes nothing.
    bound = partial(chi_po_loss, beta=beta, max_reward=0.7001)
    clipped = fit_table(lambda logps: population_loss(bound, logps, REF, REWARDS), REF)
    assert total_variation(clipped, best).item() < 1e-6


def test_where_hinge_leads_a_population_of_pairs():
    """Its loss is piecewise linear and convex: a corner that no step improves is the optimum."""
    corner = double([[0.0, -2.0, -2.0, 0.0]])  # log-ratios that make every margin 0 or 1 / beta
    bound = partial(hinge_loss, beta=0.5)

    def value(log_ratios):
        return population_loss(bound, REF + log_ratios, REF, REWARDS).item()

    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 2.0):
        steps = size * torch.randn(300, 1, 4, dtype=torch.float64, generator=generator)
        assert min(value(corner + step) for step in steps) > value(corner)
    assert distance((REF + corner).log_softmax(-1)) == pytest.approx(0.0771, abs=5e-5)


def test_where_the_best_of_all_leads():
    shares = REWARDS.softmax(-1)[0]  # how often each of the four answers is the best

    def loss(logps):
        firsts = [[k, *[j for j in range(4) if j != k]] for k in range(4)]
        each = [best_of_k_loss(logps[:, order], REF[:, order], beta=0.5) for order in firsts]
        return sum(share * value.mean() for share, value in zip(shares, each, strict=True))

    assert distance(fit_table(loss, REF)) < 1e-6


def test_where_rankings_lead():
    rankings = torch.tensor(list(itertools.permutations(range(4))))
    shares = plackett_luce_logp(REWARDS.expand(24, 4), rankings).exp()

    def loss(logps):
        logps, ref_logps = logps[0][rankings], REF[0][rankings]
        return (shares * plackett_luce_loss(logps, ref_logps, beta=0.5)).sum()

    assert distance(fit_table(loss, REF)) < 1e-6


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (partial(dpo_loss, beta=0.5), 0.803),
        (partial(cdpo_loss, beta=0.5, label_smoothing=0.2), 0.466),
        (partial(rdpo_loss, beta=0.5, label_smoothing=0.2), 1.500),
    ],
    ids=["dpo", "cdpo", "rdpo"],
)
def test_the_margin_fitted_under_flipped_labels(loss, want):
    """True margin 1.5, and one label in five flipped."""
    flip_prob, wins = 0.2, 1 / (1 + math.exp(-1.5))
    shown = (1 - flip_prob) * wins + flip_prob * (1 - wins)
    ref_logps = double([[0.5, 0.5]]).log()

    def flipped(logps):
        a, b, ref_a, ref_b = *logps.T, *ref_logps.T
        return (shown * loss(a, b, ref_a, ref_b) + (1 - shown) * loss(b, a, ref_b, ref_a)).sum()

    fitted = fit_table(flipped, ref_logps)
    assert 0.5 * (fitted[0, 0] - fitted[0, 1]).item() == pytest.approx(want, abs=5e-4)


# --- what is refused -------------------------------------------------------------------------

FOUR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
MEANS = (
    "chosen_mean_logps",
    "rejected_mean_logps",
    "ref_chosen_mean_logps",
    "ref_rejected_mean_logps",
)
NAMES = {
    **dict.fromkeys(PAIRED, FOUR),
    "ipo_mean": MEANS,
    "dpo_mean": MEANS,
    **dict.fromkeys(LISTWISE, ("logps", "ref_logps")),
    "reward_model": ("chosen_rewards", "rejected_rewards"),
    "simpo": MEANS[:2],
    "cpo": FOUR[:2],
    "orpo": MEANS[:2],
    "dro": ("logps", "ref_logps", "rewards", "values"),
    "rebel": (
        "first_logps",
        "second_logps",
        "ref_first_logps",
        "ref_second_logps",
        "first_rewards",
        "second_rewards",
    ),
    "log_variance": ("logps", "ref_logps", "rewards"),
}
SHAPES = {name: "[B, K]" if name in (*LISTWISE, "log_variance") else "[B]" for name in ALL}
EACH_INPUT = [(name, at) for name, names in NAMES.items() for at in range(len(names))]


def complaint(name, at, bad, kind=ValueError):
    """What the loss says of one bad tensor among good ones."""
    good = torch.full((3, 2) if SHAPES[name] == "[B, K]" else (3,), -1.0, dtype=torch.float64)
    inputs = [good.clone() for _ in NAMES[name]]
    inputs[at] = bad(good) if callable(bad) else bad
    with pytest.raises(kind) as caught:
        ALL[name](*inputs)
    return str(caught.value)


@pytest.mark.parametrize(("name", "at"), EACH_INPUT)
def test_a_bad_tensor_is_named(name, at):
    names, shape = NAMES[name], SHAPES[name]
    argument, first = names[at], names[0]
    good_shape, bad_shape = ([3, 2], [1, 2]) if shape == "[B, K]" else ([3], [1])
    got = complaint(name, at, [0.0], TypeError)
    assert got == f"`{argument}` must be a floating torch.Tensor {shape}, got list"
    got = complaint(name, at, lambda good: good.long())
    assert got == f"`{argument}` must have a floating dtype (.double() makes one), got torch.int64"
    got = complaint(name, at, torch.zeros(()))
    assert got == f"`{argument}` must be a non-empty {shape}, got shape []"
    got = complaint(name, at, lambda good: good[:0])
    assert got == f"`{argument}` must be a non-empty {shape}, got shape {[0, *good_shape[1:]]}"
    got = complaint(name, at, lambda good: good[:1])
    if at:
        assert got == f"`{argument}` must have shape {good_shape} like `{first}`, got {bad_shape}"
    else:
        assert got == f"`{names[1]}` must have shape {bad_shape} like `{first}`, got {good_shape}"
    got = complaint(name, at, lambda good: good.float())
    if at:
        assert (
            got == f"`{argument}` must have dtype torch.float64 like `{first}`, "
            f"got torch.float32: write {argument}.to(torch.float64)"
        )
    else:
        assert (
            got == f"`{names[1]}` must have dtype torch.float32 like `{first}`, "
            f"got torch.float64: write {names[1]}.to(torch.float32)"
        )
    for value in (NAN, INF, -INF):
        got = complaint(name, at, lambda good, value=value: good + value)
        assert got == f"`{argument}` must be finite, got {value}"


@pytest.mark.parametrize("beta", [0, -1.0, NAN, INF, "1", True])
@pytest.mark.parametrize("name", sorted(set(ALL) - {"reward_model"}))
def test_beta_is_finite_and_positive(name, beta):
    loss = ALL[name]
    one = torch.full((1, 2) if SHAPES[name] == "[B, K]" else (1,), -1.0)
    if isinstance(beta, (str, bool)):
        kind, want = TypeError, f"`beta` must be a number, got {type(beta).__name__}"
    else:
        kind, want = ValueError, f"`beta` must be a finite number > 0, got {beta}"
    with pytest.raises(kind) as caught:
        loss(*[one] * len(NAMES[name]), beta=beta)
    assert str(caught.value) == want


@pytest.mark.parametrize("name", ["cdpo", "rdpo", "exo"])
def test_label_smoothing_is_below_one_half(name):
    one = torch.zeros(1)
    for value in (0.5, 1.0) if name == "exo" else (0.5, -0.1, NAN, 1.0):
        with pytest.raises(ValueError) as caught:
            PAIRED[name](one, one, one, one, label_smoothing=value)
        assert str(caught.value) == f"`label_smoothing` must be a number in [0.0, 0.5), got {value}"
    with pytest.raises(TypeError, match="`label_smoothing` must be a number, got NoneType"):
        PAIRED[name](one, one, one, one, label_smoothing=None)
    if name == "exo":
        with pytest.raises(
            ValueError, match="`label_smoothing` must be a finite number > 0, got 0"
        ):
            PAIRED[name](one, one, one, one, label_smoothing=0)
        return
    same = dpo_loss(one, one, one, one, beta=0.5)
    exact(PAIRED[name](one, one, one, one, label_smoothing=0), same)


@pytest.mark.parametrize("name", [*LISTWISE, "log_variance"])
def test_a_list_has_two_items_at_least(name):
    with pytest.raises(ValueError) as caught:
        ALL[name](*[torch.zeros(3, 1)] * len(NAMES[name]))
    assert str(caught.value) == "`logps` must have >= 2 completions per row, got 1"


@pytest.mark.parametrize(
    ("call", "want"),
    [
        (
            lambda x: exo_loss(x, x, x, x, beta=1.0, label_smoothing=-0.1),
            "`label_smoothing` must be a finite number > 0, got -0.1",
        ),
        (
            lambda x: discopop_loss(x, x, x, x, beta=1.0, temperature=0.0),
            "`temperature` must be a finite number > 0, got 0.0",
        ),
        (
            lambda x: chi_po_loss(x, x, x, x, beta=1.0, max_reward=0),
            "`max_reward` must be a finite number > 0, got 0",
        ),
        (
            lambda x: f_dpo_loss(x, x, x, x, beta=1.0, divergence="kl"),
            "`divergence` must be 'reverse_kl', 'forward_kl', 'js' or 'alpha', got 'kl'",
        ),
        (
            lambda x: f_dpo_loss(x, x, x, x, beta=1.0, divergence="alpha", alpha=INF),
            "`alpha` must be a finite number, got inf",
        ),
        (
            lambda x: simpo_loss(x, x, beta=1.0, gamma=-0.5),
            "`gamma` must be a number in [0.0, inf), got -0.5",
        ),
        (
            lambda x: cpo_loss(x, x, beta=1.0, nll_weight=-1.0),
            "`nll_weight` must be a number in [0.0, inf), got -1.0",
        ),
        (
            lambda x: orpo_loss(x, x, beta=1.0, nll_weight=NAN),
            "`nll_weight` must be a number in [0.0, inf), got nan",
        ),
        (lambda x: orpo_loss(x + 1, x, beta=1.0), "`chosen_mean_logps` must be < 0, got 0.0"),
        (lambda x: orpo_loss(x, -x, beta=1.0), "`rejected_mean_logps` must be < 0, got 1.0"),
        (
            lambda x: kto_loss(x, x, x > 0, beta=1.0, reference_point=x),
            "`reference_point` must be one number, got shape [2]",
        ),
        (
            lambda x: kto_loss(x, x, x > 0, beta=1.0, reference_point=NAN),
            "`reference_point` must be finite, got nan",
        ),
        (
            lambda x: kto_loss(x, x, x, beta=1.0, reference_point=0.0),
            "`desirable` must be 0 or 1, got -1.0",
        ),
        (
            lambda x: kto_loss(x, x, (x > 0)[:1], beta=1.0, reference_point=0.0),
            "`desirable` must have shape [2], got [1]",
        ),
        (
            lambda x: kto_loss(x, x[:1], x > 0, beta=1.0, reference_point=0.0),
            "`ref_logps` must have shape [2] like `logps`, got [1]",
        ),
        (
            lambda x: kto_loss(x / 0, x, x > 0, beta=1.0, reference_point=0.0),
            "`logps` must be finite, got -inf",
        ),
        (
            lambda x: kto_loss(x, x / 0, x > 0, beta=1.0, reference_point=0.0),
            "`ref_logps` must be finite, got -inf",
        ),
        (
            lambda x: kto_loss(x[None], x[None], x[None] > 0, beta=1.0, reference_point=0.0),
            "`logps` must be a non-empty [B], got shape [1, 2]",
        ),
        (
            lambda x: kto_reference_point(x[None], x[None]),
            "`mismatched_logps` must be a non-empty [B], got shape [1, 2]",
        ),
        (
            lambda x: kto_loss(x, x, x > 0, beta=0.0, reference_point=0.0),
            "`beta` must be a finite number > 0, got 0.0",
        ),
        (
            lambda x: kto_loss(x, x, x > 0, beta=1.0, reference_point=0.0, desirable_weight=0.0),
            "`desirable_weight` must be a finite number > 0, got 0.0",
        ),
        (
            lambda x: kto_loss(x, x, x > 0, beta=1.0, reference_point=0.0, undesirable_weight=-1),
            "`undesirable_weight` must be a finite number > 0, got -1",
        ),
        (
            lambda x: kto_reference_point(x, x[:1]),
            "`ref_mismatched_logps` must have shape [2] like `mismatched_logps`, got [1]",
        ),
        (
            lambda x: kto_reference_point(x, x / 0),
            "`ref_mismatched_logps` must be finite, got -inf",
        ),
    ],
)
def test_settings_out_of_range_are_refused(call, want):
    with pytest.raises(ValueError) as caught:
        call(torch.tensor([-1.0, -1.0]))
    assert str(caught.value) == want


@pytest.mark.parametrize("name", ALL)
def test_a_loss_says_what_it_takes(name):
    loss = getattr(ALL[name], "func", ALL[name])
    bound = getattr(ALL[name], "keywords", {})
    assert tuple(inspect.signature(loss).parameters)[: len(NAMES[name])] == NAMES[name]
    assert set(bound) <= set(inspect.signature(loss).parameters)


def test_python_refuses_what_is_missing_too_much_or_given_twice(four):
    for arguments, named, want in (
        ((), {"beta": 0.5}, "missing 4 required positional arguments: 'chosen_logps', "),
        (four[:3], {"beta": 0.5}, "missing 1 required positional argument: 'ref_rejected_logps'"),
        (four, {}, "missing 1 required keyword-only argument: 'beta'"),
        ([*four, 0.5], {}, "takes 4 positional arguments but 5"),
        (four, {"beta": 0.5, "chosen_logps": four[0]}, "multiple values for argument"),
        (four, {"beta": 0.5, "gamma": 0.5}, "unexpected keyword argument 'gamma'"),
    ):
        with pytest.raises(TypeError, match=want):
            dpo_loss(*arguments, **named)
    by_name = dict(zip(reversed(FOUR), reversed(four), strict=True))
    assert torch.equal(dpo_loss(**by_name, beta=0.5), dpo_loss(*four, beta=0.5))


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "js"])
def test_other_divergences_have_right_second_derivatives_at_the_reference(divergence):
    """Where the policy is the reference both powers are equal, and a maximum has a kink there."""
    loss = partial(f_dpo_loss, beta=0.5, divergence=divergence)
    four = [double([-1.0, -2.0, -0.3, -4.0]) for _ in range(4)]
    four[0][2:] += double([0.7, -2.0])
    assert gradgradcheck(loss, [logps.requires_grad_() for logps in four])


def test_other_divergences_by_hand_and_far_away():
    """f' at a ratio of 4 and of 1, and log-ratios whose powers overflow."""
    zero, four_times = double([0.0]), double([math.log(4)])
    for divergence, slope in {"forward_kl": 3 / 4, "alpha": 1.0, "js": math.log(8 / 5)}.items():
        loss = partial(f_dpo_loss, beta=0.5, divergence=divergence)
        want = -torch.sigmoid(double([slope / 2])).log()
        exact(loss(four_times, zero, zero, zero), want)
        exact(loss(zero, four_times, zero, zero), want + slope / 2)
        far = [double([1e4, -1e4]).requires_grad_(), double([-1e4, 1e4]).requires_grad_()]
        values = loss(*far, *[double([0.0, 0.0])] * 2)
        values.sum().backward()
        assert values[0] == 0 < values[1]
        assert torch.isfinite(values).all()
        assert all(torch.isfinite(tensor.grad).all() for tensor in far)


# --- half precision --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_single_precision_rounded_once(name, generator):
    shape = (8, 3) if SHAPES[name] == "[B, K]" else (8,)
    halves = [(-4 * torch.rand(shape, generator=generator) - 0.1).bfloat16() for _ in NAMES[name]]
    want = ALL[name](*[half.float() for half in halves]).bfloat16()
    assert torch.equal(ALL[name](*halves), want)
    assert torch.equal(ALL[name](**dict(zip(NAMES[name], halves, strict=True))), want)

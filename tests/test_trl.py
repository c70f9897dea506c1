"""The losses beside pip `trl`, on random batches: values and gradients.

`trl` computes its losses inside trainers. `DPOTrainer._compute_loss` and its kin can be called on a
stub with a model that returns given log-probabilities; they are private, so the version is pinned.
"""

import warnings
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from dpo_mini import losses
from dpo_mini.logps import mean_over_tokens, sum_over_tokens

PINNED = "1.16.0"
try:
    installed = version("trl")
except PackageNotFoundError:
    pytest.skip("trl is not installed (it needs Python 3.11)", allow_module_level=True)
if installed != PINNED:
    pytest.skip(f"trl {installed} is not the pinned {PINNED}", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

B, T, BETA = 8, 6, 0.3


@pytest.fixture
def batch(generator):
    """Token log-probabilities of chosen, then rejected answers, `[2B, T]`, of 1 to T tokens."""
    policy = -2 * torch.rand(2 * B, T, dtype=torch.float64, generator=generator)
    reference = policy + 0.7 * torch.randn(2 * B, T, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, T + 1, (2 * B, 1), generator=generator)
    mask = torch.arange(T) < lengths
    policy, reference = policy.masked_fill(~mask, 0.0), reference.masked_fill(~mask, 0.0)
    return SimpleNamespace(policy=policy.requires_grad_(), reference=reference, mask=mask)


def one_process():
    same = lambda values: values  # noqa: E731
    return SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)


def outputs(token_logps):
    zeros = torch.zeros_like(token_logps)
    return SimpleNamespace(
        log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


class Model:
    training = True

    def __init__(self, token_logps):
        self.token_logps = token_logps

    def __call__(self, **inputs):
        return outputs(self.token_logps)


def tokens(batch):
    """Inputs of one prompt token, then the answers'."""
    mask = torch.nn.functional.pad(batch.mask.long(), (1, 0))
    return {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
    }


def trl_dpo(batch, loss_type, *, divergence="reverse_kl", alpha=0.5, smoothing=0.0, tau=0.05):
    stub = SimpleNamespace(
        accelerator=one_process(), model=Model, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type=divergence, f_alpha_divergence_coef=alpha,
        beta=BETA, label_smoothing=smoothing, loss_types=[loss_type], loss_weights=[1.0],
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=tau), _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ref_chosen, ref_rejected = batch.reference.sum(1).chunk(2)
    inputs = {**tokens(batch), "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    return DPOTrainer._compute_loss(stub, Model(batch.policy), inputs, False)


def trl_kto(batch, desirable, mismatched, ref_mismatched, **weights):
    stub = SimpleNamespace(
        accelerator=one_process(), model=Model, aux_loss_enabled=False, precompute_ref_logps=True,
        beta=BETA, calculate_KL=True, loss_type="kto", _total_train_tokens=0, _tp_size=1,
        _metrics={"train": defaultdict(list)}, _compute_kl_logps=lambda model, inputs: mismatched,
        **weights,
    )  # fmt: skip
    inputs = {
        **tokens(batch),
        "label": desirable,
        "ref_logps": batch.reference.sum(1),
        "ref_KL_logps": ref_mismatched,
    }
    return KTOTrainer._compute_loss(stub, Model(batch.policy), inputs, False)


def trl_cpo(chosen, rejected, loss_type, gamma=0.0):
    stub = SimpleNamespace(
        accelerator=one_process(), alpha=0.0, beta=BETA, label_smoothing=0.0, loss_type=loss_type,
        simpo_gamma=gamma,
    )  # fmt: skip
    return CPOTrainer.cpo_loss(stub, chosen, rejected)[0].mean()


def trl_orpo(chosen, rejected):
    stub = SimpleNamespace(accelerator=one_process(), beta=BETA)
    return -ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)[0].mean()


def four(batch, reduce=sum_over_tokens):
    """Chosen, rejected, and both under the reference, `[B]` each."""
    policy, reference = reduce(batch.policy, batch.mask), reduce(batch.reference, batch.mask)
    return [*policy.chunk(2), *reference.chunk(2)]


def gradient(loss, batch):
    return torch.autograd.grad(loss, batch.policy, retain_graph=True)[0].masked_fill(
        ~batch.mask, 0.0
    )


def agree(batch, ours, theirs, tolerance=1e-6):
    """Both the mean loss and its gradient in every token's log-probability."""
    assert_close(ours, theirs.to(ours), atol=tolerance, rtol=0)
    mine = gradient(ours, batch)
    assert mine.abs().max() > 1e-3
    assert_close(mine, gradient(theirs, batch).to(mine), atol=tolerance, rtol=0)


SUMS = {
    "sigmoid": (losses.dpo_loss, {}, {}),
    "hinge": (losses.hinge_loss, {}, {}),
    "robust": (losses.rdpo_loss, {"label_smoothing": 0.2}, {"smoothing": 0.2}),
    "exo_pair": (losses.exo_loss, {"label_smoothing": 0.1}, {"smoothing": 0.1}),
    "nca_pair": (losses.nca_loss, {}, {}),
    "bco_pair": (losses.bco_loss, {}, {}),
    "sppo_hard": (losses.sppo_loss, {}, {}),
    "apo_zero": (losses.apo_zero_loss, {}, {}),
    "apo_down": (losses.apo_down_loss, {}, {}),
    "discopop": (losses.discopop_loss, {"temperature": 0.05}, {"tau": 0.05}),
}
MEANS = {"ipo": losses.ipo_mean_loss, "sigmoid_norm": losses.dpo_mean_loss}


@pytest.mark.parametrize("loss_type", SUMS)
def test_losses_of_sums_agree(loss_type, batch):
    loss, settings, theirs = SUMS[loss_type]
    agree(
        batch, loss(*four(batch), beta=BETA, **settings).mean(), trl_dpo(batch, loss_type, **theirs)
    )


@pytest.mark.parametrize("loss_type", MEANS)
def test_losses_of_means_agree(loss_type, batch):
    ours = MEANS[loss_type](*four(batch, mean_over_tokens), beta=BETA).mean()
    agree(batch, ours, trl_dpo(batch, loss_type))


@pytest.mark.parametrize(
    ("name", "alpha"), [("forward_kl", 0.0), ("js", 0.0), ("alpha", 0.3), ("alpha", 1.7)]
)
def test_other_divergences_agree(name, alpha, batch):
    theirs = {"js": "js_divergence", "alpha": "alpha_divergence"}.get(name, name)
    if name == "alpha":  # TRL knows no double precision there
        batch.policy = batch.policy.detach().float().requires_grad_()
        batch.reference = batch.reference.float()
    ours = losses.f_dpo_loss(*four(batch), beta=BETA, divergence=name, alpha=alpha).mean()
    agree(batch, ours, trl_dpo(batch, "sigmoid", divergence=theirs, alpha=alpha))


@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_simpo_agrees_on_gamma_itself(gamma, batch):
    chosen, rejected = four(batch, mean_over_tokens)[:2]
    ours = losses.simpo_loss(chosen, rejected, beta=BETA, gamma=gamma).mean()
    agree(batch, ours, trl_cpo(chosen, rejected, "simpo", gamma))


def test_the_preference_term_of_cpo_agrees(batch):
    chosen, rejected = four(batch)[:2]
    ours = losses.cpo_loss(chosen, rejected, beta=BETA, nll_weight=0.0).mean()
    agree(batch, ours, trl_cpo(chosen, rejected, "sigmoid"))


def test_the_odds_ratio_of_orpo_agrees(batch):
    chosen, rejected = four(batch, mean_over_tokens)[:2]
    ours = losses.orpo_loss(chosen, rejected, beta=BETA, nll_weight=0.0).mean()
    agree(batch, ours, trl_orpo(chosen, rejected))


@pytest.mark.parametrize("shift", [0.8, -3.0], ids=["z0 > 0", "z0 = 0"])
def test_kto_agrees_on_the_mean_over_all_rows(shift, batch, generator):
    desirable = torch.rand(2 * B, generator=generator) < 0.4
    ref_mismatched = -3 * torch.rand(2 * B, dtype=torch.float64, generator=generator)
    mismatched = ref_mismatched + shift
    point = losses.kto_reference_point(mismatched, ref_mismatched)
    assert (point > 0) == (shift > 0)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    ours = losses.kto_loss(
        batch.policy.sum(1), batch.reference.sum(1), desirable, beta=BETA, reference_point=point,
        **weights,
    ).mean()  # fmt: skip
    agree(batch, ours, trl_kto(batch, desirable, mismatched, ref_mismatched, **weights))


# --- where TRL and we differ, and whose convention is ours ------------------------------------


def test_trl_ignores_label_smoothing_for_its_plain_loss(batch):
    """Ours: cDPO is `cdpo_loss`. TRL's sigmoid loss with smoothing is DPO without."""
    theirs = trl_dpo(batch, "sigmoid", smoothing=0.2)
    agree(batch, losses.dpo_loss(*four(batch), beta=BETA).mean(), theirs)
    ours = losses.cdpo_loss(*four(batch), beta=BETA, label_smoothing=0.2).mean()
    assert (ours - theirs).abs() > 1e-3


def test_trls_ipo_is_that_of_means(batch):
    """Ours: `ipo_loss` is the paper's, of sums; `ipo_mean_loss` is TRL's. Equal for one token."""
    theirs = trl_dpo(batch, "ipo")
    assert (losses.ipo_loss(*four(batch), beta=BETA).mean() - theirs).abs() > 1e-2
    batch.mask = torch.arange(T).expand(2 * B, T) < 1
    batch.policy = batch.policy.detach().masked_fill(~batch.mask, 0.0).requires_grad_()
    batch.reference = batch.reference.masked_fill(~batch.mask, 0.0)
    agree(batch, losses.ipo_loss(*four(batch), beta=BETA).mean(), trl_dpo(batch, "ipo"))


def test_trls_discopop_is_nan_far_below_zero_and_ours_is_not(batch):
    """exp(-L) is inf and sigmoid(L / tau) is 0 there; their product tends to 0."""
    batch.reference = batch.reference.clone()
    batch.reference[:B] += 3000.0 / T  # margins of some -0.3 * 3000 nats
    assert trl_dpo(batch, "discopop").isnan()
    ours = losses.discopop_loss(*four(batch), beta=BETA)
    margins = BETA * (four(batch)[0] - four(batch)[2] - four(batch)[1] + four(batch)[3])
    assert margins.min() < -700
    assert ours.isfinite().all()
    assert gradient(ours.mean(), batch).isfinite().all()


def test_trls_forward_kl_is_nan_where_both_powers_overflow_and_ours_is_not(batch):
    batch.reference = batch.reference.clone()
    batch.reference[:, 0] += 2000.0
    assert trl_dpo(batch, "sigmoid", divergence="forward_kl").isnan()
    ours = losses.f_dpo_loss(*four(batch), beta=BETA, divergence="forward_kl")
    assert ours.isfinite().all()
    assert gradient(ours.mean(), batch).isfinite().all()

"""The losses beside pip `trl`, on random batches: values and gradients.

`trl` computes its losses inside trainers. `DPOTrainer._compute_loss` and its kin can be called on a
stub with a model that returns given log-probabilities; they are private, so the version is pinned.
"""

import math
import warnings
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from dpo_mini import losses, policy_gradient
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
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer
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


# --- policy gradients ------------------------------------------------------------------------

K, CLIP, CLIP_HIGH, CAP = 4, 0.2, 0.28, 1.2
CLIPS = {"clip_eps": CLIP, "clip_eps_high": CLIP_HIGH}
BESSEL = math.sqrt((K - 1) / K)
"""What is left of our normalised advantages where the divisor of the variance is K - 1."""


@pytest.fixture
def groups(generator):
    """K completions of 1 to T tokens for each of B prompts, some tokens far from their sampler.

    The rewards are large, so that 1e-4 beside their standard deviation is as good as nothing. One
    group has equal rewards. The sampler's numbers are float32, for `trl` makes them that.
    """
    policy = -2 * torch.rand(B, K, T, dtype=torch.float64, generator=generator)
    old = policy + 0.3 * torch.randn(B, K, T, dtype=torch.float64, generator=generator)
    sampler = (old + 0.2 * torch.randn(B, K, T, dtype=torch.float64, generator=generator)).float()
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, K, 1), generator=generator)
    mask[0, 0] = True  # `trl` pads to the longest
    rewards = 1e4 * torch.randn(B, K, dtype=torch.float64, generator=generator)
    rewards[2] = 0.5
    return SimpleNamespace(
        policy=policy.requires_grad_(), old=old, sampler=sampler.double(), mask=mask,
        rewards=rewards,
    )  # fmt: skip


def arguments(groups):
    return groups.policy, groups.old, groups.rewards, groups.mask


class Frozen(Model):
    """The model that `trl` asks for the log-probabilities of the time of sampling."""

    is_gradient_checkpointing = False


def stub(groups, **settings):
    """What both trainers read of themselves: one process, one step per batch, no KL term."""
    n_rows, lengths = B * K, groups.mask.sum(-1).flatten().tolist()
    drawn = [[1] * n for n in lengths]
    rows = zip(groups.sampler.flatten(0, 1).tolist(), lengths, strict=True)
    sampled = [row[:n] for row, n in rows]
    accelerator = one_process()
    accelerator.process_index, accelerator.num_processes = 0, 1
    accelerator.reduce = lambda values, reduction: values
    everything = {
        "accelerator": accelerator, "model": Frozen(groups.old.flatten(0, 1)), "beta": 0.0,
        "aux_loss_enabled": False, "mask_truncated_completions": False, "pad_to_multiple_of": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "num_generations": K, "use_vllm": False,
        "args": SimpleNamespace(
            per_device_train_batch_size=n_rows, gradient_accumulation_steps=1,
            steps_per_generation=1, gradient_checkpointing_kwargs=None, delta=None,
        ),
        "num_iterations": 2, "environment_factories": None, "environments": None, "tools": None,
        "_generate": lambda prompts: ([[1]] * n_rows, drawn, None, drawn, sampled, {}, None, None),
        "_get_per_token_logps_and_entropies": lambda model, *_, **__: (
            model.token_logps, torch.zeros_like(model.token_logps), None
        ),
        "_calculate_rewards": lambda *_: groups.rewards.view(-1, 1),
        "reward_weights": torch.ones(1, dtype=torch.float64), "reward_func_names": ["r"],
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group",
        "vllm_importance_sampling_correction": False, "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0, "importance_sampling_level": "token", "_step": 0,
        "epsilon_low": CLIP, "epsilon_high": CLIP_HIGH, "max_completion_length": T,
        "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
        "normalize_advantages": False, "reward_clip_range": None,
        "_metrics": {"train": defaultdict(list)}, "_pending_extra_logs": {}, "_pending_metrics": {},
        "_logs": {
            "prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list),
            "extra": {},
        },
        **settings,
    }  # fmt: skip
    return SimpleNamespace(**everything)


def scored(trainer, self):
    """A batch as the trainer makes it: `trl`'s own advantages, mask and weights."""
    return trainer._generate_and_score_completions(self, [{"prompt": "x"}] * (B * K))


def trl_grpo(groups, loss_type, **settings):
    self = stub(groups, loss_type=loss_type, **settings)
    inputs = scored(GRPOTrainer, self)
    return GRPOTrainer._compute_loss(self, Model(groups.policy.flatten(0, 1)), inputs)


def trl_rloo(groups):
    self = stub(groups)
    generated = self._generate
    self._generate = lambda prompts: (*generated(prompts)[:2], generated(prompts)[3])
    inputs = scored(RLOOTrainer, self)
    return RLOOTrainer._compute_loss(self, Model(groups.policy.flatten(0, 1)), inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_grpo_and_dapo_agree_but_for_the_divisor_of_the_variance(loss_type, groups):
    """`trl`: `nanstd`, with K - 1, in `_generate_and_score_completions`. Ours: K."""
    loss = getattr(policy_gradient, f"{loss_type}_loss")
    ours = loss(*arguments(groups), **CLIPS).mean()
    agree(groups, BESSEL * ours, trl_grpo(groups, loss_type))


def test_gspo_agrees_but_for_the_divisor_of_the_variance(groups):
    """`trl` has no loss type of that name: `"grpo"` with one ratio per sequence."""
    theirs = trl_grpo(groups, "grpo", importance_sampling_level="sequence")
    ours = policy_gradient.gspo_loss(*arguments(groups), **CLIPS).mean()
    agree(groups, BESSEL * ours, theirs)


def test_cispo_agrees_where_trls_epsilon_is_one_more(groups):
    """`trl`: `torch.clamp(coef_1, max=self.epsilon_high)`. Ours, and the paper: 1 + epsilon."""
    theirs = trl_grpo(groups, "cispo", epsilon_high=1 + CLIP_HIGH)
    ours = policy_gradient.cispo_loss(*arguments(groups), clip_eps_high=CLIP_HIGH).mean()
    agree(groups, BESSEL * ours, theirs)
    assert (ours - trl_grpo(groups, "cispo") / BESSEL).abs() > 1e-2


def test_dr_grpo_agrees(groups):
    groups.rewards = groups.rewards / 1e4  # the tolerance is for losses of size 1
    theirs = trl_grpo(groups, "dr_grpo", scale_rewards="none")
    agree(groups, policy_gradient.dr_grpo_loss(*arguments(groups), **CLIPS).mean(), theirs)


def test_dr_grpo_divides_by_the_width_and_trl_by_the_longest_that_may_be_drawn(groups):
    groups.rewards = groups.rewards / 1e4
    theirs = trl_grpo(groups, "dr_grpo", scale_rewards="none", max_completion_length=10 * T)
    ours = policy_gradient.dr_grpo_loss(*arguments(groups), **CLIPS).mean()
    agree(groups, ours / 10, theirs, 1e-12)


def test_rloo_agrees(groups):
    groups.rewards = groups.rewards / 1e4
    agree(groups, policy_gradient.rloo_loss(*arguments(groups), **CLIPS).mean(), trl_rloo(groups))


def test_advantages_agree(groups):
    """Rewards of size 1, where the 1e-4 counts; `nanstd` has its K / (K - 1) in float32."""
    groups.rewards = groups.rewards / 1e4

    def theirs(**settings):
        return scored(GRPOTrainer, stub(groups, loss_type="grpo", **settings))["advantages"]

    ours = BESSEL * policy_gradient.group_normalised_advantages(groups.rewards, eps=1e-4 * BESSEL)
    assert_close(theirs().view(B, K), ours, rtol=1e-7, atol=0)
    ours = policy_gradient.mean_advantages(groups.rewards)
    assert_close(theirs(scale_rewards="none").view(B, K), ours, rtol=1e-12, atol=1e-12)


VLLM = {
    "use_vllm": True, "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_clip_max": CAP, "vllm_importance_sampling_clip_min": None,
}  # fmt: skip


def test_truncated_importance_weights_agree(groups):
    """`vllm_importance_sampling_cap` of `trl`, now `..._clip_max`; its default mode is another."""
    weights = policy_gradient.truncated_importance_weights(groups.old, groups.sampler, cap=CAP)
    tokens = {**VLLM, "vllm_importance_sampling_mode": "token_truncate"}
    theirs = scored(GRPOTrainer, stub(groups, loss_type="grpo", **tokens))
    theirs = theirs["importance_sampling_ratio"].view(B, K, T)[groups.mask]
    assert_close(theirs, weights[groups.mask], rtol=1e-12, atol=0)
    assert (theirs == CAP).any()
    assert (theirs < 1).any()
    sums = [part.masked_fill(~groups.mask, 0.0).sum(-1) for part in (groups.old, groups.sampler)]
    whole = {**VLLM, "vllm_importance_sampling_mode": "sequence_truncate"}
    theirs = scored(GRPOTrainer, stub(groups, loss_type="grpo", **whole))
    ours = policy_gradient.truncated_importance_weights(*sums, cap=CAP)
    assert_close(theirs["importance_sampling_ratio"].view(B, K), ours, rtol=1e-12, atol=0)
    dropped = {**VLLM, "vllm_importance_sampling_mode": "sequence_mask"}  # the default
    theirs = scored(GRPOTrainer, stub(groups, loss_type="grpo", **dropped))
    theirs = theirs["importance_sampling_ratio"].view(B, K)
    assert_close(theirs, ours.masked_fill(ours == CAP, 0.0), rtol=1e-12, atol=0)
    assert (theirs == 0).any()


def test_the_weights_multiply_the_losses_of_tokens(groups):
    groups.rewards = groups.rewards / 1e4
    theirs = trl_grpo(
        groups, "dr_grpo", scale_rewards="none", **VLLM,
        vllm_importance_sampling_mode="token_truncate",
    )  # fmt: skip
    advantages = policy_gradient.mean_advantages(groups.rewards).unsqueeze(-1).expand(B, K, T)
    tokens = policy_gradient.clipped_surrogate_loss(groups.policy, groups.old, advantages, **CLIPS)
    weights = policy_gradient.truncated_importance_weights(groups.old, groups.sampler, cap=CAP)
    ours = (weights * tokens).masked_fill(~groups.mask, 0.0).sum() / (B * K * T)
    agree(groups, ours, theirs)

"""Every formula under torch.func, torch.compile and a second derivative, beside plain autograd.

One table holds an example of each public function that draws nothing. What a function refuses in
eager mode by its values it lets pass inside a transform, where nobody can look at values; shapes
and dtypes are looked at everywhere.
"""

import inspect
import math
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from dpo_mini import closed_form, losses, policy_gradient, preferences

# torch itself scripts the forward derivatives of a few functions, when the first is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
MODULES = {
    "losses": losses,
    "closed_form": closed_form,
    "preferences": preferences,
    "policy_gradient": policy_gradient,
}
NO_FORMULAS = {
    "preferences.sample_bradley_terry",
    "preferences.sample_thurstone",
    "preferences.sample_plackett_luce",
    "preferences.nash_logps",
    "preferences.regularised_nash_logps",
    "preferences.ComparisonGraph",
    "preferences.comparison_graph",
    "policy_gradient.AdaptiveKLController",
    "policy_gradient.groups_with_difference",
}
NAN = math.nan


class Example(NamedTuple):
    tensors: tuple
    options: dict = MappingProxyType({})
    data: tuple = ()  # the tensors that take no gradient


def draws(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def tables(seed, *shape):
    return draws(seed, *shape).log_softmax(-1)


FOUR = tuple(-3 + draws(1, 4, 3))
LISTS = tuple(-3 + draws(2, 2, 3, 3))
TABLES = tuple(tables(3, 2, 2, 4))
REWARDS = draws(4, 2, 4)
PAIR = tuple(draws(5, 2, 3))
EPISODE = (draws(6, 2, 4), draws(7, 2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool())
STEPS = (draws(8, 2, 3), draws(9, 2, 3), draws(10, 2, 3))
ODDS = (-draws(11, 3).exp(), -draws(12, 3).exp())
TOKENS = -3 + draws(40, 2, 3, 4)
OLD_TOKENS = TOKENS + 0.2 * draws(41, 2, 3, 4)
LENGTHS = torch.tensor([[4, 2, 1], [3, 4, 4]])
COMPLETIONS = (TOKENS, OLD_TOKENS, draws(42, 2, 3).abs(), torch.arange(4) < LENGTHS[..., None])
# The cap holds everywhere: a weight that moves with log pi is no derivative of CISPO's loss.
CAPPED = (TOKENS, TOKENS - 1 - draws(43, 2, 3, 4).abs(), *COMPLETIONS[2:])
CLIPS = {"clip_eps": 0.1, "clip_eps_high": 0.3}
BETA = {"beta": 0.7}

EXAMPLES = {
    "losses.dpo_loss": Example(FOUR, BETA),
    "losses.cdpo_loss": Example(FOUR, {**BETA, "label_smoothing": 0.1}),
    "losses.rdpo_loss": Example(FOUR, {**BETA, "label_smoothing": 0.1}),
    "losses.ipo_loss": Example(FOUR, BETA),
    "losses.ipo_mean_loss": Example(FOUR, BETA),
    "losses.hinge_loss": Example(FOUR, BETA),
    "losses.exo_loss": Example(FOUR, {**BETA, "label_smoothing": 0.1}),
    "losses.discopop_loss": Example(FOUR, BETA),
    "losses.discopop_loss hot": Example(FOUR, {**BETA, "temperature": 2.0}),
    "losses.f_dpo_loss reverse_kl": Example(FOUR, {**BETA, "divergence": "reverse_kl"}),
    "losses.f_dpo_loss forward_kl": Example(FOUR, {**BETA, "divergence": "forward_kl"}),
    "losses.f_dpo_loss js": Example(FOUR, {**BETA, "divergence": "js"}),
    "losses.f_dpo_loss alpha": Example(FOUR, {**BETA, "divergence": "alpha", "alpha": -1.0}),
    "losses.chi_po_loss": Example(FOUR, BETA),
    "losses.chi_po_loss clipped": Example(FOUR, {**BETA, "max_reward": 0.7}),
    "losses.nca_loss": Example(FOUR, BETA),
    "losses.bco_loss": Example(FOUR, BETA),
    "losses.sppo_loss": Example(FOUR, BETA),
    "losses.apo_zero_loss": Example(FOUR, BETA),
    "losses.apo_down_loss": Example(FOUR, BETA),
    "losses.dpo_mean_loss": Example(FOUR, BETA),
    "losses.simpo_loss": Example(FOUR[:2], {**BETA, "gamma": 0.3}),
    "losses.cpo_loss": Example(FOUR[:2], BETA),
    "losses.orpo_loss": Example(ODDS, BETA),
    "losses.kto_loss": Example(
        (*FOUR[:2], torch.tensor([True, False, True])), {**BETA, "reference_point": 0.2}
    ),
    "losses.kto_reference_point": Example(FOUR[:2], data=(0, 1)),
    "losses.dro_loss": Example(FOUR, BETA),
    "losses.rebel_loss": Example((*FOUR, *PAIR), BETA),
    "losses.log_variance_loss": Example((*LISTS, draws(13, 3, 3)), BETA),
    "losses.plackett_luce_loss": Example(LISTS, BETA),
    "losses.best_of_k_loss": Example(LISTS, BETA),
    "losses.reward_model_loss": Example(PAIR),
    "closed_form.tilt": Example((TABLES[0], REWARDS)),
    "closed_form.log_partition": Example((TABLES[0], REWARDS), BETA),
    "closed_form.log_partition large beta": Example((TABLES[0], REWARDS), {"beta": 1e4}),
    "closed_form.optimal_logps": Example((TABLES[0], REWARDS), BETA),
    "closed_form.f_optimal_logps js": Example((TABLES[0], REWARDS), {**BETA, "divergence": "js"}),
    "closed_form.f_optimal_logps alpha": Example(
        (TABLES[0], REWARDS), {"beta": 2.0, "divergence": "alpha", "alpha": 1.4}
    ),
    "closed_form.f_optimal_logps chi_squared_kl": Example(
        (TABLES[0], REWARDS), {**BETA, "divergence": "chi_squared_kl"}
    ),
    "closed_form.implied_rewards": Example(TABLES, BETA),
    "closed_form.kl": Example(TABLES),
    "closed_form.expected_reward": Example((TABLES[0], REWARDS)),
    "closed_form.objective": Example((*TABLES, REWARDS), BETA),
    "closed_form.frontier": Example((TABLES[0], REWARDS), {"betas": [0.3, 2.0]}),
    "closed_form.best_of_n_logps": Example((TABLES[0], REWARDS), {"n": 5}, data=(1,)),
    "closed_form.total_variation": Example(TABLES),
    "closed_form.chi_squared": Example(TABLES),
    "closed_form.log_partition_markov": Example(
        (tables(14, 3), tables(15, 3, 3), draws(16, 3)), {**BETA, "n_tokens": 3}
    ),
    "preferences.bradley_terry_prob": Example(PAIR),
    "preferences.thurstone_prob": Example(PAIR),
    "preferences.bradley_terry_logp": Example(PAIR),
    "preferences.thurstone_logp": Example(PAIR),
    "preferences.davidson_probs": Example(PAIR, {"tie_weight": 0.7}),
    "preferences.davidson_logps": Example(PAIR, {"tie_weight": 0.7}),
    "preferences.plackett_luce_logp": Example(
        (draws(17, 2, 3), torch.tensor([[2, 0, 1], [0, 1, 2]]))
    ),
    "policy_gradient.reinforce_loss": Example(STEPS[:2], data=(1,)),
    "policy_gradient.unclipped_surrogate_loss": Example(STEPS, data=(1, 2)),
    "policy_gradient.clipped_surrogate_loss": Example(STEPS, {"clip_eps": 0.2}, data=(1, 2)),
    "policy_gradient.clipped_surrogate_loss high": Example(STEPS, CLIPS, data=(1, 2)),
    "policy_gradient.sequence_ratio_surrogate_loss": Example(
        (TOKENS[0], OLD_TOKENS[0], draws(44, 3), COMPLETIONS[3][0]), CLIPS, data=(1, 2)
    ),
    "policy_gradient.cispo_surrogate_loss": Example(
        (STEPS[0], STEPS[0] - 1 - STEPS[1].abs(), STEPS[2]), {"clip_eps_high": 1.5}, data=(1, 2)
    ),
    "policy_gradient.truncated_importance_weights": Example(PAIR, {"cap": 1.5}, data=(0, 1)),
    "policy_gradient.value_loss": Example(STEPS[:2], data=(1,)),
    "policy_gradient.clipped_value_loss": Example(STEPS, {"clip_eps": 0.4}, data=(1, 2)),
    "policy_gradient.mean_advantages": Example((REWARDS,)),
    "policy_gradient.leave_one_out_advantages": Example((REWARDS,)),
    "policy_gradient.group_normalised_advantages": Example((REWARDS,), {"eps": 0.01}),
    "policy_gradient.maxrl_advantages": Example((REWARDS.abs(),), data=(0,)),
    "policy_gradient.grpo_loss": Example(COMPLETIONS, CLIPS, data=(1, 2)),
    "policy_gradient.dr_grpo_loss": Example(COMPLETIONS, CLIPS, data=(1, 2)),
    "policy_gradient.dapo_loss": Example(COMPLETIONS, CLIPS, data=(1, 2)),
    "policy_gradient.rloo_loss": Example(COMPLETIONS, CLIPS, data=(1, 2)),
    "policy_gradient.maxrl_loss": Example(COMPLETIONS, CLIPS, data=(1, 2)),
    "policy_gradient.gspo_loss": Example(COMPLETIONS, CLIPS, data=(1, 2)),
    "policy_gradient.cispo_loss": Example(CAPPED, {"clip_eps_high": 1.5}, data=(1, 2)),
    "policy_gradient.optimal_baseline": Example((TABLES[0], REWARDS, draws(18, 2, 4) ** 2)),
    "policy_gradient.gae": Example(EPISODE, {"discount": 0.9, "lam": 0.8}, data=(0, 1)),
    "policy_gradient.whiten": Example((EPISODE[0], EPISODE[2])),
    "policy_gradient.entropy": Example((REWARDS,)),
    "policy_gradient.kl_k1": Example(STEPS[:2]),
    "policy_gradient.kl_k2": Example(STEPS[:2]),
    "policy_gradient.kl_k3": Example(STEPS[:2]),
}
OF_TABLES = [name for name in EXAMPLES if name.startswith("closed_form")]
OF_REWARDS = [name for name in EXAMPLES if name.startswith("preferences")]


def function_of(name):
    module, function = name.split()[0].split(".")
    return getattr(MODULES[module], function)


def caller(name):
    """The function of its tensors alone, whose result is one flat tensor."""
    function, options = function_of(name), EXAMPLES[name].options

    def call(*tensors):
        found = function(*tensors, **options)
        parts = found if isinstance(found, tuple) else (found,)
        return torch.cat([part.flatten() for part in parts])

    return call


def floats(tensors):
    return tuple(at for at, tensor in enumerate(tensors) if tensor.is_floating_point())


def example(name):
    return [tensor.clone() for tensor in EXAMPLES[name].tensors]


def exact(got, want):
    assert_close(got, want, rtol=1e-11, atol=1e-12)


def plain_jacobian(call, tensors):
    """d out / d tensor of each float tensor, one backward pass for each output."""
    at = floats(tensors)
    leaves = [tensor.requires_grad_() if i in at else tensor for i, tensor in enumerate(tensors)]
    out = call(*leaves)
    if not out.requires_grad:
        return [out.new_zeros(*out.shape, *tensors[i].shape) for i in at]
    learned = [leaves[i] for i in at]
    rows = [
        torch.autograd.grad(
            x, learned, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for x in out
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def total(call, size):
    """A sum with other weights for each output."""
    weights = 1 + torch.arange(size, dtype=torch.float64) / 7
    return lambda *tensors: (call(*tensors) * weights).sum()


def test_the_table_has_every_function():
    public = {
        f"{module}.{name}"
        for module, found in MODULES.items()
        for name in found.__all__
        if f"{module}.{name}" not in NO_FORMULAS
    }
    assert {name.split()[0] for name in EXAMPLES} == public


# --- torch.func ------------------------------------------------------------------------------


def batch_of(name):
    """Three examples: the rows as they are, reversed, and moved by one."""
    return [torch.stack([t, t.flip(0), t.roll(1, 0)]) for t in example(name)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_vmap_is_a_loop(name):
    call, batch = caller(name), batch_of(name)
    want = torch.stack([call(*row) for row in zip(*batch, strict=True)])
    exact(torch.func.vmap(call)(*batch), want)
    if len(batch) > 1:  # the first example beside all of the others' second tensors
        mixed = [batch[0][0], *batch[1:]]
        want = torch.stack([call(mixed[0], *row) for row in zip(*mixed[1:], strict=True)])
        in_dims = (None, *[0] * (len(batch) - 1))
        exact(torch.func.vmap(call, in_dims=in_dims)(*mixed), want)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_of_a_batch_by_vmap(name):
    call, batch = caller(name), batch_of(name)
    size = call(*example(name)).numel()
    at = floats(batch)
    got = torch.func.vmap(torch.func.grad(total(call, size), argnums=at))(*batch)
    for row, tensors in enumerate(zip(*batch, strict=True)):
        want = plain_jacobian(call, [t.clone() for t in tensors])
        weights = 1 + torch.arange(size, dtype=torch.float64) / 7
        for part, jacobian in zip(got, want, strict=True):
            exact(part[row], torch.tensordot(weights, jacobian, 1))


@pytest.mark.parametrize("name", EXAMPLES)
def test_jacobians_backward_and_forward_are_those_of_autograd(name):
    call, tensors = caller(name), example(name)
    at = floats(tensors)
    want = plain_jacobian(call, example(name))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for got, jacobian in zip(transform(call, argnums=at)(*tensors), want, strict=True):
            exact(got, jacobian)
    for i, jacobian in zip(at, want, strict=True):
        assert (jacobian != 0).any() == (i not in EXAMPLES[name].data)


@pytest.mark.parametrize("name", EXAMPLES)
def test_forward_mode_is_the_jacobian_times_the_tangent(name):
    call, tensors = caller(name), example(name)
    at = floats(tensors)
    tangents = tuple(draws(20 + i, *tensors[i].shape) for i in at)

    def of_floats(*inputs):
        given = dict(zip(at, inputs, strict=True))
        return call(*[given.get(i, tensor) for i, tensor in enumerate(tensors)])

    out, got = torch.func.jvp(of_floats, tuple(tensors[i] for i in at), tangents)
    exact(out, call(*tensors))
    want = plain_jacobian(call, example(name))
    pairs = zip(want, tangents, strict=True)
    exact(got, sum(torch.tensordot(j, t, t.dim()) for j, t in pairs))


@pytest.mark.parametrize("name", EXAMPLES)
def test_hessians_are_those_of_autograd_twice(name):
    call, tensors = caller(name), example(name)
    at = floats(tensors)
    value = total(call, call(*tensors).numel())
    got = torch.func.hessian(value, argnums=at)(*tensors)
    leaves = [t.requires_grad_() if i in at else t for i, t in enumerate(example(name))]
    learned = [leaves[i] for i in at]
    out = value(*leaves)
    slopes = [torch.zeros_like(leaf) for leaf in learned]
    if out.requires_grad:
        slopes = torch.autograd.grad(
            out, learned, create_graph=True, allow_unused=True, materialize_grads=True
        )
    for row, slope in zip(got, slopes, strict=True):
        parts = [torch.zeros(*slope.shape, *leaf.shape).double() for leaf in learned]
        if slope.requires_grad:
            rows = [
                torch.autograd.grad(
                    x, learned, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for x in slope.flatten()
            ]
            columns = zip(*rows, strict=True)
            parts = [
                torch.stack(found).view(*slope.shape, *leaf.shape)
                for found, leaf in zip(columns, learned, strict=True)
            ]
        for block, want in zip(row, parts, strict=True):
            exact(block, want)


@pytest.mark.parametrize(
    "name", [name for name in EXAMPLES if EXAMPLES[name].data != floats(EXAMPLES[name].tensors)]
)
def test_second_derivatives_are_differences_of_first_ones(name):
    """Over tables that stay tables: their logits are what moves."""
    call, tensors = caller(name), example(name)
    parameters = list(inspect.signature(function_of(name)).parameters)
    is_table = [
        "logps" in parameter and name in (*OF_TABLES, "policy_gradient.optimal_baseline")
        for parameter in parameters[: len(tensors)]
    ]
    at = [i for i in floats(tensors) if i not in EXAMPLES[name].data]

    def of_logits(*inputs):
        given = dict(zip(at, inputs, strict=True))
        full = [given.get(i, tensor) for i, tensor in enumerate(tensors)]
        return call(*[t.log_softmax(-1) if is_table[i] else t for i, t in enumerate(full)])

    inputs = tuple(tensors[i].clone().requires_grad_() for i in at)
    weights = draws(30, call(*tensors).numel()).requires_grad_()
    assert torch.autograd.gradcheck(of_logits, inputs)
    assert torch.autograd.gradgradcheck(of_logits, inputs, weights)


# --- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_whole_function_compiles(name, fresh_dynamo):
    call, tensors = caller(name), example(name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_(t.is_floating_point()) for t in tensors]
    got, want = compiled(*leaves), call(*leaves)
    exact(got, want)
    assert got.requires_grad == want.requires_grad
    if want.requires_grad:
        learned = [leaf for leaf in leaves if leaf.requires_grad]
        slopes = [
            torch.autograd.grad(out.sum(), learned, allow_unused=True, materialize_grads=True)
            for out in (got, want)
        ]
        exact(*slopes)


def test_groups_with_a_difference_inside_transforms(fresh_dynamo):
    """A verdict, which has no derivative: no row of the table."""
    rewards = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    want = torch.tensor([False, True])
    function = policy_gradient.groups_with_difference
    both = torch.func.vmap(function)(torch.stack([rewards, rewards.flip(0)]))
    assert torch.equal(both, torch.stack([want, want.flip(0)]))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards), want)


# --- what is refused, and where --------------------------------------------------------------


def spoilt(name, at, value):
    """The example with one value changed, in the place that counts in every function."""
    tensors = example(name)
    tensors[at].view(-1)[0] = value
    return tensors


EACH_FLOAT = [
    pytest.param(name, at, id=f"{name}-{at}")
    for name, given in EXAMPLES.items()
    for at in floats(given.tensors)
]


@pytest.mark.parametrize(("name", "at"), EACH_FLOAT)
def test_eager_mode_refuses_nan_and_infinity_by_name(name, at):
    argument = list(inspect.signature(function_of(name)).parameters)[at]
    for value in (NAN, math.inf):
        with pytest.raises(ValueError, match=argument):
            caller(name)(*spoilt(name, at, value))


@pytest.mark.parametrize("name", EXAMPLES)
def test_eager_mode_refuses_nan_among_what_requires_grad(name):
    tensors = spoilt(name, 0, NAN)
    tensors[0].requires_grad_()
    with pytest.raises(ValueError):
        caller(name)(*tensors)


@pytest.mark.parametrize("name", EXAMPLES)
def test_vmap_lets_nan_pass(name):
    batch = [torch.stack(pair) for pair in zip(spoilt(name, 0, NAN), example(name), strict=True)]
    got = torch.func.vmap(caller(name))(*batch)
    exact(got[1], caller(name)(*example(name)))
    assert torch.isnan(got[0]).any() or name == "closed_form.best_of_n_logps"


@pytest.mark.parametrize(
    "name",
    [
        "losses.dpo_loss",
        "losses.orpo_loss",
        "closed_form.kl",
        "closed_form.optimal_logps",
        "preferences.bradley_terry_prob",
        "policy_gradient.optimal_baseline",
        "policy_gradient.whiten",
        "policy_gradient.entropy",
    ],
)
def test_a_compiled_function_lets_nan_pass(name, fresh_dynamo):
    got = torch.compile(caller(name), fullgraph=True, backend="aot_eager")(*spoilt(name, 0, NAN))
    assert torch.isnan(got).any()


def misshapen(tensors):
    """One column fewer in the first tensor; none at all where it is alone."""
    first = tensors[0]
    return [first[..., :-1] if len(tensors) > 1 else first[..., :0], *tensors[1:]]


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes_and_dtypes_are_refused_everywhere(name):
    call, vmapped = caller(name), torch.func.vmap(caller(name))
    for bad in (misshapen, lambda tensors: [tensors[0].long(), *tensors[1:]]):
        with pytest.raises((ValueError, TypeError)):
            call(*bad(example(name)))
        with pytest.raises((ValueError, TypeError)):
            vmapped(*bad(batch_of(name)))


@pytest.mark.parametrize(
    "name",
    [
        "losses.dpo_loss",
        "losses.kto_loss",
        "closed_form.log_partition",
        "closed_form.frontier",
        "preferences.plackett_luce_logp",
        "policy_gradient.gae",
        "policy_gradient.entropy",
    ],
)
def test_shapes_are_refused_while_compiling(name, fresh_dynamo):
    compiled = torch.compile(caller(name), backend="aot_eager")
    with pytest.raises((ValueError, TypeError)):
        compiled(*misshapen(example(name)))


# --- a beta with a gradient ------------------------------------------------------------------

WITH_BETA = [name for name in OF_TABLES if "beta" in EXAMPLES[name].options]


def at_beta(name):
    """The function of beta alone."""
    given = {key: x for key, x in EXAMPLES[name].options.items() if key != "beta"}
    return lambda beta: function_of(name)(*example(name), beta=beta, **given)


@pytest.mark.parametrize("name", WITH_BETA)
def test_beta_may_be_a_tensor_of_one_number(name):
    value = EXAMPLES[name].options["beta"]
    beta = torch.tensor(value, dtype=torch.float64)
    exact(at_beta(name)(beta), at_beta(name)(value))
    betas = value * torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    want = torch.stack([at_beta(name)(x) for x in betas.tolist()])
    exact(torch.func.vmap(at_beta(name))(betas), want)
    slope = torch.func.jacfwd(at_beta(name))(beta)
    step = 1e-6 * value
    apart = at_beta(name)(value + step) - at_beta(name)(value - step)
    assert_close(slope, apart / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", WITH_BETA)
def test_a_bad_beta_is_refused_as_a_tensor_too(name):
    for bad in (0.0, -1.0, NAN, math.inf):
        with pytest.raises(ValueError, match="beta"):
            at_beta(name)(torch.tensor(bad, dtype=torch.float64))
    for bad in (torch.ones(2, dtype=torch.float64), torch.tensor(True)):
        with pytest.raises((ValueError, TypeError), match="beta"):
            at_beta(name)(bad)


@pytest.mark.parametrize("value", [0.05, 0.7, 20.0])
def test_derivatives_in_beta_by_hand(value):
    beta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    ref, rewards = TABLES[0], REWARDS
    best = closed_form.optimal_logps(ref, rewards, value)
    mean = (best.exp() * rewards).sum(-1)
    log_z = closed_form.log_partition(ref, rewards, beta)
    for row in range(2):
        slope = torch.autograd.grad(log_z[row], beta, retain_graph=True)[0]
        exact(slope, -mean[row] / value**2)  # minus the mean reward of pi*, over beta squared
    for row, column in ((0, 1), (1, 3)):
        got = closed_form.optimal_logps(ref, rewards, beta)[row, column]
        slope = torch.autograd.grad(got, beta)[0]
        exact(slope, -(rewards[row, column] - mean[row]) / value**2)
    objective = closed_form.objective(TABLES[1], ref, rewards, beta).sum()
    slope = torch.autograd.grad(objective, beta)[0]
    exact(slope, -closed_form.kl(TABLES[1], ref).sum())
    implied = closed_form.implied_rewards(TABLES[1], ref, beta)[0, 2]
    exact(torch.autograd.grad(implied, beta)[0], TABLES[1][0, 2] - ref[0, 2])
    # log Z of a chain depends on c / beta alone.
    initial, transitions, costs = example("closed_form.log_partition_markov")
    costs.requires_grad_()
    log_z = closed_form.log_partition_markov(initial, transitions, costs, beta, 3)
    of_beta, of_costs = torch.autograd.grad(log_z, (beta, costs))
    exact(of_beta, -(costs.detach() * of_costs).sum() / value)


# --- lists, arrays, and two dtypes -----------------------------------------------------------


@pytest.mark.parametrize("name", [*OF_TABLES, *OF_REWARDS])
def test_lists_and_arrays_are_taken_as_tables(name):
    call, want = caller(name), caller(name)(*example(name))
    exact(call(*[tensor.numpy() for tensor in example(name)]), want)
    single = call(*[t.float() if t.is_floating_point() else t for t in example(name)])
    arrays = [t.numpy() for t in example(name)]
    arrays = [a.astype("float32") if a.dtype.kind == "f" else a for a in arrays]
    got = call(*arrays)
    assert got.dtype == torch.float32
    assert torch.equal(got, single)
    got = call(*[tensor.tolist() for tensor in example(name)])
    assert got.dtype in (torch.float32, torch.float64)
    assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*OF_TABLES, *OF_REWARDS])
def test_ragged_lists_and_words_are_refused(name):
    argument = next(iter(inspect.signature(function_of(name)).parameters))
    rest = example(name)[1:]
    for bad in ([[0.0, 1.0], [0.0]], "abc", None):
        with pytest.raises((ValueError, TypeError), match=argument):
            caller(name)(bad, *rest)


@pytest.mark.parametrize("name", [name for name in OF_TABLES if len(EXAMPLES[name].tensors) > 1])
def test_tables_of_two_precisions_are_worked_out_in_the_better_one(name):
    tensors = example(name)
    for at in range(len(tensors)):
        narrow = [t.float() if i == at else t for i, t in enumerate(tensors)]
        wide = [t.double() for t in narrow]
        got = caller(name)(*narrow)
        assert got.dtype == torch.float64
        assert torch.equal(got, caller(name)(*wide))


@pytest.mark.parametrize("name", [*OF_TABLES, *OF_REWARDS])
def test_whole_numbers_are_refused_and_the_way_out_is_said(name):
    argument = next(iter(inspect.signature(function_of(name)).parameters))
    with pytest.raises((ValueError, TypeError), match=argument) as caught:
        caller(name)(example(name)[0].long(), *example(name)[1:])
    assert any(word in str(caught.value) for word in (".float()", ".double()", ".to("))

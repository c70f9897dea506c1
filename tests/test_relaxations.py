"""Relaxations against exact quadrature on a coin, the samples' laws, and worked numbers."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from dpo_mini.relaxations import (
    gumbel_softmax,
    harden,
    pass_through,
    rebar_surrogate,
    sample_conditional_logits,
    sample_perturbed_logits,
    straight_through,
    straight_through_gumbel_softmax,
    vector_quantise,
)

NAN, INF = float("nan"), float("inf")
LOGITS = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
N_DRAWS = 100_000


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def exact(got, want):
    assert_close(got, want, rtol=1e-12, atol=1e-12)


def within_five_errors(draws, want):
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - want).abs() < 5 * error).all()


def refusal(kind, call, *arguments, **options):
    with pytest.raises(kind) as caught:
        call(*arguments, **options)
    return str(caught.value)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def many(logits=LOGITS):
    return logits.expand(N_DRAWS, -1)


# --- the noise -------------------------------------------------------------------------------


def test_perturbed_logits_are_log_p_plus_gumbel_noise(generator):
    noise = sample_perturbed_logits(many(), generator=generator) - LOGITS.log_softmax(-1)
    within_five_errors(noise, 0.5772156649)
    within_five_errors((noise - 0.5772156649) ** 2, math.pi**2 / 6)
    within_five_errors((noise < 0.7).double(), math.exp(-math.exp(-0.7)))


def test_the_argmax_is_a_draw_from_p(generator):
    draws = harden(sample_perturbed_logits(many(), generator=generator))
    within_five_errors(draws, LOGITS.softmax(-1))


def test_conditional_logits_lead_to_the_given_sample(generator):
    for y in range(3):
        one_hot = torch.eye(3).double()[y].expand(N_DRAWS, -1)
        assert torch.equal(
            harden(sample_conditional_logits(many(), one_hot, generator=generator)), one_hot
        )


def test_noise_drawn_anew_has_the_law_of_the_noise(generator):
    """Draw y, then z given y: all together this is z again, first and second moments and a tail."""
    first = sample_perturbed_logits(many(), generator=generator)
    again = sample_conditional_logits(many(), harden(first), generator=generator)
    noise = again - LOGITS.log_softmax(-1)
    within_five_errors(noise, 0.5772156649)
    within_five_errors((noise - 0.5772156649) ** 2, math.pi**2 / 6)
    within_five_errors((noise < 0.7).double(), math.exp(-math.exp(-0.7)))
    within_five_errors((noise[:, 0] - 0.5772156649) * (noise[:, 2] - 0.5772156649), 0.0)


def test_given_the_sample_a_coins_difference_is_a_truncated_logistic(generator):
    theta = 0.7
    logits, heads = double([0.0, theta]), double([0.0, 1.0]).expand(N_DRAWS, -1)
    found = sample_conditional_logits(many(logits), heads, generator=generator)
    difference = found[:, 1] - found[:, 0]
    p = 1 / (1 + math.exp(-theta))
    for at in (0.2, 1.0, 3.0):
        below = (1 / (1 + math.exp(-(at - theta))) - (1 - p)) / p
        within_five_errors((difference < at).double(), below)


def test_the_gradients_of_the_noisy_logits():
    logits = double([[0.3, -0.2, 1.0], [0.0, 2.0, -1.0]]).requires_grad_()
    one_hot = double([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])

    def conditional(at):
        return sample_conditional_logits(at, one_hot, generator=seeded())

    assert gradcheck(lambda at: sample_perturbed_logits(at, generator=seeded()), logits)
    assert gradcheck(conditional, logits)
    assert gradcheck(lambda at: gumbel_softmax(at, temperature=0.7, generator=seeded()), logits)


def test_a_draw_of_zero_stays_finite(monkeypatch):
    """Exponential draws may underflow to 0 in low precision; log 0 must not get through."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.zero_())
    logits = torch.zeros(2, 3)
    assert torch.isfinite(sample_perturbed_logits(logits, generator=seeded())).all()
    one_hot = torch.eye(3)[:2]
    assert torch.isfinite(sample_conditional_logits(logits, one_hot, generator=seeded())).all()


# --- soft and hard samples -------------------------------------------------------------------


def test_a_soft_sample_is_a_point_of_the_simplex_near_a_corner_when_cold(generator):
    soft = gumbel_softmax(many(), temperature=1.0, generator=generator)
    exact(soft.sum(-1), torch.ones(N_DRAWS).double())
    assert (soft > 0).all()
    cold = gumbel_softmax(many(), temperature=1e-3, generator=seeded())
    hot = gumbel_softmax(many(), temperature=1e3, generator=seeded())
    assert (cold.amax(-1) > 0.999).double().mean() > 0.98
    assert (hot - 1 / 3).abs().max() < 0.02
    assert torch.equal(harden(cold), harden(hot))


def test_the_mean_of_a_soft_coin_is_its_quadrature(generator):
    theta, temperature = 0.7, 0.5
    x, weights = nodes()
    want = (weights * ((theta + x) / temperature).sigmoid()).sum()
    logits = double([0.0, theta]).expand(N_DRAWS, -1)
    soft = gumbel_softmax(logits, temperature=temperature, generator=generator)
    within_five_errors(soft[:, 1], want)


def test_straight_through_is_a_draw_with_the_gradient_of_the_probabilities(generator):
    logits = LOGITS.expand(N_DRAWS, -1).clone().requires_grad_()
    sample = straight_through(logits, generator=generator)
    assert ((sample == 0) | (sample == 1)).all()
    assert (sample.sum(-1) == 1).all()
    within_five_errors(sample.detach(), LOGITS.softmax(-1))
    weights = double([1.0, -2.0, 0.5])
    (slope,) = torch.autograd.grad((sample[0] * weights).sum(), logits)
    probs = LOGITS.softmax(-1)
    exact(slope[0], probs * (weights - (probs * weights).sum()))


@pytest.mark.parametrize("shape", [(3,), (2, 5, 3)])
def test_any_number_of_leading_dimensions(shape):
    logits, one_hot = LOGITS.expand(shape), double([0.0, 1.0, 0.0]).expand(shape)
    for sample in (
        straight_through(logits, generator=seeded()),
        straight_through_gumbel_softmax(logits, temperature=1.0, generator=seeded()),
        harden(sample_conditional_logits(logits, one_hot, generator=seeded())),
    ):
        assert sample.shape == shape
        assert (sample.sum(-1) == 1).all()
    soft = gumbel_softmax(logits, temperature=1.0, generator=seeded())
    exact(soft.sum(-1), torch.ones(shape[:-1]).double())
    again = logits.clone().requires_grad_()
    weights = double([1.0, -2.0, 0.5])
    (slope,) = torch.autograd.grad(
        (straight_through(again, generator=seeded()) * weights).sum(), again
    )
    probs = LOGITS.softmax(-1)
    exact(slope, (probs * (weights - (probs * weights).sum())).expand(shape))


def test_the_argmax_given_a_sample_has_its_law_in_every_row():
    """Rows with different logits keep their own probabilities: the losers' are log-sums."""
    logits = double([[0.3, -0.2, 1.0], [2.0, 0.0, -1.0]]).expand(N_DRAWS // 2, 2, 3)
    heads = double([1.0, 0.0, 0.0]).expand_as(logits)
    found = sample_conditional_logits(logits, heads, generator=seeded())
    # Of p and its competitor, each with Gumbel noise: E[e^-z] of the loser is 1/p_k + 1.
    log_p = logits.log_softmax(-1)
    within_five_errors((-found).exp()[..., 1], (-log_p).exp()[0, :, 1] + 1)


def test_hard_gumbel_softmax_has_the_soft_ones_gradient():
    weights = double([1.0, -2.0, 0.5])
    logits = double([[0.3, -0.2, 1.0], [0.0, 2.0, -1.0]]).requires_grad_()
    hard = straight_through_gumbel_softmax(logits, temperature=0.7, generator=seeded())
    soft = gumbel_softmax(logits, temperature=0.7, generator=seeded())
    assert torch.equal(hard.detach(), harden(soft))
    assert not torch.equal(hard.detach(), soft.detach())
    (found,) = torch.autograd.grad((hard * weights).sum(), logits)
    (want,) = torch.autograd.grad((soft * weights).sum(), logits)
    exact(found, want)


def test_the_first_of_equals_wins():
    assert torch.equal(
        harden(double([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])), double([[0, 1, 0], [1, 0, 0]])
    )
    assert harden(torch.rand(2, 4)).dtype == torch.float32


def test_passing_through_is_exact_and_moves_the_gradient():
    value, other = double([1e-17, 3.0]).requires_grad_(), double([1e9, -0.3]).requires_grad_()
    found = pass_through(value, other)
    assert torch.equal(found.detach(), value.detach())
    found.sum().backward()
    assert value.grad is None
    exact(other.grad, torch.ones(2).double())


# --- a coin, exactly -------------------------------------------------------------------------


def nodes():
    """Trapezoid nodes and weights for a logistic variable, `[n]`: exact to rounding."""
    x = torch.arange(-40.0, 40.0, 0.04, dtype=torch.float64)
    return x, x.sigmoid() * (-x).sigmoid() * 0.04


def square(point):
    return (point[..., 1] - 0.45) ** 2


def coin_gradients(theta, *, temperature, scale):
    """REBAR's gradient for heads and tails at every node, `[2, n]`, and their weights.

    Given heads the difference of the perturbed logits is log(1 + e^v (1 + e^theta)) with v
    logistic; given tails it is the mirror image. Both z and z given the sample have that law, but
    z moves with theta as theta + noise does.
    """
    v, weights = nodes()
    sign = double([[1.0], [-1.0]])
    at = torch.full((2, len(v)), theta, dtype=torch.float64, requires_grad=True)
    conditional = sign * torch.logaddexp(torch.zeros_like(v), v + (sign * at).exp().log1p())
    perturbed = pass_through(conditional, at)
    zero = torch.zeros_like(at)
    surrogate = rebar_surrogate(
        square,
        torch.stack([zero, at], -1),
        torch.stack([zero, perturbed], -1),
        torch.stack([zero, conditional], -1),
        temperature=temperature,
        scale=scale,
    )
    (found,) = torch.autograd.grad(surrogate.sum(), at)
    return found, (sign * at.detach()).sigmoid() * weights


@pytest.mark.parametrize("theta", [0.0, 1.3, -2.0])
@pytest.mark.parametrize("temperature", [0.3, 0.5, 2.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.6])
def test_rebar_is_unbiased_on_a_coin_by_quadrature(theta, temperature, scale):
    found, weights = coin_gradients(theta, temperature=temperature, scale=scale)
    p = 1 / (1 + math.exp(-theta))
    assert abs((weights * found).sum().item() - p * (1 - p) * (0.55**2 - 0.45**2)) < 1e-12


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.6])
def test_rebar_gives_back_what_it_takes(temperature, scale, generator):
    """A hundred thousand draws of a three-sided die: unbiased for every temperature and scale."""
    values = double([1.0, -0.5, 0.3])

    def function(point):
        return ((point - 0.45) ** 2 * values).sum(-1)

    logits = LOGITS.expand(N_DRAWS, -1).clone().requires_grad_()
    perturbed = sample_perturbed_logits(logits, generator=generator)
    conditional = sample_conditional_logits(logits, harden(perturbed), generator=generator)
    surrogate = rebar_surrogate(
        function, logits, perturbed, conditional, temperature=temperature, scale=scale
    )
    (draws,) = torch.autograd.grad(surrogate.sum(), logits)
    at = LOGITS.clone().requires_grad_()
    corners = function(torch.eye(3).double())
    (want,) = torch.autograd.grad((at.softmax(-1) * corners).sum(), at)
    within_five_errors(draws, want)


def test_rebar_at_a_node_by_hand():
    """Both logits of a coin at one draw: the three terms of Eq. 4, with numbers."""
    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    tau, eta, w, v = 0.5, 0.7, 1.1, -0.3
    z, z_again = theta + w, (1 + math.exp(v) * (1 + theta.exp())).log()
    zero = torch.zeros_like(theta)
    surrogate = rebar_surrogate(
        square,
        torch.stack([zero, theta]),
        torch.stack([zero, z]),
        torch.stack([zero, z_again]),
        temperature=tau,
        scale=eta,
    )
    (found,) = torch.autograd.grad(surrogate, theta)

    def soft(z):
        return 1 / (1 + math.exp(-z / tau))

    def slope(z, dz):  # d/dtheta (soft(z) - .45)^2
        return 2 * (soft(z) - 0.45) * soft(z) * (1 - soft(z)) / tau * dz

    p = 1 / (1 + math.exp(-0.4))
    again = math.log(1 + math.exp(v) * (1 + math.exp(0.4)))
    d_again = math.exp(v) * math.exp(0.4) / (1 + math.exp(v) * (1 + math.exp(0.4)))
    weight = 0.55**2 - eta * (soft(again) - 0.45) ** 2
    want = weight * (1 - p) + eta * slope(1.5, 1.0) - eta * slope(again, d_again)
    assert math.isclose(found.item(), want, rel_tol=1e-12)


# --- vector quantisation ---------------------------------------------------------------------

CODEBOOK = double([[0.0, 0.0], [3.0, 4.0], [-1.0, 1.0]])


def test_quantisation_by_hand():
    inputs = double([[[0.5, 0.0], [3.0, 3.0]], [[-2.0, 2.0], [0.0, -9.0]]]).requires_grad_()
    codebook = CODEBOOK.clone().requires_grad_()
    found = vector_quantise(inputs, codebook)
    assert found.indices.tolist() == [[0, 1], [2, 0]]
    assert torch.equal(found.quantised.detach(), CODEBOOK[found.indices])
    exact(found.codebook_loss.detach(), double([[0.25, 1.0], [2.0, 81.0]]))
    exact(found.commitment_loss.detach(), double([[0.25, 1.0], [2.0, 81.0]]))
    weights = torch.arange(8).double().view(2, 2, 2)

    def gradients(value):
        return torch.autograd.grad(value.sum(), [inputs, codebook], allow_unused=True)

    slopes = gradients(found.quantised * weights)
    exact(slopes[0], weights)
    assert slopes[1] is None
    slopes = gradients(found.codebook_loss)
    assert slopes[0] is None
    exact(slopes[1], double([[-1.0, 18.0], [0.0, 2.0], [2.0, -2.0]]))
    slopes = gradients(found.commitment_loss)
    exact(slopes[0], 2 * (inputs.detach() - CODEBOOK[found.indices]))
    assert slopes[1] is None


def test_the_nearest_code_is_that_of_cdist(generator):
    inputs = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    codebook = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    found = vector_quantise(inputs, codebook)
    assert torch.equal(found.indices, torch.cdist(inputs, codebook).argmin(1))


def test_the_true_gradient_through_the_code_is_zero():
    """Moving an input a little moves the code not at all."""
    inputs = double([[0.5, 0.0], [3.0, 3.0]])
    for step in (1e-3, -1e-3):
        moved = vector_quantise(inputs + step, CODEBOOK).quantised
        assert torch.equal(moved, vector_quantise(inputs, CODEBOOK).quantised)


# --- what is refused -------------------------------------------------------------------------


def test_bad_logits_are_refused():
    calls = [
        lambda logits: sample_perturbed_logits(logits, generator=seeded()),
        lambda logits: sample_conditional_logits(logits, double([0, 1]), generator=seeded()),
        lambda logits: gumbel_softmax(logits, temperature=1.0, generator=seeded()),
        lambda logits: straight_through(logits, generator=seeded()),
    ]
    for call in calls:
        assert refusal(ValueError, call, double([0.0, INF])) == "`logits` must be finite, got inf"
        want = "`logits` must be [..., V], got a tensor of no dimension"
        assert refusal(ValueError, call, double(1.0)) == want
        got = refusal(ValueError, call, torch.tensor([1, 2]))
        assert got == "`logits` must have a floating dtype (.double() makes one), got torch.int64"


def test_a_missing_generator_is_refused():
    want = "`generator` must be a torch.Generator, got NoneType"
    assert refusal(TypeError, sample_perturbed_logits, LOGITS, generator=None) == want
    one_hot = double([0.0, 0.0, 1.0])
    assert refusal(TypeError, sample_conditional_logits, LOGITS, one_hot, generator=None) == want


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_a_bad_temperature_is_refused(temperature):
    want = f"`temperature` must be a finite number > 0, got {temperature}"
    options = {"temperature": temperature, "generator": seeded()}
    assert refusal(ValueError, gumbel_softmax, LOGITS, **options) == want
    assert refusal(ValueError, straight_through_gumbel_softmax, LOGITS, **options) == want
    got = refusal(
        ValueError,
        rebar_surrogate,
        square,
        LOGITS,
        LOGITS,
        LOGITS,
        temperature=temperature,
        scale=1.0,
    )
    assert got == want


def test_what_is_not_one_hot_is_refused():
    want = "`one_hot` must have rows of zeros and one 1, got another row"
    for row in ([0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.5, 0.5, 0.0], [2.0, -1.0, 0.0], [NAN, 1, 0]):
        got = refusal(
            ValueError, sample_conditional_logits, LOGITS, double(row), generator=seeded()
        )
        assert got == want
    got = refusal(
        ValueError, sample_conditional_logits, LOGITS, double([0.0, 1.0]), generator=seeded()
    )
    assert got == "`one_hot` must have shape [3] like `logits`, got [2]"


def test_bad_arguments_of_rebar_are_refused():
    def call(**changes):
        point = {"logits": LOGITS, "perturbed": LOGITS, "conditional": LOGITS}
        settings = {"function": lambda point: point.sum(-1), "temperature": 1.0, "scale": 1.0}
        return rebar_surrogate(**{**settings, **point, **changes})

    assert call().shape == ()
    for name in ("logits", "perturbed", "conditional"):
        got = refusal(ValueError, call, **{name: double([0.0, NAN, 0.0])})
        assert got == f"`{name}` must be finite, got nan"
    for name in ("perturbed", "conditional"):
        got = refusal(ValueError, call, **{name: LOGITS[:2]})
        assert got == f"`{name}` must have shape [3] like `logits`, got [2]"
    assert refusal(ValueError, call, scale=INF) == "`scale` must be a finite number, got inf"
    got = refusal(ValueError, call, conditional=-LOGITS)
    assert got == "`conditional` must have the argmax of `perturbed`, got another one"
    got = refusal(ValueError, call, function=lambda point: point)
    assert got == "`function` must return shape [], got [3]"
    call(conditional=double([1.0, 0.0, 1.0]))  # a tie, as rounding may make one, is no other sample


def test_bad_values_for_harden_and_pass_through_are_refused():
    got = refusal(ValueError, harden, torch.tensor([1, 2]))
    assert got == "`soft` must have a floating dtype (.double() makes one), got torch.int64"
    got = refusal(ValueError, pass_through, LOGITS, LOGITS[:2])
    assert got == "`gradient_of` must have shape [3] like `value`, got [2]"


def test_bad_values_to_quantise_are_refused():
    refused = [
        (
            (double([1.0, 2.0, 3.0]), CODEBOOK),
            "`inputs` must be [..., 2] like `codebook`, got shape [3]",
        ),
        ((double(1.0), CODEBOOK), "`inputs` must be [..., 2] like `codebook`, got shape []"),
        ((double([1.0, NAN]), CODEBOOK), "`inputs` must be finite, got nan"),
        ((double([1.0, 2.0]), CODEBOOK * INF), "`codebook` must be finite, got nan"),
        ((double([1.0, 2.0]), CODEBOOK[0]), "`codebook` must be a non-empty [K, D], got shape [2]"),
        (
            (torch.ones(2), CODEBOOK),
            "`codebook` must have dtype torch.float32 like `inputs`, "
            "got torch.float64: write codebook.to(torch.float32)",
        ),
        (
            (torch.ones(2).long(), CODEBOOK),
            "`inputs` must have a floating dtype (.double() makes one), got torch.int64",
        ),
    ]
    for arguments, want in refused:
        assert refusal(ValueError, vector_quantise, *arguments) == want


# --- float32 and half precision ------------------------------------------------------------------


def test_noise_that_leads_to_a_likely_sample_is_finite_however_unlikely_the_others():
    """In float32 1 / p overflows for p < e^-88. The float64 path draws the same uniform numbers."""
    for gap in (50.0, 89.0, 200.0, 1e4):
        logits = torch.tensor([[0.0, -gap, 1.0 - gap]], dtype=torch.float32, requires_grad=True)
        one_hot = torch.tensor([[1.0, 0.0, 0.0]])
        got = sample_conditional_logits(logits, one_hot, generator=seeded())
        (slope,) = torch.autograd.grad(got[0, 1], logits)
        assert got.isfinite().all()
        assert got.argmax() == 0
        # -log(E_k / p_k + E_y) with E_k / p_k far above E_y: log p_k - log E_k, of slope 1.
        noise = torch.empty(1, 3).exponential_(generator=seeded())
        assert_close(got[0, 1], -gap - noise[0, 1].log(), rtol=1e-5, atol=1e-5)
        assert_close(slope, torch.tensor([[-1.0, 1.0, 0.0]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    logits, one_hot = LOGITS.to(dtype), torch.tensor([0.0, 0.0, 1.0], dtype=dtype)
    calls = {
        "perturbed": lambda x, y: sample_perturbed_logits(x, generator=seeded()),
        "conditional": lambda x, y: sample_conditional_logits(x, y, generator=seeded()),
        "gumbel": lambda x, y: gumbel_softmax(x, temperature=0.3, generator=seeded()),
        "straight": lambda x, y: straight_through(x, generator=seeded()),
        "both": lambda x, y: straight_through_gumbel_softmax(
            x, temperature=0.3, generator=seeded()
        ),
        "quantised": lambda x, y: vector_quantise(x, torch.stack([y, x + 1]))[2],
        "rebar": lambda x, y: rebar_surrogate(
            lambda s: (s * s).sum(-1), x, x, x, temperature=0.5, scale=0.3
        ),
    }
    for name, call in calls.items():
        got = call(logits, one_hot)
        assert got.dtype == dtype, name
        if name != "rebar":  # its function is the caller's, and is given the caller's dtype
            assert torch.equal(got, call(logits.float(), one_hot.float()).to(dtype)), name
    assert type(vector_quantise(logits, one_hot[None])).__name__ == "Quantised"


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`soft` must be \[..., V\]"):
        harden(torch.tensor(1.0))
    with pytest.raises(TypeError, match="`scale` must be a number, got NoneType"):
        rebar_surrogate(lambda s: s.sum(-1), LOGITS, LOGITS, LOGITS, temperature=1.0, scale=None)
    with pytest.raises(ValueError, match="`logits` must be a dense tensor"):
        gumbel_softmax(LOGITS.to_sparse(), temperature=1.0, generator=seeded())

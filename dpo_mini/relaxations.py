r"""Other ways through a discrete sample: Gumbel-softmax, straight-through, REBAR, quantisation.

Each returns something that autograd can go through. `logits` `[..., V]` name a distribution,
`softmax(logits)`; a sample is a one-hot vector `[..., V]`. In the formulas $g$ are Gumbel draws,
$-\log(-\log u)$ with u uniform, and $z = \log p + g$, whose largest entry is distributed as p.
Half precision is drawn and computed in float32 and rounded once, at the end. A generator that does
not lie on the device of `logits` is refused.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mini._arguments import (
    check_alike,
    check_device,
    check_finite,
    check_floats,
    check_generator,
    check_number,
    check_positive,
    values_visible,
)
from dpo_mini._numerics import dtype_of_input, widen

__all__ = [
    "sample_perturbed_logits",
    "sample_conditional_logits",
    "gumbel_softmax",
    "straight_through",
    "straight_through_gumbel_softmax",
    "harden",
    "pass_through",
    "rebar_surrogate",
    "Quantised",
    "vector_quantise",
]


def sample_perturbed_logits(logits: Tensor, *, generator: torch.Generator) -> Tensor:
    r"""$z = \log p + g$: its argmax is a draw from p (the Gumbel-max trick).

    Args:
      logits: `[..., V]`, finite.
      generator: draws the noise.
    Returns:
      `[..., V]`, differentiable in `logits`.
    Raises:
      ValueError: a logit is not finite.
    Source: Maddison et al. 2014, "A* sampling", arXiv:1411.0030.
    """
    _check_logits(logits)
    return _perturbed(widen(logits), generator)


def sample_conditional_logits(
    logits: Tensor, one_hot: Tensor, *, generator: torch.Generator
) -> Tensor:
    r"""$\tilde z \sim z \mid \arg\max z = y$: noise drawn anew that leads to the same sample.

    With E standard exponential, $\tilde z_y = -\log E_y$ and
    $\tilde z_k = -\log(E_k/p_k + E_y)$ for the others.

    Args:
      logits: `[..., V]`, finite.
      one_hot: `[..., V]`, the sample y.
      generator: draws the noise.
    Returns:
      `[..., V]`, differentiable in `logits`; its argmax is y.
    Raises:
      ValueError: shapes or dtypes differ, a logit is not finite, or `one_hot` is not one-hot.
    Source: Tucker et al. 2017 (REBAR), appendix, arXiv:1703.07370; Grathwohl et al. 2018 (RELAX),
      appendix B, arXiv:1711.00123.
    """
    _check_one_hot(logits, one_hot)
    logps, sample = widen(logits).log_softmax(-1), widen(one_hot)
    noise = _exponentials(logps, generator)
    log_top = (noise * sample).sum(-1, keepdim=True).log()  # log E_y
    # In logarithms, for 1 / p_k overflows where p_k is small.
    others = torch.logaddexp(noise.log() - logps, log_top)
    return -torch.where(sample == 1, log_top, others)


def gumbel_softmax(logits: Tensor, *, temperature: float, generator: torch.Generator) -> Tensor:
    r"""A soft sample, $\mathrm{softmax}(z/\tau)$: near one-hot for small tau, biased for all.

    Args:
      logits: `[..., V]`, finite.
      temperature: tau > 0.
      generator: draws the noise.
    Returns:
      `[..., V]`, positive, summing to 1; differentiable in `logits`.
    Raises:
      ValueError: `temperature <= 0`, or a logit is not finite.
    Source: Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712.
    """
    check_positive("temperature", temperature)
    _check_logits(logits)
    return _soft(_perturbed(widen(logits), generator), temperature)


def straight_through(logits: Tensor, *, generator: torch.Generator) -> Tensor:
    r"""A one-hot sample whose gradient is that of the probabilities: $y + p - \mathrm{sg}(p)$.

    Args:
      logits: `[..., V]`, finite.
      generator: draws the sample.
    Returns:
      `[..., V]`, exactly one-hot.
    Raises:
      ValueError: a logit is not finite.
    Source: Bengio et al. 2013, arXiv:1308.3432.
    """
    _check_logits(logits)
    perturbed = _perturbed(widen(logits), generator)
    return pass_through(harden(perturbed), widen(logits).softmax(-1))


def straight_through_gumbel_softmax(
    logits: Tensor, *, temperature: float, generator: torch.Generator
) -> Tensor:
    """A one-hot sample whose gradient is that of the soft sample with the same noise.

    Args and errors are those of `gumbel_softmax`.

    Returns:
      `[..., V]`, exactly one-hot.
    Source: Jang et al. 2017, section 2.2, arXiv:1611.01144.
    """
    check_positive("temperature", temperature)
    _check_logits(logits)
    soft = _soft(_perturbed(widen(logits), generator), temperature)
    return pass_through(harden(soft), soft)


def harden(soft: Tensor) -> Tensor:
    """One-hot of the largest entry of `soft` `[..., V]`; the first of equals. Without gradient.

    Raises:
      ValueError: `soft` is empty, or not floating.
    """
    check_floats("[...]", soft=soft)
    if soft.dim() == 0:
        raise ValueError("`soft` must be [..., V], got a tensor of no dimension")
    return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)


def pass_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """Exactly `value` forward; backward, the gradient goes to `gradient_of` as if it were that.

    Raises:
      ValueError: shapes or dtypes differ.
    """
    check_floats("[...]", value=value, gradient_of=gradient_of)
    return value.detach() + (gradient_of - gradient_of.detach())  # the bracket is exactly 0


def rebar_surrogate(
    function: Callable[[Tensor], Tensor],
    logits: Tensor,
    perturbed: Tensor,
    conditional: Tensor,
    *,
    temperature: float,
    scale: float,
) -> Tensor:
    r"""A surrogate whose gradient is REBAR: the score function with a relaxation as baseline.

    $[f(y) - \eta f(\tilde s)]\,\nabla\log p(y) + \eta\,\nabla f(s) - \eta\,\nabla f(\tilde s)$
    with $s = \mathrm{softmax}(z/\tau)$ and $\tilde s = \mathrm{softmax}(\tilde z/\tau)$. What the
    baseline takes away in the mean, the last two terms give back: unbiased for every tau and eta.

    Args:
      function: f, from `[..., V]` to `[...]`, defined between the one-hot vectors too. Gradients of
        weights of its own are not those of E[f(y)].
      logits: `[..., V]`, finite.
      perturbed: `[..., V]`, z of `sample_perturbed_logits(logits)`, differentiable in `logits`.
      conditional: `[..., V]`, of `sample_conditional_logits(logits, harden(perturbed))`, likewise.
      temperature: tau > 0.
      scale: eta, finite; 0 is the plain score function.
    Returns:
      `[...]`; the gradient of its mean over samples is an estimate of that of E[f(y)].
    Raises:
      ValueError: `temperature <= 0`; shapes or dtypes differ; a value is not finite; the argmax of
        `conditional` is another sample than that of `perturbed`; f returns another shape.
    Source: Tucker et al. 2017, Eq. 4, arXiv:1703.07370.
    """
    check_positive("temperature", temperature)
    check_number("scale", scale)
    check_floats("[...]", logits=logits, perturbed=perturbed, conditional=conditional)
    check_finite(logits=logits, perturbed=perturbed, conditional=conditional)
    sample = harden(perturbed)
    if (
        values_visible(conditional)
        and not ((conditional == conditional.amax(-1, keepdim=True)) | (sample == 0)).all()
    ):
        raise ValueError("`conditional` must have the argmax of `perturbed`, got another one")
    log_prob = (widen(logits).log_softmax(-1) * widen(sample)).sum(-1)
    soft_samples = (_soft(widen(z), temperature).to(logits) for z in (perturbed, conditional))
    hard, soft, soft_again = (widen(function(y)) for y in (sample, *soft_samples))
    if hard.shape != log_prob.shape:
        got, want = list(hard.shape), list(log_prob.shape)
        raise ValueError(f"`function` must return shape {want}, got {got}")
    weight = (hard - scale * soft_again).detach()
    return weight * log_prob + scale * (soft - soft_again)


class Quantised(NamedTuple):
    """What `vector_quantise` returns."""

    quantised: Tensor
    """`[..., D]`: the nearest code, whose gradient goes straight to `inputs`."""
    indices: Tensor
    """`[...]` int64: which code."""
    codebook_loss: Tensor
    """`[...]`: squared distance, gradient to the codebook alone."""
    commitment_loss: Tensor
    """`[...]`: squared distance, gradient to `inputs` alone."""


def vector_quantise(inputs: Tensor, codebook: Tensor) -> Quantised:
    r"""The nearest code, with the straight-through gradient and the two losses of a VQ-VAE.

    The true gradient of the code with respect to `inputs` is 0 wherever it exists: moving an input
    a little does not change which code is nearest.

    Args:
      inputs: `[..., D]`, finite.
      codebook: `[K, D]`, finite.
    Returns:
      `Quantised(quantised, indices, codebook_loss, commitment_loss)`.
    Raises:
      ValueError: D or dtype differ, or a value is not finite.
    Source: van den Oord et al. 2017, Eq. 3, arXiv:1711.00937.
    """
    check_floats("[...]", inputs=inputs)
    check_floats("[K, D]", codebook=codebook)
    if inputs.dim() == 0 or inputs.shape[-1] != codebook.shape[1]:
        got, want = list(inputs.shape), codebook.shape[1]
        raise ValueError(f"`inputs` must be [..., {want}] like `codebook`, got shape {got}")
    check_alike("inputs", inputs, codebook=codebook)
    check_finite(inputs=inputs, codebook=codebook)
    inputs, codebook = widen(inputs), widen(codebook)
    distances = (inputs.detach().unsqueeze(-2) - codebook.detach()).square().sum(-1)  # [..., K]
    indices = distances.argmin(-1)
    codes = codebook[indices]  # [..., D]
    return Quantised(
        pass_through(codes, inputs),
        indices,
        (codes - inputs.detach()).square().sum(-1),
        (inputs - codes.detach()).square().sum(-1),
    )


def _perturbed(logits: Tensor, generator: torch.Generator) -> Tensor:
    return logits.log_softmax(-1) - _exponentials(logits, generator).log()


def _exponentials(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Standard exponential draws like `logits`: positive, so that their logarithm is finite."""
    check_generator(generator)
    check_device("`logits`", logits.device, generator=generator)
    draws = torch.empty_like(logits).exponential_(generator=generator)
    return draws.clamp(min=torch.finfo(logits.dtype).tiny)


def _soft(scores: Tensor, temperature: float) -> Tensor:
    return (scores / temperature).softmax(-1)


def _check_logits(logits: Tensor) -> None:
    check_floats("[...]", logits=logits)
    if logits.dim() == 0:
        raise ValueError("`logits` must be [..., V], got a tensor of no dimension")
    check_finite(logits=logits)


def _check_one_hot(logits: Tensor, one_hot: Tensor) -> None:
    _check_logits(logits)
    check_floats("[...]", logits=logits, one_hot=one_hot)
    if not values_visible(one_hot):
        return
    if not (((one_hot == 0) | (one_hot == 1)).all() and (one_hot.sum(-1) == 1).all()):
        raise ValueError("`one_hot` must have rows of zeros and one 1, got another row")


for _name in __all__:
    if not isinstance(globals()[_name], type):
        globals()[_name] = dtype_of_input(globals()[_name])


def __dir__() -> list[str]:
    return __all__

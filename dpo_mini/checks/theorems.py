"""What the judges of several chapters have in common: theorems, and what these are stated with.

A theorem here takes what an answer gave and raises AssertionError, with one sentence, where it does
not hold. The rest makes instances whose truth is known beforehand: the optimal policy of rewards
that we chose, the rewards for which a policy that we chose is optimal, all that n draws can be.
Like `homework`, whose `agree` it uses, it imports nothing of the library that it judges.
"""

from itertools import product

import torch
from torch import Tensor

from dpo_mini.checks.homework import agree

# --- theorems --------------------------------------------------------------------------------


def sum_to_one(probs: Tensor, sentence: str = "your probabilities do not sum to 1") -> None:
    """The probabilities `[Y]` are those of everything that can happen."""
    agree(probs.sum(), 1.0, sentence)


def differ_alike(got: Tensor, wanted: Tensor, sentence: str) -> None:
    """Two entries of `got` `[Y]` differ as those of `wanted` do: up to one constant both agree."""
    agree(got - got[0], wanted - wanted[0], sentence)


def no_slope(value: Tensor, at: Tensor, sentence: str) -> None:
    """`value`, computed from `at`, is stationary there: by autograd its gradient is 0."""
    (slopes,) = torch.autograd.grad(value, at)
    agree(slopes, 0.0, sentence)


# --- what they are stated with ---------------------------------------------------------------


def optimum(ref_probs: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """The policy `[..., Y]` that is best for these rewards: pi_ref exp(r / beta) / Z."""
    return torch.softmax(ref_probs.log() + rewards / beta, -1)


def implied_rewards(probs: Tensor, ref_probs: Tensor, beta: float) -> Tensor:
    """Rewards `[..., Y]` for which `probs` is best, with a Z of 1: beta log(pi / pi_ref)."""
    return beta * (probs / ref_probs).log()


def kl(probs: Tensor, other_probs: Tensor) -> Tensor:
    """KL(probs || other_probs) in nats, `[...]`; an answer that is never given adds 0."""
    return torch.xlogy(probs, probs / other_probs).sum(-1)


def objective(probs: Tensor, ref_probs: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """J `[...]`: the expected reward minus beta times the KL to the reference."""
    return (probs * rewards).sum(-1) - beta * kl(probs, ref_probs)


def every_draw(probs: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """All that `n` draws from `probs` can be: which answers `[N, n]`, and how likely `[N]`."""
    drawn = torch.tensor(list(product(range(len(probs)), repeat=n)))
    return drawn, probs[drawn].prod(1)

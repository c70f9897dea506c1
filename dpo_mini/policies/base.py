"""What every policy answers, and the simplest policy: a table of logits for a bandit."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dpo_mini._arguments import (
    check_count,
    check_device,
    check_finite,
    check_floats,
    check_indices,
    check_integers,
    check_rows,
    values_visible,
)
from dpo_mini.logps import PAD, completion_mask, sum_over_tokens, token_logps

KVCache = list[tuple[Tensor, Tensor]]
"""Keys and values of all S tokens of N texts, one pair `[N, H, S, D/H]` per layer."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The N distinct prefixes of a batch, one node each; `rollout.prefix_tree` makes it.

    A prefix is a prompt and the first 0, 1, ... tokens of a completion.

    Args:
      tokens: `[N]` int64, the last token of each prefix; of a prompt alone, its number. The nodes
        of prompts come first.
      depths: `[N]`, how many tokens follow the prompt, in 0..S-1.
      ancestors: `[N, S]`, the nodes on the way to each node: the prompt's first, the node itself at
        its depth. What stands behind that is not used.
      nodes: `[B, S]`, the node of each row of the batch after 0, 1, ... tokens; 0 where the row has
        ended.
    """

    tokens: Tensor
    depths: Tensor
    ancestors: Tensor
    nodes: Tensor


class Sizes(Protocol):
    """What a policy needs to know of its task."""

    @property
    def prompts(self) -> Tensor:
        """`[X]`, the numbers of the prompts."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_tokens(self) -> int:
        """T."""

    @property
    def end_token(self) -> int | None:
        """What ends a completion, or None where all have T tokens."""


class Scorer(Protocol):
    """Anything that scores completions: a `Policy`, or a wrapper around any other model."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Its weights; tokens are sent to the device of the first."""

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probability of each token of `completions` `[B, T]`, `[B, T]` nats, 0 on padding.

        `prompts` are what the model wants: `[B]` numbers for a `Policy`, `[B, P]` tokens for a
        `CausalLMPolicy`.
        """


class Policy(nn.Module):
    """What every policy shares: its sizes, and log-probabilities of given completions.

    A subclass sets the four sizes and computes the logits of the next token in `forward`.
    """

    n_prompts: int
    vocab_size: int
    max_tokens: int
    end_token: int | None

    def extra_repr(self) -> str:
        """What `print(policy)` says of its sizes, beside its layers."""
        names = ("n_prompts", "vocab_size", "max_tokens", "end_token")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of `tokens`.

        Args:
          tokens: `[B, S]` int64, the number of a prompt, then S - 1 tokens of a completion.
        Returns:
          `[B, S, V]`.
        Raises:
          NotImplementedError: a subclass says how.
        """
        raise NotImplementedError

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probability of each completion token, each row read on its own.

        Args:
          prompts: `[B]` int64, which prompt, in 0..X-1.
          completions: `[B, T]` int64, padded with `PAD` after the end token.
        Returns:
          `[B, T]`, nats; 0 on padding.
        Raises:
          ValueError: a prompt or token is out of range; a completion is empty, too long, or goes on
            after its end token; prompts or completions lie on another device than the weights.
        """
        written = self.check_completions(prompts, completions)  # [B, T], true on tokens
        tokens = torch.cat([prompts[:, None], completions], dim=1)  # [B, T + 1]
        mask = torch.cat([torch.zeros_like(written[:, :1]), written], dim=1)
        return token_logps(self(tokens[:, :-1].clamp(min=0)), tokens, mask)

    def logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log pi(y|x), `[B]` nats, summed over tokens; arguments as in `token_logps`."""
        scored = self.token_logps(prompts, completions)
        return sum_over_tokens(scored, completions != PAD)

    def check_completions(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The mask `[B, T]` of `completions`, or the ValueError that `token_logps` promises.

        Arguments are those of `token_logps`.
        """
        return check_completions(self, prompts, completions)


class HasSizes(Protocol):
    """A policy or a reward model: all that a check of completions asks of it."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Its weights."""

    n_prompts: int
    vocab_size: int
    max_tokens: int
    end_token: int | None


def check_completions(model: HasSizes, prompts: Tensor, completions: Tensor) -> Tensor:
    """The mask `[B, T]` of `completions`, or the ValueError that `Policy.token_logps` promises."""
    check_indices("prompts", prompts, "[B]", model.n_prompts)
    mask = completion_mask(completions, model.end_token)
    check_rows("prompts", prompts, completions=completions)
    weights = "the policy's weights" if isinstance(model, Policy) else "the model's weights"
    check_device(weights, device_of(model), prompts=prompts, completions=completions)
    if completions.shape[1] > model.max_tokens:
        got = completions.shape[1]
        raise ValueError(f"`completions` must have at most {model.max_tokens} tokens, got {got}")
    if values_visible(completions):
        least, most = completions.aminmax()
        if least < PAD or most >= model.vocab_size:
            bad = (completions >= model.vocab_size) | (completions < PAD)
            token = int(completions[bad][0])
            what = f"tokens in 0..{model.vocab_size - 1}"
            raise ValueError(f"`completions` must have {what}, got {token}")
    return mask


def check_sizes(model: HasSizes) -> None:
    """Refuse sizes below 1, and an end token that is no token."""
    for name in ("n_prompts", "vocab_size", "max_tokens"):
        check_count(name, getattr(model, name))
    if model.end_token is not None:
        check_count("end_token", model.end_token, least=0)
        if model.end_token >= model.vocab_size:
            what = f"None or in 0..{model.vocab_size - 1}"
            raise ValueError(f"`end_token` must be {what}, got {model.end_token}")


def read_for_prompts(model: HasSizes, prompt_tokens: Tensor | None) -> Tensor:
    """What a transformer reads for each prompt, `[X, P]`; by default one token, V + x."""
    if prompt_tokens is None:
        return model.vocab_size + torch.arange(model.n_prompts).unsqueeze(1)
    check_integers("prompt_tokens", prompt_tokens, "[X, P]")
    if len(prompt_tokens) != model.n_prompts or (prompt_tokens < 0).any():
        got = f"{list(prompt_tokens.shape)} with a least token of {int(prompt_tokens.min())}"
        what = f"[{model.n_prompts}, P] with tokens >= 0"
        raise ValueError(f"`prompt_tokens` must be {what}, got {got}")
    return prompt_tokens.clone()


class TabularPolicy(Policy):
    """One free logit for every prompt and one-token completion: the policy of a bandit.

    Args:
      logits: `[X, Y]`, the starting logits; copied. Log-probabilities will do.
    Raises:
      ValueError: `logits` are not finite, or not `[X, Y]`.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        check_floats("[X, Y]", logits=logits)
        check_finite(logits=logits)
        self.n_prompts, self.vocab_size = logits.shape
        self.max_tokens, self.end_token = 1, None
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, 1, V]` of a completion's only token; `tokens` `[B, 1]` are prompts."""
        return self.logits[tokens]


def device_of(model: nn.Module | Scorer | HasSizes) -> torch.device | None:
    """Where the first of a model's weights lies; None where it has none."""
    return next((weight.device for weight in model.parameters()), None)


def shares_storage(model: nn.Module | Scorer, other: nn.Module | Scorer) -> bool:
    """Whether a weight of one lies in memory of the other's, so that training one moves both."""
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    theirs = {parameter.untyped_storage().data_ptr() for parameter in other.parameters()}
    return not mine.isdisjoint(theirs)

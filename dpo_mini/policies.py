"""Policies: a table of logits for bandits, and a tiny GPT-2 for tasks made of text.

Both answer the same questions. `token_logps` and `logps` score given completions. `begin` and
`extend` read a tree of prefixes one token at a time and are what `rollout` walks and samples with.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mini.arguments import check_count, check_floats, check_generator, check_indices, check_rows
from dpo_mini.logps import PAD, completion_mask, sum_over_tokens, token_logps

Path = list[tuple[Tensor, Tensor]]
"""Keys and values of every token on a path, one pair `[P, H, S, D/H]` a layer."""


class Sizes(Protocol):
    """What a policy needs to know of its task."""

    prompts: Tensor
    vocab_size: int
    max_tokens: int
    end_token: int | None


class Policy(nn.Module):
    """What every policy shares: scoring completions that are already there."""

    n_prompts: int
    vocab_size: int
    max_tokens: int
    end_token: int | None

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, S, V]` of the token after each of `tokens` `[B, S]`, prompt first."""
        raise NotImplementedError

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probability of each completion token.

        Args:
          prompts: `[B]` int64, which prompt, in 0..X-1.
          completions: `[B, T]` int64, padded with `PAD` after the end token.
        Returns:
          `[B, T]`, nats; 0 on padding.
        Raises:
          ValueError: a prompt or token is out of range; a completion is empty, too long, or goes on
            after its end token.
        """
        completed = self.check_completions(prompts, completions)
        tokens = torch.cat([prompts[:, None], completions], dim=1)  # [B, T + 1]
        mask = torch.cat([torch.zeros_like(completed[:, :1]), completed], dim=1)
        return token_logps(self(tokens[:, :-1].clamp(min=0)), tokens, mask)

    def logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log pi(y|x), `[B]` nats, summed over tokens; arguments as in `token_logps`."""
        scored = self.token_logps(prompts, completions)
        return sum_over_tokens(scored, completions != PAD)

    def check_completions(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """The mask `[B, T]` of `completions`, or the ValueError that `token_logps` promises."""
        check_indices("prompts", prompts, "[B]", self.n_prompts)
        mask = completion_mask(completions, self.end_token)
        check_rows("prompts", prompts, completions=completions)
        if completions.shape[1] > self.max_tokens:
            got = completions.shape[1]
            raise ValueError(f"completions: got {got} tokens, takes at most {self.max_tokens}")
        if (completions >= self.vocab_size).any() or (completions < PAD).any():
            bad = (completions >= self.vocab_size) | (completions < PAD)
            got = completions[bad][0].item()
            raise ValueError(f"completions: got token {got}, takes 0..{self.vocab_size - 1}")
        return mask


class TabularPolicy(Policy):
    """One free logit for every prompt and one-token completion: the policy of a bandit.

    Args:
      logits: `[X, Y]`, the starting logits; copied. Log-probabilities will do.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        check_floats("[X, Y]", logits=logits)
        if not torch.isfinite(logits).all():
            raise ValueError("logits: got a value that is not finite, takes finite values")
        self.n_prompts, self.vocab_size = logits.shape
        self.max_tokens, self.end_token = 1, None
        self.logits = nn.Parameter(logits.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]  # a bandit reads its prompt and nothing else: [B, 1, V]

    def begin(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """Logits of the only token, `[P, V]`, and the path to it, of which nothing is kept."""
        return self.logits[prompts], []


class SelfAttention(nn.Module):
    """Causal multi-head attention with GPT-2's weights."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)  # each [B, H, S, D/H]
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def extend(self, x: Tensor, path: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of C siblings `x` `[P, C, D]`, each to the shared path before it and itself."""
        q, k, v = self.heads(x)  # each [P, H, C, D/H], or [1, H, C, D/H] where all P share x
        path_k, path_v = path  # each [P, H, S, D/H]
        own = (q * k).sum(-1).unsqueeze(2).expand(len(path_k), -1, -1, -1)  # [P, H, 1, C]
        scores = torch.cat([path_k @ q.mT, own], 2) * q.shape[-1] ** -0.5  # [P, H, S + 1, C]
        weights = scores.softmax(2).mT  # [P, H, C, S + 1]; C innermost is what keeps softmax fast
        mixed = torch.addcmul(weights[..., :-1] @ path_v, weights[..., -1:], v)  # [P, H, C, D/H]
        return self.merge(mixed), k, v

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, length, width = x.shape
        qkv = self.c_attn(x).view(batch, length, 3, self.n_heads, width // self.n_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, mixed: Tensor) -> Tensor:
        return self.c_proj(mixed.transpose(1, 2).flatten(2))  # [B, S, D]


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, 0.5 x (1 + tanh u), as x sigmoid(2u): its exp is far cheaper than a tanh."""
    slope = (8 / math.pi) ** 0.5  # 2u = slope * (x + 0.044715 x^3)
    return x * (x * torch.addcmul(x.new_tensor(slope), x, x, value=0.044715 * slope)).sigmoid()


class Block(nn.Module):
    """Pre-norm: attention, then a two-layer network, each added to what came in."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, n_heads)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(x + self.attn(self.ln_1(x)))

    def extend(self, x: Tensor, path: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.attn.extend(self.ln_1(x), path)
        return self.feed(x + attended), k, v

    def feed(self, x: Tensor) -> Tensor:
        return x + self.c_proj(gelu(self.c_fc(self.ln_2(x))))


class TinyTransformer(Policy):
    """A pre-norm GPT-2 whose prompt is one token and whose completions are at most T tokens.

    The vocabulary of the completions comes first in the embedding, one token a prompt after it. The
    output weights are the embedding's first V rows.

    Args:
      n_prompts, vocab_size, max_tokens: X, V and T of the task.
      end_token: the token that ends a completion, or None.
      n_layers, n_heads, width: the shape; `width` is a multiple of `n_heads`.
      generator: draws the initial weights, N(0, 0.02^2) as GPT-2's.
    """

    def __init__(
        self,
        n_prompts: int,
        vocab_size: int,
        max_tokens: int,
        *,
        end_token: int | None,
        generator: torch.Generator,
        n_layers: int = 2,
        n_heads: int = 4,
        width: int = 32,
    ) -> None:
        super().__init__()
        sizes = {"n_prompts": n_prompts, "vocab_size": vocab_size, "max_tokens": max_tokens}
        for name, size in {**sizes, "n_layers": n_layers, "n_heads": n_heads}.items():
            check_count(name, size)
        check_count("width", width)
        check_generator(generator)
        if width % n_heads:
            raise ValueError(f"width: got {width}, takes a multiple of n_heads = {n_heads}")
        if end_token is not None:
            check_count("end_token", end_token, least=0)
            if end_token >= vocab_size:
                raise ValueError(f"end_token: got {end_token}, takes None or 0..{vocab_size - 1}")
        self.n_prompts, self.vocab_size = n_prompts, vocab_size
        self.max_tokens, self.end_token = max_tokens, end_token
        with torch.random.fork_rng(devices=[]):  # torch fills new layers from global random state
            self.wte = nn.Embedding(vocab_size + n_prompts, width)
            self.wpe = nn.Embedding(max_tokens, width)
            self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
            self.ln_f = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2 shrinks what each layer adds by the square root of how many add.
                scale = (2 * n_layers) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def for_task(
        cls, task: Sizes, *, generator: torch.Generator, **shape: int
    ) -> "TinyTransformer":
        """An untrained transformer of the sizes of `task`."""
        sizes = (len(task.prompts), task.vocab_size, task.max_tokens)
        return cls(*sizes, end_token=task.end_token, generator=generator, **shape)

    def forward(self, tokens: Tensor) -> Tensor:
        prompt, completion = tokens[:, :1] + self.vocab_size, tokens[:, 1:]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(torch.cat([prompt, completion], dim=1)) + self.wpe(positions)  # [B, S, D]
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)

    def begin(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """Read the prompts `[P]`: logits of the first token `[P, V]`, and the paths so far."""
        n_heads = self.blocks[0].attn.n_heads
        width = self.wte.embedding_dim
        nothing = self.wte.weight.new_empty(len(prompts), n_heads, 0, width // n_heads)
        path = [(nothing, nothing)] * len(self.blocks)
        logits, path = self.extend(prompts[:, None] + self.vocab_size, path)
        return logits[:, 0], path

    def extend(self, tokens: Tensor, path: Path) -> tuple[Tensor, Path]:
        """Read C sibling tokens, each as the next one after its path, all at one depth.

        Args:
          tokens: `[P, C]`, or `[1, C]` where every path has the same siblings: what the first
            layer asks, keeps and says of a token depends on no path, and is then computed once.
          path: of P prefixes.
        Returns:
          logits of the token after each, `[P, C, V]`, and the siblings' own keys and values,
          `[P, H, C, D/H]` a layer (or `[1, ...]`): what `path` lacks to become the siblings' paths.
        """
        depth = path[0][0].shape[2]
        x, own = self.wte(tokens) + self.wpe.weight[depth], []  # [P, C, D]
        for block, layer_path in zip(self.blocks, path, strict=True):
            x, k, v = block.extend(x, layer_path)
            own.append((k, v))
        return self.unembed(x), own

    def unembed(self, x: Tensor) -> Tensor:
        return self.ln_f(x) @ self.wte.weight[: self.vocab_size].T

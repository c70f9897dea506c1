"""A tiny GPT-2, to be read from top to bottom: attention, block, model.

The letters of the shapes: `B` rows, `L` tokens read, `D` width, `H` heads, `V` vocabulary. In each
row, P tokens belong to the prompt and S - 1 to a completion, so that L = P + S - 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mini._arguments import check_count, check_generator
from dpo_mini.policies.base import Policy, Sizes, check_sizes, read_for_prompts


class SelfAttention(nn.Module):
    """Multi-head attention: each token takes a weighted mean of the values of other tokens."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention of `x` `[B, L, D]` to itself: `[B, L, D]`.

        `mask` `[L, L]`: entry (i, j) is true where token i attends to token j.
        """
        q, k, v = self.queries_keys_values(x)  # each [B, H, L, D/H]
        scores = q @ k.mT * q.shape[-1] ** -0.5  # [B, H, L, L]
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)  # [B, H, L, L], rows sum to 1
        mixed = weights @ v  # [B, H, L, D/H]
        return self.c_proj(mixed.transpose(1, 2).flatten(2))  # [B, L, D], heads side by side

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `x` `[B, L, D]`, each `[B, H, L, D/H]`."""
        heads = self.c_attn(x).unflatten(-1, (3, self.n_heads, -1))  # [B, L, 3, H, D/H]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, H, L, D/H]
        return q, k, v


class Block(nn.Module):
    """Attention, then a two-layer network; each reads a normalised `x` and adds to `x`."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, n_heads)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """New states `[B, L, D]` from `x` `[B, L, D]`; `mask` as in `SelfAttention.forward`."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))

    def mlp(self, x: Tensor) -> Tensor:
        """The two-layer network, which reads each token alone: `x` `[..., D]` to `[..., D]`."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # 4 D wide inside


class TinyTransformer(Policy):
    """A GPT-2 that reads a prompt of P tokens and writes completions of at most T tokens.

    Prompts are named by their number; `prompt_tokens` says which tokens stand for each. Tokens
    0..V-1 may occur in prompts and completions; those that only prompts use come after them. The
    output weights are the embeddings of the tokens 0..V-1. `rollout.sample` draws completions.

    Args:
      n_prompts, vocab_size, max_tokens: X, V and T of the task.
      end_token: the token that ends a completion, or None.
      prompt_tokens: `[X, P]` int64, what is read for each prompt; if left out, prompt x is the one
        token V + x.
      n_layers, n_heads, width: the shape; `width` is a multiple of `n_heads`.
      generator: draws the initial weights, as GPT-2's are drawn: N(0, 0.02^2) and smaller. They lie
        on its device.
    Raises:
      ValueError: a size below 1, or a token out of range.
    """

    prompt_tokens: Tensor
    blocks: Sequence[Block]

    def __init__(
        self,
        n_prompts: int,
        vocab_size: int,
        max_tokens: int,
        *,
        end_token: int | None,
        generator: torch.Generator,
        prompt_tokens: Tensor | None = None,
        n_layers: int = 2,
        n_heads: int = 4,
        width: int = 32,
    ) -> None:
        super().__init__()
        for name, size in {"n_layers": n_layers, "n_heads": n_heads, "width": width}.items():
            check_count(name, size)
        if width % n_heads:
            raise ValueError(f"`width` must be a multiple of `n_heads` = {n_heads}, got {width}")
        check_generator(generator)
        self.n_prompts, self.vocab_size = n_prompts, vocab_size
        self.max_tokens, self.end_token = max_tokens, end_token
        check_sizes(self)
        read = read_for_prompts(self, prompt_tokens).to(generator.device)  # [X, P]
        self.register_buffer("prompt_tokens", read, persistent=False)
        # torch fills new layers from global random state; on the CPU it can be put back everywhere
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.wte = nn.Embedding(max(vocab_size, int(read.max()) + 1), width)
            self.wpe = nn.Embedding(read.shape[1] + max_tokens - 1, width)
            self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))  # type: ignore[assignment]
            self.ln_f = nn.LayerNorm(width)
        self.to(generator.device)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2 divides by the square root of how often something is added to `x`.
                scale = (2 * n_layers) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @classmethod
    def for_task(
        cls, task: Sizes, *, generator: torch.Generator, **shape: int
    ) -> "TinyTransformer":
        """An untrained transformer of the sizes and prompts of `task`, drawn with `generator`.

        `task` is a `Task`, or anything with its sizes; `shape` is `n_layers`, `n_heads`, `width`.
        """
        sizes = (len(task.prompts), task.vocab_size, task.max_tokens)
        read, end = getattr(task, "prompt_tokens", None), task.end_token
        return cls(*sizes, end_token=end, prompt_tokens=read, generator=generator, **shape)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, S, V]` after each of `tokens` `[B, S]`, as in `Policy.forward`."""
        prompts, written = tokens[:, 0], tokens[:, 1:]
        read = torch.cat([self.prompt_tokens[prompts], written], dim=1)  # [B, L]
        positions = torch.arange(read.shape[1], device=tokens.device)
        causal = positions <= positions[:, None]  # [L, L]: a token attends to none after it
        hidden = self.hidden(read, positions, causal)[:, -tokens.shape[1] :]  # [B, S, D]
        return self.unembed(hidden)  # from the prompt's last token and the S - 1 after it

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """States `[B, L, D]` after `tokens` `[B, L]` at `positions` `[L]`; `mask` as in `Block`."""
        x = self.wte(tokens) + self.wpe(positions)  # [B, L, D]
        for block in self.blocks:
            x = block(x, mask)
        return self.ln_f(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` from `hidden` states `[..., D]`."""
        return hidden @ self.wte.weight[: self.vocab_size].T

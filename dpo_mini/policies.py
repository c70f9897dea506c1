"""Policies: a table of logits for bandits, and a tiny GPT-2 for tasks made of text.

Both answer the same questions. `token_logps` and `logps` score given completions. `begin` and
`extend` read a tree of prefixes one token at a time and are what `rollout` walks and samples with.
So do the models that put a number on a text beside the policy: a reward model, and a policy with
the value function that PPO learns.
"""

import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from dpo_mini.arguments import (
    check_count,
    check_finite,
    check_floats,
    check_generator,
    check_indices,
    check_rows,
)
from dpo_mini.logps import PAD, completion_mask, sum_over_tokens, token_logps

__all__ = [
    "Path",
    "PrefixTree",
    "Sizes",
    "Scorer",
    "Policy",
    "TabularPolicy",
    "SelfAttention",
    "Block",
    "TinyTransformer",
    "ScalarTransformer",
    "RewardModel",
    "SharedTrunk",
    "SeparateNetworks",
]

Path = list[tuple[Tensor, Tensor]]
"""Keys and values of every token on a path, one pair `[P, H, S, D/H]` a layer."""


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """The N distinct prefixes of a batch, one a node, to be read in one pass.

    Args:
      tokens: `[N]` int64, the last token of each prefix; of a prompt alone, its number.
      depths: `[N]`, how many tokens follow the prompt, in 0..S-1.
      lineage: `[N, S]`, the nodes on the way to each node, prompt first, itself at its depth; what
        stands behind that does not matter.
      nodes: `[B, S]`, the node of each row of the batch after 0, 1, … tokens; 0 where it has ended.
    """

    tokens: Tensor
    depths: Tensor
    lineage: Tensor
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
    """Anything that scores completions: a `Policy`, or a model of any library in such a coat."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Its weights; where the first is, tokens are read."""

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Log-probability of each token of `completions` `[B, T]`, `[B, T]` nats, 0 on padding.

        `prompts` are what the model wants: `[B]` numbers for a `Policy`, `[B, P]` tokens for a
        `CausalLMPolicy`.
        """


class Policy(nn.Module):
    """What every policy shares: scoring completions that are already there."""

    n_prompts: int
    vocab_size: int
    max_tokens: int
    end_token: int | None

    def extra_repr(self) -> str:
        """What `print(policy)` says of its sizes, beside its layers."""
        names = ("n_prompts", "vocab_size", "max_tokens", "end_token")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, S, V]` of the token after each of `tokens` `[B, S]`, prompt first."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        return self.read_rows(tokens, steps, steps > steps[:, None])

    def read_rows(self, tokens: Tensor, depths: Tensor, beyond: Tensor) -> Tensor:
        """`forward` on rows whose tokens need not follow one another.

        Args:
          tokens: `[B, S]` int64, the number of the prompt first.
          depths: `[S]`, how many tokens stand between the prompt and each, itself included.
          beyond: `[S, S]` bool, true where the token of a row does not see that of a column.
        Returns:
          `[B, S, V]`, logits of the token after each.
        Raises:
          NotImplementedError: a subclass says how.
        """
        raise NotImplementedError

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """Logits `[N, V]` of the token after each prefix of a `tree`; NotImplementedError here."""
        raise NotImplementedError

    def begin(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """Read the `prompts` `[P]`: logits of the first token `[P, V]`, and the paths so far.

        A subclass says how; here it is a NotImplementedError.
        """
        raise NotImplementedError

    def extend(self, tokens: Tensor, path: Path) -> tuple[Tensor, Path]:
        """Read C sibling `tokens` `[P, C]`, each as the next one after its `path`, at one depth.

        A subclass says how; here it is a NotImplementedError.

        Returns:
          `(logits [P, C, V], own)`: of the token after each, and the siblings' keys and values.
        """
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
        """The mask `[B, T]` of `completions`, or the ValueError that `token_logps` promises.

        Args are those of `token_logps`.
        """
        return check_completions(self, prompts, completions)


def check_completions(
    model: "Policy | RewardModel", prompts: Tensor, completions: Tensor
) -> Tensor:
    """`Policy.check_completions` for whatever has the sizes of a task."""
    check_indices("prompts", prompts, "[B]", model.n_prompts)
    mask = completion_mask(completions, model.end_token)
    check_rows("prompts", prompts, completions=completions)
    if completions.shape[1] > model.max_tokens:
        got = completions.shape[1]
        raise ValueError(f"completions: got {got} tokens, takes at most {model.max_tokens}")
    least, most = completions.aminmax()
    if least < PAD or most >= model.vocab_size:
        bad = (completions >= model.vocab_size) | (completions < PAD)
        token = int(completions[bad][0])
        raise ValueError(f"completions: got token {token}, takes 0..{model.vocab_size - 1}")
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

    def read_rows(self, tokens: Tensor, depths: Tensor, beyond: Tensor) -> Tensor:
        """As in `Policy.read_rows`: a bandit reads its prompt and nothing else."""
        return self.logits[tokens]  # a bandit reads its prompt and nothing else: [B, 1, V]

    def begin(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """Logits of the only token after each of `prompts` `[P]`, `[P, V]`, and an empty path."""
        return self.logits[prompts], []

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """As in `Policy.read_tree`."""
        return self.logits[tree.tokens]  # one token to say, so all that is read is prompts


class SelfAttention(nn.Module):
    """Causal multi-head attention with GPT-2's weights."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention of `x` `[B, S, D]` to itself; `mask` `[S, S]` is 0, or -inf where unseen."""
        q, k, v = self.heads(linear_of_rows(self.c_attn, x)).flatten(1, 2)  # each [B * H, S, D/H]
        # At these lengths fused attention and its gradient take longer than these three steps.
        scores = torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5)  # [B * H, S, S]
        mixed = (scores.softmax(-1) @ v).unflatten(0, (-1, self.n_heads))  # [B, H, S, D/H]
        return linear_of_rows(self.c_proj, self.merge(mixed))

    def extend(self, x: Tensor, path: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of C siblings `x` `[P, C, D]`, each to the shared path before it and itself."""
        q, k, v = self.heads(self.c_attn(x))  # [P, H, C, D/H], or 1 for P where all share x
        path_k, path_v = path  # each [P, H, S, D/H]
        own = (q * k).sum(-1).unsqueeze(2).expand(len(path_k), -1, -1, -1)  # [P, H, 1, C]
        scores = torch.cat([path_k @ q.mT, own], 2) * q.shape[-1] ** -0.5  # [P, H, S + 1, C]
        weights = scores.softmax(2).mT  # [P, H, C, S + 1]; C innermost is what keeps softmax fast
        mixed = torch.addcmul(weights[..., :-1] @ path_v, weights[..., -1:], v)  # [P, H, C, D/H]
        return self.c_proj(self.merge(mixed)), k, v

    def look_back(self, x: Tensor, lineage: Tensor, beyond: Tensor) -> Tensor:
        """Attention of N prefixes `x` `[N, D]`, each to those on its way and itself.

        `lineage` `[N, S]` is a `PrefixTree`'s; `beyond` `[N, S]` is true where a way has ended.
        """
        width = x.shape[1]
        q, kv = self.c_attn(x).split([width, 2 * width], -1)
        q = q.view(-1, self.n_heads, 1, width // self.n_heads)
        # `F.embedding`, not an index: its gradient is far cheaper where rows repeat.
        path = F.embedding(lineage, kv).unflatten(-1, (2, self.n_heads, -1))
        k, v = path.permute(2, 0, 3, 1, 4)  # each [N, H, S, D/H]
        scores = (q * k).sum(-1) * q.shape[-1] ** -0.5  # [N, H, S]
        weights = scores.masked_fill(beyond[:, None], -torch.inf).softmax(-1)
        return self.c_proj((weights.unsqueeze(-1) * v).sum(2).flatten(1))  # [N, D]

    def heads(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values `[3, B, H, S, D/H]` out of `qkv` `[B, S, 3 D]`."""
        return qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)

    def merge(self, mixed: Tensor) -> Tensor:
        """What the heads found, `mixed` `[B, H, S, D/H]`, side by side: `[B, S, D]`."""
        return mixed.transpose(1, 2).flatten(2)  # [B, S, D]


class OneDNNLinear(torch.autograd.Function):
    """`F.linear` in oneDNN's products, for float32 on a CPU."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        x, weight = saved
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        if torch.is_grad_enabled():  # a second derivative is asked for: that one is torch's
            return grad @ weight, grads.T @ rows, grads.sum(0)
        return _onednn_product(grad, weight.T), _onednn_product(grads.T, rows.T), grads.sum(0)


def _onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear_of_rows(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)` of rows `[B, S, D]`; twice as fast in float32 on AMD's CPUs with AVX-512.

    There MKL, in which torch multiplies, uses half of each vector. oneDNN, which torch brings along
    too, uses the whole. It compiles a kernel for each shape, so this is for rows, which come in
    few, and not for trees, which never have the same number of nodes again.
    `torch.backends.mkldnn.enabled = False` switches it off.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and _onednn_is_faster():
        return OneDNNLinear.apply(x, layer.weight, layer.bias)
    return layer(x)


def _onednn_is_faster() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _mkl_halves_vectors(_cpu_maker())


def _mkl_halves_vectors(cpu_maker: str) -> bool:
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return avx512 and cpu_maker == "AMD" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _cpu_maker() -> str:
    """AMD or another."""
    try:
        described = FilePath("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        described = platform.processor()
    return "AMD" if "AuthenticAMD" in described else "another"


class GELU(torch.autograd.Function):
    """GPT-2's GELU, 0.5 x (1 + tanh u), as x sigmoid(2u): its exp is far cheaper than a tanh.

    The gradient is written out: autograd would take and keep a tensor for each operation, which on
    these, the widest tensors of the model, takes two to four times as long.
    """

    SLOPE = (8 / math.pi) ** 0.5  # 2u = SLOPE * x + CUBIC * x^3
    CUBIC = 0.044715 * SLOPE

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        gate = torch.addcmul(x.new_tensor(GELU.SLOPE), x, x, value=GELU.CUBIC)
        gate = gate.mul_(x).sigmoid_()
        y = x * gate
        ctx.save_for_backward(x, gate, y)
        return y

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> Tensor:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        x, gate, y = saved
        if torch.is_grad_enabled():  # a second derivative is asked for: that one is torch's
            return torch.autograd.grad(F.gelu(x, approximate="tanh"), x, grad, create_graph=True)[0]
        slope = torch.addcmul(x.new_tensor(GELU.SLOPE), x, x, value=3 * GELU.CUBIC)  # of 2u
        slope = slope.mul_(torch.addcmul(y, y, gate, value=-1))  # y' = gate + y (1 - gate) (2u)'
        return slope.add_(gate).mul_(grad)


gelu = GELU.apply


class Block(nn.Module):
    """Pre-norm: attention, then a two-layer network, each added to what came in."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SelfAttention(width, n_heads)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The next hidden states of `x` `[B, S, D]`; `mask` as in `SelfAttention.forward`."""
        x = x + self.attn(self.ln_1(x), mask)
        inner = gelu(linear_of_rows(self.c_fc, self.ln_2(x)))
        return x + linear_of_rows(self.c_proj, inner)

    def extend(self, x: Tensor, path: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Those of C siblings `x` `[P, C, D]` after a `path`, as in `SelfAttention.extend`."""
        attended, k, v = self.attn.extend(self.ln_1(x), path)
        return self.feed(x + attended), k, v

    def look_back(self, x: Tensor, lineage: Tensor, beyond: Tensor) -> Tensor:
        """Those of N prefixes, as in `SelfAttention.look_back`."""
        return self.feed(x + self.attn.look_back(self.ln_1(x), lineage, beyond))

    def feed(self, x: Tensor) -> Tensor:
        """The two-layer network, added to `x` `[..., D]`."""
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

    blocks: Sequence[Block]

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
        shape = {"n_layers": n_layers, "n_heads": n_heads, "width": width}
        for name, size in {**sizes, **shape}.items():
            check_count(name, size)
        check_generator(generator)
        if width % n_heads:
            raise ValueError(f"width: got {width}, takes a multiple of n_heads = {n_heads}")
        if end_token is not None:
            check_count("end_token", end_token, least=0)
        if end_token is not None and end_token >= vocab_size:
            raise ValueError(f"end_token: got {end_token}, takes None or 0..{vocab_size - 1}")
        self.n_prompts, self.vocab_size = n_prompts, vocab_size
        self.max_tokens, self.end_token = max_tokens, end_token
        with torch.random.fork_rng(devices=[]):  # torch fills new layers from global random state
            self.wte = nn.Embedding(vocab_size + n_prompts, width)
            self.wpe = nn.Embedding(max_tokens, width)
            layers = nn.ModuleList(Block(width, n_heads) for _ in range(n_layers))
            self.blocks = cast(Sequence[Block], layers)  # torch does not say what is in a list
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
        """An untrained transformer of the sizes of `task`.

        Args:
          task: a `Task`, or anything with its prompts and sizes.
          generator: draws the initial weights.
          **shape: `n_layers`, `n_heads` and `width`.
        Returns:
          The policy, of the default dtype.
        """
        sizes = (len(task.prompts), task.vocab_size, task.max_tokens)
        return cls(*sizes, end_token=task.end_token, generator=generator, **shape)

    def read_rows(self, tokens: Tensor, depths: Tensor, beyond: Tensor) -> Tensor:
        """As in `Policy.read_rows`."""
        x = self.wte(tokens + self.vocab_size * (depths == 0)) + self.wpe(depths)  # [B, S, D]
        mask = x.new_zeros(beyond.shape).masked_fill(beyond, -torch.inf)
        for block in self.blocks:
            x = block(x, mask)
        return self.unembed(self.ln_f(x))

    def begin(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """Read the prompts `[P]`: logits of the first token `[P, V]`, and the paths so far."""
        logits, path = self.extend(*self.start(prompts))
        return logits[:, 0], path

    def start(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """The prompts `[P]` as tokens `[P, 1]`, and the empty paths before them."""
        n_heads, width = self.blocks[0].attn.n_heads, self.wte.embedding_dim
        nothing = self.wte.weight.new_empty(len(prompts), n_heads, 0, width // n_heads)
        return prompts[:, None] + self.vocab_size, [(nothing, nothing)] * len(self.blocks)

    def extend(self, tokens: Tensor, path: Path) -> tuple[Tensor, Path]:
        """Read C sibling tokens `[P, C]`, each as the next one after its path, all at one depth.

        Tokens `[1, C]` are siblings that all P paths share: up to the first layer's attention
        nothing depends on the path, and is computed once. Returns the logits of the token after
        each, `[P, C, V]`, and the siblings' own keys and values, for `rollout.lengthen`.
        """
        hidden, own = self.read(tokens, path)
        return self.unembed(hidden), own

    def read(self, tokens: Tensor, path: Path) -> tuple[Tensor, Path]:
        """`extend` up to the last layer norm: hidden states `[P, C, D]`, which a head reads.

        Args are those of `extend`.
        """
        depth = path[0][0].shape[2]
        x = self.wte(tokens) + self.wpe.weight[depth]  # [P, C, D]
        own: Path = []
        for block, layer_path in zip(self.blocks, path, strict=True):
            x, k, v = block.extend(x, layer_path)
            own.append((k, v))
        return self.ln_f(x), own

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """Logits `[N, V]` of the token after each prefix of a tree, all depths at once."""
        return self.unembed(self.hidden_of_tree(tree))

    def hidden_of_tree(self, tree: PrefixTree) -> Tensor:
        """`read_tree` up to the last layer norm: hidden states `[N, D]` of a `tree`, for a head."""
        tokens = tree.tokens + self.vocab_size * (tree.depths == 0)
        x = F.embedding(tokens, self.wte.weight) + F.embedding(tree.depths, self.wpe.weight)
        steps = torch.arange(tree.lineage.shape[1], device=tokens.device)
        beyond = steps > tree.depths[:, None]  # [N, S]
        for block in self.blocks:
            x = block.look_back(x, tree.lineage, beyond)
        return self.ln_f(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` from `hidden` states `[..., D]` after the last layer norm."""
        return hidden @ self.wte.weight[: self.vocab_size].T


class ScalarTransformer(nn.Module):
    """A transformer's body with one number a token: a value function, or a reward model's inside.

    Args:
      body: its output weights are not used; it is kept, not copied.
    """

    def __init__(self, body: TinyTransformer) -> None:
        super().__init__()
        self.body, self.head = body, _zero_head(body)
        self.vocab_size = body.vocab_size

    def begin(self, prompts: Tensor) -> tuple[Tensor, Path]:
        """What the head says of the prompts alone, `[P, 1]`, and the paths so far."""
        numbers, path = self.extend(*self.body.start(prompts))
        return numbers[:, 0], path

    def extend(self, tokens: Tensor, path: Path) -> tuple[Tensor, Path]:
        """What it says after each of C sibling tokens, `[P, C, 1]`; as in `Policy.extend`."""
        hidden, own = self.body.read(tokens, path)
        return self.head(hidden), own

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """What it says after each prefix of a tree, `[N, 1]`."""
        return self.head(self.body.hidden_of_tree(tree))


class RewardModel(ScalarTransformer):
    """A scalar reward of a whole completion: the head's number on its last token.

    Bradley-Terry leaves a constant free, which `centre` fixes; `rollout.shared_prefix_rewards`
    scores a batch and `rollout.enumerate_rewards` every completion.

    Args:
      body: reads the prompt and T tokens, so its own `max_tokens` is one more than the task's.
    """

    offset: Tensor

    def __init__(self, body: TinyTransformer) -> None:
        super().__init__(body)
        self.n_prompts, self.end_token = body.n_prompts, body.end_token
        self.max_tokens = body.max_tokens - 1
        self.register_buffer("offset", self.head.weight.new_zeros(()))

    @classmethod
    def for_task(cls, task: Sizes, *, generator: torch.Generator, **shape: int) -> "RewardModel":
        """An untrained reward model of the sizes of `task`; it says 0 of everything.

        Args are those of `TinyTransformer.for_task`.
        """
        sizes = (len(task.prompts), task.vocab_size, task.max_tokens + 1)
        end = task.end_token
        return cls(TinyTransformer(*sizes, end_token=end, generator=generator, **shape))

    def extend(self, tokens: Tensor, path: Path) -> tuple[Tensor, Path]:
        """The reward of what ends with each of C siblings, `[P, C, 1]`; as in `Policy.extend`."""
        numbers, own = super().extend(tokens, path)
        return numbers - self.offset, own

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """The reward of each prefix of a tree, were it to end there, `[N, 1]`."""
        return super().read_tree(tree) - self.offset

    def centre(self, rewards: Tensor) -> None:
        """Subtract the mean of `rewards` `[n]`, this model's own of some completions, in place.

        Raises:
          ValueError: a reward is not finite, or there are none.
        """
        check_floats("[n]", rewards=rewards)
        check_finite(rewards=rewards)
        self.offset += rewards.detach().mean()


class SharedTrunk(nn.Module):
    """A policy and a value function in one body: both heads read the same hidden states.

    Reading gives V logits and then the value: `[..., V + 1]`. Training the value moves the policy.

    Args:
      policy: kept, not copied. The value head starts at 0 everywhere.
    """

    def __init__(self, policy: TinyTransformer) -> None:
        super().__init__()
        self.policy, self.value_head = policy, _zero_head(policy)
        self.vocab_size = policy.vocab_size

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """Logits and value after each prefix of a tree, `[N, V + 1]`."""
        hidden = self.policy.hidden_of_tree(tree)
        return torch.cat([self.policy.unembed(hidden), self.value_head(hidden)], -1)


class SeparateNetworks(nn.Module):
    """A policy and a value function that share nothing; they are read side by side.

    Args:
      policy: kept, not copied.
      critic: a `ScalarTransformer`, or for a bandit a `TabularPolicy` of one column, which is read
        as a table of values.
    Raises:
      ValueError: the two share weights.
    """

    def __init__(self, policy: Policy, critic: ScalarTransformer | TabularPolicy) -> None:
        super().__init__()
        if shares_storage(policy, critic):
            raise ValueError("critic: got weights of the policy, takes a network of its own")
        self.policy, self.critic = policy, critic
        self.vocab_size = policy.vocab_size

    def read_tree(self, tree: PrefixTree) -> Tensor:
        """Logits and value after each prefix of a tree, `[N, V + 1]`."""
        return torch.cat([self.policy.read_tree(tree), self.critic.read_tree(tree)], -1)


def shares_storage(model: nn.Module | Scorer, other: nn.Module | Scorer) -> bool:
    """Whether a weight of one lies in memory of the other's, so that training one moves both."""
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return any(parameter.untyped_storage().data_ptr() in mine for parameter in other.parameters())


def _zero_head(body: TinyTransformer) -> nn.Linear:
    """A linear head of one number, 0 at the start; beside `body` in dtype and device."""
    like = body.wte.weight
    with torch.random.fork_rng(devices=[]):  # torch fills new layers from global random state
        head = nn.Linear(like.shape[1], 1, dtype=like.dtype, device=like.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def __dir__() -> list[str]:
    return __all__

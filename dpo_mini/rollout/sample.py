"""Completions drawn from a policy; rows with the same beginning are read together."""

import torch
from torch import Tensor

from dpo_mini._arguments import check_device, check_generator, check_indices
from dpo_mini._numerics import widen
from dpo_mini.logps import PAD
from dpo_mini.policies.base import Policy, TabularPolicy, device_of
from dpo_mini.policies.transformer import SelfAttention
from dpo_mini.rollout.trees import body_and_heads

_Read = list[tuple[Tensor, Tensor]]
"""Keys and values of the S tokens of N texts, `[N, S, D]` each, heads side by side; per layer."""


def sample(policy: Policy, prompts: Tensor, *, generator: torch.Generator) -> Tensor:
    """One completion per prompt; rows with the same beginning go through the policy once.

    Each token is drawn by inverting the cumulative distribution at a uniform number. Row b and step
    t have a number of their own, drawn beforehand, so that a row's completion depends on these and
    on the policy, not on what the other rows say.

    Args:
      policy: a `Policy`.
      prompts: `[B]` int64, repeats allowed.
      generator: draws `[T, B]` uniform numbers.
    Returns:
      `[B, T]` int64, padded with `PAD` after the end token.
    Raises:
      ValueError: a prompt is out of range, or prompts or generator lie on another device than the
        policy's weights.
    """
    check_indices("prompts", prompts, "[B]", policy.n_prompts)
    check_generator(generator)
    check_device("the policy's weights", device_of(policy), prompts=prompts, generator=generator)
    device, n_rows, n_steps = prompts.device, len(prompts), policy.max_tokens
    completions = torch.full((n_rows, n_steps), PAD, device=device)
    rows = torch.arange(n_rows, device=device)  # the completions still going on
    with torch.no_grad():
        first, node = _distinct(prompts, policy.n_prompts)  # node [B]: each row's prefix
        logits, read = _read_prompts(policy, first)  # [N, V] after each of N distinct prefixes
        uniform = torch.rand(
            n_steps, n_rows, generator=generator, dtype=widen(logits).dtype, device=generator.device
        )
        for step in range(n_steps):
            drawn = _draw(logits, node, uniform[step, rows])
            completions[rows, step] = drawn
            if policy.end_token is not None:
                going_on = (drawn != policy.end_token).nonzero().squeeze(1)
                rows, node, drawn = rows[going_on], node[going_on], drawn[going_on]
            if step == n_steps - 1 or not len(rows):
                break
            n_edges = len(logits) * policy.vocab_size  # token v after prefix n is edge n V + v
            edges, node = _distinct(node * policy.vocab_size + drawn, n_edges)
            parents, tokens = edges // policy.vocab_size, edges % policy.vocab_size
            logits, read = _read_next(policy, tokens, read, parents)
    return completions


def _distinct(numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The distinct ones of `numbers` in 0..size-1, in order, and which of them each one is."""
    marked = torch.zeros(size, dtype=torch.bool, device=numbers.device)
    marked[numbers] = True  # `unique` would sort
    return marked.nonzero().squeeze(1), (marked.cumsum(0) - 1)[numbers]


def _draw(logits: Tensor, node: Tensor, uniform: Tensor) -> Tensor:
    """A token `[R]` for each row: of the distributions of `logits` `[N, V]`, that of its node."""
    cdf = widen(logits).softmax(-1).cumsum(-1).index_select(0, node)  # [R, V]
    total = cdf[:, -1:]  # 1 up to rounding
    below = torch.nextafter(total, torch.zeros_like(total))  # no token of probability 0 at the end
    return (cdf <= torch.minimum(uniform[:, None] * total, below)).sum(1)


def _read_prompts(policy: Policy, prompts: Tensor) -> tuple[Tensor, _Read]:
    """Logits `[N, V]` after the prompts with numbers `prompts` `[N]`, and what was read."""
    if isinstance(policy, TabularPolicy):
        return policy.logits[prompts], []
    body, _ = body_and_heads(policy)
    nothing = body.wte.weight.new_empty(len(prompts), 0, body.wte.embedding_dim)
    read, each = [(nothing, nothing)] * len(body.blocks), torch.arange(len(prompts)).to(prompts)
    for tokens in body.prompt_tokens[prompts].T:
        logits, read = _read_next(policy, tokens, read, each)
    return logits, read


def _read_next(
    policy: Policy, tokens: Tensor, read: _Read, parents: Tensor
) -> tuple[Tensor, _Read]:
    """Logits `[N, V]` after `tokens` `[N]`, each of which follows one of the texts, its parent."""
    body, heads = body_and_heads(policy)
    x = body.wte(tokens) + body.wpe.weight[read[0][0].shape[1]]  # [N, D]
    longer = []
    for block, texts in zip(body.blocks, read, strict=True):
        keys, values = (each.index_select(0, parents) for each in texts)  # [N, S, D]
        attended, keys, values = _attend(block.attn, block.ln_1(x), keys, values)
        longer.append((keys, values))
        x = x + attended
        x = x + block.mlp(block.ln_2(x))
    return heads(body.ln_f(x)), longer


def _attend(
    attn: SelfAttention, x: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one token `x` `[N, D]` to the text before it and to itself.

    `keys` and `values` `[N, S, D]` are those of the text. Returned are the result `[N, D]` and both
    with the token's own, `[N, S + 1, D]`. No head is moved: with one token each, that costs more
    than it saves.
    """
    q, k, v = attn.c_attn(x).unsqueeze(1).chunk(3, -1)  # each [N, 1, D]
    keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)  # [N, S + 1, D]
    in_heads = (2, (attn.n_heads, -1))  # D = H (D/H)
    scores = (keys * q).unflatten(*in_heads).sum(-1)  # [N, S + 1, H]
    weights = (scores * (x.shape[1] // attn.n_heads) ** -0.5).softmax(1)
    mixed = (weights.unsqueeze(-1) * values.unflatten(*in_heads)).sum(1)  # [N, H, D/H]
    return attn.c_proj(mixed.flatten(1)), keys, values

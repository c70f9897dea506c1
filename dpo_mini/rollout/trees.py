"""Each distinct prefix of a batch once: the tree of prefixes, and how a transformer reads it.

Completions drawn from one policy begin alike: a batch of 1,000 micro-reviews has some 500 distinct
prefixes, where reading each row on its own reads 5,000 tokens. The tree has one node per prefix,
and attention looks from each node at its ancestors. Weights are those of the plain model in
`policies.transformer`; results agree with it up to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_mini.logps import PAD
from dpo_mini.policies.base import PrefixTree, TabularPolicy
from dpo_mini.policies.transformer import SelfAttention, TinyTransformer
from dpo_mini.policies.values import ScalarTransformer, SeparateNetworks, SharedTrunk


def prefix_tree(prompts: Tensor, tokens: Tensor, vocab_size: int) -> PrefixTree:
    """Each distinct prefix of a batch once.

    Args:
      prompts: `[B]` int64.
      tokens: `[B, S - 1]` int64, what is read after the prompt, padded with `PAD`.
      vocab_size: V.
    Returns:
      The tree; its `nodes` say which prefix each row of the batch is at each step.
    """
    first, node = prompts.unique(return_inverse=True)  # node: the prefix of each row going on
    rows = torch.arange(len(prompts), device=prompts.device)
    level = torch.arange(len(first), device=prompts.device).unsqueeze(
        1
    )  # ancestors of this depth's
    own, levels, nodes = [first], [level], [node]
    n_nodes = len(first)
    for column in tokens.T:
        going_on = column[rows] != PAD
        rows, node = rows[going_on], node[going_on]
        edges, node = (node * vocab_size + column[rows]).unique(return_inverse=True)
        fresh = n_nodes + torch.arange(len(edges), device=prompts.device)
        level = torch.cat([level[edges // vocab_size], fresh.unsqueeze(1)], dim=1)
        own.append(edges % vocab_size)
        levels.append(level)
        nodes.append(torch.zeros_like(prompts).index_put((rows,), n_nodes + node))
        n_nodes += len(edges)
    n_steps = len(levels)
    depths = [torch.full_like(mine, depth) for depth, mine in enumerate(own)]
    ancestors = [F.pad(level, (0, n_steps - level.shape[1])) for level in levels]
    return PrefixTree(
        torch.cat(own), torch.cat(depths), torch.cat(ancestors), torch.stack(nodes, 1)
    )


def read_tree(model: nn.Module, tree: PrefixTree) -> Tensor:
    """What `model` says after each prefix of a tree, `[N, K]`.

    A policy says V logits, a reward model or a value function one number, and a policy with a value
    function V logits and the value.
    """
    if isinstance(model, SeparateNetworks):
        return torch.cat([read_tree(model.policy, tree), read_tree(model.critic, tree)], -1)
    if isinstance(model, TabularPolicy):
        return model.logits[tree.tokens]  # a bandit has one token to say: all nodes are prompts
    return outputs(model, _hidden(body_of(model), tree))


def body_of(model: nn.Module) -> TinyTransformer:
    """The transformer that reads for `model`."""
    if isinstance(model, TinyTransformer):
        return model
    if isinstance(model, SharedTrunk):
        return model.policy
    if isinstance(model, ScalarTransformer):
        return model.body
    what = "a TinyTransformer or a model with its body"
    raise TypeError(f"`model` must be {what}, got {type(model).__name__}")


def outputs(model: nn.Module, hidden: Tensor) -> Tensor:
    """What the heads of `model` read off hidden states `[..., D]`: `[..., K]`."""
    if isinstance(model, SharedTrunk | ScalarTransformer):
        return model.outputs(hidden)
    return body_of(model).unembed(hidden)


def _hidden(body: TinyTransformer, tree: PrefixTree) -> Tensor:
    """The hidden state after each prefix of a tree, `[N, D]`."""
    tokens, positions, ancestors = _with_prompts(body.prompt_tokens, tree)
    steps = torch.arange(ancestors.shape[1], device=tokens.device)
    unseen = steps > positions[:, None]
    x = F.embedding(tokens, body.wte.weight) + F.embedding(positions, body.wpe.weight)  # [N, D]
    for block in body.blocks:
        x = x + _attend_to_ancestors(block.attn, block.ln_1(x), ancestors, unseen)
        x = x + block.mlp(block.ln_2(x))
    return body.ln_f(x[-len(tree.tokens) :])


def _with_prompts(prompt_tokens: Tensor, tree: PrefixTree) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and ancestors of the nodes, with those of long prompts put before them.

    A node of depth 0 is the last of its prompt's P tokens; the P - 1 before it become nodes too.
    """
    is_prompt = tree.depths == 0
    read = prompt_tokens[tree.tokens[is_prompt]]  # [F, P]
    n_first, n_before = read.shape[0], read.shape[1] - 1
    tokens = tree.tokens.masked_scatter(is_prompt, read[:, -1])
    if n_before == 0:
        return tokens, tree.depths, tree.ancestors
    before = torch.arange(n_first * n_before, device=tokens.device).view(n_first, n_before)
    own = F.pad(before.repeat_interleave(n_before, 0), (0, tree.ancestors.shape[1]))
    later = torch.cat([before[tree.ancestors[:, 0]], before.numel() + tree.ancestors], 1)
    places = torch.arange(n_before, device=tokens.device).repeat(n_first)
    return (
        torch.cat([read[:, :-1].flatten(), tokens]),
        torch.cat([places, n_before + tree.depths]),
        torch.cat([own, later]),
    )


def _attend_to_ancestors(
    attn: SelfAttention, x: Tensor, ancestors: Tensor, unseen: Tensor
) -> Tensor:
    """Attention of each node `x` `[N, D]` to those on the way to it, and to itself.

    `ancestors` `[N, S]` are a tree's; `unseen` `[N, S]` is true behind the node itself.
    """
    width = x.shape[1]
    q, kv = attn.c_attn(x).split([width, 2 * width], -1)
    q = q.view(-1, attn.n_heads, 1, width // attn.n_heads)
    # `F.embedding`, not an index: its gradient is far cheaper where rows repeat.
    path = F.embedding(ancestors, kv).unflatten(-1, (2, attn.n_heads, -1))
    k, v = path.permute(2, 0, 3, 1, 4)  # each [N, H, S, D/H]
    scores = (q * k).sum(-1) * q.shape[-1] ** -0.5  # [N, H, S]
    weights = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1)
    return attn.c_proj((weights.unsqueeze(-1) * v).sum(2).flatten(1))  # [N, D]

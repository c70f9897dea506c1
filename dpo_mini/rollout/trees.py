"""The tree of the distinct prefixes of a batch, and how a transformer reads it in one pass.

Completions drawn from one policy begin alike: 1,000 micro-reviews have some 500 distinct prefixes,
where reading each row on its own means reading 5,000 tokens. The tree has one node per prefix. All
nodes are read together, and each attends to its ancestors. The weights are those of
`policies.TinyTransformer`, and the results agree with it up to rounding.
"""

from collections.abc import Callable

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
    read = torch.cat([prompts[:, None], tokens], dim=1)  # [B, S]
    there = read != PAD
    place = torch.zeros_like(prompts)  # of each row among the prefixes of one depth
    nodes, n_nodes = torch.zeros_like(read), 0
    for step, column in enumerate(read.T):
        rows = there[:, step].nonzero().squeeze(1)  # those that have not ended
        edges = place[rows] * vocab_size + column[rows]  # from a prefix to one that is longer
        distinct, place[rows] = edges.unique(return_inverse=True)
        nodes[rows, step] = n_nodes + place[rows]
        n_nodes += len(distinct)
    # All rows of a node agree on its last token, depth and ancestors: they are read off one row.
    row, depth = there.nonzero(as_tuple=True)
    node = nodes[there]
    row = node.new_empty(n_nodes).index_put((node,), row)
    depth = node.new_empty(n_nodes).index_put((node,), depth)
    return PrefixTree(read[row, depth], depth, ancestors=nodes[row], nodes=nodes)


def of_rows(tree: PrefixTree, rows: Tensor) -> PrefixTree:
    """The tree of some rows `[R]` of the batch, from the tree of all."""
    kept, nodes = tree.nodes[rows].unique(return_inverse=True)
    number = torch.zeros_like(tree.tokens).index_put(
        (kept,), torch.arange(len(kept), device=kept.device)
    )
    ancestors = number[tree.ancestors[kept]]  # all of them are kept, as each row has its own
    return PrefixTree(tree.tokens[kept], tree.depths[kept], ancestors, nodes)


def read_tree(model: nn.Module, tree: PrefixTree) -> Tensor:
    """The outputs of `model` after each prefix of a tree, `[N, K]`.

    K is V logits of a policy, one number of a reward model or a value function, and V + 1 of a
    policy with a value function, the value last.
    """
    if isinstance(model, SeparateNetworks):
        return torch.cat([read_tree(model.policy, tree), read_tree(model.critic, tree)], -1)
    if isinstance(model, TabularPolicy):
        return model.logits[tree.tokens]  # completions of one token: all nodes are prompts
    body, heads = body_and_heads(model)
    return heads(_hidden(body, tree))


def body_and_heads(model: nn.Module) -> tuple[TinyTransformer, Callable[[Tensor], Tensor]]:
    """The transformer whose hidden states `model` reads, and what it makes of them.

    The second takes hidden states `[..., D]` and gives outputs `[..., K]`.
    """
    if isinstance(model, TinyTransformer):
        return model, model.unembed
    if isinstance(model, SharedTrunk):
        return model.policy, model.outputs
    if isinstance(model, ScalarTransformer):
        return model.body, model.outputs
    what = "a TinyTransformer or a model with its body"
    raise TypeError(f"`model` must be {what}, got {type(model).__name__}")


def _hidden(body: TinyTransformer, tree: PrefixTree) -> Tensor:
    """The hidden state after each prefix of a tree, `[N, D]`."""
    tokens, positions, ancestors = _with_prompts(body.prompt_tokens, tree)
    steps = torch.arange(ancestors.shape[1], device=tokens.device)
    behind = steps > positions[:, None]  # [N, S]
    x = F.embedding(tokens, body.wte.weight) + F.embedding(positions, body.wpe.weight)  # [N, D]
    for block in body.blocks:
        x = x + _attend_to_ancestors(block.attn, block.ln_1(x), ancestors, behind)
        x = x + block.mlp(block.ln_2(x))
    return body.ln_f(x[-len(tree.tokens) :])  # without what came before the last of a prompt


def _with_prompts(prompt_tokens: Tensor, tree: PrefixTree) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and ancestors of all that is read, with prompts of P tokens spelt out.

    The tree has one node per prompt, which becomes its last token. The P - 1 tokens before it are
    put before the nodes of the tree, prompt by prompt.
    """
    n_prompts = int((tree.depths == 0).sum())
    read = prompt_tokens[tree.tokens[:n_prompts]]  # [n_prompts, P]
    tokens = torch.cat([read[:, -1], tree.tokens[n_prompts:]])
    n_before = read.shape[1] - 1
    if n_before == 0:
        return tokens, tree.depths, tree.ancestors
    place = torch.arange(n_prompts * n_before, device=tokens.device)
    before = place.view(n_prompts, n_before)  # the new nodes of each prompt
    ancestors_before = F.pad(before.repeat_interleave(n_before, 0), (0, tree.ancestors.shape[1]))
    ancestors = torch.cat([before[tree.ancestors[:, 0]], len(place) + tree.ancestors], dim=1)
    return (
        torch.cat([read[:, :-1].flatten(), tokens]),
        torch.cat([place % n_before, n_before + tree.depths]),
        torch.cat([ancestors_before, ancestors]),
    )


def _attend_to_ancestors(
    attn: SelfAttention, x: Tensor, ancestors: Tensor, behind: Tensor
) -> Tensor:
    """Attention of each node `x` `[N, D]` to its ancestors, itself among them: `[N, D]`.

    `ancestors` `[N, S]` are those of a tree; `behind` `[N, S]` is true behind the node itself.
    """
    width = x.shape[1]
    q, kv = attn.c_attn(x).split([width, 2 * width], -1)  # [N, D], [N, 2 D]
    q = q.view(-1, attn.n_heads, 1, width // attn.n_heads)  # [N, H, 1, D/H]
    # `F.embedding`, not an index: its gradient is far cheaper where rows repeat.
    gathered = F.embedding(ancestors, kv).unflatten(-1, (2, attn.n_heads, -1))  # [N, S, 2, H, D/H]
    k, v = gathered.permute(2, 0, 3, 1, 4)  # each [N, H, S, D/H]
    scores = (q * k).sum(-1) * q.shape[-1] ** -0.5  # [N, H, S]
    weights = scores.masked_fill(behind[:, None], -torch.inf).softmax(-1)  # [N, H, S]
    return attn.c_proj((weights.unsqueeze(-1) * v).sum(2).flatten(1))  # [N, D]

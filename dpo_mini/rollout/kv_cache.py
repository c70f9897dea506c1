"""Reading one token at a time, with the keys and values of all that was read before."""

import torch
from torch import Tensor, nn

from dpo_mini.policies.base import KVCache, Policy, TabularPolicy
from dpo_mini.policies.transformer import SelfAttention
from dpo_mini.rollout.trees import body_of, outputs


def begin(model: nn.Module, prompts: Tensor) -> tuple[Tensor, KVCache]:
    """Read `prompts` `[P]`: what `model` says after each, `[P, K]`, and the cache so far."""
    if isinstance(model, TabularPolicy):
        return model.logits[prompts], []
    body = body_of(model)
    n_heads, width = body.blocks[0].attn.n_heads, body.wte.embedding_dim
    nothing = body.wte.weight.new_empty(len(prompts), n_heads, 0, width // n_heads)
    cache: KVCache = [(nothing, nothing)] * len(body.blocks)
    for tokens in body.prompt_tokens[prompts].T:
        said, own = extend(model, tokens[:, None], cache)
        cache = lengthen(cache, own)
    return said[:, 0], cache


def extend(model: nn.Module, tokens: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Read C sibling tokens, each as the next one after the P texts of a cache.

    Tokens `[1, C]` are siblings that all P texts share: up to the first layer's attention nothing
    depends on the text, and is computed once.

    Args:
      model: a policy or a model with a scalar head.
      tokens: `[P, C]` or `[1, C]` int64.
      cache: of the P texts, all of one length.
    Returns:
      `(outputs [P, C, K], own)`: what the model says after each token, and the tokens' own keys and
      values, for `lengthen`.
    """
    body = body_of(model)
    x = body.wte(tokens) + body.wpe.weight[cache[0][0].shape[2]]  # [P, C, D]
    own: KVCache = []
    for block, (keys, values) in zip(body.blocks, cache, strict=True):
        attended, k, v = _attend_to_cache(block.attn, block.ln_1(x), keys, values)
        x = x + attended
        x = x + block.mlp(block.ln_2(x))
        own.append((k, v))
    return outputs(model, body.ln_f(x)), own


def _attend_to_cache(
    attn: SelfAttention, x: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of C siblings `x` `[P, C, D]`, each to the text before it and to itself alone."""
    q, k, v = attn.queries_keys_values(x)  # [P, H, C, D/H], or 1 for P where all share x
    own = (q * k).sum(-1).unsqueeze(2).expand(len(keys), -1, -1, -1)  # [P, H, 1, C]
    scores = torch.cat([keys @ q.mT, own], 2) * q.shape[-1] ** -0.5  # [P, H, S + 1, C]
    weights = scores.softmax(2).mT  # [P, H, C, S + 1]; C innermost is what keeps softmax fast
    mixed = torch.addcmul(weights[..., :-1] @ values, weights[..., -1:], v)  # [P, H, C, D/H]
    return attn.c_proj(mixed.transpose(1, 2).flatten(2)), k, v


def follow(model: Policy, cache: KVCache, edges: Tensor) -> tuple[Tensor, KVCache]:
    """Outputs `[N, K]` and caches after N edges: token v after text p is edge p V + v."""
    cache = take(cache, edges // model.vocab_size)
    said, own = extend(model, (edges % model.vocab_size)[:, None], cache)
    return said[:, 0], lengthen(cache, own)


def take(cache: KVCache, rows: Tensor) -> KVCache:
    """The caches of some of the texts; of all in their order, `cache` itself and no copy."""
    if cache and torch.equal(rows, torch.arange(len(cache[0][0]), device=rows.device)):
        return cache
    return [(keys[rows], values[rows]) for keys, values in cache]


def lengthen(path: KVCache, own: KVCache) -> KVCache:
    """Caches of P texts with their C children's own keys and values: P * C longer texts.

    Args:
      path: of the texts, `[P, H, S, D/H]` per layer.
      own: of the children, `[P, H, C, D/H]`, or `[1, H, C, D/H]` where all texts share them.
    Returns:
      `[P C, H, S + 1, D/H]` per layer.
    """

    def join(shared: Tensor, mine: Tensor) -> Tensor:  # [P, H, S, d], [P or 1, H, C, d]
        n_children = mine.shape[2]
        mine = mine.transpose(1, 2).unsqueeze(3).expand(len(shared), -1, -1, -1, -1)
        shared = shared.unsqueeze(1).expand(-1, n_children, -1, -1, -1)
        return torch.cat([shared, mine], dim=3).flatten(0, 1)  # [P * C, H, S + 1, d]

    return [
        (join(keys, own_keys), join(values, own_values))
        for (keys, values), (own_keys, own_values) in zip(path, own, strict=True)
    ]

"""How a transformer reads one token after another, with keys and values of the earlier ones kept.

The weights are those of `policies.TinyTransformer`, and the results agree with it up to rounding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dpo_mini.policies.base import KVCache, TabularPolicy
from dpo_mini.policies.transformer import SelfAttention
from dpo_mini.rollout.trees import body_and_heads


def begin(model: nn.Module, prompts: Tensor) -> tuple[Tensor, KVCache]:
    """Read the prompts with numbers `prompts` `[N]`.

    Returns:
      `(outputs [N, K], cache)`: the outputs of `model` after each prompt, and the cache so far.
    """
    if isinstance(model, TabularPolicy):
        return model.logits[prompts], []
    body, _ = body_and_heads(model)
    n_heads, width = body.blocks[0].attn.n_heads, body.wte.embedding_dim
    nothing = body.wte.weight.new_empty(len(prompts), n_heads, 0, width // n_heads)
    cache: KVCache = [(nothing, nothing)] * len(body.blocks)
    for tokens in body.prompt_tokens[prompts].T:
        read, own = extend(model, tokens[:, None], cache)
        cache = lengthen(cache, own)
    return read[:, 0], cache


def extend(model: nn.Module, tokens: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Read C tokens, each of them as the next one after each of N texts.

    The C tokens do not see each other. Tokens `[1, C]` are the same for all texts: up to the first
    layer's attention nothing depends on the text, and it is computed once.

    Args:
      model: a transformer, or a model that reads its hidden states.
      tokens: `[N, C]` or `[1, C]` int64.
      cache: of the N texts, all of one length.
    Returns:
      `(outputs [N, C, K], own)`: the outputs of `model` after each token, and each token's own keys
      and values, for `lengthen`.
    """
    body, heads = body_and_heads(model)
    x = body.wte(tokens) + body.wpe.weight[cache[0][0].shape[2]]  # [N or 1, C, D]
    own: KVCache = []
    for block, (keys, values) in zip(body.blocks, cache, strict=True):
        attended, k, v = _attend_to_cache(block.attn, block.ln_1(x), keys, values)
        x = x + attended
        x = x + block.mlp(block.ln_2(x))
        own.append((k, v))
    return heads(body.ln_f(x)), own


def _attend_to_cache(
    attn: SelfAttention, x: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of C tokens `x` `[N, C, D]`, each to the text before it and to itself.

    `keys` and `values` `[N, H, S, D/H]` are those of the text. Returned are the result `[N, C, D]`
    and the tokens' own keys and values `[N, H, C, D/H]`; N may be 1 in `x` and in these two.
    """
    q, k, v = attn.queries_keys_values(x)  # each [N or 1, H, C, D/H]
    own = (q * k).sum(-1).unsqueeze(2).expand(len(keys), -1, -1, -1)  # [N, H, 1, C]
    scores = torch.cat([keys @ q.mT, own], 2) * q.shape[-1] ** -0.5  # [N, H, S + 1, C]
    weights = scores.softmax(2).mT  # [N, H, C, S + 1]; with C innermost softmax is fast
    mixed = torch.addcmul(weights[..., :-1] @ values, weights[..., -1:], v)  # [N, H, C, D/H]
    return attn.c_proj(mixed.transpose(1, 2).flatten(2)), k, v


def split(cache: KVCache, size: int) -> Iterator[KVCache]:
    """The caches of the texts, `size` of them at a time."""
    # `split`, not slices: the gradient of a slice is a whole tensor, nearly all of it zeros.
    layers = [zip(keys.split(size), values.split(size), strict=True) for keys, values in cache]
    return map(list, zip(*layers, strict=True))


def lengthen(cache: KVCache, own: KVCache) -> KVCache:
    """The caches of N C texts: each of N texts, followed by each of C tokens.

    Args:
      cache: of the N texts, `[N, H, S, D/H]` per layer.
      own: of the tokens, `[N, H, C, D/H]` per layer, or `[1, H, C, D/H]` where they are the same
        for all texts.
    Returns:
      `[N C, H, S + 1, D/H]` per layer, the C texts of each text side by side.
    """

    def join(text: Tensor, token: Tensor) -> Tensor:  # [N, H, S, d], [N or 1, H, C, d]
        n_texts, n_tokens = len(text), token.shape[2]
        token = token.transpose(1, 2).unsqueeze(3).expand(n_texts, -1, -1, -1, -1)
        text = text.unsqueeze(1).expand(-1, n_tokens, -1, -1, -1)
        return torch.cat([text, token], dim=3).flatten(0, 1)  # [N C, H, S + 1, d]

    return [
        (join(keys, own_keys), join(values, own_values))
        for (keys, values), (own_keys, own_values) in zip(cache, own, strict=True)
    ]

"""Completions drawn from a policy; rows with the same beginning are read together."""

import torch
from torch import Tensor

from dpo_mini._arguments import check_generator, check_indices
from dpo_mini.logps import PAD
from dpo_mini.policies.base import Policy
from dpo_mini.rollout.kv_cache import begin, follow


def sample(policy: Policy, prompts: Tensor, *, generator: torch.Generator) -> Tensor:
    """One completion per prompt; rows with the same beginning go through the policy together.

    Each distinct prefix is read once until 7 rows of 8 have one of their own; from there on sorting
    them out costs more than it saves, and each row is read.

    Args:
      policy: a `Policy`.
      prompts: `[B]` int64, repeats allowed.
      generator: draws every token.
    Returns:
      `[B, T]` int64, padded with `PAD` after the end token.
    Raises:
      ValueError: a prompt is out of range.
    """
    check_indices("prompts", prompts, "[B]", policy.n_prompts)
    check_generator(generator)
    completions = torch.full((len(prompts), policy.max_tokens), PAD, device=prompts.device)
    rows = torch.arange(len(prompts), device=prompts.device)  # the completions still going on
    with torch.no_grad():
        distinct, node = prompts.unique(return_inverse=True)  # node [B]: each row's prefix
        logits, cache = begin(policy, distinct)
        for depth in range(policy.max_tokens):
            probs = logits.softmax(-1)[node]
            drawn = torch.multinomial(probs, 1, generator=generator).squeeze(1)
            completions[rows, depth] = drawn
            if policy.end_token is not None:
                going_on = drawn != policy.end_token
                rows, node, drawn = rows[going_on], node[going_on], drawn[going_on]
            if depth == policy.max_tokens - 1 or not len(rows):
                break
            rows_edges = node * policy.vocab_size + drawn
            edges, node = rows_edges.unique(return_inverse=True)
            if 8 * len(edges) > 7 * len(rows):
                edges, node = rows_edges, torch.arange(len(rows), device=rows.device)
            logits, cache = follow(policy, cache, edges)
    return completions

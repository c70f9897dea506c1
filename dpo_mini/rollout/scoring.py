"""One way to ask for log-probabilities of completions; how they are read is decided here.

A batch is read as rows, each prompt followed by its answers, or as a tree of its distinct prefixes
(`rollout.trees`). The values agree up to rounding. A node of the tree costs more than a token of a
row, since it gathers the keys and values of all that stand before it; so the tree is taken where
completions begin alike.
"""

import torch
from torch import Tensor

from dpo_mini.arguments import check_at_most_0, check_rows
from dpo_mini.logps import PAD
from dpo_mini.policies.base import (
    Policy,
    PrefixTree,
    Scorer,
    TabularPolicy,
    check_completions,
)
from dpo_mini.policies.transformer import TinyTransformer
from dpo_mini.policies.values import RewardModel, SeparateNetworks, SharedTrunk
from dpo_mini.rollout.trees import prefix_tree, read_tree


def token_logps(
    policy: Scorer, prompts: Tensor, *completions: Tensor, name: str = "policy"
) -> Tensor:
    """Log-probability of each token of one or more completions per prompt.

    Values and gradients are those of `policy.token_logps`; a `Policy` is read in the faster of two
    ways, chosen by how many prefixes the completions share.

    Args:
      policy: a `Policy`, or anything with a `token_logps` of its own.
      prompts: `[B]` int64, or what a policy of another library takes.
      *completions: K tensors `[B, T]` int64, padded with `PAD`, such as the chosen answers and the
        rejected ones.
      name: what an error calls the policy.
    Returns:
      `[K B, T]`, nats, the first completions of all prompts first; 0 on padding.
    Raises:
      ValueError: as `policy.token_logps`; another shape, or a value above 0, from a policy of
        another library: most often it is a negative log-likelihood.
    """
    answers = torch.cat(completions)
    asked = prompts.repeat(len(completions), *[1] * (prompts.dim() - 1))
    if not isinstance(policy, TabularPolicy | TinyTransformer):
        scored = policy.token_logps(asked, answers)
        if scored.shape != answers.shape:
            want, got = list(answers.shape), list(scored.shape)
            raise ValueError(f"`{name}.token_logps` must have shape [B, T] = {want}, got {got}")
        check_at_most_0(f"{name}.token_logps", scored.masked_fill(answers == PAD, 0.0))
        return scored
    mask = check_completions(policy, asked, answers)
    tree = batch_tree(policy, asked, answers)
    if isinstance(policy, TinyTransformer) and _rows_are_faster(policy, tree, completions):
        return _of_rows(policy, prompts, completions) * mask
    return of_tokens(read_tree(policy, tree).log_softmax(-1), tree, answers)


def shared_prefix_token_logps(policy: Policy, prompts: Tensor, completions: Tensor) -> Tensor:
    """`policy.token_logps`, with each distinct prefix of the batch read once, as a tree.

    Arguments, errors, values and gradients are those of `policy.token_logps`.

    Returns:
      `[B, T]`, nats; 0 on padding.
    """
    check_completions(policy, prompts, completions)
    tree = batch_tree(policy, prompts, completions)
    return of_tokens(read_tree(policy, tree).log_softmax(-1), tree, completions)


def read_actor_critic(
    actor_critic: SharedTrunk | SeparateNetworks,
    prompts: Tensor,
    completions: Tensor,
    *,
    tree: PrefixTree | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What PPO asks of a policy and its value function, each distinct prefix read once.

    Args:
      actor_critic: says V logits and then the value.
      prompts, completions: as in `policy.token_logps`.
      tree: `batch_tree` of the two, where it is at hand.
    Returns:
      `(token_logps, values, entropies)`, `[B, T]` each, 0 on padding: of every token its
      log-probability in nats, and of the prefix before it the value and, in nats, the entropy of
      the next token.
    Raises:
      ValueError: as `policy.token_logps`.
    """
    mask = check_completions(actor_critic.policy, prompts, completions)
    tree = tree or batch_tree(actor_critic.policy, prompts, completions)
    outputs = read_tree(actor_critic, tree)  # [N, V + 1]
    logps = outputs[:, :-1].log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)  # [N], of each distinct prefix
    values = outputs[:, -1].take(tree.nodes) * mask
    return of_tokens(logps, tree, completions), values, entropies.take(tree.nodes) * mask


def shared_prefix_rewards(model: RewardModel, prompts: Tensor, completions: Tensor) -> Tensor:
    """A reward model's scalar for each completion, `[B]`, each distinct prefix read once.

    Args:
      model: a `RewardModel`.
      prompts, completions: as in `policy.token_logps`.
    Returns:
      `[B]`, reward units.
    Raises:
      ValueError: a prompt or token is out of range; a completion is empty, too long, or goes on
        after its end token.
    """
    lengths = check_completions(model, prompts, completions).sum(1)
    tree = prefix_tree(prompts, completions, model.vocab_size)
    last = tree.nodes.gather(1, lengths[:, None]).squeeze(1)
    return read_tree(model, tree).squeeze(1).take(last)


def batch_tree(policy: Policy, prompts: Tensor, completions: Tensor) -> PrefixTree:
    """The tree of what is read to predict the tokens of completions: all but their last ones."""
    mask = completions != PAD
    all_but_last = completions[:, :-1].masked_fill(~mask[:, 1:], PAD)
    return prefix_tree(prompts, all_but_last, policy.vocab_size)


def of_tokens(logps: Tensor, tree: PrefixTree, completions: Tensor) -> Tensor:
    """From log-probabilities `[N, V]` after each prefix to those of the tokens, `[B, T]`."""
    flat = tree.nodes * logps.shape[1] + completions.clamp(min=0)
    return logps.take(flat) * (completions != PAD)


def _rows_are_faster(
    policy: TinyTransformer, tree: PrefixTree, completions: tuple[Tensor, ...]
) -> bool:
    """Whether the tokens of rows cost less than the nodes of the tree.

    A node costs as much as 1.5 tokens, and a fifteenth more for each prefix on its way; measured by
    `benchmarks/training.py`.
    """
    n_rows, n_tokens = completions[0].shape
    n_prompt_tokens = policy.prompt_tokens.shape[1]
    in_rows = n_rows * (n_prompt_tokens + len(completions) * (n_tokens - 1))
    n_nodes, n_steps = tree.ancestors.shape
    return n_nodes * (1.5 + (n_steps + n_prompt_tokens - 1) / 15) > in_rows


def _of_rows(policy: TinyTransformer, prompts: Tensor, completions: tuple[Tensor, ...]) -> Tensor:
    """`token_logps` from rows of a prompt and its K answers, none of which sees another."""
    check_rows("prompts", prompts, completions=completions[0])
    n_answers, (n_rows, n_tokens) = len(completions), completions[0].shape
    prompt = policy.prompt_tokens[prompts]  # [B, P]
    n_before = prompt.shape[1]
    device = prompts.device
    answer = torch.arange(n_answers, device=device).repeat_interleave(n_tokens - 1)
    places = n_before + torch.arange(n_tokens - 1, device=device).repeat(n_answers)
    answer = torch.cat([answer.new_full((n_before,), -1), answer])  # -1 on the prompt
    places = torch.cat([torch.arange(n_before, device=device), places])  # [S]
    mask = (places <= places[:, None]) & ((answer == -1) | (answer == answer[:, None]))
    tokens = torch.cat([prompt, *(each[:, :-1].clamp(min=0) for each in completions)], 1)
    hidden = policy.hidden(tokens, places, mask)  # [B, S, D]
    # Before the first token of each answer stands the prompt's last one.
    own = n_before + torch.arange(n_answers * (n_tokens - 1), device=device).view(n_answers, -1)
    before = torch.cat([own.new_full((n_answers, 1), n_before - 1), own], 1)  # [K, T]
    logps = policy.unembed(hidden).log_softmax(-1)  # [B, S, V]
    flat = before[:, None] * policy.vocab_size + torch.stack(completions).clamp(min=0)  # [K, B, T]
    scored = logps.flatten(1).gather(1, flat.transpose(0, 1).flatten(1))  # [B, K T]
    return scored.view(n_rows, n_answers, n_tokens).transpose(0, 1).flatten(0, 1)

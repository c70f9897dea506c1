"""`token_logps`, the one way to ask for log-probabilities of completions, and its relatives.

A batch can be read in two ways, whose results agree up to rounding: as rows, each of them a prompt
and its completions, or as a tree of the distinct prefixes (`rollout.trees`). A node of the tree
costs more than a token of a row, because the keys and values of all its ancestors are gathered for
it. The tree is faster where enough completions begin alike.
"""

import torch
from torch import Tensor

from dpo_mini._arguments import check_at_most_0
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
    policy: Scorer,
    prompts: Tensor,
    *completions: Tensor,
    name: str = "policy",
    tree: PrefixTree | None = None,
) -> Tensor:
    """Log-probability of each token of K completions per prompt.

    Values and gradients are those of `policy.token_logps`. A `Policy` is read as rows or as a tree,
    whichever is faster on completions like these.

    Args:
      policy: a `Policy`, or any other `Scorer`.
      prompts: `[B]` int64, or what another `Scorer` takes.
      *completions: K tensors `[B, T]` int64, padded with `PAD`, such as the chosen answers and the
        rejected ones.
      name: what an error calls the policy.
      tree: `batch_tree` of all these completions, if the caller has it already.
    Returns:
      `[K B, T]`, nats, the first completion of every prompt, then the second; 0 on padding.
    Raises:
      ValueError: as `policy.token_logps`, or completions of different shapes. Of a `Scorer` that is
        no `Policy`: its result is not `[K B, T]`, or has values above 0, which most often are
        negative log-likelihoods.
    """
    for each in completions:
        if each.shape != completions[0].shape:
            shapes = [list(tensor.shape) for tensor in completions]
            raise ValueError(f"`completions` must have one shape, got {shapes}")
    answers, asked = torch.cat(completions), torch.cat([prompts] * len(completions))
    if not isinstance(policy, TabularPolicy | TinyTransformer):
        scored = policy.token_logps(asked, answers)
        if scored.shape != answers.shape:
            want, got = list(answers.shape), list(scored.shape)
            raise ValueError(f"`{name}.token_logps` must have shape [B, T] = {want}, got {got}")
        check_at_most_0(f"{name}.token_logps", scored.masked_fill(answers == PAD, 0.0))
        return scored
    mask = check_completions(policy, asked, answers)
    tree = tree or batch_tree(policy, asked, answers)
    if isinstance(policy, TinyTransformer) and _rows_are_faster(policy, tree, completions):
        return _read_rows(policy, prompts, torch.stack(completions)) * mask
    return of_tokens(read_tree(policy, tree).log_softmax(-1), tree, answers)


def shared_prefix_token_logps(policy: Policy, prompts: Tensor, completions: Tensor) -> Tensor:
    """`policy.token_logps` `[B, T]`, with each distinct prefix of the batch read once, as a tree.

    Arguments, errors, values and gradients are those of `policy.token_logps`; `token_logps` chooses
    between this and rows.
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
      actor_critic: the policy and its value function.
      prompts, completions: as in `policy.token_logps`.
      tree: `batch_tree` of the two, if the caller has it already; then they are not checked again.
    Returns:
      `(token_logps, values, entropies)`, `[B, T]` each, 0 on padding: of every token its
      log-probability in nats, and of the prefix before it the value and, in nats, the entropy of
      the next token.
    Raises:
      ValueError: as `policy.token_logps`.
    """
    if tree is None:
        check_completions(actor_critic.policy, prompts, completions)
        tree = batch_tree(actor_critic.policy, prompts, completions)
    mask = completions != PAD
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
    """The tree of what must be read to predict the tokens of completions: all but their last."""
    is_last = completions[:, 1:] == PAD  # or the T-th, which is left out too
    return prefix_tree(prompts, completions[:, :-1].masked_fill(is_last, PAD), policy.vocab_size)


def of_tokens(logps: Tensor, tree: PrefixTree, completions: Tensor) -> Tensor:
    """From log-probabilities `[N, V]` of what follows each prefix to those of tokens, `[B, T]`."""
    entries = tree.nodes * logps.shape[1] + completions.clamp(min=0)  # [B, T], in `logps` flat
    return logps.take(entries) * (completions != PAD)


def _rows_are_faster(
    policy: TinyTransformer, tree: PrefixTree, completions: tuple[Tensor, ...]
) -> bool:
    """Whether the tokens of rows cost less than the nodes of a tree, forward and backward.

    A node costs as much as 0.8 tokens and another 0.1 for each step of the tree. The two numbers
    fit what `benchmarks/training.py reading` measures, for completions of 5 to 32 tokens.
    """
    n_rows, n_tokens = completions[0].shape
    n_prompt_tokens = policy.prompt_tokens.shape[1]
    n_in_rows = n_rows * (n_prompt_tokens + len(completions) * (n_tokens - 1))
    n_prompts = int((tree.depths == 0).sum())
    n_nodes = len(tree.tokens) + n_prompts * (n_prompt_tokens - 1)
    n_steps = tree.ancestors.shape[1] + n_prompt_tokens - 1
    return n_nodes * (0.8 + 0.1 * n_steps) > n_in_rows


def _read_rows(policy: TinyTransformer, prompts: Tensor, completions: Tensor) -> Tensor:
    """`token_logps` `[K B, T]` of `completions` `[K, B, T]`, from one row per prompt.

    A row is a prompt and then all K completions. Each of them is shown the prompt and itself, and
    its positions go on from the prompt's.
    """
    n_answers, n_rows, n_tokens = completions.shape
    n_before, n_read = policy.prompt_tokens.shape[1], n_tokens - 1  # the last token is not read
    steps = torch.arange(n_before + n_answers * n_read, device=prompts.device)  # S of them
    of_prompt, of_answers = steps[:n_before], steps[n_before:].view(n_answers, n_read)
    positions = torch.cat([of_prompt, steps[n_before : n_before + n_read].repeat(n_answers)])
    answer = torch.where(steps < n_before, -1, (steps - n_before) // max(n_read, 1))
    mask = (steps <= steps[:, None]) & ((answer == -1) | (answer == answer[:, None]))  # [S, S]
    written = completions[:, :, :-1].clamp(min=0).transpose(0, 1).flatten(1)  # [B, K (T - 1)]
    tokens = torch.cat([policy.prompt_tokens[prompts], written], dim=1)  # [B, S]
    logps = policy.unembed(policy.hidden(tokens, positions, mask)).log_softmax(-1)  # [B, S, V]
    # A completion's first token is predicted after the prompt, any other one after the one before.
    after = torch.cat([of_prompt[-1:].expand(n_answers, 1), of_answers], dim=1)  # [K, T]
    entries = after * policy.vocab_size + completions.clamp(min=0).transpose(0, 1)  # [B, K, T]
    scored = logps.flatten(1).gather(1, entries.flatten(1))  # [B, K T]
    return scored.view(n_rows, n_answers, n_tokens).transpose(0, 1).flatten(0, 1)

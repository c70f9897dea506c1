"""Every completion of a task: tables of log-probabilities and of rewards, and exact gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini.arguments import check_count
from dpo_mini.policies.base import HasSizes, KVCache, Policy
from dpo_mini.policies.values import RewardModel
from dpo_mini.rollout.kv_cache import begin, extend, lengthen
from dpo_mini.tasks import Task, subtree_sizes

Progress = Callable[[range], Iterable[int]]
Loss = Callable[[int, Tensor, Tensor], Tensor]
"""`(prompt, logps [n], columns [n]) -> []`: a sum over n completions of one prompt."""


class Prefixes(NamedTuple):
    """P prefixes of one length."""

    next_logps: Tensor
    """`[P, V]`, log-probability of the prefix and each next token, nats."""
    cache: KVCache


def enumerate_logps(
    policy: Policy, task: Task, *, n_parents: int = 128, progress: Progress = iter
) -> Tensor:
    """log pi(y|x) of every completion of every prompt, each distinct prefix read once.

    The walk is depth first over chunks of `n_parents` prefixes of one length, whose children go
    through the policy together; keys and values are kept along the current path only, so the
    memory beside the result is bounded. With gradients it is not: what each prefix computed is kept
    for the backward pass. `exact_gradient` keeps less.

    Args:
      policy: a `Policy` of the sizes of `task`.
      task: its `completions` `[Y, T]` name the columns of the result.
      n_parents: prefixes in a chunk; more is more memory and, up to a point, more speed. Changes
        the result by rounding alone.
      progress: wraps the range of prompts, such as `notebook_progress("every completion")`.
    Returns:
      `[X, Y]`, nats, of the policy's dtype; differentiable.
    Raises:
      ValueError: the sizes of policy and task differ.
    """
    check_count("n_parents", n_parents)
    check_same_sizes("policy", policy, task)
    going_on = _tokens_that_go_on(task)

    def below(prefixes: Prefixes, depth: int) -> Tensor:
        if depth == task.max_tokens - 1:
            return prefixes.next_logps
        longer = depth + 2 < task.max_tokens  # else nothing follows: no need for more caches
        children = _children(policy, prefixes, going_on, longer=longer)
        blocks = [below(part, depth + 1) for part in _chunks(children, n_parents)]
        return _in_order(task.end_token, prefixes.next_logps, torch.cat(blocks), len(going_on))

    tables = []
    for x in progress(range(len(task.prompts))):
        tables.append(below(_first(policy, task.prompts[x : x + 1]), 0))
    return torch.cat(tables)


def enumerate_rewards(
    model: RewardModel, task: Task, *, n_parents: int = 128, progress: Progress = iter
) -> Tensor:
    """A reward model's scalar for every completion of every prompt, `[X, Y]`; no gradient.

    The walk is that of `enumerate_logps`, one token deeper: a reward is read off the last token.

    Args:
      model: a `RewardModel` of the sizes of `task`.
      task, n_parents, progress: as in `enumerate_logps`.
    Returns:
      `[X, Y]`, reward units.
    Raises:
      ValueError: the sizes of model and task differ.
    """
    check_count("n_parents", n_parents)
    check_same_sizes("model", model, task)
    every, going_on = torch.arange(task.vocab_size), _tokens_that_go_on(task)
    every = every.to(going_on.device)

    def below(cache: KVCache, depth: int) -> Tensor:
        rewards, own = extend(model, every[None], cache)
        rewards = rewards.squeeze(-1)  # [P, V], each token as the last one
        if depth + 1 == task.max_tokens:
            return rewards
        own = [(keys[:, :, going_on], values[:, :, going_on]) for keys, values in own]
        children = Prefixes(rewards[:, going_on].reshape(-1, 1), lengthen(cache, own))
        blocks = [below(part.cache, depth + 1) for part in _chunks(children, n_parents)]
        return _in_order(task.end_token, rewards, torch.cat(blocks), len(going_on))

    with torch.no_grad():
        prompts = (task.prompts[x : x + 1] for x in progress(range(len(task.prompts))))
        return torch.cat([below(begin(model, prompt)[1], 0) for prompt in prompts])


def exact_gradient(
    policy: Policy, task: Task, loss: Loss, *, n_parents: int = 64, progress: Progress = iter
) -> Tensor:
    r"""Add the gradient of a sum over all completions to `.grad` of each weight.

    The gradient of $\sum_y f(\log\pi(y|x))$ through `enumerate_logps` keeps what every prefix
    computed. Here only the prefixes of at most T - 2 tokens keep it. The rest is read in chunks;
    each chunk is differentiated at once, up to the keys and values that it was given, and one last
    backward pass carries these gradients through the shorter prefixes. Nothing is computed twice.

    Args:
      policy: a `Policy` of the sizes of `task`; its `.grad` is added to.
      task: names the columns.
      loss: called with a prompt's number, log-probabilities of n of its completions and their
        columns in the task's tables; returns their part of the sum, a scalar. Every completion is
        in one call.
      n_parents: prefixes in a chunk.
      progress: as in `enumerate_logps`.
    Returns:
      `[]`, the sum, without gradient.
    Raises:
      ValueError: the sizes of policy and task differ, or `loss` returns no scalar.
    """
    check_count("n_parents", n_parents)
    check_same_sizes("policy", policy, task)
    going_on, end = _tokens_that_go_on(task), task.end_token
    sizes = subtree_sizes(task.vocab_size, task.max_tokens, end)
    total = torch.zeros((), dtype=torch.float64)

    def part(x: int, logps: Tensor, columns: Tensor) -> Tensor:
        value = loss(x, logps.flatten(), columns.flatten())
        if value.dim() > 0:
            raise ValueError(f"`loss` must return a scalar, got shape {list(value.shape)}")
        total.add_(value.detach().double().cpu())
        return value

    for x in progress(range(len(task.prompts))):
        prefixes = _first(policy, task.prompts[x : x + 1])
        columns = torch.zeros(1, dtype=torch.int64, device=going_on.device)  # first of each prefix
        roots: list[tuple[Tensor, Tensor | None]] = []  # what to differentiate, and its gradient
        for depth in range(task.max_tokens):
            after = _columns(columns, task.vocab_size, end, sizes[depth + 1])  # [P, V]
            if depth == task.max_tokens - 1:
                roots.append((part(x, prefixes.next_logps, after), None))
            elif end is not None:
                roots.append((part(x, prefixes.next_logps[:, end], after[:, end]), None))
            if depth + 2 >= task.max_tokens:
                break
            prefixes = _children(policy, prefixes, going_on, longer=True)
            columns = after[:, going_on].flatten()
        if task.max_tokens > 1:
            flat = [prefixes.next_logps, *(tensor for layer in prefixes.cache for tensor in layer)]
            cut = [[piece.requires_grad_() for piece in t.detach().split(n_parents)] for t in flat]
            starts = after[:, going_on].split(n_parents)
            for first, next_logps, *layers in zip(starts, *cut, strict=True):
                cache = list(zip(layers[::2], layers[1::2], strict=True))
                leaves = _children(policy, Prefixes(next_logps, cache), going_on, longer=False)
                last = _columns(first.flatten(), task.vocab_size, end, 1)
                part(x, leaves.next_logps, last).backward()
            roots += [
                (tensor, torch.cat([_grad(piece) for piece in pieces]))
                for tensor, pieces in zip(flat, cut, strict=True)
                if tensor.requires_grad
            ]
        tensors, gradients = zip(*roots, strict=True)
        torch.autograd.backward(tensors, gradients)
    return total


def check_same_sizes(argument: str, model: HasSizes, task: Task) -> None:
    """Refuse a model whose sizes are not those of the task."""
    for name in ("vocab_size", "max_tokens", "end_token"):
        if getattr(model, name) != getattr(task, name):
            got, want = getattr(model, name), getattr(task, name)
            raise ValueError(f"{argument}: got {name} = {got}, takes {want} like the task")
    if model.n_prompts != len(task.prompts):
        got, want = model.n_prompts, len(task.prompts)
        raise ValueError(f"{argument}: got n_prompts = {got}, takes {want}")


def _first(policy: Policy, prompts: Tensor) -> Prefixes:
    logits, cache = begin(policy, prompts)
    return Prefixes(logits.log_softmax(-1), cache)


def _children(policy: Policy, prefixes: Prefixes, going_on: Tensor, *, longer: bool) -> Prefixes:
    """The prefixes that are one token longer, P C of them; with caches where `longer`."""
    logits, own = extend(policy, going_on[None], prefixes.cache)
    so_far = prefixes.next_logps[:, going_on].flatten()
    cache = lengthen(prefixes.cache, own) if longer else []
    return Prefixes(so_far[:, None] + logits.flatten(0, 1).log_softmax(-1), cache)


def _chunks(prefixes: Prefixes, size: int) -> Iterator[Prefixes]:
    # `split`, not slices: the gradient of a slice is a whole tensor, nearly all of it zeros.
    layers = [zip(k.split(size), v.split(size), strict=True) for k, v in prefixes.cache]
    for rows, *layer_rows in zip(prefixes.next_logps.split(size), *layers, strict=True):
        yield Prefixes(rows, layer_rows)


def _in_order(end: int | None, ended: Tensor, rest: Tensor, n_children: int) -> Tensor:
    """Columns of P prefixes in dictionary order: `rest`, and `ended[:, end]` where it belongs."""
    rest = rest.view(len(ended), -1)
    if end is None:
        return rest
    at = end * (rest.shape[1] // n_children)  # completions before the end token
    return torch.cat([rest[:, :at], ended[:, end : end + 1], rest[:, at:]], dim=1)


def _columns(first: Tensor, vocab_size: int, end: int | None, size: int) -> Tensor:
    """`[P, V]`: where the completions of each next token begin, if those of a prefix do at `first`.

    Each token but the end token leads to `size` completions.
    """
    tokens = torch.arange(vocab_size, device=first.device)
    before = tokens * size if end is None else tokens * size - (tokens > end) * (size - 1)
    return first[:, None] + before


def _tokens_that_go_on(task: Task) -> Tensor:
    tokens = torch.arange(task.vocab_size, device=task.prompts.device)
    return tokens if task.end_token is None else tokens[tokens != task.end_token]


def _grad(piece: Tensor) -> Tensor:
    return torch.zeros_like(piece) if piece.grad is None else piece.grad

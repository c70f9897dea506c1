"""Every completion of a task: tables of log-probabilities and of rewards, and exact gradients."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_mini._arguments import (
    check_count,
    check_device,
    check_finite,
    check_floats,
    check_normalised,
    check_positive,
)
from dpo_mini.policies.base import HasSizes, KVCache, Policy, device_of
from dpo_mini.policies.values import RewardModel
from dpo_mini.rollout.kv_cache import begin, extend, lengthen, split
from dpo_mini.tasks import Task, subtree_sizes

Progress = Callable[[range], Iterable[int]]
Loss = Callable[[int, Tensor, Tensor], Tensor]
"""`(prompt, logps [n], columns [n]) -> []`: the part of a sum that n completions have in it."""


class Prefixes(NamedTuple):
    """N prefixes of one length."""

    next_logps: Tensor
    """`[N, V]`, log-probability of the prefix followed by each token, nats."""
    cache: KVCache


def enumerate_logps(
    policy: Policy, task: Task, *, n_parents: int = 128, progress: Progress = iter
) -> Tensor:
    """log pi(y|x) of every completion of every prompt, each distinct prefix read once.

    The walk is depth first. It reads the children of `n_parents` prefixes of one length together,
    and keeps keys and values along the current path only. Without gradients the memory beside the
    result is therefore bounded. With gradients it is not: what each prefix computed is kept for the
    backward pass. `exact_gradient` keeps less.

    Args:
      policy: a `Policy` of the sizes of `task`.
      task: its `completions` `[Y, T]` name the columns of the result.
      n_parents: prefixes whose children are read together. A larger number takes more memory and,
        up to a point, less time; the result changes by rounding alone.
      progress: wraps the range of prompts, such as `notebook_progress("every completion")`.
    Returns:
      `[X, Y]`, nats, of the policy's dtype; differentiable.
    Raises:
      ValueError: the sizes or the devices of policy and task differ.
    """
    check_count("n_parents", n_parents)
    check_same_sizes("policy", policy, task)
    going_on = _tokens_that_go_on(task)

    def below(prefixes: Prefixes, depth: int) -> Tensor:
        """One row per prefix of `depth` tokens, one column per completion of a prefix."""
        if depth + 1 == task.max_tokens:
            return prefixes.next_logps
        longer = depth + 2 < task.max_tokens  # else no token will be read after the children
        children = _children(policy, prefixes, going_on, longer=longer)
        blocks = _blocks(children, n_parents) if longer else [children]
        rest = torch.cat([below(block, depth + 1) for block in blocks])
        return _in_order(task.end_token, prefixes.next_logps, rest, len(going_on))

    prompts = (task.prompts[x : x + 1] for x in progress(range(len(task.prompts))))
    return torch.cat([below(_first(policy, prompt), 0) for prompt in prompts])


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
      ValueError: the sizes or the devices of model and task differ.
    """
    check_count("n_parents", n_parents)
    check_same_sizes("model", model, task)
    going_on = _tokens_that_go_on(task)
    every = torch.arange(task.vocab_size, device=going_on.device)

    def below(cache: KVCache, depth: int) -> Tensor:
        """One row per prefix of `depth` tokens, one column per completion of a prefix."""
        rewards, own = extend(model, every[None], cache)
        rewards = rewards.squeeze(-1)  # [N, V], of each token were it the last
        if depth + 1 == task.max_tokens:
            return rewards
        own = [(keys[:, :, going_on], values[:, :, going_on]) for keys, values in own]
        blocks = [below(block, depth + 1) for block in split(lengthen(cache, own), n_parents)]
        return _in_order(task.end_token, rewards, torch.cat(blocks), len(going_on))

    with torch.no_grad():
        prompts = (task.prompts[x : x + 1] for x in progress(range(len(task.prompts))))
        return torch.cat([below(begin(model, prompt)[1], 0) for prompt in prompts])


def exact_gradient(
    policy: Policy, task: Task, loss: Loss, *, n_parents: int = 64, progress: Progress = iter
) -> Tensor:
    r"""Add the gradient of a sum over all completions to `.grad` of each weight of `policy`.

    The gradient of $\sum_x \sum_y f_{xy}(\log\pi(y|x))$ is that of `enumerate_logps` and one
    `backward()`, which keeps what every prefix computed. Here only prefixes of at most T - 2 tokens
    keep it. Their children are read in blocks, and each block is differentiated before the next one
    is read, up to the keys and values that it was given. One last backward pass carries these
    gradients on through the shorter prefixes. Each prefix is read once.

    Args:
      policy: a `Policy` of the sizes of `task`.
      task: its `completions` `[Y, T]` name the columns.
      loss: called with the number of a prompt, the log-probabilities `[n]` of some of its
        completions, and their columns `[n]`. Returns the part of the sum that these have in it, a
        scalar. Over all calls each completion of each prompt comes once.
      n_parents: prefixes whose children are read together.
      progress: as in `enumerate_logps`.
    Returns:
      `[]`, the sum, float64, without gradient.
    Raises:
      ValueError: the sizes or the devices of policy and task differ, no weight of the policy
        requires a gradient, or `loss` returns no scalar.
    """
    check_count("n_parents", n_parents)
    check_same_sizes("policy", policy, task)
    if not any(weight.requires_grad for weight in policy.parameters()):
        raise ValueError("`policy` must have a weight that requires a gradient, got none")
    total = torch.zeros((), dtype=torch.float64)

    def part(x: int, logps: Tensor, columns: Tensor) -> Tensor:
        value = loss(x, logps.flatten(), columns.flatten())
        if value.dim() > 0:
            raise ValueError(f"`loss` must return a scalar, got shape {list(value.shape)}")
        total.add_(value.detach().double().cpu())
        return value

    for x in progress(range(len(task.prompts))):
        _differentiate(policy, task, task.prompts[x : x + 1], partial(part, x), n_parents)
    return total


class SoftValues(NamedTuple):
    """What `soft_values` returns: for each completion, what holds along its prefixes."""

    values: Tensor
    """`[X, Y, T + 1]`, the value after 0, 1, ..., T tokens; the reward once it has ended."""
    token_logps: Tensor
    """`[X, Y, T]`, log-probability of each token under the optimum, nats; 0 where it has ended."""


def soft_values(task: Task, ref_logps: Tensor, rewards: Tensor, beta: float) -> SoftValues:
    r"""The value of every prefix, and the optimal policy as one of tokens.

    The soft value of a prefix s is $V(s) = \beta\log E_{\pi_{ref}}[e^{r(y)/\beta} | s]$ over all
    completions that begin with it: $\beta\log Z$ for the empty one, the reward for one that has
    ended. It obeys $V(s) = \beta\log\sum_v \pi_{ref}(v|s)\,e^{V(sv)/\beta}$, and the optimum takes
    token v with $\beta\log[\pi^*(v|s)/\pi_{ref}(v|s)] = V(sv) - V(s)$. Along a completion these
    differences, `values.diff()`, sum to its implied reward $r - \beta\log Z$, and the token
    log-probabilities to $\log\pi^*(y)$.

    Args:
      task: its `completions` `[Y, T]` name the columns.
      ref_logps: `[X, Y]`, finite, nats; each row's probabilities sum to 1. A prefix that the
        reference never writes would have no value.
      rewards: `[X, Y]`, finite, such as `task.rewards`.
      beta: > 0, reward units per nat.
    Returns:
      `SoftValues(values [X, Y, T + 1], token_logps [X, Y, T])`, reward units and nats, of the dtype
      of the tables. Completions that begin alike have the same values up to where they part.
    Raises:
      ValueError: `beta <= 0`; tables of another shape than the task's, unlike in dtype, on another
        device, not finite or not normalised.
    Source: Rafailov et al. 2024, arXiv:2404.12358; Levine 2018, arXiv:1805.00909.
    """
    check_positive("beta", beta)
    check_floats("[X, Y]", ref_logps=ref_logps, rewards=rewards)
    if ref_logps.shape != task.rewards.shape:
        got, want = list(ref_logps.shape), list(task.rewards.shape)
        raise ValueError(f"`ref_logps` must have shape {want} like the task, got {got}")
    check_device("the tables of the task", task.rewards.device, ref_logps=ref_logps)
    check_finite(ref_logps=ref_logps, rewards=rewards)
    check_normalised(ref_logps=ref_logps)
    starts = torch.ones(len(task.completions), dtype=torch.bool, device=ref_logps.device)
    starts[1:] = False  # where in dictionary order another prefix begins
    prefixes = [starts.cumsum(0) - 1]  # which one each completion begins with, [Y] for each depth
    for tokens in task.completions.T:
        starts[1:] |= tokens[1:] != tokens[:-1]
        prefixes.append(starts.cumsum(0) - 1)
    at_end = ref_logps, ref_logps + rewards / beta
    reference, optimal = (_sums_along(prefixes, logs) for logs in at_end)
    return SoftValues(beta * (optimal - reference), optimal.diff(dim=-1))


def _sums_along(prefixes: list[Tensor], logs: Tensor) -> Tensor:
    """`[X, Y, T + 1]`: the log-sum-exp of `logs` `[X, Y]` over all that begin with each prefix."""
    found = [logs]
    for longer, shorter in pairwise(reversed(prefixes)):
        first = longer.diff(prepend=longer[:1] - 1).bool()  # the first column of a longer prefix
        parent = shorter[first].expand(len(logs), -1)
        shape = len(logs), int(shorter[-1]) + 1
        top = logs.detach().new_empty(shape)
        top = top.scatter_reduce(1, parent, logs.detach(), "amax", include_self=False)
        sums = torch.zeros_like(top).scatter_add(1, parent, (logs - top.gather(1, parent)).exp())
        logs = top + sums.log()
        found.append(logs[:, shorter])
    return torch.stack(found[::-1], -1)


def _differentiate(
    policy: Policy,
    task: Task,
    prompt: Tensor,
    part: Callable[[Tensor, Tensor], Tensor],
    n_parents: int,
) -> None:
    """`exact_gradient` for one prompt `[1]`; `part` takes log-probabilities and columns."""
    going_on, end, last = _tokens_that_go_on(task), task.end_token, task.max_tokens - 1
    prefixes = _first(policy, prompt)
    columns = _columns(task, torch.zeros_like(prompt), 0)  # [1, V]
    if last == 0:
        part(prefixes.next_logps, columns).backward()
        return
    roots: list[tuple[Tensor, Tensor | None]] = []  # what to differentiate, and its own gradient
    for depth in range(last):  # keeping the graph of all prefixes of at most T - 2 tokens
        if depth > 0:
            columns = _columns(task, columns[:, going_on].flatten(), depth)  # [N, V]
            prefixes = _children(policy, prefixes, going_on, longer=True)
        if end is not None:
            roots.append((part(prefixes.next_logps[:, end], columns[:, end]), None))
    parents = columns[:, going_on].split(n_parents)
    for children, block in zip(parents, _blocks(prefixes, n_parents), strict=True):
        kept = [block.next_logps, *(tensor for layer in block.cache for tensor in layer)]
        next_logps, *layers = cut = [tensor.detach().requires_grad_() for tensor in kept]
        given = Prefixes(next_logps, list(zip(layers[::2], layers[1::2], strict=True)))
        longest = _children(policy, given, going_on, longer=False).next_logps
        part(longest, _columns(task, children.flatten(), last)).backward()
        roots += [(tensor, leaf.grad) for tensor, leaf in zip(kept, cut, strict=True)]
    tensors, gradients = zip(*(root for root in roots if root[0].requires_grad), strict=True)
    torch.autograd.backward(tensors, gradients)


def check_same_sizes(argument: str, model: HasSizes, task: Task) -> None:
    """Refuse a model whose sizes are not those of the task, or that lies on another device."""
    for name in ("vocab_size", "max_tokens", "end_token"):
        if getattr(model, name) != getattr(task, name):
            got, want = getattr(model, name), getattr(task, name)
            raise ValueError(f"`{argument}` must have {name} = {want} like the task, got {got}")
    if model.n_prompts != len(task.prompts):
        got, want = model.n_prompts, len(task.prompts)
        raise ValueError(f"`{argument}` must have n_prompts = {want} like the task, got {got}")
    check_device(f"the {argument}'s weights", device_of(model), task=task.prompts.device)


def _first(policy: Policy, prompts: Tensor) -> Prefixes:
    """The prefixes without a token: prompts `[N]` alone."""
    logits, cache = begin(policy, prompts)
    return Prefixes(logits.log_softmax(-1), cache)


def _children(policy: Policy, prefixes: Prefixes, going_on: Tensor, *, longer: bool) -> Prefixes:
    """The N C prefixes that have one of C tokens more; with a cache if they will be `longer`."""
    logits, own = extend(policy, going_on[None], prefixes.cache)
    so_far = prefixes.next_logps[:, going_on].flatten()
    cache = lengthen(prefixes.cache, own) if longer else []
    return Prefixes(so_far[:, None] + logits.flatten(0, 1).log_softmax(-1), cache)


def _blocks(prefixes: Prefixes, size: int) -> Iterator[Prefixes]:
    """The prefixes, `size` at a time."""
    return map(Prefixes, prefixes.next_logps.split(size), split(prefixes.cache, size))


def _in_order(end: int | None, ended: Tensor, rest: Tensor, n_children: int) -> Tensor:
    """Columns of N prefixes in dictionary order: `rest`, and `ended[:, end]` where it belongs."""
    rest = rest.view(len(ended), -1)
    if end is None:
        return rest
    at = end * (rest.shape[1] // n_children)  # completions before the end token
    return torch.cat([rest[:, :at], ended[:, end : end + 1], rest[:, at:]], dim=1)


def _columns(task: Task, first: Tensor, depth: int) -> Tensor:
    """The first column `[N, V]` of each next token of prefixes of `depth` tokens.

    `first` `[N]` are the first columns of the prefixes themselves.
    """
    end = task.end_token
    size = subtree_sizes(task.vocab_size, task.max_tokens, end)[depth + 1]
    tokens = torch.arange(task.vocab_size, device=first.device)
    before = tokens * size  # completions that come before: `size` for each smaller token
    if end is not None:
        before -= (tokens > end) * (size - 1)  # but one for the end token
    return first[:, None] + before


def _tokens_that_go_on(task: Task) -> Tensor:
    """`[C]`, the tokens that another one may follow: all but the end token."""
    tokens = torch.arange(task.vocab_size, device=task.prompts.device)
    return tokens if task.end_token is None else tokens[tokens != task.end_token]

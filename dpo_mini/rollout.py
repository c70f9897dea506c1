"""Every completion as a tree of prefixes, or a few of them by sampling."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_mini.arguments import check_count, check_generator, check_indices
from dpo_mini.logps import PAD
from dpo_mini.policies import (
    Path,
    Policy,
    PrefixTree,
    RewardModel,
    SeparateNetworks,
    SharedTrunk,
    check_completions,
)
from dpo_mini.tasks import Task, subtree_sizes

__all__ = [
    "enumerate_logps",
    "sample",
    "shared_prefix_token_logps",
    "forked_token_logps",
    "branched_token_logps",
    "faster_reader",
    "read_actor_critic",
    "shared_prefix_rewards",
    "enumerate_rewards",
    "prefix_tree",
    "lengthen",
]


def enumerate_logps(
    policy: Policy,
    task: Task,
    *,
    n_parents: int = 128,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """log pi(y|x) of every completion of every prompt, each distinct prefix read once.

    The walk is depth first over chunks of `n_parents` prefixes of one length, whose children go
    through the policy together; keys and values are kept along the current path only, so the
    memory beside the result is bounded. With gradients it is not: what each prefix computed is kept
    for the backward pass. To keep less, wrap the policy's `extend` in `torch.utils.checkpoint`;
    `benchmarks/RESULTS.md` has the cost of both.

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
    _check_sizes("policy", policy, task)
    end, max_tokens = task.end_token, task.max_tokens
    sizes = subtree_sizes(task.vocab_size, max_tokens, end)
    going_on = torch.tensor([v for v in range(task.vocab_size) if v != end])
    going_on = going_on.to(task.prompts.device)

    def below(prefix_logps: Tensor, logits: Tensor, path: Path, depth: int) -> Tensor:
        """Completions `[P, sizes[depth]]` that begin with P prefixes of `depth` tokens."""
        next_logps = prefix_logps[:, None] + logits.log_softmax(-1)  # [P, V]
        if depth == max_tokens - 1:
            return next_logps
        return torch.cat([children(*rows, depth) for rows in chunks(next_logps, path, n_parents)])

    def children(next_logps: Tensor, path: Path, depth: int) -> Tensor:
        n_rows = len(next_logps)
        logits, own = policy.extend(going_on[None], path)
        last = depth + 1 == max_tokens - 1  # nothing follows: no need for the children's paths
        longer = [] if last else lengthen(path, own)
        child_logps = next_logps[:, going_on].flatten()
        rest = below(child_logps, logits.flatten(0, 1), longer, depth + 1).view(n_rows, -1)
        if end is None:
            return rest
        at = end * sizes[depth + 1]  # completions before the end token, in dictionary order
        return torch.cat([rest[:, :at], next_logps[:, end : end + 1], rest[:, at:]], dim=1)

    tables = []
    for x in progress(range(len(task.prompts))):
        logits, path = policy.begin(task.prompts[x : x + 1])
        tables.append(below(logits.new_zeros(1), logits, path, 0))
    return torch.cat(tables)


def sample(policy: Policy, prompts: Tensor, *, generator: torch.Generator) -> Tensor:
    """One completion for each prompt; rows that begin alike go through the policy together.

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
        logits, path = policy.begin(distinct)
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
            logits, path = _follow(policy, path, edges)
    return completions


def shared_prefix_token_logps(policy: Policy, prompts: Tensor, completions: Tensor) -> Tensor:
    """`policy.token_logps`, with each distinct prefix of the batch read once.

    Completions drawn from one policy begin alike: a batch of 1,000 micro-reviews has some 500
    distinct prefixes where scoring each row alone reads 5,000 tokens. Arguments, errors,
    values and gradients are those of `policy.token_logps`.

    Returns:
      `[B, T]`, nats; 0 on padding.
    """
    mask = policy.check_completions(prompts, completions)
    tree = prefix_tree(prompts, _all_but_last(completions, mask), policy.vocab_size)
    return _of_tokens(policy.read_tree(tree).log_softmax(-1), tree, completions)


def forked_token_logps(policy: Policy, prompts: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """`policy.token_logps` of two answers to each prompt, what both begin with read once.

    A row is the prompt and the tokens that both answers share, the rest of the one, the rest of the
    other; the second rest does not see the first, and its depths start again at the fork. Shared
    are the columns that are alike in all rows, such as those of a prompt of many tokens.

    Args:
      policy: a `Policy`.
      prompts: `[B]` int64; chosen, rejected: `[B, T]` int64, padded with `PAD`.
    Returns:
      `[2 B, T]`, nats, the chosen answers first; 0 on padding. Values and gradients are those of
      `policy.token_logps`.
    Raises:
      ValueError: as `policy.token_logps`.
    """
    answers = torch.cat([chosen, rejected])
    mask = policy.check_completions(prompts.repeat(2), answers)
    n_rows, n_tokens = chosen.shape
    fork = _fork(chosen, rejected)
    depths = torch.arange(n_tokens, device=prompts.device)
    steps = torch.arange(2 * n_tokens - 1 - fork, device=prompts.device)
    second = steps >= n_tokens
    first = (steps > fork) & ~second
    beyond = (steps > steps[:, None]) | (second[:, None] & first)
    read = torch.cat([prompts[:, None], chosen[:, :-1], rejected[:, fork:-1]], 1).clamp(min=0)
    logits = policy.read_rows(read, torch.cat([depths, depths[fork + 1 :]]), beyond)  # [B, S, V]
    before = torch.stack([depths, torch.cat([depths[: fork + 1], steps[second]])])  # [2, T]
    flat = before[:, None] * policy.vocab_size + answers.clamp(min=0).view(2, n_rows, n_tokens)
    logps = logits.log_softmax(-1).flatten(1)  # [B, S * V]
    scored = logps.gather(1, flat.transpose(0, 1).flatten(1)).view(n_rows, 2, n_tokens)
    return scored.transpose(0, 1).flatten(0, 1) * mask


def branched_token_logps(
    policy: Policy, prompts: Tensor, chosen: Tensor, rejected: Tensor
) -> Tensor:
    """`forked_token_logps` through `shared_prefix_token_logps`: one tree for the whole batch.

    Args, result and errors are those of `forked_token_logps`.
    """
    return shared_prefix_token_logps(policy, prompts.repeat(2), torch.cat([chosen, rejected]))


def faster_reader(
    policy: Policy, prompts: Tensor, chosen: Tensor, rejected: Tensor
) -> Callable[[Policy, Tensor, Tensor, Tensor], Tensor]:
    """`forked_token_logps` or `branched_token_logps`: the one that is faster on pairs like these.

    A prefix of the tree costs more than a token of a row, for it gathers the keys and values of all
    that stand before it. Both are equally fast where the tree reads .4 as many (where rows are
    multiplied by oneDNN: `policies.linear_of_rows`) to .65 as many (4 layers, width 128, where they
    are not): `benchmarks/training.py`.

    Args:
      policy, prompts, chosen, rejected: as in `forked_token_logps`; one batch will do.
    Returns:
      One of the two functions.
    Raises:
      ValueError: as `policy.token_logps`.
    """
    both, answers = prompts.repeat(2), torch.cat([chosen, rejected])
    mask = policy.check_completions(both, answers)
    n_prefixes = len(prefix_tree(both, _all_but_last(answers, mask), policy.vocab_size).tokens)
    n_tokens = len(prompts) * (2 * chosen.shape[1] - 1 - _fork(chosen, rejected))
    return forked_token_logps if n_prefixes > 0.5 * n_tokens else branched_token_logps


def read_actor_critic(
    actor_critic: SharedTrunk | SeparateNetworks, prompts: Tensor, completions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What PPO asks of a policy and its value function, each distinct prefix read once.

    Args:
      actor_critic: reading gives V logits and then the value.
      prompts, completions: as in `policy.token_logps`.
    Returns:
      `(token_logps, values, entropies)`, `[B, T]` each, 0 on padding: of every token its
      log-probability in nats, and of the prefix before it the value and, in nats, the entropy of
      the next token.
    Raises:
      ValueError: as `policy.token_logps`.
    """
    mask = actor_critic.policy.check_completions(prompts, completions)
    vocab_size = actor_critic.policy.vocab_size
    tree = prefix_tree(prompts, _all_but_last(completions, mask), vocab_size)
    outputs = actor_critic.read_tree(tree)  # [N, V + 1]
    logps = outputs[:, :-1].log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)  # [N], of each distinct prefix
    values = outputs[:, -1].take(tree.nodes) * mask
    return _of_tokens(logps, tree, completions), values, entropies.take(tree.nodes) * mask


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
    return model.read_tree(tree).squeeze(1).take(last)


def enumerate_rewards(
    model: RewardModel,
    task: Task,
    *,
    n_parents: int = 128,
    progress: Callable[[range], Iterable[int]] = iter,
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
    _check_sizes("model", model, task)
    end, max_tokens = task.end_token, task.max_tokens
    every = torch.arange(task.vocab_size, device=task.prompts.device)
    going_on = every[every != end] if end is not None else every

    def below(path: Path, depth: int) -> Tensor:
        """Rewards `[P, sizes[depth]]` of what begins with P prefixes of `depth` tokens."""
        numbers, own = model.extend(every[None], path)
        numbers = numbers.squeeze(-1)  # [P, V]: each token as the last one
        if depth + 1 == max_tokens:
            return numbers
        own = [(keys[:, :, going_on], values[:, :, going_on]) for keys, values in own]
        blocks = chunks(numbers[:, going_on].flatten(), lengthen(path, own), n_parents)
        rest = torch.cat([below(part, depth + 1) for _, part in blocks]).view(len(numbers), -1)
        if end is None:
            return rest
        at = end * (rest.shape[1] // len(going_on))  # completions before the end token
        return torch.cat([rest[:, :at], numbers[:, end : end + 1], rest[:, at:]], dim=1)

    with torch.no_grad():
        prompts = (task.prompts[x : x + 1] for x in progress(range(len(task.prompts))))
        return torch.cat([below(model.begin(prompt)[1], 0) for prompt in prompts])


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
    level = torch.arange(len(first), device=prompts.device).unsqueeze(1)  # lineage of this depth's
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
    lineage = [F.pad(level, (0, n_steps - level.shape[1])) for level in levels]
    return PrefixTree(torch.cat(own), torch.cat(depths), torch.cat(lineage), torch.stack(nodes, 1))


def _fork(chosen: Tensor, rejected: Tensor) -> int:
    """The depth of the last prefix that both answers share in every row."""
    alike = (chosen == rejected).all(0)[:-1]  # the last token of an answer is not read
    return int(alike.long().cumprod(0).sum())


def _all_but_last(completions: Tensor, mask: Tensor) -> Tensor:
    """What is read to predict each token: `[B, T - 1]`, the last token of each row padding."""
    return completions[:, :-1].masked_fill(~mask[:, 1:], PAD)


def _of_tokens(logps: Tensor, tree: PrefixTree, completions: Tensor) -> Tensor:
    """From logps `[N, V]` after each prefix to those of the tokens themselves, `[B, T]`."""
    mask = completions != PAD
    flat = tree.nodes * logps.shape[1] + completions.clamp(min=0)
    return logps.take(flat) * mask


def _follow(policy: Policy, path: Path, edges: Tensor) -> tuple[Tensor, Path]:
    """Logits `[N, V]` and paths after N edges: token v after prefix p is edge p V + v."""
    path = take(path, edges // policy.vocab_size)
    logits, own = policy.extend((edges % policy.vocab_size)[:, None], path)
    return logits[:, 0], lengthen(path, own)


def take(path: Path, rows: Tensor) -> Path:
    """The paths of some of the prefixes; of all in their order, `path` itself and no copy."""
    if path and torch.equal(rows, torch.arange(len(path[0][0]), device=rows.device)):
        return path
    return [(keys[rows], values[rows]) for keys, values in path]


def chunks(next_logps: Tensor, path: Path, size: int) -> Iterator[tuple[Tensor, Path]]:
    """Prefixes, `next_logps` `[P, V]` and their paths, `size` at a time."""
    # `split`, not slices: the gradient of a slice is a whole tensor, nearly all of it zeros.
    layers = [zip(keys.split(size), values.split(size), strict=True) for keys, values in path]
    for rows, *layer_rows in zip(next_logps.split(size), *layers, strict=True):
        yield rows, layer_rows


def lengthen(path: Path, own: Path) -> Path:
    """Paths of P prefixes with their C children's own keys and values: P * C longer paths.

    Args:
      path: of the prefixes, `[P, H, S, D/H]` a layer.
      own: of the children, `[P, H, C, D/H]`, or `[1, H, C, D/H]` where all prefixes share them.
    Returns:
      `[P C, H, S + 1, D/H]` a layer.
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


def _check_sizes(argument: str, model: Policy | RewardModel, task: Task) -> None:
    for name in ("vocab_size", "max_tokens", "end_token"):
        if getattr(model, name) != getattr(task, name):
            got, want = getattr(model, name), getattr(task, name)
            raise ValueError(f"{argument}: got {name} = {got}, takes {want} like the task")
    if model.n_prompts != len(task.prompts):
        got, want = model.n_prompts, len(task.prompts)
        raise ValueError(f"{argument}: got n_prompts = {got}, takes {want}")


def __dir__() -> list[str]:
    return __all__

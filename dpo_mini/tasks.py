"""Tasks small enough to enumerate: bandits, micro-reviews, and sums and sorting of two digits.

A task is a prompt set, a finite set of completions and a table of true rewards. A bandit is a task
whose completions are one token long, so the same functions serve all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from dpo_mini._arguments import (
    Table,
    as_floats,
    check_between,
    check_count,
    check_device,
    check_finite,
    check_floats,
    check_fraction,
    check_generator,
    check_indices,
    check_integers,
    check_logps,
    check_normalised,
)
from dpo_mini.logps import PAD, completion_mask
from dpo_mini.preferences import sample_bradley_terry

__all__ = [
    "Task",
    "subtree_sizes",
    "enumerate_completions",
    "bandit",
    "four_answers",
    "three_answers",
    "random_bandit",
    "REVIEW_WORDS",
    "REVIEW_PROMPTS",
    "micro_reviews",
    "micro_review_demonstrations",
    "HELD_OUT_PAIRS",
    "training_prompts",
    "held_out_prompts",
    "tiny_sums",
    "tiny_sort",
    "tiny_sum_demonstrations",
    "tiny_sort_demonstrations",
]


_MOST_COMPLETIONS = 20_000_000
_MOST_TOKENS = 10_000
_ROUNDS = 100
_TABLES = "the tables of the task"


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts, every completion, and the true reward of each.

    Completions are ordered as in a dictionary, token 0 first: the order in which a depth-first walk
    of the tree of prefixes meets them.

    Prompts are named by their number, 0 to X - 1: `prompts` lists these, and every function that
    asks for prompts takes them. What a policy reads for each is in `prompt_tokens`.

    Args:
      prompt_texts: X strings, one per prompt.
      vocabulary: V strings, one per token.
      max_tokens: T, the most tokens that a completion has.
      end_token: the token that ends a completion, or None where all have T tokens. A completion
        of T tokens that never ended is a completion too.
      rewards: `[X, Y]`, the true reward of every completion, finite.
      ref_logps: `[X, Y]`, the reference policy, where the task has one as a table; nats.
      prompt_tokens: `[X, P]` int64, the tokens of each prompt. Tokens 0..V-1 are those of the
        vocabulary; tokens that only prompts use come after them. If left out, prompt x is the one
        token V + x. A policy cannot tell apart two prompts of the same tokens.
    """

    prompt_texts: tuple[str, ...]
    vocabulary: tuple[str, ...]
    max_tokens: int
    end_token: int | None
    rewards: Tensor
    ref_logps: Tensor | None = None
    prompt_tokens: Tensor | None = None  # a tensor once the task is made
    prompts: Tensor = field(init=False)
    completions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        _check_names("prompt_texts", self.prompt_texts)
        _check_names("vocabulary", self.vocabulary)
        tables = {"rewards": self.rewards}
        if self.ref_logps is not None:
            tables["ref_logps"] = self.ref_logps
            check_floats("[X, Y]", **tables)
            check_logps(ref_logps=self.ref_logps)
            check_normalised(ref_logps=self.ref_logps)
        check_floats("[X, Y]", **tables)
        check_finite(rewards=self.rewards)
        completions = enumerate_completions(self.vocab_size, self.max_tokens, self.end_token)
        want = [len(self.prompt_texts), len(completions)]
        if list(self.rewards.shape) != want:
            raise ValueError(f"`rewards` must have shape {want}, got {list(self.rewards.shape)}")
        object.__setattr__(self, "completions", completions.to(self.rewards.device))
        prompts = torch.arange(want[0], device=self.rewards.device)
        object.__setattr__(self, "prompts", prompts)
        if self.prompt_tokens is None:
            read = self.vocab_size + prompts.unsqueeze(1)
        else:
            check_integers("prompt_tokens", self.prompt_tokens, "[X, P]")
            shape, least = list(self.prompt_tokens.shape), int(self.prompt_tokens.min())
            if shape[0] != want[0]:
                raise ValueError(f"`prompt_tokens` must be [{want[0]}, P], got {shape}")
            if least < 0:
                raise ValueError(f"`prompt_tokens` must be tokens >= 0, got {least}")
            read = self.prompt_tokens.to(self.rewards.device)
        object.__setattr__(self, "prompt_tokens", read)

    def __repr__(self) -> str:
        at_most = "" if self.end_token is None else "at most "
        tokens = "1 token" if self.max_tokens == 1 else f"{at_most}{self.max_tokens} tokens"
        table = "with" if self.ref_logps is not None else "without"
        return (
            f"<Task: {_counted(self.prompt_texts, 'prompt')}; {len(self.completions):,} "
            f"completions of {tokens} from {_counted(self.vocabulary, 'word')}; {table} a table "
            "for its reference>"
        )

    def to(self, device: torch.device | str) -> "Task":
        """This task with all its tables on a device; a task of its own, this one stays."""
        ref_logps = None if self.ref_logps is None else self.ref_logps.to(device)
        return replace(self, rewards=self.rewards.to(device), ref_logps=ref_logps)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.vocabulary)

    def text(self, completion: Tensor) -> str:
        """A completion `[T]` as words for a person: `"not very good"`; an unended one closes in ….

        Digits alone are written as a number: `"12"`.

        Raises:
          ValueError: as `index`.
        """
        check_integers("completion", completion, "[T]")
        self.index(completion.unsqueeze(0))
        tokens = [token for token in completion.tolist() if token != PAD]
        ended = self.end_token is None or tokens[-1] == self.end_token
        words = [self.vocabulary[token] for token in tokens if token != self.end_token]
        number = all(len(word) == 1 and word.isdigit() for word in words)
        said = ("" if number else " ").join(words)
        return (said if ended else f"{said} …") or "(nothing)"

    def index(self, completions: Tensor) -> Tensor:
        """Which column of the tables each of `completions` `[B, T]` is: `[B]` int64.

        Raises:
          ValueError: a completion is empty, has a token outside the vocabulary or after the end
            token, or stops before T tokens without an end token.
        """
        mask = completion_mask(completions, self.end_token)
        if completions.shape[1] != self.max_tokens:
            got = completions.shape[1]
            raise ValueError(f"`completions` must have T = {self.max_tokens} columns, got {got}")
        outside = mask & ((completions < 0) | (completions >= self.vocab_size))
        if outside.any():
            token = int(completions[outside][0])
            raise ValueError(
                f"`completions` must have tokens in 0..{self.vocab_size - 1}, got {token}"
            )
        stopped = ~mask.all(1)
        if self.end_token is not None:
            stopped &= ~(completions == self.end_token).any(1)
        if stopped.any():
            row = int(stopped.nonzero()[0])
            raise ValueError(
                f"`completions` must have an end token or T tokens, got row {row} cut short"
            )
        sizes = subtree_sizes(self.vocab_size, self.max_tokens, self.end_token)
        below = torch.tensor(sizes[1:], device=completions.device)  # completions after t + 1 tokens
        before = completions * below  # completions that an earlier sibling leads to
        if self.end_token is not None:  # the end token leads to one completion, itself
            before = before - (completions > self.end_token) * (below - 1)
        return before.masked_fill(~mask, 0).sum(1)

    def sample_completions(
        self, logps: Tensor, prompts: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """One completion for each of `prompts` from a table of log-probabilities.

        Args:
          logps: `[X, Y]`, the policy as a table, nats.
          prompts: `[B]` int64.
          generator: draws the completions.
        Returns:
          `[B, T]` int64, padded with `PAD`.
        Raises:
          ValueError: a table of another shape, a prompt out of range, or something that lies on
            another device than the task.
        """
        self._check_policy(logps)
        check_indices("prompts", prompts, "[B]", len(self.prompts))
        check_generator(generator)
        check_device(_TABLES, self.rewards.device, prompts=prompts, generator=generator)
        return self.completions[_draw(_cdf(logps), prompts, generator)]

    def sample_pairs(
        self, logps: Tensor, n: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Preference pairs: prompts drawn evenly, two different answers from a policy, one winner.

        The two answers are independent draws, the second drawn again until it differs. Where it
        still does not after 100 rounds, it is drawn from the answers that differ, which has the
        same law and ends even for a policy that is all but sure of one answer. The winner is drawn
        from Bradley-Terry on the true reward.

        Args:
          logps: `[X, Y]`, the policy that answers, as a table, nats.
          n: how many pairs.
          generator: draws prompts, answers and winners.
        Returns:
          `(prompts [n], chosen [n, T], rejected [n, T])`, int64.
        Raises:
          ValueError: `n < 1`; a table of another shape; a row with fewer than two answers whose
            log-probability is above -inf; a table or generator that lies on another device than
            the task.
        """
        check_count("n", n)
        check_generator(generator)
        self._check_policy(logps)
        check_device(_TABLES, self.rewards.device, generator=generator)
        if ((logps > -math.inf).sum(-1) < 2).any():
            raise ValueError(
                "`logps` must give mass to 2 completions of every prompt, got a row with all on one"
            )
        device = self.rewards.device
        prompts = torch.randint(len(self.prompts), (n,), generator=generator, device=device)
        cdf = _cdf(logps)
        first = _draw(cdf, prompts, generator)
        second = _draw(cdf, prompts, generator)
        for _ in range(_ROUNDS):
            same = (first == second).nonzero().squeeze(1)
            if not same.numel():
                break
            second[same] = _draw(cdf, prompts[same], generator)
        same = (first == second).nonzero().squeeze(1)
        if same.numel():
            drawn = torch.stack([prompts[same], first[same]])
            (rows, columns), which = drawn.unique(dim=1, return_inverse=True)
            others = logps.detach().double()[rows].scatter(1, columns[:, None], -math.inf)
            second[same] = _draw(_cdf(others.log_softmax(-1)), which, generator)
        rewards_a, rewards_b = self.rewards[prompts, first], self.rewards[prompts, second]
        first_wins = sample_bradley_terry(rewards_a, rewards_b, generator=generator)
        chosen = torch.where(first_wins, first, second)
        rejected = torch.where(first_wins, second, first)
        return prompts, self.completions[chosen], self.completions[rejected]

    def _check_policy(self, logps: Tensor) -> None:
        check_floats("[X, Y]", logps=logps)
        if logps.shape != self.rewards.shape:
            got, want = list(logps.shape), list(self.rewards.shape)
            raise ValueError(f"`logps` must have shape {want}, got {got}")
        check_device(_TABLES, self.rewards.device, logps=logps)
        check_logps(logps=logps)
        check_normalised(logps=logps)


def _cdf(logps: Tensor) -> Tensor:
    """Sums `[X, Y]` of the probabilities up to each column, float64."""
    return logps.detach().double().exp().cumsum(-1)


def _draw(cdf: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Columns `[B]` drawn from the rows `prompts` `[B]` of a table, by inverting its CDF."""
    uniform = torch.rand(prompts.shape, dtype=cdf.dtype, device=cdf.device, generator=generator)
    draws = torch.empty_like(prompts)
    for x in prompts.bincount().nonzero().flatten().tolist():
        rows = prompts == x
        draws[rows] = torch.searchsorted(cdf[x], uniform[rows] * cdf[x, -1], right=True)
    return draws.clamp(max=cdf.shape[1] - 1)


def subtree_sizes(vocab_size: int, max_tokens: int, end_token: int | None) -> list[int]:
    """How many completions begin with an unended prefix of 0, 1, …, T tokens: T + 1 numbers.

    Args:
      vocab_size, max_tokens: V and T; T is at most 10,000.
      end_token: the token that ends a completion, or None where all have T tokens.
    Returns:
      T + 1 numbers; the first is Y, that of all completions, the last 1.
    Raises:
      ValueError: `max_tokens` outside 1..10,000, or no token beside the end token.
    """
    check_count("vocab_size", vocab_size, least=1 if end_token is None else 2)
    check_count("max_tokens", max_tokens, most=_MOST_TOKENS)
    ends, goes_on = (0, vocab_size) if end_token is None else (1, vocab_size - 1)
    sizes = accumulate(range(max_tokens), lambda size, _: ends + goes_on * size, initial=1)
    return list(sizes)[::-1]


def enumerate_completions(vocab_size: int, max_tokens: int, end_token: int | None) -> Tensor:
    """Every completion of at most T tokens in dictionary order, `[Y, T]` int64, padded with `PAD`.

    Args are those of `subtree_sizes`.

    Raises:
      ValueError: there are more than 20 million, or the end token is outside the vocabulary.
    """
    sizes = subtree_sizes(vocab_size, max_tokens, end_token)
    if sizes[0] > _MOST_COMPLETIONS:  # named by its logarithm: Python prints no 5,000 digits
        raise ValueError(
            f"`max_tokens` must leave at most {_MOST_COMPLETIONS:,} completions, got {max_tokens} "
            f"with {vocab_size} tokens, which gives about 10^{math.log10(sizes[0]):.1f}"
        )
    if end_token is not None:
        check_count("end_token", end_token, least=0)
        if end_token >= vocab_size:
            raise ValueError(f"`end_token` must be None or in 0..{vocab_size - 1}, got {end_token}")
    completions = torch.empty(sizes[0], max_tokens, dtype=torch.int64)
    place = torch.arange(sizes[0])  # of a completion among those that begin with its first t tokens
    ended = torch.zeros_like(place, dtype=torch.bool)
    for t, below in enumerate(sizes[1:]):  # an unended token leads to `below` completions
        end_place = sizes[0] if end_token is None else end_token * below
        after_end = (place > end_place).long()  # the end token leads to one completion, itself
        tokens = (place - after_end) // below + after_end
        completions[:, t] = tokens.masked_fill(ended, PAD)
        ended |= place == end_place
        place = (place - after_end) % below
    return completions


# --- bandits ---------------------------------------------------------------------------------


def bandit(
    rewards: Table,
    ref_probs: Table,
    *,
    actions: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
) -> Task:
    """A bandit: X prompts, Y actions of one token, and a reference policy as a table.

    Both tables are tensors, NumPy arrays or lists of rows. A list of numbers takes the dtype of the
    table beside it, and float64 beside another list; integers become float64; of two floating
    dtypes the smaller is cast up.

    Args:
      rewards: `[X, Y]`, finite.
      ref_probs: `[X, Y]`, positive, each row summing to 1 as nearly as its dtype can say.
      actions: Y names; "a", "b", "c", … when left out.
      prompts: X names; "x1", "x2", … when left out.
    Returns:
      A `Task` whose `ref_logps` are the logarithms of `ref_probs`.
    Raises:
      TypeError: a table that holds no numbers, or names that are not text.
      ValueError: shapes differ, a reward is not finite, a probability is <= 0 or NaN, a row does
        not sum to 1, or there are not X prompts and Y actions.
    """
    tables = {"rewards": rewards, "ref_probs": ref_probs}
    rewards, probs = as_floats("[X, Y]", tables, cast_up=True)
    if not (probs > 0).all():
        raise ValueError("`ref_probs` must be positive, got a probability <= 0 or NaN")
    (given,) = as_floats("[X, Y]", {"ref_probs": ref_probs})
    totals = given.double().sum(-1, keepdim=True)
    rounding = torch.finfo(given.dtype).eps
    if ((totals - 1).abs() > 1e-3 + rounding).any():
        worst = totals.flatten()[(totals - 1).abs().argmax()].item()
        raise ValueError(
            f"`ref_probs` must have rows that sum to 1, got one that sums to {worst:.4g}"
        )
    if rounding > torch.finfo(probs.dtype).eps:  # cast up, but not its rounding
        probs = (probs / totals).to(probs.dtype)
    n_prompts, n_actions = rewards.shape
    if actions is None:
        actions = [chr(97 + y) if y < 26 else f"a{y}" for y in range(n_actions)]
    if prompts is None:
        prompts = [f"x{x + 1}" for x in range(n_prompts)]
    for name, names, n in (("actions", actions, n_actions), ("prompts", prompts, n_prompts)):
        _check_names(name, names)
        if len(names) != n:
            raise ValueError(f"`{name}` must be {n} names, got {len(names)}")
    return Task(tuple(prompts), tuple(actions), 1, None, rewards, probs.log())


def four_answers() -> Task:
    """One prompt, four answers: the course's example, at beta = 0.5 far from its reference."""
    rewards = torch.tensor([[1.0, 0.2, -0.4, 0.8]], dtype=torch.float64)
    ref_probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    return bandit(rewards, ref_probs)


def three_answers() -> Task:
    """One prompt, three answers: small enough to draw on a triangle and to invert by hand."""
    rewards = torch.tensor([[1.0, 0.0, -0.5]], dtype=torch.float64)
    ref_probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    return bandit(rewards, ref_probs)


def random_bandit(n_prompts: int, n_actions: int, *, generator: torch.Generator) -> Task:
    """Rewards N(0, 1) and a reference that is the softmax of N(0, 1), float64.

    Args:
      n_prompts, n_actions: X and Y.
      generator: draws both tables, on its device.
    Returns:
      A `Task` of X prompts and Y actions.
    Raises:
      ValueError: a size below 1.
    """
    check_count("n_prompts", n_prompts)
    check_count("n_actions", n_actions)
    check_generator(generator)
    shape, device = (2, n_prompts, n_actions), generator.device
    draws = torch.randn(shape, dtype=torch.float64, generator=generator, device=device)
    return bandit(draws[0], draws[1].softmax(-1))


# --- micro-reviews ---------------------------------------------------------------------------

REVIEW_WORDS = (
    "<end>", "very", "not", "good", "great", "bad", "awful", "fine", "slow", "funny", "and", "but",
)  # fmt: skip
REVIEW_PROMPTS = ("the film was", "the comedy was", "the thriller was", "the massage was")
_WORD = {word: token for token, word in enumerate(REVIEW_WORDS)}
_VALENCES = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0, "fine": 0.5}
# "slow" and "funny" praise one thing and damn another.
_PROMPT_VALENCES = (
    {"slow": -0.5, "funny": 0.5},
    {"slow": -1.0, "funny": 1.5},
    {"slow": -1.5, "funny": -1.0},
    {"slow": 1.5, "funny": -0.5},
)
# The grammar of the demonstrations: templates and adjectives with their relative frequencies.
_TEMPLATES = {
    "A": 8, "very A": 4, "not A": 2, "not very A": 2, "A and A": 3, "A but A": 2, "very A and A": 1,
    "A and very A": 1, "A but not A": 1,
}  # fmt: skip
_ADJECTIVES = {"good": 4, "great": 2, "bad": 3, "awful": 2, "fine": 4, "slow": 3, "funny": 3}


def micro_reviews() -> Task:
    """Reviews of at most 5 words from a vocabulary of 12: 4 prompts, 177,156 completions each.

    The reward reads sentiment from left to right: an adjective adds its valence, "not" flips and
    "very" scales by 1.5 the next adjective, a connective clears both; "slow" and "funny" change
    sign with the prompt. The task has no table for its reference: fit one to
    `micro_review_demonstrations`.
    """
    completions = enumerate_completions(len(REVIEW_WORDS), 5, _WORD["<end>"])
    rewards = torch.stack([_sentiment(completions, extra) for extra in _PROMPT_VALENCES])
    return Task(REVIEW_PROMPTS, REVIEW_WORDS, 5, _WORD["<end>"], rewards)


def micro_review_demonstrations(
    n: int, *, generator: torch.Generator, slip_prob: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Sentences of a small grammar to fit a reference policy to.

    Prompts are drawn evenly, then a template such as "A but not A", then its adjectives; each word
    then becomes any word with `slip_prob`. Slips matter: without them the reference never says
    "very not good", no pair holds it, and nothing in the DPO loss keeps a policy from saying it.

    Args:
      n: how many sentences.
      generator: draws prompts, words and slips.
      slip_prob: in [0, 1).
    Returns:
      `(prompts [n], completions [n, 5])`, int64, padded with `PAD`, on the generator's device.
    Raises:
      ValueError: `n < 1`, or `slip_prob` outside [0, 1).
    """
    check_count("n", n)
    check_between("slip_prob", slip_prob, 0.0, 1.0)
    check_generator(generator)
    device = generator.device

    def draw(weights: dict[str, int], count: int) -> list[str]:
        table = torch.tensor(list(weights.values()), dtype=torch.float64, device=device)
        rows = torch.multinomial(table, count, replacement=True, generator=generator)
        names = list(weights)
        return [names[row] for row in rows.tolist()]

    prompts = torch.randint(len(REVIEW_PROMPTS), (n,), generator=generator, device=device)
    completions = torch.full((n, 5), PAD, dtype=torch.int64)
    adjectives = iter(draw(_ADJECTIVES, 2 * n))
    uniform = torch.rand(5 * n, dtype=torch.float64, generator=generator, device=device)
    slips = iter((uniform < slip_prob).tolist())
    words = torch.randint(1, len(REVIEW_WORDS), (5 * n,), generator=generator, device=device)
    any_word = iter(words.tolist())
    for row, template in enumerate(draw(_TEMPLATES, n)):
        said = [next(adjectives) if word == "A" else word for word in template.split()]
        said = [REVIEW_WORDS[next(any_word)] if next(slips) else word for word in said]
        tokens = [_WORD[word] for word in [*said, "<end>"][:5]]
        completions[row, : len(tokens)] = torch.tensor(tokens)
    return prompts, completions.to(device)


# --- tiny sums and tiny sort -----------------------------------------------------------------

_DIGITS = (*"0123456789", "<end>")
_N_TOKENS = 3  # of a completion: two digits and the end token
HELD_OUT_PAIRS = (
    (2, 4), (4, 0), (0, 8), (8, 5), (5, 9), (9, 1), (1, 6), (6, 3), (3, 7), (2, 2),
    (4, 2), (0, 4), (8, 0), (5, 8), (9, 5), (1, 9), (6, 1), (3, 6), (7, 3), (7, 7),
)  # fmt: skip
"""The two digits of the twenty prompts of `tiny_sums` and `tiny_sort` that no demonstration has.

A pair is held out in both orders, so that nobody answers 4 + 2 who was shown 2 + 4 and nothing
else. In each place every digit is held out twice. Of the twenty sums nine have two digits, as do 45
of all hundred.
"""


def training_prompts() -> Tensor:
    """The eighty prompts of `tiny_sums` or `tiny_sort` that demonstrations have: `[80]` int64."""
    return torch.tensor([x for x in range(100) if divmod(x, 10) not in HELD_OUT_PAIRS])


def held_out_prompts() -> Tensor:
    """The other twenty, which `HELD_OUT_PAIRS` lists: `[20]` int64."""
    return torch.tensor(sorted(10 * a + b for a, b in HELD_OUT_PAIRS))


def tiny_sums() -> Task:
    """Sums of two digits, with rewards that can be verified: 100 prompts, 1,111 completions each.

    Prompt 10 a + b is the four tokens `a + b =`. A completion is at most three tokens from the ten
    digits and the end token. The reward is 1 for the digits of the sum followed by the end token,
    and 0 otherwise: for a sum of 7, "07" is wrong. Token d is the digit d, and token 10 the end.

    `HELD_OUT_PAIRS` lists twenty prompts to test on; `training_prompts` and `held_out_prompts` give
    both groups. There is no table for the reference: fit one to `tiny_sum_demonstrations`.
    """
    return _digit_task("{} + {} =", _sum_answers)


def tiny_sort() -> Task:
    """Two digits to be sorted, with rewards that can be verified, otherwise like `tiny_sums`.

    Prompt 10 a + b is the four tokens `sort a b =`. The reward is 1 for the smaller digit, the
    larger one and the end token, and 0 otherwise.
    """
    return _digit_task("sort {} {} =", _sort_answers)


def tiny_sum_demonstrations(
    n: int, *, generator: torch.Generator, right_prob: float = 0.4
) -> tuple[Tensor, Tensor]:
    """Answers to the training prompts of `tiny_sums`, of which a share is right.

    Prompts are drawn evenly from `training_prompts`. An answer is right with `right_prob`;
    otherwise it is one of the mistakes that a person might make, each as likely as the others:

    - a forgotten carry, 2 for 12, or one that is not there, 17 for 7;
    - the digits swapped, 21 for 12;
    - the last digit left out, 1 for 12;
    - off by one, 11 or 13 for 12.

    A mistake that a sum does not allow (11 cannot be swapped), or that another one equals, is left
    out. Every answer ends with the end token.

    After `train.fit_sft` on 4,000 of them (600 steps of 128, learning rate .003) a transformer of 2
    layers and width 32 is right with a mean probability of .38 to .41 on the training prompts and
    .29 to .38 on those held out: the exact values of three seeds.

    Args:
      n: how many answers.
      generator: draws prompts and answers.
      right_prob: in [0, 1].
    Returns:
      `(prompts [n], completions [n, 3])`, int64, padded with `PAD`, on the generator's device.
    Raises:
      ValueError: `n < 1`, or `right_prob` outside [0, 1].
    """
    return _digit_demonstrations(_sum_answers, n, right_prob, generator)


def tiny_sort_demonstrations(
    n: int, *, generator: torch.Generator, right_prob: float = 0.4
) -> tuple[Tensor, Tensor]:
    """Answers to the training prompts of `tiny_sort`, of which a share is right.

    As `tiny_sum_demonstrations`, with other mistakes:

    - the digits in the wrong order, 73 for 37;
    - one digit left out, 3 or 7 for 37;
    - one digit doubled in the place of the other, 33 or 77 for 37.

    Of two equal digits one can only be left out.

    The fit described there is right with a mean probability of .38 to .40 on the training prompts
    and .19 to .33 on those held out, where single prompts go from .001 to .89.

    Args, returns and raises are those of `tiny_sum_demonstrations`.
    """
    return _digit_demonstrations(_sort_answers, n, right_prob, generator)


def _sum_answers(a: int, b: int) -> list[str]:
    """The right answer first, then each wrong one once."""
    right = str(a + b)
    carry = right[1:] or f"1{right}"  # forgotten, or not there
    off_by_one = (str(abs(a + b - 1)), str(a + b + 1))
    return list(dict.fromkeys([right, carry, right[::-1], right[:1], *off_by_one]))


def _sort_answers(a: int, b: int) -> list[str]:
    """The right answer first, then each wrong one once."""
    low, high = str(min(a, b)), str(max(a, b))
    return list(dict.fromkeys([low + high, high + low, low, high, low + low, high + high]))


def _digit_task(prompt: str, answers: Callable[[int, int], list[str]]) -> Task:
    """A task whose prompts are `prompt` with two digits in it; the first of `answers` is right."""
    pairs = [divmod(x, 10) for x in range(100)]
    texts = tuple(prompt.format(a, b) for a, b in pairs)
    words = dict.fromkeys([*_DIGITS, *texts[0].split()])  # those of prompts alone come last
    tokens = {word: token for token, word in enumerate(words)}
    read = torch.tensor([[tokens[word] for word in text.split()] for text in texts])
    right = torch.tensor([_written(answers(a, b)[0]) for a, b in pairs])
    end = tokens["<end>"]
    completions = enumerate_completions(len(_DIGITS), _N_TOKENS, end)
    rewards = (completions == right[:, None]).all(-1).double()
    return Task(texts, _DIGITS, _N_TOKENS, end, rewards, prompt_tokens=read)


def _digit_demonstrations(
    answers: Callable[[int, int], list[str]],
    n: int,
    right_prob: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draws from `answers` to the training prompts, the first of which with `right_prob`."""
    check_count("n", n)
    check_fraction("right_prob", right_prob)
    check_generator(generator)
    device, training = generator.device, training_prompts()
    given = [answers(*divmod(x, 10)) for x in training.tolist()]
    n_wrong = torch.tensor([len(answers) - 1 for answers in given])
    first = n_wrong.cumsum(0) - n_wrong + torch.arange(len(given))  # of a prompt's answers
    written = torch.tensor([_written(answer) for answers in given for answer in answers])

    rows = torch.randint(len(training), (n,), generator=generator, device=device)
    draws = [
        torch.rand(n, dtype=torch.float64, generator=generator, device=device) for _ in range(2)
    ]
    rows, is_right, uniform = rows.cpu(), draws[0].cpu() < right_prob, draws[1].cpu()
    mistake = 1 + (uniform * n_wrong[rows]).long()
    columns = first[rows] + mistake.masked_fill(is_right, 0)
    return training[rows].to(device), written[columns].to(device)


def _written(answer: str) -> list[int]:
    """The tokens of some digits and of the end, padded."""
    tokens = [*map(int, answer), _DIGITS.index("<end>")]
    return tokens + [PAD] * (_N_TOKENS - len(tokens))


def _check_names(name: str, names: Sequence[str]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"`{name}` must be a sequence of str, got {type(names).__name__}")
    for one in names:
        if not isinstance(one, str):
            got = type(one).__name__
            raise TypeError(f"`{name}` must be a sequence of str, got {got} in it")


def _counted(names: Sequence[str], what: str) -> str:
    """`4 prompts ('the film was', …)`: how many, and all of them or the first."""
    shown = repr(names[0]) if len(names) == 1 else f"{names[0]!r}, …"
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown})"


def _sentiment(completions: Tensor, prompt_valences: dict[str, float]) -> Tensor:
    """The true reward of each of `completions` `[Y, T]` under one prompt: `[Y]`."""
    check_integers("completions", completions, "[Y, T]")
    valences = torch.zeros(len(REVIEW_WORDS), dtype=torch.float64)
    for word, valence in {**_VALENCES, **prompt_valences}.items():
        valences[_WORD[word]] = valence
    total = torch.zeros(len(completions), dtype=torch.float64)
    scale = torch.ones(len(completions), dtype=torch.float64)
    for token in completions.T:
        total += scale * valences[token.clamp(min=0)].masked_fill(token == PAD, 0.0)
        flips, scales = token == _WORD["not"], token == _WORD["very"]
        scale = torch.where(flips, -scale, torch.where(scales, 1.5 * scale, torch.ones_like(scale)))
    return total


def __dir__() -> list[str]:
    return __all__

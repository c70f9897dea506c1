"""A museum of bugs: small functions with one bug each, and the theorem that each of them breaks.

An exhibit is judged by an invariant, never by a copy of its repair: any function for which the
theorem holds is repaired.

    inspect_exhibit("padding counted", batch_logp)          # in a notebook: prints one line
    passed, sentence = diagnose("padding counted", batch_logp)  # in a homework's own tests

Every exhibit comes from a thread about a real code; `threads` says which. The functions here are
written anew and have nothing but the bug in common with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid, softplus

__all__ = [
    "Exhibit",
    "exhibit",
    "diagnose",
    "inspect_exhibit",
    "EXHIBITS",
]

Candidate = Callable[..., Any]
_TOLERANCE = 1e-9
_END = 0


@dataclass(frozen=True)
class Exhibit:
    """One bug and what its judge knows.

    Args:
      name: what is wrong, in a few words.
      symptom: what one sees in training.
      threads: where it was met, as "owner/repository#number".
      invariant: the theorem, one sentence.
      broken: the function with the bug.
      judge: from a candidate to what the theorem says against it, one sentence; "" if nothing.
    """

    name: str
    symptom: str
    threads: tuple[str, ...]
    invariant: str
    broken: Candidate
    judge: Callable[[Candidate], str]


def exhibit(name: str) -> Exhibit:
    """The exhibit of that name.

    Raises:
      ValueError: there is none.
    """
    for shown in EXHIBITS:
        if shown.name == name:
            return shown
    known = ", ".join(repr(shown.name) for shown in EXHIBITS)
    raise ValueError(f"`name` must be one of {known}, got {name!r}")


def diagnose(name: str, candidate: Candidate) -> tuple[bool, str]:
    """Whether `candidate` keeps the invariant of an exhibit, and one sentence: it, or what fails.

    Raises:
      ValueError: there is no exhibit of that name.
    """
    shown = exhibit(name)
    if not callable(candidate):
        return False, f"this takes a function and got {type(candidate).__name__}."
    try:
        fault = shown.judge(candidate)
    except _RefusedError as refused:
        fault = str(refused)
    return not fault, fault or shown.invariant


def inspect_exhibit(name: str, candidate: Candidate) -> None:
    """Print whether `candidate` is repaired, and what its invariant says.

    Raises:
      ValueError: there is no exhibit of that name.
    """
    number = EXHIBITS.index(exhibit(name)) + 1
    passed, sentence = diagnose(name, candidate)
    print(f"Exhibit {number} {'repaired' if passed else 'broken'}: {sentence}")


# --- the bugs --------------------------------------------------------------------------------


def completion_logp(token_logps, tokens, pad_token):
    """log pi of each completion, [B]; the end token pads, too."""
    labels = tokens.masked_fill(tokens == pad_token, -100)
    return token_logps.masked_fill(labels == -100, 0.0).sum(1)


def batch_logp(token_logps, lengths):
    """log pi of each completion, [B], of rows padded to one width."""
    return token_logps.sum(1)


def logp_after_prompt(logits, tokens, n_prompt):
    """log pi of all that follows the first n_prompt tokens, [B]."""
    logps = logits[:, :-1].log_softmax(-1)  # position s predicts s + 1
    chosen = logps.gather(2, tokens[:, 1:, None]).squeeze(2)
    return chosen[:, n_prompt:].sum(1)


def implied_reward(token_logps, ref_token_logps, mask, beta):
    """beta log(pi / pi_ref) of each completion, [B]."""
    logratios = (token_logps - ref_token_logps) * mask
    return beta * logratios.sum(1) / mask.sum(1)


def loss_and_rewards(chosen, rejected, ref_chosen, ref_rejected, beta):
    """DPO's loss and the two rewards to be logged, [B] each."""
    a, b = chosen - ref_chosen, rejected - ref_rejected
    loss = -logsigmoid(beta * (a - b))
    return loss, a.detach(), b.detach()


def frozen_logps(features, weight, generator):
    """log pi_ref of every token, [B, V], features [B, D]."""
    shape, dtype = features.shape, features.dtype
    keep = torch.rand(shape, dtype=dtype, generator=generator) > 0.1
    hidden = features * keep / 0.9
    return (hidden @ weight).log_softmax(-1)


def stored_logps(features, weight):
    """log pi_ref of every token, [B, V], from a file of weights."""
    stored = weight.half().to(weight.dtype)
    return (features @ stored).log_softmax(-1)


def kl_estimate(logps, ref_logps):
    """KL estimate of each completion that pi itself wrote, [B]."""
    return ref_logps - logps


def exact_kl(logps, ref_logps):
    """KL(pi || pi_ref) of each row, [B], from tables [B, V]."""
    return kl_div(ref_logps, logps, reduction="none").sum(1)


def token_rewards(scores, token_kls, lengths):
    """Reward of each token, [B, T]: minus its KL; the score last."""
    rewards = -token_kls
    rows = torch.arange(len(scores))
    rewards[rows, lengths] += scores
    return rewards


def accumulated_loss(token_losses, mask, n_steps):
    """Mean loss of a token, from n_steps micro-batches of rows."""
    total = 0.0
    parts = zip(token_losses.chunk(n_steps), mask.chunk(n_steps), strict=True)
    for loss, counted in parts:
        total = total + (loss * counted).sum() / counted.sum()
    return total / n_steps


def smoothed_loss(differences, beta, label_smoothing):
    """cDPO's loss of each difference of two log-ratios, [B]."""
    return -logsigmoid(beta * differences)


def examine(pair_loss):
    """Raise AssertionError unless pair_loss(differences, beta) is DPO's."""
    differences = torch.tensor([-2.0, 0.0, 3.0])
    loss = pair_loss(differences, 0.5)
    expected = pair_loss(differences, 0.5)
    torch.testing.assert_close(loss, expected)


def pair_loss(differences, beta):
    """DPO's loss of each difference of two log-ratios, [B]."""
    return -torch.log(torch.sigmoid(beta * differences))


def visible(lengths):
    """Which tokens of a packed row may see which, [T, T]."""
    total = sum(lengths)
    return torch.ones(total, total).tril().bool()


def with_begin(tokens, begin):
    """Tokens of a prompt as the model reads them, [T]."""
    return torch.cat([torch.tensor([begin]), tokens])


def reference_logps(features, base, sft, dpo):
    """log pi_ref of every token, [B, V]; sft and dpo are adapters."""
    logits = features @ base  # all adapters off
    return logits.log_softmax(-1)


def cut_answer(answer, n_prompt, longest, max_length):
    """Tokens of an answer, cut so that they fit behind the prompt."""
    if n_prompt + longest > max_length:
        answer = answer[: max_length - longest]
    return answer


def token_logps(logits):
    """log pi of every token, [B, V]."""
    return logits.half().log_softmax(-1).to(logits.dtype)


def pair_rows(prompt, chosen, rejected, max_length):
    """Two rows of at most max_length tokens: the prompt, an answer."""
    rows = []
    for answer in (chosen, rejected):
        kept = max_length - len(answer)
        rows.append(torch.cat([prompt[-kept:], answer]))
    return tuple(rows)


def log_odds(logps):
    """log(p / (1 - p)) of probabilities given as logarithms, [B]."""
    return logps - torch.log(1 - torch.exp(logps))


def token_ratios(logits, tokens, sampler_logps, kept):
    """pi / sampler of each token, [B]; kept [B, V] is True or False."""
    logps = logits.log_softmax(-1)
    chosen = logps.gather(1, tokens[:, None]).squeeze(1)
    return (chosen - sampler_logps).exp()


def answer_logps(token_logps, chunk):
    """log pi of each answer, [B], summed chunk by chunk."""
    parts = token_logps.bfloat16().split(chunk, dim=1)
    return sum(part.sum(1) for part in parts).to(token_logps.dtype)


def adapter_gradient(layer, x, adapter, active, slopes):
    """Slope of the loss in the adapter; layer(x, adapter, active)."""
    adapter = adapter.detach().requires_grad_()
    y = layer(x, adapter)  # recomputed, to save memory
    return torch.autograd.grad(y, adapter, slopes)[0]


def examine_first_step(pair_loss):
    """Raise AssertionError unless pair_loss(differences, beta) is DPO's."""
    differences = torch.zeros(4)  # policy and reference are one model
    loss = pair_loss(differences, 0.5)
    expected = torch.full_like(loss, math.log(2))
    torch.testing.assert_close(loss, expected)


# --- their judges ----------------------------------------------------------------------------


class _RefusedError(Exception):
    """What a candidate returned cannot be judged; the message is the sentence to read."""


def _call(candidate: Candidate, *arguments: Any) -> Any:
    """What the candidate returns for copies of the arguments, so that it can harm nobody."""
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    try:
        result = candidate(*copies)
    except Exception as error:
        raise _RefusedError(f"your function raised {type(error).__name__}: {error}") from error
    if result is None:
        raise _RefusedError("your function returned None: write its body and return the result.")
    return result


def _numbers(result: Any, shape: tuple[int, ...], *, finite: bool = True) -> Tensor:
    """The result as a tensor of `shape`; a gradient that it has is kept."""
    try:
        numbers = torch.as_tensor(result, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        kind = type(result).__name__
        raise _RefusedError(f"your function returned a {kind}, not numbers.") from None
    if numbers.shape != shape:
        shapes = f"{list(numbers.shape)} where {list(shape)} is wanted"
        raise _RefusedError(f"your function returned the shape {shapes}.")
    if finite and not torch.isfinite(numbers).all():
        raise _RefusedError("your function returned a value that is infinite or not a number.")
    return numbers


def _ask(candidate: Candidate, *arguments: Any, shape: tuple[int, ...]) -> Tensor:
    return _numbers(_call(candidate, *arguments), shape)


def _off(got: Tensor, wanted: Tensor | float) -> bool:
    return not bool(((got - wanted).abs() <= _TOLERANCE).all())  # NaN is off, too


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _language(seed: int, n_tokens: int) -> list[Tensor]:
    """Log-probabilities of three words after every prefix: a table `[3^t, 3]` a position."""
    generator = _generator(seed)
    return [_normal(generator, 3**t, 3).log_softmax(-1) for t in range(n_tokens)]


def _token_logps(language: list[Tensor], tokens: Tensor) -> Tensor:
    """`[N, T]` of completions `[N, T]`; padded places have the log-probability of their pads."""
    prefix = torch.zeros_like(tokens[:, 0])
    columns = []
    for table, column in zip(language, tokens.T, strict=True):
        columns.append(table[prefix, column])
        prefix = 3 * prefix + column
    return torch.stack(columns, 1)


def _completions(n_tokens: int) -> tuple[Tensor, Tensor]:
    """Every completion of at most `n_tokens` words, padded by the end token, and its length."""
    rows, lengths = [], []
    for words in product(range(3), repeat=n_tokens):
        length = words.index(_END) + 1 if _END in words else n_tokens
        if not any(words[length:]):
            rows.append(words)
            lengths.append(length)
    return torch.tensor(rows), torch.tensor(lengths)


def _against_chain_rule(language: list[Tensor], tokens: Tensor, scores: Tensor) -> str:
    """What the rules of probability say against `scores` as log-probabilities of `tokens`."""
    probs = scores.exp()
    total = probs.sum()
    if _off(total, 1.0):
        return f"the probabilities of all {len(probs)} completions sum to {total:.4f}, not 1."
    first = language[0][0].exp()
    for word in range(3):
        together = probs[tokens[:, 0] == word].sum()
        if _off(together, first[word]):
            return (
                f"the completions that begin with word {word} have {together:.4f} together; the "
                f"model gives that word {first[word]:.4f}."
            )
    for word, after in product((1, 2), range(3)):
        begun = tokens[:, 0] == word
        together = probs[begun & (tokens[:, 1] == after)].sum() / probs[begun].sum()
        wanted = language[1][word, after].exp()
        if _off(together, wanted):
            return (
                f"word {after} follows word {word} with probability {together:.4f}; the model "
                f"gives it {wanted:.4f}."
            )
    return ""


def _judge_end_token(candidate: Candidate) -> str:
    tokens, _ = _completions(3)
    for seed in (0, 1):
        language = _language(seed, 3)
        token_logps = _token_logps(language, tokens)
        scores = _ask(candidate, token_logps, tokens, _END, shape=(len(tokens),))
        if fault := _against_chain_rule(language, tokens, scores):
            return fault
    return ""


def _judge_padding(candidate: Candidate) -> str:
    tokens, lengths = _completions(3)
    language = _language(2, 3)
    token_logps = _token_logps(language, tokens)
    scores = _ask(candidate, token_logps, lengths, shape=(len(tokens),))
    for row in range(len(tokens)):
        n = int(lengths[row])
        alone = _ask(candidate, token_logps[row : row + 1, :n], lengths[row : row + 1], shape=(1,))
        if _off(scores[row], alone):
            return (
                f"one completion scores {alone.item():.4f} alone and {scores[row]:.4f} in a batch "
                f"with longer ones."
            )
    return _against_chain_rule(language, tokens, scores)


def _judge_boundary(candidate: Candidate) -> str:
    answers = torch.tensor(list(product(range(3), repeat=2)))
    for n_prompt in (2, 1, 3):
        language = _language(10 + n_prompt, 2)
        logits = _normal(_generator(n_prompt), 1, n_prompt + 2, 3).repeat(9, 1, 1)
        logits[:, n_prompt - 1] = language[0]
        logits[:, n_prompt] = language[1][answers[:, 0]]
        tokens = torch.cat([torch.ones(9, n_prompt, dtype=torch.int64), answers], 1)
        scores = _ask(candidate, logits, tokens, n_prompt, shape=(9,))
        if fault := _against_chain_rule(language, answers, scores):
            return fault
    return ""


def _judge_implied_reward(candidate: Candidate) -> str:
    tokens, lengths = _completions(3)
    mask = torch.arange(3) < lengths[:, None]
    for seed, beta in ((3, 0.5), (4, 2.0)):
        ref_token_logps = _token_logps(_language(seed, 3), tokens)
        ref_logps = (ref_token_logps * mask).sum(1)
        rewards = _normal(_generator(seed), len(tokens))
        best = (ref_logps + rewards / beta).log_softmax(0)
        token_logps = _conditionals(best, tokens)
        arguments = (token_logps, ref_token_logps, mask, beta)
        got = _ask(candidate, *arguments, shape=(len(tokens),))
        top, low = rewards.argmax(), rewards.argmin()
        gap, true_gap = got[top] - got[low], rewards[top] - rewards[low]
        if _off(gap, true_gap) or _off(got - got[low], rewards - rewards[low]):
            return (
                f"this policy is the optimum for a best and a worst reward that are "
                f"{true_gap:.4f} apart; your implied rewards of the two are {gap:.4f} apart."
            )
        total = (ref_logps + got / beta).logsumexp(0).exp()
        if _off(total, 1.0):
            return f"the sum of pi_ref exp(implied reward / beta) is {total:.4f}, not 1."
    return ""


def _conditionals(logps: Tensor, tokens: Tensor) -> Tensor:
    """Token log-probabilities `[N, T]` of a distribution `[N]` over all completions."""
    columns, before = [], logps.logsumexp(0).expand(len(logps))
    for t in range(1, tokens.shape[1] + 1):
        same = (tokens[:, None, :t] == tokens[None, :, :t]).all(2)
        after = torch.where(same, logps, -torch.inf).logsumexp(1)
        columns.append(after - before)
        before = after
    return torch.stack(columns, 1)


def _judge_logged_rewards(candidate: Candidate) -> str:
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)
    first, second = torch.combinations(torch.arange(4)).T
    for beta in (0.1, 2.0):
        best = (ref + rewards / beta).log_softmax(0)
        four = (best[first], best[second], ref[first], ref[second])
        result = _call(candidate, *four, beta)
        if not isinstance(result, tuple | list) or len(result) != 3:
            return "your function returns three things: the losses and the two rewards."
        loss, chosen, rejected = (_numbers(part, (6,)) for part in result)
        margins = chosen - rejected
        at = int((loss - softplus(-margins)).abs().argmax())
        if _off(loss, softplus(-margins)):
            return (
                f"at beta = {beta:g} a pair has loss {loss[at]:.4f} and its logged rewards are "
                f"{margins[at]:.4f} apart: for that margin -log sigmoid is "
                f"{softplus(-margins)[at]:.4f}."
            )
        true = rewards[first] - rewards[second]
        if _off(margins, true):
            at = int((margins - true).abs().argmax())
            return (
                f"at beta = {beta:g} the logged rewards of a pair are {margins[at]:.4f} apart; the "
                f"policy is the optimum for rewards that are {true[at]:.4f} apart."
            )
        log_z = (ref + rewards / beta).logsumexp(0)
        if _off(chosen, rewards[first] - beta * log_z):
            return "the two rewards are right up to a constant that both share: log each one."
    return ""


def _judge_dropout(candidate: Candidate) -> str:
    generator = _generator(5)
    features, weight = _normal(generator, 6, 8), _normal(generator, 8, 5)
    reads = [_ask(candidate, features, weight, generator, shape=(6, 5)) for _ in range(2)]
    if not torch.equal(*reads):
        worst = (reads[0] - reads[1]).abs().max()
        return f"two reads of one frozen model differ by up to {worst:.4f} nats."
    return _against_step_0(features, weight, reads[0])


def _judge_half_precision(candidate: Candidate) -> str:
    generator = _generator(6)
    features, weight = _normal(generator, 200, 32), _normal(generator, 32, 50)
    return _against_step_0(features, weight, _ask(candidate, features, weight, shape=(200, 50)))


def _against_step_0(features: Tensor, weight: Tensor, ref_logps: Tensor) -> str:
    """At step 0 the policy is a copy of the reference: its log-ratios are 0."""
    totals = ref_logps.exp().sum(1)
    if _off(totals, 1.0):
        return f"the probabilities of the next token sum to {totals[0]:.4f}, not 1."
    policy = (features @ weight).log_softmax(-1)
    logratios = (policy - ref_logps).gather(1, policy.argmin(1, keepdim=True))
    if _off(policy, ref_logps):
        return (
            f"at step 0 policy and reference are one model, and the log-ratio of an answer of "
            f"{len(policy)} tokens is {logratios.sum():.4f} nats, not 0."
        )
    return ""


def _judge_k1(candidate: Candidate) -> str:
    generator = _generator(7)
    for _ in range(2):
        logps = _normal(generator, 5).log_softmax(0)
        ref_logps = _normal(generator, 5).log_softmax(0)
        each = _ask(candidate, logps, ref_logps, shape=(5,))
        mean = (logps.exp() * each).sum()
        categoricals = (torch.distributions.Categorical(logits=t) for t in (logps, ref_logps))
        true = torch.distributions.kl_divergence(*categoricals)
        if _off(mean, true):
            return f"its mean over what pi writes is {mean:.4f}; KL(pi || pi_ref) is {true:.4f}."
    return ""


def _judge_exact_kl(candidate: Candidate) -> str:
    generator = _generator(8)
    logps, ref_logps = (_normal(generator, 3, 6).log_softmax(1) for _ in range(2))
    rewards = _normal(generator, 3, 6)

    def ask(first: Tensor, second: Tensor) -> Tensor:
        return _numbers(_call(candidate, first, second), (3,), finite=False)

    distance = ask(logps, ref_logps)
    if not torch.isfinite(distance).all():
        return "the KL is not a number: a logarithm was taken of what is one already."
    for beta in (0.5, 2.0):
        log_z = (ref_logps + rewards / beta).logsumexp(1)
        best = (ref_logps + rewards / beta).log_softmax(1)
        lost = beta * log_z - (logps.exp() * rewards).sum(1) + beta * distance
        gap = beta * ask(logps, best)
        if _off(lost, gap):
            return (
                f"J* - J(pi) is {lost[0]:.4f} and beta KL(pi || pi*) is {gap[0]:.4f}, both with "
                f"your KL: chapter 02 says that they are one number."
            )
    return ""


def _judge_token_rewards(candidate: Candidate) -> str:
    generator = _generator(9)
    lengths = torch.tensor([2, 4, 1])
    mask = torch.arange(5) < lengths[:, None]
    scores = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    kls = _normal(generator, 3, 5) * mask
    values = _normal(generator, 3, 5) * mask
    rewards = _ask(candidate, scores, kls, lengths, shape=(3, 5)) * mask
    total, wanted = rewards.sum(1), scores - kls.sum(1)
    if _off(total, wanted):
        return (
            f"the tokens of a completion are paid {total[0]:.4f} in all; its score minus its KL is "
            f"{wanted[0]:.4f}."
        )
    advantages, after = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(5)):  # GAE with discount and lambda 1
        next_value = values[:, t + 1] if t < 4 else torch.zeros(3, dtype=torch.float64)
        after = (rewards[:, t] + next_value - values[:, t] + after) * mask[:, t]
        advantages[:, t] = after
    to_go = kls.flip(1).cumsum(1).flip(1)  # the KL of a token and of all after it
    true = (scores[:, None] - to_go - values) * mask
    if _off(advantages, true):
        row, t = ((advantages - true).abs() > _TOLERANCE).nonzero()[0].tolist()
        return (
            f"with lambda = 1, GAE gives a token the advantage {advantages[row, t]:.4f}; the score "
            f"minus the KL still to come minus the value is {true[row, t]:.4f}."
        )
    return ""


def _judge_accumulation(candidate: Candidate) -> str:
    lengths = torch.tensor([1, 2, 1, 2, 6, 6, 5, 6])
    mask = (torch.arange(6) < lengths[:, None]).double()
    for n_steps in (1, 2, 4, 8):
        losses = _normal(_generator(n_steps), 8, 6).requires_grad_()
        result = _ask(candidate, losses, mask, n_steps, shape=())
        if not result.requires_grad:
            return "your loss does not depend on the losses of the tokens."
        try:
            (weights,) = torch.autograd.grad(result, losses)
        except RuntimeError as error:
            raise _RefusedError(f"your loss has no gradient: {error}") from error
        short, long = weights[0, 0], weights[4, 0]
        if _off(weights, short * mask) or _off(weights.sum(), 1.0):
            return (
                f"in {n_steps} micro-batches a token of the shortest row weighs {short:.4f} and "
                f"one of the longest {long:.4f}; {int(mask.sum())} tokens weigh "
                f"{1 / mask.sum():.4f} each."
            )
    return ""


def _judge_smoothing(candidate: Candidate) -> str:
    differences = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], dtype=torch.float64)
    for beta in (0.5, 2.0):
        plain, turned = (
            _ask(candidate, m, beta, 0.0, shape=(5,)) for m in (differences, -differences)
        )
        total = (-plain).exp() + (-turned).exp()
        if _off(total, 1.0):
            return (
                f"without smoothing the two outcomes of a pair have probability {total[0]:.4f} "
                f"together, not 1."
            )
        if _off(turned - plain, beta * differences):
            return (
                f"without smoothing, log-ratios that differ by {differences[0]:g} nats have, at "
                f"beta = {beta:g}, log-odds {(turned - plain)[0]:.4f}, not "
                f"{beta * differences[0]:.4f}."
            )
        for e in (0.1, 0.3):
            smoothed = _ask(candidate, differences, beta, e, shape=(5,))
            mixed = (1 - e) * plain + e * turned
            if _off(smoothed, mixed):
                at = int((smoothed - mixed).abs().argmax())
                return (
                    f"of labels flipped with probability {e:g}, DPO's mean loss at a margin of "
                    f"{beta * differences[at]:g} is {mixed[at]:.4f}; yours is {smoothed[at]:.4f}."
                )
    return ""


def _judge_examiner(candidate: Candidate) -> str:
    right = (
        lambda d, beta: -logsigmoid(beta * d),
        lambda d, beta: torch.logaddexp(torch.zeros_like(d), -beta * d),
    )
    wrong = {
        "a loss whose sign is reversed": lambda d, beta: -logsigmoid(-beta * d),
        "a loss without beta": lambda d, beta: -logsigmoid(d),
        "a hinge": lambda d, beta: (1 - beta * d).clamp(min=0.0),
        "a loss that is 0": lambda d, beta: 0.0 * d,
        "a loss that is log 2": lambda d, beta: 0.0 * d + math.log(2),
        "a loss that is half as large": lambda d, beta: -0.5 * logsigmoid(beta * d),
    }
    for loss in right:
        if not _accepts(candidate, loss):
            return "it rejects DPO's loss itself."
    for name, loss in wrong.items():
        if _accepts(candidate, loss):
            return f"it lets {name} pass."
    return ""


def _accepts(candidate: Candidate, loss: Candidate) -> bool:
    try:
        candidate(loss)
    except AssertionError:
        return False
    except Exception as error:
        raise _RefusedError(f"your function raised {type(error).__name__}: {error}") from error
    return True


def _judge_pair_loss(candidate: Candidate) -> str:
    differences = torch.tensor([0.0, 1.0, 40.0, 800.0, 3000.0], dtype=torch.float64)
    for beta in (1.0, 0.5):
        plain, turned = (
            _numbers(_call(candidate, m, beta), (5,), finite=False)
            for m in (differences, -differences)
        )
        total = (-plain).exp() + (-turned).exp()
        if _off(total, 1.0):
            return f"the two outcomes of a pair have probability {total[0]:.4f} together, not 1."
        gaps = turned - plain
        wrong = ~((gaps - beta * differences).abs() <= _TOLERANCE * (1 + differences))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            return (
                f"the losses at margins of -{beta * differences[at]:g} and "
                f"{beta * differences[at]:g} differ by {gaps[at]:.4f}; log-odds of "
                f"{beta * differences[at]:g} are wanted."
            )
    return ""


def _judge_visible(candidate: Candidate) -> str:
    for seed, lengths in ((20, (3, 4)), (21, (2, 3, 1, 4))):
        total = sum(lengths)
        generator = _generator(seed)
        scores, values = _normal(generator, total, total), _normal(generator, total, 5)
        words = torch.arange(total) % 5
        seen = _ask(candidate, lengths, shape=(total, total)) != 0
        if not seen.any(1).all():
            return "a token sees nothing, not even itself."
        start = 0
        for n in lengths:
            own = slice(start, start + n)
            past = torch.ones(n, n, dtype=torch.bool).tril()
            alone = _attend(scores[own, own], past, values[own])
            packed = _attend(scores, seen, values)[own]
            if _off(packed, alone):
                one, other = (t.gather(1, words[own, None]).sum() for t in (alone, packed))
                return (
                    f"one answer has log-probability {one:.4f} alone and {other:.4f} in a row "
                    f"that it shares."
                )
            start += n
    return ""


def _attend(scores: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    """Log-probabilities of the next word `[T, V]`: one layer of attention."""
    weights = scores.masked_fill(~seen, -math.inf).softmax(1)
    return (weights @ values).log_softmax(1)


def _judge_begin(candidate: Candidate) -> str:
    begin, words = 6, torch.tensor([1, 4, 2])
    drawn = _normal(_generator(22), 7, 6)
    for tokens in (torch.tensor([begin, 1, 4, 2]), words):  # of a template; of a plain text
        got = _tokens(_call(candidate, tokens, begin), 7)
        sampled = drawn[torch.tensor([begin, 1, 4, 2])].mean(0).softmax(0)
        trained = drawn[got].mean(0).softmax(0)
        n_begin = int((got == begin).sum())
        if _off(trained, sampled):
            at = int((trained - sampled).abs().argmax())
            return (
                f"a word that is sampled with probability {sampled[at]:.4f} has "
                f"{trained[at]:.4f} in training: its prompt has {n_begin} begin tokens there."
            )
        if n_begin != 1 or got[0] != begin:
            return "the begin token is not the first token, and the only one of its kind."
        if got.tolist() != [begin, 1, 4, 2]:
            return "the words of the prompt are not all there, in their order."
    return ""


def _tokens(result: Any, n_words: int) -> Tensor:
    """The result as token ids `[T]`, each below `n_words`."""
    try:
        tokens = torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        kind = type(result).__name__
        raise _RefusedError(f"your function returned a {kind}, not tokens.") from None
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex():
        raise _RefusedError("your function did not return one row of whole numbers.")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < n_words:
        raise _RefusedError("your function returned tokens that are not in the vocabulary.")
    return tokens.long()


def _judge_adapter(candidate: Candidate) -> str:
    generator = _generator(23)
    features, base = _normal(generator, 40, 6), _normal(generator, 6, 5)
    sft, step = _normal(generator, 6, 5), _normal(generator, 6, 5)
    nothing = torch.zeros_like(step)
    first, later = (
        _ask(candidate, features, base, sft, dpo, shape=(40, 5)) for dpo in (nothing, step)
    )
    policy = (features @ (base + sft)).log_softmax(-1)
    logratios = policy - first
    if _off(logratios, 0.0):
        raised = (policy - (features @ base).log_softmax(-1)).sum(0)  # by SFT
        apart = logratios[:, raised.argmax()].sum() - logratios[:, raised.argmin()].sum()
        loss = softplus(-0.1 * apart)
        return (
            f"before the first step the log-ratios of two answers of 40 tokens differ by "
            f"{apart:.4f} nats. At beta = 0.1 this is a margin of {0.1 * apart:.4f} and a loss of "
            f"{loss:.4f}; the loss of two equal models is log 2."
        )
    if _off(later, first):
        return "your reference moves with the adapter that is being trained."
    return ""


def _judge_cut(candidate: Candidate) -> str:
    # tokens of the answer and of the prompt, the longer answer of the pair, the most that fit
    for n, n_prompt, longest, most in (
        (2, 6, 12, 10), (3, 6, 12, 10), (12, 6, 12, 10), (3, 2, 5, 10), (5, 7, 6, 10),
    ):  # fmt: skip
        answer = torch.arange(n) + 3
        got = _tokens(_call(candidate, answer, n_prompt, longest, most), 100)
        fits = min(n, most - n_prompt)
        if len(got) != fits:
            empty = ": its mean log-probability is 0/0" if not len(got) else ""
            return (
                f"an answer of {n} tokens behind a prompt of {n_prompt} keeps {len(got)}, where "
                f"{most} tokens may stand in the row and the longer answer has {longest}{empty}."
            )
        if got.tolist() != answer[:fits].tolist():
            return "what is kept is not the beginning of the answer."
    return ""


def _judge_half(candidate: Candidate) -> str:
    logits = 3 * _normal(_generator(24), 4, 5)
    plain, shifted = (
        _numbers(_call(candidate, logits + shift), (4, 5), finite=False) for shift in (0.0, 65600.0)
    )
    if not torch.isfinite(shifted).all():
        return (
            "with 65600 added to every logit, which changes no probability, the log-probabilities "
            "are not numbers: half precision ends at 65504."
        )
    totals = plain.exp().sum(1)
    if _off(totals, 1.0):
        return f"the probabilities of the next token sum to {totals[0]:.6f}, not 1."
    if _off(plain - plain[:, :1], logits - logits[:, :1]):
        return "two log-probabilities do not differ as their logits do."
    if _off(plain, shifted):
        return (
            f"with 65600 added to every logit a log-probability moves by "
            f"{(plain - shifted).abs().max():.4f}."
        )
    return ""


def _judge_pair_rows(candidate: Candidate) -> str:
    beta, generator = 0.5, _generator(25)
    rewards = _normal(generator, 10, 6)  # of six answers, by how long the prompt is
    log_z = (rewards / beta).logsumexp(1) - math.log(6)  # the reference draws each alike
    prompt = torch.arange(10, 18)
    for n_chosen, n_rejected, most in ((2, 5, 9), (4, 1, 7), (2, 3, 20), (3, 3, 8), (6, 2, 6)):
        chosen, rejected = torch.arange(n_chosen), 30 + torch.arange(n_rejected)
        result = _call(candidate, prompt, chosen, rejected, most)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise _RefusedError("your function did not return two rows.")
        rows = [_tokens(row, 100).tolist() for row in result]
        before = []
        for row, answer in zip(rows, (chosen.tolist(), rejected.tolist()), strict=True):
            n = len(row) - len(answer)
            if len(row) > most:
                return f"a row has {len(row)} tokens, where {most} may stand in it."
            if n < 0 or row[n:] != answer or row[:n] != prompt.tolist()[len(prompt) - n :]:
                return "a row is not the end of the prompt, followed by the whole answer."
            before.append(n)
        if before[0] != before[1]:
            off = beta * (log_z[before[0]] - log_z[before[1]])
            return (
                f"the answers follow prompts of {before[0]} and {before[1]} tokens: these have two "
                f"Z, and beta log Z leaves {off.abs():.4f} in the margin."
            )
        if before[0] != min(len(prompt), most - max(n_chosen, n_rejected)):
            return f"the prompt keeps {before[0]} tokens, and more would fit before both answers."
    return ""


def _judge_log_odds(candidate: Candidate) -> str:
    logps = -torch.tensor([1e-18, 1e-12, 1e-6, 0.1, 1.0, 5.0, 30.0, 200.0], dtype=torch.float64)
    odds = _numbers(_call(candidate, logps), (8,), finite=False)
    back = logsigmoid(odds)
    wrong = ~((back - logps).abs() <= _TOLERANCE * logps.abs())
    if wrong.any():
        at = int(wrong.nonzero()[0])
        return (
            f"at log p = {logps[at]:.0e} your log-odds are {odds[at]:.4f}, and log sigmoid of them "
            f"is {back[at]:.4g}, not log p."
        )
    return ""


def _judge_token_ratios(candidate: Candidate) -> str:
    generator = _generator(26)
    for n_kept in (3, 2, 6):
        old, new = _normal(generator, 6), _normal(generator, 6)
        words = old.argsort(descending=True)[:n_kept]
        kept = torch.zeros(6, dtype=torch.bool)
        kept[words] = True
        sampler = old[words].log_softmax(0)
        for now in (old, new):
            rows = now.expand(n_kept, 6), words, sampler, kept.expand(n_kept, 6)
            ratios = _ask(candidate, *rows, shape=(n_kept,))
            if now is old and _off(ratios, 1.0):
                mass = old.softmax(0)[words].sum()
                return (
                    f"before the first step the ratio of a token is {ratios[0]:.4f}, not 1; the "
                    f"tokens that the sampler kept have {mass:.4f} together."
                )
            mean = (sampler.exp() * ratios).sum()
            if _off(mean, 1.0):
                return f"the mean of the ratio over what is sampled is {mean:.4f}, not 1."
            odds = sampler + ratios.log() - now[words]
            if _off(odds, odds[0]):
                return "sampler times ratio does not have the odds that the policy has now."
    return ""


def _judge_rounding(candidate: Candidate) -> str:
    long = _normal(_generator(27), 4, 64).abs().neg()
    at_once = [_ask(candidate, long, chunk, shape=(4,)) for chunk in (64, 16, 1)]
    for other in at_once[1:]:
        ratios = (other - at_once[0]).exp()
        if _off(ratios, 1.0):
            off = (ratios - 1).abs().max()
            worst = ratios[int((ratios - 1).abs().argmax())]
            said = f"is {worst:.4f}, not 1" if off > 1e-4 else f"is off 1 by {off:.0e}"
            return (
                f"nothing was learnt between two reads of an answer of 64 tokens, and the ratio "
                f"{said}."
            )
    tokens, lengths = _completions(3)
    language = _language(28, 3)
    mask = torch.arange(3) < lengths[:, None]
    scores = _ask(candidate, _token_logps(language, tokens) * mask, 2, shape=(len(tokens),))
    return _against_chain_rule(language, tokens, scores)


def _judge_recomputed(candidate: Candidate) -> str:
    generator = _generator(29)
    weight = _normal(generator, 4, 3)

    def layer(x: Tensor, adapter: Tensor, active: Tensor | None = None) -> Tensor:
        on = torch.zeros(len(x), 1, dtype=x.dtype) if active is None else active[:, None]
        return torch.tanh(x @ weight + on * (x @ adapter))

    for active in (torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]), torch.ones(5), torch.zeros(5)):
        x, adapter = _normal(generator, 5, 4), _normal(generator, 4, 3)
        slopes = _normal(generator, 5, 3)
        got = _numbers(_call(candidate, layer, x, adapter, active.double(), slopes), (4, 3))
        at = adapter.clone().requires_grad_()
        y = layer(x, at, active.double())  # kept from the forward pass
        (true,) = torch.autograd.grad(y, at, slopes)
        if _off(got, true):
            return (
                f"the gradient of the adapter has norm {got.norm():.4f} where the layer is run "
                f"again, and {true.norm():.4f} where its output was kept."
            )
    return ""


EXHIBITS = (
    Exhibit(
        "end token masked",
        symptom="the model never stops",
        threads=("huggingface/trl#976", "huggingface/trl#6357"),
        invariant=(
            "all completions sum to 1, and those that begin alike sum to the probability of their "
            "beginning."
        ),
        broken=completion_logp,
        judge=_judge_end_token,
    ),
    Exhibit(
        "padding counted",
        symptom="results depend on who shares the batch",
        threads=("huggingface/trl#6803", "0xallam/Direct-Preference-Optimization#4"),
        invariant="a completion scores the same alone and in a batch, and all of them sum to 1.",
        broken=batch_logp,
        judge=_judge_padding,
    ),
    Exhibit(
        "boundary off by one",
        symptom="the first word of an answer is never learnt",
        threads=("jingyaogong/minimind#621", "verl-project/verl#3287"),
        invariant="the probabilities of all answers to a prompt sum to 1, wherever it ends.",
        broken=logp_after_prompt,
        judge=_judge_boundary,
    ),
    Exhibit(
        "mean for sum",
        symptom="beta must be many times larger than everybody else's, and lengths drift",
        threads=("huggingface/trl#789", "jingyaogong/minimind#298"),
        invariant="the optimum's implied rewards differ as the rewards do (Eq. 5).",
        broken=implied_reward,
        judge=_judge_implied_reward,
    ),
    Exhibit(
        "beta missing from logged rewards",
        symptom="margins of several hundred at a loss below log 2",
        threads=("junkangwu/beta-DPO#1", "modelscope/ms-swift#4441"),
        invariant="a pair's loss is -log sigmoid of its logged margin, whatever beta.",
        broken=loss_and_rewards,
        judge=_judge_logged_rewards,
    ),
    Exhibit(
        "reference with dropout",
        symptom="the loss starts above log 2 and is noisier than it should be",
        threads=("huggingface/trl#744", "hiyouga/LlamaFactory#10779"),
        invariant="two reads of the reference agree in every bit, and at step 0 with the policy.",
        broken=frozen_logps,
        judge=_judge_dropout,
    ),
    Exhibit(
        "half-precision reference",
        symptom="the rewards are not 0 at step 0",
        threads=("eric-mitchell/direct-preference-optimization#34",),
        invariant="at step 0 every log-ratio is 0.",
        broken=stored_logps,
        judge=_judge_half_precision,
    ),
    Exhibit(
        "k1 with the sign inverted",
        symptom="the KL is negative, and the penalty pays the policy for leaving",
        threads=("nebuly-ai/optimate#298", "lucidrains/PaLM-rlhf-pytorch#38"),
        invariant="the mean of the estimate over what pi writes is KL(pi || pi_ref).",
        broken=kl_estimate,
        judge=_judge_k1,
    ),
    Exhibit(
        "kl_div without log_target",
        symptom="the KL is not a number, and with an old PyTorch 0",
        threads=("pytorch/pytorch#69230", "pytorch/pytorch#34586"),
        invariant="J* - J(pi) = beta KL(pi || pi*), with your KL on both sides.",
        broken=exact_kl,
        judge=_judge_exact_kl,
    ),
    Exhibit(
        "reward one slot late",
        symptom="PPO lowers the KL and ignores the score",
        threads=("huggingface/trl#3750", "huggingface/trl#1893"),
        invariant="with lambda = 1, GAE is the return minus the value, for every token.",
        broken=token_rewards,
        judge=_judge_token_rewards,
    ),
    Exhibit(
        "mean of means",
        symptom="gradient accumulation changes the loss",
        threads=("huggingface/transformers#24725", "huggingface/trl#2617"),
        invariant="every token weighs the same, however many micro-batches there are.",
        broken=accumulated_loss,
        judge=_judge_accumulation,
    ),
    Exhibit(
        "smoothing ignored",
        symptom="label_smoothing changes nothing",
        threads=("huggingface/trl#1035",),
        invariant="cDPO's loss is DPO's mean over labels flipped with probability e.",
        broken=smoothed_loss,
        judge=_judge_smoothing,
    ),
    Exhibit(
        "an assertion that cannot fail",
        symptom="the tests pass, whatever you change",
        threads=("cytomining/pycytominer#314", "tensorflow/tensorflow#20820"),
        invariant="the test passes DPO's loss, in two spellings, and rejects six others.",
        broken=examine,
        judge=_judge_examiner,
    ),
    Exhibit(
        "log of a sigmoid",
        symptom="the loss becomes infinite after hours",
        threads=(
            "thinking-machines-lab/tinker-cookbook#188",
            "deepspeedai/DeepSpeedExamples#501",
        ),
        invariant="the losses of the two labels of a pair differ by its margin.",
        broken=pair_loss,
        judge=_judge_pair_loss,
    ),
    Exhibit(
        "packed answers see each other",
        symptom="the loss of an answer depends on which answers share its row",
        threads=("huggingface/trl#784", "allenai/open-instruct#669", "huggingface/trl#2469"),
        invariant="an answer scores the same alone and in a row that it shares.",
        broken=visible,
        judge=_judge_visible,
    ),
    Exhibit(
        "two begin tokens",
        symptom="the first two token ids of every prompt are alike",
        threads=("deepseek-ai/DeepSeek-R1#151",),
        invariant="a prompt begins with one begin token, in training as in sampling.",
        broken=with_begin,
        judge=_judge_begin,
    ),
    Exhibit(
        "an adapter on an adapter",
        symptom="the loss is 0 and the accuracy 1 from the first steps on",
        threads=("hiyouga/LlamaFactory#8974", "hiyouga/LlamaFactory#8459"),
        invariant="at step 0 policy and reference are one model, and the loss is log 2.",
        broken=reference_logps,
        judge=_judge_adapter,
    ),
    Exhibit(
        "an empty answer",
        symptom="the loss is not a number, from one batch on",
        threads=("huggingface/trl#6548", "huggingface/trl#3382"),
        invariant="an answer keeps its first tokens, as many as fit behind its prompt.",
        broken=cut_answer,
        judge=_judge_cut,
    ),
    Exhibit(
        "logits in half precision",
        symptom="rewards are not numbers in float16, and are in bfloat16",
        threads=("huggingface/trl#878",),
        invariant="a number added to every logit changes no probability.",
        broken=token_logps,
        judge=_judge_half,
    ),
    Exhibit(
        "one prompt, cut twice",
        symptom="the two rows of a pair begin with different tokens",
        threads=("hiyouga/LlamaFactory#4617", "hiyouga/LlamaFactory#4402"),
        invariant="both answers of a pair follow the same tokens.",
        broken=pair_rows,
        judge=_judge_pair_rows,
    ),
    Exhibit(
        "log of one minus p",
        symptom="a loss on odds is not a number once the model is sure of an answer",
        threads=("huggingface/trl#1491", "huggingface/trl#2564", "huggingface/trl#3237"),
        invariant="log sigmoid of the log-odds is log p.",
        broken=log_odds,
        judge=_judge_log_odds,
    ),
    Exhibit(
        "a sampler that left tokens out",
        symptom="the ratio is below 1 before anything was learnt",
        threads=("huggingface/trl#6789",),
        invariant="on-policy the ratio of every token is 1.",
        broken=token_ratios,
        judge=_judge_token_ratios,
    ),
    Exhibit(
        "rounded in another order",
        symptom="ratios are clipped although nothing was learnt yet",
        threads=("verl-project/verl#6280", "verl-project/verl#2996"),
        invariant="the same weights give an answer the same number, however it is computed.",
        broken=answer_logps,
        judge=_judge_rounding,
    ),
    Exhibit(
        "recomputed without its mask",
        symptom="with gradient checkpointing an adapter gets a gradient of 0, without an error",
        threads=("huggingface/peft#2826",),
        invariant="recomputing an output changes no gradient.",
        broken=adapter_gradient,
        judge=_judge_recomputed,
    ),
    Exhibit(
        "a test at step 0",
        symptom="all tests pass, and the model does not learn",
        threads=("HumanCompatibleAI/imitation#562",),
        invariant="the test passes DPO's loss, in two spellings, and rejects six others.",
        broken=examine_first_step,
        judge=_judge_examiner,
    ),
)


def __dir__() -> list[str]:
    return __all__

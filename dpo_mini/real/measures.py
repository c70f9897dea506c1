"""What training did: margins, accuracy, and answers in words."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_mini._arguments import check_at_most_0, check_count, check_generator, check_rows
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.policies import Scorer
from dpo_mini.real.conversations import Messages
from dpo_mini.real.models import CausalLMPolicy
from dpo_mini.real.tokens import encode_prompt
from dpo_mini.train import Pairs


def preference_margins(
    policy: Scorer,
    reference: Scorer,
    pairs: Pairs,
    *,
    batch_size: int = 64,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    r"""How much more than the reference the policy prefers chosen to rejected, one number per pair.

    $\log(\pi_\theta/\pi_{ref})(y_w) - \log(\pi_\theta/\pi_{ref})(y_l)$; times beta it is the
    margin of the implied rewards.

    Args:
      policy, reference: have `token_logps`, as in `train.fit_preferences`.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])`.
      batch_size: pairs per pass; changes only speed and memory.
      progress: wraps the range of passes, as in `train.fit_sft`.
    Returns:
      `[n]`, nats, without gradient; 0 where the two answers are the same.
    Raises:
      ValueError: no pairs, rows that differ in number, `batch_size < 1`, or a log-probability that
        is above 0.
    """
    prompts, chosen, rejected = pairs
    check_rows("prompts", prompts, chosen=chosen, rejected=rejected)
    check_count("batch_size", batch_size)

    def log_ratios(rows: Tensor, completions: Tensor) -> Tensor:
        logps = []
        for name, model in (("policy", policy), ("reference", reference)):
            scored = model.token_logps(prompts[rows], completions[rows])
            logps.append(sum_over_tokens(scored, completions[rows] != PAD))
            check_at_most_0(f"{name}.token_logps", logps[-1], n_tokens=completions.shape[1])
        return logps[0] - logps[1]

    passes = torch.arange(len(prompts), device=prompts.device).split(batch_size)
    with torch.no_grad():
        margins = torch.cat(
            [
                log_ratios(passes[n], chosen) - log_ratios(passes[n], rejected)
                for n in progress(range(len(passes)))
            ]
        )
    # Read in two passes, the same answer may differ by rounding.
    return margins.masked_fill((chosen == rejected).all(1), 0.0)


def preference_accuracy(
    policy: Scorer,
    reference: Scorer,
    pairs: Pairs,
    *,
    batch_size: int = 64,
    progress: Callable[[range], Iterable[int]] = iter,
) -> float:
    """The share of pairs whose implied reward is higher for the chosen answer.

    A tie counts as wrong, so a pair of twice the same answer is wrong under every policy, and a
    policy that equals its reference has accuracy 0. Beta does not matter.

    Args and errors are those of `preference_margins`.
    """
    margins = preference_margins(policy, reference, pairs, batch_size=batch_size, progress=progress)
    return (margins > 0).double().mean().item()


def greedy_answer(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    max_tokens: int,
    template: str | None = None,
    chat_arguments: Mapping[str, object] | None = None,
) -> str:
    """The answer made of the most probable token each time; one that did not end closes in ….

    Args:
      policy, tokenizer: a model and what it was trained with.
      prompt: the question, without template: text, or messages as a tuple of `(role, content)`.
      max_tokens: the most tokens of prompt and answer together, at most the model's context.
      template, chat_arguments: those that the model was trained with, as in `encode`. By default
        text is read with `TEMPLATE`, and messages with the tokenizer's chat template.
    Returns:
      The answer, up to the end token, or to the special token that the chat template writes after
      an answer.
    Raises:
      ValueError: a `max_tokens` above the context, or a prompt that leaves no room or
        that `encode` refuses.
    """
    read = encode_prompt(tokenizer, prompt, template, chat_arguments)

    def most_probable(logps: Tensor) -> Tensor:
        return logps.argmax()

    return _answer(policy, tokenizer, *read, max_tokens, most_probable)


def sample_answer(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    *,
    max_tokens: int,
    generator: torch.Generator,
    template: str | None = None,
    chat_arguments: Mapping[str, object] | None = None,
) -> str:
    """An answer drawn from the policy as it is, temperature 1, by `generator`.

    The other args, the result and the errors are those of `greedy_answer`.
    """
    check_generator(generator)
    read = encode_prompt(tokenizer, prompt, template, chat_arguments)

    def draw(logps: Tensor) -> Tensor:
        return torch.multinomial(logps.exp(), 1, generator=generator).squeeze(0)

    return _answer(policy, tokenizer, *read, max_tokens, draw)


# --- private functions -----------------------------------------------------------------------


def _answer(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    ends: set[int],
    max_tokens: int,
    draw: Callable[[Tensor], Tensor],
) -> str:
    """Tokens chosen by `draw` from log-probabilities `[V]`, one after another, as text."""
    check_count("max_tokens", max_tokens)
    if policy.context is not None and max_tokens > policy.context:
        raise ValueError(
            f"`max_tokens` must be at most {policy.context}, the model's context, got {max_tokens}"
        )
    if len(tokens) >= max_tokens:
        raise ValueError(f"`prompt` must have less than {max_tokens} tokens, got {len(tokens)}")
    if max(tokens) >= policy.vocab_size:
        raise ValueError(
            f"`tokenizer` must be that of the model, whose tokens are 0..{policy.vocab_size - 1}, "
            f"got one with a token {max(tokens)}"
        )
    device = next(policy.parameters()).device
    n_prompt, cache = len(tokens), None
    # A layer that recomputes its activations keeps no keys and values.
    recomputes = any(getattr(part, "gradient_checkpointing", False) for part in policy.modules())
    with torch.no_grad():
        while len(tokens) < max_tokens and (len(tokens) == n_prompt or tokens[-1] not in ends):
            unread = tokens if cache is None else tokens[-1:]
            given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
            read = policy.model(
                input_ids=torch.tensor([unread], device=device), use_cache=not recomputes, **given
            )
            # Without keys and values, as in state space models, all is read again each time.
            cache = read.get("past_key_values")
            tokens = [*tokens, int(draw(read.logits[0, -1].double().log_softmax(-1)))]
    text = tokenizer.decode(tokens[n_prompt:], skip_special_tokens=True)
    return text if tokens[-1] in ends else text + "…"

"""What a policy says while it is trained: a few answers at each evaluation."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dpo_mini._arguments import check_count
from dpo_mini._files import write_whole
from dpo_mini.real.columns import cut
from dpo_mini.real.conversations import Messages
from dpo_mini.real.logs import Log
from dpo_mini.real.measures import sample_answer
from dpo_mini.real.models import CausalLMPolicy
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.tokens import encode_prompt


def report_answers(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Messages],
    path: AnyPath,
    *,
    seed: int,
    answer_tokens: int = 128,
    template: str | None = None,
    chat_arguments: Mapping[str, object] | None = None,
    write: Callable[[str], object] = print,
) -> Log:
    """A `report` for `Evaluation`: one sampled answer to each prompt, on the console and in a file.

    Every evaluation draws from the same seed, by a generator of its own: answers differ by what was
    learned in between, and training draws what it draws without them.

    Args:
      policy, tokenizer: a model and what it is trained with.
      prompts: as in `sample_answer`.
      path: a JSONL file, with a line of `step`, `prompt` and `answer` for each. A run that goes on
        keeps the lines of earlier steps.
      seed: of the draws.
      answer_tokens: the most tokens of an answer; it may be shorter by the model's context.
      template, chat_arguments: as in `sample_answer`.
      write: writes a line on the console, such as `tqdm.write` beside a progress bar.
    Returns:
      What `Evaluation` calls with the step and its numbers.
    Raises:
      ValueError: `answer_tokens < 1`, or a prompt that `sample_answer` refuses.
    """
    check_count("answer_tokens", answer_tokens)
    path = Path(path)
    room = []
    for prompt in prompts:
        n_prompt = len(encode_prompt(tokenizer, prompt, template, chat_arguments)[0])
        room.append(min(n_prompt + answer_tokens, policy.context or n_prompt + answer_tokens))

    def report(step: int, metrics: Mapping[str, float]) -> None:
        device = next(policy.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        lines = [line for line in lines if json.loads(line)["step"] < step]
        for prompt, max_tokens in zip(prompts, room, strict=True):
            answer = sample_answer(
                policy, tokenizer, prompt, max_tokens=max_tokens, generator=generator,
                template=template, chat_arguments=chat_arguments,
            )  # fmt: skip
            asked = prompt if isinstance(prompt, str) else prompt[-1][1]
            write(f"step {step}, asked {cut(asked)!r}: {cut(answer)!r}")
            entry = {"step": step, "prompt": prompt, "answer": answer}
            lines.append(json.dumps(entry, ensure_ascii=False))
        write_whole(path, "".join(f"{line}\n" for line in lines).encode())

    return report

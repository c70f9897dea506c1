"""DPO and kin on real models: one loop, and the tricks that it needs, each one function.

`train_preferences` is `train.fit_preferences` for models that do not fit: batches in several
passes, half precision, adapters, several processes, and runs that are killed and go on.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dpo_mini._arguments import (
    check_at_most_0,
    check_count,
    check_fraction,
    check_generator,
    check_indices,
    check_positive,
    check_rows,
)
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.policies import Scorer
from dpo_mini.policies.base import shares_storage
from dpo_mini.real.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from dpo_mini.real.logs import Log
from dpo_mini.real.models import CausalLMPolicy, save_model
from dpo_mini.real.preferences import AnyPath
from dpo_mini.train import History, Pairs
from dpo_mini.train.pair_losses import check_pair_loss, check_pairs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

Scores = tuple[Tensor, Tensor]
"""Chosen and rejected, one number per pair each, nats."""
Precision = Callable[[str], AbstractContextManager[object]]
"""From a device's type, such as `"cuda"`, to the context that a model is read in."""
Reduce = Callable[[Tensor, Tensor], Tensor]
"""From `token_logps` `[B, T]` and their mask to `[B]`: `sum_over_tokens` or `mean_over_tokens`."""
Schedule = Callable[[int], float]
"""From a step, 0 the first, to what the learning rate is multiplied by there."""
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class OneProcess:
    """What `train_preferences` asks of an `accelerate.Accelerator`, answered for one process."""

    num_processes, process_index, is_main_process = 1, 0, True
    distributed_type, mixed_precision, gradient_accumulation_steps = "NO", "no", 1

    def prepare(self, *parts: Any) -> tuple[Any, ...]:  # noqa: D102
        return parts

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: D102
        return nullcontext()

    def backward(self, loss: Tensor) -> None:  # noqa: D102
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:  # noqa: D102
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:  # noqa: D102
        return tensor

    def wait_for_everyone(self) -> None:  # noqa: D102
        pass

    def get_state_dict(self, model: nn.Module) -> dict[str, Tensor]:  # noqa: D102
        return model.state_dict()

    def unwrap_model(self, model: nn.Module) -> nn.Module:  # noqa: D102
        return model


# --- precision and learning rates ------------------------------------------------------------


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Every product in the dtype of the weights, whatever the `device_type`."""
    return nullcontext()


def bf16_autocast(device_type: str) -> AbstractContextManager[object]:
    """Matrix products in bfloat16; weights, gradients and log-probabilities stay float32.

    A log-probability is off by the rounding of all its tokens then, and by the same for two models
    with the same weights. So the reference is read in it too: else rewards start at that noise, and
    not at 0.

    Args:
      device_type: such as `"cuda"` or `"cpu"`.
    Returns:
      The context that a model is read in.
    """
    return torch.autocast(device_type, dtype=torch.bfloat16)


def constant(step: int) -> float:
    """The learning rate as it is, at every `step`."""
    return 1.0


def warmup_then_cosine(steps: int, *, warmup: int) -> Schedule:
    """Up in equal parts over `warmup` steps to 1, then a cosine down to 0 after the last.

    Args:
      steps: of the whole run.
      warmup: of them, in 0..steps-1.
    Returns:
      From a step, 0 the first, to what the learning rate is multiplied by.
    Raises:
      ValueError: `steps < 1`, or a warm-up that leaves nothing.
    """
    _check_warmup(steps, warmup)

    def schedule(step: int) -> float:
        after = (step - warmup) / (steps - warmup)
        return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * after)) / 2

    return schedule


def warmup_then_linear(steps: int, *, warmup: int) -> Schedule:
    """Up in equal parts over `warmup` steps to 1, then in equal parts down to 0 after the last.

    Args, result and errors are those of `warmup_then_cosine`.
    """
    _check_warmup(steps, warmup)

    def schedule(step: int) -> float:
        return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup)

    return schedule


# --- the loop --------------------------------------------------------------------------------


def train_preferences(
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    pairs: Pairs,
    loss: Callable[..., Tensor],
    *,
    beta: float,
    batches: Tensor,
    micro_batch_size: int,
    optimizer: Optimizer,
    schedule: Schedule = constant,
    max_grad_norm: float = math.inf,
    reduce: Reduce | None = None,
    precision: Precision | None = None,
    accelerator: "Accelerator | OneProcess | None" = None,
    checkpoints: AnyPath | None = None,
    checkpoint_every: int = 100,
    generator: torch.Generator | None = None,
    logs: Sequence[Log] = (),
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Minimise a loss of pairs against a reference, in place, on a model of any size.

    Args:
      policy: what is trained; with an accelerator `policy.model` becomes what it prepared.
      reference: frozen. What `reference_logps` gave, which also says how the policy is to be read;
        or a model that is read beside the policy, a copy or `adapter_off(policy)`; or scores of
        your own, chosen and rejected `[n]`.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])` as `encode` gives them.
      loss: such as `dpo_loss`, or `partial(cdpo_loss, label_smoothing=0.1)`; called with `beta`.
        One without a reference (SimPO, CPO, ORPO) in `train.without_reference`.
      beta: > 0, of the loss and of the rewards that are reported.
      batches: `[steps, B]`, the rows of each step, as `shuffled_batches` gives them.
      micro_batch_size: pairs that go through the model at once, in each process. The gradient is
        that of the mean over the whole batch, whatever this is.
      optimizer: over the parameters of the policy that are trained, such as `torch.optim.AdamW`.
      schedule: multiplies the optimizer's learning rates: `constant`, `warmup_then_cosine(...)`.
      max_grad_norm: > 0; a longer gradient is shortened to it.
      reduce: as in `train.fit_preferences`. By default the one that `reference_logps` had, and
        else `sum_over_tokens`.
      precision: `full_precision` or `bf16_autocast`. By default the one that `reference_logps` had,
        and else `full_precision`.
      accelerator: an `accelerate.Accelerator` where the run has several processes; every one of
        them makes this call and reads its share of each batch, B / processes pairs.
      checkpoints: a folder of this run alone. A run that finds a checkpoint there goes on from it
        and ends with the weights, to the last bit on a CPU, of a run that was never stopped. Pairs,
        batches, optimizer, beta and clipping are compared; loss and schedule cannot be.
      checkpoint_every: steps from one checkpoint to the next; there is one at the end too.
      generator: one that `logs` draw from while training runs, if any: its state is saved too.
        Nothing else draws: the batches are given and dropout is off.
      logs: called after each step in the main process: `csv_log(path)`, `tensorboard_log(folder)`.
      progress: as in `train.fit_sft`.
    Returns:
      `{"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
      "grad_norm", "lr"}`, each `[steps]`, of the batch before its step is taken. A reward is
      beta log(pi / pi_ref); an accuracy counts a margin above 0; the norm is that before clipping.
    Raises:
      ValueError: a setting out of range; rows that differ in number; a reference that shares
        weights with the policy or has a log-probability above 0; an optimizer of other parameters;
        a batch that the processes do not divide; a precision that is not the accelerator's; a
        `reduce` or `precision` that is not that of `reference_logps`; a checkpoint of another run;
        a loss or gradient that is not finite, before its step is taken.
    """
    accelerator = accelerator or OneProcess()
    reduce, precision = _how_to_read(reference, reduce, precision)
    _check_run(policy, reference, pairs, batches, optimizer)
    _check_accelerator(accelerator, policy, batches, precision, checkpoints)
    _check_settings(loss, beta, micro_batch_size, checkpoint_every, max_grad_norm)
    settings = _settings(optimizer, pairs, beta=beta, max_grad_norm=max_grad_norm)
    rates = [group["lr"] for group in optimizer.param_groups]
    kept = _Checkpoints(checkpoints, checkpoint_every, policy.model, settings, batches, generator)
    done, history = kept.go_on(optimizer, accelerator)
    policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
    policy.train()
    score_reference = _reader(reference, pairs, reduce, precision)
    for step in progress(range(done, len(batches))):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step)
        optimizer.zero_grad()
        sums = []
        for rows in _micro_batches(batches[step], micro_batch_size, accelerator, policy.model):
            scores = _pair_logps(policy, pairs, rows, reduce, precision)
            ref_scores = [values.to(scores[0].device) for values in score_reference(rows)]
            losses = loss(*scores, *ref_scores, beta=beta)
            # A sum over the batch's size, and no mean of means: passes may differ in size.
            # Processes average what they have, so each has its part times their number.
            accelerator.backward(losses.sum() * (accelerator.num_processes / len(batches[step])))
            sums.append(_sums(losses, scores, ref_scores, beta))
        means = accelerator.reduce(sum(sums[1:], sums[0]), "sum") / len(batches[step])
        norm = accelerator.clip_grad_norm_(policy.model.parameters(), max_grad_norm)
        metrics = dict(zip(METRICS, means.tolist(), strict=True))
        metrics |= {"grad_norm": float(norm), "lr": float(optimizer.param_groups[0]["lr"])}
        _check_finite(step, metrics)
        optimizer.step()
        for name, value in metrics.items():
            history.setdefault(name, []).append(value)
        if accelerator.is_main_process:
            for log in logs:
                log(step, metrics)
            kept.save(step + 1, optimizer, history)
    accelerator.wait_for_everyone()
    return history


def save_trained(
    policy: CausalLMPolicy,
    tokenizer: PreTrainedTokenizerBase,
    folder: AnyPath,
    *,
    accelerator: "Accelerator | OneProcess | None" = None,
) -> None:
    """`save_model` of what `train_preferences` trained, called in every process, written in one.

    An adapter is merged into the weights, for good: what is written is a model like any other, and
    the policy reads the same weights from then on.

    Args:
      policy, accelerator: those of `train_preferences`.
      tokenizer, folder: as in `save_model`.
    """
    accelerator = accelerator or OneProcess()
    weights = accelerator.get_state_dict(policy.model)  # gathered from all: all must take part
    model: Any = accelerator.unwrap_model(policy.model)  # of transformers, or of peft
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
        weights = None
    if accelerator.is_main_process:
        save_model(model, tokenizer, folder, weights=weights)
    accelerator.wait_for_everyone()


# --- the order of the rows, and which rows --------------------------------------------------


def shuffled_batches(
    n_rows: int, *, steps: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """The rows of every step, drawn before the first: a run that is stopped knows how it goes on.

    Every row is seen once before any is seen again. All batches are full: one that reaches the end
    of the rows goes on at the beginning of their next order.

    Args:
      n_rows: how many there are to draw from.
      steps, batch_size: the shape of the result.
      generator: shuffles.
    Returns:
      `[steps, batch_size]` int64.
    Raises:
      ValueError: a number below 1.
    """
    for name, count in {"n_rows": n_rows, "steps": steps, "batch_size": batch_size}.items():
        check_count(name, count)
    check_generator(generator)
    rounds = -(-steps * batch_size // n_rows)
    device = generator.device
    orders = [torch.randperm(n_rows, generator=generator, device=device) for _ in range(rounds)]
    return torch.cat(orders)[: steps * batch_size].view(steps, batch_size).cpu()


def drop_long(pairs: Pairs, *, max_tokens: int) -> tuple[Pairs, int]:
    """The pairs that fit, and how many did not.

    Args:
      pairs: as `encode` gives them, with a `max_tokens` there that lets all of them pass.
      max_tokens: the most tokens of a prompt and the longer of its answers.
    Returns:
      The pairs in their order, without columns of padding alone; the number left out.
    Raises:
      ValueError: no pair fits.
    """
    prompt, chosen, rejected = _lengths(pairs, max_tokens)
    kept = prompt + torch.maximum(chosen, rejected) <= max_tokens
    if not kept.any():
        shortest = int((prompt + torch.maximum(chosen, rejected)).min())
        raise ValueError(
            f"`max_tokens` must be >= {shortest}, the length of the shortest pair, got {max_tokens}"
        )
    height, width = int(prompt[kept].max()), int(torch.maximum(chosen, rejected)[kept].max())
    prompts, chosen_tokens, rejected_tokens = (tokens[kept] for tokens in pairs)
    fitting = (prompts[:, :height], chosen_tokens[:, :width], rejected_tokens[:, :width])
    return fitting, int((~kept).sum())


def cut_long(pairs: Pairs, *, max_tokens: int) -> tuple[Pairs, int]:
    """The pairs with the ends of long answers cut off, and how many pairs lost some.

    A cut answer has lost its end token too, so it does not teach the policy to stop there. Prompts
    are never cut: without its beginning, or its end, one is another question.

    Args:
      pairs, max_tokens: as in `drop_long`.
    Returns:
      As many pairs, without columns of padding alone; the number of those that were cut.
    Raises:
      ValueError: a prompt leaves no room for an answer.
    """
    prompt, chosen, rejected = _lengths(pairs, max_tokens)
    room = max_tokens - prompt
    if (room < 1).any():
        row = int((room < 1).nonzero()[0])
        raise ValueError(
            f"`max_tokens` must be > {int(prompt[row])}, the length of the prompt in row {row}, "
            f"got {max_tokens}"
        )
    answers = [
        pad_sequence(
            [row[: min(n, r)] for row, n, r in zip(tokens, counts, room, strict=True)],
            batch_first=True,
            padding_value=PAD,
        )
        for tokens, counts in ((pairs[1], chosen), (pairs[2], rejected))
    ]
    width = max(tokens.shape[1] for tokens in answers)
    chosen_cut, rejected_cut = (
        nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=PAD) for tokens in answers
    )
    return (pairs[0], chosen_cut, rejected_cut), int((torch.maximum(chosen, rejected) > room).sum())


# --- the reference ---------------------------------------------------------------------------


class ReferenceLogps(tuple[Tensor, Tensor]):
    """What `reference_logps` gives: chosen and rejected, and how they were read."""

    reduce: Reduce
    precision: Precision


def reference_logps(
    reference: Scorer,
    pairs: Pairs,
    *,
    micro_batch_size: int = 1,
    reduce: Reduce = sum_over_tokens,
    precision: Precision = full_precision,
    progress: Callable[[range], Iterable[int]] = iter,
) -> ReferenceLogps:
    """Score every pair once, before training: then the reference need not be in memory.

    The numbers are, to the last bit, those that a reference beside the policy would give in a pass
    over the same pairs. With one pair per pass the order of the pairs does not matter. In a pass
    with others a pair is padded to the longest, sums run in another order, and the last digit may
    differ: 1e-5 in float32, and far more in bfloat16.

    Args:
      reference: a model before it is trained, a copy, or `adapter_off(policy)`.
      pairs, reduce, precision: as in `train_preferences`, which then takes `reduce` and `precision`
        from the result.
      micro_batch_size: pairs per pass.
      progress: wraps the range of passes, as in `train.fit_sft`.
    Returns:
      Chosen and rejected, `[n]` each, nats, on the CPU and without gradient: a tuple with the
      attributes `reduce` and `precision`.
    Raises:
      ValueError: no pairs, rows that differ in number, `micro_batch_size < 1`, or log-probabilities
        above 0.
    """
    check_pairs(pairs)
    check_count("micro_batch_size", micro_batch_size)
    read = _reader(reference, pairs, reduce, precision)
    passes = torch.arange(len(pairs[0])).split(micro_batch_size)
    blocks = [read(passes[n]) for n in progress(range(len(passes)))]
    logps = ReferenceLogps(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True))
    logps.reduce, logps.precision = reduce, precision
    return logps


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    generator: torch.Generator,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> "PeftModel":
    """The model with a trained adapter, W + (alpha / rank) B A, on every linear layer but the last.

    B starts at 0: the model says what it said before. Its own weights are frozen, so with the
    adapter switched off it is its own reference forever; see `adapter_off`.

    Args:
      model: changed in place.
      rank: rows of A.
      generator: draws A.
      alpha: the scale, by default 2 rank.
      dropout: of the adapter's inputs; a `CausalLMPolicy` holds it off.
    Returns:
      A `peft.PeftModel`; `merge_and_unload()` gives a model without adapters to save.
    Raises:
      ValueError: `rank < 1`, `alpha <= 0`, or `dropout` outside [0, 1].
    Source: Hu et al. 2021, arXiv:2106.09685; all linear layers: Dettmers et al. 2023,
      arXiv:2305.14314.
    """
    from peft import LoraConfig, get_peft_model

    check_count("rank", rank)
    check_generator(generator)
    check_fraction("dropout", dropout)
    alpha = 2 * rank if alpha is None else alpha
    check_positive("alpha", alpha)
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # peft says int and divides it by the rank
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),  # GPT-2
    )
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Of transformers to peft, which reads an attribute by a name that goes away.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(seed)  # peft draws from global state: fork_rng puts it back
        return get_peft_model(model, config)


class adapter_off:
    """The reference of a policy with an adapter: the same weights read without it, no second copy.

    Args:
      policy: its model is what `add_lora` gave, or any `peft.PeftModel`.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:  # noqa: D107
        if not hasattr(policy.model, "disable_adapter"):
            got = type(policy.model).__name__
            raise TypeError(f"`policy` must have a model with an adapter (add_lora), got a {got}")
        self.policy = policy
        self.model = policy.model  # held here: an accelerator wraps the policy's
        self.unwrapped = CausalLMPolicy(policy.model, end_token=policy.end_token)

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the policy's model."""
        return self.model.parameters()

    def token_logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """As in `CausalLMPolicy.token_logps`, without the adapter."""
        with self.model.disable_adapter():
            return self.unwrapped.token_logps(prompts, completions)


# --- private functions -----------------------------------------------------------------------


def _how_to_read(
    reference: Scores | Scorer, reduce: Reduce | None, precision: Precision | None
) -> tuple[Reduce, Precision]:
    """What the caller said, or else what `reference_logps` was told, which must not differ."""
    if not isinstance(reference, ReferenceLogps):
        return reduce or sum_over_tokens, precision or full_precision
    for name, got in {"reduce": reduce, "precision": precision}.items():
        want = getattr(reference, name)
        if got not in (None, want):
            raise ValueError(
                f"`{name}` must be {_named(want)} like that of reference_logps, or be left out, "
                f"got {_named(got)}"
            )
    return reference.reduce, reference.precision


def _named(function: object) -> str:
    return getattr(function, "__name__", repr(function))


def _micro_batches(
    rows: Tensor, size: int, accelerator: "Accelerator | OneProcess", model: nn.Module
) -> Iterator[Tensor]:
    """The rows of a batch that this process reads, `size` at a time."""
    *others, last = rows.chunk(accelerator.num_processes)[accelerator.process_index].split(size)
    for part in others:
        with accelerator.no_sync(model):  # processes add up their gradients once, in the last pass
            yield part
    yield last


def _sums(
    losses: Tensor, scores: Sequence[Tensor], ref_scores: Sequence[Tensor], beta: float
) -> Tensor:
    """Loss, the two rewards, their margin and whether it is above 0, summed over pairs, `[5]`."""
    good, bad = (
        beta * (ours - theirs).detach() for ours, theirs in zip(scores, ref_scores, strict=True)
    )
    seen = (losses.detach(), good, bad, good - bad, (good > bad).to(good))
    return torch.stack([values.sum() for values in seen])


def _check_finite(step: int, metrics: Mapping[str, float]) -> None:
    loss, norm = metrics["loss"], metrics["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        got = f"{loss} and a gradient of norm {norm} at step {step}"
        raise ValueError(f"`loss` must be finite, and its gradient too, got {got}")


def _pair_logps(
    model: Scorer, pairs: Pairs, rows: Tensor, reduce: Reduce, precision: Precision
) -> Scores:
    """Chosen and rejected, `[B]` each, in one pass: the two answers share their prompt."""
    prompts, chosen, rejected = pairs
    device = next(iter(model.parameters())).device
    answers = torch.cat([chosen[rows], rejected[rows]]).to(device)
    # One context per pass: autocast keeps its half-precision weights until the context ends, and
    # those that it made for a pass without gradient would take none from the policy's.
    with precision(device.type):
        scored = model.token_logps(prompts[rows].repeat(2, 1).to(device), answers)
    chosen_scores, rejected_scores = reduce(scored, answers != PAD).chunk(2)
    return chosen_scores, rejected_scores


def _reader(
    reference: Scores | Scorer, pairs: Pairs, reduce: Reduce, precision: Precision
) -> Callable[[Tensor], Scores]:
    """From rows to the reference's chosen and rejected: looked up, or read without gradient."""

    def read(rows: Tensor) -> Scores:
        if isinstance(reference, tuple):
            return reference[0][rows], reference[1][rows]
        with torch.no_grad():
            scores = _pair_logps(reference, pairs, rows, reduce, precision)
        n_tokens = pairs[1].shape[1]
        check_at_most_0("reference.token_logps", torch.cat(scores), n_tokens=n_tokens)
        return scores

    return read


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, each tied weight once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _settings(optimizer: Optimizer, pairs: Pairs, **others: float) -> dict[str, object]:
    """What a run that goes on must have in common with the one that stopped."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    digest = hashlib.sha256()
    for tokens in pairs:
        digest.update(tokens.cpu().contiguous().numpy().data)
    named = {"optimizer": type(optimizer).__name__, "groups": groups, **others}
    return {**named, "pairs": digest.hexdigest()}


@dataclass(frozen=True, eq=False)
class _Checkpoints:
    """The checkpoints of one run; none where `folder` is None."""

    folder: AnyPath | None
    every: int
    model: nn.Module
    settings: dict[str, object]
    batches: Tensor
    generator: torch.Generator | None

    def go_on(
        self, optimizer: Optimizer, accelerator: "Accelerator | OneProcess"
    ) -> tuple[int, History]:
        """Puts the newest into model, optimizer and generator: steps done, and their history."""
        saved = None if self.folder is None else load_checkpoint(self.folder)
        accelerator.wait_for_everyone()  # all have read before one writes the next
        if saved is None:
            return 0, {}
        saved.check_same_run(_trained(self.model), self.settings, self.batches, self.generator)
        with torch.no_grad():
            for name, weight in _trained(self.model).items():
                weight.copy_(saved.weights[name])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
        if self.generator is not None and saved.generator_state is not None:  # both or none
            self.generator.set_state(saved.generator_state)
        return saved.step, saved.history

    def save(self, done: int, optimizer: Optimizer, history: History) -> None:
        """Writes one where it is time for it: after every so many steps, and after the last."""
        if self.folder is None or (done % self.every and done != len(self.batches)):
            return
        state = None if self.generator is None else self.generator.get_state()
        weights, moments = _trained(self.model), optimizer.state_dict()["state"]
        save_checkpoint(
            self.folder,
            Checkpoint(done, weights, moments, self.settings, self.batches, state, history),
        )


def _check_run(
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    pairs: Pairs,
    batches: Tensor,
    optimizer: Optimizer,
) -> None:
    check_pairs(pairs)
    check_indices("batches", batches, "[steps, B]", len(pairs[0]))
    if isinstance(reference, tuple):
        if len(reference) != 2:
            raise ValueError(
                f"`reference` must be (chosen, rejected), got {len(reference)} tensors"
            )
        check_rows("pairs", pairs[0], reference=reference[0], rejected=reference[1])
        for scores in reference:
            check_at_most_0("reference", scores, n_tokens=pairs[1].shape[1])
    elif isinstance(reference, nn.Module) and shares_storage(policy, reference):
        raise ValueError(
            "`reference` must be reference_logps, adapter_off(policy) or a copy (copy.deepcopy), "
            "got a model that shares weights with the policy"
        )
    trained = {id(weight) for weight in policy.parameters() if weight.requires_grad}
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if held != trained:
        raise ValueError(
            f"`optimizer` must have the policy's {len(trained)} trained parameters, got "
            f"{len(held & trained)} of them and {len(held - trained)} others"
        )


def _check_settings(
    loss: Callable[..., Tensor],
    beta: float,
    micro_batch_size: int,
    checkpoint_every: int,
    max_grad_norm: float,
) -> None:
    check_pair_loss(loss, beta=beta)
    check_positive("beta", beta)
    check_count("micro_batch_size", micro_batch_size)
    check_count("checkpoint_every", checkpoint_every)
    if not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be a number > 0, got {max_grad_norm}")


def _check_accelerator(
    accelerator: "Accelerator | OneProcess",
    policy: CausalLMPolicy,
    batches: Tensor,
    precision: Precision,
    checkpoints: AnyPath | None,
) -> None:
    n, mixed = accelerator.num_processes, accelerator.mixed_precision
    if batches.shape[1] % n:
        got = batches.shape[1]
        raise ValueError(
            f"`batches` must have a multiple of {n} rows per step for {n} processes, got {got}"
        )
    if mixed == "bf16" and precision is not bf16_autocast:
        raise ValueError(
            f"`precision` must be bf16_autocast like the accelerator's, got {_named(precision)}"
        )
    if mixed not in ("no", "bf16"):
        raise ValueError(f"`accelerator` must have mixed_precision 'no' or 'bf16', got {mixed!r}")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "`accelerator` must have gradient_accumulation_steps 1, since micro_batch_size "
            f"accumulates, got {accelerator.gradient_accumulation_steps}"
        )
    if accelerator.distributed_type == "FSDP":
        if checkpoints is not None:
            raise ValueError(
                "`checkpoints` must be None under FSDP (weights in shards), got a folder"
            )
        if hasattr(policy.model, "merge_and_unload"):
            raise ValueError("`policy` must be a model without adapter under FSDP, got one with it")


def _lengths(pairs: Pairs, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each prompt, chosen and rejected answer, `[n]` each."""
    check_pairs(pairs)
    check_count("max_tokens", max_tokens)
    prompt, chosen, rejected = ((tokens != PAD).sum(1) for tokens in pairs)
    return prompt, chosen, rejected


def _check_warmup(steps: int, warmup: int) -> None:
    check_count("steps", steps)
    check_count("warmup", warmup, least=0)
    if warmup >= steps:
        raise ValueError(f"`warmup` must be less than steps = {steps}, got {warmup}")

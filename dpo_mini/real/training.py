"""The loop for real models: passes that fit, several processes, and runs that are killed and go on.

`train_preferences` is `train.fit_preferences` for models that do not fit in one pass;
`train_ratings` is KTO, in the same loop.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from dpo_mini._arguments import (
    check_count,
    check_indices,
    check_positive,
)
from dpo_mini.losses import kto_loss, kto_reference_point
from dpo_mini.policies import Scorer
from dpo_mini.real.adapters import adapter_off
from dpo_mini.real.checkpoints import RunCheckpoints, run_settings
from dpo_mini.real.evaluation import Evaluation, Evaluator, check_reference
from dpo_mini.real.logs import Log
from dpo_mini.real.models import CausalLMPolicy, save_model
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.processes import OneProcess, check_divides
from dpo_mini.real.ratings import RatedBatches, Ratings, check_data, is_rated
from dpo_mini.real.schedules import Schedule, constant
from dpo_mini.real.scoring import (
    Data,
    Precision,
    Reduce,
    ScoreReader,
    Scores,
    bf16_autocast,
    check_passes,
    function_name,
    how_to_read,
    pair_logps,
    reads_in_one_row,
    reshard,
)
from dpo_mini.train import History, Pairs
from dpo_mini.train.pair_losses import check_pair_loss

if TYPE_CHECKING:
    from accelerate import Accelerator

METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
"""Of a batch of pairs, as `trl` names them."""
RATING_METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
    "logps/rejected", "kl",
)  # fmt: skip
"""Of a batch of ratings, as `trl` names them."""


# --- the loop --------------------------------------------------------------------------------


def train_preferences(
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    pairs: Pairs,
    loss: Callable[..., Tensor],
    *,
    beta: float,
    batches: Tensor,
    micro_batch_size: int | None = None,
    optimizer: Optimizer,
    schedule: Schedule = constant,
    max_grad_norm: float = math.inf,
    reduce: Reduce | None = None,
    precision: Precision | None = None,
    accelerator: "Accelerator | OneProcess | None" = None,
    checkpoints: AnyPath | None = None,
    checkpoint_every: int = 100,
    generator: torch.Generator | None = None,
    evaluation: Evaluation | None = None,
    logs: Sequence[Log] = (),
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """Minimise a loss of pairs against a reference, in place, on a model of any size.

    Args:
      policy: what is trained; with an accelerator `policy.model` becomes what it prepared.
      reference: frozen. What `reference_logps` gave for the same batches, which also says how the
        policy is to be read; or a model that is read beside the policy, a copy or
        `adapter_off(policy)`; or scores of your own, chosen and rejected `[n]`.
      pairs: `(prompts [n], chosen [n, T], rejected [n, T])` as `encode` gives them.
      loss: such as `dpo_loss`, or `partial(cdpo_loss, label_smoothing=0.1)`; called with `beta`.
        One without a reference (SimPO, CPO, ORPO) in `train.without_reference`.
      beta: > 0, of the loss and of the rewards that are reported.
      batches: `[steps, B]`, the rows of each step, as `shuffled_batches` gives them.
      micro_batch_size: pairs that go through the model at once, in each process. The gradient is
        that of the mean over the whole batch, whatever this is. By default the one that
        `reference_logps` had, and else 1.
      optimizer: over the parameters of the policy that are trained, such as `torch.optim.AdamW`.
      schedule: multiplies the optimizer's learning rates: `constant`, `warmup_then_cosine(...)`.
      max_grad_norm: > 0; a longer gradient is shortened to it.
      reduce: as in `train.fit_preferences`. By default the one that `reference_logps` had, and
        else `sum_over_tokens`.
      precision: `full_precision` or `bf16_autocast`. By default the one that `reference_logps` had,
        and else `full_precision`.
      accelerator: an `accelerate.Accelerator` where the run has several processes; every one of
        them makes this call and reads its share of each batch, B / processes pairs. Where it deals
        out the weights (FSDP), it may have prepared policy and optimizer before, for
        `reference_logps`: then no device ever holds all weights.
      checkpoints: a folder of this run alone: one that another run is at work in is refused, and a
        checkpoint that is not whole. A run that finds a checkpoint there goes on from it and ends
        with the weights, to the last bit on a CPU, of a run that was never stopped. It is compared
        first, to the last bit (a second or so per GB of weights): the policy as it is given, so
        before training; the reference's weights, or scores of your own; pairs, batches, optimizer,
        rates, beta, clipping, `reduce`, `precision`, and a loss by its name and what `partial` gave
        it. `micro_batch_size` and the number of processes may change: they change no more than
        rounding. A run that is finished may go on with more steps, if its batches are the first of
        the new ones. From there on it has the new schedule: one that depends on the number of
        steps, such as `warmup_then_linear`, then begins again above 0.
      checkpoint_every: steps from one checkpoint to the next; there is one at the end too.
      generator: one that `logs`, or the `report` of `evaluation`, draw from while training runs, if
        any: its state is saved too. Nothing else draws: the batches are given and dropout is off.
      evaluation: held-out pairs to look at before, while and after the policy is trained. A run
        that goes on must have the same ones, their reference and `every`; `patience` may change: a
        run that it stopped goes on with a larger one.
      logs: called after each step in the main process: `csv_log(path)`, `tensorboard_log(folder)`;
        with the numbers of an evaluation too, where it was of the same policy. Those of the last
        stand alone, at the number of steps that were taken.
      progress: as in `train.fit_sft`.
    Returns:
      `{"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
      "logps/chosen", "logps/rejected", "grad_norm", "lr"}`, each `[steps]`, of the batch before its
      step is taken. A reward is beta log(pi / pi_ref); an accuracy counts a margin above 0; logps
      are the policy's, as `reduce` gives them; the norm is that before clipping. With an
      `evaluation` also `eval_step` and `eval_loss`, `eval_rewards/chosen` and so on, each
      `[evaluations]`, means over all held-out pairs before step `eval_step` is taken.
    Raises:
      ValueError: a setting out of range; rows that differ in number; a reference that reads weights
        which are trained, that moved in the first step, or that has a log-probability above 0; an
        optimizer of other parameters; a batch that the processes do not divide; a precision that is
        not the accelerator's; a `reduce`, `precision`, `micro_batch_size` or pass that is not that
        of `reference_logps`; a checkpoint of another run; a loss or gradient that is not finite,
        before its step is taken; weights in float16; weights that a step leaves not finite, before
        it is logged or saved.
    """
    check_data(pairs)
    if is_rated(pairs):
        raise ValueError(
            "`pairs` must be (prompts, chosen, rejected), got ratings, which train_ratings takes"
        )
    check_pair_loss(loss, beta=beta)
    return _run(
        policy, reference, pairs, loss, beta, batches, micro_batch_size, optimizer, schedule,
        max_grad_norm, reduce, precision, accelerator, checkpoints, checkpoint_every, generator,
        evaluation, logs, progress,
    )  # fmt: skip


def train_ratings(
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    ratings: Ratings,
    *,
    beta: float,
    batches: Tensor,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    micro_batch_size: int | None = None,
    optimizer: Optimizer,
    schedule: Schedule = constant,
    max_grad_norm: float = math.inf,
    reduce: Reduce | None = None,
    precision: Precision | None = None,
    accelerator: "Accelerator | OneProcess | None" = None,
    checkpoints: AnyPath | None = None,
    checkpoint_every: int = 100,
    generator: torch.Generator | None = None,
    evaluation: Evaluation | None = None,
    logs: Sequence[Log] = (),
    progress: Callable[[range], Iterable[int]] = iter,
) -> History:
    """KTO: minimise `kto_loss` of single answers that were liked or not, in place.

    A step estimates z_0 first, by `kto_reference_point`: each prompt of the batch is read with the
    answer of the row before it, the first with that of the last, as in `trl`. That row may have the
    same prompt; its answer is cut off where the two would be longer than the longest of the
    ratings. The whole batch has one z_0, whatever the passes and processes; `trl` pairs the rows of
    one device and pass, and with gradient accumulation has a z_0 for each. So a pass may be of one
    row here, and a batch may not.

    Args:
      policy: as in `train_preferences`.
      reference: frozen. What `reference_logps` gave for the same ratings and batches; or a model
        that is read beside the policy; or scores of your own, of each row of all batches one after
        another, with its own answer and with the other one, `[steps * B]` each.
      ratings: `(prompts [n, P], completions [n, T], labels [n])` as `encode` gives them.
      beta: > 0, of the loss and of the rewards that are reported.
      batches: `[steps, B]`, the rows of each step, as `shuffled_batches` gives them; each step has
        two prompts or more.
      desirable_weight, undesirable_weight: > 0, of the losses of liked and of other answers. The
        paper has desirable_weight * liked between 1 and 4/3 times undesirable_weight * others.
      micro_batch_size: rows that go through the model at once. By default as in
        `train_preferences`; the gradient is that of the mean over the whole batch.
      optimizer, schedule, max_grad_norm, reduce, precision, accelerator, checkpoints,
        checkpoint_every, generator, logs, progress: as in `train_preferences`.
      evaluation: as in `train_preferences`, with held-out ratings in the place of pairs.
    Returns:
      `{"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
      "logps/rejected", "kl", "grad_norm", "lr"}`, each `[steps]`, of the batch before its step is
      taken. Chosen are the answers that were liked, rejected the others: each mean is over its own
      rows, and NaN in a batch without any. The margin is the difference of the two means, and kl is
      z_0, nats. With an `evaluation` also `eval_step`, `eval_loss` and so on, `[evaluations]` each.
    Raises:
      ValueError: as `train_preferences`; a batch with one prompt alone.
    """
    if not is_rated(ratings):
        raise ValueError(
            "`ratings` must be (prompts, completions, labels) with labels [n], as encode gives "
            "them for ratings, got pairs or others (train_preferences takes pairs)"
        )
    check_data(ratings)
    check_indices("batches", batches, "[steps, B]", len(ratings[0]))
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    loss = partial(
        kto_loss, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    return _run(
        policy, reference, RatedBatches(ratings, batches), loss, beta,
        batches, micro_batch_size, optimizer, schedule, max_grad_norm, reduce, precision,
        accelerator, checkpoints, checkpoint_every, generator, evaluation, logs, progress,
    )  # fmt: skip


def _run(
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    data: Data,
    loss: Callable[..., Tensor],
    beta: float,
    batches: Tensor,
    micro_batch_size: int | None,
    optimizer: Optimizer,
    schedule: Schedule,
    max_grad_norm: float,
    reduce: Reduce | None,
    precision: Precision | None,
    accelerator: "Accelerator | OneProcess | None",
    checkpoints: AnyPath | None,
    checkpoint_every: int,
    generator: torch.Generator | None,
    evaluation: Evaluation | None,
    logs: Sequence[Log],
    progress: Callable[[range], Iterable[int]],
) -> History:
    """What both kinds of training have in common; data and loss are checked."""
    accelerator = accelerator or OneProcess()
    how = how_to_read(reference, reduce, precision, micro_batch_size)
    reduce, precision, micro_batch_size = how
    tensors = data.ratings if isinstance(data, RatedBatches) else data
    check_indices("batches", batches, "[steps, B]", len(tensors[0]))
    rows_of = data.steps if isinstance(data, RatedBatches) else batches  # those of each step
    _check_run(policy, reference, data, optimizer)
    _check_accelerator(accelerator, policy, reference, batches, precision, checkpoints)
    check_passes(reference, data, rows_of, accelerator.num_processes)
    _check_settings(beta, micro_batch_size, checkpoint_every, max_grad_norm)
    if evaluation is not None:
        _check_evaluation(evaluation, data, policy, reduce, precision, accelerator)
    settings: dict[str, object] = {}
    if checkpoints is not None:
        settings = run_settings(
            policy.model, reference, tensors, loss, optimizer, schedule, len(batches), reduce,
            precision, evaluation.settings() if evaluation else None, beta=beta,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip
    trained = _trained(policy.model)
    kept = RunCheckpoints(checkpoints, checkpoint_every, trained, settings, batches, generator)
    with kept.locked(accelerator.is_main_process):
        rates = [group["lr"] for group in optimizer.param_groups]
        done, history = kept.go_on(optimizer)
        accelerator.wait_for_everyone()  # all have read before one writes the next
        if accelerator.is_main_process:
            kept.remove_older(done)
        policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
        policy.train()
        trained = _trained(accelerator.unwrap_model(policy.model))
        in_one_row = reads_in_one_row(policy, reference)
        score_reference = ScoreReader(reference, data, reduce, precision, in_one_row, trained)
        read = _reader(policy, data, score_reference, loss, beta)
        evaluator = Evaluator(
            evaluation,
            _held_out(evaluation, read, trained) if evaluation else None,
            getattr(evaluation and evaluation.reference, "micro_batch_size", micro_batch_size),
            accelerator, policy, trained, len(rows_of),
        )  # fmt: skip
        # Of the policy before the step, as the numbers of the step are.
        found = evaluator.at(done, history)
        is_over = evaluator.is_over(history)
        for step in progress(range(len(rows_of) if is_over else done, len(rows_of))):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step)
            optimizer.zero_grad()
            read.begin(
                rows_of[step], _share(rows_of[step], micro_batch_size, accelerator), accelerator
            )
            sums = []
            for rows in _micro_batches(rows_of[step], micro_batch_size, accelerator, policy.model):
                losses, seen = read(rows)
                # A sum over the batch's size, and no mean of means: passes may differ in size.
                # Processes average what they have, so each has its part times their number.
                accelerator.backward(
                    losses.sum() * (accelerator.num_processes / len(rows_of[step]))
                )
                sums.append(torch.stack([values.sum() for values in seen]))
            means = accelerator.reduce(sum(sums[1:], sums[0]), "sum") / len(rows_of[step])
            norm = accelerator.clip_grad_norm_(policy.model.parameters(), max_grad_norm)
            metrics = read.metrics(means.tolist())
            metrics |= {"grad_norm": float(norm), "lr": float(optimizer.param_groups[0]["lr"])}
            _check_finite(step, metrics)
            optimizer.step()
            _check_weights(step, policy.model, accelerator, metrics["lr"])
            if any(group["lr"] for group in optimizer.param_groups):  # else nothing moved
                score_reference.check_still()
            for name, value in metrics.items():
                history.setdefault(name, []).append(value)
            if accelerator.is_main_process:
                for log in logs:
                    log(step, metrics | found)
            # Before the checkpoint: what goes on from it is told by its history whether to stop.
            found = evaluator.at(step + 1, history)
            is_over = evaluator.is_over(history)
            last = is_over or step + 1 == len(rows_of)
            if accelerator.is_main_process:
                for log in logs if last and found else ():
                    log(step + 1, found)
                kept.save(step + 1, optimizer, history, last=last)
            if is_over:
                break
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
    else:  # what is tied was gathered once under each of its names
        names: dict[int, str] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(weight), name)
            if name in weights:
                weights[name] = weights[first]
    if accelerator.is_main_process:
        save_model(model, tokenizer, folder, weights=weights)
    accelerator.wait_for_everyone()


# --- private functions -----------------------------------------------------------------------


def _micro_batches(
    rows: Tensor, size: int, accelerator: "Accelerator | OneProcess", model: nn.Module
) -> Iterator[Tensor]:
    """The rows of a batch that this process reads, `size` at a time."""
    *others, last = _share(rows, size, accelerator)
    sharded = accelerator.distributed_type == "FSDP"
    for part in others:
        # Processes add up their gradients once, in the last pass. In shards they do it in each: a
        # gradient that waits is as large as all weights.
        with nullcontext() if sharded else accelerator.no_sync(model):
            yield part
    yield last


def _share(rows: Tensor, size: int, accelerator: "Accelerator | OneProcess") -> tuple[Tensor, ...]:
    mine = rows.chunk(accelerator.num_processes)[accelerator.process_index]
    return mine.split(size)


class _PairReader:
    """From rows to the loss of each pair, `[B]`, and each number of METRICS, without gradient."""

    names = METRICS

    def __init__(
        self,
        policy: CausalLMPolicy,
        pairs: Pairs,
        score_reference: ScoreReader,
        loss: Callable[..., Tensor],
        beta: float,
    ) -> None:
        self.policy, self.pairs, self.score_reference = policy, pairs, score_reference
        self.loss, self.beta = loss, beta

    def begin(
        self, batch: Tensor, passes: Iterable[Tensor], accelerator: "Accelerator | OneProcess"
    ) -> None:
        """Nothing: no pair needs the others."""

    def __call__(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        scores = pair_logps(self.policy, self.pairs, rows, *self.score_reference.how)
        ref_scores = [values.to(scores[0].device) for values in self.score_reference(rows)]
        losses = self.loss(*scores, *ref_scores, beta=self.beta)
        chosen, rejected = (values.detach() for values in scores)
        good, bad = (
            self.beta * (ours - theirs)
            for ours, theirs in zip((chosen, rejected), ref_scores, strict=True)
        )
        margins = (good - bad, (good > bad).to(good))
        return losses, [losses.detach(), good, bad, *margins, chosen, rejected]

    def metrics(self, means: Sequence[float]) -> dict[str, float]:
        return dict(zip(METRICS, means, strict=True))


class _RatingReader:
    """From rows to the loss of each, after `begin` has the batch's z_0, and numbers of each."""

    names = RATING_METRICS

    def __init__(
        self,
        policy: CausalLMPolicy,
        data: RatedBatches,
        score_reference: ScoreReader,
        loss: Callable[..., Tensor],
        beta: float,
    ) -> None:
        self.policy, self.data, self.score_reference = policy, data, score_reference
        self.loss, self.beta = loss, beta
        self.how = score_reference.how[:2]  # single answers have rows of their own

    def begin(
        self, batch: Tensor, passes: Iterable[Tensor], accelerator: "Accelerator | OneProcess"
    ) -> None:
        """Reads the other answers, and the reference, in all passes; rows follow one another."""
        self.first = int(batch[0])
        read = []
        for rows in passes:
            # A model in shards is read by all processes at once: one without rows reads along.
            some = rows if len(rows) else batch[:1]
            with torch.no_grad():
                other = self.data.other(self.policy, some, *self.how)
            ref_own, ref_other = (score.to(other) for score in self.score_reference(some))
            read.append(torch.stack([other, ref_other, ref_own])[:, : len(rows)])
        reshard(self.policy)
        found = torch.cat(read, 1)
        scores = found.new_zeros(3, len(batch))
        scores[:, torch.cat([*passes]) - self.first] = found
        scores = accelerator.reduce(scores, "sum")  # x + 0 is x
        self.point = kto_reference_point(scores[0], scores[1])
        self.ref_own = scores[2]

    def __call__(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        logps = self.data.own(self.policy, rows, *self.how)
        ref_logps = self.ref_own[(rows - self.first).to(logps.device)]
        liked = self.data.labels(rows).to(logps.device)
        losses = self.loss(logps, ref_logps, liked, beta=self.beta, reference_point=self.point)
        logps, is_liked = logps.detach(), liked.to(logps)
        rewards = self.beta * (logps - ref_logps)
        seen = [weight * each for each in (rewards, logps) for weight in (is_liked, 1 - is_liked)]
        return losses, [losses.detach(), is_liked, *seen]

    def metrics(self, means: Sequence[float]) -> dict[str, float]:
        loss, liked, *of_all = means
        shares = (liked, 1 - liked, liked, 1 - liked)
        good, bad, logps_good, logps_bad = (
            mean / share if share else math.nan for mean, share in zip(of_all, shares, strict=True)
        )
        values = (loss, good, bad, good - bad, logps_good, logps_bad, float(self.point))
        return dict(zip(RATING_METRICS, values, strict=True))


def _reader(
    policy: CausalLMPolicy,
    data: Data,
    score_reference: ScoreReader,
    loss: Callable[..., Tensor],
    beta: float,
) -> _PairReader | _RatingReader:
    if isinstance(data, RatedBatches):
        return _RatingReader(policy, data, score_reference, loss, beta)
    return _PairReader(policy, data, score_reference, loss, beta)


def _held_out(
    evaluation: Evaluation,
    read: _PairReader | _RatingReader,
    trained: Mapping[str, nn.Parameter],
) -> _PairReader | _RatingReader:
    """Reads held-out rows as those of training are read."""
    data = evaluation.data()
    reduce, precision, _ = read.score_reference.how
    in_one_row = reads_in_one_row(read.policy, evaluation.reference)
    score_reference = ScoreReader(
        evaluation.reference, data, reduce, precision, in_one_row, trained
    )
    return _reader(read.policy, data, score_reference, read.loss, read.beta)


def _check_finite(step: int, metrics: Mapping[str, float]) -> None:
    loss, norm = metrics["loss"], metrics["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        got = f"{loss} and a gradient of norm {norm} at step {step}"
        raise ValueError(f"`loss` must be finite, and its gradient too, got {got}")


def _check_weights(
    step: int, model: nn.Module, accelerator: "Accelerator | OneProcess", rate: float
) -> None:
    """Each process looks at what it holds, and all of them stop; one wait for the device."""
    trained = _trained(model)
    held = [getattr(weight, "to_local", weight.detach)() for weight in trained.values()]
    broken = [(~weight.isfinite()).any().float().to(held[0].device) for weight in held]
    counts = accelerator.reduce(torch.stack(broken), "sum").tolist()
    for (name, weight), count in zip(trained.items(), counts, strict=True):
        if count:
            raise ValueError(
                f"`optimizer` must leave the weights finite, got nan or inf in {name} ("
                f"{weight.dtype}) after step {step}: lower its learning rate, {rate} in that step"
            )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, each tied weight once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _check_run(
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    data: Data,
    optimizer: Optimizer,
) -> None:
    check_reference(reference, data)
    _check_shares_nothing("reference", reference, policy)
    halved = [name for name, w in policy.model.named_parameters() if w.dtype == torch.float16]
    if halved:
        raise ValueError(
            "`policy` must have weights in float32 or bfloat16 (model.float()), since small "
            f"gradients are 0 in float16, got float16 in {halved[0]}"
        )
    weights = {id(weight) for weight in policy.parameters() if weight.requires_grad}
    given = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    if given != weights:
        raise ValueError(
            f"`optimizer` must have the policy's {len(weights)} trained parameters, got "
            f"{len(given & weights)} of them and {len(given - weights)} others"
        )


def _check_shares_nothing(
    argument: str, reference: Scores | Scorer, policy: CausalLMPolicy
) -> None:
    if isinstance(reference, tuple | adapter_off):
        return
    held = {weight.untyped_storage().data_ptr() for weight in reference.parameters()}
    for name, weight in _trained(policy).items():
        if weight.untyped_storage().data_ptr() in held:
            raise ValueError(
                f"`{argument}` must be reference_logps, adapter_off(policy) or a copy "
                "(copy.deepcopy), got a model that shares weights with the policy, which "
                f"trains {name}"
            )


def _check_evaluation(
    evaluation: Evaluation,
    data: Data,
    policy: CausalLMPolicy,
    reduce: Reduce,
    precision: Precision,
    accelerator: "Accelerator | OneProcess",
) -> None:
    if not isinstance(evaluation, Evaluation):
        raise TypeError(f"`evaluation` must be an Evaluation, got a {type(evaluation).__name__}")
    held_out = evaluation.data()
    kinds = ["ratings" if type(each) is RatedBatches else "pairs" for each in (data, held_out)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"`evaluation` must have {kinds[0]} as in training, got {kinds[1]}")
    reference = evaluation.reference
    _check_shares_nothing("evaluation.reference", reference, policy)
    for name, want in {"reduce": reduce, "precision": precision}.items():
        got = getattr(reference, name, want) if isinstance(reference, tuple) else want
        if got is not want:
            raise ValueError(
                f"`evaluation.reference` must be read with {name} {function_name(want)} as in "
                f"training, got {function_name(got)}"
            )
    n_rows = len(evaluation.pairs[0])
    how = "in its order (give reference_logps no batches, and the run's accelerator)"
    check_passes(
        reference, held_out, torch.arange(n_rows)[None], accelerator.num_processes,
        "evaluation.reference", how,
    )  # fmt: skip
    if accelerator.distributed_type == "FSDP":
        if evaluation.best is not None:
            raise ValueError(
                "`evaluation.best` must be None under FSDP (weights in shards), got a folder"
            )
        _check_in_shards("evaluation.reference", reference)


def _check_in_shards(name: str, reference: Scores | Scorer) -> None:
    if not isinstance(reference, tuple):
        raise ValueError(
            f"`{name}` must be what reference_logps gave under FSDP, since a model would lie "
            f"whole on every device, got a {type(reference).__name__}"
        )


def _check_settings(
    beta: float,
    micro_batch_size: int,
    checkpoint_every: int,
    max_grad_norm: float,
) -> None:
    check_positive("beta", beta)
    check_count("micro_batch_size", micro_batch_size)
    check_count("checkpoint_every", checkpoint_every)
    if not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be a number > 0, got {max_grad_norm}")


def _check_accelerator(
    accelerator: "Accelerator | OneProcess",
    policy: CausalLMPolicy,
    reference: Scores | Scorer,
    batches: Tensor,
    precision: Precision,
    checkpoints: AnyPath | None,
) -> None:
    mixed = accelerator.mixed_precision
    check_divides(accelerator, batches)
    if mixed == "bf16" and precision is not bf16_autocast:
        raise ValueError(
            "`precision` must be bf16_autocast like the accelerator's, got "
            f"{function_name(precision)}"
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
        _check_in_shards("reference", reference)

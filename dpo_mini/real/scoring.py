"""How answers are scored: in which precision, summed how, by the policy and by its reference."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dpo_mini._arguments import check_at_most_0, check_count, check_indices
from dpo_mini._files import write_whole
from dpo_mini.logps import PAD, sum_over_tokens
from dpo_mini.policies import Scorer
from dpo_mini.policies.base import device_of
from dpo_mini.real.digests import reference_digest, tensor_digest
from dpo_mini.real.preferences import AnyPath
from dpo_mini.real.processes import OneProcess, check_divides
from dpo_mini.real.ratings import RatedBatches, Ratings, check_data, is_rated
from dpo_mini.train import Pairs

if TYPE_CHECKING:
    from accelerate import Accelerator

Scores = tuple[Tensor, Tensor]
"""Chosen and rejected, one number per pair each, nats. Of `RatedBatches` own and other answers."""
Data = Pairs | RatedBatches
"""What a loop reads by rows."""
Precision = Callable[[str], AbstractContextManager[object]]
"""From a device's type, such as `"cuda"`, to the context that a model is read in."""
Reduce = Callable[[Tensor, Tensor], Tensor]
"""From `token_logps` `[B, T]` and their mask to `[B]`: `sum_over_tokens` or `mean_over_tokens`."""


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


# --- one pass --------------------------------------------------------------------------------


def pair_logps(
    model: Scorer,
    pairs: Pairs,
    rows: Tensor,
    reduce: Reduce,
    precision: Precision,
    in_one_row: bool,
) -> Scores:
    """Chosen and rejected, `[B]` each, in one pass, where asked to both of a pair in one row."""
    device = next(iter(model.parameters())).device
    prompts, chosen, rejected = (tokens[rows].to(device) for tokens in pairs)
    # One context per pass: autocast keeps its half-precision weights until the context ends, and
    # those that it made for a pass without gradient would take none from the policy's.
    with precision(device.type):
        if in_one_row:
            both: Any = model
            scored = torch.cat(both.pair_token_logps(prompts, chosen, rejected))
        else:
            scored = model.token_logps(prompts.repeat(2, 1), torch.cat([chosen, rejected]))
    answers = torch.cat([chosen, rejected])
    chosen_scores, rejected_scores = reduce(scored, answers != PAD).chunk(2)
    return chosen_scores, rejected_scores


def read_logps(
    model: Scorer,
    data: Data,
    rows: Tensor,
    reduce: Reduce,
    precision: Precision,
    in_one_row: bool,
) -> Scores:
    """`pair_logps`; of `RatedBatches` the own answers in one pass and the others in another."""
    if isinstance(data, RatedBatches):
        own, other = (read(model, rows, reduce, precision) for read in (data.own, data.other))
        return own, other
    return pair_logps(model, data, rows, reduce, precision, in_one_row)


def count_rows(data: Data) -> int:
    """How many rows there are to read."""
    return len(data) if isinstance(data, RatedBatches) else len(data[0])


def longest_answer(data: Data) -> int:
    """The most tokens of an answer, T."""
    return (data.ratings if isinstance(data, RatedBatches) else data)[1].shape[1]


def can_read_pairs(model: Scorer) -> bool:
    """Whether a scorer offers both answers at once, and nobody changed how it reads one alone."""
    owners = [
        next((part for part in type(model).__mro__ if name in vars(part)), None)
        for name in ("token_logps", "pair_token_logps")
    ]
    return owners[1] is not None and owners[0] is owners[1] and "token_logps" not in vars(model)


def reads_in_one_row(policy: Scorer, reference: Scores | Scorer) -> bool:
    """Whether both answers of a pair are read in one row, the same for policy and reference."""
    if isinstance(reference, ReferenceLogps):
        return reference.in_one_row and can_read_pairs(policy)
    return can_read_pairs(policy) and (isinstance(reference, tuple) or can_read_pairs(reference))


def passes_of(batches: Tensor, micro_batch_size: int, n_processes: int) -> Tensor:
    """The rows of every pass in the order of training, `[passes, processes, M]`, -1 where none.

    A batch is dealt out to the processes, and each takes its share `micro_batch_size` at a time.
    """
    steps, size = batches.shape
    share = -(-size // n_processes)
    m = min(micro_batch_size, share)
    dealt = nn.functional.pad(batches, (0, n_processes * share - size), value=-1)
    cut = nn.functional.pad(dealt.view(steps, n_processes, share), (0, -share % m), value=-1)
    return cut.view(steps, n_processes, -1, m).transpose(1, 2).reshape(-1, n_processes, m)


def first_passes(passes: Tensor, n_rows: int) -> Tensor:
    """For each row the first of all `passes * processes` that reads it, their number where none."""
    n_passes, n_processes, m = passes.shape
    index = torch.arange(n_passes * n_processes).repeat_interleave(m)
    rows = passes.flatten()
    first = torch.full((n_rows,), n_passes * n_processes)
    return first.scatter_reduce(0, rows[rows >= 0], index[rows >= 0], "amin")


def companions(passes: Tensor, data: Data) -> Tensor:
    """The rows of the pass that reads a row first, `[n, M]`, -1 where there are fewer or none.

    Of `RatedBatches` `[n, 2 * M]`: the rows of the ratings whose prompts and own answers are read,
    and those whose answers are the other ones.
    """
    none = passes.new_full((1, passes.shape[2]), -1)
    rows = torch.cat([passes.flatten(0, 1), none])[first_passes(passes, count_rows(data))]
    if isinstance(data, RatedBatches):
        named = [torch.cat([each, none[0, :1]])[rows] for each in data.rows]
        return torch.cat(named, 1)
    return rows


# --- the reference before training -----------------------------------------------------------


class ReferenceLogps(tuple[Tensor, Tensor]):
    """What `reference_logps` gives: chosen and rejected, and how they were read."""

    reduce: Reduce
    precision: Precision
    micro_batch_size: int
    companions: Tensor
    in_one_row: bool
    digest: str


def reference_logps(
    reference: Scorer,
    pairs: Pairs | Ratings,
    *,
    batches: Tensor | None = None,
    micro_batch_size: int = 1,
    reduce: Reduce = sum_over_tokens,
    precision: Precision = full_precision,
    accelerator: "Accelerator | OneProcess | None" = None,
    cache: AnyPath | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> ReferenceLogps:
    """Score the pairs once, before training: then the reference need not be in memory.

    A pass rounds by the pairs in it: each is padded to the longest, and sums run in another order.
    So the pairs are read in the passes of training. Then a policy that begins as its reference
    begins at margins of 0 and a loss of log 2, to the last bit, also in bfloat16. A pair that is
    met again, in a later epoch, has other pairs beside it, and its log-ratio is off by the rounding
    of one pass against another. Measured on a small GPT-2 in bfloat16: one pair in twelve, by up to
    0.04 nats, with a mean of 0; in float32 below 1e-5. Passes of one pair have no such noise.

    Ratings are read each time that they are in a batch, in a pass of their own answers and in one
    of the others: at every step both are read as the policy reads them.

    Args:
      reference: a model before it is trained, a copy, or `adapter_off(policy)`.
      pairs: as `encode` gives them; or ratings, as it gives them.
      reduce, precision: as in `train_preferences`, which then takes both from the result.
      batches: `[steps, B]`, those of `train_preferences`: a pair is read in the pass in which
        training first meets it, and one that never occurs is not read. By default all pairs, in
        their order, which are the passes of training where `micro_batch_size` is 1. Training on
        ratings needs them; all ratings as one batch are those of an `Evaluation`.
      micro_batch_size: pairs per pass, in each process; `train_preferences` takes it too.
      accelerator: as in `train_preferences`: every process makes this call and reads its share.
      cache: a safetensors file that keeps the result. It is read instead of the model where pairs,
        weights, configuration, passes, `reduce` and `precision` are those that it was made of, to
        the last bit, and written anew where they are not. Of a scorer of your own that is no
        `nn.Module`, only the class and the `parameters()` are compared.
      progress: wraps the range of passes, as in `train.fit_sft`.
    Returns:
      Chosen and rejected, `[n]` each, nats, on the CPU and without gradient, NaN where a pair was
      not read: a tuple that knows how its numbers were read. Of ratings each prompt's own answer
      and the one that stands before it in the batch, `[steps * B]` each.
    Raises:
      ValueError: no pairs, rows that differ in number, `micro_batch_size < 1`, `batches` out of
        range or, of ratings, with one prompt alone, log-probabilities above 0, or a `cache` that is
        another file.
    """
    check_data(pairs)
    check_count("micro_batch_size", micro_batch_size)
    n_rows, accelerator = len(pairs[0]), accelerator or OneProcess()
    if batches is None:
        batches = torch.arange(n_rows)[None]
    else:
        check_indices("batches", batches, "[steps, B]", n_rows)
        check_divides(accelerator, batches)
    data = RatedBatches(pairs, batches) if is_rated(pairs) else pairs
    if isinstance(data, RatedBatches):
        batches = data.steps
    passes = passes_of(batches.cpu(), micro_batch_size, accelerator.num_processes)
    beside = companions(passes, data)
    cached = (
        None
        if cache is None
        else _Cache(Path(cache), _key(reference, (*pairs, beside), reduce, precision, accelerator))
    )
    scores = None if cached is None else cached.read(reference, accelerator)
    if scores is None:
        scores = _score(reference, data, passes, reduce, precision, accelerator, progress)
        if cached is not None and accelerator.is_main_process:
            cached.write(scores)
    logps = ReferenceLogps(scores)
    logps.reduce, logps.precision = reduce, precision
    logps.micro_batch_size, logps.companions = micro_batch_size, beside
    logps.in_one_row = can_read_pairs(reference)
    logps.digest = reference_digest(reference)  # for checkpoints: the model may be gone by then
    return logps


def how_to_read(
    reference: Scores | Scorer,
    reduce: Reduce | None,
    precision: Precision | None,
    micro_batch_size: int | None,
) -> tuple[Reduce, Precision, int]:
    """What the caller said, or else what `reference_logps` was told, which must not differ."""
    if not isinstance(reference, ReferenceLogps):
        size = 1 if micro_batch_size is None else micro_batch_size
        return reduce or sum_over_tokens, precision or full_precision, size
    given = {"reduce": reduce, "precision": precision, "micro_batch_size": micro_batch_size}
    for name, got in given.items():
        want = getattr(reference, name)
        if got not in (None, want):
            raise ValueError(
                f"`{name}` must be {function_name(want)} like that of reference_logps, or be left "
                f"out, got {function_name(got)}"
            )
    return reference.reduce, reference.precision, reference.micro_batch_size


def check_passes(
    reference: Scores | Scorer,
    data: Data,
    batches: Tensor,
    n_processes: int,
    name: str = "reference",
    how: str = "in the passes of training (give reference_logps the same batches, "
    "micro_batch_size and accelerator)",
) -> None:
    """Refuse what `reference_logps` read in other passes than those in which it is used."""
    if not isinstance(reference, ReferenceLogps):
        return
    here = companions(passes_of(batches.cpu(), reference.micro_batch_size, n_processes), data)
    there, width = reference.companions, max(here.shape[1], reference.companions.shape[1])
    here, there = (
        nn.functional.pad(rows, (0, width - rows.shape[1]), value=-1) for rows in (here, there)
    )
    differs = (here != there).any(1) & (here >= 0).any(1)
    if differs.any():
        row = int(differs.nonzero()[0])
        what = "other pairs beside it" if (there[row] >= 0).any() else "none, since it was not read"
        raise ValueError(f"`{name}` must be read {how}, got row {row} with {what}")


def function_name(function: object) -> str:
    """What an error calls a function."""
    return getattr(function, "__name__", repr(function))


def _score(
    reference: Scorer,
    data: Data,
    passes: Tensor,
    reduce: Reduce,
    precision: Precision,
    accelerator: "Accelerator | OneProcess",
    progress: Callable[[range], Iterable[int]],
) -> Scores:
    """Every process reads its column of the passes in which a row is read first."""
    n_rows, (n_passes, n_processes, _) = count_rows(data), passes.shape
    first = first_passes(passes, n_rows)
    occurs = first < n_passes * n_processes
    needed = (first[occurs] // n_processes).unique().tolist()
    read = ScoreReader(reference, data, reduce, precision, can_read_pairs(reference))
    blocks, firsts = [], []
    for n in progress(range(len(needed))):
        rows = passes[needed[n], accelerator.process_index]
        rows = rows[rows >= 0]
        # A model in shards is read by all processes at once, so one without rows reads along.
        block = torch.stack(read(rows if len(rows) else torch.tensor([0])))
        mine = first[rows] == needed[n] * n_processes + accelerator.process_index
        blocks.append(block[:, : len(rows)][:, mine.to(block.device)])
        firsts.append(rows[mine])
    reshard(reference)
    found = torch.cat(blocks, 1)
    scores = found.new_zeros(2, n_rows)
    scores[:, torch.cat(firsts).to(found.device)] = found
    scores = accelerator.reduce(scores, "sum").cpu()  # x + 0 is x
    scores[:, ~occurs] = torch.nan
    return scores[0], scores[1]


def reshard(reference: Scorer) -> None:
    """Deals out again what the last pass gathered of a model in shards, as a backward pass does."""
    parts: Iterable[Any] = reference.modules() if isinstance(reference, nn.Module) else ()
    for part in parts:
        if hasattr(part, "reshard"):
            part.reshard()


# --- scores on disk --------------------------------------------------------------------------


class _Cache:
    """A file of scores, and the key of what they were made of."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def read(self, reference: Scorer, accelerator: "Accelerator | OneProcess") -> Scores | None:
        """The scores, where all processes find those of this key."""
        scores = self._found()
        found = torch.tensor([float(scores is not None)], device=device_of(reference))
        agreed = accelerator.reduce(found, "sum").item() == accelerator.num_processes
        return scores if agreed else None

    def _found(self) -> Scores | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                key = (file.metadata() or {}).get("reference_logps")
                if key == self.key:
                    return file.get_tensor("chosen"), file.get_tensor("rejected")
        except (SafetensorError, OSError):
            key = None
        if key is None:
            raise ValueError(
                "`cache` must be a new file or one that reference_logps wrote, got "
                f"{self.path}, which is neither (remove it, or name another)"
            )
        return None

    def write(self, scores: Scores) -> None:
        """In the place of what is there."""
        named = dict(zip(("chosen", "rejected"), scores, strict=True))
        tensors = {name: values.contiguous() for name, values in named.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, save(tensors, metadata={"reference_logps": self.key}))


def _key(
    reference: Scorer,
    tensors: Iterable[Tensor],
    reduce: Reduce,
    precision: Precision,
    accelerator: "Accelerator | OneProcess",
) -> str:
    """Of all that decides a score: pairs, passes, weights, and what is done with them."""
    device = device_of(reference)
    weights = bytes.fromhex(tensor_digest(("", weight) for weight in reference.parameters()))
    if accelerator.num_processes > 1:  # each may hold another part of the weights
        all_digests = torch.zeros(accelerator.num_processes, len(weights), device=device)
        all_digests[accelerator.process_index] = torch.tensor([*weights], device=device).float()
        parts = accelerator.reduce(all_digests, "sum").int().tolist()
        weights = b"".join(sorted({bytes(part) for part in parts}))
    how = [f"{f.__module__}.{function_name(f)}" for f in (reduce, precision)]
    how += ["one row" if can_read_pairs(reference) else "rows"]
    how += [torch.__version__, str(device and device.type), type(reference).__qualname__]
    how += _configurations(reference)
    digest = hashlib.sha256(weights)
    digest.update(tensor_digest(("", tensor) for tensor in tensors).encode())
    digest.update("\n".join(how).encode())
    return digest.hexdigest()


def _configurations(reference: object) -> list[str]:
    """What changes a model's scores and is no weight, such as the scale of an adapter."""
    model = getattr(reference, "model", reference)
    parts = model.modules() if isinstance(model, nn.Module) else ()
    names = ("config", "scaling", "active_adapters", "disable_adapters")
    found = ((type(p), getattr(p, name)) for p in parts for name in names if hasattr(p, name))
    return sorted({f"{kind.__name__} {value}" for kind, value in found})


# --- the reference during training -----------------------------------------------------------


class ScoreReader:
    """From rows to the reference's chosen and rejected: looked up, or read without gradient.

    A reference that moves with the policy is refused: at the first pass where a weight of `trained`
    enters its scores, and after a step, by `check_still`, where the scores of that pass changed.
    """

    def __init__(  # noqa: D107
        self,
        reference: Scores | Scorer,
        data: Data,
        reduce: Reduce,
        precision: Precision,
        in_one_row: bool,
        trained: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.reference, self.data = reference, data
        self.how = reduce, precision, in_one_row
        self.trained = trained
        self.first: tuple[Tensor, Tensor] | None = None  # rows and their scores

    def __call__(self, rows: Tensor) -> Scores:  # noqa: D102
        if isinstance(self.reference, tuple):
            return self.reference[0][rows], self.reference[1][rows]
        if self.trained:
            scores = self._read_first(self.reference, rows, self.trained)
            self.trained, self.first = None, (rows, torch.cat(scores))
        else:
            scores = self._read(self.reference, rows)
        n_tokens = longest_answer(self.data)
        check_at_most_0("reference.token_logps", torch.cat(scores), n_tokens=n_tokens)
        return scores

    def check_still(self) -> None:
        """After a step: does the reference say of its first rows what it said before?"""
        if isinstance(self.reference, tuple) or self.first is None:
            return
        rows, before = self.first
        after = torch.cat(self._read(self.reference, rows))
        if not torch.equal(after, before):
            moved = (after - before).abs().max().item()
            raise ValueError(
                "`reference` must stay as it is while the policy is trained (reference_logps, "
                "adapter_off(policy), or a copy in evaluation mode), got one whose "
                f"log-probabilities moved by {moved:.4g} nats in a step"
            )
        self.first = None

    def _read(self, reference: Scorer, rows: Tensor) -> Scores:
        with torch.no_grad():
            return read_logps(reference, self.data, rows, *self.how)

    def _read_first(
        self, reference: Scorer, rows: Tensor, trained: Mapping[str, nn.Parameter]
    ) -> Scores:
        with torch.enable_grad(), _frozen(reference, [*trained.values()]):
            chosen, rejected = read_logps(reference, self.data, rows, *self.how)
        if chosen.requires_grad:
            total = chosen.sum() + rejected.sum()
            slopes = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
            read = [n for n, slope in zip(trained, slopes, strict=True) if slope is not None]
            if read:
                raise ValueError(
                    "`reference` must read no weight that is trained (score it before training, by "
                    "reference_logps, or train the adapter alone, or take a copy), got one that "
                    f"reads {read[0]}"
                )
        return chosen.detach(), rejected.detach()


@contextmanager
def _frozen(reference: Scorer, but: list[nn.Parameter]) -> Iterator[None]:
    """Its weights take no gradient, `but` some: a copy then keeps nothing for a backward pass."""
    kept = {id(weight) for weight in but}
    others = [w for w in reference.parameters() if w.requires_grad and id(w) not in kept]
    try:
        for weight in others:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in others:
            weight.requires_grad_(True)

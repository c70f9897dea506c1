"""What the curves of a run say: each symptom with its numbers, and the question that explains it.

A run without a symptom is no proof of health: what a policy writes stands in no curve.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from statistics import fmean, median

from dpo_mini.real.preferences import AnyPath

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""From the name of a number to its `(step, value)`, in the order of the steps."""

CHAPTER = "notebooks/17_answer_the_questions_people_ask.ipynb"
"""Where the questions are answered."""
QUESTIONS = {
    1: "Why do the log-probs of chosen answers go down?",
    2: "My loss is stuck at 0.693",
    5: "The first loss is six times log 2",
    6: "Why are the rewards not 0 at step 0?",
    7: "SFT with an adapter, then DPO with an adapter, and a loss of 0",
    9: "My KL came out negative",
    10: "Accuracy 1.0, and the model is no better",
    16: "KTO with batch size 1, or an odd one",
    22: "The loss, or the rewards, are NaN",
    25: "My own script gives rewards near -1000",
    28: "GRPO: reward_std is 0, and so is the gradient",
    30: "The KL, or the ratio, explodes",
}
"""Those of chapter 17 whose symptom stands in a log."""

LOG_2 = math.log(2)
FEWEST = 20
"""Steps below which a loss that has not moved is no symptom."""


@dataclass(frozen=True)
class Finding:
    """One symptom.

    Args:
      symptom: what is wrong, with the numbers that say so.
      question: of chapter 17, which explains it.
    """

    symptom: str
    question: int

    def __str__(self) -> str:  # noqa: D105
        title = QUESTIONS[self.question]
        return f"{self.symptom}\n  question {self.question} of chapter 17: {title}\n  {_address()}"


def diagnose(path: AnyPath) -> list[Finding]:
    """The symptoms in the log of a run, the one to look at first in front.

    A symptom that explains others leaves them out: after a loss that is NaN no curve means
    anything, and a reference that is not the policy at step 0 spoils all rewards.

    Args:
      path: a CSV file with a column `step` (`csv_log`), a `trainer_state.json` of `trl`, or a
        folder with `metrics.csv` or `trainer_state.json` in it.
    Returns:
      Findings; none where nothing looks wrong.
    Raises:
      OSError: the file cannot be read.
      ValueError: it is neither, or has no step.
    """
    curves = read_curves(path)
    for rules in (_BROKEN, _FIRST_STEP, _WHOLE_RUN):
        found = [finding for rule in rules for finding in rule(curves)]
        if found:
            return found
    return []


def is_short(path: AnyPath) -> bool:
    """Whether a log has so few steps that a loss which has not moved is no symptom."""
    steps = [step for values in read_curves(path).values() for step, _ in values]
    return max(steps) - min(steps) + 1 < FEWEST


def read_curves(path: AnyPath) -> Curves:
    """The numbers of a log by name, under the names of `trl`; args and errors are `diagnose`'s."""
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in ("metrics.csv", "trainer_state.json")]
        path = next((log for log in inside if log.exists()), inside[0])
    text = path.read_text(encoding="utf-8")
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                curves.setdefault(name, []).append((int(row["step"]), value))
    if not curves:
        raise ValueError(f"`path` must be the log of at least one step, got none in {path}")
    return curves


# --- the symptoms ----------------------------------------------------------------------------
# Each rule looks at the curves that it needs, and says nothing where they are not there.


def _not_a_number(curves: Curves) -> Iterator[Finding]:
    for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"):
        for step, value in curves.get(name, ()):
            if not math.isfinite(value):
                yield Finding(f"{name} is {value} at step {step}.", 22)
                return


def _multiple_of_log_2(curves: Curves) -> Iterator[Finding]:
    loss, margin = _first(curves, "loss"), _first(curves, "rewards/margins")
    if loss is None or margin is None or abs(margin) > 1e-3:
        return
    times = round(loss / LOG_2)
    if times >= 2 and abs(loss / LOG_2 - times) < 0.01:
        yield Finding(
            f"The first loss is {loss:.4f} = {times} times log 2, while the margin is {margin:.4f}:"
            " something is added up where a mean is meant.",
            5,
        )


def _rewards_at_the_start(curves: Curves) -> Iterator[Finding]:
    chosen, rejected = _first(curves, "rewards/chosen"), _first(curves, "rewards/rejected")
    if chosen is None or rejected is None or max(abs(chosen), abs(rejected)) < 1e-4:
        return
    seen = f"Before the first step the rewards are {chosen:.4f} (chosen) and {rejected:.4f}"
    if max(chosen, rejected) < -1:
        yield Finding(f"{seen}, both far below 0, as if no reference were subtracted.", 25)
    elif max(abs(chosen), abs(rejected)) > 0.5:
        yield Finding(f"{seen}: the reference is not the model that training begins with.", 7)
    else:
        yield Finding(f"{seen}, and not 0: policy and reference are read in two ways.", 6)


def _stuck(curves: Curves) -> Iterator[Finding]:
    losses, margins = curves.get("loss", ()), curves.get("rewards/margins", ())
    if not losses or not margins or losses[-1][0] - losses[0][0] + 1 < FEWEST:
        return
    loss, margin = _late(losses), _late(margins)
    if abs(loss - LOG_2) > 2e-3 or abs(margin) > 5e-3:
        return
    norms = [value for _, value in curves.get("grad_norm", ())]
    rates = [value for _, value in (*curves.get("lr", ()), *curves.get("learning_rate", ()))]
    if norms and max(norms) < 1e-6:
        why = f"no gradient arrives (the largest norm is {max(norms):.1e})"
    elif rates:
        why = f"the largest learning rate is {max(rates):.1e}"
    else:
        why = f"the largest gradient norm is {max(norms, default=math.nan):.1e}"
    yield Finding(
        f"After {losses[-1][0] - losses[0][0] + 1} steps the loss is still {loss:.4f} and the "
        f"margin {margin:.4f}; {why}.",
        2,
    )


def _never_better(curves: Curves) -> Iterator[Finding]:
    held_out = curves.get("eval_loss", ())
    if len(held_out) < 3 or held_out[0][0] != 0:
        return
    first, *others = (loss for _, loss in held_out)
    if min(others) < first or others[-1] < first + 0.002:
        return
    rates = [value for _, value in (*curves.get("lr", ()), *curves.get("learning_rate", ()))]
    why = f"; the largest learning rate is {max(rates):.1e}" if rates else ""
    yield Finding(
        f"The loss of held-out pairs was {first:.4f} before training, never lower since, and is "
        f"{others[-1]:.4f} at step {held_out[-1][0]}{why}: the steps may be too long.",
        2,
    )


def _both_fall(curves: Curves) -> Iterator[Finding]:
    chosen, margins = curves.get("rewards/chosen", ()), curves.get("rewards/margins", ())
    if chosen and margins and _late(chosen) < -max(1.0, _late(margins) / 2):
        yield Finding(
            f"The rewards of chosen answers have fallen to {_late(chosen):.4f}, for a margin of "
            f"{_late(margins):.4f}: both answers of a pair become much less likely. That may be "
            "right: see whether new answers get better.",
            1,
        )


def _huge_rewards(curves: Curves) -> Iterator[Finding]:
    for name in ("rewards/chosen", "rewards/rejected"):
        for step, value in curves.get(name, ()):
            if abs(value) > 100:
                yield Finding(f"{name} is {value:.1f} at step {step}.", 25)
                return


def _learnt_by_heart(curves: Curves) -> Iterator[Finding]:
    losses, accuracies = curves.get("loss", ()), curves.get("rewards/accuracies", ())
    held_out = curves.get("eval_loss", ())
    if held_out:
        (best_step, best), (last_step, last) = min(held_out, key=lambda at: at[1]), held_out[-1]
        if last > best + max(0.02, 0.05 * best):
            yield Finding(
                f"The loss of held-out pairs was lowest at step {best_step} ({best:.4f}), and is "
                f"{last:.4f} at step {last_step}: since then the pairs are learnt by heart.",
                10,
            )
            return
    if losses and accuracies and _late(accuracies) > 0.99 and _late(losses) < 0.1:
        yield Finding(
            f"The accuracy of the training pairs is {_late(accuracies):.4f} and their loss "
            f"{_late(losses):.4f}: they have nothing left to say.",
            10,
        )


def _no_other_prompt(curves: Curves) -> Iterator[Finding]:
    kls, losses = curves.get("kl", ()), curves.get("loss", ())
    if "rewards/chosen" in curves and len(kls) >= 2 and all(value == 0 for _, value in kls):
        yield Finding(
            f"kl is exactly 0 in all {len(kls)} lines, and the loss {_late(losses):.4f}: KTO has no"
            " other prompt to compare with.",
            16,
        )


def _negative_kl(curves: Curves) -> Iterator[Finding]:
    for name in ("objective/kl", "kl"):
        values = curves.get(name, ())
        if len(values) >= 4 and (_late(values) < -1e-3):
            yield Finding(f"{name} stays below 0: {_late(values):.4f} in the last quarter.", 9)


def _exploded(curves: Curves) -> Iterator[Finding]:
    for name in ("objective/kl", "kl"):
        values = [value for _, value in curves.get(name, ())]
        if len(values) >= 4 and max(values) > max(10.0, 100 * abs(median(values))):
            yield Finding(
                f"{name} jumps to {max(values):.1f}; half of the time it is below "
                f"{median(values):.4f}.",
                30,
            )


def _silent_groups(curves: Curves) -> Iterator[Finding]:
    shares, spreads = curves.get("frac_reward_zero_std", ()), curves.get("reward_std", ())
    if shares and _late(shares) > 0.8:
        yield Finding(f"In {_late(shares):.0%} of the groups all answers have one reward.", 28)
    elif not shares and spreads and _late(spreads) == 0:
        yield Finding("reward_std is 0: in each group all answers have one reward.", 28)


Rule = Callable[[Curves], Iterator[Finding]]
_BROKEN: tuple[Rule, ...] = (_not_a_number,)
_FIRST_STEP: tuple[Rule, ...] = (_multiple_of_log_2, _rewards_at_the_start)
_WHOLE_RUN: tuple[Rule, ...] = (
    _stuck,
    _never_better,
    _huge_rewards,
    _both_fall,
    _learnt_by_heart,
    _no_other_prompt,
    _negative_kl,
    _exploded,
    _silent_groups,
)


# --- private functions -----------------------------------------------------------------------


def _address() -> str:
    """The chapter's, in the project that this was installed from."""
    with suppress(PackageNotFoundError):
        for url in metadata("dpo_mini").get_all("Project-URL") or []:
            name, _, address = url.partition(", ")
            if name == "Repository":
                return f"{address}/blob/main/{CHAPTER}"
    return CHAPTER


def _first(curves: Curves, name: str) -> float | None:
    """The value of the first step alone: `trl` counts from 1, and logs means of several steps."""
    values = curves.get(name, ())
    return values[0][1] if values and values[0][0] <= 1 else None


def _late(values: Sequence[tuple[int, float]]) -> float:
    """The mean of the last quarter."""
    return fmean(value for _, value in values[-max(1, len(values) // 4) :])


def _csv_rows(path: Path, text: str) -> Iterator[dict[str, float]]:
    whole = text[: text.rfind("\n") + 1]  # the last line of a run that goes on may be half there
    reader = csv.DictReader(whole.splitlines())
    if "step" not in (reader.fieldnames or ()):
        raise ValueError(
            "`path` must be a CSV file with a column `step` or a trainer_state.json, got columns "
            f"{', '.join(map(repr, reader.fieldnames or ())) or 'none'} in {path}"
        )
    for n, row in enumerate(reader, 2):
        try:
            step = {"step": float(int(row["step"]))}
            yield {name: float(value) for name, value in row.items() if value != ""} | step
        except (TypeError, ValueError):
            raise ValueError(
                f"`path` must have one number in each column, got another line {n} in {path}"
            ) from None


def _json_rows(path: Path, text: str) -> Iterator[dict[str, float]]:
    try:
        history = json.loads(text)["log_history"]
        rows = [{k: v for k, v in row.items() if isinstance(v, int | float)} for row in history]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(
            f"`path` must be a trainer_state.json with a list `log_history`, got another {path}"
        ) from None
    for row in rows:
        if isinstance(row.get("step"), int):
            yield {name: float(value) for name, value in row.items()}

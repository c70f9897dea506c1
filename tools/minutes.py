"""How long a chapter takes: to read, by a formula; to run, by a clock that no busy machine bends.

Reading: 200 words a minute, the rate at which people read to learn (Carver 1990, *Reading Rate*);
by our own guess 4 seconds for a line of code and half a minute for a figure or a displayed
equation. Exercises say their minutes themselves.

Running: the processor time of the kernel, and not the time on the wall, which grows when something
else runs beside it. It is given in seconds of a machine on which `calibrate` takes
`REFERENCE_SECONDS`, so that a faster or slower machine measures the same.
"""

import re
from math import log
from time import process_time

WORDS_A_MINUTE = 200
MINUTES_A_LINE = 4 / 60
MINUTES_A_PICTURE = 0.5
REFERENCE_SECONDS = 0.6
SECONDS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 420, 600)
EXERCISE = re.compile(r"^\*\*\d+\.\d+\*\* \((\d+) minutes", re.M)


def sources(notebook: dict, kind: str) -> str:
    return "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind)


def reading_minutes(notebook: dict) -> float:
    """Minutes to read a chapter, by the formula above."""
    prose = sources(notebook, "markdown")
    equations = len(re.findall(r"\$\$.+?\$\$", prose, re.S))
    prose = re.sub(r"\$\$.+?\$\$", " ", prose, flags=re.S)
    prose = re.sub(r"\$[^$\n]+\$", " symbol ", prose)  # an inline formula reads as one word
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    words = len(re.findall(r"\w[\w'’-]*", prose))
    lines = sum(bool(line.strip()) for line in sources(notebook, "code").splitlines())
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", ())]
    figures = sum("image/png" in out.get("data", {}) for out in outputs)
    pictures = figures + equations
    return words / WORDS_A_MINUTE + lines * MINUTES_A_LINE + pictures * MINUTES_A_PICTURE


def exercise_minutes(notebook: dict) -> int:
    """The sum of what the exercises say of themselves."""
    return sum(map(int, EXERCISE.findall(sources(notebook, "markdown"))))


def calibrate() -> float:
    """Processor seconds of a fixed piece of work of the chapters' kind: autograd, float64."""
    import torch

    torch.set_num_threads(1)
    features = torch.linspace(-1, 1, 256 * 64, dtype=torch.float64).view(256, 64)
    weights = torch.zeros(64, 64, dtype=torch.float64, requires_grad=True)
    start = process_time()
    for _ in range(3000):
        loss = (features @ weights).logsumexp(-1).mean()
        (slope,) = torch.autograd.grad(loss, weights)
        weights = (weights - 0.1 * slope).detach().requires_grad_()
    return process_time() - start


def nearest(seconds: float) -> int:
    """The round number of `SECONDS` closest to a measured time, as a ratio."""
    return min(SECONDS, key=lambda round_number: abs(log(round_number / seconds)))


def within(factor: float, one: float, other: float) -> bool:
    return 1 / factor <= one / other <= factor

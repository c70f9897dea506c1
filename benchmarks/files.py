"""How fast `real` reads files of pairs and makes tokens of them, and how much memory it takes.

Run `python benchmarks/files.py` where the package is installed; it prints the tables of RESULTS.md.
`--size` is the megabytes of each file. Reading is compared with `json.loads` alone on the same
bytes, in turn; times are seconds of processor time, a peak is that of a process of its own. The
tokenizer's own calls on the same texts are the floor of `encode`.
"""

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from dpo_mini import real
from dpo_mini.logps import PAD

ROUNDS, PAIRS = 3, 10_000
WORDS = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=200, help="megabytes of a file (default: 200)")
    parser.add_argument("--rows", type=int, default=PAIRS, help="pairs to encode (default: 10,000)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # read a file and say the peak
    options = parser.parse_args()
    if options.peak:
        before = resident("VmRSS")
        real.load_preferences(options.peak)
        print(resident("VmHWM") - before)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("| file | `json.loads`, s | `load_preferences`, s | ratio | peak / file |")
        print("|---|---|---|---|---|")
        for form in ("text", "messages"):
            for suffix in (".json", ".jsonl"):
                path = Path(folder) / f"{form}{suffix}"
                write_pairs(path, options.size * 10**6, form)
                report_reading(path)
                if (form, suffix) != ("text", ".jsonl"):
                    path.unlink()
        pairs = real.load_preferences(Path(folder) / "text.jsonl")[: options.rows]
    report_encoding(pairs)


def write_pairs(path: Path, size: int, form: str) -> None:
    """Rows with prompts of 200 to 600 letters and answers of 200 to 1,500."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices("etaoinshrdlucmfwyp", k=draw.randint(2, 9))) for _ in range(WORDS)
    ]
    words += ["“so”", "naïve", '"so"', "\n", "\n\n", "é"]
    n_bytes = 0
    with open(path, "w", encoding="utf-8") as file:
        before = "[\n" if path.suffix == ".json" else ""
        between = ",\n" if before else "\n"
        while n_bytes < size:
            entry: dict[str, object] = {}
            for name, least, most in [("prompt", 200, 600), *ANSWERS]:
                n_letters = draw.randint(least, most)
                text = " ".join(draw.choices(words, k=n_letters // 4))[:n_letters]
                role = "user" if name == "prompt" else "assistant"
                entry[name] = [{"role": role, "content": text}] if form == "messages" else text
            n_bytes += file.write(before + json.dumps(entry, ensure_ascii=False))
            before = between
        file.write("]\n" if path.suffix == ".json" else "\n")


ANSWERS = [("chosen", 200, 1500), ("rejected", 200, 1500)]


def report_reading(path: Path) -> None:
    data = path.read_bytes()

    def plain() -> object:
        if path.suffix == ".json":
            return json.loads(data)
        return [json.loads(line) for line in data.splitlines()]

    times = in_turn([plain, lambda: real.load_preferences(path)])
    command = [sys.executable, __file__, "--peak", str(path)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    kind = "list" if path.suffix == ".json" else "lines"
    print(f"| {path.stem}, {kind} | {row(times)} | {peak / len(data):.1f} |", flush=True)


def report_encoding(pairs: list[real.Preference]) -> None:
    texts = [text for pair in pairs[:1000] for text in (pair.prompt, pair.chosen)]
    tokenizer = real.train_tokenizer(texts, vocab_size=8000)
    backend = tokenizer.backend_tokenizer
    whole = [
        text
        for pair in pairs
        for text in (
            f"{pair.prompt}\n",
            *(f"{pair.prompt}\n{a}" for a in (pair.chosen, pair.rejected)),
        )
    ]

    def tokenise() -> None:
        for n in range(0, len(whole), 768):
            backend.encode_batch(whole[n : n + 768], add_special_tokens=False)

    times = in_turn([tokenise, lambda: real.encode(pairs, tokenizer, max_tokens=10**6)])
    print("\n| pairs | the tokenizer alone, s | `encode`, s | ratio |\n|---|---|---|---|")
    print(f"| {len(pairs):,} | {row(times)} |")
    tensors = real.encode(pairs, tokenizer, max_tokens=10**6)
    shares = ", ".join(f"{float((part == PAD).float().mean()):.0%}" for part in tensors)
    print(f"\nPadding in prompts, chosen and rejected answers: {shares}.")


def resident(name: str) -> int:
    """Bytes of memory of this process, now or at its highest; Linux knows."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def in_turn(calls: list[Callable[[], object]]) -> list[list[float]]:
    """Seconds of processor time of each call, all of them in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in tqdm(range(ROUNDS), leave=False):
        for call, taken in zip(calls, times, strict=True):
            gc.collect()
            start = time.process_time()
            result = call()
            taken.append(time.process_time() - start)
            del result
    return times


def row(times: list[list[float]]) -> str:
    ratios = sorted(ours / alone for alone, ours in zip(*times, strict=True))
    alone, ours = (sorted(taken)[len(taken) // 2] for taken in times)
    middle = ratios[len(ratios) // 2]
    return f"{alone:.2f} | {ours:.2f} | {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    main()

"""How fast a table of every completion can be made: one by one, or as a tree of prefixes.

Run `python benchmarks/enumeration.py` where the package is installed. It takes about two minutes
on one thread, needs `transformers` and `tqdm`, and prints the tables of RESULTS.md. Memory is read
from /proc, so that part needs Linux.

Every contender scores in float32 with the same weights, and each round times all of them in turn. A
contender's time is the least of its rounds, in seconds of processor time: whatever else the machine
does can only add to it. On one thread of an idle machine that is the time on the wall. What a call
frees is kept for the next one, as in `training.py`: see `keep_freed_memory`.
"""

import ctypes
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from dpo_mini import rollout
from dpo_mini.policies import Sizes, TinyTransformer
from dpo_mini.tasks import Task

SIZES = [(16, 5), (32, 4)]  # V, T: 1,048,576 completions each, none ends early
LAYERS, HEADS, WIDTH = 2, 4, 64
BATCH, BATCHES = 2048, 4  # of the 512 batches, how many a round times; the time is scaled by 128
ROUNDS = 7


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{cpu_model()}, one thread; torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}; float32, {ROUNDS} rounds\n")
    for vocab_size, max_tokens in SIZES:
        report_speed(vocab_size, max_tokens)
    for vocab_size, max_tokens in SIZES:
        report_gradient(vocab_size, max_tokens)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: it would give large blocks back, and fetch them anew.

    Whether it does depends on what else lies in memory, and costs a step up to as much again.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # in malloc.h
        for setting in (trim_threshold, mmap_threshold):
            ctypes.CDLL(None).mallopt(setting, 2**30)


def report_speed(vocab_size: int, max_tokens: int) -> None:
    task, policy = make(vocab_size, max_tokens)
    rows = sample_of_rows(task)
    scale = len(task.completions) / len(rows)
    contenders = {
        f"(a) transformers, {attention}, {activation}": over_batches(gpt2, rows)
        for attention in ("eager", "sdpa")
        for activation in ("gelu_new", "gelu_pytorch_tanh")  # one function, written twice
        for gpt2 in [gpt2_logps(policy, attention, activation)]
    }
    contenders["(b) TinyTransformer"] = over_batches(tiny_logps(policy), rows)
    contenders["(c) prefix tree"] = lambda: rollout.enumerate_logps(policy, task)[0]
    with torch.no_grad():
        check_agreement(contenders, task, rows)
        seconds = time_in_rounds({**contenders, "peak": multiply_large_matrices})
    for name in contenders:
        if not name.startswith("(c)"):
            seconds[name] *= scale
    fastest = min(
        (name for name in contenders if name.startswith("(a)")),
        key=seconds.__getitem__,
    )
    print(f"V = {vocab_size}, T = {max_tokens}: {len(task.completions):,} completions\n")
    print("| scored by | completions a second | as many times the fastest (a) |\n|---|---|---|")
    for name in contenders:
        rate = len(task.completions) / seconds[name]
        print(f"| {name} | {rate:,.0f} | {seconds[fastest] / seconds[name]:.1f} |")
    flops = tree_flops(vocab_size, max_tokens)
    peak = 2 * 2048**3 / seconds["peak"]
    share = flops / seconds["(c) prefix tree"] / peak
    print(f"\nThe tree's matrix products are {flops / 1e9:.2f} Gflop: {share:.0%} of the measured")
    print(f"peak, {peak / 1e9:.0f} Gflop/s. Extra memory of (c): ", end="")
    print(f"{extra_memory(vocab_size, max_tokens, 'table'):.0f} MB.\n")


def report_gradient(vocab_size: int, max_tokens: int) -> None:
    """One exact gradient of J: through the whole table, in blocks of it, and row by row."""
    task, policy = make(vocab_size, max_tokens)
    rows = sample_of_rows(task)
    scale = len(task.completions) / len(rows)
    gpt2 = gpt2_logps(policy, "sdpa", "gelu_pytorch_tanh")
    contenders = {
        "`enumerate_logps`": lambda: descend(tree_table(policy, task)),
        "`exact_gradient`": lambda: descend_in_blocks(policy, task),
        "TinyTransformer, each completion": lambda: [
            descend(tiny_logps(policy)(batch)) for batch in rows.split(BATCH)
        ],
        "transformers, each completion": lambda: [
            descend(gpt2(batch)) for batch in rows.split(BATCH)
        ],
    }
    seconds = time_in_rounds(contenders)
    for name in contenders:
        if name.endswith("each completion"):
            seconds[name] *= scale
    print(f"One gradient of J, V = {vocab_size}, T = {max_tokens}\n")
    print("| through | seconds | times the first | extra memory, MB |\n|---|---|---|---|")
    table, blocks = list(contenders)[:2]
    memory = {table: "gradient", blocks: "gradient in blocks"}
    for name in contenders:
        slower = seconds[name] / seconds[table]
        extra = "one batch's"
        if name in memory:
            extra = f"{extra_memory(vocab_size, max_tokens, memory[name]):.0f}"
        print(f"| {name} | {seconds[name]:.2f} | {slower:.2f} | {extra} |")
    print()


def make(vocab_size: int, max_tokens: int) -> tuple[Task, TinyTransformer]:
    n_completions = vocab_size**max_tokens
    words = tuple(map(str, range(vocab_size)))
    task = Task(("a prompt",), words, max_tokens, None, torch.zeros(1, n_completions))
    return task, make_policy(task)


def make_policy(task: Sizes) -> TinyTransformer:
    generator = torch.Generator().manual_seed(0)
    shape = {"n_layers": LAYERS, "n_heads": HEADS, "width": WIDTH}
    return TinyTransformer.for_task(task, generator=generator, **shape)


def sample_of_rows(task: Task) -> Tensor:
    """Completions `[BATCHES * BATCH, T]`, spread evenly over all of them."""
    n_completions = len(task.completions)
    return task.completions[:: n_completions // (BATCHES * BATCH)]


Scorer = Callable[[Tensor], Tensor]  # completions [B, T] to log-probabilities [B]


def tiny_logps(policy: TinyTransformer) -> Scorer:
    return lambda completions: policy.logps(completions.new_zeros(len(completions)), completions)


def make_gpt2(
    policy: TinyTransformer, attention: str, activation: str
) -> transformers.GPT2LMHeadModel:
    """The same weights in `transformers`, whose Conv1D keeps them transposed."""
    config = transformers.GPT2Config(
        vocab_size=policy.wte.num_embeddings,
        n_positions=policy.wpe.num_embeddings,
        n_embd=policy.wte.embedding_dim,
        n_layer=len(policy.blocks),
        n_head=policy.blocks[0].attn.n_heads,
        activation_function=activation,
        attn_implementation=attention,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    weights = {
        name_in_gpt2(name): weight.T if ".c_" in name and weight.dim() == 2 else weight
        for name, weight in policy.state_dict().items()
    }
    left_out = model.load_state_dict(weights, strict=False)
    assert left_out.missing_keys == ["lm_head.weight"], left_out  # tied to the embedding
    assert not left_out.unexpected_keys, left_out
    return model


def name_in_gpt2(name: str) -> str:
    name = name.replace("blocks.", "h.").replace(".c_fc.", ".mlp.c_fc.")
    if ".attn." not in name:
        name = name.replace(".c_proj.", ".mlp.c_proj.")
    return "transformer." + name


def gpt2_logps(policy: TinyTransformer, attention: str, activation: str) -> Scorer:
    model = make_gpt2(policy, attention, activation)

    def score(completions: Tensor) -> Tensor:
        prompt = torch.full_like(completions[:, :1], policy.vocab_size)
        logits = model(torch.cat([prompt, completions[:, :-1]], dim=1)).logits
        logps = logits[..., : policy.vocab_size].log_softmax(-1)
        return logps.gather(-1, completions.unsqueeze(-1)).squeeze(-1).sum(1)

    return score


def over_batches(score: Scorer, rows: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.cat([score(batch) for batch in rows.split(BATCH)])


def check_agreement(contenders: dict[str, Callable[[], Tensor]], task: Task, rows: Tensor) -> None:
    want = contenders["(c) prefix tree"]()[task.index(rows)]
    for name, run in contenders.items():
        got = run()
        if len(got) == len(want) and (got - want).abs().max() > 1e-4:
            raise SystemExit(f"{name} and the tree disagree by {(got - want).abs().max():.1e}")


def tree_table(policy: TinyTransformer, task: Task) -> Tensor:
    return rollout.enumerate_logps(policy, task)[0]


def descend(logps: Tensor) -> None:
    """Backward through J's terms of these completions: E[r] - KL, with made-up rewards."""
    rewards = torch.linspace(-1, 1, len(logps))
    (logps.exp() * (rewards - logps)).sum().backward()


def descend_in_blocks(policy: TinyTransformer, task: Task) -> None:
    """`descend` through the whole table, by `exact_gradient`."""
    rewards = torch.linspace(-1, 1, task.vocab_size**task.max_tokens)

    def objective(_: int, logps: Tensor, columns: Tensor) -> Tensor:
        return (logps.exp() * (rewards[columns] - logps)).sum()

    rollout.exact_gradient(policy, task, objective)


def multiply_large_matrices() -> None:
    matrix = torch.ones(2048, 2048)
    matrix @ matrix


def time_in_rounds(contenders: dict[str, Callable]) -> dict[str, float]:
    """Seconds of each contender, the least over the rounds; a round before the first warms up."""
    seconds = {name: [] for name in contenders}
    for number in tqdm(range(ROUNDS + 1), desc="rounds", leave=False):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            if number > 0:
                seconds[name].append(time.process_time() - start)
    return {name: min(times) for name, times in seconds.items()}


def tree_flops(vocab_size: int, max_tokens: int) -> int:
    """Two flops for each multiply-add of a matrix product, over the V^d prefixes of each length d.

    Counted for a prefix: the four linear maps of a layer (12 D^2), attention to the d tokens before
    its last one (2 D d), the output (D V). Not counted, because it is computed once a chunk: the
    first layer's keys, values and queries (3 D^2) of all but the prompt. Nor is what is no matrix
    product: a token's attention to itself, norms, softmax, GELU.
    """
    flops = 0
    for depth in range(max_tokens):
        layer = 12 * WIDTH**2 + 2 * WIDTH * depth
        shared = 3 * WIDTH**2 if depth > 0 else 0
        flops += 2 * vocab_size**depth * (LAYERS * layer - shared + WIDTH * vocab_size)
    return flops


# --- memory, in a process of its own ---------------------------------------------------------


def extra_memory(vocab_size: int, max_tokens: int, what: str) -> float:
    """MB by which the peak of a fresh process rises, the result itself not counted."""
    command = [sys.executable, __file__, json.dumps([vocab_size, max_tokens, what])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(vocab_size: int, max_tokens: int, what: str) -> float:
    torch.set_num_threads(1)
    runs = {
        "table": lambda policy, task: tree_table(policy.requires_grad_(False), task),
        "gradient": lambda policy, task: descend(tree_table(policy, task)),
        "gradient in blocks": descend_in_blocks,
    }

    def run(n_tokens: int) -> None:
        # Only the sizes of a task: its list of completions would leave room behind for the tree.
        prompts = torch.arange(1)
        sizes = {"vocab_size": vocab_size, "max_tokens": n_tokens, "end_token": None}
        task = SimpleNamespace(prompts=prompts, **sizes)
        runs[what](make_policy(task), task)

    run(2)  # loads code; its own tensors are too small to matter
    before = process_status("VmRSS")
    run(max_tokens)
    return (process_status("VmHWM") - before - 4 * vocab_size**max_tokens) / 1e6


def process_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"no {field} here: memory is measured on Linux")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure_memory(*json.loads(sys.argv[1])))
    else:
        main()

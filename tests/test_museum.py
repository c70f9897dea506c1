"""The museum of bugs: every bug is caught by its theorem, every repair passes, and nothing else."""

import ast
import inspect
import runpy
from pathlib import Path

import nbformat
import pytest
import torch

from dpo_mini.checks import exercises, museum

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "notebooks" / "14_repair_the_museum_of_bugs.ipynb"
SOLUTIONS = ROOT / "notebooks" / "solutions" / "14_repair_the_museum_of_bugs.py"
REPAIRS = runpy.run_path(str(SOLUTIONS))["REPAIRS"]
NAMES = [shown.name for shown in museum.EXHIBITS]
# Words of the sentence that the bug on show must get.
FAULTS = {
    "end token masked": "15 completions sum to 1.3144",
    "padding counted": "in a batch with longer ones",
    "boundary off by one": "9 completions sum to 3.0000",
    "mean for sum": "your implied rewards of the two are",
    "beta missing from logged rewards": "at beta = 0.1 a pair has loss 1.4633",
    "reference with dropout": "two reads of one frozen model differ",
    "half-precision reference": "200 tokens is -0.0142 nats, not 0",
    "k1 with the sign inverted": "is -1.1204; KL(pi || pi_ref) is 1.1204",
    "kl_div without log_target": "the KL is not a number",
    "reward one slot late": "are paid -1.9560 in all; its score minus its KL is 0.0440",
    "mean of means": "a token of the shortest row weighs",
    "smoothing ignored": "labels flipped with probability 0.1",
    "an assertion that cannot fail": "sign is reversed pass",
    "log of a sigmoid": "log-odds of 800 are wanted",
    "packed answers see each other": "-7.5284 alone and -7.8461 in a row that it shares",
    "two begin tokens": "has 2 begin tokens",
    "an adapter on an adapter": "18.8966 nats. At beta = 0.1 this is a margin of 1.8897",
    "an empty answer": "of 2 tokens behind a prompt of 6 keeps 0",
    "logits in half precision": "half precision ends at 65504",
    "one prompt, cut twice": "beta log Z leaves 0.0620 in the margin",
    "log of one minus p": "at log p = -1e-18 your log-odds are inf",
    "a sampler that left tokens out": "is 0.8726, not 1",
    "rounded in another order": "the ratio is 1.2840, not 1",
    "recomputed without its mask": "has norm 0.0000",
    "a test at step 0": "sign is reversed pass",
}
EXAMINERS = {"an assertion that cannot fail", "a test at step 0"}


def functions_of_the_chapter() -> dict[str, str]:
    """The source of every function that a cell with an exhibit defines, by its name."""
    found = {}
    for cell in nbformat.read(CHAPTER, as_version=4).cells:
        if cell.cell_type == "code" and "inspect_exhibit(" in cell.source:
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef):
                    found[node.name] = ast.get_source_segment(cell.source, node)
    return found


def test_there_are_at_least_twelve_exhibits_and_each_has_its_papers():
    assert len(NAMES) == len(set(NAMES)) >= 12
    assert set(NAMES) == set(REPAIRS) == set(FAULTS)
    for shown in museum.EXHIBITS:
        assert shown.symptom
        assert shown.threads
        for thread in shown.threads:
            repository, number = thread.split("#")
            assert repository.count("/") == 1
            assert number.isdigit()


@pytest.mark.parametrize("name", NAMES)
def test_the_bug_is_caught_by_its_own_sentence(name):
    passed, sentence = museum.diagnose(name, museum.exhibit(name).broken)
    assert not passed
    assert FAULTS[name] in sentence


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_repair_passes_whatever_the_default_dtype(name, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        passed, sentence = museum.diagnose(name, REPAIRS[name])
    finally:
        torch.set_default_dtype(before)
    assert passed, sentence
    assert sentence == museum.exhibit(name).invariant


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.7])
def test_a_constant_of_the_right_shape_fails(name, value):
    def constant(*arguments):
        if name in EXAMINERS:
            return value
        result = REPAIRS[name](*arguments)
        if isinstance(result, tuple):
            return tuple(torch.full_like(part, value) for part in result)
        return torch.full_like(result, value)

    assert not museum.diagnose(name, constant)[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_and_what_is_no_function_fail(name):
    passed, sentence = museum.diagnose(name, lambda *arguments: None)
    assert not passed
    assert "returned None" in sentence or name in EXAMINERS
    assert museum.diagnose(name, 3) == (False, "this takes a function and got int.")


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_told(name):
    assert "raised ZeroDivisionError" in museum.diagnose(name, lambda *arguments: 1 / 0)[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_cannot_harm_the_judge(name):
    def greedy(*arguments):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and not argument.requires_grad:
                argument.zero_()
        return REPAIRS[name](*copies)

    assert museum.diagnose(name, greedy)[0]
    assert museum.diagnose(name, REPAIRS[name])[0]


def test_the_chapter_shows_every_bug_as_it_is_judged():
    shown = functions_of_the_chapter()
    for entry in museum.EXHIBITS:
        source = inspect.getsource(entry.broken).rstrip("\n")
        assert shown[entry.broken.__name__] == source, entry.name


def test_two_tables_have_symptom_name_and_invariant_of_every_exhibit():
    """Each of the two parts begins with a table of the exhibits that stand in it, and no others."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    deeper = next(i for i, c in enumerate(cells) if c.source.startswith("## Going deeper"))
    found = []
    for part in (cells[:deeper], cells[deeper:]):
        code = "\n".join(c.source for c in part if c.cell_type == "code")
        rows = [
            f"| {shown.symptom} | {number} {shown.name} | {shown.invariant.rstrip('.')} |"
            for number, shown in enumerate(museum.EXHIBITS, 1)
            if f'inspect_exhibit("{shown.name}"' in code
        ]
        (table,) = [c.source for c in part if "| exhibit |" in c.source]
        lines = table.replace("\\|", "|").splitlines()
        start = next(i for i, line in enumerate(lines) if "| exhibit |" in line)
        written = [line for line in lines[start + 2 :] if line.startswith("|")]
        assert sorted(written) == sorted(rows)
        found += rows
    assert len(found) == len(museum.EXHIBITS)


def test_the_chapter_names_every_thread():
    notebook = nbformat.read(CHAPTER, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for entry in museum.EXHIBITS:
        for thread in entry.threads:
            assert f"https://github.com/{thread.replace('#', '/issues/')}" in prose


def test_what_has_the_wrong_shape_or_kind_is_told_so():
    judge = "padding counted"
    assert "shape [2] where [15]" in museum.diagnose(judge, lambda *arguments: torch.ones(2))[1]
    assert "returned a str, not numbers" in museum.diagnose(judge, lambda *arguments: "a")[1]
    infinite = museum.diagnose(judge, lambda logps, lengths: logps.sum(1) - torch.inf)
    assert "infinite" in infinite[1]
    three = "beta missing from logged rewards"
    assert "three things" in museum.diagnose(three, lambda *arguments: torch.ones(6))[1]


def test_inspecting_prints_one_line(capsys):
    museum.inspect_exhibit("mean of means", REPAIRS["mean of means"])
    museum.inspect_exhibit("boundary off by one", museum.logp_after_prompt)
    assert capsys.readouterr().out == (
        "Exhibit 11 repaired: every token weighs the same, however many micro-batches there are.\n"
        "Exhibit 3 broken: the probabilities of all 9 completions sum to 3.0000, not 1.\n"
    )


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="`name` must be one of 'end token masked', .*, got 'dust'"
    ):
        museum.diagnose("dust", print)
    with pytest.raises(ValueError, match="`name` must .*, got 'dust'"):
        museum.inspect_exhibit("dust", print)


def test_the_museum_is_not_an_exercise():
    assert not any(name in exercises() for name in NAMES)


# --- repairs that are not repairs, and others that are ----------------------------------------


def seeded_dropout(features, weight, generator):
    """Two reads agree, for the generator is always the same; the policy's differ."""
    keep = torch.rand(features.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    return (features * keep / 0.9 @ weight).log_softmax(-1)


def reversed_kl(logps, ref_logps):
    return (ref_logps.exp() * (ref_logps - logps)).sum(1)


def absolute_k1(logps, ref_logps):
    return (logps - ref_logps).abs()


def score_on_the_first_token(scores, token_kls, lengths):
    rewards = -token_kls
    rewards[:, 0] += scores
    return rewards


def two_beta_smoothing(margins, beta, label_smoothing):
    """rDPO's formula: unbiased for the labels before the flip, another loss than cDPO's."""
    ls = torch.nn.functional.logsigmoid
    kept = -(1 - label_smoothing) * ls(beta * margins) + label_smoothing * ls(-beta * margins)
    return kept / (1 - 2 * label_smoothing)


def ratios_by_mass(logits, tokens, sampler_logps, kept):
    mass = (logits.softmax(-1) * kept).sum(-1)
    return museum.token_ratios(logits, tokens, sampler_logps, kept) / mass


def nothing_passes(pair_loss):
    raise AssertionError


def only_at_zero(pair_loss):
    loss = pair_loss(torch.tensor([0.0]), 0.5)
    assert torch.allclose(loss, torch.tensor(2.0).log().to(loss))


def uniform_scores(token_logps, tokens, pad_token):
    return torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64).log()


def shifted_scores(token_logps, tokens, pad_token):
    """The sum is 1 and so is every first word's; the second words are mixed up."""
    right = REPAIRS["end token masked"](token_logps, tokens, pad_token)
    mixed = right.clone()
    for word in (1, 2):
        rows = (tokens[:, 0] == word).nonzero().squeeze(1)
        mixed[rows] = right[rows.roll(1)]
    return mixed


def mean_of_all_rows(token_losses, mask, n_steps):
    """The same for any number of micro-batches, but a row weighs the same, not a token."""
    return ((token_losses * mask).sum(1) / mask.sum(1)).mean()


def half_scaled_rewards(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Consistent with each other, and with another loss than DPO's."""
    a, b = 0.5 * beta * (chosen - ref_chosen), 0.5 * beta * (rejected - ref_rejected)
    return torch.nn.functional.softplus(b - a), a, b


def rewards_with_a_constant(chosen, rejected, ref_chosen, ref_rejected, beta):
    loss, a, b = REPAIRS["beta missing from logged rewards"](
        chosen, rejected, ref_chosen, ref_rejected, beta
    )
    return loss, a + 1, b + 1


def begin_at_the_end(tokens, begin):
    return torch.tensor([t for t in tokens.tolist() if t != begin] + [begin])


def begin_and_sorted(tokens, begin):
    return torch.tensor([begin, *sorted(t for t in tokens.tolist() if t != begin)])


def rows_of_the_chosen_cut(prompt, chosen, rejected, max_length):
    """What LLaMA-Factory did: the prompt as it was cut for the chosen answer, in both rows."""
    cut = prompt[-(max_length - len(chosen)) :]
    return torch.cat([cut, chosen]), torch.cat([cut, rejected])


def rows_cut_at_minus_zero(prompt, chosen, rejected, max_length):
    """One cut for both; where no token of the prompt fits, prompt[-0:] is all of it."""
    cut = prompt[-(max_length - max(len(chosen), len(rejected))) :]
    return torch.cat([cut, chosen]), torch.cat([cut, rejected])


def rows_without_prompt(prompt, chosen, rejected, max_length):
    return chosen, rejected


def rows_from_the_start(prompt, chosen, rejected, max_length):
    kept = max_length - max(len(chosen), len(rejected))
    return torch.cat([prompt[:kept], chosen]), torch.cat([prompt[:kept], rejected])


def ratios_of_a_constant_mass(logits, tokens, sampler_logps, kept):
    """Divided by the mass that the sampler kept, not by the policy's own."""
    broken = museum.token_ratios(logits, tokens, sampler_logps, kept)
    words = sampler_logps.argmax()
    ratio = broken / broken[words]
    return ratio / ratio[words]


@pytest.mark.parametrize(
    ("name", "candidate", "words"),
    [
        ("reference with dropout", seeded_dropout, "at step 0"),
        ("kl_div without log_target", reversed_kl, "chapter 02"),
        ("k1 with the sign inverted", absolute_k1, "its mean over what pi writes"),
        ("reward one slot late", score_on_the_first_token, "with lambda = 1"),
        ("smoothing ignored", two_beta_smoothing, "DPO's mean loss"),
        ("an assertion that cannot fail", nothing_passes, "rejects DPO's loss itself"),
        ("an assertion that cannot fail", only_at_zero, "sign is reversed pass"),
        ("a test at step 0", nothing_passes, "rejects DPO's loss itself"),
        ("a test at step 0", only_at_zero, "sign is reversed pass"),
        ("end token masked", uniform_scores, "begin with word"),
        ("end token masked", shifted_scores, "follows word"),
        ("mean of means", mean_of_all_rows, "weigh"),
        ("beta missing from logged rewards", half_scaled_rewards, "the policy is the optimum"),
        ("beta missing from logged rewards", rewards_with_a_constant, "up to a constant"),
        (
            "smoothing ignored",
            lambda margins, beta, e: two_beta_smoothing(margins, 2 * beta, 0.0),
            "log-odds",
        ),
        ("smoothing ignored", lambda margins, beta, e: (1 - beta * margins).relu(), "together"),
        ("log of a sigmoid", lambda margins, beta: (1 - beta * margins).relu(), "together"),
        (
            "mean for sum",
            lambda logps, ref, mask, beta: REPAIRS["mean for sum"](logps, ref, mask, beta) + 1,
            "not 1",
        ),
        ("half-precision reference", lambda features, weight: features @ weight, "sum to"),
        (
            "packed answers see each other",
            lambda lengths: torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool(),
            "alone",
        ),
        (
            "packed answers see each other",
            lambda lengths: torch.ones(sum(lengths), sum(lengths)).tril(-1).bool(),
            "sees nothing",
        ),
        ("two begin tokens", lambda tokens, begin: tokens, "0 begin tokens"),
        ("two begin tokens", begin_at_the_end, "not the first token"),
        ("two begin tokens", begin_and_sorted, "in their order"),
        ("two begin tokens", lambda tokens, begin: tokens + 20, "not in the vocabulary"),
        ("two begin tokens", lambda tokens, begin: tokens.double(), "whole numbers"),
        ("two begin tokens", lambda tokens, begin: "a", "not tokens"),
        (
            "an adapter on an adapter",
            lambda features, base, sft, dpo: (features @ (base + sft + dpo)).log_softmax(-1),
            "moves with the adapter",
        ),
        (
            "an empty answer",
            lambda answer, n_prompt, longest, most: answer[-(most - n_prompt) :],
            "not the beginning",
        ),
        (
            "an empty answer",
            lambda answer, n_prompt, longest, most: (
                answer[: most - longest] if len(answer) > 3 else answer
            ),
            "keeps",
        ),
        (
            "logits in half precision",
            lambda logits: logits.float().log_softmax(-1).double(),
            "sum to",
        ),
        ("logits in half precision", lambda logits: logits.log_softmax(0), "sum to"),
        (
            "logits in half precision",
            lambda logits: (logits.clamp(max=2.0)).log_softmax(-1),
            "as their logits do",
        ),
        (
            "logits in half precision",
            lambda logits: logits.log_softmax(-1) + (logits > 60000) * 0.5,
            "moves by",
        ),
        ("one prompt, cut twice", rows_of_the_chosen_cut, "a row has"),
        ("one prompt, cut twice", rows_cut_at_minus_zero, "a row has 14 tokens"),
        ("one prompt, cut twice", rows_without_prompt, "more would fit"),
        ("one prompt, cut twice", rows_from_the_start, "not the end of the prompt"),
        ("one prompt, cut twice", lambda *arguments: torch.ones(3), "two rows"),
        (
            "log of one minus p",
            lambda logps: logps - torch.log1p(-logps.exp()),
            "log-odds are inf",
        ),
        (
            "log of one minus p",
            lambda logps: logps - torch.log(-torch.expm1(logps.clamp(max=-1e-9))),
            "not log p",
        ),
        (
            "a sampler that left tokens out",
            lambda logits, tokens, sampler, kept: torch.ones(len(tokens)),
            "does not have the odds",
        ),
        ("a sampler that left tokens out", ratios_of_a_constant_mass, "the mean of the ratio"),
        (
            "rounded in another order",
            lambda token_logps, chunk: token_logps.float().cumsum(1)[:, -1] + 1e-6 * chunk,
            "is off 1 by",
        ),
        (
            "rounded in another order",
            lambda token_logps, chunk: token_logps.mean(1),
            "sum to",
        ),
        (
            "recomputed without its mask",
            lambda layer, x, adapter, active, slopes: REPAIRS["recomputed without its mask"](
                layer, x, adapter, torch.ones_like(active), slopes
            ),
            "the gradient of the adapter has norm",
        ),
        (
            "half-precision reference",
            lambda features, weight: (features.float() @ weight.float()).log_softmax(1).double(),
            "sum to",
        ),
    ],
)
def test_half_a_repair_is_told_what_is_missing(name, candidate, words):
    passed, sentence = museum.diagnose(name, candidate)
    assert not passed
    assert words in sentence


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        (  # k3 is unbiased, too
            "k1 with the sign inverted",
            lambda logps, ref: torch.expm1(ref - logps) + logps - ref,
        ),
        (
            "kl_div without log_target",
            lambda logps, ref: torch.nn.functional.kl_div(
                ref, logps, log_target=True, reduction="none"
            ).sum(1),
        ),
        (
            "kl_div without log_target",
            lambda logps, ref: torch.nn.functional.kl_div(ref, logps.exp(), reduction="none").sum(
                1
            ),
        ),
        ("log of a sigmoid", lambda margins, beta: torch.nn.functional.softplus(-beta * margins)),
        (
            "packed answers see each other",
            lambda lengths: torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)),
        ),
        (
            "log of one minus p",
            lambda logps: (
                logps
                - torch.where(
                    logps > -0.7, torch.log(-torch.expm1(logps)), torch.log1p(-logps.exp())
                )
            ),
        ),
        ("a sampler that left tokens out", ratios_by_mass),
        ("rounded in another order", lambda token_logps, chunk: token_logps.sum(1)),
        (
            "mean of means",
            lambda losses, mask, n_steps: (losses * mask).sum() / mask.sum(),
        ),
    ],
)
def test_another_spelling_of_the_repair_passes(name, candidate):
    passed, sentence = museum.diagnose(name, candidate)
    assert passed, sentence

"""Answers with a thumb: files of ratings, their tokens, and KTO on them, beside `trl`'s trainer."""

import copy
import csv
import importlib.util
import inspect
import json
import math
import os
import socket
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch.testing import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="the extra 'real' is not installed")
pytest.importorskip("datasets", reason="the extra 'real' is not installed")

import datasets
from test_real_evaluation import sharding
from test_real_preferences import import_trl, said
from test_real_tokens import gemma, llama_2, llama_3, qwen
from test_real_training import (
    END,
    PAIRS,
    ROOT,
    Stopped,
    adamw,
    farthest,
    gpt2,
    gradients,
    in_order,
    needs_accelerate,
    needs_peft,
    seeded,
    stop_at,
    weights,
)

from dpo_mini import real
from dpo_mini.logps import PAD
from dpo_mini.losses import dpo_loss
from dpo_mini.real import CHAT, CausalLMPolicy, Preference, Rating, train_ratings

LIKED = [True, False, True, True, False, True, True, True, True, False, True, False]
RATINGS = [
    Rating(pair.prompt, pair.chosen if liked else pair.rejected, liked)
    for pair, liked in zip(PAIRS, LIKED, strict=True)
]
TEXTS = [
    {"prompt": "how was it?", "completion": " good, and\nlong", "label": True},
    {"prompt": 'the "film"', "completion": " bad", "label": False},
    {"prompt": "grün 🙂", "completion": " ok {really}", "label": True},
]
CHATS = [
    {"prompt": said(f"user: {row['prompt']}"), "completion": said(f"assistant:{row['completion']}")}
    | {"label": row["label"]}
    for row in TEXTS
]


def as_rating(row):
    return Rating(row["prompt"], row["completion"], row["label"])


def chat_rating(row):
    return Rating(row["prompt"], row["completion"], row["label"], (("user", row["prompt"]),))


def texts_of(*tensors):
    """The tokens of each row, of each tensor."""
    lists = ([row[row != PAD].tolist() for row in tensor] for tensor in tensors)
    return list(zip(*lists, strict=True))


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("of_label", [bool, int, str, lambda label: str(label).lower()])
def test_ratings_are_read_from_every_kind_of_file(tmp_path, kind, of_label):
    rows = [{**row, "label": of_label(row["label"])} for row in TEXTS]
    path = write(tmp_path / f"ratings.{kind}", rows)
    assert real.load_ratings(path) == [as_rating(row) for row in TEXTS]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_ratings_of_messages_beside_their_prompt_or_after_it_are_the_same(tmp_path, kind):
    wanted = [chat_rating({**row, "completion": row["completion"][1:]}) for row in TEXTS]
    wanted = [
        Rating(r.prompt, row["completion"][0]["content"], r.label, r.messages)
        for r, row in zip(wanted, CHATS, strict=True)
    ]
    beside = write(tmp_path / f"beside.{kind}", CHATS)
    assert real.load_ratings(beside) == wanted
    whole = [
        {"completion": row["prompt"] + row["completion"], "label": row["label"]} for row in CHATS
    ]
    assert real.load_ratings(write(tmp_path / f"whole.{kind}", whole)) == wanted
    text = [{**row, "completion": row["completion"][0]["content"]} for row in CHATS]
    assert real.load_ratings(write(tmp_path / f"text.{kind}", text)) == wanted


def test_columns_labels_roles_and_markers_are_those_of_pairs(tmp_path):
    row = {"instruction": "ask", "input": "me", "answers": [{"text": " yes"}], "thumb": "up"}
    path = write(tmp_path / "named.jsonl", [row, {**row, "thumb": "down"}])
    columns = {
        "prompt": ("instruction", "input"), "completion": "answers.0.text", "label": "thumb",
    }  # fmt: skip
    found = real.load_ratings(path, columns=columns, labels=("up", "down"))
    assert found == [Rating("ask\nme", " yes", True), Rating("ask\nme", " yes", False)]
    talk = [{"from": "owner", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    path = write(tmp_path / "roles.jsonl", [{"completion": talk, "label": 1, "who": "me"}])
    (found,) = real.load_ratings(path, roles={"owner": "user"}, columns={"ignored": "who"})
    assert found == Rating("hi", "yes", True, (("user", "hi"),))
    marked = {"completion": "\n\nHuman: hi\n\nAssistant: yes", "label": 0}
    (found,) = real.load_ratings(write(tmp_path / "marked.jsonl", [marked]))
    assert found == Rating("\n\nHuman: hi\n\nAssistant:", " yes", False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 2}, "line 2: `label` must be 1 or 0, got 2"),
        ({"label": None}, "line 2: `label` must be 1 or 0, got null"),
        ({"completion": " "}, "line 2: `completion` must have some text, got an empty answer"),
        (
            {"completion": 3},
            "line 2: `completion` must be text or a list of messages, got a number",
        ),
        ({"prompt": None}, "line 2: `prompt` must be text or a list of messages, got null"),
        ({"system": "be kind"}, "line 2: `system` must be read or left out by name, got words"),
        ({"images": ["x"]}, "line 2: `images` must be empty, since only text is read, got a list"),
        ({"id": 7}, "line 2: `id` must be different in every entry, got 7 as in line 1"),
        (
            {"prompt": said("user: hi"), "completion": said("assistant: a", "user: b")},
            "line 2: `completion` must end with a message of 'assistant', got one of 'user'",
        ),
        (
            {"prompt": "\n\nHuman: hi\n\nAssistant:", "completion": " a\n\nHuman: b"},
            "line 2: `completion` must be one turn, the assistant's, got a person's, marked",
        ),
    ],
)
def test_bad_ratings_are_refused_or_left_out_by_their_line(tmp_path, row, message):
    good = {**TEXTS[0], "id": 7}
    path = write(tmp_path / "bad.jsonl", [good, {**TEXTS[1], "id": 8} | row])
    with pytest.raises(ValueError) as caught:
        real.load_ratings(path)
    assert str(caught.value).startswith(f"{path}, {message}")
    if "by name" not in message:
        left_out = []
        assert real.load_ratings(path, left_out=left_out) == [as_rating(good)]
        assert len(left_out) == 1
        assert left_out[0].startswith(message)


def test_a_rating_without_a_prompt_column_is_refused(tmp_path):
    path = write(tmp_path / "bare.jsonl", [{"completion": "yes", "label": 1}])
    with pytest.raises(ValueError, match="`prompt` must be one of the columns, got 'completion'"):
        real.load_ratings(path)
    said_twice = {"prompt": said("user: hi"), "label": 1}
    said_twice["completion"] = said("user: a", "assistant: b")
    path = write(tmp_path / "twice.jsonl", [said_twice])
    with pytest.raises(ValueError, match="must be one message, .* of messages, got 2; left"):
        real.load_ratings(path)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_pairs_and_ratings_in_the_place_of_each_other_name_the_function_for_them(tmp_path, kind):
    pairs = [{"prompt": "ask", "chosen": "yes", "rejected": "no"}]
    ratings = write(tmp_path / f"ratings.{kind}", TEXTS)
    pairs = write(tmp_path / f"pairs.{kind}", pairs)
    for left_out in (None, []):
        with pytest.raises(ValueError, match=r"`completion` .* got 'chosen' .*load_preferences"):
            real.load_ratings(pairs, left_out=left_out)
        with pytest.raises(ValueError, match=r"`chosen` .* got 'completion' .*load_ratings read"):
            real.load_preferences(ratings, left_out=left_out)
    # Beside its own columns it may have those of the other.
    both = write(
        tmp_path / f"both.{kind}", [{**row, "chosen": "x", "rejected": "y"} for row in TEXTS]
    )
    assert real.load_ratings(both) == [as_rating(row) for row in TEXTS]


def test_bad_names_and_labels_are_refused(tmp_path):
    path = write(tmp_path / "ratings.jsonl", TEXTS)
    for settings, message in [
        ({"columns": {"chosen": "a"}}, "`columns` must name prompt, completion, label, id, .* got"),
        ({"columns": {"label": ()}}, "`columns` must have at least one column for label, got none"),
        ({"columns": {"label": ("a", "b")}}, "`columns` must have one column for label, got 2"),
        ({"columns": {"prompt": "completion"}}, "must have each column once, got 'completion'"),
        ({"labels": (1, True)}, "where an answer was liked and where it was not, .* got"),
        ({"labels": "up"}, "`labels` must be two values"),
    ]:
        with pytest.raises(ValueError, match=message):
            real.load_ratings(path, **settings)
    with pytest.raises(TypeError, match="`label` must be True or False, got 1"):
        Rating("ask", "yes", 1)
    with pytest.raises(ValueError, match="`prompt` must be the text of the messages, 'hi'"):
        Rating("ask", "yes", True, (("user", "hi"),))


def test_ratings_come_back_from_the_file_that_they_were_saved_in(tmp_path):
    for ratings in ([as_rating(row) for row in TEXTS], [chat_rating(row) for row in TEXTS]):
        real.save_preferences(tmp_path / "saved.jsonl", ratings)
        assert real.load_ratings(tmp_path / "saved.jsonl") == ratings


def test_ratings_of_one_prompt_stay_on_one_side():
    ratings = [Rating(f"ask {n // 3}", f"answer {n}", n % 2 == 0) for n in range(30)]
    left, held = real.split_preferences(ratings, held_out=6, generator=seeded())
    assert sorted([*left, *held], key=ratings.index) == ratings
    assert len(held) == 6
    assert not {r.prompt for r in left} & {r.prompt for r in held}
    with pytest.raises(TypeError, match="of type Rating like row 0, got Preference in row 1"):
        real.split_preferences([ratings[0], PAIRS[0]], held_out=1, generator=seeded())


# --- tokens --------------------------------------------------------------------------------------


def trl_rows(rows, tokenizer):
    """What `KTOTrainer` makes of a data set before it trains, in batches of three."""
    from types import SimpleNamespace

    trl = import_trl()
    made = trl.KTOTrainer._prepare_dataset(  # private, so the version is pinned
        SimpleNamespace(
            _tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
        ),
        datasets.Dataset.from_list(rows),
        tokenizer,
        SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=3),
        "train",
    )
    return [
        [*row["prompt_ids"], -1, *row["completion_ids"], -1, *row["KL_completion_ids"]]
        for row in made
    ]


@pytest.mark.parametrize("make", [llama_2, llama_3, qwen, gemma])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_the_tokens_are_those_of_trl_and_of_a_pair_with_that_answer(make, chat):
    tokenizer = make()
    rows = [
        {"prompt": "how was the film?\n", "completion": "good", "label": True},
        {"prompt": "1 + 2\n", "completion": "3", "label": False},
        {"prompt": "ask me\n", "completion": "yes, 12", "label": True},
    ]
    ratings = [(chat_rating if chat else as_rating)(row) for row in rows]
    settings = dict(template=CHAT if chat else "{prompt}", max_tokens=200)
    prompts, completions, labels = real.encode(ratings, tokenizer, **settings)
    assert labels.tolist() == [True, False, True]
    mine = texts_of(prompts, completions, completions.roll(1, 0))
    if chat:
        rows = [
            {**row, "prompt": said(f"user: {row['prompt']}")}
            | {"completion": said(f"assistant: {row['completion']}")}
            for row in rows
        ]
    assert [[*p, -1, *own, -1, *other] for p, own, other in mine] == trl_rows(rows, tokenizer)
    pairs = [Preference(r.prompt, r.completion, "bad, 12 no", r.messages) for r in ratings]
    wide = real.encode(pairs, tokenizer, **settings)
    assert texts_of(*wide[:2]) == texts_of(prompts, completions)
    counts = real.count_tokens(ratings, tokenizer, template=settings["template"])
    assert counts == [len(p) + len(c) for p, c in texts_of(prompts, completions)]


def test_letters_across_the_boundary_are_tokenised_as_in_a_pair(tokenizer):
    rating, pair = Rating("film 1 wa", "s very", True), Preference("film 1 wa", "s very", "s very")
    for boundary in ("prompt", "common_prefix"):
        settings = dict(template="{prompt}", max_tokens=64, boundary=boundary)
        ours = real.encode([rating], tokenizer, **settings)[:2]
        assert all(map(torch.equal, ours, real.encode([pair], tokenizer, **settings)[:2]))
    with pytest.raises(ValueError, match="got a prompt of .* with an answer of .* in row 0"):
        real.encode([rating], tokenizer, max_tokens=4)


def test_long_ratings_are_dropped_or_cut_by_hand():
    prompts = torch.tensor([[1, PAD], [1, 2], [3, PAD]])
    answers = torch.tensor([[4, 5, 0], [6, 0, PAD], [0, PAD, PAD]])
    data = prompts, answers, torch.tensor([True, False, True])
    left, n_dropped = real.drop_long(data, max_tokens=3)
    assert n_dropped == 2
    assert [tokens.tolist() for tokens in left] == [[[3]], [[0]], [True]]
    left, n_cut, n_dropped = real.cut_long(data, max_tokens=3)
    assert (n_cut, n_dropped) == (2, 0)
    assert left[1].tolist() == [[4, 5], [6, PAD], [0, PAD]]
    assert torch.equal(left[2], data[2])
    assert real.pair_lengths(data).tolist() == [4, 4, 2]


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in PAIRS for text in (pair.prompt, pair.chosen, pair.rejected)]
    return real.train_tokenizer(texts, vocab_size=290)


@pytest.fixture(scope="module")
def ratings(tokenizer):
    return real.encode(RATINGS, tokenizer, max_tokens=64)


@pytest.fixture
def policy(tokenizer):
    return CausalLMPolicy(gpt2(tokenizer, torch.float64), end_token=END)


@pytest.fixture
def single(tokenizer):
    return CausalLMPolicy(gpt2(tokenizer), end_token=END)


def train(policy, reference, ratings, **changes):
    settings = dict(beta=0.1, batches=in_order(12, 4), optimizer=adamw(policy)) | changes
    return train_ratings(policy, reference, ratings, **settings)


def moved(policy, scale=1e-2):
    """A copy whose weights differ a little, so that z_0 and rewards are not 0."""
    other = copy.deepcopy(policy)
    generator = seeded(7)
    with torch.no_grad():
        for weight in other.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(noise, alpha=scale)
    return other


def row_logp(model, prompt, answer):
    """log pi(answer|prompt) of token lists, from the model's logits alone."""
    tokens = torch.tensor([[*prompt, *answer]])
    logps = model(input_ids=tokens[:, :-1]).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt), tokens.shape[1])
    return logps[at - 1, tokens[0, at]].sum()


def by_hand(policy, reference, ratings, rows, beta, weights_of):
    """Loss and metrics of a batch, one row after another."""
    texts = texts_of(*ratings[:2])
    logps, ref_logps, above = [], [], []
    for place, row in enumerate(rows):
        prompt, other = texts[row][0], texts[rows[place - 1]][1]
        logps.append(row_logp(policy.model, prompt, texts[row][1]))
        with torch.no_grad():
            ref_logps.append(row_logp(reference.model, prompt, texts[row][1]))
            ours = row_logp(policy.model, prompt, other)
            above.append((ours - row_logp(reference.model, prompt, other)).item())
    point = max(0.0, sum(above) / len(rows))
    losses, rewards, seen = [], {True: [], False: []}, {True: [], False: []}
    for row, logp, ref_logp in zip(rows, logps, ref_logps, strict=True):
        liked = bool(ratings[2][row])
        sign = 1 if liked else -1
        value = 1 - torch.sigmoid(sign * beta * (logp - ref_logp - point))
        losses.append(weights_of[liked] * value)
        rewards[liked].append(beta * (logp - ref_logp).item())
        seen[liked].append(logp.item())
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    loss = sum(losses) / len(losses)
    metrics = {"loss": loss.item(), "kl": point}
    metrics |= {"rewards/chosen": mean(rewards[True]), "rewards/rejected": mean(rewards[False])}
    metrics |= {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}
    metrics |= {"logps/chosen": mean(seen[True]), "logps/rejected": mean(seen[False])}
    return loss, metrics


@pytest.mark.parametrize("scale", [1e-2, -2e-2])
def test_loss_gradient_and_metrics_by_hand(policy, ratings, scale):
    reference = moved(policy, scale)
    rows, chances = [0, 1, 2, 4, 5], {True: 1.3, False: 0.7}
    loss, metrics = by_hand(policy, reference, ratings, rows, 0.4, chances)
    policy.zero_grad()
    loss.backward()
    true = gradients(policy)
    history = train(
        policy, reference, ratings, beta=0.4, batches=torch.tensor([rows]), micro_batch_size=2,
        desirable_weight=1.3, undesirable_weight=0.7,
    )  # fmt: skip
    assert (metrics["kl"] > 0) == (scale == KL_IS_POSITIVE)
    for name, value in metrics.items():
        assert history[name] == [pytest.approx(value, abs=1e-9)]
    assert farthest(gradients(policy), true) < 1e-10
    norm = math.sqrt(sum(g.square().sum().item() for g in true.values()))
    assert history["grad_norm"] == [pytest.approx(norm)]


KL_IS_POSITIVE = 1e-2


def test_another_rows_answer_is_cut_where_it_would_not_fit(tokenizer):
    """A model that can read the longest rating, and no more."""
    rated = [Rating("film " * 9, "good", True), Rating("film", "very good " * 6, False)]
    data = real.encode(rated, tokenizer, max_tokens=64)
    longest = max(len(p) + len(c) for p, c in texts_of(*data[:2]))
    model = real.tiny_gpt2(tokenizer, n_positions=longest - 1, generator=seeded(), width=16)
    policy = CausalLMPolicy(model.double(), end_token=END)
    reference = moved(policy, 0.1)
    (first, short), (second, long) = texts_of(*data[:2])
    above = []
    for prompt, other in ((first, long[: longest - len(first)]), (second, short)):
        with torch.no_grad():
            ours, theirs = (row_logp(m.model, prompt, other) for m in (policy, reference))
        above.append((ours - theirs).item())
    assert len(first) + len(long) > longest
    history = train(policy, reference, data, batches=torch.tensor([[0, 1]]))
    assert history["kl"] == [pytest.approx(max(0.0, sum(above) / 2), abs=1e-9)]
    assert sum(above) > 0


@pytest.mark.parametrize("live", [False, True], ids=["scored before", "scored beside"])
def test_passes_of_any_size_have_z_0_and_gradient_of_the_whole_batch(policy, ratings, live):
    reference, batches = moved(policy, 3e-2), in_order(12, 6)[:1]
    found = []
    for size in (6, 4, 3, 1):
        copied = copy.deepcopy(policy)
        scored = reference
        if not live:
            scored = real.reference_logps(
                reference, ratings, batches=batches, micro_batch_size=size
            )
        history = train(copied, scored, ratings, batches=batches, micro_batch_size=size, beta=1.0)
        found.append((history["kl"][0], history["loss"][0], gradients(copied)))
    assert found[0][0] > 1e-3
    for kl, loss, gradient in found[1:]:
        assert kl == pytest.approx(found[0][0], abs=1e-12)
        assert loss == pytest.approx(found[0][1], abs=1e-12)
        assert farthest(gradient, found[0][2]) < 1e-12
    # The control: z_0 of each half alone is another gradient.
    halves = []
    for part in batches.view(2, 3):
        copied = copy.deepcopy(policy)
        train(copied, reference, ratings, batches=part[None], beta=1.0)
        halves.append(gradients(copied))
    mixed = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    assert farthest(mixed, found[0][2]) > 1e-6


@pytest.mark.parametrize("precision", [real.full_precision, real.bf16_autocast])
def test_a_policy_that_is_its_reference_has_rewards_of_0_and_half_of_the_weights(
    single, ratings, precision
):
    batches = real.shuffled_batches(12, steps=6, batch_size=4, generator=seeded(2))  # two epochs
    reference = real.reference_logps(
        single, ratings, batches=batches, micro_batch_size=3, precision=precision
    )
    history = train(
        single, reference, ratings, batches=batches, optimizer=adamw(single, 0.0),
        desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    for step, rows in enumerate(batches):
        liked = sum(LIKED[row] for row in rows)
        assert history["loss"][step] == 0.5 * (1.5 * liked + 0.5 * (4 - liked)) / 4
    assert history["kl"] == [0.0] * 6
    for name in ("rewards/chosen", "rewards/rejected"):
        assert {value for value in history[name] if not math.isnan(value)} == {0.0}


def test_scored_before_or_beside_the_bits_are_the_same(single, ratings):
    before, beside = copy.deepcopy(single), copy.deepcopy(single)
    batches = real.shuffled_batches(12, steps=5, batch_size=4, generator=seeded(2))
    scores = real.reference_logps(single, ratings, batches=batches, micro_batch_size=3)
    first = train(before, scores, ratings, batches=batches)
    second = train(beside, single, ratings, batches=batches, micro_batch_size=3)
    assert str(first) == str(second)  # to the last digit, with NaN
    assert farthest(weights(before), weights(beside)) == 0


def test_trl_computes_the_same_at_every_step(tokenizer, tmp_path, capfd):
    trl = import_trl()
    n, batch_size, weighed = 24, 4, {"desirable_weight": 1.0, "undesirable_weight": 1.5}
    generator = seeded(4)
    order = torch.randperm(n, generator=generator).tolist()
    rows = [
        {
            "prompt": f"film {m} was\n",
            "completion": "very good " * (m % 4) + "bad",
            "label": m % 3 > 0,
        }
        for m in order
    ]
    rated = [as_rating(row) for row in rows]
    data = real.encode(rated, tokenizer, max_tokens=64, template="{prompt}")
    longest = max(len(p) + len(c) for p, c in texts_of(*data[:2]))
    model = gpt2(tokenizer, torch.float64)
    theirs, reference = copy.deepcopy(model), copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        arguments = trl.KTOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, save_strategy="no",
            bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=longest,
            logging_steps=1, lr_scheduler_type="constant", beta=0.3, max_grad_norm=1.0,
            per_device_train_batch_size=batch_size, max_steps=n // batch_size, **weighed,
        )  # fmt: skip
        trainer = trl.KTOTrainer(
            model=theirs, ref_model=reference, args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=copy.deepcopy(tokenizer),
            optimizers=(torch.optim.AdamW(theirs.parameters(), lr=1e-3), None),
        )  # fmt: skip
        trainer.train()
    capfd.readouterr()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    policy, batches = CausalLMPolicy(model, end_token=END), in_order(n, batch_size)
    ours = train(
        policy, real.reference_logps(policy, data, batches=batches), data, beta=0.3,
        batches=batches, max_grad_norm=1.0, **weighed,
    )  # fmt: skip
    assert ours.pop("lr") == [entry["learning_rate"] for entry in history]
    assert set(ours) == {*real.training.RATING_METRICS, "grad_norm"}
    for name, values in ours.items():
        found = torch.tensor([entry.get(name, math.nan) for entry in history])
        assert_close(torch.tensor(values), found, atol=1e-5, rtol=1e-6, equal_nan=True)
    assert max(ours["kl"]) > 0.01
    assert farthest(weights(policy), dict(theirs.named_parameters())) < 1e-4


def test_a_batch_of_one_kind_alone_has_no_number_of_the_other(single, ratings, tmp_path):
    liked = [row for row, label in enumerate(LIKED) if label][:4]
    batches = torch.tensor([[0, 1, 2, 3], liked, [1, 4, 9, 11]])
    history = train(
        single, copy.deepcopy(single), ratings, batches=batches,
        logs=[real.csv_log(tmp_path / "metrics.csv")],
    )  # fmt: skip
    for name in ("rewards", "logps"):
        missing = [math.isnan(value) for value in history[f"{name}/rejected"]]
        assert missing == [False, True, False]
        assert [math.isnan(value) for value in history[f"{name}/chosen"]] == [False, False, True]
    assert [math.isnan(value) for value in history["rewards/margins"]] == [False, True, True]
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["logps/rejected"] == "" for line in lines] == [False, True, False]
    assert [float(line["loss"]) for line in lines] == history["loss"]
    assert real.diagnose(tmp_path / "metrics.csv") == []


def test_held_out_ratings_are_one_batch(policy, ratings, tokenizer):
    """Its numbers are those that training reports of that batch before its step."""
    held = real.encode(RATINGS[:5], tokenizer, max_tokens=64)
    reference = moved(policy)
    alone = train(copy.deepcopy(policy), reference, held, batches=torch.arange(5)[None])
    evaluation = real.Evaluation(held, real.reference_logps(reference, held), every=2)
    trained = copy.deepcopy(policy)
    history = train(trained, reference, ratings, evaluation=evaluation, micro_batch_size=3)
    assert history["eval_step"] == [0, 2, 3]
    for name in real.training.RATING_METRICS:
        assert history[f"eval_{name}"][0] == pytest.approx(alone[name][0], abs=1e-9)
    after = train(trained, reference, held, batches=torch.arange(5)[None])
    assert history["eval_loss"][-1] == pytest.approx(after["loss"][0], abs=1e-9)


STEPS, EVERY = 6, 2


def whole_run(policy, reference, ratings, folder, **changes):
    batches = real.shuffled_batches(12, steps=STEPS, batch_size=4, generator=seeded(3))
    settings = dict(
        batches=batches, checkpoints=folder, checkpoint_every=EVERY, optimizer=adamw(policy, 1e-2),
        schedule=real.warmup_then_cosine(STEPS, warmup=2), undesirable_weight=1.2,
        logs=[real.csv_log(folder.with_suffix(".csv"))],
    )  # fmt: skip
    scored = real.reference_logps(reference, ratings, batches=batches, micro_batch_size=3)
    return train(policy, scored, ratings, **settings | changes)


def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(single, ratings, tmp_path):
    uninterrupted = copy.deepcopy(single)
    history = whole_run(uninterrupted, single, ratings, tmp_path / "whole")
    for stop in (1, 3, 4):
        folder, first, second = tmp_path / f"{stop}", copy.deepcopy(single), copy.deepcopy(single)
        with pytest.raises(Stopped):
            whole_run(first, single, ratings, folder, progress=stop_at(stop))
        assert str(whole_run(second, single, ratings, folder)) == str(history)
        assert farthest(weights(second), weights(uninterrupted)) == 0
        csv_of = [path.with_suffix(".csv").read_bytes() for path in (folder, tmp_path / "whole")]
        assert csv_of[0] == csv_of[1]
    other = (*ratings[:2], ~ratings[2])
    for data, changes, what in [
        (ratings, {"undesirable_weight": 1.3}, "undesirable_weight=1.2"),
        (other, {}, "other data"),
    ]:
        with pytest.raises(ValueError, match=f"`checkpoints` must be this run's .*{what}"):
            whole_run(copy.deepcopy(single), single, data, tmp_path / "whole", **changes)


@needs_peft
def test_an_adapters_reference_is_the_model_without_it(tokenizer, ratings):
    model = real.add_lora(gpt2(tokenizer), rank=2, generator=seeded())
    policy = CausalLMPolicy(model, end_token=END)
    history = train(policy, real.adapter_off(policy), ratings, optimizer=adamw(policy, 1e-2))
    assert history["loss"][0] == 0.5
    assert history["kl"][0] == history["rewards/chosen"][0] == 0.0
    assert history["rewards/chosen"][1] != 0.0


def test_bad_runs_are_refused(single, ratings, tokenizer):
    pairs = real.encode(PAIRS, tokenizer, max_tokens=64)
    same_prompt = (ratings[0][:1].repeat(12, 1), *ratings[1:])
    reference = copy.deepcopy(single)
    scored = real.reference_logps(single, ratings, batches=in_order(12, 4))
    one_by_one = "`batches` must have two prompts in each batch, .* got one row in batch 0"
    for data, changes, message in [
        (ratings, {"batches": in_order(12, 1)}, one_by_one),
        (same_prompt, {}, "`batches` must have two prompts .* got 4 rows of one prompt in batch 0"),
        (pairs, {}, r"`ratings` must be .* got pairs or others \(train_preferences takes pairs"),
        (ratings, {"desirable_weight": 0.0}, "`desirable_weight` must be"),
        (ratings, {"undesirable_weight": -1.0}, "`undesirable_weight` must be"),
        (ratings, {"beta": 0.0}, "`beta` must be"),
        (ratings, {"reference": scored, "batches": in_order(12, 6)}, "in the passes of training"),
        (ratings, {"reference": scored, "batches": in_order(12, 4)[:2]}, "must have 8 rows like"),
        ((*ratings[:2], ratings[2].long() + 1), {}, "`labels` must be 0 or 1, got 2"),
        ((*ratings[:2], ratings[2][:5]), {}, "`labels` must have 12 rows like `prompts`, got 5"),
    ]:
        settings = {"reference": reference} | changes
        with pytest.raises(ValueError, match=message):
            train(single, settings.pop("reference"), data, **settings)
    with pytest.raises(ValueError, match="`batches` must have two prompts .* got one row"):
        real.reference_logps(single, ratings, batches=in_order(12, 1))
    with pytest.raises(ValueError, match=r"`pairs` must be .* got ratings, which train_ratings"):
        real.train_preferences(
            single, reference, ratings, dpo_loss, beta=0.1, batches=in_order(12, 4),
            optimizer=adamw(single),
        )  # fmt: skip
    evaluation = real.Evaluation(pairs, real.reference_logps(single, pairs))
    with pytest.raises(
        ValueError, match="`evaluation` must have ratings as in training, got pairs"
    ):
        train(single, reference, ratings, evaluation=evaluation)
    with pytest.raises(ValueError, match="`pairs` must have two prompts in each batch"):
        real.Evaluation(tuple(part[:1] for part in ratings), reference)


def test_scores_on_disk_are_those_of_their_batches(single, ratings, tmp_path):
    first = real.reference_logps(single, ratings, batches=in_order(12, 4), cache=tmp_path / "ref")
    assert [len(scores) for scores in first] == [12, 12]
    passes = []
    single.model.transformer.register_forward_hook(lambda *given: passes.append(1))
    again = partial(real.reference_logps, single, ratings, cache=tmp_path / "ref")
    assert all(map(torch.equal, again(batches=in_order(12, 4)), first))
    assert passes == []
    shuffled = again(batches=in_order(12, 4).flip(1))
    assert len(passes) == 24
    assert not torch.equal(shuffled[1].sort()[0], first[1].sort()[0])


TOGETHER = """
import json, os, sys
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

torch.set_num_threads(1)
found = {"whole": one_of_the_processes(Accelerator())}
os.environ.update(json.loads(sys.argv[1]))
AcceleratorState._reset_state(True)
PartialState(cpu=True)
# accelerate deals out weights on GPUs alone; gloo's processes do for one
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
found["shards"] = one_of_the_processes(Accelerator())
torch.save(found, sys.argv[2] + os.environ["RANK"])
torch.distributed.destroy_process_group()
"""


def one_of_the_processes(accelerator):
    """Its history; by itself, as a process reads it before it has imported anything."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_mini import real

    ratings = [
        real.Rating(f"film {n} was", "very good " * (n % 4) + "bad", n % 3 > 0) for n in range(12)
    ]
    tokenizer = real.train_tokenizer([r.prompt + r.completion for r in ratings], vocab_size=290)
    data, held = (real.encode(rows, tokenizer, max_tokens=64) for rows in (ratings, ratings[:5]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            initializer_range=0.3,
        )  # fmt: skip
        policy = real.CausalLMPolicy(LlamaForCausalLM(config), end_token=0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    if accelerator.distributed_type == "FSDP":
        policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
    batches, settings = torch.arange(12).view(2, 6), {"accelerator": accelerator}
    settings["micro_batch_size"] = 2
    reference = real.reference_logps(policy, data, batches=batches, **settings)
    evaluation = real.Evaluation(held, real.reference_logps(policy, held, **settings), every=1)
    return real.train_ratings(
        policy, reference, data, beta=0.1, batches=batches, optimizer=optimizer,
        accelerator=accelerator, evaluation=evaluation,
    )  # fmt: skip


@needs_accelerate
def test_two_processes_have_one_z_0(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(inspect.getsource(one_of_the_processes) + TOGETHER, encoding="utf-8")
    command = [sys.executable, str(script), json.dumps(sharding()), str(tmp_path / "found")]
    for _ in range(3):  # another program may have taken the port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        shared |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": "2"}
        both = [
            subprocess.Popen(
                command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for rank in "01"
        ]  # fmt: skip
        told = "".join(process.communicate(timeout=300)[1] for process in both)
        if "EADDRINUSE" not in told:
            break
    assert [process.returncode for process in both] == [0, 0], told[-3000:]
    first, second = (torch.load(tmp_path / f"found{rank}") for rank in "01")
    alone = one_of_the_processes(real.processes.OneProcess())
    assert alone["kl"][1] > 1e-4
    for kind in ("whole", "shards"):
        assert first[kind] == second[kind]
        assert first[kind]["loss"][0] == first[kind]["eval_loss"][0] == 0.5
        for name, values in alone.items():
            assert_close(first[kind][name], values, atol=1e-4, rtol=1e-4)


def example():
    path = ROOT / "examples" / "train_kto.py"
    spec = importlib.util.spec_from_file_location("train_kto", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_accelerate
def test_the_example_trains_evaluates_and_goes_on(single, tokenizer, tmp_path, capfd, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    real.save_model(single.model, tokenizer, tmp_path / "start")
    rows = [
        {"prompt": r.prompt, "completion": r.completion, "thumb": "up" if r.label else "down"}
        for r in RATINGS
    ]
    arguments = ["--model", tmp_path / "start", "--ratings", write(tmp_path / "r.csv", rows)]
    arguments += ["--output", tmp_path / "run", "--batch-size", 4, "--held-out", 0.25]
    arguments += ["--columns", '{"label": "thumb"}', "--labels", '["up", "down"]']
    arguments += ["--learning-rate", 1e-2, "--micro-batch-size", 2, "--eval-every", 2, "--steps", 3]
    run = partial(example().main, [str(argument) for argument in arguments])
    history = run()
    assert history["loss"][0] == history["eval_loss"][0] == 0.5
    assert history["eval_step"] == [0, 2, 3]
    assert history["rewards/margins"][-1] != 0.0
    assert str(run()) == str(history)  # nothing is left to do
    AcceleratorState._reset_state(True)
    trained, _ = real.load_model(tmp_path / "run" / "model")
    assert farthest(dict(trained.named_parameters()), weights(single)) > 1e-3
    capfd.readouterr()

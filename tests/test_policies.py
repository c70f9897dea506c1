"""The policies against `transformers`' GPT-2 with the same weights, and against bad input."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from dpo_mini import policies
from dpo_mini.logps import PAD
from dpo_mini.policies import (
    OneDNNLinear,
    PrefixTree,
    RewardModel,
    ScalarTransformer,
    SeparateNetworks,
    SharedTrunk,
    TabularPolicy,
    TinyTransformer,
    gelu,
    linear_of_rows,
    shares_storage,
)

SHAPES = [
    # X, V, T, end token, layers, heads, width
    (1, 5, 4, 0, 1, 1, 8),
    (3, 7, 5, 6, 2, 4, 32),
    (2, 16, 5, None, 2, 4, 64),
    (4, 12, 1, 3, 3, 2, 12),
]
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def transformer(shape, dtype, generator):
    """A policy whose weights are far from their small initial values, so that mistakes show."""
    n_prompts, vocab_size, max_tokens, end_token, n_layers, n_heads, width = shape
    policy = TinyTransformer(
        n_prompts,
        vocab_size,
        max_tokens,
        end_token=end_token,
        generator=generator,
        n_layers=n_layers,
        n_heads=n_heads,
        width=width,
    ).to(dtype)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=dtype, generator=generator)
    return policy


def random_rows(policy, n, generator):
    """Prompts `[n]` and completions `[n, T]` of every length that the policy allows."""
    prompts = torch.randint(policy.n_prompts, (n,), generator=generator)
    shape = (n, policy.max_tokens)
    completions = torch.randint(policy.vocab_size, shape, generator=generator)
    if policy.end_token is not None:
        ended = (completions == policy.end_token).long().cumsum(1)
        after = ended - (completions == policy.end_token).long() > 0
        completions = completions.masked_fill(after, PAD)
    return prompts, completions


def gpt2_with_weights_of(policy):
    """`transformers`' GPT-2 with the same weights: its Conv1D keeps them transposed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=policy.vocab_size + policy.n_prompts,
        n_positions=policy.max_tokens,
        n_embd=policy.wte.embedding_dim,
        n_layer=len(policy.blocks),
        n_head=policy.blocks[0].attn.n_heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval().to(policy.wte.weight.dtype)
    weights = {}
    for name, weight in policy.state_dict().items():
        for part in ("c_fc", "c_proj"):
            if f".{part}." in name and ".attn." not in name:
                name = name.replace(f".{part}.", f".mlp.{part}.")
        if ".c_" in name and name.endswith("weight"):
            weight = weight.T
        weights["transformer." + name.replace("blocks.", "h.")] = weight
    left_out = model.load_state_dict(weights, strict=False)
    assert left_out.missing_keys == ["lm_head.weight"]  # tied to wte
    assert left_out.unexpected_keys == []
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_is_gpt2(shape, dtype, tolerance, generator):
    policy = transformer(shape, dtype, generator)
    oracle = gpt2_with_weights_of(policy)
    prompts = torch.randint(policy.n_prompts, (9,), generator=generator)
    inner = (9, policy.max_tokens - 1)
    completions = torch.randint(policy.vocab_size, inner, generator=generator)
    with torch.no_grad():
        logits = policy(torch.cat([prompts[:, None], completions], 1))
        read = torch.cat([prompts[:, None] + policy.vocab_size, completions], 1)
        want = oracle(read).logits[..., : policy.vocab_size]
    assert logits.shape == (9, policy.max_tokens, policy.vocab_size)
    assert logits.std() > 0.1
    assert (logits - want).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_token_logps_are_those_of_gpt2(shape, dtype, tolerance, generator):
    policy = transformer(shape, dtype, generator)
    oracle = gpt2_with_weights_of(policy)
    prompts, completions = random_rows(policy, 40, generator)
    with torch.no_grad():
        got = policy.token_logps(prompts, completions)
        totals = policy.logps(prompts, completions)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens = completion[completion != PAD]  # one row at a time: no padding to get wrong
            read = torch.cat([prompt[None] + policy.vocab_size, tokens[:-1]])
            logits = oracle(read[None]).logits[0, :, : policy.vocab_size]
            want = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
            assert (got[row, : len(tokens)] - want).abs().max() < tolerance
            assert (got[row, len(tokens) :] == 0).all()
            assert (totals[row] - want.sum()).abs() < policy.max_tokens * tolerance


def test_gelu_and_its_gradient_are_those_of_torch():
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, 2001, dtype=torch.float64)
    got, want = gelu(x), torch.nn.functional.gelu(x, approximate="tanh")
    assert_close(got, want, rtol=0, atol=1e-14)
    slope, other = (torch.autograd.grad((weights * y).sum(), x)[0] for y in (got, want))
    assert_close(slope, other, rtol=0, atol=1e-14)
    # 0.5 (1 + tanh u) + 0.5 x (1 - tanh^2 u) u' at x = 1, by hand
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    gelu(one).backward()
    assert one.grad.item() == pytest.approx(1.0829640838457826, abs=1e-14)


needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN"
)


def by_onednn_and_torch(generator, *shape):
    """A layer and rows, and what both ways make of them."""
    layer = torch.nn.Linear(shape[-1], 12)
    x = torch.randn(shape, generator=generator, requires_grad=True)
    ways = (OneDNNLinear.apply(x, layer.weight, layer.bias), layer(x))
    return (x, *layer.parameters()), ways


@needs_onednn
@pytest.mark.parametrize("shape", [(5, 7, 8), (1, 1, 4), (64, 18, 64)])
def test_onednn_and_its_gradient_are_those_of_torch(shape, generator):
    inputs, ways = by_onednn_and_torch(generator, *shape)
    assert_close(*ways, rtol=0, atol=1e-5)
    grad = torch.randn(ways[0].shape, generator=generator)
    for got, want in zip(*(torch.autograd.grad(y, inputs, grad) for y in ways), strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_onednn_has_a_second_derivative(generator):
    inputs, ways = by_onednn_and_torch(generator, 5, 7, 8)

    def twice(y):
        slopes = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(slope.pow(2).sum() for slope in slopes), inputs)

    for got, want in zip(*map(twice, ways), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-2)


def taken(layer, x):
    return type(linear_of_rows(layer, x).grad_fn).__name__ == "OneDNNLinearBackward"


@needs_onednn
@pytest.mark.parametrize(
    ("maker", "capability", "wanted"),
    [("AMD", "AVX512", True), ("AMD", "AVX2", False), ("another", "AVX512", False)],
)
def test_onednn_is_taken_where_torch_leaves_half_of_a_vector(
    maker, capability, wanted, monkeypatch
):
    monkeypatch.setattr(policies, "_cpu_maker", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    layer, x = torch.nn.Linear(4, 3), torch.ones(2, 5, 4)
    assert taken(layer, x) == wanted
    assert not taken(layer.double(), x.double())  # the chapters' precision is torch's own
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not taken(layer.float(), x)


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES)
def test_a_policy_says_the_same_by_onednn(shape, generator, monkeypatch):
    policy = transformer(shape, torch.float32, generator)
    rows = random_rows(policy, 9, generator)
    said = []
    for faster in (True, False):
        monkeypatch.setattr(policies, "_onednn_is_faster", lambda faster=faster: faster)
        said.append(policy.token_logps(*rows))
    assert "OneDNN" in names_of_graph(said[0])
    assert "OneDNN" not in names_of_graph(said[1])
    assert_close(*said, rtol=0, atol=2e-5)


def names_of_graph(y):
    """The names of all steps that lead to `y`, joined."""
    nodes, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    return " ".join(type(node).__name__ for node in nodes)


def test_gelu_has_a_second_derivative():
    x = torch.linspace(-4, 4, 30, dtype=torch.float64, requires_grad=True)

    def twice(function):
        (slope,) = torch.autograd.grad(function(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad((slope * x).sum(), x)[0]

    want = twice(partial(torch.nn.functional.gelu, approximate="tanh"))
    assert_close(twice(gelu), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_extend_agrees_with_forward(shape, generator):
    policy = transformer(shape, torch.float64, generator)
    prompts, _ = random_rows(policy, 6, generator)
    read = prompts[:, None]
    logits, path = policy.begin(prompts)
    assert_close(logits, policy(read)[:, -1], rtol=1e-12, atol=1e-12)
    for depth in range(policy.max_tokens - 1):
        siblings = torch.randint(policy.vocab_size, (6, 3), generator=generator)
        logits, own = policy.extend(siblings, path)
        for c in range(3):
            alone = policy(torch.cat([read, siblings[:, c : c + 1]], 1))[:, -1]
            assert_close(logits[:, c], alone, rtol=1e-12, atol=1e-12)
        assert own[0][0].shape == (6, path[0][0].shape[1], 3, path[0][0].shape[3])
        assert path[0][0].shape[2] == depth + 1
        read = torch.cat([read, siblings[:, :1]], 1)
        path = [
            tuple(torch.cat([old, new[:, :, :1]], 2) for old, new in zip(kept, mine, strict=True))
            for kept, mine in zip(path, own, strict=True)
        ]


def test_more_padding_changes_nothing(generator):
    policy = transformer((3, 7, 5, 6, 2, 4, 32), torch.float64, generator)
    short = torch.tensor([[6, PAD], [2, 6], [6, PAD]])
    prompts = torch.tensor([0, 1, 2])
    padded = torch.cat([short, torch.full((3, 3), PAD)], 1)
    assert_close(
        policy.token_logps(prompts, padded)[:, :2],
        policy.token_logps(prompts, short),
        rtol=0,
        atol=1e-13,
    )
    assert (policy.token_logps(prompts, padded)[:, 2:] == 0).all()
    assert_close(policy.logps(prompts, padded), policy.logps(prompts, short), rtol=0, atol=1e-13)


def test_rows_do_not_depend_on_the_batch(generator):
    policy = transformer((3, 7, 5, 6, 2, 4, 32), torch.float64, generator)
    prompts, completions = random_rows(policy, 12, generator)
    together = policy.logps(prompts, completions)
    alone = torch.cat([policy.logps(prompts[[i]], completions[[i]]) for i in range(12)])
    assert_close(together, alone, rtol=0, atol=1e-12)


def test_the_future_is_not_read(generator):
    policy = transformer((3, 7, 5, None, 2, 4, 32), torch.float64, generator)
    prompts, completions = random_rows(policy, 12, generator)
    changed = completions.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    before = policy.token_logps(prompts, completions)
    after = policy.token_logps(prompts, changed)
    assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-13)
    assert (before[:, 3:] != after[:, 3:]).all()


def test_the_same_seed_gives_the_same_weights():
    def weights(seed):
        generator = torch.Generator().manual_seed(seed)
        policy = TinyTransformer(2, 5, 3, end_token=0, generator=generator)
        return torch.cat([parameter.flatten() for parameter in policy.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_initial_weights_have_the_spread_of_gpt2(generator):
    policy = TinyTransformer(2, 50, 8, end_token=0, generator=generator, n_layers=4, width=64)
    c_fc, c_proj = policy.blocks[1].c_fc.weight, policy.blocks[1].c_proj.weight
    assert c_fc.numel() == c_proj.numel() == 16384  # so a standard deviation is good to 1 %
    assert abs(c_fc.std() / 0.02 - 1) < 0.03
    assert abs(c_proj.std() / (0.02 / 8**0.5) - 1) < 0.03
    assert (policy.blocks[1].c_fc.bias == 0).all()
    assert (policy.ln_f.weight == 1).all()


def test_global_random_state_is_neither_read_nor_moved(generator):
    torch.manual_seed(1)
    first = TinyTransformer(2, 5, 3, end_token=0, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    second = TinyTransformer(2, 5, 3, end_token=0, generator=torch.Generator().manual_seed(7))
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)
    state = torch.get_rng_state()
    policy = TinyTransformer(2, 5, 3, end_token=0, generator=generator)
    policy.logps(torch.tensor([0]), torch.tensor([[1, 0, PAD]]))
    assert torch.equal(torch.get_rng_state(), state)


def test_for_task_takes_the_sizes_of_the_task(generator):
    class Sizes:
        prompts, vocab_size, max_tokens, end_token = torch.arange(4), 6, 3, 2

    policy = TinyTransformer.for_task(Sizes, generator=generator, n_layers=1, n_heads=2, width=8)
    assert (policy.n_prompts, policy.vocab_size) == (4, 6)
    assert (policy.max_tokens, policy.end_token) == (3, 2)
    assert (len(policy.blocks), policy.wte.weight.shape) == (1, (10, 8))


# --- TabularPolicy ---------------------------------------------------------------------------


def test_tabular_policy_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    policy = TabularPolicy((7 * probs).log())  # a constant factor is no matter
    prompts, completions = torch.tensor([0, 1, 1]), torch.tensor([[1], [2], [0]])
    want = torch.tensor([0.3, 0.8, 0.1], dtype=torch.float64).log()
    assert_close(policy.logps(prompts, completions), want, rtol=1e-14, atol=1e-14)
    assert_close(policy.token_logps(prompts, completions)[:, 0], want, rtol=1e-14, atol=1e-14)
    assert (policy.max_tokens, policy.end_token, policy.vocab_size) == (1, None, 3)


def test_tabular_policy_gradient_by_hand():
    # d log p_1 / d logits = one_hot(1) - p
    probs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    policy = TabularPolicy(probs.log())
    policy.logps(torch.tensor([0]), torch.tensor([[1]])).sum().backward()
    want = torch.tensor([[-0.5, 0.7, -0.2]], dtype=torch.float64)
    assert_close(policy.logits.grad, want, rtol=1e-14, atol=1e-14)


def test_tabular_policy_copies_its_logits():
    logits = torch.zeros(1, 3)
    policy = TabularPolicy(logits)
    with torch.no_grad():
        policy.logits += 1
    assert (logits == 0).all()


# --- bad input -------------------------------------------------------------------------------

BAD_ROWS = {
    "token outside the vocabulary": ([0], [[5, 0, PAD]], "completions: got token 5"),
    "token below padding": ([0], [[1, -2, 0]], "completions: got token -2"),
    "token after the end": ([0], [[1, 0, 2]], "completions: got a token after the end token 0"),
    "token after padding": ([0], [[1, PAD, 2]], "completions: got a token after padding"),
    "empty completion": ([0, 1], [[1, 0], [PAD, PAD]], "completions: got an empty .* row 1"),
    "no rows": ([0], torch.zeros(0, 3, dtype=torch.int64), "completions: got shape"),
    "too many tokens": ([0], [[1, 2, 3, 4]], "completions: got 4 tokens, takes at most 3"),
    "prompt too large": ([2], [[1, 0]], "prompts: got 2"),
    "prompt negative": ([-1], [[1, 0]], "prompts: got -1"),
    "fewer prompts": ([0], [[1, 0], [2, 0]], "completions: got 2 rows, takes 1 like prompts"),
    "prompts as a column": ([[0]], [[1, 0]], r"prompts: got shape \[1, 1\]"),
    "prompts as floats": (
        [0.0],
        [[1, 0]],
        r"`prompts` must have dtype torch.int64 \(.long\(\)\), got torch.float",
    ),
    "completions as floats": (
        [0],
        [[1.0, 0.0]],
        r"`completions` must have dtype torch.int64 \(.long\(\)\), got torch.float",
    ),
    "completions flat": ([0], [1, 0], r"completions: got shape \[2\]"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_scoring_refuses(case, generator):
    prompts, completions, message = BAD_ROWS[case]
    policy = TinyTransformer(2, 5, 3, end_token=0, generator=generator)
    for score in (policy.token_logps, policy.logps):
        with pytest.raises(ValueError, match=f"^{message}"):
            score(torch.tensor(prompts), torch.as_tensor(completions))


def test_scoring_refuses_lists(generator):
    policy = TinyTransformer(2, 5, 3, end_token=0, generator=generator)
    with pytest.raises(TypeError, match="^prompts: got list"):
        policy.logps([0], torch.tensor([[1, 0]]))
    with pytest.raises(TypeError, match="^completions: got list"):
        policy.logps(torch.tensor([0]), [[1, 0]])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"width": 30}, ValueError),
        ({"width": 0}, ValueError),
        ({"width": 32.0}, TypeError),
        ({"n_heads": 0}, ValueError),
        ({"n_layers": 0}, ValueError),
        ({"n_layers": True}, TypeError),
        ({"n_prompts": 0}, ValueError),
        ({"vocab_size": -3}, ValueError),
        ({"max_tokens": 0}, ValueError),
        ({"end_token": 5}, ValueError),
        ({"end_token": -1}, ValueError),
        ({"end_token": 1.0}, TypeError),
        ({"generator": None}, TypeError),
        ({"generator": 7}, TypeError),
    ],
)
def test_transformer_refuses(change, error, generator):
    sizes = {"n_prompts": 2, "vocab_size": 5, "max_tokens": 3, "end_token": 0, "n_heads": 4}
    with pytest.raises(error, match=f"^{next(iter(change))}: got"):
        TinyTransformer(**{**sizes, "generator": generator, **change})


@pytest.mark.parametrize(
    ("logits", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(0, 3), ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError),
        (torch.tensor([[0.0, float("nan")]]), ValueError),
        (torch.tensor([[0.0, float("-inf")]]), ValueError),
        ([[0.0, 1.0]], TypeError),
    ],
)
def test_tabular_policy_refuses(logits, error):
    with pytest.raises(error, match="^`?logits`?"):
        TabularPolicy(logits)


# --- heads -----------------------------------------------------------------------------------

WIDE = (3, 7, 5, 6, 2, 4, 32)


def with_random_head(model, head, generator):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
    return model


def head_after_each_token(body, head, prompts, completions):
    """The other route: a plain forward pass, whose last layer norm a hook overhears; `[B, S]`."""
    heard = []
    hook = body.ln_f.register_forward_hook(lambda _, inputs, hidden: heard.append(hidden))
    body(torch.cat([prompts[:, None], completions], dim=1))
    hook.remove()
    return (heard[0] * head.weight).sum(-1) + head.bias


def one_by_one(model, prompts, completions):
    """Outputs after the prompt and after each token, `[B, T + 1, K]`, read along one path a row."""
    outputs, path = model.begin(prompts)
    read = [outputs]
    for tokens in completions.T:
        outputs, own = model.extend(tokens[:, None], path)
        path = [
            (torch.cat([k, own_k], 2), torch.cat([v, own_v], 2))
            for (k, v), (own_k, own_v) in zip(path, own, strict=True)
        ]
        read.append(outputs[:, 0])
    return torch.stack(read, dim=1)


def in_one_pass(model, prompts, completions):
    """The same from a tree that is given as it is: a row's prefixes shared with no other row."""
    n_rows, n_steps = len(prompts), completions.shape[1] + 1
    nodes = torch.arange(n_rows * n_steps).view(n_rows, n_steps)  # row by row
    tree = PrefixTree(
        tokens=torch.cat([prompts[:, None], completions], dim=1).flatten(),
        depths=torch.arange(n_steps).repeat(n_rows),
        lineage=nodes.repeat_interleave(n_steps, dim=0),  # beyond its depth: later nodes, unread
        nodes=nodes,
    )
    return model.read_tree(tree)[nodes]


def test_a_scalar_is_read_off_the_last_layer_norm(generator):
    body = transformer(WIDE, torch.float64, generator)
    model = ScalarTransformer(body)
    with_random_head(model, model.head, generator)
    prompts = torch.tensor([0, 2, 1])
    tokens = torch.randint(6, (3, 4), generator=generator)
    want = head_after_each_token(body, model.head, prompts, tokens)
    assert want.std() > 0.1
    for read in (one_by_one, in_one_pass):
        assert_close(read(model, prompts, tokens)[..., 0], want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_read_in_one_pass_is_a_plain_forward_pass(shape, generator):
    policy = transformer(shape, torch.float64, generator)
    prompts = torch.randint(policy.n_prompts, (6,), generator=generator)
    tokens = torch.randint(policy.vocab_size, (6, policy.max_tokens - 1), generator=generator)
    want = policy(torch.cat([prompts[:, None], tokens], dim=1))
    assert_close(in_one_pass(policy, prompts, tokens), want, atol=1e-10, rtol=0)


def test_a_shared_trunk_adds_a_value_and_leaves_the_logits(generator):
    policy = transformer(WIDE, torch.float64, generator)
    model = SharedTrunk(policy)
    with_random_head(model, model.value_head, generator)
    prompts = torch.tensor([0, 2, 1])
    tokens = torch.randint(6, (3, 4), generator=generator)
    read = in_one_pass(model, prompts, tokens)
    logits = policy(torch.cat([prompts[:, None], tokens], dim=1))
    values = head_after_each_token(policy, model.value_head, prompts, tokens)
    assert_close(read, torch.cat([logits, values[..., None]], -1), atol=1e-12, rtol=0)


def test_separate_networks_are_read_side_by_side(generator):
    policy = transformer(WIDE, torch.float64, generator)
    body = transformer((3, 7, 5, 6, 1, 2, 8), torch.float64, generator)  # of another shape
    model = SeparateNetworks(policy, ScalarTransformer(body))
    with_random_head(model, model.critic.head, generator)
    prompts = torch.tensor([0, 2, 1])
    tokens = torch.randint(6, (3, 4), generator=generator)
    read = in_one_pass(model, prompts, tokens)
    logits = policy(torch.cat([prompts[:, None], tokens], dim=1))
    values = head_after_each_token(body, model.critic.head, prompts, tokens)
    assert_close(read, torch.cat([logits, values[..., None]], -1), atol=1e-12, rtol=0)


def test_a_value_moves_the_policy_in_a_shared_trunk_only(generator):
    prompts = torch.tensor([0, 2, 1])
    tokens = torch.randint(6, (3, 4), generator=generator)
    for shared in (True, False):
        policy = transformer(WIDE, torch.float64, generator)
        if shared:
            model = SharedTrunk(policy)
            with_random_head(model, model.value_head, generator)
        else:
            model = SeparateNetworks(
                policy, ScalarTransformer(transformer(WIDE, torch.float64, generator))
            )
            with_random_head(model, model.critic.head, generator)
        in_one_pass(model, prompts, tokens)[..., -1].sum().backward()
        moved = [
            parameter.grad is not None and parameter.grad.abs().max() > 0
            for parameter in policy.parameters()
        ]
        assert all(moved) if shared else not any(moved)


def test_a_bandit_reads_its_values_off_a_table(generator):
    logits = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    values = torch.randn(3, 1, dtype=torch.float64, generator=generator)
    model = SeparateNetworks(TabularPolicy(logits), TabularPolicy(values))
    outputs = in_one_pass(model, torch.tensor([2, 0]), torch.empty(2, 0, dtype=torch.int64))
    assert_close(outputs[:, 0], torch.cat([logits, values], 1)[[2, 0]], atol=0, rtol=0)


def test_heads_start_at_zero_and_take_dtype_of_their_body(generator):
    state = torch.get_rng_state()
    body = transformer(WIDE, torch.float64, generator)
    heads = [ScalarTransformer(body).head, SharedTrunk(body).value_head]
    for head in heads:
        assert head.weight.dtype == torch.float64
        assert head.weight.shape == (1, 32)
        assert not head.weight.any()
        assert not head.bias.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_reward_model_reads_one_token_more_than_a_policy(generator):
    class Sizes:
        prompts, vocab_size, max_tokens, end_token = torch.arange(3), 7, 4, 6

    model = RewardModel.for_task(Sizes, generator=generator, n_layers=1, n_heads=2, width=8)
    got = (model.n_prompts, model.vocab_size, model.max_tokens, model.end_token)
    assert got == (3, 7, 4, 6)
    assert model.body.max_tokens == 5
    numbers = one_by_one(model, torch.tensor([1]), torch.tensor([[0, 1, 2, 3]]))
    assert numbers.shape == (1, 5, 1)
    assert not numbers.any()


def test_centring_takes_off_the_mean_every_time(generator):
    model = RewardModel(transformer(WIDE, torch.float64, generator))
    with_random_head(model, model.head, generator)
    prompts, tokens = torch.tensor([0, 2]), torch.tensor([[1], [3]])
    before = one_by_one(model, prompts, tokens)[:, 1, 0].detach()
    for _ in range(2):
        model.centre(one_by_one(model, prompts, tokens)[:, 1, 0])
        for read in (one_by_one, in_one_pass):
            after = read(model, prompts, tokens)[:, 1, 0].detach()
            assert_close(after, before - before.mean(), atol=1e-12, rtol=0)
    assert "offset" in model.state_dict()
    for bad, want in (
        (torch.tensor([float("nan")]), "rewards: got nan, takes finite values"),
        (torch.zeros(0), r"rewards: got shape \[0\], takes a non-empty \[n\]"),
    ):
        with pytest.raises(ValueError, match=want):
            model.centre(bad)


def test_shared_storage_is_seen_through_views_and_copies():
    table = TabularPolicy(torch.zeros(3, 4))
    view, copied = TabularPolicy(torch.zeros(1, 4)), TabularPolicy(table.logits)
    view.logits = torch.nn.Parameter(table.logits.data[1:2])
    assert shares_storage(table, table)
    assert shares_storage(table, view)
    assert shares_storage(view, table)
    assert not shares_storage(table, copied)
    with pytest.raises(ValueError, match="critic: got weights of the policy, takes a network of"):
        SeparateNetworks(table, view)

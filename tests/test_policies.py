"""The policies against `transformers`' GPT-2 with the same weights, and against bad input."""

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from dpo_mini.logps import PAD
from dpo_mini.policies import (
    PrefixTree,
    RewardModel,
    ScalarTransformer,
    SeparateNetworks,
    SharedTrunk,
    TabularPolicy,
    TinyTransformer,
)
from dpo_mini.policies.base import shares_storage
from dpo_mini.rollout.kv_cache import begin, extend, lengthen
from dpo_mini.rollout.trees import read_tree

SHAPES = [
    # X, V, T, end token, layers, heads, width
    (1, 5, 4, 0, 1, 1, 8),
    (3, 7, 5, 6, 2, 4, 32),
    (2, 16, 5, None, 2, 4, 64),
    (4, 12, 1, 3, 3, 2, 12),
]
DTYPES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
N_READ = [None, 1, 3, 4]  # tokens of a prompt; None: the one that stands for it by default


def spelled(shape, n_read, generator):
    """The tokens of each prompt, `[X, n_read]`; some occur in completions, some do not."""
    n_prompts, vocab_size = shape[:2]
    return torch.randint(vocab_size + 3, (n_prompts, n_read), generator=generator)


def transformer(shape, dtype, generator, prompt_tokens=None):
    """A policy whose weights are far from their small initial values, so that mistakes show."""
    n_prompts, vocab_size, max_tokens, end_token, n_layers, n_heads, width = shape
    policy = TinyTransformer(
        n_prompts,
        vocab_size,
        max_tokens,
        end_token=end_token,
        prompt_tokens=prompt_tokens,
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
        vocab_size=policy.wte.num_embeddings,
        n_positions=policy.wpe.num_embeddings,
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


def policy_and_oracle(shape, n_read, dtype, generator):
    """A policy, `transformers`' GPT-2 with its weights, and the tokens of each prompt."""
    read = None if n_read is None else spelled(shape, n_read, generator)
    policy = transformer(shape, dtype, generator, read)
    if read is None:
        read = shape[1] + torch.arange(shape[0])[:, None]
    return policy, gpt2_with_weights_of(policy), read


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("n_read", N_READ)
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_is_gpt2(shape, n_read, dtype, tolerance, generator):
    policy, oracle, read = policy_and_oracle(shape, n_read, dtype, generator)
    prompts = torch.randint(policy.n_prompts, (9,), generator=generator)
    inner = (9, policy.max_tokens - 1)
    completions = torch.randint(policy.vocab_size, inner, generator=generator)
    with torch.no_grad():
        logits = policy(torch.cat([prompts[:, None], completions], 1))
        whole = oracle(torch.cat([read[prompts], completions], 1)).logits
    want = whole[:, read.shape[1] - 1 :, : policy.vocab_size]
    assert logits.shape == (9, policy.max_tokens, policy.vocab_size)
    assert logits.std() > 0.1
    assert (logits - want).abs().max() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("n_read", N_READ)
@pytest.mark.parametrize("shape", SHAPES)
def test_token_logps_are_those_of_gpt2(shape, n_read, dtype, tolerance, generator):
    policy, oracle, read = policy_and_oracle(shape, n_read, dtype, generator)
    prompts, completions = random_rows(policy, 40, generator)
    with torch.no_grad():
        got = policy.token_logps(prompts, completions)
        totals = policy.logps(prompts, completions)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            tokens = completion[completion != PAD]  # one row at a time: no padding to get wrong
            logits = oracle(torch.cat([read[prompt], tokens[:-1]])[None]).logits[0]
            logps = logits[read.shape[1] - 1 :, : policy.vocab_size].log_softmax(-1)
            want = logps.gather(1, tokens[:, None]).squeeze(1)
            assert (got[row, : len(tokens)] - want).abs().max() < tolerance
            assert (got[row, len(tokens) :] == 0).all()
            assert (totals[row] - want.sum()).abs() < policy.max_tokens * tolerance


# --- a prompt of several tokens ----------------------------------------------------------------


def test_a_prompt_is_read_token_by_token(generator):
    """Two prompts that differ in one token: what they say differs after it."""
    shape, read = (3, 7, 5, None, 2, 4, 32), torch.tensor([[0, 1, 2], [0, 5, 2], [0, 1, 2]])
    policy = transformer(shape, torch.float64, generator, read)
    first, second, same = policy(torch.tensor([[0, 3, 4], [1, 3, 4], [2, 3, 4]]))
    assert_close(first, same, rtol=0, atol=1e-13)
    assert (first - second).abs().min() > 0


def test_the_tokens_of_a_prompt_are_those_of_completions(generator):
    """[3, 1, 4] as a prompt, and 3 as a prompt that has been answered with 1 and 4."""
    shape, weights = (1, 7, 5, None, 2, 4, 32), torch.Generator().manual_seed(5)
    long = transformer(shape, torch.float64, weights, torch.tensor([[3, 1, 4]]))
    short = TinyTransformer(
        *(1, 7, 7), end_token=None, prompt_tokens=torch.tensor([[3]]), generator=generator
    ).double()
    short.load_state_dict(long.state_dict())
    after_long = long(torch.tensor([[0, 2, 6]]))
    after_short = short(torch.tensor([[0, 1, 4, 2, 6]]))
    assert_close(after_long, after_short[:, 2:], rtol=0, atol=1e-13)


def test_there_is_an_embedding_for_each_token_that_is_read(generator):
    for highest, n_embeddings in ((3, 7), (6, 7), (7, 8), (11, 12)):
        read = torch.tensor([[0, 1], [2, highest]])
        policy = transformer((2, 7, 5, 6, 2, 4, 32), torch.float64, generator, read)
        assert policy.wte.num_embeddings == n_embeddings
        assert policy.wpe.num_embeddings == 2 + 4  # the last token of a completion is not read
        assert policy(torch.tensor([[1, 0]])).shape == (1, 2, 7)


def test_the_tokens_of_prompts_are_no_weights(generator):
    """A state dict has weights alone, and what is read is copied, so nobody can change it."""
    read = torch.tensor([[0, 1], [2, 3]])
    policy = transformer((2, 7, 5, 6, 1, 2, 8), torch.float64, generator, read)
    before = policy(torch.tensor([[1, 0]]))
    read[1] = 6
    assert torch.equal(policy(torch.tensor([[1, 0]])), before)
    assert set(policy.state_dict()) == {name for name, _ in policy.named_parameters()}
    assert policy.float().prompt_tokens.dtype == torch.int64


# --- torch.func --------------------------------------------------------------------------------


@pytest.mark.parametrize("n_read", N_READ)
def test_gradients_of_each_sample_are_those_of_autograd(n_read, generator):
    """`grad`, `functional_call` and `vmap` over rows, beside one backward pass per row."""
    shape = (3, 7, 5, None, 2, 4, 32)
    read = None if n_read is None else spelled(shape, n_read, generator)
    policy = transformer(shape, torch.float64, generator, read)
    weights = dict(policy.named_parameters())
    prompts, completions = random_rows(policy, 6, generator)
    rows = torch.cat([prompts[:, None], completions], dim=1)

    def score(weights, row):
        logps = functional_call(policy, weights, (row[None, :-1],)).log_softmax(-1)
        return logps[0].gather(1, row[1:, None]).sum()

    values = vmap(score, in_dims=(None, 0))(weights, rows)
    together = vmap(grad(score), in_dims=(None, 0))(weights, rows)
    assert_close(values, policy.logps(prompts, completions), rtol=0, atol=1e-12)
    for row in range(6):
        alone = grad(score)(weights, rows[row])
        logps = policy.logps(prompts[[row]], completions[[row]])
        want = torch.autograd.grad(logps.squeeze(), list(weights.values()))
        assert max(slope.abs().max() for slope in want) > 0.1
        for name, slope in zip(weights, want, strict=True):
            assert_close(together[name][row], slope, rtol=0, atol=1e-12)
            assert_close(alone[name], slope, rtol=0, atol=1e-12)


def test_logps_of_a_policy_can_be_differentiated_by_its_weights_as_a_dictionary(generator):
    policy = transformer((3, 7, 5, 6, 2, 4, 32), torch.float64, generator)
    prompts, completions = random_rows(policy, 6, generator)

    class Logps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self):
            return self.policy.logps(prompts, completions).sum()

    module = Logps()
    weights = dict(module.named_parameters())
    slopes = grad(lambda weights: functional_call(module, weights, ()))(weights)
    want = torch.autograd.grad(policy.logps(prompts, completions).sum(), list(weights.values()))
    for slope, other in zip(slopes.values(), want, strict=True):
        assert_close(slope, other, rtol=0, atol=1e-12)


# --- rows ----------------------------------------------------------------------------------------


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
    assert policy.prompt_tokens.tolist() == [[6], [7], [8], [9]]
    assert policy.wpe.weight.shape == (3, 8)


def test_for_task_takes_the_prompts_of_the_task(generator):
    class Sizes:
        prompts, vocab_size, max_tokens, end_token = torch.arange(2), 6, 3, 2
        prompt_tokens = torch.tensor([[0, 1, 7, 5], [7, 1, 0, 5]])

    policy = TinyTransformer.for_task(Sizes, generator=generator, n_layers=1, n_heads=2, width=8)
    model = RewardModel.for_task(Sizes, generator=generator, n_layers=1, n_heads=2, width=8)
    for body, n_positions in ((policy, 6), (model.body, 7)):
        assert torch.equal(body.prompt_tokens, Sizes.prompt_tokens)
        assert body.wte.weight.shape == (8, 8)
        assert body.wpe.weight.shape == (n_positions, 8)
    assert model.max_tokens == 3


# --- TabularPolicy ---------------------------------------------------------------------------


def test_a_policy_says_its_sizes(generator):
    sizes = "n_prompts=1, vocab_size=4, max_tokens=1, end_token=None"
    assert repr(TabularPolicy(torch.zeros(1, 4))) == f"TabularPolicy({sizes})"
    policy = TinyTransformer(1, 4, 1, end_token=None, generator=generator)
    assert sizes in repr(policy)
    assert "SelfAttention" in repr(policy)


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
    "token outside the vocabulary": (
        [0],
        [[5, 0, PAD]],
        r"`completions` must have tokens in 0\.\.4, got 5",
    ),
    "token below padding": ([0], [[1, -2, 0]], r"`completions` must have tokens in 0\.\.4, got -2"),
    "token after the end": (
        [0],
        [[1, 0, 2]],
        "`completions` must .* after the end token 0, got a token",
    ),
    "token after padding": (
        [0],
        [[1, PAD, 2]],
        "`completions` must have padding .*, got a token after it",
    ),
    "empty completion": (
        [0, 1],
        [[1, 0], [PAD, PAD]],
        "`completions` must have at least one .* row 1",
    ),
    "no rows": ([0], torch.zeros(0, 3, dtype=torch.int64), "`completions` must be a non-empty"),
    "too many tokens": ([0], [[1, 2, 3, 4]], "`completions` must have at most 3 tokens, got 4"),
    "prompt too large": ([2], [[1, 0]], r"`prompts` must be in 0\.\.1, got 2"),
    "prompt negative": ([-1], [[1, 0]], r"`prompts` must be in 0\.\.1, got -1"),
    "fewer prompts": ([0], [[1, 0], [2, 0]], "`completions` must have 1 row like `prompts`, got 2"),
    "prompts as a column": (
        [[0]],
        [[1, 0]],
        r"`prompts` must be a non-empty \[B\], got shape \[1, 1\]",
    ),
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
    "completions flat": ([0], [1, 0], r"`completions` must be .*, got shape \[2\]"),
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
    with pytest.raises(TypeError, match="^`prompts` must be .*, got list"):
        policy.logps([0], torch.tensor([[1, 0]]))
    with pytest.raises(TypeError, match="^`completions` must be .*, got list"):
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
    with pytest.raises(error, match=f"^`{next(iter(change))}` must be .*, got"):
        TinyTransformer(**{**sizes, "generator": generator, **change})


@pytest.mark.parametrize(
    ("read", "error", "message"),
    [
        ([[0, 1]], TypeError, "`prompt_tokens` must be .*, got list"),
        (torch.zeros(2, 3), ValueError, "`prompt_tokens` must have dtype torch.int64"),
        (torch.tensor([0, 1]), ValueError, r"`prompt_tokens` must be .*, got shape \[2\]"),
        (
            torch.zeros(2, 0, dtype=torch.int64),
            ValueError,
            r"`prompt_tokens` must be .*, got shape \[2, 0\]",
        ),
        (
            torch.tensor([[0, 1], [1, 2], [3, 4]]),
            ValueError,
            r"`prompt_tokens` must be \[2, P\] with tokens >= 0, got \[3, 2\] with a least .* 0$",
        ),
        (
            torch.tensor([[0, 1], [PAD, 2]]),
            ValueError,
            r"`prompt_tokens` must be \[2, P\] with tokens >= 0, got \[2, 2\] with a least .* -1$",
        ),
    ],
)
def test_a_transformer_refuses_prompts_that_it_cannot_read(read, error, message, generator):
    with pytest.raises(error, match=f"^{message}"):
        TinyTransformer(2, 5, 3, end_token=0, prompt_tokens=read, generator=generator)


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
    """Outputs after the prompt and after each token, `[B, T + 1, K]`, with a cache per row."""
    outputs, cache = begin(model, prompts)
    read = [outputs]
    for tokens in completions.T:
        outputs, own = extend(model, tokens[:, None], cache)
        cache = lengthen(cache, own)
        read.append(outputs[:, 0])
    return torch.stack(read, dim=1)


def in_one_pass(model, prompts, completions):
    """The same from a tree that is given as it is: a row's prefixes shared with no other row."""
    n_rows, n_steps = len(prompts), completions.shape[1] + 1
    nodes = torch.arange(n_rows * n_steps).view(n_steps, n_rows).T  # prompts first
    tree = PrefixTree(
        tokens=torch.cat([prompts[:, None], completions], dim=1).T.flatten(),
        depths=torch.arange(n_steps).repeat_interleave(n_rows),
        ancestors=nodes.repeat(n_steps, 1),  # behind its depth: later nodes, unread
        nodes=nodes,
    )
    return read_tree(model, tree)[nodes]


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
        (torch.tensor([float("nan")]), "`rewards` must be finite, got nan"),
        (torch.zeros(0), r"`rewards` must be a non-empty \[n\], got shape \[0\]"),
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
    with pytest.raises(ValueError, match="`critic` must have weights of its own"):
        SeparateNetworks(table, view)

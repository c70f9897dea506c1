import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_mini import _arguments as arguments

ONE = torch.ones(2)
NAN, INF = float("nan"), float("inf")
KINDS = ("NoneType", "Tensor", "bool", "float", "int", "list", "str")

REFUSED = [
    (lambda: arguments.check_positive("beta", 0), "`beta` must be a finite number > 0, got 0"),
    (
        lambda: arguments.check_positive("beta", -1.0),
        "`beta` must be a finite number > 0, got -1.0",
    ),
    (lambda: arguments.check_positive("beta", NAN), "`beta` must be a finite number > 0, got nan"),
    (lambda: arguments.check_positive("beta", INF), "`beta` must be a finite number > 0, got inf"),
    (lambda: arguments.check_positive("beta", "1"), "`beta` must be a number, got str"),
    (lambda: arguments.check_positive("beta", True), "`beta` must be a number, got bool"),
    (lambda: arguments.check_positive("beta", ONE), "`beta` must be a number, got Tensor"),
    (
        lambda: arguments.check_between("e", 0.5, 0, 0.5),
        "`e` must be a number in [0, 0.5), got 0.5",
    ),
    (
        lambda: arguments.check_between("e", -0.1, 0, 0.5),
        "`e` must be a number in [0, 0.5), got -0.1",
    ),
    (
        lambda: arguments.check_between("e", NAN, 0, 0.5),
        "`e` must be a number in [0, 0.5), got nan",
    ),
    (lambda: arguments.check_between("e", None, 0, 1), "`e` must be a number, got NoneType"),
    (lambda: arguments.check_fraction("lam", -0.1), "`lam` must be a number in [0, 1], got -0.1"),
    (lambda: arguments.check_fraction("lam", 1.1), "`lam` must be a number in [0, 1], got 1.1"),
    (lambda: arguments.check_fraction("lam", NAN), "`lam` must be a number in [0, 1], got nan"),
    (lambda: arguments.check_fraction("lam", None), "`lam` must be a number, got NoneType"),
    (lambda: arguments.check_count("n", 0), "`n` must be a whole number >= 1, got 0"),
    (lambda: arguments.check_count("n", 1, least=2), "`n` must be a whole number >= 2, got 1"),
    (lambda: arguments.check_count("n", 1.0), "`n` must be a whole number >= 1, got float"),
    (lambda: arguments.check_count("n", True), "`n` must be a whole number >= 1, got bool"),
    (
        lambda: arguments.check_generator(None),
        "`generator` must be a torch.Generator, got NoneType",
    ),
    (lambda: arguments.check_generator(0), "`generator` must be a torch.Generator, got int"),
    (
        lambda: arguments.check_floats("[B]", a=[1.0]),
        "`a` must be a floating torch.Tensor [B], got list",
    ),
    (
        lambda: arguments.check_floats("[B]", a=ONE, b=None),
        "`b` must be a floating torch.Tensor [B], got NoneType",
    ),
    (
        lambda: arguments.check_floats("[B]", a=torch.ones(2, dtype=torch.int64)),
        "`a` must have a floating dtype (.double() makes one), got torch.int64",
    ),
    (
        lambda: arguments.check_floats("[X, Y]", a=ONE),
        "`a` must be [X, Y], one row per prompt, got shape [2]: for one prompt write a[None]",
    ),
    (
        lambda: arguments.check_floats("[B]", a=torch.ones(2, 2)),
        "`a` must be a non-empty [B], got shape [2, 2]",
    ),
    (
        lambda: arguments.check_floats("[...]", a=torch.ones(2, 0)),
        "`a` must be a non-empty [...], got shape [2, 0]",
    ),
    (
        lambda: arguments.check_floats("[B]", a=ONE, b=torch.ones(3)),
        "`b` must have shape [2] like `a`, got [3]",
    ),
    (
        lambda: arguments.check_floats("[B]", a=ONE, b=ONE.double()),
        "`b` must have dtype torch.float32 like `a`, got torch.float64: write b.to(torch.float32)",
    ),
    (
        lambda: arguments.check_floats("[B]", a=ONE, b=torch.ones(2, device="meta")),
        "`b` must have device cpu like `a`, got meta: write b.to('cpu')",
    ),
    (
        lambda: arguments.check_logps(a=ONE, b=torch.tensor([0.0, NAN])),
        "`b` must be log-probabilities < inf, got NaN",
    ),
    (
        lambda: arguments.check_logps(a=torch.tensor([0.0, INF])),
        "`a` must be log-probabilities < inf, got +inf",
    ),
    (lambda: arguments.check_finite(a=torch.tensor([NAN])), "`a` must be finite, got nan"),
    (lambda: arguments.check_finite(a=torch.tensor([1, INF])), "`a` must be finite, got inf"),
    (lambda: arguments.check_finite(a=ONE, b=-INF * ONE), "`b` must be finite, got -inf"),
    (
        lambda: arguments.check_normalised(a=torch.tensor([[0.5, 0.5], [0.5, 0.25]]).log()),
        "`a` must have rows whose probabilities sum to 1, got a sum of 0.75: "
        "if these are logits, apply log_softmax first",
    ),
    (
        lambda: arguments.check_normalised(a=torch.tensor([[1.0, 0.5], [0.5, 0.5]]).log()),
        "`a` must have rows whose probabilities sum to 1, got a sum of 1.5: "
        "if these are logits, apply log_softmax first",
    ),
    (
        lambda: arguments.check_normalised(a=torch.tensor([[-INF, -INF]])),
        "`a` must have rows whose probabilities sum to 1, got a sum of 0: "
        "if these are logits, apply log_softmax first",
    ),
    (
        lambda: arguments.check_indices("i", torch.tensor([0, 3]), "[B]", 3),
        "`i` must be in 0..2, got 3",
    ),
    (
        lambda: arguments.check_indices("i", torch.tensor([-1, 0]), "[B]", 3),
        "`i` must be in 0..2, got -1",
    ),
    (
        lambda: arguments.check_integers("i", [0], "[B]"),
        "`i` must be an int64 tensor [B], got list",
    ),
    (
        lambda: arguments.check_integers("i", ONE, "[B]"),
        "`i` must have dtype torch.int64 (.long()), got torch.float32",
    ),
    (
        lambda: arguments.check_integers("i", torch.tensor([[0]]), "[B]"),
        "`i` must be a non-empty [B], got shape [1, 1]",
    ),
    (
        lambda: arguments.check_integers("i", torch.empty(0, dtype=torch.int64), "[B]"),
        "`i` must be a non-empty [B], got shape [0]",
    ),
    (
        lambda: arguments.check_rows("a", ONE, b=torch.ones(3, 2)),
        "`b` must have 2 rows like `a`, got 3",
    ),
    (lambda: arguments.check_rows("a", [1.0], b=ONE), "`a` must be a torch.Tensor, got list"),
    (lambda: arguments.check_rows("a", ONE, b=None), "`b` must be a torch.Tensor, got NoneType"),
    (
        lambda: arguments.check_rows("a", torch.ones(0), b=ONE),
        "`a` must have at least one row, got shape [0]",
    ),
    (
        lambda: arguments.check_rows("a", torch.tensor(1.0)),
        "`a` must have at least one row, got shape []",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused_is_named(call, message):
    wrong_kind = any(message.endswith(f"got {kind}") for kind in KINDS)
    with pytest.raises(TypeError if wrong_kind else ValueError) as refusal:
        call()
    assert str(refusal.value) == message


def test_what_is_right_passes():
    arguments.check_positive("beta", 1e-300)
    arguments.check_positive("beta", 1)
    arguments.check_positive("beta", np.float32(0.5))
    arguments.check_between("e", 0, 0, 0.5)
    arguments.check_fraction("lam", 0)
    arguments.check_fraction("lam", 1.0)
    arguments.check_count("n", 1)
    arguments.check_count("n", np.int64(2), least=2)
    arguments.check_generator(torch.Generator())
    arguments.check_floats("[B]", a=ONE, b=ONE)
    arguments.check_floats("[...]", a=torch.ones(2, 3, 4), b=torch.ones(2, 3, 4))
    arguments.check_logps(a=torch.tensor([-INF, 0.0]))
    arguments.check_finite(a=ONE)
    arguments.check_normalised(a=torch.tensor([[0.25, 0.75, 0.0]]).log())
    arguments.check_indices("i", torch.tensor([0, 2]), "[B]", 3)
    arguments.check_integers("i", torch.tensor([[-5, 9]]), "[B, T]")
    arguments.check_rows("a", ONE, b=torch.ones(2, 5))


def test_a_large_float32_table_is_not_mistaken_for_logits(generator):
    table = torch.randn(2, 200_000, generator=generator).mul(3).log_softmax(-1)
    arguments.check_normalised(table=table)


def test_as_bool_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    assert arguments.as_bool_mask("mask", mask, mask.shape) is not None
    assert torch.equal(arguments.as_bool_mask("mask", mask.float(), mask.shape), mask)
    with pytest.raises(ValueError) as caught:
        arguments.as_bool_mask("mask", mask, torch.Size([5, 2]))
    assert str(caught.value) == "`mask` must have shape [5, 2], got [2, 5]"


# --- numbers that no float or int64 holds ------------------------------------------------------


@pytest.mark.parametrize("check", [arguments.check_positive, arguments.check_number])
def test_a_number_that_no_float_holds_is_a_value_error(check):
    with pytest.raises(ValueError, match="beta.*a finite number|got 1,000,.*a finite"):
        check("beta", 10**400)
    with pytest.raises(ValueError, match="16,610 bits"):  # more digits than Python writes out
        check("beta", 10**5000)


def test_a_number_is_finite_and_real():
    arguments.check_number("alpha", -2)
    for value, kind in ((None, TypeError), ("1", TypeError), (True, TypeError), (NAN, ValueError)):
        with pytest.raises(kind, match="alpha"):
            arguments.check_number("alpha", value)


def test_a_count_fits_an_int64():
    arguments.check_count("n", 2**63 - 1)
    with pytest.raises(
        ValueError, match="`n` must be a whole number <= 9,223,372,036,854,775,807, got 9,"
    ):
        arguments.check_count("n", 2**63)


def test_a_sparse_tensor_is_told_how_to_become_dense():
    with pytest.raises(ValueError, match=r"`a` must be a dense tensor \(.to_dense\(\) makes one\)"):
        arguments.check_floats("[B]", a=ONE.to_sparse())


# --- a positive number, or a tensor of one -------------------------------------------------------


def test_a_positive_scalar_keeps_the_gradient_of_a_tensor():
    beta = torch.tensor(0.5, dtype=torch.float32, requires_grad=True)
    scalar = arguments.positive_scalar("beta", beta, torch.float64)
    assert scalar.dtype == torch.float64
    assert torch.autograd.grad(scalar, beta)[0] == 1
    assert arguments.positive_scalar("beta", 2, torch.float32).item() == 2.0


@pytest.mark.parametrize(
    "value", [0.0, -1.0, NAN, INF, torch.tensor(0.0), torch.tensor(-2), torch.tensor(NAN)]
)
def test_a_scalar_that_is_not_positive_is_refused(value):
    with pytest.raises(ValueError, match="beta.* a finite number > 0"):
        arguments.positive_scalar("beta", value, torch.float64)


def test_a_scalar_that_its_dtype_rounds_to_zero_is_refused():
    assert arguments.positive_scalar("beta", 1e-46, torch.float64) == 1e-46
    want = "`beta` must be a finite number > 0 in torch.float32, got 1e-46"
    with pytest.raises(ValueError, match=want):
        arguments.positive_scalar("beta", 1e-46, torch.float32)


@pytest.mark.parametrize("value", [ONE, torch.tensor(True), torch.tensor(1j)])
def test_a_tensor_of_another_kind_is_no_scalar(value):
    with pytest.raises(ValueError, match="`beta` must be one real number, got a tensor of"):
        arguments.positive_scalar("beta", value, torch.float64)


# --- tables from lists and arrays ----------------------------------------------------------------


def test_lists_take_the_dtype_beside_them():
    half = torch.zeros(1, 2, dtype=torch.bfloat16)
    array = np.zeros((1, 2), dtype=np.float32)
    for beside, dtype in (
        ([[0.0, 0.0]], torch.float64),
        (half, torch.bfloat16),
        (array, torch.float32),
        (np.zeros((1, 2), dtype=np.int64), torch.float64),
    ):
        first, second = arguments.as_floats("[X, Y]", {"a": [[1, 2]], "b": beside})
        assert (first.dtype, second.dtype) == (dtype, dtype)
        assert first.tolist() == [[1.0, 2.0]]


def test_the_smaller_dtype_is_cast_up_where_that_is_asked_for():
    tables = {"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(2, dtype=torch.bfloat16)}
    assert [t.dtype for t in arguments.as_floats("[B]", tables, cast_up=True)] == [
        torch.float32
    ] * 2
    with pytest.raises(ValueError, match=r"`b` must have dtype torch.float16 like `a`"):
        arguments.as_floats("[B]", tables)


@pytest.mark.parametrize("value", [None, "12", 1.0, [[1.0], [1.0, 2.0]], [["a"]], {"a": 1.0}])
def test_what_is_no_table_is_named(value):
    with pytest.raises(TypeError, match=r"`a` must be a floating torch.Tensor \[X, Y\], an array"):
        arguments.as_floats("[X, Y]", {"a": value})


def test_a_list_that_would_lose_a_gradient_is_refused():
    leaf = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(TypeError, match="`a` must be"):
        arguments.as_floats("[X, Y]", {"a": [[leaf, leaf]]})


# --- rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_answers", [2, 50, 5000])
def test_a_rounded_table_sums_to_one_as_well_as_its_dtype_can(dtype, n_answers, generator):
    for _ in range(50):
        logits = 2 * torch.randn(4, n_answers, dtype=torch.float64, generator=generator)
        arguments.check_normalised(table=logits.log_softmax(-1).to(dtype))
        with pytest.raises(ValueError, match="logits"):
            arguments.check_normalised(table=logits.to(dtype))


# --- inside a transform ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in jvp
@pytest.mark.parametrize("old", [False, True])
def test_values_can_be_looked_at_outside_a_transform_only(old, monkeypatch):
    if old:  # torch 2.6 has no `debug_unwrap`
        monkeypatch.delattr(torch.func, "debug_unwrap")
    seen = []

    def look(tensor):
        seen.append(arguments.values_visible(tensor))
        return tensor.sum()

    look(ONE)
    torch.func.vmap(look)(torch.ones(3, 2))
    torch.func.grad(look)(ONE)
    torch.compile(look, fullgraph=True, backend="eager")(ONE)
    assert seen == [True, False, False, False]


def test_only_checks_of_values_pass_inside_a_transform():
    def check(tensor):
        arguments.check_finite(a=tensor)
        arguments.check_logps(a=tensor)
        arguments.check_normalised(a=tensor)
        return tensor

    assert torch.func.vmap(check)(torch.full((3, 2), NAN)).isnan().all()
    with pytest.raises(ValueError, match="`a` must be a non-empty"):
        torch.func.vmap(lambda t: arguments.check_floats("[B, T]", a=t))(torch.ones(3, 2))
    with pytest.raises(ValueError, match="`a` must have a floating dtype"):
        torch.func.vmap(lambda t: arguments.check_floats("[B]", a=t))(torch.ones(3, 2).long())


# --- one format in the whole package ---------------------------------------------------------

PACKAGE = Path(arguments.__file__).parent
OLD_FORMAT = re.compile(r"^\S+: got |: got .*[,;] takes", re.DOTALL)


def texts(node):
    """The texts in a piece of code, with an ellipsis for what a formatted one fills in."""
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        yield "".join(parts)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def test_messages_say_what_must_be_and_then_what_it_was():
    checked, found = set(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        checked.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                found += [text for text in texts(node) if OLD_FORMAT.search(text)]
    assert {"_arguments", "logps", "transformer", "enumerate"} <= checked
    assert not found


def test_the_old_format_is_known():
    code = 'raise ValueError(f"{name}: got {value}, "\n"takes a number > 0")'
    (text,) = texts(ast.parse(code).body[0])
    assert text == "…: got …, takes a number > 0"
    assert OLD_FORMAT.search(text)
    assert not OLD_FORMAT.search("`a` must be a number > 0, got 0: it takes one number")

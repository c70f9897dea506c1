"""Values and slopes of every formula beside mpmath, from gaps of 1e-6 to 1e4 nats.

The reference takes the same rounded inputs as the function. A relative error of 1e-5 is allowed in
float32 and of 1e-13 in float64, or what rounding of the inputs themselves would do where that is
more: 8 eps times the condition number, from exact derivatives. Below the smallest normal float an
error of its size is allowed.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import mpmath
import pytest
import torch

from dpo_mini import closed_form, losses, policy_gradient, preferences

MP = mpmath.MPContext()  # of this file: nobody else changes its digits
MP.dps = 340  # what cancels to the smallest float64, 2e-308, still has its digits
BOUND = {torch.float32: 1e-5, torch.float64: 1e-13}
DTYPES = [torch.float32, torch.float64]
INF = math.inf
SIZES = (1e-6, 1e-4, 1e-2, 0.3, 1.0, 5.0, 10.0, 20.0, 50.0, 88.0, 100.0, 300.0, 1e3, 1e4)
GAPS = [sign * size for size in SIZES for sign in (1, -1)]


# --- numbers of 340 digits that know their derivatives ---------------------------------------


class Jet:
    """A number with its first and second derivatives in numbered variables, all exact."""

    __slots__ = ("first", "second", "value")
    limit = INF  # exponents above it are held; set for each dtype

    def __init__(self, value, first=None, second=None):
        self.value = MP.mpf(value)
        self.first = first or {}  # {i: d/dx_i}
        self.second = second or {}  # {(i, j): d^2/dx_i dx_j}, i <= j

    def __add__(self, other):
        if not isinstance(other, Jet):
            return Jet(self.value + other, self.first, self.second)
        first = added(self.first, other.first)
        return Jet(self.value + other.value, first, added(self.second, other.second))

    def __mul__(self, other):
        if not isinstance(other, Jet):
            other = Jet(other)
        first = added(scaled(self.first, other.value), scaled(other.first, self.value))
        second = added(scaled(self.second, other.value), scaled(other.second, self.value))
        for i, x in self.first.items():
            for j, y in other.first.items():
                at = (i, j) if i <= j else (j, i)
                second[at] = second.get(at, 0) + x * y * (2 if i == j else 1)
        return Jet(self.value * other.value, first, second)

    def chain(self, value, slope, curvature):
        """f of this number, from f, f' and f'' at its value."""
        second = scaled(self.second, slope)
        if curvature:
            for i, x in self.first.items():
                for j, y in self.first.items():
                    if i <= j:
                        second[i, j] = second.get((i, j), 0) + curvature * x * y
        return Jet(value, scaled(self.first, slope), second)

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + -other

    def __rsub__(self, other):
        return -self + other

    def __truediv__(self, other):
        return self * (inverse(other) if isinstance(other, Jet) else 1 / MP.mpf(other))

    def __rtruediv__(self, other):
        return inverse(self) * other

    __radd__, __rmul__ = __add__, __mul__


def added(one, other):
    total = dict(one)
    for at, x in other.items():
        total[at] = total[at] + x if at in total else x
    return total


def scaled(terms, factor):
    return {at: x * factor for at, x in terms.items()} if factor else {}


def inverse(x):
    y = 1 / x.value
    return x.chain(y, -(y**2), 2 * y**3)


def exp(x):
    y = MP.exp(x.value)
    return x.chain(y, y, y)


def expm1(x):
    y = MP.exp(x.value)
    return x.chain(MP.expm1(x.value), y, y)


def held_exp(x):
    """e^x; above the limit, the value and the slope that it has there."""
    y = MP.exp(min(x.value, MP.mpf(Jet.limit)))
    return x.chain(y, y, y)


def log(x):
    y = 1 / x.value
    return x.chain(MP.log(x.value), y, -(y**2))


def log1p(x):
    y = 1 / (1 + x.value)
    return x.chain(MP.log1p(x.value), y, -(y**2))


def sqrt(x):
    y = MP.sqrt(x.value)
    return x.chain(y, 1 / (2 * y), -1 / (4 * y**3))


def square(x):
    return x * x


def erfc(x):
    slope = -2 / MP.sqrt(MP.pi) * MP.exp(-(x.value**2))
    return x.chain(MP.erfc(x.value), slope, -2 * x.value * slope)


def sigmoid(x):
    """1 / (1 + e^-x), exact in both tails."""
    y, rest = 1 / (1 + MP.exp(-x.value)), 1 / (1 + MP.exp(x.value))
    return x.chain(y, y * rest, y * rest * (rest - y))


def softplus(x):
    """log(1 + e^x), which is -log sigmoid(-x)."""
    y, rest = 1 / (1 + MP.exp(-x.value)), 1 / (1 + MP.exp(x.value))
    return x.chain(MP.log1p(MP.exp(x.value)), y, y * rest)


def total(terms):
    return sum(terms, Jet(0))


def log_sum_exp(terms):
    """By the largest term, and the others beside it: exact also where they hardly count."""
    top = max(terms, key=lambda term: term.value)
    return top + log1p(total(exp(term - top) for term in terms if term is not top))


def log_shares(scores):
    """Each score minus the log-sum-exp of all, exact near 0; an impossible one stays None."""
    possible = [score for score in scores if score is not None]
    return [
        None if score is None else -log1p(total(exp(x - score) for x in possible if x is not score))
        for score in scores
    ]


# --- the comparison --------------------------------------------------------------------------


class Case(NamedTuple):
    function: Callable
    reference: Callable  # of one row
    columns: list  # an input each: one entry per row
    options: dict = MappingProxyType({})
    data: tuple = ()  # which inputs take no gradient
    tables: tuple = ()  # which inputs are log-probabilities; their columns hold logits
    in_terms: bool = False  # the reference gives terms whose sum it is, and they may round


class Miss(NamedTuple):
    what: str
    row: int
    got: float
    want: float
    allowed: float  # absolute

    def is_one(self):
        return not abs(MP.mpf(self.got) - self.want) <= self.allowed  # NaN is one

    def __str__(self):
        want, allowed = MP.nstr(self.want, 17), MP.nstr(self.allowed, 3)
        return f"{self.what} of row {self.row}: got {self.got!r}, want {want} +- {allowed}"


def rounded(case, dtype):
    tensors = []
    for at, column in enumerate(case.columns):
        kind = {bool: torch.bool, int: torch.int64}.get(type(flat(column)[0]), dtype)
        tensors.append(
            torch.tensor(normalised(column) if at in case.tables else column, dtype=kind)
        )
    return tensors


def normalised(logits):
    """The nearest float of each log-probability, also of one near 0."""
    if isinstance(logits[0], list):
        return [normalised(row) for row in logits]
    shares = log_shares([None if x == -INF else Jet(x) for x in logits])
    return [-INF if x is None else float(x.value) for x in shares]


def flat(nested):
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def compared(case, dtype):
    """Every value and every slope beside its reference."""
    info, bound = torch.finfo(dtype), BOUND[dtype]
    eps, tiny, largest = MP.mpf(info.eps), MP.mpf(info.tiny), MP.mpf(info.max)
    Jet.limit = 0.9 * math.log(info.max)
    tensors = rounded(case, dtype)
    values = case.function(*tensors, **case.options).detach()
    learned = [i for i, t in enumerate(tensors) if i not in case.data and t.is_floating_point()]
    leaves = [t.clone().requires_grad_(i in learned) for i, t in enumerate(tensors)]
    inputs = [t.log_softmax(-1) if i in case.tables else t for i, t in enumerate(leaves)]
    mix = [(-1) ** k * (1 + k / 4) for k in range(values[0].numel())]  # of a row's outputs
    slopes = {}
    if learned:
        out = case.function(*inputs, **case.options)
        mixed = (out.flatten(1) if out.dim() > 1 else out[:, None]) * out.new_tensor(mix)
        end = mixed.masked_fill(torch.isneginf(values).view_as(mixed), 0.0).sum()
        at = [leaves[i] for i in learned] + [inputs[i] for i in learned]
        found = torch.autograd.grad(end, at, allow_unused=True, materialize_grads=True)
        slopes = dict(zip(learned, found[: len(learned)], strict=True))
        raw = dict(zip(learned, found[len(learned) :], strict=True))
    for row in range(len(values)):
        sizes, arguments, wanted, of_softmax = {}, [], {}, {}
        for i, tensor in enumerate(tensors):
            entries = tensor[row].tolist()
            arguments.append(numbered(entries, sizes, i in case.tables))
            if i in slopes:
                places = range(len(sizes) - len(flat(entries)), len(sizes))
                wanted.update(zip(places, flat(slopes[i][row].tolist()), strict=True))
                if i in case.tables:  # its backward pass subtracts p times the sum of the slopes
                    size = raw[i][row].double().abs().nan_to_num(posinf=0.0)
                    size = size + tensor[row].double().exp() * size.sum(-1, keepdim=True)
                    of_softmax.update(zip(places, flat(size.tolist()), strict=True))
        options = {
            name: numbered(x, sizes, False) if isinstance(x, float) else x
            for name, x in case.options.items()
        }
        want = case.reference(*arguments, **options)
        if want is None:
            continue  # not described by the formula
        want = want if isinstance(want, list) else [want]
        parts, factors = want, mix
        if case.in_terms:
            want, factors = [total(want)], [1] * len(want)
        for k, (got, jet) in enumerate(zip(flat(values[row].tolist()), want, strict=True)):
            if jet is None:  # an impossible entry
                assert got == -INF, f"value {k} of row {row}: got {got}, want -inf"
                continue
            if abs(jet.value) > largest:
                assert abs(got) >= largest, f"value {k} of row {row}: got {got}, want inf"
                assert (got > 0) == (jet.value > 0)
                continue
            first = sum(abs(x) * sizes[i] for i, x in jet.first.items())
            second = sum(abs(x) * sizes[i] * sizes[j] for (i, j), x in jet.second.items())
            of_inputs = 8 * eps * first + 64 * eps**2 * second
            allowed = max(bound * abs(jet.value), of_inputs, tiny)
            yield Miss(f"value {k}", row, got, jet.value, allowed)
        for i, got in wanted.items():
            if not sizes[i] < INF:
                assert math.isfinite(got), f"slope {i} of row {row}, impossible: got {got}"
                continue
            slope = size = of_inputs = MP.mpf(0)
            for factor, jet in zip(factors, parts, strict=True):
                if jet is not None:
                    slope += factor * jet.first.get(i, 0)
                    size += abs(factor * jet.first.get(i, 0))
                    of_inputs += sum(
                        abs(factor * x) * sizes[m + n - i]
                        for (m, n), x in jet.second.items()
                        if i in (m, n)
                    )
            if abs(slope) <= largest:
                of_inputs += of_softmax.get(i, 0)
                if case.in_terms:  # and where they cancel, their rounding is what is left
                    size, of_inputs = abs(slope), of_inputs + size
                allowed = max(bound * size, 8 * eps * of_inputs, tiny)
                yield Miss(f"slope {i}", row, got, slope, allowed)


def numbered(entries, sizes, is_table):
    """Numbers as jets, each a variable of its own, whose size is written down."""
    if isinstance(entries, list):
        return [numbered(x, sizes, is_table) for x in entries]
    if isinstance(entries, (bool, int)):
        sizes[len(sizes)] = INF  # no variable, but a place
        return entries
    at = len(sizes)
    # log_softmax rounds to eps times the larger of a log-probability and 1.
    sizes[at] = max(abs(entries), 1.0) if is_table else abs(entries)
    return None if entries == -INF else Jet(entries, {at: MP.mpf(1)})


def check(case, dtype):
    misses = [miss for miss in compared(case, dtype) if miss.is_one()]
    shown = "\n".join(str(miss) for miss in misses[:12])
    assert not misses, f"{len(misses)} differ\n{shown}"


# --- losses ----------------------------------------------------------------------------------


def at_gaps(beta):
    """Four columns whose beta (a - b) is each gap: at once, over all four, and between big ones."""
    rows = []
    for gap in GAPS:
        u = gap / beta
        rows.append((u, 0.0, 0.0, 0.0))
        rows.append((u / 2 - 3, -u / 4 - 1.7, -u / 8 - 2.2, u / 8 - 0.6))
        rows.append((-300.25 + u, -300.25, -280.5, -280.5))
    return columns(rows)


def at_ratios(beta):
    """Four columns with each log-ratio at each gap, and both far out, on one side and on two."""
    rows = []
    for gap in GAPS:
        u = gap / beta
        pairs = [(u, 0.3), (-0.7, u), (u, u * 1.001), (u * 1.001, u), (u, -u)]
        rows += [(a, b, 0.0, 0.0) for a, b in pairs]
        rows += [(a - 2.5, b - 1.25, -2.5, -1.25) for a, b in pairs[:2]]
    return columns(rows)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def of_pair(loss):
    """A formula in a and b as one in the four log-probabilities."""
    return lambda chosen, rejected, ref_chosen, ref_rejected, **options: loss(
        chosen - ref_chosen, rejected - ref_rejected, **options
    )


def dpo(a, b, beta):
    return softplus(-beta * (a - b))


def cdpo(a, b, beta, label_smoothing):
    x = beta * (a - b)
    return (1 - label_smoothing) * softplus(-x) + label_smoothing * softplus(x)


def rdpo(a, b, beta, label_smoothing):
    x = beta * (a - b)
    kept = (1 - label_smoothing) * softplus(-x)
    return (kept - label_smoothing * softplus(x)) / (1 - 2 * label_smoothing)


def ipo(a, b, beta):
    return square(a - b - 1 / (2 * beta))


def hinge(a, b, beta):
    room = 1 - beta * (a - b)
    return room if room.value > 0 else Jet(0)


def exo(a, b, beta, label_smoothing):
    x = beta * (a - b)
    kept = sigmoid(x) * (-softplus(-x) - log1p(-label_smoothing))
    return kept + sigmoid(-x) * (-softplus(x) - log(label_smoothing))


def discopop(a, b, beta, temperature=None):
    x = beta * (a - b)
    cold = x / (Jet(0.05) if temperature is None else temperature)
    return held_exp(-softplus(-cold) - x) + sigmoid(-cold) * softplus(-x)


def f_dpo(a, b, beta, divergence, alpha=None):
    if divergence == "js":
        margin = softplus(-b) - softplus(-a)
    elif divergence == "reverse_kl" or (alpha and alpha.value == 1):
        margin = a - b
    else:
        k = Jet(-1) if divergence == "forward_kl" else (alpha or Jet(0.5)) - 1
        if max((k * a).value, (k * b).value) > Jet.limit:
            return None  # held: see the test of that
        margin = (exp(k * a) - exp(k * b)) / k
    return softplus(-beta * margin)


def chi_po(a, b, beta, max_reward=None):
    if max(a.value, b.value) > Jet.limit:
        return None  # held: see the test of that
    margin = beta * (exp(a) - exp(b) + a - b)
    if max_reward is not None:
        bound = 2 * max_reward.value
        if abs(abs(margin.value) / bound - 1) < 1e-6:
            return None  # on the kink rounding decides which slope it is
        if abs(margin.value) > bound:
            margin = Jet(bound if margin.value > 0 else -bound)
    return softplus(-margin)


def nca(a, b, beta):
    return softplus(-beta * a) + softplus(beta * a) / 2 + softplus(beta * b) / 2


def bco(a, b, beta):
    return softplus(-beta * a) + softplus(beta * b)


def sppo(a, b, beta):
    return square(a - 1 / (2 * beta)) + square(b + 1 / (2 * beta))


def apo_zero(a, b, beta):
    return sigmoid(-beta * a) + sigmoid(beta * b)


def apo_down(a, b, beta):
    return [sigmoid(beta * a), sigmoid(beta * (b - a))]


def simpo(chosen, rejected, beta, gamma):
    return softplus(gamma - beta * (chosen - rejected))


def cpo(chosen, rejected, beta, nll_weight=1):
    return softplus(beta * (rejected - chosen)) - nll_weight * chosen


def orpo(chosen, rejected, beta, nll_weight=1):
    odds, other_odds = (m - log(-expm1(m)) for m in (chosen, rejected))
    return beta * softplus(other_odds - odds) - nll_weight * chosen


def kto(logp, ref_logp, desirable, beta, reference_point, desirable_weight=1, undesirable_weight=1):
    above = beta * (logp - ref_logp - reference_point)
    return desirable_weight * sigmoid(-above) if desirable else undesirable_weight * sigmoid(above)


def dro(logp, ref_logp, reward, value, beta):
    return square(reward - value - beta * (logp - ref_logp))


def rebel(first, second, ref_first, ref_second, reward, other_reward, beta):
    return square(beta * (first - ref_first - (second - ref_second)) - (reward - other_reward))


def mean(numbers):
    return total(numbers) / len(numbers)


def log_variance(logps, ref_logps, rewards, beta):
    parts = zip(logps, ref_logps, rewards, strict=True)
    left = [reward - beta * (logp - ref_logp) for logp, ref_logp, reward in parts]
    centre = mean(left)
    return total(square(x - centre) for x in left) / (len(left) - 1)


def best_of_k(logps, ref_logps, beta):
    scores = [beta * (logp - ref_logp) for logp, ref_logp in zip(logps, ref_logps, strict=True)]
    return -log_shares(scores)[0]


def plackett_luce(logps, ref_logps, beta):
    pairs = zip(logps, ref_logps, strict=True)
    return -of_ranking([beta * (logp - ref_logp) for logp, ref_logp in pairs])


def of_ranking(scores):
    return total(log_shares(scores[k:])[0] for k in range(len(scores) - 1))


def lists(k, beta):
    """The best of k is ahead by each gap; then each is ahead of the next; then all are alike."""
    rows = []
    for gap in GAPS:
        steps = [0.0] + [-gap / beta] * (k - 1), [-j * gap / beta for j in range(k)]
        ref = [-1.5 - 0.75 * j for j in range(k)]
        rows += [(step, [0.0] * k) for step in steps]
        rows += [([s + r for s, r in zip(step, ref, strict=True)], ref) for step in steps]
    return columns([*rows, ([-2.0] * k, [-2.0] * k)])


def near_the_label(beta, smoothing):
    """Four columns where q is nearly 1 - e, and `exo_loss` nearly 0."""
    at = math.log((1 - smoothing) / smoothing)
    steps = [sign * 10.0**-k for k in range(1, 7) for sign in (1, -1)]
    return columns([((at + step) / beta, 0.0, 0.0, 0.0) for step in steps])


def scores_of_answers():
    """Rows for losses with rewards: log-ratios at the gaps, and ordinary ones."""
    far = [(u - 1.5, -1.5, 0.4, -0.7, 1.1, -2.0) for u in GAPS]
    near = [(-2.0 - k / 7, -3.1 + k / 5, -2.2, k / 11 - 4, 1 - k / 3, 0.4) for k in range(9)]
    return columns(far + near)


def returns():
    """Rows of four answers with rewards: spreads of every size, also about a far centre."""
    shape, ref = (0.1, -1.3, 0.7, 0.45), [-2.0, -1.1, -3.7, -0.4]
    rows = []
    for centre, size in itertools.product((0.0, 1.0, 1e6), (1e-6, 1e-3, 1.0, 1e3)):
        rows.append(([r + size * s for r, s in zip(ref, shape, strict=True)], ref, [centre] * 4))
        rows.append((ref, ref, [centre + size * s for s in shape]))
    return columns(rows)


def paired(name, reference, beta, columns, **options):
    function = getattr(losses, f"{name}_loss")
    return Case(function, of_pair(reference), columns, {"beta": beta, **options})


ODDS = columns([(-a, -b) for a in SIZES for b in SIZES])
GOOD_AND_BAD = columns(
    [(u - shift, -shift, good) for u in GAPS for shift in (0.0, 2.25) for good in (True, False)]
)
LOSSES = {
    "dpo": paired("dpo", dpo, 0.5, at_gaps(0.5)),
    "dpo at beta .1": paired("dpo", dpo, 0.1, at_gaps(0.1)),
    "dpo_mean": paired("dpo_mean", dpo, 0.5, at_gaps(0.5)),
    "cdpo": paired("cdpo", cdpo, 0.5, at_gaps(0.5), label_smoothing=0.1),
    "rdpo": paired("rdpo", rdpo, 0.5, at_gaps(0.5), label_smoothing=0.1),
    "ipo": paired("ipo", ipo, 0.5, at_gaps(0.5)),
    "ipo at beta .1": paired("ipo", ipo, 0.1, at_gaps(0.1)),
    "ipo_mean": paired("ipo_mean", ipo, 0.5, at_gaps(0.5)),
    "hinge": paired("hinge", hinge, 0.5, at_gaps(0.5)),
    "exo": paired("exo", exo, 0.5, at_gaps(0.5), label_smoothing=0.1),
    "exo near 0": paired("exo", exo, 0.5, near_the_label(0.5, 0.1), label_smoothing=0.1),
    "exo near 0, e tiny": paired("exo", exo, 0.5, near_the_label(0.5, 1e-6), label_smoothing=1e-6),
    "exo near 0, e .4": paired("exo", exo, 0.5, near_the_label(0.5, 0.4), label_smoothing=0.4),
    "discopop": paired("discopop", discopop, 0.5, at_gaps(0.5)),
    "discopop at tau 1": paired("discopop", discopop, 0.5, at_gaps(0.5), temperature=1.0),
    "discopop at tau 2": paired("discopop", discopop, 0.5, at_gaps(0.5), temperature=2.0),
    "f_dpo reverse_kl": paired("f_dpo", f_dpo, 0.5, at_ratios(1), divergence="reverse_kl"),
    "f_dpo forward_kl": paired("f_dpo", f_dpo, 0.5, at_ratios(1), divergence="forward_kl"),
    "f_dpo js": paired("f_dpo", f_dpo, 0.5, at_ratios(1), divergence="js"),
    **{
        f"f_dpo alpha {alpha}": paired(
            "f_dpo", f_dpo, 0.5, at_ratios(1), divergence="alpha", alpha=alpha
        )
        for alpha in (0.5, -1.0, 1.0, 1.000001, 2.0)
    },
    "chi_po": paired("chi_po", chi_po, 0.5, at_ratios(1)),
    "chi_po clipped": paired("chi_po", chi_po, 0.5, at_ratios(1), max_reward=0.7),
    "nca": paired("nca", nca, 0.5, at_ratios(0.5)),
    "bco": paired("bco", bco, 0.5, at_ratios(0.5)),
    "sppo": paired("sppo", sppo, 0.5, at_ratios(0.5)),
    "apo_zero": paired("apo_zero", apo_zero, 0.5, at_ratios(0.5)),
    "apo_down": paired("apo_down", apo_down, 0.5, at_ratios(0.5))._replace(in_terms=True),
    "simpo": Case(losses.simpo_loss, simpo, at_gaps(0.5)[:2], {"beta": 0.5, "gamma": 0.3}),
    "cpo": Case(losses.cpo_loss, cpo, at_gaps(0.5)[:2], {"beta": 0.5}),
    "cpo, w 0": Case(losses.cpo_loss, cpo, at_gaps(0.5)[:2], {"beta": 0.5, "nll_weight": 0.0}),
    "orpo": Case(losses.orpo_loss, orpo, ODDS, {"beta": 0.5}),
    "orpo, w 0": Case(losses.orpo_loss, orpo, ODDS, {"beta": 0.5, "nll_weight": 0.0}),
    "kto": Case(losses.kto_loss, kto, GOOD_AND_BAD, {"beta": 0.5, "reference_point": 0.3}),
    "kto weighted": Case(
        losses.kto_loss,
        kto,
        GOOD_AND_BAD,
        {
            "beta": 1.0,
            "reference_point": 40.0,
            "desirable_weight": 1.5,
            "undesirable_weight": 0.7,
        },
    ),
    "kto_reference_point": Case(
        lambda logps, ref_logps: torch.stack(
            [losses.kto_reference_point(*row) for row in zip(logps, ref_logps, strict=True)]
        ),
        lambda logps, ref_logps: (
            [m] if (m := mean([x - y for x, y in zip(logps, ref_logps, strict=True)])).value > 0
            else [Jet(0)]
        ),
        columns([([u - 2, 0.4, -7.1], [-2.0, 0.3, -7.2]) for u in GAPS]),
        data=(0, 1),
    ),
    "dro": Case(losses.dro_loss, dro, scores_of_answers()[:4], {"beta": 0.5}),
    "rebel": Case(losses.rebel_loss, rebel, scores_of_answers(), {"beta": 0.5}),
    "log_variance": Case(losses.log_variance_loss, log_variance, returns(), {"beta": 0.5}),
    **{
        f"{name} of {k}": Case(
            getattr(losses, f"{name}_loss"), reference, lists(k, 0.5), {"beta": 0.5}
        )
        for name, reference in (("plackett_luce", plackett_luce), ("best_of_k", best_of_k))
        for k in (2, 3, 5)
    },
    "reward_model": Case(
        losses.reward_model_loss, lambda a, b: softplus(b - a), at_gaps(1.0)[:2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, dtype):
    check(LOSSES[name], dtype)


# --- preferences -----------------------------------------------------------------------------

MARGINS = [-1e4, -1e3, -300, -100, -50, -20, -10, -5, -1.3, -0.3, -1e-2, -1e-6]
MARGINS += [1e-6, 1e-2, 0.3, 1.3, 5, 10, 15, 20]
PAIRS = columns([(u + shift, shift) for u in GAPS for shift in (0.0, -2.5)])
THURSTONE = columns([(float(u) + shift, shift) for u in MARGINS for shift in (0.0, -2.5)])


def thurstone_logp(a, b):
    lower = erfc((b - a) / 2) / 2
    return log(lower) if a.value < b.value else log1p(-erfc((a - b) / 2) / 2)


def davidson(a, b, tie_weight):
    return log_shares([(a - b) / 2, log(tie_weight), (b - a) / 2])


def rankings(k):
    """The rows of `lists` as rewards, under other names of the items."""
    rewards = lists(k, 1.0)[0]
    order = [(3 * j + 1) % k if k != 3 else (j + 1) % 3 for j in range(k)]
    named = [[row[order.index(item)] for item in range(k)] for row in rewards]
    return [named, [order] * len(named)]


def plackett_luce_logp(rewards, ranking):
    return of_ranking([rewards[item] for item in ranking])


PREFERENCES = {
    "bradley_terry_prob": Case(
        preferences.bradley_terry_prob, lambda a, b: sigmoid(a - b), PAIRS
    ),
    "thurstone_prob": Case(
        preferences.thurstone_prob, lambda a, b: erfc((b - a) / 2) / 2, THURSTONE
    ),
    "thurstone_logp": Case(
        lambda a, b: preferences.thurstone_logp(a, b), thurstone_logp, THURSTONE
    ),
    **{
        f"davidson_{kind} at {nu}": Case(function, reference, PAIRS, {"tie_weight": nu})
        for kind, function, reference in (
            (
                "probs",
                preferences.davidson_probs,
                lambda *row, **options: [exp(x) for x in davidson(*row, **options)],
            ),
            ("logps", lambda *row, **nu: preferences.davidson_logps(*row, **nu), davidson),
        )
        for nu in (0.5, 1e-6, 40.0)
    },
    **{
        f"plackett_luce_logp of {k}": Case(
            preferences.plackett_luce_logp, plackett_luce_logp, rankings(k)
        )
        for k in (2, 3, 5)
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name, dtype):
    check(PREFERENCES[name], dtype)


# --- policy gradient -------------------------------------------------------------------------

ADVANTAGES = (0.0, 1.0, -1.0, 2.5)
CLIPS = {"clip_eps": 0.2, "clip_eps_high": 0.3}
STEPS = columns(
    [(u - at, -at, a) for u in GAPS for at in (0.0, 2.25) for a in ADVANTAGES]
)  # fmt: skip
SAMPLES = columns([(u - at, -at) for u in GAPS for at in (0.0, 2.25, 280.5)])
VALUES = columns(
    [(u + at, at - 0.4, at + r) for u in GAPS for at in (0.0, 1.5) for r in (0.7, -3.0)]
)


def clipped_surrogate(logp, old_logp, advantage, clip_eps, clip_eps_high=None):
    ratio = held_exp(logp - old_logp)
    low, high = 1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    if advantage.value > 0:
        ratio = ratio if ratio.value < high.value else high
    elif advantage.value < 0:
        ratio = ratio if ratio.value > low.value else low
    return -advantage * ratio


def cispo_surrogate(logp, old_logp, advantage, clip_eps_high):
    """The weight is a number: it has no derivative."""
    weight = held_exp(logp - old_logp).value
    return -advantage * logp * min(weight, 1 + clip_eps_high.value)


def truncated_weight(logp, sampler_logp, cap):
    ratio = held_exp(logp - sampler_logp)
    return ratio if ratio.value < cap.value else cap


def kl_k3(logp, ref_logp):
    u = logp - ref_logp
    if abs(u.value) > 1:
        return held_exp(-u) - 1 + u
    return u.chain(MP.expm1(-u.value) + u.value, -MP.expm1(-u.value), MP.exp(-u.value))


def value_loss(value, target):
    return square(value - target) / 2


def clipped_value_loss(value, old_value, target, clip_eps):
    moved = value - old_value
    if abs(moved.value) > clip_eps.value:
        moved = clip_eps if moved.value > 0 else -clip_eps
    one, other = value_loss(value, target), value_loss(old_value + moved, target)
    return one if one.value >= other.value else other


def centred(rewards):
    centre = mean(rewards)
    return [r - centre for r in rewards]


def leave_one_out(rewards):
    return [x * len(rewards) / (MP.mpf(len(rewards)) - 1) for x in centred(rewards)]


def group_normalised(rewards, eps=None):
    parts = centred(rewards)
    variance = mean([square(x) for x in parts])
    spread = sqrt(variance) if variance.value else 0  # equal rewards: the numerators are 0 too
    return [x / (spread + (Jet(1e-4) if eps is None else eps)) for x in parts]


def maxrl(rewards):
    """Equal rewards of 0 have no advantage."""
    centre = mean(rewards)
    return [x / (centre if centre.value else 1) for x in centred(rewards)]


def successes():
    """Rewards of five answers, none below 0: few successes and many, near each other and far."""
    shapes = ([0, 0, 0, 0, 1], [1, 1, 0, 1, 1], [0.3, 1.1, 0.7, 0.45, 2.0], [0, 0, 0, 0, 0])
    return [
        [
            [centre + size * float(s) for s in shape]
            for shape in shapes
            for centre, size in itertools.product((0.0, 0.6, 1e3), (1e-6, 1.0, 1e4))
        ]
    ]


def counted(tokens, mask):
    return [x for x, counts in zip(tokens, mask, strict=True) if counts]


def sequence_ratio_surrogate(logps, old_logps, advantage, mask, **clips):
    gaps = counted([a - b for a, b in zip(logps, old_logps, strict=True)], mask)
    return clipped_surrogate(mean(gaps), Jet(0), advantage, **clips)


def of_tokens(surrogate, advantages_of, share):
    """A method of one group: the sum of its tokens' losses, divided by `share` of the lengths.

    Rewards have no derivative here.
    """

    def method(logps, old_logps, rewards, mask, **clips):
        advantages = advantages_of([Jet(r.value) for r in rewards])
        lengths = [sum(row) for row in mask]
        rows = zip(logps, old_logps, advantages, mask, lengths, strict=True)
        return [
            total(
                surrogate(new, old, advantage, **clips)
                for new, old in counted(list(zip(row, old_row, strict=True)), counts)
            )
            / share(length, lengths, len(counts))
            for row, old_row, advantage, counts, length in rows
        ]

    return method


def of_completions(reduce, advantages_of):
    """A method of one group with one ratio per completion, of the sum or mean of log-ratios."""

    def method(logps, old_logps, rewards, mask, **clips):
        advantages = advantages_of([Jet(r.value) for r in rewards])
        rows = zip(logps, old_logps, advantages, mask, strict=True)
        return [
            clipped_surrogate(
                reduce(counted([a - b for a, b in zip(new, old, strict=True)], counts)),
                Jet(0),
                advantage,
                **clips,
            )
            for new, old, advantage, counts in rows
        ]

    return method


def completions():
    """Groups of three completions of one to three tokens, near the sampler and far from it."""
    mask = [[True, True, True], [True, False, False], [True, True, False]]
    rows = []
    for gap in GAPS:
        for rewards in ([1.0, 0.0, 0.0], [0.2, 1.5, 0.9]):
            old = [[-0.5, -2.25, -1.0], [-3.0, -4.0, -5.0], [-0.25, -7.5, -1.0]]
            moves = ([gap, 0.1, -0.2], [gap / 2, 9.0, 9.0], [-0.3 * gap, 0.7 * gap, 9.0])
            new = [
                [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(old, moves, strict=True)
            ]
            rows.append((new, old, rewards, mask))
    return columns(rows)


def one_by_one(method):
    """A method that divides by the tokens of a batch, for batches of one group."""
    return lambda *tensors, **clips: torch.cat(
        [method(*(t[i : i + 1] for t in tensors), **clips) for i in range(len(tensors[0]))]
    )


def mean_length(length, lengths, width):
    return MP.mpf(sum(lengths)) / len(lengths)


def groups():
    """Rewards of five answers: every spread about centres near and far."""
    shape = (0.3, -1.1, 0.7, 0.45, -2.0)
    return [
        [
            [centre + size * s for s in shape]
            for centre, size in itertools.product((0.0, 0.6, -1e3, 1e6), (1e-6, 1e-2, 1.0, 1e4))
        ]
    ]


def optimal_baseline(logps, rewards, squared_scores):
    weights = [exp(logp) * s for logp, s in zip(logps, squared_scores, strict=True)]
    return total(w * r for w, r in zip(weights, rewards, strict=True)) / total(weights)


def baselines():
    """Tables whose scores count at likely answers, at unlikely ones, and at hopeless ones alone."""
    rows = []
    for gap in (0.3, 5.0, 50.0, 80.0, 95.0, 100.0, 300.0, 1e3):
        for scores in ([0.3, 1.0, 2.2], [0.0, 1.5, 0.7], [0.0, 1e-3, 4.0], [2.0, 0.0, 0.0]):
            rows.append(([0.0, -gap, -1.5 * gap], [1.0, -0.4, 2.5], scores))
    return columns(rows)


def gae(rewards, values, mask, discount, lam):
    """By the definition: discounted sums of TD errors up to the end."""
    n = sum(mask)
    nothing = [Jet(0)] * (len(mask) - n)
    after = [*values[1:n], Jet(0)]
    errors = [
        r + discount * v_next - v
        for r, v, v_next in zip(rewards[:n], values[:n], after, strict=True)
    ]
    advantages = []
    for t in range(n):
        weight, advantage = Jet(1), Jet(0)
        for error in errors[t:]:
            advantage, weight = advantage + weight * error, weight * discount * lam
        advantages.append(advantage)
    targets = [a + v for a, v in zip(advantages, values[:n], strict=True)]
    return advantages + nothing + targets + nothing


def episodes():
    rows = []
    for n, size in itertools.product((1, 2, 5), (1e-6, 0.3, 20.0, 1e4)):
        rewards = [size * (0.2 + 0.7 * (t % 3)) for t in range(5)]
        values = [0.9 - 0.35 * t + size / 10 for t in range(5)]
        rows.append((rewards, values, [t < n for t in range(5)]))
    return columns(rows)


def whiten(values, mask):
    parts = iter(centred([v for v, counts in zip(values, mask, strict=True) if counts]))
    parts = [next(parts) if counts else Jet(0) for counts in mask]
    variance = total(square(x) for x in parts) / sum(mask)
    return [x / sqrt(variance + 1e-8) for x in parts]


def entropy(logits):
    """Its terms by the gaps to the largest logit: log sum e^g, and -p g of each."""
    logits = [x for x in logits if x is not None]
    top = max(logits, key=lambda x: x.value)
    gaps = [x - top for x in logits if x is not top]
    log_sum = log1p(total(exp(gap) for gap in gaps))
    return [log_sum, *(-exp(gap - log_sum) * gap for gap in gaps)]


def peaks():
    """Logits whose largest is ahead by each gap, of one answer or of two alike."""
    rows = []
    for gap in [gap for gap in GAPS if gap > 0] + [80.0, 600.0]:
        for at in (0.0, 3.5):
            rows += [[at, at - gap, at - 1.5 * gap, at - 2 * gap], [at, at, at - gap, at - gap]]
            rows += [[at - gap, at, -INF, at - 2 * gap]]
    return [rows]


POLICY_GRADIENT = {
    "reinforce_loss": Case(
        policy_gradient.reinforce_loss,
        lambda logp, a: -a * logp,
        columns([(-size, a) for size in SIZES for a in ADVANTAGES]),
        data=(1,),
    ),
    "unclipped_surrogate_loss": Case(
        policy_gradient.unclipped_surrogate_loss,
        lambda logp, old_logp, a: -a * held_exp(logp - old_logp),
        STEPS,
        data=(1, 2),
    ),
    "clipped_surrogate_loss": Case(
        policy_gradient.clipped_surrogate_loss,
        clipped_surrogate,
        STEPS,
        {"clip_eps": 0.2},
        data=(1, 2),
    ),
    "clipped_surrogate_loss high": Case(
        policy_gradient.clipped_surrogate_loss, clipped_surrogate, STEPS, CLIPS, data=(1, 2)
    ),
    "sequence_ratio_surrogate_loss": Case(
        policy_gradient.sequence_ratio_surrogate_loss,
        sequence_ratio_surrogate,
        columns(
            [
                (new[0], old[0], a, mask[0])
                for new, old, _, mask in zip(*completions(), strict=True)
                for a in ADVANTAGES
            ]
        ),
        CLIPS,
        data=(1, 2),
    ),
    "cispo_surrogate_loss": Case(
        policy_gradient.cispo_surrogate_loss,
        cispo_surrogate,
        STEPS,
        {"clip_eps_high": 4.0},
        data=(1, 2),
    ),
    "truncated_importance_weights": Case(
        policy_gradient.truncated_importance_weights,
        truncated_weight,
        SAMPLES,
        {"cap": 2.0},
        data=(0, 1),
    ),
    "value_loss": Case(policy_gradient.value_loss, value_loss, [VALUES[0], VALUES[2]], data=(1,)),
    "clipped_value_loss": Case(
        policy_gradient.clipped_value_loss,
        clipped_value_loss,
        VALUES,
        {"clip_eps": 0.25},
        data=(1, 2),
    ),
    "mean_advantages": Case(policy_gradient.mean_advantages, centred, groups()),
    "leave_one_out_advantages": Case(
        policy_gradient.leave_one_out_advantages, leave_one_out, groups()
    ),
    "group_normalised_advantages": Case(
        policy_gradient.group_normalised_advantages, group_normalised, groups()
    ),
    "maxrl_advantages": Case(policy_gradient.maxrl_advantages, maxrl, successes(), data=(0,)),
    "grpo_loss": Case(
        policy_gradient.grpo_loss,
        of_tokens(clipped_surrogate, group_normalised, lambda length, lengths, width: length),
        completions(),
        CLIPS,
        data=(1, 2),
    ),
    "dr_grpo_loss": Case(
        policy_gradient.dr_grpo_loss,
        of_tokens(clipped_surrogate, centred, lambda length, lengths, width: width),
        completions(),
        CLIPS,
        data=(1, 2),
    ),
    "dapo_loss": Case(
        one_by_one(policy_gradient.dapo_loss),
        of_tokens(clipped_surrogate, group_normalised, mean_length),
        completions(),
        CLIPS,
        data=(1, 2),
    ),
    "rloo_loss": Case(
        policy_gradient.rloo_loss,
        of_completions(total, leave_one_out),
        completions(),
        CLIPS,
        data=(1, 2),
    ),
    "maxrl_loss": Case(
        policy_gradient.maxrl_loss,
        of_tokens(clipped_surrogate, maxrl, lambda length, lengths, width: 1),
        completions(),
        CLIPS,
        data=(1, 2),
    ),
    "gspo_loss": Case(
        policy_gradient.gspo_loss,
        of_completions(mean, group_normalised),
        completions(),
        CLIPS,
        data=(1, 2),
    ),
    "cispo_loss": Case(
        one_by_one(policy_gradient.cispo_loss),
        of_tokens(cispo_surrogate, group_normalised, mean_length),
        completions(),
        {"clip_eps_high": 4.0},
        data=(1, 2),
    ),
    "optimal_baseline": Case(
        policy_gradient.optimal_baseline, optimal_baseline, baselines(), tables=(0,)
    ),
    "gae": Case(
        lambda *episode, **options: torch.cat(policy_gradient.gae(*episode, **options), -1),
        gae,
        episodes(),
        {"discount": 0.9, "lam": 0.95},
        data=(0, 1),
    ),
    "whiten": Case(
        lambda values, mask: torch.cat(
            [policy_gradient.whiten(values[i : i + 1], mask[i : i + 1]) for i in range(len(mask))]
        ),
        whiten,
        [groups()[0], [[True] * 5, [True] * 4 + [False]] * (len(groups()[0]) // 2)],
    ),
    "entropy": Case(policy_gradient.entropy, entropy, peaks(), in_terms=True),
    "kl_k1": Case(policy_gradient.kl_k1, lambda x, y: x - y, SAMPLES),
    "kl_k2": Case(policy_gradient.kl_k2, lambda x, y: square(x - y) / 2, SAMPLES),
    "kl_k3": Case(policy_gradient.kl_k3, kl_k3, SAMPLES),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_policy_gradient(name, dtype):
    check(POLICY_GRADIENT[name], dtype)


# --- closed form -----------------------------------------------------------------------------


def draws(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


SHARP = [[0.0, -30.0, -31.0, -80.0], [-5.0, 0.0, -80.0, -INF], [0.0, 0.0, -20.0, -INF]]


def pairs_of_tables(least=1e-6):
    """Logits of two tables: unlike, then alike within 1e-1 to `least`, then with zeros."""
    one, other, step = draws(1, 3, 8, 4)
    near = [10.0**-k for k in range(1, 7) if 10.0**-k >= least]
    rows = list(zip((1.5 * one).tolist(), (1.5 * other).tolist(), strict=True))
    rows += [(one[k].tolist(), (one[k] + size * step[k]).tolist()) for k, size in enumerate(near)]
    rows += [([0.0, 0.0, -1.0, -2.0], [0.0, -60.0, -1.0, -30.0])]
    rows += [([0.0, -INF, -1.0, -2.0], [0.3, -0.2, -1.0, -2.5])]
    rows += [([0.0, -INF, -1.0, -2.0], [0.3, -INF, -1.001, -2.0])]
    rows += [([0.0, -INF, -INF, -INF], [0.3, -1.0, -40.0, -INF])]
    return columns(rows)


def tables_and_rewards():
    """Logits of references, sharp ones too, and rewards: ordinary, tied, far from 0."""
    logits, rewards = draws(2, 2, 6, 4).tolist()
    rewards[0], rewards[1] = [0.25, 1.5, -0.75, 1.5], [100.0 + r for r in rewards[1]]
    rows = list(zip(logits, rewards, strict=True))
    rows += [(row, r) for row in SHARP for r in ([1.0, 0.2, -0.4, 0.8], [0.0, 0.7, -2.0, 9.0])]
    return columns(rows)


def present(*rows):
    """The entries of several rows where the first has probability."""
    return [parts for parts in zip(*rows, strict=True) if parts[0] is not None]


def kl(logits, other_logits):
    parts = present(log_shares(logits), log_shares(other_logits))
    return total(exp(p) * (p - q) for p, q in parts)


def chi_squared(logits, other_logits):
    parts = present(log_shares(other_logits), log_shares(logits))
    return total(exp(q) * (square(expm1(p - q)) if p else 1) for q, p in parts)


def total_variation(logits, other_logits):
    parts = present(log_shares(other_logits), log_shares(logits))
    apart = [exp(q) * (expm1(p - q) if p else -1) for q, p in parts]
    return total(x if x.value > 0 else -x for x in apart) / 2


def expected_reward(logits, rewards):
    return total(exp(p) * r for p, r in present(log_shares(logits), rewards))


def objective(logits, ref_logits, rewards, beta):
    return expected_reward(logits, rewards) - beta * kl(logits, ref_logits)


def tilt(logits, weights):
    pairs = zip(log_shares(logits), weights, strict=True)
    joint = [None if p is None or w is None else p + w for p, w in pairs]
    return [*log_shares(joint), log_sum_exp([x for x in joint if x is not None])]


def tilted(logits, rewards, beta):
    return tilt(logits, [r / beta for r in rewards])


def frontier(logits, rewards, betas):
    kls, gains = [], []
    for beta in betas:
        best = tilted(logits, rewards, MP.mpf(beta))[:-1]
        kls.append(total(exp(x) * (x - p) for x, p in present(best, log_shares(logits))))
        gains.append(total(exp(x) * r for x, r in present(best, rewards)))
    return kls + gains


def each_frontier(ref_logps, rewards, betas):
    rows = zip(ref_logps.split(1), rewards.split(1), strict=True)
    return torch.stack([torch.cat(closed_form.frontier(*row, betas)) for row in rows])


def best_of_n(logits, rewards, n):
    logps = log_shares(logits)
    probs = [Jet(0) if p is None else exp(p) for p in logps]
    wins = []
    for logp, reward in zip(logps, rewards, strict=True):
        sums = {}
        for r, p in zip(rewards, probs, strict=True):
            order = (r.value > reward.value) - (r.value < reward.value)
            sums[order] = sums.get(order, Jet(0)) + p
        mass, at_most = sums[0], 1 - sums.get(1, Jet(0))
        if logp is None:
            wins.append(None)
            continue
        # The factor of mass / mass is left out where nobody shares the reward.
        share = logp - log(mass) if mass.value != probs[len(wins)].value else Jet(0)
        win = share + n * log1p(-sums.get(1, Jet(0)))
        if sums.get(-1, Jet(0)).value:
            win = win + log1p(-exp(n * log1p(-mass / at_most)))
        wins.append(win)
    return wins


def markov(initial, transitions, token_rewards, beta, n_tokens):
    """log Z over every sequence."""
    first, rows = log_shares(initial), [log_shares(row) for row in transitions]
    sequences = []
    for tokens in itertools.product(range(len(initial)), repeat=n_tokens):
        steps = [first[tokens[0]], *(rows[v][w] for v, w in itertools.pairwise(tokens))]
        sequences.append(total(steps) + total(token_rewards[v] for v in tokens) / beta)
    return log_sum_exp(sequences)


def each_markov(initial, transitions, token_rewards, **options):
    rows = zip(initial, transitions, token_rewards, strict=True)
    return torch.stack([closed_form.log_partition_markov(*row, **options) for row in rows])


def tilt_both(prior_logps, log_weights):
    logps, log_z = closed_form.tilt(prior_logps, log_weights)
    return torch.cat([logps, log_z[:, None]], -1)


REWARDED = tables_and_rewards()
NOBODY = columns([
    ([0.1, -0.4, -2.0], [-3.0, 0.2, 1.1]),
    ([0.3, -2.0, -30.0], [1e-3, -1e-3, 4e-3]),
    ([0.0, 1.0, 2.0], [1e4, -1e4, 9e3]),
    ([0.0, -1.0, -INF], [0.5, -INF, 100.0]),
    ([0.0, -1.0, 0.5], [-700.0, -INF, -701.0]),
])  # fmt: skip
CHAINS = [
    draws(3, 3, 3).tolist(),
    draws(4, 3, 3, 3).tolist(),
    [[1.0, -0.3, 0.4], [0.0, -2.0, -1.0], [3.0, 3.5, 2.0]],
]
BETAS = (1e-30, 1e-6, 1e-2, 0.3, 1.0, 30.0, 1e3, 1e6, 1e8)
CLOSED_FORM = {
    "kl": Case(closed_form.kl, kl, pairs_of_tables(), tables=(0, 1)),
    "chi_squared": Case(
        closed_form.chi_squared, chi_squared, pairs_of_tables(), tables=(0, 1)
    ),
    "total_variation": Case(
        closed_form.total_variation, total_variation, pairs_of_tables(1e-3), tables=(0, 1)
    ),
    "implied_rewards": Case(
        closed_form.implied_rewards,
        lambda row, ref, beta: [beta * (x - y) for x, y in zip(row, ref, strict=True)],
        [[[u - 2.5, u] for u in GAPS], [[-2.5, -0.3] for _ in GAPS]],
        {"beta": 0.5},
    ),
    "expected_reward": Case(closed_form.expected_reward, expected_reward, REWARDED, tables=(0,)),
    "objective": Case(
        closed_form.objective,
        objective,
        [*pairs_of_tables(), draws(5, len(pairs_of_tables()[0]), 4).tolist()],
        {"beta": 0.3},
        tables=(0, 1),
    ),
    "tilt": Case(tilt_both, tilt, NOBODY, tables=(0,)),
    **{
        f"log_partition at {beta}": Case(
            closed_form.log_partition,
            lambda *row, **options: tilted(*row, **options)[-1],
            REWARDED,
            {"beta": beta},
            tables=(0,),
        )
        for beta in BETAS
    },
    **{
        f"optimal_logps at {beta}": Case(
            closed_form.optimal_logps,
            lambda *row, **options: tilted(*row, **options)[:-1],
            REWARDED,
            {"beta": beta},
            tables=(0,),
        )
        for beta in BETAS
    },
    **{
        f"frontier at {beta}": Case(
            each_frontier, frontier, REWARDED, {"betas": (beta,)}, tables=(0,)
        )
        for beta in BETAS
    },
    **{
        f"best_of_n_logps of {n}": Case(
            closed_form.best_of_n_logps, best_of_n, REWARDED, {"n": n}, data=(1,), tables=(0,)
        )
        for n in (1, 2, 7, 50, 1000, 1_000_000)
    },
    **{
        f"log_partition_markov of {n} at {beta}": Case(
            each_markov, markov, CHAINS, {"beta": beta, "n_tokens": n}, tables=(0, 1)
        )
        for n, beta in ((1, 0.5), (4, 0.5), (3, 1e-2), (4, 1e6))
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_closed_form(name, dtype):
    check(CLOSED_FORM[name], dtype)


# --- what is never below 0, and what is exactly 0 --------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exo near 0", "exo near 0, e tiny", "exo near 0, e .4"])
def test_exo_is_a_kl_and_never_negative(name, dtype):
    case = LOSSES[name]
    assert (case.function(*rounded(case, dtype), **case.options) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_k2_and_k3_are_never_negative(dtype):
    u = torch.cat([torch.tensor(GAPS, dtype=dtype), 1e-4 * draws(6, 200).to(dtype)])
    for function in (policy_gradient.kl_k2, policy_gradient.kl_k3):
        assert (function(u, torch.zeros_like(u)) > 0).all()
        assert (function(u, u) == 0).all()


DIVERGENCES = {
    closed_form.kl: kl,
    closed_form.chi_squared: chi_squared,
    closed_form.total_variation: total_variation,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10.0**-k for k in range(1, 8)])
@pytest.mark.parametrize("function", DIVERGENCES, ids=lambda function: function.__name__)
def test_divergences_of_near_tables_keep_their_digits(function, size, dtype):
    """The rounded tables sum to 1 +- c each, which moves a divergence D by about c D + c^2.

    Total variation is of first order in the difference of the tables, and c moves it by c.
    """
    one, step = draws(7, 2, 12, 5)
    tables = [t.log_softmax(-1).to(dtype) for t in (1.5 * one, 1.5 * one + size * step)]
    got = function(*tables).tolist()
    eps = torch.finfo(dtype).eps
    for value, *rows in zip(got, *(table.tolist() for table in tables), strict=True):
        want = DIVERGENCES[function](*([Jet(x) for x in row] for row in rows)).value
        sums = [abs(MP.log(sum(MP.exp(x) for x in row))) for row in rows]
        of_sums = sum(sums) * want + sum(sums) ** 2
        if function is closed_form.total_variation:
            of_sums = sum(sums)
        assert value >= 0
        assert abs(value - want) <= 16 * eps * want + 2 * of_sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", DIVERGENCES, ids=lambda function: function.__name__)
def test_divergences_of_equal_tables_are_exactly_zero(function, dtype):
    logits = torch.cat([3 * draws(8, 200, 5), torch.tensor([[0.0, 0.0, -INF, -40.0, -1.0]])])
    table = logits.log_softmax(-1).to(dtype).requires_grad_()
    values = function(table, table.detach().clone())
    assert (values == 0).all()
    slope = torch.autograd.grad(values.sum(), table)[0]
    assert torch.isfinite(slope).all()


GROUPED = {
    "mean_advantages": policy_gradient.mean_advantages,
    "leave_one_out_advantages": policy_gradient.leave_one_out_advantages,
    "group_normalised_advantages": policy_gradient.group_normalised_advantages,
    "maxrl_advantages": lambda rewards: policy_gradient.maxrl_advantages(rewards.abs()),
    "whiten": lambda rewards: policy_gradient.whiten(rewards, torch.ones_like(rewards)),
    "log_variance_loss": lambda rewards: losses.log_variance_loss(
        torch.zeros_like(rewards), torch.zeros_like(rewards), rewards, beta=0.7
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 7, 10, 64])
@pytest.mark.parametrize("name", GROUPED)
def test_equal_rewards_have_advantages_of_exactly_zero(name, count, dtype):
    for reward in (0.1, 1 / 3, 1.0, -0.7, 3.3, 1e3 + 0.1, 1234567.1, 1e6):
        rewards = torch.full((1, count), reward, dtype=dtype, requires_grad=True)
        values = GROUPED[name](rewards)
        assert (values == 0).all()
        if name == "maxrl_advantages":
            assert not values.requires_grad
            continue
        assert torch.isfinite(torch.autograd.grad(values.flatten()[0], rewards)[0]).all()


def test_the_slope_of_group_normalisation_among_equal_rewards():
    """(r_k - mean) / eps to first order, for the standard deviation is of the same order."""
    rewards = torch.full((1, 4), 0.3, dtype=torch.float64, requires_grad=True)
    value = policy_gradient.group_normalised_advantages(rewards, eps=0.5)[0, 1]
    slope = torch.autograd.grad(value, rewards)[0]
    want = torch.tensor([[-0.5, 1.5, -0.5, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(slope, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in GROUPED if name != "log_variance_loss"])
def test_advantages_far_from_zero_keep_the_digits_of_their_spread(name, dtype):
    """A spread of 1 about 1e6: what the rounded rewards say, to a few eps of the spread."""
    references = (centred, leave_one_out, group_normalised, maxrl)
    references = (*references, lambda row: whiten(row, [True] * 7))
    reference = dict(zip(GROUPED, references, strict=False))[name]
    for row in (1e6 + draws(9, 20, 7)).to(dtype):
        got = GROUPED[name](row[None])[0].tolist()
        want = [x.value for x in reference([Jet(x) for x in row.tolist()])]
        scale = max(abs(x) for x in want)
        assert max(abs(x - y) for x, y in zip(got, want, strict=True)) <= (
            16 * torch.finfo(dtype).eps * scale
        )


# --- what is held ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "u"), [(torch.float16, 12.0), (torch.float32, 100.0), (torch.float64, 800.0)]
)
def test_surrogates_far_away(dtype, u):
    """Where the ratio is larger than any float, nothing is NaN, and what is clipped stays so."""
    for loss in (
        policy_gradient.unclipped_surrogate_loss,
        partial(policy_gradient.clipped_surrogate_loss, clip_eps=0.2),
    ):
        for shift in (0.0, 1.0):
            logps = torch.full((3,), u + shift, dtype=dtype, requires_grad=True)
            advantages = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)
            values = loss(logps, torch.full_like(logps, shift).detach(), advantages)
            slopes = torch.autograd.grad(values.sum(), logps)[0]
            assert torch.isfinite(values).all()
            assert torch.isfinite(slopes).all()
            assert values[0] == 0
            assert slopes[0] == 0
            if isinstance(loss, partial):
                torch.testing.assert_close(values[1].item(), -1.2, rtol=1e-3, atol=0)
                assert slopes[1] == 0
            else:
                assert values[1] < -1e4
            assert values[2] > 1e4
            if dtype != torch.float16:  # whose largest number has been reached
                assert slopes[2] > 1e4


def test_a_slope_of_cispo_beyond_the_largest_half_is_that_number():
    logps = torch.tensor([-1e-3], dtype=torch.float16, requires_grad=True)
    advantages = torch.full_like(logps, 6e4).detach()
    value = policy_gradient.cispo_surrogate_loss(logps, logps - 3, advantages, clip_eps_high=2.0)
    assert torch.autograd.grad(value.sum(), logps)[0].item() == -65504


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [("forward_kl", 0.5), ("alpha", 0.5), ("alpha", -1.0), ("alpha", 2.0)],
)
def test_f_dpo_is_held_where_its_powers_are_too_large(divergence, alpha, dtype):
    """The larger power counts alone: loss beta e^L / |k|, whose slope has the size beta e^L."""
    power = -1.0 if divergence == "forward_kl" else alpha - 1
    limit = 0.9 * math.log(torch.finfo(dtype).max)
    loss = partial(losses.f_dpo_loss, beta=0.5, divergence=divergence, alpha=alpha)
    far, less_far, zero = (
        torch.full((1,), x / power, dtype=dtype).requires_grad_()
        for x in (limit + 30, limit + 20, 0.0)
    )
    chosen, rejected = (far, zero) if power < 0 else (zero, far)
    value = loss(chosen, rejected, torch.zeros_like(zero), torch.zeros_like(zero))
    slope = torch.autograd.grad(value.sum(), far)[0].item()
    bound = max(BOUND[dtype], 8 * torch.finfo(dtype).eps * limit)
    assert value.item() == pytest.approx(0.5 * math.exp(limit) / abs(power), rel=bound)
    assert slope == pytest.approx(math.copysign(0.5 * math.exp(limit), power), rel=bound)
    # Both held: the sign of the margin is still that of a - b.
    up, down = (far, less_far) if far > less_far else (less_far, far)
    pair = [loss(x, y, 0 * zero, 0 * zero) for x, y in ((up, down), (down, up))]
    assert pair[0].item() < math.log(2) < pair[1].item() < INF


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [1e-2, 1.0, 1e3, 1e8])
def test_the_slope_of_log_z_in_log_pi_ref_is_the_optimum(beta, dtype):
    logits, rewards = (x.to(dtype) for x in draws(12, 2, 6, 5))
    ref_logps = logits.log_softmax(-1).requires_grad_()
    log_z = closed_form.log_partition(ref_logps, rewards, beta)
    slopes = torch.autograd.grad(log_z.sum(), ref_logps)[0]
    for row, *given in zip(slopes.tolist(), ref_logps.tolist(), rewards.tolist(), strict=True):
        best = tilted(*([Jet(x) for x in part] for part in given), MP.mpf(beta))[:-1]
        for x, y in zip(row, best, strict=True):
            assert abs(x - exp(y).value) <= 16 * torch.finfo(dtype).eps / min(beta, 1.0)


# --- a beta so small that r / beta is no float -----------------------------------------------

SMALLEST = {torch.float32: 1e-38, torch.float64: 1e-308}


def table_of(*rows, dtype):
    return torch.tensor([list(row) for row in rows], dtype=torch.float64).log().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_optimum_of_a_tiny_beta_is_the_best_answer_that_the_reference_knows(dtype):
    beta = SMALLEST[dtype]
    ref = table_of((0.4, 0.3, 0.2, 0.1), (0.4, 0.6, 0, 0), (0.1, 0.2, 0.3, 0.4), dtype=dtype)
    rewards = torch.tensor(
        [[9, 4, -8, 7.5], [-3, -5, 9, 2], [6, 1, 6, 2]], dtype=dtype, requires_grad=True
    )
    got = closed_form.optimal_logps(ref, rewards, beta)
    want = table_of((1, 0, 0, 0), (1, 0, 0, 0), (0.25, 0, 0.75, 0), dtype=dtype)
    torch.testing.assert_close(got.exp(), want.exp(), rtol=BOUND[dtype], atol=0)
    assert (got[:2, 0] == 0).all()
    best = torch.isfinite(want)
    slopes = torch.autograd.grad(got[best].sum(), rewards)[0]
    assert torch.isfinite(slopes).all()
    kls, means = closed_form.frontier(ref[:2], rewards[:2], [beta])
    exact = {"rtol": BOUND[dtype], "atol": 0}
    torch.testing.assert_close(kls.item(), -math.log(0.4), **exact)
    torch.testing.assert_close(means.item(), 3.0, **exact)
    value = closed_form.objective(want[:2], ref[:2], rewards[:2], beta)
    torch.testing.assert_close(value.tolist(), [9.0, -3.0], **exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_log_partition_that_is_no_float_is_refused(dtype):
    beta = SMALLEST[dtype]
    ref = table_of((0.4, 0.6, 0.0), dtype=dtype)
    for rewards in ([9.0, 1.0, 0.0], [-9.0, -5.0, 100.0]):
        with pytest.raises(ValueError, match="beta"):
            closed_form.log_partition(ref, torch.tensor([rewards], dtype=dtype), beta)
    for rewards in ([0.0, -9.0, 100.0], [0.0, -1.0, 0.0], [0.0, -9.0, -100.0]):
        rewards = torch.tensor([rewards], dtype=dtype, requires_grad=True)
        log_z = closed_form.log_partition(ref, rewards, beta)
        torch.testing.assert_close(log_z.item(), math.log(0.4), rtol=BOUND[dtype], atol=0)
        slope = torch.autograd.grad(log_z.sum(), rewards)[0] * beta
        want = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
        torch.testing.assert_close(slope, want, rtol=BOUND[dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewards_are_compared_before_they_are_divided(dtype):
    """r / beta is no float, and the difference of two is one."""
    beta = {torch.float32: 1e-36, torch.float64: 1e-306}[dtype]
    gap = 2.0**-13
    rewards = torch.tensor([[1e3, 1e3 - gap, 1e3]], dtype=dtype)
    ref = table_of((0.25, 0.25, 0.5), dtype=dtype)
    got = closed_form.optimal_logps(ref, rewards, beta)[0].tolist()
    want = [math.log(1 / 3), -gap / beta, math.log(2 / 3)]
    assert got == pytest.approx(want, rel=BOUND[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tilts_by_weights_as_large_as_floats_are(dtype):
    largest = torch.finfo(dtype).max
    prior = table_of((0.4, 0.6, 0.0), (0.4, 0.6, 0.0), (0.4, 0.6, 0.0), dtype=dtype)
    rows = [[largest, -largest, largest], [-largest, -largest, largest], [-largest, 0.0, -INF]]
    weights = torch.tensor(rows, dtype=dtype, requires_grad=True)
    logps, log_z = closed_form.tilt(prior, weights)
    want = table_of((1, 0, 0), (0.4, 0.6, 0), (0, 1, 0), dtype=dtype).exp()
    torch.testing.assert_close(logps.exp(), want, rtol=BOUND[dtype], atol=0)
    sizes = torch.tensor([largest, -largest, math.log(0.6)], dtype=dtype)
    torch.testing.assert_close(log_z, sizes, rtol=BOUND[dtype], atol=0)
    slopes = torch.autograd.grad(logps[want > 0].sum() + log_z.sum(), weights)[0]
    assert not torch.isnan(slopes).any()


# --- half precision --------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
EVERY = {**LOSSES, **PREFERENCES, **POLICY_GRADIENT, **CLOSED_FORM}


def in_half(case, dtype):
    """The inputs of a case in half precision, whose tables still sum to 1 within 5e-4."""
    tensors = []
    for at, column in enumerate(case.columns):
        if type(flat(column)[0]) is not float:
            tensors.append(torch.tensor(column))
            continue
        values = torch.tensor(column, dtype=torch.float64)
        if at in case.tables:
            tensors.append(normalised_in_half(values, dtype))
        else:
            largest = torch.finfo(dtype).max
            finite = values.clamp(-largest, largest)
            tensors.append(torch.where(values == -INF, values, finite).to(dtype))
    return tensors


def normalised_in_half(logits, dtype):
    """Logits moved a little, row by row, until their rounded table happens to sum to 1."""
    generator = torch.Generator().manual_seed(11)
    found = torch.full_like(logits, math.nan, dtype=dtype)
    while (missing := torch.isnan(found)).any():
        noise = torch.randn(logits.shape, dtype=torch.float64, generator=generator)
        table = (logits + 0.3 * noise).log_softmax(-1).to(dtype)
        good = (table.double().exp().sum(-1, keepdim=True) - 1).abs() < 5e-4
        found = torch.where(missing & good, table, found)
    return found


def to_half(values, dtype):
    """Rounded once; a finite value that is too large becomes the largest."""
    largest = torch.finfo(dtype).max
    kept = torch.isinf(values) | torch.isnan(values)
    return torch.where(kept, values, values.clamp(-largest, largest)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_single_precision_rounded_once(name, dtype):
    case = EVERY[name]
    inputs = in_half(case, dtype)
    if dtype == torch.float16 and name in ("log_partition at 1e-30", "log_partition at 1e-06"):
        with pytest.raises(ValueError, match="`beta` must be large enough"):
            case.function(*inputs, **case.options)
        return  # log Z is no float16
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    found, values, leaves = {}, {}, {}
    for kind, tensors in (("half", inputs), ("single", wide)):
        leaves[kind] = [
            t.clone().requires_grad_() if t.is_floating_point() and i not in case.data else t
            for i, t in enumerate(tensors)
        ]
        values[kind] = case.function(*leaves[kind], **case.options)
    want = to_half(values["single"].detach(), dtype)
    assert values["half"].dtype == dtype
    assert torch.equal(values["half"], want)
    if not values["half"].requires_grad:
        return
    counted = values["single"].detach().abs() < torch.finfo(dtype).max  # not those at the largest
    for kind, tensors in leaves.items():
        learned = [t for t in tensors if t.requires_grad]
        found[kind] = torch.autograd.grad(
            values[kind].masked_fill(~counted, 0.0).sum(),
            learned,
            allow_unused=True,
            materialize_grads=True,
        )
    info = torch.finfo(dtype)
    for half, single in zip(found["half"], found["single"], strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(
            half.double(),
            to_half(single, dtype).double(),
            rtol=info.eps,
            atol=info.smallest_normal * info.eps,
            equal_nan=False,
        )


@pytest.mark.parametrize("dtype", [*DTYPES, *HALVES])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_out_to_ten_thousand_nats(name, dtype):
    case = LOSSES[name]
    inputs = [t.requires_grad_(t.is_floating_point()) for t in in_half(case, dtype)]
    values = case.function(*inputs, **case.options)
    assert values.dtype == dtype
    assert torch.isfinite(values).all()
    if values.requires_grad:
        learned = [t for t in inputs if t.requires_grad]
        for slope in torch.autograd.grad(values.sum(), learned):
            assert torch.isfinite(slope).all()


OF_TABLES = {
    "tilt": lambda p, q, r: closed_form.tilt(p, r),
    "log_partition": lambda p, q, r: closed_form.log_partition(p, r, 0.7),
    "optimal_logps": lambda p, q, r: closed_form.optimal_logps(p, r, 0.7),
    "f_optimal_logps": lambda p, q, r: closed_form.f_optimal_logps(p, r, 0.7, divergence="js"),
    "implied_rewards": lambda p, q, r: closed_form.implied_rewards(p, q, 0.7),
    "kl": lambda p, q, r: closed_form.kl(p, q),
    "expected_reward": lambda p, q, r: closed_form.expected_reward(p, r),
    "objective": lambda p, q, r: closed_form.objective(p, q, r, 0.7),
    "frontier": lambda p, q, r: closed_form.frontier(p, r, [0.7, 2.0]),
    "best_of_n_logps": lambda p, q, r: closed_form.best_of_n_logps(p, r, 4),
    "total_variation": lambda p, q, r: closed_form.total_variation(p, q),
    "chi_squared": lambda p, q, r: closed_form.chi_squared(p, q),
    "log_partition_markov": lambda p, q, r: closed_form.log_partition_markov(
        p[0], q[:1].expand(50, 50), r[0], 0.7, 2
    ),
    "optimal_baseline": lambda p, q, r: policy_gradient.optimal_baseline(p, r, r**2),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", OF_TABLES)
def test_tables_normalised_in_half_precision_are_taken_and_logits_are_not(name, dtype):
    for seed in range(50):
        p, q, r = draws(seed, 3, 4, 50).to(dtype)
        found = OF_TABLES[name](p.log_softmax(-1), q.log_softmax(-1), r)
        for part in found if isinstance(found, tuple) else [found]:
            assert part.dtype == dtype
            assert torch.isfinite(part).all()
        if name != "implied_rewards":
            with pytest.raises(ValueError, match="log_softmax"):
                OF_TABLES[name](p, q, r)

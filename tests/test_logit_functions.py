"""The five properties over every function and over random parameters; starts, inverses, the kernels' view, copies."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uncork import (
    PLIF,
    AsymmetricSoftcap,
    Compose,
    GeneralizedSigsoftmax,
    Identity,
    LogitFunction,
    MonotoneNetwork,
    Scale,
    ScaledSigmoid,
    Sigsoftmax,
    Softcap,
)
from uncork.logit_functions.base import _REGISTRY, examples, with_tables
from uncork.logit_functions.operations import PiecewiseLinear

F32, F64 = torch.float32, torch.float64
CASES: dict[str, Callable[[], LogitFunction]] = {
    **examples(),
    "scale-fixed": lambda: Scale(0.3),
    "softcap-wide": Softcap,
    "asymmetric-fixed": lambda: AsymmetricSoftcap(15.0, 50.0),
    "sigmoid-wide": ScaledSigmoid,
    "gss-steep": GeneralizedSigsoftmax,
    "gss-convex": lambda: GeneralizedSigsoftmax(2.0, 0.1),
    "gss-linear": lambda: GeneralizedSigsoftmax(-1.0, 1.0),
    **{f"plif-{p}": partial(PLIF, p) for p in (1, 2, 3, 7, 100, 1000, 100_000)},
    **{f"plif-unit-slope-{p}": partial(PLIF, p, unit_slope=True) for p in (1, 3, 100)},
    **{f"relu-{u}": partial(MonotoneNetwork, u) for u in (1, 2, 7, 100)},
    **{f"tanh-{u}": partial(MonotoneNetwork, u, units="tanh") for u in (1, 2, 7, 100)},
    "compose": lambda: Compose(Scale(0.5), PLIF(7), Sigsoftmax(), MonotoneNetwork(3)),
    "compose-bounded": lambda: Compose(PLIF(10), Softcap(40.0)),
    "compose-tanh": lambda: Compose(MonotoneNetwork(3, units="tanh"), GeneralizedSigsoftmax()),
    "compose-empty": Compose,
}
LEARNABLE = [name for name, make in CASES.items() if any(True for _ in make().parameters())]
OURS = list(dict.fromkeys(type(make()) for make in examples().values()))  # in order: each process collects alike
# Each function with nothing asked of it but to learn, and pieces and units of every number.
STARTS = {
    **{cls.__name__: partial(cls, learnable=True) if "learnable" in cls().options() else cls for cls in OURS},
    **{n: CASES[n] for n in LEARNABLE if n.startswith(("plif-", "relu-", "tanh-")) and n not in examples()},
}
EXACT_START = [
    n for n, make in STARTS.items() if make().unbounded and any(p.requires_grad for p in make().parameters())
]
SMALL = [n for n in CASES if not n.endswith(("100", "1000", "100000"))]
BEHAVIOUR = [(n, s) for n in CASES for s in ((0.0, 1.0, 5.0) if n in LEARNABLE else (0.0,))]


def build(name, spread=0.0, dtype=F64):
    """The function with normal noise on every parameter; logarithms of caps and scales get little of it."""
    torch.manual_seed(sum(map(ord, name)) + int(10 * spread))
    function = CASES[name]()
    with torch.no_grad():
        for key, parameter in function.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(noise * (0.1 * min(spread, 1.0) if key.endswith("log_gain") else spread))
    return function.to(dtype)


def kinks(function):
    """The scores at which a function bends, float64; at most 1000 of them."""
    points = torch.empty(0, dtype=F64)
    for part in reversed(function.functions if isinstance(function, Compose) else [function]):
        own = torch.empty(0, dtype=F64)
        if isinstance(part, PLIF):
            own = part.knots(F64)
        elif isinstance(part, MonotoneNetwork) and part.units == "relu":
            own = part.thresholds.detach().double()
        points = torch.cat([own[torch.randperm(own.numel())[:1000]], part.inverse(points).detach()])
    return points


def neighbourhood(function, dtype):
    """Sorted scores: a grid, all magnitudes, +-1e4, the bound, the kinks; each with neighbours of 1 to 3 ulp."""
    tiny_to_huge = torch.logspace(-12, 4, 300, dtype=F64)
    grid = torch.linspace(-60, 60, 1501, dtype=F64)
    x = torch.cat([grid, tiny_to_huge, -tiny_to_huge, torch.tensor([0.0, 20.0, -20.0]), kinks(function)]).to(dtype)
    parts, up, down = [x], x, x
    for _ in range(3):
        up, down = up.nextafter(torch.full_like(x, math.inf)), down.nextafter(torch.full_like(x, -math.inf))
        parts += [up, down]
    return torch.cat(parts).unique()


def magnitude(function, x):
    """The largest number on the way from x to f(x): what "2 ulp" has to refer to.

    2 ulp of |f(x)| alone is false of any f in floating point: where f(x) passes 0 it is the difference of larger
    numbers. Those are x (an error of half an ulp in x, or in its piece, is one of f'(x)|x| in f), f(x) - x, a piece's
    table value and the line on top of it, a sigmoid's height, and the weights of the tanh units.
    """
    if isinstance(function, Compose):
        total = x.abs()
        for part in function.functions:
            slope = part.derivative(x).abs()
            total, x = torch.maximum(total * slope.clamp(min=1), magnitude(part, x)), part(x)
        return total
    y = function(x)
    sizes = [x, y, y - x, function.derivative(x) * x]
    tables = function.tables(x.dtype)
    if any(isinstance(op, PiecewiseLinear) for op in function.operations() or ()):
        knots, values, slopes = tables
        i = function.operations()[0].locate(x, tables)[0]
        sizes += [values[i], slopes[i] * (x - knots[i])]
    if isinstance(function, ScaledSigmoid):
        sizes.append(torch.full_like(x, function.height))
    if isinstance(function, MonotoneNetwork) and function.units == "tanh":
        spacing = 2 * function.bound / function.num_units
        sizes.append(torch.full_like(x, float((function.raw_weights.double().exp() + 1).sum() * spacing / 4)))
    return torch.stack([s.detach().abs() for s in sizes]).amax(0)


def ulp(x):
    return x.nextafter(torch.full_like(x, math.inf)) - x


def test_every_function_has_examples():
    """They are what brings a function into these tests and those of the loss; a name stands for one of them."""
    ours = {cls for cls in _REGISTRY.values() if cls.__module__.startswith("uncork.")} - {Compose}
    assert ours == set(OURS)
    assert len(examples()) == sum(len(cls.examples) for cls in ours)


# ---- the five properties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spread"), BEHAVIOUR)
@pytest.mark.parametrize("dtype", [F32, F64])
@torch.no_grad()
def test_image(name, spread, dtype):
    function = build(name, spread, dtype)
    far = torch.tensor([-1e12, 1e12], dtype=dtype)
    low, high = function(far).tolist()
    ends = function(torch.tensor([-math.inf, math.inf, math.nan], dtype=dtype))
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert ends[0] == -math.inf
    assert ends[2].isnan()
    if function.unbounded:
        assert low < -1e4
        assert high > 1e4
        assert ends[1] == math.inf
    else:
        assert -200 < low < high < 200
        assert abs(ends[1].item() - high) <= 1e-6 * high


@pytest.mark.parametrize(("name", "spread"), BEHAVIOUR)
@pytest.mark.parametrize("dtype", [F32, F64])
@torch.no_grad()
def test_increasing_and_continuous_to_two_ulp(name, spread, dtype):
    # In float32, between any two floats, f never falls by more than 2 ulp of the largest number on the way to f.
    # Between neighbours it rises by no more than its slope and 3 ulp: each of the two values is rounded three times.
    # In float64, where the claim is strictness on separated points, the tables' own sums round too: 8 times as many.
    function = build(name, spread, dtype)
    assert function.increasing
    assert function.continuous
    x = neighbourhood(function, dtype)
    y, slope, size = function(x), function.derivative(x), magnitude(function, x)
    tolerance = ulp(torch.maximum(size[1:], size[:-1])) * (1 if dtype == F32 else 8)
    if isinstance(function, Compose):
        tolerance = tolerance * max(1, len(function.functions))
    rise, step = y.diff(), x.diff()
    assert bool((slope >= 0).all())
    assert (-rise / tolerance).max() <= 2
    near = step <= 4 * ulp(torch.maximum(x[1:].abs(), x[:-1].abs()))
    jump = rise - torch.maximum(slope[1:], slope[:-1]) * step
    assert (jump / tolerance)[near].max() <= 3


@pytest.mark.parametrize(("name", "spread"), BEHAVIOUR)
@torch.no_grad()
def test_strictly_increasing_on_separated_points(name, spread):
    function = build(name, spread)
    x = torch.cat([torch.linspace(-40, 40, 8001, dtype=F64), kinks(function)]).unique()
    x = x[torch.cat([torch.tensor([True]), x.diff() > 1e-4])]
    if function.unbounded:
        x = torch.cat([torch.tensor([-1e4, -1e3], dtype=F64), x, torch.tensor([1e3, 1e4], dtype=F64)])
    assert bool((function(x).diff() > 0).all())
    assert bool((function.derivative(x) > 0).all())


@pytest.mark.parametrize(("name", "spread"), BEHAVIOUR)
def test_derivative_is_the_slope_and_autograds(name, spread):
    function, step = build(name, spread), 1e-6
    bends = kinks(function).sort().values
    x = torch.randn(1000, dtype=F64) * 15
    if bends.numel():
        gaps = (x.unsqueeze(-1) - bends).abs().amin(-1)
        x = x[gaps > 2 * step]
    if name == "plif-100000":  # its pieces are 4e-4 wide: look at their middles
        x = function.knots(F64)[::50] + 2e-4
    x.requires_grad_()
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    with torch.no_grad():
        slope = function.derivative(x)
        quotient = (function(x + step) - function(x - step)) / (2 * step)
        size = magnitude(function, x)
    # A unit of rate r >> 1 bends within 1 / r; where that is narrower than the step, no quotient sees it.
    smooth = not ("tanh" in name and spread == 5.0)
    torch.testing.assert_close(grad, slope, rtol=1e-9, atol=1e-13)
    if smooth:
        assert bool(((quotient - slope).abs() <= 1e-6 * slope + 1e-9 * (1 + size)).all())


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ["plif-2", "plif-3", "plif-7", "plif-100", "plif-1000", "relu-7", "relu-100"])
@torch.no_grad()
def test_derivative_at_a_kink_is_that_of_one_side(name, dtype):
    function = build(name, 1.0, dtype)
    knots = kinks(function).to(dtype).sort().values
    step = knots.diff().amin() / 2
    at, left, right = (function.derivative(x) for x in (knots, knots - step, knots + step))
    assert bool(torch.minimum((at - left).abs(), (at - right).abs()).le(1e-6 * at).all())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_nonlinear_says_what_the_function_does(name):
    function = build(name, 1.0)
    x = torch.linspace(-40, 40, 4001, dtype=F64)
    y = function(x)
    chord = y[0] + (x - x[0]) * (y[-1] - y[0]) / (x[-1] - x[0])
    assert bool(((y - chord).abs() > 1e-3).any()) == function.nonlinear


# ---- impossible words, dtypes, layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spread"), [(n, s) for n, s in BEHAVIOUR if n in SMALL])
def test_impossible_words_stay_and_pass_no_gradient(name, spread):
    function = build(name, spread)
    finite = torch.randn(5, dtype=F64)
    scores = torch.cat([finite[:2], torch.tensor([-math.inf]), finite[2:]]).requires_grad_()
    upstream = torch.randn(6, dtype=F64)
    logits = function(scores)
    assert logits[2] == -math.inf
    gradients = torch.autograd.grad(logits, [scores, *function.parameters()], upstream)
    keep = [0, 1, 3, 4, 5]
    alone = torch.autograd.grad(function(scores[keep]), [scores, *function.parameters()], upstream[keep])
    if not isinstance(function, Identity) and name != "compose-empty":  # these hand the scores themselves on
        assert gradients[0][2] == 0
    for got, expected in zip(gradients[1:], alone[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_scores_are_computed_in_float32_and_get_no_new_ties(name, half):
    function = build(name, 1.0, F32)
    x = torch.linspace(-40, 40, 5001).to(half).unique()
    logits = function(x)
    if not isinstance(function, Identity):
        assert logits.dtype == F32
    assert torch.equal(logits.float(), function(x.float()))
    apart = x[x.abs() > 2**-6]  # nearer to 0 a wide piece's table value swallows the score: see `magnitude`
    # A bounded function is flat to float32 far from 0, whatever the precision of the scores.
    slope = function.derivative(apart)
    rising = torch.minimum(slope[1:], slope[:-1]) > (-1 if function.unbounded else 1e-4)
    assert bool((function(apart).float().diff()[rising] > 0).all())


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_layout_autocast_and_shape_do_not_matter(name):
    function = build(name, 1.0, F32)
    x = torch.randn(6, 5) * 10
    expected = function(x)
    assert torch.equal(function(x.t()).t(), expected)
    assert torch.equal(function.derivative(x.t()).t(), function.derivative(x))
    inverse = function.inverse(expected)  # to rounding: the atanh of torch 2.6 is another one in a vector's last lanes
    torch.testing.assert_close(function.inverse(expected.t()).t(), inverse, equal_nan=True)
    assert function(torch.empty(0, 3)).shape == (0, 3)
    assert function(torch.tensor(1.5)).shape == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x), expected)


@pytest.mark.parametrize("name", SMALL)
def test_scores_have_to_be_floating(name):
    with pytest.raises(TypeError, match=r"scores: expected a floating dtype, got torch\.int64"):
        build(name)(torch.tensor([1, 2]))


# ---- starts, inverses, kernels' view ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT_START)
@pytest.mark.parametrize("dtype", [F32, F64])
@torch.no_grad()
def test_starts_as_the_identity_to_the_bit(name, dtype):
    top = torch.finfo(dtype).max
    x = torch.cat([neighbourhood(STARTS[name](), dtype), torch.tensor([top, -top, 1e30, -1e30, 1e-38], dtype=dtype)])
    x = torch.cat([x, torch.randn(1000, dtype=dtype) * 10])
    for function in (STARTS[name](), STARTS[name]().double(), STARTS[name]().to(torch.bfloat16)):
        assert torch.equal(function(x), x)
        assert torch.equal(function.derivative(x), torch.ones_like(x))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 300), st.floats(1e-3, 1e3), st.sampled_from(["plif", "relu", "tanh"]))
def test_any_size_and_bound_start_as_the_identity(size, bound, kind):
    function = PLIF(size, bound) if kind == "plif" else MonotoneNetwork(size, bound, units=kind)
    x = torch.randn(50) * bound
    assert torch.equal(function(x).detach(), x)
    assert torch.equal(function(x.double()).detach(), x.double())


@pytest.mark.parametrize(("name", "spread"), [(n, s) for n, s in BEHAVIOUR if s <= 1 and n != "tanh-100"])
@torch.no_grad()
def test_inverse(name, spread):
    function = build(name, spread)
    x = torch.cat([torch.randn(200, dtype=F64) * 15, torch.tensor([0.0], dtype=F64), kinks(function)[:50]])
    slope = function.derivative(x)
    x, slope = x[slope > 1e-6], slope[slope > 1e-6]
    back = function.inverse(function(x))
    assert back.dtype == F64
    assert bool(((back - x).abs() <= 1e-13 * (1 + magnitude(function, x)) * (1 + 1 / slope)).all())
    if function.unbounded:
        ends = torch.tensor([-math.inf, math.inf], dtype=F64)
        assert torch.equal(function.inverse(ends), ends)
    assert function.inverse(torch.tensor([math.nan], dtype=F64)).isnan().all()


@pytest.mark.parametrize(("name", "spread"), BEHAVIOUR)
@pytest.mark.parametrize("dtype", [F32, F64])
@torch.no_grad()
def test_operations_over_tables_are_the_function(name, spread, dtype):
    function = build(name, spread, dtype)
    operations = function.operations()
    if operations is None:
        pytest.skip("only autograd serves it")
    x = torch.cat([torch.randn(500, dtype=dtype) * 15, kinks(function).to(dtype)])
    expected, tables = function(x), function.tables(dtype)
    assert all(t.dtype == dtype and t.isfinite().all() for t in tables)
    assert sum(op.num_tables for op in operations) == len(tables)
    for operation, own in with_tables(operations, tables, x.device):
        x = operation.forward(x, own)
    # A closed form may round once less in its plain form than over tables; pieces are the same to the bit.
    pieces = all(isinstance(operation, PiecewiseLinear) for operation in operations)
    tolerance = 0 if pieces else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(x, expected, rtol=tolerance, atol=tolerance)


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_spec_state_copies_and_pickles(name):
    function = build(name, 1.0, F32)
    x = torch.randn(100) * 15
    rebuilt = LogitFunction.from_spec(json.loads(json.dumps(function.spec())))
    rebuilt.load_state_dict(function.state_dict())
    assert rebuilt.spec() == function.spec()
    assert repr(rebuilt) == repr(function)
    for other in (rebuilt, copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert torch.equal(other(x), function(x))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in function.parameters()]

"""PLIF against the published formula, its derived gradient, and the functions that it is made from."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from uncork import PLIF, Sigsoftmax, Softcap

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)
repeatable = settings(derandomize=True, deadline=None, max_examples=40)


def scattered(num_pieces, bound, spread=1.0):
    plif = PLIF(num_pieces, bound).double()
    with torch.no_grad():
        plif.raw_slopes.add_(torch.randn(num_pieces) * spread)
    return plif


def published_plif(x, slopes, bound):
    """The published form in float64: f(-T) = 0, an exclusive prefix sum of the slopes, one look-up."""
    num_pieces = slopes.numel()
    delta = 2 * bound / num_pieces
    i = torch.floor((x + bound) / delta).clamp(0, num_pieces - 1).long()
    return (x - (-bound + i.to(x.dtype) * delta)) * slopes[i] + delta * (slopes.cumsum(0) - slopes)[i]


@repeatable
@given(st.integers(1, 400), st.floats(0.5, 100.0), st.floats(0.1, 3.0), seeds)
def test_plif_is_the_published_function_up_to_a_constant(num_pieces, bound, spread, seed):
    torch.manual_seed(seed)
    plif = scattered(num_pieces, bound, spread)
    x = torch.randn(300, dtype=F64) * bound
    anchor = published_plif(torch.zeros(1, dtype=F64), plif.slopes().detach(), bound)
    expected = published_plif(x, plif.slopes().detach(), bound) - anchor
    torch.testing.assert_close(plif(x).detach(), expected, rtol=1e-10, atol=1e-10 * bound)
    raw = plif.raw_slopes.detach() + math.log(math.e - 1)
    torch.testing.assert_close(plif.slopes().detach(), F.softplus(raw), rtol=2e-6, atol=2e-6)


def test_plif_with_the_published_size_and_start():
    torch.manual_seed(0)
    plif = PLIF(100_000, 20.0, init="random")
    slopes = plif.slopes().detach()
    assert abs(slopes.mean() - 1.107) < 0.006
    assert abs(slopes.std() - 0.626) < 0.006
    x = torch.linspace(-25, 25, 5001)
    expected = published_plif(x.double(), slopes, 20.0) - published_plif(torch.zeros(1, dtype=F64), slopes, 20.0)
    torch.testing.assert_close(plif(x.double()).detach(), expected, rtol=0, atol=1e-9)
    # In float32 each knot rounds by up to 1e-3 of a piece; the values follow the rounded knots, and so drift a little.
    torch.testing.assert_close(plif(x).detach().double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "function", [Softcap(10.0), Sigsoftmax(), lambda z: 5 * torch.sinh(z / 8), lambda z: torch.exp(z / 10)]
)
def test_from_function_reports_its_error_which_falls_with_the_square(function):
    points = torch.rand(20_000, dtype=F64) * 40 - 20
    target = function(points) - function(torch.zeros(1, dtype=F64))
    errors = []
    for num_pieces in (51, 102, 204):
        plif = PLIF.from_function(function, num_pieces)
        measured = (plif(points).detach() - target).abs().max().item()
        assert measured <= 1.02 * plif.fit_error + 1e-5
        assert plif.fit_error <= 1.1 * measured + 1e-5
        errors.append(plif.fit_error)
    assert 3.0 < errors[0] / errors[1] < 5.0
    assert 3.0 < errors[1] / errors[2] < 5.0


@pytest.mark.parametrize(
    "function",
    [
        torch.neg,
        torch.zeros_like,
        torch.sin,
        lambda z: torch.logit((z + 20) / 40),  # infinite at both ends
        lambda z: torch.log(z + 20),  # infinite at one end
        lambda z: z * math.nan,
    ],
)
def test_from_function_refuses_what_does_not_rise(function):
    with pytest.raises(ValueError, match="function: expected finite and increasing"):
        PLIF.from_function(function, 50)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda z: 3.0, TypeError, "expected one that returns a Tensor, got float"),
        (lambda z: z.numpy(), TypeError, "expected one that returns a Tensor, got ndarray"),
        (lambda z: z.cfloat(), TypeError, r"expected one that returns real numbers, got torch\.complex64"),
        (lambda z: z[:3], ValueError, r"expected an elementwise one, but it turned shape \(101,\) into \(3,\)"),
        (lambda z: z.sum(), ValueError, r"expected an elementwise one, but it turned shape \(101,\) into \(\)"),
    ],
)
def test_from_function_says_what_the_function_has_to_return(function, error, message):
    with pytest.raises(error, match=f"^function: {message}$"):
        PLIF.from_function(function)


def test_from_function_takes_a_function_that_works_in_place():
    wanted, found = PLIF.from_function(lambda z: z * 2), PLIF.from_function(lambda z: z.mul_(2))
    assert torch.equal(found.raw_slopes, wanted.raw_slopes)
    assert found.fit_error == wanted.fit_error


@pytest.mark.parametrize("function", [torch.relu, lambda z: z.clamp(-3, 3), lambda z: 2 * torch.tanh(z / 2)])
def test_from_function_gives_a_flat_stretch_the_smallest_slope(function):
    plif = PLIF.from_function(function, 2000)
    assert plif.fit_error < 1e-3
    assert bool((plif.slopes() > 0).all())


@repeatable
@given(st.integers(1, 200), seeds)
def test_plif_gradient_is_two_histograms_and_a_reverse_scan(num_pieces, seed):
    torch.manual_seed(seed)
    bound = 10.0
    plif = scattered(num_pieces, bound)
    x = (torch.randn(300, dtype=F64) * 8).requires_grad_()
    g = torch.randn(300, dtype=F64)
    grad_x, grad_v = torch.autograd.grad(plif(x), [x, plif.raw_slopes], g)
    # The published form's gradient; the anchor f(0) = 0 takes off that of the constant f(-T) -> 0 once per element.
    delta = 2 * bound / num_pieces

    def grad_of_slopes(x, g):
        i = torch.floor((x + bound) / delta).clamp(0, num_pieces - 1).long()
        knots = -bound + torch.arange(num_pieces, dtype=F64) * delta
        inside = torch.zeros(num_pieces, dtype=F64).index_add_(0, i, g * (x - knots[i]))
        count = torch.zeros(num_pieces, dtype=F64).index_add_(0, i, g)
        return i, inside + delta * (count.flip(0).cumsum(0).flip(0) - count)

    i, slope_gradient = grad_of_slopes(x.detach(), g)
    slope_gradient = slope_gradient - grad_of_slopes(torch.zeros(1, dtype=F64), g.sum().reshape(1))[1]
    v = plif.raw_slopes.detach() + math.log(math.e - 1)
    torch.testing.assert_close(grad_x, plif.slopes().detach()[i] * g, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad_v, torch.sigmoid(v) * slope_gradient, rtol=3e-6, atol=1e-8)


@pytest.mark.parametrize("num_pieces", [100, 100_000])
def test_float32_parameter_gradient_over_four_million_elements(num_pieces):
    # A histogram kept in float32 would lose the small terms: a bin sums up to 10^5 numbers of one sign.
    # The truth is that of the function as float32 has it: at P = 100,000 a knot rounds by up to 1e-3 of a piece.
    torch.manual_seed(0)
    x, g = torch.randn(4_000_000) * 6, torch.rand(4_000_000)
    plif = PLIF(num_pieces, init="random")
    (got,) = torch.autograd.grad(plif(x), plif.raw_slopes, g)

    knots = plif.knots(torch.float32).double()
    width = torch.cat([knots, torch.tensor([20.0], dtype=F64)]).diff()
    i = (torch.searchsorted(knots, x.double(), right=True) - 1).clamp(0)
    inside = torch.zeros(num_pieces, dtype=F64).index_add_(0, i, g.double() * (x.double() - knots[i]))
    count = torch.zeros(num_pieces, dtype=F64).index_add_(0, i, g.double())
    later = count.flip(0).cumsum(0).flip(0) - count
    anchor = (knots < 0) * count.sum()  # f(0) = 0 takes off the rise from -T to 0 for every element
    expected = (inside + width * (later - anchor)) * torch.sigmoid(plif.raw_slopes.double() + math.log(math.e - 1))
    assert (got.double() - expected).norm() <= 1e-5 * expected.norm()
    busy = expected.abs() > 1e-2 * expected.abs().max()
    assert ((got.double() - expected).abs() / expected.abs())[busy].max() <= 1e-5


@pytest.mark.parametrize("num_pieces", [2, 3, 8, 9])
def test_pieces_are_floored_not_truncated(num_pieces):
    # long() rounds towards zero: scores just below 0 (odd P: below the middle) would get their right neighbour's slope.
    plif = PLIF(num_pieces, num_pieces / 2).double()  # pieces of width 1
    with torch.no_grad():
        plif.raw_slopes.copy_(torch.arange(num_pieces))
        middles = plif.knots(F64) + 0.5
        for offset in (-0.45, 0.0, 0.45):
            torch.testing.assert_close(plif.derivative(middles + offset), plif.slopes(), rtol=0, atol=1e-12)


def test_plif_is_linear_beyond_its_bound():
    torch.manual_seed(0)
    plif = scattered(10, 4.0)
    first, last = plif.slopes()[[0, -1]].tolist()
    with torch.no_grad():
        for far, slope in ((-4.0, first), (4.0, last)):
            x = torch.tensor([far, far * 10, far * 1e6], dtype=F64)
            torch.testing.assert_close(plif(x) - plif(x[:1]), slope * (x - far), rtol=1e-9, atol=1e-9)


def test_one_step_of_bfloat16_spans_many_pieces_but_f_does_not_see_it():
    # f computed in bfloat16 makes ties and inversions at the top; from bfloat16 scores in float32 it makes none.
    torch.manual_seed(0)
    plif = PLIF(100_000, init="random")
    scores = torch.arange(8, 16, 2**-4).bfloat16()
    with torch.no_grad():
        assert bool((plif(scores).diff() > 0).all())
        assert torch.equal(plif(scores), plif(scores.float()))


@repeatable
@given(st.integers(1, 400), st.floats(0.5, 100.0), st.floats(0.1, 3.0), st.sampled_from([0.0, -0.9, 0.37]), seeds)
def test_unit_slope_holds_the_rise_of_a_tenth(num_pieces, bound, spread, at, seed):
    torch.manual_seed(seed)
    free = scattered(num_pieces, bound, spread)
    plif = PLIF(num_pieces, bound, unit_slope=True, unit_slope_at=at * bound).double()
    plif.load_state_dict(free.state_dict())
    ends = torch.tensor([(at - 0.1) * bound, (at + 0.1) * bound], dtype=F64)
    assert plif(ends).diff().item() == pytest.approx(bound / 5, rel=1e-6)
    # The shape is that of the free function, divided by its own mean slope there.
    x = torch.randn(300, dtype=F64) * bound
    scale = free(ends).diff() / (bound / 5)
    torch.testing.assert_close(plif(x), free(x) / scale, rtol=1e-5, atol=1e-5 * bound)


def test_unit_slope_starts_as_the_identity_to_the_bit_and_keeps_its_spec():
    plif = PLIF(30, 7.0, unit_slope=True)
    x = torch.randn(1000) * 9
    assert torch.equal(plif(x), x)
    assert PLIF.from_spec(plif.spec()).unit_slope
    assert not PLIF.from_spec(PLIF(30).spec()).unit_slope
    assert PLIF.from_spec(PLIF(30, 7.0, unit_slope=True, unit_slope_at=5).spec()).unit_slope_at == 5.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit_slope": True, "unit_slope_at": 18.5}, "unit_slope_at: expected at most 0.9 bound = 18 in size, got 18"),
        ({"unit_slope": True, "unit_slope_at": float("nan")}, "unit_slope_at: expected a finite number, got nan"),
        ({"unit_slope": True, "unit_slope_at": "5"}, "unit_slope_at: expected a finite number, got '5'"),
        ({"unit_slope_at": 5.0}, "unit_slope_at: expected 0 without unit_slope=True, got 5"),
    ],
)
def test_a_place_of_unit_slope_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PLIF(**options)


@pytest.mark.parametrize("middle", [-800.0, -5.0, 0.0, 40.0])
def test_unit_slope_stays_increasing_where_the_middle_is_flat_or_steep(middle):
    plif = PLIF(20, 10.0, unit_slope=True)
    with torch.no_grad():
        plif.raw_slopes.fill_(-middle)
        plif.raw_slopes[9:11] = middle
    slopes = plif.slopes()
    assert slopes.isfinite().all()
    assert (1 + plif.tables()[2] > 0).all()
    rises = plif.double()(torch.linspace(-15, 15, 31, dtype=F64)).diff()
    assert (rises > 0).all()
    slopes.log().sum().backward()
    assert plif.raw_slopes.grad.isfinite().all()


def test_unit_slope_gradients_against_finite_differences():
    torch.manual_seed(0)
    plif = PLIF(12, 3.0, unit_slope=True).double()
    x = torch.randn(40, dtype=F64) * 2

    def of(raw):
        return torch.func.functional_call(plif, {"raw_slopes": raw}, (x,))

    assert torch.autograd.gradcheck(of, (torch.randn(12, dtype=F64, requires_grad=True),))

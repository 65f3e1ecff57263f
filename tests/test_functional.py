"""Equations against their definitions in float64, gradients against truth, and the traps that others fell into."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from uncork import (
    PLIF,
    AsymmetricSoftcap,
    Compose,
    GeneralizedSigsoftmax,
    MonotoneNetwork,
    Scale,
    ScaledSigmoid,
    Sigsoftmax,
    Softcap,
    functional,
)
from uncork.logit_functions.base import with_tables
from uncork.logit_functions.monotone import TanhUnits

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)
repeatable = settings(derandomize=True, deadline=None, max_examples=40)


def scatter(function, spread=1.0):
    with torch.no_grad():
        for parameter in function.parameters():
            parameter += torch.randn_like(parameter) * spread
    return function.double()


# ---- equations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "definition"),
    [
        (functional.identity, lambda z: z),
        (lambda z: functional.scale(z, 0.3), lambda z: 0.3 * z),
        (lambda z: functional.softcap(z, 15.0), lambda z: 15 * np.tanh(z / 15)),
        (
            lambda z: functional.asymmetric_softcap(z, 9.0, 40.0),
            lambda z: np.where(z > 0, 40 * np.tanh(z / 40), 9 * np.tanh(z / 9)),
        ),
        (lambda z: functional.scaled_sigmoid(z, 23.0, 5.0, 7.5), lambda z: 23 / (1 + np.exp(-(z + 5) / 7.5))),
        (functional.sigsoftmax, lambda z: z - np.log1p(np.exp(-z))),
        (
            lambda z: functional.generalized_sigsoftmax(z, -1.5, 2.5),
            lambda z: 2.5 * (z + 1.5) - 1.5 - 1.5 * np.log1p(np.exp(z + 1.5)),
        ),
        (functional.tanh, np.tanh),
        (functional.sech2, lambda z: 1 / np.cosh(z) ** 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_closed_forms(function, definition, dtype):
    z = torch.linspace(-40, 40, 4001, dtype=dtype)
    got = function(z)
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(got.numpy(), definition(z.double().numpy()), rtol=100 * eps, atol=50 * eps)


def relu_weights(network):
    """The positive weights (1 + excess) / U of the plain network: 1 / U each at the start."""
    return [
        (F.softplus(raw + math.log(math.e - 1))) / network.num_units for raw in (network.raw_right, network.raw_left)
    ]


@repeatable
@given(st.integers(1, 60), st.sampled_from(["as they start", "moved", "crossing", "duplicated", "equal"]), seeds)
def test_monotone_networks_are_the_plain_networks_up_to_a_constant(num_units, how, seed):
    torch.manual_seed(seed)
    x = torch.randn(200, dtype=F64) * 15
    for units in ("relu", "tanh"):
        network = scatter(MonotoneNetwork(num_units, 10.0, units=units))
        with torch.no_grad():
            start = network.thresholds - network.threshold_shifts
            wanted = {
                "as they start": start,
                "moved": start + torch.randn(num_units) * 0.1,
                "crossing": torch.randn(num_units) * 12,
                "duplicated": start[torch.randint(num_units, (num_units,))],
                "equal": torch.full((num_units,), 1.25),
            }[how]
            network.threshold_shifts.copy_(wanted - start)
            t = network.thresholds

            def plain(z, network=network, t=t, start=start, units=units):
                if units == "relu":
                    return functional.monotone_relu(z, t, *relu_weights(network))
                spacing = 20.0 / network.num_units
                w, r = spacing / 4 * network.raw_weights.exp(), network.raw_rates.exp() / spacing
                w0, r0 = torch.full_like(w, spacing / 4), torch.full_like(r, 1 / spacing)
                return z + functional.monotone_tanh(z, t, w, r) - functional.monotone_tanh(z, start, w0, r0)

            got, expected = network(x), plain(x)
            if units == "relu":  # anchored at f(0) = 0
                expected = expected - plain(torch.zeros(1, dtype=F64))
                assert network(torch.zeros(1, dtype=F64)).abs() < 1e-12
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-5)


def test_a_monotone_network_bends_both_ways():
    network = MonotoneNetwork(2, 10.0).double()
    with torch.no_grad():
        network.raw_right.copy_(torch.tensor([2.0, -2.0]))  # convex at -5, concave at 5
        network.raw_left.copy_(torch.tensor([-2.0, 2.0]))
        slopes = network.derivative(torch.tensor([-8.0, 0.0, 8.0], dtype=F64))
    assert slopes[1] > slopes[0]
    assert slopes[1] > slopes[2]


def test_mixture_is_its_definition_and_stays_in_log_space():
    torch.manual_seed(0)
    logits, prior = torch.randn(4, 3, 50, dtype=F64) * 5, torch.randn(4, 3, dtype=F64)
    expected = (prior.softmax(-1).unsqueeze(-1) * logits.softmax(-1)).sum(-2).log()
    torch.testing.assert_close(functional.mixture_log_softmax(logits, prior), expected)
    # log(p + 1e-8) caps the loss at 18.4, and a clamp on p has no gradient below it.
    steep = torch.tensor([[0.0, -300.0], [0.0, -500.0]], requires_grad=True)
    log_prob = functional.mixture_log_softmax(steep, torch.zeros(2))
    assert abs(log_prob[1].item() - (-300 - math.log(2))) < 1e-3
    log_prob[1].backward()
    torch.testing.assert_close(steep.grad, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))


def test_a_word_that_every_component_excludes_has_no_gradient():
    logits = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]], requires_grad=True)
    prior = torch.zeros(2, requires_grad=True)
    log_prob = functional.mixture_log_softmax(logits, prior)
    assert log_prob[2] == -math.inf
    log_prob[0].backward()
    assert bool(logits.grad.isfinite().all())
    assert bool(prior.grad.isfinite().all())


# ---- gradients -------------------------------------------------------------------------------------------------------

GRADIENT_CASES = [
    lambda: Scale(2.0, learnable=True),
    lambda: Softcap(7.0),
    lambda: AsymmetricSoftcap(6.0, 11.0, learnable=True),
    ScaledSigmoid,
    Sigsoftmax,
    GeneralizedSigsoftmax,
    lambda: PLIF(1, 8.0),
    lambda: PLIF(4, 8.0),
    lambda: PLIF(7, 8.0),
    lambda: MonotoneNetwork(1, 8.0),
    lambda: MonotoneNetwork(6, 8.0),
    lambda: MonotoneNetwork(1, 8.0, units="tanh"),
    lambda: MonotoneNetwork(6, 8.0, units="tanh"),
    lambda: Compose(Scale(0.9, learnable=True), PLIF(5, 6.0), MonotoneNetwork(3), Softcap(25.0)),
]


@pytest.mark.parametrize("make", GRADIENT_CASES)
def test_gradcheck_for_scores_and_every_parameter(make):
    torch.manual_seed(3)
    function = scatter(make(), 0.5)
    names, parameters = zip(*function.named_parameters(), strict=True) if list(function.parameters()) else ((), ())
    x = (torch.randn(4, 5, dtype=F64) * 6).requires_grad_()  # beyond the bound too; no draw lies within 1e-6 of a kink
    upstream = torch.randn(4, 5, dtype=F64)

    def weighted(x, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(function, state, (x,)) * upstream

    assert gradcheck(weighted, (x, *parameters), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [m for m in GRADIENT_CASES if m().operations() and len(m().operations()) == 1])
def test_table_gradients_are_autograds_through_the_plain_code(make):
    torch.manual_seed(4)
    function = scatter(make(), 0.5)
    x, upstream = torch.randn(400, dtype=F64) * 8, torch.randn(400, dtype=F64)
    ((operation, tables),) = with_tables(function.operations(), function.tables(F64), x.device)
    leaves = tuple(t.detach().clone().requires_grad_() for t in tables)
    if len(leaves) == 3:  # piecewise linear: gather by index; knots carry no gradient by contract
        place = operation.locate(x, tables)[0]
        logits = functional.piecewise_linear(x, tables[0], *leaves[1:], place)
    elif isinstance(operation, TanhUnits):  # the network at its start is a constant
        logits = operation.forward(x, (*leaves[:3], *tables[3:]))
    else:
        logits = operation.forward(x, leaves)
    expected = torch.autograd.grad(logits, leaves, upstream, allow_unused=True)
    for got, want in zip(operation.table_gradients(x, upstream, tables), expected, strict=True):
        assert got.dtype == F64
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [m for m in GRADIENT_CASES if any(True for _ in m().parameters())])
def test_parameter_gradients_do_not_depend_on_the_threads(make):
    torch.manual_seed(0)
    function = scatter(make(), 0.5)
    x, g = torch.randn(300_000, dtype=F64) * 6, torch.randn(300_000, dtype=F64)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            runs.append(torch.autograd.grad(function(x), list(function.parameters()), g))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Scale(2.0, learnable=True),
        lambda: AsymmetricSoftcap(30.0, 30.0, learnable=True),
        lambda: MonotoneNetwork(20),
        lambda: MonotoneNetwork(3, units="tanh"),
    ],
)
def test_float32_parameter_gradients_are_those_of_float64(make, scale):
    torch.manual_seed(0)
    function = make()
    truth = make().double()
    x, g = torch.randn(1_000_000) * scale, torch.rand(1_000_000)
    got = torch.autograd.grad(function(x), list(function.parameters()), g)
    expected = torch.autograd.grad(truth(x.double()), list(truth.parameters()), g.double())
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


# ---- traps -----------------------------------------------------------------------------------------------------------


def test_saturated_gradients_survive_in_float32():
    # 1 - tanh^2 is 0 in float32 from |z/c| = 9 on, in float64 from 19 on; the mathematics says 4 exp(-2|z/c|).
    u = torch.cat([-torch.linspace(0.01, 40, 500), torch.linspace(0.01, 40, 500)])
    truth = 1 / torch.cosh(u.double()) ** 2
    for function, inputs in (
        (Softcap(1.0), u),
        (Softcap(32.0), u * 32),
        (AsymmetricSoftcap(16.0, 64.0), torch.where(u > 0, u * 64, u * 16)),
    ):
        inputs = inputs.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(inputs).sum(), inputs)
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=0)
        torch.testing.assert_close(function.derivative(inputs.detach()).double(), truth, rtol=1e-5, atol=0)
    z = (u * 2).requires_grad_()  # sigmoid(2u)(1 - sigmoid(2u)) = sech(u)^2 / 4
    (grad,) = torch.autograd.grad(ScaledSigmoid(4.0, 0.0, 1.0)(z).sum(), z)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=0)


def test_sigsoftmax_neither_overflows_nor_needs_a_shift():
    # log(exp(z) sigmoid(z) / sum) is inf/inf at z = 100; shifting by the maximum first changes the distribution.
    z = torch.tensor([[100.0, 99.0, 0.0], [-100.0, -101.0, -150.0], [1e4, 0.0, -1e4]], requires_grad=True)
    log_prob = Sigsoftmax()(z).log_softmax(-1)
    assert bool(log_prob.isfinite().all())
    log_prob.sum().backward()
    assert bool(z.grad.isfinite().all())
    # Very negative rows have slope 2, very positive ones slope 1.
    assert abs((log_prob[0, 0] - log_prob[0, 1]).item() - 1) < 1e-4
    assert abs((log_prob[1, 0] - log_prob[1, 1]).item() - 2) < 1e-4


def test_parameters_may_be_bfloat16_but_f_is_not():
    torch.manual_seed(0)
    function = Compose(PLIF(50, init="random"), MonotoneNetwork(20, init="random")).to(torch.bfloat16)
    wide = Compose(PLIF(50), MonotoneNetwork(20))
    wide.load_state_dict(function.state_dict())
    x = (torch.randn(100, dtype=torch.bfloat16) * 9).requires_grad_()
    logits = function(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, wide(x.float()))
    logits.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in function.parameters())


@pytest.mark.parametrize("cap", [2.0, 3.0, 30.0, 1e-4])
def test_softcap_is_the_plain_formula_to_the_bit(cap):
    scores = torch.cat([torch.randn(10_000) * 10, torch.tensor([0.0, 1e4, -1e4, torch.inf])])
    assert torch.equal(functional.softcap(scores, cap), cap * torch.tanh(scores / cap))

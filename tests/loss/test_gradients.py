"""Gradients in float64: gradcheck for every function, reduction, bias and target kind, and the ways to ask for them."""

import dataclasses

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from uncork import PLIF, Compose, Scale

# reduction, target kind, then whether there are class weights, smoothing, z-loss, token weights. With a bias each of
# the four is the other way round, so any two settings meet in all their combinations.
_HALF = [
    ("mean", "index", (1, 1, 0, 0)),
    ("mean", "probabilities", (1, 0, 1, 0)),
    ("sum", "index", (0, 1, 1, 0)),
    ("sum", "probabilities", (1, 1, 1, 1)),
    ("none", "index", (0, 1, 0, 1)),
    ("none", "probabilities", (1, 0, 0, 1)),
]
CASES = [
    (reduction, kind, bias, tuple(flag != bias for flag in extras))
    for reduction, kind, extras in _HALF
    for bias in (0, 1)
]


def case_id(case) -> str:
    reduction, kind, bias, extras = case
    names = [name for name, on in zip(("weight", "smoothing", "z", "token-weight"), extras, strict=True) if on]
    return "-".join([reduction, kind, *(["bias"] if bias else []), *names])


def options_of(case, problem):
    """Keyword arguments of the loss, and the token weights (an operand) or None."""
    reduction, _, _, (weighted, smooth, z, grad_token) = case
    options = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(problem.weight.shape[0], dtype=torch.float64) + 0.3
    if smooth:
        options["label_smoothing"] = 0.2
    if z and problem.prior is None:
        options["z_loss"] = 0.1
    tokens = problem.input.shape[0]
    token_weight = (torch.rand(tokens, dtype=torch.float64) + 0.3).requires_grad_() if grad_token else None
    if token_weight is not None:
        options["token_weight"] = token_weight
    return options, token_weight


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradcheck(impl, function_name, mixture, case, make_problem):
    problem = make_problem(
        function_name,
        mixture=mixture,
        bias=bool(case[2]),
        probabilities=case[1] == "probabilities",
        tokens=3,
        features=2,
        vocab=5,
    )
    options, token_weight = options_of(case, problem)
    operands = problem.operands() + ([] if token_weight is None else [token_weight])
    upstream = torch.randn(problem.input.shape[0] if case[0] == "none" else (), dtype=torch.float64)

    def weighted(*_):
        # Chunks of two tokens: the gradients of chunks meet in every case.
        return upstream * problem.loss(impl, chunk_size=4 if mixture else 2, **options)

    # One random direction, at a tolerance at which it sees an error of 0.1 % wherever all directions do.
    assert gradcheck(weighted, operands, atol=1e-8, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_plain_torch(impl, mixture, case, make_problem):
    problem = make_problem("compose", mixture=mixture, bias=bool(case[2]), probabilities=case[1] == "probabilities")
    options, token_weight = options_of(case, problem)
    operands = problem.operands() + ([] if token_weight is None else [token_weight])
    ours, truth = problem.loss(impl, **options), problem.expected(**options)
    torch.testing.assert_close(ours, truth)
    upstream = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(ours, operands, upstream), torch.autograd.grad(truth, operands, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_one_operand_asks(impl, mixture, reduction, make_problem):
    problem = make_problem("plif", mixture=mixture)
    token_weight = torch.rand(5, dtype=torch.float64)
    operands = [*problem.operands(), token_weight]
    for t in operands:
        t.requires_grad_(True)
    upstream = torch.randn(5 if reduction == "none" else (), dtype=torch.float64)

    def loss():
        return problem.loss(impl, reduction=reduction, token_weight=token_weight)

    together = torch.autograd.grad(loss(), operands, upstream)
    for chosen, wanted in zip(operands, together, strict=True):
        for t in operands:
            t.requires_grad_(t is chosen)
        (alone,) = torch.autograd.grad(loss(), [chosen], upstream)
        assert torch.equal(alone, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["plif", "module", "none"])
def test_nothing_asks(impl, mixture, reduction, name, make_problem):
    problem = make_problem(name, mixture=mixture)
    wanted = problem.loss(impl, reduction=reduction).detach()
    with torch.no_grad():
        quiet = problem.loss(impl, reduction=reduction)
    with torch.inference_mode():
        inference = problem.loss(impl, reduction=reduction)
    for t in problem.operands():
        t.requires_grad_(False)
    frozen = problem.loss(impl, reduction=reduction)
    for loss in (quiet, inference, frozen):
        assert not loss.requires_grad
        assert torch.equal(loss, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(impl, mixture, reduction, make_problem):
    problem = make_problem("plif", mixture=mixture)
    operands = problem.operands()
    loss = problem.loss(impl, reduction=reduction)
    upstream = torch.randn_like(loss)
    first = torch.autograd.grad(loss, operands, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, operands, upstream, retain_graph=True)
    doubled = torch.autograd.grad(loss, operands, 2 * upstream)
    for a, b, c in zip(first, second, doubled, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(2 * a, c)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_right_or_refused(impl, reduction, make_problem):
    problem = make_problem("softcap")

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), problem.input, create_graph=True)[0]

    truth = gradient(problem.expected(reduction=reduction)).square().sum()
    (wanted,) = torch.autograd.grad(truth, problem.weight)

    def penalty():
        return gradient(problem.loss(impl, reduction=reduction)).square().sum()

    if impl == "reference":
        torch.testing.assert_close(torch.autograd.grad(penalty(), problem.weight)[0], wanted)
        return
    for ask in (
        lambda: torch.autograd.grad(penalty(), problem.weight, allow_unused=True),
        lambda: torch.autograd.grad(penalty() + problem.weight.sum(), problem.weight),
        lambda: penalty().backward(inputs=[problem.weight]),
        lambda: penalty().backward(),
    ):
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            ask()


@pytest.mark.parametrize("name", ["none", "plif", "softcap"])
def test_no_way_to_ask_for_a_second_derivative_gives_a_wrong_one(impl, mixture, name, make_problem):
    problem = make_problem(name, mixture=mixture)
    weight, direction = problem.weight.detach(), torch.randn_like(problem.weight)
    functional = torch.autograd.functional

    def loss(weight):
        return dataclasses.replace(problem, weight=weight).loss(impl)

    def expected(weight):
        return dataclasses.replace(problem, weight=weight).expected()

    right = impl == "reference" and name != "plif"  # whose kernel differentiates itself
    for ask in (
        lambda f: functional.hessian(f, weight),
        lambda f: functional.hvp(f, weight, direction)[1],
        lambda f: functional.vhp(f, weight, direction)[1],
    ):
        if right:
            torch.testing.assert_close(ask(loss), ask(expected))
            continue
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            ask(loss)


def test_a_gradient_with_a_graph_within_a_checkpoint(impl, make_problem):
    problem = make_problem("plif")
    plain = torch.autograd.grad(problem.loss(impl), problem.weight)[0]
    loss = checkpoint(problem.loss, impl, use_reentrant=False)
    (found,) = torch.autograd.grad(loss, problem.weight, create_graph=True)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", ["plif", "monotone-relu", "monotone-tanh"])
def test_a_function_alone_refuses_a_second_derivative(name, make_function):
    function, scores = make_function(name), torch.randn(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.functional.hessian(lambda z: function(z).square().sum(), scores)


def test_gradients_accumulate_and_keep_dtype_and_layout(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    problem.loss(impl).backward()
    once = [t.grad.clone() for t in problem.operands()]
    problem.loss(impl).backward()
    for t, g in zip(problem.operands(), once, strict=True):
        assert t.grad.dtype == t.dtype
        assert t.grad.shape == t.shape
        torch.testing.assert_close(t.grad, 2 * g)


def test_one_function_used_twice_and_a_frozen_one(impl, make_problem):
    shared = Scale(0.8, learnable=True).double()
    frozen = PLIF(5, 2.0, init="random", frozen=True).double()
    problem = make_problem(Compose(shared, frozen, shared))
    operands = [problem.input, problem.weight, problem.bias, shared.log_gain]
    assert gradcheck(lambda *_: problem.loss(impl, reduction="sum"), operands, fast_mode=True)
    problem.loss(impl).backward()
    assert frozen.raw_slopes.grad is None


def test_one_tensor_as_input_and_weight(impl, make_problem):
    problem = make_problem("sigsoftmax", tokens=7, vocab=7, bias=False)
    problem.input = problem.weight
    assert gradcheck(lambda _: problem.loss(impl), [problem.weight], fast_mode=True)


def test_strided_and_expanded_operands(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    wide = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    row = torch.randn(1, *problem.input.shape[1:], dtype=torch.float64, requires_grad=True)
    problem.weight, problem.input = wide[:, ::2].T, row.expand_as(problem.input)
    upstream = torch.randn(5, dtype=torch.float64)
    ours = torch.autograd.grad(problem.loss(impl, reduction="none"), [wide, row], upstream)
    truth = torch.autograd.grad(problem.expected(reduction="none"), [wide, row], upstream)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_a_module_whose_parameter_is_unused(module_impl, make_problem):
    module = torch.nn.Tanh()
    module.unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    problem = make_problem(module)
    loss = problem.loss(module_impl)
    torch.testing.assert_close(loss, problem.expected())
    problem.loss(module_impl).backward()
    assert module.unused.grad is None or not module.unused.grad.any()


@pytest.mark.parametrize("changed", ["weight", "target"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_changing_an_argument_before_backward_is_refused(impl, mixture, reduction, changed, make_problem):
    """In the backward "none" makes the scores again, so a changed argument could give a wrong gradient in silence."""
    problem = make_problem("plif", mixture=mixture, probabilities=True)
    before = torch.autograd.grad(problem.loss(impl, reduction=reduction).sum(), problem.input)[0]
    loss = problem.loss(impl, reduction=reduction).sum()
    with torch.no_grad():
        getattr(problem, changed).add_(1)
    try:
        (after,) = torch.autograd.grad(loss, problem.input)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert torch.equal(after, before)

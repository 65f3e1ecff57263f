"""Scores of +inf and NaN: nan in the loss and in the gradients, as F.cross_entropy has it, whoever computes.

Words that are impossible (-inf) take no gradient, not even there. A function that turns +inf into a finite number keeps
the loss finite.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from uncork.loss import linear_cross_entropy

V = 5
PLACES = {"target": [1], "elsewhere": [4], "all": list(range(V))}


def broken(make_problem, name, value, place, *, impossible=False, dtype=torch.float32, **options):
    """One token with the value as its score of some words; word 2's exponential is 0, word 3 may be impossible."""
    torch.manual_seed(0)
    problem = make_problem(name, vocab=V, tokens=1, dtype=dtype, **options)
    with torch.no_grad():
        problem.bias[2] = -500.0
        problem.bias[PLACES[place]] = value
        if impossible:
            problem.bias[3] = -math.inf
    if problem.target.is_floating_point():
        problem.target[:, 3] = 0
    else:
        problem.target = torch.tensor([1])
    return problem


def of(loss, problem):
    return torch.autograd.grad(loss, problem.operands(), torch.ones_like(loss), allow_unused=True)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_all_implementations_agree(impl, function_name, mixture, value, place, kind, make_problem):
    impossible = kind == "index" and place != "all"
    options = {"impossible": impossible, "mixture": mixture, "probabilities": kind == "probabilities"}
    problem = broken(make_problem, function_name, value, place, **options)
    loss = problem.loss(impl)
    grads = of(loss, problem)
    finite = value == math.inf and not getattr(problem.function, "unbounded", True)
    assert loss.isfinite() == finite
    scores = 4 if mixture else 3
    grad_input, grad_weight, grad_bias = grads[:3]
    if finite:
        # Of a chain, what comes before the bounded function sees inf times the slope 0.
        chain = function_name == "compose"
        assert all(g.isfinite().all() for g in (grads[:scores] if chain else grads) if g is not None)
    else:
        possible = torch.ones(V, dtype=torch.bool)
        possible[3] = not impossible
        assert grad_input.isnan().all()
        assert torch.equal(grad_bias.isnan(), possible)
        assert torch.equal(grad_weight.isnan().all(-1), possible)
    if impossible:
        assert grad_bias[3] == 0
        assert not grad_weight[3].any()
    twin = broken(make_problem, function_name, value, place, **options)
    if twin.function is not None:
        twin.function.load_state_dict(problem.function.state_dict())
    wanted = of(twin.loss("reference"), twin)
    torch.testing.assert_close(grads[:scores], wanted[:scores], equal_nan=True, rtol=1e-4, atol=1e-5)
    if place == "all" or (finite and chain):  # where every score is infinite, the reference's parameters take no part
        return
    for a, b in zip(grads[scores:], wanted[scores:], strict=True):
        assert a.isnan().any() == b.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_as_torch(impl, value, place, reduction, dtype, make_problem):
    problem = broken(make_problem, "none", value, place, dtype=dtype)
    loss = problem.loss(impl, reduction=reduction)
    scores = F.linear(problem.input, problem.weight, problem.bias).detach().requires_grad_()
    truth = F.cross_entropy(scores, problem.target, reduction=reduction)
    torch.testing.assert_close(loss, truth, equal_nan=True)
    (grad_scores,) = torch.autograd.grad(truth.sum(), scores)
    torch.testing.assert_close(of(loss, problem)[2], grad_scores[0], equal_nan=True)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", PLACES)
def test_statistics_agree(impl, function_name, mixture, value, place, make_problem):
    ours, theirs = (
        broken(make_problem, function_name, value, place, impossible=place != "all", mixture=mixture) for _ in range(2)
    )
    if ours.function is not None:
        theirs.function.load_state_dict(ours.function.state_dict())
    found, wanted = ours.statistics(impl), theirs.statistics("reference")
    torch.testing.assert_close(found[:3], wanted[:3], equal_nan=True)
    if value == math.inf and not mixture:
        assert found.argmax == wanted.argmax


def test_one_broken_token_leaves_the_others_alone(impl):
    weight = torch.zeros(V, 2)
    weight[1] = 3e38
    input = torch.tensor([[1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    losses = linear_cross_entropy(input, weight, torch.tensor([0, 0]), reduction="none", impl=impl)
    assert losses[0].isnan()
    torch.testing.assert_close(losses[1].item(), math.log(V))
    (grad,) = torch.autograd.grad(losses, input, torch.ones(2))
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()

"""No valid token, no token, NaN, and impossible words (scores of -inf)."""

import pytest
import torch
from torch.nn import functional as F

from uncork.loss import linear_cross_entropy

NAN_LOSSES = {"mean": torch.nan, "sum": 0.0}


def drop_words(problem, words):
    """The same problem over the words that are left."""
    left = torch.tensor([v for v in range(problem.weight.shape[0]) if v not in words])
    smaller = type(problem)(**vars(problem))
    smaller.weight = problem.weight.detach()[left].requires_grad_()
    smaller.bias = problem.bias.detach()[left].requires_grad_()
    if problem.target.is_floating_point():
        smaller.target = problem.target[:, left]
    else:
        position = {int(v): i for i, v in enumerate(left)}
        smaller.target = torch.tensor([position.get(int(y), -100) for y in problem.target])
    return smaller, left


def masked(make_problem, name, words, **options):
    """A problem whose words are impossible: bias -inf, no target, probability 0."""
    problem = make_problem(name, **options)
    with torch.no_grad():
        problem.bias[words] = -torch.inf
    if problem.target.is_floating_point():
        problem.target[:, words] = 0
    else:
        allowed = [v for v in range(problem.weight.shape[0]) if v not in words]
        problem.target = torch.tensor([-100 if y == -100 else allowed[int(y) % len(allowed)] for y in problem.target])
    return problem


@pytest.mark.parametrize("kind", ["index", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_masked_word_is_an_absent_word(impl, function_name, mixture, kind, reduction, make_problem):
    words = [2, 5]
    problem = masked(make_problem, function_name, words, mixture=mixture, probabilities=kind == "probabilities")
    with torch.no_grad():
        problem.weight[5] = 0  # as the padded rows of W are
    smaller, left = drop_words(problem, words)
    ours, truth = problem.loss(impl, reduction=reduction), smaller.loss("reference", reduction=reduction)
    torch.testing.assert_close(ours, truth)
    upstream = torch.randn_like(truth)
    got = torch.autograd.grad(ours, problem.operands(), upstream)
    wanted = torch.autograd.grad(truth, smaller.operands(), upstream)
    for t, a, b in zip(problem.operands(), got, wanted, strict=True):
        if t is problem.weight or t is problem.bias:
            assert not a[words].any()
            a = a[left]
        torch.testing.assert_close(a, b)


def test_masked_words_in_statistics(impl, function_name, mixture, make_problem):
    problem = masked(make_problem, function_name, [0, 6], mixture=mixture)
    smaller, left = drop_words(problem, [0, 6])
    ours, truth = problem.statistics(impl), smaller.statistics("reference")
    torch.testing.assert_close(ours[:3], truth[:3])
    assert torch.equal(ours.argmax, left[truth.argmax])

    def total(s):
        return s.log_prob.sum() + 2 * s.logsumexp.sum() - 3 * s.entropy.sum()

    got = torch.autograd.grad(total(ours), problem.operands())
    wanted = torch.autograd.grad(total(truth), smaller.operands())
    for t, a, b in zip(problem.operands(), got, wanted, strict=True):
        if t is problem.weight or t is problem.bias:
            assert not a[[0, 6]].any()
            a = a[left]
        torch.testing.assert_close(a, b)


def test_a_masked_word_takes_no_z_loss(impl, make_problem):
    problem = masked(make_problem, "plif", [1], probabilities=True)
    smaller, _ = drop_words(problem, [1])
    torch.testing.assert_close(problem.loss(impl, z_loss=0.3), smaller.loss("reference", z_loss=0.3))


@pytest.mark.parametrize("name", ["none", "identity", "plif", "module"])
def test_an_impossible_target_costs_infinity_and_adds_no_gradient_there(impl, name, make_problem):
    problem = make_problem(name)
    with torch.no_grad():
        problem.bias[3] = -torch.inf
    problem.target = torch.tensor([3, 1, 2, 3, 0])
    losses = problem.loss(impl, reduction="none")
    assert losses.isinf().tolist() == [True, False, False, True, False]
    grad_weight, grad_bias = torch.autograd.grad(losses.sum(), [problem.weight, problem.bias])
    assert not grad_weight[3].any()
    assert grad_bias[3] == 0
    assert grad_weight.isfinite().all()


def test_a_mixture_component_switched_off(impl, make_problem):
    """A prior logit of -inf takes the component away."""
    problem = make_problem("plif", mixture=True)
    with torch.no_grad():
        problem.prior[:, 1] = -torch.inf
    alone = make_problem(problem.function)
    alone.input, alone.weight, alone.bias, alone.target = (
        problem.input[:, 0],
        problem.weight,
        problem.bias,
        problem.target,
    )
    ours, truth = problem.loss(impl), alone.loss("reference")
    torch.testing.assert_close(ours, truth)
    got = torch.autograd.grad(ours, [problem.input, problem.weight, problem.prior])
    wanted = torch.autograd.grad(truth, [problem.input, problem.weight])
    torch.testing.assert_close(got[:2], wanted)
    torch.testing.assert_close(got[2], torch.zeros_like(got[2]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("extras", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}])
def test_no_valid_token(impl, function_name, mixture, reduction, extras, make_problem):
    if mixture:
        extras = {k: v for k, v in extras.items() if k != "z_loss"}
    problem = make_problem(function_name, mixture=mixture)
    problem.target = torch.full((5,), -100)
    token_weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    loss = problem.loss(impl, reduction=reduction, token_weight=token_weight, **extras)
    torch.testing.assert_close(loss.item(), NAN_LOSSES[reduction], equal_nan=True)
    for g in torch.autograd.grad(loss, [*problem.operands(), token_weight], torch.tensor(3.0).double()):
        assert torch.equal(g, torch.zeros_like(g))


def test_no_valid_token_unreduced(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    problem.target = torch.full((5,), -100)
    losses = problem.loss(impl, reduction="none")
    assert torch.equal(losses, torch.zeros_like(losses))
    for g in torch.autograd.grad(losses, problem.operands(), torch.randn(5, dtype=torch.float64)):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_no_token(impl, mixture, reduction, probabilities, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=0, probabilities=probabilities)
    loss = problem.loss(impl, reduction=reduction)
    assert loss.requires_grad
    torch.testing.assert_close(loss, problem.expected(reduction=reduction), equal_nan=True)
    for t, g in zip(problem.operands(), torch.autograd.grad(loss.sum(), problem.operands()), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


def test_statistics_of_no_token(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=0)
    s = problem.statistics(impl)
    assert [tuple(t.shape) for t in s] == [(0,)] * 4
    assert s.argmax.dtype == torch.int64
    total = s.log_prob.sum() + s.logsumexp.sum() + s.entropy.sum()
    for g in torch.autograd.grad(total, problem.operands()):
        assert not g.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nan_in_nan_out(impl, function_name, mixture, reduction, make_problem):
    problem = make_problem(function_name, mixture=mixture)
    with torch.no_grad():
        problem.input[3].view(-1)[0] = torch.nan
    loss = problem.loss(impl, reduction=reduction)
    broken = torch.arange(5) == 3
    if reduction == "none":
        assert torch.equal(loss.isnan(), broken)
    else:
        assert loss.isnan()
    grad_input, grad_weight = torch.autograd.grad(loss.sum(), [problem.input, problem.weight])
    rows = grad_input.flatten(1).isnan()
    assert torch.equal(rows.any(1), broken)
    assert grad_weight.isnan().any()


def test_nan_in_a_weight_reaches_the_loss(impl, function_name, mixture, make_problem):
    problem = make_problem(function_name, mixture=mixture)
    with torch.no_grad():
        problem.weight[4, 0] = torch.nan
    assert problem.loss(impl).isnan()


def test_an_ignored_nan_stays_out_of_loss_and_input_gradient(impl, function_name, mixture, make_problem):
    problem = make_problem(function_name, mixture=mixture)  # ignores token 1
    with torch.no_grad():
        problem.input[1] = torch.nan
    for reduction in ("mean", "none"):
        loss = problem.loss(impl, reduction=reduction)
        assert loss.isfinite().all()
        (grad_input,) = torch.autograd.grad(loss.sum(), problem.input)
        assert grad_input[[0, 2, 3, 4]].isfinite().all()


def test_token_weight_of_an_ignored_token_is_not_read(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    token_weight = torch.rand(5, dtype=torch.float64)
    wanted = problem.loss(impl, token_weight=token_weight)
    token_weight[1] = torch.nan
    assert torch.equal(problem.loss(impl, token_weight=token_weight), wanted)


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 3), (2, 1, 3), (2, 0)])
def test_leading_shapes(impl, shape, make_function):
    input = torch.randn(*shape, 3, requires_grad=True)
    weight, target = torch.randn(7, 3), torch.randint(0, 7, shape)
    token_weight = torch.rand(shape)
    function = make_function("plif", torch.float32)
    loss = linear_cross_entropy(
        input,
        weight,
        target,
        reduction="none",
        token_weight=token_weight,
        impl=impl,
        logit_function=function,
    )
    assert loss.shape == shape
    logits = function(F.linear(input, weight)).reshape(-1, 7)
    truth = F.cross_entropy(logits, target.reshape(-1), reduction="none").view(shape) * token_weight
    torch.testing.assert_close(loss, truth)
    loss.sum().backward()
    assert input.grad.shape == input.shape


def test_one_word(impl, function_name, mixture, make_problem):
    problem = make_problem(function_name, mixture=mixture, vocab=1)
    loss = problem.loss(impl)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    for g in torch.autograd.grad(loss, problem.operands()):
        torch.testing.assert_close(g, torch.zeros_like(g))


def test_smoothing_spares_impossible_words_of_weight_0(impl):
    """A padded vocabulary: with class weight 0 on the padding the loss is that of the real words' smoothing."""
    torch.manual_seed(0)
    x, w, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64), torch.arange(5)
    bias = torch.tensor([0.0] * 6 + [-torch.inf] * 2, dtype=torch.float64)
    weight = torch.tensor([1.0] * 6 + [0.0] * 2, dtype=torch.float64)
    got = linear_cross_entropy(x, w, y, linear_bias=bias, weight=weight, label_smoothing=0.2, impl=impl)
    log_prob = (x @ w[:6].T).log_softmax(-1)
    expected = (-0.8 * log_prob.gather(1, y[:, None]).squeeze(1) - 0.2 / 8 * log_prob.sum(1)).mean()
    torch.testing.assert_close(got, expected)

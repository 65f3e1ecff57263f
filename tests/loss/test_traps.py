"""Traps that others fell into, one test each; and nothing that would stop a GPU."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from uncork import PLIF, Compose, Scale, Sigsoftmax, Softcap
from uncork.loss import linear_cross_entropy, mixture_cross_entropy, token_statistics
from uncork.loss.chunk_size import CPU
from uncork.loss.implementations import IMPLEMENTATIONS


def loss_of_scores(scores, target, impl, function=None, **options):
    """The loss of given scores (N, V): W is the identity matrix."""
    return linear_cross_entropy(
        scores,
        torch.eye(scores.shape[-1], dtype=scores.dtype),
        torch.as_tensor(target),
        logit_function=function,
        impl=impl,
        **options,
    )


def test_log_of_p_plus_eps_caps_the_loss(impl):
    """log(p + 1e-8) stops at 18.4."""
    scores = torch.tensor([[0.0, 1000.0]], requires_grad=True)
    loss = loss_of_scores(scores, [0], impl)
    assert loss.item() == 1000
    loss.backward()
    assert scores.grad.tolist() == [[-1, 1]]


def test_mixture_in_probability_space_loses_its_gradient(impl):
    """Every component gives the target e^-200, which no float32 holds."""
    latent = torch.tensor([[[0.0, 200.0], [0.0, 300.0]]], requires_grad=True)
    prior = torch.tensor([[0.5, -0.5]], requires_grad=True)
    loss = mixture_cross_entropy(latent, torch.eye(2), prior, torch.tensor([0]), impl=impl)
    torch.testing.assert_close(loss.item(), 200 - math.log(torch.sigmoid(torch.tensor(1.0))), rtol=1e-6, atol=0)
    loss.backward()
    torch.testing.assert_close(latent.grad, torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]]))
    share = torch.sigmoid(torch.tensor(1.0)).item()
    torch.testing.assert_close(prior.grad, torch.tensor([[share - 1, 1 - share]]))


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_sigsoftmax_overflows_as_a_quotient(impl, size):
    scores = torch.tensor([[size, size - 1, -size]], requires_grad=True)
    loss = loss_of_scores(scores, [1], impl, Sigsoftmax())
    torch.testing.assert_close(loss.item(), math.log1p(math.e), rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    assert gradient[0, 1] < -0.5


def test_max_shifted_sigsoftmax_is_nan_on_negative_rows(impl):
    """Far below 0 the function is 2 z: a shift by the maximum would change the answer, or break it."""
    scores = torch.tensor([[-200.0, -201.0, -1e5]], requires_grad=True)
    loss = loss_of_scores(scores, [1], impl, Sigsoftmax())
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(2)), rtol=0, atol=1e-4)
    loss.backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_function_is_not_monotone(impl, dtype):
    """Scores 8 + k / 256, between the steps of half precision: no two words tie, none changes place."""
    input = torch.tensor([[1.0, 1.0]], dtype=dtype)
    steps = torch.arange(64) / 256
    weight = torch.stack([torch.full((64,), 8.0), steps], 1).to(dtype)
    function = PLIF(100_000, init="random")
    log_prob = -linear_cross_entropy(
        input.expand(64, 2), weight, torch.arange(64), logit_function=function, reduction="none", impl=impl
    )
    assert (log_prob.diff() > 0).all()


def test_truncation_is_not_floor(impl):
    """A score just below 0 belongs to the piece on its left."""
    function = PLIF(2, 1.0).double()
    with torch.no_grad():
        function.raw_slopes.copy_(torch.tensor([-1.0, 1.0]))
    left, right = function.slopes().tolist()
    scores = torch.tensor([[-0.3, 0.3, -1.7, 1.7]], dtype=torch.float64)
    logits = torch.where(scores < 0, left, right) * scores
    for target in range(4):
        ours = loss_of_scores(scores, [target], impl, function)
        torch.testing.assert_close(ours, F.cross_entropy(logits, torch.tensor([target])))


def test_flat_tails_make_ties(impl):
    """Beyond the bound the function goes on rising."""
    function = PLIF(10, 2.0, init="random")
    scores = torch.tensor([[-50.0, -40.0, -30.0, 30.0, 40.0, 50.0]])
    losses = loss_of_scores(scores.expand(6, 6), torch.arange(6), impl, function, reduction="none")
    assert (losses.diff() < 0).all()


def test_many_scores_of_one_piece_add_up(impl):
    """200 000 scores in two pieces: a sum in float32, or added in any order, would drift."""
    function = PLIF(2, 4.0)
    rows = 100 if impl == "triton" else 1000  # the interpreter takes 90 seconds for a thousand
    input, weight = torch.randn(rows, 4) / 4, torch.randn(200, 4)
    target = torch.randint(0, 200, (rows,))

    def gradient():
        loss = linear_cross_entropy(input, weight, target, logit_function=function, impl=impl, chunk_size=100)
        return torch.autograd.grad(loss, function.raw_slopes)[0]

    first = gradient()
    assert torch.equal(first, gradient())
    wide = PLIF(2, 4.0).double()
    truth = F.cross_entropy(wide(F.linear(input.double(), weight.double())), target)
    (exact,) = torch.autograd.grad(truth, wide.raw_slopes)
    torch.testing.assert_close(first.double(), exact, rtol=1e-6, atol=1e-9)


def test_unreduced_loss_with_gradients_of_the_forward_is_wrong(impl, mixture, make_problem):
    """Some upstream gradients 0, some negative, none 1: tokens of upstream 0 pull at nothing."""
    problem = make_problem("plif", mixture=mixture, tokens=6)
    upstream = torch.tensor([0.0, 3.0, -2.0, 0.0, 0.5, 7.0], dtype=torch.float64)
    got = torch.autograd.grad(problem.loss(impl, reduction="none"), problem.operands(), upstream)
    wanted = torch.autograd.grad((problem.expected(reduction="none") * upstream).sum(), problem.operands())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert not got[0][[0, 1, 3]].any()


def test_chunks_of_a_few_rows_are_slow():
    for vocab, features in itertools.product((1, 100, 10_000, 151_936, 10_000_000), (1, 16, 400, 4096)):
        assert 32 <= CPU.default_rows(vocab, features) <= 512
        assert replace(CPU, blocks=16).default_rows(vocab, features) >= 32
    assert CPU.default_rows(262_144, 640) >= 256  # each chunk reads W twice and its gradient once


@pytest.mark.parametrize("times", [1, 2])
def test_function_is_applied_exactly_once(impl, mixture, times, make_problem):
    """Scale(2) once is not twice: loss, statistics, and argmax that cannot see the difference."""
    problem = make_problem(Compose(*[Scale(2.0)] * times).double(), mixture=mixture, bias=False)
    bare = make_problem(None, mixture=mixture, bias=False)
    bare.input, bare.prior, bare.target = problem.input, problem.prior, problem.target
    bare.weight = problem.weight * 2**times
    torch.testing.assert_close(problem.loss(impl), bare.loss(impl))
    for a, b in zip(problem.statistics(impl), bare.statistics(impl), strict=True):
        torch.testing.assert_close(a, b)


def test_an_increasing_function_keeps_the_argmax(impl, function_name, make_problem):
    problem = make_problem(function_name, tokens=50, vocab=20)
    scores = F.linear(problem.input, problem.weight, problem.bias)
    assert torch.equal(problem.statistics(impl).argmax, scores.argmax(-1))


def test_the_likeliest_word_of_saturated_logits_is_that_of_the_scores(impl):
    """In float32 a softcap of 5 makes 200 and 300 the same logit; the ranking is that of the scores."""
    s = token_statistics(torch.tensor([[200.0, 300.0, 0.0]]), torch.eye(3), logit_function=Softcap(5.0), impl=impl)
    assert s.argmax.tolist() == [1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_reads_a_value(impl, function_name, mixture, reduction, make_problem):
    """Meta tensors hold no values: what would stall a GPU (a scan for nan, a check of the target, item()) raises."""
    problem = make_problem(function_name, mixture=mixture, dtype=torch.float32)
    for name in ("input", "weight", "bias", "prior"):
        t = getattr(problem, name)
        if t is not None:
            setattr(problem, name, t.detach().to("meta").requires_grad_())
    problem.target = problem.target.to("meta")
    if problem.function is not None:
        problem.function.to("meta")
    if refused := IMPLEMENTATIONS[impl].refuses(problem.call()):
        pytest.skip(f"looking at a value stalls nothing there: {refused}")
    options = {} if mixture else {"z_loss": 0.1}
    token_weight = torch.ones(5, device="meta")
    loss = problem.loss(impl, reduction=reduction, label_smoothing=0.1, token_weight=token_weight, **options)
    assert all(g.device.type == "meta" for g in torch.autograd.grad(loss.sum(), problem.operands()))
    problem.statistics(impl).entropy.sum().backward()

"""token_statistics and mixture_token_statistics against plain torch."""

import pytest
import torch
from torch.autograd import gradcheck

from uncork.loss import mixture_token_statistics, token_statistics


def plain(problem):
    """(log_prob, logsumexp, entropy, argmax) from the whole matrix; a mixture's logsumexp is 0."""
    logits = problem.logits()
    table = logits.log_softmax(-1)
    kept = problem.target >= 0
    log_prob = torch.where(kept, table.gather(-1, problem.target.clamp(min=0)[:, None])[:, 0], 0)
    lse = logits.logsumexp(-1) if problem.prior is None else torch.zeros_like(log_prob)
    return log_prob, lse, -(table.exp() * table).sum(-1), table.argmax(-1)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_equals_plain_torch(impl, function_name, mixture, chunk_size, make_problem):
    problem = make_problem(function_name, mixture=mixture)
    ours, truth = problem.statistics(impl, chunk_size=chunk_size), plain(problem)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
    assert ours.argmax.dtype == torch.int64
    assert not ours.argmax.requires_grad


def test_gradcheck(impl, function_name, mixture, make_problem):
    """With a random upstream gradient to each of the three, at the ignored token too."""
    problem = make_problem(function_name, mixture=mixture, tokens=3, features=2, vocab=5)
    upstream = torch.randn(3, 3, dtype=torch.float64)

    def total(*_):
        s = problem.statistics(impl, chunk_size=2)
        return torch.stack([s.log_prob, s.logsumexp, s.entropy]) * upstream

    assert gradcheck(total, problem.operands(), atol=1e-8, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize("field", ["log_prob", "logsumexp", "entropy"])
@pytest.mark.parametrize("target", [False, True], ids=["no-target", "target"])
def test_gradient_of_each_alone(impl, mixture, field, target, make_problem):
    if field == "log_prob" and not target:
        pytest.skip("no log_prob without a target")
    problem = make_problem("plif", mixture=mixture)
    ours = getattr(problem.statistics(impl, target=target), field)
    if mixture and field == "logsumexp":  # a constant
        assert not ours.any()
        return
    truth = plain(problem)[("log_prob", "logsumexp", "entropy").index(field)]
    upstream = torch.randn(5, dtype=torch.float64)
    got = torch.autograd.grad(ours, problem.operands(), upstream)
    wanted = torch.autograd.grad(truth, problem.operands(), upstream, allow_unused=True)
    for t, a, b in zip(problem.operands(), got, wanted, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(t) if b is None else b)


@pytest.mark.parametrize("pair", [("log_prob", "entropy"), ("log_prob", "logsumexp"), ("logsumexp", "entropy")])
def test_gradient_of_each_pair(impl, mixture, pair, make_problem):
    """An ignored token has an entropy and a logsumexp all the same."""
    problem = make_problem("sigsoftmax", mixture=mixture)
    s, truth = problem.statistics(impl), dict(zip(("log_prob", "logsumexp", "entropy"), plain(problem), strict=False))
    got = torch.autograd.grad(sum(getattr(s, f).sum() for f in pair), problem.operands())
    wanted = torch.autograd.grad(sum(truth[f].sum() for f in pair), problem.operands())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_ignored_index_is_the_callers(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    wanted, own = problem.statistics(impl), problem.target.clone()
    assert bool((own == -100).any())
    problem.target[own == -100] = -1
    for a, b in zip(problem.statistics(impl, ignore_index=-1), wanted, strict=True):
        assert torch.equal(a, b)
    assert bool((problem.statistics(impl, ignore_index=-1).log_prob[own == -100] == 0).all())
    with pytest.raises(IndexError, match="or ignore_index -100, got -1"):
        problem.statistics(impl)


def test_without_target(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    with_target, without = problem.statistics(impl), problem.statistics(impl, target=False)
    assert without.log_prob is None
    for a, b in zip(without[1:], with_target[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0, 3)])
def test_leading_shapes(impl, shape):
    weight, target = torch.randn(7, 3), torch.randint(0, 7, shape)
    single = token_statistics(torch.randn(*shape, 3), weight, target, impl=impl)
    mixed = mixture_token_statistics(torch.randn(*shape, 2, 3), weight, torch.randn(*shape, 2), target, impl=impl)
    for s in (single, mixed):
        assert all(t.shape == shape for t in s)


def test_under_no_grad(impl, mixture, make_problem):
    problem = make_problem("compose", mixture=mixture)
    wanted = problem.statistics(impl)
    with torch.no_grad():
        quiet = problem.statistics(impl)
    for a, b in zip(quiet, wanted, strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b)


def test_probability_targets(impl, mixture, make_problem):
    """log_prob is then the expected one, sum_v q_v log p_v."""
    problem = make_problem("plif", mixture=mixture, probabilities=True)
    ours = problem.statistics(impl).log_prob
    torch.testing.assert_close(ours, (problem.target * problem.logits().log_softmax(-1)).sum(-1))


def test_uniform_and_certain(impl):
    weight = torch.eye(4)
    s = token_statistics(torch.tensor([[0.0] * 4, [200.0, 0, 0, 0]]), weight, torch.tensor([1, 1]), impl=impl)
    torch.testing.assert_close(s.entropy, torch.tensor([4.0, 1.0]).log())
    torch.testing.assert_close(s.log_prob, torch.tensor([-1.3862944, -200.0]))
    assert s.argmax.tolist() == [0, 0]


def test_nan_reaches_every_statistic_of_its_token(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    with torch.no_grad():
        problem.input[3] = torch.nan
    s = problem.statistics(impl)
    broken = torch.arange(5) == 3
    assert torch.equal(s.log_prob.isnan(), broken)
    assert torch.equal(s.entropy.isnan(), broken)
    if not mixture:
        assert torch.equal(s.logsumexp.isnan(), broken)

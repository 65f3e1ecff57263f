"""The theorems of docs/math.md, on random matrices in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch.nn import functional as F

from uncork import (
    PLIF,
    AsymmetricSoftcap,
    GeneralizedSigsoftmax,
    MonotoneNetwork,
    Scale,
    ScaledSigmoid,
    Sigsoftmax,
    Softcap,
    functional,
)

F64 = torch.float64
N, V, D = 60, 80, 5

NONLINEAR = {
    "softcap": lambda: Softcap(3.0),
    "asymmetric": lambda: AsymmetricSoftcap(3.0, 5.0),
    "sigmoid": lambda: ScaledSigmoid(6.0, 0.5, 2.0),
    "sigsoftmax": Sigsoftmax,
    "gss": GeneralizedSigsoftmax,
    "plif": lambda: PLIF(20, 6.0, init="random"),
    "relu": lambda: MonotoneNetwork(20, 6.0, init="random"),
    "tanh": lambda: MonotoneNetwork(20, 6.0, units="tanh", init="random"),
}


def numerical_rank(matrix):
    """The number of singular values above Press' tolerance, 0.5 sqrt(m + n + 1) sigma_max eps."""
    sigma = torch.linalg.svdvals(matrix)
    tolerance = 0.5 * math.sqrt(sum(matrix.shape) + 1) * sigma[0] * torch.finfo(matrix.dtype).eps
    return int((sigma > tolerance).sum())


def draw(seed, d=D, *, bias=False, n=N, v=V):
    torch.manual_seed(seed)
    h, w = torch.randn(n, d, dtype=F64), torch.randn(v, d, dtype=F64)
    return h @ w.T + (torch.randn(v, dtype=F64) if bias else 0)


def log_q(logits):
    return logits.log_softmax(-1)


# ---- theorem 1: the bottleneck ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("d", [1, 2, 5, 20])
def test_rank_of_a_linear_softmax(seed, d):
    assert numerical_rank(log_q(draw(seed, d))) == d + 1
    assert numerical_rank(log_q(draw(seed, d, bias=True))) == d + 2


@pytest.mark.parametrize("bias", [False, True])
def test_rank_with_a_temperature_and_with_mixed_contexts(bias):
    expected = D + 2 if bias else D + 1
    with torch.no_grad():
        assert numerical_rank(log_q(Scale(0.3)(draw(0, bias=bias)))) == expected
    # A mixture of contexts (MoC) mixes the h before one softmax: still one linear softmax.
    latent, prior = torch.randn(N, 4, D, dtype=F64).tanh(), torch.randn(N, 4, dtype=F64).softmax(-1)
    h, w = torch.einsum("nk,nkd->nd", prior, latent), torch.randn(V, D, dtype=F64)
    assert numerical_rank(log_q(h @ w.T + (torch.randn(V, dtype=F64) if bias else 0))) == expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NONLINEAR)
@torch.no_grad()
def test_rank_with_a_nonlinear_function_is_larger(name, bias):
    torch.manual_seed(1)
    function = NONLINEAR[name]()
    # Full rank is N: the log-partition fills one direction, words (V > N) leave enough of the others.
    assert numerical_rank(log_q(function(draw(1, bias=bias)))) > D + 2
    assert numerical_rank(log_q(function(draw(1, bias=bias)))) >= (N if name in ("plif", "relu") else 3 * D)


@pytest.mark.parametrize("num_components", [2, 4])
def test_rank_of_a_mixture_is_larger(num_components):
    torch.manual_seed(0)
    latent, w = torch.randn(N, num_components, D, dtype=F64), torch.randn(V, D, dtype=F64)
    prior = torch.randn(N, num_components, dtype=F64)
    assert numerical_rank(functional.mixture_log_softmax(latent @ w.T, prior)) == N


# ---- theorem 2: polynomials ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "p"), [(2, 2), (2, 5), (4, 2), (4, 3), (3, 4), (9, 2)])
def test_rank_under_a_polynomial(d, p):
    torch.manual_seed(d + p)
    coefficients = torch.rand(p + 1, dtype=F64) + 0.5

    def polynomial(z):
        return sum(c * (z / math.sqrt(d)) ** k for k, c in enumerate(coefficients))

    bound = math.comb(d + p, p)
    scores = draw(d * p, d, n=bound + 40, v=bound + 50)
    assert numerical_rank(polynomial(scores)) == bound
    assert numerical_rank(log_q(polynomial(scores))) == bound  # the constants' direction is in the span already
    # A bias adds no function of h, so only the log-partition can add to the rank.
    biased = polynomial(draw(d * p, d, bias=True, n=bound + 40, v=bound + 50))
    assert numerical_rank(biased) == bound
    assert numerical_rank(log_q(biased)) == bound + 1


def test_rank_under_a_polynomial_with_a_vanishing_coefficient():
    # z + z^3 misses the C(d+1, 2) products of two coordinates; the constant comes back with the log-partition.
    d = 3
    scores = draw(0, d)
    assert numerical_rank(scores + scores**3) == d + math.comb(d + 2, 3)
    assert numerical_rank(log_q(scores + scores**3)) == d + math.comb(d + 2, 3) + 1


# ---- theorem 3: almost every increasing function ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_random_increasing_values_give_full_rank(seed):
    scores = draw(seed, 2, n=30, v=40)
    order = scores.flatten().argsort()
    for heights in (torch.rand(order.numel(), dtype=F64), torch.randn(order.numel(), dtype=F64).exp()):
        values = torch.empty_like(heights)
        values[order] = heights.cumsum(0) / heights.sum()  # increasing in the scores, one value per score
        assert numerical_rank(values.view_as(scores)) == 30
        plif = PLIF.from_function(Sigsoftmax(), 50, 10.0)
        with torch.no_grad():
            plif.raw_slopes.add_(torch.randn(50) * 1e-2)
            assert numerical_rank(plif.double()(scores)) == 30


def test_no_function_repairs_equal_rows():
    # "If any function gives full rank": two equal contexts stay equal under all of them.
    scores = draw(0, n=20, v=30)
    scores[1] = scores[0]
    with torch.no_grad():
        assert numerical_rank(PLIF(50, 6.0, init="random").double()(scores)) == 19


# ---- theorem 4: order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NONLINEAR)
@torch.no_grad()
def test_order_within_a_row_is_kept(name):
    scores = draw(2)
    logits = NONLINEAR[name]().double()(scores)
    assert torch.equal(logits.argsort(-1), scores.argsort(-1))
    assert torch.equal(log_q(logits).argmax(-1), scores.argmax(-1))


@torch.no_grad()
def test_a_word_inside_the_hull_is_never_the_likeliest():
    corners = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]], dtype=F64)
    words = torch.cat([corners, torch.tensor([[0.1, -0.2]], dtype=F64)])
    torch.manual_seed(0)
    contexts = torch.randn(2000, 2, dtype=F64) * 5
    for make in NONLINEAR.values():
        assert bool((make().double()(contexts @ words.T).argmax(-1) != 3).all())


def test_on_a_circle_every_word_can_be_the_likeliest():
    angle = torch.arange(1000, dtype=F64) * (2 * math.pi / 1000)
    words = torch.stack([angle.cos(), angle.sin()], -1)
    assert torch.equal((words @ words.T).argmax(-1), torch.arange(1000))


# ---- theorem 5: the best context -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_moment_condition_and_entropy(seed):
    torch.manual_seed(seed)
    v, d = 12, 3
    w, p = torch.randn(v, d, dtype=F64), torch.rand(v, dtype=F64) + 0.05
    p = p / p.sum()

    def cross_entropy(h):
        h = torch.tensor(h, dtype=F64, requires_grad=True)
        loss = -(p * log_q(w @ h)).sum()
        return loss.item(), torch.autograd.grad(loss, h)[0].numpy()

    best = optimize.minimize(cross_entropy, np.zeros(d), jac=True, method="BFGS", options={"gtol": 1e-10})
    q = (w @ torch.tensor(best.x)).softmax(-1)
    torch.testing.assert_close(q @ w, p @ w, rtol=1e-7, atol=1e-7)
    entropy = -(q * q.log()).sum().item()
    assert abs(best.fun - entropy) < 1e-8
    # Q* has the largest entropy among the distributions with P's moment: step from it along the kernel of (w, 1).
    kernel = torch.linalg.svd(torch.cat([w, torch.ones(v, 1, dtype=F64)], 1).T)[2][d + 1 :]
    for step in (1e-3, -1e-3):
        other = q + step * kernel[0]
        assert -(other * other.log()).sum().item() < entropy
    assert entropy > -(p * p.log()).sum().item()


def test_on_the_hulls_boundary_the_best_context_is_only_approached():
    # All of P on a corner word: the loss falls towards H(Q*) = 0 as |h| grows, and is never there.
    words = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64)
    losses = [F.cross_entropy(words @ torch.tensor([s, 0.0], dtype=F64), torch.tensor(0)) for s in (1.0, 4.0, 10.0)]
    assert losses[0] > losses[1] > losses[2] > 0
    assert losses[2] < 1e-12


# ---- theorem 6: what rank does not say -------------------------------------------------------------------------------


def effective_rank(matrix, eps):
    """The smallest k with (1 - eps) of the squared singular values."""
    energy = torch.linalg.svdvals(matrix).square()
    return int((energy.cumsum(0) < (1 - eps) * energy.sum()).sum()) + 1


def tail_energy(matrix, rank):
    """The part of the squared singular values beyond the first `rank`: Eckart-Young's distance to that rank."""
    energy = torch.linalg.svdvals(matrix).square()
    return (energy[rank:].sum() / energy.sum()).item()


@torch.no_grad()
def test_full_rank_may_be_round_off():
    torch.manual_seed(0)
    scores = draw(0)
    many = log_q(PLIF(100_000, init="random").double()(scores))
    few = log_q(PLIF(10, 6.0, init="random").double()(scores))
    assert numerical_rank(many) == numerical_rank(few) == N
    assert tail_energy(log_q(scores), D + 1) < 1e-25
    assert tail_energy(many, D + 1) < 1e-4
    assert tail_energy(few, D + 1) > 1e-3
    assert effective_rank(many, 1e-3) == effective_rank(log_q(scores), 1e-3) <= D + 1
    assert effective_rank(few, 1e-3) > D + 1


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1.0])
@torch.no_grad()
def test_tail_energy_is_bounded_by_the_distance_from_a_line(spread):
    scores = draw(4)
    logits = PLIF(50, 6.0, init="random", spread=spread).double()(scores)
    centred = scores - scores.mean()
    slope = (centred * logits).sum() / centred.square().sum()
    distance = (logits - logits.mean() - slope * centred).abs().max()
    energy = torch.linalg.svdvals(log_q(logits)).square()
    assert 0 < energy[D + 1 :].sum() <= distance**2 * scores.numel()


def test_rounding_linear_logits_fakes_full_rank():
    scores = draw(0)
    assert numerical_rank(log_q(scores)) == D + 1
    assert numerical_rank(log_q(scores.bfloat16().double())) == N
    assert tail_energy(log_q(scores.bfloat16().double()), D + 1) < 1e-4


def test_tail_energy_is_the_distance_to_the_nearest_matrix_of_that_rank():
    matrix = draw(3).exp()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u[:, :4] * s[:4] @ vt[:4]
    assert abs(tail_energy(matrix, 4) - ((matrix - nearest).norm() / matrix.norm()).square().item()) < 1e-12


# ---- gradients that math.md derives ----------------------------------------------------------------------------------


def test_mixture_gradient_is_the_posterior():
    torch.manual_seed(0)
    logits = torch.randn(6, 3, 10, dtype=F64, requires_grad=True)
    prior = torch.randn(6, 3, dtype=F64, requires_grad=True)
    target = torch.rand(6, 10, dtype=F64)  # sums to anything
    loss = -(target * functional.mixture_log_softmax(logits, prior)).sum()
    by_logits, by_prior = torch.autograd.grad(loss, [logits, prior])
    pi, p = prior.softmax(-1).detach(), logits.softmax(-1).detach()
    joint = pi.unsqueeze(-1) * p
    r = joint / joint.sum(1, keepdim=True)  # responsibilities r_{k,v}
    mass = (target.unsqueeze(1) * r).sum(-1)
    torch.testing.assert_close(by_logits, mass.unsqueeze(-1) * p - target.unsqueeze(1) * r)
    torch.testing.assert_close(by_prior, target.sum(-1, keepdim=True) * pi - mass)


def test_loss_gradient_is_row_factors_times_softmax_minus_target():
    torch.manual_seed(0)
    n, v, smoothing, z_loss = 7, 11, 0.1, 0.01
    scores = torch.randn(n, v, dtype=F64, requires_grad=True)
    target, weight = torch.randint(v, (n,)), torch.rand(v, dtype=F64) + 0.5
    tokens, function = torch.rand(n, dtype=F64), PLIF(9, 3.0, init="random").double()
    logits = function(scores)
    ce = F.cross_entropy(logits, target, weight=weight, label_smoothing=smoothing, reduction="none")
    z = logits.logsumexp(-1)
    loss = (tokens * ce).sum() / (tokens * weight[target]).sum() + (tokens * z_loss * z**2).sum() / tokens.sum()
    (expected,) = torch.autograd.grad(loss, scores)
    with torch.no_grad():
        row, z_row = tokens / (tokens * weight[target]).sum(), tokens / tokens.sum()
        t = row.unsqueeze(-1) * (
            (1 - smoothing) * weight[target].unsqueeze(-1) * F.one_hot(target, v) + smoothing / v * weight
        )
        a = t.sum(-1) + 2 * z_loss * z * z_row
        got = (a.unsqueeze(-1) * logits.softmax(-1) - t) * function.derivative(scores)
    torch.testing.assert_close(got, expected)

"""The theorems of docs/theory.md, on random matrices in float64.

Theorem 4 has further tests in tests/lab/test_reachability.py.
"""

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
from uncork.diagnose.rank import effective_rank, numerical_rank, singular_values, tail_energy

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


def test_rank_is_limited_by_contexts_and_words():
    assert numerical_rank(log_q(draw(0, 20, n=8, v=30))) == 8
    assert numerical_rank(log_q(draw(0, 20, n=30, v=8))) == 8


def fits(p, features, bias=0.0):
    """Whether the nearest scores of so many features give the log-probabilities p."""
    u, s, vt = torch.linalg.svd(p - p.mean(-1, keepdim=True) - bias, full_matrices=False)
    return bool((log_q(u[:, :features] * s[:features] @ vt[:features] + bias) - p).abs().max() < 1e-9)


@pytest.mark.parametrize("r", [1, 4, V - 1])
def test_a_linear_softmax_represents_what_has_the_centred_rank(r):
    torch.manual_seed(r)
    p = log_q(torch.randn(V + 20, r, dtype=F64) @ torch.randn(r, V, dtype=F64) / r**0.5)
    if r == V - 1:  # so many features represent anything
        p = torch.distributions.Dirichlet(torch.full((V,), 0.3, dtype=F64)).sample((V + 20,)).clamp(min=1e-12).log()
        p = log_q(p)
    assert fits(p, r)
    assert not fits(p, r - 1)


def test_a_linear_softmax_with_a_bias_represents_what_has_the_doubly_centred_rank():
    torch.manual_seed(0)
    scores = torch.randn(V + 20, 4, dtype=F64) @ torch.randn(4, V, dtype=F64)
    p = log_q(scores + 3 * torch.randn(V, dtype=F64))
    centred = p - p.mean(-1, keepdim=True)
    bias = centred.mean(0)
    assert numerical_rank(centred) == 5
    assert numerical_rank(centred - bias) == 4
    assert fits(p, 4, bias)
    assert not fits(p, 3, bias)


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


@pytest.mark.parametrize(("n", "v"), [(7, 30), (30, 7), (12, 12)])
def test_rank_under_a_polynomial_is_limited_by_contexts_and_words(n, v):
    scores = draw(0, 3, n=n, v=v)
    logits = 1 + scores + scores**2  # C(5, 2) = 10
    assert numerical_rank(logits) == numerical_rank(log_q(logits)) == min(n, v, 10)


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


@pytest.mark.parametrize(("n", "v"), [(30, 40), (40, 30), (30, 30)])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_almost_every_function_gives_full_rank_on_generic_scores(n, v, d):
    scores = draw(d, d, n=n, v=v)
    assert scores.unique().numel() == n * v  # all distinct: some function gives full rank
    values = torch.empty(n * v, dtype=F64)
    values[scores.flatten().argsort()] = torch.rand(n * v, dtype=F64).cumsum(0)
    logits = values.view_as(scores)
    assert numerical_rank(logits) == numerical_rank(log_q(logits / logits.std())) == min(n, v)


@torch.no_grad()
def test_a_knot_between_neighbouring_scores_is_enough():
    scores = draw(0, 1, n=4, v=5)
    ordered = scores.flatten().sort().values
    width = ordered.diff().min().item() / 2
    pieces = 2 * math.ceil((ordered.abs().max().item() + 1) / width)  # even, and no gap without a knot
    function = PLIF(pieces, pieces * width / 2, init="random").double()
    assert numerical_rank(log_q(function(scores))) == 4


def test_the_exceptions_are_real_and_of_measure_zero():
    # On the segment from the identity to another increasing function the identity alone keeps the rank of the scores.
    scores = draw(0, n=30, v=40)
    other = torch.empty(scores.numel(), dtype=F64)
    other[scores.flatten().argsort()] = torch.rand(scores.numel(), dtype=F64).cumsum(0) / 100
    ranks = [numerical_rank(log_q((1 - t) * scores + t * other.view_as(scores))) for t in (0.0, 0.01, 0.3, 1.0)]
    assert ranks == [D + 1, 30, 30, 30]
    # z + z^3 is increasing and unbounded, and another exception where there are more words than its bound.
    assert numerical_rank(log_q(draw(0, 2) + draw(0, 2) ** 3)) == 2 + 4 + 1 < N


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


def test_on_the_hulls_boundary_the_infimum_is_the_largest_entropy_on_the_face():
    # P on the edge between (1, 1) and (1, -1): with u = (1, 0) the loss falls to that of a softmax over those two.
    words = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 0.0], [0.0, 0.5]], dtype=F64)
    p = torch.tensor([0.7, 0.3, 0.0, 0.0], dtype=F64)
    best_on_edge = torch.tensor([0.0, 0.5 * math.log(0.7 / 0.3)], dtype=F64)
    entropy = -(p[:2] * p[:2].log()).sum()
    losses = [
        -(p * log_q(words @ (best_on_edge + torch.tensor([t, 0.0])))).sum() - entropy for t in (0.0, 3.0, 9.0, 27.0)
    ]
    assert losses[0] > losses[1] > losses[2] > losses[3] > 0
    assert losses[3] < 1e-11


def test_the_condition_under_a_function_weighs_by_its_slope():
    torch.manual_seed(0)
    w, p, function = torch.randn(12, 3, dtype=F64), torch.rand(12, dtype=F64), Sigsoftmax()
    p = p / p.sum()
    h = torch.randn(3, dtype=F64, requires_grad=True)
    scores = w @ h
    (gradient,) = torch.autograd.grad(-(p * log_q(function(scores))).sum(), h)
    weighted = function.derivative(scores).detach().unsqueeze(-1) * w
    torch.testing.assert_close(gradient, (function(scores).softmax(-1) - p).detach() @ weighted)


# ---- theorem 6: what rank does not say -------------------------------------------------------------------------------


def tail(matrix, rank=D + 1):
    return tail_energy(singular_values(matrix), rank)


@torch.no_grad()
def test_full_rank_may_be_round_off():
    torch.manual_seed(0)
    scores = draw(0)
    many = log_q(PLIF(100_000, init="random").double()(scores))
    few = log_q(PLIF(10, 6.0, init="random").double()(scores))
    assert numerical_rank(many) == numerical_rank(few) == N
    assert tail(log_q(scores)) < 1e-25
    assert tail(many) < 1e-4
    assert tail(few) > 1e-3
    of_few, of_many, of_linear = (effective_rank(singular_values(m), 1e-3) for m in (few, many, log_q(scores)))
    assert of_many == of_linear <= D + 1 < of_few


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1.0])
@torch.no_grad()
def test_tail_energy_is_bounded_by_the_distance_from_a_line(spread, bias):
    scores = draw(4, bias=bias)
    logits = PLIF(50, 6.0, init="random", spread=spread).double()(scores)
    centred = scores - scores.mean()
    slope = (centred * logits).sum() / centred.square().sum()
    distance = (logits - logits.mean() - slope * centred).abs().max()
    energy = torch.linalg.svdvals(log_q(logits)).square()
    assert 0 < energy[D + 1 + bias :].sum() <= distance**2 * scores.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pieces", [10, 100, 1000])
@torch.no_grad()
def test_tail_energy_of_random_slopes_falls_with_the_pieces(pieces, bias):
    scores = draw(5, bias=bias) / 2
    bound = 10.0
    assert scores.abs().max() < bound
    slopes = F.softplus(torch.randn(10**6, dtype=F64) + math.log(math.e - 1))
    torch.manual_seed(0)
    energies = []
    for _ in range(20):
        energy = singular_values(log_q(PLIF(pieces, bound, init="random").double()(scores))).square()
        energies.append(energy[D + 1 + bias :].sum().item())
    assert 0 < np.mean(energies) <= slopes.var() * 2 * bound / pieces * scores.abs().sum()


def test_rounding_linear_logits_fakes_full_rank():
    scores = draw(0)
    assert numerical_rank(log_q(scores)) == D + 1
    assert numerical_rank(log_q(scores.bfloat16().double())) == N
    assert tail(log_q(scores.bfloat16().double())) < 1e-4


def test_tail_energy_is_the_distance_to_the_nearest_matrix_of_that_rank():
    matrix = draw(3).exp()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u[:, :4] * s[:4] @ vt[:4]
    assert abs(tail(matrix, 4) - ((matrix - nearest).norm() / matrix.norm()).square().item()) < 1e-12

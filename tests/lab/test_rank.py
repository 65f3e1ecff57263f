"""Rank, effective rank and tail energy against matrices whose singular values are known."""

import math

import pytest
import torch

from uncork.diagnose.rank import effective_rank, numerical_rank, singular_values, tail_energy


def matrix_of(values, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(values, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize(("rows", "columns"), [(40, 90), (90, 40), (50, 50)])
def test_singular_values_are_those_put_in(rows, columns):
    values = [1000.0, 3.0, 1e-6]
    found = singular_values(matrix_of(values, rows, columns))
    assert found.dtype == torch.float64
    assert found.shape == (min(rows, columns),)
    torch.testing.assert_close(found[:3], torch.tensor(values, dtype=torch.float64), rtol=1e-8, atol=1e-12)
    assert found[3:].max() < 1e-11


def test_small_singular_values_survive():
    """The Gram matrix would lose what is below 1e-8 of the largest."""
    found = singular_values(matrix_of([1.0, 1e-11], 60, 200))
    assert found[1].item() == pytest.approx(1e-11, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 7, 30])
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_rank_of_a_product_is_exact_at_any_scale(rank, scale):
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(80, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, 120, generator=generator, dtype=torch.float64)
    assert numerical_rank(scale * (left @ right)) == rank


def test_rank_by_hand():
    assert numerical_rank(torch.zeros(3, 4)) == 0
    assert numerical_rank(torch.eye(5)) == 5
    assert numerical_rank(torch.ones(1, 9)) == 1


def test_the_tolerance_is_that_of_press():
    eps, size = torch.finfo(torch.float64).eps, 31
    tolerance = 0.5 * math.sqrt(2 * size + 1) * eps
    above, below = (torch.diag(torch.tensor([1.0] * 30 + [f * tolerance], dtype=torch.float64)) for f in (1.2, 0.8))
    assert numerical_rank(above) == 31
    assert numerical_rank(below) == 30


def test_half_precision_scores_are_seen_as_they_are():
    """Rounding a matrix of rank 3 to bfloat16 fills its rank: the function must not hide it, nor make it."""
    exact = matrix_of([10.0, 5.0, 1.0], 50, 60)
    assert numerical_rank(exact) == 3
    assert numerical_rank(exact.bfloat16()) == 50


def test_energy_by_hand():
    values = [4.0, 2.0, 2.0, 1.0]  # squares 16, 4, 4, 1 of 25
    assert [tail_energy(values, k) for k in (0, 1, 2, 3, 4, 9)] == pytest.approx([1, 9 / 25, 5 / 25, 1 / 25, 0, 0])
    assert [effective_rank(values, eps) for eps in (0.5, 0.36, 0.35, 0.2, 0.1, 0.01, 0)] == [1, 1, 2, 2, 3, 4, 4]


def test_order_and_type_of_the_values_do_not_matter():
    assert effective_rank(torch.tensor([1.0, 4.0, 2.0, 2.0]), 0.1) == 3
    assert tail_energy([1.0, 4.0, 2.0, 2.0], 1) == pytest.approx(9 / 25)


def test_small_values_are_not_lost_beside_a_large_one():
    assert tail_energy([1.0, *[1e-10] * 1000], 1) == pytest.approx(1e-17, rel=1e-9)


def test_a_matrix_of_zeros_has_no_energy():
    assert tail_energy([0.0, 0.0], 0) == 0
    assert effective_rank([0.0, 0.0], 1e-4) == 0


@pytest.mark.parametrize("matrix", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2, 2)])
def test_a_matrix_must_be_one(matrix):
    with pytest.raises(ValueError, match="matrix: expected shape"):
        numerical_rank(matrix)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_matrix_must_be_finite(bad):
    with pytest.raises(ValueError, match="matrix: expected finite"):
        singular_values(torch.tensor([[1.0, bad]]))


def test_a_matrix_is_of_real_numbers():
    for wrong, got in (([[1.0]], "list"), (torch.ones(2, 2).cfloat(), r"torch\.complex64")):
        with pytest.raises(TypeError, match=f"matrix: expected a Tensor of real numbers, got {got}"):
            numerical_rank(wrong)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_singular_values_are_finite_and_not_negative(bad):
    for measure in (tail_energy, effective_rank):
        with pytest.raises(ValueError, match="singular_values: expected finite numbers of at least 0"):
            measure([1.0, bad], 0)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="eps"):
        effective_rank([1.0], 1.0)
    with pytest.raises(ValueError, match="k: "):
        tail_energy([1.0], -1)
    with pytest.raises(ValueError, match="singular_values: expected shape"):
        effective_rank([], 0.1)

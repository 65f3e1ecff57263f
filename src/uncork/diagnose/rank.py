"""How many dimensions a matrix has, in float64: its numerical rank, and the rank that most of its energy needs.

A rank counts a new singular value of any size, so it is reported beside the effective rank and the tail energy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["effective_rank", "numerical_rank", "singular_values", "tail_energy"]


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix, the largest first, in float64.

    Those of the triangular factor of a QR decomposition of the longer side. Householder QR and the SVD are backward
    stable: each singular value is right to a few 1e-15 of the largest. (The Gram matrix would be quicker and lose half
    the digits: nothing below 1e-8 of the largest could be seen.)

    Args:
        matrix: (M, N), any real dtype; finite. It is computed on the CPU where the device has no float64.

    Returns:
        (min(M, N),) float64.

    >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
    tensor([4., 3.], dtype=torch.float64)

    Raises:
        TypeError: matrix is no Tensor of real numbers.
        ValueError: matrix is not two-dimensional, is empty, or holds a number that is not finite.
    """
    check_real("matrix", matrix)
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"matrix: expected shape (M, N) with M, N >= 1, got {tuple(matrix.shape)}")
    wide = (matrix.cpu() if matrix.device.type == "mps" else matrix).detach().double()
    if not bool(wide.isfinite().all()):
        raise ValueError("matrix: expected finite numbers, got inf or nan among them")
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    factor = torch.linalg.qr(tall, mode="r").R
    return torch.linalg.svdvals(factor)


def numerical_rank(matrix: Tensor) -> int:
    """How many singular values exceed 0.5 sqrt(M + N + 1) sigma_max eps, what rounding in float64 can make of 0.

    >>> numerical_rank(torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0)))
    1

    Args and errors as `singular_values`. Press et al., Numerical Recipes (3rd ed.), section 2.6.2.
    """
    values = singular_values(matrix)
    return rank_of(values, *matrix.shape)


def check_real(name: str, value: object) -> None:
    """Raises a TypeError unless the value is a Tensor of real numbers."""
    if not isinstance(value, Tensor) or value.is_complex():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a Tensor of real numbers, got {got}")


def rank_of(values: Tensor, rows: int, columns: int) -> int:
    """`numerical_rank` of an (M, N) matrix from its singular values (min(M, N),)."""
    tolerance = 0.5 * (rows + columns + 1) ** 0.5 * values.max() * torch.finfo(torch.float64).eps
    return int((values > tolerance).sum())


def tail_energy(singular_values: Tensor | Sequence[float], k: int) -> float:
    """Share, in [0, 1], of the squared singular values that lie beyond the k largest; 0 for a matrix of zeros.

    >>> tail_energy([3.0, 2.0, 1.0], 1)  # (4 + 1) / 14
    0.35714285714285715
    """
    if k < 0:
        raise ValueError(f"k: expected at least 0, got {k}")
    tails = _tails(singular_values)
    return float(tails[min(k, len(tails) - 1)])


def effective_rank(singular_values: Tensor | Sequence[float], eps: float) -> int:
    """The smallest k whose k largest singular values hold (1 - eps) of the sum of all squares.

    >>> effective_rank([3.0, 2.0, 1.0], 0.1), effective_rank([3.0, 2.0, 1.0], 0.05)
    (2, 3)

    Raises:
        ValueError: eps is not in [0, 1).
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number in [0, 1), got {eps!r}")
    return int((_tails(singular_values) > eps).sum())


def _tails(singular_values: Tensor | Sequence[float]) -> Tensor:
    """(R + 1,) tail energies for k = 0 ... R. Summed from the smallest up, so that small ones are not lost."""
    values = torch.as_tensor(singular_values, dtype=torch.float64).sort(descending=True).values
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"singular_values: expected shape (R,) with R >= 1, got {tuple(values.shape)}")
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError("singular_values: expected finite numbers of at least 0, got others among them")
    sums = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    return sums / sums[0] if sums[0] > 0 else sums

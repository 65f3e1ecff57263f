"""The monotone network: one hidden layer with positive weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uncork.arguments import positive, positive_int, switch
from uncork.functional import monotone_tanh, sech2, tanh
from uncork.logit_functions.base import LIMIT_PARTS, LogitFunction, start_at, table_dtype
from uncork.logit_functions.operations import Operation, PiecewiseLinear, function_transforms, total
from uncork.logit_functions.plif import excess_slope, piecewise_inverse

__all__ = ["MonotoneNetwork"]


class MonotoneNetwork(LogitFunction):
    """One hidden layer of positive weights over U learned thresholds; any increasing function as U grows.

    units="relu": each threshold carries the two units relu(z - t_u) and -relu(t_u - z) with positive weights
    a_u, b_u (1 / U each at the start), so the function bends either way there::

        f(z) = sum_u a_u relu(z - t_u) - b_u relu(t_u - z) + constant,    f(0) = 0

    which is piecewise linear: sorted thresholds and one bisection compute it, without a (N, V, U) tensor. Its image is
    all of R.

    units="tanh": the literature's saturating units, beside a fixed increasing linear term that keeps the image
    unbounded::

        f(z) = (z - g_0(z)) + g(z),    g(z) = sum_u w_u tanh(r_u (z - t_u)),    w_u, r_u > 0

    where g_0 is g at the start, of slope at most 0.52. It costs U passes over the scores, and has no native kernel.

    Either starts as the identity to the bit, or at random (`init="random"`: weights scattered by `spread`).

    Args:
        num_units: U thresholds, in [1, 2^24]. bound: they start evenly spread over [-bound, bound], in logits.
        units: "relu" or "tanh". init: "identity" or "random". spread: standard deviation of the random start.
        frozen: keep the function as it starts.

    >>> f = MonotoneNetwork(num_units=10, bound=5.0)
    >>> f(torch.tensor([-7.0, 0.3])).detach()
    tensor([-7.0000,  0.3000])

    Daniels & Velikova 2010; Ganea et al. 2019, arXiv 1902.08077. The activation and start
    of the network in the latter are not published.
    """

    examples: ClassVar = {
        "monotone-relu": {"num_units": 5, "bound": 2.0},
        "monotone-tanh": {"num_units": 3, "bound": 2.0, "units": "tanh"},
    }
    start_options = frozenset({"init", "spread", "frozen"})

    # Two of the last four exist, depending on `units`. Not declared as parameters, since torch.func.functional_call and
    # parametrisations put plain tensors in their place.
    threshold_shifts: Tensor
    raw_right: Tensor
    raw_left: Tensor
    raw_weights: Tensor
    raw_rates: Tensor

    def __init__(
        self,
        num_units: int = 100,
        bound: float = 20.0,
        *,
        units: str = "relu",
        init: str = "identity",
        spread: float = 1.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.num_units, self.bound = positive_int("num_units", num_units, LIMIT_PARTS), positive("bound", bound)
        if units not in ("relu", "tanh"):
            raise ValueError(f'units: expected "relu" or "tanh", got {units!r}')
        if init not in ("identity", "random"):
            raise ValueError(f'init: expected "identity" or "random", got {init!r}')
        self.units, self.init, self.spread = units, init, positive("spread", spread)
        self.frozen = switch("frozen", frozen)
        # Thresholds are held as shifts from their start, so that the identity stays one after a cast to half precision.
        for name in ("threshold_shifts", *self._weights()):
            start = torch.empty(self.num_units)
            self.register_parameter(name, nn.Parameter(start, requires_grad=not self.frozen))
        self.reset_parameters()

    def _weights(self) -> tuple[str, str]:
        return ("raw_right", "raw_left") if self.units == "relu" else ("raw_weights", "raw_rates")

    def reset_parameters(self) -> None:
        """Sets thresholds and weights to their start, the identity or newly drawn."""
        start_at(self.threshold_shifts, 0.0)
        for name in self._weights():
            start_at(getattr(self, name), self.spread if self.init == "random" else 0.0)

    @property
    def thresholds(self) -> Tensor:
        """t_u, (U,) float64, differentiable."""
        dtype = table_dtype(self.threshold_shifts.device)
        return self._start_thresholds(dtype) + self.threshold_shifts.to(dtype)

    def _spacing(self) -> float:
        return 2 * self.bound / self.num_units

    def _start_thresholds(self, dtype: torch.dtype) -> Tensor:
        device = self.threshold_shifts.device
        steps = torch.arange(self.num_units, dtype=table_dtype(device), device=device) - (self.num_units - 1) / 2
        # Rounded once to float32, so that the start is the same number in every dtype.
        return (steps * self._spacing()).float().to(dtype)

    def transform(self, scores: Tensor) -> Tensor:
        if self.units == "tanh":
            return super().transform(scores)
        # z + r(z) is inf - inf at z = inf.
        return torch.where(scores == torch.inf, scores, super().transform(scores))

    def _tanh_units(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        # Evenly spaced units of rate 1 / spacing and weight spacing / 4 add up to a slope of 1/2.
        spacing = self._spacing()
        start = self._start_thresholds(dtype)
        weights0, rates0 = torch.full_like(start, spacing / 4), torch.full_like(start, 1 / spacing)
        weights = weights0 * self.raw_weights.to(dtype).exp()
        rates = rates0 * self.raw_rates.to(dtype).exp()
        return self.thresholds.to(dtype), weights, rates, start, weights0, rates0

    def _inverse(self, logits: Tensor) -> Tensor:
        if self.units == "tanh":
            return super()._inverse(logits)
        return piecewise_inverse(logits, *(t.to(logits.device) for t in self.tables(logits.dtype)))

    def operations(self) -> tuple[Operation, ...]:
        return (PiecewiseLinear() if self.units == "relu" else TanhUnits(),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        if self.units == "tanh":
            return self._tanh_units(dtype)
        thresholds, order = self.thresholds.sort()
        wide = thresholds.dtype
        right = excess_slope(self.raw_right.to(wide))[order] / self.num_units
        left = excess_slope(self.raw_left.to(wide))[order] / self.num_units
        # Piece i lies right of its first i thresholds. Sums with no term are 0; all are 0 at the start.
        slopes = _sum_before(right) + _sum_after(left)
        intercepts = -(_sum_before(right * thresholds) + _sum_after(left * thresholds))
        origin = (right * (-thresholds).clamp(min=0) + left * (-thresholds).clamp(max=0)).sum()
        knots = thresholds.detach().to(dtype)
        knots = torch.cat([knots[:1], knots])
        values = slopes * knots.to(wide) + intercepts - origin
        return knots, values.to(dtype), slopes.to(dtype)

    def options(self) -> dict[str, Any]:
        return {
            "num_units": self.num_units,
            "bound": self.bound,
            "units": self.units,
            "init": self.init,
            "spread": self.spread,
            "frozen": self.frozen,
        }


def _sum_before(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x.cumsum(0)])


def _sum_after(x: Tensor) -> Tensor:
    return torch.cat([x.flip(0).cumsum(0).flip(0), torch.zeros_like(x[:1])])


@dataclass(frozen=True)
class TanhUnits(Operation):
    """y = x + g(x) - g_0(x), g = sum_u w_u tanh(r_u (x - t_u)). Tables: t, w, r of g, then of g_0, of shape (U,) each.

    Unit by unit in both directions: nothing of size N x V x U is ever kept. g_0 is a constant and gets no gradient.
    """

    num_tables: ClassVar[int] = 6

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        t, w, r, t0, w0, r0 = tables
        if function_transforms():
            return x + (monotone_tanh(x, t, w, r) - monotone_tanh(x, t0, w0, r0))
        y = torch.zeros_like(x)
        for u in range(t.numel()):
            y += w[u] * tanh(r[u] * (x - t[u])) - w0[u] * tanh(r0[u] * (x - t0[u]))
        return y.add_(x)

    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        t, w, r, t0, w0, r0 = tables
        slope = torch.ones_like(x)
        for u in range(t.numel()):
            slope += w[u] * r[u] * sech2(r[u] * (x - t[u])) - w0[u] * r0[u] * sech2(r0[u] * (x - t0[u]))
        return slope

    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        t, w, r, *_ = tables
        sums = torch.zeros(3, t.numel(), dtype=table_dtype(x.device), device=x.device)
        for u in range(t.numel()):
            distance = x - t[u]
            grad_unit = grad * sech2(r[u] * distance)
            sums[0, u] = -w[u] * r[u] * total(grad_unit)
            sums[1, u] = total(grad * tanh(r[u] * distance))
            sums[2, u] = w[u] * total(grad_unit * distance)
        return (*sums, *torch.zeros_like(sums))

"""PLIF, the piecewise linear increasing function."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork.arguments import finite, positive, positive_int, switch
from uncork.logit_functions.base import LIMIT_PARTS, LogitFunction, start_at, table_dtype
from uncork.logit_functions.operations import Operation, PiecewiseLinear
from uncork.messages import kind_of

__all__ = ["PLIF"]

# Slopes are MIN_SLOPE + (1 - MIN_SLOPE) softplus(v), so that one plus their rounded distance to 1 stays positive.
MIN_SLOPE = 1e-6
SOFTPLUS_ONE = math.log(math.e - 1)  # softplus(SOFTPLUS_ONE) = 1


def excess_slope(raw: Tensor) -> Tensor:
    """softplus(raw + log(e - 1)) - 1 >= -1 + MIN_SLOPE, exactly 0 at raw = 0; in raw's dtype."""
    # The second softplus is taken elementwise too: vector and scalar code differ in the last bit.
    start = torch.full_like(raw, SOFTPLUS_ONE)
    return (1 - MIN_SLOPE) * (F.softplus(raw + SOFTPLUS_ONE) - F.softplus(start))


def piecewise_inverse(logits: Tensor, knots: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """The inverse of z + values[i] + slopes[i] (z - knots[i]): again a search and a line."""
    heights = knots + values
    index = torch.bucketize(logits.contiguous(), heights[1:].contiguous(), right=True)
    return knots[index] + (logits - heights[index]) / (1 + slopes[index])


def _values(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """function(points) in float64; it gets a copy, since it may work in place."""
    values: Any = function(points.clone())
    if not isinstance(values, Tensor):
        raise TypeError(f"function: expected one that returns a Tensor, got {kind_of(values)}")
    if values.is_complex():
        raise TypeError(f"function: expected one that returns real numbers, got {values.dtype}")
    if values.shape != points.shape:
        raise ValueError(
            f"function: expected an elementwise one, but it turned shape {tuple(points.shape)} into "
            f"{tuple(values.shape)}"
        )
    return values.double()


class PLIF(LogitFunction):
    """Piecewise linear increasing function: P equal pieces over [-T, T], a learned slope each, linear beyond.

    f(z) = z + r(z), r piecewise linear with slopes s_i - 1 and r(0) = 0, where s_i = softplus(v_i) > 0 and v_i are
    the parameters (`raw_slopes` holds v_i - log(e - 1), so zeros are the identity to the bit). The forward is one
    look-up in two tables, the backward two histograms. The published form has f(-T) = 0 in place of f(0) = 0: a
    constant that softmax cannot see.

    Equivalent code::

        i = floor((z + T) * P / (2 * T)).clamp(0, P - 1).long()
        f = (z - knots[i]) * slopes[i] + delta * (slopes.cumsum(0) - slopes)[i] + constant

    Args:
        num_pieces: P, in [1, 2^24]. bound: T > 0, in logits.
        init: "identity", or "random" for the published start v_i ~ N(0, spread^2) + log(e - 1).
        spread: standard deviation of the random start.
        frozen: keep the slopes as they start (the control: with init="random" the published frozen one).
        unit_slope: divide the slopes by their mean over a tenth of [-T, T], so that f(c + T/10) - f(c - T/10) = T/5
            whatever they learn. It fixes the scale of f there and nowhere else.
        unit_slope_at: c, the middle of that tenth, in logits, at most 0.9 T away from 0.

    >>> f = PLIF(num_pieces=4, bound=2.0)
    >>> f(torch.tensor([-5.0, 0.5])).detach()
    tensor([-5.0000,  0.5000])
    >>> with torch.no_grad():
    ...     f.raw_slopes[3] = 2.0
    ...     f(torch.tensor([0.5, 1.5, 3.0])), f.derivative(torch.tensor([1.5]))
    (tensor([0.5000, 2.3086, 6.2343]), tensor([2.6171]))

    Ganea, Gelly, Becigneul, Severyn 2019, arXiv 1902.08077 (P = 100,000, T = 20, random start).
    """

    examples: ClassVar = {
        "plif": {"num_pieces": 6, "bound": 2.0},
        "plif-unit-slope": {
            "num_pieces": 6,
            "bound": 2.0,
            "unit_slope": True,
            "unit_slope_at": 0.7,
            "init": "random",
        },
    }
    start_options = frozenset({"init", "spread", "frozen"})

    def __init__(
        self,
        num_pieces: int = 100,
        bound: float = 20.0,
        *,
        init: str = "identity",
        spread: float = 1.0,
        frozen: bool = False,
        unit_slope: bool = False,
        unit_slope_at: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_pieces, self.bound = positive_int("num_pieces", num_pieces, LIMIT_PARTS), positive("bound", bound)
        if init not in ("identity", "random"):
            raise ValueError(f'init: expected "identity" or "random", got {init!r}')
        self.init, self.spread, self.frozen = init, positive("spread", spread), switch("frozen", frozen)
        self.unit_slope = switch("unit_slope", unit_slope)
        self.unit_slope_at = finite("unit_slope_at", unit_slope_at)
        if abs(self.unit_slope_at) > 0.9 * self.bound:
            raise ValueError(
                f"unit_slope_at: expected at most 0.9 bound = {0.9 * self.bound:g} in size, got {unit_slope_at}"
            )
        if self.unit_slope_at and not self.unit_slope:
            raise ValueError(f"unit_slope_at: expected 0 without unit_slope=True, got {unit_slope_at}")
        self.raw_slopes = nn.Parameter(torch.empty(self.num_pieces), requires_grad=not self.frozen)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the slopes to their start, the identity or newly drawn; a fit of `from_function` is lost."""
        start_at(self.raw_slopes, self.spread if self.init == "random" else 0.0)
        self.fit_error: float | None = None

    @classmethod
    def from_function(
        cls, function: Callable[[Tensor], Tensor], num_pieces: int = 100, bound: float = 20.0, *, frozen: bool = False
    ) -> "PLIF":
        """The PLIF that interpolates an increasing function at its knots, up to the constant that makes f(0) = 0.

        `fit_error` holds the largest `|f(z) - (function(z) - function(0))|` over 16 points per piece, in logits.

        Args:
            function: increasing, elementwise; called on float64 points of [-bound, bound].

        Raises:
            TypeError: if the function returns no Tensor of real numbers.
            ValueError: if it is not elementwise, not finite, falls anywhere, or rises nowhere.

        >>> from uncork import Softcap
        >>> f = PLIF.from_function(Softcap(30.0), num_pieces=100)
        >>> round(f.fit_error, 4), f(torch.tensor([20.0])).detach()
        (0.0005, tensor([17.4835]))
        """
        plif = cls(num_pieces, bound, frozen=frozen)
        with torch.no_grad():
            knots = torch.linspace(-plif.bound, plif.bound, plif.num_pieces + 1, dtype=torch.float64)
            heights = _values(function, knots)
            rises = heights.diff()
            if not bool(heights.isfinite().all() & (rises >= 0).all()) or heights[-1] == heights[0]:
                worst = int((heights.isfinite()[1:] & (rises >= 0)).int().argmin())
                raise ValueError(
                    f"function: expected finite and increasing, got values {heights[worst]:.17g} and "
                    f"{heights[worst + 1]:.17g} at {knots[worst]:.6g} and {knots[worst + 1]:.6g}"
                )
            # A function that is flat to rounding somewhere gets the smallest slope there.
            slopes = ((rises / knots.diff() - MIN_SLOPE) / (1 - MIN_SLOPE)).clamp(min=1e-12)
            raw = slopes + torch.log(-torch.expm1(-slopes))  # softplus inverted
            plif.raw_slopes.copy_(raw - SOFTPLUS_ONE)
            points = torch.linspace(-plif.bound, plif.bound, 16 * plif.num_pieces + 1, dtype=torch.float64)
            origin = _values(function, torch.zeros(1, dtype=torch.float64))
            plif.fit_error = float((plif(points) - (_values(function, points) - origin)).abs().max())
        return plif

    @property
    def nonlinear(self) -> bool:  # type: ignore[override]
        """Whether there is more than one piece."""
        return self.num_pieces > 1

    def slopes(self) -> Tensor:
        """The slopes s_i, (P,) float64, differentiable."""
        return 1 + self._excess()

    def _excess(self) -> Tensor:
        """s_i - 1, in the dtype of tables."""
        excess = excess_slope(self.raw_slopes.to(table_dtype(self.raw_slopes.device)))
        if not self.unit_slope:
            return excess
        # Each piece's share of the tenth; they sum to 1.
        ends = torch.arange(self.num_pieces + 1, dtype=excess.dtype, device=excess.device) / self.num_pieces * 2 - 1
        at = self.unit_slope_at / self.bound
        middle = 5 * ends.clamp(at - 0.1, at + 0.1).diff() @ excess
        return (1 - MIN_SLOPE) * (excess - middle) / (1 + middle)

    def knots(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The left ends of the pieces, (P,)."""
        device = self.raw_slopes.device
        steps = torch.arange(self.num_pieces, dtype=table_dtype(device), device=device) - self.num_pieces / 2
        return (steps * (2 * self.bound / self.num_pieces)).to(dtype)

    def transform(self, scores: Tensor) -> Tensor:
        # z + r(z) is inf - inf at z = inf.
        return torch.where(scores == torch.inf, scores, super().transform(scores))

    def _inverse(self, logits: Tensor) -> Tensor:
        return piecewise_inverse(logits, *(t.to(logits.device) for t in self.tables(logits.dtype)))

    def operations(self) -> tuple[Operation, ...]:
        return (PiecewiseLinear(bound=self.bound),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        wide = table_dtype(self.raw_slopes.device)
        knots = self.knots(dtype)
        excess = self._excess()
        # Rises are summed outwards from 0, so that no digit is lost near 0, and over the rounded knots, so that f is
        # continuous there.
        right_end = torch.full_like(knots[:1], self.bound)
        rises = excess * torch.cat([knots, right_end]).to(wide).diff()
        middle = self.num_pieces // 2
        if self.num_pieces % 2:  # 0 lies in the middle of a piece
            at_middle = excess[middle : middle + 1] * knots[middle].to(wide)
            left = at_middle - rises[:middle].flip(0).cumsum(0)
            right = at_middle + rises[middle:-1].cumsum(0)
            values = torch.cat([left.flip(0), at_middle, right])
        else:
            right = torch.cat([torch.zeros_like(rises[:1]), rises[middle:-1].cumsum(0)])
            values = torch.cat([-rises[:middle].flip(0).cumsum(0).flip(0), right])
        return knots, values.to(dtype), excess.to(dtype)

    def options(self) -> dict[str, Any]:
        return {
            "num_pieces": self.num_pieces,
            "bound": self.bound,
            "init": self.init,
            "spread": self.spread,
            "frozen": self.frozen,
            "unit_slope": self.unit_slope,
            "unit_slope_at": self.unit_slope_at,
        }

"""The few primitives that logit functions are made of, and that every kernel implements.

A `LogitFunction` hands its kernel a list of operations and, for each, a fixed number of *tables* (small tensors made
from the parameters by ordinary autograd). An operation maps scores elementwise, and returns the gradient to the scores
and to its tables; sums over elements are taken in float64, in a fixed order. Softplus, prefix sums, anchors and
constraints are applied when the tables are made, so a kernel never sees them.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uncork.functional import log_sigmoid, sech2

_SUM_BLOCK = 4096


def wide(x: Tensor) -> Tensor:
    """x in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def total(x: Tensor) -> Tensor:
    """The sum of all elements, by fixed blocks first, since torch splits one long sum by the number of threads."""
    flat = x.reshape(-1)
    if torch.compiler.is_compiling():  # blocks would bind a graph to the number of tokens
        return flat.sum(dtype=wide(x.new_empty(0)).dtype)
    whole = flat.numel() // _SUM_BLOCK * _SUM_BLOCK
    dtype = wide(x.new_empty(0)).dtype
    blocks = flat[:whole].view(-1, _SUM_BLOCK).sum(-1, dtype=dtype)
    rest = flat[whole:].sum(dtype=dtype)
    return rest if not whole else rest + (blocks.sum() if blocks.numel() <= _SUM_BLOCK else total(blocks))


def function_transforms() -> bool:
    """Whether torch.func (vmap, grad, jacrev, jvp ...) transforms what is computed now."""
    # torch.compile cannot trace this query, and it traces the transforms themselves.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def recorded() -> bool:
    """Whether the present computation is compiled, traced, transformed (torch.func) or run on fake tensors."""
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or function_transforms()
        or any(torch._C._get_dispatch_mode(mode) is not None for mode in modes)
    )


def readable(x: Tensor) -> bool:
    """Whether x's values may be read: that would synchronise a GPU, and a fake or traced tensor has none."""
    # is_compiling comes first: torch.compile cannot trace the queries to torch._C.
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) and not recorded()


OPERATIONS: dict[str, type["Operation"]] = {}
"""This package's operations by name."""


class Operation(ABC):
    """One elementwise primitive y = f(x; tables)."""

    num_tables: ClassVar[int]
    settings: ClassVar[tuple[str, ...]] = ()
    """The constructor's arguments, which are plain numbers, truth values or None."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(f"{__package__}."):
            OPERATIONS[cls.__name__] = cls

    def locate(self, x: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the three methods below share (the pieces, say), for callers to keep and pass on; most share nothing."""
        return ()

    @abstractmethod
    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        """y, elementwise; x is float32 or float64, the tables have its dtype and device; located: `locate`'s answer."""

    @abstractmethod
    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        """dy/dx, elementwise."""

    @abstractmethod
    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Sums over all elements of grad * dy/dtable, in float64, one per table."""


@dataclass(frozen=True)
class Affine(Operation):
    """y = a x + b. Tables: (a, b) of shape (2,)."""

    num_tables: ClassVar[int] = 1

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        slope, offset = tables[0]
        return x * slope + offset

    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        return tables[0][0].expand_as(x)

    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        return (torch.stack([total(grad * x), total(grad)]),)


@dataclass(frozen=True)
class Tanh(Operation):
    """y = c tanh(x / c), c = lower for x <= 0 and upper for x > 0. Tables: (lower, upper) of shape (2,).

    Args:
        symmetric: lower and upper are the same number, so there is nothing to choose.
    """

    symmetric: bool = False
    num_tables: ClassVar[int] = 1
    settings: ClassVar = ("symmetric",)

    def _cap(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        lower, upper = tables[0]
        return lower if self.symmetric else torch.where(x > 0, upper, lower)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        cap = self._cap(x, tables)
        return cap * torch.tanh(x / cap)

    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        return sech2(x / self._cap(x, tables))

    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        above = torch.zeros_like(x, dtype=torch.bool) if self.symmetric else x > 0
        # In float64: the difference is of the order of u^3.
        u = (wide(x) / self._cap(x, tables)).clamp(-400, 400)  # inf sech2(inf) is 0, not nan
        grad_cap = grad * (torch.tanh(u) - u * sech2(u))
        return (torch.stack([total(grad_cap.masked_fill(above, 0)), total(grad_cap.masked_fill(~above, 0))]),)


@dataclass(frozen=True)
class Sigmoid(Operation):
    """y = a sigmoid((x + b) / c). Tables: (a, b, c) of shape (3,)."""

    num_tables: ClassVar[int] = 1

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        height, shift, width = tables[0]
        u = (x + shift) / width
        return height * torch.where(u > 0, 1 - torch.sigmoid(-u), torch.sigmoid(u))

    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        height, shift, width = tables[0]
        u = (x + shift) / width
        return (height / width) * torch.sigmoid(u) * torch.sigmoid(-u)

    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        _, shift, width = tables[0]
        u = ((x + shift) / width).clamp(-400, 400)  # as in Tanh
        grad_shift = grad * self.derivative(x, tables)
        return (torch.stack([total(grad * torch.sigmoid(u)), total(grad_shift), -total(grad_shift * u)]),)


@dataclass(frozen=True)
class Softplus(Operation):
    """y = x - w softplus(c - x) = x + w log sigmoid(x - c). Tables: (c, w) of shape (2,)."""

    num_tables: ClassVar[int] = 1

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        center, weight = tables[0]
        return x + weight * log_sigmoid(x - center)

    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        center, weight = tables[0]
        return 1 + weight * torch.sigmoid(center - x)

    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        center, weight = tables[0]
        grad_center = -weight * torch.sigmoid(center - x)
        return (torch.stack([total(grad * grad_center), total(grad * log_sigmoid(x - center))]),)


@dataclass(frozen=True)
class PiecewiseLinear(Operation):
    """y = x + values[i] + slopes[i] (x - knots[i]), i the piece of x. Tables: knots, values, slopes of shape (P,) each.

    Piece i reaches from knots[i] to knots[i + 1]; the first and the last extend to infinity. All-zero values and slopes
    are the identity to the bit. The knots are the local origins of the pieces and get no gradient: a function that
    learns its knots computes `values` from them, differentiably (see `MonotoneNetwork`).

    Args:
        bound: for P equal pieces over [-bound, bound], which are found without a search; None for sorted knots.
    """

    bound: float | None = None
    num_tables: ClassVar[int] = 3
    settings: ClassVar = ("bound",)

    def locate(self, x: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Every element's piece (int64; NaN goes to an end piece, its value stays NaN) and its distance to the knot."""
        index = self._index(x, tables[0])
        return index, x - _look_up(tables[0], index)

    def _index(self, x: Tensor, knots: Tensor) -> Tensor:
        num_pieces = knots.numel()
        if self.bound is None:
            return torch.bucketize(x.contiguous(), knots[1:], right=True)
        # floor((x + T) P / 2T), but adding after the rounding down: x + T would lose the digits of a small x.
        piece = torch.floor(x * (num_pieces / (2 * self.bound)) + (num_pieces % 2) / 2) + num_pieces // 2
        clamp = torch.clamp if function_transforms() else torch.clamp_  # vmap has no rule for the second
        return clamp(piece, 0, num_pieces - 1).nan_to_num_(0).long()

    def forward(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        index, distance = located or self.locate(x, tables)
        _, values, slopes = tables
        return torch.addcmul(_look_up(values, index), _look_up(slopes, index), distance).add_(x)

    def derivative(self, x: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()) -> Tensor:
        index, _ = located or self.locate(x, tables)
        return _look_up(1 + tables[2], index)

    def table_gradients(
        self, x: Tensor, grad: Tensor, tables: tuple[Tensor, ...], located: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        index, distance = located or self.locate(x, tables)
        grad, pieces = wide(grad), tables[0].numel()
        grad_values = _histogram(index, grad, pieces)
        grad_slopes = _histogram(index, grad * distance, pieces)
        return torch.zeros_like(grad_values), grad_values, grad_slopes


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], by index_select, torch's fastest operation for it."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _histogram(index: Tensor, weight: Tensor, size: int) -> Tensor:
    """Sums of weight per bin, in an order that does not depend on threads."""
    if readable(index):
        return torch.bincount(index.flatten(), weight.flatten(), minlength=size)
    # Elsewhere bincount adds atomically, in any order; accumulating index_put_ sorts first.
    total = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    return total.index_put_((index.flatten(),), weight.flatten(), accumulate=True)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an autograd.Function's backward(ctx, saved, *upstream): a second derivative raises.

    torch would silently leave it out: its once_differentiable looks at the upstream gradient alone, which is a constant
    in `loss.backward()`. The node that raises comes after all that the gradient depends on, so that no way to ask for a
    second derivative passes it by. saved: ctx.saved_tensors, the inputs among them.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: a checkpoint (torch.utils.checkpoint) gives them once
        with torch.no_grad():
            grads: tuple[Tensor | None, ...] = backward(ctx, saved, *upstream)
        if not torch.is_grad_enabled():  # no create_graph
            return grads
        made = [g for g in grads if g is not None]
        sources = [t for t in (*saved, *upstream) if t is not None and t.requires_grad]
        sources = sources or [torch.zeros((), requires_grad=True)]  # of an operator that does not keep its inputs
        refused = iter(torch._C._functions.DelayedError(_SECOND, len(made) + len(sources))(*made, *sources))
        return tuple(None if g is None else next(refused) for g in grads)

    return wrapped


_SECOND = b"second derivatives are not supported here: use impl='reference' and a function with a closed form"


class Elementwise(torch.autograd.Function):
    """An operation under autograd that saves only the scores and tables, and sums table gradients in float64."""

    @staticmethod
    def forward(ctx, x: Tensor, operation: Operation, *tables: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.operation = operation
        ctx.save_for_backward(x, *tables)
        return operation.forward(x, tables)

    @staticmethod
    @first_order
    def backward(ctx, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x, *rest = saved
        tables = tuple(rest)
        located = ctx.operation.locate(x, tables)
        grad_x = grad * ctx.operation.derivative(x, tables, located) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return (grad_x, None, *[None] * len(tables))
        sums = ctx.operation.table_gradients(x, grad, tables, located)
        return (grad_x, None, *(s.to(t.dtype) for s, t in zip(sums, tables, strict=True)))

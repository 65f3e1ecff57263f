"""A stand-in for the logits that records what a model's own forward does to them.

Shapes in comments: B batch, T time, D features, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from uncork.logit_functions import Compose, LogitFunction, Scale, Softcap
from uncork.loss import TokenStatistics

Step = tuple[str, float]
"""An elementwise operation with its number: ("mul", 0.5), ("div", 30.0), ("tanh", 0.0)."""

Version = tuple[int, tuple[tuple[int, int], ...]]
"""Which output layer of its model it is, and which its parameters are and how often each was written."""


class NotRecordable(RuntimeError):
    """A model does to its logits what no logit function of this library can express; the message names it."""

    def __str__(self) -> str:
        return f"the model's forward does to its logits what cannot be fused: {self.args[0]}"


@dataclass(frozen=True)
class Record:
    """What a model has done so far to the logits that its head would return.

    Attributes:
        hidden: (..., D), the rows of the head's input that are left.
        words: the slice of the vocabulary that is left.
        steps: elementwise operations, in order.
        size: V, of the whole head.
        dtype: what the logits would have.
        replay: what the model did to the logits beside selecting tokens: "step", "cast" or "words", and a map.
    """

    hidden: Tensor
    words: slice
    steps: tuple[Step, ...]
    size: int
    dtype: torch.dtype
    replay: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        return torch.Size((*self.hidden.shape[:-1], len(range(*self.words.indices(self.size)))))


class Fused(Protocol):
    """What computes from records: `uncork.hf.fusion.Fusion`."""

    def logits(self, record: Record) -> Tensor: ...

    def argmax(self, record: Record) -> Tensor: ...

    def version(self) -> Version: ...

    def cross_entropy(self, record: Record, target: Tensor, **options: Any) -> Tensor: ...

    def statistics(self, record: Record, target: Tensor | None) -> TokenStatistics: ...

    def recorded(self, model: Any, args: Any, kwargs: Any) -> Any: ...


def function_of(steps: tuple[Step, ...]) -> LogitFunction | None:
    """The recorded steps as a logit function; None for the identity.

    >>> function_of((("div", 30.0), ("tanh", 0.0), ("mul", 30.0)))
    Softcap(cap=30.0)
    >>> function_of((("mul", 0.0625),))
    Scale(factor=0.0625, learnable=False)
    >>> function_of(())

    Raises:
        NotRecordable: the steps do not increase.
    """
    functions: list[LogitFunction] = []
    factors = [1.0]  # of each stretch between two tanh
    caps: list[float | None] = [None]  # the number that a stretch multiplies by, if it is one number
    for name, value in steps:
        if name == "tanh":
            factors.append(1.0)
            caps.append(None)
            continue
        caps[-1] = (value if name == "mul" else None) if factors[-1] == 1.0 else None
        factors[-1] = factors[-1] * value if name == "mul" else factors[-1] / value
    if any(not 0 < factor < float("inf") for factor in factors):
        raise NotRecordable(f"multiplication by {min(factors)!r}, which does not increase")
    # a tanh(b z) is a scale by ab, then a softcap at a.
    scale = factors[0]
    for factor, cap in zip(factors[1:], caps[1:], strict=True):
        cap = factor if cap is None else cap
        scale *= cap
        if abs(scale - 1) > 1e-12:
            functions.append(Scale(scale))
        functions.append(Softcap(cap))
        scale = 1.0
    if len(factors) == 1 and scale != 1:
        functions.append(Scale(scale))
    return functions[0] if len(functions) == 1 else Compose(*functions) if functions else None


class RecordedLogits:
    """Stands for the logits of a head within a model's forward, and notes what is done to them instead of doing it.

    It knows multiplication and division by a number, tanh, casts, and what selects or reshapes whole tokens or selects
    a slice of the vocabulary. Any other operation raises NotRecordable with its name.

    Args:
        viewed: whether another one may share its memory, so that an operation in place would be seen there.
    """

    def __init__(self, record: Record, *, viewed: bool = False) -> None:
        self.record, self._viewed = record, viewed

    shape = property(lambda self: self.record.shape)
    dtype = property(lambda self: self.record.dtype)
    device = property(lambda self: self.record.hidden.device)
    ndim = property(lambda self: self.record.hidden.ndim)
    requires_grad = property(lambda self: self.record.hidden.requires_grad)
    is_cuda = property(lambda self: self.record.hidden.is_cuda)

    def dim(self) -> int:
        return self.record.hidden.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.record.shape if dim is None else self.record.shape[dim]

    def numel(self) -> int:
        return self.record.shape.numel()

    def __len__(self) -> int:
        return self.record.shape[0]

    def is_floating_point(self) -> bool:
        return True

    def _with(self, *replay: tuple[str, Callable[[Tensor], Tensor]], **changes: Any) -> "RecordedLogits":
        return RecordedLogits(replace(self.record, replay=(*self.record.replay, *replay), **changes))

    def _step(self, name: str, value: Any, replay: Callable[[Tensor], Tensor]) -> "RecordedLogits":
        return self._with(("step", replay), steps=(*self.record.steps, (name, value)))

    def mul(self, other: Any) -> "RecordedLogits":
        return self._step("mul", _number("multiplication", other), lambda logits: logits * other)

    def div(self, other: Any, *, rounding_mode: None = None) -> "RecordedLogits":
        if rounding_mode is not None:
            raise NotRecordable(f"division with rounding_mode={rounding_mode!r}")
        return self._step("div", _number("division", other), lambda logits: logits / other)

    def tanh(self) -> "RecordedLogits":
        return self._step("tanh", 0.0, torch.tanh)

    __mul__ = __rmul__ = multiply = mul
    __truediv__ = divide = true_divide = div

    def _in_place(self, made: "RecordedLogits") -> "RecordedLogits":
        if self._viewed:
            raise NotRecordable("an operation in place on logits that were sliced or reshaped")
        self.record = made.record
        return self

    def mul_(self, other: Any) -> "RecordedLogits":
        return self._in_place(self.mul(other))

    def div_(self, other: Any) -> "RecordedLogits":
        return self._in_place(self.div(other))

    def tanh_(self) -> "RecordedLogits":
        return self._in_place(self.tanh())

    __imul__, __itruediv__ = mul_, div_

    def _cast(self, dtype: torch.dtype) -> "RecordedLogits":
        if not dtype.is_floating_point:
            raise NotRecordable(f"a cast to {dtype}")
        if dtype == self.dtype:
            return self
        return self._with(("cast", lambda logits: logits.to(dtype)), dtype=dtype)

    def to(self, *args: Any, **kwargs: Any) -> "RecordedLogits":
        given = [value.dtype if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        return self._cast(next((value for value in given if isinstance(value, torch.dtype)), self.dtype))

    def clone(self, **_: Any) -> "RecordedLogits":
        return RecordedLogits(self.record)

    def contiguous(self, **_: Any) -> "RecordedLogits":
        return self

    def with_hidden(self, hidden: Tensor) -> "RecordedLogits":
        """The same, of other hidden states."""
        return self._with(hidden=hidden)

    def _rows(self, select: Callable[[Tensor], Tensor]) -> "RecordedLogits":
        """The same selection of tokens, made from the hidden states."""
        return self._view(hidden=select(self.record.hidden))

    def _view(self, *replay: tuple[str, Callable[[Tensor], Tensor]], **changes: Any) -> "RecordedLogits":
        self._viewed = True
        made = self._with(*replay, **changes)
        made._viewed = True
        return made

    def view(self, *shape: Any) -> "RecordedLogits":
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        words = self.shape[-1]
        last = sizes[-1] if sizes else 0
        if last == -1 and -1 not in sizes[:-1]:
            last = self.numel() // max(torch.Size(sizes[:-1]).numel(), 1)
        if last != words:
            raise NotRecordable(f"a view of shape {sizes} of logits of shape {tuple(self.shape)}")
        return self._rows(lambda hidden: hidden.reshape(*sizes[:-1], hidden.shape[-1]))

    reshape = view

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "RecordedLogits":
        if end_dim % self.ndim == self.ndim - 1:
            raise NotRecordable("flatten of the vocabulary")
        return self._rows(lambda hidden: hidden.flatten(start_dim % hidden.ndim, end_dim % hidden.ndim))

    def split(self, size: Any, dim: int = 0) -> tuple["RecordedLogits", ...]:
        if dim % self.ndim == self.ndim - 1:
            raise NotRecordable("split of the vocabulary")
        return tuple(self._view(hidden=part) for part in self.record.hidden.split(size, dim))

    def squeeze(self, dim: int) -> "RecordedLogits":
        if dim % self.ndim == self.ndim - 1:
            raise NotRecordable("squeeze of the vocabulary")
        return self._rows(lambda hidden: hidden.squeeze(dim % hidden.ndim))

    def unsqueeze(self, dim: int) -> "RecordedLogits":
        if dim % (self.ndim + 1) == self.ndim:
            raise NotRecordable("unsqueeze after the vocabulary")
        return self._rows(lambda hidden: hidden.unsqueeze(dim % (hidden.ndim + 1)))

    def __getitem__(self, index: Any) -> "RecordedLogits":
        parts = index if isinstance(index, tuple) else (index,)
        wide = [part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1
                for part in parts if part is not None and part is not ...]  # fmt: skip
        dots = any(part is ... for part in parts)
        if sum(wide) < self.ndim and not (dots and parts[-1] is not ...):
            return self._rows(lambda hidden: hidden[index])
        last, record = parts[-1], self.record
        if sum(wide) > self.ndim or not isinstance(last, slice) or last.step not in (None, 1):
            raise NotRecordable(f"the index {index!r}, which takes single words")
        left = range(*record.words.indices(record.size))[last]
        if len(left) == self.shape[-1]:
            return self._rows(lambda hidden: hidden[index])
        return self._view(
            ("words", lambda logits: logits[..., last]),
            hidden=record.hidden[(*parts[:-1], slice(None))],
            words=slice(left.start, max(left.start, left.stop)),
        )

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Tensor, name):
            raise NotRecordable(name)
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"RecordedLogits(shape={tuple(self.shape)}, steps={self.record.steps})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if name in ("mul", "multiply") and len(args) == 2 and isinstance(args[1], cls):
            args = args[::-1]
        if name not in _FUNCTIONS or not args or not isinstance(args[0], cls):
            raise NotRecordable(f"torch's {name}")
        return getattr(args[0], name)(*args[1:], **(kwargs or {}))

    # Last, since within the class these names would hide Python's.
    def float(self) -> "RecordedLogits":
        return self._cast(torch.float32)

    def double(self) -> "RecordedLogits":
        return self._cast(torch.float64)

    def half(self) -> "RecordedLogits":
        return self._cast(torch.float16)

    def bfloat16(self) -> "RecordedLogits":
        return self._cast(torch.bfloat16)


_FUNCTIONS = frozenset(
    ["mul", "multiply", "div", "divide", "true_divide", "tanh", "reshape", "flatten", "split", "squeeze", "unsqueeze",
     "clone"]
)  # fmt: skip


def _number(what: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.requires_grad:
            learned = " that is learned" if value.requires_grad else ""
            raise NotRecordable(f"{what} by a tensor of shape {tuple(value.shape)}{learned}")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NotRecordable(f"{what} by a {type(value).__name__}")
    return float(value)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: RecordedLogits, *others: Any) -> Any:
        raise NotRecordable(name)

    return refuse


# Operators are looked up on the class, where __getattr__ does not see them.
for _name in (
    "add", "radd", "iadd", "sub", "rsub", "isub", "rtruediv", "pow", "rpow", "neg", "abs", "matmul", "rmatmul", "mod",
    "floordiv", "setitem", "lt", "le", "gt", "ge", "eq", "ne", "iter", "bool",
):  # fmt: skip
    setattr(RecordedLogits, f"__{_name}__", _refusing(_name))

"""Logits of a fused model that are computed only if somebody reads them."""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from uncork.hf.record import NotRecordable, Record, RecordedLogits

if TYPE_CHECKING:
    from uncork.hf.fuse import Fusion

# What is known without the logits, and what selects tokens of them.
_FREE = {
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_leaf",
    "requires_grad",
    "names",
}
_FREE_CALLS = {"size", "dim", "numel", "is_floating_point", "is_complex", "__len__", "element_size", "get_device"}
_SELECTING = {"__getitem__", "view", "reshape", "flatten", "split", "squeeze", "unsqueeze", "contiguous", "float", "to"}


class LazyLogits(Tensor):
    """The logits (..., V) of a fused model: a tensor that is computed from the hidden states when it is first read.

    Shape, dtype and device cost nothing. `argmax(-1)` is computed in chunks, without the (N, V) matrix. Selecting tokens
    (an index, reshape, split), a cast and detach give lazy logits. Everything else computes the logits as the model
    itself would, with their graph, and keeps them. `requires_grad` is False until then.
    """

    record: Record
    fusion: "Fusion"
    _made_at: int
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, record: Record, fusion: "Fusion", version: int | None = None) -> "LazyLogits":
        made: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, record.shape, dtype=record.dtype, device=record.hidden.device
        )
        made.record, made.fusion, made._computed = record, fusion, None
        made._made_at = fusion.version() if version is None else version
        return made

    def computed(self) -> Tensor:
        """The logits, computed now if they have not been.

        Raises:
            RuntimeError: the head's weight has changed since the model's forward.
        """
        if self._computed is None:
            if self.fusion.version() != self._made_at:
                raise RuntimeError(
                    "outputs.logits: expected to be read before the head's weight changes (by an optimiser's step), "
                    "they are computed only when they are read; run the model again, or read them earlier"
                )
            self._computed = self.fusion.logits(self.record)
        return self._computed

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if name in _FREE_CALLS or (name == "__get__" and _property(function) in _FREE):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, cls) and first._computed is None:
            if name in _SELECTING or name == "detach":
                try:
                    return first._selected(name, args[1:], kwargs)
                except NotRecordable:
                    pass
            if name == "argmax" and _is_last(first.ndim, *args[1:], **kwargs):
                return first.fusion.argmax(first.record)
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def _selected(self, name: str, args: Any, kwargs: Any) -> Any:
        logits = RecordedLogits(self.record)
        found = (
            logits.with_hidden(self.record.hidden.detach())
            if name == "detach"
            else getattr(logits, name)(*args, **kwargs)
        )
        return tuple(map(self._again, found)) if isinstance(found, tuple) else self._again(found)

    def _again(self, logits: RecordedLogits) -> Self:
        return type(self)(logits.record, self.fusion, self._made_at)  # type: ignore[return-value]


def _property(getter: Any) -> str:
    return str(getattr(getattr(getter, "__self__", None), "__name__", ""))


def _plain(value: Any) -> Any:
    return value.computed() if isinstance(value, LazyLogits) else value


def _is_last(ndim: int, dim: int | None = None, keepdim: bool = False) -> bool:
    return dim is not None and dim % ndim == ndim - 1 and not keepdim

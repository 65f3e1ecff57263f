"""Logits of a fused model that are computed only if somebody reads them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from uncork.hf.record import Fused, NotRecordable, Record, RecordedLogits, Version
from uncork.loss import TokenStatistics
from uncork.loss.call import autocast_dtype, without_autocast

# What is known without the logits, and what selects tokens of them.
_FREE = frozenset(
    ["shape", "dtype", "device", "layout", "ndim", "names", "is_leaf", "requires_grad", "is_cuda", "is_cpu", "is_meta",
     "is_nested", "is_sparse", "is_quantized", "is_xpu", "is_mps", "is_xla", "itemsize", "nbytes"]
)  # fmt: skip
_FREE_CALLS = frozenset(
    ["size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "__len__", "element_size", "get_device"]
)
_SELECTING = {"__getitem__", "view", "reshape", "flatten", "split", "squeeze", "unsqueeze", "contiguous", "float", "to"}


@dataclass(frozen=True)
class _Moment:
    """How the model's forward ran: with which parameters of the head, whether with a graph, under which autocast."""

    version: Version
    graph: bool
    autocast: torch.dtype | None


class LazyLogits(Tensor):
    """The logits (..., V) of a fused model: a tensor that is computed from the hidden states when it is first read.

    Shape, dtype and device cost nothing. `argmax(-1)` and `statistics` are computed in chunks, without the (N, V)
    matrix. Selecting tokens (an index, reshape, split), a cast and detach give lazy logits. Everything else computes
    the logits as the model's forward would have, with their graph and under its autocast, and keeps them.
    `requires_grad` is False; what is computed from them has it.
    """

    record: Record
    fusion: Fused
    _made: _Moment
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, record: Record, fusion: Fused, made: _Moment | None = None) -> "LazyLogits":
        logits: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, record.shape, dtype=record.dtype, device=record.hidden.device
        )
        logits.record, logits.fusion, logits._computed = record, fusion, None
        logits._made = made or _Moment(fusion.version(), torch.is_grad_enabled(), autocast_dtype(record.hidden.device))
        return logits

    def computed(self) -> Tensor:
        """The logits, computed now if they have not been.

        Raises:
            RuntimeError: a parameter of the head has changed since the model's forward.
        """
        if self._computed is None:
            with self._as_made(), torch.set_grad_enabled(self._made.graph):
                self._computed = self.fusion.logits(self.record)
        return self._computed

    def statistics(self, target: Tensor | None = None) -> TokenStatistics:
        """Log-probability of the target, logsumexp, entropy and argmax of each token, without the (N, V) matrix.

            outputs.logits[:, :-1].statistics(labels[:, 1:]).log_prob

        As `uncork.token_statistics`, of the function that the model's forward applied: differentiable, in float32.

        Args:
            target: words, of the logits' shape without V; -100 gives 0. None leaves log_prob out.

        Raises:
            RuntimeError: a parameter of the head has changed since the model's forward.
            ValueError: a target of another shape or out of range.
        """
        with self._as_made(), torch.set_grad_enabled(self._made.graph and torch.is_grad_enabled()):
            return self.fusion.statistics(self.record, target)

    @contextlib.contextmanager
    def _as_made(self) -> Iterator[None]:
        """The autocast of the model's forward. Raises RuntimeError if the head's parameters are not there any more."""
        if self.fusion.version() != self._made.version:
            raise RuntimeError(
                "outputs.logits: expected to be read before the head's parameters change (by an optimiser's step), "
                "they are computed only when they are read; run the model again, or read them earlier"
            )
        dtype = self._made.autocast
        with without_autocast(self.device) if dtype is None else torch.autocast(self.device.type, dtype):
            yield

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
            if name == "detach" or (name in _SELECTING and not first._moved(args[1:], kwargs)):
                try:
                    return first._selected(name, args[1:], kwargs)
                except NotRecordable:
                    pass
            if name == "argmax" and _is_last(first.ndim, *args[1:], **kwargs):
                with first._as_made():
                    return first.fusion.argmax(first.record)
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def _moved(self, args: Any, kwargs: Any) -> bool:
        """Whether the arguments of `to` name another device."""
        given = [value.device if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        return any(isinstance(value, str | torch.device) and torch.device(value) != self.device for value in given)

    def _selected(self, name: str, args: Any, kwargs: Any) -> Any:
        logits = RecordedLogits(self.record)
        if name == "detach":
            return self._again(logits.with_hidden(self.record.hidden.detach()), replace(self._made, graph=False))
        found = getattr(logits, name)(*args, **kwargs)
        return tuple(map(self._again, found)) if isinstance(found, tuple) else self._again(found)

    def _again(self, logits: RecordedLogits, made: _Moment | None = None) -> Self:
        return type(self)(logits.record, self.fusion, made or self._made)


def _property(getter: Any) -> str:
    return str(getattr(getattr(getter, "__self__", None), "__name__", ""))


def _plain(value: Any) -> Any:
    return value.computed() if isinstance(value, LazyLogits) else value


def _is_last(ndim: int, dim: int | None = None, keepdim: bool = False) -> bool:
    return dim in (-1, ndim - 1) and not keepdim

"""Logits of a fused model that are computed only if somebody reads them."""

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
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
_IN_PLACE = re.compile(r"[a-z]\w*_|__setitem__|__i(add|sub|mul|truediv|floordiv|mod|pow)__")


@dataclass(frozen=True)
class _Moment:
    """How the model's forward ran: with which parameters of the head, whether with a graph, under which autocast."""

    version: Version
    graph: bool
    autocast: torch.dtype | None


class _Count:
    """How often the memory of computed logits was written since: a count that its views share, and no memory."""

    def __init__(self, computed: Tensor) -> None:
        self._counter = computed.detach()
        self._counter.data = computed.new_empty(0)  # lets the memory go, and keeps the count
        self._start = self._counter._version

    @property
    def changed(self) -> bool:
        return self._counter._version != self._start


class LazyLogits(Tensor):
    """The logits (..., V) of a fused model: a tensor that is computed from the hidden states when it is first read.

    Shape, dtype and device cost nothing. `argmax(-1)` and `statistics` are computed in chunks, without the (N, V)
    matrix. Selecting tokens (an index, reshape, split), a cast and detach give lazy logits. Everything else computes
    the logits as the model's forward would have, with their graph and under its autocast, and keeps them.
    `requires_grad` is False; what is computed from them has it.

    A change in place is seen in what shares its memory, as in any tensor. Where a slice and what it was taken from were
    computed each by itself, since only they were read, the other one raises RuntimeError when it is read after that.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from uncork.hf import fuse_loss
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, ids = fuse_loss(LlamaForCausalLM(config)), torch.arange(12).view(2, 6)
    >>> outputs = model(ids, labels=ids)
    >>> outputs.logits[:, -1]
    LazyLogits(shape=(2, 50), dtype=torch.float32, device=cpu)
    >>> log_prob = outputs.logits[:, :-1].statistics(ids[:, 1:]).log_prob
    >>> torch.allclose(-log_prob.mean(), outputs.loss)
    True
    """

    record: Record
    fusion: Fused
    _made: _Moment
    _computed: Tensor | None
    _count: _Count | None  # of the memory of `_computed`
    _counts: list[_Count]  # of all that would share memory with these, had the model computed them
    _parent: Callable[[], "LazyLogits | None"]  # what these are a view of
    _select: Callable[[Tensor], Tensor]
    _layout: Tensor | None  # on the meta device, with the strides of the model's own

    @staticmethod
    def __new__(cls, record: Record, fusion: Fused, made: _Moment | None = None) -> "LazyLogits":
        logits: LazyLogits = torch.Tensor._make_wrapper_subclass(
            cls, record.shape, dtype=record.dtype, device=record.hidden.device
        )
        logits.record, logits.fusion, logits._computed = record, fusion, None
        logits._count, logits._counts, logits._parent, logits._layout = None, [], lambda: None, None
        logits._made = made or _Moment(fusion.version(), torch.is_grad_enabled(), autocast_dtype(record.hidden.device))
        return logits

    def computed(self) -> Tensor:
        """The logits, computed now if they have not been.

        Raises:
            RuntimeError: a parameter of the head has changed since the model's forward, or logits that share memory
                with these and were computed by themselves.
        """
        computed = self._known()
        if computed is None:
            with self._as_made(), torch.inference_mode(False), torch.set_grad_enabled(self._made.graph):
                computed = self._computed = self.fusion.logits(self.record)
                self._count = _Count(computed)
            self._counts.append(self._count)
        self._require_unchanged(but=self._count)
        return computed

    def _known(self) -> Tensor | None:
        """The logits, if they or what they are a view of has been computed."""
        parent = self._parent() if self._computed is None else None
        whole = None if parent is None else parent._known()
        if parent is not None and whole is not None:
            with torch.inference_mode(False), torch.set_grad_enabled(self._made.graph):
                self._computed, self._count = self._select(whole), parent._count
        return self._computed

    def _compute_whole(self) -> None:
        """Computes them as a view of what they were taken from, before they are written."""
        whole = self
        while whole._known() is None and (parent := whole._parent()) is not None:
            whole = parent
        whole.computed()

    def _require_unchanged(self, but: _Count | None = None) -> None:
        if any(count.changed for count in self._counts if count is not but):
            raise RuntimeError(
                "outputs.logits: expected that no logits of the same memory (themselves, a slice, the whole) were "
                "changed in place, which these, computed from hidden states, would not see; change a clone() of them"
            )

    def statistics(self, target: Tensor | None = None) -> TokenStatistics:
        """Log-probability of the target, logsumexp, entropy and argmax of each token, without the (N, V) matrix.

            outputs.logits[:, :-1].statistics(labels[:, 1:]).log_prob

        As `uncork.token_statistics`, of the function that the model's forward applied: differentiable, in float32.
        They are of the logits as the forward made them: after a change of these in place they raise.

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
        """The autocast of the model's forward. Raises RuntimeError if its parameters or logits have changed since."""
        self._require_unchanged()
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
        if isinstance(first, cls) and first._known() is None:
            if name == "detach" or (name in _SELECTING and not first._moved(args[1:], kwargs)):
                try:
                    return first._selected(name, args[1:], kwargs)
                except NotRecordable:
                    pass
            if name == "argmax" and _is_last(first.ndim, *args[1:], **kwargs):
                with first._as_made():
                    return first.fusion.argmax(first.record)
        if _IN_PLACE.fullmatch(name) or kwargs.get("inplace") or kwargs.get("out") is not None:
            for written in (first, kwargs.get("out")):
                if isinstance(written, cls):
                    written._compute_whole()
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return function(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    def _moved(self, args: Any, kwargs: Any) -> bool:
        """Whether the arguments of `to` name another device."""
        given = [value.device if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        return any(isinstance(value, str | torch.device) and torch.device(value) != self.device for value in given)

    def _selected(self, name: str, args: Any, kwargs: Any) -> Any:
        self._require_unchanged()
        logits = RecordedLogits(self.record)
        if name == "detach":
            found: Any = logits.with_hidden(self.record.hidden.detach())
        else:
            found = getattr(logits, name)(*args, **kwargs)

        def select(whole: Tensor, part: int | None = None) -> Any:
            made = getattr(whole, name)(*args, **kwargs)
            return made if part is None else made[part]

        if isinstance(found, tuple):
            return tuple(self._again(each, name, partial(select, part=i)) for i, each in enumerate(found))
        if name in ("to", "float"):
            return self._again(found, name, lambda whole: whole.to(found.dtype))
        return self._again(found, name, None if name == "__getitem__" and _copies(args[0]) else select)

    def _again(self, logits: RecordedLogits, name: str, select: Callable[[Tensor], Tensor] | None) -> Self:
        """Lazy logits that were selected from these.

        Args:
            select: the same selection of computed logits; None if it is a copy.
        """
        made = replace(self._made, graph=False) if name == "detach" else self._made
        again = type(self)(logits.record, self.fusion, made)
        if select is None:
            return again
        if self._layout is None:
            self._layout = torch.empty(self.shape, dtype=self.dtype, device="meta")
        again._layout = select(self._layout)
        if again._layout.untyped_storage()._cdata == self._layout.untyped_storage()._cdata:
            # What is detached does not keep the graph.
            again._parent = weakref.ref(self) if name == "detach" else lambda: self
            again._select, again._counts = select, self._counts
        return again


def _property(getter: Any) -> str:
    return str(getattr(getattr(getter, "__self__", None), "__name__", ""))


def _copies(index: Any) -> bool:
    """Whether an index gives a copy: one of tensors or lists does."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, bool | list | tuple) or getattr(part, "ndim", 0) > 0 or getattr(part, "dtype", 0) == torch.bool
        for part in parts
    )


def _plain(value: Any) -> Any:
    return value.computed() if isinstance(value, LazyLogits) else value


def _is_last(ndim: int, dim: int | None = None, keepdim: bool = False) -> bool:
    return dim in (-1, ndim - 1) and not keepdim

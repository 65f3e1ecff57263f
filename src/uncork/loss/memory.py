"""An estimate of memory, and the count of what torch's operators make on the way."""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryEstimate(NamedTuple):
    """Bytes beyond the inputs at the peak of a step: `total`, the sum of the four parts after it.

    scores: the block or blocks of scores, what the function makes of them, and products on their way to a gradient.
    weight: copy of W in another dtype, on a CPU of 8 MiB of it. gradients: those that the step leaves, and what is kept
    of them before. other: the function's tables, sums and histograms, and a few numbers a token.

    rows: of scores at once, K of which make a token of a mixture. impl: the implementation that serves.
    """

    total: int
    scores: int
    weight: int
    gradients: int
    other: int
    rows: int
    impl: str = ""

    @classmethod
    def of(cls, scores: int, weight: int, gradients: int, other: int, rows: int) -> "MemoryEstimate":
        """The estimate with these parts."""
        return cls(scores + weight + gradients + other, scores, weight, gradients, other, rows)


class Live(TorchDispatchMode):
    """Counts bytes of what is made inside: `live` at the moment, `peak` at once.

    Args:
        device: of the step that is counted. The tensors that are counted may lie elsewhere, on meta.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.casts = device.type == "cpu"
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.live = self.peak = 0

    def _free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for t in made:
            storage = t.untyped_storage()
            if storage._cdata not in storages and storage not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live + self._inside(func, given, made))
        return out

    def _inside(self, func: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
        """Bytes that an operator of torch makes for itself, where they are as many as its arguments'."""
        name = func.overloadpacket.__name__
        if name == "logsumexp":  # what it takes the exponential of
            return given[0].nbytes
        if not self.casts or not made:
            return 0
        if name == "sum":  # a CPU casts before it adds up
            return given[0].numel() * made[0].itemsize if given[0].dtype != made[0].dtype else 0
        if torch.Tag.pointwise not in func.tags:
            return 0
        tensors = [t for t in given if t.dim() and t.dtype != torch.bool]  # and before it computes elementwise
        if not tensors:
            return 0
        common = reduce(torch.promote_types, [t.dtype for t in tensors])
        return sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)


def device_of(module: nn.Module | None) -> torch.device:
    """Where a module's tensors lie; the CPU if it has none."""
    tensors = () if module is None else itertools.chain(module.parameters(), module.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def shapes_alone(run: Callable[[], Any]) -> Any:
    """What `run` returns; a ValueError if a logit function needs values and not shapes alone."""
    try:
        return run()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(
            "logit_function: expected a module that runs on torch's meta device, on which its memory is counted; there "
            f"it raised {type(error).__name__}: {error}"
        ) from error

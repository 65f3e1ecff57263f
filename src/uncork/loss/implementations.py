"""The registry of implementations: a new one is its own file and one line here.

| impl | what it is | needs |
|---|---|---|
| "native" | works chunk by chunk, in C++, with one (chunk, V) block in memory | Linux, a CPU, the library's functions |
| "triton" | works chunk by chunk, in Triton, with one (chunk, V) block in memory | a GPU, the library's functions |
| "torch" | works chunk by chunk, in torch, with a few such blocks | any device, any elementwise module |
| "reference" | keeps the (N, V) logits, leaves gradients to autograd: the definition | any device |
"""

import functools
import warnings

from uncork.loss.call import Call, Implementation, Missing
from uncork.loss.chunked import Chunked
from uncork.loss.reference import Reference
from uncork.loss.tile import LogProbTiles
from uncork.loss.tile_native import NativeTiles
from uncork.loss.tile_torch import TorchTiles
from uncork.loss.tile_triton import TritonTiles

# The fastest first: `impl=None` takes the first that serves the call. The last serves every call.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "native": Chunked(NativeTiles),
    "triton": Chunked(TritonTiles),
    "torch": Chunked(TorchTiles),
    "reference": Reference(),
}


def check_name(impl: str | None) -> None:
    """Raises a ValueError that lists the names unless this is one of them, or None."""
    if impl is not None and not (isinstance(impl, str) and impl in IMPLEMENTATIONS):
        raise ValueError(f"impl: expected one of {sorted(IMPLEMENTATIONS)} or None, got {impl!r}")


def choose(impl: str | None, call: Call) -> Implementation:
    """The implementation that was asked for, or the fastest that serves the call.

    Raises:
        ValueError: for an unknown name, or if the implementation asked for does not support the call; it says why.
    """
    check_name(impl)
    if impl is None:
        return IMPLEMENTATIONS[_fastest(call)]
    if reason := IMPLEMENTATIONS[impl].refuses(call):
        raise ValueError(f'impl="{impl}" cannot serve this call: {reason}')
    return IMPLEMENTATIONS[impl]


def title(call: Call) -> str:
    """The implementation that `impl=None` takes for a call, as text for people: "torch", or "native (avx512)"."""
    name = _fastest(call)
    variant = IMPLEMENTATIONS[name].variant()
    return f"{name} ({variant})" if variant else name


def log_prob_tiles(call: Call) -> type[LogProbTiles] | None:
    """The fastest tiles that serve the call and give log-probabilities; None where plain torch has to make them."""
    for implementation in IMPLEMENTATIONS.values():
        tiles = getattr(implementation, "tiles", None)
        if isinstance(tiles, type) and issubclass(tiles, LogProbTiles) and not implementation.refuses(call):
            return tiles
    return None


def _fastest(call: Call) -> str:
    missing: dict[str, str] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        reason = implementation.refuses(call)
        if not reason:
            for other, why in missing.items():
                _say_missing(other, why, name)
            return name
        if isinstance(reason, Missing):
            missing[name] = reason
    raise AssertionError("no implementation serves every call")


@functools.cache
def _say_missing(name: str, reason: str, instead: str) -> None:
    warnings.warn(
        f"uncork: the {name} tile is missing, so impl={instead!r} serves (slower, same results): {reason}",
        stacklevel=5,
    )

"""The tile on a CPU: C++ with OpenMP (see `native/`), called through ctypes on the tensors' memory.

The library is built when the package is installed, if there is a C++ compiler. It is not linked with OpenMP and takes
its threads from the runtime that torch computes with. It is supported on Linux; without it impl=None takes "torch".
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uncork.logit_functions.base import LogitFunction
from uncork.logit_functions.operations import (
    Affine,
    Operation,
    PiecewiseLinear,
    Sigmoid,
    Softplus,
    Tanh,
)
from uncork.loss.call import Call, Missing
from uncork.loss.chunk_size import CPU, ChunkRule
from uncork.loss.function import no_kernel, operations_of
from uncork.loss.target import IndexTarget, ProbabilityTarget
from uncork.loss.tile import LogProbTiles, TileMemory, TileResult, Upstream, hides_memory

LIBRARY = Path(__file__).with_name("_tile_native.so")
_VERSION = 2
_KINDS: dict[type[Operation], int] = {Affine: 0, Tanh: 1, Sigmoid: 2, Softplus: 3, PiecewiseLinear: 4}
_SIZES: dict[type[Operation], int] = {Affine: 2, Tanh: 2, Sigmoid: 3, Softplus: 2}
_SORTED = 5
_STATISTICS, _GRADIENT, _LOG_PROB = 0, 1, 2
_LIMIT_OPERATIONS, _LIMIT_PIECES = 16, 2**24
# As in native/rows.cpp: blocks of tokens that have sums of their own, and how many sums they share unless there are few
# blocks. As in native/worker.h: up to so many pieces, or V / 2, a thread has histograms, and beyond them a trail.
_MOST_BLOCKS, _FEWEST_BLOCKS, _MOST_SUMS, _FEW_PIECES = 128, 4, 2**20, 256

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not survive a fork: in the child the tile uses one thread.
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)


class _Operation(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("num_pieces", ctypes.c_int32),
        ("bound", ctypes.c_double),
        ("tables", ctypes.c_void_p * 3),
        ("sums", ctypes.c_void_p),
    )


class _Tile(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "components", "vocab", "stride")),
        ("scores", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("operations", ctypes.POINTER(_Operation)),
        *((name, ctypes.c_int32) for name in ("num_operations", "is_double", "threads")),
        ("parallel", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("index", "kept", "hit", "probabilities", "word_weight")),
        ("uniform", ctypes.c_double),
        ("log_prior", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("grad_cross_entropy", "grad_lse", "grad_square", "grad_entropy")),
        *((name, ctypes.c_void_p) for name in ("cross_entropy", "lse", "entropy", "argmax", "scale", "grad_prior")),
    )


def _find_parallel(torch_module: str) -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch computes with; 0 where there is none.

    That runtime goes by many names (libgomp.so.1, libgomp-a34b3233.so.1, libomp.so, libiomp5.so) and places, and the
    process may hold others. So it is found as the linker found it for torch: first among the symbols of the whole
    process, to which LD_PRELOAD and torch itself add theirs, then in what torch's module was linked with. Nothing is
    loaded that was not there.
    """
    for name in (None, torch_module):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


_PARALLEL = _find_parallel(str(torch._C.__file__)) if sys.platform == "linux" else 0


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is not there."""
    if sys.platform != "linux":
        return None, f"it is made for Linux, and this is {sys.platform}"
    if not LIBRARY.exists():
        return None, f"there is no {LIBRARY.name}, which an install of uncork builds where it finds a C++17 compiler"
    if not _PARALLEL:
        return None, "it takes its threads from torch's OpenMP, and this torch has none (libgomp, libomp or libiomp5)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.uncork_version()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY.name} cannot be used: {error}"
    if version != _VERSION:
        return None, f"{LIBRARY.name} is of version {version}, not {_VERSION}: install uncork again"
    library.uncork_instructions.restype = ctypes.c_char_p
    library.uncork_run.argtypes = (ctypes.POINTER(_Tile), ctypes.c_int32)
    wanted = os.environ.get("UNCORK_INSTRUCTIONS")
    if wanted and library.uncork_select(wanted.encode()):
        return None, f"UNCORK_INSTRUCTIONS: this CPU or build has no {wanted!r}"
    return library, ""


_library, missing = _load()


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(f"the native tile is missing: {missing}")
    return _library


def instructions() -> str:
    """The instruction set in use: "avx512", "avx2" or "base"; the environment's UNCORK_INSTRUCTIONS forces one."""
    return "" if _library is None else _library.uncork_instructions().decode()


def _refuses_function(function: nn.Module | None) -> str:
    if reason := no_kernel(function, _KINDS, _LIMIT_OPERATIONS, _LIMIT_PIECES):
        return reason
    if function is not None and not all(f.increasing for f in function.modules() if isinstance(f, LogitFunction)):
        return f"{type(function).__name__} does not increase, and the largest score is taken for the largest logit"
    return ""


def _check_tables(operations: Sequence[Operation], tables: Sequence[Tensor]) -> None:
    """Checks the sizes of tables, which C++ relies on and a user's own function may have got wrong."""
    expected = sum(operation.num_tables for operation in operations)
    if len(tables) != expected:
        raise ValueError(f"logit_function: expected {expected} tables for its operations, got {len(tables)}")
    start = 0
    for operation in operations:
        sizes = [t.numel() for t in tables[start : start + operation.num_tables]]
        pieces = isinstance(operation, PiecewiseLinear)
        wrong = (
            len(set(sizes)) > 1 or not 0 < sizes[0] < _LIMIT_PIECES if pieces else sizes != [_SIZES[type(operation)]]
        )
        if wrong:
            wanted = "of the same size P each" if pieces else f"of {_SIZES[type(operation)]} numbers"
            raise ValueError(f"logit_function: {type(operation).__name__} expects tables {wanted}, got sizes {sizes}")
        start += operation.num_tables


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


class NativeTiles(LogProbTiles):
    """The tiles of one call, over one set of the function's tables."""

    @classmethod
    def refuses(cls, call: Call) -> str:
        """Refuses tensors of a subclass or not on the CPU, calls that torch traces, and functions without a kernel."""
        if any(t.device.type != "cpu" for t in call.tensors()):
            return f"it works on the CPU, not on {call.input.device}"
        if reason := hides_memory(call):
            return reason
        return Missing(missing) if missing else _refuses_function(call.function)

    @classmethod
    def chunk_rule(cls, call: Call) -> ChunkRule:
        """The CPU's rule for one block of scores, which every step overwrites with its result."""
        return CPU

    @classmethod
    def memory(cls, call: Call, parameters: Sequence[Tensor], rows: int, gradients: bool) -> TileMemory:
        """Results of all tokens; in the C++ sums of every block of tokens, and each thread's histograms or trails."""
        k, size = call.components, call.dtype.itemsize
        results = 2 + gradients * (k if call.prior_logits is None else 2 * k)
        whole, sums, thread, start = call.tokens * results * size, 0, 0, 0
        for operation in () if call.function is None else operations_of(call.function) or ():
            own = parameters[start : start + operation.num_tables]
            start += len(own)
            numbers = sum(t.numel() for t in own)
            whole += 2 * numbers * size  # the tables, and as the C++ lays them out
            if not gradients or not any(t.requires_grad for t in own):
                continue
            pieces = own[0].numel() if isinstance(operation, PiecewiseLinear) else 0
            sums += 2 * pieces or numbers
            if pieces > max(_FEW_PIECES, call.weight.shape[0] // 2):
                thread += k * call.weight.shape[0] * 4 * size  # a trail: a piece and two numbers, aligned
            else:
                thread += k * pieces * 2 * 8 * (4 if pieces <= _FEW_PIECES else 2)
        blocks = min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, _MOST_SUMS // max(1, sums)), max(1, rows // k))
        return TileMemory(whole, (blocks + 1) * sums * 8 + torch.get_num_threads() * thread)

    @classmethod
    def variant(cls) -> str:
        """The instruction set in use."""
        return instructions()

    def __init__(self, call: Call, parameters: Sequence[Tensor], needs: Sequence[bool]) -> None:
        super().__init__(call, parameters, needs)
        self.bias = None if call.bias is None else call.bias.detach().to(call.dtype).contiguous()
        assert call.function is None or isinstance(call.function, LogitFunction)
        self.operations: Sequence[Operation] = (() if call.function is None else call.function.operations()) or ()
        self.tables = [table.detach().to(call.dtype).contiguous() for table in parameters]
        _check_tables(self.operations, self.tables)
        self.needs = list(needs)
        self.sums = self._make_sums()
        self.results: dict[str, Tensor] = {}

    def block(self, rows: int) -> Tensor:
        """Memory for (rows, V) scores, not filled; in large pages, since every call allocates it anew."""
        block = super().block(rows)
        _loaded().uncork_large_pages(ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(block.nbytes))
        return block

    def statistics(self, scores: Tensor, span: slice) -> TileResult:
        """Statistics of the tokens of a span, whose scores (rows, V) have no bias yet."""
        return self._run(scores, span, _STATISTICS, None)

    def gradient(self, scores: Tensor, span: slice, upstream: Upstream) -> TileResult:
        """Statistics, and gradients; the scores are used up."""
        return self._run(scores, span, _GRADIENT, upstream)

    def log_prob(self, scores: Tensor, span: slice) -> Tensor:
        """Log-probabilities (tokens, V), in place of the scores."""
        self._run(scores, span, _LOG_PROB, None)
        return scores[:: self.call.components]

    def _run(self, scores: Tensor, span: slice, mode: int, upstream: Upstream | None) -> TileResult:
        call, k = self.call, self.call.components
        tokens = scores.shape[0] // k
        held: list[Any] = []  # keeps the tensors alive that the struct points to

        def point(tensor: Tensor | None, dtype: torch.dtype = call.dtype) -> int | None:
            if tensor is None:
                return None
            held.append(tensor.detach().to(dtype).contiguous())
            return _address(held[-1])

        result = self._result(span, mode)
        sums = self.sums if mode == _GRADIENT else [None] * len(self.operations)
        for own in sums:
            if own is not None:
                own.zero_()
        prior = None if call.prior_logits is None else call.prior_logits[span].detach().to(call.dtype).log_softmax(-1)
        tile = _Tile(
            tokens=tokens,
            components=k,
            vocab=scores.shape[1],
            stride=scores.stride(0),
            scores=_address(scores),
            bias=_address(self.bias),
            operations=self._described(sums),
            num_operations=len(self.operations),
            is_double=call.dtype == torch.float64,
            threads=1 if _forked else torch.get_num_threads(),
            parallel=_PARALLEL,
            log_prior=point(prior),
            **{name: _address(tensor) for name, tensor in result._asdict().items() if isinstance(tensor, Tensor)},
        )
        target = None if call.target is None else call.target.rows(span)
        if isinstance(target, IndexTarget):
            tile.index, tile.kept = point(target.index, torch.int64), point(target.kept, torch.uint8)
            tile.hit, tile.word_weight, tile.uniform = point(target.hit), point(target.word_weight), target.uniform
        elif isinstance(target, ProbabilityTarget):
            tile.probabilities, tile.word_weight = point(target.probabilities), point(target.word_weight)
            tile.uniform = target.smoothing / scores.shape[1]
        if upstream is not None:
            tile.grad_cross_entropy, tile.grad_lse = point(upstream.cross_entropy), point(upstream.logsumexp)
            tile.grad_square, tile.grad_entropy = point(upstream.square), point(upstream.entropy)
        status = _loaded().uncork_run(tile, mode)
        if status == 1:
            raise MemoryError("impl='native': no memory left for the tile; give a smaller chunk_size")
        if status:
            raise RuntimeError(f"impl='native': the tile refused its arguments (status {status})")
        if mode == _GRADIENT:
            return result._replace(grad_scores=scores, sums=self._per_table(sums))
        return result

    def _result(self, span: slice, mode: int) -> TileResult:
        """The span's part of the call's results, to be filled.

        The memory of results and sums is allocated once for all chunks: small tensors that stay, allocated between
        large ones that are freed, would fragment the heap.
        """
        call, gradient = self.call, mode == _GRADIENT
        details = call.details and mode == _STATISTICS

        def part(name: str, asked: bool, *shape: int, dtype: torch.dtype = call.dtype) -> Tensor | None:
            if not asked:
                return None
            if name not in self.results:
                self.results[name] = torch.empty(call.tokens, *shape, dtype=dtype, device="cpu")
            return self.results[name][span]

        lse, scale = part("lse", True), part("scale", gradient, call.components)
        assert lse is not None
        return TileResult(
            cross_entropy=part("cross_entropy", call.target is not None),
            lse=lse,
            entropy=part("entropy", details),
            argmax=part("argmax", details, dtype=torch.int64),
            scale=None if scale is None else scale.flatten(),
            grad_prior=part("grad_prior", gradient and call.prior_logits is not None, call.components),
        )

    def _make_sums(self) -> list[Tensor | None]:
        """For each operation float64 memory for its tables' gradients; None if none of them is needed."""
        sums: list[Tensor | None] = []
        start = 0
        for operation in self.operations:
            stop = start + operation.num_tables
            sizes = [t.numel() for t in self.tables[start:stop]]
            size = sum(sizes[1:]) if isinstance(operation, PiecewiseLinear) else sum(sizes)
            wanted = any(self.needs[start:stop])
            sums.append(torch.empty(size, dtype=torch.float64, device="cpu") if wanted else None)
            start = stop
        return sums

    def _described(self, sums: Sequence[Tensor | None]) -> Any:
        described = (_Operation * len(self.operations))()
        start = 0
        for into, operation, own in zip(described, self.operations, sums, strict=True):
            tables = self.tables[start : start + operation.num_tables]
            into.kind, into.sums = _KINDS[type(operation)], _address(own)
            into.tables[: len(tables)] = [_address(table) for table in tables]
            if isinstance(operation, PiecewiseLinear):
                into.num_pieces = tables[0].numel()
                into.kind = _SORTED if operation.bound is None else into.kind
                into.bound = operation.bound or 0.0
            start += len(tables)
        return described

    def _per_table(self, sums: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradient to each table, in memory that the next chunk overwrites; None for knots, which have none."""
        tables: list[Tensor | None] = []
        for operation, own in zip(self.operations, sums, strict=True):
            if own is None:
                tables += [None] * operation.num_tables
            elif isinstance(operation, PiecewiseLinear):
                tables += [None, *own.chunk(2)]
            else:
                tables.append(own)
        return tables

"""The tile on a GPU, in Triton (see `gpu/`).

The products read half-precision inputs as they are and add up in float32. A learned function's gradients are sums of
whole numbers (`functions.add_pieces`), so they have the same bits every time. Nothing here waits for the GPU.

With TRITON_INTERPRET=1 Triton runs the same kernels on the CPU, slowly: so are they tested where there is no GPU.
"""

import functools
import importlib
import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uncork.logit_functions.base import LogitFunction, constants
from uncork.loss.call import Call, Missing
from uncork.loss.chunk_size import MIB, ChunkRule
from uncork.loss.function import no_kernel, operations_of
from uncork.loss.gpu.blocks import blocks_of
from uncork.loss.gpu.chain import KIND_OF, counter_bits, gathering_bytes, pack
from uncork.loss.target import IndexTarget, ProbabilityTarget
from uncork.loss.tile import WIDENS, TileMemory, TileResult, Tiles, Upstream, hides_memory

_OLDEST = (3, 6)  # of triton
_LIMIT_OPERATIONS, _LIMIT_PIECES = 8, 2**24
# Of kernels with several components: left to itself NVIDIA's compiler spills to have more rows at once.
_REGISTERS = {"maxnreg": 96} if torch.version.hip is None else {}


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str:
    try:  # not by importlib.metadata: torch's builds for AMD bring it under another name
        version = importlib.import_module("triton").__version__
    except ImportError:
        return "there is no package triton: pip install triton"
    known = tuple(map(int, re.findall(r"\d+", version)[:2]))
    return "" if known >= _OLDEST else f"it needs triton {'.'.join(map(str, _OLDEST))} or newer, and this is {version}"


@functools.cache
def _cannot_launch() -> str:
    """Why Triton reaches no GPU here: it compiles what launches its kernels when it is first asked for its driver."""
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"triton cannot launch here (it needs a C compiler and Python's headers): {error}"
    return ""


class TritonTiles(Tiles):
    """The tiles of one call."""

    reads_products = True

    @classmethod
    def refuses(cls, call: Call) -> str:
        """Refuses tensors of a subclass or not on a GPU, calls that torch traces, and functions without a kernel."""
        device = call.input.device
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"it works on a GPU, not on {device}"
        if reason := hides_memory(call) or no_kernel(call.function, KIND_OF, _LIMIT_OPERATIONS, _LIMIT_PIECES):
            return reason
        here = torch.cuda.is_available() and not interpreted()  # an estimate needs no GPU
        missing = _missing() or (_cannot_launch() if here else "")
        return Missing(missing) if missing else ""

    @classmethod
    def chunk_rule(cls, call: Call) -> ChunkRule:
        """One block of scores, large, since each chunk reads W twice and its gradient once."""
        budget = blocks_of(call.input.device).chunk_mib * MIB
        return ChunkRule(budget=budget, narrow_budget=budget, least_rows=256, limit_rows=4096)

    @classmethod
    def operand_dtype(cls, call: Call) -> torch.dtype:
        """Half-precision inputs are multiplied as they are and added up in float32, where torch can."""
        as_it_is = call.input.dtype in (torch.bfloat16, torch.float16) and call.input.is_cuda and WIDENS
        return call.input.dtype if as_it_is else cls.product_dtype(call)

    @classmethod
    def memory(cls, call: Call, parameters: Sequence[Tensor], rows: int, gradients: bool) -> TileMemory:
        """The packed tables and bias, what a function's gradients are gathered in, and a few numbers a row."""
        size, vocab_size = call.dtype.itemsize, call.weight.shape[0]
        bias = 0 if call.bias is None else _wide(vocab_size) * size
        numbers = sum(t.numel() for t in parameters)
        operations = () if call.function is None or not gradients else operations_of(call.function) or ()
        bins, of_row = gathering_bytes(operations, parameters, call.input.dtype, vocab_size)
        statistics = 3 + (8 if gradients else 0)  # top, log-sum, target; factors, which of them count, and their sizes
        return TileMemory(bias + numbers * size, bins + rows * (statistics * size + of_row))

    @classmethod
    def width(cls, call: Call) -> int:
        """Rows begin at multiples of 16 numbers, for wide loads."""
        return _wide(call.weight.shape[0])

    @classmethod
    def variant(cls) -> str:
        """Whether Triton's interpreter runs it."""
        return "interpreted" if interpreted() else ""

    def __init__(self, call: Call, parameters: Sequence[Tensor], needs: Sequence[bool]) -> None:
        super().__init__(call, parameters, needs)
        device = call.input.device
        self.bias = None if call.bias is None else _padded(call.bias.detach().to(call.dtype))
        assert call.function is None or isinstance(call.function, LogitFunction)
        operations = (() if call.function is None else call.function.operations()) or ()
        self.chain = pack(operations, parameters, needs, call.dtype)
        target = call.target
        uniform = target.uniform if isinstance(target, IndexTarget) else 0.0
        whole = 1.0
        if isinstance(target, ProbabilityTarget):
            whole, uniform = 1 - target.smoothing, target.smoothing / call.weight.shape[0]
        self.numbers = constants(call.dtype, device, whole, uniform)
        weight = None if target is None else target.word_weight
        self.dense = isinstance(target, ProbabilityTarget) or uniform != 0
        self.word_weight = _padded(weight) if weight is not None and self.dense else None
        self.enlarged: Tensor | None = None

    def block(self, rows: int) -> Tensor:
        """Memory for (rows, V) scores, not filled."""
        call = self.call
        memory = torch.empty(rows, self.width(call), dtype=self.product_dtype(call), device=call.input.device)
        return memory[:, : call.weight.shape[0]]

    # ---- what kernels are given

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.call.dtype, device=self.call.input.device)

    def _given(self, span: slice) -> dict[str, Any]:
        """The target of a span's tokens, as arguments of the kernels."""
        target = None if self.call.target is None else self.call.target.rows(span)
        return {
            "index": target.index.contiguous() if isinstance(target, IndexTarget) else None,
            "probabilities": target.probabilities.contiguous() if isinstance(target, ProbabilityTarget) else None,
            "word_weight": self.word_weight,
            "numbers": self.numbers,
        }

    def _common(self, scores: Tensor, *, many: bool = False) -> dict[str, Any]:
        """many: whether the kernel keeps histograms or several components."""
        import triton
        from triton import language as tl

        chain, vocab_size, sizes = self.chain, scores.shape[1], blocks_of(scores.device)
        block, warps = (sizes.many_block, sizes.many_warps) if many else (sizes.block, sizes.warps)
        return {
            "scores": scores,
            "stride": scores.stride(0),
            "V": vocab_size,
            "W": min(_wide(vocab_size), scores.stride(0)),
            "bias": self.bias,
            "tables": chain.tables,
            "K": self.call.components,
            "KINDS": chain.kinds,
            "PIECES": chain.pieces,
            "OFFSETS": chain.offsets,
            "SIZE": len(chain.kinds),
            "T": tl.float64 if self.call.dtype == torch.float64 else tl.float32,
            "BLOCK": min(block, triton.next_power_of_2(vocab_size)),
            "num_warps": warps if vocab_size >= block else 4,
            "enable_fp_fusion": True,  # its default changes with triton 3.10
        }

    # ---- statistics

    def _rows(self, scores: Tensor, span: slice, *, dense: bool, masses: bool, details: bool) -> dict[str, Any]:
        """The statistics of every row, None for what is not asked for.

        dense: the part of the loss that all words have; details: entropy, argmax.
        """
        from uncork.loss.gpu import rows

        count = scores.shape[0]
        given = self._given(span)
        if not (dense or masses):
            given["probabilities"] = None
        out = {
            "top_out": self._empty(count),
            "log_sum_out": self._empty(count),
            "at_target_out": self._empty(count) if given["index"] is not None else None,
            "loss_out": self._empty(count) if dense else None,
            "mass_out": self._empty(count, 2) if masses else None,
            "entropy_out": self._empty(count) if details else None,
            "argmax_out": self._empty(count, dtype=torch.int64) if details else None,
        }
        _launch(rows.row_statistics, count, **self._common(scores), **given, **out)
        return out

    def _cross_entropy(self, span: slice, found: dict[str, Any]) -> Tensor | None:
        """(C,) of tokens under one softmax, from their rows' statistics."""
        if self.call.target is None:
            return None
        target = self.call.target.rows(span)
        loss = found["loss_out"]
        log_sum, at_target = found["log_sum_out"], found["at_target_out"]
        if isinstance(target, IndexTarget):
            surprise = log_sum - at_target
            own = torch.where((target.hit == 0) & (surprise == torch.inf), 0, target.hit * surprise)
            loss = own if loss is None else own + loss
        assert loss is not None
        return torch.where(target.kept, loss, 0)

    def statistics(self, scores: Tensor, span: slice) -> TileResult:
        """The tokens' statistics: entropy and argmax where the call asks for details."""
        details = self.call.details
        if self.call.prior_logits is None:
            found = self._rows(scores, span, dense=self.dense, masses=False, details=details)
            top, log_sum = found["top_out"], found["log_sum_out"]
            return TileResult(
                self._cross_entropy(span, found), top + log_sum, found["entropy_out"], found["argmax_out"]
            )
        return self._mixture(scores, span, None)

    # ---- gradients

    def enlarge(self, upstream: Upstream) -> Tensor | None:
        """In float16, a power of two that takes the largest upstream gradient to between 32 and 64.

        float16 holds nothing below 2^-24: a probability of a token of 8,192 would be lost below 2^-11 without it.
        """
        if self.operand_dtype(self.call) != torch.float16:
            return None
        top = torch.stack(
            [u.detach().abs().amax() for u in upstream if u is not None and u.numel()] or [self.numbers[0]]
        )
        exponent = torch.floor(6 - torch.log2(top.amax().double())).nan_to_num(0, 0, 0).clamp(-100, 100)
        self.enlarged = torch.exp2(exponent).to(self.call.dtype)
        return self.enlarged

    def _within(self, size: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(what each row's gradients are multiplied by, what is left of `enlarge`'s factor), so that none overflows.

        Args:
            size: (R,), a bound of each row's sum of absolute gradients to the logits.
        """
        if self.enlarged is None:
            return None, None
        largest = size.double() * self.enlarged
        for steepest in self.chain.steepest:
            largest = largest * steepest.clamp(min=1)
        excess = torch.ceil(torch.log2(largest) - 15).nan_to_num(0, 0, 0).clamp(0, 15)
        scale = torch.exp2(excess).to(self.call.dtype)
        return self.enlarged / scale, scale

    def gradient(self, scores: Tensor, span: slice, upstream: Upstream) -> TileResult:
        """Cross-entropy, lse, and all gradients but the products'; the scores are used up."""
        if self.call.prior_logits is not None:
            return self._mixture(scores, span, upstream)
        target = None if self.call.target is None else self.call.target.rows(span)
        grad_entropy = upstream.entropy
        found = self._rows(scores, span, dense=self.dense, masses=self.dense, details=grad_entropy is not None)
        top, log_sum = found["top_out"], found["log_sum_out"]
        lse = top + log_sum
        factor = torch.zeros_like(lse) if upstream.logsumexp is None else upstream.logsumexp
        if upstream.square is not None:
            factor = factor + torch.where(upstream.square == 0, 0, 2 * upstream.square * lse)
        hit = dense = None
        size = torch.zeros_like(lse)  # of what is subtracted from factor p
        if target is not None and upstream.cross_entropy is not None:
            if isinstance(target, IndexTarget):
                hit = upstream.cross_entropy * target.hit
                factor, size = factor + hit, size + hit.abs()
            if self.dense:
                masses, dense = found["mass_out"], upstream.cross_entropy
                factor, size = factor + dense * masses[:, 0], size + (dense * masses[:, 1]).abs()
        used = torch.ones_like(lse, dtype=torch.bool)
        if target is not None and upstream.cross_entropy is not None:
            used = target.kept | (factor != 0)
            if grad_entropy is not None:
                used |= grad_entropy != 0
        if grad_entropy is not None:
            size = size + grad_entropy.abs() * 2 * torch.log(size.new_full((), max(3, scores.shape[1])))
        size = torch.where(used, size + factor.abs(), 0)
        own = self._row_gradient(scores, span, found, used, factor, hit, dense, grad_entropy, size)
        return TileResult(self._cross_entropy(span, found), lse, None, None, **own)

    def _row_gradient(
        self,
        scores: Tensor,
        span: slice,
        found: dict[str, Any],
        used: Tensor,
        factor: Tensor,
        hit: Tensor | None,
        dense: Tensor | None,
        grad_entropy: Tensor | None,
        size: Tensor,
    ) -> dict[str, Any]:
        """The gradient to the scores, in their memory, its scale, and that to each table, as fields of a result.

        size: (R,), a bound of a row's sum of |g|.
        """
        from uncork.loss.gpu import rows

        given = self._given(span)
        if hit is None:
            given["index"] = None
        if dense is None:
            given["probabilities"] = None
        gathered, scale = self._gathering(scores, scores.shape[0], size)
        sparse = hit is not None and dense is None and grad_entropy is None
        counters = self.chain.counters(scores, self.call.input.dtype) if sparse else None

        def of_rows(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(self.call.dtype).contiguous()

        arguments = {
            "top_in": found["top_out"],
            "log_sum_in": found["log_sum_out"],
            "used": used.contiguous(),
            "factor": of_rows(factor),
            "hit": of_rows(hit),
            "dense": of_rows(dense),
            "entropy_factor": of_rows(grad_entropy),
            "entropy": found["entropy_out"],
            "counters": counters,
            "BITS": counter_bits(scores.shape[1]),
        }
        common = self._common(scores, many=self.chain.num_bins > 0)
        _launch(rows.row_gradient, scores.shape[0], **common, **given, **arguments, **gathered)
        top, log_sum = found["top_out"], found["log_sum_out"]
        counted = None if counters is None else self.chain.counted(counters, scores.shape[1], top, log_sum, factor)
        return {"grad_scores": gathered["out"], "scale": scale, "sums": self._per_table(gathered, counted)}

    def _gathering(self, scores: Tensor, programs: int, size: Tensor) -> tuple[dict[str, Any], Tensor | None]:
        """(Where the gradient to the scores goes, and the sums that the tables' gradients are made of; its scale (R,)).

        size: of each program's rows, a bound of the sum of |g|.
        """
        import triton

        chain, device = self.chain, scores.device
        out = self._narrow(scores)
        scales = chain.scales(size.double().sum())
        larger, scale = self._within(size.repeat_interleave(scores.shape[0] // max(1, programs)))
        return {
            "out": out,
            "out_stride": out.stride(0),
            "larger": larger,
            "bins": torch.zeros(chain.copies, dtype=torch.int64, device=device) if chain.num_bins else None,
            "COPIES": chain.copies,
            "scales": None if scales is None else scales.to(self.call.dtype),
            "row_sums": self._empty(programs, chain.num_scalars, dtype=torch.float64) if chain.num_scalars else None,
            "SCALARS": chain.scalars,
            "BINS": chain.bins,
            "WANTED": chain.wanted,
            "S": chain.num_scalars,
            "PADDED": triton.next_power_of_2(max(1, chain.num_scalars)),
            "SHARED": out.dtype != scores.dtype,
            "ROUND": interpreted() and out.dtype == torch.bfloat16,
        }, scale

    def _per_table(self, gathered: dict[str, Any], counted: Tensor | None = None) -> list[Tensor | None]:
        return self.chain.per_table(gathered["row_sums"], gathered["bins"], gathered["scales"], counted)

    def _narrow(self, scores: Tensor) -> Tensor:
        """The scores' own memory for gradients in the dtype of the products' operands."""
        dtype = self.operand_dtype(self.call)
        if dtype == scores.dtype:
            return scores
        return torch.as_strided(scores.view(dtype), scores.shape, (scores.stride(0) * 2, 1))

    # ---- mixtures

    def _mixture(self, scores: Tensor, span: slice, upstream: Upstream | None) -> TileResult:
        """The statistics of mixtures and, with upstream gradients, their gradients."""
        call, target = self.call, None if self.call.target is None else self.call.target.rows(span)
        assert call.prior_logits is not None
        details = call.details and upstream is None
        log_prior = call.prior_logits[span].detach().to(call.dtype).log_softmax(-1).contiguous()
        found = self._rows(scores, span, dense=False, masses=False, details=False)
        lse = torch.zeros_like(log_prior[:, 0])
        grad_ce = None if upstream is None else upstream.cross_entropy
        grad_entropy = None if upstream is None else upstream.entropy
        if isinstance(target, IndexTarget) and target.sparse and not details and grad_entropy is None:
            log_sum, at_target = found["log_sum_out"], found["at_target_out"]
            joint = log_prior + (at_target - log_sum).view_as(log_prior)
            total = torch.logsumexp(joint, -1, keepdim=True)
            surprise = -total.squeeze(-1)
            loss = torch.where((target.hit == 0) & (surprise == torch.inf), 0, target.hit * surprise)
            cross_entropy = torch.where(target.kept, loss, 0)
            if upstream is None:
                return TileResult(cross_entropy, lse, None, None)
            posterior = (joint - total).exp().masked_fill_(total == -torch.inf, 0)
            own = torch.zeros_like(lse) if grad_ce is None else torch.where(target.kept, grad_ce * target.hit, 0)
            factor = own[:, None] * posterior
            flat = factor.flatten()
            used = target.kept[:, None].expand_as(factor).flatten()
            size = torch.where(used, 2 * flat.abs(), 0)
            given = self._row_gradient(scores, span, found, used, flat, flat, None, None, size)
            return TileResult(cross_entropy, lse, None, None, **given, grad_prior=_to_prior(-factor, log_prior))
        return self._dense_mixture(scores, span, found, log_prior, lse, upstream)

    def _dense_mixture(
        self,
        scores: Tensor,
        span: slice,
        found: dict[str, Any],
        log_prior: Tensor,
        lse: Tensor,
        upstream: Upstream | None,
    ) -> TileResult:
        import triton

        from uncork.loss.gpu import rows

        call, target = self.call, None if self.call.target is None else self.call.target.rows(span)
        tokens, components = log_prior.shape
        details, gradient = call.details and upstream is None, upstream is not None
        grad_ce = None if upstream is None else upstream.cross_entropy
        grad_entropy = None if upstream is None else upstream.entropy
        given = self._given(span)
        kept = None if target is None else target.kept
        zeros = torch.zeros_like(lse)
        common = {
            **self._common(scores, many=True),
            **given,
            "hit": torch.where(target.kept, target.hit, 0) if isinstance(target, IndexTarget) else None,
            "top_in": found["top_out"],
            "log_sum_in": found["log_sum_out"],
            "log_prior": log_prior,
            "loss_factor": zeros if grad_ce is None or kept is None else torch.where(kept, grad_ce, 0).to(call.dtype),
            "entropy_factor": None if grad_entropy is None else grad_entropy.to(call.dtype).contiguous(),
        }
        out = {
            "loss_out": None if target is None else self._empty(tokens),
            "entropy_out": self._empty(tokens) if details else None,
            "argmax_out": self._empty(tokens, dtype=torch.int64) if details else None,
            "component_out": self._empty(tokens, components) if gradient else None,
            "size_out": self._empty(tokens) if gradient else None,
        }
        _launch(rows.mixed_sums, tokens, **common, **_REGISTERS, **out, PADDED=triton.next_power_of_2(components))
        loss = out["loss_out"]
        cross_entropy = None if loss is None or kept is None else torch.where(kept, loss, 0)
        if not gradient:
            return TileResult(cross_entropy, lse, out["entropy_out"], out["argmax_out"])
        shares, size = out["component_out"], out["size_out"]
        assert shares is not None
        assert size is not None
        used = torch.ones_like(lse, dtype=torch.bool)
        if kept is not None:
            used = kept if grad_entropy is None else kept | (grad_entropy != 0)
        shares = torch.where(used[:, None], shares, 0)
        gathered, scale = self._gathering(scores, tokens, torch.where(used, 2 * size, 0))
        more = {"used": used.contiguous(), "component_in": shares, "HAS_TARGET": target is not None}
        _launch(rows.mixed_gradient, tokens, **common, **_REGISTERS, **gathered, **more)
        grad_prior, sums = _to_prior(shares, log_prior), self._per_table(gathered)
        return TileResult(cross_entropy, lse, None, None, gathered["out"], scale, grad_prior, sums)


def _quiet() -> AbstractContextManager[object]:
    """Without numpy's warnings of infinities and NaN, by which the interpreter computes."""
    if not interpreted():
        return nullcontext()
    import numpy

    return numpy.errstate(all="ignore")


def _launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Runs a kernel, unless there is nothing to do."""
    if not programs:
        return
    # Triton launches on the current device, whatever device its arguments are on.
    with _quiet(), torch.cuda.device_of(arguments["scores"]):
        kernel[(programs,)](**arguments)


def _wide(vocab_size: int) -> int:
    """V rounded up to a multiple of 16."""
    return (vocab_size + 15) // 16 * 16


def _padded(per_word: Tensor) -> Tensor:
    """Numbers of all words, up to a multiple of 16."""
    return F.pad(per_word, (0, _wide(per_word.numel()) - per_word.numel()))


def _to_prior(grad_component: Tensor, log_prior: Tensor) -> Tensor:
    """The gradient to the prior's logits from that to its log-probabilities."""
    return grad_component - log_prior.exp() * grad_component.sum(-1, keepdim=True)

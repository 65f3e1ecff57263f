"""Walks over chunks of tokens: the memory of a few (chunk, V) blocks, whatever N is. The one autograd.Function.

Two ways through. `weighted_sum` (scalar reductions) knows every row's factor beforehand, so one pass makes the loss and
its gradient: three matrix products. `statistics` (per-token results) learns its upstream gradient later and makes the
scores again in the backward: four.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uncork.logit_functions.base import table_dtype
from uncork.logit_functions.operations import first_order
from uncork.loss.call import Call, Statistics
from uncork.loss.target import ProbabilityTarget
from uncork.loss.tile_torch import LinearTile, MixtureTile, Upstream, function_parameters, make_runner

# Elements of one (rows, V) block of scores when the caller does not say: 4 MiB in float32, which stays in the cache
# from one pass over it to the next. About six such blocks live at once. Few rows make the matrix products slow.
BLOCK_ELEMENTS = 2**20
MIN_ROWS = 64


def default_chunk_size(vocab_size: int) -> int:
    """Rows of scores in a chunk: BLOCK_ELEMENTS / V, at least MIN_ROWS; a function of the shape alone."""
    return max(MIN_ROWS, BLOCK_ELEMENTS // vocab_size)


class _Walk:
    """Makes the tiles of one call, chunk by chunk, and adds up their gradients."""

    def __init__(self, call: Call, parameters: Sequence[Tensor], needs: Sequence[bool]) -> None:
        self.call = call
        # Half precision is raised for the products: their sums, and the gradients', are then float32.
        self.weight = call.weight.detach().to(call.dtype)
        self.bias = None if call.bias is None else call.bias.detach().to(call.dtype)
        self.parameters, self.needs = list(parameters), list(needs)
        self.runner = make_runner(call.function, self.parameters, self.needs[4:])
        rows = call.chunk_size or default_chunk_size(call.weight.shape[0])
        self.chunk = max(1, rows // call.components)

    def spans(self) -> list[tuple[int, int]]:
        tokens = self.call.tokens
        return [(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def tile(self, start: int, stop: int) -> tuple[LinearTile | MixtureTile, Tensor]:
        call = self.call
        x = call.input[start:stop].detach().to(call.dtype)
        scores = F.linear(x, self.weight, self.bias)
        target = None if call.target is None else call.target.rows(slice(start, stop))
        if call.prior_logits is None:
            return LinearTile(self.runner, scores, target, call.details), x
        prior = call.prior_logits[start:stop].detach().to(call.dtype)
        return MixtureTile(self.runner, scores, prior, target, call.details), x.flatten(0, 1)

    def empty_gradients(self) -> list[Tensor | None]:
        """For input, weight, bias, prior and the function's parameters: zeros, or None where nobody asks."""
        call = self.call
        inputs = [call.input, call.weight, call.bias, call.prior_logits]
        made: list[Tensor | None] = [
            torch.zeros(t.shape, dtype=call.dtype, device=t.device) if t is not None and need else None
            for t, need in zip(inputs, self.needs[:4], strict=True)
        ]
        made += [
            torch.zeros(p.shape, dtype=table_dtype(p.device), device=p.device) if need else None
            for p, need in zip(self.parameters, self.needs[4:], strict=True)
        ]
        return made

    def add_gradients(
        self, into: list[Tensor | None], tile: LinearTile | MixtureTile, x: Tensor, span: tuple[int, int], up: Upstream
    ) -> None:
        by_input, by_weight, by_bias, by_prior, *by_parameter = into
        by_scores, prior, sums = tile.gradient(up)
        if by_input is not None:
            part = by_input[slice(*span)]
            torch.mm(by_scores, self.weight, out=part.view(by_scores.shape[0], -1))
        if by_weight is not None:
            by_weight.addmm_(by_scores.T, x)
        if by_bias is not None:
            by_bias += by_scores.sum(0)
        if by_prior is not None and prior is not None:
            by_prior[slice(*span)] = prior
        for total, part_sum in zip(by_parameter, sums, strict=True):
            if total is not None and part_sum is not None:
                total += part_sum


def _forward_statistics(call: Call, walk: _Walk) -> Statistics:
    tiles = []
    for span in walk.spans():
        tile, _ = walk.tile(*span)
        tiles.append((tile.cross_entropy, tile.lse, tile.entropy, tile.argmax))
    if not tiles:
        empty = torch.zeros(0, dtype=call.dtype, device=call.input.device)
        details = (empty, empty.long()) if call.details else (None, None)
        return Statistics(None if call.target is None else empty, empty, *details)
    columns = [None if c[0] is None else torch.cat(c) for c in zip(*tiles, strict=True)]
    return Statistics(*columns)  # type: ignore[arg-type]


def _cast(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    return [None if g is None or dtype is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]


class _WeightedSum(torch.autograd.Function):
    """sum_n a_n CE_n + b_n lse_n^2, its gradient made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, grad_mode: bool, ce_factor: Tensor, lse_factor: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        # needs_input_grad asks the tensors alone: under no_grad it is True all the same.
        needs = [grad_mode and need for need in ctx.needs_input_grad[4:]]
        walk = _Walk(call, inputs[4:], needs)  # type: ignore[arg-type]
        grads = walk.empty_gradients()
        assert call.target is not None
        ce_parts, lse_parts = [], []
        for start, stop in walk.spans():
            tile, x = walk.tile(start, stop)
            a = ce_factor[start:stop].detach()
            b = None if lse_factor is None else lse_factor[start:stop].detach()
            by_lse = None if b is None else torch.where(b == 0, 0, 2 * b * tile.lse)
            if any(needs):
                walk.add_gradients(grads, tile, x, (start, stop), Upstream(a, by_lse, None))
            ce_parts.append(tile.cross_entropy)
            lse_parts.append(tile.lse)
        zero = ce_factor.new_zeros(0)
        ce = torch.cat([zero, *ce_parts])  # type: ignore[list-item]
        square = torch.where(call.target.kept, torch.cat([zero, *lse_parts]), 0).square()
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        ctx.save_for_backward(ce, square, *grads)
        total = (ce_factor.detach() * ce).sum()
        return total if lse_factor is None else total + (lse_factor.detach() * square).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ce, square, *grads = ctx.saved_tensors
        by_factor = grad * ce if ctx.needs_input_grad[2] else None
        by_square = grad * square if ctx.needs_input_grad[3] else None
        scaled = [None if g is None else grad * g for g in grads]
        return (None, None, by_factor, by_square, *_cast(scaled, ctx.dtypes))


class _TokenStatistics(torch.autograd.Function):
    """Per-token cross-entropy, logsumexp, entropy and argmax; the scores are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # What is saved for the backward is not held here too, or hooks that offload it would free nothing.
        empty = call.input.new_empty(0)
        ctx.call = replace(call, input=empty, weight=empty, bias=None, prior_logits=None)
        # The backward reads the probabilities again: saved, a change in between is refused, as for the inputs.
        given = [call.target.probabilities] if isinstance(call.target, ProbabilityTarget) else []
        ctx.save_for_backward(*inputs, *given)
        ctx.set_materialize_grads(False)
        result = _forward_statistics(call, _Walk(call, inputs[4:], ctx.needs_input_grad[1:]))  # type: ignore[arg-type]
        if result.argmax is not None:
            ctx.mark_non_differentiable(result.argmax)
        return tuple(result)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[: len(ctx.needs_input_grad) - 1]
        x, weight, bias, prior_logits, *_ = inputs
        call = replace(ctx.call, input=x, weight=weight, bias=bias, prior_logits=prior_logits)
        with torch.autocast(call.input.device.type, enabled=False):
            walk = _Walk(call, inputs[4:], ctx.needs_input_grad[1:])
            into = walk.empty_gradients()
            by_ce, by_lse, by_entropy, _ = grads
            if call.target is not None and by_ce is not None:
                by_ce = torch.where(call.target.kept, by_ce, 0)
            for start, stop in walk.spans():
                tile, rows = walk.tile(start, stop)
                up = Upstream(*(None if g is None else g[start:stop] for g in (by_ce, by_lse, by_entropy)))
                walk.add_gradients(into, tile, rows, (start, stop), up)
        return (None, *_cast(into, [None if t is None else t.dtype for t in inputs]))


def _inputs(call: Call) -> list[Tensor | None]:
    parameters = function_parameters(call.function, call.dtype, call.input.device)
    return [call.input, call.weight, call.bias, call.prior_logits, *parameters]


def statistics(call: Call) -> Statistics:
    """Per-token statistics, differentiable but for argmax."""
    with torch.autocast(call.input.device.type, enabled=False):
        return Statistics(*_TokenStatistics.apply(call, *_inputs(call)))


def _without_ignored(call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> tuple[Call, Tensor, Tensor | None]:
    """The same sum over the kept tokens alone. Only a CPU is asked which they are: a GPU would have to stop."""
    target = call.target
    if target is None or target.kept.device.type != "cpu" or torch.compiler.is_compiling() or bool(target.kept.all()):
        return call, ce_factor, lse_factor
    index = target.kept.nonzero().squeeze(1)
    prior = None if call.prior_logits is None else call.prior_logits.index_select(0, index)
    kept = replace(call, input=call.input.index_select(0, index), prior_logits=prior, target=target.rows(index))
    return kept, ce_factor[index], None if lse_factor is None else lse_factor[index]


def weighted_sum(call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
    """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2; on a CPU ignored tokens cost nothing."""
    call, ce_factor, lse_factor = _without_ignored(call, ce_factor, lse_factor)
    with torch.autocast(call.input.device.type, enabled=False):
        total: Tensor = _WeightedSum.apply(call, torch.is_grad_enabled(), ce_factor, lse_factor, *_inputs(call))
    return total

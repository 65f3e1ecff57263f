"""The loss computed chunk by chunk over the tokens, in the memory of one (rows, V) block of scores, whatever N is.

Two autograd.Functions do so. For `weighted_sum` (scalar reductions) every token's factor is known beforehand, so one
pass computes the loss and its gradient: three matrix products. `statistics` (per-token results) gets its upstream
gradient only in the backward, which computes the scores again: four. Between the products a tile computes (`tile.py`).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from uncork.logit_functions.base import table_dtype
from uncork.logit_functions.operations import first_order, readable
from uncork.loss.call import Call, Implementation, Statistics, without_autocast
from uncork.loss.function import function_parameters, module_state
from uncork.loss.memory import MemoryEstimate
from uncork.loss.plan import Plan, Weight, add_product, multiply, walk_memory
from uncork.loss.target import ProbabilityTarget
from uncork.loss.tile import TileResult, Tiles, Upstream


@dataclass
class Gradients:
    """Gradients of one call, in the loss's dtype or better, W's perhaps in its own; None where none is asked for."""

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    prior: Tensor | None
    parameters: list[Tensor | None]

    def in_order(self) -> list[Tensor | None]:
        return [self.input, self.weight, self.bias, self.prior, *self.parameters]


T = TypeVar("T", bound=Tiles)


class Walk(Generic[T]):
    """Computes one call with its tiles, chunk by chunk, and adds up the gradients."""

    def __init__(
        self, call: Call, make_tiles: type[T], parameters: Sequence[Tensor] = (), needs: Sequence[bool] = ()
    ) -> None:
        self.call, plan = call, Plan.of(call, make_tiles)
        self.dtype, self.chunk, self.sums_weight = plan.operands, plan.tokens, plan.sums_weight
        self.weight = Weight(call.weight.detach(), self.dtype)
        self.parameters, self.needs = list(parameters), list(needs) or [False] * (4 + len(parameters))
        # Scores in half precision are rounded once, with their bias, as torch's own linear layer rounds them.
        self.bias = call.bias.detach().to(self.dtype) if plan.rounds and call.bias is not None else None
        self.tiles = make_tiles(replace(call, bias=None) if plan.rounds else call, self.parameters, self.needs[4:])
        self.block = self.tiles.block(plan.rows)
        self.raised: Tensor | None = None  # memory for a few rows of scores in the loss's dtype
        if plan.raised:
            shape = plan.raised, self.block.shape[1]
            self.raised = torch.empty(shape, dtype=call.dtype, device=call.input.device)

    def spans(self) -> list[slice]:
        tokens = self.call.tokens
        return [slice(start, min(start + self.chunk, tokens)) for start in range(0, tokens, self.chunk)]

    def rows(self, span: slice) -> Tensor:
        """(rows, D) in the products' dtype."""
        x = self.call.input[span].detach().to(self.dtype)
        return x if self.call.prior_logits is None else x.flatten(0, 1)

    def scores(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x W^T (rows, V), with the bias where the tiles get none: in `out`, or the one block that all chunks share."""
        out = self.block[: x.shape[0]] if out is None else out
        for words, weight in self.weight.blocks():
            if self.bias is None:
                multiply(x, weight.T, out[:, words])
            else:
                torch.addmm(self.bias[words], x, weight.T, out=out[:, words])
        return out

    def statistics(self, span: slice) -> TileResult:
        scores = self.scores(self.rows(span))
        if self.raised is None:
            return self.tiles.statistics(scores, span)
        return _joined([self.tiles.statistics(raised, part) for raised, _, part in self._raised(scores, span)])

    def _raised(self, scores: Tensor, span: slice) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """A few rows of the scores at a time: their copy in the loss's dtype, the rows, and their tokens."""
        assert self.raised is not None
        k, step = self.call.components, self.raised.shape[0]
        for start in range(0, scores.shape[0], step):
            rows = scores[start : start + step]
            first = span.start + start // k
            yield self.raised[: rows.shape[0]].copy_(rows), rows, slice(first, first + rows.shape[0] // k)

    def _gradient(self, scores: Tensor, span: slice, upstream: Upstream, bias: Tensor | None) -> TileResult:
        """A chunk's gradient, in place of its scores; that to the bias is added to `bias`."""
        if self.raised is None:
            result = self.tiles.gradient(scores, span, upstream)
            _add_rows(result, bias)
            return result
        parts = []
        for raised, rows, part in self._raised(scores, span):
            here = slice(part.start - span.start, part.stop - span.start)
            result = self.tiles.gradient(raised, part, Upstream(*(None if u is None else u[here] for u in upstream)))
            _add_rows(result, bias)
            assert result.grad_scores is not None
            rows.copy_(result.grad_scores)
            sums = [None if s is None else s.clone() for s in result.sums]  # the next part writes over them
            parts.append(result._replace(grad_scores=None, sums=sums))
        return _joined(parts)._replace(grad_scores=scores)

    def gradients(self, upstream: Upstream) -> Gradients:
        """Memory for the gradients: zeros; not filled for input and prior, of which each chunk writes its own rows.

        The only chunk writes W's gradient too, in the products' dtype.

        upstream: the factors or upstream gradients of all tokens.
        """
        call, self.enlarged = self.call, self.tiles.enlarge(upstream)

        def of(
            tensor: Tensor | None, need: bool, make: Callable[..., Tensor], dtype: torch.dtype = call.dtype
        ) -> Tensor | None:
            return make(tensor.shape, dtype=dtype, device=tensor.device) if tensor is not None and need else None

        need_input, need_weight, need_bias, need_prior, *need_parameters = self.needs
        return Gradients(
            of(call.input, need_input, torch.empty),
            of(call.weight, need_weight, *((torch.zeros,) if self.sums_weight else (torch.empty, self.dtype))),
            of(call.bias, need_bias, torch.zeros),
            of(call.prior_logits, need_prior, torch.empty),
            [
                torch.zeros(p.shape, dtype=table_dtype(p.device), device=p.device) if need else None
                for p, need in zip(self.parameters, need_parameters, strict=True)
            ],
        )

    def finish(self, into: Gradients) -> Gradients:
        """The gradients when all chunks are added."""
        if self.enlarged is not None:
            for total in (into.input, into.weight, into.bias):
                if total is not None:
                    total.div_(self.enlarged)
        return into

    def add_gradients(self, into: Gradients, span: slice, upstream: Upstream) -> TileResult:
        """Adds a chunk's gradients; returns its statistics, and nothing of the scores' size."""
        x = self.rows(span)
        result = self._gradient(self.scores(x), span, upstream, into.bias)
        grad_scores, scale = result.grad_scores, result.scale
        assert grad_scores is not None
        if into.input is not None:
            part = into.input[span].view(grad_scores.shape[0], -1)
            for words, weight in self.weight.blocks():
                (add_product if words.start else multiply)(grad_scores[:, words], weight, part)
            if scale is not None:
                part.mul_(scale[:, None])
        if into.weight is not None:
            rows = x if scale is None else (x * scale[:, None]).to(self.dtype)
            (add_product if self.sums_weight else multiply)(grad_scores.T, rows, into.weight)
        if into.prior is not None and result.grad_prior is not None:
            into.prior[span] = result.grad_prior
        for total, own in zip(into.parameters, result.sums, strict=True):
            if total is not None and own is not None:
                total += own.view(total.shape)
        return result._replace(grad_scores=None)


def _add_rows(result: TileResult, into: Tensor | None) -> None:
    """Adds the sum over the rows of the gradient to the scores, which is that to the bias."""
    if into is None:
        return
    assert result.grad_scores is not None
    grad, scale = result.grad_scores, result.scale
    if scale is None:  # a GPU raises half precision as it adds up, without a copy of the block
        into += grad.sum(0, dtype=into.dtype)
    elif grad.dtype == into.dtype:
        into += torch.mv(grad.T, scale)
    else:
        add_product(grad.T, scale[:, None].to(grad.dtype), into[:, None])


def _joined(parts: Sequence[TileResult]) -> TileResult:
    """The result of the tokens of several parts, without the gradients to their scores."""
    if len(parts) == 1:
        return parts[0]

    def together(name: str) -> Tensor | None:
        found = [x for part in parts if (x := getattr(part, name)) is not None]
        return torch.cat(found) if found else None

    names = ("cross_entropy", "lse", "entropy", "argmax", "scale", "grad_prior")
    fields = {name: together(name) for name in names}
    sums = [sum(own) if own[0] is not None else None for own in zip(*(part.sums for part in parts), strict=True)]
    return TileResult(**fields, sums=sums)  # type: ignore[arg-type]


def _join(parts: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.cat([like[:0], *parts])  # type: ignore[list-item]


def forward_statistics(walk: Walk[Tiles]) -> Statistics:
    """The statistics of a call, per token."""
    call = walk.call
    results = [walk.statistics(span) for span in walk.spans()]
    empty = torch.zeros(0, dtype=call.dtype, device=call.input.device)
    lse = _join([r.lse for r in results], empty)
    ce = None if call.target is None else _join([r.cross_entropy for r in results], empty)
    if not call.details:
        return Statistics(ce, lse, None, None)
    entropy, argmax = (
        _join([getattr(r, name) for r in results], like)
        for name, like in (("entropy", empty), ("argmax", empty.long()))
    )
    return Statistics(ce, lse, entropy, argmax)


def backward_statistics(
    walk: Walk[Tiles], grad_ce: Tensor | None, grad_lse: Tensor | None, grad_entropy: Tensor | None
) -> Gradients:
    """The gradients of the statistics, from upstream gradients per token."""
    target = walk.call.target
    if target is not None and grad_ce is not None:
        grad_ce = torch.where(target.kept, grad_ce, 0)
    into = walk.gradients(Upstream(grad_ce, grad_lse, None, grad_entropy))
    for span in walk.spans():
        own = [None if g is None else g[span] for g in (grad_ce, grad_lse, grad_entropy)]
        walk.add_gradients(into, span, Upstream(own[0], own[1], None, own[2]))
    return walk.finish(into)


def _cast(grads: Sequence[Tensor | None], like: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True)]


def _given(call: Call) -> list[Tensor]:
    """The target's tensors that the backward reads: saved, so that autograd raises if one is changed in between."""
    target = call.target
    held = [target.probabilities] if isinstance(target, ProbabilityTarget) else []
    return held if target is None or target.word_weight is None else [*held, target.word_weight]


class _WeightedSum(torch.autograd.Function):
    """sum_n a_n CE_n + b_n lse_n^2, its gradient computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        tiles: type[Tiles],
        grad_mode: bool,
        ce_factor: Tensor,
        lse_factor: Tensor | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        # needs_input_grad is True under no_grad too.
        ctx.needs = [grad_mode and need for need in ctx.needs_input_grad[5:]]
        ctx.tiles = tiles
        total, ce, square, ctx.made = weighted(call, tiles, ctx.needs, ce_factor, lse_factor, inputs[4:])
        empty = call.input.new_empty(0)
        ctx.call = replace(call, input=empty, weight=empty, bias=None, prior_logits=None)
        ctx.save_for_backward(ce, square, ce_factor, lse_factor, *inputs, *_given(call))
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        ce, square, ce_factor, lse_factor, *inputs = saved[: 4 + len(ctx.needs)]
        made, ctx.made = ctx.made, None
        if made is None:  # an earlier backward has returned the gradients: they are computed again
            x, weight, bias, prior_logits, *parameters = inputs
            call = replace(ctx.call, input=x, weight=weight, bias=bias, prior_logits=prior_logits)
            with without_autocast(x.device):
                *_, made = weighted(call, ctx.tiles, ctx.needs, ce_factor, lse_factor, parameters)
        grads = made.in_order()
        if not _is_one(grad):
            grads = [None if g is None else g.mul_(grad) for g in grads]
        grad_ce_factor = grad * ce if ctx.needs_input_grad[3] else None
        grad_lse_factor = grad * square if ctx.needs_input_grad[4] else None
        return (None, None, None, grad_ce_factor, grad_lse_factor, *_cast(grads, inputs))


def _is_one(grad: Tensor) -> bool:
    """Whether the upstream gradient is known to be 1, so that no multiplication is needed; read on a CPU only."""
    return readable(grad) and bool(grad == 1)


def weighted(
    call: Call,
    tiles: type[Tiles],
    needs: Sequence[bool],
    ce_factor: Tensor,
    lse_factor: Tensor | None,
    parameters: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """sum_n a_n CE_n + b_n lse_n^2, CE_n, lse_n^2, and the gradients of the sum."""
    walk = Walk(call, tiles, parameters, needs)
    factors = Upstream(ce_factor.detach(), square=None if lse_factor is None else lse_factor.detach())
    into = walk.gradients(factors)
    empty = ce_factor.new_zeros(0, dtype=call.dtype)
    ce, lse = [empty], [empty]  # nothing else is kept of a chunk
    for span in walk.spans():
        if any(needs):
            result = walk.add_gradients(into, span, Upstream(*(None if f is None else f[span] for f in factors)))
        else:
            result = walk.statistics(span)
        assert result.cross_entropy is not None
        ce.append(result.cross_entropy)
        lse.append(result.lse)
    assert call.target is not None
    each, square = torch.cat(ce), torch.where(call.target.kept, torch.cat(lse), 0).square()
    total = (ce_factor.detach() * each).sum()
    if lse_factor is not None:
        total = total + (lse_factor.detach() * square).sum()
    return total, each, square, walk.finish(into)


class _TokenStatistics(torch.autograd.Function):
    """Per-token cross-entropy, logsumexp, entropy and argmax; the backward computes the scores again."""

    @staticmethod
    def forward(ctx: Any, call: Call, tiles: type[Tiles], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # The call does not hold the saved tensors as well, or hooks that offload saved tensors would free no memory.
        empty = call.input.new_empty(0)
        ctx.tiles, ctx.call = tiles, replace(call, input=empty, weight=empty, bias=None, prior_logits=None)
        ctx.save_for_backward(*inputs, *_given(call))
        ctx.set_materialize_grads(False)
        result = forward_statistics(Walk(call, tiles, inputs[4:]))  # type: ignore[arg-type]
        if result.argmax is not None:
            ctx.mark_non_differentiable(result.argmax)
        return tuple(result)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        inputs = saved[: len(needs)]
        x, weight, bias, prior_logits, *parameters = inputs
        call = replace(ctx.call, input=x, weight=weight, bias=bias, prior_logits=prior_logits)
        with without_autocast(call.input.device):
            into = backward_statistics(Walk(call, ctx.tiles, parameters, needs), *grads[:3])
        return (None, None, *_cast(into.in_order(), inputs))


def _applied(function: type[torch.autograd.Function], call: Call) -> Callable[..., Any]:
    """The function's `apply`, hidden from torch.compile if a tile differentiates a user's module by autograd.

    Compiled in parts around a graph break, it gave wrong gradients of the module's parameters. As long as torch._dynamo
    is not imported, nothing is compiled.
    """
    if call.module_state is None or "torch._dynamo" not in sys.modules:
        return function.apply
    return torch.compiler.disable(function.apply)


def kept_tokens(call: Call) -> Tensor | None:
    """The indices of the tokens that are not ignored; None for all. Read on a CPU only: a GPU would synchronise."""
    target = call.target
    if target is None or not readable(target.kept) or bool(target.kept.all()):
        return None
    return target.kept.nonzero().squeeze(1)


def select(call: Call, index: Tensor) -> Call:
    """The call of some of its tokens."""
    assert call.target is not None
    prior = None if call.prior_logits is None else call.prior_logits.index_select(0, index)
    rows = call.input.index_select(0, index)
    return replace(call, input=rows, prior_logits=prior, target=call.target.rows(index))


class Chunked(Implementation):
    """The implementation that computes chunk by chunk with one kind of tile; the tile says which calls it supports."""

    def __init__(self, tiles: type[Tiles]) -> None:
        self.tiles = tiles

    def refuses(self, call: Call) -> str:
        """The tiles' answer."""
        return self.tiles.refuses(call)

    def variant(self) -> str:
        """The tiles' answer."""
        return self.tiles.variant()

    def memory(self, call: Call, gradients: bool) -> MemoryEstimate:
        """By the walk's own plan and the tiles' answer."""
        return walk_memory(call, self.tiles, gradients)

    def _inputs(self, call: Call) -> list[Tensor | None]:
        parameters = function_parameters(call.function, call.dtype, call.input.device)
        return [call.input, call.weight, call.bias, call.prior_logits, *parameters]

    def statistics(self, call: Call) -> Statistics:
        """Per-token statistics, differentiable but for argmax.

        Without details, a CPU skips ignored tokens; their logsumexp is then 0.
        """
        if not call.details and (index := kept_tokens(call)) is not None:
            ce, lse, *_ = self.statistics(select(call, index))
            assert ce is not None
            nothing = ce.new_zeros(call.tokens)
            return Statistics(nothing.index_copy(0, index, ce), nothing.index_copy(0, index, lse), None, None)
        call = replace(call, module_state=module_state(call.function))
        with without_autocast(call.input.device):
            return Statistics(*_applied(_TokenStatistics, call)(call, self.tiles, *self._inputs(call)))

    def weighted_sum(self, call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
        """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2; a CPU skips ignored tokens."""
        if (index := kept_tokens(call)) is not None:
            call, ce_factor = select(call, index), ce_factor[index]
            lse_factor = None if lse_factor is None else lse_factor[index]
        call = replace(call, module_state=module_state(call.function))
        factors = (torch.is_grad_enabled(), ce_factor, lse_factor)
        with without_autocast(call.input.device):
            total: Tensor = _applied(_WeightedSum, call)(call, self.tiles, *factors, *self._inputs(call))
        return total

"""What is decided of a walk over the chunks before it starts, its matrix products, and the memory that it will need."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uncork.logit_functions.base import table_dtype
from uncork.loss.call import Call
from uncork.loss.chunk_size import MIB, weight_copy_bytes, weight_copy_rows
from uncork.loss.function import function_parameters
from uncork.loss.memory import Live, MemoryEstimate, device_of
from uncork.loss.tile import WIDENS, Tiles


@dataclass(frozen=True)
class Plan:
    """Of one call with one kind of tile.

    Attributes:
        operands: dtype of what the products multiply. scores: dtype of the scores.
        rounds: whether scores are kept in another dtype than the loss's.
        tokens: of a chunk. rows: of the block of scores that all chunks share.
        raised: rows of scores that are copied to the loss's dtype at once; 0 if none are.
        sums_weight: whether W's gradient is a sum over chunks, in the loss's dtype; else the one chunk's product, in
            the operands'. On a GPU it always is: the products there add up in the loss's dtype at no cost.
    """

    operands: torch.dtype
    scores: torch.dtype
    rounds: bool
    tokens: int
    rows: int
    raised: int
    sums_weight: bool

    @classmethod
    def of(cls, call: Call, tiles: type[Tiles]) -> "Plan":
        """Raises a ValueError if the caller's memory_budget is too small for one token."""
        scores, rule, k = tiles.product_dtype(call), tiles.chunk_rule(call), call.components
        rounds = scores != call.dtype
        operands = tiles.operand_dtype(call)
        tokens = max(1, rule.rows(call, scores, operands) // k)
        rows = min(tokens, call.tokens) * k
        raised = 0
        if rounds and not tiles.reads_products:
            raised = min(max(rule.raised_rows(call) // k * k, k), rows)
        on_gpu = tiles.reads_products or call.input.device.type != "cpu"
        sums_weight = on_gpu or not 0 < call.tokens <= tokens
        return cls(operands, scores, rounds, tokens, rows, raised, sums_weight)


class Weight:
    """W in the dtype that the products multiply: as it is, or in copies of as many rows as a CPU's cache holds."""

    def __init__(self, weight: Tensor, operands: torch.dtype) -> None:
        rows = weight_copy_rows(weight, operands)
        whole = weight.dtype == operands or rows >= weight.shape[0]
        self.given = weight.to(operands) if whole else weight
        self.copy = None if whole else weight.new_empty(rows, weight.shape[1], dtype=operands)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which words, and their rows; each is to be used before the next is asked for."""
        if self.copy is None:
            yield slice(0, self.given.shape[0]), self.given
            return
        for start in range(0, self.given.shape[0], self.copy.shape[0]):
            rows = self.given[start : start + self.copy.shape[0]]
            yield slice(start, start + rows.shape[0]), self.copy[: rows.shape[0]].copy_(rows)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; of half-precision factors and a wider `out`, a GPU adds up in out's dtype; others cast the product."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and WIDENS:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, likewise; a product that is cast is made some rows at a time."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and WIDENS:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        step = _rows_cast(out.shape[1], a.dtype, out.dtype)
        for start in range(0, out.shape[0], step):
            out[start : start + step] += torch.mm(a[start : start + step], b)


def _rows_cast(columns: int, operands: torch.dtype, dtype: torch.dtype) -> int:
    """Rows of a product that `add_product` casts at once, in 2 MiB: the product, and torch's copy in the sum's dtype.

    (The copy is made by the addition. Where the processor has no bfloat16 products, torch's own is added up in a matrix
    of that size too, before.)
    """
    return max(1, 2 * MIB // (max(1, columns) * (operands.itemsize + dtype.itemsize)))


def _product_bytes(call: Call, plan: Plan) -> int:
    """Bytes that `add_product` makes for W's gradient."""
    if plan.operands == call.dtype or (call.input.is_cuda and WIDENS) or not plan.sums_weight:
        return 0
    vocab_size, features = call.weight.shape
    rows = min(vocab_size, _rows_cast(features, plan.operands, call.dtype))
    return rows * features * (plan.operands.itemsize + call.dtype.itemsize)


def walk_memory(call: Call, tiles: type[Tiles], gradients: bool) -> MemoryEstimate:
    """What `Walk` needs for a scalar reduction with an index target, and its backward.

    Args:
        gradients: whether all inputs and the function's parameters get theirs, or there is a forward alone.
    """
    plan, wide = Plan.of(call, tiles), call.dtype.itemsize
    vocab_size, features = call.weight.shape
    with torch.set_grad_enabled(gradients), Live(call.input.device) as made:
        parameters = function_parameters(call.function, call.dtype, device_of(call.function))
    tile = tiles.memory(call, parameters, plan.raised or plan.rows, gradients)
    # A part's result is held until that of the next one is there.
    several = plan.rows > plan.raised > 0 or (not plan.raised and call.tokens > plan.tokens)
    working = tile.peak + (tile.kept if several else 0)
    if gradients:  # the products, and the input times each row's factor
        products = _product_bytes(call, plan) + plan.rows * features * wide
        working = max(working, products + (0 if plan.raised else tile.kept))
    scores = plan.rows * tiles.width(call) * plan.scores.itemsize + plan.raised * vocab_size * wide + working
    copies = weight_copy_bytes(call, plan.operands)
    other = tile.whole + made.live + call.tokens * token_bytes(call)
    if call.input.dtype != plan.operands:
        other += plan.rows * features * plan.operands.itemsize
    if call.bias is not None and plan.rounds and call.bias.dtype != plan.operands:
        other += vocab_size * plan.operands.itemsize
    if not gradients:
        return MemoryEstimate.of(scores, copies, 0, other, plan.rows)
    inputs = call.tensors()
    sums = sum(p.numel() * table_dtype(p.device).itemsize for p in parameters if p.requires_grad)
    weight_dtype = call.dtype if plan.sums_weight else plan.operands
    kept = sum(t.numel() for t in inputs) * wide + sums - call.weight.numel() * (wide - weight_dtype.itemsize)
    forward = MemoryEstimate.of(scores, copies, kept, other, plan.rows)
    # The backward casts what was kept.
    made_in = [weight_dtype if t is call.weight else call.dtype for t in inputs]
    cast = sum(t.numel() * t.dtype.itemsize for t, dtype in zip(inputs, made_in, strict=True) if t.dtype != dtype)
    cast += sum(p.nbytes for p in parameters if p.requires_grad)
    backward = MemoryEstimate.of(0, 0, kept + cast, made.live + call.tokens * token_bytes(call), plan.rows)
    return max(forward, backward, key=lambda found: found.total)


def token_bytes(call: Call) -> int:
    """Bytes that a token has whatever its vector and its scores: its target, factors, cross-entropy and logsumexp."""
    index, kept, numbers = 8, 1, 7  # the numbers: weight, hit, share, denominator, factor; and the two results
    return index + kept + numbers * call.dtype.itemsize

"""A logit function's chain of primitives as the kernels take it, and what becomes of the sums that they make."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uncork.logit_functions.operations import Affine, Operation, PiecewiseLinear, Sigmoid, Softplus, Tanh

# Kinds of primitives. UNIFORM has P equal pieces, SORTED pieces among sorted knots.
AFFINE, TANH, SIGMOID, SOFTPLUS, UNIFORM, SORTED = range(6)
KIND_OF: dict[type[Operation], int] = {
    Affine: AFFINE, Tanh: TANH, Sigmoid: SIGMOID, Softplus: SOFTPLUS, PiecewiseLinear: UNIFORM,
}  # fmt: skip
NUM_SCALARS = (2, 2, 3, 2, 2, 2)  # sums over elements that a row keeps of each kind
HEADER = 6  # numbers before the lines of a piecewise linear primitive
COPIES_BYTES, MOST_COPIES = 2**20, 64  # of the histogram that rows add to, so that few of them wait for one address
WORDS_A_PIECE, LEAST_BITS = 32, 12  # at least, where each row keeps counters of its own: up to 524,287 words


@dataclass
class Chain:
    """A function's primitives as the kernels take them."""

    kinds: tuple[int, ...] = ()
    pieces: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    scalars: tuple[int, ...] = ()  # where each one's sums begin among a row's
    bins: tuple[int, ...] = ()  # where each one's histogram of 2 P sums begins
    wanted: tuple[int, ...] = ()  # whether its tables' gradients are asked for
    num_scalars: int = 0
    num_bins: int = 0
    tables: Tensor | None = None
    gaps: list[Tensor] = field(default_factory=list)  # of each, a power of two that a distance to a knot stays below
    steepest: list[Tensor] = field(default_factory=list)  # of each, a bound of its slope

    def scales(self, bound: Tensor) -> Tensor | None:
        """(2 n,) float64: of each primitive, what gradients are multiplied by to be whole numbers, and its gap.

        Args:
            bound: of the sum of the absolute gradients to the logits. Sums stay below 2^61 then, which int64 holds.
        """
        if not self.num_bins:
            return None
        found = []
        for gap, steepest in zip(reversed(self.gaps), reversed(self.steepest), strict=True):
            exponent = torch.floor(60 - torch.log2(bound)).nan_to_num(0, 0, 0).clamp(-100, 100)
            found += [gap, torch.exp2(exponent)]
            bound = bound * steepest.clamp(min=1)
        return torch.stack(found[::-1])

    @property
    def copies(self) -> tuple[int, int]:
        """(C, B): copies of the histograms, and their bins."""
        return copies_of(self.num_bins), self.num_bins

    def counters(self, scores: Tensor, dtype: torch.dtype) -> Tensor | None:
        """(R, P) zeros if every row keeps counters of the last primitive's pieces (`functions.backward_counted`).

        dtype: of the inputs.
        """
        if not self.kinds or self.kinds[-1] != UNIFORM or not self.wanted[-1]:
            return None
        pieces = counted_pieces(self.pieces[-1], dtype, scores.shape[1])
        return scores.new_zeros(scores.shape[0], pieces, dtype=torch.int64) if pieces else None

    def counted(self, counters: Tensor, vocab_size: int, top: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
        """(P, 2) float64: what the counters of the rows give to values and slopes of the last primitive.

        Args:
            counters: (R, P) int64. top, log_sum, factor: (R,), the row's softmax and what it is multiplied by.
        """
        assert self.tables is not None
        pieces, table = self.pieces[-1], self.tables[self.offsets[-1] :].double()
        width = table[2] + table[3]
        values, slopes = table[HEADER : HEADER + 2 * pieces].view(pieces, 2).unbind(1)
        upper = width * torch.arange(1 - pieces / 2, 1 + pieces / 2, dtype=torch.float64, device=table.device)
        weight = (upper + values + slopes * width) - top.double()[:, None]  # logits of the upper ends
        weight.sub_(log_sum[:, None]).exp_().mul_(factor[:, None]).masked_fill_(counters == 0, 0)
        low, high = counters.view(torch.int32).unflatten(-1, (pieces, 2)).unbind(-1)
        sums = torch.stack([(weight * low).sum(0), (weight * high).sum(0) * width], -1)
        return sums / 2 ** counter_bits(vocab_size)

    def per_table(
        self, row_sums: Tensor | None, bins: Tensor | None, scales: Tensor | None, counted: Tensor | None
    ) -> list[Tensor | None]:
        """The gradient to each table, in float64; None for knots, which have none, and where none is wanted.

        Args:
            row_sums: (R, num_scalars). bins: (C, num_bins) whole numbers. scales, counted: as these methods gave them.
        """
        found: list[Tensor | None] = []
        bins = None if bins is None else bins.sum(0)
        sums = None if row_sums is None else row_sums.sum(0)
        for i, kind in enumerate(self.kinds):
            start, pieces = self.scalars[i], self.pieces[i]
            if not self.wanted[i] or sums is None:
                found += [None] * (3 if pieces else 1)
            elif not pieces:
                found.append(sums[start : start + NUM_SCALARS[kind]])
            else:
                assert bins is not None
                assert scales is not None
                scale, gap = scales[2 * i].double(), scales[2 * i + 1].double()
                whole = bins[self.bins[i] : self.bins[i] + 2 * pieces].view(pieces, 2).double()
                below, above = sums[start : start + 2].unbind()
                nan = (below + above) * 0  # if some gradient was NaN or infinite
                values, slopes = whole[:, 0] / scale + nan, whole[:, 1] / scale * gap + nan
                slopes[0] += below
                slopes[-1] += above
                if counted is not None and i == len(self.kinds) - 1:
                    values, slopes = values + counted[:, 0], slopes + counted[:, 1]
                found += [None, values, slopes]
        return found


def copies_of(num_bins: int) -> int:
    """How many copies of histograms rows add to."""
    return max(1, min(MOST_COPIES, COPIES_BYTES // (8 * max(1, num_bins))))


def counter_bits(vocab_size: int) -> int:
    """Binary digits of 1 in a counter: V ones stay below 2^31."""
    return 31 - vocab_size.bit_length()


def counted_pieces(pieces: int, dtype: torch.dtype, vocab_size: int) -> int:
    """P if every row keeps counters of P equal pieces that are learned at the end of a chain, else 0.

    A counter holds a probability to `counter_bits` binary digits at its piece's upper end, to four fewer at 1/16 of
    that: 9 to 13 at 151,936 words, for gradients of half-precision inputs, which have 8 or 11.
    """
    enough = 2 < pieces <= vocab_size // WORDS_A_PIECE and counter_bits(vocab_size) >= LEAST_BITS
    return pieces if enough and dtype in (torch.bfloat16, torch.float16) else 0


def gathering_bytes(
    operations: Sequence[Operation], tables: Sequence[Tensor], dtype: torch.dtype, vocab_size: int
) -> tuple[int, int]:
    """(bytes of all rows, bytes of each row) in which the gradients of tables are gathered; dtype: of the inputs."""
    bins = sums = counters = start = 0
    for operation in operations:
        own = tables[start : start + operation.num_tables]
        start, counters = start + len(own), 0  # the last one's
        if not any(t.requires_grad for t in own):
            continue
        if isinstance(operation, PiecewiseLinear):
            pieces = own[0].numel()
            bins, sums = bins + 2 * pieces, sums + 2
            counters = 0 if operation.bound is None else counted_pieces(pieces, dtype, vocab_size)
        else:
            sums += own[0].numel()
    whole, weight, product, is_zero = 8, 8, 8, 1
    return copies_of(bins) * bins * 8, sums * 8 + counters * (whole + weight + product + is_zero)


def pack(operations: Sequence[Operation], tables: Sequence[Tensor], needs: Sequence[bool], dtype: torch.dtype) -> Chain:
    """The chain of operations over their tables; needs: for which tables a gradient is asked.

    Affine (a, b), Tanh (lower, upper), Sigmoid (a, b, c) and Softplus (c, w) are packed as they are. P equal pieces:
    1 / spacing, (P mod 2) / 2, the spacing in two parts, 2 numbers unused; sorted ones: 6 unused; then value and slope
    of every piece by turns, then sorted knots.
    """
    chain = Chain()
    parts: list[Tensor] = []
    start = offset = 0
    for operation in operations:
        own = [t.detach() for t in tables[start : start + operation.num_tables]]
        wanted = any(needs[start : start + operation.num_tables])
        start += operation.num_tables
        kind, pieces = KIND_OF[type(operation)], 0
        numbers = own[0].reshape(-1).double()
        gap = numbers.new_ones(())
        if isinstance(operation, PiecewiseLinear):
            pieces = own[0].numel()
            kind = UNIFORM if operation.bound is not None else SORTED
            numbers, gap = _pieces(operation.bound, *(t.reshape(-1).double() for t in own))
        chain.steepest.append(_steepest(kind, numbers, own))
        chain.gaps.append(gap)
        chain.kinds += (kind,)
        chain.pieces += (pieces,)
        chain.offsets += (offset,)
        chain.scalars += (chain.num_scalars,)
        chain.bins += (chain.num_bins,)
        chain.wanted += (int(wanted),)
        chain.num_scalars += NUM_SCALARS[kind] if wanted else 0
        chain.num_bins += 2 * pieces if wanted else 0
        parts.append(torch.cat([numbers, numbers.new_zeros(numbers.numel() % 2)]).to(dtype))
        offset += parts[-1].numel()
    chain.tables = torch.cat(parts) if parts else None
    return chain


def _pieces(bound: float | None, knots: Tensor, values: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """(packed numbers, a power of two of at least twice every piece's width)."""
    pieces = knots.numel()
    lines = torch.stack([values, slopes], -1).reshape(-1)
    if bound is None:
        widths = (knots[1:] - knots[:-1]).amax() if pieces > 1 else knots.new_ones(())
        gap = torch.exp2(torch.ceil(torch.log2(widths.clamp(1e-30, 1e30))) + 1)
        return torch.cat([knots.new_zeros(HEADER), lines, knots]), gap
    spacing = 2 * bound / pieces
    coarse = _leading_bits(spacing, max(1, 24 - pieces.bit_length()))
    numbers = (pieces / (2 * bound), (pieces % 2) / 2, coarse, spacing - coarse, 0.0, 0.0)
    filled = [torch.full((1,), number, dtype=torch.float64, device=knots.device) for number in numbers]
    gap = torch.full((), 2.0 ** (math.ceil(math.log2(spacing)) + 1), dtype=torch.float64, device=knots.device)
    return torch.cat([*filled, lines]), gap


def _leading_bits(x: float, bits: int) -> float:
    """x > 0 cut down to its leading bits, so that small multiples of it are exact in float32."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(math.floor(mantissa * 2**bits) / 2**bits, exponent)


def _steepest(kind: int, numbers: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """An upper bound of a primitive's slope."""
    if kind == AFFINE:
        return numbers[0].abs()
    if kind == TANH:
        return numbers.new_ones(())
    if kind == SIGMOID:
        return (numbers[0] / numbers[2]).abs() / 4
    if kind == SOFTPLUS:
        return 1 + numbers[1].abs()
    return (1 + tables[2].double()).abs().amax()

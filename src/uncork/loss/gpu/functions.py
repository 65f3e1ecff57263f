"""The primitives of `logit_functions/operations.py` on a block of scores in a Triton kernel.

A chain of primitives is given by tuples of constants, an entry for each: KINDS, PIECES (0 without pieces), OFFSETS
(where its numbers begin in `tables`). Tuples of tuples compile from triton 3.9 on alone. `chain.pack` says what the
numbers are. A chain is short, so what the backward needs of a stage is computed again from the first score; the
compiler sees the repetition and leaves it out.
"""

import triton
import triton.language as tl

from uncork.loss.gpu import chain

AFFINE = tl.constexpr(chain.AFFINE)
TANH = tl.constexpr(chain.TANH)
SIGMOID = tl.constexpr(chain.SIGMOID)
UNIFORM = tl.constexpr(chain.UNIFORM)
HEADER = tl.constexpr(chain.HEADER)
LIMIT_BITS = tl.constexpr(24)  # fewer than 2^24 pieces


@triton.jit
def log1p_(e):
    """log(1 + e) for e in [0, 1]."""
    if e.dtype == tl.float64:
        one_more = 1.0 + e
        rest = one_more - 1.0
        y = tl.where(rest == 0.0, e, tl.log(one_more) * (e / tl.where(rest == 0.0, 1.0, rest)))
    else:  # as 2 atanh(e / (2 + e))
        s = e / (2.0 + e)
        q = s * s
        p = 0.24300937354564667 * q + 0.21427656710147858
        p = p * q + 0.2861688435077667
        p = p * q + 0.3999887704849243
        p = p * q + 0.6666667461395264
        y = 2.0 * s + (s * q) * p
    return y


@triton.jit
def tanh_(u):
    """tanh(u), relatively exact for small u too in float32."""
    a = tl.abs(u)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    y = tl.where(u < 0, -large, large)
    if u.dtype != tl.float64:
        q = u * u
        p = -0.00590586056932807 * q + 0.020805377513170242
        p = p * q - 0.05378668010234833
        p = p * q + 0.13331958651542664
        p = p * q - 0.33333298563957214
        y = tl.where(a < 0.6, u + (u * q) * p, y)
    return y


@triton.jit
def sech2_(u):
    """1 - tanh(u)^2, without the loss of digits where it is small."""
    e = tl.exp(-2.0 * tl.abs(u))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def sigmoid_(u):
    e = tl.exp(-tl.abs(u))
    other = 1.0 / (1.0 + e)
    return tl.where(u < 0, e * other, other)


@triton.jit
def log_sigmoid_(u):
    return tl.where(u < 0, u, 0.0) - log1p_(tl.exp(-tl.abs(u)))


@triton.jit
def tanh_less_line(u):
    """tanh(u) - u sech(u)^2, which is of the order of u^3."""
    y = tanh_(u) - u * sech2_(u)
    if u.dtype != tl.float64:
        q = u * u
        p = 0.007983971387147903 * q - 0.034263502806425095
        p = p * q + 0.08517754822969437
        p = p * q - 0.17423418164253235
        p = p * q + 0.3237363398075104
        p = p * q - 0.533330500125885
        p = p * q + 0.6666666269302368
        y = tl.where(q < 0.64, u * q * p, y)
    return y


@triton.jit
def bounded_(u):
    """u clamped to where its sigmoid and tanh are saturated, so that inf times a slope of 0 is 0 and not nan."""
    u = tl.where(u > 400.0, 400.0, u)
    return tl.where(u < -400.0, -400.0, u)


@triton.jit
def locate(x, table, KIND: tl.constexpr, PIECES: tl.constexpr):
    """(piece, distance to its knot), the distance finite. NaN goes to the first piece; its value stays NaN."""
    if KIND == UNIFORM:
        per_unit = tl.load(table)
        half = tl.load(table + 1)
        q = x * per_unit + half
        q = tl.where(q > -PIECES, q, -PIECES)
        q = tl.where(q < PIECES, q, PIECES)
        i = tl.floor(q).to(tl.int32)
        lowest: tl.constexpr = -(PIECES // 2)
        i = tl.maximum(tl.minimum(i, PIECES - 1 + lowest), lowest)
        steps = i.to(x.dtype) - half
        distance = x - (steps * tl.load(table + 2) + steps * tl.load(table + 3))
        piece = i - lowest
    else:  # the last knot at or below x, or the first knot
        knots = table + HEADER + 2 * PIECES
        piece = tl.zeros_like(x).to(tl.int32)
        for j in tl.static_range(LIMIT_BITS):
            if (PIECES >> j) > 0:  # steps of P / 2, P / 4 ..., rounded up, reach every knot
                tried = tl.minimum(piece + ((PIECES + (2 << j) - 1) >> (j + 1)), PIECES - 1)
                piece = tl.where(tl.load(knots + tried) <= x, tried, piece)
        distance = x - tl.load(knots + piece)
    largest: tl.constexpr = 3.0e38
    distance = tl.where(distance > largest, largest, distance)
    return piece, tl.where(distance < -largest, -largest, distance)


@triton.jit
def value_and_slope(x, tables, KIND: tl.constexpr, PIECES: tl.constexpr, OFFSET: tl.constexpr):
    """f(x) and f'(x) of one primitive."""
    table = tables + OFFSET
    if KIND >= UNIFORM:
        piece, distance = locate(x, table, KIND, PIECES)
        line = table + HEADER + 2 * piece
        steeper = tl.load(line + 1)
        y = x + (tl.load(line) + steeper * distance)
        slope = 1.0 + steeper
    else:
        a = tl.load(table)
        b = tl.load(table + 1)
        if KIND == AFFINE:
            y = a * x + b
            slope = tl.zeros_like(x) + a
        elif KIND == TANH:
            cap = tl.where(x > 0, b, a)
            u = x / cap
            y = cap * tanh_(u)
            slope = sech2_(u)
        elif KIND == SIGMOID:
            c = tl.load(table + 2)
            u = (x + b) / c
            s = sigmoid_(u)
            y = a * s
            slope = (a / c) * (s * sigmoid_(-u))
        else:
            y = x + b * log_sigmoid_(x - a)
            slope = 1.0 + b * sigmoid_(a - x)
    return y, slope


@triton.jit
def apply(x, tables, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, COUNT: tl.constexpr):
    """x after the first COUNT primitives."""
    for i in tl.static_range(COUNT):
        x, _ = value_and_slope(x, tables, KINDS[i], PIECES[i], OFFSETS[i])
    return x


@triton.jit
def add_to(sums, at: tl.constexpr, x):
    """Adds the sum of a block to one of a row's sums, a small vector."""
    return sums + tl.where(tl.arange(0, sums.shape[0]) == at, tl.sum(x, 0).to(sums.dtype), 0.0)


@triton.jit
def add_terms(sums, x, g, tables, KIND: tl.constexpr, OFFSET: tl.constexpr, AT: tl.constexpr):
    """Adds what a block gives to the sums of a primitive without pieces."""
    table = tables + OFFSET
    a = tl.load(table)
    b = tl.load(table + 1)
    if KIND == AFFINE:
        first, second = x, tl.zeros_like(x) + 1.0
    elif KIND == TANH:
        above = x > 0
        term = tanh_less_line(bounded_(x / tl.where(above, b, a)))
        first, second = tl.where(above, 0.0, term), tl.where(above, term, 0.0)
    elif KIND == SIGMOID:
        c = tl.load(table + 2)
        u = bounded_((x + b) / c)
        first = sigmoid_(u)
        second = a / c * (first * sigmoid_(-u))
        sums = add_to(sums, AT + 2, tl.where(g == 0, 0.0, -g * second * u))
    else:
        first, second = -b * sigmoid_(a - x), log_sigmoid_(x - a)
    sums = add_to(sums, AT, tl.where(g == 0, 0.0, g * first))
    return add_to(sums, AT + 1, tl.where(g == 0, 0.0, g * second))


@triton.jit
def add_pieces(
    sums,
    x,
    g,
    tables,
    bins,
    scale,
    gap,
    KIND: tl.constexpr,
    PIECES: tl.constexpr,
    OFFSET: tl.constexpr,
    AT: tl.constexpr,
):
    """Adds what a block gives to the sums of a piecewise linear primitive, value and slope of every piece.

    Whole numbers are added, g times a power of two and rounded, which gives the same bits in any order. The first and
    the last piece are endless: what a distance has beyond `gap` is kept as two sums of the row.
    """
    piece, distance = locate(x, tables + OFFSET, KIND, PIECES)
    near = tl.maximum(tl.minimum(distance, gap), -gap)
    bin = bins + 2 * piece
    counts = g != 0
    tl.atomic_add(bin, whole(g * scale), mask=counts, sem="relaxed")
    tl.atomic_add(bin + 1, whole(g * (near / gap) * scale), mask=counts, sem="relaxed")
    beyond = tl.where(counts, g * (distance - near), 0.0)  # NaN where g is, which whole numbers cannot say
    sums = add_to(sums, AT, tl.where(distance < near, beyond, 0.0))
    return add_to(sums, AT + 1, tl.where(distance < near, 0.0, beyond))


@triton.jit
def backward_counted(
    z, g, hit, sums, tables, bins, scales, counters, BITS: tl.constexpr,
    KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SCALARS: tl.constexpr, BINS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """`backward` through the last primitive, P equal pieces, where g = a p - hit with a number a for the row.

    With u = p / (the p that the piece's upper end has), one addition of round(2^BITS u) + 2^32 round(2^BITS u t) to
    the row's counter of the piece says what its words give to the value, and t = distance / width, to the slope:
    `Chain.counted` multiplies it. The endless pieces, u < 1/16 and `hit` go the way of `add_pieces`.
    """
    LAST: tl.constexpr = SIZE - 1
    P: tl.constexpr = PIECES[LAST]
    table = tables + OFFSETS[LAST]
    x = apply(z, tables, KINDS, PIECES, OFFSETS, LAST)
    piece, distance = locate(x, table, KINDS[LAST], P)
    slope = 1.0 + tl.load(table + HEADER + 2 * piece + 1)
    width = tl.load(table + 2) + tl.load(table + 3)
    t = tl.minimum(tl.maximum(distance / width, 0.0), 1.0)
    u = tl.minimum(tl.exp(slope * (t - 1.0) * width), 1.0)
    counted = (g != 0) & (piece > 0) & (piece < P - 1) & (u >= 0.0625)
    u *= 1 << BITS
    tl.atomic_add(counters + piece, whole(u) + (whole(u * t) << 32), mask=counted, sem="relaxed")
    scale = tl.load(scales + 2 * LAST)
    gap = tl.load(scales + 2 * LAST + 1)
    left = tl.where(counted, -hit, g)
    sums = add_pieces(
        sums, x, left, tables, bins + BINS[LAST], scale, gap, KINDS[LAST], P, OFFSETS[LAST], SCALARS[LAST]
    )
    return g * slope, sums


@triton.jit
def whole(x):
    """The nearest whole number as int64."""
    return tl.floor(x + 0.5).to(tl.int64)


@triton.jit
def backward_one(
    z, g, sums, tables, bins, scales,
    KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SCALARS: tl.constexpr, BINS: tl.constexpr,
    WANTED: tl.constexpr, I: tl.constexpr,
):  # fmt: skip
    """`backward` through primitive I."""
    x = apply(z, tables, KINDS, PIECES, OFFSETS, I)
    if WANTED[I]:
        if KINDS[I] >= UNIFORM:
            scale = tl.load(scales + 2 * I)
            gap = tl.load(scales + 2 * I + 1)
            sums = add_pieces(
                sums, x, g, tables, bins + BINS[I], scale, gap, KINDS[I], PIECES[I], OFFSETS[I], SCALARS[I]
            )
        else:
            sums = add_terms(sums, x, g, tables, KINDS[I], OFFSETS[I], SCALARS[I])
    _, slope = value_and_slope(x, tables, KINDS[I], PIECES[I], OFFSETS[I])
    return g * slope, sums


@triton.jit
def backward(
    z, g, sums, tables, bins, scales,
    KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SCALARS: tl.constexpr, BINS: tl.constexpr,
    WANTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """(gradient to the scores z, the row's sums) from the gradient g to the logits, 0 for words that are impossible.

    scales: two numbers for each primitive, what g is multiplied by before it is rounded, and `gap`.
    """
    for j in tl.static_range(SIZE):
        g, sums = backward_one(
            z, g, sums, tables, bins, scales, KINDS, PIECES, OFFSETS, SCALARS, BINS, WANTED, SIZE - 1 - j
        )
    return g, sums

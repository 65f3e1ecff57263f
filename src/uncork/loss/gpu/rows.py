"""The kernels: a program a row of scores (or a token, for mixtures whose words mix), in passes over the row.

Legend: R rows of V scores, readable up to W, K rows a token; `at` is a row or token. Numbers are of T, float32
or float64.

`row_statistics` gives a row's largest logit `top`, the log of the sum of exp(logit - top), and what the target needs.
`row_gradient` writes (a p - t - e p (H + log p)) f' over the scores, p = softmax(logits). `mixed_sums` and
`mixed_gradient` do the same for log p = log sum_k prior_k p_k, where a sum over the words of the mixture is needed.
"""

import triton
import triton.language as tl

from uncork.loss.gpu.functions import apply, backward, backward_counted

MINUS = tl.constexpr(float("-inf"))


@triton.jit
def load_scores(row, bias, words, inside, W, T: tl.constexpr):
    """(scores with their bias, 0 where impossible; which words are possible).

    Rows are read up to W, a multiple of 16, since a mask at V itself would split the wide loads.
    """
    z = tl.load(row + words, mask=words < W, other=MINUS).to(T)
    if bias is not None:
        z += tl.load(bias + words, mask=words < W, other=0.0)
    possible = inside & (z != MINUS)
    return tl.where(possible, z, 0.0), possible


@triton.jit
def load_target(probabilities, word_weight, words, inside, W, numbers, T: tl.constexpr):
    """What a target gives to all words: whole q_v + uniform, times the word's weight (a weight of 0 is 0)."""
    whole = tl.load(numbers)
    uniform = tl.load(numbers + 1)
    if probabilities is not None:
        t = whole * tl.load(probabilities + words, mask=inside, other=0.0).to(T) + uniform
    else:
        t = tl.zeros_like(words).to(T) + uniform
    if word_weight is not None:
        w = tl.load(word_weight + words, mask=words < W, other=0.0)
        t = tl.where(w == 0, 0.0, t * w)
    return tl.where(inside, t, 0.0)


@triton.jit
def product(x, y):
    """x y, 0 where x is 0, whatever y is."""
    return tl.where(x == 0, 0.0, x * y)


@triton.jit
def better(best, where, x, words, inside, V):
    """The largest number so far and the first word that has it; NaN counts as the largest."""
    nan = (x != x) & inside
    first_nan = tl.min(tl.where(nan, words, V), 0)
    top = tl.max(tl.where(nan | ~inside, MINUS, x), 0)
    first = tl.min(tl.where((x == top) & inside, words, V), 0)
    found = first_nan < V
    first = tl.where(found, first_nan, first)
    replaces = (best == best) & (found | (top > best))
    return tl.where(replaces, tl.where(found, float("nan"), top), best), tl.where(replaces, first, where)


@triton.jit
def logit_of(
    row, word, V, W, bias, tables, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr,
    SIZE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The logit of one word; a class that does not exist is impossible."""
    word = tl.where(word < 0, V, word)
    score, exists = load_scores(row, bias, word, word < V, W, T)
    return tl.where(exists, apply(score, tables, KINDS, PIECES, OFFSETS, SIZE), MINUS)


@triton.jit
def row_statistics(
    scores, stride, V, W, bias, tables, index, probabilities, word_weight,
    numbers,  # (2,): whole, uniform
    top_out, log_sum_out,  # (R,)
    at_target_out,  # (R,): the target's logit less top
    loss_out,  # (R,): - sum_v t_v log p_v over what load_target gives
    mass_out,  # (R, 2): sum_v t_v, sum_v |t_v|
    entropy_out,  # (R,)
    argmax_out,  # (R,)
    K: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = scores + at * stride
    given = probabilities
    if probabilities is not None:
        given = probabilities + at * V
    best = tl.full((), MINUS, T)
    where = tl.zeros((), tl.int32)
    top = tl.full((), MINUS, T)
    total = tl.zeros((), T)
    mass = tl.zeros((), T)
    size = tl.zeros((), T)
    for start in range(0, V, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < V
        z, possible = load_scores(row, bias, words, inside, W, T)
        if argmax_out is not None:
            best, where = better(best, where, tl.where(possible, z, MINUS), words, inside, V)
        logits = tl.where(possible, apply(z, tables, KINDS, PIECES, OFFSETS, SIZE), MINUS)
        higher = tl.maximum(top, tl.max(tl.where(logits != logits, MINUS, logits), 0))
        lift = tl.where(higher == MINUS, 0.0, higher)  # inf - inf is NaN where a logit is inf, as in torch
        total = total * tl.exp(top - lift) + tl.sum(tl.where(possible, tl.exp(logits - lift), 0.0), 0)
        top = higher
        if mass_out is not None:
            t = load_target(given, word_weight, words, inside, W, numbers, T)
            mass += tl.sum(t, 0)
            size += tl.sum(tl.abs(t), 0)
    top = tl.where(top == MINUS, 0.0, top)
    log_sum = tl.log(total)
    tl.store(top_out + at, top)
    tl.store(log_sum_out + at, log_sum)
    if mass_out is not None:
        tl.store(mass_out + 2 * at, mass)
        tl.store(mass_out + 2 * at + 1, size)
    if argmax_out is not None:
        tl.store(argmax_out + at, where.to(tl.int64))
    if index is not None:
        logit = logit_of(row, tl.load(index + at // K), V, W, bias, tables, KINDS, PIECES, OFFSETS, SIZE, T)
        tl.store(at_target_out + at, logit - top)
    if (loss_out is not None) or (entropy_out is not None):
        loss, entropy = row_sums_of_log_p(
            row, V, W, bias, tables, given, word_weight, numbers, top, log_sum, loss_out is not None,
            entropy_out is not None, KINDS, PIECES, OFFSETS, SIZE, T, BLOCK,
        )  # fmt: skip
        if loss_out is not None:
            tl.store(loss_out + at, loss)
        if entropy_out is not None:
            tl.store(entropy_out + at, entropy)


@triton.jit
def row_sums_of_log_p(
    row, V, W, bias, tables, given, word_weight, numbers, top, log_sum, LOSS: tl.constexpr, ENTROPY: tl.constexpr,
    KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(- sum_v t_v log p_v, - sum_v p_v log p_v) of a row, each 0 where it is not asked for."""
    loss = tl.zeros((), T)
    entropy = tl.zeros((), T)
    for start in range(0, V, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < V
        z, possible = load_scores(row, bias, words, inside, W, T)
        logits = tl.where(possible, apply(z, tables, KINDS, PIECES, OFFSETS, SIZE), MINUS)
        log_p = (logits - top) - log_sum
        if LOSS:
            t = load_target(given, word_weight, words, inside, W, numbers, T)
            loss -= tl.sum(product(t, log_p), 0)
        if ENTROPY:
            entropy -= tl.sum(tl.where(inside, product(tl.exp(log_p), log_p), 0.0), 0)
    return loss, entropy


@triton.jit
def logit_gradient(
    z, used, words, inside, top, log_sum, a, word, c, at, given, word_weight, numbers, dense, entropy_factor, entropy,
    tables, W, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(the gradient to a block of logits, 0 for words that are not used; what the target subtracts from it)."""
    log_p = (apply(z, tables, KINDS, PIECES, OFFSETS, SIZE) - top) - log_sum
    p = tl.exp(log_p)
    g = p * a
    if entropy_factor is not None:
        g -= tl.load(entropy_factor + at) * p * (tl.load(entropy + at) + tl.where(log_p == MINUS, 0.0, log_p))
    own = tl.where(words == word, c, 0.0)
    g -= own
    if dense is not None:
        g -= tl.load(dense + at) * load_target(given, word_weight, words, inside, W, numbers, T)
    return tl.where(used, g, 0.0), own


@triton.jit
def row_gradient(
    scores, stride, V, W, bias, tables, index, probabilities, word_weight,
    numbers,  # (2,): whole, uniform
    top_in, log_sum_in,  # (R,)
    used,  # (R,) bool: a row that is not used gets 0, whatever its scores
    factor,  # (R,) a
    hit,  # (R,): t at the target's word
    dense,  # (R,): what all that load_target gives is multiplied by
    entropy_factor,  # (R,) e
    entropy,  # (R,) H
    out, out_stride,
    larger,  # (R,): what a row's numbers are multiplied by before they are written
    bins, scales,
    counters,  # (R, P): of the last primitive's pieces; then there is nothing but an index and `factor`
    row_sums,  # (R, S)
    K: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SCALARS: tl.constexpr,
    BINS: tl.constexpr, WANTED: tl.constexpr, SIZE: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr,
    COPIES: tl.constexpr, BITS: tl.constexpr,
    SHARED: tl.constexpr,  # whether narrower numbers are written into the row's own scores
    ROUND: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row = scores + at * stride
    into = out + at * out_stride
    given = probabilities
    if probabilities is not None:
        given = probabilities + at * V
    top = tl.load(top_in + at)
    log_sum = tl.load(log_sum_in + at)
    live = tl.load(used + at)
    a = tl.load(factor + at)
    word = tl.full((), -1, tl.int64)
    c = tl.zeros((), T)
    if index is not None:
        word = tl.load(index + at // K)
        c = tl.load(hit + at)
    sums = tl.zeros([PADDED], tl.float64)
    bins = own_copy(bins, at, COPIES)
    for start in range(0, V, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < V
        z, possible = load_scores(row, bias, words, inside, W, T)
        if SHARED:  # every thread has read before one writes into what another still has to read
            tl.debug_barrier()
        g, own = logit_gradient(
            z, possible & live, words, inside, top, log_sum, a, word, c, at, given, word_weight, numbers, dense,
            entropy_factor, entropy, tables, W, KINDS, PIECES, OFFSETS, SIZE, T,
        )  # fmt: skip
        if counters is not None:
            g, sums = backward_counted(
                z, g, own, sums, tables, bins, scales, counters + at * PIECES[SIZE - 1], BITS, KINDS, PIECES, OFFSETS,
                SCALARS, BINS, SIZE,
            )  # fmt: skip
        REST: tl.constexpr = SIZE if counters is None else SIZE - 1
        g, sums = backward(z, g, sums, tables, bins, scales, KINDS, PIECES, OFFSETS, SCALARS, BINS, WANTED, REST)
        g = tl.where(possible & live, g, 0.0)
        tl.store(into + words, narrowed(g, larger, at, out, ROUND), mask=words < W)
    if S > 0:
        places = tl.arange(0, PADDED)
        tl.store(row_sums + at * S + places, sums, mask=places < S)


@triton.jit
def own_copy(bins, at, COPIES: tl.constexpr):
    """A row's or token's copy of (C, B) bins: all at one address would wait for each other. COPIES: (C, B)."""
    if bins is not None:
        bins += at % COPIES[0] * COPIES[1]
    return bins


@triton.jit
def narrowed(x, larger, row, out, ROUND: tl.constexpr):
    """x, larger[row] times, in out's dtype. ROUND: by hand, since Triton's interpreter cuts digits off for bfloat16."""
    if larger is not None:
        x *= tl.load(larger + row)
    dtype: tl.constexpr = out.dtype.element_ty
    if ROUND:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        odd = (bits >> 16) & 1
        rounded = ((bits + 0x7FFF + odd) & -65536).to(tl.float32, bitcast=True)
        x = tl.where((x == x) & (tl.abs(x) != float("inf")), rounded, x)
    return x.to(dtype)


@triton.jit
def component(
    scores, stride, k, W, bias, tables, top_in, log_sum_in, at, words, inside,
    K: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """(scores, log-probabilities, possible) of a token's component k at a block of words."""
    r = at * K + k
    z, possible = load_scores(scores + r * stride, bias, words, inside, W, T)
    logits = apply(z, tables, KINDS, PIECES, OFFSETS, SIZE)
    log_p = (logits - tl.load(top_in + r)) - tl.load(log_sum_in + r)
    return z, tl.where(possible, log_p, MINUS), possible


@triton.jit
def mix(
    scores, stride, W, bias, tables, top_in, log_sum_in, log_prior, at, words, inside,
    K: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SIZE: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """log sum_k prior_k p_k at a block of words."""
    top = tl.zeros_like(words).to(T) + MINUS
    total = tl.zeros_like(words).to(T)
    for k in range(K):
        _, log_p, _ = component(
            scores, stride, k, W, bias, tables, top_in, log_sum_in, at, words, inside,
            K, KINDS, PIECES, OFFSETS, SIZE, T,
        )  # fmt: skip
        joint = tl.load(log_prior + at * K + k) + log_p
        higher = tl.where(joint > top, joint, top)
        lift = tl.where(higher == MINUS, 0.0, higher)
        total = total * tl.exp(top - lift) + tl.exp(joint - lift)
        top = higher
    return tl.where(total == 0, MINUS, top + tl.log(total))


@triton.jit
def target_of(at, words, inside, V, W, index, hit, probabilities, word_weight, numbers, T: tl.constexpr):
    """What a mixture's target gives to a block of words."""
    given = probabilities
    if probabilities is not None:
        given = probabilities + at * V
    t = load_target(given, word_weight, words, inside, W, numbers, T)
    if index is not None:
        t += tl.where(words == tl.load(index + at), tl.load(hit + at), 0.0)
    return t


@triton.jit
def to_mixed(mixed, t, at, loss_factor, entropy_factor):
    """dL / d log p at a block of words."""
    grad = -product(t, tl.load(loss_factor + at) + tl.zeros_like(t))
    if entropy_factor is not None:
        p = tl.exp(mixed)
        grad -= tl.load(entropy_factor + at) * (p + product(p, mixed))
    return grad


@triton.jit
def share_of(grad, log_prior, log_p, mixed):
    """dL / d log p of a block of words, times the responsibility of one component."""
    return tl.where(mixed == MINUS, 0.0, product(grad, tl.exp(log_prior + log_p - mixed)))


@triton.jit
def mixed_sums(
    scores, stride, V, W, bias, tables, index, hit, probabilities, word_weight, numbers, top_in, log_sum_in, log_prior,
    loss_factor,
    entropy_factor,  # (N,)
    loss_out,
    entropy_out,
    argmax_out,  # (N,)
    component_out,  # (N, K): the sums over words of each component's share
    size_out,  # (N,): sum_v |dL / d log p_v|
    K: tl.constexpr, PADDED: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr,
    SIZE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    loss = tl.zeros((), T)
    entropy = tl.zeros((), T)
    size = tl.zeros((), T)
    best = tl.full((), MINUS, T)
    where = tl.zeros((), tl.int32)
    shares = tl.zeros([PADDED], T)
    for start in range(0, V, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < V
        mixed = mix(
            scores, stride, W, bias, tables, top_in, log_sum_in, log_prior, at, words, inside,
            K, KINDS, PIECES, OFFSETS, SIZE, T,
        )  # fmt: skip
        if argmax_out is not None:
            best, where = better(best, where, mixed, words, inside, V)
        if entropy_out is not None:
            entropy -= tl.sum(tl.where(inside, product(tl.exp(mixed), mixed), 0.0), 0)
        if loss_out is not None:
            t = target_of(at, words, inside, V, W, index, hit, probabilities, word_weight, numbers, T)
            loss -= tl.sum(product(t, mixed), 0)
        if component_out is not None:
            if loss_out is None:
                t = tl.zeros_like(mixed)
            grad = tl.where(inside, to_mixed(mixed, t, at, loss_factor, entropy_factor), 0.0)
            size += tl.sum(tl.abs(grad), 0)
            for k in range(K):
                _, log_p, _ = component(
                    scores, stride, k, W, bias, tables, top_in, log_sum_in, at, words, inside,
                    K, KINDS, PIECES, OFFSETS, SIZE, T,
                )  # fmt: skip
                part = tl.sum(share_of(grad, tl.load(log_prior + at * K + k), log_p, mixed), 0)
                shares += tl.where(tl.arange(0, PADDED) == k, part, 0.0)
    if loss_out is not None:
        tl.store(loss_out + at, loss)
    if entropy_out is not None:
        tl.store(entropy_out + at, entropy)
    if argmax_out is not None:
        tl.store(argmax_out + at, where.to(tl.int64))
    if component_out is not None:
        places = tl.arange(0, PADDED)
        tl.store(component_out + at * K + places, shares, mask=places < K)
        tl.store(size_out + at, size)


@triton.jit
def mixed_gradient(
    scores, stride, V, W, bias, tables, index, hit, probabilities, word_weight, numbers, top_in, log_sum_in, log_prior,
    loss_factor, entropy_factor,
    used,  # (N,) bool
    component_in,
    out, out_stride, larger, bins, scales,
    row_sums,  # (N, S)
    HAS_TARGET: tl.constexpr,
    K: tl.constexpr, KINDS: tl.constexpr, PIECES: tl.constexpr, OFFSETS: tl.constexpr, SCALARS: tl.constexpr,
    BINS: tl.constexpr, WANTED: tl.constexpr, SIZE: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr,
    COPIES: tl.constexpr, SHARED: tl.constexpr, ROUND: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    live = tl.load(used + at)
    sums = tl.zeros([PADDED], tl.float64)
    bins = own_copy(bins, at, COPIES)
    for start in range(0, V, BLOCK):
        words = start + tl.arange(0, BLOCK)
        inside = words < V
        mixed = mix(
            scores, stride, W, bias, tables, top_in, log_sum_in, log_prior, at, words, inside,
            K, KINDS, PIECES, OFFSETS, SIZE, T,
        )  # fmt: skip
        t = tl.zeros_like(mixed)
        if HAS_TARGET:
            t = target_of(at, words, inside, V, W, index, hit, probabilities, word_weight, numbers, T)
        grad = tl.where(inside, to_mixed(mixed, t, at, loss_factor, entropy_factor), 0.0)
        for k in range(K):
            z, log_p, possible = component(
                scores, stride, k, W, bias, tables, top_in, log_sum_in, at, words, inside,
                K, KINDS, PIECES, OFFSETS, SIZE, T,
            )  # fmt: skip
            r = at * K + k
            if SHARED:
                tl.debug_barrier()
            whole_share = tl.load(component_in + r) + tl.zeros_like(log_p)
            g = share_of(grad, tl.load(log_prior + r), log_p, mixed) - product(tl.exp(log_p), whole_share)
            g = tl.where(possible & live, g, 0.0)
            g, sums = backward(z, g, sums, tables, bins, scales, KINDS, PIECES, OFFSETS, SCALARS, BINS, WANTED, SIZE)
            g = tl.where(possible & live, g, 0.0)
            tl.store(out + r * out_stride + words, narrowed(g, larger, r, out, ROUND), mask=words < W)
    if S > 0:
        places = tl.arange(0, PADDED)
        tl.store(row_sums + at * S + places, sums, mask=places < S)

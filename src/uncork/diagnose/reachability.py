"""Which words an output layer can ever rank first: no word that lies inside the convex hull of the others."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from uncork.diagnose.rank import check_real

__all__ = ["reachable_words", "winning_margin"]

MARGIN = 1e-6  # a word that wins by less counts as a tie: HiGHS keeps constraints to 1e-7
TRIALS = 4096  # contexts that are tried before any linear program is solved
FIRST, MORE = 64, 64  # constraints of the first program, and how many violated ones are added per round

Array = NDArray[np.float64]


def reachable_words(weight: Tensor, bias: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """For each word, whether some context gives it a higher score than every other word.

    Word v is reachable if there is an h with <h, w_v> + b_v > <h, w_u> + b_u for all u != v. Without a bias that holds
    if and only if w_v is not in the convex hull of the others. An increasing function on the scores keeps their order,
    so the answer is the same for every function on top of these word vectors, and for a mixture of softmaxes; see
    theorem 4 of docs/theory.md, and Grivas et al. 2022, arXiv 2203.06462.

    A word that wins at one of 4,096 random contexts or at its own vector is reachable. Any other word is reachable if
    its `winning_margin` is above 1e-6.

    Args:
        weight: (V, D), any real dtype; finite. bias: (V,), finite. seed: of the random contexts; it changes the time,
            not the answer.

    Returns:
        (V,) bool.

    Raises:
        TypeError: weight or bias is no Tensor of real numbers, or the word no whole number.
        ValueError: for other shapes, no words, or numbers that are not finite.
        RuntimeError: HiGHS did not solve a linear program.

    >>> corners = [[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]]
    >>> reachable_words(torch.tensor([*corners, [0.0, 0.0]]))
    tensor([ True,  True,  True, False])
    >>> reachable_words(torch.tensor([*corners, [0.0, 0.0]]), torch.tensor([0.0, 0.0, 0.0, 0.5]))
    tensor([True, True, True, True])
    """
    words = _points(weight, bias)
    reachable = _winners(words, bias is not None, seed)
    for v in np.flatnonzero(~reachable):
        reachable[v] = _margin(words, int(v), bias is not None) > MARGIN
    return torch.from_numpy(reachable)


def winning_margin(weight: Tensor, word: int, bias: Tensor | None = None) -> float:
    """How clearly a word can win: the largest t with <h, g_u> >= t max(abs(g_u)) for all u != v, g_u = w_v - w_u.

    Over max(abs(h)) <= 1; t is in [0, D]. With a bias w_u is (w_u, b_u), and the last coordinate of h, s, is in [0, 1]:
    if there is a t > 0, there is one with s > 0, and the context is the rest of h divided by s. Solved as a linear
    program (HiGHS) with few rival words at first; those whose constraint is violated are added until none is. 0 means a
    tie at best.

    >>> round(winning_margin(torch.tensor([[0.0], [1.0], [2.0]]), 2), 6)
    1.0

    Args and errors as `reachable_words`; word: v in [0, V).
    """
    points = _points(weight, bias)
    if not hasattr(word, "__index__"):
        raise TypeError(f"word: expected a whole number, got {type(word).__name__}")
    if not 0 <= word < len(points):
        raise ValueError(f"word: expected 0 <= word < {len(points)}, got {word}")
    return _margin(points, int(word), bias is not None)


def _points(weight: Tensor, bias: Tensor | None) -> Array:
    """(V, D), or (V, D + 1) with the bias last; the largest coordinate is 1."""
    check_real("weight", weight)
    if bias is not None:
        check_real("bias", bias)
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weight: expected shape (V, D) with V, D >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({len(weight)},), got {tuple(bias.shape)}")
    columns = [weight] if bias is None else [weight, bias.unsqueeze(-1)]
    points = torch.cat([column.detach().cpu().double() for column in columns], dim=-1).numpy()
    if not np.isfinite(points).all():
        raise ValueError("weight, bias: expected finite numbers, got inf or nan among them")
    points = points - points.mean(0)  # no margin changes, but a common offset would cost digits
    return np.asarray(points / max(float(np.abs(points).max()), np.finfo(float).tiny), dtype=np.float64)


def _winners(words: Array, biased: bool, seed: int) -> NDArray[np.bool_]:
    """(V,): the words that win at their own vector or a random context, by more than the linear program's threshold."""
    generator = np.random.default_rng(seed)
    contexts = np.concatenate([words, generator.standard_normal((TRIALS, words.shape[1]))])
    if biased:
        contexts[:, -1] = np.abs(contexts[:, -1])
    contexts /= np.maximum(np.abs(contexts).max(-1, keepdims=True), np.finfo(float).tiny)
    won = np.zeros(len(words), dtype=bool)
    if len(words) == 1:
        return ~won
    for block in np.array_split(contexts, max(1, len(contexts) * len(words) // 2**23)):
        scores = block @ words.T  # (contexts, V)
        best = scores.argmax(-1)
        second = np.partition(scores, -2, axis=-1)[:, -2]
        won[best[scores.max(-1) - second > 2 * MARGIN]] = True  # |g_u|_inf <= 2
    return won


def _margin(words: Array, word: int, biased: bool) -> float:
    gaps = np.delete(words[word] - words, word, axis=0)  # (V - 1, D)
    if len(gaps) == 0:
        return float("inf")
    sizes = np.abs(gaps).max(-1, keepdims=True)
    if sizes.min() == 0:  # another word has the same vector
        return 0.0
    gaps /= sizes
    low = np.full(gaps.shape[1], -1.0)
    if biased:
        low[-1] = 0.0
    # A word inside the convex hull of all others is usually inside that of a few near ones.
    chosen = np.argsort(sizes[:, 0], kind="stable")[:FIRST]
    while True:
        context, margin = _solve(gaps[chosen], low)
        slack = gaps @ context - margin
        broken = np.setdiff1d(np.flatnonzero(slack < -1e-9), chosen)
        if margin <= MARGIN or len(broken) == 0:  # more constraints only lower the margin
            return margin
        chosen = np.union1d(chosen, broken[np.argsort(slack[broken], kind="stable")[:MORE]])


def _solve(gaps: Array, low: Array) -> tuple[Array, float]:
    """The context (D,) in the box and the margin t that is largest with gaps @ context >= t."""
    features = gaps.shape[1]
    result = optimize.linprog(
        np.append(np.zeros(features), -1.0),
        A_ub=np.column_stack([-gaps, np.ones(len(gaps))]),
        b_ub=np.zeros(len(gaps)),
        bounds=[*zip(low, np.ones(features), strict=True), (None, None)],
        method="highs",
    )
    if result.status != 0 or result.x is None:
        raise RuntimeError(f"the linear program of a word's reachability was not solved: {result.message}")
    return result.x[:-1], float(result.x[-1])

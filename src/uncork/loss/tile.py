"""The tile: what the driver asks of a block of scores of some tokens and all words. One contract, a module a hardware.

The driver turns reduction, weights, smoothing and z-loss into factors per token; the matrix products are its own.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from uncork.loss.call import Call


class Upstream(NamedTuple):
    """(C,) each: the upstream gradients of a token's cross-entropy, logsumexp, its square, and entropy."""

    cross_entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    square: Tensor | None = None
    entropy: Tensor | None = None


class TileResult(NamedTuple):
    """Of C tokens with K rows of scores each. cross_entropy, lse, entropy, argmax: (C,).

    The gradient to row r of the scores is scale[r] (1 where scale is None) times row r of by_scores (C K, V); by_prior
    is (C, K); sums holds the gradient to each of the function's tables, or None.
    """

    cross_entropy: Tensor | None
    lse: Tensor
    entropy: Tensor | None
    argmax: Tensor | None
    by_scores: Tensor | None = None
    scale: Tensor | None = None
    by_prior: Tensor | None = None
    sums: Sequence[Tensor | None] = ()


class Tiles(Protocol):
    """The tiles of one call. Scores are (C K, V), before the bias, and may be used up by any of the three."""

    blocks: ClassVar[int]  # how many (rows, V) blocks live at once

    def __init__(self, call: Call, parameters: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """parameters: what of the function is differentiated; needs: for which of them a gradient is asked."""

    def block(self, rows: int) -> Tensor:
        """Memory for (rows, V) scores, not filled."""

    def statistics(self, scores: Tensor, span: slice) -> TileResult:
        """The tokens' statistics: entropy and argmax where the call asks for details."""

    def gradient(self, scores: Tensor, span: slice, upstream: Upstream) -> TileResult:
        """Cross-entropy, lse, and all gradients but the products'."""

    def log_prob(self, scores: Tensor, span: slice) -> Tensor:
        """Log-probabilities of all words, (C, V)."""

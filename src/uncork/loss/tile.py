"""The tile: what the driver asks of a block of scores of some tokens and all words. One contract, a module a hardware.

The driver turns reduction, weights, smoothing and z-loss into factors per token; the matrix products are its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from uncork.logit_functions.operations import recorded
from uncork.loss.call import Call
from uncork.loss.chunk_size import ChunkRule
from uncork.loss.stand_in import PLAIN

# Whether half-precision matrices can be multiplied, and added, into float32: NVIDIA's, since torch's addmm takes a
# float32 `self` beside them (2.8 and 2.9 have out_dtype and refuse that).
WIDENS = torch.version.hip is None and torch.__version__ >= "2.11"


def hides_memory(call: Call) -> str:
    """Why tiles that read and write the tensors' memory themselves cannot serve the call; empty if they can."""
    if recorded():
        return "it reads and writes memory, which no tracer, compiler or function transform sees"
    odd = [type(t).__name__ for t in call.tensors() if type(t) not in PLAIN]
    return f"it needs plain tensors, not {odd[0]}" if odd else ""


class Upstream(NamedTuple):
    """(C,) each: the upstream gradients of a token's cross-entropy, logsumexp, its square, and entropy."""

    cross_entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    square: Tensor | None = None
    entropy: Tensor | None = None


class TileResult(NamedTuple):
    """Of C tokens with K rows of scores each. cross_entropy, lse, entropy, argmax: (C,).

    The gradient to row r of the scores is scale[r] (1 where scale is None) times row r of grad_scores (C K, V), over
    what `Tiles.enlarge` gave. grad_scores has the dtype of the scores that were given or of the products' operands;
    grad_prior is (C, K); sums holds the gradient to each of the function's tables, or None.
    """

    cross_entropy: Tensor | None
    lse: Tensor
    entropy: Tensor | None
    argmax: Tensor | None
    grad_scores: Tensor | None = None
    scale: Tensor | None = None
    grad_prior: Tensor | None = None
    sums: Sequence[Tensor | None] = ()


class TileMemory(NamedTuple):
    """Bytes that tiles need beside the block of scores.

    whole: for as long as the call: results, tables in a kernel's form. peak: more than that, while one tile computes.
    kept: of these, what stays until the products are made: a gradient that does not lie in the scores' memory.
    """

    whole: int
    peak: int
    kept: int = 0


class Tiles(ABC):
    """The tiles of one call; before there are any, the class says whether and how it would serve the call.

    Scores are (C K, V), before the bias, and may be used up by any of the three. They come in the loss's dtype, unless
    the class reads that of the products.
    """

    reads_products: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def refuses(cls, call: Call) -> str:
        """Why this call cannot be served; empty if it can."""

    @classmethod
    @abstractmethod
    def chunk_rule(cls, call: Call) -> ChunkRule:
        """How many rows of scores it takes at once."""

    @classmethod
    def product_dtype(cls, call: Call) -> torch.dtype:
        """Of the scores and of the three products; what they add up to is kept in the loss's dtype."""
        return call.products_dtype

    @classmethod
    def operand_dtype(cls, call: Call) -> torch.dtype:
        """Of what the three products multiply: input, weight and the gradient to the scores."""
        return cls.product_dtype(call)

    @classmethod
    @abstractmethod
    def memory(cls, call: Call, parameters: Sequence[Tensor], rows: int, gradients: bool) -> TileMemory:
        """What tiles of so many rows need, of a call with index targets, whose tensors may be `Described`.

        Args:
            parameters: of the function, as for a tile; those that require one get a gradient.
            gradients: whether there are gradients at all, or statistics alone.
        """

    @classmethod
    def width(cls, call: Call) -> int:
        """Numbers from one row of the block of scores to the next."""
        return call.weight.shape[0]

    @classmethod
    def variant(cls) -> str:
        """Which of its builds runs here; empty if there is but one."""
        return ""

    @abstractmethod
    def __init__(self, call: Call, parameters: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """parameters: what of the function is differentiated; needs: for which of them a gradient is asked."""
        self.call = call

    def block(self, rows: int) -> Tensor:
        """Memory for (rows, V) scores, not filled."""
        call = self.call
        return torch.empty(rows, call.weight.shape[0], dtype=self.product_dtype(call), device=call.input.device)

    def enlarge(self, upstream: Upstream) -> Tensor | None:
        """Called once before `gradient`, with the upstream gradients of all tokens: what will be too large by then.

        Half precision has no room for small gradients, so tiles may make every one larger: this factor (), if it is not
        1. The driver divides the gradients to input, weight and bias by it in the end.
        """
        return None

    @abstractmethod
    def statistics(self, scores: Tensor, span: slice) -> TileResult:
        """The tokens' statistics: entropy and argmax where the call asks for details."""

    @abstractmethod
    def gradient(self, scores: Tensor, span: slice, upstream: Upstream) -> TileResult:
        """Cross-entropy, lse, and all gradients but the products'."""


class LogProbTiles(Tiles):
    """Tiles that serve log-probabilities and rankings too; without such tiles plain torch makes them."""

    @abstractmethod
    def log_prob(self, scores: Tensor, span: slice) -> Tensor:
        """Log-probabilities of all words, (C, V), in place of the scores."""

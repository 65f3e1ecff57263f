"""A table of free vectors, one for each context of one or two words: the output layer alone on real text.

Shapes in comments: B batch, T time, D features, V vocabulary.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from uncork.lab.errors import LabError
from uncork.lab.models.language_model import Backbone, BackboneConfig, BackboneOutput, require_tokens
from uncork.lab.validated import Size, require

_START = 0.1  # standard deviation of the vectors at their start, so that the scores begin near the bias
_MULTIPLIERS = (2_654_435_761, 2_246_822_519)  # odd, and far from multiples of one another


class LookupConfig(BackboneConfig):
    """Settings of a lookup table.

    >>> LookupConfig(order=2, rows=1000, out_features=8).feature_size
    8
    """

    kind: Literal["lookup"] = "lookup"
    order: Literal[1, 2] = 1
    """Words that make up a context: the last one, or the last two."""
    rows: Size | None = None
    """Vectors in the table, which contexts share by a hash. None: one for each word (order 1 only)."""
    out_features: Size = 8
    """Features of a vector, which the head receives as they are."""

    @model_validator(mode="after")
    def _require_rows(self) -> Self:
        if self.order == 2 and self.rows is None:
            raise LabError("rows must be an integer of at least 1 where order is 2, got None")
        return self

    @property
    def feature_size(self) -> int:
        return self.out_features

    def build(self, vocab_size: int) -> "Lookup":
        return Lookup(self, vocab_size)


class Lookup(Backbone):
    """features(t) = table[row(w_t)], or table[row(w_{t-1}, w_t)] with order 2: every context's vector is free.

    The state of order 2 is the last word (B,); before the first word of a stream stands the word 0. There is no
    network whose shape could be what limits the model: what is left is the output layer's rank, which is what the
    theory of Ganea et al. (2019), arXiv 1902.08077, is about.
    """

    def __init__(self, config: LookupConfig, vocab_size: int) -> None:
        super().__init__()
        require("vocab_size", Size, vocab_size)
        self.config, self.vocab_size = config, vocab_size
        self.out_features = config.feature_size
        self.embedding = nn.Embedding(config.rows or vocab_size, config.out_features)
        nn.init.normal_(self.embedding.weight, std=_START)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        if self.config.order == 1:
            return ()
        return (torch.zeros(batch_size, dtype=torch.int64, device=self.embedding.weight.device),)

    def rows(self, context: Tensor) -> Tensor:
        """The rows (...) of the table that contexts (..., order) int64 have."""
        last = context[..., -1]
        if self.config.rows is None:
            return last
        # A multiplicative hash, of which the high bits are taken: the low ones see the words' low bits alone.
        mixed = last * _MULTIPLIERS[0]
        if self.config.order == 2:
            mixed = mixed + context[..., 0] * _MULTIPLIERS[1]
        return (mixed.remainder(2**32) * self.config.rows) >> 32

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] = ()) -> BackboneOutput:
        require_tokens(tokens)
        initial, shapes = self.initial_state(tokens.shape[0]), [tuple(part.shape) for part in state]
        if state and shapes != [tuple(part.shape) for part in initial]:
            raise ValueError(f"state must have the shapes {[tuple(part.shape) for part in initial]}, got {shapes}")
        context = tokens.unsqueeze(-1)
        if self.config.order == 2:
            (last,) = state or initial
            before = torch.cat([last.unsqueeze(1), tokens[:, :-1]], dim=1)
            context = torch.stack([before, tokens], dim=-1)
            state = (tokens[:, -1],)
        features = self.embedding(self.rows(context))
        return BackboneOutput(features, state, features.new_zeros(()))

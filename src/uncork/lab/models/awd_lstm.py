"""AWD-LSTM: an LSTM language model with weight drop, locked dropouts and activation penalties.

Merity, Keskar, Socher (2017), *Regularizing and Optimizing LSTM Language Models*, arXiv 1708.02182.
Shapes in comments: B batch, T time, D features, H hidden units, V vocabulary.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from uncork.lab.layers import WeightDropLSTM, embedded, locked_dropout
from uncork.lab.models.language_model import Backbone, BackboneConfig, BackboneOutput, require_tokens
from uncork.lab.validated import NonNegative, Share, Size, expects, require


class AWDLSTMConfig(BackboneConfig):
    """Settings of an AWD-LSTM; with every dropout and penalty 0 it is a plain LSTM.

    >>> AWDLSTMConfig(hidden_sizes=(64, 32), out_features=8).feature_size
    8
    """

    kind: Literal["awd-lstm"] = "awd-lstm"
    embedding_size: Size = 400
    """Size of the word embeddings."""
    hidden_sizes: Annotated[
        tuple[Size, ...], Field(min_length=1, strict=False), expects("a list of at least one size, each at least 1")
    ] = (1150, 1150, 400)
    """Hidden units of each LSTM layer, first to last."""
    weight_drop: Share = 0.0
    """Probability of dropping an element of the hidden-to-hidden matrices (DropConnect, one mask per call)."""
    embedding_dropout: Share = 0.0
    """Probability of dropping a whole word from the embedding."""
    input_dropout: Share = 0.0
    """Locked dropout (one mask for all time steps) of the embedded words."""
    hidden_dropout: Share = 0.0
    """Locked dropout between LSTM layers."""
    output_dropout: Share = 0.0
    """Locked dropout of the features given to the head."""
    activation_penalty: NonNegative = 0.0
    """AR: this times the mean square of the dropped features is added to the training loss."""
    temporal_penalty: NonNegative = 0.0
    """TAR: this times the mean square of the features' change from step to step is added to the training loss."""

    @property
    def feature_size(self) -> int:
        return self.hidden_sizes[-1] if self.out_features is None else self.out_features

    def build(self, vocab_size: int) -> "AWDLSTM":
        return AWDLSTM(self, vocab_size)


class AWDLSTM(Backbone):
    """Embedding, LSTM layers with the dropouts of AWD-LSTM, and a linear map to `out_features` where asked.

    The state is (hidden, cell) of each layer in turn, each (B, H). The penalty in training, with features x before
    and x' after the output dropout (the ones that the head receives):

        activation_penalty * mean(x'^2) + temporal_penalty * mean((x[:, 1:] - x[:, :-1])^2)

    Reference: Merity et al. (2017), arXiv 1708.02182.
    """

    def __init__(self, config: AWDLSTMConfig, vocab_size: int) -> None:
        super().__init__()
        require("vocab_size", Size, vocab_size)
        self.config = config
        self.out_features = config.feature_size
        self.embedding = nn.Embedding(vocab_size, config.embedding_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        sizes = pairwise((config.embedding_size, *config.hidden_sizes))
        self.layers = nn.ModuleList(WeightDropLSTM(*size, config.weight_drop) for size in sizes)
        last = config.hidden_sizes[-1]
        self.projection: nn.Module = nn.Identity() if last == self.out_features else nn.Linear(last, self.out_features)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        weight = self.embedding.weight
        return tuple(weight.new_zeros(batch_size, size) for size in self.config.hidden_sizes for _ in ("h", "c"))

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] = ()) -> BackboneOutput:
        require_tokens(tokens)
        state = self._checked_state(state, tokens.shape[0])
        x = embedded(self.embedding, tokens, self.config.embedding_dropout, self.training)
        x = locked_dropout(x, self.config.input_dropout, self.training)
        new_state: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = locked_dropout(x, self.config.hidden_dropout, self.training)
            x, hidden, cell = layer(x, state[2 * i], state[2 * i + 1])
            new_state += [hidden, cell]
        x = self.projection(x)
        features = locked_dropout(x, self.config.output_dropout, self.training)
        return BackboneOutput(features, tuple(new_state), self._penalty(x, features))

    def _checked_state(self, state: tuple[Tensor, ...], batch_size: int) -> tuple[Tensor, ...]:
        if not state:
            return self.initial_state(batch_size)
        got = [tuple(part.shape) for part in state]
        expected = [(batch_size, size) for size in self.config.hidden_sizes for _ in ("h", "c")]
        if got != expected:
            raise ValueError(f"state must have the shapes {expected}, got {got}")
        return state

    def _penalty(self, raw: Tensor, dropped: Tensor) -> Tensor:
        wide = torch.promote_types(raw.dtype, torch.float32)
        penalty = raw.new_zeros((), dtype=wide)
        if not self.training:
            return penalty
        if self.config.activation_penalty > 0:
            penalty = penalty + self.config.activation_penalty * dropped.to(wide).square().mean()
        # One time step has no change, and the mean of nothing would be nan.
        if self.config.temporal_penalty > 0 and raw.shape[1] > 1:
            penalty = penalty + self.config.temporal_penalty * raw.to(wide).diff(dim=1).square().mean()
        return penalty

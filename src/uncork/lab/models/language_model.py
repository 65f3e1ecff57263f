"""The interface of backbones, and a language model: a backbone makes features, a head turns them into loss or logits.

Shapes in comments: B batch, T time, D features, V vocabulary.
"""

import abc
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from uncork.lab.validated import Size, Switch, Validated


class BackboneOutput(NamedTuple):
    """What a backbone returns: features (B, T, D), the state to go on from, and a scalar penalty (0 in evaluation)."""

    features: Tensor
    state: tuple[Tensor, ...]
    penalty: Tensor


class ModelOutput(NamedTuple):
    """What a language model returns: loss and cross-entropy (in nats per token) with a target, logits without."""

    loss: Tensor | None
    cross_entropy: Tensor | None
    logits: Tensor | None
    state: tuple[Tensor, ...]


class Backbone(nn.Module, abc.ABC):
    """A map from tokens (B, T) to features (B, T, `out_features`), perhaps with a state carried along the stream."""

    out_features: int
    embedding: nn.Embedding

    @abc.abstractmethod
    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] = ()) -> BackboneOutput:
        """Features of tokens (B, T) int64, starting from `state`; an empty state is the initial one."""

    @abc.abstractmethod
    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """The state before the first token of `batch_size` streams; () for a stateless backbone."""


class LossHead(Protocol):
    """The part of a head that a language model uses."""

    in_features: int
    weight: nn.Parameter

    def __call__(self, input: Tensor) -> Tensor: ...

    def loss(self, input: Tensor, target: Tensor) -> Tensor: ...


class LanguageModel(nn.Module):
    """A backbone and a head: p(next token | tokens so far).

    With a target the loss is the head's mean cross-entropy over the kept tokens plus the backbone's penalty (nats per
    token); without one the logits are softmax-ready, whatever the head.

    Args:
        backbone: makes features (B, T, D).
        head: an output layer with `in_features` = D, `weight` (V, D'), `head(input)` and `head.loss(input, target)`.
        tie_weights: the head's `weight` becomes the embedding's Parameter, the same object; D' must then equal the
            embedding's size (D' is D, or `latent_features` for a mixture).

    Raises:
        TypeError: the head lacks one of these attributes.
        ValueError: the sizes of backbone and head do not fit.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, *, tie_weights: bool = False) -> None:
        super().__init__()
        missing = [name for name in ("in_features", "weight", "loss") if not hasattr(head, name)]
        if missing:
            raise TypeError(f"head must have {', '.join(missing)}; got {type(head).__name__}")
        self.backbone = backbone
        self.head = head
        self.tie_weights = tie_weights
        if self._loss_head.in_features != backbone.out_features:
            raise ValueError(
                f"head.in_features must equal backbone.out_features = {backbone.out_features}, "
                f"got {self._loss_head.in_features}"
            )
        if tie_weights:
            self._tie()

    @property
    def _loss_head(self) -> LossHead:
        return cast(LossHead, self.head)

    def _tie(self) -> None:
        embedding, weight = self.backbone.embedding.weight, self._loss_head.weight
        if embedding.shape != weight.shape:
            raise ValueError(
                "tie_weights needs an embedding of the shape of head.weight: "
                f"embedding {tuple(embedding.shape)}, head.weight {tuple(weight.shape)}"
            )
        self.head.weight = embedding

    def forward(self, tokens: Tensor, target: Tensor | None = None, state: tuple[Tensor, ...] = ()) -> ModelOutput:
        """Loss of a target, or the logits (B, T, V) when there is none, after tokens (B, T) int64.

        Args:
            target: (B, T) int64, the successor of each token; or (B, V) floating, the probabilities of the words after
                the last token of each row, which need not sum to 1 (`F.cross_entropy`).
        """
        features, state, penalty = self.backbone(tokens, state)
        if target is None:
            return ModelOutput(loss=None, cross_entropy=None, logits=self._loss_head(features), state=state)
        if target.is_floating_point():
            features = features[:, -1]
        elif target.shape != tokens.shape:
            raise ValueError(f"target must have the shape of tokens {tuple(tokens.shape)}, got {tuple(target.shape)}")
        cross_entropy = self._loss_head.loss(features, target)
        return ModelOutput(cross_entropy + penalty, cross_entropy.detach(), logits=None, state=state)

    def features(self, tokens: Tensor, state: tuple[Tensor, ...] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The head's input (B, T, D) for tokens (B, T) int64, and the state after them."""
        output: BackboneOutput = self.backbone(tokens, state)
        return output.features, output.state

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        """The backbone's state before the first token of `batch_size` streams."""
        return self.backbone.initial_state(batch_size)

    def tied_keys(self) -> dict[str, str]:
        """The key of each tied tensor in `state_dict()`, with its other key; safetensors stores such a tensor once."""
        return {"head.weight": "backbone.embedding.weight"} if self.tie_weights else {}


class BackboneConfig(Validated, abc.ABC):
    """Settings of a backbone."""

    kind: str
    tie_weights: Switch = False
    """Whether the head's weight is the embedding."""
    out_features: Size | None = None
    """Features given to the head, by a linear map at the end of the body. None: the size of the last layer, no map."""

    @property
    @abc.abstractmethod
    def feature_size(self) -> int:
        """Size D of the features that the head receives: its `in_features`."""

    @abc.abstractmethod
    def build(self, vocab_size: int) -> Backbone:
        """A new backbone with these settings."""


def require_tokens(tokens: Tensor) -> None:
    """Raise ValueError unless tokens are int64 of shape (B, T) with at least one in each dimension."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 of shape (B, T), got {tokens.dtype} {tuple(tokens.shape)}")

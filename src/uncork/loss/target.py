"""Targets in the one form that all implementations use: a vector t over the words for each token.

With class weights u, an index target y gives t = c onehot(y) + s u, and probabilities q give t = u q, elementwise. With
log-probabilities l - lse, a token's cross-entropy is sum_v t_v (lse - l_v); its gradient to the logits is
T softmax(l) - t, where T = sum_v t_v is the target's mass.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Target(Protocol):
    """The targets of C tokens, whose logits are (C, V)."""

    @property
    def kept(self) -> Tensor:
        """(C,) bool: whether a token counts."""

    @property
    def word_weight(self) -> Tensor | None:
        """(V,) class weights."""

    def rows(self, part: slice | Tensor) -> "Target":
        """The targets of some of the tokens."""

    def cross_entropy(self, logits: Tensor, logsumexp: Tensor) -> Tensor:
        """(C,): sum_v t_v (lse - l_v); 0 where ignored."""

    def mass(self) -> Tensor:
        """(C,): T = sum_v t_v."""

    @property
    def sparse(self) -> bool:
        """Whether t is c onehot(y) alone."""

    def subtract_from(self, grad: Tensor, factor: Tensor) -> None:
        """grad -= factor[:, None] * t, in place."""

    def denominator(self) -> Tensor:
        """(N,): each token's part of the mean's denominator: its class weight, or 1; 0 where ignored."""


@dataclass(frozen=True)
class IndexTarget:
    """Class indices.

    index: (N,) int64, 0 where ignored. kept: (N,) bool. word_weight: (V,) class weights or None.
    hit: (N,) c = (1 - smoothing) weight[y]. uniform: s = smoothing / V.
    """

    index: Tensor
    kept: Tensor
    hit: Tensor
    uniform: float
    word_weight: Tensor | None
    own_weight: Tensor
    vocab_size: int

    @classmethod
    def build(
        cls, target: Tensor, ignore_index: int, weight: Tensor | None, smoothing: float, vocab_size: int, like: Tensor
    ) -> "IndexTarget":
        """From (N,) int64; `like` gives the loss's dtype and device."""
        kept = target != ignore_index
        index = torch.where(kept, target, 0)
        own = like.new_ones(index.shape) if weight is None else weight[index]
        return cls(index, kept, (1 - smoothing) * own, smoothing / vocab_size, weight, own, vocab_size)

    def rows(self, part: slice | Tensor) -> "IndexTarget":
        index, kept, hit, own = self.index[part], self.kept[part], self.hit[part], self.own_weight[part]
        return IndexTarget(index, kept, hit, self.uniform, self.word_weight, own, self.vocab_size)

    def _uniform_mass(self) -> Tensor | float:
        return self.uniform * (self.vocab_size if self.word_weight is None else self.word_weight.sum())

    @property
    def sparse(self) -> bool:
        return not self.uniform

    def at(self, values: Tensor) -> Tensor:
        """values[n, y_n] along the last dimension: (C, V) to (C,), (C, K, V) to (C, K)."""
        index = self.index.view(-1, *[1] * (values.dim() - 1)).expand(*values.shape[:-1], 1)
        return values.gather(-1, index).squeeze(-1)

    def cross_entropy(self, logits: Tensor, logsumexp: Tensor) -> Tensor:
        surprise = logsumexp - self.at(logits)
        # A word of weight 0 costs nothing, not even where it is impossible.
        loss = torch.where((self.hit == 0) & (surprise == torch.inf), 0, self.hit * surprise)
        if self.uniform:
            weighted = logits
            if self.word_weight is not None:  # an impossible word (-inf) of weight 0 costs nothing
                weighted = torch.where(self.word_weight == 0, 0, logits * self.word_weight)
            loss = loss + (self._uniform_mass() * logsumexp - self.uniform * weighted.sum(-1))
        return torch.where(self.kept, loss, 0)

    def mass(self) -> Tensor:
        return self.hit + self._uniform_mass()

    def subtract_from(self, grad: Tensor, factor: Tensor) -> None:
        grad.scatter_add_(1, self.index[:, None], -(factor * self.hit)[:, None])
        if self.uniform:
            share = (self.uniform * factor)[:, None]
            grad.sub_(share if self.word_weight is None else share * self.word_weight)

    def denominator(self) -> Tensor:
        return torch.where(self.kept, self.own_weight, 0)


@dataclass(frozen=True)
class ProbabilityTarget:
    """Probabilities (N, V), which need not sum to 1; with smoothing they become (1 - s) q + s / V."""

    probabilities: Tensor
    kept: Tensor
    word_weight: Tensor | None
    smoothing: float
    dtype: torch.dtype

    @classmethod
    def build(cls, target: Tensor, weight: Tensor | None, smoothing: float, dtype: torch.dtype) -> "ProbabilityTarget":
        """From (N, V) floating numbers; dtype is the loss's."""
        kept = torch.ones(target.shape[0], dtype=torch.bool, device=target.device)
        return cls(target, kept, weight, smoothing, dtype)

    def rows(self, part: slice | Tensor) -> "ProbabilityTarget":
        probabilities, kept = self.probabilities[part], self.kept[part]
        return ProbabilityTarget(probabilities, kept, self.word_weight, self.smoothing, self.dtype)

    @property
    def sparse(self) -> bool:
        return False

    def _weights(self) -> Tensor:
        t = self.probabilities.to(self.dtype)
        if self.smoothing:
            t = t * (1 - self.smoothing) + self.smoothing / t.shape[-1]
        return t if self.word_weight is None else t * self.word_weight

    def cross_entropy(self, logits: Tensor, logsumexp: Tensor) -> Tensor:
        t = self._weights()
        # An impossible word (logit -inf) of target 0 costs nothing: 0 * inf is 0 here.
        return torch.where(t == 0, 0, t * (logsumexp[:, None] - logits)).sum(-1)

    def mass(self) -> Tensor:
        return self._weights().sum(-1)

    def subtract_from(self, grad: Tensor, factor: Tensor) -> None:
        grad.addcmul_(self._weights(), factor[:, None], value=-1)

    def denominator(self) -> Tensor:
        return self.kept.to(self.dtype)


def highest(logits: Tensor) -> Tensor:
    """Each row's largest logit (..., 1), 0 where all are -inf; subtracting it first keeps small losses accurate."""
    top = logits.detach().amax(-1, keepdim=True)
    return top.masked_fill_(top == -torch.inf, 0)

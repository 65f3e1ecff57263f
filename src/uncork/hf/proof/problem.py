"""Chosen hidden states and targets, and what the reference makes of them.

Shapes in comments: B batch, T time, N = B T tokens, D features, V vocabulary, U words that the model leaves of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork.hf.proof.candidates import Map, candidates
from uncork.hf.proof.reference import Reference, cross_entropy, loss_tolerance

SMALLEST, LARGEST = 0.1, 1000.0
"""Of the largest score of a token: from tiny to far beyond any cap."""
GROUPS = 4
IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """What is driven into a model's output layer, and what has to come out.

    Attributes:
        reference: what it is computed from. rows: (B, T, D) in the model's dtype, on its device.
        hidden: (N, D) the same in float64. scores: (N, V). logits: (N, U).
        tolerance: (N, U) of the logits. target: (N,), -100 where a sequence ends.
        entropy, entropy_tolerance: (N,) the cross-entropy of each token; 0 where the target is -100.
        groups: tokens of neighbouring magnitudes, as indices, and the largest each by itself.
        maps: what may be in the reference's place.
    """

    reference: Reference
    rows: Tensor
    hidden: Tensor
    scores: Tensor
    logits: Tensor
    tolerance: Tensor
    target: Tensor
    entropy: Tensor
    entropy_tolerance: Tensor
    groups: tuple[Tensor, ...]
    maps: Mapping[str, Map]

    @staticmethod
    def choose(
        reference: Reference, like: Tensor, others: Mapping[str, nn.Module | None], generator: torch.Generator
    ) -> "Problem":
        """Random directions, scaled so that the largest score of a token goes from 0.1 to 1000, both signs among them.

        Args:
            like: (B, T, D), the output layer's input in the model's own forward. others: see `candidates`.
        """
        batch, time, _ = like.shape
        ends = torch.arange(batch * time) % time == time - 1
        inner = (~ends).nonzero()[:, 0]
        size = torch.full((batch * time,), SMALLEST).double()
        geometric = torch.logspace(0, 1, len(inner), base=largest_score(reference) / SMALLEST).double() * SMALLEST
        size[inner] = geometric[torch.randperm(len(inner), generator=generator)]
        hidden = directions(reference, len(size), like, generator) * size[:, None]
        rows = hidden.to(like.dtype).to(like.device)
        hidden = rows.cpu().double()
        scores = reference.scores(hidden)
        with torch.no_grad():
            logits = reference.logits(scores)
        tolerance = reference.tolerance(hidden, rows)
        target = _targets(logits, generator).masked_fill(ends, IGNORED)
        kept = target.clamp(min=0)
        entropy = cross_entropy(logits, kept).masked_fill(ends, 0)
        slack = loss_tolerance(logits, tolerance, kept).masked_fill(ends, 0)
        *groups, largest = inner[size[inner].argsort()].chunk(GROUPS)
        groups += largest.split(1)  # where a function is saturated, a mean would hide what its rounding does
        return Problem(
            reference, rows.view(like.shape), hidden, scores, logits, tolerance, target, entropy, slack, tuple(groups),
            candidates(reference, others),
        )  # fmt: skip

    def labels(self, tokens: Tensor) -> Tensor:
        """Labels (B, T) under which the model's loss is that of these tokens: a token predicts the next label."""
        batch, time, _ = self.rows.shape
        kept = torch.full_like(self.target, IGNORED)
        kept[tokens] = self.target[tokens]
        return F.pad(kept.view(batch, time)[:, :-1], (1, 0), value=IGNORED).to(self.rows.device)

    def other_logits(self) -> dict[str, Tensor]:
        """The logits (N, U) of each wrong map."""
        with torch.no_grad():
            return {name: apply(self.scores, self.hidden) for name, apply in self.maps.items()}

    def other_entropies(self) -> dict[str, Tensor]:
        """The cross-entropy (N,) of each wrong map."""
        kept = self.target.clamp(min=0)
        found = {name: cross_entropy(logits, kept) for name, logits in self.other_logits().items()}
        return {name: entropy.masked_fill(self.target < 0, 0) for name, entropy in found.items()}


def directions(reference: Reference, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Hidden states (count, D) in float64 whose largest score is 1.

    Raises:
        ValueError: the output layer's weight is zero or not finite, so that nothing can be driven.
    """
    found = torch.randn(count, like.shape[-1], generator=generator, dtype=torch.float64)
    reach = reference.scores(found, bias=False).abs().amax(-1, keepdim=True)
    if not bool((reach > 0).all() and reach.isfinite().all()):
        raise ValueError(
            "model: expected an output layer whose weight is finite and not zero, as it is before training"
        )
    # The largest hidden state, 1000 times this, stays within the dtype.
    return found / reach.clamp(min=float(found.abs().max()) * LARGEST * 2 / torch.finfo(like.dtype).max)


def largest_score(reference: Reference) -> float:
    """1000, or more where a function is bounded and its bound lies further out."""
    largest, function = LARGEST, reference.function
    if function is None or getattr(function, "unbounded", True):
        return largest
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    with torch.no_grad():
        while largest < 1e5:
            here, further = reference.apply(signs * largest).abs(), reference.apply(signs * 2 * largest).abs()
            if bool((further <= 1.05 * here).all()):
                break
            largest *= 2
    return largest


def _targets(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The likeliest word, the least likely, one in the middle, and a random one, by turns: (N,)."""
    count, size = logits.shape
    order = logits.argsort(-1)
    rank = torch.stack([
        torch.full((count,), size - 1), torch.zeros(count, dtype=torch.int64), torch.full((count,), size // 2),
        torch.randint(size, (count,), generator=generator),
    ])  # fmt: skip
    return order.gather(-1, rank[torch.arange(count) % 4, torch.arange(count)][:, None])[:, 0]

"""The same losses and statistics from logits that are at hand, for heads whose logits somebody else changes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncork.loss import _IMPLEMENTATIONS, TokenStatistics, _check_reduction, _reduce
from uncork.loss.call import Call, Statistics, build_call, without_autocast
from uncork.loss.reference import statistics_of_logits


@dataclass(frozen=True)
class _Given:
    """The reference implementation, from its logits on."""

    logits: Tensor  # (N, V)

    def statistics(self, call: Call) -> Statistics:
        with without_autocast(self.logits.device):
            return statistics_of_logits(call, self.logits.to(call.dtype), self.logits)

    def weighted_sum(self, call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
        result = self.statistics(call)
        assert result.cross_entropy is not None
        assert call.target is not None
        total = (ce_factor * result.cross_entropy).sum()
        if lse_factor is not None:
            total = total + (lse_factor * torch.where(call.target.kept, result.logsumexp, 0).square()).sum()
        return total


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    reason: str,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    z_loss: float = 0.0,
    impl: str | None = None,
    **options: Any,
) -> Tensor:
    """`linear_cross_entropy` of logits (..., V) that are made already; options and errors as there.

    Args:
        reason: why they had to be made, for the error where an implementation is asked for that does not make them.
    """
    _check_reduction(reduction, z_loss)
    _check_impl(impl, reason)
    call, leading = _call(logits, target, **options)
    return _reduce(call, leading, token_weight, reduction, z_loss, _Given(logits.reshape(-1, logits.shape[-1])))


def token_statistics(
    logits: Tensor, target: Tensor | None, *, reason: str, impl: str | None = None, **options: Any
) -> TokenStatistics:
    """`uncork.token_statistics` of logits (..., V) that are made already; the argmax is theirs."""
    _check_impl(impl, reason)
    call, leading = _call(logits, target, details=True, **options)
    result = _Given(logits.reshape(-1, logits.shape[-1])).statistics(call)
    assert result.entropy is not None
    assert result.argmax is not None
    log_prob = None if result.cross_entropy is None else (-result.cross_entropy).view(leading)
    return TokenStatistics(
        log_prob, result.logsumexp.view(leading), result.entropy.view(leading), result.argmax.view(leading)
    )


def _call(logits: Tensor, target: Tensor | None, **options: Any) -> tuple[Call, tuple[int, ...]]:
    """A checked call whose input and weight hold nothing: the target's shape is checked against theirs."""
    nothing = logits.new_empty(*logits.shape[:-1], 1), logits.new_empty(logits.shape[-1], 1)
    return build_call(*nothing, target, **options)


def _check_impl(impl: str | None, reason: str) -> None:
    if impl is not None and impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {sorted(_IMPLEMENTATIONS)} or None, got {impl!r}")
    if impl not in (None, "reference"):
        raise ValueError(f'impl="{impl}" cannot serve this call: {reason}, which takes the (N, V) matrix of them')

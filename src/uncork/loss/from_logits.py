"""The same losses and statistics from given logits, for heads whose logits a hook may change."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from uncork.loss.call import Call, Implementation, Statistics, build_call, without_autocast
from uncork.loss.implementations import check_name
from uncork.loss.reduction import TokenStatistics, answer_statistics, check_reduction, reduce_loss
from uncork.loss.reference import statistics_of_logits


@dataclass(frozen=True)
class _Given(Implementation):
    """The reference implementation, starting from given logits."""

    logits: Tensor  # (N, V)

    def statistics(self, call: Call) -> Statistics:
        with without_autocast(self.logits.device):
            return statistics_of_logits(call, self.logits.to(call.dtype), self.logits)


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
    """`linear_cross_entropy` of logits (..., V) that are computed already; options and errors as there.

    Args:
        reason: why all logits are computed, for the error if `impl` names an implementation that does not compute them.
    """
    z_loss = check_reduction(reduction, z_loss)
    _check_impl(impl, reason)
    call, leading = _call(logits, target, reason, **options)
    given = _Given(logits.reshape(-1, logits.shape[-1]))
    return reduce_loss(given, call, leading, token_weight, reduction, z_loss)


def token_statistics(
    logits: Tensor, target: Tensor | None, *, reason: str, impl: str | None = None, **options: Any
) -> TokenStatistics:
    """`uncork.token_statistics` of logits (..., V) that are computed already; the argmax is taken over the logits."""
    _check_impl(impl, reason)
    call, leading = _call(logits, target, reason, details=True, **options)
    return answer_statistics(_Given(logits.reshape(-1, logits.shape[-1])), call, leading)


def _call(logits: Tensor, target: Tensor | None, reason: str, **options: Any) -> tuple[Call, tuple[int, ...]]:
    """A validated call whose input and weight are placeholders, needed only for the checks of the target's shape."""
    if options.get("scores_dtype") is not None:
        raise ValueError(f"scores_dtype: expected None, since {reason}: they have the dtype that the head gives them")
    nothing = logits.new_empty(*logits.shape[:-1], 1), logits.new_empty(logits.shape[-1], 1)
    return build_call(*nothing, target, **options)


def _check_impl(impl: str | None, reason: str) -> None:
    check_name(impl)
    if impl not in (None, "reference"):
        raise ValueError(f'impl="{impl}" cannot serve this call: {reason}, which needs the whole (N, V) matrix of them')

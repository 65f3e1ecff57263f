"""What the public functions add to an implementation: reductions, token weights, and the shape of the results."""

from typing import NamedTuple

import torch
from torch import Tensor

from uncork.loss.call import Call, Implementation, check_number, checked_factor


class TokenStatistics(NamedTuple):
    """Per token, each of the input's leading shape, float32 or better and differentiable (argmax: int64, not).

    log_prob: of the target (0 where ignored; None without a target). logsumexp: of the logits (a mixture's logits are
    log-probabilities: 0). entropy: of the model's distribution, in nats. argmax: the likeliest word.
    """

    log_prob: Tensor | None
    logsumexp: Tensor
    entropy: Tensor
    argmax: Tensor


def check_reduction(reduction: str, z_loss: float) -> float:
    """The z_loss as Python's own number; raises unless both are values that `linear_cross_entropy` accepts."""
    if not isinstance(reduction, str) or reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')
    check_number("z_loss", z_loss)
    try:
        factor = float(z_loss)
    except OverflowError:  # of an int
        factor = float("inf")
    if not 0 <= factor < float("inf"):
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss!r}")
    return factor


def _checked_token_weight(token_weight: Tensor | None, call: Call, leading: tuple[int, ...]) -> Tensor | None:
    if token_weight is None:
        return None
    checked_factor("token_weight", token_weight, call.input.device)
    if tuple(token_weight.shape) != leading:
        raise ValueError(f"token_weight: expected shape {leading}, got {tuple(token_weight.shape)}")
    return token_weight.reshape(-1).to(call.dtype)


def reduce_loss(
    implementation: Implementation,
    call: Call,
    leading: tuple[int, ...],
    token_weight: Tensor | None,
    reduction: str,
    z_loss: float,
) -> Tensor:
    """The loss of a call: reduction, token weights and z-loss become one factor per row and term.

    Args:
        leading: shape of the call's tokens. The rest is as in `linear_cross_entropy`.
    """
    token_weight = _checked_token_weight(token_weight, call, leading)
    if call.target is None:
        raise TypeError("target: expected a Tensor, got NoneType")
    kept = call.target.kept
    if reduction == "none":
        result = implementation.statistics(call)
        loss = result.cross_entropy
        assert loss is not None
        if z_loss:
            loss = loss + z_loss * torch.where(kept, result.logsumexp, 0).square()
        return (loss if token_weight is None else loss * token_weight).view(leading)
    share = kept.to(call.dtype)
    if token_weight is not None:
        share = torch.where(kept, token_weight, 0)
    ce_factor, lse_factor = share, z_loss * share if z_loss else None
    undefined: Tensor | None = None
    if reduction == "mean":
        own = call.target.denominator()
        total = (own if token_weight is None else own * share).sum()
        undefined = total == 0
        ce_factor = share / torch.where(undefined, 1, total)
        if lse_factor is not None:
            count = share.sum()
            lse_factor = lse_factor / torch.where(count == 0, 1, count)
    loss = implementation.weighted_sum(call, ce_factor, lse_factor)
    # No kept token: nan, as torch gives, but the graph stays and the gradients are 0.
    return loss if undefined is None else torch.where(undefined, torch.nan, loss)


def answer_statistics(implementation: Implementation, call: Call, leading: tuple[int, ...]) -> TokenStatistics:
    """A call's statistics in the shape of its tokens."""
    result = implementation.statistics(call)
    assert result.entropy is not None
    assert result.argmax is not None
    log_prob = None if result.cross_entropy is None else (-result.cross_entropy).view(leading)
    return TokenStatistics(
        log_prob, result.logsumexp.view(leading), result.entropy.view(leading), result.argmax.view(leading)
    )

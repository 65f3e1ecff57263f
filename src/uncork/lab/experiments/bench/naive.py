"""The losses in plain torch: `naive_*` as people write them, `plain*` as definitions for any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F

from uncork import (
    PLIF,
    GeneralizedSigsoftmax,
    LogitFunction,
    MonotoneNetwork,
    Scale,
    Sigsoftmax,
    Softcap,
    functional,
)
from uncork.logit_functions.plif import excess_slope


def naive_plif(scores: Tensor, slopes: Tensor, knots: Tensor, bound: float) -> Tensor:
    """PLIF of P slopes over [-bound, bound], by an index, three gathers and autograd; f(-bound) = 0.

    Args:
        knots: (P,), the left ends of the pieces, evenly spaced.

    >>> naive_plif(torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.0]), 1.0)
    tensor([0., 2.])
    """
    rises = slopes * torch.cat([knots, knots.new_full((1,), bound)]).diff()
    offsets = rises.cumsum(0) - rises
    index = ((scores + bound) * (len(slopes) / (2 * bound))).floor().clamp(0, len(slopes) - 1).long()
    return (scores - knots[index]) * slopes[index] + offsets[index]


def naive_mixture_loss(latent: Tensor, linear_weight: Tensor, prior_logits: Tensor, target: Tensor) -> Tensor:
    """A mixture of softmaxes as its authors train it: probabilities of every component, summed, then the logarithm.

    Args:
        latent: (N, K, D). linear_weight: (V, D). prior_logits: (N, K). target: (N,).

    Yang et al. 2018, arXiv 1711.03953.
    """
    prob = F.linear(latent.flatten(0, 1), linear_weight).softmax(-1).view(*latent.shape[:2], -1)
    mixed = (prob * prior_logits.softmax(-1).unsqueeze(2)).sum(1)
    return F.nll_loss(torch.log(mixed + 1e-8), target)


def plain(function: LogitFunction | None, scores: Tensor, knots_dtype: torch.dtype) -> Tensor:
    """f(scores) up to a constant, by torch's own elementwise operations and autograd.

    Args:
        knots_dtype: the dtype to which PLIF's knots are rounded before use.
    """
    match function:
        case None:
            return scores
        case Scale():
            return scores * function.tables(scores.dtype)[0][0]
        case Softcap():
            return function.cap * torch.tanh(scores / function.cap)
        case Sigsoftmax():
            return scores + F.logsigmoid(scores)
        case GeneralizedSigsoftmax():
            return scores + (function.steepness - 1) * F.logsigmoid(scores - function.center)
        case MonotoneNetwork():
            names = ("raw_right", "raw_left")
            right, left = ((1 + excess_slope(function.get_parameter(n))) / function.num_units for n in names)
            thresholds = function.thresholds.to(scores.dtype)
            return functional.monotone_relu(scores, thresholds, right.to(scores.dtype), left.to(scores.dtype))
        case PLIF():
            knots = function.knots(knots_dtype).to(scores.dtype)
            return naive_plif(scores, function.slopes().to(scores.dtype), knots, function.bound)
    raise TypeError(f"function: no plain form of {type(function).__name__}")


def plain_loss(
    function: LogitFunction | None, leaves: dict[str, Tensor], target: Tensor, knots_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The mean cross-entropy that the fused losses compute.

    Args:
        leaves: "linear_weight" and "input", or "latent" and "prior_logits" of a mixture.
        knots_dtype: as in `plain`.
    """
    if "latent" not in leaves:
        return F.cross_entropy(plain(function, F.linear(leaves["input"], leaves["linear_weight"]), knots_dtype), target)
    logits = plain(function, F.linear(leaves["latent"], leaves["linear_weight"]), knots_dtype)
    return F.nll_loss(functional.mixture_log_softmax(logits, leaves["prior_logits"]), target)

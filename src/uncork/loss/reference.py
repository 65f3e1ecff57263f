"""The definition: keeps the logits, leaves every gradient to autograd."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork.functional import at_least_float32, mixture_log_softmax
from uncork.logit_functions.base import LogitFunction, pass_impossible
from uncork.loss.call import Call, Statistics, checked_logits, without_autocast
from uncork.loss.target import highest


def apply_function(function: nn.Module | None, scores: Tensor) -> Tensor:
    """f(scores), where -inf stays and takes no gradient, whatever the function."""
    if isinstance(function, LogitFunction) and function.operations() != ():  # it sees to -inf itself
        return checked_logits(function(scores), scores)
    f = nn.Identity() if function is None else function
    return pass_impossible(lambda finite: checked_logits(f(at_least_float32(finite)), finite), scores)


def statistics(call: Call) -> Statistics:
    """Per-token statistics, differentiable but for argmax."""
    with without_autocast(call.input.device):
        bias = None if call.bias is None else call.bias.to(call.dtype)
        scores = F.linear(call.input.to(call.dtype), call.weight.to(call.dtype), bias)
        logits = apply_function(call.function, scores)
        if call.prior_logits is not None:
            logits = mixture_log_softmax(logits, call.prior_logits.to(call.dtype))
        return statistics_of_logits(call, logits, logits if call.prior_logits is not None else scores)


def statistics_of_logits(call: Call, logits: Tensor, ranked: Tensor) -> Statistics:
    """Per-token statistics of logits (N, V); the argmax is that of `ranked`."""
    if call.prior_logits is None:
        top = highest(logits)
        shifted = logits - top
        shifted_lse = torch.logsumexp(shifted, -1)
        lse = shifted_lse + top.squeeze(-1)
    else:  # log-probabilities are normalised already; what is left is rounding
        shifted, lse = logits, torch.zeros_like(logits[:, 0])
        shifted_lse = lse
    ce = None if call.target is None else call.target.cross_entropy(shifted, shifted_lse)
    if not call.details:
        return Statistics(ce, lse, None, None)
    log_prob = shifted - shifted_lse[:, None]
    prob = log_prob.exp()
    entropy = -torch.where(prob == 0, 0, prob * log_prob.masked_fill(prob == 0, 0)).sum(-1)
    return Statistics(ce, lse, entropy, ranked.argmax(-1))


def weighted_sum(call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
    """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2."""
    ce, lse, _, _ = statistics(call)
    assert ce is not None
    assert call.target is not None
    total = (ce_factor * ce).sum()
    if lse_factor is not None:
        total = total + (lse_factor * torch.where(call.target.kept, lse, 0).square()).sum()
    return total

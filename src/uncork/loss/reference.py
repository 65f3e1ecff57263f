"""The reference implementation, which defines the results: it keeps the logits and leaves gradients to autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F

from uncork.functional import mixture_log_softmax
from uncork.loss.call import Call, Implementation, Statistics, without_autocast
from uncork.loss.function import apply_function
from uncork.loss.target import highest


class Reference(Implementation):
    """Computes any call, on any device."""

    def statistics(self, call: Call) -> Statistics:
        """Per-token statistics, differentiable but for argmax."""
        with without_autocast(call.input.device):
            products = call.products_dtype
            bias = None if call.bias is None else call.bias.to(products)
            scores = F.linear(call.input.to(products), call.weight.to(products), bias).to(call.dtype)
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
    else:  # the logsumexp of log-probabilities is 0 but for rounding
        shifted, lse = logits, torch.zeros_like(logits[:, 0])
        shifted_lse = lse
    ce = None if call.target is None else call.target.cross_entropy(shifted, shifted_lse)
    if not call.details:
        return Statistics(ce, lse, None, None)
    log_prob = shifted - shifted_lse[:, None]
    prob = log_prob.exp()
    entropy = -torch.where(prob == 0, 0, prob * log_prob.masked_fill(prob == 0, 0)).sum(-1)
    return Statistics(ce, lse, entropy, ranked.argmax(-1))

"""The reference implementation, which defines the results: it keeps the logits and leaves gradients to autograd."""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from uncork.functional import mixture_log_softmax
from uncork.loss.call import Call, Implementation, Statistics, without_autocast
from uncork.loss.function import apply_function
from uncork.loss.memory import Live, MemoryEstimate, shapes_alone
from uncork.loss.reduction import reduce_loss
from uncork.loss.stand_in import on_meta
from uncork.loss.target import highest


class Reference(Implementation):
    """Computes any call, on any device."""

    def memory(self, call: Call, gradients: bool) -> MemoryEstimate:
        """What a step makes that computes on the meta device; its scores are all that is no gradient."""
        counted = call.input.device
        call = on_meta(call, call.tokens)
        call = replace(call, function=None if call.function is None else deepcopy(call.function).to("meta"))
        inputs = call.tensors()
        leaves = [t.requires_grad_(gradients) for t in inputs]
        parameters = [] if call.function is None else [p for p in call.function.parameters() if p.requires_grad]

        def run() -> int:
            with torch.set_grad_enabled(gradients), Live(counted) as live:
                loss = reduce_loss(self, call, (call.tokens,), None, "mean", 0.0)
                if gradients:
                    torch.autograd.grad(loss, [*leaves, *parameters])
            return live.peak

        kept = sum(t.nbytes for t in (*leaves, *parameters)) if gradients else 0
        return MemoryEstimate.of(shapes_alone(run) - kept, 0, kept, 0, call.tokens * call.components)

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

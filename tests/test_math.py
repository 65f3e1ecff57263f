"""The gradients that docs/math.md derives, against autograd in float64."""

import torch
from torch.nn import functional as F

from uncork import PLIF, functional

F64 = torch.float64


def test_mixture_gradient_is_the_posterior():
    torch.manual_seed(0)
    logits = torch.randn(6, 3, 10, dtype=F64, requires_grad=True)
    prior = torch.randn(6, 3, dtype=F64, requires_grad=True)
    target = torch.rand(6, 10, dtype=F64)  # sums to anything
    loss = -(target * functional.mixture_log_softmax(logits, prior)).sum()
    by_logits, by_prior = torch.autograd.grad(loss, [logits, prior])
    pi, p = prior.softmax(-1).detach(), logits.softmax(-1).detach()
    joint = pi.unsqueeze(-1) * p
    r = joint / joint.sum(1, keepdim=True)  # responsibilities r_{k,v}
    mass = (target.unsqueeze(1) * r).sum(-1)
    torch.testing.assert_close(by_logits, mass.unsqueeze(-1) * p - target.unsqueeze(1) * r)
    torch.testing.assert_close(by_prior, target.sum(-1, keepdim=True) * pi - mass)


def test_loss_gradient_is_row_factors_times_softmax_minus_target():
    torch.manual_seed(0)
    n, v, smoothing, z_loss = 7, 11, 0.1, 0.01
    scores = torch.randn(n, v, dtype=F64, requires_grad=True)
    target, weight = torch.randint(v, (n,)), torch.rand(v, dtype=F64) + 0.5
    tokens, function = torch.rand(n, dtype=F64), PLIF(9, 3.0, init="random").double()
    logits = function(scores)
    ce = F.cross_entropy(logits, target, weight=weight, label_smoothing=smoothing, reduction="none")
    z = logits.logsumexp(-1)
    loss = (tokens * ce).sum() / (tokens * weight[target]).sum() + (tokens * z_loss * z**2).sum() / tokens.sum()
    (expected,) = torch.autograd.grad(loss, scores)
    with torch.no_grad():
        row, z_row = tokens / (tokens * weight[target]).sum(), tokens / tokens.sum()
        t = row.unsqueeze(-1) * (
            (1 - smoothing) * weight[target].unsqueeze(-1) * F.one_hot(target, v) + smoothing / v * weight
        )
        a = t.sum(-1) + 2 * z_loss * z * z_row
        got = (a.unsqueeze(-1) * logits.softmax(-1) - t) * function.derivative(scores)
    torch.testing.assert_close(got, expected)

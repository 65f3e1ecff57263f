"""The gradients that docs/math.md derives, against autograd in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uncork import PLIF, build_head, functional

F64 = torch.float64


def test_mixture_gradient_is_the_posterior():
    torch.manual_seed(0)
    logits = torch.randn(6, 3, 10, dtype=F64, requires_grad=True)
    prior = torch.randn(6, 3, dtype=F64, requires_grad=True)
    target = torch.rand(6, 10, dtype=F64)  # sums to anything
    loss = -(target * functional.mixture_log_softmax(logits, prior)).sum()
    grad_logits, grad_prior = torch.autograd.grad(loss, [logits, prior])
    pi, p = prior.softmax(-1).detach(), logits.softmax(-1).detach()
    joint = pi.unsqueeze(-1) * p
    r = joint / joint.sum(1, keepdim=True)  # responsibilities r_{k,v}
    mass = (target.unsqueeze(1) * r).sum(-1)
    torch.testing.assert_close(grad_logits, mass.unsqueeze(-1) * p - target.unsqueeze(1) * r)
    torch.testing.assert_close(grad_prior, target.sum(-1, keepdim=True) * pi - mass)


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


@pytest.mark.parametrize(("make", "power"), [("adam", 1), ("sgd", 2)])
def test_a_factor_is_a_start_and_a_rate_of_the_output_layer(make, power):
    torch.manual_seed(0)
    c, rate = 4.0, 0.01
    x, target = torch.randn(5, 20, 3, dtype=F64), torch.randint(11, (5, 20))
    models = []
    for scale in (1.0, c):
        torch.manual_seed(1)
        body, head = nn.Linear(3, 2).double(), build_head("softcap", 2, 11, cap=5.0, scale=scale).double()
        models.append((body, head))
    (body, plain), (scaled_body, scaled) = models
    with torch.no_grad():
        plain.weight.mul_(c)
        plain.bias.mul_(c)
    start = copy.deepcopy(plain.state_dict())
    optimizers = []
    for (own_body, head), of_head in zip(models, (c**power * rate, rate), strict=True):
        groups = [{"params": own_body.parameters()}, {"params": head.parameters(), "lr": of_head}]
        optimizers.append(
            torch.optim.Adam(groups, lr=rate, eps=1e-30) if make == "adam" else torch.optim.SGD(groups, lr=rate)
        )
    for batch, words in zip(x, target, strict=True):
        for (own_body, head), optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            head.loss(own_body(batch), words).backward()
            optimizer.step()
    assert (plain.weight - start["weight"]).abs().max() > 0.05
    torch.testing.assert_close(c * scaled.weight, plain.weight)
    torch.testing.assert_close(c * scaled.bias, plain.bias)
    torch.testing.assert_close(scaled_body.weight, body.weight)

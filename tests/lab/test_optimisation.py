"""Optimisers: groups, the learning rate's course, clipping apart, averaged SGD."""

import itertools
import math

import pytest
import torch
from torch import nn

import uncork
from uncork.lab.train.config import Training
from uncork.lab.train.optimisation import (
    averaging_triggered,
    build_optimizer,
    clip_gradients,
    lr_factor,
    set_lr,
    weight_average,
)

ADAM = Training(optimizer="adam", lr=0.01, weight_decay=0.1)
SGD = Training(optimizer="sgd", lr=20.0, weight_decay=1e-6, schedule="constant")


@pytest.mark.parametrize(("training", "kind"), [(ADAM, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_the_functions_parameters_have_their_own_group(training, kind):
    head = uncork.build_head("plif", 4, 50)
    optimizer = build_optimizer(head, training, function_lr_scale=0.5)
    assert isinstance(optimizer, kind)
    rest, functions = optimizer.param_groups
    assert (rest["lr"], rest["weight_decay"]) == (training.lr, training.weight_decay)
    assert (functions["lr"], functions["weight_decay"]) == (0.5 * training.lr, 0.0)
    assert {id(p) for p in functions["params"]} == {id(p) for p in head.logit_function.parameters()}
    assert len(build_optimizer(uncork.build_head("softmax", 4, 50), training).param_groups) == 1


def test_set_lr_keeps_the_ratio_and_does_not_compound():
    optimizer = build_optimizer(uncork.build_head("plif", 4, 50), ADAM, function_lr_scale=2.0)
    for _ in range(2):
        assert set_lr(optimizer, 0.5) == 0.005
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]


def test_functions_that_are_not_trained_yet_have_a_rate_of_zero():
    optimizer = build_optimizer(uncork.build_head("plif", 4, 50), ADAM, function_lr_scale=2.0)
    set_lr(optimizer, 0.5, functions=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.0]
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]


def test_the_learning_rate_rises_then_stays_or_falls_to_zero():
    cosine = [lr_factor(step, 100, schedule="cosine", warmup=0.1) for step in range(101)]
    assert cosine[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.5)
    assert cosine[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(cosine[9:]))
    assert {lr_factor(step, 100, schedule="constant", warmup=0.0) for step in range(100)} == {1.0}


def test_each_group_is_clipped_by_itself():
    head = uncork.build_head("plif", 4, 50)
    optimizer = build_optimizer(head, ADAM)
    for group, size in zip(optimizer.param_groups, (1e-3, 1e6), strict=True):
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, size)
    weight = head.weight.grad.clone()
    norms = clip_gradients(optimizer, 1.0, 2.0)
    count = head.weight.numel() + head.bias.numel()
    assert norms[0].item() == pytest.approx(1e-3 * math.sqrt(count), rel=1e-5)
    assert norms[1].item() == pytest.approx(1e6 * math.sqrt(head.logit_function.num_pieces), rel=1e-5)
    # A huge gradient of the function leaves the others' alone, bit for bit.
    assert torch.equal(head.weight.grad, weight)
    (slopes,) = optimizer.param_groups[1]["params"]
    assert slopes.grad.norm().item() == pytest.approx(2.0, rel=1e-4)


def test_an_output_layer_with_its_own_rate_is_clipped_with_the_rest():
    gradients = []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": uncork.build_head("plif", 4, 50)})
        optimizer = build_optimizer(model, ADAM.updated(output_lr_scale=scale))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        norms = clip_gradients(optimizer, 1.0, 2.0)
        assert len(norms) == 2
        gradients.append([parameter.grad for parameter in model.parameters()] + norms)
    assert len(optimizer.param_groups) == 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_zero_means_no_clipping():
    head = uncork.build_head("softmax", 4, 50)
    optimizer = build_optimizer(head, ADAM)
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    (norm,) = clip_gradients(optimizer, 0.0, 0.0)
    assert norm.item() == pytest.approx(7 * math.sqrt(250))
    assert (head.weight.grad == 7).all()


def test_the_trigger_waits_for_five_checks_that_are_no_better():
    assert not averaging_triggered([])
    assert not averaging_triggered([5.0])
    worse = [3.0, 3.1, 3.1, 3.1, 3.1, 3.1]
    assert not averaging_triggered(worse[:5])
    assert not averaging_triggered([3.0, 3.1, 3.1, 3.1, 3.1])
    assert averaging_triggered([*worse, 3.05])
    assert not averaging_triggered([*worse, 2.9])
    # Worse than the best of all, which is among the last five: no reason yet.
    assert not averaging_triggered([5.0, 4.0, 3.9, 3.8, 3.7, 3.6, 3.65])


def test_the_mean_is_that_of_torchs_averaged_sgd():
    """At a constant learning rate torch.optim.ASGD, as AWD-LSTM uses it, has the same mean from its second step on."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, SGD.updated(lr=0.1, weight_decay=0.01))
    asgd = torch.optim.ASGD(theirs.parameters(), lr=0.1, t0=0, lambd=0.0, weight_decay=0.01)
    average = weight_average(ours)
    for step_number in range(7):
        x, y = torch.randn(5, 3), torch.randn(5, 2)
        for model, step in ((ours, optimizer), (theirs, asgd)):
            step.zero_grad()
            (model(x) - y).square().mean().backward()
            step.step()
        if step_number > 0:
            average.update_parameters(ours)
    assert average.n_averaged == 6
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), asgd.state[dict(theirs.named_parameters())[name]]["ax"])


def test_the_mean_rounds_as_its_definition():
    """mean + (w - mean) / n by one lerp in float32: runs of before go on to the same bits."""
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    average = weight_average(model)
    mean = model.weight.detach().clone()
    for count in range(1, 60):
        nn.init.normal_(model.weight)
        average.update_parameters(model)
        mean.lerp_(model.weight.detach(), 1 / count)
        assert torch.equal(average.module.weight.detach(), mean)

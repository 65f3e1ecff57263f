"""Optimisers, the learning-rate schedule, clipping in two groups, and averaged SGD."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

import uncork
from uncork.lab.train.config import Training

TRIGGER_CHECKS = 5
"""Validations that the non-monotone trigger of averaged SGD leaves out of its comparison (arXiv 1708.02182)."""


def build_optimizer(model: nn.Module, training: Training, *, function_lr_scale: float = 1.0) -> torch.optim.Optimizer:
    """AdamW or SGD as `training` says, over the groups of `uncork.parameter_groups`.

    Args:
        model: on its device already.
        training: gives optimizer, lr, output_lr_scale, weight_decay and what it applies to.
        function_lr_scale: factor on the learning rate for the logit functions' parameters.
    """
    groups = uncork.parameter_groups(
        model,
        lr=training.lr,
        decay=training.decay,
        weight_decay=training.weight_decay,
        function_lr_scale=function_lr_scale,
        output_lr_scale=training.output_lr_scale,
    )
    for group in groups:
        group["initial_lr"] = group["lr"]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, fused=True)
    return torch.optim.AdamW(groups, fused=True)


def lr_factor(step: int, steps_total: int, *, schedule: str, warmup: float) -> float:
    """Factor on the learning rate at `step` (from 0): a linear warm-up, then constant or down along half a cosine.

        (step + 1) / w  for step < w = round(warmup * steps_total),   else 1  or  (1 + cos(pi (step - w) / (S - w))) / 2

    >>> [round(lr_factor(step, 6, schedule="cosine", warmup=1 / 3), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    rising = round(warmup * steps_total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - rising) / (steps_total - rising))) / 2


def set_lr(optimizer: torch.optim.Optimizer, factor: float, *, functions: bool = True) -> float:
    """Set each group's learning rate to `factor` times its initial one, and return that of the first group.

    functions: whether the logit functions are trained yet; their rate is 0 otherwise.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor if functions or group["name"] != "function" else 0.0
    lr: float = optimizer.param_groups[0]["lr"]
    return lr


def clip_gradients(optimizer: torch.optim.Optimizer, clip: float, function_clip: float) -> list[Tensor]:
    """Scale the gradients of functions and of all else down to their norm bounds; return the norms before.

    The logit functions' gradients sum over every score of the batch. Clipped together with the rest they would dominate
    the norm and so scale down every other gradient; therefore they have a bound of their own.

    Args:
        optimizer: of `build_optimizer`.
        clip: bound for all other parameters, an output layer with its own learning rate included. function_clip: bound
            for the functions'. 0: no clipping.
    """
    bounds = zip(clipped_together(optimizer), (clip, function_clip), strict=False)
    return [nn.utils.clip_grad_norm_(own, bound if bound > 0 else math.inf) for own, bound in bounds]


def clipped_together(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The groups of parameters that share a norm bound: all but the functions', and the functions' if there are any."""
    functions: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        (functions if group["name"] == "function" else others).extend(group["params"])
    return [own for own in (others, functions) if own]


def averaging_triggered(history: Sequence[float], checks: int = TRIGGER_CHECKS) -> bool:
    """Whether to start averaging: the last validation is worse than the best of all but the last `checks` before it.

    >>> averaging_triggered([4.0, 4.3, 4.2, 4.1], checks=2), averaging_triggered([4.0, 4.3, 4.2, 3.9], checks=2)
    (True, False)

    Merity et al. (2017), arXiv 1708.02182, algorithm 1.
    """
    before = history[:-1]
    return len(before) > checks and history[-1] > min(before[:-checks])


def weight_average(model: nn.Module) -> AveragedModel:
    """The running mean of the weights given to `update_parameters` from now on: the result of averaged SGD.

        mean_n = mean_{n-1} + (w_n - mean_{n-1}) / n

    torch.optim.ASGD keeps such a mean too, but applies a learning rate that changes from step to step one step late.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> average = weight_average(model)
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = nn.init.constant_(model.weight, value)
    ...     average.update_parameters(model)
    >>> average.module.weight.item()
    3.0
    """
    # Given explicitly: torch's default on a CPU is another formula for the same mean, which rounds differently.
    return AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())

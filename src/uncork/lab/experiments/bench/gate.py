"""Correct before fast: our losses and gradients against plain torch in float64."""

import copy
import dataclasses

import torch
from torch import Tensor

from uncork import LogitFunction
from uncork.lab.errors import LabError
from uncork.lab.experiments.bench.contenders import Inputs, Step, build_step
from uncork.lab.experiments.bench.naive import plain_loss
from uncork.lab.experiments.bench.settings import Setup, Shape

# Odd sizes, larger than the native tile's blocks of rows and of words.
GATE_TOKENS, GATE_VOCAB = 65, 2311
TIMES_TORCH = 4.0
"""Allowed error, as a multiple of the error of plain torch in the same dtype."""
FLOOR = 32.0
"""Error allowed in addition, in machine epsilons of the dtype that the loss is computed in."""

TRUTH = 1e-12
"""Relative error of the float64 reference itself."""


def check(name: str, setup: Setup) -> float:
    """The largest ratio of error to allowed error among a contender's loss and gradients; at most 1.

    The error of a tensor is the norm of its difference from the float64 reference, over the norm of the reference.
    Allowed are TIMES_TORCH times the error of plain torch in the setup's dtype, plus FLOOR machine epsilons.

    Raises:
        LabError: an error is larger than allowed, or the contender refuses the setup.
    """
    setup = cut(setup)
    inputs = Inputs(setup)
    _make_exact(inputs)
    step = build_step(name, inputs)
    step.clear()
    try:
        loss = step.run()
    except (TypeError, ValueError) as error:
        raise LabError(f"{name}: {error}") from error
    got = {"loss": loss} | {f"gradient of {n}": t.grad for n, t in step.leaves.items() if t.grad is not None}
    computed = torch.promote_types(inputs.dtype, torch.float32)  # half-precision inputs are computed in float32
    truth = _plain(step, inputs.target, torch.float64, computed)
    own = _plain(step, inputs.target, inputs.dtype, computed)
    floor = max(FLOOR * torch.finfo(computed).eps, TRUTH)
    worst = 0.0
    for what, value in got.items():
        off, torchs = _distance(value, truth[what]), _distance(own[what], truth[what])
        allowed = TIMES_TORCH * torchs + floor
        if not off <= allowed:
            raise LabError(
                f"correctness: {name} at ({setup.shape}) in {setup.dtype}: the {what} is off by {off:.1e} of its norm; "
                f"torch's own is off by {torchs:.1e}, allowed are {allowed:.1e}"
            )
        worst = max(worst, off / allowed)
    return worst


def cut(setup: Setup) -> Setup:
    """The setup with no more rows and words than the check needs."""
    shape = setup.shape
    few = Shape(min(shape.tokens, GATE_TOKENS), shape.in_features, min(shape.vocab_size, GATE_VOCAB))
    return dataclasses.replace(setup, shape=few)


@torch.no_grad()
def _make_exact(inputs: Inputs) -> None:
    """Round the tensors so that every score is an odd multiple of 1 / 256, exact in every dtype from float32 up.

    Otherwise rounding could put a score next to a knot into one piece in float32 and into the next in float64, and the
    difference of the two slopes, both right, would count as an error. No knot of PLIF is an odd multiple of 1 / 256,
    except with numbers of pieces for which the piece is found without rounding.
    """
    inputs.input.mul_(2).round_().div_(2)
    inputs.linear_weight.mul_(64).round_().div_(64)
    if inputs.setup.shape.in_features > 1:
        inputs.input[:, 0], inputs.linear_weight[:, 0] = 1, 1 / 256


def _plain(step: Step, target: Tensor, dtype: torch.dtype, knots_dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of the same step by plain torch in another dtype."""
    function: LogitFunction | None = copy.deepcopy(step.function)
    if function is not None and dtype in (torch.float32, torch.float64):
        function = function.to(dtype)
    own = {} if function is None else {f"function.{n}": p for n, p in function.named_parameters()}
    tensors = {
        name: own[name] if name in own else leaf.detach().to(dtype).requires_grad_()
        for name, leaf in step.leaves.items()
    }
    for tensor in tensors.values():
        tensor.grad = None
    loss = plain_loss(function, tensors, target, knots_dtype)
    loss.backward()
    return {"loss": loss.detach()} | {f"gradient of {n}": t.grad for n, t in tensors.items() if t.grad is not None}


def _distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())

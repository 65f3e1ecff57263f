"""Finds what may see or change a module's output: hooks, replaced forwards, parametrisations, subclasses.

And what runs a model in evaluation mode puts its modes back by `modes_kept`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from uncork.messages import kind_of

# Hooks of these modules leave the output as it is: they shard, move, synchronise, or count.
_ONLY_LOOK = (
    "accelerate.hooks",
    "torch.distributed.fsdp",
    "torch.distributed._composable",
    "torch.distributed._tools",
    "torch.nn.parallel",
    "torch.profiler",
    "torch.utils.module_tracker",
    "torch.utils.flop_counter",
)
_AFTER = ("forward hook", "backward hook", "backward pre-hook")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _local(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for kind, hooks in (
        ("forward hook", module._forward_hooks),
        ("backward hook", module._backward_hooks),
        ("backward pre-hook", module._backward_pre_hooks),
        ("forward pre-hook", module._forward_pre_hooks),
    ):
        for hook in hooks.values():
            yield kind, hook


def _global() -> Iterator[tuple[str, Any]]:
    for kind, hooks in (
        ("forward hook", torch_module._global_forward_hooks),
        ("backward hook", torch_module._global_backward_hooks),
        ("backward pre-hook", torch_module._global_backward_pre_hooks),
        ("forward pre-hook", torch_module._global_forward_pre_hooks),
    ):
        for hook in hooks.values():
            yield f"global {kind}", hook


def _function(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


def origin(hook: Any) -> str:
    """The Python module that a hook or a replaced forward is from."""
    function = _function(hook)
    return getattr(function, "__module__", None) or type(function).__module__


def only_looks(hook: Any) -> bool:
    """Whether a hook or a replaced forward is of those that leave the output as it is."""
    where = origin(hook)
    return any(where == name or where.startswith(f"{name}.") for name in _ONLY_LOOK)


def _named(kind: str, hook: Any) -> str:
    function = _function(hook)
    return f"a {kind} ({getattr(function, '__qualname__', None) or type(function).__qualname__})"


def replaced(module: nn.Module, name: str = "forward") -> Any:
    """What stands in the place of a module's forward; None where it is the class's own.

    Removing accelerate's hooks leaves the class's own there, bound to the module.
    """
    forward = module.__dict__.get(name)
    own = forward is not None and getattr(forward, "__func__", None) is type(module).forward
    return None if own else forward


def seen_by(head: nn.Module, forward: Callable[..., Any]) -> str:
    """Which hook or override may see or change a head's logits, in words; empty if none: the fused paths are then safe.

    Args:
        head: with a `logit_function`. forward: the library's own, which a subclass may have overridden.
    """
    if type(head).forward is not forward:
        return f"{type(head).__name__} overrides forward"
    if replaced(head) is not None:
        return "the head's forward was replaced"
    function = cast("nn.Module | None", head.logit_function)
    for kind, hook in _local(head):
        if kind in _AFTER and not only_looks(hook):
            return f"{_named(kind, hook)} on the head sees the logits"
    for kind, hook in _global():
        # A fused path does not call the function, so a global pre-hook, which would run before it, counts too.
        if (kind.removeprefix("global ") in _AFTER or function is not None) and not only_looks(hook):
            return f"{_named(kind, hook)} sees the logits"
    return "" if function is None else function_changed_by(function)


def on_module(module: nn.Module) -> str:
    """Which hook or replaced forward of a module may see or change its input or output, in words; empty if none."""
    for name in ("forward", "_old_forward"):  # accelerate's hooks replace a forward and keep the one that they found
        forward = replaced(module, name)
        if forward is not None and not only_looks(forward):
            return _named("replaced forward", forward)
    found = (hook for hook in (*_local(module), *_global()) if not only_looks(hook[1]))
    return next((_named(kind, hook) for kind, hook in found), "")


def function_changed_by(function: nn.Module) -> str:
    """Which hook or replaced forward a call of the logit function would run, in words; empty if none.

    Fused paths do not call the function, so they may be used only if there is none.
    """
    for module in function.modules():
        if replaced(module) is not None:
            return f"the forward of {type(module).__name__} in logit_function was replaced"
        for kind, hook in _local(module):
            return f"{_named(kind, hook)} stands on {type(module).__name__} in logit_function"
    return ""


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each module of a model is in the mode that it was in: `model.train()` would put all into the same.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
    >>> with modes_kept(model):
    ...     _ = model.eval()
    >>> [module.training for module in model.modules()]
    [True, True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_plain(linear: object) -> nn.Linear:
    """Returns its argument if it is an nn.Linear that computes W h + b and nothing else; raises what to do otherwise.

    Raises:
        TypeError: no module, another class (adapters and quantised layers are subclasses), a weight of another kind.
        ValueError: parametrisations, hooks, pruning, a replaced forward.
    """
    if not isinstance(linear, nn.Module):
        raise TypeError(f"linear: expected an nn.Linear, got {kind_of(linear)}")
    name = type(linear).__name__
    if parametrize.is_parametrized(linear):
        which = ", ".join(linear.parametrizations)  # type: ignore[arg-type]
        raise ValueError(
            f"linear: expected a plain nn.Linear, got one whose {which} is parametrized: make it plain first "
            f'(torch.nn.utils.parametrize.remove_parametrizations(linear, "{which.split(", ")[0]}")), or parametrize '
            "the head itself"
        )
    if isinstance(linear, nn.LazyLinear):
        raise TypeError("linear: expected an nn.Linear, got LazyLinear, whose shape is not known: call it once first")
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"linear: expected an nn.Linear itself, got {type(linear).__module__}.{name}, whose output may be more "
            "than its weight and bias: merge the adapter (or dequantise, or unwrap) first, or copy the effective "
            "weight into a new nn.Linear"
        )
    if replaced(linear) is not None:
        raise ValueError(
            "linear: expected a plain nn.Linear, got one whose forward was replaced: take that back first, or copy the "
            "effective weight into a new nn.Linear"
        )
    for kind, hook in _local(linear):
        raise ValueError(
            f"linear: expected a plain nn.Linear, got one with {_named(kind, hook)}, which the head would not run: "
            "remove it first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove ...), or copy the "
            "effective weight into a new nn.Linear; hooks may be registered on the head"
        )
    _check_parameters(linear)
    return linear


def _check_parameters(linear: nn.Linear) -> None:
    for name in ("weight", "bias"):
        value: Any = getattr(linear, name)
        if value is None and name == "bias":
            continue
        plain = name in linear._parameters and (
            type(value) is nn.Parameter or isinstance(value, torch._subclasses.FakeTensor)
        )
        dtype = value.dtype if isinstance(value, Tensor) else None
        if not plain or dtype not in _DTYPES:
            raise TypeError(
                f"linear.{name}: expected a plain floating nn.Parameter, got {type(value).__name__} of {dtype}: "
                "dequantise (or gather) it into a new nn.Linear first"
            )

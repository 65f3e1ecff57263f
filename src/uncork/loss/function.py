"""The logit function inside the loss: how it is applied, and the tensors that a tile computes gradients for."""

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uncork.functional import at_least_float32
from uncork.logit_functions.base import LogitFunction, pass_impossible
from uncork.logit_functions.operations import Operation
from uncork.messages import kind_of


class ModuleState(NamedTuple):
    """A user's module as it was when the loss was called: the names of its trainable tensors, and its other tensors."""

    trained: tuple[str, ...]
    constants: dict[str, Tensor]


def check_function(function: nn.Module | None) -> None:
    """Raises unless a logit function is a module that gives the same answer each time it is called."""
    if function is None:
        return
    if not isinstance(function, nn.Module):
        raise TypeError(f"logit_function: expected an nn.Module or None, got {kind_of(function)}")
    for module in function.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            raise ValueError(
                "logit_function: expected a deterministic elementwise module, "
                f"got one that holds {type(module).__name__}"
            )


def checked_logits(logits: Any, scores: Tensor) -> Tensor:
    """The logits that a module returned, in the dtype of the scores or float32, if that is better.

    Raises unless they are a floating Tensor of the scores' shape, as an elementwise module gives.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logit_function: expected a module that returns a Tensor, got {kind_of(logits)}")
    if not logits.is_floating_point():
        raise TypeError(f"logit_function: expected a module that returns a floating dtype, got {logits.dtype}")
    if logits.shape != scores.shape:
        raise ValueError(
            f"logit_function: expected an elementwise module, but it turned shape {tuple(scores.shape)} "
            f"into {tuple(logits.shape)}"
        )
    return logits.to(torch.promote_types(scores.dtype, torch.float32))


def apply_function(function: nn.Module | None, scores: Tensor) -> Tensor:
    """f(scores), where -inf stays and takes no gradient, whatever the function.

    A function that is not this package's gets a copy, since it may work in place.
    """
    if function is None:
        return pass_impossible(at_least_float32, scores)
    copies = not _is_ours(function)
    if isinstance(function, LogitFunction) and function.operations() != ():  # it handles -inf itself
        return checked_logits(function(scores.clone() if copies else scores), scores)

    def transform(finite: Tensor) -> Tensor:
        wide = at_least_float32(finite)
        return checked_logits(function(wide.clone() if copies and wide is scores else wide), finite)

    return pass_impossible(transform, scores)


def _is_ours(function: nn.Module) -> bool:
    package = __name__.partition(".")[0]
    return all(type(module).__module__.partition(".")[0] == package for module in function.modules())


def operations_of(function: nn.Module) -> Sequence[Operation] | None:
    """A LogitFunction's primitives; None if only autograd can differentiate the function."""
    return function.operations() if isinstance(function, LogitFunction) else None


def no_kernel(function: nn.Module | None, kinds: Container[type[Operation]], longest: int, most_pieces: int) -> str:
    """Why a tile with kernels for these primitives cannot compute the function; empty if it can.

    longest: primitives of a chain. most_pieces: pieces or units, exclusive.
    """
    if function is None:
        return ""
    operations = operations_of(function)
    if operations is None:
        return f"{type(function).__name__} is not made of its primitives"
    if len(operations) > longest:
        return f"a chain of {len(operations)} primitives is longer than {longest}"
    unknown = [type(operation).__name__ for operation in operations if type(operation) not in kinds]
    if unknown:
        return f"it has no kernel for {', '.join(unknown)}"
    pieces = [max(getattr(f, "num_pieces", 0), getattr(f, "num_units", 0)) for f in function.modules()]
    return f"it takes fewer than {most_pieces} pieces" if max(pieces) >= most_pieces else ""


def module_state(function: nn.Module | None) -> ModuleState | None:
    """The present state of a module that only autograd can differentiate; None for any other function."""
    if function is None or operations_of(function) is not None:
        return None
    tensors = _tensors(function)
    trained = tuple(name for name, t in tensors.items() if t.requires_grad)
    return ModuleState(trained, {name: t for name, t in tensors.items() if not t.requires_grad})


def function_parameters(function: nn.Module | None, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The tensors that a tile computes gradients for: a LogitFunction's tables, another module's trainable tensors."""
    if function is None:
        return []
    if isinstance(function, LogitFunction) and function.operations() is not None:
        return [table.to(device) for table in function.tables(dtype, device)]
    return [t for t in _tensors(function).values() if t.requires_grad]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())

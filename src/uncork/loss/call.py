"""A validated call, the checks that it passes, and the interface of the implementations that compute it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uncork.logit_functions.operations import readable
from uncork.loss.function import ModuleState, check_function
from uncork.loss.memory import MemoryEstimate
from uncork.loss.target import IndexTarget, ProbabilityTarget, Target
from uncork.messages import position


class Statistics(NamedTuple):
    """Per token: cross_entropy, logsumexp, entropy (N,) in float32 or better, argmax (N,) int64; None if not asked."""

    cross_entropy: Tensor | None
    logsumexp: Tensor
    entropy: Tensor | None
    argmax: Tensor | None


def loss_dtype(input: Tensor) -> torch.dtype:
    """The dtype of function, softmax and loss of an input."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


_BFLOAT16_INSTRUCTIONS = torch.backends.mkldnn.is_available() and bool(
    getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
)  # asked once, at import: torch.compile and torch.export cannot trace the question


def multiplies_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 on this processor with its own instructions for it (avx512_bf16)."""
    return _BFLOAT16_INSTRUCTIONS


LIMIT = 2**63  # of int64, the whole numbers of torch


@dataclass(frozen=True)
class Call:
    """Flattened arguments. N tokens, D features, K components, V vocabulary."""

    input: Tensor  # (N, D), or the latent (N, K, D) of a mixture
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    prior_logits: Tensor | None  # (N, K), of a mixture
    function: nn.Module | None
    target: Target | None
    details: bool = False  # whether entropy and argmax are computed too
    chunk_size: int | None = None  # rows of scores at once
    memory_budget: int | None = None  # bytes of scores at once, if chunk_size is None
    scores_dtype: torch.dtype | None = None  # of the scores and the products; None chooses
    module_state: ModuleState | None = None  # of a function that only autograd can differentiate

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of function, softmax and loss."""
        return loss_dtype(self.input)

    @property
    def products_dtype(self) -> torch.dtype:
        """The dtype of the scores W h and of the matrix products."""
        if self.scores_dtype is not None:
            return self.scores_dtype
        rounded = self.input.dtype == torch.bfloat16 and self.input.device.type == "cpu" and multiplies_bfloat16()
        return torch.bfloat16 if rounded else self.dtype

    @property
    def tokens(self) -> int:
        return self.input.shape[0]

    @property
    def components(self) -> int:
        return 1 if self.prior_logits is None else self.input.shape[1]

    def tensors(self) -> list[Tensor]:
        """Those that it multiplies and mixes, as far as they are given."""
        return [t for t in (self.input, self.weight, self.bias, self.prior_logits) if t is not None]


class Implementation(ABC):
    """One way to compute losses and statistics; `refuses` says which calls it does not support."""

    def refuses(self, call: Call) -> str:
        """Why this call cannot be served (`Missing` where an install would change that); empty if it can."""
        return ""

    def variant(self) -> str:
        """Which of its builds runs here; empty if there is but one."""
        return ""

    def memory(self, call: Call, gradients: bool) -> MemoryEstimate:
        """What a scalar reduction with index targets needs; the call has no target and may be of `Described` tensors.

        Args:
            gradients: whether all inputs and the function's parameters get theirs, or there is a forward alone.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how much memory it needs")

    @abstractmethod
    def statistics(self, call: Call) -> Statistics:
        """Per-token statistics, differentiable but for argmax."""

    def weighted_sum(self, call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
        """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2."""
        ce, lse, _, _ = self.statistics(call)
        assert ce is not None
        assert call.target is not None
        total = (ce_factor * ce).sum()
        if lse_factor is not None:
            total = total + (lse_factor * torch.where(call.target.kept, lse, 0).square()).sum()
        return total


class Missing(str):
    """A reason that lies with the machine and not with the call: a user is told, once, what is missing."""


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense Tensor, got {value.layout}")
    return value


def checked_factor(name: str, value: object, device: torch.device) -> Tensor:
    """A tensor of real numbers on the device, whatever its dtype."""
    factor = _tensor(name, value)
    if factor.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {factor.dtype}")
    _expect(factor.device == device, name, f"device {device} as the input", factor.device)
    return factor


def check_number(name: str, value: object, kind: type = Real) -> None:
    """Raises a TypeError unless the value is a plain number (of Python or numpy) of that kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {'a whole' if kind is Integral else 'a'} number, got {type(value).__name__}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that F.linear would compute in under the autocast in force, if any."""
    if not _has_autocast(device) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside; some devices (meta) have none to switch off."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device) else nullcontext()


def _has_autocast(device: torch.device) -> bool:
    if torch.compiler.is_compiling():  # torch 2.6 cannot trace the query
        return device.type != "meta"
    return torch.amp.is_autocast_available(device.type)


def _checked_matrix(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, name: str) -> None:
    _expect(linear_weight.dim() == 2, "linear_weight", "shape (V, D)", tuple(linear_weight.shape))
    vocab_size, features = linear_weight.shape
    _expect(vocab_size > 0, "linear_weight", "at least one class", tuple(linear_weight.shape))
    _expect(features > 0, "linear_weight", "at least one feature", tuple(linear_weight.shape))
    _expect(
        input.dim() >= 1 and input.shape[-1] == features,
        name,
        f"shape (..., {features}) to match linear_weight {tuple(linear_weight.shape)}",
        tuple(input.shape),
    )
    named = {name: input, "linear_weight": linear_weight}
    if linear_bias is not None:
        _tensor("linear_bias", linear_bias)
        _expect(tuple(linear_bias.shape) == (vocab_size,), "linear_bias", f"({vocab_size},)", tuple(linear_bias.shape))
        named["linear_bias"] = linear_bias
    for key, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{key}: expected a floating dtype, got {tensor.dtype}")
        _expect(tensor.device == input.device, key, f"device {input.device} as {name}", tensor.device)
        if autocast_dtype(input.device) is None:
            _expect(tensor.dtype == input.dtype, key, f"dtype {input.dtype} as {name}", tensor.dtype)


def _checked_target(
    target: Tensor, leading: tuple[int, ...], vocab_size: int, ignore_index: int, device: torch.device
) -> Tensor:
    """The target flattened to (N,) integers or (N, V) probabilities."""
    _expect(target.device == device, "target", f"device {device} as the input", target.device)
    if target.is_floating_point():
        _expect(
            tuple(target.shape) == (*leading, vocab_size),
            "target",
            f"shape {(*leading, vocab_size)} for probabilities (indices are integers: target.long())"
            if tuple(target.shape) == leading
            else f"shape {(*leading, vocab_size)} for probabilities",
            tuple(target.shape),
        )
        _expect(not target.requires_grad, "target", "no gradient (requires_grad=False)", "requires_grad=True")
        _expect(ignore_index < 0, "ignore_index", "a negative number with probability targets", ignore_index)
        return target.reshape(-1, vocab_size)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(f"target: expected integers (indices) or a floating dtype (probabilities), got {target.dtype}")
    _expect(
        tuple(target.shape) == leading,
        "target",
        f"shape {leading} for indices (probabilities are floating: target.float())"
        if tuple(target.shape) == (*leading, vocab_size)
        else f"shape {leading} for indices",
        tuple(target.shape),
    )
    # In int64: a short integer dtype would wrap V or ignore_index around.
    flat = target.reshape(-1).long()
    if readable(flat):
        check_classes(flat, flat != ignore_index, vocab_size, leading, f" or ignore_index {ignore_index}")
    return flat


def _prepared_target(
    rows: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    vocab_size: int,
    dtype: torch.dtype,
) -> Target:
    """The target of flattened indices or probabilities, with the class weights checked."""
    class_weight = _checked_weight(weight, vocab_size, dtype, rows.device)
    if rows.is_floating_point():
        return ProbabilityTarget.build(rows, class_weight, label_smoothing, dtype)
    like = torch.empty((), dtype=dtype, device=rows.device)
    return IndexTarget.build(rows, ignore_index, class_weight, label_smoothing, vocab_size, like)


def check_classes(target: Tensor, kept: Tensor, vocab_size: int, shape: Sequence[int], other: str = "") -> None:
    """Raises an IndexError unless the targets (N,) that count are in [0, V).

    Args:
        shape: that of the targets as they were given. other: what else may be there.
    """
    wrong = ((target < 0) | (target >= vocab_size)) & kept
    if bool(wrong.any()):
        where = int(wrong.int().argmax())
        raise IndexError(
            f"target: expected classes in [0, {vocab_size}){other}, got {int(target[where])}{position(where, shape)}"
        )


def _checked_weight(weight: Tensor | None, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if weight is None:
        return None
    checked_factor("weight", weight, device)
    _expect(tuple(weight.shape) == (vocab_size,), "weight", f"({vocab_size},)", tuple(weight.shape))
    _expect(not weight.requires_grad, "weight", "no gradient (requires_grad=False)", "requires_grad=True")
    return weight.to(dtype)


def checked_chunk(chunk_size: int | None, memory_budget: int | None) -> tuple[int | None, int | None]:
    """Both as Python's own numbers (they may be numpy's); raises unless one at most is given, and at least 1."""
    given: dict[str, tuple[object, str]] = {
        "chunk_size": (chunk_size, "rows of scores"),
        "memory_budget": (memory_budget, "bytes"),
    }
    for key, (size, unit) in given.items():
        whole = not isinstance(size, bool) and isinstance(size, Integral) and int(size) > 0
        _expect(size is None or whole, key, f"a whole number of at least 1 ({unit}), or None", repr(size))
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(f"memory_budget: expected None beside chunk_size={chunk_size}, got {memory_budget}")
    rows, size = (None if given is None else min(int(given), LIMIT - 1) for given in (chunk_size, memory_budget))
    return rows, size


def check_scores_dtype(asked: object, input: Tensor) -> None:
    """Raises unless the scores of an input can be kept in the dtype asked for."""
    if asked is None:
        return
    if not isinstance(asked, torch.dtype):
        raise TypeError(f"scores_dtype: expected a torch.dtype or None, got {type(asked).__name__}")
    if asked == torch.float16:
        raise ValueError(
            "scores_dtype: expected torch.float32 with float16 inputs, got torch.float16: "
            "products beyond 65,504 would overflow, and nothing here scales them"
        )
    allowed = [loss_dtype(input), *([torch.bfloat16] if input.dtype == torch.bfloat16 else [])]
    names = " or ".join(map(str, allowed))
    _expect(asked in allowed, "scores_dtype", f"None or {names} with inputs of {input.dtype}", asked)


def _checked_prior(prior_logits: Tensor, latent: Tensor) -> Tensor:
    """The prior's logits flattened to (N, K)."""
    leading = tuple(latent.shape[:-1])
    _expect(latent.dim() >= 2, "latent", "shape (..., K, D)", tuple(latent.shape))
    shape = tuple(_tensor("prior_logits", prior_logits).shape)
    _expect(shape == leading, "prior_logits", f"shape {leading} to match latent {tuple(latent.shape)}", shape)
    if not prior_logits.is_floating_point():
        raise TypeError(f"prior_logits: expected a floating dtype, got {prior_logits.dtype}")
    _expect(leading[-1] > 0, "latent", "at least one component", tuple(latent.shape))
    _expect(prior_logits.device == latent.device, "prior_logits", f"device {latent.device}", prior_logits.device)
    return prior_logits.reshape(-1, leading[-1])


def build_call(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    *,
    prior_logits: Tensor | None = None,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    scores_dtype: torch.dtype | None = None,
    details: bool = False,
) -> tuple[Call, tuple[int, ...]]:
    """Checks the arguments; returns the call and the leading shape of its tokens.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came.
    """
    mixture = prior_logits is not None
    name = "latent" if mixture else "input"
    _tensor(name, input), _tensor("linear_weight", linear_weight)
    _checked_matrix(input, linear_weight, linear_bias, name)
    check_function(logit_function)
    ignore_index = -100 if ignore_index is None else ignore_index
    check_number("ignore_index", ignore_index, Integral)
    _expect(-LIMIT <= ignore_index < LIMIT, "ignore_index", "a number of 64 bits (int64)", ignore_index)
    ignore_index = int(ignore_index)
    check_number("label_smoothing", label_smoothing)
    _expect(0 <= label_smoothing <= 1, "label_smoothing", "a number in [0, 1]", label_smoothing)
    label_smoothing = float(label_smoothing)
    chunk_size, memory_budget = checked_chunk(chunk_size, memory_budget)
    leading = tuple(input.shape[:-1])
    if prior_logits is not None:
        prior_logits, leading = _checked_prior(prior_logits, input), leading[:-1]
    vocab_size, features = linear_weight.shape
    cast = autocast_dtype(input.device)
    if cast is not None and input.dtype != torch.float64:
        input, linear_weight = input.to(cast), linear_weight.to(cast)
        linear_bias = None if linear_bias is None else linear_bias.to(cast)
    check_scores_dtype(scores_dtype, input)
    flat = input.reshape(-1, *input.shape[-2:]) if mixture else input.reshape(-1, features)
    prepared: Target | None = None
    if target is not None:
        rows = _checked_target(_tensor("target", target), leading, vocab_size, ignore_index, input.device)
        prepared = _prepared_target(rows, weight, ignore_index, label_smoothing, vocab_size, loss_dtype(input))
    call = Call(
        flat,
        linear_weight,
        linear_bias,
        prior_logits,
        logit_function,
        prepared,
        details,
        chunk_size,
        memory_budget,
        scores_dtype,
    )
    return call, leading

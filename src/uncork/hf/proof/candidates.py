"""Says which wrong computation a measured one is: the function left out, applied twice, its parts in another order ...

Shapes in comments: N tokens, D features, V vocabulary, U of them left by the model.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from uncork.hf.proof.reference import Reading, Reference
from uncork.logit_functions import Compose, Scale, Softcap
from uncork.loss.function import apply_function

Map = Callable[[Tensor, Tensor], Tensor]
"""From scores (N, V) and the hidden states (N, D) that they were made of to logits."""

ROUNDED = "the function computed in "
# A candidate is named if it is within this share of what was measured, and this many times nearer than f.
_NEAR, _NEARER = 0.03, 4.0


def candidates(reference: Reference, others: Mapping[str, nn.Module | None]) -> dict[str, Map]:
    """Wrong maps from scores to logits, by what they are.

    Args:
        others: functions that other paths of the model have, by what to call them.
    """
    reading, words = reference.reading, reference.reading.words
    maps: dict[str, Map] = {}
    if reference.function is not None:
        maps["no function"] = lambda z, _: z
        maps["the function applied twice"] = lambda z, _: reference.apply(reference.apply(z))
        maps |= {name: _first(parts) for name, parts in _other_parts(reference.function).items()}
    for name, function in others.items():
        maps[name] = partial(_applied, function)
    if reference.plain and reference.bias is not None:
        bias = reference.bias.detach().cpu().double()
        maps["no bias"] = lambda z, _: reference.apply(z - bias)
    if not reference.plain and not reference.within:
        weight = reference.weight.detach().cpu().double()
        maps["W h alone, without what the output layer does beside"] = lambda _, hidden: reference.apply(
            hidden @ weight.T
        )
    narrowed: dict[str, Map] = {name: partial(_narrowed, apply, words) for name, apply in maps.items()}
    if words.indices(len(reference.weight)) != slice(None).indices(len(reference.weight)):
        narrowed["all rows of the weight, padding included"] = lambda z, _: reference.apply(z)
    if any(kind == "step" for kind, _ in reading.replay):
        for low in (torch.bfloat16, torch.float16):
            narrowed[f"{ROUNDED}{str(low).removeprefix('torch.')}"] = partial(_rounded, reading, low)
    return narrowed


def _first(apply: Callable[[Tensor], Tensor]) -> Map:
    return lambda z, _: apply(z)


def _applied(function: nn.Module | None, z: Tensor, _: Tensor) -> Tensor:
    return z if function is None else apply_function(function, z)


def _narrowed(apply: Map, words: slice, z: Tensor, hidden: Tensor) -> Tensor:
    return apply(z, hidden)[..., words]


def _rounded(reading: Reading, dtype: torch.dtype, z: Tensor, _: Tensor) -> Tensor:
    logits = z.detach().to(dtype)
    for kind, replay in reading.replay:
        logits = logits if kind == "cast" else replay(logits)
    return logits.double()


def _other_parts(function: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Maps that a Scale, a Softcap and their composition are mistaken for."""
    parts = list(function.functions) if isinstance(function, Compose) else [function]
    maps: dict[str, Callable[[Tensor], Tensor]] = {}
    for index, part in enumerate(parts):
        around = partial(_chain, parts[:index], parts[index + 1 :])
        if len(parts) > 1:
            maps[f"{part} left out"] = partial(around, [])
        if isinstance(part, Scale):
            s = part.factor
            maps[f"{1 / s:g} z in place of {s:g} z"] = partial(around, [partial(torch.mul, torch.tensor(1 / s))])
        if isinstance(part, Softcap):
            c, right = part.cap, f"in place of {part.cap:g} tanh(z / {part.cap:g})"
            maps[f"z tanh(z / {c:g}) {right}"] = partial(around, [lambda z, c=c: z * torch.tanh(z / c)])
            maps[f"{c:g} tanh(z) {right}"] = partial(around, [lambda z, c=c: c * torch.tanh(z)])
            maps[f"tanh(z / {c:g}) {right}"] = partial(around, [lambda z, c=c: torch.tanh(z / c)])
    if len(parts) > 1:
        named = ", then ".join(str(part) for part in reversed(parts))
        maps[f"its parts in the opposite order, {named}"] = partial(_chain, parts[::-1], [], [])
    return maps


def _chain(
    before: Sequence[Callable[[Tensor], Tensor]],
    after: Sequence[Callable[[Tensor], Tensor]],
    between: Sequence[Callable[[Tensor], Tensor]],
    z: Tensor,
) -> Tensor:
    for apply in (*before, *between, *after):
        z = apply(z)
    return z


def nearest(measured: Tensor, right: Tensor, wrong: Mapping[str, Tensor]) -> str:
    """Which of the wrong values the measured ones are, or which multiple of the right ones; empty if none.

    Args:
        measured, right: (N, ...). wrong: the same, by name; those of another shape are passed over.
    """
    measured, right = measured.double(), right.double()
    if not bool(measured.isfinite().all()):
        return "nan or infinite values"
    options = {name: value.double() for name, value in wrong.items() if value.shape == measured.shape}
    if measured.shape == right.shape:
        scale = float((measured * right).sum() / (right * right).sum().clamp(min=1e-300))
        options[f"{scale:.4g} times the right value"] = scale * right
    distances = {name: _distance(measured, value) for name, value in options.items()}
    best = min(distances, key=distances.__getitem__, default="")
    if not best or distances[best] > _NEAR:
        return ""
    if measured.shape == right.shape and _NEARER * distances[best] > _distance(measured, right):
        return ""
    return best


def _distance(a: Tensor, b: Tensor) -> float:
    """Mean over tokens of |a - b| / (|a| + |b|)."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    size = (a.abs() + b.abs()).sum(-1)
    return float(((a - b).abs().sum(-1) / size.clamp(min=1e-300)).mean())

"""A head by its name, or from its spec."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uncork.heads.base import Head
from uncork.heads.layers import ContextMixtureHead, LinearHead, MixtureHead
from uncork.logit_functions import (
    PLIF,
    Compose,
    GeneralizedSigsoftmax,
    LogitFunction,
    MonotoneNetwork,
    Scale,
    Sigsoftmax,
    Softcap,
)
from uncork.logit_functions.base import positive

_CLASSES: dict[str, Callable[..., Head]] = {c.__name__: c for c in (LinearHead, MixtureHead, ContextMixtureHead)}


def _temperature(factor: float = 1.0) -> LogitFunction:
    return Scale(factor, learnable=True)


def _frozen_plif(num_pieces: int = 100, bound: float = 20.0, spread: float = 1.0) -> LogitFunction:
    return PLIF(num_pieces, bound, init="random", spread=spread, frozen=True)


# name -> (head class, maker of the function): what `build_head` puts together.
_HEADS: dict[str, tuple[Callable[..., Head], Callable[..., LogitFunction] | None]] = {
    "softmax": (LinearHead, None),
    "temperature": (LinearHead, _temperature),
    "softcap": (LinearHead, Softcap),
    "sigsoftmax": (LinearHead, Sigsoftmax),
    "gss": (LinearHead, GeneralizedSigsoftmax),
    "monotone": (LinearHead, MonotoneNetwork),
    "plif": (LinearHead, PLIF),
    "plif-frozen": (LinearHead, _frozen_plif),
    "mos": (MixtureHead, None),
    "moss": (MixtureHead, Sigsoftmax),
    "mop": (MixtureHead, PLIF),
    "moc": (ContextMixtureHead, None),
}
HEAD_NAMES: tuple[str, ...] = tuple(_HEADS)
_DEFAULT_COMPONENTS = 4


def build_head(
    name: str,
    in_features: int,
    vocab_size: int,
    *,
    scale: float = 1.0,
    bias_init: Tensor | None = None,
    **options: Any,
) -> Head:
    """A head by its name.

    | name | distribution | own options |
    |---|---|---|
    | softmax | softmax(W h + b) | |
    | temperature | f(z) = s z, s learned | factor |
    | softcap | f(z) = c tanh(z / c) | cap |
    | sigsoftmax, gss | f(z) = z + (k - 1) log sigmoid(z - c) | center, steepness, learnable (gss) |
    | monotone | one hidden layer of positive weights | num_units, bound, units, init, spread, frozen |
    | plif | piecewise linear increasing function | num_pieces, bound, init, spread, frozen, unit_slope |
    | plif-frozen | random slopes that do not train | num_pieces, bound, spread |
    | mos, moss, mop | mixture of softmax, sigsoftmax, PLIF | num_components (4), latent_features, latent_activation |
    | moc | mixture of contexts, one softmax | as mos |

    mop has plif's options too.

    Args:
        name: one of HEAD_NAMES. in_features: D. vocab_size: V.
        scale: a fixed positive factor on the scores, f(scale * (W h + b)); Adam's steps do not scale with it, so it
            sets how fast the logits can move.
        bias_init: (V,) counts of the words; the bias starts at the log unigram (a word never seen counts 1/2),
            divided by the scale and by temperature's factor.
        options: bias (True), and the options of the table.

    >>> build_head("plif", 16, 1000, num_pieces=50).logit_function
    PLIF(num_pieces=50, bound=20.0, init='identity', spread=1.0, frozen=False, unit_slope=False)

    >>> build_head("softmax", 16, 1000, scale=2.0).logit_function
    Scale(factor=2.0, learnable=False)

    Raises:
        ValueError: for an unknown name (the message lists them) or an option out of range.
        TypeError: for an option that the head does not have.
    """
    if name not in _HEADS:
        raise ValueError(f"name: expected one of {', '.join(HEAD_NAMES)}, got {name!r}")
    head_class, maker = _HEADS[name]
    own = set(inspect.signature(maker).parameters) if maker else set()
    shaping = (
        {"bias"} if head_class is LinearHead else {"bias", "num_components", "latent_features", "latent_activation"}
    )
    unknown = set(options) - own - shaping
    if unknown:
        known = ", ".join(sorted(own | shaping | {"scale"}))
        raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}; expected some of {known}")
    function = maker(**{k: v for k, v in options.items() if k in own}) if maker else None
    if positive("scale", scale) != 1:
        function = Scale(scale) if function is None else Compose(Scale(scale), function)
    rest = {k: v for k, v in options.items() if k in shaping}
    if head_class is not LinearHead:
        rest.setdefault("num_components", _DEFAULT_COMPONENTS)
    head = head_class(in_features, vocab_size, logit_function=function, **rest)
    if bias_init is not None:
        start_at_unigram(head, bias_init)
        with torch.no_grad():
            head.bias.div_(scale * options.get("factor", 1.0))  # type: ignore[union-attr]
    return head


def start_at_unigram(head: Head, counts: Tensor) -> None:
    """Sets the bias to log(counts / total), and a count of 0 to 1/2 first.

    Args:
        head: with a bias. counts: (V,), at least 0, not all 0.
    """
    if head.bias is None:
        raise ValueError("bias_init: expected a head with a bias, got bias=False")
    if not isinstance(counts, Tensor):
        raise TypeError(f"bias_init: expected a Tensor, got {type(counts).__name__}")
    if tuple(counts.shape) != (head.vocab_size,):
        raise ValueError(f"bias_init: expected shape ({head.vocab_size},), got {tuple(counts.shape)}")
    if not bool((counts >= 0).all()) or not bool((counts > 0).any()) or bool(counts.isinf().any()):
        raise ValueError("bias_init: expected finite counts of at least 0 that are not all 0")
    smoothed = counts.double().clamp(min=0.5)
    with torch.no_grad():
        head.bias.copy_((smoothed / smoothed.sum()).log())


def head_from_spec(spec: dict[str, Any]) -> Head:
    """The head that `Head.spec()` described, at its start; load a state_dict for its parameters.

    >>> head_from_spec(build_head("mos", 8, 100, num_components=2).spec()).num_components
    2
    """
    if spec.get("name") not in _CLASSES:
        raise ValueError(f"spec: expected a name among {sorted(_CLASSES)}, got {spec.get('name')!r}")
    if not isinstance(spec.get("options"), dict):
        raise ValueError(f"spec: expected options, got {spec!r}")
    function = spec.get("logit_function")
    made = None if function is None else LogitFunction.from_spec(function)
    return _CLASSES[spec["name"]](**spec["options"], logit_function=made)

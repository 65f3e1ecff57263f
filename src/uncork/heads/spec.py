"""One table of all heads, and `HeadSpec`, a name in it with options, which can be parsed, printed and built.

A new head is one entry of the table: build_head, the command line, tables, figures and reports take it from there.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, Self

import torch
from torch import Tensor

from uncork.arguments import is_switch, positive
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
from uncork.logit_functions.base import bisected
from uncork.loss.function import apply_function
from uncork.messages import close_to, kind_of, unknown_options


def _temperature(factor: float = 1.0) -> LogitFunction:
    return Scale(factor, learnable=True)


def _frozen_plif(num_pieces: int = 100, bound: float = 20.0, spread: float = 1.0) -> LogitFunction:
    return PLIF(num_pieces, bound, init="random", spread=spread, frozen=True)


_mixture = partial(MixtureHead, num_components=4)
_context_mixture = partial(ContextMixtureHead, num_components=4)


@dataclass(frozen=True)
class _Kind:
    """An entry of the table. Options and their defaults are those of `layer` and `function`.

    Attributes:
        layer: builds the head from D, V and its options. function: builds its logit function from its options, or None.
        distribution: what it computes, for the table of `build_head`.
        called: its name in prose. colour: of its lines and dots in every figure, of medium lightness.
        dashes: dash, gap, ... of its lines in points; () is a solid line. heavy: whether they are drawn thicker.
        learns: whether the shape of its function is learned.
        as_control: its name in sentences about controls; empty if it is no control.
        control_of: the names of the heads that it is a control for; () means all that learn a function.
    """

    layer: Callable[..., Head]
    function: Callable[..., LogitFunction] | None
    distribution: str
    called: str
    colour: str
    dashes: tuple[float, ...] = ()
    heavy: bool = False
    learns: bool = False
    as_control: str = ""
    control_of: tuple[str, ...] = ()


# In the order of tables: controls near what they control.
_KINDS: dict[str, _Kind] = {
    "softmax": _Kind(LinearHead, None, "softmax(W h + b)", "softmax", "#1b1f24", heavy=True),
    "temperature": _Kind(
        LinearHead, _temperature, "f(z) = s z, s learned", "temperature", "#6a7280", (1, 1.2),
        as_control="a learned temperature",
    ),
    "softcap": _Kind(
        LinearHead, Softcap, "f(z) = c tanh(z / c)", "softcap", "#a9772b", (5, 1.5, 1, 1.5), as_control="a softcap"
    ),
    "sigsoftmax": _Kind(LinearHead, Sigsoftmax, "f(z) = z + log sigmoid(z)", "sigsoftmax", "#e0730a"),
    "gss": _Kind(LinearHead, GeneralizedSigsoftmax, "f(z) = z + (k - 1) log sigmoid(z - c)", "GSS", "#bd9a00"),
    "monotone": _Kind(
        LinearHead, MonotoneNetwork, "one hidden layer of positive weights", "monotone", "#00967f", learns=True
    ),
    "plif": _Kind(
        LinearHead, PLIF, "piecewise linear increasing function", "PLIF", "#2878d4", heavy=True, learns=True
    ),
    "plif-frozen": _Kind(
        LinearHead, _frozen_plif, "random slopes that do not train", "frozen PLIF", "#4f9be8", (4, 1.8),
        as_control="the frozen random PLIF",
    ),
    "mos": _Kind(_mixture, None, "mixture of softmaxes", "MoS", "#c63d8f"),
    "moss": _Kind(_mixture, Sigsoftmax, "mixture of sigsoftmaxes", "MoSS", "#9a5fe0"),
    "mop": _Kind(_mixture, PLIF, "mixture of softmaxes of PLIF", "MoP", "#d9534f", learns=True),
    "moc": _Kind(
        _context_mixture, None, "mixture of contexts, one softmax", "MoC", "#7d8c36", (3.7, 1.6),
        as_control="the mixture of contexts", control_of=("mos", "moss"),
    ),
}  # fmt: skip
HEAD_NAMES: tuple[str, ...] = tuple(_KINDS)


@dataclass(frozen=True)
class HeadSpec:
    """A head's name and options: how it is written in text, and how it is built.

    Two specs are equal where they build the same head: options at their default are dropped, the others stand in the
    order of `defaults`.

    Args:
        name: one of HEAD_NAMES. options: those of `build_head` but bias_init, in JSON's types.

    >>> spec = HeadSpec.parse("plif:scale=4,num_pieces=50,bound=20")
    >>> str(spec), spec.title, spec == HeadSpec("plif", {"num_pieces": 50, "scale": 4.0})
    ('plif:num_pieces=50,scale=4', 'plif (num_pieces=50, scale=4)', True)
    >>> spec.build(16, 1000).logit_function(torch.tensor([-1.0, 2.0])).tolist()
    [-4.0, 8.0]

    Raises:
        ValueError: for an unknown name; the message lists them.
        TypeError: for an option that the head does not have; the message lists those that it has, with their defaults.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            near = close_to(str(self.name), HEAD_NAMES)
            raise ValueError(f"name: expected one of {', '.join(HEAD_NAMES)}, got {self.name!r}{near}")
        defaults = self.defaults
        check_options(self.name, self.options, defaults)
        own = {key: _plain(self.options[key]) for key in defaults if key in self.options}
        own = {key: value for key, value in own.items() if not _same(value, defaults[key])}
        object.__setattr__(self, "options", own)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the command line's form, name or name:key=value,key=value.

        Values are JSON's, Python's True, False and None, or plain words.

        >>> HeadSpec.parse("mos:latent_activation=null,bias=false").options
        {'latent_activation': None, 'bias': False}

        Raises:
            ValueError: for any other text, an unknown name or option, or an option that is given twice.
        """
        name, options = parse_text(text)
        try:
            return cls(name, options)
        except TypeError as error:
            raise ValueError(str(error)) from None

    def __str__(self) -> str:
        """The text that `parse` reads, the same for equal specs."""
        return f"{self.name}:{_joined(self.options, ',')}" if self.options else self.name

    @property
    def title(self) -> str:
        """What tables, legends and reports call it: "softmax", "plif (num_pieces=50, scale=4)"."""
        return titled(self.name, self.options)

    @property
    def called(self) -> str:
        """Its name in prose, without options: "frozen PLIF"."""
        return _KINDS[self.name].called

    @property
    def order(self) -> int:
        """Its place among the heads of a table."""
        return HEAD_NAMES.index(self.name)

    @property
    def colour(self) -> str:
        """Of its lines and dots in every figure, as "#2878d4"."""
        return _KINDS[self.name].colour

    @property
    def dashes(self) -> tuple[float, ...]:
        """Dash, gap, ... of its lines in points; () is a solid line."""
        return _KINDS[self.name].dashes

    @property
    def heavy(self) -> bool:
        """Whether its lines are drawn thicker than the others."""
        return _KINDS[self.name].heavy

    @property
    def control_of(self) -> tuple[str, ...]:
        """The heads that it is a control for: simpler than they are, it shows which part of their gain it has too."""
        kind = _KINDS[self.name]
        learned = tuple(name for name, other in _KINDS.items() if other.learns)
        return (kind.control_of or learned) if kind.as_control else ()

    @property
    def is_control(self) -> bool:
        """Whether it is in the table as a control for other heads."""
        return bool(_KINDS[self.name].as_control)

    @property
    def as_control(self) -> str:
        """Its name in sentences about controls: "the frozen random PLIF"; its plain name if it is no control."""
        return _KINDS[self.name].as_control or self.name

    @property
    def controls(self) -> tuple[str, ...]:
        """The heads that a gain of this one has to be measured against, beside the softmax."""
        return tuple(name for name in HEAD_NAMES if self.name in HeadSpec(name).control_of)

    @property
    def learns_function(self) -> bool:
        """Whether the shape of its function is learned (a temperature's is a line, whatever its slope)."""
        return _KINDS[self.name].learns

    @property
    def is_mixture(self) -> bool:
        """Whether it has several components."""
        return "num_components" in self.defaults

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option that it has, with its default."""
        kind = _KINDS[self.name]
        own = {} if kind.function is None else _defaults(kind.function)
        return {**own, **_defaults(kind.layer), "scale": 1.0}

    @property
    def resolved(self) -> dict[str, Any]:
        """Every option, with the value that the head is built with."""
        return {**self.defaults, **self.options}

    @property
    def layer(self) -> Callable[..., Head]:
        """What builds the head from D, V, its logit function and its other options."""
        return _KINDS[self.name].layer

    def build_function(self) -> LogitFunction | None:
        """Its logit function with the factor `scale` before it, at its start; None for the identity."""
        make, options = _KINDS[self.name].function, self.resolved
        function = make(**{name: options[name] for name in _defaults(make)}) if make else None
        if positive("scale", options["scale"]) == 1:
            return function
        scale = Scale(options["scale"])
        return scale if function is None else Compose(scale, function)

    def build(self, in_features: int, vocab_size: int, *, bias_init: Tensor | None = None) -> Head:
        """The head, at its start; see `build_head`."""
        options = {name: value for name, value in self.resolved.items() if name in _defaults(self.layer)}
        head = self.layer(in_features, vocab_size, logit_function=self.build_function(), **options)
        if bias_init is not None:
            start_at_unigram(head, bias_init)
        return head


def options_table() -> str:
    """All heads, what they compute and their options, as a table in Markdown.

    >>> print(options_table().splitlines()[4])
    | softcap | f(z) = c tanh(z / c) | cap=30.0 |
    """
    shared = HeadSpec("softmax").defaults
    rows = ["| name | distribution | options and their defaults, beside " + _arguments(shared) + " |", "|---|---|---|"]
    for name, kind in _KINDS.items():
        own = {key: value for key, value in HeadSpec(name).defaults.items() if key not in shared}
        rows.append(f"| {name} | {kind.distribution} | {_arguments(own)} |")
    return "\n".join(rows)


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def layer_classes() -> dict[str, Callable[..., Head]]:
    """The classes of the table's heads, by name."""
    layers = [kind.layer.func if isinstance(kind.layer, partial) else kind.layer for kind in _KINDS.values()]
    return {layer.__name__: layer for layer in layers}


def start_at_unigram(head: Head, counts: Tensor) -> None:
    """Sets the bias so that f(bias) is log(counts / total) up to a constant, with 1/2 in place of a count of 0.

    It is what `bias_init` of `build_head` does, for a head that was built without it: on the meta device, say, once it
    has values and its function is at its start.

    Args:
        head: with a bias; before its parameters are sharded. counts: (V,), at least 0, not all 0.

    >>> from uncork import build_head
    >>> head = build_head("softmax", 1, 2)
    >>> start_at_unigram(head, torch.tensor([3, 1]))
    >>> head.bias.softmax(-1).detach()
    tensor([0.7500, 0.2500])

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(head, Head):
        raise TypeError(f"head: expected a Head of uncork, got {kind_of(head)}")
    if head.weight.is_meta:
        raise ValueError(
            "bias_init: expected a head with values, got one on the meta device, where the prior would be lost: build "
            "it without, and after to_empty() and reset_parameters() call uncork.heads.start_at_unigram(head, counts)"
        )
    if head.bias is None:
        raise ValueError("bias_init: expected a head with a bias, got bias=False")
    if not isinstance(counts, Tensor):
        raise TypeError(f"bias_init: expected a Tensor, got {type(counts).__name__}")
    if counts.is_complex():
        raise TypeError(f"bias_init: expected real counts, got {counts.dtype}")
    if tuple(counts.shape) != (head.vocab_size,):
        raise ValueError(f"bias_init: expected shape ({head.vocab_size},), got {tuple(counts.shape)}")
    if not bool((counts >= 0).all()) or not bool((counts > 0).any()) or bool(counts.isinf().any()):
        raise ValueError("bias_init: expected finite counts of at least 0 that are not all 0")
    smoothed = counts.double().clamp(min=0.5)
    with torch.no_grad():
        head.bias.copy_(_scores_for(head, (smoothed / smoothed.sum()).log()))


def _scores_for(head: Head, logits: Tensor) -> Tensor:
    """Scores that the head's function maps to these logits, up to a constant that softmax cannot see.

    Raises:
        ValueError: the logits lie further apart than the function's image, or the function does not increase.
    """
    function, dtype = head.logit_function, torch.promote_types(head.weight.dtype, torch.float32)
    if function is None:
        return logits

    def f(scores: Tensor) -> Tensor:
        return apply_function(function, scores.to(head.weight.device, dtype)).to(logits)

    wanted, apart = logits, logits.max() - logits.min()
    if not (isinstance(function, LogitFunction) and function.unbounded):
        # Centred at 0, or as near to it as leaves half of their range free on either side, if the image has so much.
        lowest, highest = f(logits.new_tensor([-1e30, 1e30]))
        roomy = bool(lowest + apart <= highest - apart)
        middle = torch.zeros_like(apart).clamp(lowest + apart, highest - apart) if roomy else (lowest + highest) / 2
        wanted = logits - (logits.max() + logits.min()) / 2 + middle
    scores = function.inverse(wanted) if isinstance(function, LogitFunction) else bisected(f, wanted)
    # A module may be none that increases; one that computes in half precision misses by hundredths.
    if not bool(scores.isfinite().all()) or not bool(((f(scores) - wanted).abs() < 0.1).all()):
        raise ValueError(
            "bias_init: expected counts whose logarithms lie within the image of the head's increasing function "
            f"{' '.join(str(function).split())}, got {apart:.3g} apart"
        )
    return scores


def check_options(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises a TypeError for an option that a head does not have; the message lists those that it has."""
    if wrong := unknown_options(name, given, {key: value_text(value) for key, value in defaults.items()}):
        raise TypeError(wrong)


def titled(name: str, settings: Mapping[str, Any]) -> str:
    """A head's name, and in brackets what sets it apart.

    >>> titled("softmax", {"bias_prior": False, "output_lr_scale": 1.0}), titled("softmax", {})
    ('softmax (bias_prior=false, output_lr_scale=1)', 'softmax')
    """
    return f"{name} ({_joined(settings, ', ')})" if settings else name


# Commas within brackets or quotes belong to a value.
_ITEM = re.compile(r'(?:"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[^,])+')


def parse_text(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the values of name:key=value,key=value, whatever they mean.

    >>> parse_text("plif:init=random,bound=48,lr=2e-3")
    ('plif', {'init': 'random', 'bound': 48, 'lr': 0.002})

    Raises:
        ValueError: for any other text, or a key that is given twice.
    """
    name, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for item in _ITEM.findall(rest):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"head: expected name or name:key=value,key=value, got {text!r}")
        if key in values:
            raise ValueError(f"head: expected {key} once, got {text!r}")
        values[key] = parse_value(value)
    return name, values


_PYTHONS = {"True": True, "False": False, "None": None}


def parse_value(text: str) -> Any:
    """A JSON value or Python's True, False or None; the text itself where it is none.

    >>> parse_value("false"), parse_value("False"), parse_value("no")
    (False, False, 'no')
    """
    if text in _PYTHONS:
        return _PYTHONS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def value_text(value: Any) -> str:
    """The text that `parse_value` reads as this value; the same for equal numbers.

    >>> value_text(4.0), value_text(None), value_text("tanh"), value_text("true")
    ('4', 'null', 'tanh', '"true"')
    """
    if isinstance(value, str):
        plain = parse_value(value) == value and not set(value) & set(',"[]')
        return value if plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return json.dumps(value)


def _joined(values: Mapping[str, Any], separator: str) -> str:
    return separator.join(f"{key}={value_text(value)}" for key, value in values.items())


def _same(value: Any, default: Any) -> bool:
    """Equal, but True is not 1."""
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)


def _plain(value: Any) -> Any:
    """A number or a truth value of numpy's as Python's, which JSON can hold."""
    if type(value) in (bool, int, float):
        return value
    if is_switch(value):
        return bool(value)
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def _defaults(maker: Callable[..., Any]) -> dict[str, Any]:
    """The optional parameters of a constructor of heads or functions, and their defaults, without `logit_function`."""
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(maker).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    options.pop("logit_function", None)
    return options

"""What every logit function is: elementwise, increasing, continuous, one for all words."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from uncork.functional import at_least_float32
from uncork.logit_functions.operations import Elementwise, Operation, function_transforms, readable, recorded
from uncork.messages import kind_of

__all__ = ["Compose", "LogitFunction"]

Spec = dict[str, Any]
Made = TypeVar("Made")
_REGISTRY: dict[str, type["LogitFunction"]] = {}
# A subclass that defines none of these computes the same function as its parent.
_DEFINITION = {"__init__", "transform", "forward", "derivative", "operations", "tables", "options"}


# Most pieces or units of a function: more would need gigabytes of tables, and float32 cannot count further by ones.
LIMIT_PARTS = 2**24


def known_possible(scores: Tensor) -> bool:
    """Whether the scores are known to contain no -inf; False if they are not `readable`."""
    if not readable(scores) or not scores.numel():
        return False
    return bool(scores.detach().amin() > -torch.inf)


def pass_impossible(transform: Any, scores: Tensor) -> Tensor:
    """transform(scores), where a score of -inf (an impossible word) stays -inf and adds nothing to any gradient."""
    if known_possible(scores):
        return transform(scores)
    impossible = scores == -torch.inf
    return transform(scores.masked_fill(impossible, 0)).masked_fill(impossible, -torch.inf)


class LogitFunction(nn.Module, ABC):
    """An increasing function f on the logits: softmax(f(W h + b)).

    An increasing function never changes which word is likeliest; it changes how likely. A subclass gives its equation
    (`transform`), its derivative, what a kernel needs (`tables`, `operations`) and its hyper-parameters (`options`,
    which it must define: specs and states say with them which function it is). Where none of that is needed, a plain
    nn.Module with a forward works as `logit_function` too; autograd then differentiates it.

    Class attributes say which of the five properties of a useful function hold:

    - increasing, continuous: True for all functions of this package.
    - unbounded: whether the image is all of R. A bounded function caps the probability of any word below 1.
    - nonlinear: a linear function leaves the rank of the log-probabilities at d + 1.

    Every function is differentiable but at finitely many points, where `derivative` is that of one side.

    One of your own, which autograd differentiates and bisection inverts::

        class Arctan(LogitFunction):
            unbounded = False  # its image ends at +-1.57

            def transform(self, scores):
                return torch.atan(scores)

            def options(self):
                return {}

        Arctan()(torch.tensor([-100.0, 1.0]))  # tensor([-1.5608,  0.7854])
        Arctan().inverse(torch.tensor([0.7854]))  # tensor([1.0000])
    """

    increasing: ClassVar[bool] = True
    continuous: ClassVar[bool] = True
    unbounded: ClassVar[bool] = True
    nonlinear: ClassVar[bool] = True
    version: ClassVar[int] = 1
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options to test the function with, by a name for each: every test of functions and of kernels runs over them."""
    start_options: ClassVar[frozenset[str]] = frozenset()
    """Options that say where the parameters start or whether they train, and do not decide f given their values."""

    def __init_subclass__(cls, *, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not registered:
            return
        # torch.nn.utils.parametrize and fully_shard give a module a subclass of its class, made by type(), whose
        # __module__ is then the metaclass's. It is the same function: not registered, and `spec` names its parent.
        if cls.__module__ == ABC.__module__ and not _DEFINITION & vars(cls).keys():
            return
        known = _REGISTRY.get(cls.__name__)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"a LogitFunction called {cls.__name__} stands in {known.__module__}: choose another name")
        own = vars(cls)
        changed = {"transform", "forward", "derivative"} & own.keys()
        inherited = cls.operations is not LogitFunction.operations and "operations" not in own
        if changed and inherited and not issubclass(cls, Compose):
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(sorted(changed))} and inherits operations(), from which the "
                "fused loss computes: override operations() too (returning None leaves it to autograd)"
            )
        _REGISTRY[cls.__name__] = cls

    def transform(self, scores: Tensor) -> Tensor:
        """f at scores of float32 or float64 that are not -inf: the chain of operations, unless a subclass overrides it.

        Autograd saves the scores alone, and parameter gradients do not depend on the number of threads. torch.func's
        transforms differentiate it op by op.
        """
        operations = self.operations()
        if operations is None:
            raise NotImplementedError(f"{type(self).__name__} has neither operations() nor transform()")
        for operation, tables in with_tables(operations, self.tables(scores.dtype, scores.device), scores.device):
            if function_transforms():
                scores = operation.forward(scores, tables)
            else:
                scores = Elementwise.apply(scores, operation, *tables)
        return scores

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, as plain JSON."""

    def operations(self) -> tuple[Operation, ...] | None:
        """The primitives that f is made of, first to last; None if only autograd can differentiate it."""
        return None

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """The operations' tables, in their order, differentiable in the parameters; computed in float64.

        Args:
            dtype: of the scores. device: of the scores, for a function without parameters; others use their own.
        """
        return ()

    if TYPE_CHECKING:  # nn.Module's returns Any

        def __call__(self, scores: Tensor) -> Tensor: ...

    def forward(self, scores: Tensor) -> Tensor:
        """f(scores), elementwise.

        Args:
            scores: any shape, floating. Half precision is computed, and returned, in float32.

        Returns:
            logits of the same shape. -inf stays -inf (an impossible word) and passes no gradient; +inf gives the
            supremum of the image; NaN stays NaN.

        Raises:
            TypeError: if the scores are not floating.
        """
        z = checked_scores(scores)
        return pass_impossible(self.transform, z)

    def derivative(self, scores: Tensor) -> Tensor:
        """f'(scores), elementwise; at a kink that of one of its sides, at +-inf the limit; shapes as `forward`."""
        x = checked_scores(scores)
        operations = self.operations()
        if operations is None:
            raise NotImplementedError(f"{type(self).__name__} has neither operations() nor derivative()")
        product: Tensor | None = None
        for operation, tables in with_tables(operations, self.tables(x.dtype, x.device), x.device):
            factor = operation.derivative(x, tables)
            product = factor if product is None else product * factor
            x = operation.forward(x, tables)
        return torch.ones_like(x) if product is None else product

    def inverse(self, logits: Tensor) -> Tensor:
        """The scores with f(scores) = logits.

        Args:
            logits: any shape, floating (half precision is computed in float32); outside the image of f the result is
                +-inf or NaN; +-inf gives +-inf.
        """
        y = checked_scores(logits)
        infinite = y.isinf()
        return torch.where(infinite, y, self._inverse(y.masked_fill(infinite, 0)))

    def _inverse(self, logits: Tensor) -> Tensor:
        """By bisection in float64; subclasses with a closed form use that."""
        if not torch.compiler.is_compiling() and (
            logits.is_meta or isinstance(logits, torch._subclasses.FakeTensor)
        ):  # no values to search among
            return torch.empty_like(logits)
        if recorded():
            raise NotImplementedError(
                f"{type(self).__name__}.inverse searches by bisection, as many steps as the values need, which "
                "torch.compile(fullgraph=True), torch.export and torch.func cannot follow: call it outside of them, or "
                "override _inverse() with a closed form"
            )
        found = bisected(self, logits.detach().double().nan_to_num(0))
        return torch.where(logits.isnan(), logits, found.to(logits.dtype))

    def spec(self) -> Spec:
        """Name, version and hyper-parameters as plain JSON; parameters travel in the state_dict."""
        name = next(c.__name__ for c in type(self).__mro__ if _REGISTRY.get(c.__name__) is c)
        return {"name": name, "version": self.version, "options": self.options()}

    def definition(self) -> Spec:
        """What decides f beside the values of its parameters: `spec()` without the start options."""
        spec = self.spec()
        return {**spec, "options": {k: v for k, v in spec["options"].items() if k not in self.start_options}}

    @staticmethod
    def from_spec(spec: Spec) -> "LogitFunction":
        """The function that `spec()` described, at its start; load a state_dict for its parameters.

        >>> from uncork import LogitFunction, Softcap
        >>> LogitFunction.from_spec(Softcap(30.0).spec())
        Softcap(cap=30.0)

        Raises:
            TypeError: if it is no dict.
            ValueError: if the name, the version or an option is not known here, or an option is missing.
        """
        if not isinstance(spec, Mapping):
            raise TypeError(f"spec: expected the dict that a function's spec() gives, got {kind_of(spec)}")
        name, version = spec.get("name"), spec.get("version")
        cls = _REGISTRY.get(str(name))
        if not isinstance(spec.get("options"), dict):
            raise ValueError(f"spec: expected options, got {spec!r}")
        if cls is None:
            raise ValueError(f"spec: expected a name among {sorted(_REGISTRY)}, got {name!r}")
        if version != cls.version:
            raise ValueError(f"spec: {name} is at version {cls.version} here, got version {version!r}")
        return cls._from_options(spec["options"])

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> "LogitFunction":
        return from_options(cls, options)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options().items())


_SEVERAL = (list, tuple, nn.ModuleList, nn.Sequential)


class Compose(LogitFunction):
    """f(z) = f_n(... f_2(f_1(z))): several functions, the first argument applied first.

    Args:
        functions: LogitFunctions, in the order of application.

    >>> from uncork import Scale, Softcap
    >>> Compose(Scale(0.5), Softcap(10.0))(torch.tensor([20.0]))
    tensor([7.6159])

    Raises:
        TypeError: if an argument is no LogitFunction.
    """

    def __init__(self, *functions: LogitFunction) -> None:
        super().__init__()
        for function in functions:
            if not isinstance(function, LogitFunction):
                raise TypeError(
                    f"Compose: expected LogitFunctions, got {kind_of(function)}"
                    + (": write Compose(*functions)" if isinstance(function, _SEVERAL) else "")
                )
        self.functions = nn.ModuleList(functions)

    def _parts(self) -> list[LogitFunction]:
        return list(self.functions)  # type: ignore[arg-type]

    @property
    def unbounded(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(f.unbounded for f in self._parts())

    @property
    def nonlinear(self) -> bool:  # type: ignore[override]
        """Whether any part is."""
        return any(f.nonlinear for f in self._parts())

    def transform(self, scores: Tensor) -> Tensor:
        for function in self._parts():
            hooked = function._forward_hooks or function._forward_pre_hooks or "forward" in function.__dict__
            scores = function(scores) if hooked else function.transform(scores)
        return scores

    def derivative(self, scores: Tensor) -> Tensor:
        x = checked_scores(scores)
        product = torch.ones_like(x)
        for function in self._parts():
            product = product * function.derivative(x)
            x = function(x)
        return product

    def inverse(self, logits: Tensor) -> Tensor:
        for function in reversed(self._parts()):
            logits = function.inverse(logits)
        return logits

    def operations(self) -> tuple[Operation, ...] | None:
        parts = [f.operations() for f in self._parts()]
        return None if any(p is None for p in parts) else tuple(op for p in parts for op in p or ())

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return tuple(table for f in self._parts() for table in f.tables(dtype, device))

    def options(self) -> dict[str, Any]:
        return {"functions": [f.spec() for f in self._parts()]}

    def definition(self) -> Spec:
        """Its parts' definitions, in order."""
        return {**self.spec(), "options": {"functions": [f.definition() for f in self._parts()]}}

    @classmethod
    def _from_options(cls, options: dict[str, Any]) -> "LogitFunction":
        if options.keys() != {"functions"} or not isinstance(options["functions"], list | tuple):
            raise ValueError(f"spec: expected functions, a list of specs, as the option of Compose, got {options!r}")
        return cls(*(LogitFunction.from_spec(spec) for spec in options["functions"]))

    def extra_repr(self) -> str:
        return ""


def from_options(make: Callable[..., Made], options: dict[str, Any], **more: Any) -> Made:
    """make(**options, **more), where options of a spec that it does not take, or that are missing, are a ValueError."""
    try:
        inspect.signature(make).bind(**options, **more)
    except TypeError as error:
        name = getattr(make, "__name__", str(make))
        raise ValueError(f"spec: expected the options of {name}, got {options!r}: {error}") from None
    return make(**options, **more)


@torch.no_grad()
def bisected(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The scores that an increasing function maps to finite logits, by bisection; +-inf beyond its image.

    The function gets copies, since it may work in place.
    """
    reach = logits.abs().clamp(min=1)
    for _ in range(1000):
        short = (function(reach.clone()) < logits) | (function(-reach) > logits)
        if not bool(short.any()):
            break
        reach = torch.where(short, 2 * reach, reach)
    low, high = -reach, reach
    for _ in range(128):
        middle = (low + high) / 2
        above = function(middle.clone()) > logits
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    below, above = function(-reach) > logits, function(reach) < logits
    return torch.where(above, torch.inf, torch.where(below, -torch.inf, middle))


def with_bound(function: LogitFunction) -> tuple[LogitFunction, float] | None:
    """What is done to the scores before the first part that has a bound (PLIF, the network), and that bound; or None.

    >>> from uncork import PLIF, Scale
    >>> before, bound = with_bound(Compose(Scale(0.5), PLIF(bound=10.0)))
    >>> before(torch.tensor([4.0])), bound
    (tensor([2.]), 10.0)
    """
    parts = _flat(function)
    for number, part in enumerate(parts):
        bound = getattr(part, "bound", None)
        if bound is not None:
            return Compose(*parts[:number]), float(bound)
    return None


def _flat(function: LogitFunction) -> list[LogitFunction]:
    return [p for part in function._parts() for p in _flat(part)] if isinstance(function, Compose) else [function]


def examples() -> dict[str, Callable[[], LogitFunction]]:
    """Constructors of this package's functions with the options of their `examples`, by name."""
    package = __name__.rpartition(".")[0]
    ours = [cls for cls in _REGISTRY.values() if cls.__module__.startswith(f"{package}.")]
    return {name: partial(cls._from_options, dict(options)) for cls in ours for name, options in cls.examples.items()}


def checked_scores(scores: Tensor) -> Tensor:
    """Floating scores, half precision raised to float32."""
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating dtype, got {scores.dtype}")
    return at_least_float32(scores)


def with_tables(
    operations: Sequence[Operation], tables: Sequence[Tensor], device: torch.device
) -> list[tuple[Operation, tuple[Tensor, ...]]]:
    """Each operation with its own tables, on the device of the scores."""
    pairs, start = [], 0
    for operation in operations:
        own = tuple(t.to(device) for t in tables[start : start + operation.num_tables])
        pairs.append((operation, own))
        start += operation.num_tables
    return pairs


def start_at(parameter: Tensor, spread: float) -> None:
    """Draws a parameter from N(0, spread^2), in place; 0 where spread is."""
    with torch.no_grad():
        parameter.normal_().mul_(spread) if spread else parameter.zero_()


def start_at_zero(function: nn.Module) -> None:
    """Sets a function's own parameters to 0, where most functions start."""
    for parameter in function.parameters(recurse=False):
        nn.init.zeros_(parameter)


def constants(dtype: torch.dtype, device: torch.device | None, *values: float) -> Tensor:
    """A table of numbers, filled in on the device itself: copying it from the host would synchronise a GPU."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def table_dtype(device: torch.device) -> torch.dtype:
    """The dtype that tables are computed in: float64 where the device has it, since prefix sums of 100,000 slopes would
    lose digits in float32, and tables are small."""
    return torch.float32 if device.type == "mps" else torch.float64

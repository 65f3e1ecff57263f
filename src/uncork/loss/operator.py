"""The fused loss as operators of torch's own, for torch.compile and torch.export: opaque, with shapes and gradients.

A graph holds one operator in place of the walk over the chunks. It computes as in eager mode, by the same functions of
`chunked.py`, when the graph runs: the implementation is chosen then, and the native tile serves a compiled model too.
In eager mode nothing comes here.

The operators take tensors, numbers and text alone. So a logit function goes in as its tables and as text that names its
operations; a function that only Python knows cannot, and the loss is computed outside of the graph then.
"""

import ast
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uncork.logit_functions.base import LogitFunction, table_dtype
from uncork.logit_functions.operations import OPERATIONS, Operation, first_order
from uncork.loss.call import Call, Implementation, Statistics, check_classes, loss_dtype, without_autocast
from uncork.loss.chunked import (
    Chunked,
    Gradients,
    Walk,
    backward_statistics,
    forward_statistics,
    kept_tokens,
    select,
    weighted,
)
from uncork.loss.function import function_parameters, operations_of
from uncork.loss.implementations import check_name, choose
from uncork.loss.target import IndexTarget, ProbabilityTarget, Target
from uncork.loss.tile import Tiles


def implementation(impl: str | None, call: Call) -> Implementation:
    """`implementations.choose`, but where torch.compile or torch.export traces, what they can put into a graph."""
    if not torch.compiler.is_compiling() or impl == "reference":
        return choose(impl, call)
    check_name(impl)
    return _Outside(impl) if operations_text(call.function) is None else _Inside(impl)


# What goes in -------------------------------------------------------------------------------------------------------


def operations_text(function: nn.Module | None) -> str | None:
    """A function's operations as text, "Affine; Tanh True"; empty for the identity, None if only Python knows them."""
    operations = () if function is None else operations_of(function)
    if operations is None:
        return None
    parts = []
    for operation in operations:
        name = type(operation).__name__
        if OPERATIONS.get(name) is not type(operation):
            return None
        parts.append(" ".join([name, *[f"{getattr(operation, key)!r}" for key in operation.settings]]))
    return "; ".join(parts)


def operations_from(text: str) -> tuple[Operation, ...]:
    """The operations that `operations_text` wrote.

    >>> operations_from("Affine; Tanh True")
    (Affine(), Tanh(symmetric=True))
    """
    parts = [part.split() for part in text.split("; ") if part]
    return tuple(OPERATIONS[name](*map(ast.literal_eval, settings)) for name, *settings in parts)


class _Tabled(LogitFunction, registered=False):
    """A function made of given operations and tables."""

    def __init__(self, operations: tuple[Operation, ...], tables: Sequence[Tensor], increasing: bool) -> None:
        super().__init__()
        self.made_of, self.given = operations, tuple(tables)
        self.increasing = increasing  # type: ignore[misc]
        self.num_pieces = max((table.numel() for table in tables), default=0)

    def operations(self) -> tuple[Operation, ...]:
        return self.made_of

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return self.given

    def options(self) -> dict[str, Any]:
        raise NotImplementedError("a function inside an operator has no spec")


class _Arguments(NamedTuple):
    """A `Call` in the types of torch's schemas."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    prior_logits: Tensor | None
    tables: list[Tensor]
    target: Tensor | None  # indices (N,) or probabilities (N, V)
    kept: Tensor | None
    hit: Tensor | None  # with indices
    word_weight: Tensor | None
    smoothing: float  # per word with indices
    operations: str
    increasing: bool
    details: bool
    chunk_size: int | None
    memory_budget: int | None
    scores_dtype: torch.dtype | None
    impl: str | None

    @classmethod
    def of(cls, call: Call, impl: str | None) -> "_Arguments":
        function, target = call.function, call.target
        index, kept, hit, word_weight, smoothing = None, None, None, None, 0.0
        if isinstance(target, IndexTarget):
            index, kept, hit = target.index, target.kept, target.hit
            word_weight, smoothing = target.word_weight, target.uniform
        elif isinstance(target, ProbabilityTarget):
            index, kept = target.probabilities, target.kept
            word_weight, smoothing = target.word_weight, target.smoothing
        modules = () if function is None else function.modules()
        return cls(
            call.input,
            call.weight,
            call.bias,
            call.prior_logits,
            function_parameters(function, call.dtype, call.input.device),
            index,
            kept,
            hit,
            word_weight,
            smoothing,
            operations_text(function) or "",
            all(f.increasing for f in modules if isinstance(f, LogitFunction)),
            call.details,
            call.chunk_size,
            call.memory_budget,
            call.scores_dtype,
            impl,
        )

    def call(self) -> Call:
        """The call again; raises an IndexError for a class that does not exist, on a CPU."""
        operations = operations_from(self.operations)
        function = _Tabled(operations, self.tables, self.increasing) if operations else None
        vocab_size, target = self.weight.shape[0], self.target
        prepared: Target | None = None
        if target is not None and self.kept is not None:
            if self.hit is None:
                dtype = loss_dtype(self.input)
                prepared = ProbabilityTarget(target, self.kept, self.word_weight, self.smoothing, dtype)
            else:
                if target.device.type == "cpu":
                    check_classes(target, self.kept, vocab_size, target.shape)
                given = self.word_weight
                prepared = IndexTarget(target, self.kept, self.hit, self.smoothing, given, self.hit, vocab_size)
        limits = self.chunk_size, self.memory_budget, self.scores_dtype
        given_input = self.input, self.weight, self.bias, self.prior_logits
        return Call(*given_input, function, prepared, self.details, *limits)

    def differentiated(self) -> list[Tensor | None]:
        return [self.input, self.weight, self.bias, self.prior_logits, *self.tables]

    def needs(self) -> list[bool]:
        """Which gradients are wanted."""
        recorded = torch.is_grad_enabled()
        return [recorded and t is not None and t.requires_grad for t in self.differentiated()]


_SCHEMA = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? prior_logits, Tensor[] tables, Tensor? target, Tensor? kept, "
    "Tensor? hit, Tensor? word_weight, float smoothing, str operations, bool increasing, bool details, "
    "int? chunk_size, int? memory_budget, ScalarType? scores_dtype, str? impl"
)
_COUNT = len(_Arguments._fields)


def _operator(name: str, more: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"uncork::{name}", mutates_args=(), schema=f"({_SCHEMA}{more}) -> Tensor[]")


def _tiles(given: _Arguments, call: Call) -> type[Tiles]:
    chosen = choose(given.impl, call)
    assert isinstance(chosen, Chunked)
    return chosen.tiles


def _spread(values: Tensor | None, index: Tensor, tokens: int) -> Tensor | None:
    """The rows of some tokens among rows of 0."""
    return None if values is None else values.new_zeros(tokens, *values.shape[1:]).index_copy_(0, index, values)


def _returned(made: Gradients, index: Tensor | None, given: _Arguments) -> list[Tensor]:
    """Gradients as an operator returns them: of shape (0,) where none is wanted, and none narrower than the loss."""
    tokens = given.input.shape[0]
    if index is not None:
        made.input, made.prior = _spread(made.input, index, tokens), _spread(made.prior, index, tokens)
    dtype = loss_dtype(given.input)
    if made.weight is not None:
        made.weight = made.weight.to(dtype)
    return [given.input.new_empty(0, dtype=dtype) if g is None else g for g in made.in_order()]


def _shaped(given: _Arguments, needs: Sequence[bool]) -> list[Tensor]:
    """`_returned`, without numbers."""
    own = [loss_dtype(given.input)] * 4 + [table_dtype(given.input.device)] * len(given.tables)
    return [
        given.input.new_empty(t.shape, dtype=dtype)
        if need and t is not None
        else given.input.new_empty(0, dtype=own[0])
        for t, need, dtype in zip(given.differentiated(), needs, own, strict=True)
    ]


def _cast(grads: Sequence[Tensor], dtypes: Sequence[torch.dtype | None], asked: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that autograd asks for, in the dtypes of the inputs."""
    found: list[Tensor | None] = []
    for grad, dtype, ask in zip(grads, dtypes, asked, strict=True):
        if ask and grad.dim() == 1 and grad.shape[0] == 0:
            raise RuntimeError("a gradient is asked for now that was not wanted when the loss was computed")
        found.append(grad.to(dtype) if ask and dtype is not None else None)
    return found


def _asked(ctx: Any) -> list[bool]:
    first, tables = ctx.needs_input_grad[:4], ctx.needs_input_grad[4]
    return [*first, *(tables if isinstance(tables, Sequence) else [tables] * (len(ctx.dtypes) - 4))]


def _answer(grads: Sequence[Tensor | None], *more: Any) -> tuple[Any, ...]:
    """The gradients to an operator's arguments, in their order."""
    return (*grads[:4], list(grads[4:]), *[None] * (_COUNT - 5), *more)


# Scalar losses ------------------------------------------------------------------------------------------------------


@_operator("linear_cross_entropy", ", Tensor ce_factor, Tensor? lse_factor, bool[] needs")
def _linear_cross_entropy(*arguments: Any) -> list[Tensor]:
    """[sum_n a_n CE_n + b_n lse_n^2, CE, lse^2, the gradients of the sum]."""
    given, (ce_factor, lse_factor, needs) = _Arguments(*arguments[:_COUNT]), arguments[_COUNT:]
    call = given.call()
    tiles, index = _tiles(given, call), kept_tokens(call)
    if index is not None:
        call, ce_factor = select(call, index), ce_factor[index]
        lse_factor = None if lse_factor is None else lse_factor[index]
    with without_autocast(given.input.device):
        total, ce, square, made = weighted(call, tiles, needs, ce_factor, lse_factor, given.tables)
    if index is not None:
        ce, square = (x.new_zeros(given.input.shape[0]).index_copy_(0, index, x) for x in (ce, square))
    return [total, ce, square, *_returned(made, index, given)]


def _shape_of_loss(*arguments: Any) -> list[Tensor]:
    given, needs = _Arguments(*arguments[:_COUNT]), arguments[-1]
    dtype, tokens = loss_dtype(given.input), given.input.shape[0]
    total, ce, square = (given.input.new_empty(shape, dtype=dtype) for shape in ((), (tokens,), (tokens,)))
    return [total, ce, square, *_shaped(given, needs)]


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = _Arguments(*inputs[:_COUNT])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = [None if t is None else t.dtype for t in given.differentiated()]


@first_order
def _scaled(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients to inputs and tables, then to the two factors."""
    if grad is None:
        return (None,) * (len(ctx.dtypes) + 2)
    ce, square, *made = saved
    ask_ce, ask_square, _ = ctx.needs_input_grad[_COUNT:]
    factors = grad * ce if ask_ce else None, grad * square if ask_square else None
    return (*_cast([grad * g for g in made], ctx.dtypes, _asked(ctx)), *factors)


def _scale_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    *grads, grad_ce_factor, grad_lse_factor = _scaled(ctx, upstream[0])
    return _answer(grads, grad_ce_factor, grad_lse_factor, None)


_linear_cross_entropy.register_fake(_shape_of_loss)
_linear_cross_entropy.register_autograd(_scale_gradients, setup_context=_keep_gradients)


# Losses and statistics per token --------------------------------------------------------------------------------------


@_operator("token_statistics", "")
def _token_statistics(*arguments: Any) -> list[Tensor]:
    """[logsumexp], and, where there are any, cross-entropy, entropy, argmax."""
    given = _Arguments(*arguments)
    call = given.call()
    tiles, index = _tiles(given, call), None if given.details else kept_tokens(call)
    with without_autocast(given.input.device):
        result = forward_statistics(Walk(call if index is None else select(call, index), tiles, given.tables))
    found = [x for x in (result.logsumexp, result.cross_entropy, result.entropy, result.argmax) if x is not None]
    if index is None:
        return found
    return [x.new_zeros(given.input.shape[0]).index_copy_(0, index, x) for x in found]


def _shape_of_statistics(*arguments: Any) -> list[Tensor]:
    given = _Arguments(*arguments)
    dtype = loss_dtype(given.input)
    dtypes = [dtype] * (1 + (given.target is not None)) + [dtype, torch.int64] * given.details
    return [given.input.new_empty(given.input.shape[0], dtype=each) for each in dtypes]


@_operator(
    "token_statistics_backward",
    ", Tensor? grad_cross_entropy, Tensor? grad_logsumexp, Tensor? grad_entropy, bool[] needs",
)
def _token_statistics_backward(*arguments: Any) -> list[Tensor]:
    """The gradients, from upstream gradients per token; the scores are computed again."""
    given, (*upstream, needs) = _Arguments(*arguments[:_COUNT]), arguments[_COUNT:]
    call = given.call()
    tiles, index = _tiles(given, call), None if given.details else kept_tokens(call)
    if index is not None:
        call, upstream = select(call, index), [None if g is None else g[index] for g in upstream]
    with without_autocast(given.input.device):
        made = backward_statistics(Walk(call, tiles, given.tables, needs), *upstream)
    return _returned(made, index, given)


def _shape_of_gradients(*arguments: Any) -> list[Tensor]:
    return _shaped(_Arguments(*arguments[:_COUNT]), arguments[-1])


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given = _Arguments(*inputs)
    ctx.set_materialize_grads(False)
    if given.details:
        ctx.mark_non_differentiable(output[-1])
    ctx.dtypes = [None if t is None else t.dtype for t in given.differentiated()]
    ctx.has_target = given.target is not None
    tensors = [*given[:4], *given.tables, *given[5:9]]
    ctx.save_for_backward(*tensors)
    ctx.rest = given[9:]


@first_order
def _computed_again(
    ctx: Any, saved: tuple[Any, ...], grad_lse: Tensor | None, *upstream: Tensor | None
) -> tuple[Tensor | None, ...]:
    parts: list[Any] = [*saved[:4], list(saved[4:-4]), *saved[-4:], *ctx.rest]
    given, others = _Arguments(*parts), list(upstream)
    grad_ce = others.pop(0) if ctx.has_target else None
    grad_entropy = others[0] if given.details else None
    asked = _asked(ctx)
    made = _token_statistics_backward(*given, grad_ce, grad_lse, grad_entropy, asked)
    return tuple(_cast(made, ctx.dtypes, asked))


def _recompute(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    return _answer(_computed_again(ctx, *upstream))


_token_statistics.register_fake(_shape_of_statistics)
_token_statistics_backward.register_fake(_shape_of_gradients)
_token_statistics.register_autograd(_recompute, setup_context=_keep_inputs)


# Where torch traces ---------------------------------------------------------------------------------------------------


class _Inside(Implementation):
    """The operators: they choose the implementation (of this name, or the fastest) when they run."""

    def __init__(self, impl: str | None) -> None:
        self.impl = impl

    def statistics(self, call: Call) -> Statistics:
        """Per-token statistics, differentiable but for argmax."""
        given = _Arguments.of(call, self.impl)
        with without_autocast(call.input.device):
            lse, *found = torch.ops.uncork.token_statistics(*given)
        ce = None if call.target is None else found[0]
        entropy, argmax = found[-2:] if call.details else (None, None)
        return Statistics(ce, lse, entropy, argmax)

    def weighted_sum(self, call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
        """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2."""
        given = _Arguments.of(call, self.impl)
        with without_autocast(call.input.device):
            result = torch.ops.uncork.linear_cross_entropy(*given, ce_factor, lse_factor, given.needs())
        return result[0]


class _Outside(Implementation):
    """For a function that only Python knows: breaks the graph, or raises under fullgraph=True, in our own words."""

    def __init__(self, impl: str | None) -> None:
        self.impl = impl

    def statistics(self, call: Call) -> Statistics:
        """Per-token statistics, differentiable but for argmax."""
        return _outside("statistics", self.impl, call)

    def weighted_sum(self, call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
        """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2."""
        return _outside("weighted_sum", self.impl, call, ce_factor, lse_factor)


_ONLY_PYTHON = (
    "a graph cannot hold this logit_function, which only Python knows (it has no operations() of uncork's "
    "primitives). Without fullgraph=True the loss runs outside of the graph. With it, or for torch.export: give "
    "impl='reference', which keeps the (N, V) logits; or make the function of uncork's own; or compile the model "
    "without its loss"
)


def _outside(method: str, impl: str | None, call: Call, *factors: Tensor | None) -> Any:
    """Computes outside of the graph."""
    if torch.compiler.is_compiling():  # torch.export with strict=False has no outside
        raise ValueError(f"logit_function: {_ONLY_PYTHON}")

    def run() -> Any:
        return getattr(choose(impl, call), method)(call, *factors)

    return torch.compiler.disable(run)()


# torch.compile breaks its graph at a function marked so, and its error shows the function's name.
_outside._torchdynamo_disable = True  # type: ignore[attr-defined]
_outside.__qualname__ = f"[uncork: {_ONLY_PYTHON}]"

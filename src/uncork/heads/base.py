"""The base class of the output layers, whose methods compute through the head's own `__call__`: hooks on it run.

Legend for shapes: N tokens, D features, V vocabulary, K components, C tokens of a chunk.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from uncork.arguments import positive_int, switch
from uncork.functional import exporting
from uncork.heads import hooks
from uncork.heads.state import SelfDescribing
from uncork.logit_functions import Identity, LogitFunction
from uncork.loss import TokenStatistics, from_logits, implementations
from uncork.loss.call import Call, autocast_dtype
from uncork.loss.chunk_size import rule_of
from uncork.loss.exclusion import Exclusion, best, take
from uncork.loss.function import apply_function
from uncork.loss.inference import Inference, asked_for_gradients
from uncork.messages import unknown_options

_SHARED = ("ignore_index", "impl", "chunk_size", "memory_budget", "scores_dtype")
OF_LOSSES = ("weight", "token_weight", "reduction", "label_smoothing", *_SHARED)


class Projection(NamedTuple):
    """A head's weight (V, features) and bias, read once a call: a parametrisation computes them at every access."""

    weight: Tensor
    bias: Tensor | None


T = TypeVar("T")
Answer = Callable[[Tensor, Projection], T]


class Answered(NamedTuple):
    """What a head's call gives in place of logits; a call that gives something else has lost the request."""

    value: Any


def _answered(answer: Answer[Any], input: Tensor, projection: Projection) -> Answered:
    return Answered(answer(input, projection))


class Head(SelfDescribing, ABC):
    """Base class of the output layers, which project with `weight` (V, features) and `bias` (V,) or None, as nn.Linear.

    `loss`, `statistics`, `log_prob`, `predict`, `topk` and `scores` go through `head(input)`'s own call: forward
    pre-hooks, parametrisations, pruning, weight_norm and wrappers that shard the head (FSDP2) work for all of them. A
    pre-hook sees `(input,)`; one registered with_kwargs also sees a keyword that says what is computed, and if it
    leaves that out the answer is computed from `head(input)`.
    If the logits are seen by a forward or backward hook of yours (on the head, on its function, or a global one) or by
    a subclass that overrides `forward`, every method computes from `head(input)`, with its (N, V) matrix, the same with
    and without gradients; an `impl` that cannot do so raises.

    The state_dict also holds what the parameters do not tell, the function with its fixed factors and the kind of
    mixture, in a uint8 tensor `head_spec`. Without function and mixture there is none, and states are nn.Linear's.
    Loading a state of another function or factor, or an nn.Linear's into a head that would change its logits, raises a
    RuntimeError that says what to do, with strict=False too. An nn.Linear's state loads with strict=False into a head
    that keeps its logits (whose function starts as the identity), in a whole model too, where torch's error of a strict
    load says no more than that head_spec is missing.

    Args:
        in_features: D of the input. vocab_size: V. projected: features of the projection (D, or the latent's).
        bias: whether the projection has one. logit_function: an increasing elementwise module, or None.
    """

    in_features: int
    vocab_size: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    _loss_options: ClassVar[tuple[str, ...]] = (*OF_LOSSES, "z_loss")

    def __init__(
        self, in_features: int, vocab_size: int, projected: int, bias: bool, logit_function: nn.Module | None
    ) -> None:
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.vocab_size = positive_int("vocab_size", vocab_size)
        self._projected = projected
        self.weight = nn.Parameter(torch.empty(self.vocab_size, projected))
        self.bias = nn.Parameter(torch.empty(self.vocab_size)) if switch("bias", bias) else None
        self.logit_function = logit_function
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as nn.Linear does, and writes `head_spec`: the start that the constructor makes.

        As everywhere in torch, submodules (a mixture's latent and prior, a function with parameters) have their own, so
        what builds on meta, `to_empty()` and then `reset_parameters()` of every module that has one (FSDP2's recipe)
        gives a head at its start. What was put on top of the start is not drawn again: the parameters of `from_linear`,
        a fit of `PLIF.from_function`, the prior of `bias_init`, which `uncork.heads.start_at_unigram` sets anew.
        """
        reach = 1 / math.sqrt(self._projected)
        nn.init.uniform_(self.weight, -reach, reach)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -reach, reach)
        self._write_definition()

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP1 puts flat pieces of one dimension there: their shape is checked when they are used.
        if name == "weight" and isinstance(value, Tensor) and value.dim() == 2:
            self._check_weight(value)
        super().__setattr__(name, value)

    def _check_weight(self, weight: Tensor) -> None:
        expected = (self.vocab_size, self._projected)
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a parameter of shape {expected}, got {type(weight).__name__}")
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"weight: expected shape {expected} (vocab_size, features of the projection), got "
                f"{tuple(weight.shape)}; a tied embedding needs the head's vocab_size and features. Where FSDP1 wraps "
                "the head by itself, its methods do not see whole weights: wrap the whole model, or use fully_shard"
            )

    @property
    def out_features(self) -> int:
        """`vocab_size`, under nn.Linear's name."""
        return self.vocab_size

    def _adopt(self, linear: nn.Linear) -> None:
        """Takes over an nn.Linear's parameters, the same objects, so that tied weights stay tied."""
        self.weight = cast(nn.Parameter, linear.weight)
        self.bias = cast("nn.Parameter | None", linear.bias)
        self.to(linear.weight.device, linear.weight.dtype)  # for latent, prior and function

    if TYPE_CHECKING:  # nn.Module's returns Any

        @overload
        def __call__(self, input: Tensor) -> Tensor: ...
        @overload
        def __call__(self, input: Tensor, *, answer: Answer[T]) -> T: ...
        def __call__(self, input: Tensor, *, answer: Answer[Any] | None = None) -> Any: ...

    def forward(self, input: Tensor, *others: object, answer: Answer[Any] | None = None) -> Any:
        """Softmax-ready logits (..., V); a mixture's are log-probabilities. float32 unless f is the identity.

        Args:
            input: (..., D), of the weight's dtype and device (under autocast any floating dtype).
            others: none; a target belongs to `loss`.
            answer: private; the other methods pass what to compute in place of the logits. It is a keyword, so that
                pre-hooks see the input alone.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if others:
            raise TypeError(
                f"head(input): expected the input alone, got {1 + len(others)} positional arguments; "
                "head.loss(input, target) gives the loss"
            )
        projection = self._projection(input)
        return self._logits(input, projection) if answer is None else answer(input, projection)

    def _projection(self, input: Tensor) -> Projection:
        """Weight and bias, checked against the input."""
        weight, bias = self.weight, self.bias
        self._check_weight(weight)
        if bias is not None and tuple(bias.shape) != (self.vocab_size,):
            raise ValueError(f"bias: expected shape ({self.vocab_size},), got {tuple(bias.shape)}")
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"input: expected shape (..., {self.in_features}) for in_features={self.in_features}, "
                f"got {tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise TypeError(f"input: expected a floating dtype, got {input.dtype}")
        if input.device != weight.device:
            raise ValueError(f"input: expected device {weight.device} as the head's weight, got {input.device}")
        if input.dtype != weight.dtype and autocast_dtype(input.device) is None:
            raise ValueError(f"input: expected dtype {weight.dtype} as the head's weight, got {input.dtype}")
        return Projection(weight, bias)

    def _seen_by(self) -> str:
        return hooks.seen_by(self, Head.forward)

    def _answer(self, input: Tensor, fused: Answer[T], of_logits: Callable[[Tensor, str], T]) -> T:
        """What is asked of the head: fused, within its own call, or from its logits where others see or change them.

        Args:
            fused: computes it from the input (as pre-hooks left it) and the projection.
            of_logits: computes it from logits (..., V) and the reason why all of them are computed.
        """
        reason = self._seen_by()
        given: Any = self(input) if reason else self(input, answer=partial(_answered, fused))
        if isinstance(given, Answered):
            return cast(T, given.value)
        reason = reason or "a forward pre-hook on the head left out the keywords that it was given"
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.shape[-1:] != (self.vocab_size,):
            got = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"head(input): expected floating logits (..., {self.vocab_size}), got {got}: {reason}")
        return of_logits(given, reason)

    @abstractmethod
    def _logits(self, input: Tensor, projection: Projection) -> Tensor:
        """The softmax-ready logits, what `head(input)` returns."""

    @abstractmethod
    def _scores(self, input: Tensor, projection: Projection) -> Tensor:
        """The scores before the function, what `scores` returns."""

    @abstractmethod
    def _loss(self, input: Tensor, projection: Projection, *, target: Tensor, options: dict[str, Any]) -> Tensor:
        """`loss`, by the fused operation."""

    @abstractmethod
    def _statistics(
        self, input: Tensor, projection: Projection, *, target: Tensor | None, options: dict[str, Any]
    ) -> TokenStatistics:
        """`statistics`, by the fused operation."""

    @abstractmethod
    def _fused(self, input: Tensor, projection: Projection) -> Call:
        """The validated call, without a target, for which an implementation is chosen."""

    def _operands(self, projection: Projection) -> dict[str, Any]:
        return {"linear_bias": projection.bias, "logit_function": self.logit_function}

    def _apply_function(self, scores: Tensor) -> Tensor:
        """f(scores); the identity costs nothing and keeps half precision."""
        function = self.logit_function
        if function is None or (isinstance(function, Identity) and not hooks.function_changed_by(function)):
            return scores
        return apply_function(function, scores)

    def scores(self, input: Tensor) -> Tensor:
        """W h + b before the function: (..., V), of a mixture (..., K, V). No forward hook changes them.

        >>> from uncork import LinearHead, Softcap
        >>> head = LinearHead(1, 3, bias=False, logit_function=Softcap(2.0))
        >>> head.weight = nn.Parameter(torch.tensor([[1.0], [3.0], [2.0]]))
        >>> head.scores(torch.ones(1)).detach(), head(torch.ones(1)).detach()
        (tensor([1., 3., 2.]), tensor([0.9242, 1.8103, 1.5232]))
        """
        if type(self).forward is not Head.forward or "forward" in self.__dict__:
            return cast(Tensor, Head.forward(self, input, answer=self._scores))
        found: list[Tensor] = []
        seen = bool(self._seen_by())

        def keep(input: Tensor, projection: Projection) -> Tensor:
            found.append(self._scores(input, projection))
            return self._logits(input, projection) if seen else found[0]

        self(input, answer=keep)
        if not found:
            raise RuntimeError("scores: a forward pre-hook on the head left out the keywords that it was given")
        return found[0]

    def _check_options(self, method: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
        for name in options:
            if name in ("linear_weight", "linear_bias", "logit_function", "prior_logits"):
                raise TypeError(
                    f"{name}: the head has its own; leave it out, or call uncork.linear_cross_entropy with all of yours"
                )
            if name not in known:
                raise TypeError(unknown_options(f"head.{method}", options, known))

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """F.cross_entropy(head(input).flatten(0, -2), target.flatten(), ...), fused.

        Args:
            input: (..., D). target: (...) indices or (..., V) probabilities.
            options: keyword arguments of `uncork.linear_cross_entropy`: weight, token_weight, reduction, ignore_index,
                label_smoothing, impl, chunk_size, memory_budget, scores_dtype, and z_loss but for a mixture.

        Returns:
            float32 or float64; a scalar, or (...) for reduction="none".

        Raises:
            TypeError, ValueError, IndexError: naming the argument, what was expected and what came.

        >>> from uncork import build_head
        >>> head = build_head("softmax", 8, 100)
        >>> input, target = torch.zeros(4, 8), torch.arange(4)
        >>> expected = nn.functional.cross_entropy(head(input), target)
        >>> torch.allclose(head.loss(input, target), expected)
        True
        """
        self._check_options("loss", options, self._loss_options)
        return self._answer(
            input,
            partial(self._loss, target=target, options=options),
            lambda logits, reason: from_logits.cross_entropy(logits, target, reason=reason, **options),
        )

    def statistics(self, input: Tensor, target: Tensor | None = None, **options: Any) -> TokenStatistics:
        """Log-probability of the target, logsumexp, entropy and argmax of each token, without the (N, V) matrix.

        Args:
            input: (..., D). target: (...) indices, (..., V) probabilities, or None.
            options: ignore_index, impl, chunk_size, memory_budget, scores_dtype of `uncork.token_statistics`, which
                says what is returned (of an ignored token a log_prob of 0).

        >>> from uncork import LinearHead
        >>> head = LinearHead(1, 3, bias=False)
        >>> head.weight = nn.Parameter(torch.tensor([[1.0], [3.0], [2.0]]))
        >>> log_prob, logsumexp, entropy, argmax = head.statistics(torch.ones(2, 1), torch.tensor([0, 1]))
        >>> log_prob.detach(), argmax
        (tensor([-2.4076, -0.4076]), tensor([1, 1]))
        """
        self._check_options("statistics", options, _SHARED)
        return self._answer(
            input,
            partial(self._statistics, target=target, options=options),
            lambda logits, reason: from_logits.token_statistics(logits, target, reason=reason, **options),
        )

    def implementation(self) -> str:
        """The implementation that `impl=None` takes for the loss on the weights' device: "torch", "native (avx512)".

        In "reference (...)" the brackets say why the loss is computed from `head(input)`. The head is called with an
        input of no tokens to find out.

        >>> from uncork import LinearHead
        >>> head = LinearHead(8, 100, logit_function=nn.Hardtanh())  # of your own: no other knows it
        >>> head.implementation()
        'torch'
        """
        if reason := self._seen_by():
            return f"reference ({reason})"
        with torch.no_grad():
            nothing = torch.empty(0, self.in_features, dtype=self.weight.dtype, device=self.weight.device)
            return self._answer(
                nothing,
                lambda input, projection: implementations.title(self._fused(input, projection)),
                lambda _, reason: f"reference ({reason})",
            )

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities (..., V), float32 or better: ``head(input).float().log_softmax(-1)``.

        Args:
            input: (..., D).

        >>> from uncork import LinearHead
        >>> head = LinearHead(1, 3, bias=False)
        >>> head.weight = nn.Parameter(torch.tensor([[1.0], [3.0], [2.0]]))
        >>> head.log_prob(torch.ones(1)).detach()
        tensor([-2.4076, -0.4076, -1.4076])
        """
        return self._answer(input, self._log_prob_chunked, lambda logits, _: _log_softmax(logits))

    def _log_prob_chunked(self, input: Tensor, projection: Projection) -> Tensor:
        if (inference := self._inference(input, projection)) is not None:
            return inference.log_prob().view(*input.shape[:-1], self.vocab_size)
        return self._log_prob(input, projection)

    def _log_prob(self, input: Tensor, projection: Projection) -> Tensor:
        return _log_softmax(self._logits(input, projection))

    def predict(self, input: Tensor) -> Tensor:
        """The likeliest word of each token, (...) int64, chunk by chunk; ranked as `topk` does.

        Args:
            input: (..., D).

        >>> from uncork import LinearHead
        >>> head = LinearHead(1, 3, bias=False)
        >>> head.weight = nn.Parameter(torch.tensor([[1.0], [3.0], [2.0]]))
        >>> head.predict(torch.tensor([[1.0], [-1.0]]))
        tensor([1, 0])
        """
        return self._answer(input, self._predict, lambda logits, _: logits.argmax(-1))

    def _predict(self, input: Tensor, projection: Projection) -> Tensor:
        if (inference := self._inference(input, projection)) is not None:
            return inference.argmax().view(input.shape[:-1])
        ids = [self._ranked(rows, projection).argmax(-1) for rows in self._chunks(input, projection)]
        return torch.cat(ids).view(input.shape[:-1])

    def topk(self, input: Tensor, k: int, *, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The k likeliest words: (log_prob, ids), each (..., k), likeliest first.

        Computed chunk by chunk; with gradients the graphs of all chunks stay in memory until the backward.
        Ranking uses the scores (except for mixtures), which an increasing function cannot reorder but may tie.

        Args:
            input: (..., D). k: between 1 and the number of words that are left.
            exclude: words that must not appear: integer ids (..., m), a row for each token (-1 fills it up and leaves
                out nothing), or a boolean mask (V,) or (..., V). The log-probabilities stay those of the whole
                distribution.

        Returns:
            log_prob of float32 or better, ids of int64. If `exclude` leaves fewer than k words, a CPU raises; on other
            devices, where this is not checked, the missing places have the id -1 and the log-probability -inf.

        Raises:
            ValueError: k is out of range, or above what `exclude` leaves of a token's words.
            TypeError, IndexError: `exclude` is no mask and no ids in [0, V) or -1 (checked on the CPU).

        >>> from uncork import LinearHead
        >>> head = LinearHead(1, 3, bias=False)
        >>> head.weight = nn.Parameter(torch.tensor([[1.0], [3.0], [2.0]]))
        >>> head.topk(torch.ones(1), 2)[1], head.topk(torch.ones(1), 2, exclude=torch.tensor([1]))[1]
        (tensor([1, 2]), tensor([2, 0]))
        """
        k = positive_int("k", k, self.vocab_size)
        return self._answer(
            input,
            partial(self._topk, k=k, exclude=exclude),
            lambda logits, _: self._topk_of_logits(logits, k, exclude),
        )

    def _topk_of_logits(self, logits: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        leading, rows = logits.shape[:-1], logits.reshape(-1, self.vocab_size)
        ids = best(rows, k, self._exclusion(exclude, logits, k), slice(0, rows.shape[0]))
        return take(_log_softmax(rows), ids).view(*leading, k), ids.view(*leading, k)

    def _topk(self, input: Tensor, projection: Projection, *, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
        exclusion, shape = self._exclusion(exclude, input, k), (*input.shape[:-1], k)
        if (inference := self._inference(input, projection)) is not None:
            log_prob, ids = inference.topk(k, exclusion)
            return log_prob.view(shape), ids.view(shape)
        parts, start = [], 0
        for rows in self._chunks(input, projection):
            span = slice(start, start + rows.shape[0])
            parts.append(self._topk_rows(rows, projection, k, exclusion, span))
            start = span.stop
        log_prob, ids = (torch.cat(column).view(shape) for column in zip(*parts, strict=True))
        return log_prob, ids

    def _exclusion(self, exclude: Tensor | None, input: Tensor, k: int) -> Exclusion | None:
        if exclude is None:
            return None
        return Exclusion.build(exclude, tuple(input.shape[:-1]), self.vocab_size, input.device, k)

    def _inference(self, input: Tensor, projection: Projection) -> Inference | None:
        """The computation without gradients; None if plain torch has to compute instead."""
        if asked_for_gradients(input, *projection, *self.parameters()):
            return None
        return Inference.of(self._fused(input, projection))

    def _chunks(self, input: Tensor, projection: Projection) -> tuple[Tensor, ...]:
        rows: Tensor = input.reshape(-1, input.shape[-1])
        if exporting():  # a graph that cut them would hold for one number of cuts
            return (rows,)
        components = getattr(self, "num_components", 1)
        at_once = rule_of(projection.weight.device).default_rows(*projection.weight.shape)
        return rows.split(max(1, at_once // components))

    def _ranked(self, rows: Tensor, projection: Projection) -> Tensor:
        """Numbers (C, V) that rank the words as their probabilities do."""
        return self._log_prob(rows, projection)

    def _topk_rows(
        self, rows: Tensor, projection: Projection, k: int, exclusion: Exclusion | None, span: slice
    ) -> tuple[Tensor, Tensor]:
        log_prob = self._log_prob(rows, projection)
        ids = best(log_prob, k, exclusion, span)
        return take(log_prob, ids), ids

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments but the function, as plain JSON."""

    def spec(self) -> dict[str, Any]:
        """What `head_from_spec` rebuilds the head from, as plain JSON; parameters travel in the state_dict.

        Raises:
            TypeError: if the function is no LogitFunction and so has no spec.

        >>> from uncork import build_head
        >>> spec = build_head("softcap", 8, 100).spec()
        >>> spec["name"], spec["options"]
        ('LinearHead', {'in_features': 8, 'vocab_size': 100, 'bias': True})
        >>> spec["logit_function"]
        {'name': 'Softcap', 'version': 1, 'options': {'cap': 30.0}}
        """
        function = self.logit_function
        if function is not None and not isinstance(function, LogitFunction):
            raise TypeError(f"logit_function: expected a LogitFunction or None, got {type(function).__name__}")
        described = None if function is None else function.spec()
        # Parametrisations (by way of ABCMeta) and fully_shard put a class of torch's before the head's own.
        own = (c for c in type(self).__mro__ if c.__module__.partition(".")[0] not in ("torch", "abc"))
        name = next(own).__name__
        return {"name": name, "options": self.options(), "logit_function": described}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options().items())


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

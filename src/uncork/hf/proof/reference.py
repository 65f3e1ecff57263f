"""What a model's own output layer and function give, in float64 on the CPU, and how far its own dtype may be from that.

Shapes in comments: N tokens, D features, V vocabulary, U of them left by the model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from uncork.heads import Head, LinearHead, hooks
from uncork.hf.fusion import KEY, Fusion, RecordingLinear, recording_class
from uncork.hf.record import Record, RecordedLogits, Step, function_of
from uncork.loss.function import apply_function

_CHUNK = 4096  # words at a time, so that no whole weight is copied to float64,
_SMALL = 2**24  # unless it has no more elements than this
_SINGLE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Reading:
    """What a model's forward does to the logits of its output layer.

    Attributes:
        function: f, or None for the identity. words: those that are left. steps: as recorded.
        replay: what the model does to the head's output, as maps; see `uncork.hf.record.Record`.
    """

    function: nn.Module | None
    words: slice
    steps: tuple[Step, ...]
    replay: tuple[tuple[str, Callable[[Tensor], Tensor]], ...]


def read(model: PreTrainedModel, head: nn.Module, fusion: Fusion | None, inputs: dict[str, Any]) -> Reading:
    """Records a forward of the model.

    Args:
        inputs: of the forward; with labels among them, that forward is read.

    Raises:
        NotRecordable: it does to the logits what no increasing function of this library is.
        TypeError: its logits are not made from the output layer's alone, or a hook stands on that.
    """
    with torch.no_grad():
        outputs = _run_recording(model, head, inputs) if fusion is None else _run_fused(model, fusion, inputs)
    found = [value for value in _values(outputs) if isinstance(value, RecordedLogits)]
    if not found:
        hook = hooks.on_module(head)
        why = f"{hook} stands on it" if hook else f"{type(model).__name__} does not return what it returns"
        raise TypeError(f"model's output layer: expected the one that makes the model's logits, but {why}")
    record: Record = found[0].record
    owns = fusion is not None and fusion.owns_function
    replay = tuple((kind, step) for kind, step in record.replay if not (owns and kind == "step"))
    function = head.logit_function if isinstance(head, Head) else function_of(record.steps)
    return Reading(function, record.words, () if owns else record.steps, replay)


def _values(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs if isinstance(outputs, tuple) else outputs.values())


def _run_fused(model: PreTrainedModel, fusion: Fusion, inputs: dict[str, Any]) -> Any:
    fusion.recording = True
    try:
        return fusion.run(model, (), inputs)
    finally:
        fusion.recording = False


def _run_recording(model: PreTrainedModel, head: nn.Module, inputs: dict[str, Any]) -> Any:
    """A forward of a model that is not fused, whose head records meanwhile."""
    fusion = Fusion(head, owns_function=False, logits="none")
    fusion.recording = True
    before, loss_function = type(head), vars(model).get("_loss_function")
    object.__setattr__(head, KEY, fusion)
    head.__class__ = recording_class(head)
    model.loss_function = lambda logits, *_, **__: logits.record.hidden.sum() * 0
    try:
        return model(**inputs)
    finally:
        head.__class__ = before
        delattr(head, KEY)
        if loss_function is None:
            vars(model).pop("_loss_function", None)
        else:
            model.loss_function = loss_function


class Reference:
    """f(W h + b) of a model, in float64, and the same as its own modules compute it in its own dtype.

    Args:
        head: the output layer; one that computes more than W h + b is used as it is, as a copy in float64.
        reading: what the model's forward does to its logits.
    """

    def __init__(self, head: nn.Module, reading: Reading) -> None:
        self.head, self.reading = head, reading
        ours = (nn.Linear.forward, RecordingLinear.forward)
        own_linear = isinstance(head, LinearHead) and type(head).forward is Head.forward
        self.plain = type(head).forward in ours or own_linear
        self.within = isinstance(head, Head) and not self.plain  # the function stands within the head, as in a mixture
        self.copy = None if self.plain else _double(head)
        self._small: Tensor | None = None  # the weight in float64, if it is small

    @property
    def function(self) -> nn.Module | None:
        """f, as it is applied to `scores`."""
        return None if self.within else self.reading.function

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.head.weight)

    @property
    def bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.head, "bias", None))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Of the output layer with its function."""
        return {name: p for name, p in self.head.named_parameters() if p.is_floating_point()}

    def function_parameters(self) -> dict[str, nn.Parameter]:
        """Those of f, where it is applied to `scores`."""
        names = self.parameters() if self.plain else {}
        return {name: parameter for name, parameter in names.items() if name.startswith("logit_function.")}

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.weight.numel() <= _SMALL:
            if self._small is None:
                self._small = self.weight.detach().cpu().double()
            yield slice(0, len(self.weight)), self._small
            return
        for start in range(0, len(self.weight), _CHUNK):
            rows = slice(start, min(start + _CHUNK, len(self.weight)))
            yield rows, self.weight[rows].detach().cpu().double()

    def scores(self, hidden: Tensor, *, bias: bool = True) -> Tensor:
        """W h + b (N, V) of hidden states (N, D); of a head that computes more, what it returns."""
        with torch.no_grad():
            if self.copy is not None:
                return cast(Tensor, self.copy(hidden)).double()
            scores = torch.cat([hidden @ chunk.T for _, chunk in self._chunks()], -1)
            return scores if self.bias is None or not bias else scores + self.bias.detach().cpu().double()

    def _reach(self, hidden: Tensor) -> Tensor:
        """|W| |h| + |b| (N, V), which bounds the rounding of a product."""
        reach = torch.cat([hidden.abs() @ chunk.abs().T for _, chunk in self._chunks()], -1)
        return reach if self.bias is None else reach + self.bias.detach().cpu().double().abs()

    def apply(self, scores: Tensor) -> Tensor:
        """f of scores (..., V), for all words."""
        return scores if self.function is None else apply_function(self.function, scores).to(scores.device)

    def logits(self, scores: Tensor) -> Tensor:
        """f of scores (..., V), of the words that the model leaves: (..., U)."""
        return self.apply(scores)[..., self.reading.words]

    def own_scores(self, rows: Tensor) -> Tensor:
        """The scores as the head computes them, in its dtype."""
        return self.head.scores(rows) if isinstance(self.head, Head) and not self.within else self.head(rows)

    def own_logits(self, rows: Tensor) -> Tensor:
        """The logits as the head and the model's own operations compute them, in their dtype."""
        logits: Tensor = self.head(rows)
        for _, replay in self.reading.replay:
            logits = replay(logits)
        return logits

    def tolerance(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """How far logits (N, U) may be from float64's, given what the model's own dtype does.

        Two errors are measured with the model's own modules: e, of the scores against W h + b in float64, and k, of the
        function against f at these same scores, relative to 1 + |f|. A logit may be off by

            2 max |f(z +- e) - f(z)| + 4 k (1 + |f(z)|) + 4 eps (1 + |f(z)|),

        with eps that of float32. So a function that the model computes in float32 must be computed in float32, however
        coarse its scores are: where it is saturated, e does not matter.

        Args:
            hidden: (N, D) in float64. rows: the same in the model's dtype and on its device.
        """
        with torch.no_grad():
            scores = self.scores(hidden)
            own, logits = self.own_logits(rows).double().cpu(), self.logits(scores)
            if self.copy is not None:
                off = (own - logits).abs().amax(-1, keepdim=True) + torch.finfo(rows.dtype).eps * logits.abs()
                return 4 * off + 4 * _SINGLE * (1 + logits.abs())
            eps = torch.finfo(rows.dtype).eps
            error = eps / 2 * scores.abs() + 4 * min(eps, _SINGLE) * self._reach(hidden)
            own_scores = self.own_scores(rows).double().cpu()
            error *= max(1.0, float(((own_scores - scores).abs() / error.clamp(min=1e-300)).max()))
            plus, minus = self.logits(scores + error), self.logits(scores - error)
            moved = torch.maximum((plus - logits).abs(), (minus - logits).abs())
            size = 1 + logits.abs()
            own_function = float(((own - self.logits(own_scores)).abs() / size).max())
            return 2 * moved + 4 * (own_function + _SINGLE) * size

    def grad_scores(self, scores: Tensor, target: Tensor, count: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradients of cross_entropy(f(scores), target) / count: to scores (N, V), and to f's own parameters."""
        return self.grad_of(self.logits, scores, target, count, self.function_parameters())

    @staticmethod
    def grad_of(
        logits: Callable[[Tensor], Tensor],
        scores: Tensor,
        target: Tensor,
        count: float,
        parameters: dict[str, nn.Parameter] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of any map from scores to logits."""
        leaf, parameters = scores.detach().requires_grad_(), parameters or {}
        with torch.enable_grad():
            loss = F.cross_entropy(logits(leaf), target, reduction="sum") / count
            if not loss.requires_grad:  # a map that does not look at the scores
                return torch.zeros_like(leaf), {}
            first, *others = torch.autograd.grad(loss, [leaf, *parameters.values()], allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), others, strict=True)]
        return first, {name: grad.cpu().double() for name, grad in zip(parameters, found, strict=True)}

    def grad_hidden(self, hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """G W (N, D), and the sums |G| |W| of the sizes of its terms."""
        if self.copy is not None:
            # Within the head large terms may cancel: a prior's gradient is what two posteriors differ by.
            found, features = self.grads_of_copy(hidden, grad)["input"], hidden.shape[-1]
            rows = [p.detach() for p in self.copy.parameters() if p.ndim == 2 and p.shape[-1] == features]
            inner = sum(float(p.norm(dim=-1).max()) for p in rows) / features**0.5
            return found, found.abs() + inner * grad.abs().sum(-1, keepdim=True)
        pairs = [(grad[:, rows] @ chunk, grad[:, rows].abs() @ chunk.abs()) for rows, chunk in self._chunks()]
        return sum(a for a, _ in pairs), sum(b for _, b in pairs)  # type: ignore[return-value]

    def grad_parameters(self, hidden: Tensor, grad: Tensor) -> Iterator[tuple[str, slice, Tensor, Tensor]]:
        """Of each parameter of the head: its name, some of its rows, their gradient, and the sizes of its terms."""
        if self.copy is not None:
            reach = float((grad.abs().sum(-1) * hidden.norm(dim=-1)).sum())
            for name, found in self.grads_of_copy(hidden, grad).items():
                if name != "input":
                    yield name, slice(None), found, found.abs() + reach / found.numel() ** 0.5
            return
        for start in range(0, len(self.weight), _CHUNK):
            rows = slice(start, start + _CHUNK)
            part = grad[:, rows].T
            yield "weight", rows, part @ hidden, part.abs() @ hidden.abs()
        if self.bias is not None:
            yield "bias", slice(None), grad.sum(0), grad.abs().sum(0)

    def grads_of_copy(self, hidden: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Of a head that computes more than W h + b: the gradients to its "input" and its parameters."""
        assert self.copy is not None
        leaf = hidden.detach().requires_grad_()
        parameters = dict(self.copy.named_parameters())
        with torch.enable_grad():
            found = torch.autograd.grad(
                self.copy(leaf).double(), [leaf, *parameters.values()], grad_outputs=grad, allow_unused=True
            )
        names = ("input", *parameters)
        return {name: value.double() for name, value in zip(names, found, strict=True) if value is not None}


def _double(head: nn.Module) -> nn.Module:
    """A copy of the head in float64 on the CPU, which records nothing."""
    fusion = vars(head).get(KEY)
    copied = copy.deepcopy(head, {id(fusion): None} if fusion is not None else None)
    if fusion is not None:
        copied.__class__ = fusion.head_class
        vars(copied).pop(KEY)
    return copied.double().cpu().requires_grad_(True)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log_softmax(logits)[target] of each token (N,), in float64."""
    return F.cross_entropy(logits.double(), target, reduction="none")


def loss_tolerance(logits: Tensor, tolerance: Tensor, target: Tensor) -> Tensor:
    """How far the cross-entropy of each token (N,) may be off where its logits (N, U) may be off by `tolerance`.

    To first order tolerance[target] + sum_v p_v tolerance[v], and float32's rounding of logits and normaliser.
    """
    of_target = tolerance.gather(-1, target[:, None])[:, 0]
    expected = (logits.softmax(-1) * tolerance).sum(-1)
    return of_target + expected + 8 * _SINGLE * (1 + logits.abs().amax(-1))

"""What makes a model's loss a fused one: a head that records, and what is computed of the record.

Shapes in comments: B batch, T time, D features, V vocabulary.
"""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from uncork.heads import Head, hooks
from uncork.hf.lazy import LazyLogits
from uncork.hf.record import Record, RecordedLogits, Step, Version, function_of
from uncork.logit_functions import LogitFunction
from uncork.loss import TokenStatistics, linear_cross_entropy, token_statistics
from uncork.loss.call import autocast_dtype

_SAMPLE = 64  # tokens
KEY = "_uncork"
"""The attribute of a fused model and of its head that holds their Fusion."""
CONFIG_FIELD = "uncork_head"
"""The field of config.json that says which head the saved weights are for."""


class Recording:
    """Mixed into a head's class: while the model's forward records, a call gives a stand-in for the logits."""

    _stands_for: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the class that it stands for, since its own is made anew in every process."""
        found = super().__reduce_ex__(max(protocol, 2))
        if type(self) is not recording_subclass(cast(Any, self._stands_for)):
            return found  # a class that somebody has put before ours
        return (_new_recording, (self._stands_for,), *found[2:])

    def __call__(self, input: Tensor, *others: Any, answer: Any = None) -> Any:
        call = super().__call__  # type: ignore[misc]
        if answer is not None:
            return call(input, *others, answer=answer)
        fusion: Fusion = getattr(self, KEY)
        if fusion.driver is not None:
            input = fusion.driver(input)
        if others or not fusion.recording:
            return call(input, *others)
        # Where somebody's hook changes or sees the logits, the model computes them as ever. A head of this library has
        # the model's own function within it, which its forward would apply again: it is asked for them by the record.
        if not fusion.owns_function and hooks.on_module(cast(nn.Module, self)):
            return call(input)
        return fusion.record(input)


class RecordingLinear(Recording, nn.Linear):
    """An nn.Linear that can be asked to compute something else from its input, weight and bias, under its hooks."""

    def forward(self, input: Tensor, *, answer: Callable[..., Any] | None = None) -> Any:
        return F.linear(input, self.weight, self.bias) if answer is None else answer(input, self.weight, self.bias)


def recording_class(module: nn.Module) -> type:
    """The class of a module with a recording call; it is called as the class that it stands for."""
    base = type(module)
    return base if issubclass(base, Recording) else recording_subclass(cast(Any, base))


@functools.cache
def recording_subclass(base: type) -> type:
    """The recording class that stands for a class of modules."""
    ours = RecordingLinear if issubclass(base, nn.Linear) else Recording
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    bases = (ours, base) if ours is Recording or base is not nn.Linear else (ours,)
    return type(base.__name__, bases, {**names, "_stands_for": base})


def _new_recording(base: type) -> Any:
    """An empty instance of the recording class that stands for a class, for pickle and copy."""
    kind: Any = recording_subclass(cast(Any, base))
    return kind.__new__(kind)


def correct_size(layer: nn.Module | None) -> None:
    """Sets out_features right: transformers 5.4 leaves the former number on a resized layer whose weight is tied."""
    if type(layer) is nn.Linear and layer.weight.dim() == 2:  # else packed or partitioned numbers
        layer.out_features = layer.weight.shape[0]


def start_recording(head: nn.Module, fusion: "Fusion") -> None:
    """Makes a head the one that a fusion records."""
    _forget_own_forward(head)
    fusion.head, fusion.head_class = head, type(head)
    object.__setattr__(head, KEY, fusion)
    head.__class__ = recording_class(head)
    if "_old_forward" in vars(head):  # accelerate's hooks call what they found there
        head._old_forward = types.MethodType(RecordingLinear.forward, head)  # type: ignore[assignment]


def stop_recording(fusion: "Fusion") -> None:
    """Gives the head its class back."""
    head = fusion.head
    _forget_own_forward(head)
    head.__class__ = fusion.head_class
    if "_old_forward" in vars(head):
        head._old_forward = types.MethodType(type(head).forward, head)  # type: ignore[assignment]
    delattr(head, KEY)


def _forget_own_forward(head: nn.Module) -> None:
    """Takes away a forward of the head's class that stands on the head itself: it would outlive a change of the class.

    Removing accelerate's hooks leaves it there.
    """
    if "forward" in vars(head) and hooks.replaced(head) is None:
        del head.forward


class Fusion:
    """What makes a model's loss a fused one; `fuse_loss` and `attach_head` put it there.

    Args:
        model: the model, whose head is recording. owns_function: whether the head (one of `uncork.heads`) already has
            the model's own function within it, so that what the model's forward does to the logits is left out.
        logits: what `outputs.logits` is, "lazy" or "none".
    """

    def __init__(self, head: nn.Module, *, owns_function: bool, logits: str) -> None:
        self.head, self.owns_function, self.logits_as = head, owns_function, checked_kind(logits)
        self.scores_dtype: torch.dtype | None = None  # of the loss and the statistics
        self.recording = False
        self.steps: tuple[Step, ...] = ()
        self.function: LogitFunction | None = None
        self.driver: Callable[[Tensor], Tensor] | None = None  # replaces the head's input, for `verify`
        self.sample: Tensor | None = None  # of the last loss's hidden states, where a callback asks for it
        self.seen: tuple[tuple[Step, ...], bool] | None = None  # of the first loss: steps, whether words are cut off
        self.plain: nn.Linear | None = None  # the model's own output layer, where the head replaces it
        self.inner: dict[str, Any] = {}  # what the model had of its own under the names that are replaced
        self.head_class: type = type(head)  # before it was a recording one
        self.layers = 1  # how many output layers it has had, of other sizes

    @property
    def own_head(self) -> Head | None:
        """The head, if it is one of this library's."""
        return self.head if isinstance(self.head, Head) else None

    def record(self, input: Tensor) -> RecordedLogits:
        """A stand-in for the head's logits of this input."""
        dtype = autocast_dtype(input.device) or input.dtype
        size = cast(int, self.head.out_features)
        return RecordedLogits(Record(input, slice(0, size), (), size, dtype))

    def loss(
        self,
        logits: Any,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' ForCausalLMLoss, from recorded logits; of logits themselves it is that function's."""
        if not isinstance(logits, RecordedLogits):
            return ForCausalLMLoss(
                logits, labels, cast(int, vocab_size), cast(Any, num_items_in_batch), ignore_index, shift_labels
            )
        record = logits.record
        if self.seen is None:
            self.seen = (record.steps, record.shape[-1] < record.size)
        if vocab_size is not None and vocab_size != record.shape[-1]:
            raise ValueError(f"vocab_size: expected the {record.shape[-1]} words of the logits, got {vocab_size}")
        target = shifted(labels, ignore_index) if shift_labels is None else shift_labels
        if target.numel() != record.hidden.shape[:-1].numel():
            given = "labels" if shift_labels is None else "shift_labels"
            raise ValueError(
                f"{given}: expected one for each of the {tuple(record.hidden.shape[:-1])} logits, got "
                f"{tuple(target.shape)}; with logits_to_keep, give shift_labels of the positions that are kept"
            )
        target = target.reshape(record.hidden.shape[:-1]).to(record.hidden.device)
        total = self.cross_entropy(
            record, target, ignore_index=ignore_index, reduction="mean" if num_items_in_batch is None else "sum"
        )
        if num_items_in_batch is None:
            return total
        return total / (
            num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )

    def cross_entropy(self, record: Record, target: Tensor, **options: Any) -> Tensor:
        """Of the recorded logits, fused."""
        if self.sample is not None and not torch.compiler.is_compiling():
            self.sample = record.hidden.detach().flatten(0, -2)[:_SAMPLE]
        if self.own_head is not None:
            self._require_whole(record)
            return self._unrecorded(self.own_head.loss, record.hidden, target, **options)
        return self._fused(linear_cross_entropy, record, target, **options)

    def statistics(self, record: Record, target: Tensor | None) -> TokenStatistics:
        """Of the recorded logits: log_prob of the target, logsumexp, entropy and argmax, fused."""
        if self.own_head is not None:
            self._require_whole(record)
            return self._unrecorded(self.own_head.statistics, record.hidden, target)
        return self._fused(token_statistics, record, target)

    def _fused(self, compute: Callable[..., Any], record: Record, target: Tensor | None, **options: Any) -> Any:
        """Within the head's own call, where sharding and offloading have its weight at hand."""
        function = self.function_of(record)

        def answer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            weight, bias = narrowed(record, weight), None if bias is None else narrowed(record, bias)
            rows = None if target is None else target.to(input.device)  # where offloading has moved the input
            fixed = {"linear_bias": bias, "logit_function": function, "scores_dtype": self.scores_dtype}
            return compute(input, weight, rows, **fixed, **options)

        return self.head(record.hidden, answer=answer)

    def logits(self, record: Record) -> Tensor:
        """The recorded logits, computed as the model would."""
        logits: Tensor = self._unrecorded(self.head, record.hidden)
        for kind, replay in record.replay:
            if kind != "step" or not self.owns_function:
                logits = replay(logits)
        return logits

    def _unrecorded(self, compute: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What is computed of a record's hidden states, which have been through the driver, by calls of the head."""
        recording, driver = self.recording, self.driver
        self.recording, self.driver = False, None
        try:
            return compute(*args, **options)
        finally:
            self.recording, self.driver = recording, driver

    def argmax(self, record: Record) -> Tensor:
        """The likeliest word of each token."""
        with torch.no_grad():
            return self.statistics(record, None).argmax

    def version(self) -> Version:
        """Changes whenever one of the head's parameters is written or replaced.

        One made under inference_mode has no count; offloading makes another one on the meta device after every call.
        """
        return self.layers, tuple(
            (0 if p.is_meta else id(p), 0 if p.is_inference() else p._version) for p in self.head.parameters()
        )

    def function_of(self, record: Record) -> LogitFunction | None:
        """The logit function that the model's forward applied."""
        if record.steps != self.steps:  # the first time, or after a change of the model's configuration
            self.function, self.steps = function_of(record.steps), record.steps
        return self.function

    def _require_whole(self, record: Record) -> None:
        if record.steps != self.steps:
            raise RuntimeError(
                f"the model's forward does {record.steps} to its logits, and did {self.steps} when the head was "
                "attached: take that configuration back, or attach the head again"
            )

    def run(self, model: Any, args: Any, kwargs: Any) -> Any:
        """The model's own forward."""
        inner = self.inner.get("forward")
        return type(model).forward(model, *args, **kwargs) if inner is None else inner(*args, **kwargs)

    def require_head(self, model: Any) -> None:
        """Raises RuntimeError if the model has another output layer than the one that was fused."""
        if model.get_output_embeddings() is not self.head:
            raise RuntimeError(
                "the model's output layer was replaced since its loss was fused (by set_output_embeddings?): "
                "take the fused loss or the head back, and put it on again"
            )

    def recorded(self, model: Any, args: Any, kwargs: Any) -> Any:
        """The outputs of the model's own forward, with a stand-in for the logits."""
        self.require_head(model)
        self.recording = True
        try:
            return self.run(model, args, kwargs)
        finally:
            self.recording = False

    def finish(self, outputs: Any, *, lazily: bool) -> Any:
        """The model's outputs, in which no stand-in is left.

        Args:
            lazily: whether the logits may be left to be computed later; False computes them.
        """
        if isinstance(outputs, tuple):
            return tuple(self._finished(value, lazily) for value in outputs)
        return type(outputs)(**{name: self._finished(value, lazily) for name, value in outputs.items()})

    def _finished(self, value: Any, lazily: bool) -> Any:
        if not isinstance(value, RecordedLogits):
            return value
        if not lazily:
            return self.logits(value.record)
        return (
            LazyLogits(value.record, self) if self.logits_as == "lazy" and not torch.compiler.is_compiling() else None
        )


def checked_kind(logits: object) -> str:
    """What `outputs.logits` is to be, "lazy" or "none"; a ValueError that names it otherwise."""
    if logits not in ("lazy", "none"):
        raise ValueError(f'logits: expected "lazy" or "none", got {logits!r}')
    return logits


def narrowed(record: Record, rows: Tensor) -> Tensor:
    """The rows of the words that are left."""
    return rows if record.shape[-1] == record.size else rows[record.words]


def shifted(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """What each position is to predict: labels (B, T) moved by one, as transformers does."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def require_model(model: object) -> PreTrainedModel:
    """Returns its argument if it is a transformers model; raises TypeError with what to give instead."""
    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, str | Path):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {model!r}: load it with from_pretrained")
    if isinstance(model, type):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got the class {model.__name__} itself")
    hint = " (of PEFT? give its get_base_model())" if hasattr(model, "get_base_model") else ""
    for name in ("model", "module", "_orig_mod"):  # of a pipeline or a Trainer, of DDP, of torch.compile
        if not hint and isinstance(getattr(model, name, None), PreTrainedModel):
            hint = f" (give its {name})"
    raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{hint}")


def fusion_of(model: nn.Module) -> Fusion:
    """What `fuse_loss` or `attach_head` put there. Raises TypeError if nothing did."""
    if not is_fused(model):
        name = type(require_model(model)).__name__
        raise TypeError(f"model: expected one with a fused loss, got a plain {name}; call fuse_loss first")
    return cast(Fusion, vars(model)[KEY])


def is_fused(model: object) -> bool:
    """Whether `fuse_loss` or `attach_head` has been called on it."""
    return isinstance(getattr(model, "__dict__", {}).get(KEY), Fusion)

"""The fused loss under a transformers model, through its two public seams: its head, and its loss function.

Shapes in comments: B batch, T time, D features, V vocabulary.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from uncork.heads import Head, hooks
from uncork.hf import trl
from uncork.hf.lazy import LazyLogits
from uncork.hf.record import NotRecordable, Record, RecordedLogits, Step, function_of
from uncork.logit_functions import LogitFunction
from uncork.loss import TokenStatistics, linear_cross_entropy, token_statistics
from uncork.loss.call import autocast_dtype

_SAMPLE = 64  # tokens
_KEY = "_uncork"  # where a fused model and its head keep their Fusion


class Recording:
    """Mixed into a head's class: while the model's forward records, a call gives a stand-in for the logits."""

    def __call__(self, input: Tensor, answer: Any = None) -> Any:
        call = super().__call__  # type: ignore[misc]
        if answer is not None:
            return call(input, answer)
        fusion: Fusion = getattr(self, _KEY)
        if fusion.driver is not None:
            input = fusion.driver(input)
        # Where somebody's hook changes or sees the logits, the model computes them as ever.
        if not fusion.recording or hooks.on_module(cast(nn.Module, self)):
            return call(input)
        return fusion.record(input)


class RecordingLinear(Recording, nn.Linear):
    """An nn.Linear that can be asked to compute something else from its input, weight and bias, under its hooks."""

    def forward(self, input: Tensor, answer: Callable[..., Any] | None = None) -> Any:
        return F.linear(input, self.weight, self.bias) if answer is None else answer(input, self.weight, self.bias)


def recording_class(module: nn.Module) -> type:
    """The class of a module with a recording call; it is called as the class that it stands for."""
    base = type(module)
    return base if issubclass(base, Recording) else _recording_class(cast(Any, base))


@functools.cache
def _recording_class(base: type) -> type:
    ours = RecordingLinear if issubclass(base, nn.Linear) else Recording
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (ours, base) if ours is Recording or base is not nn.Linear else (ours,), names)


class Fusion:
    """What makes a model's loss a fused one; `fuse_loss` and `attach_head` put it there.

    Args:
        model: the model, whose head is recording. owns_function: whether the head (one of `uncork.heads`) already has
            the model's own function within it, so that what the model's forward does to the logits is left out.
        logits: what `outputs.logits` is, "lazy" or "none".
    """

    def __init__(self, head: nn.Module, *, owns_function: bool, logits: str) -> None:
        self.head, self.owns_function, self.logits_as = head, owns_function, logits
        self.recording = False
        self.steps: tuple[Step, ...] = ()
        self.function: LogitFunction | None = None
        self.driver: Callable[[Tensor], Tensor] | None = None  # replaces the head's input, for `verify`
        self.sample: Tensor | None = None  # of the last loss's hidden states, where a callback asks for it
        self.seen: tuple[tuple[Step, ...], bool] | None = None  # of the first loss: steps, whether words are cut off
        self.plain: nn.Linear | None = None  # the model's own output layer, where the head replaces it
        self.inner: Any = None  # the forward, loss function and class of the head that were there before
        self.inner_loss: Any = None
        self.head_class: type = type(head)

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
            return self.own_head.loss(record.hidden, target, **options)
        function = self.function_of(record)

        def answer(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            weight, bias = narrowed(record, weight), None if bias is None else narrowed(record, bias)
            rows = target.to(input.device)  # where offloading has moved the input
            return linear_cross_entropy(input, weight, rows, linear_bias=bias, logit_function=function, **options)

        return self.head(record.hidden, answer)

    def statistics(self, record: Record, target: Tensor | None) -> TokenStatistics:
        """Of the recorded logits: log_prob of the target, logsumexp, entropy and argmax, fused."""
        if self.own_head is not None:
            self._require_whole(record)
            return self.own_head.statistics(record.hidden, target)
        function = self.function_of(record)

        def answer(input: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStatistics:
            weight, bias = narrowed(record, weight), None if bias is None else narrowed(record, bias)
            rows = None if target is None else target.to(input.device)
            return token_statistics(input, weight, rows, linear_bias=bias, logit_function=function)

        return self.head(record.hidden, answer)

    def logits(self, record: Record) -> Tensor:
        """The recorded logits, computed as the model would."""
        driver, self.driver = self.driver, None  # the record's hidden states have been through it
        try:
            logits: Tensor = self.head(record.hidden)
        finally:
            self.driver = driver
        for kind, replay in record.replay:
            if kind != "step" or not self.owns_function:
                logits = replay(logits)
        return logits

    def argmax(self, record: Record) -> Tensor:
        """The likeliest word of each token."""
        with torch.no_grad():
            return self.statistics(record, None).argmax

    def version(self) -> int:
        """Changes whenever the head's weight is written; 0 for one made under inference_mode, which has no count."""
        weight = cast(Tensor, self.head.weight)
        return 0 if weight.is_inference() else weight._version

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
        return type(model).forward(model, *args, **kwargs) if self.inner is None else self.inner(*args, **kwargs)

    def recorded(self, model: Any, args: Any, kwargs: Any) -> Any:
        """The outputs of the model's own forward, with a stand-in for the logits."""
        if model.get_output_embeddings() is not self.head:
            raise RuntimeError(
                "the model's output layer was replaced since its loss was fused (by resize_token_embeddings?): "
                "take the fused loss or the head back, and put it on again"
            )
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


def narrowed(record: Record, rows: Tensor) -> Tensor:
    """The rows of the words that are left."""
    return rows if record.shape[-1] == record.size else rows[record.words]


def shifted(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """What each position is to predict: labels (B, T) moved by one, as transformers does."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def fusion_of(model: nn.Module) -> Fusion:
    """What `fuse_loss` or `attach_head` put there. Raises TypeError if nothing did."""
    found = vars(model).get(_KEY)
    if not isinstance(found, Fusion):
        raise TypeError(
            f"model: expected one with a fused loss, got a plain {type(model).__name__}; call fuse_loss first"
        )
    return found


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse_loss` or `attach_head` has been called on it."""
    return _KEY in vars(model)


def plain_head(model: Any) -> nn.Linear:
    """The model's output layer, checked to be an nn.Linear itself.

    Raises:
        TypeError: the model is no transformers model, is fused already, or has another output layer or a hook on it.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = " (of PEFT? give its get_base_model())" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}{wrapped}")
    if is_fused(model):
        raise TypeError("model: expected one without a fused loss or an attached head, got one that has it already")
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"model: expected an output layer, and {type(model).__name__}.get_output_embeddings() is None")
    # fully_shard puts a class of its own before the module's.
    kinds = [c for c in type(head).__mro__ if not c.__module__.startswith("torch.distributed.")]
    if kinds[0] is not nn.Linear and not (isinstance(head, nn.Linear) and kinds[0].__name__ == "FSDPLinear"):
        raise TypeError(
            f"model's output layer: expected an nn.Linear itself, got {type(head).__module__}."
            f"{type(head).__qualname__}, whose output may be more than its weight and bias (an adapter: merge it "
            "first, or adapt the body alone)"
        )
    if hook := hooks.on_module(head):
        raise TypeError(
            f"model's output layer: expected that nothing sees or changes its input or logits, got {hook}: remove it"
        )
    return cast(nn.Linear, head)


def install(model: PreTrainedModel, head: nn.Module, fusion: Fusion) -> None:
    """Puts a fusion under a model, and reads the function of its logits. The model is as it was if that fails."""
    signature = inspect.signature(model.forward)
    position = list(signature.parameters).index("labels") if "labels" in signature.parameters else None
    if position is None:
        raise TypeError(f"model: expected a forward with labels, got {type(model).__name__}.forward{signature}")

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine: Fusion = getattr(self, _KEY)
        if kwargs.pop(trl.ASKED, False):
            return trl.fused_output(mine, self, args, kwargs)
        labels = kwargs.get("labels", args[position] if len(args) > position else None)
        if labels is None and not mine.owns_function:
            return mine.run(self, args, kwargs)
        return mine.finish(mine.recorded(self, args, kwargs), lazily=labels is not None)

    forward.fusing = True  # type: ignore[attr-defined]
    fusion.inner = vars(model).get("forward")
    fusion.inner_loss = vars(model).get("_loss_function")
    fusion.head_class = type(head)
    object.__setattr__(head, _KEY, fusion)
    object.__setattr__(model, _KEY, fusion)
    head.__class__ = recording_class(head)
    if "_old_forward" in vars(head):  # accelerate's hooks call what they found there
        head._old_forward = types.MethodType(RecordingLinear.forward, head)  # type: ignore[assignment]
    model.forward = types.MethodType(forward, model)
    model.loss_function = fusion.loss
    try:
        probe(model, fusion)
    except BaseException:
        remove(model)
        raise


def remove(model: PreTrainedModel) -> None:
    """Takes a fusion from a model."""
    fusion = fusion_of(model)
    head = fusion.head
    head.__class__ = fusion.head_class
    if "_old_forward" in vars(head):
        head._old_forward = types.MethodType(type(head).forward, head)  # type: ignore[assignment]
    for module in (head, model):
        delattr(module, _KEY)
    for name, value in (("forward", fusion.inner), ("_loss_function", fusion.inner_loss)):
        if value is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, value)


def probe(model: PreTrainedModel, fusion: Fusion) -> None:
    """Runs the model on two tokens with labels, so that what cannot be recorded is said now."""
    training = model.training
    model.eval()
    embedding: Any = model.get_input_embeddings()
    # Where accelerate keeps the weight elsewhere, its hook moves the input to where it will be.
    device = "cpu" if hasattr(embedding, "_hf_hook") else embedding.weight.device
    ids = torch.arange(2, device=device)[None]
    try:
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
    except NotRecordable:
        raise
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__}: could not run it on two tokens with labels, from which the function of its "
            f"logits is read: {error}"
        ) from error
    finally:
        model.train(training)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # a forward without a backward leaves the outermost unsharded
                module.reshard()
    if fusion.seen is None:
        raise TypeError(
            f"{type(model).__name__} computes its loss by itself, without its loss_function: it cannot be fused"
        )


def fuse_loss(model: PreTrainedModel, *, logits: str = "lazy") -> PreTrainedModel:
    """Make a causal language model compute its loss without its (tokens, V) logits; the model itself is returned.

        outputs = model(input_ids, labels=labels)      # outputs.loss and all gradients as before

    equals what the model computed before, ForCausalLMLoss(f(W h + b), labels). The function f is the model's own: while
    labels are given, the head returns a stand-in that records what the model's forward does to the logits, and the loss
    is `uncork.linear_cross_entropy` with that function. No configuration field is read and no family is known by name.
    Without labels nothing changes. `unfuse_loss` takes it back.

    Args:
        model: whose output embeddings are an nn.Linear and whose loss is transformers' ForCausalLMLoss.
        logits: what `outputs.logits` is where labels are given. "lazy": a tensor that is computed when it is first
            read (`uncork.hf.LazyLogits`). "none": None. Under torch.compile it is None.

    Returns:
        The model.

    Raises:
        TypeError: another kind of model, head or loss; the message says what was found.
        RuntimeError: the model does not run on two tokens with labels.
        NotRecordable: the model's forward does to its logits what no increasing function of this library is; the
            message names the operation.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, ids = LlamaForCausalLM(config), torch.arange(12).view(2, 6)
    >>> before = model(ids, labels=ids).loss
    >>> torch.allclose(fuse_loss(model)(ids, labels=ids).loss, before)
    True
    """
    if logits not in ("lazy", "none"):
        raise ValueError(f'logits: expected "lazy" or "none", got {logits!r}')
    head = plain_head(model)
    loss = model.loss_function
    if loss is not ForCausalLMLoss:
        raise TypeError(
            f"model.loss_function: expected transformers' ForCausalLMLoss, got {getattr(loss, '__qualname__', loss)}: "
            "only the cross-entropy of the next token can be fused"
        )
    install(model, head, Fusion(head, owns_function=False, logits=logits))
    return model


def unfuse_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Take back what `fuse_loss` did; the model itself is returned.

    Raises:
        TypeError: its loss is not fused.
        RuntimeError: its forward or the class of its output layer was replaced by somebody else since.
    """
    fusion = fusion_of(model)
    if fusion.owns_function:
        raise TypeError("model: expected one with a fused loss, got one with an attached head; use detach_head")
    require_outermost(model)
    remove(model)
    return model


def require_outermost(model: PreTrainedModel) -> None:
    """Raises RuntimeError if somebody has replaced the model's forward or its head's class since it was fused."""
    forward = getattr(vars(model).get("forward"), "__func__", None)
    if not getattr(forward, "fusing", False):
        raise RuntimeError("model.forward was replaced since the loss was fused: take that back first")
    fusion = fusion_of(model)
    if type(fusion.head) not in (fusion.head_class, _recording_class(fusion.head_class)):
        raise RuntimeError(
            "the class of the model's output layer was changed since the loss was fused (by fully_shard, or a "
            "parametrization): take that back first"
        )


def read_logit_function(model: PreTrainedModel) -> LogitFunction | None:
    """The function f of a model's logits f(W h + b), read from its own forward; None for the identity.

    Args:
        model: as for `fuse_loss`, fused or not.

    Raises:
        TypeError, NotRecordable: as `fuse_loss`.
    """
    if is_fused(model):
        fusion = fusion_of(model)
        return fusion.function if fusion.own_head is None else cast(Any, fusion.own_head.logit_function)
    fuse_loss(model)
    try:
        return fusion_of(model).function
    finally:
        unfuse_loss(model)

"""The methods that a fused model has in place of its own: no closures, so that it can be pickled and copied."""

import inspect
import types
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from uncork.hf import trl
from uncork.hf.fusion import CONFIG_FIELD, Fusion, correct_size, fusion_of, start_recording, stop_recording


class Method:
    """Called in place of the method of that name of one model; `inspect.signature` gives that method's."""

    name: str

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __wrapped__(self) -> Any:
        return types.MethodType(getattr(type(self.model), self.name), self.model)


class FusedForward(Method):
    """The model's own forward, with a stand-in for the logits while labels are given."""

    name = "forward"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        signature = inspect.signature(model.forward)
        if "labels" not in signature.parameters:
            raise TypeError(f"model: expected a forward with labels, got {type(model).__name__}.forward{signature}")
        self.position = list(signature.parameters).index("labels")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, position = self.model, self.position
        if args and args[0] is model:  # accelerate's unwrap_model binds to it what was under mixed precision
            args = args[1:]
        fusion = fusion_of(model)
        if kwargs.pop(trl.ASKED, False):
            return trl.fused_output(fusion, model, args, kwargs)
        labels = kwargs.get("labels", args[position] if len(args) > position else None)
        if labels is None and not fusion.owns_function:
            return fusion.run(model, args, kwargs)
        return fusion.finish(fusion.recorded(model, args, kwargs), lazily=labels is not None)


class Resize(Method):
    """The model's own resize_token_embeddings, which finds the output layer that it knows; the head follows its size.

    It makes an nn.Linear of the new size, or resizes the embeddings that are tied to it. A head takes over its weight
    and bias, and keeps its function and its mixture.
    """

    name = "resize_token_embeddings"

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        model, fusion = self.model, fusion_of(self.model)
        fusion.require_head(model)
        own = fusion.inner.get(self.name) or self.__wrapped__
        if fusion.owns_function:
            model.set_output_embeddings(plain_layer(fusion))
        else:
            stop_recording(fusion)
        try:
            return cast(nn.Embedding, own(*args, **kwargs))
        finally:
            _follow(model, fusion)


def plain_layer(fusion: Fusion) -> nn.Linear:
    """The nn.Linear that an attached head stands for, with the head's weight and bias."""
    head, plain = cast(Any, fusion.head), cast(nn.Linear, fusion.plain)
    plain.weight, plain.bias = head.weight, head.bias
    return plain.train(head.training)


def _follow(model: PreTrainedModel, fusion: Fusion) -> None:
    """Puts the fusion, with its head, on the output layer that the model has now."""
    layer: Any = model.get_output_embeddings()
    fusion.layers += 1  # lazy logits of the former one cannot be computed any more
    correct_size(layer)
    if not fusion.owns_function:
        start_recording(layer, fusion)
        return
    head: Any = fusion.head
    head.vocab_size = layer.out_features  # first, since the head checks its weight's shape
    head.weight, head.bias = layer.weight, layer.bias
    fusion.plain = layer
    model.set_output_embeddings(head)
    setattr(model.config, CONFIG_FIELD, {**getattr(model.config, CONFIG_FIELD), "spec": head.spec()})

"""The methods that a fused model has in place of its own: no closures, so that it can be pickled and copied."""

import inspect
import types
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from uncork.hf import trl
from uncork.hf.fusion import Fusion, fusion_of


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
        fusion = fusion_of(model)
        if kwargs.pop(trl.ASKED, False):
            return trl.fused_output(fusion, model, args, kwargs)
        labels = kwargs.get("labels", args[position] if len(args) > position else None)
        if labels is None and not fusion.owns_function:
            return fusion.run(model, args, kwargs)
        return fusion.finish(fusion.recorded(model, args, kwargs), lazily=labels is not None)


def plain_layer(fusion: Fusion) -> nn.Linear:
    """The nn.Linear that an attached head stands for, with the head's weight and bias."""
    head, plain = cast(Any, fusion.head), cast(nn.Linear, fusion.plain)
    plain.weight, plain.bias = head.weight, head.bias
    return plain

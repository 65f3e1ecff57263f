"""What stands in for a call's tensors where only their shapes count."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uncork.loss.call import Call
from uncork.loss.target import IndexTarget


class Described:
    """Shape, dtype and device of a tensor that need not exist, for rules that ask for no more."""

    requires_grad = False

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def numel(self) -> int:
        return self.shape.numel()


# What an implementation takes that reads a tensor's memory itself.
PLAIN = (Tensor, nn.Parameter, Described)


def on_meta(call: Call, tokens: int) -> Call:
    """A call of that many tokens with index targets on the meta device, which has shapes and no memory."""

    def empty(tensor: Tensor | None, *leading: int) -> Tensor | None:
        if tensor is None:
            return None
        shape = (*leading, *tensor.shape[len(leading) :])
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    index = torch.empty(tokens, dtype=torch.int64, device="meta")
    like = torch.empty((), dtype=call.dtype, device="meta")
    target = IndexTarget.build(index, -100, None, 0.0, call.weight.shape[0], like)
    state = call.module_state
    if state is not None:
        state = state._replace(constants={name: t.to("meta") for name, t in state.constants.items()})
    tensors: dict[str, Any] = {
        "input": empty(call.input, tokens),
        "weight": empty(call.weight),
        "bias": empty(call.bias),
        "prior_logits": empty(call.prior_logits, tokens),
    }
    return replace(call, **tensors, target=target, module_state=state)

"""What a Trainer logs of a learned function on the logits."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback

from uncork.hf.fuse import require_outermost
from uncork.hf.fusion import Fusion, fusion_of, is_fused
from uncork.logit_functions import LogitFunction
from uncork.logit_functions.base import with_bound


class LogitFunctionCallback(TrainerCallback):
    """Adds to Trainer's logs the slopes of an attached head's function, and the share of scores beyond its bound.

    The keys are "function_slope/-10" ... and "function_beyond_bound": the share, over the last batch's tokens and all
    words, of scores W h + b beyond PLIF's (or the monotone network's) outermost knots, where the function goes on with
    its last slope. They stand in `trainer.state.log_history`, and reach the trackers that are called after it.

    It also stops a training whose forward was replaced after the head was attached or the loss fused, as TRL's trainers
    do: the function would be left out of the loss. `fuse_loss(trainer.model)` or `attach_head(trainer.model, ...)` is
    right after the trainer is made.

    Args:
        scores: where the slopes are taken, in scores.

    >>> LogitFunctionCallback((-5.0, 5.0)).scores
    (-5.0, 5.0)
    """

    def __init__(self, scores: Sequence[float] = (-20.0, -10.0, -5.0, 0.0, 5.0, 10.0, 20.0)) -> None:
        self.scores = tuple(float(score) for score in scores)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Checks that the model's forward still goes through the head."""
        base = _base(model)
        if not is_fused(base):
            raise TypeError("model: expected one with a fused loss or an attached head, got a plain one")
        require_outermost(base, to_take_back=False)
        fusion_of(base).sample = torch.empty(0)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Lets the last batch go."""
        fusion_of(_base(model)).sample = None

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        """Adds the numbers to the logs of a training step."""
        base = _base(model)
        if logs is None or "loss" not in logs or not is_fused(base):
            return
        found = function_numbers(fusion_of(base), self.scores)
        logs.update(found)
        state.log_history[-1].update(found)


def function_numbers(fusion: Fusion, scores: Sequence[float]) -> dict[str, float]:
    """Slopes of the head's whole function at these scores, and the share of the sampled scores beyond its bound."""
    head = fusion.own_head
    function: Any = fusion.function if head is None else head.logit_function
    if function is None:
        return {}
    at = torch.tensor(scores, dtype=torch.float64, device=cast(Tensor, fusion.head.weight).device)
    with torch.no_grad():
        slopes = function.derivative(at).tolist()
    found = {f"function_slope/{score:g}": slope for score, slope in zip(scores, slopes, strict=True)}
    bounded = with_bound(function) if isinstance(function, LogitFunction) else None
    if head is not None and bounded is not None and fusion.sample is not None and fusion.sample.numel():
        before, bound = bounded
        with torch.no_grad():
            found["function_beyond_bound"] = (
                (before(head.scores(fusion.sample).double()).abs() > bound).double().mean().item()
            )
    return found


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model

"""What TRL's trainers ask of a model's fused head (`add_fused_lm_head`), answered with the model's own function."""

from typing import Any

import torch

from uncork.hf.record import Fused, RecordedLogits

ASKED = "fused_lm_head"
"""The keyword with which TRL's trainers call a model."""


def fused_output(fusion: Fused, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """TRL's FusedCausalLMOutput: log-probabilities, entropy and whether the target is likeliest, for each token.

    TRL computes them from W, b and the fields of the configuration that it knows. Here they are computed from the
    record of the model's own forward, so every function that can be recorded or attached is in them.

    Args:
        args, kwargs: of the model's forward, labels among them.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    labels, shift_labels, count = (kwargs.pop(key, None) for key in ("labels", "shift_labels", "num_items_in_batch"))
    outputs = fusion.recorded(model, args, kwargs)
    logits: RecordedLogits = outputs.logits
    target = labels[:, 1:] if shift_labels is None else shift_labels
    record = (logits[:, :-1] if shift_labels is None else logits).record
    mask = target != -100
    log_prob = -fusion.cross_entropy(record, target, reduction="none")
    with torch.no_grad():
        found = fusion.statistics(record, None)
    loss = -log_prob.sum() / (mask.sum().clamp(min=1) if count is None else count)
    aux_loss = outputs.get("aux_loss")
    if aux_loss is not None:
        loss = loss + getattr(model, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=log_prob,
        entropy=found.entropy.masked_fill(~mask, 0),
        is_top1=(found.argmax == target) & mask,
        label_mask=mask,
        aux_loss=aux_loss,
    )

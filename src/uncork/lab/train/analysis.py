"""What the output layer of one trained model does on held-out text.

Shapes in comments: N tokens, C sampled contexts, V vocabulary, D features.
"""

from typing import Any, cast

import torch
from torch import Tensor

from uncork.diagnose.output_layer import describe_head, loss_by_frequency, quantiles_of
from uncork.heads import Head
from uncork.lab.data.batching import IGNORE_INDEX, evaluation_batches, number_of_batches
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel
from uncork.lab.run.progress import announce, told
from uncork.lab.train.evaluation import evaluation_mode


def analyse(
    model: LanguageModel,
    tokens: Tensor,
    counts: Tensor,
    *,
    batch_size: int,
    bptt: int,
    contexts: int = 1000,
) -> dict[str, Any]:
    """What the head of a trained model does on held-out text, as plain JSON (the run's analysis.json).

    Args:
        model: a language model whose head is a `uncork.heads.Head`; it is evaluated, and left in the mode it was in.
        tokens: (N,) integers, held-out text. counts: (V,) how often each word stands in the training text.
        batch_size, bptt: how the text is read, see `evaluation_batches`.
        contexts: C, evenly spread over the text; fewer where the text is shorter.

    Returns:
        rank, function, histogram: what `describe_head` says of the C contexts.
        deciles: `loss_by_frequency` of the whole text.
        cross_entropy, entropy: means over the text's tokens (nats). target_log_prob_quantiles.

    Raises:
        LabError: the text is too short, or contexts is below 1.
        ValueError: counts has another shape than (V,).
        TypeError: the model's head is no Head.
    """
    head = _checked_head(model, counts)
    if contexts < 1:
        raise LabError(f"contexts must be at least 1, got {contexts}")
    with evaluation_mode(model), torch.no_grad():
        features, sampled_target, per_token = _read(model, head, tokens, batch_size, bptt, contexts)
        announce("computing the rank of the log-probabilities")
        return {
            **describe_head(head, features, sampled_target),
            "deciles": loss_by_frequency(counts, per_token["target"], per_token["log_prob"]),
            "cross_entropy": -float(per_token["log_prob"].mean()),
            "entropy": float(per_token["entropy"].mean()),
            "target_log_prob_quantiles": quantiles_of(per_token["log_prob"]),
        }


def _checked_head(model: LanguageModel, counts: Tensor) -> Head:
    head = model.head
    if not isinstance(head, Head):
        raise TypeError(f"model.head: expected a uncork.heads.Head, got {type(head).__name__}")
    if tuple(counts.shape) != (head.vocab_size,):
        raise ValueError(f"counts: expected shape ({head.vocab_size},), got {tuple(counts.shape)}")
    return head


def _read(
    model: LanguageModel, head: Head, tokens: Tensor, batch_size: int, bptt: int, contexts: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features (C, D) and targets (C,) of the sampled contexts; target, log_prob and entropy (N - 1,) of every one."""
    device = next(model.parameters()).device
    total = len(tokens) - 1
    # The sampled contexts, as positions among the N - 1 targets in the order of the batches.
    wanted = torch.arange(min(contexts, max(total, 1))) * total // min(contexts, max(total, 1))
    state: tuple[Tensor, ...] = ()
    sampled: list[tuple[Tensor, Tensor]] = []
    columns: dict[str, list[Tensor]] = {"target": [], "log_prob": [], "entropy": []}
    seen = 0
    batches = evaluation_batches(tokens, batch_size, bptt)
    for batch, batch_target in told(batches, "analysing", number_of_batches(tokens, batch_size, bptt)):
        features, state = model.features(batch.to(device), state)
        kept = (batch_target != IGNORE_INDEX).flatten()
        rows = features.flatten(0, 1)[kept.to(device)]  # (kept, D)
        target = batch_target.flatten()[kept]
        statistics = head.statistics(rows, target.to(device))
        columns["target"].append(target.cpu())
        columns["log_prob"].append(cast(Tensor, statistics.log_prob).cpu().double())
        columns["entropy"].append(statistics.entropy.cpu().double())
        here = wanted[(wanted >= seen) & (wanted < seen + len(rows))] - seen
        sampled.append((rows[here.to(device)], target[here]))
        seen += len(rows)
    chosen, chosen_target = (torch.cat(column) for column in zip(*sampled, strict=True))
    return chosen, chosen_target, {name: torch.cat(parts) for name, parts in columns.items()}

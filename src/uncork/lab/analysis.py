"""What the output layer of one trained model does: its rank, its function, its scores, and which words it serves.

Shapes in comments: N tokens, C sampled contexts, V vocabulary, D features, B streams, T time.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from uncork.diagnose.rank import effective_rank, rank_of, singular_values, tail_energy
from uncork.heads import Head
from uncork.lab.data.batching import IGNORE_INDEX, evaluation_batches
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel
from uncork.logit_functions import LogitFunction

EFFECTIVE = ("1e-2", "1e-4", "1e-6")
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
DECILES = 10
BINS = 80
GRID = 201
HISTOGRAM_CONTEXTS = 200
CHUNK = 50  # contexts at once: (CHUNK, K, V) float64 scores stay below about 200 MB at K = 15, V = 33,000


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

    The rank is that of the matrix log Q of C contexts, evenly spread over the text, times all V words. Features,
    weights and the function's parameters are taken as they were trained, and log Q is computed from them in float64:
    float32 logits are rounded, which alone fills the rank.

    Args:
        model: a language model whose head is a `uncork.heads.Head`; it is evaluated, and left in the mode it was in.
        tokens: (N,) integers, held-out text. counts: (V,) how often each word stands in the training text.
        batch_size, bptt: how the text is read, see `evaluation_batches`.
        contexts: C; fewer where the text is shorter. The numerical rank is at most min(C, V).

    Returns:
        rank: contexts, in_features, vocab_size, linear_rank (what a linear softmax on these word vectors can reach:
            their size + 1, + 1 with a bias), numerical, effective (eps -> k), tail_energy (share of the squared
            singular values beyond linear_rank), singular_values.
        function: x, y with f(0) = 0, and slope f', over the range of the sampled scores; None without a function.
        histogram: edges, counts and quantiles of the scores of 200 contexts (a mixture's of all components);
            target_quantiles of those of their targets. Impossible words (-inf) are left out.
        deciles: of the words by training frequency, see `frequency_deciles`: decile (1 holds the most frequent words),
            words, min_count and max_count in training, tokens in this text and their mean cross_entropy (nats).
        cross_entropy, entropy: means over the text's tokens (nats). target_log_prob_quantiles.

    Raises:
        LabError: the text is too short, or contexts is below 1.
        ValueError: counts has another shape than (V,).
        TypeError: the model's head is no Head.
    """
    head = _checked_head(model, counts)
    if contexts < 1:
        raise LabError(f"contexts must be at least 1, got {contexts}")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features, sampled_target, per_token = _read(model, head, tokens, batch_size, bptt, contexts)
            wide = _in_float64(head)
            function = wide.logit_function
            histogram = _histogram(wide, features, sampled_target)
            return {
                "rank": _rank(wide, features),
                "function": _function(function, histogram["edges"]) if isinstance(function, LogitFunction) else None,
                "histogram": histogram,
                "deciles": _deciles(counts, per_token["target"], per_token["log_prob"]),
                "cross_entropy": -float(per_token["log_prob"].mean()),
                "entropy": float(per_token["entropy"].mean()),
                "target_log_prob_quantiles": _quantiles(per_token["log_prob"]),
            }
    finally:
        model.train(training)


def frequency_deciles(counts: Tensor) -> Tensor:
    """The decile 0 ... 9 of each word: words sorted by training count, cut into ten parts of equal training tokens.

    Tenths of the vocabulary would put four tokens of five into the first part and nearly none into the last five. A
    word belongs to the tenth in which the middle of its tokens lies, so a word with more than a tenth of all tokens
    can leave a part empty. Of two words with the same count the first comes first; words never seen are in the last.

    Args:
        counts: (V,) integers. Returns: (V,) int64.

    >>> frequency_deciles(torch.tensor([40, 10, 30, 10, 10, 0])).tolist()
    [2, 7, 5, 8, 9, 9]
    """
    order = counts.argsort(descending=True, stable=True)
    mass = counts[order].double()
    total = float(mass.sum())
    if total <= 0:
        raise ValueError("counts: expected some word that occurs in the training text, got none")
    middle = (mass.cumsum(0) - mass / 2) / total
    decile = torch.empty_like(order)
    decile[order] = (DECILES * middle).floor().long().clamp(max=DECILES - 1)
    return decile.masked_fill(counts == 0, DECILES - 1)


def _checked_head(model: LanguageModel, counts: Tensor) -> Head:
    head = model.head
    if not isinstance(head, Head):
        raise TypeError(f"model.head: expected a uncork.heads.Head, got {type(head).__name__}")
    if tuple(counts.shape) != (head.vocab_size,):
        raise ValueError(f"counts: expected shape ({head.vocab_size},), got {tuple(counts.shape)}")
    return head


def _in_float64(head: Head) -> Head:
    """A copy of the head in float64, on the CPU where the device has no float64."""
    parameter = next(head.parameters())
    device = "cpu" if parameter.device.type == "mps" else parameter.device
    return copy.deepcopy(head).to(device).double().eval()


def _read(
    model: LanguageModel, head: Head, tokens: Tensor, batch_size: int, bptt: int, contexts: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features (C, D) and targets (C,) of the sampled contexts; target, log_prob and entropy (N - 1,) of every one."""
    device = next(model.parameters()).device
    total = len(tokens) - 1
    # Sampled places, of the N - 1 targets in the order of the batches.
    wanted = torch.arange(min(contexts, max(total, 1))) * total // min(contexts, max(total, 1))
    state: tuple[Tensor, ...] = ()
    sampled: list[tuple[Tensor, Tensor]] = []
    columns: dict[str, list[Tensor]] = {"target": [], "log_prob": [], "entropy": []}
    seen = 0
    for batch, batch_target in evaluation_batches(tokens, batch_size, bptt):
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


def _wide_chunks(head: Head, features: Tensor) -> Iterator[Tensor]:
    """Rows of the features, a few at a time, in float64 on the head's device."""
    for rows in features.to(head.weight.device).split(CHUNK):
        yield rows.double()


def _rank(head: Head, features: Tensor) -> dict[str, Any]:
    log_prob = torch.cat([head.log_prob(rows) for rows in _wide_chunks(head, features)])  # (C, V)
    values = singular_values(log_prob)
    linear_rank = head.weight.shape[1] + 1 + (head.bias is not None)
    return {
        "contexts": len(features),
        "in_features": head.in_features,
        "vocab_size": head.vocab_size,
        "linear_rank": linear_rank,
        "numerical": rank_of(values, *log_prob.shape),
        "effective": {eps: effective_rank(values, float(eps)) for eps in EFFECTIVE},
        "tail_energy": tail_energy(values, linear_rank),
        "singular_values": values.tolist(),
    }


def _histogram(head: Head, features: Tensor, target: Tensor) -> dict[str, Any]:
    """Over at most 200 of the sampled contexts, evenly spread."""
    count = min(HISTOGRAM_CONTEXTS, len(features))
    chosen = torch.arange(count) * len(features) // count
    features, target = features[chosen.to(features.device)], target[chosen]
    scores, of_target = [], []
    for rows, ids in zip(_wide_chunks(head, features), target.split(CHUNK), strict=True):
        batch = head.scores(rows).cpu()  # (C, V) or (C, K, V)
        batch = batch.unflatten(-1, (-1, head.vocab_size)).reshape(len(rows), -1, head.vocab_size)
        of_target.append(batch.gather(-1, ids[:, None, None].expand(-1, batch.shape[1], 1)).flatten())
        scores.append(batch.flatten().float())
    everything = torch.cat(scores)
    everything = everything[everything.isfinite()]
    low, high = float(everything.min()), float(everything.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    inner = edges[1:-1].float()
    binned = torch.bincount(torch.bucketize(everything, inner, right=True), minlength=BINS)
    return {
        "contexts": count,
        "edges": edges.tolist(),
        "counts": binned.tolist(),
        "quantiles": _quantiles(everything),
        "target_quantiles": _quantiles(torch.cat(of_target)),
    }


def _function(function: LogitFunction, edges: list[float]) -> dict[str, list[float]]:
    """f over the range of the scores, which is made to hold 0, where the free constant is taken off."""
    x = torch.linspace(min(edges[0], 0.0), max(edges[-1], 0.0), GRID, dtype=torch.float64)
    x = x.to(next(function.parameters(), x).device)
    origin = function(torch.zeros_like(x[:1]))
    y, slope = function(x) - origin, function.derivative(x)
    return {"x": x.tolist(), "y": y.tolist(), "slope": slope.tolist()}


def _deciles(counts: Tensor, target: Tensor, log_prob: Tensor) -> list[dict[str, Any]]:
    counts = counts.cpu()
    decile = frequency_deciles(counts)
    tokens = torch.bincount(decile[target], minlength=DECILES)
    sums = torch.zeros(DECILES, dtype=torch.float64).index_add_(0, decile[target], log_prob)
    rows = []
    for index in range(DECILES):
        own = counts[decile == index]
        number = int(tokens[index])
        rows.append(
            {
                "decile": index + 1,
                "words": len(own),
                "min_count": int(own.min()) if len(own) else None,
                "max_count": int(own.max()) if len(own) else None,
                "tokens": number,
                "cross_entropy": -float(sums[index]) / number if number else None,
            }
        )
    return rows


def _quantiles(values: Tensor) -> dict[str, float]:
    """Quantiles by sorting: torch.quantile refuses more than 2^24 numbers."""
    ordered = values.sort().values
    return {f"{q:g}": float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}

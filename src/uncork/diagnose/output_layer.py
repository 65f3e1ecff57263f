"""What the output layer of a trained model does: its rank, its function, its scores, its loss by word frequency.

Shapes in comments: C contexts, V vocabulary, D features, K components, N tokens.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from uncork.diagnose.rank import check_real, effective_rank, rank_of, singular_values, tail_energy
from uncork.heads import Head
from uncork.logit_functions import LogitFunction
from uncork.logit_functions.base import with_bound
from uncork.loss.call import check_classes
from uncork.messages import kind_of

EFFECTIVE = ("1e-2", "1e-4", "1e-6")
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1.0)
DECILES = 10
BINS = 80
GRID = 201
HISTOGRAM_CONTEXTS = 200
SLOPE_GRID = tuple(range(-20, 21, 2))
"""The scores at which the metrics of a validation record the slopes of a learned function."""
CHUNK = 50  # contexts at once: (CHUNK, K, V) float64 scores stay below about 200 MB at K = 15, V = 33,000


@torch.no_grad()
def describe_head(head: Head, features: Tensor, target: Tensor) -> dict[str, Any]:
    """Rank, function and scores of a head over sampled contexts, as plain JSON.

    The rank is that of the matrix log Q of C contexts times all V words. Features, weights and the function's
    parameters are taken as they were trained, and log Q is computed from them in float64: the rounding of float32
    logits alone would make the matrix one of full rank.

    Args:
        head: a head, in the mode in which it is to be described.
        features: (C, D) what the head receives in each context, C >= 1. target: (C,) the word that came next.

    Returns:
        A dictionary of three.

        - rank: contexts, in_features, vocab_size, linear_rank (what a linear softmax on these word vectors can reach:
          their size + 1, + 1 with a bias), numerical (at most min(C, V)), effective (eps -> k), tail_energy (share of
          the squared singular values beyond linear_rank), singular_values. Words that are impossible (-inf) in all
          contexts are no columns of the matrix.
        - function: x, y with f(0) = 0, and slope f', over the range of the sampled scores; None without a function.
        - histogram: edges, counts and quantiles of the scores of 200 contexts (of all components for a mixture), and
          target_quantiles of the targets' scores alone. Impossible words (-inf) are left out.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came.

    >>> from uncork import LinearHead
    >>> head = LinearHead(2, 4, bias=False)
    >>> head.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]))
    >>> described = describe_head(head, torch.tensor([[0.0, 1.0], [1.0, 2.0], [3.0, 1.0], [2.0, 2.0]]), torch.arange(4))
    >>> described["rank"]["linear_rank"], described["rank"]["numerical"], described["rank"]["effective"]["1e-2"]
    (3, 3, 2)
    >>> described["histogram"]["quantiles"]["0.5"], described["histogram"]["target_quantiles"]["0.5"]
    (2.0, 4.0)
    """
    if not isinstance(head, Head):
        raise TypeError(f"head: expected a Head, got {kind_of(head)}")
    _check_features(head, features, "C")
    _check_ids(head.vocab_size, target)
    if target.shape != features.shape[:1]:
        raise ValueError(f"target: expected shape ({len(features)},), one a context, got {tuple(target.shape)}")
    wide = _in_float64(head)
    function = wide.logit_function
    rank = _rank(wide, features)
    scores, of_target, count = _sampled_scores(wide, features, target.cpu().long())
    histogram = {"contexts": count, **_histogram(scores, of_target)}
    return {
        "rank": rank,
        "function": _function(function, histogram["edges"]) if isinstance(function, LogitFunction) else None,
        "histogram": histogram,
    }


@torch.no_grad()
def describe_function(
    head: Head | LogitFunction, features: Tensor | None = None, *, scores: Tensor | None = None
) -> dict[str, Any]:
    """The function of a head over the scores that it is applied to, as plain JSON.

    Args:
        head: a head with a function, or a LogitFunction.
        features: (..., D) what the head receives: the scores of 200 of these contexts are computed, evenly spread, of
            all components for a mixture. scores: (...), in place of features.

    Returns:
        A dictionary of four: function and histogram as `describe_head`'s; bound, [low, high]: the scores at which the
        pieces of PLIF (or the thresholds of the network) end, None without; beyond: the share of scores outside them.

    Raises:
        TypeError: a head without a function of this library; features for a function, which has no scores.
        ValueError: none or both of features and scores; another last dimension than the head's; no finite score.

    >>> from uncork import PLIF
    >>> described = describe_function(PLIF(bound=2.0), scores=torch.tensor([-3.0, -1.0, 0.0, 1.0]))
    >>> described["bound"], described["beyond"]
    ([-2.0, 2.0], 0.25)
    """
    function: Any = head if isinstance(head, LogitFunction) else getattr(head, "logit_function", None)
    if not isinstance(function, LogitFunction):
        what = kind_of(head) if isinstance(head, type) else f"a {type(head).__name__}"
        own = "" if function is None or isinstance(head, type) else f" with a {type(function).__name__}"
        raise TypeError(
            f"head: expected a head with a LogitFunction, or a LogitFunction, got {what}{own}: none to draw"
        )
    if (features is None) == (scores is None):
        raise ValueError(f"features, scores: expected one of them, got {'none' if scores is None else 'both'}")
    if features is not None:
        if not isinstance(head, Head):
            raise TypeError(f"features: expected scores= for a {type(head).__name__}, which has no output layer")
        _check_features(head, features, "...")
        wide = _in_float64(head)
        function = wide.logit_function
        scores = _sampled_scores(wide, features.detach().reshape(-1, head.in_features), None)[0]
    else:
        assert scores is not None
        check_real("scores", scores)
        function, scores = copy.deepcopy(function).double(), scores.detach().flatten().float().cpu()
    scores = scores[scores.isfinite()]
    if not len(scores):
        raise ValueError("scores: expected some that are finite, got none")
    histogram = _histogram(scores, None)
    return {"function": _function(function, histogram["edges"]), "histogram": histogram, **_bound(function, scores)}


def learned_slopes(head: object) -> list[float] | None:
    """f' at the scores of SLOPE_GRID, of a head whose function is trained; None for any other.

    >>> from uncork import LinearHead, Scale
    >>> learned_slopes(LinearHead(2, 3, logit_function=Scale(0.5, learnable=True)))[:3], len(SLOPE_GRID)
    ([0.5, 0.5, 0.5], 21)
    """
    function = getattr(head, "logit_function", None)
    if not isinstance(function, LogitFunction) or not any(p.requires_grad for p in function.parameters()):
        return None
    grid = torch.tensor(SLOPE_GRID, dtype=torch.float32, device=next(function.parameters()).device)
    with torch.no_grad():
        return [float(slope) for slope in function.derivative(grid)]


def frequency_deciles(counts: Tensor) -> Tensor:
    """The decile 0 ... 9 of each word: words sorted by training count, cut into ten parts of equal training tokens.

    Tenths of the vocabulary would put four tokens of five into the first part and nearly none into the last five. A
    word belongs to the tenth in which the middle of its tokens lies, so a word with more than a tenth of all tokens
    can leave a part empty. Words with the same count keep their order; words never seen are in the last part.

    Args:
        counts: (V,) integers. Returns: (V,) int64.

    >>> frequency_deciles(torch.tensor([40, 10, 30, 10, 10, 0])).tolist()
    [2, 7, 5, 8, 9, 9]
    """
    check_real("counts", counts)
    if counts.ndim != 1 or not bool(((counts >= 0) & counts.isfinite()).all()):
        got = f"shape {tuple(counts.shape)}" if counts.ndim != 1 else "others among them"
        raise ValueError(f"counts: expected shape (V,), finite numbers of at least 0, got {got}")
    order = counts.argsort(descending=True, stable=True)
    mass = counts[order].double()
    total = float(mass.sum())
    if total <= 0:
        raise ValueError("counts: expected some word that occurs in the training text, got none")
    middle = (mass.cumsum(0) - mass / 2) / total
    decile = torch.empty_like(order)
    decile[order] = (DECILES * middle).floor().long().clamp(max=DECILES - 1)
    return decile.masked_fill(counts == 0, DECILES - 1)


def _check_features(head: Head, features: Tensor, leading: str) -> None:
    """Raises unless the features are (C, D) or, with leading="...", (..., D), of one context or more."""
    check_real("features", features)
    fits = features.ndim == 2 if leading == "C" else features.ndim >= 1
    if not fits or features.shape[-1] != head.in_features or not features.numel():
        expected = f"({leading}, {head.in_features}) of at least one context"
        raise ValueError(f"features: expected {expected}, got {tuple(features.shape)}")


def _check_ids(vocab_size: int, target: Tensor) -> None:
    """Raises unless the targets (...) are integers in [0, V)."""
    check_real("target", target)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"target: expected integers, got {target.dtype}")
    ids = target.flatten().long()
    check_classes(ids, torch.ones_like(ids, dtype=torch.bool), vocab_size, target.shape)


def _in_float64(head: Head) -> Head:
    """A copy of the head in float64, on the CPU where the device has no float64."""
    parameter = next(head.parameters())
    device = "cpu" if parameter.device.type == "mps" else parameter.device
    return copy.deepcopy(head).to(device).double().eval()


def _wide_chunks(head: Head, features: Tensor) -> Iterator[Tensor]:
    """Rows of the features, a few at a time, in float64 on the head's device."""
    for rows in features.to(head.weight.device).split(CHUNK):
        yield rows.double()


def _rank(head: Head, features: Tensor) -> dict[str, Any]:
    log_prob = torch.cat([head.log_prob(rows) for rows in _wide_chunks(head, features)])  # (C, V)
    impossible = (log_prob == -torch.inf).all(0)
    log_prob = log_prob[:, ~impossible] if bool(impossible.any()) else log_prob
    if not bool(log_prob.isfinite().all()):
        expected = "finite log-probabilities of all words that are possible in some context"
        raise ValueError(f"head, features: expected {expected}, got inf or nan among them")
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


def _sampled_scores(head: Head, features: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """All scores of at most 200 of the contexts, evenly spread; those of their targets; and how many contexts."""
    count = min(HISTOGRAM_CONTEXTS, len(features))
    chosen = torch.arange(count) * len(features) // count
    features = features[chosen.to(features.device)]
    ids = None if target is None else target[chosen].split(CHUNK)
    scores, of_target = [], []
    for number, rows in enumerate(_wide_chunks(head, features)):
        batch = head.scores(rows).cpu()  # (C, V) or (C, K, V)
        batch = batch.unflatten(-1, (-1, head.vocab_size)).reshape(len(rows), -1, head.vocab_size)
        if ids is not None:
            of_target.append(batch.gather(-1, ids[number][:, None, None].expand(-1, batch.shape[1], 1)).flatten())
        scores.append(batch.flatten().float())
    return torch.cat(scores), torch.cat(of_target) if of_target else None, count


def _histogram(scores: Tensor, of_target: Tensor | None) -> dict[str, Any]:
    everything = scores[scores.isfinite()]
    low, high = float(everything.min()), float(everything.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    inner = edges[1:-1].float()
    binned = torch.bincount(torch.bucketize(everything, inner, right=True), minlength=BINS)
    targets = {}
    if of_target is not None:
        possible = of_target[of_target.isfinite()]
        if not len(possible):
            raise ValueError("target: expected some word that is possible, got none")
        targets = {"target_quantiles": quantiles_of(possible)}
    return {"edges": edges.tolist(), "counts": binned.tolist(), "quantiles": quantiles_of(everything), **targets}


def _bound(function: LogitFunction, scores: Tensor) -> dict[str, Any]:
    """Where in the scores the pieces end (None beyond the range of what comes before them), and the share beyond."""
    found = with_bound(function)
    if found is None:
        return {"bound": None, "beyond": None}
    before, bound = found
    device = next(function.parameters(), scores).device
    ends = before.inverse(torch.tensor([-bound, bound], dtype=torch.float64, device=device)).tolist()
    beyond = sum(int((before(part.to(device)).abs() > bound).sum()) for part in scores.double().split(2**22))
    return {"bound": [end if math.isfinite(end) else None for end in ends], "beyond": beyond / len(scores)}


def _function(function: LogitFunction, edges: list[float]) -> dict[str, list[float]]:
    """f - f(0) and f' over the range of the scores, extended to include 0."""
    x = torch.linspace(min(edges[0], 0.0), max(edges[-1], 0.0), GRID, dtype=torch.float64)
    x = x.to(next(function.parameters(), x).device)
    origin = function(torch.zeros_like(x[:1]))
    y, slope = function(x) - origin, function.derivative(x)
    return {"x": x.tolist(), "y": y.tolist(), "slope": slope.tolist()}


def loss_by_frequency(counts: Tensor, target: Tensor, log_prob: Tensor) -> list[dict[str, Any]]:
    """The mean loss of the words of each decile by training frequency, see `frequency_deciles`.

    Args:
        counts: (V,) how often each word stands in the training text. target: (...) ids. log_prob: (...) of the targets.

    Returns:
        For each decile: decile (1 holds the most frequent words), words, min_count and max_count in training, tokens
        among the targets and their mean cross_entropy (nats); None where there are none.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came. Ignored tokens (-100)
            are no words: leave them out.

    >>> counts, target = torch.tensor([80, 15, 5]), torch.tensor([0, 0, 1])
    >>> rows = loss_by_frequency(counts, target, torch.tensor([-0.5, -1.0, -3.0]))
    >>> [(row["decile"], row["words"], row["tokens"], row["cross_entropy"]) for row in rows if row["words"]]
    [(5, 1, 2, 0.75), (9, 1, 1, 3.0), (10, 1, 0, None)]
    """
    decile = frequency_deciles(counts).cpu()
    counts = counts.cpu()
    check_real("log_prob", log_prob)
    _check_ids(len(counts), target)
    if target.shape != log_prob.shape:
        raise ValueError(f"log_prob: expected shape {tuple(target.shape)} as target, got {tuple(log_prob.shape)}")
    own_decile = decile[target.flatten().cpu().long()]
    tokens = torch.bincount(own_decile, minlength=DECILES)
    sums = torch.zeros(DECILES, dtype=torch.float64)
    sums.index_add_(0, own_decile, log_prob.detach().flatten().cpu().double())
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


def quantiles_of(values: Tensor) -> dict[str, float]:
    """Quantiles by sorting: torch.quantile refuses more than 2^24 numbers."""
    ordered = values.sort().values
    return {f"{q:g}": float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}

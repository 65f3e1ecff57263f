"""How well a model predicts a text: cross-entropy, perplexity per word, bits per byte.

Shapes in comments: N tokens of the text, B streams, T time steps of a batch.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from uncork.heads.hooks import modes_kept
from uncork.lab.data.batching import IGNORE_INDEX, evaluation_batches, number_of_batches
from uncork.lab.data.corpora import encode_text
from uncork.lab.data.sources import SPLITS, decode_utf8
from uncork.lab.data.tokenization import Tokenizer
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel
from uncork.lab.run.files import os_errors
from uncork.lab.run.progress import told
from uncork.lab.run.variables import refuse_variables
from uncork.lab.train.checkpoints import Trained, load_trained
from uncork.lab.train.counted import counted_cross_entropy

MOST_UNKNOWN = 0.5
"""A text with a larger share of unknown words is refused: its perplexity would be that of guessing <unk>."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model's cross-entropy on a text, and what follows from it.

    Attributes:
        cross_entropy: mean nats per predicted token.
        tokens: predicted tokens, all but the text's first.
        perplexity: per word of the corpus's own tokenisation: exp(cross_entropy * tokens per word).
        bits_per_byte: of the normalised text, None where its bytes are not known.
        nll: (N - 1,) float32 on the CPU, nats of each predicted token in the order of the text, if asked for.
        unknown: share of the text's words that are <unk> to the model, in [0, 1]; None if the tokenizer has no <unk>,
            or the share was not counted.
    """

    cross_entropy: float
    tokens: int
    perplexity: float
    bits_per_byte: float | None
    nll: Tensor | None = None
    unknown: float | None = None

    @classmethod
    def of(
        cls,
        cross_entropy: float,
        length: int,
        *,
        words: int | None = None,
        bytes: int | None = None,
        unknown: float | None = None,
    ) -> "Evaluation":
        """The evaluation of a text of `length` tokens, the first included, which stand for `words` and `bytes`.

        The first token, which is not predicted, counts with the mean cross-entropy, so that a text with as many words
        as tokens has the perplexity exp(cross_entropy) exactly.

        >>> round(Evaluation.of(math.log(8), 101, words=101, bytes=303).bits_per_byte, 3)
        1.0
        >>> round(Evaluation.of(math.log(8), 100, words=50).perplexity, 3)
        64.0
        """
        nats_per_word = cross_entropy * (1.0 if words is None else length / words)
        # math.exp raises where floating point has inf.
        perplexity = math.exp(nats_per_word) if nats_per_word < 709 else math.inf
        bits_per_byte = None if bytes is None else cross_entropy * length / (bytes * math.log(2))
        return cls(cross_entropy, length - 1, perplexity, bits_per_byte, unknown=unknown)

    def to_dict(self) -> dict[str, float | int | None]:
        """What result.json stores of it."""
        return {
            "cross_entropy": self.cross_entropy,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "unknown": self.unknown,
        }


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    batch_size: int,
    bptt: int,
    words: int | None = None,
    bytes: int | None = None,
    unknown: float | None = None,
    keep_nll: bool = False,
) -> Evaluation:
    """Predict each token of a text but the first from what stands before it, each exactly once, in evaluation mode.

    An LSTM carries its state along each of the streams that the text is cut into. A transformer starts afresh every
    `bptt` tokens, so the first tokens of each window have little to go by. Sums are in float64. A lookup table is
    evaluated on the text's counts, one row of scores a context, in float32; with `keep_nll` by its tokens.

    Args:
        model: on any device; it is left in the mode it was in.
        tokens: (N,) integers, N >= 2, below the vocabulary's size.
        batch_size: number of streams. bptt: tokens of each stream at a time.
        words: words of the text in the corpus's own tokenisation. None: as many as tokens.
        bytes: UTF-8 bytes of the normalised text, where known.
        unknown: share of unknown words, where known, as `unknown_share` counts them.
        keep_nll: also keep each token's nats.

    Raises:
        LabError: the text has fewer than two tokens.
    """
    if not keep_nll:
        with evaluation_mode(model):
            counted = counted_cross_entropy(model, tokens)
        if counted is not None:
            return Evaluation.of(counted, len(tokens), words=words, bytes=bytes, unknown=unknown)
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    kept: list[tuple[Tensor, Tensor]] = []
    state: tuple[Tensor, ...] = ()
    with evaluation_mode(model):
        batches = evaluation_batches(tokens, batch_size, bptt)
        for inputs, target in told(batches, "evaluating", number_of_batches(tokens, batch_size, bptt)):
            features, state = model.features(inputs.to(device), state)
            nll = cast(Any, model.head).loss(features, target.to(device), reduction="none", ignore_index=IGNORE_INDEX)
            total += nll.sum(dtype=torch.float64)
            if keep_nll:
                kept.append((nll.float().cpu(), target.cpu()))
    cross_entropy = total.item() / (len(tokens) - 1)
    result = Evaluation.of(cross_entropy, len(tokens), words=words, bytes=bytes, unknown=unknown)
    if not keep_nll:
        return result
    # The streams, one after the other, are the text in its order.
    all_nll, all_targets = (torch.cat(parts, dim=1) for parts in zip(*kept, strict=True))
    return dataclasses.replace(result, nll=all_nll[all_targets != IGNORE_INDEX])


def unknown_share(tokens: Tensor, tokenizer: Tokenizer) -> float | None:
    """The share of a text's words, ends of lines not counted, that are <unk>; None where the tokenizer has no <unk>.

    >>> from uncork.lab.data.tokenization import WordTokenizer
    >>> unknown_share(torch.tensor([0, 2, 1, 0, 3, 1]), WordTokenizer(["<unk>", "<eos>", "the", "war"], "raw"))
    0.5
    """
    if tokenizer.unk_id is None:
        return None
    words = unknown = 0
    for part in tokens.split(2**20):  # the tokens may be larger than memory
        words += int((part != tokenizer.eos_id).sum())
        unknown += int((part == tokenizer.unk_id).sum())
    return unknown / words if words else 0.0


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off while the block runs."""
    with modes_kept(model):
        model.eval()
        yield


def evaluate_run(
    run_path: Path | str,
    split: str = "test",
    *,
    text: Path | str | None = None,
    trained: Trained | None = None,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    keep_nll: bool = False,
) -> Evaluation:
    """Evaluate a run's best weights on a split of its corpus, or on any text file.

    Args:
        run_path: the run's folder.
        split: train, valid or test; not used when there is a `text`.
        text: a UTF-8 text file to evaluate on, tokenised as the corpus was.
        trained: what `load_trained` gave, where the caller has it already (on the device to compute on).
        data_dir: where ptb and wikitext-2 lie. cache_dir: the token cache. As for `load_corpus`.
        keep_nll: also keep each token's nats.

    Raises:
        LabError: no such run or split, no trained model in it, a damaged file, a corpus that has changed; a text that
            is missing, empty, binary, a single token, or more than `MOST_UNKNOWN` unknown words; an environment
            variable that would change the numbers.
    """
    refuse_variables()
    trained = load_trained(run_path) if trained is None else trained
    words: int
    bytes: int | None
    if text is not None:
        path = Path(text)
        with os_errors(path, "cannot be read", "text: "):
            data = path.read_bytes()
        tokens, words, bytes = encode_text(trained.tokenizer, decode_utf8(data, str(path)))
        if len(tokens) < 2:
            raise LabError(f"{path}: holds {'1 token' if len(tokens) else 'no words'}; at least 2 tokens are needed")
        unknown = unknown_share(tokens, trained.tokenizer)
        if unknown is not None and unknown > MOST_UNKNOWN:
            raise LabError(
                f"{path}: {100 * unknown:.0f} % of its words are unknown to this model (at most "
                f"{100 * MOST_UNKNOWN:.0f} % may be): a perplexity of unknown words means nothing"
            )
    else:
        if split not in SPLITS:
            raise LabError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        try:
            corpus = trained.config.load_corpus(data_dir=data_dir, cache_dir=cache_dir)
        except LabError as error:
            raise LabError(f"{run_path}: its text cannot be read: {error}; --text FILE evaluates another") from None
        if corpus.fingerprint != trained.fingerprint:
            raise LabError(
                f"{run_path}: the corpus {trained.config.corpus} is not the text that this run was trained on: bring "
                "that back, or evaluate another text with --text FILE"
            )
        tokens, words = corpus.splits[split], corpus.words[split]
        bytes = None if corpus.bytes is None else corpus.bytes[split]
        unknown = unknown_share(tokens, corpus.tokenizer)
    return evaluate(
        trained.model,
        tokens,
        batch_size=trained.config.eval_batch_size,
        bptt=trained.config.bptt,
        words=words,
        bytes=bytes,
        unknown=unknown,
        keep_nll=keep_nll,
    )

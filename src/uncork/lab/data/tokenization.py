"""Text to token ids and back: the words of a corpus, or subwords learned on it."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, cast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from uncork.lab.data.words import EOS, RAW_WORD, UNK, Style, lines_of, normalize, split_words
from uncork.lab.errors import LabError

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"

SPEC_VERSION = 1
BYTE_VALUES = 256
LONGEST_RUN = 1000
"""Subwords are learned on words of at most so many characters: the time grows with the square of a word's length."""

_SPACE_BEFORE = re.compile(r" (?=[,.;:!?%)\]}])")
_SPACE_AFTER = re.compile(r"(?<=[(\[{$]) ")
_BATCH_LINES = 4096
_RUN = re.compile(r"\S++|\s++")


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes: ``vocab_size``; ``eos_id``, the end of a line; ``unk_id``, the unknown word (None where every text has
    an exact encoding); ``style``, how the corpus writes (see `words`).
    """

    vocab_size: int
    eos_id: int
    unk_id: int | None
    style: Style

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a normalised text (see `words.normalize`), with ``eos_id`` at the end of each line."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Readable text. Raises ValueError for an id outside the vocabulary."""

    @abstractmethod
    def tokens(self) -> list[str]:
        """One string per id."""

    @abstractmethod
    def spec(self) -> dict[str, JSON]:
        """Plain JSON from which `from_spec` makes an equal tokenizer."""

    @abstractmethod
    def prefix(self, line: str, count: int) -> str:
        """The beginning of a line that its first `count` tokens cover."""

    @staticmethod
    def from_spec(spec: JSON) -> "Tokenizer":
        """The tokenizer that `spec` describes. Raises LabError where it describes none."""
        if not isinstance(spec, Mapping):
            raise LabError(f"tokenizer spec: a JSON object is expected, got {type(spec).__name__}")
        if spec.get("version") != SPEC_VERSION:
            raise LabError(
                f"tokenizer spec: version {SPEC_VERSION} is expected, got {spec.get('version')!r}; "
                "it is damaged or was written by another version of uncork"
            )
        kind, style = spec.get("type"), spec.get("style")
        if style not in ("raw", "spaced"):
            raise LabError(f"tokenizer spec: style must be 'raw' or 'spaced', got {style!r}")
        if kind == "word":
            tokens = _string_list(spec.get("tokens"))
            _check_words(tokens, style)
            return WordTokenizer(tokens, style)
        if kind == "bpe":
            return BPETokenizer(spec.get("model"), style)
        raise LabError(f"tokenizer spec: type must be 'word' or 'bpe', got {kind!r}")

    def _check(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"ids must lie in [0, {self.vocab_size}), got {token_id}")


def _string_list(value: JSON) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise LabError("tokenizer spec: tokens must be a list of strings")
    return cast(list[str], value)


def _check_words(tokens: Sequence[str], style: Style) -> None:
    """Refuse a vocabulary with entries that are not words by today's rule, under which combining marks are none."""

    def split(text: str) -> list[str]:
        return split_words(normalize(text, style), style)

    words = [token for token in tokens if token not in (UNK, EOS)]
    if style == "spaced" or split("\n".join(words)) == [part for word in words for part in (word, EOS)]:
        return
    wrong = next((word for word in words if split(word) != [word, EOS]), words[0])
    raise LabError(
        f"tokenizer spec: {wrong!r} is not one word by today's rule for raw text; it is damaged or was written by an "
        "earlier version of uncork, which split words at combining marks: train anew"
    )


class WordTokenizer(Tokenizer):
    r"""One id per word; words outside the vocabulary are ``<unk>``.

    Args:
        tokens: the vocabulary, a string per id, with ``<unk>`` and ``<eos>`` among them.
        style: how the corpus writes (see `words`).

    >>> tokenizer = WordTokenizer.train(["the", "war", "the", "<eos>"], "raw")
    >>> tokenizer.tokens()
    ['<unk>', '<eos>', 'the', 'war']
    >>> tokenizer.encode("The peace,\nthe war")
    [2, 0, 0, 1, 2, 3, 1]
    >>> tokenizer.decode([2, 3, 1])
    'the war\n'
    """

    def __init__(self, tokens: Sequence[str], style: Style) -> None:
        self.style = style
        self._tokens = list(tokens)
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            raise LabError("tokenizer spec: tokens must be distinct")
        if EOS not in self._ids or UNK not in self._ids:
            raise LabError(f"tokenizer spec: tokens must hold {UNK} and {EOS}")
        self.vocab_size = len(self._tokens)
        self.eos_id = self._ids[EOS]
        self.unk_id: int = self._ids[UNK]

    @classmethod
    def train(
        cls,
        words: Iterable[str] | Mapping[str, int],
        style: Style,
        *,
        vocab_size: int | None = None,
        min_count: int = 1,
    ) -> "WordTokenizer":
        """A vocabulary of the commonest words: ``<unk>``, ``<eos>``, then by count; alphabetical where counts tie.

        Args:
            words: the words of the training split, or how often each stands there.
            style: how the corpus writes.
            vocab_size: at most so many ids in all, ``<unk>`` and ``<eos>`` included.
            min_count: words that are rarer become ``<unk>``.
        """
        counts = Counter(words)
        kept = sorted((-n, word) for word, n in counts.items() if n >= min_count and word not in (UNK, EOS))
        if vocab_size is not None:
            kept = kept[: vocab_size - 2]
        if len(kept) < 2:
            raise LabError(
                f"the vocabulary needs at least 2 words besides {UNK} and {EOS}, got {len(kept)}: "
                f"the training split has {len(counts.keys() - {UNK, EOS})} different words (min_count is {min_count})"
            )
        return cls([UNK, EOS, *(word for _, word in kept)], style)

    def encode(self, text: str) -> list[int]:
        return self.ids_of(split_words(text, self.style))

    def ids_of(self, words: Iterable[str]) -> list[int]:
        """The ids of words that are split already."""
        ids, unk_id = self._ids, self.unk_id
        return [ids.get(word, unk_id) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        self._check(ids)
        text = " ".join("\n" if token_id == self.eos_id else self._tokens[token_id] for token_id in ids)
        text = re.sub(r" ?\n ?", "\n", text)
        if self.style == "raw":
            text = _SPACE_AFTER.sub("", _SPACE_BEFORE.sub("", text))
        return text

    def tokens(self) -> list[str]:
        return list(self._tokens)

    def spec(self) -> dict[str, JSON]:
        return {"type": "word", "version": SPEC_VERSION, "style": self.style, "tokens": self.tokens()}

    def prefix(self, line: str, count: int) -> str:
        if count == 0:
            return ""
        if self.style == "spaced":
            return " ".join(line.split()[:count])
        return line[: [match.end() for match in RAW_WORD.finditer(line)][count - 1]]


def _cut_long_runs(line: str) -> Iterator[str]:
    """The line, cut after every `LONGEST_RUN` characters that stand together, all of them spaces or none."""
    start = 0
    words = line.split() if len(line) > LONGEST_RUN else []
    letters = [len(word) for word in words]
    if max(letters, default=0) > LONGEST_RUN or len(line) - sum(letters) - len(words) > LONGEST_RUN:
        for run in _RUN.finditer(line):
            for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield line[start:cut]
                start = cut
    yield line[start:]


class BPETokenizer(Tokenizer):
    r"""Byte-level byte-pair encoding: every text has an exact encoding, and decoding gives it back.

    The last id is ``<eos>``; it stands for the newline, and for the end of a text that lacks one. It never comes from
    the characters ``<eos>`` in a text.

    Args:
        model: the JSON text of a tokenizer of the `tokenizers` library.
        style: how the corpus writes; used to count words alone.

    >>> tokenizer = BPETokenizer.train(["low lower lowest"] * 9, "raw", vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("Été: <eos> 2 < 3"))
    'Été: <eos> 2 < 3\n'
    """

    def __init__(self, model: JSON, style: Style) -> None:
        if not isinstance(model, str):
            raise LabError("tokenizer spec: model must be the JSON text of a tokenizer")
        try:
            self._bpe = tokenizers.Tokenizer.from_str(model)
        except Exception as error:  # the library raises bare Exception
            raise LabError(f"tokenizer spec: model is damaged: {error}") from error
        self.style = style
        self.eos_id = self._bpe.get_vocab_size()
        self.unk_id = None
        self.vocab_size = self.eos_id + 1

    @classmethod
    def train(cls, lines: Iterable[str], style: Style, *, vocab_size: int, min_count: int = 1) -> "BPETokenizer":
        """Learn the merges from the lines of the training split; the same lines give the same merges.

        Args:
            lines: the training split, without newlines.
            style: how the corpus writes.
            vocab_size: at most so many ids in all: 256 bytes, ``<eos>``, and the merges.
            min_count: merges that occur less often are not made.
        """
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=min_count,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator((part for line in lines for part in _cut_long_runs(line)), trainer)
        return cls(bpe.to_str(), style)

    def encode(self, text: str) -> list[int]:
        lines = lines_of(text)
        ids: list[int] = []
        for start in range(0, len(lines), _BATCH_LINES):
            for encoding in self._bpe.encode_batch_fast(lines[start : start + _BATCH_LINES]):
                ids += encoding.ids
                ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        self._check(ids)
        parts: list[list[int]] = [[]]
        for token_id in ids:
            if token_id == self.eos_id:
                parts.append([])
            else:
                parts[-1].append(token_id)
        return "\n".join(self._bpe.decode_batch(parts, skip_special_tokens=False))

    def tokens(self) -> list[str]:
        """One string per id, in the byte-level alphabet (a leading space is written Ġ)."""
        return [cast(str, self._bpe.id_to_token(index)) for index in range(self.eos_id)] + [EOS]

    def spec(self) -> dict[str, JSON]:
        return {"type": "bpe", "version": SPEC_VERSION, "style": self.style, "model": self._bpe.to_str()}

    def prefix(self, line: str, count: int) -> str:
        return self.decode(self.encode(line)[:count])

"""Corpora as token ids: three fixed splits, a vocabulary made from the training split alone, and a cache on disk.

Text and ids may be larger than memory. A corpus is built in files: its normalised text goes into a temporary one
(`sources`), its ids piece by piece into the file that becomes the cache, and the splits are that file, memory-mapped.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from uncork.lab.data.sources import SPLITS, Source, expanded, find_source
from uncork.lab.data.splits import read_splits, shared_lines
from uncork.lab.data.text import PIECE_BYTES, Text, cut_at_lines, each
from uncork.lab.data.tokenization import BYTE_VALUES, BPETokenizer, Tokenizer, WordTokenizer
from uncork.lab.data.words import UNK, Style, count_words, lines_of, normalize, number_words
from uncork.lab.errors import LabError
from uncork.lab.run.files import commit, os_errors
from uncork.lab.run.progress import Meter, announce

logger = logging.getLogger(__name__)

BPE_VOCAB_SIZE = 8192
CACHE_VERSION = 3  # 3: a file of ids that can be mapped
ID = np.dtype("<i4")  # of an id in the cache file
END_BYTES = 40


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised corpus.

    Attributes:
        name: the source's short name.
        tokenizer: what made the ids; its spec() can tokenise any other text.
        splits: "train", "valid", "test": token ids, (N,) int32, on disk: they are memory-mapped.
        words: words of each split in the corpus's own word tokenisation, ``<eos>`` included, whatever the ids are:
            the denominator of perplexity per word.
        bytes: UTF-8 bytes of the normalised text of each split (see `words.normalize`), or None where the text
            was split into words, and rare words lost, before it was published (ptb, wikitext-2).
        counts: (V,) int64, how often each id stands in the training split.
        fingerprint: sha256 over the ids of all splits and the tokenizer's spec.
        origin: which files were read and which were not, in one line; "" for a published corpus.
        warning: what is wrong with the splits of a user's own text, if anything, see `splits.shared_lines`.
    """

    name: str
    tokenizer: Tokenizer = field(repr=False)
    splits: dict[str, torch.Tensor] = field(repr=False)
    words: dict[str, int]
    bytes: dict[str, int] | None
    counts: torch.Tensor = field(repr=False)
    fingerprint: str
    origin: str = ""
    warning: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def load_corpus(
    source: str,
    *,
    tokenization: str = "word",
    vocab_size: int | None = None,
    min_count: int = 1,
    max_train_tokens: int | None = None,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
) -> Corpus:
    """Load a corpus, from the cache where the same text was tokenised the same way before.

    Splits are fixed by rule. sotu: of every 20 years of addresses the 11th is for validation and the 20th for the
    test; the years of a split come in a fixed scattered order. A folder with train.txt, valid.txt and test.txt: those.
    Any other folder: its .txt files (in any case, subfolders too, nothing hidden), sorted by name, by the rule of sotu;
    of fewer than 20 files, one each; of fewer than 3, as one file. A file: the first 90 % of the text, the next 5 %,
    the last 5 %, cut at ends of lines. Where much of the test split of a user's own text stands in its training split,
    a warning says so.

    Args:
        source: "sotu", "ptb", "wikitext-2", or the path of a UTF-8 text file or of a folder with .txt files.
        tokenization: "word", or "bpe": byte-level subwords learned on the training split.
        vocab_size: at most so many ids; ``<unk>`` and ``<eos>`` are among them, and rarer words become ``<unk>``.
            None keeps every word ("word") or means 8,192 ("bpe").
        min_count: words ("word") or merges ("bpe") that occur less often in the training split are left out.
        max_train_tokens: keep only the first so many tokens of the training split. The vocabulary is still that of
            the whole split; `counts`, `words` and `bytes` are those of the part.
        data_dir: the folder with the files or archives of ptb and wikitext-2; None means $UNCORK_DATA.
        cache_dir: None means $UNCORK_CACHE, else $XDG_CACHE_HOME/uncork, else ~/.cache/uncork.

    Raises:
        LabError: an option out of range; text that is missing, damaged, not UTF-8, or too little for three splits.
    """
    recipe = Recipe(tokenization, vocab_size, min_count, max_train_tokens)
    _check_recipe(recipe)
    if tokenization == "bpe" and vocab_size is None:
        recipe = recipe._replace(vocab_size=BPE_VOCAB_SIZE)
    found = find_source(source, data_dir)
    folder = _default_cache_dir() if cache_dir is None else expanded(cache_dir, "cache_dir")
    path = None if folder is None else folder / f"{_key(found, recipe)}.ids"
    corpus = None if path is None else _read_cache(path, found.name)
    corpus = replace(corpus or _build(found, recipe, path), origin=found.origin)
    if corpus.warning:
        logger.warning("%s: %s", corpus.name, corpus.warning)
    _warn_of_untrained_unk(corpus)
    return corpus


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[torch.Tensor, int, int]:
    """Any text as a split of the tokenizer's corpus would have it: (ids, words, bytes).

    Returns:
        ids (N,) int64; the number of words, ``<eos>`` included; the UTF-8 bytes of the normalised text.

    Raises:
        LabError: a character that no UTF-8 text has, as a terminal of another encoding may give.

    >>> tokenizer = WordTokenizer.train(["the", "war", "the"], "raw")
    >>> encode_text(tokenizer, "The war.")
    (tensor([2, 3, 0, 1]), 4, 9)
    """
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise LabError(f"expected UTF-8 text, got a byte that is none at character {error.start + 1}") from None
    meter = Meter("splitting into words")
    ids, words, size, seen = [torch.empty(0, dtype=torch.int64)], 0, 0, 0
    for piece in cut_at_lines(data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)):
        meter(seen, len(data))
        part = normalize(piece.decode(), tokenizer.style)
        ids.append(torch.tensor(tokenizer.encode(part), dtype=torch.int64))
        words += len(ids[-1]) if isinstance(tokenizer, WordTokenizer) else count_words(part, tokenizer.style)
        size, seen = size + len(part.encode()), seen + len(piece)
    return torch.cat(ids), words, size


class Recipe(NamedTuple):
    """How a text becomes ids: the options of `load_corpus` of the same names."""

    tokenization: str
    vocab_size: int | None
    min_count: int
    max_train_tokens: int | None


def _check_recipe(recipe: Recipe) -> None:
    # Two words beside <unk> and <eos>; the 256 bytes and <eos>.
    smallest = {"word": 4, "bpe": BYTE_VALUES + 1}
    kind, vocab_size, min_count, limit = recipe
    if kind not in smallest:
        raise LabError(f"tokenization must be 'word' or 'bpe', got {kind!r}")
    if vocab_size is not None and vocab_size < smallest[kind]:
        raise LabError(f"vocab_size must be at least {smallest[kind]} for tokenization {kind!r}, got {vocab_size}")
    if min_count < 1:
        raise LabError(f"min_count must be at least 1, got {min_count}")
    if limit is not None and limit < 2:
        raise LabError(f"max_train_tokens must be at least 2, got {limit}")


# --- from text to ids -------------------------------------------------------------------------------------------------


def _build(source: Source, recipe: Recipe, path: Path | None) -> Corpus:
    """Tokenise into the cache file, or, if that cannot be written, into an anonymous temporary file."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            built: list[Corpus] = []

            def write(temporary: Path) -> Path:
                with temporary.open("w+b") as file:
                    built.append(_tokenize(source, recipe, file, path.parent))
                return path

            commit(path, write)
            return built[0]
        except OSError as error:
            logger.warning("the token cache %s cannot be written (%s); going on without it", path.parent, error)
    folder = Path(tempfile.gettempdir())
    with os_errors(folder, "cannot be written"), tempfile.TemporaryFile(dir=folder) as file:
        return _tokenize(source, recipe, file, folder)


def _tokenize(source: Source, recipe: Recipe, file: BinaryIO, folder: Path) -> Corpus:
    """Write the cache file of a source; a temporary file in `folder` holds its normalised text meanwhile."""
    with tempfile.TemporaryFile(dir=folder) as scratch:
        texts = read_splits(source, scratch)
        warning = shared_lines(texts) if source.origin else None
        write = _write_words if recipe.tokenization == "word" else _write_subwords
        tokenizer, written = write(file, texts, source.style, recipe)
    _count_cut(tokenizer, written["train"])
    if recipe.vocab_size is not None and tokenizer.vocab_size < recipe.vocab_size:
        logger.info(
            "%s: the vocabulary has %d ids, fewer than %d", source.name, tokenizer.vocab_size, recipe.vocab_size
        )
    tokens = {split: part.tokens for split, part in written.items()}
    fingerprint, counts = _fingerprint(file, tokenizer, tokens)
    about = {
        "tokenizer": tokenizer.spec(),
        "tokens": tokens,
        "words": {split: part.words for split, part in written.items()},
        "bytes": {split: part.bytes for split, part in written.items()} if source.style == "raw" else None,
        "fingerprint": fingerprint,
        "warning": warning,
    }
    _write_end(file, about)
    return _corpus(file, source.name, tokenizer, about, counts)


@dataclass
class _Written:
    """How much of a split is in the cache file. `cut`: a piece that was written in part, and how many of its tokens."""

    tokens: int = 0
    words: int = 0
    bytes: int = 0
    cut: tuple[str, int] | None = None


def _write_split(
    file: BinaryIO, encoded: Iterator[tuple[str, NDArray[np.int32], int]], limit: int | None = None
) -> _Written:
    """Write the ids of (piece, ids, words), at most `limit` of them."""
    written = _Written()
    for piece, ids, words in encoded:
        if limit is not None and written.tokens + len(ids) > limit:
            written.cut = piece, limit - written.tokens
            file.write(ids[: limit - written.tokens].astype(ID, copy=False).tobytes())
            written.tokens = limit
            break
        file.write(ids.astype(ID, copy=False).tobytes())
        written.tokens += len(ids)
        written.words += words
        written.bytes += len(piece.encode())
    return written


def _write_words(
    file: BinaryIO, texts: dict[str, Text], style: Style, recipe: Recipe
) -> tuple[Tokenizer, dict[str, _Written]]:
    """Every text is split once: words are numbered as they come, and the numbers become ids when all are counted."""
    numbers: dict[str, int] = {}
    counts = Counter[str]()

    def encoded(split: str) -> Iterator[tuple[str, NDArray[np.int32], int]]:
        for piece, (words, places) in each(
            number_words, style, texts[split].pieces(), texts[split].size, "splitting into words"
        ):
            local = np.frombuffer(places, np.intc)
            if split == "train":
                for word, count in zip(words, np.bincount(local).tolist(), strict=True):
                    counts[word] += count
            table = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int32)
            yield piece, table[local], len(local)

    written = {}
    for split in SPLITS:
        pieces = encoded(split)
        written[split] = _write_split(file, pieces, recipe.max_train_tokens if split == "train" else None)
        deque(pieces, maxlen=0)  # the vocabulary counts the words beyond the limit too
    tokenizer = WordTokenizer.train(counts, style, vocab_size=recipe.vocab_size, min_count=recipe.min_count)
    ids = np.array(tokenizer.ids_of(numbers), ID)
    for place in range(0, file.tell(), PIECE_BYTES):
        file.seek(place)
        part = np.frombuffer(file.read(PIECE_BYTES), ID)
        file.seek(place)
        file.write(ids[part].tobytes())
    return tokenizer, written


def _write_subwords(
    file: BinaryIO, texts: dict[str, Text], style: Style, recipe: Recipe
) -> tuple[Tokenizer, dict[str, _Written]]:
    lines = (line for piece in texts["train"].pieces() for line in lines_of(piece))
    size = recipe.vocab_size or BPE_VOCAB_SIZE
    announce(f"learning {size:,} subwords")
    tokenizer = BPETokenizer.train(lines, style, vocab_size=size, min_count=recipe.min_count)

    def encoded(split: str) -> Iterator[tuple[str, NDArray[np.int32], int]]:
        for piece, words in each(
            count_words, style, texts[split].pieces(), texts[split].size, "splitting into subwords"
        ):
            yield piece, np.array(tokenizer.encode(piece), np.int32), words

    limits = {"train": recipe.max_train_tokens}
    written = {split: _write_split(file, encoded(split), limits.get(split)) for split in SPLITS}
    return tokenizer, written


def _count_cut(tokenizer: Tokenizer, written: _Written) -> None:
    """Add the words and bytes that the tokens of the cut piece cover; a line without its end has no ``<eos>``."""
    if written.cut is None:
        return
    piece, count = written.cut
    ids = tokenizer.encode(piece)[:count]
    whole = ids.count(tokenizer.eos_id)
    last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_id) if whole else -1
    lines = lines_of(piece)
    covered = "".join(line + "\n" for line in lines[:whole])
    rest = tokenizer.prefix(lines[whole], len(ids) - 1 - last)
    written.words += count_words(covered, tokenizer.style)
    written.words += max(count_words(normalize(rest, tokenizer.style), tokenizer.style) - 1, 0)
    written.bytes += len((covered + rest).encode())


def _warn_of_untrained_unk(corpus: Corpus) -> None:
    unk_id = corpus.tokenizer.unk_id
    if unk_id is None or corpus.counts[unk_id] > 0:
        return
    unseen = {
        name: sum(int((part == unk_id).sum()) for part in corpus.splits[name].split(2**20))
        for name in ("valid", "test")
    }
    if any(unseen.values()):
        logger.warning(
            "%s: %s never occurs in the training split, but %d times in valid and %d times in test, where a model "
            "cannot expect it; min_count=2 or a smaller vocab_size gives it training examples",
            corpus.name, UNK, unseen["valid"], unseen["test"],
        )  # fmt: skip


def _default_cache_dir() -> Path | None:
    """Where the cache is; None for a user without a home folder."""
    if os.environ.get("UNCORK_CACHE"):
        return expanded(os.environ["UNCORK_CACHE"], "UNCORK_CACHE")
    if os.environ.get("XDG_CACHE_HOME"):
        return expanded(os.environ["XDG_CACHE_HOME"], "XDG_CACHE_HOME") / "uncork"
    try:
        return Path("~/.cache/uncork").expanduser()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        logger.warning("no home folder, so no token cache: name a folder for it in UNCORK_CACHE")
        return None


# --- the cache file: the ids of the three splits, JSON about them, its sha256, its length in 8 bytes ------------------


def _key(source: Source, recipe: Recipe) -> str:
    parts = [CACHE_VERSION, source.rule, source.style, source.checksum, *recipe]
    parts.append(tokenizers.__version__ if recipe.tokenization == "bpe" else "")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _fingerprint(file: BinaryIO, tokenizer: Tokenizer, tokens: dict[str, int]) -> tuple[str, torch.Tensor]:
    """The corpus's fingerprint and its counts, read from the file in pieces, since it may be larger than memory."""
    digest = hashlib.sha256(json.dumps(tokenizer.spec(), sort_keys=True).encode())
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    file.seek(0)
    for split in SPLITS:
        digest.update(f"\n{split} {tokens[split]}\n".encode())
        for start in range(0, tokens[split] * ID.itemsize, PIECE_BYTES):
            data = file.read(min(PIECE_BYTES, tokens[split] * ID.itemsize - start))
            digest.update(data)
            if split == "train":
                counts += np.bincount(np.frombuffer(data, ID), minlength=len(counts))
    return digest.hexdigest(), torch.from_numpy(counts)


def _corpus(file: BinaryIO, name: str, tokenizer: Tokenizer, about: dict[str, Any], counts: torch.Tensor) -> Corpus:
    """A corpus whose splits map the file into memory; they stay valid when it is closed, replaced or deleted."""
    tokens = [about["tokens"][split] for split in SPLITS]
    ids = torch.from_numpy(np.memmap(file, ID, mode="c", shape=(sum(tokens),)))
    splits = dict(zip(SPLITS, ids.split(tokens), strict=True))
    fingerprint, warning = about["fingerprint"], about["warning"]
    return Corpus(name, tokenizer, splits, about["words"], about["bytes"], counts, fingerprint, warning=warning)


def _write_end(file: BinaryIO, about: dict[str, Any]) -> None:
    text = json.dumps(about).encode()
    file.seek(0, os.SEEK_END)
    file.write(text + hashlib.sha256(text).digest() + len(text).to_bytes(END_BYTES - 32, "little"))
    file.flush()


def _read_end(file: BinaryIO) -> dict[str, Any]:
    file.seek(-END_BYTES, os.SEEK_END)
    end = file.read()
    file.seek(-END_BYTES - int.from_bytes(end[32:], "little"), os.SEEK_END)
    text = file.read()[:-END_BYTES]
    if hashlib.sha256(text).digest() != end[:32]:
        raise ValueError("its end is not the one written")
    about: dict[str, Any] = json.loads(text)
    return about


def _read_cache(path: Path, name: str) -> Corpus | None:
    """The corpus of a cache file, or None where there is none or its contents are not those that were written."""
    try:
        with path.open("rb") as file:
            about = _read_end(file)
            tokenizer = Tokenizer.from_spec(about["tokenizer"])
            fingerprint, counts = _fingerprint(file, tokenizer, about["tokens"])
            if fingerprint != about["fingerprint"]:
                raise ValueError("its tokens are not those written")
            return _corpus(file, name, tokenizer, about, counts)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, LabError, ValueError, KeyError, TypeError, OverflowError) as error:
        logger.warning("the token cache %s is damaged (%s); building it again", path, error)
        return None

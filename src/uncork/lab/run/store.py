"""The run store: every command of the laboratory keeps its runs here, and a run survives the death of its process.

A store is a folder, a run is a folder in it:

    ROOT/NAME/
      config.json                               the settings, compared when the run is opened again
      metrics.jsonl                             one JSON object a line, appended while training
      checkpoints/last-00000200.<digest>.safetensors
      result.json                               written at the end: a run that has it is done

A checkpoint is one safetensors file. The tensors are its body, the step and the state are JSON in its header, and the
digest in its name (the first 16 hexadecimal digits of the SHA-256 of its bytes) tells an intact file from a damaged
one. So one rename commits it, tensors and state can never be of two different moments, and nothing is unpickled.

Files are written under a hidden temporary name in the same folder, flushed to the disk, then renamed. Numbers go
through JSON as Python writes them: floats come back to the bit, and NaN, Infinity and -Infinity are stored by these
names (which Python reads, although strict JSON has no word for them).
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from uncork.lab.errors import LabError
from uncork.lab.run.files import (
    atomic_write_bytes,
    atomic_write_text,
    commit,
    flush_to_disk,
    holds_tensors,
    os_errors,
    plain,
    read_json,
    remove_temporaries,
    write_json,
)
from uncork.lab.run.key import RECORD, differences, flat, told
from uncork.lab.run.names import as_arguments, check_name, is_name, without_config

__all__ = ["Checkpoint", "Run", "RunStore", "atomic_write_bytes", "atomic_write_text", "read_json", "write_json"]

log = logging.getLogger(__name__)

_AFRESH = "Use another --out-dir, or remove this folder to start afresh"
_RESTORE = "; restore it, or remove the run's folder to start afresh"
_FROM_CHECKPOINT = (
    "; remove it, and the command that made the run (`uncork train`: with --resume) makes it again from the last "
    "checkpoint"
)
_CONFIG, _METRICS, _RESULT, _LOCK, _CHECKPOINTS = "config.json", "metrics.jsonl", "result.json", ".lock", "checkpoints"
_DIGEST_DIGITS = 16


@dataclass(frozen=True)
class Checkpoint:
    """What `Run.load_checkpoint` returns: the step, the tensors (on the CPU), the JSON state, and its file."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class Run:
    """One run of the store: its settings, its metrics, its checkpoints and its result.

    Made by `RunStore.run` (opens or creates) or `Run.open` (existing only). Reading needs no lock; to write
    metrics, checkpoints or the result, hold `lock()`.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.name = path.resolve().name
        self.config = config

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Open an existing run. Raises LabError when the folder is missing, is not a run, or its config is damaged."""
        path = Path(path)
        if not path.is_dir():
            raise LabError(f"{path}: no such folder" if not path.exists() else f"{path}: is not a folder")
        if not (path / _CONFIG).exists():
            if lost := without_config(path):
                raise LabError(lost)
            inside = [config.parent for config in path.glob(f"[!.]*/{_CONFIG}")]
            hint = f"; the runs in it are: {as_arguments(inside)}" if inside else ""
            raise LabError(f"{path}: is not a run, it has no {_CONFIG}{hint}")
        return cls(path, _read_object(path / _CONFIG, _RESTORE))

    def require(self, config: Mapping[str, object]) -> None:
        """Raise LabError that lists what differs, unless the run was made with this config.

        If `config` has a record of what decides the numbers (`uncork.lab.run.key`), the records are compared, and a
        config that only uses other names (of a preset with the same values) replaces the stored one. Without a record
        the whole configs are compared, as JSON: a tuple equals a list, a path its text, 1 equals 1.0.
        """
        given = plain(config)
        if RECORD not in given:
            stored, new = flat(self.config), flat(given)
            different = [
                f"{name} was {stored.get(name, 'absent')}, is {new.get(name, 'absent')}"
                for name in {**stored, **new}
                if stored.get(name) != new.get(name)
            ]
        elif RECORD not in self.config:
            raise LabError(
                f"{self.path}: {self._made_by()}, which did not keep all that decides its numbers. {_AFRESH}"
            )
        else:
            different = differences(self.config[RECORD], given[RECORD])
        if different:
            raise LabError(f"{self.path}: this run was made with other settings: {told(different)}. {_AFRESH}")
        if flat(self.config) != flat(given):
            write_json(self.path / _CONFIG, given)
            self.config = given

    def _made_by(self) -> str:
        version = ((self.result or {}).get("versions") or {}).get("uncork")
        return "this run was made by " + (f"uncork {version}" if version else "an earlier version of uncork")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training this run while the block runs.

        The kernel holds the lock (`flock` on the file `.lock`) and drops it with the process, however it ends; forked
        processes share it. Raises LabError when the run is locked, and where there is no flock (Windows).
        """
        try:
            import fcntl
        except ImportError as error:
            raise LabError("training needs file locks (fcntl), which this platform does not have") from error
        path = self.path / _LOCK
        with os_errors(path, "cannot be written"):
            file = path.open("a+b", buffering=0)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read(20).decode(errors="replace").strip() or "unknown"
                raise LabError(f"{self.path}: another process (id {owner}) is training this run") from error
            except OSError as error:
                raise LabError(f"{path}: cannot be locked ({error.strerror or error})") from error
            try:
                with suppress(OSError):  # the id only serves the message above
                    file.truncate(0)
                    file.write(f"{os.getpid()}\n".encode())
                for name in (_METRICS, _RESULT):
                    remove_temporaries(self.path, name)
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Append one row to metrics.jsonl and hand it to the operating system at once.

        What a killed process left of its last line is removed first. Raises LabError when the disk is full.
        """
        path = self.path / _METRICS
        line = json.dumps(plain(row)).encode() + b"\n"
        with os_errors(path, "cannot be written"), path.open("a+b") as file:
            _mend_last_line(path, file)
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, [] when there are none yet.

        A last line that a killed process left unfinished is dropped. Raises LabError with the number of any other line
        that is damaged.
        """
        path = self.path / _METRICS
        if not path.exists():
            return []
        with os_errors(path, "cannot be read"):
            lines = path.read_bytes().split(b"\n")
        unfinished = lines.pop()
        rows = []
        for number, line in enumerate(lines, start=1):
            row = _parse_row(line)
            if row is None:
                raise LabError(f"{path}: line {number} is damaged: {line[:60].decode(errors='replace')!r}; remove it")
            rows.append(row)
        last = _parse_row(unfinished)
        return rows if last is None else [*rows, last]

    def truncate_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep only the rows for which `keep(row)` is true: on resume, those up to the checkpoint's step. Atomic."""
        path = self.path / _METRICS
        if path.exists():
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in self.metrics() if keep(row)))

    def save_checkpoint(
        self, step: int, tensors: dict[str, Tensor], state: Mapping[str, object], *, keep: int = 2, name: str = "last"
    ) -> None:
        """Write a checkpoint, then remove the older ones of this name.

        Args:
            step: orders the checkpoints, >= 0. Those of a later step are removed too: training was resumed from an
                earlier one.
            tensors: any dtypes that safetensors knows, any device; they may share storage (each is then stored in full)
                and need not be contiguous.
            state: JSON: everything else that a resume needs.
            keep: how many checkpoints of this name remain, the new one included, >= 1.
            name: checkpoints of another name ("best") are kept apart.

        Raises LabError when the disk is full or the folder cannot be written; the checkpoints that were there stay.
        """
        if step < 0 or keep < 1:
            raise ValueError(f"step must be >= 0 and keep >= 1, got step={step}, keep={keep}")
        check_name(name, "checkpoint name")
        header = {"uncork": json.dumps({"step": int(step), "state": plain(state)})}
        body = _storable(tensors)
        path = self.path / _CHECKPOINTS / f"{name}-{step:08d}"

        def write(temporary: Path) -> Path:
            save_file(body, temporary, metadata=header)
            flush_to_disk(temporary)
            return path.with_name(f"{path.name}.{_digest(temporary)}.safetensors")

        with os_errors(path, "the checkpoint cannot be written"):
            path.parent.mkdir(exist_ok=True)
            remove_temporaries(path.parent)
            new = commit(path, write)
        self._prune(name, step, new, keep)

    def discard_unused(self) -> None:
        """Remove the folder if it holds the settings alone, so that a run with others may have its place."""
        with suppress(OSError):
            if {path.name for path in self.path.iterdir()} <= {_CONFIG, _LOCK}:
                shutil.rmtree(self.path)

    def is_validated(self) -> bool:
        """Whether the run has a result or a row of a validation, after which a checkpoint of the best was written."""
        return (self.path / _RESULT).exists() or any(row.get("kind") == "valid" for row in self.metrics())

    def last_step(self, name: str = "last") -> int | None:
        """The step of the newest committed checkpoint of this name; None when there is none."""
        return next((step for step, _ in self._checkpoints(name)), None)

    def load_checkpoint(self, name: str = "last") -> Checkpoint | None:
        """The newest intact checkpoint of this name, or None when none was ever committed.

        Damaged ones are skipped with a warning in the log. Raises LabError that names the files when there are
        some and all are damaged.
        """
        damaged, found = [], self._checkpoints(name)
        for step, path in found:
            try:
                return _load(path, step)
            except LabError as error:
                damaged.append(path.name)
                if len(damaged) < len(found):
                    log.warning("%s; trying the one before it", error)
        if damaged:
            raise LabError(
                f"{self.path / _CHECKPOINTS}: no intact checkpoint, damaged are {', '.join(damaged)};"
                " restore one, or remove the run's folder to start afresh"
            )
        return None

    def finish(self, result: Mapping[str, object]) -> None:
        """Write result.json, which marks the run as done. Atomic."""
        write_json(self.path / _RESULT, result)

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` was given, None before. Raises LabError when result.json is damaged."""
        path = self.path / _RESULT
        result = _read_object(path, _FROM_CHECKPOINT) if path.exists() else None
        if result == {}:
            raise LabError(
                f"{path}: is damaged: expected the numbers of a run that is done, got {{}}{_FROM_CHECKPOINT}"
            )
        return result

    def _checkpoints(self, name: str) -> list[tuple[int, Path]]:
        """(step, file) of the committed checkpoints of this name, the newest first."""
        pattern = re.compile(re.escape(name) + rf"-(\d+)\.[0-9a-f]{{{_DIGEST_DIGITS}}}\.safetensors")
        folder = self.path / _CHECKPOINTS
        if not folder.exists():
            return []
        with os_errors(folder, "cannot be read"):
            found = [(int(match[1]), path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
        return sorted(found, reverse=True)

    def _prune(self, name: str, step: int, new: Path, keep: int) -> None:
        others = [(other, path) for other, path in self._checkpoints(name) if path != new]
        kept = [path for other, path in others if other < step][: keep - 1]
        for _, path in others:
            if path not in kept:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:  # the new checkpoint is safe: no reason to stop the training
                    log.warning("%s: cannot be removed (%s)", path, error.strerror or error)


class RunStore:
    """A folder of runs.

    Raises LabError when the folder cannot be created or written. Use `Run.open` to read a run where one cannot write.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if not holds_tensors(self.root):
            raise LabError(
                f"{self.root}: cannot be used as output folder (safetensors reads no path that is not UTF-8)"
            )
        with os_errors(self.root, "cannot be used as output folder"):
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()

    def run(self, name: str, config: Mapping[str, object]) -> Run:
        """Open the run `name`, or create it with this config.

        Raises LabError as `Run.require`, and when `name` has other characters than letters, digits, ".", "_" and "-" or
        begins with a dot.
        """
        check_name(name, "run name")
        path = self.root / name
        given = plain(config)
        if not (path / _CONFIG).exists():
            self._create(path, given)
        run = Run.open(path)
        run.require(given)
        return run

    def runs(self) -> list[Run]:
        """All runs of the store, sorted by name. Raises LabError that names the file when a config is damaged."""
        with os_errors(self.root, "cannot be read"):
            folders = sorted(path for path in self.root.iterdir() if is_name(path.name))
            return [Run.open(path) for path in folders if (path / _CONFIG).exists()]

    def _create(self, path: Path, config: dict[str, Any]) -> None:
        """Make folder and config appear at once, so that of two processes one creates the run, the other opens it."""

        def write(temporary: Path) -> Path:
            temporary.mkdir()
            (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            flush_to_disk(temporary / _CONFIG)
            return path

        if lost := without_config(path):
            raise LabError(lost)
        with os_errors(path, "the run cannot be created"):
            try:
                commit(path, write)
            except OSError:
                if not (path / _CONFIG).exists():  # else another process was quicker
                    raise


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST_DIGITS]


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage, which safetensors refuses; copied only if need be."""
    storages: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        stored = tensor.detach().to("cpu").contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        result[key] = stored
    return result


def _load(path: Path, step: int) -> Checkpoint:
    with os_errors(path, "is damaged"):
        digest = _digest(path)
        if digest != path.name.split(".")[-2]:
            raise LabError(f"{path}: is damaged, its bytes have the digest {digest}")
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("uncork")
            if header is None:
                raise LabError(f"{path}: is not a checkpoint of uncork")
            # Copied, since safetensors maps the file, and a mapped file that someone truncates kills the process.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    return Checkpoint(step, tensors, json.loads(header)["state"], path)


def _read_object(path: Path, mend: str) -> dict[str, Any]:
    obj = read_json(path, mend)
    if not isinstance(obj, dict):
        raise LabError(f"{path}: is damaged, not a JSON object{mend}")
    return obj


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _mend_last_line(path: Path, file: BinaryIO) -> None:
    """Give a last line that lacks its newline one when it is whole, and remove it when it is torn."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    head, newline, last = path.read_bytes().rpartition(b"\n")
    if _parse_row(last) is None:
        file.truncate(len(head + newline))
    else:
        file.write(b"\n")

"""What the folder of a run may be called and holds; without torch, so that a wrong one is refused at once."""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uncork.lab.errors import LabError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def is_name(name: str) -> bool:
    """Whether a run or a checkpoint may have this name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> None:
    """Raise LabError, which begins with `what`, if this is no name of a run or a checkpoint."""
    if not is_name(name):
        raise LabError(
            f'{what} must have only letters, digits, ".", "_" and "-", and no "." at the start, got {name!r}'
        )


def check_folder(path: Path) -> None:
    """Raise LabError if no run can be made in this folder: by its name, or since it holds something else than a run."""
    check_name(path.name, "out_dir: its last part")
    if lost := without_config(path):
        raise LabError(f"out_dir: {lost}")
    if path.is_dir() and not (path / "config.json").exists() and any(path.iterdir()):
        raise LabError(f"out_dir: the folder {path} holds files, but no run: give one that is new or empty")


def without_config(path: Path) -> str:
    """What to say of a folder with files of a run, but without its settings; "" for any other."""
    held = [name for name in ("checkpoints", "metrics.jsonl", "result.json") if (path / name).exists()]
    if not held or (path / "config.json").exists():
        return ""
    return (
        f"{path} holds {', '.join(held)} of a run, but its config.json is missing: restore it, or choose another folder"
    )


def as_arguments(paths: Iterable[Path]) -> str:
    """The first of these paths as they can be pasted into a command line, and the number of further ones."""
    found = sorted(paths)
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return shlex.join(map(str, found[:3])) + more


def require_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Raise LabError if the content of this config.json is not the settings of a run."""
    if "head" not in config:
        names = f"only {', '.join(config)}" if config else "{}"
        raise LabError(f"{path}: is damaged: expected the settings of a run, its head among them, got {names}")

"""What the folder of a run may be called and holds; without torch, so that a wrong one is refused at once."""

import re
from collections.abc import Mapping
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
    if path.is_dir() and not (path / "config.json").exists() and any(path.iterdir()):
        raise LabError(f"out_dir: the folder {path} holds files, but no run: give one that is new or empty")


def require_settings(path: Path, config: Mapping[str, Any]) -> None:
    """Raise LabError if the content of this config.json is not the settings of a run."""
    if "head" not in config:
        names = f"only {', '.join(config)}" if config else "{}"
        raise LabError(f"{path}: is damaged: expected the settings of a run, its head among them, got {names}")

"""Where a result comes from: the command, the commit, the machine and the versions."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import uncork
from uncork.lab.machine import machine_name
from uncork.loss import tile_native


def current_commit() -> str:
    """The commit of the checkout that this file lies in, or "unknown"."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:  # no git
        return "unknown"
    return asked.stdout.strip() or "unknown"


def provenance(command: str, threads: int, **more: Any) -> dict[str, Any]:
    """Where a result comes from: what docs/build.py prints below its table, and the fields `more`."""
    return {
        "command": command,
        "commit": current_commit(),
        "machine": machine_name(torch.device("cpu")),
        "threads": threads,
        "versions": {"torch": torch.__version__, "uncork": uncork.__version__, "python": platform.python_version()},
        "native_instructions": tile_native.instructions(),
        **more,
    }

"""Fresh processes that measure: a task goes in as JSON, and its result comes back as JSON."""

import json
import os
import subprocess
import sys
from typing import Any

from uncork.lab.errors import LabError


def command(kind: str, **task: Any) -> list[str]:
    """The command line of a process for a task: kind time, memory or instructions, and its arguments."""
    return [sys.executable, "-m", "uncork.lab.experiments.bench.worker", json.dumps({"kind": kind, **task})]


def in_fresh_process(kind: str, *, threads: int, **task: Any) -> Any:
    """The result of a task. Raises LabError with the last line of a process that fails."""
    done = subprocess.run(
        command(kind, **task),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise LabError(f"the process that measures {kind} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])

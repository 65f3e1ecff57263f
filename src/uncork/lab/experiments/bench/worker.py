"""A fresh process that measures: `python -m uncork.lab.experiments.bench.worker TASK`, JSON in, JSON out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
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


def main() -> None:
    """Does what the one argument says and prints the result as the last line."""
    from uncork.lab.experiments.bench import instructions, memory, timing

    task = json.loads(sys.argv[1])
    kinds: dict[str, Callable[..., Any]] = {
        "time": timing.task,
        "memory": memory.task,
        "instructions": instructions.task,
    }
    print(json.dumps(kinds[task.pop("kind")](**task)))


if __name__ == "__main__":
    main()

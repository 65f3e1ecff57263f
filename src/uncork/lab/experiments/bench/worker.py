"""What runs in a fresh process: `python -m uncork.lab.experiments.bench.worker TASK`, JSON in, JSON out."""

import json
import sys
from collections.abc import Callable
from typing import Any

from uncork.lab.experiments.bench import instructions, memory, timing


def main() -> None:
    """Does what the one argument says and prints the result as the last line."""
    task = json.loads(sys.argv[1])
    kinds: dict[str, Callable[..., Any]] = {
        "time": timing.task,
        "memory": memory.task,
        "instructions": instructions.task,
    }
    print(json.dumps(kinds[task.pop("kind")](**task)))


if __name__ == "__main__":
    main()

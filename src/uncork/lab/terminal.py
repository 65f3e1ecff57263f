"""What the command line prints, and how it survives that nobody reads it; what this process may use and does."""

import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the help must not wait for torch
    from uncork.lab.trainer import Progress


class NobodyReads(KeyboardInterrupt):
    """The output was piped into something that has ended (`| head`): as Ctrl-C, so that training saves a checkpoint."""


def say(text: str = "") -> None:
    """Print a line at once. Raises NobodyReads into a closed pipe, OSError where the disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        if isinstance(error, BrokenPipeError):
            raise NobodyReads from None
        raise


def clock(seconds: float | None) -> str:
    """Seconds as a person reads them.

    >>> clock(3725), clock(65.2), clock(None)
    ('1:02:05', '01:05', '--:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def progress_line(name: str, p: "Progress", left: float | None) -> str:
    """One line of where a run stands; left: seconds."""
    validation = "" if p.valid_perplexity is None else f"  valid ppl {p.valid_perplexity:8.2f}"
    return (
        f"{name:28} step {p.step:>6}/{p.steps_total}  loss {p.cross_entropy:6.3f}{validation}  "
        f"{p.tokens_per_second:8,.0f} tok/s  {clock(left)} left"
    )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STATUS = Path("/proc/self/status")
"""Where Linux says what `resident` reads."""


def resident(name: str) -> int:
    """Bytes of this process in memory: now ("VmRSS") or at most ("VmHWM"). Linux alone; see STATUS.

    The peak of getrusage is none: a new program starts with that of the process that started it.
    """
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])

"""What every experiment shares: its cells are run by workers, and each is kept the moment it ends."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uncork.lab.run.pool import Event, Job, TimeLeft, run_jobs
from uncork.lab.run.progress import progress_line
from uncork.lab.terminal import clock, say

QUIET = 10.0
"""Seconds between two lines on how far one job is."""


def execute(
    jobs: Sequence[Job],
    *,
    titles: Mapping[str, str],
    workers: int,
    threads: int,
    keep: Callable[[str, Any], str],
    weights: Mapping[str, float] | None = None,
    fresh: bool = True,
) -> dict[str, str]:
    """Runs jobs, says how far they are, and keeps what each leaves as it ends; returns the message of each that failed.

    Args:
        titles: what each job is called, by its name. workers, threads, fresh: see `run_jobs`.
        keep: given the name of a job that is done and what it left; returns what is said of it.
        weights: what each job takes compared with the others, by its name. None: all the same.
    """
    left = TimeLeft(weights or {job.name: 1.0 for job in jobs})
    told: dict[str, float] = {}
    ended = 0

    def hear(event: Event) -> None:
        nonlocal ended
        remaining, title = left.update(event), titles[event.name]
        if event.kind == "progress":
            if time.monotonic() - told.get(event.name, -QUIET) >= QUIET:
                told[event.name] = time.monotonic()
                say(progress_line(title, event.progress, remaining))
            return
        ended += 1
        said = keep(event.name, event.outcome) if event.kind == "done" else f"{event.kind} {event.message}".rstrip()
        say(f"[{ended}/{len(jobs)}] {title}: {said}; {clock(remaining)} left")

    return run_jobs(jobs, workers=workers, threads=threads, fresh=fresh, on_event=hear)

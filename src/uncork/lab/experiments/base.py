"""Runs the cells of an experiment in worker processes and keeps each outcome as soon as its cell ends."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uncork.lab.machine import cores
from uncork.lab.run.pool import Event, Job, TimeLeft, run_jobs
from uncork.lab.run.progress import Stage, announce, progress_line, tell_terminal
from uncork.lab.terminal import clock, say

QUIET = 10.0
"""Least number of seconds between two progress lines of one job."""


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
    """Runs jobs, prints their progress and keeps each outcome as it arrives; returns the error messages by job name.

    Args:
        titles: the text that stands for a job in the output, by its name. workers, threads, fresh: see `run_jobs`.
        keep: called with a finished job's name and outcome; stores it and returns the text to print about it.
        weights: the cost of each job relative to the others, by its name. None: all are equal.
    """
    at_once = min(workers, len(jobs))
    if at_once > cores():
        say(f"workers: {at_once} at a time share {cores()} core{'s' * (cores() > 1)}: as many as cores are no slower")
    if jobs:
        announce("starting")
    left = TimeLeft(weights or {job.name: 1.0 for job in jobs})
    last_printed: dict[str, float] = {}
    ended = 0

    def hear(event: Event) -> None:
        nonlocal ended
        title = titles[event.name]
        if isinstance(event.progress, Stage):
            tell_terminal(event.progress, title)
            return
        remaining = left.update(event)
        if event.kind == "progress":
            if time.monotonic() - last_printed.get(event.name, -QUIET) >= QUIET:
                last_printed[event.name] = time.monotonic()
                say(progress_line(title, event.progress, remaining))
            return
        ended += 1
        said = keep(event.name, event.outcome) if event.kind == "done" else f"{event.kind} {event.message}".rstrip()
        say(f"[{ended}/{len(jobs)}] {title}: {said}; {clock(remaining)} left")

    return run_jobs(jobs, workers=workers, threads=threads, fresh=fresh, on_event=hear)

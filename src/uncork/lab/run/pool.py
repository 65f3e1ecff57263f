"""Worker processes for the cells of an experiment: if one fails or is killed, the others go on.

A worker is a process that computes one job after another, or a single job where each needs a process of its own (to
measure its peak memory). Through a pipe it sends its parent the progress and the outcome of its job.
"""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

from uncork.lab.errors import in_one_line
from uncork.lab.run.interrupts import become_worker
from uncork.lab.run.progress import listening

Tell = Callable[[Any], None]
"""The function that a job calls with its progress."""


@dataclass(frozen=True)
class Job:
    """One piece of work: a name that no other job has, and a function that can be pickled and returns the outcome."""

    name: str
    work: Callable[[Tell], Any]


@dataclass(frozen=True)
class Event:
    """A message about a job: how far it is (`progress`), what it returned (`outcome`), or why it failed (`message`)."""

    name: str
    kind: str  # "progress", "done", "failed", "interrupted"
    progress: Any = None
    outcome: Any = None
    message: str = ""


def run_jobs(
    jobs: Iterable[Job], *, workers: int, threads: int, on_event: Callable[[Event], None], fresh: bool = True
) -> dict[str, str]:
    """Runs the jobs, `workers` processes at a time; returns the message of each job that failed.

    A job that fails (a loss of nan, say, or a process that is killed) does not stop the others. Ctrl-C asks the workers
    to save what they have, waits up to a minute for them, and is raised again; a second Ctrl-C ends the wait.

    Args:
        jobs: taken from the iterable one by one as workers become free, so that it may make each job when it is needed.
        threads: of torch, in each worker. on_event: called in this process with every event.
        fresh: every job has a new process. Otherwise a worker computes many jobs, and a single worker is this process.
    """
    if workers == 1 and not fresh:
        with with_threads(threads):
            return _run_here(jobs, on_event)
    waiting = iter(jobs)
    pool: dict[connection.Connection, _Worker] = {}
    failed: dict[str, str] = {}

    def hear(worker: _Worker, event: Event) -> None:
        if event.kind == "failed":
            failed[event.name] = event.message
        if event.kind != "progress":
            worker.job = None
        on_event(event)
        if event.kind == "interrupted":
            raise KeyboardInterrupt

    try:
        while True:
            for worker in [worker for worker in pool.values() if worker.job is None and not fresh]:
                worker.take(next(waiting, None))
            while len(pool) < workers and (job := next(waiting, None)) is not None:
                started = _Worker(threads)
                pool[started.pipe] = started
                started.take(job)
            if not pool:
                return failed
            for pipe in connection.wait(list(pool), timeout=1.0):
                assert isinstance(pipe, connection.Connection)
                worker = pool[pipe]
                try:
                    event = pipe.recv()
                except (EOFError, OSError):  # its process has ended, normally or not
                    del pool[pipe]
                    worker.close()
                    if worker.job is not None:
                        hear(worker, Event(worker.job, "failed", message=_how_it_ended(worker.process.exitcode)))
                    continue
                hear(worker, event)
                if fresh and worker.job is None:
                    worker.take(None)
    finally:
        _end([worker.process for worker in pool.values()])


@contextmanager
def with_threads(number: int) -> Iterator[None]:
    """Within the block, torch computes with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_here(jobs: Iterable[Job], on_event: Callable[[Event], None]) -> dict[str, str]:
    failed: dict[str, str] = {}
    for job in jobs:

        def tell(progress: Any, name: str = job.name) -> None:
            on_event(Event(name, "progress", progress))

        event = _outcome(job, tell)
        if event.kind == "failed":
            failed[job.name] = event.message
        on_event(event)
    return failed


class _Worker:
    """A process, the pipe to it, and the name of its current job.

    Each worker has its own pipe, since a killed process can leave a shared queue locked. Ctrl-C, which the terminal
    sends to all processes, is blocked in the worker: `run_jobs` passes it on, once, as SIGTERM.
    """

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.job: str | None = None
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_work, args=(far_end, threads))
        resource_tracker.ensure_running()  # started here, since its start unblocks SIGINT
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            far_end.close()

    def take(self, job: Job | None) -> None:
        """Sends the process its next job; None ends the process."""
        self.job = None if job is None else job.name
        with suppress(OSError):  # a process that has ended is noticed when its pipe is read
            self.pipe.send(job)

    def close(self) -> None:
        self.process.join()
        self.pipe.close()


def _end(processes: Sequence[Any]) -> None:
    """Ask the workers to save what they have and end; kill them after a minute, or at Ctrl-C."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            process.kill()


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    hint = "; was the memory full?" if -exitcode == signal.SIGKILL else ""
    return f"its process was killed ({signal.Signals(-exitcode).name}){hint}"


def _work(pipe: connection.Connection, threads: int) -> None:
    """The main function of a worker process: computes jobs until it receives None."""
    become_worker()
    torch.set_num_threads(threads)
    with suppress(EOFError, KeyboardInterrupt):
        while (job := pipe.recv()) is not None:
            _do(job, pipe)


def _do(job: Job, pipe: connection.Connection) -> None:
    def tell(event: Event) -> None:
        try:
            pipe.send(event)
        except OSError:  # nobody listens any more
            raise KeyboardInterrupt from None

    try:
        tell(_outcome(job, lambda progress: tell(Event(job.name, "progress", progress))))
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            tell(Event(job.name, "interrupted"))
        raise


def _outcome(job: Job, tell: Tell) -> Event:
    """Computes the job, whose stages are progress too; returns the event that it is done, or that it failed."""
    try:
        with listening(tell):
            return Event(job.name, "done", outcome=job.work(tell))
    except Exception as error:
        said = in_one_line(error)
        if said is None:
            traceback.print_exc()  # a bug: the one line would not say where it is
        return Event(job.name, "failed", message=said or f"{type(error).__name__}: {error}")


@dataclass
class TimeLeft:
    """Estimates the time that a set of jobs still takes from the share of their work that is done.

    Args:
        weights: by name, the cost of each job relative to the others.
    """

    weights: Mapping[str, float]
    started: float = field(default_factory=lambda: time.monotonic())
    _share: dict[str, float] = field(default_factory=dict)
    _before: dict[str, float] = field(default_factory=dict)
    """The share of each job that was done at its first event: the work of an earlier session."""

    def update(self, event: Event) -> float | None:
        """Seconds left, or None while too little is known."""
        p = event.progress
        share = 1.0 if p is None else p.step / max(1, p.steps_total)
        self._before.setdefault(event.name, 0.0 if p is None else share)  # without progress: all done now
        self._share[event.name] = share
        total = sum(self.weights.values())
        done, before = (
            sum(self.weights[name] * s for name, s in own.items()) / total for own in (self._share, self._before)
        )
        return None if done - before < 0.005 else (time.monotonic() - self.started) * (1 - done) / (done - before)

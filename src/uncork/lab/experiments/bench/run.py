"""A whole benchmark: the check of correctness, then processes that measure time and processes that measure memory."""

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import psutil

from uncork.lab.errors import LabError
from uncork.lab.experiments.base import execute
from uncork.lab.experiments.bench import gate, instructions, memory
from uncork.lab.experiments.bench.contenders import check_name, is_ours
from uncork.lab.experiments.bench.settings import CONTENDERS, EAGER, PRODUCTS, Bench, Setup, Shape
from uncork.lab.experiments.bench.tables import (
    display_table,
    memory_frame,
    shape_columns,
    time_rows,
)
from uncork.lab.experiments.bench.timing import time_contenders
from uncork.lab.machine import cores
from uncork.lab.report.publish import publish
from uncork.lab.run.pool import Job, Tell, with_threads
from uncork.lab.run.progress import told
from uncork.lab.run.provenance import provenance
from uncork.lab.terminal import say
from uncork.loss.implementations import IMPLEMENTATIONS
from uncork.messages import close_to

CHUNKS = (64, 128, 256, 512, 1024)
"""Chunk sizes among which torch-best takes the quickest."""


@dataclass(frozen=True)
class Plan:
    """The contenders whose time is measured at each shape, and those whose memory is."""

    times: dict[Shape, tuple[str, ...]]
    memory: dict[Shape, tuple[str, ...]]


def plan_of(settings: Bench) -> Plan:
    """The plan that measures the same contenders at every shape. Raises LabError for a bad flag."""
    for name in ("rounds", "processes", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise LabError(f"{name}: expected at least 1, got {value}")
    if settings.impl is not None and settings.impl not in IMPLEMENTATIONS:
        near = close_to(settings.impl, IMPLEMENTATIONS)
        raise LabError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {settings.impl!r}{near}")
    if not settings.max_seconds > 0:
        raise LabError(f"max-seconds: expected above 0, got {settings.max_seconds}")
    for name in settings.only:
        check_name(name)
    shapes = [Shape.parse(text) for text in settings.shapes]
    there = psutil.virtual_memory().total
    for shape in shapes:
        if shape.least_bytes > there:
            raise LabError(
                f"shapes: {shape} needs at least {shape.least_bytes / 2**30:,.1f} GiB of memory for input, weight and "
                f"their gradients, and the machine has {there / 2**30:,.1f} GiB"
            )
    timed = tuple(dict.fromkeys((PRODUCTS, EAGER, *(settings.only or CONTENDERS))))
    of_memory = tuple(name for name in timed if name not in (PRODUCTS, "G-forward")) if settings.memory else ()
    return Plan(dict.fromkeys(shapes, timed), dict.fromkeys(shapes, of_memory))


def run(settings: Bench, plan: Plan, command: str) -> dict[str, pd.DataFrame]:
    """Runs the plan; returns the tables "times", "memory", "table" and, if counted, "instructions".

    They are also written to settings.out_dir, if that is given.

    Args:
        plan: `plan_of(settings)` or another.
        command: the command line, for provenance.json.

    Raises:
        LabError: a contender's numbers are wrong, or a process fails.
    """
    threads = settings.threads or cores()
    if settings.out_dir is not None:
        settings.out_dir.mkdir(parents=True, exist_ok=True)  # fails before anything is measured, not after
    load = _warn_if_busy()
    setups = {shape: _setup(settings, shape, threads) for shape in {**plan.times, **plan.memory}}
    _check(plan, setups, threads)
    chunks = {shape: _best_chunk(setups[shape]) for shape, names in _all(plan).items() if "torch-best" in names}
    times = pd.DataFrame(_times(settings, plan, setups, chunks, threads))
    with ThreadPoolExecutor(1) as beside:  # bytes and instructions do not depend on what else is running
        counted = beside.submit(_instructions) if settings.instructions else None
        used = memory_frame(_memory(plan, setups, chunks, threads))
    tables = {"times": times, "memory": used, "table": display_table(times, used)}
    if counted is not None:
        tables["instructions"] = counted.result()
    if settings.out_dir is not None:
        origin = provenance(
            command, threads, dtype=settings.dtype, impl=settings.impl, load_average=load,
            rounds=settings.rounds, processes=settings.processes,
            torch_best_chunk={str(shape): chunk for shape, chunk in chunks.items()},
        )  # fmt: skip
        publish(settings.out_dir, tables, origin)
    return tables


def _setup(settings: Bench, shape: Shape, threads: int) -> Setup:
    return Setup(shape, threads, settings.dtype, settings.impl)


def _all(plan: Plan) -> dict[Shape, tuple[str, ...]]:
    shapes = {**plan.times, **plan.memory}
    return {s: tuple(dict.fromkeys((*plan.times.get(s, ()), *plan.memory.get(s, ())))) for s in shapes}


def _warn_if_busy() -> float | None:
    """The load average of the last minute; prints a warning if the machine is busy."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"warning: the load average is {load:.1f}: something else is running, and times will show it")
    return round(load, 2)


def _check(plan: Plan, setups: dict[Shape, Setup], threads: int) -> None:
    """Checks each contender of ours against float64, once for all shapes that `gate.cut` makes equal."""
    pairs = ((name, gate.cut(setups[shape])) for shape, names in _all(plan).items() for name in names)
    ours = dict.fromkeys(pair for pair in pairs if is_ours(pair[0]))
    with with_threads(threads):
        checked = told(ours, "checking against float64", len(ours))
        worst = max((gate.check(name, setup) for name, setup in checked), default=0.0)
    say(f"correct: {len(ours)} checks against float64, the worst error is {worst:.0%} of what is allowed")


def _best_chunk(setup: Setup) -> int:
    """The chunk size among CHUNKS with which F.linear_cross_entropy is quickest."""
    sizes = [size for size in CHUNKS if size <= setup.shape.tokens] or [setup.shape.tokens]
    if len(sizes) == 1:
        return sizes[0]
    contenders = {str(size): f"torch-{size}" for size in sizes}
    work = partial(time_contenders, setup, contenders, 1, 60.0, 0)
    (outcome,) = _measured(
        {f"chunk sizes of torch's own op at ({setup.shape})": work}, setup.threads, lambda _: "timed"
    )
    found = {int(label): min(times.values()) for label, times in outcome["times"].items() if times}
    best = min(found, key=found.__getitem__, default=sizes[-1])
    say(f"({setup.shape}): torch's own op is quickest in chunks of {best} rows")
    return best


def _measured(
    work: Mapping[str, Callable[[Tell], dict[str, Any]]], threads: int, said: Callable[[dict[str, Any]], str]
) -> list[dict[str, Any]]:
    """Runs one job after the other, each in a process of its own; returns their outcomes.

    Args:
        work: the jobs by their titles. said: turns an outcome into the text to print about it.

    Raises:
        LabError: a job failed.
    """
    found: dict[str, dict[str, Any]] = {}

    def keep(title: str, outcome: dict[str, Any]) -> str:
        found[title] = outcome
        return said(outcome)

    jobs, titles = [Job(title, job) for title, job in work.items()], {title: title for title in work}
    for title, message in execute(jobs, titles=titles, workers=1, threads=threads, keep=keep).items():
        raise LabError(f"{title}: {message}")
    return [found[title] for title in work]


def _times(
    settings: Bench, plan: Plan, setups: dict[Shape, Setup], chunks: dict[Shape, int], threads: int
) -> list[dict[str, Any]]:
    # The outer loop is over processes, so that the processes of one shape lie apart in time.
    turns = list(itertools.product(range(settings.processes), plan.times.items()))
    work = {}
    for process, (shape, names) in turns:
        contenders = {name: _resolved(name, chunks.get(shape)) for name in names}
        title = f"time at ({shape}), process {process + 1} of {settings.processes}"
        work[title] = partial(
            time_contenders, setups[shape], contenders, settings.rounds, settings.max_seconds, process
        )
    outcomes = _measured(work, threads, lambda _: "timed")
    return [
        row
        for shape in plan.times
        for row in time_rows(shape, [o for o, (_, (own, _)) in zip(outcomes, turns, strict=True) if own == shape])
    ]


def _resolved(name: str, chunk: int | None) -> str:
    return f"torch-{chunk}" if name == "torch-best" else name


def _memory(plan: Plan, setups: dict[Shape, Setup], chunks: dict[Shape, int], threads: int) -> list[dict[str, Any]]:
    wanted = [(shape, name) for shape, names in plan.memory.items() for name in names]
    if not wanted:
        return []
    if not memory.measurable():
        say("memory: not measured, which needs Linux's /proc/self/clear_refs")
        return []

    def mib(size: float | None) -> float | None:
        return None if size is None else round(size / 2**20, 2)

    work = {
        f"memory of {name} at ({shape})": partial(memory.measure, setups[shape], _resolved(name, chunks.get(shape)))
        for shape, name in wanted
    }
    outcomes = _measured(work, threads, lambda o: o["note"] or f"{mib(o['extra']):.1f} MiB")
    return [
        {
            "contender": name,
            **shape_columns(shape),
            "extra_mib": mib(found["extra"]),
            "gradients_mib": mib(found["gradients"]),
            "note": found["note"],
        }
        for (shape, name), found in zip(wanted, outcomes, strict=True)
    ]


def _instructions() -> pd.DataFrame:
    reason = instructions.missing()
    if reason is None:
        say("instructions: counting under valgrind, which takes minutes")
        try:
            return pd.DataFrame(instructions.count())
        except LabError as error:
            reason = str(error)
    say(f"instructions: not counted: {reason}")
    return pd.DataFrame()

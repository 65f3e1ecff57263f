"""A whole benchmark: the gate, then processes that time and processes that measure memory."""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from uncork.lab.errors import LabError
from uncork.lab.experiments.bench import gate, instructions, memory
from uncork.lab.experiments.bench.contenders import check_name
from uncork.lab.experiments.bench.fresh import in_fresh_process
from uncork.lab.experiments.bench.settings import CONTENDERS, EAGER, PRODUCTS, Bench, Setup, Shape
from uncork.lab.experiments.bench.tables import (
    display_table,
    memory_frame,
    shape_columns,
    time_rows,
)
from uncork.lab.machine import cores
from uncork.lab.report.publish import publish
from uncork.lab.run.provenance import provenance
from uncork.lab.terminal import say

CHUNKS = (64, 128, 256, 512, 1024)
"""Chunk sizes among which torch-best is sought."""


@dataclass(frozen=True)
class Plan:
    """Which contenders are timed, and of which the memory is measured, at which shape."""

    times: dict[Shape, tuple[str, ...]]
    memory: dict[Shape, tuple[str, ...]]


def plan_of(settings: Bench) -> Plan:
    """The same contenders at every shape. Raises LabError for what does not fit."""
    for name in ("rounds", "processes", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise LabError(f"{name}: expected at least 1, got {value}")
    if not settings.max_seconds > 0:
        raise LabError(f"max-seconds: expected above 0, got {settings.max_seconds}")
    for name in settings.only:
        check_name(name)
    shapes = [Shape.parse(text) for text in settings.shapes]
    timed = tuple(dict.fromkeys((PRODUCTS, EAGER, *(settings.only or CONTENDERS))))
    of_memory = tuple(name for name in timed if name not in (PRODUCTS, "G-forward")) if settings.memory else ()
    return Plan(dict.fromkeys(shapes, timed), dict.fromkeys(shapes, of_memory))


def run(settings: Bench, plan: Plan, command: str) -> dict[str, pd.DataFrame]:
    """The tables "times", "memory", "table" and "instructions"; written to settings.out_dir too, where it is given.

    Args:
        plan: what is measured, `plan_of(settings)` or another.
        command: what provenance.json says made it.

    Raises:
        LabError: a contender's numbers are wrong, or a process fails.
    """
    threads = settings.threads or cores()
    if settings.out_dir is not None:
        settings.out_dir.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before, not after
    load = _warn_if_busy()
    setups = {shape: _setup(settings, shape, threads) for shape in {**plan.times, **plan.memory}}
    _check(plan, setups, threads)
    chunks = {shape: _best_chunk(setups[shape]) for shape, names in _all(plan).items() if "torch-best" in names}
    times = pd.DataFrame(_times(settings, plan, setups, chunks))
    with ThreadPoolExecutor(1) as beside:  # neither count minds what else is running
        counted = beside.submit(_instructions) if settings.instructions else None
        used = memory_frame(_memory(plan, setups, chunks))
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
    """The load average of the last minute; says so where others are at work."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"warning: the load average is {load:.1f}: something else is running, and times will show it")
    return round(load, 2)


def _check(plan: Plan, setups: dict[Shape, Setup], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Rows and words are cut in the gate: shapes of the same D, V and more are the same there.
        checked: dict[tuple[Setup, str], float] = {}
        for shape, names in _all(plan).items():
            cut = Shape(min(shape.tokens, gate.GATE_TOKENS), shape.in_features, min(shape.vocab_size, gate.GATE_VOCAB))
            setup = dataclasses.replace(setups[shape], shape=cut)
            missing = [name for name in names if (setup, name) not in checked]
            checked |= {(setup, name): value for name, value in gate.check_all(missing, setup).items()}
    finally:
        torch.set_num_threads(before)
    worst = max(checked.values(), default=0.0)
    say(f"correct: {len(checked)} checks against float64, the worst error is {worst:.0%} of what is allowed")


def _best_chunk(setup: Setup) -> int:
    """The chunk size with which F.linear_cross_entropy is quickest at a shape."""
    sizes = [size for size in CHUNKS if size <= setup.shape.tokens] or [setup.shape.tokens]
    if len(sizes) == 1:
        return sizes[0]
    outcome = _timed(setup, {str(size): f"torch-{size}" for size in sizes}, rounds=1, max_seconds=60.0, seed=0)
    found = {int(label): min(times.values()) for label, times in outcome["times"].items() if times}
    best = min(found, key=found.__getitem__, default=sizes[-1])
    say(f"({setup.shape}): torch's own op is quickest in chunks of {best} rows")
    return best


def _timed(setup: Setup, contenders: dict[str, str], **task: Any) -> dict[str, Any]:
    result: dict[str, Any] = in_fresh_process(
        "time", threads=setup.threads, setup=setup.to_dict(), contenders=contenders, **task
    )
    return result


def _times(settings: Bench, plan: Plan, setups: dict[Shape, Setup], chunks: dict[Shape, int]) -> list[dict[str, Any]]:
    outcomes: dict[Shape, list[dict[str, Any]]] = {shape: [] for shape in plan.times}
    for process in range(settings.processes):  # the outer loop, so that a shape's processes lie apart in time
        for number, (shape, names) in enumerate(plan.times.items(), start=1):
            say(f"time: process {process + 1} of {settings.processes}, shape {number} of {len(plan.times)} ({shape})")
            resolve = _resolver(chunks.get(shape))
            outcome = _timed(
                setups[shape], {name: resolve(name) for name in names},
                rounds=settings.rounds, max_seconds=settings.max_seconds, seed=process,
            )  # fmt: skip
            outcomes[shape].append(outcome)
    return [row for shape, found in outcomes.items() for row in time_rows(shape, found)]


def _resolver(chunk: int | None) -> Callable[[str], str]:
    return lambda name: f"torch-{chunk}" if name == "torch-best" else name


def _memory(plan: Plan, setups: dict[Shape, Setup], chunks: dict[Shape, int]) -> list[dict[str, Any]]:
    wanted = [(shape, name) for shape, names in plan.memory.items() for name in names]
    if not wanted:
        return []
    if not memory.measurable():
        say("memory: not measured, which needs Linux's /proc/self/clear_refs")
        return []
    rows = []
    for number, (shape, name) in enumerate(wanted, start=1):
        found = in_fresh_process(
            "memory", threads=setups[shape].threads, setup=setups[shape].to_dict(),
            name=_resolver(chunks.get(shape))(name),
        )  # fmt: skip
        extra = None if found["extra"] is None else found["extra"] / 2**20
        said = found["note"] if extra is None else f"{extra:.1f} MiB"
        say(f"memory: {number} of {len(wanted)}, {name} at ({shape}): {said}")
        gradients = None if found["gradients"] is None else round(found["gradients"] / 2**20, 2)
        rows.append(
            {
                "contender": name,
                **shape_columns(shape),
                "extra_mib": None if extra is None else round(extra, 2),
                "gradients_mib": gradients,
                "note": found["note"],
            }
        )
    return rows


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

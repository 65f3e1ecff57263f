"""Estimates the time that the cells of a part take, runs them on workers, and keeps the row of each as it ends."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import psutil

from uncork.lab.errors import LabError
from uncork.lab.experiments.base import execute
from uncork.lab.experiments.synthetic.cells import Cell, run_cell
from uncork.lab.experiments.synthetic.fitting import Fitting, fit
from uncork.lab.run.key import RECORD
from uncork.lab.run.pool import Job, Tell, with_threads
from uncork.lab.run.progress import told
from uncork.lab.run.provenance import current_commit
from uncork.lab.run.rows import RowStore, outdated
from uncork.lab.run.variables import refuse_variables
from uncork.lab.terminal import clock, say

_TIMED_STEPS = 4


def run_cells(cells: Sequence[Cell], store: RowStore, workers: int) -> list[dict[str, Any]]:
    """The row of every cell, in the order given; those that are kept are not run again.

    Each worker computes with one thread, so that results do not depend on the number of workers.

    Raises:
        LabError: cells failed (the others are run and kept first), need more memory than the machine has, or an
            environment variable would change the numbers.
    """
    refuse_variables()
    cells, rows = list(dict.fromkeys(cells)), store.rows()
    left = [cell for cell in cells if cell.key not in rows]
    for line in outdated((cell.record() for cell in left), rows):
        say(line)
    workers = min(workers, len(left))
    if left:
        _require_memory(left, workers)
        costs = estimate(left)
        total = max(sum(costs.values()) / workers, max(costs.values()))
        say(
            f"{len(left)} of {len(cells)} cells to run, {len(cells) - len(left)} done before; "
            f"at most about {clock(total)} with {workers} worker{'s' * (workers > 1)}"
        )
        left.sort(key=lambda cell: -costs[cell])  # the longest first, so that no worker is left with one at the end
        _run_all(left, costs, store, workers)
        rows = store.rows()
    return [rows[cell.key] for cell in cells]


def estimate(cells: Sequence[Cell]) -> dict[Cell, float]:
    """Seconds that each cell takes at most: its largest number of steps, times the measured time of a step."""
    found: dict[tuple[Any, ...], float] = {}
    result = {}
    with with_threads(1):
        for cell in told(cells, "measuring the time of a step", len(cells)):
            shape = (cell.num_contexts, cell.num_words, cell.in_features, cell.head)
            if shape not in found:
                found[shape] = _step_seconds(cell)
            result[cell] = found[shape] * cell.fitting.most_steps
    return result


def _step_seconds(cell: Cell) -> float:
    # On targets that are quick to make: a step costs the same on any.
    plain = replace(cell, target="dirichlet:1.0")
    targets = plain.make_targets()
    head, contexts = plain.build(targets)
    few = Fitting(first_round=_TIMED_STEPS, rounds=1)
    # The first fit also allocates memory: the quicker of two counts.
    return min(fit(targets, head, contexts, few).seconds for _ in range(2)) / _TIMED_STEPS


def _require_memory(cells: Sequence[Cell], workers: int) -> None:
    there = psutil.virtual_memory().total
    largest = max(cells, key=lambda cell: cell.memory)
    needed = workers * largest.memory
    if needed > there:
        raise LabError(
            f"num-contexts and num-words: {largest.num_contexts} x {largest.num_words} with {largest.head} "
            f"on {workers} worker(s) need about {needed / 2**30:.1f} GiB, and the machine has {there / 2**30:.1f}: "
            "give fewer of them or fewer workers"
        )


def _run_all(cells: Sequence[Cell], costs: dict[Cell, float], store: RowStore, workers: int) -> None:
    by_key, commit = {cell.key: cell for cell in cells}, current_commit()

    def keep(key: str, outcome: dict[str, Any]) -> str:
        record = by_key[key].record()
        store.add({"key": key, "config": record.pop("asked"), RECORD: record, "commit": commit, **outcome})
        return _line(outcome["row"])

    failed = execute(
        [Job(key, partial(_work, cell)) for key, cell in by_key.items()],
        titles={key: cell.title for key, cell in by_key.items()},
        workers=workers,
        threads=1,
        keep=keep,
        weights={key: costs[cell] for key, cell in by_key.items()},
        fresh=False,
    )
    if failed:
        key, message = next(iter(failed.items()))
        others = ", the others are kept" if len(failed) < len(cells) else ""
        raise LabError(f"{len(failed)} of {len(cells)} cells failed{others}; the first: {by_key[key].title}: {message}")


def _work(cell: Cell, tell: Tell) -> dict[str, Any]:
    """The job of a worker; only its stages are progress."""
    return run_cell(cell)


def _line(row: dict[str, Any]) -> str:
    ended = "" if row["converged"] else " (not converged)"
    return f"KL {row['kl']:.4f}, mode matching {row['mode_matching']:.1f} %, {row['steps']} steps{ended}"

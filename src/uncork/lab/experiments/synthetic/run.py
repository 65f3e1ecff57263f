"""Runs the cells of a part: a timed estimate first, then workers; every finished cell is kept as it comes."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from uncork.lab.errors import LabError
from uncork.lab.experiments.bench.tables import current_commit
from uncork.lab.experiments.synthetic.cells import Cell, run_cell
from uncork.lab.experiments.synthetic.fitting import Fitting, fit
from uncork.lab.run.files import read_json, write_json
from uncork.lab.run.interrupts import STOPS, become_worker, handled
from uncork.lab.run.key import differences, told
from uncork.lab.run.variables import refuse_variables
from uncork.lab.terminal import clock, say

_TIMED_STEPS = 4


class CellStore:
    """Finished cells, one JSON file each, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outdated: Counter[str] = Counter()
        """Why cells of before are not taken for those that are asked for, and how many."""

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """What `run_cell` left, or None where the cell has not been run, was run by other rules, or is damaged."""
        path = self._path(cell)
        if not path.exists():
            return None
        try:
            found = read_json(path)
        except LabError as error:
            say(f"warning: {error}: the cell runs again")
            return None
        whole = isinstance(found, dict) and found.get("cell") == cell.to_dict() and "function" in found
        whole = whole and isinstance(found.get("row"), dict) and "mode_matching" in found["row"]
        if not whole:
            say(f"warning: {path}: is not what this cell leaves: it runs again")
            return None
        if not isinstance(found.get("record"), dict):
            self.outdated["an earlier version made them, which did not keep all that decides their numbers"] += 1
            return None
        different = differences(found["record"], cell.record())
        if different:
            self.outdated[told(different)] += 1
        return None if different else found

    def put(self, cell: Cell, outcome: dict[str, Any]) -> None:
        """Keeps it, whole or not at all. Raises LabError where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LabError(f"{self.folder}: cannot be written ({error.strerror})") from error
        write_json(self._path(cell), outcome)

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"


def run_cells(cells: Sequence[Cell], store: CellStore, workers: int) -> list[dict[str, Any]]:
    """What every cell leaves, in the order given; those in the store are not run again.

    One core a worker: each computes with one thread, so that results do not depend on their number.

    Raises:
        LabError: cells failed, after all others were run and kept; or they need more memory than there is; or an
            environment variable would change the numbers.
    """
    refuse_variables()
    cells = list(dict.fromkeys(cells))
    store.outdated.clear()
    done = {cell: found for cell in cells if (found := store.get(cell)) is not None}
    left = [cell for cell in cells if cell not in done]
    for reason, count in store.outdated.items():
        say(f"{count} cells of before do not count: {reason}")
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
        done |= _run_all(left, costs, store, workers)
    return [done[cell] for cell in cells]


def estimate(cells: Sequence[Cell]) -> dict[Cell, float]:
    """Seconds that each cell takes at most: its most steps, times a step timed here and now."""
    found: dict[tuple[Any, ...], float] = {}
    result = {}
    with one_thread():
        for cell in cells:
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
    # The first time pays for memory that is new.
    return min(fit(targets, head, contexts, few).seconds for _ in range(2)) / _TIMED_STEPS


def _require_memory(cells: Sequence[Cell], workers: int) -> None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = max(cells, key=lambda cell: cell.memory)
    needed = workers * largest.memory
    if needed > there:
        raise LabError(
            f"num-contexts and num-words: {largest.num_contexts} x {largest.num_words} with {largest.head} "
            f"on {workers} worker(s) need about {needed / 2**30:.1f} GiB, and the machine has {there / 2**30:.1f}: "
            "give fewer of them or fewer workers"
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_all(
    cells: Sequence[Cell], costs: dict[Cell, float], store: CellStore, workers: int
) -> dict[Cell, dict[str, Any]]:
    done: dict[Cell, dict[str, Any]] = {}
    failed: list[str] = []
    began, total, spent = time.perf_counter(), sum(costs[cell] for cell in cells), 0.0
    commit = current_commit()
    for cell, outcome in _outcomes(cells, workers):
        spent += costs[cell]
        left = (time.perf_counter() - began) * (total - spent) / spent
        if "failed" in outcome:
            failed.append(f"{_where(outcome)}: {outcome['failed']}")
            said = failed[-1]
        else:
            done[cell] = {**outcome, "commit": commit}
            store.put(cell, done[cell])
            said = _line(outcome["row"])
        say(f"[{len(done) + len(failed)}/{len(cells)}] {said}  {clock(left)} left")
    if failed:
        others = ", the others are kept" if done else ""
        raise LabError(f"{len(failed)} of {len(cells)} cells failed{others}; the first: {failed[0]}")
    return done


def _attempt(cell: Cell) -> dict[str, Any]:
    """What `run_cell` leaves, or the reason why not, so that one cell's failure does not end the others."""
    try:
        return run_cell(cell)
    except LabError as error:
        return {**cell.to_dict(), "failed": str(error)}


def _where(row: dict[str, Any]) -> str:
    return f"{row['target']} M={row['num_words']} d={row['in_features']} seed {row['seed']} {row['head']}"


def _line(row: dict[str, Any]) -> str:
    ended = "" if row["converged"] else " (not converged)"
    return (
        f"{_where(row):60} KL {row['kl']:7.4f}  mode matching {row['mode_matching']:5.1f} %  "
        f"{row['steps']} steps{ended}"
    )


def _outcomes(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with what it leaves, in the order in which they end."""
    if workers == 1:
        with one_thread():
            for cell in cells:
                yield cell, _attempt(cell)
        return
    # Spawned, since a fork would copy locks of torch's threads in whatever state they are.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_in_worker)
    try:
        with handled(
            signal.SIG_IGN, [s for s in STOPS if s != signal.SIGTERM]
        ):  # which the workers inherit: the parent ends them itself
            running = {pool.submit(_attempt, cell): cell for cell in cells}
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise LabError(
            "a worker has died, probably for lack of memory: give fewer workers, contexts or words"
        ) from None
    finally:  # also where a cell failed, or Ctrl-C came: what has not begun is dropped, and nobody waits for the rest
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def _in_worker() -> None:
    become_worker()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a cell has nothing to save, and the pool swallows exceptions
    torch.set_num_threads(1)

"""Time: contenders take turns within one process, in another order every round."""

import random
import time
from typing import Any

from uncork.lab.experiments.bench.contenders import Inputs, Step, Unavailable, build_step
from uncork.lab.experiments.bench.settings import PRODUCTS, Setup
from uncork.lab.run.pool import Tell
from uncork.lab.run.progress import told

SLOW = 4.0
"""A contender that takes more than this many times as long as G takes part in every third round only."""
SLOW_EVERY = 3
QUICK = 0.5
"""Seconds below which a contender warms up twice."""


def seconds(step: Step) -> float:
    """Seconds of one run, which allocates its gradients anew."""
    step.clear()
    start = time.perf_counter()
    step.run()
    return time.perf_counter() - start


def _warm_up(step: Step) -> float:
    """Seconds of a first call; if it is quick, of a second one, since the first may have loaded a library."""
    first = seconds(step)
    return seconds(step) if first < QUICK else first


def interleave(
    steps: dict[str, Step], rounds: int, *, unit: str | None = None, max_seconds: float = float("inf"), seed: int = 0
) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
    """Seconds of each step, by round, and notes on the steps that were not in all rounds.

    Args:
        rounds: number of rounds after the warm-up, which is not counted.
        unit: a step whose warm-up takes more than SLOW times as long as this one's is slow. None: no step is slow.
        max_seconds: a step whose warm-up takes longer is left out.
        seed: of the random orders.
    """
    order, shuffle = list(steps), random.Random(seed)
    warm = {name: _warm_up(steps[name]) for name in told(order, "warming up", len(order))}
    notes = dict[str, str]()
    for name in order:
        if warm[name] > max_seconds:
            notes[name] = f"left out: one call took {warm[name]:.0f} s, the limit is {max_seconds:g} s"
        elif unit is not None and warm[name] > SLOW * warm[unit] and rounds > 1:
            notes[name] = f"slow: in every {SLOW_EVERY}rd round"
    times: dict[str, dict[int, float]] = {name: {} for name in order}
    for turn in told(range(rounds), "timing", rounds):
        shuffle.shuffle(order)
        for name in order:
            slow, out = notes.get(name, "").startswith("slow"), notes.get(name, "").startswith("left out")
            if not out and not (slow and turn % SLOW_EVERY):
                times[name][turn] = seconds(steps[name])
    return times, notes


def time_contenders(
    setup: Setup, contenders: dict[str, str], rounds: int, max_seconds: float, seed: int, tell: Tell
) -> dict[str, Any]:
    """The job that measures time: `times` and `notes` as `interleave` returns them. contenders: names by label."""
    inputs = Inputs(setup)
    steps, missing = dict[str, Step](), dict[str, str]()
    for label, name in contenders.items():
        try:
            steps[label] = build_step(name, inputs)
        except Unavailable as error:
            missing[label] = f"left out: {error}"
    unit = PRODUCTS if PRODUCTS in steps else None
    times, notes = interleave(steps, rounds, unit=unit, max_seconds=max_seconds, seed=seed)
    return {"times": times, "notes": {**notes, **missing}}

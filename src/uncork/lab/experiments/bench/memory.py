"""Peak memory of one step, in a process of its own.

extra = peak resident memory during the step - resident memory before it - the gradients that it leaves

Before the step, inputs and parameters are resident, and a tiny step of the same kind has loaded and warmed up the
libraries. The eager softmax peaks before its gradients are allocated: subtracting them makes its `extra` a little too
low.
"""

import ctypes
import dataclasses
import gc
from pathlib import Path
from typing import Any

from uncork.lab.experiments.bench.contenders import Inputs, Step, Unavailable, build_step
from uncork.lab.experiments.bench.settings import Setup, Shape
from uncork.lab.machine import STATUS, resident
from uncork.lab.run.pool import Tell

_RESET = Path("/proc/self/clear_refs")
_TINY = Shape(8, 8, 32)


def measurable() -> bool:
    """Whether a process can read and reset its own peak memory here: only on Linux."""
    return STATUS.exists() and _RESET.exists()


def peak_of(step: Step) -> dict[str, int]:
    """`extra` and `gradients` of one run, in bytes."""
    step.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5", encoding="utf-8")  # sets the peak to what is resident now
    before = resident("VmRSS")
    step.run()
    peak = resident("VmHWM")
    gradients = sum(leaf.grad.nbytes for leaf in step.leaves.values() if leaf.grad is not None)
    return {"extra": max(0, peak - before - gradients), "gradients": gradients}


def measure(setup: Setup, name: str, tell: Tell) -> dict[str, Any]:
    """The job that measures one contender: `extra` and `gradients` in bytes, or None and a note if it cannot run."""
    try:
        build_step(name, Inputs(dataclasses.replace(setup, shape=_TINY))).run()
        return {**peak_of(build_step(name, Inputs(setup))), "note": ""}
    except Unavailable as error:
        return {"extra": None, "gradients": None, "note": f"left out: {error}"}

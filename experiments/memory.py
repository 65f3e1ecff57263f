"""Draws what is in memory when in one training step: `python experiments/memory.py` measures, writes docs/memory.png.

Each contender has a process of its own, whose resident memory a thread reads every millisecond. Linux, half a minute.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from uncork import PLIF, linear_cross_entropy
from uncork.heads import HeadSpec
from uncork.lab.experiments.bench.naive import naive_plif
from uncork.lab.report.style import FONT, INK, MUTED, UNKNOWN, dress, to_png
from uncork.loss.chunk_size import CPU

N, D, V, PIECES, BOUND = 2048, 400, 33278, 1000, 20.0
MIB = 2**20 / 4  # numbers of float32
MATRIX, ROWS = N * V / MIB, CPU.default_rows(V, D)
EAGER, NAIVE, FUSED = "eager softmax", "naive PLIF", "fused PLIF"
COLOURS = {EAGER: HeadSpec("softmax").colour, NAIVE: UNKNOWN, FUSED: HeadSpec("plif").colour}
# What is held: the fraction of the step that it is said of, where it is written (fraction, matrices), and the words.
PEAK, TURN = -1.0, -2.0  # where the memory is largest, and where the forward ends: as measured
NOTES = {
    EAGER: [(0.21, 0.21, 1.55, "scores"), (TURN, 0.22, 2.9, "scores,\nlog-softmax"),
            (PEAK, 0.64, 4.0, "log-softmax,\ntwo gradients"), (0.82, 0.8, 2.1, "gradient, dW, dX")],
    NAIVE: [(0.08, 0.02, 2.4, "scores"), (PEAK, 0.02, 7.1, "scores, index,\ndistances, slopes,\nproducts, logits"),
            (0.92, 0.9, 2.3, "gradient,\ndW, dX")],
    FUSED: [(0.3, 0.47, 2.5, f"{ROWS * V / MIB:.0f} MiB: {ROWS} rows of scores, which\nbecome their own gradient"),
            (0.7, 0.62, 1.4, f"{D * V / MIB:.0f} MiB: dW, {D * N / MIB:.0f} MiB: dX")],
}  # fmt: skip


def loss(name: str, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The mean loss of input (N, D), weight (V, D) and target (N,), as a contender computes it."""
    if name == EAGER:
        return F.cross_entropy(x @ w.T, y)
    if name == FUSED:
        return linear_cross_entropy(x, w, y, logit_function=PLIF(PIECES, bound=BOUND))
    knots = torch.linspace(-BOUND, BOUND, PIECES + 1)[:-1]
    return F.cross_entropy(naive_plif(x @ w.T, torch.ones(PIECES, requires_grad=True), knots, BOUND), y)


def watch(record: list[tuple[float, int]], stop: threading.Event) -> None:
    """Appends (seconds, resident pages) every millisecond."""
    while not stop.wait(0.001):
        record.append((time.perf_counter(), int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])))


def measure(name: str) -> dict[str, list[float]]:
    """One step: fractions of it, MiB above its start, and where its backward begins."""
    x, y = torch.randn(N, D).requires_grad_(), torch.randint(V, (N,))
    w = (torch.randn(V, D) * 3 / D**0.5).requires_grad_()  # scores spread as a trained model's are
    record, stop = list[tuple[float, int]](), threading.Event()
    loss(name, torch.ones(8, 4, requires_grad=True), torch.ones(9, 4), torch.arange(8)).backward()
    ctypes.CDLL(None).malloc_trim(0)
    thread = threading.Thread(target=watch, args=(record, stop))
    thread.start()
    time.sleep(0.05)
    begin = time.perf_counter()
    value, turn = loss(name, x, w, y), time.perf_counter()
    value.backward()
    end = time.perf_counter()
    stop.set()
    thread.join()
    seconds, pages = np.array(record).T
    mib = (pages - pages[seconds < begin][-1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    inside = (seconds >= begin) & (seconds <= end)
    fraction = (seconds[inside] - begin) / (end - begin)
    return {"step": fraction.tolist(), "mib": mib[inside].tolist(), "backward": [(turn - begin) / (end - begin)]}


def draw(axes: Axes, name: str, found: dict[str, list[float]]) -> None:
    """One contender: the area under its memory, what is held, and where its backward begins."""
    step, mib, (turn,), color = found["step"], found["mib"], found["backward"], COLOURS[name]
    axes.fill_between(step, mib, color=color, alpha=0.13, linewidth=0)
    axes.plot(step, mib, color=color, linewidth=1.4)
    axes.set_title(f"{name}: {max(mib):,.0f} MiB", color=color, fontsize=FONT + 1.5, loc="left", pad=8)
    line, size = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 1}, FONT - 1.5
    for place, right, up, words in NOTES[name]:
        at = {PEAK: step[int(np.argmax(mib))], TURN: turn - 0.008}.get(place, place)
        axes.annotate(
            words, (at, float(np.interp(at, step, mib))), (right, up * MATRIX), color=INK, fontsize=size, va="center",
            ha="left" if right < 0.1 else "center", linespacing=1.35, arrowprops=line,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2, "alpha": 0.9},
        )  # fmt: skip
    axes.axvline(turn, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), ymax=0.93)
    axes.text(turn, 8.4 * MATRIX, "backward", color=MUTED, fontsize=size, ha="right" if turn > 0.9 else "center")


def main() -> None:
    """Measures each contender in a fresh process of one thread; draws them side by side."""
    figure = Figure(figsize=(10.2, 3.9))
    for number, name in enumerate(NOTES):
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, __file__, name], env=own, stdout=subprocess.PIPE, check=True)
        axes = figure.add_axes((0.07 + 0.315 * number, 0.13, 0.285, 0.76))
        label = "MiB above the start; a line: one (N, V) matrix" if number == 0 else ""
        dress(axes, xlabel="fraction of the step", ylabel=label)
        axes.set(xlim=(0, 1), ylim=(0, 8.9 * MATRIX), xticks=(0, 0.5, 1), xticklabels=("0", "0.5", "1"))
        axes.set_yticks([m * MATRIX for m in range(9)], [f"{m * MATRIX:,.0f}" if number == 0 else "" for m in range(9)])
        draw(axes, name, json.loads(done.stdout))
    to_png(figure, Path(__file__).resolve().parent.parent / "docs" / "memory.png")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()

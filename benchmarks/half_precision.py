"""What bfloat16 inputs cost on a CPU beside float32 ones: time and memory of the loss's forward and backward.

    python benchmarks/half_precision.py --out results/half-precision

Time: all take turns in every round; medians and quartiles of the ratio to the fused float32 loss of the same round.
Memory, in a process of its own: W, input, their gradients, and what else the step holds at its peak. Where the
processor has instructions for bfloat16, the loss multiplies in it, as the eager softmax does; then the same loss with
scores_dtype=torch.float32 and the eager softmax in bfloat16 stand beside it, which without such instructions would take
many times as long. Leave the machine alone meanwhile.
"""

import argparse
import multiprocessing
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork.lab.experiments.bench.contenders import Step, training_step
from uncork.lab.experiments.bench.memory import peak_of
from uncork.lab.experiments.bench.tables import quantiles, with_quartiles
from uncork.lab.experiments.bench.timing import interleave
from uncork.lab.report.publish import publish
from uncork.lab.run.provenance import provenance
from uncork.loss.call import multiplies_bfloat16

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = (
    (2048, 400, 33278), (1024, 768, 50257), (2048, 64, 33278), (2048, 400, 10000), (512, 16, 10000), (256, 400, 33278),
    (32, 400, 33278),
)  # fmt: skip
BASE = "float32"
CONTENDERS: dict[str, tuple[torch.dtype, Callable[..., Tensor]]] = {
    BASE: (torch.float32, uncork.linear_cross_entropy),
    "bfloat16": (torch.bfloat16, uncork.linear_cross_entropy),
    "eager float32": (torch.float32, lambda x, w, y: F.cross_entropy(F.linear(x, w), y)),
}
if multiplies_bfloat16():
    CONTENDERS |= {
        "bfloat16, float32 scores": (
            torch.bfloat16,
            lambda x, w, y: uncork.linear_cross_entropy(x, w, y, scores_dtype=torch.float32),
        ),
        "eager bfloat16": (torch.bfloat16, lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y)),
    }


def step_of(name: str, shape: Shape) -> Step:
    """A contender's step on random inputs, the same numbers for all of them but for their rounding."""
    (tokens, features, vocab_size), (dtype, loss) = shape, CONTENDERS[name]
    seed = torch.Generator().manual_seed(0)
    y = torch.randint(vocab_size, (tokens,), generator=seed)
    x, w = (
        torch.empty(size, features).normal_(generator=seed).mul_(scale).to(dtype).requires_grad_()
        for size, scale in ((tokens, 1.0), (vocab_size, 2.0 / features**0.5))
    )
    return training_step(lambda: loss(x, w, y), {"x": x, "w": w})


def mebibytes(name: str, shape: Shape, threads: int) -> float:
    """Of a step in a fresh process, its inputs included; the first one, in which libraries set up theirs, is not it."""
    torch.set_num_threads(threads)
    step = step_of(name, shape)
    step.run()
    inputs = sum(leaf.nbytes for leaf in step.leaves.values())
    return (sum(peak_of(step).values()) + inputs) / 2**20


def measure(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """One row a contender."""
    times, _ = interleave({name: step_of(name, shape) for name in CONTENDERS}, rounds)
    rows = []
    for name, own in times.items():
        ratio = quantiles([seconds / times[BASE][turn] for turn, seconds in own.items()])
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            memory = fresh.submit(mebibytes, name, shape, torch.get_num_threads()).result()
        rows.append(
            {
                "contender": name,
                **dict(zip(("tokens", "in_features", "vocab_size"), shape, strict=True)),
                "milliseconds": round(1e3 * quantiles(list(own.values()))["median"], 1),
                **{f"ratio_{key}": round(ratio[key], 3) for key in ("q1", "median", "q3")},
                "mib": round(memory),
            }
        )
    return rows


def by_shape(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a shape: for each contender the ratio of its time with quartiles, and MiB."""
    found = []
    for shape, own in rows.groupby(["tokens", "in_features", "vocab_size"], sort=False):
        cells = {"N, d, V": ", ".join(map(str, shape))}
        for row in own.to_dict("records"):
            ratio = {key: row[f"ratio_{key}"] for key in ("q1", "median", "q3")}
            cells[row["contender"]] = f"{with_quartiles(ratio)}, {row['mib']} MiB"
        found.append(cells)
    return pd.DataFrame(found)


def main() -> None:
    """Measures, prints and writes times.csv, table.csv and their origin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7, help="after one to warm up; at least 2")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {arguments.rounds}")
    rows = pd.DataFrame([row for shape in SHAPES for row in measure(shape, arguments.rounds)])
    print(rows.to_string(index=False))
    command = shlex.join(["python", *sys.argv])
    origin = provenance(command, torch.get_num_threads(), bfloat16_instructions=multiplies_bfloat16())
    publish(arguments.out, {"times": rows, "table": by_shape(rows)}, origin)


if __name__ == "__main__":
    main()

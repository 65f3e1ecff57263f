"""The least time of a training step on a GPU, counted: bytes and operations of impl="triton" over an H100's rates.

    python benchmarks/roofline.py --out results/roofline

One forward and backward of the mean loss in bfloat16, N tokens, D features, V words. Each part takes the longest of its
operations, its bytes and its additions to counters. Times are a range: by the maker's rates, and by those that others
reach (728 TFLOP/s in products of such shapes, three quarters of the memory's rate). Rows a chunk and GiB are what the
code decides and estimates. No GPU has run it.

Not counted: launching; look-ups and exponentials, for which the memory leaves time.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from gpu_contenders import SHAPES, Shape  # type: ignore[import-not-found]

import uncork
from uncork.lab.report.publish import publish
from uncork.lab.run.provenance import provenance
from uncork.loss.gpu.chain import counted_pieces

HALF, SINGLE = 2, 4  # bytes
COUNTER = 8 + 7 * 16 + 2 * 8  # of a row's counter: zeroed; by `Chain.counted` seven times read and written, then summed
PIECES = (100, 1_000, 100_000)


class Rates(NamedTuple):
    """A second: operations of products, bytes, and 64-bit atomic additions to counters in memory (not measured)."""

    products: float
    memory: float
    counters: float


RATES = {"maker's": Rates(989e12, 3.35e12, 1.2e11), "reached": Rates(728e12, 2.5e12, 3.6e10)}


class Part(NamedTuple):
    """What a part of a step reads, writes and computes."""

    name: str
    operations: float
    bytes: float
    counters: float = 0.0

    def seconds(self, rates: Rates) -> float:
        return max(self.operations / rates.products, self.bytes / rates.memory, self.counters / rates.counters)


def parts(shape: Shape, rows: int, pieces: int, score: int = SINGLE) -> list[Part]:
    """The parts of a step in the order of a chunk; the sums over the chunks.

    pieces: of a learned PLIF, or 0. score: bytes of one, HALF by `scores_dtype=torch.bfloat16`.
    """
    n, d, v = shape
    chunks, product = math.ceil(n / rows), 2.0 * n * d * v
    scores, weight, inputs = n * v, v * d, n * d
    counters = counted_pieces(pieces, torch.bfloat16, v)
    additions = scores * (0 if not pieces else 1 if counters else 2)
    return [
        Part("scores", product, chunks * weight * HALF + inputs * HALF + scores * score),
        Part("statistics", 0, scores * score),
        Part("gradient", 0, scores * (score + HALF), additions),
        Part("counters", 0, n * counters * COUNTER),
        Part("to the input", product, chunks * weight * HALF + scores * HALF + inputs * SINGLE),
        Part("to the weight", product, scores * HALF + inputs * HALF + (2 * chunks - 1) * weight * SINGLE),
        Part("cast in the end", 0, (weight + inputs) * (SINGLE + HALF)),
    ]


def main() -> None:
    """Counts, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found, table = [], []
    for shape in SHAPES:
        told = uncork.estimate_memory(*shape, dtype=torch.bfloat16, device="cuda", impl="triton")
        for pieces in (0, *PIECES):
            own = parts(shape, told.rows, pieces)
            for part in own:
                times = {f"ms, {name}": 1e3 * part.seconds(rates) for name, rates in RATES.items()}
                found.append({"shape": str(shape), "pieces": pieces, "rows": told.rows, **part._asdict(), **times})
        milliseconds = {
            (pieces, name): 1e3 * sum(part.seconds(rates) for part in parts(shape, told.rows, pieces))
            for pieces in (0, *PIECES)
            for name, rates in RATES.items()
        }
        narrow = {
            name: 1e3 * sum(part.seconds(rates) for part in parts(shape, told.rows, 0, HALF))
            for name, rates in RATES.items()
        }
        products = {name: 3e3 * 2 * math.prod(shape) / rates.products for name, rates in RATES.items()}

        def range_of(times: dict[str, float]) -> str:
            return " to ".join(f"{times[name]:.3g}" for name in RATES)

        table.append(
            {
                "tokens, features, words": str(shape),
                "rows": told.rows,
                "products alone, ms": range_of(products),
                "fixed functions, ms": range_of({name: milliseconds[0, name] for name in RATES}),
                "bfloat16 scores, ms": range_of(narrow),
                **{
                    f"PLIF of {pieces:,}, ms": range_of({name: milliseconds[pieces, name] for name in RATES})
                    for pieces in PIECES
                },
                "GiB": f"{told.total / 2**30:.2f}",
            }
        )
    frame = pd.DataFrame(table)
    print(frame.to_string(index=False))
    origin = provenance(shlex.join(["python", *sys.argv]), 1)
    publish(arguments.out, {"parts": pd.DataFrame(found), "table": frame}, origin, float_format="%.6g")


if __name__ == "__main__":
    main()

"""What a training step of each head costs, against a plain softmax as people write it: time of forward + backward.

    python benchmarks/heads.py --out results/bench-heads

One process, all heads interleaved in every round, so that drift meets all of them alike; medians and quartiles of the
ratio to F.cross_entropy(F.linear(...)) of the same round. Leave the machine alone while it runs.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork.lab.run_result import machine_name

SHAPES = ((1536, 16, 10000), (1536, 400, 10000))


def eager(head: uncork.Head, h: Tensor, y: Tensor) -> Tensor:
    """The plain softmax with its (N, V) logits."""
    return F.cross_entropy(F.linear(h, head.weight, head.bias), y)


def seconds(step: Callable[[], Tensor]) -> float:
    """One forward and backward."""
    start = time.perf_counter()
    step().backward()
    return time.perf_counter() - start


def measure(tokens: int, features: int, vocab_size: int, rounds: int) -> list[dict[str, object]]:
    """One row a head, for one shape."""
    torch.manual_seed(0)
    h = torch.randn(tokens, features, requires_grad=True)
    y = torch.randint(vocab_size, (tokens,))
    heads = {name: uncork.build_head(name, features, vocab_size) for name in uncork.HEAD_NAMES}
    steps: dict[str, Callable[[], Tensor]] = {"eager softmax": lambda: eager(heads["softmax"], h, y)}
    steps |= {name: lambda head=head: head.loss(h, y) for name, head in heads.items()}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own[1:], times["eager softmax"][1:], strict=True)]  # the first round warms up
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "head": name,
                "tokens": tokens,
                "in_features": features,
                "vocab_size": vocab_size,
                "milliseconds": round(1e3 * statistics.median(own[1:]), 1),
                "ratio": round(middle, 2),
                "ratio_q1": round(low, 2),
                "ratio_q3": round(high, 2),
            }
        )
    return rows


def by_head(times: pd.DataFrame) -> pd.DataFrame:
    """One row a head: the ratio to the eager softmax with its quartiles, for each shape."""
    text = [f"{r.ratio:.2f} ({r.ratio_q1:.2f} to {r.ratio_q3:.2f})" for r in times.itertuples()]
    shape = [f"N = {r.tokens}, d = {r.in_features}, V = {r.vocab_size}" for r in times.itertuples()]
    wide = times.assign(text=text, shape=shape).pivot(index="head", columns="shape", values="text")
    columns = list(dict.fromkeys(shape))
    return wide.loc[list(dict.fromkeys(times["head"])), columns].reset_index()


def main() -> None:
    """Measures, prints and writes times.csv, table.csv and their origin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9, help="at least 3; the first warms up")
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error(f"--rounds: expected at least 3, got {arguments.rounds}")
    times = pd.DataFrame([row for shape in SHAPES for row in measure(*shape, arguments.rounds)])
    print(times.to_string(index=False))
    arguments.out.mkdir(parents=True, exist_ok=True)
    times.to_csv(arguments.out / "times.csv", index=False)
    by_head(times).to_csv(arguments.out / "table.csv", index=False)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    origin = {
        "command": f"python benchmarks/heads.py --rounds {arguments.rounds} --out {arguments.out}",
        "commit": commit,
        "machine": machine_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "uncork": uncork.__version__, "python": platform.python_version()},
    }
    (arguments.out / "provenance.json").write_text(json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a training step of each head costs, against a plain softmax as people write it: time of forward + backward.

    python benchmarks/heads.py --out results/bench-heads

One process, all heads interleaved in every round, so that drift meets all of them alike; medians and quartiles of the
ratio to F.cross_entropy(F.linear(...)) of the same round. Leave the machine alone while it runs.
"""

import argparse
import shlex
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork.lab.experiments.bench.contenders import Step, training_step
from uncork.lab.experiments.bench.tables import quantiles, with_quartiles
from uncork.lab.experiments.bench.timing import interleave
from uncork.lab.report.publish import publish
from uncork.lab.run.provenance import provenance

SHAPES = ((1536, 16, 10000), (1536, 400, 10000))
EAGER = "eager softmax"


def eager(head: uncork.Head, h: Tensor, y: Tensor) -> Tensor:
    """The plain softmax with its (N, V) logits."""
    return F.cross_entropy(F.linear(h, head.weight, head.bias), y)


def head_step(head: uncork.Head, h: Tensor, y: Tensor) -> Step:
    """The head's own loss."""
    return training_step(lambda: head.loss(h, y), {"h": h, **dict(head.named_parameters())})


def measure(tokens: int, features: int, vocab_size: int, rounds: int) -> list[dict[str, object]]:
    """One row a head, for one shape."""
    torch.manual_seed(0)
    h = torch.randn(tokens, features, requires_grad=True)
    y = torch.randint(vocab_size, (tokens,))
    heads = {name: uncork.build_head(name, features, vocab_size) for name in uncork.HEAD_NAMES}
    plain = heads["softmax"]
    steps = {EAGER: training_step(lambda: eager(plain, h, y), {"h": h, **dict(plain.named_parameters())})}
    steps |= {name: head_step(head, h, y) for name, head in heads.items()}
    times, _ = interleave(steps, rounds)
    rows = []
    for name, own in times.items():
        ratio = quantiles([seconds / times[EAGER][turn] for turn, seconds in own.items()])
        rows.append(
            {
                "head": name,
                "tokens": tokens,
                "in_features": features,
                "vocab_size": vocab_size,
                "milliseconds": round(1e3 * quantiles(list(own.values()))["median"], 1),
                "ratio": round(ratio["median"], 2),
                "ratio_q1": round(ratio["q1"], 2),
                "ratio_q3": round(ratio["q3"], 2),
            }
        )
    return rows


def by_head(times: pd.DataFrame) -> pd.DataFrame:
    """One row a head: the ratio to the eager softmax with its quartiles, for each shape."""
    records = times.to_dict("records")
    text = [with_quartiles({"median": r["ratio"], "q1": r["ratio_q1"], "q3": r["ratio_q3"]}) for r in records]
    shape = [f"N = {r['tokens']}, d = {r['in_features']}, V = {r['vocab_size']}" for r in records]
    wide = times.assign(text=text, shape=shape).pivot(index="head", columns="shape", values="text")
    columns = list(dict.fromkeys(shape))
    return wide.loc[list(dict.fromkeys(times["head"])), columns].reset_index()


def main() -> None:
    """Measures, prints and writes times.csv, table.csv and their origin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8, help="after one to warm up; at least 2")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {arguments.rounds}")
    times = pd.DataFrame([row for shape in SHAPES for row in measure(*shape, arguments.rounds)])
    print(times.to_string(index=False))
    origin = provenance(shlex.join(["python", *sys.argv]), torch.get_num_threads())
    publish(arguments.out, {"times": times, "table": by_head(times)}, origin)


if __name__ == "__main__":
    main()

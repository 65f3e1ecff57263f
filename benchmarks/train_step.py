"""What PLIF costs in a whole training step: body, output layer and optimiser, over the same step with a plain softmax.

    python benchmarks/train_step.py --out results/bench-train

The models, optimisers and clipping of `uncork train` at its presets, on random tokens; the heads take turns in one
process, in another order every round. Batches of the big presets are cut, so that a step takes seconds on a CPU; the
table says to what. Writes trainstep.csv, table.csv (for docs/performance.md) and provenance.json.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

import uncork
from uncork.lab.experiments.bench.contenders import Step
from uncork.lab.experiments.bench.tables import quantiles, with_quartiles
from uncork.lab.experiments.bench.timing import interleave
from uncork.lab.machine import cores
from uncork.lab.models import build_model
from uncork.lab.report.publish import publish
from uncork.lab.run.provenance import provenance
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.head import parse_head
from uncork.lab.train.optimisation import build_optimizer, clip_gradients


class Case(NamedTuple):
    """A preset, a vocabulary, parallel streams (None: the preset's), how much more PLIF's step may take, and d."""

    preset: str
    vocab_size: int
    batch_size: int | None
    limit: float
    in_features: int | None = None


# The published vocabularies of Penn Treebank and WikiText-2; the laptop presets at that of the default corpus, sotu.
CASES = (
    Case("awd-lstm-ptb", 10000, None, 1.05),
    Case("awd-lstm-wt2", 33278, 20, 1.05),
    Case("transformer-gpu", 33278, 8, 1.05),
    Case("lstm-laptop", 17928, None, 1.35),
    Case("transformer-laptop", 17928, None, 1.35),
)
HEADS = ("softmax", "plif", "plif:num_pieces=1000")
BASE = "softmax"


def build_step(
    case: Case, head: str, *, tokens_a_stream: int | None = None, impl: str | None = None
) -> tuple[Step, int]:
    """A training step as `uncork train` makes it, and the tokens of its batch; impl: of the loss."""
    given = {} if case.in_features is None else {"in_features": case.in_features}
    config = TrainConfig.of(case.preset, **given)
    name, options, _ = parse_head(head)
    torch.manual_seed(0)
    model = build_model(
        config.model, uncork.build_head(name, config.in_features, case.vocab_size, **options), case.vocab_size
    )
    optimizer = build_optimizer(model, config)
    size = (case.batch_size or config.batch_size, tokens_a_stream or config.bptt)
    tokens, target = (torch.randint(case.vocab_size, size) for _ in range(2))
    model.train()
    head_loss: Any = model.head.loss

    def run() -> torch.Tensor:
        output = model.backbone(tokens, ())
        loss: torch.Tensor = head_loss(output.features, target, impl=impl) + output.penalty
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(optimizer, config.clip, config.clip)
        optimizer.step()
        return loss.detach()

    return Step(run), tokens.numel()


def measure(
    case: Case, heads: tuple[str, ...], rounds: int, *, tokens_a_stream: int | None = None
) -> list[dict[str, Any]]:
    """One row a head: milliseconds and the ratio to the softmax of the same round, with all quantiles."""
    built = {head: build_step(case, head, tokens_a_stream=tokens_a_stream) for head in heads}
    times, _ = interleave({head: step for head, (step, _) in built.items()}, rounds)
    preset = TrainConfig.of(case.preset)
    rows = []
    for head, own in times.items():
        ratio = quantiles([seconds / times[BASE][turn] for turn, seconds in own.items()])
        rows.append(
            {
                "preset": case.preset,
                "in_features": preset.in_features,
                "vocab_size": case.vocab_size,
                "tokens": built[head][1],
                "streams": case.batch_size or preset.batch_size,
                "streams_of_preset": preset.batch_size,
                "head": head,
                "milliseconds": round(1e3 * quantiles(list(own.values()))["median"], 1),
                **{f"ratio_{name}": round(value, 3) for name, value in ratio.items()},
                "rounds": rounds,
                "at_most": case.limit,
            }
        )
    return rows


def display_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a preset, one column a head: the ratio with its quartiles."""
    lines = []
    for preset, own in rows.groupby("preset", sort=False):
        first, *_ = records = own.to_dict("records")
        cut = "" if first["streams"] == first["streams_of_preset"] else f" ({first['streams']} of its streams)"
        line = {
            "preset": f"{preset}{cut}",
            "N, d, V": f"{first['tokens']}, {first['in_features']}, {first['vocab_size']}",
            f"{BASE}, ms": f"{first['milliseconds']:.0f}",
        }
        for row in records[1:]:
            numbers = {name: row[f"ratio_{name}"] for name in ("q1", "median", "q3")}
            line[f"{row['head']} / {BASE}"] = with_quartiles(numbers, 3)
        lines.append({**line, "at most": f"{first['at_most']:.2f}"})
    return pd.DataFrame(lines)


def in_fresh_process(script: str, task: str) -> int:
    """The last number that the script prints when it is given the task as --peak."""
    done = subprocess.run([sys.executable, script, "--peak", task], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def write(arguments: argparse.Namespace, name: str, rows: pd.DataFrame, table: pd.DataFrame) -> None:
    """Prints the table, and writes it and the rows with their origin."""
    print(table.to_string(index=False))
    origin = provenance(shlex.join(["python", *sys.argv]), arguments.threads, rounds=arguments.rounds)
    publish(arguments.out, {name: rows, "table": table}, origin)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7, help="after one to warm up")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--presets", nargs="+", choices=[c.preset for c in CASES], default=[c.preset for c in CASES])
    parser.add_argument("--quick", action="store_true", help="batches of 4 tokens a stream, two rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for case in CASES:
        if case.preset in arguments.presets:
            rounds, cut = (2, 4) if arguments.quick else (arguments.rounds, None)
            rows += measure(case, HEADS, rounds, tokens_a_stream=cut)
            print(f"{case.preset}: {rows[-1]['ratio_median']:.3f} x", flush=True)
    steps = pd.DataFrame(rows)
    write(arguments, "trainstep", steps, display_table(steps))


if __name__ == "__main__":
    main()

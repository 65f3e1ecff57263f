"""What an epoch of a language model costs with each output layer: seconds, and peak memory.

    python benchmarks/epoch_cost.py --out results/lm/cost
    python benchmarks/epoch_cost.py --models study --threads 1 --out results/lm/cost-study

AWD-LSTM at the published sizes of Penn Treebank and WikiText-2, or the language-model study's own LSTM; random tokens,
whole training steps that take turns in one process; an epoch is the text's number of training tokens at that speed.
"eager" keeps the (N, V) logits, as the published implementations do. Memory is what a fresh process that makes two
steps holds at most, above what it held before it built the model. Writes cost.csv, table.csv and provenance.json, anew
after each model.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from train_step import Case, build_step, in_fresh_process, write  # type: ignore[import-not-found]

from uncork.lab.experiments.bench.tables import quantiles, with_quartiles
from uncork.lab.experiments.bench.timing import interleave
from uncork.lab.machine import cores, resident

_STUDIED = {("ptb", d): Case("lstm-small", 10_000, None, 0.0, d) for d in (16, 64)} | {
    ("sotu", d): Case("lstm-small", 5_000, None, 0.0, d) for d in (16, 64)
}
# Batches of WikiText-2's model are cut to 10 of its 80 streams: the eager mixture of 15 keeps 0.8 GiB for each of them.
MODELS = {
    "published": {"ptb": Case("awd-lstm-ptb", 10_000, None, 0.0), "wt2": Case("awd-lstm-wt2", 33_278, 10, 0.0)},
    "study": {f"{corpus} d={d}": case for (corpus, d), case in _STUDIED.items()},
}
CASES = MODELS["published"] | MODELS["study"]
EPOCH_TOKENS = {"ptb": 929_589, "wt2": 2_088_628, "sotu": 1_000_000}
HEADS = (
    "softmax", "temperature", "softcap", "sigsoftmax", "gss", "monotone", "plif", "plif:num_pieces=100000",
    "plif-frozen", "mos", "mos:num_components=15",
)  # fmt: skip
EAGER = ("softmax", "sigsoftmax", "plif:num_pieces=100000", "mos:num_components=15")
CONTENDERS = {**{head: (head, None) for head in HEADS}, **{f"{head}, eager": (head, "reference") for head in EAGER}}


def measure(place: str, names: list[str], rounds: int, tokens_a_stream: int | None) -> list[dict[str, Any]]:
    """One row a contender: milliseconds a step, seconds an epoch, the ratio to softmax of the same round, MiB."""
    built = {
        name: build_step(CASES[place], head, impl=impl, tokens_a_stream=tokens_a_stream)
        for name, (head, impl) in CONTENDERS.items()
        if name in names
    }
    times, _ = interleave({name: step for name, (step, _) in built.items()}, rounds)
    rows = []
    for name, own in times.items():
        median = quantiles(list(own.values()))["median"]
        ratio = quantiles([seconds / times["softmax"][turn] for turn, seconds in own.items()])
        rows.append(
            {
                "place": place,
                "head": name,
                "tokens": built[name][1],
                "milliseconds": round(1e3 * median, 1),
                "seconds_per_epoch": round(median * EPOCH_TOKENS[place.split()[0]] / built[name][1], 1),
                **{f"ratio_{key}": round(value, 3) for key, value in ratio.items()},
                "peak_mib": _peak_mib(place, name, tokens_a_stream),
                "rounds": rounds,
            }
        )
    return rows


def _peak_mib(place: str, name: str, tokens_a_stream: int | None) -> int:
    """Of a fresh process that makes two steps, above what its imports take."""
    task = json.dumps([place, name, tokens_a_stream, torch.get_num_threads()])
    return in_fresh_process(__file__, task)


def print_peak(task: str) -> None:
    """The part of the fresh process."""
    place, name, tokens_a_stream, threads = json.loads(task)
    torch.set_num_threads(threads)
    head, impl = CONTENDERS[name]
    before = resident("VmHWM")
    step, _ = build_step(CASES[place], head, impl=impl, tokens_a_stream=tokens_a_stream)
    for _ in range(2):
        step.run()
    print(round((resident("VmHWM") - before) / 2**20))


def display_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a contender; for each place seconds an epoch, the ratio to softmax with its quartiles, and MiB."""
    table = pd.DataFrame({"head": list(dict.fromkeys(rows["head"]))})
    for place, own in rows.groupby("place", sort=False):
        by_head = {row["head"]: row for row in own.to_dict("records")}
        columns: dict[str, Any] = {"s / epoch": "seconds_per_epoch", "over softmax": None, "peak MiB": "peak_mib"}
        for title, key in columns.items():
            table[f"{place}: {title}"] = [
                f"{by_head[head][key]:,.0f}"
                if key
                else with_quartiles({name: by_head[head][f"ratio_{name}"] for name in ("q1", "median", "q3")}, 2)
                for head in table["head"]
            ]
    return table


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/lm/cost"))
    parser.add_argument("--models", choices=list(MODELS), default="published")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--heads", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="4 tokens a stream, two rounds")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(arguments.peak)
    torch.set_num_threads(arguments.threads)
    names = list(dict.fromkeys(["softmax", *arguments.heads]))
    rows = []
    for place in MODELS[arguments.models]:
        rounds, cut = (2, 4) if arguments.quick else (arguments.rounds, None)
        rows += measure(place, names, rounds, cut)
        costs = pd.DataFrame(rows)
        write(arguments, "cost", costs, display_table(costs))


if __name__ == "__main__":
    main()

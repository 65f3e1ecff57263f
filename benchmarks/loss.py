"""What the fused loss costs, and whether it meets its bars: the published set of `uncork bench`.

    python benchmarks/loss.py --out results/bench

Writes table.csv (for docs/performance.md), brief.csv (for README.md), times.csv, memory.csv,
instructions.csv, bars.csv and provenance.json. It takes 25 minutes on 2 cores; leave the machine alone meanwhile.
--quick tries everything at a small shape in minutes.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from uncork.lab.experiments.bench.run import Plan, run
from uncork.lab.experiments.bench.settings import CONTENDERS, Bench, Shape
from uncork.lab.experiments.bench.tables import SHAPE_COLUMNS, display_table, shape_columns

LARGE, WIDE, MEDIUM, NARROW = (
    Shape(1024, 768, 50257), Shape(2048, 400, 33278), Shape(2048, 400, 10000), Shape(2048, 64, 33278),
)  # fmt: skip
MANY_TOKENS, MANY_COMPONENTS = Shape(16384, 400, 33278), Shape(512, 280, 10000)

# PLIF of 1,000 pieces, at most so many times G and so many times the eager softmax.
PLIF_BARS = {LARGE: (1.20, 0.85), WIDE: (1.20, 0.85), MEDIUM: (1.25, 0.95), NARROW: (1.60, 0.5)}
NOISE = 1.15  # ratios nearer to 1 than this are noise on the machine that the bars were set on

CORE = (
    "G", "G-forward", "eager", "torch-auto", "torch-best", "naive-plif", "softmax", "softmax-forward", "softcap",
    "sigsoftmax", "plif-1000", "plif-1000-forward", "plif-100000", "mos-4",
)  # fmt: skip
# The slowest contenders are left to the smaller shapes, so that the whole takes minutes.
NOT_AT_WIDE = ("naive-sigsoftmax", "naive-mos-4", "monotone")
TIMES = {
    LARGE: CORE,
    WIDE: tuple(name for name in CONTENDERS if name not in NOT_AT_WIDE),
    MEDIUM: CONTENDERS,
    NARROW: tuple(name for name in CONTENDERS if name != "naive-mos-4"),
    MANY_COMPONENTS: ("G", "eager", "softmax", "naive-mos-15", "mos-15"),
}
MEMORY = {
    WIDE: tuple(name for name in CONTENDERS if name not in ("G", "G-forward")),
    MANY_TOKENS: ("softmax", "plif-1000", "plif-100000"),
    MANY_COMPONENTS: ("eager", "softmax", "naive-mos-15", "mos-15"),
}
SMALL = Shape(256, 32, 4000)


class Measured:
    """The medians of a benchmark, by contender and shape; None where something was not measured."""

    def __init__(self, tables: dict[str, pd.DataFrame]) -> None:
        self.times: dict[Any, Any] = {
            (row["contender"], row["quantity"], *(row[c] for c in SHAPE_COLUMNS)): row["median"]
            for row in tables["times"].dropna(subset="median").to_dict("records")
        }
        self.memory: dict[Any, Any] = {
            (row["contender"], *(row[c] for c in SHAPE_COLUMNS)): row["extra_mib"]
            for row in tables["memory"].dropna(subset="extra_mib").to_dict("records")
        }

    def time(self, name: str, shape: Shape, base: str) -> float | None:
        """Median time of a contender over that of another."""
        if base in ("G", "eager"):
            return self.times.get((name, f"ratio to {base}", *shape_columns(shape).values()))
        return _ratio(self.time(name, shape, "G"), self.time(base, shape, "G"))

    def extra(self, name: str, shape: Shape, base: str, base_shape: Shape | None = None) -> float | None:
        """Peak extra memory of a contender over that of another."""
        under = self.memory.get((base, *shape_columns(base_shape or shape).values()))
        return _ratio(self.memory.get((name, *shape_columns(shape).values())), under)


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def bars(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Each bar, what was measured, and whether it is met."""
    measured, rows = Measured(tables), list[tuple[str, Shape, float | None, float]]()
    for shape, (of_products, of_eager) in PLIF_BARS.items():
        rows.append(("time: plif-1000 / G", shape, measured.time("plif-1000", shape, "G"), of_products))
        rows.append(("time: plif-1000 / eager", shape, measured.time("plif-1000", shape, "eager"), of_eager))
    for shape in (LARGE, WIDE, MEDIUM):
        for name in ("softmax", "softcap", "sigsoftmax"):
            rows.append((f"time: {name} / torch-best", shape, measured.time(name, shape, "torch-best"), NOISE))
        for pieces, limit in ((16, 1.15), (100, 1.15), (10000, 1.15), (100000, 1.30)):
            name = f"plif-{pieces}"
            rows.append((f"time: {name} / plif-1000", shape, measured.time(name, shape, "plif-1000"), limit))
    for shape in PLIF_BARS:
        rows.append(("time: mos-4 / softmax", shape, measured.time("mos-4", shape, "softmax"), 4.8))
        for name in ("softmax-forward", "plif-1000-forward"):
            rows.append((f"time: {name} / G-forward", shape, measured.time(name, shape, "G-forward"), 1.3))
    for name in ("softmax", "plif-1000", "plif-100000"):
        rows.append((f"memory: {name} / eager", WIDE, measured.extra(name, WIDE, "eager"), 1 / 8))
        grown = measured.extra(name, MANY_TOKENS, name, WIDE)
        rows.append((f"memory: {name} / the same at N = {WIDE.tokens}", MANY_TOKENS, grown, 1.05))
    rows.append(("memory: mos-4 / softmax", WIDE, measured.extra("mos-4", WIDE, "softmax"), 2.0))
    many = measured.extra("mos-15", MANY_COMPONENTS, "naive-mos-15")
    rows.append(("memory: mos-15 / naive-mos-15", MANY_COMPONENTS, many, 0.1))
    return pd.DataFrame(
        {"bar": bar, **shape_columns(shape), "measured": round(value, 3), "at_most": limit, "met": value <= limit}
        for bar, shape, value, limit in rows
        if value is not None
    )


IN_TABLE = (
    "eager", "compile", "torch-best", "naive-plif", "naive-mos-4", "softmax", "softcap", "sigsoftmax", "plif-frozen",
    "plif-1000", "plif-100000", "mos-4",
)  # fmt: skip


def short_table(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Some contenders at the shapes of PLIF's bars, with the memory at one of them; all are in the other files."""
    at = {
        name: [Shape(*key) for key in tables[name][SHAPE_COLUMNS].to_numpy().tolist()] for name in ("times", "memory")
    }
    times = tables["times"][[shape in PLIF_BARS for shape in at["times"]]]
    table = display_table(times, tables["memory"][[shape == WIDE for shape in at["memory"]]]).set_index("contender")
    return table.loc[[name for name in IN_TABLE if name in table.index]].reset_index()


BRIEF = {
    "eager": "softmax, F.cross_entropy(x @ w.T, y)",
    "compile": "softmax, the same under torch.compile",
    "torch-auto": "softmax, F.linear_cross_entropy as it is",
    "torch-best": "softmax, F.linear_cross_entropy at its best chunk size",
    "softmax": "softmax, uncork",
    "softcap": "softcap, uncork",
    "naive-plif": "PLIF of 1,000 pieces, plain torch",
    "plif-1000": "PLIF of 1,000 pieces, uncork",
    "naive-mos-4": "mixture of four softmaxes, plain torch",
    "mos-4": "mixture of four softmaxes, uncork",
}


def brief_table(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Times over eager's and memory of what people would use instead, beside ours, as README shows them."""
    measured = Measured(tables)

    def cells(name: str) -> dict[str, str]:
        times = {f"time at {shape}": measured.time(name, shape, "eager") for shape in PLIF_BARS}
        mib = measured.memory.get((name, *shape_columns(WIDE).values()))
        return {column: "–" if value is None else f"{value:.2f}" for column, value in times.items()} | {
            f"MiB at {WIDE}": "–" if mib is None else f"{mib:.0f}"
        }

    return pd.DataFrame([{"loss": title, **cells(name)} for name, title in BRIEF.items()])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="a process, after one to warm up")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, help="None: all cores")
    parser.add_argument("--impl", help="of ours; None: the best that serves a call")
    parser.add_argument("--quick", action="store_true", help="one small shape, once")
    arguments = parser.parse_args()
    settings = Bench(
        rounds=arguments.rounds, processes=arguments.processes, threads=arguments.threads, impl=arguments.impl,
        instructions=True, out_dir=arguments.out,
    )  # fmt: skip
    plan = Plan(TIMES, MEMORY)
    if arguments.quick:
        settings = dataclasses.replace(settings, rounds=2, processes=1)
        plan = Plan({SMALL: CONTENDERS}, {SMALL: MEMORY[WIDE]})
    tables = run(settings, plan, shlex.join(["python", *sys.argv]))
    if not arguments.quick:
        tables["table"] = short_table(tables)
        tables["table"].to_csv(arguments.out / "table.csv", index=False)
        brief_table(tables).to_csv(arguments.out / "brief.csv", index=False)
    print(tables["table"].to_string(index=False))
    found = bars(tables)
    if len(found):
        found.to_csv(arguments.out / "bars.csv", index=False)
        print(found.to_string(index=False))
        print(f"{found['met'].sum()} of {len(found)} bars are met")


if __name__ == "__main__":
    main()

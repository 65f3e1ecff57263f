"""Measured seconds and bytes as tables: quantiles of times and of their ratios, one row a contender."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from uncork.lab.experiments.bench.settings import EAGER, PRODUCTS, Shape

SHAPE_COLUMNS = ["tokens", "in_features", "vocab_size"]
QUANTITIES = {PRODUCTS: "ratio to G", EAGER: "ratio to eager"}


def shape_columns(shape: Shape) -> dict[str, int]:
    """The shape as columns of a table."""
    return {"tokens": shape.tokens, "in_features": shape.in_features, "vocab_size": shape.vocab_size}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Least, first quartile, median, third quartile and largest.

    >>> quantiles([3.0, 1.0, 2.0])
    {'min': 1.0, 'q1': 1.5, 'median': 2.0, 'q3': 2.5, 'max': 3.0}
    """
    found = np.quantile(np.asarray(values, dtype=float), [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(("min", "q1", "median", "q3", "max"), map(float, found), strict=True))


def time_rows(shape: Shape, outcomes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of times.csv for one shape, in long form: milliseconds and the ratios, with all quantiles.

    Args:
        outcomes: one a process, as `timing.time_contenders` returns them: times {label: {round: seconds}} and notes.

    process_low and process_high are the least and the largest of the processes' medians.
    """
    rows = []
    for label in dict.fromkeys(label for o in outcomes for label in [*o["times"], *o["notes"]]):
        notes = sorted({o["notes"][label] for o in outcomes if label in o["notes"]})
        per_process = [_quantities(label, o["times"]) for o in outcomes]
        for quantity in ("milliseconds", *QUANTITIES.values()):
            groups = [p[quantity] for p in per_process if p[quantity]]
            pooled = [value for group in groups for value in group]
            row: dict[str, Any] = {"contender": label, **shape_columns(shape), "quantity": quantity}
            if pooled:
                medians = [float(np.median(group)) for group in groups]
                row |= {k: round(v, 4) for k, v in quantiles(pooled).items()}
                row |= {"process_low": round(min(medians), 4), "process_high": round(max(medians), 4)}
            rows.append({**row, "processes": len(groups), "samples": len(pooled), "note": "; ".join(notes)})
    return rows


def _quantities(label: str, times: dict[str, dict[Any, float]]) -> dict[str, list[float]]:
    own = times.get(label, {})
    found = {"milliseconds": [1e3 * value for value in own.values()]}
    for base, name in QUANTITIES.items():
        found[name] = [value / times[base][turn] for turn, value in own.items() if turn in times.get(base, {})]
    return found


def with_quartiles(row: Any, digits: int = 2) -> str:
    """A median and its quartiles as a person reads them.

    >>> with_quartiles({"q1": 1.15, "median": 1.18, "q3": 1.2241})
    '1.18 (1.15 to 1.22)'
    """
    return f"{row['median']:.{digits}f} ({row['q1']:.{digits}f} to {row['q3']:.{digits}f})"


def display_table(times: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """One row a contender; for each shape the two ratios with their quartiles, then the peak extra memory in MiB."""
    columns: dict[str, dict[str, str]] = {}
    order = list(dict.fromkeys([*times["contender"], *memory["contender"]]))
    for shape, rows in times.groupby(SHAPE_COLUMNS, sort=False):
        cells = columns.setdefault(f"{_short(shape)}: time", {})
        for label, own in rows.groupby("contender", sort=False):
            by = {row["quantity"]: row for row in own.to_dict("records")}
            parts = [f"{with_quartiles(by[q])} {base}" for base, q in QUANTITIES.items() if by[q]["samples"]]
            cells[str(label)] = ", ".join(parts) or "left out"
    for shape, rows in memory.groupby(SHAPE_COLUMNS, sort=False):
        cells = columns.setdefault(f"{_short(shape)}: extra memory, MiB", {})
        for row in rows.to_dict("records"):
            cells[str(row["contender"])] = "left out" if row["note"] else f"{row['extra_mib']:.0f}"
    table = pd.DataFrame(columns, index=order).fillna("–")
    return table.rename_axis("contender").reset_index()


def narrow_table(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One line a contender and shape: milliseconds, both ratios, memory. It fits a terminal as the wide table does not.

    Args:
        tables: "times" and "memory", as `run.run` returns them.
    """
    lines = []
    extra = {
        (r["contender"], *(r[c] for c in SHAPE_COLUMNS)): r["extra_mib"] for r in tables["memory"].to_dict("records")
    }
    for key, rows in tables["times"].groupby([*SHAPE_COLUMNS, "contender"], sort=False):
        by: dict[str, Any] = {row["quantity"]: row for row in rows.to_dict("records")}
        shape, label = key[:3], key[3]
        line = {"contender": label, "N, D, V": _short(shape), "ms": f"{by['milliseconds']['median']:.1f}"}
        line |= {name: with_quartiles(by[name]) if by[name]["samples"] else "–" for name in QUANTITIES.values()}
        line["extra MiB"] = f"{extra.get((label, *shape), float('nan')):.0f}"
        lines.append({**line, "note": by["milliseconds"]["note"]})
    return pd.DataFrame(lines).replace("nan", "–")


def median_ratios(times: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The median ratio to G by shape and contender."""
    found: dict[str, dict[str, float]] = {}
    for row in times[times["quantity"] == QUANTITIES[PRODUCTS]].dropna(subset="median").to_dict("records"):
        found.setdefault(_short(row[c] for c in SHAPE_COLUMNS), {})[str(row["contender"])] = row["median"]
    return found


def _short(shape: Any) -> str:
    return str(Shape(*map(int, shape)))


def memory_frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The table memory.csv of these rows, of which there may be none."""
    return pd.DataFrame(rows, columns=["contender", *SHAPE_COLUMNS, "extra_mib", "gradients_mib", "note"])

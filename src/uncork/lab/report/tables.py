"""Runs as tables: one row a run, one row an output layer with its comparison with the softmax; and tables as text.

`±` is everywhere the sample standard deviation over seeds. Runs of one head with different settings are rows of their
own: only the seed is averaged over.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from uncork.heads import HEAD_NAMES
from uncork.lab.errors import LabError
from uncork.lab.report.records import Record
from uncork.lab.report.statistics import baseline, holm, paired

__all__ = [
    "DEVIATION",
    "NO_NUMBER",
    "SPARE",
    "by_seed",
    "display",
    "heads_of",
    "markdown",
    "misleading_rank",
    "number",
    "perplexity",
    "plus_minus",
    "probability",
    "rank_text",
    "run_row",
    "runs_table",
    "summarise",
    "terminal_table",
]

NO_NUMBER = "–"
DEVIATION = "± is the standard deviation over seeds"
SPARE = (
    "of the head", "parameters", "bits per byte", "peak MiB", "energy beyond linear", "valid perplexity", "rank",
    "ε-rank", "tokens/s",
)  # fmt: skip
"""Columns of `display` that a narrow terminal leaves out, in this order."""
_GAP = 3  # letters between two columns of a terminal's table

_FROM_RESULT = (
    "parameters", "head_parameters", "tokens_per_second", "peak_memory_bytes", "train_seconds", "epochs", "steps",
    "best_step", "tokens",
)  # fmt: skip
_RANKS = ("numerical_rank", "linear_rank", "effective_rank", "tail_energy")
_RUN_COLUMNS = (
    "run", "head", "name", "seed", "state", "done", "valid_perplexity", "test_perplexity", "valid_cross_entropy",
    "test_cross_entropy", "bits_per_byte", *_FROM_RESULT, *_RANKS, "entropy",
)  # fmt: skip


def heads_of(table: pd.DataFrame) -> dict[str, str]:
    """The heads' names by their labels, from a table with the columns head (the label) and name."""
    return dict(zip(map(str, table["head"]), map(str, table["name"]), strict=True))


def by_seed(table: pd.DataFrame, head: str | None) -> "pd.Series[Any]":
    """The test perplexities of a head's finished runs, by seed. head: its label."""
    own = table[(table["head"] == head) & table["done"]]
    return own.set_index("seed")["test_perplexity"]


def runs_table(records: Sequence[Record]) -> pd.DataFrame:
    """One row a run, in the order of the heads and seeds; numbers are NaN where a run has none.

    `name` is the head's name, `head` its label. Of one head's labels, that without settings comes first, the others in
    the order of the records.
    `state` is "finished", "stopped early", or "not finished" for a run without a result.

    Raises:
        LabError: two runs have the same head, settings and seed.
    """
    rows = [run_row(r.run.name, r.label, r.head, r.seed, r.result, r.analysis) for r in records]
    frame = pd.DataFrame(rows, columns=list(_RUN_COLUMNS)).astype({"done": bool})
    twice = frame[frame.duplicated(["head", "seed"], keep=False)]
    if len(twice):
        first = twice.iloc[0]
        same = ", ".join(twice[(twice["head"] == first["head"]) & (twice["seed"] == first["seed"])]["run"])
        raise LabError(f"runs {same} are all of {first['head']} with seed {first['seed']}: which one counts?")
    named = heads_of(frame)
    order = {label: _order(label, name, since) for since, (label, name) in enumerate(named.items())}
    frame = frame.assign(_order=frame["head"].map(order)).sort_values(["_order", "seed"])
    return frame.drop(columns="_order").reset_index(drop=True)


def _order(label: str, name: str, named: int) -> tuple[int, bool, int]:
    return (HEAD_NAMES.index(name) if name in HEAD_NAMES else len(HEAD_NAMES), label != name, named)


def run_row(
    run: str,
    label: str,
    name: str,
    seed: object,
    result: Mapping[str, Any] | None,
    analysis: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One row of `runs_table`, from a run's result and analysis, each None where there is none."""
    states = {"early": "stopped early"}
    stopped = "" if result is None else str(result.get("stopped", "finished"))
    state = "not finished" if result is None else states.get(stopped, stopped)
    row: dict[str, Any] = {
        "run": run, "head": label, "name": name, "seed": seed, "state": state, "done": result is not None
    }  # fmt: skip
    result, analysis = result or {}, analysis or {}
    rank = analysis.get("rank") or {}
    for split in ("valid", "test"):
        scored = result.get(split) or {}
        row[f"{split}_perplexity"] = _number(scored.get("perplexity"))
        row[f"{split}_cross_entropy"] = _number(scored.get("cross_entropy"))
    row["bits_per_byte"] = _number((result.get("test") or {}).get("bits_per_byte"))
    for key in _FROM_RESULT:
        row[key] = _number(result.get(key))
    row["numerical_rank"] = _number(rank.get("numerical"))
    row["linear_rank"] = _number(rank.get("linear_rank"))
    row["effective_rank"] = _number((rank.get("effective") or {}).get("1e-4"))
    row["tail_energy"] = _number(rank.get("tail_energy"))
    row["entropy"] = _number(analysis.get("entropy"))
    return row


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row a head, the softmax first, over its finished runs.

    Columns: head, name, seeds (finished runs), unfinished; means valid_perplexity and test_perplexity, with _std
    (sample standard deviation, NaN for one seed), _min and _max; not_finite (runs whose test perplexity is not a finite
    number); bits_per_byte; parameters, head_parameters; tokens_per_second (median of the runs), peak_memory_bytes
    (largest); means over the runs of numerical_rank, linear_rank, effective_rank (eps = 1e-4) and tail_energy; baseline
    (whether it is the head that the others are compared with), difference (test perplexity minus the baseline's: the
    mean over the seeds that both have; if they share none, the difference of the means), difference_std, pairs (shared
    seeds), wins and losses (those with a lower, a higher perplexity), p_value, p_holm.

    p_value: two-sided paired t-test (scipy.stats.ttest_rel) over the shared seeds, at least 5, on the logarithm of the
    test perplexity, the cross-entropy per word: a difference there is a ratio of perplexities, and a factor up is as
    likely as the same factor down. p_holm: the same after Holm's correction for all the heads that were tested. A run
    whose perplexity is not a finite number makes its head's means and test NaN: it is not left out in silence.

    Args:
        table: as `runs_table` makes it.
    """
    frame = pd.DataFrame([_head_row(str(head), own) for head, own in table.groupby("head", sort=False)])
    if frame.empty:
        return frame
    base = baseline(heads_of(table))
    frame["baseline"] = frame["head"] == base
    compared = [
        _against(by_seed(table, head), by_seed(table, None if head == base else base)) for head in frame["head"]
    ]
    frame = pd.concat([frame, pd.DataFrame(compared)], axis=1)
    frame["p_holm"] = holm(frame["p_value"].to_numpy(dtype=float))
    return frame


def _head_row(head: str, own: pd.DataFrame) -> dict[str, Any]:
    done = own[own["done"]]
    row: dict[str, Any] = {"head": head, "name": str(own["name"].iloc[0]), "seeds": len(done)}
    row["unfinished"] = len(own) - len(done)
    for name in ("valid_perplexity", "test_perplexity"):
        values = done[name].to_numpy(dtype=float)
        finite = values[np.isfinite(values)]
        broken = len(finite) < len(values) or not len(values)
        row[name] = math.nan if broken else float(values.mean())
        row[f"{name}_std"] = math.nan if broken or len(values) < 2 else float(values.std(ddof=1))
        row[f"{name}_min"] = float(finite.min()) if len(finite) else math.nan
        row[f"{name}_max"] = float(finite.max()) if len(finite) else math.nan
    row["not_finite"] = int((~np.isfinite(done["test_perplexity"].to_numpy(dtype=float))).sum())
    for name in ("bits_per_byte", "parameters", "head_parameters"):
        row[name] = float(done[name].mean())
    row["tokens_per_second"] = float(done["tokens_per_second"].median())
    row["peak_memory_bytes"] = float(done["peak_memory_bytes"].max())
    for name in _RANKS:
        row[name] = float(done[name].mean())
    return row


def _against(mine: "pd.Series[Any]", theirs: "pd.Series[Any]") -> dict[str, float]:
    """One head's test perplexities against the baseline's, by seed; if no seed is shared, only their means."""
    both = paired(mine, theirs)
    means_alone = not both.pairs and len(mine) and len(theirs)
    return {
        "difference": mine.mean(skipna=False) - theirs.mean(skipna=False) if means_alone else both.difference,
        "difference_std": both.difference_std,
        "pairs": both.pairs,
        "wins": both.lower,
        "losses": both.higher,
        "p_value": both.p_value,
    }


def misleading_rank(summary: pd.DataFrame) -> list[str]:
    """Heads whose numerical rank differs from the baseline's although their ε-rank, which goes by size, does not.

    A softcap's log-probabilities, for instance, have full numerical rank, which counts every singular value above
    rounding, but the ε-rank of the softmax's. Ranks differ if their means over seeds are at least 1 apart; an ε-rank
    that differs in the other direction does not confirm the numerical rank.
    """
    base = summary[summary["baseline"]] if len(summary) else summary
    if base.empty:
        return []
    ranks = summary[["numerical_rank", "effective_rank"]].to_numpy(dtype=float)
    numerical, effective = (ranks - ranks[summary["baseline"].to_numpy()]).T
    with_numbers = np.isfinite(numerical) & np.isfinite(effective)
    opposite = np.where(numerical > 0, effective < 1, effective > -1)
    return summary["head"][with_numbers & (np.abs(numerical) >= 1) & opposite].tolist()


def display(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as text to be read: means with their deviation, units in the columns' names; "–" if missing.

    Columns that no head has a number for are left out, and the numerical rank where it misleads.
    """
    text = pd.DataFrame({name: [show(row) for _, row in summary.iterrows()] for name, show in _COLUMNS.items()})
    shown = [name for name in text.columns if (text[name] != NO_NUMBER).any()]
    return text[[name for name in shown if name != "rank" or not misleading_rank(summary)]]


def markdown(text: pd.DataFrame) -> str:
    """A table of text in Markdown, for a README or a log: the first column to the left, the others to the right."""
    lines = [list(text.columns), ["---" if index == 0 else "---:" for index in range(len(text.columns))]]
    lines += [[str(cell).replace("|", "\\|") for cell in row] for row in text.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal_table(
    text: pd.DataFrame,
    *,
    title: str | None = None,
    blocks: str | None = None,
    spare: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """A table of text for the terminal: the first column to the left, the others to the right.

    Args:
        title: a line above it. blocks: a column whose values become headings above their rows.
        spare: columns that are left out, in this order, while the terminal is too narrow.
        width: in letters. None: that of the terminal, or 80 without a terminal.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None)
    columns = [name for name in text.columns if name != blocks]
    sizes = {name: max(map(len, [str(name), *text[name].astype(str)])) for name in columns}
    for name in spare:
        if sum(sizes.values()) + _GAP * (len(sizes) - 1) > console.width:
            sizes.pop(name, None)
    parts = [(title, text)]
    if blocks is not None:
        parts = [(title, text.iloc[:0]), *((f"\n{value}", own) for value, own in text.groupby(blocks, sort=False))]
    for index, (heading, own) in enumerate(parts):
        part = Table(show_header=index == 0, box=SIMPLE, show_edge=False, pad_edge=False)
        for name, size in sizes.items():
            part.add_column(escape(str(name)), justify="left" if name == columns[0] else "right", overflow="fold",
                            min_width=size if blocks is not None else None)  # fmt: skip
        for row in own[list(sizes)].itertuples(index=False):
            part.add_row(*(escape(str(cell)) for cell in row))
        if heading is not None:
            console.print(heading, markup=False, soft_wrap=True)
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip("\n").split("\n"))


def number(value: float, digits: int = 0) -> str:
    """A number with thousands separated by commas, or "–" for NaN."""
    return NO_NUMBER if math.isnan(value) else f"{value:,.{digits}f}"


def plus_minus(mean: float, deviation: float, digits: int, sign: str = "") -> str:
    """A mean, with its deviation where there is one.

    >>> plus_minus(3.25, 0.51, 1, sign="+"), plus_minus(-3.25, math.nan, 1), plus_minus(math.nan, math.nan, 1)
    ('+3.2 ± 0.5', '−3.2', '–')
    """
    if math.isnan(mean):
        return NO_NUMBER
    text = f"{mean:{sign}z,.{digits}f}".replace("-", "−")
    return text if math.isnan(deviation) else f"{text} ± {deviation:,.{digits}f}"


def perplexity(mean: float, deviation: float = math.nan) -> str:
    """A perplexity to 4 digits or so, with its deviation where there is one.

    >>> perplexity(123.456, 1.234), perplexity(57.078, 0.0912)
    ('123.5 ± 1.2', '57.08 ± 0.09')
    """
    return plus_minus(mean, deviation, 2 if abs(mean) < 100 else 1)


def probability(p_value: float) -> str:
    """A p-value to 2 digits; "<0.001" below that."""
    return "<0.001" if p_value < 0.001 else number(p_value, 2 if p_value >= 0.1 else 3)


def _difference(row: Any) -> str:
    if math.isnan(row["difference"]):
        return NO_NUMBER
    shown = plus_minus(row["difference"], math.nan, 2 if abs(row["test_perplexity"]) < 100 else 1, "+")
    if row["pairs"] == 0:
        return f"{shown} (unpaired)"
    return f"{shown} ({row['wins']:.0f}/{row['pairs']:.0f})"


def rank_text(value: float) -> str:
    """A rank, or a mean of ranks."""
    return number(value, 0 if value == round(value) else 1) if math.isfinite(value) else NO_NUMBER


def _share(value: float) -> str:
    return NO_NUMBER if math.isnan(value) else "0" if value < 1e-20 else f"{value:.1e}"


_COLUMNS: dict[str, Callable[[Any], str]] = {
    "head": lambda row: str(row["head"]),
    "seeds": lambda row: f"{row['seeds']:.0f}",
    "test perplexity": lambda row: perplexity(row["test_perplexity"], row["test_perplexity_std"]),
    "valid perplexity": lambda row: perplexity(row["valid_perplexity"], row["valid_perplexity_std"]),
    "vs softmax (lower in)": _difference,
    "p (Holm)": lambda row: probability(row["p_holm"]),
    "bits per byte": lambda row: number(row["bits_per_byte"], 3),
    "parameters": lambda row: number(row["parameters"]),
    "of the head": lambda row: number(row["head_parameters"]),
    "tokens/s": lambda row: number(row["tokens_per_second"]),
    "peak MiB": lambda row: number(row["peak_memory_bytes"] / 2**20),
    "rank": lambda row: rank_text(row["numerical_rank"]),
    "ε-rank": lambda row: rank_text(row["effective_rank"]),
    "energy beyond linear": lambda row: _share(row["tail_energy"]),
}

"""The study's rows as tables: one row a run, one a place and head, and the tests that the protocol asks for.

`±` is the sample standard deviation over seeds; tests are two-sided paired t-tests on log perplexity over shared seeds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from uncork.lab.experiments.study.run import Cell
from uncork.lab.report.statistics import baseline, holm, paired
from uncork.lab.report.tables import NO_NUMBER, heads_of, perplexity, probability, run_row, summarise
from uncork.lab.run.rows import Rows

Costs = Mapping[tuple[str, str], Mapping[str, float]]
"""By (place, head), what benchmarks/epoch_cost.py measured of the study's model; empty if it was not run."""


def runs_frame(cells: Sequence[Cell], rows: Rows) -> pd.DataFrame:
    """One row a kept run: place, corpus, the columns of `runs_table`, and settings of the training."""
    found = []
    for cell in cells:
        kept = rows.get(cell.key)
        if kept is None:
            continue
        config, analysis = cell.config, kept.get("analysis") or {}
        row = run_row(cell.key, cell.label, config.head, config.seed, kept["result"], analysis)
        epochs = [epoch for epoch, _ in kept["history"]]
        losses = [loss for _, loss in kept["history"]]
        found.append(
            {
                "place": cell.place,
                "corpus": config.corpus,
                "in_features": config.in_features,
                **row,
                "lr": config.lr,
                "settings": _settings(cell),
                "train_perplexity": math.exp({**kept, **analysis}.get("train_cross_entropy", math.nan)),
                "best_epoch": epochs[int(np.argmin(losses))],
                "effective_rank_1e-2": ((analysis.get("rank") or {}).get("effective") or {}).get("1e-2", math.nan),
            }
        )
    return pd.DataFrame(found)


def _settings(cell: Cell) -> str:
    own = {**cell.config.head_options}
    usual = {"function_lr_scale": 1, "output_lr_scale": 1, "function_start": 0, "weight_decay": 0}
    own |= {name: value for name in usual if (value := getattr(cell.config, name)) != usual[name]}
    return ",".join(f"{name}={'null' if value is None else value}" for name, value in own.items())


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a place and head: the columns of `uncork.lab.report.tables.summarise`, computed within the place."""
    parts = []
    for place, own in runs.groupby("place", sort=False):
        told = summarise(own)
        more = own.groupby("head", sort=False).agg(
            valid_perplexity_best=("valid_perplexity", "min"),
            train_perplexity=("train_perplexity", "mean"),
            train_seconds=("train_seconds", "mean"),
            epochs=("epochs", "mean"),
            best_epoch=("best_epoch", "mean"),
            lr=("lr", "first"),
            settings=("settings", "first"),
        )
        first = own.iloc[0]
        told = told.merge(more, left_on="head", right_index=True)
        by_head = _by_head(own)
        base = baseline(heads_of(own))
        told["change_percent"] = [
            math.nan if base in (None, head) else paired(by_head[head], by_head[base]).change_percent
            for head in told["head"]
        ]
        told.insert(0, "in_features", first["in_features"])
        told.insert(0, "corpus", first["corpus"])
        told.insert(0, "place", place)
        parts.append(told)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def control_tests(runs: pd.DataFrame, controls: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Every head against each of its controls at every place: the protocol's test.

    Args:
        controls: by the head's label or name, the labels of what it is tested against.

    Columns: place, learned, control, pairs, change_percent (mean over seeds of the perplexity's change), lower (in how
    many seeds), p_value, p_holm (within the place).
    """
    found = []
    for place, own in runs.groupby("place", sort=False):
        by_head, names = _by_head(own), heads_of(own)
        tests = [
            {"place": place, "learned": learned, "control": control, **_test(by_head[learned], by_head[control])}
            for learned in by_head
            for control in controls.get(learned, controls.get(names[learned], ()))
            if control in by_head
        ]
        for test, adjusted in zip(tests, holm(np.array([t["p_value"] for t in tests])), strict=True):
            found.append({**test, "p_holm": adjusted})
    return pd.DataFrame(found)


def _by_head(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """Test perplexities by head, indexed by seed."""
    return {str(head): own.set_index("seed")["test_perplexity"] for head, own in runs.groupby("head", sort=False)}


def _test(learned: pd.Series, control: pd.Series) -> dict[str, float]:
    both = paired(learned, control)
    return {
        "pairs": both.pairs,
        "change_percent": both.change_percent,
        "lower": both.lower,
        "p_value": both.p_value,
    }


def published_columns(frame: pd.DataFrame, runs: pd.DataFrame, costs: Costs) -> pd.DataFrame:
    """A summary in the columns of Parthiban et al. (2021): parameters, seconds an epoch, perplexities, ranks."""
    names = heads_of(runs)
    tokens = (runs["tokens"] / runs["epochs"]).groupby([runs["place"], runs["head"]]).first()
    rows = []
    for row in frame.to_dict("records"):
        key = row["place"], row["head"]
        cost = costs.get((row["place"], measured_as(row["head"], names[row["head"]])))
        rows.append(
            {
                "place": row["place"],
                "head": row["head"],
                "parameters": f"{row['parameters']:,.0f}",
                "s / epoch": f"{1e-3 * cost['milliseconds'] / cost['tokens'] * tokens[key]:.0f}" if cost else NO_NUMBER,
                "MiB": f"{cost['peak_mib']:.0f}" if cost else NO_NUMBER,
                "train": perplexity(row["train_perplexity"], math.nan),
                "valid": perplexity(row["valid_perplexity"], row["valid_perplexity_std"]),
                "test": perplexity(row["test_perplexity"], row["test_perplexity_std"]),
                "rank": f"{row['numerical_rank']:,.0f}",
                "ε-rank": f"{row['effective_rank']:.0f}",
            }
        )
    return pd.DataFrame(rows)


def measured_as(label: str, name: str) -> str:
    """The head under which this label's cost was measured: variants of equal cost were measured once.

    >>> measured_as("softmax (scale 1)", "softmax"), measured_as("gss (learned)", "gss")
    ('softmax', 'gss (learned)')
    """
    return name if label in (f"{name} (unit slope)", f"{name} (scale 1)") else label


def display_tests(tests: pd.DataFrame) -> pd.DataFrame:
    """The tests as text: one row a pair of heads, one column a place."""
    pairs = list(dict.fromkeys(zip(tests["learned"], tests["control"], strict=True)))
    columns = {"test perplexity of": [f"{learned} against {control}" for learned, control in pairs]}
    for place, own in tests.groupby("place", sort=False):
        by_pair = {(row["learned"], row["control"]): row for row in own.to_dict("records")}
        columns[str(place)] = [_verdict(by_pair[pair]) if pair in by_pair else NO_NUMBER for pair in pairs]
    return pd.DataFrame(columns)


def _verdict(test: Any) -> str:
    change = f"{test['change_percent']:+.2f} %".replace("-", "−")
    shown = f"{change}, lower in {test['lower']} of {test['pairs']}"
    return shown if math.isnan(test["p_value"]) else f"{shown}, p {_p(test['p_value'])}, Holm {_p(test['p_holm'])}"


def display_table(frame: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """One row a head, one column a place: perplexity ± its deviation, and the change against softmax with its p.

    Beside a validation perplexity stands that of training text, where it was kept.
    The lowest perplexity of a place is bold. p is missing where fewer than five seeds allow no test.
    """
    heads = list(dict.fromkeys(frame["head"]))
    columns: dict[str, list[str]] = {"head": heads}
    for place, own in frame.groupby("place", sort=False):
        by_head = own.set_index("head")
        best = by_head[f"{split}_perplexity"].min()
        columns[str(place)] = [_entry(by_head.loc[h], split, best) if h in by_head.index else NO_NUMBER for h in heads]
    return pd.DataFrame(columns)


def _entry(row: Any, split: str, best: float) -> str:
    value = row[f"{split}_perplexity"]
    shown = perplexity(value, row[f"{split}_perplexity_std"])
    shown = f"**{shown}**" if value == best else shown
    if split != "test":
        train = row["train_perplexity"]
        return shown if math.isnan(train) else f"{shown}, train {perplexity(train, math.nan)}"
    if math.isnan(row["change_percent"]):
        return shown
    change = f"{row['change_percent']:+.1f} %".replace("-", "−")
    tested = "" if math.isnan(row["p_value"]) else f", p {_p(row['p_value'])}"
    return f"{shown} ({change}{tested})"


def _p(value: float) -> str:
    text = probability(value)
    return text if text.startswith("<") else f"= {text}"

"""Finished cells as tables: one row a cell, one row a head with its spread over seeds, and the same as text.

The targets of a seed are the same for every head, so heads are compared with the softmax seed by seed. `_std` is
everywhere the sample standard deviation over seeds, nan for one seed.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from uncork.heads import HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.report import tables as report_tables
from uncork.lab.report.statistics import baseline, paired
from uncork.lab.report.tables import NO_NUMBER, plus_minus
from uncork.lab.train.head import parse_head

__all__ = [
    "baseline_of",
    "grid",
    "head_key",
    "head_name",
    "head_of",
    "long_table",
    "nats",
    "num_pieces",
    "point_title",
    "rows_frame",
    "series_name",
    "summary",
    "table_by_point",
    "target_key",
    "target_name",
    "terminal_table",
    "usual_curves",
    "usual_settings",
]

POINT = ["target", "num_contexts", "num_words", "in_features"]
SETTINGS = ["learning_rate", "function_scale", "first_round", "rounds", "tolerance", "optimizer"]
NO_KL = 1e-4
"""Nats. A head with at most this KL divergence models its targets; a ratio to it means nothing and is set to nan."""

MEASURES = ["mode_matching", "kl", "cross_entropy"]
_DECIMALS = {"entropy": 6, "cross_entropy": 6, "kl": 6, "mode_matching": 3, "largest_score": 3, "last_gain": 8,
             "seconds": 2}  # fmt: skip


def head_of(label: str) -> HeadSpec:
    """The spec of a label's head, without the options, some of which belong to the experiment."""
    return HeadSpec(parse_head(label)[0])


def baseline_of(frame: pd.DataFrame) -> str | None:
    """The label of the head that the others in the column `head` are compared with, as `baseline` chooses it."""
    return baseline({str(head): head_of(head).name for head in frame["head"].unique()})


def head_name(label: str) -> str:
    """What a head is called in tables and figures.

    >>> head_name("plif:num_pieces=1000"), head_name("mos:latent_activation=null,equal_parameters=true")
    ('PLIF, 1,000 pieces', 'MoS-4, no more parameters')
    >>> head_name("softmax:bias=true"), head_name("mos"), head_name("gss:steepness=3")
    ('softmax, bias', 'MoS-4, tanh', 'GSS, steepness 3')
    """
    return _head_name(label, with_size=True)


def series_name(label: str) -> str:
    """The head's name without its number of pieces or units, so that a figure can join these heads by a line.

    >>> series_name("plif:num_pieces=1000"), series_name("plif-frozen")
    ('PLIF', 'frozen PLIF')
    """
    return _head_name(label, with_size=False)


def _head_name(label: str, *, with_size: bool) -> str:
    name, options, settings = parse_head(label)
    head, options = HeadSpec(name), options | settings
    text = head.called
    if head.is_mixture:
        text += f"-{options.pop('num_components', head.defaults['num_components'])}"
    if "cap" in head.defaults:
        text += f" {options.pop('cap', head.defaults['cap']):g}"
    parts = [text]
    for kind, number in _size(head, options).items():
        options.pop(kind, None)
        parts += [f"{number:,} {kind.removeprefix('num_')}"] if with_size else []
    if head.is_mixture and (activation := options.pop("latent_activation", "tanh")) is not None:
        parts.append(str(activation))
    narrowed = options.pop("equal_parameters", False)
    parts += [_option(key, value) for key, value in options.items() if value is not False]
    return ", ".join(parts + ["no more parameters"] * bool(narrowed))


def _option(key: str, value: Any) -> str:
    words = key.replace("_", " ")
    return words if value is True else f"{words} {value}"


def _size(head: HeadSpec, options: dict[str, Any]) -> dict[str, int]:
    """The number of pieces or units, for heads that have one."""
    return {key: options.get(key, head.defaults[key]) for key in ("num_pieces", "num_units") if key in head.defaults}


def num_pieces(label: str) -> int | None:
    """The number of a PLIF's pieces, learned or frozen; None for other heads.

    >>> num_pieces("plif:num_pieces=10"), num_pieces("plif-frozen"), num_pieces("softmax")
    (10, 100, None)
    """
    name, options, _ = parse_head(label)
    head = HeadSpec(name)
    return None if head.is_mixture else _size(head, options).get("num_pieces")


def head_key(label: str) -> tuple[int, int, str]:
    """The key to sort heads by: controls stand near the heads they control, then by number of pieces or units."""
    name, options, _ = parse_head(label)
    head = HeadSpec(name)
    return head.order, max(_size(head, options).values(), default=0), label


def target_name(target: str) -> str:
    """What targets are called in tables and figures.

    >>> target_name("dirichlet:0.01"), target_name("planted:plif:5"), target_name("modes:3")
    ('Dirichlet, β = 0.01', 'planted PLIF of 5 features', '3 modes')
    """
    kind, *rest = target.split(":")
    if kind == "planted":
        return f"planted {HeadSpec(rest[0]).called} of {rest[1]} features"
    names = {
        "dirichlet": "Dirichlet, β = {}",
        "sharpened": "Dirichlet, β = {}, to the power {}",
        "known-rank": "known rank {}",
        "modes": "{} modes",
        "sotu": "State of the Union",
    }
    return names.get(kind, target).format(*rest)


def target_key(target: str) -> list[tuple[int, float, str]]:
    """The key to sort targets by: their kind, then their numbers."""
    return [_number_or_text(part) for part in target.split(":")]


def _number_or_text(part: str) -> tuple[int, float, str]:
    try:
        return (0, float(part), "")
    except ValueError:
        return (1, 0.0, part)


def point_title(point: dict[str, Any], shown: Iterable[str]) -> str:
    """The fields of POINT that `shown` names, with a point's values, in words.

    >>> point_title({"target": "sotu", "num_words": 2000, "in_features": 50}, ["num_words", "in_features"])
    'M = 2,000, d = 50'
    """
    letters = {"num_contexts": "N", "num_words": "M", "in_features": "d"}
    written = {name: f"{letter} = {point[name]:,}" for name, letter in letters.items() if name in point}
    return ", ".join(target_name(point["target"]) if name == "target" else written[name]
                     for name in POINT if name in shown)  # fmt: skip


def rows_frame(outcomes: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a cell, sorted, rounded: what rows.csv holds. A cell that comes twice is one row.

    Args:
        outcomes: as `cells.run_cell` returns them.
    """
    if not outcomes:
        raise LabError("outcomes: expected at least one cell, got none")
    frame = pd.DataFrame([outcome["row"] for outcome in outcomes])
    for name in [*_DECIMALS, *MEASURES]:
        frame[name] = pd.to_numeric(frame[name])  # None, which JSON has for nan, becomes nan
    frame = frame.drop_duplicates([*POINT, "head", *SETTINGS, "seed"])
    return _sorted(frame, [*POINT, "head", *SETTINGS, "seed"]).round(_DECIMALS)


def _sorted(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    keys = {"target": target_key, "head": head_key}
    order = sorted(
        range(len(frame)),
        key=lambda row: [keys[name](frame[name].iloc[row]) if name in keys else frame[name].iloc[row]
                           for name in columns],
    )  # fmt: skip
    return frame.iloc[order].reset_index(drop=True)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each target, N, M, d, head and settings: means and deviations over the seeds, and the comparison with
    the softmax that `baseline_of` names.

    Columns beside those keys: seeds; mode_matching (percent), kl, cross_entropy (nats), each with `_std`; parameters
    and width (means); converged (share of the seeds); pairs, the number of seeds for which the softmax was trained with
    the same rounds and tolerance. Means over these pairs, each with `_std`: mode_gain (percentage points, head minus
    softmax), kl_gain (nats, softmax minus head), and mode_ratio, kl_ratio, cross_entropy_ratio (head / softmax). The
    softmax has the head's learning rate and optimiser if it was run with them, else the commonest ones (a mixture may
    need another learning rate).

    Args:
        rows: as `rows_frame` returns them.
    """
    groups = _with_softmax(rows).groupby([*POINT, "head", *SETTINGS], sort=False)
    result = pd.DataFrame({"seeds": groups["seed"].nunique()})
    for name in MEASURES:
        result[name], result[f"{name}_std"] = groups[name].mean(), groups[name].std()
    for name in ("parameters", "width", "converged"):
        result[name] = groups[name].mean()
    against = pd.DataFrame([_against_softmax(own.set_index("seed")) for _, own in groups], index=result.index)
    return _sorted(result.join(against).reset_index(), [*POINT, "head", *SETTINGS])


def _against_softmax(own: pd.DataFrame) -> dict[str, float]:
    """One head's cells of a point, by seed, beside those of its softmax."""
    softmax = {name: own[f"{name}_softmax"].dropna() for name in MEASURES}
    mode, kl, cross_entropy = (paired(own[name], softmax[name]) for name in MEASURES)
    lower = paired(softmax["kl"], own["kl"])
    told: dict[str, float] = {
        "pairs": kl.pairs,
        "mode_gain": mode.difference, "mode_gain_std": mode.difference_std,
        "kl_gain": lower.difference, "kl_gain_std": lower.difference_std,
    }  # fmt: skip
    ratios = {"mode": mode.ratio(), "kl": kl.ratio(NO_KL), "cross_entropy": cross_entropy.ratio(NO_KL)}
    for name, (mean, deviation) in ratios.items():
        told |= {f"{name}_ratio": mean, f"{name}_ratio_std": deviation}
    return told


def _with_softmax(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with the measures of the softmax that each is compared with in the columns MEASURE_softmax."""
    budget = [*POINT, "seed", "first_round", "rounds", "tolerance"]
    same = [*budget, "learning_rate", "optimizer"]
    softmax = rows[rows["head"] == baseline_of(rows)]
    counts = rows.groupby(["learning_rate", "optimizer"])["seed"].transform("size")
    commonest = softmax.loc[counts[softmax.index].sort_values(ascending=False, kind="stable").index]
    paired = rows
    for key, suffix in ((same, "_softmax"), (budget, "_other")):
        base = commonest.drop_duplicates(key)[key + MEASURES]
        paired = paired.merge(base.rename(columns={name: name + suffix for name in MEASURES}), on=key, how="left")
    for name in MEASURES:
        paired[f"{name}_softmax"] = paired[f"{name}_softmax"].fillna(paired.pop(f"{name}_other"))
    return paired


def usual_settings(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each point and head, that of the settings which are commonest in the summary; figures show these."""
    counts = frame.groupby(SETTINGS)["seeds"].transform("size")
    order = counts.sort_values(ascending=False, kind="stable").index
    return _sorted(frame.loc[order].drop_duplicates([*POINT, "head"]), [*POINT, "head"])


def usual_curves(outcomes: Sequence[dict[str, Any]]) -> dict[tuple[str, tuple[Any, ...]], list[dict[str, Any]]]:
    """By (head, point), the functions with the commonest settings, one a seed."""
    learned = [outcome for outcome in outcomes if outcome["function"] is not None]
    counts = Counter(_settings(outcome) for outcome in learned)
    found: dict[tuple[str, tuple[Any, ...]], list[dict[str, Any]]] = defaultdict(list)
    for outcome in learned:
        found[outcome["row"]["head"], tuple(outcome["row"][name] for name in POINT)].append(outcome)
    result = {}
    for key, own in found.items():
        usual = max(map(_settings, own), key=lambda settings: counts[settings])
        result[key] = [outcome["function"] for outcome in own if _settings(outcome) == usual]
    return result


def _settings(outcome: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(outcome["row"][name] for name in SETTINGS)


def grid(frame: pd.DataFrame, target: str, head: str, column: str) -> pd.DataFrame:
    """A column of the summary as a table M x d, over all M and d that the target has; nan where there is no cell.

    Args:
        frame: as `summary` returns it. target, head: as the cells write them. column: of the summary.

    Raises:
        LabError: no cells of this target, or with several numbers of contexts.
    """
    own = usual_settings(frame[frame["target"] == target])
    if own["num_contexts"].nunique() != 1:
        found = ", ".join(map(str, sorted(own["num_contexts"].unique()))) or "no cell"
        raise LabError(f"{target}: a grid needs cells of one number of contexts, got {found}")
    words, features = sorted(own["num_words"].unique()), sorted(own["in_features"].unique())
    table = own[own["head"] == head].pivot(index="num_words", columns="in_features", values=column)
    return table.reindex(index=words, columns=features).rename_axis(index="M", columns="d")


def nats(mean: float, deviation: float = math.nan) -> str:
    """A KL divergence to about three digits, with five decimals at most.

    >>> nats(1.16412, 0.0123), nats(0.04321), nats(0.000012)
    ('1.164 ± 0.012', '0.0432', '0.00001')
    """
    return plus_minus(mean, deviation, 3 if abs(mean) >= 0.1 else 4 if abs(mean) >= 0.01 else 5)


_CELLS: dict[str, Callable[[Any], str]] = {
    "head": lambda row: head_name(row["head"]),
    "parameters": lambda row: f"{row['parameters']:,.0f}",
    "seeds": lambda row: f"{row['seeds']}",
    "converged": lambda row: f"{round(row['converged'] * row['seeds'])}/{row['seeds']}",
    "mode matching, %": lambda row: plus_minus(row["mode_matching"], row["mode_matching_std"], 1),
    "KL, nats": lambda row: nats(row["kl"], row["kl_std"]),
    "gain, points": lambda row: _against(row, plus_minus(row["mode_gain"], row["mode_gain_std"], 1, "+")),
    "KL / softmax": lambda row: _against(row, plus_minus(row["kl_ratio"], row["kl_ratio_std"], 3)),
}


def _against(row: Any, text: str) -> str:
    return "" if row["baseline"] else text


def _setting_titles(frame: pd.DataFrame) -> list[str]:
    """For each row, its values of the settings that differ within the frame, in words; "" if none differs."""
    varying = [name for name in SETTINGS if frame[name].nunique() > 1]
    return [", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in varying) for _, row in frame.iterrows()]


def terminal_table(frame: pd.DataFrame) -> str:
    """The summary for a terminal of 120 columns: a block a point and its settings, a line a head."""
    base = baseline_of(frame)
    frame = _sorted(frame.assign(baseline=frame["head"] == base), [*POINT, *SETTINGS, "head"])
    names = ["head", "converged", "mode matching, %", "KL, nats", "gain, points", "KL / softmax"]
    text = pd.DataFrame([{name: _CELLS[name](row) for name in names} for _, row in frame.iterrows()])
    text["point"] = [
        point_title(dict(row), POINT) + (f"; {settings}" if settings else "")
        for (_, row), settings in zip(frame.iterrows(), _setting_titles(frame), strict=True)
    ]
    note = "± is the standard deviation over seeds"
    note += f"; gain and ratio are against {head_name(base)} of the same seed and budget." if base else "."
    return f"{report_tables.terminal_table(text, blocks='point', width=120)}\n\n{note}"


def long_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The summary as text to be read, one row a head and point; what is the same in all rows is left out."""
    lines = []
    frame = frame.assign(baseline=frame["head"] == baseline_of(frame))
    varying = [name for name in POINT if frame[name].nunique() > 1]
    titles = {"target": "targets", "num_contexts": "N", "num_words": "M", "in_features": "d"}
    for (_, row), settings in zip(frame.iterrows(), _setting_titles(frame), strict=True):
        line = {titles[name]: target_name(row[name]) if name == "target" else f"{row[name]:,}" for name in varying}
        lines.append(line | {name: cell(row) for name, cell in _CELLS.items()} | {"settings": settings})
    table = pd.DataFrame(lines)
    return table if any(table["settings"]) else table.drop(columns="settings")


def table_by_point(frame: pd.DataFrame) -> pd.DataFrame:
    """The summary as text to be read, one row a head and two columns a point: mode matching, and KL to the targets.

    A head with several settings has those that `usual_settings` chooses.
    """
    own = usual_settings(frame)
    shown = ["num_words", "in_features", *(name for name in POINT[:2] if own[name].nunique() > 1)]
    heads = sorted(own["head"].unique(), key=head_key)
    columns: dict[str, list[str]] = {"head": [head_name(head) for head in heads]}
    for _, group in own.groupby(POINT, sort=False):
        title = point_title(dict(group.iloc[0]), shown)
        rows = {row["head"]: row for _, row in group.iterrows()}
        for name in ("mode matching, %", "KL, nats"):
            columns[f"{title}: {name}"] = [_CELLS[name](rows[head]) if head in rows else NO_NUMBER for head in heads]
    return pd.DataFrame(columns)

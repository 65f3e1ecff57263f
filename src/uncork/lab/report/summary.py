"""Runs as tables: one row a run, one row an output layer, and the comparison with the softmax.

`±` is everywhere the sample standard deviation over seeds. Runs of one head with different settings are rows of their
own: only the seed is averaged over.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from uncork.heads import HEAD_NAMES, HeadSpec
from uncork.heads.spec import titled, value_text
from uncork.lab.errors import LabError
from uncork.lab.run.files import read_json
from uncork.lab.run.store import Run
from uncork.lab.train.config import TrainConfig

__all__ = [
    "baseline",
    "displayed",
    "heads_of",
    "print_table",
    "run_analysis",
    "run_labels",
    "run_row",
    "runs_table",
    "settings_of",
    "summarise",
    "summarise_table",
    "to_markdown",
]

MIN_SEEDS_FOR_TEST = 5
BASELINE = "softmax"
"""The head that all others are compared with."""


def run_analysis(run: Run) -> dict[str, Any] | None:
    """The run's analysis, from its result or else its analysis.json; None where there is none."""
    inside = (run.result or {}).get("analysis")
    if isinstance(inside, dict) and inside:
        return inside
    path = run.path / "analysis.json"
    return read_json(path) if path.exists() else None


def run_labels(runs: Sequence[Run]) -> list[str]:
    """What each run's output layer is called: its head, and in brackets what sets it apart from the usual.

    Usual are, of the head's own options, the defaults; of what every head has (its scale and bias, the settings of its
    training), what most heads of the comparison have, and where no value is the commonest, a default or nothing. So a
    softmax with the others' settings is "softmax" beside a "softmax (in_features=20)".
    """
    names, settings = [_name(run) for run in runs], [settings_of(run.config) for run in runs]
    distinct = {titled(name, own): own for name, own in zip(names, settings, strict=True)}
    usual = _usual(list(distinct.values()))
    labels = []
    for run, name, own in zip(runs, names, settings, strict=True):
        defaults = _head_options({"head": run.config.get("head")})
        expected = {f"head_options.{option}": value_text(value) for option, value in defaults.items()} | usual
        telling = {key: value for key, value in own.items() if value_text(value) != expected.get(key)}
        ends = [key.rpartition(".")[2] for key in telling]
        short = (end if ends.count(end) == 1 else key for key, end in zip(telling, ends, strict=True))
        labels.append(titled(name, dict(zip(short, telling.values(), strict=True))))
    return labels


def _usual(heads: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """By setting that every head can have, the value that most of them have, as text; a default where two are tied."""
    shared = {f"head_options.{option}": value_text(value) for option, value in HeadSpec(BASELINE).defaults.items()}
    keys = {key: None for own in heads for key in own if not key.startswith("head_options.") or key in shared}
    usual: dict[str, str | None] = {}
    for key in keys:
        common = Counter(value_text(own.get(key)) for own in heads).most_common(2)
        tied = len(common) == 2 and common[0][1] == common[1][1]
        usual[key] = shared.get(key) if tied else common[0][0]
    return usual


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a run was trained, by its config.json: the settings of TrainConfig, nested ones joined by dots.

    The head's options come with their defaults. Head, seed and whatever is no setting are left out.
    """
    known = [name for name in TrainConfig.of().to_dict() if name not in ("head", "seed")]
    values = {**config, "head_options": _head_options(config)}
    return _flatten({name: values[name] for name in known if name in values})


def _head_options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the defaults, where this version knows the head and its options."""
    options: Mapping[str, Any] = config.get("head_options") or {}
    try:
        return HeadSpec(str(config.get("head")), options).resolved
    except (TypeError, ValueError):
        return options


def _name(run: Run) -> str:
    return str(run.config.get("head", "?"))


def baseline(heads: Mapping[str, str]) -> str | None:
    """The label of the head that all others are compared with, in tables, figures and sentences alike.

    It is the softmax that has no settings of its own, and so is called by its name alone; where every softmax has some,
    the first of the table; None without a softmax.

    Args:
        heads: the name (of HEAD_NAMES) by the label, in the order of the table.

    >>> baseline({"softmax (scale=1)": "softmax", "plif": "plif", "softmax": "softmax"})
    'softmax'
    """
    found = [label for label, name in heads.items() if name == BASELINE]
    return BASELINE if BASELINE in found else next(iter(found), None)


def heads_of(table: pd.DataFrame) -> dict[str, str]:
    """The name by the label, of a table with the columns head (the label) and name."""
    return dict(zip(map(str, table["head"]), map(str, table["name"]), strict=True))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one, with keys joined by dots.

    >>> _flatten({"head": "plif", "training": {"lr": 0.1}})
    {'head': 'plif', 'training.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def runs_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a run, in the order of the heads and seeds; numbers are NaN where a run has none.

    Of one head's rows those without settings of its own come first, the others as they were named. `name` is the head's
    name, `head` its label.
    `state` is "finished", "stopped early", or "not finished" for a run without a result.

    Raises:
        LabError: two runs have the same head, settings and seed.
    """
    labels = run_labels(runs)
    rows = [
        run_row(run.name, label, _name(run), run.config.get("seed"), run.result,
                run_analysis(run) if run.result else None)
        for run, label in zip(runs, labels, strict=True)
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(_RUN_COLUMNS)).astype({"done": bool})
    twice = frame[frame.duplicated(["head", "seed"], keep=False)]
    if len(twice):
        first = twice.iloc[0]
        same = ", ".join(twice[(twice["head"] == first["head"]) & (twice["seed"] == first["seed"])]["run"])
        raise LabError(f"runs {same} are all of {first['head']} with seed {first['seed']}: which one counts?")
    named = heads_of(frame)
    order = {label: _order(label, name, place) for place, (label, name) in enumerate(named.items())}
    frame = frame.assign(_order=frame["head"].map(order)).sort_values(["_order", "seed"])
    return frame.drop(columns="_order").reset_index(drop=True)


def summarise(runs: Sequence[Run]) -> pd.DataFrame:
    """One row a head, the softmax first, over its finished runs.

    Columns: head, name, seeds (finished runs), unfinished; means valid_perplexity and test_perplexity, with _std
    (sample standard deviation, NaN for one seed), _min and _max; not_finite (runs whose test perplexity is not a finite
    number); bits_per_byte; parameters, head_parameters; tokens_per_second (median of the runs), peak_memory_bytes
    (largest); means over the runs of numerical_rank, linear_rank, effective_rank (eps = 1e-4) and tail_energy; baseline
    (whether the others are compared with it), difference (test perplexity minus the baseline's: the mean over the seeds
    that both have, or of the means where they share none), difference_std, pairs (shared seeds), wins and losses (those
    with a lower, a higher perplexity), p_value, p_holm.

    p_value: two-sided paired t-test (scipy.stats.ttest_rel) over the shared seeds, at least 5, on the logarithm of the
    test perplexity, the cross-entropy per word: a difference there is a ratio of perplexities, as likely a factor
    up as down. p_holm: the same after Holm's correction for all the heads that were tested. A run whose perplexity is
    not a finite number makes its head's means and test NaN: it is not left out in silence.
    """
    return summarise_table(runs_table(runs))


def summarise_table(table: pd.DataFrame) -> pd.DataFrame:
    """`summarise` of the frame that `runs_table` makes."""
    rows = [_head_row(str(head), own) for head, own in table.groupby("head", sort=False)]
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    frame["baseline"] = frame["head"] == baseline(heads_of(table))
    base = table[(table["head"] == baseline(heads_of(table))) & table["done"]]
    compared = [_compare(table[(table["head"] == head) & table["done"]], base) for head in frame["head"]]
    frame = pd.concat([frame, pd.DataFrame(compared)], axis=1)
    frame["p_holm"] = holm(frame["p_value"].to_numpy(dtype=float))
    return frame


_FROM_RESULT = (
    "parameters", "head_parameters", "tokens_per_second", "peak_memory_bytes", "train_seconds", "epochs", "steps",
    "best_step", "tokens",
)  # fmt: skip
_RANKS = ("numerical_rank", "linear_rank", "effective_rank", "tail_energy")
_RUN_COLUMNS = (
    "run", "head", "name", "seed", "state", "done", "valid_perplexity", "test_perplexity", "valid_cross_entropy",
    "test_cross_entropy", "bits_per_byte", *_FROM_RESULT, *_RANKS, "entropy",
)  # fmt: skip


def _order(label: str, name: str, place: int) -> tuple[int, bool, int]:
    return (HEAD_NAMES.index(name) if name in HEAD_NAMES else len(HEAD_NAMES), label != name, place)


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


def _compare(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, float]:
    """One head's finished runs beside the baseline's."""
    nothing = {
        "difference": math.nan,
        "difference_std": math.nan,
        "pairs": 0,
        "wins": 0,
        "losses": 0,
        "p_value": math.nan,
    }
    if own.empty or base.empty or own["head"].iloc[0] == base["head"].iloc[0]:
        return nothing
    both = own.merge(base, on="seed", suffixes=("", "_base"))
    if both.empty:
        means = [float(runs["test_perplexity"].mean(skipna=False)) for runs in (own, base)]
        return {**nothing, "difference": means[0] - means[1]}
    mine, theirs = (both[name].to_numpy(dtype=float) for name in ("test_perplexity", "test_perplexity_base"))
    finite = bool(np.isfinite([mine, theirs]).all())
    difference = mine - theirs if finite else np.full(len(mine), math.nan)
    return {
        "difference": float(difference.mean()),
        "difference_std": float(difference.std(ddof=1)) if len(both) > 1 else math.nan,
        "pairs": len(both),
        "wins": int((difference < 0).sum()),
        "losses": int((difference > 0).sum()),
        "p_value": paired_p(mine, theirs) if finite else math.nan,
    }


def paired_p(mine: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Two-sided paired t-test on the logarithms; NaN below 5 pairs, 1 where all pairs are equal."""
    if len(mine) < MIN_SEEDS_FOR_TEST:
        return math.nan
    if np.array_equal(mine, theirs):
        return 1.0
    with warnings.catch_warnings():  # scipy warns where all differences are the same number
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.ttest_rel(np.log(mine), np.log(theirs)).pvalue)


def holm(p_values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Holm's step-down correction over the p-values that are numbers (Holm 1979)."""
    adjusted = np.full(len(p_values), math.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    largest = 0.0
    for place, index in enumerate(tested[np.argsort(p_values[tested], kind="stable")]):
        largest = max(largest, min(1.0, (len(tested) - place) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted


def displayed(frame: pd.DataFrame) -> pd.DataFrame:
    """The summary as text to be read: means with their deviation, units in the columns' names; "–" is no number.

    Columns that no head has a number for are left out.
    """
    text = pd.DataFrame({name: [show(row) for _, row in frame.iterrows()] for name, show in _COLUMNS.items()})
    empty = [name for name in text.columns if (text[name] == NO_NUMBER).all()]
    return text.drop(columns=empty)


def to_markdown(frame: pd.DataFrame) -> str:
    """The summary as a Markdown table, for a README or a log."""
    text = displayed(frame)
    lines = [list(text.columns), ["---" if index == 0 else "---:" for index in range(len(text.columns))]]
    lines += [[str(cell).replace("|", "\\|") for cell in row] for row in text.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(frame: pd.DataFrame, console: Console) -> None:
    """The summary as a table in the terminal; a narrow one shows the columns that matter most."""
    text = displayed(frame)
    if console.width < WIDE_TERMINAL:
        text = text[[name for name in text.columns if name in _NARROW]]
    table = Table(title="± is the standard deviation over seeds", title_justify="left", box=SIMPLE, pad_edge=False)
    for index, name in enumerate(text.columns):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in text.itertuples(index=False):
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


WIDE_TERMINAL = 150
_NARROW = {"head", "seeds", "test perplexity", "vs softmax (lower in)", "p (Holm)", "tokens/s", "rank"}
NO_NUMBER = "–"


def number(value: float, digits: int = 0) -> str:
    """A number with thousands separated by commas, or "–" for NaN."""
    return NO_NUMBER if math.isnan(value) else f"{value:,.{digits}f}"


def perplexity(mean: float, deviation: float = math.nan) -> str:
    """A perplexity to 4 digits or so, with its deviation where there is one.

    >>> perplexity(123.456, 1.234), perplexity(57.078, 0.0912)
    ('123.5 ± 1.2', '57.08 ± 0.09')
    """
    digits = 2 if abs(mean) < 100 else 1
    spread = "" if math.isnan(deviation) or math.isnan(mean) else f" ± {deviation:,.{digits}f}"
    return number(mean, digits) + spread


def probability(p_value: float) -> str:
    """A p-value to 2 digits; "<0.001" below that."""
    return "<0.001" if p_value < 0.001 else number(p_value, 2 if p_value >= 0.1 else 3)


def _difference(row: Any) -> str:
    if math.isnan(row["difference"]):
        return NO_NUMBER
    digits = 2 if abs(row["test_perplexity"]) < 100 else 1
    shown = f"{row['difference']:+,.{digits}f}".replace("-", "−")
    if row["pairs"] == 0:
        return f"{shown} (unpaired)"
    return f"{shown} ({row['wins']:.0f}/{row['pairs']:.0f})"


def _rank_text(value: float) -> str:
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
    "rank": lambda row: _rank_text(row["numerical_rank"]),
    "ε-rank": lambda row: _rank_text(row["effective_rank"]),
    "energy beyond linear": lambda row: _share(row["tail_energy"]),
}

"""The pictures of a comparison: perplexities, learning curves, functions, singular values, frequency deciles."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from uncork.lab.report.function import function_panels
from uncork.lab.report.records import Record
from uncork.lab.report.statistics import baseline
from uncork.lab.report.style import (
    FONT,
    GRID,
    INK,
    MUTED,
    Stroke,
    changes_by_decile,
    frame,
    label_ends,
    label_margin,
    new_axes,
    nice_ticks,
    percent,
    plain_log_ticks,
    shortened,
    strokes,
)
from uncork.lab.report.tables import heads_of, misleading_rank
from uncork.lab.run.store import Run

__all__ = ["Picture", "pictures", "undrawn_functions"]

WIDTH, HEIGHT = 4.6, 3.2
SEED_ALPHA = 0.55
FAR = 1.25  # heads above this multiple of the lowest mean test perplexity do not set a figure's scale
SMALLEST = 1e-18  # singular values below this share of the first are drawn there
STRAIGHT = 0.15  # a function whose slopes differ by less looks like a line: it is described, not drawn
IDENTITY = 0.05  # a line whose slope differs less from 1 is called (nearly) the identity

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Picture:
    """One figure: its file's name, its section, its caption, and a description for readers who cannot see it."""

    name: str
    group: str
    figure: Figure
    caption: str
    description: str


@dataclass(frozen=True)
class _Group:
    """The finished runs of one head, with their analyses (those that have one)."""

    label: str
    runs: list[Run]
    analyses: list[Mapping[str, Any]]
    perplexities: list[float]

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """The analyses that have a function, in the order of the seeds."""
        return [analysis for analysis in self.analyses if analysis.get("function")]

    @property
    def slopes(self) -> tuple[float, float]:
        """The least and the largest slope of its functions over their scores, of all seeds."""
        slopes = np.concatenate([analysis["function"]["slope"] for analysis in self.functions])
        return float(slopes.min()), float(slopes.max())

    @property
    def straight(self) -> bool:
        """Whether all its functions would look like straight lines in a figure."""
        return all(np.ptp(analysis["function"]["slope"]) < STRAIGHT for analysis in self.functions)


@dataclass(frozen=True)
class _Comparison:
    """All heads with finished runs, and how they are drawn.

    Attributes:
        base: the label of the head that all are compared with, finished or not.
        far: labels of the heads so far behind that they do not set the scale of a figure.
    """

    groups: list[_Group]
    style: dict[str, Stroke]
    base: str | None
    far: list[str]

    def among(self, labels: Iterable[str]) -> str:
        """A caption's sentence that names those of `labels` which lie off the scale."""
        far = [label for label in labels if label in self.far]
        return f" Far off, perhaps outside the frame: {', '.join(far)}." if far else ""


class _Curve(NamedTuple):
    """Validation of one head: tokens read in millions (T,), mean minutes (T,), cross-entropies (seeds, T)."""

    tokens: Array
    minutes: Array
    losses: Array


def pictures(records: Sequence[Record], table: pd.DataFrame, summary: pd.DataFrame) -> list[Picture]:
    """Every figure that the finished runs have data for, in the order of the report; [] when none has finished.

    Left out are the singular values if the numerical rank misleads (`misleading_rank`), and functions that look like
    straight lines, which `undrawn_functions` describes.

    Args:
        records: the runs. table, summary: what `runs_table` and `summarise` make of them.
    """
    groups = _groups(records, table)
    if not groups:
        return []
    heads = heads_of(table)
    comparison = _Comparison(groups, strokes(heads), baseline(heads), _far(groups))
    makers = [_perplexities, _curves, _functions, *([] if misleading_rank(summary) else [_singular_values]), _deciles]
    return [picture for make in makers for picture in make(comparison)]


def undrawn_functions(records: Sequence[Record], table: pd.DataFrame) -> list[str]:
    """A sentence for each head whose functions look like straight lines and are therefore not drawn."""
    return [
        f"{group.label} is {_line(*group.slopes)} ({_slope_words(group)}), and not drawn."
        for group in _groups(records, table)
        if group.functions and group.straight
    ]


def _line(low: float, high: float) -> str:
    """The words for a function whose slope lies between `low` and `high`.

    >>> _line(1.0, 1.0), _line(0.98, 1.01), _line(1.3, 1.3), _line(0.9, 1.0)
    ('the identity', 'nearly the identity', 'a straight line', 'nearly a straight line')
    """
    if max(abs(low - 1), abs(high - 1)) < IDENTITY:
        return "the identity" if f"{low:.2f}" == f"{high:.2f}" == "1.00" else "nearly the identity"
    return "a straight line" if f"{low:.2f}" == f"{high:.2f}" else "nearly a straight line"


def _slope_words(group: _Group) -> str:
    low, high = (f"{slope:.2f}" for slope in group.slopes)
    return f"slope {low if low == high else f'from {low} to {high}'}"


def _far(groups: Sequence[_Group]) -> list[str]:
    """Heads so far behind the best that they may lie off the scale; [] unless two others are left to set it."""
    means = {group.label: float(np.mean(group.perplexities)) for group in groups}
    lowest = min((mean for mean in means.values() if math.isfinite(mean)), default=math.nan)
    far = [label for label, mean in means.items() if mean > FAR * lowest]
    return far if len(means) - len(far) >= 2 else []


def _groups(records: Sequence[Record], table: pd.DataFrame) -> list[_Group]:
    found = {(record.label, record.seed): record for record in records}
    groups = []
    for label, own in table[table["done"]].groupby("head", sort=False):
        members = [found[str(label), seed] for seed in own["seed"]]
        analyses = [record.analysis for record in members if record.analysis]
        runs, perplexities = [record.run for record in members], own["test_perplexity"].astype(float).tolist()
        groups.append(_Group(str(label), runs, analyses, perplexities))
    return groups


def _perplexities(comparison: _Comparison) -> list[Picture]:
    """A row a head, the best on top; a dot a seed, an upright stroke at the mean."""
    rows = [group for group in comparison.groups if np.isfinite(group.perplexities).all()]
    if not rows:
        return []
    rows.sort(key=lambda group: -float(np.mean(group.perplexities)))
    short = shortened(group.label for group in rows)
    left = 0.15 + 0.08 * max(map(len, short.values()))
    figure, axes = new_axes(WIDTH, 0.75 + 0.33 * len(rows), xlabel="test perplexity", ylabel="", left=left, right=0.62)
    across = ""
    for row, group in enumerate(rows):
        stroke, mean = comparison.style[group.label], float(np.mean(group.perplexities))
        axes.scatter(group.perplexities, [row] * len(group.perplexities), s=22, color=stroke.color, alpha=SEED_ALPHA,
                     linewidths=0, zorder=3)  # fmt: skip
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color=stroke.color, linewidth=2.4, zorder=4)
        axes.annotate(f"{mean:.{2 if mean < 100 else 1}f}", xy=(1.03, row), xycoords=("axes fraction", "data"),
                      color=stroke.color, fontsize=FONT, va="center", annotation_clip=False)  # fmt: skip
        if group.label == comparison.base:
            axes.axvline(mean, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
            across = f", the dotted line that of {group.label}"
    axes.set_yticks(range(len(rows)), [short[group.label] for group in rows], color=INK)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    near = [value for group in rows if group.label not in comparison.far for value in group.perplexities]
    margin = 0.08 * (max(near) - min(near)) or 0.01 * max(near)
    axes.set_xlim(min(near) - margin, max(near) + margin)
    said = "; ".join(f"{group.label} {float(np.mean(group.perplexities)):.1f}" for group in reversed(rows))
    caption = (
        f"Test perplexity, lower is better. A dot is a seed, the stroke their mean (the number at the right){across}. "
        "A gap smaller than the scatter of the dots counts only if it holds seed by seed, which the table shows."
        + comparison.among(group.label for group in rows)
    )
    return [Picture("perplexity", "result", figure, caption, f"Mean test perplexity: {said}.")]


def _curve(run: Run) -> tuple[Array, Array, Array] | None:
    """Tokens, seconds and validation cross-entropy of a run's evaluations."""
    rows = run.metrics()
    train = [(row["step"], row["seconds"]) for row in rows if row.get("kind") == "train" and "seconds" in row]
    valid = [row for row in rows if row.get("kind") == "valid" and math.isfinite(row.get("perplexity") or math.nan)]
    if len(valid) < 2:
        return None
    tokens = np.array([row["tokens"] for row in valid], dtype=float)
    losses = np.log([row["perplexity"] for row in valid])
    steps, seconds = np.array(train, dtype=float).T if train else (np.zeros(1), np.full(1, np.nan))
    return tokens, np.interp([row["step"] for row in valid], steps, seconds), losses


def _curves(comparison: _Comparison) -> list[Picture]:
    """Validation perplexity against tokens and against seconds, and relative to the baseline's at the same tokens."""
    curves: dict[str, _Curve] = {}
    for group in comparison.groups:
        own = [curve for run in group.runs if (curve := _curve(run)) is not None]
        if own:
            grid = own[0][0][own[0][0] <= min(tokens[-1] for tokens, _, _ in own)]
            seconds = np.mean([np.interp(grid, tokens, times) for tokens, times, _ in own], axis=0)
            losses = np.stack([np.interp(grid, tokens, loss) for tokens, _, loss in own])
            curves[group.label] = _Curve(grid / 1e6, seconds / 60, losses)
    if not curves:
        return []
    heads = ", ".join(curves)
    by_tokens = {label: (curve.tokens, curve.losses) for label, curve in curves.items()}
    caption = (
        "Validation perplexity while training (logarithmic scale, the first part cut off), mean over seeds, shaded "
        "from the lowest seed to the highest. Lines that still fall at the end mean that training was too short."
        + comparison.among(curves)
    )
    result = [
        Picture("curves-tokens", "curves", _draw_curves(by_tokens, comparison, "million tokens read"), caption,
                f"Validation perplexity against tokens read, for {heads}."),
        *_relative_curves(curves, comparison),
    ]  # fmt: skip
    if all(np.isfinite(curve.minutes).all() for curve in curves.values()):
        by_time = {label: (curve.minutes, curve.losses) for label, curve in curves.items()}
        caption = (
            "The same against time. A head that wins by tokens and loses here costs more than it gives. Times of runs "
            "that shared a machine are rough."
        )
        figure = _draw_curves(by_time, comparison, "minutes of training")
        said = f"Validation perplexity against minutes of training, for {heads}."
        result.append(Picture("curves-time", "curves", figure, caption, said))
    return result


def _relative_curves(curves: dict[str, _Curve], comparison: _Comparison) -> list[Picture]:
    base = comparison.base
    others = [label for label in curves if label != base]
    if base is None or base not in curves or not others:
        return []
    softmax = curves[base]
    figure, axes = new_axes(
        WIDTH, HEIGHT, xlabel="million tokens read", ylabel=f"perplexity against {shortened([base])[base]}", left=0.72,
        right=label_margin(others),
    )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=1.2)
    ends, late = [], [0.0]
    for label in others:
        x, stroke = curves[label].tokens, comparison.style[label]
        change = 100 * np.expm1(curves[label].losses.mean(0) - np.interp(x, softmax.tokens, softmax.losses.mean(0)))
        axes.plot(x, change, color=stroke.color, linestyle=stroke.linestyle, linewidth=stroke.linewidth)
        ends.append((float(x[-1]), float(change[-1]), label, stroke.color))
        late += [] if label in comparison.far else change[len(change) // 5 :].tolist()
    frame(axes, late)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    label_ends(figure, axes, ends)
    caption = (
        f"Validation perplexity against that of {base} after the same number of tokens, means over seeds. A head that "
        "only learns faster comes back to the line; a gain that stays level or grows to the end is one that may last."
        + comparison.among(others)
    )
    said = f"Validation perplexity relative to that of {base} while training, for {', '.join(others)}."
    return [Picture("curves-relative", "curves", figure, caption, said)]


def _draw_curves(curves: dict[str, tuple[Array, Array]], comparison: _Comparison, xlabel: str) -> Figure:
    figure, axes = new_axes(
        WIDTH, HEIGHT, xlabel=xlabel, ylabel="validation perplexity", right=label_margin(list(curves))
    )
    lowest, highest = math.inf, 0.0
    for label, (x, losses) in curves.items():
        stroke, mean = comparison.style[label], np.exp(losses.mean(0))
        axes.plot(x, mean, color=stroke.color, linestyle=stroke.linestyle, linewidth=stroke.linewidth)
        axes.fill_between(x, np.exp(losses.min(0)), np.exp(losses.max(0)), color=stroke.color, alpha=0.15, linewidth=0)
        if label in comparison.far:
            continue
        lowest = min(lowest, float(np.exp(losses.min())))
        highest = max(highest, float(mean[min(len(mean) // 3, len(mean) - 2)]))
    axes.set_yscale("log")
    axes.set_ylim(lowest * 0.98, max(highest, lowest * 1.1))
    plain_log_ticks(axes, "y", nice_ticks(lowest, highest) if highest > lowest * 1.05 else [lowest])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ends = [(label, float(x[-1]), float(np.exp(losses.mean(0)[-1]))) for label, (x, losses) in curves.items()]
    label_ends(figure, axes, [(x, y, label, comparison.style[label].color) for label, x, y in ends])
    return figure


def _functions(comparison: _Comparison) -> list[Picture]:
    """One picture a head that has a function: f above, its slope below, over the histogram of the scores."""
    result: list[Picture] = []
    for number, group in enumerate(comparison.groups):
        if not group.functions or group.straight:
            continue
        caption = f"{group.label}: {_slope_words(group)}"
        figure, _, _ = function_panels(group.functions, comparison.style[group.label])
        said = f"The function of {caption} over the range of the scores."
        result.append(Picture(f"function-{number}-{_file_name(group.label)}", "functions", figure, caption, said))
    return result


def _singular_values(comparison: _Comparison) -> list[Picture]:
    curves: dict[str, Array] = {}
    for group in comparison.groups:
        lists = [values for a in group.analyses if (values := (a.get("rank") or {}).get("singular_values"))]
        length = min((len(values) for values in lists), default=0)
        if length > 1 and all(values[0] > 0 for values in lists):
            shares = [np.maximum(np.array(values[:length]) / values[0], SMALLEST) for values in lists]
            curves[group.label] = np.exp(np.mean(np.log(shares), axis=0))
    if not curves:
        return []
    figure, axes = new_axes(
        WIDTH, HEIGHT, xlabel="k", ylabel="k-th singular value / first", left=0.85, right=label_margin(curves)
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for label, values in curves.items():
        stroke = comparison.style[label]
        index = _thinned(len(values))
        axes.plot(index + 1, values[index], color=stroke.color, linestyle=stroke.linestyle,
                  linewidth=stroke.linewidth)  # fmt: skip
    ranks = {(a.get("rank") or {}).get("linear_rank") for group in comparison.groups for a in group.analyses}
    for linear in sorted(rank for rank in ranks if rank):
        axes.axvline(linear, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(f" linear: {linear}", xy=(linear, 0.97), xycoords=("data", "axes fraction"), color=MUTED,
                      fontsize=FONT, va="top")  # fmt: skip
    longest = max(len(values) for values in curves.values())
    plain_log_ticks(axes, "x", [10**power for power in range(len(str(longest)))])
    plain_log_ticks(axes, "y", [10.0**-power for power in range(0, 18, 4)])
    label_ends(
        figure, axes, [(len(v), float(v[-1]), label, comparison.style[label].color) for label, v in curves.items()]
    )
    caption = (
        "Singular values of the log-probability matrix of held-out contexts and all words, in float64, mean over seeds "
        "(both scales logarithmic). A linear softmax must drop to rounding (1e-16) at its dotted line. What a head "
        "adds beyond it counts only as far as it is large: look at the height right of the line, not where it ends."
    )
    said = f"Singular values of the log-probability matrix for {', '.join(curves)}."
    return [Picture("singular-values", "rank", figure, caption, said)]


def _deciles(comparison: _Comparison) -> list[Picture]:
    losses: dict[str, Array] = {}
    for group in comparison.groups:
        rows = [[row.get("cross_entropy") for row in a["deciles"]] for a in group.analyses if a.get("deciles")]
        if rows:
            losses[group.label] = np.array(rows, dtype=float).mean(0)  # None becomes NaN: a tenth without tokens
    base = comparison.base
    others = [label for label in losses if label != base]
    if base is None or base not in losses or not others:
        return []
    changes = {label: losses[label] - losses[base] for label in others}
    figure = changes_by_decile(changes, comparison.style, base=base, far=comparison.far, size=(WIDTH, HEIGHT))
    caption = (
        f"Perplexity against that of {base} on held-out words, by how often the word "
        "stands in training. Words are sorted by frequency and cut into ten parts of equal training tokens; a part "
        "without tokens has no dot. Mean over seeds; below the line is better." + comparison.among(others)
    )
    said = f"Change of perplexity against {base} by word frequency, for {', '.join(others)}."
    return [Picture("deciles", "words", figure, caption, said)]


def _thinned(length: int) -> NDArray[np.int64]:
    """Indices 0 ... length - 1: all of the first 100, then fewer and fewer, as a logarithmic axis shows them."""
    later = np.geomspace(100, max(length - 1, 100), 120)
    return np.unique(np.minimum(np.concatenate([np.arange(100), later]), length - 1).astype(np.int64))


def _file_name(label: str) -> str:
    return "".join(character if character.isascii() and character.isalnum() else "-" for character in label).strip("-")

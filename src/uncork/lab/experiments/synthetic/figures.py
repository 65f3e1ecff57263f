"""The figures of the synthetic experiment: heat maps over M and d, heads side by side, and learned functions.

Every figure but `functions` takes the summary (`tables.summary`). Each head is shown with its commonest settings. What
has no cells is left out; a figure that would be empty raises LabError.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic.panels import (
    draw_legend,
    draw_line,
    head_strokes,
    legend_height,
    make_panels,
    make_points,
    name_y,
    named,
    panel_title,
    slope_scale,
    thin,
    ticks_at_decades,
    title_height,
)
from uncork.lab.experiments.synthetic.tables import (
    NO_KL,
    POINT,
    baseline_of,
    grid,
    head_key,
    head_name,
    head_of,
    num_pieces,
    series_name,
    target_key,
    target_name,
    usual_curves,
    usual_settings,
)
from uncork.lab.report.style import FONT, GRID, INK, MUTED, Stroke, dress, plain_log_ticks
from uncork.lab.report.tables import NO_NUMBER

__all__ = ["by_beta", "by_features", "by_head", "by_pieces", "functions", "heat_maps"]

SMALL = 7.0
DOTTED = (0, (2, 2))
LOWEST = NO_KL / 3  # KL divergences below it are drawn at it

VALUES = LinearSegmentedColormap.from_list("values", ["#f4f7fb", "#9dbfe4", "#2f6cb0", "#12345e"])
RATIOS = LinearSegmentedColormap.from_list("ratios", ["#1d5fa8", "#8fb8e3", "#f7f7f7", "#efb57d", "#b85a06"])
Array = NDArray[np.float64]

# Column of the summary -> (name, unit, decimals, whether higher or lower is better, the column of its ratio).
_MAPPED = {
    "mode_matching": ("Mode matching", "%", 1, "higher", "mode_ratio"),
    "kl": ("KL to the targets", "nats", 3, "lower", "kl_ratio"),
    "cross_entropy": ("Cross-entropy", "nats", 3, "lower", "cross_entropy_ratio"),
}


def heat_maps(frame: pd.DataFrame, head: str, target: str, columns: Sequence[str] = ("mode_matching", "kl")) -> Figure:
    """Three heat maps over M and d in a row: baseline, head, and their ratio head / baseline; one row a measure.

    Args:
        frame: as `summary` returns it. head, target: as the cells write them.
        columns: among mode_matching, kl and cross_entropy.

    Raises:
        LabError: there is no softmax, or the target has no cells, or cells of several numbers of contexts.
    """
    base = baseline_of(frame)
    if base is None:
        raise LabError("heat maps: there is no softmax to compare with")
    height = 0.34 + 0.46 * len(grid(frame, target, head, "kl"))
    figure, panels = make_panels(len(columns), 3, height, left=0.75, gap=0.18, between=0.85, top=0.6)
    for row, column in zip(panels, columns, strict=True):
        name, unit, digits, better, ratio = _MAPPED[column]
        norm = _norm(column, [grid(frame, target, shown, column) for shown in (base, head)])
        for axes, shown in zip(row, (base, head), strict=False):
            _heat_map(axes, *_with_std(frame, target, shown, column), digits, norm, VALUES)
            axes.set_title(head_name(shown), fontsize=FONT, color=INK, pad=5)
        colors = RATIOS if better == "lower" else RATIOS.reversed()
        _heat_map(row[2], *_with_std(frame, target, head, ratio), 2, Normalize(0, 2, clip=True), colors)
        row[2].set_title(f"{head_name(head)} / {head_name(base)}", fontsize=FONT, color=INK, pad=5)
        name_y(row[0], "words M")
        for axes in row[1:]:
            axes.tick_params(labelleft=False)
        heading = f"{name}, {unit} ({better} is better)"
        row[0].annotate(heading, (0, 1), (0, 26), "axes fraction", "offset points", fontsize=FONT + 1, color=INK,
                        fontweight="bold", annotation_clip=False)  # fmt: skip
    for axes in panels[-1]:
        axes.set_xlabel("features d", color=MUTED, fontsize=FONT, labelpad=4)
    contexts = frame.loc[frame["target"] == target, "num_contexts"].iloc[0]
    panels[0][2].annotate(f"{contexts:,} contexts, {target_name(target)}", (1, 1), (0, 26), "axes fraction",
                          "offset points", fontsize=FONT, color=MUTED, ha="right", annotation_clip=False)  # fmt: skip
    return figure


def _with_std(frame: pd.DataFrame, target: str, head: str, column: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    return grid(frame, target, head, column), grid(frame, target, head, f"{column}_std")


def _norm(column: str, tables: Sequence[pd.DataFrame]) -> Normalize:
    """One colour scale for both maps; that of KL divergences, which differ by orders of magnitude, is a square root."""
    values = pd.concat(tables).to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return PowerNorm(0.5, 0, max(high, NO_KL), clip=True) if column == "kl" else Normalize(low, max(high, low + 1e-6))


def _heat_map(
    axes: Axes, means: pd.DataFrame, stds: pd.DataFrame, digits: int, norm: Normalize, colors: Colormap
) -> None:
    """One map: the mean with its deviation below it; a dash where there is none, and nothing where d >= M."""
    values, spreads = means.to_numpy(dtype=float), stds.to_numpy(dtype=float)
    dress(axes)
    axes.imshow(np.ma.masked_invalid(values), cmap=colors, norm=norm, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        value, deviation = float(values[row, column]), float(spreads[row, column])
        if math.isnan(value):
            if means.columns[column] < means.index[row]:
                axes.text(column, row, NO_NUMBER, color=MUTED, fontsize=FONT, ha="center", va="center")
            continue
        red, green, blue, _ = colors(norm(value))
        ink = INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"
        up = 0.0 if math.isnan(deviation) else 0.13
        axes.text(column, row - up, f"{value:z.{digits}f}", color=ink, fontsize=FONT, ha="center", va="center")
        if up:
            text = f"± {deviation:.{digits}f}"
            axes.text(column, row + 0.26, text, color=ink, fontsize=SMALL, ha="center", va="center")
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
    axes.set_xticks(range(len(means.columns)), [f"{d:,}" for d in means.columns])
    axes.set_yticks(range(len(means.index)), [f"{m:,}" for m in means.index])
    axes.hlines(np.arange(len(means.index) - 1) + 0.5, -0.5, len(means.columns) - 0.5, color="white", linewidth=1.5)
    axes.vlines(np.arange(len(means.columns) - 1) + 0.5, -0.5, len(means.index) - 0.5, color="white", linewidth=1.5)


def by_pieces(frame: pd.DataFrame) -> Figure:
    """KL and mode matching against the number of PLIF's pieces, learned and frozen; the horizontal line is softmax."""
    own = usual_settings(frame)
    own = own.assign(pieces=own["head"].map(num_pieces), line=own["head"].map(series_name))
    lines = own[own["pieces"].notna()]
    points = make_points(lines)
    last = lines["head"].map(lambda head: head_of(head).is_control)
    heads = pd.concat([lines[~last], lines[last]]).drop_duplicates("line")
    drawn = head_strokes(heads["head"])
    style = {line: drawn[head] for line, head in zip(heads["line"], heads["head"], strict=True)}
    base = baseline_of(own)

    def across(axes: Axes, point: pd.DataFrame, row: int) -> None:
        here = own.merge(point[POINT].drop_duplicates(), on=POINT)
        for _, cell in here[here["head"] == base].iterrows():
            axes.axhline(cell[("kl", "mode_matching")[row]], color=INK, linewidth=1.2, linestyle=DOTTED)

    figure = _two_rows(points, style, "pieces", {"kl": "KL, nats", "mode_matching": "mode matching, %"}, across, base)
    return figure


def by_beta(frame: pd.DataFrame) -> Figure:
    """KL / the softmax's KL, and mode matching minus the softmax's, against the Dirichlet's β; a line a head."""
    own = usual_settings(frame)
    base = baseline_of(own)
    own = own[own["target"].str.startswith("dirichlet:") & (own["head"] != base) & (own["pairs"] > 0)]
    own = own.assign(beta=own["target"].str.removeprefix("dirichlet:").astype(float), line=own["head"].map(head_name))
    points = make_points(own, by=POINT[1:])

    def across(axes: Axes, _: pd.DataFrame, row: int) -> None:
        axes.axhline((1, 0)[row], color=INK, linewidth=1.2, linestyle=DOTTED)
        if row == 0:
            axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))

    labels = {"kl_ratio": f"KL / {base and head_name(base)}'s KL", "mode_gain": "mode gain, points"}
    return _two_rows(points, named(head_strokes(own["head"])), "beta", labels, across, base)


def _two_rows(
    points: list[tuple[str, pd.DataFrame]],
    style: dict[str, Stroke],
    x: str,
    measures: dict[str, str],
    across: Callable[[Axes, pd.DataFrame, int], None],
    base: str | None,
) -> Figure:
    """A column a point, a row a measure, all against `x`; one line for each name in the points' column `line`.

    `across` draws the horizontal line of `base`, if there is one.
    """
    items = style if base is None else {**style, head_name(base): Stroke(INK, DOTTED, 1.2)}
    figure, panels = make_panels(
        2,
        len(points),
        1.9,
        left=0.8,
        gap=0.55,
        between=0.25,
        top=legend_height(items, len(points)) + title_height(dict(points)),
    )
    every = sorted({float(value) for _, point in points for value in point[x]})
    for (row, column), axes in np.ndenumerate(panels):
        measure, (title, point) = list(measures)[row], points[column]
        dress(axes, xlabel="" if row == 0 else {"beta": "β of the Dirichlet"}.get(x, x))
        axes.set_xscale("log")
        for name, line in point.groupby("line", sort=False):
            draw_line(axes, line.sort_values(x), x, measure, style[str(name)])
        across(axes, point, row)
        ticks_at_decades(axes, every)
        axes.margins(y=0.08)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if row == 0:
            axes.set_title(title, fontsize=FONT, color=INK, pad=6)
            axes.tick_params(labelbottom=False)
        if column == 0:
            name_y(axes, measures[measure])
    draw_legend(figure, items)
    return figure


def by_head(frame: pd.DataFrame) -> Figure:
    """KL and mode matching of every head, with the deviation over seeds, a panel a point; mixtures below the others.

    All panels have the same order of heads: by log KL minus the panel's mean, averaged over the panels.
    """
    own = usual_settings(frame)
    base = baseline_of(own)
    points = make_points(own)
    logs = own.assign(log=np.log(own["kl"].clip(lower=NO_KL)))
    logs["log"] -= logs.groupby(POINT)["log"].transform("mean")
    order = logs.groupby("head")["log"].mean().sort_values()
    heads = sorted((str(head) for head in order.index), key=lambda head: (head_of(head).is_mixture, order[head]))
    plain = sum(not head_of(head).is_mixture for head in heads)
    heights = {head: i + 0.6 * (i >= plain > 0) for i, head in enumerate(heads)}
    style = head_strokes(heads)
    left = 0.25 + 0.075 * max(len(head_name(head)) for head in heads)
    height = 0.3 + 0.2 * len(heads)
    figure, panels = make_panels(
        2, len(points), height, left=left, gap=0.3, between=0.62, top=title_height(dict(points))
    )
    for (row, column), axes in np.ndenumerate(panels):
        measure, (title, point) = ("kl", "mode_matching")[row], points[column]
        dress(axes, xlabel=("KL, nats", "mode matching, %")[row])
        axes.grid(True, axis="x", color=GRID, linewidth=0.7)
        for _, cell in point.iterrows():
            axes.errorbar(cell[measure], heights[cell["head"]], xerr=np.nan_to_num(cell[f"{measure}_std"]), fmt="o",
                          markersize=5, color=style[cell["head"]].color, elinewidth=1.4, capsize=2)  # fmt: skip
        for value in point.loc[point["head"] == base, measure]:
            axes.axvline(value, color=INK, linewidth=1, linestyle=DOTTED, zorder=1)
        axes.margins(x=0.08)
        axes.set_ylim(max(heights.values()) + 0.6, -0.6)
        axes.set_yticks(list(heights.values()), [head_name(head) for head in heads] if column == 0 else [])
        for label in axes.get_yticklabels():
            label.set_color(INK)
        if measure == "kl":
            axes.set_xlim(left=0)
            axes.set_title(title, fontsize=FONT, color=INK, pad=6)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return figure


def by_features(frame: pd.DataFrame) -> Figure:
    """KL against d, a panel a target, a line a head. Below the dotted line at 1e-4 nats a head models the targets.

    A dotted vertical line is at the d that suffices: on targets of known rank for a softmax, on targets of a planted
    head for that head.
    """
    own = usual_settings(frame)
    by = [name for name in POINT if name != "in_features"]
    points = make_points(own, by=by, shown=["target"])
    style = head_strokes(own["head"])
    columns = min(3, len(points))
    rows = math.ceil(len(points) / columns)
    figure, panels = make_panels(
        rows,
        columns,
        2.0,
        left=0.8,
        gap=0.25,
        between=0.75,
        top=legend_height(named(style), columns) + title_height(dict(points)),
    )
    highest = 1.6 * float(own["kl"].max())
    for number, axes in enumerate(panels.flat):
        if number >= len(points):
            axes.remove()
            continue
        title, point = points[number]
        dress(axes, xlabel="features d" if number >= len(points) - columns else "")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for head, line in point.groupby("head", sort=False):
            drawn = line.sort_values("in_features").assign(kl=line["kl"].clip(lower=LOWEST))
            draw_line(axes, drawn, "in_features", "kl", style[str(head)], lowest=LOWEST)
        axes.axhline(NO_KL, color=MUTED, linewidth=1, linestyle=DOTTED)
        if enough := _enough_features(str(point["target"].iloc[0])):
            axes.axvline(enough, color=MUTED, linewidth=1, linestyle=DOTTED, zorder=1)
        axes.set_ylim(LOWEST / 1.6, max(highest, 1e-2))
        plain_log_ticks(axes, "y", [10.0**power for power in range(-4, 2) if 10.0**power <= highest])
        axes.yaxis.set_minor_locator(NullLocator())
        plain_log_ticks(axes, "x", thin(sorted({float(d) for d in point["in_features"]})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelleft=number % columns == 0)
        axes.set_title(title, fontsize=FONT, color=INK, pad=6)
    for axes in panels[:, 0]:
        name_y(axes, "KL, nats")
    draw_legend(figure, named(style))
    return figure


def _enough_features(target: str) -> int | None:
    """The d with which a softmax represents targets of known rank, or a planted head its own; None for others."""
    kind, *rest = target.split(":")
    return max(int(rest[0]) - 1, 1) if kind == "known-rank" else int(rest[1]) if kind == "planted" else None


def functions(outcomes: Sequence[dict[str, Any]], heads: Sequence[str] | None = None) -> Figure:
    """The learned functions: f over the scores, shifted to 0 at their median, and its slope; a column a point.

    Two rows a head, a thin line a seed. Scores begin at their 5 % quantile, below which f is mostly a straight line;
    the middle 98 % of them are shaded, and the identity is dotted. A head has the settings that `usual_curves` chooses.

    Args:
        outcomes: as `cells.run_cell` returns them.
        heads: as the cells write them. None: all that learn a function's shape, which a temperature does not.

    Raises:
        LabError: no cell has such a head.
    """
    found = {key: curves for key, curves in usual_curves(outcomes).items() if _is_shown(key[0], heads)}
    heads = sorted({head for head, _ in found}, key=head_key)
    columns = sorted({point for _, point in found}, key=lambda point: (target_key(point[0]), point[1:]))
    if not heads:
        raise LabError("functions: no cell has a head whose function it could show")
    varying = [name for name, values in zip(POINT, zip(*columns, strict=True), strict=True) if len(set(values)) > 1]
    titles = [
        panel_title(dict(zip(POINT, point, strict=True)), {*varying, "num_words", "in_features"}) for point in columns
    ]
    style = head_strokes(heads)
    figure, panels = make_panels(
        2 * len(heads), len(columns), 1.3, left=0.8, gap=0.5, between=0.3, top=title_height(titles)
    )
    first_in_row = {head: min(columns.index(point) for name, point in found if name == head) for head in heads}
    titled: set[int] = set()
    for (row, column), axes in np.ndenumerate(panels):
        head = heads[row // 2]
        curves = found.get((head, columns[column]), [])
        if not curves:
            axes.remove()
            continue
        dress(axes, xlabel="score z" if row == len(panels) - 1 else "")
        _draw_functions(axes, curves, "slope" if row % 2 else "f", style[head])
        axes.tick_params(labelbottom=row % 2 == 1)
        if column not in titled:
            titled.add(column)
            axes.set_title(titles[column], fontsize=FONT, color=INK, pad=6)
        if column == first_in_row[head]:
            name_y(axes, "slope" if row % 2 else "f(z)")
        if column == first_in_row[head] and row % 2 == 0:
            axes.annotate(head_name(head), (0, 1), (6, -12), "axes fraction", "offset points", fontsize=SMALL + 1,
                          color=style[head].color, fontweight="bold", zorder=5,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})  # fmt: skip
    return figure


def _is_shown(head: str, heads: Sequence[str] | None) -> bool:
    return head_of(head).learns_function if heads is None else head in heads


def _draw_functions(axes: Axes, curves: list[dict[str, Any]], key: str, stroke: Stroke) -> None:
    quantiles = np.array([curve["scores"] for curve in curves]).mean(0)
    low, high = (float(np.interp(share, np.linspace(0, 1, len(quantiles)), quantiles)) for share in (0.01, 0.99))
    axes.axvspan(low, high, color=MUTED, alpha=0.13, linewidth=0)
    values: list[float] = []
    for curve in curves:
        x, y = np.array(curve["x"]), np.array(curve[key])
        median = float(np.median(curve["scores"]))
        y = y - float(np.interp(median, x, y)) if key == "f" else y
        axes.plot(x, y, color=stroke.color, linewidth=1.1, alpha=0.85)
        values += y.tolist()
    if key == "f":
        middle = float(np.median(quantiles))
        axes.axline((middle, 0), slope=1, color=MUTED, linewidth=0.9, linestyle=DOTTED, zorder=1)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        axes.axhline(1, color=MUTED, linewidth=0.9, linestyle=DOTTED)
        slope_scale(axes, np.array(values))
    axes.set_xlim(np.interp(0.05, np.linspace(0, 1, len(quantiles)), quantiles), max(c["x"][-1] for c in curves))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))

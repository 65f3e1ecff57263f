"""Figures of several panels: where the axes lie, lines with deviations, one legend for all."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic.tables import POINT, head_key, head_name, head_of, point_title
from uncork.lab.report.style import FONT, INK, MUTED, Stroke, plain_log_ticks, strokes

WIDTH = 9.0  # inches; at the 900 pixels of a README, text of 9.5 points is 13 pixels high
WIDEST = 3.6  # inches, of one panel


def make_panels(
    rows: int, columns: int, height: float, *, left: float, gap: float, between: float, top: float
) -> tuple[Figure, NDArray[Any]]:
    """A figure with (rows, columns) axes, each `height` inches high.

    Args:
        left, top: margins, in inches. gap: inches between two columns. between: inches between two rows.
    """
    right, bottom = 0.2, 0.5
    width = min(max((WIDTH - left - right - gap * (columns - 1)) / columns, 1.4), WIDEST)
    across = left + right + columns * width + gap * (columns - 1)
    down = top + bottom + rows * height + between * (rows - 1)
    figure = Figure(figsize=(across, down))
    FigureCanvasAgg(figure)
    panels = np.empty((rows, columns), dtype=object)
    for row, column in np.ndindex(rows, columns):
        x, y = left + column * (width + gap), bottom + (rows - 1 - row) * (height + between)
        panels[row, column] = figure.add_axes((x / across, y / down, width / across, height / down))
    return figure, panels


def make_points(
    frame: pd.DataFrame, by: Sequence[str] = tuple(POINT), shown: Iterable[str] = ("num_words", "in_features")
) -> list[tuple[str, pd.DataFrame]]:
    """The title and rows of each point; titles have the fields `shown` and those that differ. LabError for no rows."""
    if frame.empty:
        raise LabError("figure: there is no cell that it could show")
    titles = {*shown, *(name for name in by if frame[name].nunique() > 1)}
    groups = frame.groupby(list(by), sort=False)
    return [(panel_title(dict(group.iloc[0]), titles), group) for _, group in groups]


def panel_title(point: dict[str, Any], shown: Iterable[str]) -> str:
    """`point_title`, the targets on a line of their own.

    >>> panel_title({"target": "sotu", "num_words": 2000, "in_features": 50}, ["target", "num_words"])
    'State of the Union\\nM = 2,000'
    """
    names = set(shown)
    return "\n".join(filter(None, (point_title(point, names & {"target"}), point_title(point, names - {"target"}))))


def title_height(titles: Iterable[str]) -> float:
    """Inches above the panels that their titles need."""
    return 0.2 + 0.16 * max(title.count("\n") + 1 for title in titles)


def head_strokes(heads: Iterable[str]) -> dict[str, Stroke]:
    """A stroke for each head, in the order of tables."""
    return strokes({label: head_of(label).name for label in sorted(set(heads), key=head_key)})


def named(style: dict[str, Stroke]) -> dict[str, Stroke]:
    """The strokes by `head_name` instead of by label."""
    return {head_name(head): stroke for head, stroke in style.items()}


def draw_line(axes: Axes, line: pd.DataFrame, x: str, y: str, stroke: Stroke, lowest: float = -math.inf) -> None:
    """A line through the means, with error bars of one standard deviation that end at `lowest`."""
    means, deviations = line[y].to_numpy(dtype=float), np.nan_to_num(line[f"{y}_std"].to_numpy(dtype=float))
    down = np.minimum(deviations, np.maximum(means - lowest, 0))
    axes.errorbar(line[x].to_numpy(dtype=float), means, yerr=(down, deviations), color=stroke.color, elinewidth=1,
                  linestyle=stroke.linestyle, linewidth=stroke.linewidth, marker="o", markersize=3.5)  # fmt: skip


def ticks_at_decades(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the powers of ten within the values' range, thousands written with k."""
    low, high = math.ceil(math.log10(min(values)) - 1e-9), math.floor(math.log10(max(values)) + 1e-9)
    ticks = [10.0**power for power in range(low, high + 1)] or [values[0]]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}" for tick in ticks])
    axes.set_xlim(min(values) / 1.5, max(values) * 1.5)


def _legend_columns(items: Iterable[str], width: float) -> int:
    return max(1, int((width - 0.5) / (0.6 + 0.075 * max(map(len, items)))))


def legend_height(items: dict[str, Stroke], columns: int) -> float:
    """Inches that the legend needs above this number of columns of panels."""
    width = WIDTH - 0.5 if columns > 1 else WIDEST
    return 0.1 + 0.2 * math.ceil(len(items) / _legend_columns(items, width))


def draw_legend(figure: Figure, items: dict[str, Stroke]) -> None:
    """One legend for all panels, in the margin above them."""
    axes = figure.axes[0]
    lines = [axes.plot([], [], color=stroke.color, linestyle=stroke.linestyle, linewidth=stroke.linewidth)[0]
             for stroke in items.values()]  # fmt: skip
    figure.legend(
        lines, list(items), loc="upper left", ncols=_legend_columns(items, figure.get_figwidth()), frameon=False,
        fontsize=FONT, labelcolor=INK, borderaxespad=0.2, handlelength=2.4, columnspacing=1.4, labelspacing=0.25,
    )  # fmt: skip


def name_y(axes: Axes, text: str) -> None:
    """Labels the y axis, at a fixed distance whatever the width of the ticks' labels."""
    axes.set_ylabel(text, color=MUTED, fontsize=FONT)
    figure = axes.get_figure(root=True)
    width = axes.get_position().width * (figure.get_figwidth() if figure else WIDTH)
    axes.yaxis.set_label_coords(-0.55 / width, 0.5)


def thin(ticks: list[float]) -> list[float]:
    """The ticks at least 25 % above the one before: on a logarithmic axis their labels do not touch."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.25 * kept[-1]:
            kept.append(tick)
    return kept


def slope_scale(axes: Axes, slopes: NDArray[np.float64]) -> None:
    """Scales y for slopes: logarithmic, over four decades at most, if they differ tenfold; else linear from 0."""
    top = float(slopes.max())
    low = max(float(slopes.min()), 1e-4 * top)
    if top <= 10 * low:
        axes.set_ylim(0, 1.08 * max(top, 1.0))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, 1.3 * max(top, 1.0))
    plain_log_ticks(axes, "y", [10.0**power for power in range(-8, 9) if low / 1.3 <= 10.0**power <= 1.3 * max(top, 1)])
    axes.yaxis.set_minor_locator(NullLocator())

"""How the laboratory's figures look: colours, axes, labels at the ends of lines; as PNG, and as SVG inside a page.

Figures are made without pyplot, so nothing global changes. In a page the three neutral colours (text, muted, grid)
become CSS variables, so that a figure follows the page's dark mode. The heads' colours (`HeadSpec.colour`) have a
medium lightness that stands out on white and on black; with the line styles, colour-blind readers can tell them apart.
"""

import html
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from uncork.heads import HEAD_NAMES, HeadSpec
from uncork.lab.run.files import atomic_write_bytes

INK, MUTED, GRID = "#1b1f24", "#6a7280", "#d8dce2"
_CSS = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"}
FONT = 9.5
LONGEST = 22  # most letters of a label in a figure
PNG_DPI = 200

UNKNOWN = "#8a6d5a"  # the colour of a name that is no head's
LineStyle = str | tuple[float, tuple[float, ...]]
_VARIANTS = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Stroke:
    """A head's colour and line."""

    color: str
    linestyle: LineStyle
    linewidth: float


def strokes(heads: Mapping[str, str]) -> dict[str, Stroke]:
    """One stroke for each label. A head has the same colour in every figure; its further labels differ by line style.

    Args:
        heads: the name of the head by the label; names that are no head's have the colour UNKNOWN.
    """
    seen: dict[str, int] = {}
    result = {}
    for label, name in heads.items():
        variant = seen[name] = seen.get(name, -1) + 1
        spec = HeadSpec(name) if name in HEAD_NAMES else None
        style: LineStyle = _VARIANTS[variant % len(_VARIANTS)]
        if variant == 0 and spec and spec.dashes:
            style = (0, spec.dashes)
        result[label] = Stroke(spec.colour if spec else UNKNOWN, style, 2.2 if spec and spec.heavy else 1.6)
    return result


def new_axes(
    width: float,
    height: float,
    *,
    xlabel: str,
    ylabel: str,
    left: float = 0.68,
    right: float = 0.15,
    bottom: float = 0.48,
) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes; `left`, `right`, `bottom` are its margins in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    top = 0.12
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )
    dress(axes, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def dress(axes: Axes, *, xlabel: str = "", ylabel: str = "") -> None:
    """Quiet axes: no box, a grid to read values by, labels in the muted colour."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(True, which="major", axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, labelsize=FONT, length=0, pad=4)
    axes.set_xlabel(xlabel, color=MUTED, fontsize=FONT, labelpad=4)
    axes.set_ylabel(ylabel, color=MUTED, fontsize=FONT, labelpad=4)


def frame(axes: Axes, values: Sequence[float]) -> None:
    """Sets limits of y that hold the values with a small margin."""
    margin = 0.08 * (max(values) - min(values)) or 0.1
    axes.set_ylim(min(values) - margin, max(values) + margin)


def plain_log_ticks(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    """Ticks of a logarithmic axis, written as plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    axis.set_minor_formatter(NullFormatter())


def percent(value: float) -> str:
    """A change in percent with its sign, for an axis.

    >>> percent(2.0), percent(-0.5), percent(0.0)
    ('+2 %', '−0.5 %', '0 %')
    """
    return f"{value:+.4g} %".replace("-", "−") if abs(value) > 1e-9 else "0 %"


def label_margin(labels: Iterable[str]) -> float:
    """Inches that the labels at the ends of the lines need."""
    return 0.3 + 0.082 * max(map(len, shortened(labels).values()), default=0)


def shortened(labels: Iterable[str]) -> dict[str, str]:
    """A short form of each label: its beginning; if two labels begin alike, its beginning and its end.

    >>> shortened(["mos", "softmax (bias_prior=false)", "softmax (bias_prior=false, output_lr_scale=1)"])
    {'mos': 'mos', 'softmax (bias_prior=false)': 'softmax (bi…ior=false)',
     'softmax (bias_prior=false, output_lr_scale=1)': 'softmax (bi…r_scale=1)'}
    """
    whole = list(labels)
    begun = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in whole]
    half = LONGEST // 2
    both = [label if len(label) <= LONGEST else label[:half] + "…" + label[half + 1 - LONGEST :] for label in whole]
    short = {}
    for index, label in enumerate(whole):
        choices = [own[index] for own in (begun, both) if own.count(own[index]) == 1]
        short[label] = next(iter(choices), label)
    return short


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each (x, y, label, colour) to the right of the axes at the height of its line's end, none over another."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    to_axes = axes.transData + axes.transAxes.inverted()
    tips = [to_axes.transform((x, y)).clip(0, 1) for x, y, _, _ in ends]  # a line may end outside the frame
    height_points = axes.get_position().height * figure.get_figheight() * 72
    heights = set_apart([float(tip[1]) for tip in tips], 1.25 * FONT / height_points)
    short = shortened(label for _, _, label, _ in ends)
    for (_, _, label, color), tip, height in zip(ends, tips, heights, strict=True):
        axes.annotate(
            short[label], xy=(tip[0], tip[1]), xytext=(1.045, height), xycoords="axes fraction",
            textcoords="axes fraction", color=color, fontsize=FONT, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def set_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as need be until neighbours are `gap` apart and, if they fit, all in [0, 1].

    >>> set_apart([0.5, 0.5], 0.25)
    [0.375, 0.625]
    """
    groups = [[min(max(height, 0.0), 1.0), 1] for height in heights]  # [centre, members]
    merged: list[list[float]] = []
    for centre, size in groups:
        merged.append([centre, size])
        while len(merged) > 1 and merged[-1][0] - merged[-2][0] < gap * (merged[-1][1] + merged[-2][1]) / 2:
            (low, below), (high, above) = merged[-2:]
            total = below + above
            half = gap * (total - 1) / 2
            centre = (low * below + high * above) / total
            merged[-2:] = [[min(max(centre, half), max(1 - half, half)), total]]
    return [float(centre + gap * (index - (size - 1) / 2)) for centre, size in merged for index in range(int(size))]


def changes_by_decile(
    changes: Mapping[str, NDArray[np.float64]],
    style: Mapping[str, Stroke],
    *,
    base: str,
    far: Collection[str] = (),
    size: tuple[float, float],
) -> Figure:
    """Change of the perplexity against that of `base`, a label, by the frequency of the words.

    Args:
        changes: of the cross-entropy in nats, by label, (10,), a number for each tenth of the tokens; NaN has no dot.
        far: labels that may leave the frame. size: width and height in inches.
    """
    figure, axes = new_axes(
        *size, xlabel="tenth of the tokens, by frequency", ylabel=f"perplexity against {shortened([base])[base]}",
        left=0.88, right=label_margin(list(changes)), bottom=0.62,
    )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=1.2)
    ends, seen = [], [0.0]
    for label, nats in changes.items():
        change, stroke = 100 * np.expm1(nats), style[label]
        finite = np.flatnonzero(np.isfinite(change))
        if not finite.size:
            continue
        axes.plot(finite + 1, change[finite], color=stroke.color, linestyle=stroke.linestyle,
                  linewidth=stroke.linewidth, marker="o", markersize=3)  # fmt: skip
        ends.append((float(finite[-1] + 1), float(change[finite[-1]]), label, stroke.color))
        seen += [] if label in far else change[finite].tolist()
    axes.set_xticks([1, 5, 10], ["1\nmost frequent", "5", "10\nrarest"])
    axes.set_xlim(0.7, 10.3)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    frame(axes, seen)
    label_ends(figure, axes, ends)
    return figure


def to_png(figure: Figure, path: Path) -> None:
    """Write the figure on white as PNG, atomically. Raises LabError when the folder cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white")
    atomic_write_bytes(path, buffer.getvalue())


def to_inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element for a page: no prolog, no metadata, ids that begin with `name`, CSS colours.

    Args:
        name: unique in the page. description: what a reader who cannot see the figure is told.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for color, css in _CSS.items():
        text = text.replace(color, css)
    view = re.search(r'viewBox="([^"]*)"', text)
    box = view[1] if view else "0 0 100 100"
    opening = f'<svg role="img" aria-label="{html.escape(description)}" viewBox="{box}">'
    return re.sub(r"<svg\b[^>]*>", lambda _: opening, text, count=1).strip()


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` round numbers between low and high, evenly spread on a logarithmic axis.

    >>> nice_ticks(120, 400)
    [120, 160, 220, 300, 400]
    """
    raw = np.geomspace(low, high, count)
    step = 10 ** np.floor(np.log10(raw / 10))
    rounded = [float(value) for value in np.round(raw / step) * step]
    return [
        int(tick) if tick == round(tick) else tick
        for tick in dict.fromkeys(rounded)
        if low * 0.99 <= tick <= high * 1.01
    ]

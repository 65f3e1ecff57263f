"""The study's figures: perplexity over d, learned functions and their course in training, words by frequency."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from uncork.diagnose.output_layer import SLOPE_GRID
from uncork.lab.experiments.study.run import Cell
from uncork.lab.experiments.study.tables import Costs, measured_as
from uncork.lab.report.statistics import baseline
from uncork.lab.report.style import (
    FONT,
    GRID,
    INK,
    MUTED,
    changes_by_decile,
    frame,
    label_ends,
    label_margin,
    new_axes,
    percent,
    plain_log_ticks,
    shortened,
    strokes,
)
from uncork.lab.run.rows import Rows

Array = NDArray[np.float64]
_WIDTH, _HEIGHT = 4.6, 3.2
_FAR = 5.0  # percent
_COSTS = {"seconds": "seconds of training, one thread", "bytes": "memory of training, MiB"}


def pictures(cells: Sequence[Cell], rows: Rows, costs: Costs) -> dict[str, Figure]:
    """Every figure that these kept runs have data for, by the name of its file."""
    drawn: dict[str, Figure] = {}
    corpora = list(dict.fromkeys(cell.config.corpus for cell in cells))
    for corpus in corpora:
        own = [cell for cell in cells if cell.config.corpus == corpus]
        if len({cell.d for cell in own}) > 2:
            figure = _over_width(own, rows)
            if figure is not None:
                drawn[f"width-{corpus}"] = figure
    for place in dict.fromkeys(cell.place for cell in cells):
        own = [cell for cell in cells if cell.place == place]
        stem = "".join(c if c.isalnum() else "-" for c in place)
        for make in (_changes, _curves, _deciles, _slopes, _moving):
            figure, name = make(own, rows), make.__name__[1:]
            if figure is not None:
                drawn[f"{name}-{stem}"] = figure
        for name in _COSTS:
            figure = _against_cost(own, rows, costs, name)
            if figure is not None:
                drawn[f"{name}-{stem}"] = figure
    return drawn


def _by_head(cells: Sequence[Cell], rows: Rows) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Rows by head and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault(cell.label, {})[cell.config.seed] = rows[cell.key]
    return found


def _heads(cells: Sequence[Cell]) -> dict[str, str]:
    """The name of each label's head."""
    return {cell.label: cell.config.head for cell in cells}


def _against(base: str) -> str:
    """The label of an axis that shows changes against a baseline."""
    return f"test perplexity against {shortened([base])[base]}"


def _loss(row: Mapping[str, Any]) -> float:
    return math.log(row["result"]["test"]["perplexity"])


def _relative(own: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """The perplexity's change against the baseline of the same seed, in percent, one for each shared seed."""
    return [100 * math.expm1(_loss(own[seed]) - _loss(base[seed])) for seed in own if seed in base]


def _mean(changes: Sequence[float]) -> float:
    """The mean of changes in percent, taken over log perplexity as in the tables."""
    return 100 * math.expm1(float(np.log1p(np.array(changes) / 100).mean()))


def _over_width(cells: Sequence[Cell], rows: Rows) -> Figure | None:
    """Test perplexity against the baseline's, over d: a dot a seed, a line through the means."""
    widths = sorted({cell.d for cell in cells})
    found = {d: _by_head([c for c in cells if c.d == d], rows) for d in widths}
    heads = _heads(cells)
    base = baseline(heads)
    if base is None:
        return None
    labels = [label for label in heads if label != base]
    figure, axes = new_axes(
        _WIDTH, _HEIGHT, xlabel="features d of the output layer", ylabel=_against(base), left=0.88,
        right=label_margin(labels),
    )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=1.2)
    style, ends, values = strokes(heads), [], [0.0]
    for label in labels:
        points = {
            d: changes
            for d in widths
            if label in found[d] and base in found[d]
            and (changes := _relative(found[d][label], found[d][base]))
        }  # fmt: skip
        if not points:
            continue
        stroke, means = style[label], [_mean(changes) for changes in points.values()]
        axes.plot(list(points), means, color=stroke.color, linestyle=stroke.linestyle, linewidth=stroke.linewidth)
        for d, changes in points.items():
            axes.scatter([d] * len(changes), changes, s=14, color=stroke.color, alpha=0.5, linewidths=0)
        ends.append((float(list(points)[-1]), means[-1], label, stroke.color))
        values += itertools.chain.from_iterable(points.values())
    axes.set_xscale("log")
    plain_log_ticks(axes, "x", widths)
    return _percent_axes(figure, axes, values, ends)


def _percent_axes(figure: Figure, axes: Axes, values: Sequence[float], ends: Any) -> Figure:
    frame(axes, values)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    label_ends(figure, axes, ends)
    return figure


def _changes(cells: Sequence[Cell], rows: Rows) -> Figure | None:
    """A row a head, the best on top: a dot a seed at its change against the baseline of that seed, a bar at the mean.

    Heads that end further than _FAR percent away may lie outside the frame; their mean is written beside it.
    """
    heads = _by_head(cells, rows)
    base = baseline(_heads(cells))
    if len(heads) < 2 or base is None or len(heads[base]) < 2:
        return None
    changes = {label: _relative(own, heads[base]) for label, own in heads.items() if label != base}
    means = {label: _mean(found) for label, found in changes.items() if found}
    order = sorted(means, key=means.__getitem__, reverse=True)
    left = 0.15 + label_margin(order) - 0.3
    figure, axes = new_axes(_WIDTH, 0.75 + 0.33 * len(order), xlabel=_against(base), ylabel="",
                            left=left, right=0.78)  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1.2)
    style = strokes(_heads(cells))
    for place, label in enumerate(order):
        color, found = style[label].color, changes[label]
        axes.scatter(found, [place] * len(found), s=22, color=color, alpha=0.5, linewidths=0, zorder=3)
        axes.plot([means[label]] * 2, [place - 0.3, place + 0.3], color=color, linewidth=2.4, zorder=4)
        axes.annotate(percent(round(means[label], 1)), xy=(1.04, place), xycoords=("axes fraction", "data"),
                      color=color, fontsize=FONT, va="center", annotation_clip=False)  # fmt: skip
    near = [0.0, *(change for label in order if abs(means[label]) < _FAR for change in changes[label])]
    margin = 0.06 * (max(near) - min(near)) or 0.1
    axes.set_xlim(min(near) - margin, max(near) + margin)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_yticks(range(len(order)), order, color=INK)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    return figure


def _curves(cells: Sequence[Cell], rows: Rows) -> Figure | None:
    """Validation perplexity over epochs, mean over seeds, and a dot where each seed was best."""
    heads = _by_head(cells, rows)
    figure, axes = new_axes(
        _WIDTH, _HEIGHT, xlabel="epochs", ylabel="validation perplexity", right=label_margin(list(heads))
    )
    style, ends, low, high = strokes(_heads(cells)), [], [], []
    for label, by_seed in heads.items():
        histories = [np.array(row["history"]).T for row in by_seed.values()]
        end = min(epochs[-1] for epochs, _ in histories)
        grid = histories[0][0][histories[0][0] <= end + 1e-9]
        mean = np.exp(np.mean([np.interp(grid, epochs, losses) for epochs, losses in histories], axis=0))
        stroke = style[label]
        axes.plot(grid, mean, color=stroke.color, linestyle=stroke.linestyle, linewidth=stroke.linewidth)
        best = [(epochs[losses.argmin()], float(np.exp(losses.min()))) for epochs, losses in histories]
        axes.scatter([x for x, _ in best], [y for _, y in best], s=16, color=stroke.color, alpha=0.6, linewidths=0)
        ends.append((float(grid[-1]), float(mean[-1]), label, stroke.color))
        low.append(min(y for _, y in best))
        high.append(float(mean[len(mean) // 4]))
    axes.set_ylim(0.985 * min(low), max(np.median(high), 1.1 * min(low)))
    axes.set_xlim(left=0)
    label_ends(figure, axes, ends)
    return figure


def _against_cost(cells: Sequence[Cell], rows: Rows, costs: Costs, name: str) -> Figure | None:
    """Test perplexity over what the training costs, one of _COSTS: a dot a seed, a bar for the mean."""
    names = _heads(cells)
    keys = {label: (cells[0].place, measured_as(label, name)) for label, name in names.items()}
    heads = {label: own for label, own in _by_head(cells, rows).items() if keys[label] in costs}
    if len(heads) < 2:
        return None
    figure, axes = new_axes(
        _WIDTH, _HEIGHT, xlabel=_COSTS[name], ylabel="test perplexity", right=label_margin(list(heads))
    )  # fmt: skip
    style, ends, values = strokes(names), [], list[float]()
    for label, by_seed in heads.items():
        cost, color = costs[keys[label]], style[label].color
        results = [row["result"] for row in by_seed.values()]
        x = cost["peak_mib"]
        if name == "seconds":
            x = 1e-3 * cost["milliseconds"] / cost["tokens"] * results[0]["tokens"]
        found = [result["test"]["perplexity"] for result in results]
        mean = math.exp(float(np.mean(np.log(found))))
        axes.scatter([x] * len(found), found, s=14, color=color, alpha=0.5, linewidths=0)
        axes.scatter([x], [mean], s=90, color=color, marker="_", linewidths=2)
        ends.append((x, mean, label, color))
        values += found
    frame(axes, values)
    axes.set_xlim(0, 1.04 * max(x for x, *_ in ends))  # autoscaling would magnify tiny differences
    label_ends(figure, axes, ends)
    return figure


def _deciles(cells: Sequence[Cell], rows: Rows) -> Figure | None:
    """Change of perplexity against the baseline of the same seeds, by the words' frequency in training."""
    losses = {
        label: {seed: np.array([part["cross_entropy"] for part in row["analysis"]["deciles"]], dtype=float)
                for seed, row in by_seed.items()}
        for label, by_seed in _by_head(cells, rows).items()
    }  # fmt: skip
    base = baseline(_heads(cells))
    if base is None:
        return None
    softmax = losses.pop(base)
    changes = {
        label: np.mean([own[seed] - softmax[seed] for seed in shared], axis=0)
        for label, own in losses.items()
        if (shared := own.keys() & softmax.keys())
    }
    if not changes:
        return None
    return changes_by_decile(changes, strokes(_heads(cells)), base=base, size=(_WIDTH, _HEIGHT))


def _slopes(cells: Sequence[Cell], rows: Rows) -> Figure | None:
    """f' over the scores for every head that learns f, one line a seed; bars below span 5 to 95 % of the scores (thin)
    and of the correct words' scores (thick).

    Scores include the head's fixed factor and slopes are divided by it: the identity has slope 1 for every head.
    """
    heads = {
        label: [row for row in by_seed.values() if row["slopes"]] for label, by_seed in _by_head(cells, rows).items()
    }
    heads = {label: own for label, own in heads.items() if own}
    if not heads:
        return None
    figure, axes = new_axes(_WIDTH, _HEIGHT, xlabel="score z", ylabel="slope f'(z)", right=label_margin(list(heads)))
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
    style, ends, top = strokes(_heads(cells)), [], [1.0]
    for place, (label, own) in enumerate(heads.items()):
        factor = _factor(own[0])
        for row in own:
            function, quantiles = row["analysis"]["function"], row["analysis"]["scores"]
            x, slope = np.array(function["x"]), np.array(function["slope"])
            seen = (x >= quantiles["0.001"]) & (x <= row["analysis"]["target_scores"]["0.99"])
            x, slope = factor * x[seen], slope[seen] / factor
            axes.plot(x, slope, color=style[label].color, linewidth=1.2, alpha=0.75)
            top.append(float(slope.max()))
        ends.append((float(x[-1]), float(slope[-1]), label, style[label].color))
        for quantiles, width in ((own[0]["analysis"]["scores"], 1.0), (own[0]["analysis"]["target_scores"], 2.6)):
            axes.plot(
                [factor * quantiles["0.05"], factor * quantiles["0.95"]], [0.04 + 0.05 * place] * 2, linewidth=width,
                color=style[label].color, solid_capstyle="butt", transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    axes.set_ylim(0, 1.08 * max(top))
    label_ends(figure, axes, ends)
    return figure


def _factor(row: Mapping[str, Any]) -> float:
    """The fixed factor on the scores, or the starting value of a learned one."""
    options = row["config"].get("head_options", {})
    return float(options.get("scale", 1)) * float(options.get("factor", 1))


def _moving(cells: Sequence[Cell], rows: Rows) -> Figure | None:
    """f' at a few scores over the epochs, one line a seed: shows when PLIF changes. Scores are those of `_slopes`.

    Of several PLIFs only the first is drawn; the axis has its label.
    """
    learned = [cell for cell in cells if cell.config.head == "plif" and rows[cell.key]["slopes"]]
    own = [rows[cell.key] for cell in learned if cell.label == learned[0].label]
    if not own:
        return None
    figure, axes = new_axes(_WIDTH, _HEIGHT, xlabel="epochs", ylabel=f"slope f'(z) of {learned[0].label}", right=0.75)
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
    ends = []
    shades = {-8: "#b8cfea", -4: "#7fa9dd", 0: "#2878d4", 4: "#1c5596", 8: "#0e2f57"}
    factor = _factor(own[0])
    for score, color in shades.items():
        if score / factor not in SLOPE_GRID:
            continue
        at = SLOPE_GRID.index(int(score / factor))
        for row in own:
            epochs = [0.0, *(epoch for epoch, _ in row["history"])]
            axes.plot(epochs, [1.0, *(s[at] / factor for s in row["slopes"])], color=color, linewidth=1.2, alpha=0.8)
        ends.append((epochs[-1], own[-1]["slopes"][-1][at] / factor, f"z = {score}".replace("-", "−"), color))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=FONT)
    label_ends(figure, axes, ends)
    return figure

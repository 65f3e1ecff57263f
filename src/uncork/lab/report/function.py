"""The picture of a function on the logits, over the scores that it is applied to."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from uncork.diagnose.output_layer import describe_function
from uncork.heads import Head
from uncork.lab.report.style import FONT, INK, MUTED, Stroke, dress, new_axes, strokes
from uncork.logit_functions import LogitFunction

__all__ = ["draw_function", "function_panels"]


def draw_function(
    head: Head | LogitFunction, features: Tensor | None = None, *, scores: Tensor | None = None
) -> Figure:
    """A learned function drawn over the histogram of the scores that it is applied to.

        f(z) - f(0) above and f'(z) below,   z = W h + b

    The dashed line is the identity, of slope 1; the histogram is that of the scores, with logarithmic heights. Upright
    lines stand where the pieces of PLIF (or the thresholds of the network) end, with the share of scores beyond them,
    where the function goes on with its last slope: where that is much, a wider `bound` is worth a try.

    Args:
        head: a head with a function, mixtures included; a Hugging Face model's is `model.get_output_embeddings()` after
            `attach_head`. Or a LogitFunction.
        features: (..., D) what the head receives; the scores of 200 of these contexts are taken, evenly spread.
        scores: (...), in place of features.

    Returns:
        The matplotlib figure; a notebook shows it, and `figure.savefig("function.png", dpi=200)` keeps it.

    Raises:
        TypeError, ValueError: as `uncork.diagnose.output_layer.describe_function`.

    >>> import torch
    >>> from uncork import build_head
    >>> figure = draw_function(build_head("plif", 16, 1000, bound=1.0), torch.randn(50, 16))
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['f(z)', 'slope']
    """
    described = describe_function(head, features, scores=scores)
    figure, upper, lower = function_panels([described], strokes({"plif": "plif"})["plif"], (5.6, 4.6))
    figure.set_facecolor("white")
    low, high = upper.get_xlim()
    for end in described["bound"] or ():
        if end is not None and low < end < high:
            for axes in (upper, lower):
                axes.axvline(end, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if described["beyond"] is not None:
        ends = [f"{end:.4g}".replace("-", "−") if end is not None else "none" for end in described["bound"]]
        upper.annotate(f"{100 * described['beyond']:.2g} % of the scores\nbeyond {ends[0]} and {ends[1]}",
                       xy=(0.02, 0.97), xycoords="axes fraction", color=MUTED, fontsize=FONT, va="top")  # fmt: skip
    lower.annotate("slope 1", xy=(high, 1), xytext=(-2, 2), textcoords="offset points", color=MUTED, fontsize=FONT - 1,
                   ha="right", va="bottom")  # fmt: skip
    return figure


def function_panels(
    analyses: Sequence[Mapping[str, Any]], stroke: Stroke, size: tuple[float, float] = (3.4, 3.9)
) -> tuple[Figure, Axes, Axes]:
    """f above, over the histogram of the scores, and its slope below; dashed, the identity.

    Args:
        analyses: what `describe_head` or `describe_function` says, a line each. size: width and height in inches.
    """
    figure, upper = new_axes(*size, xlabel="", ylabel="f(z)", left=0.66, right=0.12)
    box = upper.get_position()
    upper.set_position((box.x0, box.y0 + 0.3 * box.height, box.width, 0.7 * box.height))
    lower = figure.add_axes((box.x0, box.y0, box.width, 0.24 * box.height), sharex=upper)
    dress(lower, xlabel="score z", ylabel="slope")
    upper.tick_params(labelbottom=False)
    first = analyses[0]["function"]["x"]
    upper.plot([first[0], first[-1]], [first[0], first[-1]], color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
    lower.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
    for analysis in analyses:
        function = analysis["function"]
        for axes, key in ((upper, "y"), (lower, "slope")):
            axes.plot(function["x"], function[key], color=stroke.color, linewidth=1.4,
                      alpha=1 if len(analyses) == 1 else 0.7)  # fmt: skip
    upper.set_xlim(first[0], first[-1])
    _draw_histogram(upper, analyses[0].get("histogram") or {})
    for axes, count in ((upper, 5), (lower, 3)):
        axes.yaxis.set_major_locator(MaxNLocator(count, steps=[1, 2, 5, 10]))
    lower.set_ylim(bottom=0)
    return figure, upper, lower


def _draw_histogram(axes: Axes, histogram: Mapping[str, Any]) -> None:
    """The scores' histogram in the lower third, with logarithmic heights, under everything else."""
    low, high = axes.get_ylim()
    if histogram.get("counts"):
        heights = np.log1p(np.array(histogram["counts"], dtype=float))
        tops = low + 0.35 * (high - low) * heights / max(float(heights.max()), 1e-12)
        axes.stairs(tops, histogram["edges"], baseline=low, fill=True, color=MUTED, alpha=0.25, zorder=0)
    targets = histogram.get("target_quantiles") or {}
    if {"0.05", "0.5", "0.95"} <= set(targets):
        height = low + 0.02 * (high - low)
        axes.plot([targets["0.05"], targets["0.95"]], [height, height], color=INK, linewidth=2.2, solid_capstyle="butt")
        axes.plot([targets["0.5"]], [height], marker="o", markersize=4.5, color=INK)
    axes.set_ylim(low, high)

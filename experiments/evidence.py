"""Draws docs/evidence.png from results/: `python experiments/evidence.py`, seconds.

What an output layer changes in test perplexity, in percent, against the softmax of the same seeds, with the 95 %
interval of the paired t-test on log perplexity; the language-model study on one page (docs/study.md).
"""

from pathlib import Path

import pandas as pd
from matplotlib.ticker import FuncFormatter

from uncork.heads import HeadSpec
from uncork.lab.report.statistics import BASELINE, paired
from uncork.lab.report.style import FONT, GRID, INK, MUTED, new_axes, percent, to_png

ROOT = Path(__file__).resolve().parent.parent
MIXTURE = "mos (of all 128 units)"
LOOKUP = "a vector a context, d = 8"
LSTM = "an LSTM below, d = 16"
# (group, what is written, the head whose colour it has, results/FOLDER, head, control)
ROWS = (
    (LOOKUP, "softmax, d = 10", "softmax", "lookup/heads", "softmax (d = 10)", BASELINE),
    (LOOKUP, "a fixed softcap of 10", "softcap", "lookup/heads", "softcap", BASELINE),
    (LOOKUP, "PLIF", "plif", "lookup/heads", "plif", BASELINE),
    (LOOKUP, "mixture of four softmaxes", "mos", "lookup/heads", "mos", BASELINE),
    (LSTM, "PLIF", "plif", "lm/fair-final", "plif", BASELINE),
    (LSTM, "PLIF, softmax of its time", "plif", "lm/fair-time", "plif", "softmax (6 epochs)"),
    (LSTM, "mixture of wider features", "mos", "lm/mixed", MIXTURE, BASELINE),
    (LSTM, "mixture, softmax of its time", "mos", "lm/mixed", MIXTURE, "softmax (12 epochs)"),
)
MARKERS = {"sotu": "o", "ptb": "s"}
NAMES = {"sotu": "sotu", "ptb": "Penn Treebank"}
APART = 0.17  # of the two texts of a row


def main() -> None:
    """One row a comparison, one mark a text."""
    figure, axes = new_axes(6.8, 3.6, xlabel="test perplexity against the softmax", ylabel="", left=2.15, bottom=0.5)
    axes.axvline(0, color=INK, linewidth=1.2)
    height, heights, before = 0.0, [], ""
    for group, _, named, folder, head, control in ROWS:
        if group != before:
            height -= 0.9
            axes.annotate(group, xy=(-2.05 / 4.5, height), xycoords=("axes fraction", "data"), color=MUTED,
                          fontsize=FONT, va="center", annotation_clip=False)  # fmt: skip
            before = group
        height -= 0.9
        heights.append(height)
        runs = pd.read_csv(ROOT / "results" / folder / "runs.csv")
        for corpus, side in (("sotu", APART), ("ptb", -APART)):
            own = runs[runs["corpus"] == corpus].set_index("seed")
            perplexity = {name: own.loc[own["head"] == name, "test_perplexity"] for name in (head, control)}
            both, color = paired(perplexity[head], perplexity[control]), HeadSpec(named).colour
            axes.plot(both.interval_percent, [height + side] * 2, color=color, linewidth=1.6, zorder=3)
            axes.scatter([both.change_percent], [height + side], s=24, marker=MARKERS[corpus], zorder=4,
                         facecolor=color if corpus == "sotu" else "white", edgecolor=color, linewidths=1.4)  # fmt: skip
            print(f"{group}: {head} against {control}, {corpus}, {both.pairs} seeds: {both.change_percent:+.2f} % "
                  "({:+.2f} to {:+.2f})".format(*both.interval_percent))  # fmt: skip
    for corpus, marker in MARKERS.items():
        axes.scatter([], [], s=24, marker=marker, facecolor=MUTED if corpus == "sotu" else "white", edgecolor=MUTED,
                     linewidths=1.4, label=NAMES[corpus])  # fmt: skip
    axes.legend(loc="upper left", frameon=False, fontsize=FONT, labelcolor=MUTED, handletextpad=0.2, borderpad=0)
    axes.set_yticks(heights, [words for _, words, *_ in ROWS], color=INK)
    axes.set_ylim(height - 0.6, -0.5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    to_png(figure, ROOT / "docs" / "evidence.png")


if __name__ == "__main__":
    main()

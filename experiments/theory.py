"""Draws the figures of docs/theory.md: `python experiments/theory.py`, about three minutes on one core.

It measures everything anew, writes docs/theory-*.png, and the numbers behind them to results/theory/*.csv, each row
with its seed. Ranks are those of matrices in float64. Legend: N contexts, V words, D features, P pieces.
"""

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from uncork import PLIF, Sigsoftmax, Softcap, functional, linear_cross_entropy
from uncork.diagnose.rank import effective_rank, numerical_rank, singular_values, tail_energy
from uncork.diagnose.reachability import reachable_words
from uncork.lab.report.publish import publish
from uncork.lab.report.style import FONT, INK, MUTED, dress, label_ends, new_axes, plain_log_ticks, strokes, to_png
from uncork.lab.run.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "results" / "theory"
F64 = torch.float64
WIDTH, HEIGHT = 4.9, 3.3
DOTTED = (0, (2, 2))
COLOURS = ("#2878d4", "#e0730a", "#00967f", "#c63d8f", "#9a5fe0")

# The polynomials: N = V = SIZE.
SIZE, DEGREES = 400, {1: 12, 2: 12, 3: 10, 5: 8, 10: 6}
# The spectra: N = V contexts and words of SPECTRUM_D features, scores of standard deviation SPREAD.
SPECTRUM_N, SPECTRUM_D, SPREAD, COMPONENTS = 300, 16, 2.0, 4
# The pieces: N = V = PIECES_N, random scores with the same spread.
PIECES, PIECES_N, PIECES_D, EPS, SEEDS, STEPS = (10, 100, 1000, 10_000, 100_000), 200, 5, 1e-3, 3, 500
RANDOM, LEARNED, BOTH = "random, untrained", "trained from identity", "trained from random"
# The words: V -> features.
WORDS = {100: (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15), 1000: (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25)}
CIRCLE = "on a circle"


def normal(rows: int, features: int, *, spread: float = 1.0) -> Tensor:
    return torch.randn(rows, features, dtype=F64) * spread


def polynomial(z: Tensor, degree: int) -> Tensor:
    """A random polynomial of the degree, each of whose parts is about as large as the others at standard normal z.

    A sum of Hermite polynomials He_k / sqrt(k!), which are orthonormal there: with powers of z the smallest of the
    singular values that theory counts would be lost in rounding.
    """
    previous, current = torch.zeros_like(z), torch.ones_like(z)
    total = torch.zeros_like(z)
    for k in range(degree + 1):
        total += (1 + torch.rand((), dtype=F64)) / math.sqrt(math.factorial(k)) * current
        previous, current = current, z * current - k * previous
    return total


def polynomial_ranks() -> pd.DataFrame:
    """One row a degree and d: the numerical rank of log Q under a polynomial, and theorem 2's bound."""
    rows = []
    for d, highest in DEGREES.items():
        for degree in range(1, highest + 1):
            torch.manual_seed(seed := 100 * d + degree)
            scores = normal(SIZE, d) @ normal(SIZE, d, spread=d**-0.5).T
            rank = numerical_rank(polynomial(scores, degree).log_softmax(-1))
            row = {"d": d, "degree": degree, "seed": seed, "contexts": SIZE, "words": SIZE, "rank": rank}
            rows.append({**row, "bound": min(math.comb(d + degree, degree), SIZE)})
    return pd.DataFrame(rows)


def spectra() -> pd.DataFrame:
    """The singular values of log Q at random parameters, one row a head and index."""
    torch.manual_seed(0)
    n, d = SPECTRUM_N, SPECTRUM_D
    w = normal(n, d, spread=SPREAD * d**-0.5)
    scores = normal(n, d) @ w.T  # (N, V)
    latent = normal(n, COMPONENTS * d).unflatten(-1, (COMPONENTS, d))  # independent contexts, as wide as the other's
    heads = {
        "softmax": scores.log_softmax(-1),
        "sigsoftmax": Sigsoftmax()(scores).log_softmax(-1),
        "softcap": Softcap(15.0)(scores).log_softmax(-1),
        "plif (10 pieces)": PLIF(10, init="random").double()(scores).log_softmax(-1),
        "plif (100,000)": PLIF(100_000, init="random").double()(scores).log_softmax(-1),
        "mos": functional.mixture_log_softmax(latent @ w.T, normal(n, COMPONENTS)),
    }
    frames = [
        pd.DataFrame({"head": name, "seed": 0, "k": range(1, n + 1), "singular_value": singular_values(log_prob)})
        for name, log_prob in heads.items()
    ]
    return pd.concat(frames, ignore_index=True)


def slope_variance() -> float:
    """Of softplus(v), v ~ N(log(e - 1), 1): the published start."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    slopes = np.logaddexp(0, points + math.log(math.e - 1))
    return float(np.average(slopes**2, weights=weights) - np.average(slopes, weights=weights) ** 2)


def random_start(num_pieces: int) -> tuple[Tensor, float]:
    """log Q (N, V) of a PLIF with random slopes on random scores, and theorem 6's bound on its tail's mean energy."""
    scores = normal(PIECES_N, PIECES_D) @ normal(PIECES_N, PIECES_D, spread=SPREAD * PIECES_D**-0.5).T
    function = PLIF(num_pieces, init="random").double()
    width = 2 * function.bound / num_pieces
    longest = max(width, float(scores.abs().max()) - function.bound + width)  # the last piece goes on beyond T
    return function(scores).log_softmax(-1), slope_variance() * longest * float(scores.abs().sum())


def trained(num_pieces: int, start: str) -> Tensor:
    """log Q (N, V), float64, after contexts, words and PLIF were trained on N Dirichlet distributions (beta = 0.01)."""
    target = torch.distributions.Dirichlet(torch.full((PIECES_N,), 0.01, dtype=F64)).sample((PIECES_N,)).float()
    h = torch.randn(PIECES_N, PIECES_D, requires_grad=True)
    w = torch.randn(PIECES_N, PIECES_D, requires_grad=True)
    function = PLIF(num_pieces, init=start)
    optimizer = torch.optim.Adam([h, w, *function.parameters()], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        linear_cross_entropy(h, w, target, logit_function=function).backward()
        optimizer.step()
        schedule.step()
    return function.double()(h.detach().double() @ w.detach().double().T).log_softmax(-1)


def piece_ranks() -> pd.DataFrame:
    """One row a number of pieces, kind of parameters and seed: effective rank and tail energy of log Q."""
    rows = []
    for num_pieces in PIECES:
        for seed in range(SEEDS):
            for kind in (RANDOM, LEARNED, BOTH):
                torch.manual_seed(seed)
                bound = math.nan
                if kind == RANDOM:
                    log_prob, bound = random_start(num_pieces)
                else:
                    log_prob = trained(num_pieces, "identity" if kind == LEARNED else "random")
                values = singular_values(log_prob)
                row = {"pieces": num_pieces, "kind": kind, "seed": seed, "numerical_rank": numerical_rank(log_prob)}
                row |= {"effective_rank": effective_rank(values, EPS), "tail": tail_energy(values, PIECES_D + 1)}
                rows.append({**row, "bound": bound / float(values.square().sum())})
    return pd.DataFrame(rows)


def reachable_shares() -> pd.DataFrame:
    """One row a set of words: how many of them are the likeliest word of some context."""
    rows = []
    for count, sizes in WORDS.items():
        angle = torch.arange(count, dtype=F64) * (2 * math.pi / count)
        sets = [(CIRCLE, 2, 0, torch.stack([angle.cos(), angle.sin()], -1))]
        for d in sizes:
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                sets.append(("random", d, seed, normal(count, d)))
        for kind, d, seed, words in sets:
            rows.append(
                {"words": count, "kind": kind, "d": d, "seed": seed, "reachable": int(reachable_words(words).sum())}
            )
    return pd.DataFrame(rows)


def draw_polynomial(frame: pd.DataFrame) -> Figure:
    figure, axes = new_axes(WIDTH, HEIGHT, xlabel="degree p of the polynomial", ylabel="rank of log Q", right=0.75)
    axes.set_yscale("log")
    ends = []
    for color, (d, rows) in zip(COLOURS, frame.groupby("d"), strict=True):
        axes.plot(rows["degree"], rows["bound"], color=color, linewidth=1.2)
        axes.plot(rows["degree"], rows["rank"], color=color, linestyle="", marker="o", markersize=5)
        ends.append((float(rows["degree"].iloc[-1]), float(rows["bound"].iloc[-1]), f"d = {d}", color))
    axes.axhline(SIZE, color=MUTED, linewidth=0.9, linestyle=DOTTED)
    axes.annotate(f"N = V = {SIZE}", (1, SIZE * 1.06), color=MUTED, fontsize=FONT, va="bottom")
    axes.set(ylim=(1.6, SIZE * 1.7), xlim=(0.6, 12.4), xticks=range(1, 13))
    plain_log_ticks(axes, "y", [2, 5, 10, 20, 50, 100, 200, 400])
    label_ends(figure, axes, ends)
    return figure


def draw_spectra(frame: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(frame["head"]))
    style = strokes({name: name.split(" (")[0] for name in names})  # as `spectra` calls them
    figure, axes = new_axes(5.4, 3.5, xlabel="k", ylabel="k-th singular value of log Q / first", left=0.78, right=1.5)
    axes.set(yscale="log", xlim=(-4, SPECTRUM_N), ylim=(1e-9, 3), xticks=(1, 50, 100, 150, 200, 250, 300))
    axes.axvline(SPECTRUM_D + 1, color=MUTED, linewidth=0.9, linestyle=DOTTED)
    axes.annotate(f" d + 1 = {SPECTRUM_D + 1}", (SPECTRUM_D + 1, 0.3), color=MUTED, fontsize=FONT, va="center")
    ends = []
    for name in names:
        values = frame.loc[frame["head"] == name, "singular_value"].to_numpy()
        shares, stroke = values / values[0], style[name]
        axes.plot(range(1, len(shares) + 1), shares, color=stroke.color, linestyle=stroke.linestyle,
                  linewidth=stroke.linewidth)  # fmt: skip
        if shares[-1] > 1e-12:
            ends.append((float(len(shares)), float(shares[-1]), name, stroke.color))
        else:  # below the frame
            words = f"{name} goes on at {shares[SPECTRUM_D + 1]:.0e}: rounding"
            axes.annotate(words, (SPECTRUM_D + 8, 1.6e-9), color=stroke.color, fontsize=FONT, va="bottom")
    axes.set_yticks([10.0**-power for power in range(0, 9, 2)], ["1", *(f"1e-{power}" for power in range(2, 9, 2))])
    axes.minorticks_off()
    label_ends(figure, axes, ends)
    return figure


def draw_pieces(frame: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(9.2, 3.4))
    left, right = figure.add_axes((0.065, 0.15, 0.32, 0.8)), figure.add_axes((0.475, 0.15, 0.32, 0.8))
    dress(left, xlabel="pieces P", ylabel=f"effective rank, ε = {EPS:g}")
    dress(right, xlabel="pieces P", ylabel=f"share of the energy beyond rank {PIECES_D + 1}")
    ends = []
    for color, (kind, rows) in zip(("#e0730a", "#2878d4", "#9a5fe0"), frame.groupby("kind", sort=False), strict=True):
        for axes, column in ((left, "effective_rank"), (right, "tail")):
            axes.plot(rows["pieces"], rows[column], color=color, linestyle="", marker="o", markersize=4, alpha=0.55)
            mean = rows.groupby("pieces")[column].mean()
            axes.plot(mean.index, mean, color=color, linewidth=1.8)
        ends.append((float(mean.index[-1]), float(mean.iloc[-1]), str(kind), color))
    bound = frame[frame["kind"] == RANDOM].groupby("pieces")["bound"].mean()
    right.plot(bound.index, bound, color=INK, linewidth=1.2, linestyle="--")
    ends.append((float(bound.index[-1]), float(bound.iloc[-1]), "theorem 6, random", INK))
    left.axhline(PIECES_D + 1, color=MUTED, linewidth=0.9, linestyle=DOTTED)
    left.annotate(
        f"d + 1 = {PIECES_D + 1}", (330, PIECES_D + 1), (0, -5), textcoords="offset points", color=MUTED, fontsize=FONT,
        ha="center", va="top",
    )  # fmt: skip
    left.set_ylim(0, 86)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(PIECES, ["10", "100", "1,000", "10,000", "100,000"])
        axes.minorticks_off()
    right.set_yscale("log")
    label_ends(figure, right, ends)
    return figure


def draw_reachable(frame: pd.DataFrame) -> Figure:
    figure, axes = new_axes(WIDTH, HEIGHT, xlabel="d", ylabel="words that can be the likeliest", left=0.8, right=0.95)
    ends = []
    for color, count in zip(COLOURS, WORDS, strict=False):
        rows = frame[(frame["kind"] == "random") & (frame["words"] == count)]
        share = 100 * rows["reachable"] / count
        axes.plot(rows["d"], share, color=color, linestyle="", marker="o", markersize=4, alpha=0.55)
        mean = share.groupby(rows["d"]).mean()
        axes.plot(mean.index, mean, color=color, linewidth=1.8)
        ends.append((float(mean.index[-1]), float(mean.iloc[-1]), f"V = {count:,}", color))
    circle = frame[frame["kind"] == CIRCLE]
    share = 100 * circle["reachable"].to_numpy() / circle["words"].to_numpy()
    axes.plot(circle["d"], share, color=INK, linestyle="", marker="*", markersize=10)
    axes.annotate("d = 2, on a circle (both V)", (2, 105), color=INK, fontsize=FONT, va="bottom")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.set(xlim=(0, 26), ylim=(-3, 114), xticks=(1, 5, 10, 15, 20, 25), yticks=range(0, 101, 20))
    label_ends(figure, axes, ends)
    return figure


FIGURES = {
    "polynomial": (polynomial_ranks, draw_polynomial),
    "spectra": (spectra, draw_spectra),
    "pieces": (piece_ranks, draw_pieces),
    "reachable": (reachable_shares, draw_reachable),
}


def main() -> None:
    """Measures, draws, and keeps the numbers."""
    torch.set_num_threads(1)
    tables = {}
    for name, (measure, draw) in FIGURES.items():
        began = time.perf_counter()
        with torch.set_grad_enabled(name == "pieces"):
            tables[name] = measure()
        to_png(draw(tables[name]), DOCS / f"theory-{name}.png")
        print(f"theory-{name}.png: {time.perf_counter() - began:.0f} s", flush=True)
    origin = provenance("python experiments/theory.py", 1, seeds="in each row of the tables")
    origin["versions"] |= {"numpy": np.__version__, "scipy": scipy.__version__}
    publish(RESULTS, tables, origin)


if __name__ == "__main__":
    main()

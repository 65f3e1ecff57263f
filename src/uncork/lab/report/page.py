"""The report of a comparison: one page that needs nothing but itself, its numbers as CSV, its figures as PNG."""

import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from uncork.lab.report.figures import Picture, pictures
from uncork.lab.report.findings import caveats, control_sentence, headline
from uncork.lab.report.style import to_inline_svg, to_png
from uncork.lab.report.summary import BASELINE, displayed, run_analysis, run_labels, runs_table, settings_of, summarise
from uncork.lab.run.files import atomic_write_text, os_errors
from uncork.lab.run.store import Run

__all__ = ["write_report"]

_KEY = {
    "test, valid perplexity": "mean over seeds ± sample standard deviation; per word of the corpus",
    "vs softmax (lower in)": "difference of test perplexity, mean over the seeds that both have; in how many lower",
    "p (Holm)": "paired t-test over seeds on log-perplexity (the cross-entropy), from 5 seeds on, Holm-corrected",
    "of the head": "parameters of the output layer alone",
    "tokens/s, peak MiB": "median training speed and largest memory of the process; rough where runs share a machine",
    "rank": "numerical rank of log Q (held-out contexts × words), computed in float64; it counts any size",
    "ε-rank": "singular values that hold all but ε = 1e-4 of the sum of squares: the rank by size",
    "energy beyond linear": "share of the squared singular values beyond what a linear softmax can have",
}
_SECTIONS = (
    ("result", "one", "Test perplexity", ""),
    ("functions", "small", "What the functions do to the scores",
     "An increasing function never changes which word is likeliest; it changes how likely. Above, f(z) for each seed, "
     "moved to f(0) = 0, over the identity (dashed) and the histogram of the scores z of all words (first seed, "
     "logarithmic heights); the bar at the bottom spans 5 to 95 % of the correct words' scores, the dot is the median. "
     "Below, the slope f′: above 1 it enlarges differences between words, and the same everywhere it is only a "
     "temperature."),
    ("curves", "", "While training", ""),
    ("inside", "", "Where the difference lies", ""),
)  # fmt: skip
_PLACE = {"rank": "inside", "words": "inside"}


def write_report(out_dir: Path, runs: Sequence[Run], *, title: str, command: str, notes: Sequence[str] = ()) -> Path:
    """Write report.html, table.csv, runs.csv and figures/*.png into `out_dir`, and return the page's path.

    The page loads nothing: style and figures are inside it. Runs without a result are listed as not finished and
    counted nowhere. Old figures of an earlier report are removed.

    Args:
        out_dir: made where it is missing. runs: of one comparison; none at all gives a page that says so.
        title: what was compared. command: the command line that made it, shown as it is.
        notes: further limits or remarks, a sentence each.

    Raises:
        LabError: a file cannot be written, a run is damaged, or two runs have the same head, settings and seed.
    """
    summary, table, drawn = summarise(runs), runs_table(runs), pictures(runs)
    figures = out_dir / "figures"
    with os_errors(figures, "cannot be used as output folder"):
        figures.mkdir(parents=True, exist_ok=True)
        for old in figures.glob("*.png"):
            old.unlink()
    for picture in drawn:
        to_png(picture.figure, figures / f"{picture.name}.png")
    atomic_write_text(out_dir / "table.csv", summary.drop(columns="name", errors="ignore").to_csv(index=False))
    atomic_write_text(out_dir / "runs.csv", table.drop(columns=["done", "name"]).to_csv(index=False))
    sections = [
        _table_section(summary),
        *_picture_sections(drawn),
        _section("Set-up", _setup(runs)),
        _section("Runs", _runs(table)),
        _section("How to reproduce", _reproduction(runs, command)),
        _section("Limits", _list([*notes, *_limits(runs)])),
    ]
    controls = control_sentence(summary, table)
    page = Template(resources.files("uncork.lab.report").joinpath("template.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        headline=html.escape(headline(summary)),
        controls=f'<p class="controls">{html.escape(controls)}</p>' if controls else "",
        caveats=_caveats(caveats(summary, table)),
        sections="\n".join(section for section in sections if section),
        footer='Numbers: <a href="table.csv">table.csv</a>, <a href="runs.csv">runs.csv</a>. '
        "Figures: the folder <code>figures</code>. Written by uncork.",
    )
    path = out_dir / "report.html"
    atomic_write_text(path, page)
    return path


def _section(heading: str, body: str) -> str:
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{body}\n</section>" if body else ""


def _caveats(sentences: Sequence[str]) -> str:
    return f'<div class="caveats" role="note">\n{_list(sentences)}\n</div>' if sentences else ""


def _list(items: Iterable[str]) -> str:
    lines = [f"<li>{html.escape(item)}</li>" for item in items]
    return "<ul>\n" + "\n".join(lines) + "\n</ul>" if lines else ""


def _table_section(summary: pd.DataFrame) -> str:
    if summary.empty:
        return ""
    means = summary["test_perplexity"]
    best = int(means.argmin()) if means.notna().any() else None
    text = displayed(summary)
    columns = " / ".join(text.columns)
    key = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>"
        for name, meaning in _KEY.items()
        if any(part.strip() in columns for part in name.split(",")[-1:])
    )
    caption = (
        "One row an output layer; what does not stand in its brackets is equal for all. The lowest mean test "
        "perplexity is shaded."
    )
    for base in summary[summary["baseline"]]["head"]:
        own = "the softmax without settings of its own" if base == BASELINE else "the first softmax"
        caption += f" The others are compared with {base}, {own}."
    return _section(
        "The numbers", _table(text, caption, "Comparison of output layers", best) + f'\n<dl class="key">{key}</dl>'
    )


def _table(text: pd.DataFrame, caption: str, label: str, best: int | None = None) -> str:
    """A table in a box that scrolls by itself; the keyboard can scroll it too."""
    head = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in text.columns)
    rows = []
    for index, cells in enumerate(text.itertuples(index=False)):
        first, *rest = (html.escape(str(cell)) for cell in cells)
        shade = ' class="best"' if index == best else ""
        data = "".join(f"<td>{cell}</td>" for cell in rest)
        rows.append(f'<tr{shade}><th scope="row">{first}</th>{data}</tr>')
    return (
        f'<div class="scroll" role="region" aria-label="{html.escape(label)}" tabindex="0">\n<table>\n'
        f"<caption><span>{html.escape(caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n</table>\n</div>"
    )


def _picture_sections(drawn: Sequence[Picture]) -> list[str]:
    sections = []
    for group, layout, heading, intro in _SECTIONS:
        own = [picture for picture in drawn if _PLACE.get(picture.group, picture.group) == group]
        if own:
            figures = "\n".join(_figure(picture) for picture in own)
            words = f'<p class="intro">{html.escape(intro)}</p>\n' if intro else ""
            sections.append(_section(heading, f'{words}<div class="pictures {layout}">\n{figures}\n</div>'))
    return sections


def _figure(picture: Picture) -> str:
    svg = to_inline_svg(picture.figure, picture.name, picture.description)
    return f"<figure>\n{svg}\n<figcaption>{html.escape(picture.caption)}</figcaption>\n</figure>"


def _setup(runs: Sequence[Run]) -> str:
    """The settings that all runs share, and those of each head that differ."""
    if not runs:
        return ""
    flat = [settings_of(run.config) for run in runs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    everywhere = [key for key in keys if all(key in config for config in flat)]  # null is a setting too
    common = {key: flat[0][key] for key in everywhere if all(config[key] == flat[0][key] for config in flat)}
    shown = {key: value for key, value in common.items() if value is not None}
    body = "<p>The same for every run:</p>\n" + _settings(shown) if shown else ""
    own: dict[str, str] = {}
    for label, config in zip(run_labels(runs), flat, strict=True):
        differs = {key: config[key] for key in keys if key not in common and key in config}
        own[label] = ", ".join(f"{key} = {_value(value)}" for key, value in differs.items())
    named = {label: text for label, text in own.items() if text}
    if named:
        body += "\n<p>Of one output layer alone:</p>\n" + _settings(named)
    return body


def _settings(values: dict[str, Any]) -> str:
    rows = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(_value(value))}</dd>" for key, value in values.items())
    return '<dl class="settings">\n' + "\n".join(rows) + "\n</dl>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _runs(table: pd.DataFrame) -> str:
    if table.empty:
        return ""
    shown = table[["run", "head", "seed", "state"]].astype(str)
    for name in ("valid_perplexity", "test_perplexity"):
        shown[name.replace("_", " ")] = [_decimal(value, 2) for value in table[name]]
    shown["best step"] = [_decimal(value, 0) for value in table["best_step"]]
    shown["steps"] = [_decimal(value, 0) for value in table["steps"]]
    shown["minutes"] = [_decimal(value / 60, 1) for value in table["train_seconds"]]
    caption = "Every run. What is not finished counts nowhere."
    return _table(shown, caption, "All runs")


def _decimal(value: float, digits: int) -> str:
    return "–" if pd.isna(value) else f"{value:,.{digits}f}"


def _reproduction(runs: Sequence[Run], command: str) -> str:
    results = [result for run in runs if (result := run.result)]
    body = f"<pre><code>{html.escape(command)}</code></pre>" if command else ""
    facts: dict[str, set[str]] = {}
    for result in results:
        for name, version in (result.get("versions") or {}).items():
            facts.setdefault(name, set()).add(str(version))
        for name in ("machine", "threads", "loss"):
            if result.get(name) is not None:
                facts.setdefault(name, set()).add(str(result[name]))
    return body + (
        "\n" + _settings({name: ", ".join(sorted(values)) for name, values in facts.items()}) if facts else ""
    )


def _limits(runs: Sequence[Run]) -> list[str]:
    """What holds for every report, and what these runs' measurements cannot tell."""
    results = [result for run in runs if (result := run.result)]
    limits = [
        "One corpus, one backbone and one setting of the optimiser: another may order the output layers otherwise.",
        "± is the spread over seeds of one set-up, not an error of the method.",
    ]
    if len({(result.get("machine"), result.get("threads")) for result in results}) > 1:
        limits.append("The runs were made on different machines or thread counts: their speeds do not compare.")
    contexts = {(run_analysis(run) or {}).get("rank", {}).get("contexts") for run in runs if run.result} - {None}
    if contexts:
        limits.append(
            f"Ranks are of {' or '.join(f'{count:,}' for count in sorted(contexts))} held-out contexts and cannot "
            "exceed that number; a numerical rank says nothing about the size of what was added."
        )
    return limits

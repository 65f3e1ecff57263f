"""The report of a comparison: one self-contained page, its numbers as CSV, its figures as PNG."""

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from uncork.lab.report.figures import Picture, pictures, undrawn_functions
from uncork.lab.report.findings import caveats, control_sentence, headline, rank_sentence, verdict
from uncork.lab.report.records import Record
from uncork.lab.report.statistics import BASELINE
from uncork.lab.report.style import to_inline_svg, to_png
from uncork.lab.report.tables import display, number, runs_table, summarise
from uncork.lab.run.files import atomic_write_text, os_errors

__all__ = ["write_report"]

_KEY = {
    "test perplexity": "per word of the corpus, as the valid one: mean over seeds ± sample standard deviation",
    "vs softmax (lower in)": "difference of test perplexity, mean over shared seeds; in brackets, how often lower",
    "p (Holm)": "paired t-test over seeds on log-perplexity (the cross-entropy), from 5 seeds on, Holm-corrected",
    "of the head": "parameters of the output layer alone",
    "tokens/s": "median training speed; rough where runs share a machine",
    "peak MiB": "largest memory of the process; rough where runs share a machine",
    "rank": "numerical rank of log Q (held-out contexts × words) in float64: all singular values above rounding count",
    "ε-rank": "the rank of log Q (held-out contexts × words) by size: as many singular values hold all but ε = 1e-4 of "
    "the sum of squares",
    "energy beyond linear": "share of the squared singular values beyond what a linear softmax can have",
}
_FUNCTIONS = (
    "An increasing function never changes which word is likeliest; it changes how likely. Above, f(z) for each seed, "
    "moved to f(0) = 0, over the identity (dashed) and the histogram of the scores z of all words (first seed, "
    "logarithmic heights); the thick line at the bottom spans 5 to 95 % of the correct words' scores, the dot is the "
    "median. Below, the slope f′: above 1 it enlarges differences between words, and the same everywhere it is only a "
    "temperature."
)


class _Section(NamedTuple):
    """Pictures under one heading. text: paragraphs before them."""

    heading: str
    pictures: Sequence[Picture]
    text: Sequence[str] = ()
    small: bool = False


def write_report(
    out_dir: Path, records: Sequence[Record], *, title: str, command: str, notes: Sequence[str] = ()
) -> Path:
    """Write report.html, table.csv, runs.csv and figures/*.png into `out_dir`, and return the page's path.

    The page loads nothing: style and figures are inside it. Runs without a result are listed as not finished and
    counted nowhere. Old figures of an earlier report are removed.

    Args:
        out_dir: made where it is missing. records: of one comparison; none at all gives a page that says so.
        title: what was compared. command: the command line that made it, shown as it is.
        notes: further limits or remarks, a sentence each.

    Raises:
        LabError: a file cannot be written, or two runs have the same head, settings and seed.
    """
    table = runs_table(records)
    summary = summarise(table)
    drawn = pictures(records, table, summary)
    figures = out_dir / "figures"
    with os_errors(figures, "cannot be used as output folder"):
        figures.mkdir(parents=True, exist_ok=True)
        for old in figures.glob("*.png"):
            old.unlink()
    for picture in drawn:
        to_png(picture.figure, figures / f"{picture.name}.png")
    atomic_write_text(out_dir / "table.csv", summary.drop(columns="name", errors="ignore").to_csv(index=False))
    atomic_write_text(out_dir / "runs.csv", table.drop(columns=["done", "name"]).to_csv(index=False))
    shared, own = _setup(records)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = _svg
    template = resources.files("uncork.lab.report").joinpath("template.html").read_text("utf-8")
    page = environment.from_string(template).render(
        title=title,
        verdict=verdict(summary, table),
        headline=headline(summary),
        controls=control_sentence(summary, table),
        caveats=caveats(summary, table),
        numbers=display(summary) if len(summary) else None,
        caption=_caption(summary),
        best=_best(summary),
        key=_key(summary),
        sections=_sections(drawn, undrawn_functions(records, table)),
        shared=shared,
        own=own,
        runs=_runs(table) if len(table) else None,
        command=command,
        facts=_facts(records),
        limits=[*notes, *_limits(records)],
    )
    path = out_dir / "report.html"
    atomic_write_text(path, page)
    return path


def _svg(picture: Picture) -> Markup:
    return Markup(to_inline_svg(picture.figure, picture.name, picture.description))


def _best(summary: pd.DataFrame) -> int | None:
    """The row of the lowest mean test perplexity; None where a head has one seed, and the lowest may be chance."""
    if summary.empty or not (summary["seeds"] != 1).all() or not summary["test_perplexity"].notna().any():
        return None
    return int(summary["test_perplexity"].argmin())


def _caption(summary: pd.DataFrame) -> str:
    caption = "One row an output layer; settings that are not in its brackets are the same for all."
    if _best(summary) is not None:
        caption += " The lowest mean test perplexity is shaded."
    for base in summary[summary["baseline"]]["head"] if len(summary) else ():
        own = "the softmax without settings of its own" if base == BASELINE else "the first softmax"
        caption += f" The others are compared with {base}, {own}."
    return caption


def _key(summary: pd.DataFrame) -> dict[str, str]:
    """What the columns of the table mean, and why one is missing."""
    if summary.empty:
        return {}
    shown = display(summary).columns
    key = {name: meaning for name, meaning in _KEY.items() if name in shown}
    missing = rank_sentence(summary)
    return key | ({"rank": missing} if missing else {})


def _sections(drawn: Sequence[Picture], undrawn: Sequence[str]) -> list[_Section]:
    def of(*groups: str) -> list[Picture]:
        return [picture for picture in drawn if picture.group in groups]

    functions = of("functions")
    told = [_FUNCTIONS] if functions else ["An increasing function never changes which word is likeliest."]
    sections = [
        _Section("Perplexity at the end and while training", of("result", "curves")),
        _Section("What the functions do to the scores", functions, [*told, *undrawn], small=True),
        _Section("Where the difference lies", of("rank", "words")),
    ]
    return [section for section in sections if section.pictures or (section.small and undrawn)]


def _setup(records: Sequence[Record]) -> tuple[dict[str, str], dict[str, str]]:
    """The settings that all runs share, as text by name; and the settings that differ, as text by label."""
    flat = [record.settings for record in records]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    everywhere = [key for key in keys if all(key in settings for settings in flat)]  # null is a setting too
    common = {key: flat[0][key] for key in everywhere if all(settings[key] == flat[0][key] for settings in flat)}
    own = {}
    for record in records:
        differs = {key: record.settings[key] for key in keys if key not in common and key in record.settings}
        own[record.label] = ", ".join(f"{key} = {_value(value)}" for key, value in differs.items())
    shared = {key: _value(value) for key, value in common.items() if value is not None}
    return shared, {label: text for label, text in own.items() if text}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _runs(table: pd.DataFrame) -> pd.DataFrame:
    shown = table[["run", "head", "seed", "state"]].astype(str)
    for name in ("valid_perplexity", "test_perplexity"):
        shown[name.replace("_", " ")] = [number(value, 2) for value in table[name]]
    shown["best step"] = [number(value) for value in table["best_step"]]
    shown["steps"] = [number(value) for value in table["steps"]]
    shown["minutes"] = [number(value / 60, 1) for value in table["train_seconds"]]
    return shown


def _facts(records: Iterable[Record]) -> dict[str, str]:
    """Versions, machine, threads and implementation of the loss, of all the finished runs."""
    facts: dict[str, set[str]] = {}
    for result in (record.result for record in records if record.result):
        named = {name: result.get(name) for name in ("machine", "threads", "loss")}
        for name, value in {**(result.get("versions") or {}), **named}.items():
            if value is not None:
                facts.setdefault(name, set()).add(str(value))
    return {name: ", ".join(sorted(values)) for name, values in facts.items()}


def _limits(records: Sequence[Record]) -> list[str]:
    """The limits of every report, and those of these runs' measurements."""
    results = [record.result for record in records if record.result]
    limits = [
        "One corpus, one backbone and one setting of the optimiser: another may order the output layers otherwise.",
        "± is the standard deviation over seeds of one set-up, not an error of the method.",
    ]
    if len({(result.get("machine"), result.get("threads")) for result in results}) > 1:
        limits.append("The runs were made on different machines or thread counts: their speeds do not compare.")
    ranks = [(record.analysis or {}).get("rank") or {} for record in records]
    contexts = {int(rank["contexts"]) for rank in ranks if rank.get("contexts")}
    if contexts:
        limits.append(
            f"Ranks are of {' or '.join(f'{count:,}' for count in sorted(contexts))} held-out contexts and cannot "
            "exceed that number; a numerical rank says nothing about the size of what was added."
        )
    return limits

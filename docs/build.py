"""Writes the tables of README.md and docs/ from results/, all of docs/study-tables.md, and checks relative links.

A block between `<!-- results: FOLDER -->` and `<!-- end -->` is replaced by the table of results/FOLDER/table.csv and
the command that made it; `<!-- results: FOLDER NAME -->` takes NAME.csv, or what DERIVED makes of the folder's rows,
without the command. With --check nothing is written, and a stale block, a dead link or text shown as code fails.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from uncork.lab.experiments.study.plan import Plan
from uncork.lab.report.statistics import BASELINE, MIN_SEEDS_FOR_TEST, paired
from uncork.lab.report.tables import NO_NUMBER, display, markdown, number, perplexity

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "docs" / "study-tables.md"
PAGES = [TABLES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if page != TABLES]
BLOCK = re.compile(r"(<!-- results: (\S+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
INTRODUCTION = """\
All tables of [study.md](study.md), which says what was asked and found, and of [its appendix](study-appendix.md), which
has protocols and details. `make docs` writes them from results/lm.
One row a head, one column a place: the perplexity (of the test split where the part reads it, else of the validation
split), its standard deviation over seeds and, in brackets, its change against the softmax of the same seeds with the
p-value of a two-sided paired t-test on log perplexity.
"""
COSTS = {
    "cost-study": "what a training step costs in the study's own models, one thread",
    "cost": "what a training step costs at the published sizes, two threads",
}
MORE = {
    "verdict": 'The tests of the protocol. "Lower in" counts seeds, "Holm" corrects for all controls of a place:',
    "columns": 'The columns of Parthiban et al. (2021). "Rank" is that of the log-probabilities of 500 test contexts\n'
    'in float64, "ε-rank" how many singular values hold all but 1e-4 of the energy:',
}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def change(mine: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """The change of the test perplexity in percent, and its interval of 95 % over the seeds that both have.

    The interval is that of the paired t-test on log perplexity, for one comparison. It needs as many seeds as the test.
    """
    both = paired(*(runs.set_index("seed")["test_perplexity"] for runs in (mine, theirs)))
    if not both.pairs or mine["head"].iloc[0] == theirs["head"].iloc[0]:
        return NO_NUMBER
    middle = f"{both.change_percent:+z.2f}"
    if both.pairs >= MIN_SEEDS_FOR_TEST:
        low, high = both.interval_percent
        middle += f" ({low:+z.2f}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high:+z.2f})"
    return middle.replace("-", "−")


def intervals(where: Path) -> pd.DataFrame:
    """One row a head, the highest test perplexity first: at every place with enough seeds for a test of the softmax."""
    runs = pd.read_csv(where / "runs.csv")
    table = pd.DataFrame()
    for place, own in runs.groupby("place", sort=False):
        by_head = dict(iter(own.groupby("head")))
        if len(by_head[BASELINE]) < MIN_SEEDS_FOR_TEST:
            continue
        for head, its in by_head.items():
            text = str(place).split()[0]
            for split in ("train", "test"):
                table.loc[head, f"{text}: {split}"] = perplexity(its[f"{split}_perplexity"].mean())
            table.loc[head, f"{text}: test, % from softmax"] = change(its, by_head[BASELINE])
    first = runs[runs["place"] == runs["place"].iloc[0]].groupby("head")["test_perplexity"].mean()
    order = first.sort_values(ascending=False).index
    return table.reindex(order.union(table.index, sort=False)).fillna(NO_NUMBER).rename_axis("head").reset_index()


def times(where: Path) -> pd.DataFrame:
    """One row a head and place: its median seconds of training beside its perplexities."""
    rows = []
    runs = pd.read_csv(where / "runs.csv")
    for (place, head), own in runs.groupby(["place", "head"], sort=False):
        base = runs[(runs["place"] == place) & (runs["head"] == BASELINE)]
        row = {"place": place, "head": head, "seeds": len(own), "epochs": number(own["epochs"].iloc[0])}
        row["seconds"] = number(own["train_seconds"].median())
        row |= {split: perplexity(own[f"{split}_perplexity"].mean()) for split in ("train", "test")}
        rows.append(row | {"test, % from softmax": change(own, base)})
    return pd.DataFrame(rows)


def grid(where: Path) -> pd.DataFrame:
    """The baseline's validation perplexities, over the rate of the output layer, at the best rate of the body."""
    cells = {}
    for row in pd.read_csv(where / "table.csv", dtype=str).itertuples(index=False):
        options = dict(option.split("=") for option in row[0].partition(":")[2].split(","))
        if options["lr"] == "0.008":
            bias = "log unigram" if options["bias_prior"] == "true" else "random"
            cells[bias, options["scale"], f"rate of W, b x {options['output_lr_scale']}"] = row[1]
    table = pd.Series(cells).unstack(sort=False)
    return table.rename_axis(["bias", "scores times"]).reset_index()


def steps(where: Path) -> pd.DataFrame:
    """Seconds of a training step over the fused softmax's: the study's own models, then the published sizes."""
    tables = [pd.read_csv(where / name / "table.csv", index_col="head", dtype=str) for name in COSTS]
    ratios = [table.filter(like="over softmax").rename(columns=lambda c: c.partition(":")[0]) for table in tables]
    ratios[1].columns = [f"{name} d=400" for name in ratios[1]]
    table = pd.concat(ratios, axis=1).map(lambda cell: cell.partition(" ")[0])
    return table.reset_index()


def far(where: Path) -> pd.DataFrame:
    """PLIF beside the softmax with and without weight decay: one row a place, changes with their range over seeds."""
    rows = []
    for place, own in pd.read_csv(where / "runs.csv").groupby("place", sort=False):
        found = own.pivot(index="seed", columns="head", values="test_perplexity")
        softmaxes = [head for head in found if str(head).startswith(BASELINE)]
        row = {"place": place} | {str(head): perplexity(found[head].mean()) for head in (*softmaxes, "plif")}
        logs = found.apply(np.log)
        rows.append(row | {f"plif, % from {head}": spread(logs["plif"] - logs[head]) for head in softmaxes})
    return pd.DataFrame(rows)


def spread(ratios: Any) -> str:
    """The mean of changes that are given as logarithms, in percent, and the least and the largest."""
    middle, low, high = (f"{100 * math.expm1(ratio):+z.2f}" for ratio in (ratios.mean(), ratios.min(), ratios.max()))
    return f"{middle} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})".replace("-", "−")


DERIVED = {"intervals": intervals, "times": times, "grid": grid, "steps": steps, "far": far}


def block(folder: str, name: str | None = None) -> str:
    """The table of one result and its origin; with a name that table alone."""
    where = ROOT / "results" / folder
    if name in DERIVED:
        return plain_markdown(DERIVED[name](where)) + "\n"
    if name is not None:
        return plain_markdown(pd.read_csv(where / f"{name}.csv", dtype=str, na_filter=False)) + "\n"
    origin = json.loads((where / "provenance.json").read_text(encoding="utf-8"))
    frame = pd.read_csv(where / "table.csv")
    of_text = "test_perplexity" not in frame
    if of_text:
        table = plain_markdown(pd.read_csv(where / "table.csv", dtype=str, na_filter=False))
    else:
        table = markdown(display(frame.assign(baseline=frame["head"] == BASELINE)))
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        f"{table.strip()}\n\n```\n{origin['command']}\n```\n"
        f"Commit {origin['commit'][:10]}, {origin['machine']}, {origin['threads']} thread(s) a run, {versions}; "
        f"as CSV: [results/{folder}](results/{folder}).\n"
    )


def plain_markdown(frame: pd.DataFrame) -> str:
    """A table as it stands in its CSV."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def study_tables() -> str:
    """The appendix of docs/study.md: the tables of every part, in the plan's order, and those of the costs."""
    plan = Plan.read(ROOT / "experiments" / "study.toml")
    abouts = {name: part.about for name, part in plan.parts.items()} | COSTS
    pieces = ["# The tables of the language-model study\n", INTRODUCTION]
    for name, about in abouts.items():
        where, folder = ROOT / "results" / "lm" / name, f"lm/{name}"
        pieces.append(f"## {name}\n\n{about[0].upper()}{about[1:]}{'' if where.exists() else ' (not run)'}.\n")
        if where.exists():
            pieces.append(block(folder))
        pieces += [
            f"{said}\n\n{block(folder, stem)}" for stem, said in MORE.items() if (where / f"{stem}.csv").exists()
        ]
    return "\n".join(pieces).replace("(results/", "(../results/")


def rebuilt(page: Path) -> str:
    """The page's text with its blocks made anew."""
    if page == TABLES:
        return study_tables()

    def fill(match: re.Match[str]) -> str:
        prefix = "../" * len(page.relative_to(ROOT).parts[1:])
        return match[1] + block(match[2], match[3]).replace("(results/", f"({prefix}results/") + match[4]

    return BLOCK.sub(fill, page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path) -> list[str]:
    """Relative targets of the page that do not exist, and headings that no page has."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for target in (a or b for a, b in LINK.findall(text)):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        if "://" in target or target.startswith("mailto:"):
            continue
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in anchors(other)):
            dead.append(f"{page.relative_to(ROOT)}: {target}")
    return dead


def indented_after_a_table(page: Path) -> list[str]:
    """Text that would be shown as code: a table ends the list that it stands in."""
    found = re.findall(r"<!-- end -->\n\n {4,}(\S.*)", page.read_text(encoding="utf-8"))
    return [f"{page.relative_to(ROOT)}: indented after a table, and so shown as code: {line[:60]}" for line in found]


def main() -> int:
    """0, or 1 with what is wrong."""
    check, wrong = "--check" in sys.argv, []
    for page in PAGES:
        text = rebuilt(page)
        if not page.exists() or text != page.read_text(encoding="utf-8"):
            if check:
                wrong.append(f"{page.relative_to(ROOT)}: its tables are not those of results/; run `make docs`")
            else:
                page.write_text(text, encoding="utf-8")
    for page in [*PAGES, *sorted((ROOT / "examples").glob("*.ipynb"))]:
        wrong += [f"dead link in {link}" for link in dead_links(page)]
        wrong += indented_after_a_table(page)
    print("\n".join(wrong) or "docs: tables and links are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

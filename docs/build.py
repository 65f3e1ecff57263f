"""Writes the tables of README.md and docs/*.md from results/, and checks every relative link and picture.

A block between `<!-- results: FOLDER -->` and `<!-- end -->` is replaced by the table of results/FOLDER/table.csv and
the command that made it; `<!-- results: FOLDER NAME -->` takes NAME.csv, without the command. With --check nothing is
written, and a stale block or a dead link fails.
"""

import json
import re
import sys
from pathlib import Path

import pandas as pd

from uncork.lab.report.statistics import BASELINE
from uncork.lab.report.tables import display, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- results: (\S+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


def block(folder: str, name: str | None = None) -> str:
    """The table of one result and its origin; with a name that table alone."""
    where = ROOT / "results" / folder
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


def rebuilt(page: Path) -> str:
    """The page's text with its blocks made anew."""

    def fill(match: re.Match[str]) -> str:
        prefix = "../" if page.parent != ROOT else ""
        return match[1] + block(match[2], match[3]).replace("(results/", f"({prefix}results/") + match[4]

    return BLOCK.sub(fill, page.read_text(encoding="utf-8"))


def dead_links(page: Path) -> list[str]:
    """Relative targets of the page that do not exist."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [(a or b).split("#")[0] for a, b in LINK.findall(text)]
    local = [t for t in targets if t and "://" not in t and not t.startswith("mailto:")]
    return [f"{page.relative_to(ROOT)}: {t}" for t in local if not (page.parent / t).exists()]


def main() -> int:
    """0, or 1 with what is wrong."""
    check, wrong = "--check" in sys.argv, []
    for page in PAGES:
        text = rebuilt(page)
        if text != page.read_text(encoding="utf-8"):
            if check:
                wrong.append(f"{page.relative_to(ROOT)}: its tables are not those of results/; run `make docs`")
            else:
                page.write_text(text, encoding="utf-8")
        wrong += [f"dead link in {link}" for link in dead_links(page)]
    print("\n".join(wrong) or "docs: tables and links are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

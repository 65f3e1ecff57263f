"""Runs one part of a study, from the flags of the command to its tables and figures."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from uncork.lab.errors import LabError
from uncork.lab.experiments.study import figures, tables
from uncork.lab.experiments.study.plan import Part, Plan
from uncork.lab.experiments.study.run import Cell, is_kept, require_finished, run_cells
from uncork.lab.experiments.study.settings import Study
from uncork.lab.experiments.study.store import asked
from uncork.lab.machine import cores
from uncork.lab.report.publish import publish
from uncork.lab.report.tables import terminal_table
from uncork.lab.run.files import os_errors
from uncork.lab.run.provenance import provenance
from uncork.lab.run.rows import Rows, RowStore, outdated
from uncork.lab.terminal import say

COSTS = "cost-study/cost.csv"
"""The file in out_dir with what a training step costs; made by
`python benchmarks/epoch_cost.py --models study --threads 1 --out results/lm/cost-study`."""


def run(settings: Study) -> dict[str, Any]:
    """Trains the runs that the part still lacks, then replaces its tables and figures in out_dir/part.

    Raises:
        LabError: a bad flag, a part that needs another one first, runs that fail, a folder that cannot be written.
    """
    for name in ("seeds", "workers"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise LabError(f"{name}: expected at least 1, got {value}")
    if settings.plan == Study.plan and not settings.plan.exists():
        raise LabError(
            f"plan: {settings.plan} is not here: the default is the plan of uncork's repository, in whose folder the "
            "command is to be run; --plan FILE names one of your own"
        )
    plan = Plan.read(settings.plan)
    if not settings.part:
        for name, part in plan.parts.items():
            say(f"  {name:18} {part.about}; {part.size} runs")
        return {"command": "study", "plan": str(settings.plan), "parts": list(plan.parts)}
    part = plan.part(settings.part)
    own = part.narrowed(
        heads=settings.heads, texts=settings.corpora, in_features=settings.in_features, seeds=settings.seeds
    )
    store = RowStore(settings.out_dir)
    say(f"part {settings.part}: {part.about}")
    failed: dict[str, str] = {}
    if not settings.report_only:
        cells = plan.cells(own, store.rows())
        failed = run_cells(
            cells, store, data_dir=settings.data_dir, work_dir=settings.work_dir, workers=settings.workers or cores()
        )
    # The tables cover the whole part even if the flags narrow what is run. The command that is recorded for them
    # therefore has none of the flags that narrow it or name folders.
    given = [] if settings.plan == Study.plan else ["--plan", str(settings.plan)]
    command = shlex.join(["uncork", "study", *given, "--part", settings.part])
    told = report(plan, settings.part, store, settings.out_dir / settings.part, command)
    require_finished(failed)
    return told


def report(plan: Plan, name: str, store: RowStore, folder: Path, command: str) -> dict[str, Any]:
    """Writes tables and figures of the kept runs; returns the fields of the command's final JSON line."""
    rows, part = store.rows(), plan.part(name)
    kept = plan.kept_cells(part, rows)
    for line in outdated((c.record for c in plan.tuned_cells(part, rows) if not is_kept(c, rows)), rows, asked):
        say(line)
    told = {"command": "study", "part": name, "out_dir": str(folder), "runs": len(kept), "of": part.size}
    if not kept:
        return told
    costs = {} if part.own_model else _costs(folder.parent / COSTS)
    frames = {
        stem: frame.drop(columns=["name", "baseline"], errors="ignore")
        for stem, frame in _frames(plan, part, kept, rows, costs).items()
    }
    for stem in ("table", "verdict"):
        if len(frames.get(stem, ())):
            say(f"\n{terminal_table(frames[stem])}")
    commits = sorted({rows[cell.key]["commit"] for cell in kept})
    origin = {**provenance(command, 1), "commit": commits[0], "commits_of_runs": commits}
    drawn = figures.pictures(kept, rows, costs) if part.test else {}
    publish(folder, frames, origin, drawn, float_format="%.6g")
    return told


def _costs(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a training step costs, by (place, head); empty if it was not measured."""
    if not path.exists():
        return {}
    wanted = ["place", "head", "milliseconds", "tokens", "peak_mib"]
    try:
        with os_errors(path, "cannot be read"):
            measured = pd.read_csv(path, usecols=wanted)
    except ValueError as error:
        raise LabError(f"{path}: expected the columns {', '.join(wanted)}; {error}") from error
    records: list[dict[str, Any]] = measured.to_dict("records")  # type: ignore[assignment]
    return {(row["place"], row["head"]): row for row in records}


def _frames(plan: Plan, part: Part, kept: list[Cell], rows: Rows, costs: tables.Costs) -> dict[str, pd.DataFrame]:
    runs = tables.runs_frame(kept, rows)
    summary = tables.summary(runs)
    if not part.test:
        return {"runs": runs, "summary": summary, "table": tables.display_table(summary, "valid")}
    tests = tables.control_tests(runs, plan.controls)
    return {
        "runs": runs,
        "summary": summary,
        "table": tables.display_table(summary),
        "columns": tables.published_columns(summary, runs, costs),
        "tests": tests,
        "verdict": tables.display_tests(tests) if len(tests) else tests,
    }

"""Runs one part of the synthetic experiment, from the flags of the command to its tables and figures."""

import itertools
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import figures, tables
from uncork.lab.experiments.synthetic.cells import Cell
from uncork.lab.experiments.synthetic.fitting import Fitting
from uncork.lab.experiments.synthetic.parts import PARTS, Part
from uncork.lab.experiments.synthetic.run import run_cells
from uncork.lab.experiments.synthetic.settings import Synthetic
from uncork.lab.machine import cores
from uncork.lab.report.publish import publish
from uncork.lab.run.files import os_errors, write_json
from uncork.lab.run.provenance import provenance
from uncork.lab.run.rows import RowStore
from uncork.lab.terminal import say

_MOST_CELLS, _MOST_PANELS = 100_000, 5


def part_of(settings: Synthetic) -> tuple[str, Part]:
    """The part's name, and the part with the values that the flags replace.

    Raises:
        LabError: flags that contradict one another, or leave no cell.
    """
    if settings.quick and settings.part not in ("default", "quick"):
        raise LabError(f"quick: is a part of its own, and so is {settings.part}: give one of them")
    name = "quick" if settings.quick else settings.part
    part = PARTS[name]
    if settings.targets and settings.beta:
        raise LabError("beta: write it as --targets dirichlet:BETA beside other targets")
    for flag in ("num_contexts", "seeds", "workers"):
        value = getattr(settings, flag)
        if value is not None and value < 1:
            raise LabError(f"{flag.replace('_', '-')}: expected at least 1, got {value}")
    for flag, least in (("num_words", 2), ("in_features", 1)):
        for value in getattr(settings, flag):
            if value < least:
                raise LabError(f"{flag.replace('_', '-')}: expected at least {least}, got {value}")
    for beta in settings.beta:
        if not 0 < beta < math.inf:
            raise LabError(f"beta: expected finite numbers above 0, got {beta:g}")
    given: dict[str, Any] = {}
    if settings.heads:
        given["heads"] = settings.heads
    if settings.targets or settings.beta:
        given["targets"] = settings.targets or tuple(f"dirichlet:{beta}" for beta in settings.beta)
    if settings.num_words or settings.in_features:
        words = settings.num_words or tuple(dict.fromkeys(m for m, _ in part.shapes))
        features = settings.in_features or tuple(dict.fromkeys(d for _, d in part.shapes))
        given |= {"shapes": tuple(itertools.product(words, features)), "fewer_seeds": {}}
    if settings.num_contexts is not None:
        given["num_contexts"] = settings.num_contexts
    if settings.seeds is not None:
        given |= {"seeds": settings.seeds, "fewer_seeds": {}}
    return name, replace(part, **given)


def cells_of(settings: Synthetic) -> tuple[str, Part, list[Cell]]:
    """The part's name, the part and its cells. Raises LabError for a bad flag, or if no shape has d < M."""
    name, part = part_of(settings)
    if part.most_cells > _MOST_CELLS:
        raise LabError(f"seeds: expected at most {_MOST_CELLS:,} cells in all, got {part.most_cells:,}")
    given = {f.name: getattr(settings, f.name, None) for f in fields(Fitting)}
    cells = part.cells(Fitting(), {key: value for key, value in given.items() if value is not None})
    if not cells:
        raise LabError(f"in-features: expected some below num-words, got the shapes (M, d) {part.shapes}")
    return name, part, cells


def run(settings: Synthetic, command: str) -> dict[str, Any]:
    """Runs a part and writes its settings, tables, figures and provenance.json to out_dir/part, replacing old ones.

    Raises:
        LabError: a bad flag, a cell that fails, or a folder that cannot be written.
    """
    name, part, cells = cells_of(settings)
    folder = settings.out_dir / name
    with os_errors(folder, "cannot be made"):  # fails before anything is run, not after
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(settings))
    say(f"part {name}: {part.about}")
    outcomes = run_cells(cells, RowStore(settings.out_dir, "cells.jsonl"), settings.workers or cores())
    return report(name, part, outcomes, folder, command)


def report(name: str, part: Part, outcomes: list[dict[str, Any]], folder: Path, command: str) -> dict[str, Any]:
    """Writes the tables and figures of a part; returns the fields of the command's final JSON line."""
    rows = tables.rows_frame(outcomes)
    frame = tables.summary(rows)
    few = len(part.shapes) <= 4 and len(part.targets) == len(part.settings) == 1
    table = tables.table_by_point(frame) if few else tables.long_table(frame)
    commits = sorted({outcome["commit"] for outcome in outcomes})
    origin = {**provenance(command, 1), "commit": commits[0], "commits_of_cells": commits}
    drawn = _draw(name, part, frame, outcomes)
    publish(folder, {"rows": rows, "summary": frame.round(6), "table": table}, origin, drawn)
    say(f"\n{tables.terminal_table(frame)}\n")
    converged = f"{int(rows['converged'].sum())} of {len(rows)}"
    return {"command": "synthetic", "part": name, "out_dir": str(folder), "cells": len(rows), "converged": converged,
            "figures": [f"{stem}.png" for stem in drawn]}  # fmt: skip


def _draw(name: str, part: Part, frame: pd.DataFrame, outcomes: list[dict[str, Any]]) -> dict[str, Figure]:
    """The figures that suit what was run, by the stems of their files' names."""
    heads, base = list(dict.fromkeys(frame["head"])), tables.baseline_of(frame)
    words, features = ({shape[i] for shape in part.shapes} for i in (0, 1))
    dirichlet = all(target.startswith("dirichlet:") for target in part.targets)
    made: dict[str, Figure] = {}
    product = len(part.shapes) == len(words) * len(features) > 1
    is_grid = product or len(part.shapes) > max(len(words), len(features))
    if dirichlet and len(part.targets) == 1 and is_grid and base is not None:
        for head in (head for head in heads if head != base):
            for stem, columns in (("kl", ["kl"]), ("heat-maps", ["kl", "mode_matching", "cross_entropy"])):
                made[f"{stem}-{slug(head)}"] = figures.heat_maps(frame, head, part.targets[0], columns)
    compared = bool((frame.loc[frame["head"] != base, "pairs"] > 0).any())
    if name == "pieces" and any(tables.num_pieces(head) for head in heads):
        made["pieces"] = figures.by_pieces(frame)
    if name == "heads":
        made["heads"] = figures.by_head(frame)
    if dirichlet and len(part.targets) > 1 and compared:
        made["beta"] = figures.by_beta(frame)
    if not dirichlet and len(features) > 1:
        made["features"] = figures.by_features(frame)
    found = {head: tables.head_of(head) for head in heads}
    learned = [head for head, spec in found.items() if spec.learns_function and not spec.is_mixture][:3]
    if learned:
        made["functions"] = figures.functions(_telling(frame, outcomes, learned[0]), heads=learned)
    return made


def _telling(frame: pd.DataFrame, outcomes: list[dict[str, Any]], head: str) -> list[dict[str, Any]]:
    """The outcomes at the points where this head lowers the KL divergence most; all of them without a softmax."""
    own = frame[(frame["head"] == head) & frame["kl_gain"].notna()].nlargest(_MOST_PANELS, "kl_gain")
    points = {tuple(row) for row in own[tables.POINT].to_numpy().tolist()}
    return [o for o in outcomes if not points or tuple(o["row"][name] for name in tables.POINT) in points]


def slug(head: str) -> str:
    """A head's label as part of a file's name.

    >>> slug("monotone:num_units=100")
    'monotone-num-units-100'
    """
    return re.sub(r"[^a-z0-9.]+", "-", head.lower().replace("=-", "=minus-"))

"""The flags of `uncork study`, in a module that imports the standard library alone."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of trainings from a plan, part by part: heads tuned, trained to convergence, and compared over seeds.

    A finished run is one line of OUT-DIR/rows.jsonl and is not run again, so the same command continues an interrupted
    part, and parts share runs. Tables and figures are written to OUT-DIR/PART, even if some runs of the part are still
    missing. The plan of docs/study.md is experiments/study.toml of uncork's repository; a plan of your own has the same
    form.
    """

    plan: Path = Path("experiments/study.toml")
    """The TOML file with texts, settings, trials and parts."""
    part: str = ""
    """The part to run. Empty: list the plan's parts."""
    heads: tuple[str, ...] = ()
    """Only these of the part's heads, as its tables call them."""
    corpora: tuple[str, ...] = ()
    """Only these of the part's texts."""
    in_features: tuple[int, ...] = ()
    """Only these of the part's d, the features of the output layer."""
    seeds: int | None = None
    """Only this many of the part's seeds, the first ones."""
    data_dir: Path | None = None
    """Folder of ptb's and wikitext-2's files or archives. None: $UNCORK_DATA."""
    workers: int | None = None
    """Runs at a time, one thread each. None: as many as there are cores."""
    report_only: bool = False
    """Run nothing: write tables and figures from what is kept."""
    out_dir: Path = Path("results/lm")
    """Where rows.jsonl, tables and figures are kept."""
    work_dir: Path = Path("runs/study")
    """Where runs are stored while they train; each is removed when it finishes."""

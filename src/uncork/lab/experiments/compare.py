"""The main experiment: one language model trained with each output layer in turn, everything else equal."""

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
from uncork.lab.report.records import read_records
from uncork.lab.run.files import read_json, write_json
from uncork.lab.run.pool import Job, Tell
from uncork.lab.run.store import Run, RunStore
from uncork.lab.run.variables import refuse_variables
from uncork.lab.terminal import say
from uncork.lab.train.analysis import analyse
from uncork.lab.train.checkpoints import BEST, TOKENIZER_FILE, load_trained
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.head import with_head
from uncork.lab.train.trainer import train


class Trained(Protocol):
    """A cell that trains a language model on text."""

    @property
    def name(self) -> str:
        """The name of the run's folder, unique among the cells."""

    @property
    def title(self) -> str:
        """The text that stands for it in progress lines."""

    @property
    def config(self) -> TrainConfig:
        """The settings of the training."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison: a head as the command line writes it, the name of the run's folder, and the settings."""

    head: str
    name: str
    config: TrainConfig

    @property
    def title(self) -> str:
        """The folder's name."""
        return self.name


def make_cells(heads: Sequence[str], seeds: Sequence[int], base: TrainConfig) -> list[Cell]:
    """The cells of heads x seeds, ordered by seed, so that a partly finished comparison covers all heads.

    Raises:
        LabError: a head that cannot be parsed, a bad option, or two heads that are the same run, however written.
    """
    if not heads or not seeds:
        raise LabError(f"{'seeds' if heads else 'heads'}: expected at least one")
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
    """The records of the texts that configs name; each text is read once."""

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir
        self._records: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(self, config: TrainConfig) -> dict[str, Any]:
        """The `text_record` of the config's text. Raises LabError if the text cannot be read."""
        named = (config.corpus, config.tokenization, config.vocab_size, config.min_count, config.max_train_tokens)
        if named not in self._records:
            self._records[named] = text_record(config.load_corpus(data_dir=self.data_dir))
        return self._records[named]


def _same_run(first: TrainConfig, second: TrainConfig) -> bool:
    """Whether two configs give the same numbers; an option written out at its default makes no difference."""
    if first.seed != second.seed:
        return False
    heads = [HeadSpec(config.head, config.head_options) for config in (first, second)]
    rest = [config.updated(head_options={}) for config in (first, second)]
    return heads[0] == heads[1] and rest[0] == rest[1]


def check_stored(root: Path, cells: Sequence[Trained], texts: Texts) -> None:
    """Raise LabError if a stored run of one of these cells has other settings or another text; to be called before any
    of them is trained."""
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
    """Trains and analyses the cells that are not done yet; returns the error messages of failed cells, by name.

    The records of all runs, with the digests of their texts, are made before the first run starts. A run whose text has
    changed by the time it starts is refused, so that all runs of a table have the same text.

    Args:
        root: the folder of the runs. texts: reads the texts. workers: number of runs at a time, each in a process of
            its own, so that its peak memory can be measured. threads: of torch in each process.
        contexts: number of held-out contexts in the log-probability matrix whose rank is computed.
        keep: called with each finished run; returns the text to print about it.

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
    """Trains one run to its end, unless it has ended before, and analyses its output layer, unless that is kept."""
    corpus = config.load_corpus(data_dir=data_dir)
    run = RunStore(root).run(name, stored)
    train(config, corpus, run, on_progress=tell)
    if is_done(run, contexts):
        return
    trained = load_trained(run.path)
    analysis = analyse(
        trained.model,
        corpus.splits["test"],
        corpus.counts,
        batch_size=config.eval_batch_size,
        bptt=config.bptt,
        contexts=contexts,
    )
    # Loss without dropout on as many training tokens as the test split has: shows how much the model has memorised.
    seen = corpus.splits["train"][: len(corpus.splits["test"])]
    own = evaluate(trained.model, seen, batch_size=config.eval_batch_size, bptt=config.bptt)
    own_numbers = {"train_cross_entropy": own.cross_entropy, "contexts_asked": contexts}
    write_json(run.path / "analysis.json", {**analysis, **own_numbers})


def is_done(run: Run, contexts: int) -> bool:
    """Whether a run is trained, has what `load_trained` reads, and an undamaged analysis of this number of contexts."""
    if run.result is None or run.last_step(BEST) is None or not (run.path / TOKENIZER_FILE).exists():
        return False
    try:
        found = read_json(run.path / "analysis.json")
        # The number asked for counts: a short text has fewer contexts, and analysing it again would find no more.
        return bool(found.get("contexts_asked", found["rank"]["contexts"]) == contexts)
    except (LabError, KeyError, TypeError, AttributeError):
        return False


def _done_before(folder: Path, contexts: int, stored: dict[str, Any]) -> bool:
    """Whether a run needs no process any more. A damaged run counts as not done: its own process reports the error."""
    with suppress(LabError):
        run = Run.open(folder)
        run.require(stored)
        return is_done(run, contexts)
    return False


def started_runs(root: Path, cells: Sequence[Trained]) -> tuple[list[Run], dict[str, str]]:
    """The runs of these cells that have a folder, unfinished ones included, in the order of the cells; and what is
    wrong with those whose files are damaged, by name: no report can be made of them."""
    intact, damaged = [], {}
    for cell in cells:
        if (root / cell.name / "config.json").exists():
            try:
                run = Run.open(root / cell.name)
                read_records([run])
                run.metrics()
                intact.append(run)
            except LabError as error:
                damaged[cell.name] = str(error)
    return intact, damaged

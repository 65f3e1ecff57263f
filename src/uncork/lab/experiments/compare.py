"""The main job: the same language model with each output layer, everything else equal."""

import dataclasses
import multiprocessing
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any

import torch

from uncork.heads.spec import HeadSpec, parse_text
from uncork.lab.analysis import analyse
from uncork.lab.errors import LabError, in_one_line
from uncork.lab.run.files import read_json, write_json
from uncork.lab.run.interrupts import become_worker
from uncork.lab.run.key import key_of
from uncork.lab.run.progress import Progress
from uncork.lab.run.store import Run, RunStore
from uncork.lab.run.variables import refuse_variables
from uncork.lab.train.checkpoints import check_head, load_trained
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.trainer import train

# What a head may set for itself beside its own options, since a fair comparison tunes it for each head.
OWN_SETTINGS = (
    "lr", "function_lr_scale", "output_lr_scale", "function_clip", "epochs", "max_steps", "in_features", "bias_prior",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """One run of a comparison: a label for the tables, a folder name, and what is trained."""

    label: str
    name: str
    config: TrainConfig

    @property
    def key(self) -> str:
        """Another one for everything else that could be trained on the same text."""
        return key_of(self.config.record())


@dataclasses.dataclass(frozen=True)
class Event:
    """What a worker tells: progress (a Progress), or how it ended."""

    name: str
    kind: str  # "progress", "done", "failed", "interrupted"
    progress: Progress | None = None
    message: str = ""


def parse_head(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A head as the command line writes it: (name, its options, its own training settings).

    >>> parse_head("plif:num_pieces=50,lr=0.002")
    ('plif', {'num_pieces': 50}, {'lr': 0.002})
    >>> parse_head("mos:latent_activation=null")
    ('mos', {'latent_activation': None}, {})

    Raises:
        LabError: for anything that is not name or name:key=value,key=value. Whether there is such a head with such
            options is seen where it is built.
    """
    try:
        name, values = parse_text(text)
    except ValueError as error:
        raise LabError(str(error)) from None
    settings = {key: values.pop(key) for key in [*values] if key in OWN_SETTINGS}
    return name, values, settings


def with_head(base: TrainConfig, text: str, seed: int) -> TrainConfig:
    """The config with this head, as the command line writes it, and this seed.

    Raises:
        LabError: a head that cannot be read or built, a bad seed.
    """
    name, options, settings = parse_head(text)
    base = base.updated(seed=seed)
    try:
        preset = TrainConfig.of(base.preset)
        own = {key: getattr(preset, key) if value is None else value for key, value in settings.items()}
        config = base.updated(head=name, head_options=options, **own)
    except LabError as error:
        said = str(error)
        raise LabError(said if said.startswith("head ") else f"head {text}: {said}") from None
    check_head(config)
    return config


def make_tasks(heads: Sequence[str], seeds: Sequence[int], base: TrainConfig) -> list[Task]:
    """Heads x seeds, seed by seed, so that what is done at any moment compares all heads.

    Raises:
        LabError: a head that cannot be read or is named twice, under two names even, or a bad option.
    """
    if not heads or not seeds:
        raise LabError("heads and seeds: expected at least one of each")
    if len(set(heads)) < len(heads):
        raise LabError(f"heads: each may be named once, got {' '.join(heads)}")
    tasks: list[Task] = []
    for seed in seeds:
        for label in heads:
            config = with_head(base, label, seed)
            folder = re.sub(r"[^A-Za-z0-9._-]+", "_", label)
            task = Task(label, f"{folder}-seed{seed}", config)
            for other in tasks:
                if other.name == task.name or _same_run(other.config, task.config):
                    raise LabError(f"heads: {other.label} and {label} are the same run; name one of them")
            tasks.append(task)
    return tasks


class Texts:
    """What is known of the text of each config, read once for all that share it."""

    def __init__(self, data_dir: Path | None) -> None:
        self._data_dir = data_dir
        self._records: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(self, config: TrainConfig) -> dict[str, Any]:
        """What `text_record` says of it. Raises LabError where the text cannot be read."""
        named = (config.corpus, config.tokenization, config.vocab_size, config.min_count, config.max_train_tokens)
        if named not in self._records:
            self._records[named] = text_record(config.load_corpus(data_dir=self._data_dir))
        return self._records[named]


def _same_run(first: TrainConfig, second: TrainConfig) -> bool:
    """Whether two settings come to the same numbers: an option that is written out at its default changes nothing."""
    if first.seed != second.seed:
        return False
    heads = [HeadSpec(config.head, config.head_options) for config in (first, second)]
    rest = [config.updated(head_options={}) for config in (first, second)]
    return heads[0] == heads[1] and rest[0] == rest[1]


def check_stored(root: Path, tasks: Sequence[Task], *, data_dir: Path | None = None) -> None:
    """Raise LabError where a run of these tasks was made with other settings or on another text, before anything is
    written."""
    texts = Texts(data_dir)
    for task in tasks:
        if (root / task.name / "config.json").exists():
            Run.open(root / task.name).require(task.config.stored(texts.of(task.config)))


def run_task(
    store: RunStore,
    task: Task,
    stored: dict[str, Any] | None,
    *,
    data_dir: Path | None,
    contexts: int,
    on_progress: Callable[[Progress], None],
) -> Run:
    """Trains one task to its end (or returns it as it is, if it ended before) and analyses its output layer.

    Args:
        stored: what its config.json is to hold; a text or preset that has changed since is then refused, so that all
            runs of one table are of one text. None: as text and presets are now.
    """
    corpus = task.config.load_corpus(data_dir=data_dir)
    run = store.run(task.name, stored or task.config.stored(text_record(corpus)))
    if is_done(run, contexts):
        return run
    train(task.config, corpus, run, on_progress=on_progress)
    trained = load_trained(run.path)
    settings = task.config
    analysis = analyse(
        trained.model,
        corpus.splits["test"],
        corpus.counts,
        batch_size=settings.eval_batch_size,
        bptt=settings.bptt,
        contexts=contexts,
    )
    # As much of the training text as the test has, without dropout: what the model has learned by heart.
    seen = corpus.splits["train"][: len(corpus.splits["test"])]
    own = evaluate(trained.model, seen, batch_size=settings.eval_batch_size, bptt=settings.bptt)
    own_numbers = {"train_cross_entropy": own.cross_entropy, "contexts_asked": contexts}
    write_json(run.path / "analysis.json", {**analysis, **own_numbers})
    return run


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


def run_all(
    root: Path,
    tasks: Sequence[Task],
    *,
    data_dir: Path | None,
    contexts: int,
    workers: int,
    threads: int,
    on_event: Callable[[Event], None],
) -> dict[str, str]:
    """Runs what is not done yet, `workers` processes at a time; returns the message of each run that failed.

    A run that fails (a loss of nan, say, or a process that is killed) does not stop the others. Ctrl-C waits for the
    workers' checkpoints; a second one does not.
    """
    for task in tasks:
        refuse_variables(task.config.precision)
    waiting, texts = list(tasks), Texts(data_dir)
    active: dict[connection.Connection, tuple[Task, Any]] = {}
    failed: dict[str, str] = {}
    told: set[str] = set()

    def tell(event: Event) -> None:
        if event.kind != "progress":
            told.add(event.name)
        if event.kind == "failed":
            failed[event.name] = event.message
        on_event(event)
        if event.kind == "interrupted":
            raise KeyboardInterrupt

    try:
        while waiting or active:
            while waiting and len(active) < workers:
                task = waiting.pop(0)
                stored = _stored(task, texts)
                if _done_before(root, task, contexts, stored):
                    tell(Event(task.name, "done", message="before, with the same settings on the same text"))
                    continue
                events, process = _start(root, task, stored, data_dir, contexts, threads)
                active[events] = task, process
            for events in list(connection.wait(list(active), timeout=1.0)) if active else []:
                assert isinstance(events, connection.Connection)
                task, process = active[events]
                try:
                    tell(events.recv())
                except (EOFError, OSError):  # its process has ended, well or not
                    process.join()
                    del active[events]
                    events.close()
                    if task.name not in told:
                        tell(Event(task.name, "failed", message=_how_it_ended(process.exitcode)))
    finally:
        _end([process for _, process in active.values()])
    return failed


def _stored(task: Task, texts: Texts) -> dict[str, Any] | None:
    """What its config.json is to hold; None where that fails, which its own process then says."""
    try:
        return task.config.stored(texts.of(task.config))
    except Exception:
        return None


def _done_before(root: Path, task: Task, contexts: int, stored: dict[str, Any] | None) -> bool:
    """Whether there is nothing to start a process for. What is wrong with a run, its own process says."""
    with suppress(LabError):
        if stored is not None:
            run = Run.open(root / task.name)
            run.require(stored)
            return is_done(run, contexts)
    return False


def _start(
    root: Path, task: Task, stored: dict[str, Any] | None, data_dir: Path | None, contexts: int, threads: int
) -> tuple[Any, Any]:
    """A process for the task, and the end of the pipe that its events come from.

    A pipe for each, since a killed process can leave a shared queue locked. Ctrl-C, which the terminal sends to all, is
    blocked in the worker: `run_all` hands it on, once, as SIGTERM.
    """
    context = multiprocessing.get_context("spawn")
    events, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(root, task, stored, data_dir, contexts, threads, theirs))
    resource_tracker.ensure_running()  # its start would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return events, process


def _end(processes: Iterable[Any]) -> None:
    """Ask the workers to save a checkpoint and end; kill them after a minute, or at Ctrl-C."""
    processes = list(processes)
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            process.kill()


def _how_it_ended(exitcode: int) -> str:
    if exitcode >= 0:
        return f"its process ended with exit code {exitcode}"
    hint = "; was the memory full?" if -exitcode == signal.SIGKILL else ""
    return f"its process was killed ({signal.Signals(-exitcode).name}){hint}"


def _work(
    root: Path,
    task: Task,
    stored: dict[str, Any] | None,
    data_dir: Path | None,
    contexts: int,
    threads: int,
    events: Any,
) -> None:
    """A worker process: one run, so that its peak memory is its own."""
    become_worker()

    def tell(kind: str, progress: Progress | None = None, message: str = "") -> None:
        try:
            events.send(Event(task.name, kind, progress, message))
        except OSError:  # nobody listens any more
            raise KeyboardInterrupt from None

    try:
        torch.set_num_threads(threads)
        run_task(
            RunStore(root), task, stored, data_dir=data_dir, contexts=contexts,
            on_progress=lambda p: tell("progress", p),
        )  # fmt: skip
        tell("done")
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            tell("interrupted")
    except Exception as error:
        said = in_one_line(error)
        if said is None:
            traceback.print_exc()  # a mistake of ours, whose place the one line does not tell
        tell("failed", message=said or f"{type(error).__name__}: {error}")


class TimeLeft:
    """How long a comparison has still to go, from the share of steps that is done."""

    def __init__(self, runs: int) -> None:
        self.runs, self.started = runs, time.monotonic()
        self.share = dict[str, float]()
        self.before = dict[str, float]()
        """The share that was done of each run when it was first heard of: an earlier session's."""

    def update(self, event: Event) -> float | None:
        """Seconds left, or None while too little is known."""
        p = event.progress
        self.share[event.name] = 1.0 if p is None else p.step / max(1, p.steps_total)
        self.before.setdefault(event.name, self.share[event.name])
        done = sum(self.share.values()) / self.runs
        gained = done - sum(self.before.values()) / self.runs
        return None if gained < 0.005 else (time.monotonic() - self.started) * (1 - done) / gained


def started_runs(root: Path, tasks: Sequence[Task]) -> list[Run]:
    """The runs of these tasks, in the tasks' order, those that failed included."""
    return [Run.open(root / task.name) for task in tasks if (root / task.name / "config.json").exists()]

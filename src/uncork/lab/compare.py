"""The main job: the same language model with each output layer, everything else equal."""

import dataclasses
import json
import multiprocessing
import queue
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from uncork.lab.analysis import analyse
from uncork.lab.checkpoints import load_trained
from uncork.lab.errors import LabError
from uncork.lab.files import write_json
from uncork.lab.runs import Run, RunStore
from uncork.lab.train_config import TrainConfig
from uncork.lab.training import Progress, train

# What a head may set for itself beside its own options, since a fair comparison tunes it for each head.
OWN_SETTINGS = ("lr", "function_lr_scale", "function_clip", "epochs", "max_steps", "in_features", "bias_prior")


@dataclasses.dataclass(frozen=True)
class Task:
    """One run of a comparison: a label for the tables, a folder name, and what is trained."""

    label: str
    name: str
    config: TrainConfig

    def stored(self) -> dict[str, Any]:
        """What config.json holds."""
        return self.config.resolved().to_dict()


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
        LabError: for anything that is not name or name:key=value,key=value.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise LabError(f"head: expected name or name:key=value,key=value, got {text!r}")
        (settings if key in OWN_SETTINGS else options)[key] = parse_value(value)
    return name, options, settings


def parse_value(text: str) -> Any:
    """A JSON value, or the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def make_tasks(heads: Sequence[str], seeds: Sequence[int], base: TrainConfig) -> list[Task]:
    """Heads x seeds, seed by seed, so that what is done at any moment compares all heads.

    Raises:
        LabError: a head that cannot be read or is named twice, or a bad option.
    """
    if not heads or not seeds:
        raise LabError("heads and seeds: expected at least one of each")
    if len(set(heads)) < len(heads):
        raise LabError(f"heads: each may be named once, got {' '.join(heads)}")
    tasks = []
    for seed in seeds:
        for label in heads:
            name, options, settings = parse_head(label)
            config = dataclasses.replace(base, head=name, head_options=options, seed=seed, **settings)
            folder = re.sub(r"[^A-Za-z0-9._-]+", "_", label)
            tasks.append(Task(label, f"{folder}-seed{seed}", config))
    return tasks


def run_task(
    store: RunStore, task: Task, *, data_dir: Path | None, contexts: int, on_progress: Callable[[Progress], None]
) -> Run:
    """Trains one task to its end (or returns it as it is, if it ended before) and analyses its output layer."""
    run = store.run(task.name, task.stored())
    if run.result is not None and (run.path / "analysis.json").exists():
        return run
    corpus = task.config.load_corpus(data_dir=data_dir)
    train(task.config, corpus, run, on_progress=on_progress)
    trained = load_trained(run.path)
    preset = task.config.resolved_preset().training
    analysis = analyse(
        trained.model,
        corpus.splits["test"],
        corpus.counts,
        batch_size=preset.eval_batch_size,
        bptt=preset.bptt,
        contexts=contexts,
    )
    write_json(run.path / "analysis.json", analysis)
    return run


def _work(root: Path, task: Task, data_dir: Path | None, contexts: int, threads: int, events: Any) -> None:
    """A worker process: one run, so that its peak memory is its own."""
    torch.set_num_threads(threads)
    try:
        run_task(
            RunStore(root),
            task,
            data_dir=data_dir,
            contexts=contexts,
            on_progress=lambda p: events.put(Event(task.name, "progress", p)),
        )
        events.put(Event(task.name, "done"))
    except KeyboardInterrupt:
        events.put(Event(task.name, "interrupted"))
    except LabError as error:
        events.put(Event(task.name, "failed", message=str(error)))


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

    A run that fails (a loss of nan, say) does not stop the others. Ctrl-C waits for the workers' checkpoints.
    """
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    waiting = list(tasks)
    active: dict[str, Any] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                task = waiting.pop(0)
                process = context.Process(target=_work, args=(root, task, data_dir, contexts, threads, events))
                process.start()
                active[task.name] = process
            for event in _drain(events):
                on_event(event)
                if event.kind == "interrupted":
                    raise KeyboardInterrupt
                if event.kind == "failed":
                    failed[event.name] = event.message
            for name in [name for name, process in active.items() if not process.is_alive()]:
                process = active.pop(name)
                process.join()
                if process.exitcode:
                    failed[name] = f"its process ended with exit code {process.exitcode}"
                    on_event(Event(name, "failed", message=failed[name]))
        for event in _drain(events):  # a worker's last word can come after its end
            on_event(event)
            if event.kind == "failed":
                failed[event.name] = event.message
    finally:
        for process in active.values():
            process.join(timeout=60)
            process.kill()
    return failed


def _drain(events: Any) -> list[Event]:
    """All events that are there, after at most a fifth of a second."""
    found = []
    wait = 0.2
    while True:
        try:
            found.append(events.get(timeout=wait))
        except queue.Empty:
            return found
        wait = 0.0


class TimeLeft:
    """How long a comparison has still to go, from the share of steps that is done."""

    def __init__(self, runs: int) -> None:
        self.runs, self.share = runs, dict[str, float]()
        self.started = time.monotonic()
        self.at_start: float | None = None

    def update(self, event: Event) -> float | None:
        """Seconds left, or None while too little is known."""
        if event.progress is not None:
            self.share[event.name] = event.progress.step / max(1, event.progress.steps_total)
        else:
            self.share[event.name] = 1.0
        done = sum(self.share.values()) / self.runs
        if self.at_start is None:
            self.at_start = done
        gained = done - self.at_start
        return None if gained < 0.005 else (time.monotonic() - self.started) * (1 - done) / gained


def started_runs(root: Path, tasks: Sequence[Task]) -> list[Run]:
    """The runs of these tasks, in the tasks' order, those that failed included."""
    return [Run.open(root / task.name) for task in tasks if (root / task.name / "config.json").exists()]

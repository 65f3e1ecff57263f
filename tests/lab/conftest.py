"""A text small enough to train on in a second, and settings that fit it."""

import itertools
import random
import signal
from typing import Any

import pytest

from uncork.lab.data.corpora import load_corpus
from uncork.lab.experiments import base
from uncork.lab.run.pool import run_jobs
from uncork.lab.train import trainer as trainer_module
from uncork.lab.train.config import TrainConfig

WORDS = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(48)]
LSTM: dict[str, Any] = {
    "preset": "lstm-laptop",
    "model_options": {
        "embedding_size": 6,
        "hidden_sizes": [8],
        "input_dropout": 0.2,
        "weight_drop": 0.2,
        "output_dropout": 0.1,
    },
}
TRANSFORMER: dict[str, Any] = {
    "preset": "transformer-laptop",
    "model_options": {"width": 8, "depth": 1, "num_heads": 2, "max_length": 32, "dropout": 0.1},
}
LOOKUP: dict[str, Any] = {"preset": "lookup", "model_options": {"order": 2, "rows": 30}}


def _text(lines, generator):
    """Lines in which a word depends on the one before it."""
    written = []
    for _ in range(lines):
        place, line = generator.randrange(48), []
        for _ in range(generator.randrange(4, 12)):
            line.append(WORDS[place])
            place = (5 * place + generator.randrange(4)) % 48
        written.append(" ".join(line))
    return "\n".join(written) + "\n"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with train.txt, valid.txt and test.txt of 50 words or so."""
    folder = tmp_path_factory.mktemp("tiny")
    generator = random.Random(0)
    for split, lines in (("train", 200), ("valid", 25), ("test", 25)):
        (folder / f"{split}.txt").write_text(_text(lines, generator))
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs are done here, one after another, without the seconds that a process of their own takes to start."""
    monkeypatch.setattr(
        base, "run_jobs", lambda jobs, **options: run_jobs(jobs, **{**options, "workers": 1, "fresh": False})
    )


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_corpus(tiny_folder, tiny_cache):
    return load_corpus(str(tiny_folder), cache_dir=tiny_cache)


@pytest.fixture
def tiny_config(tiny_folder):
    """Make a TrainConfig for the tiny corpus: `tiny_config("transformer", head="plif")`; or of a lookup table."""

    def make(backbone="lstm", **fields):
        base = {"lstm": LSTM, "transformer": TRANSFORMER, "lookup": LOOKUP}[backbone]
        options = {**base["model_options"], **fields.pop("model_options", {})}
        settings = {"corpus": str(tiny_folder), "in_features": 4, "epochs": 2, "bptt": 10,
                    "batch_size": 1 if base is LOOKUP else 8, "log_every": 3, **fields}  # fmt: skip
        return TrainConfig.of(preset=base["preset"], model_options=options, **settings)

    return make


@pytest.fixture
def interrupt_at(monkeypatch):
    """Deliver Ctrl-C in the middle of the steps with these numbers, counted over all sessions of the test."""

    def install(steps):
        counter, real = itertools.count(), trainer_module.set_lr

        def set_lr(optimizer, factor, **options):
            if next(counter) in steps:
                signal.raise_signal(signal.SIGINT)
            return real(optimizer, factor, **options)

        monkeypatch.setattr(trainer_module, "set_lr", set_lr)

    return install

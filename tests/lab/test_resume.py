"""Resuming: whatever stops training, it goes on to the same bits."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from uncork.lab.errors import LabError
from uncork.lab.run.store import RunStore
from uncork.lab.train import trainer as trainer_module
from uncork.lab.train.config import text_record
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.trainer import train

TIMES = {"tokens_per_second", "seconds", "train_seconds", "peak_memory_bytes"}
SGD = {"optimizer": "sgd", "schedule": "constant", "variable_bptt": True, "warmup": 0.0}
PENALTIES = {"activation_penalty": 2.0, "temporal_penalty": 1.0}


def new_run(folder, config, corpus, name="run"):
    return RunStore(folder).run(name, config.stored(text_record(corpus)))


def timeless(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def numbers(run):
    """All that must not depend on how often a run was stopped: metrics, result, best and last weights."""
    checkpoints = [run.load_checkpoint(name) for name in ("best", "last")]
    tensors = [(c.step, {key: t.numpy().tobytes() for key, t in c.tensors.items()}) for c in checkpoints]
    return [timeless(row) for row in run.metrics()], timeless(run.result), tensors


def train_to_the_end(config, corpus, run, sessions=50):
    """Train again after each Ctrl-C; the number of sessions that it took."""
    for session in range(1, sessions + 1):
        try:
            train(config, corpus, run)
        except KeyboardInterrupt:
            continue
        return session
    raise AssertionError("training never ended")


CASES = {
    "lstm adam softmax": ("lstm", {"head": "softmax", "model_options": PENALTIES}),
    "lstm adam plif, validating often": ("lstm", {"head": "plif", "eval_every": 4, "function_lr_scale": 2.0}),
    "lstm adam plif, a rate for the output layer": ("lstm", {"head": "plif", "output_lr_scale": 4.0}),
    "lstm sgd to asgd at an epoch, variable bptt, mop": (
        "lstm",
        {"head": "mop", "lr": 5.0, "epochs": 3, "weight_decay": 1e-5, "training_options": {**SGD, "asgd": 2}},
    ),
    "lstm sgd to asgd by trigger, tied": (
        "lstm",
        {
            "head": "plif-frozen",
            "lr": 8.0,
            "eval_every": 2,
            "in_features": 6,
            "model_options": {"hidden_sizes": [8], "tie_weights": True},
            "training_options": {**SGD, "asgd": "trigger"},
        },
    ),
    "transformer adam mos": ("transformer", {"head": "mos", "epochs": 1.5, "weight_decay": 0.1}),
    "lookup adam plif": ("lookup", {"head": "plif", "epochs": 24, "eval_every": 5}),
    "transformer adam monotone, bf16": ("transformer", {"head": "monotone", "precision": "bf16", "epochs": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_in_the_same_bits(case, tmp_path, tiny_corpus, tiny_config, interrupt_at):
    backbone, fields = CASES[case]
    config = tiny_config(backbone, **fields)
    straight, broken = (
        new_run(tmp_path, config, tiny_corpus, "straight"),
        new_run(tmp_path, config, tiny_corpus, "broken"),
    )
    train(config, tiny_corpus, straight)
    interrupt_at({0, 1, 4, 7, 12, 20, 21})
    sessions = train_to_the_end(config, tiny_corpus, broken)
    assert sessions == 1 + sum(step < straight.result["steps"] for step in (0, 1, 4, 7, 12, 20, 21))
    assert numbers(broken) == numbers(straight)
    if config.asgd != "never":
        assert any(key.startswith("average.") for key in broken.load_checkpoint().tensors)


def test_ctrl_c_in_validation_and_between_rows(tmp_path, tiny_corpus, tiny_config, monkeypatch):
    config = tiny_config(eval_every=5, max_steps=12)
    straight, broken = (
        new_run(tmp_path, config, tiny_corpus, "straight"),
        new_run(tmp_path, config, tiny_corpus, "broken"),
    )
    train(config, tiny_corpus, straight)
    calls = itertools.count()

    def interrupted(*args, **options):
        found = evaluate(*args, **options)
        if next(calls) in (0, 2, 5):
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(trainer_module, "evaluate", interrupted)
    # Validations at 5, 5 again, 10, 10 again, 12, and the test: the calls 0, 2 and 5 are stopped.
    assert train_to_the_end(config, tiny_corpus, broken) == 4
    assert numbers(broken) == numbers(straight)


def test_ctrl_c_leaves_a_checkpoint_of_that_step(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    config = tiny_config()
    run = new_run(tmp_path, config, tiny_corpus)
    interrupt_at({4})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    assert run.load_checkpoint().step == 5
    assert run.result is None
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing_half_done(tmp_path, tiny_corpus, tiny_config, monkeypatch):
    config = tiny_config(checkpoint_every=0.0)
    run = new_run(tmp_path, config, tiny_corpus)

    def twice(*args, **options):
        if len(run.metrics()) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return 0.1

    monkeypatch.setattr(trainer_module, "set_lr", twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    assert run.load_checkpoint().step == 3


KILLED = """
import json, sys
from pathlib import Path
from uncork.lab.run.store import RunStore
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.trainer import train
root, cache, config = Path(sys.argv[1]), Path(sys.argv[2]), TrainConfig.from_dict(json.loads(sys.argv[3]))
corpus = config.load_corpus(cache_dir=cache)
run = RunStore(root).run("killed", config.stored(text_record(corpus)))
train(config, corpus, run, on_progress=lambda p: print(p.step, flush=True))
"""


def kill_when(command, step):
    """Run the command and kill -9 it as soon as it tells of this step; False when it ended before."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= step:
                # Somewhere in the steps, rows and checkpoints that follow.
                time.sleep(0.003 * (step % 5))
                process.kill()
                break
    return process.returncode == -signal.SIGKILL


def check_killing(tmp_path, cache, config, corpus, steps):
    straight, killed = new_run(tmp_path, config, corpus, "straight"), new_run(tmp_path, config, corpus, "killed")
    train(config, corpus, straight)
    settings = json.dumps({**config.to_dict(), "checkpoint_every": 0.0})
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(cache), settings]
    assert [kill_when(command, step) for step in steps] == [True] * len(steps)
    assert killed.result is None
    assert killed.load_checkpoint().step > 0
    train(config, corpus, killed)
    assert numbers(killed) == numbers(straight)


def test_kill_9(tmp_path, tiny_cache, tiny_corpus, tiny_config):
    config = tiny_config(head="plif", epochs=5, checkpoint_every=0.0, eval_every=7)
    check_killing(tmp_path, tiny_cache, config, tiny_corpus, [33])


@pytest.mark.slow
def test_kill_9_again_and_again(tmp_path, tiny_cache, tiny_corpus, tiny_config):
    fields = {"head": "mos", "lr": 5.0, "training_options": {**SGD, "asgd": 3}}
    config = tiny_config(epochs=40, checkpoint_every=0.0, eval_every=5, **fields)
    check_killing(tmp_path, tiny_cache, config, tiny_corpus, [6, 42, 97, 161, 230, 301])


def test_rows_behind_the_checkpoint_are_written_once(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    """A crash leaves rows of steps that the last checkpoint does not know of."""
    config = tiny_config(max_steps=12, eval_every=5)
    straight, run = new_run(tmp_path, config, tiny_corpus, "straight"), new_run(tmp_path, config, tiny_corpus)
    train(config, tiny_corpus, straight)
    interrupt_at({4})
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    assert run.load_checkpoint().step == 5

    def crash(progress):
        if progress.step == 9:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError):
        train(config, tiny_corpus, run, on_progress=crash)
    assert [(row["kind"], row["step"]) for row in run.metrics()] == [
        ("train", 3), ("valid", 5), ("train", 6), ("train", 9)
    ]  # fmt: skip
    train(config, tiny_corpus, run)
    assert numbers(run) == numbers(straight)


def test_resume_false_starts_afresh(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    config = tiny_config(max_steps=9)
    straight, run = new_run(tmp_path, config, tiny_corpus, "straight"), new_run(tmp_path, config, tiny_corpus)
    train(config, tiny_corpus, straight)
    interrupt_at({5})
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    sessions = []
    train(config, tiny_corpus, run, resume=False, on_progress=lambda p: sessions.append(p.step))
    assert sessions == [3, 6, 9]
    assert numbers(run) == numbers(straight)


def test_the_last_checkpoint_of_another_training_is_refused(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    config = tiny_config(max_steps=9)
    run = new_run(tmp_path, config, tiny_corpus)
    interrupt_at({4})
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    with pytest.raises(LabError, match=r"head was \"softmax\", is \"plif\""):
        train(config.updated(head="plif"), tiny_corpus, run)
    with pytest.raises(LabError, match="fingerprint"):
        train(config, dataclasses.replace(tiny_corpus, fingerprint="another"), run)
    assert train(config.updated(checkpoint_every=1.0), tiny_corpus, run)["steps"] == 9


TWO_PROCESSES = """
import json, signal, sys
from pathlib import Path
from uncork.lab.run.store import RunStore
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.trainer import train
root, cache, config = Path(sys.argv[1]), Path(sys.argv[2]), TrainConfig.from_dict(json.loads(sys.argv[3]))
corpus = config.load_corpus(cache_dir=cache)
run = RunStore(root).run("two", config.stored(text_record(corpus)))
sessions = [10, 25, None] if sys.argv[4] == "interrupted" else [None]
for stop in sessions:
    def press(progress):
        if progress.step == stop:
            signal.raise_signal(signal.SIGINT)
    try:
        train(config, corpus, run, cpu=True, on_progress=press)
    except KeyboardInterrupt:
        assert stop is not None
"""


@pytest.mark.slow
@pytest.mark.parametrize("head", ["plif", "mos"])
def test_two_processes_do_what_one_does(tmp_path, tiny_cache, tiny_corpus, tiny_config, head):
    options = {"input_dropout": 0.0, "weight_drop": 0.0, "output_dropout": 0.0, **PENALTIES}
    config = tiny_config(head=head, log_every=5, eval_every=10, model_options=options)
    one = new_run(tmp_path, config, tiny_corpus, "one")
    train(config, tiny_corpus, one)
    runs = []
    for how in ("straight", "interrupted"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = tmp_path / "two.py"
        script.write_text(TWO_PROCESSES)
        arguments = [str(tmp_path / how), str(tiny_cache), json.dumps(config.to_dict()), how]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(
            [*launch, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        runs.append(new_run(tmp_path / how, config, tiny_corpus, "two"))
    for row, expected in zip(runs[0].metrics(), one.metrics(), strict=True):
        for key, value in timeless(expected).items():
            # Adam makes as much of a slope that few scores reach, and so of the rounding in it (SGD: within 1e-4).
            near = 5e-3 if key == "slopes" else 1e-4
            assert row[key] == (pytest.approx(value, rel=near) if isinstance(value, float | list) else value)
    assert numbers(runs[0]) == numbers(runs[1])

"""Training: whatever stops it, it goes on to the same bits."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from uncork.lab import trainer as trainer_module
from uncork.lab.checkpoints import load_trained
from uncork.lab.errors import LabError
from uncork.lab.evaluation import evaluate
from uncork.lab.runs import RunStore
from uncork.lab.train_config import TrainConfig
from uncork.lab.training import TrainingDiverged, train

TIMES = {"tokens_per_second", "seconds", "train_seconds", "peak_memory_bytes"}
SGD = {"optimizer": "sgd", "schedule": "constant", "variable_bptt": True, "warmup": 0.0}
PENALTIES = {"activation_penalty": 2.0, "temporal_penalty": 1.0}


def new_run(folder, config, name="run"):
    return RunStore(folder).run(name, config.resolved().to_dict())


def timeless(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def numbers(run):
    """All that must not depend on how often a run was stopped: metrics, result, best and last weights."""
    checkpoints = [run.load_checkpoint(name) for name in ("best", "last")]
    tensors = [(c.step, {key: t.numpy().tobytes() for key, t in c.tensors.items()}) for c in checkpoints]
    return [timeless(row) for row in run.metrics()], timeless(run.result), tensors


@pytest.fixture
def interrupt_at(monkeypatch):
    """Deliver Ctrl-C in the middle of the steps with these numbers, counted over all sessions of the test."""

    def install(steps):
        counter, real = itertools.count(), trainer_module.set_lr

        def set_lr(optimizer, factor):
            if next(counter) in steps:
                signal.raise_signal(signal.SIGINT)
            return real(optimizer, factor)

        monkeypatch.setattr(trainer_module, "set_lr", set_lr)

    return install


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
    "transformer adam monotone, bf16": ("transformer", {"head": "monotone", "precision": "bf16", "epochs": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_in_the_same_bits(case, tmp_path, tiny_corpus, tiny_config, interrupt_at):
    backbone, fields = CASES[case]
    config = tiny_config(backbone, **fields)
    straight, broken = new_run(tmp_path, config, "straight"), new_run(tmp_path, config, "broken")
    train(config, tiny_corpus, straight)
    interrupt_at({0, 1, 4, 7, 12, 20, 21})
    sessions = train_to_the_end(config, tiny_corpus, broken)
    assert sessions == 1 + sum(step < straight.result["steps"] for step in (0, 1, 4, 7, 12, 20, 21))
    assert numbers(broken) == numbers(straight)
    if config.resolved_preset().training.asgd != "never":
        assert any(key.startswith("average.") for key in broken.load_checkpoint().tensors)


def test_ctrl_c_in_validation_and_between_rows(tmp_path, tiny_corpus, tiny_config, monkeypatch):
    config = tiny_config(eval_every=5, max_steps=12)
    straight, broken = new_run(tmp_path, config, "straight"), new_run(tmp_path, config, "broken")
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
    run = new_run(tmp_path, config)
    interrupt_at({4})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    assert run.load_checkpoint().step == 5
    assert run.result is None
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_stops_at_once_and_saves_nothing_half_done(tmp_path, tiny_corpus, tiny_config, monkeypatch):
    config = tiny_config(checkpoint_every=0.0)
    run = new_run(tmp_path, config)

    def twice(*args):
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
from uncork.lab.runs import RunStore
from uncork.lab.train_config import TrainConfig
from uncork.lab.training import train
root, cache, config = Path(sys.argv[1]), Path(sys.argv[2]), TrainConfig.from_dict(json.loads(sys.argv[3]))
run = RunStore(root).run("killed", config.resolved().to_dict())
train(config, config.load_corpus(cache_dir=cache), run, on_progress=lambda p: print(p.step, flush=True))
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
    straight, killed = new_run(tmp_path, config, "straight"), new_run(tmp_path, config, "killed")
    train(config, corpus, straight)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(cache), json.dumps(config.to_dict())]
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


def test_metrics_and_result_hold_what_the_report_reads(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(head="plif", head_options={"num_pieces": 9}, clip=0.05)
    run, seen = new_run(tmp_path, config), []
    result = train(config, tiny_corpus, run, on_progress=seen.append)
    assert result == run.result
    rows = [row for row in run.metrics() if row["kind"] == "train"]
    valid = [row for row in run.metrics() if row["kind"] == "valid"]
    assert [row["step"] for row in rows] == [*range(3, 43, 3)]
    assert [(row["step"], row["epoch"], row["tokens"]) for row in valid] == [(21, 1.0, 1672), (42, 2.0, 3344)]
    assert set(rows[0]) == {"kind", "step", "epoch", "tokens", "cross_entropy", "lr", "grad_norm",
                            "function_grad_norm", "tokens_per_second", "seconds"}  # fmt: skip
    assert rows[0]["epoch"] == pytest.approx(30 / 209)
    assert result["valid"]["cross_entropy"] == min(row["cross_entropy"] for row in valid)
    assert result["valid"]["perplexity"] == pytest.approx(math.exp(result["valid"]["cross_entropy"]))
    assert result["test"]["bits_per_byte"] > 0
    assert (result["head"], result["in_features"], result["vocab_size"]) == ("plif", 4, 50)
    assert result["head_parameters"] == 50 * 4 + 50 + 9
    assert result["parameters"] == sum(p.numel() for p in load_trained(run.path).model.parameters())
    assert (result["steps"], result["tokens"], result["epochs"], result["stopped"]) == (42, 3344, 2.0, "finished")
    assert result["peak_memory_bytes"] > 10**7
    assert [p.step for p in seen] == [row["step"] for row in rows]
    assert seen[0].valid_perplexity is None
    assert seen[-1].valid_perplexity == valid[0]["perplexity"]
    assert seen[0].seconds_left > 0 == seen[-1].seconds_left
    assert all(p.steps_total == 42 and p.tokens_per_second > 0 for p in seen)


def test_training_learns(tmp_path, tiny_corpus, tiny_config):
    """The words of the text have 4 successors each: a bigram's worth must be learned, not just the unigram."""
    options = {"input_dropout": 0.0, "weight_drop": 0.0, "output_dropout": 0.0, "hidden_sizes": [32]}
    config = tiny_config(in_features=8, epochs=20, lr=0.02, model_options=options)
    assert train(config, tiny_corpus, new_run(tmp_path, config))["test"]["perplexity"] < 15


def test_the_row_is_the_mean_over_its_tokens(tmp_path, tiny_corpus, tiny_config):
    """Rows of 1 step and rows of many steps tell of the same losses."""
    options = {"variable_bptt": True, "optimizer": "sgd"}
    runs = []
    for every in (1, 100):
        config = tiny_config(epochs=1, log_every=every, training_options=options)
        run = new_run(tmp_path, config, f"every{every}")
        train(config, tiny_corpus, run)
        runs.append([row for row in run.metrics() if row["kind"] == "train"])
    single, (whole,) = runs
    tokens = [row["tokens"] for row in single]
    shares = [b - a for a, b in itertools.pairwise([0, *tokens])]
    assert len(set(shares)) > 2
    mean = sum(row["cross_entropy"] * n for row, n in zip(single, shares, strict=True)) / tokens[-1]
    assert whole["cross_entropy"] == pytest.approx(mean, rel=1e-12)


def test_a_finished_run_returns_at_once(tmp_path, tiny_corpus, tiny_config, monkeypatch):
    config = tiny_config(max_steps=3)
    run = new_run(tmp_path, config)
    result = train(config, tiny_corpus, run)
    monkeypatch.setattr(trainer_module, "Trainer", None)
    assert train(config, None, run) == result


def test_resume_false_starts_afresh(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    config = tiny_config(max_steps=9)
    straight, run = new_run(tmp_path, config, "straight"), new_run(tmp_path, config)
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
    run = new_run(tmp_path, config)
    interrupt_at({4})
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run)
    with pytest.raises(LabError, match=r"of another training: config\.head is 'softmax' there, 'plif' here"):
        train(dataclasses.replace(config, head="plif"), tiny_corpus, run)
    with pytest.raises(LabError, match="fingerprint"):
        train(config, dataclasses.replace(tiny_corpus, fingerprint="another"), run)
    assert train(dataclasses.replace(config, checkpoint_every=1.0), tiny_corpus, run)["steps"] == 9


@pytest.mark.parametrize("fields", [{}, {"eval_every": 1}, {"head": "plif", "log_every": 1, "checkpoint_every": 0.0}])
def test_divergence_is_told_and_nothing_bad_is_saved(tmp_path, tiny_corpus, tiny_config, fields):
    config = tiny_config(lr=1e25, training_options=SGD, clip=0, epochs=3, **fields)
    run = new_run(tmp_path, config)
    with pytest.raises(
        TrainingDiverged, match=r"diverged: .* not finite at step \d+ \(epoch 0\.\d+\).*lower lr"
    ) as told:
        train(config, tiny_corpus, run)
    assert told.value.step < 9
    assert told.value.last_loss is None or math.isfinite(told.value.last_loss)
    assert run.result is None
    for name in ("last", "best"):
        checkpoint = run.load_checkpoint(name)
        tensors = {} if checkpoint is None else checkpoint.tensors
        assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_patience_stops_early_and_the_best_weights_count(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(lr=0.5, epochs=30, eval_every=3, patience=3)
    run = new_run(tmp_path, config)
    result = train(config, tiny_corpus, run)
    valid = [row for row in run.metrics() if row["kind"] == "valid"]
    best = min(valid, key=lambda row: row["cross_entropy"])
    assert result["stopped"] == "early"
    assert result["best_step"] == best["step"] == load_trained(run.path).step
    assert result["steps"] == best["step"] + 9 < 600
    assert result["valid"]["cross_entropy"] == best["cross_entropy"]
    model = load_trained(run.path).model
    found = evaluate(model, tiny_corpus.splits["valid"], batch_size=32, bptt=10)
    assert found.cross_entropy == best["cross_entropy"]


def test_averaged_weights_are_what_is_validated(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(lr=5.0, epochs=3, training_options={**SGD, "asgd": 1})
    run = new_run(tmp_path, config)
    train(config, tiny_corpus, run)
    best, last = run.load_checkpoint("best"), run.load_checkpoint("last")
    assert last.state["state"]["averaged"] == last.step
    assert best.step == last.step
    weight = "model.head.weight"
    assert torch.equal(best.tensors[weight], last.tensors["average.head.weight"])
    assert not torch.equal(best.tensors[weight], last.tensors[weight])


def test_one_training_at_a_time(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(max_steps=3)
    run = new_run(tmp_path, config)
    with run.lock(), pytest.raises(LabError, match="another process"):
        train(config, tiny_corpus, run)


def test_training_leaves_the_callers_random_numbers_and_threads_alone(tmp_path, tiny_corpus, tiny_config):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    config = tiny_config(max_steps=3)
    train(config, tiny_corpus, new_run(tmp_path, config))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_tensorboard_on_request(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(max_steps=12, eval_every=6)
    run = new_run(tmp_path, config)
    interrupt_at({7})
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run, tensorboard=True)
    train(config, tiny_corpus, run, tensorboard=True)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for kind in ("train", "valid"):
        rows = [row for row in run.metrics() if row["kind"] == kind]
        scalars = events.Scalars(f"{kind}/cross_entropy")
        assert [event.step for event in scalars] == [row["step"] for row in rows]
        assert [event.value for event in scalars] == pytest.approx([row["cross_entropy"] for row in rows], rel=1e-6)
    other = tiny_config(max_steps=3)
    quiet = new_run(tmp_path, other, "quiet")
    train(other, tiny_corpus, quiet)
    assert not (quiet.path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "softmacks"}, "head must be one of softmax"),
        ({"preset": "lstm"}, "preset must be one of"),
        ({"in_features": 0}, "in_features must be an integer of at least 1, got 0"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"precision": "fp16"}, "precision must be 'no' or 'bf16'"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"log_every": 0}, "log_every must be"),
        ({"patience": 0}, "patience must be"),
        ({"function_lr_scale": -1}, "function_lr_scale must be"),
        ({"training_options": {"lr": 1.0}}, "training_options: give lr by the field lr"),
        ({"training_options": {"asgd": "trigger"}}, "asgd averages SGD's iterates"),
        ({"training_options": {"speed": 1}}, "unknown training setting: speed"),
        ({"model_options": {"out_features": 3}}, "give out_features by the field in_features"),
        ({"model_options": {"depth": 3}}, "unknown setting of model 'awd-lstm': depth"),
        ({"preset": "transformer-laptop", "bptt": 300}, "bptt must be at most"),
        ({"head_options": 3}, "head_options must be a dictionary"),
    ],
)
def test_bad_settings_are_refused_at_once(fields, message):
    with pytest.raises(LabError, match=message):
        TrainConfig(**fields)


def test_settings_travel_through_json_and_resolve():
    config = TrainConfig(head="plif", head_options={"num_pieces": 9}, epochs=1.5, clip=0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    full = config.resolved()
    assert full.resolved() == full
    assert full.resolved_preset() == config.resolved_preset()
    assert (full.clip, full.function_clip, full.epochs, full.in_features) == (0.0, 0.0, 1.5, 32)
    assert config.resolved_preset().training.clip is None
    assert TrainConfig(preset="awd-lstm-ptb").resolved().function_clip == 0.25
    with pytest.raises(LabError, match="unknown setting: colour"):
        TrainConfig.from_dict({"colour": 1})


def test_too_small_a_text(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(batch_size=5000)
    with pytest.raises(LabError, match="too few for 5000 streams"):
        train(config, tiny_corpus, new_run(tmp_path, config))


TWO_PROCESSES = """
import json, signal, sys
from pathlib import Path
from uncork.lab.runs import RunStore
from uncork.lab.train_config import TrainConfig
from uncork.lab.training import train
root, cache, config = Path(sys.argv[1]), Path(sys.argv[2]), TrainConfig.from_dict(json.loads(sys.argv[3]))
run = RunStore(root).run("two", config.resolved().to_dict())
corpus = config.load_corpus(cache_dir=cache)
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
    one = new_run(tmp_path, config, "one")
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
        runs.append(new_run(tmp_path / how, config, "two"))
    for row, expected in zip(runs[0].metrics(), one.metrics(), strict=True):
        for key, value in timeless(expected).items():
            assert row[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
    assert numbers(runs[0]) == numbers(runs[1])

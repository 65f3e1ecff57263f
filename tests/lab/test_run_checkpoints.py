"""Checkpoints come back to the bit, and neither damage, a full disk nor kill -9 loses the last intact one."""

import errno
import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as serialize

from uncork.lab.errors import LabError
from uncork.lab.run.store import RunStore


@pytest.fixture
def run(tmp_path):
    return RunStore(tmp_path / "out").run("plif-3", {"head": "plif"})


def checkpoints(run):
    return sorted((run.path / "checkpoints").glob("*.safetensors"))


def save(run, step, **options):
    run.save_checkpoint(step, {"w": torch.full((1000,), float(step))}, {"step": step, "lr": 0.1 * step}, **options)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_every_dtype_and_layout_comes_back_to_the_bit(run):
    storage = torch.randn(6, 4)
    model = torch.nn.Linear(3, 2)
    tensors = {
        "a": storage,
        "same": storage,
        "view": storage[1:3],
        "transposed": storage.t(),
        "strided": storage[::2, ::2],
        "expanded": torch.ones(1).expand(5),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "int64": torch.tensor([2**62 + 1, -1]),
        "bool": torch.tensor([True, False]),
        "uint8": torch.get_rng_state(),
        "bfloat16": torch.randn(7).bfloat16(),
        "float16": torch.randn(7).half(),
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0),
        "parameter": model.weight,
    }
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    run.save_checkpoint(7, tensors, {})
    loaded = run.load_checkpoint()
    assert loaded.step == 7
    assert loaded.tensors.keys() == tensors.keys()
    for key, tensor in before.items():
        got = loaded.tensors[key]
        assert (got.dtype, got.shape, got.requires_grad) == (tensor.dtype, tensor.shape, False)
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.detach().reshape(-1).view(torch.uint8)), key
    loaded.tensors["a"].zero_()
    assert torch.equal(run.load_checkpoint().tensors["a"], before["a"])


def test_the_state_comes_back_exactly(run):
    state = {
        "lr": 0.1 + 0.2,
        "tiny": 5e-324,
        "huge": 1.7976931348623157e308,
        "zero": -0.0,
        "infinite": [math.inf, -math.inf],
        "rng": {"bit_generator": "PCG64", "state": 2**127 + 12345},
        "best": None,
        "done": False,
        "text": 'é "quoted"\n\u2028 😀',
        "numpy": np.float32(0.1),
        "tuple": (1, 2),
    }
    run.save_checkpoint(0, {}, {**state, "nan": math.nan})
    loaded = run.load_checkpoint().state
    assert math.isnan(loaded.pop("nan"))
    assert loaded == {**state, "numpy": float(np.float32(0.1)), "tuple": [1, 2]}
    assert math.copysign(1, loaded["zero"]) == -1
    assert type(loaded["done"]) is bool


def test_none_when_there_is_none(run):
    assert run.load_checkpoint() is None
    save(run, 1, name="best")
    assert run.load_checkpoint() is None


def test_the_newest_are_kept_and_names_do_not_mix(run):
    for step in (1, 2, 3, 100_000_000):
        save(run, step)
    save(run, 1, name="best", keep=1)
    save(run, 2, name="best", keep=1)
    save(run, 5, name="last-00000002", keep=1)
    assert run.load_checkpoint().step == 100_000_000
    assert run.load_checkpoint("best").step == 2
    assert run.load_checkpoint("last-00000002").step == 5
    assert [path.name.split(".")[0] for path in checkpoints(run)] == [
        "best-00000002",
        "last-00000002-00000005",
        "last-00000003",
        "last-100000000",
    ]


def test_saving_an_earlier_step_drops_what_came_after_it(run):
    for step in (10, 20, 30):
        save(run, step)
    save(run, 25)
    assert run.load_checkpoint().step == 25
    assert [int(path.name[5:13]) for path in checkpoints(run)] == [20, 25]


def test_a_step_saved_again_replaces_itself(run):
    save(run, 1, keep=1)
    save(run, 1, keep=1)
    run.save_checkpoint(1, {"w": torch.zeros(1)}, {"other": True}, keep=1)
    assert run.load_checkpoint().state == {"other": True}
    assert len(checkpoints(run)) == 1


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_checkpoint_gives_the_one_before_and_says_so(run, damage, caplog):
    save(run, 1)
    save(run, 2)
    damage(checkpoints(run)[-1])
    loaded = run.load_checkpoint()
    assert (loaded.step, loaded.state["step"], loaded.tensors["w"][0].item()) == (1, 1, 1.0)
    assert "last-00000002" in caplog.text
    assert "is damaged" in caplog.text
    save(run, 2)
    assert run.load_checkpoint().step == 2


def test_all_damaged_is_an_error_that_names_the_files(run):
    save(run, 1)
    save(run, 2)
    for path in checkpoints(run):
        truncate(path)
    with pytest.raises(LabError, match=r"no intact checkpoint.*last-00000002.*last-00000001"):
        run.load_checkpoint()


def test_a_safetensors_file_of_another_program_is_no_checkpoint(run):
    data = serialize({"w": torch.zeros(1)})
    (run.path / "checkpoints").mkdir()
    digest = hashlib.sha256(data).hexdigest()[:16]
    (run.path / "checkpoints" / f"last-00000001.{digest}.safetensors").write_bytes(data)
    with pytest.raises(LabError, match="no intact checkpoint"):
        run.load_checkpoint()


def test_bad_arguments_are_refused(run):
    with pytest.raises(ValueError, match="step=-1"):
        save(run, -1)
    with pytest.raises(ValueError, match="keep=0"):
        save(run, 1, keep=0)
    assert not (run.path / "checkpoints").exists()


# ---------------------------------------------------------------- full disks and kills


@pytest.mark.parametrize("place", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_keeps_the_old_file(run, monkeypatch, place, error):
    save(run, 1)
    run.finish({"old": 1})
    run.append_metrics({"step": 1})

    def fail(*args):
        raise error

    monkeypatch.setattr(*((Path, "replace") if place == "replace" else (os, "fsync")), fail)
    actions = {
        "last-00000002": lambda: save(run, 2),
        "result.json": lambda: run.finish({"new": 1}),
        "metrics.jsonl": lambda: run.truncate_metrics(lambda row: False),
    }
    for name, action in actions.items():
        expected = LabError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected) as caught:
            action()
        if expected is LabError:
            assert name in str(caught.value)
            assert "No space left on device" in str(caught.value)
            assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert run.load_checkpoint().step == 1
    assert run.result == {"old": 1}
    assert run.metrics() == [{"step": 1}]
    assert leftovers(run.path) == []


def test_a_write_that_the_system_cuts_short_keeps_the_old_file(run):
    """The kernel's file size limit fails real writes half way, as a full disk does."""
    save(run, 1)
    run.append_metrics({"step": 1})
    code = (
        "import resource, sys, torch\n"
        "from uncork.lab.errors import LabError\n"
        "from uncork.lab.run.store import Run\n"
        "run = Run.open(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "for action in (lambda: run.save_checkpoint(2, {'w': torch.zeros(10000)}, {}),\n"
        "               lambda: run.finish({'text': 'x' * 10000}),\n"
        "               lambda: run.append_metrics({'text': 'x' * 10000})):\n"
        "    try: action()\n"
        "    except LabError as error: print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code, run.path], capture_output=True, text=True, check=True).stdout
    lines = output.splitlines()
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == [
        "the checkpoint cannot be written",
        "cannot be written",
        "cannot be written",
    ]
    assert all("File too large" in line for line in lines)
    assert run.load_checkpoint().step == 1
    assert run.result is None
    assert run.metrics() == [{"step": 1}]
    assert leftovers(run.path) == []
    run.append_metrics({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_run_whose_folder_is_gone_is_one_line(run):
    shutil.rmtree(run.path)
    for action in (lambda: save(run, 1), lambda: run.append_metrics({}), lambda: run.finish({}), run.lock().__enter__):
        with pytest.raises(LabError, match="No such file or directory"):
            action()


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_training(run, monkeypatch, caplog):
    save(run, 1, keep=1)

    def fail(*args, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", fail)
    save(run, 2, keep=1)
    assert "cannot be removed" in caplog.text
    assert run.load_checkpoint().step == 2


# Forks one training process a line of its input, so that torch is imported once, and says when that one is dead.
TRAINERS = """
import os, sys, torch
from uncork.lab.run.store import Run

def train(run):
    checkpoint = run.load_checkpoint()
    step = checkpoint.step if checkpoint else 0
    run.truncate_metrics(lambda row: row["step"] <= step)
    print(os.getpid(), flush=True)
    while True:
        step += 1
        run.append_metrics({"step": step, "loss": 1 / step})
        run.save_checkpoint(step, {"w": torch.full((50_000,), step), "v": torch.full((9,), -step)}, {"x": 0.1 * step})

for _ in sys.stdin:
    child = os.fork()
    if not child:
        with Run.open(sys.argv[1]).lock():
            train(Run.open(sys.argv[1]))
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_usable_checkpoint(run, caplog):
    moments = random.Random(0)
    reached = 0
    command = [sys.executable, "-c", TRAINERS, run.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as trainers:
        assert trainers.stdin is not None
        assert trainers.stdout is not None
        for _ in range(15):
            trainers.stdin.write("train\n")
            process = int(trainers.stdout.readline())
            time.sleep(moments.uniform(0.02, 0.1))
            os.kill(process, signal.SIGKILL)
            assert trainers.stdout.readline() == "dead\n"
            loaded = run.load_checkpoint()
            step = loaded.step if loaded else 0
            assert step >= reached
            reached = step
            rows = [row for row in run.metrics() if row["step"] <= reached]
            assert rows == [{"step": step, "loss": 1 / step} for step in range(1, reached + 1)]
            if loaded:
                assert loaded.state == {"x": 0.1 * reached}
                assert torch.equal(loaded.tensors["w"], torch.full((50_000,), reached))
                assert torch.equal(loaded.tensors["v"], torch.full((9,), -reached))
    assert reached > 15
    assert caplog.text == ""  # a kill never damages a committed checkpoint, so none was passed over
    save(run, reached + 1)
    assert leftovers(run.path / "checkpoints") == []
    assert len(checkpoints(run)) == 2

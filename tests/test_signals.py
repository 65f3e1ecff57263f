"""Signals to real processes: what ends a command leaves a checkpoint that goes on to the same numbers."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINES = ["the cat sat on the mat", "a dog sat on a log", "the dog saw the cat", "a cat saw a dog on the mat"]
SMALL = [
    "--in-features", "4", "--epochs", "6", "--batch-size", "4", "--bptt", "8", "--min-count", "1", "--threads", "1",
    "--set", "model_options.embedding_size=6", "model_options.hidden_sizes=[8]", "log_every=1",
]  # fmt: skip
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::UserWarning")  # that the native tile is missing, where it is
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES[i * i % 4] for i in range(400)) + "\n")
    return path


def start(*arguments, wrapper=(), **options):
    command = [*wrapper, sys.executable, "-m", "uncork", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, start_new_session=True, **options)


def wait_for(process, *words):
    """Reads until each of the words has begun a line with a step in it."""
    missing = set(words)
    while missing:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        missing -= {word for word in missing if line.startswith(word) and " step " in line}


def require_gone(group):
    for _ in range(100):  # Python's own helper process ends a moment after the others
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process is left")


def train_of(text, out):
    return ["train", "--corpus", text, "--out-dir", out, *SMALL]


def numbers(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["kind"], row["step"], row["cross_entropy"]) for row in rows]


@pytest.mark.slow
def test_every_signal_leaves_a_checkpoint_that_goes_on_to_the_same_numbers(text, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run(
        [sys.executable, "-m", "uncork", *map(str, train_of(text, straight))], check=True, capture_output=True
    )
    for number, (signum, code) in enumerate(CODES.items()):
        with start(*train_of(text, broken), *["--resume"] * (number > 0)) as process:
            wait_for(process, "broken")
            process.send_signal(signum)
            _, error = process.communicate(timeout=60)
        assert process.returncode == code, error
        assert len(error.strip().splitlines()) == 1, error
        assert "to go on from what is kept: uncork train" in error
        assert list((broken / "checkpoints").glob("last-*"))
    assert not (broken / "result.json").exists()
    subprocess.run(
        [sys.executable, "-m", "uncork", *map(str, train_of(text, broken)), "--resume"], check=True, capture_output=True
    )
    assert numbers(broken) == numbers(straight)


@pytest.mark.slow
def test_nohup_keeps_its_word(text, tmp_path):
    with start(*train_of(text, tmp_path / "run"), wrapper=["nohup"]) as process:
        wait_for(process, "run")
        process.send_signal(signal.SIGHUP)
        wait_for(process, "run")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_terminal_that_is_closed_leaves_a_checkpoint(text, tmp_path):
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "uncork", *map(str, train_of(text, tmp_path / "run"))]
        os.execv(sys.executable, command)
    seen = b""
    while b" step " not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (129, 141)  # the signal, or a print that finds nobody, came first
    assert list((tmp_path / "run/checkpoints").glob("last-*"))


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_ends_with_its_workers(signum, whole_group, text, tmp_path):
    out = tmp_path / "compared"
    small = [*SMALL]
    small[small.index("--epochs") + 1] = "5000"
    arguments = ["compare", "--corpus", text, "--out-dir", out, "--workers", "2", "--heads", "softmax", "plif",
                 "--seeds", "1", *small]  # fmt: skip
    with start(*arguments) as process:
        wait_for(process, "softmax-seed0", "plif-seed0")
        if whole_group:
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    assert process.returncode == CODES[signum], error
    assert len(error.strip().splitlines()) == 1, error
    for name in ("softmax-seed0", "plif-seed0"):
        assert list((out / "runs" / name / "checkpoints").glob("last-*"))
    require_gone(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_synthetic_part_ends_with_its_workers(whole_group, tmp_path):
    with start("synthetic", "--out-dir", tmp_path / "out", "--quick", "--workers", "2") as process:
        for line in process.stdout:
            if line.startswith("[1/"):
                break
        if whole_group:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert len(error.strip().splitlines()) == 1, error
    assert Path(tmp_path, "out/cells.jsonl").read_text().count("\n") >= 1
    require_gone(process.pid)

"""The examples run as a person would run them, at small sizes, and what they print is what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(name, *arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_a_gpt_before_and_after(tmp_path):
    words = [f"w{(7 * i * i + i // 5) % 97}" for i in range(12_000)]
    (tmp_path / "text.txt").write_text(" ".join(words), encoding="utf-8")
    sizes = ("--text", "text.txt", "--vocab-size", 100, "--width", 16, "--layers", 1, "--length", 16, "--steps", 40)
    losses = {}
    for output, options in (("plain", ()), ("softmax", ()), ("mos", ("--options", "num_components=2"))):
        found = printed("train_gpt.py", *sizes, "--output", output, *options, cwd=tmp_path)
        losses[output] = number(rf"{output}: validation loss ([\d.]+) nats", found)
        assert number(r"([\d.]+) ms a step", found) > 0
    assert max(losses.values()) < 4.6  # log(100), which a uniform guess has
    assert losses["softmax"] == pytest.approx(losses["plain"], abs=0.3)


def test_a_text_too_short_is_said(tmp_path):
    (tmp_path / "short.txt").write_text("two words", encoding="utf-8")
    with pytest.raises(AssertionError, match="--text: expected at least 10,000 words, got 2"):
        printed("train_gpt.py", "--text", "short.txt", cwd=tmp_path)


def test_fine_tuning_with_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = printed("finetune_trainer.py", "--steps", 60, "--length", 32, "--out-dir", "out", cwd=tmp_path)
    before, after = number(r"held-out loss ([\d.]+) before", found), number(r"before, ([\d.]+) after", found)
    assert after < before - 0.5
    assert "goes on with: [" in found
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_recommender(tmp_path):
    sizes = ("--items", 2_000, "--groups", 20, "--users", 4_000, "--epochs", 3, "--lr", 3e-3)
    found = printed("recommender.py", *sizes, cwd=tmp_path)
    reached, popularity = number(r"epoch 3: test loss ([\d.]+)", found), number(r"popularity alone: ([\d.]+)", found)
    best = number(r"knows the group: ([\d.]+)", found)
    assert best < reached < popularity
    assert "for 100 % of 100 users" in found
    few = ("--items", 2_000, "--groups", 20, "--users", 500, "--head", "softcap")
    with_function = printed("recommender.py", *few, cwd=tmp_path)
    assert "for 100 % of 100 users" in with_function


def test_a_classifier(tmp_path):
    found = printed("classifier.py", "--classes", 50, "--examples", 2_000, "--epochs", 2, cwd=tmp_path)
    rows = {line[:28].strip(): line for line in found.splitlines()}
    assert set(rows) == {"softmax", "softmax, temperature fitted", "plif"}
    accuracy = {name: number(r"accuracy ([\d.]+)", row) for name, row in rows.items()}
    assert accuracy["softmax"] == accuracy["softmax, temperature fitted"]  # a scale changes no order
    loss = {name: number(r"log loss ([\d.]+)", row) for name, row in rows.items()}
    assert loss["softmax, temperature fitted"] < loss["softmax"]

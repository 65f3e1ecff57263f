"""benchmarks/gpu.py at a tiny size in Triton's interpreter: what a machine with a GPU runs, before there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import uncork
from uncork.loss import tile_triton

if tile_triton._missing():
    pytest.skip(tile_triton._missing(), allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
STAGES = ("check", "sweep", "time", "train")


def start(*arguments, interpreted=True):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(uncork.__file__).parents[1]),
        "TRITON_INTERPRET": "1" if interpreted else "0",
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def kept(folder):
    lines = {stage: folder / f"{stage}.jsonl" for stage in STAGES}
    return {stage: path.read_text().splitlines() if path.exists() else [] for stage, path in lines.items()}


def test_it_stops_when_its_seconds_are_over_goes_on_and_writes_its_tables(tmp_path):
    everything = ("all", "--out", tmp_path, "--device", "cpu", "--quick")
    stopped = start(*everything, "--seconds", 0)
    assert stopped.returncode == 3, stopped.stderr
    assert "stopped before the end" in stopped.stdout
    early = kept(tmp_path)
    assert [len(early[stage]) for stage in STAGES] == [1, 0, 0, 0]
    with (tmp_path / "check.jsonl").open("a") as file:
        file.write('{"name": "cut o')  # a process that was killed as it wrote

    whole = start(*everything)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    made = kept(tmp_path)
    assert made["check"][0] == early["check"][0]
    rows = {stage: pd.read_csv(tmp_path / f"{stage}.csv", keep_default_na=False) for stage in STAGES}
    assert all(frame["name"].is_unique for frame in rows.values())
    assert len(made["check"]) == len(rows["check"]) + 1

    check = rows["check"].set_index("name")
    assert check["passed"].all()
    refused = check.index.str.startswith("monotone-tanh")
    assert refused.sum() == 1
    assert check["note"][refused].str.startswith("refused: it has no kernel for TanhUnits").all()
    assert (check["error"][~refused].astype(float) <= check["bound"][~refused].astype(float)).all()

    assert set(rows["sweep"]["function"]) == {"softmax", "plif-100"}
    assert (rows["sweep"][["ms", "row_statistics", "row_gradient"]].astype(float) > 0).all(axis=None)
    lines = json.loads((tmp_path / "blocks.json").read_text())
    assert lines.keys() >= {"cuda", "hip"}
    assert lines["cuda"]["many_block"] in (16, 32)  # without a GPU its own line is the general one
    assert set(rows["time"]["contender"]) == {"products", "eager", "uncork: softmax", "uncork: plif-100"}
    assert (rows["time"]["rounds"] == 2).all()
    assert rows["time"].set_index("contender")["over_products"]["products"] == 1
    train = rows["train"].set_index("name")
    assert train.groupby("head")["epoch"].max().tolist() == [2] * 4
    losses = train.pivot(index="head", columns="epoch", values="train_perplexity")
    assert (losses[2] < losses[1]).all()
    assert train["valid_perplexity"].between(3, 25).all()  # three successors to a word of twenty
    assert (train["seconds"] > 0).all()
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.columns.tolist() == ["contender", "2, 4, 20: ms", "2, 4, 20: GiB"]
    origin = json.loads((tmp_path / "provenance.json").read_text())
    assert {"command", "commit", "machine", "threads", "versions"} <= origin.keys()  # what docs/build.py reads


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_in_one_line_what_it_needs(tmp_path):
    refused = start("all", "--out", tmp_path / "out", interpreted=False)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "it needs a GPU" in refused.stderr
    assert "--device cpu --quick" in refused.stderr
    assert not (tmp_path / "out").exists()

"""Keeps what a comparison found: `python docs/keep.py runs/demo results/demo [FIGURE ...]` copies tables and origin.

Checkpoints and metrics stay behind. The origin (provenance.json) says how to make the numbers again.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd


def keep(source: Path, destination: Path, figures: list[str]) -> None:
    """Copies table.csv, runs.csv and the figures of these names, and writes provenance.json."""
    destination.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for name in ("table.csv", "runs.csv"):
        frame = pd.read_csv(source / name)
        if config["workers"] > 1:  # runs that shared the cores say nothing of speed
            frame[[c for c in frame if c in ("tokens_per_second", "train_seconds")]] = float("nan")
        frame.to_csv(destination / name, index=False)
    for name in figures:
        shutil.copy(source / "figures" / f"{name}.png", destination / f"{name}.png")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((source / "runs").glob("*/result.json"))]
    began = min(path.stat().st_mtime for path in (source / "runs").glob("*/config.json"))
    # The commit that was checked out when the first run began.
    command = ["git", "log", "-1", "--format=%H", f"--before=@{int(began)}"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    shown = config["command"].replace(config["out_dir"], f"runs/{destination.name}")
    origin = {
        "command": re.sub(r"--data-dir \S+", "--data-dir FOLDER", shown),
        "commit": commit,
        "machine": results[0]["machine"],
        "threads": results[0]["threads"],
        "versions": results[0]["versions"],
        "seeds": sorted({r["seed"] for r in results}),
    }
    (destination / "provenance.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

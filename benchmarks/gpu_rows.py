"""What `benchmarks/gpu.py` keeps: rows as they are made, and the tables of them."""

import hashlib
import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from gpu_contenders import CONTENDERS, Shape  # type: ignore[import-not-found]

import uncork
from uncork.lab.machine import machine_name

STAGES = ("check", "sweep", "time", "train")


class Clock:
    """The seconds of a run; it is over when they are, but not before the run has kept a row."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start, self.kept = seconds, time.monotonic(), 0

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def over(self) -> bool:
        return self.kept > 0 and self.left() <= 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Kept:
    """The rows of a stage, appended one by one."""

    def __init__(self, folder: Path, stage: str, origin: str, clock: Clock) -> None:
        self.path, self.origin, self.clock = folder / f"{stage}.jsonl", origin, clock
        self.rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        self.rows = {row["name"]: row for row in read_rows(self.path) if row["origin"] == self.origin}

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, **row: Any) -> None:
        self.rows[name] = {"name": name, **row, "origin": self.origin}
        with self.path.open("a+b") as file:
            if file.tell():  # a line that was cut off stays one line
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(self.rows[name]).encode() + b"\n")
        self.clock.kept += 1
        print(" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (name, *row.values())), flush=True)


def origin_of(device: torch.device, quick: bool) -> str:
    """A digest of the sources, the versions and the machine."""
    digest = hashlib.sha256()
    own = sorted(Path(__file__).parent.glob("gpu*.py"))
    for path in [*own, *sorted(Path(uncork.__file__).parent.rglob("*.py"))]:
        digest.update(path.read_bytes())
    digest.update(repr((torch.__version__, metadata.version("triton"), machine_name(device), quick)).encode())
    return digest.hexdigest()[:12]


def time_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a contender: milliseconds, over the products', and GiB at every shape."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        shape = Shape(row["tokens"], row["features"], row["vocab"])
        cells = table.setdefault(row["contender"], {"contender": row["contender"]})
        if row["ms"] is None:
            cells[f"{shape}: ms"] = row["note"]
            continue
        ratio = "" if row["over_products"] is None else f" ({row['over_products']:.2f})"
        cells[f"{shape}: ms"] = f"{row['ms']:.3g}{ratio}"
        cells[f"{shape}: GiB"] = "–" if row["mib"] is None else f"{row['mib'] / 1024:.2f}"
    ordered = sorted(table, key=lambda name: list(CONTENDERS).index(name) if name in CONTENDERS else len(CONTENDERS))
    return pd.DataFrame([table[name] for name in ordered]).fillna("–")


def write_tables(folder: Path) -> None:
    """CSV files of the rows that have the origin of the last one, and table.csv."""
    for stage in STAGES:
        rows = read_rows(folder / f"{stage}.jsonl")
        rows = list({row["name"]: row for row in rows if row["origin"] == rows[-1]["origin"]}.values())
        if rows:
            write(folder / f"{stage}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
        if rows and stage == "time":
            table = time_table(rows)
            write(folder / "table.csv", table.to_csv(index=False))
            print(table.to_string(index=False), flush=True)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

"""Whether the tile for GPUs is right on a GPU, which blocks suit it, and how fast it is: for half an hour with one.

    PYTHONPATH=src python benchmarks/gpu.py all --out results/gpu --seconds 540

Stages: `check` compares impl="triton" with float64, case by case, `sweep` tries rows a chunk, blocks and warps, `time`
measures one forward and backward in bfloat16 against the bare products and other libraries, `train` trains AWD-LSTM on
Penn Treebank (`--data` says where its files are) with four heads, an epoch each in turn, until the seconds are over: it
does not go on in a later run. `all` is the four in this order. Rows are appended to STAGE.jsonl as they are made. A run
stops when its seconds are over, after one new row at least; run again, it goes on where it was. Rows of other sources,
versions or machines do not count as made. Every stage ends by writing its rows as CSV, table.csv (from `time`) and
provenance.json; `--table` does only that.

`sweep` ends by writing blocks.json with a line for this kind of GPU: copied over src/uncork/loss/gpu/blocks.json, it is
what the tile reads from then on.

It asks for torch, triton, numpy and pandas alone. Exit codes: 1 a case is wrong, 2 there is no GPU, 3 it stopped
early (run it again). Small, in Triton's interpreter:

    TRITON_INTERPRET=1 PYTHONPATH=src python benchmarks/gpu.py all --out DIR --device cpu --quick
"""

import argparse
import gc
import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_check import QUICK_BLOCK, QUICK_SIZES, SIZES, cases, judge  # type: ignore[import-not-found]
from gpu_contenders import (  # type: ignore[import-not-found]
    CONTENDERS,
    LEAST_ROUNDS,
    PRODUCTS,
    QUICK_CONTENDERS,
    QUICK_SHAPES,
    ROUNDS,
    SHAPES,
    SWEPT,
    WARM_UP,
    Contender,
    Inputs,
    Shape,
    available,
    milliseconds,
    ours,
    peak_mib,
    plif,
)
from gpu_lstm import PUBLISHED, QUICK, Text, rounds  # type: ignore[import-not-found]
from gpu_rows import STAGES, Clock, Kept, origin_of, write, write_tables  # type: ignore[import-not-found]

from uncork import LogitFunction
from uncork.lab.machine import cores, machine_name
from uncork.lab.run.provenance import provenance
from uncork.loss import tile_triton
from uncork.loss.gpu.blocks import Blocks, kind_of, known_blocks

WRONG, UNABLE, STOPPED = 1, 2, 3


class DeviceError(Exception):
    """The device no longer answers this process."""


# ---- the device


def note_of(error: Exception) -> str:
    """What is said of a call that raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def require_alive(device: torch.device) -> None:
    """Raises DeviceError if an error has made the device useless for this process."""
    freed(device)
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise DeviceError(note_of(error)) from error


def freed(device: torch.device) -> None:
    """Gives memory back that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the stages


@contextmanager
def blocks(
    block: int | None, warps: int = 8, spent: list[tuple[str, Callable[[], float]]] | None = None
) -> Iterator[None]:
    """Kernels take so many numbers at once, in so many warps; spent: gets each one's name and milliseconds."""
    before = {name: getattr(tile_triton, name) for name in ("blocks_of", "_launch")}
    launch = before["_launch"]

    def launched(kernel: Any, programs: int, **arguments: Any) -> None:
        if spent is None:
            launch(kernel, programs, **arguments)
        elif not arguments["scores"].is_cuda:
            took = milliseconds(torch.device("cpu"), lambda: launch(kernel, programs, **arguments))
            spent.append((kernel.__name__, lambda: took))
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch(kernel, programs, **arguments)
            end.record()
            spent.append((kernel.__name__, lambda: begin.elapsed_time(end)))

    changed: dict[str, Any] = {"_launch": launched}
    if block is not None:
        own = {"block": block, "warps": warps, "many_block": block, "many_warps": warps}
        changed["blocks_of"] = lambda device: before["blocks_of"](device)._replace(**own)
    try:
        for name, value in changed.items():
            setattr(tile_triton, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(tile_triton, name, value)


def check(run: "Run") -> bool:
    """Every case, in some processes at once, since most of the time goes into compiling; whether all were made."""
    kept, wanted = run.kept("check"), cases(run.quick)
    names = [case.name for case in wanted]
    if run.workers > 1:
        made = -1
        while not run.clock.over() and made < len(kept.rows) and any(name not in kept for name in names):
            made = len(kept.rows)
            command = [sys.executable, __file__, "check", "--out", str(run.out), "--device", str(run.device)]
            command += ["--seconds", str(max(0.0, run.clock.left())), "--workers", "1"]
            command += ["--quick"] if run.quick else []
            started = [subprocess.Popen([*command, "--slice", f"{i}/{run.workers}"]) for i in range(run.workers)]
            for process in started:
                process.wait()
            kept.read()
            run.clock.kept += len(kept.rows) - made
    else:
        first, step = run.slice
        with blocks(QUICK_BLOCK if run.quick else None):
            for case in wanted[first::step]:
                if case.name in kept:
                    continue
                if run.clock.over():
                    break
                try:
                    found = judge(case, QUICK_SIZES if run.quick else SIZES, run.device)
                except Exception as error:
                    found = {"error": None, "bound": None, "passed": False, "worst": "", "note": note_of(error)}
                kept.add(case.name, **found)
                if found["error"] is None:
                    require_alive(run.device)
        names = names[first::step]
    rows = [kept.rows[name] for name in names if name in kept]
    failed = [row["name"] for row in rows if not row["passed"]]
    print(f"check: {len(rows)} of {len(names)} cases made, {len(failed)} failed", *failed, sep="\n  ", flush=True)
    run.failed |= bool(failed)
    return len(rows) == len(names)


class Setting(NamedTuple):
    """What `sweep` tries."""

    rows: int
    block: int
    warps: int


def settings(quick: bool) -> list[Setting]:
    """All of 4 to 32 numbers a thread; at first with the rows that lie in the middle."""
    if quick:
        return [Setting(2, 16, 4), Setting(1, 32, 4)]
    sizes = [
        (block, warps)
        for block, warps in product((1024, 2048, 4096, 8192), (4, 8, 16))
        if 4 <= block // (32 * warps) <= 32
    ]
    return [Setting(rows, *size) for rows, size in product((2048, 4096, 1024, 8192, 512), sizes)]


KERNELS = ("row_statistics", "row_gradient")


def sweep(run: "Run") -> bool:
    """Milliseconds of a step and of its kernels at each setting; whether all were made."""
    kept, shape = run.kept("sweep"), QUICK_SHAPES[0] if run.quick else SWEPT
    functions: dict[str, Callable[[], LogitFunction | None]] = {
        "softmax": lambda: None,
        "plif-100": partial(plif, 100, False),
    }
    names = {
        f"{function} at {shape}: {s.rows} rows, blocks of {s.block}, {s.warps} warps": (function, s)
        for s, function in product(settings(run.quick), functions)
    }
    runs, inputs = 1 if run.quick else 5, None
    for name, (function, setting) in names.items():
        if name in kept:
            continue
        if run.clock.over():
            break
        inputs = inputs or Inputs(shape, run.device)
        row: dict[str, Any] = {
            "function": function,
            **setting._asdict(),
            "ms": None,
            **dict.fromkeys(KERNELS),
            "note": "",
        }
        spent: list[tuple[str, Callable[[], float]]] = []
        contender = None
        try:
            with blocks(setting.block, setting.warps, spent):
                contender, times = ours(inputs, functions[function], setting.rows), []
                for turn in range(runs + 1):
                    contender.clear()
                    if turn == 1:
                        spent.clear()
                    times.append(milliseconds(run.device, contender.run))
            row["ms"] = statistics.median(times[1:])
            for kernel in KERNELS:
                row[kernel] = sum(took() for name, took in spent if name == kernel) / runs
        except Exception as error:
            row["note"] = note_of(error)
        if contender is not None:
            contender.clear()
        kept.add(name, **row)
        if row["note"]:
            contender = None
            require_alive(run.device)
    made = [kept.rows[name] for name in names if name in kept]
    for function in functions:
        measured = [row for row in made if row["function"] == function and row["ms"] is not None]
        for what in ("ms", *KERNELS) if measured else ():
            best = min(measured, key=lambda row: row[what])
            print(
                f"sweep: best {what} of {function}: {best[what]:.3g}, {[best[key] for key in Setting._fields]}",
                flush=True,
            )
    print(f"sweep: {len(made)} of {len(names)} settings made", flush=True)
    if len(made) == len(names):
        lines = {**known_blocks(), kind_of(run.device): best_blocks(made, shape)}
        text = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(line._asdict())}" for kind, line in lines.items())
        write(run.out / "blocks.json", f"{{\n{text}\n}}\n")
    return len(made) == len(names)


def best_blocks(made: list[dict[str, Any]], shape: Shape) -> Blocks:
    """The quickest of each: both kernels of the softmax, the gradient of a learned PLIF, and the step's rows."""

    def best(function: str, *columns: str) -> dict[str, Any]:
        measured = [row for row in made if row["function"] == function and row["ms"] is not None]
        return min(measured, key=lambda row: sum(row[column] for column in columns))

    plain, many = best("softmax", *KERNELS), best("plif-100", "row_gradient")
    chunk = best("softmax", "ms")["rows"] * shape.vocab * 4 / 2**20
    return Blocks(plain["block"], plain["warps"], many["block"], many["warps"], max(1, round(chunk)))


def time_shape(run: "Run", kept: Kept, shape: Shape, names: list[str]) -> None:
    """Keeps a row of each contender: quantiles of its milliseconds, the ratio to the products' in the same rounds."""
    device, inputs = run.device, Inputs(shape, run.device)
    ready: dict[str, tuple[Contender, float | None]] = {}
    about = {"tokens": shape.tokens, "features": shape.features, "vocab": shape.vocab}
    nothing = dict.fromkeys(("ms", "q1", "q3", "over_products", "mib"))

    def key(name: str) -> str:
        return f"{name} at {shape}"

    def gave_up(name: str, error: Exception) -> None:
        kept.add(key(name), contender=name, **about, **nothing, rounds=0, note=note_of(error))

    for name in [PRODUCTS, *(n for n in names if n != PRODUCTS)]:
        if run.clock.over():
            break
        contender = None
        try:
            contender = CONTENDERS[name](inputs)
            for _ in range(WARM_UP - 1 if not run.quick else 0):
                contender.clear()
                contender.run()
            contender.clear()
            ready[name] = (contender, peak_mib(device, contender.run))
        except Exception as error:
            gave_up(name, error)
        if contender is not None:
            contender.clear()
        if name not in ready:
            contender = None
            require_alive(device)
    freed(device)
    times: dict[str, dict[int, float]] = {name: {} for name in ready}
    order, shuffle, rounds = list(ready), random.Random(0), 2 if run.quick else ROUNDS
    least = min(LEAST_ROUNDS, rounds)
    for turn in range(rounds):
        if run.clock.over():
            break
        shuffle.shuffle(order)
        for name in list(order):
            contender = ready[name][0]
            contender.clear()
            try:
                times[name][turn] = milliseconds(device, contender.run)
            except Exception as error:
                order.remove(name)
                del ready[name]
                gave_up(name, error)
            contender.clear()
            if name not in ready:
                require_alive(device)
    base = times.get(PRODUCTS, {})
    for name, (_, mib) in ready.items():
        own = list(times[name].values())
        if len(own) < least or key(name) in kept:
            continue
        q1, median, q3 = statistics.quantiles(own, n=4, method="inclusive")
        ratios = [took / base[turn] for turn, took in times[name].items() if turn in base]
        found = {"ms": median, "q1": q1, "q3": q3, "over_products": statistics.median(ratios) if ratios else None}
        kept.add(key(name), contender=name, **about, **found, mib=mib, rounds=len(own), note="")


def measure(run: "Run") -> bool:
    """All contenders at all shapes; whether all were made."""
    kept = run.kept("time")
    contenders = [name for name in (QUICK_CONTENDERS if run.quick else CONTENDERS) if available(name)]
    left_out = [name for name in CONTENDERS if not available(name)]
    if left_out:
        print("time: not installed here:", ", ".join(left_out), flush=True)
    shapes = QUICK_SHAPES if run.quick else SHAPES
    wanted = {shape: [f"{name} at {shape}" for name in contenders] for shape in shapes}
    for shape, names in wanted.items():
        missing = [n for n, name in zip(contenders, names, strict=True) if name not in kept]
        if missing and not run.clock.over():
            time_shape(run, kept, shape, missing)
            freed(run.device)
    every = [name for names in wanted.values() for name in names]
    made = [name for name in every if name in kept]
    print(f"time: {len(made)} of {len(every)} rows made", flush=True)
    return len(made) == len(every)


def train(run: "Run") -> bool:
    """Rounds of an epoch of each head while there is time for another; whether there is nothing left to do."""
    kept = run.kept("train")
    if kept.rows:
        print("train: made before; a training does not go on", flush=True)
        return True
    if not run.quick and run.data is None:
        print("train: left out, since --data does not say where Penn Treebank is", flush=True)
        return True
    text = Text.random() if run.quick else Text.penn_treebank(run.data)
    began = time.monotonic()
    for made, rows in enumerate(rounds(QUICK if run.quick else PUBLISHED, text, run.device), 1):
        for name, row in rows:
            kept.add(f"{name}: epoch {row['epoch']}", **row)
        if run.clock.left() < (time.monotonic() - began) / made or (run.quick and made == 2):
            break
    return True


# ---- provenance


def write_origin(run: "Run") -> None:
    """provenance.json, as docs/build.py reads it."""
    found = provenance(shlex.join(["python", *sys.argv]), torch.get_num_threads(), quick=run.quick, origin=run.origin)
    found["machine"] = machine_name(run.device)
    found["versions"]["triton"] = metadata.version("triton")
    if run.device.type == "cuda":
        found["versions"] |= {"CUDA": torch.version.cuda} if torch.version.hip is None else {"HIP": torch.version.hip}
    write(run.out / "provenance.json", json.dumps(found, indent=2) + "\n")


# ---- the command


class Run:
    """What the arguments say, and what became of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.device, self.quick = given.out, torch.device(given.device), given.quick
        self.data: Path | None = given.data
        self.clock = Clock(given.seconds)
        self.slice = tuple(map(int, given.slice.split("/")))
        self.workers = given.workers or (1 if self.device.type == "cpu" else max(1, min(8, cores() // 2)))
        self.origin, self.failed = origin_of(self.device, self.quick), False

    def kept(self, stage: str) -> Kept:
        return Kept(self.out, stage, self.origin, self.clock)


def missing(device: str) -> str:
    """What the script lacks here; empty if it can run."""
    if tile_triton._missing():
        return tile_triton._missing()
    if torch.device(device).type == "cpu":
        return "" if tile_triton.interpreted() else "on a CPU it needs TRITON_INTERPRET=1, and --quick to end today"
    small = "or, to try it small: TRITON_INTERPRET=1 and --device cpu --quick"
    return "" if torch.cuda.is_available() else f"it needs a GPU that torch sees ({small})"


def main() -> int:
    """Runs the stages; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"], nargs="?", default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="after which it stops, to go on in the next run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", type=Path, help="of `train`: the folder with Penn Treebank's files or archive")
    parser.add_argument("--workers", type=int, help="processes of `check`; None: half the cores, at most 8")
    parser.add_argument("--slice", default="0/1", help="I/N: of the cases of `check` every Nth from I on")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a few cases")
    parser.add_argument("--table", action="store_true", help="write the tables of the rows that are kept, and end")
    given = parser.parse_args()
    if given.table:
        write_tables(given.out)
        return 0
    lacking = missing(given.device)
    if lacking:
        print(f"benchmarks/gpu.py: {lacking}", file=sys.stderr)
        return UNABLE
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    alone = run.slice == (0, 1)
    if alone:
        write_origin(run)
    whole = True
    for stage in STAGES if given.stage == "all" else (given.stage,):
        if run.clock.over():
            whole = False
            break
        try:
            whole &= {"check": check, "sweep": sweep, "time": measure, "train": train}[stage](run)
        except DeviceError as error:
            print(f"{stage}: the device failed and this process is lost to it: {error}", file=sys.stderr)
            whole = False
            break
        finally:
            if alone:
                write_tables(run.out)
    if not whole:
        print("stopped before the end; the same command goes on", flush=True)
    return WRONG if run.failed else 0 if whole else STOPPED


if __name__ == "__main__":
    sys.exit(main())

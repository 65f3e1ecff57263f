"""Instructions of the native tile per score, counted by valgrind's callgrind: unlike times, counts do not drift.

valgrind cannot run AVX-512, so another instruction set is counted, AVX2 by default. Counted are the instructions inside
the tile's library, forward and gradients, without those of the C library's functions that it calls.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from uncork.lab.errors import LabError
from uncork.lab.experiments.bench.contenders import Inputs, build_step
from uncork.lab.experiments.bench.settings import Setup, Shape
from uncork.loss import tile_native

FUNCTIONS = ("softmax", "softcap", "sigsoftmax", "plif-16", "plif-1000", "plif-100000", "mos-4")
SHAPE = Shape(256, 8, 8192)
# callgrind dumps and resets its counts whenever this C function is entered; nothing else here calls it. (A function
# called through ctypes would go unnoticed.)
_MARK = "getloadavg"


def missing() -> str | None:
    """Why instructions cannot be counted here, or None."""
    for program in ("valgrind", "callgrind_annotate"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return None


def count(instruction_set: str = "avx2", functions: tuple[str, ...] = FUNCTIONS) -> list[dict[str, Any]]:
    """One row a function: its instructions per score, forward and gradient together.

    Raises:
        LabError: the process fails, or has no native tile.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        valgrind = ["valgrind", "--tool=callgrind", f"--dump-before={_MARK}", f"--callgrind-out-file={out}"]
        done = subprocess.run(
            [*valgrind, sys.executable, "-m", __name__, *functions],
            env={**os.environ, "UNCORK_INSTRUCTIONS": instruction_set, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("==")]
            raise LabError(f"{said[-1] if said else 'valgrind failed'}")
        library = done.stdout.splitlines()[-1]
        rows = []
        for number, name in enumerate(functions):  # two dumps each: of the warm-up, and of the call that counts
            components = int(name.removeprefix("mos-")) if name.startswith("mos-") else 1
            elements = SHAPE.tokens * SHAPE.vocab_size * components
            inside = own_instructions(Path(f"{out}.{2 * number + 2}"), library)
            if not inside:
                raise LabError(f"no instructions were counted in {library}")
            rows.append(
                {
                    "contender": name,
                    "instruction_set": instruction_set,
                    "tokens": SHAPE.tokens,
                    "vocab_size": SHAPE.vocab_size,
                    "instructions_per_element": round(inside / elements, 2),
                }
            )
        return rows


def own_instructions(dump: Path, library: str) -> int:
    """Instructions executed inside a library, from one of callgrind's files."""
    shown = subprocess.run(
        ["callgrind_annotate", "--threshold=100", str(dump)], capture_output=True, text=True, check=True
    ).stdout
    line = re.compile(rf"^\s*([\d,]+) .*\[{re.escape(library)}\]$", re.MULTILINE)
    return sum(int(found[1].replace(",", "")) for found in line.finditer(shown))


def main(functions: list[str]) -> None:
    """Runs the steps, in the process under valgrind; prints the path of the tile's library."""
    torch.set_num_threads(1)
    inputs = Inputs(Setup(SHAPE, threads=1, impl="native"))
    for name in functions:
        step = build_step(name, inputs)
        for _ in range(2):
            step.run()
            os.getloadavg()
    print(tile_native.LIBRARY)


if __name__ == "__main__":
    main(sys.argv[1:])

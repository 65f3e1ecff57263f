"""Instructions of the native tile per element, counted by valgrind's callgrind: they do not drift as times do.

valgrind cannot run AVX-512, so the count is of another instruction set, AVX2 by default. Counted is what runs inside
the tile's library, gradients included, without what it calls in the C library.
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
# callgrind writes out what it has counted whenever this C function is entered; nothing else here calls it. (It does not
# see functions that ctypes calls.)
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
        for number, name in enumerate(functions):  # a dump ends a warm-up, the next one the call that counts
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
    """What the process under valgrind does; prints the path of the tile's library."""
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

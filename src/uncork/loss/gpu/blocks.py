"""How much of the scores a kernel and a chunk take at once, by the kind of GPU.

blocks.json holds a line for each kind that `benchmarks/gpu.py sweep` has measured ("sm_90", "gfx942"), and the counted
ones for all others: "cuda" and "hip".
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("blocks.json")


class Blocks(NamedTuple):
    """Numbers of a row that a kernel reads at once, its warps, and MiB of scores in a chunk.

    The registers of the warps have to hold a block. Kernels that add to histograms or keep several components have
    more to hold: `many`.
    """

    block: int
    warps: int
    many_block: int
    many_warps: int
    chunk_mib: int


def kind_of(device: torch.device) -> str:
    """The kind of a GPU: "sm_90", "gfx942"; where it cannot be asked, "cuda" or "hip"."""
    general = "cuda" if torch.version.hip is None else "hip"
    if device.type != "cuda" or not torch.cuda.is_available():
        return general
    if general == "hip":
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def known_blocks() -> dict[str, Blocks]:
    """The lines of blocks.json."""
    return {kind: Blocks(**line) for kind, line in json.loads(PATH.read_text(encoding="utf-8")).items()}


@functools.cache
def blocks_of(device: torch.device) -> Blocks:
    """The line of the device's kind."""
    lines = known_blocks()
    return lines.get(kind_of(device), lines["cuda" if torch.version.hip is None else "hip"])

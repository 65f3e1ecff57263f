"""What the compiler makes of the GPU's kernels: registers, spilled bytes, and whether scores are read 16 bytes at once.

    python benchmarks/machine_code.py --out results/machine-code

It compiles ahead of time and needs no GPU. Writes code.csv (every number), table.csv (for docs/performance.md) and
provenance.json; two minutes. "Wide" reads are of 16 bytes, wide writes of 8 (half precision) or 16, counted in the
machine code.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uncork import PLIF, Compose, LogitFunction, MonotoneNetwork, Scale, Softcap
from uncork.lab.report.publish import publish
from uncork.lab.run.provenance import provenance
from uncork.loss import tile_triton
from uncork.loss.gpu import rows
from uncork.loss.gpu.blocks import known_blocks
from uncork.loss.gpu.chain import Chain, counter_bits, pack

VOCAB = 151_936  # it decides whether rows keep counters of their own, and their digits
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The function, and whether its parameters are learned.
FUNCTIONS: dict[str, tuple[LogitFunction | None, bool]] = {
    "softmax": (None, False),
    "softcap": (Softcap(30.0), False),
    "temperature": (Scale(1.0, learnable=True), True),
    "plif, frozen": (PLIF(100, 20.0), False),
    "plif": (PLIF(100, 20.0), True),
    "plif, 100,000 pieces": (PLIF(100_000, 20.0), True),
    "monotone": (MonotoneNetwork(20), True),
    "scale, plif, softcap": (Compose(Scale(1.3, learnable=True), PLIF(100, 20.0), Softcap(30.0)), True),
}
LEARNED_PIECES = [name for name, (f, learned) in FUNCTIONS.items() if learned and "scale" not in str(type(f)).lower()]
# The kernel, the dtype of its gradient, and the components of the mixture.
KERNELS: dict[str, tuple[Any, str, int]] = {
    "statistics": (rows.row_statistics, "*fp32", 1),
    "gradient": (rows.row_gradient, "*fp32", 1),
    "gradient, bfloat16": (rows.row_gradient, "*bf16", 1),
    "mixed words, sums": (rows.mixed_sums, "*fp32", 4),
    "mixed words, gradient": (rows.mixed_gradient, "*bf16", 4),
}


def arguments_of(name: str, out: str, components: int, block: int) -> dict[str, Any]:
    """The arguments of a kernel by name: a type (text) for what is given at run time, else a constant."""
    function, learned = FUNCTIONS[name]
    chain = Chain()
    if function is not None:
        tables = function.tables()
        chain = pack(function.operations() or (), tables, [learned] * len(tables), torch.float32)
    numbers = ("top_out", "log_sum_out", "at_target_out", "numbers", "top_in", "log_sum_in", "factor", "hit")
    mixed = ("log_prior", "loss_factor", "loss_out", "component_out", "size_out", "component_in")
    of_row = None  # counters
    if components == 1 and out == "*bf16":
        of_row = chain.counters(torch.empty(1, VOCAB, device="meta"), torch.bfloat16)
    return {
        **dict.fromkeys((*numbers, *(mixed if components > 1 else ())), "*fp32"),
        **dict.fromkeys(("stride", "out_stride", "V", "W"), "i32"),
        "scores": "*fp32",
        "out": out,
        "index": "*i64",
        "used": "*i1",
        "bias": "*fp32",
        "tables": "*fp32" if chain.kinds else None,
        "bins": "*i64" if chain.num_bins else None,
        "counters": None if of_row is None else "*i64",
        "BITS": counter_bits(VOCAB),
        "COPIES": chain.copies,
        "scales": "*fp32" if chain.num_bins else None,
        "row_sums": "*fp64" if chain.num_scalars else None,
        "K": components,
        "KINDS": chain.kinds,
        "PIECES": chain.pieces,
        "OFFSETS": chain.offsets,
        "SCALARS": chain.scalars,
        "BINS": chain.bins,
        "WANTED": chain.wanted,
        "SIZE": len(chain.kinds),
        "S": chain.num_scalars,
        "PADDED": triton.next_power_of_2(max(1, chain.num_scalars, components)),
        "SHARED": out != "*fp32",
        "ROUND": False,
        "HAS_TARGET": True,
        "T": tl.float32,
        "BLOCK": block,
    }


def compiled(kernel: str, name: str, target: str) -> dict[str, Any]:
    """One row of the table."""
    code, out, components = KERNELS[kernel]
    many = components > 1 or ("gradient" in kernel and name in LEARNED_PIECES)
    lines = known_blocks()
    sizes = lines.get(target, lines[TARGETS[target].backend])
    block, warps = (sizes.many_block, sizes.many_warps) if many else (sizes.block, sizes.warps)
    given = arguments_of(name, out, components, block)
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(code.arg_names):
        value = given.get(argument)
        if not isinstance(value, str):
            signature[argument], constants[(place,)] = "constexpr", value
            continue
        signature[argument] = value
        if value.startswith("*") or argument in ("stride", "out_stride", "W"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(code, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if components > 1 and TARGETS[target].backend == "cuda":
        options |= tile_triton._REGISTERS
    made = triton.compile(source, target=TARGETS[target], options=options)
    line = {"target": target, "kernel": kernel, "function": name, "shared bytes": made.metadata.shared}
    if TARGETS[target].backend == "hip":
        text = made.asm["amdgcn"]
        return {
            **line,
            "registers": _last(r"\.vgpr_count:\s*(\d+)", text),
            "spilled": _last(r"\.vgpr_spill_count:\s*(\d+)", text),
            "wide reads": text.count("global_load_dwordx4") + text.count("buffer_load_dwordx4"),
            "wide writes": len(re.findall(r"(?:global|buffer)_store_dwordx[24]", text)),
        }
    usage, code_text = _disassembled(made.asm["cubin"])
    return {
        **line,
        "registers": _last(r"REG:(\d+)", usage),
        "spilled": _last(r"STACK:(\d+)", usage) + _last(r"LOCAL:(\d+)", usage),
        "wide reads": len(re.findall(r"LDG\.E\.(?:\w+\.)*128", code_text)),
        "wide writes": len(re.findall(r"STG\.E\.(?:\w+\.)*(?:64|128)", code_text)),
    }


def _last(pattern: str, text: str) -> int:
    return int(re.findall(pattern, text)[-1])


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """(resources, machine code), by the tools that come with triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], **run).stdout  # type: ignore[call-overload]
        code = subprocess.run([tools / "cuobjdump", "-sass", file.name], **run).stdout  # type: ignore[call-overload]
    return usage, code


def cases() -> list[tuple[str, str]]:
    """(kernel, function): mixtures whose words mix with two functions, all else with all."""
    return [(k, f) for k in KERNELS for f in FUNCTIONS if KERNELS[k][2] == 1 or f in ("softmax", "plif")]


def main() -> None:
    """Compiles, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [compiled(kernel, name, target) for target in TARGETS for kernel, name in cases()]
    code = pd.DataFrame(lines)
    code = code[["target", "kernel", "function", "registers", "spilled", "shared bytes", "wide reads", "wide writes"]]
    print(code.to_string(index=False))
    shown = code["registers"].astype(str) + (", " + code["shared bytes"].astype(str)).where(
        code["shared bytes"] > 0, ""
    )
    table = code.assign(shown=shown).pivot(index=["kernel", "function"], columns="target", values="shown")
    table = table.reindex(pd.MultiIndex.from_tuples(cases(), names=["kernel", "function"]))[list(TARGETS)].reset_index()
    origin = provenance(shlex.join(["python", *sys.argv]), 1, triton=triton.__version__)
    publish(arguments.out, {"code": code, "table": table}, origin)


if __name__ == "__main__":
    main()

"""What this machine is, and what this process uses of it."""

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help must not wait for the import of torch
    import torch


def machine_name(device: "torch.device") -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


STATUS = Path("/proc/self/status")
"""The file that `resident` reads; Linux alone has it."""


def resident(name: str) -> int:
    """Resident memory of this process in bytes: now ("VmRSS") or at its peak ("VmHWM"). Linux alone; see STATUS.

    Nothing else gives the peak: psutil has none on Linux, and getrusage's includes the memory of the process that
    started this one.
    """
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])

"""What a bug report needs."""

import platform
import sys
from importlib import metadata

import torch

from uncork.loss import tile_native

_OPTIONAL = ("numpy", "triton", "transformers", "accelerate", "trl", "peft", "safetensors")


def show_versions() -> None:
    """Print the versions, the machine, and which implementations of the loss run here: what a bug report needs.

    >>> show_versions()  # doctest: +ELLIPSIS
    uncork        ...
    Python        ...
    """
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    missing = tile_native.missing
    rows = {
        "uncork": sys.modules["uncork"].__version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPU": ", ".join(devices) or "none",
        "native tile": f"none: {missing}" if missing else tile_native.instructions(),
    }
    for name in _OPTIONAL:
        try:
            rows[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows[name] = "none"
    for name, found in rows.items():
        print(f"{name:<13} {found}")

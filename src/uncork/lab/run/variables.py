"""Refuses environment variables by which accelerate, torch or its libraries would silently change the numbers.

accelerate gets its options explicitly (`uncork.lab.train.trainer`), so most of its variables have no effect. One that
asks for something that the training does not do is refused all the same, since its user expects an effect.
"""

import os
from collections.abc import Mapping

from uncork.lab.errors import LabError

_OFF = frozenset({"", "0", "no", "n", "none", "false", "f", "off"})
# accelerate's variables that no number depends on: for devices, for logs, and for a compiler that is not switched on.
# `accelerate launch` sets several of them.
_HARMLESS = frozenset({
    "ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL",
    "ACCELERATE_ENABLE_RICH", "ACCELERATE_DISABLE_RICH", "ACCELERATE_CONFIG_FILE", "ACCELERATE_DYNAMO_MODE",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
})  # fmt: skip
# Values that ask for what is done anyway.
_AS_IT_IS = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": frozenset({"1", "auto"})}
# Variables that reduce the precision of float32 products, and the values at which they do not.
_FEWER_DIGITS = {
    "NVIDIA_TF32_OVERRIDE": _OFF,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": _OFF,
    "ONEDNN_DEFAULT_FPMATH_MODE": frozenset({"", "strict"}),
    "DNNL_DEFAULT_FPMATH_MODE": frozenset({"", "strict"}),
}


def refuse_variables(precision: str = "no", environment: Mapping[str, str] = os.environ) -> None:
    """Raise LabError, in one line, for a variable that changes numbers, or asks for what the training does not do.

    Args:
        precision: of the training, "no" or "bf16". environment: the variables.

    >>> refuse_variables(environment={"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"})
    >>> refuse_variables(environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
    Traceback (most recent call last):
        ...
    uncork.lab.errors.LabError: the environment variable ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 asks accelerate for \
something that this training does not do: unset it
    """
    for name, value in environment.items():
        given = value.strip().lower()
        if given not in _FEWER_DIGITS.get(name, {given}):
            raise LabError(
                f"the environment variable {name}={value} computes products with fewer digits, and so other numbers: "
                "unset it (--precision bf16 is the way to train with bfloat16)"
            )
        if name == "ACCELERATE_MIXED_PRECISION" and given not in ("", precision):
            raise LabError(f"the environment variable {name}={value} and --precision {precision} differ: unset it")
        matters = name.startswith("ACCELERATE_") and name not in _HARMLESS | {"ACCELERATE_MIXED_PRECISION"}
        if matters and given not in _OFF | _AS_IT_IS.get(name, frozenset()):
            raise LabError(
                f"the environment variable {name}={value} asks accelerate for something that this training does not "
                "do: unset it"
            )

"""Increasing functions on the logits, as modules, and the primitives that kernels know them by."""

from uncork.logit_functions.base import Compose, LogitFunction
from uncork.logit_functions.fixed import (
    AsymmetricSoftcap,
    GeneralizedSigsoftmax,
    Identity,
    Scale,
    ScaledSigmoid,
    Sigsoftmax,
    Softcap,
)
from uncork.logit_functions.monotone import MonotoneNetwork
from uncork.logit_functions.plif import PLIF

__all__ = [
    "PLIF",
    "AsymmetricSoftcap",
    "Compose",
    "GeneralizedSigsoftmax",
    "Identity",
    "LogitFunction",
    "MonotoneNetwork",
    "Scale",
    "ScaledSigmoid",
    "Sigsoftmax",
    "Softcap",
]

"""uncork: output layers that break the softmax bottleneck at the cost of a plain softmax.

An increasing function on the logits never changes which word is likeliest; it changes how likely.
"""

from uncork.heads import (
    HEAD_NAMES,
    ContextMixtureHead,
    Head,
    LinearHead,
    MixtureHead,
    build_head,
    head_from_spec,
)
from uncork.logit_functions import (
    PLIF,
    AsymmetricSoftcap,
    Compose,
    GeneralizedSigsoftmax,
    Identity,
    LogitFunction,
    MonotoneNetwork,
    Scale,
    ScaledSigmoid,
    Sigsoftmax,
    Softcap,
)
from uncork.loss import (
    TokenStatistics,
    linear_cross_entropy,
    mixture_cross_entropy,
    mixture_token_statistics,
    token_statistics,
)
from uncork.optim import parameter_groups

__version__ = "0.1.0"  # read by the build; the package need not be installed to be used

__all__ = [
    "HEAD_NAMES",
    "PLIF",
    "AsymmetricSoftcap",
    "Compose",
    "ContextMixtureHead",
    "GeneralizedSigsoftmax",
    "Head",
    "Identity",
    "LinearHead",
    "LogitFunction",
    "MixtureHead",
    "MonotoneNetwork",
    "Scale",
    "ScaledSigmoid",
    "Sigsoftmax",
    "Softcap",
    "TokenStatistics",
    "build_head",
    "head_from_spec",
    "linear_cross_entropy",
    "mixture_cross_entropy",
    "mixture_token_statistics",
    "parameter_groups",
    "token_statistics",
]

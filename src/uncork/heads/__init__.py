"""Output layers: drop-in for the nn.Linear before a softmax, each with its fused loss."""

from uncork.heads.base import Head
from uncork.heads.build import build_head, head_from_spec
from uncork.heads.layers import ContextMixtureHead, LinearHead, MixtureHead
from uncork.heads.spec import HEAD_NAMES, HeadSpec
from uncork.heads.state import convert_state_0_1

__all__ = [
    "HEAD_NAMES",
    "ContextMixtureHead",
    "Head",
    "HeadSpec",
    "LinearHead",
    "MixtureHead",
    "build_head",
    "convert_state_0_1",
    "head_from_spec",
]

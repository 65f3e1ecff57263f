"""Output layers: drop-in for the nn.Linear before a softmax, each with its fused loss."""

from uncork.heads.build import HEAD_NAMES, build_head, head_from_spec
from uncork.heads.layers import ContextMixtureHead, Head, LinearHead, MixtureHead

__all__ = ["HEAD_NAMES", "ContextMixtureHead", "Head", "LinearHead", "MixtureHead", "build_head", "head_from_spec"]

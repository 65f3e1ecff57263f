"""Output layers: drop-in for the nn.Linear before a softmax, each with its fused loss."""

from uncork.heads.base import Head as Head
from uncork.heads.build import build_head as build_head
from uncork.heads.build import head_from_spec as head_from_spec
from uncork.heads.layers import ContextMixtureHead as ContextMixtureHead
from uncork.heads.layers import LinearHead as LinearHead
from uncork.heads.layers import MixtureHead as MixtureHead
from uncork.heads.spec import HEAD_NAMES as HEAD_NAMES
from uncork.heads.spec import HeadSpec as HeadSpec
from uncork.heads.spec import start_at_unigram as start_at_unigram
from uncork.heads.state import convert_state_0_1 as convert_state_0_1

"""uncork: output layers beyond the softmax, with one fused cross-entropy that keeps no logits.

An increasing function on the logits never changes which word is likeliest; it changes how likely.
"""

import types
import typing

from uncork.heads import HEAD_NAMES as HEAD_NAMES
from uncork.heads import ContextMixtureHead as ContextMixtureHead
from uncork.heads import Head as Head
from uncork.heads import LinearHead as LinearHead
from uncork.heads import MixtureHead as MixtureHead
from uncork.heads import build_head as build_head
from uncork.heads import head_from_spec as head_from_spec
from uncork.logit_functions import *  # noqa: F403
from uncork.loss import *  # noqa: F403
from uncork.optim import parameter_groups as parameter_groups
from uncork.versions import show_versions as show_versions

__version__ = "0.2.0"  # read by the build; the package need not be installed to be used

if not typing.TYPE_CHECKING:  # type checkers read the imports
    _names = [name for name, value in vars().items() if not isinstance(value, types.ModuleType)]
    __all__ = sorted(name for name in _names if not name.startswith("_"))

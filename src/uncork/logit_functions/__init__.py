"""Increasing functions on the logits, as modules, and the primitives from which kernels compute them.

Every module of this folder is imported, and the names in its `__all__` are exported from here and from `uncork`: a new
function has to be listed in its own file alone. Type checkers, which do not list folders, read the star imports.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uncork.logit_functions.base import *  # noqa: F403
    from uncork.logit_functions.fixed import *  # noqa: F403
    from uncork.logit_functions.monotone import *  # noqa: F403
    from uncork.logit_functions.plif import *  # noqa: F403
else:
    __all__ = []
    for _module in [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]:  # noqa: F405
        for _name in getattr(_module, "__all__", ()):
            globals()[_name] = getattr(_module, _name)
            __all__.append(_name)

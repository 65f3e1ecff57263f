"""Checks of options that are a number or a switch: the value in Python's own type, or an error that names it."""

import math
import operator
from numbers import Real
from typing import Any


def positive(name: str, value: Any) -> float:
    """The value as a float if it is finite and above 0; a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def finite(name: str, value: Any) -> float:
    """The value as a float if it is finite; a ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def is_switch(value: Any) -> bool:
    """Whether it is Python's or numpy's True or False."""
    numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    return numpys or isinstance(value, bool)


def switch(name: str, value: Any) -> bool:
    """The value as a bool if it is Python's or numpy's True or False; a ValueError that names it otherwise.

    A text is none, since every text but the empty one is true: "False" would switch on.
    """
    if not is_switch(value):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def positive_int(name: str, value: Any, limit: int | None = None) -> int:
    """The value as an int if it is a whole number of at least 1 (and at most `limit`); else a ValueError that names it.

    Whole numbers are those that Python takes for an index: its own, numpy's, integer tensors of one element. A float is
    none, and neither is a bool.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1 or (limit is not None and number > limit):
        expected = "of at least 1" if limit is None else f"in [1, {limit}]"
        kind = "" if number is not None else f" of type {type(value).__name__}"
        raise ValueError(f"{name}: expected a whole number {expected}, got {value!r}{kind}")
    return number

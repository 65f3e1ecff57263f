"""Parts of messages: a near name, a value's kind, a place in a tensor."""

import difflib
from collections.abc import Iterable, Mapping, Sequence


def close_to(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or nothing where no known word is near.

    >>> close_to("PLIF", ["softmax", "plif"]), close_to("--prest", ["--preset", "--plan"]), close_to("device", ["bias"])
    ('; did you mean plif?', '; did you mean --preset?', '')
    """
    names = {name.lstrip("-").lower(): name for name in known}  # the dashes that all flags share make none of them near
    found = difflib.get_close_matches(word.lstrip("-").lower(), list(names), n=1)
    return f"; did you mean {names[found[0]]}?" if found else ""


def unknown_options(owner: str, given: Iterable[str], known: Iterable[str] | Mapping[str, str]) -> str:
    """What is wrong with options' names, or nothing; `known` may map them to their defaults, as text.

    >>> unknown_options("softcap", ["cup"], {"cap": "30", "scale": "1"})
    'softcap has no option cup; expected some of cap=30, scale=1; did you mean cap?'
    """
    unknown = [name for name in given if name not in known]
    if not unknown:
        return ""
    listed = ", ".join(f"{name}={known[name]}" if isinstance(known, Mapping) else name for name in known)
    near = close_to(unknown[0], known) if len(unknown) == 1 else ""
    return f"{owner} has no option {', '.join(unknown)}; expected some of {listed}{near}"


def kind_of(value: object) -> str:
    """The name of a value's class, or that it is a class itself.

    >>> kind_of(3), kind_of(int)
    ('int', 'the class int and no instance of it: write int(...)')
    """
    if isinstance(value, type):
        return f"the class {value.__name__} and no instance of it: write {value.__name__}(...)"
    return type(value).__name__


def position(where: int, shape: Sequence[int]) -> str:
    """Where an element of a flattened tensor stands in the shape that it had; nothing in a shape without dimensions.

    >>> position(5, (7,)), position(5, (2, 3)), position(0, ())
    (' at position 5', ' at position (1, 2)', '')
    """
    index: list[int] = []
    for size in reversed(shape):
        where, last = divmod(where, size)
        index.insert(0, last)
    return f" at position {index[0] if len(index) == 1 else tuple(index)}" if index else ""

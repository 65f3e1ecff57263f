"""Printing that copes with a closed pipe, a closed terminal and a full disk."""

import errno
import io
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO


class NobodyReads(KeyboardInterrupt):
    """The reader of the output's pipe has ended (`| head`). Handled as Ctrl-C, so that training saves a checkpoint."""


def ready_streams() -> None:
    """Make printing safe: what goes to a stream that the caller closed (`>&-`) is dropped, and a letter that the
    stream's encoding lacks becomes ?.

    Otherwise the next file to be opened would get the number of the closed stream, and prints would end up in it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def is_live() -> bool:
    """Whether `show` can draw: stderr is a terminal that knows how to clear a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def show(text: str) -> None:
    """On a live terminal, write a line in place of the one that was shown before; whatever is said next replaces it.

    It goes to stderr, so that what a program reads of stdout stays as it is. "" clears the line.
    """
    if is_live():
        width = shutil.get_terminal_size().columns - 1
        _draw("\r\x1b[K" + text[:width])
        _lines.shown = bool(text)


def silent_seconds() -> float:
    """Seconds since something was said last."""
    return time.monotonic() - _lines.said_at


@dataclass
class _Lines:
    shown: bool = False
    said_at: float = field(default_factory=time.monotonic)


_lines = _Lines()


def _clear() -> None:
    if _lines.shown:
        _lines.shown = False
        _draw("\r\x1b[K")


def _draw(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _mute(sys.stderr)


def say(text: str = "") -> None:
    """Print a line at once. Raises NobodyReads for a closed pipe or terminal, OSError for a full disk."""
    _clear()
    _lines.said_at = time.monotonic()
    try:
        print(text, flush=True)
    except OSError as error:
        _mute(sys.stdout)
        if error.errno in (errno.EPIPE, errno.EIO):
            raise NobodyReads from None
        raise


def complain(text: str) -> None:
    """Print one line to stderr, if that is possible."""
    _clear()
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _mute(sys.stderr)


def _mute(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python's flush at exit fails again


def clock(seconds: float | None) -> str:
    """Seconds as a person reads them.

    >>> clock(3725), clock(65.2), clock(None)
    ('1:02:05', '01:05', '--:--')
    """
    if seconds is None or not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"

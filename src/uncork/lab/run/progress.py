"""Where a run, or a shorter piece of work, stands, and the one line that the terminal shows of it."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from uncork.lab.terminal import clock, is_live, say, show, silent_seconds

Item = TypeVar("Item")

FIRST = 1.0
"""Seconds before a piece of work is told of at all: what takes less needs no line."""
OFTEN = 0.5
"""Least number of seconds between two stages of one piece of work."""
SILENT = 30.0
"""Where no line can be drawn over, as in a log, a stage is a line of its own only after so many silent seconds."""


@dataclass(frozen=True)
class Progress:
    """Where training stands; `train` hands one to `on_progress` with every row of the metrics."""

    step: int
    steps_total: int
    epoch: float
    cross_entropy: float
    """Mean nats per token since the last row."""
    valid_perplexity: float | None
    """Per word, at the last validation; None before the first."""
    tokens_per_second: float
    seconds_left: float
    """To the end of training, at the speed of the last steps and of the last validation of this session."""


def progress_line(name: str, p: Progress, left: float | None) -> str:
    """The line that the terminal shows of a run. left: seconds, None if unknown."""
    validation = "" if p.valid_perplexity is None else f"  valid ppl {p.valid_perplexity:8.2f}"
    return (
        f"{name:28} step {p.step:>6}/{p.steps_total}  loss {p.cross_entropy:6.3f}{validation}  "
        f"{p.tokens_per_second:8,.0f} tok/s  {clock(left)} left"
    )


@dataclass(frozen=True)
class Stage:
    """Where a piece of work stands that writes no metrics: reading a text, an evaluation, a fit.

    Attributes: `what` it is; the share that is done, or None if it cannot be known; `seconds_left`, None if unknown.
    """

    what: str
    share: float | None = None
    seconds_left: float | None = None

    def __str__(self) -> str:
        """The line that the terminal shows.

        >>> print(Stage("evaluating", 0.25, 65.0)), print(Stage("writing the report"))
        evaluating   25 %  01:05 left
        writing the report ...
        (None, None)
        """
        if self.share is None:
            return f"{self.what} ..."
        return f"{self.what}  {100 * self.share:3.0f} %  {clock(self.seconds_left)} left"


_listener: ContextVar[Callable[[Stage], None] | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Callable[[Stage], None]) -> Iterator[None]:
    """Within, the stages of whatever works are told to this function. Outside nobody listens: a library is quiet."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def announce(what: str) -> None:
    """Tells whoever listens that something begins whose time is not known."""
    listener = _listener.get()
    if listener is not None:
        listener(Stage(what))


class Meter:
    """Tells whoever listens how far a piece of work is; the time left follows from the share done since the first call.

    >>> heard = []
    >>> with listening(heard.append):
    ...     meter = Meter("counting")
    ...     meter(0, 4)
    ...     time.sleep(1.1)
    ...     meter(1, 4)
    >>> heard[0].share, round(heard[0].seconds_left)
    (0.25, 3)
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.listener = _listener.get()
        self._first: tuple[float, float] | None = None
        self._due = 0.0

    def __call__(self, done: float, total: float) -> None:
        if self.listener is None:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._due = (now, done), now + FIRST
        ended = done >= total
        if now < self._due and not (ended and now - self._first[0] >= FIRST):
            return
        self._due = now + OFTEN
        began, before = self._first
        left = (now - began) * (total - done) / (done - before) if done > before else None
        self.listener(Stage(self.what, min(1.0, done / total) if total else 1.0, 0.0 if ended else left))


def told(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, of which there are `total`; each that is worked on is told of by a `Meter`."""
    meter = Meter(what)
    meter(0, total)
    for number, item in enumerate(items, 1):
        yield item
        meter(number, total)


def tell_terminal(stage: Stage, title: str = "") -> None:
    """A line that is drawn over by the next; in a log a line now and then, where nothing else is said.

    Args:
        title: of the job that it is a stage of, where there are several.
    """
    line = f"{title}: {stage}" if title else str(stage)
    if is_live():
        show("" if stage.share == 1.0 else line)
    elif silent_seconds() >= SILENT:
        say(line)

"""Handles the signals that end a command (Ctrl-C, SIGTERM, a closed terminal) so that nothing is saved half."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that end a command: of Ctrl-C, of `kill` or a shutdown, of a terminal that is closed."""


class Interrupted(KeyboardInterrupt):
    """A signal of `STOPS` arrived; `signum` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def handled(handler: Any, signums: Iterable[int] = STOPS) -> Iterator[None]:
    """Within the block, `handler` handles these signals, except those that the process ignores (as SIGHUP under nohup).

    Outside the main thread, where Python delivers no signal, nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: h for s in signums if (h := signal.getsignal(s)) not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def interrupt(signum: int, frame: FrameType | None = None) -> None:
    """The handler of a whole command: every signal raises `Interrupted` at once."""
    raise Interrupted(signum)


class InterruptGuard:
    """A context in which a signal sets `requested`, and raises Interrupted only where that does no harm.

    Within `raising()` a signal raises Interrupted at once. A second signal raises it at once anywhere; outside
    `raising()` it also sets `torn`, since a computation may be half done. In a worker process a second signal does
    nothing: if the worker does not end, its parent kills it.
    """

    def __init__(self) -> None:
        self.requested = False
        self.torn = False
        self._signum: int | None = None
        self._raising = False
        self._is_worker = multiprocessing.parent_process() is not None

    def __enter__(self) -> "InterruptGuard":
        self._handled = handled(self._handle)
        self._handled.__enter__()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._handled.__exit__(None, None, None)
        if self._signum is not None and self._is_worker:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._signum is not None and kind is KeyboardInterrupt:  # raised by the trainer, without the signal's number
            raise Interrupted(self._signum) from None

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let a signal end this block at once: nothing in it needs to be finished."""
        self._raising = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again and self._is_worker:
            return
        self._signum = self._signum or signum
        if again or self._raising:
            self.torn = not self._raising
            raise Interrupted(signum)


def become_worker() -> None:
    """Makes this a worker process, which ends at a SIGTERM of its parent, or when the parent ends.

    A terminal sends the signals of Ctrl-C and of its closing to all its processes, and `kill` may send SIGTERM to a
    whole group. A worker ignores all but the first SIGTERM, so that a checkpoint is written once and completely. If a
    worker outlived its parent, it would go on unseen and keep its locks.
    """
    for signum in STOPS:
        signal.signal(signum, _end if signum == signal.SIGTERM else signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _end(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)
    raise Interrupted(signum)


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)

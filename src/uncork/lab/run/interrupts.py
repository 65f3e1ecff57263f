"""Signals that end a command (Ctrl-C, SIGTERM, a closed terminal), so that what is saved then is whole."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a command: Ctrl-C, `kill` or a shutdown, a terminal that is closed."""


class Interrupted(KeyboardInterrupt):
    """A signal of `STOPS` came: `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def handled(handler: Any, signums: Iterable[int] = STOPS) -> Iterator[None]:
    """Within, `handler` gets these signals, but for those that the process ignores (as nohup's SIGHUP is).

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
    """While it is entered, a signal sets `requested`; Interrupted is raised only where that does no harm.

    Within `raising()` it comes at once. A second signal comes at once anywhere and sets `torn`: what was being computed
    may be half done. In a worker process a second one does nothing: the parent, which sends it, kills if need be.
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
        if self._signum is not None and kind is KeyboardInterrupt:  # the trainer's, which knows no number
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
    """Makes this a worker process, which its parent alone ends, by SIGTERM; or the parent's own end does.

    The terminal sends Ctrl-C and its closing to all processes, and `kill` may send SIGTERM to a whole group: what comes
    beside the parent's SIGTERM does nothing, so that a checkpoint is written once and whole. Without the parent a
    worker would go on unseen, and keep its locks.
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

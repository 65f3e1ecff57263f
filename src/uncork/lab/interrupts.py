"""Ctrl-C that waits for the end of a training step, so that what is saved then is whole."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class InterruptGuard:
    """While it is entered, Ctrl-C sets `requested`; KeyboardInterrupt is raised only where that does no harm.

    Within `raising()` it comes at once. A second Ctrl-C comes at once anywhere and sets `torn`: what was being
    computed may be half done. Outside the main thread, where Python delivers no signal, the guard does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.torn = False
        self._raising = False

    def __enter__(self) -> "InterruptGuard":
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let Ctrl-C end this block at once: nothing in it needs to be finished."""
        self._raising = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._raising = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._raising and not self.requested:
            self.requested = True
            return
        self.torn = not self._raising
        self.requested = True
        raise KeyboardInterrupt


def end_with_parent() -> None:
    """Ends this worker process by SIGTERM once its parent is gone: it would go on unseen, and keep its locks."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)

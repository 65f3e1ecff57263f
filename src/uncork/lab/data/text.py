"""Texts larger than memory: read in pieces of whole lines, on which several processes work."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any, BinaryIO, TypeVar, cast

import torch

from uncork.lab.data import words
from uncork.lab.errors import LabError
from uncork.lab.run.progress import Meter

PIECE_BYTES = 2**21
LARGE_BYTES = 2**24
"""From this size on several processes work on a text: below it starting them takes as long as they save."""
MOST_WORKERS = 8  # one process hands out the pieces and puts the results together: more workers would wait for it

Result = TypeVar("Result")


class Text:
    """Normalised text in a file.

    Args:
        file: open for reading, in UTF-8.
        spans: (start, end) of the text's parts in the file, in the order of the text; each is a number of whole lines.
    """

    def __init__(self, file: BinaryIO, spans: Sequence[tuple[int, int]]) -> None:
        self._file, self._spans = file, spans

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(end - start for start, end in self._spans)

    def pieces(self) -> Iterator[str]:
        """The text in pieces of whole lines."""
        return (piece.decode() for piece in cut_at_lines(self._blocks()))

    def _blocks(self) -> Iterator[bytes]:
        for start, end in self._spans:
            for place in range(start, end, PIECE_BYTES):
                self._file.seek(place)
                yield self._file.read(min(PIECE_BYTES, end - place))


def cut_at_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    r"""The same bytes in pieces of about `PIECE_BYTES`, each but the last ending with a line (\n, \r or \r\n).

    A line that is longer than that is a longer piece.
    """
    held: list[bytes] = []
    size = 0
    for block in blocks:
        size += len(block)
        # A \r at the very end may be half of a \r\n.
        cut = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1 if size >= PIECE_BYTES else 0
        if cut:
            yield b"".join([*held, block[:cut]])
            held, size = [], len(block) - cut
        held.append(block[cut:])
    if size:
        yield b"".join(held)


def each(
    task: Callable[[str, words.Style], Result], style: words.Style, pieces: Iterable[str], total_bytes: int, what: str
) -> Generator[tuple[str, Result], None, None]:
    """Each piece and the task's result for it, in the order of the pieces.

    As many processes as torch has threads work on a text of at least `LARGE_BYTES`. They run `words.py` alone, without
    torch; so they start in a tenth of a second, take 100 MB each and do not run the user's program again.

    Args:
        task: one of the functions that `words.py` offers as a program: normalize, number_words, count_words.
        style: how the text is written.
        pieces: normalised text, unless the task is to normalise it.
        total_bytes: their size, roughly.
        what: is done, for the line that the terminal shows of it.

    Raises:
        LabError: a process has died.
    """
    meter, seen = Meter(what), 0
    for piece, result in _each(task, style, pieces, total_bytes):
        meter(seen, total_bytes)
        yield piece, result
        seen += len(piece.encode())
    meter(total_bytes, total_bytes)


def _each(
    task: Callable[[str, words.Style], Result], style: words.Style, pieces: Iterable[str], total_bytes: int
) -> Generator[tuple[str, Result], None, None]:
    workers = min(torch.get_num_threads(), MOST_WORKERS) if total_bytes >= LARGE_BYTES else 1
    if workers == 1:
        for piece in pieces:
            yield piece, task(piece, style)
        return
    with ExitStack() as stack:
        busy: deque[tuple[subprocess.Popen[bytes], str]] = deque()
        for piece in pieces:
            if len(busy) < workers:
                worker, done = stack.enter_context(_worker()), None
            else:
                worker, earlier = busy.popleft()
                done = earlier, _answer(worker)
            _ask(worker, (task.__name__, piece, style))
            busy.append((worker, piece))
            if done:
                yield done
        for worker, piece in busy:
            yield piece, _answer(worker)


@contextmanager
def _worker() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", words.__file__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()
        for pipe in cast(tuple[IO[bytes], ...], (worker.stdin, worker.stdout)):
            with suppress(OSError):  # a dead worker may not have read all
                pipe.close()


def _ask(worker: subprocess.Popen[bytes], request: tuple[str, str, words.Style]) -> None:
    stdin = cast(IO[bytes], worker.stdin)
    with _alive(worker):
        pickle.dump(request, stdin, protocol=5)
        stdin.flush()


def _answer(worker: subprocess.Popen[bytes]) -> Any:
    with _alive(worker):
        return pickle.load(cast(IO[bytes], worker.stdout))


@contextmanager
def _alive(worker: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        worker.kill()
        raise LabError(f"a process that splits the text has died (exit status {worker.wait()})") from error

"""Cuts a text into parallel streams and the streams into batches.

Shapes in comments: N tokens of the text, B streams, T time steps of a batch.
"""

import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from uncork.lab.errors import LabError

IGNORE_INDEX = -100
"""Target of a padded place: F.cross_entropy's default `ignore_index`."""

MIN_LENGTH = 5
LENGTH_STD = 5.0
FULL_LENGTH_PROBABILITY = 0.95


class TokenStreams:
    """A training text as B parallel streams, read side by side so that a state can be carried along each.

    The N - 1 targets are cut into B equal runs; the last (N - 1) mod B of them, fewer than B, are left out.

    >>> streams = TokenStreams(torch.arange(9), batch_size=2)
    >>> tokens, target = streams.batch(1, 2)
    >>> tokens.tolist(), target.tolist()
    ([[1, 2], [5, 6]], [[2, 3], [6, 7]])

    Args:
        tokens: (N,) integers; they may be memory-mapped, since each batch alone is copied.
        batch_size: number B of streams over all processes.
        rank: which of the `world_size` processes this is; it reads B / world_size of the streams.
        world_size: number of processes; it must divide B.

    Raises:
        ValueError: tokens are not one-dimensional integers, or rank is not below world_size.
        LabError: the text has fewer than B + 1 tokens, or world_size does not divide B.
    """

    def __init__(self, tokens: Tensor, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        _require_text(tokens)
        _require_at_least_one(batch_size=batch_size, world_size=world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
        if batch_size % world_size:
            raise LabError(f"batch_size must be a multiple of the {world_size} processes, got {batch_size}")
        length = (len(tokens) - 1) // batch_size
        if length < 1:
            raise LabError(
                f"the text has {len(tokens)} tokens, too few for {batch_size} streams: lower batch_size, or train on "
                "more text (max_train_tokens, where it is given)"
            )
        share = batch_size // world_size
        mine = slice(rank * share, (rank + 1) * share)
        used = length * batch_size
        self._tokens = tokens[:used].reshape(batch_size, length)[mine]
        self._target = tokens[1 : used + 1].reshape(batch_size, length)[mine]

    @property
    def num_streams(self) -> int:
        """Streams that this process reads."""
        return self._tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each stream."""
        return self._tokens.shape[1]

    def segments(self, bptt: int, *, variable: bool, seed: int, epoch: int) -> list[tuple[int, int]]:
        """(start, length) of one epoch's batches, in order; together they cover the streams exactly once.

        With `variable`, lengths are drawn as AWD-LSTM does (arXiv 1708.02182): normal with deviation 5 around bptt,
        in one of twenty draws around bptt / 2, and at least 5. The trainer then scales the learning rate of a step by
        length / bptt. Lengths depend on seed, epoch and place alone, not on the process, so a run can resume anywhere.

        >>> TokenStreams(torch.arange(101), 2).segments(20, variable=False, seed=0, epoch=0)
        [(0, 20), (20, 20), (40, 10)]
        """
        _require_at_least_one(bptt=bptt)
        # Seeded by a string, random.Random hashes it (SHA-512): the same draws on every platform and version.
        generator = random.Random(f"{seed} {epoch}")
        segments: list[tuple[int, int]] = []
        start = 0
        while start < self.length:
            wanted = _draw_length(bptt, generator) if variable else bptt
            length = min(wanted, self.length - start)
            segments.append((start, length))
            start += length
        return segments

    def size(self, length: int) -> int:
        """Targets of a batch of so many steps, in this process."""
        return self.num_streams * length

    def batch(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and their successors, each (B, T) int64, of T = `length` steps from `start` on."""
        if start < 0 or length < 1 or start + length > self.length:
            raise ValueError(f"start and length must lie in the {self.length} steps, got {start} and {length}")
        window = slice(start, start + length)
        return self._tokens[:, window].long(), self._target[:, window].long()


def evaluation_batches(tokens: Tensor, batch_size: int, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (tokens, target), each (B, T) int64, that hold every one of the text's N - 1 targets exactly once.

    Carry the state from batch to batch: row b goes on where it ended. Streams differ by one step at most; the
    shorter ones end with a padded place, whose target is -100. A text of fewer than `batch_size` targets gets fewer
    streams. No batch is without a target. Each batch is made when its turn comes, so the tokens may be memory-mapped.

    >>> for tokens, target in evaluation_batches(torch.arange(6), batch_size=2, bptt=2):
    ...     print(tokens.tolist(), target.tolist())
    [[0, 1], [3, 4]] [[1, 2], [4, 5]]
    [[2], [0]] [[3], [-100]]

    Raises:
        ValueError: tokens are not one-dimensional integers.
        LabError: the text has fewer than two tokens, or batch_size or bptt is below 1.
    """
    _require_text(tokens)
    _require_at_least_one(batch_size=batch_size, bptt=bptt)
    total = len(tokens) - 1
    if total < 1:
        raise LabError(f"the text has {len(tokens)} tokens; at least two are needed to predict one from another")
    rows = min(batch_size, total)
    short, extra = divmod(total, rows)
    steps = short + (extra > 0)
    ends = [(row + 1) * short + min(row + 1, extra) for row in range(rows)]
    return (_padded(tokens, [0, *ends[:-1]], ends, step, min(bptt, steps - step)) for step in range(0, steps, bptt))


def number_of_batches(tokens: Tensor, batch_size: int, bptt: int) -> int:
    """How many `evaluation_batches` there are.

    >>> number_of_batches(torch.arange(6), batch_size=2, bptt=2)
    2
    """
    total = len(tokens) - 1
    steps = math.ceil(total / min(batch_size, total))
    return math.ceil(steps / bptt)


def _padded(tokens: Tensor, starts: list[int], ends: list[int], step: int, length: int) -> tuple[Tensor, Tensor]:
    """`length` steps, from `step` on, of the streams that begin and end at these places of the text."""
    inputs = torch.zeros(len(starts), length, dtype=torch.int64, device=tokens.device)
    target = torch.full_like(inputs, IGNORE_INDEX)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        here = slice(start + step, min(start + step + length, end))
        inputs[row, : here.stop - here.start] = tokens[here]
        target[row, : here.stop - here.start] = tokens[here.start + 1 : here.stop + 1]
    return inputs, target


def _draw_length(bptt: int, generator: random.Random) -> int:
    mean = bptt if generator.random() < FULL_LENGTH_PROBABILITY else bptt / 2
    return max(MIN_LENGTH, int(generator.gauss(mean, LENGTH_STD)))


def _require_text(tokens: Tensor) -> None:
    if tokens.ndim != 1 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers of shape (N,), got {tokens.dtype} {tuple(tokens.shape)}")


def _require_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise LabError(f"{name} must be at least 1, got {value}")

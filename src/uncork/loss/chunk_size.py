"""How many rows of scores are computed at once: decided by shapes, the caller's budget and a fixed table alone.

It does not depend on the memory that is free at the moment, so the same call gives the same bits on every machine of a
kind.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from uncork.loss.call import Call

MIB = 2**20


@dataclass(frozen=True)
class ChunkRule:
    """The numbers that decide how many rows of scores an implementation computes at once.

    Attributes:
        budget: bytes of scores at once unless the caller sets a limit, or half of W's bytes if that is more.
        narrow_budget: the same for D < NARROW features.
        least_rows, limit_rows: bounds on the rows; only a budget of the caller's may lead to fewer than least_rows.
        blocks: how many (rows, V) blocks live at once and share the budget.
    """

    budget: int
    narrow_budget: int
    least_rows: int
    limit_rows: int
    blocks: int = 1

    def default_rows(self, vocab_size: int, features: int, itemsize: int = 4) -> int:
        """Rows when the caller sets no limit: a multiple of 32.

        Args:
            vocab_size: V. features: D. itemsize: bytes of a score.

        >>> [CPU.default_rows(V, 400) for V in (10_000, 33_278, 50_257, 256_000)], CPU.default_rows(10_000, 16)
        ([512, 480, 320, 192], 128)
        """
        budget = max(self.budget, vocab_size * features * itemsize // 2) // self.blocks
        if features < NARROW:  # of float32 scores; narrower ones leave the rest to the rows that are raised
            budget, itemsize = min(budget, self.narrow_budget), max(itemsize, 4)
        return min(max(budget // max(1, vocab_size * itemsize) // 32 * 32, self.least_rows), self.limit_rows)

    def raised_rows(self, call: Call) -> int:
        """How many rows of half-precision scores are raised to the loss's dtype at once: what stays in a cache."""
        vocab_size, features = call.weight.shape
        budget = min(RAISED, (self.narrow_budget // 2 if features < NARROW else self.budget) // self.blocks)
        return max(1, budget // (vocab_size * call.dtype.itemsize))

    def rows(self, call: Call, dtype: torch.dtype, operands: torch.dtype | None = None) -> int:
        """Rows for a call whose scores are of `dtype`; so is what the products multiply, unless `operands` says else.

        The caller's memory_budget is not exceeded, and the copy of the weight's rows counts towards it where there is
        one; a ValueError says so if it is too small for one token.
        """
        vocab_size, features = call.weight.shape
        if call.chunk_size is not None:
            return call.chunk_size
        if call.memory_budget is None:
            return self.default_rows(vocab_size, features, dtype.itemsize)
        raised = call.dtype.itemsize if dtype != call.dtype else 0
        row = max(1, vocab_size) * (dtype.itemsize + raised) * self.blocks
        operands = operands or dtype
        copies = weight_copy_bytes(call, operands)
        rows, least = (call.memory_budget - copies) // row, call.components
        if rows < least:
            raise ValueError(
                f"memory_budget: expected at least {copies + least * row} bytes ({least * row} for one token's scores, "
                f"{copies} for the weight in {operands}), got {call.memory_budget}"
            )
        return min(rows // 32 * 32 or rows, self.limit_rows)


# Bytes of scores, and on a CPU of W, that are raised at once.
RAISED = 8 * MIB


def weight_copy_rows(weight: Tensor, operands: torch.dtype) -> int:
    """How many rows of W, where the products multiply another dtype than its own, are copied to that at once."""
    row = max(1, weight.shape[1]) * operands.itemsize
    return min(weight.shape[0], max(1, RAISED // row)) if weight.device.type == "cpu" else weight.shape[0]


def weight_copy_bytes(call: Call, operands: torch.dtype) -> int:
    """Bytes of the copy of W's rows; 0 if the products multiply W as it is."""
    weight = call.weight
    if weight.dtype == operands:
        return 0
    return weight_copy_rows(weight, operands) * weight.shape[1] * operands.itemsize


# Below this number of features a CPU's matrix products are bound by memory bandwidth.
NARROW = 64

# Each chunk's products read the whole of W (and update its whole gradient), so small chunks are slow, most of all where
# W is large (docs/log.md, "chunks over very large vocabularies"). Rows beyond the limit gain nothing.
# With few features it is quicker if the block of scores stays in the cache.
CPU = ChunkRule(budget=64 * MIB, narrow_budget=5 * MIB, least_rows=32, limit_rows=512)

# Not measured. A chunk launches a few dozen kernels, so it should be large; no cache could hold it anyway.
GPU = ChunkRule(budget=1024 * MIB, narrow_budget=1024 * MIB, least_rows=32, limit_rows=4096)


def rule_of(device: torch.device) -> ChunkRule:
    """The rule for scores on this device, for an implementation that needs one block of them."""
    return CPU if device.type == "cpu" else GPU

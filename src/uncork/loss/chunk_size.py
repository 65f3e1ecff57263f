"""How many rows of scores are made at once: from shapes, the caller's budget and a fixed table alone.

The same call then gives the same bits on every machine of a kind, whatever its memory holds at the moment.
"""

from dataclasses import dataclass

import torch

from uncork.loss.call import Call

MIB = 2**20


@dataclass(frozen=True)
class ChunkRule:
    """A table of numbers by which an implementation is given its rows.

    Attributes:
        budget: bytes of scores at once where the caller does not say. narrow_budget: the same below NARROW features.
        least_rows, limit_rows: bounds of what the budget allows; a caller's own budget may go below the first.
        blocks: how many (rows, V) blocks live at once and share the budget.
    """

    budget: int
    narrow_budget: int
    least_rows: int
    limit_rows: int
    blocks: int = 1

    def default_rows(self, vocab_size: int, features: int, itemsize: int = 4) -> int:
        """Rows where the caller does not say, a multiple of 32.

        Args:
            vocab_size: V. features: D. itemsize: bytes of a score.

        >>> [CPU.default_rows(V, 400) for V in (10_000, 33_278, 50_257, 256_000)], CPU.default_rows(10_000, 16)
        ([512, 480, 320, 64], 128)
        """
        budget = self.budget // self.blocks
        if features < NARROW:
            budget = min(budget, self.narrow_budget)
        return min(max(budget // max(1, vocab_size * itemsize) // 32 * 32, self.least_rows), self.limit_rows)

    def rows(self, call: Call, dtype: torch.dtype) -> int:
        """Rows of a call whose products are of that dtype.

        A budget of the caller's is kept to, down to one token; a copy of the weight in that dtype counts too.
        """
        vocab_size, features = call.weight.shape
        if call.chunk_size is not None:
            return call.chunk_size
        if call.memory_budget is None:
            return self.default_rows(vocab_size, features, dtype.itemsize)
        row = max(1, vocab_size) * dtype.itemsize * self.blocks
        copies = 0 if call.weight.dtype == dtype else call.weight.numel() * dtype.itemsize
        rows, least = (call.memory_budget - copies) // row, call.components
        if rows < least:
            raise ValueError(
                f"memory_budget: expected at least {copies + least * row} bytes ({least * row} for one token's scores, "
                f"{copies} for the weight in {dtype}), got {call.memory_budget}"
            )
        return min(rows // 32 * 32 or rows, self.limit_rows)


# Below so many features a CPU's products are as quick as its memory.
NARROW = 64

# Products of few rows are slow, since each of them reads W (and adds to its gradient) once; more than the limit gain
# nothing. Over few features the block of scores had better stay in the cache.
CPU = ChunkRule(budget=64 * MIB, narrow_budget=5 * MIB, least_rows=32, limit_rows=512)

# Not measured. A chunk is a few dozen kernels, so it should be large; no cache could hold it anyway.
GPU = ChunkRule(budget=1024 * MIB, narrow_budget=1024 * MIB, least_rows=32, limit_rows=4096)


def rule_of(device: torch.device) -> ChunkRule:
    """The numbers for scores that live there, in one block."""
    return CPU if device.type == "cpu" else GPU

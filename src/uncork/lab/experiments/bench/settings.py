"""What a benchmark measures: the flags of `uncork bench`, shapes, and the setup of a process."""

import dataclasses
from pathlib import Path
from typing import Literal, Self

from uncork.lab.errors import LabError

EAGER, PRODUCTS = "eager", "G"

CONTENDERS: tuple[str, ...] = (
    "G", "G-forward", "eager", "compile", "torch-auto", "torch-best", "naive-sigsoftmax", "naive-plif", "naive-mos-4",
    "softmax", "softmax-forward", "temperature", "softcap", "sigsoftmax", "gss", "monotone", "plif-16", "plif-100",
    "plif-1000", "plif-1000-forward", "plif-10000", "plif-100000", "plif-frozen", "mos-4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """N tokens, D features, V words.

    >>> str(Shape.parse("2048,400,33278"))
    '2048, 400, 33278'
    """

    tokens: int
    in_features: int
    vocab_size: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """A shape as the command line writes it. Raises LabError for anything else."""
        try:
            tokens, in_features, vocab_size = map(int, text.split(","))
        except ValueError:
            raise LabError(f"shapes: expected N,D,V as 2048,400,33278, got {text!r}") from None
        if min(tokens, in_features, vocab_size) < 1:
            raise LabError(f"shapes: expected N, D and V of at least 1, got {text!r}")
        return cls(tokens, in_features, vocab_size)

    @property
    def least_bytes(self) -> int:
        """Of input, weight and their gradients, where a number takes the least, 2 bytes."""
        return 4 * self.in_features * (self.tokens + self.vocab_size)

    def __str__(self) -> str:
        return f"{self.tokens}, {self.in_features}, {self.vocab_size}"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same for all contenders of one process."""

    shape: Shape
    threads: int
    dtype: str = "float32"
    impl: str | None = None


@dataclasses.dataclass(frozen=True)
class Bench:
    """Time and memory of the loss with each function, beside what PyTorch and people's own code need for it.

    Before anything is timed, our losses and gradients are checked against plain torch in float64. Then all contenders
    take turns within one process, in another order every round, and each is compared with G (the three matrix products
    alone) and with eager (F.cross_entropy(x @ W.T)) of the same round, so that drift of the machine affects all of them
    alike. Run nothing else meanwhile.
    """

    shapes: tuple[str, ...] = ("2048,400,10000",)
    """N,D,V: tokens, features, words. The larger V / D, the more the function counts beside the matrix products."""
    only: tuple[str, ...] = ()
    """Contenders. None: all. G G-forward eager compile torch-auto torch-best torch-256 (chunk) naive-sigsoftmax
    naive-plif naive-mos-4 softmax temperature softcap sigsoftmax gss monotone plif-1000 (pieces) plif-frozen mos-4
    (components); one of ours followed by -forward is measured without gradients. G and eager always take part."""
    rounds: int = 5
    """Rounds in each process, after one to warm up. A contender slower than 4 G takes part in every third round."""
    processes: int = 2
    """Fresh processes that repeat the rounds: their spread shows what is noise."""
    max_seconds: float = 20.0
    """A contender that takes longer for a single call is left out, and the table says so."""
    memory: bool = True
    """Also measure each contender's peak memory, in a process of its own (Linux)."""
    instructions: bool = False
    """Also count the native tile's instructions with valgrind: two minutes more; unlike times, counts do not drift."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of input and weight."""
    threads: int | None = None
    """CPU threads. None: all cores."""
    impl: str | None = None
    """Implementation of ours: native, torch or reference (triton needs a GPU). None: the best that serves the call."""
    out_dir: Path | None = None
    """Where times.csv, memory.csv, table.csv and provenance.json go. None: only print the table."""

"""The whole training text as one batch: every context once, with the distribution of the word after it.

Shapes in comments: N targets of the text, C contexts, V vocabulary.
"""

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from uncork.lab.data.batching import TokenStreams
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel, Lookup


class CountedText:
    """A training text for a lookup table, whose loss depends on the text by its counts alone.

        mean over targets of -log q(w | c)  =  mean over contexts of -sum_w t(c, w) log q(w | c),   t = n(c, w) C / N

    so that a step over the whole text costs one row of scores a context in place of one a token.

    >>> from uncork.lab.models.lookup import LookupConfig
    >>> text = CountedText(torch.tensor([2, 0, 1, 0, 1, 0, 2]), LookupConfig().build(3))
    >>> context, target = text.batch(0, 1)
    >>> context.tolist(), target.tolist()
    ([[0], [1], [2]], [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]])

    Args:
        tokens: (N + order,) integers; they may be memory-mapped.
        table: says which contexts share a row; of those that do, one stands for all.

    Raises:
        LabError: the text is too short, or its counts need more memory than is free.
    """

    num_streams = 1
    length = 1

    def __init__(self, tokens: Tensor, table: Lookup) -> None:
        order, vocab_size = table.config.order, table.vocab_size
        self.targets = len(tokens) - order
        if self.targets < 1:
            raise LabError(f"the text has {len(tokens)} tokens, too few for contexts of {order}")
        context = torch.stack([tokens[i : i + self.targets] for i in range(order)], dim=-1).long()
        rows, where = table.rows(context).unique(return_inverse=True)
        needed, free = 4 * len(rows) * vocab_size, psutil.virtual_memory().available
        if 2 * needed > free:  # the scores take part of it too
            raise LabError(
                f"{len(rows):,} contexts with {vocab_size:,} words each need {2 * needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} are free: lower rows or vocab_size"
            )
        self._context = context.new_empty(len(rows), order)
        self._context[where] = context
        counts = torch.zeros(len(rows), vocab_size)
        ones = torch.ones(1).expand(self.targets)
        counts.index_put_((where, tokens[order:].long()), ones, accumulate=True)
        self._target = counts.mul_(len(rows) / self.targets)

    def segments(self, bptt: int, *, variable: bool, seed: int, epoch: int) -> list[tuple[int, int]]:
        """An epoch is one batch."""
        return [(0, 1)]

    def size(self, length: int) -> int:
        """Targets of a batch."""
        return self.targets

    def batch(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Contexts (C, order) int64, and what each is to predict: (C, V), in the unit of `F.cross_entropy`'s mean."""
        return self._context, self._target


def counted_cross_entropy(model: LanguageModel, tokens: Tensor) -> float | None:
    """Mean nats of each token of a text but the first, by its counts; None for a model that is no lookup table.

    Before the text stands the word 0, as before a stream. The model is used in the mode it is in.

    Raises:
        LabError: as `CountedText`.
    """
    if not isinstance(model.backbone, Lookup):
        return None
    table = model.backbone
    text = CountedText(F.pad(tokens, (table.config.order - 1, 0)), table)
    context, target = (part.to(table.embedding.weight.device) for part in text.batch(0, 1))
    return model(context, target).cross_entropy.item()


def training_batches(
    tokens: Tensor, model: LanguageModel, batch_size: int, *, rank: int, world_size: int
) -> TokenStreams | CountedText:
    """The batches of a training text: streams of tokens, or for a lookup table the whole text at once.

    Args:
        tokens, batch_size, rank, world_size: as for `TokenStreams`.

    Raises:
        LabError: the text is too short or too large; several processes, with a lookup table.
    """
    if not isinstance(model.backbone, Lookup):
        return TokenStreams(tokens, batch_size, rank=rank, world_size=world_size)
    if world_size > 1:
        raise LabError(f"a lookup table is trained in one process, on the whole text at once; there are {world_size}")
    return CountedText(tokens, model.backbone)

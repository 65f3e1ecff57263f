"""Recommend the next of 100,000 items: tables, a head, items left out, and an export for nearest-neighbour search.

    pip install uncork
    python recommender.py

The data are made up: items form groups, a user stays within one, and popular items are taken more often. So the best
that is possible is known and printed beside what the model reaches. An increasing function on the scores keeps their
order: the best items are those with the largest inner products of (w, b) and (h, 1), as a search index finds them.
"""

import argparse
import time

import torch
from torch import Tensor, nn

import uncork


def make_walks(users: int, length: int, items: int, groups: int, seed: int) -> Tensor:
    """(users, length) items: all of a user's in one group, taken by a popularity that falls as 1 / rank."""
    generator = torch.Generator().manual_seed(seed)
    per_group = items // groups
    popularity = 1 / torch.arange(1, per_group + 1).double()
    rank = torch.multinomial(popularity, users * length, replacement=True, generator=generator).view(users, length)
    return torch.randint(groups, (users, 1), generator=generator) * per_group + rank


def best_possible(items: int, groups: int) -> float:
    """Nats an item, of who knows the group: the entropy of the popularity."""
    share = 1 / torch.arange(1, items // groups + 1).double()
    share /= share.sum()
    return float(-(share * share.log()).sum())


class Recommender(nn.Module):
    """The mean of the seen items' vectors, and a head over all items."""

    def __init__(self, items: int, features: int, head: str, counts: Tensor) -> None:
        super().__init__()
        self.seen = nn.EmbeddingBag(items, features, mode="mean")
        self.body = nn.Sequential(nn.Linear(features, features), nn.GELU(), nn.Linear(features, features))
        self.head = uncork.build_head(head, features, items, bias_init=counts)

    def forward(self, seen: Tensor) -> Tensor:
        x: Tensor = self.seen(seen)
        return x + self.body(x)


def main() -> None:
    """Trains, recommends and exports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", default="softmax", choices=uncork.HEAD_NAMES)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    walks = make_walks(arguments.users, 11, arguments.items, arguments.groups, seed=0)
    test = make_walks(2_000, 11, arguments.items, arguments.groups, seed=1)
    counts = torch.bincount(walks.flatten(), minlength=arguments.items) + 0.1
    model = Recommender(arguments.items, arguments.features, arguments.head, counts)
    optimizer = torch.optim.Adam(uncork.parameter_groups(model, lr=arguments.lr))
    print(f"{arguments.items} items, {model.head.implementation()}", flush=True)

    begin = time.perf_counter()
    for epoch in range(arguments.epochs):
        for users in torch.randperm(len(walks)).split(arguments.batch):
            loss = model.head.loss(model(walks[users, :-1]), walks[users, -1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held_out = float(model.head.loss(model(test[:, :-1]), test[:, -1]))
        took = time.perf_counter() - begin
        print(f"epoch {epoch + 1}: test loss {held_out:.3f} nats an item after {took:.0f} s", flush=True)
    unigram = -float((counts / counts.sum()).log()[test[:, -1]].mean())
    print(
        f"popularity alone: {unigram:.3f}; who knows the group: {best_possible(arguments.items, arguments.groups):.3f}"
    )

    seen, wanted = test[:, :-1], test[:, -1:]
    with torch.no_grad():
        hidden = model(seen)
        found = model.head.topk(hidden, 10, exclude=seen)[1]  # items that a user has are not offered again
    fresh = ~(seen == wanted).any(-1)
    hits = float((found == wanted).any(-1)[fresh].float().mean())
    print(f"the next item, where it is a new one, is among the ten offered for {100 * hits:.1f} % of the users")

    if isinstance(model.head, uncork.LinearHead):
        export(model.head, hidden)


def export(head: uncork.LinearHead, hidden: Tensor) -> None:
    """Vectors for a search index by inner product, checked against the head: the function does not change the order."""
    assert head.bias is not None
    with torch.no_grad():
        items = torch.cat([head.weight, head.bias[:, None]], 1).numpy()  # (items, features + 1): add these to the index
        queries = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).numpy()
        found = (queries[:100] @ items.T).argsort(-1)[:, -1]  # what an exact index returns
        same = (torch.from_numpy(found) == head.predict(hidden[:100])).float().mean()
    print(f"first item by inner product = first item by the head, for {100 * float(same):.0f} % of 100 users")


if __name__ == "__main__":
    main()

"""A classifier of 1,000 classes: its last layer with the softmax, with PLIF, and with a temperature fitted afterwards.

    pip install uncork
    python classifier.py

The data are made up: a class is a point, an example is its class's point with noise, and the most frequent class has a
thousand times the examples of the rarest. It prints accuracy, log loss and calibration error of held-out examples. A
function on the logits leaves the scores' order alone, so accuracy changes only by what is learned below it.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import uncork

Examples = tuple[Tensor, Tensor]


def make_examples(count: int, classes: int, width: int, noise: float, seed: int) -> Examples:
    """x (count, width), y (count,): the class points are the same for every seed."""
    points = torch.randn(classes, width, generator=torch.Generator().manual_seed(123))
    generator = torch.Generator().manual_seed(seed)
    y = torch.multinomial(1 / torch.arange(1, classes + 1).float(), count, replacement=True, generator=generator)
    return points[y] + noise * torch.randn(count, width, generator=generator), y


def batches(examples: Examples, size: int) -> Iterator[Examples]:
    for rows in torch.randperm(len(examples[1])).split(size):
        yield examples[0][rows], examples[1][rows]


def train(name: str, examples: Examples, classes: int, features: int, epochs: int) -> tuple[nn.Module, uncork.Head]:
    """A network of two layers and the head, by one optimiser."""
    torch.manual_seed(0)
    x, y = examples
    body = nn.Sequential(nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, features))
    head = uncork.build_head(name, features, classes, bias_init=torch.bincount(y, minlength=classes) + 1.0)
    model = nn.ModuleDict({"body": body, "head": head})
    optimizer = torch.optim.Adam(uncork.parameter_groups(model, lr=2e-3))
    for _ in range(epochs):
        for inputs, targets in batches(examples, 256):
            optimizer.zero_grad()
            head.loss(body(inputs), targets).backward()
            optimizer.step()
    return body, head


def measure(body: nn.Module, head: uncork.Head, examples: Examples) -> dict[str, float]:
    """Accuracy, nats an example, and the mean distance of confidence and accuracy over 15 bins of equal size."""
    x, y = examples
    with torch.no_grad():
        log_prob = head.log_prob(body(x))
    confidence, best = log_prob.exp().max(-1)
    right = (best == y).float()
    bins = zip(confidence.sort().values.chunk(15), right[confidence.argsort()].chunk(15), strict=True)
    error = sum(abs(float(c.mean() - r.mean())) * len(c) for c, r in bins) / len(y)
    loss = -float(log_prob[torch.arange(len(y)), y].mean())
    return {"accuracy": float(right.mean()), "log loss": loss, "calibration error": error}


def with_temperature(body: nn.Module, head: uncork.Head, examples: Examples) -> uncork.LinearHead:
    """The softmax with its scores times s, fitted on examples that trained nothing."""
    assert isinstance(head, uncork.LinearHead)
    fitted = uncork.LinearHead.from_linear(as_linear(head), logit_function=uncork.Scale(1.0, learnable=True))
    for name, parameter in fitted.named_parameters():
        parameter.requires_grad_(name.startswith("logit_function."))
    x, y = examples
    with torch.no_grad():
        hidden = body(x)
    optimizer = torch.optim.LBFGS([p for p in fitted.parameters() if p.requires_grad], line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = fitted.loss(hidden, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return fitted


def as_linear(head: uncork.LinearHead) -> nn.Linear:
    linear = nn.Linear(head.in_features, head.vocab_size)
    linear.load_state_dict(head.state_dict())  # the plain softmax and nn.Linear read each other's states
    return linear


def main() -> None:
    """Trains, calibrates and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--examples", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=16, help="what the last layer sees")
    parser.add_argument("--noise", type=float, default=1.2)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    sizes = {"train": arguments.examples, "valid": arguments.examples // 5, "test": arguments.examples // 5}
    data = {
        name: make_examples(count, arguments.classes, 32, arguments.noise, seed)
        for seed, (name, count) in enumerate(sizes.items())
    }
    rows = {}
    for name in ("softmax", "plif"):
        body, head = train(name, data["train"], arguments.classes, arguments.features, arguments.epochs)
        rows[name] = measure(body, head, data["test"])
        if name == "softmax":
            rows["softmax, temperature fitted"] = measure(
                body, with_temperature(body, head, data["valid"]), data["test"]
            )
    for name, row in rows.items():
        print(f"{name:28s}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()

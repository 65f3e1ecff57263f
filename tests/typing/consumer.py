"""A program that uses uncork as a library: type checkers read it from outside of uncork, and it runs.

`make check` has it read by mypy and pyright, `make test` runs it, `make test-dist` does both with the built wheel.
"""

from typing import Any, assert_type

import torch
from torch import Tensor, nn

import uncork
from uncork import functional
from uncork.heads import HeadSpec, convert_state_0_1


class Model(nn.Module):
    def __init__(self, features: int, words: int) -> None:
        super().__init__()
        self.body = nn.Embedding(words, features)
        self.head = uncork.build_head("plif", features, words, num_pieces=50)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.head.loss(self.body(input), target)


def train(words: int = 50) -> None:
    model = Model(8, words)
    assert_type(model.head, uncork.Head)
    groups = uncork.parameter_groups(model, lr=1e-2, weight_decay=0.1, function_lr_scale=0.1)
    assert_type(groups, list[dict[str, Any]])
    optimizer = torch.optim.AdamW(groups)
    input = torch.arange(words)
    losses: list[float] = []
    for _ in range(20):
        loss = model(input, input.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]  (torch's own)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def heads(input: Tensor, target: Tensor) -> None:
    names: tuple[str, ...] = uncork.HEAD_NAMES
    assert "mos" in names
    spec = HeadSpec.parse("plif:num_pieces=50")
    assert_type(spec, HeadSpec)
    plain = nn.Linear(8, 50)
    head = uncork.LinearHead.from_linear(plain, logit_function=uncork.Softcap(30.0))
    assert_type(head, uncork.LinearHead)
    assert_type(head(input), Tensor)
    assert_type(head.weight, nn.Parameter)
    assert_type(head.out_features, int)
    assert_type(head.loss(input, target, label_smoothing=0.1), Tensor)
    assert_type(head.scores(input), Tensor)
    assert_type(head.log_prob(input), Tensor)
    assert_type(head.predict(input), Tensor)
    assert_type(head.topk(input, 3), tuple[Tensor, Tensor])
    assert_type(head.statistics(input, target), uncork.TokenStatistics)
    assert_type(head.implementation(), str)
    assert_type(head.spec(), dict[str, Any])
    assert_type(uncork.head_from_spec(head.spec()), uncork.Head)
    uncork.head_from_spec(head.spec()).load_state_dict(convert_state_0_1(plain.state_dict(), head))
    mixture = uncork.MixtureHead(8, 50, num_components=2, latent_activation=None)
    assert_type(mixture, uncork.MixtureHead)
    assert_type(uncork.ContextMixtureHead(8, 50, num_components=2).log_prob(input), Tensor)


def functions(scores: Tensor) -> None:
    composed = uncork.Compose(uncork.Scale(0.5), uncork.Softcap(30.0))
    assert_type(composed, uncork.Compose)
    fitted = uncork.PLIF.from_function(uncork.Sigsoftmax())
    assert_type(fitted, uncork.PLIF)
    each: list[uncork.LogitFunction] = [
        composed, fitted, uncork.Identity(), uncork.AsymmetricSoftcap(), uncork.ScaledSigmoid(),
        uncork.GeneralizedSigsoftmax(learnable=True), uncork.MonotoneNetwork(20),
    ]  # fmt: skip
    for function in each:
        assert_type(function(scores), Tensor)
        assert_type(function.derivative(scores), Tensor)
        assert_type(function.increasing, bool)
        assert_type(uncork.LogitFunction.from_spec(function.spec()), uncork.LogitFunction)
    assert_type(functional.softcap(scores, 30.0), Tensor)


def losses(input: Tensor, weight: Tensor, target: Tensor) -> None:
    f = uncork.PLIF()
    assert_type(uncork.linear_cross_entropy(input, weight, target, logit_function=f, z_loss=1e-4), Tensor)
    found = uncork.token_statistics(input, weight, target, logit_function=f)
    assert_type(found, uncork.TokenStatistics)
    assert_type(found.entropy, Tensor)
    assert_type(found.log_prob, Tensor | None)
    latent, prior = input.unsqueeze(-2).expand(-1, 2, -1), torch.zeros(len(input), 2)
    assert_type(uncork.mixture_cross_entropy(latent, weight, prior, target, reduction="none"), Tensor)
    assert_type(uncork.mixture_token_statistics(latent, weight, prior), uncork.TokenStatistics)


if __name__ == "__main__":
    train()
    h, y = torch.randn(6, 8), torch.tensor([1, 2, 3, 4, 5, 49])
    heads(h, y)
    functions(torch.randn(5))
    losses(h, torch.randn(50, 8), y)
    uncork.show_versions()

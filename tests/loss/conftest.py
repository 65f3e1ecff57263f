"""What the tests of the loss share: the implementations, the functions, and problems with a plain-torch answer."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork import logit_functions as lf
from uncork.loss import (
    TokenStatistics,
    linear_cross_entropy,
    mixture_cross_entropy,
    mixture_token_statistics,
    tile_native,
    token_statistics,
)

# Every test of the contract runs on each of these. An implementation joins here.
IMPLS = ["reference", "torch", "native"]


class Bend(nn.Module):
    """A user's own elementwise module with a parameter: z + a tanh(z)."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor) -> Tensor:
        return scores + F.softplus(self.raw) * torch.tanh(scores)


FUNCTIONS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "identity": lf.Identity,
    "scale": lambda: lf.Scale(0.7, learnable=True),
    "softcap": lambda: lf.Softcap(3.0),
    "asymmetric-softcap": lambda: lf.AsymmetricSoftcap(2.0, 5.0, learnable=True),
    "scaled-sigmoid": lambda: lf.ScaledSigmoid(7.0, 1.0, 2.0),
    "sigsoftmax": lf.Sigsoftmax,
    "gss": lambda: lf.GeneralizedSigsoftmax(-0.5, 2.5),
    "gss-start": lambda: lf.GeneralizedSigsoftmax(learnable=True),
    "gss-learned": lambda: lf.GeneralizedSigsoftmax(0.5, 0.6, learnable=True),
    "monotone-relu": lambda: lf.MonotoneNetwork(5, 2.0),
    "monotone-tanh": lambda: lf.MonotoneNetwork(3, 2.0, units="tanh"),
    "plif": lambda: lf.PLIF(6, 2.0),
    "plif-unit-slope": lambda: lf.PLIF(6, 2.0, unit_slope=True),
    "compose": lambda: lf.Compose(lf.Scale(1.3, learnable=True), lf.PLIF(5, 2.0), lf.Softcap(6.0)),
    "module": Bend,
}

# Functions that the native tile has no kernel for: it refuses them (see test_native.py).
NOT_NATIVE = ["monotone-tanh", "module"]


def pytest_collection_modifyitems(config, items) -> None:
    def served(item) -> bool:
        drawn = getattr(item, "callspec", None)
        given = {} if drawn is None else drawn.params
        return "native" not in _impls(item) or not {given.get("function_name"), given.get("name")} & set(NOT_NATIVE)

    kept = [item for item in items if served(item)]
    config.hook.pytest_deselected(items=[item for item in items if not served(item)])
    items[:] = kept
    if tile_native.missing and os.environ.get("UNCORK_NATIVE") != "1":  # CI insists on it
        skip = pytest.mark.skip(reason=f"no native tile: {tile_native.missing}")
        for item in items:
            if "native" in _impls(item) or item.path.name == "test_native.py":
                item.add_marker(skip)


def _impls(item) -> set[object]:
    drawn = getattr(item, "callspec", None)
    return set() if drawn is None else {drawn.params.get("impl"), drawn.params.get("chunked_impl")}


@dataclass
class Problem:
    """Arguments of one call. Legend: N tokens, D features, K components, V vocabulary."""

    input: Tensor  # (N, D), or the latent (N, K, D) of a mixture
    weight: Tensor  # (V, D)
    bias: Tensor | None
    prior: Tensor | None  # (N, K), of a mixture
    target: Tensor
    function: nn.Module | None

    def operands(self) -> list[Tensor]:
        """All that a gradient is asked for."""
        parameters = [] if self.function is None else list(self.function.parameters())
        return [t for t in (self.input, self.weight, self.bias, self.prior, *parameters) if t is not None]

    def loss(self, impl: str | None, **options) -> Tensor:
        options = {"linear_bias": self.bias, "logit_function": self.function, "impl": impl, **options}
        if self.prior is None:
            return linear_cross_entropy(self.input, self.weight, self.target, **options)
        return mixture_cross_entropy(self.input, self.weight, self.prior, self.target, **options)

    def statistics(self, impl: str | None, *, target: bool = True, **options) -> TokenStatistics:
        options = {"linear_bias": self.bias, "logit_function": self.function, "impl": impl, **options}
        given = self.target if target else None
        if self.prior is None:
            return token_statistics(self.input, self.weight, given, **options)
        return mixture_token_statistics(self.input, self.weight, self.prior, given, **options)

    def logits(self) -> Tensor:
        """Softmax-ready, (N, V), by plain torch."""
        scores = F.linear(self.input, self.weight, self.bias)
        logits = scores if self.function is None else self.function(scores)
        if self.prior is None:
            return logits
        return torch.logsumexp(self.prior.log_softmax(-1)[..., None] + logits.log_softmax(-1), -2)

    def expected(
        self,
        *,
        reduction: str = "mean",
        weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:
        """The same loss from F.cross_entropy and a few sums."""
        logits, target = self.logits(), self.target
        ce = F.cross_entropy(
            logits,
            target,
            weight,
            reduction="none",
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        share = torch.ones_like(ce) if token_weight is None else token_weight
        count = torch.ones_like(ce)
        if not target.is_floating_point():
            kept = target != ignore_index
            share = torch.where(kept, share, 0)
            count = count if weight is None else weight[torch.where(kept, target, 0)]
        square = logits.logsumexp(-1).square()
        if reduction == "mean":
            return (share * ce).sum() / (share * count).sum() + z_loss * (share * square).sum() / share.sum()
        loss = share * (ce + z_loss * square)
        return loss.sum() if reduction == "sum" else loss


def build_function(name: str, dtype: torch.dtype = torch.float64) -> nn.Module | None:
    """A function by name, with random parameters."""
    function = FUNCTIONS[name]()
    if function is None:
        return None
    function = function.to(dtype)
    with torch.no_grad():
        for parameter in function.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return function


def build_problem(
    function: str | nn.Module | None = None,
    *,
    mixture: bool = False,
    bias: bool = True,
    probabilities: bool = False,
    tokens: int = 5,
    features: int = 3,
    vocab: int = 7,
    components: int = 2,
    dtype: torch.dtype = torch.float64,
    grad: bool = True,
) -> Problem:
    """A random problem; with index targets, and three tokens or more, the second token is ignored."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    shape = (tokens, components) if mixture else (tokens,)
    if probabilities:
        target = 2 * torch.rand(tokens, vocab, dtype=dtype)
    else:
        target = torch.randint(0, vocab, (tokens,))
        if tokens > 2:
            target[1] = -100
    return Problem(
        input=randn(*shape, features),
        weight=randn(vocab, features),
        bias=randn(vocab) if bias else None,
        prior=randn(*shape) if mixture else None,
        target=target,
        function=build_function(function, dtype) if isinstance(function, str) else function,
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=IMPLS)
def impl(request) -> str:
    return request.param


@pytest.fixture(scope="session", params=[name for name in IMPLS if name != "native"])
def module_impl(request) -> str:
    """For tests of a user's own module."""
    return request.param


@pytest.fixture(scope="session", params=["torch", "native"])
def chunked_impl(request) -> str:
    """For tests of memory, products and threads, which the reference promises nothing of."""
    return request.param


@pytest.fixture(scope="session", params=FUNCTIONS)
def function_name(request) -> str:
    return request.param


@pytest.fixture(scope="session", params=[False, True], ids=["linear", "mixture"])
def mixture(request) -> bool:
    return request.param


@pytest.fixture(scope="session")
def impls() -> list[str]:
    return IMPLS


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    return build_problem


@pytest.fixture(scope="session")
def make_function() -> Callable[..., nn.Module | None]:
    return build_function


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

"""What the tests of the loss share: the implementations, the functions, and problems with a plain-torch answer."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork import logit_functions as lf
from uncork.logit_functions.base import examples
from uncork.loss import (
    TokenStatistics,
    linear_cross_entropy,
    mixture_cross_entropy,
    mixture_token_statistics,
    token_statistics,
)
from uncork.loss.call import Call, Missing, build_call
from uncork.loss.chunked import Chunked
from uncork.loss.implementations import IMPLEMENTATIONS

# Every test of the contract runs on each of these.
IMPLS = list(reversed(IMPLEMENTATIONS))
CHUNKED = [name for name in IMPLS if isinstance(IMPLEMENTATIONS[name], Chunked)]


class Bend(nn.Module):
    """A user's own elementwise module with a parameter: z + a tanh(z)."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor) -> Tensor:
        return scores + F.softplus(self.raw) * torch.tanh(scores)


FUNCTIONS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    **examples(),
    "compose": lambda: lf.Compose(lf.Scale(1.3, learnable=True), lf.PLIF(5, 2.0), lf.Softcap(6.0)),
    "module": Bend,
}


@functools.cache
def refusal(impl: str, name: str, mixture: bool = False, probabilities: bool = False) -> str:
    """Why an implementation does not serve a function by its name here, on a CPU; empty if it does."""
    problem = build_problem(name, mixture=mixture, probabilities=probabilities)
    return IMPLEMENTATIONS[impl].refuses(problem.call())


def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out what an implementation refuses (test_native.py looks at the refusals), skips what is not built."""
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    reasons = {item: reason for item in here if (reason := _refused(item))}
    # CI insists on the native tile.
    missing = {} if os.environ.get("UNCORK_NATIVE") == "1" else {i: r for i, r in reasons.items() if _is_missing(r)}
    for item, reason in missing.items():
        item.add_marker(pytest.mark.skip(reason=reason))
    refused = [item for item, reason in reasons.items() if not _is_missing(reason)]
    config.hook.pytest_deselected(items=refused)
    items[:] = [item for item in items if item not in set(refused)]
    for item in items:
        if "triton" in _impls(item) and _is_one_of_many(item):
            item.add_marker(pytest.mark.slow)


# Triton's interpreter takes a second and more for a call: with it `make test` runs each test with these functions
# alone, every third case of it, and fewer of those with many.
INTERPRETED = {"none", "compose"}
ALL = 2**256
MANY = {
    "test_gradcheck": 10,
    "test_all_implementations_agree": 10,
    "test_statistics_agree": 10,
    "test_no_valid_token": 10,
    "test_a_masked_word_is_an_absent_word": 6,
    "test_scores_of_any_size_lose_no_more_than_torchs": 20,
    "test_nan_in_nan_out": 6,
    "test_half_precision_is_no_worse_than_torch": 6,
    "test_equals_plain_torch": 6,
    "test_memory_is_that_of_a_chunk": ALL,
    "test_any_chunk_size_gives_the_same": 8,
    "test_same_bits_again": 4,
    "test_function_gradients_do_not_depend_on_threads": 10,
    "test_any_integer_dtype": 15,
    "test_gradient_of_each_alone": 6,
    "test_gradient_of_each_pair": 6,
    "test_only_one_operand_asks": 6,
    "test_nothing_asks": 6,
    "test_a_large_vocabulary_loses_no_digits": 10,
    "test_weight_gradient_is_accumulated_in_float32": ALL,
    "test_loss_of_many_tokens": ALL,
    "test_large_scores": 10,
}


def _is_one_of_many(item) -> bool:
    if (_drawn(item, "function_name", "name") & set(FUNCTIONS)) - INTERPRETED:
        return True
    number = int(hashlib.sha256(item.name.encode()).hexdigest(), 16)
    return number % MANY.get(item.originalname, 3) > 0


def _drawn(item, *names: str) -> set[str]:
    """The values of a case's parameters of these names."""
    drawn = getattr(item, "callspec", None)
    given = {} if drawn is None else drawn.params
    return {given[name] for name in names if isinstance(given.get(name), str)}


def _impls(item) -> set[str]:
    return _drawn(item, "impl", "chunked_impl", "module_impl") & set(IMPLS)


def _is_missing(reason: str) -> bool:
    return isinstance(reason, Missing)


def _refused(item) -> str:
    drawn = getattr(item, "callspec", None)
    given = {} if drawn is None else drawn.params
    impls = _impls(item)
    if item.path.name == "test_native.py":
        impls.add("native")
    names = _drawn(item, "function_name", "name") & set(FUNCTIONS) or {"none"}
    cases = [given.get("kind"), given.get("case"), *(case for case in given.values() if isinstance(case, tuple))]
    probabilities = given.get("probabilities") is True or any("probabilities" in case for case in cases if case)
    kind = bool(given.get("mixture")), probabilities
    return next((reason for impl in impls for name in names if (reason := refusal(impl, name, *kind))), "")


@dataclass
class Problem:
    """Arguments of one call. Legend: N tokens, D features, K components, V vocabulary."""

    input: Tensor  # (N, D), or the latent (N, K, D) of a mixture
    weight: Tensor  # (V, D)
    bias: Tensor | None
    prior: Tensor | None  # (N, K), of a mixture
    target: Tensor
    function: nn.Module | None

    def call(self) -> Call:
        """What implementations are asked about."""
        given = {"prior_logits": self.prior, "linear_bias": self.bias, "logit_function": self.function}
        return build_call(self.input, self.weight, self.target, **given)[0]

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


@pytest.fixture(scope="session", params=[name for name in IMPLS if not refusal(name, "module")])
def module_impl(request) -> str:
    """For tests of a user's own module."""
    return request.param


@pytest.fixture(scope="session", params=CHUNKED)
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

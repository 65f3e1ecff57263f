"""The contenders of the benchmark: one forward and backward pass each, on the same tensors.

Legend: N tokens, D features, V vocabulary, K components.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork import LogitFunction
from uncork.heads import HEAD_NAMES, HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.experiments.bench.naive import naive_mixture_loss, naive_plif
from uncork.lab.experiments.bench.settings import CONTENDERS, Setup, Shape
from uncork.messages import close_to

SCORE_DEVIATION = 3.0
"""Standard deviation of the scores, about that of a trained language model."""
NAIVE_PIECES = 1000


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


class Inputs:
    """The tensors of one setup: input (N, D), linear_weight (V, D), target (N,); `mixture` adds those of a mixture."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.dtype: torch.dtype = getattr(torch, setup.dtype)
        self._generator = torch.Generator().manual_seed(0)
        shape = setup.shape
        self.input = self._normal(shape.tokens, shape.in_features)
        self.linear_weight = self._normal(
            shape.vocab_size, shape.in_features, scale=SCORE_DEVIATION / shape.in_features**0.5
        )
        self.target = torch.randint(shape.vocab_size, (shape.tokens,), generator=self._generator)
        self._mixtures: dict[int, tuple[Tensor, Tensor]] = {}

    def mixture(self, components: int) -> tuple[Tensor, Tensor]:
        """latent (N, K, D) and prior_logits (N, K)."""
        if components not in self._mixtures:
            tokens, features = self.setup.shape.tokens, self.setup.shape.in_features
            self._mixtures[components] = (
                self._normal(tokens, components, features),
                self._normal(tokens, components),
            )
        return self._mixtures[components]

    def _normal(self, *size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.empty(size).normal_(generator=self._generator).mul_(scale)
        return drawn.to(self.dtype).requires_grad_()


@dataclass(frozen=True)
class Step:
    """One forward and backward. `run` returns the loss and leaves the gradients in the leaves."""

    run: Callable[[], Tensor]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    function: LogitFunction | None = None

    def clear(self) -> None:
        """Drop the gradients, so that the next run makes new ones."""
        for leaf in self.leaves.values():
            leaf.grad = None


def training_step(loss: Callable[[], Tensor], leaves: dict[str, Tensor], function: LogitFunction | None = None) -> Step:
    """The step that computes a loss and its gradients."""

    def run() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return Step(run, leaves, function)


def build_step(name: str, inputs: Inputs) -> Step:
    """The step of the contender `name`. Raises LabError for an unknown name, Unavailable if it cannot run here."""
    for pattern, build in _BUILDERS:
        match = re.fullmatch(pattern, name)
        if match:
            _require_memory(name, inputs.setup.shape, inputs.dtype)
            return build(inputs, *match.groups())
    raise LabError(f"only: {name!r} is no contender; `uncork bench --help` lists them")


def is_ours(name: str) -> bool:
    """Whether the contender is uncork's own, whose numbers are checked before it is timed."""
    return any(re.fullmatch(pattern, name) for pattern in (_OURS, _OUR_MIXTURE))


def check_name(name: str) -> None:
    """Raise LabError unless there is such a contender."""
    if name != "torch-best" and not any(re.fullmatch(pattern, name) for pattern, _ in _BUILDERS):
        raise LabError(f"only: {name!r} is no contender{close_to(name, CONTENDERS)}; `uncork bench --help` lists them")


# How many tensors of K N V numbers a contender holds at its peak; those that hold few are not listed.
_BLOCKS = {"eager": 3, "compile": 3, "naive-sigsoftmax": 5, "naive-plif": 13, "naive-mos": 6}


def _require_memory(name: str, shape: Shape, dtype: torch.dtype) -> None:
    kind, _, components = name.rpartition("-")
    blocks = _BLOCKS.get(name) or _BLOCKS.get(kind, 0) * int(components if components.isdigit() else 1)
    needed = blocks * shape.tokens * shape.vocab_size * dtype.itemsize
    free = psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise Unavailable(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def _linear_leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {"input": inputs.input, "linear_weight": inputs.linear_weight}


def _products(inputs: Inputs, forward: str | None) -> Step:
    """G, the matrix products alone: S = X W^T and, unless `forward`, S W and S^T X. All results are preallocated."""
    x, w = inputs.input.detach(), inputs.linear_weight.detach()
    scores = x.new_empty(len(x), len(w))
    grad_input, grad_weight = torch.empty_like(x), torch.empty_like(w)

    def run() -> Tensor:
        torch.mm(x, w.T, out=scores)
        if forward is None:
            torch.mm(scores, w, out=grad_input)
            torch.mm(scores.T, x, out=grad_weight)
        return scores[0, 0]

    return Step(run)


def _eager(inputs: Inputs) -> Step:
    x, w, y = inputs.input, inputs.linear_weight, inputs.target
    return training_step(lambda: F.cross_entropy(x @ w.T, y), _linear_leaves(inputs))


def _compile(inputs: Inputs) -> Step:
    @torch.compile
    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x @ w.T, y)

    step = training_step(lambda: loss(inputs.input, inputs.linear_weight, inputs.target), _linear_leaves(inputs))
    try:
        step.run()
    except Exception as error:  # any error of the compiler, or that there is none
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise Unavailable(f"torch.compile does not work here: {reason}") from error
    return step


def _torch_chunked(inputs: Inputs, chunk: str) -> Step:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch has F.linear_cross_entropy since 2.13, this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()
    if chunk != "auto":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=int(chunk))
    x, w, y = inputs.input, inputs.linear_weight, inputs.target
    return training_step(lambda: F.linear_cross_entropy(x, w, y, options=options), _linear_leaves(inputs))


def _naive_sigsoftmax(inputs: Inputs) -> Step:
    def loss() -> Tensor:
        scores = inputs.input @ inputs.linear_weight.T
        return F.cross_entropy(scores + F.logsigmoid(scores), inputs.target)

    return training_step(loss, _linear_leaves(inputs))


def _naive_plif(inputs: Inputs) -> Step:
    raw, bound = torch.zeros(NAIVE_PIECES, requires_grad=True), 20.0
    knots = torch.linspace(-bound, bound, NAIVE_PIECES + 1)[:-1].to(inputs.dtype)

    def loss() -> Tensor:
        scores = inputs.input @ inputs.linear_weight.T
        slopes = F.softplus(raw.to(scores.dtype) + 0.5413)
        return F.cross_entropy(naive_plif(scores, slopes, knots, bound), inputs.target)

    return training_step(loss, {**_linear_leaves(inputs), "raw": raw})


def _naive_mixture(inputs: Inputs, components: str) -> Step:
    latent, prior = inputs.mixture(int(components))
    w, y = inputs.linear_weight, inputs.target
    leaves = {"latent": latent, "linear_weight": w, "prior_logits": prior}
    return training_step(lambda: naive_mixture_loss(latent, w, prior, y), leaves)


def _function(name: str) -> LogitFunction | None:
    """The logit function of one of our contenders; a learnable one starts at random, so that it is not the identity.

    Its parameters are float32, for inputs of half precision too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in _HEADS:
            return cast(LogitFunction | None, uncork.build_head(name, 1, 1, **_STARTS.get(name, {})).logit_function)
        return uncork.PLIF(int(name.removeprefix("plif-")), init="random")


def _ours(inputs: Inputs, name: str, forward: str | None) -> Step:
    function = _function(name)
    if function is not None and inputs.dtype == torch.float64:
        function = function.double()
    x, w, y, impl = inputs.input, inputs.linear_weight, inputs.target, inputs.setup.impl
    leaves = _linear_leaves(inputs)
    if function is not None:
        leaves |= {f"function.{n}": p for n, p in function.named_parameters() if p.requires_grad}

    def loss() -> Tensor:
        return uncork.linear_cross_entropy(x, w, y, logit_function=function, impl=impl)

    if forward is None:
        return training_step(loss, leaves, function)
    return Step(torch.no_grad()(loss), leaves, function)


def _our_mixture(inputs: Inputs, components: str) -> Step:
    latent, prior = inputs.mixture(int(components))
    w, y, impl = inputs.linear_weight, inputs.target, inputs.setup.impl
    leaves = {"latent": latent, "linear_weight": w, "prior_logits": prior}
    return training_step(lambda: uncork.mixture_cross_entropy(latent, w, prior, y, impl=impl), leaves)


_STARTS: dict[str, dict[str, Any]] = {
    "temperature": {"factor": 0.9}, "monotone": {"init": "random"}, "plif-frozen": {"num_pieces": 1000},
}  # fmt: skip
"""By head, options with which its function is not the identity."""
# Heads without a mixture. PLIF is left out, since its contenders are named with their number of pieces.
_HEADS = tuple(name for name in HEAD_NAMES if name != "plif" and not HeadSpec(name).is_mixture)
_NUMBER = r"([1-9]\d*)"
_OURS = rf"({'|'.join(_HEADS)}|plif-{_NUMBER[1:-1]})(-forward)?"
_OUR_MIXTURE = rf"mos-{_NUMBER}"
_BUILDERS: tuple[tuple[str, Callable[..., Any]], ...] = (
    (r"G(-forward)?", _products),
    (r"eager", _eager),
    (r"compile", _compile),
    (rf"torch-(auto|{_NUMBER[1:-1]})", _torch_chunked),
    (r"naive-sigsoftmax", _naive_sigsoftmax),
    (r"naive-plif", _naive_plif),
    (rf"naive-mos-{_NUMBER}", _naive_mixture),
    (_OURS, _ours),
    (_OUR_MIXTURE, _our_mixture),
)

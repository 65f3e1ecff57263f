"""What `benchmarks/gpu.py` times: ours and other libraries' steps, at given shapes, in bfloat16."""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork import PLIF, LogitFunction, Softcap


class Shape(NamedTuple):
    """N, D, V."""

    tokens: int
    features: int
    vocab: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))


SHAPES = [Shape(8192, 4096, 151936), Shape(8192, 2304, 256000), Shape(4096, 768, 50257), Shape(2048, 400, 33278)]
SWEPT = SHAPES[0]
QUICK_SHAPES = [Shape(2, 4, 20)]
COMPONENTS = 4
SCORE_DEVIATION = 3.0  # about that of a trained language model
Step = Callable[[], Tensor]


class Inputs:
    """The tensors of a shape, in bfloat16."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(0)
        self.input = self._normal(shape.tokens, shape.features)
        self.weight = self._normal(shape.vocab, shape.features, scale=SCORE_DEVIATION / shape.features**0.5)
        self.target = torch.randint(shape.vocab, (shape.tokens,), generator=self._generator, device=device)
        self._latent: Tensor | None = None

    def _normal(self, *size: int, scale: float = 1.0) -> Tensor:
        drawn = torch.empty(size, device=self.device, dtype=torch.bfloat16)
        return drawn.normal_(0, scale, generator=self._generator).requires_grad_()

    def mixture(self) -> tuple[Tensor, Tensor]:
        """latent (N, K, D), prior_logits (N, K)."""
        if self._latent is None:
            self._latent = self._normal(self.shape.tokens, COMPONENTS, self.shape.features)
            self._prior = self._normal(self.shape.tokens, COMPONENTS)
        return self._latent, self._prior


class Contender(NamedTuple):
    """A step and the tensors that it leaves gradients in."""

    run: Step
    leaves: list[Tensor]

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def training(inputs: Inputs, loss: Step, *more: Tensor) -> Contender:
    def run() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return Contender(run, [inputs.input, inputs.weight, *more])


def products(inputs: Inputs) -> Contender:
    x, w = inputs.input.detach(), inputs.weight.detach()

    def run() -> Tensor:
        scores = x @ w.T
        made = (scores @ w, scores.T @ x)
        return made[0][0, 0]

    return Contender(run, [])


def eager_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), y)


def eager(inputs: Inputs) -> Contender:
    return training(inputs, lambda: eager_loss(inputs.input, inputs.weight, inputs.target))


def compiled(inputs: Inputs) -> Contender:
    torch.compiler.reset()
    loss = torch.compile(eager_loss, dynamic=False)
    return training(inputs, lambda: loss(inputs.input, inputs.weight, inputs.target))


def torchs_own(inputs: Inputs) -> Contender:
    call: Any = F.linear_cross_entropy
    options = {"options": torch.nn.LinearCrossEntropyOptions()}
    return training(inputs, lambda: call(inputs.input, inputs.weight, inputs.target, **options))


def ours(inputs: Inputs, make: Callable[[], LogitFunction | None] = lambda: None, rows: int | None = None) -> Contender:
    torch.manual_seed(0)
    function = make()
    if function is not None:
        function.to(inputs.device)
    parameters = [] if function is None else [p for p in function.parameters() if p.requires_grad]
    call = partial(uncork.linear_cross_entropy, logit_function=function, impl="triton", chunk_size=rows)
    return training(inputs, lambda: call(inputs.input, inputs.weight, inputs.target), *parameters)


def mixture(inputs: Inputs) -> Contender:
    latent, prior = inputs.mixture()
    call = partial(uncork.mixture_cross_entropy, impl="triton")
    return training(inputs, lambda: call(latent, inputs.weight, prior, inputs.target), latent, prior)


def liger(inputs: Inputs, softcap: float | None = None) -> Contender:
    call = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def loss() -> Tensor:
        found = call(inputs.input, inputs.weight, inputs.target, softcap=softcap)
        return found[0] if isinstance(found, tuple) else found

    return training(inputs, loss)


def cut(inputs: Inputs, softcap: float | None = None, impl: str = "cce") -> Contender:
    call = import_module("cut_cross_entropy").linear_cross_entropy
    return training(inputs, lambda: call(inputs.input, inputs.weight, inputs.target, softcap=softcap, impl=impl))


def trl(inputs: Inputs, softcap: float | None = None) -> Contender:
    apply = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    x, w, y = inputs.input, inputs.weight, inputs.target
    return training(inputs, lambda: -apply(x, w, None, y, 1.0, 32768, softcap, 1.0, ())[0].mean())


def plif(pieces: int, frozen: bool) -> LogitFunction:
    return PLIF(pieces, init="random", frozen=frozen)


PRODUCTS = "products"
CONTENDERS: dict[str, Callable[[Inputs], Contender]] = {
    PRODUCTS: products,
    "eager": eager,
    "compile": compiled,
    "torch": torchs_own,
    "liger": liger,
    "liger, softcap": partial(liger, softcap=30.0),
    "cce": cut,
    "cce, exact": partial(cut, impl="cce_exact"),
    "cce, softcap": partial(cut, softcap=30.0),
    "trl": trl,
    "trl, softcap": partial(trl, softcap=30.0),
    "uncork: softmax": ours,
    "uncork: softcap": partial(ours, make=Softcap),
    **{
        f"uncork: plif-{pieces}{', frozen' * frozen}": partial(ours, make=partial(plif, pieces, frozen))
        for frozen, pieces in product((True, False), (100, 1000, 100_000))
    },
    f"uncork: mixture of {COMPONENTS}": mixture,
}
NEEDS = {"liger": "liger_kernel", "cce": "cut_cross_entropy", "trl": "trl"}
QUICK_CONTENDERS = (PRODUCTS, "eager", "uncork: softmax", "uncork: plif-100")
ROUNDS, LEAST_ROUNDS, WARM_UP = 15, 3, 3


def available(name: str) -> bool:
    """Whether what a contender needs is there."""
    if name == "torch":
        return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    package = NEEDS.get(name.partition(",")[0])
    return package is None or importlib.util.find_spec(package) is not None


def milliseconds(device: torch.device, run: Callable[[], object]) -> float:
    """Of one run, launching included."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def peak_mib(device: torch.device, run: Callable[[], object]) -> float | None:
    """Memory of one run, its gradients included, beyond what was there; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20

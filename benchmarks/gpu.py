"""Whether the tile for GPUs is right on a GPU, which blocks suit it, and how fast it is: for half an hour with one.

    PYTHONPATH=src python benchmarks/gpu.py all --out results/gpu --seconds 540

Stages: `check` compares impl="triton" with float64, case by case, `sweep` tries rows a chunk, blocks and warps, `time`
measures one forward and backward in bfloat16 against the bare products and other libraries; `all` is the three in this
order. Rows are appended to STAGE.jsonl as they are made. A run stops when its seconds are over, after one new row at
least; run again, it goes on where it was. Rows of other sources, versions or machines do not count as made. Every
stage ends by writing its rows as CSV, table.csv (from `time`) and provenance.json; `--table` does only that.

No code reads what `sweep` finds: the blocks in `loss/tile_triton.py` are constants, to be changed by hand.

It asks for torch, triton, numpy and pandas alone. Exit codes: 1 a case is wrong, 2 there is no GPU, 3 it stopped
early (run it again). Small, in Triton's interpreter:

    TRITON_INTERPRET=1 PYTHONPATH=src python benchmarks/gpu.py all --out DIR --device cpu --quick
"""

import argparse
import copy
import gc
import hashlib
import importlib.util
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork import PLIF, Compose, LogitFunction, Scale, Softcap
from uncork.functional import at_least_float32, mixture_log_softmax
from uncork.lab.machine import cores, machine_name
from uncork.lab.run.provenance import provenance
from uncork.logit_functions.base import examples
from uncork.loss import tile_triton
from uncork.loss.call import build_call
from uncork.loss.implementations import IMPLEMENTATIONS

STAGES = ("check", "sweep", "time")
WRONG, UNABLE, STOPPED = 1, 2, 3


class DeviceError(Exception):
    """The device no longer answers this process."""


# ---- what is kept


class Clock:
    """The seconds of a run; it is over when they are, but not before the run has kept a row."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start, self.kept = seconds, time.monotonic(), 0

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def over(self) -> bool:
        return self.kept > 0 and self.left() <= 0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class Kept:
    """The rows of a stage, appended one by one."""

    def __init__(self, folder: Path, stage: str, origin: str, clock: Clock) -> None:
        self.path, self.origin, self.clock = folder / f"{stage}.jsonl", origin, clock
        self.rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        self.rows = {row["name"]: row for row in read_rows(self.path) if row["origin"] == self.origin}

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def add(self, name: str, **row: Any) -> None:
        self.rows[name] = {"name": name, **row, "origin": self.origin}
        with self.path.open("a+b") as file:
            if file.tell():  # a line that was cut off stays one line
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(self.rows[name]).encode() + b"\n")
        self.clock.kept += 1
        print(" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in (name, *row.values())), flush=True)


def origin_of(device: torch.device, quick: bool) -> str:
    """A digest of the sources, the versions and the machine."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(Path(uncork.__file__).parent.rglob("*.py"))]:
        digest.update(path.read_bytes())
    digest.update(repr((torch.__version__, metadata.version("triton"), machine_name(device), quick)).encode())
    return digest.hexdigest()[:12]


def note_of(error: Exception) -> str:
    """What is said of a call that raised."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def require_alive(device: torch.device) -> None:
    """Raises DeviceError if an error has made the device useless for this process."""
    freed(device)
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise DeviceError(note_of(error)) from error


def freed(device: torch.device) -> None:
    """Gives memory back that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- check


MANY_PIECES = {"plif-1000": 1000, "plif-100000": 100_000}
FUNCTIONS: dict[str, Callable[[], LogitFunction | None]] = {
    "none": lambda: None,
    **examples(),
    "compose": lambda: Compose(Scale(1.3, learnable=True), PLIF(5, 2.0), Softcap(6.0)),
    **{name: partial(PLIF, pieces, 20.0) for name, pieces in MANY_PIECES.items()},
}
REFUSED = {"monotone-tanh"}  # by name: it has no kernel
SOME = ("none", "plif", "compose")
ALONE = ("smoothing", "classes", "z", "tokens", "sum", "each", "masked", "no-bias")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TIMES_TORCH = 1.5
FLOOR = 32.0
"""Error allowed in addition, in float32's epsilons: sums in another order, approximate exponentials."""
ABSOLUTE = 1e-7


@dataclass(frozen=True)
class Case:
    """A call whose loss (or statistics) and gradients are compared. options: of ALONE."""

    function: str
    dtype: str
    vocab: int
    mixture: bool = False
    probabilities: bool = False
    options: tuple[str, ...] = ()
    statistics: bool = False

    @property
    def name(self) -> str:
        kind = "mixture" if self.mixture else "linear"
        target = "probabilities" if self.probabilities else "index"
        parts = (self.function, kind, target, self.dtype, f"V={self.vocab}", *self.options)
        return " ".join((*parts, "statistics") if self.statistics else parts)


class Sizes(NamedTuple):
    """Of the problems of `check`."""

    tokens: int
    features: int
    rows: int  # a chunk
    components: int = 2


SIZES, QUICK_SIZES = Sizes(48, 32, 20), Sizes(3, 4, 2)
QUICK_BLOCK = 16


def cases(quick: bool) -> list[Case]:
    """What is checked, what matters most first."""
    if quick:
        return [
            Case("none", "float32", 20),
            Case("plif", "bfloat16", 20),
            Case("compose", "float16", 20, options=("masked", "tokens", "z")),
            Case("none", "float32", 20, mixture=True, probabilities=True, options=("smoothing", "classes")),
            Case("plif", "float32", 20, statistics=True),
            Case("monotone-tanh", "float32", 20),
            Case("plif", "float32", 1),
        ]
    both = (False, True)
    made = [Case(f, dtype, 2049, mixture) for mixture, f, dtype in product(both, FUNCTIONS, DTYPES)]
    made += [Case(f, "float32", v) for f, v in product(FUNCTIONS, (33278, 1, 7))]
    made += [Case(f, dtype, v, True) for f, v, dtype in product(SOME, (33278, 1, 7), DTYPES)]
    made += [Case(f, "float32", 2049, False, True, ("smoothing", "classes")) for f in FUNCTIONS]
    made += [Case(f, dtype, 2049, statistics=True) for f, dtype in product(FUNCTIONS, DTYPES)]
    made += [Case(f, dtype, v, True, statistics=True) for f, dtype, v in product(SOME, DTYPES, (2049, 33278))]
    together = ("smoothing", "classes", "tokens", "z")
    for f, mixture, probabilities, dtype in product(SOME, both, both, DTYPES):
        sets = [(), *((option,) for option in ALONE), together, ("masked", "tokens", "each")]
        made += [
            Case(f, dtype, 2049, mixture, probabilities, tuple(o for o in options if o != "z" or not mixture))
            for options in sets
            if options != ("z",) or not mixture
        ]
        made.append(Case(f, dtype, 33278, mixture, probabilities, together[:3]))
    return list({case.name: case for case in made}.values())


class Problem:
    """The tensors of a case. Legend: N tokens, D features, K components, V vocabulary."""

    def __init__(self, case: Case, sizes: Sizes, device: torch.device) -> None:
        self.case, self.chunk = case, sizes.rows
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        randn = partial(torch.randn, generator=generator)
        n, d, v, dtype = sizes.tokens, sizes.features, case.vocab, DTYPES[case.dtype]
        leading = (n, sizes.components) if case.mixture else (n,)
        # Scores are odd multiples of 1/256 and exact in every dtype of the sums, so that none falls into one piece of
        # a function here and into the next in float64.
        x, w = (randn(*leading, d) * 2).round() / 2, (randn(v, d) * (3 / d**0.5) * 64).round().clamp(-255, 255) / 64
        x[..., 0], w[:, 0] = 1, 1 / 256
        self.leaves = {"input": x, "weight": w}
        masked = torch.zeros(v, dtype=torch.bool)
        if "masked" in case.options:
            masked[1::3] = v > 1
        if "no-bias" not in case.options:
            self.leaves["bias"] = ((randn(v) * 8).round() / 8).masked_fill(masked, -torch.inf)
        if case.mixture:
            self.leaves["prior"] = randn(*leading)
        possible = (~masked).nonzero().squeeze(1)
        if case.probabilities:
            self.target = (2 * torch.rand(n, v, generator=generator)).masked_fill(masked, 0).to(device)
        else:
            self.target = possible[torch.randint(len(possible), (n,), generator=generator)].to(device)
            self.target[1] = -100
        self.class_weight = torch.rand(v, generator=generator).to(device) if "classes" in case.options else None
        self.token_weight = torch.rand(n, generator=generator).to(device) if "tokens" in case.options else None
        self.smoothing = 0.1 if "smoothing" in case.options else 0.0
        self.z = 0.01 if "z" in case.options else 0.0
        self.reduction = next((r for o, r in (("sum", "sum"), ("each", "none")) if o in case.options), "mean")
        self.leaves = {name: t.to(device, dtype).requires_grad_() for name, t in self.leaves.items()}
        self.function = FUNCTIONS[case.function]()
        if self.function is not None:
            with torch.no_grad():
                for parameter in self.function.parameters():
                    parameter.add_(randn(parameter.shape), alpha=0.5)
            self.function.to(device)

    def widened(self) -> "Problem":
        """The same numbers in float64."""
        wide = copy.copy(self)
        wide.leaves = {name: t.detach().double().requires_grad_() for name, t in self.leaves.items()}
        wide.function = copy.deepcopy(self.function)
        if wide.function is not None:
            wide.function.double()
        if self.case.probabilities:
            wide.target = self.target.double()
        for name in ("class_weight", "token_weight"):
            given = getattr(self, name)
            setattr(wide, name, None if given is None else given.double())
        return wide

    def _operands(self) -> tuple[Tensor, ...]:
        names = ("input", "weight", "prior") if self.case.mixture else ("input", "weight")
        return (*(self.leaves[name] for name in names), self.target)

    def refusal(self) -> str:
        """Why impl="triton" would not serve it; empty if it does."""
        given: dict[str, Any] = {"linear_bias": self.leaves.get("bias"), "logit_function": self.function}
        given["prior_logits"] = self.leaves.get("prior")
        call, _ = build_call(self.leaves["input"], self.leaves["weight"], self.target, **given)
        return IMPLEMENTATIONS["triton"].refuses(call)

    def answer(self, impl: str) -> dict[str, Tensor]:
        """What the library answers, with all gradients."""
        common: dict[str, Any] = {
            "linear_bias": self.leaves.get("bias"), "logit_function": self.function, "impl": impl,
            "chunk_size": None if impl == "reference" else self.chunk,
        }  # fmt: skip
        if self.case.statistics:
            call: Any = uncork.mixture_token_statistics if self.case.mixture else uncork.token_statistics
            found = call(*self._operands(), **common)
            return self._with_gradients(dict(found._asdict()))
        if not self.case.mixture:
            common["z_loss"] = self.z
        call = uncork.mixture_cross_entropy if self.case.mixture else uncork.linear_cross_entropy
        loss = call(
            *self._operands(), **common, weight=self.class_weight, token_weight=self.token_weight,
            label_smoothing=self.smoothing, reduction=self.reduction,
        )  # fmt: skip
        return self._with_gradients({"loss": loss})

    def logits(self) -> Tensor:
        """(N, V) by what one writes in torch: scores in the dtype of the inputs, all else in float32 or float64."""
        scores = F.linear(self.leaves["input"], self.leaves["weight"], self.leaves.get("bias"))
        logits = at_least_float32(scores) if self.function is None else self.function(scores)
        return mixture_log_softmax(logits, at_least_float32(self.leaves["prior"])) if self.case.mixture else logits

    def plain(self) -> dict[str, Tensor]:
        """What torch answers in the dtype of the inputs."""
        logits, target = self.logits(), self.target
        kept = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if not self.case.probabilities:
            kept = target != -100
        if self.case.statistics:
            log_p = logits.log_softmax(-1)
            own = log_p.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
            possible = log_p > -torch.inf
            finite = torch.where(possible, log_p, 0)
            found = {
                "log_prob": torch.where(kept, own, 0),
                "logsumexp": torch.zeros_like(own) if self.case.mixture else logits.logsumexp(-1),
                "entropy": -torch.where(possible, finite.exp() * finite, 0).sum(-1),
                "argmax": logits.argmax(-1),
            }
            return self._with_gradients(found)
        ce = F.cross_entropy(
            logits, target.to(logits.dtype) if self.case.probabilities else target, self.class_weight,
            reduction="none", label_smoothing=self.smoothing,
        )  # fmt: skip
        share = torch.ones_like(ce) if self.token_weight is None else self.token_weight
        share = torch.where(kept, share, 0)
        square = torch.where(kept, logits.logsumexp(-1).square(), 0) if self.z else torch.zeros_like(ce)
        if self.reduction == "mean":
            count = torch.ones_like(ce)
            if self.class_weight is not None and not self.case.probabilities:
                count = self.class_weight[torch.where(kept, target, 0)]
            loss = (share * ce).sum() / (share * count).sum() + self.z * (share * square).sum() / share.sum()
        else:
            loss = share * (ce + self.z * square)
            loss = loss.sum() if self.reduction == "sum" else loss
        return self._with_gradients({"loss": loss})

    def _with_gradients(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=self.target.device)
        for turn, value in enumerate(found.values()):
            if value.requires_grad:
                ramp = torch.linspace(-1, 2, value.numel(), dtype=value.dtype, device=value.device)
                total = total + ((1 + turn / 4) * (ramp if value.dim() else 1) * value).sum()
        parameters = dict(self.function.named_parameters()) if self.function is not None else {}
        asked = self.leaves | {f"function.{name}": p for name, p in parameters.items() if p.requires_grad}
        grads = torch.autograd.grad(total, list(asked.values()))
        made = {name: t.detach() for name, t in found.items()}
        return made | {f"gradient of {name}": g for name, g in zip(asked, grads, strict=True)}


def judge(case: Case, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The worst tensor of a case: its error and the bound, both over the norm of the truth, and whether all passed."""
    problem = Problem(case, sizes, device)
    refusal = problem.refusal()
    if refusal:
        expected = case.function in REFUSED
        return {"error": None, "bound": None, "passed": expected, "worst": "", "note": f"refused: {refusal}"}
    ours, again = problem.answer("triton"), problem.answer("triton")
    wide = problem.widened()
    truth, own = wide.answer("reference"), problem.plain()
    same_bits = all(torch.equal(a, again[name]) for name, a in ours.items())
    wrong = [name for name, a in ours.items() if a.shape != own[name].shape or not bool(a.isfinite().all())]
    if "argmax" in ours:
        logits = wide.logits().detach()
        truth["argmax"] = logits.amax(-1)
        for found in (ours, own):
            found["argmax"] = logits.gather(-1, found["argmax"][:, None]).squeeze(-1)
    epsilon, errors = torch.finfo(torch.float32).eps, dict[str, tuple[float, float, float]]()
    for name, exact in truth.items():
        norm = exact.norm().item()
        error, torchs = ((found[name].double() - exact).norm().item() for found in (ours, own))
        rounding = torch.finfo(ours[name].dtype).eps / 2 if ours[name].is_floating_point() else 0.0
        allowed = max(TIMES_TORCH * torchs if torchs < float("inf") else 0.0, rounding * norm)
        errors[name] = (error, allowed + FLOOR * epsilon * norm + ABSOLUTE, norm or 1.0)
    worst = max(errors, key=lambda name: (errors[name][0] / errors[name][1]) if errors[name][0] >= 0 else float("inf"))
    error, bound, norm = errors[worst]
    passed = same_bits and not wrong and all(error <= bound for error, bound, _ in errors.values())
    notes = [
        "" if same_bits else "other bits when run again",
        f"not finite, or of another shape: {wrong}" if wrong else "",
    ]
    return {
        "error": error / norm, "bound": bound / norm, "passed": passed, "worst": worst,
        "note": ", ".join(note for note in notes if note),
    }  # fmt: skip


def check(run: "Run") -> bool:
    """Every case, in some processes at once, since most of the time goes into compiling; whether all were made."""
    kept, wanted = run.kept("check"), cases(run.quick)
    names = [case.name for case in wanted]
    if run.workers > 1:
        made = -1
        while not run.clock.over() and made < len(kept.rows) and any(name not in kept for name in names):
            made = len(kept.rows)
            command = [sys.executable, __file__, "check", "--out", str(run.out), "--device", str(run.device)]
            command += ["--seconds", str(max(0.0, run.clock.left())), "--workers", "1"]
            command += ["--quick"] if run.quick else []
            started = [subprocess.Popen([*command, "--slice", f"{i}/{run.workers}"]) for i in range(run.workers)]
            for process in started:
                process.wait()
            kept.read()
            run.clock.kept += len(kept.rows) - made
    else:
        first, step = run.slice
        with blocks(QUICK_BLOCK if run.quick else None):
            for case in wanted[first::step]:
                if case.name in kept:
                    continue
                if run.clock.over():
                    break
                try:
                    found = judge(case, QUICK_SIZES if run.quick else SIZES, run.device)
                except Exception as error:
                    found = {"error": None, "bound": None, "passed": False, "worst": "", "note": note_of(error)}
                kept.add(case.name, **found)
                if found["error"] is None:
                    require_alive(run.device)
        names = names[first::step]
    rows = [kept.rows[name] for name in names if name in kept]
    failed = [row["name"] for row in rows if not row["passed"]]
    print(f"check: {len(rows)} of {len(names)} cases made, {len(failed)} failed", *failed, sep="\n  ", flush=True)
    run.failed |= bool(failed)
    return len(rows) == len(names)


# ---- sweep and time


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


@contextmanager
def blocks(
    block: int | None, warps: int | None = None, spent: list[tuple[str, Callable[[], float]]] | None = None
) -> Iterator[None]:
    """Kernels take so many numbers at once, in so many warps; spent: gets each one's name and milliseconds."""
    before = {name: getattr(tile_triton, name) for name in ("_BLOCK", "_BLOCK_OF_MANY", "_launch")}
    launch = before["_launch"]

    def launched(kernel: Any, programs: int, **arguments: Any) -> None:
        own = arguments if warps is None else {**arguments, "num_warps": warps}
        if spent is None:
            launch(kernel, programs, **own)
        elif not arguments["scores"].is_cuda:
            took = milliseconds(torch.device("cpu"), lambda: launch(kernel, programs, **own))
            spent.append((kernel.__name__, lambda: took))
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch(kernel, programs, **own)
            end.record()
            spent.append((kernel.__name__, lambda: begin.elapsed_time(end)))

    changed = (
        {"_launch": launched} if block is None else {"_launch": launched, "_BLOCK": block, "_BLOCK_OF_MANY": block}
    )
    try:
        for name, value in changed.items():
            setattr(tile_triton, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(tile_triton, name, value)


class Setting(NamedTuple):
    """What `sweep` tries."""

    rows: int
    block: int
    warps: int


def settings(quick: bool) -> list[Setting]:
    """All of 4 to 32 numbers a thread; at first with the rows that lie in the middle."""
    if quick:
        return [Setting(2, 16, 4), Setting(1, 32, 4)]
    sizes = [
        (block, warps)
        for block, warps in product((1024, 2048, 4096, 8192), (4, 8, 16))
        if 4 <= block // (32 * warps) <= 32
    ]
    return [Setting(rows, *size) for rows, size in product((2048, 4096, 1024, 8192, 512), sizes)]


KERNELS = ("row_statistics", "row_gradient")


def sweep(run: "Run") -> bool:
    """Milliseconds of a step and of its kernels at each setting; whether all were made."""
    kept, shape = run.kept("sweep"), QUICK_SHAPES[0] if run.quick else SWEPT
    functions: dict[str, Callable[[], LogitFunction | None]] = {
        "softmax": lambda: None,
        "plif-100": partial(plif, 100, False),
    }
    names = {
        f"{function} at {shape}: {s.rows} rows, blocks of {s.block}, {s.warps} warps": (function, s)
        for s, function in product(settings(run.quick), functions)
    }
    runs, inputs = 1 if run.quick else 5, None
    for name, (function, setting) in names.items():
        if name in kept:
            continue
        if run.clock.over():
            break
        inputs = inputs or Inputs(shape, run.device)
        row: dict[str, Any] = {
            "function": function,
            **setting._asdict(),
            "ms": None,
            **dict.fromkeys(KERNELS),
            "note": "",
        }
        spent: list[tuple[str, Callable[[], float]]] = []
        contender = None
        try:
            with blocks(setting.block, setting.warps, spent):
                contender, times = ours(inputs, functions[function], setting.rows), []
                for turn in range(runs + 1):
                    contender.clear()
                    if turn == 1:
                        spent.clear()
                    times.append(milliseconds(run.device, contender.run))
            row["ms"] = statistics.median(times[1:])
            for kernel in KERNELS:
                row[kernel] = sum(took() for name, took in spent if name == kernel) / runs
        except Exception as error:
            row["note"] = note_of(error)
        if contender is not None:
            contender.clear()
        kept.add(name, **row)
        if row["note"]:
            contender = None
            require_alive(run.device)
    made = [kept.rows[name] for name in names if name in kept]
    for function in functions:
        measured = [row for row in made if row["function"] == function and row["ms"] is not None]
        for what in ("ms", *KERNELS) if measured else ():
            best = min(measured, key=lambda row: row[what])
            print(
                f"sweep: best {what} of {function}: {best[what]:.3g}, {[best[key] for key in Setting._fields]}",
                flush=True,
            )
    print(f"sweep: {len(made)} of {len(names)} settings made", flush=True)
    return len(made) == len(names)


def time_shape(run: "Run", kept: Kept, shape: Shape, names: list[str]) -> None:
    """Keeps a row of each contender: quantiles of its milliseconds, the ratio to the products' in the same rounds."""
    device, inputs = run.device, Inputs(shape, run.device)
    ready: dict[str, tuple[Contender, float | None]] = {}
    about = {"tokens": shape.tokens, "features": shape.features, "vocab": shape.vocab}
    nothing = dict.fromkeys(("ms", "q1", "q3", "over_products", "mib"))

    def key(name: str) -> str:
        return f"{name} at {shape}"

    def gave_up(name: str, error: Exception) -> None:
        kept.add(key(name), contender=name, **about, **nothing, rounds=0, note=note_of(error))

    for name in [PRODUCTS, *(n for n in names if n != PRODUCTS)]:
        if run.clock.over():
            break
        contender = None
        try:
            contender = CONTENDERS[name](inputs)
            for _ in range(WARM_UP - 1 if not run.quick else 0):
                contender.clear()
                contender.run()
            contender.clear()
            ready[name] = (contender, peak_mib(device, contender.run))
        except Exception as error:
            gave_up(name, error)
        if contender is not None:
            contender.clear()
        if name not in ready:
            contender = None
            require_alive(device)
    freed(device)
    times: dict[str, dict[int, float]] = {name: {} for name in ready}
    order, shuffle, rounds = list(ready), random.Random(0), 2 if run.quick else ROUNDS
    least = min(LEAST_ROUNDS, rounds)
    for turn in range(rounds):
        if run.clock.over():
            break
        shuffle.shuffle(order)
        for name in list(order):
            contender = ready[name][0]
            contender.clear()
            try:
                times[name][turn] = milliseconds(device, contender.run)
            except Exception as error:
                order.remove(name)
                del ready[name]
                gave_up(name, error)
            contender.clear()
            if name not in ready:
                require_alive(device)
    base = times.get(PRODUCTS, {})
    for name, (_, mib) in ready.items():
        own = list(times[name].values())
        if len(own) < least or key(name) in kept:
            continue
        q1, median, q3 = statistics.quantiles(own, n=4, method="inclusive")
        ratios = [took / base[turn] for turn, took in times[name].items() if turn in base]
        found = {"ms": median, "q1": q1, "q3": q3, "over_products": statistics.median(ratios) if ratios else None}
        kept.add(key(name), contender=name, **about, **found, mib=mib, rounds=len(own), note="")


def measure(run: "Run") -> bool:
    """All contenders at all shapes; whether all were made."""
    kept = run.kept("time")
    contenders = [name for name in (QUICK_CONTENDERS if run.quick else CONTENDERS) if available(name)]
    left_out = [name for name in CONTENDERS if not available(name)]
    if left_out:
        print("time: not installed here:", ", ".join(left_out), flush=True)
    shapes = QUICK_SHAPES if run.quick else SHAPES
    wanted = {shape: [f"{name} at {shape}" for name in contenders] for shape in shapes}
    for shape, names in wanted.items():
        missing = [n for n, name in zip(contenders, names, strict=True) if name not in kept]
        if missing and not run.clock.over():
            time_shape(run, kept, shape, missing)
            freed(run.device)
    every = [name for names in wanted.values() for name in names]
    made = [name for name in every if name in kept]
    print(f"time: {len(made)} of {len(every)} rows made", flush=True)
    return len(made) == len(every)


# ---- tables


def time_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a contender: milliseconds, over the products', and GiB at every shape."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        shape = Shape(row["tokens"], row["features"], row["vocab"])
        cells = table.setdefault(row["contender"], {"contender": row["contender"]})
        if row["ms"] is None:
            cells[f"{shape}: ms"] = row["note"]
            continue
        ratio = "" if row["over_products"] is None else f" ({row['over_products']:.2f})"
        cells[f"{shape}: ms"] = f"{row['ms']:.3g}{ratio}"
        cells[f"{shape}: GiB"] = "–" if row["mib"] is None else f"{row['mib'] / 1024:.2f}"
    ordered = sorted(table, key=lambda name: list(CONTENDERS).index(name) if name in CONTENDERS else len(CONTENDERS))
    return pd.DataFrame([table[name] for name in ordered]).fillna("–")


def write_tables(folder: Path) -> None:
    """CSV files of the rows that have the origin of the last one, and table.csv."""
    for stage in STAGES:
        rows = read_rows(folder / f"{stage}.jsonl")
        rows = list({row["name"]: row for row in rows if row["origin"] == rows[-1]["origin"]}.values())
        if rows:
            write(folder / f"{stage}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
        if rows and stage == "time":
            table = time_table(rows)
            write(folder / "table.csv", table.to_csv(index=False))
            print(table.to_string(index=False), flush=True)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_origin(run: "Run") -> None:
    """provenance.json, as docs/build.py reads it."""
    found = provenance(shlex.join(["python", *sys.argv]), torch.get_num_threads(), quick=run.quick, origin=run.origin)
    found["machine"] = machine_name(run.device)
    found["versions"]["triton"] = metadata.version("triton")
    if run.device.type == "cuda":
        found["versions"] |= {"CUDA": torch.version.cuda} if torch.version.hip is None else {"HIP": torch.version.hip}
    write(run.out / "provenance.json", json.dumps(found, indent=2) + "\n")


# ---- the command


class Run:
    """What the arguments say, and what became of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out, self.device, self.quick = given.out, torch.device(given.device), given.quick
        self.clock = Clock(given.seconds)
        self.slice = tuple(map(int, given.slice.split("/")))
        self.workers = given.workers or (1 if self.device.type == "cpu" else max(1, min(8, cores() // 2)))
        self.origin, self.failed = origin_of(self.device, self.quick), False

    def kept(self, stage: str) -> Kept:
        return Kept(self.out, stage, self.origin, self.clock)


def missing(device: str) -> str:
    """What the script lacks here; empty if it can run."""
    if tile_triton._missing():
        return tile_triton._missing()
    if torch.device(device).type == "cpu":
        return "" if tile_triton.interpreted() else "on a CPU it needs TRITON_INTERPRET=1, and --quick to end today"
    small = "or, to try it small: TRITON_INTERPRET=1 and --device cpu --quick"
    return "" if torch.cuda.is_available() else f"it needs a GPU that torch sees ({small})"


def main() -> int:
    """Runs the stages; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "all"], nargs="?", default="all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="after which it stops, to go on in the next run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, help="processes of `check`; None: half the cores, at most 8")
    parser.add_argument("--slice", default="0/1", help="I/N: of the cases of `check` every Nth from I on")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a few cases")
    parser.add_argument("--table", action="store_true", help="write the tables of the rows that are kept, and end")
    given = parser.parse_args()
    if given.table:
        write_tables(given.out)
        return 0
    lacking = missing(given.device)
    if lacking:
        print(f"benchmarks/gpu.py: {lacking}", file=sys.stderr)
        return UNABLE
    given.out.mkdir(parents=True, exist_ok=True)
    run = Run(given)
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    alone = run.slice == (0, 1)
    if alone:
        write_origin(run)
    whole = True
    for stage in STAGES if given.stage == "all" else (given.stage,):
        if run.clock.over():
            whole = False
            break
        try:
            whole &= {"check": check, "sweep": sweep, "time": measure}[stage](run)
        except DeviceError as error:
            print(f"{stage}: the device failed and this process is lost to it: {error}", file=sys.stderr)
            whole = False
            break
        finally:
            if alone:
                write_tables(run.out)
    if not whole:
        print("stopped before the end; the same command goes on", flush=True)
    return WRONG if run.failed else 0 if whole else STOPPED


if __name__ == "__main__":
    sys.exit(main())

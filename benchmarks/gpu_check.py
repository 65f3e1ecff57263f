"""The cases of `benchmarks/gpu.py check`: calls of the loss, and how near their answers are to float64."""

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import uncork
from uncork import PLIF, Compose, LogitFunction, Scale, Softcap
from uncork.functional import at_least_float32, mixture_log_softmax
from uncork.logit_functions.base import examples
from uncork.loss.call import build_call
from uncork.loss.implementations import IMPLEMENTATIONS

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
            Case("plif", "bfloat16", 200),  # rows with counters of their own
            Case("compose", "float16", 20, options=("masked", "tokens", "z")),
            Case("none", "float32", 20, mixture=True, probabilities=True, options=("smoothing", "classes")),
            Case("plif", "float32", 20, statistics=True),
            Case("monotone-tanh", "float32", 20),
            Case("plif", "float32", 1),
        ]
    both = (False, True)
    made = [Case(f, dtype, 2049, mixture) for mixture, f, dtype in product(both, FUNCTIONS, DTYPES)]
    made += [Case(f, "float32", v) for f, v in product(FUNCTIONS, (33278, 1, 7))]
    made += [Case("plif-1000", dtype, 33278, mixture) for dtype, mixture in product(DTYPES, both)]
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

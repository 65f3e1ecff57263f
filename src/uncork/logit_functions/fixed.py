"""Functions with a closed form: identity, scale, softcaps, sigmoids."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uncork import functional
from uncork.arguments import finite, positive, switch
from uncork.logit_functions.base import LogitFunction, checked_scores, constants, start_at_zero, table_dtype
from uncork.logit_functions.operations import Affine, Operation, Sigmoid, Softplus, Tanh

__all__ = [
    "AsymmetricSoftcap",
    "GeneralizedSigsoftmax",
    "Identity",
    "Scale",
    "ScaledSigmoid",
    "Sigsoftmax",
    "Softcap",
]


class Identity(LogitFunction):
    """f(z) = z: the plain softmax, as a function.

    >>> Identity()(torch.tensor([1.5]))
    tensor([1.5000])
    """

    examples: ClassVar = {"identity": {}}
    nonlinear = False

    def forward(self, scores: Tensor) -> Tensor:
        """The scores themselves, half precision too."""
        checked_scores(scores)
        return scores

    def transform(self, scores: Tensor) -> Tensor:
        return scores

    def _inverse(self, logits: Tensor) -> Tensor:
        return logits

    def operations(self) -> tuple[Operation, ...]:
        return ()

    def options(self) -> dict[str, Any]:
        return {}


class Scale(LogitFunction):
    """f(z) = s z, s = factor * exp(log_gain): a logit scale, or a temperature 1 / s.

    Equivalent code: ``factor * scores``. Linear: the rank of the log-probabilities stays at most d + 1.

    Args:
        factor: s > 0 at the start. learnable: whether log_gain (a scalar parameter, 0 at the start) is trained.

    >>> Scale(0.5)(torch.tensor([3.0]))
    tensor([1.5000])

    Guo et al. 2017, arXiv 1706.04599.
    """

    examples: ClassVar = {"scale": {"factor": 0.7, "learnable": True}}
    nonlinear = False

    def __init__(self, factor: float = 1.0, *, learnable: bool = False) -> None:
        super().__init__()
        self.factor, self.learnable = positive("factor", factor), switch("learnable", learnable)
        self.log_gain = nn.Parameter(torch.empty(())) if self.learnable else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets what is trained to its start, 0."""
        start_at_zero(self)

    def _slope(self, dtype: torch.dtype) -> Tensor | float:
        return self.factor if self.log_gain is None else self.factor * self.log_gain.to(dtype).exp()

    def _inverse(self, logits: Tensor) -> Tensor:
        return logits / self._slope(logits.dtype)

    def operations(self) -> tuple[Operation, ...]:
        return (Affine(),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        slope = self._slope(dtype)
        if not isinstance(slope, Tensor):
            return (constants(dtype, device, slope, 0.0),)
        return (torch.stack([slope, torch.zeros_like(slope)]),)

    def options(self) -> dict[str, Any]:
        return {"factor": self.factor, "learnable": self.learnable}


class Softcap(LogitFunction):
    """f(z) = c tanh(z / c): the logits stay within (-c, c). Its image is bounded.

    Equivalent code: ``cap * torch.tanh(scores / cap)``, with a gradient that survives saturation.

    Args:
        cap: c > 0, in logits.

    >>> Softcap(30.0)(torch.tensor([-100.0, 10.0]))
    tensor([-29.9237,   9.6454])

    Bello et al. 2017, arXiv 1611.09940; Gemma 2 (c = 30), arXiv 2408.00118.
    """

    examples: ClassVar = {"softcap": {"cap": 3.0}}
    unbounded = False

    def __init__(self, cap: float = 30.0) -> None:
        super().__init__()
        self.cap = positive("cap", cap)

    def transform(self, scores: Tensor) -> Tensor:
        return functional.softcap(scores, self.cap)

    def _inverse(self, logits: Tensor) -> Tensor:
        return self.cap * torch.atanh(logits / self.cap)

    def operations(self) -> tuple[Operation, ...]:
        return (Tanh(symmetric=True),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return (constants(dtype, device, self.cap, self.cap),)

    def options(self) -> dict[str, Any]:
        return {"cap": self.cap}


class AsymmetricSoftcap(LogitFunction):
    """f(z) = c tanh(z / c) with one cap below 0 and one above, learnable on request. Its image is (-lower, upper).

    Args:
        lower, upper: positive caps at the start, in logits.
        learnable: whether their logarithms are trained (`log_gain`, two numbers, 0 at the start). Large
            caps start near the identity.

    >>> AsymmetricSoftcap(5.0, 50.0)(torch.tensor([-100.0, 100.0]))
    tensor([-5.0000, 48.2014])
    """

    examples: ClassVar = {"asymmetric-softcap": {"lower": 4.0, "upper": 8.0, "learnable": True}}
    unbounded = False

    def __init__(self, lower: float = 30.0, upper: float = 30.0, *, learnable: bool = False) -> None:
        super().__init__()
        self.lower, self.upper = positive("lower", lower), positive("upper", upper)
        self.learnable = switch("learnable", learnable)
        self.log_gain = nn.Parameter(torch.empty(2)) if self.learnable else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets what is trained to its start, 0."""
        start_at_zero(self)

    def _inverse(self, logits: Tensor) -> Tensor:
        lower, upper = self.tables(logits.dtype, logits.device)[0]
        cap = torch.where(logits > 0, upper, lower)
        return cap * torch.atanh(logits / cap)

    def operations(self) -> tuple[Operation, ...]:
        return (Tanh(),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        if self.log_gain is None:
            return (constants(dtype, device, self.lower, self.upper),)
        return (constants(dtype, self.log_gain.device, self.lower, self.upper) * self.log_gain.to(dtype).exp(),)

    def options(self) -> dict[str, Any]:
        return {"lower": self.lower, "upper": self.upper, "learnable": self.learnable}


class ScaledSigmoid(LogitFunction):
    """f(z) = a sigmoid((z + b) / c): the logits stay within (0, a). Its image is bounded.

    Args:
        height: a > 0. shift: b. width: c > 0; all in logits. The default is modded-nanogpt's hand-tuned one.

    >>> ScaledSigmoid()(torch.tensor([-5.0, 10.0]))
    tensor([11.5000, 20.2583])
    """

    examples: ClassVar = {"scaled-sigmoid": {"height": 7.0, "shift": 1.0, "width": 2.0}}
    unbounded = False

    def __init__(self, height: float = 23.0, shift: float = 5.0, width: float = 7.5) -> None:
        super().__init__()
        self.height, self.width = positive("height", height), positive("width", width)
        self.shift = finite("shift", shift)

    def transform(self, scores: Tensor) -> Tensor:
        return functional.scaled_sigmoid(scores, self.height, self.shift, self.width)

    def _inverse(self, logits: Tensor) -> Tensor:
        return self.width * torch.logit(logits / self.height) - self.shift

    def operations(self) -> tuple[Operation, ...]:
        return (Sigmoid(),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return (constants(dtype, device, self.height, self.shift, self.width),)

    def options(self) -> dict[str, Any]:
        return {"height": self.height, "shift": self.shift, "width": self.width}


class GeneralizedSigsoftmax(LogitFunction):
    """f(z) = z + (k - 1) log sigmoid(z - c): slope k at -inf, 1 at +inf.

    Concave for k > 1, convex for k < 1. Learnable, it is the smallest function that can bend either way: it starts as
    the identity, and k = steepness * exp(log_gain), c = center + shift.

    Equivalent code: ``k * (z - c) + c - (k - 1) * F.softplus(z - c)``, which is nan at z = inf.

    Args:
        center: c, any finite number; None is -1.5, or 0 where learnable.
        steepness: k > 0; k = 1 is the softmax, (0, 2) sigsoftmax; None is 2.5, or 1 where learnable.
        learnable: whether `log_gain` and `shift` (scalar parameters, 0 at the start) are trained.

    >>> GeneralizedSigsoftmax(-1.5, 2.5)(torch.tensor([-2.0, 0.0]))
    tensor([-3.4611, -0.3021])
    >>> GeneralizedSigsoftmax(learnable=True)(torch.tensor([-2.0, 0.0])).detach()
    tensor([-2.,  0.])

    Parthiban, Mao, Inkpen, AAAI 2021 (the default is theirs for Penn Treebank; they do not learn it).
    """

    examples: ClassVar = {
        "gss": {"center": -0.5, "steepness": 2.5},
        "gss-start": {"learnable": True},
        "gss-learned": {"center": 0.5, "steepness": 0.6, "learnable": True},
    }

    def __init__(self, center: float | None = None, steepness: float | None = None, *, learnable: bool = False) -> None:
        super().__init__()
        self.learnable = switch("learnable", learnable)
        start = (0.0, 1.0) if self.learnable else (-1.5, 2.5)
        self.center = start[0] if center is None else finite("center", center)
        self.steepness = start[1] if steepness is None else positive("steepness", steepness)
        self.log_gain = nn.Parameter(torch.empty(())) if self.learnable else None
        self.shift = nn.Parameter(torch.empty(())) if self.learnable else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets what is trained to its start, 0."""
        start_at_zero(self)

    @property
    def nonlinear(self) -> bool:  # type: ignore[override]
        """Whether k differs from 1, or may do so after training."""
        return self.learnable or self.steepness != 1

    def transform(self, scores: Tensor) -> Tensor:
        if self.learnable:
            return super().transform(scores)
        return functional.generalized_sigsoftmax(scores, self.center, self.steepness)

    def operations(self) -> tuple[Operation, ...]:
        return (Softplus(),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        if self.log_gain is None or self.shift is None:
            return (constants(dtype, device, self.center, self.steepness - 1),)
        wide = table_dtype(self.shift.device)
        weight = self.steepness * self.log_gain.to(wide).exp() - 1
        return (torch.stack([self.center + self.shift.to(wide), weight]).to(dtype),)

    def options(self) -> dict[str, Any]:
        return {"center": self.center, "steepness": self.steepness, "learnable": self.learnable}


class Sigsoftmax(LogitFunction):
    """f(z) = z + log sigmoid(z): softmax(f(z)) is proportional to exp(z) sigmoid(z). No parameters; concave.

    Equivalent code: ``scores + F.logsigmoid(scores)``.

    >>> Sigsoftmax()(torch.tensor([-2.0, 0.0, 100.0]))
    tensor([ -4.1269,  -0.6931, 100.0000])

    Kanai et al. 2018, arXiv 1805.10829.
    """

    examples: ClassVar = {"sigsoftmax": {}}

    def transform(self, scores: Tensor) -> Tensor:
        return functional.sigsoftmax(scores)

    def _inverse(self, logits: Tensor) -> Tensor:
        y = logits
        # exp(y) = u^2 / (1 + u), u = exp(z): the positive root, in the form that does not overflow on either side.
        positive_side = y + torch.log((1 + torch.sqrt(1 + 4 * torch.exp(-y.clamp(min=0)))) / 2)
        negative_side = y / 2 + torch.log((torch.exp(y.clamp(max=0) / 2) + torch.sqrt(y.clamp(max=0).exp() + 4)) / 2)
        return torch.where(y > 0, positive_side, negative_side)

    def operations(self) -> tuple[Operation, ...]:
        return (Softplus(),)

    def tables(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Tensor, ...]:
        return (constants(dtype, device, 0.0, 1.0),)

    def options(self) -> dict[str, Any]:
        return {}

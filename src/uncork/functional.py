"""The equations in plain torch: the definition that everything else is tested against.

Every function here works elementwise on scores of any shape, keeps float32 and float64, and computes half precision
in float32 (an increasing function evaluated in bfloat16 is not increasing). Legend for shapes: N tokens, V vocabulary,
K components, P pieces, U units.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "asymmetric_softcap",
    "generalized_sigsoftmax",
    "identity",
    "mixture_log_softmax",
    "monotone_relu",
    "monotone_tanh",
    "piecewise_linear",
    "scale",
    "scaled_sigmoid",
    "sigsoftmax",
    "softcap",
]


def at_least_float32(x: Tensor) -> Tensor:
    """Casts half precision to float32 and leaves float32 and float64 alone."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tanh(x: Tensor) -> Tensor:
    """tanh whose gradient does not vanish before the mathematics does: 1 - tanh^2 is 0 in float32 from |x| = 9 on.

    Its values are torch's, to the bit. For |x| > 1 the derivative is that of sign(x) (1 - 2 sigmoid(-2|x|)), which
    autograd forms without cancellation.
    """
    value = torch.tanh(x)
    away = x.sign() * (1 - 2 * torch.sigmoid(-2 * x.abs()))
    # Two numbers this close differ by a float, so adding the difference gives the value itself.
    return torch.where(x.abs() > 1, away + (value - away).detach(), value)


def sech2(x: Tensor) -> Tensor:
    """The derivative of tanh, 1 / cosh(x)^2 = 4 s (1 - s) with s = sigmoid(-2|x|), without cancellation."""
    s = torch.sigmoid(-2 * x.abs())
    return 4 * s * (1 - s)


def exporting() -> bool:
    """Whether torch.export traces (in torch 2.6, which does not tell them apart, or torch.compile)."""
    asked: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return asked()


def log_sigmoid(x: Tensor) -> Tensor:
    """log sigmoid(x): F.logsigmoid, which to ONNX is the log of a sigmoid, without digits where x is far below 0."""
    # From 40 on softplus(x) is x to the last bit of float64.
    return -F.softplus(-x, threshold=40.0) if exporting() else F.logsigmoid(x)


def identity(scores: Tensor) -> Tensor:
    """f(z) = z, the plain softmax.

    >>> identity(torch.tensor([-1.0, 2.0]))
    tensor([-1.,  2.])
    """
    return scores


def scale(scores: Tensor, factor: Tensor | float) -> Tensor:
    """f(z) = s z: a logit scale s, or a temperature 1 / s.

    Args:
        scores: any shape, floating.
        factor: s > 0.

    >>> scale(torch.tensor([-1.0, 2.0]), 0.5)
    tensor([-0.5000,  1.0000])

    Bounded image: no. Breaks the bottleneck: no (it is linear). Guo et al. 2017, arXiv 1706.04599.
    """
    return at_least_float32(scores) * factor


def softcap(scores: Tensor, cap: Tensor | float) -> Tensor:
    """f(z) = c tanh(z / c): the logits stay within (-c, c).

    Equivalent code: ``cap * torch.tanh(scores / cap)``, with a gradient that survives saturation.

    Args:
        scores: any shape, floating.
        cap: c > 0, in logits.

    >>> softcap(torch.tensor([-100.0, 0.0, 10.0]), 30.0)
    tensor([-29.9237,   0.0000,   9.6454])

    Its image is bounded: with V words no probability exceeds 1 / (1 + (V - 1) exp(-2c)).
    Bello et al. 2017, arXiv 1611.09940; Gemma 2, arXiv 2408.00118.
    """
    return cap * tanh(at_least_float32(scores) / cap)


def asymmetric_softcap(scores: Tensor, lower: Tensor | float, upper: Tensor | float) -> Tensor:
    """f(z) = c tanh(z / c) with c = upper for z > 0 and c = lower for z <= 0.

    Equivalent code: ``torch.where(z > 0, softcap(z, upper), softcap(z, lower))``. The slope at 0 is 1 on both sides.

    Args:
        scores: any shape, floating.
        lower, upper: positive caps, in logits; the image is (-lower, upper).

    >>> asymmetric_softcap(torch.tensor([-100.0, 100.0]), lower=5.0, upper=50.0)
    tensor([-5.0000, 48.2014])
    """
    z = at_least_float32(scores)
    return torch.where(z > 0, softcap(z, upper), softcap(z, lower))


def scaled_sigmoid(scores: Tensor, height: float, shift: float, width: float) -> Tensor:
    """f(z) = a sigmoid((z + b) / c): the logits stay within (0, a).

    Args:
        scores: any shape, floating.
        height: a > 0. shift: b. width: c > 0; all in logits.

    >>> scaled_sigmoid(torch.tensor([-5.0, 10.0]), 23.0, 5.0, 7.5)
    tensor([11.5000, 20.2583])

    The hand-tuned form (23, 5, 7.5) is used in modded-nanogpt. Its image is bounded.
    """
    u = (at_least_float32(scores) + shift) / width
    return height * torch.where(u > 0, 1 - torch.sigmoid(-u), torch.sigmoid(u))


def sigsoftmax(scores: Tensor) -> Tensor:
    """f(z) = z + log sigmoid(z), so that softmax(f(z)) is proportional to exp(z) sigmoid(z).

    Equivalent code: ``scores + F.logsigmoid(scores)``. Never shift z by its maximum first: sigmoid is not
    invariant to shifts.

    >>> sigsoftmax(torch.tensor([-2.0, 0.0, 100.0]))
    tensor([ -4.1269,  -0.6931, 100.0000])

    Slopes run from 2 (z to -inf) to 1 (z to +inf): concave. Kanai et al. 2018, arXiv 1805.10829.
    """
    z = at_least_float32(scores)
    return z + log_sigmoid(z)


def generalized_sigsoftmax(scores: Tensor, center: float, steepness: float) -> Tensor:
    """f(z) = k (z - c) + c - (k - 1) softplus(z - c) = z + (k - 1) log sigmoid(z - c).

    The second form is computed: the first is inf - inf at z = inf.

    Args:
        scores: any shape, floating.
        center: c. steepness: k > 0, the slope at -inf (the slope at +inf is 1).
            k = 1 is softmax, (c, k) = (0, 2) sigsoftmax.

    >>> generalized_sigsoftmax(torch.tensor([-2.0, 0.0, 100.0]), -1.5, 2.5)
    tensor([ -3.4611,  -0.3021, 100.0000])

    Parthiban, Mao, Inkpen, AAAI 2021: (-1.5, 2.5) for Penn Treebank, (-1.5, 3) for WikiText-2.
    """
    z = at_least_float32(scores)
    return z + (steepness - 1) * log_sigmoid(z - center)


def piecewise_linear(scores: Tensor, knots: Tensor, values: Tensor, slopes: Tensor, index: Tensor) -> Tensor:
    """f(z) = z + values[i] + slopes[i] (z - knots[i]), with i the piece that z lies in.

    The residual form: all-zero tables are the identity to the bit.

    Args:
        scores: any shape. knots, values, slopes: (P,). index: int64, the shape of scores, in [0, P).

    >>> z, k = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([-1.0, 0.0, 1.0])
    >>> i = torch.bucketize(z, k[1:], right=True)
    >>> piecewise_linear(z, k, torch.tensor([0.0, 0.0, -0.5]), torch.tensor([0.0, -0.5, 1.0]), i)
    tensor([-2.0000,  0.2500,  4.5000])
    """
    z = at_least_float32(scores)
    return z + (values[index] + slopes[index] * (z - knots[index]))


def monotone_relu(scores: Tensor, thresholds: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """f(z) = sum_u right_u relu(z - t_u) - left_u relu(t_u - z): a positive one-hidden-layer network, written plainly.

    Each unit bends at its threshold: convex there if right_u > left_u, else concave. Needs a (..., U) tensor;
    `MonotoneNetwork` computes the same function by one bisection.

    Args:
        scores: any shape. thresholds: (U,). right, left: (U,), positive weights.

    >>> monotone_relu(torch.tensor([-1.0, 2.0]), torch.tensor([0.0]), torch.tensor([3.0]), torch.tensor([0.5]))
    tensor([-0.5000,  6.0000])

    Daniels & Velikova 2010 (positive weights, universality); Ganea et al. 2019, arXiv 1902.08077.
    """
    distance = at_least_float32(scores).unsqueeze(-1) - thresholds
    return (right * distance.clamp(min=0) + left * distance.clamp(max=0)).sum(-1)


def monotone_tanh(scores: Tensor, thresholds: Tensor, weights: Tensor, rates: Tensor) -> Tensor:
    """g(z) = sum_u w_u tanh(r_u (z - t_u)): the literature's hidden layer of saturating units, written plainly.

    Its image is bounded, so a linear term has to stand beside it (`MonotoneNetwork` adds one).

    Args:
        scores: any shape. thresholds, weights, rates: (U,), weights and rates positive.

    >>> monotone_tanh(torch.tensor([0.0, 1.0]), torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([1.0]))
    tensor([0.0000, 1.5232])
    """
    z = at_least_float32(scores).unsqueeze(-1)
    return (weights * tanh(rates * (z - thresholds))).sum(-1)


def mixture_log_softmax(logits: Tensor, prior_logits: Tensor) -> Tensor:
    """log sum_k pi_k softmax(l_k), the log-probabilities of a mixture of softmaxes, in log space throughout.

    Equivalent code: ``(prior_logits.softmax(-1).unsqueeze(-1) * logits.softmax(-1)).sum(-2).log()``, which is -inf
    where a probability underflows.

    Args:
        logits: (..., K, V). prior_logits: (..., K).

    >>> mixture_log_softmax(torch.tensor([[0.0, 0.0], [0.0, 200.0]]), torch.tensor([0.0, 0.0]))
    tensor([-1.3863, -0.2877])

    Yang et al. 2018, arXiv 1711.03953.
    """
    log_prior = at_least_float32(prior_logits).log_softmax(-1).unsqueeze(-1)
    joint = log_prior + at_least_float32(logits).log_softmax(-1)
    # A word that no component allows: its logsumexp would have the gradient 0 / 0.
    impossible = (logits == -torch.inf).all(-2)
    mixed = torch.logsumexp(joint.masked_fill(impossible.unsqueeze(-2), 0), dim=-2)
    return mixed.masked_fill(impossible, -torch.inf)

"""The output layers: one softmax, a mixture of softmaxes, a mixture of contexts.

`head(input)` gives softmax-ready logits, so F.cross_entropy, sampling and metrics work unchanged; `head.loss` is the
same cross-entropy without the (N, V) matrix. Legend for shapes: N tokens, D features, V vocabulary, K components.
"""

from abc import abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork.arguments import positive_int
from uncork.functional import mixture_log_softmax
from uncork.heads.base import OF_LOSSES, Head, Projection
from uncork.heads.hooks import check_plain
from uncork.loss import (
    TokenStatistics,
    linear_cross_entropy,
    mixture_cross_entropy,
    mixture_token_statistics,
    token_statistics,
)
from uncork.loss.call import Call, build_call
from uncork.loss.exclusion import Exclusion, best, take


class _OneSoftmax(Head):
    """Shared by the heads with one softmax, over the scores of one context vector."""

    @abstractmethod
    def context(self, input: Tensor) -> Tensor:
        """What is projected onto the words: (..., projected features)."""

    def _logits(self, input: Tensor, projection: Projection) -> Tensor:
        return self._apply_function(self._scores(input, projection))

    def _scores(self, input: Tensor, projection: Projection) -> Tensor:
        return F.linear(self.context(input), *projection)

    def _loss(self, input: Tensor, projection: Projection, *, target: Tensor, options: dict[str, Any]) -> Tensor:
        weight, operands = projection.weight, self._operands(projection)
        return linear_cross_entropy(self.context(input), weight, target, **operands, **options)

    def _statistics(
        self, input: Tensor, projection: Projection, *, target: Tensor | None, options: dict[str, Any]
    ) -> TokenStatistics:
        weight, operands = projection.weight, self._operands(projection)
        return token_statistics(self.context(input), weight, target, **operands, **options)

    def _fused(self, input: Tensor, projection: Projection) -> Call:
        weight, operands = projection.weight, self._operands(projection)
        return build_call(self.context(input), weight, None, **operands)[0]

    def _ranked(self, rows: Tensor, projection: Projection) -> Tensor:
        return self._scores(rows, projection)

    def _topk_rows(
        self, rows: Tensor, projection: Projection, k: int, exclusion: Exclusion | None, span: slice
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(rows, projection)
        ids = best(scores, k, exclusion, span)
        logits = self._apply_function(scores)
        wide = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.logsumexp(logits.to(wide), -1, keepdim=True)
        return self._apply_function(take(scores, ids)).to(wide) - normaliser, ids


class LinearHead(_OneSoftmax):
    """softmax(f(W h + b)): softmax, temperature, softcap, sigsoftmax, PLIF ..., depending on the function f.

    Equivalent code: ``logits = logit_function(F.linear(input, weight, bias).float())``.

    Args:
        in_features: D. vocab_size: V. bias: whether there is one.
        logit_function: a LogitFunction or any increasing elementwise module; None is the plain softmax.

    >>> from uncork import PLIF
    >>> head = LinearHead(16, 1000, logit_function=PLIF())
    >>> input, target = torch.randn(4, 7, 16), torch.randint(1000, (4, 7))
    >>> head(input).shape, head.loss(input, target).shape
    (torch.Size([4, 7, 1000]), torch.Size([]))

    Without f the rank of the log-probabilities is at most D + 1 (D + 2 with a bias). Ganea et al. 2019.
    """

    family = "LinearHead"

    def __init__(
        self, in_features: int, vocab_size: int, *, bias: bool = True, logit_function: nn.Module | None = None
    ) -> None:
        super().__init__(in_features, vocab_size, positive_int("in_features", in_features), bias, logit_function)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, logit_function: nn.Module | None = None) -> Self:
        """The head with the parameters of an nn.Linear (the same objects: tied weights stay tied).

        Args:
            linear: an nn.Linear itself, whose output is W h + b and nothing else. logit_function: as above.

        Raises:
            TypeError: a subclass (an adapter, a quantised layer) or a weight of another kind.
            ValueError: hooks, pruning, parametrisations. The message names what was found and says what to do.
        """
        check_plain(linear)
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, logit_function=logit_function)
        head._adopt(linear)
        return head

    def context(self, input: Tensor) -> Tensor:
        """The input itself."""
        return input

    def options(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "vocab_size": self.vocab_size, "bias": self.bias is not None}


class _LatentHead(Head):
    """Shared by the two mixtures: K latents h_k = act(W_k g + b_k) and a prior softmax(W_pi g)."""

    num_components: int
    latent_features: int
    latent: nn.Linear
    prior: nn.Linear

    def __init__(
        self,
        in_features: int,
        vocab_size: int,
        *,
        num_components: int,
        latent_features: int | None = None,
        latent_activation: str | None = "tanh",
        logit_function: nn.Module | None = None,
        bias: bool = True,
    ) -> None:
        in_features = positive_int("in_features", in_features)
        width = in_features if latent_features is None else positive_int("latent_features", latent_features)
        super().__init__(in_features, vocab_size, width, bias, logit_function)
        self.num_components = positive_int("num_components", num_components)
        if latent_activation not in ("tanh", None):
            raise ValueError(f'latent_activation: expected "tanh" or None, got {latent_activation!r}')
        self.latent_features, self.latent_activation = width, latent_activation
        self.latent = nn.Linear(in_features, self.num_components * width)
        self.prior = nn.Linear(in_features, self.num_components, bias=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, num_components: int, **options: Any) -> Self:
        """The mixture over the parameters of an nn.Linear (the same objects: tied weights stay tied).

        Its latents and prior start at random, so its logits are not the layer's.

        Args:
            linear: as in `LinearHead.from_linear`, with the same errors. num_components: K.
            options: latent_activation and logit_function of the class.
        """
        check_plain(linear)
        for name in ("latent_features", "bias"):
            if name in options:
                raise TypeError(f"{name}: given by the linear layer; build a {cls.__name__} to choose it")
        head = cls(
            linear.in_features,
            linear.out_features,
            num_components=num_components,
            latent_features=linear.in_features,
            bias=linear.bias is not None,
            **options,
        )
        head._adopt(linear)
        return head

    def latents(self, input: Tensor) -> Tensor:
        """h_k: (..., K, latent_features)."""
        latent = self.latent(input).unflatten(-1, (self.num_components, self.latent_features))
        return latent.tanh() if self.latent_activation == "tanh" else latent

    def options(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "vocab_size": self.vocab_size,
            "num_components": self.num_components,
            "latent_features": self.latent_features,
            "latent_activation": self.latent_activation,
            "bias": self.bias is not None,
        }


class MixtureHead(_LatentHead):
    """sum_k pi_k softmax(f(W h_k + b)): mixture of softmaxes (MoS), of sigsoftmax, of PLIF ..., depending on f.

    h_k = tanh(W_k g + b_k), pi = softmax(W_pi g). Equivalent code::

        latent = torch.tanh(head.latent(input)).unflatten(-1, (K, latent_features))
        log_prob = torch.logsumexp(head.prior(input).log_softmax(-1)[..., None]
                                   + logit_function(F.linear(latent, weight, bias)).log_softmax(-1), dim=-2)

    Choose for D the width of the body, and for `latent_features` that of the softmax it replaces: with latents made
    from the softmax's few features its perplexity was above the softmax's, from wider ones below it (docs/study.md).

    Args:
        in_features: D of the input. vocab_size: V. num_components: K.
        latent_features: features of each h_k; None is D. latent_activation: "tanh" or None.
        logit_function: one function for all components. bias: of the projection.

    >>> head = MixtureHead(16, 1000, num_components=3)
    >>> input, target = torch.randn(4, 16), torch.randint(1000, (4,))
    >>> torch.allclose(head.loss(input, target), F.cross_entropy(head(input), target), atol=1e-5)
    True

    Yang et al. 2018, arXiv 1711.03953; of sigsoftmax: Kanai et al. 2018, arXiv 1805.10829.
    """

    family = "MixtureHead"
    _loss_options = OF_LOSSES

    def _logits(self, input: Tensor, projection: Projection) -> Tensor:
        return mixture_log_softmax(self._apply_function(self._scores(input, projection)), self.prior(input))

    def _scores(self, input: Tensor, projection: Projection) -> Tensor:
        return F.linear(self.latents(input), *projection)

    def _log_prob(self, input: Tensor, projection: Projection) -> Tensor:
        return self._logits(input, projection)

    def _fused(self, input: Tensor, projection: Projection) -> Call:
        weight, operands = projection.weight, self._operands(projection)
        return build_call(self.latents(input), weight, None, prior_logits=self.prior(input), **operands)[0]

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """F.cross_entropy(head(input).flatten(0, -2), target.flatten(), ...), fused.

        Args:
            input: (..., D). target: (...) indices or (..., V) probabilities.
            options: keyword arguments of `uncork.mixture_cross_entropy`: weight, token_weight, reduction, ignore_index,
                label_smoothing, impl, chunk_size, memory_budget, scores_dtype.

        Raises:
            TypeError: for z_loss, and as every head.
        """
        if "z_loss" in options:
            raise TypeError(
                "z_loss: a mixture has none, since its logits are log-probabilities, whose logsumexp is 0; leave it out"
            )
        return super().loss(input, target, **options)

    def _loss(self, input: Tensor, projection: Projection, *, target: Tensor, options: dict[str, Any]) -> Tensor:
        weight, operands = projection.weight, self._operands(projection)
        return mixture_cross_entropy(self.latents(input), weight, self.prior(input), target, **operands, **options)

    def _statistics(
        self, input: Tensor, projection: Projection, *, target: Tensor | None, options: dict[str, Any]
    ) -> TokenStatistics:
        weight, operands = projection.weight, self._operands(projection)
        return mixture_token_statistics(self.latents(input), weight, self.prior(input), target, **operands, **options)


class ContextMixtureHead(_LatentHead, _OneSoftmax):
    """softmax(f(W sum_k pi_k h_k + b)): mixture of contexts (MoC), the control that mixes before one softmax.

    As expensive in parameters as a `MixtureHead`, and no better than a LinearHead in rank: at most
    latent_features + 1 (+ 2 with a bias) without f. Arguments as in `MixtureHead`.

    >>> head = ContextMixtureHead(16, 1000, num_components=3)
    >>> head(torch.randn(4, 16)).shape
    torch.Size([4, 1000])

    Yang et al. 2018, arXiv 1711.03953.
    """

    family = "ContextMixtureHead"

    def context(self, input: Tensor) -> Tensor:
        """sum_k pi_k h_k: (..., latent_features)."""
        prior = self.prior(input).softmax(-1)
        return (prior.unsqueeze(-1) * self.latents(input)).sum(-2)

"""Output layers: drop-in for the nn.Linear before a softmax, each with its fused loss.

`head(input)` gives softmax-ready logits, so F.cross_entropy, sampling and metrics work unchanged; `head.loss` is the
same cross-entropy without the (N, V) matrix. Legend for shapes: N tokens, D features, V vocabulary, K components.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uncork.functional import mixture_log_softmax
from uncork.logit_functions import Identity, LogitFunction
from uncork.logit_functions.base import positive_int
from uncork.loss import (
    TokenStatistics,
    implementation,
    inference,
    linear_cross_entropy,
    mixture_cross_entropy,
    mixture_token_statistics,
    token_statistics,
)
from uncork.loss.call import Call, build_call, check_function
from uncork.loss.chunked import default_chunk_size
from uncork.loss.reference import apply_function


def _logits(function: nn.Module | None, scores: Tensor) -> Tensor:
    """f(scores); the identity costs nothing and keeps half precision."""
    return scores if function is None or isinstance(function, Identity) else apply_function(function, scores)


class Head(nn.Module, ABC):
    """What every output layer offers. The projection is `weight` (V, features) and `bias` (V,) or None, as nn.Linear's.

    Args:
        in_features: D of the input. vocab_size: V. projected: features of the projection (D, or the latent's).
        bias: whether the projection has one. logit_function: an increasing elementwise module, or None.
    """

    def __init__(
        self, in_features: int, vocab_size: int, projected: int, bias: bool, logit_function: nn.Module | None
    ) -> None:
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.vocab_size = positive_int("vocab_size", vocab_size)
        check_function(logit_function)
        self.weight = nn.Parameter(torch.empty(self.vocab_size, projected))
        self.bias: nn.Parameter | None = nn.Parameter(torch.empty(self.vocab_size)) if bias else None
        self.logit_function = logit_function
        reach = 1 / math.sqrt(projected)  # nn.Linear's start
        nn.init.uniform_(self.weight, -reach, reach)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -reach, reach)

    def _adopt(self, linear: nn.Linear) -> None:
        """Takes over the parameters of an nn.Linear themselves, so that tied weights stay tied."""
        self.weight = cast(nn.Parameter, linear.weight)
        self.bias = cast("nn.Parameter | None", linear.bias)
        self.to(linear.weight.device, linear.weight.dtype)  # the rest follows

    def _operands(self) -> dict[str, Any]:
        return {"linear_bias": self.bias, "logit_function": self.logit_function}

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Softmax-ready logits (..., V); a mixture's are log-probabilities. float32 unless f is the identity."""

    @abstractmethod
    def scores(self, input: Tensor) -> Tensor:
        """W h + b before the function: (..., V), of a mixture (..., K, V)."""

    @abstractmethod
    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        """F.cross_entropy(head(input).flatten(0, -2), target.flatten(), ...), fused.

        Args:
            input: (..., D). target: (...) indices or (..., V) probabilities.
            options: keyword arguments of `uncork.linear_cross_entropy` (of `uncork.mixture_cross_entropy`): weight,
                token_weight, reduction, ignore_index, label_smoothing, impl, chunk_size, and z_loss but for a mixture.

        Forward hooks on the head or its function do not run here, since neither is called.
        """

    @abstractmethod
    def statistics(self, input: Tensor, target: Tensor | None = None, **options: Any) -> TokenStatistics:
        """Log-probability of the target, logsumexp, entropy and argmax of each token, without the (N, V) matrix."""

    def implementation(self) -> str:
        """What computes its loss where its weights are, with `impl=None`: "torch", or "native (avx512)"."""
        return implementation(self._fused(self.weight.new_empty(0, self.in_features)))

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities (..., V), float32 or better."""
        if (call := self._inference(input)) is not None:
            return inference.log_prob(call).view(*input.shape[:-1], self.vocab_size)
        return self._log_prob(input)

    def _log_prob(self, input: Tensor) -> Tensor:
        logits = self(input)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def predict(self, input: Tensor) -> Tensor:
        """The likeliest word of each token, (...) int64, chunk by chunk; ranked as `topk` does."""
        if (call := self._inference(input)) is not None:
            return inference.argmax(call).view(input.shape[:-1])
        return torch.cat([self._ranked(rows).argmax(-1) for rows in self._chunks(input)]).view(input.shape[:-1])

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest words: (log_prob, ids), each (..., k), likeliest first.

        Chunk by chunk; where a gradient is asked, the graphs of all chunks stay until it is taken.
        Ranking uses the scores (but for mixtures), which an increasing function cannot reorder but may tie.
        """
        if not 1 <= k <= self.vocab_size:
            raise ValueError(f"k: expected a whole number in [1, {self.vocab_size}], got {k}")
        if (call := self._inference(input)) is not None:
            log_prob, ids = inference.topk(call, k)
            return log_prob.view(*input.shape[:-1], k), ids.view(*input.shape[:-1], k)
        parts = [self._topk(rows, k) for rows in self._chunks(input)]
        log_prob, ids = (torch.cat(column).view(*input.shape[:-1], k) for column in zip(*parts, strict=True))
        return log_prob, ids

    @abstractmethod
    def _fused(self, input: Tensor) -> Call:
        """What the fused loss would compute from."""

    def _inference(self, input: Tensor) -> Call | None:
        """The call, where the native tile serves it and nobody asks for a gradient, or has changed what is computed."""
        own = type(self) in (LinearHead, MixtureHead, ContextMixtureHead)
        hooks = self.logit_function is not None and (
            self.logit_function._forward_hooks or self.logit_function._forward_pre_hooks
        )
        if not own or hooks or inference.asked_for_gradients(input, *self.parameters()):
            return None
        call = self._fused(input)
        return call if inference.serves(call) else None

    def _chunks(self, input: Tensor) -> tuple[Tensor, ...]:
        rows: Tensor = input.reshape(-1, input.shape[-1])
        components = getattr(self, "num_components", 1)
        return rows.split(max(1, default_chunk_size(*self.weight.shape) // components))

    def _ranked(self, rows: Tensor) -> Tensor:
        """What orders the words as their probabilities do, (C, V)."""
        return self._log_prob(rows)

    def _topk(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        log_prob = self._log_prob(rows)
        values, ids = log_prob.topk(k, dim=-1)
        return values, ids

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The constructor's arguments but the function, as plain JSON."""

    def spec(self) -> dict[str, Any]:
        """What `head_from_spec` rebuilds the head from, as plain JSON; parameters travel in the state_dict.

        Raises:
            TypeError: if the function is no LogitFunction and so has no spec.
        """
        function = self.logit_function
        if function is not None and not isinstance(function, LogitFunction):
            raise TypeError(f"logit_function: expected a LogitFunction or None, got {type(function).__name__}")
        described = None if function is None else function.spec()
        return {"name": type(self).__name__, "options": self.options(), "logit_function": described}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options().items())


class _OneSoftmax(Head):
    """Shared by the heads with one softmax, over the scores of one context vector."""

    @abstractmethod
    def context(self, input: Tensor) -> Tensor:
        """What is projected onto the words: (..., projected features)."""

    def forward(self, input: Tensor) -> Tensor:
        return _logits(self.logit_function, self.scores(input))

    def scores(self, input: Tensor) -> Tensor:
        return F.linear(self.context(input), self.weight, self.bias)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return linear_cross_entropy(self.context(input), self.weight, target, **self._operands(), **options)

    def statistics(self, input: Tensor, target: Tensor | None = None, **options: Any) -> TokenStatistics:
        return token_statistics(self.context(input), self.weight, target, **self._operands(), **options)

    def _fused(self, input: Tensor) -> Call:
        return build_call(self.context(input), self.weight, None, **self._operands())[0]

    def _ranked(self, rows: Tensor) -> Tensor:
        return self.scores(rows)

    def _topk(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = self.scores(rows)
        best, ids = scores.topk(k, dim=-1)
        logits = _logits(self.logit_function, scores)
        wide = torch.promote_types(logits.dtype, torch.float32)
        normaliser = torch.logsumexp(logits.to(wide), -1, keepdim=True)
        return _logits(self.logit_function, best).to(wide) - normaliser, ids


class LinearHead(_OneSoftmax):
    """softmax(f(W h + b)): softmax, temperature, softcap, sigsoftmax, PLIF ... by its function.

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

    def __init__(
        self, in_features: int, vocab_size: int, *, bias: bool = True, logit_function: nn.Module | None = None
    ) -> None:
        super().__init__(in_features, vocab_size, positive_int("in_features", in_features), bias, logit_function)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, logit_function: nn.Module | None = None) -> "LinearHead":
        """The head with the parameters of an nn.Linear (the same objects: tied weights stay tied)."""
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
        width = in_features if latent_features is None else latent_features
        super().__init__(in_features, vocab_size, positive_int("latent_features", width), bias, logit_function)
        self.num_components = positive_int("num_components", num_components)
        if latent_activation not in ("tanh", None):
            raise ValueError(f'latent_activation: expected "tanh" or None, got {latent_activation!r}')
        self.latent_features, self.latent_activation = width, latent_activation
        self.latent = nn.Linear(in_features, self.num_components * width)
        self.prior = nn.Linear(in_features, self.num_components, bias=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, num_components: int, **options: Any) -> "_LatentHead":
        """The mixture over the parameters of an nn.Linear (the same objects: tied weights stay tied)."""
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
    """sum_k pi_k softmax(f(W h_k + b)): mixture of softmaxes (MoS), of sigsoftmax, of PLIF ... by its function.

    h_k = tanh(W_k g + b_k), pi = softmax(W_pi g). Equivalent code::

        latent = torch.tanh(head.latent(input)).unflatten(-1, (K, latent_features))
        log_prob = torch.logsumexp(head.prior(input).log_softmax(-1)[..., None]
                                   + logit_function(F.linear(latent, weight, bias)).log_softmax(-1), dim=-2)

    Let D be the width of the body and `latent_features` that of the softmax it replaces: made from the same few
    features it ended above the softmax, from wider ones below it (docs/study.md).

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

    def forward(self, input: Tensor) -> Tensor:
        return mixture_log_softmax(_logits(self.logit_function, self.scores(input)), self.prior(input))

    def scores(self, input: Tensor) -> Tensor:
        return F.linear(self.latents(input), self.weight, self.bias)

    def _log_prob(self, input: Tensor) -> Tensor:
        log_prob: Tensor = self(input)
        return log_prob

    def _fused(self, input: Tensor) -> Call:
        operands = self._operands() | {"prior_logits": self.prior(input)}
        return build_call(self.latents(input), self.weight, None, **operands)[0]

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return mixture_cross_entropy(
            self.latents(input),
            self.weight,
            self.prior(input),
            target,
            **self._operands(),
            **options,
        )

    def statistics(self, input: Tensor, target: Tensor | None = None, **options: Any) -> TokenStatistics:
        return mixture_token_statistics(
            self.latents(input),
            self.weight,
            self.prior(input),
            target,
            **self._operands(),
            **options,
        )


class ContextMixtureHead(_LatentHead, _OneSoftmax):
    """softmax(f(W sum_k pi_k h_k + b)): mixture of contexts (MoC), the control that mixes before one softmax.

    As expensive in parameters as a `MixtureHead`, and no better than a LinearHead in rank: at most
    latent_features + 1 (+ 2 with a bias) without f. Arguments as in `MixtureHead`.

    >>> head = ContextMixtureHead(16, 1000, num_components=3)
    >>> head(torch.randn(4, 16)).shape
    torch.Size([4, 1000])

    Yang et al. 2018, arXiv 1711.03953.
    """

    def context(self, input: Tensor) -> Tensor:
        """sum_k pi_k h_k: (..., latent_features)."""
        prior = self.prior(input).softmax(-1)
        return (prior.unsqueeze(-1) * self.latents(input)).sum(-2)

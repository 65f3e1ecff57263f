"""Fused linear -> logit function -> cross-entropy, with exact gradients for everything, the function's own included.

| impl | what it is | needs |
|---|---|---|
| "reference" | keeps the (N, V) logits, leaves gradients to autograd: the definition | any device |
| "torch" | walks over chunks of tokens, the memory of a few (chunk, V) blocks | any device, any elementwise module |
| "native" | the same walk in C++, the memory of one (chunk, V) block | a CPU with Linux, functions of the library |

`impl=None` takes "native" where it can serve the call, and "torch" elsewhere (a missing build is said once); under
torch.func's transforms (vmap, grad, jacrev, jvp, hessian), which "reference" alone serves, it takes that. An
implementation that is asked for and cannot serve a call raises; nothing falls back in silence.
"""

import functools
import warnings
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from uncork.logit_functions.operations import function_transforms
from uncork.loss import reference, tile_native, tile_torch
from uncork.loss.call import Call, Statistics, build_call, check_number, checked_factor
from uncork.loss.chunked import Chunked

__all__ = [
    "TokenStatistics",
    "linear_cross_entropy",
    "mixture_cross_entropy",
    "mixture_token_statistics",
    "token_statistics",
]


class _Implementation(Protocol):
    def statistics(self, call: Call) -> Statistics:
        """Per-token statistics, differentiable but for argmax."""

    def weighted_sum(self, call: Call, ce_factor: Tensor, lse_factor: Tensor | None) -> Tensor:
        """sum_n ce_factor_n CE_n + lse_factor_n lse_n^2."""


_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "reference": reference,
    "torch": Chunked(tile_torch.Tiles),
    "native": Chunked(tile_native.Tiles),
}


class TokenStatistics(NamedTuple):
    """Per token, each of the input's leading shape, float32 or better and differentiable (argmax: int64, not).

    log_prob: of the target (0 where ignored; None without a target). logsumexp: of the logits (a mixture's logits are
    log-probabilities: 0). entropy: of the model's distribution, in nats. argmax: the likeliest word.
    """

    log_prob: Tensor | None
    logsumexp: Tensor
    entropy: Tensor
    argmax: Tensor


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(f(W h + b)), without an (N, V) matrix in memory.

    Per token, with logits l = f(W h + b): CE + z_loss * logsumexp(l)^2, times token_weight, where CE is
    F.cross_entropy's. Equivalent code, for index targets and no token weights::

        logits = logit_function(F.linear(input, linear_weight, linear_bias).float())
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, ignore_index=ignore_index,
                               reduction=reduction, label_smoothing=label_smoothing)
        loss = loss + z_loss * logits.logsumexp(-1)[target != ignore_index].square().mean()  # for "mean"

    Gradients are exact for input, linear_weight, linear_bias, token_weight and the function's parameters. A score of
    -inf (a bias of -inf masks a word or a padded row of W) stays an impossible word and adds nothing to any gradient;
    with label smoothing, which asks for every word, give it the class weight 0, or the loss is inf as torch's is.

    Args:
        input: (..., D), float64, float32, or half precision (raised to float32; under autocast cast down first).
        linear_weight: (V, D), the input's dtype. linear_bias: (V,) or None.
        target: integers (...) in [0, V) or ignore_index; or floating (..., V) probabilities, which need not sum to 1.
        ignore_index: the target of tokens that do not count; None is -100, as torch's function has it.
        logit_function: a LogitFunction or any deterministic elementwise increasing module; None is the identity.
        weight: (V,) class weights. token_weight: (...) multiplies each token's loss, and its share in the mean.
        reduction: "none" (the shape of the tokens), "sum", or "mean": the CE part over the sum of the kept targets'
            class weights (over the number of rows for probabilities), the z part over the number of kept tokens.
        label_smoothing: in [0, 1]. z_loss: factor of logsumexp^2, at least 0.
        impl: "reference", "torch", "native" or None (the best).
        chunk_size: rows of scores at once. memory_budget: bytes of scores at once, in its place (gradients, and the
            sums that the function's parameters need, come on top). With neither, as many rows as 64 MiB hold, or 5 MiB
            for D < 64, between 32 and 512 (`loss.chunked.default_chunk_size`); "torch" has 16 blocks to share it.

    Returns:
        float32 or float64. With no kept token: nan for "mean", 0 for "sum", with gradients of 0. A logit of +inf or NaN
        makes the loss and all gradients that its token reaches nan, as F.cross_entropy does; impossible words keep 0.

    Second derivatives need impl="reference", and a function with a closed form or torch.func (`hessian`, say, of any
    function); torch.func's transforms take "reference" by themselves. On the meta device and with fake tensors every
    implementation but "native" gives shapes and dtypes, forward and backward.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came. The target's range is
            checked on the CPU only, since a check would stop a GPU.

    >>> from uncork import PLIF
    >>> input, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(linear_cross_entropy(input, weight, torch.tensor([2]), logit_function=PLIF()).item(), 4)
    0.4076

    The names are those of torch.nn.functional.linear_cross_entropy. Ganea et al. 2019, arXiv 1902.08077.
    """
    _check_reduction(reduction, z_loss)
    call, leading = build_call(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        logit_function=logit_function,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
    )
    return _reduce(call, leading, token_weight, reduction, z_loss, _implementation(impl, call))


def mixture_cross_entropy(
    latent: Tensor,
    linear_weight: Tensor,
    prior_logits: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    impl: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Cross-entropy of the mixture sum_k pi_k softmax(f(W h_k + b)), pi = softmax(prior_logits).

    Per token -log sum_k pi_k p_k(y) = -logsumexp_k(log pi_k + l_k,y - lse_k), in log space. Equivalent code::

        logits = logit_function(F.linear(latent, linear_weight, linear_bias).float())          # (..., K, V)
        log_prob = torch.logsumexp(prior_logits.log_softmax(-1)[..., None] + logits.log_softmax(-1), dim=-2)
        loss = F.cross_entropy(log_prob.flatten(0, -2), target.flatten(), ...)

    Gradients are exact for latent, linear_weight, prior_logits, linear_bias, token_weight and the parameters of f.

    Args:
        latent: (..., K, D), one context vector per component. prior_logits: (..., K).
        The rest is as in `linear_cross_entropy`; chunk_size counts rows of scores, K of which make a token.

    >>> latent, weight = torch.tensor([[[5.0, 0.0], [0.0, 5.0]]]), torch.eye(2)
    >>> round(mixture_cross_entropy(latent, weight, torch.zeros(1, 2), torch.tensor([0])).item(), 4)
    0.6931

    Yang et al. 2018, arXiv 1711.03953.
    """
    _check_reduction(reduction, 0.0)
    call, leading = build_call(
        latent,
        linear_weight,
        target,
        prior_logits=_given("prior_logits", prior_logits),
        linear_bias=linear_bias,
        logit_function=logit_function,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
    )
    return _reduce(call, leading, token_weight, reduction, 0.0, _implementation(impl, call))


def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> TokenStatistics:
    """Log-probability of the target, logsumexp, entropy and argmax per token, without an (N, V) matrix in memory.

    Equivalent code::

        log_prob = logit_function(F.linear(input, linear_weight, linear_bias).float()).log_softmax(-1)
        log_prob.gather(-1, target[..., None]), -(log_prob.exp() * log_prob).sum(-1), log_prob.argmax(-1)

    All but argmax are differentiable in everything that `linear_cross_entropy` is. Arguments as there; the argmax is
    taken over the scores, whose order the function cannot change.

    >>> input, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> s = token_statistics(input, weight, torch.tensor([1]))
    >>> s.log_prob, s.logsumexp, s.entropy, s.argmax
    (tensor([-1.4076]), tensor([3.4076]), tensor([0.8324]), tensor([2]))
    """
    call, leading = build_call(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        logit_function=logit_function,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        details=True,
    )
    return _token_statistics(call, leading, impl)


def mixture_token_statistics(
    latent: Tensor,
    linear_weight: Tensor,
    prior_logits: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> TokenStatistics:
    """`token_statistics` of a mixture; arguments as in `mixture_cross_entropy`.

    >>> latent, weight = torch.tensor([[[5.0, 0.0], [0.0, 5.0]]]), torch.eye(2)
    >>> s = mixture_token_statistics(latent, weight, torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    >>> s.log_prob, s.entropy, s.argmax
    (tensor([-1.3018]), tensor([0.5853]), tensor([0]))
    """
    call, leading = build_call(
        latent,
        linear_weight,
        target,
        prior_logits=_given("prior_logits", prior_logits),
        linear_bias=linear_bias,
        logit_function=logit_function,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        details=True,
    )
    return _token_statistics(call, leading, impl)


def _given(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise TypeError(f"{name}: expected a Tensor, got None")
    return value


def _check_reduction(reduction: str, z_loss: float) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction: expected "none", "mean" or "sum", got {reduction!r}')
    check_number("z_loss", z_loss)
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss!r}")


def _implementation(impl: str | None, call: Call) -> _Implementation:
    if impl is not None and impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {sorted(_IMPLEMENTATIONS)} or None, got {impl!r}")
    if impl == "native" and (reason := tile_native.refuses(call)):
        raise ValueError(f'impl="native" cannot serve this call: {reason}')
    if impl == "torch" and function_transforms():
        raise ValueError('impl="torch" cannot serve this call: torch.func\'s transforms need impl="reference"')
    return _IMPLEMENTATIONS[impl or _best(call)]


def _best(call: Call) -> str:
    """The fastest implementation that serves a call."""
    if function_transforms():
        return "reference"
    if call.input.device.type != "cpu" or torch.compiler.is_compiling():
        return "torch"
    if tile_native.missing:
        _say_missing()
    return "torch" if tile_native.refuses(call) else "native"


def implementation(call: Call) -> str:
    """What `impl=None` takes for a call, to be read by people: "torch", or "native (avx512)"."""
    name = _best(call)
    return f"{name} ({tile_native.instructions()})" if name == "native" else name


@functools.cache
def _say_missing() -> None:
    warnings.warn(
        f"uncork: the native tile is missing, so impl='torch' serves (slower, same results): {tile_native.missing}",
        stacklevel=5,
    )


def _checked_token_weight(token_weight: Tensor | None, call: Call, leading: tuple[int, ...]) -> Tensor | None:
    if token_weight is None:
        return None
    checked_factor("token_weight", token_weight, call.input.device)
    if tuple(token_weight.shape) != leading:
        raise ValueError(f"token_weight: expected shape {leading}, got {tuple(token_weight.shape)}")
    return token_weight.reshape(-1).to(call.dtype)


def _reduce(
    call: Call,
    leading: tuple[int, ...],
    token_weight: Tensor | None,
    reduction: str,
    z_loss: float,
    implementation: _Implementation,
) -> Tensor:
    """Turns reduction, token weights and z-loss into one factor per row and term."""
    token_weight = _checked_token_weight(token_weight, call, leading)
    assert call.target is not None
    kept = call.target.kept
    if reduction == "none":
        result: Statistics = implementation.statistics(call)
        loss = result.cross_entropy
        assert loss is not None
        if z_loss:
            loss = loss + z_loss * torch.where(kept, result.logsumexp, 0).square()
        return (loss if token_weight is None else loss * token_weight).view(leading)
    share = kept.to(call.dtype)
    if token_weight is not None:
        share = torch.where(kept, token_weight, 0)
    ce_factor, lse_factor = share, z_loss * share if z_loss else None
    undefined: Tensor | None = None
    if reduction == "mean":
        own = call.target.denominator()
        total = (own if token_weight is None else own * share).sum()
        undefined = total == 0
        ce_factor = share / torch.where(undefined, 1, total)
        if lse_factor is not None:
            count = share.sum()
            lse_factor = lse_factor / torch.where(count == 0, 1, count)
    loss = implementation.weighted_sum(call, ce_factor, lse_factor)
    # No kept token: nan, as torch gives, but the graph stays and the gradients are 0.
    return loss if undefined is None else torch.where(undefined, torch.nan, loss)


def _token_statistics(call: Call, leading: tuple[int, ...], impl: str | None) -> TokenStatistics:
    result: Statistics = _implementation(impl, call).statistics(call)
    assert result.entropy is not None
    assert result.argmax is not None
    log_prob = None if result.cross_entropy is None else (-result.cross_entropy).view(leading)
    return TokenStatistics(
        log_prob, result.logsumexp.view(leading), result.entropy.view(leading), result.argmax.view(leading)
    )

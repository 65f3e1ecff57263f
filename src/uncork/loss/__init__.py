"""Fused linear -> logit function -> cross-entropy, with exact gradients for everything, the function's own included.

Four functions and their contracts. `uncork.loss.implementations` lists what can compute them: `impl=None` takes the
fastest implementation that supports the call, and warns once if the compiled one is missing; under torch.func's
transforms (vmap, grad, jacrev, jvp, hessian) it takes "reference". An implementation asked for by name that does not
support the call raises: there is no silent fallback. In a graph of torch.compile or torch.export the loss is one
operator, which chooses likewise when it runs (`uncork.loss.operator`).
"""

import torch
from torch import Tensor, nn

from uncork.loss.call import build_call
from uncork.loss.estimate import estimate_memory
from uncork.loss.memory import MemoryEstimate
from uncork.loss.operator import implementation
from uncork.loss.reduction import TokenStatistics, answer_statistics, check_reduction, reduce_loss

__all__ = [
    "MemoryEstimate",
    "TokenStatistics",
    "estimate_memory",
    "linear_cross_entropy",
    "mixture_cross_entropy",
    "mixture_token_statistics",
    "token_statistics",
]


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
    scores_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of softmax(f(W h + b)), without an (N, V) matrix in memory.

    Per token, with logits l = f(W h + b): CE + z_loss * logsumexp(l)^2, times token_weight, where CE is
    F.cross_entropy's. Equivalent code, for index targets and no token weights::

        logits = logit_function(F.linear(input, linear_weight, linear_bias).float())
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, ignore_index=ignore_index,
                               reduction=reduction, label_smoothing=label_smoothing)
        loss = loss + z_loss * logits.logsumexp(-1)[target != ignore_index].square().mean()  # for "mean"

    Gradients are exact for input, linear_weight, linear_bias, token_weight and the function's parameters. A word with
    the score -inf (a bias of -inf masks a word or a padded row of W) is impossible: its probability is 0 and it adds
    nothing to any gradient. Label smoothing has every word in its target, so give a masked word the class weight 0, or
    the loss is inf, as in torch.

    Args:
        input: (..., D), float64, float32, or half precision (under autocast cast down first).
        linear_weight: (V, D), the input's dtype. linear_bias: (V,) or None.
        target: integers (...) in [0, V) or ignore_index; or floating (..., V) probabilities, which need not sum to 1.
        ignore_index: the target of tokens that do not count; None is -100, as in torch's function.
        logit_function: a LogitFunction or any deterministic elementwise increasing module; None is the identity.
        weight: (V,) class weights. token_weight: (...) multiplies each token's loss, and its share in the mean.
        reduction: "none" (the shape of the tokens), "sum", or "mean": the CE part over the sum of the kept targets'
            class weights (over the number of rows for probabilities), the z part over the number of kept tokens.
        label_smoothing: in [0, 1]. z_loss: factor of logsumexp^2, at least 0.
        impl: "reference", "torch", "native", "triton" or None (the fastest that supports the call).
        chunk_size: rows of scores in memory at once. memory_budget: the same limit in bytes, instead of chunk_size; the
            gradients, and the sums that the function's parameters need, come on top. Without either, `loss.chunk_size`
            decides: on a CPU as many rows as fit into 64 MiB, or half of W's bytes if that is more (5 MiB for D < 64),
            between 32 and 512; "torch" divides these bytes among 16 blocks.
        scores_dtype: dtype of the scores W h + b, of the gradient to them and of the three products. torch.bfloat16,
            with inputs in it or under autocast to it, is what eager torch has: scores are rounded to 8 bits (16.06
            becomes 16.0625, 40.1 becomes 40), function, softmax and sums stay in float32, and W is not copied.
            torch.float32 raises half precision to it, which rounds nothing. None is float32 (float64 of float64), but
            torch.bfloat16 for such inputs on a CPU with instructions for it (avx512_bf16), where it takes half the
            time; on others it takes several times as long.

    Returns:
        float32 or float64. With no kept token: nan for "mean", 0 for "sum", with gradients of 0. A logit of +inf or NaN
        makes the loss and all gradients that its token reaches nan, as F.cross_entropy does; impossible words keep 0.

    Second derivatives need impl="reference", and a function with a closed form or torch.func (`hessian`, say, of any
    function); torch.func's transforms take "reference" by themselves. On the meta device and with fake tensors every
    implementation but "native" gives shapes and dtypes, forward and backward.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what was expected and what came. The target's range is
            checked on the CPU only, since reading it would synchronise a GPU.

    >>> import torch
    >>> from uncork import PLIF
    >>> input, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> round(linear_cross_entropy(input, weight, torch.tensor([2]), logit_function=PLIF()).item(), 4)
    0.4076

    The names are those of torch.nn.functional.linear_cross_entropy. Ganea et al. 2019, arXiv 1902.08077.
    """
    z_loss = check_reduction(reduction, z_loss)
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
        scores_dtype=scores_dtype,
    )
    return reduce_loss(implementation(impl, call), call, leading, token_weight, reduction, z_loss)


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
    scores_dtype: torch.dtype | None = None,
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

    >>> import torch
    >>> latent, weight = torch.tensor([[[5.0, 0.0], [0.0, 5.0]]]), torch.eye(2)
    >>> round(mixture_cross_entropy(latent, weight, torch.zeros(1, 2), torch.tensor([0])).item(), 4)
    0.6931

    Yang et al. 2018, arXiv 1711.03953.
    """
    check_reduction(reduction, 0.0)
    call, leading = build_call(
        latent,
        linear_weight,
        target,
        prior_logits=_given(prior_logits),
        linear_bias=linear_bias,
        logit_function=logit_function,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        scores_dtype=scores_dtype,
    )
    return reduce_loss(implementation(impl, call), call, leading, token_weight, reduction, 0.0)


def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    ignore_index: int | None = -100,
    impl: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    scores_dtype: torch.dtype | None = None,
) -> TokenStatistics:
    """Log-probability of the target, logsumexp, entropy and argmax per token, without an (N, V) matrix in memory.

    Equivalent code::

        log_prob = logit_function(F.linear(input, linear_weight, linear_bias).float()).log_softmax(-1)
        log_prob.gather(-1, target[..., None]), -(log_prob.exp() * log_prob).sum(-1), log_prob.argmax(-1)

    All but argmax are differentiable in everything that `linear_cross_entropy` is. Arguments as there; the argmax is
    taken over the scores, whose order the function cannot change. A token whose target is ignore_index has a log_prob
    of 0, so the mean over the others is `log_prob.sum() / (target != ignore_index).sum()`; its logsumexp, entropy and
    argmax are those of its distribution, as without a target.

    >>> import torch
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
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        scores_dtype=scores_dtype,
        details=True,
    )
    return answer_statistics(implementation(impl, call), call, leading)


def mixture_token_statistics(
    latent: Tensor,
    linear_weight: Tensor,
    prior_logits: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    logit_function: nn.Module | None = None,
    ignore_index: int | None = -100,
    impl: str | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    scores_dtype: torch.dtype | None = None,
) -> TokenStatistics:
    """`token_statistics` of a mixture; arguments as in `mixture_cross_entropy`.

    >>> import torch
    >>> latent, weight = torch.tensor([[[5.0, 0.0], [0.0, 5.0]]]), torch.eye(2)
    >>> s = mixture_token_statistics(latent, weight, torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    >>> s.log_prob, s.entropy, s.argmax
    (tensor([-1.3018]), tensor([0.5853]), tensor([0]))
    """
    call, leading = build_call(
        latent,
        linear_weight,
        target,
        prior_logits=_given(prior_logits),
        linear_bias=linear_bias,
        logit_function=logit_function,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        scores_dtype=scores_dtype,
        details=True,
    )
    return answer_statistics(implementation(impl, call), call, leading)


def _given(prior_logits: Tensor | None) -> Tensor:
    """Returns prior_logits unless they are None, which would make build_call build a call without a mixture."""
    if prior_logits is None:
        raise TypeError("prior_logits: expected a Tensor, got None")
    return prior_logits

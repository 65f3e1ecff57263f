"""Log-probabilities and the likeliest words, chunk by chunk on the native tile; without a gradient."""

from dataclasses import replace

import torch
from torch import Tensor

from uncork.loss import tile_native
from uncork.loss.call import Call
from uncork.loss.chunked import Walk
from uncork.loss.reference import apply_function
from uncork.loss.tile_torch import function_parameters


def serves(call: Call) -> bool:
    """Whether a call can go this way: no gradient asked, float32 or float64, and the native tile takes it."""
    operands = [call.input, call.weight, call.bias, call.prior_logits]
    parameters = [] if call.function is None else list(call.function.parameters())
    asked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in [*operands, *parameters])
    half = call.input.dtype != call.dtype
    return not (asked or half or torch.compiler.is_compiling() or tile_native.refuses(call))


def _walk(call: Call) -> Walk:
    return Walk(call, tile_native.Tiles, function_parameters(call.function, call.dtype, call.input.device))


@torch.no_grad()
def log_prob(call: Call) -> Tensor:
    """(N, V), the only matrix of that size."""
    walk = _walk(call)
    result = torch.empty(call.tokens, call.weight.shape[0], dtype=call.dtype)
    for span in walk.spans():
        if call.prior_logits is None:
            scores = torch.mm(walk.rows(span), walk.weight.T, out=result[span])
            walk.tiles.log_prob(scores, span)
        else:
            result[span] = walk.log_prob(span)
    return result


@torch.no_grad()
def topk(call: Call, k: int) -> tuple[Tensor, Tensor]:
    """(log_prob, ids), (N, k) each. The scores are ranked, which the function cannot reorder; a mixture's words."""
    bias = call.bias
    if call.prior_logits is None:
        call = replace(call, bias=None)
    walk = _walk(call)
    values = torch.empty(call.tokens, k, dtype=call.dtype)
    ids = torch.empty(call.tokens, k, dtype=torch.int64)
    for span in walk.spans():
        if call.prior_logits is not None:
            values[span], ids[span] = walk.log_prob(span).topk(k, dim=-1)
            continue
        scores = walk.scores(walk.rows(span))
        if bias is not None:
            scores += bias
        best, ids[span] = scores.topk(k, dim=-1)
        values[span] = apply_function(call.function, best) - walk.tiles.statistics(scores, span).lse[:, None]
    return values, ids


@torch.no_grad()
def argmax(call: Call) -> Tensor:
    """(N,): the first of the words with the highest score, or probability in a mixture."""
    walk = _walk(call)
    ids = torch.empty(call.tokens, dtype=torch.int64)
    for span in walk.spans():
        if call.prior_logits is not None:
            ids[span] = walk.log_prob(span).argmax(-1)
            continue
        scores = walk.scores(walk.rows(span))
        ids[span] = (scores if call.bias is None else scores.add_(call.bias)).argmax(-1)
    return ids

"""Log-probabilities and the likeliest words, chunk by chunk over tiles; without a gradient."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uncork.loss.call import Call
from uncork.loss.chunked import Walk
from uncork.loss.exclusion import Exclusion, best, take
from uncork.loss.function import apply_function, function_parameters
from uncork.loss.implementations import log_prob_tiles
from uncork.loss.target import IndexTarget
from uncork.loss.tile import LogProbTiles


def asked_for_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd, in reverse or forward mode, would record operations on these tensors."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Inference:
    """Log-probabilities, top k and argmax of one call, without gradients."""

    call: Call
    tiles: type[LogProbTiles]

    @classmethod
    def of(cls, call: Call) -> "Inference | None":
        """None if plain torch has to compute the call: with gradients, in half precision, or without tiles for it."""
        parameters = [] if call.function is None else list(call.function.parameters())
        if asked_for_gradients(call.input, call.weight, call.bias, call.prior_logits, *parameters):
            return None
        tiles = log_prob_tiles(call) if call.input.dtype == call.dtype else None
        return None if tiles is None else cls(call, tiles)

    def _walk(self, call: Call) -> Walk[LogProbTiles]:
        return Walk(call, self.tiles, function_parameters(call.function, call.dtype, call.input.device))

    @torch.no_grad()
    def log_prob(self) -> Tensor:
        """Log-probabilities (N, V), the only matrix of that size in memory."""
        call, walk = self.call, self._walk(self.call)
        result = call.input.new_empty(call.tokens, call.weight.shape[0])
        for span in walk.spans():
            if call.prior_logits is None and walk.dtype == result.dtype:
                walk.tiles.log_prob(walk.scores(walk.rows(span), result[span]), span)
            else:
                result[span] = _log_prob(walk, span)
        return result

    @torch.no_grad()
    def topk(self, k: int, exclusion: Exclusion | None = None) -> tuple[Tensor, Tensor]:
        """(log_prob, ids), (N, k) each, ranked by the scores, whose order f keeps; in a mixture by log-probability."""
        call, bias = self.call, self.call.bias
        first = IndexTarget.build(call.input.new_zeros(call.tokens, dtype=torch.int64), -1, None, 0.0, 1, call.input)
        if call.prior_logits is None:
            call = replace(call, bias=None, target=first)
        walk = self._walk(call)
        values = call.input.new_empty(call.tokens, k)
        ids = call.input.new_empty(call.tokens, k, dtype=torch.int64)
        for span in walk.spans():
            if call.prior_logits is not None:
                log_prob = _log_prob(walk, span)
                ids[span] = best(log_prob, k, exclusion, span)
                values[span] = take(log_prob, ids[span])
                continue
            scores = walk.scores(walk.rows(span))
            if bias is not None:
                scores += bias
            ids[span] = best(scores, k, exclusion, span)
            highest = take(scores, ids[span])
            first.index[span] = ids[span][:, 0]
            logits = apply_function(call.function, highest)
            # Relative to the likeliest word, whose cross-entropy is accurate even where it is small.
            surprise = walk.tiles.statistics(scores, span).cross_entropy
            assert surprise is not None
            values[span] = logits - logits[:, :1] - surprise[:, None]
            if exclusion is not None:  # only impossible words may be left, with a difference of -inf - -inf
                values[span].masked_fill_(highest == -torch.inf, -torch.inf)
        return values, ids

    @torch.no_grad()
    def argmax(self) -> Tensor:
        """(N,): the first of the words with the highest score, or probability in a mixture."""
        call, walk = self.call, self._walk(self.call)
        ids = call.input.new_empty(call.tokens, dtype=torch.int64)
        for span in walk.spans():
            if call.prior_logits is not None:
                ids[span] = _log_prob(walk, span).argmax(-1)
                continue
            scores = walk.scores(walk.rows(span))
            ids[span] = (scores if call.bias is None else scores.add_(call.bias)).argmax(-1)
        return ids


def _log_prob(walk: Walk[LogProbTiles], span: slice) -> Tensor:
    return walk.tiles.log_prob(walk.scores(walk.rows(span)), span)

"""The tile in plain torch: any function, any device."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from uncork.logit_functions.base import known_possible, with_tables
from uncork.logit_functions.operations import Operation, function_transforms, readable
from uncork.loss.call import Call
from uncork.loss.chunk_size import ChunkRule, rule_of
from uncork.loss.function import ModuleState, checked_logits, operations_of
from uncork.loss.memory import Live, shapes_alone
from uncork.loss.stand_in import on_meta
from uncork.loss.target import IndexTarget, Target, highest
from uncork.loss.tile import TileMemory, TileResult, Tiles, Upstream


class FunctionRunner(Protocol):
    """Forward and backward of a logit function inside a tile; no autograd graph outlives the call."""

    def forward(self, scores: Tensor) -> tuple[Tensor, Any]:
        """(logits, what backward needs)."""

    def backward(self, context: Any, grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """(gradient to the scores, sums over elements for each parameter, in float64)."""


def _impossible(scores: Tensor) -> Tensor | None:
    """Where the scores are -inf; None if none of them is (known on a CPU only: reading would synchronise a GPU)."""
    return None if known_possible(scores) else scores == -torch.inf


Masks = Callable[[Tensor], Tensor | None]


def _fill(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """x with the value wherever the mask is True, in place."""
    return x if mask is None else x.masked_fill_(mask, value)


class NoFunction:
    """The plain softmax.

    Args:
        impossible: says where scores are -inf.
    """

    def __init__(self, impossible: Masks = _impossible) -> None:
        self.impossible = impossible

    def forward(self, scores: Tensor) -> tuple[Tensor, Any]:
        return scores, self.impossible(scores)

    def backward(self, context: Any, grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        return _fill(grad, context, 0), []


class OperationsRunner:
    """A chain of primitives over tables.

    Args:
        needs: for which tables a gradient is asked. impossible: says where scores are -inf.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        tables: Sequence[Tensor],
        needs: Sequence[bool],
        impossible: Masks = _impossible,
    ) -> None:
        device = tables[0].device
        self.impossible = impossible
        self.chain = with_tables(operations, tables, device)
        self.needs = list(needs)

    def forward(self, scores: Tensor) -> tuple[Tensor, Any]:
        impossible = self.impossible(scores)
        x = _fill(scores, impossible, 0)
        stages = []
        for operation, tables in self.chain:
            located = operation.locate(x, tables)
            # An infinite distance (x = inf) times a gradient of 0 (a later function that is bounded) would be nan.
            if located and len(self.chain) > 1:
                located[1].clamp_(max=torch.finfo(x.dtype).max)
            stages.append((x, located))
            x = operation.forward(x, tables, located)
        return _fill(x, impossible, -torch.inf), (impossible, stages)

    def backward(self, context: Any, grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        impossible, stages = context
        grad = _fill(grad, impossible, 0)
        sums: list[Tensor | None] = []
        end = len(self.needs)
        for (operation, tables), (x, located) in zip(reversed(self.chain), reversed(stages), strict=True):
            wanted = any(self.needs[end - len(tables) : end])
            own = operation.table_gradients(x, grad, tables, located) if wanted else [None] * len(tables)
            sums = [*own, *sums]
            end -= len(tables)
            grad.mul_(operation.derivative(x, tables, located))
        return grad, sums


class ModuleRunner:
    """A user's own elementwise module, differentiated by autograd on the tile, with its detached parameters as leaves.

    The module is called with the tensors that it had when the loss was called: by the time of the backward it may hold
    others (functional_call restores the module's own, FSDP frees them, hooks on saved tensors return copies).
    """

    def __init__(self, module: nn.Module, state: ModuleState, parameters: Sequence[Tensor]) -> None:
        self.module = module
        self.parameters = [p.detach().requires_grad_() for p in parameters]
        self.state = state.constants | dict(zip(state.trained, self.parameters, strict=True))

    def forward(self, scores: Tensor) -> tuple[Tensor, Any]:
        impossible = scores == -torch.inf
        with torch.enable_grad():
            leaf = scores.detach().requires_grad_()
            finite = leaf.masked_fill(impossible, 0)  # a copy, in which the module may work
            logits = checked_logits(functional_call(self.module, self.state, (finite,)), scores)
        return logits.detach().masked_fill(impossible, -torch.inf), (impossible, leaf, logits)

    def backward(self, context: Any, grad: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        impossible, leaf, logits = context
        grad = grad.masked_fill_(impossible, 0).to(logits.dtype)
        grad_scores, *grad_parameters = torch.autograd.grad(logits, [leaf, *self.parameters], grad, allow_unused=True)
        sums = [None if s is None else s.double() for s in grad_parameters]
        return torch.zeros_like(leaf) if grad_scores is None else grad_scores, sums


class LinearTile:
    """Scores (C, V) of C tokens under one softmax."""

    def __init__(self, runner: FunctionRunner, scores: Tensor, target: Target | None, details: bool) -> None:
        self.runner, self.target = runner, target
        self.argmax = scores.argmax(-1) if details else None  # first: the runner may overwrite the scores
        logits, self.context = runner.forward(scores)
        top = highest(logits)
        self.shifted = logits.sub_(top)
        self.shifted_lse = torch.logsumexp(self.shifted, -1)
        self.lse = self.shifted_lse + top.squeeze(-1)
        self.cross_entropy = None if target is None else target.cross_entropy(self.shifted, self.shifted_lse)
        self.entropy = torch.special.entr((self.shifted - self.shifted_lse[:, None]).exp()).sum(-1) if details else None

    def gradient(self, upstream: Upstream) -> tuple[Tensor, None, Sequence[Tensor | None]]:
        """(gradient to the scores (C, V), None for the prior, table sums); overwrites the logits."""
        log_prob = self.shifted.sub_(self.shifted_lse[:, None])
        grad_entropy = None
        if upstream.entropy is not None and self.entropy is not None:
            grad_entropy = upstream.entropy[:, None] * (
                self.entropy[:, None] + log_prob.masked_fill(log_prob == -torch.inf, 0)
            )
        grad = log_prob.exp_()
        factor = torch.zeros_like(self.lse) if upstream.logsumexp is None else upstream.logsumexp
        if upstream.square is not None:
            factor = factor + torch.where(upstream.square == 0, 0, 2 * upstream.square * self.lse)
        if upstream.cross_entropy is not None and self.target is not None:
            factor = factor + upstream.cross_entropy * self.target.mass()
        grad.mul_(factor[:, None] if grad_entropy is None else factor[:, None] - grad_entropy)
        if upstream.cross_entropy is not None and self.target is not None:
            self.target.subtract_from(grad, upstream.cross_entropy)
            unused = ~self.target.kept & (factor == 0)
            if upstream.entropy is not None:
                unused &= upstream.entropy == 0
            if not readable(unused) or bool(unused.any()):
                grad.masked_fill_(unused[:, None], 0)
        grad_scores, sums = self.runner.backward(self.context, grad)
        return grad_scores, None, sums


class MixtureTile:
    """Scores (C, K, V) of C tokens under K softmaxes and a prior.

    An index target without smoothing needs only each component's probability of it: K linear tiles whose row factor is
    the posterior. Anything else needs log p_v of the mixture and the responsibilities r_kv.
    """

    def __init__(
        self, runner: FunctionRunner, scores: Tensor, prior_logits: Tensor, target: Target | None, details: bool
    ) -> None:
        self.runner, self.target = runner, target
        self.log_prior = prior_logits.log_softmax(-1)
        logits, self.context = runner.forward(scores.flatten(0, 1))
        self.log_prob = logits.sub_(highest(logits)).view_as(scores)  # log softmax of each component, (C, K, V)
        self.log_prob.sub_(torch.logsumexp(self.log_prob, -1, keepdim=True))
        self.lse = torch.zeros_like(self.log_prior[:, 0])
        self.sparse = target is not None and target.sparse and not details
        self.cross_entropy: Tensor | None = None
        self.entropy: Tensor | None = None
        self.argmax: Tensor | None = None
        if self.sparse:
            assert isinstance(target, IndexTarget)
            self.joint = self.log_prior + target.at(self.log_prob)
            loss = -target.hit * torch.logsumexp(self.joint, -1)
            self.cross_entropy = torch.where(target.kept, loss, 0)
        else:
            self.mixed = torch.logsumexp(self.log_prior[..., None] + self.log_prob, 1)
            self.cross_entropy = None if target is None else target.cross_entropy(self.mixed, self.lse)
        if details:
            self.entropy = torch.special.entr(self.mixed.exp()).sum(-1)
            self.argmax = self.mixed.argmax(-1)

    def gradient(self, upstream: Upstream) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """(gradient to the scores (C K, V), to the prior's logits (C, K), table sums)."""
        grad_logits, grad_component = self._sparse(upstream) if self.sparse else self._dense(upstream)
        grad_prior = grad_component - self.log_prior.exp() * grad_component.sum(-1, keepdim=True)
        grad_scores, sums = self.runner.backward(self.context, grad_logits.flatten(0, 1))
        return grad_scores, grad_prior, sums

    def _sparse(self, upstream: Upstream) -> tuple[Tensor, Tensor]:
        target = self.target
        assert isinstance(target, IndexTarget)
        grad_ce = torch.zeros_like(self.lse) if upstream.cross_entropy is None else upstream.cross_entropy
        total = torch.logsumexp(self.joint, -1, keepdim=True)
        # An impossible target has no posterior: no component gets a gradient.
        posterior = (self.joint - total).exp().masked_fill_(total == -torch.inf, 0)
        factor = torch.where(target.kept, grad_ce * target.hit, 0)[:, None] * posterior
        grad_logits = self.log_prob.exp().mul_(factor[..., None])
        index = target.index[:, None, None].expand(*factor.shape, 1)
        grad_logits.scatter_add_(-1, index, -factor[..., None])
        grad_logits.masked_fill_(~target.kept[:, None, None], 0)
        return grad_logits, -factor

    def _dense(self, upstream: Upstream) -> tuple[Tensor, Tensor]:
        grad_mixed = torch.zeros_like(self.mixed)  # dL / d log p_v
        if upstream.cross_entropy is not None and self.target is not None:
            self.target.subtract_from(grad_mixed, upstream.cross_entropy)
        if upstream.entropy is not None:
            prob = self.mixed.exp()
            grad_mixed -= upstream.entropy[:, None] * (prob - torch.special.entr(prob))
        share = (self.log_prior[..., None] + self.log_prob - self.mixed[:, None]).exp()
        share.masked_fill_((self.mixed == -torch.inf)[:, None], 0)
        grad_logits = share.mul_(grad_mixed[:, None])
        grad_component = grad_logits.sum(-1)
        grad_logits = grad_logits - self.log_prob.exp().mul_(grad_component[..., None])
        return grad_logits, grad_component


# (rows, V) blocks in memory at once with a typical function. On a CPU a block is then 4 MiB, which stays in the cache
# from one pass to the next.
BLOCKS = 16


class TorchTiles(Tiles):
    """The tiles of one call, by torch's own operations."""

    @classmethod
    def refuses(cls, call: Call) -> str:
        """Refuses torch.func's transforms, which the chunked loss's autograd.Functions do not support."""
        return 'torch.func\'s transforms need impl="reference"' if function_transforms() else ""

    @classmethod
    def chunk_rule(cls, call: Call) -> ChunkRule:
        """The device's rule, with its budget divided among BLOCKS blocks."""
        return replace(rule_of(call.input.device), blocks=BLOCKS)

    @classmethod
    def memory(cls, call: Call, parameters: Sequence[Tensor], rows: int, gradients: bool) -> TileMemory:
        """What a tile makes that computes on the meta device."""
        call, counted = on_meta(call, rows // call.components), call.input.device
        needs = [gradients and p.requires_grad for p in parameters]
        meta = [torch.empty(p.shape, dtype=p.dtype, device="meta") for p in parameters]
        span = slice(0, call.tokens)

        def run() -> TileMemory:
            with torch.no_grad():
                scores = torch.empty(rows, call.weight.shape[0], dtype=call.dtype, device="meta")
                upstream = Upstream(torch.empty(call.tokens, dtype=call.dtype, device="meta"))
                with Live(counted) as live:
                    tiles = cls(call, meta, needs)
                    if counted.type == "cpu":  # it would read the scores, and find none of -inf
                        tiles.runner = make_runner(call, meta, needs, lambda scores: None)
                    whole = live.live
                    result = tiles.gradient(scores, span, upstream) if gradients else tiles.statistics(scores, span)
                    kept = 0 if result.grad_scores is None else live.live - whole
            return TileMemory(whole, live.peak - whole, kept)

        return shapes_alone(run)

    def __init__(self, call: Call, parameters: Sequence[Tensor], needs: Sequence[bool]) -> None:
        super().__init__(call, parameters, needs)
        self.bias = None if call.bias is None else call.bias.detach().to(call.dtype)
        self.runner = make_runner(call, parameters, needs)

    def _tile(self, scores: Tensor, span: slice) -> LinearTile | MixtureTile:
        call = self.call
        if self.bias is not None:
            scores += self.bias
        target = None if call.target is None else call.target.rows(span)
        if call.prior_logits is None:
            return LinearTile(self.runner, scores, target, call.details)
        prior = call.prior_logits[span].detach().to(call.dtype)
        return MixtureTile(self.runner, scores.unflatten(0, prior.shape), prior, target, call.details)

    def statistics(self, scores: Tensor, span: slice) -> TileResult:
        """The tokens' statistics: entropy and argmax where the call asks for details."""
        tile = self._tile(scores, span)
        return TileResult(tile.cross_entropy, tile.lse, tile.entropy, tile.argmax)

    def gradient(self, scores: Tensor, span: slice, upstream: Upstream) -> TileResult:
        """Cross-entropy, lse, and all gradients but the products'."""
        tile = self._tile(scores, span)
        grad_scores, grad_prior, sums = tile.gradient(upstream)
        return TileResult(tile.cross_entropy, tile.lse, None, None, grad_scores, None, grad_prior, sums)


def make_runner(
    call: Call, parameters: Sequence[Tensor], needs: Sequence[bool], impossible: Masks = _impossible
) -> FunctionRunner:
    """The runner of a function whose differentiable tensors are `parameters` (see `function_parameters`)."""
    if call.function is None:
        return NoFunction(impossible)
    operations = operations_of(call.function)
    if operations is None:
        assert call.module_state is not None
        return ModuleRunner(call.function, call.module_state, parameters)
    return OperationsRunner(operations, parameters, needs, impossible) if operations else NoFunction(impossible)

"""Chunks: the same result in pieces, the same bits again, no more products than promised, memory of a chunk."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uncork.loss import linear_cross_entropy, mixture_cross_entropy
from uncork.loss.chunk_size import CPU, GPU
from uncork.loss.chunked import Chunked
from uncork.loss.implementations import IMPLEMENTATIONS
from uncork.loss.tile_torch import BLOCKS, TorchTiles

CHUNKS = [1, 2, 3, 8, 9, 1000]


def results(problem, impl, reduction, chunk_size, **options):
    loss = problem.loss(impl, reduction=reduction, chunk_size=chunk_size, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, problem.operands(), upstream)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["index", "probabilities"])
def test_any_chunk_size_gives_the_same(impl, mixture, reduction, probabilities, make_problem):
    problem = make_problem("compose", mixture=mixture, probabilities=probabilities, tokens=9)
    whole = results(problem, impl, reduction, None, label_smoothing=0.1)
    for chunk_size in CHUNKS:
        for a, b in zip(results(problem, impl, reduction, chunk_size, label_smoothing=0.1), whole, strict=True):
            torch.testing.assert_close(a, b)


def test_any_chunk_size_gives_the_same_statistics(impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=9)
    whole = problem.statistics(impl)
    for chunk_size in CHUNKS:
        for a, b in zip(problem.statistics(impl, chunk_size=chunk_size), whole, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_again(impl, mixture, reduction, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=70, vocab=90, dtype=torch.float32)
    first = results(problem, impl, reduction, 16)
    for _ in range(1 if impl == "triton" else 3):  # its interpreter is slow
        for a, b in zip(results(problem, impl, reduction, 16), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("tokens", "vocab"), [(150, 300), (40_000, 4)])
@pytest.mark.parametrize("name", ["scale", "asymmetric-softcap", "plif", "monotone-relu", "monotone-tanh", "compose"])
def test_function_gradients_do_not_depend_on_threads(chunked_impl, name, tokens, vocab, make_problem, threads):
    """From the same scores: W is the identity matrix, so the product is exact however it is split."""
    problem = make_problem(name, tokens=tokens, vocab=vocab, features=vocab)
    problem.weight, problem.bias = torch.eye(vocab, dtype=torch.float64), None
    parameters = list(problem.function.parameters())
    bits = []
    for count in (1, 2, 3):
        threads(count)
        loss = problem.loss(chunked_impl, chunk_size=tokens)
        bits.append(torch.autograd.grad(loss, parameters))
    for other in bits[1:]:
        for a, b in zip(other, bits[0], strict=True):
            assert torch.equal(a, b)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear")
        return func(*args, **(kwargs or {}))


def products(problem, impl, reduction, backward):
    with Products() as counter:
        loss = problem.loss(impl, reduction=reduction)
        if backward:
            loss.sum().backward()
    return counter.count


@pytest.mark.parametrize("name", ["plif", "module"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_call_without_gradients_costs_one_product(chunked_impl, mixture, name, reduction, make_problem):
    problem = make_problem(name, mixture=mixture)
    with torch.no_grad():
        assert products(problem, chunked_impl, reduction, backward=False) == 1
    with torch.inference_mode():
        assert products(problem, chunked_impl, reduction, backward=False) == 1
    for t in problem.operands():
        t.requires_grad_(False)
    assert products(problem, chunked_impl, reduction, backward=False) == 1


def test_products_of_a_training_step(chunked_impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    assert products(problem, chunked_impl, "mean", backward=True) == 3
    assert products(problem, chunked_impl, "none", backward=True) == 4
    problem.weight.requires_grad_(False)
    assert products(problem, chunked_impl, "mean", backward=True) == 2


class HalfProducts(TorchTiles):
    """Tiles whose products are in the input's own dtype, with float32 between them."""

    reads_products = True

    @classmethod
    def product_dtype(cls, call):
        return call.input.dtype

    def statistics(self, scores, span):
        return super().statistics(scores.to(self.call.dtype), span)

    def gradient(self, scores, span, upstream):
        result = super().gradient(scores.to(self.call.dtype), span, upstream)
        return result._replace(grad_scores=result.grad_scores.to(scores.dtype))


class Dtypes(TorchDispatchMode):
    """Of the matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            self.found |= {t.dtype for t in args if isinstance(t, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tiles_say_the_dtype_of_the_products(monkeypatch, mixture, reduction, make_problem):
    """What is multiplied is never copied to a dtype that they do not ask for."""
    monkeypatch.setitem(IMPLEMENTATIONS, "half", Chunked(HalfProducts))
    problem = make_problem("plif", mixture=mixture, tokens=40, dtype=torch.bfloat16)
    wanted = results(problem, "torch", reduction, None)
    bound = 0.02 if torch.__version__ >= "2.13" else 0.1  # 2.6: coarser products
    for chunk_size in (None, 8):
        with Dtypes() as dtypes:
            got = results(problem, "half", reduction, chunk_size)
        assert dtypes.found == {torch.bfloat16}
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype
            assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_rows_of_a_chunk_come_from_the_table_of_the_device(make_problem):
    call = make_problem(None, tokens=4, vocab=50_257, features=64, dtype=torch.float32).call()
    rule = TorchTiles.chunk_rule(call)
    assert rule == replace(CPU, blocks=BLOCKS)
    assert rule.rows(call, torch.float32) == CPU.budget // BLOCKS // (50_257 * 4) // 32 * 32 or 32
    elsewhere = replace(call, input=call.input.detach().to("meta"), weight=call.weight.detach().to("meta"))
    rows = TorchTiles.chunk_rule(elsewhere).rows(elsewhere, torch.float32)
    assert rows == GPU.budget // BLOCKS // (50_257 * 4) // 32 * 32 == 320
    assert TorchTiles.chunk_rule(elsewhere).rows(replace(elsewhere, memory_budget=2**25), torch.float32) == 10


class Live(TorchDispatchMode):
    """Bytes of the storages made inside that are alive at once: `peak`."""

    def __init__(self):
        super().__init__()
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.live = self.peak = 0

    def _free(self, size):
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in given and storage not in self.known:
                    self.known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


def peak(problem, impl, reduction, *, grad, statistics=False, **options):
    for t in problem.operands():
        t.grad = None
    with torch.set_grad_enabled(grad), Live() as live:
        if statistics:
            loss = problem.statistics(impl, chunk_size=64).entropy
        else:
            loss = problem.loss(impl, reduction=reduction, chunk_size=64, **options)
        if grad:
            loss.sum().backward()
    return live.peak


# Blocks of scores alive at once: in "torch" every primitive of a chain keeps its own scores (and a piece's index, of 8
# bytes). Where the chunk rule says one block it is one, whatever the function.
LIMIT_BLOCKS = {"none": 7, "module": 13, "plif": 15, "monotone-tanh": 19, "compose": 21}
LIMIT_ONE_BLOCK = 1.2


@pytest.mark.parametrize("name", LIMIT_BLOCKS)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "backward"])
@pytest.mark.parametrize("reduction", ["mean", "none", "statistics"])
def test_memory_is_that_of_a_chunk(chunked_impl, name, grad, reduction, mixture, make_problem):
    vocab, features, rows = 512, 4, 64
    options = {"statistics": True} if reduction == "statistics" else {}
    few, many = (
        make_problem(name, mixture=mixture, tokens=n, vocab=vocab, features=features, dtype=torch.float32)
        for n in (128, 512)
    )
    small = peak(few, chunked_impl, reduction, grad=grad, **options)
    large = peak(many, chunked_impl, reduction, grad=grad, **options)
    # What may grow with N: gradients of the inputs and a handful of numbers per token, never a row of scores.
    per_token = (large - small) / (512 - 128)
    assert per_token < 0.15 * vocab * 4
    block, matrix = rows * vocab * 4, vocab * features * 4
    said = IMPLEMENTATIONS[chunked_impl].tiles.chunk_rule(few.call()).blocks
    blocks = LIMIT_ONE_BLOCK if said == 1 else LIMIT_BLOCKS[name]
    assert small < blocks * block + 4 * matrix


def test_the_measure_of_memory_sees_kept_logits(make_problem):
    problem = make_problem("plif", tokens=1024, vocab=512, dtype=torch.float32)
    assert peak(problem, "reference", "mean", grad=True) > 2 * 1024 * 512 * 4
    assert peak(problem, "torch", "mean", grad=True) < 1024 * 512 * 4


def test_the_largest_tensor_is_a_block(make_problem):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.elements = max(self.elements, *sizes, 0)
            return out

    problem = make_problem("plif", tokens=1000, vocab=200, features=3, dtype=torch.float32)
    with Largest() as largest:
        problem.loss("torch", chunk_size=40).backward()
        problem.loss("torch", chunk_size=40, reduction="none").sum().backward()
    assert largest.elements == 40 * 200


def test_saved_for_backward_is_not_the_scores(mixture, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=300, vocab=200, features=3, dtype=torch.float32)
    for reduction in ("mean", "none"):
        sizes: list[int] = []

        def note(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = problem.loss("torch", reduction=reduction, chunk_size=32)
        loss.sum().backward()
        assert max(sizes) <= max(t.numel() for t in problem.operands())


@pytest.mark.parametrize("mixture", [False, True])
def test_ignored_tokens_are_left_out_before_the_products(mixture):
    """What they hold cannot reach a gradient, not even nan."""
    torch.manual_seed(0)
    shape = (6, 2, 3) if mixture else (6, 3)
    x = torch.randn(*shape, dtype=torch.float64)
    x[[1, 4]] = torch.nan
    x.requires_grad_()
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    prior = torch.randn(6, 2, dtype=torch.float64)
    target = torch.tensor([0, -100, 2, 3, -100, 5])
    kept = [0, 2, 3, 5]

    def loss(rows):
        if mixture:
            return mixture_cross_entropy(x[rows], weight, prior[rows], target[rows], impl="torch")
        return linear_cross_entropy(x[rows], weight, target[rows], z_loss=0.1, impl="torch")

    ours, alone = loss(list(range(6))), loss(kept)
    assert torch.equal(ours, alone)
    for a, b in zip(*(torch.autograd.grad(value, (x, weight)) for value in (ours, alone)), strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())

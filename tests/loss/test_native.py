"""What only the native tile has: instruction sets, an exp of its own, memory handed to C, threads and forks."""

import ctypes
import multiprocessing
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import uncork
from uncork.logit_functions.operations import Affine, PiecewiseLinear
from uncork.loss import implementations, linear_cross_entropy, mixture_cross_entropy, tile_native, token_statistics
from uncork.loss.call import build_call

INSTRUCTIONS = ["avx512", "avx2", "base"]


@pytest.fixture(scope="module")
def library():
    if tile_native.missing:
        pytest.fail(f"the native tile is missing: {tile_native.missing}")
    return tile_native._library


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, library):
    """Forces an instruction set for one test."""
    before = tile_native.instructions()
    if library.uncork_select(request.param.encode()):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    assert tile_native.instructions() == request.param
    library.uncork_select(before.encode())


def native_exp(library, x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    y = np.full_like(x, 7)
    pointer = ctypes.POINTER(ctypes.c_float)
    library.uncork_exp(x.ctypes.data_as(pointer), y.ctypes.data_as(pointer), ctypes.c_int64(x.size))
    return y


def test_exp_is_exact_to_two_units_in_the_last_place(library, instructions):
    x = np.concatenate([np.linspace(-87, 88.7, 400_001), np.linspace(-1e-3, 1e-3, 10_001)]).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(native_exp(library, x) / truth - 1).max() < 2.5e-7


def test_exp_where_it_is_hard(library, instructions):
    x = np.array([-np.inf, np.inf, np.nan, 0, -0.0, -200, 200, 88.8, -1e30, 1e30, 1e-40], dtype=np.float32)
    wanted = [0, np.inf, np.nan, 1, 1, 0, np.inf, np.inf, 0, np.inf, 1]
    np.testing.assert_array_equal(native_exp(library, x), np.float32(wanted))
    small = np.linspace(-103.5, -87.4, 1000).astype(np.float32)
    truth = np.exp(small.astype(np.float64))
    got = native_exp(library, small).astype(np.float64)
    assert (np.diff(got) >= 0).all()
    assert np.abs(got - truth).max() <= 2.0**-149, "denormals are right to one unit"


def gradients(problem, impl, **options):
    loss = problem.loss(impl, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, problem.operands(), upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 17, 1025])
def test_every_instruction_set_computes_the_reference(instructions, function_name, vocab, dtype, mixture, make_problem):
    problem = make_problem(function_name, mixture=mixture, vocab=vocab, dtype=dtype)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {}
    for options in ({"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.1}):
        for a, b in zip(
            gradients(problem, "native", **options), gradients(problem, "reference", **options), strict=True
        ):
            torch.testing.assert_close(a, b, **tolerance)
    with torch.no_grad():
        for a, b in zip(problem.statistics("native"), problem.statistics("reference"), strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("pieces", [1, 2, 7, 16, 257, 1000, 100_000])
def test_slope_gradients_of_a_large_vocabulary(pieces, make_problem):
    """Sums in float of a row, in double of rows: to what the scores in float32 allow, against float64."""
    torch.manual_seed(0)
    x, weight, target = torch.randn(64, 16), torch.randn(20_000, 16), torch.randint(20_000, (64,))
    plif = uncork.PLIF(pieces, 20.0, init="random", spread=0.3)

    def slopes(x, weight, plif, impl):
        loss = linear_cross_entropy(x, weight, target, logit_function=plif, impl=impl, reduction="sum")
        return torch.autograd.grad(loss, plif.raw_slopes)[0]

    got = slopes(x, weight, plif, "native").double()
    torch32 = slopes(x, weight, plif, "torch").double()
    truth = slopes(x.double(), weight.double(), plif.double(), "reference")
    error, allowed = (got - truth).norm(), (torch32 - truth).norm()
    assert error < 1.5 * allowed + 1e-6 * truth.norm()


def test_it_is_what_a_cpu_call_gets(monkeypatch, make_problem):
    calls: list[object] = []
    run = tile_native.NativeTiles._run

    def spy(self, *args):
        calls.append(self)
        return run(self, *args)

    monkeypatch.setattr(tile_native.NativeTiles, "_run", spy)
    make_problem("plif").loss(None)
    assert calls
    calls.clear()
    for name in ("module", "monotone-tanh"):
        make_problem(name).loss(None)
    assert not calls


@pytest.mark.parametrize("refused", ["module", "monotone-tanh"])  # not `name`, by which conftest.py leaves tests out
def test_a_function_without_a_kernel_is_refused(refused, mixture, make_problem):
    reason = "Bend is not made of its primitives" if refused == "module" else "it has no kernel for TanhUnits"
    with pytest.raises(ValueError, match=f'impl="native" cannot serve this call: {reason}'):
        make_problem(refused, mixture=mixture).loss("native")


def test_other_calls_that_are_refused(make_problem):
    problem = make_problem(uncork.Compose(*[uncork.Scale(1.1) for _ in range(17)]))
    with pytest.raises(ValueError, match="a chain of 17 primitives is longer than 16"):
        problem.loss("native")
    assert problem.loss(None).isfinite()
    call, _ = build_call(torch.randn(2, 3), torch.randn(4, 3), None)
    assert tile_native.NativeTiles.refuses(call) == ""
    elsewhere = replace(call, input=torch.empty(2, 3, device="meta"))
    assert tile_native.NativeTiles.refuses(elsewhere) == "it works on the CPU, not on meta"

    class Own(torch.Tensor):
        pass

    with pytest.raises(ValueError, match="needs plain tensors, not Own"):
        linear_cross_entropy(
            torch.randn(2, 3).as_subclass(Own), torch.randn(4, 3), torch.zeros(2).long(), impl="native"
        )


def test_a_missing_library_is_said_once(monkeypatch, make_problem):
    monkeypatch.setattr(tile_native, "missing", "it was not built")
    implementations._say_missing.cache_clear()
    problem = make_problem("plif")
    with pytest.warns(UserWarning, match="native tile is missing.*impl='torch' serves.*it was not built"):
        loss = problem.loss(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(problem.loss(None), loss)
    assert torch.equal(problem.loss("torch"), loss)
    with pytest.raises(ValueError, match='impl="native" cannot serve this call: it was not built'):
        problem.loss("native")
    implementations._say_missing.cache_clear()


def test_library_that_is_damaged_or_of_another_version(monkeypatch, tmp_path, library):
    damaged = tmp_path / "tile.so"
    monkeypatch.setattr(tile_native, "LIBRARY", damaged)
    assert "there is no tile.so, which an install of uncork builds" in tile_native._load()[1]
    damaged.write_bytes(b"not a library")
    assert "cannot be used" in tile_native._load()[1]
    monkeypatch.undo()
    monkeypatch.setattr(tile_native, "_VERSION", -1)
    assert "install uncork again" in tile_native._load()[1]
    monkeypatch.undo()
    monkeypatch.setenv("UNCORK_INSTRUCTIONS", "mmx")
    assert "no 'mmx'" in tile_native._load()[1]


def test_two_python_threads_at_once(make_problem):
    problems = [make_problem("compose", tokens=40, vocab=3000) for _ in range(2)]
    wanted = [gradients(p, "native", chunk_size=16) for p in problems]
    found: list[list[list[torch.Tensor]]] = [[], []]

    def work(i):
        for _ in range(10):
            found[i].append(gradients(problems[i], "native", chunk_size=16))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for mine, right in zip(found, wanted, strict=True):
        assert len(mine) == 10
        for again in mine:
            for a, b in zip(again, right, strict=True):
                torch.testing.assert_close(a, b)


def _in_child(queue):
    torch.set_num_threads(1)  # as a DataLoader's worker does: torch's own threads do not survive a fork
    loss = linear_cross_entropy(torch.ones(4, 2), torch.eye(3, 2), torch.tensor([0, 1, 2, 0]), impl="native")
    queue.put((loss.item(), tile_native._forked))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child(make_problem):
    make_problem("plif", tokens=100, vocab=500).loss("native")  # the parent's threads are running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    value, forked = queue.get(timeout=60)
    child.join(timeout=60)
    assert forked
    assert value == pytest.approx(
        F.cross_entropy(torch.ones(4, 2) @ torch.eye(3, 2).T, torch.tensor([0, 1, 2, 0])).item()
    )
    assert not tile_native._forked


def test_gradients_are_handed_over_without_a_copy(mixture, chunked_impl, make_problem):
    problem = make_problem("plif", mixture=mixture, dtype=torch.float32)
    loss = problem.loss(chunked_impl)
    made = loss.grad_fn.next_functions[0][0].made if hasattr(loss.grad_fn.next_functions[0][0], "made") else None
    node = loss.grad_fn
    while made is None:
        node = next(n for n, _ in node.next_functions if n is not None)
        made = getattr(node, "made", None)
    address = made.weight.data_ptr()
    del made, node
    loss.backward()
    assert problem.weight.grad.data_ptr() == address


def test_a_strided_bias_and_weight(make_problem):
    problem = make_problem("plif", vocab=9)
    wanted = gradients(problem, "reference")
    wide = torch.zeros(9, 2, dtype=torch.float64)
    with torch.no_grad():
        wide[:, 0] = problem.bias
        problem.weight = problem.weight.T.contiguous().T.requires_grad_()
    problem.bias = wide[:, 0].requires_grad_()
    for a, b in zip(gradients(problem, "native"), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_upstream_factors_that_cancel(make_problem):
    """CE + z lse^2 where the factor of p is about 0: the one-hot part must not be divided by it."""
    problem = make_problem("plif", tokens=4, vocab=50, bias=True)
    lse = problem.statistics("reference").logsumexp.detach()
    for shift in (0.0, 1e-12, 1e-3):
        factor = (-1 + shift) / (2 * lse)

        def objective(impl, factor=factor):
            s = problem.statistics(impl)
            return (-s.log_prob + factor * s.logsumexp.square()).sum()

        ours = torch.autograd.grad(objective("native"), problem.operands())
        for a, b in zip(ours, torch.autograd.grad(objective("reference"), problem.operands()), strict=True):
            torch.testing.assert_close(a, b)


def test_memory_budget(make_problem):
    problem = make_problem("plif", tokens=9, vocab=100)
    whole = gradients(problem, "native")
    for budget in (100 * 8, 350 * 8, 2**20):
        for a, b in zip(gradients(problem, "native", memory_budget=budget), whole, strict=True):
            torch.testing.assert_close(a, b)
    mixed = make_problem("plif", mixture=True, components=3, vocab=100)
    with pytest.raises(ValueError, match=r"expected at least 2400 bytes \(2400 for one token's scores"):
        mixed.loss("native", memory_budget=2399)
    assert mixed.loss("native", memory_budget=2400).isfinite()
    with pytest.raises(ValueError, match=r"memory_budget: expected at least 800 bytes.*got 799"):
        problem.loss("native", memory_budget=799)
    with pytest.raises(ValueError, match="memory_budget: expected None beside chunk_size=3, got 10"):
        problem.loss("native", memory_budget=10, chunk_size=3)
    with pytest.raises(ValueError, match="memory_budget: expected a whole number of at least 1"):
        problem.loss("native", memory_budget=0)
    half = make_problem("plif", tokens=9, vocab=100, features=3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"at least 1600 bytes \(400 for one token's scores, 1200 for the weight"):
        half.loss("native", memory_budget=1599)
    assert half.loss("native", memory_budget=1600).isfinite()


def test_mixture_of_one_is_the_linear_loss(make_problem):
    problem = make_problem("sigsoftmax", mixture=True, components=1, vocab=30)
    alone = linear_cross_entropy(
        problem.input.squeeze(1),
        problem.weight,
        problem.target,
        linear_bias=problem.bias,
        logit_function=problem.function,
    )
    torch.testing.assert_close(problem.loss("native"), alone)
    assert mixture_cross_entropy(
        problem.input, problem.weight, problem.prior, problem.target, linear_bias=problem.bias, impl="native"
    ).isfinite()


@pytest.mark.parametrize(
    "row", [[1.0, 3, 3, 2], [1, torch.nan, 5, torch.nan], [5, torch.nan, 1, 2], [-torch.inf] * 4, [0.0, 0, 0, 0]]
)
def test_argmax_of_ties_and_nan_is_torchs(row):
    scores = torch.tensor(row)
    assert token_statistics(torch.ones(1, 1), scores[:, None], impl="native").argmax.item() == scores.argmax()


class Wrong(uncork.LogitFunction):
    """A user's function that may say anything of itself."""

    def __init__(self, operations=(), sizes=()):
        super().__init__()
        self._operations, self._sizes = operations, sizes

    def options(self):
        return {}

    def operations(self):
        return self._operations

    def tables(self, dtype=torch.float32, device=None):
        return tuple(torch.full((size,), 0.5, dtype=dtype) for size in self._sizes)


class Decreasing(Wrong):
    increasing = False

    def tables(self, dtype=torch.float32, device=None):
        return (torch.tensor([-1.0, 0.0], dtype=dtype),)


@pytest.mark.parametrize(
    ("operations", "sizes", "message"),
    [
        ((Affine(),), (1,), r"Affine expects tables of 2 numbers, got sizes \[1\]"),
        ((PiecewiseLinear(2.0),), (100, 10, 10), "PiecewiseLinear expects tables of the same size P each"),
        ((PiecewiseLinear(),), (0, 0, 0), r"same size P each, got sizes \[0, 0, 0\]"),
        ((Affine(), Affine()), (2,), "expected 2 tables for its operations, got 1"),
    ],
)
def test_tables_of_the_wrong_size_are_refused(operations, sizes, message):
    x, weight, target = torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, weight, target, logit_function=Wrong(operations, sizes))


def test_a_decreasing_function_is_not_for_this_tile():
    x, weight, target = 5 * torch.randn(3, 9), 5 * torch.randn(50, 9), torch.tensor([0, 1, 2])
    function = Decreasing((Affine(),))
    wanted = F.cross_entropy(-(x @ weight.T), target)
    torch.testing.assert_close(linear_cross_entropy(x, weight, target, logit_function=function), wanted)
    with pytest.raises(ValueError, match="Decreasing does not increase"):
        linear_cross_entropy(x, weight, target, logit_function=function, impl="native")


def test_another_default_device(make_problem):
    problem = make_problem("plif", dtype=torch.float32)
    head = uncork.LinearHead(3, 7, logit_function=uncork.PLIF(5, 2.0))
    with torch.no_grad():
        wanted = [head.log_prob(problem.input), *head.topk(problem.input, 2), head.predict(problem.input)]
    loss = problem.loss("native")
    with torch.device("meta"):
        assert torch.equal(problem.loss("native"), loss)
        problem.loss("native", reduction="none").sum().backward()
        with torch.no_grad():
            found = [head.log_prob(problem.input), *head.topk(problem.input, 2), head.predict(problem.input)]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_follows_operations_does_not_get_the_native_tile():
    head, x = uncork.build_head("softcap", 4, 9), torch.randn(3, 4)
    head.requires_grad_(False)
    tangent = torch.func.jvp(lambda h: head(h).log_softmax(-1), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(torch.func.jvp(head.log_prob, (x,), (torch.ones_like(x),))[1], tangent)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(head.log_prob(dual)).tangent, tangent)
    with torch.no_grad():
        plain = uncork.LinearHead(4, 9)
        torch.testing.assert_close(torch.func.vmap(plain.log_prob)(x), plain(x).log_softmax(-1))
        graph = make_fx(lambda h: plain.log_prob(h))(x)
    other = torch.randn(3, 4)
    torch.testing.assert_close(graph(other), plain(other).log_softmax(-1))


def test_a_head_that_is_changed_computes_what_it_says():
    class Doubled(uncork.LinearHead):
        def scores(self, input):
            return 2 * super().scores(input)

    head, x = Doubled(4, 9, logit_function=uncork.PLIF(5, 2.0)), torch.randn(3, 4)
    wanted = head.log_prob(x)
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(x), wanted)
    plain = uncork.LinearHead(4, 9, logit_function=uncork.PLIF(5, 2.0))
    plain.logit_function.register_forward_hook(lambda module, given, out: 2 * out)
    wanted = plain.log_prob(x)
    with torch.no_grad():
        torch.testing.assert_close(plain.log_prob(x), wanted)


def test_steep_pieces_do_not_lose_the_order(library):
    """y = x + (value + slope (x - knot)), not offset + slope x, which cancels where slopes differ strongly."""
    plif = uncork.PLIF(100, 20.0)
    with torch.no_grad():
        plif.raw_slopes.fill_(-12.0)
        plif.raw_slopes[98] = 100.0
        z = torch.linspace(18, 20, 2001)
        head = uncork.LinearHead(1, z.numel(), bias=False, logit_function=plif)
        head.weight.copy_(z[:, None])
        log_prob = head.log_prob(torch.ones(1, 1)).squeeze()
        torch.testing.assert_close(log_prob, head(torch.ones(1, 1)).log_softmax(-1).squeeze(), rtol=0, atol=1e-4)
        plain = plif(z)
        fell = plain.diff().min()
        assert log_prob.diff().min() >= fell - 2e-5  # the rounding of log p itself, of numbers near 160


@pytest.mark.parametrize("row", [[-torch.inf, torch.inf, 0.0], [-torch.inf, torch.nan, 0.0]])
def test_a_row_of_nan_does_not_reach_a_masked_word(impl, row):
    bias = torch.tensor(row)
    weight = torch.randn(3, 2, requires_grad=True)
    loss = linear_cross_entropy(torch.randn(1, 2), weight, torch.tensor([2]), linear_bias=bias, impl=impl)
    loss.backward()
    assert loss.isnan()
    assert weight.grad is not None
    assert not weight.grad[0].any()


def test_an_impossible_target_of_a_mixture(impl):
    """Its loss is inf; the other tokens' gradients, and that of the masked word, are what they are without it."""
    latent, prior = torch.randn(3, 2, 4), torch.randn(3, 2)
    weight, bias = torch.randn(4, 4, requires_grad=True), torch.tensor([-torch.inf, 0, 0, 0])

    def gradient(rows, impl):
        loss = mixture_cross_entropy(
            latent[rows],
            weight,
            prior[rows],
            torch.tensor([0, 1, 2])[rows],
            linear_bias=bias,
            impl=impl,
            reduction="none",
        )
        return loss, torch.autograd.grad(loss.sum(), weight)[0]

    loss, whole = gradient([0, 1, 2], impl)
    assert loss[0] == torch.inf
    assert not whole[0].any()
    torch.testing.assert_close(whole, gradient([1, 2], "reference")[1])


def test_a_masked_target_of_weight_0_costs_nothing(impl):
    bias, weight = torch.tensor([-torch.inf, 0, 0, 0]), torch.tensor([0.0, 1, 1, 1])
    options = {"linear_bias": bias, "weight": weight, "impl": impl, "reduction": "none"}
    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    for smoothing in (0.0, 0.1):
        loss = linear_cross_entropy(x, w, y, label_smoothing=smoothing, **options)
        assert loss.isfinite().all()
    assert linear_cross_entropy(x, w, y, **options)[0] == 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_changed_class_weights_are_noticed(chunked_impl, reduction, make_problem):
    problem = make_problem("plif")
    weight = torch.rand(7, dtype=torch.float64)
    loss = problem.loss(chunked_impl, weight=weight, label_smoothing=0.3, reduction=reduction).sum()
    torch.autograd.grad(loss, problem.weight, retain_graph=True)
    weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, problem.weight)


def test_ignored_tokens_of_a_per_token_loss_have_no_products(chunked_impl, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=8)
    problem.target[2:] = -100
    rows = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ == "mm" and result.shape != problem.weight.shape:
                rows.append(args[0].shape[0])
            return result

    with Rows():
        loss = problem.loss(chunked_impl, reduction="none")
        loss.sum().backward()
    kept = int((problem.target != -100).sum()) * (2 if mixture else 1)
    assert max(rows) == kept


def test_topk_of_a_confident_row_keeps_its_digits():
    head = uncork.LinearHead(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[60.0], [45.0], [40.0]]))
        got = head.topk(torch.ones(1, 1), 2)[0].squeeze().double()
    truth = torch.tensor([60.0, 45.0, 40.0], dtype=torch.float64).log_softmax(-1)[:2]
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-7)  # of 1, where float32 at 60 has 4e-6


MANY_CHUNKS = """
import sys, torch, uncork
from uncork.lab.machine import resident
tokens = int(sys.argv[1])
x, weight, target = torch.randn(tokens, 4), torch.randn(500, 4), torch.randint(500, (tokens,))
before = resident("VmHWM")
uncork.linear_cross_entropy(x, weight, target, logit_function=uncork.PLIF(100_000), chunk_size=32).backward()
print((resident("VmHWM") - before) // 1024)
"""


def test_many_chunks_leave_no_holes_in_memory():
    """Kibibytes of the whole process, in which 100 chunks once needed several MiB each."""

    def peak(tokens):
        command = [sys.executable, "-c", MANY_CHUNKS, str(tokens)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(3200) < peak(320) + 20_000

"""What only the tile for GPUs has: kernels in Triton, run by its interpreter, and the machine code that they become.

The tests of the contract run on it too where TRITON_INTERPRET=1 (`make test`). The interpreter must be chosen before
triton is imported, so these tests start a process for it; compiling needs a process without it.
"""

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import uncork
from uncork.loss import chunked, tile_triton
from uncork.loss.call import Missing, build_call
from uncork.loss.gpu import chain
from uncork.loss.gpu.blocks import blocks_of, kind_of, known_blocks
from uncork.loss.implementations import IMPLEMENTATIONS

pytest.importorskip("triton", reason="the tile for GPUs is in Triton, which is not installed")
if tile_triton._missing():
    pytest.skip(tile_triton._missing(), allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def interpreter(monkeypatch):
    """Skips unless Triton's interpreter runs the kernels."""
    if not tile_triton.interpreted():
        pytest.skip("run with TRITON_INTERPRET=1")


@pytest.fixture
def several_blocks(monkeypatch):
    """Rows of a few blocks."""
    sizes = blocks_of(torch.device("cpu"))._replace(block=16, many_block=16)
    monkeypatch.setattr(tile_triton, "blocks_of", lambda device: sizes)


def gradients(problem, impl, **options):
    loss = problem.loss(impl, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, problem.operands(), upstream)]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", ["none", "plif", "compose", "monotone-relu"])
def test_rows_of_several_blocks(interpreter, several_blocks, name, mixture, options, make_problem):
    problem = make_problem(name, mixture=mixture, vocab=50, tokens=3)
    for a, b in zip(gradients(problem, "triton", **options), gradients(problem, "reference", **options), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        for a, b in zip(problem.statistics("triton"), problem.statistics("reference"), strict=True):
            torch.testing.assert_close(a, b)


def test_what_stood_in_memory_before_does_not_matter(interpreter, several_blocks, monkeypatch, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture, vocab=50)
    wanted = gradients(problem, "triton", label_smoothing=0.1)
    empty = torch.empty

    def filled(*shape, **kwargs):
        made = empty(*shape, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", filled)
    for a, b in zip(gradients(problem, "triton", label_smoothing=0.1), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_stand_in_the_memory_of_their_scores(
    interpreter, several_blocks, monkeypatch, narrow, mixture, make_problem
):
    """Every number is that of float32, rounded once, though it is written over scores that were read before."""
    problem = make_problem("plif", mixture=mixture, vocab=60, dtype=torch.float32, grad=False)
    call = problem.call()
    parameters = call.function.tables()
    rows = problem.input.reshape(-1, 3)
    upstream = tile_triton.Upstream(torch.linspace(-1, 2, 5))

    def result():
        tiles = tile_triton.TritonTiles(call, parameters, [True] * 3)
        block = tiles.block(rows.shape[0])
        torch.mm(rows, problem.weight.T, out=block)
        return tiles.gradient(block, slice(0, 5), upstream), block

    wide, _ = result()
    monkeypatch.setattr(tile_triton.TritonTiles, "operand_dtype", classmethod(lambda cls, call: narrow))
    short, block = result()
    assert short.grad_scores.dtype == narrow
    assert short.grad_scores.data_ptr() == block.data_ptr()
    assert torch.equal(short.grad_scores, wide.grad_scores.to(narrow))
    for a, b in zip(short.sums, wide.sums, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.fixture
def narrow_products(monkeypatch):
    """float16 inputs are multiplied as a GPU does, added up in float32; torch has no such products on a CPU."""

    def multiply(a, b, out):
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def add_product(a, b, out):
        out.addmm_(a.to(out.dtype), b.to(out.dtype))

    monkeypatch.setattr(chunked, "multiply", multiply)
    monkeypatch.setattr(chunked, "add_product", add_product)
    monkeypatch.setattr(tile_triton.TritonTiles, "operand_dtype", classmethod(lambda cls, call: call.input.dtype))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["sparse", "dense"])
@pytest.mark.parametrize(("factor", "square"), [(1.0, 0.0), (1e-9, 0.0), (1e-9, 1e-6)])
def test_float16_loses_no_small_gradient_and_overflows_at_no_large_one(
    interpreter, narrow_products, factor, square, options, mixture, make_problem
):
    """A mean over many tokens makes gradients below float16's least number; a square makes unforeseen large ones."""
    if mixture and square:
        pytest.skip("a mixture has no z-loss")
    problem = make_problem("plif", mixture=mixture, vocab=50, tokens=9, dtype=torch.float16, grad=False)
    problem.input *= 500 if square else 1  # the gradient of the squared logsumexp grows with it
    call = build_call(
        problem.input, problem.weight, problem.target, prior_logits=problem.prior, linear_bias=problem.bias,
        logit_function=problem.function, chunk_size=4, **options,
    )[0]  # fmt: skip
    factors = torch.linspace(factor, 2 * factor, 9), torch.full((9,), square) if square else None

    def found(dtype):
        own = {name: getattr(call, name) for name in ("input", "weight", "bias", "prior_logits")}
        wide = replace(call, **{name: None if t is None else t.to(dtype) for name, t in own.items()})
        parameters = list(call.function.tables())
        return chunked.weighted(wide, tile_triton.TritonTiles, [True] * 7, *factors, parameters)[3].in_order()

    narrow, wide = found(torch.float16), found(torch.float32)
    assert all(g.any() for g in wide[:3])
    for a, b in zip(narrow, wide, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("pieces", [1, 7, 1000, 100_000])
def test_slope_gradients_against_float64(interpreter, pieces):
    """Scores far beyond the bound too, whose distance to the last knot is large."""
    torch.manual_seed(0)
    x, weight, target = 4 * torch.randn(4, 8), torch.randn(3000, 8), torch.randint(3000, (4,))
    plif = uncork.PLIF(pieces, 10.0, init="random", spread=0.3)

    def slopes(x, weight, plif, impl):
        loss = uncork.linear_cross_entropy(x, weight, target, logit_function=plif, impl=impl)
        return torch.autograd.grad(loss, plif.raw_slopes)[0]

    got = slopes(x, weight, plif, "triton").double()
    plain = slopes(x, weight, plif, "torch").double()
    truth = slopes(x.double(), weight.double(), plif.double(), "reference")
    assert (got - truth).norm() < 1.5 * (plain - truth).norm() + 1e-6 * truth.norm()
    assert (got - truth).norm() < 1e-4 * truth.norm()


def counted_call(function, components=1, dtype=torch.bfloat16):
    """A call whose rows keep counters of their own in half precision, and its scores in float32."""
    torch.manual_seed(0)
    target = torch.randint(2000, (4,))
    target[2] = -100
    prior = None if components == 1 else torch.randn(4, components, dtype=dtype)
    shape = (4, 2) if components == 1 else (4, components, 2)
    call, _ = build_call(
        torch.zeros(shape, dtype=dtype), torch.zeros(2000, 2, dtype=dtype), target, prior_logits=prior,
        logit_function=function, weight=torch.linspace(0.1, 2, 2000),
    )  # fmt: skip
    return call, 3 * torch.randn(4 * components, 2000)


def table_gradients(call, scores):
    tiles = tile_triton.TritonTiles(call, call.function.tables(), [True] * len(call.function.tables()))
    block = tiles.block(scores.shape[0])
    block.copy_(scores)
    return tiles.gradient(block, slice(0, 4), tile_triton.Upstream(torch.linspace(0.5, 2, 4).to(call.dtype))).sums


COUNTED = {
    "plif": lambda: uncork.PLIF(62, 8.0, init="random", spread=0.3),
    "odd": lambda: uncork.PLIF(61, 8.0),
    "after a scale": lambda: uncork.Compose(uncork.Scale(1.3, learnable=True), uncork.PLIF(40, 20.0)),
    "long pieces": lambda: uncork.PLIF(5, 20.0),
}


@pytest.mark.parametrize(
    ("name", "components", "bits"),
    [("plif", 1, 12), ("plif", 3, 20), ("odd", 1, 20), ("after a scale", 3, 12), ("long pieces", 1, 20)],
)
def test_counters_of_a_row_are_exact_to_their_digits(interpreter, monkeypatch, name, components, bits):
    """Of every piece, however little of the row it has; the same bits again."""
    function = COUNTED[name]()
    call, scores = counted_call(function, components)
    monkeypatch.setattr(chain, "counter_bits", lambda vocab_size: bits)
    monkeypatch.setattr(tile_triton, "counter_bits", lambda vocab_size: bits)
    assert chain.counted_pieces(5, torch.bfloat16, 2000) == 5
    scores[:, call.target.index.clamp(min=0)] = -50.0  # nothing is subtracted within the pieces
    found, again = table_gradients(call, scores), table_gradients(call, scores)
    wide, scores = counted_call(function.double(), components, torch.float64)[0], scores.double()
    wide = replace(wide, prior_logits=None if call.prior_logits is None else call.prior_logits.double())
    truth = table_gradients(wide, scores)
    for got, same in zip(found, again, strict=True):
        assert got is same is None or torch.equal(got, same)
    values, slopes = truth[-2][1:-1], truth[-1][1:-1]
    assert (values > 0).sum() >= 3
    [*_, plif] = function.modules()
    width = 2 * plif.bound / plif.num_pieces
    allowed = (2.0 ** (3 - bits) + 1e-5) * values + 2.0**-55  # the truth is a sum of multiples of about 2^-60
    assert ((found[-2][1:-1] - values).abs() <= allowed).all()
    assert ((found[-1][1:-1] - slopes).abs() <= allowed * width).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plif", {}), ("plif", {"z_loss": 1e-2, "reduction": "sum"}), ("plif", {"reduction": "none"}),
        ("after a scale", {}), ("long pieces", {}),
    ],
    ids=str,
)  # fmt: skip
def test_counters_of_a_row_in_the_loss(interpreter, name, options, mixture):
    if mixture and "z_loss" in options:
        pytest.skip("a mixture has no z-loss")
    function = COUNTED[name]()
    torch.manual_seed(0)
    x = 2 * torch.randn(*((5, 3, 4) if mixture else (5, 4)))
    weight, prior, target = torch.randn(2000, 4), torch.randn(5, 3), torch.tensor([3, 1999, -100, 0, 7])

    def gradients(dtype, function, impl):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in ((x, weight, prior) if mixture else (x, weight))]
        given = {"prior_logits": inputs[2]} if mixture else {}
        of = uncork.mixture_cross_entropy if mixture else uncork.linear_cross_entropy
        operands = [*inputs[:2], *given.values(), target]
        loss = of(*operands, logit_function=function, impl=impl, **options)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        return torch.autograd.grad(loss, list(function.parameters()), upstream)

    found, again = (gradients(torch.bfloat16, function, "triton") for _ in range(2))
    truth = gradients(torch.float64, function.double(), "reference")
    for got, same, wanted in zip(found, again, truth, strict=True):
        assert torch.equal(got, same)
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def test_copies_of_a_histogram_change_no_bit(interpreter, monkeypatch, mixture, make_problem):
    problem = make_problem("plif", mixture=mixture, tokens=5)
    several = gradients(problem, "triton", label_smoothing=0.1)
    assert chain.copies_of(12) == 64
    monkeypatch.setattr(chain, "copies_of", lambda num_bins: 1)
    for a, b in zip(several, gradients(problem, "triton", label_smoothing=0.1), strict=True):
        assert torch.equal(a, b)


def test_no_number_of_a_tiny_gradient_is_lost(interpreter):
    """A piece that holds 1e-13 of a row's gradient is as exact as the others: the whole numbers are of a fine unit."""
    plif = uncork.PLIF(8, 40.0)
    weight = torch.tensor([[0.5], [1.5], [2.5], [3.5]])
    x, target = torch.full((1, 1), 10.0), torch.tensor([3])
    call, _ = build_call(x, weight, target, logit_function=plif)
    tiles = tile_triton.TritonTiles(call, plif.tables(), [True] * 3)
    block = tiles.block(1)
    torch.mm(x, weight.T, out=block)
    values = tiles.gradient(block, slice(0, 1), tile_triton.Upstream(torch.ones(1))).sums[1]
    assert values is not None
    wanted = (x.double() @ weight.double().T).softmax(-1)[0, :3]
    torch.testing.assert_close(values[4:7], wanted, rtol=1e-5, atol=0)
    assert values[:4].eq(0).all()


def test_a_class_that_does_not_exist_costs_infinity(interpreter, make_problem):
    """A GPU's targets are not checked: nothing outside of the row is read for them."""
    call = make_problem("none", tokens=3, grad=False).call()
    target = replace(call.target, index=torch.tensor([-3, -3, 7]), kept=torch.ones(3, dtype=torch.bool))
    tiles = tile_triton.TritonTiles(replace(call, target=target), (), ())
    block = tiles.block(3)
    torch.mm(call.input, call.weight.T, out=block)
    assert tiles.statistics(block, slice(0, 3)).cross_entropy.eq(torch.inf).all()


def test_nan_below_the_first_knot_reaches_every_sum(interpreter, make_problem):
    """Whole numbers cannot say it."""
    plif = uncork.PLIF(4, 1.0)
    call, _ = build_call(torch.ones(1, 1), -100 * torch.ones(2, 1), torch.tensor([0]), logit_function=plif)
    tiles = tile_triton.TritonTiles(call, plif.tables(), [True] * 3)
    block = tiles.block(1)
    torch.mm(call.input, call.weight.T, out=block)
    _, values, slopes = tiles.gradient(block, slice(0, 1), tile_triton.Upstream(torch.tensor([torch.nan]))).sums
    assert values.isnan().all()
    assert slopes.isnan().all()


def test_a_kernel_is_launched_on_the_device_of_its_scores(monkeypatch):
    """Triton launches on the current device, which need not be the tensors'."""
    current: list[torch.Tensor | None] = [None]
    seen: list[torch.Tensor | None] = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    scores = torch.ones(1)
    tile_triton._launch({(3,): lambda scores: seen.append(current[-1])}, 3, scores=scores)
    assert seen == [scores]


def test_a_weight_that_is_not_copied_needs_no_memory(make_problem):
    call = make_problem("none", dtype=torch.bfloat16).call()
    call = replace(call, memory_budget=10 * 7 * 4)
    rule = tile_triton.TritonTiles.chunk_rule(call)
    assert rule.rows(call, torch.float32, torch.bfloat16) == 10
    assert rule.rows(replace(call, memory_budget=10 * 7 * 4 + 21 * 4), torch.float32) == 10


def test_what_a_kernel_takes_at_once_is_read_by_the_kind_of_gpu(monkeypatch, make_problem):
    """A kind that was measured has its own line; another, and a machine without a GPU, the counted one."""
    call, own = make_problem("none").call(), known_blocks()["cuda"]._replace(chunk_mib=7)
    monkeypatch.setattr("uncork.loss.gpu.blocks.known_blocks", lambda: {**known_blocks(), "sm_90": own})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, kind, wanted in (((9, 0), "sm_90", own), ((8, 6), "sm_86", known_blocks()["cuda"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kind_of(torch.device("cuda")) == kind
        blocks_of.cache_clear()
        assert blocks_of(torch.device("cuda")) == wanted
    blocks_of.cache_clear()
    assert tile_triton.TritonTiles.chunk_rule(call).budget == 1200 * 2**20


def test_it_is_chosen_on_a_gpu_alone(make_problem):
    call = make_problem("plif").call()
    if tile_triton.interpreted():
        assert IMPLEMENTATIONS["triton"].refuses(call) == ""
    else:
        with pytest.raises(ValueError, match=r'impl="triton" cannot serve this call: it works on a GPU, not on cpu'):
            make_problem("plif").loss("triton")


def test_refusals_name_what_is_missing(monkeypatch, make_problem):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refuses = IMPLEMENTATIONS["triton"].refuses
    assert "Bend is not made of its primitives" in refuses(make_problem("module").call())
    assert "no kernel for TanhUnits" in refuses(make_problem("monotone-tanh").call())
    long = uncork.Compose(*[uncork.Scale(1.1)] * 9)
    assert "a chain of 9 primitives is longer than 8" in refuses(make_problem(long).call())


@pytest.mark.parametrize(
    ("version", "said"), [("3.2.0", "it needs triton 3.6 or newer, and this is 3.2.0"), ("", "pip")]
)
def test_a_missing_or_old_triton_is_said_once_and_torch_serves(monkeypatch, version, said, make_problem):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if version:
        monkeypatch.setattr("triton.__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "triton", None)
    tile_triton._missing.cache_clear()
    try:
        reason = IMPLEMENTATIONS["triton"].refuses(make_problem("plif").call())
    finally:
        monkeypatch.undo()
        tile_triton._missing.cache_clear()
    assert isinstance(reason, Missing)
    assert said in reason


def test_where_triton_cannot_launch_the_reason_is_said(monkeypatch):
    """Without a C compiler, say, which many images with a GPU lack, it raises when a kernel is first launched."""
    from triton.runtime import driver

    class Broken:
        def get_current_target(self):
            raise RuntimeError("Failed to find C compiler")

    tile_triton._cannot_launch.cache_clear()
    monkeypatch.setattr(driver, "_active", Broken())
    assert "Failed to find C compiler" in tile_triton._cannot_launch()
    tile_triton._cannot_launch.cache_clear()
    monkeypatch.setattr(driver, "_active", Compiler())
    assert tile_triton._cannot_launch() == ""
    tile_triton._cannot_launch.cache_clear()


def test_nothing_imports_triton_before_it_is_needed():
    code = """
        import sys, torch, uncork
        uncork.linear_cross_entropy(torch.randn(3, 2), torch.randn(5, 2), torch.tensor([0, 1, 2]))
        assert not [m for m in sys.modules if m.split(".")[0] == "triton"]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=os.environ)


class Compiler:
    """In the place of a GPU's driver, enough to compile for it."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return -1  # what is kept for a device that is there stays its own

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """The names of the kernels that calls launch: compiled for the arguments that they get there, and not run."""
    if tile_triton.interpreted():
        pytest.skip("the interpreter compiles nothing")
    from triton.runtime import driver

    names = []

    def compile_it(kernel, programs, **arguments):
        assert kernel.warmup(grid=(programs,), **arguments)
        names.append(kernel.__name__)

    monkeypatch.setattr(tile_triton, "_launch", compile_it)
    monkeypatch.setattr(tile_triton, "interpreted", lambda: True)
    monkeypatch.setattr(driver, "_active", Compiler())
    return names


# Of a call: the options of the loss, or of the statistics; the target's kind; the words.
CALLS = {
    "sparse": ({"z_loss": 0.1}, None, False, 50),
    "smoothed": ({"label_smoothing": 0.1, "weight": torch.ones(50)}, None, False, 50),
    "probabilities": ({"label_smoothing": 0.1}, None, True, 50),
    "statistics": (None, {}, False, 50),
    "statistics without a target": (None, {"target": False}, False, 50),
    "one word": (None, {}, False, 1),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernels_of_every_kind_of_call_compile(compiled, case, dtype, mixture, make_problem):
    """Each branch of a kernel: the interpreter does not see what the compiler refuses."""
    options, asked, probabilities, vocab = CALLS[case]
    problem = make_problem("compose", mixture=mixture, probabilities=probabilities, vocab=vocab, dtype=dtype)
    if options is None:
        statistics = problem.statistics("triton", **asked)
        made = sum(x.sum() for x in statistics if x is not None and x.is_floating_point())
    else:
        if mixture:
            options = {key: value for key, value in options.items() if key != "z_loss"}
        made = problem.loss("triton", **options)
    made.backward()
    assert len(set(compiled)) >= 2


@pytest.fixture(scope="module")
def machine_code():
    if tile_triton.interpreted():
        pytest.skip("the interpreter compiles nothing")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import machine_code  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    return machine_code


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_machine_code_spills_nothing_and_reads_16_bytes_at_once(machine_code, target):
    for kernel, function in machine_code.cases():
        if function not in ("softmax", "plif", "monotone", "scale, plif, softcap"):
            continue
        made = machine_code.compiled(kernel, function, target)
        assert made["spilled"] == 0, made
        assert made["shared bytes"] <= 48 * 1024, made
        assert made["wide reads"] >= 1, made
        if "gradient" in kernel:
            assert made["wide writes"] >= 1, made

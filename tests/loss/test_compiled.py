"""torch.compile and torch.export: one graph, eager's loss and gradients, for every head; and the operators within."""

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import uncork
from tests.small import FEATURES, HEADS, VOCAB, small_head
from uncork.logit_functions.base import LogitFunction, constants
from uncork.logit_functions.operations import Affine, Operation
from uncork.loss import call, operator
from uncork.loss.call import multiplies_bfloat16
from uncork.loss.tile_native import NativeTiles, missing

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A body and a head, whose forward is the loss."""

    def __init__(self, name: str, *, dtype: torch.dtype = torch.float64, **options) -> None:
        super().__init__()
        self.body = nn.Linear(3, FEATURES)
        self.head = small_head(name)
        self.options = options
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head.loss(self.body(x).tanh(), y, **self.options)


def batch(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the second ignored, of a number of tokens that a graph is to leave open."""
    x, y = torch.randn(tokens, 3, dtype=dtype), torch.randint(0, VOCAB, (tokens,))
    y[1] = -100
    for t in (x, y):
        torch._dynamo.mark_dynamic(t, 0)
    return x, y


def gradients(loss: Tensor, model: nn.Module, upstream: Tensor, **options) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, upstream, **options))


def check_training(name: str, reduction: str, backend: str, dtype: torch.dtype = torch.float64) -> None:
    """Steps of SGD on two accumulated batches each, of other sizes every time: one compilation, eager's gradients."""
    model = Model(name, reduction=reduction, dtype=dtype)
    own = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, own)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((5, 7), (4, 9)):
            for tokens in sizes:
                x, y = batch(tokens, dtype)
                loss, wanted = compiled(x, y), own(x, y)
                torch.testing.assert_close(loss, wanted)
                upstream = torch.randn_like(wanted)
                loss.backward(upstream)
                wanted.backward(upstream)
            for (key, p), q in zip(model.named_parameters(), own.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), key
                if q.grad is not None:
                    assert q.grad.any() or key == "head.logit_function.log_gain", key
                    torch.testing.assert_close(p.grad, q.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", HEADS)
def test_training(name, reduction):
    check_training(name, reduction, "aot_eager")


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
IN_CI = [("plif", "mean"), ("mos", "none")]
PRODUCT = [(name, reduction) for name in HEADS for reduction in ("mean", "sum", "none")]


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("name", "reduction"),
    [case if case in IN_CI else pytest.param(*case, marks=pytest.mark.slow) for case in PRODUCT],
)
def test_training_with_inductor(name, reduction):
    check_training(name, reduction, "inductor")


@NEEDS_COMPILER
@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_training_with_inductor_in_float32(name):
    check_training(name, "mean", "inductor", torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plif", "mos"])
def test_second_backward(name, reduction):
    model = Model(name, reduction=reduction)
    x, y = batch(6)
    wanted = model(x, y)
    upstream = torch.randn_like(wanted)
    truth = gradients(wanted, model, upstream)
    # torch reuses the memory of what a graph saved, and says so in a second backward, unless it is told not to.
    with torch._functorch.config.patch(donated_buffer=False):
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(x, y)
        for again in (True, False):
            torch.testing.assert_close(gradients(loss, model, upstream, retain_graph=again), truth)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plif", "mos"])
def test_activation_checkpointing(name, reduction):
    model = Model(name, reduction=reduction)

    def step(x, y):
        return checkpoint(model, x, y, use_reentrant=False)

    x, y = batch(6)
    wanted = model(x, y)
    upstream = torch.randn_like(wanted)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, model, upstream), gradients(wanted, model, upstream))


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option(reduction, probabilities, make_problem):
    problem = make_problem("compose", probabilities=probabilities)
    token_weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    options = {
        "reduction": reduction,
        "weight": torch.rand(VOCAB - 4, dtype=torch.float64),
        "token_weight": token_weight,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "chunk_size": 2,
    }
    wanted = problem.loss(None, **options)
    operands, upstream = [*problem.operands(), token_weight], torch.randn_like(wanted)
    truth = torch.autograd.grad(wanted, operands, upstream)
    loss = torch.compile(lambda: problem.loss(None, **options), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, operands, upstream), truth)


def test_statistics(mixture, make_problem):
    problem = make_problem("plif", mixture=mixture)
    wanted = problem.statistics(None)
    found = torch.compile(lambda: problem.statistics(None), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(tuple(found), tuple(wanted))
    upstream = [torch.randn(5, dtype=torch.float64) for _ in range(3)]

    def all_of(s):
        return torch.autograd.grad(s[:3], problem.operands(), upstream)

    torch.testing.assert_close(all_of(found), all_of(wanted))
    assert not found.argmax.requires_grad


def test_autocast():
    model = Model("plif", dtype=torch.float32)
    x, y = batch(6, torch.float32)

    def step(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, y)

    wanted = step(x, y)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    one = torch.ones(())
    torch.testing.assert_close(gradients(loss, model, one), gradients(wanted, model, one), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scores_in_bfloat16(reduction, make_problem):
    problem = make_problem("plif", tokens=6, dtype=torch.float32)
    for name in ("input", "weight", "bias"):
        setattr(problem, name, getattr(problem, name).detach().bfloat16().requires_grad_())
    options = {"reduction": reduction, "scores_dtype": torch.bfloat16}
    wanted = problem.loss(None, **options)
    loss = torch.compile(lambda: problem.loss(None, **options), fullgraph=True, backend="aot_eager")()
    assert torch.equal(loss, wanted)
    assert not torch.equal(loss, problem.loss(None, reduction=reduction))
    upstream = torch.ones_like(loss)
    for a, b in zip(*(torch.autograd.grad(x, problem.operands(), upstream) for x in (loss, wanted)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_bfloat16_as_the_processor_multiplies_it(impl, mixture, autocast, make_problem, monkeypatch):
    """The question whether it has instructions for bfloat16 is none that a graph could hold."""
    monkeypatch.setattr(call, "multiplies_bfloat16", multiplies_bfloat16)
    problem = make_problem("plif", mixture=mixture, tokens=6, dtype=torch.float32)
    for name in () if autocast else ("input", "weight", "bias"):
        setattr(problem, name, getattr(problem, name).detach().bfloat16().requires_grad_())

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return problem.loss(impl), *problem.statistics(impl)

    wanted = step()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(found, wanted)
    grads = (torch.autograd.grad(given[0], problem.operands()) for given in (found, wanted))
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "frozen"])
def test_what_does_not_ask_for_gradients(reduction, grad):
    """Under no_grad nothing, with a frozen head only the body: the same graph does not compute more."""
    model = Model("plif", reduction=reduction)
    model.head.requires_grad_(False)
    x, y = batch(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        loss, wanted = compiled(x, y), model(x, y)
    torch.testing.assert_close(loss, wanted)
    assert loss.requires_grad == grad
    if grad:
        upstream = torch.randn_like(wanted)
        torch.testing.assert_close(gradients(loss, model, upstream), gradients(wanted, model, upstream))


def test_export():
    model = Model("plif")
    x, y = batch(6)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    exported = torch.export.export(model, (x, y), dynamic_shapes=({0: tokens}, {0: tokens}))
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert names.count("uncork.linear_cross_entropy.default") == 1
    for size in (6, 9):
        x, y = batch(size)
        torch.testing.assert_close(exported.module()(x, y), model(x, y))


@pytest.mark.skipif(bool(missing), reason=missing)
def test_the_native_tile_serves_a_compiled_model(monkeypatch):
    calls: list[object] = []
    run = NativeTiles._run

    def spy(self, *args):
        calls.append(self)
        return run(self, *args)

    monkeypatch.setattr(NativeTiles, "_run", spy)
    for impl, used in ((None, True), ("native", True), ("torch", False)):
        torch._dynamo.reset()
        calls.clear()
        torch.compile(Model("plif", impl=impl), fullgraph=True, backend="aot_eager")(*batch(5))
        assert bool(calls) == used, impl


def test_a_class_that_does_not_exist_is_said():
    compiled = torch.compile(Model("softmax"), fullgraph=True, backend="aot_eager")
    x, y = batch(5)
    y[3] = VOCAB
    with pytest.raises(IndexError, match=r"target: expected classes in \[0, 11\), got 11 at position 3"):
        compiled(x, y)


# Functions of the user's own ------------------------------------------------------------------------------------------


class Tilt(LogitFunction):
    """a z, of the library's primitive."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def operations(self):
        return (Affine(),)

    def tables(self, dtype=torch.float32, device=None):
        slope = self.raw.exp().to(dtype)
        return (torch.stack([slope, torch.zeros_like(slope)]),)

    def options(self):
        return {}


class Cube(Operation):
    """x + a x^3, a primitive that only Python knows."""

    num_tables = 1

    def forward(self, x, tables, located=()):
        return x + tables[0] * x**3

    def derivative(self, x, tables, located=()):
        return 1 + 3 * tables[0] * x**2

    def table_gradients(self, x, grad, tables, located=()):
        return ((grad * x**3).sum().double().reshape(1),)


class Cubic(LogitFunction):
    def operations(self):
        return (Cube(),)

    def tables(self, dtype=torch.float32, device=None):
        return (constants(dtype, device, 0.2),)

    def options(self):
        return {}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_function_of_the_users_own_made_of_the_primitives(reduction, make_problem):
    problem = make_problem(Tilt())
    wanted = problem.loss(None, reduction=reduction)
    upstream = torch.randn_like(wanted)
    truth = torch.autograd.grad(wanted, problem.operands(), upstream)
    loss = torch.compile(lambda: problem.loss(None, reduction=reduction), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(torch.autograd.grad(loss, problem.operands(), upstream), truth)


@pytest.mark.parametrize(
    ("own", "reduction", "mixture"),
    [("module", "mean", True), ("module", "none", False), ("operation", "mean", False), ("operation", "none", True)],
)
def test_a_function_that_only_python_knows(own, reduction, mixture, make_problem):
    """It breaks the graph and keeps its gradients; under fullgraph=True it raises, or "reference" serves."""
    problem = make_problem("module" if own == "module" else Cubic(), mixture=mixture)
    wanted = problem.loss(None, reduction=reduction)
    upstream = torch.randn_like(wanted)
    truth = torch.autograd.grad(wanted, problem.operands(), upstream)

    def found(impl, fullgraph):
        torch._dynamo.reset()

        def step():
            return problem.loss(impl, reduction=reduction) * 1

        compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
        for _ in range(2):
            loss = compiled()
            torch.testing.assert_close(loss, wanted)
            torch.testing.assert_close(torch.autograd.grad(loss, problem.operands(), upstream), truth)

    found(None, False)
    if own == "module":
        found("reference", True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"which only Python knows.*give impl='reference'"):
        found(None, True)


# The operators --------------------------------------------------------------------------------------------------------


def arguments(problem, **options):
    """An operator's arguments, with leaves in place of the function's tables."""
    call = problem.call()
    given = operator._Arguments.of(call, None)._replace(**options)
    return given._replace(tables=[t.detach().requires_grad_() for t in given.tables])


OPCHECKED = [("none", False), ("none", True), ("plif", False), ("monotone-tanh", False), ("compose", False)]


@pytest.mark.parametrize(("name", "probabilities"), OPCHECKED)
def test_opcheck(name, mixture, probabilities, make_problem):
    problem = make_problem(name, mixture=mixture, probabilities=probabilities)
    given = arguments(problem, chunk_size=4)
    ops, factors = torch.ops.uncork, [torch.rand(5, dtype=torch.float64) for _ in range(2)]
    factors[0].requires_grad_()
    opcheck(ops.linear_cross_entropy.default, (*given, factors[0], None if mixture else factors[1], given.needs()))
    opcheck(ops.token_statistics.default, given)
    opcheck(ops.token_statistics.default, given._replace(details=True))
    needs = given.needs()
    plain = torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, tuple(given))
    opcheck(ops.token_statistics_backward.default, (*plain, factors[1], None, None, needs))


def test_only_the_wanted_gradients_are_made(make_problem):
    problem = make_problem("plif", mixture=True)
    given = arguments(problem)
    shapes = [None if t is None else t.shape for t in given.differentiated()]
    factor = torch.rand(5, dtype=torch.float64)
    for wanted in range(len(shapes)):
        needs = [i == wanted for i in range(len(shapes))]
        made = torch.ops.uncork.linear_cross_entropy(*given, factor, None, needs)[3:]
        assert [g.shape for g in made] == [shapes[i] if i == wanted else (0,) for i in range(len(shapes))]


def test_what_the_operators_refuse(make_problem):
    given = arguments(make_problem("plif"))
    factor = torch.rand(5, dtype=torch.float64)
    total = torch.ops.uncork.linear_cross_entropy(*given, factor, None, given.needs())[0]
    (grad,) = torch.autograd.grad(total, given.input, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported here"):
        grad.sum().backward()
    unwanted = torch.ops.uncork.linear_cross_entropy(*given, factor, None, [False] * 7)[0]
    with pytest.raises(RuntimeError, match="a gradient is asked for now that was not wanted"):
        unwanted.backward()


@pytest.mark.parametrize("function", [None, *(name for name in uncork.logit_functions.base.examples())])
def test_operations_as_text(function, make_function):
    made = None if function is None else make_function(function)
    text = operator.operations_text(made)
    assert operator.operations_from(text) == (() if made is None else made.operations())


def test_nothing_of_this_in_eager(monkeypatch, make_problem):
    """Eager mode keeps its path: neither operator nor its arguments are made."""
    made, real = list[Any](), operator._Arguments.of

    def spied(*given: Any) -> Any:
        made.append(given)
        return real(*given)

    monkeypatch.setattr(operator._Arguments, "of", spied)
    problem = make_problem("plif")
    problem.loss(None).backward()
    problem.statistics(None)
    assert not made
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    problem.loss(None).backward()
    assert len(made) == 1

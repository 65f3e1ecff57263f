"""torch.export and ONNX: every head, with the number of tokens left open, gives eager's numbers."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small import FEATURES, HEADS, VOCAB, moved_head
from uncork import PLIF, Head, LinearHead, Softcap, loss
from uncork.logit_functions import MonotoneNetwork
from uncork.loss import call
from uncork.loss.call import multiplies_bfloat16

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own

METHODS: dict[str, dict[str, Any]] = {
    "forward": {}, "loss": {}, "statistics": {}, "log_prob": {}, "predict": {}, "topk": {"k": 3}, "scores": {}
}  # fmt: skip
WITH_TARGET = ("loss", "statistics")


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


class Method(nn.Module):
    """A head's method as a module: torch.export takes forwards alone."""

    def __init__(self, head: Head, method: str, **options: Any) -> None:
        super().__init__()
        self.head, self.method, self.options = head, method, options

    def forward(self, *given: Tensor) -> Any:
        if self.method == "forward":
            return self.head(*given)
        return getattr(self.head, self.method)(*given, **self.options)


def batch(shape: Sequence[int], target: bool) -> tuple[Tensor, ...]:
    x, y = 3 * torch.randn(*shape, FEATURES), torch.randint(VOCAB, tuple(shape))
    return (x, y) if target else (x,)


def answers(given: Any) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def check(model: nn.Module, target: bool, *, strict: bool, shapes: Sequence[Sequence[int]]) -> None:
    """Exports at the first shape of tokens, all its dimensions open, and compares at the others."""
    names = [torch.export.Dim(f"tokens{i}") for i in range(len(shapes[0]))]
    given = batch(shapes[0], target)
    exported = torch.export.export(
        model, given, dynamic_shapes=(tuple(dict(enumerate(names)) for _ in given),), strict=strict
    )
    for shape in shapes[1:]:
        given = batch(shape, target)
        torch.testing.assert_close(answers(exported.module()(*given)), answers(model(*given)))


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)  # versions between 2.6 and 2.13 were not tried


def skip_what_torch_2_6_cannot(name: str, strict: bool) -> None:
    """It cannot export an autograd.Function strictly on a tensor of open size, and every function of logits is one."""
    if OLD and strict and name not in ("softmax", "mos", "moc"):
        pytest.skip("torch 2.6 cannot export it: Source of 's0' is None when lifting it to input of top-level")


SHAPES = {"flat": [(5,), (1,), (9,), (700,)], "batched": [(2, 3), (4, 5), (3, 170)]}
IN_CI = [
    ("temperature", "forward", True, "flat"),  # a parameter outside of the loss's operator
    ("plif", "forward", False, "batched"),
    ("mop", "loss", True, "flat"),
    ("monotone", "loss", False, "batched"),
    ("plif", "topk", True, "flat"),
]
PRODUCT = [
    case if case in IN_CI else pytest.param(*case, marks=pytest.mark.slow)
    for name, method in itertools.product(HEADS, METHODS)
    for case in ((name, method, True, "flat"), (name, method, False, "batched"))
]


@pytest.mark.parametrize(("name", "method", "strict", "shapes"), PRODUCT)
def test_every_method_with_an_open_number_of_tokens(name, method, strict, shapes):
    if method not in ("loss", "statistics"):
        skip_what_torch_2_6_cannot(name, strict)
    model = Method(moved_head(name), method, **METHODS[method])
    check(model, method in WITH_TARGET, strict=strict, shapes=SHAPES[shapes])
    if method in ("predict", "topk", "log_prob"):  # eager has another path without gradients
        with torch.no_grad():
            check(model, False, strict=strict, shapes=SHAPES[shapes])


class Function(nn.Module):
    """One of the loss's four functions, whose operands all come from outside."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function, self.logit_function = getattr(loss, name), PLIF(6, 2.0)

    def forward(self, *operands: Tensor) -> Any:
        return self.function(*operands, logit_function=self.logit_function)


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["strict", "loose"])
@pytest.mark.parametrize("name", [n for n in loss.__all__ if n[0].islower() and n != "estimate_memory"])  # no tensors
def test_the_functions_themselves(name, strict):
    mixture = name.startswith("mixture")
    tokens = torch.export.Dim("tokens")

    def operands(n: int) -> tuple[Tensor, ...]:
        k = (2,) if mixture else ()
        prior = (torch.randn(n, 2),) if mixture else ()
        return torch.randn(n, *k, FEATURES), torch.randn(VOCAB, FEATURES), *prior, torch.randint(VOCAB, (n,))

    given = operands(5)
    opened: tuple[Any, ...] = tuple(None if i == 1 else {0: tokens} for i in range(len(given)))
    exported = torch.export.export(Function(name), given, dynamic_shapes=(opened,), strict=strict)
    for n in (1, 8, 700):
        given = operands(n)
        torch.testing.assert_close(answers(exported.module()(*given)), answers(Function(name)(*given)))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("method", WITH_TARGET)
@pytest.mark.parametrize("name", ["softmax", "mos"])
def test_the_reference_in_bfloat16(name, method, strict, monkeypatch):
    monkeypatch.setattr(call, "multiplies_bfloat16", multiplies_bfloat16)  # the processor's own answer

    class Cast(Method):
        def forward(self, *given: Tensor) -> Any:
            x, y = given
            return super().forward(x.bfloat16(), y)

    model = Cast(moved_head(name).bfloat16(), method, impl="reference")
    check(model, True, strict=strict, shapes=SHAPES["flat"])


@pytest.mark.skipif(OLD, reason="torch 2.6 saves a graph within torch.autocast that it cannot load")
def test_a_saved_program_loads_where_uncork_is_imported(tmp_path):
    model, given = Method(moved_head("mop"), "loss"), batch((5,), True)
    tokens = torch.export.Dim("tokens")
    exported = torch.export.export(model, given, dynamic_shapes=(({0: tokens},) * 2,))
    torch.export.save(exported, tmp_path / "loss.pt2")
    given = batch((9,), True)
    torch.save(given, tmp_path / "given.pt")
    code = "import torch, uncork; print(torch.export.load('loss.pt2').module()(*torch.load('given.pt')).item())"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(model(*given).item(), rel=1e-6)


def test_what_cannot_be_exported_says_so():
    head = LinearHead(FEATURES, VOCAB, logit_function=nn.Softplus())
    check(Method(head, "forward"), False, strict=True, shapes=SHAPES["flat"])
    check(Method(head, "loss", impl="reference"), True, strict=True, shapes=SHAPES["flat"])
    for strict in (True, False):
        with pytest.raises(Exception, match=r"which only Python knows.*give impl='reference'"):
            check(Method(head, "loss"), True, strict=strict, shapes=SHAPES["flat"])

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = MonotoneNetwork(3, units="tanh")

        def forward(self, x: Tensor) -> Tensor:
            return self.f.inverse(x)

    with pytest.raises(NotImplementedError, match="inverse searches by bisection"):
        torch.export.export(Inverse(), (torch.randn(3),), strict=False)
    with pytest.raises(NotImplementedError, match="inverse searches by bisection"):
        torch.func.vmap(Inverse())(torch.randn(3))
    assert Softcap(3.0).inverse(torch.zeros(1)) == torch.func.vmap(Softcap(3.0).inverse)(torch.zeros(1))


# ONNX -----------------------------------------------------------------------------------------------------------------

ONNX_IN_CI = ("sigsoftmax", "plif")


@pytest.mark.skipif(OLD, reason="tried with torch 2.13 alone")
@pytest.mark.parametrize(
    "name", [name if name in ONNX_IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in HEADS]
)
def test_onnx(name):
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    head = moved_head(name).eval()
    tokens = torch.export.Dim("tokens")
    program = torch.onnx.export(head, batch((5,), False), dynamic_shapes=({0: tokens},), dynamo=True, verbose=False)
    model = program.model_proto
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for n in (1, 300):
        (x,) = batch((n,), False)
        x[0] *= 40  # scores far from 0 on both sides
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        wanted = head(x).detach()
        assert hasattr(head, "latent") or head.scores(x).abs().max() > 30
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-4)
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"Loop", "Scan", "If"}
    if name.startswith(("plif", "mop")):
        assert {"Floor", "Clip", "Gather"} <= kinds
        assert not kinds & {"TopK", "CumSum", "GatherND", "Mod", "ScatterND", "Softplus"}

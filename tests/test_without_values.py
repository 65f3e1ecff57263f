"""On the meta device and with fake tensors every answer of heads and functions has eager's shape and dtype."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vmap

from tests.small import FEATURES, HEADS, VOCAB, moved_head, small_head
from uncork import PLIF, Compose, Head, Scale, Softcap
from uncork.logit_functions.base import examples

HALF = torch.bfloat16
IN_CI = ("softmax", "plif", "mop")
KINDS = pytest.mark.parametrize("kind", ["meta", "fake"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def placed(kind: str) -> Any:
    """Where modules and tensors are made without values."""
    return torch.device("meta") if kind == "meta" else FakeTensorMode()


def told(answer: Any) -> list[tuple[torch.Size, torch.dtype]]:
    tensors = [answer] if isinstance(answer, Tensor) else [t for t in answer if t is not None]
    return [(t.shape, t.dtype) for t in tensors]


def all_answers(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        head: Head = small_head(name)
    finally:
        torch.set_default_dtype(before)
    x, y = torch.randn(*shape, FEATURES, dtype=dtype), torch.randint(VOCAB, shape)
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    return {
        "forward": told(head(x)),
        **{f"loss {r}": told(head.loss(x, y, reduction=r)) for r in ("mean", "sum", "none")},
        "statistics": told(head.statistics(x, y)),
        "statistics without a target": told(head.statistics(x)),
        "log_prob": told(head.log_prob(x)),
        "predict": told(head.predict(x)),
        "topk": told(head.topk(x, 3)),
        "topk without ids": told(head.topk(x, 3, exclude=y[..., None])),
        "topk without masked": told(head.topk(x, 3, exclude=mask)),
        "scores": told(head.scores(x)),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=pytest.mark.slow if kind == "fake" and name not in IN_CI else ())
        for name in HEADS
        for kind in ("meta", "fake")
    ],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_heads(name, grad, kind):
    shape, dtype = ((2, 3), HALF) if grad else ((5,), torch.float32)
    with torch.set_grad_enabled(grad):
        wanted = all_answers(name, shape, dtype)
        with placed(kind):
            assert all_answers(name, shape, dtype) == wanted


FUNCTIONS = {**examples(), "compose": lambda: Compose(Scale(1.3, learnable=True), PLIF(5, 2.0), Softcap(6.0))}


@KINDS
@pytest.mark.parametrize("method", ["forward", "derivative", "inverse"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, method, kind):
    for dtype in (torch.float32, torch.float64, HALF):
        wanted = told(getattr(FUNCTIONS[name](), method)(torch.randn(3, 4, dtype=dtype)))
        with placed(kind):
            assert told(getattr(FUNCTIONS[name](), method)(torch.randn(3, 4, dtype=dtype))) == wanted


# torch.func ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_transforms_of_heads(name):
    """Gradients of each sample, to the parameters and to the input, and every answer under vmap."""
    head = moved_head(name, torch.float64)
    x, y = torch.randn(5, FEATURES, dtype=torch.float64), torch.randint(VOCAB, (5,))
    own = {key: p.detach() for key, p in head.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head.loss(x, y)

    model = Loss()

    def one(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional_call(model, {f"head.{key}": p for key, p in own.items()}, (x, y))

    each = vmap(grad(one), in_dims=(None, 0, 0))(own, x, y)
    torch.testing.assert_close(vmap(jacrev(one), in_dims=(None, 0, 0))(own, x, y), each)
    trained = [p for p in head.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(head.loss(x, y), trained)
    found = [each[key].mean(0) for key, p in head.named_parameters() if p.requires_grad]
    torch.testing.assert_close(found, list(wanted))
    for method, options in (("forward", {}), ("log_prob", {}), ("predict", {}), ("topk", {"k": 3}), ("scores", {})):
        answer = getattr(head, method)
        torch.testing.assert_close(vmap(lambda x, f=answer, o=options: f(x, **o))(x), answer(x, **options))
    torch.testing.assert_close(tuple(vmap(head.statistics)(x, y)), tuple(head.statistics(x, y)))

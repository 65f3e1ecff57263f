"""Held to F.cross_entropy, and for the identity to F.linear_cross_entropy, on random shapes and options."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from uncork.loss import linear_cross_entropy, mixture_cross_entropy

needs_torchs_own = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has F.linear_cross_entropy since 2.13"
)
TOLERANCE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
}
LEADING = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 9)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
)
OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "leading": LEADING,
        "features": st.integers(1, 5),
        "vocab": st.integers(1, 8),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
        "seed": st.integers(0, 2**31),
        "reduction": st.sampled_from(["none", "mean", "sum"]),
        "probabilities": st.booleans(),
        "bias": st.booleans(),
        "weighted": st.sampled_from(["no", "positive", "some zero"]),
        "smoothing": st.sampled_from([0.0, 0.1, 0.9, 1.0]),
        "ignore": st.sampled_from([-100, -1, "class", "all"]),
        "chunk_size": st.sampled_from([None, 1, 2, 5]),
    }
)


class Drawn:
    """Tensors and options of a random case."""

    def __init__(self, case, components: int = 0) -> None:
        g = torch.Generator().manual_seed(case["seed"])
        dtype, vocab, self.leading = case["dtype"], case["vocab"], case["leading"]

        def randn(*shape):
            return torch.randn(*shape, dtype=dtype, generator=g)

        inner = (components, case["features"]) if components else (case["features"],)
        self.input = randn(*self.leading, *inner).requires_grad_()
        self.weight = randn(vocab, case["features"]).requires_grad_()
        self.bias = randn(vocab).requires_grad_() if case["bias"] else None
        self.prior = randn(*self.leading, components).requires_grad_() if components else None
        self.ignore_index = -100
        if case["probabilities"]:
            # F.cross_entropy knows no ignored rows of probabilities; a class as ignore_index is an error in both.
            self.target = torch.rand(*self.leading, vocab, dtype=dtype, generator=g) * 1.5
        else:
            self.target = torch.randint(0, vocab, self.leading, generator=g)
            ignore = case["ignore"]
            self.ignore_index = vocab // 2 if ignore == "class" else -100 if ignore == "all" else ignore
            dropped = torch.rand(self.leading, generator=g) < (1.1 if ignore == "all" else 0.3)
            self.target[dropped] = self.ignore_index
        self.class_weight = None
        if case["weighted"] != "no":
            self.class_weight = torch.rand(vocab, dtype=dtype, generator=g) + 0.1
            if case["weighted"] == "some zero":
                self.class_weight[torch.rand(vocab, generator=g) < 0.3] = 0
        self.options = {
            "weight": self.class_weight,
            "reduction": case["reduction"],
            "ignore_index": self.ignore_index,
            "label_smoothing": case["smoothing"],
        }
        self.operands = [t for t in (self.input, self.weight, self.bias, self.prior) if t is not None]
        self.generator = g

    def flat_target(self):
        return self.target.reshape(math.prod(self.leading), *self.target.shape[len(self.leading) :])

    def assert_same(self, ours, truth, tolerance, grad_tolerance=None) -> None:
        torch.testing.assert_close(ours, truth, equal_nan=True, **tolerance)
        assert ours.shape == truth.shape
        upstream = torch.randn(truth.shape, dtype=truth.dtype, generator=self.generator)
        got = torch.autograd.grad(ours, self.operands, upstream)
        if not truth.isfinite().all():
            # 0 / 0: torch's own gradients are 0 or nan by reduction and target kind; ours are 0.
            assert all(not g.any() for g in got)
            return
        wanted = torch.autograd.grad(truth, self.operands, upstream)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **(grad_tolerance or tolerance))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=OPTIONS)
def test_cross_entropy(impl, case):
    drawn = Drawn(case)
    ours = linear_cross_entropy(
        drawn.input,
        drawn.weight,
        drawn.target,
        linear_bias=drawn.bias,
        impl=impl,
        chunk_size=case["chunk_size"],
        **drawn.options,
    )
    logits = F.linear(drawn.input, drawn.weight, drawn.bias).reshape(math.prod(drawn.leading), case["vocab"])
    truth = F.cross_entropy(logits, drawn.flat_target(), **drawn.options)
    if case["reduction"] == "none":
        truth = truth.reshape(drawn.leading)
    drawn.assert_same(ours, truth, TOLERANCE[case["dtype"]])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=OPTIONS, components=st.integers(1, 3))
def test_mixture_cross_entropy(impl, case, components):
    drawn = Drawn(case, components)
    ours = mixture_cross_entropy(
        drawn.input,
        drawn.weight,
        drawn.prior,
        drawn.target,
        linear_bias=drawn.bias,
        impl=impl,
        chunk_size=case["chunk_size"],
        **drawn.options,
    )
    prob = F.linear(drawn.input, drawn.weight, drawn.bias).softmax(-1)
    mixed = (drawn.prior.softmax(-1)[..., None] * prob).sum(-2).log().reshape(math.prod(drawn.leading), case["vocab"])
    truth = F.cross_entropy(mixed, drawn.flat_target(), **drawn.options)
    if case["reduction"] == "none":
        truth = truth.reshape(drawn.leading)
    drawn.assert_same(ours, truth, TOLERANCE[case["dtype"]])


# torch's op takes (D,) or (N, D); its chunked path serves int64 targets without smoothing (anything else falls back to
# its reference path with a warning) and at least one row.
TORCH_CASES = OPTIONS.map(lambda case: {**case, "leading": case["leading"][:1]})


@needs_torchs_own
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=TORCH_CASES)
def test_linear_cross_entropy_of_torch(impl, case):
    drawn = Drawn(case)
    args = (drawn.input, drawn.weight, drawn.target)
    options = dict(drawn.options)
    ours = linear_cross_entropy(*args, linear_bias=drawn.bias, impl=impl, chunk_size=case["chunk_size"], **options)
    if case["probabilities"]:
        options["ignore_index"] = None  # torch refuses any other with probabilities
    truth = F.linear_cross_entropy(*args, linear_bias=drawn.bias, options=None, **options)
    drawn.assert_same(ours, truth, TOLERANCE[case["dtype"]])


@needs_torchs_own
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=TORCH_CASES, rows=st.integers(1, 4))
def test_chunked_linear_cross_entropy_of_torch(impl, case, rows):
    case = {**case, "probabilities": False, "smoothing": 0.0}
    if case["leading"] == (0,):
        case["leading"] = (1,)
    drawn = Drawn(case)
    args = (drawn.input, drawn.weight, drawn.target)
    chunked = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows, chunking_method=None, acc_policy="accurate", allow_retain_graph=True
    )
    ours = linear_cross_entropy(*args, linear_bias=drawn.bias, impl=impl, chunk_size=rows, **drawn.options)
    truth = F.linear_cross_entropy(*args, linear_bias=drawn.bias, options=chunked, **drawn.options)
    drawn.assert_same(ours, truth, TOLERANCE[case["dtype"]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, 40, 999])
def test_any_integer_dtype(impl, dtype, ignore_index):
    """With 300 words: what 8 and 16 bits cannot hold must not wrap into another number."""
    input, weight = torch.randn(6, 4), torch.randn(300, 4)
    wide = torch.tensor([0, 40, 44, 99, 120, 156 if dtype != torch.int8 else 1])
    ours = linear_cross_entropy(input, weight, wide.to(dtype), impl=impl, ignore_index=ignore_index, reduction="none")
    truth = F.cross_entropy(F.linear(input, weight), wide, ignore_index=ignore_index, reduction="none")
    torch.testing.assert_close(ours, truth)

"""Bad arguments get an error that names the argument, what was expected and what came."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uncork import PLIF
from uncork.loss import linear_cross_entropy, mixture_cross_entropy, mixture_token_statistics, token_statistics

N, D, V, K = 4, 3, 6, 2
META = torch.device("meta")


class NotElementwise(nn.Module):
    """Turns (N, V) into (N, 1), which would broadcast."""

    def forward(self, scores):
        return scores.sum(-1, keepdim=True)


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Tanh(), nn.Dropout(0.1))

    def forward(self, scores):
        return self.inner(scores)


def arguments(mixture):
    made = {"linear_weight": torch.randn(V, D), "target": torch.tensor([0, 5, -100, 2])}
    if mixture:
        return {"latent": torch.randn(N, K, D), "prior_logits": torch.randn(N, K), **made}
    return {"input": torch.randn(N, D), **made}


def call(mixture, changes, statistics=False):
    args = {**arguments(mixture), **changes}
    names = ("latent", "linear_weight", "prior_logits", "target") if mixture else ("input", "linear_weight", "target")
    positional = [args.pop(name) for name in names]
    losses = (linear_cross_entropy, mixture_cross_entropy)
    statistic = (token_statistics, mixture_token_statistics)
    return (statistic if statistics else losses)[mixture](*positional, **args)


# What is wrong with an argument that all four functions take: (changes, error, what the message says).
EVERYWHERE = {
    "weight not a tensor": ({"linear_weight": [[1.0]]}, TypeError, "linear_weight: expected a Tensor, got list"),
    "weight of one dimension": ({"linear_weight": torch.randn(D)}, ValueError, r"linear_weight: .*got \(3,\)"),
    "weight of three dimensions": ({"linear_weight": torch.randn(V, D, 1)}, ValueError, "linear_weight: .*got"),
    "weight of no class": ({"linear_weight": torch.randn(0, D)}, ValueError, r"linear_weight: .*got \(0, 3\)"),
    "weight of integers": ({"linear_weight": torch.ones(V, D).long()}, TypeError, "linear_weight: .*int64"),
    "weight of another dtype": ({"linear_weight": torch.randn(V, D).double()}, ValueError, "linear_weight: .*float64"),
    "weight elsewhere": ({"linear_weight": torch.randn(V, D, device=META)}, ValueError, "linear_weight: .*meta"),
    "bias not a tensor": ({"linear_bias": [0.0] * V}, TypeError, "linear_bias: expected a Tensor, got list"),
    "bias of another length": ({"linear_bias": torch.randn(V + 1)}, ValueError, r"linear_bias: .*\(6,\).*\(7,\)"),
    "bias of integers": ({"linear_bias": torch.ones(V).long()}, TypeError, "linear_bias: .*int64"),
    "bias of another dtype": ({"linear_bias": torch.randn(V).half()}, ValueError, "linear_bias: .*float16"),
    "bias elsewhere": ({"linear_bias": torch.randn(V, device=META)}, ValueError, "linear_bias: .*meta"),
    "target not a tensor": ({"target": [0, 1, 2, 3]}, TypeError, "target: expected a Tensor, got list"),
    "target too short": ({"target": torch.tensor([0, 1, 2])}, ValueError, r"target: .*\(4,\).*\(3,\)"),
    "target of two dimensions": ({"target": torch.zeros(N, 1).long()}, ValueError, r"target: .*got \(4, 1\)"),
    "target of V": ({"target": torch.tensor([0, V, 1, 2])}, IndexError, "target: .*got 6 at position 1"),
    "target of -1": ({"target": torch.tensor([0, 1, 2, -1])}, IndexError, "target: .*got -1 at position 3"),
    "counts as whole numbers": (
        {"target": torch.ones(N, V).long()},
        ValueError,
        r"target: .*\(4,\) for indices \(probabilities are floating: target\.float\(\)\), got \(4, 6\)",
    ),
    "target of bools": ({"target": torch.ones(N).bool()}, TypeError, "target: .*bool"),
    "target complex": ({"target": torch.ones(N).cfloat()}, TypeError, "target: .*complex64"),
    "target elsewhere": ({"target": torch.zeros(N, device=META).long()}, ValueError, "target: .*meta"),
    "floating indices": (
        {"target": torch.ones(N)},
        ValueError,
        r"target: .*\(4, 6\) for probabilities \(indices.*long.*\(4,\)",
    ),
    "probabilities too narrow": ({"target": torch.rand(N, V - 1)}, ValueError, r"target: .*got \(4, 5\)"),
    "probabilities ask for a gradient": (
        {"target": torch.rand(N, V, requires_grad=True)},
        ValueError,
        "target: .*requires_grad",
    ),
    "function no module": ({"logit_function": torch.tanh}, TypeError, "logit_function: expected an nn.Module"),
    "function a class": (
        {"logit_function": PLIF},
        TypeError,
        r"logit_function: expected an nn\.Module or None, got the class PLIF and no instance of it: write PLIF\(",
    ),
    "function with dropout": ({"logit_function": WithDropout()}, ValueError, "logit_function: .*Dropout"),
    "unknown impl": ({"impl": "fast"}, ValueError, "impl: .*reference.*torch.*'fast'"),
    "impl in a list": ({"impl": ["torch"]}, ValueError, r"impl: expected one of .*, got \['torch'\]"),
    "ignore_index of more than 64 bits": ({"ignore_index": 10**30}, ValueError, "ignore_index: .*64 bits.*got 10{30}$"),
    "ignore_index of 2^63": ({"ignore_index": 2**63}, ValueError, f"ignore_index: .*64 bits.*got {2**63}"),
    "sparse weight": ({"linear_weight": torch.ones(V, D).to_sparse()}, TypeError, "linear_weight: .*dense.*sparse_coo"),
    "sparse bias": ({"linear_bias": torch.ones(V).to_sparse()}, TypeError, "linear_bias: .*dense.*sparse_coo"),
    "sparse target": ({"target": torch.ones(N).long().to_sparse()}, TypeError, "target: .*dense.*sparse_coo"),
    "chunk of 0": ({"chunk_size": 0}, ValueError, "chunk_size: .*got 0"),
    "chunk of -1": ({"chunk_size": -1}, ValueError, "chunk_size: .*got -1"),
    "chunk of 1.5": ({"chunk_size": 1.5}, ValueError, "chunk_size: .*got 1.5"),
    "chunk of True": ({"chunk_size": True}, ValueError, "chunk_size: .*got True"),
}
LOSSES = {
    "class weights not a tensor": ({"weight": [1.0] * V}, TypeError, "weight: expected a Tensor, got list"),
    "class weights too short": ({"weight": torch.ones(V - 1)}, ValueError, r"weight: .*\(6,\).*\(5,\)"),
    "class weights elsewhere": ({"weight": torch.ones(V, device=META)}, ValueError, "weight: .*meta"),
    "class weights complex": ({"weight": torch.ones(V).cfloat()}, TypeError, "weight: .*complex64"),
    "class weights ask for a gradient": ({"weight": torch.ones(V).requires_grad_()}, ValueError, "weight: .*grad"),
    "token weights not a tensor": ({"token_weight": [1.0] * N}, TypeError, "token_weight: .*got list"),
    "token weights too short": ({"token_weight": torch.ones(N - 1)}, ValueError, r"token_weight: .*\(4,\).*\(3,\)"),
    "token weights elsewhere": ({"token_weight": torch.ones(N, device=META)}, ValueError, "token_weight: .*meta"),
    "token weights complex": ({"token_weight": torch.ones(N).cfloat()}, TypeError, "token_weight: .*complex64"),
    "unknown reduction": ({"reduction": "avg"}, ValueError, "reduction: .*'avg'"),
    "reduction in an array": ({"reduction": np.array(["mean", "sum"])}, ValueError, "reduction: expected .*array"),
    "no reduction": ({"reduction": None}, ValueError, "reduction: .*None"),
    "ignore_index 1.5": ({"ignore_index": 1.5}, TypeError, "ignore_index: .*float"),
    "smoothing of 1.1": ({"label_smoothing": 1.1}, ValueError, "label_smoothing: .*1.1"),
    "smoothing of -0.1": ({"label_smoothing": -0.1}, ValueError, "label_smoothing: .*-0.1"),
    "smoothing of nan": ({"label_smoothing": float("nan")}, ValueError, "label_smoothing: .*nan"),
    "smoothing of a word": ({"label_smoothing": "a"}, TypeError, "label_smoothing: .*str"),
    "a class ignored among probabilities": (
        {"target": torch.rand(N, V), "ignore_index": 0},
        ValueError,
        "ignore_index: .*got 0",
    ),
}
LINEAR = {
    "input not a tensor": ({"input": None}, TypeError, "input: expected a Tensor, got NoneType"),
    "input of other features": ({"input": torch.randn(N, D + 1)}, ValueError, r"input: .*\(6, 3\).*\(4, 4\)"),
    "input of no dimension": ({"input": torch.tensor(1.0)}, ValueError, r"input: .*got \(\)"),
    "input of integers": ({"input": torch.ones(N, D).long()}, TypeError, "input: .*int64"),
    "input complex": ({"input": torch.ones(N, D).cfloat()}, TypeError, "input: .*complex64"),
    "no feature": ({"input": torch.ones(N, 0), "linear_weight": torch.ones(V, 0)}, ValueError, "linear_weight: "),
    "z-loss of -1": ({"z_loss": -1.0}, ValueError, "z_loss: .*-1"),
    "z-loss of nan": ({"z_loss": float("nan")}, ValueError, "z_loss: .*nan"),
    "z-loss of inf": ({"z_loss": float("inf")}, ValueError, "z_loss: .*inf"),
    "z-loss beyond floats": ({"z_loss": 10**400}, ValueError, "z_loss: expected a finite number.*got 10{400}$"),
    "z-loss of a word": ({"z_loss": "a"}, TypeError, "z_loss: .*str"),
}
MIXTURE = {
    "latent not a tensor": ({"latent": None}, TypeError, "latent: expected a Tensor"),
    "latent of other features": ({"latent": torch.randn(N, K, D + 1)}, ValueError, r"latent: .*got \(4, 2, 4\)"),
    "latent without components": ({"latent": torch.randn(D)}, ValueError, r"latent: .*got \(3,\)"),
    "no component": (
        {"latent": torch.randn(N, 0, D), "prior_logits": torch.randn(N, 0)},
        ValueError,
        r"latent: expected at least one component, got \(4, 0, 3\)",
    ),
    "no prior": ({"prior_logits": None}, TypeError, "prior_logits: expected a Tensor"),
    "prior not a tensor": ({"prior_logits": [[0.0] * K] * N}, TypeError, "prior_logits: .*got list"),
    "prior of other components": ({"prior_logits": torch.randn(N, K + 1)}, ValueError, r"prior_logits: .*\(4, 3\)"),
    "prior of other tokens": ({"prior_logits": torch.randn(1, K)}, ValueError, r"prior_logits: .*\(1, 2\)"),
    "prior of integers": ({"prior_logits": torch.zeros(N, K).long()}, TypeError, "prior_logits: .*int64"),
    "prior elsewhere": ({"prior_logits": torch.randn(N, K, device=META)}, ValueError, "prior_logits: .*meta"),
}


@pytest.mark.parametrize("case", EVERYWHERE)
@pytest.mark.parametrize("statistics", [False, True], ids=["loss", "statistics"])
def test_arguments_of_all(mixture, statistics, case):
    changes, error, message = EVERYWHERE[case]
    with pytest.raises(error, match=message):
        call(mixture, changes, statistics)


@pytest.mark.parametrize("case", LOSSES)
def test_arguments_of_the_losses(mixture, case):
    changes, error, message = LOSSES[case]
    with pytest.raises(error, match=message):
        call(mixture, changes)


@pytest.mark.parametrize("case", LINEAR)
def test_arguments_of_the_linear_loss(case):
    changes, error, message = LINEAR[case]
    with pytest.raises(error, match=message):
        call(False, changes)


@pytest.mark.parametrize("case", MIXTURE)
@pytest.mark.parametrize("statistics", [False, True], ids=["loss", "statistics"])
def test_arguments_of_mixtures(statistics, case):
    changes, error, message = MIXTURE[case]
    with pytest.raises(error, match=message):
        call(True, changes, statistics)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 3), (2, 1, 3)])
def test_a_class_that_does_not_exist_is_told_where_it_stands(mixture, shape):
    target = torch.zeros(shape, dtype=torch.int64)
    last = tuple(size - 1 for size in shape)
    target[last] = V
    more = {"prior_logits": torch.randn(*shape, K)} if mixture else {}
    given = {"latent": torch.randn(*shape, K, D)} if mixture else {"input": torch.randn(*shape, D)}
    where = f" at position {last[0] if len(shape) == 1 else last}" if shape else ""
    for statistics in (False, True):
        with pytest.raises(IndexError, match=re.escape(f"ignore_index -100, got {V}{where}") + "$"):
            call(mixture, {"target": target, **given, **more}, statistics)


def test_a_module_that_is_not_elementwise(module_impl, mixture):
    with pytest.raises(ValueError, match=r"logit_function: expected an elementwise module.*\(.*6\).*\(.*1\)"):
        call(mixture, {"logit_function": NotElementwise(), "impl": module_impl})


class Returns(nn.Module):
    """Returns what another function makes of the logits 2 z."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, scores):
        return self.made(2 * scores)


@pytest.mark.parametrize("statistics", [False, True], ids=["loss", "statistics"])
@pytest.mark.parametrize(
    ("made", "got"),
    [
        (lambda z: (z, z), "a module that returns a Tensor, got tuple"),
        (lambda z: z.detach().numpy(), "a module that returns a Tensor, got ndarray"),
        (lambda z: z.long(), r"a module that returns a floating dtype, got torch\.int64"),
        (lambda z: z.cfloat(), r"a module that returns a floating dtype, got torch\.complex64"),
    ],
)
def test_a_module_that_returns_no_logits(module_impl, mixture, statistics, made, got):
    with pytest.raises(TypeError, match=f"^logit_function: expected {got}$"):
        call(mixture, {"logit_function": Returns(made), "impl": module_impl}, statistics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_may_return_another_dtype(module_impl, mixture, dtype):
    torch.manual_seed(0)
    given = arguments(mixture)
    given["linear_weight"].requires_grad_()
    wanted, found = (
        call(mixture, {**given, "logit_function": Returns(made), "impl": module_impl})
        for made in (lambda z: z.to(dtype).float(), lambda z: z.to(dtype))
    )
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(loss, given["linear_weight"])[0] for loss in (wanted, found)]
    torch.testing.assert_close(*gradients)
    statistics = call(mixture, {**given, "logit_function": Returns(lambda z: z.to(dtype)), "impl": module_impl}, True)
    assert statistics.log_prob.dtype == torch.float32


def test_a_class_as_ignore_index_is_fine(impl, mixture):
    assert call(mixture, {"ignore_index": 2, "target": torch.tensor([0, 5, 2, 2]), "impl": impl}).isfinite()


def test_numbers_of_any_kind_and_size(impl, mixture):
    some = arguments(mixture)
    for name in ("label_smoothing", *([] if mixture else ["z_loss"])):
        half = call(mixture, {**some, name: 0.5, "impl": impl})
        assert all(call(mixture, {**some, name: kind(0.5), "impl": impl}) == half for kind in (Fraction, np.float32))
    whole = call(mixture, {**some, "impl": impl})
    for name in ("chunk_size", "memory_budget"):
        torch._dynamo.reset()
        step = torch.compile(lambda name=name: call(mixture, {**some, name: 10**30, "impl": impl}), backend="eager")
        torch.testing.assert_close(step(), whole)


def test_everything_after_target_is_keyword_only():
    input, weight = torch.randn(N, D), torch.randn(V, D)
    with pytest.raises(TypeError, match="positional"):
        linear_cross_entropy(input, weight, torch.zeros(N).long(), torch.randn(V))  # type: ignore[call-arg]


def test_good_arguments_pass(impl, mixture):
    """The table's base case is sound: what raises above raises for its own reason."""
    assert call(mixture, {"impl": impl}).isfinite()
    assert call(mixture, {"impl": impl}, statistics=True).entropy.isfinite().all()


@pytest.mark.parametrize("kind", ["index", "probabilities"])
def test_ignore_index_none_is_torchs(impl, kind):
    """torch.nn.functional.linear_cross_entropy takes None for -100, or for nothing where targets are probabilities."""
    input, weight = torch.randn(4, 3), torch.randn(6, 3)
    target = torch.tensor([0, -100, 5, 2]) if kind == "index" else torch.rand(4, 6)
    ours = linear_cross_entropy(input, weight, target, ignore_index=None, impl=impl)
    torch.testing.assert_close(ours, F.cross_entropy(F.linear(input, weight), target))
    if hasattr(F, "linear_cross_entropy"):
        torch.testing.assert_close(ours, F.linear_cross_entropy(input, weight, target, ignore_index=None))


def test_a_mixture_has_no_z_loss():
    """Its logits are log-probabilities, whose logsumexp is 0."""
    latent, weight, prior = torch.randn(2, 2, 3), torch.randn(5, 3), torch.zeros(2, 2)
    with pytest.raises(TypeError, match=r"mixture_cross_entropy\(\) got an unexpected keyword argument 'z_loss'"):
        mixture_cross_entropy(latent, weight, prior, torch.tensor([0, 1]), z_loss=0.1)  # type: ignore[call-arg]

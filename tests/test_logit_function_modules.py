"""What the modules promise beside their equations: specs, starts, errors that name the argument, a user's class."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from uncork import (
    PLIF,
    AsymmetricSoftcap,
    Compose,
    GeneralizedSigsoftmax,
    LinearHead,
    LogitFunction,
    MixtureHead,
    MonotoneNetwork,
    Scale,
    ScaledSigmoid,
    Softcap,
    head_from_spec,
)
from uncork.logit_functions.base import examples

F64 = torch.float64


class Arctan(LogitFunction):
    """A user's bounded function, known by its equation alone."""

    unbounded = False

    def transform(self, scores):
        return torch.atan(scores)

    def options(self):
        return {}


@torch.no_grad()
def test_a_users_function_has_an_inverse_inside_its_image():
    x = torch.linspace(-3, 3, 13, dtype=F64)
    torch.testing.assert_close(Arctan().inverse(Arctan()(x)), x, rtol=1e-12, atol=1e-12)
    assert Arctan().operations() is None
    with pytest.raises(NotImplementedError, match="Arctan"):
        Arctan().derivative(x)


@torch.no_grad()
def test_an_inverse_outside_the_image_ends():
    class Counting(Arctan):
        calls = 0

        def transform(self, scores):
            Counting.calls += 1
            assert Counting.calls < 10_000, "the search for a bracket does not end"
            return super().transform(scores)

    inside, outside = Counting().inverse(torch.tensor([1.0, 2.0], dtype=F64)).tolist()
    assert abs(inside - math.tan(1.0)) < 1e-12
    assert not math.isfinite(outside)


class TwiceInPlace(LogitFunction):
    """A user's function that works in place."""

    def transform(self, scores):
        return scores.mul_(2)

    def options(self):
        return {}


@pytest.mark.parametrize("make", [LinearHead, partial(MixtureHead, num_components=2)])
@pytest.mark.parametrize("name", ["SELU", "LeakyReLU", "TwiceInPlace", "Compose"])
def test_a_function_may_work_in_place(name, make):
    torch.manual_seed(0)
    functions = {
        "SELU": nn.SELU(inplace=True),
        "LeakyReLU": nn.Sequential(nn.LeakyReLU(inplace=True)),
        "TwiceInPlace": TwiceInPlace(),
        "Compose": Compose(TwiceInPlace(), PLIF(4)),
    }
    head, input, target = make(8, 20, logit_function=functions[name]), 3 * torch.randn(6, 8), torch.arange(6)
    log_prob = functions[name](head.scores(input).detach().clone()).log_softmax(-1)
    if isinstance(head, MixtureHead):
        log_prob = (log_prob + head.prior(input).log_softmax(-1)[..., None]).logsumexp(1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(head.log_prob(input), log_prob)
            found, ids = head.topk(input, 3)
            torch.testing.assert_close(found, log_prob.gather(-1, ids))
            for impl in ("torch", "reference"):
                loss = head.loss(input, target, impl=impl)
                torch.testing.assert_close(loss, nn.functional.nll_loss(log_prob, target))
                statistics = head.statistics(input, target, impl=impl)
                torch.testing.assert_close(statistics.log_prob, log_prob[target, target])
                assert torch.equal(statistics.argmax, ids[:, 0])
    gradients = [
        torch.autograd.grad(head.loss(input, target, impl=impl), head.weight)[0] for impl in ("torch", "reference")
    ]
    torch.testing.assert_close(*gradients)


def test_an_inverse_of_a_function_that_works_in_place():
    logits = torch.tensor([1.0, -2.0])
    assert TwiceInPlace().inverse(logits).tolist() == [0.5, -1.0]
    assert logits.tolist() == [1.0, -2.0]


def test_specs_that_are_not_known_here():
    with pytest.raises(ValueError, match=r"spec: expected a name among .*PLIF.*, got 'Nothing'"):
        LogitFunction.from_spec({"name": "Nothing", "version": 1, "options": {}})
    with pytest.raises(ValueError, match="spec: PLIF is at version 1 here, got version 99"):
        LogitFunction.from_spec({**PLIF().spec(), "version": 99})


@pytest.mark.parametrize("damage", [None, "plif", 3, PLIF])
def test_a_spec_is_a_dict(damage):
    with pytest.raises(TypeError, match=r"^spec: expected the dict that a function's spec.* gives, got "):
        LogitFunction.from_spec(damage)
    with pytest.raises(TypeError, match=r"^spec: expected the dict that .* gives, got "):
        head_from_spec(damage)
    if damage is not None:
        with pytest.raises(TypeError, match=r"^spec: expected the dict that a function's spec.* gives, got "):
            head_from_spec({**LinearHead(2, 3, logit_function=PLIF()).spec(), "logit_function": damage})


def test_options_that_a_spec_lacks_or_has_too_many_are_named():
    function, head = Softcap(3.0).spec(), LinearHead(2, 3).spec()
    composed = Compose(Softcap(3.0)).spec()
    for from_spec, spec, options, message in (
        (LogitFunction.from_spec, function, {"cup": 3.0}, "options of Softcap, .* unexpected keyword argument 'cup'"),
        (LogitFunction.from_spec, composed, {}, "functions, a list of specs, as the option of Compose, got {}"),
        (LogitFunction.from_spec, composed, {"functions": "plif"}, "functions, a list of specs, as the option"),
        (LogitFunction.from_spec, composed, {**composed["options"], "more": 1}, "functions, a list of specs, as the"),
        (head_from_spec, head, {"in_features": 2}, "options of LinearHead, .* missing .* 'vocab_size'"),
        (
            head_from_spec,
            head,
            {**head["options"], "logit_function": None},
            "options of LinearHead, .* 'logit_f",
        ),
        (head_from_spec, head, {**head["options"], "num_pieces": 3}, "options of LinearHead, .* 'num_pieces'"),
    ):
        with pytest.raises(ValueError, match=f"^spec: expected (the )?{message}"):
            from_spec({**spec, "options": options})
    for name in (["LinearHead"], None):
        with pytest.raises(ValueError, match=r"^spec: expected a name among "):
            head_from_spec({**head, "name": name})


def test_repr_says_the_hyper_parameters():
    assert repr(PLIF(7, 5.0)).startswith("PLIF(num_pieces=7, bound=5.0, init='identity'")
    assert "cap=20.0" in repr(Compose(Scale(0.5), Softcap(20.0)))


@pytest.mark.parametrize("make", [PLIF, MonotoneNetwork, lambda **k: MonotoneNetwork(units="tanh", **k)])
def test_frozen_and_random_starts(make):
    torch.manual_seed(0)
    frozen = make(init="random", frozen=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    x = (torch.randn(50) * 9).requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in frozen.parameters())
    assert not torch.equal(frozen(x), x)
    assert not torch.equal(frozen(x), make(init="random")(x))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        *[(lambda v=v: PLIF(v), "num_pieces") for v in (0, -1, 2.5, True, math.nan, math.inf)],
        *[(lambda v=v: MonotoneNetwork(v), "num_units") for v in (0, -1, 2.5, True, math.nan, math.inf)],
        *[(lambda v=v: PLIF(4, v), "bound") for v in (0, -20.0, math.nan, math.inf)],
        *[(lambda v=v: MonotoneNetwork(4, v), "bound") for v in (0, -20.0, math.nan, math.inf)],
        (lambda: PLIF(init="zeros"), "init"),
        (lambda: PLIF(spread=-1.0), "spread"),
        (lambda: MonotoneNetwork(units="gelu"), "units"),
        (lambda: MonotoneNetwork(init="zeros"), "init"),
        (lambda: Scale(0.0), "factor"),
        (lambda: Softcap(-30.0), "cap"),
        (lambda: Softcap(math.nan), "cap"),
        (lambda: AsymmetricSoftcap(lower=0.0), "lower"),
        (lambda: AsymmetricSoftcap(upper=math.inf), "upper"),
        (lambda: ScaledSigmoid(height=-1.0), "height"),
        (lambda: ScaledSigmoid(width=0.0), "width"),
        (lambda: ScaledSigmoid(shift=math.nan), "shift"),
        (lambda: GeneralizedSigsoftmax(steepness=0.0), "steepness"),
        (lambda: GeneralizedSigsoftmax(center=math.inf), "center"),
        *[(lambda v=v: PLIF(frozen=v), "frozen") for v in ("False", "no", 0, None)],
        (lambda: PLIF(unit_slope="False"), "unit_slope"),
        (lambda: MonotoneNetwork(frozen="False"), "frozen"),
        *[(lambda f=f: f(learnable="False"), "learnable") for f in (Scale, AsymmetricSoftcap, GeneralizedSigsoftmax)],
        (lambda: PLIF.from_function(torch.tanh, frozen="False"), "frozen"),
    ],
)
def test_bad_hyper_parameters_are_named(make, argument):
    with pytest.raises((ValueError, TypeError), match=f"^{argument}: expected .* got "):
        make()


def test_a_switch_may_be_numpys():
    assert PLIF(frozen=np.False_).options()["frozen"] is False
    assert Scale(learnable=np.True_).options()["learnable"] is True


def test_compose_takes_logit_functions():
    parts = [Softcap(3.0), Softcap(2.0)]
    for several in (parts, tuple(parts), nn.ModuleList(parts), nn.Sequential(*parts)):
        with pytest.raises(TypeError, match=rf"got {type(several).__name__}: write Compose\(\*functions\)$"):
            Compose(several)
    with pytest.raises(TypeError, match="expected LogitFunctions, got the class Softcap and no instance of it"):
        Compose(Softcap)
    with pytest.raises(TypeError, match=r"expected LogitFunctions, got Tanh$"):
        Compose(Scale(2.0), nn.Tanh())


def test_a_subclass_with_another_equation_needs_its_own_operations():
    """The fused loss computes from operations(): an inherited one would be the parent's function, silently."""
    with pytest.raises(TypeError, match="Tripled overrides transform and inherits operations"):

        class Tripled(Softcap):
            def transform(self, scores):
                return 3 * super().transform(scores)


def test_a_name_stands_for_one_class():
    with pytest.raises(TypeError, match="a LogitFunction called Softcap stands in"):
        type("Softcap", (LogitFunction,), {"transform": lambda self, z: z, "options": lambda self: {}})


@pytest.mark.parametrize("function", [Softcap(5.0), Scale(2.0), ScaledSigmoid(), PLIF(4), AsymmetricSoftcap(1.0, 2.0)])
@torch.no_grad()
def test_inverse_keeps_impossible_words_and_computes_half_precision_in_float32(function):
    assert function.inverse(torch.tensor([-math.inf])).item() == -math.inf
    assert function.inverse(torch.tensor([0.5], dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(TypeError, match="floating"):
        function.inverse(torch.tensor([1]))


def test_tables_stand_on_the_device_of_the_scores():
    for function in (Softcap(), Scale(), ScaledSigmoid(), GeneralizedSigsoftmax(), Compose(Softcap(), Scale(0.5))):
        assert {t.device.type for t in function.tables(device=torch.device("meta"))} == {"meta"}
    for function in (PLIF(3), MonotoneNetwork(3), Scale(learnable=True), AsymmetricSoftcap(learnable=True)):
        assert {t.device.type for t in function.to("meta").tables()} == {"meta"}


@pytest.mark.parametrize("name", examples())
def test_a_function_with_parameters_can_be_reset(name):
    function = examples()[name]()
    with torch.no_grad():
        for p in function.parameters():
            p.fill_(7)
    for module in function.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any((p == 7).any() for p in function.parameters())

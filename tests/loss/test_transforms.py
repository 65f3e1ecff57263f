"""What torch does with a loss beside running it: functional_call, parametrisations, copies, torch.func, meta, fakes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.utils import parametrize

from uncork import LogitFunction
from uncork.loss import implementations, linear_cross_entropy, mixture_cross_entropy, token_statistics
from uncork.loss.call import build_call

LEARNED = ["scale", "asymmetric-softcap", "gss-learned", "monotone-relu", "monotone-tanh", "plif", "compose", "module"]


class Fused(nn.Module):
    """The loss as a module, so that its function's parameters can be put in from outside."""

    def __init__(self, function: nn.Module | None, impl: str | None, **options) -> None:
        super().__init__()
        self.function, self.impl, self.options = function, impl, options

    def forward(self, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(input, weight, target, logit_function=self.function, impl=self.impl, **self.options)


def other_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: (p.detach() + 0.3 * torch.randn_like(p)) for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_functional_call(impl, name, reduction, make_problem):
    """Value and gradients are those of the parameters put in, in a backward after the call too."""
    problem = make_problem(name)
    model = Fused(problem.function, impl, reduction=reduction, chunk_size=2)
    given = {key: value.requires_grad_() for key, value in other_parameters(model).items()}
    loss = functional_call(model, given, (problem.input, problem.weight, problem.target))
    upstream = torch.randn_like(loss)
    got = torch.autograd.grad(loss, [*given.values(), problem.input], upstream, retain_graph=True)
    again = torch.autograd.grad(loss, [*given.values(), problem.input], upstream)
    twin = copy.deepcopy(model)
    twin.load_state_dict(given)
    truth = twin(problem.input, problem.weight, problem.target)
    wanted = torch.autograd.grad(truth, [*twin.parameters(), problem.input], upstream)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(again, wanted)
    assert any(g.any() for g in got[:-1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_that_come_back_as_copies(module_impl, reduction, make_problem):
    problem = make_problem("module")
    wanted = torch.autograd.grad(problem.loss(module_impl, reduction=reduction).sum(), problem.operands())
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        loss = problem.loss(module_impl, reduction=reduction).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, problem.operands()), wanted)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parametrised(impl, name, reduction, make_problem):
    problem = make_problem(name)
    plain = copy.deepcopy(problem.function)
    for module in list(problem.function.modules()):
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                parametrize.register_parametrization(module, key, Doubled())
    with torch.no_grad():
        for ours, theirs in zip(problem.function.parameters(), plain.parameters(), strict=True):
            theirs.copy_(2 * ours)
    twin = make_problem(plain)
    twin.input, twin.weight, twin.bias, twin.target = problem.input, problem.weight, problem.bias, problem.target
    loss, truth = problem.loss(impl, reduction=reduction), twin.loss("reference", reduction=reduction)
    torch.testing.assert_close(loss, truth)
    upstream = torch.randn_like(loss)
    got = torch.autograd.grad(loss, list(problem.function.parameters()), upstream)
    wanted = torch.autograd.grad(truth, list(plain.parameters()), upstream)
    torch.testing.assert_close(got, tuple(2 * g for g in wanted))
    if isinstance(plain, LogitFunction):  # another class in passing, and no other function
        assert problem.function.spec() == plain.spec()
        LogitFunction.from_spec(problem.function.spec())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["deepcopy", "pickle"])
def test_copies(impl, function_name, how, make_problem):
    problem = make_problem(function_name)
    twin = make_problem(how(problem.function))
    twin.input, twin.weight, twin.bias, twin.target = problem.input, problem.weight, problem.bias, problem.target
    assert torch.equal(problem.loss(impl), twin.loss(impl))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp
def test_transforms_under_the_reference(function_name, make_problem):
    """Per-sample gradients, Jacobian, Hessian, forward mode: every function, whatever `impl=None` would take."""
    problem = make_problem(function_name, grad=False)
    target = torch.randint(0, 7, (5,))
    function, x = problem.function, problem.input
    model = Fused(function, "reference", linear_bias=problem.bias)
    whole = x.clone().requires_grad_()
    losses = linear_cross_entropy(
        whole, problem.weight, target, linear_bias=problem.bias, logit_function=function, reduction="none", impl="torch"
    )
    (wanted,) = torch.autograd.grad(losses.sum(), whole)

    def one(x, t, impl="reference"):
        return linear_cross_entropy(
            x[None], problem.weight, t[None], linear_bias=problem.bias, logit_function=function, impl=impl
        )

    torch.testing.assert_close(vmap(one)(x, target), losses)
    torch.testing.assert_close(vmap(grad(one))(x, target), wanted)
    torch.testing.assert_close(vmap(grad(lambda x, t: one(x, t, None)))(x, target), wanted)
    torch.testing.assert_close(vmap(jacrev(one))(x, target), wanted)
    torch.testing.assert_close(jvp(lambda x: one(x, target[0]), (x[0],), (x[1],))[1], wanted[0] @ x[1])
    curved = hessian(lambda x: one(x, target[0]))(x[0])
    torch.testing.assert_close(curved, curved.T)
    step = 1e-5
    ahead, behind = (grad(lambda x: one(x, target[0]))(x[0] + s * x[1]) for s in (step, -step))
    torch.testing.assert_close(curved @ x[1], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)
    own = {name: p.detach() for name, p in model.named_parameters()}
    if own:

        def with_parameters(own, x, t):
            return functional_call(model, own, (x[None], problem.weight, t[None]))

        each = vmap(grad(with_parameters), in_dims=(None, 0, 0))(own, x, target)
        truth = torch.autograd.grad(model(x, problem.weight, target), list(model.parameters()))
        for name, total in zip(own, truth, strict=True):
            torch.testing.assert_close(each[name].mean(0), total)


def test_transforms_of_mixtures_and_statistics(function_name, make_problem):
    problem = make_problem(function_name, mixture=True, grad=False)
    target = torch.randint(0, 7, (5,))

    def one(h, prior, t):
        return mixture_cross_entropy(h[None], problem.weight, prior[None], t[None], logit_function=problem.function)

    whole = problem.input.clone().requires_grad_()
    losses = mixture_cross_entropy(
        whole, problem.weight, problem.prior, target, logit_function=problem.function, impl="torch", reduction="sum"
    )
    torch.testing.assert_close(
        vmap(grad(one))(problem.input, problem.prior, target), torch.autograd.grad(losses, whole)[0]
    )

    def entropy(h):
        return token_statistics(h, problem.weight, logit_function=problem.function).entropy

    torch.testing.assert_close(vmap(entropy)(problem.input), entropy(problem.input))


def test_transforms_that_cannot_be_served_say_so(make_problem):
    problem = make_problem("plif", grad=False)
    for impl, reason in (
        ("torch", r"torch.func's transforms need impl=\"reference\""),
        ("native", "function transform"),
    ):
        with pytest.raises(ValueError, match=f'impl="{impl}" cannot serve this call: .*{reason}'):
            grad(lambda x, i=impl: linear_cross_entropy(x, problem.weight, problem.target, impl=i))(problem.input)


def spread_over(problem, device):
    """The same problem on a device."""
    moved = copy.copy(problem)
    for key in ("input", "weight", "bias", "prior"):
        value = getattr(problem, key)
        setattr(moved, key, None if value is None else value.detach().to(device).requires_grad_())
    moved.target = problem.target.to(device)
    moved.function = None if problem.function is None else copy.deepcopy(problem.function).to(device)
    return moved


def answers(problem, impl, **options):
    loss = problem.loss(impl, **options)
    stats = problem.statistics(impl)
    total = stats.log_prob.sum() + stats.logsumexp.sum() + stats.entropy.sum()
    grads = [*torch.autograd.grad(loss.sum(), problem.operands()), *torch.autograd.grad(total, problem.operands())]
    return [loss, *stats, *grads]


# Of the definition, which is plain torch, the mean on the meta device is enough.
WITHOUT_NUMBERS = [
    *((None, "meta", case) for case in ("mean", "none", "smooth", "probabilities", "weights")),
    *((None, "fake", case) for case in ("mean", "none")),
    ("reference", "meta", "mean"),
]


@pytest.mark.parametrize(("impl", "kind", "case"), WITHOUT_NUMBERS)
def test_shapes_without_numbers(impl, kind, case, function_name, mixture, make_problem):
    problem = make_problem(function_name, mixture=mixture, probabilities=case == "probabilities", dtype=torch.float32)
    options = {
        "none": {"reduction": "none"},
        "smooth": {"label_smoothing": 0.1} | ({} if mixture else {"z_loss": 0.1}),
        "weights": {"weight": torch.rand(7), "token_weight": torch.rand(5), "reduction": "sum"},
    }.get(case, {})
    real = answers(problem, impl, **options)
    if kind == "meta":
        moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()}
        found = answers(spread_over(problem, "meta"), impl, **moved)
    else:
        fake = copy.copy(problem)
        fake.function = copy.deepcopy(problem.function)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            for key in ("input", "weight", "bias", "prior", "target"):
                value = getattr(problem, key)
                setattr(fake, key, None if value is None else mode.from_tensor(value))
            if problem.function is not None:
                for module in fake.function.modules():
                    for name, p in module._parameters.items():
                        if p is not None:
                            module._parameters[name] = mode.from_tensor(p)
            moved = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in options.items()}
            found = answers(fake, impl, **moved)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in real]
    assert {t.device.type for t in found} == {"meta" if kind == "meta" else "cpu"}


def test_what_serves_a_meta_call(make_problem):
    problem = spread_over(make_problem("plif"), "meta")
    call, _ = build_call(problem.input, problem.weight, problem.target, logit_function=problem.function)
    assert implementations.title(call) == "torch"
    with pytest.raises(ValueError, match='impl="native" cannot serve this call: it works on the CPU, not on meta'):
        implementations.choose("native", call)

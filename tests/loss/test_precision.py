"""Half precision, autocast and long sums, judged against the float64 truth of the same rounded inputs."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from uncork.loss import linear_cross_entropy, mixture_cross_entropy, token_statistics
from uncork.loss.call import multiplies_bfloat16
from uncork.loss.implementations import IMPLEMENTATIONS

HALF = [torch.bfloat16, torch.float16]
CPUINFO = Path("/proc/cpuinfo")


def relative_error(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


def halved(problem, dtype):
    """Operands rounded to dtype, as leaves; the function keeps its float32 parameters."""
    for name in ("input", "weight", "bias", "prior"):
        t = getattr(problem, name)
        if t is not None:
            setattr(problem, name, t.detach().to(dtype).requires_grad_())
    return problem


def widened(problem):
    """The same numbers in float64."""
    wide = copy.copy(problem)
    for name in ("input", "weight", "bias", "prior"):
        t = getattr(problem, name)
        if t is not None:
            setattr(wide, name, t.detach().double().requires_grad_())
    wide.function = copy.deepcopy(problem.function)
    if wide.function is not None:
        wide.function.double()
    if wide.target.is_floating_point():
        wide.target = wide.target.double()
    return wide


def gradients(loss, problem):
    return torch.autograd.grad(loss, problem.operands())


def torchs_own(problem):
    """What one writes without this library: half-precision scores, a float32 softmax."""
    scores = F.linear(problem.input, problem.weight, problem.bias)
    logits = (scores if problem.function is None else problem.function(scores)).float()
    if problem.prior is not None:
        logits = torch.logsumexp(problem.prior.float().log_softmax(-1)[..., None] + logits.log_softmax(-1), -2)
    return F.cross_entropy(logits, problem.target)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["none", "plif", "compose", "module", "monotone-tanh"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_no_worse_than_torch(impl, mixture, dtype, name, reduction, make_problem, monkeypatch):
    monkeypatch.setattr("uncork.loss.chunk_size.RAISED", 16 * 32 * 4)  # sixteen words at a time
    made = make_problem(name, mixture=mixture, tokens=64, features=32, vocab=50, dtype=torch.float32)
    problem = halved(made, dtype)
    wide = widened(problem)
    truth, own = wide.expected(), torchs_own(problem)
    ours = problem.loss(impl, reduction=reduction, chunk_size=10)
    assert ours.dtype == torch.float32
    kept = (problem.target >= 0).sum()
    scalar = ours if reduction == "mean" else ours.sum() / kept
    assert abs(scalar.double() - truth) <= abs(own.double() - truth) + 1e-6
    torch.testing.assert_close(ours.double(), wide.expected(reduction=reduction), rtol=2e-6, atol=1e-5)
    rounding = torch.finfo(dtype).eps / 2
    triples = zip(gradients(scalar, problem), gradients(own, problem), gradients(truth, wide), strict=True)
    for t, (a, b, exact) in zip(problem.operands(), triples, strict=True):
        assert a.dtype == t.dtype
        assert relative_error(a, exact) <= relative_error(b, exact) + rounding
        # One rounding at the end is all that is lost.
        assert relative_error(a, exact) <= (rounding if t.dtype == dtype else 1e-5)


def shifted(problem, case):
    """The problem with scores of a kind that rounding hurts."""
    with torch.no_grad():
        if case == "large":
            problem.input *= 8
            problem.bias += 20 * torch.randn_like(problem.bias)
        elif case == "equal":
            problem.input.zero_()
            problem.bias.fill_(3.0)
        elif case == "one":
            problem.bias[2] += 60
    return problem


@pytest.mark.parametrize("case", ["plain", "large", "equal", "one"])
@pytest.mark.parametrize("name", ["none", "plif", "compose", "module"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scores_dtype", [None, torch.bfloat16])
def test_scores_of_any_size_lose_no_more_than_torchs(
    impl, mixture, case, name, reduction, scores_dtype, make_problem, monkeypatch
):
    """Judged by float64's answer to the same rounded inputs; scores in bfloat16 are torch's own choice."""
    monkeypatch.setattr("uncork.loss.chunk_size.RAISED", 4 * 50 * 4)  # four rows of scores, six words at a time
    made = make_problem(name, mixture=mixture, tokens=64, features=32, vocab=50, dtype=torch.float32)
    problem = halved(shifted(made, case), torch.bfloat16)
    wide = widened(problem)
    truth, own = wide.expected(), torchs_own(problem)
    ours = problem.loss(impl, reduction=reduction, chunk_size=10, scores_dtype=scores_dtype)
    scalar = ours if reduction == "mean" else ours.sum() / (problem.target >= 0).sum()
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert abs(scalar.double() - truth) <= 1.5 * abs(own.double() - truth) + rounding * truth.abs()
    triples = zip(gradients(scalar, problem), gradients(own, problem), gradients(truth, wide), strict=True)
    for a, b, exact in triples:
        error, eager = ((g.double() - exact).norm().item() for g in (a, b))
        assert error <= max(1.5 * eager, rounding * exact.norm().item()) + 1e-7


class Products(TorchDispatchMode):
    """The dtypes of the matrices that are multiplied, and of the copies of a matrix of some shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found, self.copies = shape, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.found |= {t.dtype for t in args if isinstance(t, torch.Tensor)}
        self.copies += name == "_to_copy" and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_products_are_of_the_scores_dtype_and_no_large_weight_is_copied(
    chunked_impl, mixture, make_problem, monkeypatch
):
    problem = halved(make_problem("plif", mixture=mixture, tokens=40, dtype=torch.float32), torch.bfloat16)
    problem.weight.requires_grad_(False)  # its gradient is cast once, at the end
    with Products(problem.weight.shape) as seen:
        problem.loss(chunked_impl, scores_dtype=torch.bfloat16).backward()
    assert (seen.found, seen.copies) == ({torch.bfloat16}, 0)
    with Products(problem.weight.shape) as seen:
        problem.loss(chunked_impl).backward()
    assert (seen.found, seen.copies) == ({torch.float32}, 1)
    monkeypatch.setattr("uncork.loss.chunk_size.RAISED", problem.weight.numel() * 2)
    with Products(problem.weight.shape) as seen:
        problem.loss(chunked_impl).backward()
    assert (seen.found, seen.copies) == ({torch.float32}, 0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_are_raised_together_do_not_change_the_answer(
    chunked_impl, mixture, reduction, make_problem, monkeypatch
):
    """Nor do they read another token's target, factor or prior."""
    problem = halved(make_problem("plif", mixture=mixture, tokens=40, dtype=torch.float32), torch.bfloat16)
    factors = torch.rand(40)

    def answers():
        loss = problem.loss(chunked_impl, reduction=reduction, token_weight=factors, scores_dtype=torch.bfloat16)
        statistics = problem.statistics(chunked_impl, scores_dtype=torch.bfloat16)
        upstream = torch.linspace(-1, 2, loss.numel()).view_as(loss)
        return [loss, *statistics, *torch.autograd.grad(loss, problem.operands(), upstream)]

    whole = answers()
    monkeypatch.setattr("uncork.loss.chunk_size.RAISED", 1)
    for a, b in zip(answers(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Made(TorchDispatchMode):
    """The dtypes of all tensors of some shape that are made."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.found.add(result.dtype)
        return result


def test_one_chunk_makes_the_gradient_to_w_in_its_dtype(chunked_impl, mixture, make_problem):
    problem = halved(make_problem("plif", mixture=mixture, tokens=40, dtype=torch.float32), torch.bfloat16)
    wide, found = widened(problem), {}
    for rows in (80, 10):
        with Made(problem.weight.shape) as made:
            loss = problem.loss(chunked_impl, scores_dtype=torch.bfloat16, chunk_size=rows)
            found[rows] = gradients(3 * loss, problem)
        assert (torch.float32 in made.found) == (rows == 10 or chunked_impl == "triton")  # a GPU adds up in float32
    truth = gradients(3 * wide.expected(), wide)
    for one, several, exact in zip(found[80], found[10], truth, strict=True):
        assert relative_error(one, exact) <= 1.5 * relative_error(several, exact) + torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.skipif(not CPUINFO.exists(), reason="the processor's instructions are read from /proc")
def test_the_processors_own_answer():
    assert multiplies_bfloat16() == ("avx512_bf16" in CPUINFO.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_processor_with_bfloat16_products_takes_them(chunked_impl, mixture, autocast, make_problem, monkeypatch):
    """Of bfloat16 inputs alone, in every answer; scores_dtype=torch.float32 refuses them."""
    made = make_problem("plif", mixture=mixture, tokens=40, dtype=torch.float32)
    half = halved(copy.copy(made), torch.bfloat16)
    given = made if autocast else half

    def answer(**options):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, found = given.loss(chunked_impl, **options), given.statistics(chunked_impl, **options)
        return [loss, *gradients(loss, given), found.log_prob, found.logsumexp]

    rounded, exact = (answer(scores_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    torch.testing.assert_close(answer(), exact, rtol=0, atol=0)
    monkeypatch.setattr("uncork.loss.call.multiplies_bfloat16", lambda: True)
    torch.testing.assert_close(answer(), rounded, rtol=0, atol=0)
    torch.testing.assert_close(answer(scores_dtype=torch.float32), exact, rtol=0, atol=0)
    assert all((a != b).any() for a, b in zip(rounded[:3], exact[:3], strict=True))
    with Products(made.weight.shape) as seen:
        made.loss(chunked_impl).backward()
        halved(copy.copy(made), torch.float16).loss(chunked_impl).backward()
    assert seen.found == {torch.float32}


def test_scores_in_bfloat16_under_autocast_and_in_statistics(impl, make_problem):
    problem = make_problem("plif", tokens=40, dtype=torch.float32)
    half = halved(copy.copy(problem), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.loss(impl, scores_dtype=torch.bfloat16)
    torch.testing.assert_close(got, half.loss(impl, scores_dtype=torch.bfloat16))
    assert not torch.equal(got, half.loss(impl))
    found, rounded = half.statistics(impl, scores_dtype=torch.bfloat16), half.statistics(impl)
    scores = F.linear(half.input, half.weight, half.bias).float()
    logits = half.function(scores).log_softmax(-1)
    torch.testing.assert_close(found.entropy, -(logits.exp() * logits).sum(-1), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found.entropy, rounded.entropy)


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        (torch.float32, torch.bfloat16, "None or torch.float32 with inputs of torch.float32, got torch.bfloat16"),
        (torch.float64, torch.float32, "None or torch.float64 with inputs of torch.float64, got torch.float32"),
        (torch.bfloat16, torch.float64, "None or torch.float32 or torch.bfloat16 with inputs of torch.bfloat16"),
        (torch.float16, torch.float16, "expected torch.float32 with float16 inputs.*65,504"),
    ],
)
def test_dtypes_that_scores_cannot_have(impl, given, asked, expected):
    with pytest.raises(ValueError, match=f"scores_dtype: .*{expected}"):
        linear_cross_entropy(
            torch.ones(2, 3).to(given), torch.ones(4, 3).to(given), torch.tensor([0, 1]), impl=impl, scores_dtype=asked
        )
    with pytest.raises(TypeError, match=r"scores_dtype: expected a torch\.dtype or None, got str"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), impl=impl, scores_dtype="half")


def test_a_budget_counts_the_rows_that_are_raised(chunked_impl, make_problem):
    problem = halved(make_problem("none", tokens=40, dtype=torch.float32), torch.bfloat16)
    blocks = IMPLEMENTATIONS[chunked_impl].tiles.chunk_rule(problem.call()).blocks
    row = (2 + 4) * problem.weight.shape[0] * blocks
    assert problem.loss(chunked_impl, scores_dtype=torch.bfloat16, memory_budget=row).isfinite()
    with pytest.raises(ValueError, match=rf"memory_budget: expected at least {row} bytes"):
        problem.loss(chunked_impl, scores_dtype=torch.bfloat16, memory_budget=row - 1)


@pytest.mark.parametrize("name", ["none", "plif", "module"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(impl, mixture, name, reduction, make_problem):
    problem = make_problem(name, mixture=mixture, tokens=64, features=32, vocab=50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = problem.loss(impl, reduction=reduction)
        own = torchs_own(problem)
    assert ours.dtype == torch.float32
    rounded = widened(halved(copy.copy(problem), torch.bfloat16))
    if rounded.prior is not None:  # stays as it is, as in softmax under autocast
        rounded.prior = problem.prior.detach().double().requires_grad_()
    truth = rounded.expected()
    scalar = ours if reduction == "mean" else ours.sum() / (problem.target >= 0).sum()
    assert abs(scalar.double() - truth) <= abs(own.double() - truth) + 1e-6
    torch.testing.assert_close(scalar.double(), truth, rtol=1e-6, atol=1e-6)
    triples = zip(gradients(scalar, problem), gradients(own, problem), gradients(truth, rounded), strict=True)
    for a, b, exact in triples:
        assert a.dtype == torch.float32
        assert relative_error(a, exact) <= relative_error(b, exact) + 2**-9


def test_autocast_casts_mixed_dtypes_and_leaves_float64(impl):
    input, weight = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(5, 3)
    target = torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_cross_entropy(input, weight, target, impl=impl)
        wide = linear_cross_entropy(input.double(), weight.double(), target, impl=impl)
    assert mixed.dtype == torch.float32
    assert wide.dtype == torch.float64
    torch.testing.assert_close(
        mixed, F.cross_entropy(F.linear(input.float(), weight.bfloat16().float()), target), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(wide, F.cross_entropy(F.linear(input.double(), weight.double()), target))


def test_backward_outside_autocast_is_the_same(impl, make_problem):
    if impl == "reference":
        pytest.skip("autocast acts on autograd's own backward, as everywhere in torch")
    problem = make_problem("plif", dtype=torch.float32)
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = problem.loss(impl, reduction="none").sum()
            if inside:
                grads.append(gradients(loss, problem))
        if not inside:
            grads.append(gradients(loss, problem))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", HALF)
def test_weight_gradient_is_accumulated_in_float32(impl, dtype):
    """512 chunks of 8 tokens, all pulling the same way: in half precision the sum would stop growing."""
    input = torch.rand(4096, 4).to(dtype)
    weight = torch.randn(6, 4).to(dtype).requires_grad_()
    target = torch.zeros(4096, dtype=torch.long)
    linear_cross_entropy(input, weight, target, reduction="mean", chunk_size=8, impl=impl).backward()
    wide = weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(input.double(), wide), target).backward()
    torch.testing.assert_close(weight.grad.double(), wide.grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", HALF)
def test_loss_of_many_tokens(impl, reduction, dtype):
    tokens = 2_000 if impl == "triton" else 20_000  # Triton's interpreter takes 15 ms a token
    input, weight = torch.randn(tokens, 4).to(dtype), torch.randn(16, 4).to(dtype)
    target = torch.randint(0, 16, (tokens,))
    ours = linear_cross_entropy(input, weight, target, reduction=reduction, impl=impl, chunk_size=512)
    truth = F.cross_entropy(F.linear(input.double(), weight.double()), target, reduction="sum")
    total = ours.double().sum() * (tokens if reduction == "mean" else 1)
    assert abs(total - truth) < 1e-5 * truth


def test_a_gradient_scaler_in_float16(impl):
    """Unscaled gradients are below float16's smallest number; the scale of 65536 comes last and brings them back."""
    tokens = 4096
    input = torch.randn(tokens, 8).half().requires_grad_()
    weight = (0.05 * torch.randn(64, 8)).half().requires_grad_()
    target = torch.randint(0, 64, (tokens,))
    wide = [input.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target), wide)
    tiny = torch.finfo(torch.float16).smallest_normal
    assert truth[0].abs().median() < tiny
    for scale in (65536.0, 2.0**20):
        loss = linear_cross_entropy(input, weight, target, impl=impl, chunk_size=256)
        got = torch.autograd.grad(loss * scale, [input, weight])
        for a, exact in zip(got, truth, strict=True):
            inside = (exact.abs() * scale > tiny) & (exact.abs() * scale < 6e4)
            assert inside.double().mean() > 0.5
            torch.testing.assert_close(a.double()[inside], scale * exact[inside], rtol=1e-3, atol=1e-6)


def test_scores_beyond_float16_do_not_overflow(impl):
    """h w = 256 000: the product is made in float32."""
    input = torch.full((1, 10), 160.0).half().requires_grad_()
    weight = torch.stack([torch.full((10,), 160.0), torch.full((10,), 160.0)]).half()
    loss = linear_cross_entropy(input, weight, torch.tensor([0]), impl=impl)
    # lse and the target's logit are both near 256 000, where float32 steps by 2^-6.
    torch.testing.assert_close(loss.item(), 0.6931471824, rtol=0, atol=2**-6)


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_in_half_precision(impl, mixture, dtype, make_problem):
    problem = halved(make_problem("plif", mixture=mixture, tokens=20, dtype=torch.float32), dtype)
    wide = widened(problem)
    for a, b in zip(problem.statistics(impl), wide.statistics("reference"), strict=True):
        if a.is_floating_point():
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["none", "sigsoftmax", "gss", "softcap", "plif", "monotone-relu", "module"])
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_large_scores(impl, name, size, make_problem):
    """Nothing overflows and no gradient turns to nan, however far the scores reach."""
    problem = make_problem(name, dtype=torch.float32)
    with torch.no_grad():
        problem.bias += torch.linspace(-size, size, 7)
    wide = widened(problem)
    losses, truth = problem.loss(impl, reduction="none"), wide.expected(reduction="none")
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-4)
    assert all(g.isfinite().all() for g in gradients(losses.sum(), problem))


def test_probabilities_of_float64_with_float32_inputs(impl):
    input, weight = torch.randn(4, 3), torch.randn(5, 3)
    target = torch.rand(4, 5, dtype=torch.float64)
    loss = linear_cross_entropy(input, weight, target, impl=impl)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(input, weight), target.float()))


def test_class_weights_and_token_weights_of_another_dtype(impl):
    input, weight, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    classes, tokens = torch.rand(5).bfloat16(), torch.rand(4, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(input, weight, target, weight=classes, token_weight=tokens, reduction="sum", impl=impl)
    each = F.cross_entropy(F.linear(input, weight), target, classes.float(), reduction="none")
    torch.testing.assert_close(loss, (each * tokens.float()).sum())
    loss.backward()
    assert tokens.grad.dtype == torch.float64
    torch.testing.assert_close(tokens.grad.float(), each)


def test_entropy_of_a_nearly_certain_word(impl):
    """-p log p of the rest is not lost: 3 words at e^-30, to what float32 knows of the likely word's own share."""
    scores = torch.tensor([[0.0, -30.0, -30.0, -30.0]])
    s = token_statistics(scores, torch.eye(4), impl=impl)
    torch.testing.assert_close(s.entropy.item(), 3 * 31 * 9.357623e-14, rtol=0.05, atol=0.0)


def test_a_confident_token_keeps_its_digits(impl):
    weight = torch.tensor([[60.0], [45.0], [40.0]])
    truth = F.cross_entropy(weight.double().T, torch.tensor([0])).item()
    got = linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([0]), impl=impl).item()
    mixed = mixture_cross_entropy(torch.ones(1, 1, 1), weight, torch.zeros(1, 1), torch.tensor([0]), impl=impl).item()
    assert truth > 3e-7
    assert abs(got - truth) < 1e-7
    assert abs(mixed - truth) < 1e-7


@pytest.mark.parametrize("name", ["none", "scale", "gss-learned", "monotone-relu", "plif"])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_a_large_vocabulary_loses_no_digits(impl, name, size, make_function):
    """Sums over 100,000 words: no part of the answer is further from float64 than torch's own eager loss."""
    vocab, tokens, features = 100_000, 8, 16
    function = make_function(name, torch.float32)
    given = [torch.randn(tokens, features), torch.randn(vocab, features) * size / 4, torch.randn(vocab) * size / 10]
    target = torch.randint(0, vocab, (tokens,))

    def answers(dtype, fused):
        own = None if function is None else copy.deepcopy(function).to(dtype)
        x, weight, bias = (t.to(dtype).requires_grad_() for t in given)
        parameters = [] if own is None else list(own.parameters())
        if fused:
            loss = linear_cross_entropy(x, weight, target, linear_bias=bias, logit_function=own, impl=impl)
        else:
            scores = F.linear(x, weight, bias)
            loss = F.cross_entropy(scores if own is None else own(scores), target)
        return [loss.detach(), *torch.autograd.grad(loss, [x, weight, bias, *parameters])]

    truth = answers(torch.float64, fused=False)
    for ours, theirs, exact in zip(answers(torch.float32, True), answers(torch.float32, False), truth, strict=True):
        error, eager = ((t.double() - exact).norm() / exact.norm() for t in (ours, theirs))
        assert error < max(1.5 * eager, 4 * torch.finfo(torch.float32).eps)  # one number may be rounded luckily

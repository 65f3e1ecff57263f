"""The heads: drop-in for nn.Linear, fused loss equal to the plain one, and the rank that each can reach."""

import copy
import inspect
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import uncork
from uncork import HEAD_NAMES, ContextMixtureHead, LinearHead, MixtureHead, build_head, head_from_spec
from uncork.loss import linear_cross_entropy, tile_native, token_statistics
from uncork.loss.inference import Inference

D, V = 6, 40


def scattered(name: str, **options) -> uncork.Head:
    """A head whose parameters are all random, the function's too."""
    torch.manual_seed(3)
    head = build_head(name, options.pop("d", D), options.pop("v", V), **options)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return head


def log_prob_rank(head: uncork.Head, contexts: int = 60) -> int:
    torch.manual_seed(5)
    h = 2 * torch.randn(contexts, head.in_features, dtype=torch.float64)
    with torch.no_grad():
        matrix = head.double().log_prob(h)
    sigma = torch.linalg.svdvals(matrix)
    return int((sigma > 0.5 * sum(matrix.shape, 1) ** 0.5 * sigma[0] * torch.finfo(torch.float64).eps).sum())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_rank_of_the_log_probabilities(name, bias):
    head = scattered(name, bias=bias)
    rank, function = log_prob_rank(head), head.logit_function
    if not isinstance(head, MixtureHead) and (function is None or not function.nonlinear):
        assert rank == D + 1 + bias
    else:
        assert rank > D + 2


def test_rank_of_a_mixture_of_contexts_follows_the_latent_width():
    assert log_prob_rank(scattered("moc", latent_features=9, bias=False)) == 10


@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum", "label_smoothing": 0.1}, {"reduction": "none", "ignore_index": 3}, {"impl": "reference"}],
    ids=lambda o: ",".join(o) or "default",
)
def test_loss_is_the_cross_entropy_of_the_logits(name, options):
    head = scattered(name).double()
    h = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, V, (3, 5))
    target[0, 0] = options.get("ignore_index", -100)
    plain_options = {k: v for k, v in options.items() if k != "impl"}
    plain = F.cross_entropy(head(h).flatten(0, -2), target.flatten(), **plain_options)
    fused = head.loss(h, target, **options)
    torch.testing.assert_close(fused.flatten(), plain.flatten(), rtol=1e-10, atol=1e-12)
    up = torch.randn_like(fused)
    leaves = [h, *(p for p in head.parameters() if p.requires_grad)]
    grad_fused = torch.autograd.grad(fused, leaves, up)
    grad_plain = torch.autograd.grad(plain, leaves, up.view_as(plain))
    for a, b in zip(grad_fused, grad_plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_probability_targets_and_token_weights(name):
    head = scattered(name).double()
    h, target = torch.randn(4, D, dtype=torch.float64), torch.rand(4, V, dtype=torch.float64)
    torch.testing.assert_close(head.loss(h, target), F.cross_entropy(head(h), target))
    weight = torch.tensor([0.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    index = torch.randint(0, V, (4,))
    expected = (F.cross_entropy(head(h), index, reduction="none") * weight).sum() / weight.sum()
    torch.testing.assert_close(head.loss(h, index, token_weight=weight), expected)


needs_native = pytest.mark.skipif(
    bool(tile_native.missing) and os.environ.get("UNCORK_NATIVE") != "1",
    reason=f"no native tile: {tile_native.missing}",
)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_inference_without_gradients_agrees_with_the_graph(name, dtype):
    """Fused on a CPU, in chunks that do not divide the tokens, and on the way that autograd needs."""
    head = scattered(name, v=300).to(dtype)
    h = 2 * torch.randn(7, 100, D, dtype=dtype)
    tracked = head.log_prob(h), *head.topk(h, 4), head.predict(h)
    assert tracked[0].requires_grad
    assert Inference.of(head._fused(h, head._projection(h))) is None
    with torch.no_grad():
        assert Inference.of(head._fused(h, head._projection(h))) is not None
        fused = head.log_prob(h), *head.topk(h, 4), head.predict(h)
    for a, b in zip(fused, tracked, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b)
    empty = head(h[:0]), head.log_prob(h[:0]), head.topk(h[:0], 4)[1], head.predict(h[:0])
    assert [tuple(t.shape) for t in empty] == [(0, 100, 300), (0, 100, 300), (0, 100, 4), (0, 100)]


@needs_native
@pytest.mark.parametrize("name", ["plif", "mos"])
def test_inference_keeps_no_second_matrix(name):
    """predict and topk make nothing of N V elements, log_prob one: its result."""

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes: list[int] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.sizes += [t.untyped_storage().nbytes() for t in made if t.untyped_storage()._cdata not in given]
            return out

    head, h = scattered(name, v=500), torch.randn(4096, D)
    matrix = 4096 * 500 * 4
    for call, limit in ((head.predict, 0), (lambda h: head.topk(h, 3), 0), (head.log_prob, 1)):
        with torch.no_grad(), Made() as made:
            call(h)
        assert sum(size >= matrix for size in made.sizes) == limit
        assert sorted(made.sizes)[-1 - limit] < matrix / 4


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_predict_topk_statistics_and_log_prob_agree(name):
    head = scattered(name)
    h, target = torch.randn(2, 3, D), torch.randint(0, V, (2, 3))
    log_prob = head.log_prob(h)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(log_prob, head(h).log_softmax(-1))
    values, ids = head.topk(h, 5)
    expected, order = log_prob.topk(5, dim=-1)
    assert torch.equal(ids, order)
    torch.testing.assert_close(values, expected)
    assert torch.equal(head.predict(h), log_prob.argmax(-1))
    statistics = head.statistics(h, target)
    assert statistics.log_prob is not None
    torch.testing.assert_close(statistics.log_prob, log_prob.gather(-1, target[..., None]).squeeze(-1))
    torch.testing.assert_close(statistics.entropy, -(log_prob.exp() * log_prob).sum(-1))
    assert torch.equal(statistics.argmax, log_prob.argmax(-1))


def test_ranking_uses_the_scores_where_the_function_ties():
    head = LinearHead(2, 3, bias=False, logit_function=uncork.Softcap(0.5))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[100.0, 0.0], [300.0, 0.0], [200.0, 0.0]]))
    h = torch.tensor([[1.0, 0.0]])
    assert head(h).unique().numel() == 1  # all saturated in float32
    assert head.topk(h, 3)[1].tolist() == [[1, 2, 0]]
    assert head.predict(h).item() == 1


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_spec_state_copies_and_pickles_rebuild_the_head(name):
    head = scattered(name)
    h = torch.randn(3, D)
    rebuilt = head_from_spec(json.loads(json.dumps(head.spec())))
    stored = io.BytesIO()
    torch.save(head.state_dict(), stored)
    stored.seek(0)
    rebuilt.load_state_dict(torch.load(stored, weights_only=True))
    for other in (rebuilt, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert repr(other) == repr(head)
        assert torch.equal(other(h), head(h))
        assert all(a is not b for a, b in zip(other.parameters(), head.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_half_precision_and_autocast(name, dtype):
    head = scattered(name)
    h, target = torch.randn(8, D), torch.randint(0, V, (8,))
    truth = head.loss(h, target)
    low = copy.deepcopy(head).to(dtype)
    loss = low.loss(h.to(dtype), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in low.parameters() if p.requires_grad)
    assert low.log_prob(h.to(dtype)).dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        cast = head.loss(h, target)
        logits = head(h)
    assert cast.dtype == torch.float32
    assert logits.shape == (8, V)
    torch.testing.assert_close(cast, truth, rtol=0.05, atol=0.05)
    cast.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head.parameters() if p.requires_grad)


@pytest.mark.parametrize("maker", [LinearHead, MixtureHead, ContextMixtureHead])
def test_from_linear_shares_parameters_and_weight_tying_works(maker):
    embedding, linear = nn.Embedding(V, D), nn.Linear(D, V)
    linear.weight = embedding.weight
    options = {} if maker is LinearHead else {"num_components": 2}
    head = maker.from_linear(linear, **options)
    assert head.weight is embedding.weight
    assert head.bias is linear.bias
    head.loss(embedding(torch.tensor([1, 2])), torch.tensor([3, 4])).backward()
    assert embedding.weight.grad is not None
    assert maker.from_linear(nn.Linear(D, V, bias=False), **options).bias is None


def test_a_tied_head_adds_both_gradients():
    head = build_head("plif", D, V)
    embedding = nn.Embedding(V, D)
    head.weight = embedding.weight
    tokens, target = torch.tensor([1, 2]), torch.tensor([3, 4])
    head.loss(embedding(tokens), target).backward()
    w = embedding.weight.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(w[tokens], w, head.bias.detach()), target).backward()
    torch.testing.assert_close(embedding.weight.grad, w.grad)


@pytest.mark.parametrize("options", [{}, {"scale": 4.0}])
@pytest.mark.parametrize("name", HEAD_NAMES)
def test_bias_starts_at_the_log_unigram(name, options):
    counts = torch.arange(V) ** 3
    head = build_head(name, D, V, bias_init=counts, **options)
    with torch.no_grad():
        head.weight.zero_()
    expected = counts.double().clamp(min=0.5)
    torch.testing.assert_close(
        head.log_prob(torch.zeros(D)).exp().double(), expected / expected.sum(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_scale_is_a_factor_on_the_scores(name):
    plain = scattered(name)
    scaled = build_head(name, D, V, scale=1.7)
    with torch.no_grad():
        for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
            mine.copy_(theirs)
        plain.weight.mul_(1.7)
        plain.bias.mul_(1.7)
    x, target = torch.randn(9, D), torch.randint(V, (9,))
    torch.testing.assert_close(scaled(x), plain(x))
    torch.testing.assert_close(scaled.loss(x, target), plain.loss(x, target))
    again = head_from_spec(json.loads(json.dumps(scaled.spec())))
    again.load_state_dict(scaled.state_dict())
    assert torch.equal(again(x), scaled(x))


@pytest.mark.parametrize(("name", "options"), [("softmax", {}), ("temperature", {}), ("temperature", {"factor": 3.0})])
def test_a_scale_leaves_the_start_of_the_bias_where_it_was(name, options):
    counts = torch.arange(1, V + 1)
    head = build_head(name, D, V, bias_init=counts, scale=4.0, **options)
    found = head.log_prob(torch.zeros(D)).exp()
    torch.testing.assert_close(found, counts / counts.sum())


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_scale_is_named(scale):
    with pytest.raises(ValueError, match="scale: expected"):
        build_head("softmax", D, V, scale=scale)


@pytest.mark.parametrize(
    ("counts", "match"),
    [
        (torch.ones(V + 1), r"bias_init: expected shape \(40,\)"),
        (-torch.ones(V), "at least 0"),
        (torch.zeros(V), "all 0"),
    ],
)
def test_bad_counts(counts, match):
    with pytest.raises(ValueError, match=match):
        build_head("softmax", D, V, bias_init=counts)
    with pytest.raises(TypeError, match=r"^bias_init: expected real counts, got torch\.complex64$"):
        build_head("softmax", D, V, bias_init=counts.cfloat())
    with pytest.raises(TypeError, match=r"^head: expected a Head of uncork, got Linear$"):
        uncork.heads.start_at_unigram(nn.Linear(D, V), counts)


def test_the_frozen_control_has_random_slopes_that_do_not_train():
    head = build_head("plif-frozen", D, V, num_pieces=500)
    function = head.logit_function
    assert isinstance(function, uncork.PLIF)
    assert function.num_pieces == 500
    assert function.slopes().std() > 0.3
    assert not any(p.requires_grad for p in function.parameters())


def test_a_users_own_module():
    class Stretch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.3))

        def forward(self, z):
            return torch.sinh(self.rate.exp() * z)

    head = LinearHead(D, V, logit_function=Stretch())
    h, target = torch.randn(4, D), torch.randint(0, V, (4,))
    loss = head.loss(h, target)
    torch.testing.assert_close(loss, F.cross_entropy(head(h), target))
    loss.backward()
    assert head.logit_function is not None
    assert head.logit_function.rate.grad.abs() > 0
    with pytest.raises(TypeError, match="logit_function: expected a LogitFunction"):
        head.spec()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (("nosuch", D, V), {}, ValueError, "name: expected one of softmax.*got 'nosuch'$"),
        (("PLIF", D, V), {}, ValueError, "name: expected one of softmax.*got 'PLIF'; did you mean plif"),
        (("plf", D, V), {}, ValueError, "got 'plf'; did you mean plif"),
        (("plif", D, V), {"device": "cpu"}, TypeError, r"device: expected to be left out: .*\.to\(device, dtype\)"),
        (("mos", D, V), {"dtype": torch.half}, TypeError, r"dtype: expected to be left out: .*with torch\.device"),
        (("plif", D, V), {"pieces": 3}, TypeError, r"expected some of num_pieces.*; did you mean num_pieces\?"),
        (("plif", 0, V), {}, ValueError, "in_features"),
        (("plif", D, 0), {}, ValueError, "vocab_size"),
        (("plif", D, -3), {}, ValueError, "vocab_size"),
        (("plif", D, V), {"num_pieces": 0}, ValueError, "num_pieces"),
        (("plif", D, V), {"bound": -1.0}, ValueError, "bound"),
        (("plif", D, V), {"num_peices": 3}, TypeError, "plif has no option num_peices; expected some of .*num_pieces"),
        (("mos", D, V), {"num_components": 0}, ValueError, "num_components"),
        (("mos", D, V), {"latent_activation": "relu"}, ValueError, "latent_activation"),
        (("softmax", D, V), {"num_components": 2}, TypeError, "softmax has no option num_components"),
        (("softcap", D, V), {"cap": 0.0}, ValueError, "cap"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, match):
    with pytest.raises(error, match=match):
        build_head(*arguments, **options)


def test_bad_inputs_to_a_head():
    head = build_head("plif", D, V)
    with pytest.raises(ValueError, match=r"input: expected shape \(\.\.\., 6\)"):
        head.loss(torch.randn(2, D + 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"k: expected a whole number in \[1, 40\], got 41"):
        head.topk(torch.randn(2, D), V + 1)
    with pytest.raises(TypeError, match=r"logit_function: expected an nn\.Module"):
        LinearHead(D, V, logit_function=torch.tanh)
    with pytest.raises(TypeError, match=r"logit_function: .*got the class Softcap and no instance of it"):
        LinearHead(D, V, logit_function=uncork.Softcap)
    with pytest.raises(ValueError, match="holds Dropout"):
        LinearHead(D, V, logit_function=nn.Sequential(nn.Dropout(0.1)))
    with pytest.raises(ValueError, match="spec: expected a name"):
        head_from_spec({"name": "Nosuch"})
    for name in HEAD_NAMES:
        with pytest.raises(ValueError, match=r"^bias: expected True or False, got 'False'$"):
            build_head(name, D, V, bias="False")
    with pytest.raises(ValueError, match="bias_init: expected a head with a bias"):
        build_head("softmax", D, V, bias=False, bias_init=torch.ones(V))


@pytest.mark.parametrize("maker", [LinearHead, MixtureHead, ContextMixtureHead])
def test_from_linear_takes_on_the_dtype(maker):
    options = {"logit_function": uncork.PLIF()} | ({} if maker is LinearHead else {"num_components": 2})
    head = maker.from_linear(nn.Linear(D, V).double(), **options)
    assert all(p.dtype == torch.float64 for p in head.parameters())
    assert head(torch.randn(2, D, dtype=torch.float64)).dtype == torch.float64
    if maker is not LinearHead:
        with pytest.raises(TypeError, match="latent_features: given by the linear layer"):
            maker.from_linear(nn.Linear(D, V), num_components=2, latent_features=3)


def test_a_plain_head_keeps_half_precision_and_a_users_module_gets_float32():
    h = torch.randn(2, D, dtype=torch.bfloat16)
    assert LinearHead(D, V).bfloat16()(h).dtype == torch.bfloat16
    assert LinearHead(D, V, logit_function=nn.Softplus()).bfloat16()(h).dtype == torch.float32


@pytest.mark.parametrize("name", ["softmax", "plif", "temperature", "mos"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_raises_and_is_never_silently_zero(name, reduction):
    head = scattered(name).double()
    h = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    loss = head.loss(h, torch.tensor([1, 2, 3]), reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.square().sum().backward()


def test_a_states_record_of_the_function_is_no_spec_of_a_head():
    state = build_head("plif", D, V).state_dict()
    with pytest.raises(TypeError, match=r"spec: expected the dict that a head's spec\(\) gives, got Tensor"):
        head_from_spec(state["head_spec"])


def test_a_damaged_spec_is_a_value_error():
    for spec in ({"name": "LinearHead"}, {"name": "LinearHead", "options": 3}):
        with pytest.raises(ValueError, match="spec: expected options"):
            head_from_spec(spec)


def started(name: str, **options) -> uncork.Head:
    """Built on meta, without values, then as FSDP2's recipe starts a model."""
    with torch.device("meta"):
        head = build_head(name, D, 2000, **options)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.fill_(7)  # whatever was in memory
    torch.manual_seed(11)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return head


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in HEAD_NAMES), ("monotone", {"units": "tanh", "init": "random"}),
     ("softmax", {"bias": False}), ("gss", {"learnable": True}),
     ("plif", {"scale": 4.0, "init": "random", "num_pieces": 4000})],
)  # fmt: skip
def test_reset_parameters_starts_a_head_that_was_built_on_meta(name, options):
    head, made = started(name, **options), build_head(name, D, 2000, **options)
    for (key, p), (other, q) in zip(head.named_parameters(), made.named_parameters(), strict=True):
        assert key == other
        assert p.requires_grad == q.requires_grad
        if q.unique().numel() == 1:  # a fixed start
            assert torch.equal(p, q)
        elif p.numel() >= 1000:  # drawn: of the same mean, deviation and reach
            deviation = q.std().item()
            assert abs(p.mean() - q.mean()) < 6 * deviation * (2 / p.numel()) ** 0.5
            assert p.std().item() == pytest.approx(deviation, rel=0.1)
        else:
            assert p.abs().max() < 5
            assert p.std() > 0
    for (key, buffer), (other, same) in zip(head.named_buffers(), made.named_buffers(), strict=True):
        assert key == other
        assert torch.equal(buffer, same)
    h, target = torch.randn(64, D), torch.randint(2000, (64,))
    assert head.loss(h, target).item() == pytest.approx(
        made.loss(h, target).item(), rel=0.05 if "units" not in options else 0.5
    )
    torch.manual_seed(11)
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), started(name, **options).parameters(), strict=True))


def test_reset_parameters_makes_a_learned_function_the_identity_again():
    z, learned = torch.linspace(-30, 30, 101), uncork.PLIF()
    nn.init.normal_(learned.raw_slopes)
    assert not torch.equal(learned(z), z)
    learned.reset_parameters()
    assert torch.equal(learned(z), z)
    fitted = uncork.PLIF.from_function(uncork.Softcap(30.0))
    fitted.reset_parameters()
    assert torch.equal(fitted(z), z)
    assert fitted.fit_error is None


def test_a_bias_prior_is_not_lost_on_meta():
    counts = torch.arange(V)
    for name in ("softmax", "plif"):
        with torch.device("meta"), pytest.raises(ValueError, match=r"bias_init: .*meta device.*start_at_unigram"):
            build_head(name, D, V, bias_init=torch.arange(V, device="cpu"))
        head, made = build_head(name, D, V), build_head(name, D, V, bias_init=counts)
        uncork.heads.start_at_unigram(head, counts)
        assert torch.equal(head.bias, made.bias)


@pytest.mark.parametrize("name", ["softmax", "mos"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_loss_without_a_target_names_it(name, hooked):
    head = build_head(name, D, V)
    if hooked:
        head.register_forward_hook(lambda module, args, output: 2 * output)
    for reduction in ("mean", "none"):
        with pytest.raises(TypeError, match="target: expected a Tensor, got NoneType"):
            head.loss(torch.randn(2, D), None, reduction=reduction)


def test_whole_numbers_of_numpy_are_whole_numbers():
    n = np.int64
    made = [
        build_head("mos", n(D), n(V), num_components=n(2), latent_features=n(3)),
        build_head("plif", n(D), n(V), num_pieces=n(4), scale=np.float32(2)),
        build_head("monotone", D, V, num_units=n(4)),
    ]
    h, target = torch.randn(2, D), torch.tensor([0, 1])
    for head in made:
        assert head.topk(h, n(3))[1].shape == (2, 3)
        assert torch.equal(head.topk(h, torch.tensor(3))[1], head.topk(h, 3)[1])
        head.loss(h, target, chunk_size=n(1), ignore_index=n(1))
        head.loss(h, target, memory_budget=n(4096), reduction="none")
        assert head_from_spec(json.loads(json.dumps(head.spec()))).spec() == head.spec()
    spec = uncork.heads.HeadSpec("plif", {"num_pieces": n(4), "scale": np.float32(2)})
    assert str(spec) == "plif:num_pieces=4,scale=2"


@pytest.mark.parametrize("bad", [3.0, np.float64(3), "3", True, None, [3]])
def test_what_is_no_whole_number_is_told_with_its_type(bad):
    head, h = build_head("softmax", D, V), torch.randn(2, D)
    kind = f"got .* of type {type(bad).__name__.removesuffix('64')}"
    for call in (lambda: head.topk(h, bad), lambda: build_head("softmax", D, bad), lambda: build_head("mos", bad, V),
                 lambda: build_head("plif", D, V, num_pieces=bad)):  # fmt: skip
        with pytest.raises(ValueError, match=f"expected a whole number .*{kind}"):
            call()
    if bad is not None:
        with pytest.raises(ValueError, match="chunk_size: expected a whole number"):
            head.loss(h, torch.tensor([0, 1]), chunk_size=bad)


@pytest.mark.parametrize("name", ["linear_bias", "logit_function", "linear_weight", "prior_logits"])
def test_what_the_head_has_is_not_taken_again(name):
    for head in (build_head("softmax", D, V), build_head("mos", D, V)):
        for call in (head.loss, head.statistics):
            with pytest.raises(TypeError, match=f"{name}: the head has its own"):
                call(torch.randn(2, D), torch.tensor([0, 1]), **{name: None})


OPTIONS = {
    "loss": (linear_cross_entropy, {"linear_bias", "logit_function"}),
    "statistics": (token_statistics, {"linear_bias", "logit_function"}),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("name", ["plif", "mos", "moc"])
def test_an_option_that_a_method_does_not_have_is_told_with_those_that_it_has(name, method, hooked):
    head, function = build_head(name, D, V), OPTIONS[method][0]
    if hooked:
        head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(
        TypeError, match=rf"head\.{method} has no option ignore; expected.*mean ignore_index\?"
    ) as caught:
        getattr(head, method)(torch.randn(2, D), torch.tensor([0, 1]), ignore=3)
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - OPTIONS[method][1]
    told = str(caught.value).partition("expected some of ")[2].partition(";")[0].split(", ")
    assert set(told) == known - ({"z_loss"} if name == "mos" else set())


def test_a_head_whose_weight_was_taken_away_says_so():
    head = build_head("softmax", D, V)
    head.weight = None
    with pytest.raises(TypeError, match=r"weight: expected a parameter of shape .*got NoneType"):
        head(torch.randn(2, D))


@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_in_half_precision_is_no_worse_than_its_unfused_self(name, dtype, autocast):
    """Judged by float64's answer to the same rounded numbers; the unfused head has half-precision scores, as torch."""
    head = build_head(name, 16, 60)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.to(dtype))
    input, target = (4 * torch.randn(40, 16)).to(dtype), torch.randint(0, 60, (40,))
    exact = copy.deepcopy(head).double()
    if not autocast:
        head.to(dtype)

    def answers(own, x, loss):
        x = x.detach().requires_grad_()
        found = loss(own, x)
        trained = [p for p in own.parameters() if p.requires_grad]
        return [found, *torch.autograd.grad(found, [x, *trained])]

    def unfused(own, x):
        return F.cross_entropy(own(x).to(torch.float32 if x.dtype != torch.float64 else x.dtype), target)

    truth = answers(exact, input.double(), unfused)
    with torch.autocast("cpu", dtype, enabled=autocast):
        given = input.float() if autocast else input
        ours, eager = answers(head, given, lambda own, x: own.loss(x, target)), answers(head, given, unfused)
    assert ours[0].dtype == torch.float32
    for a, b, right in zip(ours, eager, truth, strict=True):
        error, theirs = ((g.double() - right).norm().item() for g in (a, b))
        assert error <= max(1.5 * theirs, torch.finfo(dtype).eps * right.norm().item()) + 1e-7

"""Hooks, parametrisations, wrappers and adapters: every answer of a head goes through its own call."""

import contextlib
import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import uncork
from uncork import ContextMixtureHead, LinearHead, MixtureHead, build_head

D, V, N = 6, 40, 7
pytestmark = [  # torch deprecates what people still have in their models
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]
MASKED = torch.tensor([0, 3, 17])
ANSWERS = ("loss", "none", "weighted", "probabilities", "statistics", "log_prob", "predict", "topk", "exclude")


def scattered(name: str, **options) -> uncork.Head:
    torch.manual_seed(3)
    head = build_head(name, D, V, **options).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return head


def mask(module, input, output):
    return output.index_fill(-1, MASKED, -torch.inf)


def target_without_masked(*shape: int) -> torch.Tensor:
    return torch.randint(18, V, shape)


def ask(head: uncork.Head, answer: str, h: torch.Tensor) -> tuple[Any, ...]:
    torch.manual_seed(9)
    target, class_weight = target_without_masked(N), torch.rand(V, dtype=torch.float64)
    if answer == "loss":
        return (head.loss(h, target),)
    if answer == "none":
        return (head.loss(h, target, reduction="none", weight=class_weight),)
    if answer == "weighted":
        target[2] = 5
        return (head.loss(h, target, token_weight=torch.arange(N).double(), reduction="sum", ignore_index=5),)
    if answer == "probabilities":
        spread = torch.rand(N, V, dtype=torch.float64).index_fill(-1, MASKED, 0)
        return (head.loss(h, spread),)
    if answer == "statistics":
        s = head.statistics(h, target)
        return s.log_prob, s.entropy, s.argmax
    if answer == "topk":
        return head.topk(h, 4)
    if answer == "exclude":
        return head.topk(h, 4, exclude=torch.randint(0, V, (N, 3)))
    return (getattr(head, answer)(h),)


def expect(logits: torch.Tensor, answer: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(9)
    target, class_weight = target_without_masked(N), torch.rand(V, dtype=torch.float64)
    log_prob = logits.log_softmax(-1)
    if answer == "loss":
        return (F.cross_entropy(logits, target),)
    if answer == "none":
        return (F.cross_entropy(logits, target, class_weight, reduction="none"),)
    if answer == "weighted":
        target[2] = 5
        return ((F.cross_entropy(logits, target, reduction="none", ignore_index=5) * torch.arange(N)).sum(),)
    if answer == "probabilities":
        spread = torch.rand(N, V, dtype=torch.float64).index_fill(-1, MASKED, 0)
        return (-(spread * log_prob.masked_fill(spread == 0, 0)).sum() / N,)
    if answer == "statistics":
        entropy = -(log_prob.exp() * log_prob.clamp(min=-1e30)).sum(-1)
        return log_prob.gather(-1, target[:, None]).squeeze(-1), entropy, logits.argmax(-1)
    if answer == "topk":
        return tuple(log_prob.topk(4))
    if answer == "exclude":
        excluded = torch.randint(0, V, (N, 3))
        ids = log_prob.scatter(-1, excluded, -torch.inf).topk(4).indices
        return log_prob.gather(-1, ids), ids
    return (log_prob if answer == "log_prob" else log_prob.argmax(-1),)


def unpacking(module, args):
    (input,) = args
    return (2 * input,)


# What torch documents that a forward pre-hook may return; the last leaves out the keywords that it was given.
BEFORE = {
    "before": (lambda module, args: (2 * args[0], *args[1:]), False),
    "before, input": (lambda module, args: 2 * args[0], False),
    "before, tuple": (unpacking, False),
    "before, keywords": (lambda module, args, kwargs: ((2 * args[0],), kwargs), True),
    "before, no keywords": (lambda module, args, kwargs: ((2 * args[0],), {}), True),
}


def hooked(head: uncork.Head, hook: str) -> str:
    """Registers the hook; returns what to expect of a fused implementation."""
    if hook == "mask":
        head.register_forward_hook(mask)
    elif hook in BEFORE:
        head.register_forward_pre_hook(BEFORE[hook][0], with_kwargs=BEFORE[hook][1])
    elif hook == "function":
        if head.logit_function is None:
            head.logit_function = uncork.Identity()
        head.logit_function.register_forward_hook(mask)
    elif hook == "before function":
        if head.logit_function is None:
            head.logit_function = uncork.Identity()
        head.logit_function.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    elif hook == "part":
        head.logit_function = uncork.Compose(*(f for f in (uncork.Softcap(9.0), head.logit_function) if f is not None))
        head.logit_function.functions[0].register_forward_hook(lambda module, args, output: 0.5 * output)
    elif hook == "latent" and hasattr(head, "latent"):
        head.latent.register_forward_hook(lambda module, args, output: 0.5 * output)
        head.prior.register_forward_hook(lambda module, args, output: 2 * output)
    return "refused" if hook in ("mask", "function", "before function", "part", "before, no keywords") else "fused"


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("hook", ["none", "mask", *BEFORE, "function", "before function", "part", "latent"])
@pytest.mark.parametrize("name", ["softmax", "temperature", "softcap", "monotone", "plif", "mos", "mop", "moc"])
def test_every_answer_is_that_of_the_logits(name, hook, grad):
    head = scattered(name)
    expected = hooked(head, hook)
    torch.manual_seed(4)
    h = torch.randn(N, D, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        logits = head(h)
        for answer in ANSWERS:
            for found, wanted in zip(ask(head, answer, h), expect(logits, answer), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
                assert found.requires_grad == (grad and found.is_floating_point())
    if expected == "refused":
        target = target_without_masked(N)
        for impl in ("torch", "native"):
            with pytest.raises(ValueError, match=f'impl="{impl}" cannot serve this call: .*hook'):
                head.loss(h, target, impl=impl)
        torch.testing.assert_close(head.loss(h, target, impl="reference"), F.cross_entropy(logits, target))
        assert head.implementation().startswith("reference (a forward")
    else:
        assert not head.implementation().startswith("reference")


@pytest.mark.parametrize("hook", ["none", "mask", *BEFORE, "function"])
@pytest.mark.parametrize("name", ["softmax", "plif", "mop", "moc"])
def test_gradients_are_those_of_the_logits(name, hook):
    head = scattered(name)
    hooked(head, hook)
    h = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    target, leaves = target_without_masked(N), [h, *head.parameters()]
    plain = F.cross_entropy(head(h), target, reduction="none")
    up = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(head.loss(h, target, reduction="none"), leaves, up),
        torch.autograd.grad(plain, leaves, up),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["plif", "mos", "moc"])
@pytest.mark.parametrize("hook", ["none", "mask", *BEFORE])
def test_scores_are_what_stands_before_the_function(name, hook):
    head = scattered(name)
    h = torch.randn(N, D, dtype=torch.float64)
    expected = head.scores(2 * h if hook in BEFORE else h)
    hooked(head, hook)
    if hook == "before, no keywords":
        with pytest.raises(RuntimeError, match="scores: a forward pre-hook on the head left out the keywords"):
            head.scores(h)
        return
    torch.testing.assert_close(head.scores(h), expected)
    with torch.no_grad():
        torch.testing.assert_close(head.scores(h), expected)


@pytest.mark.parametrize("name", ["softmax", "mos"])
def test_a_pre_hook_sees_the_input_alone(name):
    head, h, seen = scattered(name), torch.randn(N, D, dtype=torch.float64), list[Any]()
    head.register_forward_pre_hook(lambda module, args: seen.append(args))
    for answer in ANSWERS:
        ask(head, answer, h)
    head.scores(h)
    assert len(seen) == len(ANSWERS) + 1
    assert all(len(args) == 1 and args[0] is h for args in seen)


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="cannot trace dataclasses.replace")
def test_a_compiled_loss_runs_a_pre_hook_in_its_one_graph():
    head = build_head("softcap", D, V)
    h, target = torch.randn(N, D), target_without_masked(N)
    expected = head.loss(2 * h, target)
    head.register_forward_pre_hook(unpacking)
    compiled = torch.compile(lambda h: head.loss(h, target), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(h), expected)


def test_a_target_given_to_the_head_itself_is_told_where_it_belongs():
    for name in ("softmax", "mos"):
        with pytest.raises(TypeError, match=r"got 2 positional arguments; head\.loss\(input, target\) gives the loss"):
            build_head(name, D, V)(torch.randn(N, D), target_without_masked(N))  # type: ignore[call-overload]


def test_a_global_hook_of_ones_own_is_seen_and_torchs_is_not():
    head, h = scattered("plif"), torch.randn(N, D, dtype=torch.float64)

    def mask_heads(module, args, output):
        return mask(module, args, output) if isinstance(module, uncork.Head) else None

    handle = nn.modules.module.register_module_forward_hook(mask_heads)
    try:
        assert not bool(torch.isin(head.topk(h, V - 3)[1], MASKED).any())
        with torch.no_grad():
            assert bool((head.log_prob(h)[:, MASKED] == -torch.inf).all())
    finally:
        handle.remove()
    with FlopCounterMode(display=False):
        assert not head.implementation().startswith("reference")


def test_backward_hooks_see_the_gradient_of_the_logits():
    head, h = scattered("plif"), torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    seen: list[Any] = []

    def look(module: Any, given: Any, taken: Any) -> None:
        seen.append(taken[0].shape)

    head.register_full_backward_hook(look)
    head.loss(h, target_without_masked(N)).backward()
    assert seen == [(N, V)]


def test_a_subclass_or_a_replaced_forward_is_answered_from_it():
    class Doubled(LinearHead):
        def forward(self, input):  # type: ignore[override]
            return 2 * super().forward(input)

    head, h = Doubled(D, V), torch.randn(N, D)
    replaced = LinearHead(D, V)
    own: Any = replaced.forward
    replaced.forward = lambda input: 2 * own(input)  # type: ignore[misc]
    for changed in (head, replaced):
        expected = 2 * F.linear(h, changed.weight, changed.bias)
        target = torch.randint(V, (N,))
        torch.testing.assert_close(changed.loss(h, target), F.cross_entropy(expected, target))
        torch.testing.assert_close(changed.log_prob(h), expected.log_softmax(-1))
        for answer in (changed.loss, changed.statistics):
            with pytest.raises(ValueError, match=r"scores_dtype: expected None, since .*: they have the dtype"):
                answer(h, target, scores_dtype=torch.float32)
        torch.testing.assert_close(changed.scores(h), expected / 2)


def recomputed(name: str, way: str) -> uncork.Head:
    head = scattered(name)
    if way == "prune":
        return prune.l1_unstructured(head, "weight", 0.5)
    where = nn.utils if way.endswith("by hooks") else nn.utils.parametrizations
    return getattr(where, way.removesuffix(" by hooks"))(head, "weight")


@pytest.mark.parametrize("name", ["softmax", "plif", "mos", "moc"])
@pytest.mark.parametrize(
    "way", ["weight_norm by hooks", "weight_norm", "spectral_norm by hooks", "spectral_norm", "prune"]
)
def test_two_steps_of_training_under_what_recomputes_the_weight(name, way):
    head, plain = recomputed(name, way), recomputed(name, way)
    h, target = torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))
    losses = []
    for each, loss_of in ((head, lambda m: m.loss(h, target)), (plain, lambda m: F.cross_entropy(m(h), target))):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(each)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-9, atol=1e-10)
    for a, b in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert losses[2] < losses[0]


def test_a_parametrized_weight_is_computed_once_a_call():
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return 2 * weight

    head, h = scattered("plif"), torch.randn(N, D, dtype=torch.float64)
    parametrize.register_parametrization(head, "weight", Counted())
    for answer in ANSWERS:
        Counted.calls = 0
        ask(head, answer, h)
        assert Counted.calls == 1, answer


class Lora(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def changed(way: str) -> object:
    linear = nn.Linear(D, V)
    if way == "weight_norm":
        return nn.utils.weight_norm(linear)
    if way == "pruned":
        return prune.l1_unstructured(linear, "weight", 0.5)
    if way == "parametrized":
        return nn.utils.parametrizations.weight_norm(linear)
    if way in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        getattr(linear, f"register_{way}_hook")(lambda *_: None)
    elif way == "replaced":
        linear.forward = functools.partial(F.linear, weight=linear.weight)
    elif way == "packed":
        linear.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    elif way == "quantised":
        torch.backends.quantized.engine = "qnnpack"
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]
    others: dict[str, object] = {"lora": Lora(D, V), "lazy": nn.LazyLinear(V), "embedding": nn.Embedding(V, D)}
    return (others | {"tensor": linear.weight, "class": nn.Linear}).get(way, linear)


@pytest.mark.parametrize("maker", [LinearHead, MixtureHead, ContextMixtureHead])
@pytest.mark.parametrize(
    ("way", "error", "match"),
    [
        ("lora", TypeError, r"nn.Linear itself, got .*test_head_hooks\.Lora, .*merge the adapter"),
        ("lazy", TypeError, "LazyLinear, .*call it once"),
        ("embedding", TypeError, r"Embedding"),
        ("class", TypeError, r"linear: expected an nn.Linear, got the class Linear and no instance of it"),
        ("tensor", TypeError, "expected an nn.Linear, got Parameter"),
        ("weight_norm", ValueError, r"forward pre-hook \(WeightNorm\).*remove_weight_norm"),
        ("pruned", ValueError, r"forward pre-hook \(L1Unstructured\).*prune.remove"),
        ("parametrized", ValueError, "weight is parametrized.*remove_parametrizations"),
        ("forward", ValueError, "a forward hook"),
        ("forward_pre", ValueError, "a forward pre-hook"),
        ("full_backward", ValueError, "a backward hook"),
        ("full_backward_pre", ValueError, "a backward pre-hook"),
        ("replaced", ValueError, "forward was replaced"),
        ("packed", TypeError, r"linear.weight: expected a plain floating nn.Parameter, got Parameter of torch.int8"),
        ("quantised", TypeError, "nn.Linear itself, got torch.*dequantise"),
    ],
)
def test_from_linear_takes_nothing_but_an_nn_linear(maker, way, error, match):
    options = {} if maker is LinearHead else {"num_components": 2}
    with pytest.raises(error, match=match):
        maker.from_linear(changed(way), **options)


def test_from_linear_takes_one_on_meta():
    head = MixtureHead.from_linear(nn.Linear(D, V, device="meta"), num_components=2)
    assert all(p.device.type == "meta" for p in head.parameters())
    assert head(torch.empty(N, D, device="meta")).shape == (N, V)


def test_sizes_and_inputs_are_named_as_the_caller_knows_them():
    for name in ("plif", "mos", "moc"):
        head = build_head(name, D, V)
        assert head.out_features == V
        calls = (head, head.log_prob, head.predict, head.scores, head.statistics, lambda x, h=head: h.topk(x, 2))
        for call in (*calls, lambda x, h=head: h.loss(x, torch.zeros(2, dtype=torch.int64))):
            for bad, error, match in (
                (torch.randn(2, D + 1), ValueError, rf"input: expected shape \(\.\.\., {D}\).*got \(2, {D + 1}\)"),
                (torch.tensor(1.0), ValueError, r"input: expected shape .*got \(\)"),
                (torch.ones(2, D, dtype=torch.int64), TypeError, "input: expected a floating dtype, got torch.int64"),
                (torch.randn(2, D).double(), ValueError, "input: expected dtype torch.float32 .*got torch.float64"),
                (torch.empty(2, D, device="meta"), ValueError, "input: expected device cpu .*got meta"),
                ([1.0] * D, TypeError, "input: expected a Tensor, got list"),
            ):
                with pytest.raises(error, match=match):
                    call(bad)


def test_a_tied_weight_of_another_shape_fails_where_it_is_tied():
    head = build_head("plif", D, V)
    with pytest.raises(ValueError, match=rf"weight: expected shape \({V}, {D}\).*got \({V}, {D + 2}\)"):
        head.weight = nn.Embedding(V, D + 2).weight
    with pytest.raises(ValueError, match=rf"weight: expected shape \({V}, 4\).*got \({V}, {D}\)"):
        build_head("mos", D, V, latent_features=4).weight = nn.Embedding(V, D).weight
    head.bias = nn.Parameter(torch.zeros(V + 1))
    with pytest.raises(ValueError, match=rf"bias: expected shape \({V},\), got \({V + 1},\)"):
        head(torch.randn(2, D))


@pytest.mark.parametrize("name", ["mos", "mop"])
def test_a_mixture_has_no_z_loss(name):
    with pytest.raises(TypeError, match="z_loss: a mixture has none"):
        build_head(name, D, V).loss(torch.randn(2, D), torch.tensor([0, 1]), z_loss=1e-4)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("hook", ["none", "mask"])
@pytest.mark.parametrize("name", ["softmax", "softcap", "mos", "moc"])
def test_topk_leaves_out_what_it_is_told(name, hook, grad):
    """In chunks that do not divide the tokens, by ids and by masks."""
    head = scattered(name)
    hooked(head, hook)
    h = torch.randn(2, 301, D, dtype=torch.float64)
    ids = torch.randint(0, V, (2, 301, 5))
    per_token = torch.zeros(2, 301, V, dtype=torch.bool).scatter(-1, ids, True)
    rows = [ids[0, i, : i % 6] for i in range(301)]  # of unequal length, some empty
    padded = torch.stack([nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1), ids[1]])
    unequal = per_token.clone()
    unequal[0] = torch.stack([torch.zeros(V, dtype=torch.bool).index_fill(0, row, True) for row in rows])
    common = torch.zeros(V, dtype=torch.bool).index_fill(0, torch.arange(10), True)
    with torch.set_grad_enabled(grad):
        log_prob = head.log_prob(h)
        cases = ((ids, per_token), (per_token, per_token), (common, common.expand(2, 301, V)), (padded, unequal))
        for exclude, hidden in cases:
            values, found = head.topk(h, 6, exclude=exclude)
            wanted = log_prob.masked_fill(hidden, -torch.inf).topk(6)
            assert torch.equal(found, wanted.indices)
            torch.testing.assert_close(values, wanted.values)
        for none in (torch.empty(2, 301, 0, dtype=torch.int64), torch.full((2, 301, 4), -1)):
            assert torch.equal(head.topk(h, 3, exclude=none)[1], head.topk(h, 3)[1])


@pytest.mark.parametrize("grad", [True, False])
def test_an_impossible_word_comes_before_an_excluded_one(grad):
    head = LinearHead(D, 4)
    head.bias = nn.Parameter(torch.tensor([-torch.inf, -torch.inf, 1e3, 0.0]))
    with torch.set_grad_enabled(grad):
        log_prob, ids = head.topk(torch.zeros(1, D), 3, exclude=torch.tensor([[2]]))
        assert sorted(ids[0].tolist()) == [0, 1, 3]
        assert log_prob[0, 1:].tolist() == [-torch.inf] * 2
        log_prob, ids = head.topk(torch.zeros(1, D), 2, exclude=torch.tensor([[2, 3]]))
        assert log_prob[0].tolist() == [-torch.inf] * 2


def test_topk_says_what_is_wrong_with_exclude():
    head, h = build_head("plif", D, V), torch.randn(2, D)
    for exclude, error, match in (
        ([1], TypeError, "exclude: expected a Tensor"),
        (torch.rand(2, V), TypeError, "exclude: expected integers"),
        (torch.zeros(V, dtype=torch.int64), ValueError, r"exclude: expected ids of shape \(2, m\)"),
        (torch.zeros(3, V, dtype=torch.bool), ValueError, r"exclude: expected a mask of shape \(40,\) or \(2, 40\)"),
        (
            torch.tensor([[0], [V]]),
            IndexError,
            r"expected ids in \[0, 40\), or -1 to fill a row up, got 40 at position \(1, 0",
        ),
        (torch.tensor([[0, -2], [-1, -1]]), IndexError, r"exclude: .*got -2 at position \(0, 1\)"),
        (torch.ones(V, dtype=torch.bool), ValueError, "k: expected at most 0"),
        (torch.stack([torch.zeros(V).long(), torch.arange(V)]), ValueError, "k: expected at most 0.*position 1"),
        (torch.zeros(2, 1, dtype=torch.int64, device="meta"), ValueError, "exclude: expected device cpu"),
    ):
        with pytest.raises(error, match=match):
            head.topk(h, 3, exclude=exclude)
    assert head.topk(h, V - 1, exclude=torch.zeros(2, 5, dtype=torch.int64))[1].shape == (2, V - 1)
    padded = torch.tensor([[-1, -1], [3, -1]])
    assert head.topk(h, V - 1, exclude=padded)[1].shape == (2, V - 1)
    with pytest.raises(ValueError, match=r"k: expected at most 39.*at position 1, got 40"):
        head.topk(h, V, exclude=padded)
    with pytest.raises(ValueError, match=r"k: expected at most 39.*at position \(0, 1\), got 40"):
        head.topk(h[None], V, exclude=padded[None])


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), head

    def forward(self, x, target):
        return self.head.loss(torch.tanh(self.body(x)), target)


def _train_sharded(rank: int, size: int, meeting: str, name: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        torch.manual_seed(0)
        plain = Model(build_head(name, D, V))
        sharded = copy.deepcopy(plain)
        fully_shard(sharded.head)
        fully_shard(sharded)
        x, target = torch.randn(4 * size, D), torch.randint(V, (4 * size,))
        own = slice(4 * rank, 4 * rank + 4)
        for _ in range(2):
            loss = sharded(x[own], target[own])
            loss.backward()
            truth = plain(x, target)
            truth.backward()
        for (key, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert p.grad is not None, key
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
        assert sharded.head.topk(x, 3)[1].shape == (4 * size, 3)
        torch.testing.assert_close(sharded.head.log_prob(x), plain.head.log_prob(x))
        assert sharded.head.implementation() == plain.head.implementation()
        assert sharded.head.spec() == plain.head.spec()
        Path(f"{meeting}-{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch's fully_shard fails on a CPU here")
@pytest.mark.parametrize(("size", "name"), [(1, "plif"), pytest.param(2, "plif", marks=pytest.mark.slow), (2, "mos")])
def test_fully_shard_with_the_head_as_a_unit(size, name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where the new processes look for this module
    torch.multiprocessing.spawn(_train_sharded, (size, str(tmp_path / "meeting"), name), nprocs=size)
    assert len(list(tmp_path.glob("meeting-*"))) == size  # each process compared all of it


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", uncork.HEAD_NAMES)
def test_a_head_without_numbers(name, hooked, kind):
    """On the meta device and under a FakeTensorMode each answer has the shape and dtype that it has with numbers."""

    def shapes(make, on):
        with on():
            head = make()
            if hooked:
                head.register_forward_hook(lambda module, input, output: output - 1)
            h, target = torch.randn(2, 3, D), torch.randint(V, (2, 3))
            h.requires_grad_()
            loss = head.loss(h, target)
            s = head.statistics(h, target)
            found = [loss, *torch.autograd.grad(loss, [h, *(p for p in head.parameters() if p.requires_grad)])]
            found += [s.log_prob, s.entropy, s.argmax, head.log_prob(h), head.predict(h), *head.topk(h, 4)]
            return [(t.shape, t.dtype) for t in found], head

    real, _ = shapes(lambda: build_head(name, D, V), contextlib.nullcontext)
    if kind == "meta":
        found, head = shapes(lambda: build_head(name, D, V), lambda: torch.device("meta"))
        assert head.implementation().split(" ")[0] == ("reference" if hooked else "torch")
    else:
        found, _ = shapes(lambda: build_head(name, D, V), FakeTensorMode)
    assert found == real

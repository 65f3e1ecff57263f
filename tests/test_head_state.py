"""What a head's state says of itself: nothing loads in silence where it would give other logits."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import uncork
from uncork import HEAD_NAMES, Compose, LinearHead, MixtureHead, build_head, head_from_spec
from uncork.heads import convert_state_0_1

D, V = 6, 40
OLD = json.loads((Path(__file__).parent / "data/heads_0_1_0.json").read_text())


def keeps(name: str) -> bool:
    """Whether a head has one softmax of a function that starts as the identity, to the bit."""
    head, z = build_head(name, D, V), torch.linspace(-50, 50, 999)
    return isinstance(head, LinearHead) and (head.logit_function is None or torch.equal(head.logit_function(z), z))


class Stretch(nn.Module):
    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, z):
        return torch.sinh(self.rate.exp() * z)


class Bend(Stretch):
    pass


def told(head: nn.Module) -> dict[str, Any]:
    return json.loads(bytes(head.state_dict()["head_spec"].tolist()))


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_loads_an_nn_linear_where_it_keeps_its_logits(name):
    linear, head = nn.Linear(D, V), build_head(name, D, V)
    if not keeps(name):
        with pytest.raises(
            RuntimeError,
            match=r"head_spec: missing.*would give its weights other logits: (the layer keeps|.*from_linear)",
        ):
            head.load_state_dict(linear.state_dict(), strict=False)
        return
    before = copy.deepcopy(head.state_dict())
    missing = head.load_state_dict(linear.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {k.split(".")[0] for k in missing.missing_keys} == (
        set() if name == "softmax" else {"head_spec", "logit_function"}
    )
    h = torch.randn(4, D)
    assert torch.equal(head(h), linear(h))
    assert all(torch.equal(head.state_dict()[k], t) for k, t in before.items() if k.startswith("logit_function"))


def test_the_plain_softmax_exchanges_states_with_nn_linear():
    linear, head = nn.Linear(D, V), LinearHead(D, V)
    head.load_state_dict(linear.state_dict())
    linear.load_state_dict(head.state_dict())
    assert list(head.state_dict()) == ["weight", "bias"]
    assert list(LinearHead(D, V, logit_function=uncork.Identity()).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("there", "here", "match"),
    [
        (
            ("softmax", {"scale": 4.0}),
            ("softmax", {}),
            r"trained as a LinearHead with Scale\(factor=4.0.*without a fun",
        ),
        (("softmax", {"scale": 4.0}), ("softmax", {"scale": 2.0}), r"build_head\(\.\.\., scale=4.0"),
        (("plif", {"scale": 4.0}), ("plif", {}), r"Compose\(Scale\(factor=4.0"),
        (("softcap", {}), ("softmax", {}), "Softcap"),
        (("softcap", {}), ("softcap", {"cap": 15.0}), r"Softcap\(cap=30.0\).*Softcap\(cap=15.0\)"),
        (("softcap", {}), ("sigsoftmax", {}), "Sigsoftmax"),
        (("plif", {}), ("plif", {"bound": 10.0}), "bound=20.0.*bound=10.0"),
        (("plif", {}), ("plif", {"unit_slope": True}), "unit_slope=False.*unit_slope=True"),
        (("temperature", {}), ("temperature", {"factor": 3.0}), "factor=1.0.*factor=3.0"),
        (("mos", {}), ("moc", {}), "trained as a MixtureHead.*this head is a ContextMixtureHead"),
        (("mos", {}), ("mos", {"latent_activation": None}), "latent_activation=None"),
        (("mos", {}), ("moss", {}), "Sigsoftmax"),
        (("plif", {}), ("softmax", {}), "PLIF"),
    ],
)
def test_a_state_of_another_head_is_refused(there, here, match, strict):
    state = build_head(there[0], D, V, **there[1]).state_dict()
    head = build_head(here[0], D, V, **here[1])
    with pytest.raises(RuntimeError, match=match):
        head.load_state_dict(state, strict=strict)
    model = nn.ModuleDict({"head": head})
    with pytest.raises(RuntimeError, match=rf"head\.head_spec: .*{match}"):
        model.load_state_dict({f"head.{k}": t for k, t in state.items()}, strict=strict)


def test_what_does_not_decide_the_logits_is_not_compared():
    """A frozen PLIF, or one that started at random, is the same function of its slopes."""
    frozen = build_head("plif-frozen", D, V, spread=2.0)
    head = build_head("plif", D, V)
    head.load_state_dict(frozen.state_dict())
    h = torch.randn(3, D)
    assert torch.equal(head(h), frozen(h))
    parts = [LinearHead(D, V, logit_function=Compose(uncork.Scale(2.0), uncork.PLIF(frozen=f))) for f in (True, False)]
    parts[1].load_state_dict(parts[0].state_dict())


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_an_nn_linear_into_a_changed_function_is_refused(scale):
    head = build_head("plif", D, V, scale=scale)
    if scale == 1:
        with torch.no_grad():
            next(head.logit_function.parameters())[50:] += 0.1  # trained
    with pytest.raises(RuntimeError, match=r"head_spec: missing.*other logits"):
        head.load_state_dict(nn.Linear(D, V).state_dict(), strict=False)
    head.load_state_dict({}, strict=False)  # of another part of a model
    nn.ModuleDict({"body": nn.Linear(D, D), "head": head}).load_state_dict(
        {"body.weight": torch.zeros(D, D), "body.bias": torch.zeros(D)}, strict=False
    )


def test_a_users_own_function_is_known_by_its_class():
    state = LinearHead(D, V, logit_function=Stretch()).state_dict()
    LinearHead(D, V, logit_function=Stretch(0.7)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Stretch.*Bend"):
        LinearHead(D, V, logit_function=Bend()).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Stretch.*PLIF"):
        LinearHead(D, V, logit_function=uncork.PLIF()).load_state_dict(state, strict=False)


def test_the_state_is_never_stale():
    head = build_head("softcap", D, V)
    head.logit_function = uncork.Softcap(10.0)
    assert told(head)["logit_function"]["options"] == {"cap": 10.0}
    assert bytes(head.head_spec.tolist()) == bytes(head.state_dict()["head_spec"].tolist())
    head.logit_function.cap = 12.0
    assert told(head)["logit_function"]["options"] == {"cap": 12.0}
    head.logit_function = None
    assert list(head.state_dict()) == ["weight", "bias"]
    head.logit_function = uncork.Sigsoftmax()
    assert told(head)["logit_function"]["name"] == "Sigsoftmax"
    with pytest.raises(ValueError, match="holds Dropout"):
        head.logit_function = nn.Dropout(0.1)
    head.half()
    assert head.state_dict()["head_spec"].dtype == torch.uint8


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_meta_heads_save_and_load_what_they_are(name):
    source = build_head(name, D, V)
    with torch.device("meta"):
        empty, assigned = build_head(name, D, V), build_head(name, D, V)
    empty.to_empty(device="cpu")
    for key, tensor in empty.named_buffers():
        assert key == "head_spec"
        tensor.fill_(255)  # whatever was in memory
    empty.load_state_dict(source.state_dict())
    assigned.load_state_dict(source.state_dict(), assign=True)
    h = torch.randn(3, D)
    for head in (empty, assigned):
        assert torch.equal(head(h), source(h))
        assert head.state_dict().keys() == source.state_dict().keys()
        assert all(torch.equal(t, source.state_dict()[k]) for k, t in head.state_dict().items())
        assert all(torch.equal(t, source.state_dict()[k]) for k, t in head.named_buffers())


def test_safetensors_casts_copies_and_pickles(tmp_path):
    head = build_head("mop", D, V, scale=2.0)
    safetensors.torch.save_file(head.state_dict(), tmp_path / "head.safetensors")
    other = build_head("mop", D, V, scale=2.0)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "head.safetensors"))
    h = torch.randn(2, D)
    assert torch.equal(other(h), head(h))
    # A user who casts every tensor of a state has not damaged it.
    other.load_state_dict({k: t.bfloat16() for k, t in head.state_dict().items()})
    stored = io.BytesIO()
    torch.save(copy.deepcopy(head).bfloat16().state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    called = torch.func.functional_call(head, dict(head.state_dict()), (h,))
    assert torch.equal(called, head(h))
    damaged = head.state_dict() | {"head_spec": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="head_spec: cannot be read"):
        other.load_state_dict(damaged)


@pytest.mark.parametrize("case", OLD)
def test_states_of_0_1_0_load_through_the_converter(case):
    """As version 0.1.0 wrote them, with the logits that it computed."""
    old = OLD[case]
    state = {k: torch.tensor(t) for k, t in old["state"].items()}
    head = head_from_spec(old["spec"])
    if case != "softmax":
        with pytest.raises(RuntimeError, match=r"convert_state_0_1\(state, head\)"):
            head.load_state_dict(state, strict=case not in ("softmax-scale", "softcap", "sigsoftmax", "gss"))
    head.load_state_dict(convert_state_0_1(state, head))
    torch.testing.assert_close(head(torch.tensor(old["input"])), torch.tensor(old["logits"]))
    model = nn.ModuleDict({"lm_head": head_from_spec(old["spec"])})
    whole = {f"lm_head.{k}": t for k, t in state.items()}
    if case != "softmax":
        with pytest.raises(RuntimeError, match=r"prefix='lm_head\.'"):
            model.load_state_dict(whole, strict=False)
    model.load_state_dict(convert_state_0_1(whole, model["lm_head"], prefix="lm_head."))
    with pytest.raises(TypeError, match="head: expected a Head of uncork, got Linear"):
        convert_state_0_1(state, nn.Linear(D, V))
    with pytest.raises(TypeError, match="head: expected a Head of uncork, got the class LinearHead and no instance"):
        convert_state_0_1(state, LinearHead)


def test_a_dropped_parameter_of_the_function_is_noticed():
    head = LinearHead(D, V, logit_function=uncork.PLIF())
    state = head.state_dict()
    del state["logit_function.raw_slopes"]
    with pytest.raises(RuntimeError, match=r"only one of state and head has logit_function\.raw_slopes"):
        head.load_state_dict(state, strict=False)


def test_a_subclass_and_a_parametrized_head_exchange_states_and_specs():
    class Mine(MixtureHead):
        pass

    head = Mine(D, V, num_components=2)
    MixtureHead(D, V, num_components=2).load_state_dict(head.state_dict())
    plain = build_head("softcap", D, V)
    nn.utils.parametrizations.weight_norm(plain)
    assert type(plain).__name__ != "LinearHead"
    assert isinstance(head_from_spec(plain.spec()), LinearHead)
    with pytest.raises(RuntimeError, match="Softcap"):
        plain.load_state_dict(build_head("softcap", D, V, cap=1.0).state_dict(), strict=False)


def test_a_strict_load_of_an_nn_linear_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*strict=False loads it into a head that keeps its logits"):
        build_head("plif", D, V).load_state_dict(nn.Linear(D, V).state_dict())


def test_states_can_be_averaged():
    a, b = build_head("plif", D, V), build_head("plif", D, V)
    mean = {k: 0.9 * t + 0.1 * b.state_dict()[k] for k, t in a.state_dict().items()}
    a.load_state_dict(mean)
    assert torch.equal(a.weight, mean["weight"])
    half = {k: (t + t + t) / 3 for k, t in b.state_dict().items()}  # bytes overflow
    with pytest.raises(RuntimeError, match="when averaging states, copy head_spec unchanged"):
        a.load_state_dict(half)

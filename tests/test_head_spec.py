"""What a head is called: text and back, one table for names, options, titles, colours and controls; its bias prior."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import uncork
from uncork import HEAD_NAMES, LinearHead, build_head
from uncork.heads import HeadSpec, start_at_unigram
from uncork.heads import spec as specs
from uncork.heads.spec import parse_text, titled, value_text
from uncork.logit_functions.base import _REGISTRY

D, V = 4, 6


def other(option: str, default: Any) -> Any:
    """Another value than the default of an option, of the same kind: of its layer, or as an example of a function."""
    of_layers = {"num_components": 2, "latent_features": 3, "latent_activation": None}
    tried = [options[option] for cls in _REGISTRY.values() for options in cls.examples.values() if option in options]
    if option in of_layers:
        return of_layers[option]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 0.25 if isinstance(default, float) else default + 7
    return next(value for value in tried if value != default)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_spec_is_printed_and_read_back_with_every_option(name):
    head = HeadSpec(name)
    others = {option: other(option, default) for option, default in head.defaults.items()}
    for option in [*others, None]:
        spec = HeadSpec(name, others if option is None else {option: others[option]})
        again = HeadSpec.parse(str(spec))
        assert (again, str(again), hash(again)) == (spec, str(spec), hash(spec))
        assert {key: type(value) for key, value in again.options.items()} == {
            key: type(int(value) if isinstance(value, float) and value.is_integer() else value)
            for key, value in spec.options.items()
        }
        if option not in ("unit_slope", "unit_slope_at", None):  # which need each other, or a learned PLIF
            assert spec.build(D, V)(torch.randn(2, D)).shape == (2, V)
    assert HeadSpec.parse(name) == head
    assert str(head) == head.title == name


@pytest.mark.parametrize(
    "value",
    [None, True, False, 3, 1e-5, "tanh", "null", "true", "True", "None", "3", "a,b", '"', "", "x=y", [-9, 4], "[1"],
)
def test_values_survive_their_text(value):
    name, options = parse_text(f"plif:first={value_text(value)},last={value_text(value)}")
    assert (name, options) == ("plif", {"first": value, "last": value})


def test_equal_heads_have_one_text():
    for text in ("plif", "plif:num_pieces=100", "plif:scale=1,bound=20", "plif:"):
        assert HeadSpec.parse(text) == HeadSpec("plif")
        assert str(HeadSpec.parse(text)) == "plif"
    assert str(HeadSpec.parse("plif:scale=4.0,num_pieces=50")) == "plif:num_pieces=50,scale=4"
    assert HeadSpec("softmax", {"scale": 4}) == HeadSpec("softmax", {"scale": 4.0})
    assert HeadSpec("softmax", {"bias": False}).title == "softmax (bias=false)"
    assert HeadSpec("temperature", {"factor": True}).options == {"factor": True}  # is not the default of 1


def test_switches_are_read_as_they_are_meant():
    for text in ("plif:frozen=False", "plif:frozen=false"):
        assert HeadSpec.parse(text) == HeadSpec("plif")
    assert HeadSpec.parse("softmax:bias=False").build(D, V).bias is None
    assert HeadSpec.parse("gss:learnable=True,center=None").options == {"learnable": True}
    assert str(HeadSpec("plif", {"frozen": np.True_})) == "plif:frozen=true"
    for text, option in (("plif:frozen=no", "frozen"), ("mos:bias=off", "bias"), ("gss:learnable=1", "learnable")):
        with pytest.raises(ValueError, match=f"^{option}: expected True or False, got "):
            HeadSpec.parse(text).build(D, V)


def test_the_help_of_build_head_lists_every_head_with_its_options():
    rows = re.findall(r"^\s*\| ([a-z-]+) \| (.*) \| (.*)\|$", build_head.__doc__, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["name", *HEAD_NAMES]
    written = {name: eval(f"dict({options})") for name, _, options in rows[1:]}
    shared = re.search(r"\| options and their defaults, beside (.*) \|", build_head.__doc__)
    assert shared is not None
    assert {name: written[name] | eval(f"dict({shared[1]})") for name in HEAD_NAMES} == {
        name: HeadSpec(name).defaults for name in HEAD_NAMES
    }
    assert len({distribution for _, distribution, _ in rows}) == len(rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch", f"name: expected one of {', '.join(HEAD_NAMES)}, got 'nosuch'"),
        ("plif:num_peices=3", "plif has no option num_peices; expected some of num_pieces=100, bound=20, "),
        ("softmax:num_components=2", "softmax has no option num_components; expected some of bias=true, scale=1$"),
        ("plif:num_pieces", "expected name or name:key=value,key=value, got 'plif:num_pieces'"),
        ("plif:=3", "expected name or name:key=value"),
        ("plif:scale=2,scale=3", "expected scale once"),
    ],
)
def test_a_text_that_is_no_head_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        HeadSpec.parse(text)


def test_build_is_build_head():
    for name, options in (("plif", {"num_pieces": 7, "scale": 3.0}), ("mos", {"num_components": 2, "bias": False})):
        first, second = HeadSpec(name, options).build(D, V), build_head(name, D, V, **options)
        assert first.spec() == second.spec()
    counts = torch.arange(1.0, V + 1)
    assert HeadSpec("softmax", {"scale": 2}).build(D, V, bias_init=counts).bias.tolist() == pytest.approx(
        ((counts / counts.sum()).log() / 2).tolist()
    )


def test_controls_and_what_they_control():
    assert HeadSpec("plif").controls == HeadSpec("monotone").controls == ("temperature", "softcap", "plif-frozen")
    assert HeadSpec("mos").controls == ("moc",)
    assert [name for name in HEAD_NAMES if HeadSpec(name).is_control] == [
        "temperature",
        "softcap",
        "plif-frozen",
        "moc",
    ]
    assert HeadSpec("plif-frozen").as_control == "the frozen random PLIF"
    for name in HEAD_NAMES:
        head = HeadSpec(name)
        assert set(head.control_of) == {other for other in HEAD_NAMES if name in HeadSpec(other).controls}
        assert isinstance(head.build(D, V), LinearHead) != head.is_mixture


def test_every_head_has_a_colour_and_a_place_of_its_own():
    heads = [HeadSpec(name) for name in HEAD_NAMES]
    assert all(re.fullmatch("#[0-9a-f]{6}", head.colour) for head in heads)
    assert len({head.colour for head in heads}) == len(heads)
    assert [head.order for head in heads] == list(range(len(heads)))
    assert len({head.called for head in heads}) == len(heads)


def test_a_new_head_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(
        specs._KINDS, "new", specs._Kind(specs._mixture, specs.Softcap, "new", "New", "#123456", learns=True)
    )
    new = specs.HeadSpec.parse("new:num_components=3,cap=9")
    assert (new.title, new.called, new.colour) == ("new (cap=9, num_components=3)", "New", "#123456")


def test_titles_and_texts_of_settings_that_are_not_the_heads():
    assert titled("softmax", {"bias_prior": False, "output_lr_scale": 1.0}) == (
        "softmax (bias_prior=false, output_lr_scale=1)"
    )


class Elementwise(nn.Module):
    """A user's module."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, scores):
        return self.f(scores)


COUNTS = torch.tensor([1000, 100, 10, 5, 1])  # 6.9 logits apart


@pytest.mark.parametrize(
    "function",
    [
        uncork.ScaledSigmoid(),
        uncork.AsymmetricSoftcap(2.0, 50.0),
        uncork.AsymmetricSoftcap(50.0, 2.0),
        uncork.Compose(uncork.ScaledSigmoid(), uncork.PLIF()),
        uncork.Softcap(3.46),
        Elementwise(lambda z: 4 * z),
        Elementwise(lambda z: z.mul_(2)),
        Elementwise(torch.exp),
        Elementwise(lambda z: 7 * torch.sigmoid(z)),
        nn.Softplus(),
        nn.LeakyReLU(inplace=True),
    ],
)
def test_bias_starts_at_the_log_unigram_under_any_function(function):
    head = LinearHead(2, 5, logit_function=function)
    start_at_unigram(head, COUNTS)
    found = head.log_prob(torch.zeros(2)).exp()
    torch.testing.assert_close(found, COUNTS / COUNTS.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "function", [uncork.Softcap(3.45), nn.Sequential(nn.Tanh()), Elementwise(torch.neg), Elementwise(lambda z: 0 * z)]
)
def test_counts_that_the_function_cannot_reach_are_refused(function):
    head = LinearHead(2, 5, logit_function=function)
    with pytest.raises(ValueError, match=r"^bias_init: expected counts whose log.* increasing .*, got 6\.91 apart$"):
        start_at_unigram(head, COUNTS)

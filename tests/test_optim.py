"""Parameter groups: what decays, what has a rate of its own, groups of one's own, and errors."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import uncork
from uncork import PLIF, LinearHead, build_head, parameter_groups

D, V = 6, 40


class RootMeanSquareNorm(nn.Module):
    """A user's own norm, of two dimensions so that its shape does not say what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, D))


class PreNorm(nn.Module):
    """A block called after its norm, whose layers decay all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = RootMeanSquareNorm(), nn.Linear(D, D)


class Model(nn.Module):
    """A language model's parts; the output weight is tied."""

    def __init__(self, head: str = "plif") -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D)
        self.position_embedding = nn.Parameter(torch.zeros(3, D))
        self.lstm = nn.LSTM(D, D)
        self.attention = nn.MultiheadAttention(D, 2, add_bias_kv=True)
        self.block, self.batch, self.last = PreNorm(), nn.BatchNorm1d(D), nn.LayerNorm(D)
        self.head = build_head(head, D, V)
        self.head.weight = self.embed_tokens.weight

    def names(self, group) -> set[str]:
        own = {id(p): name for name, p in self.named_parameters()}
        return {own[id(p)] for p in group["params"]}


MATRICES = {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight"}
MATRICES |= {"block.layer.weight"}


def by_name(groups):
    found = {g["name"]: g for g in groups}
    assert len(found) == len(groups)
    return found


def assert_whole(groups, model):
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_matrices_decay_and_nothing_else():
    model = Model()
    groups = by_name(parameter_groups(model, lr=0.1, weight_decay=0.3, function_lr_scale=3.0))
    assert list(groups) == ["rest", "no_decay", "function"]
    assert model.names(groups["rest"]) == MATRICES
    assert model.names(groups["function"]) == {"head.logit_function.raw_slopes"}
    assert [g["weight_decay"] for g in groups.values()] == [0.3, 0.0, 0.0]
    assert [round(g["lr"], 12) for g in groups.values()] == [0.1, 0.1, 0.3]
    assert_whole(groups.values(), model)


def test_names_alone_say_the_same_but_for_a_users_norm():
    model = Model()
    groups = by_name(parameter_groups(model.named_parameters(), lr=0.1, weight_decay=0.3, function_lr_scale=3.0))
    assert model.names(groups["rest"]) == MATRICES | {"block.norm.gain"}
    assert model.names(groups["function"]) == {"head.logit_function.raw_slopes"}
    assert round(groups["function"]["lr"], 12) == 0.3
    assert_whole(groups.values(), model)
    # Tied under two names: one parameter, and an embedding's, whichever name comes first.
    names = list(reversed(list(model.named_parameters(remove_duplicate=False))))
    assert_whole(parameter_groups(names, lr=0.1), model)
    (rest,) = [g for g in parameter_groups(names, lr=0.1, weight_decay=0.3) if g["weight_decay"]]
    assert model.embed_tokens.weight not in set(rest["params"])


def test_everything_decays_on_request_in_the_models_order():
    model = Model("mop")
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3, decay="all", function_lr_scale=0.5)
    function = list(model.head.logit_function.parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in function)]
    assert [(g["name"], g["weight_decay"], g["lr"]) for g in groups] == [("rest", 0.3, 0.1), ("function", 0.0, 0.05)]
    for group, expected in zip(groups, (rest, function), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]


@pytest.mark.parametrize("name", ["softmax", "plif", "mop", "moc"])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_and_bias_can_have_a_rate_of_their_own(name, tied):
    model = nn.ModuleDict({"body": nn.Linear(D, D), "emb": nn.Embedding(V, D), "head": build_head(name, D, V)})
    head = model["head"]
    if tied:
        head.weight = model["emb"].weight
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3, decay="all", output_lr_scale=4.0)
    assert_whole(groups, model)
    assert [id(p) for p in groups[1]["params"]] == [id(head.weight), id(head.bias)]
    assert (groups[1]["name"], groups[1]["lr"], groups[1]["weight_decay"]) == ("output", 0.4, 0.3)
    assert groups[0]["lr"] == 0.1
    optimizer = torch.optim.AdamW(groups)  # names of groups are no obstacle
    optimizer.load_state_dict(optimizer.state_dict())
    parted = by_name(parameter_groups(model, lr=0.1, weight_decay=0.3, output_lr_scale=4.0))
    assert_whole(parted.values(), model)
    undecayed = [head.weight, head.bias] if tied else [head.bias]
    assert [id(p) for p in parted["output_no_decay"]["params"]] == [id(p) for p in undecayed]
    assert parted["output_no_decay"]["lr"] == 0.4
    assert ("output" in parted) != tied


def test_a_reparametrised_layer_keeps_its_groups():
    head = LinearHead(D, V, logit_function=PLIF(4))
    parametrizations.weight_norm(head, "weight")
    parametrizations.orthogonal(nn.Linear(D, D))
    groups = by_name(parameter_groups(head, lr=1.0, weight_decay=0.1, output_lr_scale=2.0))
    assert_whole(groups.values(), head)
    assert len(groups["output"]["params"]) == 2  # weight_norm's length and direction
    norm = parametrizations.spectral_norm(nn.Embedding(V, D), "weight")
    assert [g["name"] for g in parameter_groups(norm, lr=1.0, weight_decay=0.1)] == ["no_decay"]


def test_a_function_in_two_places_is_in_one_group_and_frozen_parameters_in_none():
    tied = PLIF(5)
    model = nn.ModuleDict({"a": tied, "b": tied, "c": nn.Linear(2, 3), "d": PLIF(4, frozen=True)})
    model["c"].bias.requires_grad_(False)
    rest, own = parameter_groups(model, lr=0.1)
    assert [p.numel() for p in rest["params"]] == [6]
    assert own["params"] == [tied.raw_slopes]


def test_a_users_own_function_is_not_decayed():
    head = LinearHead(D, V, bias=False, logit_function=nn.Sequential(nn.Linear(1, 1)))
    for model in (head, head.named_parameters()):
        groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
        assert [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups] == [
            ("rest", 1, 0.1),
            ("function", 2, 0.0),
        ]


def test_own_groups_join():
    model = Model()
    mine = [
        {"params": model.block.parameters(), "lr": 5.0, "name": "block", "betas": (0.8, 0.9)},
        {"params": model.head.logit_function.raw_slopes},
        {"params": [("last.weight", model.last.weight)], "weight_decay": 9.0},
    ]
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3, groups=mine)
    assert [g["name"] for g in groups] == ["rest", "no_decay", "block", "own", "own"]
    assert groups[2]["lr"] == 5.0
    assert groups[2]["betas"] == (0.8, 0.9)
    assert len(groups[2]["params"]) == 3
    # What a group does not say is the call's, not the optimiser's own default.
    assert [(g["lr"], g["weight_decay"]) for g in groups[2:]] == [(5.0, 0.3), (0.1, 0.3), (0.1, 9.0)]
    groups[-1]["params"] = [model.last.weight]
    assert_whole(groups, model)
    torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([3], TypeError, r'groups\[0\]: expected a mapping with "params", got 3'),
        ([{"lr": 1.0}], TypeError, r'groups\[0\]: expected a mapping with "params"'),
        ([{"params": ["w"]}], TypeError, r"groups\[0\]: expected parameters, got str at position 0"),
        ([{"params": [nn.Parameter(torch.ones(2))]}], ValueError, r"groups\[0\]: expected parameters of the model"),
    ],
)
def test_own_groups_that_are_none(groups, error, message):
    with pytest.raises(error, match=message):
        parameter_groups(Model(), lr=0.1, groups=groups)


def test_a_parameter_in_two_own_groups():
    model = Model()
    twice = [{"params": [model.last.weight]}, {"params": [model.last.bias, model.last.weight]}]
    with pytest.raises(ValueError, match=r"groups\[1\]: expected each parameter once, got 'last.weight' again"):
        parameter_groups(model, lr=0.1, groups=twice)


def test_bad_arguments_are_named():
    head = build_head("plif", D, V)
    for name in ("lr", "weight_decay", "function_lr_scale", "output_lr_scale"):
        for wrong in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"{name}.*: expected numbers of at least 0, got .*{wrong}"):
                parameter_groups(head, **({"lr": 0.1} | {name: wrong}))
    with pytest.raises(ValueError, match='decay: expected "matrices" or "all", got \'none\''):
        parameter_groups(head, lr=0.1, decay="none")
    with pytest.raises(TypeError, match=r"model: expected .*named_parameters\(\), got one of Parameter"):
        parameter_groups(head.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model: expected .*, got int"):
        parameter_groups(3, lr=0.1)
    with pytest.raises(TypeError, match=r"model: expected .*, got the class Linear and no instance of it"):
        parameter_groups(nn.Linear, lr=0.1)
    with pytest.raises(
        TypeError, match=r"has no option betas; expected some of lr, .*groups; an optimiser's own settings"
    ):
        parameter_groups(head, lr=0.1, betas=(0.8, 0.9))
    with pytest.raises(TypeError, match=r"has no option decays; .*; did you mean decay\?"):
        parameter_groups(head, lr=0.1, decays="all")
    with pytest.raises(TypeError, match=r"model: expected .*, got 'a' of Tensor"):
        parameter_groups([("a", torch.ones(2))], lr=0.1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="model: expected one parameter a name, got two of 'a'"):
        parameter_groups([("a", p) for p in head.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="output_lr_scale: expected 1 with named parameters"):
        parameter_groups(head.named_parameters(), lr=0.1, output_lr_scale=2.0)


def test_a_rate_for_the_output_layer_where_there_is_none_says_so():
    for model in (nn.Linear(D, V), build_head("plif", D, V).requires_grad_(False)):
        with pytest.raises(ValueError, match="output_lr_scale: expected a model with a head"):
            uncork.parameter_groups(model, lr=0.1, output_lr_scale=4.0)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "function_lr_scale", "output_lr_scale"])
def test_a_rate_that_is_no_number_is_named(name):
    with pytest.raises(TypeError, match=f"{name}: expected a number, got 'a'"):
        parameter_groups(build_head("plif", 4, 9), **{"lr": 1e-3, name: "a"})

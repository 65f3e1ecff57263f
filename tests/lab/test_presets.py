"""Presets: the published numbers, and that each can be built and is refused when it makes no sense."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uncork.lab.errors import LabError
from uncork.lab.models import build_model
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.presets import PRESETS, get_preset


class SoftmaxHead(nn.Linear):
    def loss(self, input, target):
        return F.cross_entropy(self(input).flatten(0, -2), target.flatten())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_builds(name):
    description = PRESETS[name].description
    assert "\n" not in description
    assert description.endswith(".")
    config = TrainConfig.of(name)
    with torch.device("meta"):
        model = build_model(config.model, SoftmaxHead(config.in_features, 100), 100)
    assert model.backbone.out_features == config.in_features
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["lstm-laptop", "transformer-laptop"])
def test_laptop_presets_learn(name):
    config = TrainConfig.of(name, in_features=8)
    torch.manual_seed(0)
    model = build_model(config.model, SoftmaxHead(8, 12), 12)
    tokens = torch.arange(60).remainder(12).view(2, 30)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        output = model(tokens[:, :-1], tokens[:, 1:])
        output.loss.backward()
        optimizer.step()
        losses.append(output.cross_entropy.item())
    assert losses[0] > 2.0
    assert losses[-1] < 0.5


@pytest.mark.parametrize(
    ("name", "lr", "batch_size", "input_dropout", "hidden_dropout"),
    [("awd-lstm-ptb", 20, 20, 0.4, 0.3), ("awd-lstm-wt2", 30, 80, 0.65, 0.2)],
)
def test_published_settings(name, lr, batch_size, input_dropout, hidden_dropout):
    config = TrainConfig.of(name)
    assert config.model.model_dump(mode="json") == {
        "kind": "awd-lstm",
        "embedding_size": 400,
        "hidden_sizes": [1150, 1150, 400],
        "out_features": None,
        "tie_weights": True,
        "weight_drop": 0.5,
        "embedding_dropout": 0.1,
        "input_dropout": input_dropout,
        "hidden_dropout": hidden_dropout,
        "output_dropout": 0.4,
        "activation_penalty": 2.0,
        "temporal_penalty": 1.0,
    }
    expected = {
        "optimizer": "sgd",
        "lr": lr,
        "batch_size": batch_size,
        "bptt": 70,
        "variable_bptt": True,
        "weight_decay": 1.2e-6,
        "clip": 0.25,
        "asgd": 200,
        "schedule": "constant",
    }
    assert expected.items() <= config.model_dump().items()


def test_unknown_preset_names_those_there_are():
    with pytest.raises(LabError, match=r"awd-lstm-ptb.*lstm-laptop.*got 'lstm'"):
        get_preset("lstm")

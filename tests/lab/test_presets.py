"""Presets: the published numbers, and that each can be built and is refused when it makes no sense."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uncork.lab.errors import LabError
from uncork.lab.models import TransformerConfig, build_model, model_config_from_dict
from uncork.lab.train.presets import PRESETS, Preset, TrainingPreset, get_preset


class SoftmaxHead(nn.Linear):
    def loss(self, input, target):
        return F.cross_entropy(self(input).flatten(0, -2), target.flatten())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_goes_through_json(name):
    preset = get_preset(name)
    assert "\n" not in preset.description
    assert preset.description.endswith(".")
    with torch.device("meta"):
        model = build_model(preset.model, SoftmaxHead(preset.model.feature_size, 100), 100)
    assert model.backbone.out_features == preset.model.feature_size
    stored = json.loads(json.dumps({"model": preset.model.to_dict(), "training": preset.training.to_dict()}))
    assert model_config_from_dict(stored["model"]) == preset.model
    assert TrainingPreset.from_dict(stored["training"]) == preset.training


@pytest.mark.parametrize("name", ["lstm-laptop", "transformer-laptop"])
def test_laptop_presets_learn(name):
    preset = get_preset(name).with_out_features(8)
    torch.manual_seed(0)
    model = build_model(preset.model, SoftmaxHead(8, 12), 12)
    tokens = torch.arange(60).remainder(12).view(2, 30)
    optimizer = torch.optim.Adam(model.parameters(), lr=preset.training.lr)
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
    preset = get_preset(name)
    model, training = preset.model.to_dict(), preset.training.to_dict()
    assert model == {
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
    assert expected.items() <= training.items()


def test_unknown_preset_names_those_there_are():
    with pytest.raises(LabError, match=r"awd-lstm-ptb.*lstm-laptop.*got 'lstm'"):
        get_preset("lstm")


def test_with_out_features_changes_nothing_else():
    preset = get_preset("transformer-laptop")
    changed = preset.with_out_features(7)
    assert changed.model.feature_size == 7
    assert dataclasses.replace(changed.model, out_features=preset.model.out_features) == preset.model
    assert changed.training == preset.training
    with pytest.raises(LabError, match="out_features must be an integer of at least 1, got 0"):
        preset.with_out_features(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"bptt": 0}, "bptt"),
        ({"epochs": 0}, "epochs"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"clip": -1.0}, "clip"),
        ({"warmup": 1.0}, "warmup must be below 1"),
        ({"variable_bptt": 1}, "variable_bptt"),
        ({"optimizer": "rmsprop"}, "optimizer must be one of adam, sgd, got 'rmsprop'"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine"),
        ({"optimizer": "sgd", "asgd": "always"}, "asgd must be"),
        ({"optimizer": "sgd", "asgd": 0}, "asgd"),
        ({"optimizer": "adam", "asgd": "trigger"}, "the optimizer is 'adam'"),
        ({"momentum": 0.9}, "unknown training setting: momentum"),
    ],
)
def test_bad_training_settings(values, message):
    with pytest.raises(LabError, match=message):
        TrainingPreset.from_dict(values)


def test_a_transformer_limits_the_length_of_its_batches():
    model = TransformerConfig(max_length=32)
    Preset("Fits.", model, TrainingPreset(bptt=32))
    with pytest.raises(LabError, match="max_length = 32, got 33"):
        Preset("Too long.", model, TrainingPreset(bptt=33))
    with pytest.raises(LabError, match="variable_bptt"):
        Preset("Varies.", model, TrainingPreset(bptt=16, variable_bptt=True))

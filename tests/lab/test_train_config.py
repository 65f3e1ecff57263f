"""The settings of a training run: checked at once, stored as JSON, resolved."""

import json
import math

import pytest

from uncork.lab.errors import LabError
from uncork.lab.train_config import TrainConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "softmacks"}, "head must be one of softmax"),
        ({"preset": "lstm"}, "preset must be one of"),
        ({"in_features": 0}, "in_features must be an integer of at least 1, got 0"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"precision": "fp16"}, "precision must be 'no' or 'bf16'"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"log_every": 0}, "log_every must be"),
        ({"patience": 0}, "patience must be"),
        ({"function_lr_scale": -1}, "function_lr_scale must be"),
        ({"output_lr_scale": math.inf}, "output_lr_scale must be"),
        ({"training_options": {"lr": 1.0}}, "training_options: give lr by the field lr"),
        ({"training_options": {"asgd": "trigger"}}, "asgd averages SGD's iterates"),
        ({"training_options": {"speed": 1}}, "unknown training setting: speed"),
        ({"model_options": {"out_features": 3}}, "give out_features by the field in_features"),
        ({"model_options": {"depth": 3}}, "unknown setting of model 'awd-lstm': depth"),
        ({"preset": "transformer-laptop", "bptt": 300}, "bptt must be at most"),
        ({"head_options": 3}, "head_options must be a dictionary"),
    ],
)
def test_bad_settings_are_refused_at_once(fields, message):
    with pytest.raises(LabError, match=message):
        TrainConfig(**fields)


def test_settings_travel_through_json_and_resolve():
    config = TrainConfig(head="plif", head_options={"num_pieces": 9}, epochs=1.5, clip=0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    full = config.resolved()
    assert full.resolved() == full
    assert full.resolved_preset() == config.resolved_preset()
    assert (full.clip, full.function_clip, full.epochs, full.in_features) == (0.0, 0.0, 1.5, 32)
    assert config.resolved_preset().training.clip is None
    assert TrainConfig(preset="awd-lstm-ptb").resolved().function_clip == 0.25
    with pytest.raises(LabError, match="unknown setting: colour"):
        TrainConfig.from_dict({"colour": 1})


def test_a_field_added_later_is_left_out_at_its_default():
    assert "output_lr_scale" not in TrainConfig().to_dict()
    config = TrainConfig(output_lr_scale=4.0)
    assert config.to_dict()["output_lr_scale"] == 4.0
    assert TrainConfig.from_dict(config.to_dict()) == config

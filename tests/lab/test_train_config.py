"""The settings of a training run: checked at once, stored as JSON, resolved."""

import dataclasses
import json
import math
from typing import Any

import pytest

from uncork.lab.data.tokenization import WordTokenizer
from uncork.lab.errors import LabError
from uncork.lab.run.key import key_of
from uncork.lab.train import config as train_config
from uncork.lab.train.config import RULES, TrainConfig, text_record
from uncork.lab.train.presets import PRESETS, TrainingPreset, get_preset


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


def test_files_of_earlier_versions_are_read_as_they_were_meant():
    stored = TrainConfig(bias_prior=False, output_lr_scale=1.0).to_dict()
    earlier = {name: value for name, value in stored.items() if name != "output_lr_scale"}
    assert TrainConfig.from_dict(earlier).output_lr_scale == 1.0
    assert TrainConfig.from_dict(TrainConfig().to_dict()).output_lr_scale is None


def test_the_preset_says_how_the_output_layer_starts_and_learns(monkeypatch):
    own = dataclasses.replace(get_preset("lstm-small").training, bias_prior=True, output_lr_scale=8.0)
    monkeypatch.setitem(PRESETS, "lstm-small", dataclasses.replace(PRESETS["lstm-small"], training=own))
    config = TrainConfig(preset="lstm-small")
    assert (config.resolved().bias_prior, config.resolved().output_lr_scale) == (True, 8.0)
    plain = TrainConfig(preset="lstm-small", bias_prior=False, output_lr_scale=1).resolved()
    assert (plain.bias_prior, plain.output_lr_scale) == (False, 1)
    assert plain.resolved_preset().training == dataclasses.replace(own, bias_prior=False, output_lr_scale=1)
    with pytest.raises(LabError, match="give bias_prior by the field bias_prior"):
        TrainConfig(training_options={"bias_prior": True})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resolved_config_is_of_the_same_body(preset):
    """A body without a linear map before the head got one of as many features."""
    config = TrainConfig(preset=preset)
    assert config.resolved().resolved_preset() == config.resolved_preset()
    assert config.resolved_preset().model == PRESETS[preset].model
    assert key_of(config.record()) == key_of(config.resolved().record())


def test_a_record_holds_values_and_no_names(monkeypatch):
    config = TrainConfig(preset="lstm-small", head="plif", head_options={"num_pieces": 9}, corpus="a", vocab_size=5)
    text = {"sha256": "0", "vocab_size": 5}
    key = key_of(config.record(text))
    monkeypatch.setitem(PRESETS, "another", PRESETS["lstm-small"])
    for same in (
        {"preset": "another"}, {"corpus": "b"}, {"vocab_size": 50}, {"checkpoint_every": 1.0}, {"lr": 8e-3},
        {"in_features": 16}, {"head_options": {"num_pieces": 9, "scale": 1.0}}, {"model_options": {"weight_drop": 0}},
    ):  # fmt: skip
        assert key_of(dataclasses.replace(config, **same).record(text)) == key, same
    assert key_of(config.record({"sha256": "0", "vocab_size": 6})) == key
    others: tuple[dict[str, Any], ...] = (
        {"preset": "lstm-laptop"}, {"lr": 0.1}, {"head": "softmax", "head_options": {}}, {"seed": 1}, {"epochs": 1},
        {"head_options": {}}, {"in_features": 17}, {"model_options": {"weight_drop": 0.1}}, {"bias_prior": False},
        {"training_options": {"asgd": 3, "optimizer": "sgd"}}, {"output_lr_scale": 2.0}, {"max_steps": 3},
        {"precision": "bf16"}, {"function_lr_scale": 2.0}, {"clip": 2.0}, {"patience": 3}, {"eval_every": 7},
    )  # fmt: skip
    for other in others:
        assert key_of(dataclasses.replace(config, **other).record(text)) != key, other
    assert key_of(config.record({"sha256": "1", "vocab_size": 5})) != key
    monkeypatch.setattr(train_config, "RULES", RULES + 1)
    assert key_of(config.record(text)) != key


def test_every_setting_is_in_the_record():
    """A field of TrainConfig or of a preset that no record holds would not be known a run by."""
    record = TrainConfig().record({"sha256": "0"})
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    training = {field.name for field in dataclasses.fields(TrainingPreset)}
    held = {*record["settings"], *record["training"], *record["model"], "head"}
    elsewhere = {"preset", "in_features", "model_options", "training_options", "head_options"}
    text = {"corpus", "tokenization", "vocab_size", "min_count", "max_train_tokens"}
    assert fields - held == elsewhere | text | TrainConfig.HARMLESS
    assert training - {*record["training"], *record["settings"]} == set()


def test_the_text_is_known_by_all_that_numbers_depend_on(tiny_corpus):
    known = text_record(tiny_corpus)["sha256"]
    assert known == text_record(dataclasses.replace(tiny_corpus, name="b", fingerprint="another"))["sha256"]
    train = tiny_corpus.splits["train"].clone()
    train[7] = (train[7] + 1) % tiny_corpus.vocab_size
    for change in (
        {"splits": {**tiny_corpus.splits, "train": train}},
        {"words": {**tiny_corpus.words, "test": 1}},
        {"bytes": None},
        {"tokenizer": WordTokenizer([*tiny_corpus.tokenizer.tokens()[:-1], "other"], "raw")},
    ):
        assert text_record(dataclasses.replace(tiny_corpus, **change))["sha256"] != known

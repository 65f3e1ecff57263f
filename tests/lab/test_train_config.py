"""The settings of a training run: checked at once, stored as JSON, resolved."""

import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from uncork.lab.data.tokenization import WordTokenizer
from uncork.lab.errors import LabError
from uncork.lab.run.key import key_of
from uncork.lab.train import config as train_config
from uncork.lab.train.config import RULES, Text, TrainConfig, text_record
from uncork.lab.train.presets import PRESETS


def with_values(monkeypatch, name, **values):
    monkeypatch.setitem(PRESETS, name, PRESETS[name]._replace(values={**PRESETS[name].values, **values}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "softmacks"}, "head must be one of softmax.* got 'softmacks'"),
        ({"preset": "lstm"}, "preset must be one of"),
        ({"in_features": 0}, "in_features must be an integer of at least 1 .*, got 0"),
        ({"in_features": 16.0}, "in_features must be an integer"),
        ({"epochs": 0}, "epochs must be a number above 0 and at most 1,000,000, got 0"),
        ({"lr": -1.0}, "lr must be a finite number above 0, got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number above 0, got nan"),
        ({"lr": "0.1"}, "lr must be a finite number above 0, got '0.1'"),
        ({"precision": "fp16"}, "precision must be 'no' or 'bf16', got 'fp16'"),
        ({"tokenization": "letter"}, "tokenization must be 'word' or 'bpe', got 'letter'"),
        ({"seed": 1.5}, r"seed must be an integer from 0 to 2\^63 - 1, got 1.5"),
        ({"log_every": 0}, "log_every must be an integer of at least 1 .*, got 0"),
        ({"patience": True}, "patience must be an integer of at least 1 .*, got True"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"bptt": 2**63}, r"bptt must be an integer of at least 1 and below 2\^63, got 9223372036854775808"),
        ({"clip": -1}, "clip must be a finite number of at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"function_lr_scale": -1}, "function_lr_scale must be a finite number of at least 0, got -1"),
        ({"output_lr_scale": math.inf}, "output_lr_scale must be a finite number of at least 0, got inf"),
        ({"bias_prior": 1}, "bias_prior must be true or false, got 1"),
        ({"training_options": {"eval_batch_size": 0}}, "eval_batch_size must be"),
        ({"training_options": {"warmup": 1.0}}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"training_options": {"variable_bptt": 1}}, "variable_bptt must be true or false, got 1"),
        ({"training_options": {"optimizer": "rmsprop"}}, "optimizer must be 'adam' or 'sgd', got 'rmsprop'"),
        ({"training_options": {"schedule": "linear"}}, "schedule must be 'constant' or 'cosine', got 'linear'"),
        ({"training_options": {"decay": None}}, "decay must be 'all' or 'matrices', got None"),
        ({"training_options": {"asgd": "trigger"}}, "asgd averages SGD's iterates; the optimizer is 'adam'"),
        ({"training_options": {"optimizer": "sgd", "asgd": "always"}}, "asgd must be 'never', 'trigger' or an epoch"),
        ({"training_options": {"optimizer": "sgd", "asgd": 0}}, "asgd must be 'never', 'trigger' or an epoch"),
        ({"training_options": {"speed": 1}}, "unknown setting: speed"),
        ({"training_options": 3}, "training_options must be a valid dictionary, got 3"),
        ({"model_options": {"depth": 3}}, "unknown setting: depth"),
        ({"model_options": {"input_dropout": 1}}, r"input_dropout must be in \[0, 1\), got 1"),
        ({"head_options": 3}, "head_options must be a valid dictionary, got 3"),
        ({"colour": 1}, "unknown setting: colour"),
        ({"preset": "transformer-laptop", "bptt": 257}, "bptt must be at most .* max_length = 256, got 257"),
        ({"preset": "transformer-laptop", "training_options": {"variable_bptt": True}}, "variable_bptt draws lengths"),
    ],
)
def test_bad_settings_are_refused_at_once(fields, message):
    with pytest.raises(LabError, match=message):
        TrainConfig.of(**fields)


def test_settings_are_frozen_and_travel_through_json_and_pickle():
    config = TrainConfig.of(head="plif", head_options={"num_pieces": 9}, epochs=1.5, clip=0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert (config.clip, config.function_clip, config.epochs, config.in_features) == (0, 0, 1.5, 32)
    with pytest.raises(ValidationError, match="frozen"):
        config.lr = 0.1


def test_the_functions_clip_goes_with_clip_unless_it_is_given():
    assert TrainConfig.of("awd-lstm-ptb").function_clip == 0.25
    assert TrainConfig.of(clip=2.0).function_clip == 2.0
    assert TrainConfig.of(function_clip=0.5).updated(clip=2.0).function_clip == 0.5
    assert TrainConfig.of(clip=2.0, function_clip=1.0).asked()["function_clip"] == 1.0
    assert "function_clip" not in TrainConfig.of(clip=2.0).asked()


def test_files_of_earlier_versions_are_read_as_they_were_meant():
    """There None was the preset's value, options were those alone that were given, and some settings were not there."""
    earlier = {
        "corpus": "sotu", "tokenization": "word", "vocab_size": None, "min_count": 2, "max_train_tokens": None,
        "preset": "lstm-laptop", "in_features": None, "model_options": {"hidden_sizes": [8]}, "head": "softmax",
        "head_options": {}, "bias_prior": False, "seed": 0, "epochs": 2.0, "max_steps": None, "lr": None,
        "batch_size": None, "bptt": 10, "clip": None, "weight_decay": None, "training_options": {"decay": "all"},
        "function_lr_scale": 1.0, "function_clip": None, "precision": "no", "eval_every": None, "log_every": 20,
        "patience": None, "checkpoint_every": 5.0,
    }  # fmt: skip
    config = TrainConfig.from_dict(earlier)
    given = {"min_count": 2, "bias_prior": False, "epochs": 2.0, "bptt": 10, "checkpoint_every": 5.0}
    options = {"model_options": {"hidden_sizes": [8]}, "training_options": {"decay": "all"}}
    assert config == TrainConfig.of("lstm-laptop", **given, **options)
    assert (config.lr, config.clip, config.decay, config.model.hidden_sizes) == (3e-3, 1.0, "all", (8,))


def test_a_preset_is_values_that_are_replaced(monkeypatch):
    with_values(monkeypatch, "lstm-small", output_lr_scale=8.0)
    config = TrainConfig.of("lstm-small")
    assert (config.bias_prior, config.output_lr_scale) == (True, 8.0)
    plain = TrainConfig.of("lstm-small", bias_prior=False, output_lr_scale=1)
    assert plain == config.updated(bias_prior=False, output_lr_scale=1)
    assert plain.asked() == {"corpus": "sotu", "preset": "lstm-small", "head": "softmax", "bias_prior": False,
                             "output_lr_scale": 1.0}  # fmt: skip
    assert TrainConfig.from_dict(plain.asked()) == plain


@pytest.mark.parametrize("preset", PRESETS)
def test_as_many_features_as_the_body_has_add_no_linear_map(preset):
    config = TrainConfig.of(preset)
    assert config.updated(in_features=config.in_features) == config
    changed = config.updated(in_features=7)
    assert (changed.in_features, changed.model.out_features) == (7, 7)
    assert changed.model.updated(out_features=config.model.out_features) == config.model
    assert changed.updated(model=config.model) == config


def test_a_record_holds_values_and_no_names(monkeypatch):
    base = {"preset": "lstm-small", "head": "plif", "head_options": {"num_pieces": 9}, "corpus": "a", "vocab_size": 5}
    config = TrainConfig.of(**base)
    text = {"sha256": "0", "vocab_size": 5}
    key = key_of(config.record(text))
    monkeypatch.setitem(PRESETS, "another", PRESETS["lstm-small"])
    for same in (
        {"preset": "another"}, {"corpus": "b"}, {"vocab_size": 50}, {"checkpoint_every": 1.0}, {"lr": 8e-3},
        {"in_features": 16}, {"head_options": {"num_pieces": 9, "scale": 1.0}}, {"model_options": {"weight_drop": 0}},
    ):  # fmt: skip
        assert key_of(TrainConfig.of(**{**base, **same}).record(text)) == key, same
    assert key_of(config.record({"sha256": "0", "vocab_size": 6})) == key
    others: tuple[dict[str, Any], ...] = (
        {"preset": "lstm-laptop"}, {"lr": 0.1}, {"head": "softmax", "head_options": {}}, {"seed": 1}, {"epochs": 1},
        {"head_options": {}}, {"in_features": 17}, {"model_options": {"weight_drop": 0.1}}, {"bias_prior": False},
        {"training_options": {"asgd": 3, "optimizer": "sgd"}}, {"output_lr_scale": 2.0}, {"max_steps": 3},
        {"precision": "bf16"}, {"function_lr_scale": 2.0}, {"clip": 2.0}, {"patience": 3}, {"eval_every": 7},
    )  # fmt: skip
    for other in others:
        assert key_of(TrainConfig.of(**{**base, **other}).record(text)) != key, other
    assert key_of(config.record({"sha256": "1", "vocab_size": 5})) != key
    monkeypatch.setattr(train_config, "RULES", RULES + 1)
    assert key_of(config.record(text)) != key


def test_every_setting_is_in_the_record():
    """A field of TrainConfig that no record holds would not be known a run by."""
    record = TrainConfig.of().record({"sha256": "0"})
    held = {*record["settings"], *record["training"], *record, *Text.model_fields}
    assert TrainConfig.model_fields.keys() - held == {"preset", "head_options", "checkpoint_every"}
    assert record["model"].keys() == TrainConfig.of().model.model_dump().keys()


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

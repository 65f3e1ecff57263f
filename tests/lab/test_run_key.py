"""What a run is: one key for equal records, and a difference that is named as the user knows it."""

import pytest

from uncork.lab.run import key as run_key
from uncork.lab.run.key import differences, key_of, told
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.presets import PRESETS

TEXT = {"sha256": "aa", "tokens": {"train": 100}}


def record(text=TEXT, **fields):
    return TrainConfig.of(**{"preset": "lstm-small", **fields}).record(text)


def with_values(monkeypatch, name="lstm-small", **values):
    preset = PRESETS[name]
    monkeypatch.setitem(PRESETS, name, preset._replace(values={**preset.values, **values}))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"lr": 0.1}, {"lr": 0.2}, ["lr was 0.1, is 0.2"]),
        ({"lr": 0.1}, {}, ["lr was 0.1, is 0.008"]),
        ({}, {"seed": 4}, ["seed was 0, is 4"]),
        ({"epochs": 2}, {"epochs": 3.5}, ["epochs was 2, is 3.5"]),
        ({"clip": 1.0}, {"clip": 0.0}, ["clip was 1, is null"]),
        ({"function_clip": 0.5}, {}, ["function_clip was 0.5, is 1"]),
        ({"head": "plif"}, {"head": "softmax"}, ['head was "plif", is "softmax"']),
        (
            {"head": "plif", "head_options": {"num_pieces": 9}},
            {"head": "plif"},
            ["head_options.num_pieces was 9, is not given"],
        ),
        ({"in_features": 8}, {}, ["in_features was 8, is 16"]),
        ({"model_options": {"weight_drop": 0.5}}, {}, ["model_options.weight_drop was 0.5, is 0"]),
        ({"preset": "lstm-small"}, {"preset": "lstm-laptop"}, ['preset was "lstm-small", is "lstm-laptop"']),
        ({"bias_prior": False}, {"bias_prior": True}, ["bias_prior was false, is true"]),
    ],
)
def test_a_difference_is_named_as_it_was_given(before, after, expected):
    found = differences(record(**before), record(**after))
    assert found == expected
    assert key_of(record(**before)) != key_of(record(**after))


def test_a_preset_that_changed_is_named_with_its_value(monkeypatch):
    was = record()
    with_values(monkeypatch, lr=0.004)
    assert differences(was, record()) == ["preset lstm-small: training.lr was 0.008, is 0.004"]
    with_values(monkeypatch, lr=0.008, epochs=7)
    assert differences(was, record()) == ["preset lstm-small: training.epochs was 4, is 7"]
    with_values(monkeypatch, model=PRESETS["lstm-small"].values["model"].updated(input_dropout=0.5))
    assert differences(record(), record()) == []
    assert "preset lstm-small: model.input_dropout was 0.2, is 0.5" in differences(was, record())


def test_a_default_of_a_head_that_changed_is_named():
    was, now = record(head="plif"), record(head="plif")
    now["head"]["logit_function"]["options"]["num_pieces"] = 50
    assert differences(was, now) == ["head plif: logit_function.PLIF.num_pieces was 100, is 50"]


def test_a_text_that_changed_is_told_with_a_count():
    other = {"sha256": "bb", "tokens": {"train": 120}}
    told_of = "the text behind --corpus has changed"
    assert differences(record(), record(other)) == [f"{told_of} (tokens.train was 100, is 120)"]
    assert differences(record(), record({**TEXT, "sha256": "bb"})) == [told_of]
    assert differences(record(), record(other, min_count=2)) == ["min_count was not given, is 2"]


def test_other_rules_are_told():
    assert differences(record(), {**record(), "rules": 7}) == ["the version of the rules was 1, is 7"]


def test_a_value_that_came_later_leaves_keys_as_they_are_where_it_means_as_before(monkeypatch):
    before = record()
    del before["training"]["decay"]
    key = key_of(before)
    monkeypatch.setattr(run_key, "LATER", {**run_key.LATER, "training.decay": "all"})
    assert key_of(before) == key
    assert key_of(record(training_options={"decay": "all"})) == key
    assert differences(before, record(training_options={"decay": "all"})) == []
    matrices = record(training_options={"decay": "matrices"})
    assert key_of(matrices) != key
    assert differences(before, matrices) == ['preset lstm-small: training.decay was absent, is "matrices"']


def test_an_option_of_a_function_that_came_later_is_found_within_a_composition(monkeypatch):
    scaled = {"head": "plif", "head_options": {"scale": 4}}
    before = record(**scaled)
    plif = before["head"]["logit_function"]["options"]["functions"][1]
    del plif["options"]["unit_slope"]
    assert key_of(before) != key_of(record(**scaled))
    monkeypatch.setattr(run_key, "LATER", {**run_key.LATER, "PLIF.unit_slope": False})
    assert key_of(before) == key_of(record(**scaled))
    another = record(head="plif", head_options={"scale": 4, "unit_slope": True})
    assert key_of(another) != key_of(before)


def test_many_differences_are_one_line():
    lines = [f"{name} was 1, is 2" for name in "abcdefgh"]
    assert told(lines) == "; ".join(lines[:6]) + "; and 2 more"
    assert told(lines[:2]) == "a was 1, is 2; b was 1, is 2"

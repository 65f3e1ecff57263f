"""What every backbone does under a head: shapes, losses, gradients, tied weights, copies, settings."""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from uncork.lab.errors import LabError
from uncork.lab.models import (
    AWDLSTM,
    AWDLSTMConfig,
    LanguageModel,
    LookupConfig,
    TransformerConfig,
    build_model,
)

V = 23
CONFIGS: list[Any] = [
    AWDLSTMConfig(embedding_size=6, hidden_sizes=(7, 5)),
    AWDLSTMConfig(embedding_size=6, hidden_sizes=(7,), out_features=4),
    TransformerConfig(width=8, depth=2, num_heads=2, max_length=32),
    TransformerConfig(width=8, depth=1, num_heads=1, max_length=32, out_features=4),
    LookupConfig(out_features=5),
    LookupConfig(order=2, rows=200, out_features=5),
]
TIED_CONFIGS: list[Any] = [
    AWDLSTMConfig(embedding_size=5, hidden_sizes=(7, 5), tie_weights=True),
    TransformerConfig(width=8, depth=1, num_heads=2, max_length=32, tie_weights=True),
    LookupConfig(out_features=5, tie_weights=True),
]


class SoftmaxHead(nn.Linear):
    def loss(self, input, target):
        return F.cross_entropy(self(input).flatten(0, -2), target.flatten())


def make_model(config, vocab_size=V, dtype=torch.float64):
    torch.manual_seed(0)
    return build_model(config, SoftmaxHead(config.feature_size, vocab_size), vocab_size).to(dtype)


def make_tokens(batch=3, time=8, vocab_size=V):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", CONFIGS + TIED_CONFIGS)
def test_shapes_and_loss(config):
    model, tokens = make_model(config).eval(), make_tokens()
    target = tokens.roll(-1, 1)
    features, state = model.features(tokens)
    assert features.shape == (3, 8, config.feature_size)
    assert [part.shape for part in state] == [part.shape for part in model.initial_state(3)]
    output = model(tokens)
    assert output.loss is None
    assert output.cross_entropy is None
    torch.testing.assert_close(output.logits, model.head(features))
    scored = model(tokens, target)
    assert scored.logits is None
    torch.testing.assert_close(scored.loss, F.cross_entropy(output.logits.flatten(0, 1), target.flatten()))
    assert torch.equal(scored.cross_entropy, scored.loss)
    assert scored.loss.requires_grad
    assert not scored.cross_entropy.requires_grad


def test_training_loss_is_cross_entropy_plus_penalty():
    config = CONFIGS[0].updated(activation_penalty=2.0, temporal_penalty=3.0)
    model, tokens = make_model(config).train(), make_tokens()
    output = model(tokens, tokens)
    penalty = model.backbone(tokens, ()).penalty
    assert penalty > 0
    torch.testing.assert_close(output.loss, output.cross_entropy + penalty)
    assert model.eval().backbone(tokens, ()).penalty == 0


@pytest.mark.parametrize("config", CONFIGS + TIED_CONFIGS)
def test_every_parameter_gets_a_gradient(config):
    model, tokens = make_model(config).train(), make_tokens()
    model(tokens, tokens.roll(-1, 1)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("config", CONFIGS + TIED_CONFIGS)
def test_deepcopy_and_state_dict(config):
    model, tokens = make_model(config).eval(), make_tokens()
    logits = model(tokens).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, logits)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    other = build_model(config, SoftmaxHead(config.feature_size, V), V).to(torch.float64).eval()
    assert not torch.equal(other(tokens).logits, logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, logits)


@pytest.mark.parametrize("config", CONFIGS + TIED_CONFIGS)
def test_later_tokens_do_not_change_earlier_logits(config):
    model, tokens = make_model(config).eval(), make_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-13)
    reach = config.order if isinstance(config, LookupConfig) else 3  # logits that depend on the changed token
    assert ((before - after)[:, 5 : 5 + reach].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("config", TIED_CONFIGS)
def test_tied_weights_are_one_parameter_with_the_summed_gradient(config):
    model, tokens = make_model(config), make_tokens()
    assert model.head.weight is model.backbone.embedding.weight
    assert copy.deepcopy(model).head.weight.shape == model.head.weight.shape
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.backbone.embedding.weight
    # The same numbers in two parameters.
    untied = make_model(config.updated(tie_weights=False))
    assert untied.tied_keys() == {}
    untied.load_state_dict(model.state_dict())
    target = tokens.roll(-1, 1)
    model(tokens, target).loss.backward()
    untied(tokens, target).loss.backward()
    parts = untied.backbone.embedding.weight.grad, untied.head.weight.grad
    assert min(part.abs().max() for part in parts) > 0
    torch.testing.assert_close(model.head.weight.grad, sum(parts))


@pytest.mark.parametrize("config", TIED_CONFIGS)
def test_tied_weights_go_through_safetensors(config):
    model, tokens = make_model(config).eval(), make_tokens()
    state = model.state_dict()
    for repeated, kept in model.tied_keys().items():
        assert state[repeated].data_ptr() == state[kept].data_ptr()
        del state[repeated]
    loaded = load(save(state))
    other = build_model(config, SoftmaxHead(config.feature_size, V), V).to(torch.float64).eval()
    loaded.update({repeated: loaded[kept] for repeated, kept in other.tied_keys().items()})
    other.load_state_dict(loaded)
    assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_tying_different_sizes_is_an_error():
    config = AWDLSTMConfig(embedding_size=6, hidden_sizes=(5,), tie_weights=True)
    with pytest.raises(ValueError, match=r"embedding \(23, 6\), head.weight \(23, 5\)"):
        LanguageModel(AWDLSTM(config, V), SoftmaxHead(5, V), tie_weights=True)
    with pytest.raises(LabError, match="do not fit"):
        build_model(config, SoftmaxHead(5, V), V)


def test_a_head_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"backbone\.out_features = 5, got 4"):
        LanguageModel(AWDLSTM(CONFIGS[0], V), SoftmaxHead(4, V))
    with pytest.raises(TypeError, match="loss"):
        LanguageModel(AWDLSTM(CONFIGS[0], V), nn.Linear(5, V))


@pytest.mark.parametrize("config", CONFIGS)
def test_bad_calls(config):
    model, tokens = make_model(config), make_tokens()
    for bad in (tokens[0], tokens.float(), tokens[:, :0], tokens.int()):
        with pytest.raises(ValueError, match="tokens must be int64"):
            model(bad)
    with pytest.raises(ValueError, match="target must have the shape"):
        model(tokens, tokens[:, 1:])
    with pytest.raises(ValueError, match="state must"):
        model(tokens, state=(torch.zeros(3, 99),))


@pytest.mark.parametrize("config", CONFIGS + TIED_CONFIGS)
def test_bfloat16_autocast_is_near_float32(config):
    model, tokens = make_model(config, dtype=torch.float32).eval(), make_tokens()
    target = tokens.roll(-1, 1)
    exact = model(tokens, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(tokens, target)
        again = model(tokens, target, rough.state)
    assert abs(rough.loss - exact.loss) < 0.02
    again.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("config", CONFIGS + TIED_CONFIGS)
def test_config_round_trip_through_json(config):
    assert type(config)(**json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "awd-lstm", "widht": 3}, "unknown setting: widht"),
        ({"kind": "awd-lstm", "hidden_sizes": []}, "hidden_sizes"),
        ({"kind": "awd-lstm", "hidden_sizes": 5}, "hidden_sizes"),
        (
            {"kind": "awd-lstm", "hidden_sizes": [4, 0]},
            r"hidden_sizes must be a list of at least one size, each at least 1, got \[4, 0\]",
        ),
        ({"kind": "awd-lstm", "embedding_size": -1}, "embedding_size"),
        ({"kind": "awd-lstm", "out_features": 0}, "out_features must be an integer of at least 1 .*, got 0"),
        ({"kind": "awd-lstm", "tie_weights": "yes"}, "tie_weights"),
        ({"kind": "awd-lstm", "weight_drop": 1.0}, r"weight_drop must be in \[0, 1\), got 1.0"),
        ({"kind": "awd-lstm", "embedding_dropout": -0.1}, "embedding_dropout"),
        ({"kind": "awd-lstm", "input_dropout": float("nan")}, "input_dropout"),
        ({"kind": "awd-lstm", "hidden_dropout": "0.1"}, "hidden_dropout"),
        ({"kind": "awd-lstm", "output_dropout": 2}, "output_dropout"),
        ({"kind": "awd-lstm", "activation_penalty": -1}, "activation_penalty"),
        ({"kind": "awd-lstm", "temporal_penalty": float("inf")}, "temporal_penalty"),
        ({"kind": "transformer", "width": 10, "num_heads": 4}, "multiple of 2 . num_heads = 8"),
        ({"kind": "transformer", "width": 12, "num_heads": 4}, "multiple of 2 . num_heads = 8"),
        ({"kind": "transformer", "depth": 0}, "depth"),
        ({"kind": "transformer", "num_heads": 0}, "num_heads"),
        ({"kind": "transformer", "max_length": True}, "max_length"),
        ({"kind": "transformer", "mlp_size": 0}, "mlp_size"),
        ({"kind": "transformer", "out_features": 1.5}, "out_features"),
        ({"kind": "transformer", "dropout": 1}, "dropout"),
        ({"kind": "lookup", "order": 3}, "order must be 1 or 2, got 3"),
        ({"kind": "lookup", "order": 2}, "rows must be an integer of at least 1 where order is 2, got None"),
        ({"kind": "lookup", "rows": 0}, "rows must be an integer of at least 1 .*, got 0"),
    ],
)
def test_bad_configs(values, message):
    kinds = {"awd-lstm": AWDLSTMConfig, "transformer": TransformerConfig, "lookup": LookupConfig}
    with pytest.raises(LabError, match=message):
        kinds[values["kind"]](**values)


def test_config_of_another_kind():
    with pytest.raises(LabError, match="kind must be 'awd-lstm', got 'transformer'"):
        AWDLSTMConfig(kind="transformer")


@pytest.mark.parametrize("config", CONFIGS[:3:2])
def test_empty_vocabulary_is_an_error(config):
    with pytest.raises(LabError, match="vocab_size"):
        config.build(0)

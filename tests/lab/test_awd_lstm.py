"""AWD-LSTM held to plain LSTMs, direct formulas and the published parameter counts."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from uncork.lab.layers import WeightDropLSTM, embedded, in_one_block, locked_dropout
from uncork.lab.models import AWDLSTM, AWDLSTMConfig, build_model
from uncork.lab.train.presets import get_preset

V = 23
CONFIG = AWDLSTMConfig(embedding_size=6, hidden_sizes=(7, 5))


class SoftmaxHead(nn.Linear):
    def loss(self, input, target):
        return F.cross_entropy(self(input).flatten(0, -2), target.flatten())


def make_model(config, vocab_size=V, dtype=torch.float64):
    torch.manual_seed(0)
    return build_model(config, SoftmaxHead(config.feature_size, vocab_size), vocab_size).to(dtype)


def make_tokens(batch=3, time=8, vocab_size=V):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(1))


def plain_lstm(layer):
    lstm = nn.LSTM(layer.weight_ih.shape[1], layer.hidden_size, batch_first=True).to(layer.weight_ih.dtype)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(lstm, f"{name}_l0").copy_(getattr(layer, name))
    return lstm


def unrolled_lstm(x, weight_ih, weight_hh, bias_ih, bias_hh, hidden, cell):
    outputs = []
    for step in x.unbind(1):
        gates = F.linear(step, weight_ih, bias_ih) + F.linear(hidden, weight_hh, bias_hh)
        i, f, g, o = gates.chunk(4, dim=-1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
    return torch.stack(outputs, 1)


def test_evaluation_equals_plain_lstm():
    config = AWDLSTMConfig(
        embedding_size=6,
        hidden_sizes=(7, 5),
        weight_drop=0.5,
        embedding_dropout=0.5,
        input_dropout=0.5,
        hidden_dropout=0.5,
        output_dropout=0.5,
    )
    model, tokens = make_model(config).eval(), make_tokens()
    x = model.backbone.embedding(tokens)
    for layer in model.backbone.layers:
        x = plain_lstm(layer)(x)[0]
    torch.testing.assert_close(model.features(tokens)[0], x)
    assert not torch.allclose(model.train().features(tokens)[0], x)


def test_weight_drop_equals_a_masked_lstm_with_its_gradients():
    torch.manual_seed(0)
    layer = WeightDropLSTM(4, 6, weight_drop=0.4).double().train()
    x = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    hidden, cell = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    torch.manual_seed(5)
    output = layer(x, hidden, cell)[0]
    upstream = torch.randn_like(output)
    got = torch.autograd.grad(output, [x, *layer.parameters()], upstream)

    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(layer.weight_hh), 0.4)
    assert 0 < (mask == 0).double().mean() < 1
    manual = unrolled_lstm(x, layer.weight_ih, layer.weight_hh * mask, layer.bias_ih, layer.bias_hh, hidden, cell)
    expected = torch.autograd.grad(manual, [x, *layer.parameters()], upstream)
    torch.testing.assert_close(output, manual)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    assert (got[1 + names.index("weight_hh")][mask == 0] == 0).all()


def test_weight_drop_draws_anew_at_each_call_and_leaves_the_raw_weight():
    torch.manual_seed(0)
    layer = WeightDropLSTM(4, 6, weight_drop=0.5).train()
    raw = layer.weight_hh.detach().clone()
    x, zero = torch.randn(2, 5, 4), torch.zeros(2, 6)
    first, second = layer(x, zero, zero)[0], layer(x, zero, zero)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first[:, 0], second[:, 0])  # the first step starts from hidden 0: nothing to drop
    assert torch.equal(layer.weight_hh, raw)


def test_weight_drop_gradcheck():
    layer = WeightDropLSTM(2, 3, weight_drop=0.5).double().train()
    zero = torch.zeros(2, 3, dtype=torch.float64)

    def run(x, *weights):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, zero, zero))[0]

    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_one_block_of_weights():
    layer = WeightDropLSTM(4, 6).double()
    weights: list[Any] = list(layer.parameters())
    packed = in_one_block(weights)
    place = packed[0].data_ptr()
    for weight, view in zip(weights, packed, strict=True):
        assert view.data_ptr() == place
        assert view.is_contiguous()
        assert torch.equal(view, weight)
        place += weight.numel() * weight.element_size()
    assert packed[0].untyped_storage().nbytes() == sum(w.numel() * w.element_size() for w in weights)
    grads = torch.autograd.grad([part.square().sum() * (i + 1) for i, part in enumerate(packed)], weights)
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        torch.testing.assert_close(grad, 2 * (i + 1) * weight.detach())


def test_locked_dropout_keeps_one_mask_for_all_steps():
    torch.manual_seed(0)
    dropped = locked_dropout(torch.ones(50, 9, 40), 0.3, training=True)
    assert set(dropped.unique().tolist()) == {0.0, dropped.max().item()}
    assert dropped.max() == pytest.approx(1 / 0.7)
    assert (dropped == dropped[:, :1]).all()
    assert dropped[:, 0].mean() == pytest.approx(1.0, abs=0.06)
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(locked_dropout(torch.ones(2, 3, 4), 0.3, training=False), torch.ones(2, 3, 4))


def test_embedding_dropout_drops_whole_words():
    embedding, tokens = torch.nn.Embedding(V, 6), make_tokens(8, 40)
    torch.manual_seed(0)
    ratio = embedded(embedding, tokens, 0.4, training=True) / embedding(tokens)
    seen = []
    for word in range(V):
        values = ratio[tokens == word].unique()
        assert values.max() - values.min() < 1e-5
        seen.append(values[0].item())
    assert sorted({round(value, 4) for value in seen}) == [0.0, round(1 / 0.6, 4)]


@pytest.mark.parametrize("place", ["embedding", "input", "hidden", "output"])
def test_each_dropout_acts_in_its_place(place):
    config = CONFIG.updated(**{f"{place}_dropout": 0.5})
    backbone, tokens = AWDLSTM(config, V).double(), make_tokens()
    plain = [plain_lstm(layer) for layer in backbone.layers]
    torch.manual_seed(2)
    output = backbone.train()(tokens).features
    torch.manual_seed(2)
    x = embedded(backbone.embedding, tokens, 0.5 if place == "embedding" else 0.0, True)
    x = plain[0](locked_dropout(x, 0.5 if place == "input" else 0.0, True))[0]
    x = plain[1](locked_dropout(x, 0.5 if place == "hidden" else 0.0, True))[0]
    torch.testing.assert_close(output, locked_dropout(x, 0.5 if place == "output" else 0.0, True))


@pytest.mark.parametrize("out_features", [None, 3])
def test_penalties_are_the_published_formulas(out_features):
    config = AWDLSTMConfig(
        embedding_size=6,
        hidden_sizes=(5,),
        out_features=out_features,
        output_dropout=0.5,
        activation_penalty=2.0,
        temporal_penalty=0.7,
    )
    backbone, tokens = AWDLSTM(config, V).double(), make_tokens(3, 4)
    raw = backbone.eval()(tokens).features
    dropped, _, penalty = backbone.train()(tokens)
    d = config.feature_size
    activation = sum(dropped[b, t, i] ** 2 for b in range(3) for t in range(4) for i in range(d)) / (3 * 4 * d)
    temporal = sum((raw[b, t, i] - raw[b, t - 1, i]) ** 2 for b in range(3) for t in range(1, 4) for i in range(d)) / (
        3 * 3 * d
    )
    torch.testing.assert_close(penalty, 2.0 * activation + 0.7 * temporal)
    penalty.backward()
    grad = backbone.get_parameter("layers.0.weight_hh").grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_penalty_of_a_single_step_is_finite():
    config = AWDLSTMConfig(embedding_size=6, hidden_sizes=(5,), activation_penalty=2.0, temporal_penalty=1.0)
    backbone = AWDLSTM(config, V).double().train()
    features, _, penalty = backbone(make_tokens(3, 1))
    torch.testing.assert_close(penalty, 2.0 * features.square().mean())


def test_state_carries_the_stream_on():
    model, tokens = make_model(CONFIG).eval(), make_tokens(3, 9)
    whole, last = model.features(tokens)
    first, state = model.features(tokens[:, :4])
    second, state = model.features(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    for ours, theirs in zip(state, last, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(model.features(tokens[:, 4:])[0], second)


@pytest.mark.parametrize(
    ("preset", "vocab_size", "count"), [("awd-lstm-ptb", 10_000, 24_221_600), ("awd-lstm-wt2", 33_278, 33_556_078)]
)
def test_published_parameter_counts(preset, vocab_size, count):
    published = {"awd-lstm-ptb": 24.22, "awd-lstm-wt2": 33.55}[preset]
    config = get_preset(preset).values["model"]
    with torch.device("meta"):
        model = build_model(config, SoftmaxHead(config.feature_size, vocab_size), vocab_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == count
    assert math.floor(parameters / 1e4) / 100 == published

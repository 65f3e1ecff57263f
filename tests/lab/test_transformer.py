"""The transformer held to a direct computation, and its positions, initialisation and limits."""

from typing import Any

import pytest
import torch

from uncork.lab.errors import LabError
from uncork.lab.models import Transformer, TransformerConfig
from uncork.lab.models.transformer import rotary_table, rotate

V = 23
CONFIG = TransformerConfig(width=8, depth=2, num_heads=2, max_length=32)


def make_backbone(config, dtype=torch.float64):
    torch.manual_seed(0)
    return Transformer(config, V).to(dtype)


def make_tokens(batch=3, time=8, vocab_size=V):
    return torch.randint(vocab_size, (batch, time), generator=torch.Generator().manual_seed(1))


def test_rotary_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, dtype=torch.float64)
    cos, sin = rotary_table(40, 6, like=query)
    queries, keys = (rotate(vector.expand(40, 6), cos, sin) for vector in (query, key))
    products = queries @ keys.T
    for distance in (-9, -1, 0, 3, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal))
    assert products[0].std() > 0.1
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(40))
    torch.testing.assert_close(queries[0], query)


def test_transformer_knows_the_order_of_its_past():
    backbone = make_backbone(CONFIG).eval()
    tokens = torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    assert (backbone(tokens).features[:, -1] - backbone(swapped).features[:, -1]).abs().max() > 1e-9


def test_transformer_equals_a_direct_computation():
    config = TransformerConfig(width=8, depth=1, num_heads=2, max_length=16)
    backbone, tokens = Transformer(config, V).double().eval(), make_tokens(2, 5)
    block: Any = backbone.blocks[0]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x = backbone.embedding(tokens)
    q, k, v = (block.attention.query_key_value(norm(x, block.attention_norm.weight))).chunk(3, -1)
    cos, sin = rotary_table(5, 4, like=x)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        scores = rotate(q[..., part], cos, sin) @ rotate(k[..., part], cos, sin).mT / 2.0
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    x = x + block.attention.out(torch.cat(heads, -1))
    gate, up = block.mlp.gate_up(norm(x, block.mlp_norm.weight)).chunk(2, -1)
    x = x + block.mlp.out(gate * gate.sigmoid() * up)
    torch.testing.assert_close(backbone(tokens).features, norm(x, backbone.norm.weight))


def test_transformer_dropout_acts_in_training_alone():
    config = CONFIG.updated(dropout=0.5)
    backbone, tokens = make_backbone(config), make_tokens()
    still = make_backbone(CONFIG).eval()
    torch.testing.assert_close(backbone.eval()(tokens).features, still(tokens).features)
    assert not torch.equal(backbone.train()(tokens).features, backbone(tokens).features)


def test_transformer_initialisation():
    config = TransformerConfig(width=128, depth=8, num_heads=4, out_features=64)
    torch.manual_seed(0)
    backbone = Transformer(config, 500)
    for name, parameter in backbone.named_parameters():
        assert not name.endswith("bias")
        if name == "projection.weight":
            std = 128**-0.5
        elif name.endswith(".out.weight"):
            std = 0.02 / 4
        else:
            std = 0.02
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert (parameter == 1).all()
    features = backbone.eval()(make_tokens(4, 32, 500)).features
    assert features.std().item() == pytest.approx(1.0, rel=0.1)


def test_transformer_refuses_a_sequence_over_its_limit():
    backbone = make_backbone(CONFIG)
    backbone(make_tokens(1, 32))
    with pytest.raises(LabError, match="max_length = 32 tokens, got 33"):
        backbone(make_tokens(1, 33))


def test_half_precision_keeps_positions_exact():
    config = CONFIG.updated(max_length=512)
    half = Transformer(config, V).bfloat16().eval()
    cos, _ = rotary_table(512, 4, like=half.embedding.weight)
    assert cos.dtype == torch.float32
    assert half(make_tokens(1, 512)).features.dtype == torch.bfloat16

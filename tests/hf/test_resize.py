"""resize_token_embeddings, the model's own, on fused models and on models with a head."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.hf.small import VOCAB, batch, build
from tests.hf.test_attach import shake
from tests.hf.test_fuse import assert_same
from uncork.hf import attach_head, detach_head, from_pretrained, fuse_loss, unfuse_loss, verify

MODELS = {
    "untied": lambda: build("LlamaForCausalLM", tie_word_embeddings=False),
    "tied": lambda: build("Gemma2ForCausalLM", tie_word_embeddings=True),
    "bias": lambda: build("PhiForCausalLM", tie_word_embeddings=False),
    "bias, tied": lambda: build("PhiForCausalLM", tie_word_embeddings=True),
}
HEADS = {
    "plif": {"num_pieces": 10},
    "temperature": {},
    "mos": {"num_components": 2},
    "moc": {"num_components": 2},
}
every_model = pytest.mark.parametrize("name", MODELS)
both_ways = pytest.mark.parametrize("size", [VOCAB + 8, VOCAB - 6], ids=["grown", "shrunk"])


def resize(model, size, **options):
    """With the same new rows each time."""
    torch.manual_seed(1)
    return model.resize_token_embeddings(size, mean_resizing=False, **options)


def inputs_of(size):
    return batch(min(size, VOCAB))


@pytest.mark.parametrize("put", [fuse_loss, lambda model: attach_head(model, "plif")], ids=["fused", "attached"])
def test_a_layer_that_kept_its_former_size(put):
    """As transformers 5.4 leaves the tied output layer of a model that was resized before."""
    model = MODELS["tied"]()
    resize(model, VOCAB + 8)
    model.lm_head.out_features = VOCAB
    assert put(model)(**inputs_of(VOCAB)).logits.shape[-1] == VOCAB + 8


@every_model
@both_ways
def test_a_fused_model(name, size):
    model = MODELS[name]()
    fused = fuse_loss(copy.deepcopy(model))
    assert resize(fused, size) is fused.get_input_embeddings()
    resize(model, size)
    assert_same(fused, model, inputs_of(size))
    assert fused(**inputs_of(size)).logits.shape[-1] == size
    assert (fused.lm_head.weight is fused.get_input_embeddings().weight) == ("tied" in name.split(", "))
    assert type(unfuse_loss(fused).lm_head) is nn.Linear
    assert set(vars(fused)) == set(vars(model))
    assert_same(fused, model, inputs_of(size))


@every_model
@both_ways
@pytest.mark.parametrize("head", HEADS)
def test_an_attached_head(name, size, head, tmp_path):
    model = shake(attach_head(MODELS[name](), head, **HEADS[head]))
    twin = detach_head(copy.deepcopy(model))
    before = {key: value.clone() for key, value in model.lm_head.state_dict().items()}
    kept, own = min(size, VOCAB), {"weight", "bias"}
    resize(model, size)
    resize(twin, size)
    # The head has the model's own new weight and bias, and all else as it was.
    for key, value in model.lm_head.state_dict().items():
        assert torch.equal(value[:kept] if key in own else value, before[key][:kept] if key in own else before[key])
        if key in own:
            assert torch.equal(value, getattr(twin.lm_head, key))
    assert model.lm_head.out_features == model.config.vocab_size == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == ("tied" in name.split(", "))
    # The loss is that of the logits, of all words.
    inputs = inputs_of(size)
    logits = model(inputs["input_ids"]).logits
    assert logits.shape[-1] == size
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(model(**inputs).loss, expected)
    # Saved and loaded, copied, taken off.
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()  # with another implementation of attention
    torch.testing.assert_close(loaded(inputs["input_ids"]).logits, logits, rtol=1e-4, atol=1e-3)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(copy.deepcopy(model)(inputs["input_ids"]).logits, logits)
    assert_same(detach_head(model), twin, inputs)
    assert set(vars(model)) == set(vars(twin))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_resized_head_is_proved(name):
    model = attach_head(MODELS[name](), "plif")
    resize(model, VOCAB + 3, pad_to_multiple_of=8)
    assert model.lm_head.out_features == VOCAB + 8
    verify(model).require()


@every_model
@pytest.mark.parametrize("put", [fuse_loss, lambda model: attach_head(model, "mos", num_components=2)])
def test_a_resizing_that_fails_or_does_nothing_leaves_the_model(name, put):
    model = put(MODELS[name]())
    before = model(**batch()).loss
    with pytest.raises(ValueError, match="not and integer"):
        model.resize_token_embeddings(VOCAB + 8, pad_to_multiple_of=2.5)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(VOCAB)
    assert torch.equal(model(**batch()).loss, before)


def test_a_copy_is_resized_by_itself():
    model = attach_head(MODELS["untied"](), "plif")
    copied = copy.deepcopy(model)
    resize(copied, VOCAB + 8)
    assert copied(**batch()).logits.shape[-1] == VOCAB + 8
    assert model(**batch()).logits.shape[-1] == model.lm_head.out_features == VOCAB


def test_frozen_layers_stay_frozen():
    model = attach_head(MODELS["untied"](), "plif").requires_grad_(False)
    resize(model, VOCAB + 8)
    assert not any(p.requires_grad for p in model.parameters())


@every_model
def test_logits_from_before_are_not_computed_with_the_new_weight(name):
    model = attach_head(MODELS[name](), "plif")
    logits = model(**batch()).logits
    resize(model, VOCAB + 8)
    with pytest.raises(RuntimeError, match="expected to be read before the head's parameters change"):
        logits + 0


def test_an_output_layer_that_somebody_replaced_is_said_before_anything_changes():
    model = fuse_loss(MODELS["untied"]())
    model.set_output_embeddings(nn.Linear(16, VOCAB))
    with pytest.raises(RuntimeError, match="output layer was replaced since its loss was fused"):
        resize(model, VOCAB + 8)
    assert model.model.embed_tokens.num_embeddings == VOCAB

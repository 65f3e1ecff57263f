"""The fused loss of a transformers model: what it equals, what it leaves alone, and what it refuses."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import uncork
from tests.hf.small import NEWEST, VOCAB, batch, build
from tests.hf.walk import difference, gradients
from uncork.hf import (
    NotRecordable,
    attach_head,
    detach_head,
    fuse_loss,
    merge_head,
    read_logit_function,
    unfuse_loss,
    verify,
)

# With and without a function of the logits, a bias, and a weight that the embedding shares.
MODELS = {
    "plain": lambda: build("LlamaForCausalLM"),
    "softcap, tied": lambda: build("Gemma2ForCausalLM", tie_word_embeddings=True),
    "softcap": lambda: build("Gemma2ForCausalLM", tie_word_embeddings=False),
    "scale": lambda: build("GraniteForCausalLM"),
    "bias": lambda: build("PhiForCausalLM"),
    "slice": lambda: build("InklingForCausalLM"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def pair(name: str = "softcap") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model, and the same fused."""
    model = MODELS[name]()
    return model, fuse_loss(copy.deepcopy(model))


def assert_same(fused: PreTrainedModel, model: PreTrainedModel, inputs) -> None:
    """The loss and all gradients."""
    assert not (wrong := difference(gradients(fused, inputs)[:2], gradients(model, inputs)[:2])), wrong


def fused_calls(monkeypatch) -> list[int]:
    """Notes each fused loss of recorded logits."""
    calls: list[int] = []
    own = uncork.hf.fusion.linear_cross_entropy

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr("uncork.hf.fusion.linear_cross_entropy", noting)
    return calls


@every_model
def test_loss_and_gradients_in_training(name, monkeypatch):
    model, fused = pair(name)
    calls = fused_calls(monkeypatch)
    assert_same(fused.train(), model.train(), batch())
    assert calls == [1]


def test_the_function_of_a_tied_model_is_seen_in_both_uses_of_its_weight():
    model, fused = pair("softcap, tied")
    weight = fused.lm_head.weight
    assert weight is fused.model.embed_tokens.weight
    inputs = batch()
    gradients(fused, inputs)
    both = weight.grad.clone()
    gradients(model, inputs)
    torch.testing.assert_close(both, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    assert set(dict(fused.named_parameters())) == set(dict(model.named_parameters()))


@every_model
def test_labels_that_are_shifted_already(name):
    model, fused = pair(name)
    inputs = batch()
    shift_labels = F.pad(inputs["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    assert_same(fused, model, inputs | {"shift_labels": shift_labels})
    assert_same(fused, model, inputs | {"shift_labels": shift_labels.roll(1, -1)})
    moved = model(**inputs, shift_labels=shift_labels.roll(1, -1)).loss
    assert abs(float((moved - model(**inputs).loss).detach())) > 1e-3


@pytest.mark.parametrize("as_tensor", [True, False])
def test_two_micro_batches_are_one_large_batch(as_tensor):
    model, fused = pair()
    whole = batch(rows=4)
    kept = (whole["labels"][:, 1:] != -100).sum()
    count = kept if as_tensor else int(kept)
    fused.zero_grad()
    loss = torch.zeros(())
    for part in (slice(0, 1), slice(1, 4)):
        outputs = fused(**{name: value[part] for name, value in whole.items()}, num_items_in_batch=count)
        outputs.loss.backward()
        loss += outputs.loss.detach()
    found = loss, {name: p.grad for name, p in fused.named_parameters()}
    assert not difference(found, gradients(model, whole)[:2])
    assert_same(fused, model, whole | {"num_items_in_batch": count + 3})


@every_model
def test_a_batch_without_a_label(name):
    model, fused = pair(name)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    (loss, grads, _), (own, own_grads, _) = gradients(fused, inputs), gradients(model, inputs)
    assert loss.isnan()
    assert own.isnan()
    assert set(grads) == set(own_grads)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, own_grads[key], equal_nan=True)
    loss, grads, _ = gradients(fused, inputs | {"num_items_in_batch": torch.tensor(5)})
    assert loss == 0
    assert all(bool((grad == 0).all()) for grad in grads.values())


@NEWEST
def test_positions_to_keep():
    model, fused = pair()
    inputs = batch()
    shift_labels = F.pad(inputs["labels"], (0, 1), value=-100)[..., 1:].contiguous()
    kept = shift_labels != -100
    assert_same(fused, model, inputs | {"logits_to_keep": kept, "shift_labels": shift_labels[kept]})
    last = inputs | {"logits_to_keep": 3, "shift_labels": shift_labels[:, -3:].contiguous()}
    assert_same(fused, model, last)
    assert fused(**last).logits.shape == (2, 3, VOCAB)


def test_labels_of_other_positions_than_those_kept_are_said():
    _, fused = pair()
    with pytest.raises(ValueError, match=r"labels: expected .* the \(2, 3\) logits, got \(2, 7\); with logits_to_keep"):
        fused(**batch(), logits_to_keep=3)
    inputs = batch()
    with pytest.raises(ValueError, match=r"shift_labels: expected .* the \(2, 7\) logits, got \(2, 6\)"):
        fused(**inputs, shift_labels=inputs["labels"][:, 1:])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, fused = pair()
    fused.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    assert_same(fused, model, batch())


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["plain", "softcap", "scale"])
def test_half_precision_is_no_worse_than_torchs(name, way):
    """Relative to the model in float32 with the same weights."""
    model, fused = pair(name)
    inputs = batch(rows=4, time=16)
    if way == "bfloat16":
        model, fused = model.bfloat16(), fused.bfloat16()
    truth = gradients(copy.deepcopy(model).float(), inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found, own = gradients(fused, inputs), gradients(model, inputs)
        shown = fused(**inputs).logits
        assert shown.dtype == own[2].logits.dtype
        torch.testing.assert_close(shown + 0, own[2].logits, rtol=0, atol=0)
    assert found[0].dtype == own[0].dtype == torch.float32
    assert (found[0] - truth[0]).abs() <= (own[0] - truth[0]).abs() + 2e-3 * truth[0]
    errors = [
        torch.stack([(grads[key].float() - exact).norm() / exact.norm() for key, exact in truth[1].items()])
        for grads in (found[1], own[1])
    ]
    assert errors[0].square().mean() <= 1.5 * errors[1].square().mean()
    assert errors[0].max() < 0.1


@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_scores_in_bfloat16_are_those_of_the_models_own_logits(name, way):
    """With the function in float32, where the model computes it in its own dtype."""
    model = MODELS[name]()
    fused = fuse_loss(copy.deepcopy(model), scores_dtype=torch.bfloat16)
    inputs = batch(rows=4, time=16)
    kept = inputs["labels"][:, 1:] != -100
    if way == "autocast":
        with pytest.raises(ValueError, match=r"scores_dtype: expected None or torch.float32 with inputs of torch.floa"):
            fused(**inputs)
    else:
        model, fused = model.bfloat16(), fused.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        scores = model.lm_head(model.model(inputs["input_ids"]).last_hidden_state).float()[:, :-1]
        outputs = pickle.loads(pickle.dumps(fused))(**inputs)
    function = read_logit_function(fused)
    log_prob = (scores if function is None else function(scores)).log_softmax(-1)
    wanted = log_prob.gather(-1, inputs["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(outputs.loss, -wanted[kept].mean(), rtol=1e-4, atol=1e-4)
    found = outputs.logits[:, :-1].statistics(inputs["labels"][:, 1:])
    torch.testing.assert_close(found.log_prob[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    raised = fuse_loss(unfuse_loss(fused))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        wide = raised(**inputs).logits[:, :-1].statistics(inputs["labels"][:, 1:])
        outputs.loss.backward()
    assert (wide.log_prob - found.log_prob).abs().max() > 1e-3  # scores that are not rounded


@every_model
def test_without_labels_nothing_changes(name):
    model, fused = pair(name)
    ids = batch()["input_ids"]
    found, own = fused(ids), model(ids)
    assert type(found) is type(own)
    assert type(found.logits) is torch.Tensor
    assert torch.equal(found.logits, own.logits)
    assert found.loss is None
    step, own_step = fused(ids, use_cache=True), model(ids, use_cache=True)
    assert step.past_key_values.get_seq_length() == own_step.past_key_values.get_seq_length() == 7
    if name != "slice":
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(fused.generate(ids, **options), model.generate(ids, **options))


def test_outputs_as_a_tuple_and_labels_by_position():
    model, fused = pair()
    inputs = batch()
    found, own = fused(**inputs, return_dict=False), model(**inputs, return_dict=False)
    assert type(found) is tuple
    assert len(found) == len(own)
    torch.testing.assert_close(found[0], own[0])
    torch.testing.assert_close(found[1] + 0, own[1])
    by_position = (inputs["input_ids"], None, None, None, None, inputs["labels"])
    outputs = fused(*by_position)
    assert "LazyLogits" in repr(type(outputs.logits))
    torch.testing.assert_close(outputs.loss, model(*by_position).loss)
    hidden = fused(**inputs, output_hidden_states=True, output_attentions=True)
    own_hidden = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert list(hidden) == list(own_hidden)
    assert torch.equal(hidden.hidden_states[-1], own_hidden.hidden_states[-1])


def test_a_copy_is_fused_by_itself():
    _, fused = pair()
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        copied.lm_head.weight.mul_(0.5)
    plain = unfuse_loss(copy.deepcopy(copied))
    assert_same(copied, plain, batch())
    assert not torch.allclose(fused(**batch()).loss, copied(**batch()).loss)
    unfuse_loss(copied)
    assert type(fused.lm_head) is not nn.Linear
    assert type(copied.lm_head) is nn.Linear


def test_a_saved_model_is_a_plain_one(tmp_path):
    model, fused = pair("softcap, tied")
    fused.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert type(loaded.lm_head) is nn.Linear
    assert "forward" not in vars(loaded)
    assert_same(loaded, model, batch())
    assert list(fused.state_dict()) == list(model.state_dict())
    assert loaded.config.architectures == ["Gemma2ForCausalLM"]


def test_unfusing_leaves_the_model_as_it_was():
    model = MODELS["softcap"]()
    before, kinds = set(vars(model)), [type(module) for module in model.modules()]
    head = set(vars(model.lm_head))
    assert unfuse_loss(fuse_loss(model)) is model
    assert set(vars(model)) == before
    assert set(vars(model.lm_head)) == head
    assert [type(module) for module in model.modules()] == kinds
    assert model.loss_function is ForCausalLMLoss
    assert type(model(**batch()).logits) is torch.Tensor


def test_a_refusal_leaves_the_model_as_it_was():
    model = build("BartForCausalLM")
    before, kinds = set(vars(model)), [type(module) for module in model.modules()]
    with pytest.raises(NotRecordable, match="cannot be fused: torch's cross_entropy"):
        fuse_loss(model.train())
    assert set(vars(model)) == before
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert model(**batch()).loss > 0


class Other(nn.Linear):
    pass


def test_what_cannot_be_fused_is_said():
    model, fused = pair()
    for bad, match in (
        (fused, "model: expected one without a fused loss.*has it already"),
        (nn.Linear(2, 2), "model: expected a transformers PreTrainedModel, got Linear"),
        (BertModel(build("BertLMHeadModel").config), r"output layer.*BertModel.get_output_embeddings\(\) is None"),
        (AutoModelForSequenceClassification.from_config(model.config), "get_output_embeddings.. is None"),
        (
            build("T5GemmaForConditionalGeneration"),
            r"causal \(decoder-only\) language model, got T5GemmaForConditionalGeneration, an encoder-decoder",
        ),
        (
            BertForMaskedLM(build("BertLMHeadModel").config),
            "loss_function: expected transformers' ForCausalLMLoss, got ForMasked",
        ),
        (build("DoryForCausalLM"), "output layer: expected an nn.Linear itself, got .*DoryLMHead"),
    ):
        with pytest.raises(TypeError, match=match):
            fuse_loss(bad)
    with pytest.raises(TypeError, match="expected one with a fused loss, got a plain Gemma2ForCausalLM"):
        unfuse_loss(model)
    with pytest.raises(ValueError, match=r'logits: expected "lazy" or "none", got .lazzy.'):
        fuse_loss(model, logits="lazzy")
    with pytest.raises(ValueError, match=r"scores_dtype: expected None, torch.float32 or torch.bfloat16, got .half"):
        fuse_loss(build("LlamaForCausalLM"), scores_dtype="half")
    model.set_output_embeddings(Other(16, VOCAB))
    with pytest.raises(TypeError, match=r"expected an nn.Linear itself, got .*Other"):
        fuse_loss(model)
    assert type(model.lm_head) is Other


@pytest.mark.parametrize(
    "take", [fuse_loss, unfuse_loss, read_logit_function, detach_head, merge_head, verify,
             lambda model: attach_head(model, "plif")],
)  # fmt: skip
def test_what_is_no_model_is_said(take):
    class Around(nn.Module):
        def __init__(self, name):
            super().__init__()
            setattr(self, name, MODELS["plain"]())

    for bad, match in (
        ("a/folder", "expected a transformers PreTrainedModel, got 'a/folder': load it with from_pretrained"),
        (PreTrainedModel, "expected a transformers PreTrainedModel, got the class PreTrainedModel itself"),
        (None, "expected a transformers PreTrainedModel, got NoneType$"),
        (Around("model"), r"got Around \(give its model\)"),
        (Around("module"), r"got Around \(give its module\)"),
    ):
        with pytest.raises(TypeError, match=match):
            take(bad)


@pytest.mark.parametrize("take", [fuse_loss, read_logit_function, lambda model: attach_head(model, "plif")])
def test_an_encoder_decoder_is_said_before_it_is_run(take):
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(TypeError, match=r"expected a causal \(decoder-only\) .*got T5ForConditionalGeneration"):
        take(T5ForConditionalGeneration(T5Config(**sizes)))


def test_a_head_in_place_of_its_name_is_said():
    with pytest.raises(
        TypeError, match=r"name: expected the name of a head, one of softmax.*, got LinearHead: the head"
    ):
        attach_head(MODELS["plain"](), uncork.build_head("plif", 16, VOCAB))


def test_a_model_that_does_not_run_on_token_ids_is_said():
    model = MODELS["plain"]()
    handle = model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM: could not run it on two tokens with labels.*division"):
        fuse_loss(model)
    handle.remove()
    assert "forward" not in vars(model)


def test_the_function_is_read_without_leaving_a_trace():
    model = MODELS["softcap"]()
    assert str(read_logit_function(model)) == "Softcap(cap=20.0)"
    assert type(model.lm_head) is nn.Linear
    assert read_logit_function(build("LlamaForCausalLM")) is None
    assert str(read_logit_function(fuse_loss(model))) == "Softcap(cap=20.0)"


TAKES = {
    "read": read_logit_function,
    "fuse": fuse_loss,
    "attach": lambda model: attach_head(model, "mos", num_components=2),
    "detach": lambda model: detach_head(attach_head(model, "plif")),
}


@pytest.mark.parametrize("take", TAKES)
def test_each_part_of_the_model_stays_in_its_mode(take):
    model = build("PhiForCausalLM").train()
    model.model.eval()
    TAKES[take](model)
    assert (model.training, model.lm_head.training, model.model.training) == (True, True, False)
    assert not any(module.training for module in model.model.modules())
    model = build("PhiForCausalLM")  # all of it in evaluation mode
    TAKES[take](model)
    assert not any(module.training for module in model.modules())


def test_a_change_of_the_configuration_is_followed():
    model, fused = pair()
    for cap in (5.0, None, 40.0):
        model.config.final_logit_softcapping = fused.config.final_logit_softcapping = cap
        assert_same(fused, model, batch())


@NEWEST
@pytest.mark.parametrize("name", ["softcap, tied", "softcap"])
def test_other_sizes_of_the_vocabulary(name):
    model, fused = pair(name)
    for each in (model, fused):
        torch.manual_seed(1)
        each.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    ids = batch()["input_ids"]
    assert torch.equal(fused(ids).logits, model(ids).logits)
    assert_same(fused, model, batch(VOCAB + 8))
    assert fused(**batch()).logits.shape[-1] == VOCAB + 8


def mask(module, args, output):
    return output.index_fill(-1, torch.tensor([1, 2]), -30.0)


HOOKS = {
    "forward": lambda head: head.register_forward_hook(mask),
    "pre": lambda head: head.register_forward_pre_hook(lambda module, args: (0.5 * args[0],)),
    "backward": lambda head: head.register_full_backward_hook(lambda module, given, taken: (0.5 * given[0],)),
    "global": lambda head: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: mask(module, args, output) if isinstance(module, nn.Linear) and
        module.out_features == VOCAB else None),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_under_a_hook_of_the_head_the_model_computes_its_own_logits(kind, monkeypatch):
    model, fused = pair()
    calls = fused_calls(monkeypatch)
    handles = [HOOKS[kind](each.lm_head) for each in ([model] if kind == "global" else [model, fused])]
    try:
        assert_same(fused, model, batch())
        assert type(fused(**batch()).logits) is torch.Tensor
        assert calls == []
    finally:
        for handle in handles:
            handle.remove()
    assert_same(fused, model, batch())
    assert calls == [1]


@pytest.mark.parametrize("kind", HOOKS)
def test_a_head_that_has_a_hook_already_is_refused(kind):
    model = MODELS["softcap"]()
    handle = HOOKS[kind](model.lm_head)
    try:
        with pytest.raises(TypeError, match=r"output layer: expected that nothing sees or changes.*hook"):
            fuse_loss(model)
    finally:
        handle.remove()
    assert "forward" not in vars(fuse_loss(model).lm_head)


def doubled(head, input):
    return 2 * F.linear(input, head.weight)


def test_a_replaced_forward_of_the_head_is_called():
    model, fused = pair()
    for each in (model, fused):
        each.lm_head.forward = functools.partial(doubled, each.lm_head)
    assert_same(fused, model, batch())
    with pytest.raises(TypeError, match=r"output layer: expected .* got a replaced forward \(doubled\)"):
        fuse_loss(model)


@pytest.mark.parametrize("way", ["hooks", "parametrization"])
def test_a_weight_that_is_recomputed(way):
    model, fused = pair()
    where = nn.utils if way == "hooks" else nn.utils.parametrizations
    for each in (model, fused):
        torch.manual_seed(1)
        where.spectral_norm(each.lm_head)
        each.lm_head.eval()
    assert_same(fused, model, batch())
    if way == "parametrization":
        with pytest.raises(RuntimeError, match=r"class of the model's output layer was changed since.*parametrization"):
            unfuse_loss(fused)
        nn.utils.parametrize.remove_parametrizations(fused.lm_head, "weight")
    assert "forward" not in vars(unfuse_loss(fused))


@pytest.mark.parametrize(
    ("name", "extra"), [("Gemma2ForCausalLM", {}), ("InklingForCausalLM", {"unpadded_vocab_size": 994})]
)
def test_no_matrix_of_all_logits_is_kept(name, extra):
    vocab_size, inputs = 1000, batch(rows=4, time=30)
    fused = fuse_loss(build(name, vocab_size=vocab_size, **extra))
    tokens = inputs["labels"].numel()
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = fused(**inputs)
        shown = len(kept)
        assert max(kept) < tokens * vocab_size // 2
        outputs.logits.exp()
    assert max(kept[shown:]) >= tokens * (vocab_size - 6)

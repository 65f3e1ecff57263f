"""What people put around a model: torch.compile, accelerate's offloading, sharding, distribution, adapters."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tests.hf.small import batch, build
from tests.hf.test_fuse import assert_same, fused_calls
from tests.hf.walk import difference, gradients
from uncork.hf import LazyLogits, attach_head, detach_head, fuse_loss, unfuse_loss
from uncork.hf.fusion import is_fused

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
GEMMA = "Gemma2ForCausalLM"


def pair(**config):
    """A model whose logits are capped, and the same fused."""
    model = build(GEMMA, **config)
    return model, fuse_loss(copy.deepcopy(model))


# torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles what it deprecates
@pytest.mark.parametrize("class_name", [GEMMA, pytest.param("LlamaForCausalLM", marks=pytest.mark.slow)])
def test_one_graph_and_no_second_compilation(class_name):
    model = build(class_name, num_hidden_layers=1)
    fused = fuse_loss(copy.deepcopy(model))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, fused)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(2):
            inputs = batch(seed=step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            outputs = compiled(**inputs)
            outputs.loss.backward()
            assert outputs.logits is None
            own = gradients(model, inputs)
            found = {name: p.grad for name, p in fused.named_parameters() if p.grad is not None}
            assert not (wrong := difference((outputs.loss.detach(), found), own[:2])), wrong
            for optimizer in optimizers:
                optimizer.step()
    assert torch.equal(fused(**batch()).logits + 0, fused(batch()["input_ids"]).logits)
    with pytest.raises(TypeError, match="PreTrainedModel, got OptimizedModule"):
        fuse_loss(compiled)


# accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["fused", "offloaded"])
@pytest.mark.parametrize("way", ["cpu_offload", "disk"])
def test_offloaded_parts(way, first, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, fused = pair(tie_word_embeddings=False)
    fused = fused if first == "fused" else copy.deepcopy(model)
    if way == "cpu_offload":
        accelerate.cpu_offload(fused, execution_device=torch.device("cpu"))
    else:
        places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        accelerate.dispatch_model(fused, places | {"lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
    assert fused.lm_head.weight.device.type == "meta"
    fused = fused if first == "fused" else fuse_loss(fused)
    with torch.inference_mode(way == "disk"), torch.no_grad():
        found, own = fused(**batch()), model(**batch())
        torch.testing.assert_close(found.loss, own.loss)
        assert type(found.logits) is LazyLogits
        assert torch.equal(found.logits.argmax(-1), own.logits.argmax(-1))
        torch.testing.assert_close(found.logits + 0, own.logits)
        ids = batch()["input_ids"]
        assert torch.equal(fused(ids).logits, model(ids).logits)
    if first == "offloaded":
        unfuse_loss(fused)
        with torch.no_grad():
            torch.testing.assert_close(fused(**batch()).loss, own.loss)
            assert type(fused(**batch()).logits) is torch.Tensor


HOOKED = {
    "model": lambda accelerate, model: accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook()),
    "dispatched": lambda accelerate, model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "offloaded": lambda accelerate, model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
}
PUT_ON = {"fused": fuse_loss, "plif": lambda model: attach_head(model, "plif")}


def assert_same_outputs(found, own):
    with torch.no_grad():
        outputs, wanted = found(**batch()), own(**batch())
        torch.testing.assert_close(outputs.loss, wanted.loss)
        torch.testing.assert_close(outputs.logits + 0, wanted.logits)
        torch.testing.assert_close(found(batch()["input_ids"]).logits, own(batch()["input_ids"]).logits)
    assert isinstance(outputs.logits, LazyLogits) == (found is not own and is_fused(found))


@pytest.mark.parametrize("name", PUT_ON)
@pytest.mark.parametrize("way", HOOKED)
@pytest.mark.parametrize("first", ["fused", "hooked"])
def test_hooks_of_accelerate_come_and_go(first, way, name):
    accelerate = pytest.importorskip("accelerate")
    model = build(GEMMA, tie_word_embeddings=False)
    found = copy.deepcopy(model)
    steps = [PUT_ON[name], lambda each: HOOKED[way](accelerate, each)]
    if first == "hooked":
        steps.reverse()
    for step in steps:
        if step is PUT_ON["plif"] and first == "hooked" and way != "model":
            with pytest.raises(ValueError, match=r"linear: .* whose forward was replaced: take that back first"):
                step(found)
            return
        step(found)
    assert_same_outputs(found, model)
    with pytest.raises((AttributeError, pickle.PicklingError), match="add_hook_to_module"):  # as of a model by itself
        pickle.dumps(found)
    again = copy.deepcopy(found)
    accelerate.hooks.remove_hook_from_module(found, recurse=True)
    for each in (found, again):
        assert_same_outputs(each, model)
    if way != "dispatched":  # torch cannot load the list of layers that this leaves behind
        assert_same_outputs(pickle.loads(pickle.dumps(found)), model)
    if name == "plif" and way != "model":
        with pytest.raises(RuntimeError, match="accelerate has put hooks on it since the head was attached"):
            detach_head(again)
        accelerate.hooks.remove_hook_from_module(again, recurse=True)
    for each in (found, again):
        unfuse_loss(each) if name == "fused" else detach_head(each)
        assert_same_outputs(each, model)
    for put_on in PUT_ON.values():
        assert_same_outputs(put_on(found), model)
    detach_head(found)


def test_a_forward_that_somebody_replaced_since_is_taken_back_first():
    model, fused = pair()
    own = fused.forward
    fused.forward = lambda **inputs: own(**inputs)
    assert_same(fused, model, batch())
    with pytest.raises(RuntimeError, match="forward was replaced since the loss was fused"):
        unfuse_loss(fused)
    fused.forward = own
    assert_same(unfuse_loss(fused), model, batch())


# torch.distributed, in a world of one process -----------------------------------------------------------------------


@pytest.fixture
def world(tmp_path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def whole(grads):
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


@pytest.mark.usefixtures("world")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch's fully_shard fails on a CPU here")
@pytest.mark.parametrize("first", ["fused", "sharded"])
@pytest.mark.parametrize("units", ["whole", "layers", "head"])
def test_fully_sharded(units, first, monkeypatch):
    from torch.distributed.fsdp import fully_shard

    model, fused = pair(tie_word_embeddings=False)
    sharded = fused if first == "fused" else copy.deepcopy(model)
    for layer in sharded.model.layers if units == "layers" else ():
        fully_shard(layer)
    if units == "head":
        fully_shard(sharded.lm_head)
    fully_shard(sharded)
    sharded = sharded if first == "fused" else fuse_loss(sharded)
    calls = fused_calls(monkeypatch)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, sharded)]
    for step in range(2):
        loss, grads, outputs = gradients(sharded, batch(seed=step))
        own_loss, own_grads, own = gradients(model, batch(seed=step))
        assert not (wrong := difference((loss, whole(grads)), (own_loss, own_grads))), wrong
        assert type(outputs.logits) is LazyLogits
        for optimizer in optimizers:
            optimizer.step()
    assert len(calls) == 2
    with torch.no_grad():
        found, own = sharded(**batch()), model(**batch())
        assert torch.equal(found.logits.argmax(-1), own.logits.argmax(-1))
        torch.testing.assert_close(found.logits + 0, own.logits, rtol=1e-4, atol=1e-4)
    if first == "fused" and units == "head":
        with pytest.raises(RuntimeError, match=r"class of the model's output layer was changed since.*fully_shard"):
            unfuse_loss(sharded)
    else:
        torch.testing.assert_close(unfuse_loss(sharded)(**batch()).loss, model(**batch()).loss)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("whole_model", [True, False])
@pytest.mark.parametrize("name", ["plain", *PUT_ON])
def test_a_sharded_model_has_no_pickle_and_a_state(name, whole_model):
    """As torch has it, fused or not."""
    from torch.distributed.fsdp import fully_shard

    model = PUT_ON.get(name, lambda model: model)(build(GEMMA, tie_word_embeddings=False))
    expected = copy.deepcopy(model.state_dict())
    fully_shard(model.lm_head)
    if whole_model:
        fully_shard(model)
    for part in (model, model.lm_head):
        with pytest.raises(pickle.PicklingError, match=r"Can't pickle .*FSDP"):
            pickle.dumps(part)
        with pytest.raises(AssertionError, match="Please use state dict for serialization"):
            copy.deepcopy(part)
    state = whole(model.state_dict())
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_distributed_data_parallel(options):
    model, fused = pair()
    parallel = nn.parallel.DistributedDataParallel(fused, **options)
    for step in range(2):
        fused.zero_grad()
        outputs = parallel(**batch(seed=step))
        outputs.loss.backward()
        grads = {name: p.grad for name, p in fused.named_parameters()}
        own_loss, own_grads, own = gradients(model, batch(seed=step))
        assert not (wrong := difference((outputs.loss.detach(), grads), (own_loss, own_grads))), wrong
        torch.testing.assert_close(outputs.logits + 0, own.logits, rtol=1e-5, atol=1e-5)


# PEFT ------------------------------------------------------------------------------------------------------------


def adapted(model, *targets, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["fused", "adapted"])
def test_an_adapted_body(first, monkeypatch, tmp_path):
    model, fused = pair()
    plain = adapted(model, "q_proj", "v_proj").eval()
    if first == "fused":
        lora = adapted(fused, "q_proj", "v_proj").eval()
    else:
        lora = adapted(copy.deepcopy(unfuse_loss(fused)), "q_proj", "v_proj").eval()
        with pytest.raises(TypeError, match=r"got PeftModel.* \(of PEFT\? give its get_base_model\(\)\)"):
            fuse_loss(lora)
        fuse_loss(lora.get_base_model())
    calls = fused_calls(monkeypatch)
    assert_same(lora, plain, batch())
    assert calls == [1]
    assert {name for name, p in lora.named_parameters() if p.grad is not None} == {
        name for name, p in lora.named_parameters() if "lora" in name
    }
    lora.save_pretrained(tmp_path)
    merged, own = lora.merge_and_unload(), plain.merge_and_unload()
    assert_same(merged.requires_grad_(), own.requires_grad_(), batch())
    assert type(unfuse_loss(merged).lm_head) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "saved"])
def test_an_adapted_head_is_refused(kind):
    model, fused = pair(tie_word_embeddings=False)
    targets, options = (["lm_head"], {}) if kind == "lora" else (["q_proj"], {"modules_to_save": ["lm_head"]})
    lora = adapted(model, *targets, **options)
    with pytest.raises(
        TypeError, match=r"output layer: expected an nn.Linear itself, got peft.*adapter: merge it first"
    ):
        fuse_loss(lora.get_base_model())
    lora = adapted(fused, *targets, **options)
    with pytest.raises(RuntimeError, match="output layer was replaced since its loss was fused"):
        lora(**batch())

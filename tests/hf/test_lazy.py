"""outputs.logits of a fused model: a tensor that is computed when it is read."""

import copy
import functools
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.hf.small import VOCAB, batch, build
from uncork.hf import LazyLogits, attach_head, fuse_loss

CLASSES = {"softcap": "Gemma2ForCausalLM", "bias": "PhiForCausalLM", "slice": "InklingForCausalLM"}


def pair(name: str = "softcap", **options):
    """A model, and the same fused."""
    model = build(CLASSES[name])
    return model, fuse_loss(copy.deepcopy(model), **options)


_unchanged = functools.cache(pair)


def lazy(name: str = "softcap"):
    """Logits that are lazy, and the model's own."""
    model, fused = _unchanged(name)
    logits = fused(**batch()).logits
    assert type(logits) is LazyLogits
    return logits, model(**batch()).logits


def computed(logits) -> bool:
    return logits._computed is not None


READINGS = {
    "add": lambda z: z + 1,
    "right": lambda z: 2 * z,
    "softmax": lambda z: F.softmax(z, dim=-1),
    "log_softmax": lambda z: z.log_softmax(-1),
    "max": lambda z: z.max(-1).values,
    "topk": lambda z: z.topk(3).indices,
    "argmax of all": lambda z: z.argmax(),
    "argmax of tokens": lambda z: z.argmax(1),
    "argmax, kept": lambda z: z.argmax(-1, keepdim=True),
    "word": lambda z: z[..., 4],
    "some words": lambda z: z[..., [2, 9]],
    "gather": lambda z: z.gather(-1, batch()["input_ids"][..., None]),
    "stack": lambda z: torch.stack([z, z]),
    "cat": lambda z: torch.cat((z, torch.zeros_like(z)), 1),
    "transpose": lambda z: z.transpose(0, 1),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "cpu": lambda z: z.cpu(),
    "tolist": lambda z: torch.tensor(z.detach().tolist()),
    "cross entropy": lambda z: F.cross_entropy(z.flatten(0, 1), batch()["input_ids"].flatten()),
    "copy": lambda z: copy.deepcopy(z.detach()),
    "pickle": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "new": lambda z: z.new_zeros(3) + z.sum(),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "iteration": lambda z: torch.stack([row.exp() for row in z]),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("reading", READINGS)
def test_what_is_read_is_what_the_model_computes(reading, name):
    logits, own = lazy(name)
    found, wanted = READINGS[reading](logits), READINGS[reading](own)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert found.requires_grad == wanted.requires_grad


SELECTIONS = {
    "shifted": lambda z: z[..., :-1, :],
    "last": lambda z: z[:, -1],
    "row": lambda z: z[0],
    "mask": lambda z: z[batch()["labels"] != -100],
    "flat": lambda z: z.view(-1, z.shape[-1]),
    "reshape": lambda z: z.reshape(7, 2, -1),
    "flatten": lambda z: z.flatten(0, 1),
    "split": lambda z: z.split(3, dim=1)[1],
    "words": lambda z: z[..., 2:9],
    "float": lambda z: z.float(),
    "double": lambda z: z.to(torch.float64),
    "detach": lambda z: z.detach(),
    "contiguous": lambda z: z.contiguous(),
    "unsqueeze": lambda z: z.unsqueeze(0).squeeze(0),
    "all": lambda z: z[..., :-1, :].contiguous().float().view(-1, z.size(-1)).detach(),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_of_tokens_stays_lazy(selection, name, monkeypatch):
    logits, own = lazy(name)
    selected, wanted = SELECTIONS[selection](logits), SELECTIONS[selection](own)
    assert type(selected) is LazyLogits
    assert not computed(logits)
    assert not computed(selected)
    assert (selected.shape, selected.dtype, selected.ndim) == (wanted.shape, wanted.dtype, wanted.ndim)
    assert (len(selected), selected.size(-1), selected.device) == (len(wanted), wanted.size(-1), wanted.device)
    assert torch.equal(selected.argmax(-1), wanted.argmax(-1))
    assert torch.equal(torch.argmax(selected, dim=wanted.ndim - 1), wanted.argmax(-1))
    assert not computed(selected)
    torch.testing.assert_close(selected + 0, wanted + 0, rtol=1e-5, atol=1e-5)
    assert (selected + 0).requires_grad == wanted.requires_grad
    assert computed(selected)


def test_they_carry_the_graph_of_the_model_even_if_they_were_read_without_one_first():
    model, fused = pair()
    logits, own = fused(**batch()).logits, model(**batch()).logits
    with torch.no_grad():
        assert not (logits + 0).requires_grad
    for each, z in ((model, own), (fused, logits)):
        each.zero_grad()
        (z.softmax(-1) ** 2).sum().backward()
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_and_a_term_of_the_logits_train_together():
    model, fused = pair()
    for each in (model, fused):
        outputs = each(**batch())
        (outputs.loss + 1e-2 * outputs.logits.logsumexp(-1).square().mean()).backward()
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_without_a_graph_there_is_none():
    model, fused = pair()
    with torch.no_grad():
        logits = fused(**batch()).logits
    assert not (logits + 0).requires_grad
    with torch.inference_mode():
        inferred = fused(**batch()).logits
        assert torch.equal(inferred.argmax(-1), (inferred + 0).argmax(-1))
    copied, own = copy.deepcopy(fused(**batch()).logits.detach()), model(**batch()).logits
    assert torch.equal(copied + 0, own)
    buffer = io.BytesIO()
    torch.save(logits, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), own)


def test_they_are_those_of_the_autocast_of_the_forward():
    model, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        logits, own = fused(**batch()).logits, model(**batch()).logits
    assert logits.dtype == own.dtype == torch.bfloat16
    best = logits.argmax(-1)
    assert torch.equal(own.gather(-1, best[..., None]).squeeze(-1), own.max(-1).values)
    assert torch.equal(logits + 0, own)
    logits, own = fused(**batch()).logits, model(**batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits.argmax(-1), own.argmax(-1))
        assert torch.equal(logits + 0, own)


def test_a_step_of_the_optimiser_between_is_said():
    _, fused = pair()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    outputs = fused(**batch())
    early = fused(**batch()).logits
    value = early + 0
    outputs.loss.backward()
    optimizer.step()
    for reading in (lambda z: z + 0, lambda z: z.argmax(-1), lambda z: z[0].exp(), lambda z: z.detach().numpy()):
        with pytest.raises(RuntimeError, match=r"outputs.logits: .* read before the head's parameters change"):
            reading(outputs.logits)
    assert torch.equal(early + 0, value)
    assert outputs.logits.shape == (2, 7, VOCAB)


HEADS = {
    "fused": (lambda model: fuse_loss(model), ["weight", "bias"]),
    "temperature": (lambda model: attach_head(model, "temperature"), ["logit_function"]),
    "plif": (lambda model: attach_head(model, "plif"), ["logit_function"]),
    "mos": (lambda model: attach_head(model, "mos", num_components=2), ["latent", "prior"]),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, (_, parts) in HEADS.items() for part in parts])
def test_a_step_of_any_part_of_the_head_is_said(name, part):
    model = HEADS[name][0](build("PhiForCausalLM"))  # with a bias
    parameters = [p for key, p in model.lm_head.named_parameters() if key.startswith(part)]
    outputs = model(**batch())
    outputs.loss.backward()
    assert torch.isfinite(outputs.logits[:, -1]).all()  # before the step, and after the backward pass
    torch.optim.SGD(parameters, lr=0.1).step()
    for reading in (lambda z: z + 0, lambda z: z.argmax(-1), lambda z: z.statistics(), lambda z: z[0].exp()):
        with pytest.raises(RuntimeError, match="before the head's parameters change"):
            reading(outputs.logits)


def test_another_parameter_in_place_of_the_head_s_is_said():
    _, fused = pair("bias")
    logits = fused(**batch()).logits
    fused.lm_head.bias = torch.nn.Parameter(fused.lm_head.bias.detach() + 1)
    with pytest.raises(RuntimeError, match="before the head's parameters change"):
        logits.argmax(-1)


def _in_place(change):
    """What is read after a change of the first argument in place: the change returns its second."""

    def reading(logits):
        changed, read = change(logits)
        changed /= 4
        return read + 0

    return reading


CHANGES: dict[str, Any] = {
    "the whole": _in_place(lambda z: (z, z[:, :-1])),
    "a slice": _in_place(lambda z: (z[:, :-1], z)),
    "a slice of a slice": _in_place(lambda z: (z[:, :-1][:, -1], z)),
    "another slice": _in_place(lambda z: (z[:, :-1], z[:, 1:])),
    "words": _in_place(lambda z: (z[..., 2:9], z)),
    "a view": _in_place(lambda z: (z.view(-1, z.shape[-1]), z)),
    "a cast to their own dtype": _in_place(lambda z: (z.float().contiguous(), z)),
    "detached": _in_place(lambda z: (z.detach(), z)),
    "a copy": _in_place(lambda z: (z[:, :-1].contiguous(), z)),
    "tokens": _in_place(lambda z: (z, z[batch()["labels"] != -100])),
    "a cast": _in_place(lambda z: (z.double(), z)),
    "after a reading": lambda z: (z + z[:, -1:]).sum() + CHANGES["another slice"](z),
    "an index": lambda z: _after(z, z[:, :-1], lambda z: z.__setitem__((slice(None), 0), -9.0)),
    "a function": lambda z: _after(z.detach(), z[:, :-1], lambda z: F.relu(z, inplace=True)),
    "out": lambda z: _after(z.detach(), z[:, :-1], lambda z: torch.mul(z, 2, out=z)),
    "the likeliest": lambda z: _after(z, z[:, :-1], lambda z: z.neg_()).argmax(-1),
    "parts": lambda z: _after(z.detach(), z, lambda z: [part.mul_(i + 2) for i, part in enumerate(z.split(1))]) + 0,
    "an item": lambda z: _after(z, z, lambda z: z[0].fill_(0)) + 0,
}


def _after(changed, read, change):
    change(changed)
    return read


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_seen_in_what_shares_memory(change, inference):
    with torch.inference_mode(inference):
        logits, own = lazy()
        found, wanted = CHANGES[change](logits), CHANGES[change](own)
        torch.testing.assert_close(found + 0, wanted + 0, rtol=1e-5, atol=1e-5)


def test_gradients_go_through_a_change_in_place():
    model, fused = pair()
    for each in (model, fused):
        logits = each(**batch()).logits
        shifted = logits[:, :-1]
        logits /= 4
        shifted.logsumexp(-1).sum().backward()
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


STALE = {
    "a slice that was read by itself": lambda z, s: [s.exp(), z.div_(4), s + 0],
    "the whole": lambda z, s: [s.exp(), s.div_(4), z + 0],
    "the likeliest": lambda z, s: [s.exp().sum(), s.div_(4), z.argmax(-1)],
    "a copy of what was changed": lambda z, s: [s.exp(), s.div_(4), z[[0]]],
    "through a transpose": lambda z, s: [s.transpose(0, 1).div_(4), z + 0],
    "statistics": lambda z, s: [z.div_(4), s.statistics()],
    "their own statistics": lambda z, s: [z.div_(4), z.statistics()],
}


@pytest.mark.parametrize("reading", STALE)
def test_a_change_in_place_that_cannot_be_seen_is_said(reading):
    logits, _ = lazy()
    with pytest.raises(RuntimeError, match=r"outputs.logits: expected that no logits of the same memory .* clone\(\)"):
        STALE[reading](logits, logits[:, :-1])


def test_detached_logits_keep_neither_graph_nor_matrix():
    logits, own = lazy()
    kept = logits.detach()[:, :-1]
    graph, matrix = weakref.ref(logits), weakref.ref(logits[:, 0].computed())
    del logits
    gc.collect()
    assert graph() is matrix() is None
    kept /= 4
    torch.testing.assert_close(kept, own[:, :-1].detach() / 4, rtol=1e-5, atol=1e-5)


class _Largest(TorchDispatchMode):
    """The largest tensor that an operation within makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))])
        return made


def test_the_likeliest_words_are_found_without_the_matrix():
    fused = fuse_loss(build("Gemma2ForCausalLM", vocab_size=4000, max_position_embeddings=128))
    inputs = batch(rows=20, time=60)
    logits = fused(**inputs).logits
    with _Largest() as made:
        best = logits.argmax(-1)
    assert made.numel < logits.numel() // 2
    assert torch.equal(best, fused(inputs["input_ids"]).logits.argmax(-1))
    with _Largest() as made:
        logits.exp()
    assert made.numel == logits.numel()


def test_none_are_shown_if_none_are_wanted():
    model, fused = pair(logits="none")
    outputs = fused(**batch())
    assert outputs.logits is None
    assert "logits" not in outputs
    torch.testing.assert_close(outputs.loss, model(**batch()).loss)
    assert fused(**batch(), return_dict=False)[0] == outputs.loss
    assert fused(batch()["input_ids"]).logits.shape == (2, 7, VOCAB)


def test_on_another_device_they_are_there():
    logits, _ = lazy()
    assert logits.to("meta").device.type == logits.to(torch.zeros(1, device="meta")).device.type == "meta"
    assert type(logits.to("cpu")) is LazyLogits or computed(logits)


def test_they_show_their_shape_alone():
    logits, _ = lazy()
    assert repr(logits) == str(logits) == f"LazyLogits(shape=(2, 7, {VOCAB}), dtype=torch.float32, device=cpu)"
    assert isinstance(logits, torch.Tensor)
    assert logits.is_floating_point()
    assert logits.numel() == 14 * VOCAB
    assert [logits.is_nested, logits.is_sparse, logits.is_cuda] == [False] * 3  # accelerate asks
    assert not computed(logits)


def with_gradients(model, statistics):
    """log_prob, entropy and argmax of the tokens that have a label, and the gradients of the first two."""
    inputs = batch()
    model.zero_grad()
    log_prob, entropy, argmax = statistics(model(**inputs).logits[:, :-1], inputs["labels"][:, 1:])
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(log_prob.shape, generator=generator) for _ in range(2)]
    torch.autograd.backward([log_prob, entropy], upstream)
    return [log_prob, entropy, argmax], [p.grad for p in model.parameters() if p.grad is not None]


def own_statistics(logits, target):
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(-1, target.clamp(min=0)[..., None])[..., 0].masked_fill(target < 0, 0)
    return chosen, -(log_probs.exp() * log_probs).sum(-1), log_probs.argmax(-1)


def lazy_statistics(logits, target):
    found = logits.statistics(target)
    assert not computed(logits)
    return found.log_prob, found.entropy, found.argmax


@pytest.mark.parametrize("name", CLASSES)
def test_statistics_without_the_matrix(name):
    model, fused = pair(name)
    found, grads = with_gradients(fused, lazy_statistics)
    wanted, own = with_gradients(model, own_statistics)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, own, rtol=1e-3, atol=1e-4)


def test_statistics_of_wrong_targets_and_changed_weights():
    _, fused = pair()
    with torch.no_grad():
        logits = fused(**batch()).logits
    found = logits.statistics()
    assert found.log_prob is None
    assert not found.entropy.requires_grad
    with pytest.raises(ValueError, match="target"):
        logits.statistics(batch()["labels"][:, 1:])
    with torch.no_grad():
        fused.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="before the head's parameters change"):
        logits.statistics()


def test_statistics_of_an_attached_mixture():
    model = attach_head(build("Gemma2ForCausalLM"), "mos", num_components=2)
    inputs = batch()
    logits = model(**inputs).logits
    found = logits.statistics(inputs["labels"])
    wanted = own_statistics(logits.detach() + 0, inputs["labels"])
    torch.testing.assert_close((found.log_prob, found.entropy, found.argmax), wanted, rtol=1e-4, atol=1e-5)

"""Puts the fused loss under a transformers model, through its two public seams: its head, and its loss function."""

import types
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from uncork.heads import hooks
from uncork.hf.fusion import (
    KEY,
    Fusion,
    checked_kind,
    correct_size,
    fusion_of,
    is_fused,
    recording_subclass,
    require_model,
    start_recording,
    stop_recording,
)
from uncork.hf.methods import FusedForward, Resize
from uncork.hf.record import NotRecordable
from uncork.logit_functions import LogitFunction

_PRECISION = "accelerate.utils.operations"
"""The module of the forward that accelerate's mixed precision puts around a model's."""


def plain_head(model: Any) -> nn.Linear:
    """The model's output layer, checked to be an nn.Linear itself.

    Raises:
        TypeError: the model is no transformers model, is fused already, or has another output layer or a hook on it.
    """
    name = type(require_model(model)).__name__
    if is_fused(model):
        raise TypeError("model: expected one without a fused loss or an attached head, got one that has it already")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"model: expected a causal (decoder-only) language model, got {name}, an encoder-decoder")
    head = model.get_output_embeddings()
    correct_size(head)
    if head is None:
        raise TypeError(
            "model: expected a causal language model (as AutoModelForCausalLM loads it), with an output layer, and "
            f"{name}.get_output_embeddings() is None"
        )
    # fully_shard puts a class of its own before the module's.
    kinds = [c for c in type(head).__mro__ if not c.__module__.startswith("torch.distributed.")]
    if kinds[0] is not nn.Linear and not (isinstance(head, nn.Linear) and kinds[0].__name__ == "FSDPLinear"):
        raise TypeError(
            f"model's output layer: expected an nn.Linear itself, got {type(head).__module__}."
            f"{type(head).__qualname__}, whose output may be more than its weight and bias (an adapter: merge it "
            "first, or adapt the body alone)"
        )
    if hook := hooks.on_module(head):
        raise TypeError(
            f"model's output layer: expected that nothing sees or changes its input or logits, got {hook}: remove it"
        )
    return cast(nn.Linear, head)


def install(model: PreTrainedModel, head: nn.Module, fusion: Fusion) -> None:
    """Puts a fusion under a model, and reads the function of its logits. The model is as it was if that fails."""
    replaced = {"forward": FusedForward(model), "_loss_function": fusion.loss, Resize.name: Resize(model)}
    fusion.inner = {name: vars(model).get(name) for name in replaced} | {
        "forward": hooks.replaced(model, _place_of_forward(model))
    }
    start_recording(head, fusion)
    object.__setattr__(model, KEY, fusion)
    for name, value in replaced.items():
        setattr(model, _place_of_forward(model) if name == "forward" else name, value)
    try:
        probe(model, fusion)
    except BaseException:
        remove(model)
        raise


def remove(model: PreTrainedModel) -> None:
    """Takes a fusion from a model."""
    fusion = fusion_of(model)
    stop_recording(fusion)
    delattr(model, KEY)
    place = _place_of_forward(model)
    if place != "forward":
        own = fusion.inner.pop("forward") or types.MethodType(type(model).forward, model)
        setattr(model, place, own)
    for name, value in fusion.inner.items():
        if value is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, value)


def _place_of_forward(model: PreTrainedModel) -> str:
    """The attribute for our forward: under accelerate's hooks, if they are on the model, so that it outlives them."""
    return "_old_forward" if "_old_forward" in vars(model) else "forward"


def probe(model: PreTrainedModel, fusion: Fusion) -> None:
    """Runs the model on two tokens with labels, so that what cannot be recorded is said now."""
    embedding: Any = model.get_input_embeddings()
    # Where accelerate keeps the weight elsewhere, its hook moves the input to where it will be.
    device = "cpu" if hasattr(embedding, "_hf_hook") else embedding.weight.device
    ids = torch.arange(2, device=device)[None]
    try:
        with hooks.modes_kept(model), torch.no_grad():
            model.eval()
            model(input_ids=ids, labels=ids)
    except NotRecordable:
        raise
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__}: could not run it on two tokens with labels, from which the function of its "
            f"logits is read: {error}"
        ) from error
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):  # a forward without a backward leaves the outermost unsharded
                module.reshard()
    if fusion.seen is None:
        raise TypeError(
            f"{type(model).__name__} computes its loss by itself, without its loss_function: it cannot be fused"
        )


def fuse_loss(
    model: PreTrainedModel, *, logits: str = "lazy", scores_dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Make a causal language model compute its loss without its (tokens, V) logits; the model itself is returned.

        outputs = model(input_ids, labels=labels)      # outputs.loss and all gradients as before

    equals what the model computed before, ForCausalLMLoss(f(W h + b), labels). The function f is the model's own: while
    labels are given, the head returns a stand-in that records what the model's forward does to the logits, and the loss
    is `uncork.linear_cross_entropy` with that function. No configuration field is read and no family is known by name.
    Without labels nothing changes. `unfuse_loss` takes it back.

    Args:
        model: whose output embeddings are an nn.Linear and whose loss is transformers' ForCausalLMLoss.
        logits: what `outputs.logits` is where labels are given. "lazy": a tensor that is computed when it is first
            read (`uncork.hf.LazyLogits`). "none": None. Under torch.compile it is None.
        scores_dtype: dtype of the scores W h + b within the loss and the statistics, as in
            `uncork.linear_cross_entropy`. torch.float32 raises half precision to it. torch.bfloat16, for a model in
            bfloat16 or trained under autocast to it, multiplies and rounds as the model itself does, without a copy of
            W; with hidden states of another dtype the loss then raises. None is torch.bfloat16 for such a model on a
            CPU with instructions for it (avx512_bf16), and float32 anywhere else.

    Returns:
        The model.

    Raises:
        TypeError: another kind of model, head or loss; the message says what was found.
        RuntimeError: the model does not run on two tokens with labels.
        NotRecordable: the model's forward does to its logits what no increasing function of this library is; the
            message names the operation.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, ids = LlamaForCausalLM(config), torch.arange(12).view(2, 6)
    >>> before = model(ids, labels=ids).loss
    >>> torch.allclose(fuse_loss(model)(ids, labels=ids).loss, before)
    True
    """
    checked_kind(logits)
    if scores_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"scores_dtype: expected None, torch.float32 or torch.bfloat16, got {scores_dtype!r}")
    head = plain_head(model)
    loss = model.loss_function
    if loss is not ForCausalLMLoss:
        raise TypeError(
            f"model.loss_function: expected transformers' ForCausalLMLoss, got {getattr(loss, '__qualname__', loss)}: "
            "only the cross-entropy of the next token can be fused"
        )
    fusion = Fusion(head, owns_function=False, logits=logits)
    install(model, head, fusion)
    fusion.scores_dtype = scores_dtype  # now, since the probe runs without the autocast of a training
    return model


def unfuse_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Take back what `fuse_loss` did; the model itself is returned.

    Raises:
        TypeError: its loss is not fused.
        RuntimeError: its forward or the class of its output layer was replaced by somebody else since.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, ids = fuse_loss(LlamaForCausalLM(config)), torch.arange(12).view(2, 6)
    >>> type(model(ids, labels=ids).logits).__name__, type(unfuse_loss(model)(ids, labels=ids).logits).__name__
    ('LazyLogits', 'Tensor')
    """
    fusion = fusion_of(model)
    if fusion.owns_function:
        raise TypeError("model: expected one with a fused loss, got one with an attached head; use detach_head")
    require_outermost(model)
    remove(model)
    return model


def require_outermost(model: PreTrainedModel, *, to_take_back: bool = True) -> None:
    """Raises RuntimeError if somebody has replaced the model's forward or its head's class since it was fused.

    Args:
        to_take_back: whether the fusion is to be taken out, which it cannot be from within accelerate's mixed
            precision. False asks only whether calls of the model go through it.
    """
    forward, ours = vars(model).get("forward"), vars(model).get(_place_of_forward(model))
    wrapped = isinstance(vars(model).get("_original_forward"), FusedForward) and hooks.origin(forward) == _PRECISION
    if wrapped and to_take_back:
        raise RuntimeError(
            "model.forward was wrapped by accelerate's mixed precision (by Trainer with bf16 or fp16) since the loss "
            "was fused: take that off first, trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    if not wrapped and not (
        isinstance(getattr(ours, "__func__", ours), FusedForward) and (forward is ours or hooks.only_looks(forward))
    ):
        raise RuntimeError("model.forward was replaced since the loss was fused: take that back first")
    fusion = fusion_of(model)
    if type(fusion.head) not in (fusion.head_class, recording_subclass(fusion.head_class)):
        raise RuntimeError(
            "the class of the model's output layer was changed since the loss was fused (by fully_shard, or a "
            "parametrization): take that back first"
        )


def read_logit_function(model: PreTrainedModel) -> LogitFunction | None:
    """The function f of a model's logits f(W h + b), read from its own forward; None for the identity.

    Args:
        model: as for `fuse_loss`, fused or not.

    Raises:
        TypeError, NotRecordable: as `fuse_loss`.

    >>> from transformers import Gemma2Config, Gemma2ForCausalLM
    >>> config = Gemma2Config(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    >>> f = read_logit_function(Gemma2ForCausalLM(config))
    >>> f, f(torch.tensor([10.0, 60.0]))
    (Softcap(cap=30.0), tensor([ 9.6454, 28.9208]))
    """
    if is_fused(model):
        fusion = fusion_of(model)
        return fusion.function if fusion.own_head is None else cast(Any, fusion.own_head.logit_function)
    fuse_loss(model)
    try:
        return fusion_of(model).function
    finally:
        unfuse_loss(model)

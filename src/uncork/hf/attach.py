"""An output layer of this library on a trained transformers model: attach, detach, save, load, merge."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from uncork.arguments import finite
from uncork.heads import Head, LinearHead
from uncork.heads.build import head_from_spec
from uncork.heads.spec import HEAD_NAMES, HeadSpec, check_options
from uncork.hf.fuse import (
    fuse_loss,
    install,
    plain_head,
    read_logit_function,
    remove,
    require_outermost,
    unfuse_loss,
)
from uncork.hf.fusion import CONFIG_FIELD, Fusion, checked_kind, fusion_of, is_fused, require_model
from uncork.hf.methods import plain_layer
from uncork.hf.record import Step
from uncork.hf.report import held_report, only_unexpected
from uncork.logit_functions import Compose, Identity, LogitFunction, Scale, Softcap

_ABOUT = (
    "Trained with an output layer of uncork. uncork.hf.from_pretrained loads it. Plain transformers loads the body and "
    "the projection alone and reports the head's other tensors as unexpected: its logits are then those of a plain "
    "softmax (after the model's own logit transform) and not those that were trained."
)
_COMPOSE = ("after", "instead")
_CAP_FIELD = "final_logit_softcapping"
_NOISE = 1e-3
_OF_THE_MODEL = ("bias", "bias_init", "latent_features")


def attach_head(
    model: PreTrainedModel, name: str, *, compose: str = "after", logits: str = "lazy", **options: Any
) -> PreTrainedModel:
    """Put an output layer of this library on a causal language model; the model itself is returned.

        logits = f(t(W h + b))      # t: what the model's forward does to its logits (a softcap, say), f: the head's

    The head takes over the model's own weight and bias (the same parameters: tied weights stay tied), and its loss is
    fused as by `fuse_loss`. Training, evaluation and generate all go through the head. Logits are float32.

    At the start the logits are what they were, to the bit in float32, for softmax, temperature, plif and monotone. A
    mixture (mos, mop, moc) starts with all components at the model's own features and equal weights, and a little noise
    that tells them apart, so it starts within about 1e-3 of them. softcap, sigsoftmax, gss and plif-frozen change them.

    Args:
        model: as for `fuse_loss`; one whose loss is fused may be given too.
        name: one of HEAD_NAMES. options: as for `uncork.build_head`, but for bias, bias_init and latent_features, which
            are the model's. A mixture's latent_activation is None unless given. noise: of a mixture, the standard
            deviation of what its latent maps differ from the identity by, relative to entries of size 1 (default 1e-3).
        compose: "after" the model's own transform, or "instead" of it. logits: as for `fuse_loss`.

    Raises:
        TypeError, NotRecordable: as `fuse_loss`; an option that the head does not have.
        ValueError: an option out of range, or a model that cuts words off its logits.

    Where it raises, the model is as it was.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, ids = LlamaForCausalLM(config).eval(), torch.arange(12).view(2, 6)
    >>> before = model(ids).logits
    >>> torch.equal(attach_head(model, "plif")(ids).logits, before), model.lm_head.logit_function.num_pieces
    (True, 100)
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name: expected the name of a head, one of {', '.join(HEAD_NAMES)}, got {type(name).__name__}: the head "
            "is built here, over the model's own weight; give its options as keywords"
        )
    if compose not in _COMPOSE:
        raise ValueError(f"compose: expected one of {', '.join(_COMPOSE)}, got {compose!r}")
    checked_kind(logits)
    was_fused = is_fused(model)
    own = fusion_of(model if was_fused else fuse_loss(model))
    if own.owns_function:
        raise TypeError("model: expected one without an attached head, got one that has it; detach_head first")
    unfuse_loss(model)
    linear = plain_head(model)
    try:
        assert own.seen is not None
        steps, cut = own.seen
        if cut:
            raise ValueError(
                f"model: expected logits of all words, and {type(model).__name__}'s forward cuts some off: a head "
                "would have to normalise over words that the model leaves out"
            )
        head = _head_on(linear, name, own.function if compose == "after" else None, options)
        _install(model, linear, head, steps, logits)
    except BaseException:
        if was_fused:
            install(model, linear, own)
        raise
    return model


def detach_head(model: PreTrainedModel) -> PreTrainedModel:
    """Take an attached head off, with all that it learned but W and b; the model itself is returned.

    Raises:
        TypeError: it has none.
        RuntimeError: its forward was replaced by somebody else since, or accelerate has put hooks on the head, which
            the model's own output layer would not have.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = attach_head(LlamaForCausalLM(config), "plif", num_pieces=10)
    >>> [len(list(m.parameters())) for m in (model.lm_head, detach_head(model).lm_head)], type(model.lm_head).__name__
    ([2, 1], 'Linear')
    """
    fusion = _attached(model)
    require_outermost(model)
    if hasattr(fusion.head, "_hf_hook"):
        raise RuntimeError(
            "model's output layer: accelerate has put hooks on it since the head was attached: take them off first "
            "(accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )
    remove(model)
    model.set_output_embeddings(plain_layer(fusion))
    vars(model.config).pop(CONFIG_FIELD, None)
    return model


def from_pretrained(path: str | Path, *, logits: str = "lazy", **options: Any) -> PreTrainedModel:
    """Load a causal language model with the head that was attached to it when it was saved.

    `model.save_pretrained` (and so Trainer) keeps the head: its tensors among the weights, its description in the field
    "uncork_head" of config.json. Plain transformers loads the same folder without the head, and reports its tensors as
    unexpected. A folder without a head gives the plain model.

    Args:
        path: a folder, or the name of a repository, as `AutoModelForCausalLM.from_pretrained` takes them.
        logits: as for `fuse_loss`. options: passed on to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: output_loading_info was given.
        ValueError: tensors of the head are missing, or its description cannot be read.
        RuntimeError: the configuration gives the logits another transform than they had when the head was attached.
        OSError: no such folder.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, ids = attach_head(LlamaForCausalLM(config), "softcap", cap=0.1).eval(), torch.arange(12).view(2, 6)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder)
    ...     loaded = from_pretrained(folder)
    >>> loaded.lm_head.logit_function, torch.equal(loaded(ids).logits, model(ids).logits)
    (Softcap(cap=0.1), True)
    """
    checked_kind(logits)
    if "output_loading_info" in options:
        raise TypeError("output_loading_info: expected to be left out: from_pretrained returns the model alone")
    with held_report() as drop_report:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        described = getattr(model.config, CONFIG_FIELD, None)
        if described is None:
            return model
        linear = plain_head(model)
        try:
            head, steps = _described_on(linear, described)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {CONFIG_FIELD} in its config.json cannot be read: {error}") from error
        prefix = next(name for name, module in model.named_modules() if module is linear) + "."
        own = set(head.state_dict()) - {"weight", "bias"}
        if only_unexpected(info, {prefix + key for key in own}):
            drop_report()
    found = {key: value for key, value in _tensors(path, prefix, options) if key in own}
    if missing := sorted(own - found.keys()):
        raise ValueError(f"{path}: its config.json names a head of uncork, and its weights lack {', '.join(missing)}")
    kept = {key: value for key, value in head.state_dict().items() if key not in own}
    head.load_state_dict({**kept, **found})
    _install(model, linear, head, steps, logits)
    return model


def merge_head(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a model with an attached head into a plain one with the same logits; the model itself is returned.

    There is one where the head's function is a scale s or a softcap at c, or both: c tanh(s z / c). What the model's
    own forward does not do is put into W and b (a scale, where they are not tied to the embeddings) and into the field
    `final_logit_softcapping` of the configuration (a softcap, where the model's forward obeys that field, which is
    checked by value).

    Raises:
        TypeError: no head is attached.
        ValueError: there is no such plain model; the message says why. The model is left as it was.

    >>> from transformers import Gemma2Config, Gemma2ForCausalLM
    >>> config = Gemma2Config(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=4, final_logit_softcapping=None)
    >>> model, ids = Gemma2ForCausalLM(config).eval(), torch.arange(12).view(2, 6)
    >>> before = attach_head(model, "softcap", cap=0.05)(ids).logits
    >>> torch.allclose(merge_head(model)(ids).logits, before), model.config.final_logit_softcapping
    (True, 0.05)
    """
    fusion = _attached(model)
    head = fusion.own_head
    assert head is not None
    wanted = _scale_and_cap(head.logit_function) if isinstance(head, LinearHead) else None
    if wanted is None:
        function: Any = head.logit_function
        parts = list(function.functions) if isinstance(function, Compose) else [function]
        what = ", then ".join(type(part).__name__ for part in parts) if isinstance(head, LinearHead) else "a mixture"
        raise ValueError(f"head: expected a scale or a softcap, which a plain model can have, got {what}")
    steps, described = fusion.steps, getattr(model.config, CONFIG_FIELD)
    detach_head(model)
    try:
        _merge(model, *wanted)
    except ValueError:
        _install(model, plain_head(model), head, steps, fusion.logits_as)
        setattr(model.config, CONFIG_FIELD, described)
        raise
    return model


def _merge(model: PreTrainedModel, scale: float, cap: float | None) -> None:
    """Makes a plain model's logits cap tanh(scale z / cap), or scale z. Raises ValueError, changing nothing."""
    linear = plain_head(model)
    present = _scale_and_cap(read_logit_function(model))
    assert present is not None
    config: Any = model.config.get_text_config()
    capped = cap is not None and present[1] is None
    if capped:
        if not hasattr(config, _CAP_FIELD):
            raise ValueError(f"head: a softcap at {cap}, and {type(model).__name__} has no {_CAP_FIELD}")
        setattr(config, _CAP_FIELD, cap)
        present = _scale_and_cap(read_logit_function(model)) or (scale, None)
    try:
        if present[1] != cap:
            raise ValueError(
                f"head: a softcap at {cap}, and the forward of {type(model).__name__} caps at {present[1]}"
            )
        factor = scale / present[0]
        if abs(factor - 1) > 1e-12:
            if linear.weight is model.get_input_embeddings().weight:
                raise ValueError(
                    f"head: a scale of {factor:g}, which would change the embeddings too, since the weights are tied"
                )
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.mul_(factor)
    except ValueError:
        if capped:
            setattr(config, _CAP_FIELD, None)
        raise


def _scale_and_cap(function: object) -> tuple[float, float | None] | None:
    """(s, c) if the function is c tanh(s z / c), or s z with c = None; None if it is anything else."""
    parts = list(function.functions) if isinstance(function, Compose) else [] if function is None else [function]
    scale, cap = 1.0, None
    for part in parts:
        if isinstance(part, Identity):
            continue
        if cap is not None:
            return None
        if isinstance(part, Scale):
            scale *= part(torch.ones((), dtype=torch.float64)).item()
        elif type(part) is Softcap:
            cap = part.cap
        elif isinstance(part, Compose):
            inner = _scale_and_cap(part)
            if inner is None:
                return None
            scale, cap = scale * inner[0], inner[1]
        else:
            return None
    return scale, cap


def _install(model: PreTrainedModel, linear: nn.Linear, head: Head, steps: tuple[Step, ...], logits: str) -> None:
    """Puts a head in the place of a model's own output layer. The model is as it was if that fails."""
    fusion = Fusion(head, owns_function=True, logits=logits)
    fusion.steps, fusion.plain = steps, linear
    head.train(linear.training)
    model.set_output_embeddings(head)
    try:
        install(model, head, fusion)
    except BaseException:
        model.set_output_embeddings(linear)
        raise
    described = {"about": _ABOUT, "spec": head.spec(), "steps": [list(step) for step in steps]}
    setattr(model.config, CONFIG_FIELD, described)


def _attached(model: PreTrainedModel) -> Fusion:
    fusion = fusion_of(model) if is_fused(require_model(model)) else None
    if fusion is None or not fusion.owns_function:
        raise TypeError("model: expected one with an attached head; attach_head first")
    return fusion


def _described_on(linear: nn.Linear, described: Any) -> tuple[Head, tuple[Step, ...]]:
    """The head at its start that a configuration describes, over a model's output layer, and what the forward did."""
    if not isinstance(described, dict) or not {"spec", "steps"} <= described.keys():
        found = sorted(described) if isinstance(described, dict) else repr(described)
        raise ValueError(f"expected a spec and steps, as attach_head writes them, got {found}")
    steps = described["steps"]
    if not isinstance(steps, list) or not all(
        isinstance(step, list) and [type(part) for part in step] in ([str, float], [str, int]) for step in steps
    ):
        raise ValueError(f"steps: expected a list of [name, number], got {steps!r}")
    with linear.weight.device:
        head = head_from_spec(described["spec"])
    head._adopt(linear)
    _keep_function_wide(head)
    return head, tuple((name, value) for name, value in steps)


def _head_on(linear: nn.Linear, name: str, transform: LogitFunction | None, options: dict[str, Any]) -> Head:
    """The head over the parameters of the model's own output layer, at its start."""
    spec = HeadSpec(name)
    for fixed in _OF_THE_MODEL:
        if fixed in options:
            raise TypeError(f"{fixed}: given by the model's own output layer; leave it out")
    of_mixtures = {"latent_activation": None, "noise": _NOISE} if spec.is_mixture else {}
    taken = {key: value for key, value in {**spec.defaults, **of_mixtures}.items() if key not in _OF_THE_MODEL}
    check_options(name, options, taken)
    given = {**of_mixtures, **options}
    if finite("noise", noise := given.pop("noise", 0.0)) < 0:
        raise ValueError(f"noise: expected a number of at least 0, got {noise!r}")
    spec = HeadSpec(name, given)
    function = spec.build_function()
    if transform is not None:
        function = transform if function is None else Compose(transform, function)
    made: Any = cast(Any, spec.layer)
    if isinstance(made, partial):
        made = made.func
    if not spec.is_mixture:
        head: Any = made.from_linear(linear, logit_function=function)
    else:
        chosen = {key: spec.resolved[key] for key in ("num_components", "latent_activation")}
        head = made.from_linear(linear, **chosen, logit_function=function)
        _start_at_identity(head, noise)
    _keep_function_wide(head)
    return cast(Head, head)


def _start_at_identity(head: Any, noise: float) -> None:
    """Every component's latent is the input itself, but for noise; all components weigh the same."""
    size = head.latent_features
    with torch.no_grad():
        eye = torch.eye(size, dtype=head.latent.weight.dtype, device=head.latent.weight.device)
        head.latent.weight.normal_(std=noise / size**0.5).add_(eye.repeat(head.num_components, 1))
        head.latent.bias.zero_()
        head.prior.weight.zero_()


def _keep_function_wide(head: Head) -> None:
    """The function's few numbers stay float32 under a half-precision model, whose steps would be lost in rounding."""
    if head.logit_function is not None and cast(Tensor, head.weight).dtype in (torch.bfloat16, torch.float16):
        head.logit_function.float()


def _tensors(path: str | Path, prefix: str, options: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a saved model whose names begin with a prefix, which is taken off."""
    where = {key: options[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in options}

    def find(name: str) -> str | None:
        return cached_file(path, name, **where, _raise_exceptions_for_missing_entries=False)

    index = find("model.safetensors.index.json")
    if index is None:
        names = ["model.safetensors"]
    else:
        places = json.loads(Path(index).read_text())["weight_map"]
        names = sorted({place for key, place in places.items() if key.startswith(prefix)})
    for name in names:
        found = find(name)
        if found is None:
            raise ValueError(f"{path}: expected the head's tensors in {name}, which is not there")
        with safe_open(found, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dictionary)
                if key.startswith(prefix):
                    yield key.removeprefix(prefix), file.get_tensor(key)

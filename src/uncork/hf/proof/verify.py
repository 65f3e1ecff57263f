"""Proof by value that training, evaluation and generation of a model use the same function of its logits."""

import contextlib
import inspect
import itertools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uncork.heads import hooks
from uncork.hf.attach import from_pretrained
from uncork.hf.fusion import KEY, Fusion, require_model
from uncork.hf.load import quiet
from uncork.hf.proof.checks import Labelled, check_forward, check_generation, check_given, compare_logits, logits_of
from uncork.hf.proof.drive import Drive, NotDriven, untouched
from uncork.hf.proof.problem import Problem
from uncork.hf.proof.reference import Reading, Reference, read
from uncork.hf.proof.verification import Row, Verification, left_out, raised
from uncork.hf.record import NotRecordable

RELOADED = "logits of the reloaded model", "who loads the saved model gets other logits"
_BATCH, _TIME = 2, 13


def verify(
    model: PreTrainedModel,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    inputs: Mapping[str, Any] | None = None,
    loss_kwargs: Mapping[str, Any] | None = None,
    reload: bool = True,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Prove by value that training, evaluation and generation of a model use the same function of its logits.

        logits = f(W h + b),      loss = cross_entropy(logits, next words)

    The function f is read from the model's own forward, without a field of its configuration. Hidden states h are then
    driven into its output layer, such that the scores W h + b reach from 0.1 to 1000, far past any cap, where f, no f
    and f applied twice differ; and what every path makes of them is compared with float64: the logits without and with
    labels, the losses of training and evaluation, the gradients to h, W, b and the parameters of f, `generate`, and the
    model that is saved and loaded again. A failed check says which known mistake it is, if it is one.

    What rounding allows is measured with the model's own modules in its own dtype, so bfloat16 is judged by what torch
    itself does there, and a function that the model computes in float32 has to be computed in float32. The model is
    left as it was: modes, gradients, hooks, random numbers.

    Args:
        model: a causal language model of transformers, as it is, with `fuse_loss`, or with a head of this library.
            Where its forward with labels computes the loss without calling the output layer, the hidden states are
            given as the output of its body.
        loss: another library's loss to be checked: takes hidden states (N, D), the output layer's input, and labels
            (N,) that are not to be shifted, -100 for none; returns the mean.
        inputs: what the forward takes beside labels, input_ids (B, T) among them. None: random ids, (2, 13).
        loss_kwargs: keyword arguments that the forward takes with labels only, as TRL's `fused_lm_head=True`.
        reload: whether the model is saved to a temporary folder and loaded again, in memory beside itself.
        seed: of the hidden states.
        on_progress: called now and then with how many of the pieces of work are done, and how many there are.

    Returns:
        A `Verification`: `passed`, `rows`, `function`; printed, a table; `require()` raises what failed.

    Raises:
        TypeError: no transformers model, or one without an output layer.
        ValueError: an output layer whose weight is zero.
        NotRecordable: the model does to its logits what no increasing function of this library is.
        NotDriven: its forward does not compute its logits from its output layer, a token of the input each.
        RuntimeError: the model does not run on these inputs.

    >>> from transformers import Gemma2Config, Gemma2ForCausalLM
    >>> config = Gemma2Config(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
    ...                       num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=30.0)
    >>> model = Gemma2ForCausalLM(config)
    >>> verify(model, reload=False).require().function
    Softcap(cap=30.0)
    >>> def uncapped(hidden, labels):
    ...     return torch.nn.functional.cross_entropy(model.lm_head(hidden), labels)
    >>> verify(model, loss=uncapped, reload=False)["the given loss"].found
    'no function'
    """
    head, fusion = _head_of(model)
    generator = torch.Generator().manual_seed(seed)
    drive = Drive(model, head, fusion, _inputs(model, inputs, generator))
    parameters = [p for p in head.parameters() if p.is_floating_point()]
    tell = on_progress or (lambda done, total: None)
    tell(0, 1)
    with untouched(model, parameters):
        model.eval()
        try:
            reading, others = _read(drive)
            input, outputs = drive.observed()
        except (NotRecordable, NotDriven, TypeError):
            raise
        except Exception as error:
            raise RuntimeError(f"{type(model).__name__} could not be run without labels: {error}") from error
        reference = Reference(head, reading)
        problem = Problem.choose(reference, input, others, generator)
        passes = 2 * len(problem.groups)  # of training and of evaluation
        count = itertools.count(2)
        labelled = Labelled(drive, problem, loss_kwargs or {}, lambda: tell(next(count), passes + 4))
        rows = [check_forward(drive, problem), *labelled.rows()]
        tell(passes + 2, passes + 4)
        rows += check_generation(drive, problem, generator)
        tell(passes + 3, passes + 4)
        rows.append(_check_reload(drive, problem, logits_of(outputs), reload))
        rows += check_given(problem, loss) if loss is not None else []
        tell(passes + 4, passes + 4)
    return Verification(_named(model, drive), reading.function, _described(reference), tuple(rows))


def _head_of(model: Any) -> tuple[nn.Module, Fusion | None]:
    fusion = vars(require_model(model)).get(KEY)
    head = model.get_output_embeddings() if fusion is None else fusion.head
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise TypeError(f"model: expected an output layer with a weight, got {type(head).__name__}")
    if hook := hooks.on_module(head):
        raise TypeError(
            f"model's output layer: expected that nothing sees or changes its input or its logits, got {hook}: remove "
            "it first"
        )
    return cast(nn.Module, head), fusion


def _inputs(model: PreTrainedModel, inputs: Mapping[str, Any] | None, generator: torch.Generator) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if "labels" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(f"model: expected a forward with labels, got {type(model).__name__}.forward")
    if inputs is None:
        embedding = cast(Tensor, model.get_input_embeddings().weight)
        ids = torch.randint(len(embedding), (_BATCH, _TIME), generator=generator).to(embedding.device)
        inputs = {"input_ids": ids} | (
            {"attention_mask": torch.ones_like(ids)} if "attention_mask" in parameters else {}
        )
    if "input_ids" not in inputs or inputs["input_ids"].ndim != 2 or inputs["input_ids"].shape[1] < 9:
        raise ValueError("inputs: expected input_ids of shape (B, T) among them, T at least 9")
    # A mixture of experts adds a loss of its router's, which is not of the logits.
    return dict(inputs) | ({"output_router_logits": False} if "output_router_logits" in parameters else {})


def _read(drive: Drive) -> tuple[Reading, dict[str, nn.Module | None]]:
    """What the forward without labels does to the logits, or with labels if that cannot be recorded; and the functions
    of paths that have another."""
    model, inputs = drive.model, drive.inputs
    with_labels = {**inputs, "labels": inputs["input_ids"]}
    paths = {"with labels": (with_labels, False), "with labels in training": (with_labels, True)}
    found: dict[str, Reading] = {}
    try:
        reading = read(model, drive.head, drive.fusion, inputs)
    except NotRecordable:
        reading = read(model, drive.head, drive.fusion, with_labels)
    for name, (given, training) in paths.items():
        # A path that computes something else altogether is found by its values.
        with contextlib.suppress(Exception):
            found[name] = read(model.train(training), drive.head, drive.fusion, given)
    model.eval()
    others = {
        f"{other.function if other.function is not None else 'no function'}, as its forward {name} does": other.function
        for name, other in found.items()
        if other.steps != reading.steps
    }
    return reading, others


def _named(model: PreTrainedModel, drive: Drive) -> str:
    said = []
    if drive.fusion is not None:
        said.append(f"head {type(drive.head).__name__}" if drive.fusion.owns_function else "fused")
    if drive.past_the_head:
        said.append("its loss does not call the output layer")
    return type(model).__name__ + (f" ({', '.join(said)})" if said else "")


def _described(reference: Reference) -> str:
    head, function, words = reference.head, reference.function, reference.reading.words
    scores = "W h" if reference.bias is None else "W h + b"
    inside = scores if reference.plain else f"{type(head).__name__}(h)"
    left = len(range(*words.indices(len(reference.weight))))
    narrowed = "" if left == len(reference.weight) else f", the first {left} words of {len(reference.weight)}"
    if words.indices(len(reference.weight))[0]:
        narrowed = f", {left} words of {len(reference.weight)}"
    return f"{inside}{narrowed}" if function is None else f"f({inside}){narrowed}, f = {function}"


def _check_reload(drive: Drive, problem: Problem, before: Tensor | None, wanted: bool) -> Row:
    """The driven logits of the model saved and loaded as another program would, and those of its own hidden states."""
    if not wanted:
        return left_out(*RELOADED, "reload is off")
    model = drive.model
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            model.save_pretrained(folder)
            try:
                again = from_pretrained(folder, dtype="auto", local_files_only=True)
            except ValueError:  # a configuration that the Auto classes do not know
                again = type(model).from_pretrained(folder, dtype="auto", local_files_only=True)
        head, fusion = _head_of(cast(nn.Module, again).to(problem.rows.device).eval())
        with torch.no_grad():
            second = Drive(again, head, fusion, drive.inputs)
            driven, own = logits_of(second.forward(problem.rows)), logits_of(again(**drive.inputs))
    except Exception as error:
        return raised(*RELOADED, error)
    if driven is None or own is None or before is None:
        return left_out(*RELOADED, "the forward returns no logits")
    row = compare_logits(RELOADED, problem, [driven])
    if not row.passed:
        return row
    size = torch.finfo(problem.rows.dtype).eps ** 0.5 * before.abs().max()
    off = (own - before).abs().max()
    if bool(off <= size):
        return row
    return Row(*RELOADED[:1], False, float(off), float(size), RELOADED[1], "right in the output layer, wrong before it")

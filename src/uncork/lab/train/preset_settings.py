"""Every setting that a preset has: how the command line gives it, its value, and what it means."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, cast

from uncork.lab.train.config import TrainConfig
from uncork.lab.train.presets import get_preset

_ELSEWHERE = ("head", "head_options", "seed", "preset", "corpus", "tokenization", "model_options", "training_options")


@dataclass(frozen=True)
class Setting:
    """One setting of a preset: the value it has there, and what it means."""

    value: Any
    about: str


def known_settings(preset: str) -> dict[str, Setting]:
    """What `--set` takes with this preset, as its keys.

    >>> known_settings("lstm-laptop")["model_options.input_dropout"].value
    0.2

    Raises LabError for an unknown preset.
    """
    chosen, run = get_preset(preset), TrainConfig(preset=preset).resolved()
    parts = (
        ("", run, _ELSEWHERE),
        ("model_options.", chosen.model, ("out_features",)),
        ("training_options.", chosen.training, [field.name for field in dataclasses.fields(run)]),
    )
    return {
        f"{prefix}{field.name}": Setting(getattr(part, field.name), _explanations(cast(Any, type(part)))[field.name])
        for prefix, part, left_out in parts
        for field in dataclasses.fields(part)
        if field.name not in left_out
    }


@functools.cache
def _explanations(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }

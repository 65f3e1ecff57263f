"""Settings that are checked when they are made, with pydantic; a bad one is one line that names the field."""

import functools
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from uncork.lab.errors import LabError


def expects(words: str) -> WrapValidator:
    """Has an error say what a value must be in these words, instead of pydantic's for the first check that fails."""

    def checked(value: Any, validate: Any) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("expected", "{words}", {"words": words}) from None

    return WrapValidator(checked)


_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Switch = Annotated[bool, expects("true or false")]
Size = Annotated[int, Field(ge=1, lt=2**63), expects("an integer of at least 1 and below 2^63")]
Seed = Annotated[int, Field(ge=0, lt=2**63), expects("an integer from 0 to 2^63 - 1")]
Positive = Annotated[float, Field(gt=0), expects("a finite number above 0")]
NonNegative = Annotated[float, Field(ge=0), expects("a finite number of at least 0")]
Share = Annotated[float, Field(ge=0, lt=1), expects("in [0, 1)")]


class Validated(BaseModel):
    """Frozen settings, each explained by the docstring below it.

    Raises:
        LabError: an unknown field or a bad value; the message says what was expected and what came.
    """

    model_config = _STRICT | ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LabError(_told(error.errors()[0])) from None

    def updated(self, **values: Any) -> Self:
        """These settings with some values replaced, validated again."""
        return type(self)(**{**dict(self), **values})

    @classmethod
    def explanations(cls) -> dict[str, str]:
        """The docstring of each field, on one line."""
        return {name: " ".join((field.description or "").split()) for name, field in cls.model_fields.items()}


def require(name: str, kind: Any, value: Any) -> None:
    """Raise LabError unless a value that belongs to no settings is of this kind.

    >>> require("window", Size, 0)
    Traceback (most recent call last):
    uncork.lab.errors.LabError: window must be an integer of at least 1 and below 2^63, got 0
    """
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        details = error.errors()[0]
        raise LabError(_told({**details, "loc": (name, *details["loc"])})) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=_STRICT)


def _told(error: ErrorDetails) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown setting: {name}"
    return f"{name} must be {error['msg'].removeprefix('Input should be ')}, got {error['input']!r}"

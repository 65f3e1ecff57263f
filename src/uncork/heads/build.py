"""A head by its name, or from its spec."""

from typing import Any

from torch import Tensor

from uncork.heads.base import Head
from uncork.heads.spec import HeadSpec, layer_classes, options_table
from uncork.logit_functions import LogitFunction
from uncork.logit_functions.base import from_options


def build_head(
    name: str,
    in_features: int,
    vocab_size: int,
    *,
    bias_init: Tensor | None = None,
    **options: Any,
) -> Head:
    """A head by its name.

    {table}

    Args:
        name: one of HEAD_NAMES. in_features: D. vocab_size: V.
        bias_init: (V,) counts of the words; the bias starts where f(bias) is the log unigram (with 1/2 for a count of
            0) up to a constant, so that every head starts by predicting the words' frequencies.
        options: those of the table. scale: a fixed positive factor on the scores, f(scale * (W h + b)); Adam's steps
            do not scale with it, so it sets how fast the logits can move. bias: whether the projection has one. gss's
            center and steepness of None are -1.5 and 2.5, or 0 and 1 where they are learned. latent_features of None
            is in_features.

    >>> build_head("plif", 16, 1000, num_pieces=50).logit_function
    PLIF(num_pieces=50, bound=20.0, init='identity', spread=1.0, frozen=False, unit_slope=False, unit_slope_at=0.0)

    >>> build_head("softmax", 16, 1000, scale=2.0).logit_function
    Scale(factor=2.0, learnable=False)

    Raises:
        ValueError: for an unknown name (the message lists them) or an option out of range.
        TypeError: for an option that the head does not have (the message lists those that it has).
    """
    for place in ("device", "dtype"):
        if place in options:
            raise TypeError(
                f"{place}: expected to be left out: move the head, build_head(...).to(device, dtype), or build it "
                "under `with torch.device(...)`"
            )
    return HeadSpec(name, options).build(in_features, vocab_size, bias_init=bias_init)


if build_head.__doc__:  # python -OO has none
    build_head.__doc__ = build_head.__doc__.replace("{table}", options_table().replace("\n", "\n    "))


def head_from_spec(spec: dict[str, Any]) -> Head:
    """The head that `Head.spec()` described, at its start; load a state_dict for its parameters.

    >>> head_from_spec(build_head("mos", 8, 100, num_components=2).spec()).num_components
    2

    Raises:
        TypeError: if it is no dict, or its logit_function none.
        ValueError: if a name, a version or an option is not known here, or an option is missing.
    """
    if not isinstance(spec, dict):
        raise TypeError(
            f"spec: expected the dict that a head's spec() gives, got {type(spec).__name__}; keep it beside the "
            "state_dict, whose head_spec holds the function alone, without the sizes"
        )
    classes = layer_classes()
    if str(spec.get("name")) not in classes:
        raise ValueError(f"spec: expected a name among {sorted(classes)}, got {spec.get('name')!r}")
    if not isinstance(spec.get("options"), dict):
        raise ValueError(f"spec: expected options, got {spec!r}")
    function = spec.get("logit_function")
    made = None if function is None else LogitFunction.from_spec(function)
    return from_options(classes[spec["name"]], spec["options"], logit_function=made)

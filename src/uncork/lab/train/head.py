"""A head as the command line writes it: its name, its own options, and training settings of its own."""

from typing import Any

from uncork.heads.spec import parse_text
from uncork.lab.errors import LabError
from uncork.lab.train.checkpoints import check_head
from uncork.lab.train.config import TrainConfig

# What a head may set for itself beside its own options, since a fair comparison tunes it for each head.
OWN_SETTINGS = (
    "lr", "function_lr_scale", "output_lr_scale", "function_clip", "function_start",
    "epochs", "max_steps", "in_features", "bias_prior", "weight_decay",
)  # fmt: skip


def parse_head(text: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A head as the command line writes it: (name, its options, its own training settings).

    >>> parse_head("plif:num_pieces=50,lr=0.002")
    ('plif', {'num_pieces': 50}, {'lr': 0.002})
    >>> parse_head("mos:latent_activation=null")
    ('mos', {'latent_activation': None}, {})

    Raises:
        LabError: for anything that is not name or name:key=value,key=value. Whether the head and its options exist is
            checked when it is built.
    """
    try:
        name, values = parse_text(text)
    except ValueError as error:
        raise LabError(str(error)) from None
    settings = {key: values.pop(key) for key in [*values] if key in OWN_SETTINGS}
    return name, values, settings


def with_head(base: TrainConfig, text: str, seed: int) -> TrainConfig:
    """The config with this head, as the command line writes it, and this seed.

    Raises:
        LabError: a head that cannot be read or built, a bad seed.
    """
    name, options, settings = parse_head(text)
    base = base.updated(seed=seed)
    try:
        preset = TrainConfig.of(base.preset)
        own = {key: getattr(preset, key) if value is None else value for key, value in settings.items()}
        config = base.updated(head=name, head_options=options, **own)
    except LabError as error:
        said = str(error)
        raise LabError(said if said.startswith("head ") else f"head {text}: {said}") from None
    check_head(config)
    return config

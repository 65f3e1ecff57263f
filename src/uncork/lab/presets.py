"""Named settings: a backbone and how to train it, the published ones and ones sized for a laptop or a GPU."""

import dataclasses
from typing import Any, Literal

from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, ModelConfig, TransformerConfig
from uncork.lab.models.language_model import require_bool, require_non_negative, require_size


@dataclasses.dataclass(frozen=True)
class TrainingPreset:
    """How a backbone is trained, whatever its head.

    >>> TrainingPreset(optimizer="sgd", lr=20.0, asgd=200).asgd
    200
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (with decoupled weight decay) or plain SGD."""
    lr: float = 3e-3
    """Learning rate at its highest."""
    batch_size: int = 32
    """Parallel streams of the training text, over all processes."""
    eval_batch_size: int = 32
    """Parallel streams of a text that is evaluated."""
    bptt: int = 64
    """Tokens of each stream in a batch: how far gradients reach back."""
    variable_bptt: bool = False
    """Draw each batch's length around bptt and scale its learning rate by length / bptt, as AWD-LSTM does."""
    epochs: int = 10
    """Passes over the training text."""
    weight_decay: float = 0.0
    """Weight decay of what `decay` says; with SGD it is an L2 penalty."""
    clip: float | None = 1.0
    """Largest norm of the gradient. None: no clipping."""
    asgd: Literal["never", "trigger"] | int = "never"
    """When SGD starts to average its iterates: never, when validation stops improving, or at this epoch (from 1)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after the warm-up: constant, or down to 0 along half a cosine."""
    warmup: float = 0.0
    """Share of all steps, in [0, 1), over which the learning rate rises linearly."""
    bias_prior: bool = False
    """Start the bias of the output layer at the log unigram of the training text."""
    output_lr_scale: float = 1.0
    """Factor on the learning rate for weight and bias of the output layer."""
    decay: Literal["all", "matrices"] = "all"
    """What weight decay applies to: everything but the functions, or of that the matrices alone (no biases, norms,
    embeddings); see `uncork.parameter_groups`."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "bptt", "epochs"):
            require_size(name, getattr(self, name))
        for name in ("lr", "weight_decay", "warmup", "output_lr_scale"):
            require_non_negative(name, getattr(self, name))
        for name in ("variable_bptt", "bias_prior"):
            require_bool(name, getattr(self, name))
        if self.lr == 0:
            raise LabError("lr must be above 0, got 0")
        if self.warmup >= 1:
            raise LabError(f"warmup must be below 1, got {self.warmup}")
        if self.clip is not None:
            require_non_negative("clip", self.clip)
            if self.clip == 0:
                raise LabError("clip must be above 0, or None for no clipping, got 0")
        for name, choices in (
            ("optimizer", ("adam", "sgd")),
            ("schedule", ("constant", "cosine")),
            ("decay", ("all", "matrices")),
        ):
            if getattr(self, name) not in choices:
                raise LabError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_asgd()

    def _check_asgd(self) -> None:
        if isinstance(self.asgd, str):
            if self.asgd not in ("never", "trigger"):
                raise LabError(f"asgd must be 'never', 'trigger' or an epoch, got {self.asgd!r}")
        else:
            require_size("asgd", self.asgd)
        if self.asgd != "never" and self.optimizer != "sgd":
            raise LabError(f"asgd averages SGD's iterates; the optimizer is {self.optimizer!r}")

    def to_dict(self) -> dict[str, Any]:
        """Every field, in JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingPreset":
        """The settings that `to_dict` wrote. Raises LabError for an unknown field or a bad value."""
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise LabError(f"unknown training setting: {', '.join(unknown)}")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named backbone, how to train it, and one line on what it is for."""

    description: str
    model: ModelConfig
    training: TrainingPreset

    def __post_init__(self) -> None:
        if isinstance(self.model, TransformerConfig):
            if self.training.variable_bptt:
                raise LabError("variable_bptt draws lengths without a limit, and a transformer has one: switch it off")
            if self.training.bptt > self.model.max_length:
                raise LabError(
                    f"bptt must be at most the transformer's max_length = {self.model.max_length}, "
                    f"got {self.training.bptt}"
                )

    def with_out_features(self, out_features: int) -> "Preset":
        """The same preset with `out_features` features before the head (the d of the softmax bottleneck).

        >>> get_preset("lstm-laptop").with_out_features(8).model.feature_size
        8
        """
        return dataclasses.replace(self, model=dataclasses.replace(self.model, out_features=out_features))


_AWD_LSTM_PTB = AWDLSTMConfig(
    embedding_size=400,
    hidden_sizes=(1150, 1150, 400),
    tie_weights=True,
    weight_drop=0.5,
    embedding_dropout=0.1,
    input_dropout=0.4,
    hidden_dropout=0.3,
    output_dropout=0.4,
    activation_penalty=2.0,
    temporal_penalty=1.0,
)
_AWD_TRAINING_PTB = TrainingPreset(
    optimizer="sgd",
    lr=20.0,
    batch_size=20,
    eval_batch_size=10,
    bptt=70,
    variable_bptt=True,
    epochs=500,
    weight_decay=1.2e-6,
    clip=0.25,
    asgd=200,
    schedule="constant",
)
# What every preset but the published ones has in common: bias and learning rate of the output layer move a perplexity
# further than most logit functions do, so that no head is to be compared without them. The rates are the best of 1, 4,
# 8, 16 and 32 on validation, the lower of two that are level (benchmarks/preset_rates.py); a GPU's are not measured.
_OWN: dict[str, Any] = {"bias_prior": True, "decay": "matrices"}

PRESETS: dict[str, Preset] = {
    "awd-lstm-ptb": Preset(
        "AWD-LSTM of 24 M parameters with the published settings for Penn Treebank; for a GPU.",
        _AWD_LSTM_PTB,
        _AWD_TRAINING_PTB,
    ),
    "awd-lstm-wt2": Preset(
        "AWD-LSTM of 34 M parameters with the published settings for WikiText-2; for a GPU.",
        dataclasses.replace(_AWD_LSTM_PTB, input_dropout=0.65, hidden_dropout=0.2),
        dataclasses.replace(_AWD_TRAINING_PTB, lr=30.0, batch_size=80, epochs=750),
    ),
    "lstm-laptop": Preset(
        "One LSTM layer of 256 units with 32 features before the head: minutes an epoch on 2 CPU cores.",
        AWDLSTMConfig(embedding_size=256, hidden_sizes=(256,), out_features=32, input_dropout=0.2),
        TrainingPreset(lr=3e-3, batch_size=32, bptt=48, epochs=4, warmup=0.02, output_lr_scale=32.0, **_OWN),
    ),
    "lstm-small": Preset(
        "One LSTM layer of 128 units with 16 features before the head: half a minute an epoch of Penn Treebank a core.",
        AWDLSTMConfig(embedding_size=128, hidden_sizes=(128,), out_features=16, input_dropout=0.2),
        TrainingPreset(lr=8e-3, batch_size=16, bptt=48, epochs=4, warmup=0.02, output_lr_scale=16.0, **_OWN),
    ),
    "lstm-gpu": Preset(
        "Two LSTM layers of 1024 units with dropouts and 64 features before the head, trained by Adam; for a GPU.",
        AWDLSTMConfig(
            embedding_size=512,
            hidden_sizes=(1024, 1024),
            out_features=64,
            weight_drop=0.4,
            embedding_dropout=0.1,
            input_dropout=0.4,
            hidden_dropout=0.3,
        ),
        TrainingPreset(
            lr=2e-3,
            batch_size=64,
            bptt=70,
            variable_bptt=True,
            epochs=40,
            weight_decay=1e-4,
            warmup=0.02,
            output_lr_scale=8.0,
            **_OWN,
        ),
    ),
    "transformer-laptop": Preset(
        "Four transformer blocks of width 192 with 32 features before the head, sized for a few CPU cores.",
        TransformerConfig(width=192, depth=4, num_heads=6, max_length=256, out_features=32, dropout=0.1),
        TrainingPreset(
            lr=2e-3, batch_size=32, bptt=64, epochs=4, weight_decay=0.01, warmup=0.05, output_lr_scale=16.0, **_OWN
        ),
    ),
    "transformer-small": Preset(
        "Two transformer blocks of width 128 with 16 features before the head: as quick as lstm-small.",
        TransformerConfig(width=128, depth=2, num_heads=4, max_length=64, out_features=16, dropout=0.1),
        TrainingPreset(
            lr=4e-3, batch_size=32, bptt=48, epochs=4, weight_decay=0.01, warmup=0.05, output_lr_scale=16.0, **_OWN
        ),
    ),
    "transformer-gpu": Preset(
        "Eight transformer blocks of width 512 with 64 features before the head; for a GPU.",
        TransformerConfig(width=512, depth=8, num_heads=8, max_length=512, out_features=64, dropout=0.2),
        TrainingPreset(
            lr=1e-3, batch_size=64, bptt=256, epochs=40, weight_decay=0.1, warmup=0.05, output_lr_scale=8.0, **_OWN
        ),
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises LabError, with the names there are, for any other."""
    if name not in PRESETS:
        raise LabError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]

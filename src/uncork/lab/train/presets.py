"""Named settings: a backbone and how to train it, the published ones and ones sized for a laptop or a GPU."""

from typing import Any, NamedTuple

from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, LookupConfig, TransformerConfig
from uncork.messages import close_to


class Preset(NamedTuple):
    """Named values to start a `uncork.lab.train.config.TrainConfig` from, and a line on what they are for."""

    description: str
    values: dict[str, Any]


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
_AWD_TRAINING_PTB: dict[str, Any] = {
    "optimizer": "sgd", "lr": 20.0, "batch_size": 20, "eval_batch_size": 10, "bptt": 70, "variable_bptt": True,
    "epochs": 500.0, "weight_decay": 1.2e-6, "clip": 0.25, "asgd": 200, "schedule": "constant",
}  # fmt: skip
# Common to all presets but the published ones. Bias and learning rate of the output layer change a perplexity more than
# most logit functions do, so heads are compared where both are set well. Each output_lr_scale is the best of 1, 4, 8,
# 16, 32 on validation, the lower of two that are level (benchmarks/preset_rates.py); those for GPUs are not measured.
_OWN: dict[str, Any] = {"bias_prior": True, "decay": "matrices"}


def _preset(description: str, **values: Any) -> Preset:
    return Preset(description, values)


PRESETS: dict[str, Preset] = {
    "awd-lstm-ptb": _preset(
        "AWD-LSTM of 24 M parameters with the published settings for Penn Treebank; for a GPU.",
        model=_AWD_LSTM_PTB,
        **_AWD_TRAINING_PTB,
    ),
    "awd-lstm-wt2": _preset(
        "AWD-LSTM of 34 M parameters with the published settings for WikiText-2; for a GPU.",
        model=_AWD_LSTM_PTB.updated(input_dropout=0.65, hidden_dropout=0.2),
        **{**_AWD_TRAINING_PTB, "lr": 30.0, "batch_size": 80, "epochs": 750.0},
    ),
    "lstm-laptop": _preset(
        "One LSTM layer of 256 units with 32 features before the head: minutes an epoch on 2 CPU cores.",
        model=AWDLSTMConfig(embedding_size=256, hidden_sizes=(256,), out_features=32, input_dropout=0.2),
        lr=3e-3,
        batch_size=32,
        bptt=48,
        epochs=4.0,
        warmup=0.02,
        output_lr_scale=32.0,
        **_OWN,
    ),
    "lstm-small": _preset(
        "One LSTM layer of 128 units with 16 features before the head: half a minute an epoch of Penn Treebank a core.",
        model=AWDLSTMConfig(embedding_size=128, hidden_sizes=(128,), out_features=16, input_dropout=0.2),
        lr=8e-3,
        batch_size=16,
        bptt=48,
        epochs=4.0,
        warmup=0.02,
        output_lr_scale=16.0,
        **_OWN,
    ),
    "lstm-gpu": _preset(
        "Two LSTM layers of 1024 units with dropouts and 64 features before the head, trained by Adam; for a GPU.",
        model=AWDLSTMConfig(
            embedding_size=512,
            hidden_sizes=(1024, 1024),
            out_features=64,
            weight_drop=0.4,
            embedding_dropout=0.1,
            input_dropout=0.4,
            hidden_dropout=0.3,
        ),
        lr=2e-3,
        batch_size=64,
        bptt=70,
        variable_bptt=True,
        epochs=40.0,
        weight_decay=1e-4,
        warmup=0.02,
        output_lr_scale=8.0,
        **_OWN,
    ),
    "transformer-laptop": _preset(
        "Four transformer blocks of width 192 with 32 features before the head, sized for a few CPU cores.",
        model=TransformerConfig(width=192, depth=4, num_heads=6, max_length=256, out_features=32, dropout=0.1),
        lr=2e-3,
        batch_size=32,
        bptt=64,
        epochs=4.0,
        weight_decay=0.01,
        warmup=0.05,
        output_lr_scale=16.0,
        **_OWN,
    ),
    "transformer-small": _preset(
        "Two transformer blocks of width 128 with 16 features before the head: as quick as lstm-small.",
        model=TransformerConfig(width=128, depth=2, num_heads=4, max_length=64, out_features=16, dropout=0.1),
        lr=4e-3,
        batch_size=32,
        bptt=48,
        epochs=4.0,
        weight_decay=0.01,
        warmup=0.05,
        output_lr_scale=16.0,
        **_OWN,
    ),
    "lookup": _preset(
        "A free vector of 8 features for each word, trained on all counts of the text at once: the output layer alone.",
        model=LookupConfig(),
        lr=0.1,
        batch_size=1,
        bptt=64,
        epochs=300.0,
        eval_every=10,
        clip=0.0,
        warmup=0.05,
        function_lr_scale=0.3,
        bias_prior=True,
    ),
    "transformer-gpu": _preset(
        "Eight transformer blocks of width 512 with 64 features before the head; for a GPU.",
        model=TransformerConfig(width=512, depth=8, num_heads=8, max_length=512, out_features=64, dropout=0.2),
        lr=1e-3,
        batch_size=64,
        bptt=256,
        epochs=40.0,
        weight_decay=0.1,
        warmup=0.05,
        output_lr_scale=8.0,
        **_OWN,
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name. Raises LabError, with the names there are, for any other."""
    if name not in PRESETS:
        raise LabError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{close_to(name, PRESETS)}")
    return PRESETS[name]

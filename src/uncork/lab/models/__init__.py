"""Language models of the laboratory: a backbone (AWD-LSTM, transformer or lookup table) under any head."""

from typing import TypeAlias

from torch import nn

from uncork.lab.errors import LabError
from uncork.lab.models.awd_lstm import AWDLSTM, AWDLSTMConfig
from uncork.lab.models.language_model import Backbone, BackboneOutput, LanguageModel, ModelOutput
from uncork.lab.models.lookup import Lookup, LookupConfig
from uncork.lab.models.transformer import Transformer, TransformerConfig

ModelConfig: TypeAlias = AWDLSTMConfig | TransformerConfig | LookupConfig

__all__ = [
    "AWDLSTM",
    "AWDLSTMConfig",
    "Backbone",
    "BackboneOutput",
    "LanguageModel",
    "Lookup",
    "LookupConfig",
    "ModelConfig",
    "ModelOutput",
    "Transformer",
    "TransformerConfig",
    "build_model",
]


def build_model(config: ModelConfig, head: nn.Module, vocab_size: int) -> LanguageModel:
    """A language model with the config's backbone under `head`, whose `in_features` is `config.feature_size`.

    Raises LabError when the head's sizes do not fit the config's, as tied weights of different sizes.
    """
    try:
        return LanguageModel(config.build(vocab_size), head, tie_weights=config.tie_weights)
    except ValueError as error:
        raise LabError(f"model and head do not fit: {error}") from error

"""Whether a model fits into memory, before any of it is made."""

import psutil
import torch

from uncork.lab.errors import LabError
from uncork.lab.models import build_model
from uncork.lab.train.config import TrainConfig


def require_memory(config: TrainConfig, vocab_size: int, device: torch.device) -> None:
    """Raise LabError if the model's weights, and on a CPU all that training keeps of each, need more than there is."""
    with torch.device("meta"):
        model = build_model(config.model, config.build_head(vocab_size), vocab_size)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # The gradient, and Adam's two moments; on a GPU they are elsewhere.
    copies = 1 if device.type != "cpu" else 4 if config.optimizer == "adam" else 2
    there = psutil.virtual_memory().total
    if copies * weights > there:
        raise LabError(
            f"in_features {config.in_features} with V = {vocab_size:,} and the {config.head} head needs at least "
            f"{copies * weights / 2**30:,.1f} GiB of memory to train, and the machine has {there / 2**30:,.1f} GiB"
        )

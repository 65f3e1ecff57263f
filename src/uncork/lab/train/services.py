"""What a training takes from other packages: accelerate's devices and processes, TensorBoard's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from uncork.lab.errors import LabError
from uncork.lab.run.store import Run
from uncork.lab.train.config import TrainConfig


def build_accelerator(config: TrainConfig, cpu: bool) -> Any:
    """accelerate's Accelerator with the settings of the run alone; cpu: use no GPU."""
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from accelerate.utils import GradientAccumulationPlugin  # type: ignore[import-untyped]

    # accelerate keeps its state per process; without this a second run could not have another precision or device.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=cpu or not torch.cuda.is_available(),
        # What is not given here, accelerate reads from the environment.
        mixed_precision=config.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )


@contextmanager
def tensorboard_writer(run: Run, wanted: bool, first_step: int) -> Iterator[Any]:
    """A SummaryWriter in the folder of the run, or None where it is not wanted; rows from first_step on are dropped."""
    if not wanted:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LabError("TensorBoard's files need the package tensorboard: pip install tensorboard") from error
    with SummaryWriter(run.path / "tensorboard", purge_step=first_step) as writer:
        yield writer

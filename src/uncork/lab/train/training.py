"""Train a language model through accelerate, so that whatever stops it loses nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from uncork.lab.data.corpora import Corpus
from uncork.lab.errors import LabError
from uncork.lab.run.interrupts import InterruptGuard
from uncork.lab.run.store import Run
from uncork.lab.run.variables import refuse_variables
from uncork.lab.train.checkpoints import build_untrained
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.trainer import Progress, Trainer, TrainingDiverged

__all__ = ["Progress", "TrainConfig", "TrainingDiverged", "build_untrained", "text_record", "train"]


def train(
    config: TrainConfig,
    corpus: Corpus,
    run: Run,
    *,
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    tensorboard: bool = False,
    threads: int | None = None,
    cpu: bool = False,
) -> dict[str, Any]:
    """Train one model and return its result, which is also stored as the run's result.json.

    A run that is done, with the same settings on the same text, returns its result at once; one that was stopped goes
    on from its last checkpoint, on a CPU with the same number of threads to the same bits. In several processes
    (`accelerate launch`, `torchrun`), each reads its share of the streams, and the first one writes.

    Args:
        config: what to train; see `TrainConfig`.
        corpus: the text, as `config.load_corpus()` gives it.
        run: where metrics, checkpoints and the result go; made with `config.stored(text_record(corpus))`.
        resume: go on from the last checkpoint; False starts afresh.
        on_progress: called, in the first process, with every row of the metrics.
        tensorboard: also write the metrics to the folder `tensorboard` of the run.
        threads: of torch, for this process from now on. None: as they are.
        cpu: compute on the CPU even where there is a GPU.

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
        KeyboardInterrupt: Ctrl-C was pressed; a checkpoint of that moment was written first (at a second Ctrl-C, not).
        LabError: options that do not fit one another or the corpus; a run or a checkpoint of another training, or of
            another text; an environment variable that would change the numbers; a full disk.
    """
    refuse_variables(config.precision)
    run.require(config.stored(text_record(corpus)))
    done = run.result
    if done is not None:
        return done
    if threads is not None:
        torch.set_num_threads(threads)
    accelerator = _accelerator(config, cpu)
    device = accelerator.device
    with (
        run.lock() if accelerator.is_main_process else nullcontext(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        InterruptGuard() as interrupt,
    ):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        trainer = Trainer(config, corpus, run, accelerator, interrupt, on_progress)
        trainer.start(resume)
        with _tensorboard(run, tensorboard and accelerator.is_main_process, trainer.state.step + 1) as trainer.board:
            trainer.train()
        return trainer.finish()


def _accelerator(config: TrainConfig, cpu: bool) -> Any:
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
def _tensorboard(run: Run, wanted: bool, first_step: int) -> Iterator[Any]:
    if not wanted:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LabError("TensorBoard's files need the package tensorboard: pip install tensorboard") from error
    with SummaryWriter(run.path / "tensorboard", purge_step=first_step) as writer:
        yield writer

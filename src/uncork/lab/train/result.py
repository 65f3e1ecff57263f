"""The result of a finished run: result.json."""

import platform
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import torch

import uncork
from uncork.lab.data.corpora import Corpus
from uncork.lab.machine import STATUS, machine_name, resident
from uncork.lab.models import LanguageModel
from uncork.lab.train.checkpoints import TrainState
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.evaluation import Evaluation


def run_result(
    config: TrainConfig,
    corpus: Corpus,
    model: LanguageModel,
    state: TrainState,
    *,
    epochs: float,
    valid: Evaluation,
    test: Evaluation,
    rows: list[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """The contents of result.json, in JSON's types.

    `peak_memory_of` says what `peak_memory_bytes` measures: "gpu" is the most that this training allocated on the GPU,
    "process" the most that the whole process ever held, earlier runs in it included. `epochs` counts what was trained,
    which is whole steps; `epochs_asked` is what was asked for.
    """
    embedding = model.backbone.embedding.weight
    head_parameters = sum(p.numel() for p in model.head.parameters() if p is not embedding)
    speeds = [row["tokens_per_second"] for row in rows if row["kind"] == "train"]
    return {
        "head": config.head,
        "seed": config.seed,
        "corpus": corpus.name,
        "in_features": config.in_features,
        "vocab_size": corpus.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "head_parameters": head_parameters,
        "steps": state.step,
        "tokens": state.tokens,
        "epochs": epochs,
        "epochs_asked": config.epochs,
        "best_step": state.best_step,
        "train_seconds": state.seconds,
        "tokens_per_second": statistics.median(speeds),
        "peak_memory_bytes": peak_memory_bytes(device),
        "peak_memory_of": "gpu" if device.type == "cuda" else "process",
        "valid": valid.to_dict(),
        "test": test.to_dict(),
        "stopped": "early" if state.stopped else "finished",
        "versions": {"torch": torch.__version__, "uncork": uncork.__version__, "python": platform.python_version()},
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
        "loss": model.head.implementation(),  # type: ignore[operator]
    }


def epochs_told(result: Mapping[str, Any], config: TrainConfig) -> str | None:
    """One line on why the number of epochs trained is not the number asked for; None if it is.

    Args:
        result: a run's result.json. config: the settings of that run.
    """
    asked, done = result.get("epochs_asked"), result["epochs"]
    if asked is None or abs(done - asked) < 1e-9:
        return None
    steps, bptt = f"{result['steps']:,} steps", config.bptt
    if result["stopped"] == "early":
        why = f"validation was out of patience after {steps}"
    elif config.max_steps is not None and result["steps"] >= config.max_steps:
        why = f"max_steps ended it after {steps}"
    else:
        why = f"a step takes {bptt} tokens of each stream, so training ends after a whole number of them, {steps}"
    return f"{done:.3g} epochs were trained, {asked:.3g} were asked for: {why}"


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most bytes allocated on a GPU since its count was reset, or ever held by this process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        return resident("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""Loads a causal language model from a folder or from the hub's cache, for the command line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging

from uncork.hf.attach import from_pretrained


def load_cached(path: str, dtype: str = "auto") -> PreTrainedModel:
    """The model of a folder, or of a name in the hub's cache; nothing is downloaded.

    Raises:
        OSError: there is none, or it cannot be loaded; in one line.
    """
    folder = Path(path)
    if path and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise OSError(f"{path}: expected a folder that a model was saved to, and it holds no config.json")
    else:
        try:
            folder = Path(snapshot_download(path, local_files_only=True))
        except (HFValidationError, LocalEntryNotFoundError, OSError):
            raise OSError(
                f"{path!r}: expected a folder that a model was saved to, or the name of one in the hub's cache, and "
                "there is none (`hf download` fetches one)"
            ) from None
    try:
        with quiet():
            return from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # of transformers, of safetensors, or of the model's own code
        said = (str(error).strip() or "no reason is given").splitlines()[0]
        raise OSError(f"{path}: could not be loaded as a causal language model: {said}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within, transformers draws no progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""Hugging Face transformers: the fused loss and any output layer on a causal language model, and a check of both."""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"uncork.hf needs transformers ({error}): pip install 'uncork[hf]'") from None

from uncork.hf.attach import attach_head as attach_head
from uncork.hf.attach import detach_head as detach_head
from uncork.hf.attach import from_pretrained as from_pretrained
from uncork.hf.attach import merge_head as merge_head
from uncork.hf.callback import LogitFunctionCallback as LogitFunctionCallback
from uncork.hf.fuse import fuse_loss as fuse_loss
from uncork.hf.fuse import read_logit_function as read_logit_function
from uncork.hf.fuse import unfuse_loss as unfuse_loss
from uncork.hf.lazy import LazyLogits as LazyLogits
from uncork.hf.proof.drive import NotDriven as NotDriven
from uncork.hf.proof.verification import Verification as Verification
from uncork.hf.proof.verification import VerificationError as VerificationError
from uncork.hf.proof.verify import verify as verify
from uncork.hf.record import NotRecordable as NotRecordable

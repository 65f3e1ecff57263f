"""Hugging Face transformers: any output layer and the fused loss on a causal language model, and proof of it."""

from uncork.hf.fuse import fuse_loss as fuse_loss
from uncork.hf.fuse import read_logit_function as read_logit_function
from uncork.hf.fuse import unfuse_loss as unfuse_loss
from uncork.hf.lazy import LazyLogits as LazyLogits
from uncork.hf.record import NotRecordable as NotRecordable

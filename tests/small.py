"""Heads of a few features and words, all of which learn, for tests that go over every head."""

import torch

from uncork import HEAD_NAMES, Head, build_head

FEATURES, VOCAB = 4, 11
# Options that make the functions small, and those that make all of a head learn.
HEADS = {
    **{name: {} for name in HEAD_NAMES},
    "plif": {"num_pieces": 6, "bound": 2.0},
    "plif-frozen": {"num_pieces": 6, "bound": 2.0},
    "monotone": {"num_units": 4, "bound": 2.0},
    "monotone:tanh": {"num_units": 3, "bound": 2.0, "units": "tanh"},
    "gss:learned": {"learnable": True},
    "plif:scaled": {"num_pieces": 5, "bound": 2.0, "scale": 1.7},
    **{name: {"num_components": 2} for name in ("mos", "moss", "mop", "moc")},
}


def small_head(name: str) -> Head:
    return build_head(name.partition(":")[0], FEATURES, VOCAB, **HEADS[name])


def moved_head(name: str, dtype: torch.dtype = torch.float32) -> Head:
    """A small head away from its start."""
    head = small_head(name).to(dtype)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return head

"""Proof by value that every path of a model uses the same function of its logits: `uncork.hf.verify`."""

"""Signals reach the tests as they reach a program in a terminal, and processors that differ answer the same."""

import signal

import pytest

from uncork.loss import call

# A shell without job control starts what runs in its background with Ctrl-C ignored, nohup with SIGHUP, and so is all
# that these start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_bfloat16_instructions(monkeypatch):
    """scores_dtype=None is float32 here, also where the processor multiplies bfloat16."""
    monkeypatch.setattr(call, "multiplies_bfloat16", lambda: False)

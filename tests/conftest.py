"""Signals reach the tests as they reach a program in a terminal."""

import signal

# A shell without job control starts what runs in its background with Ctrl-C ignored, and all that it starts too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

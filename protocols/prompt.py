"""Prompt: what a process does about its interpreter so that its event loop is not kept waiting."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = 5e-5  # seconds


@contextmanager
def prompt() -> Iterator[None]:
    """While a loop serves beside threads that merge, write and judge.

    A thread that has come back from the disk asks for the interpreter after SWITCH, not after
    Python's 5 ms: in a small round the journal's waited 300 us, and as long waits a loop for a
    thread that evaluates. And what is there now, torch's 200,000 objects, will stay: the collector
    need not look at it again. Undone at the end, as others may live in this process; of several
    that serve in it, by the one that came first.
    """
    before = sys.getswitchinterval()
    if first := before > SWITCH:
        sys.setswitchinterval(SWITCH)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if first:
            sys.setswitchinterval(before)

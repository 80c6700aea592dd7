"""Leaving: Ctrl-C or SIGTERM ends a command at once, with a word and 130, whatever it is in.

KeyboardInterrupt does not do: while torch is imported its C code swallows one, and what was being
imported is then half there; and the thread of a trainer that does not look holds up the end of the
process for as long as its step takes.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from atoll.protocols import console
from atoll.protocols.errors import AtollError

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the second is what `timeout` and supervisors send
INTERRUPTED = AtollError("FL-S208", "interrupted", "what was finished is kept: start again")


def now(as_json: bool = False) -> NoReturn:
    """Say so, and end. Nothing is closed: what lies on disk is whole after a kill, too."""
    with contextlib.suppress(Exception):  # it may have come amid a print
        sys.stdout.flush()
        console.report(INTERRUPTED, as_json)
        sys.stdout.flush()
    os._exit(INTERRUPTED.exit_code)


def at_once(as_json: bool = False) -> None:
    """From here on both do that; in the main thread."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: now(as_json))


def soon() -> None:
    """All is done but the end of the process: Ctrl-C changes nothing any more."""
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def while_it_begins(as_json: bool) -> Iterator[None]:
    """The same around what is slow to begin, or where an event loop sets signals of its own."""
    with _kept():
        with contextlib.suppress(ValueError):  # not the main thread: its owner knows what to do
            at_once(as_json)
        yield


@contextlib.contextmanager
def as_interrupted() -> Iterator[None]:
    """SIGTERM is KeyboardInterrupt too, in here."""
    with _kept():
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Afterwards signals do what they did."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)

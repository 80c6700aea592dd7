"""Orphan: a child process that ends when its parent is gone, however the parent went."""

import os
import signal
import sys
import threading


def stop_with_stdin() -> None:
    """Send ourselves SIGTERM when stdin ends: its other end is the parent's alone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if not sys.stdin.isatty():
        threading.Thread(target=watch, name="stop-with-stdin", daemon=True).start()

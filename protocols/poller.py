"""Poller: which of gRPC's two ways to wait for its sockets a process of ours takes.

Since 2026 gRPC for Python reads sockets in a pool of threads of its own, its event engine, and
hands what has come to the thread that waits for it. The older way, to read in the thread that
waits, saves a hand-over a message: small rounds take a sixth less time, a round of 100 MB as long.
It can only be told so by the environment, and before it is imported.
"""

import os
import sys
from importlib import metadata

VARIABLE = "GRPC_EXPERIMENTS"
OLDER = "-event_engine_client,-event_engine_listener"
TRIED = (1, 85)  # the newest release that was measured; it would complain of names it has forgotten


def read_where_we_wait() -> bool:
    """Take the older way. False where that is not ours to say: the user has said something, gRPC
    is there already, or is newer than any that we have tried."""
    if VARIABLE in os.environ or "grpc" in sys.modules:
        return False
    major, minor = metadata.version("grpcio").split(".")[:2]
    if (int(major), int(minor)) > TRIED:
        return False
    os.environ[VARIABLE] = OLDER
    return True

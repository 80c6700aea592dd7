"""Entry: the first lines of a command, before its modules are there: Ctrl-C ends it quietly."""

import gc
import importlib
import os
import sys
from typing import NoReturn

INTERRUPTED = 130  # as FL-S208


def start(module: str, garbage_every: int = 0) -> NoReturn:
    """Import `module` and call its `main`. It takes a moment, in which somebody may think better
    of it: no traceback then, as later.

    `garbage_every`: objects made between two searches for garbage; 0: as Python does. With 7,000,
    not 700, a client, whose imports make half a million that stay, takes a tenth less to start.
    """
    # gRPC reads it when it is imported; else each handshake that fails is a line on the terminal.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if garbage_every:
        gc.set_threshold(garbage_every)
    try:
        importlib.import_module(module).main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)

"""Entry: the first lines of a command, before its modules are there: Ctrl-C ends it quietly."""

import importlib
import sys
from typing import NoReturn

INTERRUPTED = 130  # as FL-S208


def start(module: str) -> NoReturn:
    """Import `module` and call its `main`. It takes a moment, in which somebody may think better
    of it: no traceback then, as later."""
    try:
        importlib.import_module(module).main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)

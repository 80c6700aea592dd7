"""Later: something that may wait a little for company, in an event loop.

Most such waits end early, because something urgent goes and takes along what waits. A timer for
each would be made and cancelled thousands of times a second; here one stays, and looks when it
comes whether anything is due by now.
"""

import asyncio
import math
from collections.abc import Callable

TICK = 0.001  # seconds by which a loop's timer may come early


class Later:
    """Calls `act` at the earliest moment that was asked for, unless that is taken back before."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self._due = math.inf  # loop's time
        self._looks_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def within(self, seconds: float) -> None:
        """Not after so many seconds."""
        loop = asyncio.get_running_loop()
        self._due = min(self._due, loop.time() + seconds)
        if self._timer is not None:
            if self._looks_at <= self._due:
                return
            self._timer.cancel()
        self._look_at(loop, self._due)

    def done(self) -> None:
        """Nothing waits any more."""
        self._due = math.inf

    def close(self) -> None:
        """The same, and no timer stays."""
        self.done()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_at(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        self._looks_at = at
        self._timer = loop.call_at(at, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if loop.time() > self._due - TICK:
            self.done()
            self._act()
        elif self._due < math.inf:
            self._look_at(loop, self._due)

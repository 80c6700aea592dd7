"""Timers: what fires at a time of the run's clock, kept by the event loop."""

import asyncio
from collections.abc import Callable

from atoll.server.clock import Clock


class Timers:
    """In the thread of the running loop. `fire(timer, at)` is called once for each that is armed
    and not disarmed before."""

    def __init__(self, clock: Clock, fire: Callable[[str, float], None]) -> None:
        self._clock, self._fire = clock, fire
        self._armed: dict[str, asyncio.TimerHandle] = {}

    def arm(self, timer: str, at: float) -> None:
        """Again, where it is armed already."""
        self.disarm(timer)
        loop = asyncio.get_running_loop()
        self._armed[timer] = loop.call_later(self._clock.wall(at), self._fire, timer, at)

    def disarm(self, timer: str) -> None:
        handle = self._armed.pop(timer, None)
        if handle is not None:
            handle.cancel()

    def close(self) -> None:
        for timer in list(self._armed):
            self.disarm(timer)

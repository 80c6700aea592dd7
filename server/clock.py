"""Clock: a run's time, in seconds."""

import time


class Clock:
    """Stands still while the server is down or the run is paused."""

    def __init__(self, start: float = 0.0) -> None:
        self._base = start
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.monotonic()

    def now(self) -> float:
        return self._base + (time.monotonic() - self._since if self._since is not None else 0.0)

    @property
    def began(self) -> float:
        """What it showed when this process came."""
        return self._base

    def wall(self, at: float) -> float:
        """Seconds from now until the run clock shows `at`."""
        return max(0.0, at - self.now())

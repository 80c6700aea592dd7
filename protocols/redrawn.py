"""Redrawn: something rich on stderr that is drawn again in its place, and talk above it.

Where stderr is no terminal nothing is drawn, and the talk is all there is.
"""

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from atoll.protocols import console

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

A_SECOND = 8  # drawings at most


class Redrawn:
    """For as long as its `with` block lasts. `quiet`: say and draw nothing at all."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.redraws = console.interactive() and not quiet
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def draw(self, make: "Callable[[int], RenderableType]") -> None:
        """Draw what `make` gives for a terminal of this width, as often as you like."""
        if not self.redraws:
            return
        if self._live is None:  # not before: an empty table would scroll the screen
            self._live = self._start()
        self._live.update(make(self._live.console.width))

    def say(self, text: str) -> None:
        """A line of talk."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        elif not self.quiet:
            console.say(text)

    def _start(self) -> "Live":
        from rich.live import Live

        live = Live(console=console.console(), refresh_per_second=A_SECOND, redirect_stdout=False)
        live.start()
        return live

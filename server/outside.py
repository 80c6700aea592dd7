"""Outside: what a driver does not do itself."""

from collections.abc import Callable
from typing import Protocol

from atoll.protocols.events import Action, Event, Then
from atoll.server.run import Deliver, Effect, Merge, Order, Outcome, Tell


class World(Protocol):
    """Clients, versions, the history. Nothing here may block or raise."""

    def ready(self, effect: Deliver | Tell) -> None:
        """It will be carried out once it is written: pack it meanwhile. Nothing of it may show."""

    def deliver(self, order: Order) -> None: ...

    def interrupt(self, order: Order, then: Then) -> None: ...

    def quick(self, merge: Merge) -> bool:
        """Whether this merge is quicker done than handed to another thread: then `merge` is called
        before its inputs are written, must change nothing that outlives the process, and calls
        `derive` before it returns."""

    def merge(self, merge: Merge) -> None:
        """Make the version in the background, then post Merged."""

    def tell(self, client: str, outcome: Outcome) -> None: ...

    def heard(
        self, now: float, event: Event, actions: list[Action], effects: list[Effect]
    ) -> Callable[[], None]:
        """For the history and the log: what came and what was decided, while the run stands as it
        did then. What it gives back is called when it is written."""

    def spent(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Payloads no longer needed, and meta rows, to be written with the next batch."""

    def busy(self) -> bool:
        """Whether something will still be posted that a finished run should hear."""

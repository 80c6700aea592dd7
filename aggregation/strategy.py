"""Strategy: when to train whom for how long, and what to merge. Subclass it, answer four hooks.

A strategy is a machine: `handle(event, now) -> actions`. It sees neither sockets nor clocks nor
tensors, so the same object runs on a real server, in virtual time, in the replay of a journal and
in a test of two lines. Its fields are its parameters and its state; they are plain data, dumped to
JSON by `atoll.protocols.state`.
"""

from collections.abc import Iterator

from atoll.protocols.errors import ServerError
from atoll.protocols.events import (
    Action,
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Discard,
    Evaluated,
    Event,
    Merged,
    Stopping,
    TimerFired,
    Update,
    UpdateReceived,
)

Actions = Iterator[Action]


class Strategy:
    """Base of all strategies. Hooks are generators of actions, and all empty here."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about `event` at `now` (run clock, seconds, never decreasing)."""
        try:
            actions = self._heard(event, now)
            if actions is None:
                raise _no_actions(self, event)
            return list(actions)
        except SystemExit as error:  # in a driver's loop it would end more than the run
            raise RuntimeError(f"it calls sys.exit({error.code!r})") from error

    def _heard(self, event: Event, now: float) -> Actions:
        match event:
            case UpdateReceived(update):
                if not update.final:
                    return self.on_snapshot(update, now)
                if not update.current:
                    return self.on_late(update, now)
                return self.on_update(update, now)
            case ClientJoined(client, info):
                return self.on_join(client, info, now)
            case ClientLeft(client, reason):
                return self.on_leave(client, reason, now)
            case TimerFired(timer):
                return self.on_timer(timer, now)
            case Merged():
                return self.on_merged(event, now)
            case Evaluated():
                return self.on_evaluated(event, now)
            case Stopping(reason):  # pragma: no branch
                return self.on_stop(reason, now)

    def merge_sizes(self, clients: int | None = None) -> tuple[int, int | None]:
        """The fewest and the most updates a version may be made of; None: there is no most.

        `clients`: how many there will ever be, None if nobody knows. By this the check at start
        finds an aggregator that would never have enough.
        """
        return 1, None

    def on_join(self, client: str, info: ClientInfo, now: float) -> Actions:
        """A client may be trained from now on."""
        yield from ()

    def on_leave(self, client: str, reason: str, now: float) -> Actions:
        """A client is gone; its open order, if any, is closed."""
        yield from ()

    def on_update(self, update: Update, now: float) -> Actions:
        """A client finished its open order. Every update is aggregated or discarded, once."""
        yield from ()

    def on_late(self, update: Update, now: float) -> Actions:
        """Work for an order that was closed meanwhile."""
        yield Discard(update.id, "its order was closed")

    def on_snapshot(self, update: Update, now: float) -> Actions:
        """Work in progress that was asked for; the client trains on."""
        yield Discard(update.id, "snapshots are not used by this strategy")

    def on_timer(self, timer: str, now: float) -> Actions:
        """A timer of this strategy's is due."""
        yield from ()

    def on_merged(self, merged: Merged, now: float) -> Actions:
        """A version asked for with `Aggregate` exists."""
        yield from ()

    def on_evaluated(self, evaluated: Evaluated, now: float) -> Actions:
        """Metrics of a version are known."""
        yield from ()

    def on_stop(self, reason: str, now: float) -> Actions:
        """The run ends: aggregate what is still held, or leave it. Orders are no longer given."""
        yield from ()


def _no_actions(strategy: Strategy, event: Event) -> ServerError:
    return ServerError(
        "FL-S204",
        f"{type(strategy).__name__} answers {type(event).__name__} with None, not with actions",
        "a hook yields its actions: where it has none to yield, end it with `yield from ()`",
    )

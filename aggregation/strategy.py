"""Strategy: when to train whom for how long, and what to merge. Subclass it, answer four hooks.

A strategy is a machine: `handle(event, now) -> actions`. It sees neither sockets nor clocks nor
tensors, so the same object runs on a real server, in virtual time, in the replay of a journal and
in a test of two lines. Its fields are its parameters and its state; they are plain data, dumped to
JSON by `atoll.protocols.state`.
"""

from collections.abc import Iterator

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
        match event:
            case UpdateReceived(update):
                if not update.final:
                    return list(self.on_snapshot(update, now))
                if not update.current:
                    return list(self.on_late(update, now))
                return list(self.on_update(update, now))
            case ClientJoined(client, info):
                return list(self.on_join(client, info, now))
            case ClientLeft(client, reason):
                return list(self.on_leave(client, reason, now))
            case TimerFired(timer):
                return list(self.on_timer(timer, now))
            case Merged():
                return list(self.on_merged(event, now))
            case Evaluated():
                return list(self.on_evaluated(event, now))
            case Stopping(reason):
                return list(self.on_stop(reason, now))

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

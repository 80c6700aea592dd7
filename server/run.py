"""Run: what every driver must keep straight, kept once. Orders, versions, updates, outcomes.

A machine between a strategy and a driver. It hears the strategy's events, completes them with what
only the run knows (is this order still open? from which version? since when?), lets the strategy
decide, and turns its actions into effects that a driver carries out. The promises of a driver
(`protocols/events.py`) live here, so that the real server, virtual time and a replay cannot differ.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from atoll.aggregation.strategy import Strategy
from atoll.protocols.errors import ServerError
from atoll.protocols.events import (
    MAX_COUNT,
    Action,
    Aggregate,
    Ask,
    CancelTimer,
    ClientJoined,
    ClientLeft,
    Discard,
    Event,
    Finish,
    Merged,
    SetTimer,
    Stopping,
    Then,
    TimerFired,
    Train,
    Update,
    UpdateReceived,
)

Fate = Literal["used", "discarded", "superseded"]

FORMER = 4  # orders closed without a result that are remembered per client, for late results


@dataclass(slots=True)
class Order:
    """One piece of work given to one client."""

    id: str  # "o17"
    client: str
    version: int  # of the model to start from
    steps: int
    extra: Mapping[str, float] = field(default_factory=dict)
    started: float | None = None  # run clock when the version's bytes existed; None: not yet
    asked: bool = False  # for work before its end: fewer steps are right then


@dataclass(slots=True)
class Outcome:
    """What became of an update; told to its client until acknowledged."""

    order: str
    update: str
    fate: Fate
    version: int  # that it became part of; 0 where it did not
    reason: str


@dataclass(slots=True)
class Held:
    """An update whose bytes the driver holds and of which nothing is decided yet."""

    order: str
    client: str
    steps: int


@dataclass(slots=True)
class Deliver:
    order: Order


@dataclass(frozen=True, slots=True)
class Interrupt:
    order: Order
    then: Then


@dataclass(frozen=True, slots=True)
class Merge:
    version: int  # the one to make
    items: tuple[tuple[str, float], ...]
    model: str
    outer: bool
    clients: Mapping[str, str] = field(default_factory=dict)  # update id -> whose it is
    known: int = field(default=0, compare=False)  # clients that have ever been in the run
    # stats of the version as it was made, where it took what clients said: made again, they are
    # not asked again, and it has the same bits
    told: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class Tell:
    client: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Arm:
    timer: str
    at: float


@dataclass(frozen=True, slots=True)
class Disarm:
    timer: str


@dataclass(frozen=True, slots=True)
class Stop:
    reason: str


Effect = Deliver | Interrupt | Merge | Tell | Arm | Disarm | Stop


class StrategyError(Exception):
    """A strategy said something that no driver can carry out; the run stops with it."""


def failed(
    heard: str,
    error: Exception,
    remedy: str = "mend the strategy and start again on the same state directory",
) -> ServerError:
    """The run cannot go on: its strategy raised `error`."""
    return ServerError("FL-S204", f"the strategy failed on {heard}: {error!r}", remedy)


@dataclass
class Run:
    """The book of one run. `handle` is the only way to change it, besides `acknowledge`."""

    strategy: Strategy = field(metadata={"stored": False})  # dumps its own state
    version: int = 0  # newest version said
    published: int = 0  # newest version whose bytes exist
    made: int = 0  # orders given so far
    members: set[str] = field(default_factory=set)
    met: set[str] = field(default_factory=set)  # all who have ever been members
    open: dict[str, Order] = field(default_factory=dict)  # client -> its open order
    former: dict[str, list[Order]] = field(default_factory=dict)  # closed without a result
    held: dict[str, Held] = field(default_factory=dict)  # update id -> undecided update
    merging: dict[int, dict[str, Held]] = field(default_factory=dict)  # version -> its updates
    waiting: dict[int, list[str]] = field(default_factory=dict)  # version -> clients to deliver to
    timers: dict[str, float] = field(default_factory=dict)
    untold: dict[str, dict[str, Outcome]] = field(default_factory=dict)  # client -> update -> fate
    updates_used: int = 0
    steps_used: int = 0
    finished: str | None = None

    def handle(self, event: Event, now: float) -> tuple[Event, list[Action], list[Effect]]:
        """The event as the strategy heard it, what the strategy said, what the driver must do.

        A replay that feeds the first gets the second again. Raises StrategyError, or whatever the
        strategy raises: the run cannot go on then.
        """
        effects: list[Effect] = []
        heard = self._before(event, now, effects)
        if heard is None:
            return event, [], effects
        actions = self.strategy.handle(heard, now)
        for action in actions:
            self._carry_out(action, now, effects)
        if isinstance(event, Stopping):
            self._finish(event.reason, effects)
        return heard, actions, effects

    def expects(self, client: str, order: str, update: str) -> Literal["send", "have", "unknown"]:
        """Whether a result is welcome: `have` means that it arrived before."""
        if update in self.held or update in self.untold.get(client, ()):
            return "have"
        if any(update in items for items in self.merging.values()):
            return "have"
        return "send" if self.order(client, order) else "unknown"

    def order(self, client: str, order: str) -> Order | None:
        """An order of this client's that is open, or was closed without a result."""
        current = self.open.get(client)
        if current is not None and current.id == order:
            return current
        return next((o for o in self.former.get(client, ()) if o.id == order), None)

    def awaited(self) -> set[str]:
        """The orders of which results may still come."""
        closed = (order for former in self.former.values() for order in former)
        return {order.id for order in (*self.open.values(), *closed)}

    def acknowledge(self, client: str, update: str) -> bool:
        """The client knows this outcome; it need not be told again. False where it had no need."""
        told = self.untold.get(client, {})
        if told.pop(update, None) is None:
            return False
        if not told:
            del self.untold[client]
        return True

    # ---- before the strategy hears ----------------------------------------------------------

    def _before(self, event: Event, now: float, effects: list[Effect]) -> Event | None:
        """Bring the book up to date; None where the strategy need not hear of it."""
        match event:
            case UpdateReceived(update):
                return self._receive(update, effects)
            case ClientJoined(client, _):
                assert client not in self.members, f"{client} joined twice"
                self.members.add(client)
                self.met.add(client)
            case ClientLeft(client, _):
                assert client in self.members, f"{client} left without having joined"
                self.members.discard(client)
                self._close(client)
            case TimerFired(timer):
                if self.timers.get(timer, math.inf) > now:
                    return None  # cancelled or set anew while it was already on its way
                del self.timers[timer]
            case Merged():
                self._publish(event, now, effects)
        return None if self.finished is not None else event

    def _receive(self, update: Update, effects: list[Effect]) -> UpdateReceived | None:
        order = self.order(update.client, update.order)
        if order is None:  # it was known when the update came in, and has been forgotten since
            held = Held(update.order, update.client, update.steps)
            self._decide(update.id, held, "discarded", 0, "its order is too old", effects)
            return None
        current = self.open.get(update.client) is order
        if update.final:
            if current:
                del self.open[update.client]
            else:
                self._forget(order)
        held = Held(order.id, update.client, update.steps)
        if self.finished is not None:
            self._decide(update.id, held, "discarded", 0, "the run is over", effects)
            return None
        self.held[update.id] = held
        return UpdateReceived(
            Update(
                update.id, order.id, update.client, order.version, update.steps, update.examples,
                order.started or 0.0, update.train_seconds, update.metrics, current, update.final,
            )
        )  # fmt: skip

    def _publish(self, merged: Merged, now: float, effects: list[Effect]) -> None:
        items = self.merging.pop(merged.version)
        self.published = merged.version
        dropped = dict(merged.dropped)
        for update, held in items.items():
            if update in dropped:
                self._decide(update, held, "discarded", 0, dropped[update], effects)
            else:
                self.updates_used += 1
                self.steps_used += held.steps
                self._decide(update, held, "used", merged.version, "", effects)
        for client in self.waiting.pop(merged.version, ()):
            order = self.open.get(client)
            if order is not None and order.started is None and order.version == merged.version:
                order.started = now
                effects.append(Deliver(order))

    # ---- what the strategy said --------------------------------------------------------------

    def _carry_out(self, action: Action, now: float, effects: list[Effect]) -> None:
        match action:
            case Train(client, steps, extra):
                self._train(client, steps, extra, now, effects)
            case Aggregate(items, model, outer):
                self._aggregate(items, model, outer, effects)
            case Discard(update, reason):
                held = self._take(update)
                self._decide(update, held, "discarded", 0, reason, effects)
            case SetTimer(timer, at):
                if not isinstance(at, int | float) or math.isnan(at):
                    raise StrategyError(f"SetTimer({timer!r}, {at!r}): no time of the run's clock")
                self.timers[timer] = at
                effects.append(Arm(timer, at))
            case CancelTimer(timer):
                if self.timers.pop(timer, None) is not None:
                    effects.append(Disarm(timer))
            case Ask(client, then):
                self._ask(client, then, effects)
            case Finish(reason):
                self._finish(reason, effects)
            case _:
                raise StrategyError(f"{action!r} is no action")

    def _train(
        self, client: str, steps: int, extra: Mapping[str, float], now: float, out: list[Effect]
    ) -> None:
        if self.finished is not None:
            return
        if client not in self.members:
            raise StrategyError(f"Train({client!r}): no such member")
        if client in self.open:
            raise StrategyError(f"Train({client!r}): its order {self.open[client].id} is open")
        if not isinstance(steps, int) or steps < 1:
            raise StrategyError(f"Train({client!r}, {steps!r}): steps are whole, and at least one")
        if steps > MAX_COUNT:  # no message holds it, and it may be too long to be shown
            raise StrategyError(f"Train({client!r}): its steps are more than 2**53")
        order = Order(f"o{self.made}", client, self.version, steps, extra)
        self.made += 1
        self.open[client] = order
        if self.version <= self.published:
            order.started = now
            out.append(Deliver(order))
        else:
            self.waiting.setdefault(self.version, []).append(client)

    def _aggregate(
        self, items: tuple[tuple[str, float], ...], model: str, outer: bool, out: list[Effect]
    ) -> None:
        self.version += 1
        self.merging[self.version] = {update: self._take(update) for update, _ in items}
        for update, weight in items:
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise StrategyError(f"Aggregate: update {update!r} has weight {weight!r}")
        clients = {update: held.client for update, held in self.merging[self.version].items()}
        out.append(Merge(self.version, items, model, outer, clients, len(self.met)))

    def _ask(self, client: str, then: Then, effects: list[Effect]) -> None:
        order = self.open.get(client)
        if order is None:
            raise StrategyError(f"Ask({client!r}, {then!r}): it has no open order")
        if then == "drop":
            self._close(client)
        order.asked = True
        if order.started is not None:
            effects.append(Interrupt(order, then))

    def _finish(self, reason: str, effects: list[Effect]) -> None:
        if self.finished is not None:
            return
        self.finished = reason
        for update, held in sorted(self.held.items()):
            self._decide(update, held, "discarded", 0, "the run is over", effects)
        self.held.clear()
        for client in sorted(self.open):
            order = self.open[client]
            self._close(client)
            if order.started is not None:
                effects.append(Interrupt(order, "drop"))
        effects.extend(Disarm(timer) for timer in sorted(self.timers))
        self.timers.clear()
        effects.append(Stop(reason))

    # ---- small change ------------------------------------------------------------------------

    def _take(self, update: str) -> Held:
        held = self.held.pop(update, None)
        if held is None:
            raise StrategyError(f"update {update!r} is not held: unknown, or decided before")
        return held

    def _decide(
        self, update: str, held: Held, fate: Fate, version: int, reason: str, out: list[Effect]
    ) -> None:
        outcome = Outcome(held.order, update, fate, version, reason)
        self.untold.setdefault(held.client, {})[update] = outcome
        out.append(Tell(held.client, outcome))

    def _close(self, client: str) -> None:
        order = self.open.pop(client, None)
        if order is not None and order.started is not None:
            former = self.former.setdefault(client, [])
            former.append(order)
            del former[:-FORMER]

    def _forget(self, order: Order) -> None:
        former = self.former[order.client]
        former.remove(order)
        if not former:
            del self.former[order.client]

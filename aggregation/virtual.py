"""A driver in exact virtual time, for tests: one strategy, clients that only take their time.

It keeps the promises of a real driver, checks every action, and keeps logs that a test can read as
tables. No tensors, no threads: a scenario of minutes runs in a millisecond.
"""

import heapq
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from atoll.aggregation.strategy import Strategy
from atoll.protocols.events import (
    Action,
    Aggregate,
    Ask,
    CancelTimer,
    ClientInfo,
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

Pace = Callable[[str, int], float]  # (client, which of its orders, from 0) -> seconds per step
Restart = Callable[[Strategy], Strategy]

MERGED, LEAVE, JOIN, UPDATE, TIMER = range(5)  # what happens first at one instant


@dataclass
class Order:
    """One order of a client, and when its result is due."""

    id: str
    client: str
    steps: int
    base: int  # version
    started: float  # seconds
    seconds: float  # of training
    number: int = 0
    open: bool = True


@dataclass(frozen=True)
class Merge:
    """One `Aggregate`, as a line of a table."""

    at: float
    version: int
    weights: dict[str, float]  # by client; of a client that is in it twice, the sum
    staleness: tuple[int, ...]  # in the order of the items
    outer: bool


@dataclass
class Virtual:
    """Drives `strategy` in virtual time and checks every action. Same input, same log.

    Raises AssertionError, naming the action, for an order to a client that is absent or busy, an
    update used twice or never received, or weights that are no numbers.
    """

    strategy: Strategy
    pace: Pace | Mapping[str, float]
    merging: float = 0.0  # seconds until a version exists; orders said behind it wait so long
    overhead: float = 0.0  # seconds an order takes beyond its steps
    version: int = 0
    restart: Restart | None = None  # applied to the strategy before every event
    steps: tuple[int, int] = (1, 1 << 30)  # bounds of an order
    shuffled: int | None = None  # seed of the order within one kind at one instant; None: as posted
    bad: Callable[[str], bool] | None = None  # of an update: it is NaN, and its merge drops it

    now: float = 0.0
    log: list[str] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    discards: list[tuple[float, str, str]] = field(default_factory=list)  # at, update, reason
    timers: dict[str, float] = field(default_factory=dict)  # set, and not yet fired
    updates: dict[str, Update] = field(default_factory=dict)  # received, neither used nor discarded
    settled: set[str] = field(default_factory=set)  # ids of updates used or discarded
    present: set[str] = field(default_factory=set)
    finished: str | None = None

    def __post_init__(self) -> None:
        self._queue: list[tuple[float, int, int, int, Event, str]] = []
        self._posted = 0
        self._open: dict[str, Order] = {}
        self._turns: dict[str, int] = {}
        self._ready = 0.0  # when the newest version exists
        self._sent: set[str] = set()  # orders whose result was asked for before its time

    # ---- the scenario

    def join(
        self, at: float, client: str, examples: int = 1, seconds_per_step: float | None = None
    ) -> None:
        self._post(at, JOIN, ClientJoined(client, ClientInfo(examples, seconds_per_step)))

    def leave(self, at: float, client: str, brings: float | None = None) -> None:
        """Its open order closes; that order's result comes late at `brings`, or never."""
        self._post(at, LEAVE, ClientLeft(client, "gone"), "" if brings is None else repr(brings))

    def fire(self, at: float, timer: str) -> None:
        """A timer that is not set fires: a strategy must not mind."""
        self._post(at, TIMER, TimerFired(timer), "wrong")

    def stop(self, reason: str = "time is up") -> "Virtual":
        """A stop rule ended the run: the last chance to merge what is held."""
        if not self.finished:
            self._handle(Stopping(reason))
        return self

    def run(self, until: float = math.inf, events: int = 1 << 60) -> "Virtual":
        """Let everything up to `until` (included) happen, at most `events` events."""
        while self._queue and self._queue[0][0] <= until and events > 0 and not self.finished:
            at, kind, _, _, event, tag = heapq.heappop(self._queue)
            self.now = at
            if self._is_due(kind, event, tag):
                events -= 1
                self._handle(event)
        return self

    # ---- one event

    def _is_due(self, kind: int, event: Event, tag: str) -> bool:
        match event:
            case TimerFired(timer) if tag == "wrong":
                return timer not in self.timers
            case TimerFired(timer):
                if self.timers.get(timer) != self.now:
                    return False  # cancelled, or set anew
                del self.timers[timer]
            case ClientLeft(client, _):
                if client not in self.present:
                    return False
                self.present.remove(client)
                order = self._close(client)
                if order is not None and tag:
                    self._post(float(tag), UPDATE, _result(order, current=False))
            case ClientJoined(client, _):
                if client in self.present:
                    return False
                self.present.add(client)
            case UpdateReceived(update):
                order = self._open.get(update.client)
                current = order is not None and order.id == update.order
                if current != update.current or (update.order in self._sent and tag != "sent"):
                    return False  # its order was closed and the result is lost, or came before
                if current and update.final:
                    self._close(update.client)
                self.updates[update.id] = update
        return True

    def _handle(self, event: Event) -> None:
        if self.restart is not None:
            self.strategy = self.restart(self.strategy)
        self.log.append(f"{self.now:.6f} {event}")
        for action in self.strategy.handle(event, self.now):
            self.log.append(f"    {action}")
            try:
                self._do(action)
            except AssertionError as error:
                raise AssertionError(f"at {self.now}, {event}: {action}: {error}") from error

    def _do(self, action: Action) -> None:
        match action:
            case Train(client, steps):
                self._train(client, steps)
            case Ask(client, then):
                assert client in self._open, "it has no open order"
                self._ask(client, then)
            case Aggregate(items):
                self._aggregate(items, action.outer)
            case Discard(update, reason):
                assert reason, "a decision explains itself"
                self._settle(update)
                self.discards.append((self.now, update, reason))
            case SetTimer(timer, at):
                assert at >= self.now, "in the past"
                self.timers[timer] = at
                self._post(at, TIMER, TimerFired(timer))
            case CancelTimer(timer):
                self.timers.pop(timer, None)
            case Finish(reason):  # pragma: no branch
                self.finished = reason

    def _train(self, client: str, steps: int) -> None:
        assert client in self.present, "it is absent"
        assert client not in self._open, "it has an open order"
        assert self.steps[0] <= steps <= self.steps[1], f"steps outside of {self.steps}"
        turn = self._turns.get(client, 0)
        self._turns[client] = turn + 1
        pace = self.pace(client, turn) if callable(self.pace) else self.pace[client]
        started = max(self.now, self._ready)
        number = len(self.orders)
        order = Order(f"o{number}", client, steps, self.version, started, steps * pace, number)
        self.orders.append(order)
        self._open[client] = order
        self._post(started + self.overhead + order.seconds, UPDATE, _result(order, current=True))

    def _ask(self, client: str, then: Then) -> None:
        """Its work so far comes at once; with "continue" as a snapshot, and the rest later."""
        order = self._open[client]
        share = (self.now - order.started) / order.seconds if order.seconds else 1.0
        done = replace(order, steps=max(1, int(order.steps * min(max(share, 0.0), 1.0))))
        if then == "drop":
            self._close(client)
        elif then == "send":
            self._sent.add(order.id)
            self._post(self.now, UPDATE, _result(done, current=True), "sent")
        else:
            self._posted += 1
            snapshot = _result(done, current=True, update=f"{order.id}.{self._posted}", final=False)
            self._post(self.now, UPDATE, snapshot)

    def _aggregate(self, items: tuple[tuple[str, float], ...], outer: bool) -> None:
        drawn = hasattr(self.strategy, "sampling")  # in secret: that nobody was must not show
        assert items or drawn, "nothing to merge"
        weights: dict[str, float] = {}
        staleness = []
        for update, weight in items:
            assert math.isfinite(weight), "a weight that is no number"
            assert weight >= 0.0, "a negative weight"
            made = self._settle(update)
            weights[made.client] = weights.get(made.client, 0.0) + weight
            staleness.append(self.version - made.base)
        self.version += 1
        self.merges.append(Merge(self.now, self.version, weights, tuple(staleness), outer))
        self._ready = max(self.now, self._ready) + self.merging
        ids = [update for update, _ in items]
        dropped = tuple((u, "nan in it") for u in ids if self._is_bad(u))
        used = tuple(u for u in ids if not self._is_bad(u))
        self._post(self._ready, MERGED, Merged(self.version, used, dropped))

    def _is_bad(self, update: str) -> bool:
        return self.bad is not None and self.bad(update)

    def _settle(self, update: str) -> Update:
        assert update not in self.settled, f"{update} was used or discarded before"
        assert update in self.updates, f"{update} was not received"
        self.settled.add(update)
        return self.updates.pop(update)

    def _close(self, client: str) -> Order | None:
        order = self._open.pop(client, None)
        if order is not None:
            order.open = False
        return order

    def _post(self, at: float, kind: int, event: Event, tag: str = "") -> None:
        self._posted += 1
        place = self._posted
        if self.shuffled is not None and kind != MERGED:
            place = random.Random(f"{self.shuffled}/{place}").getrandbits(32)
        heapq.heappush(self._queue, (float(at), kind, place, self._posted, event, tag))


def _result(order: Order, current: bool, update: str = "", final: bool = True) -> UpdateReceived:
    return UpdateReceived(
        Update(
            id=update or f"{order.id}.0",
            order=order.id,
            client=order.client,
            base=order.base,
            steps=order.steps,
            examples=order.steps,
            started=order.started,
            train_seconds=order.seconds,
            metrics={"loss": math.nan} if order.number % 3 == 2 else {},
            current=current,
            final=final,
        )
    )

"""Session: what a client does next. Connect, train what was ordered, deliver it, never twice.

A machine: it hears what the server said and what became of the client's own work, and says what to
do. It never retrains what is finished: a result stays in the outbox until the server has told its
outcome, through any number of lost connections and restarts of either side.

    OFFLINE --connect--> CONNECTING --Welcomed--> ONLINE --Lost--> OFFLINE (full-jitter backoff)
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from atoll.protocols.events import Then

# ---- heard ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The process is up; `results` are the update ids found in the outbox, oldest first."""

    results: tuple[tuple[str, str], ...] = ()  # (order, update)


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The server took us in."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection broke, or could not be made."""

    reason: str
    retry_seconds: float = 0.0  # what the server asked for, at least


@dataclass(frozen=True, slots=True)
class Ordered:
    order: str


@dataclass(frozen=True, slots=True)
class Asked:
    order: str
    then: Then


@dataclass(frozen=True, slots=True)
class Finished:
    """Training of `order` ended and its result lies in the outbox as `update`."""

    order: str
    update: str
    final: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """Training of `order` could not be done."""

    order: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Training of `order` stopped without a result, as it was told to."""

    order: str


@dataclass(frozen=True, slots=True)
class Received:
    """The server holds the bytes of `update`."""

    update: str


@dataclass(frozen=True, slots=True)
class Told:
    """The server has decided about `update`."""

    order: str
    update: str
    fate: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """The server refused something of ours. Without an order, it refused us."""

    code: str
    message: str
    hint: str
    order: str
    fatal: bool
    retry_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """The server said goodbye. `done`: the run is over."""

    reason: str
    done: bool
    retry_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that `Connect.at` named has come."""


Event = (
    Started
    | Welcomed
    | Lost
    | Ordered
    | Asked
    | Finished
    | Failed
    | Dropped
    | Received
    | Told
    | Rejected
    | Ended
    | Tick
)

# ---- said ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the control stream, not before `at`; at `at`, say Tick."""

    at: float


@dataclass(frozen=True, slots=True)
class Greet:
    """Send Hello, naming the orders in hand so that they are not sent again."""

    holding: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Work:
    order: str


@dataclass(frozen=True, slots=True)
class Interrupt:
    order: str
    then: Then


@dataclass(frozen=True, slots=True)
class Deliver:
    update: str


@dataclass(frozen=True, slots=True)
class Complain:
    """Tell the server that an order could not be done."""

    order: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Acknowledge:
    update: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Forget `update` in the outbox; its client-side state is committed when it was used."""

    update: str
    fate: str


@dataclass(frozen=True, slots=True)
class Quit:
    """Leave. `code` is empty after a run that ended well."""

    reason: str
    code: str = ""
    hint: str = ""


Action = Connect | Greet | Work | Interrupt | Deliver | Complain | Acknowledge | Settle | Quit

Phase = Literal["offline", "connecting", "online", "over"]


@dataclass
class Session:
    """A client's conversation with one server."""

    seed: str = ""  # of the jitter: the node id, so that no two clients come back together
    base_seconds: float = 0.2  # of the first wait; doubles with each failure
    cap_seconds: float = 30.0
    give_up_seconds: float = float("inf")  # without a server for so long: Quit FL-C101
    phase: Phase = "offline"
    failures: int = 0  # connections lost or not made since the last Welcome
    silent_since: float = 0.0  # run of failures began
    training: str | None = None  # order in work
    next: str | None = None  # order that came while the former is still being stopped
    outbox: dict[str, str] = field(default_factory=dict)  # update -> order, undecided
    received: set[str] = field(default_factory=set)  # of the outbox: the server holds the bytes

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Started(results):
                self.outbox = {update: order for order, update in results}
                self.silent_since = now
                return [Connect(now)]
            case Tick():
                return self._tick()
            case Welcomed():
                self.phase, self.failures = "online", 0
                return [Deliver(u) for u in self.outbox if u not in self.received]
            case Lost(reason, retry):
                return self._lost(reason, retry, now)
            case Ended(reason, done, retry):
                return self._over(reason) if done else self._lost(reason, retry, now)
            case Rejected():
                return self._rejected(event, now)
            case Ordered(order):
                return self._ordered(order)
            case Asked(order, then):
                return [Interrupt(order, then)] if order == self.training else []
            case Finished(order, update, final):
                return self._finished(order, update, final)
            case Failed(order, code, message):
                actions = self._idle(order)
                online = self.phase == "online"
                return [Complain(order, code, message), *actions] if online else actions
            case Dropped(order):
                return self._idle(order)
            case Received(update):
                if update in self.outbox:
                    self.received.add(update)
                return []
            case Told(_, update, fate):
                return self._told(update, fate)

    def holding(self) -> tuple[str, ...]:
        """Orders in hand: in training, or finished and not yet decided."""
        orders = set(self.outbox.values()) | {o for o in (self.training, self.next) if o}
        return tuple(sorted(orders))

    def _tick(self) -> list[Action]:
        if self.phase != "offline":
            return []
        self.phase = "connecting"
        self.received.clear()  # a restarted server may have lost what it had not written down
        return [Greet(self.holding())]

    def _lost(self, reason: str, retry: float, now: float) -> list[Action]:
        if self.phase == "over":
            return []
        if self.failures == 0:
            self.silent_since = now
        self.phase = "offline"
        if now - self.silent_since >= self.give_up_seconds:
            self.phase = "over"
            silence = f"no server for {now - self.silent_since:.0f} s: {reason}"
            return [Quit(silence, "FL-C101", "check the address and that `fl-server start` runs")]
        limit = min(self.cap_seconds, self.base_seconds * 2.0 ** min(self.failures, 30))
        jitter = random.Random(f"{self.seed}/{self.failures}").random()
        self.failures += 1
        return [Connect(now + max(retry, limit * jitter))]

    def _over(self, reason: str, code: str = "", hint: str = "") -> list[Action]:
        self.phase = "over"
        actions: list[Action] = []
        if self.training is not None:
            actions.append(Interrupt(self.training, "drop"))
        return [*actions, Quit(reason, code, hint)]

    def _rejected(self, event: Rejected, now: float) -> list[Action]:
        if event.order:  # a result that the server will never take: the work is lost, we are not
            lost = [u for u, o in self.outbox.items() if o == event.order]
            for update in lost:
                self._drop(update)
            return [Settle(u, "discarded") for u in lost]
        if event.fatal:
            return self._over(event.message, event.code, event.hint)
        return self._lost(event.message, event.retry_seconds, now)

    def _ordered(self, order: str) -> list[Action]:
        if order in self.holding():
            return []
        if self.training is not None:  # the server closed the former: it gives one at a time
            self.next = order
            return [Interrupt(self.training, "drop")]
        self.training = order
        return [Work(order)]

    def _finished(self, order: str, update: str, final: bool) -> list[Action]:
        self.outbox[update] = order
        deliver: list[Action] = [Deliver(update)] if self.phase == "online" else []
        return deliver + (self._idle(order) if final else [])

    def _idle(self, order: str) -> list[Action]:
        if order != self.training:
            return []
        self.training, self.next = self.next, None
        return [] if self.training is None else [Work(self.training)]

    def _told(self, update: str, fate: str) -> list[Action]:
        settle: list[Action] = [Settle(update, fate)] if update in self.outbox else []
        self._drop(update)
        return [*settle, Acknowledge(update)]

    def _drop(self, update: str) -> None:
        self.outbox.pop(update, None)
        self.received.discard(update)

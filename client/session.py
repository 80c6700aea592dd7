"""Session: what a client does next. Connect, train what was ordered, deliver it, never twice.

A machine: it hears what the server said and what became of the client's own work, and says what to
do. It never retrains what is finished: a result stays in the outbox until the server has told its
outcome, through any number of lost connections and restarts of either side. An order whose model is
here is trained on without a server; one whose model was still on its way is given up when the
connection is lost, and sent again.

    OFFLINE --connect--> CONNECTING --Welcomed--> ONLINE --Lost--> OFFLINE (full-jitter backoff)
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from atoll.client.session_events import (
    Acknowledge,
    Action,
    Answered,
    Asked,
    Complain,
    Connect,
    Deliver,
    Dropped,
    Ended,
    Event,
    Failed,
    Fetched,
    Finished,
    Greet,
    Interrupt,
    Lost,
    Ordered,
    Quit,
    Received,
    Rejected,
    Settle,
    Started,
    Tick,
    Told,
    Wake,
    Welcomed,
    Work,
)
from atoll.protocols.events import Then

HELD = 64  # orders that a hello may name

Phase = Literal["offline", "connecting", "online", "over"]


@dataclass
class Session:
    """A client's conversation with one server."""

    seed: str = ""  # of the jitter: the node id, so that no two clients come back together
    base_seconds: float = 0.2  # of the first wait; doubles with each failure
    cap_seconds: float = 30.0  # of a wait, at most
    lease: float = float("inf")  # seconds that the server holds our place, also from its restart on
    give_up_seconds: float = float("inf")  # without a server for so long: Quit FL-C101
    first_seconds: float = float("inf")  # the same, until it was in the run for the first time
    known: bool = False  # it was in the run: its server will be back
    phase: Phase = "offline"
    answered: bool = False  # while connecting: the server was heard
    failures: int = 0  # connections lost or not made since the last Welcome
    silent_since: float = 0.0  # run of failures began
    due: float = 0.0  # of the next connection
    missed: str = ""  # why there is no server, as heard last
    training: str | None = None  # order in work
    fetched: bool = False  # its model is here
    stopping: bool = False  # it was told to stop without a result
    next: str | None = None  # order that came while the former is still being stopped
    outbox: dict[str, str] = field(default_factory=dict)  # update -> order, undecided
    received: set[str] = field(default_factory=set)  # of the outbox: the server holds the bytes
    failed: Failed | None = None  # what the server was told last, if nothing came of it yet

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.phase == "over":
            return []
        match event:
            case Started(results):
                self.outbox = {update: order for order, update in results}
                self.known = bool(results)
                self.silent_since = self.due = now
                return [Connect(now)]
            case Tick(at):
                return self._tick(at, now)
            case Answered():
                self.answered, self.silent_since = True, now
                return []
            case Welcomed(lease):
                self.lease = lease if lease > 0 else float("inf")  # else it did not say
                self.phase, self.failures, self.known, self.failed = "online", 0, True, None
                return [Deliver(u) for u in self.outbox if u not in self.received]
            case Lost(reason, retry):
                return self._lost(reason, retry, now)
            case Ended(reason, done, retry):
                return self._over(reason) if done else self._lost(reason, retry, now)
            case Rejected():
                return self._rejected(event, now)
            case Ordered(order):
                self.failed = None
                return self._ordered(order)
            case Asked(order, then):
                return self._asked(order, then)
            case Fetched(order):
                self.fetched |= order == self.training
                return []
            case Finished(order, update, final):
                return self._finished(order, update, final)
            case Failed():
                return self._failed(event)
            case Dropped(order):
                return self._idle(order)
            case Received(update):
                if update in self.outbox:
                    self.received.add(update)
                return []
            case Told(_, update, fate):  # pragma: no branch
                return self._told(update, fate)

    def holding(self) -> tuple[str, ...]:
        """Orders in hand: in training, or finished and not yet decided, the newest of these."""
        mine = [self.training] if self.training and self.fetched and not self.stopping else []
        finished = dict.fromkeys(reversed(self.outbox.values()))
        return tuple(dict.fromkeys((*mine, *finished)))[:HELD]

    def _tick(self, at: float, now: float) -> list[Action]:
        if self.phase == "connecting" and at == self._end() and not self.answered:
            return self._give_up(now)  # a host that swallows packets says nothing for long
        if self.phase != "offline" or at != self.due:
            return []
        if self.failures and at >= self._end():
            return self._give_up(now)
        self.phase, self.answered = "connecting", False
        self.received.clear()  # a restarted server may have lost what it had not written down
        wake: list[Action] = [Wake(self._end())] if self._end() < float("inf") else []
        return [*wake, Greet(self.holding())]

    def _lost(self, reason: str, retry: float, now: float) -> list[Action]:
        if self.phase == "online":
            self.silent_since = now
        self.phase, self.missed = "offline", reason
        self.next = None  # it will be sent again
        stop = self._stop() if not self.fetched else []
        if now >= self._end():
            return [*stop, *self._give_up(now)]
        cap = min(self.cap_seconds, max(self.base_seconds, self.lease / 2))
        limit = min(cap, self.base_seconds * 2.0 ** min(self.failures, 30))
        jitter = random.Random(f"{self.seed}/{self.failures}").random()
        self.failures += 1
        self.due = min(self._end(), now + max(retry, limit * jitter))
        return [*stop, Connect(self.due)]

    def _end(self) -> float:
        """When patience with a silent server ends."""
        first = float("inf") if self.known else self.first_seconds
        return self.silent_since + min(self.give_up_seconds, first)

    def _give_up(self, now: float) -> list[Action]:
        silence = f"no server for {now - self.silent_since:.0f} s: {self.missed or 'no answer'}"
        hint = "check the address and that `fl-server start` runs"
        if not self.known:
            hint = "check the address: `fl-server start` has not begun there, or its run is over"
        return self._over(silence, "FL-C101", hint)

    def _over(self, reason: str, code: str = "", hint: str = "") -> list[Action]:
        self.phase = "over"
        return [*self._stop(), Quit(reason, code, hint)]

    def _failed(self, event: Failed) -> list[Action]:
        complain: list[Action] = []
        if self.phase == "online" and event.order == self.training and not self.stopping:
            self.failed = event
            complain = [Complain(event.order, event.code, event.message)]
        return complain + self._idle(event.order)

    def _rejected(self, event: Rejected, now: float) -> list[Action]:
        if event.order:  # a result that the server will never take: the work is lost, we are not
            lost = [u for u, o in self.outbox.items() if o == event.order]
            for update in lost:
                self._drop(update)
            return [Settle(u, "discarded") for u in lost]
        if event.fatal:  # what we complained of, where we did: the server only repeats it
            why = self.failed or event
            return self._over(why.message, why.code, why.hint)
        return self._lost(event.message, event.retry_seconds, now)

    def _ordered(self, order: str) -> list[Action]:
        known = order == self.training and not self.stopping
        if known or order == self.next or order in self.outbox.values():
            return []
        if self.training is None:
            return self._work(order)
        self.next = order  # the server closed the former one: it gives one at a time
        return self._stop()

    def _asked(self, order: str, then: Then) -> list[Action]:
        if order == self.next and then == "drop":
            self.next = None
        if order != self.training or self.stopping:
            return []
        return self._stop() if then == "drop" else [Interrupt(order, then)]

    def _finished(self, order: str, update: str, final: bool) -> list[Action]:
        self.outbox[update] = order
        if order == self.next:  # it was finished when it was told to stop, and has been sent again
            self.next = None
        deliver: list[Action] = [Deliver(update)] if self.phase == "online" else []
        return deliver + (self._idle(order) if final else [])

    def _idle(self, order: str) -> list[Action]:
        """Training of `order` has ended, whatever came of it."""
        if order != self.training:
            return []
        self.training = None
        return [] if self.next is None else self._work(self.next)

    def _work(self, order: str) -> list[Action]:
        self.training, self.next = order, None
        self.fetched = self.stopping = False
        return [Work(order)]

    def _stop(self) -> list[Action]:
        """End what is in training without a result; it says when it has ended."""
        if self.training is None or self.stopping:
            return []
        self.stopping = True
        return [Interrupt(self.training, "drop")]

    def _told(self, update: str, fate: str) -> list[Action]:
        settle: list[Action] = [Settle(update, fate)] if update in self.outbox else []
        self._drop(update)
        return [*settle, Acknowledge(update)]

    def _drop(self, update: str) -> None:
        self.outbox.pop(update, None)
        self.received.discard(update)

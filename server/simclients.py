"""The clients of a simulated run: they come and go, train, and send; time is all it takes them.

What a client does when its connection, its process or its order is lost is what the real one does
(`client/session.py`): finished work is never lost and never done again.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from atoll.protocols.errors import UsageError
from atoll.protocols.events import (
    ClientInfo,
    ClientJoined,
    ClientLeft,
    Event,
    Then,
    Update,
    UpdateReceived,
)
from atoll.protocols.membership import Back, Left, Membership
from atoll.server.learning import Learning
from atoll.server.run import Order, Run
from atoll.server.simulation import ClientSummary
from atoll.server.world import Absence, ClientModel, Pace

LEAVE, JOIN, UPDATE, TIMER = range(4)  # what comes first at one instant


class Host(Protocol):
    """Who owns the clock, the heap and the book."""

    now: float
    run: Run
    learning: Learning

    def push(self, at: float, rank: int, act: Callable[..., None], what: object) -> int:
        """Let `act(what, ticket)` happen at `at`; returns the ticket, which is never 0."""

    def hear(self, event: Event) -> None: ...


@dataclass(slots=True, eq=False)
class Work:
    """An order on its client, or its finished result on the way."""

    order: Order
    steps: int  # to run
    pace: float  # seconds per step
    given: float  # from when on it occupies its client
    begin: float  # of training
    end: float  # of training
    ticket: int = 0  # of its arrival in the heap; another number there: that event is void
    snapshot: int = 0  # counts from 1 those of one order; 0: the final result


@dataclass(slots=True, eq=False)
class Client:
    model: ClientModel
    pace: Pace
    up: float  # seconds a result takes
    fence: int = 0
    here: bool = False  # connected
    work: Work | None = None  # downloading, training, or uploading with nothing newer to do
    outbox: list[Work] = field(default_factory=list)  # other results, not yet received
    snapshots: int = 0
    busy: float = 0.0  # seconds with work
    since: float = 0.0  # connected since
    connected: float = 0.0  # seconds, before `since`
    updates: int = 0
    steps: int = 0
    seen: float | None = None  # seconds per step of its last result
    bytes_up: int = 0
    bytes_down: int = 0


class Clients:
    """All clients, by name in `of`. The host calls `deliver` and `interrupt`; the heap the rest."""

    def __init__(
        self,
        host: Host,
        models: Sequence[ClientModel],
        seed: int,
        lease: float,
        update_bytes: int,
        model_bytes: int,
    ) -> None:
        self._host = host
        self.members = Membership(lease)
        self._sizes = (update_bytes, model_bytes)
        self.arrived = update_bytes  # bytes of the last result
        self.of = {m.name: Client(m, Pace(m, seed), self._seconds_up(m)) for m in models}
        if len(self.of) != len(models):
            names = [m.name for m in models]
            twice = next(n for n in names if names.count(n) > 1)
            raise UsageError(
                "FL-S102", f"two clients are named {twice!r}", "give each its own name"
            )
        for client in self.of.values():
            host.push(client.model.joins, JOIN, self.arrive, client)

    def _seconds_up(self, client: ClientModel) -> float:
        size = self._host.learning.upload(client.name)
        return client.latency + (self._sizes[0] if size is None else size) / client.up

    def summaries(self) -> dict[str, ClientSummary]:
        """What each has done by now."""
        now, made = self._host.now, {}
        for name, client in self.of.items():
            connected, busy = client.connected, client.busy
            if client.here:
                connected += now - client.since
                busy += now - client.work.given if client.work is not None else 0.0
            made[name] = ClientSummary(
                client.updates, client.steps, busy, connected, client.bytes_up, client.bytes_down
            )
        return made

    # ---- clients come and go -----------------------------------------------------------------

    def arrive(self, client: Client, ticket: int) -> None:
        """It connects, for the first time or again, and sends what it has finished meanwhile."""
        name, now = client.model.name, self._host.now
        self._put_away(client)
        finished = list(client.outbox)
        if client.work is not None:
            client.work.given = now
            self._send(client, client.work)
        came = self.members.hello(name, name, now)
        client.here, client.since, client.fence = True, now, came.fence
        if isinstance(came, Back):
            self._resume(client)
        else:
            said = client.model.seconds_per_step if client.model.benchmark else None
            examples = self._host.learning.examples(name)
            held = client.model.examples if examples is None else examples
            self._host.hear(ClientJoined(name, ClientInfo(held, said or came.seconds_per_step)))
        for work in finished:
            work.given = now
            self._send(client, work)
        away = client.pace.next_absence(now)
        if away is not None:
            self._host.push(away.at, LEAVE, self._vanish, (client, away))

    def _resume(self, client: Client) -> None:
        """Back within its lease: an order it lost is sent again, and the run hears nothing."""
        order = self._host.run.open.get(client.model.name)
        held = [work.order for work in (*client.outbox, client.work) if work is not None]
        if order is not None and order.started is not None and order not in held:
            self.deliver(order)

    def _vanish(self, gone: tuple[Client, Absence], ticket: int) -> None:
        client, away = gone
        name, now = client.model.name, self._host.now
        client.here = False
        client.connected += now - client.since
        self._put_away(client)
        work = client.work
        if work is not None:
            client.busy += now - work.given
            work.ticket = 0
            if away.how != "offline" or work.begin > now:
                client.work = None  # died with its process, or before the model was there
        for sent in client.outbox:
            sent.ticket = 0
        if away.how != "offline":
            self._host.learning.died(name)
        if away.how != "offline":  # a snapshot whose step was not done dies with its process
            client.outbox = [sent for sent in client.outbox if sent.end <= now]
        if client.seen is not None:
            self.members.learned(name, client.seen)
        if away.how == "goodbye":
            self.members.goodbye(name, client.fence, now)
            self._host.hear(ClientLeft(name, self.members.members[name].reason))
        else:
            self.members.heard(name, client.fence, now)
            self.members.broken(name, client.fence, now)
            self._host.push(now + self.members.lease, LEAVE, self._end_leases, None)
        if away.until < math.inf:
            self._host.push(away.until, JOIN, self.arrive, client)

    def _put_away(self, client: Client) -> None:
        """A result whose training has ended lies in the outbox, whatever becomes of its client."""
        work = client.work
        if work is not None and work.end <= self._host.now:
            client.outbox.append(work)
            client.work = None

    def _end_leases(self, _: None, ticket: int) -> None:
        for name in self.members.alive():
            client = self.of[name]
            if client.here:  # it has sent its heartbeats, which are no events here
                self.members.heard(name, client.fence, self._host.now)
        for decision in self.members.tick(self._host.now):
            assert isinstance(decision, Left), "nobody here is silent"
            self._host.hear(ClientLeft(decision.name, decision.reason))

    # ---- work --------------------------------------------------------------------------------

    def deliver(self, order: Order) -> None:
        client = self.of[order.client]
        if not client.here:
            return  # it waits for the next hello
        self._put_away(client)
        self._abandon(client)
        now, pace = self._host.now, client.pace.next_order()
        size = self._host.learning.sent(order)
        size = self._sizes[1] if size is None else size
        client.bytes_down += size
        begin = now + client.model.latency + size / client.model.down
        client.work = Work(order, order.steps, pace, now, begin, begin + order.steps * pace)
        client.snapshots = 0
        self._send(client, client.work)

    def _send(self, client: Client, work: Work) -> None:
        """The result leaves its client when its training has ended, or now."""
        leaves = work.end if work.end > self._host.now else self._host.now
        work.ticket = self._host.push(leaves + client.up, UPDATE, self._received, (client, work))

    def _received(self, sent: tuple[Client, Work], ticket: int) -> None:
        client, work = sent
        if work.ticket != ticket:
            return
        if work is client.work:
            client.work = None
        else:
            client.outbox.remove(work)
        if not work.snapshot:
            client.busy += self._host.now - work.given
            client.updates += 1
            client.steps += work.steps
            client.seen = work.pace
        self._result(client.model.name, work)

    def _result(self, client: str, work: Work) -> None:
        order = work.order
        if self._host.run.order(client, order.id) is None:
            return  # older than what the run remembers: it is refused
        update = f"{order.id}.0" + (f"s{work.snapshot}" if work.snapshot else "")
        worked = self._host.learning.train(client, order, work.steps, update, not work.snapshot)
        self.arrived = self._sizes[0] if worked.bytes is None else worked.bytes
        self.of[client].bytes_up += self.arrived
        seconds = work.steps * work.pace
        self._host.hear(
            UpdateReceived(
                Update(
                    update, order.id, client, order.version, work.steps, worked.examples, 0.0,
                    seconds, worked.metrics, final=not work.snapshot,
                )
            )
        )  # fmt: skip

    def interrupt(self, order: Order, then: Then) -> None:
        client = self.of[order.client]
        at = self._host.now + client.model.latency
        self._host.push(at, UPDATE, self._asked, (client, order, then))

    def _asked(self, ask: tuple[Client, Order, Then], ticket: int) -> None:
        """An ask has reached its client, which looks for one after each local step."""
        client, order, then = ask
        work, now = client.work, self._host.now
        if work is None or work.order is not order or work.end <= now or not client.here:
            return
        if then == "drop":
            self._abandon(client)
            return
        done = max(1, math.ceil((now - work.begin) / work.pace - 1e-9))
        end = max(now, work.begin + done * work.pace)
        if then == "send":
            work.steps, work.end = done, end
            self._send(client, work)
        else:
            client.snapshots += 1
            part = Work(order, done, work.pace, now, work.begin, end, snapshot=client.snapshots)
            client.outbox.append(part)
            self._send(client, part)

    def _abandon(self, client: Client) -> None:
        """Whatever it was at comes to nothing."""
        if client.work is not None:
            client.work.ticket = 0
            client.busy += self._host.now - client.work.given
            client.work = None
